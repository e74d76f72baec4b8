"""Check a COCO-format data set before anything is trained on it."""

from __future__ import annotations

import html
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ..profiles import find_data, find_parts
from .coco import CocoSplit

OPENED = 500
"""At most this many images of a split are opened, evenly spaced: more would take minutes."""


@dataclass(frozen=True)
class DataCheck:
    """What is in a data set."""

    splits: pd.DataFrame
    """a row for each part: images, objects, sizes"""
    classes: pd.DataFrame
    """a row for each class: objects and images that have it, in both parts"""
    problems: tuple[str, ...]
    """what is wrong, or may be wrong; what would stop a training is an error instead"""

    def __str__(self) -> str:
        parts = self.splits.set_index("part").T.rename_axis(columns=None).to_string()
        tables = (parts, self.classes.to_string(index=False))
        wrong = "\n".join(f"- {problem}" for problem in self.problems)
        return "\n\n".join([*tables, f"Problems:\n{wrong}" if wrong else "Nothing is wrong."])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        tables = "".join(table.to_html(index=False) for table in (self.splits, self.classes))
        return tables + "".join(f"<p>⚠ {html.escape(problem)}</p>" for problem in self.problems)


def check_data(data: Any) -> DataCheck:
    """Count images and objects of a data set, and find its problems.

    Args:
        data: in any form that `sssd.profiles.find_data` takes.

    Raises:
        ValueError: a fault that would stop a training: there is no such data, an annotation file
            is not COCO's format, an image is missing or cannot be read.
    """
    parts = find_parts(find_data(data))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train = CocoSplit(parts["train_images"], parts["train_annotations"], False)
        val = CocoSplit(parts["val_images"], parts["val_annotations"], False, train.classes)
        for split in (train, val):
            for i in np.unique(np.linspace(0, len(split) - 1, OPENED).astype(int)):
                split[int(i)]
    problems = [str(warning.message) for warning in caught]
    classes: dict[str, Any] = {"class": train.class_names}
    for name, split in (("training", train), ("validation", val)):
        images = np.repeat(np.arange(len(split)), split.objects)
        pairs = np.unique(np.stack([images, split.labels - 1]), axis=1)
        of_class = np.bincount(split.labels - 1, minlength=len(split.classes))
        classes[f"{name} objects"] = of_class
        classes[f"{name} images"] = np.bincount(pairs[1], minlength=len(split.classes))
        lacking = [split.class_names[k] for k in np.flatnonzero(of_class == 0)]
        if lacking:
            problems.append(f"{name}: no object of {', '.join(lacking)}")
        if empty := int((split.objects == 0).sum()):
            kept = "kept: detections there count as false, but for those in crowd regions"
            what = "left out" if split is train else kept
            problems.append(f"{name}: {empty} images without a usable box are {what}")
    splits = pd.DataFrame([_row("training", train), _row("validation", val)])
    return DataCheck(splits, pd.DataFrame(classes), tuple(problems))


def _row(name: str, split: CocoSplit) -> dict[str, Any]:
    """A row on one part; an object's size is the square root of its box's area in pixels."""
    small, large = split.area_limits
    sides = split.boxes[:, 2:] - split.boxes[:, :2]
    size = np.sqrt(sides.prod(axis=1)) if len(sides) else np.full(1, np.nan)
    widths, heights = split.sizes.T
    shares = (size < small, (size >= small) & (size < large), size >= large)
    low, middle, high = np.quantile(size, (0.05, 0.5, 0.95))
    return {
        "part": name,
        "images": len(split),
        "width": f"{widths.min()}–{widths.max()}",
        "height": f"{heights.min()}–{heights.max()}",
        "objects": len(sides),
        "objects an image": f"{len(sides) / len(split):.1f}",
        "crowds": split.crowds,
        "size in px, 5–50–95 %": f"{low:.0f}–{middle:.0f}–{high:.0f}",
        f"small <{small:g}, medium, large ≥{large:g}": " / ".join(
            f"{100 * share.mean():.0f} %" for share in shares
        ),
    }
