"""Table 3: the share of the distillation in the loss, and the λ at which two methods' shares agree."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import pandas as pd
import seaborn as sns
from pydantic import Field

from ..config import RunConfig
from ..intervals import Interval, over_seeds
from ..runs import Run
from . import plots
from .experiment import CALIBRATED, Findings
from .paper import NAMES, PAPER
from .table4_lambda_sweep import Groups, Sweep
from .tables import Table
from .verdicts import Verdict, decide
from .words import bracketed, percent

TARGET = ("lgd", 1.0)
"""Whose share is searched for: LGD at its published λ."""
SEARCH = ("search", 0.0)
"""The key of the search's runs."""
SHADES = {"lgd": "Blues", "sssd": "Oranges", "kl": "Purples"}


class Step(NamedTuple):
    """A λ that the search tried, its share of the loss, and the run that gave it."""

    lam: int
    share: float
    run: Run


Steps = Mapping[int, list[Step]]
"""The steps of each seed's search, in order."""


def bisection(target: float, low: int, high: int) -> Generator[int, float, int]:
    """Binary search for the integer λ in [low, high] whose share comes closest to ``target``.

    It yields the λ to be tried next, is sent its share, which grows with λ, and returns the result;
    where the target is beyond an end, that end.
    """
    shares: dict[int, float] = {}
    while high - low > 1:
        middle = (low + high) // 2
        shares[middle] = yield middle
        low, high = (middle, high) if shares[middle] < target else (low, middle)
    for end in {low, high} - shares.keys():
        shares[end] = yield end
    return min((low, high), key=lambda lam: abs(shares[lam] - target))


