"""COCO's AP by pycocotools, and the matches that its intervals are computed from."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from .data.coco import CocoSplit
from .records import Arrays

METRICS: tuple[str, ...] = ("AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L")
METRICS += ("AR1", "AR10", "AR100", "AR_S", "AR_M", "AR_L")
"""pycocotools' twelve numbers, in its order."""
THRESHOLDS = {"AP50": 0, "AP75": 5}
"""The measures at a single IoU threshold, and that threshold's index in .5, .55, …, .95."""


def matches_of(measure: str) -> str:
    """The measure whose `Matches` a measure is computed from: AP50 and AP75 from those of AP."""
    return "AP" if measure in THRESHOLDS else measure


@dataclass(frozen=True)
class Detections(Arrays):
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
        """All detections in order; none without parts."""
        ids, boxes = np.zeros(0, np.int64), np.zeros((0, 4), np.float32)
        empty = cls(ids, ids, boxes, boxes[:, 0])  # np.concatenate needs at least one array
        each = zip(*(part.__dict__.values() for part in (empty, *parts)), strict=True)
        return cls(*(np.concatenate(arrays) for arrays in each))

    @classmethod
    def from_outputs(
        cls,
        outputs: Sequence[dict[str, Any]],
        image_ids: Sequence[int],
        category_ids: Sequence[int],
    ) -> Detections:
        """From a torchvision detector's outputs, a dict per image; label n is category_ids[n − 1].

        Raises:
            ValueError: a label is not in 1..K.
        """
        parts, known = [], np.asarray(category_ids, np.int64)
        for output, image_id in zip(outputs, image_ids, strict=True):
            boxes, labels, scores = (output[k].cpu().numpy() for k in ("boxes", "labels", "scores"))
            if len(labels) and not 1 <= labels.min() <= labels.max() <= len(known):
                extremes = f"{labels.min()} to {labels.max()}"
                raise ValueError(f"labels: {extremes} detected; expected 1 to {len(known)}")
            ids = np.full(len(labels), image_id, np.int64)
            parts.append(cls(ids, known[labels - 1], boxes.astype("f4"), scores.astype("f4")))
        return cls.concatenate(parts)

    def results(self) -> list[dict[str, Any]]:
        """As COCO results, with boxes as x, y, w, h."""
        boxes = self.boxes.astype(np.float64)
        boxes[:, 2:] -= boxes[:, :2]
        columns = (self.image_id, self.category_id, boxes, self.scores)
        return [
            {"image_id": i, "category_id": c, "bbox": b, "score": s}
            for i, c, b, s in zip(*(column.tolist() for column in columns), strict=True)
        ]


@dataclass(frozen=True, eq=False)  # hashed by identity: `intervals` caches replicates
class Matches(Arrays):
    """Which detections match the ground truth: all that AP at 100 detections per image depends on.

    I images, K classes, D detections (by class, then by falling score, then in pycocotools' order),
    and J IoU thresholds: .5, .55, …, .95, or one of them.
    """

    image_ids: np.ndarray
    """int64 [I]."""
    objects: np.ndarray
    """int32 [K, I]: the number of a class's objects in an image, without crowd regions."""
    starts: np.ndarray
    """int64 [K + 1]: class k has the detections ``starts[k]`` to ``starts[k + 1] - 1``."""
    image: np.ndarray
    """int32 [D]: index of the detection's image."""
    matched: np.ndarray
    """bool [D, J]: the detection matches an object or a crowd region."""
    ignored: np.ndarray
    """bool [D, J]: it is neither true nor false, as it is in a crowd region or of another area."""

    def at(self, threshold: int) -> Matches:
        """The matches at one IoU threshold, by its index; 0 is .5."""
        one = [threshold]
        return replace(self, matched=self.matched[:, one], ignored=self.ignored[:, one])

    def compact(self) -> Matches:
        """A smaller form, which has the same AP for any weights of the images.

        It leaves out detections of classes without ground truth, those after their class's last
        true positive, those that are ignored at every threshold, and what an ignored one matches.
        Consecutive false positives are put in the order of their images.
        """
        hit = self.matched & ~self.ignored
        class_of = np.repeat(np.arange(len(self.objects)), np.diff(self.starts))  # [D]
        last = np.full(len(self.objects), -1)  # each class's last true positive
        found = np.flatnonzero(hit.any(axis=1))
        np.maximum.at(last, class_of[found], found)
        last[~self.objects.any(axis=1)] = -1
        until_last = np.arange(len(class_of)) <= last[class_of]
        kept = np.flatnonzero(until_last & ~self.ignored.all(axis=1))
        class_of, image = class_of[kept], self.image[kept]
        hit, ignored = hit[kept], self.ignored[kept]
        # What is true or ignored at some threshold keeps its place: it has a key of its own. The
        # false ones between two of them share a key. Classes do not mix: each ends with a true one.
        stays = (hit | ignored).any(axis=1)
        order = np.lexsort((image, 2 * stays.cumsum() - stays))
        starts = np.searchsorted(class_of, np.arange(len(self.starts)))
        arrays = (image[order], hit[order], ignored[order])
        return Matches(self.image_ids, self.objects, starts, *arrays)


@dataclass(frozen=True)
class Evaluation:
    """``summary``: `METRICS` by name; ``per_class``: AP by class name; NaN without ground truth.

    ``by_measure`` has the matches of AP, AP_S, AP_M and AP_L; ``matches`` are those of AP.
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
    small, medium = (side**2 for side in split.area_limits)
    with redirect_stdout(io.StringIO()):
        # loadRes fails without detections
        found = split.coco.loadRes(detections.results()) if len(detections) else COCO()
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
        {name: _matches(run, split, i) for i, name in enumerate(("AP", "AP_S", "AP_M", "AP_L"))},
    )


def coco_results(split: CocoSplit, detections: Detections) -> list[dict[str, Any]]:
    """Detections as COCO results, with the ids of the annotation file; boxes are x, y, w, h.

    Detections of a class that the file does not have are left out.
    """
    ids = split.file_category_ids
    return [
        {**r, "image_id": split.file_image_id(r["image_id"]), "category_id": ids[r["category_id"]]}
        for r in detections.results()
        if r["category_id"] in ids
    ]


def _matches(run: COCOeval, split: CocoSplit, area: int) -> Matches:
    """The matches from evalImgs, a flat list by class, then area range, then image."""
    classes, images, areas = len(split.category_ids), len(split), len(run.params.areaRng)
    objects, starts = np.zeros((classes, images), np.int32), np.zeros(classes + 1, np.int64)
    none = np.zeros((0, len(run.params.iouThrs)), bool)
    # No detections: with them np.concatenate, which needs an array, gives the right dtypes.
    nothing: tuple[np.ndarray, ...] = (np.zeros(0, np.int32), none, none)
    parts = [nothing]
    for k in range(classes):
        scores, found = [np.zeros(0)], [nothing]
        for i in range(images):
            if (entry := run.evalImgs[(k * areas + area) * images + i]) is not None:
                objects[k, i] = np.count_nonzero(entry["gtIgnore"] == 0)
                scores.append(np.array(entry["dtScores"], np.float64))
                image = np.full(len(scores[-1]), i, np.int32)
                found.append((image, entry["dtMatches"].T > 0, entry["dtIgnore"].T))
        order = np.argsort(-np.concatenate(scores), kind="stable")
        parts.append(tuple(np.concatenate(column)[order] for column in zip(*found, strict=True)))
        starts[k + 1] = starts[k] + len(order)
    arrays = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Matches(split.image_ids, objects, starts, *arrays).compact()
