"""Figures and tables: one style, one source, and the paper's values beside ours."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .engine import open_split
from .evaluation import Interval
from .runs import Run

COLUMN = 3.4
"""Width of a text column in inches: figures are drawn at their printed size."""
# Okabe and Ito's colours, apart in grey too; marks and dashes repeat what colour says.
COLOURS = {
    **{"fixed λ1": "#0072B2", "fixed λ2": "#E69F00", "stepwise": "#000000"},
    **{"baseline": "#888888", "labelenc": "#009E73", "lgd": "#0072B2", "kl": "#CC79A7"},
    "sssd": "#D55E00",
}
MARKS = {
    **{"fixed λ1": "o", "fixed λ2": "s", "stepwise": "D"},
    **{"baseline": "|", "labelenc": "^", "lgd": "o", "kl": "v", "sssd": "D"},
}
DASHES = {
    **{"fixed λ1": "--", "fixed λ2": ":", "stepwise": "-"},
    **{"baseline": "-", "labelenc": "-.", "lgd": "--", "kl": ":", "sssd": "-"},
}
CYCLE = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
"""Dashes for lines that are told apart by colour as well."""
NAMES = {
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
}


class Statement(str):
    """A sentence that may be called the paper's; its numbers by name, for use beside ours."""

    what: str
    says: str
    notebook: str
    numbers: dict[str, float]

    def __new__(cls, what: str, says: str, notebook: str, **numbers: float) -> Statement:
        """``notebook`` is the one whose findings stand beside the statement in the report."""
        statement = super().__new__(cls, f"{what}: {says}")
        statement.what, statement.says, statement.notebook = what, says, notebook
        statement.numbers = numbers
        return statement


PAPER = {
    "share_start": Statement(
        "share λ·L_distill / L_total after 1,000 iterations, LGD at its published λ = 1, "
        "Faster R-CNN R-50",
        "45 % on average",
        "table3_calibration",
        share=0.45,
        iteration=1000,
        lam=1.0,
    ),
    "equivalent": Statement(
        "equivalent λ for SSSD, by binary search in [1, 100]",
        "50",
        "table3_calibration",
        lam=50.0,
        low=1.0,
        high=100.0,
    ),
    "share_end": Statement(
        "share at the end of training, any λ, LGD and SSSD",
        "close to 50 %",
        "table3_calibration",
        share=0.5,
    ),
    "best_lambda": Statement(
        "best SSSD λ",
        "75; better than the best LGD in every AP measure but AP50",
        "table4_lambda_sweep",
        lam=75.0,
    ),
    "ap75": Statement(
        "AP75, best SSSD against best LGD",
        "44.1 against 43.6 (+1.1 % relative, the largest gain)",
        "table4_lambda_sweep",
        sssd=44.1,
        lgd=43.6,
        relative=0.011,
    ),
    "ahead": Statement(
        "best SSSD against best LGD over the last iterations of training",
        "SSSD stays ahead",
        "fig2_ap_curves",
    ),
    "stepwise": Statement(
        "stepwise against fixed λ, last 60,000 iterations, Faster R-CNN R-50",
        "about +0.5 % AP, for LGD and for SSSD",
        "fig3_stepwise",
        relative=0.005,
        iterations=60_000,
    ),
    "grid": Statement(
        "grid of the comparison",
        "{baseline, LabelEnc, LGD, SSSD} × {Faster R-CNN, RetinaNet, FCOS} × {R-50, R-101}",
        "table1_benchmark",
    ),
}
"""What the paper states, as far as it is known to us; nothing else is called the paper's."""

LGD_RELEASE = {
    ("faster_rcnn", "resnet50"): 40.5,
    ("retinanet", "resnet50"): 40.4,
    ("fcos", "resnet50"): 42.4,
    ("faster_rcnn", "resnet101"): 42.2,
    ("retinanet", "resnet101"): 42.1,
    ("fcos", "resnet101"): 44.0,
}
"""Box AP on val2017 that LGD's release states, 2× multi-scale, by detector and backbone."""

