"""What a run survives: damaged files, a full disk, a killed process, and data that change."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from helpers import assert_equal_runs, environment, python, tiny, write_coco

from sssd import pool
from sssd.config import DataSource
from sssd.engine import train
from sssd.evaluation import Detections
from sssd.inventory import listing
from sssd.profiles import open_data
from sssd.records import DiskFull, RunFolder, load_weights, write
from sssd.runs import RunsFailed, Store

BASELINE = {"method": "baseline", "trainable_stages": 0, "iterations": 4, "eval_every": 2}
STEPPED = {"method": "sssd", "trainable_stages": 0, "iterations": 4, "eval_every": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSource:
    return open_data("smoke", write_coco(tmp_path_factory.mktemp("faults") / "colours"))


@pytest.fixture(autouse=True)
def workers_find_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    monkeypatch.setattr(pool, "POLL_SECONDS", 0.1)


@pytest.fixture(scope="module")
def whole(data: DataSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run trained in one piece."""
    config = tiny(data, **BASELINE)
    folder = tmp_path_factory.mktemp("whole") / config.id
    train(config, folder)
    return folder


@pytest.fixture(scope="module")
def half(data: DataSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run up to iteration 3."""
    config = tiny(data, **BASELINE)
    folder = tmp_path_factory.mktemp("half") / config.id
    train(config, folder, until=3, checkpoint_seconds=0)
    return folder


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[Path], Path]:
    return lambda folder: shutil.copytree(folder, tmp_path / folder.name)


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]


def digit(content: bytes) -> bytes:
    """Another digit in the first line's number: JSON as before, and another record."""
    return re.sub(rb"\.(\d)", lambda d: b".%d" % (9 - int(d[1])), content, count=1)


def line(content: bytes) -> bytes:
    return content[: content.index(b"\n") + 1]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "flipped": flip,
    "digit": digit,
    "first line only": line,
    "truncated": lambda content: content[: len(content) * 2 // 3],
    "empty": lambda content: b"",
}


def damage(file: Path, kind: str) -> None:
    before = file.read_bytes()
    file.write_bytes(DAMAGE[kind](before))
    assert file.read_bytes() != before


# --- damaged files -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("last.pt", "flipped"),
        ("last.pt", "truncated"),
        ("last.pt", "empty"),
        ("metrics.jsonl", "digit"),
        ("metrics.jsonl", "first line only"),
        ("metrics.jsonl", "flipped"),
        ("evaluations.jsonl", "empty"),
        ("matches/000002-AP.npz", "flipped"),
    ],
)
def test_a_run_whose_files_were_damaged_ends_as_if_they_were_not(
    data: DataSource,
    whole: Path,
    half: Path,
    copy: Callable[[Path], Path],
    capsys: pytest.CaptureFixture[str],
    name: str,
    kind: str,
) -> None:
    folder = copy(half)
    damage(folder / name, kind)
    train(tiny(data, **BASELINE), folder)
    said = [x for x in capsys.readouterr().out.splitlines() if x.startswith("sssd: ")]
    assert any(str(folder / name) in x and x.endswith("begins again") for x in said), said
    assert "weights_only" not in " ".join(said)
    assert_equal_runs(folder, whole)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("evaluations.jsonl", "first line only"),
        ("metrics.jsonl", "digit"),
        ("weights.pt", "flipped"),
        ("detections.npz", "truncated"),
        ("matches/000004-AP.npz", "flipped"),
        ("done.json", "empty"),
        ("sums.json", "empty"),
    ],
)
def test_a_damaged_run_is_not_taken_for_a_finished_one(
    data: DataSource, whole: Path, copy: Callable[[Path], Path], name: str, kind: str
) -> None:
    folder, config = copy(whole), tiny(data, **BASELINE)
    store = Store(folder.parent)
    assert store.finished(config, weights=True)
    damage(folder / name, kind)
    assert str(folder / name) in RunFolder(folder).damage(weights=True)
    assert not store.finished(config, weights=True) and config.id in store.plan(
        [config], None, True
    )
    assert store.finished(config) == (name == "weights.pt")


