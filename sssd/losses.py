"""Distances between the student's and the teacher's pyramid: mean squared error, KL and JS.

`mse`, `kl` and `js` take the two pyramids as lists of levels [B, C, h_p, w_p], each normalised by
`normalise`, and return a scalar. They compute in float32 even under autocast, and in float64 if
they are given float64. Pyramids of different shapes raise a ValueError.

The paper does not say how a map becomes a distribution, or what N is. Here it is a softmax over the
channels of each pixel, and N counts all elements; METHOD.md gives the evidence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

PAPER_NORMALISER = 256
"""The paper's pyramid width. The mean of a level's JS over its elements, pixels × channels, is the
mean per pixel divided by C; a division by this constant gives λ the same meaning at every width."""


def wide(x: Tensor) -> Tensor:
    """The tensor in float32, or in float64 if it already has that."""
    return x if x.dtype == torch.float64 else x.float()


def normalise(x: Tensor) -> Tensor:
    """InstanceNorm without affine parameters over the pixels of [B, C, h, w].

    A level of a single pixel has no variance: it becomes zero (LGD's release fails there).
    """
    x = wide(x)
    if x.shape[2] * x.shape[3] == 1:
        return x - x  # 0, but NaN stays NaN, so that divergence is seen
    # Group norm with one channel per group is the same, and several times faster on a CPU.
    return torch.group_norm(x, x.shape[1])


def _pairs(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    shapes = [[tuple(level.shape) for level in side] for side in (student, teacher)]
    if shapes[0] != shapes[1] or not shapes[0]:
        raise ValueError(f"pyramids: shapes {shapes[0]} and {shapes[1]}; expected the same levels")
    return [(wide(s), wide(t)) for s, t in zip(student, teacher, strict=True)]


def mse(
    student: Sequence[Tensor], teacher: Sequence[Tensor], normaliser: int = PAPER_NORMALISER
) -> Tensor:
    """Mean squared error over all elements of all levels together (LGD).

    ``normaliser`` is not used; it is there so that all distances are called alike.
    """
    pairs = _pairs(student, teacher)
    total = torch.stack([(s - t).square().sum() for s, t in pairs]).sum()
    return total / sum(s.numel() for s, _ in pairs)


def kl_map(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(P‖Q) in nats of each pixel, [B, C, h, w] → [B, h, w]; P is the student, Q the teacher."""
    p, q = wide(student).log_softmax(dim=1), wide(teacher).log_softmax(dim=1)
    return (p.exp() * (p - q)).sum(dim=1)


def js_map(student: Tensor, teacher: Tensor) -> Tensor:
    """Jensen-Shannon divergence in nats of each pixel, [B, C, h, w] → [B, h, w], at most ln 2."""
    p, q = wide(student).log_softmax(dim=1), wide(teacher).log_softmax(dim=1)
    in_p, in_q = _terms(p, q)
    return (p.exp() * in_p + q.exp() * in_q).sum(dim=1)


def _terms(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """½ (log P − log M) and ½ (log Q − log M), from log P and log Q.

    log P − log M = ln 2 − softplus(log Q − log P): exactly 0 where P and Q are equal, and finite
    if one of them is 0. (Above its threshold softplus is the identity.)
    """
    apart = q - p
    in_p = F.softplus(apart, threshold=50).neg_().add_(math.log(2)).mul_(0.5)
    return in_p, torch.add(in_p, apart, alpha=0.5)


CHUNK = 2**16
"""How many values of a map are computed at a time: these fit into a processor's cache."""


class _MeanJS(torch.autograd.Function):
    """The mean of `js_map`, with the gradient computed in the forward pass.

    With a = ½ (log P − log M), the gradient for the features of P is P · (a − Σ P a), with the sum
    over the channels. So a map is computed in small parts, and only the gradient is kept; autograd
    would keep five maps for the student, and five for the teacher.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        B, C, h, w = student.shape
        total = student.new_zeros(())
        gradients = [
            torch.empty_like(x) if needed else None
            for x, needed in zip((student, teacher), ctx.needs_input_grad, strict=True)
        ]
        images = max(CHUNK // (C * h * w), 1)
        rows = max(CHUNK // (images * C * w), 1)
        for i in range(0, B, images):
            for y in range(0, h, rows):
                part = (slice(i, i + images), slice(None), slice(y, y + rows))
                logs = [x[part].log_softmax(dim=1) for x in (student, teacher)]
                terms = _terms(*logs)
                for log, term, gradient in zip(logs, terms, gradients, strict=True):
                    probability = log.exp_()
                    mean = (probability * term).sum(dim=1, keepdim=True)
                    total += mean.sum()
                    if gradient is not None:
                        term.sub_(mean).div_(B * h * w)
                        torch.mul(probability, term, out=gradient[part])
        ctx.save_for_backward(*gradients)
        return total / (B * h * w)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(None if x is None else x * outer for x in ctx.saved_tensors)


def kl(
    student: Sequence[Tensor], teacher: Sequence[Tensor], normaliser: int = PAPER_NORMALISER
) -> Tensor:
    """Mean over levels of the mean KL per pixel ÷ ``normaliser``: unbounded, and not symmetric.

    No source gives the reduction; this is that of `js` without the root, as MSE has no root.
    """
    pairs = _pairs(student, teacher)
    return torch.stack([kl_map(s, t).mean() / normaliser for s, t in pairs]).mean()


def js(
    student: Sequence[Tensor], teacher: Sequence[Tensor], normaliser: int = PAPER_NORMALISER
) -> Tensor:
    """Mean over levels of √(mean JS per pixel ÷ ``normaliser``) (SSSD, section 2).

    The gradient of the root is infinite at 0. Where student and teacher are equal, it is set to
    zero, which is the gradient of JS itself.
    """
    pairs = _pairs(student, teacher)
    levels = torch.stack([_MeanJS.apply(s, t) for s, t in pairs]) / normaliser
    zero = levels <= 0  # rounding can give a little less than 0; NaN stays NaN
    # The inner where takes no root at 0: its gradient would be NaN even where it is not chosen.
    return torch.where(zero, 0.0, torch.where(zero, 1.0, levels).sqrt()).mean()
