"""The files of a run: one way to write them, after which they are whole, and one way to read them."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
import torch
from torch import Tensor

from . import __version__


@contextmanager
def atomically(file: Path) -> Iterator[IO[bytes]]:
    """Write a file that replaces the old one only when it is whole and on the disk."""
    temporary = file.with_name(f".{file.name}.part")  # no process id: a run has one writer
    try:
        with temporary.open("wb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(value: Any, file: Path) -> None:
    with atomically(file) as out:
        out.write((json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def append(file: Path, record: Mapping[str, Any]) -> None:
    """Add one line of JSON; a crash while it is written leaves a torn last line."""
    with file.open("a") as out:
        out.write(json.dumps(record) + "\n")


def mend(file: Path) -> None:
    """Remove a torn last line, so that the next record begins a line of its own."""
    if file.exists():
        text = file.read_bytes()
        if not text.endswith(b"\n"):
            with file.open("r+b") as out:
                out.truncate(text.rfind(b"\n") + 1)


def read_records(file: Path) -> Iterator[dict[str, Any]]:
    """The records of a ``.jsonl`` file by rising iteration; none where there is no file.

    A torn last line is left out. Of an iteration that was done again after a restart the later
    record counts.
    """
    text = file.read_text() if file.exists() else ""
    whole = text[: text.rfind("\n") + 1].splitlines()
    latest = {record["iteration"]: record for record in map(json.loads, whole)}
    return (latest[t] for t in sorted(latest))


def load_weights(file: Path) -> dict[str, Any]:
    """What `torch.save` wrote, on the CPU; tensors and plain values only, never code."""
    return torch.load(file, map_location="cpu", weights_only=True)


def software() -> dict[str, Any]:
    """The versions and the kind of machine that a run's numbers come from."""
    names = ("torch", "torchvision", "pycocotools", "accelerate", "numpy")
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        cpu = models[0].split(":", 1)[1].strip() if models else cpu
    return {
        "sssd": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in names},
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": f"{os.cpu_count()} × {cpu}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


