"""Figures: the same bytes twice, and a smoke run marked as one."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pytest

from sssd.intervals import Interval
from sssd.reproduce import plots


def draw(smoke: bool = False) -> plots.Plot:
    figure, ((axes,),) = plots.panels(1, 1, (3, 2))
    axes.plot([0, 1], label="λ")
    axes.legend()
    plots.mark(figure, "mini · shapes", smoke)
    plt.close(figure)
    return plots.Plot("line", figure, "A line.")


def test_the_same_figure_gives_the_same_files() -> None:
    one, other = draw().files(), draw().files()
    assert one == other and one.keys() == {"line.svg", "line.png"}
    assert one["line.svg"].startswith(b"<?xml") and one["line.png"].startswith(b"\x89PNG")


@pytest.mark.parametrize("smoke", [True, False])
def test_a_smoke_run_is_marked_and_the_source_named(smoke: bool) -> None:
    said = [text.get_text() for text in draw(smoke).figure.texts]
    assert "mini · shapes" in said
    assert any("numbers mean nothing" in text for text in said) == smoke


def test_intervals_are_drawn_in_points() -> None:
    _, ((axes,),) = plots.panels(1, 1, (3, 2))
    value = Interval(0.5, 0.4, 0.7, 3, 200)
    plots.draw_intervals(axes, [2], [value], **plots.LOOKS["lgd"])
    (bar,) = axes.containers
    (ends,) = bar.lines[2][0].get_segments()
    assert ends.ravel().tolist() == pytest.approx([2, 40, 2, 70])
    plt.close("all")
