"""The built-in data set: images of eight shapes, made from a seed, in COCO's format.

Image i of a split depends only on (seed, split, i), so a larger set begins with the smaller one.
It is drawn only with operations that IEEE 754 rounds the same way everywhere (no sine, no
exponential, no library's rasteriser), so every machine makes the same pixels.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from PIL import Image

VERSION = 4
"""Raise it with every change of the pixels, so that older images in a cache are not used."""
OBJECTS = (1, 3)
"""The program tries to place at least and at most this many objects in an image."""
ALIKE = 0.6
"""The probability that another object has the class of the first. Objects of one class often come
together in COCO, too: an image has 7.7 objects of 3.5 categories on average."""
SIZES = ((0.25, 0.16, 0.24), (0.40, 0.26, 0.40), (0.35, 0.42, 0.64))
"""A mixture of (share, smallest, largest) object sides, as fractions of the image's side."""
LIMITS = (0.15, 0.35)
"""The limits of small, medium and large, as fractions of the image's side. COCO's 32 and 96 pixels
are 0.05 and 0.15 of its images' sides; in an image of 64 pixels 0.05 would be only 3 pixels."""
COLOURS = (
    *((205, 60, 60), (60, 165, 75), (75, 95, 215), (215, 190, 70)),
    *((70, 185, 195), (185, 75, 185), (225, 130, 60), (235, 235, 235)),
)
"""Mean colours of the classes, in the order of `SHAPES`. A short training can use the colour, but
the colours of neighbouring classes overlap, and only the shape tells these apart."""
SPREAD = 80
"""The colour of an object differs from its class's by at most this, in each of RGB (8 bits)."""
CONTRAST = 50
"""The least difference of an object's colour from that behind it, summed over RGB (8 bits)."""
CLUTTER = (4, 12)
"""The fewest and the most marks in the background that belong to no class."""
NOISE = 25
"""The noise of a pixel is at most ± this (8 bits)."""
HIDDEN = 0.5
"""An object is not placed where it would leave less than this share of another object visible."""

Array = np.ndarray
# Outward normals of a regular pentagon's sides, at 18°, 90°, 162°, …
_PENTAGON = (
    *((0.9510565162951535, 0.3090169943749474), (0.0, 1.0)),
    *((-0.9510565162951535, 0.3090169943749474), (-0.5877852522924731, -0.8090169943749475)),
    (0.5877852522924731, -0.8090169943749475),
)


def _star(u: Array, v: Array) -> Array:
    """A star with five points: where at least four of a pentagon's five half-planes overlap."""
    met = sum(((a * u + b * v) <= 0.34).astype(np.int8) for a, b in _PENTAGON)
    return np.asarray(met) >= 4


def _bar(u: Array, v: Array, width: float) -> Array:
    return np.asarray((abs(u) <= 1) & (abs(v) <= width))


SHAPES: dict[str, Callable[[Array, Array], Array]] = {
    "disc": lambda u, v: u * u + v * v <= 0.8,
    "ring": lambda u, v: (u * u + v * v <= 0.9) & (u * u + v * v >= 0.3),
    "square": lambda u, v: np.maximum(abs(u), abs(v)) <= 0.75,
    "triangle": lambda u, v: (v >= -0.5) & (v + 1.7320508 * abs(u) <= 1.0),
    "star": _star,
    "cross": lambda u, v: (
        (np.minimum(abs(u), abs(v)) <= 0.28) & (np.maximum(abs(u), abs(v)) <= 0.95)
    ),
    "crescent": lambda u, v: (u * u + v * v <= 0.9) & ((u - 0.5) * (u - 0.5) + v * v >= 0.55),
    "bar": partial(_bar, width=0.27),
}
"""The points of the square [−1, 1]² that belong to each class's shape, before it is rotated."""


def _rotation(rng: np.random.Generator) -> tuple[float, float]:
    """Cosine and sine of a random angle, by the rational parametrisation of the circle."""
    t = rng.uniform(-1, 1)
    c, s = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
    return (c, s) if rng.integers(2) else (-c, -s)


def _paint(rng: np.random.Generator, x: Array, y: Array, colour: Array, depth: float) -> Array:
    """A plain, striped, checked or shaded surface around a colour: [h, w] grids → [h, w, 3]."""
    c, s = map(np.float32, _rotation(rng))
    period = np.float32(rng.uniform(3, 8))
    a, b = (c * x + s * y) / period, (c * y - s * x) / period
    kind = rng.integers(4)
    if kind == 1:
        wave = (np.floor(a).astype(np.int32) & 1).astype(np.float32) - np.float32(0.5)
    elif kind == 2:
        sums = np.floor(a) + np.floor(b)
        wave = (sums.astype(np.int32) & 1).astype(np.float32) - np.float32(0.5)
    elif kind == 3:
        wave = (a - a.min()) / max(a.max() - a.min(), np.float32(1)) - np.float32(0.5)
    else:
        wave = np.zeros_like(a)
    amplitude = rng.uniform(-depth, depth, 3).astype(np.float32)
    return colour.astype(np.float32) + wave[..., None] * amplitude


