"""The README's examples run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

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


def test_papermill_lines_name_notebooks_and_parameters_that_exist() -> None:
    lines = re.findall(r"^papermill (notebooks/\S+\.ipynb) \S+(.*?)(?:#.*)?$", README, re.MULTILINE)
    assert len(lines) >= 3
    for path, options in lines:
        text = (Path(__file__).resolve().parent.parent / path).read_text()
        for name in re.findall(r"-p (\w+)", options):
            assert f'"{name}: ' in text, name
