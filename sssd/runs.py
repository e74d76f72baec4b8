"""The run store: each run is trained once, whichever notebook, command or process asks for it.

Each run has a folder, named by the hash of its configuration. Asking for runs trains those that are
missing, several at a time, each after the runs that it starts from: its warm start, and for a
stepwise run the fixed-λ run that it continues from T1.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout

from .config import RunConfig
from .distiller import Distiller
from .engine import evaluate_run, train
from .evaluation import THRESHOLDS, Detections, Matches, matches_of
from .intervals import Interval, difference
from .methods import TAUGHT
from .parameters import absolute, check_folder
from .pool import Job, Progress, Worker, longest_first, side_by_side, slots
from .records import RunFolder, load_weights, read_json, read_records
from .starts import build_model, load_student


def home() -> Path:
    """The folder of ``runs/`` and ``reports/``: this package's checkout, else the current one."""
    checkout = Path(__file__).resolve().parent.parent
    return checkout if (checkout / "pyproject.toml").exists() else Path.cwd()


@dataclass(frozen=True)
class Run:
    """The results of a run in the store."""

    config: RunConfig
    folder: Path
    compared: set[tuple[int, str]] = field(default_factory=set, compare=False, repr=False)
    """The iterations and measures that `matches` was called with."""

    @property
    def files(self) -> RunFolder:
        return RunFolder(self.folder).best()

    def metrics(self) -> pd.DataFrame:
        """One row for each iteration: losses, learning rate, λ, share, gradient norm, seconds.

        An imported run has share and seconds of all iterations, the rest of some.
        """
        return pd.DataFrame(read_records(self.files.metrics))

    def evaluations(self) -> pd.DataFrame:
        """One row for each evaluation: iteration, pycocotools' twelve numbers, seconds per image.

        A run with a teacher also has ``teacher_AP``, ``teacher_AP50`` and ``teacher_AP75``.
        """
        records = read_records(self.files.evaluations)
        return pd.DataFrame(records).drop(columns=["per_class", "area_limits"], errors="ignore")

    def record(self) -> dict[str, Any]:
        """What a report shows of the run: label, configuration, machine, time, memory."""
        return {"label": self.config.label(), **self.files.about()}

    def detections(self) -> Detections:
        """The validation set's detections at the last evaluation."""
        return Detections.load(RunFolder(self.folder).detections)

    def detector(self) -> torch.nn.Module:
        """The trained student, a torchvision detector; raises what `load_student` does."""
        return load_student(self.files.path)[0]

    def distiller(self, trained: bool = True) -> Distiller:
        """A run's student, teacher and adapter, on the CPU in evaluation mode.

        Args:
            trained: with the trained weights; otherwise as the run began: with its start weights,
                and with teacher and adapter untrained, unless its start has trained them.

        Raises:
            ValueError: the run's method has no teacher.
        """
        if self.config.method not in TAUGHT:
            raise ValueError(f"run {self.config.id}: {self.config.method} trains no teacher")
        classes = len(self.config.data.classes)
        with torch.random.fork_rng(devices=[]):  # building seeds torch's generator
            distiller = build_model(self.config, classes, self.folder.parent)
        assert isinstance(distiller, Distiller)
        if trained:
            state = load_weights(self.folder / "teacher.pt")
            student = load_weights(self.folder / "weights.pt")
            state |= {f"student.{name}": value for name, value in student.items()}
            distiller.load_state_dict(state)
        return distiller.eval()

    def matches(
        self, iteration: int | None = None, measure: str = "AP", test: bool = False
    ) -> Matches:
        """The matches from which a measure and its interval are computed.

        ``measure`` is AP, AP50, AP75, AP_S, AP_M, AP_L, or ``teacher``: the AP of the teacher,
        which is given the labels. ``iteration`` is that of an evaluation; default: the last. With
        ``test`` they are on the images of `Store.test`: AP, AP50 and AP75, last iteration only.

        Raises:
            RuntimeError: the run was imported from a report that did not keep these matches.
        """
        t = self.config.iterations if iteration is None else iteration
        kept = "test" if test else matches_of(measure)
        self.compared.add((t, kept))
        files = self.files
        if files.is_imported and not files.matches(t, kept).exists():
            raise RuntimeError(
                f"run {self.config.id} ({self.config.label()}) was imported without the matches of "
                f"{kept} at iteration {t}, which its report did not compare; remove {files.path}, "
                "and it is trained"
            )
        return _matches(files, t, kept, measure)


@lru_cache(maxsize=4096)  # the figures and tables of a notebook ask for the same ones
def _matches(files: RunFolder, t: int, kept: str, measure: str) -> Matches:
    if measure in THRESHOLDS:
        return _matches(files, t, kept, kept).at(THRESHOLDS[measure])
    return Matches.load(files.matches(t, kept))


