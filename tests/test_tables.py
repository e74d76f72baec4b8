"""A table from one frame in three forms."""

from __future__ import annotations

from io import BytesIO

import pandas as pd
import pytest

from sssd.reproduce.tables import Table


def test_a_table_in_three_forms() -> None:
    frame = pd.DataFrame({"λ": ["50 → 75", "1"], "AP": ["−0.5", "2 %"]})
    files = Table("t", frame, "What λ does.").files()
    assert files.keys() == {"t.csv", "t.md", "t.tex"}
    assert pd.read_csv(BytesIO(files["t.csv"]), dtype=str).equals(frame)
    assert files["t.md"].decode() == (
        "| λ | AP |\n| --- | ---: |\n| 50 → 75 | −0.5 |\n| 1 | 2 % |\n\nWhat λ does.\n"
    )
    latex = files["t.tex"].decode()
    assert r"50 $\to$ 75 & $-$0.5" in latex and r"2 \%" in latex
    assert r"\caption{What $\lambda$ does.}" in latex and r"\label{tab:t}" in latex
    assert latex.isascii()


@pytest.mark.parametrize(
    ("cells", "right"),
    [
        (["1.5", "2", "3"], True),
        (["+1.0 [−2.0, +3.0]", "", "≈ 50"], False),
        (["1 → 2", "3", "4"], False),
    ],
)
def test_tables_are_laid_out(cells: list[str], right: bool) -> None:
    laid = Table("t", pd.DataFrame({"a": ["x", "x", "y"], "b": cells}), "").layout()
    assert laid["right"] == [False, right]
    assert [row[0] for row in laid["rows"]] == ["x", "", "y"]  # the same as above is left out
    assert [row[1] for row in laid["rows"]] == cells


def test_long_heads_are_broken_to_the_width_of_the_cells() -> None:
    frame = pd.DataFrame({"method": ["LGD"], "÷ baseline, inference": ["1.00"]})
    assert Table("t", frame, "").layout()["heads"] == [["method"], ["÷", "baseline,", "inference"]]
