"""What figure 1 shows: a run's teaching side kept and loaded, and the panels computed from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny, write_coco

from sssd.config import DataSource
from sssd.detectors import levels_of
from sssd.distiller import Distiller
from sssd.engine import open_split, train
from sssd.losses import js_map, normalise
from sssd.profiles import open_data
from sssd.reproduce import Fig1, ParameterError
from sssd.reproduce.diagram import level_names
from sssd.reproduce.fig1_architecture import View, first_component, view
from sssd.runs import Run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSource:
    return open_data("smoke", write_coco(tmp_path_factory.mktemp("fig1") / "colours"))


@pytest.fixture(scope="module")
def run(data: DataSource, tmp_path_factory: pytest.TempPathFactory) -> Run:
    config = tiny(data, method="sssd", eval_every=8)
    folder = tmp_path_factory.mktemp("store") / config.id
    train(config, folder, keep={config.iterations})
    return Run(config, folder)


def by_hand(distiller: Distiller, image: Any, target: Any) -> tuple[Any, Any, Any, Any]:
    """Features, teacher's pyramid, prepared target and padded size of one image."""
    batch, targets = distiller.student.transform([image], [target])
    features = levels_of(distiller.student.backbone(batch.tensors))
    size = batch.tensors.shape[-2:]
    return features, distiller.teach(features, targets, size), targets[0], tuple(size)


# --- the teaching side, kept ----------------------------------------------------------------------


def test_after_training_is_what_training_left(run: Run) -> None:
    left = torch.load(run.folder / f"fork-{run.config.iterations}.pt", weights_only=True)["model"]
    loaded = run.distiller().state_dict()
    assert loaded.keys() == left.keys()
    assert [name for name in left if not torch.equal(left[name], loaded[name])] == []
    assert int(loaded["step"]) == run.config.iterations


def test_the_student_is_kept_once(run: Run) -> None:
    kept = torch.load(run.folder / "teacher.pt", weights_only=True)
    assert kept and not any(name.startswith("student.") for name in kept)
    assert {name.split(".")[0] for name in kept} == {"step", "teacher", "adapter"}


def test_before_training_is_where_the_run_began(run: Run) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, second = (run.distiller(trained=False).state_dict() for _ in range(2))
    assert torch.equal(torch.rand(3), expected)  # the caller's random numbers are as before
    assert all(torch.equal(first[name], second[name]) for name in first)
    after = run.distiller().state_dict()
    for part in ("teacher.", "adapter.", "student.backbone.fpn."):
        names = [name for name in first if name.startswith(part) and name.endswith("weight")]
        assert names and not any(torch.equal(first[name], after[name]) for name in names)


def test_a_warm_started_run_begins_with_its_starts_teacher(
    data: DataSource, tmp_path: Path
) -> None:
    start = tiny(data, method="lgd", student_rests=True, iterations=2)
    train(start, tmp_path / start.id)
    config = tiny(data, method="sssd", start=start)
    begun = Run(config, tmp_path / config.id).distiller(trained=False).state_dict()
    kept = torch.load(tmp_path / start.id / "teacher.pt", weights_only=True)
    names = [name for name in kept if name.startswith(("teacher.", "adapter."))]
    assert names and all(torch.equal(begun[name], kept[name]) for name in names)


def test_a_run_without_a_teacher_says_so(data: DataSource, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="baseline trains no teacher"):
        Run(tiny(data, method="baseline"), tmp_path).distiller()


def means(seen: View) -> list[torch.Tensor]:
    return [level.mean() for level in seen.divergence]


# --- the panels -----------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", [False, True])
def test_the_panels_are_the_distillers(run: Run, data: DataSource, trained: bool) -> None:
    image, target = open_split(data, "val")[1]
    distiller = run.distiller(trained)
    seen = view(distiller, image, target)
    labels = {name: target[name] for name in ("boxes", "labels")}
    with torch.no_grad():
        features, taught, own, size = by_hand(distiller, image, labels)
        distance = distiller.distance(features, taught, detach=False)
    assert seen.size == size and torch.equal(seen.boxes, own["boxes"])
    for p, (level, teacher) in enumerate(zip(features.values(), taught.values(), strict=True)):
        with torch.no_grad():
            student = normalise(distiller.adapter(level))
        expected = js_map(student, normalise(teacher))[0]
        assert torch.equal(seen.divergence[p], expected)
        assert seen.student[p].shape == seen.teacher[p].shape == level.shape[1:]
    levels = torch.stack(means(seen)).clamp(min=0) / run.config.normaliser
    torch.testing.assert_close(levels.sqrt().mean(), distance)


