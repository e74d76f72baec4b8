"""Profiles: named settings of runs, with their warm starts and their data."""

from __future__ import annotations

import ast
import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from . import parameters
from .config import BUILT_FROM, DataSource, RunConfig, WeightsFile, build_config
from .data.coco import CocoSplit, find_split, fingerprint
from .data.synthetic import synthetic
from .methods import DISTANCE_OF

_WARM = (
    "in place of ImageNet weights: a plain training on the same images, shared by all methods and "
    "seeds; LGD's teacher learns beside that detector before the run begins, since a run is too "
    "short for a teacher to learn its labels and then to teach"
)
_CELLS = (
    "the teacher paints boxes into cells: without the stem's pooling an object here is as many cells "
    "wide as one of COCO's in the paper"
)
_BLIND = (
    "with AdamW at the student's rate the teacher's attention does not learn to look up an object's "
    "own label: the teacher stays blind to the class"
)
# The fields in which `mini` differs from the paper, each with its reason.
_SMALL: dict[str, tuple[Any, str]] = {
    "backbone": (
        "slim18",
        "ResNet-18 and 34 with a quarter of their channels: a run takes minutes",
    ),
    "trained_norm": (True, "without ImageNet weights there are no statistics to freeze"),
    "stem_pool": (False, _CELLS),
    "trainable_stages": (5, "without ImageNet weights all stages learn"),
    "unfreeze_backbone": (0, "the backbone is trained before the run, and not frozen in it"),
    "width": (32, "the cost of teacher and head grows with its square"),
    "min_sizes": ((64,), "small images, at one size"),
    "max_size": (112, "in the paper's proportion to the shorter side"),
    "scale": (
        0.27,
        "objects are small: anchors, and the sizes that assign boxes to levels, shrink with them",
    ),
    "proposals": (128, "a small image has few objects"),
    "roi_samples": (64, "a small image has few objects"),
    "batch_size": (8, "as many steps as possible in a given time"),
    "aspect_grouping": (False, "small images are padded little"),
    "iterations": (
        900,
        "a run takes minutes; all times of its schedule keep the paper's proportions",
    ),
    "optimizer": ("adamw", "AdamW needs far fewer steps than SGD"),
    "lr": (1e-3, "AdamW's rates are smaller than SGD's"),
    "teacher_lr": (0.25, _BLIND),
    "warmup": (50, "in proportion to the run"),
    "eval_every": (150, "as many evaluations as the figures need"),
}
_MINI = {"detector": "faster_rcnn"} | {name: value for name, (value, _) in _SMALL.items()}
# `paper` is the recipe of LGD's release: RunConfig's defaults, and the learning rates below.
PROFILES: dict[str, dict[str, Any]] = {
    "paper": {"detector": "faster_rcnn", "backbone": "resnet50", "start": "imagenet"},
    "mini": _MINI,
    "night": _MINI,  # the notebooks give it more seeds
    "photographs": _MINI
    | {"min_sizes": (80,), "max_size": 140, "iterations": 450, "eval_every": 75},
    "smoke": {
        "detector": "faster_rcnn",
        "backbone": "slim18",
        "width": 16,
        "min_sizes": (64,),
        "max_size": 112,
        "scale": 0.4,
        "proposals": 64,
        "roi_samples": 16,
        "batch_size": 2,
        "aspect_grouping": False,
        "iterations": 12,
        "optimizer": "adamw",
        "lr": 5e-4,
        "warmup": 2,
        "eval_every": 4,
    },
}
CHANGES: dict[str, dict[str, str]] = {
    profile: {
        "data": "small images of drawn shapes, made from a seed: no download",
        "start": _WARM,
        **{name: reason for name, (_, reason) in _SMALL.items() if name in fields},
    }
    for profile, fields in PROFILES.items()
} | {"paper": {}}
"""For each profile the fields in which it differs from `paper`, each with its reason."""
CHANGES["photographs"]["data"] = "photographs of one's own, of which there may be hundreds"
LGD_RATE = {"faster_rcnn": 0.02, "retinanet": 0.01, "fcos": 0.01}
"""Learning rates of LGD's release, for `paper`."""
BUILT_IN: dict[str, dict[str, int]] = {
    "mini": {"train": 1600, "val": 500, "size": 64},
    "night": {"train": 1600, "val": 500, "size": 64},
    "smoke": {"train": 16, "val": 8, "size": 64},
}
"""The built-in images of each profile; `paper` and `photographs` have none, and need data."""
TEST_IMAGES = {"night": 2000, "smoke": 8}
"""The number of built-in test images on which a profile's finished detectors are compared. They are
drawn from another seed, and nothing is tuned on them."""
_SMALL_START: dict[str, dict[str, Any]] = {
    "crops": {"iterations": 200, "batch_size": 64},
    "detector": {"iterations": 2400, "milestones": (2400,)},  # the rate decays only in the runs
    "teacher": {"iterations": 600, "milestones": (600,), "teacher_lr": 0.5},
}
WARM_START: dict[str, dict[str, dict[str, Any]]] = {
    "mini": _SMALL_START,
    "night": _SMALL_START,
    "photographs": {  # for hundreds of images, not thousands
        **_SMALL_START,
        "detector": {"iterations": 900, "milestones": (900,)},
        "teacher": {**_SMALL_START["teacher"], "iterations": 300, "milestones": (300,)},
    },
    "smoke": {
        "crops": {"iterations": 2, "batch_size": 4, "lr": 1e-3},
        "detector": {"iterations": 2},
        "teacher": {"iterations": 2},
    },
}
"""What replaces ImageNet weights in a profile without them, in this order: a classifier of object
crops; a plain detector, which starts from the classifier's backbone; and for methods with LGD's
teacher, teacher and adapter, trained while that detector is frozen. So a run begins where the
paper's runs are at `distill_start`, with a teacher that has learnt to use the labels. The seed is
always 0: all methods and seeds share the warm start, as they would share ImageNet weights."""
MODEL = ("data", "detector", "backbone", *BUILT_FROM, "flip", "context", "detach_appearance")
"""The fields that a run shares with the runs that it starts from."""


