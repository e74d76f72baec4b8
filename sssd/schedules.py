"""Learning rate and λ as pure functions of the iteration.

Iterations are counted from 1, so "after T iterations" means "t > T" everywhere: the learning
rate decays, λ switches and distillation starts *after* the iteration that is given for it
(SSSD, section on stepwise λ; LGD's published schedule).
"""

from __future__ import annotations

from collections.abc import Sequence


def learning_rate(
    t: int,
    base: float,
    *,
    warmup: int = 0,
    warmup_factor: float = 1e-3,
    milestones: Sequence[int] = (),
    gamma: float = 0.1,
) -> float:
    """Learning rate of iteration ``t`` (counted from 1).

    Linear warm-up from ``warmup_factor · base`` at t = 1 to ``base`` at t = warmup + 1, then
    multiplied by ``gamma`` after each milestone (LGD's release: 1,000 iterations from 1e-3,
    ÷10 at 120,000 and 160,000).
    """
    decay = gamma ** sum(t > milestone for milestone in milestones)
    done = min((t - 1) / warmup, 1.0) if warmup else 1.0
    return base * decay * (warmup_factor * (1 - done) + done)


def step_lambda(t: int, lambda1: float, lambda2: float | None, t1: int) -> float:
    """λ(t) = λ1 for t ≤ T1 and λ2 for t > T1 (SSSD, "stepwise"); constant when λ2 is None.

    ``t1`` is T1; the paper's is the first learning-rate milestone, 120,000 of 180,000.
    """
    return lambda1 if lambda2 is None or t <= t1 else lambda2
