"""What the bench says of a step's parts, and the tables that it leaves."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from helpers import write_coco
from torch import Tensor

from sssd import bench as module
from sssd.__main__ import main
from sssd.bench import MEASURED, Clock


class Slow(torch.autograd.Function):
    """Passes a tensor on, and takes ``ticks`` forward and ten times as many backward."""

    now = 0.0

    @staticmethod
    def forward(ctx: Any, x: Tensor, ticks: int) -> Tensor:
        ctx.ticks = ticks
        Slow.now += ticks
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        Slow.now += 10 * ctx.ticks
        return gradient, None


def slow(ticks: int) -> Any:
    return lambda x: Slow.apply(x, ticks)


def test_a_part_has_its_own_time_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "process_time", lambda: Slow.now)
    clock = Clock()
    inner = clock.timed("inner", slow(1))
    outer = clock.timed("outer", lambda x: {"a": slow(4)(inner(slow(2)(x)))})
    # What a part hands on counts for the part that made it.
    wrapped = clock.timed("wrapped", lambda x: clock.timed("last", slow(32))(x))
    out = wrapped(slow(16)(outer(slow(8)(torch.ones(1, requires_grad=True)))["a"]))
    clock.go_on(("rest", "backward"))
    out.backward()
    clock.go_on(("rest", "forward"))
    # Backward a part lasts until another's begins.
    assert clock.spent == {
        ("rest", "forward"): 8 + 16,
        ("outer", "forward"): 2 + 4,
        ("inner", "forward"): 1,
        ("wrapped", "forward"): 0,
        ("last", "forward"): 32,
        ("rest", "backward"): 0,
        ("last", "backward"): 320 + 160,
        ("outer", "backward"): 40,
        ("inner", "backward"): 10 + 20 + 80,
    }


def test_tables_are_printed_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "home", lambda: tmp_path)
    data = write_coco(tmp_path / "colours", classes=2)
    asked = ("bench", "--profile", "smoke", "--data", str(data), "--rounds", "1", "--set")
    assert main([*asked, "detector=fcos, backbone=slim18, method=lgd"]) == 2
    assert main([*asked, "detector=fcos, backbone=slim18", "--scaling"]) == 0
    said = capsys.readouterr()
    assert "fcos, step 2 of 2: sssd" in said.err
    folder = tmp_path / "reports" / "bench"
    tables = {
        name: pd.read_csv(folder / f"smoke_{name}.csv") for name in ("steps", "parts", "scaling")
    }
    assert tables["steps"]["method"].tolist() == list(MEASURED)
    assert set(tables["steps"]["detector"]) == {"fcos"}
    parts = tables["parts"].set_index("part")
    assert parts["% of the step"].sum() == pytest.approx(100, abs=1)
    both = {"pyramid", "head", "second head pass", "label encoder", "appearance encoder"}
    both |= {"inter-object relation", "intra-object mapping", "refinement", "adapter"}
    both |= {"normalisation", "distance"}
    assert set(parts.index) == both | {"objects and their masks", "optimizer", "rest"}
    assert (parts.loc[sorted(both), ["ms forward", "ms backward"]] > 0).all(axis=None)
    assert parts.loc["objects and their masks", "ms backward"] == 0  # it computes no gradient
    scaling = tables["scaling"].set_index("classes")["teacher's weights, 10⁶"]
    # The T-Net's last layer, at 1,000 classes: 256 values and a bias to a matrix of 1,004².
    assert scaling[1000] - scaling[1] == pytest.approx((1004**2 - 5**2) * 257 / 1e6, rel=0.01)
    text = (folder / "smoke.md").read_text()
    assert "detector=fcos" in text and "## Scaling" in text and str(folder) in said.out
