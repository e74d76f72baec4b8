"""COCO-format data sets: a split of one, and training batches as a function of (seed, t)."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import torch
from PIL import Image
from pycocotools.coco import COCO
from pydantic import FiniteFloat, PositiveFloat, PositiveInt, TypeAdapter, ValidationError
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.ops import roi_align

Target = dict[str, Any]

MIN_SIDE = 0.1
"""Shortest side of a box, in pixels inside the image, that is used as a target."""
CACHE_BYTES = 256 * 2**20
"""A split whose decoded images take no more than this is kept in memory."""


@dataclass(slots=True)
class _Image:
    id: int
    file_name: str
    width: PositiveInt
    height: PositiveInt


@dataclass(slots=True)
class _Annotation:
    image_id: int
    category_id: int
    bbox: tuple[FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat]  # x, y, width, height
    area: FiniteFloat | None = None
    iscrowd: bool = False


@dataclass(slots=True)
class _Category:
    id: int
    name: str | None = None


@dataclass(slots=True)
class _Info:
    area_limits: tuple[PositiveFloat, PositiveFloat] = (32.0, 96.0)  # COCO's


@dataclass(slots=True)
class _File:
    """What is read of an annotation file; other fields, such as segmentations, are ignored."""

    images: list[_Image]
    annotations: list[_Annotation]
    categories: list[_Category]
    info: _Info | None = None


_FORMAT = TypeAdapter(_File)


def find_split(root: Path, split: Literal["train", "val"]) -> tuple[Path, Path]:
    """The image folder and the annotation file of one split under ``root``.

    Raises:
        ValueError: neither COCO's own names nor the same without the year are there.
    """
    for name in (f"{split}2017", split):
        images, annotations = root / name, root / "annotations" / f"instances_{name}.json"
        if images.is_dir() and annotations.is_file():
            return images, annotations
    raise ValueError(
        f"data root {str(root)!r} has no {split} split; expected "
        f"annotations/instances_{split}2017.json with {split}2017/, "
        f"or annotations/instances_{split}.json with {split}/"
    )


def fingerprint(annotations: Path) -> str:
    """``sha256:`` and 16 hex digits of the annotation file's bytes (the images are not read)."""
    with open(annotations, "rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"


class CocoSplit(Dataset[tuple[Tensor, Target]]):
    """The images of one annotation file, by rising image id, with their boxes as targets.

    Item ``i`` is an image, float32 [3, H, W], RGB in [0, 1], and a target: ``boxes`` float32
    [T, 4] as (x1, y1, x2, y2) in pixels, ``labels`` int64 [T] in 1..K, ``image_id`` int. Label
    ``n`` stands for ``category_ids[n - 1]``.

    ``classes`` are the K categories of the training set, name by id; default: the file's own. The
    file's categories are matched to them by name and id, or by a name that both have once, and take
    their ids; one that has no match may be declared but not used.

    Targets leave out crowd regions and degenerate boxes (a side below `MIN_SIDE` after clipping;
    one warning counts them). `coco`, which evaluation uses, keeps both, as pycocotools does: a
    crowd region absorbs detections, and an object without size is never found.
    With ``training``, images without a target are left out.

    Images are read as stored, without EXIF's rotation: COCO's boxes, widths and heights refer to
    stored pixels.

    Raises:
        ValueError: the file is not COCO's format, an annotation is of none of the ``classes``, or
            (on access) an image cannot be read or has another size than the file says.
    """

    def __init__(
        self,
        images: Path,
        annotations: Path,
        training: bool,
        classes: Mapping[int, str] | None = None,
    ) -> None:
        self.images, self.annotations = Path(images), Path(annotations)
        file = _read(self.annotations)
        self.image_ids, order = self._unique_ids("images", file.images)
        ids, first = self._unique_ids("categories", file.categories)
        names = [file.categories[i].name or str(file.categories[i].id) for i in first]
        own = dict(zip(ids.tolist(), names, strict=True))
        self.classes = dict(classes or own)
        self._class_of = _match(own, self.classes)
        self.category_ids, names = list(self.classes), list(self.classes.values())
        self.class_names = [  # per-class results go by name, so a name must be unique
            name if names.count(name) == 1 else f"{name} ({number})"
            for name, number in zip(names, self.category_ids, strict=True)
        ]
        self.area_limits = (file.info or _Info()).area_limits
        if self.area_limits[0] >= self.area_limits[1]:
            self._refuse(f"info.area_limits is {self.area_limits}; expected two rising lengths")

        # Flat arrays from here on: loader workers share them, while a million small Python objects
        # would be copied into each worker as soon as their reference counts are touched.
        self._files = np.array([image.file_name.encode() for image in file.images])[order]
        self._sizes = np.array([(image.width, image.height) for image in file.images])[order]
        image = _locate(self.image_ids, [entry.image_id for entry in file.annotations])
        label_of = {id: self.category_ids.index(c) + 1 for id, c in self._class_of.items()}
        label = np.array([label_of.get(entry.category_id, 0) for entry in file.annotations], int)
        for i in np.flatnonzero((image < 0) | (label < 1))[:1]:
            field = "image_id" if image[i] < 0 else "category_id"
            value = getattr(file.annotations[i], field)
            if field == "image_id" or value not in own:
                self._refuse(f"annotations[{i}].{field} is {value}, which the file does not define")
            here, there = (", ".join(f"{i} {n}" for i, n in x.items()) for x in (own, self.classes))
            what = f"annotations[{i}] is of category {value} {own[value]}, which training lacks"
            self._refuse(f"{what}; training has {there}; this file has {here}")
        boxes = np.array([entry.bbox for entry in file.annotations]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        boxes = boxes.clip(0, np.tile(self._sizes[image], 2)).astype(np.float32)
        crowd = np.array([entry.iscrowd for entry in file.annotations], bool)
        visible = (boxes[:, 2:] - boxes[:, :2] >= MIN_SIDE).all(axis=1)
        if degenerate := int((~visible & ~crowd).sum()):
            why = f"a side below {MIN_SIDE} px inside the image"
            message = f"degenerate boxes dropped from the targets ({why}): {degenerate}"
            warnings.warn(f"{self.annotations}: {message}", stacklevel=2)
        usable = np.flatnonzero(visible & ~crowd)
        usable = usable[np.argsort(image[usable], kind="stable")]
        self._boxes, self._labels = boxes[usable], label[usable]
        counts = np.bincount(image[usable], minlength=len(order))
        if training:
            kept = counts > 0
            if not kept.any():
                self._refuse("no image has a usable box; expected one at least for training")
            self.image_ids, self._files = self.image_ids[kept], self._files[kept]
            self._sizes, counts = self._sizes[kept], counts[kept]
        self._offsets = np.concatenate([[0], np.cumsum(counts)])
        self._cache: dict[int, Tensor] = {}
        self._cached = bool(3 * self._sizes.prod(axis=1).sum() <= CACHE_BYTES)

    @cached_property
    def coco(self) -> COCO:
        """The ground truth for pycocotools, made when first used, as that reads the whole file.

        Annotations are numbered from 1 (pycocotools takes the id 0 for "not matched"); a missing
        ``area`` is the box's and a missing ``iscrowd`` is 0. Segmentations are left out.
        """
        data = _FORMAT.dump_python(_read(self.annotations))
        data["categories"] = [{"id": id, "name": name} for id, name in self.classes.items()]
        for number, entry in enumerate(data["annotations"], start=1):
            if entry["area"] is None:
                entry["area"] = entry["bbox"][2] * entry["bbox"][3]
            entry |= {"id": number, "bbox": list(entry["bbox"]), "iscrowd": int(entry["iscrowd"])}
            entry["category_id"] = self._class_of[entry["category_id"]]
        coco = COCO()
        coco.dataset = data
        with redirect_stdout(io.StringIO()):
            coco.createIndex()
        return coco

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, i: int) -> tuple[Tensor, Target]:
        if not 0 <= i < len(self):
            raise IndexError(f"image {i} of {len(self)}")
        image = self._cache.get(i)
        if image is None:
            image = self._decode(i)
            if self._cached:
                self._cache[i] = image
        own = slice(self._offsets[i], self._offsets[i + 1])
        return image.float() / 255, {
            "boxes": torch.tensor(self._boxes[own]),
            "labels": torch.tensor(self._labels[own]),
            "image_id": int(self.image_ids[i]),
        }

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name != "coco"}
        return {**state, "_cache": {}}  # workers fill their own

    def _decode(self, i: int) -> Tensor:
        path = self.images / self._files[i].decode()
        entry = f"image {int(self.image_ids[i])} ({path})"
        try:
            with Image.open(path) as image:
                if image.mode == "F":
                    self._refuse(f"{entry} holds floating-point pixels; expected 8 or 16 bits")
                if image.mode.startswith("I"):  # 16-bit grey, which PIL would cut off at 255
                    grey = np.asarray(image).astype(np.int64).clip(0, 65535) >> 8
                    pixels = np.repeat(grey[..., None], 3, axis=2).astype(np.uint8)
                else:
                    pixels = np.array(image.convert("RGB"))
        except (OSError, SyntaxError) as error:  # PIL reports some broken files as SyntaxError
            self._refuse(f"{entry} cannot be read: {getattr(error, 'strerror', None) or error}")
        width, height = self._sizes[i].tolist()
        if pixels.shape[:2] != (height, width):
            stored = f"{pixels.shape[1]} × {pixels.shape[0]}"
            self._refuse(f"{entry} has {stored} pixels; expected {width} × {height}")
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()

    def _refuse(self, what: str) -> NoReturn:
        raise ValueError(f"{self.annotations}: {what}") from None

    def _unique_ids(self, name: str, entries: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
        """The ids, int64, rising, and the position of each in ``entries``."""
        ids, order = np.unique(np.array([e.id for e in entries], np.int64), return_index=True)
        if not len(ids) or len(ids) < len(entries):
            self._refuse(f"{name} is empty or has an id twice; expected one entry per id")
        return ids, order


class Batches(Dataset[tuple[list[Tensor], list[Target]]]):
    """Batch ``t`` (1..iterations) of a training run, as a pure function of (seed, t).

    Each epoch is a permutation of the images drawn from (seed, epoch); a batch may hold the end of
    one epoch and the beginning of the next. Whether slot ``s`` of batch ``t`` is flipped depends on
    (seed, t, s). Process ``rank`` of ``world`` has the slots rank, rank + world, …, so that together
    they have the batch of a single process. Any first batch and any number of loader workers give
    the same batches:
    ``DataLoader(batches, sampler=range(start, end), batch_size=None, num_workers=n)``.

    Raises:
        ValueError: ``batch_size`` is not a positive multiple of ``world``.
    """

    def __init__(
        self,
        split: CocoSplit,
        batch_size: int,
        seed: int,
        iterations: int,
        rank: int = 0,
        world: int = 1,
        flip: float = 0.5,
    ) -> None:
        if batch_size < 1 or batch_size % world:
            raise ValueError(f"batch_size: {batch_size}; expected a multiple of {world} processes")
        self.split, self.batch_size = split, batch_size
        self.seed, self.iterations = seed, iterations
        self.slots = range(rank, batch_size, world)
        self.flip = flip

    def __len__(self) -> int:
        return self.iterations

    def __getitem__(self, t: int) -> tuple[list[Tensor], list[Target]]:
        """This process's images, each [3, H, W], and their targets.

        Raises:
            IndexError: ``t`` is not in 1..iterations.
        """
        if not 1 <= t <= self.iterations:
            raise IndexError(f"batch {t}; expected 1 to {self.iterations}")
        images, targets = [], []
        for slot in self.slots:
            epoch, place = divmod((t - 1) * self.batch_size + slot, len(self.split))
            image, target = self.split[int(_permutation(self.seed, epoch, len(self.split))[place])]
            if np.random.default_rng([1, self.seed, t, slot]).random() < self.flip:
                x1, y1, x2, y2 = target["boxes"].unbind(1)
                width = image.shape[-1]
                target["boxes"] = torch.stack([width - x2, y1, width - x1, y2], dim=1)
                image = image.flip(-1)
            images.append(image)
            targets.append(target)
        return images, targets


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, images: int) -> np.ndarray:
    return np.random.default_rng([0, seed, epoch]).permutation(images)