LABELENC_RELEASE = {
    ("retinanet", "resnet50"): (36.4, 38.6),
    ("fcos", "resnet50"): (37.1, 39.5),
    ("faster_rcnn", "resnet50"): (36.8, 38.6),
    ("faster_rcnn", "resnet101"): (39.1, 41.0),
}
"""Box AP on minival that LabelEnc's release states, 1×: of the baseline, and with LabelEnc."""


def style() -> None:
    """The one look of all figures: readable in print, in grey and by colour-blind readers."""
    sns.set_theme(
        context="paper",
        style="ticks",
        rc={
            "font.family": "DejaVu Sans",
            "font.size": 8,
            "axes.labelsize": 8,
            "axes.titlesize": 9,
            "xtick.labelsize": 7,
            "ytick.labelsize": 7,
            "legend.fontsize": 7,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.linewidth": 0.7,
            "xtick.major.width": 0.7,
            "ytick.major.width": 0.7,
            "axes.grid": True,
            "grid.color": "#dddddd",
            "grid.linewidth": 0.5,
            "figure.dpi": 120,
            "savefig.dpi": 200,
            "svg.hashsalt": "sssd",  # the same figure gives the same file
        },
    )


def finish(figure: Figure, folder: Path, name: str, source: str, smoke: bool = False) -> Figure:
    """Name the source under a figure, mark a smoke run, and save it as SVG and PNG."""
    figure.text(0.995, 0.0, source, ha="right", va="top", fontsize=6, color="#555555")
    if smoke:
        figure.text(
            0.5,
            0.5,
            "SMOKE RUN\nnumbers mean nothing",
            ha="center",
            va="center",
            rotation=25,
            fontsize=26,
            color="#bbbbbb",
            alpha=0.6,
            zorder=10,
        )
    folder.mkdir(parents=True, exist_ok=True)
    for kind, metadata in (("svg", {"Date": None}), ("png", {"Software": None})):
        figure.savefig(folder / f"{name}.{kind}", bbox_inches="tight", metadata=metadata)
    plt.close(figure)  # a notebook shows what the cell returns, once
    return figure


@dataclass(frozen=True)
class Table:
    """A table of a report, shown in a notebook and saved as CSV, Markdown and LaTeX."""

    frame: pd.DataFrame
    caption: str

    def save(self, folder: Path, name: str) -> Table:
        """Write ``name``.csv, .md and .tex into ``folder``, all from the same frame."""
        folder.mkdir(parents=True, exist_ok=True)
        self.frame.to_csv(folder / f"{name}.csv", index=False)
        (folder / f"{name}.md").write_text(self.markdown() + "\n")
        style = self.frame.style.hide(axis="index").format(escape="latex")
        latex = style.format_index(escape="latex", axis=1).to_latex(
            hrules=True, caption=_latex(self.caption), label=f"tab:{name}", convert_css=False
        )
        for sign, command in (("λ", r"$\lambda$"), ("→", r"$\to$"), ("−", "$-$")):
            latex = latex.replace(sign, command)
        (folder / f"{name}.tex").write_text(latex)
        return self

    def markdown(self) -> str:
        """The table in GitHub's Markdown, its caption under it."""
        rows = [list(self.frame.columns), ["---"] * self.frame.shape[1]]
        rows += self.frame.astype(str).to_numpy().tolist()
        lines = ["| " + " | ".join(markdown(str(cell)) for cell in row) + " |" for row in rows]
        return "\n".join([*lines, "", markdown(self.caption)])

    def _repr_html_(self) -> str:
        return f"{self.frame.to_html(index=False)}<p><em>{self.caption}</em></p>"


