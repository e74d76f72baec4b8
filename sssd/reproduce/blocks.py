"""The blocks of a report, which are set in print by ``document.typ`` and on the web by `on_the_web`."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd

from .words import markdown

NUMBER = re.compile(r"[+−-]?\d[\d,.]*( ?%)?( \[.*\])?|–|—|")
SHOWN = {"csv": "CSV", "tex": "LaTeX"}
"""What the links to a table's files are called."""


@dataclass(frozen=True)
class Text:
    text: str
    style: Literal["paragraph", "heading", "subheading", "warning", "command"] = "paragraph"


@dataclass(frozen=True)
class Items:
    items: Sequence[str]


@dataclass(frozen=True)
class Picture:
    name: str
    caption: str
    command: str


@dataclass(frozen=True)
class Grid:
    """A table, laid out: cells are text, a line break in one parts its paragraphs."""

    caption: str
    heads: list[list[str]]
    """For each column the lines of its head."""
    right: list[bool]
    """For each column whether it holds numbers, which stand on the right."""
    rows: list[list[str]]
    rules: list[int]
    """The rows that begin a group, above which a line is drawn."""
    widths: Sequence[float] = ()
    """Shares of the page's width, 0: as wide as the text; none: the whole table is."""
    command: str = ""
    name: str = ""
    """Of the table's files, where it has any."""
    kinds: Sequence[str] = tuple(SHOWN)
    """Of these files."""


Block = Text | Items | Picture | Grid


def grid(frame: pd.DataFrame, caption: str, **options: Any) -> Grid:
    """Lay out a table of text.

    Long heads are broken to about the width of the cells. In the first two columns a text that is
    the same as in the row above is left out, and a line parts the groups that share a first cell.
    """
    cells = [[str(cell) for cell in row] for row in frame.to_numpy().tolist()]
    heads, right = [], []
    for position, name in enumerate(frame.columns.str.replace(" %", "\u00a0%")):
        column = [row[position] for row in cells]
        width = max([9, *map(len, column)])
        heads.append(textwrap.wrap(name, width, break_long_words=False, break_on_hyphens=False))
        right.append(position > 0 and any(column) and all(map(NUMBER.fullmatch, column)))
    words = 1 + (len(heads) > 1 and not right[1])
    rows = [
        [
            "" if i and j < words and cells[i - 1][: j + 1] == row[: j + 1] else cell
            for j, cell in enumerate(row)
        ]
        for i, row in enumerate(cells)
    ]
    starts = [i for i in range(1, len(cells)) if cells[i][0] != cells[i - 1][0]]
    rules = starts if len(starts) < len(cells) - 1 else []
    return Grid(caption, heads, right, rows, rules, **options)


def on_the_web(block: Block) -> str:
    """A block as GitHub's Markdown."""
    match block:
        case Text(text, style):
            forms = {"heading": "## {}", "subheading": "### {}", "warning": "> **{}**"}
            if style == "command":
                return f"```sh\n{text}\n```"
            return forms.get(style, "{}").format(markdown(text))
        case Items(items):
            return "\n".join(f"- {markdown(item)}" for item in items)
        case Picture(name, caption, command):
            shown = [f"![{name}]({name}.png)", f"*{markdown(caption)}*"]
        case Grid(caption, command=command, name=name):
            marks = ["---:" if right else "---" for right in block.right]
            rows = [[markdown(" ".join(head)) for head in block.heads], marks]
            rows += [[markdown(cell).replace("\n", "<br>") for cell in row] for row in block.rows]
            links = [f"[{SHOWN[kind]}]({name}.{kind})" for kind in block.kinds if name]
            files = f" As {', '.join(links)}." if links else ""
            table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
            shown = [table, f"*{markdown(caption)}*{files}"]
    return "\n\n".join([*shown, *([on_the_web(Text(command, "command"))] if command else [])])
