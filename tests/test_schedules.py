"""Learning rate and λ in closed form."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sssd.schedules import learning_rate, step_lambda

PAPER = {"base": 0.02, "warmup": 1000, "warmup_factor": 1e-3, "milestones": (120_000, 160_000)}


@pytest.mark.parametrize(
    ("t", "rate"),
    [(1, 2e-5), (501, 0.01001), (1001, 0.02), (120_000, 0.02), (120_001, 0.002), (160_000, 0.002)]
    + [(160_001, 0.0002), (180_000, 0.0002)],
)
def test_the_papers_learning_rate(t: int, rate: float) -> None:
    assert learning_rate(t, **PAPER) == pytest.approx(rate, rel=1e-9)


@given(st.integers(1, 500), st.integers(0, 200), st.floats(0, 1))
def test_warm_up_rises_to_the_rate_and_stays(t: int, warmup: int, factor: float) -> None:
    now, then = (learning_rate(x, 1.0, warmup=warmup, warmup_factor=factor) for x in (t, t + 1))
    assert min(factor, 1) - 1e-12 <= now <= then <= 1
    if t > warmup:
        assert now == 1


def test_without_warm_up_or_milestones_it_is_constant() -> None:
    assert [learning_rate(t, 0.3) for t in (1, 2, 10**6)] == [0.3] * 3


@given(st.integers(2, 300), st.sets(st.integers(20, 280), max_size=4), st.floats(0.1, 0.9))
def test_each_milestone_passed_divides_once(t: int, milestones: set[int], gamma: float) -> None:
    rate = learning_rate(t, 0.02, warmup=10, milestones=sorted(milestones), gamma=gamma)
    passed = [m for m in milestones if m < t]  # at the milestone itself it is not yet divided
    expected = learning_rate(t, 0.02, warmup=10)
    for _ in passed:
        expected *= gamma
    assert rate == pytest.approx(expected, rel=1e-12)


@given(st.integers(1, 400), st.integers(0, 400), st.floats(0, 100), st.floats(0, 100))
def test_lambda_is_one_of_two_and_switches_once(t: int, t1: int, a: float, b: float) -> None:
    assert step_lambda(t, a, b, t1) == (a if t <= t1 else b)
    assert step_lambda(t1 + 1, a, b, t1) == b
    assert step_lambda(t, a, None, t1) == a


def test_lambda_steps_after_t1() -> None:
    assert [step_lambda(t, 50, 75, 4) for t in (1, 4, 5, 9)] == [50, 50, 75, 75]
    assert [step_lambda(t, 50, None, 4) for t in (1, 4, 5, 9)] == [50] * 4
