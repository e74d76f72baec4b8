"""Five verdicts: what the paper states, what came out here, and whether they agree.

The paper states that a value lies in a range (`CLAIMS`): a gain above 0, or a share between 45 and
55 %. The verdict is

- *holds*, if the 95 % interval of our value lies inside the range,
- *contradicted*, if the interval lies outside of it,
- *not decided* otherwise, and with one seed: its interval covers the images alone, and two seeds
  differ by more than that.

A gain is judged by its sign alone: its size depends on the scale, and the paper's gains are those
on COCO.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import norm, studentized_range
from scipy.stats import t as student_t

from ..evaluation import Matches
from ..intervals import Interval, average_precision, difference, over_seeds
from ..runs import Run
from .paper import NAMES, PAPER
from .words import counted, listed, number

POWER = 0.8
"""The probability with which `seeds_needed` seeds decide."""
MOST_SEEDS = 10_000
"""If more than these are needed, no number of seeds is said to decide: it takes more images."""
SHARE_BAND = 0.05
"""How far a share may be from the paper's and still be close to it."""
LOSS_BAND = 1.0
"""A method is robust if no λ of a wide range costs more than these points of AP."""
WIDE = 4.0
"""A range of λ is wide if its largest is at least this many times its smallest."""


@dataclass(frozen=True)
class Claim:
    """What the paper states of one value: that it lies between ``low`` and ``high``."""

    topic: str
    """Which of the five verdicts it belongs to."""
    paper: str
    unit: str = "points of AP"
    low: float = 0.0
    high: float = math.inf
    ratio: bool = False
    """Whether the value is a ratio: its mean and interval are then those of its logarithm."""

    @property
    def range(self) -> str:
        """The range in words."""
        if math.isinf(self.high):
            return f"above {self.low:g}"
        return f"{self.low:.0f} to {self.high:.0f}" if self.low > 0 else f"below {self.high:g}"


def _lam(share: float) -> float:
    """The λ of SSSD that has a ``share`` of the loss, if the paper's λ has the paper's share.

    The share is λ·d / (L + λ·d), with L the detection losses and d the distance.
    """
    theirs = PAPER["share_start"].numbers["share"]
    return PAPER["equivalent"].numbers["lam"] * (1 - theirs) / theirs * share / (1 - share)


_START, _END = (PAPER[x].numbers["share"] for x in ("share_start", "share_end"))
CLAIMS = {
    "calibration": Claim(
        "the calibration",
        "λ = 50 gives SSSD the share of the loss that λ = 1 gives LGD.",
        "λ of SSSD ÷ λ of LGD",
        _lam(_START - SHARE_BAND),
        _lam(_START + SHARE_BAND),
        ratio=True,
    ),
    **dict.fromkeys(
        ("share_lgd", "share_sssd"),
        Claim(
            "the shares at the end",
            "At the end of training the distillation's share is close to 50 %, at any λ.",
            "% of the loss",
            100 * (_END - SHARE_BAND),
            100 * (_END + SHARE_BAND),
        ),
    ),
    **dict.fromkeys(
        ("sssd_lgd", "sssd_plain"),
        Claim("SSSD's gain", "SSSD has a higher AP than the compared methods in most settings."),
    ),
    "robust": Claim(
        "robustness to λ",
        "SSSD is robust to a wide range of λ.",
        low=-math.inf,
        high=LOSS_BAND,
    ),
    **dict.fromkeys(
        ("stepwise_lgd", "stepwise_sssd"),
        Claim(
            "stepwise λ",
            "Stepwise λ is better than fixed λ over the last third, by about 0.5 % of the AP.",
        ),
    ),
}
"""In the order of the table. `LOSS_BAND` and `SHARE_BAND` are ours: the paper gives no numbers for
“robust” and “close”."""


