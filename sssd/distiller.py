"""Student, teacher, adapter and distance in one module that is itself a detector.

It has torchvision's calling convention, so that it fits into any loop written for torchvision: in
training ``distiller(images, targets)`` returns a dict of losses to be summed, in evaluation
``distiller(images)`` returns the student's detections.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .detectors import (
    family_of,
    frozen_backbone,
    frozen_statistics,
    levels_of,
    observed,
    target_fields,
)
from .labelenc import LabelEncodingFunction
from .losses import PAPER_NORMALISER, mse
from .methods import DISTANCE_OF, LABELENC, PUBLISHED_LAMBDA, TAUGHT
from .teacher import LabelGuidedTeacher


def build_adapter(width: int) -> nn.Sequential:
    """The adapter: Conv 3×3, ReLU, Conv 3×3, ReLU, Conv 3×3, width kept."""
    layers: list[nn.Module] = []
    for _ in range(3):
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


Lambda = float | Callable[[int], float]
"""λ: a number, or a function of the iteration, counted from 1."""


def _check_method(method: str, encoder: LabelEncodingFunction | None) -> None:
    known = ("baseline", *TAUGHT)
    if method not in known:
        raise ValueError(
            f"method: {method!r} is unknown; expected one of {', '.join(known)}, "
            "or one that the file in SSSD_METHODS registers"
        )
    if (method == "labelenc") != (encoder is not None):
        raise ValueError(
            f"encoder: {'missing' if encoder is None else 'given'} for method {method!r}; "
            "labelenc, and no other, needs the label encoding function of its stage 1"
        )


def _lambda_of(method: str, lam: Lambda | None) -> Lambda:
    """The given λ, or the published one."""
    if lam is None:
        if method not in PUBLISHED_LAMBDA:
            raise ValueError(f"lam: expected a number for method {method!r}, as none is published")
        return PUBLISHED_LAMBDA[method]
    if not callable(lam) and not (isinstance(lam, Real) and 0 <= lam < float("inf")):
        raise ValueError(f"lam: {lam!r} is neither a number of at least 0 nor a function of t")
    return lam


def _in_type_of(images: list[Tensor], targets: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Targets whose boxes have the images' dtype; boxes from numpy are float64."""
    return [{**target, "boxes": target["boxes"].to(images[0].dtype)} for target in targets]


