"""Table 4: final AP for every λ of each method; and the sweep of λ that three notebooks share."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import pandas as pd
from pydantic import Field

from ..config import RunConfig
from ..runs import Run
from . import plots
from .experiment import (
    CALIBRATED,
    MEASURES,
    Experiment,
    Findings,
    about_measures,
    final,
    gain,
    mean_of,
    measures,
)
from .paper import NAMES, PAPER
from .tables import Table
from .verdicts import Verdict, main_comparison, robustness
from .words import compared, percent, signed, verdict

Groups = Mapping[tuple[str, float], list[Run]]
"""Runs by method and λ, one for each seed; the plain detector is ("baseline", 0)."""
PLAIN = ("baseline", 0.0)
GRID = {"lgd_lambdas": (0.5, 1.0, 1.5, 2.0, 2.5), "sssd_lambdas": (25.0, 50.0, 75.0, 100.0, 125.0)}
"""Multiples of the calibrated λ, half to two and a half; the paper's own grid is not known."""
SHORT = {name: grid[:4] for name, grid in GRID.items()}
"""The same up to twice the calibrated λ, for a profile that has to finish within an hour."""


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
                    f"{method}_lambdas: {shown}; expected increasing numbers above 0, each once; "
                    "a 0 may come before them"
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


WITH_CONTROL = (0.0, *GRID["lgd_lambdas"])
"""LGD's grid, and the teacher without distillation."""
SWEPT = Sweep.at | {"mini": SHORT | {"lgd_lambdas": (0.0, *SHORT["lgd_lambdas"])}}


class Table4(Sweep):
    """Final AP measures for every λ (SSSD, Table 4)."""

    notebook = "table4_lambda_sweep"
    title = "How much λ matters"
    question = (
        "λ weighs the distillation against the detection losses and has to be chosen. How "
        "good does the detector get at each λ, and which method loses less at a wrong one? LGD and "
        "SSSD are trained at multiples of the calibrated λ, from half of it on."
    )

    at = SWEPT
    lgd_lambdas: tuple[float, ...] = Field(WITH_CONTROL, min_length=1)
    sssd_lambdas: tuple[float, ...] = Field(GRID["sssd_lambdas"], min_length=1)

    def table(self, runs: Groups) -> Table:
        """Final measures of every λ; the best AP of each method is marked."""
        rows, theirs = [], PAPER["best_lambda"].numbers["lam"]
        ap = {key: mean_of(group, "AP") for key, group in runs.items()}
        highest = {method: max(x for (m, _), x in ap.items() if m == method) for method, _ in runs}
        for (method, lam), group in runs.items():
            row = {"method": NAMES[method], "λ": f"{lam:g}", **measures(group)}
            if method == "baseline":
                row["λ"] = ""
            elif ap[method, lam] == highest[method]:
                row["AP [95 %]"] += " ★"
            known = method == "sssd" and lam == theirs
            rows.append(
                row | {"paper": f"★, AP75 {PAPER['ap75'].numbers['sssd']:g}" if known else ""}
            )
        caption = (
            f"Final AP measures on the validation images for every λ, in {self.averaged}. ★ marks "
            "the highest AP of a method, λ = 0 included. At λ = 0 the teacher's own losses train the "
            f"head that it shares with the student, and nothing is distilled. {about_measures(runs)} "
            "Of the paper's λ grid and its values, only SSSD's best λ and the AP75 there, on COCO, "
            "are known to us."
        )
        return Table("table4_lambda_sweep", pd.DataFrame(rows), caption)

    def best_table(self, runs: Groups) -> Table:
        """Best SSSD against best LGD in every measure, with the paper's claim."""
        theirs = PAPER["ap75"].numbers
        best = {m: (m, self.ranked(runs, m)[-1]) for m in ("lgd", "sssd")}
        rows = []
        for measure in MEASURES:
            over = gain(runs[best["sssd"]], runs[best["lgd"]], measure)
            row: dict[str, str] = {"measure": measure}
            for method, (_, lam) in best.items():
                row[f"{NAMES[method]}, λ = {lam:g}"] = percent(mean_of(runs[method, lam], measure))
            row |= {"SSSD − LGD [95 %]": signed(over), "SSSD is": verdict(over)}
            row["paper: SSSD is"] = "not higher" if measure == "AP50" else "higher"
            if measure == "AP75":
                row["paper: SSSD is"] += f", {theirs['sssd']:g} − {theirs['lgd']:g}"
            rows.append(row)
        caption = (
            "The best λ of SSSD against the best λ of LGD, each chosen by its final AP on the same "
            f"images, which flatters both; {self.averaged}. The paper's values are those of Faster "
            "R-CNN R-50 on COCO."
        )
        return Table("table4_best", pd.DataFrame(rows), caption)

    def figure(self, runs: Groups) -> plots.Plot:
        """AP over λ, on one axis for all methods: λ in multiples of the calibrated one."""
        figure, ((axes,),) = plots.panels(1, 1, (plots.COLUMN * 1.25, 2.6))
        plain = final(runs[PLAIN])
        low, *_, high = plain.reach
        axes.axhspan(100 * low, 100 * high, color="#eeeeee", zorder=0, linewidth=0)
        axes.axhline(100 * plain.estimate, color="#888888", linewidth=0.9, label="baseline")
        # KL, for which no calibrated λ is known, is drawn in multiples of the middle of its grid.
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
        under = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.22), "ncols": 1 + len(units)}
        axes.legend(**under)
        caption = (
            "Final AP over λ, in multiples of the calibrated value, at which LGD's and SSSD's "
            "distillation have equal shares of the loss; at 0, the teacher's own losses alone. "
            "Bars and the grey band (the plain detector) are 95 % intervals, over "
            f"{self.covers}."
        )
        return self.plot("table4_lambda_sweep", figure, caption, self.note(plain.images))

    def findings(self, runs: Groups) -> Findings:
        """Which λ is best, how much λ matters, and what the teacher's own losses are worth."""
        said, alone = [], runs.get(("lgd", 0.0))
        for method in self.lambdas:
            ranked = self.ranked(runs, method)
            worst, best = ranked[0], ranked[-1]
            group, name = runs[method, best], NAMES[method]
            said.append(
                f"{name}: the highest AP is at λ = {best:g}; against the plain detector "
                f"{compared(gain(group, runs[PLAIN]))}; against its worst λ ({worst:g}) "
                f"{compared(gain(group, runs[method, worst]))}."
            )
            if alone:
                said[-1] += (
                    f" Against the teacher's own losses alone (LGD, λ = 0) "
                    f"{compared(gain(group, alone))}."
                )
        if alone:
            said.append(
                "The teacher's own losses alone (LGD, λ = 0) against the plain detector: "
                f"{compared(gain(alone, runs[PLAIN]))}."
            )
        return Findings(said)

    def verdicts(self, runs: Groups) -> tuple[Verdict, ...]:
        """SSSD at the calibrated λ against LGD and the plain detector; and how much λ matters."""
        keys = {"baseline": PLAIN, **{m: (m, lam) for m, lam in CALIBRATED.items()}}
        groups = self.of(runs, "sssd")
        return (
            *main_comparison({m: runs[key] for m, key in keys.items() if key in runs}),
            *robustness({lam: group for lam, group in groups.items() if lam > 0}),
        )
