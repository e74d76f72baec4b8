"""The records that a report keeps of its runs, and how they get back into a store.

Two files hold them for all runs together: ``runs.json.gz`` (configuration, environment, result,
evaluations, metrics) and ``runs.npz`` (the matches that intervals are computed from, and the arrays
of Fig. 1). Figures and tables are drawn from them as from the runs themselves; weights, detections
and checkpoints are not kept.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import shutil
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..config import DataSource, identity
from ..evaluation import Matches
from ..records import (
    RunFolder,
    load_arrays,
    npz,
    read_json,
    read_records,
    write,
    write_json,
    write_records,
)
from ..runs import Store

TEXT, ARRAYS = "runs.json.gz", "runs.npz"
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
    packed = read_arrays(folder)
    data = {**source.model_dump(mode="json"), "classes": source.classes}
    kept = {id: run for id, run in sorted(runs.items()) if run}
    matches: dict[str, Matches] = {}
    arrays: dict[str, np.ndarray] = {}
    compared: dict[str, set[str]] = {}
    for notebook in notebooks:
        for id in notebook.get("runs", {}):
            names = {f"{t:06d}-{measure}" for t, measure in notebook.get("compared", ())}
            compared.setdefault(id, set()).update(names)
    for id in kept:
        files = RunFolder(store.root / id).best()
        if (files.path / "config.json").exists():
            for file in sorted((files.path / "matches").glob("*.npz")):
                if file.stem in compared.get(id, ()):
                    matches[f"{id}/{file.stem}"] = Matches.load(file)
            for file in sorted((files.path / "kept").glob("*.npz")):
                arrays |= {f"{id}/{file.stem}/{name}": x for name, x in load_arrays(file).items()}
        else:
            matches |= {k: v for k, v in packed[0].items() if k.startswith(f"{id}/")}
            arrays |= {k: v for k, v in packed[1].items() if k.startswith(f"{id}/")}
    text = gzip.compress(_json({"data": data, "runs": kept}), mtime=0)
    contents = {TEXT: text, ARRAYS: _packed(matches, arrays)}
    for name, content in contents.items():
        write(folder / name, content)
    return {name: digest(content) for name, content in contents.items()}


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# --- matches, packed ------------------------------------------------------------------------------


def _packed(matches: Mapping[str, Matches], arrays: Mapping[str, np.ndarray]) -> bytes:
    """An .npz file; matches on the same images share a few arrays, with a bit for each yes or no.

    Most detections are false positives that follow each other: only the others, the events, have
    bits. Image numbers are stored as steps from one detection to the next.
    """
    content = dict(sorted(arrays.items()))
    alike: dict[bytes, list[tuple[str, Matches]]] = {}
    for name, own in sorted(matches.items()):
        alike.setdefault(own.image_ids.tobytes(), []).append((name, own))
    for number, group in enumerate(alike.values()):
        names, each = zip(*group, strict=True)
        tables = {m.objects.tobytes(): m.objects for m in each}
        image = np.concatenate([m.image for m in each])
        hit, ignored = (
            np.concatenate([getattr(m, x) for m in each]) for x in ("matched", "ignored")
        )
        event = (hit | ignored).any(axis=1)
        steps = np.where(_begins(event), image, np.diff(image, prepend=0))
        packed = {
            "names": np.array(names),
            "image_ids": each[0].image_ids,
            "objects": np.stack(list(tables.values())),
            "table": np.array([list(tables).index(m.objects.tobytes()) for m in each]),
            "starts": np.stack([m.starts for m in each]).astype(np.int32),
            "image": steps.astype(np.min_scalar_type(len(each[0].image_ids))),
            "event": np.packbits(event),
            "matched": np.packbits(hit[event].T),
            "ignored": np.packbits(ignored[event].T),
        }
        content |= {f"matches{number or ''}/{name}": x for name, x in packed.items()}
    return bytes(npz(content))


def _begins(event: np.ndarray) -> np.ndarray:
    """Which detections are an event or follow one: between them the image numbers rise."""
    return event | np.concatenate([[True], event[:-1]]) if len(event) else event


def _unpacked(content: Mapping[str, np.ndarray]) -> dict[str, Matches]:
    """One group of `_packed`: matches on the same images."""
    names, starts, steps = (content[x] for x in ("names", "starts", "image"))
    event = np.unpackbits(content["event"], count=len(steps)).astype(bool)
    sums = steps.astype(np.int64).cumsum()
    first = np.flatnonzero(_begins(event))
    before = np.concatenate([[0], sums])[first]
    image = sums - np.repeat(before, np.diff(np.append(first, len(steps))))
    flags = []
    for name in ("matched", "ignored"):
        bits = np.unpackbits(content[name], count=10 * int(event.sum()))
        flags.append(np.zeros((len(steps), 10), bool))
        flags[-1][event] = bits.reshape(10, -1).T
    found, begin = {}, 0
    for i, name in enumerate(names.tolist()):
        own = slice(begin, begin + int(starts[i, -1]))
        found[name] = Matches(
            content["image_ids"],
            content["objects"][content["table"][i]],
            starts[i].astype(np.int64),
            image[own].astype(np.int32),
            *(flag[own] for flag in flags),
        )
        begin = own.stop
    return found


# --- the way back ---------------------------------------------------------------------------------


def read(folder: Path) -> dict[str, Any]:
    """The report's ``runs.json.gz``; no runs if there is no such file.

    ``data`` has the data's name, fingerprints and classes; ``runs`` has what `record` gives, by id.

    Raises:
        ValueError: the file is damaged; the sentence names it.
    """
    file = folder / TEXT
    try:
        return json.loads(gzip.decompress(file.read_bytes())) if file.exists() else {"runs": {}}
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise ValueError(f"{file} is damaged: {error}") from None


def read_arrays(folder: Path) -> tuple[dict[str, Matches], dict[str, np.ndarray]]:
    """What the report's ``runs.npz`` holds; empty if there is no such file.

    Returns:
        matches by ``id/iteration-measure``, and arrays by ``id/name/array``.

    Raises:
        ValueError: the file is damaged; the sentence names it.
    """
    arrays = load_arrays(folder / ARRAYS) if (folder / ARRAYS).exists() else {}
    matches: dict[str, Matches] = {}
    for first in [name for name in arrays if name.startswith("matches") and "/names" in name]:
        group = first.removesuffix("names")
        own = {k.removeprefix(group): arrays.pop(k) for k in [*arrays] if k.startswith(group)}
        matches |= _unpacked(own)
    return matches, arrays


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
    matches, arrays = read_arrays(folder)
    done = []
    for id, run in read(folder)["runs"].items():
        own = RunFolder(store.root / id)
        best, steps = own.best(), len(run.get("seconds", ()))
        if best.finished or (best.reached() >= max(steps, 1) and not best.damage()):
            continue
        files = own.imported
        _unpack(files, run)
        for name in (name for name in matches if name.startswith(f"{id}/")):
            matches[name].save(files.path / "matches" / f"{name.partition('/')[2]}.npz")
        kept: dict[str, dict[str, np.ndarray]] = {}
        for name in (name for name in arrays if name.startswith(f"{id}/")):
            _, figure, array = name.split("/")
            kept.setdefault(figure, {})[array] = arrays[name]
        for figure, content in kept.items():
            files.kept(figure).parent.mkdir(exist_ok=True)
            write(files.kept(figure), npz(content))
        if "done" in run:
            files.close(run["done"] | ({} if redraw else {"imported_from": folder.name}))
        done.append(id)
    return done


def _unpack(files: RunFolder, run: Mapping[str, Any]) -> None:
    """Write what is kept of a run, without its result, as the files of a run."""
    if files.path.exists():
        shutil.rmtree(files.path)
    (files.path / "matches").mkdir(parents=True)
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
