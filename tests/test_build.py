"""`make reports`: what failed is said, what is shown can be traced, twice gives the same."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import pytest
from helpers import chain, environment, write_coco

from sssd import pool
from sssd.__main__ import main
from sssd.config import RunConfig
from sssd.profiles import CHANGES, PROFILES, WARM_START, configure
from sssd.reproduce import Experiment, archive, build, document, plots, words
from sssd.reproduce.document import MARKS, assemble, index
from sssd.reproduce.experiment import Findings
from sssd.reproduce.tables import Table
from sssd.reproduce.verdicts import Verdict, decide
from sssd.runs import Run, Store

NASTY = r"a_b *c* #d $e$ `f` <g> [h](i) \j | k ~ @l = m & n % L_distill"


class One(Experiment):
    """One short run a seed; its AP as a figure, a table and a finding."""

    notebook = "one"
    title = "One run"
    question = "Does one run do?"

    @cached_property
    def configs(self) -> dict[Any, list[RunConfig]]:
        fields: dict[str, Any] = {"method": "baseline", "iterations": 4, "eval_every": 4}
        if self.profile == "smoke":
            fields["start"] = "random"
        return {
            "it": [configure(self.profile, data=self.source, seed=s, **fields) for s in self.seeds]
        }

    def verdicts(self, runs: Any) -> tuple[Verdict, ...]:
        return (decide("share_sssd", "final share", [49.0, 50.0, 51.0]),)

    def results(self, trained: dict[Any, list[Run]], text: str = "so") -> None:
        figure, ((axes,),) = plots.panels(1, 1, (3, 2))
        axes.plot([0, 1])
        plot = self.plot("one_figure", figure, f"A line, {text}.", "note")
        ap = [run.evaluations()["AP"].iloc[-1] for run in trained["it"]]
        frame = pd.DataFrame({"method": [text] * len(ap), "AP": [words.percent(x) for x in ap]})
        table = Table("one_table", frame, f"A table, {text}.")
        self.save(trained, plot, table, Findings((f"The AP is {ap[0]:.3f}, {text}.",)))


class Two(Experiment):
    """Needs no run, and its notebook fails."""

    notebook = "two"
    title = "Nothing"
    question = "What does none do?"

    @cached_property
    def configs(self) -> dict[Any, list[RunConfig]]:
        return {}


@pytest.fixture(autouse=True)
def two_notebooks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for module in (document, build):
        monkeypatch.setattr(module, "EXPERIMENTS", (One, Two))
    monkeypatch.setattr(pool, "POLL_SECONDS", 0.1)
    here = str(Path(__file__).parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([environment()["PYTHONPATH"], here]))
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco(tmp_path_factory.mktemp("reports") / "colours")


def train(store: Store, config: RunConfig, ap: float = 0.25, seconds: float = 0.5) -> None:
    """The files of a finished run, without the training."""
    folder = store.folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    machine = {"sssd": "0", "torch": "1", "cpu": "2 × a processor", "gpu": None}
    done = {"iterations": config.iterations, "training_seconds": 60.0, "peak_memory_mib": 512.0}
    for name, value in (("config", config.canonical()), ("environment", machine), ("done", done)):
        (folder / f"{name}.json").write_text(json.dumps(value))
    steps = [{"iteration": t, "seconds": seconds} for t in range(1, config.iterations + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    if config.method != "crops":
        line = json.dumps({"iteration": config.iterations, "AP": ap, "per_class": {}})
        (folder / "evaluations.jsonl").write_text(line + "\n")


class Made:
    """A report's folder as the notebooks leave it, and its store."""

    def __init__(self, root: Path, data: Path, profile: str = "mini", text: str = "so") -> None:
        given = {"profile": profile, "data": str(data), "output": str(root / "report")}
        self.one = One.from_notebook({**given, "runs": str(root / "runs")})
        self.store, self.folder, self.root = self.one.store, self.one.folder, root
        (self.config,) = self.one.configs["it"]
        for config in chain(self.config):
            train(self.store, config)
        self.one.results({"it": [Run(self.config, self.store.folder(self.config))]}, text)

    def assemble(self, **failures: str) -> dict[str, Any]:
        assemble(self.folder, self.store, self.one, failures)
        return json.loads((self.folder / "manifest.json").read_text())

    def readme(self) -> str:
        return (self.folder / "README.md").read_text()


