"""Live curves follow a run's records."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from unittest.mock import Mock

import pytest
from helpers import tiny, write_coco

from sssd import curves as module
from sssd.__main__ import main
from sssd.curves import curves, show
from sssd.profiles import open_data
from sssd.records import RunFolder, append
from sssd.runs import Store


def test_tensorboard_gets_what_the_run_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SECONDS", 0.01)
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    store = Store(tmp_path / "runs")
    config = tiny(open_data("smoke", write_coco(tmp_path / "data")))
    files = store.files(config)
    files.path.mkdir(parents=True)
    step = {"loss": 2.0, "distill": 0.5, "lambda": 50.0, "share": 0.25, "seconds": 9.0}
    append(files.metrics, {"iteration": 1, **step})
    with curves(tmp_path / "curves", store, [config]):
        append(files.metrics, {"iteration": 2, "loss": 1.5})
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


def test_a_run_that_is_cut_back_and_goes_on_is_shown_once(tmp_path: Path) -> None:
    files, writer, shown = RunFolder(tmp_path), Mock(), Counter[Path]()

    def look() -> list[tuple[str, float, int]]:
        """What another look shows."""
        writer.reset_mock()
        show({files: writer}, shown)
        return [call.args for call in writer.add_scalar.call_args_list]

    assert look() == []  # nothing there yet
    for t in (1, 2, 3):
        append(files.metrics, {"iteration": t, "loss": t / 2, "seconds": 0.25})
    assert look() == [("training/loss", t / 2, t) for t in (1, 2, 3)]
    whole = files.metrics.read_text()
    files.metrics.write_text(whole.partition("\n")[0] + "\n")  # back to the checkpoint
    append(files.metrics, {"iteration": 2, "loss": 1.0, "seconds": 0.123456789})  # a longer line
    assert look() == []
    append(files.metrics, {"iteration": 3, "loss": 1.5, "seconds": 0.5})
    with files.metrics.open("a") as out:
        out.write('{"iteration": 4, "loss": 2')  # in the midst of being written
    assert look() == []
    with files.metrics.open("a") as out:
        out.write(".0}\n")
    assert look() == [("training/loss", 2.0, 4)]
    append(files.evaluations, {"iteration": 4, "AP": 0.5})
    files.metrics.write_text("damaged\n")
    assert look() == [("evaluation/AP", 0.5, 4)]  # the damaged file waits
    files.metrics.write_text("")
    append(files.metrics, {"iteration": 5, "loss": 2.5})
    assert look() == [("training/loss", 2.5, 5)]


def test_without_tensorboard_it_is_said_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    data = write_coco(tmp_path / "data")
    words = ["--store", str(tmp_path / "runs"), "train", "--profile", "smoke", "--data", str(data)]
    assert main([*words, "--tensorboard", str(tmp_path / "curves")]) == 2
    assert capsys.readouterr().err.startswith("sssd: tensorboard: not installed; expected")
    assert not (tmp_path / "runs").exists() and not (tmp_path / "curves").exists()