def _match(own: Mapping[int, str], classes: Mapping[int, str]) -> dict[int, int]:
    """The class's id of each of a file's categories that is one of the classes."""
    matched, names = {}, list(own.values())
    for id, name in own.items():
        same = [c for c, known in classes.items() if known == name]
        if id in same:
            matched[id] = id
        elif len(same) == 1 and names.count(name) == 1:
            matched[id] = same[0]
    return matched


def _locate(known: np.ndarray, wanted: list[int]) -> np.ndarray:
    """The index in the sorted, non-empty ``known`` of each ``wanted``; −1 where there is none."""
    index = np.searchsorted(known, wanted).clip(max=len(known) - 1)
    return np.where(known[index] == wanted, index, -1)


def _read(annotations: Path) -> _File:
    try:
        return _FORMAT.validate_json(annotations.read_bytes())
    except OSError as error:
        raise ValueError(f"{annotations}: cannot be read: {error.strerror}") from None
    except ValidationError as error:
        fault = error.errors()[0]
        where = "".join(f"[{x}]" if isinstance(x, int) else f".{x}" for x in fault["loc"])
        what = f"{where.lstrip('.')} is not COCO's format: {fault['msg']}".strip()
        raise ValueError(f"{annotations}: {what}") from None


def mixed_seed(*parts: int) -> int:
    """A seed that differs for every tuple of integers, the same on every machine."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


CROP_SIZE = 64


class Crops(Dataset):
    """Batch ``t`` of crops of objects, float32 [3, 64, 64], with their classes, by (seed, t).

    A crop is a square whose side is 1 to 2 times the object's longer side. Its centre is off the
    object's by up to an eighth of that side in x and in y.
    """

    def __init__(self, split: CocoSplit, batch_size: int, seed: int) -> None:
        self.split, self.batch_size, self.seed = split, batch_size, seed

    def __getitem__(self, t: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        draw = torch.Generator().manual_seed(mixed_seed(self.seed, t))
        crops, targets = [], []
        for _ in range(self.batch_size):
            image, target = self.split[int(torch.randint(len(self.split), (), generator=draw))]
            k = int(torch.randint(len(target["boxes"]), (), generator=draw))
            x1, y1, x2, y2 = target["boxes"][k].tolist()
            grow, dx, dy, mirror = torch.rand(4, generator=draw).tolist()
            side = max(x2 - x1, y2 - y1) * (1 + grow)
            x = (x1 + x2) / 2 + (dx - 0.5) * side / 4
            y = (y1 + y2) / 2 + (dy - 0.5) * side / 4
            square = torch.tensor([[0, x - side / 2, y - side / 2, x + side / 2, y + side / 2]])
            crop = roi_align(image[None], square, CROP_SIZE, sampling_ratio=2, aligned=True)[0]
            crops.append(crop.flip(-1) if mirror < 0.5 else crop)
            targets.append({"labels": target["labels"][k]})
        return crops, targets
