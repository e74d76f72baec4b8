"""COCO-format data sets: one split of them, and training batches as a function of (seed, t)."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import reprlib
import unicodedata
import warnings
from collections import Counter
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import numpy as np
import torch
from PIL import Image, ImageOps
from pycocotools.coco import COCO
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    FiniteFloat,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
)
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.ops import roi_align

Target = dict[str, Any]

MIN_SIDE = 0.1
"""A box is a target only if each of its sides has at least this many pixels inside the image."""
CACHE_BYTES = 256 * 2**20
"""Decoded images of a split are kept in memory if all together take no more than this."""
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP", "JPEG2000")
"""The image formats that are opened. PIL knows more; for EPS it would start another program."""
LONGEST = 1e5
"""The square root of the largest object area that pycocotools counts, in pixels."""
ORIENTATION = 0x0112
"""EXIF's tag for the orientation in which viewers show an image; value 1: as it is stored."""

# --- the fields of an annotation file that are read; others, such as segmentations, are ignored ---


def _rising(limits: tuple[float, float]) -> tuple[float, float]:
    if not limits[0] < limits[1] <= LONGEST:
        raise ValueError(f"expected two rising lengths of at most {LONGEST:g} pixels")
    return limits


_Box = Annotated[
    tuple[FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat],  # x, y, width, height
    BeforeValidator(lambda box: (0, 0, 0, 0) if box in (None, []) else box),
]


@dataclass(slots=True)
class _Image:
    id: int
    file_name: Annotated[str, Field(coerce_numbers_to_str=True, pattern=r"^[^\x00]+$")]
    width: PositiveInt
    height: PositiveInt

    def __post_init__(self) -> None:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 2**62)
        if self.width * self.height > most:
            what = f"it has {self.width} × {self.height} pixels"
            raise ValueError(f"{what}; expected at most {most / 1e6:.0f} million, as PIL reads")


@dataclass(slots=True)
class _Annotation:
    image_id: int
    category_id: int
    bbox: _Box
    area: FiniteFloat | None = None
    iscrowd: bool | None = False


@dataclass(slots=True)
class _Category:
    id: Annotated[int, Field(ge=-(2**63), lt=2**63)]
    name: Annotated[str, Field(coerce_numbers_to_str=True)] | None = None


@dataclass(slots=True)
class _Info:
    area_limits: Annotated[tuple[PositiveFloat, PositiveFloat], AfterValidator(_rising)] | None = (
        None
    )


@dataclass(slots=True)
class _File:
    images: list[_Image]
    annotations: list[_Annotation] | None
    categories: list[_Category]
    info: Annotated[  # any value is allowed; only an object can have the field that is read
        _Info | None, BeforeValidator(lambda info: info if isinstance(info, dict) else None)
    ] = None


_ADAPTER = TypeAdapter(_File)
_POLYGONS = re.compile(rb'"segmentation"\s*:\s*\[[^"{}]*\]')


def _read(annotations: Path) -> _File:
    try:
        content = annotations.read_bytes()
        if (encoding := json.detect_encoding(content)) != "utf-8":  # a byte order mark, or UTF-16
            content = content.decode(encoding).encode()
        try:  # without polygons, which are three quarters of COCO's file and would take gigabytes
            return _ADAPTER.validate_json(_POLYGONS.sub(b'"segmentation":0', content))
        except ValidationError:
            return _ADAPTER.validate_json(content)  # so that the message gives the right place
    except OSError as error:
        what = f"cannot be read: {error.strerror}"
    except UnicodeDecodeError as error:
        what = f"is not COCO's format: not {error.encoding} from byte {error.start} on"
    except ValidationError as error:
        fault = error.errors()[0]
        where = "".join(f"[{x}]" if isinstance(x, int) else f".{x}" for x in fault["loc"])
        value = f" is {reprlib.repr(fault['input'])}, which"
        value = value if where and fault["type"] != "missing" else ""
        what = f"{where.lstrip('.')}{value} is not COCO's format: {fault['msg']}".strip()
    raise ValueError(f"{annotations}: {what}")


