"""COCO-format loading on files written here, and on real ones; batches as a function of (seed, t)."""

from __future__ import annotations

import json
import os
import pickle
import re
import unicodedata
import warnings
from collections import Counter
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import python
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from sssd.data.coco import Batches, CocoSplit, find_split, fingerprint
from sssd.evaluation import Detections, evaluate

REAL = os.environ.get("SSSD_TEST_DATA")
needs_real_data = pytest.mark.skipif(not REAL, reason="SSSD_TEST_DATA is not set")

SIZE = (40, 30)


def entry(image_id: int, category_id: int, bbox: list[float], **more: Any) -> dict[str, Any]:
    return {"image_id": image_id, "category_id": category_id, "bbox": bbox, **more}


def example() -> dict[str, Any]:
    """Ids out of order, image 5 with a crowd only, image 9 with nothing."""
    files = {7: "b.png", 3: "a.png", 5: "sub/c.png", 9: "d.png"}
    return {
        "images": [
            {"id": i, "file_name": name, "width": SIZE[0], "height": SIZE[1]}
            for i, name in files.items()
        ],
        "annotations": [
            entry(7, 90, [1, 2, 10, 5]),
            entry(3, 11, [30.5, 20, 100, 100], iscrowd=0),
            entry(7, 11, [-5, -5, 10, 10]),
            entry(5, 90, [0, 0, 40, 30], iscrowd=1, segmentation={"counts": [0, 1200]}),
        ],
        "categories": [{"id": 90, "name": "cat"}, {"id": 11, "name": "dog"}],
    }


def write(folder: Path, data: Any, training: bool = False) -> CocoSplit:
    """The split of a file with these contents, with a random image for each one it names."""
    file = folder / "instances.json"
    file.write_text(data if isinstance(data, str) else json.dumps(data))
    rng = np.random.default_rng(0)
    for image in data["images"] if isinstance(data, dict) and "images" in data else []:
        path = folder / image["file_name"] if isinstance(image.get("file_name"), str) else None
        if path is not None and not path.exists():
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (*SIZE[::-1], 3), np.uint8)).save(path)
    return CocoSplit(folder, file, training)


def test_targets(tmp_path: Path) -> None:
    split = write(tmp_path, example())
    assert split.image_ids.tolist() == [3, 5, 7, 9] and split.image_ids.dtype == np.int64
    assert (split.category_ids, split.class_names) == ([11, 90], ["dog", "cat"])
    assert split.area_limits == (32.0, 96.0)
    image, target = split[2]
    expected = np.asarray(Image.open(tmp_path / "b.png"))
    assert image.dtype == torch.float32 and image.shape == (3, 30, 40)
    np.testing.assert_array_equal((image * 255).round().byte().permute(1, 2, 0), expected)
    assert target["image_id"] == 7
    assert target["labels"].tolist() == [2, 1] and target["labels"].dtype == torch.int64
    assert target["boxes"].tolist() == [[1, 2, 11, 7], [0, 0, 5, 5]]
    assert target["boxes"].dtype == torch.float32
    assert split[0][1]["boxes"].tolist() == [[30.5, 20, 40, 30]]
    assert split[1][1]["boxes"].shape == split[3][1]["boxes"].shape == (0, 4)
    with pytest.raises(IndexError):
        split[4]


def test_training_leaves_out_images_without_targets(tmp_path: Path) -> None:
    split = write(tmp_path, example(), training=True)
    assert split.image_ids.tolist() == [3, 7]
    assert split[1][1]["boxes"].tolist() == [[1, 2, 11, 7], [0, 0, 5, 5]]


def test_an_item_can_be_changed_without_changing_the_next(tmp_path: Path) -> None:
    split = write(tmp_path, example())
    first = split[2]
    before = (first[0].clone(), first[1]["boxes"].clone())
    first[0].zero_()
    first[1]["boxes"].zero_()
    again = split[2]
    assert torch.equal(again[0], before[0]) and torch.equal(again[1]["boxes"], before[1])


def test_degenerate_boxes_are_dropped_and_counted_once(tmp_path: Path) -> None:
    data = example()
    bad: list[list[float]] = [
        [5, 5, 0, 0],
        [5, 5, -3, 4],
        [100, 5, 9, 9],
        [5, 5, 9, 0.05],
        [39.95, 0, 9, 9],
    ]
    data["annotations"] += [entry(9, 11, box) for box in [*bad, [5, 5, 0.2, 9]]]
    data["annotations"].append(entry(9, 11, [1, 1, 0, 0], iscrowd=1))
    with pytest.warns(UserWarning) as caught:
        split = write(tmp_path, data)
    assert len(caught) == 1
    assert "instances.json" in str(caught[0].message) and str(caught[0].message).endswith(": 5")
    assert len(split[3][1]["boxes"]) == 1


