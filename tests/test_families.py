"""Beyond the three detectors: masks and keypoints."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_detectors import batch, detector
from torch import Tensor, nn
from torchvision.models.detection import KeypointRCNN, MaskRCNN
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

from sssd import Distiller
from sssd.detectors import prepare, pyramid

# --- Mask R-CNN and Keypoint R-CNN ------------------------------------------------------------------

KINDS = (MaskRCNN, KeypointRCNN)
LOSS = {MaskRCNN: "loss_mask", KeypointRCNN: "loss_keypoint"}


def rcnn(kind: type[nn.Module] = MaskRCNN) -> Any:
    """torchvision's own on the parts of a small Faster R-CNN, which has 3 classes."""
    base = detector("faster_rcnn")
    more: dict[str, Any] = {
        "keypoint_head": KeypointRCNNHeads(16, (16,)),
        "keypoint_predictor": KeypointRCNNPredictor(16, 5),
    }
    if kind is MaskRCNN:
        more = {
            "mask_head": MaskRCNNHeads(16, (16,), 1),
            "mask_predictor": MaskRCNNPredictor(16, 16, 4),
        }
    return kind(
        base.backbone,
        rpn_anchor_generator=base.rpn.anchor_generator,
        box_head=base.roi_heads.box_head,
        box_predictor=base.roi_heads.box_predictor,
        rpn_post_nms_top_n_train=64,
        rpn_post_nms_top_n_test=16,
        box_batch_size_per_image=16,
        min_size=64,
        max_size=112,
        **more,
    )


def labelled() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Targets with five keypoints and a mask, the left half of the box, for each object."""
    images, targets = batch()
    draw = torch.Generator().manual_seed(3)
    for image, target in zip(images, targets, strict=True):
        boxes = target["boxes"]
        target["masks"] = torch.zeros(len(boxes), *image.shape[1:], dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(target["masks"], boxes.round().int(), strict=True):
            mask[y1:y2, x1 : (x1 + x2) // 2] = 1
        points = torch.rand(len(boxes), 5, 2, generator=draw)
        points = boxes[:, None, :2] + points * (boxes[:, None, 2:] - boxes[:, None, :2])
        target["keypoints"] = torch.cat([points, torch.ones(len(boxes), 5, 1)], dim=2)
    return images, targets


def losses(model: nn.Module, targets: Any = None) -> dict[str, Tensor]:
    images, own = labelled()
    torch.manual_seed(3)
    return model.train()(images, own if targets is None else targets)


@pytest.mark.parametrize("kind", KINDS)
def test_the_students_losses_are_torchvisions_and_the_teacher_has_them_all(kind: Any) -> None:
    expected = losses(rcnn(kind))
    assert LOSS[kind] in expected and expected[LOSS[kind]] > 0
    for method in ("baseline", "sssd"):
        model = Distiller(rcnn(kind), method)
        got = losses(model)
        assert list(got)[: len(expected)] == list(expected)
        assert all(torch.equal(got[name], loss) for name, loss in expected.items())
    assert list(got)[len(expected) :] == [*(f"teacher_{name}" for name in expected), "distill"]
    got[f"teacher_{LOSS[kind]}"].backward()
    parts = {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None}
    assert parts == {"student", "teacher"}
    assert all(p.grad is None for p in model.student.backbone.parameters())  # appearance detached


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_in_ones_own_loop_and_leaves_a_stock_detector(kind: Any) -> None:
    model = Distiller(rcnn(kind), unfreeze_backbone=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.002, momentum=0.9)
    totals = []
    for _ in range(4):
        total = torch.stack(list(losses(model).values())).sum()
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_value_(model.parameters(), 1.0)
        optimizer.step()
        totals.append(total.item())
    assert totals[-1] < totals[0]
    images, targets = labelled()
    model.eval().student.roi_heads.score_thresh = 0.0
    plain = rcnn(kind).eval()
    plain.load_state_dict(model.student.state_dict(), strict=True)
    plain.roi_heads.score_thresh = 0.0
    with torch.no_grad():
        found, expected = model(images), plain(images)
    assert len(found[0]["boxes"]) > 0 and found[0].keys() == expected[0].keys()
    for a, b in zip(found, expected, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in b)
    taught = model.detect_taught(images, targets)
    assert taught[0].keys() == found[0].keys()
    assert not torch.equal(taught[0]["scores"], found[0]["scores"])


@pytest.mark.parametrize("family", ["mask_rcnn", "retinanet"])
def test_the_teacher_paints_masks_where_a_target_has_them(family: str) -> None:
    student = rcnn() if family == "mask_rcnn" else detector(family)
    model = Distiller(student).eval()
    images, targets = labelled()
    prepared, own = prepare(model.student, images, targets)
    assert own is not None
    features, size = pyramid(student, prepared.tensors), prepared.tensors.shape[-2:]

    def taught(targets: Any) -> Tensor:
        return model.teach(features, targets, size)["0"]

    boxes = [{k: v for k, v in target.items() if k != "masks"} for target in own]
    one = [own[0], boxes[1]]
    assert torch.equal(taught(one)[0], taught(own)[0])  # each image by its own target
    assert torch.equal(taught(one)[1], taught(boxes)[1])
    assert not torch.allclose(taught(own), taught(boxes))


def test_an_image_without_objects_has_no_masks() -> None:
    _, targets = labelled()
    targets[0] = {name: value[:0] for name, value in targets[0].items()}
    got = losses(Distiller(rcnn()), targets)
    total = torch.stack(list(got.values())).sum()
    total.backward()
    assert torch.isfinite(total)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (MaskRCNN, {"masks": ...}, r"targets\[0\]: expected tensors in boxes and labels and masks"),
        (KeypointRCNN, {"keypoints": ...}, r"expected tensors in boxes and labels and keypoints"),
        (
            MaskRCNN,
            {"masks": torch.zeros(1, 32, 32)},
            r"targets\[0\]: masks Tensor \(1, 32, 32\); expected Tensor \(1, 64, 64\)",
        ),
        (
            KeypointRCNN,
            {"masks": torch.zeros(1, 64, 64).numpy()},
            r"targets\[0\]: masks ndarray \(1, 64, 64\); expected Tensor \(1, 64, 64\)",
        ),
        (
            KeypointRCNN,
            {"keypoints": torch.zeros(2, 5, 3)},
            r"targets\[0\]: keypoints \(2, 5, 3\); expected \(1, N, 3\)",
        ),
    ],
)
def test_malformed_masks_and_keypoints_are_refused(kind: Any, change: Any, message: str) -> None:
    _, targets = labelled()
    targets[0] = {k: v for k, v in (targets[0] | change).items() if v is not ...}
    with pytest.raises(ValueError, match=message):
        losses(Distiller(rcnn(kind)), targets)