def find_split(root: Path, split: Literal["train", "val"]) -> tuple[Path, Path]:
    """The image folder and the annotation file of one split under ``root``.

    Raises:
        ValueError: there is neither COCO's name for the split, nor the same without the year.
    """
    for name in (f"{split}2017", split):
        images, annotations = root / name, root / "annotations" / f"instances_{name}.json"
        if os.path.isdir(images) and os.path.isfile(annotations):  # also safe for impossible names
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
    file's categories are matched to them by name and id, or by a name that is unique in both, and
    get their ids; a category without a match may be declared but not used.

    For all images together there are ``sizes`` [I, 2] (width, height), ``objects`` [I] (number of
    targets), and, image after image, ``boxes`` [T, 4] and ``labels`` [T] of all targets.

    Targets leave out crowd regions and degenerate boxes (a side below `MIN_SIDE` after clipping;
    one warning counts them). `coco`, which evaluation uses, keeps both, as pycocotools does: a
    crowd region absorbs detections, and an object without size is never found.
    With ``training``, images without a target are left out.

    ``image_ids`` are the file's own, or 1, 2, … in their order if one of them has more than 63
    bits; `file_image_id` and `file_category_ids` give the file's ids.

    Images are read as stored, without EXIF's rotation, because COCO's boxes, widths and heights are
    those of the stored image. If the file has the turned image's width and height, that is read.

    Raises:
        ValueError: the file is not COCO's format, an image is not in its folder or too large for
            PIL, an annotation is of none of the ``classes``, or (on access) an image cannot be read
            or does not have the size that the file gives.
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
        images_by_id = self._by_id("images", file.images)
        self._file_classes = {
            id: " ".join((category.name or "").split()) or str(id)
            for id, category in self._by_id("categories", file.categories).items()
        }
        self.classes = dict(classes or self._file_classes)
        self._class_of = _match(self._file_classes, self.classes)
        self.file_category_ids = {known: id for id, known in self._class_of.items()}
        self.category_ids, self.class_names = list(self.classes), unique_names(self.classes)
        self.area_limits = (file.info and file.info.area_limits) or (32.0, 96.0)
        """The limits of small, medium and large, as sides of squares in pixels; default: COCO's."""

        # Flat arrays from here on: loader workers share them, while a million small Python objects
        # would be copied into each worker as soon as their reference counts change.
        ids, entries = list(images_by_id), images_by_id.values()
        self._file_image_ids = None if ids[0] >= -(2**63) and ids[-1] < 2**63 else ids
        numbers = ids if self._file_image_ids is None else range(1, len(ids) + 1)
        self.image_ids = np.array(numbers, np.int64)
        self._files = np.array([image.file_name for image in entries])
        self.sizes = np.array([(image.width, image.height) for image in entries])
        self._take_boxes(file.annotations or [], {id: i for i, id in enumerate(ids)}, training)
        self._check_presence()
        self._cache: dict[int, Tensor] = {}
        self._cached = bool(3 * self.sizes.prod(axis=1).sum() <= CACHE_BYTES)
        self._warned = False

    def _by_id(self, name: str, entries: list[Any]) -> dict[int, Any]:
        by_id = {entry.id: entry for entry in sorted(entries, key=lambda entry: entry.id)}
        if not by_id or len(by_id) < len(entries):
            self._refuse(f"{name} is empty or has an id twice; expected one entry per id")
        return by_id

    def _check_ids(self, annotations: list[_Annotation], index: Mapping[int, int]) -> None:
        """Refuse an annotation whose image or category is unknown, or whose category training lacks."""
        for i, entry in enumerate(annotations):
            image_id, id = entry.image_id, entry.category_id
            if image_id not in index:
                self._refuse(f"annotations[{i}].image_id is {image_id}, not defined in the file")
            if id not in self._file_classes:
                self._refuse(f"annotations[{i}].category_id is {id}, not defined in the file")
            if id not in self._class_of:
                named = f"{id} {self._file_classes[id]}"
                self._refuse(
                    f"annotations[{i}] is of category {named}, which training lacks; training has "
                    f"{_listed(self.classes)}; this file has {_listed(self._file_classes)}"
                )

    def _take_boxes(
        self, annotations: list[_Annotation], index: Mapping[int, int], training: bool
    ) -> None:
        """Set the targets of each image; with ``training`` keep only images that have any."""
        self._check_ids(annotations, index)
        image = np.array([index[entry.image_id] for entry in annotations], np.int64)
        category = np.array([self._class_of[entry.category_id] for entry in annotations], np.int64)
        given = np.array([entry.bbox for entry in annotations], float).reshape(-1, 4)
        crowd = np.array([entry.iscrowd for entry in annotations], bool)
        area = np.array([entry.area for entry in annotations], float)  # NaN: not given
        with np.errstate(over="ignore"):  # values out of range are clipped
            area = np.where(np.isnan(area), given[:, 2] * given[:, 3], area)
            boxes = np.concatenate([given[:, :2], given[:, 2:] + given[:, :2]], axis=1)
        self._truth = {
            "image_id": self.image_ids[image],
            "category_id": category,
            "bbox": given,
            "area": area,
            "iscrowd": crowd.astype(np.int8),
        }

        boxes = boxes.clip(0, np.tile(self.sizes[image], 2)).astype(np.float32)
        visible = (boxes[:, 2:] - boxes[:, :2] >= MIN_SIDE).all(axis=1)
        if degenerate := int((~visible & ~crowd).sum()):
            why = f"a side below {MIN_SIDE} px inside the image"
            message = f"degenerate boxes dropped from the targets ({why}): {degenerate}"
            warnings.warn(f"{self.annotations}: {message}", stacklevel=4)
        usable = np.flatnonzero(visible & ~crowd)
        usable = usable[np.argsort(image[usable], kind="stable")]
        number = {id: n for n, id in enumerate(self.category_ids, start=1)}
        self.labels = np.array([number[id] for id in category[usable].tolist()], np.int64)
        self.boxes, counts = boxes[usable], np.bincount(image[usable], minlength=len(index))
        if training:
            kept = counts > 0
            if not kept.any():
                self._refuse("no image has a usable box; expected one at least for training")
            self.image_ids, self._files = self.image_ids[kept], self._files[kept]
            self.sizes, counts = self.sizes[kept], counts[kept]
        self._offsets = np.concatenate([[0], np.cumsum(counts)])

    def _check_presence(self) -> None:
        """Find every image by listing each folder once; its pixels are checked when it is read."""
        listed: dict[str, set[str]] = {}
        missing, files = [], self._files.tolist()
        for i, given in enumerate(files):
            # Exporters on Windows write backslashes; elsewhere these may be part of a name. An é is
            # one character or two, depending on the system that packed the images.
            names = [given, given.replace("\\", "/")]
            names += [unicodedata.normalize(form, names[1]) for form in ("NFC", "NFD")]
            for name in dict.fromkeys(names):
                folder, last = os.path.split(self.images / name)
                if folder not in listed:
                    listed[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
                if last in listed[folder]:
                    files[i] = name
                    break
            else:
                missing.append(f"image {self.image_ids[i]} ({self.images / given})")
        if missing:
            more = f"; {len(missing) - 1} more missing" if missing[1:] else ""
            self._refuse(f"{missing[0]} is not there{more}")
        self._files = np.array(files)

    @property
    def objects(self) -> np.ndarray:
        """The number of targets of each image."""
        return np.diff(self._offsets)

    @property
    def narrowest(self) -> tuple[str, int, int]:
        """Name, width and height of the image with the largest aspect ratio."""
        i = int((self.sizes.max(axis=1) / self.sizes.min(axis=1)).argmax())
        width, height = self.sizes[i].tolist()
        return str(self._files[i]), width, height

    @property
    def crowds(self) -> int:
        """The number of crowd regions."""
        return int(self._truth["iscrowd"].sum())

    def file_image_id(self, image_id: int) -> int:
        """The file's id of the image that ``image_ids`` may list under another."""
        return self._file_image_ids[image_id - 1] if self._file_image_ids else image_id

    @cached_property
    def coco(self) -> COCO:
        """The ground truth for pycocotools, made when first used.

        Annotations are numbered from 1 (for pycocotools an id of 0 means "not matched"). A missing
        ``area`` is that of the box, a missing ``iscrowd`` is 0. Segmentations are left out.
        """
        rows = zip(*(column.tolist() for column in self._truth.values()), strict=True)
        coco = COCO()
        coco.dataset = {
            "info": {},
            "images": [{"id": id} for id in self.image_ids.tolist()],
            "categories": [{"id": id, "name": name} for id, name in self.classes.items()],
            "annotations": [
                {"id": n, **dict(zip(self._truth, row, strict=True))}
                for n, row in enumerate(rows, start=1)
            ],
        }
        with redirect_stdout(io.StringIO()):
            coco.createIndex()
        return coco

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, i: int) -> tuple[Tensor, Target]:
        targets = slice(self._offsets[i], self._offsets[i + 1])
        image = self._cache.get(i)
        if image is None:
            image = self._decode(i)
            if self._cached:
                self._cache[i] = image
        return image.float() / 255, {
            "boxes": torch.tensor(self.boxes[targets]),
            "labels": torch.tensor(self.labels[targets]),
            "image_id": int(self.image_ids[i]),
        }

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name != "coco"}
        return {**state, "_cache": {}}  # each worker fills its own

    def _decode(self, i: int) -> Tensor:
        path = self.images / str(self._files[i])
        entry = f"image {int(self.image_ids[i])} ({path})"
        expected = tuple(self.sizes[i].tolist())
        try:
            with Image.open(path, formats=FORMATS) as file:
                stored, orientation = file.size, file.getexif().get(ORIENTATION, 1)
                turned = stored[::-1] if orientation in (5, 6, 7, 8) else stored
                turn = expected == turned != stored
                image: Image.Image = ImageOps.exif_transpose(file) if turn else file
                mode, pixels = image.mode, rgb(image)
        except Image.UnidentifiedImageError:
            self._refuse(f"{entry} cannot be read: expected one of {', '.join(FORMATS)}")
        except Exception as error:  # PIL's decoders raise many kinds of errors on broken files
            why = getattr(error, "strerror", None) or str(error) or type(error).__name__
            self._refuse(f"{entry} cannot be read: {why}")
        if mode == "F":
            self._refuse(f"{entry} holds floating-point pixels; expected 8 or 16 bits")
        exif = f"its EXIF orientation {orientation}"
        if pixels.shape[:2] != expected[::-1]:
            seen = f", {turned[0]} × {turned[1]} as {exif} turns it" if turned != stored else ""
            size = f"{stored[0]} × {stored[1]} pixels{seen}"
            self._refuse(f"{entry} has {size}; expected {expected[0]} × {expected[1]}")
        if orientation in range(2, 9) and turned == stored and not self._warned:
            self._warned = True
            what = f"{entry} is read as stored, though {exif} turns or mirrors it in viewers"
            how = "check that its boxes are where they should be (said once)"
            warnings.warn(f"{self.annotations}: {what}; {how}", stacklevel=3)
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()

    def _refuse(self, what: str) -> NoReturn:
        raise ValueError(f"{self.annotations}: {what}") from None


