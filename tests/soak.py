"""Trains tiny runs for some minutes while it kills, damages and fills the disk at random.

Each run must end as one that was left alone. ``make soak MINUTES=30``; the seed that is printed,
given as ``--seed``, draws the same faults (when they strike depends on the machine).
"""

from __future__ import annotations

import argparse
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from filelock import FileLock, Timeout
from helpers import assert_equal_runs, chain, python, tiny, write_coco
from test_faults import children

from sssd.config import RunConfig
from sssd.engine import train
from sssd.profiles import open_data
from sssd.runs import Store

ASK = """
import pickle, sys
from pathlib import Path
from filelock import FileLock
from sssd.engine import train
from sssd.runs import Store
config, store = pickle.loads(Path(sys.argv[1]).read_bytes()), Store(sys.argv[2])
if sys.argv[3] == "alone":  # in this process, with a checkpoint after each iteration
    with FileLock(store.root / f"{config.id}.lock"):
        train(config, store.folder(config), checkpoint_seconds=0)
else:  # as the command line and the notebooks do, with workers
    store.get([config], jobs=2)
"""
DISK_MIB = 256
"""A stepwise run and its parent need four checkpoints of 42 MiB at most; one is being replaced."""
PATIENCE = 1200
"""Seconds after which something is said to hang, also on a machine that has much else to do."""


def mounted(place: Path) -> bool:
    """Whether a small file system could be mounted there."""
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(place)]
    return (
        bool(shutil.which("mount")) and not subprocess.run(command, capture_output=True).returncode
    )


def damage(root: Path, draw: random.Random) -> str:
    """Damage a file of the store; what was done to it."""
    files = sorted(x for x in root.rglob("*") if x.is_file() and x.suffix not in (".lock", ".txt"))
    files = [file for file in files if file.stat().st_size]
    if not files:
        return ""
    file = draw.choice(files)
    content = bytearray(file.read_bytes())
    kind, place = (
        draw.choice(("flipped a bit of", "truncated", "emptied")),
        draw.randrange(len(content)),
    )
    if kind == "flipped a bit of":
        content[place] ^= 1 << draw.randrange(8)
    file.write_bytes(
        content if kind.startswith("flipped") else content[: place * (kind != "emptied")]
    )
    return f"{kind} {file.relative_to(root)}"


def strike(process: subprocess.Popen[str], draw: random.Random) -> str:
    """Kill the process, what it has begun, or both; whom."""
    runs = children(process.pid)
    both = [process.pid, *runs]
    whom, ids = draw.choice([("who asked", both[:1]), ("runs", runs), ("who asked and runs", both)])
    number = draw.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
    for id in ids:
        try:
            os.kill(id, number)
        except ProcessLookupError:
            continue  # it has just ended
    return f"{number.name} to {whom}" if ids else ""


def attempt(config: RunConfig, store: Store, job: Path, draw: random.Random, full: bool) -> str:
    """Train, and disturb it once; what was done."""
    filler, fault = store.root / "filler", ""
    if full:
        free = shutil.disk_usage(store.root).free
        left = (1 << 20) + draw.randrange(8 << 20)  # for less than a few checkpoints
        filler.write_bytes(bytes(max(free - left, 0)))
        fault = "full disk"
    process = python(ASK, job, store.root, draw.choice(("alone", "workers")))
    try:
        process.wait(timeout=PATIENCE if full else draw.uniform(4, 25))
    except subprocess.TimeoutExpired:
        fault = strike(process, draw)
    try:
        _, errors = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        raise RuntimeError(f"it still went on {PATIENCE} s after {fault}") from None
    if full and process.returncode and "DiskFull" not in errors and "No space left" not in errors:
        raise RuntimeError(f"a full disk is not named: {errors[-500:]}")
    filler.unlink(missing_ok=True)
    for run in [*chain(config), config.parent]:
        if run:
            try:
                with FileLock(store.root / f"{run.id}.lock", timeout=PATIENCE):
                    pass
            except Timeout:
                raise RuntimeError(f"a run is still at work after {fault}") from None
    return fault


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    given = parser.parse_args()
    print(f"seed {given.seed}", flush=True)
    draw = random.Random(given.seed)
    runs = faults = differences = 0
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        data = open_data("smoke", write_coco(root / "colours"))
        common = {"iterations": 8, "eval_every": 2, "backbone": "slim18"}
        configs = [
            tiny(data, method="baseline", **common),
            tiny(data, method="sssd", lambda2=75.0, t1=3, **common),
        ]
        for number, config in enumerate(configs):
            train(config, root / "expected" / str(number) / config.id)  # without a parent beside it
            (root / f"job{number}").write_bytes(pickle.dumps(config))
        disk = mounted(root / "small")
        if not disk:
            print("no small file system can be mounted: no disk is filled", flush=True)
        end = time.monotonic() + 60 * given.minutes
        try:
            while time.monotonic() < end:
                number = draw.randrange(len(configs))
                config, store = configs[number], Store(root / "small" / f"store{runs}")
                store.root.mkdir()
                try:
                    for _ in range(draw.randrange(1, 5)):
                        full = disk and draw.random() < 0.25
                        done = [attempt(config, store, root / f"job{number}", draw, full)]
                        done += [damage(store.root, draw) for _ in range(draw.randrange(3))]
                        faults += len(list(filter(None, done)))
                        print(f"run {runs + 1}: {', '.join(filter(None, done))}", flush=True)
                    store.get([config], jobs=1)
                    assert_equal_runs(
                        store.folder(config), root / "expected" / str(number) / config.id
                    )
                except (AssertionError, RuntimeError, OSError, ValueError) as error:
                    differences += 1
                    print(f"run {runs + 1} differs: {error}", flush=True)
                runs += 1
                shutil.rmtree(store.root)
        finally:
            if disk:
                subprocess.run(["umount", "-l", str(root / "small")], check=True)
    print(f"{runs} runs, {faults} faults, {differences} differences from uninterrupted runs")
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
