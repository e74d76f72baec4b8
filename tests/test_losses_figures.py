"""The curves of the losses notebook: what diverges, what is bounded, and the paper's 50."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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

FEATURES = st.lists(st.floats(-20, 20), min_size=3, max_size=3)


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


def test_kl_diverges_and_js_does_not() -> None:
    values = [vanishing(10.0**-n) for n in range(1, 13)]
    kl = [found["KL(P‖Q)"][0] for found in values]
    growth = [b - a for a, b in pairwise(kl)]
    assert growth[-1] == pytest.approx(LIKELY * math.log(10), rel=1e-6)  # as much for every digit
    assert max(found["JS"][0] for found in values) < math.log(2)
    lengths = {name: [float(found[name][1].norm()) for found in values] for name in DISTANCES}
    assert lengths["MSE"] == sorted(lengths["MSE"])
    assert lengths["KL(P‖Q)"] == sorted(lengths["KL(P‖Q)"])
    assert max(lengths["JS"]) < 0.25 and max(lengths["√JS"]) < 0.25


@given(FEATURES, FEATURES)
def test_js_is_symmetric_and_bounded_for_any_features(s: list[float], t: list[float]) -> None:
    one, other = evaluate(s, t), evaluate(t, s)
    assert one["JS"][0] == pytest.approx(other["JS"][0], abs=1e-12)
    assert -1e-12 < one["JS"][0] <= math.log(2)
    assert one["√JS"][0] <= math.sqrt(math.log(2))
    assert one["KL(P‖Q)"][0] == pytest.approx(other["KL(Q‖P)"][0])
    assert all(gradient.isfinite().all() for _, gradient in one.values())


def test_kl_depends_on_the_order() -> None:
    found = vanishing(0.01)
    assert found["KL(P‖Q)"][0] > 1.5 * found["KL(Q‖P)"][0]


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


def test_the_calibration_is_the_papers() -> None:
    """Independent maps: 2.0 ÷ 0.0280 = 71; at a correlation of 0.5: 1.0 ÷ 0.0207 = 48."""
    independent, half = calibration(256, 0.0, 0), calibration(256, 0.5, 0)
    assert independent["MSE"] == pytest.approx(2.0, rel=0.01)
    assert independent["JS per pixel"] == pytest.approx(0.2, rel=0.01)
    assert independent["L_distill"] == pytest.approx(0.0280, rel=0.01)
    assert independent["ratio"] == pytest.approx(71, rel=0.02)
    assert (half["MSE"], half["L_distill"]) == pytest.approx((1.0, 0.0207), rel=0.01)
    assert half["ratio"] == pytest.approx(48, rel=0.02)
    assert independent["not divided"] < 5 and independent["over pixels"] > 500


def test_a_narrow_pyramid_keeps_the_ratio() -> None:
    wide, narrow = calibration(256, 0.5, 0), calibration(48, 0.5, 0)
    assert narrow["ratio"] == pytest.approx(wide["ratio"], rel=0.05)


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
