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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Protocol, Self

import torch
from tqdm import tqdm

from .config import RunConfig
from .records import NOTE, RunFolder

POLL_SECONDS = 1.0


def cores() -> int:
    """The number of cores that this process may use; if unknown, that of all cores."""
    known = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1


def slots(jobs: int | None) -> int:
    """How many processes run at a time: ``jobs``, or one per GPU, or without GPUs one per core.

    Raises:
        ValueError: ``jobs`` is less than 1.
    """
    if jobs is not None and jobs < 1:
        raise ValueError(f"jobs: {jobs}; expected at least one process")
    return jobs or torch.cuda.device_count() or cores()


class Task(Protocol):
    """A task that has been started."""

    def poll(self) -> str | None:
        """None while it runs; then the reason if it failed, or empty text if it succeeded."""

    def stop(self) -> None:
        """End it at once."""


def side_by_side(
    waits_for: Mapping[str, Collection[str]],
    start: Callable[[str, int], Task],
    slots: int,
    show: Callable[[Collection[str], int], None] | None = None,
) -> dict[str, str]:
    """Run tasks, at most ``slots`` at a time, each after those that it waits for.

    Args:
        waits_for: the tasks by name, the most urgent first; for each those that must end before it.
        start: starts a task in a free slot, 0 ≤ slot < ``slots``.
        slots: how many tasks may run at a time.
        show: called every `POLL_SECONDS` with the running tasks and the number that succeeded.

    Returns:
        The reason for each failed task, by name; all others succeeded. A task that waits for a
        failed one is not started, and fails, too.
    """
    waiting = {name: set(before) for name, before in waits_for.items()}
    running: dict[str, tuple[int, Task]] = {}
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
            if show is not None:
                show(running, len(waits_for) - len(waiting) - len(running) - len(failed))
    finally:
        for _, task in running.values():
            task.stop()
    return failed


@dataclass
class Job:
    """A run that a worker trains or tests."""

    config: RunConfig
    files: RunFolder
    until: int | None = None
    """the last iteration that is needed; None: the last of the run"""
    keep: set[int] = field(default_factory=set)
    """iterations after which a checkpoint is kept for other runs to continue from"""
    after: set[str] = field(default_factory=set)
    """ids of the runs in the same plan that must be trained first"""

    @property
    def length(self) -> int:
        return self.until or self.config.iterations

    @property
    def reached(self) -> int:
        """The iterations done so far; a stepwise run begins with those of its parent."""
        shared = self.config.t1 if self.config.stepwise else 0
        return min(self.files.reached() or shared, self.length)

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
        for before in job.after:
            alone = plan[before].length * plan[before].cost
            chains[before] = max(chains[before], alone + chains[id])
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
    its own, forked from this one; elsewhere a fork is not safe, so each call begins a new process.
    The process has one of the GPUs, by the number of its slot, or without GPUs one thread.
    """

    def __init__(self, slot: int) -> None:
        self.slot = slot
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, log: Path, call: Callable[..., None], *arguments: Any) -> Self:
        """Call a function that is defined in a module; what it prints goes to ``log``."""
        if self.process is None or self.process.poll() is not None:
            self.stop()
            self._start_process()
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log, self.reply = log, b""
        self.log_began = log.stat().st_size if log.exists() else 0
        self.calls.write(pickle.dumps((log, call, arguments)))
        return self

    def _start_process(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", "import sssd.pool; sssd.pool.execute_calls()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, **self._device()},
            start_new_session=True,  # so that `stop` reaches the forks, too
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.calls, self.replies = self.process.stdin, self.process.stdout
        os.set_blocking(self.replies.fileno(), False)

    def _device(self) -> dict[str, str]:
        """The environment variables that give the process its GPU or thread."""
        gpus = torch.cuda.device_count()
        if not gpus:
            return {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        return {"CUDA_VISIBLE_DEVICES": visible.split(",")[self.slot % gpus]}

    def poll(self) -> str | None:
        assert self.process is not None
        self.reply += self.replies.read() or b""
        message, *ended = self.reply.decode(errors="replace").split("\n")
        status = int(ended[0]) if ended else self.process.poll()
        if status is None:
            return None
        text = self.log.read_bytes()[self.log_began :] if self.log.exists() else b""
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
        """End the process, if there is one, and the call that it executes, at once."""
        if self.process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        self.calls.close()
        self.replies.close()
        self.process.wait()
        self.process = None


def execute_calls() -> None:
    """Execute the calls that arrive on standard input, and reply with the exit status of each."""
    while True:
        try:
            log, call, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        worker = os.getpid()
        child = os.fork() if sys.platform == "linux" else 0
        if not child:
            if os.getpid() != worker:
                end_with(worker)
            _call_and_exit(log, call, arguments)
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


def _call_and_exit(log: Path, call: Callable[..., None], arguments: tuple[Any, ...]) -> NoReturn:
    """Execute a call, and end this process with status 0, or 1 after an exception.

    The reply then has the exception's text, too, because the log may be on a full disk.
    """
    status, reply = 1, os.dup(1)
    try:
        with log.open("ab") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        call(*arguments)
        status = 0
    except BaseException as error:
        message = " ".join(f"{type(error).__name__}: {error}".split())
        with suppress(OSError):
            os.write(reply, message.encode()[:4000])  # short enough to be written in one piece
            traceback.print_exc()
    finally:
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)  # without cleaning up what belongs to the parent
