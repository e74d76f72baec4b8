"""Figure 1: the architecture, and what flows through it on an image of the data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from pydantic import Field
from torch import Tensor

from ..config import RunConfig
from ..data.coco import CocoSplit
from ..detectors import levels_of
from ..distiller import Distiller
from ..engine import open_split
from ..losses import js_map, normalise
from ..methods import PUBLISHED_LAMBDA
from ..records import Arrays
from ..runs import Run
from ..teacher import inside
from . import diagram, plots
from .experiment import Experiment, Findings
from .paper import NAMES
from .tables import Table
from .words import counted, weight

MEASURED = 100
"""The numbers are means over this many validation images, or over all if there are fewer."""
SPREAD = 2.5
"""The colours of the maps end at this many standard deviations."""
STATES = ("before", "after")
"""When maps are compared: before training, and after it."""
Groups = Mapping[str, list[Run]]
"""The runs of SSSD, one for each seed."""


class View(NamedTuple):
    """What a distiller makes of one image; each list holds an entry for each level."""

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


@torch.no_grad()
def view(distiller: Distiller, image: Tensor, target: Mapping[str, Tensor]) -> View:
    """Send an image [3, H, W] with its ``boxes`` and ``labels`` through student, teacher and adapter.

    ``distiller`` is in evaluation mode, so that nothing in it changes.
    """
    device = distiller.step.device
    labels = {name: target[name].to(device) for name in ("boxes", "labels")}
    prepared, targets = distiller.student.transform([image.to(device)], [labels])
    size = (prepared.tensors.shape[-2], prepared.tensors.shape[-1])
    features = levels_of(distiller.student.backbone(prepared.tensors))
    taught = distiller.teach(features, targets, size).values()
    student = [normalise(distiller.adapter(level)).cpu() for level in features.values()]
    teacher = [normalise(level).cpu() for level in taught]
    js = [js_map(s, t)[0] for s, t in zip(student, teacher, strict=True)]
    return View(
        size, targets[0]["boxes"].cpu(), [x[0] for x in student], [x[0] for x in teacher], js
    )


def first_component(student: Tensor, teacher: Tensor, bright: Tensor) -> tuple[Tensor, Tensor]:
    """Two maps [C, h, w] along the direction in which the teacher's pixels differ most.

    ``bright`` [h, w] chooses the sign: where it is larger, the teacher's map is larger, too.

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


@dataclass(frozen=True)
class Example(Arrays):
    """What `Fig1.example` shows of a run and an image, kept to be drawn again without weights.

    Each map holds all P levels, [h_p, w_p] float32, flattened, one after the other.
    """

    image: np.ndarray  # uint8 [3, H, W]; photographs are not copied: [3, 0, 0]
    boxes: np.ndarray  # float32 [T, 4] as x1, y1, x2, y2 in pixels of the image
    padded: np.ndarray  # float32 [T, 4], in pixels of the padded image
    size: np.ndarray  # int64 [2], height and width of the padded image
    shapes: np.ndarray  # int64 [P, 2], h_p and w_p
    cover: np.ndarray  # how many boxes each pixel lies in
    teacher: np.ndarray  # after training, along the direction of `first_component`
    student: np.ndarray  # likewise
    before: np.ndarray  # JS divergence in nats before training
    after: np.ndarray  # and after

    @classmethod
    def of(cls, run: Run, image: Tensor, target: Mapping[str, Tensor], photograph: bool) -> Example:
        before, after = (view(run.distiller(s == "after"), image, target) for s in STATES)
        shapes = [(level.shape[0], level.shape[1]) for level in after.divergence]
        covers = [inside(after.boxes, after.size, shape).sum(dim=0) for shape in shapes]
        maps = [
            first_component(student, teacher, (cover > 0).float())
            for student, teacher, cover in zip(after.student, after.teacher, covers, strict=True)
        ]
        students, teachers = zip(*maps, strict=True)
        levels = (covers, teachers, students, before.divergence, after.divergence)
        pixels = (image * 255).round().byte()
        return cls(
            (pixels[:, :0, :0] if photograph else pixels).numpy(),
            target["boxes"].numpy(),
            after.boxes.numpy(),
            np.array(after.size),
            np.array(shapes),
            *(torch.cat([x.float().flatten() for x in each]).numpy() for each in levels),
        )

    def levels(self, name: str) -> list[np.ndarray]:
        """The levels of one of the maps, [h_p, w_p] each."""
        parts = np.split(getattr(self, name), self.shapes.prod(axis=1).cumsum()[:-1])
        return [part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True)]


