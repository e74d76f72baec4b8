"""A report's records: what they keep, that all is drawn again from them, and the way to a store."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
from helpers import assert_equal_runs, environment, write_coco

from sssd import pool
from sssd.__main__ import main
from sssd.intervals import difference, interval
from sssd.inventory import listing
from sssd.reproduce import Fig1, Fig3, archive, build
from sssd.reproduce.document import assemble, index
from sssd.runs import Run, Store, without_training

QUICK = "start=random, iterations=8, eval_every=4, trainable_stages=0, t1=4"
NAMES = ("fig1_architecture", "fig3_stepwise")
GIVEN = {"lambda1": 50.0, "lambda2": 75.0, "methods": ("sssd",)}


@pytest.fixture(scope="module", autouse=True)
def workers_find_the_package() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
        patch.setattr(pool, "POLL_SECONDS", 0.1)
        yield
    plt.close("all")


class Made:
    """A report of Figs. 1 and 3 on a tiny data set, and the store that it was made from."""

    def __init__(self, root: Path) -> None:
        data = write_coco(root / "colours", val=8)
        self.folder, self.root = root / "night", root
        common = {"profile": "smoke", "data": str(data), "output": str(self.folder)}
        common |= {"runs": str(root / "runs"), "jobs": 2}
        quick = QUICK.replace(", t1=4", "")
        self.fig3 = Fig3.from_notebook({**common, **GIVEN, "t1": 5, "overrides": quick})
        self.fig1 = Fig1.from_notebook({**common, "lambda1": 50.0, "overrides": quick})
        self.store, self.data = self.fig3.store, data
        build.run_cells("fig3_stepwise", self.fig3.model_dump())
        build.run_cells("fig1_architecture", self.fig1.model_dump())
        self.assemble()

    def assemble(self) -> None:
        assemble(self.folder, self.store, self.fig3, {})

    def files(self, folder: Path | None = None) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in (folder or self.folder).iterdir()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("archive"))


@pytest.fixture
def imported(made: Made, tmp_path: Path) -> Store:
    store = Store(tmp_path / "runs")
    ids = {config.id for config in made.fig3.needed}
    assert set(archive.import_runs(made.folder, store)) == ids
    return store


def runs_in(store: Store, made: Made) -> dict[Any, list[Run]]:
    return {k: [Run(c, store.folder(c)) for c in v] for k, v in made.fig3.configs.items()}


def test_a_second_writing_gives_the_same_bytes(made: Made) -> None:
    before = made.files()
    made.assemble()
    assert made.files() == before
    manifest = json.loads(before["manifest.json"])
    for name, expected in manifest["records"].items():
        assert archive.digest(before[name]) == expected
    assert set(manifest["records"]) == {"runs.json.xz", "runs.npz.xz"}


def test_all_is_drawn_again_from_the_records(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "night"
    shutil.copytree(made.folder, copy)
    before = made.files()
    for file in copy.iterdir():
        if file.suffix in (".svg", ".png", ".csv", ".md", ".tex", ".pdf"):
            file.unlink()
    build.figures([copy], str(made.data))
    assert capsys.readouterr().out == "night: drawn again from its records\n"
    after = made.files(copy)
    assert sorted(after) == sorted(before)
    assert [name for name in before if after[name] != before[name]] == []


def test_a_report_whose_notebooks_all_failed_is_left_alone(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "night"
    shutil.copytree(made.folder, copy)
    assemble(copy, made.store, made.fig3, dict.fromkeys(NAMES, "it broke"))
    build.figures([copy])
    assert "night: left as it is: all notebooks failed" in capsys.readouterr().out


def test_matches_on_two_sets_of_images_come_back(made: Made, tmp_path: Path) -> None:
    store = Store(shutil.copytree(made.store.root, tmp_path / "runs"))
    store.test(made.fig3.needed, write_coco(tmp_path / "other", val=5))
    runs = {config.id: archive.record(store.folder(config)) or {} for config in made.fig3.needed}
    asked = {"runs": runs, "compared": [[8, "AP"], [8, "test"]]}
    archive.keep(tmp_path, store, made.fig3.source, runs, [asked])
    kept = {k: x for k, x in archive.read_arrays(tmp_path).items() if "/matches/" in k}
    names = ("image_ids", "objects", "starts", "image", "matched", "ignored")
    assert len(kept) == 2 * len(runs) * len(names)
    for run, measure in product(runs_in(store, made).values(), ("AP", "test")):
        own = run[0].matches(test=measure == "test")
        place = f"{run[0].config.id}/matches/000008-{measure}"
        assert len(kept[f"{place}/image_ids"]) == (5 if measure == "test" else 8)
        for name in names:
            assert np.array_equal(kept[f"{place}/{name}"], getattr(own, name)), name


def test_photographs_need_their_folder(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "night"
    shutil.copytree(made.folder, copy)
    build.figures([copy])
    assert "Fig. 1 is left as it is; DATA=path/to/colours draws it again" in capsys.readouterr().out
    assert made.files(copy) == made.files()


def test_a_report_without_records_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "manifest.json").write_text("{}")
    build.figures([tmp_path / "old"])
    assert capsys.readouterr().out.startswith("old: left as it is")
    assert main(["--store", str(tmp_path / "runs"), "import", str(tmp_path / "old")]) == 2
    assert "holds no runs.json.xz" in capsys.readouterr().err


def test_imported_runs_give_the_same_numbers(made: Made, imported: Store) -> None:
    here, there = runs_in(made.store, made), runs_in(imported, made)
    assert imported.plan(made.fig3.needed) == {}
    for key, (mine,) in here.items():
        (theirs,) = there[key]
        assert mine.evaluations().equals(theirs.evaluations())
        per_class = [run.files.last_evaluation()["per_class"] for run in (mine, theirs)]
        assert per_class[0] == per_class[1]
        assert mine.record()["done"]["shapes"] == theirs.record()["done"]["shapes"]
        of_every_step = [
            x for x in archive.KEPT_AT_EVERY_STEP if x in mine.metrics()
        ]  # plain: no share
        assert ("share" in of_every_step) == (key[0] != "baseline")
        for name in of_every_step:
            assert mine.metrics()[name].tolist() == theirs.metrics()[name].tolist()
        for t in (8,):
            a, b = mine.matches(t), theirs.matches(t)
            assert interval([a]) == interval([b])
            for one, other in zip(vars(a).values(), vars(b).values(), strict=True):
                np.testing.assert_array_equal(one, other, strict=True)
    keys = list(here)
    one, other = (
        difference([runs[keys[0]][0].matches()], [runs[keys[2]][0].matches()])
        for runs in (here, there)
    )
    assert one == other
    states = listing(imported.root)["state"]
    assert states.str.endswith("finished, imported").all()
    done = there[keys[0]][0].record()["done"]
    assert (
        done["imported_from"] == "night"
        and "imported_from" not in here[keys[0]][0].record()["done"]
    )


def test_the_report_says_what_was_imported(made: Made, imported: Store, tmp_path: Path) -> None:
    copy = tmp_path / "night"
    shutil.copytree(made.folder, copy)
    assemble(copy, imported, made.fig3, {})
    ids = [config.id for config in made.fig3.needed]
    text = (copy / "README.md").read_text()
    assert "taken from an earlier one's records" in text and all(id in text for id in ids)
    kept = archive.read(copy)["runs"]
    assert all(run["done"]["imported_from"] == "night" for run in kept.values())
    before, after = map(archive.read_arrays, (made.folder, copy))
    assert before.keys() == after.keys()


def test_a_start_without_weights_is_trained_again(made: Made, imported: Store) -> None:
    (fixed,) = made.fig3.configs["sssd", "fixed λ1"]
    other = fixed.change(lambda2=60.0)
    plan = imported.plan([other])
    assert list(plan) == [fixed.id, other.id]
    assert plan[fixed.id].until is None and plan[fixed.id].keep == {other.t1}
    warm = fixed.change(method="lgd", start=fixed, lambda1=1.0)
    assert list(imported.plan([warm])) == [fixed.id, warm.id]
    with without_training(), pytest.raises(RuntimeError, match="2 runs are not among the records"):
        imported.get([other])

    before = Run(fixed, imported.folder(fixed)).record()
    imported.get([fixed], until=6)  # finished, by its records
    assert not (imported.folder(fixed) / "metrics.jsonl").exists()
    pool_job = imported.plan([fixed], weights=True)[fixed.id]
    assert pool_job.until is None
    (run,) = imported.get([fixed], weights=True)
    assert not run.files.imported.path.exists()
    assert "imported_from" in before["done"] and "imported_from" not in run.record()["done"]
    (imported.folder(fixed) / "kept").mkdir(exist_ok=True)
    for file in (made.store.folder(fixed) / "kept").glob("*"):
        shutil.copy(file, imported.folder(fixed) / "kept")
    assert_equal_runs(imported.folder(fixed), made.store.folder(fixed))


def test_records_stand_until_the_new_training_is_finished(made: Made, imported: Store) -> None:
    (fixed,) = made.fig3.configs["sssd", "fixed λ2"]
    own = imported.folder(fixed)
    (own / "metrics.jsonl").write_text('{"iteration": 1, "share": 0.5}\n')  # a training began
    run = Run(fixed, own)
    assert run.files.is_imported and imported.finished(fixed)
    assert imported.files(fixed).reached() == 1 and not imported.finished(fixed, weights=True)
    assert len(run.metrics()) == 8
    (own / "done.json").write_text("{}")
    assert run.files.path == own and imported.finished(fixed, weights=True)
    assert archive.import_runs(made.folder, imported) == []


def test_matches_that_were_not_compared_are_named(made: Made, imported: Store) -> None:
    (config,) = made.fig3.configs["sssd", "stepwise"]
    run = Run(config, imported.folder(config))
    with pytest.raises(RuntimeError, match="without the matches of AP_S at iteration 8"):
        run.matches(measure="AP_S")


def test_import_is_a_verb(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--store", str(tmp_path / "runs")]
    assert main([*words, "import", str(made.folder)]) == 0
    assert "5 runs imported" in capsys.readouterr().out
    assert main([*words, "import", str(made.folder)]) == 0
    assert "0 runs imported" in capsys.readouterr().out
    assert main([*words, "show", made.fig3.needed[0].id[:6]]) == 0
    assert "imported_from" in capsys.readouterr().out


def test_fig1_without_its_arrays_is_trained_again(made: Made, imported: Store) -> None:
    fig1 = made.fig1.model_copy(update={"runs": str(imported.root)})
    (config,) = fig1.needed
    assert (imported.folder(config) / "imported" / "kept" / "divergence.npz").exists()
    with without_training():
        fig1.train()
        (imported.folder(config) / "imported" / "kept" / "divergence.npz").unlink()
        with pytest.raises(RuntimeError, match="1 runs are not among the records"):
            fig1.train()


@pytest.mark.parametrize("name", [archive.TEXT, archive.ARRAYS, "manifest.json"])
@pytest.mark.parametrize("share", [0, 0.5])
def test_a_damaged_record_stops_no_later_report(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, share: float
) -> None:
    folder = Path(shutil.copytree(made.folder, tmp_path / "night"))
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ValueError, match=f"^{folder / name} is damaged: ") as error:
        build.redraw(folder)
    assert "\n" not in str(error.value)
    index(tmp_path)
    left_out = f"night is left out of {tmp_path / 'README.md'}" in capsys.readouterr().out
    assert left_out == (name == "manifest.json")
    archive.set_aside(folder)
    assert f"{folder / name} is damaged" in capsys.readouterr().out
    assemble(folder, made.store, made.fig3, {})
    assert (folder / name).read_bytes() == whole
    archive.set_aside(folder)
    assert capsys.readouterr().out == ""
