"""The configuration of a run: everything that decides its numbers, validated and immutable.

A run is named by the hash of its canonical JSON (`RunConfig.id`). That leaves out where files are,
and fields that the method, detector or optimizer does not read: a baseline with another λ is the
same run. One such field is kept: `normaliser`, which LGD does not read.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from . import parameters
from .detectors import SLIM, check_backbone
from .losses import PAPER_NORMALISER
from .methods import DISTANCE_OF, METHODS, PUBLISHED_LAMBDA, REGISTERED, STEPS, TAUGHT

DETECTORS = ("faster_rcnn", "retinanet", "fcos")
BUILT_FROM: tuple[str, ...] = ("width", "min_sizes", "max_size", "scale", "trained_norm")
BUILT_FROM += ("stem_pool", "proposals", "roi_samples")
"""The fields of a configuration that `detectors.build_detector` takes besides its three names."""

METHOD_VERSION = 3
"""Part of every run's id. Raise it by hand with each change of the code that changes numbers, so
that runs from before and after never stand in one table. If only last bits change, raise the
package's version: a report whose runs come from different versions says so."""


def _known(method: str) -> str:
    if method not in (*METHODS, *STEPS):
        raise ValueError(f"expected one of {', '.join(map(repr, METHODS))}")
    return method


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DataSource(Frozen):
    """A COCO-format data set, identified by the contents of its annotation files.

    These contents are checked again when training begins. An image is identified only by its name
    and size in the annotations: if you change its pixels, give it another name.
    """

    name: str = Field(description="what figures and tables call it")
    train: str = Field(description="fingerprint of the training annotations")
    val: str = Field(description="fingerprint of the validation annotations")
    paths: dict[str, str] = Field(exclude=True, repr=False, description="where the files lie")
    classes: dict[int, str] = Field(
        exclude=True, repr=False, description="the training set's categories, name by id"
    )
    narrowest: tuple[str, int, int] = Field(
        default=("", 1, 1),
        exclude=True,
        repr=False,
        description="name, width and height in pixels of the image with the largest aspect ratio",
    )


class WeightsFile(Frozen):
    """A file of start weights, identified by its contents; these are checked as training begins."""

    sha256: str
    path: str = Field(exclude=True, repr=False)


Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, strict=True)]
Size = Annotated[int, Field(ge=1, strict=True)]
Sizes = Annotated[tuple[Size, ...], Field(min_length=1), BeforeValidator(parameters.values)]

MOST_TEACHER_BYTES = 8 * 2**30
"""A teacher that needs more than this, for one layer or one image, is refused."""


# --- defaults that depend on fields defined before ------------------------------------------------


def _trainable_stages(known: dict[str, Any]) -> int:
    start = known["start"]
    if known["method"] == "labelenc":  # its backbone has the same start as stage 1's
        start = getattr(start, "start", None)
    return 5 if start == "random" else 3


