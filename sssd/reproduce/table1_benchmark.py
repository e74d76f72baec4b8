"""Tables 1 and 2: what all methods gain on all detectors and two backbones."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import product
from typing import Any

import pandas as pd
from pydantic import Field

from ..config import DETECTORS, METHODS, RunConfig
from ..intervals import Interval, difference
from ..profiles import PROFILES, parse_overrides
from ..runs import Run
from . import plots
from .experiment import (
    CALIBRATED,
    MEASURES,
    Experiment,
    Findings,
    areas,
    final,
    gain,
    mean_of,
    points,
    teacher_lead,
)
from .paper import LABELENC_RELEASE, LGD_RELEASE, NAMES
from .tables import Table
from .verdicts import Verdict, main_comparison
from .words import bracketed, compared, percent, signed, verdict

Cell = tuple[str, str, str]
"""Detector, backbone, method."""
Groups = Mapping[Cell, list[Run]]
"""Runs by cell, one for each seed."""
PAPERS = ("resnet50", "resnet101")
"""The paper's two backbones, in the order of ours."""


class Table1(Experiment):
    """{baseline, LabelEnc, LGD, SSSD} × detectors × two backbones (SSSD, Tables 1 and 2)."""

    notebook = "table1_benchmark"
    title = "The benchmark: methods, detectors and backbones"
    question = (
        "Do the methods gain, whichever detector they teach? Each "
        "trains each detector with two backbones, from the same warm start and with the same "
        "schedule; LabelEnc has a schedule of its own, in two stages."
    )

    at = {  # noqa: RUF012
        "mini": {"deeper": ("faster_rcnn",)},
        "night": {"seeds": (0, 1)},
        "photographs": {
            **{"deeper": (), "methods": ("baseline", "lgd", "sssd")},
            **{"lgd_lambda": 1.5, "sssd_lambda": 75.0},  # those of Fig. 3, whose runs it shares
        },
    }
    methods: tuple[str, ...] = ("baseline", "labelenc", "lgd", "sssd")
    detectors: tuple[str, ...] = Field(DETECTORS, min_length=1)
    backbones: tuple[str, ...] = ()
    deeper: tuple[str, ...] = DETECTORS
    """The detectors that are trained with more than the first of the backbones."""
    lgd_lambda: float = Field(CALIBRATED["lgd"], gt=0)
    sssd_lambda: float = Field(CALIBRATED["sssd"], gt=0)
    kl_lambda: float | None = Field(None, gt=0)

    @property
    def _lambdas(self) -> dict[str, float | None]:
        return {"lgd": self.lgd_lambda, "sssd": self.sssd_lambda, "kl": self.kl_lambda}

    @cached_property
    def configs(self) -> dict[Cell, list[RunConfig]]:
        if "baseline" not in self.methods:
            raise ValueError("methods: no baseline; expected it, as gains are over the baseline")
        if len(self.methods) < 2:
            raise ValueError("methods: baseline alone; expected another to compare with it")
        for method in self.methods:
            if method not in METHODS:
                known = ", ".join(METHODS)
                raise ValueError(f"methods: {method!r} is not valid; expected {known}")
        profile, given = PROFILES.get(self.profile, {}), parse_overrides(self.overrides)
        first = profile["backbone"]
        pair = (first, {"resnet18": "resnet34", "slim18": "slim34"}.get(first, PAPERS[1]))
        whole = self.configure(method="baseline")[0].iterations
        groups: dict[Cell, list[RunConfig]] = {}
        for cell in product(self.detectors, self.backbones or pair, self.methods):
            detector, backbone, method = cell
            if backbone != (self.backbones or pair)[0] and detector not in self.deeper:
                continue
            fields: dict[str, Any] = {"detector": detector, "backbone": backbone, "method": method}
            fields["lambda1"] = self._lambdas.get(method)
            if method == "labelenc":  # both of its stages follow a schedule of half the length
                fields["iterations"] = max(whole // 2, 1)
            # The λ sweep has the curves of the profile's own detector and backbone, and shares
            # their runs; of the others T1 and the end are enough.
            swept = (detector, backbone) == (profile["detector"], profile["backbone"])
            if "eval_every" not in given and (method == "labelenc" or not swept):
                fields["eval_every"] = max(fields.get("iterations", whole) // 3, 1)
            groups[cell] = self.configure(**fields)
        return groups

    def table(self, runs: Groups) -> Table:
        """Final measures and the gain over the plain detector, cell by cell."""
        backbones = list(dict.fromkeys(backbone for _, backbone, _ in runs))
        stands_for = dict(zip(backbones, PAPERS, strict=False)) | {x: x for x in PAPERS}
        rows = []
        for (detector, backbone, method), group in runs.items():
            over = None
            if method != "baseline":
                over = gain(group, runs[detector, backbone, "baseline"])
            rows.append(
                {
                    "detector": NAMES[detector],
                    "backbone": NAMES[backbone],
                    "method": NAMES[method],
                    "AP [95 %]": bracketed(final(group)),
                    **points(group, *MEASURES[1:]),
                    "gain [95 %]": signed(over) if over else "",
                    "it is": verdict(over) if over and over.distinct else "",
                    "teacher's AP": percent(mean_of(group, "teacher_AP")) if over else "",
                    "published AP": _published(detector, stands_for.get(backbone, ""), method),
                }
            )
        lambdas = {m: lam for m, lam in self._lambdas.items() if m in self.methods}
        settings = "".join(f"{NAMES[m]} at λ = {lam:g}. " for m, lam in lambdas.items())
        if "labelenc" in self.methods:
            settings += (
                "LabelEnc's stage 2 takes FPN and head from its stage 1 and not from the start "
                "weights, and has half a run to fit them to the backbone. "
            )
        stand = "" if backbones[0] in PAPERS else ", whose places our two backbones take"
        caption = (
            "AP measures on the validation images in points of 100, mean over "
            f"{self.over_seeds}, with 95 % intervals over {self.covers}. The gain is over the "
            "baseline with the same detector and backbone, paired by image and seed; the column "
            "after it is empty where the interval contains 0. "
            f"{settings}AP_S, AP_M, AP_L: {areas(next(iter(runs.values()))[0])}. The teacher's AP "
            "is that of its pyramid through the same head, given the labels of the validation "
            "images. The SSSD paper's own values of this table are not known to us. Published are "
            "AP on COCO that the releases of LGD (2× schedule) and LabelEnc (1×; also its baseline) "
            f"state for R-50 and R-101{stand}."
        )
        return Table("table1_benchmark", pd.DataFrame(rows), caption)

    def figure(self, runs: Groups) -> plots.Plot:
        """Gains over the plain detector with their intervals."""
        methods, cells = [m for m in self.methods if m != "baseline"], _cells(runs)
        gains = {(*c, m): gain(runs[*c, m], runs[*c, "baseline"]) for c in cells for m in methods}
        size = (plots.COLUMN * 1.6, 0.8 + 0.38 * len(cells))
        figure, ((axes,),) = plots.panels(1, 1, size)
        axes.axvline(0, color="#888888", linewidth=0.9)
        # A method far behind would press all others together: it is an arrow at the edge.
        wide = [over.high - over.low for over in gains.values() if over.known]
        reach = 5 * statistics.median(wide) if wide else math.inf
        near = [over for over in gains.values() if abs(over.estimate) <= reach]
        left = 100 * min([0, *(over.reach[0] for over in near)]) - 1
        right = 100 * max([0, *(over.reach[-1] for over in near)]) + 1
        axes.set_xlim(left, right)
        for i, method in enumerate(methods):
            look = {**plots.LOOKS[method], "linestyle": "none", "markersize": 4}
            axes.plot([], [], label=NAMES[method], **look)
            for n, cell in enumerate(cells):
                over, y = gains[*cell, method], n + (i - (len(methods) - 1) / 2) * 0.22
                if abs(over.estimate) <= reach:
                    x, ends = (
                        over.estimate,
                        ([over.estimate - over.low], [over.high - over.estimate]),
                    )
                    bars = [[100 * end for end in side] for side in ends]
                    axes.errorbar(100 * x, y, xerr=bars, elinewidth=1, capsize=2, **look)
                else:
                    edge, sign, inwards = (left, "<", 6) if over.estimate < 0 else (right, ">", -6)
                    axes.plot(edge, y, **{**look, "marker": sign}, clip_on=False)
                    beside = {"textcoords": "offset points", "va": "center", "fontsize": 6}
                    beside |= {"ha": "left" if inwards > 0 else "right", "color": look["color"]}
                    axes.annotate(signed(over), (edge, y), (inwards, 0), **beside)
        axes.set_yticks(range(len(cells)), [f"{NAMES[d]}, {NAMES[b]}" for d, b in cells])
        axes.set_ylim(len(cells) - 0.5, -0.5)  # the first row on top
        axes.set_xlabel("gain in AP over the plain detector (points of 100)")
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        caption = (
            "Gain in AP over the plain detector for every method, detector and backbone, with 95 % "
            f"intervals over {self.covers}. An interval that contains 0 is no finding. An arrow at "
            "the edge, with its numbers: the gain lies beyond."
        )
        images = next(iter(gains.values())).images
        return self.plot("table1_gains", figure, caption, self.note(images))

    def findings(self, runs: Groups) -> Findings:
        """For each method, over the cells: what it gains, and whether its teacher is ahead of it."""
        cells, said, taught = _cells(runs), [], []
        for method in (m for m in self.methods if m != "baseline"):
            gains = [gain(runs[*cell, method], runs[*cell, "baseline"]) for cell in cells]
            leads = [teacher_lead(runs[*cell, method]) for cell in cells]
            over = self._mean_difference(runs, method, "baseline")
            lead = self._mean_difference(runs, method, method, "teacher")
            name = NAMES[method]
            said.append(f"{name} against the baseline, AP: {_over_cells(gains, over)}.")
            taught.append(
                f"{name}'s teacher, given the labels, against its student, AP: "
                f"{_over_cells(leads, lead)}."
            )
        if {"lgd", "sssd"} <= set(self.methods):
            gains = [gain(runs[*cell, "sssd"], runs[*cell, "lgd"]) for cell in cells]
            over = self._mean_difference(runs, "sssd", "lgd")
            said.append(f"SSSD against LGD, AP: {_over_cells(gains, over)}.")
        said += taught
        said.append(
            "Every trained detector has the weights of the plain one, by name and shape: inference "
            "is the same computation."
            if all(_same_weights(runs).values())
            else "Some trained detectors have other weights than the plain one."
        )
        return Findings(tuple(said))

    def verdicts(self, runs: Groups) -> tuple[Verdict, ...]:
        """SSSD against LGD and the plain detector in the first cell."""
        cell = _cells(runs)[0]
        return main_comparison(
            {m: runs[*cell, m] for m in ("baseline", "lgd", "sssd") if m in self.methods}
        )

    def _mean_difference(self, runs: Groups, one: str, other: str, measure: str = "AP") -> Interval:
        """``measure`` of a method − AP of another, mean over detectors and backbones."""
        ours, theirs = (
            [
                [runs[*cell, m][i].matches(measure=of) for cell in _cells(runs)]
                for i in range(len(self.seeds))
            ]
            for m, of in ((one, measure), (other, "AP"))
        )
        return difference(ours, theirs)


def _cells(runs: Groups) -> list[tuple[str, str]]:
    """Detectors and backbones, in the order of the table."""
    return list(dict.fromkeys((detector, backbone) for detector, backbone, _ in runs))


def _over_cells(differences: Sequence[Interval], mean: Interval) -> str:
    """What came out in the single cells, and in their mean."""
    if len(differences) == 1:
        return compared(mean)
    verdicts = [verdict(over) for over in differences]
    return (
        f"higher in {verdicts.count('higher')}, lower in {verdicts.count('lower')} of "
        f"{len(differences)} cells; mean over the cells {compared(mean)}"
    )


def _same_weights(runs: Groups) -> dict[Cell, bool]:
    """Whether the trained detector has the plain one's weights, by name and shape."""
    shapes = {}
    for cell, (run, *_) in runs.items():
        shapes[cell] = run.record()["done"]["shapes"]
    return {cell: own == shapes[*cell[:2], "baseline"] for cell, own in shapes.items()}


def _published(detector: str, backbone: str, method: str) -> str:
    """What the releases of the methods state; nothing of SSSD is known in this table."""
    if method == "lgd" and (detector, backbone) in LGD_RELEASE:
        return f"{LGD_RELEASE[detector, backbone]:.1f} (2×)"
    if (detector, backbone) in LABELENC_RELEASE:
        plain, taught = LABELENC_RELEASE[detector, backbone]
        return {"baseline": f"{plain:.1f} (1×)", "labelenc": f"{taught:.1f} (1×)"}.get(method, "")
    return ""
