"""Why Jensen-Shannon: the distances' values and gradients, and what their scales are."""

from __future__ import annotations

import math
from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from io import BytesIO
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from IPython.display import Markdown
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pydantic import Field, field_validator
from torch import Tensor

from ..config import RunConfig
from ..losses import js, js_map, kl, mse, normalise
from ..profiles import check_profile
from . import paper, plots, tables
from .experiment import Experiment

DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "MSE": lambda s, t: mse([s], [t]),
    "KL(P‖Q)": lambda s, t: kl([s], [t], 1),
    "KL(Q‖P)": lambda s, t: kl([t], [s], 1),
    "JS": lambda s, t: js_map(s, t).mean(),
    "√JS": lambda s, t: js([s], [t], 1),
}
"""Of a student's map and a teacher's, [1, C, h, w]; P is the student's distribution, Q the
teacher's. Without the constant 256, which scales a curve as a whole, as λ does."""
# Okabe and Ito's colours; the dashes say the same in grey.
LOOKS: dict[str, dict[str, Any]] = {
    "MSE": {"color": "#D55E00", "ls": (0, (5, 2)), "lw": 1.3},
    "KL(P‖Q)": {"color": "#E69F00", "ls": "-.", "lw": 1.5},
    "KL(Q‖P)": {"color": "#CC79A7", "ls": ":", "lw": 1.8},
    "JS": {"color": "#56B4E9", "ls": "-", "lw": 1.3},
    "√JS": {"color": "#000000", "ls": "-", "lw": 1.9},
}
LIKELY, LEAST = 0.8, 1e-6
"""The student's probability of an outcome, and how close to 0 the teacher's goes."""
MAP = (32, 32)
"""Height and width in pixels of the random maps."""
PAPER_MAP = (4, 100, 167)
"""Channels, height and width of the maps whose pixels compete in one of the other readings, which
depends on their number: P3 of the paper's images, 800 × 1333. Its channels are alike, so that 4 do."""
CORRELATIONS = tuple(round(0.05 * i, 2) for i in range(20))
TABULATED = (0.0, 0.25, 0.5, 0.75, 0.9)
STATED = f"{paper.PAPER['share_start']}; {paper.PAPER['equivalent']}"
EQUIVALENT, LOW, HIGH = (paper.PAPER["equivalent"].numbers[x] for x in ("lam", "low", "high"))
"""The paper's λ under JS for λ = 1 under MSE, and where it was searched for."""
CHANNELS = 8
RAISED = 5
"""Which channel the teacher of `losses_distributions` raises, counted from 0."""
SHIFTS = tuple(0.5 * i for i in range(17))
SHOWN = 8
"""Which of the shifts the still picture shows."""


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

    The reading of the library, and two others of what the paper leaves open: without division by
    the number of channels; and with a softmax over the pixels of each channel, in place of one over
    the channels of each pixel, and division by their number.
    """
    draw = torch.Generator().manual_seed(seed)
    student, teacher = _correlated((width, *MAP), correlation, draw)
    squared, distance = mse([student], [teacher]).item(), js([student], [teacher]).item()
    pixel = js_map(student, teacher).mean().item()
    large = _correlated(PAPER_MAP, correlation, draw)
    turned = [x.flatten(2).mT[..., None] for x in large]  # pixels where the channels were
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


@dataclass(frozen=True)
class Slider:
    """Pictures to be slid through; a still one where nothing runs.

    All pictures are in the page, so that it needs no kernel and no widgets: it slides in JupyterLab
    and in the exported HTML. Where scripts are not allowed, the still picture is what remains.
    """

    name: str
    values: Sequence[float]
    pictures: Sequence[bytes]
    """PNG, one for each value."""
    still: int
    """Which of them is shown at first."""

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        coded = [b64encode(picture).decode() for picture in self.pictures]
        sources = [f"data:image/png;base64,{code}" for code in coded]
        first, step = self.values[0], self.values[1] - self.values[0]
        slide = (
            f"const i = Math.round((this.value - {first:g}) / {step:g});"
            "const figure = this.closest('figure');"
            "figure.querySelector('img').src = this.dataset.pictures.split(' ')[i];"
            "figure.querySelector('output').value = this.value"
        )
        html = (
            f'<figure style="margin: 0"><img src="{sources[self.still]}" '
            f'alt="{escape(self.name)} = {self.values[self.still]:g}" style="max-width: 100%"><br>'
            f'<label>{escape(self.name)} <input type="range" style="width: 20em" min="{first:g}" '
            f'max="{self.values[-1]:g}" step="{step:g}" value="{self.values[self.still]:g}" '
            f'oninput="{slide}" data-pictures="{" ".join(sources)}"></label> '
            f"<output>{self.values[self.still]:g}</output></figure>"
        )
        plain = f"{self.name} = {self.values[self.still]:g}"
        return {"text/html": html, "image/png": coded[self.still], "text/plain": plain}


class Losses(Experiment):
    """MSE, KL and JS compared, and the scale of λ (SSSD, section 2)."""

    notebook = "losses"
    title = "Why the Jensen-Shannon distance"
    question = (
        "Why not LGD's mean squared error, or the Kullback-Leibler divergence? All three, "
        "with their gradients, are computed for two distributions that part from each other, "
        "and for random feature maps, whose distances say how much λ has to make up for."
    )

    widths: tuple[int, ...] = Field((256, 48), min_length=1)

    @field_validator("widths", mode="before")
    @classmethod
    def _widths(cls, given: Any) -> Any:
        """papermill's ``-p widths 256`` gives a number, ``-p widths 256,48`` a text."""
        if isinstance(given, str):
            return tuple(given.replace(",", " ").split())
        return (given,) if isinstance(given, int) else given

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
            self.source  # noqa: B018 (names the folder of the results)
        return {}

    def curves(self) -> Figure:
        """Values and gradients: far apart, where Q vanishes, and close to agreement."""
        plots.style()
        figure, axes = plt.subplots(2, 2, figsize=(2.06 * plots.COLUMN, 4.7), layout="constrained")
        qs = np.geomspace(LIKELY, LEAST, 121).tolist()
        far = [vanishing(q) for q in qs]
        shifts = np.linspace(-3, 3, 121).tolist()
        near = [approaching(shift) for shift in shifts]
        for name, look in LOOKS.items():
            axes[0, 0].plot(qs, [found[name][0] for found in far], label=name, **look)
            lengths = [float(found[name][1].norm()) for found in far]
            axes[0, 1].plot(qs[1:], lengths[1:], **look)  # at first P = Q, and all are 0
            axes[1, 0].plot(shifts, [found[name][0] for found in near], **look)
            slope = [float(found[name][1][0]) for found in near]
            middle = len(shifts) // 2  # agreement: √JS jumps, and a line would hide that
            for part in (slice(0, middle), slice(middle + 1, None)):
                joined = slice(None) if name != "√JS" else part
                axes[1, 1].plot(shifts[joined], slope[joined], **look)
        axes[1, 1].plot(0, 0, "o", color=LOOKS["√JS"]["color"], ms=3.5)
        self._bound(axes[0, 0], qs[-1] * 1.5, "right")
        for panel in axes[0]:
            panel.set(
                xscale="log", xlim=(LIKELY, LEAST), xlabel="q, what Q gives an outcome of P = 0.8"
            )
            panel.minorticks_off()
        axes[0, 0].set(ylim=(0, 5), ylabel="distance", title="Q vanishes: value")
        axes[0, 1].set(
            yscale="log",
            ylim=(0.03, 20),
            ylabel="length of the gradient",
            title="Q vanishes: gradient",
        )
        for panel in axes[1]:
            panel.set(xlim=(-3, 3), xlabel="δ, how far the student's feature is off")
        axes[1, 0].set(ylim=(0, 1), ylabel="distance", title="Close to agreement: value")
        axes[1, 1].set(
            ylim=(-0.75, 0.75), ylabel="derivative", title="Close to agreement: gradient"
        )
        figure.legend(loc="outside upper center", ncols=len(LOOKS), frameon=False)
        caption = (
            "Five distances between a student's distribution P and a teacher's Q over two outcomes, "
            "each a softmax of two features; KL and JS in nats, MSE in squared feature units. Above: "
            "P = (0.8, 0.2) and Q = (q, 1 − q) with q → 0; left the distance, right the length of its "
            "gradient in the student's features. Below: Q = (½, ½), and the student's features are "
            "±δ/2; left the distance, right its derivative in the student's first feature "
            "(dot: at agreement, where the library takes the gradient of √JS as 0). Constants "
            "(the 256, λ) left out. Exact values, no sample."
        )
        return self.save_figure(figure, "losses_curves", caption, "computed, nothing trained")

    def distributions(self) -> Slider:
        """Two distributions that part, with the distances between them; to be slid through."""
        plots.style()
        found = {shift: evaluate(*raised(shift)) for shift in SHIFTS}
        pictures = []
        for i, shift in enumerate(SHIFTS):
            figure = self._parting(shift, found)
            picture = BytesIO()
            figure.savefig(picture, format="png", dpi=110, metadata={"Software": None})
            plt.close(figure)
            pictures.append(picture.getvalue())
            if i == SHOWN:
                caption = (
                    "A pixel's distributions over its channels, the student's P and the teacher's "
                    f"Q, which has channel {RAISED + 1} higher by Δ = {shift:g} feature units, and "
                    "their mean M; right, the distances between them as Δ grows (KL and JS in nats, "
                    "MSE in squared feature units; the constant 256 and λ left out). "
                    "Exact values, no sample."
                )
                self.save_figure(
                    figure, "losses_distributions", caption, "computed, nothing trained"
                )
        return Slider("Δ", SHIFTS, pictures, SHOWN)

    def _parting(self, shift: float, found: dict[float, dict[str, tuple[float, Tensor]]]) -> Figure:
        figure, (left, right) = plt.subplots(1, 2, figsize=(2.06 * plots.COLUMN, 2.6))
        figure.subplots_adjust(0.07, 0.17, 0.985, 0.9, wspace=0.16)  # the same for every picture
        p, q = (torch.tensor(x).softmax(0).numpy() for x in raised(shift))
        channel = np.arange(1, CHANNELS + 1)
        left.bar(channel - 0.2, p, 0.4, color="#0072B2", label="P, student")
        left.bar(
            channel + 0.2,
            q,
            0.4,
            color="#F2C48D",
            ec="#D55E00",
            hatch="////",
            lw=0.8,
            label="Q, teacher",
        )
        left.step(
            np.append(channel - 0.5, CHANNELS + 0.5),
            np.append((p + q) / 2, (p + q)[-1] / 2),
            where="post",
            color="black",
            lw=1,
            label="M, their mean",
        )
        left.set(
            ylim=(0, 1),
            xlim=(0.5, CHANNELS + 0.5),
            xticks=channel,
            xlabel="channel",
            ylabel="probability",
            title=f"Δ = {shift:.1f}",
        )
        left.grid(axis="x", visible=False)
        left.legend(frameon=False, loc="upper left")
        for name, look in LOOKS.items():
            values = [found[x][name][0] for x in SHIFTS]
            now = found[shift][name][0]
            right.plot(SHIFTS, values, label=f"{name} = {now:.2f}", **look)
            right.plot(shift, now, "o", color=look["color"], ms=3.5, clip_on=False, zorder=4)
        right.axvline(shift, color="#999999", lw=0.8, zorder=0)
        self._bound(right, 0.1, "left")
        right.set(
            xlim=(0, SHIFTS[-1]),
            ylim=(0, 7),
            xlabel="Δ, how much higher the channel is",
            ylabel="distance",
        )
        right.legend(loc="upper left", facecolor="white", framealpha=1, edgecolor="none")
        return figure

    @staticmethod
    def _bound(axes: Axes, x: float, side: str) -> None:
        axes.axhline(math.log(2), color=LOOKS["JS"]["color"], lw=0.7, zorder=0)
        axes.text(x, math.log(2) + 0.08, "JS is below ln 2", ha=side, fontsize=6.5, color="#2a6f9e")

    def calibrate(self) -> pd.DataFrame:
        """`calibration` at every width, correlation and seed, a row each."""
        return pd.DataFrame(
            {"width": width, "correlation": r, "seed": seed, **calibration(width, r, seed)}
            for width in self.widths
            for r in CORRELATIONS
            for seed in self.seeds
        )

    def scales(self, measured: pd.DataFrame) -> Figure:
        """How large MSE and the JS distance are, and how many times one is the other."""
        plots.style()
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(2.06 * plots.COLUMN, 2.9), layout="constrained"
        )
        means = {w: self._means(measured, w) for w in self.widths}
        for i, (width, rows) in enumerate(means.items()):
            faint = (
                {} if i == 0 else {"ls": "none", "marker": "so^D"[i % 4], "ms": 4.5, "mfc": "none"}
            )
            for name, column in (("MSE", "MSE"), ("√JS", "L_distill")):
                label = "MSE" if name == "MSE" else "JS distance, as SSSD's $L_{\\mathrm{distill}}$"
                look = {**LOOKS[name], **faint}
                left.plot(rows.index, rows[column], label=f"{label}, C = {width}", **look)
            look = {**LOOKS["√JS"], **faint}
            right.plot(rows.index, rows["ratio"], label=f"as implemented, C = {width}", **look)
        first = means[self.widths[0]]
        for column, label, style in (
            ("not divided", "JS not divided by C", "--"),
            ("over pixels", "softmax over the pixels of P3", ":"),
        ):
            right.plot(first.index, first[column], color="#777777", ls=style, lw=1.3, label=label)
        right.axhline(EQUIVALENT, color="#009E73", lw=1.2, ls="-.")
        right.text(
            0.01,
            EQUIVALENT * 0.95,
            f"the paper's {EQUIVALENT:g}",
            va="top",
            fontsize=6.5,
            color="#00664a",
        )
        right.axhspan(LOW, HIGH, color="#009E73", alpha=0.09, lw=0)
        right.text(
            0.01,
            1.08,
            f"where the paper searched: {LOW:g} to {HIGH:g}",
            va="bottom",
            ha="left",
            fontsize=6.5,
            color="#00664a",
        )
        left.set(yscale="log", ylabel="distance", title="Two random maps")
        right.set(yscale="log", ylim=(1, 20000), ylabel="MSE ÷ JS distance", title="Their ratio")
        for panel in (left, right):
            panel.set(xlim=(0, CORRELATIONS[-1]), xlabel="correlation of the two maps")
            panel.legend(frameon=False, loc="best")
        caption = (
            f"Distance between two normalised random maps of {MAP[0]} × {MAP[1]} pixels, normal values of "
            "unit variance, by their correlation (1 would be equality). Left, MSE in squared "
            "feature units and the JS distance √(JS ÷ 256), JS in nats per pixel; right, how many "
            "times the JS distance MSE is, which is the factor between λ of equal weight. Grey: two "
            f"other readings of what the paper leaves open: JS per pixel, C = {self.widths[0]}; and a "
            f"softmax over pixels, of which the P3 of the paper's images has {PAPER_MAP[1]} × "
            f"{PAPER_MAP[2]}. "
            f"Paper: {STATED}. n = {MAP[0] * MAP[1]:,} pixels, {self._seeds_said()}."
        )
        return self.save_figure(figure, "losses_calibration", caption, "computed, nothing trained")

    def table(self, measured: pd.DataFrame) -> tables.Table:
        """The two distances and their ratio at a few correlations, for every width."""
        rows = []
        for width in self.widths:
            means = self._means(measured, width)
            for r in TABULATED:
                row = means.loc[r]
                rows.append(
                    {
                        "C": width,
                        "correlation": f"{r:g}",
                        "MSE": f"{row['MSE']:.3f}",
                        "JS per pixel": f"{row['JS per pixel']:.4f}",
                        "√(JS ÷ 256)": f"{row['L_distill']:.4f}",
                        "MSE ÷ √(JS ÷ 256)": f"{row['ratio']:.1f}",
                        "not divided": f"{row['not divided']:.1f}",
                        "softmax over pixels": f"{row['over pixels']:.0f}",
                    }
                )
        caption = (
            f"Distances between two normalised random maps of unit variance and C channels; JS in "
            f"nats. The last two columns are the ratio under two other readings of what the paper "
            f"leaves open, without division by C and with a softmax over the {PAPER_MAP[1]} × "
            f"{PAPER_MAP[2]} pixels of its P3. Paper: {STATED}. n = {MAP[0] * MAP[1]:,} pixels, "
            f"{self._seeds_said()}."
        )
        return self.save_table(tables.Table(pd.DataFrame(rows), caption), "losses_calibration")

    def paper(self) -> Markdown:
        """The paper's statement, to be read beside ours."""
        return Markdown(f"> **The paper**: {STATED}.")

    def findings(self, measured: pd.DataFrame) -> Markdown:
        """What the curves and the ratios say."""
        nearly, gone = vanishing(0.01), vanishing(LEAST)
        lengths = {name: float(gone[name][1].norm()) for name in DISTANCES}
        qs = np.geomspace(LIKELY, LEAST, 121).tolist()
        far = [vanishing(q) for q in qs]
        most = max(found["JS"][0] for found in far)
        steepest = {n: max(float(found[n][1].norm()) for found in far) for n in ("JS", "√JS")}
        said = [
            f"As Q gives the likely outcome of P = (0.8, 0.2) less and less, from 0.01 to {LEAST:f}, KL(P‖Q) "
            f"rises from {nearly['KL(P‖Q)'][0]:.2f} to {gone['KL(P‖Q)'][0]:.2f} nats and has no "
            f"bound; JS reaches {most:.3f}, below ln 2 = {math.log(2):.3f}.",
            f"KL depends on the order: at q = 0.01, KL(P‖Q) = {nearly['KL(P‖Q)'][0]:.3f} and "
            f"KL(Q‖P) = {nearly['KL(Q‖P)'][0]:.3f} nats.",
            f"At q = {LEAST:f} the gradient in the student's features has length "
            f"{lengths['MSE']:.2f} for MSE and {lengths['KL(P‖Q)']:.2f} for KL(P‖Q); for JS and √JS "
            f"it is never longer than {steepest['JS']:.2f} and {steepest['√JS']:.2f}.",
        ]
        close = approaching(0.01)
        derivatives = {name: float(close[name][1][0]) for name in ("MSE", "JS", "√JS")}
        said.append(
            f"Close to agreement, at δ = 0.01, the derivative of MSE is {derivatives['MSE']:.4f} and "
            f"of JS {derivatives['JS']:.4f}: they fade. That of √JS is {derivatives['√JS']:.3f}: the "
            "root keeps pulling."
        )
        for width in self.widths:
            means = self._means(measured, width)
            ratio = means["ratio"]
            sentence = (
                f"C = {width}: MSE is {ratio.loc[0.0]:.0f} times the JS distance where the maps are "
                f"independent, {ratio.loc[0.5]:.0f} times at a correlation of 0.5"
            )
            # The ratio falls with the correlation: where it passes the paper's.
            at = np.interp(-EQUIVALENT, -ratio.to_numpy(), ratio.index.to_numpy())
            if ratio.min() < EQUIVALENT < ratio.max():
                sentence += f"; it is the paper's {EQUIVALENT:g} at {at:.2f}"
            said.append(sentence + ".")
        first = self._means(measured, self.widths[0])
        said.append(
            f"The other readings, C = {self.widths[0]}, independent maps: "
            f"{first.loc[0.0, 'not divided']:.1f} without division by C, "
            f"{first.loc[0.0, 'over pixels']:.0f} with a softmax over the "
            f"{PAPER_MAP[1]} × {PAPER_MAP[2]} pixels of the paper's P3."
        )
        return self.conclude({}, said)

    def _means(self, measured: pd.DataFrame, width: int) -> pd.DataFrame:
        """Means over the seeds, by correlation."""
        own = measured[measured["width"] == width]
        return own.drop(columns=["width", "seed"]).groupby("correlation").mean()

    def _seeds_said(self) -> str:
        return f"{len(self.seeds)} seed{'s' if len(self.seeds) > 1 else ''}"
