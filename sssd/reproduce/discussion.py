"""The report's discussion: what its numbers show, and what they do not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .verdicts import RANGES, Verdict, counts
from .words import counted

SMALL = (
    "Model, images and training are far smaller than the paper's. What holds here holds for a small "
    "detector on small images, and what fails here may hold at the paper's size. The first question "
    "about any result is whether the teacher knew more than its student while it pulled; the findings "
    "about the teachers answer it. The second is what the teacher costs: it learns through the "
    "student's head, which then serves two pyramids. The runs at λ = 0 have this cost and no pull. "
    "The package's page sssd/SCALE.md says what was tried before this scale was chosen."
)
SURPRISE = (
    "With AdamW at the student's learning rate, LGD's teacher stays blind to the class: its attention "
    "does not learn to look up an object's own label, so it finds boxes but not their classes. At a "
    "quarter of that rate it learns them within a few hundred iterations. Where objects are few cells "
    "wide, it knows the class but misses the box, however long it learns: it paints boxes into cells."
)
CERTAINTY = (
    "The last column of the table of verdicts gives the number of seeds that would decide a "
    "comparison; make reports trains them if SEEDS names them. Where it says “more images”, more seeds "
    "are not enough. An effect may also be too small to matter: the column of the smallest effect says "
    "which would have been seen. The paper's own recipe is the profile “paper”; it needs COCO and GPUs."
)
ONE_SEED = (
    "There is one seed: another may give differences as large as those found. Intervals cover the "
    "choice of validation images, but not the choice of the seed. Train a second and a third seed "
    'first (SEEDS="0 1 2").'
)
BUILT_IN = (
    "The images are drawn by a program. They lack what photographs have: classes that look alike, "
    "meaningful clutter, errors in the labels. So a label adds less to what the image shows."
)
RECIPE = (
    "The recipe of the small scale was chosen by the AP of teacher and student on built-in validation "
    "images; the table of its changes lists every field."
)
THREATS = (
    "Many comparisons are made, each with a 95 % interval: of twenty without an effect, one is "
    "expected to seem to have one. Only the statements in the table of verdicts were chosen beforehand, "
    "and of these not the λ whose share is furthest from 50 %.",
    "Where the start weights come from another training, the runs of all seeds share them: the "
    "intervals do not show how much these weights matter.",
    "The papers leave some things open, such as how a feature map becomes a distribution. The "
    "package's page sssd/METHOD.md says how they are read here; another reading may give other numbers.",
    "The detectors here are torchvision's, the paper's are detectron2's: anchors, RoIAlign and losses "
    "differ in small ways. All methods here share them.",
)


def discuss(
    profile: str, built_in: bool, verdicts: Sequence[Verdict], seeds: Sequence[int]
) -> list[tuple[str, Any]]:
    """The section, as blocks of the report.

    Args:
        profile: the report's profile.
        built_in: whether it is on the built-in images.
        verdicts: those of the table of verdicts.
        seeds: those of all runs.
    """
    said = "None of the notebooks of this report gives one of the five verdicts."
    if verdicts:
        said = (
            f"Of the {counted(len(verdicts), 'comparison')} in the table of verdicts, "
            f"{counts(verdicts)}. A comparison that is not decided does not show that two methods are "
            "equal: effects below its smallest effect are not excluded."
        )
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
        *([("paragraph", SMALL)] if small else []),
        *([("subheading", "What surprised us"), ("paragraph", SURPRISE)] if small else []),
        *(
            [
                ("subheading", "How the ranges of the verdicts were set"),
                ("paragraph", RANGES),
                ("subheading", "For more certainty"),
                ("paragraph", CERTAINTY),
            ]
            if verdicts
            else []
        ),
        ("subheading", "Threats to validity"),
        ("items", threats),
    ]
