"""What the notebooks ask for: their parameters, the runs these name, and the results drawn.

A notebook's first cell hands its variables to `from_notebook`, which checks them and builds every
configuration before any time is spent; then it calls `train`, `figure` and `table`.
"""

from __future__ import annotations

import ast
import json
import shlex
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import Markdown
from matplotlib.figure import Figure
from pydantic import Field, PrivateAttr, ValidationError, field_validator

from . import report
from .config import DataSource, Frozen, RunConfig, configure, open_data
from .evaluation import Matches, difference, interval
from .runs import Run, Store, home
from .schedules import learning_rate, step_lambda

CALIBRATED_RATIO = 50.0
"""λ of SSSD ÷ λ of LGD at equal shares: the paper's 50 to 1."""


class ParameterError(ValueError):
    """A parameter of a notebook is wrong; shown as its one sentence, without a traceback."""

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]


class Experiment(Frozen):
    """The parameters that all notebooks share."""

    notebook: ClassVar[str]
    """Its file name in ``notebooks/``, without the extension; also of what it saves."""

    _figures: dict[str, str] = PrivateAttr(default_factory=dict)
    _tables: dict[str, str] = PrivateAttr(default_factory=dict)

    profile: str = "mini"
    data: str = ""
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    overrides: str = ""
    output: str = ""
    runs: str = ""
    jobs: int | None = Field(None, ge=1)

    @field_validator("seeds", mode="before")
    @classmethod
    def _seeds(cls, given: Any) -> Any:
        """papermill's ``-p seeds 0`` gives a number, ``-p seeds 0,1,2`` a text."""
        if isinstance(given, str):
            return tuple(given.replace(",", " ").split())
        return (given,) if isinstance(given, int) else given

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

    def _repr_markdown_(self) -> str:
        """What will be trained, before it is."""
        configs = [c for group in self.configs.values() for c in group]
        plan = self.store.plan(configs)
        first = configs[0]
        names = "".join(
            f"\n- `{job.config.id}` {job.config.label()}, {job.length} iterations"
            for job in plan.values()
        )
        return (
            f"**{self.profile}** on **{self.source.name}**, seeds {', '.join(map(str, self.seeds))}, "
            f"{report.NAMES[first.detector]} {report.NAMES[first.backbone]}; "
            f"{len(configs)} runs asked for, {len(plan)} to be trained.{names}\n\n"
            f"Runs in `{self.store.root.name}/`, results in `{self.folder.name}/`."
        )

    def save_figure(self, figure: Figure, name: str, caption: str, note: str) -> Figure:
        """Save a figure as SVG and PNG, and remember its caption for the record."""
        self._figures[name] = caption
        return report.finish(figure, self.folder, name, note, self.profile == "smoke")

    def save_table(self, table: report.Table, name: str) -> report.Table:
        """Save a table as CSV, Markdown and LaTeX, and remember its caption for the record."""
        self._tables[name] = table.caption
        return table.save(self.folder, name)

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
            "profile": self.profile,
            "data": self.source.name,
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

    def note(self, images: int) -> str:
        """The corner of every figure: profile, data, n."""
        seeds = "seed" if len(self.seeds) == 1 else "seeds"
        return (
            f"{self.profile} · {self.source.name} · n = {images} images, "
            f"{len(self.seeds)} {seeds} · 95 % intervals"
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


VARIANTS = ("fixed λ1", "fixed λ2", "stepwise")


class Fig3(Experiment):
    """Stepwise against fixed λ over the last third of training (SSSD, Fig. 3)."""

    notebook = "fig3_stepwise"

    lambda1: float = Field(75.0, gt=0)
    lambda2: float = Field(100.0, gt=0)
    lgd_lambda1: float | None = Field(None, gt=0)
    lgd_lambda2: float | None = Field(None, gt=0)
    t1: int | None = Field(None, ge=1)
    methods: tuple[str, ...] = Field(("lgd", "sssd"), min_length=1)
    detector: str = "faster_rcnn"
    backbone: str = ""

    @field_validator("methods", mode="before")
    @classmethod
    def _methods(cls, given: Any) -> Any:
        return tuple(given.replace(",", " ").split()) if isinstance(given, str) else given

    @cached_property
    def configs(self) -> dict[tuple[str, str], list[RunConfig]]:
        groups: dict[tuple[str, str], list[RunConfig]] = {}
        for method in self.methods:
            if method not in ("lgd", "sssd"):
                raise ValueError(f"methods: {method!r} is not valid; expected lgd or sssd")
            first, second = self.lambda1, self.lambda2
            if method == "lgd":
                first = self.lgd_lambda1 or first / CALIBRATED_RATIO
                second = self.lgd_lambda2 or second / CALIBRATED_RATIO
            if first == second:
                raise ValueError(
                    f"lambda2: {self.lambda2:g} gives {report.NAMES[method]} the same λ as before "
                    f"T1, {first:g}; expected another one, as a step needs two"
                )
            fields: dict[str, Any] = {"method": method, "detector": self.detector}
            if self.backbone:
                fields["backbone"] = self.backbone
            # Built with λ2 even where λ is fixed, so that T1 is checked once and for all.
            for variant, lam in zip(VARIANTS, ((first,), (second,), (first, second)), strict=True):
                groups[method, variant] = [
                    configure(
                        self.profile,
                        data=self.source,
                        overrides=self.overrides,
                        **fields,
                        seed=seed,
                        lambda1=lam[0],
                        lambda2=lam[1] if len(lam) > 1 else None,
                        switch=self.t1,
                    )
                    for seed in self.seeds
                ]
        return groups

    def figure(self, runs: Mapping[tuple[str, str], list[Run]]) -> Figure:
        """AP over the last third for the three variants, λ and the learning rate under it."""
        report.style()
        methods = list(self.methods)
        figure, axes = plt.subplots(
            2,
            len(methods),
            figsize=(report.COLUMN * len(methods), 3.6),
            sharex=True,
            squeeze=False,
            gridspec_kw={"height_ratios": (2.2, 1)},
            layout="constrained",
        )
        config = next(iter(runs.values()))[0].config
        images = 0
        for column, method in enumerate(methods):
            above = axes[0, column]
            for i, variant in enumerate(VARIANTS):
                group = runs[method, variant]
                times = [t for t in evaluated(group[0]) if t >= last_third(config)]
                at = [interval([run.matches(t) for run in group], replicates=300) for t in times]
                images = at[0].images
                gap = (i - 1) * config.eval_every * 0.12  # side by side, so that bars can be read
                above.errorbar(
                    [t + gap for t in times],
                    [100 * x.estimate for x in at],
                    [
                        [100 * (x.estimate - x.low) for x in at],
                        [100 * (x.high - x.estimate) for x in at],
                    ],
                    color=report.COLOURS[variant],
                    linestyle=report.DASHES[variant],
                    marker=report.MARKS[variant],
                    markersize=3.5,
                    linewidth=1.3,
                    elinewidth=0.7,
                    capsize=1.5,
                    label=f"{variant}: {self._lambda(group[0].config)}",
                )
            above.axvline(config.switch, color="#999999", linewidth=0.8)
            above.set_title(report.NAMES[method])
            above.legend(frameon=False, loc="best")
            shown = config.iterations - last_third(config)
            before = max(last_third(config) - shown // 6, 1)  # so that the step itself is seen
            steps = list(range(before, config.iterations + 1))
            lam = {
                v: [step_lambda(t, c.lambda1, c.lambda2, c.switch) for t in steps]
                for v in VARIANTS
                for c in [runs[method, v][0].config]
            }
            report.draw_schedule(axes[1, column], steps, lam, [_rate(config, t) for t in steps])
        limits = [above.get_ylim() for above in axes[0]]
        for above in axes[0]:
            above.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
        axes[0, 0].set_ylabel("AP (points of 100)")
        caption = (
            "AP on the validation images over the last third of training (above), λ and the "
            "learning rate (below). The grey line is T1. The runs start from the same weights; the "
            "stepwise run is the λ1 run until T1. Bars are 95 % intervals."
        )
        return self.save_figure(figure, "fig3_stepwise", caption, self.note(images))

    def table(self, runs: Mapping[tuple[str, str], list[Run]]) -> report.Table:
        """Final AP and the mean over the last third, and stepwise against each fixed λ."""
        rows = []
        for method in self.methods:
            ours = [self._last_third(run) for run in runs[method, "stepwise"]]
            for variant in VARIANTS:
                group = runs[method, variant]
                final = interval([run.matches() for run in group])
                row = {
                    "method": report.NAMES[method],
                    "λ": self._lambda(group[0].config),
                    "AP, final [95 %]": report.bracketed(final),
                    "AP75, final": report.percent(mean_of(group, "AP75")),
                    "AP, after T1": report.percent(
                        interval([self._last_third(run) for run in group], replicates=2).estimate
                    ),
                    "stepwise − this, final": "",
                    "stepwise − this, after T1": "",
                    "so stepwise is": "",
                }
                if variant != "stepwise":
                    at_end = difference(
                        [run.matches() for run in runs[method, "stepwise"]],
                        [run.matches() for run in group],
                    )
                    after = difference(ours, [self._last_third(run) for run in group])
                    row["stepwise − this, final"] = report.signed(at_end)
                    row["stepwise − this, after T1"] = report.signed(after)
                    row["so stepwise is"] = report.verdict(after)
                rows.append(row)
        covers = "seeds and images" if len(self.seeds) > 1 else "images only, as there is one seed"
        caption = (
            f"AP in points of 100. T1 = {runs[self.methods[0], 'stepwise'][0].config.switch}. "
            f"“After T1” is the mean of the evaluations after it. Intervals are 95 %, over {covers}. "
            f"Paper: {report.PAPER['stepwise']}."
        )
        return self.save_table(report.Table(pd.DataFrame(rows), caption), "fig3_stepwise")

    def findings(self, runs: Mapping[tuple[str, str], list[Run]]) -> Markdown:
        """What the intervals allow to be said of stepwise against fixed λ."""
        said = []
        for method in self.methods:
            ours = [self._last_third(run) for run in runs[method, "stepwise"]]
            for variant in VARIANTS[:2]:
                group = runs[method, variant]
                gain = difference(ours, [self._last_third(run) for run in group])
                said.append(
                    f"{report.NAMES[method]}: stepwise λ against λ = {self._lambda(group[0].config)}, "
                    f"mean AP after T1: {report.signed(gain)} points, {report.verdict(gain)}."
                )
        return self.conclude(runs, said)

    def paper(self) -> Markdown:
        """The paper's statement, to be read beside ours."""
        return Markdown(f"> **The paper**: {report.PAPER['stepwise']}.")

    def _last_third(self, run: Run) -> list[Matches]:
        return [run.matches(t) for t in evaluated(run) if t > run.config.switch]

    @staticmethod
    def _lambda(config: RunConfig) -> str:
        return f"{config.lambda1:g}" + (f" → {config.lambda2:g}" if config.stepwise else "")


def evaluated(run: Run) -> list[int]:
    """The iterations at which a run was evaluated."""
    return [int(t) for t in run.evaluations()["iteration"]]


def last_third(config: RunConfig) -> int:
    return min(config.switch, config.iterations * 2 // 3)


def mean_of(runs: Sequence[Run], measure: str) -> float:
    """Mean over seeds of a final measure."""
    return float(pd.Series([run.evaluations()[measure].iloc[-1] for run in runs]).mean())


def _rate(config: RunConfig, t: int) -> float:
    return learning_rate(
        t,
        config.lr,
        warmup=config.warmup,
        warmup_factor=config.warmup_factor,
        milestones=config.milestones,
        gamma=config.gamma,
    )
