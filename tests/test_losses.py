"""Distances against closed forms, float64 references, scipy and finite differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from torch import Tensor

from sssd.losses import js, js_map, kl, kl_map, mse, normalise

DISTANCES = {"mse": mse, "kl": kl, "js": js}


def pair(
    seed: int, shape: tuple[int, ...] = (2, 16, 3, 5), dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=draw, dtype=dtype) for _ in range(2))  # type: ignore[return-value]


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


@settings(max_examples=25)
@given(st.integers(0, 2**31), st.sampled_from([2, 7, 64]))
def test_js_of_each_pixel_is_scipys(seed: int, channels: int) -> None:
    p, q = pair(seed, (2, channels, 3, 2))
    got = js_map(3 * p, 3 * q)
    for b, y, x in np.ndindex(2, 3, 2):
        a, c = (softmax(3 * m[b, :, y, x].numpy()) for m in (p, q))
        assert got[b, y, x].item() == pytest.approx(jensenshannon(a, c) ** 2, rel=1e-9)


def test_kl_of_each_pixel_by_its_definition() -> None:
    p, q = pair(1)
    got = kl_map(p, q)
    for b, y, x in np.ndindex(2, 3, 5):
        a, c = (softmax(m[b, :, y, x].numpy()) for m in (p, q))
        assert got[b, y, x].item() == pytest.approx(float((a * np.log(a / c)).sum()), rel=1e-9)


def test_reduction_over_pixels_channels_and_levels() -> None:
    """√(JS per pixel ÷ 256) a level, then the mean of levels; MSE over all elements together."""
    a, b = pair(2, (2, 256, 4, 4)), pair(3, (2, 256, 1, 2))
    student, teacher = [a[0], b[0]], [a[1], b[1]]
    by_elements = [js_map(s, t).sum() / s.numel() for s, t in zip(student, teacher, strict=True)]
    assert js(student, teacher).item() == pytest.approx(
        sum(math.sqrt(x) for x in by_elements) / 2, rel=1e-12
    )
    assert kl(student, teacher).item() == pytest.approx(
        sum((kl_map(s, t).sum() / s.numel()).item() for s, t in zip(student, teacher, strict=True))
        / 2
    )
    elements = torch.cat([((s - t) ** 2).flatten() for s, t in zip(student, teacher, strict=True)])
    assert mse(student, teacher).item() == pytest.approx(elements.mean().item(), rel=1e-12)


def test_the_constant_and_not_the_width_divides() -> None:
    p, q = pair(4, (1, 16, 2, 2))
    expected = math.sqrt(js_map(p, q).mean().item() / 256)
    assert js([p], [q]).item() == pytest.approx(expected, rel=1e-12)
    assert js([p], [q], 64).item() == pytest.approx(2 * expected, rel=1e-12)
    assert kl([p], [q], 64).item() == pytest.approx(4 * kl([p], [q]).item(), rel=1e-12)


@settings(max_examples=25)
@given(st.integers(0, 2**31), st.floats(0.01, 60))
def test_js_is_symmetric_and_bounded(seed: int, spread: float) -> None:
    p, q = (spread * x for x in pair(seed))
    assert torch.allclose(js_map(p, q), js_map(q, p), rtol=1e-9, atol=1e-15)
    assert (js_map(p, q) >= -1e-12).all() and (js_map(p, q) <= math.log(2) + 1e-12).all()
    assert (kl_map(p, q) >= -1e-12).all()


def test_the_gradient_of_the_mean_is_that_of_its_pixels() -> None:
    """The gradient worked out by hand and in pieces against autograd's of the plain formula."""
    for shape in ((3, 16, 5, 7), (2, 64, 40, 50)):  # in one piece, and in several
        maps = [x.requires_grad_() for x in pair(20, shape)]
        plain = (js_map(*maps).mean() / 256).sqrt()
        for wanted in (maps, maps[:1], maps[1:]):
            expected = torch.autograd.grad(plain, wanted, retain_graph=True)
            asked = [x if any(x is y for y in wanted) else x.detach() for x in maps]
            found = torch.autograd.grad(js([asked[0]], [asked[1]]), wanted)
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-15)


