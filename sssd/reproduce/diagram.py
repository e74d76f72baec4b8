"""The architecture, drawn: what is kept, what exists only in training, which loss belongs where.

All positions are in inches on a page two columns wide, so that a text of 6 points is 6 points.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from torch import Tensor

from ..config import RunConfig
from . import plots
from .paper import NAMES

SIZE = (2.06 * plots.COLUMN, 4.5)
# In grey, the tint and the dashed border say the same.
STUDENT, TEACHER, TINT, FAINT = plots.BLUE, plots.VERMILION, "#fdf1e3", "#555555"
PLACES = {
    "image": (0.12, 3.62, 0.68, 0.68),
    "backbone": (1.08, 3.66, 0.78, 0.6),
    "pyramid": (2.16, 3.64, 0.86, 0.64),
    "shared head": (5.08, 3.66, 0.86, 0.6),
    "detections": (6.18, 3.66, 0.74, 0.6),
    "adapter": (2.92, 2.5, 0.58, 0.52),
    "IN": (3.62, 2.5, 0.36, 0.52),
    "JS": (4.1, 2.58, 0.36, 0.36),
    "IN teacher": (4.58, 2.5, 0.36, 0.52),
    "labels": (0.12, 0.84, 0.68, 0.68),
    "STN": (1.02, 1.04, 0.82, 0.68),
    "PointNet": (1.02, 0.32, 0.82, 0.56),
    "appearance encoder": (2.31, 1.04, 1.17, 0.68),
    "inter-object attention": (2.31, 0.32, 1.17, 0.56),
    "intra-object mapping": (3.62, 0.32, 1.17, 0.56),
    "refinement": (3.62, 1.04, 1.17, 0.68),
    "taught": (5.08, 1.06, 0.86, 0.64),
}
"""x and y of the lower left corner, width and height of each part."""
FLOWS = (
    ("image", "backbone", "pyramid", "shared head", "detections"),
    ("labels", "STN", "PointNet", "inter-object attention", "intra-object mapping"),
    ("intra-object mapping", "refinement", "taught", "shared head"),
    ("pyramid", "appearance encoder", "inter-object attention"),
    ("adapter", "IN", "JS"),
    ("IN teacher", "JS"),
)
"""The parts that each arrow leads through, from left to right or from one row to the next."""


def level_names(config: RunConfig) -> list[str]:
    """P2 to P6 for Faster R-CNN, P3 to P7 for RetinaNet and FCOS."""
    first = 2 if config.detector == "faster_rcnn" else 3
    return [f"P{first + i}" for i in range(5)]


def _parts(config: RunConfig) -> dict[str, str]:
    """The text in each box, under its name."""
    return {
        "backbone": NAMES[config.backbone],
        "shared head": f"of {NAMES[config.detector]}",
        "detections": "class, box,\nscore",
        "adapter": "3 × conv",
        "IN": "",
        "JS": "",
        "IN teacher": "",
        "STN": "$x_j \\leftarrow x_j\\, M(x_j)$\ndescriptor,\nfeatures",
        "PointNet": r"$\ell_j = F(x_j, \mathrm{max}_i\, x_i)$",
        "appearance encoder": "$a_j^p = \\mathrm{mean}_{b_j}\\, A(k^p)$\n$A$: conv, GN, ReLU",
        "inter-object attention": "$v_j^p = \\mathrm{attention}(a_j^p, \\ell, \\ell)$\n8 heads",
        "intra-object mapping": "conv$\\,(\\,\\Sigma_j\\, b_j^p\\, W v_j^p\\,)$\n"
        + ("+ context object, ReLU" if config.context else "into the boxes; ReLU"),
        "refinement": "3 × conv, GN\n(ReLU between)",
    }


def _texts(config: RunConfig, classes: int) -> list[tuple[float, float, str]]:
    """The texts beside the boxes, each with the place of its left end."""
    levels = level_names(config)
    distance = (
        r"$L_{\mathrm{distill}} = \frac{1}{5}\sum_p \sqrt{\,\overline{\mathrm{JS}}\,(k^p \Vert"
    )
    return [
        (3.12, 4.16, f"feature pyramid $k^p$, {levels[0]} to {levels[-1]},"),
        (3.12, 4.04, f"$C$ = {config.width} channels"),
        (
            *(0.12, 2.84),
            "The teacher sees the labels,\nand learns through the\nstudent's own head. The\n"
            "student's pyramid is pulled\ntowards the teacher's.",
        ),
        (0.12, 0.72, "labels: boxes $b_j$"),
        (0.12, 0.6, f"of {classes} classes"),
        (1.87, 0.68, "key, value"),
        (2.95, 0.96, "query"),
        (5.1, 0.84, "label-annotated\npyramid $k_e^p$, of\nthe shapes of $k^p$"),
        (3.4, 2.24, distance + rf" k_e^p)\,/\,{config.normaliser}}}$"),
        (
            *(2.92, 3.18),
            r"$\mathrm{JS}(P \Vert Q) = \frac{1}{2}\,\mathrm{KL}(P \Vert M) + "
            r"\frac{1}{2}\,\mathrm{KL}(Q \Vert M),\;\; M = \frac{1}{2}(P + Q)$",
        ),
        (
            *(5.98, 2.4),
            "$L_{\\mathrm{total}} =$\n"
            "$\\quad L_{\\mathrm{det}}(k)$\n$+\\; L_{\\mathrm{det}}(k_e)$\n"
            "$+\\; \\lambda(t)\\, L_{\\mathrm{distill}}$",
        ),
        (0.12, 0.08, "double strokes: no gradient flows back"),
        (2.4, 0.08, "IN, GN: instance and group normalisation"),
        (4.7, 0.08, "JS: Jensen-Shannon divergence over channels"),
        (6.1, 1.56, r"$\lambda(t)$"),
        (6.25, 1.2, r"$\lambda_1$"),
        (6.66, 1.42, r"$\lambda_2$"),
        (6.52, 0.74, "$T_1$"),
    ]


def draw(config: RunConfig, class_names: Sequence[str], image: Tensor, boxes: Tensor) -> Figure:
    """The architecture of a run, with an image [3, H, W] and its boxes [T, 4] as its input."""
    figure = plt.figure(figsize=SIZE)
    axes = figure.add_axes((0, 0, 1, 1))
    tint: Any = {"fc": TINT, "ec": TEACHER, "lw": 0.9, "ls": (0, (4, 2)), "zorder": 0}
    axes.add_patch(Rectangle((0.04, 0.16), 6.92, 3.3, **tint))
    title: Any = {"fontsize": 7.5, "fontweight": "bold"}
    axes.text(0.12, 3.3, "only in training", color=TEACHER, **title)
    axes.text(0.12, 4.36, "the detector, all that is kept", color=STUDENT, **title)
    for x, y, text in _texts(config, len(class_names)):
        axes.text(x, y, text, fontsize=6.2, va="center", linespacing=1.35, zorder=5)
    for name, details in _parts(config).items():
        _box(axes, name, details)
    _pyramid(axes, "pyramid", STUDENT)
    _pyramid(axes, "taught", TEACHER)
    pixels = image.permute(1, 2, 0).numpy()
    _picture(axes, "image", pixels, [])
    _picture(axes, "labels", 0.2 * pixels + 0.8, boxes.tolist())
    for flow in FLOWS:
        for one, other in pairwise(flow):
            _arrow(axes, *_between(PLACES[one], PLACES[other]))
    down = _between(PLACES["pyramid"], PLACES["appearance encoder"])[0][0]
    _arrow(axes, (down, 2.76), (2.92, 2.76))
    _arrow(axes, (5.22, 1.4), (5.22, 2.76), (4.94, 2.76))
    _arrow(axes, (5.8, 3.8), (5.8, 2.8), (6.2, 2.8), (6.2, 2.7))
    _arrow(axes, (6.1, 0.84), (6.1, 1.5))  # λ over the iterations: λ1 until T1, λ2 after it
    _arrow(axes, (6.1, 0.84), (6.9, 0.84))
    axes.plot([6.1, 6.56, 6.56, 6.86], [1.1, 1.1, 1.32, 1.32], color="black", lw=1)

    stops = [(5.22, 2.2, "no gradient", "-")]
    if config.detach_appearance:
        stops.append((down, 2.24, "no gradient", "-"))
    if config.distill_start:
        stops.append((2.8, 2.76, f"no gradient\nuntil $t$ = {config.distill_start:,}", "|"))
    for x, y, text, stroke in stops:
        for gap in (-0.022, 0.022):
            at = (x, y + gap) if stroke == "-" else (x + gap, y)
            axes.plot(*at, marker={"-": "_", "|": "|"}[stroke], color="black", ms=9, mew=1.4)
        left = x - 0.1 if stroke == "-" else down - 0.08
        axes.text(left, y, text, fontsize=6, color=FAINT, ha="right", va="center")
    axes.set(xlim=(0, SIZE[0]), ylim=(0, SIZE[1]), aspect="equal")  # pictures have changed them
    axes.axis("off")
    return figure


def _box(axes: Axes, name: str, details: str) -> None:
    """A part with its name in bold, and its details under it."""
    x, y, w, h = PLACES[name]
    color = STUDENT if y > 3.46 else TEACHER
    shape = "circle,pad=0" if name == "JS" else "round,pad=0,rounding_size=0.05"
    axes.add_patch(
        FancyBboxPatch((x, y), w, h, boxstyle=shape, fc="white", ec=color, lw=1.1, zorder=3)
    )
    lines = [name.removesuffix(" teacher"), *filter(None, details.split("\n"))]
    for i, line in enumerate(lines):
        look: Any = {"fontsize": 5.9} if i else {"fontsize": 6.5, "fontweight": "bold"}
        below = 0.14 * (i - (len(lines) - 1) / 2)
        axes.text(x + w / 2, y + h / 2 - below, line, ha="center", va="center", zorder=5, **look)


def _pyramid(axes: Axes, name: str, color: str) -> None:
    """Five maps one behind the other, each smaller."""
    x, y, w, h = PLACES[name]
    for i in range(5):
        width, height, lift = 0.3 * w * 0.8**i, h * 0.72**i, 0.08 * 0.72**i
        left, low, high = x + 0.2 * w * i, y + (h - height) / 2, y + (h + height) / 2
        ends = [left, left + width, left + width, left], [low, low + lift, high, high - lift]
        axes.fill(*ends, fc="white", ec=color, lw=1.1, zorder=3)
        axes.fill(*ends, fc=color, alpha=0.12 + 0.12 * i, lw=0, zorder=3)


def _picture(axes: Axes, name: str, pixels: Any, boxes: Sequence[Sequence[float]]) -> None:
    """An image [H, W, 3] with boxes, as large as its place allows."""
    x, y, w, h = PLACES[name]
    height, width, _ = pixels.shape
    scale = min(w / width, h / height)
    left, top = x + (w - width * scale) / 2, y + (h + height * scale) / 2
    extent = (left, left + width * scale, top - height * scale, top)
    axes.imshow(pixels, extent=extent, zorder=3, interpolation="antialiased")
    for x1, y1, x2, y2 in [(0.0, 0.0, float(width), float(height)), *boxes]:
        corner, size = (left + x1 * scale, top - y2 * scale), ((x2 - x1) * scale, (y2 - y1) * scale)
        axes.add_patch(Rectangle(corner, *size, fc="none", ec="black", lw=0.9, zorder=4))


def _between(one: Sequence[float], other: Sequence[float]) -> list[tuple[float, float]]:
    """From the middle of a part, which covers the line, to the edge of one beside or above it."""
    (x, y, w, h), (u, v, a, b) = one, other
    low, high = max(y, v), min(y + h, v + b)
    if low < high:
        return [(x + w / 2, (low + high) / 2), (u if u > x else u + a, (low + high) / 2)]
    middle = (max(x, u) + min(x + w, u + a)) / 2
    return [(middle, y + h / 2), (middle, v if v > y else v + b)]


def _arrow(axes: Axes, *points: tuple[float, float]) -> None:
    axes.plot(*zip(*points, strict=True), color="black", lw=1, zorder=2)
    style: Any = {"arrowstyle": "-|>", "lw": 1.0, "color": "black", "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", points[-1], points[-2], arrowprops=style | {"mutation_scale": 7}, zorder=2)