def check_profile(profile: str) -> None:
    """Raise ValueError if there is no such profile."""
    if not isinstance(profile, str) or profile not in PROFILES:
        raise ValueError(f"profile: {profile!r} is unknown; expected {', '.join(PROFILES)}")


SOURCES = ("train_images", "train_annotations", "val_images", "val_annotations")
_PART = re.compile(rf"(?:^|,)\s*({'|'.join(SOURCES)})\s*=")
Data = str | Path | Mapping[str, str | Path]


def find_data(data: Any) -> Path | dict[str, Path] | None:
    """The absolute path of a data set's folder, or of its four parts by `SOURCES`; None: not given.

    ``data`` is a folder in COCO's layout, or its four parts one by one: a mapping from `SOURCES` to
    paths, or the same as text, ``train_images=…, train_annotations=…, …`` or JSON. Text that names
    an existing folder is that folder.

    Raises:
        ValueError: it is none of these.
    """
    data = parameters.plain(data)
    if data is None or data == "":
        return None
    if isinstance(data, str):
        words = _PART.split(data)
        parts: Any = parameters.mapping(data)
        if len(words) > 1 and not words[0].strip():
            parts = dict(zip(words[1::2], words[2::2], strict=True))
        if parts is None or os.path.isdir(data):
            return parameters.absolute("data", data)
        data = parts
    if not isinstance(data, Mapping):
        raise ValueError(f"data: {data!r}; expected a folder, or {', '.join(SOURCES)}")
    if set(data) != set(SOURCES) or not all(isinstance(path, str) for path in data.values()):
        given = ", ".join(map(str, data))
        raise ValueError(f"data: {given} given; expected {', '.join(SOURCES)}")
    return {part: parameters.absolute("data", data[part].strip()) for part in SOURCES}


