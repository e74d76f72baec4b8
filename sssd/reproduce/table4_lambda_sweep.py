"""Table 4 and Figure 2: final AP and AP over training, for every λ of each method."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import Markdown
from matplotlib.figure import Figure

from ..config import RunConfig
from ..evaluation import METRICS
from ..intervals import Interval, interval
from ..runs import Run
from . import paper, plots, tables
from .experiment import CALIBRATED, Experiment, areas, gain, mean_of, teacher_lead

MEASURES = METRICS[:6]
Groups = Mapping[tuple[str, float], list[Run]]


class Sweep(Experiment):
    """One run for each method, λ and seed, and the plain detector.

    A λ of 0 leaves the teacher's own losses, which reach the student through the head they share.
    """

    lgd_lambdas: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0, 2.5)
    sssd_lambdas: tuple[float, ...] = (25.0, 50.0, 75.0, 100.0, 125.0)
    kl_lambdas: tuple[float, ...] = ()
    detector: str = ""
    backbone: str = ""

    @cached_property
    def lambdas(self) -> dict[str, tuple[float, ...]]:
        """The λ grid of each method that has one."""
        grids = {"lgd": self.lgd_lambdas, "sssd": self.sssd_lambdas, "kl": self.kl_lambdas}
        for method, grid in grids.items():
            if list(grid) != sorted(set(grid)) or any(lam < 0 for lam in grid) or grid == (0.0,):
                shown = ", ".join(f"{lam:g}" for lam in grid)
                raise ValueError(
                    f"{method}_lambdas: {shown}; expected increasing numbers above 0, each once, "
                    "after a 0 or not"
                )
        if not any(grids.values()):
            raise ValueError("sssd_lambdas: empty, as are the others; expected one λ at least")
        return {method: grid for method, grid in grids.items() if grid}

    @cached_property
    def configs(self) -> dict[tuple[str, float], list[RunConfig]]:
        groups = {("baseline", 0.0): self.of_lambda("baseline", None)}
        for method, grid in self.lambdas.items():
            groups |= {(method, lam): self.of_lambda(method, lam) for lam in grid}
        return groups

    def of_lambda(self, method: str, lam: float | None) -> list[RunConfig]:
        """The runs of a method and a fixed λ, one a seed."""
        model = {"detector": self.detector or None, "backbone": self.backbone or None}
        return self.configure(method=method, lambda1=lam, **model)

    def of(self, runs: Groups, method: str) -> dict[float, list[Run]]:
        """The runs of a method by λ."""
        return {lam: group for (m, lam), group in runs.items() if m == method}

    def best(self, runs: Groups, method: str) -> float:
        """The λ above 0 of the highest final AP, mean over seeds."""
        return self.ranked(runs, method)[-1]

    def ranked(self, runs: Groups, method: str) -> list[float]:
        """Every λ above 0 of a method, by final AP, the highest last."""
        groups = self.of(runs, method)
        return sorted(filter(None, groups), key=lambda lam: mean_of(groups[lam], "AP"))

    def relative(self, method: str) -> float:
        """What λ is divided by where methods share an axis: the calibrated λ, or the grid's middle."""
        grid = self.lambdas[method]
        return CALIBRATED.get(method, grid[len(grid) // 2])


class Table4(Sweep):
    """Final AP measures for every λ (SSSD, Table 4)."""

    notebook = "table4_lambda_sweep"
    title = "How much λ matters"
    question = (
        "λ weighs the distillation against the detection losses and has to be chosen. How "
        "good does the detector get at each λ, and which method forgives a wrong one? LGD and "
        "SSSD are trained at multiples of the calibrated value, half to two and a half times."
    )

    lgd_lambdas: tuple[float, ...] = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5)

    @cached_property
    def configs(self) -> dict[tuple[str, float], list[RunConfig]]:
        for method in ("lgd", "sssd"):
            if method not in self.lambdas:
                raise ValueError(
                    f"{method}_lambdas: empty; expected one λ at least, as the table sets the best "
                    "SSSD against the best LGD"
                )
        return super().configs

    def table(self, runs: Groups) -> tables.Table:
        """Final measures of every λ; the best AP of each method is marked."""
        rows = []
        for (method, lam), group in runs.items():
            best = method != "baseline" and lam == self.best(runs, method)
            stated = paper.PAPER["ap75"].numbers["sssd"]
            known = method == "sssd" and lam == paper.PAPER["best_lambda"].numbers["lam"]
            rows.append(
                {
                    "method": paper.NAMES[method],
                    "λ": f"{lam:g}" if method != "baseline" else "",
                    "AP [95 %]": tables.bracketed(interval([run.matches() for run in group]))
                    + (" ★" if best else ""),
                    **{m: tables.percent(mean_of(group, m)) for m in MEASURES[1:]},
                    "teacher's AP": (
                        "" if method == "baseline" else tables.percent(mean_of(group, "teacher_AP"))
                    ),
                    "paper, best λ": "★" if known else "",
                    "paper, AP75": f"{stated:g}" if known else "",
                }
            )
        first = next(iter(runs.values()))[0]
        caption = (
            "Final AP measures on the validation images for every λ, in points of 100, mean over "
            f"{self.counted}. ★ marks the highest AP of a method. λ = 0: the teacher's own losses "
            f"alone, which train the head they share. The interval is 95 %, over {self.covers}. AP_S, AP_M and AP_L: {areas(first)}. "
            "The teacher's AP is that of its pyramid through the same head, given the labels of the "
            "validation images. The paper's λ grid is not "
            "known to us; of its values only the best SSSD λ and its AP75 are, on COCO."
        )
        return self.save_table(tables.Table(pd.DataFrame(rows), caption), "table4_lambda_sweep")

    def best_table(self, runs: Groups) -> tables.Table:
        """Best SSSD against best LGD in every measure, with the paper's claim."""
        gains = self._gains(runs)
        theirs = paper.PAPER["ap75"].numbers
        rows = []
        for measure, over in gains.items():
            rows.append(
                {
                    "measure": measure,
                    **{
                        f"{paper.NAMES[m]}, λ = {self.best(runs, m):g}": tables.percent(
                            mean_of(runs[m, self.best(runs, m)], measure)
                        )
                        for m in ("lgd", "sssd")
                    },
                    "SSSD − LGD [95 %]": tables.signed(over),
                    "so SSSD is": tables.verdict(over),
                    "paper: SSSD is": "not higher" if measure == "AP50" else "higher",
                    "paper, LGD": f"{theirs['lgd']:g}" if measure == "AP75" else "",
                    "paper, SSSD": f"{theirs['sssd']:g}" if measure == "AP75" else "",
                }
            )
        caption = (
            "The best λ of SSSD against the best λ of LGD, each chosen by its final AP on the same "
            f"images, which flatters both. Points of 100, mean over {self.counted}; intervals are "
            f"95 %, over {self.covers}. The paper's values are those of Faster R-CNN R-50 on COCO."
        )
        return self.save_table(tables.Table(pd.DataFrame(rows), caption), "table4_best")

    def figure(self, runs: Groups) -> Figure:
        """AP over λ, on one axis for all methods: λ in multiples of the calibrated one."""
        plots.style()
        figure, axes = plt.subplots(figsize=(plots.COLUMN * 1.25, 2.6), layout="constrained")
        plain = interval([run.matches() for run in runs["baseline", 0.0]])
        axes.axhspan(100 * plain.low, 100 * plain.high, color="#eeeeee", zorder=0, linewidth=0)
        axes.axhline(100 * plain.estimate, color="#888888", linewidth=0.9, zorder=1)
        axes.annotate(
            "baseline",
            (0.995, 100 * plain.estimate),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            fontsize=7,
            color="#555555",
        )
        for i, method in enumerate(self.lambdas):
            groups = self.of(runs, method)
            at = [interval([run.matches() for run in group]) for group in groups.values()]
            shift = (
                i - (len(self.lambdas) - 1) / 2
            ) * 0.04  # side by side, so that bars can be read
            plots.draw_intervals(
                axes,
                [lam / self.relative(method) + shift for lam in groups],
                at,
                color=plots.COLOURS[method],
                linestyle=plots.DASHES[method],
                marker=plots.MARKS[method],
                label=paper.NAMES[method],
            )
        axes.set_xlabel(
            "λ ÷ " + ", ".join(f"{self.relative(m):g} ({paper.NAMES[m]})" for m in self.lambdas)
        )
        axes.set_ylabel("final AP (points of 100)")
        axes.legend(frameon=False, loc="best")
        caption = (
            "Final AP over λ, in multiples of the calibrated value, at which LGD's and SSSD's "
            "distillation have equal shares of the loss; at 0, the teacher's own losses alone. Bars and the grey band (the plain "
            f"detector) are 95 % intervals, over {self.covers}."
        )
        return self.save_figure(figure, "table4_lambda_sweep", caption, self.note(plain.images))

    def findings(self, runs: Groups) -> Markdown:
        """Which λ is best, whether the best methods differ, and how much λ matters."""
        said = []
        for method in self.lambdas:
            groups = self.of(runs, method)
            ranked = self.ranked(runs, method)
            worst, best = ranked[0], ranked[-1]
            over = gain(groups[best], runs["baseline", 0.0])
            said.append(
                f"{paper.NAMES[method]}: the highest AP is at λ = {best:g}; against the plain "
                f"detector {tables.signed(over)} points, {tables.verdict(over)}."
            )
            if best != worst:
                spread = gain(groups[best], groups[worst])
                said.append(
                    f"{paper.NAMES[method]}: from its worst λ ({worst:g}) to its best ({best:g}) "
                    f"AP differs by {tables.signed(spread)} points, {tables.verdict(spread)}."
                )
        alone = runs.get(("lgd", 0.0))
        if alone:
            over = gain(alone, runs["baseline", 0.0])
            added = {m: gain(runs[m, self.best(runs, m)], alone) for m in self.lambdas}
            said.append(
                "The teacher's own losses alone (LGD, λ = 0) against the plain detector: "
                f"{tables.signed(over)} points, {tables.verdict(over)}; to that the distillation at "
                "the best λ adds "
                + ", ".join(
                    f"{tables.signed(own)} ({paper.NAMES[m]}, {tables.verdict(own)})"
                    for m, own in added.items()
                )
                + "."
            )
        for method in self.lambdas:
            best = self.best(runs, method)
            lead = teacher_lead(runs[method, best])
            said.append(
                f"{paper.NAMES[method]} at λ = {best:g}: the teacher, given the labels, against its "
                f"student: AP {tables.signed(lead)} points, {tables.verdict(lead)}."
            )
        gains = self._gains(runs)
        higher = [m for m, g in gains.items() if tables.verdict(g) == "higher"]
        lower = [m for m, g in gains.items() if tables.verdict(g) == "lower"]
        said.append(
            f"Best SSSD against best LGD: AP {tables.signed(gains['AP'])}, AP75 "
            f"{tables.signed(gains['AP75'])} points; higher in {', '.join(higher) or 'none'}, "
            f"lower in {', '.join(lower) or 'none'} of the six measures."
        )
        return self.conclude(runs, said)

    def _gains(self, runs: Groups) -> dict[str, Interval]:
        ours, theirs = (runs[method, self.best(runs, method)] for method in ("sssd", "lgd"))
        return {measure: gain(ours, theirs, measure) for measure in MEASURES}
