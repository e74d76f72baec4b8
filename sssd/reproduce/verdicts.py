"""Five verdicts: what the paper states, what came out here, and what that allows to be said.

The paper states that a value lies in a range (`CLAIMS`): a gain above 0, or a share between 45 and
55 %. Its verdict is

- *holds*, where the 95 % interval of our value lies inside the range,
- *contradicted*, where the interval lies outside of it,
- *not decided* otherwise, and where there is no interval, as of a share with one seed.

A gain is judged by its side of 0 alone: how large it is depends on the scale, and the paper's sizes
are those of COCO.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy.stats import norm, studentized_range
from scipy.stats import t as student_t

from ..intervals import Interval, average_precision, difference, over_seeds
from ..runs import Run
from .paper import NAMES, PAPER
from .words import counted, listed, number

POWER = 0.8
"""The probability with which `seeds_needed` seeds decide."""
MOST_SEEDS = 10_000
"""More than these are as good as none: it takes more images."""
SHARE_BAND = 0.05
"""How far a share may be from the paper's and still be close to it."""
LOSS_BAND = 1.0
"""The points of AP that a λ of a wide range may cost if the method is robust to it."""
WIDE = 4.0
"""A range of λ is wide if its largest is at least so many times its smallest."""
COLUMNS = (
    *("statement", "value", "low", "high", "unit", "seeds", "images"),
    *("verdict", "smallest_effect", "seeds_needed"),
)


@dataclass(frozen=True)
class Claim:
    """What the paper states of one value: that it lies between ``low`` and ``high``."""

    topic: str
    """Which of the five verdicts it belongs to."""
    paper: str
    unit: str
    low: float = 0.0
    high: float = math.inf
    ratio: bool = False
    """Whether the value is a ratio: its mean and interval are then those of its logarithm."""

    @property
    def range(self) -> str:
        """The range in words."""
        if self.high == math.inf:
            return f"above {self.low:g}"
        if self.low == -math.inf:
            return f"below {self.high:g}"
        return f"{self.low:.0f} to {self.high:.0f}"


def _calibration_band() -> tuple[float, float]:
    """The λ of SSSD whose shares are within `SHARE_BAND` of the paper's, at which λ is 50.

    The share is λ·d / (L + λ·d), with L the detection losses and d the distance; the paper's λ and
    share give L / d.
    """
    lam, share = PAPER["equivalent"].numbers["lam"], PAPER["share_start"].numbers["share"]
    rest = lam * (1 - share) / share
    low, high = (s / (1 - s) * rest for s in (share - SHARE_BAND, share + SHARE_BAND))
    return low, high


