"""Train one run from its configuration, and resume it exactly.

Everything random in iteration t is a function of (seed, t): which images, their augmentation, and
the state of torch's generator that the detectors draw samples from. So a checkpoint needs no state
of a generator or loader: a continued run equals an uninterrupted one, bit for bit on the CPU.
"""

from __future__ import annotations

import math
import platform
import resource
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from .config import RunConfig, check_narrowest
from .data.coco import Batches, CocoSplit, Crops, fingerprint, mixed_seed
from .detectors import observed
from .distiller import Distiller
from .evaluation import Detections, Matches, coco_results, evaluate
from .methods import DISTANCE_OF, TAUGHT
from .profiles import find_data, find_parts, open_split
from .records import RunFolder
from .starts import build_model, load_student

EVALUATED_PIXELS = 2**23
"""Most pixels of an evaluation batch: seven of the paper's images, or at most 32 small ones."""


def train(
    config: RunConfig,
    folder: Path,
    *,
    until: int | None = None,
    keep: Iterable[int] = (),
    checkpoint_seconds: float = 60.0,
) -> None:
    """Train or continue a run, to its end or to iteration ``until``.

    Its files go into ``folder`` (see `RunFolder`); the finished runs that it starts from are in the
    folders beside it. A checkpoint is written when more than ``checkpoint_seconds`` of training
    could be lost; a run that is stopped earlier begins again. After each iteration of ``keep``, a
    checkpoint is kept for other runs to continue from; also after the first milestone, the usual
    T1, if λ is fixed and stepwise runs could continue from there.

    Raises:
        FloatingPointError: a loss, gradient or weight is not finite; the last checkpoint is kept.
        ValueError: annotations or start weights have changed since the run was configured.
        DiskFull: the disk has no room for what the run writes.
    """
    accelerator = _accelerator(config)
    last = min(config.iterations, until or config.iterations)
    forks = {*keep, config.milestones[0]} if _may_be_stepped(config) else set(keep)
    files = RunFolder(folder, writes=accelerator.is_main_process)
    files.begin(config.canonical())
    accelerator.wait_for_everyone()

    _check_annotations(config)
    split, val = open_split(config.data, "train"), open_split(config.data, "val")
    module: Any = build_model(config, len(split.class_names), folder.parent)
    layout = torch.channels_last if config.channels_last else torch.preserve_format
    module.to(accelerator.device, memory_format=layout)
    optimizer = _optimizer(config, module)
    first, seconds = _restore(config, files, module, optimizer, accelerator)
    model, optimizer = accelerator.prepare(module, optimizer)

    began = saved = time.monotonic()
    batches = _batches(config, split, range(first, last + 1), accelerator)
    for t, (images, targets) in enumerate(batches, start=first):
        rates = (config.lr_at(t), config.teacher_lr_at(t))
        for group, rate in zip(optimizer.param_groups, rates, strict=False):
            group["lr"] = rate
        torch.manual_seed(mixed_seed(config.seed, t, accelerator.process_index))
        step = train_step(t, model, images, targets, optimizer, accelerator, config.clip)
        now = time.monotonic()
        seconds += now - began
        files.record_step(_step_record(config, t, step, now - began))

        evaluates = t % config.eval_every == 0 or t == config.iterations
        saves = t < config.iterations and time.monotonic() - saved > checkpoint_seconds
        if evaluates or saves or t in forks:
            _check_finite(t, module)
        if evaluates and config.method != "crops":
            files.record_evaluation(t, *validate(module, val, accelerator))
        if t in forks:
            files.save_checkpoint(_state(t, seconds, module, optimizer, accelerator), fork=True)
        if saves:
            files.save_checkpoint(_state(t, seconds, module, optimizer, accelerator))
            saved = time.monotonic()
        began = time.monotonic()

    if last == config.iterations:
        cost = {"training_seconds": seconds, "peak_memory_mib": _peak_memory()}
        done = {"iterations": last, **cost, "processes": accelerator.num_processes}
        files.finish(*_kept_weights(config, module), done)
    else:
        files.close()
    accelerator.wait_for_everyone()


