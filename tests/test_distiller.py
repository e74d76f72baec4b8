"""The distiller is a detector: its losses, where their gradients go, and its schedules."""

from __future__ import annotations

import copy
import io
import pickle
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import assert_learns
from test_detectors import FAMILIES, batch, detector
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign

from sssd import Distiller
from sssd.labelenc import LabelEncodingFunction, label_map
from sssd.losses import mse, normalise


def distiller(family: str = "faster_rcnn", method: str = "sssd", **options: Any) -> Distiller:
    student = detector(family)
    torch.manual_seed(2)
    return Distiller(student, method, **options).train()


def losses_of(model: Distiller, images: list[Tensor], targets: Any) -> dict[str, Tensor]:
    torch.manual_seed(3)
    out = model(images, targets)
    assert isinstance(out, dict)
    return out


def losses(model: Distiller) -> dict[str, Tensor]:
    return losses_of(model, *batch())


def touched(model: Distiller, loss: Tensor) -> set[str]:
    """The parts of the distiller that a loss alone has a gradient for."""
    model.zero_grad()
    loss.backward(retain_graph=True)
    names = {
        n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0
    }
    parts = {"student.backbone.body": "body", "student.backbone.fpn": "fpn", "student": "head"}
    parts |= {"teacher": "teacher", "adapter": "adapter"}
    return {next(part for start, part in parts.items() if n.startswith(start)) for n in names}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_baseline_is_the_stock_detector(family: str) -> None:
    model = distiller(family, "baseline")
    stock = detector(family).train()
    torch.manual_seed(3)
    expected = stock(*batch())
    got = losses(model)
    assert list(got) == list(expected)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert list(model.parameters()) == list(model.student.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_in_evaluation_it_is_the_student(family: str) -> None:
    model = distiller(family).eval()
    images, _ = batch()
    with torch.no_grad():
        for a, b in zip(model(images), model.student(images), strict=True):
            assert isinstance(a, dict) and all(torch.equal(a[k], b[k]) for k in b)
    assert int(model.step) == 0
    detector(family).load_state_dict(model.student.state_dict(), strict=True)


def detecting(family: str) -> Distiller:
    """In evaluation mode, with detections though it is untrained."""
    model = distiller(family).eval()
    getattr(model.student, "roi_heads", model.student).score_thresh = 0.0
    assert all(len(found["boxes"]) for found in model(batch()[0]) if isinstance(found, dict))
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_teacher_that_copies_the_student_detects_what_it_detects(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = detecting(family)
    images, targets = batch()
    own = model(images)
    asked: list[Any] = []

    def copy(features: list[Tensor], *labels: Any) -> list[Tensor]:
        asked.append(labels)
        return features

    monkeypatch.setattr(model.teacher, "forward", copy)
    for a, b in zip(model.detect_taught(images, targets), own, strict=True):
        assert isinstance(b, dict) and all(torch.equal(a[k], b[k]) for k in b)
    # It is told the labels as in training: boxes of the padded batch, classes from 0.
    prepared, boxes = model.student.transform(images, targets)
    ((seen, labels, size, masks),) = asked
    assert masks == [None, None] and size == tuple(prepared.tensors.shape[-2:])
    assert boxes and all(torch.equal(a, b["boxes"]) for a, b in zip(seen, boxes, strict=True))
    first = model.first_label
    assert all(torch.equal(a + first, b["labels"]) for a, b in zip(labels, targets, strict=True))
    for a, b in zip(model(images), own, strict=True):  # the student is as it was
        assert isinstance(a, dict) and isinstance(b, dict) and torch.equal(a["boxes"], b["boxes"])


def test_the_teachers_detections_are_of_its_own_pyramid() -> None:
    model = detecting("retinanet")
    images, targets = batch()
    before = model.detect_taught(images, targets)
    moved = [{**t, "boxes": t["boxes"] * 0.5} for t in targets]
    after = model.detect_taught(images, moved)
    assert any(
        not torch.equal(a["scores"], b["scores"]) for a, b in zip(before, after, strict=True)
    )
    assert not any(value.requires_grad for found in before for value in found.values())
    with pytest.raises(ValueError, match=r"baseline has no teacher"):
        distiller(method="baseline").detect_taught(images, targets)
    with pytest.raises(ValueError, match=r"targets: 1 for 2 images"):
        model.detect_taught(images, targets[:1])
    with pytest.raises(ValueError, match=r"training: True; detect_taught needs evaluation mode"):
        model.train().detect_taught(images, targets)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["lgd", "kl", "sssd"])
def test_loss_names(family: str, method: str) -> None:
    got = losses(distiller(family, method, lam=2.0))
    own = list(losses(distiller(family, "baseline")))
    assert list(got) == [*own, *(f"teacher_{name}" for name in own), "distill"]
    assert all(torch.isfinite(loss) and loss >= 0 for loss in got.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_students_own_losses_are_those_without_a_teacher(family: str) -> None:
    alone, taught = losses(distiller(family, "baseline")), losses(distiller(family))
    assert all(torch.equal(taught[name], alone[name]) for name in alone)


def test_distill_is_lambda_times_the_distance() -> None:
    one, two = (losses(distiller(lam=lam))["distill"] for lam in (1.0, 50.0))
    assert two.item() == pytest.approx(50 * one.item(), rel=1e-6)
    assert losses(distiller())["distill"].item() == pytest.approx(two.item(), rel=1e-6)
    assert losses(distiller(method="lgd"))["distill"].item() == pytest.approx(
        losses(distiller(method="lgd", lam=1.0))["distill"].item()
    )


def test_the_distance_is_that_of_adapter_and_teacher() -> None:
    model = distiller(method="lgd", lam=1.0)
    images, targets = batch()
    prepared, own = model.student.transform(images, targets)
    features = model.student.backbone(prepared.tensors)
    taught = model.teach(features, own, prepared.tensors.shape[-2:])
    expected = mse(
        [normalise(model.adapter(x)) for x in features.values()],
        [normalise(x) for x in taught.values()],
    )
    assert losses(model)["distill"].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_where_the_distillation_gradient_goes(family: str) -> None:
    model = distiller(family, distill_start=1)
    assert touched(model, losses(model)["distill"]) == {"adapter"}
    assert touched(model, losses(model)["distill"]) == {"adapter", "fpn", "body"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("detach", [False, True])
def test_where_the_teachers_gradient_goes(family: str, detach: bool) -> None:
    model = distiller(family, detach_appearance=detach)
    terms = [loss for name, loss in losses(model).items() if name.startswith("teacher_")]
    taught = torch.stack(terms).sum()
    assert touched(model, taught) == {"head", "teacher"} | (set() if detach else {"fpn", "body"})


# --- LabelEnc ---------------------------------------------------------------------------------


def encoder_of(model: Distiller) -> LabelEncodingFunction:
    """A label encoding function of another seed, as stage 1 would hand it on."""
    torch.manual_seed(4)
    return LabelEncodingFunction.like(model.student, model.num_classes)


@pytest.mark.parametrize("family", FAMILIES)
def test_labelencs_first_stage_by_its_gradients(family: str) -> None:
    """Own losses train the detector, the label pyramid's its head and the teacher, MSE no label side."""
    model = distiller(family, "labelenc_stage1", distill_start=1)
    first, second = losses(model), losses(model)
    own = list(losses(distiller(family, "baseline")))
    assert list(first) == [*own, *(f"teacher_{name}" for name in own)]  # no distillation yet
    assert list(second) == [*first, "distill"]
    terms = sum(loss for name, loss in second.items() if name.startswith("teacher_"))
    assert isinstance(terms, Tensor)
    assert touched(model, terms) == {"head", "teacher"}
    assert touched(model, second["distill"]) == {"adapter", "fpn", "body"}


@pytest.mark.parametrize("family", FAMILIES)
def test_labelencs_second_stage_by_its_gradients(family: str) -> None:
    student = detector(family)
    encoder = encoder_of(distiller(family, "baseline"))
    model = Distiller(student, "labelenc", encoder=encoder, distill_stop=1).train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    first, second = losses(model), losses(model)
    own = list(losses(distiller(family, "baseline")))
    assert list(first) == [*own, "distill"] and list(second) == own
    assert touched(model, first["distill"]) == {"adapter", "fpn", "body"}
    assert not any(p.requires_grad for p in encoder.parameters())
    learning = [p for p in model.parameters() if p.requires_grad]
    torch.optim.SGD(learning, 0.1, weight_decay=0.1).step()
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_labelencs_distance_is_that_of_layer_normalised_pyramids() -> None:
    model = distiller(method="baseline")
    encoder = encoder_of(model)
    model = Distiller(model.student, "labelenc", encoder=encoder).train()
    images, targets = batch()
    prepared, own = model.student.transform(images, targets)
    features = model.student.backbone(prepared.tensors)
    drawn = label_map(
        [target["boxes"] for target in own],
        [target["labels"] - 1 for target in own],
        model.num_classes,
        tuple(prepared.tensors.shape[-2:]),
    )

    def norm(x: Tensor) -> Tensor:
        flat = x.flatten(1)
        flat = (flat - flat.mean(1, keepdim=True)) / flat.var(1, False, keepdim=True).sqrt()
        return flat.view_as(x)

    pairs = zip(features.values(), encoder.encode(drawn), strict=True)
    parts = [(norm(model.adapter(x)) - norm(y)).square().flatten() for x, y in pairs]
    assert losses(model)["distill"].item() == pytest.approx(
        torch.cat(parts).mean().item(), rel=1e-3
    )


def test_the_colour_of_the_first_stage_is_noise_and_the_seconds_is_not() -> None:
    model = distiller(method="labelenc_stage1")
    features = OrderedDict((str(i), torch.zeros(0)) for i in range(5))
    targets = [{"boxes": torch.tensor([[0.0, 0, 32, 32]] * 400), "labels": torch.ones(400).long()}]
    seen: list[Tensor] = []
    teacher = model.teacher
    teacher.encode = lambda drawn: seen.append(drawn) or [drawn] * 5  # type: ignore
    with torch.no_grad():
        torch.manual_seed(0)
        for _ in range(40):
            one = [{name: value[:1] for name, value in targets[0].items()}]
            model.teach(features, one, (64, 64))
    peaks = torch.stack([drawn.amax() for drawn in seen])  # min(1, 2·U(0, 1)): half are 1
    assert 0.3 < (peaks == 1).float().mean() < 0.7 and peaks.min() < 0.4
    seen.clear()
    assert isinstance(teacher, LabelEncodingFunction)
    model = Distiller(model.student, "labelenc", encoder=teacher).train()
    model.teach(features, targets, (64, 64))
    assert seen[0].amax() == 1


def test_labelenc_needs_its_function_and_a_resnet() -> None:
    with pytest.raises(ValueError, match="encoder: missing for method 'labelenc'"):
        distiller(method="labelenc")
    with pytest.raises(ValueError, match="encoder: given for method 'sssd'"):
        distiller(encoder=encoder_of(distiller()))
    student = detector("faster_rcnn")
    student.backbone.body = torch.nn.Identity()
    with pytest.raises(ValueError, match="LabelEnc needs torchvision's ResNet"):
        Distiller(student, "labelenc_stage1")


def test_published_choices_follow_the_family() -> None:
    choices = {
        f: (distiller(f).teacher.context, distiller(f).teacher.detach_appearance) for f in FAMILIES
    }
    assert choices == {
        "faster_rcnn": (False, True),
        "retinanet": (True, False),
        "fcos": (False, False),
    }
    assert distiller("fcos", context=True).teacher.context


def test_schedules_count_its_own_steps() -> None:
    seen: list[int] = []
    model = distiller(lam=lambda t: seen.append(t) or 1.0, distill_stop=4, unfreeze_backbone=2)  # type: ignore[func-returns-value]
    bodies = []
    for _ in range(5):
        got = losses(model)
        bodies.append("body" in touched(model, torch.stack(list(got.values())).sum()))
    assert seen == [1, 2, 3, 4, 5]
    assert touched(model, got["distill"]) == {"adapter"}  # the loss goes on, its pull has ended
    assert bodies == [False, False, True, True, True]
    assert int(model.step) == int(model.state_dict()["step"]) == 5

    other = distiller(distill_stop=4)
    other.load_state_dict(model.state_dict())
    assert touched(other, losses(other)["distill"]) == {"adapter"}
    other.step.fill_(0)
    assert touched(other, losses(other)["distill"]) == {"adapter", "fpn", "body"}


def test_no_objects_and_levels_of_one_pixel() -> None:
    images = [torch.rand(3, 64, 64)] * 2
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    one = {"boxes": torch.tensor([[4.0, 4, 40, 30]]), "labels": torch.tensor([2])}
    for family in FAMILIES:
        for targets in ([empty, one], [empty, empty]):
            got = distiller(family)(images, targets)
            assert isinstance(got, dict)
            total = torch.stack(list(got.values())).sum()
            total.backward()
            assert torch.isfinite(total)


def test_a_level_of_one_pixel_adds_nothing() -> None:
    model = distiller("retinanet", lam=1.0)
    draw = torch.Generator().manual_seed(0)
    features = OrderedDict(
        (str(p), torch.randn(2, 16, side, side, generator=draw).requires_grad_())
        for p, side in enumerate((8, 4, 1))
    )
    targets = batch(((64, 64), (64, 64)))[1]
    targets = [{**t, "labels": t["labels"] - 1} for t in targets]
    taught = model.teach(features, targets, (64, 64))
    assert taught["2"].shape == (2, 16, 1, 1)
    with_it = model.distance(features, taught, False)
    del features["2"], taught["2"]
    # It counts among the levels that are averaged, with a distance of 0.
    assert 3 * with_it.item() == pytest.approx(2 * model.distance(features, taught, False).item())
    with_it.backward()
    assert all(p.grad.isfinite().all() for p in model.adapter.parameters() if p.grad is not None)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loop_that_knows_nothing_of_it(family: str) -> None:
    model = distiller(family)
    before = [p.detach().clone() for p in model.parameters()]
    assert_learns(model, losses)
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert sum(moved) / len(moved) > 0.9


@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_precision(family: str) -> None:
    model = distiller(family)
    with torch.autocast("cpu", torch.bfloat16):
        got = losses(model)
    assert got["distill"].dtype == torch.float32
    assert all(torch.isfinite(loss) for loss in got.values())
    torch.stack(list(got.values())).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("method", ["lgd", "kl", "sssd"])
def test_the_distance_is_computed_in_float32(method: str) -> None:
    model = distiller(method=method, lam=1.0)
    model.adapter = torch.nn.Identity()  # type: ignore[assignment]
    draw = torch.Generator().manual_seed(0)
    one, two = (
        OrderedDict([("0", torch.randn(2, 16, 9, 9, generator=draw).bfloat16())]) for _ in range(2)
    )
    with torch.autocast("cpu", torch.bfloat16):
        got = model.distance(one, two, False)
    wide = [OrderedDict([("0", x["0"].double())]) for x in (one, two)]
    # bfloat16 has 8 bits: an operation in it would be off by 4e-3.
    assert got.item() == pytest.approx(model.distance(*wide, False).item(), rel=1e-5)


def test_a_users_detector_with_its_own_transform_and_no_fpn() -> None:
    def build() -> FasterRCNN:
        torch.manual_seed(0)
        body = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3, stride=8, padding=1), torch.nn.ReLU())
        body.out_channels = 16  # type: ignore[assignment]
        return FasterRCNN(
            body,
            num_classes=6,
            rpn_anchor_generator=AnchorGenerator(((8, 16),), ((1.0, 2.0),)),
            box_roi_pool=MultiScaleRoIAlign(["0"], 7, 2),
            min_size=48,
            max_size=90,
            image_mean=[0.5] * 3,
            image_std=[0.25] * 3,
        )

    images, targets = batch()
    torch.manual_seed(3)
    expected = build().train()(images, targets)
    model = Distiller(build(), unfreeze_backbone=1).train()
    for bodies in (0, 2):  # weight and bias of its one layer
        torch.manual_seed(3)
        got = model(images, targets)
        assert all(torch.equal(got[name], expected[name]) for name in expected)
        torch.stack(list(got.values())).sum().backward()
        grads = [p.grad for p in model.student.backbone.parameters()]
        assert sum(grad is not None for grad in grads) == bodies
    build().load_state_dict(model.student.state_dict(), strict=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_boxes_of_any_number_type(family: str) -> None:
    images, targets = batch()
    for target in targets:
        target["boxes"] = target["boxes"].round()
    expected = losses_of(distiller(family), images, targets)
    for dtype in (torch.float64, torch.float16, torch.int64):  # numpy's default is float64
        other = [{**target, "boxes": target["boxes"].to(dtype)} for target in targets]
        got = losses_of(distiller(family), images, other)["distill"]
        assert got.item() == pytest.approx(expected["distill"].item(), rel=1e-3)
        assert len(detecting(family).detect_taught(images, other)) == 2


def test_labels_from_zero_where_a_family_has_no_background() -> None:
    images, targets = batch()
    for target in targets:
        target["labels"] = target["labels"] - 1
    assert "distill" in distiller("retinanet")(images, targets)
    with pytest.raises(ValueError, match="labels from 0 to 1; this detector knows 1 to 3"):
        distiller("faster_rcnn")(images, targets)


@pytest.mark.parametrize(("family", "first"), [("faster_rcnn", 1), ("retinanet", 0), ("fcos", 0)])
def test_the_teacher_is_told_the_class_that_the_label_names(family: str, first: int) -> None:
    model = distiller(family)
    seen: list[Tensor] = []
    model.teacher.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[2]))
    images, targets = batch()
    last = first + model.num_classes - 1
    targets[0]["labels"], targets[1]["labels"] = torch.tensor([first]), torch.tensor([last, first])
    model(images, targets)
    assert [classes.tolist() for classes in seen] == [[0], [model.num_classes - 1, 0]]
    targets[1]["labels"][1] = last + 1
    with pytest.raises(ValueError, match=f"this detector knows {first} to {last}"):
        model(images, targets)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["sssd", "labelenc_stage1"])