@dataclass(frozen=True)
class Divergence(Arrays):
    """What `Fig1.measure` computes from a run."""

    js: np.ndarray  # float64 [2, images, levels], mean per pixel in nats, before and after training


class Row(NamedTuple):
    """A row of `Fig1.example`: a map of `Example`, the texts beside it, and how imshow draws it."""

    name: str
    title: str
    detail: str
    look: dict[str, Any]


class Fig1(Experiment):
    """The architecture (SSSD, Fig. 1), with an example before and after training."""

    notebook = "fig1_architecture"
    title = "The architecture, and what flows through it"
    question = (
        "What flows through detector, teacher and distance? The architecture is drawn from the "
        "configuration of a run. Then one validation image is followed through it, before and "
        "after training, and the distance between the adapted student's maps and the teacher's "
        "is measured on each level."
    )

    lambda1: float = Field(PUBLISHED_LAMBDA["sssd"], gt=0)
    image: int = Field(0, ge=0)

    @cached_property
    def configs(self) -> dict[str, list[RunConfig]]:
        group = self.configure(method="sssd", lambda1=self.lambda1)
        if self.source.paths:  # else it is drawn again: it was checked when the records were made
            images = len(self.split)
            if self.image >= images:
                raise ValueError(
                    f"image: {self.image}; expected 0 to {images - 1}, as there are {images} "
                    "validation images"
                )
            if not len(self.split[self.image][1]["boxes"]):
                raise ValueError(f"image: {self.image} has no object; expected another image")
        return {"SSSD": group}

    @cached_property
    def split(self) -> CocoSplit:
        return open_split(self.source, "val")

    def train(self) -> dict[str, list[Run]]:
        """The runs; one that was imported without the arrays of this figure is trained again."""
        runs = super().train()
        shown = [(run, "divergence") for run in runs["SSSD"]] + [(runs["SSSD"][0], self._name)]
        lacking = [run.config for run, name in shown if not run.files.kept(name).exists()]
        self.store.get(lacking, jobs=self.jobs, weights=True)
        return runs

    def train_further(self) -> None:
        self.train()

    @property
    def _name(self) -> str:
        return f"example-{self.image}"

    def _example(self, run: Run) -> Example:
        """What is shown of a run: read if it was kept, else computed and kept."""
        file = run.files.kept(self._name)
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            Example.of(run, *self.split[self.image], photograph=bool(self.data)).save(file)
        return Example.load(file)

    def _picture(self) -> tuple[Tensor, Tensor]:
        """The image [3, H, W] and its boxes [T, 4]."""
        if self.source.paths:
            image, target = self.split[self.image]
            return image, target["boxes"]
        config = self.configs["SSSD"][0]
        kept = self._example(Run(config, self.store.folder(config)))
        return torch.from_numpy(kept.image).float() / 255, torch.from_numpy(kept.boxes)

    def architecture(self) -> plots.Plot:
        """The drawing: what is kept, what exists only in training, which loss belongs where."""
        plots.style()
        config = self.configs["SSSD"][0]
        figure = diagram.draw(config, list(self.source.classes.values()), *self._picture())
        waits = f" Until iteration {config.distill_start:,} only the adapter learns from it."
        caption = (
            "The architecture. Above: the detector, which is all that is kept. Below: the teacher, "
            "which encodes the labels (spatial transformers, STN, and a PointNet), fuses them with "
            "the student's own features into a pyramid of the same shapes, and is trained through "
            "the student's head, by the same detection loss. L_distill is the root of the "
            "Jensen-Shannon divergence of the two maps, whose channels become a distribution by a "
            "softmax (bar: mean over the pixels of a level), averaged over the levels."
            f"{waits if config.distill_start else ''} λ(t) steps from λ₁ to λ₂ at iteration T₁, or "
            "is fixed."
        )
        return self.plot("fig1_architecture", figure, caption, f"validation image {self.image}")

    def example(self, runs: Groups) -> plots.Plot:
        """Labels, maps and distance of one image on every level, before and after training."""
        plots.style()
        run = runs["SSSD"][0]
        image, boxes = self._picture()
        kept = self._example(run)
        after = f"after {run.config.iterations:,} iterations"
        signed = {"cmap": "cividis", "vmin": -SPREAD, "vmax": SPREAD}
        nats = {"cmap": "magma", "vmin": 0, "vmax": max(kept.before.max(), kept.after.max())}
        rows = (
            Row("cover", "", "", {"cmap": "Greys", "vmin": 0, "vmax": 3}),
            Row("teacher", "Teacher", f"along its first component,\n{after}", signed),
            Row("student", "Student", f"along the same direction,\n{after}", signed),
            Row("before", "JS before", "nats per pixel,\nat the start of the run", nats),
            Row("after", "JS after", f"nats per pixel,\n{after}", nats),
        )
        figure = plt.figure(figsize=(2.06 * plots.COLUMN, 6.9))
        ratios = {"width_ratios": (1.28, 1, 1, 1, 1, 1), "height_ratios": (1, 1, 1, 1, 1, 0.1)}
        place = {"left": 0.005, "right": 0.995, "top": 0.97, "bottom": 0.062}
        grid = figure.add_gridspec(6, 6, wspace=0.07, hspace=0.17, **ratios, **place)
        cover, teacher, _, before, last = [
            _draw_row(figure, grid, number, row, kept) for number, row in enumerate(rows)
        ]
        for axes in (*before[1:], *last[1:]):
            values = np.asarray(axes.images[0].get_array())
            mean = f"mean {values.mean():.3f}" if values.size > 1 else "one pixel: 0"
            axes.set_xlabel(mean, fontsize=6.5, labelpad=2)
        pixels = image.permute(1, 2, 0).numpy()
        cover[0].imshow(pixels, extent=(0, image.shape[2], image.shape[1], 0))
        cover[0].set_title("image and labels", fontsize=7.5, pad=3)
        plots.outline(cover[0], boxes.tolist(), color=diagram.TEACHER)
        names = diagram.level_names(run.config)
        for axes, name, (h, w) in zip(cover[1:], names, kept.shapes, strict=True):
            axes.set_title(f"{name}: {h} × {w}", fontsize=7.5, pad=3)
            own = kept.padded / np.tile(kept.size[::-1] / [w, h], 2)
            plots.outline(axes, own.tolist(), color=diagram.TEACHER)
        _draw_scale(
            teacher[0].inset_axes((0.3, 0.12, 0.64, 0.06)), teacher[1], "standard deviations"
        )
        text = f"JS per pixel in nats (below ln 2 = {math.log(2):.3f})"
        _draw_scale(figure.add_subplot(grid[5, 1:]), last[1], text)
        caption = (
            f"One validation image (number {self.image}, {counted(len(boxes), 'object')}) on the "
            f"levels of a {NAMES[run.config.detector]} trained by SSSD with λ = "
            f"{weight(run.config)}, seed {run.config.seed}. First row: in how many boxes each pixel "
            "of a level lies (white 0 to black 3; a small object may cover no pixel). Pixel (x, y) "
            "of a level of w × h pixels stands for the point (x·W/w, y·H/h) of the W × H image, so "
            "boxes look shifted by half a pixel. Teacher and student: the normalised maps along the "
            "direction in which the teacher's pixels differ most, in its standard deviations. JS: the "
            "Jensen-Shannon divergence of the two maps at each pixel."
        )
        return self.plot("fig1_example", figure, caption, "n = 1 image, 1 seed")

    def measure(self, runs: Groups) -> pd.DataFrame:
        """Mean JS per pixel in nats: a row for each level, seed and image.

        Indexed by ``level``, ``seed`` and ``image``; columns ``before`` and ``after`` training.
        """
        parts = {}
        for run in runs["SSSD"]:
            file = run.files.kept("divergence")
            if not file.exists():
                file.parent.mkdir(exist_ok=True)
                Divergence(np.array([self._divergence(run, state) for state in STATES])).save(file)
            levels = zip(diagram.level_names(run.config), Divergence.load(file).js.T, strict=True)
            for name, js in levels:
                parts[name, run.config.seed] = pd.DataFrame(js, columns=list(STATES))
        return pd.concat(parts, names=["level", "seed", "image"])

    def _divergence(self, run: Run, state: str) -> list[list[float]]:
        """Mean JS per pixel of each image and level."""
        distiller = run.distiller(trained=state == "after")
        distiller.to("cuda" if torch.cuda.is_available() else "cpu")
        images = range(min(MEASURED, len(self.split)))
        return [
            [float(x.mean()) for x in view(distiller, *self.split[i]).divergence] for i in images
        ]

    def table(self, measured: pd.DataFrame) -> Table:
        """JS per pixel, level by level, before and after training."""
        frame = measured.groupby("level").mean().map("{:.4f}".format).add_prefix("JS ")
        lower = (measured["after"] < measured["before"]).groupby("level")
        frame["lower after, of n"] = [f"{own.sum()} of {len(own)}" for _, own in lower]
        caption = (
            "JS per pixel in nats, between the adapted student's and the teacher's normalised maps, "
            f"before and after training with λ = {self.lambda1:g}; means over {_sample(measured)}."
        )
        return Table("fig1_divergence", frame.reset_index(), caption)

    def findings(self, measured: pd.DataFrame) -> Findings:
        """How far apart student and teacher are before and after training."""
        normaliser = self.configs["SSSD"][0].normaliser
        lower, mean = (measured["after"] < measured["before"]), measured.groupby("level").mean()
        total = ((measured / normaliser) ** 0.5).mean()
        said = [
            f"The adapted student's maps are closer to the teacher's after training than before on "
            f"{(mean['after'] < mean['before']).sum()} of {len(mean)} levels, and in {lower.sum()} of "
            f"the {len(lower)} combinations of level, image and seed.",
            *(
                f"{level} is a single pixel here, which has no variance to normalise: its distance "
                "is 0."
                for level in mean.index[mean["before"] == 0]
            ),
            f"L_distill, the mean over the levels of √(JS ÷ {normaliser}), goes from "
            f"{total['before']:.4f} to {total['after']:.4f}. Means over {_sample(measured)}.",
        ]
        return Findings(said)


