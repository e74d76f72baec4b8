"""What a report would train, and what that costs, counted on the real models without running them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..config import BUILT_FROM, DataSource, RunConfig
from ..detectors import build_detector, freeze_stages
from ..distiller import Distiller
from ..labelenc import LabelEncodingFunction
from ..methods import DISTANCE_OF
from ..profiles import open_data
from ..runs import Store
from ..teacher import LabelGuidedTeacher
from . import EXPERIMENTS
from .experiment import recorded_data

OBJECTS = 7
"""Objects in an image: COCO's images have 7.3 on average."""
PARTS = ("student", "teacher", "adapter", "head again")


@lru_cache(maxsize=256)
def step_flops(
    detector: str, backbone: str, method: str, classes: int, fields: tuple[tuple[str, Any], ...]
) -> dict[str, float]:
    """Floating-point operations of a step, forward and backward, for one image, by `PARTS`.

    torch's own counter counts them on the model that a run trains, with its largest image, on the
    device ``meta``, whose tensors have shapes and no values. Convolutions and matrix products are
    counted; the rest is about a hundredth of them.

    Args:
        fields: those of the configuration that the model is built with, and ``trainable_stages``.
    """
    own = dict(fields)
    trainable = own.pop("trainable_stages")
    side, longest = own["min_sizes"][-1], own["max_size"]
    size = tuple(-(-x // 32) * 32 for x in (side, min(longest, side * 3 // 2)))
    with torch.device("meta"):
        student: Any = build_detector(detector, backbone, classes, **own)
        freeze_stages(student, trainable)
        distiller = _distiller(student, method, classes)

        def pyramid() -> list[Tensor]:
            return list(student.backbone(torch.empty(1, 3, *size)).values())

        maps = [torch.empty_like(x, requires_grad=True) for x in pyramid()]

        def head() -> list[Tensor]:
            if detector != "faster_rcnn":
                return [x for part in student.head(maps).values() for x in _tensors(part)]
            rois = torch.empty(own["roi_samples"], own["width"], 7, 7, requires_grad=True)
            box = student.roi_heads.box_predictor(student.roi_heads.box_head(rois))
            return [*_tensors(student.rpn.head(maps)), *box]

        found = dict.fromkeys(PARTS, 0.0)
        found["student"] = _count(pyramid) + _count(head)
        if method != "baseline":
            found["adapter"] = _count(lambda: [distiller.adapter(x) for x in maps])
            found["teacher"] = _count(lambda: _taught(distiller.teacher, maps, size))
        if method not in ("baseline", "labelenc"):
            found["head again"] = _count(head)
    return found


def _distiller(student: Any, method: str, classes: int) -> Distiller:
    encoder = LabelEncodingFunction.like(student, classes) if method == "labelenc" else None
    return Distiller(student, method, first_label=1, encoder=encoder)


def _taught(teacher: Any, maps: list[Tensor], size: tuple[int, ...]) -> list[Tensor]:
    """A teacher's levels, from labels whose values are left open."""
    if not isinstance(teacher, LabelGuidedTeacher):
        return teacher.encode(torch.empty(1, teacher.num_classes, *size))
    if teacher.detach_appearance:
        maps = [x.detach() for x in maps]
    masks = [torch.empty(1, OBJECTS, *x.shape[2:]) for x in maps]
    described = torch.empty(1, OBJECTS, 4 + teacher.num_classes)
    valid = torch.ones(1, OBJECTS, dtype=torch.bool)
    embeddings = teacher.label_encoder(described, valid)
    # The appearance encoder's mean needs values; beside its convolution it costs next to nothing.
    means = [teacher.appearance_conv(x).mean(dim=(2, 3)) for x in maps]
    seen = torch.cat([x[:, None].expand(-1, OBJECTS, -1) for x in means], dim=1)
    related = teacher.inter_object_relation(seen, embeddings, valid)
    drawn = teacher.intra_object_mapping(related, masks, ~valid)
    return [teacher.refinement(x) for x in drawn]


def _tensors(nested: Any) -> list[Tensor]:
    return (
        [nested] if isinstance(nested, Tensor) else [x for part in nested for x in _tensors(part)]
    )


def _count(forward: Any) -> float:
    with FlopCounterMode(display=False) as counter:
        learning = [x.sum() for x in forward() if x.requires_grad]
        if learning:
            torch.stack(learning).sum().backward()
    return float(counter.get_total_flops())


def cost(config: RunConfig) -> dict[str, float]:
    """FLOPs of a run's step, by `PARTS`; a classifier of crops counts as 0."""
    if config.method == "crops":
        return dict.fromkeys(PARTS, 0.0)
    fields = tuple((name, getattr(config, name)) for name in (*BUILT_FROM, "trainable_stages"))
    classes = len(config.data.classes)
    found = step_flops(config.detector, config.backbone, config.method, classes, fields)
    return {part: flops * config.batch_size for part, flops in found.items()}


def report_runs(profile: str, data: str, source: DataSource) -> list[RunConfig]:
    """The runs of a report, whether trained or not, each once; without those that they start from.

    Args:
        profile, data: as a report takes them.
        source: the same data, opened.
    """
    given = {"profile": profile, "data": data}
    with recorded_data(source):
        needed = [config for kind in EXPERIMENTS for config in kind.from_notebook(given).needed]
    return list({config.id: config for config in needed}.values())


def plan(profile: str, data: str, store: Store, tflops: float) -> tuple[pd.DataFrame, str]:
    """Every run that a report of the profile lacks, and a sentence on what they cost in all.

    Args:
        profile: as a report takes it; ``paper`` without ``data`` is planned for COCO.
        data: as a report takes it.
        store: what is finished there is not planned.
        tflops: what one GPU sustains, in 10¹² operations a second.

    Returns:
        A row for each run: its number for ``train --task`` (none for a run that only others need,
        whose task trains it), its name, the runs that it waits for, its iterations, the 10⁹
        operations of a step by `PARTS`, and the hours that it takes on one such GPU.

    Raises:
        ValueError: ``tflops`` or another parameter is wrong.
    """
    if not 0 < tflops < float("inf"):
        raise ValueError(f"tflops: {tflops:g}; expected a number above 0")
    if profile == "paper" and not data:
        classes = {i: f"class {i}" for i in range(1, 81)}
        source = DataSource(name="COCO", train="", val="", paths={}, classes=classes)
    else:
        source = open_data(profile, data or None)
    needed = report_runs(profile, data, source)
    tasks = {config.id: str(i) for i, config in enumerate(needed, start=1)}
    jobs = store.plan(needed)
    rows = []
    for job in jobs.values():
        steps = job.length - job.reached
        c, flops = job.config, cost(job.config)
        same = f" {c.detector} {c.backbone} seed {c.seed}"
        rows.append(
            {
                "task": tasks.get(job.config.id, ""),
                "run": job.config.label(),
                "waits for": ", ".join(
                    jobs[id].config.label().replace(same, "") for id in job.after
                ),
                "iterations": steps,
                **{part: round(x / 1e9) for part, x in flops.items()},
                "GPU hours": steps * sum(flops.values()) / tflops / 1e12 / 3600,
            }
        )
    table = pd.DataFrame(rows)
    if not rows:
        return table, "Nothing to train: all runs are in the store."
    weights = sum(_bytes(job.config) for job in jobs.values())
    return table, (
        f"{len(rows)} runs, {table['GPU hours'].sum():,.0f} hours of one GPU that sustains "
        f"{tflops:g} TFLOP a second; each run is trained once, whichever figures and tables need "
        f"it. The columns from student to head again are 10⁹ operations of a step. "
        f"Weights and checkpoints take about {weights / 1e9:,.1f} GB. Reading and resizing of "
        f"images and evaluation are not counted. Each image is assumed to have {OBJECTS} objects."
    )


def _bytes(config: RunConfig) -> float:
    """Bytes that a finished run keeps: weights, and the checkpoint at T1 if others may begin there."""
    if config.method == "crops":
        return 0.0
    with torch.device("meta"):
        student = build_detector(
            config.detector, config.backbone, len(config.data.classes), width=config.width
        )
        model = _distiller(student, config.method, len(config.data.classes))
    size = 4.0 * sum(x.numel() for x in model.state_dict().values())
    fork = config.method in DISTANCE_OF and not config.stepwise
    return size * (1 + fork * (2 if config.optimizer == "sgd" else 3))
