"""The report's discussion: what its numbers allow to be said, and what they do not."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .blocks import Block, Items, Text
from .teaching import OPENINGS
from .verdicts import POWER, Verdict, counts
from .words import counted


def discuss(
    profile: str,
    built_in: bool,
    verdicts: Sequence[Verdict],
    findings: Sequence[str],
    seeds: Sequence[int],
) -> list[Block]:
    """The section, from the same numbers as the first page.

    Args:
        profile: the report's.
        built_in: whether it is on the built-in images.
        verdicts: those of the first page.
        findings: of all notebooks; the sentences on the teachers are taken from them.
        seeds: of all runs.
    """
    small = profile != "paper"
    blocks: list[Block] = [Text("Discussion", "heading"), Text("What can be said", "subheading")]
    blocks += [Text(_decided(verdicts)), *_open(verdicts)]
    if small:
        blocks.append(
            Text(
                "Model, images and training are far smaller than the paper's. What holds here is "
                "said of a small detector on small images, and what fails here may hold at the "
                "paper's size. The first question to a result, for or against, is whether the "
                "teacher knew more than its student while it pulled; the sentences on the teachers "
                "below answer it. The second is what the teacher costs: it learns through the "
                "student's head, which then serves two pyramids. The runs at λ = 0 have that cost "
                "and no pull. What was tried before this scale was chosen is on the package's page "
                "on the scale (sssd/SCALE.md)."
            )
        )
    against = [own for own in verdicts if own.verdict == "contradicted"]
    teachers = [sentence for sentence in findings if sentence.startswith(OPENINGS)]
    if against or teachers:
        blocks.append(Text("What surprised", "subheading"))
        against_it = [
            f"Against the paper: {own.statement} is {own.estimate} {own.points}." for own in against
        ]
        blocks.append(Items([*against_it, *teachers]))
    blocks += [Text("For more certainty", "subheading"), Items(_more(verdicts, seeds, small))]
    threats = _threats(built_in, seeds, small)
    return [*blocks, Text("Threats to validity", "subheading"), Items(threats)]


def _decided(verdicts: Sequence[Verdict]) -> str:
    if not verdicts:
        return "None of the notebooks of this report gives one of the five verdicts."
    return (
        f"Of the {counted(len(verdicts), 'comparison')} of the first page, {counts(verdicts)}. A "
        "comparison that is not decided is no sign that two methods are equal: it could not have "
        "seen an effect below its smallest one."
    )


def _open(verdicts: Sequence[Verdict]) -> list[Block]:
    said = [
        f"{own.statement}: {own.estimate} {own.points}; "
        + (
            f"{own.seen} would have been seen."
            if own.seen
            else "with one seed there is no interval."
        )
        for own in verdicts
        if own.verdict == "not decided"
    ]
    return [Items(said)] if said else []


def _more(verdicts: Sequence[Verdict], seeds: Sequence[int], small: bool) -> list[str]:
    """What a reader should do who wants more certainty."""
    undecided = [own for own in verdicts if own.verdict == "not decided"]
    said = []
    if len(seeds) == 1:
        said.append(
            'Train a second and a third seed first (SEEDS="0 1 2"): with one, the spread between '
            "runs is not known, and neither is how many seeds it takes."
        )
    for own in undecided:
        if own.seeds_needed == math.inf:
            said.append(
                f"{own.statement}: more validation images come first; seeds alone do not do."
            )
        elif own.seeds_needed is not None:
            said.append(
                f"{own.statement}: {own.seeds_needed:,.0f} seeds decide it with a probability of "
                f"{100 * POWER:g} %, if value and spread stay as they are."
            )
    if small:
        said.append(
            "Look at a larger model or at other images where the teacher is behind its student: "
            "more seeds of such a run make its interval narrower and the effect no larger."
        )
        said.append("The paper's own recipe is the profile “paper”: it needs COCO and GPUs.")
    return said


def _threats(built_in: bool, seeds: Sequence[int], small: bool) -> list[str]:
    said = []
    if len(seeds) == 1:
        said.append(
            "One seed: another one may give differences as large as those found. Intervals cover "
            "the choice of validation images and not the choice of the run."
        )
    if built_in:
        said.append(
            "The images are drawn by a program. They lack what photographs have: fine classes, "
            "clutter with a meaning, labels with errors. A label tells less that the image does not."
        )
    if small:
        said.append(
            "The recipe of the small scale was chosen by the teacher's AP and by AP on validation "
            "images made in the same way as these; the table of what it changes has every field."
        )
    return [
        *said,
        "Many comparisons are made, each with an interval of 95 %: of twenty without an effect, one "
        "is expected to look like one. Only the comparisons of the first page were chosen beforehand.",
        "The best λ of a sweep is chosen on the images that it is judged on, which flatters it. The "
        "verdicts use the λ of the paper's calibration.",
        "The runs of all seeds share their start weights, where these come from another training: "
        "how much those matter is not in the intervals.",
        "What the papers leave open, as how a feature map becomes a distribution, is read here as the "
        "package's page on the method says. Another reading may give other numbers.",
        "The detectors are torchvision's and the paper's are detectron2's; anchors, RoIAlign and "
        "losses differ in small ways. All methods here share them.",
    ]
