"""What all notebooks share: parameters, the runs that these name, and how results are written.

A notebook's first cell hands its variables to `Experiment.from_notebook`, which checks them and
builds every configuration before any time is spent. The next cells call `train`, show what `figure`,
`table` and `findings` return, and hand all of it to `save`, which alone writes files.
"""

from __future__ import annotations

import ast
import hashlib
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_args, get_origin

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import Markdown
from matplotlib.figure import Figure
from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from .. import parameters, records
from ..config import DataSource, Frozen, RunConfig
from ..intervals import Interval, difference, interval
from ..inventory import warm_start
from ..profiles import configure, open_data, parse_overrides
from ..runs import Run, Store, home
from . import paper, plots
from .plots import Plot
from .tables import Table
from .verdicts import Verdict
from .words import bracketed, code, counted, listed, markdown, percent

CALIBRATED = {"lgd": 1.0, "sssd": paper.PAPER["equivalent"].numbers["lam"]}
"""The λ at which, in the paper, the methods' distillation has equal shares of the loss."""
NO_PULL = "λ = 0 (no pull)"
"""The control: LGD's teacher learns through the student's head, and pulls at nothing."""
Measure = Literal["AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L"]
MEASURES: tuple[Measure, ...] = get_args(Measure)
NONE = pd.Series([np.nan])
SET_BY_NOTEBOOK = ("method", "lambda1", "lambda2", "t1", "seed", "data")
"""Fields of a run that a notebook sets from its own parameters."""


class ParameterError(ValueError):
    """A parameter of a notebook is wrong; shown as its one sentence, without a traceback."""

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]


class Text(Markdown):
    """Markdown that is shown as its source where it cannot be rendered, as in a terminal."""

    def __repr__(self) -> str:
        return str(self.data)


class Findings(Text):
    """Sentences computed from the results."""

    def __init__(self, sentences: Sequence[str]) -> None:
        super().__init__("\n".join(f"- {markdown(sentence)}" for sentence in sentences))
        self.sentences = sentences


