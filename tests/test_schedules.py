"""Learning rate and λ in closed form."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sssd.config import DataSource, RunConfig
from sssd.profiles import configure

DATA = DataSource(name="none", train="", val="", paths={}, classes={1: "one"})
PAPER = configure("paper", data=DATA)
NEVER = 10**9


def constant(**fields: Any) -> RunConfig:
    """A run whose learning rate does not change, but for ``fields``."""
    return PAPER.change(**{"warmup": 0, "milestones": (NEVER,), **fields})


@pytest.mark.parametrize(
    ("t", "rate"),
    [(1, 2e-5), (501, 0.01001), (1001, 0.02), (120_000, 0.02), (120_001, 0.002), (160_000, 0.002)]
    + [(160_001, 0.0002), (180_000, 0.0002)],
)
def test_the_papers_learning_rate(t: int, rate: float) -> None:
    assert PAPER.lr_at(t) == PAPER.teacher_lr_at(t) == pytest.approx(rate, rel=1e-9)


@given(st.integers(1, 500), st.integers(0, 200), st.floats(0, 1))
def test_warm_up_rises_to_the_rate_and_stays(t: int, warmup: int, factor: float) -> None:
    run = constant(lr=1.0, warmup=warmup, warmup_factor=factor)
    now, then = run.lr_at(t), run.lr_at(t + 1)
    assert min(factor, 1) - 1e-12 <= now <= then <= 1
    if t > warmup:
        assert now == 1


def test_without_warm_up_or_milestones_it_is_constant() -> None:
    assert [constant(lr=0.3).lr_at(t) for t in (1, 2, 10**6)] == [0.3] * 3


@given(st.integers(2, 300), st.sets(st.integers(20, 280), max_size=4), st.floats(0.1, 0.9))
def test_each_milestone_passed_divides_once(t: int, milestones: set[int], gamma: float) -> None:
    run = constant(warmup=10, milestones=[*sorted(milestones), NEVER], gamma=gamma)
    passed = [m for m in milestones if m < t]  # at the milestone itself it is not yet divided
    expected = before = constant(warmup=10).lr_at(t)
    for _ in passed:
        expected *= gamma
    assert run.lr_at(t) == pytest.approx(expected, rel=1e-12)
    of_teacher = run.change(teacher_lr=0.5, teacher_gamma=1.0).teacher_lr_at(t)
    assert of_teacher == pytest.approx(0.5 * before, rel=1e-12)


def stepwise(a: float, b: float | None, t1: int) -> RunConfig:
    return PAPER.change(lambda1=a, lambda2=b, t1=t1)


@given(st.integers(1, 400), st.integers(1, 400), st.floats(0, 100), st.floats(0, 100))
def test_lambda_is_one_of_two_and_switches_once(t: int, t1: int, a: float, b: float) -> None:
    assert stepwise(a, b, t1).lambda_at(t) == (a if t <= t1 else b)
    assert stepwise(a, b, t1).lambda_at(t1 + 1) == b
    assert stepwise(a, None, t1).lambda_at(t) == a


def test_lambda_steps_after_t1() -> None:
    assert [stepwise(50, 75, 4).lambda_at(t) for t in (1, 4, 5, 9)] == [50, 50, 75, 75]
    assert [stepwise(50, None, 4).lambda_at(t) for t in (1, 4, 5, 9)] == [50] * 4
