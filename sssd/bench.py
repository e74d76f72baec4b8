"""What a step of each method costs, against a plain one, measured side by side."""

from __future__ import annotations

import time
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from .config import DETECTORS, configure, open_data
from .data.coco import Batches
from .engine import build_model, open_split


def bench(profile: str, data: str = "", rounds: int = 15) -> pd.DataFrame:
    """Median seconds of a training step on one CPU thread, and its ratio to the baseline's.

    The methods take turns, step by step, so that what else the machine does strikes all alike.
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
            model = build_model(config, len(split.class_names), Path())
            learning = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(learning, config.lr, fused=True)
            steps[method] = (model.train(), optimizer)
        batches = Batches(split, config.batch_size, 0, rounds + 2)
        seconds: dict[str, list[float]] = {method: [] for method in steps}
        for t in range(1, rounds + 3):
            for method, (model, optimizer) in steps.items():
                began = time.perf_counter()
                losses: dict[str, Tensor] = model(*batches[t])
                torch.stack(list(losses.values())).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
                if t > 2:  # the first steps allocate
                    seconds[method].append(time.perf_counter() - began)
        plain = pd.Series(seconds["baseline"]).median()
        for method, taken in seconds.items():
            median = pd.Series(taken).median()
            rows.append((detector, method, round(median, 3), round(median / plain, 2)))
    return pd.DataFrame(rows, columns=["detector", "method", "seconds a step", "÷ baseline"])
