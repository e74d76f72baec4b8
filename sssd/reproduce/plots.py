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

from ..intervals import Interval
from ..methods import REGISTERED

COLUMN = 3.4
"""Width of a text column in inches: figures are drawn at their printed size."""


def _look(color: str, marker: str, linestyle: str) -> dict[str, Any]:
    return {"color": color, "marker": marker, "linestyle": linestyle}


class Looks(dict[str, dict[str, Any]]):
    """How a method or a variant of λ is drawn in every figure; the user's own methods look alike."""

    def __missing__(self, name: str) -> dict[str, Any]:
        if name in REGISTERED:
            return self["own"]
        raise KeyError(name)


# Okabe and Ito's colours, which differ in grey, too; marks and dashes say the same.
LOOKS = Looks(
    {
        "fixed λ1": _look("#0072B2", "o", "--"),
        "fixed λ2": _look("#E69F00", "s", ":"),
        "stepwise": _look("#000000", "D", "-"),
        "baseline": _look("#888888", "|", "-"),
        "labelenc": _look("#009E73", "^", "-."),
        "lgd": _look("#0072B2", "o", "--"),
        "kl": _look("#CC79A7", "v", ":"),
        "sssd": _look("#D55E00", "D", "-"),
        "own": _look("#56B4E9", "X", "-."),
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


def frame(axes: Axes, shown: Sequence[float], others: Sequence[float]) -> None:
    """Fit the axis to all of ``shown``, in points, and to those ``others`` that are not far off.

    Far off is further away than ``shown`` reaches across: a text in a corner says where they are.
    """
    low, high = np.nanmin([*shown, np.inf]), np.nanmax([*shown, -np.inf])
    if low > high:  # without objects there is no AP
        return
    others = [y for y in others if y == y]
    height = max(high - low, 1.0)
    near = [y for y in others if low - height <= y <= high + height]
    far = [y for y in others if y not in near]
    bottom, top = min([low, *near]), max([high, *near])
    margin = 0.05 * max(top - bottom, 0.1)
    axes.set_ylim(bottom - margin, top + margin)
    if far:
        below = max(far) < low
        text = f"teacher {'below' if below else 'outside'}: {min(far):.0f} to {max(far):.0f}"
        corner: dict[str, Any] = {"ha": "right", "va": "bottom" if below else "top"}
        place = (0.99, 0.01 if below else 0.99)
        axes.annotate(text, place, xycoords="axes fraction", fontsize=6, color="#555555", **corner)
