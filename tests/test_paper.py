"""The profile `paper` is in force: in the models of the whole grid, and in the training loop."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from accelerate import Accelerator
from helpers import write_coco
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from sssd import engine, starts
from sssd.config import DataSource, RunConfig
from sssd.evaluation import Detections
from sssd.labelenc import LabelEncodingFunction
from sssd.profiles import configure, open_data, open_split
from sssd.records import RunFolder
from sssd.starts import build_model

METHODS = ("baseline", "labelenc", "lgd", "sssd")
MODELS = list(product(("faster_rcnn", "retinanet", "fcos"), ("resnet50", "resnet101")))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSource:
    """Entries of 400 images, which share eight files: few images would make many epochs."""
    root = write_coco(tmp_path_factory.mktemp("paper") / "colours")
    file = root / "annotations" / "instances_train.json"
    content = json.loads(file.read_text())
    for name, field in (("images", "id"), ("annotations", "image_id")):
        own = content[name]
        content[name] = [{**x, field: x[field] + 8 * n} for n in range(50) for x in own]
    file.write_text(json.dumps(content))
    return open_data("paper", root)


@pytest.fixture(autouse=True)
def imagenet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of torchvision's names and shapes in place of the ImageNet weights."""
    for name in ("resnet50", "resnet101"):
        weights = torchvision.models.get_model_weights(name)

        def state(self: Any, name: str = name, **given: Any) -> dict[str, Tensor]:
            return getattr(torchvision.models, name)(weights=None).state_dict()

        monkeypatch.setattr(weights, "get_state_dict", state)


