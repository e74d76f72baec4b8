"""Pictures of what a run detects."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import tiny, write_coco
from PIL import Image
from test_export import finished

from sssd.__main__ import main
from sssd.evaluation import Detections
from sssd.profiles import open_data
from sssd.reproduce.detections import draw_detections
from sssd.runs import Run


def test_picture_of_detections(tmp_path: Path) -> None:
    """Every ground truth is drawn, and of the detections those above the score, on their image."""
    config = tiny(open_data("smoke", write_coco(tmp_path / "data")))
    category = (3, 7)
    found = Detections(
        np.array([1, 1, 2]),
        np.array([category[0], category[1], category[0]]),
        np.array([[1, 2, 30, 40], [5, 5, 9, 9], [0, 0, 8, 8]], np.float32),
        np.array([0.9, 0.1, 0.8], np.float32),
    )
    folder = tmp_path / "run"
    folder.mkdir(parents=True)
    found.save(folder / "detections.npz")
    figure = draw_detections(Run(config, folder), images=2)
    drawn = [[(*p.get_xy(), p.get_width(), p.get_height()) for p in a.patches] for a in figure.axes]
    assert [len(boxes) for boxes in drawn] == [3, 3]  # two objects and one detection each
    assert drawn[0][-1] == (1, 2, 29, 38) and drawn[1][-1] == (0, 0, 8, 8)
    assert [len(axes.texts) for axes in figure.axes] == [1, 1]
    assert "0.90" in figure.axes[0].texts[0].get_text()


def test_no_class_name_breaks_the_picture(tmp_path: Path) -> None:
    folder = write_coco(tmp_path / "data")
    for file in (folder / "annotations").iterdir():
        file.write_text(file.read_text().replace("colour 3", "$x_{$ $\\\\frac$"))
    config = tiny(open_data("smoke", folder))
    found = Detections(*(np.array([n]) for n in (1, 3)), np.ones((1, 4), "f4"), np.ones(1, "f4"))
    (tmp_path / "run").mkdir()
    found.save(tmp_path / "run" / "detections.npz")
    figure = draw_detections(Run(config, tmp_path / "run"), images=1)
    figure.draw_without_rendering()
    assert figure.axes[0].texts[0].get_text() == "$x_{$ $\\frac$ 1.00"


def test_any_image_is_drawn_on_and_told_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_coco(tmp_path / "data")
    run = finished(tiny(data, detector="retinanet"), tmp_path / "runs")
    turned, folder = tmp_path / "turned.jpg", tmp_path / "folder"
    folder.mkdir()
    shutil.copy(data / "val" / "001.png", folder / "a.PNG")
    (folder / "notes.txt").write_text("no image")
    exif = Image.Exif()
    exif[0x0112] = 6  # a viewer shows it upright: 48 wide, 80 high
    Image.fromarray(np.asarray(Image.new("RGB", (80, 48), "red"))).save(turned, exif=exif)
    words = ["--store", str(tmp_path / "runs"), "detect", run.config.id, str(folder), str(turned)]
    to = tmp_path / "to"
    assert main([*words, "--to", str(to), "--score", "0"]) == 0
    found = json.loads((to / "detections.json").read_text())
    assert f"{len(found)} detections with a score of 0 or more drawn" in capsys.readouterr().out
    middle = sorted(about["score"] for about in found)[len(found) // 2]
    all_drawn = (to / "a.png").read_bytes()
    assert main([*words, "--to", str(to), "--score", str(middle)]) == 0
    assert found == json.loads((to / "detections.json").read_text())
    assert (to / "a.png").read_bytes() != all_drawn
    assert {about["file_name"] for about in found} == {str(folder / "a.PNG"), str(turned)}
    assert {about["image_id"] for about in found} == {1, 2}
    for about in found:
        assert about["category"] == f"colour {(3, 7)[about['category_id'] - 1]}"
        x, y, w, h = about["bbox"]
        wide, high = (64, 64) if about["image_id"] == 1 else (48, 80)
        assert 0 <= x <= x + w <= wide + 0.01 and 0 <= y <= y + h <= high + 0.01
    drawn = sum(about["score"] >= middle for about in found)
    assert 0 < drawn < len(found)
    assert f"{drawn} detections with a score of" in capsys.readouterr().out
    with Image.open(to / "a.png") as one, Image.open(to / "turned.png") as other:
        assert one.size == (640, 640) and other.size[1] > other.size[0]

    same = tmp_path / "same" / "turned.jpg"
    same.parent.mkdir()
    shutil.copy(turned, same)
    (tmp_path / "empty").mkdir()
    for more, said in (
        ([str(same)], "expected different names"),
        ([str(tmp_path / "absent.png")], "cannot be read: No such file"),
        ([str(folder / "notes.txt")], "cannot be read: expected one of JPEG"),
        ([str(tmp_path / "empty")], "holds none"),
        (["--score", "40"], "score: 40"),
    ):
        assert main([*words, *more, "--to", str(tmp_path / "other")]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    assert not (tmp_path / "other").exists()
