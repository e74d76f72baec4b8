"""Tables from one source, words that intervals allow, pictures of detections."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import tiny, write_coco

from sssd.evaluation import Detections
from sssd.intervals import Interval
from sssd.profiles import open_data
from sssd.reproduce import paper, plots, tables
from sssd.runs import Run


def interval(low: float, high: float, seeds: int = 3) -> Interval:
    return Interval((low + high) / 2, low, high, seeds, 200)


@pytest.mark.parametrize(
    ("difference", "words"),
    [
        (interval(0.001, 0.01), "higher"),
        (interval(-0.01, -0.001), "lower"),
        (interval(-0.01, 0.02), "no difference beyond seeds"),
        (interval(-0.01, 0.02, seeds=1), "no difference beyond images"),
    ],
)
def test_verdict_says_what_the_interval_allows(difference: Interval, words: str) -> None:
    assert tables.verdict(difference) == words


def test_numbers_in_points() -> None:
    assert tables.signed(interval(-0.01, 0.02)) == "+0.5 [−1.0, +2.0]"
    assert tables.bracketed(interval(0.2, 0.3)) == "25.0 [20.0, 30.0]"
    assert tables.percent(0.4405) == "44.0" and tables.percent(float("nan")) == ""


def test_a_table_in_three_forms(tmp_path: Path) -> None:
    frame = pd.DataFrame({"λ": ["50 → 75", "1"], "AP": ["−0.5", "2 %"]})
    tables.Table(frame, "What λ does.").save(tmp_path, "t")
    assert pd.read_csv(tmp_path / "t.csv", dtype=str).equals(frame)
    assert (tmp_path / "t.md").read_text() == (
        "| λ | AP |\n| --- | --- |\n| 50 → 75 | −0.5 |\n| 1 | 2 % |\n\nWhat λ does.\n"
    )
    latex = (tmp_path / "t.tex").read_text()
    assert r"50 $\to$ 75 & $-$0.5" in latex and r"2 \%" in latex
    assert r"\caption{What $\lambda$ does.}" in latex and r"\label{tab:t}" in latex
    assert latex.isascii()


def test_the_papers_statements_read_as_text_and_as_numbers() -> None:
    assert f"{paper.PAPER['stepwise']}".endswith("about +0.5 % AP, for LGD and for SSSD")
    assert paper.PAPER["ap75"].numbers["sssd"] == 44.1
    assert paper.LGD_RELEASE["fcos", "resnet101"] == 44.0
    assert paper.LABELENC_RELEASE["retinanet", "resnet50"] == (36.4, 38.6)


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
    (folder / "detections").mkdir(parents=True)
    found.save(folder / "detections" / f"{config.iterations:06d}.npz")
    figure = plots.draw_detections(Run(config, folder), images=2)
    drawn = [[(*p.get_xy(), p.get_width(), p.get_height()) for p in a.patches] for a in figure.axes]
    assert [len(boxes) for boxes in drawn] == [3, 3]  # two objects and one detection each
    assert drawn[0][-1] == (1, 2, 29, 38) and drawn[1][-1] == (0, 0, 8, 8)
    assert [len(axes.texts) for axes in figure.axes] == [1, 1]
    assert "0.90" in figure.axes[0].texts[0].get_text()
