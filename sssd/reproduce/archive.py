"""The records that a report keeps of its runs, and how they get back into a store.

Two files hold them for all runs together: ``runs.json.xz`` (configuration, environment, result,
evaluations, metrics) and ``runs.npz.xz`` (the matches that intervals are computed from, and the
arrays of Fig. 1). Figures and tables are drawn from them as from the runs themselves; weights, detections
and checkpoints are not kept.
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import math
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..config import DataSource, identity
from ..records import (
    RunFolder,
    arrays_of,
    load_arrays,
    npz,
    read_json,
    read_records,
    write,
    write_json,
    write_records,
)
from ..runs import Store

TEXT, ARRAYS = "runs.json.xz", "runs.npz.xz"
STEPS = 200
"""At most this many iterations of a run, evenly spaced, are kept with all of their losses."""
KEPT_AT_EVERY_STEP = ("seconds", "share")


# --- what a report keeps --------------------------------------------------------------------------


def describe(
    recorded: Iterable[Mapping[str, Any]], folder: Path, store: Store
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """What the manifest says about each run, and what `keep` keeps of it.

    Args:
        recorded: the runs in each notebook's record, by id; the runs that these start from are
            described, too.
        folder: the report's folder.
        store: where the runs are.

    Returns:
        both by id; warm starts come first.
    """
    known: dict[str, Mapping[str, Any]] = {id: run for runs in recorded for id, run in runs.items()}
    for run in list(known.values()):
        start = run["config"]["start"]
        while isinstance(start, dict) and "method" in start:  # itself a run's configuration
            what = " ".join(start[x] for x in ("method", "detector", "backbone") if x in start)
            label = f"warm start: {what}"
            if start["method"] == "labelenc_stage1":
                label = f"{what.replace('_', ' ', 1)} seed {start['seed']}"
            known.setdefault(identity(start), {"label": label, "config": start})
            start = start["start"]
    old = read(folder)["runs"]

    def order(id: str) -> tuple[bool, str, str]:
        label = known[id]["label"]
        return not label.startswith("warm start"), label, id

    kept = {id: record(store.root / id) or old.get(id, {}) for id in sorted(known, key=order)}
    return {id: _describe(known[id], own) for id, own in kept.items()}, kept


def _describe(known: Mapping[str, Any], kept: Mapping[str, Any]) -> dict[str, Any]:
    """``known``, from a notebook's record, is used for what ``kept``, the run's own, lacks."""
    both = {**known, **kept}
    found: dict[str, Any] = {x: both[x] for x in ("done", "environment") if x in both}
    evaluations = kept.get("evaluations")
    ap = evaluations[-1]["AP"] if evaluations else math.nan  # also NaN on images without objects
    return {
        "label": known["label"],
        "state": "finished" if "done" in found else "unfinished" if kept else "missing",
        "AP": None if math.isnan(ap) else ap,
        "seed": known["config"]["seed"],
        "sha256": digest(_json(kept)) if kept else None,
        "config": known["config"],
        **found,
    }


def record(folder: Path) -> dict[str, Any] | None:
    """What is kept of the run in a store's ``folder``, whether trained there or imported.

    Share and seconds are kept for every iteration, as Table 3 is made from the shares; losses, to
    six digits, for `STEPS` of them. None if there is no run.
    """
    files = RunFolder(folder).best()
    if not (files.path / "config.json").exists():
        return None
    found = files.about()
    found["evaluations"] = read_records(files.evaluations)
    steps = read_records(files.metrics)
    found |= {x: [step[x] for step in steps] for x in KEPT_AT_EVERY_STEP if steps and x in steps[0]}
    apart = max(math.ceil(len(steps) / STEPS), 1)
    found["steps"] = [
        {
            name: float(f"{value:.6g}") if isinstance(value, float) else value
            for name, value in step.items()
            if name not in KEPT_AT_EVERY_STEP
        }
        for step in steps
        if step["iteration"] % apart == 0
    ]
    return found


def keep(
    folder: Path,
    store: Store,
    source: DataSource,
    runs: Mapping[str, Mapping[str, Any]],
    notebooks: Iterable[Any],
) -> dict[str, str]:
    """Write the records of these runs into the report's ``folder``.

    Args:
        folder: the report's folder. Its records of runs that the store lacks stay.
        store: where the runs are.
        source: the data of the report.
        runs: what `describe` gives of them, by id.
        notebooks: the notebooks' records, which say which matches they compared. What was compared
            for one run is kept for all runs of that notebook: with more seeds another λ may be best.

    Returns:
        The SHA-256 of each file by name.
    """
    before = read_arrays(folder)
    data = {**source.model_dump(mode="json"), "classes": source.classes}
    kept = {id: run for id, run in sorted(runs.items()) if run}
    compared: dict[str, set[str]] = {}
    for notebook in notebooks:
        for id in notebook.get("runs", {}):
            names = {f"{t:06d}-{measure}" for t, measure in notebook.get("compared", ())}
            compared.setdefault(id, set()).update(names)
    arrays: dict[str, np.ndarray] = {}
    for id in kept:
        files = RunFolder(store.root / id).best()
        if not (files.path / "config.json").exists():
            arrays |= {name: x for name, x in before.items() if name.startswith(f"{id}/")}
            continue
        shown = [x for x in files.path.glob("matches/*.npz") if x.stem in compared.get(id, ())]
        for file in sorted([*shown, *files.path.glob("kept/*.npz")]):
            place = f"{id}/{file.parent.name}/{file.stem}"
            arrays |= {f"{place}/{name}": x for name, x in load_arrays(file).items()}
    out = io.BytesIO()
    np.savez(out, **arrays)  # type: ignore[arg-type]
    text = _json({"data": data, "runs": kept})
    # Six times as fast as the default, for a fifth more bytes.
    contents = {
        name: lzma.compress(x, preset=2) for name, x in ((TEXT, text), (ARRAYS, out.getbuffer()))
    }
    for name, content in contents.items():
        write(folder / name, content)
    return {name: digest(content) for name, content in contents.items()}


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# --- the way back ---------------------------------------------------------------------------------


def read(folder: Path) -> dict[str, Any]:
    """The report's ``runs.json.xz``; no runs if there is no such file.

    ``data`` has the data's name, fingerprints and classes; ``runs`` has what `record` gives, by id.

    Raises:
        ValueError: the file is damaged; the sentence names it.
    """
    file = folder / TEXT
    try:
        return json.loads(lzma.decompress(file.read_bytes())) if file.exists() else {"runs": {}}
    except (lzma.LZMAError, ValueError) as error:
        raise ValueError(f"{file} is damaged: {error}") from None


def read_arrays(folder: Path) -> dict[str, np.ndarray]:
    """The report's ``runs.npz.xz``, by ``id/folder/file/array``; empty if there is no such file.

    Raises:
        ValueError: the file is damaged; the sentence names it.
    """
    file = folder / ARRAYS
    if not file.exists():
        return {}
    try:
        return arrays_of(lzma.decompress(file.read_bytes()))
    except (lzma.LZMAError, ValueError) as error:
        raise ValueError(f"{file} is damaged: {error}") from None


def set_aside(folder: Path) -> None:
    """Rename the damaged files of a report that is about to be made again, and say so."""
    readers = {TEXT: lambda _: read(folder), ARRAYS: lambda _: read_arrays(folder)}
    for file in sorted([*folder.glob("*.json"), *(folder / name for name in readers)]):
        try:
            if file.exists():
                readers.get(file.name, read_json)(file)
        except ValueError as error:
            file.rename(file.with_name(f"{file.name}.damaged"))
            print(f"{error}; it is kept as {file.name}.damaged, and made again", flush=True)


def import_runs(folder: Path, store: Store, redraw: bool = False) -> list[str]:
    """Put the records of a report's runs into a store, as runs without weights.

    A run that is at least as far in the store is left as it is. `RunFolder` says what becomes of
    imported records if the run is trained here after all.

    Args:
        folder: the report's folder.
        store: where they go.
        redraw: this report is only drawn again, and does not say that its runs were imported.

    Returns:
        The ids of the runs that were imported.

    Raises:
        ValueError: the folder holds no records of runs.
    """
    if not (folder / TEXT).exists():
        raise ValueError(f"{folder} holds no {TEXT}; expected the folder of a report with records")
    arrays: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    for name, x in read_arrays(folder).items():
        id, part, file, array = name.split("/")
        arrays.setdefault(id, {}).setdefault(f"{part}/{file}", {})[array] = x
    done = []
    for id, run in read(folder)["runs"].items():
        own = RunFolder(store.root / id)
        best, steps = own.best(), len(run.get("seconds", ()))
        if best.finished or (best.reached() >= max(steps, 1) and not best.damage()):
            continue
        files = own.imported
        _unpack(files, run)
        for file, content in arrays.get(id, {}).items():
            write(files.path / f"{file}.npz", npz(content))
        if "done" in run:
            files.close(run["done"] | ({} if redraw else {"imported_from": folder.name}))
        done.append(id)
    return done


def _unpack(files: RunFolder, run: Mapping[str, Any]) -> None:
    """Write what is kept of a run, without its result, as the files of a run."""
    if files.path.exists():
        shutil.rmtree(files.path)
    for name in ("matches", "kept"):
        (files.path / name).mkdir(parents=True)
    for name in ("config", "environment"):
        if name in run:
            write_json(run[name], files.path / f"{name}.json")
    steps = {step["iteration"]: step for step in run["steps"]}
    names = [name for name in KEPT_AT_EVERY_STEP if name in run]
    metrics = [
        {**steps.get(t, {"iteration": t}), **dict(zip(names, values, strict=True))}
        for t, values in enumerate(zip(*(run[name] for name in names), strict=True), start=1)
    ]
    for file, records in ((files.metrics, metrics), (files.evaluations, run["evaluations"])):
        write_records(file, records)
