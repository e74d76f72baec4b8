"""Train one run from its configuration, and resume it exactly.

Everything random in iteration t is a function of (seed, t): which images, their augmentation, and
the state of torch's generator that the detectors draw samples from. So a checkpoint needs no
generator and no iterator: a run continued equals a run uninterrupted, bit for bit on the CPU.
"""

from __future__ import annotations

import json
import math
import os
import platform
import resource
import statistics
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from . import __version__
from .config import DataSource, RunConfig
from .data.coco import Batches, CocoSplit, Crops, mixed_seed
from .distiller import DISTANCE_OF, TAUGHT, Distiller
from .evaluation import Detections, Matches, evaluate
from .records import append, mend, read_records, save_atomically, write_json
from .schedules import learning_rate, step_lambda
from .starts import body_state, build_model


def open_split(data: DataSource, split: str) -> CocoSplit:
    """The training or validation half of a data source."""
    return CocoSplit(
        Path(data.paths[f"{split}_images"]),
        Path(data.paths[f"{split}_annotations"]),
        training=split == "train",
    )


def software() -> dict[str, Any]:
    """Versions and machine kind, for the run's record."""
    names = ("torch", "torchvision", "pycocotools", "accelerate", "numpy")
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        cpu = models[0].split(":", 1)[1].strip() if models else cpu
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "sssd": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in names},
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": f"{os.cpu_count()} × {cpu}",
        "gpu": gpu,
    }


