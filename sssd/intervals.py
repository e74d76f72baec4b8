"""95 % intervals of AP over images (bootstrap) and seeds (Student's t)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from scipy.stats import norm
from scipy.stats import t as student_t
from torch import Tensor

from .evaluation import Matches


def average_precision(matches: Matches, weights: np.ndarray) -> np.ndarray:
    """AP of R data sets in which image i occurs ``weights[r, i]`` times: [R, I] → float64 [R].

    With weights of 1 it is pycocotools' AP (precision envelope at 101 recalls, mean over IoU
    thresholds and over the classes that have ground truth); NaN if no class has ground truth.
    """
    given = torch.from_numpy(np.ascontiguousarray(weights, np.float64))
    # Only 64 at a time, so that the arrays fit into a processor's cache.
    return np.concatenate([_average_precision(matches, part.T) for part in given.split(64)])


def _average_precision(matches: Matches, weights: Tensor) -> np.ndarray:
    """`average_precision` for weights [I, R]; torch's cumulative sums are faster than numpy's."""
    total, classes = torch.zeros(2, weights.shape[1], dtype=torch.float64)
    epsilon = float(np.spacing(1))
    weights = weights.contiguous()
    for k in np.flatnonzero(matches.objects.any(axis=1)):
        of_class = slice(matches.starts[k], matches.starts[k + 1])
        matched, ignored = matches.matched[of_class], matches.ignored[of_class]
        objects = (torch.from_numpy(matches.objects[k])[:, None] * weights).sum(dim=0)
        drawn = weights.index_select(0, torch.from_numpy(matches.image[of_class]))  # [D, R]
        seen = drawn.cumsum(dim=0)  # detections so far, including the ignored ones
        for m, g in zip(matched.T, ignored.T, strict=True):
            # Recall and the envelope of the precision change only at true positives.
            hit, skip = (torch.from_numpy(np.flatnonzero(x)) for x in (m & ~g, g))
            true, counted = drawn.index_select(0, hit).cumsum_(dim=0), seen.index_select(0, hit)
            if len(skip):
                skipped = drawn.index_select(0, skip).cumsum_(dim=0)
                skipped = torch.cat([torch.zeros_like(seen[:1]), skipped])
                counted -= skipped.index_select(0, torch.searchsorted(skip, hit))
            precision = true / counted.add_(epsilon)
            envelope = precision.flip(0).cummax(dim=0).values.flip(0)
            recall = true.div_(objects.clamp(min=1))
            # How many of the 101 recalls j · 0.01 are reached; the comparison of pycocotools
            # decides about the last of them, for which rounding may be wrong.
            reached = (recall * 100).add_(1e-9).floor_()
            reached.add_(reached * 0.01 <= recall)
            reached[1:] -= reached[:-1].clone()  # recalls that each true positive newly reaches
            total += envelope.mul_(reached).sum(dim=0) / (101 * matched.shape[1])
        classes += objects > 0
    return torch.where(classes > 0, total / classes, torch.nan).numpy()


def bootstrap(runs: Sequence[Matches], replicates: int = 1000) -> np.ndarray:
    """AP of each run in each bootstrap replicate, [runs, replicates].

    A replicate's images are drawn with replacement. All runs have the same draws, so that
    differences between them are paired by image.

    Raises:
        ValueError: the runs were not evaluated on the same images.
    """
    if any(not np.array_equal(runs[0].image_ids, other.image_ids) for other in runs):
        raise ValueError("matches: runs on different images; expected the same validation images")
    return np.stack([_replicated(run, replicates) for run in runs])


@lru_cache(maxsize=4096)  # a notebook's figure, table and findings need the same ones
def _replicated(matches: Matches, replicates: int) -> np.ndarray:
    return average_precision(matches, _drawn(len(matches.image_ids), replicates))


@lru_cache(maxsize=4)  # drawing them takes as long as the AP of some runs
def _drawn(images: int, replicates: int) -> np.ndarray:
    """How often each image occurs in each replicate: [replicates, images]."""
    return np.random.default_rng(0).multinomial(images, np.full(images, 1 / images), replicates)


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval, over ``seeds`` runs and ``images`` validation images.

    The ends are NaN if the interval is unknown: with a single image, or a single number. As text,
    its numbers have signs.
    """

    estimate: float
    low: float
    high: float
    seeds: int
    images: int

    @property
    def known(self) -> bool:
        return self.low == self.low

    @property
    def reach(self) -> tuple[float, float, float]:
        """What an axis has to show: low, estimate and high; if unknown, the estimate alone."""
        return (self.low, self.estimate, self.high) if self.known else (self.estimate,) * 3

    @property
    def distinct(self) -> bool:
        """Whether 0 is outside the interval."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        ends = (self.estimate, self.low, self.high)
        estimate, low, high = (f"{value:+.3f}".replace("-", "−") for value in ends)
        return f"{estimate} [{low}, {high}]"


def half_width(image_variance: Any, seed_variance: Any, seeds: int) -> Any:
    """Half of the 95 % interval of a mean over seeds, elementwise for arrays.

    ``seed_variance`` is s²/n of the per-seed values. Its root is multiplied by Student's t quantile
    (n − 1 degrees of freedom), that of ``image_variance`` by the normal one; both are added as
    squares. In simulations such intervals cover 95 % if one part dominates, and more otherwise; the
    narrower ones of Welch and Satterthwaite cover 92 % with three seeds and 87 % with two.
    """
    quantile = student_t.ppf(0.975, seeds - 1) if seeds > 1 else 0.0
    return np.sqrt(norm.ppf(0.975) ** 2 * image_variance + quantile**2 * seed_variance)


def over_seeds(values: Sequence[float]) -> Interval:
    """The mean of a number that each run gives, with Student's t interval over the runs.

    With a single value the ends are NaN; without values there is a ValueError.
    """
    if not values:
        raise ValueError("values: none given; expected at least one")
    each, n = np.asarray(values, np.float64), len(values)
    half = float(half_width(0.0, each.var(ddof=1) / n, n)) if n > 1 else float("nan")
    mean = float(each.mean())
    return Interval(mean, mean - half, mean + half, n, 0)


Runs = Sequence[Matches | Sequence[Matches]]
"""One entry per seed: a run's matches, or those of several of its evaluations, to be averaged."""