class Experiment(Frozen):
    """The parameters that all notebooks share."""

    notebook: ClassVar[str]
    """Its file name in ``notebooks/``, without the extension; its record has the same name."""
    title: ClassVar[str]
    """The heading of its section in the report."""
    question: ClassVar[str]
    """What is asked and what is done, for a reader who has the report and not the notebook."""
    profile_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """By profile, the parameters that have another default there."""

    profile: str = "mini"
    data: str = ""
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    overrides: str = ""
    output: str = ""
    runs: str = ""
    jobs: int | None = Field(None, ge=1)

    @classmethod
    def defaults(cls, profile: str) -> dict[str, Any]:
        """Every parameter's default in a profile."""
        usual = {name: field.default for name, field in cls.model_fields.items()}
        return usual | {"profile": profile} | dict(cls.profile_defaults.get(profile, {}))

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, given: Any) -> Any:
        profile = given.get("profile", cls.model_fields["profile"].default)
        return (cls.defaults(profile) if isinstance(profile, str) else {}) | given

    @field_validator("*", mode="before")
    @classmethod
    def _lists(cls, given: Any, info: ValidationInfo) -> Any:
        """Take every form of a parameter that `sssd.configure` and papermill take."""
        kind = cls.model_fields[str(info.field_name)].annotation
        if get_origin(kind) is tuple:
            return parameters.values(given)
        return parameters.text(given)

    @field_validator("seeds")
    @classmethod
    def _once(cls, given: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(dict.fromkeys(given))  # a seed given twice is one seed

    @field_validator("overrides")
    @classmethod
    def _leave_parameters(cls, given: str) -> str:
        for name in parse_overrides(given):
            if name in SET_BY_NOTEBOOK or not {name, f"{name}s"}.isdisjoint(cls.model_fields):
                raise ValueError(
                    f"{name} is set by the notebook's own parameters; expected other fields"
                )
        return given

    @classmethod
    def from_notebook(cls, variables: Mapping[str, Any]) -> Self:
        """Check a notebook's parameters and build all its configurations.

        Raises:
            ParameterError: one sentence about the first parameter that is wrong.
        """
        try:
            for name in _injected(variables.get("In", ())):
                if name not in cls.model_fields:
                    known = ", ".join(cls.model_fields)
                    raise ValueError(f"{name}: unknown parameter; the parameters are {known}")
            given = {name: variables[name] for name in cls.model_fields if name in variables}
            experiment = cls(**{k: v for k, v in given.items() if v is not None})
            experiment.configs  # noqa: B018 (built here, so that an error stops the first cell)
            parameters.check_folder("output", experiment.folder)
            return experiment
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            message = f"{place}: {first['input']!r} is not valid: {first['msg']}"
            raise ParameterError(message) from None
        except ValueError as error:
            raise ParameterError(str(error)) from None

    # --- the runs ---------------------------------------------------------------------------------

    def configure(self, **fields: Any) -> list[RunConfig]:
        """A run for each seed, with this experiment's profile, data and overrides."""
        common: dict[str, Any] = {"data": self.source, "overrides": self.overrides, **fields}
        return [configure(self.profile, **common, seed=seed) for seed in self.seeds]

    recorded: ClassVar[DataSource | None] = None
    """The data within `recorded_data`."""

    @cached_property
    def source(self) -> DataSource:
        return self.recorded or open_data(self.profile, self.data or None)

    @cached_property
    def configs(self) -> dict[Any, list[RunConfig]]:
        """The runs of each line of the figure or row of the table, one for each seed."""
        raise NotImplementedError

    @property
    def needed(self) -> list[RunConfig]:
        """All of `configs` in one list."""
        return [config for group in self.configs.values() for config in group]

    @cached_property
    def store(self) -> Store:
        return Store(self.runs or None)

    def train(self) -> dict[Any, list[Run]]:
        """All runs of the experiment; those that are missing are trained, with progress."""
        done = {run.config.id: run for run in self.store.get(self.needed, jobs=self.jobs)}
        return {key: [done[c.id] for c in group] for key, group in self.configs.items()}

    @property
    def further(self) -> str:
        """What `train_further` trains, in words; empty: nothing."""
        return ""

    def train_further(self) -> None:
        """Train the runs that depend on the results of `train`."""

    def _repr_markdown_(self) -> str:
        """What is going to be trained."""
        if not self.needed:
            return f"Nothing to train. Results go to {code(self.place)}."
        plan, first = self.store.plan(self.needed), self.needed[0]
        names = "".join(
            f"\n- `{job.config.id}` {code(job.config.label())}, {job.length} iterations"
            + ", warm start" * bool(warm_start(job.config.canonical()))
            for job in plan.values()
        )
        return (
            f"**{self.profile}** on **{markdown(self.source.name)}**, "
            f"seed{'s' * (len(self.seeds) > 1)} {listed(self.seeds)}, "
            f"{paper.NAMES[first.detector]} {paper.NAMES[first.backbone]}. "
            f"This rests on {counted(len(self.needed), 'run')}. To be trained, with the runs that "
            f"these start from: {len(plan) or 'none'}.{names}\n\n"
            f"Runs are kept in {code(self.store.root.name)}, results go to {code(self.place)}."
        )

    __repr__ = _repr_markdown_

    # --- the results ------------------------------------------------------------------------------

    def plot(self, name: str, figure: Figure, caption: str, note: str, animation: str = "") -> Plot:
        """A finished figure; profile, data and ``note`` stand in its corner."""
        if self.needed:  # else it is of no profile and no data
            note = f"{self.profile} · {self.source.name} · {note}"
        plots.mark(figure, note, self.profile == "smoke" and bool(self.needed))
        # Each drawing shifts a constrained layout a little: a figure that was shown before it is
        # written would have other bytes than one that was not.
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        plt.close(figure)  # a notebook shows what its cell returns, and would show this twice
        return Plot(name, figure, caption, animation)

    def paper(self) -> Text:
        """The paper's statements on this notebook's question, to be read beside ours."""
        statements = [s for s in paper.PAPER.values() if s.notebook == self.notebook]
        return Text("\n".join(f"> **The paper**: {said}.\n" for said in statements))

    def verdicts(self, runs: Mapping[Any, list[Run]]) -> tuple[Verdict, ...]:
        """The verdicts on the report's first page that these runs can give."""
        return ()

    @cached_property
    def folder(self) -> Path:
        """Where `save` writes: ``output``, else a folder in ``reports/tries/`` named by its parameters.

        So a try overwrites no report: only ``make reports`` writes reports, and gives ``output``.
        """
        if self.output:
            return Path(self.output).expanduser().resolve()
        changed = {k: v for k, v in self.changed.items() if k not in ("profile", "data")}
        words = [self.notebook, self.profile, *([self.source.name] if self.data else [])]
        words += [f"{name}={value}" for name, value in changed.items()]
        name = re.sub(r"[^\w.,=+-]+", "_", "-".join(words))
        if len(name) > 120:  # file systems end at 255 bytes
            name = f"{name[:100]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        return home() / "reports" / "tries" / name

    @property
    def place(self) -> str:
        """`folder` as it is shown: relative to the checkout."""
        inside = self.folder.is_relative_to(home())
        return str(self.folder.relative_to(home())) if inside else self.folder.name

    def save(self, runs: Mapping[Any, list[Run]], *results: Plot | Table | Findings) -> Text:
        """Write figures and tables, then ``<notebook>.json``, from which the report is assembled.

        Args:
            runs: the runs that the results rest on.
            results: what the cells above showed.
        """
        every = [run for group in runs.values() for run in group]
        record = {
            "seeds": list(self.seeds),
            "command": self.command,
            "parameters": self.parameters,
            "figures": {x.name: x.caption for x in results if isinstance(x, Plot)},
            "tables": {x.name: x.caption for x in results if isinstance(x, Table)},
            "findings": [s for x in results if isinstance(x, Findings) for s in x.sentences],
            "verdicts": [verdict.record() for verdict in self.verdicts(runs)],
            "compared": sorted({pair for run in every for pair in run.compared}),
            "runs": {id: run for id, run in sorted((r.config.id, r.record()) for r in every)},
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        shown = [x for x in results if not isinstance(x, Findings)]
        files = {name: content for x in shown for name, content in x.files().items()}
        for name, content in files.items():
            records.write(self.folder / name, content)
        name = f"{self.notebook}.json"
        records.write_json(record, self.folder / name)
        return Text(f"Written to {code(self.place)}: {code(', '.join([*files, name]))}.")

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters that results depend on; of the data only the name."""
        given = self.model_dump(mode="json", exclude={"output", "runs", "jobs"})
        return given | ({"data": self.source.name} if self.data else {})

    @property
    def changed(self) -> dict[str, str]:
        """The parameters that differ from the profile's defaults, as papermill takes them."""
        profile = Experiment.model_fields["profile"].default
        usual = self.defaults(self.profile) | {"profile": profile}
        given = {k: v for k, v in self.parameters.items() if getattr(self, k) != usual[k]}
        return {
            k: ",".join(map(str, v)) if isinstance(v, list) else str(v) for k, v in given.items()
        }

    @property
    def command(self) -> str:
        """The command that rebuilds this notebook's results; it names no path of this machine."""
        given = self.changed | ({"data": f"path/to/{self.source.name}"} if self.data else {})
        options = "".join(f" -p {name} {shlex.quote(v)}" for name, v in given.items())
        return f"papermill notebooks/{self.notebook}.ipynb out.ipynb{options}"

    @property
    def seeds_in_words(self) -> str:
        """How many seeds there are, such as ``3 seeds``."""
        return counted(len(self.seeds), "seed")

    @property
    def averaged(self) -> str:
        """What a caption says about the AP in its table."""
        return f"points of 100, mean over {self.seeds_in_words}, with 95 % intervals over {self.covers}"

    @property
    def covers(self) -> str:
        """What the bootstrap's intervals cover."""
        return "seeds and images" if len(self.seeds) > 1 else "images only, as there is one seed"

    def note(self, run: Run, seeds: str = "") -> str:
        """The corner of a figure with intervals: the number of images, as of ``run``, and seeds."""
        images = counted(len(run.matches().image_ids), "image")
        return f"n = {images}, {seeds or self.seeds_in_words} · 95 % intervals"


@contextmanager
def recorded_data(source: DataSource) -> Iterator[None]:
    """Let all experiments have ``source`` as their data; its files need not exist."""
    Experiment.recorded = source
    try:
        yield
    finally:
        Experiment.recorded = None


def _injected(cells: Sequence[str]) -> set[str]:
    """Names set by the cell that papermill injects, as papermill itself accepts unknown ones.

    The latest version of that cell counts, if it was corrected and executed again.
    ``PAPERMILL_INPUT_PATH`` and ``PAPERMILL_OUTPUT_PATH`` are papermill's own.
    """
    for cell in reversed(cells):
        if cell.startswith("# Parameters\n"):
            names = (node for node in ast.walk(ast.parse(cell)) if isinstance(node, ast.Name))
            set_here = {node.id for node in names if isinstance(node.ctx, ast.Store)}
            return {name for name in set_here if not name.startswith("PAPERMILL_")}
    return set()


# --- what figures and tables ask of a group of runs, one for each seed -----------------------------


def evaluated(run: Run) -> list[int]:
    """The iterations at which a run was evaluated."""
    return [int(t) for t in run.evaluations()["iteration"]]


def final(runs: Sequence[Run], measure: str = "AP", test: bool = False) -> Interval:
    """Final measure with its interval, over seeds and images; ``test`` as in `Run.matches`."""
    return interval([run.matches(measure=measure, test=test) for run in runs])


def mean_of(runs: Sequence[Run], measure: str) -> float:
    """Final measure, mean over seeds; NaN where it was not evaluated."""
    return float(np.mean([run.evaluations().get(measure, NONE).iloc[-1] for run in runs]))


def measures(runs: Sequence[Run]) -> dict[str, str]:
    """Final measures and the teacher's AP as a table's cells."""
    others: dict[str, str] = {measure: percent(mean_of(runs, measure)) for measure in MEASURES[1:]}
    teacher = percent(mean_of(runs, "teacher_AP"))
    return {"AP [95 %]": bracketed(final(runs)), **others, "teacher's AP": teacher}


def about_measures(runs: Mapping[Any, Sequence[Run]]) -> str:
    """What a caption says about `measures`."""
    run = next(iter(runs.values()))[0]
    small, large = run.files.last_evaluation()["area_limits"]
    return (
        f"AP_S, AP_M, AP_L: objects below {small:g}² pixels, between, and from {large:g}² on; AP may "
        "be below all three, as each leaves out false detections of other sizes. The teacher's AP is "
        "what the same head detects in the teacher's pyramid, made with the labels of the validation "
        "images."
    )


def gain(
    ours: Sequence[Run], theirs: Sequence[Run], measure: str = "AP", test: bool = False
) -> Interval:
    """Final measure of some runs minus that of others, paired by seed and image."""
    mine, other = ([r.matches(measure=measure, test=test) for r in g] for g in (ours, theirs))
    return difference(mine, other)