@dataclass(frozen=True)
class Verdict:
    """One row of the table; values in the claim's unit, None: cannot be computed."""

    claim: str
    """The key of `CLAIMS`."""
    statement: str
    """What was measured."""
    value: float
    low: float | None
    high: float | None
    seeds: int
    images: int | None
    verdict: str
    """``holds``, ``contradicted`` or ``not decided``."""
    smallest_effect: float | None
    """Half of the interval: a value is decided if it is this far inside the paper's range or
    outside it. For a ratio it is a factor."""
    seeds_needed: float | None
    """`seeds_needed`; infinite where no number of seeds decides it with these images."""

    @property
    def about(self) -> Claim:
        return CLAIMS[self.claim]

    def record(self) -> dict[str, Any]:
        """What JSON can hold, for `from_record`."""
        values = asdict(self)
        return values | {"seeds_needed": "inf"} if self.seeds_needed == math.inf else values

    @classmethod
    def from_record(cls, values: Mapping[str, Any]) -> Verdict:
        needed = values["seeds_needed"]
        return cls(**{**values, "seeds_needed": None if needed is None else float(needed)})

    @property
    def estimate(self) -> str:
        """The value with its interval, in words."""
        places = 2 if self.about.unit == "points of AP" else 1
        value, low, high = (
            "" if x is None else number(x, places, sign=math.isinf(self.about.high))
            for x in (self.value, self.low, self.high)
        )
        return f"{value} [{low}, {high}]" if low else value


def decide(
    claim: str,
    statement: str,
    each: Sequence[float],
    over: Interval | None = None,
    factor: float = 1.0,
) -> Verdict:
    """The verdict on a claim.

    Args:
        claim: the key of `CLAIMS`.
        statement: what was measured.
        each: its value with each seed, in the claim's unit.
        over: the interval of an AP over seeds and images, as a fraction; without one the interval
            is Student's over ``each``.
        factor: what the interval is widened by.
    """
    about, n = CLAIMS[claim], len(each)
    inner = np.log(each) if about.ratio else np.asarray(each, np.float64)
    outer: Callable[[float], float] = math.exp if about.ratio else float
    if over is None:
        mean = over_seeds(inner.tolist())
        estimate, half, images = mean.estimate, mean.high - mean.estimate, None
    else:
        estimate, half, images = 100 * over.estimate, 50 * (over.high - over.low), over.images
    value, word = outer(estimate), "not decided"
    if math.isnan(half):
        return Verdict(claim, statement, value, None, None, n, images, word, None, None)
    low, high = (outer(estimate + side * factor * half) for side in (-1, 1))
    if n > 1 and about.low < low and high < about.high:
        word = "holds"
    elif n > 1 and (high < about.low or low > about.high):
        word = "contradicted"
    edges = [math.log(x) if about.ratio else x for x in (about.low, about.high)]
    needed = seeds_needed(min(abs(estimate - edge) for edge in edges), inner, half, factor)
    if needed is not None and word != "not decided":
        needed = min(needed, n)  # these did decide it
    effect = outer(factor * half)
    return Verdict(claim, statement, value, low, high, n, images, word, effect, needed)


def seeds_needed(
    distance: float, each: Sequence[float] | np.ndarray, half: float, factor: float = 1.0
) -> float | None:
    """How many seeds decide, with a probability of `POWER`, a value that is ``distance`` away.

    The half width of an interval over n seeds is h(n) = √(z²·v + t²·s²/n), with s the standard
    deviation over seeds, v the variance of the images, z the normal and t Student's quantile
    of 0.975 at n − 1 degrees of freedom (`intervals.half_width`). s is that of ``each``, and v is
    what s leaves of ``half``, which was seen with as many seeds. The mean over n seeds has the
    standard error σ(n) = √(v + s²/n). The result is the smallest n ≥ 2 with

        h(n) + z_0.8·σ(n) ≤ distance,

    infinite if there is none up to `MOST_SEEDS`: v alone is too large, and more images are needed.
    With one seed s is not known, and neither is n: None.

    Args:
        distance: from the true value to the nearest end of the paper's range.
        each: the value with each seed.
        half: half of their mean's interval, before it is widened by ``factor``.
        factor: what h is widened by.
    """
    n, values = len(each), np.asarray(each, np.float64)
    if n < 2:
        return None
    spread = float(values.var(ddof=1))
    own = float(student_t.ppf(0.975, n - 1)) ** 2 * spread / n
    images = max(half**2 - own, 0.0) / float(norm.ppf(0.975)) ** 2
    m = np.arange(2, MOST_SEEDS + 1)
    quantiles = student_t.ppf(0.975, m - 1)
    widths = np.sqrt(norm.ppf(0.975) ** 2 * images + quantiles**2 * spread / m)
    reach = factor * widths + norm.ppf(POWER) * np.sqrt(images + spread / m)
    enough = np.flatnonzero(reach <= distance)
    return float(m[enough[0]]) if len(enough) else math.inf