def find_parts(
    place: Path | dict[str, Path] | None,
    splits: tuple[Literal["train", "val"], ...] = ("train", "val"),
) -> dict[str, Path]:
    """The parts, by `SOURCES`, of what `find_data` found; a ValueError names what is missing."""
    if place is None:
        raise ValueError("data: none given; expected a folder in COCO's layout")
    names = [part for part in SOURCES if part.startswith(splits)]
    if isinstance(place, Path):
        found = [path for split in splits for path in find_split(place, split)]
        return dict(zip(names, found, strict=True))
    for part in names:
        path = place[part]
        if not (path.is_dir() if part.endswith("images") else path.is_file()):
            kind = "a folder" if part.endswith("images") else "a file"
            raise ValueError(f"data: {part} is {str(path)!r}, which is not {kind}")
    return place


def data_name(place: Path | dict[str, Path]) -> str:
    """The name of a data set in figures, tables and folders."""
    return place["train_images"].parent.name if isinstance(place, dict) else place.name


def open_data(profile: str, root: Data | None = None) -> DataSource:
    """The data set at ``root``, in any form that `find_data` takes, or the profile's built-in one.

    Raises:
        ValueError: there is no COCO-format data set, ``paper`` is given none, or the built-in one
            cannot be written into its cache.
    """
    check_profile(profile)
    place = find_data(root)
    name = "built-in shapes" if place is None else data_name(place)
    if place is None:
        if profile not in BUILT_IN:
            raise ValueError(f"data: profile {profile!r} has no built-in data; give COCO's folder")
        place = _built_in(**BUILT_IN[profile])
    parts = find_parts(place)
    train = CocoSplit(parts["train_images"], parts["train_annotations"], training=True)
    source = DataSource(
        name=name,
        train=fingerprint(parts["train_annotations"]),
        val=fingerprint(parts["val_annotations"]),
        paths={part: str(path) for part, path in parts.items()},
        classes=train.classes,
    )
    val = open_split(source, "val")  # now, so that its errors are reported at once
    narrowest = max(train.narrowest, val.narrowest, key=lambda x: max(x[1:]) / min(x[1:]))
    return source.model_copy(update={"narrowest": narrowest})


def folder_of_test_images(profile: str) -> Path:
    """The folder of a data set whose validation part is the profile's `TEST_IMAGES`."""
    size = BUILT_IN[profile]["size"]
    return _built_in(train=1, val=TEST_IMAGES[profile], size=size, seed=1)


def _built_in(**wanted: int) -> Path:
    try:
        return synthetic(**wanted)
    except OSError as error:
        why = f"{error.strerror}: {error.filename!r}"
        raise ValueError(
            f"data: the built-in images cannot be kept ({why}); "
            "set SSSD_CACHE to a folder that can be written"
        ) from None


def open_split(source: DataSource, split: str) -> CocoSplit:
    """The ``train`` or ``val`` part, with training's classes; raises what `CocoSplit` does."""
    images, annotations = (Path(source.paths[f"{split}_{x}"]) for x in ("images", "annotations"))
    return CocoSplit(images, annotations, split == "train", source.classes)


