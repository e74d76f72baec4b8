"""The terminal's way in: ``python -m sssd runs | train | show | reports | bench``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from .config import METHODS
from .profiles import PROFILES, configure
from .records import read_records
from .runs import Store

EXAMPLES = """examples:
  python -m sssd runs                                      what the store holds
  python -m sssd train --method sssd --seed 0 1 2          three seeds, in parallel
  python -m sssd train --profile smoke --method lgd sssd   a try of the machinery
  python -m sssd train --method sssd --set "lambda1=75, lambda2=100"
  python -m sssd train --profile paper --data /data/coco --method sssd
  accelerate launch --num_processes 8 -m sssd train --profile paper --data /data/coco
  python -m sssd show 3f2a                                 one run, by the start of its id
  python -m sssd reports --seeds 0 1 2                     every notebook, into reports/
  python -m sssd reports --data /data/coco --only fig3_stepwise
"""


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and do what it says; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m sssd",
        description="Self-distillation runs: train them once, look at them often.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--store", help="folder of runs; default: $SSSD_RUNS, else runs/")
    verbs = parser.add_subparsers(
        dest="verb", required=True, metavar="{runs,train,show,reports,bench}"
    )
    verbs.add_parser("runs", help="list the runs in the store")
    show = verbs.add_parser("show", help="one run: configuration, machine, results")
    show.add_argument("run", help="its id, or the start of it")
    more = verbs.add_parser(
        "train",
        help="train what is missing, or continue it",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    more.add_argument("--profile", default="mini", help=f"one of {', '.join(PROFILES)}")
    more.add_argument("--data", help="folder of a COCO-format data set; default: built-in")
    more.add_argument("--method", nargs="+", help=f"of {', '.join(METHODS)}; default: sssd")
    more.add_argument("--seed", nargs="+", type=int, help="default: 0")
    more.add_argument("--set", default="", metavar="FIELD=VALUE,…", help="override any field")
    more.add_argument("--jobs", type=int, help="processes at a time; default: one a core or GPU")
    cost = verbs.add_parser("bench", help="what training and inference of each method cost")
    cost.add_argument("--profile", default="mini", help=f"one of {', '.join(PROFILES)}")
    cost.add_argument("--data", default="", help="folder of a COCO-format data set")
    whole = verbs.add_parser(
        "reports", help="train what is missing, execute the notebooks, assemble the report"
    )
    whole.add_argument("--profile", default="mini", help=f"one of {', '.join(PROFILES)}")
    whole.add_argument("--data", default="", help="folder of a COCO-format data set")
    whole.add_argument("--seeds", nargs="+", type=int, default=[0])
    whole.add_argument("--jobs", type=int, help="processes at a time; default: one a core or GPU")
    whole.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="NOTEBOOK",
        help="execute these alone; default: all",
    )
    given = parser.parse_args(arguments)
    store = Store(given.store)
    try:
        if given.verb == "runs":
            listing = store.listing()
            print(listing.to_string(index=False) if len(listing) else f"no runs in {store.root}")
        elif given.verb == "show":
            _show(store, given.run)
        elif given.verb == "bench":
            from .bench import bench

            print(bench(given.profile, given.data).to_string(index=False))
        elif given.verb == "reports":
            from .reproduce.build import reports  # takes a second: it brings Jupyter's machinery

            return reports(
                given.profile,
                given.data,
                given.seeds,
                given.jobs,
                runs=str(store.root),
                only=given.only,
            )
        else:
            configs = [
                configure(given.profile, data=given.data, overrides=given.set, **method, **seed)
                for method in ([{"method": m} for m in given.method] if given.method else [{}])
                for seed in ([{"seed": s} for s in given.seed] if given.seed else [{}])
            ]
            runs = store.get(configs, jobs=given.jobs)
            for run in runs if os.environ.get("RANK", "0") == "0" else []:
                print(
                    f"{run.config.id}  {run.config.label()}  AP {run.evaluations()['AP'].iloc[-1]:.3f}"
                )
    except KeyboardInterrupt:
        print("sssd: interrupted; the next call goes on from the last checkpoints", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError) as error:
        print(f"sssd: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return 0


def _show(store: Store, start: str) -> None:
    files = store.root.glob("*/config.json")
    found = [file.parent for file in files if file.parent.name.startswith(start)]
    if len(found) != 1:
        raise ValueError(f"run: {start!r} names {len(found)} runs of {store.root}; expected one")
    folder = found[0]
    for name in ("config.json", "environment.json", "done.json"):
        file = Path(folder / name)
        if file.exists():
            print(
                f"{name}: {json.dumps(json.loads(file.read_text()), indent=1, ensure_ascii=False)}"
            )
    for record in read_records(folder / "evaluations.jsonl"):
        numbers = "  ".join(f"{k} {v:.3f}" for k, v in record.items() if isinstance(v, float))
        small, large = record["area_limits"]
        print(
            f"iteration {record['iteration']}: {numbers}  (S below {small:g}² px, L from {large:g}²)"
        )


if __name__ == "__main__":
    sys.exit(main())
