"""Table 4: final AP for every λ of each method; and the sweep of λ that three notebooks share."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import pandas as pd

from ..config import RunConfig
from ..intervals import Interval
from ..runs import Run
from . import plots
from .experiment import (
    CALIBRATED,
    MEASURES,
    Experiment,
    Findings,
    areas,
    final,
    gain,
    mean_of,
    points,
    teacher_lead,
)
from .paper import NAMES, PAPER
from .tables import Table
from .verdicts import Verdict, main_comparison, robustness
from .words import bracketed, compared, listed, percent, signed, verdict

Groups = Mapping[tuple[str, float], list[Run]]
"""Runs by method and λ, one for each seed; the plain detector is ("baseline", 0)."""
PLAIN = ("baseline", 0.0)
GRID = {"lgd_lambdas": (0.5, 1.0, 1.5, 2.0, 2.5), "sssd_lambdas": (25.0, 50.0, 75.0, 100.0, 125.0)}
"""Multiples of the calibrated λ, half to two and a half; the paper's own grid is not known."""
SHORT = {name: grid[:4] for name, grid in GRID.items()}
"""The same as far as twice the calibrated λ, for a profile that has to be done in an hour."""


class Sweep(Experiment):
    """One run for each method, λ and seed, and the plain detector.

    A λ of 0 leaves the teacher's own losses, which reach the student through the head they share.
    """

    at = {"mini": SHORT, "night": {"seeds": (0, 1, 2)}}  # noqa: RUF012 (a ClassVar of Experiment)
    lgd_lambdas: tuple[float, ...] = GRID["lgd_lambdas"]
    sssd_lambdas: tuple[float, ...] = GRID["sssd_lambdas"]
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
            raise ValueError("sssd_lambdas: empty, as are the others; expected at least one λ")
        return {method: grid for method, grid in grids.items() if grid}

    @cached_property
    def configs(self) -> dict[tuple[str, float], list[RunConfig]]:
        groups = {PLAIN: self.of_lambda("baseline", None)}
        for method, grid in self.lambdas.items():
            groups |= {(method, lam): self.of_lambda(method, lam) for lam in grid}
        return groups

    def of_lambda(self, method: str, lam: float | None) -> list[RunConfig]:
        """The runs of a method and a fixed λ, one for each seed."""
        model = {"detector": self.detector or None, "backbone": self.backbone or None}
        return self.configure(method=method, lambda1=lam, **model)

    def of(self, runs: Groups, method: str) -> dict[float, list[Run]]:
        """The runs of a method by λ."""
        return {lam: group for (m, lam), group in runs.items() if m == method}

    def ranked(self, runs: Groups, method: str) -> list[float]:
        """Every λ above 0 of a method by final AP, mean over seeds, the highest last."""
        groups = self.of(runs, method)
        return sorted(filter(None, groups), key=lambda lam: mean_of(groups[lam], "AP"))

    def best(self, runs: Groups, method: str) -> float:
        """The λ above 0 of the highest final AP."""
        return self.ranked(runs, method)[-1]

    def highest(self, runs: Groups, method: str) -> float:
        """The λ of the highest final AP, 0 included."""
        groups = self.of(runs, method)
        return max(groups, key=lambda lam: mean_of(groups[lam], "AP"))


WITH_CONTROL = (0.0, *GRID["lgd_lambdas"])
"""LGD's grid, and the teacher without distillation."""
SWEPT = Sweep.at | {"mini": SHORT | {"lgd_lambdas": (0.0, *SHORT["lgd_lambdas"])}}


