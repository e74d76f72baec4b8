"""Why Jensen-Shannon: the distances' values, gradients and scales."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.animation import FuncAnimation
from matplotlib.axes import Axes
from pydantic import Field, field_validator
from torch import Tensor

from ..config import RunConfig
from ..losses import js, js_map, kl, mse, normalise
from ..profiles import check_profile
from . import plots
from .experiment import Experiment, Findings, Text
from .paper import PAPER

DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "MSE": lambda s, t: mse([s], [t]),
    "KL(P‖Q)": lambda s, t: kl([s], [t], 1),
    "KL(Q‖P)": lambda s, t: kl([t], [s], 1),
    "JS": lambda s, t: js_map(s, t).mean(),
    "√JS": lambda s, t: js([s], [t], 1),
}
"""Distances between a student's map and a teacher's, [1, C, h, w], whose softmaxes over the channels
are P and Q. The constant 256 is left out: it scales a whole curve, as λ does."""
LOOKS: dict[str, dict[str, Any]] = {
    "MSE": {"color": plots.VERMILION, "ls": (0, (5, 2)), "lw": 1.3},
    "KL(P‖Q)": {"color": plots.ORANGE, "ls": "-.", "lw": 1.5},
    "KL(Q‖P)": {"color": plots.PINK, "ls": ":", "lw": 1.8},
    "JS": {"color": plots.SKY, "ls": "-", "lw": 1.3},
    "√JS": {"color": plots.BLACK, "ls": "-", "lw": 1.9},
}
LIKELY, LEAST = 0.8, 1e-6
"""The student's probability of the first outcome, and the least that the teacher gives it."""
QS = np.geomspace(LIKELY, LEAST, 121).tolist()
"""The probabilities that the teacher gives it, from the student's own down."""
MAP = (32, 32)
"""Height and width in pixels of the random maps."""
PAPER_MAP = (4, 100, 167)
"""Channels, height and width of the maps for the reading with a softmax over pixels, where their
number matters: P3 of the paper's images, 800 × 1333. Each channel is a sample; 4 suffice."""
CORRELATIONS = tuple(round(0.05 * i, 2) for i in range(20))
STATED = f"{PAPER['share_start']}; {PAPER['equivalent']}"
EQUIVALENT, LOW, HIGH = (PAPER["equivalent"].numbers[x] for x in ("lam", "low", "high"))
"""The paper's λ for JS that corresponds to λ = 1 for MSE, and the range of its search."""
CHANNELS = 8
RAISED = 5
"""The channel that is higher in the teacher of `losses_distributions`, counted from 0."""
SHIFTS = tuple(0.5 * i for i in range(17))
"""How much higher, in feature units: the frames of the animation."""
SHOWN = 8
"""The frame that the still figure shows."""
NOTE = "computed, nothing trained"


def evaluate(student: Sequence[float], teacher: Sequence[float]) -> dict[str, tuple[float, Tensor]]:
    """Each distance between two pixels, given as features of their channels.

    Returns:
        by name, the value and its gradient in the student's features, [C].
    """
    found = {}
    for name, distance in DISTANCES.items():
        s, t = (
            torch.tensor(list(x), dtype=torch.float64)[None, :, None, None]
            for x in (student, teacher)
        )
        value = distance(s.requires_grad_(), t)
        (gradient,) = torch.autograd.grad(value, s)
        found[name] = (value.item(), gradient.flatten())
    return found


def vanishing(q: float) -> dict[str, tuple[float, Tensor]]:
    """P = (0.8, 0.2) against Q = (q, 1 − q)."""
    student, teacher = (math.log(x / (1 - x)) / 2 for x in (LIKELY, q))
    return evaluate((student, -student), (teacher, -teacher))


def approaching(shift: float) -> dict[str, tuple[float, Tensor]]:
    """Q = (½, ½) against a student whose first feature is ``shift`` above its second."""
    return evaluate((shift / 2, -shift / 2), (0.0, 0.0))


def raised(shift: float) -> tuple[list[float], list[float]]:
    """Features of a student, and of a teacher that has one channel higher by ``shift``."""
    student = [-((c - 2) ** 2) / 4 for c in range(CHANNELS)]
    return student, [x + shift * (c == RAISED) for c, x in enumerate(student)]


