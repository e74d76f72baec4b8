"""Detectors split at the pyramid give what the stock ones give, and their state fits theirs."""

from __future__ import annotations

from collections import OrderedDict
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torchvision.models.detection as tv
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN, resnet_fpn_backbone

from sssd.detectors import (
    build_detector,
    family_of,
    freeze_stages,
    frozen_backbone,
    levels_of,
)

FAMILIES = ("faster_rcnn", "retinanet", "fcos")


def detector(family: str, **fields: Any) -> Any:
    torch.manual_seed(0)
    small = {"width": 16, "min_sizes": (64,), "max_size": 112, "scale": 0.25}
    small |= {"proposals": 64, "roi_samples": 16}
    return build_detector(family, "resnet18", 3, **{**small, **fields})


def batch(sizes: tuple[tuple[int, int], ...] = ((64, 64), (80, 100))) -> tuple[list[Tensor], Any]:
    draw = torch.Generator().manual_seed(1)
    images = [torch.rand(3, *size, generator=draw) for size in sizes]
    targets = []
    for i in range(len(sizes)):
        corner = 30 * torch.rand(i + 1, 2, generator=draw)
        boxes = torch.cat([corner, corner + 5 + 20 * torch.rand(i + 1, 2, generator=draw)], dim=1)
        targets.append({"boxes": boxes, "labels": 1 + torch.arange(i + 1) % 3})
    return images, targets


def split_losses(model: Any, images: list[Tensor], targets: Any, frozen: bool = False) -> Any:
    prepared, own = model.transform(images, targets)
    with frozen_backbone(model) if frozen else nullcontext():
        levels = levels_of(model.backbone(prepared.tensors))
    return family_of(model).head(model, prepared, levels, own)


@pytest.mark.parametrize("family", FAMILIES)
def test_pyramid_and_head_are_the_stock_detector(family: str) -> None:
    model = detector(family).train()
    images, targets = batch()
    torch.manual_seed(5)
    expected = model(images, targets)
    torch.manual_seed(5)
    got = split_losses(model, images, targets)
    assert list(got) == list(expected)
    for name, loss in expected.items():
        assert torch.equal(got[name], loss), name


def settings(model: nn.Module) -> dict[str, Any]:
    """Every number built into a detector, wherever it lies, but those of batch norm.

    Without weights torchvision's builders train batch norm, where ours is frozen.
    """
    found = {}
    for path, module in model.named_modules():
        if "BatchNorm" not in type(module).__name__:
            for name, value in vars(module).items():
                if isinstance(value, int | float | tuple | dict) and not name.startswith("_"):
                    found[f"{path}.{name}"] = value
    return found


