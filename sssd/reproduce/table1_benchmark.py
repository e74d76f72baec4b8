"""Tables 1 and 2: all methods on all detectors and two backbones, what they gain and what they cost."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import product
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import torch
from IPython.display import Markdown
from matplotlib.figure import Figure
from pydantic import Field

from ..config import DETECTORS, METHODS, RunConfig
from ..evaluation import METRICS
from ..intervals import Interval, difference, interval
from ..profiles import PROFILES, parse_overrides
from ..runs import Run
from . import paper, plots, tables
from .experiment import CALIBRATED, Experiment, areas, gain, mean_of, teacher_lead

MEASURES = METRICS[:6]
Cell = tuple[str, str, str]
"""Detector, backbone, method."""
STANDS_FOR = ("resnet50", "resnet101")
"""The paper's two backbones, in the order of ours."""


class Table1(Experiment):
    """{baseline, LabelEnc, LGD, SSSD} × detectors × two backbones (SSSD, Tables 1 and 2)."""

    notebook = "table1_benchmark"
    title = "The benchmark: methods, detectors and backbones"
    question = (
        "Do the methods gain, whichever detector they teach, and what do they cost? Each "
        "trains each detector with two backbones, from the same warm start and with the same "
        "schedule; LabelEnc has its own, of two stages."
    )

    methods: tuple[str, ...] = ("baseline", "labelenc", "lgd", "sssd")
    detectors: tuple[str, ...] = Field(DETECTORS, min_length=1)
    backbones: tuple[str, ...] = ()
    lgd_lambda: float = Field(CALIBRATED["lgd"], gt=0)
    sssd_lambda: float = Field(CALIBRATED["sssd"], gt=0)
    kl_lambda: float | None = Field(None, gt=0)

    @property
    def _lambdas(self) -> dict[str, float | None]:
        return {"lgd": self.lgd_lambda, "sssd": self.sssd_lambda, "kl": self.kl_lambda}

    @cached_property
    def configs(self) -> dict[Cell, list[RunConfig]]:
        if "baseline" not in self.methods:
            raise ValueError("methods: no baseline; expected it, as gains are told against it")
        if len(self.methods) < 2:
            raise ValueError("methods: baseline alone; expected others, to be set against it")
        profile = PROFILES.get(self.profile, {})
        backbones = self.backbones or (
            STANDS_FOR if self.profile == "paper" else ("resnet18", "resnet34")
        )
        given = parse_overrides(self.overrides)
        whole = self.configure(method="baseline")[0].iterations
        groups: dict[Cell, list[RunConfig]] = {}
        for detector, backbone in product(self.detectors, backbones):
            model = {"detector": detector, "backbone": backbone}
            for method in self.methods:
                if method not in METHODS:
                    known = ", ".join(METHODS)
                    raise ValueError(f"methods: {method!r} is not valid; expected {known}")
                fields: dict[str, Any] = {"method": method, "lambda1": self._lambdas.get(method)}
                if method == "labelenc":  # both of its stages follow a schedule of half the length
                    fields["iterations"] = max(whole // 2, 1)
                # The λ sweep has the curves of the profile's own detector and backbone, and shares
                # their runs; of the others the end is enough.
                swept = (detector, backbone) == (profile["detector"], profile["backbone"])
                if "eval_every" not in given and (method == "labelenc" or not swept):
                    fields["eval_every"] = fields.get("iterations", whole)
                groups[detector, backbone, method] = self.configure(**model, **fields)
        return groups

    def table(self, runs: Mapping[Cell, list[Run]]) -> tables.Table:
        """Final measures and the gain over the plain detector, cell by cell."""
        rows = []
        backbones = list(dict.fromkeys(backbone for _, backbone, _ in runs))
        for (detector, backbone, method), group in runs.items():
            at = backbones.index(backbone)
            stand = backbone if backbone in STANDS_FOR else (*STANDS_FOR, "")[min(at, 2)]
            plain = runs[detector, backbone, "baseline"]
            over = gain(group, plain) if group is not plain else None
            rows.append(
                {
                    "detector": paper.NAMES[detector],
                    "backbone": paper.NAMES[backbone],
                    "method": paper.NAMES[method],
                    "AP [95 %]": tables.bracketed(interval([run.matches() for run in group])),
                    **{m: tables.percent(mean_of(group, m)) for m in MEASURES[1:]},
                    "gain [95 %]": tables.signed(over) if over else "",
                    "so it is": tables.verdict(over) if over and over.distinct else "",
                    "teacher's AP": tables.percent(mean_of(group, "teacher_AP")) if over else "",
                    "published AP": _published(detector, stand, method),
                }
            )
        first = next(iter(runs.values()))[0]
        used = {m: lam for m, lam in self._lambdas.items() if m in self.methods}
        settings = []
        if used:
            chosen = [f"{paper.NAMES[m]} at λ = {lam:g}" for m, lam in used.items()]
            settings.append(", ".join(chosen) + ".")
        if "labelenc" in self.methods:
            settings.append(
                "LabelEnc's stage 2 takes FPN and head from its stage 1 and not from the start "
                "weights, and has half a run to fit them to the backbone."
            )
        caption = (
            "AP measures on the validation images in points of 100, mean over "
            f"{self.counted}, with 95 % intervals over {self.covers}; the gain is over the baseline "
            "of the same row group, paired by image and seed, and nothing is said of it where "
            f"there is no difference beyond {'seeds' if len(self.seeds) > 1 else 'images'}. "
            f"{' '.join(settings)} AP_S, AP_M, AP_L: {areas(first)}. The teacher's AP is that of its "
            "pyramid through the same head, given the labels of the validation images. The SSSD paper's own values "
            "of this table are not known to us; published are AP on COCO as the releases of LGD (2× "
            "schedule) and LabelEnc (1×; also its baseline) state them, for R-50 and R-101"
            + ("." if backbones[0] in STANDS_FOR else ", whose places our two backbones take.")
        )
        return self.save_table(tables.Table(pd.DataFrame(rows), caption), "table1_benchmark")

    def cost_table(self, runs: Mapping[Cell, list[Run]]) -> tables.Table:
        """What each method costs in training, and that it costs nothing at inference."""
        rows, same = [], self._same(runs)
        costs = {
            cell: pd.DataFrame([self._cost(run) for run in group]).min()
            for cell, group in runs.items()
        }
        for cell, (step, total, memory, image) in costs.items():
            detector, backbone, method = cell
            step0, total0, _, image0 = costs[detector, backbone, "baseline"]
            rows.append(
                {
                    "detector": paper.NAMES[detector],
                    "backbone": paper.NAMES[backbone],
                    "method": paper.NAMES[method],
                    "s / step": f"{step:.3f}",
                    "÷ baseline, step": f"{step / step0:.2f}",
                    "training (s)": f"{total:.0f}",
                    "÷ baseline, training": f"{total / total0:.2f}",
                    "peak memory (MiB)": f"{memory:.0f}",
                    "inference (ms / image)": f"{1000 * image:.1f}",
                    "÷ baseline, inference": f"{image / image0:.2f}",
                    "detector's weights": "as baseline" if same[cell] else "others",
                }
            )
        caption = (
            "Cost of training (median seconds of a step; all steps of a run, LabelEnc's with both "
            "stages; most memory the process held) and of inference (median over batches of the last "
            f"evaluation), as recorded during training; of {self.counted}, the least. Runs that "
            "shared the machine with others have noisy times; the command “python -m sssd bench” "
            "measures side by side. “As baseline”: the "
            "trained detector has the same weights, by name and shape, as the plain one, so that "
            "inference is the same computation."
        )
        return self.save_table(tables.Table(pd.DataFrame(rows), caption), "table1_cost")

    def figure(self, runs: Mapping[Cell, list[Run]]) -> Figure:
        """Gains over the plain detector with their intervals."""
        plots.style()
        methods = [m for m in self.methods if m != "baseline"]
        rows = list(dict.fromkeys((detector, backbone) for detector, backbone, _ in runs))
        figure, axes = plt.subplots(
            figsize=(plots.COLUMN * 1.6, 0.8 + 0.38 * len(rows)), layout="constrained"
        )
        axes.axvline(0, color="#888888", linewidth=0.9)
        gains = {
            (*row, m): gain(runs[*row, m], runs[*row, "baseline"]) for row in rows for m in methods
        }
        # A method far behind would press all others together: it is an arrow at the edge.
        reach = 5 * statistics.median(over.high - over.low for over in gains.values())
        near = [over for over in gains.values() if abs(over.estimate) <= reach]
        left = 100 * min([0, *(over.low for over in near)]) - 1
        right = 100 * max([0, *(over.high for over in near)]) + 1
        axes.set_xlim(left, right)
        for i, method in enumerate(methods):
            look: dict[str, Any] = {"linestyle": "none", "markersize": 4}
            look["color"] = plots.COLOURS[method]
            axes.plot([], [], marker=plots.MARKS[method], label=paper.NAMES[method], **look)
            for n, row in enumerate(rows):
                over, at = gains[*row, method], n + (i - (len(methods) - 1) / 2) * 0.22
                if abs(over.estimate) <= reach:
                    axes.errorbar(
                        100 * over.estimate,
                        at,
                        xerr=[
                            [100 * (over.estimate - over.low)],
                            [100 * (over.high - over.estimate)],
                        ],
                        marker=plots.MARKS[method],
                        elinewidth=1,
                        capsize=2,
                        **look,
                    )
                else:
                    low = over.estimate < 0
                    axes.plot(
                        left if low else right, at, "<" if low else ">", clip_on=False, **look
                    )
                    axes.annotate(
                        tables.signed(over),
                        (left if low else right, at),
                        (6 if low else -6, 0),
                        textcoords="offset points",
                        ha="left" if low else "right",
                        va="center",
                        fontsize=6,
                        color=plots.COLOURS[method],
                    )
        images = next(iter(gains.values())).images
        names = [f"{paper.NAMES[detector]}, {paper.NAMES[backbone]}" for detector, backbone in rows]
        axes.set_yticks(range(len(rows)), names)
        axes.set_ylim(len(rows) - 0.5, -0.5)  # the first row on top
        axes.set_xlabel("gain in AP over the plain detector (points of 100)")
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        caption = (
            "Gain in AP over the plain detector for every method, detector and backbone, with 95 % "
            f"intervals over {self.covers}. An interval that contains 0 is no finding. An arrow at "
            "the edge, with its numbers: the gain lies beyond."
        )
        return self.save_figure(figure, "table1_gains", caption, self.note(images))

    def findings(self, runs: Mapping[Cell, list[Run]]) -> Markdown:
        """For each method, over the cells: what it gains, and whether its teacher is worth imitating."""
        cells = list(dict.fromkeys((detector, backbone) for detector, backbone, _ in runs))

        def over_cells(own: Sequence[Interval], mean: Interval) -> str:
            found = f"{tables.signed(mean)} points, {tables.verdict(mean)}."
            if len(cells) == 1:
                return found
            verdicts = [tables.verdict(over) for over in own]
            return (
                f"higher in {verdicts.count('higher')}, lower in {verdicts.count('lower')} of "
                f"{len(cells)} cells; mean over the cells {found}"
            )

        said, taught = [], []
        for method in (m for m in self.methods if m != "baseline"):
            gains = [gain(runs[*cell, method], runs[*cell, "baseline"]) for cell in cells]
            mean = self._mean_difference(runs, method, "baseline")
            name = paper.NAMES[method]
            said.append(f"{name} against the baseline, AP: {over_cells(gains, mean)}")
            leads = [teacher_lead(runs[*cell, method]) for cell in cells]
            mean = self._mean_difference(runs, method, method, "teacher")
            taught.append(
                f"{name}'s teacher, given the labels, against its student, AP: "
                f"{over_cells(leads, mean)}"
            )
        if {"lgd", "sssd"} <= set(self.methods):
            mean = self._mean_difference(runs, "sssd", "lgd")
            said.append(
                "SSSD against LGD, AP"
                + (f", mean over the {len(cells)} cells" if len(cells) > 1 else "")
                + f": {tables.signed(mean)} points, {tables.verdict(mean)}."
            )
        said += taught
        said.append(
            "Every trained detector has the weights of the plain one, by name and shape: inference "
            "costs nothing more."
            if all(self._same(runs).values())
            else "Some trained detectors have other weights than the plain one."
        )
        return self.conclude(runs, said)

    def _mean_difference(
        self, runs: Mapping[Cell, list[Run]], one: str, other: str, measure: str = "AP"
    ) -> Interval:
        """``measure`` of a method − AP of another, mean over detectors and backbones."""
        cells = list(dict.fromkeys((detector, backbone) for detector, backbone, _ in runs))
        ours, theirs = (
            [
                [runs[*cell, m][i].matches(measure=of) for cell in cells]
                for i in range(len(self.seeds))
            ]
            for m, of in ((one, measure), (other, "AP"))
        )
        return difference(ours, theirs)

    @staticmethod
    def _same(runs: Mapping[Cell, list[Run]]) -> dict[Cell, bool]:
        """Whether the trained detector has the plain one's weights, by name and shape."""
        shapes = {cell: _shapes(group[0]) for cell, group in runs.items()}
        return {cell: own == shapes[*cell[:2], "baseline"] for cell, own in shapes.items()}

    def _cost(self, run: Run) -> tuple[float, float, float, float]:
        """Seconds a step and in all, peak MiB, seconds an image; LabelEnc with its stage 1."""
        start = run.config.start
        stages = [run]
        if run.config.method == "labelenc":
            assert isinstance(start, RunConfig)
            stages.append(Run(start, self.store.folder(start)))
        seconds = pd.concat([stage.metrics()["seconds"] for stage in stages])
        done = [stage.record()["done"] for stage in stages]
        image = float(run.evaluations()["seconds_per_image"].iloc[-1])
        memory = max(record["peak_memory_mib"] for record in done)
        return float(seconds.median()), float(seconds.sum()), memory, image


def _published(detector: str, backbone: str, method: str) -> str:
    """What the releases of the methods state; nothing of SSSD is known in this table."""
    if method == "lgd" and (detector, backbone) in paper.LGD_RELEASE:
        return f"{paper.LGD_RELEASE[detector, backbone]:.1f} (2×)"
    if (detector, backbone) in paper.LABELENC_RELEASE:
        plain, taught = paper.LABELENC_RELEASE[detector, backbone]
        return {"baseline": f"{plain:.1f} (1×)", "labelenc": f"{taught:.1f} (1×)"}.get(method, "")
    return ""


def _shapes(run: Run) -> dict[str, tuple[int, ...]]:
    """The trained detector's weights by name and shape."""
    state = torch.load(run.folder / "weights.pt", map_location="cpu", weights_only=True, mmap=True)
    return {name: tuple(value.shape) for name, value in state.items()}
