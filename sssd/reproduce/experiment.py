"""What all notebooks share: parameters, the runs that these name, and the record of what came out.

A notebook's first cell hands its variables to `from_notebook`, which checks them and builds every
configuration before any time is spent; then it calls `train`, `figure`, `table` and `findings`.
"""

from __future__ import annotations

import ast
import json
import shlex
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self, get_origin

import pandas as pd
from IPython.display import Markdown
from matplotlib.figure import Figure
from pydantic import Field, PrivateAttr, ValidationError, ValidationInfo, field_validator

from ..config import DataSource, Frozen, RunConfig
from ..engine import open_split
from ..intervals import Interval, difference
from ..profiles import configure, open_data, parse_overrides
from ..runs import Run, Store, home
from ..schedules import learning_rate
from . import paper, plots, tables

CALIBRATED = {"lgd": 1.0, "sssd": paper.PAPER["equivalent"].numbers["lam"]}
"""The λ at which the methods' distillation has equal shares of the loss: the paper's 1 and 50."""


DECIDED = ("method", "lambda1", "lambda2", "t1", "seed", "data")
"""Fields of a run that a notebook sets from its own parameters."""


class ParameterError(ValueError):
    """A parameter of a notebook is wrong; shown as its one sentence, without a traceback."""

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]


