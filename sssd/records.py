"""The files of a run: they are written whole or not at all, and checked when they are read.

Reading a damaged file raises a ValueError that names the file.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import os
import platform
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from . import __version__

SEAL = b"\nsha256:"
"""Checkpoints and files of weights end with this and the SHA-256 of everything before it."""
Sums = dict[str, tuple[int, str]]
"""Length and SHA-256 of files by name; a file that grows may have become longer since."""
NOTE = "sssd: "
"""A line of a run's log that begins with this is also shown to the user."""


class DiskFull(OSError):
    """A disk has no room for a file."""


def write(file: Path, content: bytes | memoryview) -> None:
    """Write a file; it replaces the old one only when it is whole and on the disk."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.part")
    with _room(file, len(content)):
        try:
            with temporary.open("wb") as out:
                out.write(content)
                out.flush()
                os.fsync(out.fileno())
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def _room(file: Path, size: int) -> Iterator[None]:
    """Name the disk if it is full, and how much the file needs."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(file.parent).free
        raise DiskFull(
            f"the disk of {file.parent} is full: {file.name} needs {max(size >> 10, 1):,} KiB and "
            f"{free >> 10:,} KiB are free; no checkpoint is lost, and with more room the same "
            "command goes on"
        ) from error


def write_json(value: Any, file: Path) -> None:
    write(file, _json(value))


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def read_json(file: Path) -> Any:
    """Read what `write_json` wrote."""
    try:
        return json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is damaged: expected JSON ({error})") from None


def append(file: Path, record: Mapping[str, Any]) -> None:
    """Add one line of JSON; a crash while writing leaves an incomplete last line."""
    line = json.dumps(record) + "\n"
    with _room(file, len(line)), file.open("a") as out:
        out.write(line)


def mend(file: Path) -> None:
    """Remove an incomplete last line, so that the next record begins on a line of its own."""
    if file.exists():
        os.truncate(file, file.read_bytes().rfind(b"\n") + 1)