def test_no_warning_without_degenerate_boxes(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write(tmp_path, example())


def test_ground_truth_for_pycocotools(tmp_path: Path) -> None:
    data = example()
    data["annotations"][0] |= {"id": 0, "area": 7.5}
    data["annotations"].append(entry(9, 11, [5, 5, 0, 0]))
    with pytest.warns(UserWarning, match="degenerate"):
        coco = write(tmp_path, data).coco
    entries = coco.loadAnns(sorted(coco.getAnnIds()))
    assert [e["id"] for e in entries] == [1, 2, 3, 4, 5]
    assert [e["area"] for e in entries] == [7.5, 10000, 100, 1200, 0]
    assert [e["iscrowd"] for e in entries] == [0, 0, 0, 1, 0]


def two_splits(
    folder: Path, own: dict[int, str], classes: dict[int, str], used: list[int]
) -> CocoSplit:
    """A file that declares some categories and uses some of them, beside a training set's."""
    data = example()
    data["categories"] = [{"id": id, "name": name} for id, name in own.items()]
    data["annotations"] = [entry(7, id, [1 + i, 2, 10, 5]) for i, id in enumerate(used)]
    write(folder, data)
    return CocoSplit(folder, folder / "instances.json", False, classes)


@pytest.mark.parametrize(
    ("own", "used", "labels"),
    [
        ({1: "cat", 2: "dog"}, [1, 2], [1, 2]),
        ({1: "dog", 2: "cat"}, [1, 2], [2, 1]),  # numbered anew
        ({0: "unused", 1: "cat", 2: "dog"}, [1, 2], [1, 2]),
        ({30: "dog"}, [30], [2]),  # cat is missing
    ],
    ids=["the same", "other ids", "one more", "one fewer"],
)
def test_validation_has_the_classes_of_training(
    tmp_path: Path, own: dict[int, str], used: list[int], labels: list[int]
) -> None:
    """A perfect detector's AP is 1 for every class that the file has objects of."""
    split = two_splits(tmp_path, own, {1: "cat", 2: "dog"}, used)
    assert (split.category_ids, split.class_names) == ([1, 2], ["cat", "dog"])
    target = split[2][1]
    assert target["labels"].tolist() == labels
    perfect = {**target, "scores": torch.ones(len(labels))}
    found = Detections.from_outputs([perfect], [7], split.category_ids)
    ap = evaluate(split, found).per_class
    for label, name in enumerate(("cat", "dog"), start=1):
        assert ap[name] == pytest.approx(1) if label in labels else np.isnan(ap[name])


def test_equal_names_are_told_apart_by_their_ids(tmp_path: Path) -> None:
    split = two_splits(tmp_path, {1: "cat", 2: "cat"}, {1: "cat", 2: "cat", 3: "dog"}, [2, 1])
    assert split[2][1]["labels"].tolist() == [2, 1]
    with pytest.raises(ValueError, match="category 4 cat"):  # which of the two is it?
        two_splits(tmp_path, {4: "cat"}, {1: "cat", 2: "cat"}, [4])


def test_a_category_that_training_lacks_is_refused_with_both_lists(tmp_path: Path) -> None:
    classes = {1: "cat", 2: "dog"}
    said = "category 3 bird, which training lacks; training has 1 cat, 2 dog; this file has 1 cat, 3 bird"
    with pytest.raises(ValueError, match=said):
        two_splits(tmp_path, {1: "cat", 3: "bird"}, classes, [1, 3])
    assert len(two_splits(tmp_path, {1: "cat", 3: "bird"}, classes, [1])[2][1]["labels"]) == 1


def test_area_limits_and_equal_names(tmp_path: Path) -> None:
    data = example() | {"info": {"area_limits": [8, 24.5], "year": 2023}}
    data["categories"][1]["name"] = "cat"
    split = write(tmp_path, data)
    assert split.area_limits == (8.0, 24.5)
    assert split.class_names == ["cat (11)", "cat (90)"]


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK"])
def test_every_kind_of_image_is_rgb(tmp_path: Path, mode: str) -> None:
    rgb = np.random.default_rng(1).integers(0, 256, (*SIZE[::-1], 3), np.uint8)
    picture = Image.fromarray(rgb).convert(mode)
    data = example()
    data["images"][0]["file_name"] = name = "x.tif" if mode == "CMYK" else "x.png"
    picture.save(tmp_path / name)
    image, _ = write(tmp_path, data)[2]
    expected = np.asarray(picture.convert("RGB"))
    np.testing.assert_array_equal((image * 255).round().byte().permute(1, 2, 0), expected)


def test_sixteen_bit_grey_keeps_its_range(tmp_path: Path) -> None:
    grey = np.linspace(0, 65535, 40 * 30).astype(np.uint16).reshape(30, 40)
    Image.fromarray(grey).save(tmp_path / "b.png")
    image, _ = write(tmp_path, example())[2]
    assert image.shape == (3, 30, 40)
    assert (image - torch.from_numpy(grey / 65535)).abs().max() < 1 / 255
    assert image.unique().numel() == 256


def test_exif_orientation_is_not_applied(tmp_path: Path) -> None:
    pixels = np.zeros((30, 40, 3), np.uint8)
    pixels[:, :20] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # a viewer would turn it by 90 degrees
    Image.fromarray(pixels).save(tmp_path / "b.png", exif=exif)
    image, _ = write(tmp_path, example())[2]
    assert (
        image.shape == (3, 30, 40) and image[:, :, :20].min() == 1 and image[:, :, 20:].max() == 0
    )


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("mode", ["RGB", "I;16"])
def test_an_image_of_the_turned_size_is_read_turned(
    tmp_path: Path, orientation: int, mode: str
) -> None:
    """Annotation tools show the image as its EXIF orientation says, and write that size."""
    pixels = np.arange(40 * 30, dtype=np.uint16).reshape(40, 30) * 50
    grey = Image.fromarray(pixels)
    picture = grey if mode == "I;16" else Image.fromarray((pixels >> 8).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.save(tmp_path / "b.png", exif=exif)
    split = write(tmp_path, example())
    if orientation < 5:  # turned by 180 degrees or mirrored: the size tells nothing
        with pytest.raises(ValueError, match=r"30 × 40 pixels; expected 40 × 30"):
            split[2]
        return
    image, _ = split[2]
    turned = {5: pixels.T, 6: np.rot90(pixels, -1), 7: np.rot90(pixels, 2).T, 8: np.rot90(pixels)}
    expected = (turned[orientation] >> 8).astype(np.uint8)
    np.testing.assert_array_equal((image[0] * 255).round().byte(), expected)


def test_an_orientation_that_explains_nothing_is_named(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (21, 35)).save(tmp_path / "b.png", exif=exif)
    said = "21 × 35 pixels, 35 × 21 as its EXIF orientation 6 turns it; expected 40 × 30"
    with pytest.raises(ValueError, match=said):
        write(tmp_path, example())[2]


@pytest.mark.parametrize(("orientation", "size"), [(6, (30, 30)), (3, (40, 30))])
def test_an_orientation_that_the_size_does_not_tell_is_a_warning(
    tmp_path: Path, orientation: int, size: tuple[int, int]
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = example()
    data["images"][0] |= {"width": size[0], "height": size[1]}
    Image.new("RGB", size).save(tmp_path / "b.png", exif=exif)
    split = write(tmp_path, data)
    with pytest.warns(UserWarning, match=f"image 7 .*EXIF orientation {orientation}") as caught:
        split[2]
    assert len(caught) == 1


EXPORTED: dict[str, Any] = {
    "nulls": lambda d: d | {"info": None, "licenses": None},
    "info as a list": lambda d: d | {"info": []},
    "info as text": lambda d: d | {"info": "made by hand"},
    "info without limits": lambda d: d | {"info": {"area_limits": None, "year": None}},
    "crowds as truth values": lambda d: changed(d, iscrowd=lambda e: bool(e.get("iscrowd"))),
    "no crowds": lambda d: changed(d, iscrowd=lambda e: e.get("iscrowd") or None),
    "areas missing": lambda d: changed(d, area=lambda e: None),
    "ids as text": lambda d: changed(d, image_id=lambda e: str(e["image_id"])),
    "ids as fractions": lambda d: changed(d, category_id=lambda e: float(e["category_id"])),
    "sizes as fractions": lambda d: d | {"images": [i | {"width": 40.0} for i in d["images"]]},
    "boxes as text": lambda d: changed(d, bbox=lambda e: [str(x) for x in e["bbox"]]),
}


def changed(data: dict[str, Any], **fields: Any) -> dict[str, Any]:
    for entry in data["annotations"]:
        entry |= {name: change(entry) for name, change in fields.items()}
    return data


@pytest.mark.parametrize("kind", EXPORTED)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_what_exporters_write_is_read(tmp_path: Path, kind: str, encoding: str) -> None:
    plain = write(tmp_path, example())
    other = write(tmp_path, EXPORTED[kind](example()))
    plain.annotations.write_text(json.dumps(EXPORTED[kind](example())), encoding=encoding)
    other = CocoSplit(tmp_path, plain.annotations, training=False)
    assert other.area_limits == (32, 96) and other.class_names == plain.class_names
    for (image, target), (same, expected) in zip(iterate(other), iterate(plain), strict=True):
        assert torch.equal(image, same) and str(target) == str(expected)
    ours, theirs = other.coco.dataset, plain.coco.dataset
    assert [a["iscrowd"] for a in ours["annotations"]] == [
        a["iscrowd"] for a in theirs["annotations"]
    ]


def iterate(split: CocoSplit) -> list[Any]:
    return [split[i] for i in range(len(split))]


def perfect(split: CocoSplit) -> Detections:
    """The targets as detections."""
    outputs = [{**t, "scores": torch.ones(len(t["labels"]))} for _, t in iterate(split)]
    return Detections.from_outputs(outputs, split.image_ids.tolist(), split.category_ids)


def test_numbers_are_names(tmp_path: Path) -> None:
    data = example()
    data["categories"][0]["name"], data["categories"][1]["name"] = 5, None
    data["images"][0]["file_name"] = 17
    Image.new("RGB", SIZE).save(tmp_path / "17", format="png")
    split = write(tmp_path, data)
    assert split.class_names == ["11", "5"] and split[2][0].shape == (3, 30, 40)


@pytest.mark.parametrize("box", [[], None])
def test_an_empty_box_is_degenerate(tmp_path: Path, box: Any) -> None:
    data = example()
    data["annotations"].append(entry(9, 11, box))
    with pytest.warns(UserWarning, match=r"degenerate boxes .*: 1$"):
        split = write(tmp_path, data)
    assert len(split[3][1]["boxes"]) == 0 and len(split.coco.getAnnIds(imgIds=9)) == 1


def test_annotations_may_be_null(tmp_path: Path) -> None:
    split = write(tmp_path, example() | {"annotations": None})
    assert len(split) == 4 and split.coco.getAnnIds() == []


def test_backslashes_are_separators_where_no_name_has_them(tmp_path: Path) -> None:
    data = example()
    data["images"][2]["file_name"] = "sub\\c.png"
    (tmp_path / "sub").mkdir()
    Image.new("RGB", SIZE, (255, 0, 0)).save(tmp_path / "sub" / "c.png")
    write_only(tmp_path, data)
    assert CocoSplit(tmp_path, tmp_path / "instances.json", False)[1][0][0].min() == 1
    Image.new("RGB", SIZE).save(tmp_path / "sub\\c.png")
    assert CocoSplit(tmp_path, tmp_path / "instances.json", False)[1][0][0].max() == 0


@pytest.mark.parametrize(("given", "there"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_an_accent_is_one_character_or_two(tmp_path: Path, given: Any, there: Any) -> None:
    """Of images that were packed on one system and unpacked on another."""
    data = example()
    data["images"][2]["file_name"] = unicodedata.normalize(given, "café.png")
    Image.new("RGB", SIZE, (255, 0, 0)).save(tmp_path / unicodedata.normalize(there, "café.png"))
    write_only(tmp_path, data)
    assert CocoSplit(tmp_path, tmp_path / "instances.json", False)[1][0][0].min() == 1


def test_a_class_name_is_on_one_line(tmp_path: Path) -> None:
    data = example()
    data["categories"][0]["name"] = " a\nred\tcar "
    split = write(tmp_path, data)
    assert "a red car" in split.class_names


def write_only(folder: Path, data: Any) -> None:
    """The annotation file, and the images that are plainly named, but not image 5's."""
    write(folder, example())
    (folder / "instances.json").write_text(data if isinstance(data, str) else json.dumps(data))


@pytest.mark.parametrize("first", [2**63, 2**100 + 7, -(2**70)])
def test_image_ids_of_any_length_are_read(tmp_path: Path, first: int) -> None:
    """Inside they are numbered anew, in their order; what leaves has the file's own."""
    plain = write(tmp_path, example())
    before = evaluate(plain, perfect(plain)).summary["AP"]
    assert before > 0.4
    data, ids = example(), {7: first, 3: first + 2, 5: first + 1, 9: 4}
    for image in data["images"]:
        image["id"] = ids[image["id"]]
    for annotation in data["annotations"]:
        annotation["image_id"] = ids[annotation["image_id"]]
    split = write(tmp_path, data)
    assert split.image_ids.tolist() == [1, 2, 3, 4] and split.image_ids.dtype == np.int64
    assert [split.file_image_id(i) for i in (1, 2, 3, 4)] == sorted(ids.values())
    place = sorted(ids.values()).index(first)
    assert split[place][1]["boxes"].tolist() == [[1, 2, 11, 7], [0, 0, 5, 5]]
    assert evaluate(split, perfect(split)).summary["AP"] == pytest.approx(before)
    training = CocoSplit(tmp_path, split.annotations, training=True)
    own = [training.file_image_id(int(i)) for i in training.image_ids]
    assert own == sorted((first, first + 2))


def test_formats_that_start_programs_are_not_opened(tmp_path: Path) -> None:
    split = write(tmp_path, example())
    Image.new("RGB", SIZE).save(tmp_path / "b.png", format="EPS")
    with pytest.raises(ValueError, match=r"image 7 .*b\.png.* expected one of JPEG, PNG"):
        split[2]


def test_photographs_of_phones_are_read(tmp_path: Path) -> None:
    """A JPEG with a second image in it, which PIL calls MPO."""
    picture = Image.new("RGB", SIZE, (255, 0, 0))
    picture.save(tmp_path / "b.png", format="MPO", save_all=True, append_images=[picture])
    assert write(tmp_path, example())[2][0][0].min() > 0.98


def test_a_class_name_is_unique(tmp_path: Path) -> None:
    data = example()
    data["categories"] = [{"id": i, "name": n} for i, n in ((11, "a"), (90, "a"), (3, "a (11)"))]
    assert write(tmp_path, data).class_names == ["a (11) (3)", "a (11)", "a (90)"]


def test_missing_images_are_counted_at_opening(tmp_path: Path) -> None:
    split = write(tmp_path, example())
    for name in ("a.png", "d.png"):
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=r"image 3 \(.*a\.png\) is not there; 1 more missing$"):
        CocoSplit(tmp_path, split.annotations, training=False)
    with pytest.raises(ValueError, match=r"image 3 \(.*a\.png\) is not there$"):
        CocoSplit(tmp_path, split.annotations, training=True)  # which does not use the other


def remove(*path: Any) -> Any:
    def change(data: dict[str, Any]) -> dict[str, Any]:
        part: Any = data
        for key in path[:-1]:
            part = part[key]
        del part[path[-1]]
        return data

    return change


def put(value: Any, *path: Any) -> Any:
    def change(data: dict[str, Any]) -> dict[str, Any]:
        part: Any = data
        for key in path[:-1]:
            part = part[key]
        part[path[-1]] = value
        return data

    return change


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda data: "{", "JSON"),
        (lambda data: [], "format"),
        (remove("images"), "images"),
        (remove("annotations"), "annotations"),
        (remove("categories"), "categories"),
        (put([], "images"), "images"),
        (remove("images", 1, "file_name"), "images[1].file_name"),
        (put(0, "images", 1, "width"), "images[1].width"),
        (put(3, "images", 0, "id"), "images"),
        (put(11, "categories", 0, "id"), "categories"),
        (put("three", "annotations", 2, "image_id"), "annotations[2].image_id"),
        (put(4, "annotations", 2, "image_id"), "annotations[2].image_id is 4"),
        (put(12, "annotations", 1, "category_id"), "annotations[1].category_id is 12"),
        (put([1, 2, 3], "annotations", 3, "bbox"), "annotations[3].bbox"),
        (put([1, 2, 3, float("nan")], "annotations", 3, "bbox"), "annotations[3].bbox"),
        (put({"area_limits": [96, 32]}, "info"), "info.area_limits"),
        (put({"area_limits": [32, 1e200]}, "info"), "info.area_limits"),
        (put({"area_limits": "large"}, "info"), "info.area_limits"),
        (put("a\0.png", "images", 0, "file_name"), "images[0].file_name"),
        (put("", "images", 0, "file_name"), "images[0].file_name"),
        (put(None, "images", 1, "file_name"), "images[1].file_name"),
        (put(None, "images", 1, "width"), "images[1].width"),
        (put(10**7, "images", 1, "width"), "10000000 × 30 pixels; expected at most 179"),
        (put(10**30, "images", 1, "height"), "images[1] is {'file_name': 'a.png', 'height': 100"),
        (put(2**63, "categories", 0, "id"), "categories[0].id is 9223372036854775808"),
        (put(2**80, "annotations", 2, "image_id"), "annotations[2].image_id is 12089"),
        (put([1, 2, 3, None], "annotations", 3, "bbox"), "annotations[3].bbox"),
        (put(2, "annotations", 3, "iscrowd"), "annotations[3].iscrowd"),
        (put(["a"], "categories", 0, "name"), "categories[0].name"),
    ],
)
def test_malformed_files_are_named(tmp_path: Path, change: Any, named: str) -> None:
    with pytest.raises(ValueError, match=re.escape(named)) as caught:
        write_only(tmp_path, change(example()))
        CocoSplit(tmp_path, tmp_path / "instances.json", training=False)
    sentence = str(caught.value)
    assert sentence.startswith(str(tmp_path / "instances.json")) and "\n" not in sentence


def test_nothing_to_train_on(tmp_path: Path) -> None:
    data = example()
    data["annotations"] = data["annotations"][3:]
    with pytest.raises(ValueError, match="no image has a usable box"):
        write(tmp_path, data, training=True)
    data["annotations"] = []
    assert len(write(tmp_path, data)) == 4


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/none.json: cannot be read")):
        CocoSplit(tmp_path, tmp_path / "none.json", training=False)
    split = write(tmp_path, example())
    (tmp_path / "b.png").unlink()  # after the data were opened
    with pytest.raises(ValueError, match=r"image 7 .*b\.png.*No such file"):
        split[2]
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:500])
    with pytest.raises(ValueError, match=r"image 7 .*b\.png.* cannot be read"):
        split[2]
    Image.new("RGB", SIZE[::-1]).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"image 7 .* 30 × 40 pixels; expected 40 × 30"):
        split[2]
    Image.new("F", SIZE).save(tmp_path / "b.tif")
    (tmp_path / "b.tif").rename(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"image 7 .*floating-point"):
        split[2]