def train_step(
    t: int,
    model: nn.Module,
    images: list[Tensor],
    targets: list[dict[str, Tensor]],
    optimizer: Any,
    accelerator: Accelerator,
    clip: float,
) -> dict[str, float]:
    """Iteration ``t`` on one batch: forward, backward, check that all is finite, clip, step.

    Returns:
        Means over the processes: ``loss``, ``gradient_norm`` (before clipping) and each part of
        the loss by its name.

    Raises:
        FloatingPointError: the loss or the gradient is not finite; no weight has changed.
    """
    with accelerator.autocast():
        losses: dict[str, Tensor] = model(images, targets)
        total = torch.stack([loss.float() for loss in losses.values()]).sum()
    accelerator.backward(total)
    accelerator.unscale_gradients()

    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    values = torch.stack([total.detach(), norm, *(x.detach().float() for x in losses.values())])
    loss, gradient, *parts = accelerator.reduce(values, "mean").tolist()
    named = dict(zip(losses, parts, strict=True))
    skips = accelerator.scaler is not None  # fp16's scaler itself skips a step that overflows
    if not math.isfinite(loss) or not (skips or math.isfinite(gradient)):
        shown = ", ".join(f"{name} {value:.4g}" for name, value in named.items())
        raise FloatingPointError(
            f"iteration {t}: loss {loss} or gradient norm {gradient} is not finite ({shown}); "
            "the last checkpoint is kept"
        )

    nn.utils.clip_grad_value_(parameters, clip)
    optimizer.step()
    optimizer.zero_grad()
    return {"loss": loss, "gradient_norm": gradient, **named}


def _check_finite(t: int, module: nn.Module) -> None:
    """Refuse to save weights that a too large step has made infinite or NaN."""
    for name, value in module.state_dict().items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise FloatingPointError(
                f"iteration {t}: after its step {name} is not finite; the last checkpoint is kept"
            )


def _check_annotations(config: RunConfig) -> None:
    for split, known in (("train", config.data.train), ("val", config.data.val)):
        file = Path(config.data.paths[f"{split}_annotations"])
        if (found := fingerprint(file)) != known:
            what = f"has changed since the run was configured: its fingerprint is {found}"
            raise ValueError(f"data: {file} {what}; expected {known}")


def _accelerator(config: RunConfig) -> Accelerator:
    accelerator = Accelerator(
        mixed_precision=config.precision,
        cpu=not torch.cuda.is_available(),
        # Before unfreeze_backbone the backbone takes no part in the backward pass.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    if accelerator.device.type == "cpu":
        torch.set_num_threads(1)  # the order of sums, and so the last bits, depend on it
    size, world = config.batch_size, accelerator.num_processes
    if size % world:
        raise ValueError(f"batch_size: {size} is not divisible by {world} processes")
    return accelerator


def _optimizer(config: RunConfig, module: nn.Module) -> torch.optim.Optimizer:
    """The optimizer, with one group for the student, and one for teacher and adapter, if any."""
    groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            groups[name.startswith(("teacher.", "adapter."))].append(parameter)
    learning = [{"params": group} for group in groups if group or group is groups[0]]
    lr, decay = config.lr, config.weight_decay
    if config.optimizer == "sgd":
        return torch.optim.SGD(learning, lr, momentum=config.momentum, weight_decay=decay)
    return torch.optim.AdamW(learning, lr, weight_decay=decay, fused=True)


def _loaders(accelerator: Accelerator) -> int:
    """The processes that load images: a GPU would wait for them, a CPU has no core to spare."""
    return 4 if accelerator.device.type == "cuda" else 0


def _batches(
    config: RunConfig, split: CocoSplit, steps: range, accelerator: Accelerator
) -> Iterable[tuple[list[Tensor], list[dict[str, Tensor]]]]:
    """This process's share of each batch, on its device."""
    rank, world = accelerator.process_index, accelerator.num_processes
    size, seed, device = config.batch_size, config.seed, accelerator.device
    batches: Dataset
    if config.method == "crops":
        batches = Crops(split, size, seed)
    else:
        batches = Batches(
            split, size, seed, config.iterations, rank, world, config.flip, config.aspect_grouping
        )
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=steps,
        num_workers=_loaders(accelerator),
        pin_memory=device.type == "cuda",
    )
    for images, targets in loader:
        yield (
            [image.to(device, non_blocking=True) for image in images],
            [
                {name: v.to(device) for name, v in target.items() if isinstance(v, Tensor)}
                for target in targets
            ],
        )


