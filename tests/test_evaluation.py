"""Evaluation against plain pycocotools; bootstrap against duplicated data; intervals by simulation."""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import json
import math
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy import stats

from sssd.data.coco import CocoSplit, find_split
from sssd.evaluation import METRICS, Detections, Matches, evaluate
from sssd.intervals import Interval, average_precision, bootstrap, difference, half_width, interval

REAL = os.environ.get("SSSD_TEST_DATA")
CATEGORIES = (4, 9, 17)


def ground_truth(seed: int, images: int = 12) -> dict[str, Any]:
    """Boxes of all sizes, a crowd here and there, images without boxes, class 17 seldom."""
    rng = np.random.default_rng(seed)
    annotations: list[dict[str, Any]] = []
    for image in range(1, images + 1):
        for _ in range(int(rng.integers(0, 6))):
            x, y, w, h = (round(float(v), 2) for v in rng.uniform((0, 0, 8, 8), (90, 90, 150, 150)))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": int(rng.choice(CATEGORIES, p=(0.5, 0.4, 0.1))),
                    "bbox": [x, y, w, h],
                    "area": round(w * h * float(rng.uniform(0.5, 1)), 2),
                    "iscrowd": int(rng.random() < 0.15),
                }
            )
    return {
        "images": [
            {"id": i, "file_name": f"{i}.png", "width": 256, "height": 256}
            for i in range(1, images + 1)
        ],
        "annotations": annotations,
        "categories": [{"id": c, "name": f"class {c}"} for c in CATEGORIES],
    }


