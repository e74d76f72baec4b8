"""What a run store holds, read from its folders alone, and which files in it can be removed."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock, Timeout

from .config import DataSource, RunConfig, identity
from .profiles import PROFILES, configure
from .records import RunFolder, read_json, read_records

VARIED = ("method", "detector", "backbone", "seed", "lambda1", "lambda2", "t1")
"""The fields in which a run of a profile may differ from the profile."""
STALE_SECONDS = 3600
"""A half-written file older than this belongs to no process: writing takes minutes at most."""


def ids(root: Path) -> list[str]:
    """The ids of all runs in a store, also of imported ones."""
    kept = [*root.glob("*/config.json"), *root.glob("*/imported/config.json")]
    return sorted({file.relative_to(root).parts[0] for file in kept})


def records(root: Path) -> list[dict[str, Any]]:
    """What is known of each run in a store, as plain values that JSON can hold.

    If files of a run are damaged, ``damage`` says which. If nothing else is known, the record has
    only that and the id.
    """
    rows: list[dict[str, Any]] = []
    for id in ids(root):
        files = RunFolder(root / id).best()
        try:
            config = _config(files)
            ap = [record["AP"] for record in read_records(files.evaluations)]
        except ValueError as error:
            rows.append({"run": id, "damage": str(error)})
            continue
        written = max(file.stat().st_mtime for file in files.path.glob("*.json*"))
        of_run = (file for file in (root / id).rglob("*") if file.is_file())
        rows.append(
            {
                "run": id,
                "profile": profile_of(config),
                "data": config["data"]["name"],
                "method": config["method"],
                "warm_start": warm_start(config),
                **{x: config.get(x) for x in ("lambda1", "lambda2", "detector", "backbone")},
                "seed": config["seed"],
                "iteration": files.reached(),
                "iterations": config["iterations"],
                "finished": files.finished,
                "imported": files.is_imported,
                "damage": files.damage(),
                "AP": ap[-1] if ap and math.isfinite(ap[-1]) else None,
                "written": datetime.fromtimestamp(written).isoformat(" ", "minutes"),
                "bytes": sum(file.stat().st_size for file in of_run),
            }
        )
    return rows


def _config(files: RunFolder) -> dict[str, Any]:
    """The run's configuration; a ValueError says that the file does not hold it."""
    file = files.path / "config.json"
    config = read_json(file)
    with suppress(TypeError, ValueError, KeyError):  # `identity` raises them for other JSON
        if identity(config) == files.id:
            return config
    raise ValueError(f"{file} is damaged: it is not run {files.id}'s")


def listing(root: Path) -> pd.DataFrame:
    """`records` as a table for reading; runs that are compared stand together."""
    rows: list[dict[str, Any]] = []
    for r in sorted(records(root), key=_order):
        if "method" not in r:
            unknown = {"profile": "unknown", "data": "unknown"}
            rows.append({"run": r["run"], **unknown, "state": r["damage"]})
            continue
        lambdas = [f"{x:g}" for x in (r["lambda1"], r["lambda2"]) if x is not None]
        state = r["damage"] or ("finished" if r["finished"] else "unfinished")
        rows.append(
            {
                **{name: r[name] for name in ("run", "profile", "data")},
                "method": f"warm start: {r['warm_start']}" if r["warm_start"] else r["method"],
                "λ": "→".join(lambdas),
                **{name: r[name] for name in ("detector", "backbone", "seed")},
                "iterations": f"{r['iteration']}/{r['iterations']}",
                "AP": "" if r["AP"] is None else f"{r['AP']:.3f}",
                "state": state + (", imported" if r["imported"] else ""),
                "written": r["written"],
                "MB": f"{r['bytes'] / 1e6:.1f}",
            }
        )
    return pd.DataFrame(rows, dtype=object).fillna("")


def _order(record: Mapping[str, Any]) -> tuple[Any, ...]:
    names = ("profile", "data", "detector", "backbone", "method")
    lambdas = (record.get(name) or 0.0 for name in ("lambda1", "lambda2"))
    return (*(record.get(name) or "" for name in names), *lambdas, record.get("seed", 0))


def warm_start(config: Mapping[str, Any]) -> str:
    """Which part of a profile's warm start a run is: crops, detector or teacher; empty if none."""
    if config["method"] == "crops":
        return "crops"
    if config.get("student_rests"):
        return "teacher"
    begun = isinstance(config["start"], Mapping) and config["start"].get("method") == "crops"
    return "detector" if config["method"] == "baseline" and begun else ""


def profile_of(config: Mapping[str, Any]) -> str:
    """All profiles that have this run, also as a warm start; empty if fields were overridden."""
    source = DataSource(**config["data"], paths={}, classes={})
    wanted = _id_without_eval_every(config)
    asked = {name: config[name] for name in VARIED if config.get(name) is not None}
    if warm_start(config):  # shared by all methods and seeds
        asked = {name: asked[name] for name in ("detector", "backbone") if name in asked}
    if config["method"] == "labelenc_stage1":
        asked["method"] = "labelenc"  # which starts from it
    found = []
    for profile in PROFILES:
        try:
            run: Any = configure(profile, data=source, **asked)
        except ValueError:  # the profile cannot have a run with these fields
            continue
        while isinstance(run, RunConfig) and _id_without_eval_every(run.canonical()) != wanted:
            run = run.start if warm_start(config) or run.method == "labelenc" else None
        found += [profile] if run and not isinstance(run, str) else []
    return ", ".join(found)


def _id_without_eval_every(canonical: Mapping[str, Any]) -> str:
    """An id that is the same for two runs which differ only in how often they are evaluated."""
    return identity({name: x for name, x in canonical.items() if name != "eval_every"})


def prune(root: Path, dry_run: bool = False) -> dict[str, list[int]]:
    """Remove a store's files that nothing reads; return their sizes in bytes by what they were.

    These are checkpoints of finished runs, half-written files, and locks of runs that are finished
    or gone. A checkpoint is kept if an unfinished stepwise run in the store needs it; stepwise runs
    that begin later train their first part themselves. Runs in training are left alone. With
    ``dry_run`` nothing is removed.

    Raises:
        ValueError: a run's configuration is damaged, so that nobody knows which checkpoints it needs.
    """
    freed: dict[str, list[int]] = {}

    def free(file: Path, what: str) -> None:
        freed.setdefault(what, []).append(file.stat().st_size)
        if not dry_run:
            file.unlink()

    awaited = set()
    trained = [RunFolder(root / id) for id in ids(root) if (root / id / "config.json").exists()]
    configs = {files.id: _config(files) for files in trained}
    for id, config in configs.items():
        if config.get("lambda2") is not None and not RunFolder(root / id).finished:
            parent = {name: x for name, x in config.items() if name not in ("lambda2", "t1")}
            awaited.add(RunFolder(root / identity(parent)).fork(config["t1"]))
    for id in sorted({*configs, *(file.stem for file in root.glob("*.lock"))}):
        files, lock = RunFolder(root / id), root / f"{id}.lock"
        with ExitStack() as held, suppress(Timeout):  # a process that holds the lock trains the run
            if lock.exists():
                held.enter_context(FileLock(lock, timeout=0))
            for file in files.path.rglob(".*.part"):
                if time.time() - file.stat().st_mtime > STALE_SECONDS:
                    free(file, "half-written files")
            if files.finished:
                for file in {*files.path.glob("fork-*.pt"), *files.path.glob("last.pt")} - awaited:
                    free(file, "checkpoints")
            if lock.exists() and (files.finished or id not in configs):
                free(lock, "locks")
    return freed
