"""Processes side by side: tasks in the order of their dependence, workers, and their progress."""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from tqdm import tqdm

from .config import RunConfig
from .records import NOTE, RunFolder

POLL_SECONDS = 1.0


def cores() -> int:
    """The cores this process may use where the system can tell, else all of the machine's."""
    asked = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    return len(asked(0))


class Started(Protocol):
    """A task at work."""

    def poll(self) -> str | None:
        """None while it is at work, then why it failed, or the empty text if it did not."""

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
        waits_for: the tasks by name, the most urgent first, each with those that must end before.
        start: starts a task in a slot, 0 ≤ slot < ``slots``, that is free.
        slots: how many may be at work at a time.
        show: is told every `POLL_SECONDS` which tasks are at work and how many have succeeded.

    Returns:
        Why each task that failed did, by name; the other tasks have succeeded. A task that waits
        for a failed one fails without being started.
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
    """A run to be trained."""

    config: RunConfig
    files: RunFolder
    until: int | None
    """the last iteration that is needed; None: the run's last"""
    keep: set[int]
    """iterations after which a checkpoint stays for other runs to go on from"""
    after: set[str]
    """ids of the runs that must be trained before"""

    @property
    def length(self) -> int:
        return self.until or self.config.iterations

    @property
    def reached(self) -> int:
        """The iterations that are done; a stepwise run begins with those that it shares."""
        return min(self.files.reached(), self.length) or (
            self.config.t1 if self.config.stepwise else 0
        )

    @property
    def cost(self) -> float:
        """Rough cost of an iteration, in that of a plain ResNet-18 detector's image."""
        method = {"baseline": 1.0, "crops": 0.35, "labelenc": 1.3}.get(self.config.method, 1.6)
        depth = {"resnet34": 1.5, "resnet50": 2.0, "resnet101": 3.0}.get(self.config.backbone, 1.0)
        return method * depth * self.config.batch_size


def longest_first(plan: Mapping[str, Job]) -> dict[str, Job]:
    """Jobs by the cost of the longest chain they begin, so that none is left alone at the end."""
    chains = {id: job.length * job.cost for id, job in plan.items()}
    for id, job in reversed(list(plan.items())):  # those that wait for a run come after it
        for before in job.after & plan.keys():
            own = plan[before]
            chains[before] = max(chains[before], own.length * own.cost + chains[id])
    return {id: plan[id] for id in sorted(plan, key=lambda id: -chains[id])}


class Progress:
    """A line of text, for terminals, notebooks and logs, on the runs that are being trained."""

    def __init__(self, plan: Mapping[str, Job]) -> None:
        self.plan, self.began = plan, {id: job.reached for id, job in plan.items()}
        pause = 1 if sys.stdout.isatty() else 5 if "ipykernel" in sys.modules else 20
        self.bar = tqdm(
            total=sum((job.length - self.began[id]) * job.cost for id, job in plan.items()),
            bar_format="{percentage:3.0f}% |{bar:20}| {elapsed} gone, {remaining} left; {desc}",
            smoothing=0,
            file=sys.stdout,
            **{"mininterval": pause, "maxinterval": pause, "miniters": 0},
        )
        self.bar.last_print_t = 0.0  # the first look is shown at once

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def show(self, running: Collection[str], done: int) -> None:
        reached = {id: max(job.reached, self.began[id]) for id, job in self.plan.items()}
        fresh = {id: reached[id] - began for id, began in self.began.items()}
        speed = sum(fresh.values()) / (time.time() - self.bar.start_t)
        now = ", ".join(
            f"{self.plan[id].config.label()} {reached[id]}/{self.plan[id].length}" for id in running
        )
        said = f"{speed:.1f} iterations/s, {done} of {len(self.plan)} runs done; {now}"
        self.bar.set_description_str(said, refresh=False)
        self.bar.update(sum(fresh[id] * job.cost for id, job in self.plan.items()) - self.bar.n)


class Worker:
    """A process that makes a call, with one GPU or, without any, one thread.

    Args:
        slot: 0, 1, …; those at work at a time have different ones.
        log: where what the call prints goes.
        call: a function that a module has.
    """

    def __init__(self, slot: int, log: Path, call: Callable[..., None], *arguments: Any) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log, self.began = log, log.stat().st_size if log.exists() else 0
        own = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        if gpus := torch.cuda.device_count():
            own = {"CUDA_VISIBLE_DEVICES": str(slot % gpus)}
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-c", "import sssd.pool; sssd.pool.work()"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=out,
                env={**os.environ, **own},
                start_new_session=True,  # so that `stop` reaches its own processes, too
            )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.report = self.process.stdout
        with self.process.stdin as order:
            pickle.dump((os.getpid(), call, arguments), order)

    def poll(self) -> str | None:
        status = self.process.poll()
        if status is None:
            return None
        text = self.log.read_bytes()[self.began :] if self.log.exists() else b""
        lines = text.decode(errors="replace").strip().splitlines()
        for line in lines:
            if line.startswith(NOTE):
                tqdm.write(line, file=sys.stderr)
        with self.report as report:
            message = report.read().decode() or (lines[-1] if lines else "no message")
        killed = f"stopped by signal {-status}; " if status < 0 else ""
        return f"{killed}{message} (whole log: {self.log})" if status else ""

    def stop(self) -> None:
        """End it at once."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait()


def work() -> None:
    """Make the call given on standard input; what it prints goes where its errors go.

    What an exception says goes to whoever asked, too: the log may lie on a full disk.
    """
    report = os.dup(1)
    os.dup2(2, 1)
    asker, call, arguments = pickle.load(sys.stdin.buffer)
    if sys.platform == "linux":
        # The system kills this process as soon as who asked is gone, however that came about.
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != asker:  # it was gone before
            return
    try:
        call(*arguments)
    except BaseException as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        os.write(report, said.encode()[:4000])  # so short that nobody has to read it meanwhile
        raise