def draw(rng: np.random.Generator, size: int) -> tuple[Array, list[tuple[int, list[int], int]]]:
    """An image [size, size, 3] uint8, and for each object its class, box (x, y, w, h) and area.

    Boxes are tight around the whole shape, even if another object covers part of it; the area is
    that of the whole shape in pixels.
    """
    x, y = np.arange(size, dtype=np.float32)[None, :], np.arange(size, dtype=np.float32)[:, None]
    ground = rng.uniform(60, 180) + rng.uniform(-30, 30, 3)  # greyish
    canvas = _paint(rng, x, y, ground, 25)
    for _ in range(rng.integers(CLUTTER[0], CLUTTER[1] + 1)):  # thin strokes and specks
        long, thin = rng.uniform(2, 0.16 * size), rng.uniform(0.5, 1.2)
        stroke = _place(rng, partial(_bar, width=thin / long), long, size)
        if stroke is not None:
            canvas[stroke[0]][stroke[1]] += rng.uniform(-60, 60, 3)
    shares = np.cumsum([share for share, _, _ in SIZES])
    # The object that each pixel shows, counted from 1, and the number of pixels that show each.
    owner, visible = np.zeros((size, size), np.uint8), np.zeros(1, np.int64)
    found: list[tuple[int, list[int], int]] = []
    for _ in range(rng.integers(OBJECTS[0], OBJECTS[1] + 1)):
        kind = int(rng.integers(len(SHAPES)))
        if found and rng.random() < ALIKE:
            kind = found[0][0]
        _, low, high = SIZES[int(np.searchsorted(shares, rng.random(), side="right").clip(max=2))]
        half = rng.uniform(low, high) * size / 2
        placed = _place(rng, list(SHAPES.values())[kind], half, size)
        if placed is None:
            continue
        window, mask = placed
        hidden = np.bincount(owner[window][mask], minlength=len(visible))
        if any(
            v - h < HIDDEN * o[2] for v, h, o in zip(visible[1:], hidden[1:], found, strict=True)
        ):
            continue
        visible -= hidden
        # A mean of integers: the order in which floats are summed differs between machines.
        behind = canvas[window][mask].astype(np.int64).sum(axis=0) / mask.sum()
        colour = COLOURS[kind] + rng.uniform(-SPREAD, SPREAD, 3)
        if np.abs(colour - behind).sum() < CONTRAST:
            colour = np.where(behind < 128, behind + CONTRAST / 2, behind - CONTRAST / 2)
        canvas[window][mask] = _paint(rng, x[:, window[1]], y[window[0]], colour, 30)[mask]
        area = int(mask.sum())
        visible = np.append(visible, area)
        owner[window][mask] = len(found) + 1
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        top, side = window[0].start + rows[0], window[1].start + columns[0]
        box = [int(side), int(top), int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1]
        found.append((kind, box, area))
    canvas += rng.integers(-NOISE, NOISE + 1, (size, size, 1), dtype=np.int8)
    np.rint(canvas, out=canvas)
    return np.clip(canvas, 0, 255, out=canvas).astype(np.uint8), found


def _place(
    rng: np.random.Generator, shape: Callable[[Array, Array], Array], half: float, size: int
) -> tuple[tuple[slice, slice], Array] | None:
    """A rotated shape at a random place wholly inside the image: its window and its mask there."""
    reach = int(half * 1.42) + 1
    cx, cy = rng.uniform(reach, size - reach, 2) if size > 2 * reach else (size / 2, size / 2)
    c, s = _rotation(rng)
    x0, y0 = int(cx) - reach, int(cy) - reach
    if x0 < 0 or y0 < 0 or x0 + 2 * reach + 1 > size or y0 + 2 * reach + 1 > size:
        return None
    side = np.arange(2 * reach + 1)
    u, v = ((x0 + side - cx) / half)[None, :], ((y0 + side - cy) / half)[:, None]
    mask = shape(c * u + s * v, c * v - s * u)
    if mask.sum() < 6:
        return None
    return (slice(y0, y0 + 2 * reach + 1), slice(x0, x0 + 2 * reach + 1)), mask


def generate(folder: Path, *, train: int, val: int, size: int, seed: int) -> None:
    """Write the data set into ``folder``: images, and annotations with scaled area limits.

    ``info.area_limits``, which AP_S, AP_M and AP_L use, are `LIMITS` in pixels.
    """
    limits = [round(share * size, 2) for share in LIMITS]
    (folder / "annotations").mkdir(parents=True)
    for number, (split, count) in enumerate((("train2017", train), ("val2017", val))):
        (folder / split).mkdir()
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for i in range(count):
            pixels, objects = draw(np.random.default_rng([seed, number, i]), size)
            name = f"{i:06d}.bmp"  # noise hardly compresses; PNG would take half of the time
            Image.fromarray(pixels).save(folder / split / name)
            images.append({"id": i + 1, "file_name": name, "width": size, "height": size})
            for kind, box, area in objects:
                entry = {"id": len(annotations) + 1, "image_id": i + 1, "category_id": kind + 1}
                annotations.append({**entry, "bbox": box, "area": area, "iscrowd": 0})
        about = f"shapes, version {VERSION}, seed {seed}"
        content = {
            "info": {"description": about, "area_limits": limits},
            "images": images,
            "annotations": annotations,
            "categories": [{"id": k + 1, "name": name} for k, name in enumerate(SHAPES)],
        }
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def synthetic(*, train: int, val: int, size: int = 128, seed: int = 0) -> Path:
    """The folder of the built-in set, which is made if it does not exist.

    It is under ``$SSSD_CACHE``, else ``sssd`` in ``$XDG_CACHE_HOME`` or ``~/.cache``. Several
    processes may ask for it at once.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "sssd")
    cache = Path(os.environ.get("SSSD_CACHE") or base).expanduser()
    folder = cache / f"shapes-v{VERSION}-{train}-{val}-{size}px-seed{seed}"
    cache.mkdir(parents=True, exist_ok=True)
    with (
        FileLock(cache / f"{folder.name}.lock"),
        tempfile.TemporaryDirectory(dir=cache, prefix=f".{folder.name}.") as part,
    ):
        if not folder.exists():
            generate(Path(part, "made"), train=train, val=val, size=size, seed=seed)
            os.replace(Path(part, "made"), folder)
    return folder
