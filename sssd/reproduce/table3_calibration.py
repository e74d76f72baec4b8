"""Table 3: the share of the distillation in the loss, and the λ at which two methods' shares agree."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from functools import cached_property

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from IPython.display import Markdown
from matplotlib.figure import Figure
from pydantic import Field, PrivateAttr

from ..config import RunConfig
from ..intervals import Interval, over_seeds
from ..runs import Run
from . import paper, plots, tables
from .experiment import CALIBRATED
from .table4_lambda_sweep import Groups, Sweep

Steps = Mapping[int, Sequence[tuple[int, float]]]
"""Of each seed the λ tried, in order, with its share."""


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

    _tried: dict[str, Run] = PrivateAttr(default_factory=dict)

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
        if ("lgd", 1.0) not in groups:  # the search's target
            groups["lgd", 1.0] = self.of_lambda("lgd", 1.0)
        some = groups["lgd", 1.0][0]
        if self.first is not None and self.first > some.iterations:
            raise ValueError(
                f"first: {self.first}; expected at most the run's {some.iterations} iterations"
            )
        return groups

    @property
    def early(self) -> int:
        """Iterations of the first part of training: by default the warm-up, in the paper 1,000."""
        return self.first or max(self.configs["lgd", 1.0][0].warmup, 1)

    @property
    def further(self) -> str:
        steps = math.ceil(math.log2(self.high - self.low))
        return (
            f"the search of {self.notebook}, {steps} to {steps + 1} runs of {self.early} "
            "iterations a seed"
        )

    def train_further(self) -> None:
        """The runs of the search, each of which depends on the share of the one before."""
        self.search(self.train())

    def search(self, runs: Groups) -> Steps:
        """Search the λ of each seed; trains each λ tried for the first part of training only."""
        early = self.early
        targets = [_share(run, 0, early) for run in runs["lgd", 1.0]]
        searches = {
            seed: bisection(target, self.low, self.high)
            for seed, target in zip(self.seeds, targets, strict=True)
        }
        steps: dict[int, list[tuple[int, float]]] = {seed: [] for seed in self.seeds}
        asked = {seed: next(search) for seed, search in searches.items()}
        while asked:
            configs = {
                seed: self.of_lambda(self.searched, float(lam))[self.seeds.index(seed)]
                for seed, lam in asked.items()
            }
            tried = self.store.get(list(configs.values()), jobs=self.jobs, until=early)
            self._tried |= {run.config.id: run for run in tried}
            for run, (seed, lam) in zip(tried, list(asked.items()), strict=True):
                share = _share(run, 0, early)
                steps[seed].append((lam, share))
                try:
                    asked[seed] = searches[seed].send(share)
                except StopIteration:
                    del asked[seed]
        return steps

    def found(self, runs: Groups, steps: Steps) -> Interval:
        """The λ of equal shares: mean over seeds."""
        return over_seeds([float(lam) for lam, _ in self._results(runs, steps)])

    def _results(self, runs: Groups, steps: Steps) -> list[tuple[int, float]]:
        targets = (_share(run, 0, self.early) for run in runs["lgd", 1.0])
        return [
            min(tried, key=lambda step: abs(step[1] - target))
            for tried, target in zip(steps.values(), targets, strict=True)
        ]

    def _at(self, runs: Groups) -> dict[str, tuple[int, int]]:
        """The parts of training whose mean shares the table has, as (after, until)."""
        config = runs["lgd", 1.0][0].config
        window = max(config.iterations // 18, 1)
        ends = {"distillation starts": config.distill_start, "T1": config.milestones[0]}
        parts = {f"first {self.early}": (0, self.early)}
        for name, t in {**ends, "end": config.iterations}.items():
            if t > self.early:
                parts[f"{name} ({t})"] = (max(t - window, 0), t)
        return parts

    def table(self, runs: Groups) -> tables.Table:
        """The share at milestones of training for every λ."""
        rows = []
        start, end = paper.PAPER["share_start"].numbers, paper.PAPER["share_end"].numbers
        for (method, lam), group in runs.items():
            shares = {
                name: over_seeds([_share(run, *part) for run in group])
                for name, part in self._at(runs).items()
            }
            known = method == "lgd" and lam == start["lam"]
            rows.append(
                {
                    "method": paper.NAMES[method],
                    "λ": f"{lam:g}",
                    **{name: tables.bracketed(share) for name, share in shares.items()},
                    "paper, after 1,000": f"{100 * start['share']:g}" if known else "",
                    "paper, end": f"≈ {100 * end['share']:g}" if method in ("lgd", "sssd") else "",
                }
            )
        config = runs["lgd", 1.0][0].config
        caption = (
            "Share λ · L_distill / L_total in %, mean over the first iterations, and over the "
            f"{max(config.iterations // 18, 1)} iterations up to a milestone (its number in "
            f"brackets), mean over {self.counted}"
            + ("; 95 % intervals over seeds" if len(self.seeds) > 1 else "; one seed: no interval")
            + f". The first part is the warm-up, {self.early} of {config.iterations} iterations; in "
            "the paper 1,000 of 180,000."
        )
        return self.save_table(tables.Table(pd.DataFrame(rows), caption), "table3_calibration")

    def figure(self, runs: Groups, steps: Steps) -> Figure:
        """The steps of the search, and the shares over training."""
        plots.style()
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(2 * plots.COLUMN, 2.7), layout="constrained"
        )
        colour = plots.COLOURS[self.searched]
        targets = [_share(run, 0, self.early) for run in runs["lgd", 1.0]]
        for i, (tried, target) in enumerate(zip(steps.values(), targets, strict=True)):
            low, high = self.low, self.high
            shift = (i - (len(steps) - 1) / 2) * 0.2
            for n, (lam, share) in enumerate(tried, start=1):
                below = share < target
                left.plot([n + shift] * 2, [low, high], color="#999999", linewidth=1.2, zorder=2)
                left.plot(n + shift, lam, "^" if below else "v", color=colour, ms=4.5, zorder=3)
                if i == len(steps) - 1:  # the rightmost, whose numbers cover no other mark
                    left.annotate(
                        f"{100 * share:.0f}",
                        (n + shift, lam),
                        (4, 0),
                        textcoords="offset points",
                        fontsize=6,
                        va="center",
                    )
                low, high = (max(low, lam), high) if below else (low, min(high, lam))
        if self.searched == "sssd":
            theirs = paper.PAPER["equivalent"].numbers["lam"]
            left.axhline(theirs, color="#777777", linewidth=0.8, linestyle="--", zorder=1)
            left.text(
                0.98,
                theirs,
                "paper",
                transform=left.get_yaxis_transform(),
                fontsize=6.5,
                ha="right",
                va="bottom",
            )
        mean = tables.percent(sum(targets) / len(targets))
        left.set_title(f"sought: LGD's share at λ = 1, {mean} %", fontsize=8)
        left.set_xlim(0.5, max(map(len, steps.values())) + 0.9)
        left.set_xlabel("step of the search")
        left.set_ylabel(f"λ of {paper.NAMES[self.searched]}")
        grids = {m: self.of(runs, m) for m in self.lambdas}
        for method, groups in grids.items():
            palette = "Blues" if method == "lgd" else "Oranges" if method == "sssd" else "Purples"
            colours = sns.color_palette(palette, len(groups) + 2)[2:]
            for shade, (weight, group) in zip(colours, groups.items(), strict=True):
                shares = pd.concat([run.metrics()["share"] for run in group], axis=1).mean(axis=1)
                window = max(len(shares) // 18, 1)
                smooth = 100 * shares.rolling(window, min_periods=1).mean()
                right.plot(
                    range(1, len(smooth) + 1),
                    smooth,
                    color=shade,
                    linestyle=plots.DASHES[method],
                    linewidth=1.1,
                    label=f"{paper.NAMES[method]} {weight:g}",
                )
        end = 100 * paper.PAPER["share_end"].numbers["share"]
        right.axhline(end, color="#777777", linewidth=0.8)
        config = runs["lgd", 1.0][0].config
        right.text(config.iterations, end, "paper, end", ha="right", va="bottom", fontsize=6.5)
        for t in (config.distill_start, config.milestones[0]):
            right.axvline(t, color="#cccccc", linewidth=0.7, zorder=0)
        right.set_xlabel("iteration")
        right.set_ylabel("share of the distillation (%)")
        right.set_ylim(bottom=0)
        right.legend(frameon=False, ncols=1, fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
        caption = (
            f"Left: the binary search for the λ of {paper.NAMES[self.searched]} in "
            f"[{self.low}, {self.high}] whose mean share of the loss over the first {self.early} "
            "iterations equals LGD's at λ = 1. Bars: the range left at each step; marks: the λ tried, "
            "pointing to where the search goes on, with its share in % for the last seed; "
            f"{self.counted}. Right: the share over training for every λ, mean over "
            "seeds and over a window of 1/18 of the run; vertical lines: the start of distillation "
            "into the detector, and T1; horizontal: where the paper's shares end."
        )
        note = f"{self.profile} · {self.source.name} · {self.counted}"
        return self.save_figure(figure, "table3_calibration", caption, note)

    def findings(self, runs: Groups, steps: Steps) -> Markdown:
        """The λ found beside the paper's, and whether the final shares come close to 50 %."""
        name = paper.NAMES[self.searched]
        found, results = self.found(runs, steps), self._results(runs, steps)
        target = over_seeds([_share(run, 0, self.early) for run in runs["lgd", 1.0]])
        said = [
            f"LGD at λ = 1 has a share of {tables.bracketed(target)} % over the first {self.early} "
            "iterations.",
            f"{name} has the same share at λ = {_plain(found)}"
            + (f"; the paper: {CALIBRATED['sssd']:g}." if self.searched == "sssd" else "."),
        ]
        if any(lam in (self.low, self.high) for lam, _ in results):
            said[-1] += (
                " It lies at an end of the range searched, so the equal share may lie beyond."
            )
        last = list(self._at(runs).values())[-1]
        shares = {
            (method, lam): over_seeds([_share(run, *last) for run in group])
            for (method, lam), group in runs.items()
        }
        ours, theirs = shares.get(("sssd", CALIBRATED["sssd"])), shares["lgd", CALIBRATED["lgd"]]
        if ours is not None:
            said.append(
                f"At the paper's pair of λ, {CALIBRATED['lgd']:g} and {CALIBRATED['sssd']:g}, the "
                f"final shares are {tables.bracketed(theirs)} % (LGD) and {tables.bracketed(ours)} % "
                "(SSSD)."
            )
        for method in self.lambdas:
            own = {lam: share for (m, lam), share in shares.items() if m == method}
            low, high = (
                min(own, key=lambda x: own[x].estimate),
                max(own, key=lambda x: own[x].estimate),
            )
            near = sum(abs(share.estimate - 0.5) <= 0.05 for share in own.values())
            said.append(
                f"{paper.NAMES[method]}: the final share goes from {tables.bracketed(own[low])} % "
                f"(λ = {low:g}) to {tables.bracketed(own[high])} % (λ = {high:g}); at {near} of "
                f"{len(own)} λ it is within 5 points of the paper's 50 %."
            )
        return self.conclude({**runs, "search": list(self._tried.values())}, said)


def _share(run: Run, after: int, until: int) -> float:
    """Mean share of the iterations t with after < t ≤ until."""
    metrics = run.metrics()
    inside = (metrics["iteration"] > after) & (metrics["iteration"] <= until)
    return float(metrics.loc[inside, "share"].mean())


def _plain(value: Interval) -> str:
    """A λ with its interval over seeds, where there is one."""
    text = f"{value.estimate:.0f}"
    return text if value.seeds == 1 else f"{text} [{value.low:.0f}, {value.high:.0f}]"
