"""Notebooks: committed without outputs; executed, they train, draw and refuse bad parameters."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pandas as pd
import papermill
import pytest
from helpers import write_coco
from papermill.exceptions import PapermillExecutionError

from sssd.reproduce import (
    EXPERIMENTS,
    Experiment,
    Fig1,
    Fig3,
    ParameterError,
    Table3,
    fig3_stepwise,
)
from sssd.reproduce.build import run_cells
from sssd.runs import Run

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
assert NOTEBOOKS, "no notebooks found"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_without_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None
    tags = [cell.metadata.get("tags", []) for cell in notebook.cells]
    assert tags.count(["parameters"]) == 1


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_help_explains_every_parameter(path: Path) -> None:
    for name, parameter in papermill.inspect_notebook(str(path)).items():
        assert parameter["help"], name


@pytest.mark.parametrize("kind", EXPERIMENTS, ids=lambda kind: kind.notebook)
def test_a_notebooks_defaults_are_the_experiments(kind: type[Experiment]) -> None:
    """So that the notebook says what happens where nothing is changed; None means the default."""
    notebook = nbformat.read(ROOT / "notebooks" / f"{kind.notebook}.ipynb", as_version=4)
    (cell,) = [cell for cell in notebook.cells if cell.metadata.get("tags") == ["parameters"]]
    values: dict[str, Any] = {}
    exec(cell.source, values)
    del values["__builtins__"], values["__annotations__"]
    needless = {"overrides", "runs", "jobs"} if kind.notebook == "losses" else set()
    assert values.keys() == kind.model_fields.keys() - needless
    given = {name: value for name, value in values.items() if value is not None}
    assert kind(**given) == kind()


def test_a_profile_has_defaults_of_its_own() -> None:
    asked = {name: Fig3.from_notebook({"profile": name}) for name in ("mini", "night")}
    assert (len(asked["mini"].seeds), len(asked["night"].seeds)) == (1, 8)
    assert Fig3.from_notebook({"profile": "night", "seeds": "0,1"}).seeds == (0, 1)
    # What is usual in the profile is not part of the command that rebuilds the results.
    assert asked["night"].command.endswith("out.ipynb -p profile night")


def test_a_try_has_a_folder_of_its_own(tmp_path: Path) -> None:
    """No parameter leads into the folder of a committed report, and none into another try's."""
    tries = ROOT / "reports" / "tries"
    data = write_coco(tmp_path / "my data")
    for given, name in (
        ({}, "fig3_stepwise-smoke"),
        ({"profile": "mini", "lambda1": 50}, "fig3_stepwise-mini-lambda1=50.0"),
        ({"data": data, "seeds": "1 2"}, "fig3_stepwise-smoke-my_data-seeds=1,2"),
        ({"overrides": "lr=1e-3, clip=.5"}, "fig3_stepwise-smoke-overrides=lr=1e-3,_clip=.5"),
    ):
        experiment = Fig3.from_notebook({"profile": "smoke", "overrides": "", **given})
        assert experiment.folder == tries / name
        assert f"reports/tries/{name}" in repr(experiment)
    long = [Fig3(profile="smoke", overrides=f"warmup={'1' * 200}{i}") for i in (1, 2)]
    assert len(long[0].folder.name) < 130 and long[0].folder != long[1].folder


def test_every_notebook_is_an_experiments() -> None:
    of_report = {kind.notebook for kind in EXPERIMENTS}
    assert {path.stem for path in NOTEBOOKS} == {*of_report, "your_own_detector"}


def execute(stem: str, folder: Path, **parameters: Any) -> Any:
    return papermill.execute_notebook(
        ROOT / "notebooks" / f"{stem}.ipynb",
        folder / "out.ipynb",
        {
            "profile": "smoke",
            "output": str(folder / "out"),
            "runs": str(folder / "runs"),
            **parameters,
        },
        progress_bar=False,
        cwd=folder,  # nothing may depend on where it is started
    )


