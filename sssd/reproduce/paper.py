"""What the papers state, as far as it is known; nothing else may be called theirs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..methods import OWN


class Names(dict[str, str]):
    """How the papers write methods, detectors and backbones; the user's own as registered."""

    def __missing__(self, name: str) -> str:
        if name in OWN:
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
    """The one whose findings stand beside it in the report."""
    numbers: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.sentence


PAPER = {
    "share_start": Statement(
        "share λ·L_distill / L_total after 1,000 iterations, LGD at its published λ = 1, "
        "Faster R-CNN R-50: 45 % on average",
        "table3_calibration",
        {"share": 0.45},
    ),
    "equivalent": Statement(
        "equivalent λ for SSSD, by binary search in [1, 100]: 50",
        "table3_calibration",
        {"lam": 50.0, "low": 1.0, "high": 100.0},
    ),
    "share_end": Statement(
        "share at the end of training, any λ, LGD and SSSD: close to 50 %",
        "table3_calibration",
        {"share": 0.5},
    ),
    "best_lambda": Statement(
        "best SSSD λ: 75; better than the best LGD in every AP measure but AP50",
        "table4_lambda_sweep",
        {"lam": 75.0},
    ),
    "ap75": Statement(
        "AP75, best SSSD against best LGD: 44.1 against 43.6 (+1.1 % relative, the largest gain)",
        "table4_lambda_sweep",
        {"sssd": 44.1, "lgd": 43.6},
    ),
    "robust": Statement("λ: robust to a wide range of coefficients", "table4_lambda_sweep"),
    "higher": Statement(
        "AP against the compared methods: higher in most experimental settings",
        "table1_benchmark",
    ),
    "ahead": Statement(
        "best SSSD against best LGD over the last iterations of training: SSSD stays ahead",
        "fig2_ap_curves",
    ),
    "stepwise": Statement(
        "stepwise against fixed λ, last 60,000 iterations, Faster R-CNN R-50: about +0.5 % AP, for "
        "LGD and for SSSD",
        "fig3_stepwise",
    ),
    "grid": Statement(
        "grid of the comparison: {baseline, LabelEnc, LGD, SSSD} × {Faster R-CNN, RetinaNet, FCOS} "
        "× {R-50, R-101}",
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
