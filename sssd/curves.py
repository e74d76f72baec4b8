"""Live curves: TensorBoard shows what runs record while they train."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .config import RunConfig
from .parameters import check_folder
from .records import RunFolder
from .runs import Store

SECONDS = 5.0
"""The time between two looks at the runs' records."""


@contextmanager
def curves(
    folder: Path, store: Store, configs: Sequence[RunConfig]
) -> Iterator[Callable[[], None]]:
    """Within this context TensorBoard's files in ``folder`` follow the records of some runs.

    Each iteration's losses, λ, share and learning rate are ``training/…``, the AP of student and
    teacher is ``evaluation/…``. Runs do not change: only their records are read. The value of the
    context is a function that reads them at once.

    Raises:
        ValueError: TensorBoard is not installed, or the folder cannot be written.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("tensorboard: not installed; expected pip install tensorboard") from None
    check_folder("tensorboard", folder)
    runs = {
        RunFolder(store.folder(config)): SummaryWriter(folder / f"{config.label()} {config.id}")
        for config in configs
    }
    read: Counter[Path] = Counter()

    def new(file: Path) -> Iterator[Mapping[str, Any]]:
        """The records that were added since the last look; an incomplete line waits."""
        if file.exists():
            with file.open("rb") as lines:
                lines.seek(read[file])
                for line in lines:
                    if line.endswith(b"\n"):
                        read[file] += len(line)
                        yield json.loads(line)

    def update() -> None:
        for files, writer in runs.items():
            for part, file in (("training", files.metrics), ("evaluation", files.evaluations)):
                for record in new(file):
                    for name, value in record.items():
                        if isinstance(value, float) and "seconds" not in name:
                            writer.add_scalar(f"{part}/{name}", value, record["iteration"])
            writer.flush()

    def follow() -> None:
        while not ended.wait(SECONDS):
            update()

    ended = threading.Event()
    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield update
    finally:
        ended.set()
        thread.join()
        update()
        for writer in runs.values():
            writer.close()