def test_with_labels_from_one_the_teacher_knows_the_classes_and_no_other(
    family: str, method: str
) -> None:
    """build_detector was asked for 3 classes, and torchvision's RetinaNet and FCOS have 4 labels."""
    model = distiller(family, method, first_label=1)
    assert model.num_classes == model.teacher.num_classes == 3
    seen: list[Tensor] = []
    model.teacher.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[2]))
    images, targets = batch()
    targets[0]["labels"], targets[1]["labels"] = torch.tensor([1]), torch.tensor([3, 1])
    model(images, targets)
    assert [classes.tolist() for classes in seen] == [[0], [2, 0]]
    for wrong in (0, 4):
        targets[1]["labels"][1] = wrong
        with pytest.raises(ValueError, match="this detector knows 1 to 3"):
            model(images, targets)


@pytest.mark.parametrize(("family", "wrong"), [("faster_rcnn", 0), ("retinanet", 4), ("fcos", -1)])
def test_a_first_label_that_the_head_does_not_know_is_refused(family: str, wrong: int) -> None:
    with pytest.raises(ValueError, match=f"first_label: {wrong}; this detector knows"):
        distiller(family, first_label=wrong)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "targets: missing"),
        (lambda t: t[:1], "targets: 1 for 2 images"),
        (lambda t: [{**t[0], "boxes": t[0]["boxes"][0]}, t[1]], r"targets\[0\]: boxes \(4,\)"),
        (lambda t: [{**t[0], "labels": t[1]["labels"]}, t[1]], r"targets\[0\]: boxes \(1, 4\)"),
        (lambda t: [{**t[0], "labels": t[0]["labels"] + 3}, t[1]], "labels from 1 to 4"),
        (
            lambda t: [{**t[0], "boxes": t[0]["boxes"] * 0}, t[1]],
            r"targets\[0\]: a box that is not finite, or without width",
        ),
        (
            lambda t: [{**t[0], "boxes": t[0]["boxes"] * torch.nan}, t[1]],
            r"targets\[0\]: a box that is not finite",
        ),
        (lambda t: [{"boxes": t[0]["boxes"]}, t[1]], r"targets\[0\]: expected tensors in boxes"),
        (
            lambda t: [t[0], {**t[1], "boxes": t[1]["boxes"].tolist()}],
            r"targets\[1\]: expected tensors in boxes",
        ),
        (
            lambda t: [{**t[0], "labels": t[0]["labels"].int()}, t[1]],
            r"targets\[0\]: labels of torch.int32; expected torch.int64",
        ),
    ],
)
def test_malformed_targets_are_refused(change: Any, message: str) -> None:
    images, targets = batch()
    with pytest.raises(ValueError, match=message):
        distiller()(images, change(targets) if change else None)