_LAM_LOW, _LAM_HIGH = _calibration_band()
_SHARE = 100 * PAPER["share_end"].numbers["share"]
_AT_END = Claim(
    "the shares at the end",
    "At the end of training the distillation's share is close to 50 %, at any λ.",
    "% of the loss",
    _SHARE - 100 * SHARE_BAND,
    _SHARE + 100 * SHARE_BAND,
)
_GAIN, _STEP = "SSSD's gain", "stepwise λ"
_STATED_GAIN = "SSSD has a higher AP than the compared methods in most settings."
_STATED_STEP = "Stepwise λ is better than fixed λ over the last third, by about 0.5 % of the AP."
CLAIMS: dict[str, Claim] = {
    "calibration": Claim(
        "the calibration",
        "λ = 50 gives SSSD the share of the loss that λ = 1 gives LGD.",
        "λ of SSSD ÷ λ of LGD",
        _LAM_LOW,
        _LAM_HIGH,
        ratio=True,
    ),
    "share_lgd": _AT_END,
    "share_sssd": _AT_END,
    "sssd_lgd": Claim(_GAIN, _STATED_GAIN, "points of AP"),
    "sssd_plain": Claim(_GAIN, _STATED_GAIN, "points of AP"),
    "robust": Claim(
        "robustness to λ",
        "SSSD is robust to a wide range of λ.",
        "points of AP",
        low=-math.inf,
        high=LOSS_BAND,
    ),
    "stepwise_lgd": Claim(_STEP, _STATED_STEP, "points of AP"),
    "stepwise_sssd": Claim(_STEP, _STATED_STEP, "points of AP"),
}
"""In the order of the table. `LOSS_BAND` and `SHARE_BAND` are ours: the paper gives no numbers for
“robust” and “close”."""
Word = Literal["holds", "contradicted", "not decided"]


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
    verdict: Word
    smallest_effect: float | None
    """Half of the interval: a value must be as far from the paper's range, or inside it, to be
    decided. Of a ratio it is the factor."""
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
        sign, places = self.about.high == math.inf, 1 if self.about.unit == "% of the loss" else 2
        places = 0 if self.about.ratio else places
        value = number(self.value, places, sign)
        if self.low is None or self.high is None:
            return value
        return f"{value} [{number(self.low, places, sign)}, {number(self.high, places, sign)}]"

    @property
    def seen(self) -> str:
        """`smallest_effect` in words; empty: not known."""
        if self.smallest_effect is None:
            return ""
        return ("a factor of " if self.about.ratio else "") + number(self.smallest_effect, 2)

    @property
    def points(self) -> str:
        """The unit after a value in a sentence."""
        return {"% of the loss": "%", "points of AP": "points"}.get(self.about.unit, "times LGD's")

    def row(self) -> dict[str, str]:
        """The row of ``verdicts.csv``, by `COLUMNS`."""

        def plain(value: float | None, form: str = ".3f") -> str:
            return "" if value is None else format(round(value, 3) + 0.0, form)  # no −0

        cells = (
            *(
                f"{self.about.topic}: {self.statement}",
                plain(self.value),
                plain(self.low),
                plain(self.high),
            ),
            *(self.about.unit, str(self.seeds), "" if self.images is None else str(self.images)),
            *(self.verdict, plain(self.smallest_effect), plain(self.seeds_needed, ".0f")),
        )
        return dict(zip(COLUMNS, cells, strict=True))


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
    if over is None:
        mean = over_seeds(inner.tolist())
        estimate, half, images = mean.estimate, mean.high - mean.estimate, None
    else:
        estimate, half, images = 100 * over.estimate, 50 * (over.high - over.low), over.images
    outer = math.exp if about.ratio else float
    if math.isnan(half):
        return Verdict(
            *(claim, statement, outer(estimate), None, None, n, images, "not decided", None, None)
        )
    wide = factor * half
    low, high = outer(estimate - wide), outer(estimate + wide)
    word: Word = "not decided"
    if about.low < low and high < about.high:
        word = "holds"
    elif high < about.low or low > about.high:
        word = "contradicted"
    edges = [math.log(x) if about.ratio else x for x in (about.low, about.high)]
    distance = min(abs(estimate - edge) for edge in edges)
    needed = seeds_needed(distance, inner, half, factor)
    if needed is not None and word != "not decided":
        needed = min(needed, n)  # these did decide it
    value = outer(estimate)
    return Verdict(claim, statement, value, low, high, n, images, word, outer(wide), needed)


def seeds_needed(
    distance: float, each: Sequence[float] | np.ndarray, half: float, factor: float = 1.0
) -> float | None:
    """How many seeds decide, with a probability of `POWER`, a value that is ``distance`` away.

    The half width of an interval over n seeds is h(n) = √(z²·v + t²·s²/n), with s the standard
    deviation over seeds, v the variance of the images, z the normal and t Student's quantile
    of 0.975 at n − 1 degrees of freedom (`intervals.half_width`). s is that of ``each``, and v what
    is left of ``half``, which was seen with as many seeds. The mean over n seeds has the standard
    error σ(n) = √(v + s²/n). The result is the smallest n ≥ 2 with

        h(n) + z_0.8·σ(n) ≤ distance,

    infinite where there is none up to `MOST_SEEDS`: v alone is too large, and more images are
    needed. With one seed s is not known, and neither is n: None.

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
    """What widens the interval of the difference between the best and the worst of ``number``.

    Among equals, the best and the worst differ: the quantile is Tukey's, of the studentized range,
    in place of the normal one.
    """
    if number == 2:
        return 1.0
    return float(studentized_range.ppf(0.95, number, 1e5) / math.sqrt(2) / norm.ppf(0.975))


# --- verdicts on runs, a list for each method, one run a seed ----------------------------------------


def final_ap(run: Run, test: bool = False) -> float:
    """In points of 100."""
    found = run.matches(test=test)
    return 100 * float(average_precision(found, np.ones((1, len(found.image_ids))))[0])


def gain_verdict(
    claim: str, statement: str, ours: Sequence[Run], theirs: Sequence[Run], test: bool
) -> Verdict:
    """On the final AP of some runs minus that of others, paired by seed and image."""
    mine, other = ([run.matches(test=test) for run in group] for group in (ours, theirs))
    over = difference(mine, other)
    pairs = zip(ours, theirs, strict=True)
    each = [final_ap(one, test) - final_ap(other, test) for one, other in pairs]
    return decide(claim, statement, each, over)


def main_comparison(groups: Mapping[str, Sequence[Run]], test: bool = False) -> tuple[Verdict, ...]:
    """SSSD against LGD and the plain detector, as far as ``groups`` has them by method.

    With ``test`` on the images of `Store.test`.

    Each is at the λ that it was given, and not at the best of a sweep: the best λ on the images
    that the verdict is on would flatter the method with more of them.
    """
    named = {
        m: "plain detector" if m == "baseline" else f"{NAMES[m]} (λ = {runs[0].config.lambda1:g})"
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
    """On what the worst λ of a wide range costs against the best; none where it is not wide.

    Args:
        groups: SSSD's runs by λ above 0.
    """
    if len(groups) < 2 or max(groups) < WIDE * min(groups):
        return ()
    ranked = sorted(groups, key=lambda lam: float(np.mean([final_ap(r) for r in groups[lam]])))
    worst, best = ranked[0], ranked[-1]
    ours, theirs = ([run.matches() for run in groups[lam]] for lam in (best, worst))
    over = difference(ours, theirs)
    pairs = zip(groups[best], groups[worst], strict=True)
    statement = (
        f"SSSD at its best λ ({best:g}) − at its worst ({worst:g}) of {min(groups):g} to "
        f"{max(groups):g}, final AP"
    )
    each = [final_ap(one) - final_ap(other) for one, other in pairs]
    return (decide("robust", statement, each, over, best_against_worst(len(groups))),)


# --- all of a report -----------------------------------------------------------------------------


def gather(records: Iterable[Mapping[str, Any]]) -> list[Verdict]:
    """The verdicts of a report's notebooks, in the order of `CLAIMS`.

    Where several notebooks give one, it is that with the most seeds, then images.
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
    """The contents of ``verdicts.csv``."""
    out = io.StringIO()
    pd.DataFrame([v.row() for v in verdicts], columns=list(COLUMNS)).to_csv(out, index=False)
    return out.getvalue()


