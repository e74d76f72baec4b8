"""The binary search for the λ of equal shares, on functions with a known answer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sssd.reproduce import ParameterError, Table1, Table3, Table4
from sssd.reproduce.table3_calibration import bisection


def search(
    share: Callable[[int], float], target: float, low: int = 1, high: int = 100
) -> tuple[float, list[int]]:
    """The λ found, and those that were tried."""
    steps, found = bisection(share, target, low, high)
    assert all(step.low <= step.lam <= step.high for step in steps)
    return found, [step.lam for step in steps]


def test_the_papers_search_begins_with_its_answer() -> None:
    found, tried = search(lambda lam: lam / (lam + 61.0), 50 / 111)
    assert found == pytest.approx(50) and tried[0] == 50
    assert len(tried) <= 8 and len(tried) == len(set(tried))


@given(st.floats(0.5, 500), st.floats(0.001, 0.999), st.integers(1, 60), st.integers(1, 200))
def test_it_finds_the_closest_share(c: float, target: float, low: int, more: int) -> None:
    def share(lam: int) -> float:
        return lam / (lam + c)

    high = low + more
    found, tried = search(share, target, low, high)
    closest = min(range(low, high + 1), key=lambda lam: abs(share(lam) - target))
    assert closest in tried and all(low <= lam <= high for lam in tried)
    sought = min(max(c * target / (1 - target), low), high)
    assert int(sought) - 1e-6 <= found <= int(sought) + 1 + 1e-6  # between the same integers
    assert (found in (low, high)) or share(int(found)) < target <= share(int(found) + 1)


def test_between_two_integers_the_share_is_taken_as_linear() -> None:
    found, tried = search(lambda lam: lam / 10, 0.325, 1, 9)
    assert found == pytest.approx(3.25) and {3, 4} <= set(tried)


@pytest.mark.parametrize(("target", "end"), [(0.0, 1), (0.999, 100)])
def test_beyond_the_range_it_gives_the_end(target: float, end: int) -> None:
    assert search(lambda lam: lam / (lam + 100.0), target)[0] == end


@pytest.mark.parametrize(
    ("kind", "parameters", "sentence"),
    [
        (Table3, {"searched": "mse"}, "searched: 'mse' is not valid: Input should be"),
        (Table3, {"low": 9, "high": 9}, "high: 9; expected more than low, 9"),
        (Table3, {"first": 13}, "first: 13; expected at most the run's 12 iterations"),
        (Table4, {"sssd_lambdas": [50, 25]}, "sssd_lambdas: 50, 25; expected increasing numbers"),
        (Table3, {"lgd_lambdas": [], "sssd_lambdas": []}, "sssd_lambdas: empty"),
        (Table4, {"lgd_lambdas": [0]}, "lgd_lambdas: 0; expected increasing numbers above 0"),
        (Table4, {"lgd_lambdas": []}, "lgd_lambdas: [] is not valid: Tuple should have at least 1"),
        (Table4, {"overrides": "lambda1=3"}, "lambda1 is set by the notebook's own parameters"),
        (Table4, {"overrides": "lr=1e-3, seed=3"}, "seed is set by the notebook's own"),
        (Table1, {"overrides": "detector=fcos"}, "detector is set by the notebook's own"),
        (Table4, {"lgd_lambdas": "1,two"}, "lgd_lambdas.1: 'two' is not valid"),
        (Table1, {"methods": ["sssd"]}, "methods: no baseline"),
        (Table1, {"methods": ["baseline"]}, "methods: baseline alone"),
        (Table1, {"methods": ["baseline", "frs"]}, "methods: 'frs' is not valid"),
        (Table1, {"methods": ["baseline", "kl"]}, "lambda1: missing"),
        (Table1, {"backbones": ["vgg"]}, "backbone: 'vgg'"),
        (Table1, {"profile": "maxi"}, "profile: 'maxi' is unknown"),
    ],
)
def test_bad_parameters_are_named(kind: type, parameters: dict[str, object], sentence: str) -> None:
    with pytest.raises(ParameterError) as raised:
        kind.from_notebook({"profile": "smoke", **parameters})
    assert sentence in str(raised.value) and "\n" not in str(raised.value)
