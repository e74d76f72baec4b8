"""The report's discussion: what its numbers allow to be said, and what they do not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .verdicts import Verdict, counts
from .words import counted

SMALL = (
    "Model, images and training are far smaller than the paper's. What holds here is said of a small "
    "detector on small images, and what fails here may hold at the paper's size. The first question "
    "to a result, for or against, is whether the teacher knew more than its student while it pulled; "
    "the sentences on the teachers, among the findings, answer it. The second is what the teacher "
    "costs: it learns through the student's head, which then serves two pyramids. "
    "The runs at λ = 0 have that cost and no pull. What was tried before this scale was chosen is on "
    "the package's page on the scale (sssd/SCALE.md)."
)
SURPRISE = (
    "With AdamW at the student's learning rate LGD's teacher stays blind to the class: its attention "
    "does not learn that an object looks up its own label, and it finds boxes without names. At a "
    "quarter of that rate it wakes within some hundred iterations. And where objects are few cells "
    "wide it knows the class but misses the box, however long it learns: it paints boxes into cells."
)
CERTAINTY = (
    "The last column of the first page's table gives the number of seeds that decide a comparison, "
    "with a probability of 80 %, if value and spread stay as they are; SEEDS of make reports trains "
    "them. Where it says “more images”, seeds alone do not do. An effect may also be too small to "
    "matter: the column of the smallest effect says what would have been seen. The paper's own "
    "recipe is the profile “paper”; it needs COCO and GPUs."
)
ONE_SEED = (
    "One seed: another one may give differences as large as those found. Intervals cover the choice "
    "of validation images and not the choice of the run. Train a second and a third seed first "
    '(SEEDS="0 1 2").'
)
BUILT_IN = (
    "The images are drawn by a program. They lack what photographs have: fine classes, clutter with a "
    "meaning, labels with errors. A label tells less that the image does not."
)
RECIPE = (
    "The recipe of the small scale was chosen by the teacher's AP and by AP on validation images made "
    "in the same way as these; the table of what it changes has every field."
)
THREATS = (
    "Many comparisons are made, each with an interval of 95 %: of twenty without an effect, one is "
    "expected to look like one. Only the comparisons of the first page were chosen beforehand.",
    "The runs of all seeds share their start weights, where these come from another training: how "
    "much those matter is not in the intervals.",
    "What the papers leave open, as how a feature map becomes a distribution, is read here as the "
    "package's page on the method says. Another reading may give other numbers.",
    "The detectors are torchvision's and the paper's are detectron2's; anchors, RoIAlign and losses "
    "differ in small ways. All methods here share them.",
)


def discuss(
    profile: str, built_in: bool, verdicts: Sequence[Verdict], seeds: Sequence[int]
) -> list[tuple[str, Any]]:
    """The section, as blocks of the report.

    Args:
        profile: the report's.
        built_in: whether it is on the built-in images.
        verdicts: those of the first page.
        seeds: of all runs.
    """
    said = "None of the notebooks of this report gives one of the five verdicts."
    if verdicts:
        said = (
            f"Of the {counted(len(verdicts), 'comparison')} of the first page, {counts(verdicts)}. "
            "A comparison that is not decided is no sign that two methods are equal: it could not "
            "have seen an effect below its smallest one. The last column says what decides it."
        )
    against = [
        f"Against the paper: {own.statement} is {own.estimate} {own.points}."
        for own in verdicts
        if own.verdict == "contradicted"
    ]
    small = profile != "paper"
    threats = [
        *([ONE_SEED] if len(seeds) == 1 else []),
        *([BUILT_IN] if built_in else []),
        *([RECIPE] if small else []),
        *THREATS,
    ]
    return [
        ("heading", "Discussion"),
        ("paragraph", said),
        *([("items", against)] if against else []),
        *([("paragraph", SMALL)] if small else []),
        *([("subheading", "What surprised"), ("paragraph", SURPRISE)] if small else []),
        *([("subheading", "For more certainty"), ("paragraph", CERTAINTY)] if verdicts else []),
        ("subheading", "Threats to validity"),
        ("items", threats),
    ]