def rgb(image: Image.Image) -> np.ndarray:
    """The pixels of an image, uint8 [H, W, 3]."""
    if image.mode.startswith("I"):  # 16-bit grey, which PIL would clip at 255
        grey = np.asarray(image).astype(np.int64).clip(0, 65535) >> 8
        return np.repeat(grey[..., None], 3, axis=2).astype(np.uint8)
    return np.array(image.convert("RGB"))


class Batches(Dataset[tuple[list[Tensor], list[Target]]]):
    """Batch ``t`` (1..iterations) of a training run, as a pure function of (seed, t).

    Each epoch is a permutation of the images drawn from (seed, epoch); a batch may contain the end
    of one epoch and the beginning of the next. Whether slot ``s`` of batch ``t`` is flipped depends
    on (seed, t, s). Process ``rank`` of ``world`` has the slots rank, rank + world, …: together the
    processes have the batch of a single process. Any first batch and any number of loader workers
    give the same batches:
    ``DataLoader(batches, sampler=range(start, end), batch_size=None, num_workers=n)``.

    With ``aspect_grouping``, slots s and s + batch_size/2 have two images that are both wide or both
    tall, so that little is padded, as LGD's release pairs the two images of a GPU. An image waits
    for the next one of its shape in the order above. A pair is on one process if the number of
    processes divides batch_size/2.
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
        aspect_grouping: bool = False,
    ) -> None:
        self.split, self.batch_size = split, batch_size
        self.seed, self.iterations = seed, iterations
        self.slots, self.flip = range(rank, batch_size, world), flip
        self.aspect_grouping = aspect_grouping
        if aspect_grouping:  # before loader workers are forked, so that they share the pairs
            self._pairs = self._all_pairs()

    def _all_pairs(self) -> np.ndarray:
        """The pairs of the whole training, [iterations · batch_size/2, 2], by image number."""
        wanted, images = self.iterations * self.batch_size // 2, len(self.split)
        epochs = range(-(-(2 * wanted + 2) // images))  # of each shape one image may stay alone
        stream = np.concatenate([_permutation(self.seed, e, images) for e in epochs])
        widths, heights = self.split.sizes[stream].T
        shapes = [np.flatnonzero(widths > heights), np.flatnonzero(widths <= heights)]
        places = np.concatenate([x[: len(x) // 2 * 2].reshape(-1, 2) for x in shapes])
        return stream[places[places[:, 1].argsort()[:wanted]]]  # in the order of the second images

    def _image(self, t: int, slot: int) -> int:
        """The number of the image in a slot of batch ``t``."""
        if self.aspect_grouping:
            half = self.batch_size // 2
            return int(self._pairs[(t - 1) * half + slot % half, slot // half])
        epoch, place = divmod((t - 1) * self.batch_size + slot, len(self.split))
        return int(_permutation(self.seed, epoch, len(self.split))[place])

    def __getitem__(self, t: int) -> tuple[list[Tensor], list[Target]]:
        """This process's images, each [3, H, W], and their targets."""
        images, targets = [], []
        for slot in self.slots:
            image, target = self.split[self._image(t, slot)]
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


