"""The teacher during training: when it wakes, where it leads, and what its pull gains.

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
from .experiment import evaluated
from .words import compared

AWAKE = 0.85
"""A teacher is awake once its AP50 has reached this share of its student's."""


def curve(runs: Sequence[Run], measure: str) -> pd.Series:
    """Mean over seeds of a measure, by iteration; evaluations that lack it are left out."""
    columns = [run.evaluations().set_index("iteration") for run in runs]
    known = [own[measure] for own in columns if measure in own]
    return pd.concat(known, axis=1).mean(axis=1).dropna() if known else pd.Series(dtype=float)


def draw_teacher(
    axes: Axes, runs: Sequence[Run], measure: str, color: Any, label: str, start: int = 0
) -> list[float]:
    """Draw the teacher's curve of a measure from ``start`` on; returns its values, in points.

    A ``label`` that begins with an underscore is not in the legend.
    """
    own = 100 * curve(runs, f"teacher_{measure}").loc[start:]
    thin: dict[str, Any] = {"linewidth": 0.6, "marker": ".", "markersize": 2.0, "zorder": 1.5}
    if len(own):
        axes.plot(own.index, own, color=color, label=label, **thin)
    return list(own)


def story(name: str, runs: Sequence[Run], control: Sequence[Run], against: str) -> list[str]:
    """When the teacher wakes, where it leads, and what its pull gains at T1 and at the end.

    Args:
        name: the method with its λ.
        runs: those of the method, one for each seed, all with evaluations at the same iterations.
        control: runs without the pull, for the same seeds.
        against: what a sentence calls the control.
    """
    lead = (curve(runs, "teacher_AP") - curve(runs, "AP")).dropna()
    if not len(lead):
        return []
    ap50 = curve(runs, "teacher_AP50")
    enough = AWAKE * curve(runs, "AP50").reindex(ap50.index)
    woken = ap50.index[(ap50 > 0) & (ap50 >= enough)]
    wakes = f"first at iteration {woken[0]}" if len(woken) else "at no evaluation"
    ahead = lead.index[lead > 0]
    since = f", first at iteration {ahead[0]}" if len(ahead) else ""
    times = evaluated(runs[0])
    decay = [t for t in times if t <= runs[0].config.milestones[0]][-1:]
    gains = []
    for t in dict.fromkeys([*decay, times[-1]]):
        gain = difference([run.matches(t) for run in runs], [run.matches(t) for run in control])
        gains.append(f"{compared(gain)} (iteration {t})")
    return [
        f"Teacher of {name}: {100 * AWAKE:.0f} % of its student's AP50 {wakes}; a higher AP at "
        f"{len(ahead)} of {len(lead)} evaluations{since}. The student's AP against {against}: "
        f"{'; '.join(gains)}."
    ]
