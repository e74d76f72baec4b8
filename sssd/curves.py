"""Live curves: what runs record while they train, where TensorBoard shows it."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from .config import RunConfig
from .parameters import check_folder
from .records import RunFolder
from .runs import Store

SECONDS = 5.0
"""From one look into the runs' records to the next."""


class Curves:
    """As long as it is open, TensorBoard's files in ``folder`` follow the records of some runs.

    Losses, λ, share and learning rate of each iteration as ``training/…``; AP of student and
    teacher as ``evaluation/…``. It reads what training writes anyway, and changes no run.

    Raises:
        ValueError: TensorBoard is not installed, or the folder cannot be written.
    """

    def __init__(self, folder: Path, store: Store, configs: Sequence[RunConfig]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError(
                "tensorboard: not installed; expected pip install tensorboard"
            ) from None
        check_folder("tensorboard", folder)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._read: Counter[Path] = Counter()
        self._runs = {
            RunFolder(store.folder(config)): SummaryWriter(folder / f"{config.label()} {config.id}")
            for config in configs
        }

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._ended.set()
        self._thread.join()
        self._update()
        for writer in self._runs.values():
            writer.close()

    def _follow(self) -> None:
        while not self._ended.wait(SECONDS):
            self._update()

    def _update(self) -> None:
        for files, writer in self._runs.items():
            for part, file in (("training", files.metrics), ("evaluation", files.evaluations)):
                for record in self._new(file):
                    for name, value in record.items():
                        if isinstance(value, float) and "seconds" not in name:
                            writer.add_scalar(f"{part}/{name}", value, record["iteration"])
            writer.flush()

    def _new(self, file: Path) -> Iterator[Mapping[str, Any]]:
        """The records that were added since the last look; a line that is not whole waits."""
        if file.exists():
            with file.open("rb") as lines:
                lines.seek(self._read[file])
                for line in lines:
                    if line.endswith(b"\n"):
                        self._read[file] += len(line)
                        yield json.loads(line)
