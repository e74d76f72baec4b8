"""The run store: what it plans, that it trains each run once, and what survives a failure."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from helpers import assert_equal_runs, chain, environment, python, tiny, write_coco

from sssd import pool, runs
from sssd.config import DataSource, RunConfig
from sssd.engine import evaluate_run, train
from sssd.evaluation import METRICS, evaluate
from sssd.intervals import average_precision
from sssd.inventory import listing
from sssd.profiles import configure, open_data, open_split
from sssd.runs import Run, Store


@pytest.fixture(scope="module", autouse=True)
def workers_find_the_package() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
        patch.setattr(pool, "POLL_SECONDS", 0.1)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSource:
    return open_data("smoke", write_coco(tmp_path_factory.mktemp("runs") / "colours"))


def parent(config: RunConfig) -> RunConfig:
    assert config.parent is not None
    return config.parent


# --- the plan -----------------------------------------------------------------------------------


def finish(store: Store, config: RunConfig, reached: int = 0, forks: tuple[int, ...] = ()) -> None:
    """Files as a run leaves them that was trained to its end, or as far as ``reached``."""
    folder = store.folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    last = reached or config.iterations
    lines = [json.dumps({"iteration": t}) + "\n" for t in range(1, last + 1)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    (folder / "last.pt" if reached else folder / "done.json").write_text("{}")
    for t in forks:
        (folder / f"fork-{t}.pt").touch()


def test_a_fixed_run_needs_its_warm_start(data: DataSource, tmp_path: Path) -> None:
    store = Store(tmp_path)
    config = configure("smoke", data=data)
    crops, detector, teacher, _ = chain(config)
    plan = store.plan([config])
    assert list(plan) == [crops.id, detector.id, teacher.id, config.id]
    assert [job.after for job in plan.values()] == [
        set(), {crops.id}, {detector.id}, {teacher.id},
    ]  # fmt: skip
    assert all(job.until is None and not job.keep for job in plan.values())
    finish(store, crops)
    assert list(store.plan([config])) == [detector.id, teacher.id, config.id]
    finish(store, detector)
    finish(store, teacher)
    assert list(store.plan([config])) == [config.id]
    assert store.plan([config])[config.id].after == set()
    finish(store, config)
    assert store.plan([config]) == {} and store.finished(config)


def test_a_stepwise_run_needs_its_parent_as_far_as_the_switch(
    data: DataSource, tmp_path: Path
) -> None:
    store, config = Store(tmp_path), configure("smoke", data=data, lambda2=75.0)
    fixed, detector = parent(config), chain(config)[-2]
    plan = store.plan([config])
    assert list(plan) == [*(run.id for run in chain(config)[:-1]), fixed.id, config.id]
    assert plan[config.id].after == {detector.id, fixed.id}
    assert plan[config.id].until is None
    assert (plan[fixed.id].until, plan[fixed.id].keep) == (8, {8})
    assert plan[fixed.id].after == {detector.id}


@pytest.mark.parametrize("order", [1, -1])
def test_a_parent_that_is_asked_for_itself_is_trained_in_full(
    data: DataSource, tmp_path: Path, order: int
) -> None:
    config = tiny(data, lambda2=75.0, t1=3)
    plan = Store(tmp_path).plan([config, parent(config)][::order])
    assert list(plan) == [parent(config).id, config.id]
    assert plan[parent(config).id].until is None and 3 in plan[parent(config).id].keep


def test_forks_of_one_parent_share_it(data: DataSource, tmp_path: Path) -> None:
    early, late = (tiny(data, lambda2=75.0, t1=t1) for t1 in (3, 6))
    other = tiny(data, lambda2=100.0, t1=6)
    assert parent(early).id == parent(late).id == parent(other).id
    plan = Store(tmp_path).plan([early, late, other, late])
    assert set(plan) == {parent(early).id, early.id, late.id, other.id}
    assert (plan[parent(early).id].until, plan[parent(early).id].keep) == (6, {3, 6})


def test_what_a_stepwise_run_no_longer_needs_is_not_trained(
    data: DataSource, tmp_path: Path
) -> None:
    store, config = Store(tmp_path), tiny(data, lambda2=75.0)
    finish(store, parent(config), forks=(5,))
    assert list(store.plan([config])) == [config.id]  # from the parent's checkpoint
    other = tiny(data, lambda2=75.0, t1=3)
    assert list(store.plan([other])) == [other.id]  # from the beginning: none was kept at 3
    begun = tiny(data, lambda2=75.0, seed=1)
    finish(store, begun, reached=2)
    assert list(store.plan([begun])) == [begun.id]  # it goes on from where it is


def test_the_longest_chain_begins_first(data: DataSource, tmp_path: Path) -> None:
    start = tiny(data, method="baseline", iterations=4)
    last, alone = tiny(data, start=start, iterations=6), tiny(data, iterations=7)
    plan = Store(tmp_path).plan([alone, last])
    assert list(plan) == [alone.id, start.id, last.id]
    assert list(pool.longest_first(plan)) == [start.id, alone.id, last.id]


def test_a_job_begins_where_its_run_is(data: DataSource, tmp_path: Path) -> None:
    store, config = Store(tmp_path), tiny(data, lambda2=75.0)
    job = store.plan([config])[config.id]
    assert (config.t1, job.reached, job.length) == (5, 5, 8)  # with the iterations of its parent
    early = store.plan([config], until=3)[config.id]
    assert (early.reached, early.length) == (3, 3)
    finish(store, config, reached=6)
    assert (job.reached, early.reached) == (6, 3)


@pytest.mark.parametrize(
    ("visible", "expected"), [(None, ["0", "1", "0"]), ("2,5", ["2", "5", "2"])]
)
def test_each_worker_has_one_of_the_gpus_that_may_be_used(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, expected: list[str]
) -> None:
    monkeypatch.setattr(pool.torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    given: list[str] = []

    def launched(*args: Any, env: dict[str, str], **kwargs: Any) -> None:
        given.append(env["CUDA_VISIBLE_DEVICES"])
        raise OSError

    monkeypatch.setattr(subprocess, "Popen", launched)
    for slot in range(3):
        with pytest.raises(OSError):
            pool.Worker(slot).start(Path("log"), print)
    assert given == expected


def test_a_plan_as_far_as_an_iteration(data: DataSource, tmp_path: Path) -> None:
    store, config = Store(tmp_path), tiny(data)
    assert store.plan([config], until=4)[config.id].until == 4
    assert store.plan([config], until=8)[config.id].until is None
    finish(store, config, reached=4)
    assert store.plan([config], until=4) == {} and store.finished(config, until=4)
    assert store.plan([config], until=5)[config.id].until == 5
    assert store.plan([config])[config.id].until is None and not store.finished(config)


# --- training -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full(
    data: DataSource, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Store, list[RunConfig], list[Run]]:
    """A store that was asked for a stepwise run and the plain detector that it starts from."""
    store = Store(tmp_path_factory.mktemp("store") / "runs")
    detector = tiny(data, method="baseline", iterations=4, trainable_stages=0)
    configs = [tiny(data, start=detector, lambda2=75.0, trainable_stages=0), detector]
    return store, configs, store.get(configs, jobs=2)


def test_what_is_missing_is_trained_in_order(
    full: tuple[Store, list[RunConfig], list[Run]], tmp_path: Path
) -> None:
    store, configs, found = full
    assert [run.config for run in found] == configs
    stepwise, detector = configs
    names = {detector.id, parent(stepwise).id, stepwise.id}
    assert {file.name for file in store.root.iterdir() if file.is_dir()} == names

    def times(config: RunConfig) -> tuple[int, int]:
        folder = store.folder(config)
        return tuple((folder / f).stat().st_mtime_ns for f in ("environment.json", "metrics.jsonl"))

    assert times(detector)[1] < times(parent(stepwise))[0]
    assert times(parent(stepwise))[1] < times(stepwise)[0]
    assert store.finished(detector) and store.finished(stepwise)
    assert not store.finished(parent(stepwise)) and store.files(parent(stepwise)).reached() == 5
    # In processes of their own, or in this one without a fork: the same runs.
    for config in (detector, stepwise):
        train(config, tmp_path / config.id)
        assert_equal_runs(store.folder(config), tmp_path / config.id)


def test_a_finished_run_is_not_trained_again(
    full: tuple[Store, list[RunConfig], list[Run]], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, configs, _ = full

    def state() -> dict[Path, int]:
        return {file: file.stat().st_mtime_ns for file in store.root.rglob("*")}

    def launched(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a process was started")

    before = state()
    monkeypatch.setattr(subprocess, "Popen", launched)
    monkeypatch.chdir(store.root)
    again = Store(store.root).get([*configs, *configs], until=2)
    assert [run.config for run in again] == [*configs, *configs] and state() == before
    assert store.get([]) == []


def test_a_run_gives_its_records(
    full: tuple[Store, list[RunConfig], list[Run]], data: DataSource
) -> None:
    _, configs, found = full
    run = found[0]
    metrics = run.metrics()
    assert metrics["iteration"].tolist() == list(range(1, 9))
    assert {"loss", "distill", "lambda", "share", "lr", "gradient_norm", "seconds"} <= set(metrics)
    assert metrics["lambda"].tolist() == [50.0] * 5 + [75.0] * 3
    evaluations = run.evaluations()
    assert evaluations.columns.tolist() == [
        *("iteration", *METRICS, "seconds_per_image"),
        *("teacher_AP", "teacher_AP50", "teacher_AP75"),
    ]
    assert evaluations["iteration"].tolist() == [4, 8]
    for i, t in enumerate((4, 8)):  # the teacher is evaluated with its student
        teacher = run.matches(t, "teacher")
        for measure, matches in (("AP", teacher), ("AP50", teacher.at(0)), ("AP75", teacher.at(5))):
            taught = average_precision(matches, np.ones((1, 4)))
            assert taught[0] == pytest.approx(evaluations[f"teacher_{measure}"].iloc[i], abs=1e-12)
    assert "teacher_AP" not in found[1].evaluations()
    assert set(run.files.last_evaluation()["per_class"]) == {"colour 3", "colour 7"}
    record = run.record()
    assert record["label"] == configs[0].label()
    assert record["config"]["lambda2"] == 75.0 and record["done"]["iterations"] == 8
    assert record["environment"]["torch"] and str(data.paths["train_images"]) not in str(record)
    expected = evaluate(open_split(data, "val"), run.detections())
    assert expected.summary["AP"] == evaluations["AP"].iloc[-1]
    for measure, matches in expected.by_measure.items():
        assert np.array_equal(run.matches(measure=measure).matched, matches.matched)
    strict = run.matches(measure="AP75")
    assert strict is run.matches(measure="AP75")  # its replicates are kept by identity
    ap75 = average_precision(strict, np.ones((1, 4)))
    assert ap75[0] == pytest.approx(expected.summary["AP75"], abs=1e-12)
    assert run.matches().image_ids.tolist() == run.matches(4).image_ids.tolist() == [1, 2, 3, 4]
    with pytest.raises(FileNotFoundError):
        run.matches(5)
    assert run.compared >= {(8, "AP"), (8, "AP_S"), (4, "AP"), (4, "teacher")}


def test_the_listing_has_a_row_a_run(full: tuple[Store, list[RunConfig], list[Run]]) -> None:
    store, (config, detector), found = full
    (store.root / "not a run").mkdir(exist_ok=True)
    table = listing(store.root).set_index("run")
    assert set(table.index) == {config.id, parent(config).id, detector.id}
    row = table.loc[config.id]
    assert (row["method"], row["λ"], row["detector"]) == ("sssd", "50→75", "faster_rcnn")
    assert (row["iterations"], row["state"], row["seed"]) == ("8/8", "finished", 0)
    assert row["AP"] == f"{found[0].evaluations()['AP'].iloc[-1]:.3f}"
    assert row["data"] == "colours"
    row = table.loc[parent(config).id]
    assert (row["λ"], row["iterations"], row["state"]) == ("50", "5/8", "unfinished")
    assert (table.loc[detector.id, "method"], table.loc[detector.id, "λ"]) == ("baseline", "")


def test_a_store_without_runs_is_empty(tmp_path: Path) -> None:
    assert len(listing(tmp_path / "absent")) == 0
    assert not (tmp_path / "absent").exists()


def test_two_at_once_train_a_run_once(data: DataSource, tmp_path: Path) -> None:
    config, results = tiny(data, method="baseline", trainable_stages=0), []

    def ask() -> None:
        results.append(Store(tmp_path / "runs").get([config], jobs=1))

    both = [threading.Thread(target=ask) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join(timeout=120)
    assert [run.config for (run,) in results] == [config, config]
    folder = tmp_path / "runs" / config.id
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == list(range(1, 9))
    assert len((folder / "evaluations.jsonl").read_text().splitlines()) == 2
    train(config, tmp_path / config.id)
    assert_equal_runs(folder, tmp_path / config.id)


def test_a_run_is_waited_for_no_longer_than_it_is_needed(
    data: DataSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stepwise run begins as soon as its parent, trained elsewhere, has the checkpoint at T1."""
    store, config = Store(tmp_path), tiny(data, lambda2=75.0)
    job = store.plan([config])[parent(config).id]
    monkeypatch.setattr(runs, "LOCK_SECONDS", 0.05)
    waiter = threading.Thread(target=runs.train_once, args=(tmp_path, job))
    with FileLock(tmp_path / f"{parent(config).id}.lock"):
        finish(store, parent(config), reached=4)
        waiter.start()
        waiter.join(timeout=1)
        assert waiter.is_alive()
        finish(store, parent(config), reached=6, forks=(5,))
        waiter.join(timeout=60)
        assert not waiter.is_alive()
    assert store.files(parent(config)).reached() == 6