def built(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The model that a run trains, without values."""

    def stage1(student: Any, classes: int, _: Path) -> LabelEncodingFunction:
        return LabelEncodingFunction.like(student, classes)

    with torch.device("meta"):
        monkeypatch.setattr(starts, "_load_stage1", stage1)
        return build_model(config, 2, Path()).train()


# --- the model ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("detector", "backbone"), MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_what_is_frozen_and_what_the_optimizer_has(
    data: DataSource, monkeypatch: pytest.MonkeyPatch, method: str, detector: str, backbone: str
) -> None:
    config = configure("paper", data=data, method=method, detector=detector, backbone=backbone)
    model = built(config, monkeypatch)
    body = model.student.backbone.body
    stages = {name.split(".")[0] for name, p in body.named_parameters() if p.requires_grad}
    assert stages == {"layer2", "layer3", "layer4"}
    norms = [m for m in body.modules() if "BatchNorm" in type(m).__name__]
    assert len(norms) == {"resnet50": 53, "resnet101": 104}[backbone]
    assert all(isinstance(m, FrozenBatchNorm2d) and not list(m.parameters()) for m in norms)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    learning = {id(p) for p in model.parameters() if p.requires_grad}
    optimizer = engine._optimizer(config, model)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == learning
    assert isinstance(optimizer, torch.optim.SGD)
    rate = 0.02 if detector == "faster_rcnn" else 0.01
    for group in optimizer.param_groups:
        assert (group["lr"], group["momentum"], group["weight_decay"]) == (rate, 0.9, 1e-4)


@pytest.mark.parametrize("detector", ["faster_rcnn", "retinanet", "fcos"])
def test_images_come_at_all_sizes_in_training_and_at_one_in_test(
    data: DataSource, monkeypatch: pytest.MonkeyPatch, detector: str
) -> None:
    model = built(configure("paper", data=data, detector=detector), monkeypatch)

    def sides(width: int) -> list[int]:
        batch, _ = model.student.transform([torch.rand(3, 64, width)], None)
        return sorted(batch.image_sizes[0])

    assert {sides(64)[0] for _ in range(60)} == {640, 672, 704, 736, 768, 800}
    assert sides(256)[1] == 1333
    model.eval()
    assert {sides(64)[0] for _ in range(5)} == {800} and sides(256)[1] == 1333


def test_what_learns_when(data: DataSource) -> None:
    """The backbone from iteration 20,001 on, by the pull of the teacher from 30,001 on."""
    config = configure("paper", data=data, method="sssd")
    model: Any = build_model(config, 2, Path()).train()
    model.student.transform.min_size = (64,)
    norms = {name: x.clone() for name, x in model.student.backbone.body.named_buffers()}
    image, target = open_split(data, "train")[0]
    last = model.student.backbone.body.layer4[-1].conv3.weight
    first = model.student.backbone.body.layer1[0].conv1.weight
    found = {}
    for t in (20_000, 20_001, 30_000, 30_001):
        model.step.fill_(t - 1)
        losses = model([image], [target])
        (pull,) = torch.autograd.grad(
            *(losses["distill"], model.student.backbone.fpn.inner_blocks[0][0].weight),
            retain_graph=True,
            allow_unused=True,
        )
        model.zero_grad()
        sum(losses.values()).backward()
        found[t] = (last.grad is not None, pull is not None)
        assert first.grad is None
    assert found == {
        20_000: (False, False),
        20_001: (True, False),
        30_000: (True, False),
        30_001: (True, True),
    }
    for name, x in model.student.backbone.body.named_buffers():
        assert torch.equal(x, norms[name])


# --- the loop -------------------------------------------------------------------------------------


class Pulls(nn.Module):
    """In place of a model: two weights of 0, the student's with a gradient of 5, the teacher's −¼."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = (nn.Linear(1, 1, bias=False) for _ in range(2))
        for weight in self.parameters():
            nn.init.zeros_(weight)

    def forward(self, images: list[Tensor], targets: list[Any]) -> dict[str, Tensor]:
        student, teacher = (part.weight.sum() for part in (self.student, self.teacher))
        return {"loss_student": 1 + 5 * student, "distill": -teacher / 4}


WHOLE = {
    **{1: 1e-3, 501: 0.5005, 1000: 0.999001, 1001: 1.0},
    **{120_000: 1.0, 120_001: 0.1, 160_000: 0.1, 160_001: 0.01},
}
HALF = {1: 1e-3, 1001: 1.0, 60_000: 1.0, 60_001: 0.1, 80_000: 0.1, 80_001: 0.01}
LONG = {1: 1e-3, 1001: 1.0, 90_000: 1.0, 90_001: 0.1, 110_000: 0.1, 110_001: 0.01}


@pytest.mark.parametrize("detector", ["faster_rcnn", "retinanet", "fcos"])
@pytest.mark.parametrize(
    ("method", "expected"),
    [
        *((method, WHOLE) for method in ("baseline", "lgd", "sssd")),
        *(("labelenc", HALF), ("labelenc_stage1", LONG)),
    ],
)
def test_rate_and_clipping_of_a_step(
    data: DataSource,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    detector: str,
    method: str,
    expected: dict[int, float],
) -> None:
    """By how much a step moves weights, in warm-up and about the milestones."""
    config = configure("paper", data=data, method=method.split("_")[0], detector=detector)
    if method == "labelenc_stage1":
        assert isinstance(config.start, RunConfig)
        config = config.start
    monkeypatch.setattr(engine, "build_model", lambda *_: Pulls())
    monkeypatch.setattr(
        engine, "_batches", lambda config, split, steps, *_: [([], [])] * len(steps)
    )
    nothing: Any = ({}, Detections.concatenate([]), {})
    monkeypatch.setattr(engine, "validate", lambda *_: nothing)
    for t, share in expected.items():
        model = Pulls()
        optimizer = engine._optimizer(config, model)
        state = {"iteration": t - 1, "seconds": 0, "scaler": None, "model": model.state_dict()}
        state["optimizer"] = optimizer.state_dict()
        monkeypatch.setattr(RunFolder, "load_checkpoint", lambda *_, state=state: state)
        folder = tmp_path / str(t)
        engine.train(config, folder, until=t, checkpoint_seconds=0)
        after = torch.load(folder / "last.pt", weights_only=True)["model"]
        rate = share * (0.02 if detector == "faster_rcnn" else 0.01)
        assert float(after["student.weight"]) == pytest.approx(-1.0 * rate)  # clipped
        assert float(after["teacher.weight"]) == pytest.approx(0.25 * rate)  # not


def test_a_batch_has_sixteen_images_of_which_half_are_flipped(data: DataSource) -> None:
    config, split = configure("paper", data=data), open_split(data, "train")
    flipped = []
    for images, targets in engine._batches(config, split, range(1, 9), Accelerator(cpu=True)):
        assert len(images) == len(targets) == 16
        for image, target in zip(images, targets, strict=True):
            own = [torch.equal(target["boxes"], split[i][1]["boxes"]) for i in range(8)]
            flipped.append(not any(own))
            assert any(torch.equal(image.flip(-1) if flipped[-1] else image, split[i][0])
                       for i in range(8))  # fmt: skip
    assert 0.4 < sum(flipped) / len(flipped) < 0.6
