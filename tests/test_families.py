"""Beyond the three detectors on ResNets: masks and keypoints, ResNeXt-101 and Swin-T."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from helpers import assert_learns, tiny, write_coco
from test_detectors import FAMILIES, batch, detector
from torch import Tensor, nn
from torchvision.models.detection import KeypointRCNN, MaskRCNN
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

from sssd import Distiller
from sssd import export as exporting
from sssd.config import BUILT_FROM, DataSource, RunConfig
from sssd.detectors import build_detector, freeze_stages, frozen_backbone, levels_of
from sssd.engine import train
from sssd.export import export, source
from sssd.profiles import configure, open_data
from sssd.records import read_records
from sssd.reproduce.plan import cost
from sssd.starts import build_model

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
    assert_learns(model, losses)
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
def test_the_teacher_paints_masks_where_its_student_learns_them(family: str) -> None:
    student = rcnn() if family == "mask_rcnn" else detector(family)
    model = Distiller(student).eval()
    images, targets = labelled()
    prepared, own = model.student.transform(images, targets)
    features, size = levels_of(student.backbone(prepared.tensors)), prepared.tensors.shape[-2:]

    def taught(targets: Any) -> Tensor:
        return model.teach(features, targets, size)["0"]

    boxes = [{k: v for k, v in target.items() if k != "masks"} for target in own]
    if family == "retinanet":
        assert torch.equal(taught(own), taught(boxes))
        return
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
            r"targets\[0\]: masks \(1, 32, 32\); expected \(1, 64, 64\)",
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


# --- ResNeXt-101 and Swin-T ---------------------------------------------------------------------------

BACKBONES = {"resnext101": (2048, "ResNeXt101_32X8D"), "swin_t": (768, "Swin_T")}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSource:
    return open_data("smoke", write_coco(tmp_path_factory.mktemp("families") / "colours"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_family_has_its_pyramid_on_them(backbone: str, family: str) -> None:
    strides = (4, 8, 16, 32, 64) if family == "faster_rcnn" else (8, 16, 32, 64, 128)
    with torch.device("meta"):
        model: Any = build_detector(family, backbone, 3, width=16)
        with frozen_backbone(model.train()):
            levels = levels_of(model.backbone(torch.rand(2, 3, 256, 384)))
    assert [tuple(x.shape) for x in levels.values()] == [
        (2, 16, 256 // s, 384 // s) for s in strides
    ]
    torch.stack([x.sum() for x in levels.values()]).sum().backward()
    assert all(p.grad is None for p in model.backbone.body.parameters())
    assert all(p.grad is not None for p in model.backbone.fpn.parameters())
    assert next(reversed(model.backbone.fpn.inner_blocks))[-1].in_channels == BACKBONES[backbone][0]


@pytest.mark.parametrize(("trainable", "learning"), [(0, 0), (3, 3), (4, 4), (5, 5)])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_freeze_stages(backbone: str, trainable: int, learning: int) -> None:
    with torch.device("meta"):
        model: Any = build_detector("retinanet", backbone, 3, width=16)
    freeze_stages(model, trainable)
    named = model.backbone.body.named_parameters()
    stages = {name.split(".")[0] for name, p in named if p.requires_grad}
    assert stages == set(("layer4", "layer3", "layer2", "layer1", "conv1")[:learning])


@pytest.mark.parametrize("backbone", BACKBONES)
def test_imagenet_is_torchvisions_classifier(
    data: DataSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backbone: str
) -> None:
    """On the meta device: that names and shapes fit, and which weights were asked for."""
    asked: list[Any] = []

    def get_state_dict(self: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        asked.append(self)
        return torchvision.models.get_model(BACKBONES[backbone][1].lower()).state_dict()

    weights = getattr(torchvision.models, f"{BACKBONES[backbone][1]}_Weights")
    monkeypatch.setattr(weights, "get_state_dict", get_state_dict)
    config = tiny(data, start="imagenet", backbone=backbone)
    with torch.device("meta"):
        student = build_model(config, 2, tmp_path).student
    assert asked == [weights.IMAGENET1K_V1]
    named = student.backbone.body.named_parameters()
    learning = {name.split(".")[0] for name, p in named if p.requires_grad}
    assert learning == {"layer2", "layer3", "layer4"}


def test_swins_stages_are_those_of_torchvisions_classifier(
    data: DataSource, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    swin = torchvision.models.swin_t().eval()
    file = tmp_path / "swin.pth"
    torch.save(swin.state_dict(), file)
    student = build_model(tiny(data, start=str(file), backbone="swin_t"), 2, tmp_path).student
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        maps = student.eval().backbone.body(image)
        for level, last in zip(maps.values(), (2, 4, 6, 8), strict=True):
            assert torch.equal(level, swin.features[:last](image))  # [B, h, w, C]
        inner = student.backbone.fpn.inner_blocks[1]
        expected = nn.functional.layer_norm(maps["1"], (192,)).permute(0, 3, 1, 2)
        torch.testing.assert_close(inner(maps["1"]), inner[-1](expected))

    more = {**swin.state_dict(), "features.5.6.norm1.weight": torch.ones(384)}  # of a deeper Swin
    torch.save(more, file)
    config = tiny(data, start=str(file), backbone="swin_t")
    with pytest.raises(ValueError, match=r"^start: swin\.pth holds neither .* swin_t classifier"):
        build_model(config, 2, tmp_path)


FEW: dict[str, Any] = {"iterations": 2, "eval_every": 2, "unfreeze_backbone": 1, "distill_start": 0}


def assert_trains(config: RunConfig, root: Path) -> Path:
    """Train a run that starts from random weights, or from such a run; its folder."""
    if isinstance(config.start, RunConfig):
        assert_trains(config.start, root)
    folder = root / config.id
    train(config, folder)
    if config.method != "crops":
        (found,) = read_records(folder / "evaluations.jsonl")
        assert found["iteration"] == config.iterations and 0 <= found["AP"] <= 1
        before = build_model(config, 2, root).student
        after = torch.load(folder / "weights.pt", weights_only=True)
        assert after.keys() == before.state_dict().keys()
        moved = {n: not torch.equal(p, after[n]) for n, p in before.named_parameters()}
        learning = [moved[n] for n, p in before.named_parameters() if p.requires_grad]
        assert sum(learning) >= 0.9 * len(learning) and sum(moved.values()) == sum(learning)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_swin_trains_and_is_evaluated(data: DataSource, tmp_path: Path, family: str) -> None:
    assert_trains(tiny(data, backbone="swin_t", detector=family, **FEW), tmp_path)


def test_resnext_trains_and_is_evaluated(data: DataSource, tmp_path: Path) -> None:
    fields: dict[str, Any] = {**FEW, "trainable_stages": 1, "optimizer": "sgd", "lr": 0.01}
    assert_trains(tiny(data, backbone="resnext101", detector="fcos", **fields), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sssd", "labelenc"])
def test_swin_has_the_profiles_warm_start(data: DataSource, tmp_path: Path, method: str) -> None:
    """Crops and detector, then LGD's teacher or LabelEnc's first stage, then the run."""
    fields: dict[str, Any] = {"iterations": 3, "eval_every": 3, "backbone": "swin_t"}
    assert_trains(configure("smoke", data=data, method=method, **fields), tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_exported_lines_build_them(
    data: DataSource, tmp_path: Path, backbone: str, family: str
) -> None:
    """All of resnext101's on the meta device, by names and shapes; of swin_t also the numbers."""
    config = tiny(data, backbone=backbone, detector=family, method="baseline")
    record = {"iteration": 1, "AP": 0.25, "per_class": {}}
    (tmp_path / "evaluations.jsonl").write_text(json.dumps(record) + "\n")
    built = {name: getattr(config, name) for name in BUILT_FROM}
    with torch.device("meta"):
        model = build_detector(family, backbone, 2, **built)
    lines = source(tmp_path, model, ["one", "two"], config.canonical(), "student.py")
    names: dict[str, Any] = {"__name__": "student", "__file__": str(tmp_path / "student.py")}
    exec(lines, names)
    swin = backbone == "swin_t"
    with torch.device("cpu" if swin else "meta"):
        theirs = names["build"]().eval()
        ours: Any = build_detector(family, backbone, 2, **built).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert str(theirs).replace("MultiScaleRoIAlign", "RoIAlign") == str(ours)
    if swin:
        for model in (ours, theirs):
            getattr(model, "roi_heads", model).score_thresh = 0.0
        image = torch.rand(3, 70, 90)
        with torch.no_grad():
            (a,), (b,) = theirs([image]), ours([image])
        assert len(b["boxes"]) and all(torch.equal(a[name], b[name]) for name in b)


