"""A table of a report: one frame, shown in a notebook and written as CSV, Markdown and LaTeX."""

from __future__ import annotations

import html
import re
from dataclasses import dataclass

import pandas as pd

from .words import latex, markdown


@dataclass(frozen=True)
class Table:
    """A named table with its caption."""

    name: str
    frame: pd.DataFrame
    caption: str

    def files(self) -> dict[str, bytes]:
        """The files to be written, by name."""
        texts = {
            "csv": self.frame.to_csv(index=False),
            "md": self._markdown(),
            "tex": self._latex(),
        }
        return {f"{self.name}.{kind}": text.encode() for kind, text in texts.items()}

    def _markdown(self) -> str:
        """GitHub's Markdown, the caption under the table."""
        return f"{pipe_table(self.frame)}\n\n{markdown(self.caption)}\n"

    def _latex(self) -> str:
        style = self.frame.style.hide(axis="index").format(escape="latex")
        text = style.format_index(escape="latex", axis=1).to_latex(
            hrules=True, caption=latex(self.caption), label=f"tab:{self.name}", convert_css=False
        )
        for sign, command in (("λ", r"$\lambda$"), ("→", r"$\to$"), ("−", "$-$")):
            text = text.replace(sign, command)
        return text

    def __repr__(self) -> str:
        return f"{self.caption}\n{self.frame.to_string(index=False)}"

    def _repr_html_(self) -> str:
        text = self.frame.to_html(index=False)
        # A narrow page breaks no line within an interval or a step of λ.
        text = re.sub(r"(?<=,) (?=[−+\d.]+\])| (?=→)|(?<=→) ", "\u00a0", text)
        return f"{text}<p><em>{html.escape(self.caption)}</em></p>"


def pipe_table(frame: pd.DataFrame) -> str:
    """A frame as a Markdown table, its text shown as it is."""
    rows = [list(frame.columns), ["---"] * frame.shape[1], *frame.astype(str).to_numpy().tolist()]
    return "\n".join("| " + " | ".join(markdown(str(cell)) for cell in row) + " |" for row in rows)