def _step_record(
    config: RunConfig, t: int, step: dict[str, float], seconds: float
) -> dict[str, Any]:
    # Rounded to digits below their noise, as a report keeps these two for every iteration.
    record = {"iteration": t, **step, "lr": config.lr_at(t), "seconds": round(seconds, 4)}
    if config.method in TAUGHT:
        record["lambda"] = config.lambda_at(t)
        record["share"] = round(step.get("distill", 0.0) / step["loss"], 6)
    return record


def _may_be_stepped(config: RunConfig) -> bool:
    """Whether a stepwise run could continue this one from the first milestone for 2 evaluations."""
    fixed = config.method in DISTANCE_OF and not config.stepwise and config.lambda1 > 0
    return fixed and 2 * config.eval_every <= config.iterations - config.milestones[0]


def _state(
    t: int, seconds: float, module: nn.Module, optimizer: Any, accelerator: Accelerator
) -> dict[str, Any]:
    """Everything needed to continue training after iteration ``t``."""
    scaler = accelerator.scaler
    return {
        "iteration": t,
        "seconds": seconds,
        "model": module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict() if scaler else None,
    }


def _restore(
    config: RunConfig, files: RunFolder, module: nn.Module, optimizer: Any, accelerator: Accelerator
) -> tuple[int, float]:
    """Load the latest checkpoint; return the next iteration and the seconds trained so far."""
    parent = files.path.parent / config.parent.id if config.parent else None
    state = files.load_checkpoint(parent, config.t1)
    if state is None:
        return 1, 0.0
    module.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
    return int(state["iteration"]) + 1, float(state["seconds"])


