"""Figure 1: the architecture, and what flows through it on an image of the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from IPython.display import Markdown
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from pydantic import Field
from torch import Tensor

from ..config import RunConfig
from ..data.coco import CocoSplit
from ..detectors import prepare, pyramid
from ..distiller import PUBLISHED_LAMBDA, Distiller
from ..engine import open_split
from ..losses import js_map, normalise
from ..runs import Run
from ..teacher import inside
from . import diagram, paper, plots, tables
from .experiment import Experiment

MEASURED = 100
"""Validation images that the numbers are means over, or all where there are fewer."""
SPREAD = 2.5
"""Standard deviations at which the colours of the maps end."""
STATES = ("before", "after")


@dataclass(frozen=True)
class View:
    """What one image is, to a distiller in evaluation mode; a list holds one entry a level."""

    size: tuple[int, int]
    """Height and width of the padded image in pixels."""
    boxes: Tensor
    """[T, 4] as x1, y1, x2, y2 in pixels of the padded image."""
    student: list[Tensor]
    """The student's maps after adapter and normalisation, [C, h_p, w_p]."""
    teacher: list[Tensor]
    """The teacher's maps after normalisation, [C, h_p, w_p]."""
    divergence: list[Tensor]
    """Jensen-Shannon divergence between the two at each pixel, in nats, [h_p, w_p]."""

    def masks(self, level: int) -> Tensor:
        """Which pixels of a level are inside each box, bool [T, h_p, w_p]."""
        h, w = self.divergence[level].shape
        return inside(self.boxes, self.size, (h, w))

    def means(self) -> list[float]:
        """Mean divergence per pixel of each level, in nats."""
        return [float(level.mean()) for level in self.divergence]


@torch.no_grad()
def view(distiller: Distiller, image: Tensor, target: Mapping[str, Tensor]) -> View:
    """An image [3, H, W] with its ``boxes`` and ``labels`` through student, teacher and adapter."""
    device = distiller.step.device
    labels = {name: target[name].to(device) for name in ("boxes", "labels")}
    prepared, targets = prepare(distiller.student, [image.to(device)], [labels])
    assert targets is not None
    batch, own = prepared.tensors, targets[0]
    features = pyramid(distiller.student, batch)
    taught = distiller.teach(features, [own], batch.shape[-2:])
    student = [normalise(distiller.adapter(level)) for level in features.values()]
    teacher = [normalise(level) for level in taught.values()]
    return View(
        size=(batch.shape[-2], batch.shape[-1]),
        boxes=own["boxes"].cpu(),
        student=[level[0].cpu() for level in student],
        teacher=[level[0].cpu() for level in teacher],
        divergence=[js_map(s, t)[0].cpu() for s, t in zip(student, teacher, strict=True)],
    )


def first_component(student: Tensor, teacher: Tensor, bright: Tensor) -> tuple[Tensor, Tensor]:
    """Two maps [C, h, w] along the direction in which the teacher's pixels differ most.

    ``bright`` [h, w] chooses the sign: the teacher's is to be larger where it is larger.

    Returns:
        student and teacher [h, w] as deviations from the teacher's mean, in units of the teacher's
        standard deviation; zero where the teacher's pixels do not differ.
    """
    mean = teacher.mean(dim=(1, 2), keepdim=True)
    maps = [(x - mean).double().flatten(1) for x in (student, teacher)]
    _, directions = torch.linalg.eigh(maps[1] @ maps[1].mT)
    along = directions[:, -1] @ torch.stack(maps)
    wanted = (bright - bright.mean()).double().flatten()
    spread = along[1].std(correction=0)
    sign = -1.0 if along[1].dot(wanted) < 0 else 1.0
    scaled = along * sign / spread if spread > 1e-6 else torch.zeros_like(along)
    one, other = scaled.unflatten(1, student.shape[1:])
    return one, other


