"""RoIAlign as matrix products, against torchvision's."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import MultiScaleRoIAlign

from sssd.roi_align import LARGEST_MAP, RoIAlign

SETTINGS = {"output_size": 7, "sampling_ratio": 2, "canonical_scale": 60, "canonical_level": 3}


def both(sizes, boxes, size):
    """Outputs and gradients of the two on the same pyramid."""
    results = []
    for kind in (MultiScaleRoIAlign, RoIAlign):
        torch.manual_seed(0)
        levels = {str(i): torch.randn(len(boxes), 3, *s, requires_grad=True) for i, s in sizes}
        out = kind([str(i) for i, _ in sizes], **SETTINGS)(levels, boxes, [size] * len(boxes))
        out.backward(torch.randn(out.shape))
        results.append((out.detach(), *(level.grad for level in levels.values())))
    return results


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.lists(st.integers(0, 6), min_size=1, max_size=3))
def test_values_and_gradients_are_torchvisions(seed, counts):
    draw = torch.Generator().manual_seed(seed)
    boxes = []
    for n in counts:  # over the border, thinner than a pixel, and as large as the image
        corner = torch.rand(n, 2, generator=draw) * 90 - 15
        side = torch.rand(n, 2, generator=draw).square() * 80
        boxes.append(torch.cat([corner, corner + side], 1))
    sizes = [(0, (32, 48)), (1, (16, 24)), (2, (8, 12))]
    if sum(counts):
        for theirs, ours in zip(*both(sizes, boxes, (64, 96)), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_without_gradients_it_is_torchvisions_own():
    levels, boxes = {"0": torch.randn(1, 3, 16, 16)}, [torch.tensor([[3.0, 4.0, 20.0, 27.0]])]
    with torch.no_grad():
        outs = [
            kind(["0"], **SETTINGS)(levels, boxes, [(32, 32)])
            for kind in (MultiScaleRoIAlign, RoIAlign)
        ]
    assert torch.equal(*outs)


def test_no_box_at_all():
    out = RoIAlign(["0"], **SETTINGS)(
        {"0": torch.rand(1, 3, 8, 8)}, [torch.zeros(0, 4)], [(16, 16)]
    )
    assert out.shape == (0, 3, 7, 7)


@pytest.mark.parametrize("side", [LARGEST_MAP, LARGEST_MAP + 2])
def test_large_maps_are_left_to_torchvision(side):
    boxes = [torch.tensor([[3.0, 4.0, 90.0, 77.0]])]
    theirs, ours = both([(0, (side, side))], boxes, (2 * side, 2 * side))
    assert torch.equal(ours[1], theirs[1]) == (side > LARGEST_MAP)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-4, atol=1e-4)
