"""Live curves: TensorBoard shows what runs record while they train."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .config import RunConfig
from .parameters import check_folder
from .records import RunFolder, read_records
from .runs import Store

SECONDS = 30.0
"""The time between two looks at the runs' records; each look reads all of them."""


@contextmanager
def curves(folder: Path, store: Store, configs: Sequence[RunConfig]) -> Iterator[None]:
    """Within this context TensorBoard's files in ``folder`` follow the records of some runs.

    Each iteration's losses, λ, share and learning rate are ``training/…``, the AP of student and
    teacher is ``evaluation/…``. Runs do not change: only their records are read.

    Raises:
        ValueError: TensorBoard is not installed, or the folder cannot be written.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("tensorboard: not installed; expected pip install tensorboard") from None
    check_folder("tensorboard", folder)
    writers = {
        store.files(config): SummaryWriter(folder / f"{config.label()} {config.id}")
        for config in configs
    }
    shown: Counter[Path] = Counter()

    def follow() -> None:
        while not ended.wait(SECONDS):
            show(writers, shown)

    ended = threading.Event()
    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        show(writers, shown)
        for writer in writers.values():
            writer.close()


def show(writers: Mapping[RunFolder, Any], shown: Counter[Path]) -> None:
    """Give TensorBoard's writers the records of later iterations than ``shown`` has for their file.

    A run that goes on from a checkpoint repeats iterations; as it repeats their numbers, too, they
    are not shown again.
    """
    for files, writer in writers.items():
        for part, file in (("training", files.metrics), ("evaluation", files.evaluations)):
            try:
                records = read_records(file)
            except ValueError:  # damaged: the training itself says so, and begins again
                continue
            for record in [r for r in records if r["iteration"] > shown[file]]:
                shown[file] = record["iteration"]
                for name, value in record.items():
                    if isinstance(value, float) and "seconds" not in name:
                        writer.add_scalar(f"{part}/{name}", value, record["iteration"])
        writer.flush()
