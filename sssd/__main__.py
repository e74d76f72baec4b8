"""The command line: ``python -m sssd runs | train | show | evaluate | reports | …``."""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import sys
import tempfile
import textwrap
import traceback
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pandas as pd

from . import inventory, parameters
from .config import METHODS, identity
from .data.look import look
from .engine import evaluate_run
from .evaluation import METRICS
from .export import OPSET, export
from .profiles import PROFILES, configure, find_data, open_data, parse_overrides
from .records import RunFolder, read_records, write_json
from .runs import RunsFailed, Store, compare, home

EXAMPLES = """examples:
  python -m sssd runs                                      list the runs in the store
  python -m sssd train --method sssd --seed 0 1 2          three seeds, in parallel
  python -m sssd train --profile smoke --method lgd sssd   a test that takes seconds
  python -m sssd train --method sssd --set "lambda1=75, lambda2=100"
  python -m sssd train --profile paper --data /data/coco --method sssd
  torchrun --nproc-per-node 8 -m sssd train --profile paper --data /data/coco --task 5
  python -m sssd show 3f2a                                 one run, by the start of its id
  python -m sssd check /data/coco                          counts, sizes and problems of the data
  python -m sssd compare 3f2a 90c1 --with 5b7e 11d0        difference in AP, paired by seed
  python -m sssd prune --dry-run                           how much disk space can be freed
  python -m sssd evaluate 3f2a /data/coco                  test its student on other images
  python -m sssd export 3f2a student.pt                    a stock torchvision model; --onnx
  python -m sssd detect 3f2a photo.jpg folder/             pictures with boxes, and JSON
  python -m sssd reports --seeds 0 1 2                     run all notebooks, into reports/
  python -m sssd reports --data /data/coco --only fig3_stepwise
  python -m sssd figures                                   draw all reports from their records
  python -m sssd import reports/night                      copy its runs into the store
"""


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, run the command and return the exit status.

    Invalid input (a ValueError) gives status 2, every other error 1. The message of an unexpected
    error names the file with its traceback.
    """
    given = _parser().parse_args(arguments)
    try:
        status = _do(given)
        print(end="", flush=True)  # so that an error such as a full disk is reported below
        return status
    except KeyboardInterrupt:
        print("sssd: interrupted; the next call goes on from the last checkpoints", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has closed the pipe, as in `… runs | head`
        return 1
    except (ValueError, RunsFailed) as error:
        print(f"sssd: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except Exception as error:
        said = " ".join(str(error).split())
        if "LOCAL_RANK" in os.environ:  # torchrun names the process that failed first
            said += "; the same command goes on from the last checkpoint"
        print(f"sssd: {type(error).__name__}: {said} ({_log_of(error)})", file=sys.stderr)
        return 1
    finally:
        try:
            print(end="", flush=True)
        except OSError:  # reported above; without this line the interpreter reports it again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _log_of(error: Exception) -> str:
    """Write an error's traceback to a file; return a note that names the file."""
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="sssd-", suffix=".log", delete=False, encoding="utf-8"
        ) as log:
            log.writelines(traceback.format_exception(error))
        return f"whole log: {log.name}"
    except OSError as other:
        return f"no log, because it cannot be written: {other.strerror}"