def table(verdicts: Sequence[Verdict]) -> pd.DataFrame:
    """The table of the report's first page."""
    rows = []
    for own in verdicts:
        needed = own.seeds_needed
        more = "–" if needed is None else "more images" if needed == math.inf else ""
        rows.append(
            {
                "The paper": f"{own.about.paper} Holds if {own.about.range}.",
                "Here": own.statement,
                "Value [95 %]": own.estimate,
                "Verdict": own.verdict,
                "Smallest effect": own.seen.replace("a factor of ", "× "),
                "Seeds": str(own.seeds),
                "Needed": more or f"{needed:,.0f}",
            }
        )
    return pd.DataFrame(rows)


CAPTION = (
    "The paper's statements and what came out here. Intervals are 95 %, of gains over seeds and images, paired by "
    "both, of shares and λ over seeds. A statement holds if the interval lies inside the range that "
    "stands for it, and is contradicted if it lies outside; otherwise it is not decided. Gains in "
    "points of AP (of 100) are judged by their side of 0. The ranges of the other three are ours: "
    f"“close to 50 %” is within {100 * SHARE_BAND:g} points, for the λ whose share is furthest; the "
    f"calibration agrees where λ gives a share within {100 * SHARE_BAND:g} points of the paper's; a "
    f"λ is robust if the worst of a range costs less than {LOSS_BAND:g} point against the best (its "
    "interval is widened by Tukey's quantile, as best and worst are chosen afterwards). SSSD and LGD "
    "are compared at the λ of the paper's calibration and not at the best of the sweep, which would "
    "flatter on the same images. Stepwise λ is compared with the λ that it steps up from, by the "
    "mean AP of the evaluations after T1. The smallest effect is half of the interval: a smaller one "
    "could not have been seen. Needed are the seeds that decide it with a probability of "
    f"{100 * POWER:g} % if value and spread stay as they are; “more images”: no number of seeds "
    "does."
)
ONE_SEED = (
    " With one seed an interval covers the images alone, shares and λ have none, and the spread over "
    "seeds, and so the number needed, is not known."
)


def caption(verdicts: Sequence[Verdict]) -> str:
    return CAPTION + (ONE_SEED if any(own.seeds == 1 for own in verdicts) else "")


def counts(verdicts: Sequence[Verdict]) -> str:
    """How many comparisons came out how, such as ``1 holds, 2 are not decided``."""
    said = []
    for word in ("holds", "contradicted", "not decided"):
        n = [own.verdict for own in verdicts].count(word)
        verb = "is" if n == 1 else "are"
        form = ("holds" if n == 1 else "hold") if word == "holds" else f"{verb} {word}"
        said += [f"{n} {form}"] if n else []
    return listed(said)


def sentences(verdicts: Sequence[Verdict]) -> list[str]:
    """What came out, for the abstract: how much holds, and each of the five with its numbers."""
    if not verdicts:
        return []
    of = counted(len(verdicts), "comparison")
    said = [f"Of {of} with what the paper states, {counts(verdicts)}."]
    for topic in dict.fromkeys(own.about.topic for own in verdicts):
        parts = [
            f"{own.statement}: {own.estimate} {own.points} ({own.verdict})"
            for own in verdicts
            if own.about.topic == topic
        ]
        said.append(f"On {topic}, {'; '.join(parts)}.")
    return said
