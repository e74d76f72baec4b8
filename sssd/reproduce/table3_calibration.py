"""Table 3: the share of the distillation in the loss, and the λ at which two methods' shares agree."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from pydantic import Field

from ..config import RunConfig
from ..intervals import over_seeds
from ..runs import Run
from . import plots
from .experiment import CALIBRATED, Findings
from .paper import NAMES, PAPER
from .table4_lambda_sweep import Groups, Sweep
from .tables import Table
from .verdicts import Verdict, decide
from .words import bracketed, percent

TARGET = ("lgd", 1.0)
"""LGD at its published λ, whose share is searched for."""
SEARCH = ("search", 0.0)
"""The key of the search's runs."""
SHADES = {"lgd": "Blues", "sssd": "Oranges", "kl": "Purples"}


class Step(NamedTuple):
    """A step of a search: the range left, and the λ tried in it, with its share of the loss."""

    low: int
    high: int
    lam: int
    share: float


def bisection(
    share: Callable[[int], float], target: float, low: int, high: int
) -> tuple[list[Step], float]:
    """Binary search in [low, high] for the λ whose share is ``target``.

    ``share`` grows with λ. It is called once for each λ tried, which are integers.

    Returns:
        the steps; and the λ found. It is between the last two integers, where the share is taken as
        linear, or at an end of the range, if the wanted share lies beyond.
    """
    ends, steps = {low, high}, []
    while high - low > 1:
        middle = (low + high) // 2
        steps.append(Step(low, high, middle, share(middle)))
        low, high = (middle, high) if steps[-1].share < target else (low, middle)
    steps += [Step(low, high, end, share(end)) for end in sorted({low, high} & ends)]
    shares = {step.lam: step.share for step in steps}
    if shares[low] >= target:
        return steps, float(low)
    if shares[high] <= target:
        return steps, float(high)
    return steps, low + (target - shares[low]) / (shares[high] - shares[low])


