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
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
from accelerate import PartialState

from . import inventory
from .config import METHODS, RunConfig, identity
from .data.check import check_data
from .engine import evaluate_run
from .evaluation import METRICS
from .export import OPSET, export
from .parameters import absolute, check_folder, values
from .profiles import PROFILES, configure, find_data, find_parts, open_data, parse_overrides
from .records import RunFolder, read_records, write_json
from .runs import RunsFailed, Store, compare, home, is_distributed

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
        status = given.execute(Store(given.store), given)
        print(end="", flush=True)  # so that an error such as a full disk is reported below
        return status or 0
    except KeyboardInterrupt:
        print("sssd: interrupted; the next call goes on from the last checkpoints", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has closed the pipe, as in `… runs | head`
        return 1
    except (ValueError, RunsFailed) as error:
        print(f"sssd: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except Exception as error:
        message = " ".join(str(error).split())
        if is_distributed():  # torchrun names the process that failed first
            message += "; the same command goes on from the last checkpoint"
        print(f"sssd: {type(error).__name__}: {message} ({_log_of(error)})", file=sys.stderr)
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


def _find(store: Store, start: str) -> Path:
    """The folder of the run whose id begins with ``start``."""
    if not start:
        raise ValueError("run: none given; expected an id, or the start of one")
    found = [id for id in inventory.ids(store.root) if id.startswith(start)]
    if len(found) != 1:
        raise ValueError(f"run: {start!r} names {len(found)} runs of {store.root}; expected one")
    return RunFolder(store.root / found[0]).best().path


def _runs(store: Store, given: argparse.Namespace) -> None:
    """Print a table of runs for each profile and data set."""
    if given.json:
        print(json.dumps(inventory.records(store.root), indent=1, ensure_ascii=False))
        return
    listing = inventory.listing(store.root)
    if listing.empty:
        print(f"no runs in {store.root}")
        return
    for (profile, data), runs in listing.groupby(["profile", "data"]):
        print(f"data: {data}; profile: {profile or 'none, as fields were overridden'}")
        print(runs.drop(columns=["profile", "data"]).to_string(index=False), end="\n\n")


def _prune(store: Store, given: argparse.Namespace) -> None:
    freed = inventory.prune(store.root, given.dry_run)
    for what, sizes in freed.items():
        print(f"{len(sizes)} {what}, {sum(sizes) / 1e6:.1f} MB")
    total = sum(map(sum, freed.values())) / 1e6
    done = "prune would free" if given.dry_run else "prune has freed"
    print(f"{done} {total:.1f} MB in {store.root}")


def _compare(store: Store, given: argparse.Namespace) -> None:
    ours, theirs = ([_find(store, run) for run in group] for group in (given.runs, given.to))
    gain = compare(ours, theirs, given.measure)
    pairs = f"{gain.seeds} seed{'s' * (gain.seeds > 1)}, {gain.images} images"
    print(f"{given.measure}: {gain} (95 % interval, paired; {pairs})")


def _show(store: Store, given: argparse.Namespace) -> None:
    files = RunFolder(_find(store, given.run))
    print(files.path)
    for name, about in files.about().items():
        if "method" in (start := about.get("start", "")):
            about["start"] = identity(start)  # the start is a run: print its id
        text = f"{name}: {', '.join(f'{k}={v}' for k, v in about.items())}"
        print(textwrap.fill(text, 100, subsequent_indent="  ", break_long_words=False))
    found = read_records(files.evaluations)
    if found:
        names = [n for n in ("iteration", *METRICS[:6], "AR100", "teacher_AP") if n in found[-1]]
        table = pd.DataFrame(found)[names]
        print(table.to_string(index=False, float_format="{:.3f}".format))
        print(_areas(found[-1]))


def _areas(record: dict[str, Any]) -> str:
    small, large = record["area_limits"]
    return f"S below {small:g}² px, L from {large:g}²"


def _evaluate(store: Store, given: argparse.Namespace) -> None:
    run = _find(store, given.run)
    folder = find_parts(find_data(given.data), ("val",))["val_images"].parent
    file = absolute("to", given.to or f"{RunFolder(run).id}-{folder.name}.json")
    check_folder("to", file.parent)
    if file.is_dir() or not file.parent.is_dir():
        raise ValueError(f"to: {str(file)!r}; expected a file in a folder that exists")
    record, found, _ = evaluate_run(run, given.data)
    print("  ".join(f"{name} {record[name]:.3f}" for name in METRICS), f"({_areas(record)})")
    write_json(found, file)
    print(f"{len(found)} detections in {file}")


def _export(store: Store, given: argparse.Namespace) -> None:
    written = export(_find(store, given.run), absolute("file", given.file), given.onnx)
    print(f"written: {', '.join(map(str, written))}")
    if given.onnx:
        print(f"ONNX, opset {OPSET}: image [3, height, width] → boxes, labels, scores")


def _detect(store: Store, given: argparse.Namespace) -> None:
    from .reproduce.detections import detect_images

    run = _find(store, given.run)
    if not 0 <= given.score <= 1:
        raise ValueError(f"score: {given.score:g}; expected a number from 0 to 1")
    to = absolute("to", given.to or f"{RunFolder(run).id}-detections")
    found = detect_images(run, given.image, to, given.score)
    drawn = sum(about["score"] >= given.score for about in found)
    print(f"{drawn} detections with a score of {given.score:g} or more drawn, in {to}")
    print(f"{len(found)} detections in {to / 'detections.json'}")


def _check(store: Store, given: argparse.Namespace) -> None:
    print(check_data(given.data))


def _train(store: Store, given: argparse.Namespace) -> None:
    configs = _configs(given)
    is_main_process = os.environ.get("RANK", "0") == "0"
    shown: AbstractContextManager[None] = nullcontext()
    if given.tensorboard and is_main_process:
        from .curves import curves

        shown = curves(absolute("tensorboard", given.tensorboard), store, configs)
    with shown:
        runs = store.get(configs, jobs=given.jobs)
    for run in runs if is_main_process else []:
        ap = run.files.last_evaluation()["AP"]
        print(f"{run.config.id}  {run.config.label()}  AP {ap:.3f}")
    if is_distributed():  # a process that ends while the others still listen to it may abort
        PartialState().destroy_process_group()


def _configs(given: argparse.Namespace) -> list[RunConfig]:
    """The runs that the options of ``train`` ask for."""
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
    if given.task is None:
        return configs
    if not (given.method or given.seed or overrides):
        from .reproduce.plan import report_runs

        configs = report_runs(given.profile, given.data, source)
    if not 1 <= given.task <= len(configs):
        raise ValueError(f"task: {given.task}; expected a number from 1 to {len(configs)}")
    return [configs[given.task - 1]]


def _bench(store: Store, given: argparse.Namespace) -> None:
    from .bench import bench, keep

    tables = bench(given.profile, given.data, given.set, given.rounds, given.scaling)
    print("\n\n".join(table.to_string(index=False) for table in tables.values()))
    about = f"--set {given.set!r}, " if given.set else ""
    file = keep(tables, given.profile, f"{about}medians of {given.rounds} steps that take turns")
    print(f"written: {file}")


def _reports(store: Store, given: argparse.Namespace) -> int:
    from .reproduce.build import reports  # takes a second: it imports Jupyter's libraries

    asked = (given.profile, given.data, given.seeds, given.jobs)
    return reports(*asked, runs=str(store.root), only=given.only)


def _figures(store: Store, given: argparse.Namespace) -> None:
    from .reproduce.build import figures

    every = [file.parent for file in sorted((home() / "reports").glob("*/manifest.json"))]
    figures([absolute("report", folder) for folder in given.report] or every, given.data)


def _import(store: Store, given: argparse.Namespace) -> None:
    from .reproduce.archive import import_runs

    for folder in given.report:
        found = import_runs(absolute("report", folder), store)
        print(f"{folder}: {len(found)} runs imported into {store.root}")


def _plan(store: Store, given: argparse.Namespace) -> None:
    from .reproduce.plan import plan

    table, summary = plan(given.profile, given.data, store, given.tflops)
    if len(table):
        print(table.to_string(index=False, float_format=lambda x: f"{x:.2f}"))
    print(summary)


class _List(argparse.Action):
    """An option that takes a list in any form that `sssd.parameters.values` accepts."""

    def __init__(self, option_strings: Any, dest: str, kind: type, **options: Any) -> None:
        super().__init__(option_strings, dest, nargs="+", **options)
        self.kind = kind

    def __call__(self, parser: Any, namespace: Any, words: Any, option: Any = None) -> None:
        found = values(" ".join(words))
        for word in found:
            if not isinstance(word, self.kind):
                raise argparse.ArgumentError(self, f"{word!r}; expected {self.metavar}")
        if not found:
            raise argparse.ArgumentError(self, f"none given; expected {self.metavar}")
        setattr(namespace, self.dest, list(found))


WITH_EXAMPLES: Any = {"epilog": EXAMPLES, "formatter_class": argparse.RawDescriptionHelpFormatter}
NUMBERS: Any = {"action": _List, "kind": int, "metavar": "NUMBER"}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sssd",
        description="Train, compare and export self-distilled detectors; each run is trained once.",
        **WITH_EXAMPLES,
    )
    parser.add_argument("--store", help="folder of runs; default: $SSSD_RUNS, else runs/")
    commands = parser.add_subparsers(required=True, metavar="command")

    def add(name: str, execute: Any, help: str, **options: Any) -> argparse.ArgumentParser:
        """Add a command, for which `main` calls ``execute(store, given)``; None is status 0."""
        command = commands.add_parser(name, help=help, **options)
        command.set_defaults(execute=execute)
        return command

    _add_commands_on_runs(add)
    _add_training_and_report_commands(add)
    return parser


def _add_commands_on_runs(add: Callable[..., argparse.ArgumentParser]) -> None:
    runs = add("runs", _runs, "list the runs in the store")
    runs.add_argument("--json", action="store_true", help="print all that is known, as JSON")
    prune = add("prune", _prune, "remove files that nothing reads, such as old checkpoints")
    prune.add_argument("--dry-run", action="store_true", help="only print what would be removed")
    pairs = add("compare", _compare, "difference in AP of two groups, paired by seed")
    pairs.add_argument("runs", nargs="+", metavar="run", help="the first group, one run per seed")
    other = "the second group, which is subtracted; it has the same seeds"
    pairs.add_argument("--with", dest="to", nargs="+", metavar="RUN", required=True, help=other)
    measures = ("AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L", "teacher")
    pairs.add_argument("--measure", choices=measures, default="AP", help="default: AP")
    show = add("show", _show, "show a run's configuration, machine and results")
    evaluate = add("evaluate", _evaluate, "test a finished run's student on other images")
    exports = add("export", _export, "save a student as a stock torchvision model")
    detect = add("detect", _detect, "let a run's student detect: pictures and JSON")
    for command in (show, evaluate, exports, detect):
        command.add_argument("run", help="its id, or the start of the id")
    data = "folder of a COCO-format data set; its validation part is used"
    evaluate.add_argument("data", help=data)
    file = "for the detections, as COCO results; default: <run>-<data>.json in this folder"
    evaluate.add_argument("--to", metavar="FILE", help=file)
    file = "for the weights, such as student.pt; student.py builds the model without this package"
    exports.add_argument("file", type=Path, help=file)
    exports.add_argument("--onnx", action="store_true", help="also student.onnx, for any size")
    detect.add_argument("image", nargs="+", type=Path, help="an image, or a folder of images")
    to = "for pictures and detections.json; default: <run>-detections in this folder"
    detect.add_argument("--to", type=Path, metavar="FOLDER", help=to)
    detect.add_argument("--score", type=float, default=0.4, help="lowest to be drawn; default: 0.4")


def _add_training_and_report_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    check = add("check", _check, "count what is in a data set, and find its problems")
    check.add_argument("data", help="folder of a COCO-format data set; both parts are checked")
    train = add("train", _train, "train missing runs, continue unfinished ones", **WITH_EXAMPLES)
    bench = add("bench", _bench, "measure training and inference of each method")
    reports = add("reports", _reports, "train missing runs, then build the report")
    figures = add("figures", _figures, "draw reports from their records, without training")
    figures.add_argument(
        "report", nargs="*", type=Path, help="report folders; default: all reports"
    )
    photographs = "folder of the photographs that a report shows"
    figures.add_argument("--data", default="", help=photographs)
    imports = add("import", _import, "copy a report's runs, without weights, to the store")
    imports.add_argument("report", nargs="+", type=Path, help="the report's folder")
    plan = add("plan", _plan, "list the runs of a report, and what they would cost")
    tflops = "what one GPU sustains, in 10¹² operations per second; default: 20"
    plan.add_argument("--tflops", type=float, default=20.0, help=tflops)
    for command in (train, bench, reports, plan):
        command.add_argument("--profile", default="mini", help=f"one of {', '.join(PROFILES)}")
        data = "folder of a COCO-format data set; default: the profile's built-in one"
        command.add_argument("--data", default="", help=data)
    for command in (train, reports):
        jobs = "parallel processes; default: one per GPU, or without GPUs one per core"
        command.add_argument("--jobs", type=int, help=jobs)
    methods = f"any of {', '.join(METHODS)}; default: sssd"
    train.add_argument("--method", action=_List, kind=str, metavar="NAME", help=methods)
    train.add_argument("--seed", help="default: 0", **NUMBERS)
    curves = "write losses, λ, share and AP for tensorboard --logdir FOLDER"
    train.add_argument("--tensorboard", type=Path, metavar="FOLDER", help=curves)
    for command in (train, bench):
        command.add_argument(
            "--set", default="", metavar="FIELD=VALUE,…", help="override any field"
        )
    bench.add_argument("--rounds", type=int, default=15, help="steps of each method; default: 15")
    scaling = "also measure more objects, classes, pixels and images"
    bench.add_argument("--scaling", action="store_true", help=scaling)
    task = (
        "train only one run, and the runs that it starts from: the I-th (from 1) of those that "
        "--method, --seed and --set name, or, without these options, of those that plan numbers"
    )
    train.add_argument("--task", type=int, metavar="I", help=task)
    reports.add_argument("--seeds", **NUMBERS)
    only: Any = {"action": _List, "kind": str, "default": [], "metavar": "NOTEBOOK"}
    reports.add_argument("--only", help="run only these notebooks; default: all", **only)


@cache  # a command may open its data, and so find the same fault, more than once
def _print_warning(message: str) -> None:
    print(f"sssd: {message}", file=sys.stderr)


if __name__ == "__main__":
    warnings.showwarning = lambda message, *_, **__: _print_warning(str(message))  # no code lines
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without λ shows ? in its place
    for stop in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(stop) is not signal.SIG_IGN:  # ignored under nohup
            signal.signal(stop, signal.default_int_handler)  # like Ctrl-C: all processes stop
    sys.exit(main())