class Fig1(Experiment):
    """The architecture (SSSD, Fig. 1), with an example before and after training."""

    notebook = "fig1_architecture"
    title = "The architecture, and what flows through it"
    question = (
        "What flows through detector, teacher and distance? The architecture is drawn by "
        "code; then one validation image is followed through it, before and after training, "
        "and the distance between the adapted student's maps and the teacher's is measured "
        "level by level."
    )

    lambda1: float = Field(PUBLISHED_LAMBDA["sssd"], gt=0)
    image: int = Field(0, ge=0)

    @cached_property
    def configs(self) -> dict[str, list[RunConfig]]:
        group = self.configure(method="sssd", lambda1=self.lambda1)
        images = len(self.split)
        if self.image >= images:
            raise ValueError(
                f"image: {self.image}; expected 0 to {images - 1}, as there are {images} "
                "validation images"
            )
        if not len(self.split[self.image][1]["boxes"]):
            raise ValueError(f"image: {self.image} has no object; expected one that has")
        return {"SSSD": group}

    @cached_property
    def split(self) -> CocoSplit:
        return open_split(self.source, "val")

    @cached_property
    def measured(self) -> range:
        return range(min(MEASURED, len(self.split)))

    def architecture(self) -> Figure:
        """The drawing: what is kept, what exists only in training, which loss belongs where."""
        plots.style()
        config = self.configs["SSSD"][0]
        image, target = self.split[self.image]
        figure = diagram.draw(config, self.split.class_names, image, target["boxes"])
        detached = (
            f" Until iteration {config.distill_start:,} of {config.iterations:,} only the adapter "
            "learns from the distillation."
            if config.distill_start
            else ""
        )
        caption = (
            "The architecture. White, above: the detector, which is all that is kept. Tinted, "
            "below: what exists only in training. The teacher encodes the labels (spatial "
            "transformers, STN, and a PointNet), fuses them with the student's own features "
            "and renders them into a pyramid of the same shapes; it is trained "
            "through the student's head, by the same detection loss. The distance is the square "
            "root of the Jensen-Shannon divergence between the two maps, each turned into a "
            "distribution by a softmax over its channels (bar: mean over the pixels of a level), "
            f"averaged over the levels {_and(diagram.level_names(config))}. Double strokes: no "
            f"gradient flows back.{detached} λ(t) is the weight of the distance, λ₁ until "
            f"iteration T₁ and λ₂ after it; where it is fixed, the two are equal."
        )
        note = f"{self.profile} · {self.source.name} · validation image {self.image}"
        return self.save_figure(figure, "fig1_architecture", caption, note)

    def example(self, runs: Mapping[str, list[Run]]) -> Figure:
        """Labels, maps and distance of one image on every level, before and after training."""
        plots.style()
        run = runs["SSSD"][0]
        image, target = self.split[self.image]
        before, after = (
            view(run.distiller(trained=state == "after"), image, target) for state in STATES
        )
        names = diagram.level_names(run.config)
        figure = plt.figure(figsize=(2.06 * plots.COLUMN, 6.9))
        grid = figure.add_gridspec(
            6,
            6,
            width_ratios=(1.28, 1, 1, 1, 1, 1),
            height_ratios=(1, 1, 1, 1, 1, 0.1),
            left=0.005,
            right=0.995,
            top=0.97,
            bottom=0.062,
            wspace=0.07,
            hspace=0.17,
        )
        said = (
            (
                "Teacher",
                "after training: normalised,\nalong the direction in which\nits pixels differ most",
            ),
            ("Student", "after training: adapted,\nnormalised, along the\nsame direction"),
            ("JS before", "nats per pixel, start\nweights, teacher and\nadapter untrained"),
            (
                "JS after",
                f"nats per pixel, after\n{run.config.iterations:,} iterations,\nsame colour scale",
            ),
        )
        for row, (name, detail) in enumerate(said, start=1):
            axes = figure.add_subplot(grid[row, 0])
            axes.axis("off")
            axes.text(0.94, 0.6, name, ha="right", va="bottom", fontsize=8, fontweight="bold")
            axes.text(0.94, 0.54, detail, ha="right", va="top", fontsize=6.3, linespacing=1.25)
        self._photograph(figure.add_subplot(grid[0, 0]), image, target["boxes"])
        most = max(float(level.max()) for v in (before, after) for level in v.divergence)
        for p, name in enumerate(names):
            cover = after.masks(p).sum(dim=0)
            maps = first_component(after.student[p], after.teacher[p], cover.clamp(max=1).float())
            panels = (cover, maps[1], maps[0], before.divergence[p], after.divergence[p])
            for row, values in enumerate(panels):
                axes = figure.add_subplot(grid[row, 1 + p])
                style: dict[str, Any] = {"cmap": "Greys", "vmin": 0, "vmax": 3}
                if row in (1, 2):
                    style = {"cmap": "cividis", "vmin": -SPREAD, "vmax": SPREAD}
                elif row > 2:
                    style = {"cmap": "magma", "vmin": 0, "vmax": most}
                drawn = axes.imshow(values.numpy(), interpolation="nearest", **style)
                axes.set(xticks=[], yticks=[])
                for spine in axes.spines.values():
                    spine.set(visible=True, linewidth=0.5, color="#888888")
                if row == 0:
                    h, w = values.shape
                    axes.set_title(f"{name}: {h} × {w}", fontsize=7.5, pad=3)
                    self._outlines(axes, after, (h, w))
                if row > 2:
                    mean = f"mean {float(values.mean()):.3f}"
                    mean = mean if values.numel() > 1 else "one pixel: no distance"
                    axes.set_xlabel(mean, fontsize=6.5, labelpad=2)
        scale = figure.add_subplot(grid[5, 1:])  # of what was drawn last, JS after training
        bar = figure.colorbar(drawn, cax=scale, orientation="horizontal")
        bar.set_label(f"JS per pixel in nats (it cannot exceed ln 2 = {np.log(2):.3f})", fontsize=7)
        bar.outline.set_linewidth(0.5)
        caption = (
            f"One validation image (number {self.image}, {len(target['boxes'])} objects) on the "
            f"levels {_and(names)} of a {paper.NAMES[run.config.detector]} trained by SSSD with "
            f"λ = {self._lambda(run.config)}, seed {run.config.seed}. Rows: the image with its boxes, "
            "and the number of boxes over each pixel of a level (white 0 to black 3; a pixel is inside a "
            "box if the point at its index is, so a small object can be inside none); the teacher's "
            "map and the adapted student's, both normalised, projected on the one direction of "
            "feature space in which the teacher's pixels differ most (dark low, bright high, from "
            f"−{SPREAD:g} to {SPREAD:g} of the teacher's standard deviations about its mean); the Jensen-Shannon divergence between the two maps at "
            "each pixel, in nats, before and after training on one scale. n = 1 image, 1 seed."
        )
        note = f"{self.profile} · {self.source.name} · n = 1 image, 1 seed"
        return self.save_figure(figure, "fig1_example", caption, note)

    def measure(self, runs: Mapping[str, list[Run]]) -> pd.DataFrame:
        """Mean JS per pixel in nats of each seed, image, state and level.

        A row for each; columns ``seed``, ``image``, ``state``, ``level`` and ``js``.
        """
        rows = []
        for run in runs["SSSD"]:
            for state in STATES:
                distiller = run.distiller(trained=state == "after")
                distiller.to("cuda" if torch.cuda.is_available() else "cpu")
                for i in self.measured:
                    means = view(distiller, *self.split[i]).means()
                    rows += [
                        {"seed": run.config.seed, "image": i, "state": state, "level": p, "js": js}
                        for p, js in zip(diagram.level_names(run.config), means, strict=True)
                    ]
        return pd.DataFrame(rows)

    def table(self, measured: pd.DataFrame) -> tables.Table:
        """JS per pixel and its part in L_distill, level by level, before and after training."""
        width = self.configs["SSSD"][0].normaliser
        rows = []
        for level, group in measured.groupby("level", sort=True):
            pairs = group.pivot(index=["seed", "image"], columns="state", values="js")
            root = (pairs / width) ** 0.5
            rows.append(
                {
                    "level": level,
                    "JS before": f"{pairs['before'].mean():.4f}",
                    "JS after": f"{pairs['after'].mean():.4f}",
                    "after ÷ before": _ratio(pairs["after"].mean(), pairs["before"].mean()),
                    "lower after, of n": f"{(pairs['after'] < pairs['before']).sum()} of {len(pairs)}",
                    "√(JS ÷ 256) before".replace("256", str(width)): f"{root['before'].mean():.4f}",
                    "√(JS ÷ 256) after".replace("256", str(width)): f"{root['after'].mean():.4f}",
                }
            )
        caption = (
            f"JS per pixel in nats, between the adapted student's and the teacher's normalised maps, "
            f"before and after training with λ = {self._lambda(self.configs['SSSD'][0])}; means over "
            f"{self._n(measured)}. L_distill is the mean over the levels of √(JS ÷ {width})."
        )
        return self.save_table(tables.Table(pd.DataFrame(rows), caption), "fig1_divergence")

    def findings(self, runs: Mapping[str, list[Run]], measured: pd.DataFrame) -> Markdown:
        """How far apart student and teacher are before and after training."""
        width = self.configs["SSSD"][0].normaliser
        said = []
        for level, group in measured.groupby("level", sort=True):
            pairs = group.pivot(index=["seed", "image"], columns="state", values="js")
            first, last = pairs["before"].mean(), pairs["after"].mean()
            lower = int((pairs["after"] < pairs["before"]).sum())
            if not first:
                said.append(
                    f"{level} is a single pixel here: nothing to normalise, and no distance."
                )
                continue
            said.append(
                f"{level}: mean JS per pixel {first:.4f} → {last:.4f} nats "
                f"({_change(last / first)}), lower in {lower} of {len(pairs)}."
            )
        root = measured.assign(js=(measured["js"] / width) ** 0.5)
        total = root.groupby("state")["js"].mean()
        said.append(
            f"L_distill, the mean over the levels: {total['before']:.4f} → {total['after']:.4f}; "
            f"means over {self._n(measured)}."
        )
        return self.conclude(runs, said)

    def _n(self, measured: pd.DataFrame) -> str:
        seeds = measured["seed"].nunique()
        return (
            f"n = {measured['image'].nunique()} validation images, {seeds} seed{'s'[: seeds > 1]}"
        )

    @staticmethod
    def _lambda(config: RunConfig) -> str:
        return f"{config.lambda1:g}" + (f" → {config.lambda2:g}" if config.stepwise else "")

    @staticmethod
    def _photograph(axes: Axes, image: Tensor, boxes: Tensor) -> None:
        axes.imshow(image.permute(1, 2, 0).numpy(), extent=(0, image.shape[2], image.shape[1], 0))
        axes.axis("off")
        axes.set_title("image and labels", fontsize=7.5, pad=3)
        for x1, y1, x2, y2 in boxes.tolist():
            for colour, style in (("black", "-"), ("white", "--")):  # seen on any background
                axes.add_patch(
                    Rectangle((x1, y1), x2 - x1, y2 - y1, fc="none", ec=colour, ls=style, lw=0.9)
                )

    @staticmethod
    def _outlines(axes: Axes, seen: View, level: tuple[int, int]) -> None:
        (height, width), (h, w) = seen.size, level
        for x1, y1, x2, y2 in (seen.boxes / torch.tensor([width / w, height / h] * 2)).tolist():
            edge = Rectangle((x1, y1), x2 - x1, y2 - y1, fc="none", ec=diagram.TEACHER, lw=0.8)
            axes.add_patch(edge)


def _and(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _ratio(after: float, before: float) -> str:
    return f"{after / before:.2f}" if before else ""


def _change(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.0f} %".replace("-", "−")
