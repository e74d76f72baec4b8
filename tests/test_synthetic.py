"""The built-in set: the same on every machine, tight, valid for pycocotools, made once."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO

from sssd.data import synthetic as module
from sssd.data.synthetic import SHAPES, draw, generate, synthetic


def digest(seed: int, split: int, count: int) -> str:
    seen = hashlib.sha256()
    for i in range(count):
        pixels, objects = draw(np.random.default_rng([seed, split, i]), 128)
        seen.update(pixels.tobytes())
        seen.update(repr(objects).encode())
    return seen.hexdigest()[:16]


def test_pixels_and_annotations_are_pinned() -> None:
    """Fails where another machine, or a change of the code, makes other images: raise VERSION."""
    assert (module.VERSION, digest(0, 0, 20)) == (4, "f68ddfe9b9455d4e")


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(48, 160))
def test_boxes_lie_inside_and_hold_their_area(seed: int, size: int) -> None:
    pixels, objects = draw(np.random.default_rng(seed), size)
    assert pixels.shape == (size, size, 3) and pixels.dtype == np.uint8
    for kind, (x, y, w, h), area in objects:
        assert 0 <= kind < len(SHAPES)
        assert x >= 0 and y >= 0 and x + w <= size and y + h <= size
        assert 0 < area <= w * h
    assert objects == draw(np.random.default_rng(seed), size)[1]


def test_boxes_are_tight_on_what_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone on a plain ground without noise, an object is just what differs from the ground."""
    monkeypatch.setattr(module, "NOISE", 0)
    monkeypatch.setattr(module, "CLUTTER", (0, 0))
    monkeypatch.setattr(module, "OBJECTS", (1, 1))
    paint = module._paint
    monkeypatch.setattr(
        module, "_paint", lambda rng, x, y, colour, depth: paint(rng, x, y, colour, 0.0)
    )
    found = 0
    for seed in range(40):
        pixels, objects = draw(np.random.default_rng(seed), 96)
        corner = pixels[0, 0]
        rows, columns = np.nonzero((pixels != corner).any(axis=2))
        for _, (x, y, w, h), area in objects:
            assert (columns.min(), rows.min()) == (x, y)
            assert (columns.max() + 1, rows.max() + 1) == (x + w, y + h)
            assert len(rows) == area
            found += 1
    assert found > 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSSD_CACHE", str(tmp_path_factory.mktemp("cache")))
        return synthetic(train=120, val=12)


def test_it_is_a_coco_data_set(folder: Path) -> None:
    for split, count in (("train2017", 120), ("val2017", 12)):
        coco = COCO(folder / "annotations" / f"instances_{split}.json")
        assert len(coco.imgs) == count
        assert [c["name"] for c in coco.dataset["categories"]] == list(SHAPES)
        for image in coco.imgs.values():
            with Image.open(folder / split / image["file_name"]) as opened:
                assert opened.size == (image["width"], image["height"]) == (128, 128)


def test_sizes_classes_and_limits(folder: Path) -> None:
    content = json.loads((folder / "annotations" / "instances_train2017.json").read_text())
    low, high = content["info"]["area_limits"]
    assert (low, high) == (19.2, 44.8)
    areas = np.array([a["area"] for a in content["annotations"]])
    shares = [(areas < low**2).mean(), (areas >= high**2).mean()]
    assert 0.15 < shares[0] < 0.3 and 0.1 < shares[1] < 0.25
    assert {a["category_id"] for a in content["annotations"]} == set(range(1, 9))


def test_a_larger_set_begins_with_the_smaller(folder: Path, tmp_path: Path) -> None:
    generate(tmp_path / "small", train=3, val=2, size=128, seed=0)
    for split, count in (("train2017", 3), ("val2017", 2)):
        for i in range(count):
            name = f"{split}/{i:06d}.bmp"
            assert (tmp_path / "small" / name).read_bytes() == (folder / name).read_bytes()
    first, second = (folder / f"{s}2017" / "000000.bmp" for s in ("train", "val"))
    assert first.read_bytes() != second.read_bytes()


def test_made_once_and_found_by_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSSD_CACHE", str(tmp_path))
    made = synthetic(train=2, val=1, size=64)
    before = os.stat(made / "annotations" / "instances_train2017.json").st_mtime_ns
    assert made.parent == tmp_path and synthetic(train=2, val=1, size=64) == made
    assert os.stat(made / "annotations" / "instances_train2017.json").st_mtime_ns == before
    assert synthetic(train=2, val=1, size=64, seed=1) != made
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    monkeypatch.setenv("SSSD_CACHE", "")  # as if it were not set
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert synthetic(train=1, val=1, size=64).parent == tmp_path / "xdg" / "sssd"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert synthetic(train=1, val=1, size=64).parent == tmp_path / "home" / ".cache" / "sssd"