class RunsFailed(RuntimeError):
    """Some runs failed; the message names each, with the end of its log and the log's path."""


class Store:
    """Finished and unfinished runs in one folder, which several processes may use at once.

    The folder is ``root``, else ``$SSSD_RUNS``, else ``runs/`` of the checkout.
    """

    may_train = True
    """False within `without_training`."""

    def __init__(self, root: str | Path | None = None) -> None:
        self.root = absolute("store", root or os.environ.get("SSSD_RUNS") or home() / "runs")

    def folder(self, config: RunConfig) -> Path:
        return self.root / config.id

    def files(self, config: RunConfig) -> RunFolder:
        """The run's files; `RunFolder.best` gives the imported ones, where these are further."""
        return RunFolder(self.folder(config))

    def finished(
        self,
        config: RunConfig,
        until: int | None = None,
        weights: bool = False,
        keep: Iterable[int] = (),
    ) -> bool:
        """Whether the run is trained to its end, or to ``until`` with the checkpoints of ``keep``.

        An imported run counts, unless its ``weights`` are needed. A damaged run does not.
        """
        files = self.files(config) if weights else self.files(config).best()
        if not files.finished:
            kept = all(files.fork(t).exists() for t in keep)
            if until is None or files.reached() < until or not kept:
                return False
        return not files.damage(weights)

    def get(
        self,
        configs: Sequence[RunConfig],
        *,
        jobs: int | None = None,
        until: int | None = None,
        weights: bool = False,
    ) -> list[Run]:
        """The runs asked for, in order; those that are missing are trained first.

        Args:
            configs: the runs.
            jobs: how many processes at a time; default: one per GPU, or without GPUs one per core.
            until: train only so far; the runs can be continued later.
            weights: also train the runs of which there are only imported records.

        Raises:
            ValueError: ``jobs`` is less than 1, or the folder cannot be written.
            RunsFailed: some runs failed; the message names each, with the end of its log. All
                others are finished.
            RuntimeError: some runs are missing within `without_training`.
        """
        at_a_time = slots(jobs)
        plan = _of_main_process(self.plan(configs, until, weights))
        if plan and not self.may_train:
            first = next(iter(plan.values())).config
            raise RuntimeError(
                f"{len(plan)} runs are not among the records, the first of them {first.label()} "
                f"({first.id}); make reports trains them"
            )
        if plan:
            check_folder("store", self.root)
        if plan and is_distributed():
            for job in plan.values():  # all processes train one run together
                train_once(self.root, job)
        elif plan:
            self._train(plan, at_a_time)
        return [Run(config, self.folder(config)) for config in configs]

    def plan(
        self, configs: Iterable[RunConfig], until: int | None = None, weights: bool = False
    ) -> dict[str, Job]:
        """The missing runs by id, each after those that it starts from.

        An imported run is missing if its weights are needed: if another run starts from it, or if
        ``weights`` asks for those of all ``configs``.
        """
        plan: dict[str, Job] = {}

        def need(config: RunConfig, until: int | None, keep: set[int], weights: bool) -> set[str]:
            """Plan a run after those that it starts from; return its id, unless it is finished."""
            if until is not None and until >= config.iterations:
                until = None
            if config.id in plan:
                job = plan[config.id]
                if until is None or job.until is None:
                    job.until = None
                else:
                    job.until = max(until, job.until)
                job.keep |= keep
                return {config.id}
            if self.finished(config, until, weights, keep):
                return set()
            after: set[str] = set()
            start: Any = config.start
            while isinstance(start, RunConfig):  # LabelEnc's stage 2 also reads stage 1's start
                after |= need(start, None, set(), True)
                start = start.start if config.method == "labelenc" else None
            files, parent, t1 = self.files(config), config.parent, config.t1
            begins_at_t1 = not files.reached() and (until is None or until > t1)
            if parent is not None and begins_at_t1 and not self.files(parent).fork(t1).exists():
                # Train a parent with imported records to its end: only then do its own replace them.
                imported = self.files(parent).imported.finished
                after |= need(parent, None if imported else t1, {t1}, True)
            plan[config.id] = Job(config, files, until, keep, after)
            return {config.id}

        for config in configs:
            need(config, until, set(), weights)
        return plan

    def _train(self, plan: Mapping[str, Job], at_a_time: int) -> None:
        """Train runs in parallel, and show the progress."""
        print(
            f"{len(plan)} {'run' if len(plan) == 1 else 'runs'} to train, "
            f"{min(at_a_time, len(plan))} at a time; {self.root}",
            flush=True,
        )
        progress, jobs = Progress(plan), longest_first(plan)
        with progress.bar:
            _run_jobs("runs", jobs, train_once, self.root, at_a_time, progress.show)

    def test(self, configs: Iterable[RunConfig], data: Path, jobs: int | None = None) -> None:
        """Detect with finished students on other images, unless they have done so before.

        Args:
            configs: the runs; those without weights here are left out.
            data: the folder of a data set, whose validation part is used.
            jobs: how many processes at a time; default: one per GPU, or without GPUs one per core.

        Raises:
            ValueError: ``jobs`` is less than 1.
            RunsFailed: some evaluations failed; the message names each, with the end of its log.
        """
        at_a_time = slots(jobs)
        waiting = {}
        for config in configs:
            files = self.files(config)
            tested = files.matches(config.iterations, "test").exists()
            if (files.path / "weights.pt").exists() and not tested:
                waiting[config.id] = Job(config, files)
        if waiting:
            print(f"{len(waiting)} finished runs to be evaluated on further images", flush=True)
            _run_jobs("evaluations", waiting, test_once, data, at_a_time)


