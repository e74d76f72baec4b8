"""Pictures of what a run detects: on validation images with the ground truth, or on any images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import Tensor

from ..config import check_narrowest
from ..data.coco import FORMATS, rgb
from ..engine import open_split
from ..parameters import check_folder
from ..records import write_json
from ..runs import Run
from ..starts import load_student
from . import plots

Box = tuple[Sequence[float], int, float]
"""x1, y1, x2, y2 in pixels, the class's index, the score."""


def draw_detections(run: Run, images: int = 3, least_score: float = 0.4) -> Figure:
    """The first ``images`` validation images with a run's last detections.

    Boxes have their class and score, and a colour for each class; the ground truth is dotted white.
    """
    split = open_split(run.config.data, "val")
    found = run.detections()
    height, width = split[0][0].shape[1:]
    size = (3.2 * images, 3.2 * height / width + 0.1)
    figure, axes = plt.subplots(1, images, figsize=size, layout="constrained", squeeze=False)
    for i, panel in enumerate(axes[0]):
        pixels, target = split[i]
        _show(panel, pixels)
        plots.outline(panel, target["boxes"].tolist(), "white", width=0.8, style=":")
        own = (found.image_id == target["image_id"]) & (found.scores >= least_score)
        kinds = [split.category_ids.index(int(category)) for category in found.category_id[own]]
        boxes = zip(found.boxes[own].tolist(), kinds, found.scores[own].tolist(), strict=True)
        _draw(panel, boxes, split.class_names)
    plt.close(figure)
    return figure


def detect_images(
    run: Path, images: Sequence[Path], to: Path, least_score: float = 0.4
) -> list[dict[str, Any]]:
    """Detect on any images with a finished run's student.

    Writes a picture of each into ``to``, with the boxes that score ``least_score`` or more, and all
    detections as ``detections.json``. An image is turned as its EXIF says, and so are its boxes.

    Args:
        run: the folder of the run.
        images: files, or folders of files.

    Returns:
        The detections as COCO results, with ``file_name`` and ``category``; images are numbered
        from 1 and ``category_id`` is the label, from 1 in the order of the run's classes.

    Raises:
        ValueError: the student cannot be loaded, an image cannot be read, or two share a name.
    """
    files = [file for given in images for file in _files(given)]
    check_folder("to", to)
    student, classes, config = load_student(run)
    names: dict[str, Path] = {}
    for file in files:
        other = names.setdefault(f"{file.stem}.png", file)
        if other != file:
            raise ValueError(f"images: {str(other)!r} and {str(file)!r}; expected different names")
        height, width = _read(file).shape[1:]
        check_narrowest((file.name, width, height), config["max_size"])
    to.mkdir(parents=True, exist_ok=True)
    results = []
    for number, (name, file) in enumerate(names.items(), start=1):
        image = _read(file)
        with torch.no_grad():
            (found,) = student([image])
        own = [found[x].tolist() for x in ("boxes", "labels", "scores")]
        boxes = [(b, label - 1, s) for b, label, s in zip(*own, strict=True) if label > 0]
        for (x1, y1, x2, y2), kind, score in boxes:
            about = {"image_id": number, "file_name": str(file), "category_id": kind + 1}
            box = {"category": classes[kind], "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score}
            results.append(about | box)
        height, width = image.shape[1:]
        figure = plt.figure(figsize=(6.4, 6.4 * height / width))
        panel = figure.add_axes((0, 0, 1, 1))
        _show(panel, image)
        drawn = [box for box in boxes if box[2] >= least_score]
        _draw(panel, reversed(drawn), classes, font=8)  # the best on top
        figure.savefig(to / name, dpi=max(100, width / 6.4))  # no fewer pixels than the image
        plt.close(figure)
    write_json(results, to / "detections.json")
    return results


def _files(given: Path) -> list[Path]:
    """An image file, or all of a folder, sorted by name."""
    if not given.is_dir():
        return [given]
    endings = {end for end, kind in Image.registered_extensions().items() if kind in FORMATS}
    found = sorted(file for file in given.iterdir() if file.suffix.lower() in endings)
    if not found:
        raise ValueError(f"images: {str(given)!r} holds none; expected {', '.join(FORMATS)}")
    return found


def _read(file: Path) -> Tensor:
    """An image, float32 [3, H, W] in [0, 1], as a viewer shows it."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            pixels = rgb(ImageOps.exif_transpose(image))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        why = getattr(error, "strerror", None) or f"expected one of {', '.join(FORMATS)}"
        raise ValueError(f"images: {str(file)!r} cannot be read: {why}") from None
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float() / 255


def _show(panel: Axes, pixels: Tensor) -> None:
    extent = (0, pixels.shape[2], pixels.shape[1], 0)
    panel.imshow(pixels.permute(1, 2, 0).numpy(), extent=extent)
    panel.set_axis_off()


def _draw(panel: Axes, boxes: Iterable[Box], classes: Sequence[str], font: int = 5) -> None:
    colours = sns.color_palette("colorblind", len(classes))
    for box, kind, score in boxes:
        plots.outline(panel, [box], colours[kind], width=1.4)
        label = {"facecolor": colours[kind], "edgecolor": "none", "pad": 0.6}
        text = f"{classes[kind]} {score:.2f}"
        look: Any = {"fontsize": font, "color": "white", "va": "bottom", "bbox": label}
        panel.text(box[0], box[1], text, parse_math=False, **look)  # a class may be called $x_{$
