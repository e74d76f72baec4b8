"""The model of a run, and the weights it begins from."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.transforms.functional import normalize

from .config import BUILT_FROM, RunConfig, WeightsFile
from .data.coco import mixed_seed
from .detectors import TORCHVISION_NAMES, build_detector, classifier, freeze_stages
from .distiller import Distiller
from .labelenc import LabelEncodingFunction
from .methods import DISTANCE_OF, TAUGHT
from .records import RunFolder, load_weights, read_json

TAUGHT_BY: tuple[str, ...] = ("distill_start", "distill_stop", "unfreeze_backbone")
TAUGHT_BY += ("context", "detach_appearance", "normaliser")
"""The fields of a configuration that `Distiller` takes under the same name."""


class CropClassifier(nn.Module):
    """A backbone with trained batch norm that classifies object crops; called like `Distiller`."""

    def __init__(self, backbone: str, num_classes: int, stem_pool: bool = True) -> None:
        super().__init__()
        self.body: Any = classifier(backbone, trained_norm=True, stem_pool=stem_pool)
        last = "head" if backbone == "swin_t" else "fc"
        setattr(self.body, last, nn.Linear(getattr(self.body, last).in_features, num_classes))

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        logits = self.body(
            normalize(torch.stack(images), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        )
        labels = torch.stack([target["labels"] for target in targets]) - 1
        return {"loss_crops": F.cross_entropy(logits, labels)}


def _load_body(student: Any, state: dict[str, Tensor]) -> None:
    """Load a classifier's weights, without those of its last layer, into a detector's backbone."""
    body = student.backbone.body
    swin = _part(state, "features.")
    if swin:  # the detector's backbone has the same parts, grouped into stages
        parts = (part for stage in body.children() for part in stage.children())
        nn.Sequential(*parts).load_state_dict(swin)
    else:  # frozen batch norm leaves out batch norm's count of batches
        body.load_state_dict({k: v for k, v in state.items() if not k.startswith("fc.")})


def build_model(config: RunConfig, num_classes: int, runs: Path) -> nn.Module:
    """The model that a run trains, with the weights that it starts from.

    Raises:
        ValueError: the file of weights fits neither the backbone nor the detector, or has changed
            since the run was configured.
    """
    torch.manual_seed(mixed_seed(config.seed))
    if config.method == "crops":
        return CropClassifier(config.backbone, num_classes, config.stem_pool)
    built = {name: getattr(config, name) for name in BUILT_FROM}
    student: Any = build_detector(config.detector, config.backbone, num_classes, **built)
    encoder = None
    if config.method == "labelenc":
        assert isinstance(config.start, RunConfig)  # the configuration is validated
        _load_start(student, config, config.start.start, runs)
        encoder = _load_stage1(student, num_classes, runs / config.start.id)
    else:
        _load_start(student, config, config.start, runs)
    freeze_stages(student, config.trainable_stages)
    if config.student_rests and config.method in TAUGHT:
        student.requires_grad_(False)
        for module in student.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.0  # its running statistics do not change
    taught = {name: getattr(config, name) for name in TAUGHT_BY}
    distiller = Distiller(
        student, config.method, lam=config.lambda_at, first_label=1, encoder=encoder, **taught
    )
    if isinstance(config.start, RunConfig) and config.start.method in DISTANCE_OF:
        # Teacher and adapter continue from those of another run; the count of steps does not.
        state = load_weights(runs / config.start.id / "teacher.pt")
        del state["step"]
        distiller.load_state_dict({**distiller.state_dict(), **state})
    return distiller


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries whose names begin with ``prefix``, without it."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _load_start(
    student: Any, config: RunConfig, start: str | WeightsFile | RunConfig, runs: Path
) -> None:
    """Load the weights that a detector starts from: those of its backbone, or all."""
    if isinstance(start, RunConfig):
        state = load_weights(runs / start.id / "weights.pt")
        if start.method == "crops":
            _load_body(student, state)
        elif start.detector != config.detector:  # other detectors share only the backbone
            student.backbone.body.load_state_dict(_part(state, "backbone.body."))
        else:
            student.load_state_dict(state)
    elif start == "imagenet":
        name = TORCHVISION_NAMES.get(config.backbone, config.backbone)
        weights = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]
        _load_body(student, weights.get_state_dict())
    elif isinstance(start, WeightsFile):
        file = Path(start.path)
        if hashlib.sha256(file.read_bytes()).hexdigest() != start.sha256:
            raise ValueError(
                f"start: {file} has changed since the run was configured; expected the file whose "
                f"SHA-256 begins with {start.sha256[:16]}"
            )
        try:
            state = load_weights(file)
            if any(name.startswith("backbone.") for name in state):
                student.load_state_dict(state)
            else:
                _load_body(student, state)
        except (RuntimeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"start: {file.name} holds neither the weights of this "
                f"{config.detector} nor those of a {config.backbone} classifier"
            ) from error


def _load_stage1(student: Any, num_classes: int, stage1: Path) -> LabelEncodingFunction:
    """Load stage 1's head, and the FPN of its label encoding function; return that function."""
    state = load_weights(stage1 / "weights.pt")
    head = {name: value for name, value in state.items() if not name.startswith("backbone.")}
    student.load_state_dict({**student.state_dict(), **head})
    encoder = LabelEncodingFunction.like(student, num_classes)
    encoder.load_state_dict(_part(load_weights(stage1 / "teacher.pt"), "teacher."))
    fpn = student.backbone.fpn  # Swin's has norm layers that stage 1's does not have
    fpn.load_state_dict({**fpn.state_dict(), **encoder.fpn.state_dict()})
    return encoder


def load_student(run: Path) -> tuple[nn.Module, list[str], dict[str, Any]]:
    """A finished run's student on the CPU in evaluation mode, its classes and its configuration.

    Label n is the class ``classes[n - 1]``.

    Raises:
        ValueError: the run is not finished, is damaged, has no weights here, or trains no detector.
    """
    config, files = read_json(run / "config.json"), RunFolder(run)
    if config["method"] == "crops":
        raise ValueError(f"run: {files.id} trains a classifier of crops; expected a detector's")
    if not (run / "done.json").exists():
        raise ValueError(f"run: {files.id} is not finished; expected a run that is")
    if why := files.damage(weights=True):
        raise ValueError(f"run: {why}")
    if not (run / "weights.pt").exists():
        what = "was imported without its weights; expected one trained here"
        raise ValueError(f"run: {files.id} {what}")
    classes = list(files.last_evaluation()["per_class"])
    built = {name: config[name] for name in BUILT_FROM if name in config}
    student = build_detector(config["detector"], config["backbone"], len(classes), **built)
    student.load_state_dict(load_weights(run / "weights.pt"))
    return student.eval(), classes, config