def interval(runs: Runs, replicates: int = 1000, minus: Runs = ()) -> Interval:
    """The AP of one method: mean over its runs (one per seed), all on the same images.

    The variance is that of the images (bootstrap of the mean over seeds) plus that of the seeds.
    With other runs as ``minus`` it is the difference, paired by position and by image.

    Raises:
        ValueError: no runs, or not on the same images.
    """
    n = len(runs)
    if n == 0:
        raise ValueError("runs: none given; expected at least one")
    each = [[run] if isinstance(run, Matches) else list(run) for run in [*runs, *minus]]
    flat = [matches for evaluations in each for matches in evaluations]
    images = len(flat[0].image_ids)
    # The first column is the data set as it is, the others are its replicates.
    replicated = bootstrap(flat, replicates)  # first: it checks the images
    once = np.stack([average_precision(m, np.ones((1, images))) for m in flat])
    columns = np.concatenate([once, replicated], axis=1)
    ends = np.cumsum([len(evaluations) for evaluations in each])[:-1]
    means = np.stack([part.mean(axis=0) for part in np.split(columns, ends)])
    means = means[:n] - means[n:] if len(minus) else means
    values, drawn = means[:, 0], means[:, 1:]
    # In a tiny data set a replicate may have no object: its AP is undefined, and left out.
    # With a single image all replicates are the same, and the variance over images is unknown.
    image_variance = float(np.nanvar(drawn.mean(axis=0), ddof=1)) if images > 1 else np.nan
    seed_variance = float(values.var(ddof=1)) / n if n > 1 else 0.0
    half, mean = float(half_width(image_variance, seed_variance, n)), float(values.mean())
    return Interval(mean, mean - half, mean + half, n, images)


def difference(runs_a: Runs, runs_b: Runs) -> Interval:
    """AP(a) − AP(b): mean over seeds, paired by position (runs of the same seed) and by image.

    Raises:
        ValueError: no runs, different numbers of them, or not on the same images.
    """
    if len(runs_a) != len(runs_b):
        message = "expected the same number, one of each method per seed"
        raise ValueError(f"runs: {len(runs_a)} against {len(runs_b)}; {message}")
    return interval(runs_a, minus=runs_b)
