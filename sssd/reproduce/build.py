"""What ``make reports`` does: train what is missing, execute the notebooks, assemble the report."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import nbformat
import papermill
import torch
from nbconvert import HTMLExporter

from .. import parameters
from ..config import DataSource
from ..pool import cores, end_with, side_by_side
from ..profiles import data_name, find_data, open_data
from ..records import read_json
from ..runs import Store, home, without_training
from . import EXPERIMENTS, Experiment, Fig1, archive
from .document import assemble, index, outputs
from .experiment import recorded_data
from .words import counted, duration

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"


def reports(
    profile: str,
    data: str,
    seeds: Sequence[int] | None,
    jobs: int | None,
    runs: str,
    output: str = "",
    only: Sequence[str] = (),
) -> int:
    """Train what the notebooks need, execute them, and assemble what they saved.

    A notebook that fails does not stop the others; its section of the report says why it is
    missing, and the exit status is 1. ``only`` names the notebooks to execute; default: all.
    Without ``seeds`` each notebook uses the profile's.

    Raises:
        ValueError: the profile, the data, a notebook's name or another parameter is wrong.
    """
    began = time.monotonic()
    known = {kind.notebook: kind for kind in EXPERIMENTS}
    for name in only:
        if name not in known:
            raise ValueError(f"only: {name!r} is not a notebook; expected {', '.join(known)}")
    place = find_data(data)
    data = parameters.text(place) or ""  # absolute, as notebooks run in another folder
    own = profile + (f"-{data_name(place)}" if place else "")
    given: dict[str, Any] = {"profile": profile, "data": data, "seeds": list(seeds or ()) or None}
    given |= {"jobs": jobs, "runs": runs, "output": output or str(home() / "reports" / own)}
    chosen = [kind.from_notebook(given) for name, kind in known.items() if name in (only or known)]
    store, folder = chosen[0].store, chosen[0].folder
    folder.mkdir(parents=True, exist_ok=True)
    archive.set_aside(folder)
    failures = train(chosen, store, jobs)
    failures |= execute([e for e in chosen if e.notebook not in failures], given)
    assemble(folder, store, chosen[0], failures)
    if not output and profile != "smoke":
        index(home() / "reports")
    print(f"results in {folder}, after {duration(time.monotonic() - began)}")
    for name, why in failures.items():
        print(f"failed: {name}: {why}", file=sys.stderr)
    return 1 if failures else 0


def figures(folders: Sequence[Path], data: str = "") -> None:
    """Draw figures, tables and documents of reports again from their records; nothing is trained.

    Args:
        folders: the reports' folders.
        data: the folder of a report's photographs, which its Fig. 1 shows.

    Raises:
        ValueError: a folder holds no report.
        RuntimeError: a run that a figure needs is not among the records, for example because they
            were made for another version of the figure.
    """
    for folder in folders:
        if not (folder / "manifest.json").is_file():
            raise ValueError(
                f"report: {str(folder)!r} has no manifest.json; expected a report's folder"
            )
    slots = min(cores(), len(folders))
    if slots > 1:
        with ProcessPoolExecutor(slots, get_context("spawn")) as pool:
            list(pool.map(_draw, folders, repeat(data)))  # raises what a report does
    else:
        for folder in folders:
            _draw(folder, data)
    if home() / "reports" in {folder.parent for folder in folders}:
        index(home() / "reports")


def _draw(folder: Path, data: str) -> None:
    torch.set_num_threads(1)  # as in the notebooks: the last digits depend on it
    said = f"left as it is: it was made before reports kept {archive.TEXT}"
    if (folder / archive.TEXT).exists():
        drawn = redraw(folder, data)
        said = "drawn again from its records" if drawn else "left as it is: all notebooks failed"
    print(f"{folder.name}: {said}", flush=True)


def redraw(folder: Path, data: str = "") -> bool:
    """Execute the notebooks' code in this process on the records of a report, and assemble it.

    If ``data`` is the folder of the report's data, figures can show its images. False: all of the
    report's notebooks failed, and nothing is drawn.
    """
    manifest = read_json(folder / "manifest.json")
    source = DataSource(**archive.read(folder)["data"], paths={})
    with warnings.catch_warnings(action="ignore"):  # of the data: said when it was trained on
        given = open_data("smoke", data) if data else source  # with data any profile will do
    if (given.train, given.val) == (source.train, source.val):
        source = source.model_copy(update={"paths": given.paths})
    failed = {x: about["failure"] for x, about in manifest["notebooks"].items() if about["failure"]}
    made = {
        kind: read_json(folder / f"{kind.notebook}.json")["parameters"]
        for kind in EXPERIMENTS
        if kind.notebook in manifest["notebooks"].keys() - failed.keys()
    }
    if not made:
        return False
    asked = Experiment(**{x: next(iter(made.values()))[x] for x in ("profile", "data", "seeds")})
    with tempfile.TemporaryDirectory() as runs, without_training(), recorded_data(source):
        archive.import_runs(folder, Store(runs), redraw=True)
        for kind, parameters in made.items():
            if kind is Fig1 and asked.data and not source.paths:
                option = f"DATA={shlex.quote(f'path/to/{source.name}')}"
                print(f"{folder.name}: Fig. 1 is left as it is; {option} draws it again")
            else:
                places = {"runs": runs, "output": str(folder)}
                run_cells(kind.notebook, parameters | places)
        assemble(folder, Store(runs), asked, failed)
    return True


def run_cells(notebook: str, parameters: Mapping[str, Any]) -> None:
    """Execute a notebook's code without a kernel, whose start takes longer than most notebooks."""
    cells = nbformat.read(NOTEBOOKS / f"{notebook}.ipynb", as_version=4).cells
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in (cell for cell in cells if cell.cell_type == "code"):
        exec(compile(cell.source, f"{notebook}.ipynb", "exec"), names)
        if "parameters" in cell.metadata.get("tags", ()):
            names.update(parameters)