def test_before_and_after_differ(run: Run, data: DataSource) -> None:
    image, target = open_split(data, "val")[0]
    before, after = (view(run.distiller(trained), image, target) for trained in (False, True))
    assert means(before)[:4] != means(after)[:4]
    assert means(before)[4] == means(after)[4] == 0  # a single pixel


def test_the_same_picture_again(run: Run, data: DataSource) -> None:
    image, target = open_split(data, "val")[0]
    one, other = (view(run.distiller(), image, target) for _ in range(2))
    for a, b in zip(one.divergence, other.divergence, strict=True):
        assert torch.equal(a, b)


def test_first_component_is_what_the_teacher_draws() -> None:
    draw = torch.Generator().manual_seed(0)
    object_here = torch.zeros(6, 8)
    object_here[2:4, 3:6] = 1
    drawn, own = torch.randn(2, 16, 1, 1, generator=draw)
    noise = 0.01 * torch.randn(2, 16, 6, 8, generator=draw)
    teacher = noise[1] + drawn * object_here
    student = (
        noise[0]
        + 0.5 * drawn * object_here
        + 5 * (own - own.mean()) * torch.rand(6, 8, generator=draw)
    )
    student -= student.mul(drawn).sum(0) * drawn / drawn.square().sum()  # none of it, then half
    student += 0.5 * drawn * object_here
    for sign in (1, -1):  # the object is bright whichever way the features point
        ours, theirs = first_component(sign * student, sign * teacher, object_here)
        assert ours.shape == theirs.shape == object_here.shape
        step = [
            float(x[object_here > 0].mean() - x[object_here == 0].mean()) for x in (ours, theirs)
        ]
        assert step[1] > 0 and step[0] / step[1] == pytest.approx(0.5, abs=0.05)
        assert float(theirs.mean()) == pytest.approx(0, abs=1e-6)
        assert float(theirs.std(correction=0)) == pytest.approx(1)
    flat = torch.ones(4, 2, 2)  # a level of which nothing is drawn
    assert all(not x.any() for x in first_component(noise[0, :4, :2, :2], flat, flat[0]))


# --- the experiment -------------------------------------------------------------------------------


def test_levels_have_the_papers_names(data: DataSource) -> None:
    names = {d: level_names(tiny(data, detector=d)) for d in ("faster_rcnn", "retinanet", "fcos")}
    assert names["faster_rcnn"] == ["P2", "P3", "P4", "P5", "P6"]
    assert names["retinanet"] == names["fcos"] == ["P3", "P4", "P5", "P6", "P7"]


@pytest.mark.parametrize(
    ("detector", "distill_start"),
    [("faster_rcnn", 0), ("faster_rcnn", 3), ("retinanet", 0), ("fcos", 2)],
)
def test_the_drawing_says_what_the_configuration_does(
    data: DataSource, tmp_path: Path, detector: str, distill_start: int
) -> None:
    fig1 = Fig1(
        profile="smoke",
        data=str(Path(data.paths["val_images"]).parent),
        overrides=f"detector={detector}, start=random, width=24, distill_start={distill_start}",
        output=str(tmp_path),
    )
    plot = fig1.architecture()
    figure = plot.figure
    said = [text.get_text() for text in figure.axes[0].texts]
    assert any("24 channels" in text for text in said)
    assert "of 2 classes" in said
    detached = detector == "faster_rcnn"
    assert sum(text == "no gradient" for text in said) == 1 + detached
    assert any("context" in text for text in said) == (detector == "retinanet")
    for text in (
        f"until $t$ = {distill_start}" in "".join(said),
        "only the adapter learns" in plot.caption,
    ):
        assert text == (distill_start > 0)
    assert not list(tmp_path.iterdir())  # only `save` writes


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"image": 8}, "image: 8; expected 0 to 7, as there are 8 validation images"),
        ({"image": -1}, "image: -1"),
        ({"lambda1": 0}, "lambda1: 0"),
        ({"overrides": "epochs=3"}, "epochs: unknown field"),
        ({"profile": "maxi"}, "profile: 'maxi'"),
    ],
)
def test_bad_parameters_are_named_in_one_sentence(
    parameters: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ParameterError) as raised:
        Fig1.from_notebook({"profile": "smoke", **parameters})
    assert sentence in str(raised.value) and "\n" not in str(raised.value)