class Experiment(Frozen):
    """The parameters that all notebooks share."""

    notebook: ClassVar[str]
    """Its file name in ``notebooks/``, without the extension; also of what it saves."""
    title: ClassVar[str]
    """What the report calls its section."""
    question: ClassVar[str]
    """What is asked and what is done, for who reads the report and not the notebook."""

    _figures: dict[str, str] = PrivateAttr(default_factory=dict)
    _tables: dict[str, str] = PrivateAttr(default_factory=dict)

    profile: str = "mini"
    data: str = ""
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    overrides: str = ""
    output: str = ""
    runs: str = ""
    jobs: int | None = Field(None, ge=1)

    @field_validator("*", mode="before")
    @classmethod
    def _lists(cls, given: Any, info: ValidationInfo) -> Any:
        """papermill's ``-p seeds 0`` gives a number, ``-p seeds 0,1,2`` a text."""
        kind = cls.model_fields[str(info.field_name)].annotation
        if get_origin(kind) is not tuple:
            return given
        if isinstance(given, str):
            return tuple(given.replace(",", " ").split())
        return (given,) if isinstance(given, int | float) else given

    @field_validator("seeds")
    @classmethod
    def _once(cls, given: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(dict.fromkeys(given))  # a seed given twice is one seed

    @field_validator("overrides")
    @classmethod
    def _leave_parameters(cls, given: str) -> str:
        for name in parse_overrides(given):
            if name in DECIDED or not {name, f"{name}s"}.isdisjoint(cls.model_fields):
                raise ValueError(
                    f"{name} is set by the notebook's own parameters; expected other fields"
                )
        return given

    def configure(self, **fields: Any) -> list[RunConfig]:
        """A run of this experiment's profile, data and overrides, one a seed."""
        return [
            configure(self.profile, data=self.source, overrides=self.overrides, **fields, seed=seed)
            for seed in self.seeds
        ]

    @classmethod
    def from_notebook(cls, variables: Mapping[str, Any]) -> Self:
        """Check a notebook's parameters and build all its configurations.

        Raises:
            ParameterError: one sentence on the first parameter that is wrong.
        """
        try:
            for name in _injected(variables.get("In", ())):
                if name not in cls.model_fields:
                    known = ", ".join(cls.model_fields)
                    raise ValueError(f"{name}: unknown parameter; the parameters are {known}")
            given = {name: variables[name] for name in cls.model_fields if name in variables}
            experiment = cls(**{k: v for k, v in given.items() if v is not None})
            experiment.configs  # noqa: B018 (built here, so that what is wrong stops the first cell)
            return experiment
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            message = f"{place}: {first['input']!r} is not valid: {first['msg']}"
            raise ParameterError(message) from None
        except ValueError as error:
            raise ParameterError(str(error)) from None

    @cached_property
    def source(self) -> DataSource:
        return open_data(self.profile, self.data or None)

    @cached_property
    def configs(self) -> dict[Any, list[RunConfig]]:
        """The runs by what they are in the figure, one a seed."""
        raise NotImplementedError

    @cached_property
    def store(self) -> Store:
        return Store(self.runs or None)

    @cached_property
    def folder(self) -> Path:
        """Where figures and tables go: by default ``reports/<profile>`` of the checkout."""
        if self.output:
            return Path(self.output).expanduser().resolve()
        name = self.profile + (f"-{self.source.name}" if self.data else "")
        return home() / "reports" / name

    def train(self) -> dict[Any, list[Run]]:
        """Every run of the experiment, trained where missing, with progress."""
        flat = [config for group in self.configs.values() for config in group]
        done = {run.config.id: run for run in self.store.get(flat, jobs=self.jobs)}
        return {key: [done[c.id] for c in group] for key, group in self.configs.items()}

    @property
    def further(self) -> str:
        """What `train_further` trains, in words; empty: nothing."""
        return ""

    def train_further(self) -> None:
        """Train what depends on how `train`'s runs came out."""

    def _repr_markdown_(self) -> str:
        """What will be trained, before it is."""
        configs = [c for group in self.configs.values() for c in group]
        if not configs:
            return f"Nothing to train. Results in `{self.folder.name}/`."
        plan = self.store.plan(configs)
        first = configs[0]
        names = "".join(
            f"\n- `{job.config.id}` {job.config.label()}, {job.length} iterations"
            for job in plan.values()
        )
        return (
            f"**{self.profile}** on **{self.source.name}**, seeds {', '.join(map(str, self.seeds))}, "
            f"{paper.NAMES[first.detector]} {paper.NAMES[first.backbone]}; "
            f"{len(configs)} runs asked for, {len(plan)} to be trained.{names}\n\n"
            f"Runs in `{self.store.root.name}/`, results in `{self.folder.name}/`."
        )

    def save_figure(self, figure: Figure, name: str, caption: str, note: str) -> Figure:
        """Save a figure as SVG and PNG, and remember its caption for the record."""
        self._figures[name] = caption
        return plots.finish(figure, self.folder, name, note, self.profile == "smoke")

    def save_table(self, table: tables.Table, name: str) -> tables.Table:
        """Save a table as CSV, Markdown and LaTeX, and remember its caption for the record."""
        self._tables[name] = table.caption
        return table.save(self.folder, name)

    def paper(self) -> Markdown:
        """The paper's statements on this notebook's question, to be read beside ours."""
        statements = [s for s in paper.PAPER.values() if s.notebook == self.notebook]
        return Markdown("\n".join(f"> **The paper**: {said}.\n" for said in statements))

    def conclude(self, runs: Mapping[Any, list[Run]], findings: Sequence[str]) -> Markdown:
        """Write ``<notebook>.json``, from which the report is assembled; show the findings.

        Every finding is a sentence computed from the results.
        """
        every = {run.config.id: run for group in runs.values() for run in group}
        given = self.model_dump(
            mode="json", exclude_defaults=True, exclude={"output", "runs", "jobs"}
        )
        given |= {"data": self.source.name} if self.data else {}
        options = "".join(f" -p {k} {_shell(v)}" for k, v in given.items())
        record = {
            "notebook": self.notebook,
            "title": self.title,
            "profile": self.profile,
            "data": self.source.name if self.configs else "",
            "seeds": list(self.seeds),
            "command": f"papermill notebooks/{self.notebook}.ipynb out.ipynb{options}",
            "figures": self._figures,
            "tables": self._tables,
            "findings": list(findings),
            "runs": {id: run.record() for id, run in sorted(every.items())},
        }
        text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
        (self.folder / f"{self.notebook}.json").write_text(text)
        return Markdown("\n".join(f"- {finding}" for finding in findings))

    @property
    def counted(self) -> str:
        """How many seeds, in words."""
        return f"{len(self.seeds)} {'seed' if len(self.seeds) == 1 else 'seeds'}"

    @property
    def covers(self) -> str:
        """What the intervals of the bootstrap are over."""
        return "seeds and images" if len(self.seeds) > 1 else "images only, as there is one seed"

    def note(self, images: int) -> str:
        """The corner of every figure: profile, data, n."""
        return (
            f"{self.profile} · {self.source.name} · n = {images} images, {self.counted} · "
            "95 % intervals"
        )


def _shell(value: Any) -> str:
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return shlex.quote(text)


def _injected(cells: Sequence[str]) -> set[str]:
    """Names set by the cell that papermill injects; it says nothing of unknown ones itself."""
    for cell in cells:
        if cell.startswith("# Parameters\n"):
            targets = [
                n for s in ast.parse(cell).body if isinstance(s, ast.Assign) for n in s.targets
            ]
            return {target.id for target in targets if isinstance(target, ast.Name)}
    return set()


def evaluated(run: Run) -> list[int]:
    """The iterations at which a run was evaluated."""
    return [int(t) for t in run.evaluations()["iteration"]]


def areas(run: Run) -> str:
    """What AP_S, AP_M and AP_L go by, in words."""
    small, large = open_split(run.config.data, "val").area_limits
    return f"objects below {small:g}² pixels, between, and from {large:g}²"


def last_third(config: RunConfig) -> int:
    return min(config.t1, config.iterations * 2 // 3)


def mean_of(runs: Sequence[Run], measure: str) -> float:
    """Mean over seeds of a final measure."""
    return float(pd.Series([run.evaluations()[measure].iloc[-1] for run in runs]).mean())


def gain(ours: Sequence[Run], theirs: Sequence[Run], measure: str = "AP") -> Interval:
    """Final measure of some runs minus that of others, paired by seed and image."""
    mine, other = ([run.matches(measure=measure) for run in group] for group in (ours, theirs))
    return difference(mine, other)


def teacher_lead(runs: Sequence[Run]) -> Interval:
    """The teacher's final AP, given the labels, minus its student's, paired by seed and image."""
    return difference([run.matches(measure="teacher") for run in runs], [r.matches() for r in runs])


def rate(config: RunConfig, t: int) -> float:
    return learning_rate(
        t,
        config.lr,
        warmup=config.warmup,
        warmup_factor=config.warmup_factor,
        milestones=config.milestones,
        gamma=config.gamma,
    )
