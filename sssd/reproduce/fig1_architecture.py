"""Figure 1: the architecture, and what flows through it on an image of the data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from pydantic import Field
from torch import Tensor

from ..config import RunConfig
from ..data.coco import CocoSplit
from ..detectors import levels_of, prepare
from ..distiller import PUBLISHED_LAMBDA, Distiller
from ..engine import open_split
from ..losses import js_map, normalise
from ..records import Arrays
from ..runs import Run
from ..teacher import inside
from . import diagram, plots
from .experiment import Experiment, Findings
from .paper import NAMES
from .tables import Table
from .words import counted, listed, weight

MEASURED = 100
"""Validation images that the numbers are means over; all where there are fewer."""
SPREAD = 2.5
"""Standard deviations at which the colours of the maps end."""
STATES = ("before", "after")
"""Of training."""
Groups = Mapping[str, list[Run]]
"""The runs of SSSD, one for each seed."""


@dataclass(frozen=True)
class View:
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

    def masks(self, level: int) -> Tensor:
        """Which pixels of a level are inside each box, bool [T, h_p, w_p]."""
        h, w = self.divergence[level].shape
        return inside(self.boxes, self.size, (h, w))

    def means(self) -> list[float]:
        """Mean divergence per pixel of each level, in nats."""
        return [float(level.mean()) for level in self.divergence]


@torch.no_grad()
def view(distiller: Distiller, image: Tensor, target: Mapping[str, Tensor]) -> View:
    """Send an image [3, H, W] with its ``boxes`` and ``labels`` through student, teacher and adapter.

    ``distiller`` is in evaluation mode, so that nothing in it changes.
    """
    device = distiller.step.device
    labels = {name: target[name].to(device) for name in ("boxes", "labels")}
    prepared, targets = prepare(distiller.student, [image.to(device)], [labels])
    assert targets is not None
    batch, own = prepared.tensors, targets[0]
    features = levels_of(distiller.student.backbone(batch))
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


@dataclass(frozen=True)
class Example(Arrays):
    """What `Fig1.example` shows of a run and an image, kept so that it is drawn again without weights.

    The maps of all P levels, [h_p, w_p] float32 each, follow each other, flattened.
    """

    image: np.ndarray  # uint8 [3, H, W]; of photographs, which stay where they are, [3, 0, 0]
    boxes: np.ndarray  # float32 [T, 4] as x1, y1, x2, y2 in pixels of the image
    padded: np.ndarray  # float32 [T, 4], in pixels of the padded image
    size: np.ndarray  # int64 [2], height and width of the padded image
    shapes: np.ndarray  # int64 [P, 2], h_p and w_p
    cover: np.ndarray  # how many boxes each pixel is inside of
    teacher: np.ndarray  # after training, along the direction of `first_component`
    student: np.ndarray  # likewise
    before: np.ndarray  # JS divergence in nats before training
    after: np.ndarray  # and after

    @classmethod
    def of(cls, run: Run, image: Tensor, target: Mapping[str, Tensor], photograph: bool) -> Example:
        before, after = (view(run.distiller(s == "after"), image, target) for s in STATES)
        covers = [after.masks(p).sum(dim=0) for p in range(len(after.divergence))]
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
            np.array([cover.shape for cover in covers]),
            *(torch.cat([x.float().flatten() for x in each]).numpy() for each in levels),
        )

    def level(self, name: str, p: int) -> np.ndarray:
        """Level p of one of the maps, [h_p, w_p]."""
        ends = self.shapes.prod(axis=1).cumsum()
        flat = getattr(self, name)[ends[p] - self.shapes[p].prod() : ends[p]]
        return flat.reshape(self.shapes[p])


@dataclass(frozen=True)
class Divergence(Arrays):
    """What `Fig1.measure` takes from a run."""

    js: np.ndarray  # float64 [2, images, levels], mean per pixel in nats, before and after training


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
        if not self.source.paths:  # drawn again from records: it was checked when they were made
            return {"SSSD": group}
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

    def train(self) -> dict[str, list[Run]]:
        """The runs; one that was imported without the arrays of this figure is trained again."""
        runs = super().train()
        lacking = [
            run.config
            for i, run in enumerate(runs["SSSD"])
            for name in ("divergence", *([self._name] if i == 0 else []))
            if not run.files.kept(name).exists()
        ]
        self.store.get(lacking, jobs=self.jobs, weights=True)
        return runs

    def train_further(self) -> None:
        self.train()

    @property
    def _name(self) -> str:
        return f"example-{self.image}"

    def _example(self, run: Run) -> Example:
        """What is shown of a run: as it is kept, or computed and then kept."""
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
            f"averaged over the levels {listed(diagram.level_names(config))}. Double strokes: no "
            f"gradient flows back.{detached} λ(t) is the weight of the distance, λ₁ until "
            "iteration T₁ and λ₂ after it; where it is fixed, the two are equal."
        )
        note = f"{self.profile} · {self.source.name} · validation image {self.image}"
        return self.plot("fig1_architecture", figure, caption, note)

    def example(self, runs: Groups) -> plots.Plot:
        """Labels, maps and distance of one image on every level, before and after training."""
        plots.style()
        run = runs["SSSD"][0]
        image, boxes = self._picture()
        kept = self._example(run)
        names = diagram.level_names(run.config)
        figure = plt.figure(figsize=(2.06 * plots.COLUMN, 6.9))
        ratios = {"width_ratios": (1.28, 1, 1, 1, 1, 1), "height_ratios": (1, 1, 1, 1, 1, 0.1)}
        place = {"left": 0.005, "right": 0.995, "top": 0.97, "bottom": 0.062}
        grid = figure.add_gridspec(6, 6, wspace=0.07, hspace=0.17, **ratios, **place)
        _photograph(figure.add_subplot(grid[0, 0]), image, boxes)
        for row, (name, detail) in enumerate(_rows(run.config), start=1):
            axes = figure.add_subplot(grid[row, 0])
            axes.axis("off")
            axes.text(0.94, 0.6, name, ha="right", va="bottom", fontsize=8, fontweight="bold")
            axes.text(0.94, 0.54, detail, ha="right", va="top", fontsize=6.3, linespacing=1.25)
        for p, name in enumerate(names):
            column = [figure.add_subplot(grid[row, 1 + p]) for row in range(5)]
            drawn = _draw_level(column, name, p, kept)
        scale = figure.add_subplot(grid[5, 1:])  # of what was drawn last, JS after training
        bar = figure.colorbar(drawn, cax=scale, orientation="horizontal")
        bar.set_label(
            f"JS per pixel in nats (it cannot exceed ln 2 = {math.log(2):.3f})", fontsize=7
        )
        bar.outline.set_linewidth(0.5)
        caption = (
            f"One validation image (number {self.image}, {counted(len(boxes), 'object')}) "
            f"on the levels {listed(names)} of a {NAMES[run.config.detector]} trained by SSSD with "
            f"λ = {weight(run.config)}, seed {run.config.seed}. Rows: the image with its boxes, and "
            "the number of boxes over each pixel of a level (white 0 to black 3; a pixel is inside "
            "a box if its index is, scaled to the image: a small object can be inside none); the "
            "teacher's map and the adapted student's, both normalised, projected on the one "
            "direction of feature space in which the teacher's pixels differ most (dark low, "
            f"bright high, from −{SPREAD:g} to {SPREAD:g} of the teacher's standard deviations "
            "about its mean); the Jensen-Shannon divergence between the two maps at each pixel, in "
            "nats, before and after training on one scale. n = 1 image, 1 seed."
        )
        note = f"{self.profile} · {self.source.name} · n = 1 image, 1 seed"
        return self.plot("fig1_example", figure, caption, note)

    def measure(self, runs: Groups) -> pd.DataFrame:
        """Mean JS per pixel in nats of each seed, image, state and level.

        A row for each; columns ``seed``, ``image``, ``state``, ``level`` and ``js``.
        """
        rows = []
        for run in runs["SSSD"]:
            file = run.files.kept("divergence")
            if not file.exists():
                file.parent.mkdir(exist_ok=True)
                Divergence(np.array([self._divergence(run, state) for state in STATES])).save(file)
            names, js = diagram.level_names(run.config), Divergence.load(file).js
            rows += [
                {"seed": run.config.seed, "image": i, "state": s, "level": name, "js": js[n, i, p]}
                for n, s in enumerate(STATES)
                for i in range(js.shape[1])
                for p, name in enumerate(names)
            ]
        return pd.DataFrame(rows)

    def _divergence(self, run: Run, state: str) -> list[list[float]]:
        """Mean JS per pixel of each image and level."""
        distiller = run.distiller(trained=state == "after")
        distiller.to("cuda" if torch.cuda.is_available() else "cpu")
        images = range(min(MEASURED, len(self.split)))
        return [view(distiller, *self.split[i]).means() for i in images]

    def table(self, measured: pd.DataFrame) -> Table:
        """JS per pixel and its part in L_distill, level by level, before and after training."""
        config = self.configs["SSSD"][0]
        rows = []
        for level, pairs in _pairs(measured):
            before, after = (pairs[state].mean() for state in STATES)
            root = ((pairs / config.normaliser) ** 0.5).mean()
            rows.append(
                {
                    "level": level,
                    "JS before": f"{before:.4f}",
                    "JS after": f"{after:.4f}",
                    "after ÷ before": f"{after / before:.2f}" if before else "",
                    "lower after, of n": _lower(pairs),
                    f"√(JS ÷ {config.normaliser}) before": f"{root['before']:.4f}",
                    f"√(JS ÷ {config.normaliser}) after": f"{root['after']:.4f}",
                }
            )
        caption = (
            "JS per pixel in nats, between the adapted student's and the teacher's normalised maps, "
            f"before and after training with λ = {weight(config)}; means over {_sample(measured)}. "
            f"L_distill is the mean over the levels of √(JS ÷ {config.normaliser})."
        )
        return Table("fig1_divergence", pd.DataFrame(rows), caption)

    def findings(self, measured: pd.DataFrame) -> Findings:
        """How far apart student and teacher are before and after training."""
        pairs = _pairs(measured)
        closer = [level for level, own in pairs if own["after"].mean() < own["before"].mean()]
        lower = sum(int((own["after"] < own["before"]).sum()) for _, own in pairs)
        said = [
            f"The adapted student's maps are closer to the teacher's after training than before on "
            f"{len(closer)} of {len(pairs)} levels ({listed(closer) or 'none'}); over all levels, "
            f"in {lower} of {sum(len(own) for _, own in pairs)} pairs of image and seed."
        ]
        said += [
            f"{level} is a single pixel here, which has no variance to normalise: its distance is 0."
            for level, own in pairs
            if not own["before"].any()
        ]
        root = (measured["js"] / self.configs["SSSD"][0].normaliser) ** 0.5
        total = root.groupby(measured["state"]).mean()
        said.append(
            f"L_distill, the mean over the levels: {total['before']:.4f} → {total['after']:.4f}. "
            f"Means over {_sample(measured)}."
        )
        return Findings(tuple(said))


def _pairs(measured: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """For each level a row for each seed and image, its columns before and after training."""
    return [
        (str(level), group.pivot(index=["seed", "image"], columns="state", values="js"))
        for level, group in measured.groupby("level", sort=True)
    ]


def _lower(pairs: pd.DataFrame) -> str:
    return f"{(pairs['after'] < pairs['before']).sum()} of {len(pairs)}"


def _sample(measured: pd.DataFrame) -> str:
    images, seeds = (measured[column].nunique() for column in ("image", "seed"))
    return f"n = {counted(images, 'validation image')}, {counted(seeds, 'seed')}"


def _rows(config: RunConfig) -> tuple[tuple[str, str], ...]:
    """Name and explanation of each row of the example under the first."""
    trained = f"nats per pixel, after\n{config.iterations:,} iterations,\nsame colour scale"
    return (
        (
            "Teacher",
            "after training: normalised,\nalong the direction in which\nits pixels differ most",
        ),
        ("Student", "after training: adapted,\nnormalised, along the\nsame direction"),
        ("JS before", "nats per pixel, start\nweights, teacher and\nadapter untrained"),
        ("JS after", trained),
    )


def _draw_level(column: list[Axes], name: str, p: int, kept: Example) -> Any:
    """A level of the example, from top to bottom; what was drawn last."""
    cover = kept.level("cover", p)
    most = float(max(kept.before.max(), kept.after.max()))
    signed = {"cmap": "cividis", "vmin": -SPREAD, "vmax": SPREAD}
    nats = {"cmap": "magma", "vmin": 0, "vmax": most}
    panels: list[tuple[np.ndarray, dict[str, Any]]] = [
        (cover, {"cmap": "Greys", "vmin": 0, "vmax": 3}),
        (kept.level("teacher", p), signed),
        (kept.level("student", p), signed),
        (kept.level("before", p), nats),
        (kept.level("after", p), nats),
    ]
    for axes, (values, look) in zip(column, panels, strict=True):
        drawn = axes.imshow(values, interpolation="nearest", **look)
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set(visible=True, linewidth=0.5, color="#888888")
        if look is nats:
            mean = f"mean {float(values.mean()):.3f}"
            mean = mean if values.size > 1 else "one pixel: no distance"
            axes.set_xlabel(mean, fontsize=6.5, labelpad=2)
    (height, width), (h, w) = kept.size.tolist(), cover.shape
    column[0].set_title(f"{name}: {h} × {w}", fontsize=7.5, pad=3)
    for x1, y1, x2, y2 in (kept.padded / np.array([width / w, height / h] * 2)).tolist():
        edge: Any = {"fc": "none", "ec": diagram.TEACHER, "lw": 0.8}
        column[0].add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, **edge))
    return drawn


def _photograph(axes: Axes, image: Tensor, boxes: Tensor) -> None:
    axes.imshow(image.permute(1, 2, 0).numpy(), extent=(0, image.shape[2], image.shape[1], 0))
    axes.axis("off")
    axes.set_title("image and labels", fontsize=7.5, pad=3)
    for x1, y1, x2, y2 in boxes.tolist():
        for colour, style in (("black", "-"), ("white", "--")):  # seen on any background
            edge: Any = {"fc": "none", "ec": colour, "ls": style, "lw": 0.9}
            axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, **edge))
