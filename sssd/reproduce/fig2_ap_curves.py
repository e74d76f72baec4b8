"""Figure 2: AP over training, for every λ of each method."""

from __future__ import annotations

from functools import cached_property

import seaborn as sns
from matplotlib.axes import Axes
from pydantic import Field

from ..config import RunConfig
from ..intervals import Interval, difference, interval
from . import plots
from .experiment import CALIBRATED, MEASURES, Findings, evaluated
from .paper import NAMES
from .table4_lambda_sweep import PLAIN, SWEPT, WITH_CONTROL, Groups, Sweep
from .teaching import curve, draw_teacher, story
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

    at = SWEPT
    lgd_lambdas: tuple[float, ...] = WITH_CONTROL
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
        ends: dict[str, list[Interval]] = {measure: [] for measure in self.measures}
        for column, method in enumerate(self.lambdas):
            for panel, measure in zip(axes[:, column], self.measures, strict=True):
                ends[measure] += self._draw(panel, runs, method, measure)
            axes[0, column].set_title(NAMES[method])
            below = axes[-1, column]
            below.set_xlabel("iteration")
            handles, labels = axes[0, column].get_legend_handles_labels()
            place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.45)}
            below.legend(handles, labels, frameon=False, ncols=3, fontsize=7, **place)
        for panels, measure in zip(axes, self.measures, strict=True):
            panels[0].set_ylabel(measure)
            shown = [curve(group, measure) for group in runs.values()]
            taught = [curve(runs[m, self.told(m)], f"teacher_{measure}") for m in self.lambdas]
            reach = [100 * y for own in shown for y in own]
            reach += [100 * x for end in ends[measure] for x in end.reach]
            far = [100 * y for own in taught for y in own]
            plots.frame(panels[0], reach, far)
        figure.supylabel("points of 100", fontsize=8)
        caption = (
            "AP measures on the validation images over training, in points of 100, mean over "
            f"{self.over_seeds}, for every λ. Grey: the plain detector; vertical line: first decay "
            "of the learning rate. The bars after the end are 95 % intervals of the final values, "
            f"over {self.covers}. The thin line with dots is the teacher, given the labels, of one "
            "λ of each method."
        )
        return self.plot(
            "fig2_ap_curves", figure, caption, self.note(ends[self.measures[0]][0].images)
        )

    def _draw(self, panel: Axes, runs: Groups, method: str, measure: str) -> list[Interval]:
        """One panel; the intervals at its end."""
        groups, ends = self.of(runs, method), []
        colours = sns.color_palette("viridis", len(groups) + 1)[:-1]  # its yellow is too pale
        for i, (lam, group) in enumerate(groups.items()):
            look = {"color": colours[i], "linestyle": plots.CYCLE[i % len(plots.CYCLE)]}
            own = curve(group, measure)
            panel.plot(own.index, 100 * own, linewidth=1.1, label=f"λ = {lam:g}", **look)
            end = interval([run.matches(measure=measure) for run in group], replicates=200)
            ends.append(end)
            x = group[0].config.iterations * (1.03 + 0.025 * i)  # side by side, after the end
            plots.draw_intervals(panel, [x], [end], marker="o", **look)
            if lam == self.told(method):
                draw_teacher(panel, group, measure, colours[i], f"teacher, λ = {lam:g}")
        plain = curve(runs[PLAIN], measure)
        panel.plot(plain.index, 100 * plain, color="#999999", linewidth=0.9, zorder=1)
        decay = next(iter(groups.values()))[0].config.milestones[0]
        panel.axvline(decay, color="#bbbbbb", linewidth=0.7)
        return ends

    def told(self, method: str) -> float:
        """The λ whose teacher is shown: the calibrated one, else the middle of those above 0."""
        grid = [lam for lam in self.lambdas[method] if lam > 0]
        calibrated = CALIBRATED.get(method)
        return calibrated if calibrated in grid else grid[len(grid) // 2]

    def findings(self, runs: Groups) -> Findings:
        """Whether the best SSSD is ahead of the best LGD at the end; and the teachers' story."""
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
            early = [t for t in evaluated(group[0]) if t <= group[0].config.milestones[0]]
            for t1 in early[-1:]:
                since = difference([r.matches() for r in group], [r.matches(t1) for r in group])
                said.append(
                    f"{NAMES[method]} at its best λ: from iteration {t1} to the end AP changes by "
                    f"{compared(since)}."
                )
        alone = runs.get(("lgd", 0.0))
        control = (alone, "λ = 0") if alone else (runs[PLAIN], "the plain detector")
        for method in self.lambdas:
            lam = self.told(method)
            said += story(f"{NAMES[method]} (λ = {lam:g})", runs[method, lam], *control)
        return Findings(tuple(said))
