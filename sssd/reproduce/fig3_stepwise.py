"""Figure 3: fixed and stepwise λ over the last third of training."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Literal

import pandas as pd
from pydantic import Field

from ..config import RunConfig
from ..evaluation import Matches
from ..intervals import Interval, difference, interval
from ..profiles import TEST_IMAGES, folder_of_test_images
from ..runs import Run
from . import plots
from .experiment import CALIBRATED, Experiment, Findings, evaluated, final, gain
from .paper import NAMES, PAPER
from .tables import Table
from .teaching import curve, draw_teacher, story
from .verdicts import Verdict, decide, main_comparison
from .words import bracketed, compared, counted, percent, signed, weight

VARIANTS = ("fixed λ1", "fixed λ2", "stepwise")
PLAIN = ("baseline", "plain")
CONTROL = ("lgd", "no pull")
"""The control: LGD's teacher learns through the student's head, and nothing pulls, as λ is 0."""
Groups = Mapping[tuple[str, str], list[Run]]
"""Runs by method and variant, one for each seed; also `PLAIN` and `CONTROL`."""


class Fig3(Experiment):
    """Stepwise against fixed λ over the last third of training (SSSD, Fig. 3)."""

    notebook = "fig3_stepwise"
    title = "Stepwise λ against fixed λ"
    question = (
        "Does it help to step λ up when the learning rate decays? The stepwise run is a copy of "
        "the run at λ1 until T1 and goes on from there at λ2, so that the two differ in the step "
        "alone."
    )

    at = {  # noqa: RUF012
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
        model = {"detector": self.detector, "backbone": self.backbone or None}
        groups = {
            PLAIN: self.configure(method="baseline", **model),
            CONTROL: self.configure(method="lgd", lambda1=0.0, **model),
        }
        for method in self.methods:
            first, second = self._lambdas(method)
            own = {**model, "method": method, "t1": self.t1}  # fixed λ, too, has an AP after T1
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
        images = f"{TEST_IMAGES[self.profile]:,} test images" if self.test else ""
        return f"the final detectors of {self.notebook} are evaluated on {images}" * self.test

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
            share = CALIBRATED["lgd"] / CALIBRATED["sssd"]
            first, second = self.lgd_lambda1 or first * share, self.lgd_lambda2 or second * share
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
        """AP over the last third for the three variants, with the teachers and the plain detector."""
        config = runs[self.methods[0], "stepwise"][0].config
        start = min(config.t1, config.iterations * 2 // 3)
        size = (plots.COLUMN * len(self.methods), 3.2)
        figure, (panels,) = plots.panels(1, len(self.methods), size, sharex=True, sharey=True)
        reach, late = [], []
        for axes, method in zip(panels, self.methods, strict=True):
            for i, variant in enumerate(VARIANTS):
                group, look = runs[method, variant], plots.LOOKS[variant]
                times = [t for t in evaluated(group[0]) if t >= start]
                at = [interval([run.matches(t) for run in group], replicates=300) for t in times]
                gap = (i - 1) * config.eval_every * 0.12  # side by side, so that bars can be read
                label = f"{variant}: {weight(group[0].config)}"
                plots.draw_intervals(axes, [t + gap for t in times], at, label=label, **look)
                taught = draw_teacher(axes, group, "AP", look["color"], "_teacher")
                reach += [100 * end for x in at for end in x.reach]
                late += taught[-len(times) :]
            plain = 100 * curve(runs[PLAIN], "AP").loc[start:]
            grey = {"color": "#999999", "linewidth": 0.9, "label": "plain detector"}
            axes.plot(plain.index, plain, **grey)
            axes.axvline(config.t1, color="#999999", linewidth=0.8)
            axes.set_title(NAMES[method])
            axes.set_xlabel("iteration")
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2)
        plots.frame(panels[0], reach, [*late, *plain])
        room = 0.3 * config.eval_every  # for marks that stand side by side
        panels[0].set_xlim(start - room, config.iterations + room)
        panels[0].set_ylabel("AP (points of 100)")
        caption = (
            "AP on the validation images over the last third of training. The grey line is T1, where "
            "λ steps. The runs start from the same weights; the "
            f"stepwise run is the λ1 run until T1. Bars are 95 % intervals, over {self.covers}"
            f"{self._fewer}. Thin lines with dots are the teachers, which are given the labels."
        )
        return self.plot("fig3_stepwise", figure, caption, self.note(at[0].images))

    def table(self, runs: Groups) -> Table:
        """Final AP, its gain over the plain detector, and stepwise against each fixed λ."""
        rows = []
        for (method, variant), group in runs.items():
            plain = runs[PLAIN][: len(group)]
            at_75 = final(group, "AP75", test=self.test).estimate
            after = sum(map(_mean_after_t1, group)) / len(group) / 100
            taught = method != "baseline"
            row = {
                "method": NAMES[method],
                "λ": weight(group[0].config) if taught else "",
                "AP, final [95 %]": bracketed(final(group, test=self.test)),
                "AP75, final": percent(at_75),
                "AP, after T1": percent(after),
                "gain, final": signed(gain(group, plain, test=self.test)) if taught else "",
            }
            if variant.startswith("fixed"):
                stepwise = runs[method, "stepwise"][: len(group)]
                over = gain(stepwise, group, test=self.test)
                row["stepwise − this, final"] = signed(over)
                row["stepwise − this, after T1"] = signed(_gain_after_t1(stepwise, group))
            rows.append(row)
        images = (
            f"“Final” is on {TEST_IMAGES[self.profile]:,} test images, by which nothing was chosen; "
            "the rest is on the validation images. "
            if self.test
            else ""
        )
        caption = (
            f"AP in points of 100, mean over {self.over_seeds}{self._fewer}. T1 is iteration "
            f"{runs[self.methods[0], 'stepwise'][0].config.t1}. “After T1” is the mean of the "
            f"evaluations after it. {images}The gain is over the plain detector, paired by "
            f"seed and image. Intervals are 95 %, over {self.covers}. Paper: {PAPER['stepwise']}."
        )
        return Table("fig3_stepwise", pd.DataFrame(rows).fillna(""), caption)

    @property
    def _fewer(self) -> str:
        few = len(self.seeds) > self.second_seeds
        return f" (for the fixed λ2: {counted(self.second_seeds, 'seed')})" if few else ""

    def findings(self, runs: Groups) -> Findings:
        """What the pull gains, SSSD over LGD, and stepwise over fixed λ."""
        where = " on the test images" * self.test
        cost = gain(runs[CONTROL], runs[PLAIN], test=self.test)
        said = [
            "The teacher without its pull (λ = 0) against the plain detector, final AP"
            f"{where}: {compared(cost)}."
        ]
        taught = []
        for method in self.methods:
            group = runs[method, "fixed λ1"]
            title = f"{NAMES[method]} (λ = {weight(group[0].config)})"
            pull = gain(group, runs[CONTROL], test=self.test)
            said.append(f"{title} against λ = 0, final AP{where}: {compared(pull)}.")
            taught += story(title, group, runs[CONTROL], "λ = 0")
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
        """Stepwise against the λ that it steps up from; and SSSD against LGD and the plain detector.

        The latter at λ1, if the two methods' λ1 are calibrated to each other.
        """
        said = []
        for method in (m for m in self.methods if m in CALIBRATED):
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
        if len({own[0].config.lambda1 / CALIBRATED[m] for m, own in fixed.items()}) > 1:
            fixed = {}
        return (*said, *main_comparison({"baseline": runs[PLAIN], **fixed}, self.test))


def _mean_after_t1(run: Run) -> float:
    """Mean AP of the evaluations after T1, in points of 100."""
    evaluations = run.evaluations()
    return 100 * float(evaluations.loc[evaluations["iteration"] > run.config.t1, "AP"].mean())


def _after_t1(run: Run) -> list[Matches]:
    return [run.matches(t) for t in evaluated(run) if t > run.config.t1]


def _gain_after_t1(ours: list[Run], theirs: list[Run]) -> Interval:
    """Mean AP of the evaluations after T1, difference paired by seed and image."""
    return difference([_after_t1(run) for run in ours], [_after_t1(run) for run in theirs])
