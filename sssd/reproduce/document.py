"""The report: what the notebooks recorded, as a paper, as a web page, and as a manifest of hashes.

Everything is read from files: each notebook's record beside its figures and tables, and each run's
records in the store or, where the store has it no longer, in ``runs/`` of the report's folder. No
time and no place is written, so that the same runs give the same files.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import os
import re
import shutil
import textwrap
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import typst

from ..config import RunConfig, identity
from ..profiles import BUILT_IN
from ..records import write_json
from ..runs import Store
from . import EXPERIMENTS, Experiment
from .paper import NAMES, PAPER
from .tables import markdown

TITLE = "Smooth and Stepwise Self-Distillation for Object Detection"
MAIN = "mini"
"""The folder whose report is also the one on top of ``reports/``."""
LIBRARIES = ("matplotlib", "pandas", "pycocotools", "scipy", "torch", "typst")
UNDONE = {
    "unfinished": "Trained for their first part only, as a search needs it, or interrupted:",
    "missing": "No records are at hand of:",
}
NUMBER = re.compile(r"[+−-]?\d[\d,.]*( ?%)?( \[.*\])?|–|—|")


@dataclass(frozen=True)
class Section:
    """One notebook's part of the report: its record, or why there is none."""

    notebook: str
    title: str
    question: str
    record: dict[str, Any]
    failure: str

    @property
    def findings(self) -> list[str]:
        return self.record.get("findings", [])


def outputs(folder: Path, record: Mapping[str, Any]) -> list[Path]:
    """The files of the figures and tables that a notebook's record names."""
    kinds = {"figures": ("svg", "png"), "tables": ("csv", "md", "tex")}
    return [
        folder / f"{n}.{k}" for part in kinds for n in record.get(part, {}) for k in kinds[part]
    ]


def assemble(folder: Path, store: Store, asked: Experiment, failures: Mapping[str, str]) -> None:
    """Write ``report.pdf``, ``README.md`` and ``manifest.json`` from the records in ``folder``.

    Args:
        folder: where the notebooks left their records, figures and tables.
        store: where the runs are.
        asked: the profile, data and seeds of the call.
        failures: one sentence for each notebook that failed; its section says it.
    """
    sections = []
    for kind in EXPERIMENTS:
        file = folder / f"{kind.notebook}.json"
        failure = failures.get(kind.notebook, "")
        if failure or file.exists():
            record = {} if failure else json.loads(file.read_text())
            sections.append(Section(kind.notebook, kind.title, kind.question, record, failure))
    runs = _runs(folder, store, sections)
    facts = _facts(asked, sections, runs)
    paper = {
        **facts,
        "statements": _statements(sections),
        "sections": [_printed(folder, section) for section in sections],
        "appendix": _appendix(asked, facts, runs, [s.notebook for s in sections]),
    }
    _write(folder / "report.pdf", _typeset(folder, sections, paper))
    _write(folder / "README.md", _readme(folder, sections, paper).encode())
    if asked.profile != "smoke":
        _keep_records(folder, store, runs, complete=not failures)
    made = {s.notebook: [f for f in outputs(folder, s.record) if f.exists()] for s in sections}
    manifest = {
        "title": TITLE,
        "profile": asked.profile,
        "data": {"name": asked.source.name, "train": asked.source.train, "val": asked.source.val},
        "seeds": facts["seeds"],
        "versions": {name: version(name) for name in LIBRARIES},
        "report": {name: _hash(folder / name) for name in ("report.pdf", "README.md")},
        "notebooks": {
            section.notebook: {
                "title": section.title,
                "command": section.record.get("command"),
                "failure": section.failure or None,
                "runs": sorted(section.record.get("runs", {})),
                "sha256": {file.name: _hash(file) for file in made[section.notebook]},
            }
            for section in sections
        },
        "runs": runs,
    }
    write_json(manifest, folder / "manifest.json")


