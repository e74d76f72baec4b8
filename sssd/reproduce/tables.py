"""A table of a report: one frame, shown in notebook, page and print; written as CSV, Markdown, LaTeX."""

from __future__ import annotations

import html
import re
import textwrap
from dataclasses import dataclass
from typing import Any

import pandas as pd

from .words import latex, markdown

NUMBER = re.compile(r"[+−-]?\d[\d,.]*( ?%)?( \[.*\])?|–|—|")


@dataclass(frozen=True)
class Table:
    """A frame of text with its caption; ``name`` is that of its files."""

    name: str
    frame: pd.DataFrame
    caption: str

    def files(self) -> dict[str, bytes]:
        """The files to be written, by name."""
        texts = {
            "csv": self.frame.to_csv(index=False),
            "md": f"{self.markdown()}\n\n{markdown(self.caption)}\n",
            "tex": self._latex(),
        }
        return {f"{self.name}.{kind}": text.encode() for kind, text in texts.items()}

    def layout(self) -> dict[str, Any]:
        """What ``document.typ`` sets: ``heads`` in lines, ``rows``, and which columns are ``right``.

        Heads are broken to about the width of the cells. In the first column a text that is the
        same as in the row above is left out.
        """
        heads, right = [], []
        for head, column in self.frame.items():
            width = max([9, *map(len, column)])
            heads.append(
                textwrap.wrap(str(head), width, break_long_words=False, break_on_hyphens=False)
            )
            right.append(len(heads) > 1 and any(column) and all(map(NUMBER.fullmatch, column)))
        rows = self.frame.to_numpy().tolist()
        same = self.frame.iloc[:, 0].eq(self.frame.iloc[:, 0].shift())
        rows = [["", *row[1:]] if above else row for row, above in zip(rows, same, strict=True)]
        return {"heads": heads, "right": right, "rows": rows}

    def markdown(self) -> str:
        """The table alone as GitHub's Markdown, its text shown as it is."""
        laid = self.layout()
        marks = ["---:" if right else "---" for right in laid["right"]]
        lines = [list(self.frame), marks, *laid["rows"]]
        return "\n".join(f"| {' | '.join(map(markdown, line))} |" for line in lines)

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
        # On a narrow page no line breaks within an interval or a step of λ.
        text = re.sub(r"(?<=,) (?=[−+\d.]+\])| (?=→)|(?<=→) ", "\u00a0", text)
        return f"{text}<p><em>{html.escape(self.caption)}</em></p>"