def calibration(width: int, correlation: float, seed: int) -> dict[str, float]:
    """MSE and JS distance between two random unit-variance maps of ``width`` channels.

    As the library reads what the paper leaves open, and in two other readings: without division by
    the number of channels; and with a softmax over the pixels of each channel, in place of one over
    the channels of each pixel, and division by the number of pixels.
    """
    draw = torch.Generator().manual_seed(seed)
    student, teacher = _correlated((width, *MAP), correlation, draw)
    squared, distance = mse([student], [teacher]).item(), js([student], [teacher]).item()
    pixel = js_map(student, teacher).mean().item()
    large = _correlated(PAPER_MAP, correlation, draw)
    turned = [x.flatten(2).mT[..., None] for x in large]  # pixels in the place of channels
    return {
        "MSE": squared,
        "JS per pixel": pixel,
        "L_distill": distance,
        "ratio": squared / distance,
        "not divided": squared / math.sqrt(pixel),
        "over pixels": (
            mse(large[:1], large[1:]) / js(turned[:1], turned[1:], turned[0].shape[1])
        ).item(),
    }


def _correlated(
    shape: tuple[int, int, int], correlation: float, draw: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Two normalised maps [1, C, h, w] of normal values."""
    one, other = torch.randn(2, 1, *shape, generator=draw)
    mixed = correlation * one + math.sqrt(1 - correlation**2) * other
    return normalise(one), normalise(mixed)


class Losses(Experiment):
    """MSE, KL and JS compared, and the scale of λ (SSSD, section 2)."""

    notebook = "losses"
    title = "Why the Jensen-Shannon distance"
    question = (
        "Why not LGD's mean squared error, or the Kullback-Leibler divergence? Their values and "
        "gradients are compared with the Jensen-Shannon distance for two distributions that move "
        "apart, and their scales for random feature maps: λ has to make up for a difference in "
        "scale."
    )

    widths: tuple[int, ...] = Field((256, 32), min_length=1)

    @field_validator("widths")
    @classmethod
    def _distributions(cls, widths: tuple[int, ...]) -> tuple[int, ...]:
        if min(widths) < 2:
            raise ValueError("expected at least 2 channels, as fewer make no distribution")
        return widths

    @cached_property
    def configs(self) -> dict[Any, list[RunConfig]]:
        """None: nothing is trained here."""
        check_profile(self.profile)
        if self.data:
            self.source  # noqa: B018 (it names the folder of the results)
        return {}

    def curves(self) -> plots.Plot:
        """Values and gradients: where Q vanishes, and close to agreement."""
        figure, axes = plots.panels(2, 2, (2.06 * plots.COLUMN, 4.9))
        far = [vanishing(q) for q in QS]
        shifts = np.linspace(-3, 3, 121)
        near = [approaching(shift) for shift in shifts]
        for name, look in LOOKS.items():
            lengths = [float(found[name][1].norm()) for found in far]
            slopes = np.array([float(found[name][1][0]) for found in near])
            if name == "√JS":
                slopes[shifts == 0] = np.nan  # it jumps there, and a line would hide that
            axes[0, 0].plot(QS, [found[name][0] for found in far], label=name, **look)
            axes[0, 1].plot(QS[1:], lengths[1:], **look)  # at first P = Q, and all are 0
            axes[1, 0].plot(shifts, [found[name][0] for found in near], **look)
            axes[1, 1].plot(shifts, slopes, **look)
        axes[1, 1].plot(0, 0, "o", color=LOOKS["√JS"]["color"], ms=3.5)
        axes[0, 0].axhline(math.log(2), color=LOOKS["JS"]["color"], lw=0.7, zorder=0)
        bound: dict[str, Any] = {"ha": "right", "va": "bottom", "fontsize": 6.5}
        axes[0, 0].text(LEAST, math.log(2) + 0.04, "bound of JS: ln 2", **bound)
        for panel in axes[0]:
            panel.set(
                xscale="log", xlim=(LIKELY, LEAST), xlabel="q, Q's share of the first outcome"
            )
            panel.minorticks_off()
        for panel in axes[1]:
            panel.set(xlim=(-3, 3), xlabel="δ, how far the student's feature is off")
        axes[0, 0].set(ylim=(0, 5), title="Q vanishes", ylabel="distance")
        axes[0, 1].set(yscale="log", ylim=(0.03, 20), ylabel="length of the gradient")
        axes[1, 0].set(ylim=(0, 1), title="Close to agreement", ylabel="distance")
        axes[1, 1].set(ylabel="derivative", ylim=(-0.75, 0.75))
        figure.legend(loc="outside upper center", ncols=len(LOOKS))
        caption = (
            "Five distances between a student's distribution P and a teacher's Q over two outcomes, "
            "each a softmax of two features; KL and JS in nats, MSE in squared feature units. Above: "
            "P = (0.8, 0.2) and Q = (q, 1 − q) with q → 0; left the distance, right the length of its "
            "gradient in the student's features. Below: "
            "Q = (½, ½), and the student's features are ±δ/2; left the distance, right its "
            "derivative in the student's first feature (dot: at agreement, where the library takes "
            "the gradient of √JS as 0). The factors 256 and λ are left out. Exact values, no sample."
        )
        return self.plot("losses_curves", figure, caption, NOTE)

    def distributions(self) -> plots.Plot:
        """Two distributions that move apart, with the distances between them; an animation."""
        size = (2.06 * plots.COLUMN, 2.6)
        figure, ((left, right),) = plots.panels(1, 2, size, layout=None)
        figure.subplots_adjust(0.07, 0.17, 0.985, 0.9, wspace=0.16)  # the same for every frame
        found = [evaluate(*raised(shift)) for shift in SHIFTS]

        def draw(frame: int) -> None:
            left.clear()
            right.clear()
            _draw_distributions(left, SHIFTS[frame])
            for name, look in LOOKS.items():
                values = [at[name][0] for at in found]
                right.plot(SHIFTS, values, label=f"{name} = {values[frame]:.2f}", **look)
            right.axvline(SHIFTS[frame], color="#999999", lw=0.8, zorder=0)
            right.set(xlim=(0, SHIFTS[-1]), ylim=(0, 7), ylabel="distance")
            right.set_xlabel("Δ, how much higher the channel is")
            right.legend(loc="upper left", frameon=True, framealpha=1, edgecolor="none")

        frames = FuncAnimation(
            figure, draw, frames=len(SHIFTS), interval=300, init_func=lambda: None
        )
        page = frames.to_jshtml(default_mode="reflect")
        draw(SHOWN)
        caption = (
            "Left, a pixel's distributions over its channels: the student's P, the teacher's Q, with "
            f"channel {RAISED + 1} higher by Δ = {SHIFTS[SHOWN]:g} feature units, and their mean M. "
            "Right, the distances between P and Q as Δ grows (KL and JS in nats, MSE in squared "
            "feature units; the factors 256 and λ are left out). Exact values, no sample."
        )
        return self.plot("losses_distributions", figure, caption, NOTE, animation=page)

    def calibrate(self) -> pd.DataFrame:
        """`calibration` at every width, correlation and seed: a row for each."""
        return pd.DataFrame(
            {"width": width, "correlation": r, "seed": seed, **calibration(width, r, seed)}
            for width in self.widths
            for r in CORRELATIONS
            for seed in self.seeds
        )

    def scales(self, measured: pd.DataFrame) -> plots.Plot:
        """How large MSE and the JS distance are, and their ratio."""
        figure, ((left, right),) = plots.panels(1, 2, (2.06 * plots.COLUMN, 2.9))
        for i, width in enumerate(self.widths):
            rows = _means(measured, width)
            marks = {"ls": "none", "marker": "so^D"[i % 4], "ms": 4.5, "mfc": "none"} if i else {}
            js_look = LOOKS["√JS"] | marks
            left.plot(rows["MSE"], label=f"MSE, C = {width}", **(LOOKS["MSE"] | marks))
            left.plot(rows["L_distill"], label=f"JS distance, C = {width}", **js_look)
            right.plot(rows["ratio"], label=f"as implemented, C = {width}", **js_look)
        first = _means(measured, self.widths[0])
        grey = {"color": plots.GREY, "lw": 1.3}
        right.plot(first["not divided"], ls="--", label="JS not divided by C", **grey)
        right.plot(first["over pixels"], ls=":", label="softmax over the pixels of P3", **grey)
        right.axhline(EQUIVALENT, color=plots.GREEN, lw=1.2, ls="-.", label="the paper's λ")
        right.axhspan(LOW, HIGH, color=plots.GREEN, alpha=0.09, lw=0)
        left.set(yscale="log", ylabel="distance", title="Two random maps")
        right.set(yscale="log", ylim=(1, 20000), ylabel="MSE ÷ JS distance", title="Their ratio")
        for panel in (left, right):
            panel.set(xlim=(0, CORRELATIONS[-1]), xlabel="correlation of the two maps")
            panel.legend(loc="best")
        _, high, wide = PAPER_MAP
        caption = (
            f"Distance between two normalised random maps of {MAP[0]} × {MAP[1]} pixels, with normal "
            "values of unit variance, over their correlation (1: equal maps). Left, MSE in squared "
            "feature units and the JS distance √(JS ÷ 256), JS in nats per pixel; right, their "
            "ratio, which is the ratio of two λ of equal weight (tinted: where the paper searched "
            "its λ). Grey, two other readings of what the paper leaves open: JS not divided by C, "
            f"for C = {self.widths[0]}, and a softmax over pixels, of which P3 of the paper's images "
            f"has {high} × {wide}. n = {MAP[0] * MAP[1]:,} pixels, {self.seeds_in_words}."
        )
        return self.plot("losses_calibration", figure, caption, NOTE)

    def paper(self) -> Text:
        """The paper's statement, to be read beside ours."""
        return Text(f"> **The paper**: {STATED}.")

    def findings(self, measured: pd.DataFrame) -> Findings:
        """What the curves and the ratios say."""
        gone, close = vanishing(LEAST), approaching(0.01)
        bound = max(vanishing(q)["JS"][0] for q in QS)
        length = {name: float(gradient.norm()) for name, (_, gradient) in gone.items()}
        said = [
            f"With P = (0.8, 0.2), where Q's share of the first outcome falls to {LEAST:f}, "
            f"KL(P‖Q) reaches {gone['KL(P‖Q)'][0]:.2f} nats and has no bound; JS reaches "
            f"{bound:.3f}, below ln 2 = {math.log(2):.3f}. The gradient has length {length['MSE']:.2f} "
            f"for MSE and {length['KL(P‖Q)']:.2f} for KL(P‖Q), {length['JS']:.2f} for JS and "
            f"{length['√JS']:.2f} for √JS.",
            f"Close to agreement, at δ = 0.01, the derivative of MSE is {close['MSE'][1][0]:.4f} and "
            f"of JS {close['JS'][1][0]:.4f}: both go to 0 with δ. The derivative of √JS is "
            f"{close['√JS'][1][0]:.3f} and does not: the root goes on pulling with the same force.",
        ]
        for width in self.widths:
            ratio = _means(measured, width)["ratio"]
            said.append(
                f"C = {width}: MSE is {ratio.loc[0.0]:.0f} times the JS distance where the maps are "
                f"independent and {ratio.loc[0.5]:.0f} times at a correlation of 0.5; the paper's λ "
                f"is {EQUIVALENT:g} times LGD's."
            )
        first = _means(measured, self.widths[0]).loc[0.0]
        said.append(
            f"Two other readings of the paper give, for independent maps of C = {self.widths[0]}, "
            f"{first['not divided']:.1f} times (without division by C) and "
            f"{first['over pixels']:.0f} times (with a softmax over the pixels of the paper's P3)."
        )
        return Findings(said)


def _means(measured: pd.DataFrame, width: int) -> pd.DataFrame:
    """Means over the seeds, by correlation."""
    own = measured[measured["width"] == width]
    return own.drop(columns=["width", "seed"]).groupby("correlation").mean()


def _draw_distributions(axes: Axes, shift: float) -> None:
    """P and Q as bars over the channels, their mean M as a line."""
    p, q = (torch.tensor(x).softmax(0).numpy() for x in raised(shift))
    channel, mean = np.arange(1, CHANNELS + 1), (p + q) / 2
    axes.bar(channel - 0.2, p, 0.4, color=plots.BLUE, label="P, student")
    hatched: Any = {"color": "#F2C48D", "ec": plots.VERMILION, "hatch": "////", "lw": 0.8}
    axes.bar(channel + 0.2, q, 0.4, label="Q, teacher", **hatched)
    edges = np.append(channel - 0.5, CHANNELS + 0.5)
    line: Any = {"where": "post", "color": "black", "lw": 1}
    axes.step(edges, np.append(mean, mean[-1]), label="M, their mean", **line)
    axes.set(ylim=(0, 1), xlim=(0.5, CHANNELS + 0.5), xticks=channel, title=f"Δ = {shift:.1f}")
    axes.set(xlabel="channel", ylabel="probability")
    axes.grid(axis="x", visible=False)
    axes.legend(loc="upper left")
