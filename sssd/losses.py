"""Distances between the student's and the teacher's pyramid: mean squared error, KL and JS.

All take maps that are already normalised (`normalise`), level by level [B, C, h_p, w_p], and give a
scalar. They compute in float32 whatever autocast says, and in float64 where float64 is given.

The paper leaves open how a map becomes a distribution, and what N is. Here it is a softmax over the
channels of each pixel, and the mean over all elements; METHOD.md gives the evidence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

PAPER_NORMALISER = 256
"""The paper's pyramid width. Averaging a level's JS over its elements, pixels × channels, divides
the mean per pixel by C; dividing by this constant instead lets λ keep its meaning at every width."""


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def normalise(x: Tensor, eps: float = 1e-5) -> Tensor:
    """InstanceNorm without affine parameters over the pixels of [B, C, h, w].

    A level of a single pixel has no variance: it becomes zero (LGD's release stops there).
    """
    with torch.autocast(x.device.type, enabled=False):
        centred = _wide(x) - _wide(x).mean(dim=(2, 3), keepdim=True)
        return centred * (centred.square().mean(dim=(2, 3), keepdim=True) + eps).rsqrt()


def _pairs(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    shapes = [[tuple(level.shape) for level in side] for side in (student, teacher)]
    if shapes[0] != shapes[1] or not shapes[0]:
        raise ValueError(f"pyramids: shapes {shapes[0]} and {shapes[1]}; expected the same levels")
    return [(_wide(s), _wide(t)) for s, t in zip(student, teacher, strict=True)]


def mse(
    student: Sequence[Tensor], teacher: Sequence[Tensor], normaliser: int = PAPER_NORMALISER
) -> Tensor:
    """Mean squared error over all elements of all levels together (LGD).

    ``normaliser`` has no part in it, and is there so that all distances are called alike.

    Raises:
        ValueError: the two pyramids have not the same shapes.
    """
    pairs = _pairs(student, teacher)
    with torch.autocast(pairs[0][0].device.type, enabled=False):
        total = torch.stack([(s - t).square().sum() for s, t in pairs]).sum()
        return total / sum(s.numel() for s, _ in pairs)


def kl_map(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(P‖Q) in nats of each pixel, [B, C, h, w] → [B, h, w]; P is the student's, Q the teacher's."""
    with torch.autocast(student.device.type, enabled=False):
        p, q = _wide(student).log_softmax(dim=1), _wide(teacher).log_softmax(dim=1)
        return (p.exp() * (p - q)).sum(dim=1)


def js_map(student: Tensor, teacher: Tensor) -> Tensor:
    """Jensen-Shannon divergence in nats of each pixel, [B, C, h, w] → [B, h, w], at most ln 2."""
    with torch.autocast(student.device.type, enabled=False):
        p, q = _wide(student).log_softmax(dim=1), _wide(teacher).log_softmax(dim=1)
        # log P − log M = ln 2 − softplus(log Q − log P): exactly 0 where P and Q are equal, and
        # finite where one of them is 0. (Above its threshold softplus is the identity.)
        half = math.log(2)
        in_p = p.exp() * (half - F.softplus(q - p, threshold=50))
        in_q = q.exp() * (half - F.softplus(p - q, threshold=50))
        return 0.5 * (in_p + in_q).sum(dim=1)


def kl(
    student: Sequence[Tensor], teacher: Sequence[Tensor], normaliser: int = PAPER_NORMALISER
) -> Tensor:
    """Mean over levels of the mean KL per pixel ÷ ``normaliser``: unbounded, and not symmetric.

    No source prints the reduction; this is that of `js` without the root, as MSE has none.

    Raises:
        ValueError: the two pyramids have not the same shapes.
    """
    pairs = _pairs(student, teacher)
    return torch.stack([kl_map(s, t).mean() / normaliser for s, t in pairs]).mean()


def js(
    student: Sequence[Tensor], teacher: Sequence[Tensor], normaliser: int = PAPER_NORMALISER
) -> Tensor:
    """Mean over levels of √(mean JS per pixel ÷ ``normaliser``) (SSSD, section 2).

    The root's gradient is infinite at 0; where student and teacher are equal it is taken as zero,
    which is the limit of JS itself.

    Raises:
        ValueError: the two pyramids have not the same shapes.
    """
    levels = torch.stack([js_map(s, t).mean() / normaliser for s, t in _pairs(student, teacher)])
    zero = levels <= 0  # rounding can give a little less than 0; NaN stays NaN
    # Twice where: a root taken at 0 would make the gradient NaN even where it is not chosen.
    return torch.where(zero, 0.0, torch.where(zero, 1.0, levels).sqrt()).mean()
