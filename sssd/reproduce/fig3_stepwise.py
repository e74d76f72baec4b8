"""Figure 3: fixed and stepwise λ over the last third of training."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import Markdown
from matplotlib.figure import Figure
from pydantic import Field

from ..config import RunConfig
from ..evaluation import Matches
from ..intervals import difference, interval
from ..runs import Run
from ..schedules import step_lambda
from . import paper, plots, tables
from .experiment import CALIBRATED, Experiment, evaluated, gain, last_third, mean_of, rate

VARIANTS = ("fixed λ1", "fixed λ2", "stepwise")


class Fig3(Experiment):
    """Stepwise against fixed λ over the last third of training (SSSD, Fig. 3)."""

    notebook = "fig3_stepwise"
    title = "Stepwise λ against fixed λ"
    question = (
        "Does it help to step λ up when the learning rate decays? The stepwise run is the run "
        "at λ1 until T1 and forks from it there, so that it differs from the fixed ones in "
        "nothing else."
    )

    lambda1: float = Field(75.0, gt=0)
    lambda2: float = Field(100.0, gt=0)
    lgd_lambda1: float | None = Field(None, gt=0)
    lgd_lambda2: float | None = Field(None, gt=0)
    kl_lambda1: float | None = Field(None, gt=0)
    kl_lambda2: float | None = Field(None, gt=0)
    t1: int | None = Field(None, ge=1)
    methods: tuple[str, ...] = Field(("lgd", "sssd"), min_length=1)
    detector: str = "faster_rcnn"
    backbone: str = ""

    @cached_property
    def configs(self) -> dict[tuple[str, str], list[RunConfig]]:
        groups: dict[tuple[str, str], list[RunConfig]] = {}
        for method in self.methods:
            if method not in ("lgd", "sssd", "kl"):
                raise ValueError(f"methods: {method!r} is not valid; expected lgd, sssd or kl")
            first, second = self.lambda1, self.lambda2
            if method == "lgd":
                share = CALIBRATED["lgd"] / CALIBRATED["sssd"]
                first = self.lgd_lambda1 or first * share
                second = self.lgd_lambda2 or second * share
            if method == "kl":  # of which no calibration is known
                if self.kl_lambda1 is None or self.kl_lambda2 is None:
                    raise ValueError("kl_lambda1, kl_lambda2: missing; KL has no published λ")
                first, second = self.kl_lambda1, self.kl_lambda2
            if first == second:
                raise ValueError(
                    f"lambda2: {self.lambda2:g} gives {paper.NAMES[method]} the same λ as before "
                    f"T1, {first:g}; expected another one, as a step needs two"
                )
            fields: dict[str, Any] = {"method": method, "detector": self.detector}
            if self.backbone:
                fields["backbone"] = self.backbone
            # Built with λ2 even where λ is fixed, so that T1 is checked once and for all.
            for variant, lam in zip(VARIANTS, ((first,), (second,), (first, second)), strict=True):
                groups[method, variant] = self.configure(
                    **fields,
                    lambda1=lam[0],
                    lambda2=lam[1] if len(lam) > 1 else None,
                    t1=self.t1,
                )
        return groups

    def figure(self, runs: Mapping[tuple[str, str], list[Run]]) -> Figure:
        """AP over the last third for the three variants, λ and the learning rate under it."""
        plots.style()
        methods = list(self.methods)
        figure, axes = plt.subplots(
            2,
            len(methods),
            figsize=(plots.COLUMN * len(methods), 3.6),
            sharex=True,
            squeeze=False,
            gridspec_kw={"height_ratios": (2.2, 1)},
            layout="constrained",
        )
        config = next(iter(runs.values()))[0].config
        images = 0
        for column, method in enumerate(methods):
            above = axes[0, column]
            for i, variant in enumerate(VARIANTS):
                group = runs[method, variant]
                times = [t for t in evaluated(group[0]) if t >= last_third(config)]
                at = [interval([run.matches(t) for run in group], replicates=300) for t in times]
                images = at[0].images
                gap = (i - 1) * config.eval_every * 0.12  # side by side, so that bars can be read
                plots.draw_intervals(
                    above,
                    [t + gap for t in times],
                    at,
                    color=plots.COLOURS[variant],
                    linestyle=plots.DASHES[variant],
                    marker=plots.MARKS[variant],
                    label=f"{variant}: {self._lambda(group[0].config)}",
                )
            above.axvline(config.t1, color="#999999", linewidth=0.8)
            above.set_title(paper.NAMES[method])
            above.legend(frameon=False, loc="best")
            shown = config.iterations - last_third(config)
            before = max(last_third(config) - shown // 6, 1)  # so that the step itself is seen
            steps = list(range(before, config.iterations + 1))
            lam = {
                v: [step_lambda(t, c.lambda1, c.lambda2, c.t1) for t in steps]
                for v in VARIANTS
                for c in [runs[method, v][0].config]
            }
            plots.draw_schedule(axes[1, column], steps, lam, [rate(config, t) for t in steps])
        limits = [above.get_ylim() for above in axes[0]]
        for above in axes[0]:
            above.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
        axes[0, 0].set_ylabel("AP (points of 100)")
        caption = (
            "AP on the validation images over the last third of training (above), λ and the "
            "learning rate (below). The grey line is T1. The runs start from the same weights; the "
            f"stepwise run is the λ1 run until T1. Bars are 95 % intervals, over {self.covers}."
        )
        return self.save_figure(figure, "fig3_stepwise", caption, self.note(images))

    def table(self, runs: Mapping[tuple[str, str], list[Run]]) -> tables.Table:
        """Final AP and the mean over the last third, and stepwise against each fixed λ."""
        rows = []
        for method in self.methods:
            ours = [self._last_third(run) for run in runs[method, "stepwise"]]
            for variant in VARIANTS:
                group = runs[method, variant]
                final = interval([run.matches() for run in group])
                row = {
                    "method": paper.NAMES[method],
                    "λ": self._lambda(group[0].config),
                    "AP, final [95 %]": tables.bracketed(final),
                    "AP75, final": tables.percent(mean_of(group, "AP75")),
                    "AP, after T1": tables.percent(
                        interval([self._last_third(run) for run in group], replicates=2).estimate
                    ),
                    "stepwise − this, final": "",
                    "stepwise − this, after T1": "",
                    "so stepwise is": "",
                }
                if variant != "stepwise":
                    after = difference(ours, [self._last_third(run) for run in group])
                    at_end = gain(runs[method, "stepwise"], group)
                    row["stepwise − this, final"] = tables.signed(at_end)
                    row["stepwise − this, after T1"] = tables.signed(after)
                    row["so stepwise is"] = tables.verdict(after)
                rows.append(row)
        caption = (
            f"AP in points of 100. T1 = {runs[self.methods[0], 'stepwise'][0].config.t1}. "
            f"“After T1” is the mean of the evaluations after it. Intervals are 95 %, over {self.covers}. "
            f"Paper: {paper.PAPER['stepwise']}."
        )
        return self.save_table(tables.Table(pd.DataFrame(rows), caption), "fig3_stepwise")

    def findings(self, runs: Mapping[tuple[str, str], list[Run]]) -> Markdown:
        """What the intervals allow to be said of stepwise against fixed λ."""
        said = []
        for method in self.methods:
            ours = [self._last_third(run) for run in runs[method, "stepwise"]]
            for variant in VARIANTS[:2]:
                group = runs[method, variant]
                after = difference(ours, [self._last_third(run) for run in group])
                said.append(
                    f"{paper.NAMES[method]}: stepwise λ against λ = {self._lambda(group[0].config)}, "
                    f"mean AP after T1: {tables.signed(after)} points, {tables.verdict(after)}."
                )
        return self.conclude(runs, said)

    def _last_third(self, run: Run) -> list[Matches]:
        return [run.matches(t) for t in evaluated(run) if t > run.config.t1]

    @staticmethod
    def _lambda(config: RunConfig) -> str:
        return f"{config.lambda1:g}" + (f" → {config.lambda2:g}" if config.stepwise else "")