def test_a_failing_run_stops_no_other(
    data: DataSource, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(tmp_path)
    diverges = {"optimizer": "sgd", "lr": 1e30, "warmup": 0}
    bad = tiny(data, method="sssd", lambda2=75.0, iterations=40, **diverges)
    good = tiny(data, method="baseline", iterations=2)
    with pytest.raises(RuntimeError) as error:
        store.get([bad, good], jobs=2)
    message = str(error.value)
    assert message.startswith("2 of 3 runs failed")
    (of_parent,) = (line for line in message.splitlines() if parent(bad).id in line)
    assert parent(bad).label() in of_parent and "FloatingPointError: iteration" in of_parent
    (of_fork,) = (line for line in message.splitlines() if f"({bad.id})" in line)
    assert bad.label() in of_fork and "starts from failed" in of_fork
    assert good.id not in message and store.finished(good)
    assert not store.finished(bad) and not (store.folder(bad) / "metrics.jsonl").exists()
    log = (store.folder(parent(bad)) / "log.txt").read_text()
    assert "Traceback" in log and "not finite" in log
    printed = capsys.readouterr().out
    assert "3 runs to train, 2 at a time" in printed and "3 runs" in printed
    assert store.get([good])[0].evaluations()["iteration"].tolist() == [2]


def test_an_interrupted_run_can_be_asked_for_again(
    data: DataSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, config = Store(tmp_path / "runs"), tiny(data, iterations=16, trainable_stages=0)
    started: list[subprocess.Popen[bytes]] = []
    popen, sleep = subprocess.Popen, time.sleep

    def remember(*args: Any, **kwargs: Any) -> subprocess.Popen[bytes]:
        started.append(popen(*args, **kwargs))
        return started[-1]

    def interrupt(seconds: float) -> None:
        sleep(seconds)
        if store.files(config).reached() >= 1:
            raise KeyboardInterrupt  # as Ctrl-C, or the notebook's stop button, does

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(subprocess, "Popen", remember)
        patch.setattr(pool.time, "sleep", interrupt)
        store.get([config])
    assert len(started) == 1 and started[0].wait(timeout=30) != 0  # it does not go on alone
    assert not store.finished(config) and 1 <= store.files(config).reached() < 16
    assert listing(store.root)["state"].tolist() == ["unfinished"]

    (part,) = store.get([config], until=7)
    assert part.metrics()["iteration"].tolist() == list(range(1, 8))
    assert part.evaluations()["iteration"].tolist() == [4]
    assert not store.finished(config) and store.finished(config, until=7)
    train(config, store.folder(config))
    assert store.finished(config) and part.evaluations()["iteration"].tolist() == [4, 8, 12, 16]
    train(config, tmp_path / config.id)
    assert_equal_runs(store.folder(config), tmp_path / config.id)


@pytest.mark.skipif(sys.platform != "linux", reason="runs are forked on Linux only")
def test_a_run_does_not_outlive_who_asked_for_it(data: DataSource, tmp_path: Path) -> None:
    """Whoever asked may be killed without a chance to stop its workers."""
    config = tiny(data, iterations=400, trainable_stages=0, eval_every=400)
    store, file = Store(tmp_path), tmp_path / "config"
    file.write_bytes(pickle.dumps(config))
    asking = python(
        "import pickle, sys; from sssd.runs import Store\n"
        "Store(sys.argv[1]).get([pickle.load(open(sys.argv[2], 'rb'))])",
        tmp_path,
        file,
    )
    while not store.files(config).reached():
        assert asking.poll() is None, asking.communicate()
        time.sleep(0.05)
    asking.kill()
    asking.wait()
    with FileLock(store.root / f"{config.id}.lock", timeout=30):  # the run at work held it
        assert not store.finished(config)


@pytest.mark.parametrize("jobs", [-1, 0])
def test_a_number_of_processes_that_trains_nothing_is_refused(
    data: DataSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: int
) -> None:
    def waited(seconds: float) -> None:
        raise AssertionError("waits for processes that are never started")

    def launched(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(pool.time, "sleep", waited)
    monkeypatch.setattr(subprocess, "Popen", launched)
    with pytest.raises(ValueError, match=f"jobs: {jobs}"):
        Store(tmp_path).get([tiny(data)], jobs=jobs)
    finish(Store(tmp_path), tiny(data))
    (Store(tmp_path).folder(tiny(data)) / "weights.pt").touch()
    with pytest.raises(ValueError, match=f"jobs: {jobs}"):
        Store(tmp_path).test([tiny(data)], tmp_path, jobs=jobs)


# --- where it lies ------------------------------------------------------------------------------


def test_the_store_lies_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSSD_RUNS", str(tmp_path / "mine"))
    assert Store().root == tmp_path / "mine"
    assert Store(tmp_path / "other").root == tmp_path / "other"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SSSD_RUNS", "~/runs")
    assert Store().root == Store("~/runs").root == tmp_path / "runs"
    monkeypatch.setenv("SSSD_RUNS", "relative")
    monkeypatch.chdir(tmp_path)
    store = Store()
    monkeypatch.chdir("/")
    assert store.root == tmp_path / "relative"  # and there it stays


def test_the_default_store_is_the_checkouts_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout = Path(runs.__file__).parents[1]
    monkeypatch.setenv("SSSD_RUNS", "")  # as if it were not set
    assert Store().root == runs.home() / "runs"
    monkeypatch.delenv("SSSD_RUNS")
    if (checkout / "pyproject.toml").exists():
        assert Store().root == checkout / "runs"
        monkeypatch.chdir(tmp_path)
        assert Store().root == checkout / "runs"
    # Installed without a checkout there is nothing but the folder one is in.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "__file__", str(tmp_path / "site-packages" / "sssd" / "runs.py"))
    assert Store().root == tmp_path / "runs"


# --- further images -------------------------------------------------------------------------------


def test_finished_students_are_evaluated_on_further_images_once(
    data: DataSource, tmp_path: Path
) -> None:
    store, other = Store(tmp_path / "runs"), write_coco(tmp_path / "other", val=6)
    configs = [tiny(data, method="baseline", seed=seed, iterations=4) for seed in (0, 1)]
    (first, _) = store.get(configs, jobs=1)
    store.test(configs, other, jobs=1)
    found, expected = first.matches(test=True), evaluate_run(first.folder, other)[0]
    for measure in ("AP", "AP50", "AP75"):
        own = first.matches(measure=measure, test=True)
        ap = average_precision(own, np.ones((1, 6)))[0]
        assert ap == pytest.approx(expected[measure], abs=1e-12, nan_ok=True)
    assert len(found.image_ids) == 6 != len(first.matches().image_ids)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*test.npz")}
    assert len(before) == 2
    store.test(configs, other, jobs=1)
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert store.finished(configs[0], weights=True)  # what was added is no damage


def test_a_failed_evaluation_is_named(data: DataSource, tmp_path: Path) -> None:
    store, config = Store(tmp_path / "runs"), tiny(data, method="baseline", iterations=4)
    store.get([config], jobs=1)
    with pytest.raises(
        runs.RunsFailed, match=f"1 of 1 evaluations failed:\n- .* \\({config.id}\\): "
    ):
        store.test([config], tmp_path / "nowhere", jobs=1)