def _kept_weights(
    config: RunConfig, module: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """The weights of the student (or crop classifier), and those of teacher and adapter, if any."""
    if config.method == "crops":
        return module.body.state_dict(), None
    if config.method not in TAUGHT:
        return module.student.state_dict(), None
    rest = {k: v for k, v in module.state_dict().items() if not k.startswith("student.")}
    return module.student.state_dict(), rest


def _peak_memory() -> float:
    """Peak memory in MiB: that of the GPU if there is one, else that of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (2**20 if platform.system() == "Darwin" else 2**10)  # bytes on macOS, else KiB


def _collate(samples: list[tuple[Tensor, dict]]) -> tuple[list[Tensor], list[dict]]:
    return [image for image, _ in samples], [target for _, target in samples]


@torch.no_grad()
def detect(
    module: Distiller,
    loader: Iterable[tuple[list[Tensor], list[dict[str, Any]]]],
    category_ids: list[int],
    device: torch.device,
    teacher: bool = False,
) -> tuple[Detections, Detections, float]:
    """The detections of a student and of its teacher, and the student's seconds per image.

    The teacher's are those of the student's head on the teacher's pyramid; there are none without
    ``teacher``. Both use the same images and the same pyramid of the student. The seconds are the
    median over the batches, without reading the images.
    """
    found: list[Detections] = []
    by_teacher: list[Detections] = []
    seconds = []
    training = module.training
    module.eval()
    with observed(module.student.backbone) as features:
        for images, targets in loader:
            began = time.monotonic()
            images = [image.to(device) for image in images]
            image_ids = [target["image_id"] for target in targets]
            found.append(to_detections(module(images), image_ids, category_ids))
            seconds.append((time.monotonic() - began) / len(images))
            pyramid = features.pop()
            if teacher:
                labels = [{k: t[k].to(device) for k in ("boxes", "labels")} for t in targets]
                outputs = module.detect_taught(images, labels, pyramid)
                by_teacher.append(to_detections(outputs, image_ids, category_ids))
                features.clear()
    module.train(training)
    student, taught = (Detections.concatenate(parts) for parts in (found, by_teacher))
    return student, taught, statistics.median(seconds)


def to_detections(
    outputs: list[dict[str, Tensor]], image_ids: list[int], category_ids: list[int]
) -> Detections:
    """A detector's outputs in single precision, without those of label 0.

    Mixed precision gives boxes in half precision. The unused channel of RetinaNet and FCOS can be
    detected, as label 0, which is no class of the data.
    """
    for output in outputs:
        known = output["labels"] > 0
        output["labels"] = output["labels"][known]
        output |= {name: output[name][known].float() for name in ("boxes", "scores")}
    return Detections.from_outputs(outputs, image_ids, category_ids)


def validate(
    module: Distiller, split: CocoSplit, accelerator: Accelerator
) -> tuple[dict[str, Any], Detections, dict[str, Matches]]:
    """Detect on the validation set, each process on its share, and evaluate.

    Returns:
        The evaluation's record, the student's detections, and the matches of each measure. If the
        module has a teacher that some table shows, the record also has ``teacher_AP``,
        ``teacher_AP50`` and ``teacher_AP75``, and there are matches of the measure ``teacher``.
        Only the main process evaluates: in the others record and matches are empty.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    part = Subset(split, range(rank, len(split), world))
    # Without a backward pass more images fit into memory than in training; still more of them would
    # not fit into a processor's cache.
    transform = module.student.transform
    pixels = transform.min_size[-1] * transform.max_size
    batch = min(max(EVALUATED_PIXELS // pixels, 1), 32)
    loader = DataLoader(part, batch, collate_fn=_collate, num_workers=_loaders(accelerator))
    teacher = module.method in TAUGHT and module.method != "labelenc_stage1"
    with accelerator.autocast():
        found, by_teacher, seconds = detect(
            module, loader, split.category_ids, accelerator.device, teacher
        )
    found, by_teacher = (
        Detections.concatenate(gather_object([part])) for part in (found, by_teacher)
    )
    if not accelerator.is_main_process:
        return {}, found, {}
    result = evaluate(split, found)
    matches = result.by_measure
    record = {**result.summary, "per_class": result.per_class, "area_limits": split.area_limits}
    record["seconds_per_image"] = seconds
    if teacher:
        of_teacher = evaluate(split, by_teacher)
        matches["teacher"] = of_teacher.matches
        record |= {f"teacher_{m}": of_teacher.summary[m] for m in ("AP", "AP50", "AP75")}
    return record, found, matches


def evaluate_run(
    run: Path, data: Any
) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Matches]]:
    """A finished run's student on the validation part of a COCO-format data set.

    The data's categories are matched to the run's classes by name, or by id where several have the
    same name. The limits of small, medium and large are those of the data.

    Args:
        run: the folder of the run.
        data: in any form that `sssd.profiles.find_data` takes; a training part is not needed.

    Returns:
        The evaluation's record, as in ``evaluations.jsonl``; the detections as COCO results with
        the data's ids, without those of classes that the data do not have; and the matches of each
        measure.

    Raises:
        ValueError: the run is not finished or trains no detector, or the data do not fit it.
    """
    student, classes, config = load_student(run)
    parts, names = find_parts(find_data(data), ("val",)), dict(enumerate(classes, start=1))
    split = CocoSplit(parts["val_images"], parts["val_annotations"], False, names)
    check_narrowest(split.narrowest, config["max_size"])
    accelerator = Accelerator(
        mixed_precision=config["precision"], cpu=not torch.cuda.is_available()
    )
    module = Distiller(student, "baseline").to(accelerator.device)
    record, found, matches = validate(module, split, accelerator)
    return record, coco_results(split, found), matches