def _do(given: argparse.Namespace) -> int:
    """Run the command and return its exit status."""
    store = Store(given.store)
    if given.verb == "runs" and given.json:
        print(json.dumps(inventory.records(store.root), indent=1, ensure_ascii=False))
    elif given.verb == "runs":
        _list(store)
    elif given.verb == "prune":
        freed = inventory.prune(store.root, given.dry_run)
        for what, sizes in freed.items():
            print(f"{len(sizes)} {what}, {sum(sizes) / 1e6:.1f} MB")
        total = sum(map(sum, freed.values())) / 1e6
        done = "prune would free" if given.dry_run else "prune has freed"
        print(f"{done} {total:.1f} MB in {store.root}")
    elif given.verb == "compare":
        ours, theirs = ([_find(store, run) for run in group] for group in (given.runs, given.to))
        gain = compare(ours, theirs, given.measure)
        pairs = f"{gain.seeds} seed{'s' * (gain.seeds > 1)}, {gain.images} images"
        print(f"{given.measure}: {gain} (95 % interval, paired; {pairs})")
    elif given.verb == "show":
        _show(_find(store, given.run))
    elif given.verb == "train":
        _train(store, given)
    elif given.verb == "evaluate":
        _evaluate(_find(store, given.run), given.data, given.to)
    elif given.verb == "export":
        written = export(_find(store, given.run), given.file.expanduser().resolve(), given.onnx)
        print(f"written: {', '.join(map(str, written))}")
        if given.onnx:
            print(f"ONNX, opset {OPSET}: image [3, height, width] → boxes, labels, scores")
    elif given.verb == "detect":
        _detect(_find(store, given.run), given)
    elif given.verb == "check":
        print(look(given.data))
    elif given.verb == "bench":
        _bench(given)
    elif given.verb == "import":
        from .reproduce.archive import import_runs

        for folder in given.report:
            found = import_runs(folder.resolve(), store)
            print(f"{folder}: {len(found)} runs imported into {store.root}")
    elif given.verb == "figures":
        from .reproduce.build import figures

        every = [file.parent for file in sorted((home() / "reports").glob("*/manifest.json"))]
        figures([folder.resolve() for folder in given.report] or every, given.data)
    elif given.verb == "plan":
        from .reproduce.plan import plan

        table, summary = plan(given.profile, given.data, store, given.tflops)
        if len(table):
            print(table.to_string(index=False, float_format=lambda x: f"{x:.2f}"))
        print(summary)
    else:
        from .reproduce.build import reports  # takes a second: it imports Jupyter's libraries

        asked = (given.profile, given.data, given.seeds, given.jobs)
        return reports(*asked, runs=str(store.root), only=given.only)
    return 0


class _List(argparse.Action):
    """An option that takes a list in any form that `sssd.parameters.values` accepts."""

    def __init__(self, option_strings: Any, dest: str, kind: type, **options: Any) -> None:
        super().__init__(option_strings, dest, nargs="+", **options)
        self.kind = kind

    def __call__(self, parser: Any, namespace: Any, words: Any, option: Any = None) -> None:
        found = parameters.values(" ".join(words))
        for word in found:
            if not isinstance(word, self.kind):
                raise argparse.ArgumentError(self, f"{word!r}; expected {self.metavar}")
        if not found:
            raise argparse.ArgumentError(self, f"none given; expected {self.metavar}")
        setattr(namespace, self.dest, list(found))