def test_malformed_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="method: 'sgd'"):
        distiller(method="sgd")
    with pytest.raises(ValueError, match="lam: -1"):
        distiller(lam=-1.0)
    for lam in ("5", float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"lam: {lam!r} is neither a number"):
            distiller(lam=lam)
    for name in ("distill_start", "distill_stop", "unfreeze_backbone"):
        with pytest.raises(ValueError, match=f"{name}: -1 is not an iteration"):
            distiller(**{name: -1})
    with pytest.raises(ValueError, match="normaliser: 0 is not positive"):
        distiller(normaliser=0)
    with pytest.raises(ValueError, match="lam: expected a number for method 'kl'"):
        distiller(method="kl")


# --- what works with the detector works with the distiller -----------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", [pickle, torch, copy])
def test_it_is_saved_whole_and_copied(family: str, way: Any) -> None:
    model = distiller(family, lam=2.0)
    if way is copy:
        other = copy.deepcopy(model)
    elif way is pickle:
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    first, second = losses(model), losses(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_it_trains_and_counts(family: str) -> None:
    torch._dynamo.reset()
    model = distiller(family, lam=lambda t: float(t), unfreeze_backbone=1, distill_stop=2)
    same = copy.deepcopy(model)
    compiled = torch.compile(model, backend="eager")
    for _ in range(3):
        torch.manual_seed(3)
        got, expected = compiled(*batch()), losses(same)
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-5)
        torch.stack(list(got.values())).sum().backward()
    assert int(model.step) == 3


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A process group of one; DistributedDataParallel's check is the same for any number."""
    dist.init_process_group("gloo", f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("sssd", {"distill_start": 1, "distill_stop": 2, "unfreeze_backbone": 2}),
        ("labelenc_stage1", {"distill_start": 2}),
        ("baseline", {}),
    ],
)
def test_plain_data_parallel_training(
    one_process: None, method: str, options: dict[str, int]
) -> None:
    model = distiller(method=method, **options)
    alone = copy.deepcopy(model)
    parallel = DistributedDataParallel(model)
    for _ in range(4):
        torch.manual_seed(3)
        got, expected = parallel(*batch()), losses(alone)
        assert {name: loss.item() for name, loss in got.items()} == {
            name: loss.item() for name, loss in expected.items()
        }
        torch.stack(list(got.values())).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    parts = DistributedDataParallel(copy.deepcopy(alone), find_unused_parameters=True)
    parts.module.step.fill_(0)
    parts.module.zero_grad()
    torch.stack(list(parts(*batch()).values())).sum().backward()
    body = [p.grad for p in parts.module.student.backbone.body.parameters()]
    assert all(grad is None for grad in body) == (method == "sssd")  # at rest as in one process


