"""The run store: every run is trained once, whichever notebook, terminal or process asks.

One folder a run, named by the configuration's hash. Asking for runs trains what is missing in
dependency order (warm start first, a stepwise run after the fixed-λ run that it forks from),
independent runs side by side in processes of their own.
"""

from __future__ import annotations

import json
import os
import pickle
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import pandas as pd
import torch
from filelock import FileLock
from tqdm import tqdm

from .config import RunConfig
from .distiller import TAUGHT, Distiller
from .engine import open_split, parent_of, train
from .evaluation import THRESHOLDS, Detections, Matches
from .records import last_iteration, read_records
from .starts import build_model

POLL_SECONDS = 1.0


def home() -> Path:
    """Where ``runs/`` and ``reports/`` are: the checkout this package lies in, else the folder."""
    checkout = Path(__file__).resolve().parent.parent
    return checkout if (checkout / "pyproject.toml").exists() else Path.cwd()


def default_root() -> Path:
    """``$SSSD_RUNS``, else ``runs/`` of the checkout."""
    return Path(os.environ.get("SSSD_RUNS", home() / "runs")).expanduser()


def cores() -> int:
    """The cores this process may use, where the system can tell, and not all of the machine's."""
    asked = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    return len(asked(0))


@dataclass(frozen=True)
class Run:
    """What a run left in the store."""

    config: RunConfig
    folder: Path

    def metrics(self) -> pd.DataFrame:
        """A row an iteration: losses, learning rate, λ, share, gradient norm, seconds."""
        return pd.DataFrame(read_records(self.folder / "metrics.jsonl"))

    def evaluations(self) -> pd.DataFrame:
        """A row an evaluation: iteration, pycocotools' twelve numbers, seconds an image."""
        records = list(read_records(self.folder / "evaluations.jsonl"))
        return pd.DataFrame(records).drop(columns=["per_class", "area_limits"], errors="ignore")

    def record(self) -> dict[str, Any]:
        """What a report says of the run: label, configuration, machine, time, memory."""
        files = {name: self.folder / f"{name}.json" for name in ("config", "environment", "done")}
        read = {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}
        return {"label": self.config.label(), **read}

    def per_class(self) -> dict[str, float]:
        """AP of each class at the last evaluation."""
        return list(read_records(self.folder / "evaluations.jsonl"))[-1]["per_class"]

    def detections(self, iteration: int | None = None) -> Detections:
        """The validation set's detections at an evaluation; default: the last."""
        t = self.config.iterations if iteration is None else iteration
        return Detections.load(self.folder / "detections" / f"{t:06d}.npz")

    def distiller(self, trained: bool = True) -> Distiller:
        """A run's student, teacher and adapter, on the CPU in evaluation mode.

        Args:
            trained: as the run left them; otherwise as it began, from its start weights and with
                teacher and adapter untrained.

        Raises:
            ValueError: the run's method has no teacher.
        """
        if self.config.method not in TAUGHT:
            raise ValueError(f"run {self.config.id}: {self.config.method} trains no teacher")
        classes = len(open_split(self.config.data, "train").class_names)
        with torch.random.fork_rng(devices=[]):  # building seeds torch's generator
            distiller = build_model(self.config, classes, self.folder.parent)
        assert isinstance(distiller, Distiller)
        if trained:
            state, student = (
                torch.load(self.folder / name, map_location="cpu", weights_only=True)
                for name in ("teacher.pt", "weights.pt")
            )
            state |= {f"student.{name}": value for name, value in student.items()}
            distiller.load_state_dict(state)
        return distiller.eval()

    def matches(self, iteration: int | None = None, measure: str = "AP") -> Matches:
        """What the bootstrap of a measure needs, from the detections that were kept."""
        t = self.config.iterations if iteration is None else iteration
        return _matches(self.folder / "matches", t, measure)


# Kept: the figures and tables of a notebook ask for the same ones.
@lru_cache(maxsize=4096)
def _matches(folder: Path, t: int, measure: str) -> Matches:
    if measure in THRESHOLDS:
        return _matches(folder, t, "AP").at(THRESHOLDS[measure])
    return Matches.load(folder / f"{t:06d}-{measure}.npz")


@dataclass
class Job:
    """A run to be trained, as far as ``until`` (None: to its end)."""

    config: RunConfig
    until: int | None
    keep: set[int]
    after: set[str]
    slot: int = -1

    @property
    def length(self) -> int:
        return self.until or self.config.iterations

    @property
    def cost(self) -> float:
        """Rough cost of an iteration, in that of a plain ResNet-18 detector's image."""
        method = {"baseline": 1.0, "crops": 0.35, "labelenc": 1.3}.get(self.config.method, 1.6)
        depth = {"resnet34": 1.5, "resnet50": 2.0, "resnet101": 3.0}.get(self.config.backbone, 1.0)
        return method * depth * self.config.batch_size