@pytest.mark.parametrize(
    ("family", "stock", "chosen"),
    [
        ("faster_rcnn", tv.fasterrcnn_resnet50_fpn, set()),
        ("retinanet", tv.retinanet_resnet50_fpn, {".detections_per_img"}),
        ("fcos", tv.fcos_resnet50_fpn, {".score_thresh"}),
    ],
)
def test_at_the_papers_size_it_is_torchvisions_own(
    family: str, stock: Any, chosen: set[str]
) -> None:
    torch.manual_seed(0)
    ours: Any = build_detector(family, "resnet50", 3)
    theirs = stock(weights=None, weights_backbone=None, num_classes=4)
    mine, its = settings(ours), settings(theirs)
    assert ".transform.min_size" in {f".{name}" for name in its} and mine.keys() == its.keys()
    assert {name for name in its if mine[name] != its[name]} == chosen

    theirs.load_state_dict(ours.state_dict(), strict=True)
    for model in (ours, theirs):
        model.transform.min_size, model.transform.max_size = (96,), 160
        if family != "faster_rcnn":  # their untrained scores begin at 0.01
            model.score_thresh, model.detections_per_img = 0.0, 50
    image = [torch.rand(3, 90, 110)]
    with torch.no_grad():
        (a,), (b,) = ours.eval()(image), theirs.eval()(image)
    assert len(a["boxes"]) >= 50
    for name in a:
        torch.testing.assert_close(a[name], b[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_pyramid_drops_the_gradients_below_it(family: str) -> None:
    model = detector(family).train()
    images, targets = batch()
    sum(split_losses(model, images, targets, frozen=True).values()).backward()
    assert all(p.grad is None for p in model.backbone.body.parameters())
    assert all(p.grad is not None for p in model.backbone.fpn.parameters())


@pytest.mark.parametrize(("trainable", "learning"), [(0, 0), (3, 3), (4, 4), (5, 5)])
def test_freeze_stages(trainable: int, learning: int) -> None:
    model = detector("retinanet")
    freeze_stages(model, trainable)
    named = model.backbone.body.named_parameters()
    stages = {name.split(".")[0] for name, p in named if p.requires_grad}
    assert stages == set(("layer4", "layer3", "layer2", "layer1", "conv1")[:learning])


@pytest.mark.parametrize("trainable", range(6))
def test_with_trained_norm_the_stages_freeze_as_torchvisions(trainable: int) -> None:
    model = detector("retinanet", trained_norm=True)
    freeze_stages(model, trainable)
    theirs = resnet_fpn_backbone(
        backbone_name="resnet18",
        weights=None,
        norm_layer=nn.BatchNorm2d,
        trainable_layers=trainable,
        returned_layers=[2, 3, 4],
    )
    learning, expected = (
        {name for name, p in body.named_parameters() if p.requires_grad}
        for body in (model.backbone.body, theirs.body)
    )
    assert learning == expected and ("bn1.weight" in learning) == (trainable == 5)


def test_levels() -> None:
    for family, strides in (("faster_rcnn", (4, 8, 16, 32, 64)), ("fcos", (8, 16, 32, 64, 128))):
        levels = detector(family).backbone(torch.rand(1, 3, 128, 128))
        assert [x.shape[2] for x in levels.values()] == [128 // s for s in strides]
        assert {x.shape[1] for x in levels.values()} == {16}


@pytest.mark.parametrize("family", FAMILIES)
def test_scale_multiplies_the_anchors(family: str) -> None:
    full, half = (detector(family, scale=scale) for scale in (1.0, 0.5))
    part = (
        (lambda m: m.rpn.anchor_generator)
        if family == "faster_rcnn"
        else (lambda m: m.anchor_generator)
    )
    assert part(full).sizes[0][0] == {"fcos": 8}.get(family, 32)
    for whole, part_ in zip(part(full).sizes, part(half).sizes, strict=True):
        assert part_ == pytest.approx([size / 2 for size in whole])


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_scale_moves_the_level_an_roi_is_read_from(scale: float) -> None:
    pool = detector("faster_rcnn", scale=scale).roi_heads.box_roi_pool
    levels = OrderedDict(  # each level holds its own number
        (str(p), torch.full((1, 1, 256 // 2**p, 256 // 2**p), float(p))) for p in range(4)
    )
    # FPN, equation 1: level ⌊4 + log2(side / 224)⌋, of P2 to P5.
    sides = torch.tensor([50.0, 120, 230, 460]) * scale
    boxes = torch.stack([torch.zeros(4), torch.zeros(4), sides, sides], dim=1)
    assert pool(levels, [boxes], [(1024, 1024)]).amax(dim=(1, 2, 3)).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_fcos_samples_within_one_and_a_half_strides(scale: float) -> None:
    model = detector("fcos", scale=scale)
    for (anchor,), stride in zip(model.anchor_generator.sizes, (8, 16, 32, 64, 128), strict=True):
        assert model.center_sampling_radius * anchor == pytest.approx(1.5 * stride)


def test_a_users_detector_without_fpn_and_with_its_own_anchors() -> None:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 16, 3, stride=8, padding=1), nn.ReLU())
    body.out_channels = 16  # type: ignore[assignment]
    model = tv.RetinaNet(
        body, 5, anchor_generator=AnchorGenerator(((8, 16),), ((1.0,),)), min_size=64, max_size=96
    ).train()
    images, targets = batch()
    expected = model(images, targets)
    got = split_losses(model, images, targets)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    sum(split_losses(model, images, targets, frozen=True).values()).backward()  # type: ignore[union-attr]
    assert all(p.grad is None for p in body.parameters())
    assert family_of(model).num_labels(model) == 5


class Gated(BackboneWithFPN):
    """A user's backbone: torchvision's, with a gate behind the pyramid."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.gate = nn.Parameter(torch.full((), 0.1))

    def forward(self, x: Tensor) -> Any:
        return OrderedDict((k, self.gate * v) for k, v in super().forward(x).items())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_subclass_of_the_backbone_is_called_as_it_is(family: str) -> None:
    model = detector(family).train()
    model.backbone.__class__ = Gated
    model.backbone.gate = nn.Parameter(torch.full((), 0.1))
    images, targets = batch()
    torch.manual_seed(5)
    expected = model(images, targets)
    torch.manual_seed(5)
    got = split_losses(model, images, targets)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    sum(got.values()).backward()
    assert model.backbone.gate.grad is not None
    model.zero_grad()
    sum(split_losses(model, images, targets, frozen=True).values()).backward()
    assert all(p.grad is None for p in model.backbone.parameters())  # all of it is below


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_on_the_backbone_run(family: str, frozen: bool) -> None:
    model, seen = detector(family).train(), []
    for module in (model.backbone, model.backbone.body):
        module.register_forward_pre_hook(lambda module, _: seen.append(type(module)))
    model.backbone.register_forward_hook(
        lambda _, __, levels: OrderedDict((k, 2 * v) for k, v in levels.items())
    )
    images, targets = batch()
    torch.manual_seed(5)
    expected = model(images, targets)
    seen.clear()
    torch.manual_seed(5)
    got = split_losses(model, images, targets, frozen)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert seen == [type(model.backbone), type(model.backbone.body)]


def test_gradients_are_as_before_when_a_frozen_backbone_fails() -> None:
    model = detector("fcos").train()
    with pytest.raises(RuntimeError), frozen_backbone(model):
        model.backbone(torch.rand(1, 5, 64, 64))
    assert torch.is_grad_enabled()
    assert all(level.requires_grad for level in model.backbone(torch.rand(1, 3, 64, 64)).values())
    body = model.backbone.body
    assert not body._forward_pre_hooks and not body._forward_hooks


@pytest.mark.parametrize(
    "model",
    [nn.Conv2d(3, 3, 3), tv.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None)],
)
def test_what_cannot_be_split_is_refused(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="cannot be split.*FasterRCNN.*RetinaNet.*FCOS") as error:
        family_of(model)
    assert type(model).__name__ in str(error.value)


def test_classes_that_cannot_be_counted_are_refused() -> None:
    model = detector("faster_rcnn")
    model.roi_heads.box_predictor = nn.Identity()
    with pytest.raises(ValueError, match="classes of this FasterRCNN cannot be counted"):
        family_of(model)


@pytest.mark.parametrize("trainable", [-1, 6])
def test_stages_that_do_not_exist_are_refused(trainable: int) -> None:
    with pytest.raises(ValueError, match=f"trainable: {trainable}; expected 0 to 5"):
        freeze_stages(detector("fcos"), trainable)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="detector: 'yolo'"):
        build_detector("yolo", "resnet18", 3)
