"""Figure 2: AP over training, for every λ of each method."""

from __future__ import annotations

import re

import seaborn as sns
from matplotlib.axes import Axes
from pydantic import Field

from ..intervals import difference, interval
from . import plots
from .experiment import CALIBRATED, MEASURES, NO_PULL, Findings, Measure, evaluated
from .paper import NAMES
from .table4_lambda_sweep import BASELINE, SWEPT, WITH_CONTROL, Groups, Sweep
from .teaching import curve, draw_teacher, story
from .words import compared


class Fig2(Sweep):
    """AP over the iterations for every λ (SSSD, Fig. 2)."""

    notebook = "fig2_ap_curves"
    title = "AP over training, for every λ"
    question = (
        "Is the order of the methods the same throughout training, or an accident of the last "
        "evaluation? The runs of the λ sweep are followed through all of their evaluations."
    )

    profile_defaults = SWEPT
    lgd_lambdas: tuple[float, ...] = WITH_CONTROL
    measures: tuple[Measure, ...] = Field(MEASURES, min_length=1)

    def figure(self, runs: Groups) -> plots.Plot:
        """Small multiples: a row for each measure, a column for each method, a line for each λ."""
        rows, columns = len(self.measures), len(self.lambdas)
        size = (plots.COLUMN * columns, 0.5 + 1.05 * rows)
        figure, axes = plots.panels(rows, columns, size, sharex=True, sharey="row")
        for row, measure in zip(axes, self.measures, strict=True):
            shown: list[float] = []
            taught = []
            for panel, method in zip(row, self.lambdas, strict=True):
                students, teacher = self._draw(panel, runs, method, measure)
                shown += students
                taught.append(teacher)
            row[0].set_ylabel(re.sub("AP_?(.+)", r"AP$_{\1}$", measure))
            plots.frame(row, shown, taught)
        baseline = runs[BASELINE][0]
        end = baseline.config.iterations
        axes[0, 0].set_xticks([end // 3, end * 2 // 3, end])
        for column, method in zip(axes.T, self.lambdas, strict=True):
            column[0].set_title(NAMES[method])
            column[-1].set_xlabel("iteration")
            place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.45)}
            known = column[0].get_legend_handles_labels()  # the teacher has no AP_S
            column[-1].legend(*known, ncols=3, **place)
        figure.supylabel("points of 100", fontsize=8)
        caption = (
            "AP measures on the validation images over training, mean over "
            f"{self.seeds_in_words}. Vertical line: first decay of the learning rate. Bars after "
            f"the end: 95 % intervals of the final values, over {self.covers}. Thin line with dots: "
            "the teacher, which is given the labels."
        )
        return self.plot("fig2_ap_curves", figure, caption, self.note(baseline))

    def _draw(
        self, panel: Axes, runs: Groups, method: str, measure: str
    ) -> tuple[list[float], list[float]]:
        """Draw a panel; returns what its axis has to show, and the teacher's values, in points."""
        groups, told = self.of(runs, method), self.told(method)
        baseline = 100 * curve(runs[BASELINE], measure)
        panel.plot(baseline.index, baseline, zorder=1, **plots.BASELINE)
        panel.axvline(runs[BASELINE][0].config.milestones[0], color="#bbbbbb", linewidth=0.7)
        colours = sns.color_palette("plasma_r", len(groups) + 1)[1:]  # light to dark
        shown, taught = [*baseline], []
        for i, (lam, group) in enumerate(groups.items()):
            look = {"color": colours[i], "linestyle": plots.CYCLE[i % len(plots.CYCLE)]}
            own = 100 * curve(group, measure)
            panel.plot(own.index, own, linewidth=1.1, label=f"λ = {lam:g}", **look)
            end = interval([run.matches(measure=measure) for run in group], replicates=200)
            x = group[0].config.iterations * (1.03 + 0.025 * i)  # side by side, after the end
            plots.draw_intervals(panel, [x], [end], marker="o", **look)
            shown += [*own, *(100 * y for y in end.reach)]
            if lam == told:
                taught = draw_teacher(panel, group, measure, colours[i], f"teacher, λ = {lam:g}")
        return shown, taught

    def told(self, method: str) -> float:
        """The λ whose teacher is shown: the paper's, else the middle of those above 0."""
        grid = [lam for lam in self.lambdas[method] if lam > 0]
        theirs = CALIBRATED.get(method)
        return theirs if theirs in grid else grid[len(grid) // 2]

    def findings(self, runs: Groups) -> Findings:
        """Whether the best SSSD is ahead of the best LGD at the end, and what the teachers did."""
        said = []
        if {"lgd", "sssd"} <= self.lambdas.keys():
            best = {m: self.ranked(runs, m)[-1] for m in ("sssd", "lgd")}
            ours, theirs = (runs[key] for key in best.items())
            late = [t for t in evaluated(ours[0]) if t > ours[0].config.milestones[0]]
            mine, other = ([[r.matches(t) for t in late] for r in g] for g in (ours, theirs))
            lead = curve(ours, "AP") - curve(theirs, "AP")
            ahead = (lead[lead.index.isin(late)] > 0).sum()
            said.append(
                f"The best SSSD (λ = {best['sssd']:g}) is ahead of the best LGD (λ = "
                f"{best['lgd']:g}) in AP at {ahead} of the {len(late)} evaluations after the first "
                f"decay. Mean difference there: {compared(difference(mine, other))}."
            )
        alone = runs.get(("lgd", 0.0))
        control = (alone, NO_PULL) if alone else (runs[BASELINE], "the baseline")
        for method in self.lambdas:
            lam = self.told(method)
            said += story(f"{NAMES[method]} (λ = {lam:g})", runs[method, lam], *control)
        return Findings(said)