def best_against_worst(number: int) -> float:
    """The factor that widens the interval of the best of ``number`` minus the worst.

    Even among equals the best and the worst differ: Tukey's quantile, of the studentized range,
    takes the place of the normal one.
    """
    if number == 2:
        return 1.0
    return float(studentized_range.ppf(0.95, number, 1e5) / math.sqrt(2) / norm.ppf(0.975))


# --- verdicts on runs: a list for each method, with one run for each seed --------------------------


def gain_verdict(
    claim: str,
    statement: str,
    ours: Sequence[Run],
    theirs: Sequence[Run],
    test: bool = False,
    factor: float = 1.0,
) -> Verdict:
    """The verdict on the final AP of some runs minus that of others, paired by seed and image."""
    mine, other = ([run.matches(test=test) for run in group] for group in (ours, theirs))
    each = [_points(a) - _points(b) for a, b in zip(mine, other, strict=True)]
    return decide(claim, statement, each, difference(mine, other), factor)


def _points(matches: Matches) -> float:
    """AP in points of 100."""
    return 100 * float(average_precision(matches, np.ones((1, len(matches.image_ids))))[0])


def main_comparison(groups: Mapping[str, Sequence[Run]], test: bool = False) -> tuple[Verdict, ...]:
    """SSSD against LGD and the plain detector, as far as ``groups`` has them by method.

    With ``test`` on the images of `Store.test`.

    Each method is at the λ that it was given, and not at the best of a sweep: a λ chosen on the
    same images would flatter the method that has more of them to choose from.
    """
    named = {
        m: NAMES[m] if m == "baseline" else f"{NAMES[m]} (λ = {runs[0].config.lambda1:g})"
        for m, runs in groups.items()
    }
    return tuple(
        gain_verdict(
            claim,
            f"{named['sssd']} − {named[other]}, final AP{' on the test images' * test}",
            *(groups["sssd"], groups[other]),
            test,
        )
        for claim, other in (("sssd_lgd", "lgd"), ("sssd_plain", "baseline"))
        if {"sssd", other} <= groups.keys()
    )


def robustness(groups: Mapping[float, Sequence[Run]]) -> tuple[Verdict, ...]:
    """The verdict on what the worst λ of a range costs against the best; none if it is not wide.

    Args:
        groups: SSSD's runs by λ above 0.
    """
    if len(groups) < 2 or max(groups) < WIDE * min(groups):
        return ()
    means = {lam: np.mean([_points(r.matches()) for r in own]) for lam, own in groups.items()}
    worst, *_, best = sorted(groups, key=lambda lam: means[lam])
    statement = (
        f"SSSD at its best λ ({best:g}) − at its worst ({worst:g}) of {min(groups):g} to "
        f"{max(groups):g}, final AP"
    )
    factor = best_against_worst(len(groups))
    return (gain_verdict("robust", statement, groups[best], groups[worst], factor=factor),)


# --- all of a report -----------------------------------------------------------------------------


def gather(records: Iterable[Mapping[str, Any]]) -> list[Verdict]:
    """The verdicts of a report's notebooks, in the order of `CLAIMS`.

    If several notebooks give one, that with the most seeds counts, then that with the most images.
    """
    found: dict[str, Verdict] = {}
    for record in records:
        for values in record.get("verdicts", ()):
            own = Verdict.from_record(values)
            other = found.get(own.claim)
            if other is None or (own.seeds, own.images or 0) > (other.seeds, other.images or 0):
                found[own.claim] = own
    return [found[claim] for claim in CLAIMS if claim in found]