def configure(
    profile: str = "mini",
    *,
    data: DataSource | Data | None = None,
    overrides: Mapping[str, Any] | str | None = None,
    **fields: Any,
) -> RunConfig:
    """A run of a profile, with any field overridden; ``fields`` override ``overrides``.

    Where the profile has no ImageNet weights to start from, ``start`` is the last run of its warm
    start (`WARM_START`), with the same data and detector settings as this run.

    Raises:
        ValueError: one sentence that names the field, its value and what was expected.
    """
    check_profile(profile)
    asked = parse_overrides(overrides)
    if "data" in asked:
        raise ValueError("data: given among the overrides; expected as the parameter of that name")
    given = [*asked.items(), *fields.items()]
    asked = parameters.plain({name: value for name, value in given if value is not None})
    source = data if isinstance(data, DataSource) else open_data(profile, data)
    values = {"method": "sssd", **PROFILES[profile], **asked, "data": source}
    if profile == "paper":
        values.setdefault("lr", LGD_RATE.get(str(values["detector"]), 0.02))
    if isinstance(values.get("start"), str) and values["start"] not in ("random", "imagenet"):
        file = Path(values["start"]).expanduser()
        if not file.is_file():
            raise ValueError(f"start: {values['start']!r} is neither random, imagenet nor a file")
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        values["start"] = WeightsFile(sha256=digest, path=str(file.resolve()))
    model = {name: values[name] for name in MODEL if name in values}
    if "start" not in values:
        values["start"] = _warm_start(profile, str(values["method"]) in DISTANCE_OF, model)
    if values["method"] == "labelenc":
        if "iterations" not in asked:  # LabelEnc's schedules have half the length
            n = PROFILES[profile].get("iterations", RunConfig.model_fields["iterations"].default)
            values["iterations"] = n // 2
        values["start"] = _stage1(values)
    return build_config(values)


def _warm_start(profile: str, taught: bool, model: Mapping[str, Any]) -> RunConfig | str:
    """The last run of the profile's `WARM_START`, with the model's settings.

    Its recipe is the profile's own: overrides of a run's recipe do not change its warm start.

    Args:
        taught: whether the run has LGD's teacher, which then has its own warm start.
    """
    start: RunConfig | str = "random"
    names = ("batch_size", "aspect_grouping", "optimizer", "warmup", "lr")
    recipe = {name: PROFILES[profile][name] for name in names}
    recipe |= {"trainable_stages": 5, "distill_start": 0, "unfreeze_backbone": 0}
    stages: dict[str, dict[str, Any]] = {
        "crops": {"method": "crops"},
        "detector": {"method": "baseline"},
        "teacher": {"method": "lgd", "lambda1": 0.0, "student_rests": True},
    }
    for name, stage in stages.items():
        if name != "teacher" or taught:
            stage |= {"start": start, **WARM_START[profile][name]}
            start = build_config({**model, **recipe, **stage, "eval_every": stage["iterations"]})
    return start


def _stage1(stage2: Mapping[str, Any]) -> RunConfig:
    """LabelEnc's stage 1, which starts from ``stage2["start"]``.

    Stage 2 takes its backbone from that start, too, and its FPN, head and label encoding function
    from stage 1. Stage 1 is a third longer, because it begins without distillation.
    """
    not_shared = {"milestones", "t1", "distill_start", "distill_stop", "unfreeze_backbone"}
    not_shared |= {"lambda1", "lambda2", "normaliser", "student_rests"}
    kept = {name: value for name, value in stage2.items() if name not in not_shared}
    n = stage2["iterations"]
    n = n * 4 // 3 if type(n) is int else n  # stage 2's own check refuses other types
    return build_config({**kept, "method": "labelenc_stage1", "iterations": n, "eval_every": n})


def parse_overrides(overrides: Mapping[str, Any] | str | None) -> dict[str, Any]:
    """Overrides from a dict, or from text such as ``iterations=600, lr=1e-3``, or a dict's text.

    Raises:
        ValueError: the text is not a list of ``name=value``.
    """
    if isinstance(overrides, str):
        overrides = parameters.mapping(overrides) or overrides
    if isinstance(overrides, Mapping) or not overrides:
        return {str(name): value for name, value in (overrides or {}).items()}
    try:
        call: Any = ast.parse(f"f({overrides})", mode="eval").body
        given = {word.arg: word.value for word in call.keywords}
        whole = len(given) == len(call.keywords) and None not in given  # **a has no name
        if call.args or not isinstance(call.func, ast.Name) or not whole:
            raise ValueError
        return {
            name: value.id if isinstance(value, ast.Name) else ast.literal_eval(value)
            for name, value in given.items()
        }
    except (SyntaxError, ValueError, TypeError, AttributeError, MemoryError, RecursionError):
        raise ValueError(
            f"overrides: {overrides!r} is not understood; expected name=value, name=value"
        ) from None
