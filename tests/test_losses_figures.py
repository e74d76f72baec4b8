"""The curves of the losses notebook: what diverges, what is bounded, and the paper's 50."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from sssd.reproduce import Losses, ParameterError
from sssd.reproduce.losses import (
    DISTANCES,
    LIKELY,
    SHIFTS,
    SHOWN,
    approaching,
    calibration,
    evaluate,
    raised,
    vanishing,
)


@pytest.mark.parametrize("q", [0.8, 0.3, 1e-3, 1e-6])
def test_values_are_the_definitions(q: float) -> None:
    p, m = LIKELY, (LIKELY + q) / 2

    def kl(a: float, b: float) -> float:
        return a * math.log(a / b) + (1 - a) * math.log((1 - a) / (1 - b))

    found = {name: value for name, (value, _) in vanishing(q).items()}
    js = (kl(p, m) + kl(q, m)) / 2
    apart = (math.log(p / (1 - p)) - math.log(q / (1 - q))) / 2
    expected = [apart**2, kl(p, q), kl(q, p), js, math.sqrt(js)]
    assert list(found.values()) == pytest.approx(expected, abs=1e-7)


def test_where_q_vanishes_the_gradients_of_mse_and_kl_grow() -> None:
    values = [vanishing(10.0**-n) for n in range(1, 13)]
    lengths = {name: [float(found[name][1].norm()) for found in values] for name in DISTANCES}
    assert lengths["MSE"] == sorted(lengths["MSE"])
    assert lengths["KL(P‖Q)"] == sorted(lengths["KL(P‖Q)"])
    assert max(lengths["JS"]) < 0.25 and max(lengths["√JS"]) < 0.25


@pytest.mark.parametrize("name", DISTANCES)
def test_gradients_are_slopes(name: str) -> None:
    student, teacher = raised(3.0)
    _, gradient = evaluate(student, teacher)[name]
    for c in range(len(student)):
        step = [x + 1e-5 * (i == c) for i, x in enumerate(student)]
        back = [x - 1e-5 * (i == c) for i, x in enumerate(student)]
        slope = (evaluate(step, teacher)[name][0] - evaluate(back, teacher)[name][0]) / 2e-5
        assert float(gradient[c]) == pytest.approx(slope, abs=1e-8)


def test_only_the_root_pulls_until_the_two_agree() -> None:
    close, agreed = approaching(1e-4), approaching(0.0)
    for name in DISTANCES:
        assert agreed[name][0] == 0
        assert torch.equal(agreed[name][1], torch.zeros(2, dtype=torch.float64))
        assert (float(close[name][1][0]) > 0.1) == (name == "√JS")


def test_other_readings_are_far_from_the_papers_ratio() -> None:
    independent = calibration(256, 0.0, 0)
    assert independent["ratio"] == pytest.approx(71, rel=0.02)
    assert independent["not divided"] < 5 and independent["over pixels"] > 500


def test_the_same_seed_gives_the_same_numbers() -> None:
    assert calibration(16, 0.25, 3) == calibration(16, 0.25, 3)
    assert calibration(16, 0.25, 3) != calibration(16, 0.25, 4)


def test_the_animation_and_its_still(tmp_path: Path) -> None:
    plot = Losses(output=str(tmp_path)).distributions()
    assert plot._repr_html_() == plot.animation
    assert plot.animation.count("data:image/png;base64,") == len(SHIFTS)
    titles = [axes.get_title() for axes in plot.figure.axes]
    assert f"Δ = {SHIFTS[SHOWN]:.1f}" in titles and f"Δ = {SHIFTS[SHOWN]:g}" in plot.caption
    assert plot.files().keys() == {"losses_distributions.svg", "losses_distributions.png"}


@pytest.mark.parametrize("widths", ["256, 48", [256, 48], (256, 48)])
def test_widths_as_papermill_gives_them(widths: Any) -> None:
    assert Losses.from_notebook({"widths": widths}).widths == (256, 48)
    assert Losses.from_notebook({"widths": 32}).widths == (32,)


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"widths": [256, 1]}, "widths: [256, 1] is not valid"),
        ({"widths": []}, "widths: "),
        ({"widths": "wide"}, "widths.0: 'wide'"),
        ({"profile": "maxi"}, "profile: 'maxi'"),
        ({"data": "no/such/folder"}, "data root"),
    ],
)
def test_bad_parameters_are_named_in_one_sentence(
    parameters: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ParameterError) as raised:
        Losses.from_notebook(parameters)
    assert sentence in str(raised.value) and "\n" not in str(raised.value)


def test_nothing_is_trained_at_any_scale() -> None:
    assert Losses.from_notebook({"profile": "paper"}).configs == {}  # and no data is asked for