def markdown(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*_<>|#~])", r"\\\1", text)


def _latex(text: str) -> str:
    """Text that LaTeX sets as it is."""
    words = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return re.sub(r"[\\~^&%$#_{}]", lambda sign: words.get(sign[0], "\\" + sign[0]), text)


def verdict(difference: Interval) -> str:
    """What an interval of a difference allows to be said."""
    if not difference.distinct:
        return (
            "no difference beyond seeds" if difference.seeds > 1 else "no difference beyond images"
        )
    return "higher" if difference.estimate > 0 else "lower"


def percent(value: float) -> str:
    """AP as the papers print it: in points of 100, one decimal."""
    return "" if value != value else f"{100 * value:.1f}"


def bracketed(value: Interval) -> str:
    """A number in points of 100 with its 95 % interval, where there is one."""
    if value.low != value.low:
        return percent(value.estimate)
    return f"{100 * value.estimate:.1f} [{100 * value.low:.1f}, {100 * value.high:.1f}]"


def signed(difference: Interval) -> str:
    """A difference in AP points with its 95 % interval."""
    low, high = 100 * difference.low, 100 * difference.high
    return f"{100 * difference.estimate:+.1f} [{low:+.1f}, {high:+.1f}]".replace("-", "−")


def draw_intervals(
    axes: Axes, at: Sequence[float], values: Sequence[Interval], **look: Any
) -> None:
    """Estimates with their intervals as bars, in points of 100; ``look`` as errorbar takes it."""
    axes.errorbar(
        at,
        [100 * x.estimate for x in values],
        [
            [100 * (x.estimate - x.low) for x in values],
            [100 * (x.high - x.estimate) for x in values],
        ],
        **{"markersize": 3.5, "linewidth": 1.3, "elinewidth": 0.8, "capsize": 1.5, **look},
    )


def draw_schedule(
    axes: Axes, iterations: list[int], lam: dict[str, list[float]], lr: list[float]
) -> None:
    """λ of each variant over the iterations, with the learning rate on a second axis."""
    for name, values in lam.items():  # the fixed ones wider, so that the step hides neither
        width = 1.2 if name == "stepwise" else 2.6
        axes.step(iterations, values, DASHES[name], color=COLOURS[name], linewidth=width)
    axes.set_ylabel("λ")
    axes.set_ylim(0, 1.25 * max(max(values) for values in lam.values()))
    axes.set_xlabel("iteration")
    rate = axes.twinx()
    rate.plot(iterations, lr, color="#999999", linewidth=1, drawstyle="steps-post")
    rate.set_yscale("log")
    rate.set_ylabel("learning rate", color="#777777")
    rate.grid(False)
    rate.spines["right"].set_visible(True)


def draw_detections(run: Run, images: int = 3, least_score: float = 0.4) -> Figure:
    """The first ``images`` validation images with a run's last detections.

    Boxes with their class and score, in a colour a class; the ground truth dashed in white.
    """
    split = open_split(run.config.data, "val")
    found = run.detections()
    colours = sns.color_palette("colorblind", len(split.class_names))
    height, width = split[0][0].shape[1:]
    size = (3.2 * images, 3.2 * height / width + 0.1)
    figure, axes = plt.subplots(1, images, figsize=size, layout="constrained", squeeze=False)
    for i, panel in enumerate(axes[0]):
        pixels, target = split[i]
        panel.imshow(
            pixels.permute(1, 2, 0).numpy(), extent=(0, pixels.shape[2], pixels.shape[1], 0)
        )
        panel.set_axis_off()
        for x1, y1, x2, y2 in target["boxes"].tolist():
            panel.add_patch(
                Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec="white", lw=0.8, ls=":")
            )
        own = (found.image_id == target["image_id"]) & (found.scores >= least_score)
        for (x1, y1, x2, y2), category, score in zip(
            found.boxes[own].tolist(), found.category_id[own], found.scores[own], strict=True
        ):
            kind = split.category_ids.index(int(category))
            panel.add_patch(
                Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec=colours[kind], lw=1.4)
            )
            panel.text(
                x1,
                y1,
                f"{split.class_names[kind]} {score:.2f}",
                fontsize=5,
                color="white",
                va="bottom",
                bbox={"facecolor": colours[kind], "edgecolor": "none", "pad": 0.6},
            )
    plt.close(figure)
    return figure
