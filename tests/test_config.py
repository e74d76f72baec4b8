"""A run's configuration: what it accepts, what follows from what, and what makes its identity."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import chain, tiny, write_coco
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from sssd import config, parameters
from sssd.config import DETECTORS, DataSource, RunConfig, identity
from sssd.detectors import build_detector
from sssd.profiles import PROFILES, configure, find_data, open_data, parse_overrides


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco(tmp_path_factory.mktemp("config") / "colours")


@pytest.fixture(scope="module")
def data(root: Path) -> DataSource:
    return open_data("smoke", root)


# Of every field a value unlike the one that `everything` below gives it.
OTHER: dict[str, Any] = {
    "method": "lgd",
    "seed": 1,
    "start": "imagenet",
    "detector": "retinanet",
    "backbone": "resnet34",
    "width": 96,
    "trained_norm": True,
    "stem_pool": False,
    "trainable_stages": 2,
    "min_sizes": (48, 64),
    "max_size": 128,
    "scale": 0.5,
    "proposals": 50,
    "roi_samples": 8,
    "flip": 0.0,
    "batch_size": 4,
    "aspect_grouping": True,
    "channels_last": True,
    "iterations": 9,
    "optimizer": "adamw",
    "lr": 1e-4,
    "momentum": 0.8,
    "weight_decay": 0.0,
    "warmup": 1,
    "warmup_factor": 0.5,
    "milestones": (4, 7),
    "gamma": 0.5,
    "teacher_lr": 0.5,
    "teacher_gamma": 0.2,
    "student_rests": True,
    "clip": 2.0,
    "precision": "bf16",
    "lambda1": 10.0,
    "lambda2": 20.0,
    "t1": 4,
    "distill_start": 2,
    "distill_stop": 7,
    "unfreeze_backbone": 2,
    "context": True,
    "detach_appearance": False,
    "normaliser": 128,
    "eval_every": 2,
}


@pytest.fixture(scope="module")
def everything(data: DataSource) -> RunConfig:
    """A run that reads every field: stepwise SSSD on Faster R-CNN by SGD."""
    return tiny(data, lambda2=75.0, optimizer="sgd", backbone="resnet18")


def test_other_values_are_given_for_every_field(everything: RunConfig) -> None:
    assert OTHER.keys() | {"data"} == RunConfig.model_fields.keys()
    assert [name for name, value in OTHER.items() if getattr(everything, name) == value] == []


def test_every_field_is_described() -> None:
    bare = [name for name, field in RunConfig.model_fields.items() if not field.description]
    assert [name for name in bare if name != "data"] == []


# --- identity ---------------------------------------------------------------------------------


@pytest.mark.parametrize("field", OTHER)
def test_id_differs_with_each_field_that_matters(everything: RunConfig, field: str) -> None:
    assert everything.change(**{field: OTHER[field]}).id != everything.id


def test_id_differs_with_the_version_of_the_method(
    data: DataSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = configure("smoke", data=data)
    assert run.canonical()["method_version"] == config.METHOD_VERSION
    before = run.id
    monkeypatch.setattr(config, "METHOD_VERSION", config.METHOD_VERSION + 1)
    assert run.change().id != before
    assert identity(run.change().canonical()) == run.change().id


def test_equal_values_have_one_id_however_they_are_given(data: DataSource, root: Path) -> None:
    one = configure("smoke", data=data, lambda2=75.0, milestones=(8, 10), lr=1e-3)
    other = configure("smoke", data=str(root), overrides="lr=0.001, milestones=[8, 10], lambda2=75")
    assert one.id == other.id
    assert one.canonical() == other.canonical()
    assert len(one.id) == 12 and set(one.id) <= set("0123456789abcdef")
    assert one.id == one.change().id


def test_id_does_not_depend_on_where_the_data_lie(
    data: DataSource, root: Path, tmp_path: Path
) -> None:
    here = tiny(data).id
    assert tiny(shutil.copytree(root, tmp_path / root.name)).id == here
    moved = shutil.copytree(root, tmp_path / "under another name")
    assert tiny(moved).id == here
    # COCO's own names of the two halves are only another place.
    for old, new in (("train", "train2017"), ("val", "val2017")):
        (moved / old).rename(moved / new)
        annotations = moved / "annotations"
        (annotations / f"instances_{old}.json").rename(annotations / f"instances_{new}.json")
    assert tiny(moved).id == here


@pytest.mark.parametrize("split", ["train", "val"])
def test_id_depends_on_the_annotations(
    data: DataSource, root: Path, tmp_path: Path, split: str
) -> None:
    shutil.copytree(root, tmp_path / root.name)
    file = tmp_path / root.name / "annotations" / f"instances_{split}.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["bbox"][0] += 1
    file.write_text(json.dumps(content))
    assert tiny(tmp_path / root.name).id != tiny(data).id


def test_id_depends_on_the_weights_not_on_their_path(data: DataSource, tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "a.pth")
    shutil.copy(tmp_path / "a.pth", tmp_path / "b.pth")
    torch.save({"fc.weight": torch.ones(1)}, tmp_path / "c.pth")
    a, b, c = (tiny(data, start=str(tmp_path / f"{name}.pth")) for name in "abc")
    assert a.id == b.id != c.id


@pytest.mark.parametrize(
    ("given", "fields"),
    [
        (
            {"method": "baseline"},
            "lambda1 lambda2 t1 distill_start distill_stop unfreeze_backbone context "
            "detach_appearance normaliser",
        ),
        ({"method": "sssd"}, "t1"),  # λ is fixed
        ({"optimizer": "adamw"}, "momentum"),
        ({"detector": "retinanet"}, "proposals roi_samples"),
        (
            {"method": "crops"},
            "detector width min_sizes max_size scale proposals roi_samples eval_every lambda1 "
            "lambda2 context flip",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_field_that_a_run_does_not_read_leaves_its_id_alone(
    data: DataSource, given: dict[str, Any], fields: str
) -> None:
    run = tiny(data, **{"optimizer": "sgd", **given})
    for field in fields.split():
        assert run.change(**{field: OTHER[field]}).id == run.id, field


@pytest.mark.parametrize("method", ["baseline", "labelenc"])
@pytest.mark.parametrize("field", ["lambda2", "t1"])
def test_a_run_with_the_same_id_has_the_same_lambda(
    data: DataSource, method: str, field: str
) -> None:
    run = configure("smoke", data=data, method=method)
    other = run.change(**{"lambda2": 9.0, field: OTHER[field]})
    assert other.id == run.id and not other.stepwise
    iterations = range(1, run.iterations + 1)
    assert [other.lambda_at(t) for t in iterations] == [run.lambda_at(t) for t in iterations]


def test_the_place_of_nothing_is_in_the_canonical_form(
    data: DataSource, root: Path, tmp_path: Path
) -> None:
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "weights.pth")
    for run in (
        configure("smoke", data=data),  # with a start that is a run, with data of its own
        tiny(data, start=str(tmp_path / "weights.pth")),
    ):
        text = json.dumps(run.canonical())
        assert str(root.parent) not in text and str(tmp_path) not in text
        assert "path" not in text


def test_a_run_pickles_whole(data: DataSource) -> None:
    run = configure("smoke", data=data, lambda2=75.0)
    copy = pickle.loads(pickle.dumps(run))
    assert copy == run and copy.id == run.id
    assert copy.data.paths == data.paths and Path(copy.data.paths["train_annotations"]).is_file()
    assert copy.start == run.start


def test_a_run_is_immutable(data: DataSource) -> None:
    run = tiny(data, milestones=[5, 7])
    with pytest.raises(ValidationError, match="frozen"):
        run.lr = 1.0  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        run.data.name = "other"  # type: ignore[misc]
    assert run.milestones == (5, 7)  # a list would let itself be changed


def test_change_leaves_the_original_and_validates(everything: RunConfig) -> None:
    other = everything.change(lambda1=60.0)
    assert (everything.lambda1, other.lambda1) == (50.0, 60.0)
    assert other.change(lambda1=50.0) == everything
    with pytest.raises(ValueError, match="^lambda1: -1"):
        everything.change(lambda1=-1)


# --- what follows from what -------------------------------------------------------------------


def test_paper_profile_is_the_recipe(data: DataSource) -> None:
    """Every value as LGD's release and the SSSD paper have it."""
    run = configure("paper", data=data)
    assert run.method == "sssd" and run.lambda1 == 50 and run.lambda2 is None
    assert (run.detector, run.backbone, run.width) == ("faster_rcnn", "resnet50", 256)
    assert run.start == "imagenet" and run.trainable_stages == 3  # of five: stem and first frozen
    assert run.batch_size == 16
    assert run.iterations == 180_000
    assert run.milestones == (120_000, 160_000) and run.gamma == 0.1
    assert run.t1 == 120_000
    assert run.distill_start == 30_000 and run.distill_stop is None
    assert run.unfreeze_backbone == 20_000
    assert (run.optimizer, run.lr) == ("sgd", 0.02)
    assert (run.momentum, run.weight_decay) == (0.9, 1e-4)
    assert (run.warmup, run.warmup_factor) == (1000, 1e-3)
    assert run.clip == 1.0
    assert set(run.min_sizes) == {640, 672, 704, 736, 768, 800}
    assert run.min_sizes[-1] == 800 and run.max_size == 1333  # the test's
    assert run.flip == 0.5
    assert run.normaliser == 256
    assert run.scale == 1.0 and run.precision == "no"