@pytest.mark.parametrize("name", ["{}2017", "{}"])
def test_find_split(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name.format("val")
    file = tmp_path / "annotations" / f"instances_{folder.name}.json"
    folder.mkdir()
    with pytest.raises(ValueError, match=r"data root .* no val split; expected annotations/"):
        find_split(tmp_path, "val")
    file.parent.mkdir()
    file.write_text("{}")
    assert find_split(tmp_path, "val") == (folder, file)
    with pytest.raises(ValueError, match="no train split"):
        find_split(tmp_path, "train")


def test_fingerprint(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_bytes(b"abc")
    assert fingerprint(file) == "sha256:ba7816bf8f01cfea"  # of FIPS 180-2, appendix B.1
    file.write_bytes(b"abd")
    assert fingerprint(file) != "sha256:ba7816bf8f01cfea"


def test_pickle_is_small_and_whole(tmp_path: Path) -> None:
    split = write(tmp_path, example())
    small = len(pickle.dumps(split))
    split.coco.dataset["ballast"] = "x" * 10**6
    split[2]
    text = pickle.dumps(split)
    assert len(text) == small < 5000
    copy = pickle.loads(text)
    assert torch.equal(copy[2][0], split[2][0]) and len(copy.coco.dataset["annotations"]) == 4


@cache
def numbered(tmp: Path, images: int, tall: tuple[int, ...] = ()) -> CocoSplit:
    """Images with one box each, whose class is the image's number and whose place tells a flip."""
    folder = tmp / f"{images} {tall}"
    folder.mkdir(exist_ok=True)
    Image.new("RGB", SIZE[::-1]).save(folder / "tall.png")
    data = example()
    wide, other = data["images"][0] | {"file_name": "a.png"}, {"file_name": "tall.png"}
    other |= {"width": SIZE[1], "height": SIZE[0]}
    data["images"] = [wide | {"id": i} | (other if i in tall else {}) for i in range(1, images + 1)]
    data["categories"] = [{"id": i} for i in range(1, images + 1)]
    data["annotations"] = [entry(i, i, [4, 2, 8, 6]) for i in range(1, images + 1)]
    return write(folder, data, training=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("numbered")


Order = list[tuple[int, bool]]


def order(batches: Batches, steps: range) -> list[Order]:
    """Image and whether flipped, of each slot of each batch."""
    return [
        [(target["image_id"], target["boxes"][0, 0].item() != 4) for target in batches[t][1]]
        for t in steps
    ]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 7), st.integers(1, 6), st.integers(0, 2**40))
def test_every_epoch_has_every_image_once(folder: Path, images: int, size: int, seed: int) -> None:
    steps = -(-3 * images // size)
    batches = Batches(numbered(folder, images), size, seed, steps)
    seen = [image for batch in order(batches, range(1, steps + 1)) for image, _ in batch]
    assert len(seen) == steps * size
    for epoch in range(3):
        own = seen[epoch * images : (epoch + 1) * images]
        assert Counter(own) == Counter(range(1, images + 1))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(0, 99), st.integers(1, 20))
def test_ranks_and_starts(folder: Path, share: int, world: int, seed: int, start: int) -> None:
    split, size = numbered(folder, 7), share * world
    whole = order(Batches(split, size, seed, 40), range(1, 24))
    parts = [
        order(Batches(split, size, seed, 40, rank, world), range(start, 24))
        for rank in range(world)
    ]
    for t in range(start, 24):
        together: Order = [None] * size  # type: ignore[list-item]
        for rank in range(world):
            together[rank::world] = parts[rank][t - start]
        assert together == whole[t - 1]


def test_order_and_flips_depend_on_seed_epoch_and_slot(folder: Path) -> None:
    split, steps = numbered(folder, 50), range(1, 201)
    one, two = (list(chain(*order(Batches(split, 2, seed, 200), steps))) for seed in (0, 1))
    images = [image for image, _ in one]
    assert images[:50] != images[50:100] and images != [image for image, _ in two]
    flips = np.array([flipped for _, flipped in one])
    assert abs(flips.mean() - 0.5) < 3 * 0.5 / np.sqrt(400)
    assert (flips[::2] != flips[1::2]).any() and (flips != [f for _, f in two]).any()
    for probability, expected in ((0.0, False), (1.0, True)):
        drawn = list(chain(*order(Batches(split, 2, 0, 200, flip=probability), steps)))
        assert all(flipped is expected for _, flipped in drawn)
        assert [image for image, _ in drawn] == images


def test_a_flip_mirrors_image_and_boxes(tmp_path: Path) -> None:
    split = write(tmp_path, example(), training=True)
    plain, flipped = (Batches(split, 2, 0, 1, flip=p)[1] for p in (0.0, 1.0))
    for image, target, mirrored, other in zip(*plain, *flipped, strict=True):
        assert torch.equal(mirrored, image.flip(2))
        x1, y1, x2, y2 = target["boxes"].T
        assert torch.equal(other["boxes"].T, torch.stack([40 - x2, y1, 40 - x1, y2]))
        assert torch.equal(other["labels"], target["labels"])
    assert torch.equal(split[1][1]["boxes"], torch.tensor([[1.0, 2, 11, 7], [0, 0, 5, 5]]))


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_workers_change_nothing(folder: Path, workers: int) -> None:
    batches = Batches(numbered(folder, 7), 3, 5, 12)
    loader = DataLoader(batches, sampler=range(4, 13), batch_size=None, num_workers=workers)
    loaded = list(loader)
    assert len(loaded) == 9
    for t, (images, targets) in enumerate(loaded, start=4):
        expected_images, expected_targets = batches[t]
        assert all(torch.equal(a, b) for a, b in zip(images, expected_images, strict=True))
        assert [x["image_id"] for x in targets] == [x["image_id"] for x in expected_targets]
        for a, b in zip(targets, expected_targets, strict=True):
            assert torch.equal(a["boxes"], b["boxes"]) and torch.equal(a["labels"], b["labels"])


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 9), st.sampled_from([2, 4, 8]), st.integers(0, 99), st.data())
def test_pairs_are_of_one_shape(
    folder: Path, images: int, size: int, seed: int, data: st.DataObject
) -> None:
    tall = tuple(sorted(data.draw(st.sets(st.integers(1, images)))))
    split, steps = numbered(folder, images, tall), 40
    batches = Batches(split, size, seed, steps, aspect_grouping=True)
    whole = [[image for image, _ in batch] for batch in order(batches, range(1, steps + 1))]
    for batch in whole:
        for one, other in zip(batch[: size // 2], batch[size // 2 :], strict=True):
            assert (one in tall) == (other in tall)
    # Each image comes as often as any other, but for the epoch that has just begun or not ended.
    times = Counter(chain(*whole))
    assert max(times.values()) - min(times[i] for i in range(1, images + 1)) <= 2
    # From any step on, and on any process, the same.
    world = data.draw(st.sampled_from([w for w in (1, 2, 4) if size // 2 % w == 0]))
    for rank in range(world):
        own = Batches(split, size, seed, steps, rank, world, aspect_grouping=True)
        assert [image for image, _ in order(own, [7])[0]] == whole[6][rank::world]


@needs_real_data
@pytest.mark.parametrize("name", ["bccd", "coco128"])
@pytest.mark.parametrize("part", ["train", "val"])
def test_real_data(name: str, part: Any) -> None:
    images, annotations = find_split(Path(str(REAL)) / name, part)
    data = json.loads(annotations.read_text())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        split = CocoSplit(images, annotations, training=False)
        training = CocoSplit(images, annotations, training=True)
    assert len(caught) == (2 if name == "bccd" else 0)  # one 0 × 0 box in each part of bccd
    assert len(split) == len(data["images"])
    assert len(training) == len(split) - (2 if name == "coco128" else 0)
    assert len(split.class_names) == (80 if name == "coco128" else 3)
    numbers: dict[int, list[Any]] = {}
    for e in data["annotations"]:
        if not e["iscrowd"] and min(e["bbox"][2:]) > 0:
            numbers.setdefault(e["image_id"], []).append((e["category_id"], e["bbox"]))
    for i in range(0, len(split), 16):
        image, target = split[i]
        expected = numbers.get(target["image_id"], [])
        ids = [split.category_ids[label - 1] for label in target["labels"]]
        assert ids == [category for category, _ in expected]
        boxes = np.array([box for _, box in expected]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        np.testing.assert_allclose(target["boxes"], boxes, atol=1e-2)
        assert image.shape[0] == 3 and 0 <= image.min() < image.max() <= 1


# --- at COCO's size -------------------------------------------------------------------------------


def test_polygons_of_any_kind_change_nothing(tmp_path: Path) -> None:
    plain = example()
    file = example()
    kinds: list[Any] = [[[1.5, 2, -3e1, 4]], [], [[1, 2], [3, 4]], None, [["a", 1], {"b": [2]}], {}]
    for entry, polygons in zip(file["annotations"], kinds, strict=False):
        entry["segmentation"] = polygons
    file["categories"][0]["segmentation"] = kinds[-2]
    file["info"] = {"segmentation": [[1, 2]], "note": 'a "segmentation": [1, 2]'}
    expected = write(tmp_path, plain)
    for text in (
        json.dumps(file),
        json.dumps(file, indent=2),
        json.dumps(file, separators=(",", ":")),
    ):
        found = write(tmp_path, text)
        assert np.array_equal(found.boxes, expected.boxes)
        assert np.array_equal(found.labels, expected.labels)
        assert found.classes == expected.classes


WORKERS = """
import resource, sys
from pathlib import Path
from torch.utils.data import DataLoader
from sssd.data.coco import Batches, CocoSplit

def private(process):
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private")) / 1024

root = Path(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
split = CocoSplit(root, root / "instances.json", training=True)
assert len(split.boxes) == 860_001 and len(split) > 118_000, len(split)
batches = Batches(split, 16, 0, 180_000, world=8, aspect_grouping=True)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before)
for workers in (1, 3):
    loader = iter(DataLoader(batches, None, sampler=range(1, 100), num_workers=workers))
    for _ in range(12):
        next(loader)
    print(*(private(worker.pid) for worker in loader._workers))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="memory as Linux tells it")
def test_a_file_of_cocos_size_is_shared_by_the_workers(tmp_path: Path) -> None:
    """118,287 images and 860,001 boxes with polygons; the images share one file."""
    draw = np.random.default_rng(0)
    Image.fromarray(draw.integers(0, 255, (480, 640, 3), dtype=np.uint8)).save(tmp_path / "1.jpg")
    images = [f'{{"id":{i},"file_name":"1.jpg","width":640,"height":480}}' for i in range(118_287)]
    polygon = json.dumps([draw.uniform(0, 480, 50).round(2).tolist()])
    objects = [
        f'{{"image_id":{i % 118_287},"category_id":{i % 80},"bbox":[{i % 500}.5,9,20,30],'
        f'"segmentation":{polygon},"area":600,"iscrowd":0,"id":{i}}}'
        for i in range(860_001)
    ]
    classes = json.dumps([{"id": i, "name": f"class {i}"} for i in range(80)])
    (tmp_path / "instances.json").write_text(
        f'{{"images":[{",".join(images)}],"annotations":[{",".join(objects)}],'
        f'"categories":{classes}}}'
    )
    process = python(WORKERS, tmp_path)
    printed, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    opening, *workers = [[float(x) for x in line.split()] for line in printed.splitlines()]
    assert opening[0] < 2048  # MiB; with polygons it would be more than 2600
    assert [len(each) for each in workers] == [1, 3]
    for each in workers:  # what a worker has for itself does not depend on how many there are
        assert max(each) < 100, workers
