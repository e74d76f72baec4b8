"""Figure 3: fixed and stepwise λ over the last third of training."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Literal

import pandas as pd
from matplotlib.axes import Axes
from pydantic import Field

from ..config import RunConfig
from ..evaluation import Matches
from ..intervals import Interval, difference
from ..profiles import TEST_IMAGES, folder_of_test_images
from ..runs import Run
from . import plots
from .experiment import CALIBRATED, NO_PULL, Experiment, Findings, evaluated, final, gain
from .paper import NAMES, PAPER
from .tables import Table
from .teaching import curve, draw_teacher, story
from .verdicts import Verdict, decide, main_comparison
from .words import bracketed, compared, counted, percent, signed, weight

VARIANTS = ("fixed λ1", "fixed λ2", "stepwise")
BASELINE = ("baseline", "")
CONTROL = ("lgd", NO_PULL)
Groups = Mapping[tuple[str, str], list[Run]]
"""Runs by method and variant, one for each seed; also `BASELINE` and `CONTROL`."""


class Fig3(Experiment):
    """Stepwise against fixed λ over the last third of training (SSSD, Fig. 3)."""

    notebook = "fig3_stepwise"
    title = "Stepwise λ against fixed λ"
    question = (
        "Does it help to step λ up when the learning rate decays? The stepwise run is a copy of "
        "the run at λ1 until T1 and goes on from there at λ2, so that the two differ in the step "
        "alone."
    )

    profile_defaults = {  # noqa: RUF012
        "night": {"seeds": tuple(range(8))},
        "photographs": {"seeds": (0, 1, 2), "second_seeds": 1},
    }
    lambda1: float = Field(75.0, gt=0)
    lambda2: float = Field(100.0, gt=0)
    lgd_lambda1: float | None = Field(None, gt=0)
    lgd_lambda2: float | None = Field(None, gt=0)
    kl_lambda1: float | None = Field(None, gt=0)
    kl_lambda2: float | None = Field(None, gt=0)
    second_seeds: int = Field(3, ge=1)
    """The fixed λ2 has at most this many seeds, as no verdict rests on it."""
    t1: int | None = Field(None, ge=1)
    methods: tuple[Literal["lgd", "sssd", "kl"], ...] = Field(("lgd", "sssd"), min_length=1)
    detector: str = "faster_rcnn"
    backbone: str = ""

    @cached_property
    def configs(self) -> dict[tuple[str, str], list[RunConfig]]:
        # All have T1, as the table has the AP after it for all.
        shared = {"detector": self.detector, "backbone": self.backbone or None, "t1": self.t1}
        groups = {
            BASELINE: self.configure(method="baseline", **shared),
            CONTROL: self.configure(method="lgd", lambda1=0.0, **shared),
        }
        for method in self.methods:
            first, second = self._lambdas(method)
            own = {**shared, "method": method}
            groups[method, "fixed λ1"] = self.configure(**own, lambda1=first)
            groups[method, "fixed λ2"] = self.configure(**own, lambda1=second)[: self.second_seeds]
            groups[method, "stepwise"] = self.configure(**own, lambda1=first, lambda2=second)
        return groups

    @property
    def test(self) -> bool:
        """Whether the final detectors are compared on the profile's test images."""
        return self.profile in TEST_IMAGES and not self.data

    @property
    def further(self) -> str:
        if not self.test:
            return ""
        images = f"{TEST_IMAGES[self.profile]:,} test images"
        return f"the final detectors of {self.notebook} are evaluated on {images}"

    def train_further(self) -> None:
        if self.test and not self.recorded:  # a report that is drawn again has the matches
            self.store.test(self.needed, folder_of_test_images(self.profile), self.jobs)

    def train(self) -> dict[tuple[str, str], list[Run]]:
        done = super().train()
        self.train_further()
        return done

    def _lambdas(self, method: str) -> tuple[float, float]:
        """λ before and after T1; LGD's follow from SSSD's by the paper's calibration."""
        first, second = self.lambda1, self.lambda2
        if method == "lgd":
            first = self.lgd_lambda1 or _of_lgd(first)
            second = self.lgd_lambda2 or _of_lgd(second)
        if method == "kl":
            if self.kl_lambda1 is None or self.kl_lambda2 is None:
                raise ValueError("kl_lambda1, kl_lambda2: missing; KL has no published λ")
            first, second = self.kl_lambda1, self.kl_lambda2
        if first == second:
            raise ValueError(
                f"lambda2: {self.lambda2:g} gives {NAMES[method]} the same λ as before T1, "
                f"{first:g}; expected another one, as a step needs two"
            )
        return first, second

    def figure(self, runs: Groups) -> plots.Plot:
        """AP over the last third, and below it what each variant gains over the fixed λ1."""
        config = runs[self.methods[0], "stepwise"][0].config
        start = min(config.t1, config.iterations * 2 // 3)
        size = (plots.COLUMN * len(self.methods), 4.6)
        options = {"sharex": True, "sharey": "row", "height_ratios": (3, 2)}
        figure, (above, below) = plots.panels(2, len(self.methods), size, **options)
        students: list[float] = []
        teachers = []
        for method, upper, lower in zip(self.methods, above, below, strict=True):
            values, taught = self._draw_ap(upper, runs, method, start)
            students += values
            teachers.append(taught)
            self._draw_gains(lower, runs, method)
            upper.set_title(NAMES[method])
            lower.set_xlabel("iteration")
            known = upper.get_legend_handles_labels()
            lower.legend(*known, loc="upper center", bbox_to_anchor=(0.5, -0.27), ncols=2)
        plots.frame(above, students, teachers)
        room = 0.3 * config.eval_every  # for marks that stand side by side
        above[0].set_xlim(start - room, config.iterations + room)
        above[0].set_ylabel("AP (points of 100)")
        below[0].set_ylabel("AP minus that of λ1")
        caption = (
            "Above: AP on the validation images over the last third of training, mean over "
            f"{self.seeds_in_words}{self._fewer}. Vertical line: T1, where λ steps; until there the "
            "stepwise run is the λ1 run. Thin lines with dots: the teachers, which are given the "
            "labels. Below: AP minus that of the fixed λ1, paired by seed and image, with 95 % "
            f"intervals over {self.covers}."
        )
        few = f"{self.second_seeds} to {self.seeds_in_words}" if self._fewer else ""
        return self.plot("fig3_stepwise", figure, caption, self.note(runs[BASELINE][0], few))

    def _draw_ap(
        self, axes: Axes, runs: Groups, method: str, start: int
    ) -> tuple[list[float], list[float]]:
        """Draw AP from ``start`` on; returns the students' and the teachers' values, in points."""
        baseline = 100 * curve(runs[BASELINE], "AP").loc[start:]
        axes.plot(baseline.index, baseline, **plots.BASELINE)
        students, teachers = [*baseline], []
        for variant in VARIANTS:
            group, look = runs[method, variant], plots.LOOKS[variant]
            own = 100 * curve(group, "AP").loc[start:]
            label = f"{variant}: {weight(group[0].config)}"
            axes.plot(own.index, own, label=label, markersize=3, linewidth=1.2, **look)
            students += [*own]
            teachers += draw_teacher(axes, group, "AP", look["color"], "_", start)
        t1 = runs[BASELINE][0].config.t1
        axes.axvline(t1, color=plots.GREY, linewidth=0.8)
        axes.text(t1, 0.99, " T1", va="top", fontsize=7, transform=axes.get_xaxis_transform())
        return students, teachers

    def _draw_gains(self, axes: Axes, runs: Groups, method: str) -> None:
        """Draw the AP after T1 minus that of the fixed λ1."""
        config = runs[BASELINE][0].config
        axes.axhline(0, color=plots.LOOKS["fixed λ1"]["color"], linewidth=1, linestyle="--")
        axes.axvline(config.t1, color=plots.GREY, linewidth=0.8)
        times = [t for t in evaluated(runs[BASELINE][0]) if t > config.t1]
        for variant, side in (("fixed λ2", -1), ("stepwise", 1)):
            group = runs[method, variant]
            fixed = runs[method, "fixed λ1"][: len(group)]
            gains = [
                difference([r.matches(t) for r in group], [r.matches(t) for r in fixed])
                for t in times
            ]
            at = [t + side * 0.06 * config.eval_every for t in times]  # side by side
            look = plots.LOOKS[variant] | {"linestyle": "none"}
            plots.draw_intervals(axes, at, gains, **look)

    def table(self, runs: Groups) -> Table:
        """Final AP, its gain over the baseline, and stepwise against each fixed λ."""
        rows = []
        for (method, variant), group in runs.items():
            baseline = runs[BASELINE][: len(group)]
            at_75 = final(group, "AP75", test=self.test).estimate
            after = sum(map(_mean_after_t1, group)) / len(group) / 100
            taught = method != "baseline"
            row = {
                "method": NAMES[method],
                "λ": weight(group[0].config) if taught else "",
                "AP, final [95 %]": bracketed(final(group, test=self.test)),
                "AP75, final": percent(at_75),
                "AP, after T1": percent(after),
                "gain, final": signed(gain(group, baseline, test=self.test)) if taught else "",
            }
            if variant.startswith("fixed"):
                stepwise = runs[method, "stepwise"][: len(group)]
                over = gain(stepwise, group, test=self.test)
                row["stepwise − this, final"] = signed(over)
                row["stepwise − this, after T1"] = signed(_gain_after_t1(stepwise, group))
            rows.append(row)
        images = ""
        if self.test:
            images = (
                f"“Final” is on {TEST_IMAGES[self.profile]:,} test images, by which nothing was "
                "chosen; the rest is on the validation images. "
            )
        caption = (
            f"AP in points of 100, mean over {self.seeds_in_words}{self._fewer}. T1 is iteration "
            f"{runs[BASELINE][0].config.t1}. “After T1” is the mean of the evaluations after it. "
            f"{images}The gain is over the baseline, paired by seed and image. Intervals are 95 %, "
            f"over {self.covers}. Paper: {PAPER['stepwise']}."
        )
        return Table("fig3_stepwise", pd.DataFrame(rows).fillna(""), caption)

    @property
    def _fewer(self) -> str:
        few = len(self.seeds) > self.second_seeds
        return f" (fixed λ2: {counted(self.second_seeds, 'seed')})" if few else ""

    def findings(self, runs: Groups) -> Findings:
        """What the pull gains, SSSD over LGD, and stepwise over fixed λ."""
        where = " on the test images" * self.test
        cost = gain(runs[CONTROL], runs[BASELINE], test=self.test)
        said = [f"{NO_PULL} against the baseline, final AP{where}: {compared(cost)}."]
        taught = []
        for method in self.methods:
            group = runs[method, "fixed λ1"]
            name = f"{NAMES[method]} (λ = {weight(group[0].config)})"
            pull = gain(group, runs[CONTROL], test=self.test)
            said.append(f"{name} against {NO_PULL}, final AP{where}: {compared(pull)}.")
            taught += story(name, group, runs[CONTROL], NO_PULL)
        if {"lgd", "sssd"} <= set(self.methods):
            both = gain(runs["sssd", "fixed λ1"], runs["lgd", "fixed λ1"], test=self.test)
            said.append(f"SSSD against LGD, both at λ1, final AP{where}: {compared(both)}.")
        for (name, variant), group in runs.items():
            if variant.startswith("fixed"):
                over = _gain_after_t1(runs[name, "stepwise"][: len(group)], group)
                said.append(
                    f"{NAMES[name]}: stepwise λ against λ = {weight(group[0].config)}, mean AP "
                    f"after T1: {compared(over)}."
                )
        return Findings([*said, *taught])

    def verdicts(self, runs: Groups) -> tuple[Verdict, ...]:
        """Stepwise against the λ that it steps up from; and SSSD against LGD and the baseline.

        The latter at λ1, if the two methods' λ1 are calibrated to each other.
        """
        said = []
        for method in (m for m in CALIBRATED if m in self.methods):
            ours, theirs = (runs[method, variant] for variant in ("stepwise", "fixed λ1"))
            statement = (
                f"{NAMES[method]}, λ {weight(ours[0].config)} − fixed {weight(theirs[0].config)}, "
                "mean AP after T1"
            )
            each = [
                _mean_after_t1(a) - _mean_after_t1(b) for a, b in zip(ours, theirs, strict=True)
            ]
            over = _gain_after_t1(ours, theirs)
            said.append(decide(f"stepwise_{method}", statement, each, over))
        fixed: dict[str, list[Run]] = {
            m: runs[m, "fixed λ1"] for m in CALIBRATED if m in self.methods
        }
        lambdas = {m: group[0].config.lambda1 for m, group in fixed.items()}
        if len(lambdas) == 2 and lambdas["lgd"] != _of_lgd(lambdas["sssd"]):
            return tuple(said)
        return (*said, *main_comparison({"baseline": runs[BASELINE], **fixed}, self.test))


def _of_lgd(lam: float) -> float:
    """LGD's λ that has the share of SSSD's ``lam``, by the paper's calibration."""
    return lam * CALIBRATED["lgd"] / CALIBRATED["sssd"]


def _mean_after_t1(run: Run) -> float:
    """Mean AP of the evaluations after T1, in points of 100."""
    evaluations = run.evaluations()
    return 100 * float(evaluations.loc[evaluations["iteration"] > run.config.t1, "AP"].mean())


def _after_t1(run: Run) -> list[Matches]:
    return [run.matches(t) for t in evaluated(run) if t > run.config.t1]


def _gain_after_t1(ours: list[Run], theirs: list[Run]) -> Interval:
    """Mean AP of the evaluations after T1, difference paired by seed and image."""
    return difference([_after_t1(run) for run in ours], [_after_t1(run) for run in theirs])