def test_the_manifest_says_what_was_made_from_what(tmp_path: Path, data: Path) -> None:
    made = Made(tmp_path, data)
    manifest = made.assemble()
    names = {f"one_figure.{x}" for x in ("svg", "png")}
    names |= {f"one_table.{x}" for x in ("csv", "md", "tex")}
    notebook = manifest["notebooks"]["one"]
    assert notebook["sha256"].keys() == names and notebook["runs"] == [made.config.id]
    for name, digest in {**notebook["sha256"], **manifest["report"]}.items():
        assert hashlib.sha256((made.folder / name).read_bytes()).hexdigest() == digest
    assert set(manifest["runs"]) == {config.id for config in chain(made.config)}  # warm start too
    run = manifest["runs"][made.config.id]
    assert (run["AP"], run["state"], run["seed"]) == (0.25, "finished", 0)
    assert run["config"] == made.config.canonical()
    for name, digest in manifest["records"].items():
        assert hashlib.sha256((made.folder / name).read_bytes()).hexdigest() == digest
    assert (made.folder / "report.pdf").read_bytes().startswith(b"%PDF")
    assert "The AP is 0.250, so." in made.readme()
    assert 'ONLY="one"\n' in made.readme()
    for text in (made.readme(), json.dumps(manifest)):
        assert str(tmp_path) not in text and str(data) not in text
    assert "two" not in manifest["notebooks"]  # never executed here: not spoken of


def test_the_verdicts_stand_first(tmp_path: Path, data: Path) -> None:
    made = Made(tmp_path, data)
    made.assemble()
    text = (made.folder / "verdicts.csv").read_text()
    assert text.startswith("statement,value,low,high,unit,seeds,images,verdict,smallest_effect,")
    (row,) = [line for line in made.readme().splitlines() if "final share |" in line]
    assert "| 50.0 [47.5, 52.5] | holds | 2.48 | 3 |" in row
    assert made.readme().index(row) < made.readme().index("trains an object detector")
    assert "On the shares at the end: final share is 50.0 [47.5, 52.5] % (holds)." in made.readme()
    made.assemble(one="it broke")
    assert not (made.folder / "verdicts.csv").exists()  # no other run's


def test_the_repositorys_readme_shows_the_main_reports_verdicts(tmp_path: Path, data: Path) -> None:
    made = Made(tmp_path, data)
    made.assemble()
    root, readme = tmp_path / "reports", tmp_path / "README.md"
    root.mkdir()
    made.folder.rename(root / document.MAIN[1])
    index(root)
    assert not readme.exists()
    readme.write_text(f"before\n\n{MARKS[0]}\nstale\n{MARKS[1]}\n\nafter\n")
    for _ in range(2):  # twice is the same
        index(root)
        text = readme.read_text()
        assert text.startswith(f"before\n\n{MARKS[0]}\n\n| The paper | Here |")
        assert text.endswith(f"\n\n{MARKS[1]}\n\nafter\n")
        assert "stale" not in text and "[CSV](reports/verdicts.csv)" in text
    readme.write_text("mine alone")
    index(root)
    assert readme.read_text() == "mine alone"


def test_runs_of_different_software_are_said_to_be(tmp_path: Path, data: Path) -> None:
    made = Made(tmp_path, data)
    made.assemble()
    assert "different software" not in made.readme()
    file = made.store.folder(made.config) / "environment.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"torch": "2", "cpu": "another"}))
    made.assemble()
    assert "come from different software: torch 1 and 2." in made.readme()


def test_a_part_of_the_report_does_not_claim_the_whole(tmp_path: Path, data: Path) -> None:
    made = Made(tmp_path, data)
    made.assemble()
    assert "A rebuild of 1 of the 2 parts at the scale “mini”" in made.readme()
    assert "every table and figure" not in made.readme()


