"""A run is a value: everything that decides its numbers, validated, immutable and hashed.

The canonical JSON of a configuration names the run (`RunConfig.id`). What does not change the
numbers (where the files lie, how often to save) is no part of it, and fields that a method does
not read are left out, so that a baseline is one run whatever λ stands beside it.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .data.coco import CocoSplit, find_split, fingerprint
from .data.synthetic import synthetic
from .distiller import DISTANCE_OF, PUBLISHED_LAMBDA, TAUGHT

Method = Literal["crops", "baseline", "labelenc_stage1", "labelenc", "lgd", "kl", "sssd"]
DETECTORS = ("faster_rcnn", "retinanet", "fcos")
METHODS = ("baseline", "labelenc", "lgd", "kl", "sssd")
"""What may be compared; `Method` also has the steps on the way there."""


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DataSource(Frozen):
    """A COCO-format data set, known by the contents of its annotation files."""

    name: str = Field(description="what figures and tables call it")
    train: str = Field(description="fingerprint of the training annotations")
    val: str = Field(description="fingerprint of the validation annotations")
    paths: dict[str, str] = Field(exclude=True, repr=False, description="where the files lie")


class WeightsFile(Frozen):
    """A file of weights to start from, known by its contents."""

    sha256: str
    path: str = Field(exclude=True, repr=False)


Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, strict=True)]
Size = Annotated[int, Field(ge=1, strict=True)]


class RunConfig(Frozen):
    """One training run. Lengths are in pixels, times in iterations, counted from 1."""

    method: Method = Field(description="how the detector is taught")
    data: DataSource = Field(description="what it is trained and evaluated on")
    seed: Count = Field(0, description="of weights, batches and augmentation")
    start: Literal["random", "imagenet"] | WeightsFile | RunConfig = Field(
        description="where the weights come from: nowhere, torchvision's ImageNet classifier, "
        "a file, or another run"
    )

    detector: Literal["faster_rcnn", "retinanet", "fcos"] = Field(description="the student")
    backbone: Literal["resnet18", "resnet34", "resnet50", "resnet101"] = Field(
        description="the student's backbone, batch norm frozen"
    )
    width: Size = Field(256, multiple_of=8, description="pyramid width C")
    trainable_stages: Annotated[int, Field(ge=0, le=5)] = Field(
        description="stages of the backbone that learn, from the last; default: 3 (stem and first "
        "stage frozen), or 5 from random weights"
    )
    min_sizes: tuple[Size, ...] = Field(
        (640, 672, 704, 736, 768, 800),
        min_length=1,
        description="shorter sides drawn from in training; the last one is the test's",
    )
    max_size: Size = Field(1333, description="longest side")
    scale: Positive = Field(1.0, description="lengths built into the detector ÷ torchvision's")
    proposals: Annotated[int, Field(ge=2)] = Field(
        2000, description="Faster R-CNN's proposals an image in training; half in test"
    )
    roi_samples: Size = Field(512, description="RoIs an image that the box head learns from")
    flip: Fraction = Field(0.5, description="probability of a horizontal flip")

    batch_size: Size = Field(16, description="images a step, over all processes")
    iterations: Size = Field(180_000, description="training steps")
    optimizer: Literal["sgd", "adamw"] = Field("sgd", description="SGD with momentum, or AdamW")
    lr: Positive = Field(0.02, description="learning rate after warm-up")
    momentum: Fraction = Field(0.9, description="of SGD")
    weight_decay: Weight = Field(1e-4, description="of every weight")
    warmup: Count = Field(1000, description="iterations of linear warm-up")
    warmup_factor: Fraction = Field(1e-3, description="share of the rate that warm-up starts from")
    milestones: tuple[Size, ...] = Field(
        description="the rate is multiplied by gamma after these; default: 2/3 and 8/9 of the run"
    )
    gamma: Fraction = Field(0.1, description="factor of the learning rate at a milestone")
    clip: Positive = Field(1.0, description="gradients are clipped to ± this value")
    precision: Literal["no", "bf16", "fp16"] = Field("no", description="mixed precision")

    lambda1: Weight = Field(description="λ up to T1; default: LGD's 1, SSSD's 50, none for KL")
    lambda2: Weight | None = Field(None, description="λ after T1; default: as before (fixed λ)")
    switch: Size = Field(description="T1; default: the first milestone")
    distill_start: Count = Field(
        description="until then only the adapter learns from the distillation; default: 1/6"
    )
    distill_stop: Size | None = Field(None, description="no distillation after; default: never")
    unfreeze_backbone: Count = Field(
        description="until then the backbone below the pyramid is frozen; default: 1/9"
    )
    context: bool = Field(description="context object; default: LGD's choice for the detector")
    detach_appearance: bool = Field(description="default: LGD's choice for the detector")
    normaliser: Size = Field(256, description="constant of the distances' normalisation")

    eval_every: Size = Field(description="evaluate each so many iterations; default: 1/18")

    @model_validator(mode="before")
    @classmethod
    def _defaults_that_follow(cls, given: Any) -> Any:
        """Fill what follows from other fields, in the papers' proportions (method.md, 2 and 3).

        20,000, 30,000, 120,000 and 160,000 of 180,000 are 1/9, 1/6, 2/3 and 8/9. LabelEnc's
        90,000 decay at 60,000 and 80,000, and in stage 2 there is no distillation after 80,000;
        stage 1 has 30,000 more in front, without distillation.
        """
        if not isinstance(given, Mapping):
            return given
        values = {name: value for name, value in given.items() if value is not None}
        n = values.get("iterations", 180_000)
        if type(n) is not int or n < 1:
            n = 180_000  # the field's own message says what is wrong with it
        method = values.get("method")
        first, second = n * 2 // 3, n * 8 // 9
        if method == "labelenc_stage1":
            first, second = n * 3 // 4, n * 11 // 12
            values.setdefault("distill_start", n // 4)
        if method == "labelenc":
            values.setdefault("distill_stop", max(second, 1))
        first = max(first, 1)
        values.setdefault("milestones", (first, max(second, first + 1)))
        milestones = values["milestones"]
        if isinstance(milestones, list | tuple) and milestones:
            values.setdefault("switch", milestones[0])
        values.setdefault("switch", max(n * 2 // 3, 1))
        values.setdefault("distill_start", n // 6)
        values.setdefault("unfreeze_backbone", n // 9)
        values.setdefault("eval_every", max(n // 18, 1))
        start = values.get("start")
        if method == "labelenc":  # whose backbone comes from where stage 1 had it
            start = getattr(start, "start", None)
        values.setdefault("trainable_stages", 5 if start == "random" else 3)
        if method in PUBLISHED_LAMBDA:
            values.setdefault("lambda1", PUBLISHED_LAMBDA[method])
        elif method not in DISTANCE_OF:
            values.setdefault("lambda1", 0.0)  # read by none of them
        detector = values.get("detector")
        large_fcos = detector == "fcos" and values.get("backbone") == "resnet101"
        values.setdefault("context", detector == "retinanet" or large_fcos)
        values.setdefault("detach_appearance", detector == "faster_rcnn")
        return values

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        def refuse(field: str, expected: str) -> None:
            raise ValueError(f"{field}: {getattr(self, field)!r}; expected {expected}")

        if list(self.milestones) != sorted(set(self.milestones)):
            refuse("milestones", "increasing iterations")
        if self.stepwise and self.switch >= self.iterations:
            refuse("switch", f"T1 before the last iteration, {self.iterations}")
        delayed = self.method in (*DISTANCE_OF, "labelenc_stage1")
        if delayed and self.distill_start >= self.iterations:
            refuse("distill_start", f"an iteration before the last, {self.iterations}")
        if self.method == "labelenc" and getattr(self.start, "method", "") != "labelenc_stage1":
            refuse("start", "the run of LabelEnc's stage 1 that stage 2 goes on from")
        if self.max_size < max(self.min_sizes):
            refuse("max_size", f"at least the largest of min_sizes, {max(self.min_sizes)}")
        return self

    def canonical(self) -> dict[str, Any]:
        """Every value that decides the numbers, and no other."""
        unused: set[str] = set()
        if self.method not in DISTANCE_OF:
            unused |= {"switch", "lambda2", "context", "detach_appearance", "normaliser"}
            unused.add("unfreeze_backbone")
            if self.method not in TAUGHT:
                unused |= {"distill_start", "distill_stop", "lambda1"}
            elif self.method == "labelenc":
                unused.add("distill_start")
        elif self.lambda2 is None:
            unused |= {"switch", "lambda2"}
        if self.detector != "faster_rcnn":
            unused |= {"proposals", "roi_samples"}
        if self.optimizer != "sgd":
            unused.add("momentum")
        if self.method == "crops":
            unused |= {"detector", "width", "min_sizes", "max_size", "scale", "proposals"}
            unused |= {"roi_samples", "eval_every", "trainable_stages", "flip"}
        values = self.model_dump(mode="json", exclude=unused | {"start"})
        start = self.start
        values["start"] = (
            start.canonical()
            if isinstance(start, RunConfig)
            else start
            if isinstance(start, str)
            else start.model_dump()
        )
        return values

    @cached_property
    def id(self) -> str:
        """The run's identity: the first 12 hex digits of the canonical JSON's SHA-256."""
        return identity(self.canonical())

    @property
    def stepwise(self) -> bool:
        return self.method in DISTANCE_OF and self.lambda2 is not None

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
        """This run with other values, validated again; values that followed from others stay."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        return build_config({**values, **fields})