class Worker:
    """A process that imports the library once and trains one run after the other.

    Importing torch takes seconds, as long as a small run. On Linux each run has a process of its
    own all the same, forked from this one; elsewhere, where a fork is not safe, the worker ends
    with its run.
    """

    def __init__(self, environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", "import sssd.runs; sssd.runs.work()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=environment,
            start_new_session=True,  # so that `stop` reaches the forks, too
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.orders, self.reports = self.process.stdin, self.process.stdout
        os.set_blocking(self.reports.fileno(), False)

    def start(self, root: Path, job: Job) -> None:
        self.orders.write(pickle.dumps((root, job.config, job.until, job.keep)))

    def poll(self) -> int | None:
        """The exit status of the run, None while it is at work."""
        report = self.reports.read(16)
        return int(report) if report else self.process.poll()

    def stop(self) -> None:
        """End it at once; the run at work keeps its last checkpoint."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        self.orders.close()
        self.reports.close()
        self.process.wait()


class Store:
    """Finished and unfinished runs in one folder; safe to be used by several processes at once."""

    def __init__(self, root: str | Path | None = None) -> None:
        self.root = (Path(root).expanduser() if root else default_root()).resolve()

    def folder(self, config: RunConfig) -> Path:
        return self.root / config.id

    def reached(self, config: RunConfig) -> int:
        """The last iteration on record."""
        return last_iteration(self.folder(config) / "metrics.jsonl")

    def finished(self, config: RunConfig, until: int | None = None) -> bool:
        """Whether the run is trained to its end, or at least to iteration ``until``."""
        if (self.folder(config) / "done.json").exists():
            return True
        return until is not None and self.reached(config) >= until

    def get(
        self, configs: Sequence[RunConfig], *, jobs: int | None = None, until: int | None = None
    ) -> list[Run]:
        """The runs asked for, in order; what is missing is trained first.

        Args:
            configs: the runs.
            jobs: processes at a time; default: one a GPU, or one a CPU core.
            until: train only so far; the runs can be continued later.

        Raises:
            ValueError: ``jobs`` is less than 1.
            RuntimeError: a run failed; names each, with the end of its log. Other runs are
                finished all the same.
        """
        if jobs is not None and jobs < 1:
            raise ValueError(f"jobs: {jobs}; expected at least one process")
        plan = self.plan(configs, until)
        if plan:
            if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                for job in plan.values():  # all processes train one run together
                    train(job.config, self.folder(job.config), until=job.until, keep=job.keep)
            else:
                self._train(plan, jobs)
        return [Run(config, self.folder(config)) for config in configs]

    def plan(self, configs: Iterable[RunConfig], until: int | None = None) -> dict[str, Job]:
        """The missing runs by id, each after those that it starts from."""
        plan: dict[str, Job] = {}

        def need(config: RunConfig, until: int | None, keep: set[int]) -> set[str]:
            if until is not None and until >= config.iterations:
                until = None
            if config.id in plan:
                job = plan[config.id]
                job.until = None if None in (until, job.until) else max(until or 0, job.until or 0)
                job.keep |= keep
                return {config.id}
            if self.finished(config, until):
                return set()
            after: set[str] = set()
            start: Any = config.start
            while isinstance(start, RunConfig):  # LabelEnc's stage 2 reads its start's start, too
                after |= need(start, None, set())
                start = start.start if config.method == "labelenc" else None
            parent = parent_of(config)
            later = until is None or until > config.switch
            if parent is not None and later and not self.reached(config):
                t1 = config.switch
                if not (self.folder(parent) / f"fork-{t1}.pt").exists():
                    after |= need(parent, t1, {t1})
            plan[config.id] = Job(config, until, keep, after)
            return {config.id}

        for config in configs:
            need(config, until, set())
        return plan

    def began(self, job: Job) -> int:
        """The iteration after which a job goes on; a fork begins at T1."""
        return self.reached(job.config) or (job.config.switch if job.config.stepwise else 0)

    def _train(self, plan: dict[str, Job], jobs: int | None) -> None:
        gpus = torch.cuda.device_count()
        slots = jobs or gpus or cores()
        waiting = _longest_first(plan)
        running: dict[str, Job] = {}
        workers: dict[int, Worker] = {}
        failed: dict[str, str] = {}
        began = {id: self.began(job) for id, job in plan.items()}
        todo = sum((job.length - began[id]) * job.cost for id, job in plan.items())
        print(
            f"{len(plan)} {'run' if len(plan) == 1 else 'runs'} to train, "
            f"{min(slots, len(plan))} at a time; {self.root}",
            flush=True,
        )
        pause = 1 if sys.stdout.isatty() else 5 if "ipykernel" in sys.modules else 20
        bar = tqdm(
            total=todo,
            bar_format="{percentage:3.0f}% |{bar:20}| {elapsed} gone, {remaining} left; {desc}",
            smoothing=0,
            file=sys.stdout,
        )
        shown, start = 0.0, time.monotonic()
        try:
            while waiting or running:
                for id, job in list(waiting.items()):
                    if job.after & failed.keys():
                        failed[id] = "a run that it starts from failed"
                        del waiting[id]
                    elif len(running) < slots and not job.after & (waiting.keys() | running.keys()):
                        free = set(range(slots)) - {other.slot for other in running.values()}
                        job.slot = min(free)
                        if job.slot not in workers:
                            workers[job.slot] = Worker(_environment(job.slot, gpus))
                        self.folder(job.config).mkdir(parents=True, exist_ok=True)
                        workers[job.slot].start(self.root, job)
                        running[id] = waiting.pop(id)
                time.sleep(POLL_SECONDS)
                for id, job in list(running.items()):
                    status = workers[job.slot].poll()
                    if status is not None:
                        del running[id]
                        if workers[job.slot].process.poll() is not None:
                            workers.pop(job.slot).stop()
                        if status:
                            killed = f"stopped by signal {-status}; " if status < 0 else ""
                            failed[id] = killed + _tail(self.folder(job.config) / "log.txt")
                reached = {
                    id: max(min(self.reached(job.config), job.length), began[id])
                    for id, job in plan.items()
                }
                bar.n = sum((reached[id] - began[id]) * job.cost for id, job in plan.items())
                fresh = sum(reached.values()) - sum(began.values())
                speed = f"{fresh / (time.monotonic() - start):.1f} iterations/s"
                done = len(plan) - len(waiting) - len(running) - len(failed)
                now = ", ".join(
                    f"{job.config.label()} {reached[id]}/{job.length}"
                    for id, job in running.items()
                )
                bar.set_description_str(
                    f"{speed}, {done} of {len(plan)} runs done; {now}", refresh=False
                )
                if time.time() - shown > pause:
                    bar.refresh()
                    shown = time.time()
        finally:
            for worker in workers.values():
                worker.stop()
            bar.close()
        if failed:
            names = "\n".join(
                f"- {plan[id].config.label()} ({id}): {why}" for id, why in failed.items()
            )
            raise RuntimeError(f"{len(failed)} of {len(plan)} runs failed:\n{names}")

    def listing(self) -> pd.DataFrame:
        """A row a run in the store: id, method, λ, detector, seed, iterations, AP, state."""
        rows = []
        for file in sorted(self.root.glob("*/config.json")):
            c, folder = json.loads(file.read_text()), file.parent
            ap = [r["AP"] for r in read_records(folder / "evaluations.jsonl")]
            state = "finished" if (folder / "done.json").exists() else "unfinished"
            lam = f"{c['lambda1']:g}" if "lambda1" in c else ""
            lam += f"→{c['lambda2']:g}" if c.get("lambda2") is not None else ""
            rows.append(
                {
                    "run": folder.name,
                    "method": c["method"],
                    "λ": lam,
                    "detector": c.get("detector", ""),
                    "backbone": c["backbone"],
                    "data": c["data"]["name"],
                    "seed": c["seed"],
                    "iterations": f"{last_iteration(folder / 'metrics.jsonl')}/{c['iterations']}",
                    "AP": round(ap[-1], 3) if ap else None,
                    "state": state,
                }
            )
        return pd.DataFrame(rows)


def _longest_first(plan: dict[str, Job]) -> dict[str, Job]:
    """Jobs by the cost of the longest chain they begin, so that none is left alone at the end."""
    chains = {id: job.length * job.cost for id, job in plan.items()}
    for id, job in reversed(plan.items()):  # those that wait for a run come after it
        for before in job.after & plan.keys():
            own = plan[before]
            chains[before] = max(chains[before], own.length * own.cost + chains[id])
    return {id: plan[id] for id in sorted(plan, key=lambda id: -chains[id])}


def _tail(log: Path) -> str:
    lines = log.read_text().strip().splitlines()
    return f"{lines[-1] if lines else 'no message'} (whole log: {log})"


def _environment(slot: int, gpus: int) -> dict[str, str]:
    """One GPU a worker, or one thread."""
    own = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return {**os.environ, **({"CUDA_VISIBLE_DEVICES": str(slot % gpus)} if gpus else own)}


def work() -> None:
    """Train the runs given on standard input, and say with which status each ended."""
    while True:
        try:
            root, config, until, keep = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        child = os.fork() if sys.platform == "linux" else 0
        if not child:
            _work(Store(root), config, until, keep)
        ended, status = 0, 0
        while not ended:
            ended, status = os.waitpid(child, os.WNOHANG)
            # Nothing is sent while a run is at work: standard input has ended, and who asked is gone.
            if not ended and select.select([sys.stdin], [], [], 0.05)[0]:
                os.kill(child, signal.SIGTERM)
                os.waitpid(child, 0)
                return
        with suppress(BrokenPipeError):  # who asked is gone, and the next order is the end
            os.write(1, f"{os.waitstatus_to_exitcode(status)}\n".encode())


def _work(store: Store, config: RunConfig, until: int | None, keep: set[int]) -> NoReturn:
    """Train a run under its lock: who else asks for it waits, and finds it done."""
    status = 1
    try:
        with (store.folder(config) / "log.txt").open("ab") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        with FileLock(store.root / f"{config.id}.lock"):
            if not store.finished(config, until):
                train(config, store.folder(config), until=until, keep=keep)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # a fork owns nothing of its parent's to clean up