@pytest.mark.parametrize("profile", PROFILES)
def test_every_change_of_a_profile_has_its_reason(profile: str) -> None:
    """The data and the weights to start from are changed where there is a built-in set."""
    paper = PROFILES["paper"]
    defaults = {name: about.default for name, about in RunConfig.model_fields.items()}
    changed = {k for k, v in PROFILES[profile].items() if v != paper.get(k, defaults[k])}
    changed |= {"data", "start"} if profile in WARM_START else set()
    assert CHANGES[profile].keys() == changed
    assert all(CHANGES[profile].values())


def test_the_reasons_stand_in_the_report(tmp_path: Path, data: Path) -> None:
    made = Made(tmp_path, data)
    made.assemble()
    assert "### What the small scale changes, and why" in made.readme()
    assert f"| iterations | 180000 | {PROFILES['mini']['iterations']} |" in made.readme()


def test_records_stay_where_the_store_does_not(tmp_path: Path, data: Path) -> None:
    made = Made(tmp_path, data)
    before = made.assemble()
    kept = archive.read(made.folder)["runs"][made.config.id]
    assert kept["seconds"] == [0.5] * 4 and len(kept["steps"]) == 4
    assert kept["config"] == made.config.canonical()
    for file in (tmp_path / "runs").rglob("*.json*"):
        file.unlink()
    assert made.assemble() == before


def test_text_is_shown_as_it_is(tmp_path: Path, data: Path) -> None:
    made = Made(tmp_path, data, text=NASTY)
    made.assemble()  # typst takes it
    finding = next(x for x in made.readme().splitlines() if x.startswith("- The AP"))
    assert r"a\_b \*c\* \#d \$e\$ \`f\` \<g\> [h\](i) \\j \| k" in finding
    row = next(x for x in made.readme().splitlines() if x.endswith("| 25.0 |"))
    assert r"\| k" in row


def test_smoke_says_that_it_means_nothing(tmp_path: Path, data: Path) -> None:
    made = Made(tmp_path, data, profile="smoke")
    made.assemble()
    assert "its numbers mean nothing" in made.readme()


def test_what_failed_or_is_unfinished_is_said(tmp_path: Path, data: Path) -> None:
    made = Made(tmp_path, data)
    (made.store.folder(made.config) / "done.json").unlink()
    record = json.loads((made.folder / "one.json").read_text())
    del record["runs"][made.config.id]["done"]
    (made.folder / "one.json").write_text(json.dumps(record))
    manifest = made.assemble(two="ValueError: no <such> thing")
    assert manifest["notebooks"]["two"]["failure"] == "ValueError: no <such> thing"
    assert r"> **This section is missing. ValueError: no \<such\> thing**" in made.readme()
    assert "1 of 2 sections are missing: Nothing." in made.readme()
    assert f"as a search needs it, or interrupted: {made.config.id}." in made.readme()
    made.assemble(one="a", two="b")  # nothing at all is a report too
    assert "2 of 2 sections are missing: One run and Nothing." in made.readme()


def test_the_index_shows_all_but_smoke(tmp_path: Path, data: Path) -> None:
    for name, profile in (("mini", "mini"), ("mini-other", "mini"), ("smoke", "smoke")):
        made = Made(tmp_path / name, data, profile=profile)
        made.assemble()
        made.folder.rename(tmp_path / f"_{name}")
    root = tmp_path / "reports"
    root.mkdir()
    for name in ("mini", "mini-other", "smoke"):
        (tmp_path / f"_{name}").rename(root / name)
    index(root)
    text = (root / "README.md").read_text()
    assert "(mini/README.md)" in text and "(mini-other/README.md)" in text
    assert "smoke" not in text and text.count("final share") == 1
    assert (root / "report.pdf").read_bytes() == (root / "mini" / "report.pdf").read_bytes()