def test_onnx_of_swin_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its padding to whole windows would be that of the traced image's size."""
    monkeypatch.setattr(exporting.importlib.util, "find_spec", lambda name: name)
    config = {"backbone": "swin_t"}
    monkeypatch.setattr(exporting, "load_student", lambda run: (nn.Identity(), [], config))
    with pytest.raises(ValueError, match="onnx: not possible for the backbone 'swin_t'"):
        export(tmp_path, tmp_path / "student.pt", onnx=True)
    assert not list(tmp_path.iterdir())


def test_what_swin_has_not_is_refused(data: DataSource) -> None:
    for field, value in (("trained_norm", True), ("stem_pool", False)):
        message = f"^{field}: {value}; expected {not value}, as swin_t has no "
        with pytest.raises(ValueError, match=message):
            tiny(data, backbone="swin_t", **{field: value})
        with pytest.raises(ValueError, match=message):
            build_detector("fcos", "swin_t", 2, **{field: value})  # type: ignore[arg-type]


def test_fcos_on_resnext_has_lgds_context_object(data: DataSource) -> None:
    """LGD's choice for FCOS with ResNet-101 and larger; Swin-T is of ResNet-50's size."""
    for backbone, context in (("resnet50", False), ("resnext101", True), ("swin_t", False)):
        assert tiny(data, backbone=backbone, detector="fcos").context is context


@pytest.mark.parametrize("backbone", BACKBONES)
def test_their_cost_is_known_before_training(data: DataSource, backbone: str) -> None:
    config = tiny(data, backbone=backbone)
    assert cost(config)["student"] > 2 * cost(config.change(backbone="resnet18"))["student"]
