"""The five verdicts: the rule, the seeds that decide, and what is written of them."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from sssd.intervals import Interval
from sssd.reproduce import verdicts
from sssd.reproduce.verdicts import CLAIMS, Verdict, best_against_worst, decide, seeds_needed


def interval(low: float, high: float, seeds: int = 3) -> Interval:
    """Of a difference in AP, from points of 100."""
    return Interval((low + high) / 200, low / 100, high / 100, seeds, 500)


@pytest.mark.parametrize(
    ("claim", "low", "high", "word"),
    [
        ("sssd_lgd", 0.1, 0.9, "holds"),
        ("sssd_lgd", -0.9, -0.1, "contradicted"),
        ("sssd_lgd", -0.1, 0.9, "not decided"),
        ("robust", 0.1, 0.9, "holds"),
        ("robust", 0.1, 1.1, "not decided"),
        ("robust", 1.1, 2.5, "contradicted"),
    ],
)
def test_the_interval_decides(claim: str, low: float, high: float, word: str) -> None:
    middle = (low + high) / 2
    own = decide(claim, "it", [middle - 0.1, middle, middle + 0.1], interval(low, high))
    assert own.verdict == word
    assert (own.value, own.low, own.high) == pytest.approx((middle, low, high))
    assert own.smallest_effect == pytest.approx((high - low) / 2)
    assert (own.seeds, own.images) == (3, 500)


@pytest.mark.parametrize(
    ("claim", "each", "word"),
    [
        ("share_sssd", [49, 50, 51], "holds"),
        ("share_sssd", [44, 50, 56], "not decided"),
        ("share_lgd", [29, 30, 31], "contradicted"),
        ("calibration", [48, 50, 52], "holds"),
        ("calibration", [30, 50, 80], "not decided"),
        ("calibration", [90, 93, 95], "contradicted"),
    ],
)
def test_shares_and_ratios_have_a_range(claim: str, each: list[float], word: str) -> None:
    own = decide(claim, "it", each)
    assert own.verdict == word and own.images is None
    if claim == "calibration":  # the mean is that of the logarithms
        assert own.value == pytest.approx(stats.gmean(each))
        assert own.high is not None and own.high / own.value == pytest.approx(own.smallest_effect)


def test_the_calibrations_range_is_five_points_of_share() -> None:
    about = CLAIMS["calibration"]
    rest = 50 * 0.55 / 0.45  # where λ = 50 has a share of 45 %
    shares = [lam / (lam + rest) for lam in (about.low, about.high)]
    assert shares == pytest.approx([0.40, 0.50])


def test_one_seed_leaves_the_spread_open() -> None:
    gain = decide("sssd_lgd", "it", [0.3], interval(0.1, 0.5, seeds=1))
    assert gain.verdict == "not decided" and gain.low == pytest.approx(0.1)
    assert decide("sssd_lgd", "it", [0.2, 0.4], interval(0.1, 0.5)).verdict == "holds"
    assert gain.seeds_needed is None
    share = decide("share_sssd", "it", [50.0])
    assert share.verdict == "not decided" and share.estimate == "50.0"
    row = verdicts.csv([share]).splitlines()[1]
    assert row.endswith(",50.000,,,% of the loss,1,,not decided,,")
    assert verdicts.table([gain])["Needed"].tolist() == ["–"]


@pytest.mark.parametrize(("image", "seed", "effect"), [(0.1, 0.6, 0.8), (0.0, 1.0, 0.7)])
def test_so_many_seeds_decide(image: float, seed: float, effect: float) -> None:
    """Experiments of n seeds, whose images err together, and how often the interval excludes 0."""
    pilot = np.array([-1.0, 0.0, 1.0]) * seed  # a standard deviation of `seed`
    quantile = stats.t.ppf(0.975, 2)
    half = math.sqrt((1.96 * image) ** 2 + quantile**2 * seed**2 / 3)
    found = seeds_needed(effect, pilot, half)
    assert found is not None and found < 100
    draw = np.random.default_rng(0)

    def decided(n: int) -> float:
        values = effect + seed * draw.normal(size=(20_000, n))
        values += image * draw.normal(size=(20_000, 1))
        spread = stats.t.ppf(0.975, n - 1) ** 2 * values.var(axis=1, ddof=1) / n
        return float((values.mean(axis=1) > np.sqrt((1.96 * image) ** 2 + spread)).mean())

    n = int(found)
    assert decided(n) > 0.76 and decided(n // 2) < 0.65 and decided(2 * n) > 0.95


def test_where_images_are_the_limit_no_seeds_decide() -> None:
    own = decide("sssd_lgd", "it", [0.1, 0.12, 0.14], interval(-2.0, 2.24))
    assert own.verdict == "not decided" and own.seeds_needed == math.inf
    assert verdicts.csv([own]).endswith(",inf\n")
    assert verdicts.table([own])["Needed"].tolist() == ["more images"]


@pytest.mark.parametrize("number", [2, 5])
def test_best_and_worst_of_equals_are_not_apart(number: int) -> None:
    values = np.random.default_rng(0).normal(size=(20_000, number))
    gap = values.max(axis=1) - values.min(axis=1)
    reach = best_against_worst(number) * 1.96 * math.sqrt(2)
    assert (gap > reach).mean() == pytest.approx(0.05, abs=0.006)


def records(*given: Verdict) -> list[dict[str, Any]]:
    return [{"verdicts": [own.record()]} for own in given]


def test_of_two_notebooks_that_with_more_seeds_speaks() -> None:
    one = decide("sssd_plain", "one", [1.0], interval(0.5, 1.5, seeds=1))
    two = decide("sssd_plain", "two", [1.0, 1.1], interval(0.5, 1.6, seeds=2))
    share = decide("share_lgd", "share", [50.0, 51.0])
    assert verdicts.gather([*records(one, two), {}, *records(share)]) == [share, two]
    assert verdicts.gather([*records(two, one)]) == [two]


def test_a_record_is_read_as_it_was_written() -> None:
    for each, over in (([0.1, 0.2], interval(-9, 9, 2)), ([0.1], interval(-9, 9, 1))):
        own = decide("sssd_lgd", "it", each, over)
        assert Verdict.from_record(own.record()) == own


def test_the_csv_has_exactly_these_columns() -> None:
    own = decide("sssd_lgd", "SSSD − LGD, final AP", [0.1, 0.2, 0.3], interval(-0.004, 0.404))
    frame = pd.read_csv(io.StringIO(verdicts.csv([own])))
    assert list(frame.columns) == [
        "statement", "value", "low", "high", "unit", "seeds", "images", "verdict",
        "smallest_effect", "seeds_needed",
    ]  # fmt: skip
    assert frame["low"][0] == -0.004 and frame["seeds"][0] == 3 and frame["images"][0] == 500
    assert own.estimate == "+0.20 [0.00, +0.40]"  # no minus before 0
    nothing = decide("sssd_lgd", "it", [0.0, 0.0], interval(-0.0001, 0.0001))
    assert ",0.000,0.000,0.000," in verdicts.csv([nothing])


def test_the_abstract_has_numbers_intervals_and_verdicts() -> None:
    said = verdicts.sentences(
        [
            decide("sssd_lgd", "SSSD − LGD", [0.1, 0.2], interval(0.1, 0.3)),
            decide("sssd_plain", "SSSD − plain", [0.1, 0.2], interval(-0.1, 0.3)),
            decide("stepwise_lgd", "a step", [0.1, 0.2], interval(-0.1, 0.3)),
        ]
    )
    assert said == [
        "Of 3 comparisons with the paper, 1 holds and 2 are not decided.",
        "On SSSD's gain: SSSD − LGD is +0.20 [+0.10, +0.30] points (holds); "
        "SSSD − plain is +0.10 [−0.10, +0.30] points (not decided).",
        "On stepwise λ: a step is +0.10 [−0.10, +0.30] points (not decided).",
    ]
    assert verdicts.sentences([]) == []
