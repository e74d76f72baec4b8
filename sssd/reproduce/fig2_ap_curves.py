"""Figure 2: AP over training, for every λ of each method."""

from __future__ import annotations

import seaborn as sns
from matplotlib.axes import Axes
from pydantic import Field

from ..intervals import difference, interval
from . import plots
from .experiment import CALIBRATED, MEASURES, Findings, Measure, evaluated
from .paper import NAMES
from .table4_lambda_sweep import PLAIN, SWEPT, WITH_CONTROL, Groups, Sweep
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

    at = SWEPT
    lgd_lambdas: tuple[float, ...] = WITH_CONTROL
    measures: tuple[Measure, ...] = Field(MEASURES, min_length=1)

    def figure(self, runs: Groups) -> plots.Plot:
        """Small multiples: a row for each measure, a column for each method, a line for each λ."""
        rows, columns = len(self.measures), len(self.lambdas)
        size = (plots.COLUMN * columns, 0.5 + 1.05 * rows)
        figure, axes = plots.panels(rows, columns, size, sharex=True, sharey="row")
        for across, measure in zip(axes, self.measures, strict=True):
            reach: list[float] = []
            far: list[float] = []
            for panel, method in zip(across, self.lambdas, strict=True):
                shown, taught = self._draw(panel, runs, method, measure)
                reach += shown
                far += taught
            across[0].set_ylabel(measure)
            plots.frame(across[0], reach, far)
        for column, method in enumerate(self.lambdas):
            axes[0, column].set_title(NAMES[method])
            axes[-1, column].set_xlabel("iteration")
            place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.45)}
            known = axes[0, column].get_legend_handles_labels()  # the teacher has no AP_S
            axes[-1, column].legend(*known, ncols=3, **place)
        figure.supylabel("points of 100", fontsize=8)
        caption = (
            "AP measures on the validation images over training, in points of 100, mean over "
            f"{self.over_seeds}, for every λ. Grey: the plain detector; vertical line: first decay "
            "of the learning rate. The bars after the end are 95 % intervals of the final values, "
            f"over {self.covers}. The thin line with dots is the teacher, which is given the labels, "
            "for one λ of each method."
        )
        images = len(runs[PLAIN][0].matches().image_ids)
        return self.plot("fig2_ap_curves", figure, caption, self.note(images))

    def _draw(
        self, panel: Axes, runs: Groups, method: str, measure: str
    ) -> tuple[list[float], list[float]]:
        """Draw a panel; returns what its axis has to show, and the teacher's values, in points."""
        groups, told = self.of(runs, method), self.told(method)
        plain = 100 * curve(runs[PLAIN], measure)
        panel.plot(plain.index, plain, color="#999999", linewidth=0.9, zorder=1)
        panel.axvline(runs[PLAIN][0].config.milestones[0], color="#bbbbbb", linewidth=0.7)
        colours = sns.color_palette("viridis", len(groups) + 1)[:-1]  # its yellow is too pale
        shown, taught = [*plain], []
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
        """The λ whose teacher is shown: the calibrated one, else the middle of those above 0."""
        grid = [lam for lam in self.lambdas[method] if lam > 0]
        calibrated = CALIBRATED.get(method)
        return calibrated if calibrated in grid else grid[len(grid) // 2]

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
        control = (alone, "λ = 0") if alone else (runs[PLAIN], "the plain detector")
        for method in self.lambdas:
            lam = self.told(method)
            said += story(f"{NAMES[method]} (λ = {lam:g})", runs[method, lam], *control)
        return Findings(said)
