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
    NO_PULL,
    Experiment,
    Findings,
    about_measures,
    gain,
    mean_of,
    measures,
)
from .paper import NAMES, PAPER
from .tables import Table
from .verdicts import Verdict, main_comparison, robustness
from .words import compared, direction, percent, signed

Groups = Mapping[tuple[str, float], list[Run]]
"""Runs by method and λ, one for each seed."""
BASELINE = ("baseline", 0.0)
GRID = {"lgd_lambdas": (0.5, 1.0, 1.5, 2.0, 2.5), "sssd_lambdas": (25.0, 50.0, 75.0, 100.0, 125.0)}
"""Multiples of `CALIBRATED`, half to two and a half; the paper's own grid is not known."""
SHORT = {name: grid[:4] for name, grid in GRID.items()}
"""The same up to twice `CALIBRATED`, for a profile that has to finish within an hour."""


class Sweep(Experiment):
    """One run for each method, λ and seed, and the baseline."""

    profile_defaults = {"mini": SHORT, "night": {"seeds": (0, 1, 2)}}  # noqa: RUF012 (a ClassVar)
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
        groups = {BASELINE: self.of_lambda("baseline", None)}
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
"""LGD's grid, with the control."""
SWEPT = Sweep.profile_defaults | {"mini": SHORT | {"lgd_lambdas": (0.0, *SHORT["lgd_lambdas"])}}


class Table4(Sweep):
    """Final AP measures for every λ (SSSD, Table 4)."""

    notebook = "table4_lambda_sweep"
    title = "How much λ matters"
    question = (
        "λ weighs the distillation against the detection losses and has to be chosen. How "
        "good does the detector get at each λ, and which method loses less at a wrong one? LGD and "
        "SSSD are trained at multiples of the paper's λ of equal shares, from half of it on."
    )

    profile_defaults = SWEPT
    lgd_lambdas: tuple[float, ...] = Field(WITH_CONTROL, min_length=1)
    sssd_lambdas: tuple[float, ...] = Field(GRID["sssd_lambdas"], min_length=1)

    def table(self, runs: Groups) -> Table:
        """Final measures of every λ; the best AP of each method is marked."""
        rows, theirs = [], PAPER["best_lambda"].numbers["lam"]
        best = {(method, self.ranked(runs, method)[-1]) for method in self.lambdas}
        for (method, lam), group in runs.items():
            row = {"method": NAMES[method], "λ": f"{lam:g}", **measures(group)}
            if method == "baseline":
                row["λ"] = ""
            elif (method, lam) in best:
                row["AP [95 %]"] += " ★"
            known = method == "sssd" and lam == theirs
            rows.append(
                row | {"paper": f"★, AP75 {PAPER['ap75'].numbers['sssd']:g}" if known else ""}
            )
        caption = (
            f"Final AP measures on the validation images for every λ, in {self.averaged}. ★ marks "
            "the λ above 0 with the highest AP of a method. At λ = 0 the teacher's own losses train "
            f"the head that it shares with the student, and nothing is pulled. {about_measures(runs)} "
            "Of the paper's values of this table, only SSSD's best λ and the AP75 there, on COCO, are "
            "known to us."
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
            row |= {"SSSD − LGD [95 %]": signed(over), "SSSD is": direction(over)}
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
        """What each λ gains over the baseline, on one axis for all methods: λ as a multiple."""
        figure, ((axes,),) = plots.panels(1, 1, (plots.COLUMN * 1.25, 2.6))
        axes.axhline(0, **plots.BASELINE)
        # KL, for which no λ of equal shares is known, has multiples of the middle of its grid.
        units = {m: CALIBRATED.get(m, grid[len(grid) // 2]) for m, grid in self.lambdas.items()}
        for i, (method, unit) in enumerate(units.items()):
            groups = self.of(runs, method)
            shift = (i - (len(units) - 1) / 2) * 0.06  # side by side, so that bars can be read
            at = [lam / unit + shift for lam in groups]
            gains = [gain(group, runs[BASELINE]) for group in groups.values()]
            plots.draw_intervals(axes, at, gains, label=NAMES[method], **plots.LOOKS[method])
        multiples = " or ".join(f"{unit:g} ({NAMES[m]})" for m, unit in units.items())
        axes.set_xlabel(f"λ as a multiple of {multiples}")
        axes.set_ylabel("AP minus the baseline's (points)")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=1 + len(units))
        caption = (
            "Final AP minus the baseline's, paired by seed and image, for every λ, as a multiple of "
            f"{multiples}; in the paper, 1 and 50 give LGD and SSSD equal shares of the loss. At 0 "
            f"nothing is pulled. Bars are 95 % intervals, over {self.covers}."
        )
        return self.plot("table4_lambda_sweep", figure, caption, self.note(runs[BASELINE][0]))

    def findings(self, runs: Groups) -> Findings:
        """Which λ is best, and what it gains over the baseline and over the control."""
        said, control = [], runs.get(("lgd", 0.0))
        for method in self.lambdas:
            best = self.ranked(runs, method)[-1]
            group = runs[method, best]
            against = f"against the baseline {compared(gain(group, runs[BASELINE]))}"
            if control:
                against += f"; against {NO_PULL} {compared(gain(group, control))}"
            said.append(f"{NAMES[method]}: the highest AP is at λ = {best:g}; {against}.")
        if control:
            cost = compared(gain(control, runs[BASELINE]))
            said.append(f"{NO_PULL} against the baseline: {cost}.")
        return Findings(said)

    def verdicts(self, runs: Groups) -> tuple[Verdict, ...]:
        """SSSD against LGD and the baseline at the paper's λ; and how much λ matters."""
        keys = {"baseline": BASELINE, **{m: (m, lam) for m, lam in CALIBRATED.items()}}
        groups = self.of(runs, "sssd")
        return (
            *main_comparison({m: runs[key] for m, key in keys.items() if key in runs}),
            *robustness({lam: group for lam, group in groups.items() if lam > 0}),
        )
