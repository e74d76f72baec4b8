"""The plan's operations against those of real training steps, and what it says in all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import tiny
from test_methods import registered as registered
from torch.utils.flop_counter import FlopCounterMode

from sssd.__main__ import main
from sssd.profiles import configure, open_data
from sssd.reproduce.plan import OBJECTS, _bytes, cost
from sssd.starts import build_model


@pytest.mark.parametrize("detector", ["faster_rcnn", "retinanet", "fcos"])
@pytest.mark.parametrize("method", ["baseline", "lgd", "labelenc_stage1"])
def test_operations_are_those_of_a_real_step(detector: str, method: str) -> None:
    config = configure(
        "smoke",
        detector=detector,
        backbone="resnet18",
        method=method,
        start="random",
        min_sizes=64,
        max_size=96,
        batch_size=1,
        roi_samples=8,
    )
    model = build_model(config, len(config.data.classes), Path()).train()
    model.step.fill_(config.iterations)  # nothing rests any more
    torch.manual_seed(0)
    corner = torch.rand(OBJECTS, 2) * torch.tensor([60.0, 30.0])
    labels = torch.randint(1, len(config.data.classes) + 1, (OBJECTS,))
    target = {"boxes": torch.cat([corner, corner + 30], dim=1), "labels": labels}
    with FlopCounterMode(display=False) as counter:
        sum(model([torch.rand(3, 64, 96)], [target]).values()).backward()
    assert sum(cost(config).values()) == pytest.approx(counter.get_total_flops(), rel=0.03)


@pytest.mark.usefixtures("registered")
def test_a_method_of_ones_own_keeps_as_much_as_lgd() -> None:
    data = open_data("smoke")
    one, other = (_bytes(tiny(data, method=method)) for method in ("largest", "lgd"))
    assert one == other > 2 * _bytes(tiny(data, method="lgd", lambda2=2.0))


def test_the_papers_grid_is_planned_without_its_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--store", str(tmp_path), "plan", "--profile", "paper", "--tflops", "10"]) == 0
    *_, summary = capsys.readouterr().out.splitlines()
    slow = float(summary.split(" runs, ")[1].split(" hours")[0].replace(",", ""))
    assert main(["--store", str(tmp_path), "plan", "--profile", "paper", "--tflops", "20"]) == 0
    lines = capsys.readouterr().out.splitlines()
    fast = float(lines[-1].split(" runs, ")[1].split(" hours")[0].replace(",", ""))
    assert slow == pytest.approx(2 * fast, abs=1)
    (step,) = [line for line in lines if "sssd λ=75→100" in line]
    assert "sssd λ=75 " in step.split("→")[1] and " 60000 " in step
    assert not list(tmp_path.iterdir())
