"""Execute the notebooks: what ``make reports`` does."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import nbformat
import papermill
from nbconvert import HTMLExporter

from .experiments import EXPERIMENTS

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"


def reports(
    profile: str, data: str, seeds: Sequence[int], jobs: int | None, runs: str, output: str = ""
) -> int:
    """Train what any notebook needs, execute each, and keep it as HTML beside its figures.

    A notebook that fails does not stop the others; the exit status is then 1.

    Raises:
        ValueError: the profile, the data or another parameter is wrong.
    """
    if data and "=" not in data:  # a folder, and not its parts one by one
        data = str(Path(data).expanduser().resolve())
    given = {"profile": profile, "data": data, "seeds": list(seeds), "jobs": jobs}
    given |= {"runs": runs, "output": output}
    experiments = [
        kind.from_notebook({name: value for name, value in given.items() if value is not None})
        for kind in EXPERIMENTS
    ]
    configs = [c for e in experiments for group in e.configs.values() for c in group]
    failed: list[str] = []
    try:
        experiments[0].store.get(configs, jobs=jobs)
    except RuntimeError as error:  # the notebooks that need none of the failed runs go on
        failed.append(str(error))
    folder = experiments[0].folder
    folder.mkdir(parents=True, exist_ok=True)
    for number, experiment in enumerate(experiments, start=1):
        stem = experiment.notebook
        print(f"notebook {number} of {len(experiments)}: {stem}", flush=True)
        source = NOTEBOOKS / f"{stem}.ipynb"
        known = papermill.inspect_notebook(str(source))
        with tempfile.TemporaryDirectory() as scratch:
            executed = Path(scratch) / "executed.ipynb"
            try:
                papermill.execute_notebook(
                    source,
                    executed,
                    {name: given[name] for name in given if name in known},
                    progress_bar=False,
                )
            except papermill.PapermillExecutionError as error:
                failed.append(f"{stem}: {error.ename}: {error.evalue}")
            html, _ = HTMLExporter().from_notebook_node(nbformat.read(executed, as_version=4))
        (folder / f"{stem}.html").write_text(html)
    print(f"results in {folder}")
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    return 1 if failed else 0
