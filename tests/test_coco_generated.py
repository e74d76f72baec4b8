"""Generated annotation files: read or refused in one sentence; what is read evaluates as COCO's."""

from __future__ import annotations

import copy
import io
import json
import random
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sssd.data.coco import CocoSplit
from sssd.evaluation import METRICS, Detections, coco_results, evaluate

SIDE = 200
CATEGORIES = (5, 2, 9)
JUNK = (
    *(None, True, "", "7", "seven", -1, 0, 1.5, 2**31, 2**63, 10**30, 1e200, float("nan")),
    *([], [[]], {}, {"a": None}, [1, 2, 3, 4], [0, 0, 1e308, 1e308], "\0", "\ud800", "a\\b"),
)


def truth(draw: random.Random) -> dict[str, Any]:
    """A file as pycocotools needs it, with crowds, boxes without size and boxes partly outside."""
    images = [
        {"id": i, "file_name": f"{i}.png", "width": SIDE, "height": SIDE}
        for i in draw.sample(range(100), draw.randint(1, 4))
    ]
    annotations = []
    for number in range(1, draw.randint(1, 12) + 1):
        x, y, w, h = (draw.choice((0, 3.5, 20, 90, 150)) for _ in range(4))
        annotations.append(
            {
                "id": number,
                "image_id": draw.choice(images)["id"],
                "category_id": draw.choice(CATEGORIES),
                "bbox": [x, y, w, h],
                "area": draw.choice((w * h, w * h, 0.7 * w * h)),
                "iscrowd": int(draw.random() < 0.2),
            }
        )
    names = ("cat", "dog", "cat")
    categories = [{"id": i, "name": n} for i, n in zip(CATEGORIES, names, strict=True)]
    return {"images": images, "annotations": annotations, "categories": categories}


def found_in(data: dict[str, Any], draw: random.Random) -> list[dict[str, Any]]:
    """COCO results: most objects, a little off, some of another class."""
    results = []
    for entry in data["annotations"]:
        for _ in range(draw.randint(0, 2)):
            box = [max(x + draw.choice((-4, 0, 0, 2)), 0) for x in entry["bbox"]]
            wrong = draw.random() < 0.2
            own = {"bbox": box, "score": draw.choice((0.25, 0.5, 0.75))}
            own["category_id"] = draw.choice(CATEGORIES) if wrong else entry["category_id"]
            results.append({"image_id": entry["image_id"], **own})
    return results


def exported(data: dict[str, Any], draw: random.Random) -> tuple[bytes, int]:
    """The same, as some exporter writes it; and what it adds to the images' ids."""
    data = copy.deepcopy(data)
    more = draw.choice((0, 0, 2**62, 2**100))
    as_text = draw.choice((int, str))
    for image in data["images"]:
        image |= {
            "id": as_text(image["id"] + more),
            "width": draw.choice((SIDE, float(SIDE), "200")),
        }
    for entry in data["annotations"]:
        entry["image_id"] = as_text(entry["image_id"] + more)
        entry["iscrowd"] = draw.choice((entry["iscrowd"], bool(entry["iscrowd"])))
        if not entry["iscrowd"] and draw.random() < 0.5:
            del entry["iscrowd"]
        if entry["area"] == entry["bbox"][2] * entry["bbox"][3] and draw.random() < 0.5:
            entry["area"] = None
        entry["segmentation"] = draw.choice(([], None, [[1, 2, 3]], {"counts": "x"}))
        entry["id"] = draw.choice((entry["id"], 0, None, "a"))
    data["info"] = draw.choice(
        (None, [], "x", {}, {"area_limits": None}, {"area_limits": [32, 96]})
    )
    draw.shuffle(data["images"])
    return json.dumps(data).encode(draw.choice(("utf-8", "utf-8-sig", "utf-16", "utf-32"))), more


def judged(data: dict[str, Any], found: list[dict[str, Any]]) -> np.ndarray:
    """pycocotools' own twelve numbers."""
    with redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = copy.deepcopy(data)
        coco.createIndex()
        run = COCOeval(coco, coco.loadRes(found), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return np.where(run.stats == -1, np.nan, run.stats)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generated")
    for i in range(100):
        (folder / f"{i}.png").touch()  # it must be there, but nobody reads it
    return folder


def opened(folder: Path, content: bytes, training: bool = False) -> CocoSplit:
    file = folder / "instances.json"
    file.write_bytes(content)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*degenerate boxes")
        return CocoSplit(folder, file, training)


@settings(max_examples=400, deadline=None)
@given(st.integers(0, 2**40))
def test_what_exporters_write_evaluates_as_pycocotools_does(folder: Path, seed: int) -> None:
    draw = random.Random(seed)
    data = truth(draw)
    found = found_in(data, draw)
    content, more = exported(data, draw)
    split = opened(folder, content)
    renumbered = {split.file_image_id(int(i)) - more: int(i) for i in split.image_ids}
    boxes = np.array([f["bbox"] for f in found], np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    ours = Detections(
        np.array([renumbered[f["image_id"]] for f in found], np.int64),
        np.array([f["category_id"] for f in found], np.int64),
        boxes,
        np.array([f["score"] for f in found], np.float32),
    )
    written = [{**f, "image_id": f["image_id"] + more} for f in found]
    assert coco_results(split, ours) == [
        {**f, "bbox": list(map(float, f["bbox"]))} for f in written
    ]
    if found:  # without any, pycocotools fails
        summary = evaluate(split, ours).summary
        np.testing.assert_array_equal([summary[m] for m in METRICS], judged(data, found))


def test_a_spoiled_file_is_read_or_refused_in_one_sentence(folder: Path) -> None:
    outcomes: list[str] = []

    @settings(max_examples=600, deadline=None)
    @given(st.integers(0, 2**40))
    def spoil(seed: int) -> None:
        outcomes.append(open_spoiled(folder, seed))

    spoil()
    assert min(outcomes.count("read"), outcomes.count("refused")) > 20


def open_spoiled(folder: Path, seed: int) -> str:
    """Some value anywhere is replaced or removed, or the file is cut off."""
    draw = random.Random(seed)
    data: Any = truth(draw)
    for _ in range(draw.randint(1, 3)):
        part = data
        while True:
            key = draw.choice(list(part) if isinstance(part, dict) else range(len(part)))
            if not part[key] or not isinstance(part[key], dict | list) or draw.random() < 0.1:
                break
            part = part[key]
        if isinstance(part, dict) and draw.random() < 0.2:
            del part[key]
        else:
            part[key] = copy.deepcopy(draw.choice(JUNK))
        if not data:
            break
    content = json.dumps(data).encode()
    if draw.random() < 0.1:
        content = content[: draw.randrange(len(content))]
    try:
        split = opened(folder, content, training=draw.random() < 0.5)
    except ValueError as error:
        sentence = str(error)
        assert sentence.startswith(f"{folder}/instances.json: ")
        assert "\n" not in sentence and len(sentence) < 2000
        return "refused"
    summary = evaluate(split, Detections.concatenate([])).summary
    assert summary["AP"] == 0 or np.isnan(summary["AP"])
    assert not split.image_ids.size or split.narrowest[1] > 0
    return "read"
