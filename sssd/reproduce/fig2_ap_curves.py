"""Figure 2: AP over training, for every λ of each method."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import pandas as pd
import seaborn as sns
from pydantic import Field

from ..config import RunConfig
from ..intervals import difference, interval
from ..runs import Run
from . import plots
from .experiment import MEASURES, Findings, evaluated
from .paper import NAMES
from .table4_lambda_sweep import Groups, Sweep
from .words import compared, verdict


class Fig2(Sweep):
    """AP over the iterations for every λ (SSSD, Fig. 2)."""

    notebook = "fig2_ap_curves"
    title = "AP over training, for every λ"
    question = (
        "Are the methods in the same order throughout training as at its end, or is the end an "
        "accident of the last evaluation? The runs of the λ sweep are followed through all of "
        "their evaluations."
    )

    measures: tuple[str, ...] = Field(MEASURES, min_length=1)

    @cached_property
    def configs(self) -> dict[tuple[str, float], list[RunConfig]]:
        for measure in self.measures:
            if measure not in MEASURES:
                known = ", ".join(MEASURES)
                raise ValueError(f"measures: {measure!r} is not valid; expected {known}")
        return super().configs

    def figure(self, runs: Groups) -> plots.Plot:
        """Small multiples: a row for each measure, a column for each method, a line for each λ."""
        rows, columns = len(self.measures), len(self.lambdas)
        size = (plots.COLUMN * columns, 0.5 + 1.25 * rows)
        figure, axes = plots.panels(rows, columns, size, sharex=True, sharey="row")
        images = 0
        for column, method in enumerate(self.lambdas):
            groups = self.of(runs, method)
            colours = sns.color_palette("viridis", len(groups) + 1)[:-1]  # its yellow is too pale
            for panel, measure in zip(axes[:, column], self.measures, strict=True):
                for i, (lam, group) in enumerate(groups.items()):
                    look = {"color": colours[i], "linestyle": plots.CYCLE[i % len(plots.CYCLE)]}
                    curve = _curve(group, measure)
                    label = f"λ = {lam:g}"
                    panel.plot(curve.index, 100 * curve, linewidth=1.1, label=label, **look)
                    end = interval([run.matches(measure=measure) for run in group], replicates=200)
                    images = end.images
                    x = float(curve.index[-1]) * (1.03 + 0.025 * i)  # side by side, after the end
                    plots.draw_intervals(panel, [x], [end], marker="o", **look)
                plain = _curve(runs["baseline", 0.0], measure)
                panel.plot(plain.index, 100 * plain, color="#999999", linewidth=0.9, zorder=1)
                panel.axvline(group[0].config.milestones[0], color="#bbbbbb", linewidth=0.7)
            axes[0, column].set_title(NAMES[method])
            below = axes[-1, column]
            below.set_xlabel("iteration")
            place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.45)}
            below.legend(frameon=False, ncols=3, fontsize=7, **place)
        for panel, measure in zip(axes[:, 0], self.measures, strict=True):
            panel.set_ylabel(measure)
        figure.supylabel("points of 100", fontsize=8)
        caption = (
            "AP measures on the validation images over training, in points of 100, mean over "
            f"{self.over_seeds}, for every λ. Grey: the plain detector; vertical line: first decay "
            "of the learning rate. The bars after the end are 95 % intervals of the final values, "
            f"over {self.covers}."
        )
        return self.plot("fig2_ap_curves", figure, caption, self.note(images))

    def findings(self, runs: Groups) -> Findings:
        """Whether the best SSSD is ahead of the best LGD at the evaluations after the first decay."""
        said = []
        if {"lgd", "sssd"} <= self.lambdas.keys():
            ours, theirs = (runs[m, self.best(runs, m)] for m in ("sssd", "lgd"))
            late = [t for t in evaluated(ours[0]) if t > ours[0].config.milestones[0]]
            gains = [
                difference([r.matches(t) for r in ours], [r.matches(t) for r in theirs])
                for t in late
            ]
            mine, other = ([[r.matches(t) for t in late] for r in g] for g in (ours, theirs))
            ahead = sum(over.estimate > 0 for over in gains)
            sure = sum(verdict(over) == "higher" for over in gains)
            said.append(
                f"The best SSSD (λ = {self.best(runs, 'sssd'):g}) is ahead of the best LGD "
                f"(λ = {self.best(runs, 'lgd'):g}) in AP at {ahead} of the {len(late)} evaluations "
                f"after the first decay, at {sure} of them with an interval above 0. Mean of these "
                f"evaluations: {compared(difference(mine, other))}."
            )
        for method in self.lambdas:
            group = runs[method, self.best(runs, method)]
            t1 = max(t for t in evaluated(group[0]) if t <= group[0].config.milestones[0])
            since = difference([run.matches() for run in group], [run.matches(t1) for run in group])
            said.append(
                f"{NAMES[method]} at its best λ: from iteration {t1} to the end AP changes by "
                f"{compared(since)}."
            )
        return Findings(tuple(said))


def _curve(group: list[Run], measure: str) -> Any:
    """Mean over seeds of a measure, by iteration."""
    columns = [run.evaluations().set_index("iteration")[measure] for run in group]
    return pd.concat(columns, axis=1).mean(axis=1)
