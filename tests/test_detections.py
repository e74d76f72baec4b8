"""Pictures of what a run detects."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from helpers import tiny, write_coco

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