def peak_memory() -> float:
    """Most memory held so far in MiB: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (2**20 if platform.system() == "Darwin" else 2**10)  # bytes there, KiB here


def parent_of(config: RunConfig) -> RunConfig | None:
    """The fixed-λ run whose first T1 iterations a stepwise run shares."""
    return config.change(lambda2=None) if config.stepwise else None


def train(
    config: RunConfig,
    folder: Path,
    *,
    until: int | None = None,
    keep: Iterable[int] = (),
    checkpoint_seconds: float = 60.0,
    workers: int | None = None,
) -> None:
    """Train a run, or continue it, to its end or to iteration ``until``.

    Writes into ``folder``: ``config.json``, ``environment.json``, ``metrics.jsonl`` (a line an
    iteration), ``evaluations.jsonl``, ``detections/`` and ``matches/`` (one an evaluation),
    ``last.pt`` while unfinished, ``fork-<t>.pt`` at each iteration of ``keep`` (and T1, where a
    stepwise run can fork), and at the end ``weights.pt`` (the student), ``teacher.pt`` (the rest of
    the distiller, where there is a teacher) and ``done.json``.

    Runs it starts from must lie beside ``folder``, finished.

    Raises:
        FloatingPointError: a loss or gradient is not finite; the last checkpoint is kept.
    """
    accelerator = Accelerator(
        mixed_precision=config.precision,
        cpu=not torch.cuda.is_available(),
        # Before unfreeze_backbone the backbone takes no part in the backward pass.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    if accelerator.device.type == "cpu":
        torch.set_num_threads(1)  # the order of sums, and so the last bits, depend on it
    if workers is None:  # a GPU would wait for its images; a CPU has no core to spare for loading
        workers = 4 if accelerator.device.type == "cuda" else 0
    main = accelerator.is_main_process
    rank, world = accelerator.process_index, accelerator.num_processes
    if config.batch_size % world:
        raise ValueError(f"batch_size: {config.batch_size} is not divisible by {world} processes")
    metrics, evaluations = folder / "metrics.jsonl", folder / "evaluations.jsonl"
    if main:
        for name in ("detections", "matches"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        write_json(config.canonical(), folder / "config.json")
        write_json(software(), folder / "environment.json")
        for file in (metrics, evaluations):
            mend(file)
    accelerator.wait_for_everyone()

    split = open_split(config.data, "train")
    module = build_model(config, len(split.class_names), folder.parent).to(accelerator.device)
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer: torch.optim.Optimizer
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(
            parameters, config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
    else:
        optimizer = torch.optim.AdamW(
            parameters, config.lr, weight_decay=config.weight_decay, fused=True
        )
    done, seconds = _restore(config, folder, module, optimizer, accelerator)
    model, optimizer = accelerator.prepare(module, optimizer)
    val = open_split(config.data, "val")
    batches: Dataset = (
        Crops(split, config.batch_size, config.seed)
        if config.method == "crops"
        else Batches(
            split, config.batch_size, config.seed, config.iterations, rank, world, config.flip
        )
    )
    last = min(config.iterations, until or config.iterations)
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=range(done + 1, last + 1),
        num_workers=workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    forks = set(keep) | ({config.milestones[0]} if config.method in DISTANCE_OF else set())

    def checkpoint(name: str, t: int) -> None:
        if main:
            for file in (metrics, evaluations):  # what is recorded never lags what is saved
                if file.exists():
                    with file.open("rb") as out:
                        os.fsync(out.fileno())
            state = {
                "iteration": t,
                "seconds": seconds,
                "model": module.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
            }
            save_atomically(state, folder / name)

    model.train()
    began = saved = time.monotonic()
    for t, (images, targets) in enumerate(loader, start=done + 1):
        images = [image.to(accelerator.device, non_blocking=True) for image in images]
        targets = [
            {k: v.to(accelerator.device) for k, v in target.items() if isinstance(v, Tensor)}
            for target in targets
        ]
        rate = learning_rate(
            t,
            config.lr,
            warmup=config.warmup,
            warmup_factor=config.warmup_factor,
            milestones=config.milestones,
            gamma=config.gamma,
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(mixed_seed(config.seed, t, rank))
        with accelerator.autocast():
            losses: dict[str, Tensor] = model(images, targets)
            total = torch.stack([loss.float() for loss in losses.values()]).sum()
        accelerator.backward(total)
        accelerator.unscale_gradients()
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        values = torch.stack([total.detach(), norm, *(x.detach().float() for x in losses.values())])
        loss, gradient, *parts = accelerator.reduce(values, "mean").tolist()
        scaled = accelerator.scaler is not None  # fp16 skips steps that overflow by itself
        if not math.isfinite(loss) or not (scaled or math.isfinite(gradient)):
            shown = ", ".join(f"{n} {v:.4g}" for n, v in zip(losses, parts, strict=True))
            raise FloatingPointError(
                f"iteration {t}: loss {loss} or gradient norm {gradient} is not finite "
                f"({shown}); what was saved before is kept"
            )
        torch.nn.utils.clip_grad_value_(parameters, config.clip)
        optimizer.step()
        optimizer.zero_grad()
        now = time.monotonic()
        seconds += now - began
        if main:
            record = {"iteration": t, "loss": loss, **dict(zip(losses, parts, strict=True))}
            if config.method in TAUGHT:
                record["lambda"] = step_lambda(t, config.lambda1, config.lambda2, config.switch)
                record["share"] = record.get("distill", 0.0) / loss
            append(
                metrics, {**record, "lr": rate, "gradient_norm": gradient, "seconds": now - began}
            )
        if config.method != "crops" and (t % config.eval_every == 0 or t == config.iterations):
            assert isinstance(module, Distiller)
            # The teacher's worth is asked for once: that evaluation costs as much as the student's.
            teacher = config.method in TAUGHT and t == config.iterations
            result = validate(module, val, accelerator, config.batch_size, workers, teacher)
            if result is not None:
                found, matches, record = result
                found.save(folder / "detections" / f"{t:06d}.npz")
                for measure, part in matches.items():
                    part.save(folder / "matches" / f"{t:06d}-{measure}.npz")
                append(evaluations, {"iteration": t, **record})
        if t in forks:
            checkpoint(f"fork-{t}.pt", t)
        if time.monotonic() - saved > checkpoint_seconds and t < last:
            checkpoint("last.pt", t)
            saved = time.monotonic()
        began = time.monotonic()
    if last < config.iterations:
        if done < last:
            checkpoint("last.pt", last)
    elif main:
        network: Any = module
        student = body_state(network.body.state_dict()) if config.method == "crops" else None
        save_atomically(student or network.student.state_dict(), folder / "weights.pt")
        if config.method in TAUGHT:
            taught = {k: v for k, v in network.state_dict().items() if not k.startswith("student.")}
            save_atomically(taught, folder / "teacher.pt")
        record = {"iterations": last, "training_seconds": seconds, "peak_memory_mib": peak_memory()}
        write_json({**record, "processes": world}, folder / "done.json")
        (folder / "last.pt").unlink(missing_ok=True)
    accelerator.wait_for_everyone()


def _restore(
    config: RunConfig, folder: Path, module: nn.Module, optimizer: Any, accelerator: Accelerator
) -> tuple[int, float]:
    """Load the run's last checkpoint, or its parent's at T1; the iterations and seconds done."""
    file = folder / "last.pt"
    parent = parent_of(config)
    if not file.exists() and parent is not None:
        fork = folder.parent / parent.id / f"fork-{config.switch}.pt"
        if fork.exists():
            file = fork
            if accelerator.is_main_process:
                _share_records(folder.parent / parent.id, folder, config.switch)
    if not file.exists():
        return 0, 0.0
    state = torch.load(file, map_location="cpu", weights_only=True)
    module.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
    return int(state["iteration"]), float(state["seconds"])


def _share_records(parent: Path, folder: Path, last: int) -> None:
    """Copy the shared part of the parent's records, so that a fork's record is whole."""
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        records = read_records(parent / name)  # the parent may still be at work
        shared = [json.dumps(x) + "\n" for x in records if x["iteration"] <= last]
        (folder / name).write_text("".join(shared))
    for name in ("detections", "matches"):
        for file in (parent / name).glob("*.npz"):
            if int(file.stem[:6]) <= last:
                (folder / name / file.name).write_bytes(file.read_bytes())


def _collate(
    samples: list[tuple[Tensor, dict[str, Any]]],
) -> tuple[list[Tensor], list[dict[str, Any]]]:
    return [image for image, _ in samples], [target for _, target in samples]


@torch.no_grad()
def detect(
    module: Distiller,
    split: CocoSplit,
    device: torch.device,
    part: range,
    batch: int,
    workers: int,
    taught: bool = False,
) -> tuple[Detections, float]:
    """Detections on the images of ``part``, in the data set's own category ids, and their time.

    They are the student's; or, ``taught``, those of its head on the teacher's pyramid. The time is
    in seconds an image, the median over the batches, reading the images left out.
    """
    subset = torch.utils.data.Subset(split, part)
    loader = DataLoader(subset, batch, collate_fn=_collate, num_workers=workers)
    found, seconds = [], []
    training = module.training
    module.eval()
    for images, targets in loader:
        began = time.monotonic()
        images = [image.to(device) for image in images]
        if taught:
            own = [{name: t[name].to(device) for name in ("boxes", "labels")} for t in targets]
            outputs = module.detect_taught(images, own)
        else:
            outputs = module(images)
        image_ids = [target["image_id"] for target in targets]
        for output in outputs:
            # Half precision gives half-precision boxes; and the idle channel of RetinaNet and FCOS
            # can win as label 0, which is no class of the data.
            named = output["labels"] > 0
            output["labels"] = output["labels"][named]
            output |= {name: output[name][named].float() for name in ("boxes", "scores")}
        found.append(Detections.from_outputs(outputs, image_ids, split.category_ids))
        seconds.append((time.monotonic() - began) / len(images))
    module.train(training)
    return Detections.concatenate(found), statistics.median(seconds)


def validate(
    module: Distiller,
    split: CocoSplit,
    accelerator: Accelerator,
    batch_size: int,
    workers: int,
    teacher: bool,
) -> tuple[Detections, dict[str, Matches], dict[str, Any]] | None:
    """Detections of the validation set, each process taking its share, and their evaluation.

    With ``teacher``, what the teacher is worth is evaluated, too: ``teacher_AP`` of the record, and
    the matches of the measure ``teacher``. Only the main process evaluates; the others get nothing.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    part = range(rank, len(split), world)
    every = (split, accelerator.device, part, max(batch_size // world, 1), workers)
    with accelerator.autocast():
        found, seconds = detect(module, *every)
        taught, _ = detect(module, *every, taught=True) if teacher else (None, 0.0)
    found = Detections.concatenate(gather_object([found]))
    if taught is not None:
        taught = Detections.concatenate(gather_object([taught]))
    if not accelerator.is_main_process:
        return None
    result = evaluate(split, found)
    matches = result.by_measure
    record = {
        **result.summary,
        "per_class": result.per_class,
        "area_limits": split.area_limits,
        "seconds_per_image": seconds,
    }
    if taught is not None:
        of_teacher = evaluate(split, taught)
        matches["teacher"] = of_teacher.matches
        record["teacher_AP"] = of_teacher.summary["AP"]
    return found, matches, record
