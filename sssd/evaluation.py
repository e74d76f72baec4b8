"""COCO AP by pycocotools, and how far it can be trusted: intervals over images and seeds."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self
from weakref import WeakKeyDictionary

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy.stats import norm
from scipy.stats import t as student_t

from .data.coco import CocoSplit

METRICS = (
    *("AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L"),
    *("AR1", "AR10", "AR100", "AR_S", "AR_M", "AR_L"),
)
"""pycocotools' twelve numbers, in its order."""


class _Arrays:
    """A dataclass of arrays that is kept as an .npz file."""

    def save(self, path: Path) -> None:
        """Write all arrays, compressed; the file appears whole or not at all."""
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        with open(part, "wb") as file:
            np.savez_compressed(file, **self.__dict__)
        os.replace(part, path)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            ValueError: the file does not hold these arrays.
        """
        names = [field.name for field in fields(cls)]  # type: ignore[arg-type]
        with np.load(path) as file:
            if sorted(file.files) != sorted(names):
                raise ValueError(f"{path}: holds {file.files}; expected {names}")
            return cls(**{name: file[name] for name in names})


@dataclass(frozen=True)
class Detections(_Arrays):
    """D detections over any number of images.

    ``image_id`` and ``category_id`` int64 [D], ``boxes`` float32 [D, 4] as (x1, y1, x2, y2) in
    pixels, ``scores`` float32 [D].

    Raises:
        ValueError: the arrays' shapes do not fit together.
    """

    image_id: np.ndarray
    category_id: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray

    def __post_init__(self) -> None:
        shapes = [value.shape for value in self.__dict__.values()]
        d, expected = len(self.scores), "[D], [D], [D, 4] and [D]"
        if shapes != [(d,), (d,), (d, 4), (d,)]:
            raise ValueError(f"detections: arrays of shapes {shapes}; expected {expected}")

    def __len__(self) -> int:
        return len(self.scores)

    @classmethod
    def concatenate(cls, parts: Sequence[Detections]) -> Detections:
        """All detections, in order; none from no parts."""
        empty = cls(*(np.zeros(0, np.int64),) * 2, np.zeros((0, 4), np.float32), np.zeros(0, "f4"))
        each = zip(*(part.__dict__.values() for part in (empty, *parts)), strict=True)
        return cls(*(np.concatenate(arrays) for arrays in each))

    @classmethod
    def from_outputs(
        cls,
        outputs: Sequence[dict[str, Any]],
        image_ids: Sequence[int],
        category_ids: Sequence[int],
    ) -> Detections:
        """From a torchvision detector's outputs, one dict an image; label n is category_ids[n − 1].

        Raises:
            ValueError: a label is not in 1..K.
        """
        parts, known = [], np.asarray(category_ids, np.int64)
        for output, image_id in zip(outputs, image_ids, strict=True):
            boxes, labels, scores = (output[k].cpu().numpy() for k in ("boxes", "labels", "scores"))
            if len(labels) and not 1 <= labels.min() <= labels.max() <= len(known):
                extremes = f"{labels.min()} to {labels.max()}"
                raise ValueError(
                    f"labels: the detector gives {extremes}; expected 1 to {len(known)}"
                )
            ids = np.full(len(labels), image_id, np.int64)
            parts.append(cls(ids, known[labels - 1], boxes.astype("f4"), scores.astype("f4")))
        return cls.concatenate(parts)


@dataclass(frozen=True, eq=False)  # known by identity: its replicates are kept
class Matches(_Arrays):
    """How detections met ground truth: what an AP depends on, at 100 detections an image.

    I images, K classes, D detections (class by class, in each by falling score, ties as pycocotools
    breaks them), and J IoU thresholds: .5, .55, …, .95, or one of them.
    """

    image_ids: np.ndarray  # int64 [I]
    objects: np.ndarray  # int32 [K, I], ground truths of a class in an image, without crowds
    starts: np.ndarray  # int64 [K + 1], class k has the detections starts[k]:starts[k + 1]
    image: np.ndarray  # int32 [D], index of the detection's image
    matched: np.ndarray  # bool [D, J], met a ground truth or a crowd
    ignored: np.ndarray  # bool [D, J], counts neither for nor against: a crowd, or another area

    def at(self, threshold: int) -> Matches:
        """At one IoU threshold only, the first being .5."""
        one = [threshold]
        return replace(self, matched=self.matched[:, one], ignored=self.ignored[:, one])


THRESHOLDS = {"AP50": 0, "AP75": 5}
"""The measures at one IoU threshold, by its place."""


@dataclass(frozen=True)
class Evaluation:
    """``summary``: `METRICS` by name; ``per_class``: AP by class name; NaN without ground truth.

    ``by_measure`` has what AP, AP_S, AP_M and AP_L depend on, ``matches`` what AP does.
    """

    summary: dict[str, float]
    per_class: dict[str, float]
    by_measure: dict[str, Matches]

    @property
    def matches(self) -> Matches:
        return self.by_measure["AP"]


def evaluate(split: CocoSplit, detections: Detections) -> Evaluation:
    """pycocotools' evaluation of boxes on the images of ``split``, with its area limits.

    Raises:
        ValueError: a detection's image or category is not in the split.
    """
    for name, known in (("image_id", split.image_ids), ("category_id", split.category_ids)):
        values = getattr(detections, name)
        for value in values[~np.isin(values, known)][:1]:
            raise ValueError(f"detections: {name} {value} is not in {split.annotations}")
    boxes = detections.boxes.astype(np.float64)
    boxes[:, 2:] -= boxes[:, :2]
    columns = (detections.image_id, detections.category_id, boxes, detections.scores)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    found = COCO()  # what loadRes makes, which fails without detections
    found.dataset = {
        **{name: split.coco.dataset[name] for name in ("images", "categories")},
        "annotations": [
            {"id": i, "image_id": m, "category_id": c, "bbox": b, "area": b[2] * b[3], "score": s}
            for i, (m, c, b, s) in enumerate(rows, start=1)
        ],
    }
    small, medium = (side**2 for side in split.area_limits)
    with redirect_stdout(io.StringIO()):
        found.createIndex()
        run = COCOeval(split.coco, found, "bbox")
        run.params.imgIds = split.image_ids.tolist()
        run.params.areaRng = [[0, 1e10], [0, small], [small, medium], [medium, 1e10]]
        run.evaluate()
        run.accumulate()
        run.summarize()
    summary = [float(value) if value > -1 else float("nan") for value in run.stats]
    precision = run.eval["precision"][..., 0, -1].mean(axis=(0, 1))  # [K]; −1 without ground truth
    per_class = [float(value) if value > -1 else float("nan") for value in precision]
    return Evaluation(
        dict(zip(METRICS, summary, strict=True)),
        dict(zip(split.class_names, per_class, strict=True)),
        {m: _matches(run, split, i) for i, m in enumerate(("AP", "AP_S", "AP_M", "AP_L"))},
    )


def _matches(run: COCOeval, split: CocoSplit, area: int) -> Matches:
    """From evalImgs, which is ordered by class, area range and image, flattened."""
    classes, images, areas = len(split.category_ids), len(split), len(run.params.areaRng)
    objects, starts = np.zeros((classes, images), np.int32), np.zeros(classes + 1, np.int64)
    none = np.zeros((0, len(run.params.iouThrs)), bool)
    parts: list[tuple[np.ndarray, ...]] = [(np.zeros(0, np.int32), none, none)]
    for k in range(classes):
        scores, own = [np.zeros(0)], parts[:1]
        for i in range(images):
            if (entry := run.evalImgs[(k * areas + area) * images + i]) is not None:
                objects[k, i] = np.count_nonzero(entry["gtIgnore"] == 0)
                scores.append(np.array(entry["dtScores"], np.float64))
                image = np.full(len(scores[-1]), i, np.int32)
                own.append((image, entry["dtMatches"].T > 0, entry["dtIgnore"].T))
        order = np.argsort(-np.concatenate(scores), kind="stable")
        parts.append(tuple(np.concatenate(column)[order] for column in zip(*own, strict=True)))
        starts[k + 1] = starts[k] + len(order)
    arrays = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Matches(split.image_ids, objects, starts, *arrays)


def average_precision(matches: Matches, weights: np.ndarray) -> np.ndarray:
    """AP of R data sets in which image i occurs ``weights[r, i]`` times: [R, I] → float64 [R].

    pycocotools' AP (precision envelope at 101 recalls, mean over IoU thresholds and over the
    classes that have ground truth); NaN where no class has any. Weights of 1 give its number.
    """
    weights = np.ascontiguousarray(weights, np.float64)
    total, classes = np.zeros(len(weights)), np.zeros(len(weights))
    recalls = torch.from_numpy(np.tile(np.linspace(0, 1, 101), (len(weights), 1)))
    for k in np.flatnonzero(matches.objects.any(axis=1)):
        own = slice(matches.starts[k], matches.starts[k + 1])
        image, matched, ignored = matches.image[own], matches.matched[own], matches.ignored[own]
        objects = weights @ matches.objects[k]
        seen = weights[:, image].cumsum(axis=1)  # detections so far, with the ignored ones
        ap = np.zeros(len(weights))
        for m, g in zip(matched.T, ignored.T, strict=True):
            # Recall moves, and the envelope of the precision has its steps, only at true positives.
            hit, skip = np.flatnonzero(m & ~g), np.flatnonzero(g)
            skipped = np.pad(weights[:, image[skip]].cumsum(axis=1), ((0, 0), (1, 0)))
            true = weights[:, image[hit]].cumsum(axis=1)
            counted = seen[:, hit] - skipped[:, np.searchsorted(skip, hit)]
            precision = np.pad(true / (counted + np.spacing(1)), ((0, 0), (0, 1)))  # 0 beyond reach
            envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
            recall = np.ascontiguousarray(true / np.maximum(objects, 1)[:, None])
            at = torch.searchsorted(torch.from_numpy(recall), recalls).numpy()  # row by row
            ap += np.take_along_axis(envelope, at, axis=1).mean(axis=1) / matched.shape[1]
        total += np.where(objects > 0, ap, 0)
        classes += objects > 0
    return np.divide(total, classes, out=np.full(len(total), np.nan), where=classes > 0)


def bootstrap(
    matches: Matches | Sequence[Matches], replicates: int = 1000, seed: int = 0
) -> np.ndarray:
    """AP of each replicate, in which the images are drawn with replacement.

    One `Matches` gives [replicates]; several, on the same images, give [runs, replicates], all from
    the same draws, so that differences between runs are paired by image.

    Raises:
        ValueError: the runs were not evaluated on the same images.
    """
    if isinstance(matches, Matches):
        return bootstrap([matches], replicates, seed)[0]
    ids = matches[0].image_ids
    if any(not np.array_equal(ids, other.image_ids) for other in matches):
        raise ValueError("matches: runs on different images; expected the same validation images")
    # Kept, as the draws depend on nothing else: figure, table and findings ask for the same ones.
    every, draws = matches, (replicates, seed)
    matches = [m for m in dict.fromkeys(every) if draws not in _REPLICATED.get(m, {})]
    for m, drawn in zip(matches, _replicates(matches, ids, replicates, seed), strict=True):
        _REPLICATED.setdefault(m, {})[draws] = drawn
    return np.stack([_REPLICATED[m][draws] for m in every])


_REPLICATED: WeakKeyDictionary[Matches, dict[tuple[int, int], np.ndarray]] = WeakKeyDictionary()


def _replicates(
    matches: Sequence[Matches], ids: np.ndarray, replicates: int, seed: int
) -> np.ndarray:
    if not matches:
        return np.zeros((0, replicates))
    rng = np.random.default_rng(seed)
    largest = max(len(ids), *(int(np.diff(run.starts).max()) for run in matches))
    step = max(1, 2**22 // largest)  # bounds the [replicates, detections] arrays to some 32 MiB
    chunks = []
    for first in range(0, replicates, step):
        size = min(step, replicates - first)
        weights = rng.multinomial(len(ids), np.full(len(ids), 1 / len(ids)), size)
        chunks.append([average_precision(run, weights) for run in matches])
    return np.concatenate(chunks, axis=1)


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval, over ``seeds`` runs and ``images`` validation images."""

    estimate: float
    low: float
    high: float
    seeds: int
    images: int
    covers: str
    """"seeds and images", or "images only (one seed)" """
    signed: bool = True
    """written with its sign, as differences are"""

    @property
    def distinct(self) -> bool:
        """Whether 0 is outside."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        sign = "+" if self.signed else ""
        estimate, low, high = (
            format(value, f"{sign}.3f").replace("-", "−")
            for value in (self.estimate, self.low, self.high)
        )
        return f"{estimate} [{low}, {high}]"


def half_width(image_variance: Any, seed_variance: Any, seeds: int) -> Any:
    """Half of the 95 % interval of a mean over seeds, elementwise for arrays.

    ``seed_variance`` is s²/n of the per-seed values: it comes with Student's t of n − 1 degrees of
    freedom, the image variance with the normal quantile, and the two halves are added in squares.
    Simulation gives 95 % coverage where either part dominates and more in between (Welch and
    Satterthwaite's rule, narrower, falls to 92 % with three seeds and 87 % with two).
    """
    quantile = student_t.ppf(0.975, seeds - 1) if seeds > 1 else 0.0
    return np.sqrt(norm.ppf(0.975) ** 2 * image_variance + quantile**2 * seed_variance)


def over_seeds(values: Sequence[float]) -> Interval:
    """The mean of a number that each run gives, with Student's t interval over the runs.

    A single value has no interval: its ends are NaN.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("values: none given; expected one at least")
    each, n = np.asarray(values, np.float64), len(values)
    half = float(half_width(0.0, each.var(ddof=1) / n, n)) if n > 1 else float("nan")
    mean = float(each.mean())
    return Interval(mean, mean - half, mean + half, n, 0, "seeds", signed=False)


Runs = Sequence[Matches | Sequence[Matches]]
"""One entry a seed: a run's matches, or those of several of its evaluations, to be averaged."""


def interval(runs: Runs, replicates: int = 1000, seed: int = 0) -> Interval:
    """The AP of one method: mean over its runs (one a seed), all on the same images.

    The variance is that of the images (bootstrap of the mean over seeds) plus that of the seeds.

    Raises:
        ValueError: no runs, or not on the same images.
    """
    return _interval(runs, None, replicates, seed)


def difference(runs_a: Runs, runs_b: Runs, replicates: int = 1000, seed: int = 0) -> Interval:
    """AP(a) − AP(b): mean over seeds, paired by position (runs of the same seed) and by image.

    Raises:
        ValueError: no runs, unequally many, or not on the same images.
    """
    if len(runs_a) != len(runs_b):
        message = "expected as many, one of each method a seed"
        raise ValueError(f"runs: {len(runs_a)} against {len(runs_b)}; {message}")
    return _interval(runs_a, runs_b, replicates, seed)


def _interval(runs: Runs, others: Runs | None, replicates: int, seed: int) -> Interval:
    n = len(runs)
    if n == 0:
        raise ValueError("runs: none given; expected one at least")
    each = [[run] if isinstance(run, Matches) else list(run) for run in [*runs, *(others or [])]]
    flat = [matches for evaluations in each for matches in evaluations]
    images = len(flat[0].image_ids)
    # The first column is the data set as it is, the others its replicates.
    replicated = bootstrap(flat, replicates, seed)  # first: it checks the images
    once = np.stack([average_precision(m, np.ones((1, images))) for m in flat])
    columns = np.concatenate([once, replicated], axis=1)
    ends = np.cumsum([len(evaluations) for evaluations in each])[:-1]
    means = np.stack([part.mean(axis=0) for part in np.split(columns, ends)])
    values, drawn = means[:, 0], means[:, 1:]
    if others is not None:
        drawn, values = drawn[:n] - drawn[n:], values[:n] - values[n:]
    # A replicate may hold no object at all in a tiny set: its AP is not defined and left out.
    image_variance = float(np.nanvar(drawn.mean(axis=0), ddof=1))
    seed_variance = float(values.var(ddof=1)) / n if n > 1 else 0.0
    half, mean = float(half_width(image_variance, seed_variance, n)), float(values.mean())
    covers = "seeds and images" if n > 1 else "images only (one seed)"
    signed = others is not None
    return Interval(mean, mean - half, mean + half, n, images, covers, signed)