def write_records(file: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write a ``.jsonl`` file: a line of JSON for each record."""
    write(file, "".join(json.dumps(record) + "\n" for record in records).encode())


def read_records(file: Path) -> list[dict[str, Any]]:
    """The records of a ``.jsonl`` file by rising iteration; none if there is no file.

    An incomplete last line is left out; if a restart repeated an iteration, its last record counts.
    """
    text = file.read_bytes() if file.exists() else b""
    latest = {}
    for n, line in enumerate(text[: text.rfind(b"\n") + 1].splitlines(), start=1):
        try:
            record = json.loads(line)
            latest[int(record["iteration"])] = record
        except (ValueError, TypeError, KeyError):
            what = f"line {n} is no record; remove its folder, and the run is trained again"
            raise ValueError(f"{file} is damaged: {what}") from None
    return [latest[t] for t in sorted(latest)]


def _saved(state: Mapping[str, Any]) -> memoryview:
    """What `torch.save` writes, sealed; in memory, as torch hides why a disk refuses a file."""
    out = io.BytesIO()
    torch.save(dict(state), out)
    out.write(SEAL + hashlib.sha256(out.getbuffer()).hexdigest().encode())
    return out.getbuffer()


def load_weights(file: Path) -> dict[str, Any]:
    """Load what `torch.save` wrote to the CPU; tensors and plain values only, never code.

    A file without a seal, which is from an older version or from elsewhere, need only be readable.
    """
    content = file.read_bytes()
    body, seal = content[: -len(SEAL) - 64], content[-len(SEAL) - 64 :]
    digest = seal.removeprefix(SEAL)
    if digest != seal and digest != hashlib.sha256(body).hexdigest().encode():
        raise ValueError(f"{file} is damaged: its contents do not match the SHA-256 at its end")
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds of errors on damaged files
        raise ValueError(f"{file} is damaged: expected what torch.save writes") from error


@lru_cache(maxsize=65536)
def _digest(file: Path, length: int, *state: int) -> str:
    """SHA-256 of a file's first ``length`` bytes, computed once while the file does not change.

    A file that changes has another ``state``: modification time, size or inode.
    """
    return hashlib.sha256(file.read_bytes()[:length]).hexdigest()


def software() -> dict[str, Any]:
    """The versions of the software and the kind of machine that a run's numbers come from."""
    names = ("torch", "torchvision", "pycocotools", "accelerate", "numpy")
    info = Path("/proc/cpuinfo")
    models = re.findall("^model name\\s*: (.*)", info.read_text() if info.exists() else "", re.M)
    cpu = models[0] if models else platform.processor() or platform.machine()
    return {
        "sssd": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in names},
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": f"{os.cpu_count()} × {cpu}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def npz(arrays: Mapping[str, np.ndarray]) -> memoryview:
    """The content of an .npz file with these arrays."""
    out = io.BytesIO()
    np.savez_compressed(out, **arrays)  # type: ignore[arg-type]
    return out.getbuffer()


def arrays_of(content: bytes) -> dict[str, np.ndarray]:
    """The arrays in the content of an .npz file, by name; a ValueError: it is none."""
    try:
        with np.load(io.BytesIO(content)) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except Exception as error:  # numpy raises many kinds of errors on damaged files
        raise ValueError(f"expected what numpy saves ({error})") from error


def load_arrays(file: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file by name."""
    try:
        return arrays_of(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from None


class Arrays:
    """A dataclass of arrays that is stored as an .npz file."""

    def save(self, file: Path) -> None:
        write(file, npz(self.__dict__))

    @classmethod
    def load(cls, file: Path) -> Self:
        """Read what `save` wrote."""
        return cls(**load_arrays(file))


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run.

    ``config.json``, ``environment.json`` and ``log.txt`` exist from the start. During training
    ``metrics.jsonl`` grows by a line per iteration, ``evaluations.jsonl`` and ``matches/`` by an
    entry per evaluation, and ``detections.npz`` has the last evaluation's detections. ``last.pt``
    is the latest checkpoint, ``fork-<t>.pt`` one that other runs continue from. A finished run has
    ``weights.pt`` (the student), ``teacher.pt`` (teacher and adapter) and ``done.json``, which also
    has a digest of the names and shapes of the student's weights.

    Each checkpoint contains length and SHA-256 of the records. ``sums.json`` contains those of all
    files when training has ended, at the run's end or where it was told to stop. A mismatch is
    reported, and the run continues from the latest checkpoint whose records match, or begins again.
    Files of older versions, which have no sums, are not checked.

    ``imported/`` has the records, without weights, of a run that was trained elsewhere. If another
    run needs its weights, it is trained here, too; its imported records are used until that
    training has finished, and are then removed.
    """

    path: Path
    writes: bool = True
    """False in all but one of the processes that train a run together: they write nothing."""

    @property
    def id(self) -> str:
        """The run's id: the name of its folder, also for its imported records."""
        return (self.path.parent if self.is_imported else self.path).name

    @property
    def imported(self) -> RunFolder:
        return RunFolder(self.path / "imported")

    @property
    def is_imported(self) -> bool:
        """Whether this is the folder `imported` of a run."""
        return self.path.name == "imported"

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

    def all_matches(self, until: float = math.inf) -> list[Path]:
        """The files of `matches` from all evaluations up to an iteration."""
        files = sorted((self.path / "matches").glob("*.npz"))
        return [file for file in files if int(file.stem.partition("-")[0]) <= until]

    def fork(self, t: int) -> Path:
        return self.path / f"fork-{t}.pt"

    def about(self) -> dict[str, Any]:
        """What ``config.json``, ``environment.json`` and ``done.json`` contain, if they exist."""
        files = {name: self.path / f"{name}.json" for name in ("config", "environment", "done")}
        return {name: read_json(file) for name, file in files.items() if file.exists()}

    @property
    def finished(self) -> bool:
        """Whether the run was trained to its end (in `imported`: elsewhere) and is undamaged."""
        return (self.path / "done.json").exists() and not self.damage()

    def damage(self, weights: bool = False) -> str:
        """A sentence on a file that has changed since training ended; empty if none has.

        It is also empty while the run is trained. With ``weights`` the files of weights are checked,
        too; they are large.
        """
        file = self.path / "sums.json"
        try:
            sums = read_json(file) if file.exists() else {}
            self._check({k: v for k, v in sums.items() if weights or not k.endswith(".pt")})
        except (TypeError, AttributeError):
            return f"{file} is damaged: expected lengths and hashes"
        except ValueError as error:
            return str(error)
        return ""

    def _check(self, sums: Sums) -> None:
        """Check that the files begin as ``sums`` says; a ValueError names one that does not."""
        for name, (length, digest) in sums.items():
            file = self.path / name
            if not file.exists():
                raise ValueError(f"{file} is gone")
            about = file.stat()
            if about.st_size < length:
                raise ValueError(f"{file} is shorter than it was")
            if _digest(file, length, about.st_mtime_ns, about.st_size, about.st_ino) != digest:
                raise ValueError(f"{file} is damaged: it has changed since its SHA-256 was noted")

    def _sums(self, *names: str, until: float = math.inf) -> Sums:
        """Sums of the records up to an iteration, and of the named files, if they exist."""
        files = [self.metrics, self.evaluations, *self.all_matches(until)]
        files += [self.path / name for name in names]
        contents = ((file, file.read_bytes()) for file in files if file.exists())
        return {
            file.relative_to(self.path).as_posix(): (len(x), hashlib.sha256(x).hexdigest())
            for file, x in contents
        }

    def best(self) -> RunFolder:
        """The folder whose records go further: this one, or `imported`."""
        if self.finished or not self.imported.path.exists():
            return self
        return max(self, self.imported, key=lambda files: (files.finished, files.reached()))

    def kept(self, name: str) -> Path:
        """A file of arrays that a figure has computed from the run's weights."""
        return self.path / "kept" / f"{name}.npz"

    def reached(self) -> int:
        """The last recorded iteration, read from the end of the file; 0 before the first.

        It is also 0 if that is damaged: training then reports it, and begins again.
        """
        if not self.metrics.exists():
            return 0
        with self.metrics.open("rb") as lines:
            lines.seek(max(self.metrics.stat().st_size - 4096, 0))
            whole = lines.read().split(b"\n")[:-1]
        with suppress(ValueError, TypeError, LookupError):
            return int(json.loads(whole[-1])["iteration"])
        return 0

    def last_evaluation(self) -> dict[str, Any]:
        """The record of the last evaluation; every finished run of a detector has one."""
        return read_records(self.evaluations)[-1]

    def begin(self, config: Mapping[str, Any]) -> None:
        """Write configuration and environment; remove what an earlier crash left."""
        if self.writes:
            if why := self.damage(weights=True):
                self._say(f"{why}; the run is trained again from its latest checkpoint")
            (self.path / "matches").mkdir(parents=True, exist_ok=True)
            left = self.path.rglob(".*.part")  # by a process that was killed
            for file in (self.path / "done.json", self.path / "sums.json", *left):
                file.unlink(missing_ok=True)
            write_json(config, self.path / "config.json")
            write_json(software(), self.path / "environment.json")
            mend(self.metrics)
            mend(self.evaluations)

    def _say(self, sentence: str) -> None:
        if self.writes:
            print(f"{NOTE}{self.id}: {sentence}", flush=True)

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
        """Save the training state, for this run or, as a ``fork``, for others to continue from."""
        if self.writes:
            for file in (self.metrics, self.evaluations):  # on the disk before the checkpoint
                if file.exists():
                    with file.open("rb") as lines:
                        os.fsync(lines.fileno())
            target = self.fork(state["iteration"]) if fork else self.path / "last.pt"
            write(target, _saved({**state, "records": self._sums(until=state["iteration"])}))

    def load_checkpoint(self, parent: Path | None, t1: int) -> dict[str, Any] | None:
        """The latest checkpoint whose records are intact; if there is none, ``parent``'s at T1.

        The records are cut to those of the checkpoint, or copied from ``parent``.
        """
        candidates = [*self.path.glob("last.pt"), *self.path.glob("fork-*.pt")]
        candidates.sort(key=lambda file: file.stat().st_mtime_ns, reverse=True)
        fork = RunFolder(parent).fork(t1) if parent is not None else None
        if fork is not None and fork.exists():
            candidates.append(fork)
        chosen, state, damaged = None, None, []
        for candidate in candidates:
            try:
                loaded = load_weights(candidate)
                RunFolder(candidate.parent)._check(loaded.get("records", {}))
            except ValueError as error:
                damaged.append(str(error))
                continue
            chosen, state = candidate, loaded
            break
        if damaged:
            goes_on = f"goes on from iteration {state['iteration']}" if state else "begins again"
            self._say(f"{'; '.join(dict.fromkeys(damaged))}; the run {goes_on}")
        if self.writes and chosen is not None and chosen == fork:
            self._copy_records(RunFolder(chosen.parent), t1)
        elif self.writes and (state is None or "records" in state):  # older versions have no sums
            for records in (self.metrics, self.evaluations):
                if records.exists():
                    kept = state["records"].get(records.name, (0,)) if state else (0,)
                    os.truncate(records, kept[0])
        return state

    def _copy_records(self, parent: RunFolder, last: int) -> None:
        """Copy the records of the iterations shared with ``parent``, which may be in training."""
        for file in (parent.metrics, parent.evaluations):
            shared = [record for record in read_records(file) if record["iteration"] <= last]
            write_records(self.path / file.name, shared)
        for file in parent.all_matches(until=last):
            write(self.path / "matches" / file.name, file.read_bytes())

    def finish(
        self, weights: dict[str, Tensor], teacher: dict[str, Tensor] | None, done: Mapping[str, Any]
    ) -> None:
        """Save what a finished run keeps, and remove ``last.pt``."""
        if self.writes:
            for name, state in (("weights.pt", weights), ("teacher.pt", teacher)):
                if state is not None:
                    write(self.path / name, _saved(state))
            shapes = sorted((name, list(value.shape)) for name, value in weights.items())
            digest = hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16]
            self.close({**done, "shapes": digest})
            (self.path / "last.pt").unlink(missing_ok=True)
            if self.imported.path.exists():
                shutil.rmtree(self.imported.path)

    def close(self, done: Mapping[str, Any] | None = None) -> None:
        """Write the sums of all files; ``done`` marks the run as finished."""
        if not self.writes:
            return
        if done is None:
            write_json(self._sums(), self.path / "sums.json")
            return
        names = ("config.json", "environment.json", "detections.npz", "weights.pt", "teacher.pt")
        sums, content = self._sums(*names), _json(done)
        sums["done.json"] = len(content), hashlib.sha256(content).hexdigest()
        write_json(sums, self.path / "sums.json")
        write(self.path / "done.json", content)  # last, because it marks the run as finished