@pytest.mark.parametrize("family", FAMILIES)
def test_its_students_forward_and_hooks_are_what_they_are(family: str) -> None:
    student = detector(family)

    class Own(type(student)):  # type: ignore[misc]
        def forward(self, images: Any, targets: Any = None) -> Any:
            out = super().forward(images, targets)
            return {**out, "own": sum(out.values())} if self.training else out

    student.__class__ = Own
    student.register_forward_pre_hook(lambda _, x: ([0.5 * image for image in x[0]], *x[1:]))
    stock = copy.deepcopy(student).train()
    torch.manual_seed(3)
    expected = stock(*batch())
    got = losses(Distiller(student))
    assert list(got)[: len(expected)] == list(expected) and "own" in expected
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("method", ["sssd", "labelenc_stage1"])
@pytest.mark.parametrize(
    ("family", "dtype"),  # torchvision's non-maximum suppression knows no bfloat16
    [("faster_rcnn", torch.float64), ("retinanet", torch.bfloat16), ("fcos", torch.float64)],
)
def test_what_is_added_has_the_students_number_type(
    family: str, dtype: torch.dtype, method: str
) -> None:
    model = Distiller(detector(family).to(dtype), method).train()
    assert {p.dtype for p in model.parameters()} == {dtype}
    images, targets = batch()
    images = [image.to(dtype) for image in images]
    got = losses_of(model, images, targets)
    torch.stack([loss.float() for loss in got.values()]).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_what_is_added_is_on_the_students_device() -> None:
    model = Distiller(detector("faster_rcnn").to("meta"))
    assert {x.device.type for x in model.state_dict().values()} == {"meta"}