class Table3(Sweep):
    """Shares λ · L_distill / L_total at milestones, and the calibration (SSSD, Table 3)."""

    notebook = "table3_calibration"
    title = "Calibration: equal shares of the loss"
    question = (
        "LGD's mean squared error and SSSD's distance differ in scale, so equal λ do not weigh "
        "the same. What share of the loss does the distillation have at each λ, and which λ gives "
        "SSSD the share of LGD at λ = 1? A binary search finds it, as in the paper."
    )

    searched: Literal["sssd", "kl"] = "sssd"
    low: int = Field(1, ge=1)
    high: int = 100
    first: int | None = Field(None, ge=1)

    @cached_property
    def configs(self) -> dict[tuple[str, float], list[RunConfig]]:
        if self.high <= self.low:
            raise ValueError(f"high: {self.high}; expected more than low, {self.low}")
        groups = {key: group for key, group in super().configs.items() if key[0] != "baseline"}
        groups.setdefault(TARGET, self.of_lambda(*TARGET))
        whole = groups[TARGET][0].iterations
        if self.first is not None and self.first > whole:
            raise ValueError(f"first: {self.first}; expected at most the run's {whole} iterations")
        return groups

    @property
    def early(self) -> int:
        """Iterations of the first part of training: by default the warm-up, in the paper 1,000."""
        return self.first or max(self.configs[TARGET][0].warmup, 1)

    @property
    def further(self) -> str:
        steps = math.ceil(math.log2(self.high - self.low))
        return (
            f"the search of {self.notebook}, {steps} to {steps + 1} runs of {self.early} "
            "iterations for each seed"
        )

    def train_further(self) -> None:
        self.search(self.train())

    def search(self, runs: Groups) -> dict[tuple[str, float], list[Run]]:
        """Search the λ of each seed, training each λ tried for the first part of a run only.

        Returns:
            the runs tried, one seed after the other, each in the order of its search.
        """
        tried: list[Run] = []
        for i, target in enumerate(self._targets(runs)):

            def share(lam: int, i: int = i) -> float:
                config = self.of_lambda(self.searched, float(lam))[i]
                tried.extend(self.store.get([config], jobs=self.jobs, until=self.early))
                return self._early(tried[-1])

            bisection(share, target, self.low, self.high)
        return {SEARCH: tried}

    def _early(self, run: Run) -> float:
        """A run's share over the first part of training."""
        return _share(run, 0, self.early)

    def _targets(self, runs: Groups) -> list[float]:
        """For each seed, LGD's share, which is searched for."""
        return list(map(self._early, runs[TARGET]))

    def _searches(self, runs: Groups, tried: Sequence[Run]) -> list[tuple[list[Step], float]]:
        """Each seed's search as `bisection` gives it, from the runs that it tried."""
        searches = []
        for seed, target in zip(self.seeds, self._targets(runs), strict=True):
            own = (run for run in tried if run.config.seed == seed)
            shares = {int(run.config.lambda1): self._early(run) for run in own}
            searches.append(bisection(shares.__getitem__, target, self.low, self.high))
        return searches

    def _found(self, runs: Groups, tried: Sequence[Run]) -> list[float]:
        """For each seed, the λ with LGD's share."""
        return [found for _, found in self._searches(runs, tried)]

    def table(self, runs: Groups) -> Table:
        """The share at milestones of training for every λ."""
        start, end = (100 * PAPER[x].numbers["share"] for x in ("share_start", "share_end"))
        rows = []
        for (method, lam), group in runs.items():
            shares = {
                name: bracketed(over_seeds([_share(run, *part) for run in group]))
                for name, part in self._parts(runs).items()
            }
            paper = f"{start:g}, then " if (method, lam) == TARGET else ""
            paper += f"≈ {end:g} at the end" if method in ("lgd", "sssd") else ""
            rows.append({"method": NAMES[method], "λ": f"{lam:g}", **shares, "paper": paper})
        window = max(runs[TARGET][0].config.iterations // 18, 1)
        warmup = "the warm-up; " if self.first is None else ""
        interval = ", with 95 % intervals over seeds" if len(self.seeds) > 1 else ""
        caption = (
            f"Share λ · L_distill / L_total in %, mean over the first {self.early} iterations "
            f"({warmup}in the paper 1,000 of 180,000) and over the {window} iterations up to each "
            f"milestone, whose number is in brackets; mean over {self.seeds_in_words}{interval}."
        )
        return Table("table3_calibration", pd.DataFrame(rows), caption)

    def _parts(self, runs: Groups) -> dict[str, tuple[int, int]]:
        """The parts of training whose mean shares the table has, as (after, until)."""
        config = runs[TARGET][0].config
        window = max(config.iterations // 18, 1)
        ends = {"distillation starts": config.distill_start, "T1": config.milestones[0]}
        parts = {f"first {self.early}": (0, self.early)}
        for name, t in {**ends, "end": config.iterations}.items():
            if t > self.early:
                parts[f"{name} ({t})"] = (max(t - window, 0), t)
        return parts

    def figure(self, runs: Groups, steps: Groups) -> plots.Plot:
        """The steps of the search, and the shares over training."""
        figure, ((left, right),) = plots.panels(1, 2, (2 * plots.COLUMN, 2.7))
        self._draw_search(left, runs, steps[SEARCH])
        self._draw_shares(right, runs)
        shades = ", in a shade each" * (len(self.seeds) > 1)
        caption = (
            f"Left: the binary search for the λ of {NAMES[self.searched]} in [{self.low}, "
            f"{self.high}] whose mean share of the loss over the first {self.early} iterations "
            f"equals LGD's at λ = 1, for {self.seeds_in_words}{shades}. Bars: the range left at each "
            "step; dots: the λ tried; stars: the λ found. Right: the share over training for "
            "every λ, mean over seeds and over a window of 1/18 of the run; vertical lines: the start "
            "of distillation into the detector, and T1; horizontal: where the paper's shares end."
        )
        return self.plot("table3_calibration", figure, caption, self.seeds_in_words)

    def _draw_search(self, axes: Axes, runs: Groups, tried: Sequence[Run]) -> None:
        searches = self._searches(runs, tried)
        colours = sns.color_palette(SHADES[self.searched], len(searches) + 2)[2:]
        last = max(len(steps) for steps, _ in searches)
        for i, (steps, found) in enumerate(searches):
            shift = 0.6 * (i - (len(searches) - 1) / 2) / len(searches)  # the seeds side by side
            for n, step in enumerate(steps, start=1):
                axes.plot([n + shift] * 2, [step.low, step.high], color=colours[i], linewidth=1)
                axes.plot(n + shift, step.lam, "o", color=colours[i], markersize=3)
            axes.plot(last + 1 + shift, found, "*", color=colours[i], markersize=5)
        beside: dict[str, Any] = {"textcoords": "offset points", "fontsize": 6}
        lam = over_seeds([found for _, found in searches]).estimate
        axes.annotate(f"{lam:.1f}", (last + 1, lam), (0, 6), ha="center", **beside)
        axes.set_xticks(range(1, last + 2), [*map(str, range(1, last + 1)), "found"])
        if self.searched == "sssd":
            paper = CALIBRATED["sssd"]
            axes.axhline(paper, color=plots.GREY, linewidth=0.8, linestyle="--")
            axes.annotate(
                f"the paper: {paper:g}", (last + 1.5, paper), (0, -8), ha="right", **beside
            )
        sought = percent(over_seeds(self._targets(runs)).estimate)
        axes.set_title(f"sought: LGD's share at λ = 1, {sought} %", fontsize=8)
        axes.set(xlabel="step of the search", ylabel=f"λ of {NAMES[self.searched]}")
        axes.set_xlim(0.4, last + 1.6)

    def _draw_shares(self, axes: Axes, runs: Groups) -> None:
        for method in self.lambdas:
            groups = self.of(runs, method)
            colours = sns.color_palette(SHADES[method], len(groups) + 2)[2:]
            for shade, (lam, group) in zip(colours, groups.items(), strict=True):
                shares = pd.concat([run.metrics()["share"] for run in group], axis=1).mean(axis=1)
                smooth = 100 * shares.rolling(max(len(shares) // 18, 1), min_periods=1).mean()
                look = {"color": shade, "linestyle": plots.LOOKS[method]["linestyle"]}
                name = f"{NAMES[method]} {lam:g}"
                axes.plot(smooth.index + 1, smooth, linewidth=1.1, label=name, **look)
        end, config = 100 * PAPER["share_end"].numbers["share"], runs[TARGET][0].config
        axes.axhline(end, color=plots.GREY, linewidth=0.8)
        for t in (config.distill_start, config.milestones[0]):
            axes.axvline(t, color="#cccccc", linewidth=0.7, zorder=0)
        axes.set(xlabel="iteration", ylabel="share of the distillation (%)")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))

    def findings(self, runs: Groups, steps: Groups) -> Findings:
        """The λ found beside the paper's, and the final shares at the paper's pair of λ."""
        target = over_seeds(self._targets(runs))
        results = self._found(runs, steps[SEARCH])
        mean = over_seeds(results)
        found = f"{mean.estimate:.1f}" + f" [{mean.low:.1f}, {mean.high:.1f}]" * mean.known
        theirs = f" (the paper: {CALIBRATED['sssd']:g})" if self.searched == "sssd" else ""
        said = [
            f"LGD at λ = 1 has a share of {bracketed(target)} % over the first {self.early} "
            f"iterations; {NAMES[self.searched]} has the same share at λ = {found}{theirs}."
        ]
        if {self.low, self.high} & set(results):
            said.append(
                "This λ is at an end of the range searched: the same share may lie beyond it."
            )
        *_, last = self._parts(runs).values()
        pair = [runs[key] for key in CALIBRATED.items() if key in runs]
        if len(pair) == 2:
            lgd, sssd = (bracketed(over_seeds([_share(x, *last) for x in own])) for own in pair)
            said.append(
                f"At the paper's pair of λ, {CALIBRATED['lgd']:g} and {CALIBRATED['sssd']:g}, the "
                f"final shares are {lgd} % (LGD) and {sssd} % (SSSD)."
            )
        return Findings(said)

    def verdicts(self, runs: Groups) -> tuple[Verdict, ...]:
        """The λ found against the paper's, and the final share furthest from the paper's 50 %.

        ``runs`` contains those of the search, too.
        """
        said = []
        if self.searched == "sssd" and runs.get(SEARCH):
            statement = f"λ of SSSD with LGD's share at λ = 1, first {self.early} iterations"
            said.append(decide("calibration", statement, self._found(runs, runs[SEARCH])))
        *_, last = self._parts(runs).values()
        for method in (m for m in ("lgd", "sssd") if m in self.lambdas):
            of_all = [
                decide(
                    f"share_{method}",
                    f"{NAMES[method]}, final share at λ = {lam:g}",
                    [100 * _share(run, *last) for run in group],
                )
                for lam, group in self.of(runs, method).items()
                if lam > 0
            ]
            said.append(max(of_all, key=_furthest))
        return tuple(said)


def _furthest(own: Verdict) -> float:
    """How far the far end of a share's interval is from the paper's, in points."""
    ends = [own.value if end is None else end for end in (own.low, own.high)]
    return max(abs(end - 100 * PAPER["share_end"].numbers["share"]) for end in ends)


def _share(run: Run, after: int, until: int) -> float:
    """Mean share of the iterations t with after < t ≤ until."""
    metrics = run.metrics().set_index("iteration")
    return float(metrics.loc[after + 1 : until, "share"].mean())