def _listed(classes: Mapping[int, str]) -> str:
    return ", ".join(f"{id} {name}" for id, name in classes.items())


def _match(categories: Mapping[int, str], classes: Mapping[int, str]) -> dict[int, int]:
    """For each of a file's categories that is one of the ``classes``, the id of that class.

    A category also matches a class whose name is what `unique_names` makes of the category's.
    """
    matched, times = {}, Counter(categories.values())
    ids: dict[str, list[int]] = {}
    for class_id, name in classes.items():
        ids.setdefault(name, []).append(class_id)
    for id, name in categories.items():
        equal, unique = ids.get(name, []), ids.get(f"{name} ({id})", [])
        candidates = equal + unique
        if id in candidates:
            matched[id] = id
        elif len(candidates) == 1 and (times[name] == 1 or not equal):
            matched[id] = candidates[0]
    return matched


def unique_names(classes: Mapping[int, str]) -> list[str]:
    """The classes' names; equal ones are followed by their ids, as per-class results go by name."""
    times = Counter(classes.values())
    unique = [name if times[name] == 1 else f"{name} ({id})" for id, name in classes.items()]
    if len(set(unique)) < len(unique):  # another class already has such a name
        return [f"{name} ({id})" for id, name in classes.items()]
    return unique


def mixed_seed(*parts: int) -> int:
    """A seed that differs for each tuple of integers, and is the same on every machine."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


CROP_SIZE = 64


class Crops(Dataset):
    """Batch ``t`` of object crops, float32 [3, 64, 64], with their classes, from (seed, t).

    The side of a crop, a square, is 1 to 2 times the object's longer side. Its centre differs from
    the object's by up to an eighth of the crop's side in x and in y.
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