def identity(canonical: Mapping[str, Any]) -> str:
    """The id of the run with this canonical configuration, such as a record's ``config``."""
    values = _without_names(dict(canonical))
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _without_names(values: dict[str, Any]) -> dict[str, Any]:
    """A canonical configuration without what a folder happens to be called."""
    data = {name: value for name, value in values["data"].items() if name != "name"}
    start = values["start"]
    return {
        **values,
        "data": data,
        "start": _without_names(start) if "method" in start else start,
    }


def build_config(values: Mapping[str, Any]) -> RunConfig:
    """Validate, with one sentence for the first thing that is wrong."""
    try:
        return RunConfig.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][:1])
        if first["type"] == "extra_forbidden":
            known = ", ".join(sorted(RunConfig.model_fields))
            message = f"{where}: unknown field; the fields are {known}"
        elif first["type"] == "missing":
            expected = RunConfig.model_fields[where].description
            message = f"{where}: missing, and nothing it could follow from; expected: {expected}"
        elif where:
            message = f"{where}: {first['input']!r} is not valid: {first['msg']}"
        else:
            message = str(first["msg"]).removeprefix("Value error, ")
        raise ValueError(message) from None


# The paper profile is method.md's recipe: every default of RunConfig, and LGD's learning rates.
PROFILES: dict[str, dict[str, Any]] = {
    "paper": {"detector": "faster_rcnn", "backbone": "resnet50", "start": "imagenet"},
    "mini": {
        "detector": "faster_rcnn",
        "backbone": "resnet18",
        "width": 48,
        "min_sizes": (96,),
        "max_size": 168,
        "scale": 0.4,
        "proposals": 128,
        "roi_samples": 32,
        "batch_size": 4,
        "iterations": 108,
        "optimizer": "adamw",
        "lr": 2.5e-4,
        "warmup": 6,
        "eval_every": 12,
    },
    "smoke": {
        "detector": "faster_rcnn",
        "backbone": "resnet18",
        "width": 16,
        "min_sizes": (64,),
        "max_size": 112,
        "scale": 0.4,
        "proposals": 64,
        "roi_samples": 16,
        "batch_size": 2,
        "iterations": 12,
        "optimizer": "adamw",
        "lr": 5e-4,
        "warmup": 2,
        "eval_every": 4,
    },
}
BUILT_IN: dict[str, dict[str, int]] = {
    "mini": {"train": 1600, "val": 200, "size": 96},
    "smoke": {"train": 16, "val": 8, "size": 64},
}
"""The built-in set of each profile; `paper` has none: its data is COCO."""
_DETECTION: dict[str, Any] = {"batch_size": 8, "lr": 5e-4}
WARM_START: dict[str, dict[str, dict[str, Any]]] = {
    "mini": {
        "crops": {"iterations": 200, "batch_size": 32, "lr": 1e-3},
        # The detectors' rate does not decay: that is the runs' part.
        "faster_rcnn": _DETECTION | {"iterations": 450, "milestones": (450,)},
        "retinanet": _DETECTION | {"iterations": 700, "milestones": (700,), "trainable_stages": 0},
        "fcos": _DETECTION | {"iterations": 400, "milestones": (400,), "trainable_stages": 0},
    },
    "smoke": {
        "crops": {"iterations": 2, "batch_size": 4, "lr": 1e-3},
        "faster_rcnn": {"iterations": 2},
        "retinanet": {"iterations": 2, "trainable_stages": 0},
        "fcos": {"iterations": 2, "trainable_stages": 0},
    },
}
"""Stands in for ImageNet weights where a profile has none: a classifier of object crops, then a
plain Faster R-CNN on its backbone, then, for another detector, that one on the backbone of the two,
which stays as it is and so costs about a third of the time a step.
Seed 0 always: like ImageNet weights, it is one, for all methods and seeds."""
MODEL = (
    *("data", "detector", "backbone", "width", "min_sizes", "max_size", "scale"),
    *("proposals", "roi_samples", "flip"),
)
"""The fields that a run shares with those that it starts from."""
LGD_RATE = {"faster_rcnn": 0.02, "retinanet": 0.01, "fcos": 0.01}


