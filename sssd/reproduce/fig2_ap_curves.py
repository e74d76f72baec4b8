"""Figure 2: AP over training, for every λ of each method."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from IPython.display import Markdown
from matplotlib.figure import Figure
from pydantic import Field

from ..config import RunConfig
from ..intervals import difference, interval
from ..runs import Run
from . import paper, plots, tables
from .experiment import evaluated
from .table4_lambda_sweep import MEASURES, Groups, Sweep


class Fig2(Sweep):
    """AP over the iterations for every λ (SSSD, Fig. 2)."""

    notebook = "fig2_ap_curves"
    title = "AP over training, for every λ"
    question = (
        "Is the order of the methods at the end that of the whole training, or an accident of "
        "the last evaluation? The runs of the sweep, followed by their evaluations."
    )

    measures: tuple[str, ...] = Field(MEASURES, min_length=1)

    @cached_property
    def configs(self) -> dict[tuple[str, float], list[RunConfig]]:
        for measure in self.measures:
            if measure not in MEASURES:
                raise ValueError(
                    f"measures: {measure!r} is not valid; expected {', '.join(MEASURES)}"
                )
        return super().configs

    def figure(self, runs: Groups) -> Figure:
        """Small multiples: a row a measure, a column a method, a line a λ."""
        plots.style()
        methods = list(self.lambdas)
        rows = len(self.measures)
        figure, axes = plt.subplots(
            rows,
            len(methods),
            figsize=(plots.COLUMN * len(methods), 0.5 + 1.25 * rows),
            sharex=True,
            sharey="row",
            squeeze=False,
            layout="constrained",
        )
        images = 0
        for column, method in enumerate(methods):
            groups = self.of(runs, method)
            colours = sns.color_palette("viridis", len(groups) + 1)[:-1]  # its yellow is too pale
            for row, measure in enumerate(self.measures):
                panel = axes[row, column]
                for i, (lam, group) in enumerate(groups.items()):
                    look = {"color": colours[i], "linestyle": plots.CYCLE[i % len(plots.CYCLE)]}
                    curve = self.curve(group, measure)
                    panel.plot(
                        curve.index, 100 * curve, linewidth=1.1, label=f"λ = {lam:g}", **look
                    )
                    end = interval([run.matches(measure=measure) for run in group], replicates=200)
                    images = end.images
                    last = float(curve.index[-1])
                    x = last * (1.03 + 0.025 * i)  # beside the end, so that bars can be read
                    plots.draw_intervals(panel, [x], [end], marker="o", **look)
                plain = self.curve(runs["baseline", 0.0], measure)
                panel.plot(plain.index, 100 * plain, color="#999999", linewidth=0.9, zorder=1)
                panel.axvline(group[0].config.milestones[0], color="#bbbbbb", linewidth=0.7)
                if column == 0:
                    panel.set_ylabel(measure)
            axes[0, column].set_title(paper.NAMES[method])
            axes[-1, column].set_xlabel("iteration")
            axes[-1, column].legend(
                frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.45), ncols=3, fontsize=7
            )
        figure.supylabel("points of 100", fontsize=8)
        caption = (
            "AP measures on the validation images over training, in points of 100, mean over "
            f"{self.counted}, for every λ; grey: the plain detector; vertical line: first decay of "
            f"the learning rate. The bars beside the end are 95 % intervals of the final values, "
            f"over {self.covers}."
        )
        return self.save_figure(figure, "fig2_ap_curves", caption, self.note(images))

    def findings(self, runs: Groups) -> Markdown:
        """Whether the best SSSD is ahead of the best LGD at the evaluations after the first decay."""
        said = []
        if {"lgd", "sssd"} <= self.lambdas.keys():
            ours, theirs = (runs[m, self.best(runs, m)] for m in ("sssd", "lgd"))
            late = [t for t in evaluated(ours[0]) if t > ours[0].config.milestones[0]]
            gains = [
                difference([r.matches(t) for r in ours], [r.matches(t) for r in theirs])
                for t in late
            ]
            mean = difference(
                [[r.matches(t) for t in late] for r in ours],
                [[r.matches(t) for t in late] for r in theirs],
            )
            ahead = sum(over.estimate > 0 for over in gains)
            sure = sum(tables.verdict(over) == "higher" for over in gains)
            said.append(
                f"Best SSSD (λ = {self.best(runs, 'sssd'):g}) is ahead of best LGD "
                f"(λ = {self.best(runs, 'lgd'):g}) in AP at {ahead} of the {len(late)} evaluations "
                f"after the first decay, beyond its interval at {sure}; on their mean "
                f"{tables.signed(mean)} points, {tables.verdict(mean)}."
            )
        for method in self.lambdas:
            group = runs[method, self.best(runs, method)]
            t1 = max(t for t in evaluated(group[0]) if t <= group[0].config.milestones[0])
            since = difference([run.matches() for run in group], [run.matches(t1) for run in group])
            said.append(
                f"{paper.NAMES[method]} at its best λ: AP changes by {tables.signed(since)} points "
                f"from iteration {t1} to the end, {tables.verdict(since)}."
            )
        return self.conclude(runs, said)

    @staticmethod
    def curve(group: list[Run], measure: str) -> Any:
        """Mean over seeds of a measure by iteration."""
        columns = [run.evaluations().set_index("iteration")[measure] for run in group]
        return pd.concat(columns, axis=1).mean(axis=1)
