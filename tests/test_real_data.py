"""The paper's model on COCO's own format, and the small one on photographs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sssd.profiles import configure, open_data
from sssd.runs import Store

REAL = os.environ.get("SSSD_TEST_DATA")
pytestmark = pytest.mark.skipif(not REAL, reason="SSSD_TEST_DATA is not set")


@pytest.mark.filterwarnings("ignore:.*are not used as targets")
def test_photographs(tmp_path: Path) -> None:
    source = open_data("smoke", Path(str(REAL)) / "bccd")
    config = configure(
        "smoke", data=source, method="sssd", lambda2=75.0, iterations=6, eval_every=6
    )
    (run,) = Store(tmp_path).get([config])
    metrics = run.metrics()
    assert metrics["lambda"].tolist() == [50.0] * 4 + [75.0] * 2
    assert set(run.files.last_evaluation()["per_class"]) == {"RBC", "WBC", "Platelets"}
    assert set(run.detections().category_id) <= {1, 2, 3}


@pytest.mark.slow
def test_the_papers_model_on_coco(tmp_path: Path) -> None:
    """ResNet-50, width 256, 80 classes with COCO's ids and crowds; small images, to save time."""
    config = configure(
        "paper",
        data=Path(str(REAL)) / "coco128",
        method="sssd",
        start="random",
        **{"iterations": 3, "eval_every": 3, "batch_size": 2, "warmup": 0, "lr": 1e-3},
        **{"min_sizes": (192, 256), "proposals": 200},
    )
    assert (config.backbone, config.width, config.trainable_stages) == ("resnet50", 256, 5)
    (run,) = Store(tmp_path).get([config])
    assert len(run.files.last_evaluation()["per_class"]) == 80
    assert run.metrics()["loss"].notna().all() and len(run.metrics()) == 3
    evaluation = run.evaluations().iloc[-1]
    assert evaluation["iteration"] == 3 and 0 <= evaluation["AP"] <= 1
