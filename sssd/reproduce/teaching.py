"""The teacher along training: when it wakes, where it leads, and whether its pull helps then.

A teacher's AP is that of its pyramid through its student's head, given the labels of the validation
images. It is *awake* once it detects objects about as well as its student.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from ..intervals import difference
from ..runs import Run
from .words import signed, verdict

AWAKE = 0.85
"""The share of its student's AP50 that the AP50 of a teacher that is awake has reached."""

OPENINGS = ("The teacher of ", "The pull of ")
"""How the sentences of `story` begin."""


def curve(runs: Sequence[Run], measure: str) -> pd.Series:
    """Mean over seeds of a measure, by iteration; evaluations that lack it are left out."""
    columns = [run.evaluations().set_index("iteration") for run in runs]
    known = [own[measure] for own in columns if measure in own]
    return pd.concat(known, axis=1).mean(axis=1).dropna() if known else pd.Series(dtype=float)


def draw_teacher(axes: Axes, runs: Sequence[Run], measure: str, color: Any, label: str) -> None:
    """The teacher's curve of a measure as a thin line, where it was evaluated."""
    own = curve(runs, f"teacher_{measure}")
    thin: dict[str, Any] = {"linewidth": 0.6, "marker": ".", "markersize": 2.0, "zorder": 1.5}
    if len(own):
        axes.plot(own.index, 100 * own, color=color, label=label, **thin)


def wakes(runs: Sequence[Run]) -> int | None:
    """The first evaluation at which the teacher is awake; None: at none."""
    teacher, student = curve(runs, "teacher_AP50"), curve(runs, "AP50")
    both = pd.concat([teacher, student], axis=1, keys=("teacher", "student")).dropna()
    awake = both[both["teacher"] >= AWAKE * both["student"]]
    return int(awake.index[0]) if len(awake) else None


def story(name: str, runs: Sequence[Run], control: Sequence[Run], against: str) -> list[str]:
    """When the teacher wakes, where it leads, and what its pull is worth before and after.

    Args:
        name: what a sentence calls the method with its λ.
        runs: those of the method, one a seed; all with evaluations at the same iterations.
        control: without the pull: at λ = 0, or the plain detector.
        against: what a sentence calls the control.
    """
    known, awake = len(curve(runs, "teacher_AP50")), wakes(runs)
    if not known:
        return []  # the teacher's AP at the end alone is in the tables
    lead = (curve(runs, "teacher_AP") - curve(runs, "AP")).dropna()
    ahead = [int(t) for t in lead.index[lead > 0]]
    where = f"from {ahead[0]} to {ahead[-1]}" if len(ahead) > 1 else f"at {[*ahead, 0][0]}"
    leads = f" ({where})" if ahead else ""
    woken = (
        f"does not wake: its AP50 is below {100 * AWAKE:.0f} % of its student's at all "
        f"{known} evaluations"
        if awake is None
        else f"is awake from iteration {awake} on, where its AP50 first is {100 * AWAKE:.0f} % of "
        "its student's"
    )
    said = [
        f"{OPENINGS[0]}{name} {woken}. It is ahead of its student in AP at {len(ahead)} of the "
        f"{len(lead)} evaluations{leads}."
    ]
    return [*said, *_pull(name, runs, control, against, awake)]


def _pull(
    name: str, runs: Sequence[Run], control: Sequence[Run], against: str, awake: int | None
) -> list[str]:
    """What the pull is worth at the evaluation before the teacher wakes, at T1, and at the end."""
    config = runs[0].config
    times = [int(t) for t in runs[0].evaluations()["iteration"]]
    before = [t for t in times if awake is None or t < awake][-1:]
    decay = [t for t in times if t <= config.milestones[0]][-1:]
    after = [t for t in (*decay, times[-1]) if awake is not None and t >= awake]
    if awake is None:
        before = [*decay, times[-1]]
    gains = {
        t: difference([run.matches(t) for run in runs], [run.matches(t) for run in control])
        for t in dict.fromkeys([*before, *after])
    }
    parts = [
        f"{'asleep' if t in before else 'awake'}, at iteration {t}, {signed(gain)}"
        for t, gain in gains.items()
    ]
    early, late = ([verdict(gains[t]) for t in part] for part in (before, after))
    helps = ("higher" in early, "higher" in late)
    ends = {
        (False, False): "At none of these does the interval show that it helps.",
        (False, True): "It helps once the teacher is awake"
        + (", and not before." if early else "."),
        (True, True): "It helps before the teacher is awake, too.",
        (True, False): "It helps before the teacher is awake"
        + (" and not after." if late else ", which it is at no evaluation."),
    }
    return [f"{OPENINGS[1]}{name}, AP against {against}: {'; '.join(parts)} points. {ends[helps]}"]