def test_a_failed_training_is_the_notebooks_reason(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = Made(tmp_path, data)
    (made.store.folder(made.config) / "done.json").unlink()
    two = Two.from_notebook({"profile": "mini", "data": str(data)})

    def get(self: Store, configs: list[RunConfig], **options: Any) -> list[Run]:
        what = f"- {made.config.label()} ({made.config.id}): the disk is full"
        raise RuntimeError(f"1 of 1 runs failed:\n{what}")

    monkeypatch.setattr(Store, "get", get)
    reasons = build.train([made.one, two], made.store, None)
    assert reasons.keys() == {"one"}
    assert "1 of its 1 runs could not be trained" in reasons["one"]
    assert reasons["one"].endswith("the disk is full")
    assert "to be trained: 1 run\n" in capsys.readouterr().out


def test_only_names_notebooks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--store", str(tmp_path), "reports", "--only", "one", "three"]) == 2
    assert capsys.readouterr().err.startswith("sssd: only: 'three' is not a notebook; expected")


@pytest.mark.parametrize(("profile", "with_data"), [("smoke", False), ("mini", True)])
def test_notebooks_of_a_report_are_told_its_folder(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, profile: str, with_data: bool
) -> None:
    """By themselves they would write into one of their own."""
    told: list[Any] = []
    monkeypatch.setattr(build, "home", lambda: tmp_path)
    monkeypatch.setattr(build, "train", lambda *asked: {})
    monkeypatch.setattr(build, "execute", lambda chosen, given: told.append((chosen, given)) or {})
    monkeypatch.setattr(build, "assemble", lambda *asked: None)
    monkeypatch.setattr(build, "index", lambda *asked: None)
    given = (profile, str(data) if with_data else "", None, None, str(tmp_path / "runs"))
    assert build.reports(*given) == 0
    folder = tmp_path / "reports" / (f"{profile}-{data.name}" if with_data else profile)
    ((chosen, parameters),) = told
    assert parameters["output"] == str(folder) and folder.is_dir()
    assert {experiment.folder for experiment in chosen} == {folder}


def write_notebook(folder: Path, name: str, *code: str) -> None:
    notebook = nbformat.v4.new_notebook()
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "", "language": "python"}
    parameters = "profile = 'mini'\ndata = ''\nseeds = [0]\noutput = ''\nruns = ''\njobs = None"
    cells = [nbformat.v4.new_code_cell(text) for text in (parameters, *code)]
    cells[0].metadata["tags"] = ["parameters"]
    notebook.cells = cells
    nbformat.write(notebook, folder / f"{name}.ipynb")


def test_twice_is_the_same_and_a_failure_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    notebooks = tmp_path / "notebooks"
    notebooks.mkdir()
    code = "experiment = One.from_notebook(globals())\nexperiment.results(experiment.train())"
    write_notebook(notebooks, "one", "from test_build import One", code)
    write_notebook(notebooks, "two", "raise ValueError('no such\\nthing')")
    monkeypatch.setattr(build, "NOTEBOOKS", notebooks)
    manifests = []
    for name in ("first", "second"):
        folder = tmp_path / name
        status = build.reports("smoke", "", [0], None, str(tmp_path / "runs"), str(folder))
        printed, errors = capsys.readouterr()
        assert status == 1 and "failed: two: ValueError: no such thing" in errors
        assert "notebook 1 of 2: one" in printed and "notebook 2 of 2: two" in printed
        assert ("to be trained: 1 run\n" in printed) == (name == "first")
        assert (folder / "one.html").exists() and (folder / "two.html").exists()
        manifests.append(json.loads((folder / "manifest.json").read_text()))
    assert manifests[0] == manifests[1]  # with the hashes of all tables, figures and the PDF
    for kind in ("csv", "md", "tex"):
        first, second = (
            (tmp_path / n / f"one_table.{kind}").read_bytes() for n in ("first", "second")
        )
        assert first == second


def test_a_notebook_that_fails_later_leaves_nothing_behind(tmp_path: Path, data: Path) -> None:
    made = Made(tmp_path, data)
    before = json.loads((made.folder / "one.json").read_text())
    process = subprocess.Popen(["false"])
    process.wait()
    (tmp_path / "one.log").write_text("some lines\nKernel died\n")
    execution = build.Execution(made.one, tmp_path / "one.ipynb", before, process)
    assert execution.poll() == "Kernel died"
    assert not list(made.folder.glob("one*"))
    made.assemble(one="Kernel died")
    assert "Kernel died" in made.readme()
