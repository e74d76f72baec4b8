"""What a training step and the inference of each method cost, against a plain detector's."""

from __future__ import annotations

import time
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from .config import DETECTORS
from .data.coco import Batches
from .profiles import configure, open_data, open_split
from .starts import build_model


def bench(profile: str, data: str = "", rounds: int = 15) -> pd.DataFrame:
    """Median seconds of a training step and of an image detected, and their ratios to the baseline's.

    Measured on one CPU thread. The methods take turns, step by step, so that other load on the
    machine slows all of them alike.
    """
    torch.set_num_threads(1)
    source = open_data(profile, data or None)
    split = open_split(source, "train")
    rows = []
    for detector in DETECTORS:
        steps = {}
        for method in ("baseline", "labelenc_stage1", "lgd", "sssd"):
            config = configure(
                profile,
                data=source,
                method=method,
                detector=detector,
                start="random",
                trainable_stages=3,
                distill_start=0,
                unfreeze_backbone=0,
            )
            model = build_model(config, len(source.classes), Path())
            learning = [p for p in model.parameters() if p.requires_grad]
            # At a rate of 0 all methods keep the same weights, and so detect the same.
            optimizer = torch.optim.AdamW(learning, 0.0, fused=True)
            steps[method] = (model.train(), optimizer)
        batches = Batches(split, config.batch_size, 0, rounds + 2)
        taken: dict[str, list[tuple[float, float]]] = {method: [] for method in steps}
        for t in range(1, rounds + 3):
            images, targets = batches[t]
            for method, (model, optimizer) in steps.items():
                began = time.perf_counter()
                losses: dict[str, Tensor] = model(images, targets)
                torch.stack(list(losses.values())).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
                trained = time.perf_counter()
                with torch.no_grad():
                    model.eval()(images)
                model.train()
                if t > 2:  # the first steps allocate
                    detected = (time.perf_counter() - trained) / len(images)
                    taken[method].append((trained - began, 1000 * detected))
        medians = pd.DataFrame({m: pd.DataFrame(times).median() for m, times in taken.items()})
        ratios = medians.div(medians["baseline"], axis=0)
        for method in steps:
            (step, image), (more, same) = medians[method], ratios[method]
            rows.append((detector, method, *(round(x, 3) for x in (step, more, image, same))))
    columns = ["detector", "method", "s / step", "÷ baseline", "ms / image", "÷ baseline"]
    return pd.DataFrame(rows, columns=columns)