def perturb(truth: dict[str, Any], seed: int, ties: bool = False) -> Detections:
    """Some boxes found twice, some missed, some shifted, some called another class, some made up."""
    rng = np.random.default_rng(seed)
    ids = [category["id"] for category in truth["categories"]]
    rows: list[tuple[int, int, np.ndarray]] = []
    for entry in truth["annotations"]:
        for _ in range(int(rng.integers(0, 3))):
            box = np.array(entry["bbox"]) * rng.normal(1, 0.06, 4)
            category = entry["category_id"] if rng.random() < 0.85 else int(rng.choice(ids))
            rows.append((entry["image_id"], category, box))
    for image in truth["images"][::2]:
        rows.append((image["id"], int(rng.choice(ids)), rng.uniform(5, 90, 4)))
    boxes = np.array([box for *_, box in rows], np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    scores = rng.random(len(rows)).astype(np.float32)
    return Detections(
        np.array([row[0] for row in rows], np.int64),
        np.array([row[1] for row in rows], np.int64),
        boxes,
        scores.round(1) if ties else scores,
    )


def reference(truth: dict[str, Any], found: Detections, limits: tuple[float, float]) -> COCOeval:
    """pycocotools, as its demonstration uses it."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = copy.deepcopy(truth)
        coco.createIndex()
        boxes = found.boxes.astype(np.float64)
        boxes[:, 2:] -= boxes[:, :2]
        columns = (found.image_id, boxes, found.scores, found.category_id)
        results = coco.loadRes(
            [
                {
                    "image_id": i.item(),
                    "bbox": b.tolist(),
                    "score": s.item(),
                    "category_id": c.item(),
                }
                for i, b, s, c in zip(*columns, strict=True)
            ]
        )
        run = COCOeval(coco, results, "bbox")
        run.params.areaRng[1][1] = run.params.areaRng[2][0] = limits[0] ** 2
        run.params.areaRng[2][1] = run.params.areaRng[3][0] = limits[1] ** 2
        run.evaluate()
        run.accumulate()
        run.summarize()
    return run


def split_of(folder: Path, truth: dict[str, Any]) -> CocoSplit:
    file = folder / "instances.json"
    file.write_text(json.dumps(truth))
    for image in truth["images"]:
        (folder / image["file_name"]).touch()  # it must be there, but nobody reads it
    return CocoSplit(folder, file, training=False)


def or_nan(values: np.ndarray) -> np.ndarray:
    return np.where(values == -1, np.nan, values)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("truth")


GENERATED = (
    st.integers(0, 10**6),
    st.booleans(),
    st.sampled_from([(32.0, 96.0), (12.0, 40.0)]),
    st.integers(1, 12),
)


@settings(max_examples=15, deadline=None)
@given(*GENERATED)
def test_like_pycocotools(
    folder: Path, seed: int, ties: bool, limits: tuple[float, float], images: int
) -> None:
    assert_like_pycocotools(folder, seed, ties, limits, images)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(*GENERATED)
def test_a_thousand_cases_like_pycocotools(
    folder: Path, seed: int, ties: bool, limits: tuple[float, float], images: int
) -> None:
    assert_like_pycocotools(folder, seed, ties, limits, images)


def assert_like_pycocotools(
    folder: Path, seed: int, ties: bool, limits: tuple[float, float], images: int
) -> None:
    truth = ground_truth(seed, images)
    truth["info"] = {"area_limits": list(limits)}
    found = perturb(truth, seed, ties)
    split = split_of(folder, truth)
    result = evaluate(split, found)
    run = reference(truth, found, limits)
    assert tuple(result.summary) == METRICS
    np.testing.assert_array_equal(list(result.summary.values()), or_nan(run.stats))
    per_class = or_nan(run.eval["precision"][:, :, :, 0, 2].mean(axis=(0, 1)))
    assert list(result.per_class) == ["class 4", "class 9", "class 17"]
    np.testing.assert_array_equal(list(result.per_class.values()), per_class)
    ap = average_precision(result.matches, np.ones((2, images)))
    np.testing.assert_allclose(ap, or_nan(run.stats[[0, 0]]), rtol=0, atol=1e-12)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(0, 3), min_size=12, max_size=12))
def test_weights_are_repeats(folder: Path, seed: int, repeats: list[int]) -> None:
    """An image of weight w counts as w images with its boxes and detections."""
    truth = ground_truth(seed)
    found = perturb(truth, seed)
    matches = evaluate(split_of(folder, truth), found).matches
    repeated = {"images": [], "annotations": [], "categories": truth["categories"]}
    parts = []
    for image, times in zip(truth["images"], repeats, strict=True):
        own = found.image_id == image["id"]
        for _ in range(times):
            new = len(repeated["images"]) + 1
            repeated["images"].append({**image, "id": new})
            repeated["annotations"] += [
                {**entry, "image_id": new, "id": len(repeated["annotations"]) + i}
                for i, entry in enumerate(
                    (e for e in truth["annotations"] if e["image_id"] == image["id"]), start=1
                )
            ]
            ids = np.full(own.sum(), new)
            columns = (found.category_id[own], found.boxes[own], found.scores[own])
            parts.append(Detections(ids, *columns))
    together = Detections.concatenate(parts)
    ap = average_precision(matches, np.array([repeats, np.ones(12)]))[0]
    if len(together):
        expected = or_nan(reference(repeated, together, (32, 96)).stats[:1])[0]
    else:
        expected = 0.0 if any(not e["iscrowd"] for e in repeated["annotations"]) else np.nan
    np.testing.assert_allclose(ap, expected, rtol=0, atol=1e-12)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_compact_matches_give_the_same_ap(folder: Path, seed: int, ties: bool) -> None:
    """Of all detections, as pycocotools has them, on any weighting of the images, bit for bit."""
    truth = ground_truth(seed)
    split, found = split_of(folder, truth), perturb(truth, seed, ties)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Matches, "compact", lambda self: self)
        whole = evaluate(split, found).by_measure
    weights = np.random.default_rng(seed).multinomial(12, np.full(12, 1 / 12), 20)
    for matches in whole.values():
        compact = matches.compact()
        ends = compact.starts[1:][np.diff(compact.starts) > 0] - 1
        assert compact.matched[ends].any(axis=1).all()  # a true positive is a class's last
        assert not (compact.matched & compact.ignored).any()
        expected = average_precision(matches, weights)
        np.testing.assert_array_equal(average_precision(compact, weights), expected)
        again = compact.compact()
        for one, other in zip(vars(compact).values(), vars(again).values(), strict=True):
            np.testing.assert_array_equal(one, other, strict=True)


def test_nothing_found_and_nothing_to_find(tmp_path: Path) -> None:
    truth = ground_truth(0)
    split = split_of(tmp_path, truth)
    nothing = evaluate(split, Detections.concatenate([]))
    assert nothing.summary["AP"] == nothing.summary["AR100"] == 0
    assert bootstrap([nothing.matches], 5).tolist() == [[0] * 5]
    truth["annotations"] = [e for e in truth["annotations"] if e["category_id"] == 4][:1]
    truth["annotations"][0]["iscrowd"] = 0
    result = evaluate(split_of(tmp_path, truth), perturb(truth, 0))
    assert not np.isnan(result.per_class["class 4"]) and np.isnan(result.per_class["class 9"])
    truth["annotations"] = []
    result = evaluate(split_of(tmp_path, truth), perturb(truth, 0))
    assert np.isnan([*result.summary.values(), *result.per_class.values()]).all()
    assert np.isnan(bootstrap([result.matches], 3)).all()


def test_annotation_id_zero_and_missing_fields(tmp_path: Path) -> None:
    """Where pycocotools stops, or takes a found object with the id 0 for not found."""
    truth = ground_truth(3)
    for entry in truth["annotations"]:
        entry |= {"area": entry["bbox"][2] * entry["bbox"][3], "iscrowd": 0}
    found = perturb(truth, 3)
    expected = reference(truth, found, (32, 96)).stats
    for i, entry in enumerate(truth["annotations"]):
        del entry["area"], entry["iscrowd"]
        entry["id"] = i
    result = evaluate(split_of(tmp_path, truth), found)
    np.testing.assert_array_equal(list(result.summary.values()), or_nan(expected))


def test_training_split_evaluates_its_own_images(tmp_path: Path) -> None:
    truth = ground_truth(1)
    split_of(tmp_path, truth)
    split = CocoSplit(tmp_path, tmp_path / "instances.json", training=True)
    assert len(split) < 12
    truth["images"] = [i for i in truth["images"] if i["id"] in split.image_ids]
    truth["annotations"] = [e for e in truth["annotations"] if e["image_id"] in split.image_ids]
    found = perturb(truth, 0)
    expected = reference(truth, found, (32, 96)).stats
    np.testing.assert_array_equal(list(evaluate(split, found).summary.values()), or_nan(expected))


def test_evaluate_prints_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth = ground_truth(0)
    evaluate(split_of(tmp_path, truth), perturb(truth, 0))
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


@pytest.mark.parametrize(("field", "value"), [("image_id", 99), ("category_id", 5)])
def test_strange_detections_are_refused(tmp_path: Path, field: str, value: int) -> None:
    truth = ground_truth(0)
    found = perturb(truth, 0)
    getattr(found, field)[3] = value
    with pytest.raises(ValueError, match=f"{field} {value} is not in .*instances.json"):
        evaluate(split_of(tmp_path, truth), found)


def test_detections_are_kept_whole(tmp_path: Path) -> None:
    truth = ground_truth(0)
    found = perturb(truth, 0)
    matches = evaluate(split_of(tmp_path, truth), found).matches
    folder = tmp_path / "kept"
    folder.mkdir()
    for name, value in (("detections.npz", found), ("matches.npz", matches)):
        value.save(folder / name)
        first = (folder / name).read_bytes()
        value.save(folder / name)
        assert (folder / name).read_bytes() == first
        loaded = type(value).load(folder / name)
        for array, again in zip(vars(value).values(), vars(loaded).values(), strict=True):
            np.testing.assert_array_equal(array, again, strict=True)
    assert sorted(path.name for path in folder.iterdir()) == ["detections.npz", "matches.npz"]


def test_a_save_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, path = perturb(ground_truth(0), 0), tmp_path / "detections.npz"
    found.save(path)
    before = path.read_bytes()

    def full(file: Any, **arrays: Any) -> None:
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(OSError, match="no space left"):
        found.save(path)
    assert path.read_bytes() == before


def test_from_torchvision_outputs() -> None:
    outputs = [
        {
            "boxes": torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]]),
            "labels": torch.tensor([2, 1]),
            "scores": torch.tensor([0.9, 0.8]),
        },
        {
            "boxes": torch.zeros(0, 4),
            "labels": torch.zeros(0, dtype=torch.int64),
            "scores": torch.zeros(0),
        },
    ]
    found = Detections.from_outputs(outputs, [30, 20], [7, 90])
    assert found.image_id.tolist() == [30, 30] and found.category_id.tolist() == [90, 7]
    assert found.boxes.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    kinds = [array.dtype for array in vars(found).values()]
    assert kinds == [np.int64, np.int64, np.float32, np.float32]
    nothing = Detections.from_outputs(outputs[1:], [20], [7, 90])
    assert len(nothing) == 0 and [a.dtype for a in vars(nothing).values()] == kinds
    for label in (0, 3):
        outputs[0]["labels"][0] = label
        with pytest.raises(ValueError, match=r"labels: .*; expected 1 to 2"):
            Detections.from_outputs(outputs, [30, 20], [7, 90])
    with pytest.raises(ValueError, match=r"shapes .*; expected \[D\], \[D\], \[D, 4\] and \[D\]"):
        Detections(found.image_id, found.category_id, found.boxes[:, :3], found.scores)


def runs(folder: Path, number: int, images: int = 40) -> list[Matches]:
    truth = ground_truth(7, images)
    split = split_of(folder, truth)
    return [evaluate(split, perturb(truth, seed)).matches for seed in range(number)]


def test_bootstrap_is_paired_and_blind_to_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = runs(tmp_path, 2)
    both = bootstrap([a, b], 300)
    assert both.shape == (2, 300)
    np.testing.assert_array_equal(both[0], bootstrap([a], 300)[0])
    np.testing.assert_array_equal(both[1], bootstrap([b], 300)[0])
    copied = bootstrap([a, a], 20)
    np.testing.assert_array_equal(copied[0], copied[1])
    rng = np.random.default_rng(0)
    weights = np.concatenate([rng.multinomial(40, np.full(40, 1 / 40), 150) for _ in range(2)])
    assert (weights.sum(axis=1) == 40).all()
    np.testing.assert_allclose(average_precision(a, weights), both[0], rtol=0, atol=1e-12)


def test_bootstrap_spread_is_that_of_new_images(tmp_path: Path) -> None:
    """Against AP on many data sets drawn afresh from the same source."""
    images, draws = 60, 40
    fresh, spreads = [], []
    for draw in range(draws):
        truth = ground_truth(1000 + draw, images)
        for entry in truth["annotations"]:  # two frequent classes: AP varies smoothly
            entry["category_id"] = CATEGORIES[entry["id"] % 2]
        matches = evaluate(split_of(tmp_path, truth), perturb(truth, draw)).matches
        fresh.append(average_precision(matches, np.ones((1, images)))[0])
        spreads.append(bootstrap([matches], 100).std(ddof=1))
    low, high = np.sqrt((draws - 1) / stats.chi2.ppf([0.995, 0.005], draws - 1)) * np.std(
        fresh, ddof=1
    )
    assert low < np.sqrt(np.mean(np.square(spreads))) < high


def test_intervals(tmp_path: Path) -> None:
    a, b = (all_runs := runs(tmp_path, 6))[:3], all_runs[3:]
    ones = np.ones((1, 40))
    ap = np.array([average_precision(run, ones)[0] for run in all_runs])
    drawn = bootstrap(all_runs)
    for got, values, replicates in (
        (interval(a), ap[:3], drawn[:3]),
        (difference(a, b), ap[:3] - ap[3:], drawn[:3] - drawn[3:]),
    ):
        images, seeds = replicates.mean(axis=0).var(ddof=1), values.var(ddof=1) / 3
        quantiles = stats.norm.ppf(0.975), stats.t.ppf(0.975, 2)
        half = np.sqrt(quantiles[0] ** 2 * images + quantiles[1] ** 2 * seeds)
        np.testing.assert_allclose(
            [got.estimate, got.low, got.high],
            values.mean() + half * np.array([0, -1, 1]),
            rtol=1e-10,
        )
        assert (got.seeds, got.images) == (3, 40)
    one = interval(a[:1])
    assert (one.seeds, one.images) == (1, 40)
    np.testing.assert_allclose(
        one.high - one.estimate, stats.norm.ppf(0.975) * drawn[0].std(ddof=1), rtol=1e-10
    )
    same = difference(a, a)
    assert (same.estimate, same.low, same.high) == (0, 0, 0) and not same.distinct
    assert str(same) == "+0.000 [+0.000, +0.000]"


def test_intervals_of_averaged_evaluations(tmp_path: Path) -> None:
    """A seed given as several evaluations counts with their mean AP, in value and in spread."""
    a, b, c, d = runs(tmp_path, 4)
    ap = [average_precision(run, np.ones((1, 40)))[0] for run in (a, b, c, d)]
    drawn = bootstrap([a, b, c, d])
    one = interval([[a, b]])
    assert one.seeds == 1
    np.testing.assert_allclose(one.estimate, (ap[0] + ap[1]) / 2, rtol=1e-12)
    half = stats.norm.ppf(0.975) * (drawn[0] / 2 + drawn[1] / 2).std(ddof=1)
    np.testing.assert_allclose(one.high - one.estimate, half, rtol=1e-10)
    two = difference([[a, b], c], [d, [b, a, c]])
    per_seed = [(ap[0] + ap[1]) / 2 - ap[3], ap[2] - (ap[0] + ap[1] + ap[2]) / 3]
    assert two.seeds == 2
    np.testing.assert_allclose(two.estimate, np.mean(per_seed), rtol=1e-10)
    assert str(interval([[a], [b]])) == str(interval([a, b]))


def test_intervals_refuse_what_does_not_pair(tmp_path: Path) -> None:
    a, b = runs(tmp_path, 2)
    (other,) = runs(tmp_path, 1, images=39)
    with pytest.raises(ValueError, match="runs: 2 against 1"):
        difference([a, b], [a])
    with pytest.raises(ValueError, match="different images"):
        difference([a], [other])
    with pytest.raises(ValueError, match="runs: none given"):
        interval([])


@pytest.mark.parametrize(
    ("low", "high", "distinct"),
    [(-0.1, 0.1, False), (0, 0.1, False), (0.01, 0.1, True), (-0.2, -0.1, True), (-0.1, 0, False)]
    + [(float("nan"), float("nan"), False)],
)
def test_distinct(low: float, high: float, distinct: bool) -> None:
    assert Interval((low + high) / 2, low, high, 3, 9).distinct is distinct


def test_an_interval_over_one_image_is_not_known(tmp_path: Path) -> None:
    """Its replicates are all the same: a width of 0 would say that nothing is uncertain."""
    truth = ground_truth(7, images=2)
    truth["images"] = truth["images"][:1]
    truth["annotations"] = [e for e in truth["annotations"] if e["image_id"] == 1]
    assert truth["annotations"]
    split = split_of(tmp_path, truth)
    one, other = (evaluate(split, perturb(truth, seed)).matches for seed in (0, 1))
    for found in (interval([one]), interval([one, other]), difference([one], [other])):
        assert math.isfinite(found.estimate) and math.isnan(found.low) and math.isnan(found.high)
        assert not found.known and not found.distinct and set(found.reach) == {found.estimate}


def test_interval_is_written_with_signs() -> None:
    assert str(Interval(0.012, -0.003, 0.027, 3, 200)) == "+0.012 [−0.003, +0.027]"


@pytest.mark.parametrize(
    ("seeds", "ratio"), [(1, 1.0), *itertools.product((2, 3, 5), (0.0, 0.3, 3.0))]
)
def test_coverage(seeds: int, ratio: float) -> None:
    """How often the truth (0) is inside, for a known image variance, ``ratio`` times the seeds'."""
    rng, trials = np.random.default_rng(0), 40_000
    image = ratio / seeds
    values = rng.normal(0, 1 if seeds > 1 else 0, (trials, seeds))
    mean = values.mean(axis=1) + rng.normal(0, np.sqrt(image), trials)
    spread = values.var(axis=1, ddof=1) / seeds if seeds > 1 else np.zeros(trials)
    inside = (np.abs(mean) <= half_width(image, spread, seeds)).mean()
    assert inside > 0.945  # what is called a 95 % interval covers 95 % at least …
    assert inside < (0.99 if seeds > 1 and ratio > 0 else 0.955)  # … and no more if one part is all


@pytest.mark.skipif(not REAL, reason="SSSD_TEST_DATA is not set")
@pytest.mark.parametrize("name", ["bccd", "coco128"])
def test_real_data(name: str) -> None:
    images, annotations = find_split(Path(str(REAL)) / name, "val")
    truth = json.loads(annotations.read_text())
    found = perturb(truth, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # bccd's 0 × 0 box
        split = CocoSplit(images, annotations, training=False)
    result = evaluate(split, found)
    expected = reference(truth, found, (32, 96)).stats
    np.testing.assert_array_equal(list(result.summary.values()), or_nan(expected))
    ap = average_precision(result.matches, np.ones((1, len(split))))
    np.testing.assert_allclose(ap, expected[:1], rtol=0, atol=1e-12)
    given = interval([result.matches], replicates=200)
    assert 0 < given.low < result.summary["AP"] < given.high < 1
    assert list(itertools.islice(result.per_class, 1)) == split.class_names[:1]