def train(experiments: Sequence[Experiment], store: Store, jobs: int | None) -> dict[str, str]:
    """Train all that is missing in one go; returns, by notebook, why it cannot be executed."""
    every = [config for experiment in experiments for config in experiment.needed]
    plan, why = store.plan(every), ""
    if plan:
        print(f"to be trained: {counted(len(plan), 'run')}", flush=True)
        for further in filter(None, (experiment.further for experiment in experiments)):
            print(f"and then {further}", flush=True)
        try:
            store.get(every, jobs=jobs)
        except RuntimeError as error:  # the notebooks that need none of the failed runs go on
            why = str(error)
            print(why, file=sys.stderr)
    else:
        print(
            f"nothing to train: {counted(len({c.id for c in every}), 'run')} needed, none missing"
        )
    failures = {}
    for experiment in experiments:
        needed = {config.id: config for config in experiment.needed}
        missing = [config for config in needed.values() if not store.finished(config)]
        if missing:
            first = missing[0]
            said = (
                f"{len(missing)} of its {len(needed)} runs could not be trained, the first of them "
                f"{first.label()} ({first.id})"
            )
            detail = [x.partition("): ")[2] for x in why.splitlines() if f"({first.id})" in x]
            failures[experiment.notebook] = ": ".join([said, *detail])
            continue
        try:
            experiment.train_further()
        except RuntimeError as error:
            failures[experiment.notebook] = " ".join(str(error).split())
    return failures


def execute(experiments: Sequence[Experiment], given: Mapping[str, Any]) -> dict[str, str]:
    """Execute the notebooks, several at a time; returns, by notebook, why it failed."""
    by_name = {experiment.notebook: experiment for experiment in experiments}
    # A notebook spends most of its time on its kernel's start and on bootstraps, each on one core.
    slots = min(given["jobs"] or cores(), cores())
    with tempfile.TemporaryDirectory() as scratch:

        def start(name: str, slot: int) -> Execution:
            print(f"notebook {[*by_name].index(name) + 1} of {len(by_name)}: {name}", flush=True)
            return Execution.start(by_name[name], given, Path(scratch))

        failed = side_by_side({name: () for name in by_name}, start, slots)
    return {name: failed[name] for name in by_name if name in failed}


@dataclass
class Execution:
    """A notebook that is executed in a process of its own."""

    experiment: Experiment
    target: Path
    """where papermill writes the executed notebook"""
    before: dict[str, Any]
    """the record that an earlier execution left"""
    process: subprocess.Popen[bytes]

    @classmethod
    def start(cls, experiment: Experiment, given: Mapping[str, Any], scratch: Path) -> Execution:
        source = NOTEBOOKS / f"{experiment.notebook}.ipynb"
        known = papermill.inspect_notebook(str(source))
        parameters = {name: value for name, value in given.items() if name in known}
        target = scratch / source.name
        command = [sys.executable, "-m", "papermill", str(source), str(target)]
        command += ["--no-progress-bar", "--parameters_yaml", json.dumps(parameters)]
        # One thread each, so that the numbers are the same however many notebooks run side by side.
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        record = experiment.folder / f"{experiment.notebook}.json"
        before = read_json(record) if record.exists() else {}
        record.unlink(missing_ok=True)  # so that the next one is this execution's
        with target.with_suffix(".log").open("wb") as log:
            process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                env=os.environ | threads,
                # A kernel ends by itself when its papermill is gone.
                preexec_fn=partial(end_with, os.getpid()) if sys.platform == "linux" else None,
            )
        return cls(experiment, target, before, process)

    def poll(self) -> str | None:
        """None while it runs; then why it failed, or an empty text if it did not.

        At its end the executed notebook is kept as HTML. Files of an earlier execution that this
        one did not make are removed, so that the report shows no old figure.
        """
        if self.process.poll() is None:
            return None
        folder, name = self.experiment.folder, self.experiment.notebook
        executed = nbformat.read(self.target, as_version=4) if self.target.exists() else None
        if executed:
            html, _ = HTMLExporter().from_notebook_node(executed)
            (folder / f"{name}.html").write_text(html)
        why, record = self._failure(executed), folder / f"{name}.json"
        if why:
            record.unlink(missing_ok=True)
        made = [] if why else outputs(folder, read_json(record))
        for file in set(outputs(folder, self.before)) - set(made):
            file.unlink(missing_ok=True)
        return " ".join(why.split())

    def _failure(self, executed: Any) -> str:
        """Why the notebook failed; empty if it did not."""
        outs = (
            [out for cell in executed.cells for out in cell.get("outputs", ())] if executed else []
        )
        errors = [out for out in outs if out.output_type == "error"]
        if errors:
            return f"{errors[0].ename}: {errors[0].evalue}"
        if self.process.returncode:
            lines = self.target.with_suffix(".log").read_text().strip().splitlines()
            return lines[-1] if lines else f"papermill ended with {self.process.returncode}"
        saved = (self.experiment.folder / f"{self.experiment.notebook}.json").exists()
        return "" if saved else "it ended without saving its results"

    def stop(self) -> None:
        """Interrupt it: papermill then stops its kernel."""
        self.process.send_signal(signal.SIGINT)
        self.process.wait()
