"""The files of a run: written so that a reader sees the old state or the new one, never half."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch


def append(file: Path, record: dict[str, Any]) -> None:
    """Add one line of JSON; a line is either whole or, after a crash, the torn last one."""
    with file.open("a") as out:
        out.write(json.dumps(record) + "\n")


def mend(file: Path) -> None:
    """Drop a last line that a crash tore, so that the next one starts a line of its own."""
    if file.exists():
        text = file.read_bytes()
        if not text.endswith(b"\n"):
            with file.open("r+b") as out:
                out.truncate(text.rfind(b"\n") + 1)


def save_atomically(value: Any, file: Path) -> None:
    """torch.save that leaves either the old file or the new one, whenever it is stopped."""
    temporary = file.with_name(f".{file.name}.part")  # one writer: the run is locked
    with temporary.open("wb") as out:
        torch.save(value, out)
        out.flush()
        os.fsync(out.fileno())
    os.replace(temporary, file)


def write_json(value: Any, file: Path) -> None:
    """Write a small file so that a reader sees the old one or the new one, never half."""
    temporary = file.with_name(f".{file.name}.part")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
    os.replace(temporary, file)


def read_records(file: Path) -> Iterator[dict[str, Any]]:
    """The records of a ``.jsonl`` file, the latest of each iteration, in order.

    A line still being written is not read; an iteration done again after a restart counts once.
    """
    text = file.read_text() if file.exists() else ""
    whole = text[: text.rfind("\n") + 1].splitlines()
    latest = {record["iteration"]: record for record in map(json.loads, whole)}
    return (latest[t] for t in sorted(latest))


def last_iteration(file: Path) -> int:
    """The last whole record's iteration, from the end of the file alone."""
    if not file.exists():
        return 0
    with file.open("rb") as lines:
        lines.seek(max(file.stat().st_size - 4096, 0))
        whole = lines.read().split(b"\n")[:-1]
    return int(json.loads(whole[-1])["iteration"]) if whole else 0


class Arrays:
    """A dataclass of arrays that is kept as an .npz file."""

    def save(self, path: Path) -> None:
        """Write all arrays, compressed; the file appears whole or not at all."""
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        with open(part, "wb") as file:
            np.savez_compressed(file, **self.__dict__)
        os.replace(part, path)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            ValueError: the file does not hold these arrays.
        """
        names = [field.name for field in fields(cls)]  # type: ignore[arg-type]
        with np.load(path) as file:
            if sorted(file.files) != sorted(names):
                raise ValueError(f"{path}: holds {file.files}; expected {names}")
            return cls(**{name: file[name] for name in names})
