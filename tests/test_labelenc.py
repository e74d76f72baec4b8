"""LabelEnc's label map by hand and against plain loops; its CNN against torchvision's pyramids."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from sssd.detectors import build_detector, classifier, fpn_backbone
from sssd.labelenc import Bottleneck, LabelEncodingFunction, label_map

P2_TO_P5, P3_TO_P5 = (1, 2, 3, 4), (2, 3, 4)


def extra(stages: tuple[int, ...], channels: int) -> Any:
    return LastLevelMaxPool() if stages == P2_TO_P5 else LastLevelP6P7(channels, channels)


def encoder(
    stages: tuple[int, ...] = P2_TO_P5, channels: int = 16, width: int = 8
) -> LabelEncodingFunction:
    torch.manual_seed(0)
    return LabelEncodingFunction(3, channels, stages, extra(stages, channels), width)


def squares(seed: int = 0, size: tuple[int, int] = (64, 96)) -> Tensor:
    """The label map [2, 3, H, W] of an image with three boxes and of one without any."""
    draw = torch.Generator().manual_seed(seed)
    corner = torch.rand(3, 2, generator=draw) * torch.tensor([50.0, 30.0])
    boxes = torch.cat([corner, corner + 10 + 20 * torch.rand(3, 2, generator=draw)], 1)
    none = torch.zeros(0, dtype=torch.int64)
    return label_map([boxes, torch.zeros(0, 4)], [torch.tensor([0, 2, 1]), none], 3, size)


def test_label_map_by_hand() -> None:
    got = label_map([torch.tensor([[1.0, 0, 5, 2]])], [torch.tensor([1])], 2, (4, 7))
    assert got.shape == (1, 2, 4, 7)
    assert (got[0, 0] == 0).all()  # the other class
    assert got[0, 1].tolist() == [
        [0, 0.5, 0.5, 0.5, 0.5, 0.5, 0],  # the border y = 0
        [0, 0.5, 0.75, 1, 0.75, 0.5, 0],  # the centre (3, 1), and ¼ of the width off it
        [0, 0.5, 0.5, 0.5, 0.5, 0.5, 0],
        [0, 0, 0, 0, 0, 0, 0],
    ]


def test_overlaps_take_the_maximum_within_a_class_only() -> None:
    boxes = [torch.tensor([[0.0, 0, 4, 4], [2, 2, 6, 6], [2, 0, 4, 4]])]
    got = label_map(boxes, [torch.tensor([0, 0, 1])], 2, (7, 7))[0]
    diagonal = [0.5, 0.75, 1, 0.75, 1, 0.75, 0.5]  # each centre, and ¾ between the two
    assert got[0].diagonal().tolist() == diagonal
    assert got[1, 2].tolist() == [0, 0, 0.5, 1, 0.5, 0, 0]
    alone = label_map([boxes[0][2:]], [torch.tensor([1])], 2, (7, 7))[0]
    assert torch.equal(got[1], alone[1])


def test_colour_multiplies_before_the_maximum() -> None:
    boxes = [torch.tensor([[0.0, 0, 4, 4]]), torch.tensor([[0.0, 0, 4, 4], [2, 0, 6, 4]])]
    labels = [torch.tensor([1]), torch.tensor([0, 0])]
    colour = torch.tensor([0.25, 0.5, 1.0])
    plain, got = (label_map(boxes, labels, 2, (5, 7), c) for c in (None, colour))
    assert torch.equal(got[0], 0.25 * plain[0])
    # At (2, 2) the first object gives 0.5 · 1 and the second 1 · ½; at (3, 2) 0.5 · ¾ and ¾.
    assert got[1, 0, 2].tolist() == [0.25, 0.375, 0.5, 0.75, 1, 0.75, 0.5]


def test_colour_noise_is_for_training_alone() -> None:
    made, boxes, labels = encoder(P3_TO_P5), [torch.tensor([[4.0, 8, 40, 30]])], [torch.tensor([1])]

    def first_level() -> torch.Tensor:
        return made([], boxes, labels, (64, 64))[0]

    plain = first_level()
    made.noisy = True
    assert any(not torch.equal(first_level(), plain) for _ in range(8))
    made.eval()
    assert all(torch.equal(first_level(), plain) for _ in range(8))


@settings(max_examples=15)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=3), st.integers(0, 999))
def test_label_map_by_plain_loops(counts: list[int], seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    height, width, classes = 9, 12, 3
    boxes, labels = [], []
    for count in counts:  # partly outside the image, too
        corner = torch.rand(count, 2, generator=draw, dtype=torch.float64) * 12 - 2
        far = corner + 0.1 + 8 * torch.rand(count, 2, generator=draw, dtype=torch.float64)
        boxes.append(torch.cat([corner, far], 1))
        labels.append(torch.randint(classes, (count,), generator=draw))
    colour = torch.rand(sum(counts), generator=draw, dtype=torch.float64)
    expected = torch.zeros(len(counts), classes, height, width, dtype=torch.float64)
    n = 0
    for b, own in enumerate(boxes):
        for (x1, y1, x2, y2), label in zip(own.tolist(), labels[b].tolist(), strict=True):
            for y in range(height):
                for x in range(width):
                    off_x, off_y = abs(x - (x1 + x2) / 2), abs(y - (y1 + y2) / 2)
                    if off_x <= (x2 - x1) / 2 and off_y <= (y2 - y1) / 2:
                        value = (1 - max(off_x / (x2 - x1), off_y / (y2 - y1))) * colour[n].item()
                        expected[b, label, y, x] = max(expected[b, label, y, x].item(), value)
            n += 1
    got = label_map(boxes, labels, classes, (height, width), colour)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("stages", [P2_TO_P5, P3_TO_P5])
@pytest.mark.parametrize("size", [(64, 96), (32, 32), (75, 101), (33, 160)])
def test_levels_have_the_shapes_of_torchvisions_pyramid(
    stages: tuple[int, ...], size: tuple[int, int]
) -> None:
    pyramid = fpn_backbone(classifier("resnet18"), 16, stages, extra(stages, 16)).eval()
    with torch.no_grad():
        expected = [level.shape for level in pyramid(torch.zeros(2, 3, *size)).values()]
        got = [level.shape for level in encoder(stages).encode(torch.zeros(2, 3, *size))]
    assert got == expected


@pytest.mark.parametrize("name", ["faster_rcnn", "retinanet", "fcos"])
@pytest.mark.parametrize(("backbone", "width"), [("resnet18", 32), ("resnet50", 128)])
def test_the_detectors_fpn_can_start_from_it(name: str, backbone: str, width: int) -> None:
    """Stage 2; and the detector's extra block, given to the encoder, stays as it was."""
    with torch.device("meta"):  # shapes and names only
        detector: Any = build_detector(name, backbone, 2, width=32)
        stages = P2_TO_P5 if name == "faster_rcnn" else P3_TO_P5
        made = LabelEncodingFunction(2, 32, stages, detector.backbone.fpn.extra_blocks, width)
        detector.backbone.fpn.load_state_dict(made.fpn.state_dict(), strict=True)
    block = LastLevelP6P7(16, 16)
    before = copy.deepcopy(block.state_dict())
    copied: Any = LabelEncodingFunction(3, 16, P3_TO_P5, block, 8).fpn.extra_blocks
    assert all(torch.equal(before[name], value) for name, value in block.state_dict().items())
    assert not torch.equal(copied.p6.weight, block.p6.weight)


