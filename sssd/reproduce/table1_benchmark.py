"""Tables 1 and 2: what all methods gain on all detectors and two backbones."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from itertools import product
from typing import Any

import pandas as pd
from pydantic import Field

from ..config import DETECTORS, METHODS, RunConfig
from ..intervals import difference
from ..profiles import PROFILES, check_profile, parse_overrides
from ..runs import Run
from . import plots
from .experiment import CALIBRATED, Experiment, Findings, about_measures, gain, measures
from .paper import NAMES, PUBLISHED
from .tables import Table
from .verdicts import Verdict, main_comparison
from .words import compared, counted, direction, signed

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
        "Do the methods gain, whichever detector they teach? Each method trains each detector and "
        "backbone from the same start weights and with the same schedule; LabelEnc has a schedule of "
        "its own, in two stages."
    )

    profile_defaults = {  # noqa: RUF012
        "mini": {"deeper": ("faster_rcnn",)},
        "night": {"seeds": (0, 1)},
        "photographs": {
            **{"seeds": (0, 1, 2), "deeper": (), "methods": ("baseline", "lgd", "sssd")},
            **{"lgd_lambda": 1.5, "sssd_lambda": 75.0},  # as in Fig. 3, to share its runs
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
        check_profile(self.profile)
        if "baseline" not in self.methods:
            raise ValueError("methods: no baseline; expected it, as gains are over the baseline")
        if len(self.methods) < 2:
            raise ValueError("methods: baseline alone; expected another to compare with it")
        for method in self.methods:
            if method not in METHODS:
                known = ", ".join(METHODS)
                raise ValueError(f"methods: {method!r} is not valid; expected {known}")
        profile, given = PROFILES[self.profile], parse_overrides(self.overrides)
        first = profile["backbone"]
        second = {"resnet18": "resnet34", "slim18": "slim34"}.get(first, PAPERS[1])
        backbones = self.backbones or (first, second)
        whole = self.configure(method="baseline")[0].iterations
        groups: dict[Cell, list[RunConfig]] = {}
        for detector, backbone, method in product(self.detectors, backbones, self.methods):
            if backbone != backbones[0] and detector not in self.deeper:
                continue
            # Each stage of LabelEnc has half of the others' schedule.
            iterations = max(whole // 2, 1) if method == "labelenc" else whole
            fields: dict[str, Any] = {"detector": detector, "backbone": backbone, "method": method}
            fields |= {"lambda1": self._lambdas.get(method), "iterations": iterations}
            # The λ sweep shares the runs of the profile's own detector and backbone, and draws
            # their curves; for the others T1 and the end are enough.
            swept = (detector, backbone) == (profile["detector"], profile["backbone"])
            if "eval_every" not in given and (method == "labelenc" or not swept):
                fields["eval_every"] = max(iterations // 3, 1)
            groups[detector, backbone, method] = self.configure(**fields)
        return groups

    def table(self, runs: Groups) -> Table:
        """Final measures and the gain over the baseline, cell by cell."""
        stands_for = dict(zip(dict.fromkeys(b for _, b, _ in runs), PAPERS, strict=False))
        stands_for |= {x: x for x in PAPERS}
        rows = []
        for (detector, backbone, method), group in runs.items():
            over = gain(group, runs[detector, backbone, "baseline"])
            published = PUBLISHED.get((detector, stands_for.get(backbone, "")), ())
            known = dict(zip(("baseline", "labelenc", "lgd"), published, strict=False))
            rows.append(
                {
                    "detector": NAMES[detector],
                    "backbone": NAMES[backbone],
                    "method": NAMES[method],
                    **measures(group),
                    "gain [95 %]": signed(over) if method != "baseline" else "",
                    "published AP": known.get(method, ""),
                }
            )
        lambdas = {m: lam for m, lam in self._lambdas.items() if m in self.methods}
        settings = "".join(f"{NAMES[m]} at λ = {lam:g}. " for m, lam in lambdas.items())
        if "labelenc" in self.methods:
            settings += (
                "LabelEnc's stage 2 takes FPN and head from its stage 1 and not from the start "
                "weights, and has half a run to fit them to the backbone. "
            )
        caption = (
            f"AP measures on the validation images in {self.averaged}. The gain is over the "
            f"baseline with the same detector and backbone, paired by image and seed. {settings}"
            f"{about_measures(runs)} The SSSD paper's own values of this table are not known to us. "
            "“Published” is the AP on COCO that the releases of LGD (2× schedule) and LabelEnc (1×, "
            "with its baseline) state for R-50 and R-101; other backbones stand in their places."
        )
        return Table("table1_benchmark", pd.DataFrame(rows), caption)

    def figure(self, runs: Groups) -> plots.Plot:
        """Gains over the baseline with their intervals."""
        cells = _cells(runs)
        figure, ((axes,),) = plots.panels(1, 1, (2 * plots.COLUMN, 2.6))
        axes.axhline(0, **plots.BASELINE)
        methods = [method for method in self.methods if method != "baseline"]
        for i, method in enumerate(methods):
            gains = [gain(runs[*cell, method], runs[*cell, "baseline"]) for cell in cells]
            at = [n + (i - (len(methods) - 1) / 2) * 0.2 for n in range(len(cells))]
            look = {**plots.LOOKS[method], "linestyle": "none", "label": NAMES[method]}
            plots.draw_intervals(axes, at, gains, **look)
        axes.set_xticks(range(len(cells)), [f"{NAMES[d]},\n{NAMES[b]}" for d, b in cells])
        axes.set_ylabel("AP minus the baseline's (points)")
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        caption = (
            "Final AP minus the baseline's, paired by image and seed, for every method, detector and "
            f"backbone, with 95 % intervals over {self.covers}. An interval that contains 0 shows no "
            "gain."
        )
        return self.plot("table1_gains", figure, caption, self.note(runs[*cells[0], "baseline"][0]))

    def findings(self, runs: Groups) -> Findings:
        """What each method gains, over all detectors and backbones."""
        pairs = [(method, "baseline") for method in self.methods if method != "baseline"]
        if {"lgd", "sssd"} <= set(self.methods):
            pairs.append(("sssd", "lgd"))
        said, cells = [], _cells(runs)
        for one, other in pairs:
            found = [direction(gain(runs[*cell, one], runs[*cell, other])) for cell in cells]
            ours, theirs = (
                [[runs[*c, m][i].matches() for c in cells] for i in range(len(self.seeds))]
                for m in (one, other)
            )
            said.append(
                f"{NAMES[one]} against {NAMES[other]}, AP: higher in {found.count('higher')}, "
                f"lower in {found.count('lower')} of {counted(len(cells), 'pair')} of detector and "
                f"backbone; mean over these {compared(difference(ours, theirs))}."
            )
        shapes = {cell: group[0].record()["done"]["shapes"] for cell, group in runs.items()}
        same = all(own == shapes[*cell[:2], "baseline"] for cell, own in shapes.items())
        said.append(
            "Every trained detector has weights of the same names and shapes as the baseline: "
            "inference is the same computation."
            if same
            else "Some trained detectors have weights of other names or shapes than the baseline."
        )
        return Findings(said)

    def verdicts(self, runs: Groups) -> tuple[Verdict, ...]:
        """SSSD against LGD and the baseline in the first cell."""
        cell = _cells(runs)[0]
        return main_comparison(
            {m: runs[*cell, m] for m in ("baseline", "lgd", "sssd") if m in self.methods}
        )


def _cells(runs: Groups) -> list[tuple[str, str]]:
    """Detectors and backbones, in the order of the table."""
    return list(dict.fromkeys((detector, backbone) for detector, backbone, _ in runs))
