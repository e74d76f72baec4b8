"""Training one run: its records, its start, and that it is the same however it came about."""

from __future__ import annotations

import json
import math
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from filelock import FileLock
from helpers import (
    assert_equal_runs,
    chain,
    environment,
    finish,
    python,
    records,
    tiny,
    weights,
    write_coco,
)
from torch import Tensor, nn

from sssd import engine
from sssd import records as files
from sssd.config import DataSource, RunConfig
from sssd.data.coco import Batches
from sssd.detectors import build_detector
from sssd.distiller import Distiller
from sssd.engine import train
from sssd.evaluation import METRICS, Detections
from sssd.profiles import configure, open_data, open_split
from sssd.records import read_records
from sssd.starts import build_model


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSource:
    return open_data("smoke", write_coco(tmp_path_factory.mktemp("engine") / "colours"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[RunConfig], Path]:
    """The folder of a run trained in one piece, in a store without other runs, once a module."""
    root, made = tmp_path_factory.mktemp("whole"), set[str]()

    def get(config: RunConfig) -> Path:
        folder = root / config.id / config.id
        if config.id not in made:
            train(config, folder)
            made.add(config.id)
        return folder

    return get


SSSD = {"method": "sssd", "lambda2": 75.0}  # Faster R-CNN by AdamW, stepwise
QUICK = {"trainable_stages": 0}  # the backbone has most of the weights
SGD = {"optimizer": "sgd", "lr": 0.01}
RUNS: dict[str, dict[str, Any]] = {
    "sssd": SSSD,
    "sssd fcos": {**SGD, **QUICK, "method": "sssd", "detector": "fcos", "width": 64},
    "lgd retinanet": {**QUICK, "method": "lgd", "detector": "retinanet"},
    "baseline": {**QUICK, "method": "baseline"},
    "labelenc stage 1": {**QUICK, "method": "labelenc_stage1", "detector": "retinanet"},
    "crops": {"method": "crops", **SGD},
}


# --- one run, however it came about -------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
def test_a_continued_run_equals_an_uninterrupted_one(
    data: DataSource, whole: Callable[[RunConfig], Path], tmp_path: Path, name: str
) -> None:
    config = tiny(data, **RUNS[name])
    folder = tmp_path / config.id
    train(config, folder, until=3, checkpoint_seconds=0)
    assert (folder / "last.pt").exists() and not (folder / "done.json").exists()
    assert [record["iteration"] for record in records(folder)] == [1, 2, 3]
    train(config, folder)
    if name == "crops":
        first, second = weights(folder), weights(whole(config))
        assert all(torch.equal(first[key], second[key]) for key in second)
        assert records(folder) == records(whole(config))
    else:
        assert_equal_runs(folder, whole(config))


KILLED = """
import os, pickle, signal, sys
from pathlib import Path
from sssd import engine
from sssd import records as files

def append(file, record, append=files.append):
    if record["iteration"] == 3:
        with file.open("a") as out:
            out.write('{"iteration": 3, "lo')
        os.kill(os.getpid(), signal.SIGKILL)
    append(file, record)

files.append = append
config, folder = pickle.loads(Path(sys.argv[1]).read_bytes())
engine.train(config, folder, checkpoint_seconds=0)
"""


def test_a_run_killed_while_it_writes_a_line_goes_on(
    data: DataSource, whole: Callable[[RunConfig], Path], tmp_path: Path
) -> None:
    config = tiny(data, **SSSD, **QUICK)
    folder = tmp_path / config.id
    (tmp_path / "job").write_bytes(pickle.dumps((config, folder)))
    process = python(KILLED, tmp_path / "job")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, errors
    assert (folder / "metrics.jsonl").read_text().endswith('"lo')  # torn
    assert [record["iteration"] for record in records(folder)] == [1, 2]
    train(config, folder)
    assert_equal_runs(folder, whole(config))
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 8


def test_a_run_stopped_while_it_saves_keeps_the_checkpoint_before(
    data: DataSource,
    whole: Callable[[RunConfig], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tiny(data, **SSSD, **QUICK)
    folder = tmp_path / config.id
    save, saved = torch.save, []

    def half(value: Any, file: Any) -> None:
        saved.append(value["iteration"])
        if len(saved) == 2:
            file.write(b"half of a checkpoint")
            raise KeyboardInterrupt
        save(value, file)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", half)
        train(config, folder, checkpoint_seconds=0)
    assert saved == [1, 2]
    assert torch.load(folder / "last.pt", weights_only=True)["iteration"] == 1
    train(config, folder)
    assert_equal_runs(folder, whole(config))  # iteration 2, recorded twice, counts once


@pytest.mark.parametrize(
    "fields",
    [
        SSSD,
        {**SSSD, **SGD, **QUICK, "t1": 3, "eval_every": 8},
    ],
    ids=["adamw", "sgd, without an evaluation before T1"],
)
def test_a_fork_equals_the_run_trained_from_the_beginning(
    data: DataSource,
    whole: Callable[[RunConfig], Path],
    tmp_path: Path,
    fields: dict[str, Any],
) -> None:
    config = tiny(data, **fields)
    parent = config.parent
    assert parent is not None and parent.lambda2 is None
    train(parent, tmp_path / parent.id, until=config.t1, keep={config.t1})
    with (tmp_path / parent.id / "metrics.jsonl").open("a") as out:
        out.write('{"iteration": 6, "lo')  # the parent goes on meanwhile
    train(config, tmp_path / config.id)
    assert_equal_runs(tmp_path / config.id, whole(config))
    # The shared part was not trained again: it took the very same time.
    taken = [[r["seconds"] for r in read_records(tmp_path / run.id / "metrics.jsonl")]
             for run in (parent, config)]  # fmt: skip
    assert taken[0] == taken[1][: config.t1]


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"eval_every": 1}, ["fork-5.pt"]),
        ({"eval_every": 1, "t1": 7}, ["fork-5.pt"]),  # a run with a fixed λ has no T1
        ({"eval_every": 1, "lambda2": 75.0}, []),  # no run begins with a run of two λ
        ({"eval_every": 1, "lambda1": 0.0}, []),  # nor with one without distillation
        ({"eval_every": 2}, []),  # nor where one evaluation alone would follow T1
        ({"method": "baseline"}, []),
    ],
    ids=["fixed", "fixed, with a T1", "stepwise", "zero", "without a curve", "baseline"],
)
def test_a_checkpoint_stays_where_a_stepwise_run_could_begin(
    data: DataSource, tmp_path: Path, fields: dict[str, Any], kept: list[str]
) -> None:
    config = tiny(data, **{"method": "sssd", **QUICK, **fields})
    train(config, tmp_path / config.id)
    assert [file.name for file in (tmp_path / config.id).glob("fork-*")] == kept