class Arrays:
    """A dataclass of arrays that is kept as an .npz file."""

    def save(self, file: Path) -> None:
        with atomically(file) as out:
            np.savez_compressed(out, **self.__dict__)

    @classmethod
    def load(cls, file: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            ValueError: the file does not hold these arrays.
        """
        names = [field.name for field in fields(cls)]  # type: ignore[arg-type]
        with np.load(file) as arrays:
            if sorted(arrays.files) != sorted(names):
                raise ValueError(f"{file}: holds {arrays.files}; expected {names}")
            return cls(**{name: arrays[name] for name in names})


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run.

    ``config.json``, ``environment.json`` and ``log.txt`` are there from the start. While the run
    trains, ``metrics.jsonl`` grows by a line each iteration, and ``evaluations.jsonl`` and
    ``matches/`` by an entry each evaluation, whose detections replace ``detections.npz``;
    ``last.pt`` is its latest checkpoint and ``fork-<t>.pt`` one that other runs go on from. A
    finished run has ``weights.pt`` (the student), ``teacher.pt`` (teacher and adapter) and
    ``done.json``, which has a digest of the names and shapes of the student's weights, too.

    ``imported/`` holds the records, without weights, of a run that was trained elsewhere. If it is
    trained here all the same, as another run starts from its weights, these records stand until the
    training has finished, and go then.
    """

    path: Path
    writes: bool = True
    """False in all but one of several processes that train a run together: they write nothing."""

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def evaluations(self) -> Path:
        return self.path / "evaluations.jsonl"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def detections(self) -> Path:
        return self.path / "detections.npz"

    def matches(self, t: int, measure: str) -> Path:
        return self.path / "matches" / f"{t:06d}-{measure}.npz"

    def fork(self, t: int) -> Path:
        return self.path / f"fork-{t}.pt"

    @property
    def finished(self) -> bool:
        """Whether it was trained to its end here, or, of `imported`, elsewhere."""
        return (self.path / "done.json").exists()

    @property
    def imported(self) -> RunFolder:
        return RunFolder(self.path / "imported", writes=False)

    def best(self) -> RunFolder:
        """Where the records go furthest: here, or in `imported`."""
        if self.finished or not self.imported.path.exists():
            return self
        return max(self, self.imported, key=lambda files: (files.finished, files.reached()))

    def kept(self, name: str) -> Path:
        """A file of arrays that were computed from the run's weights, for a figure."""
        return self.path / "kept" / f"{name}.npz"

    def reached(self) -> int:
        """The last iteration on record, read from the end of the file alone; 0 before the first."""
        if not self.metrics.exists():
            return 0
        with self.metrics.open("rb") as lines:
            lines.seek(max(self.metrics.stat().st_size - 4096, 0))
            whole = lines.read().split(b"\n")[:-1]
        return int(json.loads(whole[-1])["iteration"]) if whole else 0

    def begin(self, config: Mapping[str, Any]) -> None:
        """Write the configuration and the environment; mend what an earlier crash tore."""
        if self.writes:
            (self.path / "matches").mkdir(parents=True, exist_ok=True)
            write_json(config, self.path / "config.json")
            write_json(software(), self.path / "environment.json")
            mend(self.metrics)
            mend(self.evaluations)

    def record_step(self, record: Mapping[str, Any]) -> None:
        if self.writes:
            append(self.metrics, record)

    def record_evaluation(
        self, t: int, record: Mapping[str, Any], detections: Arrays, matches: Mapping[str, Arrays]
    ) -> None:
        if self.writes:
            detections.save(self.detections)
            for measure, part in matches.items():
                part.save(self.matches(t, measure))
            append(self.evaluations, {"iteration": t, **record})

    def save_checkpoint(self, state: Mapping[str, Any], fork: bool = False) -> None:
        """Save the training's state, to go on from here or, as a ``fork``, for other runs."""
        if self.writes:
            for file in (self.metrics, self.evaluations):  # records never lag behind a checkpoint
                if file.exists():
                    with file.open("rb") as lines:
                        os.fsync(lines.fileno())
            target = self.fork(state["iteration"]) if fork else self.path / "last.pt"
            with atomically(target) as out:
                torch.save(dict(state), out)

    def load_checkpoint(self, parent: Path | None, t1: int) -> dict[str, Any] | None:
        """The latest checkpoint; without one, ``parent``'s at T1 with its records so far."""
        file = self.path / "last.pt"
        if not file.exists() and parent is not None:
            file = RunFolder(parent).fork(t1)
            if file.exists() and self.writes:
                self._copy_records(RunFolder(parent), t1)
        return load_weights(file) if file.exists() else None

    def _copy_records(self, parent: RunFolder, last: int) -> None:
        """Copy the records of the iterations shared with ``parent``, which may still be training."""
        for mine, theirs in (
            (self.metrics, parent.metrics),
            (self.evaluations, parent.evaluations),
        ):
            shared = [record for record in read_records(theirs) if record["iteration"] <= last]
            mine.write_text("".join(json.dumps(record) + "\n" for record in shared))
        for file in (parent.path / "matches").glob("*.npz"):
            if int(file.stem[:6]) <= last:
                (self.path / "matches" / file.name).write_bytes(file.read_bytes())

    def finish(
        self, weights: dict[str, Tensor], teacher: dict[str, Tensor] | None, done: Mapping[str, Any]
    ) -> None:
        """Save what a finished run keeps; ``last.pt`` is no longer needed."""
        if self.writes:
            for name, state in (("weights.pt", weights), ("teacher.pt", teacher)):
                if state is not None:
                    with atomically(self.path / name) as out:
                        torch.save(state, out)
            shapes = sorted((name, list(value.shape)) for name, value in weights.items())
            digest = hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16]
            write_json({**done, "shapes": digest}, self.path / "done.json")
            (self.path / "last.pt").unlink(missing_ok=True)
            if self.imported.path.exists():
                shutil.rmtree(self.imported.path)
