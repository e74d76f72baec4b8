"""Small is a size: one image, one class, one seed, one evaluation, and names that mean something."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
from helpers import environment, write_coco

from sssd import pool
from sssd.reproduce import EXPERIMENTS, Experiment, build
from sssd.reproduce.document import assemble
from sssd.runs import Store

NAME = "$x_{$ <script>alert(1)<`&*_"
CLASS = "$\\frac$ <script>"
OWN: dict[str, dict[str, Any]] = {
    "fig3_stepwise": {"methods": "sssd", "t1": 2},
    "fig2_ap_curves": {"lgd_lambdas": "1", "sssd_lambdas": "50"},
    "table4_lambda_sweep": {"lgd_lambdas": "1", "sssd_lambdas": "50"},
    "table1_benchmark": {
        "methods": "baseline sssd",
        "detectors": "faster_rcnn",
        "backbones": "slim18",
    },
    "table3_calibration": {"low": 48, "high": 52},
}


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Parameters for one image of one class, in a folder of a name with everything in it."""
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    monkeypatch.setattr(pool, "POLL_SECONDS", 0.1)
    data = write_coco(tmp_path / NAME, train=1, val=1, classes=1)
    for file in (data / "annotations").iterdir():
        content = json.loads(file.read_text())
        content["categories"][0]["name"] = CLASS
        file.write_text(json.dumps(content))
    quick = "start=random, iterations=3, eval_every=3, trainable_stages=0"
    common = {"profile": "smoke", "data": str(data), "seeds": "0", "overrides": quick}
    yield {**common, "output": str(tmp_path / "out"), "runs": str(tmp_path / "runs"), "jobs": 1}
    plt.close("all")


@pytest.mark.slow
def test_one_image_one_class_one_seed_and_one_evaluation_give_every_result(
    given: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for kind in EXPERIMENTS:
        known = {k: v for k, v in given.items() if k in kind.model_fields}
        build.run_cells(kind.notebook, known | OWN.get(kind.notebook, {}))
        record = json.loads((out / f"{kind.notebook}.json").read_text())
        for name in record["figures"]:
            assert (out / f"{name}.svg").stat().st_size and (out / f"{name}.png").stat().st_size
        said = " ".join([*record["findings"], *map(str, record["verdicts"])])
        said += " ".join((out / f"{name}.csv").read_text() for name in record["tables"])
        assert not re.search(r"\bnan\b|± ?0\b", said), said
        assert not re.search(r"\[([−+\d.]+), \1\]", said), said  # an interval of no width
        for verdict in record["verdicts"]:
            assert verdict["verdict"] == "not decided" and verdict["low"] is None
    asked = Experiment(**{k: given[k] for k in ("profile", "data", "seeds")})
    assemble(out, Store(given["runs"]), asked, {})
    assert (out / "report.pdf").stat().st_size
    page = re.sub(r"```.*?```", "", (out / "README.md").read_text(), flags=re.DOTALL)
    assert "<script>" not in re.sub(r"\\<", "", page)  # but for the commands, which are code
