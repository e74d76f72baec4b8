"""Tables, and numbers as text: points of 100, intervals, verdicts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from ..intervals import Interval


@dataclass(frozen=True)
class Table:
    """A table of a report, shown in a notebook and saved as CSV, Markdown and LaTeX."""

    frame: pd.DataFrame
    caption: str

    def save(self, folder: Path, name: str) -> Table:
        """Write ``name``.csv, .md and .tex into ``folder``, all from the same frame."""
        folder.mkdir(parents=True, exist_ok=True)
        self.frame.to_csv(folder / f"{name}.csv", index=False)
        (folder / f"{name}.md").write_text(self.markdown() + "\n")
        style = self.frame.style.hide(axis="index").format(escape="latex")
        latex = style.format_index(escape="latex", axis=1).to_latex(
            hrules=True, caption=_latex(self.caption), label=f"tab:{name}", convert_css=False
        )
        for sign, command in (("λ", r"$\lambda$"), ("→", r"$\to$"), ("−", "$-$")):
            latex = latex.replace(sign, command)
        (folder / f"{name}.tex").write_text(latex)
        return self

    def markdown(self) -> str:
        """The table in GitHub's Markdown, its caption under it."""
        rows = [list(self.frame.columns), ["---"] * self.frame.shape[1]]
        rows += self.frame.astype(str).to_numpy().tolist()
        lines = ["| " + " | ".join(markdown(str(cell)) for cell in row) + " |" for row in rows]
        return "\n".join([*lines, "", markdown(self.caption)])

    def _repr_html_(self) -> str:
        return f"{self.frame.to_html(index=False)}<p><em>{self.caption}</em></p>"


def markdown(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*_<>|#~])", r"\\\1", text)


def _latex(text: str) -> str:
    """Text that LaTeX sets as it is."""
    words = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return re.sub(r"[\\~^&%$#_{}]", lambda sign: words.get(sign[0], "\\" + sign[0]), text)


def verdict(difference: Interval) -> str:
    """What an interval of a difference allows to be said."""
    if not difference.distinct:
        return (
            "no difference beyond seeds" if difference.seeds > 1 else "no difference beyond images"
        )
    return "higher" if difference.estimate > 0 else "lower"


def percent(value: float) -> str:
    """AP as the papers print it: in points of 100, one decimal."""
    return "" if value != value else f"{100 * value:.1f}"


def bracketed(value: Interval) -> str:
    """A number in points of 100 with its 95 % interval, where there is one."""
    if value.low != value.low:
        return percent(value.estimate)
    return f"{100 * value.estimate:.1f} [{100 * value.low:.1f}, {100 * value.high:.1f}]"


def signed(difference: Interval) -> str:
    """A difference in AP points with its 95 % interval."""
    low, high = 100 * difference.low, 100 * difference.high
    return f"{100 * difference.estimate:+.1f} [{low:+.1f}, {high:+.1f}]".replace("-", "−")