def test_evaluation_takes_more_images_at_a_time_than_training(
    data: DataSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as fit the pixels; the teacher's detections share the student's backbone."""
    config, seen = tiny(data, method="lgd", iterations=1, **QUICK), []

    def detect(
        self: Any, images: list[Tensor], *rest: Any, own: Any = Distiller.detect_taught
    ) -> Any:
        seen.append(len(images))
        calls = []
        hook = self.student.backbone.body.register_forward_hook(lambda *_: calls.append(1))
        found = own(self, images, *rest)
        hook.remove()
        assert not calls
        return found

    monkeypatch.setattr(Distiller, "detect_taught", detect)
    train(config, tmp_path / "all")
    monkeypatch.setattr(engine, "EVALUATED_PIXELS", 3 * 64 * 112)
    train(config, tmp_path / "three")
    assert seen == [4, 3, 1]


def test_a_fork_differs_from_its_parent_only_after_the_switch(
    data: DataSource, whole: Callable[[RunConfig], Path]
) -> None:
    config = tiny(data, **SSSD)
    parent = config.parent
    assert parent is not None and parent.parent is None
    assert tiny(data, method="baseline", lambda2=75.0).parent is None
    fixed, stepwise = records(whole(parent)), records(whole(config))
    assert fixed[:5] == stepwise[:5]
    assert [record["lambda"] for record in stepwise] == [50.0] * 5 + [75.0] * 3
    # λ is all that differs in iteration 6; after it the weights differ too.
    assert stepwise[5]["distill"] == pytest.approx(1.5 * fixed[5]["distill"], rel=1e-5)
    assert stepwise[5]["loss_classifier"] == fixed[5]["loss_classifier"]
    assert stepwise[6]["loss_classifier"] != fixed[6]["loss_classifier"]


def test_loader_processes_change_nothing(
    data: DataSource,
    whole: Callable[[RunConfig], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tiny(data, method="baseline", **QUICK)
    monkeypatch.setattr(engine, "_loaders", lambda accelerator: 1)
    train(config, tmp_path / config.id)
    assert_equal_runs(tmp_path / config.id, whole(config))


def test_channels_last_changes_the_layout_alone(
    data: DataSource, whole: Callable[[RunConfig], Path], tmp_path: Path
) -> None:
    config = tiny(data, **SSSD)
    other = config.change(channels_last=True)
    assert other.id != config.id
    layouts: list[bool] = []

    def look(module: nn.Module, _: Any) -> None:
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            last = module.weight.is_contiguous(memory_format=torch.channels_last)
            layouts.append(last)

    hook = nn.modules.module.register_module_forward_pre_hook(look)
    train(other, tmp_path / other.id, until=2)
    hook.remove()
    assert layouts and all(layouts)
    for one, two in zip(records(tmp_path / other.id), records(whole(config)), strict=False):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-3)


def test_another_seed_is_another_run(
    data: DataSource, whole: Callable[[RunConfig], Path], tmp_path: Path
) -> None:
    zero, one = (tiny(data, method="baseline", seed=seed, **QUICK) for seed in (0, 1))
    train(one, tmp_path / one.id, until=2)
    first, second = records(tmp_path / one.id)[0], records(whole(zero))[0]
    assert first["lr"] == second["lr"] and first["loss"] != second["loss"]
    models = [build_model(config, 2, tmp_path) for config in (zero, one)]
    heads = [model.student.roi_heads.box_predictor.cls_score.weight for model in models]
    assert not torch.equal(*heads)


# --- what it leaves -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
def test_records_are_whole(data: DataSource, whole: Callable[[RunConfig], Path], name: str) -> None:
    config = tiny(data, **RUNS[name])
    table = pd.read_json(whole(config) / "metrics.jsonl", lines=True)
    assert table["iteration"].tolist() == list(range(1, 9))
    assert (table["seconds"] > 0).all() and (table["gradient_norm"] > 0).all()
    parts = [c for c in table if c.startswith(("loss_", "teacher_")) or c in ("classification",
             "bbox_regression", "bbox_ctrness", "distill")]  # fmt: skip
    assert np.allclose(table[parts].sum(axis=1), table["loss"], rtol=1e-5)
    warmth = (0.001, 0.5005, 1, 1, 1, 1, 1, 1)
    rates = [
        config.lr * warm * 0.1 ** sum(t > m for m in config.milestones)
        for t, warm in enumerate(warmth, start=1)
    ]
    assert np.allclose(table["lr"], rates, rtol=1e-12)
    taught = [column for column in table if column.startswith("teacher_")]
    if config.method in ("baseline", "crops"):
        assert not taught and not {"lambda", "share", "distill"} & set(table)
        return
    assert {f"teacher_{c}" for c in parts if c not in taught and c != "distill"} == set(taught)
    after = config.lambda1 if config.lambda2 is None else config.lambda2
    assert table["lambda"].tolist() == [config.lambda1] * 5 + [after] * 3
    distill = table["distill"].fillna(0.0)  # stage 1 of LabelEnc begins without
    assert np.allclose(table["share"], distill / table["loss"], rtol=1e-5)
    late = config.distill_start if config.method == "labelenc_stage1" else 0
    started = table["iteration"] > late
    assert (table["share"].gt(0) == (distill > 0)).all() and (table["share"] < 1).all()
    assert (distill[started] > 0).all()


@pytest.mark.parametrize("name", [name for name in RUNS if name != "crops"])
def test_evaluations_are_of_the_weights_that_are_kept(
    data: DataSource, whole: Callable[[RunConfig], Path], name: str
) -> None:
    config = tiny(data, **RUNS[name])
    folder = whole(config)
    table = pd.DataFrame(read_records(folder / "evaluations.jsonl"))
    assert table["iteration"].tolist() == [4, 8]
    assert set(METRICS) <= set(table)
    assert set(table["per_class"].iloc[0]) == {"colour 3", "colour 7"}
    taught = {"labelenc stage 1": [], "baseline": []}.get(name, ["teacher"])
    measures = ["AP", "AP_L", "AP_M", "AP_S", *taught]
    assert sorted(file.stem for file in (folder / "matches").iterdir()) == [
        f"{t:06d}-{measure}" for t in (4, 8) for measure in measures
    ]
    assert ({"teacher_AP", "teacher_AP50", "teacher_AP75"} <= set(table)) == bool(taught)
    assert not (folder / "last.pt").exists()
    done = json.loads((folder / "done.json").read_text())
    assert done["iterations"] == 8 and done["training_seconds"] > 0 and done["processes"] == 1
    machine = json.loads((folder / "environment.json").read_text())
    assert torch.__version__.startswith(machine["torch"]) and machine["cpu"]

    # The stock detector, without a line of ours, gives the same detections with these weights.
    model = build_detector(
        config.detector,
        config.backbone,
        2,
        width=config.width,
        min_sizes=config.min_sizes,
        max_size=config.max_size,
        scale=config.scale,
        proposals=config.proposals,
        roi_samples=config.roi_samples,
    )
    model.load_state_dict(weights(folder), strict=True)
    val, kept = open_split(data, "val"), Detections.load(folder / "detections.npz")
    assert set(kept.category_id.tolist()) <= {3, 7}
    model.eval()
    for number in range(len(val)):
        image, target = val[number]
        with torch.no_grad():
            (found,) = model([image])
        own, real = kept.image_id == target["image_id"], (found["labels"] > 0).numpy()
        assert own.sum() == real.sum()
        assert np.allclose(kept.scores[own], found["scores"].numpy()[real], atol=1e-5)
        assert np.allclose(kept.boxes[own], found["boxes"].numpy()[real], atol=1e-2)


def test_after_distill_stop_the_loss_goes_on_counting(data: DataSource, tmp_path: Path) -> None:
    config = tiny(data, method="lgd", distill_stop=1, **QUICK)
    train(config, tmp_path / config.id, until=2)
    first, second = records(tmp_path / config.id)
    assert first["share"] > 0 and second["share"] > 0
    assert second["teacher_loss_classifier"] > 0


def test_frozen_parts_stay_as_they_were(data: DataSource, tmp_path: Path) -> None:
    def changed(config: RunConfig) -> set[str]:
        """The parts of backbone and head that two iterations change."""
        before = build_model(config, 2, tmp_path).student.state_dict()
        train(config, tmp_path / config.id, until=2, checkpoint_seconds=0)
        after = torch.load(tmp_path / config.id / "last.pt", weights_only=True)["model"]
        names = [name for name in before if not torch.equal(before[name], after[f"student.{name}"])]
        return {name.split(".")[2] if name.startswith("backbone.body") else name.split(".")[0]
                for name in names}  # fmt: skip

    fast = {"lr": 0.01, "warmup": 0}
    assert changed(tiny(data, trainable_stages=3, unfreeze_backbone=0, **fast)) == {
        *("layer2", "layer3", "layer4", "backbone", "rpn", "roi_heads")
    }
    assert changed(tiny(data, unfreeze_backbone=2, **fast)) == {"backbone", "rpn", "roi_heads"}


# --- what stops it ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spoil",
    [
        lambda loss: loss * math.nan,
        lambda loss: loss + (loss.detach() - loss).abs().sqrt(),  # finite; its gradient is not
    ],
    ids=["loss", "gradient"],
)
def test_a_loss_that_is_not_finite_stops_the_run(
    data: DataSource,
    whole: Callable[[RunConfig], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[Tensor], Tensor],
) -> None:
    config = tiny(data, **SSSD, **QUICK)
    folder = tmp_path / config.id
    forward = Distiller.forward

    def spoilt(self: Distiller, *given: Any) -> Any:
        losses = forward(self, *given)
        if isinstance(losses, dict) and int(self.step) == 2:
            losses["teacher_loss_classifier"] = spoil(losses["teacher_loss_classifier"])
        return losses

    with monkeypatch.context() as patch:
        patch.setattr(Distiller, "forward", spoilt)
        with pytest.raises(FloatingPointError, match="iteration 2: .*teacher_loss_classifier"):
            train(config, folder, checkpoint_seconds=0)
    assert [record["iteration"] for record in records(folder)] == [1]
    kept = torch.load(folder / "last.pt", weights_only=True)
    assert kept["iteration"] == 1
    assert all(bool(value.isfinite().all()) for value in kept["model"].values())
    if spoil(torch.ones(())).isnan():  # once the fault is mended the run goes on
        train(config, folder)
        assert_equal_runs(folder, whole(config))


def test_a_rate_beyond_reason_stops_the_run(data: DataSource, tmp_path: Path) -> None:
    config = tiny(data, method="baseline", optimizer="sgd", lr=1e30, warmup=0)
    with pytest.raises(FloatingPointError, match="not finite"):
        train(config, tmp_path / config.id, checkpoint_seconds=0)
    table = pd.read_json(tmp_path / config.id / "metrics.jsonl", lines=True)
    assert np.isfinite(table.to_numpy(float)).all() and 1 <= len(table) < 8


# --- the files of records ---------------------------------------------------------------------------


def test_a_half_written_line_is_not_read_and_then_mended(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert read_records(file) == []
    files.mend(file)  # nothing there yet
    assert not file.exists()
    for t in (1, 2):
        files.append(file, {"iteration": t, "loss": t / 2})
    expected = [{"iteration": 1, "loss": 0.5}, {"iteration": 2, "loss": 1.0}]
    line = json.dumps({"iteration": 3, "loss": 1.5}) + "\n"
    for end in range(len(line)):  # wherever it was torn
        file.write_text("".join(json.dumps(record) + "\n" for record in expected) + line[:end])
        assert read_records(file) == expected
        files.mend(file)
        files.append(file, {"iteration": 3, "loss": 2.0})
        assert read_records(file) == [*expected, {"iteration": 3, "loss": 2.0}]
        assert len(file.read_text().splitlines()) == 3
    file.write_text('{"iteration"')
    assert read_records(file) == []
    files.mend(file)
    assert file.read_text() == ""


def test_an_iteration_done_again_counts_once(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    for t, loss in ((1, 1.0), (2, 2.0), (3, 3.0), (2, 20.0), (3, 30.0), (4, 40.0)):
        files.append(file, {"iteration": t, "loss": loss})
    assert [record["loss"] for record in read_records(file)] == [1.0, 20.0, 30.0, 40.0]


# --- where it starts --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def warm(
    data: DataSource, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, RunConfig]]:
    """A store with a classifier of crops and a plain detector that starts from it, one iteration."""
    root = tmp_path_factory.mktemp("warm")
    config = configure("smoke", data=data, method="baseline").start
    assert isinstance(config, RunConfig) and isinstance(config.start, RunConfig)
    train(config.start, root / config.start.id)
    train(config, root / config.id)
    yield root, config


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_every_method_starts_from_the_warm_start(
    data: DataSource, warm: tuple[Path, RunConfig]
) -> None:
    root, detector = warm
    expected = weights(root / detector.id)
    teacher = configure("smoke", data=data, method="lgd").start
    assert isinstance(teacher, RunConfig) and teacher.start == detector
    before = build_model(teacher, 2, root).state_dict()
    train(teacher, root / teacher.id)
    learnt = torch.load(root / teacher.id / "teacher.pt")
    for method in ("baseline", "lgd", "kl", "sssd"):  # LabelEnc's: see its own test
        for seed in (0, 1):
            config = configure("smoke", data=data, method=method, seed=seed, lambda1=2.0)
            model = build_model(config, 2, root)
            assert_same(model.student.state_dict(), expected)
            if method != "baseline":
                assert config.start == teacher and int(model.step) == 0
                own = {n: v for n, v in model.state_dict().items() if n.startswith("teacher.")}
                assert_same(own, {n: learnt[n] for n in own})
                assert any(not torch.equal(own[n], before[n]) for n in own)


def test_a_student_at_rest_stays_as_it_is(data: DataSource, warm: tuple[Path, RunConfig]) -> None:
    root, _ = warm
    config = configure("smoke", data=data, method="lgd").start
    assert isinstance(config, RunConfig)
    config = config.change(trained_norm=True, start="random")
    before = build_model(config, 2, root).student.state_dict()
    train(config, root / config.id)
    after = weights(root / config.id)
    counts = {n for n in before if n.endswith("num_batches_tracked")}
    assert counts
    assert_same(*({n: v for n, v in x.items() if n not in counts} for x in (before, after)))


def test_a_baseline_has_no_teacher_that_could_learn_alone(data: DataSource, tmp_path: Path) -> None:
    """Such a run has the id of the plain run, and so it is the plain run."""
    plain, asked = (tiny(data, method="baseline", student_rests=rests) for rests in (False, True))
    assert plain.id == asked.id
    learning = [
        {name for name, p in build_model(config, 2, tmp_path).named_parameters() if p.requires_grad}
        for config in (plain, asked)
    ]
    assert learning[0] == learning[1] and learning[0]


def test_another_detector_starts_from_the_backbone_alone(
    data: DataSource, warm: tuple[Path, RunConfig]
) -> None:
    root, start = warm
    config = configure("smoke", data=data, method="baseline", detector="retinanet", start=start)
    body = build_model(config, 2, root).student.backbone.body.state_dict()
    own = {n.removeprefix("backbone.body."): v for n, v in weights(root / start.id).items()}
    assert_same(body, {name: own[name] for name in body})


@pytest.mark.parametrize("detector", ["faster_rcnn", "fcos"])
def test_labelencs_second_stage_starts_from_the_first(
    data: DataSource, tmp_path: Path, detector: str
) -> None:
    """Backbone from before stage 1, FPN from the label encoding function, head from stage 1."""
    config = configure("smoke", data=data, method="labelenc", detector=detector)
    stage1 = config.start
    assert isinstance(stage1, RunConfig) and isinstance(stage1.start, RunConfig)
    for run in chain(stage1):
        train(run, tmp_path / run.id)
    begins = build_model(config, 2, tmp_path)
    before, first = weights(tmp_path / stage1.start.id), weights(tmp_path / stage1.id)
    taught = torch.load(tmp_path / stage1.id / "teacher.pt", weights_only=True)
    for name, value in begins.student.state_dict().items():
        if name.startswith("backbone.body."):
            assert torch.equal(value, before[name]), name
        elif name.startswith("backbone.fpn."):
            expected = taught["teacher.fpn." + name.removeprefix("backbone.fpn.")]
            assert torch.equal(value, expected), name
        else:
            assert torch.equal(value, first[name]), name
    train(config, tmp_path / config.id)
    after = torch.load(tmp_path / config.id / "teacher.pt", weights_only=True)
    kept = [name for name in taught if name.startswith("teacher.")]
    assert kept and all(torch.equal(after[name], taught[name]) for name in kept)  # frozen
    found = pd.DataFrame(read_records(tmp_path / config.id / "metrics.jsonl"))
    assert found.loc[found["iteration"] <= config.distill_stop, "distill"].notna().all()
    assert found.loc[found["iteration"] > config.distill_stop, "distill"].isna().all()


def test_a_run_really_trains_from_its_start(data: DataSource, warm: tuple[Path, RunConfig]) -> None:
    root, start = warm
    config = configure(
        "smoke", data=data, method="sssd", start=start, iterations=1, lr=1e-20, weight_decay=0
    )
    train(config, root / config.id)
    after, before = weights(root / config.id), weights(root / start.id)
    assert after.keys() == before.keys()
    assert all(torch.allclose(after[name], before[name], rtol=0, atol=1e-15) for name in after)


def test_a_detector_starts_from_the_crops_backbone(warm: tuple[Path, RunConfig]) -> None:
    root, start = warm
    assert isinstance(start.start, RunConfig)
    classifier = weights(root / start.start.id)
    body = build_model(start, 2, root).student.backbone.body.state_dict()
    assert_same(body, {name: classifier[name] for name in body})
    left = {name for name in classifier.keys() - body.keys()}
    assert {"fc.weight", "fc.bias"} == {n for n in left if not n.endswith("num_batches_tracked")}


def test_a_run_starts_from_a_file_of_a_whole_detector(
    data: DataSource, warm: tuple[Path, RunConfig], tmp_path: Path
) -> None:
    root, start = warm
    config = configure("smoke", data=data, start=str(root / start.id / "weights.pt"))
    model = build_model(config, 2, tmp_path)  # there the run itself does not lie
    assert_same(model.student.state_dict(), weights(root / start.id))


def classifier(name: str = "resnet18") -> dict[str, Tensor]:
    torch.manual_seed(3)
    return getattr(torchvision.models, name)(num_classes=1000).state_dict()


def test_a_run_starts_from_a_file_of_a_classifier(data: DataSource, tmp_path: Path) -> None:
    state = classifier()
    torch.save(state, tmp_path / "resnet18.pth")
    config = tiny(data, start=str(tmp_path / "resnet18.pth"), backbone="resnet18")
    body = build_model(config, 2, tmp_path).student.backbone.body.state_dict()
    assert_same(body, {name: state[name] for name in body})
    assert len(body) == sum(not name.startswith("fc.") for name in state) - 20  # batches counted


def test_imagenet_is_torchvisions_classifier(
    data: DataSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, asked = classifier(), []

    def get_state_dict(self: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        asked.append(self)
        return state

    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", get_state_dict)
    config = tiny(data, start="imagenet", backbone="resnet18")
    assert config.trainable_stages == 3
    body = build_model(config, 2, tmp_path).student.backbone.body
    assert asked == [torchvision.models.ResNet18_Weights.IMAGENET1K_V1]
    assert_same(body.state_dict(), {name: state[name] for name in body.state_dict()})
    learning = {name.split(".")[0] for name, p in body.named_parameters() if p.requires_grad}
    assert learning == {"layer2", "layer3", "layer4"}


@pytest.mark.parametrize(
    "kind", ["another backbone", "another detector", "no weights", "no names", "nothing"]
)
def test_a_file_of_other_weights_is_refused(
    data: DataSource, warm: tuple[Path, RunConfig], tmp_path: Path, kind: str
) -> None:
    file = tmp_path / "other.pth"
    if kind == "another backbone":
        torch.save(classifier("resnet34"), file)
    elif kind == "another detector":
        torch.save(build_detector("retinanet", "slim18", 2, width=16).state_dict(), file)
    elif kind == "no names":
        torch.save([torch.zeros(2)], file)
    else:
        file.write_text("no weights at all" if kind == "no weights" else "")
    config = tiny(data, start=str(file))
    with pytest.raises(ValueError, match=r"^start: .*other\.pth") as error:
        build_model(config, 2, tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


# --- several processes ------------------------------------------------------------------------------

TWO = """
import json, os, pickle, sys
from pathlib import Path
from sssd import engine, runs
from sssd import records as files
from sssd.runs import Store

root, config, uneven = pickle.loads(Path(sys.argv[1]).read_bytes())
rank, seen = os.environ["RANK"], []

def told(name, function):
    def call(*given, **more):
        (root / f"{name}-{rank}").touch()
        return function(*given, **more)
    return call

class Batches(engine.Batches):
    def __getitem__(self, t):
        images, targets = super().__getitem__(t)
        seen.append([t, [target["image_id"] for target in targets]])
        return images, targets

class Lock(runs.FileLock):
    def acquire(self, *given, **more):
        try:
            return super().acquire(*given, **more)
        except runs.Timeout:
            (root / f"waits-{rank}").touch()
            raise

engine.Batches, runs.FileLock, runs.LOCK_SECONDS = Batches, Lock, 0.2
files.write, files.append = told("writes", files.write), told("writes", files.append)
Store(root).get([config])
(root / f"seen-{rank}.json").write_text(json.dumps(seen))
runs.train = None  # asked for again, the run is found trained
Store(root).get([config])
runs.train = engine.train
try:
    Store(root).get([uneven])
except ValueError as error:
    (root / f"uneven-{rank}.txt").write_text(str(error))
runs.PartialState().destroy_process_group()
"""
TOGETHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
EQUAL = {
    **{
        "method": "lgd",
        "detector": "fcos",
        "backbone": "resnet18",
        "width": 64,
        "flip": 0.0,
        "warmup": 0,
        **SGD,
    },
    **{"iterations": 4, "unfreeze_backbone": 1},
}
"""Gradients of two halves of a batch, averaged, are those of the batch.

So only where nothing but means over images enters: FCOS draws no samples; it divides by the number
of matched anchors, so all images have the same boxes, and no image is flipped; LGD's distance is a
mean over elements; the images have one size, so padding is the same.
"""


def assert_about_equal(mine: Path, theirs: Path) -> None:
    """Two finished runs of `EQUAL` whose sums were taken in another order."""
    one, two = weights(mine), weights(theirs)
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-5
    for a, b in zip(records(mine), records(theirs), strict=True):
        assert a.keys() == b.keys()
        assert all(a[key] == pytest.approx(b[key], rel=1e-3) for key in a)


def test_two_processes_train_one_run(tmp_path: Path) -> None:
    source = open_data("smoke", write_coco(tmp_path / "same", same_boxes=True, val=5))
    config = tiny(source, **EQUAL, lambda2=2.0, t1=2)
    parent, uneven = config.parent, tiny(source, method="baseline", batch_size=3)
    assert parent is not None
    root = tmp_path / "two"
    root.mkdir()
    (root / "job").write_bytes(pickle.dumps((root, config, uneven)))
    (root / "two.py").write_text(TWO)
    with FileLock(root / f"{parent.id}.lock"):  # as if another job trained the run
        process = subprocess.Popen(
            [*TOGETHER, str(root / "two.py"), str(root / "job")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        while not (root / "waits-0").exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        assert not (root / parent.id).exists()
    finish([process])
    assert not (root / "waits-1").exists()  # one process has the lock for all
    assert (root / "writes-0").exists() and not (root / "writes-1").exists()

    # Two processes stopped at T1 and forked there; one goes through.
    assert (root / parent.id / "fork-2.pt").exists()
    mine, theirs = tmp_path / config.id, root / config.id
    train(config, mine)
    before, after = build_model(config, 2, tmp_path).student.state_dict(), weights(mine)
    moved = max(float((after[name] - before[name]).abs().max()) for name in after)
    assert moved > 5e-3  # else agreement would say nothing
    assert_about_equal(mine, theirs)
    assert [record["iteration"] for record in records(theirs, "evaluations.jsonl")] == [4]
    found = Detections.load(theirs / "detections.npz")
    assert set(found.image_id.tolist()) == {1, 2, 3, 4, 5}  # of which each process has some
    own = Detections.load(mine / "detections.npz")
    assert sorted(found.image_id) == sorted(own.image_id)  # and none counts twice
    assert json.loads((theirs / "done.json").read_text())["processes"] == 2

    batches = Batches(open_split(source, "train"), 2, config.seed, 4, flip=0.0)
    seen = [dict(json.loads((root / f"seen-{rank}.json").read_text())) for rank in (0, 1)]
    for t in range(1, 5):
        both = [target["image_id"] for target in batches[t][1]]
        assert [seen[0][t], seen[1][t]] == [both[:1], both[1:]]
    for rank in (0, 1):
        assert "batch_size: 3" in (root / f"uneven-{rank}.txt").read_text()


KILLED_RANK = """
import os, runpy, signal
from functools import partial
from sssd import engine, runs

def train_step(t, *rest, step=engine.train_step):
    if t == 4 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return step(t, *rest)

engine.train_step = train_step
runs.train = partial(engine.train, checkpoint_seconds=0)
runpy.run_module("sssd", run_name="__main__")
"""


def test_a_killed_process_ends_all_and_the_run_goes_on(tmp_path: Path) -> None:
    folder = write_coco(tmp_path / "same", same_boxes=True)
    config = tiny(folder, **EQUAL)
    (tmp_path / "killed.py").write_text(KILLED_RANK)
    fields = ", ".join(f"{name}={value!r}" for name, value in EQUAL.items())
    words = ["--store", tmp_path / "runs", "train", "--profile", "smoke", "--data", folder]
    words += ["--set", f"start='random', {fields}"]
    done = subprocess.run(
        [*TOGETHER, tmp_path / "killed.py", *words],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=600,
    )
    assert done.returncode == 1
    said = [line for line in done.stderr.splitlines() if line.startswith("sssd: ")]
    assert len(said) == 1 and "goes on from the last checkpoint" in said[0], done.stderr
    assert "Signal 9 (SIGKILL)" in done.stderr  # torchrun's, which names the process
    run = tmp_path / "runs" / config.id
    assert torch.load(run / "last.pt", weights_only=True)["iteration"] in (2, 3)
    train(config, run)  # on one process
    train(config, tmp_path / config.id)
    assert_about_equal(tmp_path / config.id, run)
