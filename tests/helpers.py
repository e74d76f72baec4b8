"""A tiny COCO-format data set, tiny runs on it, and what equal runs must share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import sssd
from sssd.config import RunConfig
from sssd.profiles import configure
from sssd.records import read_records

COLOURS = ((220, 40, 40), (40, 200, 60), (50, 70, 230))
CATEGORIES = (3, 7, 12)  # neither from 0 nor in a row, as COCO's


def write_coco(
    root: Path, *, train: int = 8, val: int = 4, classes: int = 2, same_boxes: bool = False
) -> Path:
    """Images of 64 × 64 with two coloured rectangles each, the colour telling the class.

    With ``same_boxes`` the rectangles lie at the same places in every image, so that any images
    give a detector equally many matched anchors.
    """
    draw = np.random.default_rng(7)
    (root / "annotations").mkdir(parents=True)
    for split, count in (("train", train), ("val", val)):
        (root / split).mkdir()
        images, annotations = [], []
        for i in range(1, count + 1):
            pixels = draw.integers(90, 130, (64, 64, 3), dtype=np.uint8)
            for n, left in enumerate((2, 34)):
                if same_boxes:
                    x, y, w, h = left, 10 + 20 * n, 24, 28
                else:
                    x, y = left + int(draw.integers(0, 8)), int(draw.integers(2, 30))
                    w, h = int(draw.integers(12, 22)), int(draw.integers(12, 30))
                kind = int(draw.integers(0, classes))
                pixels[y : y + h, x : x + w] = COLOURS[kind]
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": i,
                        "category_id": CATEGORIES[kind],
                        "bbox": [x, y, w, h],
                        "area": w * h,
                        "iscrowd": 0,
                    }
                )
            name = f"{i:03d}.png"
            Image.fromarray(pixels).save(root / split / name)
            images.append({"id": i, "file_name": name, "width": 64, "height": 64})
        content = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": c, "name": f"colour {c}"} for c in CATEGORIES[:classes]],
        }
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def tiny(data: Any, **fields: Any) -> RunConfig:
    """A run of 8 iterations from random weights: learning rate and λ may switch after 5 and 7."""
    return configure("smoke", data=data, **{"start": "random", "iterations": 8, **fields})


def chain(config: RunConfig) -> list[RunConfig]:
    """A run after those that it starts from, in order."""
    start = config.start
    return [*chain(start), config] if isinstance(start, RunConfig) else [config]


def records(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The records of a run without what a clock gave."""
    kept = []
    for record in read_records(folder / name):
        kept.append({key: value for key, value in record.items() if "seconds" not in key})
    return kept


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "weights.pt", weights_only=True)


def assert_equal_runs(one: Path, other: Path) -> None:
    """Weights, metrics, evaluations, detections and matches agree to the last bit."""
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert records(one) == records(other)
    name = "evaluations.jsonl"  # as text: NaN, of areas without objects, is not equal to itself
    assert json.dumps(records(one, name)) == json.dumps(records(other, name))
    files = sorted(str(file.relative_to(one)) for file in one.rglob("*.npz"))
    assert files == sorted(str(file.relative_to(other)) for file in other.rglob("*.npz"))
    for file in files:
        with np.load(one / file) as a, np.load(other / file) as b:
            assert a.files == b.files
            assert all(np.array_equal(a[key], b[key]) for key in a.files)


def environment(**more: str) -> dict[str, str]:
    """Of a process that finds this package from any folder, on one thread."""
    path = [str(Path(sssd.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    own = {"PYTHONPATH": os.pathsep.join(filter(None, path)), "OMP_NUM_THREADS": "1"}
    return {**os.environ, **own, **more}


def python(code: str, *arguments: object, cwd: Path | None = None) -> subprocess.Popen[str]:
    """A process of its own that runs ``code`` with ``arguments`` in sys.argv."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        cwd=cwd,
    )


def finish(processes: Sequence[subprocess.Popen[str]]) -> list[str]:
    """Wait for processes that must succeed; what each printed."""
    results = [process.communicate(timeout=120) for process in processes]
    for process, (_, errors) in zip(processes, results, strict=True):
        assert process.returncode == 0, errors
    return [printed for printed, _ in results]


def assert_learns(model: Any, losses: Callable[[Any], dict[str, torch.Tensor]]) -> None:
    """In four steps of a loop that knows nothing of the distiller the sum of its losses falls."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.002, momentum=0.9)
    totals = []
    for _ in range(4):
        total = torch.stack(list(losses(model).values())).sum()
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_value_(model.parameters(), 1.0)
        optimizer.step()
        totals.append(total.item())
    assert totals[-1] < totals[0]
