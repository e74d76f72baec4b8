"""A table from one frame in three forms."""

from __future__ import annotations

from io import BytesIO

import pandas as pd

from sssd.reproduce.tables import Table


def test_a_table_in_three_forms() -> None:
    frame = pd.DataFrame({"λ": ["50 → 75", "1"], "AP": ["−0.5", "2 %"]})
    files = Table("t", frame, "What λ does.").files()
    assert files.keys() == {"t.csv", "t.md", "t.tex"}
    assert pd.read_csv(BytesIO(files["t.csv"]), dtype=str).equals(frame)
    assert files["t.md"].decode() == (
        "| λ | AP |\n| --- | --- |\n| 50 → 75 | −0.5 |\n| 1 | 2 % |\n\nWhat λ does.\n"
    )
    latex = files["t.tex"].decode()
    assert r"50 $\to$ 75 & $-$0.5" in latex and r"2 \%" in latex
    assert r"\caption{What $\lambda$ does.}" in latex and r"\label{tab:t}" in latex
    assert latex.isascii()
