"""A run's student leaves as a stock torchvision model, which runs without this package."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny, write_coco

from sssd import export as exporting
from sssd.__main__ import main
from sssd.config import BUILT_FROM, RunConfig
from sssd.detectors import build_detector
from sssd.export import export, stock, to_onnx
from sssd.profiles import configure
from sssd.runs import Run, Store
from sssd.starts import load_student

DETECTORS = ("faster_rcnn", "retinanet", "fcos")
SIZES = ((64, 64), (90, 71), (48, 130), (125, 115), (42, 94))
"""Resized in single precision, the last two would lose a pixel."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco(tmp_path_factory.mktemp("export") / "colours")


def finished(config: RunConfig, root: Path) -> Run:
    """A run as if it had been trained, with head weights so large that it detects a lot."""
    folder = root / config.id
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.canonical()))
    (folder / "done.json").write_text("{}")
    names = list(config.data.classes.values())
    line = {"iteration": 1, "AP": 0.25, "per_class": dict.fromkeys(names, 0.25)}
    (folder / "evaluations.jsonl").write_text(json.dumps(line) + "\n")
    torch.manual_seed(0)
    built = {name: getattr(config, name) for name in BUILT_FROM}
    model: Any = build_detector(config.detector, config.backbone, len(names), **built)
    last = (
        model.roi_heads.box_predictor.cls_score
        if config.detector == "faster_rcnn"
        else model.head.classification_head.cls_logits
    )
    torch.nn.init.normal_(last.weight, std=0.3)
    torch.nn.init.zeros_(last.bias)
    torch.save(model.state_dict(), folder / "weights.pt")
    return Run(config, folder)


def images() -> list[torch.Tensor]:
    return [torch.rand(3, *size, generator=torch.Generator().manual_seed(1)) for size in SIZES]


@torch.no_grad()
def assert_same_detections(one: Any, other: Any) -> None:
    for image in images():
        (first,), (second,) = one([image]), other([image])
        assert len(first["boxes"]) > 5
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize("profile", ["smoke", "mini"])
def test_the_lines_build_the_same_detector(
    data: Path, tmp_path: Path, profile: str, detector: str
) -> None:
    config = configure(profile, data=data, method="baseline", start="random", detector=detector)
    run = finished(config, tmp_path)
    weights, lines = export(run.folder, tmp_path / "student.pt")
    assert "sssd" not in lines.read_text().replace("python -m sssd export", "")
    model = stock(lines)
    assert_same_detections(run.detector(), model)
    state = torch.load(weights, weights_only=True)
    assert state.keys() == torch.load(run.folder / "weights.pt", weights_only=True).keys()
    own = run.detector().state_dict().keys()
    assert model.state_dict().keys() == own  # no weight of the model was left as it began


@pytest.mark.parametrize("detector", DETECTORS)
def test_the_papers_detector_is_a_stock_builders(data: Path, tmp_path: Path, detector: str) -> None:
    config = configure("paper", data=data, method="baseline", start="random", detector=detector)
    run = finished(config.change(min_sizes=(96,), max_size=128), tmp_path)
    lines = export(run.folder, tmp_path / "student.pt")[1]
    assert f"detection.{detector.replace('_', '')}_resnet50_fpn(" in lines.read_text()
    assert_same_detections(run.detector(), stock(lines))


ALONE = """
import runpy, sys, torch
names = runpy.run_path(sys.argv[1])
(found,) = names["load"]()([torch.rand(3, 64, 64)])
print(len(names["CLASSES"]), names["AP"], sorted(found), "sssd" in sys.modules)
"""


def test_it_runs_where_this_package_is_not(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(tmp_path / "runs")
    config = tiny(data, iterations=2, detector="retinanet")
    (run,) = store.get([config], jobs=1)
    target = tmp_path / "student.pt"
    capsys.readouterr()
    assert main(["--store", str(store.root), "export", config.id[:5], str(target)]) == 0
    assert str(target.with_suffix(".py")) in capsys.readouterr().out
    assert not run.detector().training
    ap = run.evaluations()["AP"].iloc[-1]
    for code, said in (
        (
            ["-c", ALONE, str(target.with_suffix(".py"))],
            f"3 {ap} ['boxes', 'labels', 'scores'] False",
        ),
        ([str(target.with_suffix(".py")), str(data / "val" / "001.png")], ""),
    ):
        done = subprocess.run(
            [sys.executable, "-P", *code], capture_output=True, text=True, cwd=tmp_path, timeout=120
        )
        assert done.returncode == 0 and done.stdout.strip().startswith(said), done.stderr


@pytest.mark.parametrize("detector", DETECTORS)
def test_onnx_detects_the_same(data: Path, tmp_path: Path, detector: str) -> None:
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    model = load_student(finished(tiny(data, detector=detector), tmp_path).folder)[0]
    to_onnx(model, tmp_path / "student.onnx")
    session = runtime.InferenceSession(str(tmp_path / "student.onnx"))
    for image in images():
        with torch.no_grad():
            (expected,) = model([image])
        boxes, labels, scores = map(torch.from_numpy, session.run(None, {"image": image.numpy()}))
        assert len(boxes) > 5 and torch.equal(labels, expected["labels"])
        torch.testing.assert_close(boxes, expected["boxes"], atol=0.1, rtol=0)
        torch.testing.assert_close(scores, expected["scores"], atol=1e-3, rtol=0)


def test_what_cannot_be_exported_is_said(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished(tiny(data), tmp_path)
    for name, sentence in (("student.pth", "ends in .pt"), ("absent/student.pt", "in a folder")):
        with pytest.raises(ValueError, match=sentence):
            export(run.folder, tmp_path / name)
    if Path("/proc/self").exists():  # nobody can write a file there
        with pytest.raises(ValueError, match="^file: nothing can be written to '/proc/self': "):
            export(run.folder, Path("/proc/self/student.pt"))
    (tmp_path / "mine.py").write_text("print('mine')")
    with pytest.raises(ValueError, match=r"mine\.py' is there"):
        export(run.folder, tmp_path / "mine.pt")
    monkeypatch.setattr(exporting.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="onnx: not installed"):
        export(run.folder, tmp_path / "student.pt", onnx=True)
    (run.folder / "done.json").rename(tmp_path / "done.json")
    with pytest.raises(ValueError, match=f"run: {run.config.id} is not finished"):
        run.detector()
    (run.folder / "weights.pt").unlink()
    (tmp_path / "done.json").rename(run.folder / "done.json")
    run.folder.rename(tmp_path / "records")
    run.folder.mkdir()
    (tmp_path / "records").rename(run.folder / "imported")
    with pytest.raises(ValueError, match=f"run: {run.config.id} was imported without"):
        run.detector()
    assert [file.name for file in tmp_path.glob("student*")] == []
