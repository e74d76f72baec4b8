"""What a training step and inference cost with each method, and what each part of a step costs.

Times are CPU times on one thread, so that time spent on other programs does not count. The methods
take turns, step by step, so that other programs, which for example empty the caches, disturb all
methods equally.
"""

from __future__ import annotations

import platform
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from . import __version__
from .config import DETECTORS, RunConfig
from .data.coco import Batches
from .profiles import (
    BUILT_IN,
    PROFILES,
    check_profile,
    configure,
    open_data,
    open_split,
    parse_overrides,
)
from .records import write
from .reproduce.tables import Table
from .runs import home
from .starts import build_model

MEASURED = ("baseline", "labelenc_stage1", "lgd", "sssd")
Batch = tuple[list[Tensor], list[dict[str, Tensor]]]


class Clock:
    """The CPU time of each part of a step, forward and backward; nested parts count separately.

    The backward pass goes through the parts in reverse order. The backward time of a part begins
    when the gradient of the part's output arrives, and ends when that of another part begins.
    """

    def __init__(self) -> None:
        self.spent: dict[tuple[str, str], float] = defaultdict(float)
        self.part, self.since = ("rest", "forward"), time.process_time()

    def go_on(self, part: tuple[str, str]) -> tuple[str, str]:
        """Count time for ``part`` from now on; return the part that it was counted for before."""
        before, now = self.part, time.process_time()
        self.spent[before] += now - self.since
        self.part, self.since = part, now
        return before

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, timed as a part of the step."""

        def arrived(_: Tensor) -> None:
            self.go_on((name, "backward"))

        def call(*given: Any, **named: Any) -> Any:
            before = self.go_on((name, "forward"))
            out = function(*given, **named)
            for x in tree_leaves(out):
                # The output of a nested part counts for the nested part.
                if isinstance(x, Tensor) and x.requires_grad and not x._backward_hooks:
                    x.register_hook(arrived)
            self.go_on(before)
            return out

        return call


class TimedModel:
    """A model whose training steps are timed; if it has LGD's teacher, each part is timed."""

    def __init__(self, config: RunConfig, classes: int) -> None:
        model: Any = build_model(config, classes, Path()).train()
        learning = [p for p in model.parameters() if p.requires_grad]
        # With a learning rate of 0 all methods keep the same weights, and so detect the same.
        self.optimizer = torch.optim.AdamW(learning, 0.0, fused=True)
        self.model, self.clock, family = model, Clock(), model.family
        model.family = replace(family, head=self.clock.timed("second head pass", family.head))
        parts = [(model.student, "forward", "head"), (model.student.backbone, "forward", "pyramid")]
        if config.method in ("lgd", "sssd"):
            parts += [
                (model.teacher, "forward", "objects and their masks"),
                (model.teacher.label_encoder, "forward", "label encoder"),
                (model.teacher, "appearance_encoder", "appearance encoder"),
                (model.teacher, "inter_object_relation", "inter-object relation"),
                (model.teacher, "intra_object_mapping", "intra-object mapping"),
                (model.teacher, "refinement", "refinement"),
                (model.adapter, "forward", "adapter"),
                (model.teacher, "norm", "normalisation"),
                (model, "distance", "distance"),
            ]
        for owner, function, name in parts:
            setattr(owner, function, self.clock.timed(name, getattr(owner, function)))

    def step(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> pd.Series:
        """Seconds of a training step, by part and direction."""
        self.clock.go_on(("rest", "forward"))
        self.clock.spent.clear()
        losses: dict[str, Tensor] = self.model(images, targets)
        total = torch.stack(list(losses.values())).sum()
        self.clock.go_on(("rest", "backward"))
        total.backward()
        self.clock.go_on(("optimizer", "forward"))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.clock.go_on(("rest", "forward"))
        return pd.Series(self.clock.spent)

    @torch.no_grad()
    def detect(self, images: list[Tensor]) -> float:
        """Seconds per image in inference."""
        began = time.process_time()
        self.model.eval()(images)
        self.model.train()
        return (time.process_time() - began) / len(images)


def bench(
    profile: str = "mini",
    data: str = "",
    overrides: str = "",
    rounds: int = 15,
    scaling: bool = False,
) -> dict[str, pd.DataFrame]:
    """The tables by name: ``steps`` of all methods, ``parts`` of SSSD's step, if asked ``scaling``.

    Args:
        data: a data set; default: the profile's built-in images, or else those of ``mini``.
        overrides: fields of the configuration as `configure` takes them; with ``detector`` only
            that detector is measured, otherwise all three.
        rounds: steps of each method that are measured, after one that is not; the median counts.
        scaling: also measure a step with more objects, classes, pixels and images.
    """
    torch.set_num_threads(1)
    check_profile(profile)
    source = open_data(profile if data or profile in BUILT_IN else "mini", data or None)
    asked = parse_overrides(overrides)
    if "method" in asked or rounds < 1:
        raise ValueError("bench: expected no method, as all are measured, and at least one round")
    detectors = [asked.pop("detector")] if "detector" in asked else list(DETECTORS)
    common: dict[str, Any] = {"start": "random", "distill_start": 0, "unfreeze_backbone": 0}
    common |= {"trainable_stages": PROFILES[profile].get("trainable_stages", 3), **asked}
    configs = {
        detector: {
            method: configure(
                profile, data=source, overrides=common, method=method, detector=detector
            )
            for method in MEASURED
        }
        for detector in detectors
    }
    with tqdm(total=len(detectors) * (rounds + 1) * len(MEASURED), leave=False) as bar:
        found = {detector: _medians(configs[detector], rounds, bar) for detector in detectors}
    tables = {
        name: pd.concat({x: of(medians) for x, medians in found.items()}, names=["detector", ""])
        .reset_index("detector")
        .round(3)
        for name, of in (("steps", _steps), ("parts", _parts))
    }
    if scaling:
        plain, sssd = (configs[detectors[0]][method] for method in ("baseline", "sssd"))
        tables["scaling"] = pd.DataFrame(_scaling(plain, sssd, min(rounds, 3))).round(3)
    return tables


def _medians(configs: dict[str, RunConfig], rounds: int, bar: Any) -> pd.DataFrame:
    """Median seconds of each method: a step by part, ``all`` of a step, inference per ``image``."""
    config = configs["sssd"]  # the data and the detector are the same in all
    split, grouping = open_split(config.data, "train"), config.aspect_grouping
    batches = Batches(
        split, config.batch_size, 0, rounds + 1, flip=config.flip, aspect_grouping=grouping
    )
    models = {x: TimedModel(configs[x], len(config.data.classes)) for x in configs}
    taken: dict[str, list[pd.Series]] = {method: [] for method in models}
    for t in range(1, rounds + 2):
        images, targets = batches[t]
        for method, model in models.items():
            bar.set_description(f"{config.detector}, step {t} of {rounds + 1}: {method}")
            seconds = model.step(images, targets)
            seconds["all", ""], seconds["image", ""] = seconds.sum(), model.detect(images)
            taken[method] += [seconds] * (t > 1)  # the first step allocates
            bar.update()
    return pd.DataFrame({method: pd.DataFrame(x).median() for method, x in taken.items()})


def _steps(medians: pd.DataFrame) -> pd.DataFrame:
    """A row for each method: seconds of a step and of inference, also relative to the baseline."""
    step, image = (medians.loc[(x, "")] for x in ("all", "image"))
    times = {"s / step": step, "step ÷ baseline": step / step["baseline"], "s / image": image}
    table = pd.DataFrame({**times, "image ÷ baseline": image / image["baseline"]})
    return table.rename_axis("method").reset_index()


def _parts(medians: pd.DataFrame) -> pd.DataFrame:
    """A row for each part of SSSD's step, also relative to LGD's (the distance: JS ÷ MSE)."""
    times = 1000 * medians.drop(["all", "image"]).unstack(fill_value=0)
    ours, sums = times["sssd"], times["sssd"].sum(axis=1)
    table = ours.add_prefix("ms ")[["ms forward", "ms backward"]]
    table["% of the step"] = 100 * sums / sums.sum()
    table["÷ LGD's"] = sums / times["lgd"].sum(axis=1)
    return table.sort_values("% of the step", ascending=False).rename_axis("part").reset_index()


def _scaling(plain: RunConfig, sssd: RunConfig, rounds: int) -> Iterator[dict[str, Any]]:
    """Rows that say what a step costs with more objects, classes, pixels and images."""
    usual = {"objects": 7, "classes": 80, "side": sssd.min_sizes[-1], "images": sssd.batch_size}
    tries = {"objects": (1, 7, 30, 100, 300), "classes": (1, 80, 1000)}
    tries |= {"side": (usual["side"], 2 * usual["side"]), "images": (1, 2, 4, 8)}
    rows = [{**usual, what: n} for what, values in tries.items() for n in values]
    for row in tqdm(rows, leave=False, desc="scaling"):
        images, side = row["images"], row["side"]
        sizes = {"min_sizes": side, "max_size": side, "batch_size": images}
        models = [
            TimedModel(config.change(**sizes, aspect_grouping=False), row["classes"])
            for config in (plain, sssd)
        ]
        batch = _drawn(**row)
        taken = [[model.step(*batch).sum() for model in models] for _ in range(rounds + 1)]
        a, b = pd.DataFrame(taken[1:]).median()
        weights = sum(p.numel() for p in models[1].model.teacher.parameters()) / 1e6
        times = {"baseline, s": a, "sssd, s": b, "÷ baseline": b / a}
        yield {**row, "teacher's weights, 10⁶": weights, **times}


def _drawn(objects: int, classes: int, side: int, images: int) -> Batch:
    """Noise images with random boxes."""
    corner, size = torch.rand(images, objects, 2), torch.rand(images, objects, 2)
    boxes = torch.cat([corner * 0.7, corner * 0.7 + 0.05 + size * 0.25], dim=-1) * side
    labels = torch.randint(1, classes + 1, (images, objects))
    targets = [{"boxes": b, "labels": x} for b, x in zip(boxes, labels, strict=True)]
    return list(torch.rand(images, 3, side, side)), targets


def keep(tables: dict[str, pd.DataFrame], profile: str, about: str) -> Path:
    """Write the tables into ``reports/bench``, as CSV and in one Markdown file; return its path."""
    folder = home() / "reports" / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    torch_, machine = torch.__version__, platform.machine()
    text = f"# Times at `{profile}`\n\n{about}; sssd {__version__}, torch {torch_}, one {machine} thread.\n"
    for name, table in tables.items():
        write(folder / f"{profile}_{name}.csv", table.to_csv(index=False).encode())
        text += f"\n## {name.capitalize()}\n\n{Table(name, table.astype(str), '').markdown()}\n"
    write(folder / f"{profile}.md", text.encode())
    return folder / f"{profile}.md"
