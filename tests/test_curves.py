"""Live curves follow a run's records."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from helpers import tiny, write_coco

from sssd.__main__ import main
from sssd.curves import curves
from sssd.profiles import open_data
from sssd.records import RunFolder, append
from sssd.runs import Store


def test_tensorboard_gets_what_the_run_records(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    store = Store(tmp_path / "runs")
    config = tiny(open_data("smoke", write_coco(tmp_path / "data")))
    files = RunFolder(store.folder(config))
    files.path.mkdir(parents=True)
    step = {"loss": 2.0, "distill": 0.5, "lambda": 50.0, "share": 0.25, "seconds": 9.0}
    append(files.metrics, {"iteration": 1, **step})
    with curves(tmp_path / "curves", store, [config]) as update:
        update()
        with files.metrics.open("a") as out:
            out.write('{"iteration": 2, "loss": 1.5')  # in the midst of being written
        update()
        with files.metrics.open("a") as out:
            out.write("}\n")
        append(files.evaluations, {"iteration": 2, "AP": 0.5, "teacher_AP": 0.75, "per_class": {}})
    (folder,) = (tmp_path / "curves").iterdir()
    read = events.EventAccumulator(str(folder))
    read.Reload()
    found = {
        name: [(e.step, e.value) for e in read.Scalars(name)] for name in read.Tags()["scalars"]
    }
    assert found == {
        "training/loss": [(1, 2.0), (2, 1.5)],
        "training/distill": [(1, 0.5)],
        "training/lambda": [(1, 50.0)],
        "training/share": [(1, 0.25)],
        "evaluation/AP": [(2, 0.5)],
        "evaluation/teacher_AP": [(2, 0.75)],
    }


def test_without_tensorboard_it_is_said_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    data = write_coco(tmp_path / "data")
    words = ["--store", str(tmp_path / "runs"), "train", "--profile", "smoke", "--data", str(data)]
    assert main([*words, "--tensorboard", str(tmp_path / "curves")]) == 2
    assert capsys.readouterr().err.startswith("sssd: tensorboard: not installed; expected")
    assert not (tmp_path / "runs").exists() and not (tmp_path / "curves").exists()