def _run_jobs(
    what: str,
    jobs: Mapping[str, Job],
    call: Callable[[Path, Job], None],
    place: Path,
    at_a_time: int,
    show: Callable[[Collection[str], int], None] | None = None,
) -> None:
    """Execute ``call(place, job)`` for all jobs in worker processes; RunsFailed names failures."""
    workers = [Worker(slot) for slot in range(at_a_time)]

    def start(id: str, slot: int) -> Worker:
        return workers[slot].start(jobs[id].files.log, call, place, jobs[id])

    try:
        failed = side_by_side({id: job.after for id, job in jobs.items()}, start, at_a_time, show)
    finally:
        for worker in workers:
            worker.stop()
    if failed:
        each = (f"\n- {jobs[id].config.label()} ({id}): {why}" for id, why in failed.items())
        raise RunsFailed(f"{len(failed)} of {len(jobs)} {what} failed:{''.join(each)}")


def compare(ours: Sequence[Path], theirs: Sequence[Path], measure: str = "AP") -> Interval:
    """The final measure of one group of runs minus that of another, paired by seed and image.

    Args:
        ours, theirs: folders of runs, in each group one per seed.
        measure: as `Run.matches` takes it.

    Raises:
        ValueError: a run is not finished or lacks the measure, or the groups differ in seeds or
            validation images.
    """
    groups: tuple[dict[int, Matches], ...] = ({}, {})
    seen = set()
    for by_seed, folders in zip(groups, (ours, theirs), strict=True):
        for files in map(RunFolder, folders):
            config = read_json(files.path / "config.json")
            t, kept = config["iterations"], matches_of(measure)
            if not files.finished or not files.matches(t, kept).exists():
                what = f"kept nothing on {measure}" if files.finished else "is not finished"
                raise ValueError(f"runs: {files.id} {what}; expected another run")
            if config["seed"] in by_seed:
                given = f"two runs of seed {config['seed']} in one group"
                raise ValueError(f"runs: {given}; expected one for each seed")
            by_seed[config["seed"]] = _matches(files, t, kept, measure)
            seen.add(config["data"]["val"])
    seeds = [sorted(by_seed) for by_seed in groups]
    if seeds[0] != seeds[1]:
        raise ValueError(f"runs: seeds {seeds[0]} against {seeds[1]}; expected the same seeds")
    if len(seen) > 1:
        raise ValueError("runs: different validation data; expected the same in both groups")
    return difference(*([by_seed[seed] for seed in seeds[0]] for by_seed in groups))


LOCK_SECONDS = 10.0
"""How long a process waits for a lock before it reports to those that train with it, and waits
again: after some minutes without a word they would believe it dead."""


def train_once(root: Path, job: Job) -> None:
    """Train a run under its lock; another process that needs it waits until it is far enough.

    If several processes train the run together, the main one has the lock.
    """
    lock, missing = FileLock(root / f"{job.config.id}.lock"), True
    try:
        while missing and not _of_main_process(lock.is_locked):
            if not is_distributed() or PartialState().is_main_process:
                with suppress(Timeout):
                    lock.acquire(LOCK_SECONDS)
                missing = not Store(root).finished(job.config, job.until, True, job.keep)
            missing = _of_main_process(missing)
        if missing:
            train(job.config, job.files.path, until=job.until, keep=job.keep)
    finally:
        lock.release()


def is_distributed() -> bool:
    """Whether this is one of several processes that torchrun or accelerate started together."""
    return "LOCAL_RANK" in os.environ


def _of_main_process(value: Any) -> Any:
    """The value that the main process has, in all processes."""
    if not is_distributed():
        return value
    PartialState(cpu=not torch.cuda.is_available())
    return broadcast_object_list([value])[0]


def test_once(data: Path, job: Job) -> None:
    """Save the matches of a finished run's student on other images."""
    evaluate_run(job.files.path, data)[2]["AP"].save(job.files.matches(job.length, "test"))


@contextmanager
def without_training() -> Iterator[None]:
    """Within this context it is an error to ask a store for a run that is missing."""
    Store.may_train = False
    try:
        yield
    finally:
        Store.may_train = True