def check_profile(profile: str) -> None:
    """Raises ValueError for a profile that is none."""
    if profile not in PROFILES:
        raise ValueError(f"profile: {profile!r} is unknown; expected {', '.join(PROFILES)}")


SOURCES = ("train_images", "train_annotations", "val_images", "val_annotations")


def open_data(profile: str, root: str | Path | Mapping[str, str] | None = None) -> DataSource:
    """The data set at ``root``, or the profile's built-in one.

    ``root`` is a folder in COCO's layout, or its four parts one by one: a mapping from `SOURCES`
    to paths, or the same as text, ``train_images=…, train_annotations=…, …``.

    Raises:
        ValueError: there is no COCO-format data set, or ``paper`` is given none.
    """
    check_profile(profile)
    if isinstance(root, str) and "=" in root:
        pairs = [part.split("=", 1) for part in root.split(",")]
        root = {pair[0].strip(): pair[-1].strip() for pair in pairs}
    if isinstance(root, Mapping):
        if sorted(root) != sorted(SOURCES):
            raise ValueError(f"data: {', '.join(root)} given; expected {', '.join(SOURCES)}")
        paths = {part: str(Path(path).expanduser().resolve()) for part, path in root.items()}
        for part, path in paths.items():
            if not (Path(path).is_dir() if part.endswith("images") else Path(path).is_file()):
                kind = "a folder" if part.endswith("images") else "a file"
                raise ValueError(f"data: {part} is {path!r}, which is not {kind}")
        name = Path(paths["train_images"]).parent.name
    else:
        if root is None or str(root) == "":
            if profile not in BUILT_IN:
                raise ValueError(
                    f"data: profile {profile!r} has no built-in data; give COCO's folder"
                )
            folder, name = synthetic(**BUILT_IN[profile], cache=None), "built-in shapes"
        else:
            folder = Path(root).expanduser().resolve()
            name = folder.name
        found = [str(path) for split in ("train", "val") for path in find_split(folder, split)]
        paths = dict(zip(SOURCES, found, strict=True))
    for split in ("train", "val"):  # what is wrong with them is said now
        images, annotations = (Path(paths[f"{split}_{part}"]) for part in ("images", "annotations"))
        CocoSplit(images, annotations, training=split == "train")
    prints = {s: fingerprint(Path(paths[f"{s}_annotations"])) for s in ("train", "val")}
    return DataSource(name=name, paths=paths, **prints)