def test_student_and_distiller_are_in_one_mode() -> None:
    model = Distiller(detector("fcos").eval())
    assert not model.training and len(model(batch()[0])) == 2
    model.train()
    assert model.training and model.student.training and "distill" in losses(model)
    model.student.eval()
    assert not model.training and len(model(batch()[0])) == 2
    model.eval().student.train()
    assert model.training and "distill" in losses(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_its_student_is_scripted_as_the_detector_is(family: str) -> None:
    model = distiller(family, unfreeze_backbone=1)
    losses(model)
    model.eval()
    images, _ = batch()
    _, got = torch.jit.script(model.student)(images)
    for a, b in zip(got, model.student(images), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in b)


def test_losses_without_gradients_are_no_steps() -> None:
    model = distiller(lam=lambda t: 50.0 if t <= 1 else 75.0)
    with torch.no_grad():
        first, again = losses(model), losses(model)
    assert int(model.step) == 0 and torch.equal(first["distill"], again["distill"])
    losses(model)
    assert int(model.step) == 1
    with torch.no_grad():
        assert losses(model)["distill"].item() == pytest.approx(1.5 * first["distill"].item())
    assert int(model.step) == 1


def test_running_statistics_of_the_head_are_the_students_alone() -> None:
    student = detector("faster_rcnn")
    student.roi_heads.box_head = FastRCNNConvFCHead((16, 7, 7), [16], [32], nn.BatchNorm2d)
    student.roi_heads.box_predictor = FastRCNNPredictor(32, 4)
    alone, model = (Distiller(copy.deepcopy(student), m).train() for m in ("baseline", "sssd"))
    for _ in range(2):
        losses(alone)
        taught = losses(model)
    assert taught["teacher_loss_classifier"] > 0
    names = [name for name, _ in alone.student.named_buffers() if "box_head" in name]
    own, with_teacher = alone.student.state_dict(), model.student.state_dict()
    assert len(names) == 3
    for name in names:
        torch.testing.assert_close(with_teacher[name], own[name])
    norms = [m for m in model.student.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and all(norm.track_running_stats for norm in norms)