def test_your_own_detector(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = {"data": str(write_coco(tmp_path / "data")), "output": str(tmp_path / "out")}
    short = {"beginning": 2, "iterations": 6, "batch_size": 2}
    run_cells("your_own_detector", asked | short)
    printed = capsys.readouterr().out
    for said in ("plain: AP", "taught: AP", "teacher − student: ", "taught − plain: "):
        assert said in printed
    share = re.search(r"share of distill in the loss, last third: (\d+) %", printed)
    assert share and int(share[1]) > 0
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["student.pt"]


def test_fig1(tmp_path: Path) -> None:
    overrides = "start=random"  # the warm start is not what is tested
    execute("fig1_architecture", tmp_path, overrides=overrides, image=2)
    made = {file.name for file in (tmp_path / "out").iterdir()}
    figures = {f"fig1_{x}.{kind}" for x in ("architecture", "example") for kind in ("svg", "png")}
    tables = {f"fig1_divergence.{kind}" for kind in ("csv", "md", "tex")}
    assert made == figures | tables | {"fig1_architecture.json"}
    record = json.loads((tmp_path / "out" / "fig1_architecture.json").read_text())
    assert set(record["figures"]) == {"fig1_architecture", "fig1_example"}
    assert len(record["runs"]) == 1 and len(record["findings"]) == 3  # P6 is a single pixel

    # Measured again from what the run kept: the same numbers.
    fig1 = Fig1(profile="smoke", overrides=overrides, runs=str(tmp_path / "runs"))
    again = fig1.table(fig1.measure(fig1.train())).files()["fig1_divergence.csv"]
    assert (tmp_path / "out" / "fig1_divergence.csv").read_bytes() == again


def test_losses(tmp_path: Path) -> None:
    known = {"profile": "smoke", "output": str(tmp_path / "out"), "widths": 16}
    path = ROOT / "notebooks" / "losses.ipynb"
    executed = papermill.execute_notebook(
        path, tmp_path / "out.ipynb", known, progress_bar=False, cwd=tmp_path
    )
    made = {file.name for file in (tmp_path / "out").iterdir()}
    figures = ("curves", "distributions", "calibration")
    expected = {f"losses_{x}.{kind}" for x in figures for kind in ("svg", "png")}
    assert made == expected | {"losses.json"}
    record = json.loads((tmp_path / "out" / "losses.json").read_text())
    assert record["runs"] == {} and len(record["findings"]) == 4
    shown = [
        output.get("data", {}) for cell in executed.cells for output in cell.get("outputs", ())
    ]
    assert sum("image/png" in data for data in shown) == len(figures)  # the animation's still too
    assert sum("animation" in data.get("text/html", "") for data in shown) == 1
    assert not any("widget" in kind for data in shown for kind in data)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A run store for the notebooks that share their runs, all from random weights."""
    return {
        "runs": str(tmp_path_factory.mktemp("shared") / "runs"),
        "overrides": "start=random",
    }


def records_of(stem: str, folder: Path) -> dict[str, Any]:
    """The record of an executed notebook, whose every figure and table is there."""
    record = json.loads((folder / "out" / f"{stem}.json").read_text())
    made = {file.name for file in (folder / "out").iterdir()}
    assert made == {
        f"{stem}.json",
        *(f"{name}.{kind}" for name in record["figures"] for kind in ("svg", "png")),
        *(f"{name}.{kind}" for name in record["tables"] for kind in ("csv", "md", "tex")),
    }
    return record


def test_table1(tmp_path: Path, shared: dict[str, str]) -> None:
    execute("table1_benchmark", tmp_path, **shared, detectors=["fcos"], backbones=["slim18"])
    record = records_of("table1_benchmark", tmp_path)
    assert len(record["runs"]) == 4 and len(record["findings"]) == 5
    table = pd.read_csv(tmp_path / "out" / "table1_benchmark.csv", dtype=str, keep_default_na=False)
    assert table["method"].tolist() == ["baseline", "LabelEnc", "LGD", "SSSD"]
    # What is published for FCOS R-50, whose place slim R-18 takes; of SSSD nothing is known.
    assert table["published AP"].tolist() == ["37.1 (1×)", "39.5 (1×)", "42.4 (2×)", ""]
    assert table["gain [95 %]"].map(bool).tolist() == [False, True, True, True]
    said = json.loads((tmp_path / "out" / "table1_benchmark.json").read_text())["findings"]
    assert said[-1].startswith("Every trained detector has weights of the same names and shapes")


def test_table3(tmp_path: Path, shared: dict[str, str]) -> None:
    asked = {"lgd_lambdas": [2], "sssd_lambdas": [50], "low": 48, "high": 52}
    execute("table3_calibration", tmp_path, **shared, **asked)
    record = records_of("table3_calibration", tmp_path)
    labels = [run["label"].split(" faster")[0] for run in record["runs"].values()]
    # The search's target, LGD at λ = 1, is trained although the table was not asked for it.
    whole = {"lgd λ=1", "lgd λ=2", "sssd λ=50"}
    short = {
        run["label"].split(" faster")[0] for run in record["runs"].values() if "done" not in run
    }
    assert set(labels) - short == whole  # what the search tried is trained for its first part only
    # From 48 to 52 it tries 50, then 49 or 51, then an end if the share lies beyond.
    assert short and short <= {f"sssd λ={lam}" for lam in (48, 49, 51, 52)}
    table = pd.read_csv(tmp_path / "out" / "table3_calibration.csv", dtype=str)
    shares = table.filter(regex="first|T1|end \\(").astype(float)
    assert ((shares > 0) & (shares < 100)).all(axis=None)
    # The report trains the search beforehand: then there is nothing left to train.
    experiment = Table3.from_notebook({"profile": "smoke", "seeds": [0], **shared, **asked})
    assert (
        experiment.further
        == "the search of table3_calibration, 2 to 3 runs of 2 iterations for each seed"
    )
    before = {
        file: file.stat().st_mtime_ns for file in Path(shared["runs"]).glob("*/metrics.jsonl")
    }
    experiment.train_further()
    after = {file: file.stat().st_mtime_ns for file in Path(shared["runs"]).glob("*/metrics.jsonl")}
    assert after == before


def test_table4_and_fig2(tmp_path: Path, shared: dict[str, str]) -> None:
    asked = {"lgd_lambdas": [0, 1, 2], "sssd_lambdas": "50,75"}
    for stem in ("table4_lambda_sweep", "fig2_ap_curves"):
        folder = tmp_path / stem
        folder.mkdir()
        execute(stem, folder, **shared, **asked)
        record = records_of(stem, folder)
        assert len(record["runs"]) == 6  # with the baseline
        assert "lgd λ=0 faster_rcnn slim18 seed 0" in {r["label"] for r in record["runs"].values()}
    table = pd.read_csv(tmp_path / "table4_lambda_sweep" / "out" / "table4_lambda_sweep.csv")
    best = table[table["AP [95 %]"].str.contains("★")]
    assert best["method"].tolist() == ["LGD", "SSSD"] and (best["λ"] > 0).all()
    known = table[table["paper"].notna()]
    assert known[["method", "λ", "paper"]].to_numpy().tolist() == [["SSSD", 75, "★, AP75 44.1"]]
    findings = json.loads(
        (tmp_path / "table4_lambda_sweep" / "out" / "table4_lambda_sweep.json").read_text()
    )["findings"]
    assert findings[-1].startswith("λ = 0 (no pull) against the baseline: ")


def test_fig3(tmp_path: Path) -> None:
    executed = execute("fig3_stepwise", tmp_path)
    said = [
        out.data.get("text/plain", "")
        for c in executed.cells
        for out in c.get("outputs", ())
        if "data" in out
    ]
    for text in (
        "This rests on 8 runs.",
        "[figure fig3_stepwise] Above: AP on",
        "AP, final [95 %]",
        "**The paper**",
        "- SSSD: stepwise",
    ):
        assert any(text in shown for shown in said), text  # what papermill's --log-output shows
    assert not any("object>" in shown for shown in said)
    made = {file.name for file in (tmp_path / "out").iterdir()}
    assert made >= {f"fig3_stepwise.{kind}" for kind in ("svg", "png", "csv", "md", "tex", "json")}
    record = json.loads((tmp_path / "out" / "fig3_stepwise.json").read_text())
    assert len(record["runs"]) == 8 and len(record["findings"]) == 10
    finished = {file.parent.name for file in (tmp_path / "runs").glob("*/done.json")}
    assert set(record["runs"]) < finished and len(finished) == 11  # and the warm start's three

    # Asked for again, by no notebook: none is trained again.
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").glob("*/done.json")}
    Fig3(profile="smoke", runs=str(tmp_path / "runs")).train()
    assert {file: file.stat().st_mtime_ns for file in before} == before

    # Again, with another λ2: the runs at λ1 are there, the stepwise one forks from them.
    Fig3(profile="smoke", runs=str(tmp_path / "runs"), lambda2=125.0).train()
    logs = [file for file in (tmp_path / "runs").glob("*/done.json")]
    assert len(logs) == 15


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"lambda1": "fifty"}, "lambda1: 'fifty'"),
        ({"lambda1": -5}, "lambda1: -5"),
        ({"lamda1": 50}, "lamda1: unknown parameter"),
        ({"lambda2": 75.0}, "lambda2: 75"),
        ({"t1": 12}, "t1: 12; expected T1 before the last iteration, 12"),
        ({"detector": "yolo"}, "detector: 'yolo'"),
        ({"profile": "maxi"}, "profile: 'maxi'"),
        ({"data": "no/such/folder"}, "data root"),
        ({"overrides": "epochs=3"}, "epochs: unknown field"),
        ({"seeds": []}, "seeds: "),
        ({"methods": "sgd"}, "methods.0: 'sgd'"),
    ],
)
def test_bad_parameters_are_named_in_one_sentence(
    parameters: dict[str, Any], sentence: str
) -> None:
    cell = "# Parameters\n" + "".join(f"{k} = {v!r}\n" for k, v in parameters.items())
    with pytest.raises(ParameterError) as raised:
        Fig3.from_notebook({"In": ["", cell], "profile": "smoke", **parameters})
    assert sentence in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_bad_parameter_stops_the_first_cell(tmp_path: Path) -> None:
    with pytest.raises(PapermillExecutionError) as raised:
        execute("fig3_stepwise", tmp_path, lamda1=50)
    assert raised.value.exec_count == 3  # after the parameters and those injected
    assert raised.value.traceback == [f"ParameterError: {raised.value.evalue}"]
    assert not (tmp_path / "runs").exists()  # before any time is spent


def parts(root: Path) -> dict[str, Path]:
    return {
        "train_images": root / "train",
        "train_annotations": root / "annotations" / "instances_train.json",
        "val_images": root / "val",
        "val_annotations": root / "annotations" / "instances_val.json",
    }


def test_parameters_have_the_forms_that_configure_takes(tmp_path: Path) -> None:
    """Equal runs, however papermill, YAML or a cell gives the parameters."""
    root = write_coco(tmp_path / "date=2026, a")
    plain = {"profile": "smoke", "seeds": (0, 1), "data": str(root), "overrides": "clip=0.5"}
    expected = [config.id for config in Fig3.from_notebook(plain).needed]
    for forms in (
        {"seeds": "[0, 1]", "data": root, "overrides": {"clip": 0.5}, "output": tmp_path / "x"},
        {"seeds": np.array([0, 1]), "data": parts(root), "overrides": '{"clip": 0.5}'},
        {"seeds": "0 1", "data": json.dumps(parts(root), default=str), "jobs": np.int64(1)},
        {"seeds": [np.int64(0), 1], "runs": tmp_path / "runs", "methods": "['lgd', 'sssd']"},
    ):
        experiment = Fig3.from_notebook({**plain, **forms})
        assert [config.id for config in experiment.needed] == expected
    assert Fig3.from_notebook({**plain, "seeds": np.int64(1)}).seeds == (1,)


def test_papermills_own_names_and_corrected_cells() -> None:
    wrong = "# Parameters\nlamda1 = 50\n"
    right = "# Parameters\nlambda1 = 50\nPAPERMILL_INPUT_PATH = 'a'\nPAPERMILL_OUTPUT_PATH = 'b'\n"
    given = {"profile": "smoke", "lambda1": 50}
    assert Fig3.from_notebook({**given, "In": ["", wrong, right]}).lambda1 == 50
    with pytest.raises(ParameterError, match="lamda1"):
        Fig3.from_notebook({**given, "In": ["", right, wrong]})


def test_an_output_that_cannot_be_written_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ParameterError, match="^output: nothing can be written to .*file/x"):
        Fig3.from_notebook({"profile": "smoke", "output": tmp_path / "file" / "x"})


def test_all_runs_of_fig3_have_its_t1() -> None:
    """Else their “AP, after T1” would be the mean of other evaluations."""
    ids = []
    for t1 in (None, 10):
        configs = Fig3(profile="smoke", t1=t1).configs
        assert {config.t1 for group in configs.values() for config in group} == {t1 or 8}
        ids.append([c.id for key, group in configs.items() for c in group if key[1] != "stepwise"])
    assert ids[0] == ids[1]  # a fixed λ has no T1


@pytest.mark.parametrize("lambda1", [70.0, 75.0, 0.7, 33.3])
def test_lgds_lambda_follows_from_sssds(monkeypatch: pytest.MonkeyPatch, lambda1: float) -> None:
    """And then the verdicts compare the two methods."""
    fig3 = Fig3(profile="smoke", lambda1=lambda1)
    assert fig3.configs["lgd", "fixed λ1"][0].lambda1 == lambda1 / 50
    runs = {key: [Run(config, Path()) for config in group] for key, group in fig3.configs.items()}
    for name in ("decide", "_gain_after_t1", "_mean_after_t1"):
        monkeypatch.setattr(fig3_stepwise, name, lambda *given: 0.0)
    monkeypatch.setattr(fig3_stepwise, "main_comparison", lambda groups, test: tuple(groups))
    assert fig3.verdicts(runs)[2:] == ("baseline", "lgd", "sssd")
    other = Fig3(profile="smoke", lambda1=lambda1, lgd_lambda1=1.0).configs["lgd", "fixed λ1"]
    runs["lgd", "fixed λ1"] = [Run(config, Path()) for config in other]
    assert len(fig3.verdicts(runs)) == 2


def test_a_seed_given_twice_counts_once() -> None:
    assert Fig3(profile="smoke", seeds=(0, 3, 0)).seeds == (0, 3)