def test_js_reaches_ln2_where_kl_grows_without_bound() -> None:
    p = torch.tensor([80.0, 0.0], dtype=torch.float64).reshape(1, 2, 1, 1)
    assert js_map(p, p.flip(1)).item() == pytest.approx(math.log(2), rel=1e-12)
    assert kl_map(p, p.flip(1)).item() == pytest.approx(80, rel=1e-12)
    assert kl_map(2 * p, 2 * p.flip(1)).item() == pytest.approx(160, rel=1e-12)
    closed = math.log(2) - 0.5 * math.log(1)  # disjoint supports
    assert js([p], [p.flip(1)], 1).item() == pytest.approx(math.sqrt(closed), rel=1e-9)


@pytest.mark.parametrize("name", DISTANCES)
def test_gradients_by_finite_differences(name: str) -> None:
    p, q = pair(5, (1, 4, 2, 2))
    p.requires_grad_()
    q.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: DISTANCES[name]([a], [b], 256), (p, q))


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_at_and_near_equality_is_finite(name: str, dtype: torch.dtype) -> None:
    p, _ = pair(6, dtype=dtype)
    for off in (0.0, 1e-7, 1e-4):
        student = (p + off * torch.randn_like(p)).requires_grad_()
        value = DISTANCES[name]([student], [p], 256)
        (gradient,) = torch.autograd.grad(value, student)
        assert torch.isfinite(gradient).all() and value >= -1e-8  # rounding, in float32
        if off == 0:
            assert value.item() == 0 and gradient.abs().max() <= 1e-6


def test_one_equal_level_spoils_no_other() -> None:
    a, b = pair(7), pair(8)
    student = [a[0].requires_grad_(), b[0].clone().requires_grad_()]
    js(student, [a[1], b[0].detach()]).backward()
    assert student[1].grad is not None and (student[1].grad == 0).all()
    assert student[0].grad is not None and student[0].grad.abs().sum() > 0


@pytest.mark.parametrize("name", DISTANCES)
def test_half_precision_is_computed_in_float32(name: str) -> None:
    p, q = (x.bfloat16() for x in pair(9, (2, 64, 4, 4)))
    expected = DISTANCES[name]([p.double()], [q.double()], 256)
    with torch.autocast("cpu", torch.bfloat16):
        got = DISTANCES[name]([normalise(p) * 0 + p], [q], 256)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)


def test_normalise_is_instance_norm() -> None:
    x = 5 * pair(10, (3, 8, 6, 7))[0] + 2
    torch.testing.assert_close(normalise(x), torch.nn.functional.instance_norm(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert normalise(x.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("name", DISTANCES)
def test_a_level_of_one_pixel_is_zero_and_adds_nothing(name: str) -> None:
    student, teacher = pair(11, (2, 8, 1, 1), torch.float32)
    student.requires_grad_()
    assert (normalise(student) == 0).all()
    value = DISTANCES[name]([normalise(student)], [normalise(teacher)], 256)
    value.backward()
    assert value.item() == 0 and student.grad is not None and (student.grad == 0).all()


@pytest.mark.parametrize(
    ("correlation", "per_pixel", "distance", "ratio"),
    [(0.0, 0.200, 0.0280, 71), (0.5, None, 0.0207, 48)],
)
def test_the_papers_calibration(
    correlation: float, per_pixel: float | None, distance: float, ratio: float
) -> None:
    """At width 256 these give the 1 to 50 that the paper finds (SSSD, calibration of λ)."""
    p, q = pair(12, (4, 256, 40, 40), torch.float32)
    q = correlation * p + math.sqrt(1 - correlation**2) * q
    if per_pixel:
        assert js_map(p, q).mean().item() == pytest.approx(per_pixel, abs=0.001)
    assert js([p], [q]).item() == pytest.approx(distance, abs=0.0002)
    assert mse([p], [q]).item() / js([p], [q]).item() == pytest.approx(ratio, abs=1)


@pytest.mark.parametrize("name", DISTANCES)
def test_unlike_pyramids_are_refused(name: str) -> None:
    p, q = pair(13)
    for student, teacher in (([p], [q, q]), ([p], [q[:, :8]]), ([], [])):
        with pytest.raises(ValueError, match="expected the same levels"):
            DISTANCES[name](student, teacher, 256)


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_what_is_not_finite_in_one_level_is_seen(name: str, bad: float, side: int) -> None:
    whole, broken = pair(14), pair(15)
    broken[side][0, 3, 1, 2] = bad
    student, teacher = ([normalise(whole[i]), normalise(broken[i])] for i in (0, 1))
    assert DISTANCES[name](student, teacher, 256).isnan()
