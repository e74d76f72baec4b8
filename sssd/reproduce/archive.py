"""The runs that a report rests on: what its manifest says of each, and the records kept beside it.

A run's records are read from the store or, where the store has it no longer, from ``runs/`` of the
report's folder.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..config import identity
from ..runs import Store
from .experiment import write

SMALL = ("config.json", "environment.json", "done.json", "evaluations.jsonl", "metrics.jsonl")
"""The records of a run that a report keeps: all but weights, detections and matches."""


def describe(
    recorded: Iterable[Mapping[str, Any]], folder: Path, store: Store
) -> dict[str, dict[str, Any]]:
    """What the manifest says of each run, by id, warm starts first.

    Args:
        recorded: for each notebook the runs of its record, by id; the runs that these start from
            are described too.
        folder: the report's.
        store: where the runs are.
    """
    known: dict[str, Mapping[str, Any]] = {}

    def add_starts(config: Mapping[str, Any]) -> None:
        start = config["start"]
        if isinstance(start, dict) and "method" in start:  # itself a run's configuration
            what = " ".join(start[x] for x in ("method", "detector", "backbone") if x in start)
            label = f"warm start: {what}"
            if start["method"] == "labelenc_stage1":
                label = f"{what.replace('_', ' ', 1)} seed {start['seed']}"
            known.setdefault(identity(start), {"label": label, "config": start})
            add_starts(start)

    for runs in recorded:
        known.update(runs)
    for run in list(known.values()):
        add_starts(run["config"])
    order = sorted(known, key=lambda id: (not is_warm_start(known[id]), known[id]["label"], id))
    return {id: _describe(id, known[id], folder, store) for id in order}


def is_warm_start(run: Mapping[str, Any]) -> bool:
    return run["label"].startswith("warm start")


def _describe(id: str, known: Mapping[str, Any], folder: Path, store: Store) -> dict[str, Any]:
    """``known`` is what a notebook's record says of the run, and stands where no files do."""
    files = _read(store.root / id)
    if "done.json" not in files:
        files = _read(folder / "runs" / id) or files
    read = {
        x: json.loads(files[f"{x}.json"]) for x in ("done", "environment") if f"{x}.json" in files
    }
    found = {x: known[x] for x in ("done", "environment") if x in known} | read
    lines = files.get("evaluations.jsonl", b"").splitlines()
    ap = json.loads(lines[-1])["AP"] if lines else math.nan  # NaN too on images without objects
    return {
        "label": known["label"],
        "state": "finished" if "done" in found else "unfinished" if files else "missing",
        "AP": None if math.isnan(ap) else ap,
        "seed": known["config"]["seed"],
        "sha256": {x: digest(files[x]) for x in SMALL[3:] if x in files},
        "config": known["config"],
        **found,
    }


def keep(folder: Path, store: Store, runs: Iterable[str], complete: bool) -> None:
    """Keep the records of these runs in ``runs/`` of the report, apart from the store.

    Those of other runs are removed if the report is ``complete``: a notebook that failed may still
    use them.
    """
    runs = set(runs)
    for id in runs:
        files = _read(store.root / id)
        if "metrics.jsonl" in files:
            packed = gzip.compress(files.pop("metrics.jsonl"), mtime=0)
            (folder / "runs" / id).mkdir(parents=True, exist_ok=True)
            for name, content in {**files, "metrics.jsonl.gz": packed}.items():
                write(folder / "runs" / id / name, content)
    for kept in (folder / "runs").glob("*") if complete else ():
        if kept.name not in runs:
            shutil.rmtree(kept)


def _read(folder: Path) -> dict[str, bytes]:
    """The records of a run, unpacked, by name."""
    found = {name: (folder / name).read_bytes() for name in SMALL if (folder / name).exists()}
    packed = folder / "metrics.jsonl.gz"
    if packed.exists():
        found["metrics.jsonl"] = gzip.decompress(packed.read_bytes())
    return found


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
