"""The terminal's way into the run store."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from helpers import environment, python, tiny, write_coco
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import sssd
from sssd import inventory, pool, runs
from sssd.__main__ import main
from sssd.config import RunConfig
from sssd.engine import evaluate_run
from sssd.evaluation import METRICS
from sssd.intervals import interval
from sssd.profiles import configure
from sssd.runs import Store

QUICK = "start=random, iterations=4, eval_every=4"


@pytest.fixture(scope="module", autouse=True)
def workers_find_the_package() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
        patch.setattr(pool, "POLL_SECONDS", 0.1)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco(tmp_path_factory.mktemp("cli") / "colours")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[RunConfig], dict[str, Any]]]:
    """What a store that trains nothing is asked for."""
    calls: list[tuple[list[RunConfig], dict[str, Any]]] = []

    def get(self: Store, configs: list[RunConfig], **options: Any) -> list[runs.Run]:
        calls.append((list(configs), options))
        return []

    monkeypatch.setattr(Store, "get", get)
    return calls


def test_help_shows_examples(tmp_path: Path) -> None:
    process = python(
        "import runpy, sys; sys.argv[0] = 'sssd'; runpy.run_module('sssd', run_name='__main__')",
        "--help",
        cwd=tmp_path,
    )
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    for verb in ("runs", "train", "show"):
        assert f"python -m sssd {verb}" in printed
    assert list(tmp_path.iterdir()) == []


def test_every_example_is_understood(
    asked: list[Any], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["train", "--help"])
    assert end.value.code == 0
    lines = re.findall(r"^  .*-m sssd (train.*?)(?:   .*)?$", capsys.readouterr().out, re.MULTILINE)
    assert len(lines) >= 4
    for line in lines:
        words = [str(data) if word == "/data/coco" else word for word in shlex.split(line)]
        if "--data" not in words:
            words += ["--data", str(data)]
        assert main(["--store", str(tmp_path), *words]) == 0, line
    assert len(asked) == len(lines)


def test_an_empty_store_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--store", str(tmp_path / "runs"), "runs"]) == 0
    assert capsys.readouterr().out == f"no runs in {tmp_path / 'runs'}\n"


def test_train_then_runs_then_show(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSSD_RUNS", str(tmp_path / "runs"))
    words = ["train", "--profile", "smoke", "--data", str(data), "--method", "sssd"]
    words += ["--seed", "2", "--set", f"{QUICK}, lambda1=75, precision=bf16", "--jobs", "1"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    config = tiny(data, seed=2, iterations=4, lambda1=75.0, precision="bf16")
    last = printed.strip().splitlines()[-1]
    assert last.startswith(f"{config.id}  {config.label()}  AP ")
    assert "1 run to train" in printed and printed.count(config.label()) >= 2  # while it trains
    assert main(words) == 0  # the second time there is nothing to train
    assert capsys.readouterr().out.strip() == last

    assert main(["runs"]) == 0
    heading, _, row = capsys.readouterr().out.splitlines()[:3]
    assert heading == "data: colours; profile: none, as fields were overridden"
    assert row.split()[:3] == [config.id, "sssd", "75"]
    assert "4/4" in row and "finished" in row
    assert main(["show", config.id[:4]]) == 0
    shown = capsys.readouterr().out
    assert "lambda1=75.0" in shown and "torch=" in shown
    assert shown.splitlines()[-2].split()[0] == "4"  # the last evaluation's iteration
    assert str(data) not in shown


def test_methods_and_seeds_multiply(asked: list[Any], data: Path, tmp_path: Path) -> None:
    words = ["--profile", "smoke", "--data", str(data), "--method", "lgd", "sssd", "baseline"]
    words += ["--seed", "0", "1", "0", "--set", f"{QUICK}, lambda2=60", "--jobs", "3"]
    assert main(["--store", str(tmp_path), "train", *words]) == 0
    ((configs, options),) = asked
    pairs = [(config.method, config.seed) for config in configs]
    assert pairs == [(method, seed) for method in ("lgd", "sssd", "baseline") for seed in (0, 1)]
    assert all(config.lambda2 == 60 and config.iterations == 4 for config in configs)
    assert options == {"jobs": 3}


def test_a_task_is_one_of_the_runs_that_are_named(
    asked: list[Any], data: Path, tmp_path: Path
) -> None:
    words = ["--store", str(tmp_path), "train", "--profile", "smoke", "--data", str(data)]
    named = ["--method", "lgd", "sssd", "--seed", "0", "1"]
    for task in range(1, 5):
        assert main([*words, *named, "--task", str(task)]) == 0
    pairs = [(config.method, config.seed) for ((config,), _) in asked]
    assert pairs == [("lgd", 0), ("lgd", 1), ("sssd", 0), ("sssd", 1)]


def test_tasks_are_those_of_the_plan_whatever_is_finished(
    asked: list[Any],
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ["--profile", "smoke", "--data", str(data)]
    monkeypatch.setattr("sssd.reproduce.plan.cost", lambda _: {"student": 1.0})  # not asked here
    monkeypatch.setattr("sssd.reproduce.plan._bytes", lambda _: 1.0)

    def plan() -> dict[str, str]:
        """The names of the runs to be trained by their numbers."""
        assert main(["--store", str(tmp_path), "plan", *words]) == 0
        lines = capsys.readouterr().out.splitlines()
        rows = [re.match(r" *(\d+) +(\S.*? seed \d+) ", line) for line in lines]
        return {row[1]: row[2] for row in rows if row}

    before = plan()
    assert list(before) == [str(i) for i in range(1, len(before) + 1)] and len(before) > 30
    for task in (1, len(before)):
        assert main(["--store", str(tmp_path), "train", *words, "--task", str(task)]) == 0
        ((config,), _) = asked[-1]
        assert config.label() == before[str(task)]
    ((first,), _), ((last,), _) = asked
    assert last.stepwise and not first.stepwise
    (tmp_path / first.id).mkdir()
    (tmp_path / first.id / "done.json").write_text("{}")
    assert plan() == {task: name for task, name in before.items() if task != "1"}
    assert main(["--store", str(tmp_path), "train", *words, "--task", str(len(before) + 1)]) == 2
    assert f"expected a number from 1 to {len(before)}" in capsys.readouterr().err


@pytest.mark.parametrize("setting", ["seed=5", "method=lgd"])
def test_set_reaches_fields_that_have_options_of_their_own(
    asked: list[Any], data: Path, tmp_path: Path, setting: str
) -> None:
    words = ["--store", str(tmp_path), "train", "--profile", "smoke", "--data", str(data)]
    assert main([*words, "--set", setting]) == 0
    ((configs, _),) = asked
    field, value = setting.split("=")
    assert [str(getattr(config, field)) for config in configs] == [value]


@pytest.mark.parametrize(
    "words", [["0", "1"], ["0,1"], ["[0, 1]"], ["[0,", "1]"], ["(0,1)"]], ids=" ".join
)
def test_lists_have_the_forms_that_notebooks_take(
    asked: list[Any], data: Path, tmp_path: Path, words: list[str]
) -> None:
    names = ["sssd, lgd"] if words[0].endswith(("]", ")")) else ["sssd", "lgd"]
    more = ["--profile", "smoke", "--data", str(data), "--method", *names, "--seed", *words]
    assert main(["--store", str(tmp_path), "train", *more, "--set", QUICK]) == 0
    ((configs, _),) = asked
    assert [(c.method, c.seed) for c in configs] == [
        ("sssd", 0),
        ("sssd", 1),
        ("lgd", 0),
        ("lgd", 1),
    ]


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--profile", "huge"],
        ["train", "--profile", "smoke", "--set", "data=x"],
        ["train", "--profile", "smoke", "--set", "seed=5", "--seed", "3"],
        ["train", "--profile", "smoke", "--set", "method=lgd", "--method", "sssd"],
        ["train", "--profile", "smoke", "--set", "method=crops"],
        ["train", "--profile", "smoke", "--set", "milestones=()"],
        ["train", "--profile", "smoke", "--data", "a\0b"],
        ["show", ""],
        ["evaluate", "", "nowhere"],
        ["evaluate", "feed", "nowhere"],
        ["train", "--profile", "smoke", "--method", "yolo"],
        ["train", "--profile", "smoke", "--set", "lamda1=50"],
        ["train", "--profile", "smoke", "--set", "lambda2=75, t1=12"],
        ["train", "--profile", "smoke", "--set", "nonsense"],
        ["train", "--profile", "smoke", "--seed", "-1"],
        ["train", "--profile", "smoke", "--seed", "0", "--task", "2"],
        ["train", "--profile", "smoke", "--seed", "0", "--task", "0"],
        ["train", "--profile", "smoke", "--data", "nowhere"],
        ["train", "--profile", "paper"],
        ["show", "feed"],
        ["show", "/"],
        ["show", "../"],
        ["train", "--profile", "smoke", "--set", "method=['sssd']"],
        ["plan", "--profile", "paper", "--tflops", "0"],
        ["plan", "--profile", "paper", "--tflops", "nan"],
        ["figures", "nowhere"],
    ],
    ids=" ".join,
)
def test_bad_input_is_one_line_and_status_2(
    asked: list[Any],
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
) -> None:
    if words[0] == "train" and "--data" not in words and "paper" not in words:
        words = [*words, "--data", str(data)]
    assert main(["--store", str(tmp_path / "runs"), *words]) == 2
    printed, error = capsys.readouterr()
    assert printed == "" and error.startswith("sssd: ")
    assert error.endswith("\n") and error.count("\n") == 1
    assert asked == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="writes to /dev/full")
def test_output_to_a_full_disk_or_in_an_old_encoding_is_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sssd", "--store", str(tmp_path)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*command, "runs"], stdout=full, stderr=subprocess.PIPE, text=True, env=environment()
        )
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "No space left on device" in done.stderr
    done = subprocess.run(
        [*command, "train", "--help"],
        capture_output=True,
        text=True,
        env=environment(PYTHONIOENCODING="ascii"),
    )
    assert done.returncode == 0 and "--set FIELD=VALUE" in done.stdout and not done.stderr


@pytest.mark.parametrize("store", ["a\0b", "x" * 300, "~nobody-of-this-name/runs"])
def test_a_store_that_cannot_be_a_path_is_named(
    capsys: pytest.CaptureFixture[str], store: str
) -> None:
    assert main(["--store", store, "runs"]) == 2
    assert capsys.readouterr().err.startswith(f"sssd: store: {store!r} cannot be a path: ")


def test_a_fault_of_the_data_is_told_once_though_they_are_opened_again(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "colours")
    file = root / "annotations" / "instances_val.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["bbox"][2] = 0
    file.write_text(json.dumps(content))
    words = ["train", "--profile", "smoke", "--data", str(root), "--task", "0"]
    done = subprocess.run(
        [sys.executable, "-m", "sssd", "--store", str(tmp_path / "runs"), *words],
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    warning, error = done.stderr.splitlines()
    assert warning.startswith(f"sssd: {file}: degenerate boxes dropped from the targets")
    assert error.startswith("sssd: task: 0; expected a number") and done.returncode == 2


def test_an_unknown_word_is_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["trian"], ["train", "--seed", "one"], ["train", "--sed", "1"]):
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == 2
        assert "python -m sssd" in capsys.readouterr().err.splitlines()[-1]


def test_a_prefix_of_several_runs_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("ab12", "ab34", "cd56"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    assert main(["--store", str(tmp_path), "show", "ab"]) == 2
    assert "2 runs" in capsys.readouterr().err
    assert main(["--store", str(tmp_path), "show", "ab1"]) == 0


def test_a_failing_run_is_status_1(
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def get(self: Store, configs: list[RunConfig], **options: Any) -> list[runs.Run]:
        raise runs.RunsFailed("1 of 1 runs failed: a disk is full")

    monkeypatch.setattr(Store, "get", get)
    words = ["train", "--profile", "smoke", "--data", str(data)]
    assert main(["--store", str(tmp_path), *words]) == 1
    assert capsys.readouterr().err == "sssd: 1 of 1 runs failed: a disk is full\n"


def test_any_other_end_is_a_sentence_with_the_place_of_its_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def listing(root: Path) -> None:
        raise KeyError("two\nlines")

    monkeypatch.setattr(inventory, "listing", listing)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert main(["runs"]) == 1
    error = capsys.readouterr().err
    said = re.fullmatch(r"sssd: KeyError: 'two\\nlines' \(whole log: (.*)\)\n", error)
    assert said and "in listing" in Path(said[1]).read_text()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    assert main(["runs"]) == 1
    assert "no log" in capsys.readouterr().err


def test_a_store_that_cannot_be_written_is_said_before_training(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    words = ["train", "--profile", "smoke", "--data", str(data), "--set", QUICK]
    assert main(["--store", str(tmp_path / "file" / "runs"), *words]) == 2
    printed, error = capsys.readouterr()
    assert printed == "" and error.startswith("sssd: store: nothing can be written to")
    assert error.count("\n") == 1


def test_evaluate_gives_a_students_ap_on_other_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write_coco(tmp_path / "colours", classes=3)
    store = Store(tmp_path / "runs")
    config = tiny(folder, iterations=4, detector="fcos")
    (run,) = store.get([config], jobs=1)
    capsys.readouterr()

    # Its own validation set: the numbers of the run's last evaluation.
    words = ["--store", str(store.root), "evaluate", config.id[:5]]
    assert main([*words, str(folder)]) == 0
    last = run.evaluations().iloc[-1]
    printed = capsys.readouterr().out
    assert printed.startswith("  ".join(f"{name} {last[name]:.3f}" for name in METRICS))
    found = json.loads((tmp_path / f"{config.id}-colours.json").read_text())
    assert len(found) == len(run.detections()) > 0

    # The same images as other software would number and name them, in another order.
    other = shutil.copytree(folder, tmp_path / "held back")
    shutil.rmtree(other / "train")
    file = other / "annotations" / "instances_val.json"
    content = json.loads(file.read_text())
    ids = {3: 2, 7: 0, 12: 1}
    for entry in content["categories"]:
        entry["id"] = ids[entry["id"]]
    for entry in content["annotations"]:
        entry |= {"category_id": ids[entry["category_id"]], "image_id": entry["image_id"] + 2**70}
    for entry in content["images"]:
        entry["id"] += 2**70
    content["categories"].append({"id": 9, "name": "unused"})
    file.write_text(json.dumps(content))
    assert main([*words, str(other), "--to", "results.json"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == printed.splitlines()[0]
    again = json.loads((tmp_path / "results.json").read_text())
    expected = [
        {**e, "category_id": ids[e["category_id"]], "image_id": e["image_id"] + 2**70}
        for e in found
    ]
    assert sorted(again, key=str) == sorted(expected, key=str)
    with redirect_stdout(io.StringIO()):
        judged = COCOeval(COCO(str(file)), COCO(str(file)).loadRes("results.json"), "bbox")
        judged.evaluate()
        judged.accumulate()
        judged.summarize()
    assert judged.stats[1] == pytest.approx(last["AP50"])

    content["annotations"][0]["category_id"] = 9
    file.write_text(json.dumps(content))
    assert main([*words, str(other)]) == 2
    assert "category 9 unused, which training lacks" in capsys.readouterr().err
    assert main([*words, str(folder), "--to", str(tmp_path / "absent" / "x.json")]) == 2
    assert "absent" in capsys.readouterr().err
    (run.folder / "done.json").unlink()
    assert main([*words, str(folder)]) == 2
    assert "is not finished" in capsys.readouterr().err


def test_one_image_of_one_class_with_one_evaluation_is_enough(tmp_path: Path) -> None:
    """It trains, from the warm start on, and every measure has an interval."""
    folder = write_coco(tmp_path / "one", train=1, val=1, classes=1)
    store = Store(tmp_path / "runs")
    configs = [
        configure("smoke", data=folder, method=m, lambda1=2.0, iterations=6, eval_every=6)
        for m in ("sssd", "labelenc")
    ]
    for run in store.get(configs, jobs=1):
        assert len(run.evaluations()) == 1 and len(run.files.last_evaluation()["per_class"]) == 1
        for measure in ("AP", "AP50", "AP_M"):
            estimate = interval([run.matches(measure=measure)])
            assert not estimate.low > estimate.high  # NaN where no object has the size
        record, *_ = evaluate_run(run.folder, folder)
        assert record["AP"] == run.evaluations()["AP"].iloc[-1]


def test_make_lab_opens_copies_and_keeps_those_that_are_there(tmp_path: Path) -> None:
    """What JupyterLab saves must not reach git; what was written into a copy stays."""
    makefile = Path(sssd.__file__).parent.parent / "Makefile"
    for name in ("requirements.lock", "pyproject.toml", ".venv/bin/jupyter", ".venv/.installed"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "notebooks").mkdir()
    for name in ("one", "two words"):
        (tmp_path / "notebooks" / f"{name}.ipynb").write_text(name)
    fake = tmp_path / ".venv" / "bin" / "jupyter"
    fake.write_text('#!/bin/sh\necho "$@" > words\n')
    fake.chmod(0o755)
    make = ["make", "-C", str(tmp_path), "-f", str(makefile), "lab"]
    subprocess.run(make, check=True)
    (tmp_path / "lab" / "one.ipynb").write_text("mine")
    subprocess.run(make, check=True)
    copies = {file.stem: file.read_text() for file in (tmp_path / "lab").iterdir()}
    assert copies == {"one": "mine", "two words": "two words"}
    words = (tmp_path / "words").read_text().split()
    assert words[:2] == ["lab", "--notebook-dir=lab"]
    assert ("--allow-root" in words) == (os.geteuid() == 0)
    ignored = (makefile.parent / ".gitignore").read_text().splitlines()
    assert "/lab/" in ignored and "/reports/tries/" in ignored


def test_make_passes_every_value_on_as_it_is(tmp_path: Path) -> None:
    """Nothing in a folder's name or a list means anything to make or the shell."""
    makefile = Path(sssd.__file__).parent.parent / "Makefile"
    for name in ("requirements.lock", "pyproject.toml", ".venv/bin/python", ".venv/.installed"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    fake = tmp_path / ".venv" / "bin" / "python"
    fake.write_text('#!/bin/sh\nshift 3\nfor word; do printf "%s\\n" "$word" >> words; done\n')
    fake.chmod(0o755)
    data = '/x/a=$b `touch c` "d" $(HOME), it\'s; e'
    values = {"PROFILE": "smoke", "DATA": data, "SEEDS": "[0, 1]", "JOBS": "2", "ONLY": "a b"}
    given = [f"{name}={value}" for name, value in values.items()]
    for target in ("reports", "figures"):
        make = ["make", "-C", str(tmp_path), "-f", str(makefile), target, *given]
        subprocess.run(make, check=True)
    words = (tmp_path / "words").read_text().splitlines()
    options = ("--profile", "--data", "--seeds", "--jobs", "--only")
    expected = [w for pair in zip(options, values.values(), strict=True) for w in pair]
    assert words == [*expected, "--data", data]
    assert not (tmp_path / "c").exists()
