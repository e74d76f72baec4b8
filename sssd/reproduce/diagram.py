"""The architecture, drawn: what is kept, what exists only in training, which loss belongs where.

All positions are inches on a page as wide as two columns, so that a text of 6 points is 6 points.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse, FancyBboxPatch, Rectangle
from torch import Tensor

from ..config import RunConfig
from . import plots
from .paper import NAMES

SIZE = (2.06 * plots.COLUMN, 4.72)
# Okabe and Ito's blue and vermilion; in grey, the tint and the dashed border say the same.
STUDENT, TEACHER, TINT = "#0072B2", "#D55E00", "#fdf1e3"
INK, FAINT = "#000000", "#555555"
Point = tuple[float, float]


def level_names(config: RunConfig) -> list[str]:
    """P2 to P6 for Faster R-CNN, P3 to P7 for RetinaNet and FCOS."""
    first = 2 if config.detector == "faster_rcnn" else 3
    return [f"P{first + i}" for i in range(5)]


def draw(config: RunConfig, class_names: Sequence[str], image: Tensor, boxes: Tensor) -> Figure:
    """The architecture of a run, with an image [3, H, W] and its boxes [T, 4] as its input."""
    figure = plt.figure(figsize=SIZE)
    page = _Page(figure.add_axes((0, 0, 1, 1)))
    levels = level_names(config)

    page.axes.add_patch(
        Rectangle((0.04, 0.34), 6.92, 3.34, fc=TINT, ec=TEACHER, lw=0.9, ls=(0, (4, 2)), zorder=0)
    )
    title: Any = {"size": 7.5, "bold": True, "left": True}
    page.text((0.12, 3.56), "only in training", color=TEACHER, **title)
    page.text((0.12, 4.64), "the detector, all that is kept", color=STUDENT, **title)

    # The student: image, backbone, pyramid, head, detections.
    page.picture((0.12, 3.84, 0.68, 0.68), image, boxes=None)
    page.box((1.08, 3.88, 0.78, 0.6), "backbone", [NAMES[config.backbone]], STUDENT)
    page.pyramid((2.16, 3.86, 0.86, 0.64), STUDENT)
    page.text((3.12, 4.46), f"feature pyramid $k^p$, {levels[0]} to {levels[-1]},", left=True)
    page.text((3.12, 4.31), f"$C$ = {config.width} channels", left=True)
    head = ["of " + NAMES[config.detector]]
    page.box((5.08, 3.88, 0.86, 0.6), "shared head", head, STUDENT)
    page.box((6.18, 3.88, 0.74, 0.6), "detections", ["class, box,", "score"], STUDENT)
    page.arrow((0.8, 4.18), (1.08, 4.18))
    page.arrow((1.86, 4.18), (2.16, 4.18))
    page.arrow((3.02, 4.18), (5.08, 4.18))
    page.arrow((5.94, 4.18), (6.18, 4.18))

    # Labels and their encoder.
    said = (
        "The teacher sees the labels,\nand learns through the\nstudent's own head. The\n"
        "student's pyramid is pulled\ntowards the teacher's."
    )
    page.text((0.12, 3.06), said, size=6.3, color="#222222", left=True)
    page.picture((0.12, 1.02, 0.68, 0.68), image, boxes)
    page.text((0.46, 0.9), "labels: boxes $b_j$", size=6)
    page.text((0.46, 0.79), f"of {len(class_names)} classes", size=6)
    page.frame((1.04, 0.46, 0.98, 1.7), "label encoder", 1.53)
    stn = [r"$x_j \leftarrow x_j\, M(x_j)$", "descriptor, then", "features"]
    page.box((1.1, 1.26, 0.86, 0.68), "STN", stn, TEACHER)
    page.box(
        (1.1, 0.54, 0.86, 0.56), "PointNet", [r"$\ell_j = F(x_j, \mathrm{max}_i\, x_i)$"], TEACHER
    )
    page.arrow((0.8, 1.5), (1.1, 1.5))
    page.arrow((1.53, 1.26), (1.53, 1.1))

    # Fusion: from appearance and labels to the label-annotated pyramid.
    page.frame((2.24, 0.46, 2.62, 1.7), "fusion", 4.62)
    seen = [r"$a_j^p = \mathrm{mean}_{b_j}\, A(k^p)$", "$A$: conv, GN, ReLU"]
    page.box((2.31, 1.26, 1.17, 0.68), "appearance encoder", seen, TEACHER)
    related = [r"$v_j^p = \mathrm{attention}(a_j^p, \ell, \ell)$", "8 heads, within an image"]
    page.box((2.31, 0.54, 1.17, 0.56), "inter-object attention", related, TEACHER)
    drawn = [r"conv$\,(\,\Sigma_j\, b_j^p\, W v_j^p\,)$"]
    drawn += ["+ context object, ReLU"] if config.context else ["into the boxes; ReLU"]
    page.box((3.62, 0.54, 1.17, 0.56), "intra-object mapping", drawn, TEACHER)
    page.box((3.62, 1.26, 1.17, 0.68), "refinement", ["3 × conv, GN", "(ReLU between)"], TEACHER)
    page.arrow((1.96, 0.82), (2.31, 0.82))
    page.text((2.13, 0.91), "key,", size=5.5, color=FAINT)
    page.text((2.13, 0.72), "value", size=5.5, color=FAINT)
    page.arrow((2.9, 1.26), (2.9, 1.1))
    page.text((2.95, 1.18), "query", size=5.5, color=FAINT, left=True)
    page.arrow((3.48, 0.82), (3.62, 0.82))
    page.arrow((4.2, 1.1), (4.2, 1.26))
    page.arrow((4.79, 1.6), (5.08, 1.6))
    page.pyramid((5.08, 1.28, 0.86, 0.64), TEACHER)
    page.text((5.5, 1.16), "label-annotated", size=6)
    page.text((5.5, 1.04), "pyramid $k_e^p$, of", size=6)
    page.text((5.5, 0.92), "the shapes of $k^p$", size=6)
    page.arrow((5.51, 1.7), (5.51, 3.88))

    # From the student's pyramid: down to the appearance encoder, and to the adapter.
    page.arrow((2.6, 4.1), (2.6, 1.94))
    page.arrow((2.6, 2.98), (2.92, 2.98))
    if config.detach_appearance:
        page.stop((2.6, 2.44), vertical=True)
        page.text((2.48, 2.44), "no gradient", size=6, color=FAINT, right=True)
    if config.distill_start:
        page.stop((2.74, 2.98), vertical=False)
        page.text((2.48, 3.04), "no gradient", size=6, color=FAINT, right=True)
        until = f"until $t$ = {config.distill_start:,}"
        page.text((2.48, 2.92), until, size=6, color=FAINT, right=True)

    # The distance.
    page.box((2.92, 2.72, 0.58, 0.52), "adapter", ["3 × conv"], TEACHER)
    page.box((3.62, 2.72, 0.4, 0.52), "IN", [], TEACHER)
    page.axes.add_patch(Ellipse((4.3, 2.98), 0.36, 0.36, fc="white", ec=INK, lw=1.2, zorder=3))
    page.text((4.3, 2.98), "JS", size=8, bold=True)
    page.box((4.58, 2.72, 0.4, 0.52), "IN", [], TEACHER)
    page.arrow((3.5, 2.98), (3.62, 2.98))
    page.arrow((4.02, 2.98), (4.12, 2.98))
    page.arrow((4.58, 2.98), (4.48, 2.98))
    page.line([(5.22, 1.7), (5.22, 2.98)])
    page.arrow((5.22, 2.98), (4.98, 2.98))
    page.stop((5.22, 2.62), vertical=True)
    page.text((5.1, 2.62), "no gradient", size=6, color=FAINT, right=True)
    js = r"$\mathrm{JS}(P \Vert Q) = \frac{1}{2}\,\mathrm{KL}(P \Vert M) + "
    js += r"\frac{1}{2}\,\mathrm{KL}(Q \Vert M),\;\; M = \frac{1}{2}(P + Q)$"
    page.text((4.1, 3.46), js, size=7)
    page.line([(4.3, 3.16), (4.3, 3.34)], dotted=True)
    page.line([(4.3, 2.8), (4.3, 2.54)], dotted=True)
    distill = (
        r"$L_{\mathrm{distill}} = \frac{1}{5}\sum_p \sqrt{\,\overline{\mathrm{JS}}\,(k^p \Vert"
    )
    page.text((3.86, 2.37), distill + rf" k_e^p)\,/\,{config.normaliser}}}$", size=8)

    # The losses.
    page.line([(5.8, 3.88), (5.8, 3.27)])
    page.arrow((5.8, 3.27), (6.04, 3.27))
    page.text((6.1, 3.36), r"$L_{\mathrm{det}}(k)$ and", size=7.5, left=True)
    page.text((6.1, 3.18), r"$L_{\mathrm{det}}(k_e)$", size=7.5, left=True)
    page.axes.add_patch(Rectangle((5.98, 2.0), 0.92, 0.88, fc="white", ec=INK, lw=0.8, zorder=2))
    total = [r"$L_{\mathrm{total}} =$", r"$\quad\; L_{\mathrm{det}}(k)$"]
    total += [r"$+\; L_{\mathrm{det}}(k_e)$", r"$+\; \lambda(t)\, L_{\mathrm{distill}}$"]
    for i, term in enumerate(total):
        page.text((6.04, 2.76 - 0.2 * i), term, size=7.5, left=True)
    page.step((6.12, 0.92, 0.74, 0.74))

    # How to read it.
    y = 0.17
    page.arrow((0.12, y), (0.4, y))
    page.text((0.46, y), "features, forward", size=6, left=True)
    page.line([(1.42, y), (1.7, y)])
    page.stop((1.56, y), vertical=False)
    page.text((1.76, y), "no gradient flows back", size=6, left=True)
    words = (
        "IN, GN: instance and group normalisation    JS: Jensen-Shannon divergence over channels"
    )
    page.text((6.96, y), words, size=6, right=True)
    return figure


class _Page:
    """Axes in inches, with the few shapes that the drawing is made of."""

    def __init__(self, axes: Axes) -> None:
        self.axes = axes
        axes.set(xlim=(0, SIZE[0]), ylim=(0, SIZE[1]), aspect="equal")
        axes.axis("off")

    def text(
        self,
        at: Point,
        text: str,
        *,
        size: float = 6.5,
        bold: bool = False,
        color: str = INK,
        left: bool = False,
        right: bool = False,
    ) -> None:
        side = "left" if left else "right" if right else "center"
        look: Any = {"fontsize": size, "fontweight": "bold" if bold else "normal", "color": color}
        self.axes.text(*at, text, ha=side, va="center", linespacing=1.35, zorder=5, **look)

    def box(
        self, at: tuple[float, float, float, float], name: str, details: list[str], color: str
    ) -> None:
        """A part with its name in bold, and a line for each detail under it."""
        x, y, w, h = at
        shape = "round,pad=0,rounding_size=0.05"
        self.axes.add_patch(
            FancyBboxPatch((x, y), w, h, boxstyle=shape, fc="white", ec=color, lw=1.1, zorder=3)
        )
        gap = 0.14
        top = y + h / 2 + gap * len(details) / 2
        self.text((x + w / 2, top), name, size=6.5, bold=True)
        for i, line in enumerate(details, start=1):
            size = 6.6 if "$" in line else 5.8
            self.text((x + w / 2, top - gap * i), line, size=size, color="#222222")

    def frame(self, at: tuple[float, float, float, float], name: str, middle: float) -> None:
        x, y, w, h = at
        self.axes.add_patch(Rectangle((x, y), w, h, fc="none", ec=TEACHER, lw=0.7, zorder=1))
        self.text((middle, y + h - 0.1), name, bold=True, color=TEACHER)

    def pyramid(self, at: tuple[float, float, float, float], color: str) -> None:
        """Five maps one behind the other, each smaller."""
        x, y, w, h = at
        for i in range(5):
            width, height, lift = 0.3 * w * 0.8**i, h * 0.72**i, 0.08 * 0.72**i
            left, low, high = x + 0.2 * w * i, y + (h - height) / 2, y + (h + height) / 2
            corners = [(left, low), (left + width, low + lift), (left + width, high)]
            corners.append((left, high - lift))
            self.axes.fill(*zip(*corners, strict=True), fc="white", ec=color, lw=1.1, zorder=3)
            shade = 0.12 + 0.12 * i
            self.axes.fill(*zip(*corners, strict=True), fc=color, alpha=shade, lw=0, zorder=3)

    def picture(
        self, at: tuple[float, float, float, float], image: Tensor, boxes: Tensor | None
    ) -> None:
        """The image alone, or its boxes on what is left of it."""
        x, y, w, h = at
        _, height, width = image.shape
        scale = min(w / width, h / height)
        w, h = width * scale, height * scale
        x, y = x + (at[2] - w) / 2, y + (at[3] - h) / 2
        pixels = image.permute(1, 2, 0).numpy()
        if boxes is not None:
            pixels = 0.2 * pixels + 0.8
        self.axes.imshow(pixels, extent=(x, x + w, y, y + h), zorder=3, interpolation="antialiased")
        edge = TEACHER if boxes is not None else STUDENT
        self.axes.add_patch(Rectangle((x, y), w, h, fc="none", ec=edge, lw=0.9, zorder=4))
        for x1, y1, x2, y2 in boxes.tolist() if boxes is not None else []:
            corner = (x + x1 * scale, y + h - y2 * scale)
            size = ((x2 - x1) * scale, (y2 - y1) * scale)
            box = Rectangle(corner, *size, fc="none", ec=INK, lw=0.9, zorder=4)
            self.axes.add_patch(box)
        self.axes.set(xlim=(0, SIZE[0]), ylim=(0, SIZE[1]), aspect="equal")  # imshow changed them

    def line(self, points: Sequence[Point], dotted: bool = False) -> None:
        style = {"lw": 0.7, "ls": ":"} if dotted else {"lw": 1.0}
        self.axes.plot(
            *zip(*points, strict=True), color=INK, solid_capstyle="butt", zorder=2, **style
        )

    def arrow(self, start: Point, end: Point) -> None:
        style = {"arrowstyle": "-|>", "lw": 1.0, "color": INK, "shrinkA": 0, "shrinkB": 0}
        self.axes.annotate("", end, start, arrowprops=style | {"mutation_scale": 7}, zorder=2)

    def stop(self, at: Point, *, vertical: bool) -> None:
        """Two strokes across an arrow: no gradient flows back along it."""
        x, y = at
        for gap in (-0.022, 0.022):
            across = [(x - 0.07, y + gap), (x + 0.07, y + gap)]
            if not vertical:
                across = [(x + gap, y - 0.07), (x + gap, y + 0.07)]
            self.axes.plot(*zip(*across, strict=True), color=INK, lw=1.4, zorder=4)

    def step(self, at: tuple[float, float, float, float]) -> None:
        """λ over the iterations: λ1 until T1, λ2 after it."""
        x, y, w, h = at
        t1, low, high = x + 0.62 * w, y + 0.36 * h, y + 0.66 * h
        self.line([(x, low), (t1, low), (t1, high), (x + w, high)])
        self.arrow((x, y), (x + w + 0.04, y))
        self.arrow((x, y), (x, y + h))
        self.line([(t1, y), (t1, low)], dotted=True)
        self.text((x + 0.05, y + h), r"$\lambda(t)$", size=7, left=True)
        self.text((x + 0.3 * w, low + 0.09), r"$\lambda_1$", size=7)
        self.text((x + 0.85 * w, high + 0.09), r"$\lambda_2$", size=7)
        self.text((t1, y - 0.09), "$T_1$", size=7)
        self.text((x + w, y - 0.09), "$t$", size=7)
