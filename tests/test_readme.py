"""The README's examples run as they stand."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import environment, write_coco
from test_detectors import batch, detector

from sssd import Distiller
from sssd.__main__ import _parser
from sssd.inventory import listing
from sssd.profiles import configure
from sssd.records import read_records
from sssd.reproduce.document import MARKS

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.slow
def test_the_loop_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = [block for block in BLOCKS if "optimizer.step()" in block]
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(block, names)
    losses = names["losses"]
    assert isinstance(losses, dict) and "distill" in losses and "loss_classifier" in losses
    state = torch.load(tmp_path / "student.pth", weights_only=True)
    names["detector"].load_state_dict(state, strict=True)  # type: ignore[attr-defined]
    groups = names["optimizer"].param_groups  # type: ignore[attr-defined]
    assert [group["lr"] for group in groups] == [1e-4, 0.25e-4]
    model = names["model"]
    assert isinstance(model, torch.nn.Module)
    every = {id(p) for group in groups for p in group["params"]}
    assert every == {id(p) for p in model.parameters()}


def test_a_loop_of_ones_own_goes_on_as_if_it_had_not_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (keeps,) = [block for block in BLOCKS if "get_rng_state" in block]
    (goes_on,) = [block for block in BLOCKS if "set_rng_state" in block]
    monkeypatch.chdir(tmp_path)
    images, targets = batch()

    def made(seed: int) -> dict[str, Any]:
        student = detector("faster_rcnn")
        torch.manual_seed(seed)
        model = Distiller(student, lam=lambda t: 50.0 * t, distill_start=3, unfreeze_backbone=4)
        teacher = [p for name, p in model.named_parameters() if not name.startswith("student.")]
        groups = [{"params": model.student.parameters()}, {"params": teacher, "lr": 1e-4}]
        return {"torch": torch, "model": model, "optimizer": torch.optim.AdamW(groups, 4e-4)}

    def train(names: dict[str, Any], steps: int) -> list[float]:
        totals = []
        for _ in range(steps):
            total = torch.stack(list(names["model"](images, targets).values())).sum()
            names["optimizer"].zero_grad()
            total.backward()
            names["optimizer"].step()
            totals.append(total.item())
        return totals

    whole = made(seed=1)
    expected = train(whole, 5)
    part = made(seed=1)
    train(part, 2)
    exec(keeps, part)
    later = made(seed=2)
    exec(goes_on, later)
    assert train(later, 3) == expected[2:]
    state = whole["model"].state_dict()
    assert all(torch.equal(x, state[name]) for name, x in later["model"].state_dict().items())


def test_a_run_leaves_as_a_detector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two examples that train a run and take its detector, in the smallest profile."""
    (trains,) = [block for block in BLOCKS if "draw_detections" in block]
    (leaves,) = [block for block in BLOCKS if "run.detector()" in block]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SSSD_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    short = 'configure("smoke", start="random", iterations=4, '
    names: dict[str, object] = {}
    exec(trains.replace('configure("mini", ', short) + leaves, names)
    made = {file.name for file in tmp_path.iterdir()}
    assert made == {"runs", "detections.png", "student.pt", "student.py"}
    detector = names["detector"]
    assert isinstance(detector, torch.nn.Module) and not detector.training
    (found,) = detector([torch.rand(3, 64, 64)])
    assert set(found) == {"boxes", "labels", "scores"}


def test_papermill_lines_name_notebooks_and_parameters_that_exist() -> None:
    lines = re.findall(r"^papermill (notebooks/\S+\.ipynb) \S+(.*?)(?:#.*)?$", README, re.MULTILINE)
    assert len(lines) >= 5
    for path, options in lines:
        text = (Path(__file__).resolve().parent.parent / path).read_text()
        for name in re.findall(r"-p (\w+)", options):
            assert f'"{name}: ' in text, name


def test_commands_are_understood() -> None:
    for line in re.findall(r"^python -m sssd (.*)", README, re.MULTILINE):
        words = shlex.split(line, comments=True)
        if "--help" not in words:  # it ends the process
            _parser().parse_args(words)
    root = Path(__file__).resolve().parent.parent
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE):
        assert f"\n{target}: " in (root / "Makefile").read_text(), target
    for names in re.findall(r'ONLY="([^"]+)', README):
        assert all((root / "notebooks" / f"{name}.ipynb").exists() for name in names.split())


BY_STORE = """
import sys, sssd
config = sssd.configure("smoke", data=sys.argv[1], method="huber", overrides=sys.argv[2])
(run,) = sssd.Store(sys.argv[3]).get([config], jobs=1)
print(config.id, sssd.configure("smoke", data=sys.argv[1], method="sssd").id)
"""


def test_a_distance_of_ones_own_trains_by_store_and_by_command_line(tmp_path: Path) -> None:
    (block,) = [block for block in BLOCKS if "register_distance" in block]
    file, data, runs = tmp_path / "my_distance.py", tmp_path / "data", tmp_path / "runs"
    file.write_text(block)
    write_coco(data)
    short = "start=random, iterations=2, eval_every=2, distill_start=0"

    def run(*arguments: object, source: str = block) -> str:
        file.write_text(source)
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=environment(SSSD_METHODS="my_distance.py"),
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()[-1]

    first, built_in = run("-c", BY_STORE, data, short, runs).split()
    assert built_in == configure("smoke", data=data, method="sssd").id  # as without the file
    command = ("-m", "sssd", "--store", runs, "train", "--profile", "smoke", "--data", data)
    command += ("--method", "huber", "--set", short)
    assert first in run(*command)  # found, and not trained again
    double = block.replace(".mean()", ".mean() * 2")
    other = run(*command, source=double)
    second = other.split()[0]
    assert second != first and "huber λ=2" in other
    # The same seed: the first step's loss of twice the distance is twice the loss.
    one, two = (read_records(runs / id / "metrics.jsonl")[0]["distill"] for id in (first, second))
    assert two == pytest.approx(2 * one, rel=1e-5) and one > 0
    assert [row.method for row in listing(runs).itertuples()] == ["huber", "huber"]


def test_there_is_a_place_for_the_verdicts() -> None:
    first, last = MARKS
    assert README.index(first) < README.index(last)


def test_what_is_survived_names_tests_that_exist() -> None:
    section = README.partition("## What a run survives")[2].partition("\n## ")[0]
    tests = "".join(file.read_text() for file in Path(__file__).parent.glob("test_*.py"))
    names = re.findall(r"`(test_\w+)`", section)
    assert len(names) >= 10
    assert [name for name in names if f"def {name}(" not in tests] == []