def _parser() -> argparse.ArgumentParser:
    text: Any = {"epilog": EXAMPLES, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(
        prog="python -m sssd",
        description="Train, compare and export self-distilled detectors; each run is trained once.",
        **text,
    )
    parser.add_argument("--store", help="folder of runs; default: $SSSD_RUNS, else runs/")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="command")
    lists = verbs.add_parser("runs", help="list the runs in the store")
    lists.add_argument("--json", action="store_true", help="print all that is known, as JSON")
    frees = verbs.add_parser(
        "prune", help="remove files that nothing reads, such as old checkpoints"
    )
    frees.add_argument("--dry-run", action="store_true", help="only print what would be removed")
    differs = verbs.add_parser("compare", help="difference in AP of two groups, paired by seed")
    differs.add_argument("runs", nargs="+", metavar="run", help="the first group, one run per seed")
    other = "the second group, which is subtracted; it has the same seeds"
    differs.add_argument("--with", dest="to", nargs="+", metavar="RUN", required=True, help=other)
    measures = ("AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L", "teacher")
    differs.add_argument("--measure", choices=measures, default="AP", help="default: AP")
    show = verbs.add_parser("show", help="show a run's configuration, machine and results")
    tests = verbs.add_parser("evaluate", help="test a finished run's student on other images")
    exports = verbs.add_parser("export", help="save a student as a stock torchvision model")
    finds = verbs.add_parser("detect", help="let a run's student detect: pictures and JSON")
    for verb in (show, tests, exports, finds):
        verb.add_argument("run", help="its id, or the start of the id")
    tests.add_argument("data", help="folder of a COCO-format data set; its validation part is used")
    file = "for the detections, as COCO results; default: <run>-<data>.json in this folder"
    tests.add_argument("--to", metavar="FILE", help=file)
    file = "for the weights, such as student.pt; student.py builds the model without this package"
    exports.add_argument("file", type=Path, help=file)
    exports.add_argument("--onnx", action="store_true", help="also student.onnx, for any size")
    finds.add_argument("image", nargs="+", type=Path, help="an image, or a folder of images")
    to = "for pictures and detections.json; default: <run>-detections in this folder"
    finds.add_argument("--to", type=Path, metavar="FOLDER", help=to)
    finds.add_argument("--score", type=float, default=0.4, help="lowest to be drawn; default: 0.4")

    looks = verbs.add_parser("check", help="count what is in a data set, and find its problems")
    looks.add_argument("data", help="folder of a COCO-format data set; both parts are checked")

    trains = verbs.add_parser("train", help="train missing runs, continue unfinished ones", **text)
    costs = verbs.add_parser("bench", help="measure training and inference of each method")
    builds = verbs.add_parser("reports", help="train missing runs, then build the report")
    draws = verbs.add_parser("figures", help="draw reports from their records, without training")
    draws.add_argument("report", nargs="*", type=Path, help="report folders; default: all reports")
    draws.add_argument("--data", default="", help="folder of the photographs that a report shows")
    imports = verbs.add_parser("import", help="copy a report's runs, without weights, to the store")
    imports.add_argument("report", nargs="+", type=Path, help="the report's folder")
    plans = verbs.add_parser("plan", help="list the runs of a report, and what they would cost")
    tflops = "what one GPU sustains, in 10¹² operations per second; default: 20"
    plans.add_argument("--tflops", type=float, default=20.0, help=tflops)
    for verb in (trains, costs, builds, plans):
        verb.add_argument("--profile", default="mini", help=f"one of {', '.join(PROFILES)}")
        data = "folder of a COCO-format data set; default: the profile's built-in one"
        verb.add_argument("--data", default="", help=data)
    for verb in (trains, builds):
        jobs = "parallel processes; default: one per GPU, or without GPUs one per core"
        verb.add_argument("--jobs", type=int, help=jobs)
    names = f"any of {', '.join(METHODS)}; default: sssd"
    trains.add_argument("--method", action=_List, kind=str, metavar="NAME", help=names)
    number: dict[str, Any] = {"action": _List, "kind": int, "metavar": "NUMBER"}
    trains.add_argument("--seed", help="default: 0", **number)
    curves = "write losses, λ, share and AP for tensorboard --logdir FOLDER"
    trains.add_argument("--tensorboard", type=Path, metavar="FOLDER", help=curves)
    for verb in (trains, costs):
        verb.add_argument("--set", default="", metavar="FIELD=VALUE,…", help="override any field")
    costs.add_argument("--rounds", type=int, default=15, help="steps of each method; default: 15")
    scaling = "also measure more objects, classes, pixels and images"
    costs.add_argument("--scaling", action="store_true", help=scaling)
    task = (
        "train only one run, and the runs that it starts from: the I-th (from 1) of those that "
        "--method, --seed and --set name, or, without these options, of those that plan numbers"
    )
    trains.add_argument("--task", type=int, metavar="I", help=task)
    builds.add_argument("--seeds", **number)
    only = "run only these notebooks; default: all"
    builds.add_argument("--only", action=_List, kind=str, default=[], metavar="NOTEBOOK", help=only)
    return parser


def _train(store: Store, given: argparse.Namespace) -> None:
    overrides = parse_overrides(given.set)
    for name, value in (("method", given.method), ("seed", given.seed)):
        if value and name in overrides:
            raise ValueError(f"{name}: given by --{name} and by --set; expected one of them")
    source = open_data(given.profile, given.data or None)
    configs = [
        configure(given.profile, data=source, overrides=overrides, method=method, seed=seed)
        for method in given.method or [None]
        for seed in dict.fromkeys(given.seed or [None])
    ]
    for config in configs:
        if config.method not in METHODS:  # an intermediate step of another method
            expected = f"one of {', '.join(METHODS)}"
            raise ValueError(f"method: {config.method!r} is not trained alone; expected {expected}")
    if given.task is not None:
        if not (given.method or given.seed or overrides):
            from .reproduce.plan import report_runs

            configs = report_runs(given.profile, given.data, source)
        if not 1 <= given.task <= len(configs):
            raise ValueError(f"task: {given.task}; expected a number from 1 to {len(configs)}")
        configs = [configs[given.task - 1]]
    first = os.environ.get("RANK", "0") == "0"
    shown: AbstractContextManager[Any] = nullcontext()
    if given.tensorboard and first:
        from .curves import curves

        shown = curves(given.tensorboard.expanduser().resolve(), store, configs)
    with shown:
        runs = store.get(configs, jobs=given.jobs)
    for run in runs if first else []:
        ap = run.evaluations()["AP"].iloc[-1]
        print(f"{run.config.id}  {run.config.label()}  AP {ap:.3f}")