class Distiller(nn.Module):
    """A torchvision detector that is taught by its own features and the labels.

    ``Distiller(model)`` is enough. In a training of n iterations the paper's proportions are::

        t1 = n * 2 // 3  # where the learning rate first decays
        model = Distiller(model, lam=lambda t: 50 if t <= t1 else 75, distill_start=n // 6)
        teacher = [p for name, p in model.named_parameters() if not name.startswith("student.")]
        groups = [{"params": model.student.parameters()}, {"params": teacher, "lr": lr / 4}]
        optimizer = torch.optim.AdamW(groups, lr)

    Teacher and adapter have a parameter group of their own: with AdamW they need a quarter of the
    student's learning rate, because at the full rate the teacher does not learn to tell classes
    apart. With SGD, as in the paper, both have the same rate.

    Args:
        student: any torchvision ``FasterRCNN``, ``MaskRCNN``, ``KeypointRCNN``, ``RetinaNet`` or
            ``FCOS``; as ``distiller.student`` it is still a stock detector.
        method: ``sssd`` (Jensen-Shannon distance), ``lgd`` (mean squared error), ``kl``,
            ``baseline`` (no teacher: the student's own losses, nothing else), or LabelEnc's
            ``labelenc_stage1`` (label encoding function and detector learn together) and
            ``labelenc`` (a detector is pulled towards the frozen function's pyramid); or a name
            given to `register_distance`.
        lam: λ, a number or a function of the iteration (counted from 1); default: the published
            value, 1 for ``lgd`` and LabelEnc, 50 for ``sssd``. A distiller that you want to pickle
            needs a function defined in a module, as a lambda cannot be pickled.
        distill_start: until this iteration only the adapter learns from the distillation loss;
            ``labelenc_stage1`` has no such loss until then, so its adapter does not learn. Not
            used by ``labelenc``, which begins at once.
        distill_stop: after this iteration only the adapter learns from the distillation loss, as
            in LGD's release; LabelEnc's stages have no such loss then. Default: never.
        unfreeze_backbone: until this iteration the backbone below the pyramid gets no gradient.
            Not used by ``baseline`` and LabelEnc, which train it from the start.
        first_label: the label of the first class; default: 1 for Faster R-CNN, where 0 is the
            background, and 0 for RetinaNet and FCOS. Give 1 if theirs begin at 1, as in
            torchvision's reference training and in `detectors.build_detector`: otherwise the
            teacher, and LabelEnc's label map, have one class too many.
        context: add LGD's context object; default: only for RetinaNet. LGD's release also has it
            for FCOS with ResNet-101 and larger: give ``True`` there.
        detach_appearance: stop the gradient before the appearance encoder; default: only for
            Faster R-CNN, as in LGD's release.
        normaliser: constant that KL and JS are divided by (`losses.PAPER_NORMALISER`).
        encoder: for ``labelenc``, the label encoding function that stage 1 trained
            (``stage1.teacher``); it is frozen.

    The buffer ``step`` counts training steps, so that the schedules above work in any training
    loop; set it with ``distiller.step.fill_(n)``. A step is a call in training mode with gradients
    enabled: losses computed under ``torch.no_grad()`` do not count. If you accumulate gradients
    over n calls, multiply the iterations above by n.

    Under plain ``DistributedDataParallel``, parts that do not learn (frozen backbone, LabelEnc's
    adapter) get a gradient of zero, which weight decay acts on; ``find_unused_parameters=True``
    gives them none, as in a single process.

    Source: SSSD, section 2; LGD (AAAI 2022), section 3 and its release; LabelEnc (ECCV 2020).

    Raises:
        ValueError: the student cannot be split, or an argument is out of its range.
    """

    step: Tensor

    def __init__(
        self,
        student: nn.Module,
        method: str = "sssd",
        *,
        lam: Lambda | None = None,
        distill_start: int = 0,
        distill_stop: int | None = None,
        unfreeze_backbone: int = 0,
        first_label: int | None = None,
        context: bool | None = None,
        detach_appearance: bool | None = None,
        normaliser: int = PAPER_NORMALISER,
        encoder: LabelEncodingFunction | None = None,
    ) -> None:
        super().__init__()
        _check_method(method, encoder)
        counts = {"distill_start": distill_start, "unfreeze_backbone": unfreeze_backbone}
        counts["distill_stop"] = distill_stop or 0
        for name, count in counts.items():
            if count < 0:
                raise ValueError(f"{name}: {count} is not an iteration, of at least 0")
        if normaliser <= 0:
            raise ValueError(f"normaliser: {normaliser} is not positive")
        self.student: Any = student
        self.family = family_of(student)
        self.method = method
        self.distill_start = 0 if method == "labelenc" else distill_start
        self.distill_stop = distill_stop
        self.unfreeze_backbone = unfreeze_backbone if method in DISTANCE_OF else 0
        self.normaliser = normaliser
        like = next(student.parameters())  # what is added gets the same device and dtype
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=like.device))
        lowest, labels = self.family.first_label, self.family.num_labels(student)
        self.first_label = lowest if first_label is None else first_label
        if not lowest <= self.first_label < lowest + labels:
            raise ValueError(
                f"first_label: {first_label}; this detector knows {lowest} to {lowest + labels - 1}"
            )
        self.num_classes = lowest + labels - self.first_label
        if method == "baseline":
            return
        self.lam = _lambda_of(method, lam)
        width: int = student.backbone.out_channels  # type: ignore[union-attr, assignment]
        self.adapter = build_adapter(width).to(like)
        self.teacher: LabelGuidedTeacher | LabelEncodingFunction
        if method in LABELENC:
            self.teacher = encoder or LabelEncodingFunction.like(student, self.num_classes)
            self.teacher.noisy = method == "labelenc_stage1"
            self.teacher.requires_grad_(method == "labelenc_stage1")
        else:
            if context is None:
                context = self.family.context
            if detach_appearance is None:
                detach_appearance = self.family.detach_appearance
            self.teacher = LabelGuidedTeacher(
                self.num_classes, width, context=context, detach_appearance=detach_appearance
            )
        self.teacher.to(like)

    @property
    def training(self) -> bool:
        """The student's mode, so that the two always agree."""
        return self.student.training

    @training.setter
    def training(self, mode: bool) -> None:
        """Ignored: `train` and `eval` set the student's mode, too."""

    def forward(
        self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Losses in training, the student's detections in evaluation.

        Args:
            images: [3, H, W] each, values in [0, 1], any sizes.
            targets: one dict per image with ``boxes`` [T, 4] (x1, y1, x2, y2 in pixels) and
                ``labels`` [T] int64; T may be 0. ``MaskRCNN`` also needs ``masks`` [T, H, W], and
                ``KeypointRCNN`` ``keypoints`` [T, N, 3]. LGD's teacher paints the masks if the
                student learns masks, otherwise the boxes. Not used in evaluation.

        Returns:
            In training the student's own losses by their torchvision names, the teacher's as
            ``teacher_*``, and ``distill`` = λ(t) · L_distill: sum them and call backward.

        Raises:
            ValueError: targets are missing or malformed.
        """
        if not self.training:
            return self.student(images)
        self._check(images, targets)
        assert targets is not None
        return self._losses(images, targets)

    # torch.compile cannot follow the counter and the schedules; it compiles the modules alone.
    @torch.compiler.disable(recursive=False)
    def _losses(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The losses of the next training step."""
        t = int(self.step) + 1
        targets = _in_type_of(images, targets)
        frozen = frozen_backbone(self.student) if t <= self.unfreeze_backbone else nullcontext()
        # The student is called as a whole, so that its losses are those of its own forward.
        with (
            frozen,
            observed(self.student.transform) as prepared,
            observed(self.student.backbone) as pyramids,
        ):
            losses: dict[str, Tensor] = self.student(images, targets)
        (batch, batch_targets), features = prepared[0], levels_of(pyramids[0])
        if self.method != "baseline":
            taught = self.teach(features, batch_targets, batch.tensors.shape[-2:])
            if self.method != "labelenc":  # its teacher is already trained
                with frozen_statistics(self.student):  # they describe the student's pyramid alone
                    teacher_losses = self.family.head(self.student, batch, taught, batch_targets)
                losses.update({f"teacher_{name}": loss for name, loss in teacher_losses.items()})
            late = self.distill_stop is not None and t > self.distill_stop
            only_adapter = late or t <= self.distill_start
            if not (only_adapter and self.method in LABELENC):
                lam = self.lam(t) if callable(self.lam) else self.lam
                losses["distill"] = lam * self.distance(features, taught, detach=only_adapter)
        if torch.is_grad_enabled():
            self.step += 1
        parallel = DistributedDataParallel._get_active_ddp_module()
        if parallel is not None and not parallel.find_unused_parameters:
            # Plain DDP fails if a parameter has no gradient: give such parameters a gradient of 0.
            name = next(iter(losses))
            losses[name] = losses[name] + sum(
                0 * p.sum() for p in self.parameters() if p.requires_grad
            )
        return losses

    def teach(
        self, features: OrderedDict[str, Tensor], targets: list[dict[str, Tensor]], size: Any
    ) -> OrderedDict[str, Tensor]:
        """The teacher's pyramid, its levels [B, C, h_p, w_p] shaped like the student's."""
        boxes = [target["boxes"] for target in targets]
        labels = [target["labels"] - self.first_label for target in targets]
        learnt = "masks" in target_fields(self.student)
        masks = [target.get("masks") if learnt else None for target in targets]
        area = (int(size[0]), int(size[1]))
        levels = self.teacher(list(features.values()), boxes, labels, area, masks)
        return OrderedDict(zip(features, levels, strict=True))

    @torch.no_grad()
    def detect_taught(
        self,
        images: list[Tensor],
        targets: list[dict[str, Tensor]],
        features: OrderedDict[str, Tensor] | None = None,
    ) -> list[dict[str, Tensor]]:
        """What the student's head detects on the teacher's pyramid, in evaluation mode.

        The teacher is given the labels, so its AP is not that of a detector: it shows whether the
        student is pulled towards something better than its own pyramid.

        Args:
            images, targets: as in training.
            features: the student's pyramid of these images; computed if it is not given.

        Returns:
            detections in the student's format.

        Raises:
            ValueError: the method has no teacher, or targets are missing or malformed.
        """
        if self.method == "baseline":
            raise ValueError("method: baseline has no teacher; expected a method that has one")
        if self.training:
            raise ValueError("training: True; detect_taught needs evaluation mode, after eval()")
        self._check(images, targets)
        batch, batch_targets = self.student.transform(images, _in_type_of(images, targets))
        if features is None:
            features = levels_of(self.student.backbone(batch.tensors))
        taught = self.teach(features, batch_targets, batch.tensors.shape[-2:])
        backbone = self.student.backbone
        backbone.forward = lambda _: taught  # so that the student detects on the teacher's pyramid
        try:
            return self.student(images)
        finally:
            del backbone.forward

    def distance(
        self, features: OrderedDict[str, Tensor], taught: OrderedDict[str, Tensor], detach: bool
    ) -> Tensor:
        """L_distill, without λ, between the student's adapted pyramid and the teacher's."""
        measure = DISTANCE_OF.get(self.method, mse)  # LabelEnc's distance is LGD's
        norm = self.teacher.norm
        student = [
            norm(self.adapter(level.detach() if detach else level)) for level in features.values()
        ]
        teacher = [norm(level.detach()) for level in taught.values()]
        with torch.autocast(student[0].device.type, enabled=False):
            return measure(student, teacher, self.normaliser)

    def _check(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None) -> None:
        if targets is None:
            raise ValueError("targets: missing; a distiller in training needs one dict per image")
        if len(targets) != len(images):
            raise ValueError(f"targets: {len(targets)} for {len(images)} images; expected one each")
        for i, target in enumerate(targets):
            needed = target_fields(self.student)
            if not all(isinstance(target.get(field), Tensor) for field in needed):
                raise ValueError(f"targets[{i}]: expected tensors in {' and '.join(needed)}")
            boxes, labels = target["boxes"], target["labels"]
            if boxes.ndim != 2 or boxes.shape[1] != 4 or labels.shape != boxes.shape[:1]:
                raise ValueError(
                    f"targets[{i}]: boxes {tuple(boxes.shape)} and labels {tuple(labels.shape)}; "
                    "expected [T, 4] and [T]"
                )
            size = (len(boxes), *images[i].shape[-2:])
            if "masks" in needed and target["masks"].shape != size:
                given = tuple(target["masks"].shape)
                raise ValueError(f"targets[{i}]: masks {given}; expected {size}")
            points = target["keypoints"].shape if "keypoints" in needed else (len(boxes), 0, 3)
            if len(points) != 3 or points[::2] != (len(boxes), 3):
                raise ValueError(
                    f"targets[{i}]: keypoints {tuple(points)}; expected ({len(boxes)}, N, 3)"
                )
            if labels.dtype != torch.int64:
                raise ValueError(f"targets[{i}]: labels of {labels.dtype}; expected torch.int64")
            if not (boxes.isfinite().all() and (boxes[:, 2:] > boxes[:, :2]).all()):
                raise ValueError(
                    f"targets[{i}]: a box that is not finite, or without width or height; "
                    "drop such boxes"
                )
        labels = torch.cat([target["labels"] for target in targets])
        first, last = self.first_label, self.first_label + self.num_classes - 1
        if labels.numel() and not (labels.min() >= first and labels.max() <= last):
            raise ValueError(
                f"targets: labels from {int(labels.min())} to {int(labels.max())}; "
                f"this detector knows {first} to {last}"
            )