def _milestones(known: dict[str, Any]) -> tuple[int, int]:
    """Milestones in the papers' proportions.

    LGD's release trains for 180,000 iterations: the backbone is frozen for 20,000, the student
    learns from the distillation after 30,000, and the rate is divided by 10 at 120,000 and 160,000
    (1/9, 1/6, 2/3 and 8/9). Stage 2 of LabelEnc's release has 90,000, with decays at 60,000 and
    80,000 and no distillation after 80,000; stage 1 has the same after 30,000 without distillation.
    """
    n, stage1 = known["iterations"], known["method"] == "labelenc_stage1"
    first = max(n * 3 // 4 if stage1 else n * 2 // 3, 1)
    return first, max(n * 11 // 12 if stage1 else n * 8 // 9, first + 1)


def _lambda1(known: dict[str, Any]) -> float:
    method = known["method"]
    if method not in PUBLISHED_LAMBDA and method in DISTANCE_OF:
        raise ValueError(f"lambda1: missing; expected λ, as none is published for {method}")
    return PUBLISHED_LAMBDA.get(method, 0.0)  # methods without a λ do not read it


class RunConfig(Frozen):
    """One training run. Lengths are in pixels, times in iterations.

    Iterations are counted from 1. What changes "after iteration T" changes at t > T: the learning
    rate, λ, where distillation starts and stops, and where the backbone begins to learn.
    """

    method: Annotated[str, AfterValidator(_known)] = Field(description="how the detector is taught")
    data: DataSource = Field(description="what it is trained and evaluated on")
    seed: Count = Field(0, description="seed of weights, batches and augmentation")
    start: Literal["random", "imagenet"] | WeightsFile | RunConfig = Field(
        description="where the weights come from: random, torchvision's ImageNet classifier, "
        "a file, or another run"
    )

    detector: Literal["faster_rcnn", "retinanet", "fcos"] = Field(description="the student")
    backbone: Literal[
        "resnet18", "resnet34", "resnet50", "resnet101", "slim18", "slim34", "resnext101", "swin_t"
    ] = Field(description="the student's backbone; slim: with a quarter of the channels")
    trained_norm: bool = Field(False, description="the backbone's batch norm learns")
    stem_pool: bool = Field(
        True, description="max-pooling in the backbone's stem; without it all strides are halved"
    )
    width: Size = Field(256, multiple_of=8, description="pyramid width C")
    trainable_stages: Annotated[int, Field(ge=0, le=5)] = Field(
        default_factory=_trainable_stages,
        description="how many backbone stages learn, counted from the last; default: 3 (stem and "
        "first stage frozen), or 5 from random weights",
    )
    min_sizes: Sizes = Field(
        (640, 672, 704, 736, 768, 800),
        description="shorter sides, drawn from in training; tests use the last one",
    )
    max_size: Size = Field(1333, description="longest side")
    scale: Positive = Field(1.0, description="lengths built into the detector ÷ torchvision's")
    proposals: Annotated[int, Field(ge=2)] = Field(
        2000, description="Faster R-CNN's proposals per image in training; half as many in tests"
    )
    roi_samples: Size = Field(512, description="RoIs per image that the box head learns from")
    flip: Fraction = Field(0.5, description="probability of a horizontal flip")

    batch_size: Size = Field(16, description="images per step, over all processes")
    aspect_grouping: bool = Field(
        default_factory=lambda known: known["batch_size"] % 2 == 0,
        description="a batch consists of pairs of images that are both wide or both tall, so that "
        "little is padded; default: where batch_size is even",
    )
    iterations: Size = Field(180_000, description="training steps")
    teacher_lr: Positive = Field(
        1.0, description="learning rate of teacher and adapter ÷ the student's"
    )
    student_rests: bool = Field(False, description="only teacher and adapter learn")
    optimizer: Literal["sgd", "adamw"] = Field("sgd", description="SGD with momentum, or AdamW")
    lr: Positive = Field(0.02, description="learning rate after warm-up")
    momentum: Fraction = Field(0.9, description="momentum of SGD")
    weight_decay: NonNegative = Field(1e-4, description="weight decay of all weights")
    warmup: Count = Field(1000, description="iterations of linear warm-up")
    warmup_factor: Fraction = Field(1e-3, description="share of the rate that warm-up starts from")
    milestones: Sizes = Field(
        default_factory=_milestones,
        description="after each the rate is multiplied by gamma; default: 2/3 and 8/9 of the run "
        "(LabelEnc's stage 1: 3/4 and 11/12)",
    )
    gamma: Fraction = Field(0.1, description="factor of the learning rate at a milestone")
    teacher_gamma: Fraction = Field(
        default_factory=lambda known: known["gamma"],
        description="the same factor for teacher and adapter; default: gamma",
    )
    clip: Positive = Field(1.0, description="gradients are clipped to ± this value")
    precision: Literal["no", "bf16", "fp16"] = Field("no", description="mixed precision")
    channels_last: bool = Field(
        False, description="channels come last in memory: faster on some GPUs"
    )

    lambda1: NonNegative = Field(
        default_factory=_lambda1,
        description="λ up to T1; default: 1 for LGD and LabelEnc, 50 for SSSD, none for KL",
    )
    lambda2: NonNegative | None = Field(None, description="λ after T1; default: lambda1 (fixed λ)")
    t1: Size = Field(
        default_factory=lambda known: known["milestones"][0],
        description="T1, after which λ is lambda2; default: the first milestone",
    )
    distill_start: Count = Field(
        default_factory=lambda known: (
            known["iterations"] // (4 if known["method"] == "labelenc_stage1" else 6)
        ),
        description="until this iteration distillation trains only the adapter (LabelEnc's stage "
        "1: nothing); default: 1/6 (stage 1: 1/4)",
    )
    distill_stop: Size | None = Field(
        default_factory=lambda known: (
            max(known["iterations"] * 8 // 9, 1) if known["method"] == "labelenc" else None
        ),
        description="after this iteration distillation trains only the adapter (LabelEnc: "
        "nothing); default: never (LabelEnc's stage 2: 8/9)",
    )
    unfreeze_backbone: Count = Field(
        default_factory=lambda known: known["iterations"] // 9,
        description="until this iteration the backbone below the pyramid is frozen; default: 1/9",
    )
    context: bool = Field(
        default_factory=lambda known: (
            known["detector"] == "retinanet"
            or (known["detector"] == "fcos" and known["backbone"] in ("resnet101", "resnext101"))
        ),
        description="the teacher has a context object; default: LGD's choice for the detector",
    )
    detach_appearance: bool = Field(
        default_factory=lambda known: known["detector"] == "faster_rcnn",
        description="the gradient stops before the appearance encoder; default: LGD's choice",
    )
    normaliser: Size = Field(PAPER_NORMALISER, description="constant that KL and JS are divided by")

    eval_every: Size = Field(
        default_factory=lambda known: max(known["iterations"] // 18, 1),
        description="iterations from one evaluation to the next; default: 1/18",
    )

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        def refuse(field: str, expected: str) -> None:
            raise ValueError(f"{field}: {getattr(self, field)!r}; expected {expected}")

        if list(self.milestones) != sorted(set(self.milestones)):
            refuse("milestones", "increasing iterations")
        if self.stepwise and self.t1 >= self.iterations:
            refuse("t1", f"T1 before the last iteration, {self.iterations}")
        delayed = self.method in (*DISTANCE_OF, "labelenc_stage1")
        if delayed and self.distill_start >= self.iterations:
            refuse("distill_start", f"an iteration before the last, {self.iterations}")
        if self.method == "labelenc" and getattr(self.start, "method", "") != "labelenc_stage1":
            refuse("start", "the run of LabelEnc's stage 1 that stage 2 goes on from")
        if self.start == "imagenet" and self.backbone in SLIM:
            refuse("start", f"random or a file, as {self.backbone} has no ImageNet weights")
        if self.aspect_grouping and self.batch_size % 2:
            refuse("batch_size", "an even number for aspect_grouping, which takes pairs of images")
        if self.max_size < max(self.min_sizes):
            refuse("max_size", f"at least the largest of min_sizes, {max(self.min_sizes)}")
        if self.method != "crops":
            check_narrowest(self.data.narrowest, self.max_size)
        check_backbone(self.backbone, self.trained_norm, self.stem_pool)
        self._check_teacher()
        return self

    def _check_teacher(self) -> None:
        """Refuse a number of classes that makes the teacher too large for any machine."""
        classes = len(self.data.classes)
        if self.method in DISTANCE_OF:  # the T-Net's last layer: 256 features to a square matrix
            asked, what = 4 * 256 * (classes + 4) ** 2, "weights"
        elif self.method in TAUGHT:  # LabelEnc's label image has a channel for each class
            asked, what = 4 * classes * self.max_size * self.min_sizes[-1], "memory for an image"
        else:
            return
        if asked > MOST_TEACHER_BYTES:
            raise ValueError(
                f"data: {classes} classes; expected fewer, or the method 'baseline': the teacher "
                f"of {self.method} would need {asked / 1e9:.0f} GB of {what}"
            )

    def canonical(self) -> dict[str, Any]:
        """Every value that decides the run's numbers; the module's text says what is left out."""
        unused: set[str] = set()
        if self.method not in DISTANCE_OF:
            unused |= {"t1", "lambda2", "unfreeze_backbone", "context", "detach_appearance"}
            unused.add("normaliser")
            if self.method not in TAUGHT:
                unused |= {"distill_start", "distill_stop", "lambda1"}
                unused |= {"teacher_lr", "teacher_gamma", "student_rests"}
            elif self.method == "labelenc":
                unused.add("distill_start")
        elif self.lambda2 is None:
            unused |= {"t1", "lambda2"}
        if self.detector != "faster_rcnn":
            unused |= {"proposals", "roi_samples"}
        if self.optimizer != "sgd":
            unused.add("momentum")
        # Left out if they are off, so that runs from before these fields existed keep their ids.
        unused |= {x for x in ("aspect_grouping", "channels_last") if not getattr(self, x)}
        if self.method == "crops":
            unused |= {"detector", "width", "min_sizes", "max_size", "scale", "proposals"}
            unused |= {"roi_samples", "eval_every", "trainable_stages", "flip", "aspect_grouping"}
        values = self.model_dump(mode="json", exclude=unused)
        if self.method in REGISTERED:  # a changed distance gives another run
            values["distance"] = REGISTERED[self.method]
        if isinstance(self.start, RunConfig):
            values["start"] = self.start.canonical()
        return {**values, "method_version": METHOD_VERSION}

    @cached_property
    def id(self) -> str:
        """The run's identity: the first 12 hex digits of the canonical JSON's SHA-256."""
        return identity(self.canonical())

    def lr_at(self, t: int) -> float:
        """The student's learning rate in iteration ``t``.

        It rises linearly from ``warmup_factor`` · ``lr`` at t = 1 to ``lr`` at t = ``warmup`` + 1,
        and is multiplied by ``gamma`` after each milestone (LGD's release: 1,000 iterations from
        1e-3, ÷ 10 after 120,000 and 160,000).
        """
        return self._rate(t, self.lr, self.gamma)

    def teacher_lr_at(self, t: int) -> float:
        """The same for teacher and adapter, with ``lr`` · ``teacher_lr`` and ``teacher_gamma``."""
        return self._rate(t, self.lr * self.teacher_lr, self.teacher_gamma)

    def _rate(self, t: int, base: float, gamma: float) -> float:
        decay = gamma ** sum(t > milestone for milestone in self.milestones)
        done = min((t - 1) / self.warmup, 1.0) if self.warmup else 1.0
        return base * decay * (self.warmup_factor * (1 - done) + done)

    def lambda_at(self, t: int) -> float:
        """λ in iteration ``t``: in a stepwise run λ1 for t ≤ T1 and λ2 for t > T1, else λ1."""
        if self.lambda2 is None or not self.stepwise or t <= self.t1:
            return self.lambda1
        return self.lambda2

    @property
    def stepwise(self) -> bool:
        """Whether λ changes after T1."""
        return self.method in DISTANCE_OF and self.lambda2 is not None

    @property
    def parent(self) -> RunConfig | None:
        """The fixed-λ run whose first T1 iterations this stepwise run shares; None for others."""
        return self.change(lambda2=None) if self.stepwise else None

    def label(self) -> str:
        """A short name for logs and legends, such as ``sssd λ=50→75 faster_rcnn resnet18 seed 0``."""
        lam = ""
        if self.method in DISTANCE_OF:
            lam = f" λ={self.lambda1:g}" + (f"→{self.lambda2:g}" if self.stepwise else "")
        if self.method == "crops":
            return f"crops {self.backbone}"
        method = self.method.replace("_", " ")
        return f"{method}{lam} {self.detector} {self.backbone} seed {self.seed}"

    def change(self, **fields: Any) -> RunConfig:
        """This run with other values, validated again; derived defaults stay as they are."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        return build_config({**values, **fields})


def check_narrowest(image: tuple[str, int, int], max_size: int) -> None:
    """Refuse an image (name, width, height in pixels) so narrow that resizing would leave no pixel.

    ``max_size`` is the longest side after resizing.
    """
    name, width, height = image
    least = math.ceil(max(width, height) / min(width, height))
    if max_size < least:
        raise ValueError(
            f"max_size: {max_size}; expected at least {least}: image {name}, {width} × {height} "
            "pixels, would have no pixel in its shorter side"
        )


def identity(canonical: Mapping[str, Any]) -> str:
    """The id of the run with this canonical configuration, as in a run's ``config.json``."""
    text = json.dumps(_without_names(canonical), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _without_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """A canonical configuration without the data set's name, which is that of its folder."""
    data, start = dict(values["data"]), values["start"]
    data.pop("name", None)
    return {**values, "data": data, "start": _without_names(start) if "method" in start else start}


def build_config(values: Mapping[str, Any]) -> RunConfig:
    """Validate a configuration; a ValueError has one sentence on the first field that is wrong."""
    given = {name: parameters.plain(v) for name, v in values.items() if v is not None}
    try:
        return RunConfig.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(str(part) for part in first["loc"][:1])
        message = str(first["msg"]).removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            known = ", ".join(sorted(RunConfig.model_fields))
            message = f"{where}: unknown field; the fields are {known}"
        elif where:
            text = repr(first["input"])
            text = text if len(text) <= 200 else text[:200] + "…"
            message = f"{where}: {text} is not valid: {message}"
        raise ValueError(message) from None
