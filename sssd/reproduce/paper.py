"""What the papers state, as far as it is known; nothing else may be called theirs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..methods import REGISTERED


class Names(dict[str, str]):
    """How the papers write methods, detectors and backbones; the user's own as registered."""

    def __missing__(self, name: str) -> str:
        if name in REGISTERED:
            return name
        raise KeyError(name)


NAMES = Names(
    {
        "baseline": "baseline",
        "labelenc": "LabelEnc",
        "lgd": "LGD",
        "kl": "KL",
        "sssd": "SSSD",
        "faster_rcnn": "Faster R-CNN",
        "retinanet": "RetinaNet",
        "fcos": "FCOS",
        "resnet18": "R-18",
        "resnet34": "R-34",
        "resnet50": "R-50",
        "resnet101": "R-101",
        "resnext101": "X-101",
        "swin_t": "Swin-T",
        "slim18": "slim R-18",
        "slim34": "slim R-34",
    }
)


@dataclass(frozen=True)
class Statement:
    """A sentence that may be called the paper's; its numbers by name, for use beside ours."""

    sentence: str
    notebook: str
    """The notebook whose findings stand beside it in the report."""
    numbers: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.sentence


PAPER = {
    "share_start": Statement(
        "LGD at its published λ = 1 has a share λ·L_distill / L_total of 45 % on average after 1,000 "
        "iterations, with Faster R-CNN R-50",
        "table3_calibration",
        {"share": 0.45},
    ),
    "equivalent": Statement(
        "the equivalent λ for SSSD, by binary search in [1, 100], is 50",
        "table3_calibration",
        {"lam": 50.0, "low": 1.0, "high": 100.0},
    ),
    "share_end": Statement(
        "the share at the end of training is close to 50 %, at any λ, for LGD and SSSD",
        "table3_calibration",
        {"share": 0.5},
    ),
    "best_lambda": Statement(
        "SSSD is best at λ = 75, and better there than the best LGD in every AP measure but AP50",
        "table4_lambda_sweep",
        {"lam": 75.0},
    ),
    "ap75": Statement(
        "the best SSSD has an AP75 of 44.1, the best LGD of 43.6 (+1.1 % relative, the largest gain)",
        "table4_lambda_sweep",
        {"sssd": 44.1, "lgd": 43.6},
    ),
    "robust": Statement("SSSD is robust to a wide range of λ", "table4_lambda_sweep"),
    "higher": Statement(
        "SSSD has a higher AP than the compared methods in most experimental settings",
        "table1_benchmark",
    ),
    "ahead": Statement(
        "the best SSSD stays ahead of the best LGD over the last iterations of training",
        "fig2_ap_curves",
    ),
    "stepwise": Statement(
        "stepwise λ gains about 0.5 % AP over fixed λ in the last 60,000 iterations, for LGD and for "
        "SSSD, with Faster R-CNN R-50",
        "fig3_stepwise",
    ),
    "grid": Statement(
        "{baseline, LabelEnc, LGD, SSSD} × {Faster R-CNN, RetinaNet, FCOS} × {R-50, R-101} are "
        "compared",
        "table1_benchmark",
    ),
}
"""What the paper states, as far as it is known to us; nothing else is called the paper's."""

PUBLISHED = {
    ("faster_rcnn", "resnet50"): ("36.8 (1×)", "38.6 (1×)", "40.5 (2×)"),
    ("retinanet", "resnet50"): ("36.4 (1×)", "38.6 (1×)", "40.4 (2×)"),
    ("fcos", "resnet50"): ("37.1 (1×)", "39.5 (1×)", "42.4 (2×)"),
    ("faster_rcnn", "resnet101"): ("39.1 (1×)", "41.0 (1×)", "42.2 (2×)"),
    ("retinanet", "resnet101"): ("", "", "42.1 (2×)"),
    ("fcos", "resnet101"): ("", "", "44.0 (2×)"),
}
"""Box AP of baseline, LabelEnc and LGD, by detector and backbone, as the releases of LGD (val2017,
2× multi-scale) and of LabelEnc (minival, 1×, with its baseline) state it; SSSD's is not known."""