def configure(
    profile: str = "mini",
    *,
    data: DataSource | str | Path | Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | str | None = None,
    **fields: Any,
) -> RunConfig:
    """A run of a profile, with any field overridden.

    Where the profile starts from no ImageNet weights, ``start`` is its warm start, itself a run
    with the same detector settings as this one, after a chain of others (`WARM_START`).

    Raises:
        ValueError: one sentence that names the field, its value and what was expected.
    """
    check_profile(profile)
    source = data if isinstance(data, DataSource) else open_data(profile, data)
    asked = {**parse_overrides(overrides), **fields}
    values = {**PROFILES[profile], **{k: v for k, v in asked.items() if v is not None}}
    values["data"] = source
    values.setdefault("method", "sssd")
    if profile == "paper":
        values.setdefault("lr", LGD_RATE.get(values["detector"], 0.02))
    if isinstance(values.get("start"), str) and values["start"] not in ("random", "imagenet"):
        file = Path(values["start"]).expanduser()
        if not file.is_file():
            raise ValueError(f"start: {values['start']!r} is neither random, imagenet nor a file")
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        values["start"] = WeightsFile(sha256=digest, path=str(file.resolve()))
    # Model and data are those of this run, the training its own: a comparison that changes the
    # recipe changes it after the warm start.
    model = {name: values[name] for name in MODEL if name in values}
    if "start" not in values:
        recipe = {k: PROFILES[profile][k] for k in ("batch_size", "optimizer", "warmup", "lr")}
        values["start"] = "random"
        budgets = WARM_START[profile]
        for stage in dict.fromkeys(("crops", "faster_rcnn", values["detector"])):
            if stage not in budgets:
                continue  # an unknown detector, of which the run's own check tells
            budget = budgets[stage]
            own = (
                {"method": "crops"}
                if stage == "crops"
                else {"method": "baseline", "detector": stage}
            )
            own |= {"start": values["start"], "trainable_stages": 5}
            own |= {"eval_every": budget["iterations"], **budget}
            values["start"] = build_config({**model, **recipe, **own})
    if values["method"] == "labelenc":
        if asked.get("iterations") is None:  # both stages have schedules of half the length
            values["iterations"] = PROFILES[profile].get("iterations", 180_000) // 2
        values["start"] = _stage1({**values, **model})
    return build_config(values)


