"""Processes in parallel: tasks in the order of their dependencies, workers, and their progress."""

from __future__ import annotations

import ctypes
import math
import os
import pickle
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol, Self

import torch
from tqdm import tqdm

from .config import RunConfig
from .records import NOTE, RunFolder

POLL_SECONDS = 1.0


def cores() -> int:
    """The number of cores that this process may use; if unknown, that of all cores."""
    asked = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    return len(asked(0))


class Started(Protocol):
    """A running task."""

    def poll(self) -> str | None:
        """None while it runs; then the reason if it failed, or empty text if it succeeded."""

    def stop(self) -> None:
        """End it at once."""


def side_by_side(
    waits_for: Mapping[str, Collection[str]],
    start: Callable[[str, int], Started],
    slots: int,
    show: Callable[[Collection[str], int], None] = lambda running, done: None,
) -> dict[str, str]:
    """Run tasks, at most ``slots`` at a time, each after those that it waits for.

    Args:
        waits_for: the tasks by name, the most urgent first; for each those that must end before it.
        start: starts a task in a free slot, 0 ≤ slot < ``slots``.
        slots: how many tasks may run at a time.
        show: is called every `POLL_SECONDS` with the running tasks and the number that succeeded.

    Returns:
        The reason for each failed task, by name; all others succeeded. A task that waits for a
        failed one is not started, and fails, too.
    """
    waiting = {name: set(before) for name, before in waits_for.items()}
    running: dict[str, tuple[int, Started]] = {}
    failed: dict[str, str] = {}
    try:
        while waiting or running:
            for name, before in list(waiting.items()):
                if before & failed.keys():
                    failed[name] = "a run that it starts from failed"
                    del waiting[name]
                elif len(running) < slots and not before & (waiting.keys() | running.keys()):
                    slot = min(set(range(slots)) - {slot for slot, _ in running.values()})
                    running[name] = (slot, start(name, slot))
                    del waiting[name]
            time.sleep(POLL_SECONDS)
            for name, (_, task) in list(running.items()):
                why = task.poll()
                if why is not None:
                    del running[name]
                    if why:
                        failed[name] = why
            show(running, len(waits_for) - len(waiting) - len(running) - len(failed))
    finally:
        for _, task in running.values():
            task.stop()
    return failed


@dataclass
class Job:
    """A run that is to be trained."""

    config: RunConfig
    files: RunFolder
    until: int | None
    """the last iteration that is needed; None: the last of the run"""
    keep: set[int]
    """iterations after which a checkpoint is kept for other runs to continue from"""
    after: set[str]
    """ids of the runs that must be trained first"""

    @property
    def length(self) -> int:
        return self.until or self.config.iterations

    @property
    def reached(self) -> int:
        """The iterations done so far; a stepwise run begins with those of its parent."""
        return min(self.files.reached(), self.length) or (
            self.config.t1 if self.config.stepwise else 0
        )

    @property
    def cost(self) -> float:
        """Rough cost of an iteration; one image with a plain ResNet-18 detector costs 1."""
        method = {"baseline": 1.0, "crops": 0.35, "labelenc": 1.3}.get(self.config.method, 1.6)
        deep = dict(resnet34=1.5, resnet50=2.0, swin_t=2.0, resnet101=3.0, resnext101=5.0)
        return method * deep.get(self.config.backbone, 1.0) * self.config.batch_size


def longest_first(plan: Mapping[str, Job]) -> dict[str, Job]:
    """Jobs by the cost of the longest chain that they begin, so that none is left for the end."""
    chains = {id: job.length * job.cost for id, job in plan.items()}
    for id, job in reversed(list(plan.items())):  # a plan has each run after those it waits for
        for before in job.after & plan.keys():
            own = plan[before]
            chains[before] = max(chains[before], own.length * own.cost + chains[id])
    return {id: plan[id] for id in sorted(plan, key=lambda id: -chains[id])}


class Progress:
    """A line of progress on the runs in training, for terminals, notebooks and logs."""

    def __init__(self, plan: Mapping[str, Job]) -> None:
        self.plan, self.began = plan, {id: job.reached for id, job in plan.items()}
        self.bar = tqdm(
            total=sum((job.length - self.began[id]) * job.cost for id, job in plan.items()),
            bar_format="{percentage:3.0f}% |{bar:20}| {elapsed} gone, {remaining} left; {desc}",
            smoothing=0,
            file=sys.stdout,
        )
        self.pause = 1 if sys.stdout.isatty() else 5 if "ipykernel" in sys.modules else 20
        self.start, self.shown = time.monotonic(), -math.inf

    def show(self, running: Collection[str], done: int) -> None:
        reached = {id: max(job.reached, self.began[id]) for id, job in self.plan.items()}
        fresh = {id: reached[id] - began for id, began in self.began.items()}
        self.bar.n = sum(fresh[id] * job.cost for id, job in self.plan.items())
        speed = sum(fresh.values()) / (time.monotonic() - self.start)
        now = ", ".join(
            f"{self.plan[id].config.label()} {reached[id]}/{self.plan[id].length}" for id in running
        )
        self.bar.set_description_str(
            f"{speed:.1f} iterations/s, {done} of {len(self.plan)} runs done; {now}", refresh=False
        )
        if time.monotonic() - self.shown > self.pause:
            self.bar.refresh()
            self.shown = time.monotonic()


