"""What ``make reports`` does: train what is missing, execute the notebooks, assemble the report."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import papermill
import torch
from nbconvert import HTMLExporter

from ..records import read_records, software
from ..runs import Job, Store, cores, home
from . import EXPERIMENTS, Experiment
from .document import assemble, index, outputs

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
POLL_SECONDS = 0.2


def reports(
    profile: str,
    data: str,
    seeds: Sequence[int],
    jobs: int | None,
    runs: str,
    output: str = "",
    only: Sequence[str] = (),
) -> int:
    """Train what any notebook needs, execute each, and assemble what they recorded.

    A notebook that fails does not stop the others; its section of the report says why it is
    missing, and the exit status is 1. ``only`` names the notebooks to execute; default: all.

    Raises:
        ValueError: the profile, the data, a notebook's name or another parameter is wrong.
    """
    began = time.monotonic()
    known = {kind.notebook: kind for kind in EXPERIMENTS}
    for name in only:
        if name not in known:
            raise ValueError(f"only: {name!r} is no notebook; expected one of {', '.join(known)}")
    if data and "=" not in data:  # a folder, and not its parts one by one
        data = str(Path(data).expanduser().resolve())
    given = {"profile": profile, "data": data, "seeds": list(seeds), "jobs": jobs}
    given |= {"runs": runs, "output": output}
    experiments = [
        kind.from_notebook({name: value for name, value in given.items() if value is not None})
        for name, kind in known.items()
        if not only or name in only
    ]
    store, folder = experiments[0].store, experiments[0].folder
    folder.mkdir(parents=True, exist_ok=True)
    reasons = _train(experiments, store, jobs)
    reasons |= _execute([e for e in experiments if e.notebook not in reasons], given)
    assemble(folder, store, experiments[0], reasons)
    if not output and profile != "smoke":
        index(home() / "reports")
    print(f"results in {folder}, after {_spoken(time.monotonic() - began)}")
    for name, why in reasons.items():
        print(f"failed: {name}: {why}", file=sys.stderr)
    return 1 if reasons else 0


def _train(experiments: Sequence[Experiment], store: Store, jobs: int | None) -> dict[str, str]:
    """Train all that is missing in one go; why a notebook cannot be executed, by its name."""
    needed = {e.notebook: [c for group in e.configs.values() for c in group] for e in experiments}
    every = [config for configs in needed.values() for config in configs]
    plan = store.plan(every)
    why = ""
    if plan:
        left = sum(job.length - job.reached for job in plan.values())
        slots = min(jobs or torch.cuda.device_count() or cores(), len(plan))
        noun = "run" if len(plan) == 1 else "runs"
        duration = _duration(store, plan, slots)
        print(f"to be trained: {len(plan)} {noun}, {left:,} iterations; {duration}", flush=True)
        for further in filter(None, (experiment.further for experiment in experiments)):
            print(f"and then {further}", flush=True)
        try:
            store.get(every, jobs=jobs)
        except RuntimeError as error:  # the notebooks that need none of the failed runs go on
            why = str(error)
            print(why, file=sys.stderr)
    else:
        print(f"nothing to train: all {len({c.id for c in every})} runs are in the store")
    reasons = {}
    for name, configs in needed.items():
        missing = {c.id: c for c in configs if not store.finished(c)}
        if missing:
            first = next(iter(missing.values()))
            detail = [x.partition("): ")[2] for x in why.splitlines() if f"({first.id})" in x]
            reasons[name] = (
                f"{len(missing)} of its {len({c.id for c in configs})} runs could not be trained, "
                f"the first of them {first.label()} ({first.id})"
                + "".join(f": {d}" for d in detail)
            )
    for experiment in experiments:
        if experiment.notebook not in reasons:
            try:
                experiment.train_further()
            except RuntimeError as error:
                reasons[experiment.notebook] = " ".join(str(error).split())
    return reasons


def _duration(store: Store, plan: Mapping[str, Job], slots: int) -> str:
    """How long a plan takes, from like runs that this kind of machine has trained before."""
    here, rates = software(), {}
    seen: dict[str, list[float]] = {}
    for file in store.root.glob("*/done.json"):
        folder = file.parent
        config = json.loads((folder / "config.json").read_text())
        machine = json.loads((folder / "environment.json").read_text())
        if any(machine.get(part) != here[part] for part in ("cpu", "gpu")):
            continue
        first = config["t1"] if config.get("lambda2") is not None else 0
        steps = [
            r["seconds"] for r in read_records(folder / "metrics.jsonl") if r["iteration"] > first
        ]
        # The files' times count evaluations in. They are shorter than the steps alone where the run
        # was interrupted or the store copied: then they say nothing.
        span = file.stat().st_mtime - (folder / "config.json").stat().st_mtime
        if steps and span >= sum(steps):
            seen.setdefault(_kind(config), []).append(span / len(steps))
    rates = {kind: statistics.median(values) for kind, values in seen.items()}
    ends: dict[str, float] = {}  # of each run, were there a process for each
    total = 0.0
    for id, job in plan.items():  # in the order of dependence
        rate = rates.get(_kind(job.config.canonical()))
        if rate is None:
            return "how long it takes is told after the first minute"
        own = rate * (job.length - job.reached)
        ends[id] = own + max((ends[before] for before in job.after), default=0.0)
        total += own
    return f"about {_spoken(max(total / slots, *ends.values()))}, {slots} at a time"


def _kind(config: Mapping[str, Any]) -> str:
    """What decides how long an iteration takes."""
    fields = ("method", "detector", "backbone", "width", "batch_size", "min_sizes", "eval_every")
    return json.dumps([*(config.get(field) for field in fields), config["data"]["val"]])


def _spoken(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@dataclass
class _Execution:
    """A notebook at work in a process of its own, and where its output goes."""

    experiment: Experiment
    scratch: Path
    before: dict[str, Any]
    process: subprocess.Popen[bytes]

    @property
    def record(self) -> Path:
        return self.experiment.folder / f"{self.experiment.notebook}.json"


def _execute(experiments: Sequence[Experiment], given: Mapping[str, Any]) -> dict[str, str]:
    """Execute the notebooks, several at a time; why each that failed did, by its name."""
    reasons: dict[str, str] = {}
    waiting = list(enumerate(experiments, start=1))
    running: list[_Execution] = []
    # Most of a notebook's time is its kernel's start and its bootstraps, each on one core.
    limit = min(given["jobs"] or cores(), cores())
    with tempfile.TemporaryDirectory() as scratch:
        try:
            while waiting or running:
                while waiting and len(running) < limit:
                    number, experiment = waiting.pop(0)
                    name = experiment.notebook
                    print(f"notebook {number} of {len(experiments)}: {name}", flush=True)
                    running.append(_start(experiment, given, Path(scratch)))
                time.sleep(POLL_SECONDS)
                for execution in [e for e in running if e.process.poll() is not None]:
                    running.remove(execution)
                    why = _finish(execution)
                    if why:
                        reasons[execution.experiment.notebook] = why
        finally:  # interrupted: papermill then stops its kernel
            for execution in running:
                execution.process.send_signal(signal.SIGINT)
            for execution in running:
                execution.process.wait()
    order = [experiment.notebook for experiment in experiments]
    return {name: reasons[name] for name in order if name in reasons}


def _start(experiment: Experiment, given: Mapping[str, Any], scratch: Path) -> _Execution:
    source = NOTEBOOKS / f"{experiment.notebook}.ipynb"
    known = papermill.inspect_notebook(str(source))
    parameters = {name: value for name, value in given.items() if name in known}
    target = scratch / source.name
    command = [sys.executable, "-m", "papermill", str(source), str(target), "--no-progress-bar"]
    # One thread each, so that the numbers are the same however many notebooks run side by side.
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with target.with_suffix(".log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--parameters_yaml", json.dumps(parameters)],
            stdout=log,
            stderr=log,
            env=os.environ | threads,
        )
    record = experiment.folder / f"{experiment.notebook}.json"
    before = json.loads(record.read_text()) if record.exists() else {}
    before["modified"] = record.stat().st_mtime_ns if record.exists() else 0
    return _Execution(experiment, target, before, process)


def _finish(execution: _Execution) -> str:
    """Keep an executed notebook as HTML; why it failed, or nothing.

    What an earlier execution left and this one did not make is removed: the report shows no figure
    that is not its own.
    """
    experiment, target = execution.experiment, execution.scratch
    why = ""
    cells: list[Any] = []
    if target.exists():
        notebook = nbformat.read(target, as_version=4)
        cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
        html, _ = HTMLExporter().from_notebook_node(notebook)
        (experiment.folder / f"{experiment.notebook}.html").write_text(html)
    errors = [out for cell in cells for out in cell.outputs if out.output_type == "error"]
    if errors:
        why = f"{errors[0].ename}: {errors[0].evalue}"
    elif execution.process.returncode:
        lines = target.with_suffix(".log").read_text().strip().splitlines()
        why = lines[-1] if lines else f"papermill ended with status {execution.process.returncode}"
    elif not execution.record.exists() or (
        execution.record.stat().st_mtime_ns == execution.before["modified"]
    ):
        why = "it ended without a record of its findings"
    made: Iterable[Path] = ()
    if why:
        execution.record.unlink(missing_ok=True)
    else:
        made = outputs(experiment.folder, json.loads(execution.record.read_text()))
    for file in set(outputs(experiment.folder, execution.before)) - set(made):
        file.unlink(missing_ok=True)
    return " ".join(why.split())