def _draw_row(figure: Figure, grid: GridSpec, number: int, row: Row, kept: Example) -> list[Axes]:
    """Draw a row; returns the axes of its title, and those of the levels."""
    beside = figure.add_subplot(grid[number, 0])
    beside.axis("off")
    beside.text(0.94, 0.6, row.title, ha="right", va="bottom", fontsize=8, fontweight="bold")
    beside.text(0.94, 0.54, row.detail, ha="right", va="top", fontsize=6.3, linespacing=1.25)
    drawn = [beside]
    for p, values in enumerate(kept.levels(row.name)):
        axes = figure.add_subplot(grid[number, 1 + p], xticks=[], yticks=[])
        axes.imshow(values, interpolation="nearest", **row.look)
        axes.spines[:].set(visible=True, linewidth=0.5, color=plots.GREY)
        drawn.append(axes)
    return drawn


def _draw_scale(axes: Axes, panel: Axes, label: str) -> None:
    """The colours of what is drawn in ``panel``."""
    bar = axes.figure.colorbar(panel.images[0], cax=axes, orientation="horizontal")
    bar.set_label(label, fontsize=6.5)
    bar.outline.set_linewidth(0.5)


def _sample(measured: pd.DataFrame) -> str:
    images, seeds = (measured.index.unique(level).size for level in ("image", "seed"))
    return f"n = {counted(images, 'validation image')}, {counted(seeds, 'seed')}"