class Table3(Sweep):
    """Shares λ · L_distill / L_total at milestones, and the calibration (SSSD, Table 3)."""

    notebook = "table3_calibration"
    title = "Calibration: equal shares of the loss"
    question = (
        "LGD's mean squared error and SSSD's distance differ in scale, so equal λ are not "
        "comparable. What share of the loss does the distillation have at each λ, and at "
        "which λ of SSSD is it LGD's at λ = 1? A binary search answers, as in the paper."
    )

    searched: str = "sssd"
    low: int = Field(1, ge=1)
    high: int = 100
    first: int | None = Field(None, ge=1)

    @cached_property
    def configs(self) -> dict[tuple[str, float], list[RunConfig]]:
        if self.searched not in ("sssd", "kl"):
            raise ValueError(f"searched: {self.searched!r} is not valid; expected sssd or kl")
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

    def search(self, runs: Groups) -> Steps:
        """Search the λ of each seed; trains each λ tried for the first part of training only."""
        searches = {
            seed: bisection(target, self.low, self.high)
            for seed, target in zip(self.seeds, self._targets(runs), strict=True)
        }
        steps: dict[int, list[Step]] = {seed: [] for seed in self.seeds}
        asked = {seed: next(search) for seed, search in searches.items()}
        while asked:
            configs = [
                self.of_lambda(self.searched, float(lam))[self.seeds.index(seed)]
                for seed, lam in asked.items()
            ]
            tried = self.store.get(configs, jobs=self.jobs, until=self.early)
            for run, (seed, lam) in zip(tried, list(asked.items()), strict=True):
                share = _share(run, 0, self.early)
                steps[seed].append(Step(lam, share, run))
                try:
                    asked[seed] = searches[seed].send(share)
                except StopIteration:
                    del asked[seed]
        return steps

    def tried(self, steps: Steps) -> dict[tuple[str, float], list[Run]]:
        """The runs of the search, of all seeds and λ."""
        return {SEARCH: [step.run for tried in steps.values() for step in tried]}

    def _targets(self, runs: Groups) -> list[float]:
        """The share of each seed that is searched for."""
        return [_share(run, 0, self.early) for run in runs[TARGET]]

    def table(self, runs: Groups) -> Table:
        """The share at milestones of training for every λ."""
        start, end = PAPER["share_start"].numbers, PAPER["share_end"].numbers
        rows = []
        for (method, lam), group in runs.items():
            shares = {
                name: bracketed(over_seeds([_share(run, *part) for run in group]))
                for name, part in self._parts(runs).items()
            }
            known = (method, lam) == ("lgd", start["lam"])
            rows.append(
                {
                    "method": NAMES[method],
                    "λ": f"{lam:g}",
                    **shares,
                    "paper, after 1,000": f"{100 * start['share']:g}" if known else "",
                    "paper, end": f"≈ {100 * end['share']:g}" if method in ("lgd", "sssd") else "",
                }
            )
        whole = runs[TARGET][0].config.iterations
        interval = "95 % intervals over seeds" if len(self.seeds) > 1 else "one seed: no interval"
        caption = (
            f"Share λ · L_distill / L_total in %, mean over the first {self.early} iterations (the "
            f"warm-up; in the paper 1,000 of 180,000) and over the {max(whole // 18, 1)} iterations "
            f"up to each milestone, whose number is in brackets; mean over {self.over_seeds}, "
            f"{interval}."
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

    def figure(self, runs: Groups, steps: Steps) -> plots.Plot:
        """The steps of the search, and the shares over training."""
        figure, ((left, right),) = plots.panels(1, 2, (2 * plots.COLUMN, 2.7))
        self._draw_search(left, runs, steps)
        self._draw_shares(right, runs)
        caption = (
            f"Left: the binary search for the λ of {NAMES[self.searched]} in [{self.low}, "
            f"{self.high}] whose mean share of the loss over the first {self.early} iterations "
            "equals LGD's at λ = 1. Bars: the range left at each step; marks: the λ tried, "
            "pointing to where the search goes on, with its share in % for the last seed; "
            f"{self.over_seeds}. Right: the share over training for every λ, mean over "
            "seeds and over a window of 1/18 of the run; vertical lines: the start of distillation "
            "into the detector, and T1; horizontal: where the paper's shares end."
        )
        note = f"{self.profile} · {self.source.name} · {self.over_seeds}"
        return self.plot("table3_calibration", figure, caption, note)

    def _draw_search(self, axes: Any, runs: Groups, steps: Steps) -> None:
        targets, colour = self._targets(runs), plots.LOOKS[self.searched]["color"]
        for i, (tried, target) in enumerate(zip(steps.values(), targets, strict=True)):
            low, high = self.low, self.high
            shift = (i - (len(steps) - 1) / 2) * 0.2
            for n, (lam, share, _) in enumerate(tried, start=1):
                below, x = share < target, n + shift
                axes.plot([x, x], [low, high], color="#999999", linewidth=1.2, zorder=2)
                axes.plot(x, lam, "^" if below else "v", color=colour, ms=4.5, zorder=3)
                if i == len(steps) - 1:  # the rightmost, whose numbers cover no other mark
                    beside = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
                    axes.annotate(f"{100 * share:.0f}", (x, lam), fontsize=6, **beside)
                low, high = (max(low, lam), high) if below else (low, min(high, lam))
        if self.searched == "sssd":
            theirs, where = CALIBRATED["sssd"], axes.get_yaxis_transform()
            axes.axhline(theirs, color="#777777", linewidth=0.8, linestyle="--", zorder=1)
            axes.text(0.98, theirs, "paper", transform=where, fontsize=6.5, ha="right", va="bottom")
        mean = percent(sum(targets) / len(targets))
        axes.set_title(f"sought: LGD's share at λ = 1, {mean} %", fontsize=8)
        axes.set_xlim(0.5, max(map(len, steps.values())) + 0.9)
        axes.set(xlabel="step of the search", ylabel=f"λ of {NAMES[self.searched]}")

    def _draw_shares(self, axes: Any, runs: Groups) -> None:
        for method in self.lambdas:
            groups = self.of(runs, method)
            colours = sns.color_palette(SHADES[method], len(groups) + 2)[2:]
            for shade, (lam, group) in zip(colours, groups.items(), strict=True):
                shares = pd.concat([run.metrics()["share"] for run in group], axis=1).mean(axis=1)
                smooth = 100 * shares.rolling(max(len(shares) // 18, 1), min_periods=1).mean()
                look = {"color": shade, "linestyle": plots.LOOKS[method]["linestyle"]}
                steps = range(1, len(smooth) + 1)
                axes.plot(steps, smooth, linewidth=1.1, label=f"{NAMES[method]} {lam:g}", **look)
        end, config = 100 * PAPER["share_end"].numbers["share"], runs[TARGET][0].config
        axes.axhline(end, color="#777777", linewidth=0.8)
        axes.text(config.iterations, end, "paper, end", ha="right", va="bottom", fontsize=6.5)
        for t in (config.distill_start, config.milestones[0]):
            axes.axvline(t, color="#cccccc", linewidth=0.7, zorder=0)
        axes.set(xlabel="iteration", ylabel="share of the distillation (%)")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, ncols=1, fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))

    def findings(self, runs: Groups, steps: Steps) -> Findings:
        """The λ found beside the paper's, and whether the final shares come close to 50 %."""
        target = over_seeds(self._targets(runs))
        results = [
            min(tried, key=lambda step: abs(step.share - sought)).lam
            for tried, sought in zip(steps.values(), self._targets(runs), strict=True)
        ]
        theirs = f"; the paper: {CALIBRATED['sssd']:g}" if self.searched == "sssd" else ""
        said = [
            f"LGD at λ = 1 has a share of {bracketed(target)} % over the first {self.early} "
            "iterations.",
            f"{NAMES[self.searched]} has the same share at λ = "
            f"{_mean_lambda(over_seeds([float(lam) for lam in results]))}{theirs}.",
        ]
        if {self.low, self.high} & set(results):
            said.append(
                "This λ is at an end of the range searched: the equal share may lie beyond it."
            )
        last = list(self._parts(runs).values())[-1]
        shares = {
            key: over_seeds([_share(run, *last) for run in group]) for key, group in runs.items()
        }
        pair = [(method, CALIBRATED[method]) for method in ("lgd", "sssd")]
        if all(key in shares for key in pair):
            lgd, sssd = (bracketed(shares[key]) for key in pair)
            said.append(
                f"At the paper's pair of λ, {CALIBRATED['lgd']:g} and {CALIBRATED['sssd']:g}, the "
                f"final shares are {lgd} % (LGD) and {sssd} % (SSSD)."
            )
        for method in self.lambdas:
            own = {lam: share for (m, lam), share in shares.items() if m == method}
            low, high = (f(own, key=lambda lam: own[lam].estimate) for f in (min, max))
            near = sum(abs(share.estimate - 0.5) <= 0.05 for share in own.values())
            said.append(
                f"{NAMES[method]}: the final share goes from {bracketed(own[low])} % (λ = {low:g}) "
                f"to {bracketed(own[high])} % (λ = {high:g}); at {near} of {len(own)} λ it is "
                "within 5 points of the paper's 50 %."
            )
        return Findings(tuple(said))

    def verdicts(self, runs: Groups) -> tuple[Verdict, ...]:
        """The λ found against the paper's, and the final share that is furthest from its 50 %.

        ``runs`` has the search's, too, as `tried` gives them.
        """
        said = []
        tried = runs.get(SEARCH, [])
        if self.searched == "sssd" and tried:
            sought = dict(zip(self.seeds, self._targets(runs), strict=True))
            found = [
                min(
                    (run for run in tried if run.config.seed == seed),
                    key=lambda run: abs(_share(run, 0, self.early) - sought[run.config.seed]),
                ).config.lambda1
                for seed in self.seeds
            ]
            statement = f"λ of SSSD with LGD's share at λ = 1, first {self.early} iterations"
            said.append(decide("calibration", statement, found))
        window = list(self._parts(runs).values())[-1]
        for method in (m for m in ("lgd", "sssd") if m in self.lambdas):
            shares = {
                lam: [100 * _share(run, *window) for run in group]
                for lam, group in self.of(runs, method).items()
                if lam > 0
            }
            of_all = [
                decide(f"share_{method}", f"{NAMES[method]}, final share at λ = {lam:g}", each)
                for lam, each in shares.items()
            ]
            said.append(max(of_all, key=_furthest))
        return tuple(said)


def _furthest(own: Verdict) -> float:
    """How far the far end of a share's interval is from the paper's, in points."""
    ends = [own.value if end is None else end for end in (own.low, own.high)]
    return max(abs(end - 100 * PAPER["share_end"].numbers["share"]) for end in ends)


def _share(run: Run, after: int, until: int) -> float:
    """Mean share of the iterations t with after < t ≤ until."""
    metrics = run.metrics()
    inside = (metrics["iteration"] > after) & (metrics["iteration"] <= until)
    return float(metrics.loc[inside, "share"].mean())


def _mean_lambda(value: Interval) -> str:
    """A λ with its interval over seeds, where there is one."""
    interval = f" [{value.low:.0f}, {value.high:.0f}]" if value.seeds > 1 else ""
    return f"{value.estimate:.0f}{interval}"
