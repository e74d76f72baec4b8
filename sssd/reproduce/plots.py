"""Figures: one style, one way to mark and to write them, and the drawings that several share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ..intervals import Interval
from ..methods import REGISTERED

COLUMN = 3.4
"""Width of a text column in inches: figures are drawn at their printed size."""
# Okabe and Ito's colours, which differ in grey, too; marks and dashes say the same.
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
VERMILION, SKY, BLACK = "#D55E00", "#56B4E9", "#000000"
GREY = "#888888"
BASELINE: dict[str, Any] = {"color": GREY, "linewidth": 0.9, "label": "baseline"}


def _look(color: str, marker: str, linestyle: str) -> dict[str, Any]:
    return {"color": color, "marker": marker, "linestyle": linestyle}


class Looks(dict[str, dict[str, Any]]):
    """How a method or a variant of λ is drawn in every figure; the user's own methods look alike."""

    def __missing__(self, name: str) -> dict[str, Any]:
        if name in REGISTERED:
            return self["own"]
        raise KeyError(name)


LOOKS = Looks(
    {
        "fixed λ1": _look(BLUE, "o", "--"),
        "fixed λ2": _look(ORANGE, "s", ":"),
        "stepwise": _look(BLACK, "D", "-"),
        "labelenc": _look(GREEN, "^", "-."),
        "lgd": _look(BLUE, "o", "--"),
        "kl": _look(PINK, "v", ":"),
        "sssd": _look(VERMILION, "D", "-"),
        "own": _look(SKY, "X", "-."),
    }
)
CYCLE = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
"""Dashes for lines that are told apart by colour as well."""


def style() -> None:
    """The one look of all figures: readable in print, in grey and by colour-blind readers."""
    sns.set_theme(
        context="paper",
        style="ticks",
        rc={
            "font.family": "DejaVu Sans",
            "font.size": 8,
            "axes.labelsize": 8,
            "axes.titlesize": 9,
            "xtick.labelsize": 7,
            "ytick.labelsize": 7,
            "legend.fontsize": 7,
            "legend.frameon": False,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.linewidth": 0.7,
            "xtick.major.width": 0.7,
            "ytick.major.width": 0.7,
            "axes.grid": True,
            "grid.color": "#dddddd",
            "grid.linewidth": 0.5,
        },
    )


def panels(
    rows: int, columns: int, size: tuple[float, float], **options: Any
) -> tuple[Figure, Any]:
    """A figure of ``size`` inches in the common look, and its axes as an array [rows, columns]."""
    style()
    options = {"layout": "constrained", "squeeze": False, **options}
    return plt.subplots(rows, columns, figsize=size, **options)


@dataclass(frozen=True)
class Plot:
    """A named figure with its caption, shown in a notebook and written as SVG and PNG."""

    name: str
    figure: Figure
    caption: str
    animation: str = ""
    """HTML that a page shows in the figure's place; the files hold the still figure."""

    def files(self) -> dict[str, bytes]:
        """The files to be written, by name; the same figure gives the same bytes."""
        return {f"{self.name}.svg": self._draw("svg"), f"{self.name}.png": self._draw("png")}

    def _draw(self, kind: str, dpi: int = 200) -> bytes:
        unset = {
            "svg": "Date",
            "png": "Software",
        }  # else the file says when or with what it was made
        content = BytesIO()
        with plt.rc_context({"svg.hashsalt": "sssd"}):  # else its ids are drawn at random
            self.figure.savefig(
                content, format=kind, dpi=dpi, bbox_inches="tight", metadata={unset[kind]: None}
            )
        return content.getvalue()

    def __repr__(self) -> str:
        return f"[figure {self.name}] {self.caption}"

    def _repr_png_(self) -> bytes:
        return self._draw("png", dpi=120)

    def _repr_html_(self) -> str | None:
        return self.animation or None


def mark(figure: Figure, source: str, smoke: bool) -> None:
    """Name the source under a figure, and mark a smoke run's figure as meaningless."""
    look: dict[str, Any] = {"ha": "right", "va": "top", "fontsize": 6, "color": "#555555"}
    figure.text(0.995, 0.0, source, parse_math=False, **look)  # the data may be called $x_{$
    if smoke:
        middle: dict[str, Any] = {"ha": "center", "va": "center", "rotation": 25, "zorder": 10}
        text = "SMOKE RUN\nnumbers mean nothing"
        figure.text(0.5, 0.5, text, fontsize=26, color="#bbbbbb", alpha=0.6, **middle)


def draw_intervals(
    axes: Axes, at: Sequence[float], values: Sequence[Interval], **look: Any
) -> None:
    """Estimates with their intervals as bars, in points of 100; ``look`` as errorbar takes it."""
    axes.errorbar(
        at,
        [100 * x.estimate for x in values],
        [
            [100 * (x.estimate - x.low) for x in values],
            [100 * (x.high - x.estimate) for x in values],
        ],
        **{"markersize": 3.5, "linewidth": 1.3, "elinewidth": 0.8, "capsize": 1.5, **look},
    )


def outline(
    axes: Axes, boxes: Sequence[Sequence[float]], color: Any, width: float = 0.9, style: str = "-"
) -> None:
    """Draw the outlines of boxes, each x1, y1, x2, y2."""
    for x1, y1, x2, y2 in boxes:
        axes.add_patch(
            Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec=color, lw=width, ls=style)
        )


def frame(
    panels: Sequence[Axes], shown: Sequence[float], others: Sequence[Sequence[float]]
) -> None:
    """Fit the axis that ``panels`` share to ``shown``, and to those of ``others`` that are not far off.

    All are in points. ``others`` are the teachers' values in each panel. Those further off than one
    and a half times what ``shown`` reaches across are not drawn: a text in the panel says where.
    """
    low, high = np.nanmin([*shown, np.inf]), np.nanmax([*shown, -np.inf])
    if low > high:  # without objects there is no AP
        return
    reach = 1.5 * max(high - low, 1.0)
    near = [y for own in others for y in own if low - reach <= y <= high + reach]
    bottom, top = min([low, *near]), max([high, *near])
    beyond = [[y for y in own if y < low - reach or y > high + reach] for own in others]
    margin = 0.05 * max(top - bottom, 0.1)
    room = 3 * margin if any(beyond) else margin  # for the texts
    panels[0].set_ylim(bottom - room, top + room)
    for axes, far in zip(panels, beyond, strict=True):
        if far:
            where = "above" if min(far) > high else "below" if max(far) < low else "outside"
            edge = "bottom" if where == "below" else "top"
            look: dict[str, Any] = {"ha": "right", "va": edge, "fontsize": 6, "color": "#555555"}
            place = (0.99, 0.01 if edge == "bottom" else 0.99)
            text = f"teacher {where}: {min(far):.0f} to {max(far):.0f}"
            axes.annotate(text, place, xycoords="axes fraction", **look)
