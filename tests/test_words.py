"""Numbers, intervals and lists as text."""

from __future__ import annotations

import html
import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from helpers import tiny, write_coco
from nbconvert import HTMLExporter
from nbformat.v4 import new_markdown_cell, new_notebook

from sssd.intervals import Interval
from sssd.profiles import open_data
from sssd.reproduce import plots, words


def interval(low: float, high: float, seeds: int = 3) -> Interval:
    return Interval((low + high) / 2, low, high, seeds, 200)


@pytest.mark.parametrize(
    ("difference", "said"),
    [
        (interval(0.001, 0.01), "higher"),
        (interval(-0.01, -0.001), "lower"),
        (interval(-0.01, 0.02), "no clear difference"),
        (interval(float("nan"), float("nan")), "not known"),
    ],
)
def test_direction_says_what_the_interval_allows(difference: Interval, said: str) -> None:
    assert words.direction(difference) == said


def test_numbers_in_points() -> None:
    assert words.signed(interval(-0.01, 0.02)) == "+0.5 [−1.0, +2.0]"
    one_image = Interval(0.005, float("nan"), float("nan"), 1, 1)
    assert words.signed(one_image) == "+0.5" and words.bracketed(one_image) == "0.5"
    assert words.compared(one_image) == "+0.5 points, not known"
    assert words.bracketed(interval(0.2, 0.3)) == "25.0 [20.0, 30.0]"
    assert words.signed(interval(-0.0004, 0.0012)) == "0.0 [0.0, +0.1]"
    assert words.percent(0.4405) == "44.0" and words.percent(float("nan")) == ""


def test_lists_plurals_and_durations() -> None:
    assert words.listed(["a", "b", "c"]) == "a, b and c"
    assert words.listed([1]) == "1" and words.listed([]) == ""
    assert words.counted(1, "run") == "1 run" and words.counted(1200, "run") == "1,200 runs"
    assert words.duration(89) == "89 s" and words.duration(600) == "10 min"
    assert words.duration(5400) == "1.5 h"


def test_a_weight_names_the_step(tmp_path: Path) -> None:
    data = open_data("smoke", write_coco(tmp_path / "data"))
    assert words.weight(tiny(data, method="sssd", lambda1=75)) == "75"
    assert words.weight(tiny(data, method="sssd", lambda1=75, lambda2=100)) == "75 → 100"
    assert words.weight(tiny(data, method="lgd", lambda1=0.5)) == "0.5"


def test_markdown_shows_every_name_as_it_is() -> None:
    name = "$x_{$ <script>alert(1)</script> &lt; [a](javascript:b) `c` [1.0, 2.0]"
    page = HTMLExporter().from_notebook_node(
        new_notebook(cells=[new_markdown_cell(words.markdown(name))])
    )[0]
    shown = html.unescape(re.sub(r"<[^>]*>", "", page.partition("<main>")[2] or page))
    assert name in shown and "<script>alert" not in page and 'javascript:b"' not in page


def test_no_name_breaks_a_figure() -> None:
    figure = plt.figure()
    plots.mark(figure, "mini · $\\frac$ and $x_{$", smoke=False)
    figure.draw_without_rendering()
    plt.close(figure)