class Worker:
    """A process that imports the library once and executes calls one after another.

    Importing torch takes seconds, as long as a small run. On Linux each call runs in a process of
    its own, forked from this one; elsewhere a fork is not safe, so the worker ends with its call.
    """

    def __init__(self, environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", "import sssd.pool; sssd.pool.work()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=environment,
            start_new_session=True,  # so that `stop` reaches the forks, too
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.orders, self.reports = self.process.stdin, self.process.stdout
        os.set_blocking(self.reports.fileno(), False)

    def start(self, log: Path, call: Callable[..., None], *arguments: Any) -> None:
        """Call a function that is defined in a module; what it prints goes to ``log``."""
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log, self.said = log, b""
        self.began = log.stat().st_size if log.exists() else 0
        self.orders.write(pickle.dumps((log, call, arguments)))

    def poll(self) -> str | None:
        self.said += self.reports.read() or b""
        message, *ended = self.said.decode(errors="replace").split("\n")
        status = int(ended[0]) if ended else self.process.poll()
        if status is None:
            return None
        text = self.log.read_bytes()[self.began :] if self.log.exists() else b""
        lines = text.decode(errors="replace").strip().splitlines()
        for line in lines:
            if line.startswith(NOTE):
                tqdm.write(line, file=sys.stderr)
        if not status:
            return ""
        killed = f"stopped by signal {-status}; " if status < 0 else ""
        message = message or (lines[-1] if lines else "no message")
        return f"{killed}{message} (whole log: {self.log})"

    def stop(self) -> None:
        """End the worker, and the call that it executes, at once."""
        if self.orders.closed:
            return
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        self.orders.close()
        self.reports.close()
        self.process.wait()


class Workers:
    """A worker per slot, started when first needed, with one GPU or, without GPUs, one thread."""

    def __init__(self) -> None:
        self.gpus = torch.cuda.device_count()
        self.by_slot: dict[int, Worker] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self.by_slot.values():
            worker.stop()

    def start(self, slot: int, log: Path, call: Callable[..., None], *arguments: Any) -> Worker:
        worker = self.by_slot.get(slot)
        if worker is not None and worker.process.poll() is not None:  # it ended with its last call
            worker.stop()
            worker = None
        if worker is None:
            own = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
            if self.gpus:
                own = {"CUDA_VISIBLE_DEVICES": str(slot % self.gpus)}
            worker = self.by_slot[slot] = Worker({**os.environ, **own})
        worker.start(log, call, *arguments)
        return worker


def work() -> None:
    """Execute the calls that arrive on standard input, and report the exit status of each."""
    while True:
        try:
            log, call, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        own = os.getpid()
        child = os.fork() if sys.platform == "linux" else 0
        if not child:
            if os.getpid() != own:
                end_with(own)
            _make(log, call, arguments)
        ended, status = 0, 0
        while not ended:
            ended, status = os.waitpid(child, os.WNOHANG)
            # Nothing is sent during a call, so readable input is its end: the sender is gone.
            if not ended and select.select([sys.stdin], [], [], 0.05)[0]:
                os.kill(child, signal.SIGTERM)
                os.waitpid(child, 0)
                return
        with suppress(BrokenPipeError):  # the sender is gone, and the next read ends the loop
            os.write(1, f"\n{os.waitstatus_to_exitcode(status)}\n".encode())


def end_with(parent: int) -> None:
    """Let the system kill this process as soon as its parent is gone, for whatever reason."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it was gone before the line above
        os._exit(1)


def _make(log: Path, call: Callable[..., None], arguments: tuple[Any, ...]) -> NoReturn:
    """Execute a call, and end this process with status 0, or 1 after an exception.

    The exception's text is also sent to the parent, because the log may be on a full disk.
    """
    status, report = 1, os.dup(1)
    try:
        with log.open("ab") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        call(*arguments)
        status = 0
    except BaseException as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        with suppress(OSError):
            os.write(report, said.encode()[:4000])  # short enough to be written in one piece
            traceback.print_exc()
    finally:
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)  # without cleaning up what belongs to the parent