class Table4(Sweep):
    """Final AP measures for every λ (SSSD, Table 4)."""

    notebook = "table4_lambda_sweep"
    title = "How much λ matters"
    question = (
        "λ weighs the distillation against the detection losses and has to be chosen. How "
        "good does the detector get at each λ, and which method forgives a wrong one? LGD and "
        "SSSD are trained at multiples of the calibrated value, half to two and a half times."
    )

    at = SWEPT
    lgd_lambdas: tuple[float, ...] = WITH_CONTROL

    @cached_property
    def configs(self) -> dict[tuple[str, float], list[RunConfig]]:
        for method in ("lgd", "sssd"):
            if method not in self.lambdas:
                raise ValueError(
                    f"{method}_lambdas: empty; expected at least one λ, as the table compares the "
                    "best SSSD with the best LGD"
                )
        return super().configs

    def table(self, runs: Groups) -> Table:
        """Final measures of every λ; the best AP of each method is marked."""
        rows = []
        for (method, lam), group in runs.items():
            taught = method != "baseline"
            star = " ★" if taught and lam == self.highest(runs, method) else ""
            known = method == "sssd" and lam == PAPER["best_lambda"].numbers["lam"]
            rows.append(
                {
                    "method": NAMES[method],
                    "λ": f"{lam:g}" if taught else "",
                    "AP [95 %]": bracketed(final(group)) + star,
                    **points(group, *MEASURES[1:]),
                    "teacher's AP": percent(mean_of(group, "teacher_AP")) if taught else "",
                    "paper, best λ": "★" if known else "",
                    "paper, AP75": f"{PAPER['ap75'].numbers['sssd']:g}" if known else "",
                }
            )
        caption = (
            "Final AP measures on the validation images for every λ, in points of 100, mean over "
            f"{self.over_seeds}. ★ marks the highest AP of a method, λ = 0 included. At λ = 0 the teacher's own "
            "losses train the head that it shares with the student, and nothing is distilled. The "
            f"interval is 95 %, over {self.covers}. AP_S, AP_M and AP_L: "
            f"{areas(runs[PLAIN][0])}. The teacher's AP is that of its pyramid through the same "
            "head, given the labels of the validation images. The paper's λ grid is not known to "
            "us; of its values only the best SSSD λ and its AP75 are, on COCO."
        )
        return Table("table4_lambda_sweep", pd.DataFrame(rows), caption)

    def best_table(self, runs: Groups) -> Table:
        """Best SSSD against best LGD in every measure, with the paper's claim."""
        theirs = PAPER["ap75"].numbers
        best = {f"{NAMES[m]}, λ = {lam:g}": runs[m, lam] for m, lam in self._best_two(runs)}
        rows = []
        for measure, over in self._gains(runs).items():
            cells = {name: percent(mean_of(group, measure)) for name, group in best.items()}
            rows.append(
                {
                    "measure": measure,
                    **cells,
                    "SSSD − LGD [95 %]": signed(over),
                    "SSSD is": verdict(over),
                    "paper: SSSD is": "not higher" if measure == "AP50" else "higher",
                    "paper, LGD": f"{theirs['lgd']:g}" if measure == "AP75" else "",
                    "paper, SSSD": f"{theirs['sssd']:g}" if measure == "AP75" else "",
                }
            )
        caption = (
            "The best λ of SSSD against the best λ of LGD, each chosen by its final AP on the same "
            f"images, which flatters both. Points of 100, mean over {self.over_seeds}; intervals "
            f"are 95 %, over {self.covers}. The paper's values are those of Faster R-CNN R-50 on "
            "COCO."
        )
        return Table("table4_best", pd.DataFrame(rows), caption)

    def figure(self, runs: Groups) -> plots.Plot:
        """AP over λ, on one axis for all methods: λ in multiples of the calibrated one."""
        figure, ((axes,),) = plots.panels(1, 1, (plots.COLUMN * 1.25, 2.6))
        plain = final(runs[PLAIN])
        if plain.known:
            axes.axhspan(100 * plain.low, 100 * plain.high, color="#eeeeee", zorder=0, linewidth=0)
        axes.axhline(100 * plain.estimate, color="#888888", linewidth=0.9, zorder=1)
        where = {"xycoords": ("axes fraction", "data"), "ha": "left", "va": "center"}
        place = (1.01, 100 * plain.estimate)
        axes.annotate("baseline", place, fontsize=7, color="#555555", **where)
        # KL, of which no calibrated λ is known, is drawn in multiples of the middle of its grid.
        units = {m: CALIBRATED.get(m, grid[len(grid) // 2]) for m, grid in self.lambdas.items()}
        for i, (method, unit) in enumerate(units.items()):
            groups = self.of(runs, method)
            shift = (i - (len(units) - 1) / 2) * 0.04  # side by side, so that bars can be read
            at = [lam / unit + shift for lam in groups]
            values = [final(group) for group in groups.values()]
            look = {**plots.LOOKS[method], "label": NAMES[method]}
            plots.draw_intervals(axes, at, values, **look)
        axes.set_xlabel("λ ÷ " + ", ".join(f"{u:g} ({NAMES[m]})" for m, u in units.items()))
        axes.set_ylabel("final AP (points of 100)")
        under = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.22), "ncols": len(units)}
        axes.legend(frameon=False, **under)
        caption = (
            "Final AP over λ, in multiples of the calibrated value, at which LGD's and SSSD's "
            "distillation have equal shares of the loss; at 0, the teacher's own losses alone. "
            "Bars and the grey band (the plain detector) are 95 % intervals, over "
            f"{self.covers}."
        )
        return self.plot("table4_lambda_sweep", figure, caption, self.note(plain.images))

    def findings(self, runs: Groups) -> Findings:
        """Which λ is best, how much λ matters, what the teacher is worth, and who wins."""
        said, taught = [], []
        for method in self.lambdas:
            groups, ranked, name = self.of(runs, method), self.ranked(runs, method), NAMES[method]
            worst, best = ranked[0], ranked[-1]
            over = gain(groups[best], runs[PLAIN])
            said.append(
                f"{name}: the highest AP is at λ = {best:g}; against the plain detector "
                f"{compared(over)}."
                + (" At λ = 0 it is higher still." if self.highest(runs, method) == 0 else "")
            )
            if best != worst:
                spread = gain(groups[best], groups[worst])
                said.append(
                    f"{name}: from its worst λ ({worst:g}) to its best ({best:g}) AP differs by "
                    f"{compared(spread)}."
                )
            taught.append(
                f"{name} at λ = {best:g}: the teacher, given the labels, against its student: AP "
                f"{compared(teacher_lead(groups[best]))}."
            )
        alone = runs.get(("lgd", 0.0))
        if alone:
            added = {m: gain(runs[m, self.best(runs, m)], alone) for m in self.lambdas}
            each = [f"{NAMES[m]}: {compared(own)}" for m, own in added.items()]
            said += [
                "The teacher's own losses alone (LGD, λ = 0) against the plain detector: "
                f"{compared(gain(alone, runs[PLAIN]))}.",
                f"Distillation at the best λ against these losses alone: {'; '.join(each)}.",
            ]
        gains = self._gains(runs)
        higher, lower = (
            listed([m for m, g in gains.items() if verdict(g) == word]) or "none"
            for word in ("higher", "lower")
        )
        said += taught
        said.append(
            f"Best SSSD against best LGD: AP {signed(gains['AP'])}, AP75 {signed(gains['AP75'])} "
            f"points; higher in {higher}, lower in {lower} of the six measures."
        )
        return Findings(tuple(said))

    def verdicts(self, runs: Groups) -> tuple[Verdict, ...]:
        """SSSD at the calibrated λ against LGD and the plain detector; and how much λ matters."""
        keys = {"baseline": PLAIN, **{m: (m, lam) for m, lam in CALIBRATED.items()}}
        groups = self.of(runs, "sssd")
        return (
            *main_comparison({m: runs[key] for m, key in keys.items() if key in runs}),
            *robustness({lam: group for lam, group in groups.items() if lam > 0}),
        )

    def _best_two(self, runs: Groups) -> list[tuple[str, float]]:
        return [(method, self.best(runs, method)) for method in ("lgd", "sssd")]

    def _gains(self, runs: Groups) -> dict[str, Interval]:
        lgd, sssd = (runs[key] for key in self._best_two(runs))
        return {measure: gain(sssd, lgd, measure) for measure in MEASURES}