def _stage1(stage2: Mapping[str, Any]) -> RunConfig:
    """LabelEnc's stage 1 for a stage 2 that would start from ``stage2["start"]``.

    Stage 2 takes its backbone from there too, and its FPN, head and label encoding function from
    stage 1. Stage 1 is longer by a third, by the iterations without distillation in front.
    """
    own = (
        *("start", "seed", "trainable_stages", "batch_size", "optimizer", "lr", "momentum"),
        *("weight_decay", "warmup", "warmup_factor", "gamma", "clip", "precision"),
    )
    kept = {name: stage2[name] for name in (*MODEL, *own) if name in stage2}
    n = stage2["iterations"]
    n = n * 4 // 3 if type(n) is int else n  # stage 2's own check says what is wrong with it
    return build_config({**kept, "method": "labelenc_stage1", "iterations": n, "eval_every": n})


def parse_overrides(overrides: Mapping[str, Any] | str | None) -> dict[str, Any]:
    """Overrides from a dict, or from text such as ``iterations=600, lr=1e-3``.

    Raises:
        ValueError: the text is not a list of ``name=value``.
    """
    if not overrides:
        return {}
    if isinstance(overrides, Mapping):
        return dict(overrides)
    try:
        call = ast.parse(f"f({overrides})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or not isinstance(call.func, ast.Name):
            raise ValueError
        names = [word.arg for word in call.keywords]
        if None in names or len(set(names)) < len(names):
            raise ValueError
        return {
            str(word.arg): word.value.id
            if isinstance(word.value, ast.Name) and word.value.id not in ("None", "True", "False")
            else ast.literal_eval(word.value)
            for word in call.keywords
        }
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        raise ValueError(
            f"overrides: {overrides!r} is not understood; expected name=value, name=value"
        ) from None
