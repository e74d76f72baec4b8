"""The teacher along training: where it leads, what its pull is worth."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from sssd.intervals import Interval
from sssd.reproduce import plots, teaching
from sssd.runs import Run

TIMES = [100, 200, 300, 400]


def run(**columns: list[float]) -> Run:
    """A run's evaluations; its matches are known by their iteration."""
    frame = pd.DataFrame({"iteration": TIMES, **columns})
    config = SimpleNamespace(milestones=(300, 400))
    made = SimpleNamespace(config=config, evaluations=lambda: frame, matches=lambda t: t)
    return cast(Run, made)


LATE = run(
    AP=[0.2, 0.3, 0.4, 0.5],
    AP50=[0.4, 0.5, 0.6, 0.7],
    teacher_AP=[0.1, 0.25, 0.45, 0.4],
    teacher_AP50=[0.1, 0.425, 0.6, 0.65],
)
UNKNOWN = run(AP=[0.2, 0.3, 0.4, 0.5], AP50=[0.4, 0.5, 0.6, 0.7])


def test_evaluations_without_a_teacher_are_left_out() -> None:
    nan = float("nan")
    last = run(teacher_AP=[nan, nan, nan, 0.4])
    assert teaching.curve([last], "teacher_AP").to_dict() == {400: 0.4}
    assert teaching.curve([LATE, last], "teacher_AP").to_dict()[300] == 0.45
    assert len(teaching.curve([UNKNOWN], "teacher_AP")) == 0
    _, ((axes,),) = plots.panels(1, 1, (3, 2))
    teaching.draw_teacher(axes, [UNKNOWN], "AP", "black", "teacher")
    assert not axes.lines
    teaching.draw_teacher(axes, [last], "AP", "black", "teacher")
    assert axes.lines[0].get_ydata().tolist() == [40.0]  # type: ignore[union-attr]
    plt.close("all")


def pulls(monkeypatch: pytest.MonkeyPatch, **gains: float) -> None:
    """Let the pull be worth so much (in points, with an interval of ± 1) at an iteration."""

    def difference(ours: list[Any], theirs: list[Any]) -> Interval:
        assert ours == theirs
        gain = gains[f"t{ours[0]}"]
        return Interval(gain / 100, (gain - 1) / 100, (gain + 1) / 100, 2, 200)

    monkeypatch.setattr(teaching, "difference", difference)


def test_the_story_of_a_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    pulls(monkeypatch, t300=2.3, t400=0.2)
    assert teaching.story("LGD (λ = 1)", [LATE], [UNKNOWN], "λ = 0") == [
        "Teacher of LGD (λ = 1): 85 % of its student's AP50 first at iteration 200; a higher AP at 1 "
        "of 4 evaluations, first at iteration 300. The student's AP against λ = 0: +2.3 [+1.3, +3.3] "
        "points, higher (iteration 300); +0.2 [−0.8, +1.2] points, no clear difference (iteration "
        "400).",
    ]
    assert teaching.story("LGD", [UNKNOWN], [UNKNOWN], "λ = 0") == []


@pytest.mark.parametrize(
    ("others", "limits", "told"),
    [
        ([62.0, 64.0], (60.0, 70.0), None),
        ([55.0], (55.0, 70.0), None),
        ([8.0, 13.0], (58.5, 71.5), "teacher below: 8 to 13"),
        ([88.0, 90.0], (58.5, 71.5), "teacher above: 88 to 90"),
        ([8.0, 90.0], (58.5, 71.5), "teacher outside: 8 to 90"),
    ],
)
def test_what_is_far_away_is_told_and_does_not_press_a_figure_flat(
    others: list[float], limits: tuple[float, float], told: str | None
) -> None:
    _, ((axes, other),) = plots.panels(1, 2, (3, 2), sharey=True)
    plots.frame([axes, other], [60.0, 70.0], [others, []])
    low, high = axes.get_ylim()
    assert (low, high) == pytest.approx(limits, abs=1.0)
    assert [text.get_text() for text in axes.texts] == ([told] if told else [])
    assert not other.texts
    plt.close("all")