def index(root: Path) -> None:
    """Write ``README.md`` of ``reports/``, and put the main report's PDF beside it."""
    manifests = {
        file.parent.name: json.loads(file.read_text())
        for file in sorted(root.glob("*/manifest.json"))
        if not file.parent.name.startswith("smoke")
    }
    lines = [
        "# Reports",
        "",
        "Every table and figure of the paper, rebuilt, one folder a profile and data set. Written by "
        "`make reports`; what was made from which runs, with hashes, is in each `manifest.json`.",
        "",
        "| report | profile | data | seeds | runs | as a paper |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, manifest in manifests.items():
        seeds = ", ".join(map(str, manifest["seeds"]))
        lines.append(
            f"| [{name}]({name}/README.md) | {manifest['profile']} | {markdown(manifest['data']['name'])} "
            f"| {seeds} | {len(manifest['runs'])} | [report.pdf]({name}/report.pdf) |"
        )
    if MAIN in manifests:
        lines += ["", f"## What came out at `{MAIN}`", ""]
        lines += [
            f"As a paper: [report.pdf](report.pdf). With all figures: [{MAIN}]({MAIN}/README.md)."
        ]
        for notebook, about in manifests[MAIN]["notebooks"].items():
            lines += ["", f"**{about['title']}**", ""]
            file = root / MAIN / f"{notebook}.json"
            found = json.loads(file.read_text())["findings"] if not about["failure"] else []
            lines += [f"- {markdown(finding)}" for finding in found]
            lines += [f"- missing: {markdown(about['failure'])}"] if about["failure"] else []
        _write(root / "report.pdf", (root / MAIN / "report.pdf").read_bytes())
    lines += _single(root, manifests)
    _write(root / "README.md", ("\n".join(lines) + "\n").encode())


def _single(root: Path, reports: Container[str]) -> list[str]:
    """What came out of notebooks that were run by themselves, with an output folder of their own."""
    lines: list[str] = []
    for folder in sorted(root.iterdir()):
        if folder.name in reports or folder.name.startswith("smoke"):
            continue
        for kind in EXPERIMENTS:
            file = folder / f"{kind.notebook}.json"
            if not file.exists():
                continue
            record = json.loads(file.read_text())
            tables = ", ".join(f"[{n}]({folder.name}/{n}.md)" for n in record["tables"])
            lines += [
                "",
                f"**{folder.name}: {markdown(record['title'])}** ({tables})",
                "",
                *("```sh", f"{record['command']} -p output reports/{folder.name}", "```"),
                "",
                *(f"- {markdown(finding)}" for finding in record["findings"]),
            ]
    said = "Outside the reports: notebooks with other parameters, such as a look for a cause."
    return ["", "## Single notebooks", "", said, *lines] if lines else []


# --- the runs -----------------------------------------------------------------------------------


def _runs(folder: Path, store: Store, sections: Iterable[Section]) -> dict[str, dict[str, Any]]:
    """What the manifest says of each run, warm starts first; those they start from included."""
    known: dict[str, dict[str, Any]] = {}

    def add_starts(config: Mapping[str, Any]) -> None:
        for start in config.values():
            if isinstance(start, dict) and "method" in start:  # itself a run's configuration
                what = " ".join(start[x] for x in ("method", "detector", "backbone") if x in start)
                label = f"warm start: {what}"
                if start["method"] == "labelenc_stage1":
                    label = f"{what.replace('_', ' ', 1)} seed {start['seed']}"
                known.setdefault(identity(start), {"label": label, "config": start})
                add_starts(start)

    for section in sections:
        for id, run in section.record.get("runs", {}).items():
            known[id] = run
            add_starts(run["config"])
    file = folder / "manifest.json"
    before = json.loads(file.read_text())["runs"] if file.exists() else {}
    labels = {id: run["label"] for id, run in known.items()}
    order = sorted(known, key=lambda id: (not labels[id].startswith("warm"), labels[id], id))
    return {id: _run(id, known[id], folder, store, before.get(id, {})) for id in order}


def _run(
    id: str, known: Mapping[str, Any], folder: Path, store: Store, before: Mapping[str, Any]
) -> dict[str, Any]:
    """``known`` is what a notebook's record says of it, and stands where no files do."""
    recorded, stored = _files(folder / "runs" / id), _files(store.root / id)
    files = stored if "done.json" in stored or not recorded else recorded
    ap = _final(files)
    hashes = {x: _digest(files[x]) for x in ("evaluations.jsonl", "metrics.jsonl") if x in files}
    entry = {
        "label": known["label"],
        "state": "unfinished" if files else "missing",
        "AP": ap,
        "seed": known["config"]["seed"],
        "sha256": hashes,
        "config": known["config"],
    }
    for part in ("done", "environment"):
        if f"{part}.json" in files:
            entry[part] = json.loads(files[f"{part}.json"])
        elif part in known:
            entry[part] = known[part]
    if "done" in entry:
        entry["state"] = "finished"
    if files is stored and recorded and recorded.get("metrics.jsonl") != stored["metrics.jsonl"]:
        # The steps' seconds tell the two trainings apart, even where all else is equal.
        entry["trained_again"] = {"recorded_AP": _final(recorded), "AP": ap}
    elif before.get("sha256") == hashes and "trained_again" in before:
        entry["trained_again"] = before["trained_again"]
    return entry


def _files(folder: Path) -> dict[str, bytes]:
    """The small records of a run, unpacked, by name."""
    names = ("config.json", "environment.json", "done.json", "evaluations.jsonl", "metrics.jsonl")
    found = {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}
    packed = folder / "metrics.jsonl.gz"
    return found | (
        {"metrics.jsonl": gzip.decompress(packed.read_bytes())} if packed.exists() else {}
    )


def _final(files: Mapping[str, bytes]) -> float | None:
    """AP of the last evaluation; none for a run that has none, or on images without objects."""
    lines = files.get("evaluations.jsonl", b"").splitlines()
    ap = json.loads(lines[-1])["AP"] if lines else math.nan
    return None if math.isnan(ap) else ap


def _keep_records(
    folder: Path, store: Store, runs: Mapping[str, Mapping[str, Any]], complete: bool
) -> None:
    """Keep the small records of the runs in ``runs/``, for those who have not the store.

    Runs that are no longer used go, but not while a notebook that failed may still use them.
    """
    for id in runs:
        files = _files(store.root / id)
        if "metrics.jsonl" not in files:
            continue
        target = folder / "runs" / id
        target.mkdir(parents=True, exist_ok=True)
        packed = gzip.compress(files.pop("metrics.jsonl"), mtime=0)
        for name, content in {**files, "metrics.jsonl.gz": packed}.items():
            _write(target / name, content)
    for kept in (folder / "runs").glob("*") if complete else ():
        if kept.name not in runs:
            shutil.rmtree(kept)


# --- what the report says -----------------------------------------------------------------------


def _facts(
    asked: Experiment, sections: Sequence[Section], runs: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Title, abstract and scale."""
    seeds = sorted({seed for s in sections for seed in s.record.get("seeds", asked.seeds)})
    data = asked.source.name
    own = [run["config"] for run in runs.values() if not run["label"].startswith("warm start")]

    def names(field: str) -> str:
        return _listed([NAMES[x] for x in dict.fromkeys(c[field] for c in own if field in c)])

    counts = BUILT_IN.get(asked.profile, {}) if not asked.data else {}
    images = (
        f" ({counts['train']:,} training and {counts['val']:,} validation images)" if counts else ""
    )
    lengths = sorted({(c["iterations"], c["batch_size"]) for c in own})
    recipe = _listed([f"{n:,} iterations of {b} images" for n, b in lengths])
    noun = "seed" if len(seeds) == 1 else "seeds"
    machines = _machines(runs)
    abstract = [
        "SSSD (Deng, Zhou, Tian, Pan and Aguiar, ICIP 2023) trains an object detector with a teacher "
        "that exists only during training: the detector's own feature pyramid, annotated with the "
        "labels. It pulls the detector towards the teacher by a Jensen-Shannon distance, and steps "
        "up the weight λ of that distance when the learning rate decays.",
        "This report rebuilds the paper's tables and figures with code of its own, at the scale "
        f"“{asked.profile}” on {data}{images}"
        + (f": {names('detector')} with {names('backbone')}, {recipe}, " if own else ", ")
        + f"{noun} {_listed(list(map(str, seeds)))}.",
    ]
    if runs:
        abstract.append(
            f"It rests on {len(runs)} runs, {_hours(runs)} of training steps"
            + (f" on {_listed(machines)}." if machines else ".")
        )
    abstract.append(
        {
            "smoke": "It is a try of the machinery, and its numbers mean nothing.",
            "paper": "The recipe is the published one, so that its numbers may be read beside the "
            "paper's, within their intervals.",
        }.get(
            asked.profile,
            "Model, images and training are far smaller than the paper's, so that values of AP are "
            "not comparable with it; what can be compared is which side is ahead, and whether the "
            "intervals allow it to be said.",
        )
    )
    missing = [section.title for section in sections if section.failure]
    if missing:
        abstract.append(
            f"{len(missing)} of {len(sections)} sections are missing: {_listed(missing)}."
        )
    return {
        "title": TITLE,
        "running": "SSSD, rebuilt",
        "profile": asked.profile,
        "data": data,
        "scale": f"{asked.profile} · {data} · {noun} {', '.join(map(str, seeds))}",
        "smoke": asked.profile == "smoke",
        "seeds": seeds,
        "abstract": abstract,
    }


def _statements(sections: Iterable[Section]) -> list[dict[str, Any]]:
    """The paper's statements by notebook, with the findings that stand beside them."""
    by_name = {section.notebook: section for section in sections}
    groups: dict[str, dict[str, Any]] = {}
    for statement in PAPER.values():
        section = by_name.get(statement.notebook)
        group = groups.setdefault(
            statement.notebook,
            {
                "notebook": statement.notebook,
                "section": section.title if section else None,
                "findings": section.findings if section else [],
                "rows": [],
            },
        )
        group["rows"].append({"what": statement.what, "says": statement.says})
    return list(groups.values())


def _printed(folder: Path, section: Section) -> dict[str, Any]:
    """A section as the template takes it."""
    figures = section.record.get("figures", {})
    tables = section.record.get("tables", {})
    return {
        "notebook": section.notebook,
        "title": section.title,
        "question": section.question,
        "failure": section.failure or None,
        "command": section.record.get("command", ""),
        "figures": [{"path": f"{name}.svg", "caption": text} for name, text in figures.items()],
        "tables": [
            {"name": name, "caption": text, **_table(folder / f"{name}.csv")}
            for name, text in tables.items()
        ],
        "findings": section.findings,
    }


def _table(file: Path) -> dict[str, Any]:
    """A table's CSV as columns and rows of text, laid out for print.

    Columns of numbers stand on the right. Long heads are broken to about the width of the cells;
    a rule sets rows apart that share their first value.
    """
    frame = pd.read_csv(file, dtype=str, keep_default_na=False)
    columns = []
    for position, name in enumerate(frame.columns.str.replace(" %", "\u00a0%")):
        cells = list(frame.iloc[:, position])
        width = max([9, *map(len, cells)])
        lines = textwrap.wrap(name, width, break_long_words=False, break_on_hyphens=False)
        right = position > 0 and all(NUMBER.fullmatch(cell) for cell in cells)
        columns.append({"head": lines or [""], "right": right and any(cells)})
    rows = frame.to_numpy().tolist()
    # A value that is the row's above stays out, in the first two columns, where they are text.
    words = 1 + (len(columns) > 1 and not columns[1]["right"])
    shown = [
        [
            "" if i and j < words and rows[i - 1][: j + 1] == row[: j + 1] else cell
            for j, cell in enumerate(row)
        ]
        for i, row in enumerate(rows)
    ]
    starts = [i for i in range(1, len(rows)) if rows[i][0] != rows[i - 1][0]]
    rules = starts if len(starts) < len(rows) - 1 else []
    sentences = any(len(cell) > 40 for row in rows for cell in row)
    return {"columns": columns, "rows": shown, "rules": rules, "sentences": sentences}


def _appendix(
    asked: Experiment,
    facts: Mapping[str, Any],
    runs: Mapping[str, Mapping[str, Any]],
    notebooks: Sequence[str],
) -> dict[str, Any]:
    """How to rebuild the report, and what it was made with."""
    call = "make reports"
    call += f" PROFILE={asked.profile}" if asked.profile != MAIN else ""
    call += f' DATA="{asked.source.name}"' if asked.data else ""
    call += f' SEEDS="{" ".join(map(str, facts["seeds"]))}"' if facts["seeds"] != [0] else ""
    call += f' ONLY="{" ".join(notebooks)}"' if len(notebooks) < len(EXPERIMENTS) else ""
    environments = [run["environment"] for run in runs.values() if "environment" in run]
    versions = {
        name: _listed(list(dict.fromkeys(str(e[name]) for e in environments)))
        for name in (environments[0] if environments else {})
        if name not in ("cpu", "gpu")
    }
    states = {state: [i for i, r in runs.items() if r["state"] == state] for state in UNDONE}
    again = [run["trained_again"] for run in runs.values() if "trained_again" in run]
    off = [abs((x["AP"] or 0.0) - (x["recorded_AP"] or 0.0)) for x in again]
    said = []
    if again:
        exact = sum(x == 0 for x in off)
        said.append(
            f"{len(again)} of the {len(runs)} runs had been on record already and were trained again: "
            f"{exact} of them gave the recorded final AP exactly"
            + (
                "."
                if exact == len(off)
                else f", the others differ by up to {100 * max(off):.2f} points."
            )
        )
    said += [f"{UNDONE[state]} {', '.join(ids)}." for state, ids in states.items() if ids]
    source = asked.source
    return {
        "call": call,
        "said": said,
        "facts": [
            ["machines", _listed(_machines(runs)) or "none"],
            ["training", f"{_hours(runs)} of steps, evaluations not counted"],
            [
                "data",
                f"{source.name}; annotations {source.train} (training), {source.val} (validation)",
            ],
            ["seeds", ", ".join(map(str, facts["seeds"]))],
            ["software of the runs", ", ".join(f"{k} {v}" for k, v in versions.items())],
            ["software of the report", ", ".join(f"{x} {version(x)}" for x in LIBRARIES)],
        ],
        "configuration": _configuration(runs),
        "runs": [
            [
                id,
                run["label"],
                f"{run['config']['iterations']:,}",
                f"{100 * run['AP']:.1f}" if run["AP"] is not None else "",
                f"{run['done']['training_seconds'] / 60:.1f}" if "done" in run else run["state"],
                f"{run['done']['peak_memory_mib'] / 1024:.1f}" if "done" in run else "",
            ]
            for id, run in runs.items()
        ],
    }


def _configuration(runs: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Each field of the configuration, what it means, and its values over the runs."""
    own = [run["config"] for run in runs.values() if not run["label"].startswith("warm start")]
    rows = []
    for field, about in RunConfig.model_fields.items():
        values = [config[field] for config in own if field in config]
        if field in ("data", "start", "seed") or not values:
            continue
        shown = [", ".join(map(str, v)) if isinstance(v, list) else _plain(v) for v in values]
        distinct = list(dict.fromkeys(shown))
        text = "; ".join(distinct)
        before, _, after = (about.description or "").partition("default: ")
        rows.append([field, before.rstrip("; ") or after, text])
    return rows


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else {None: "none"}.get(value, str(value))


def _machines(runs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    kinds = [run["environment"] for run in runs.values() if "environment" in run]
    return list(dict.fromkeys(str(kind["gpu"] or kind["cpu"]) for kind in kinds))


def _hours(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """Training time in all; what a stepwise run shares with its fixed-λ run is counted once."""
    seconds = 0.0
    for run in runs.values():
        config, whole = run["config"], run.get("done", {}).get("training_seconds", 0.0)
        stepwise = config.get("lambda2") is not None
        own = 1 - config["t1"] / config["iterations"] if stepwise else 1.0
        seconds += whole * own
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


# --- its forms ----------------------------------------------------------------------------------


def _typeset(folder: Path, sections: Iterable[Section], paper: Mapping[str, Any]) -> bytes:
    """The PDF. The template and all it shows are handed over in memory: no path matters."""
    figures = [f for s in sections for f in outputs(folder, s.record) if f.suffix == ".svg"]
    files: Any = {  # typst takes a mapping of files, which its type stubs do not know of
        "main.typ": (Path(__file__).parent / "report.typ").read_bytes(),
        "report.json": json.dumps(paper, ensure_ascii=False).encode(),
        **{file.name: file.read_bytes() for file in figures},
    }
    return typst.compile(files, format="pdf", ignore_system_fonts=True)


def _readme(folder: Path, sections: Iterable[Section], paper: Mapping[str, Any]) -> str:
    """The same for a repository's web page."""
    lines = [
        f"# {TITLE}",
        "",
        f"**{markdown(paper['scale'])}** · as a paper: [report.pdf](report.pdf)",
        "",
    ]
    if paper["smoke"]:
        lines += ["> **Smoke run: a try of the machinery. Its numbers mean nothing.**", ""]
    lines += [
        markdown(" ".join(paper["abstract"])),
        "",
        "## The paper's statements, and what came out",
        "",
    ]
    lines += ["| what | the paper | here |", "| --- | --- | --- |"]
    for group in paper["statements"]:
        here = "<br>".join(map(markdown, group["findings"]))
        for row in group["rows"]:
            lines.append(f"| {markdown(row['what'])} | {markdown(row['says'])} | {here} |")
            here = "as above" if group["findings"] else ""
    for section in sections:
        lines += ["", f"## {section.title}", "", markdown(section.question), ""]
        if section.failure:
            lines += [f"**This section is missing.** {markdown(section.failure)}"]
            continue
        lines += [f"- {markdown(finding)}" for finding in section.findings]
        lines += [""]
        command = ["", "```sh", section.record["command"], "```", ""]
        for name, caption in section.record["figures"].items():
            lines += [
                f"![{markdown(section.title)}]({name}.png)",
                "",
                f"*{markdown(caption)}*",
                *command,
            ]
        for name in section.record["tables"]:
            files = f"[CSV]({name}.csv), [LaTeX]({name}.tex)"
            lines += [(folder / f"{name}.md").read_text().strip(), "", f"As {files}.", *command]
    appendix = paper["appendix"]
    lines += ["", "## Where this comes from", "", "```sh", appendix["call"], "```", ""]
    lines += [f"- {name}: {markdown(value)}" for name, value in appendix["facts"]]
    lines += [f"- {markdown(sentence)}" for sentence in appendix["said"]]
    lines += ["- what was made from which runs, with hashes: [manifest.json](manifest.json)"]
    lines += ["", "<details><summary>The runs</summary>", ""]
    lines += ["| id | run | iterations | AP | min | GiB |", "| --- | --- | --- | --- | --- | --- |"]
    for row in appendix["runs"]:
        lines.append("| " + " | ".join(map(markdown, row)) + " |")
    return "\n".join([*lines, "", "</details>", ""])


def _write(file: Path, content: bytes) -> None:
    """A reader sees the old file or the new one, and an equal one is left alone."""
    if file.exists() and file.read_bytes() == content:
        return
    temporary = file.with_name(f".{file.name}.part")
    temporary.write_bytes(content)
    os.replace(temporary, file)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _hash(file: Path) -> str:
    return _digest(file.read_bytes())
