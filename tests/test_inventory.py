"""What the store holds is told, compared and pruned from its folders alone."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from helpers import chain, tiny, write_coco

from sssd import inventory
from sssd.__main__ import main
from sssd.config import RunConfig
from sssd.evaluation import Matches
from sssd.intervals import difference
from sssd.profiles import configure
from sssd.records import RunFolder
from sssd.runs import Run, Store


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco(tmp_path_factory.mktemp("inventory") / "colours")


def kept(store: Store, config: RunConfig, done: bool = True) -> RunFolder:
    """A run's folder as training leaves it, without the training."""
    files = store.files(config)
    files.begin(config.canonical())
    files.record_step({"iteration": config.iterations if done else 1})
    if config.method != "crops":
        line = {"iteration": config.iterations, "AP": float("nan") if config.seed else 0.25}
        files.evaluations.write_text(json.dumps(line | {"per_class": {}}) + "\n")
    if done:
        (files.path / "done.json").write_text("{}")
    return files


def test_profiles_and_warm_starts_are_told(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(tmp_path)
    asked = {"data": data, "detector": "fcos", "seed": 3}
    taught = configure("smoke", **asked, lambda1=60, lambda2=70)
    for config in (
        *chain(taught),
        configure("paper", **asked, method="lgd"),
        configure("mini", **asked, method="labelenc").start,
        configure("mini", **asked, method="labelenc", eval_every=300),  # as in Table 1
        configure("mini", **asked, clip=0.5),
    ):
        kept(store, config, done=config is not taught)
    assert main(["--store", str(tmp_path), "runs", "--json"]) == 0
    told = {(r["method"], r["warm_start"]): r for r in json.loads(capsys.readouterr().out)}
    assert {key: row["profile"] for key, row in told.items() if row["method"] not in ("sssd",)} == {
        ("crops", "crops"): "smoke",
        ("baseline", "detector"): "smoke",
        ("lgd", "teacher"): "smoke",
        ("lgd", ""): "paper",
        ("labelenc_stage1", ""): "mini, night",
        ("labelenc", ""): "mini, night",
    }
    rows = [r for r in inventory.records(tmp_path) if r["method"] == "sssd"]
    assert sorted(r["profile"] for r in rows) == ["", "smoke"]
    (own,) = [r for r in rows if r["profile"]]
    assert own["run"] == taught.id and not own["finished"] and own["lambda2"] == 70
    assert own["AP"] is None and own["seed"] == 3  # NaN is no JSON
    size = sum(f.stat().st_size for f in store.folder(taught).rglob("*") if f.is_file())
    assert own["bytes"] == size > 0
    table = inventory.listing(store.root).set_index("run")
    assert table.loc[taught.id, "λ"] == "60→70" and table.loc[taught.id, "state"] == "unfinished"
    assert set(table["method"]) >= {f"warm start: {x}" for x in ("crops", "detector", "teacher")}
    assert table.loc[chain(taught)[0].id, "state"] == "finished"


@pytest.mark.parametrize(
    "content", ["{}", "[]", "null", '{"data": "x"}', '{"data": {}, "start": 1}']
)
def test_a_configuration_of_another_form_damages_no_other_run(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    store = Store(tmp_path)
    damaged, whole = (kept(store, tiny(data, seed=seed)) for seed in (1, 2))
    (damaged.path / "config.json").write_text(content)
    assert main(["--store", str(tmp_path), "runs"]) == 0
    why = f"{damaged.path / 'config.json'} is damaged: it is not run {damaged.id}'s"
    assert why in capsys.readouterr().out
    by_id = {row["run"]: row for row in inventory.records(tmp_path)}
    assert by_id[damaged.id] == {"run": damaged.id, "damage": why}
    assert by_id[whole.id]["damage"] == "" and by_id[whole.id]["finished"]
    assert main(["--store", str(tmp_path), "prune"]) == 2  # it may need a checkpoint
    assert capsys.readouterr().err == f"sssd: {why}\n"


def test_an_imported_run_is_named_by_its_id(
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    store = Store(tmp_path / "runs")
    files = kept(store, tiny(data))
    files.path.rename(tmp_path / "records")
    files.path.mkdir()
    (tmp_path / "records").rename(files.imported.path)
    assert files.imported.id == files.id == files.path.name
    assert files.imported.is_imported and not files.is_imported
    (row,) = inventory.records(store.root)
    assert row["run"] == files.id and row["imported"]
    for words, why in (
        (["compare", files.id, "--with", files.id], f"runs: {files.id} kept nothing on AP"),
        (["evaluate", files.id, str(data)], f"run: {files.id} was imported without"),
        (["detect", files.id, "photo.jpg"], f"run: {files.id} was imported without"),
        (["export", files.id, "student.pt"], f"run: {files.id} was imported without"),
    ):
        assert main(["--store", str(store.root), *words]) == 2
        assert capsys.readouterr().err.startswith(f"sssd: {why}")


def test_prune_frees_what_nothing_reads(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(tmp_path)
    free, awaited, busy = (kept(store, tiny(data, seed=seed)) for seed in (1, 2, 3))
    kept(store, tiny(data, seed=1, lambda2=75.0))
    going = kept(store, tiny(data, seed=2, lambda2=75.0), done=False)
    held = FileLock(tmp_path / f"{busy.path.name}.lock")
    removed = [free.fork(5), free.path / "last.pt", free.path / "matches" / ".x.npz.part"]
    removed += [tmp_path / f"{free.path.name}.lock", tmp_path / "0123456789ab.lock"]
    stay = [awaited.fork(5), busy.fork(5), going.path / "last.pt", going.path / ".y.pt.part"]
    stay += [tmp_path / f"{going.path.name}.lock", free.path / "weights.pt"]
    for file in (*removed, *stay):
        file.write_bytes(b"x" * 500_000)
    os.utime(removed[2], (0, 0))  # left by a crash long ago; the other is being written
    with held:
        before = {file: file.stat().st_mtime for file in tmp_path.rglob("*")}
        assert main(["--store", str(tmp_path), "prune", "--dry-run"]) == 0
        assert "prune would free 2.5 MB" in capsys.readouterr().out
        assert {file: file.stat().st_mtime for file in tmp_path.rglob("*")} == before
        assert main(["--store", str(tmp_path), "prune"]) == 0
    printed = capsys.readouterr().out
    assert "2 checkpoints, 1.0 MB" in printed and "prune has freed 2.5 MB" in printed
    assert set(before) - set(tmp_path.rglob("*")) == set(removed)
    assert main(["--store", str(tmp_path), "prune"]) == 0  # busy's training has ended
    assert not busy.fork(5).exists() and awaited.fork(5).exists()


def test_a_stepwise_run_needs_no_checkpoint(data: Path, tmp_path: Path) -> None:
    """Without it the run trains its first part itself: pruning changes no number."""
    store = Store(tmp_path / "runs")
    fields = {"iterations": 4, "eval_every": 1, "t1": 2, "milestones": (2, 3), "distill_start": 0}
    (first,) = store.get([tiny(data, **fields)], jobs=1)
    config = tiny(data, **fields, lambda2=75.0)
    assert first.files.fork(2).exists() and inventory.prune(store.root)["checkpoints"]
    assert not first.files.fork(2).exists()
    (run,) = store.get([config], jobs=1)
    losses = [r.metrics()["loss"].tolist() for r in (first, run)]
    assert losses[0][:2] == losses[1][:2] and losses[0][2] != losses[1][2]


def test_compare_pairs_by_seed(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, draw = Store(tmp_path), np.random.default_rng(0)
    images = np.arange(20)
    runs: dict[tuple[str, int], Run] = {}
    for method, share in (("sssd", 0.8), ("baseline", 0.5)):
        for seed in (1, 2):
            config = tiny(data, method=method, seed=seed)
            files = kept(store, config)
            hit = draw.random((20, 1)) < share
            one = np.ones((1, 20), np.int32)
            arrays = (images.astype(np.int32), hit, np.zeros_like(hit))
            matches = Matches(images, one, np.array([0, 20]), *arrays)
            matches.save(files.matches(config.iterations, "AP"))
            runs[method, seed] = Run(config, files.path)
    words = ["--store", str(tmp_path), "compare"]
    ours = [runs["sssd", seed].config.id for seed in (2, 1)]  # in any order
    theirs = [runs["baseline", seed].config.id for seed in (1, 2)]
    assert main([*words, *ours, "--with", *theirs]) == 0
    pairs = [[runs[m, seed].matches() for seed in (1, 2)] for m in ("sssd", "baseline")]
    expected = difference(*pairs)
    assert expected.estimate > 0
    said = f"AP: {expected} (95 % interval, paired; 2 seeds, 20 images)\n"
    assert capsys.readouterr().out == said
    (store.folder(runs["sssd", 2].config) / "done.json").unlink()
    for given, with_, sentence in (
        (ours[1:], theirs, "seeds [1] against [1, 2]"),
        ([ours[1], theirs[0]], theirs, "two runs of seed 1"),
        (ours, theirs, "is not finished"),
        (ours[1:], ["--measure", "teacher"], "kept nothing on teacher"),
    ):
        group = with_ if with_ == theirs else [theirs[0], *with_]
        assert main([*words, *given, "--with", *group]) == 2
        error = capsys.readouterr().err
        assert sentence in error and error.count("\n") == 1
