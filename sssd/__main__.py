"""The command line: ``python -m sssd runs | train | show | reports | figures | import | bench``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from .config import METHODS
from .profiles import PROFILES, configure, open_data
from .records import RunFolder, read_records
from .runs import Store, home

EXAMPLES = """examples:
  python -m sssd runs                                      what the store holds
  python -m sssd train --method sssd --seed 0 1 2          three seeds, side by side
  python -m sssd train --profile smoke --method lgd sssd   seconds a run: does it work?
  python -m sssd train --method sssd --set "lambda1=75, lambda2=100"
  python -m sssd train --profile paper --data /data/coco --method sssd
  accelerate launch --num_processes 8 -m sssd train --profile paper --data /data/coco
  python -m sssd show 3f2a                                 one run, by the start of its id
  python -m sssd reports --seeds 0 1 2                     every notebook, into reports/
  python -m sssd reports --data /data/coco --only fig3_stepwise
  python -m sssd figures                                   all reports again, from their records
  python -m sssd import reports/night                      its runs, without weights, into the store
"""


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and do what it says; the exit status."""
    given = _parser().parse_args(arguments)
    store = Store(given.store)
    try:
        if given.verb == "runs":
            listing = store.listing()
            print(listing.to_string(index=False) if len(listing) else f"no runs in {store.root}")
        elif given.verb == "show":
            _show(store, given.run)
        elif given.verb == "train":
            _train(store, given)
        elif given.verb == "bench":
            from .bench import bench

            print(bench(given.profile, given.data).to_string(index=False))
        elif given.verb == "import":
            from .reproduce.archive import import_runs

            for folder in given.report:
                found = import_runs(folder.resolve(), store)
                print(f"{folder}: {len(found)} runs imported into {store.root}")
        elif given.verb == "figures":
            from .reproduce.build import figures

            every = [file.parent for file in sorted((home() / "reports").glob("*/manifest.json"))]
            figures([folder.resolve() for folder in given.report] or every, given.data)
        else:
            from .reproduce.build import reports  # takes a second: it imports Jupyter's libraries

            asked = (given.profile, given.data, given.seeds, given.jobs)
            return reports(*asked, runs=str(store.root), only=given.only)
    except KeyboardInterrupt:
        print("sssd: interrupted; the next call goes on from the last checkpoints", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError) as error:
        print(f"sssd: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return 0


def _parser() -> argparse.ArgumentParser:
    text: Any = {"epilog": EXAMPLES, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(
        prog="python -m sssd",
        description="Self-distillation runs: each is trained once and kept.",
        **text,
    )
    parser.add_argument("--store", help="folder of runs; default: $SSSD_RUNS, else runs/")
    names = "{runs,train,show,reports,figures,import,bench}"
    verbs = parser.add_subparsers(dest="verb", required=True, metavar=names)
    verbs.add_parser("runs", help="list the runs in the store")
    show = verbs.add_parser("show", help="one run: configuration, machine, results")
    show.add_argument("run", help="its id, or the start of it")

    trains = verbs.add_parser("train", help="train what is missing, or continue it", **text)
    costs = verbs.add_parser("bench", help="what training and inference of each method cost")
    builds = verbs.add_parser("reports", help="train what is missing, then build the report")
    draws = verbs.add_parser("figures", help="draw reports again from their records, untrained")
    draws.add_argument("report", nargs="*", type=Path, help="their folders; default: all reports")
    draws.add_argument("--data", default="", help="the folder of a report's photographs")
    imports = verbs.add_parser(
        "import", help="put a report's runs, without weights, into the store"
    )
    imports.add_argument("report", nargs="+", type=Path, help="the report's folder")
    for verb in (trains, costs, builds):
        verb.add_argument("--profile", default="mini", help=f"one of {', '.join(PROFILES)}")
        data = "folder of a COCO-format data set; default: the profile's built-in one"
        verb.add_argument("--data", default="", help=data)
    for verb in (trains, builds):
        jobs = "processes at a time; default: one for each GPU, else for each core"
        verb.add_argument("--jobs", type=int, help=jobs)
    trains.add_argument("--method", nargs="+", help=f"of {', '.join(METHODS)}; default: sssd")
    trains.add_argument("--seed", nargs="+", type=int, help="default: 0")
    trains.add_argument("--set", default="", metavar="FIELD=VALUE,…", help="override any field")
    builds.add_argument("--seeds", nargs="+", type=int, default=[0])
    only = "execute only these; default: all"
    builds.add_argument("--only", nargs="+", default=[], metavar="NOTEBOOK", help=only)
    return parser


def _train(store: Store, given: argparse.Namespace) -> None:
    source = open_data(given.profile, given.data or None)
    methods = [{"method": method} for method in given.method or ()] or [{}]
    seeds = [{"seed": seed} for seed in dict.fromkeys(given.seed or ())] or [{}]
    configs = [
        configure(given.profile, data=source, overrides=given.set, **method, **seed)
        for method in methods
        for seed in seeds
    ]
    runs = store.get(configs, jobs=given.jobs)
    for run in runs if os.environ.get("RANK", "0") == "0" else []:
        ap = run.evaluations()["AP"].iloc[-1]
        print(f"{run.config.id}  {run.config.label()}  AP {ap:.3f}")


def _show(store: Store, start: str) -> None:
    every = [*store.root.glob("*/config.json"), *store.root.glob("*/imported/config.json")]
    ids = {file.relative_to(store.root).parts[0] for file in every}
    found = [RunFolder(store.root / id).best().path for id in sorted(ids) if id.startswith(start)]
    if len(found) != 1:
        raise ValueError(f"run: {start!r} names {len(found)} runs of {store.root}; expected one")
    for name in ("config.json", "environment.json", "done.json"):
        file = found[0] / name
        if file.exists():
            print(f"{name}: {file.read_text().strip()}")
    for record in read_records(RunFolder(found[0]).evaluations):
        numbers = "  ".join(f"{k} {v:.3f}" for k, v in record.items() if isinstance(v, float))
        small, large = record["area_limits"]
        areas = f"S below {small:g}² px, L from {large:g}²"
        print(f"iteration {record['iteration']}: {numbers}  ({areas})")


if __name__ == "__main__":
    sys.exit(main())