def csv(verdicts: Sequence[Verdict]) -> str:
    """The contents of ``verdicts.csv``; numbers with three decimals, empty: cannot be computed."""
    frame = pd.DataFrame(map(asdict, verdicts)).drop(columns="claim")
    frame["statement"] = [f"{own.about.topic}: {own.statement}" for own in verdicts]
    frame.insert(4, "unit", [own.about.unit for own in verdicts])
    frame = frame.astype({"images": "Int64"})
    for name in ("value", "low", "high", "smallest_effect"):
        frame[name] = frame[name].astype(float).round(3) + 0.0  # no −0
    needed = [own.seeds_needed for own in verdicts]
    frame["seeds_needed"] = ["" if n is None else f"{n:.0f}" for n in needed]
    return str(frame.to_csv(index=False, float_format="%.3f"))


def table(verdicts: Sequence[Verdict]) -> pd.DataFrame:
    """The table of verdicts."""
    rows = []
    for own in verdicts:
        effect, needed = own.smallest_effect, own.seeds_needed
        times = "× " * own.about.ratio
        rows.append(
            {
                "The paper": f"{own.about.paper} Holds if {own.about.range}.",
                "Here": own.statement,
                "Value [95 %]": own.estimate,
                "Verdict": own.verdict,
                "Smallest effect": "" if effect is None else times + number(effect, 2),
                "Seeds": str(own.seeds),
                "Needed": "–" if needed is None else f"{needed:,.0f}".replace("inf", "more images"),
            }
        )
    return pd.DataFrame(rows)


CAPTION = (
    "Intervals are 95 %, over seeds and images; for shares and λ over seeds. A statement holds if the "
    "interval lies inside its range, is contradicted if it lies outside, and is not decided otherwise, "
    "or with one seed, whose interval covers the images alone. The smallest effect is half of the "
    "interval: a smaller one cannot be told from none. “Needed” is the number of seeds that would "
    "decide, if value and spread stay as they are. The report's discussion says how each range was set."
)
RANGES = (
    "Gains are judged by their sign alone. The paper gives no numbers for its other statements, so "
    f"these ranges are ours: a share is close to 50 % within {100 * SHARE_BAND:g} points, and the λ "
    "whose share is furthest away counts; the calibration agrees if λ gives a share within "
    f"{100 * SHARE_BAND:g} points of the paper's; SSSD is robust if the worst λ of a range costs less "
    f"than {LOSS_BAND:g} point against the best. The best and the worst are chosen after the training, "
    "so Tukey's quantile makes their interval wider. SSSD and LGD are compared at λ in the ratio of "
    "the paper's calibration, 50 to 1, and not at the best of the sweep: a choice on the same images "
    "would flatter them. The number of seeds that would decide is that with which a comparison is "
    f"decided with a probability of {100 * POWER:g} %; “more images” means that no number of seeds is "
    "enough."
)
"""How the ranges of `CLAIMS` were set, for the report's discussion."""


def counts(verdicts: Sequence[Verdict]) -> str:
    """How many comparisons have which verdict, such as ``1 holds and 2 are not decided``."""
    forms = {
        "holds": ("holds", "hold"),
        "contradicted": ("is contradicted", "are contradicted"),
        "not decided": ("is not decided", "are not decided"),
    }
    found = Counter(own.verdict for own in verdicts)
    return listed([f"{found[w]} {form[found[w] > 1]}" for w, form in forms.items() if found[w]])


def sentences(verdicts: Sequence[Verdict]) -> list[str]:
    """What came out, for the abstract: how much holds, and each verdict with its numbers."""
    if not verdicts:
        return []
    said = [f"Of {counted(len(verdicts), 'comparison')} with the paper, {counts(verdicts)}."]
    units = {"% of the loss": " %", "points of AP": " points"}
    for topic in dict.fromkeys(own.about.topic for own in verdicts):
        parts = [
            f"{own.statement} is {own.estimate}{units.get(own.about.unit, '')} ({own.verdict})"
            for own in verdicts
            if own.about.topic == topic
        ]
        said.append(f"On {topic}: {'; '.join(parts)}.")
    return said