def test_a_damaged_finished_run_is_trained_again(
    data: DataSource, whole: Path, copy: Callable[[Path], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    folder = copy(whole)
    damage(folder / "evaluations.jsonl", "first line only")
    (run,) = Store(folder.parent).get([tiny(data, **BASELINE)])
    errors = capfd.readouterr().err  # although the worker's own words go to its log
    assert f"{folder / 'evaluations.jsonl'} is shorter than it was" in errors
    assert run.evaluations()["iteration"].tolist() == [2, 4]
    assert_equal_runs(folder, whole)


def test_a_store_from_before_there_were_sums_is_read(
    data: DataSource, whole: Path, half: Path, copy: Callable[[Path], Path], tmp_path: Path
) -> None:
    config, folder = tiny(data, **BASELINE), copy(whole)
    (folder / "sums.json").unlink()
    assert Store(tmp_path).finished(config, weights=True)
    shutil.rmtree(folder)
    (copy(half) / "sums.json").unlink()
    state = load_weights(folder / "last.pt")
    del state["records"]
    torch.save(state, folder / "last.pt")
    train(config, folder)
    assert_equal_runs(folder, whole)


def test_a_stepwise_run_does_without_a_damaged_fork(
    data: DataSource, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(data, lambda2=75.0, t1=2, **STEPPED)
    parent = config.parent
    assert parent is not None
    train(parent, tmp_path / parent.id, until=2, keep={2})
    train(config, tmp_path / "alone" / config.id)
    damage(tmp_path / parent.id / "fork-2.pt", "flipped")
    train(config, tmp_path / config.id)
    said = capsys.readouterr().out
    assert "fork-2.pt is damaged" in said and "begins again" in said
    assert_equal_runs(tmp_path / config.id, tmp_path / "alone" / config.id)


def test_a_run_goes_on_from_its_own_fork_where_its_last_checkpoint_is_damaged(
    data: DataSource, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(data, **STEPPED)
    for name in ("one", "other"):
        train(config, tmp_path / name, until=3, keep={2}, checkpoint_seconds=0)
    damage(tmp_path / "one" / "last.pt", "truncated")
    train(config, tmp_path / "one")
    assert capsys.readouterr().out.strip().endswith("the run goes on from iteration 2")
    train(config, tmp_path / "other")
    assert_equal_runs(tmp_path / "one", tmp_path / "other")


def test_the_listing_names_a_damaged_file(
    data: DataSource, whole: Path, copy: Callable[[Path], Path]
) -> None:
    folder = copy(whole)
    shutil.copytree(folder, folder.parent / "other")
    for kind in ("empty", "truncated", "digit"):
        shutil.copy(whole / "config.json", folder)
        damage(folder / "config.json", kind)
        table = listing(folder.parent).set_index("run")
        assert str(folder / "config.json") in table.loc[folder.name, "state"]
    shutil.copy(whole / "config.json", folder)
    damage(folder / "metrics.jsonl", "digit")
    table = listing(folder.parent).set_index("run")
    assert str(folder / "metrics.jsonl") in table.loc[folder.name, "state"]


# --- what a run starts from ----------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "val"])
def test_annotations_that_change_before_training_are_noticed(tmp_path: Path, split: str) -> None:
    source = open_data("smoke", write_coco(tmp_path / "colours"))
    file = tmp_path / "colours" / "annotations" / f"instances_{split}.json"
    file.write_text(file.read_text() + "\n")
    with pytest.raises(ValueError, match="has changed since the run was configured") as error:
        train(tiny(source, **BASELINE), tmp_path / "run")
    assert str(file) in str(error.value) and not (tmp_path / "run" / "metrics.jsonl").exists()


def test_start_weights_that_change_before_training_are_noticed(
    data: DataSource, whole: Path, tmp_path: Path
) -> None:
    file = tmp_path / "start.pt"
    shutil.copy(whole / "weights.pt", file)
    config = tiny(data, **BASELINE | {"start": str(file)})
    torch.save(load_weights(whole / "weights.pt"), file)  # equal weights, in another file
    with pytest.raises(ValueError, match=f"^start: {file} has changed"):
        train(config, tmp_path / "run")


# --- weights that are not finite -----------------------------------------------------------------


def test_no_checkpoint_has_weights_that_are_not_finite(data: DataSource, tmp_path: Path) -> None:
    config = tiny(data, method="baseline", optimizer="sgd", lr=3e38, warmup=0, weight_decay=1.0)
    with pytest.raises(FloatingPointError, match=r"^iteration \d: "):
        train(config, tmp_path / "run", checkpoint_seconds=0)
    for file in (tmp_path / "run").glob("*.pt"):
        state = load_weights(file)["model"]
        assert all(bool(x.isfinite().all()) for x in state.values() if x.is_floating_point())


# --- a full disk ---------------------------------------------------------------------------------


def test_a_full_disk_is_named_and_leaves_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "file", b"before")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFull, match=f"the disk of {tmp_path} is full: file needs 4 KiB"):
        write(tmp_path / "file", bytes(4096))
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"before"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_training_on_a_full_disk_says_so_and_goes_on_with_more_room(
    data: DataSource, whole: Path, small_disk: Path
) -> None:
    config, store = tiny(data, **BASELINE), Store(small_disk)
    (small_disk / config.id).mkdir()
    with (small_disk / config.id / "log.txt").open("wb") as log:
        log.write(bytes(3 << 20))  # the log lies on the same disk
    with pytest.raises(RunsFailed, match="DiskFull: the disk of .* is full: .* KiB are free"):
        store.get([config], jobs=1)
    assert not list(small_disk.rglob(".*.part"))
    subprocess.run(["mount", "-o", "remount,size=400m", str(small_disk)], check=True)
    store.get([config], jobs=1)
    assert_equal_runs(small_disk / config.id, whole)


# --- killed processes ----------------------------------------------------------------------------

ASK = """
import pickle, sys
from sssd.runs import Store
Store(sys.argv[1]).get([pickle.load(open(sys.argv[2], "rb"))])
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")
def test_a_run_outlives_neither_who_asked_nor_the_worker(data: DataSource, tmp_path: Path) -> None:
    """Killed together, neither can stop it."""
    config = tiny(data, **BASELINE | {"iterations": 400, "eval_every": 400})
    store, file = Store(tmp_path), tmp_path / "config"
    file.write_bytes(pickle.dumps(config))
    asking = python(ASK, tmp_path, file)
    while not store.files(config).reached():
        assert asking.poll() is None, asking.communicate()
        time.sleep(0.05)
    (worker,) = children(asking.pid)
    assert children(worker)
    for id in (asking.pid, worker):
        os.kill(id, signal.SIGKILL)
    asking.wait()
    with FileLock(store.root / f"{config.id}.lock", timeout=30):  # the run at work held it
        assert not store.finished(config)


def children(process: int) -> list[int]:
    """The processes that have this one as their parent."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = file.read_text().rpartition(")")[2].split()[1]
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended
        found += [int(file.parent.name)] if int(parent) == process else []
    return found


def test_a_parent_killed_before_its_fork_writes_it_after_all(
    data: DataSource, tmp_path: Path
) -> None:
    config = tiny(data, lambda2=75.0, t1=3, **STEPPED)
    parent, store = config.parent, Store(tmp_path)
    assert parent is not None
    folder = store.folder(parent)
    train(parent, folder, until=2, checkpoint_seconds=0)
    state = (folder / "last.pt").read_bytes()
    train(parent, folder, until=3)  # as if killed here, before the fork and the next checkpoint
    (folder / "last.pt").write_bytes(state)
    assert store.files(parent).reached() == 3 and not RunFolder(folder).fork(3).exists()
    plan = store.plan([config])
    assert list(plan) == [parent.id, config.id] and plan[config.id].after == {parent.id}
    store.get([config], jobs=1)
    seconds = [[line["seconds"] for line in map(json.loads, (store.folder(run) / "metrics.jsonl")
               .read_text().splitlines())] for run in (parent, config)]  # fmt: skip
    assert seconds[0] == seconds[1][:3]  # the shared part was not trained again


REPORTS = """
import runpy, sys
from pathlib import Path
from sssd.reproduce import build, experiment
place = sys.argv[1]
build.home = experiment.home = lambda: Path(place)
sys.argv = ["sssd", "--store", place, "reports", "--profile", "smoke", "--only", "losses"]
runpy.run_module("sssd", run_name="__main__")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")
def test_a_stopped_report_leaves_no_process_behind(tmp_path: Path, number: int) -> None:
    building = python(REPORTS, tmp_path)
    kernels: list[int] = []
    while not kernels:  # papermill starts one
        assert building.poll() is None, building.communicate()
        papermills = children(building.pid)
        kernels = [kernel for papermill in papermills for kernel in children(papermill)]
        time.sleep(0.1)
    building.send_signal(number)
    _, errors = building.communicate(timeout=300)
    if number == signal.SIGTERM:
        assert building.returncode == 130 and "interrupted" in errors, errors
    end = time.monotonic() + 120
    while left := [id for id in (*papermills, *kernels) if alive(id)]:
        assert time.monotonic() < end, left
        time.sleep(0.1)


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_processes_write_the_same_file_side_by_side(tmp_path: Path) -> None:
    """As two calls of ``reports`` do: neither removes or renames what the other has begun."""
    code = (
        "import sys, pathlib\nfrom sssd.records import write\n"
        "for _ in range(300): write(pathlib.Path(sys.argv[1]), sys.argv[2].encode() * 50000)"
    )
    both = [python(code, tmp_path / "file", letter) for letter in "ab"]
    for process in both:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert (tmp_path / "file").read_bytes() in (b"a" * 50000, b"b" * 50000)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_detections_say_when_they_are_damaged(whole: Path, copy: Callable[[Path], Path]) -> None:
    folder = copy(whole)
    for kind in ("truncated", "empty"):
        damage(folder / "detections.npz", kind)
        with pytest.raises(ValueError, match=f"^{folder / 'detections.npz'} is damaged"):
            Detections.load(folder / "detections.npz")
        shutil.copy(whole / "detections.npz", folder)