@pytest.mark.parametrize(
    ("detector", "backbone", "lr", "context", "detach"),
    [
        ("faster_rcnn", "resnet50", 0.02, False, True),
        ("faster_rcnn", "resnet101", 0.02, False, True),
        ("retinanet", "resnet50", 0.01, True, False),
        ("retinanet", "resnet101", 0.01, True, False),
        ("fcos", "resnet50", 0.01, False, False),
        ("fcos", "resnet101", 0.01, True, False),
    ],
)
def test_paper_profile_per_detector(
    data: DataSource, detector: str, backbone: str, lr: float, context: bool, detach: bool
) -> None:
    run = configure("paper", data=data, detector=detector, backbone=backbone)
    assert (run.lr, run.context, run.detach_appearance) == (lr, context, detach)
    assert configure("paper", data=data, detector=detector, lr=0.5, context=True).lr == 0.5


@pytest.mark.parametrize(("method", "published"), [("lgd", 1.0), ("sssd", 50.0)])
def test_lambda_defaults_to_the_published_value(
    data: DataSource, method: str, published: float
) -> None:
    for profile in PROFILES:
        assert configure(profile, data=data, method=method).lambda1 == published


@given(n=st.integers(1, 2_000_000))
@settings(max_examples=60, deadline=None)
def test_the_schedule_keeps_the_papers_proportions(data: DataSource, n: int) -> None:
    run = configure("paper", data=data, iterations=n)  # of which nothing else is set
    if n >= 9:
        assert run.milestones == (n * 2 // 3, n * 8 // 9)
    assert list(run.milestones) == sorted(set(run.milestones)) and run.milestones[0] >= 1
    assert run.t1 == run.milestones[0]
    assert (run.distill_start, run.unfreeze_backbone) == (n // 6, n // 9)
    assert run.eval_every == max(n // 18, 1)


def test_labelenc_trains_on_its_own_schedule(data: DataSource) -> None:
    run = configure("paper", data=data, method="labelenc")
    first = run.start
    assert isinstance(first, RunConfig) and first.start == "imagenet"
    assert (run.iterations, run.milestones, run.distill_stop) == (90_000, (60_000, 80_000), 80_000)
    assert (first.iterations, first.milestones) == (120_000, (90_000, 110_000))
    assert (first.method, first.distill_start) == ("labelenc_stage1", 30_000)
    assert run.lambda1 == first.lambda1 == 1 and run.trainable_stages == first.trainable_stages == 3
    longer = configure("paper", data=data, method="labelenc", iterations=900, seed=4, lr=0.5)
    assert isinstance(longer.start, RunConfig) and longer.start.iterations == 1200
    assert (longer.start.seed, longer.start.lr) == (4, 0.5)
    assert configure("mini", data=data, method="labelenc").iterations == (
        PROFILES["mini"]["iterations"] // 2
    )


def test_what_is_given_stands_and_the_switch_follows_the_milestone(data: DataSource) -> None:
    run = tiny(data, iterations=90, milestones=(30, 60), unfreeze_backbone=0)
    assert (run.milestones, run.t1, run.unfreeze_backbone) == ((30, 60), 30, 0)
    assert tiny(data, iterations=90, milestones=(30, 60), t1=45).t1 == 45
    assert tiny(data).trainable_stages == 5  # nothing can be kept frozen that never was trained
    assert tiny(data, trainable_stages=1).trainable_stages == 1


@pytest.mark.parametrize("profile", ["mini", "smoke"])
def test_one_warm_start_serves_a_whole_comparison(data: DataSource, profile: str) -> None:
    runs = [
        configure(profile, data=data, method=method, seed=seed, lambda1=3.0, **more)
        for method in ("baseline", "lgd", "kl", "sssd")
        for seed in (0, 5)
        for more in (
            {},
            {"lambda2": 4.0},
            {"iterations": 99},
            {"lr": 1e-5},
            {"trainable_stages": 1},
        )
    ]
    assert len({run.id for run in runs}) > 10
    chains = {tuple(run.id for run in chain(run)[:-1]) for run in runs if run.method != "baseline"}
    (taught,) = chains
    (plain,) = {
        tuple(run.id for run in chain(run)[:-1]) for run in runs if run.method == "baseline"
    }
    assert taught[:-1] == plain
    crops, detector, teacher = chain(next(run for run in runs if run.method == "lgd"))[:-1]
    assert crops.method == "crops" and crops.start == "random"
    assert detector.method == "baseline"
    assert (detector.seed, detector.trainable_stages) == (0, 5)
    assert (teacher.method, teacher.lambda1, teacher.student_rests) == ("lgd", 0.0, True)


def test_a_warm_start_is_of_the_same_detector(data: DataSource) -> None:
    width = 64
    runs = [configure("smoke", data=data, detector=name, width=width) for name in DETECTORS]
    for crops, *starts, run in map(chain, runs):
        assert crops.id == chain(runs[0])[0].id and len(starts) == 2
        for start in starts:
            assert (start.detector, start.width, start.min_sizes) == (run.detector, width, (64,))
            assert (start.context, start.detach_appearance) == (run.context, run.detach_appearance)


@pytest.mark.parametrize("detector", ["faster_rcnn", "retinanet", "fcos"])
def test_every_profile_has_every_detector(data: DataSource, detector: str) -> None:
    runs = [configure(profile, data=data, detector=detector) for profile in PROFILES]
    for width in {run.width for run in runs}:
        build_detector(detector, "resnet18", 2, width=width)  # raises where a width is wrong


def test_labels_tell_runs_apart(data: DataSource) -> None:
    stepwise = tiny(data, lambda2=75, seed=3)
    assert stepwise.label() == "sssd λ=50→75 faster_rcnn slim18 seed 3"
    assert stepwise.stepwise and not tiny(data).stepwise
    assert not tiny(data, method="baseline", lambda2=75).stepwise
    assert "λ" not in tiny(data, method="baseline").label()


# --- what is refused --------------------------------------------------------------------------


def refused(**given: Any) -> str:
    """The sentence that refuses these arguments of `configure`."""
    with pytest.raises(ValueError) as error:
        configure(given.pop("profile", "smoke"), **given)
    message = str(error.value)
    assert "\n" not in message and len(message) < 800, message
    return message


@pytest.mark.parametrize(
    ("fields", "field", "value", "expected"),
    [
        ({"iterations": "many"}, "iterations", "many", "integer"),
        ({"iterations": 2.5}, "iterations", "2.5", "integer"),
        ({"iterations": "16"}, "iterations", "'16'", "integer"),
        ({"iterations": 16.0}, "iterations", "16.0", "integer"),
        ({"iterations": 0}, "iterations", "0", "greater than or equal to 1"),
        ({"iterations": -8}, "iterations", "-8", "greater than or equal to 1"),
        ({"seed": 1.5}, "seed", "1.5", "integer"),
        ({"seed": -1}, "seed", "-1", "greater than or equal to 0"),
        ({"lr": "fast"}, "lr", "fast", "number"),
        ({"lr": 0}, "lr", "0", "greater than 0"),
        ({"lr": float("nan")}, "lr", "nan", "finite number"),
        ({"lr": float("inf")}, "lr", "inf", "finite"),
        ({"lambda1": -1}, "lambda1", "-1", "greater than or equal to 0"),
        ({"lambda1": float("inf")}, "lambda1", "inf", "finite"),
        ({"lambda2": "big"}, "lambda2", "big", "number"),
        ({"method": "kl"}, "lambda1", "", "missing"),  # nobody published one
        ({"flip": 2}, "flip", "2", "less than or equal to 1"),
        ({"width": 12}, "width", "12", "multiple of 8"),
        ({"batch_size": 0}, "batch_size", "0", "greater than or equal to 1"),
        ({"context": "maybe"}, "context", "maybe", "boolean"),
        ({"milestones": (7, 5)}, "milestones", "(7, 5)", "increasing"),
        ({"milestones": (5, 5)}, "milestones", "(5, 5)", "increasing"),
        ({"milestones": 2.5}, "milestones", "2.5", "integer"),
        ({"milestones": ()}, "milestones", "()", "at least 1"),
        ({"milestones": "[]"}, "milestones", "()", "at least 1"),
        ({"method": ["sssd"]}, "method", "['sssd']", "string"),
        ({"overrides": "data=x"}, "data", "", "parameter of that name"),
        ({"min_sizes": ()}, "min_sizes", "()", "at least 1"),
        ({"min_sizes": (200,)}, "max_size", "112", "200"),
        ({"lambda2": 75, "t1": 8}, "t1", "8", "before the last iteration, 8"),
        ({"lambda2": 75, "t1": 99}, "t1", "99", "before the last iteration, 8"),
        ({"distill_start": 8}, "distill_start", "8", "before the last, 8"),
        ({"detector": "yolo"}, "detector", "yolo", "'faster_rcnn', 'retinanet' or 'fcos'"),
        ({"backbone": "vgg16"}, "backbone", "vgg16", "'resnet18'"),
        ({"method": "sgd"}, "method", "sgd", "'baseline'"),
        ({"precision": "int8"}, "precision", "int8", "'bf16'"),
        ({"start": "nowhere.pth"}, "start", "nowhere.pth", "random, imagenet"),
        ({"start": "imagenet"}, "start", "imagenet", "slim18 has no ImageNet weights"),
        ({"lamda1": 50}, "lamda1", "", "lambda1"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_fields_are_refused_in_one_sentence(
    data: DataSource, fields: dict[str, Any], field: str, value: str, expected: str
) -> None:
    message = refused(data=data, **{"start": "random", "iterations": 8, **fields})
    assert message.startswith(f"{field}: ")
    assert value in message.removeprefix(field) and re.search(expected, message)


def test_bad_profiles_and_folders_are_refused(data: DataSource, tmp_path: Path) -> None:
    message = refused(profile="huge", data=data)
    assert "profile" in message and "huge" in message and "smoke" in message
    for folder in (tmp_path, tmp_path / "absent"):
        message = refused(data=folder)
        assert message.startswith("data") and str(folder) in message and "annotations" in message
    assert "COCO" in refused(profile="paper")


def test_a_broken_annotation_file_is_refused(root: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(root, tmp_path / "broken")
    file = folder / "annotations" / "instances_val.json"
    file.write_text(file.read_text()[:-20])
    assert "instances_val.json" in refused(data=folder)


NUMPY = {
    "seed": np.int64(3),
    "iterations": np.uint8(12),
    "milestones": np.array([8, 10]),
    "min_sizes": [np.int32(48), 64],
    "lr": np.float32(0.5),
    "context": np.bool_(True),
    "detector": np.str_("fcos"),
}


def test_numbers_of_numpy_are_numbers(data: DataSource) -> None:
    plain = {name: getattr(value, "tolist", lambda: None)() for name, value in NUMPY.items()}
    plain |= {"min_sizes": [48, 64]}
    run = tiny(data, **NUMPY)
    assert run.id == tiny(data, **plain).id and (run.seed, run.milestones) == (3, (8, 10))
    assert run.change(seed=np.int64(4)).seed == 4
    assert tiny(data, overrides=NUMPY).id == tiny(data, overrides=plain).id
    assert configure("paper", data=data, lr=np.float64(0.25), start="random").lr == 0.25


@pytest.mark.parametrize(
    "form",
    [(5, 7), [5, 7], "[5, 7]", "(5, 7)", "5,7", "5 7", "5, 7", np.array([5, 7]), range(5, 8, 2)],
)
def test_a_list_has_many_forms(data: DataSource, form: Any) -> None:
    assert tiny(data, milestones=form).milestones == (5, 7)
    assert tiny(data, milestones=5).milestones == (5,) == tiny(data, milestones="5").milestones


def test_a_path_of_weights_may_be_a_path(data: DataSource, tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "a=b, c.pth")
    file = tmp_path / "a=b, c.pth"
    assert tiny(data, start=file).id == tiny(data, start=str(file)).id


def test_an_image_that_the_transform_would_erase_is_refused(root: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(root, tmp_path / "narrow")
    file = folder / "annotations" / "instances_val.json"
    content = json.loads(file.read_text())
    content["images"][1] |= {"width": 3, "height": 400}
    file.write_text(json.dumps(content))
    message = refused(data=folder)  # the longest side is 112 pixels
    assert message.startswith("max_size: 112; expected at least 134: image 002.png, 3 × 400 pixels")
    assert tiny(folder, max_size=134).max_size == 134


def test_the_smallest_allowed_size_leaves_a_pixel(data: DataSource) -> None:
    detector = build_detector("fcos", "resnet18", 2, width=16, min_sizes=(64,), max_size=134)
    images, _ = detector.transform([torch.rand(3, 400, 3)])
    assert images.image_sizes == [(134, 1)]


@pytest.mark.parametrize(
    ("method", "most"), [("sssd", 2892), ("lgd", 2892), ("labelenc", 299_593), ("baseline", 10**6)]
)
def test_a_teacher_too_large_for_any_machine_is_refused(
    data: DataSource, method: str, most: int
) -> None:
    def run(classes: int) -> RunConfig:
        many = {i: str(i) for i in range(classes)}
        return tiny(data.model_copy(update={"classes": many}), method=method)

    assert run(most).data.name == data.name
    if method != "baseline":
        with pytest.raises(
            ValueError, match=rf"^data: {most + 1} classes; .* {method}.* would need 9 GB"
        ):
            run(most + 1)


# --- overrides --------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.lists(inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(RunConfig.model_fields)), VALUES, max_size=5))
def test_overrides_survive_being_written_as_text(values: dict[str, Any]) -> None:
    text = ", ".join(f"{name}={value!r}" for name, value in values.items())
    assert parse_overrides(text) == values == parse_overrides(values)


def test_overrides_need_no_quotes_around_words() -> None:
    text = (
        "detector=fcos, precision = bf16, lr=1e-3,\n milestones=(3, 5), context=True, lambda2=None"
    )
    assert parse_overrides(text) == {
        "detector": "fcos",
        "precision": "bf16",
        "lr": 1e-3,
        "milestones": (3, 5),
        "context": True,
        "lambda2": None,
    }
    assert parse_overrides(None) == parse_overrides("") == parse_overrides("  ") == {}


@pytest.mark.parametrize(
    "text",
    [
        *("a", "600", "a=1; b=2", "a=open('x')", "a.b=1", "a={[]: 1}", "a=1) + f(b=2", "a=\0"),
        *("a=1)(b=2", "*a", "**{'a': 1}", "a=1, a=2"),
    ],
)
def test_overrides_that_are_no_list_of_values_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^overrides: .*name=value"):
        parse_overrides(text)


@settings(deadline=None)
@given(st.text(max_size=30))
def test_of_overrides_only_what_was_written_is_understood(text: str) -> None:
    try:
        values = parse_overrides(text)
    except ValueError as error:
        assert str(error).startswith("overrides: ") and "name=value" in str(error)
    else:
        assert all(name.isidentifier() for name in values)
        assert text.count("=") >= len(values)


def test_overrides_reach_the_run(data: DataSource) -> None:
    run = tiny(data, overrides="lambda1=75, lambda2=100, t1=6")
    assert (run.lambda1, run.lambda2, run.t1) == (75, 100, 6)
    assert tiny(data, overrides={"lambda1": 75}).lambda1 == 75
    assert refused(data=data, overrides="lamda1=75").startswith("lamda1: unknown field")


def test_data_given_part_by_part_is_the_same_data(root: Path, tmp_path: Path) -> None:
    parts = {
        f"{split}_{part}": str(path)
        for split in ("train", "val")
        for part, path in (
            ("images", root / split),
            ("annotations", root / "annotations" / f"instances_{split}.json"),
        )
    }
    whole = open_data("smoke", root)
    text = ", ".join(f"{name}={path}" for name, path in parts.items())
    for given_as in (parts, text):
        assert open_data("smoke", given_as).paths == whole.paths
        assert tiny(open_data("smoke", given_as)).id == tiny(whole).id
    for given_as in (json.dumps(parts), repr(parts), {k: Path(v) for k, v in parts.items()}):
        assert open_data("smoke", given_as).paths == whole.paths
    with pytest.raises(ValueError, match="data: train_images given; expected train_images, train_"):
        open_data("smoke", {"train_images": str(root / "train")})
    with pytest.raises(ValueError, match="data: val_images is .*, which is not a folder"):
        open_data("smoke", {**parts, "val_images": str(tmp_path / "absent")})


@pytest.mark.parametrize(
    "name", ["date=2026-01-05", "a, b", "train_images=x", "{braces}", "two  spaces", "it's"]
)
def test_an_existing_folder_is_a_folder(
    root: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(root, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for form in (folder, str(folder), name):
        assert find_data(form) == folder
        assert open_data("smoke", form).name == name
    parts = {
        f"{split}_{part}": folder / place
        for split in ("train", "val")
        for part, place in (
            ("images", split),
            ("annotations", f"annotations/instances_{split}.json"),
        )
    }
    if name != "train_images=x":
        assert find_data(", ".join(f"{k}={v}" for k, v in parts.items())) == parts
    assert find_data(parameters.text(parts)) == parts


@pytest.mark.parametrize("form", [5, ["a"], "a\0b", "x" * 5000, "~nobody-of-this-name/x", {"a": 1}])
def test_what_cannot_be_a_folder_is_one_sentence(form: Any) -> None:
    assert refused(data=form if not isinstance(form, str) else form[:600]).startswith("data")


def test_a_mapping_may_be_text() -> None:
    expected = {"lr": 0.5, "milestones": [3, 5], "context": True}
    for form in (expected, json.dumps(expected), repr(expected)):
        assert parse_overrides(form) == expected


def test_a_cache_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SSSD_CACHE", str(tmp_path / "file"))
    assert "SSSD_CACHE" in refused() and str(tmp_path / "file") in refused()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    parameters.check_folder("output", tmp_path / "a" / "b")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    for folder in (tmp_path / "file", tmp_path / "file" / "inner", Path("/proc/nowhere")):
        with pytest.raises(ValueError, match="^output: nothing can be written to"):
            parameters.check_folder("output", folder)
