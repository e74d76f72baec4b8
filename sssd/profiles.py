"""Profiles: named sizes of runs, with their warm starts and their data."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .config import DataSource, RunConfig, WeightsFile, build_config
from .data.coco import CocoSplit, find_split, fingerprint
from .data.synthetic import synthetic
from .methods import DISTANCE_OF

_SMALL: dict[str, Any] = {
    "detector": "faster_rcnn",
    "backbone": "slim18",
    "trained_norm": True,
    "stem_pool": False,
    "width": 32,
    "trainable_stages": 5,
    "min_sizes": (64,),
    "max_size": 112,
    "scale": 0.27,
    "proposals": 128,
    "roi_samples": 64,
    "batch_size": 8,
    "optimizer": "adamw",
    "lr": 1e-3,
    "teacher_lr": 0.25,
    "warmup": 50,
    "unfreeze_backbone": 0,
}
# `paper` is the recipe of LGD's release: RunConfig's defaults, and the learning rates below.
PROFILES: dict[str, dict[str, Any]] = {
    "paper": {"detector": "faster_rcnn", "backbone": "resnet50", "start": "imagenet"},
    "mini": _SMALL | {"iterations": 900, "eval_every": 150},
    "night": _SMALL | {"iterations": 1800, "eval_every": 300},
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
_SMALL = {
    "data": "small images of drawn shapes, made from a seed: no download",
    "start": "no ImageNet weights: a plain training on the same images stands in for them",
    "backbone": "a training of minutes on a processor",
    "width": "teacher and head cost the square of it",
    "min_sizes": "the built-in images, at one size",
    "max_size": "in the paper's proportion to the shorter side",
    "scale": "objects of small images: anchors and sizes of assignment shrink with them",
    "proposals": "a small image has few objects",
    "roi_samples": "a small image has few objects",
    "batch_size": "as many steps as possible in a given time",
    "iterations": "minutes a run; all times of the schedule keep the paper's proportions",
    "optimizer": "AdamW learns in few steps what SGD takes many for",
    "lr": "AdamW's rates are smaller than SGD's",
    "warmup": "in proportion to the run",
    "eval_every": "as many evaluations as the figures need",
}
CHANGES: dict[str, dict[str, str]] = {"paper": {}, "mini": _SMALL, "smoke": _SMALL}
"""For each profile the fields in which it differs from `paper`, each with its reason."""
LGD_RATE = {"faster_rcnn": 0.02, "retinanet": 0.01, "fcos": 0.01}
"""Learning rates of LGD's release, for `paper`."""
BUILT_IN: dict[str, dict[str, int]] = {
    "mini": {"train": 1600, "val": 300, "size": 64},
    "night": {"train": 1600, "val": 1000, "size": 64},
    "smoke": {"train": 16, "val": 8, "size": 64},
}
"""The built-in set of each profile; `paper` has none: its data is COCO."""
_SMALL_START: dict[str, dict[str, Any]] = {
    "crops": {"iterations": 200, "batch_size": 64},
    "detector": {"iterations": 1200, "milestones": (1200,)},  # the rate's decay is the runs' part
    "teacher": {"iterations": 600, "milestones": (600,), "teacher_lr": 0.5},
}
WARM_START: dict[str, dict[str, dict[str, Any]]] = {
    "mini": _SMALL_START,
    "night": _SMALL_START,
    "smoke": {
        "crops": {"iterations": 2, "batch_size": 4, "lr": 1e-3},
        "detector": {"iterations": 2},
        "teacher": {"iterations": 2},
    },
}
"""What stands in for ImageNet weights in a profile that has none, in this order: a classifier of
object crops; a plain detector, begun from the classifier's backbone; and for the methods with LGD's
teacher, teacher and adapter, which learn beside that detector while it rests. So a run begins where
one of the paper's is at `distill_start`, with a teacher that knows its labels.
Its seed is always 0: all methods and seeds share it, as they would share ImageNet's."""
MODEL = (
    *("data", "detector", "backbone", "width", "min_sizes", "max_size", "scale"),
    *(
        "proposals",
        "roi_samples",
        "flip",
        "trained_norm",
        "stem_pool",
        "context",
        "detach_appearance",
    ),
)
"""The fields that a run shares with those that it starts from."""


def check_profile(profile: str) -> None:
    """Raise ValueError if there is no such profile."""
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
    prints = {s: fingerprint(Path(paths[f"{s}_annotations"])) for s in ("train", "val")}
    images, annotations = Path(paths["train_images"]), Path(paths["train_annotations"])
    classes = CocoSplit(images, annotations, training=True).classes
    source = DataSource(name=name, paths=paths, classes=classes, **prints)
    open_split(source, "val")  # what is wrong with it, or does not fit, is said now
    return source


def open_split(source: DataSource, split: str) -> CocoSplit:
    """The ``train`` or ``val`` half of a data set, both with the training set's classes.

    Raises:
        ValueError: the annotation file is not COCO's format, or uses a category that the training
            set does not have.
    """
    images, annotations = (Path(source.paths[f"{split}_{x}"]) for x in ("images", "annotations"))
    return CocoSplit(images, annotations, split == "train", source.classes)


def configure(
    profile: str = "mini",
    *,
    data: DataSource | str | Path | Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | str | None = None,
    **fields: Any,
) -> RunConfig:
    """A run of a profile, with any field overridden.

    Where the profile has no ImageNet weights to start from, ``start`` is the last run of its warm
    start (`WARM_START`), with the same data and detector settings as this run.

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
    model = {name: values[name] for name in MODEL if name in values}
    if "start" not in values:
        taught = values["method"] in DISTANCE_OF
        values["start"] = _warm_start(profile, taught, model)
    if values["method"] == "labelenc":
        if asked.get("iterations") is None:  # both stages have schedules of half the length
            values["iterations"] = PROFILES[profile].get("iterations", 180_000) // 2
        values["start"] = _stage1({**values, **model})
    return build_config(values)


def _warm_start(profile: str, taught: bool, model: Mapping[str, Any]) -> RunConfig | str:
    """The last run of the profile's `WARM_START`, with the model's settings.

    Its training is the profile's own: overrides of a run's recipe do not change its warm start.

    Args:
        taught: whether the run has LGD's teacher, which then has its own warm start.
    """
    start: RunConfig | str = "random"
    names = ("batch_size", "optimizer", "warmup", "lr")
    recipe = {name: PROFILES[profile][name] for name in names}
    kinds: dict[str, dict[str, Any]] = {
        "crops": {"method": "crops"},
        "detector": {"method": "baseline"},
        "teacher": {"method": "lgd", "lambda1": 0.0, "student_rests": True},
    }
    for stage, kind in kinds.items():
        if stage != "teacher" or taught:
            budget = WARM_START[profile][stage]
            n = budget["iterations"]
            own = {"start": start, "trainable_stages": 5, "eval_every": n, "distill_start": 0}
            own |= {"unfreeze_backbone": 0}
            start = build_config({**model, **recipe, **kind, **own, **budget})
    return start


def _stage1(stage2: Mapping[str, Any]) -> RunConfig:
    """LabelEnc's stage 1, which starts from ``stage2["start"]``.

    Stage 2 then takes its backbone from that start, too, and its FPN, head and label encoding
    function from stage 1. Stage 1 is a third longer: it begins without distillation.
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