def _bench(given: argparse.Namespace) -> None:
    from .bench import bench, keep

    tables = bench(given.profile, given.data, given.set, given.rounds, given.scaling)
    print("\n\n".join(table.to_string(index=False) for table in tables.values()))
    about = f"--set {given.set!r}, " if given.set else ""
    file = keep(tables, given.profile, f"{about}medians of {given.rounds} steps that take turns")
    print(f"written: {file}")


def _find(store: Store, start: str) -> Path:
    """The folder of the run whose id begins with ``start``."""
    if not start:
        raise ValueError("run: none given; expected an id, or the start of one")
    known = [id for id in inventory.ids(store.root) if id.startswith(start)]
    found = [RunFolder(store.root / id).best().path for id in known]
    if len(found) != 1:
        raise ValueError(f"run: {start!r} names {len(found)} runs of {store.root}; expected one")
    return found[0]


def _evaluate(run: Path, data: str, to: str | None) -> None:
    place = find_data(data)
    folder = place["val_images"].parent if isinstance(place, dict) else place
    file = Path(to or f"{run.name}-{folder.name if folder else ''}.json").expanduser().resolve()
    parameters.check_folder("to", file.parent)
    if file.is_dir() or not file.parent.is_dir():
        raise ValueError(f"to: {str(file)!r}; expected a file in a folder that exists")
    record, found, _ = evaluate_run(run, data)
    print("  ".join(f"{name} {record[name]:.3f}" for name in METRICS), f"({_areas(record)})")
    write_json(found, file)
    print(f"{len(found)} detections in {file}")


def _detect(run: Path, given: argparse.Namespace) -> None:
    from .reproduce.detections import detect_images

    if not 0 <= given.score <= 1:
        raise ValueError(f"score: {given.score:g}; expected a number from 0 to 1")
    to = (given.to or Path(f"{run.name}-detections")).expanduser().resolve()
    found = detect_images(run, given.image, to, given.score)
    drawn = sum(about["score"] >= given.score for about in found)
    print(f"{drawn} detections with a score of {given.score:g} or more drawn, in {to}")
    print(f"{len(found)} detections in {to / 'detections.json'}")


def _areas(record: dict[str, Any]) -> str:
    small, large = record["area_limits"]
    return f"S below {small:g}² px, L from {large:g}²"


def _list(store: Store) -> None:
    """Print a table of runs for each profile and data set."""
    listing = store.listing()
    if listing.empty:
        print(f"no runs in {store.root}")
        return
    for (profile, data), runs in listing.groupby(["profile", "data"]):
        print(f"data: {data}; profile: {profile or 'none, as fields were overridden'}")
        print(runs.drop(columns=["profile", "data"]).to_string(index=False), end="\n\n")


def _show(run: Path) -> None:
    print(run)
    files = RunFolder(run)
    for name, about in files.about().items():
        if "method" in (start := about.get("start", "")):
            about["start"] = identity(start)  # the start is a run: print its id
        text = f"{name}: {', '.join(f'{k}={v}' for k, v in about.items())}"
        print(textwrap.fill(text, 100, subsequent_indent="  ", break_long_words=False))
    found = list(read_records(files.evaluations))
    if found:
        names = [n for n in ("iteration", *METRICS[:6], "AR100", "teacher_AP") if n in found[-1]]
        table = pd.DataFrame(found)[names]
        print(table.to_string(index=False, float_format="{:.3f}".format))
        print(_areas(found[-1]))


if __name__ == "__main__":
    warnings.formatwarning = lambda message, *_, **__: f"sssd: {message}\n"  # without code lines
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without λ shows ? in its place
    for stop in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(stop) is not signal.SIG_IGN:  # ignored under nohup
            signal.signal(stop, signal.default_int_handler)  # like Ctrl-C: all processes stop
    sys.exit(main())
