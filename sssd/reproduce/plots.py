"""Figures and tables: one style, one source, and the paper's values beside ours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ..engine import open_split
from ..intervals import Interval
from ..methods import OWN
from ..runs import Run

COLUMN = 3.4
"""Width of a text column in inches: figures are drawn at their printed size."""


class Look(dict[str, str]):
    """A colour, mark or dash by method or variant; the user's own methods share one."""

    def __missing__(self, name: str) -> str:
        if name in OWN:
            return self["own"]
        raise KeyError(name)


# Okabe and Ito's colours, apart in grey too; marks and dashes repeat what colour says.
COLOURS = Look(
    {
        **{"fixed λ1": "#0072B2", "fixed λ2": "#E69F00", "stepwise": "#000000"},
        **{"baseline": "#888888", "labelenc": "#009E73", "lgd": "#0072B2", "kl": "#CC79A7"},
        "sssd": "#D55E00",
        "own": "#56B4E9",
    }
)
MARKS = Look(
    {
        **{"fixed λ1": "o", "fixed λ2": "s", "stepwise": "D"},
        **{"baseline": "|", "labelenc": "^", "lgd": "o", "kl": "v", "sssd": "D", "own": "X"},
    }
)
DASHES = Look(
    {
        **{"fixed λ1": "--", "fixed λ2": ":", "stepwise": "-"},
        **{"baseline": "-", "labelenc": "-.", "lgd": "--", "kl": ":", "sssd": "-", "own": "-."},
    }
)
CYCLE = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))


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
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.linewidth": 0.7,
            "xtick.major.width": 0.7,
            "ytick.major.width": 0.7,
            "axes.grid": True,
            "grid.color": "#dddddd",
            "grid.linewidth": 0.5,
            "figure.dpi": 120,
            "savefig.dpi": 200,
            "svg.hashsalt": "sssd",  # the same figure gives the same file
        },
    )


def finish(figure: Figure, folder: Path, name: str, source: str, smoke: bool = False) -> Figure:
    """Name the source under a figure, mark a smoke run, and save it as SVG and PNG."""
    figure.text(0.995, 0.0, source, ha="right", va="top", fontsize=6, color="#555555")
    if smoke:
        figure.text(
            0.5,
            0.5,
            "SMOKE RUN\nnumbers mean nothing",
            ha="center",
            va="center",
            rotation=25,
            fontsize=26,
            color="#bbbbbb",
            alpha=0.6,
            zorder=10,
        )
    folder.mkdir(parents=True, exist_ok=True)
    for kind, metadata in (("svg", {"Date": None}), ("png", {"Software": None})):
        figure.savefig(folder / f"{name}.{kind}", bbox_inches="tight", metadata=metadata)
    plt.close(figure)  # a notebook shows what the cell returns, once
    return figure


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


def draw_schedule(
    axes: Axes, iterations: list[int], lam: dict[str, list[float]], lr: list[float]
) -> None:
    """λ of each variant over the iterations, with the learning rate on a second axis."""
    for name, values in lam.items():  # the fixed ones wider, so that the step hides neither
        width = 1.2 if name == "stepwise" else 2.6
        axes.step(iterations, values, DASHES[name], color=COLOURS[name], linewidth=width)
    axes.set_ylabel("λ")
    axes.set_ylim(0, 1.25 * max(max(values) for values in lam.values()))
    axes.set_xlabel("iteration")
    rate = axes.twinx()
    rate.plot(iterations, lr, color="#999999", linewidth=1, drawstyle="steps-post")
    rate.set_yscale("log")
    rate.set_ylabel("learning rate", color="#777777")
    rate.grid(False)
    rate.spines["right"].set_visible(True)


def draw_detections(run: Run, images: int = 3, least_score: float = 0.4) -> Figure:
    """The first ``images`` validation images with a run's last detections.

    Boxes with their class and score, in a colour a class; the ground truth dashed in white.
    """
    split = open_split(run.config.data, "val")
    found = run.detections()
    colours = sns.color_palette("colorblind", len(split.class_names))
    height, width = split[0][0].shape[1:]
    size = (3.2 * images, 3.2 * height / width + 0.1)
    figure, axes = plt.subplots(1, images, figsize=size, layout="constrained", squeeze=False)
    for i, panel in enumerate(axes[0]):
        pixels, target = split[i]
        panel.imshow(
            pixels.permute(1, 2, 0).numpy(), extent=(0, pixels.shape[2], pixels.shape[1], 0)
        )
        panel.set_axis_off()
        for x1, y1, x2, y2 in target["boxes"].tolist():
            panel.add_patch(
                Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec="white", lw=0.8, ls=":")
            )
        own = (found.image_id == target["image_id"]) & (found.scores >= least_score)
        for (x1, y1, x2, y2), category, score in zip(
            found.boxes[own].tolist(), found.category_id[own], found.scores[own], strict=True
        ):
            kind = split.category_ids.index(int(category))
            panel.add_patch(
                Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec=colours[kind], lw=1.4)
            )
            panel.text(
                x1,
                y1,
                f"{split.class_names[kind]} {score:.2f}",
                fontsize=5,
                color="white",
                va="bottom",
                bbox={"facecolor": colours[kind], "edgecolor": "none", "pad": 0.6},
            )
    plt.close(figure)
    return figure