def test_bottleneck_by_its_parts() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 6, 9, 7)
    block = Bottleneck(6, 8, 2)
    one, three, last = (m for m in block.branch if isinstance(m, nn.Conv2d))
    h = F.conv2d(x, one.weight, one.bias).relu()
    h = F.conv2d(h, three.weight, three.bias, stride=2, padding=1).relu()
    assert h.shape[1] == 2
    assert isinstance(block.shortcut, nn.Conv2d)
    straight = F.conv2d(x, block.shortcut.weight, block.shortcut.bias, stride=2)
    expected = (F.conv2d(h, last.weight, last.bias) + straight).relu()
    torch.testing.assert_close(block(x), expected)
    assert isinstance(Bottleneck(8, 8).shortcut, nn.Identity)


def test_depth_and_widths() -> None:
    """Conv 7×7 K → 128; bottlenecks → 256, 512, 512, 1024, 1024, 2048; no normalisation."""
    with torch.device("meta"):
        made = LabelEncodingFunction(80, 256, P2_TO_P5, LastLevelMaxPool())
    stem = made.stem[0]
    assert isinstance(stem, nn.Conv2d)
    assert (stem.in_channels, stem.out_channels, stem.kernel_size) == (80, 128, (7, 7))
    assert stem.stride == (2, 2)
    blocks = [m for m in made.modules() if isinstance(m, Bottleneck)]
    assert [b.branch[-1].out_channels for b in blocks] == [256, 512, 512, 1024, 1024, 2048]
    assert [b.branch[2].stride[0] for b in blocks] == [2, 2, 1, 2, 1, 2]
    assert all(
        isinstance(m, (nn.Conv2d, nn.ReLU, nn.Identity, LastLevelMaxPool))
        for m in made.modules()
        if not list(m.children())
    )


@pytest.mark.parametrize("stages", [P2_TO_P5, P3_TO_P5])
def test_gradients_reach_every_parameter(stages: tuple[int, ...]) -> None:
    made = encoder(stages)
    torch.stack([(level**2).sum() for level in made.encode(squares())]).sum().backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("width", [32, 128])
def test_initial_signals_neither_explode_nor_vanish(width: int) -> None:
    """Root mean square of each stage and level inside a box that covers everything."""
    torch.manual_seed(0)
    made = LabelEncodingFunction(8, 2 * width, P2_TO_P5, LastLevelMaxPool(), width)
    everywhere = torch.zeros(2, 8, 96, 96)
    everywhere[:, 3] = 0.68  # root of the mean square of 1 − max(…) over a box
    x, sizes = made.stem(everywhere), []
    for stage in made.stages:
        x = stage(x)
        sizes.append(x[..., 1:-1, 1:-1].square().mean().sqrt().item())
    assert all(0.2 < size < 3 for size in sizes), sizes
    assert all(0.2 < level.square().mean().sqrt() < 5 for level in made.encode(everywhere))


def test_the_normalisation_is_computed_in_float32_at_least() -> None:
    x = 5 * torch.randn(2, 6, 9, 7, generator=torch.Generator().manual_seed(0)) + 2
    norm, plain = LabelEncodingFunction.norm, F.group_norm(x, 1)
    assert torch.equal(norm(x), plain) and norm(x.double()).dtype == torch.float64
    half = x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(norm(half), F.group_norm(half.float(), 1))


def test_an_image_without_objects_gives_zeros_at_first_and_alone() -> None:
    made, image = encoder(), squares()
    for level in made.encode(image):
        assert (level[1] == 0).all() and level[0].abs().max() > 0
    for both, one in zip(made.encode(image), made.encode(image[:1]), strict=True):
        torch.testing.assert_close(both[:1], one)
