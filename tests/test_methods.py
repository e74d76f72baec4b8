"""Methods by name, and distances of one's own among them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from helpers import environment, tiny, write_coco
from test_detectors import batch, detector
from torch import Tensor

import sssd
from sssd import methods
from sssd.profiles import open_data
from sssd.reproduce import paper, plots


def largest(student: Sequence[Tensor], teacher: Sequence[Tensor], normaliser: int) -> Tensor:
    pairs = zip(student, teacher, strict=True)
    return torch.stack([(s - t).abs().amax() for s, t in pairs]).sum() / normaliser


@pytest.fixture
def registered() -> Iterator[None]:
    """`largest` as a method, for one test."""
    kept = {
        name: type(value)(value)  # type: ignore[call-arg]
        for name, value in vars(methods).items()
        if name in ("METHODS", "TAUGHT", "REGISTERED", "DISTANCE_OF", "PUBLISHED_LAMBDA")
    }
    sssd.register_distance("largest", largest, lam=3.0)
    yield
    for name, value in kept.items():
        own = getattr(methods, name)
        own.clear()
        own.extend(value) if isinstance(own, list) else own.update(value)


def test_the_distiller_pulls_with_it(registered: None) -> None:
    torch.manual_seed(0)
    model = sssd.Distiller(detector("faster_rcnn"), "largest", normaliser=4)
    seen: list[float] = []
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(*batch())
    assert losses["distill"].dtype == torch.float32 and losses["distill"] > 0
    methods.DISTANCE_OF["largest"] = lambda s, t, n: seen.append(n) or s[0].sum() * 0 + 7.0  # type: ignore[func-returns-value]
    assert model(*batch())["distill"].item() == pytest.approx(21.0) and seen == [4]


def test_a_configuration_knows_it_by_its_source(registered: None, tmp_path: Path) -> None:
    data = open_data("smoke", write_coco(tmp_path / "data"))
    run = tiny(data, method="largest")
    assert run.lambda1 == 3.0 and run.canonical()["distance"] == methods.REGISTERED["largest"]
    assert tiny(data, method="largest", lambda2=4.0).stepwise
    assert "distance" not in tiny(data, method="sssd").canonical()
    before = run.id

    def other(student: Sequence[Tensor], teacher: Sequence[Tensor], normaliser: int) -> Tensor:
        return student[0].sum()

    sssd.register_distance("largest", other)
    assert tiny(data, method="largest", lambda1=3.0).id != before
    with pytest.raises(ValueError, match="lambda1: missing"):
        tiny(data, method="largest")
    sssd.register_distance("largest", largest, lam=3.0)
    assert tiny(data, method="largest").id == before
    assert methods.METHODS.count("largest") == 1


def test_figures_and_tables_have_a_name_and_a_look_for_it(registered: None) -> None:
    assert paper.NAMES["largest"] == "largest"
    assert plots.LOOKS["largest"]
    with pytest.raises(KeyError):
        plots.LOOKS["unknown"]
    with pytest.raises(KeyError):
        paper.NAMES["unknown"]


def test_what_is_not_registered(registered: None) -> None:
    for name in ("sssd", "baseline", "crops", "labelenc_stage1"):
        with pytest.raises(ValueError, match=f"name: '{name}' is a method of this package"):
            sssd.register_distance(name, largest)
    for name in ("", "2nd", "Two words", "../x"):
        with pytest.raises(ValueError, match="expected lower-case letters"):
            sssd.register_distance(name, largest)
    for lam in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="lam: .*expected a number"):
            sssd.register_distance("other", largest, lam=lam)
    typed: dict[str, methods.Distance] = {}
    exec("def f(s, t, n): return s[0].sum()", typed)
    with pytest.raises(ValueError, match="function: the source of .* cannot be read"):
        sssd.register_distance("other", typed["f"])
    assert "other" not in methods.METHODS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "SSSD_METHODS: 'own.py' is not a file"),
        ("1 / 0", "own.py: ZeroDivisionError: division by zero"),
        ("def f(:", "own.py: SyntaxError"),
    ],
)
def test_a_file_of_methods_that_cannot_be_executed(
    text: str | None, message: str, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / "own.py").write_text(text)
    done = subprocess.run(
        [sys.executable, "-c", "import sssd"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment(SSSD_METHODS="own.py"),
        timeout=120,
    )
    last = done.stderr.splitlines()[-1]
    assert done.returncode and last.startswith("ImportError: SSSD_METHODS: ") and message in last
