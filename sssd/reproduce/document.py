"""The report: one document of what the notebooks saved, written for print and for the web.

The document is a list of blocks (headings, text, lists, commands, figures, tables). ``document.typ``
sets them as a PDF, `blocks.on_the_web` writes them as the page of the report's folder. No time and no place
is written, so that the same runs give the same files.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd
import typst

from ..config import RunConfig
from ..profiles import BUILT_IN, CHANGES, PROFILES
from ..records import read_json, write_json
from ..runs import Store
from . import EXPERIMENTS, Experiment, archive, verdicts
from .blocks import Block, Grid, Items, Picture, Text, grid, on_the_web
from .discussion import discuss
from .experiment import write
from .paper import NAMES, PAPER
from .verdicts import Verdict
from .words import counted, duration, listed, markdown

TITLE = "Smooth and Stepwise Self-Distillation for Object Detection"
MAIN = ("night", "mini")
"""The reports whose results stand in ``reports/README.md``, and their verdicts in the repository's
README; the PDF of the one with most parts lies on top of ``reports/``."""
LIBRARIES = ("matplotlib", "pandas", "pycocotools", "scipy", "torch", "typst")
MARKS = ("<!-- verdicts -->", "<!-- end of verdicts -->")
"""Between these comments of the repository's README stands the main report's table of verdicts."""
SMOKE = "This is a smoke run: it shows that everything works, and its numbers mean nothing."
Runs = Mapping[str, Mapping[str, Any]]
"""What the manifest says of each run, by id."""


@dataclass(frozen=True)
class Section:
    """One notebook's part of the report: its record, or why there is none."""

    kind: type[Experiment]
    record: dict[str, Any]
    failure: str

    @property
    def findings(self) -> list[str]:
        return self.record.get("findings", [])


# --- assembling -----------------------------------------------------------------------------------


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
        file, failure = folder / f"{kind.notebook}.json", failures.get(kind.notebook, "")
        if failure or file.exists():
            record = {} if failure else read_json(file)
            sections.append(Section(kind, record, failure))
    runs = archive.describe([s.record.get("runs", {}) for s in sections], folder, store)
    seeds = sorted({seed for s in sections for seed in s.record.get("seeds", asked.seeds)})
    decided = verdicts.gather(section.record for section in sections)
    facts = {
        "title": TITLE,
        "subtitle": _subtitle(asked, sections),
        "scale": f"{asked.profile} · {asked.source.name} · {_seeds(sections) or 'no seeds'}",
        "smoke": SMOKE if asked.profile == "smoke" else "",
        "abstract": _abstract(asked, sections, runs, decided),
    }
    findings = [finding for section in sections for finding in section.findings]
    parts: dict[str, Sequence[Block]] = {
        "opening": [*_verdict_table(decided), *(Text(x, "warning") for x in _mixed(runs))],
        "changes": _changes(asked.profile),
        "results": [
            Text("Results", "heading"),
            *(block for section in sections for block in _section(folder, section)),
        ],
        "discussion": discuss(asked.profile, not asked.data, decided, findings, seeds),
        "appendix": _appendix(asked, runs, sections),
    }
    if decided:
        write(folder / "verdicts.csv", verdicts.csv(decided).encode())
    else:
        (folder / "verdicts.csv").unlink(missing_ok=True)
    pictures = [f for s in sections for f in outputs(folder, s.record) if f.suffix == ".svg"]
    write(folder / "report.pdf", _pdf(facts, parts, pictures))
    write(folder / "README.md", _page(facts, parts).encode())
    records = archive.keep(folder, store, asked.source, runs, [s.record for s in sections])
    manifest = _manifest(folder, asked, sections, runs, seeds, records)
    write_json(manifest, folder / "manifest.json")


def _manifest(
    folder: Path,
    asked: Experiment,
    sections: Sequence[Section],
    runs: Runs,
    seeds: Sequence[int],
    records: Mapping[str, str],
) -> dict[str, Any]:
    """What was made from which runs, with the hash of every file."""
    made = {s.kind: [f for f in outputs(folder, s.record) if f.exists()] for s in sections}
    return {
        "title": TITLE,
        "profile": asked.profile,
        "data": {"name": asked.source.name, "train": asked.source.train, "val": asked.source.val},
        "seeds": seeds,
        "versions": {name: version(name) for name in LIBRARIES},
        "report": {
            name: _hash(folder / name)
            for name in ("report.pdf", "README.md", "verdicts.csv")
            if (folder / name).exists()
        },
        "records": records,
        "notebooks": {
            section.kind.notebook: {
                "title": section.kind.title,
                "command": section.record.get("command"),
                "failure": section.failure or None,
                "runs": sorted(section.record.get("runs", {})),
                "sha256": {file.name: _hash(file) for file in made[section.kind]},
            }
            for section in sections
        },
        "runs": runs,
    }


def _subtitle(asked: Experiment, sections: Sequence[Section]) -> str:
    made = [section for section in sections if not section.failure]
    what = "every table and figure"
    if len(made) < len(EXPERIMENTS):
        what = f"{len(made)} of {len(EXPERIMENTS)} parts: {listed([s.kind.title for s in made])}"
    return f"A rebuild of {what}, at the scale “{asked.profile}” on {asked.source.name}"


def _verdict_table(
    decided: Sequence[Verdict], name: str = "verdicts", caption: str = ""
) -> list[Block]:
    if not decided:
        return []
    options: dict[str, Any] = {"widths": (1.15, 1, 0, 0, 0, 0, 0), "name": name, "kinds": ("csv",)}
    return [grid(verdicts.table(decided), caption or verdicts.caption(decided), **options)]


def _mixed(runs: Runs) -> list[str]:
    """What to say where the runs come from different software; nothing where they do not."""
    kinds = {
        "version of the method": [run["config"].get("method_version", 0) for run in runs.values()]
    }
    environments = [run["environment"] for run in runs.values() if "environment" in run]
    for name in dict.fromkeys(key for e in environments for key in e):
        if name not in ("cpu", "gpu", "system"):
            kinds[name] = [e.get(name, "none") for e in environments]
    different = [
        f"{name} {listed(sorted(set(map(str, values))))}"
        for name, values in kinds.items()
        if len(set(values)) > 1
    ]
    if not different:
        return []
    return [
        f"The runs of this report come from different software: {'; '.join(different)}. Their "
        "differences may be the software's."
    ]


def _changes(profile: str) -> list[Block]:
    """The fields in which the profile differs from the paper's recipe, each with its reason."""
    reasons = CHANGES[profile]
    if not reasons:
        return []
    fields, rows = RunConfig.model_fields, []
    paper: dict[str, Any] = {"data": "COCO", **PROFILES["paper"]}
    data = "built-in shapes" if profile in BUILT_IN else "given"
    own = {"data": data, "start": "warm start", **PROFILES[profile]}
    for field, reason in reasons.items():
        about = fields[field]
        follows = (about.description or "").partition("default: ")[2]
        theirs = paper.get(field, follows or about.default)
        rows.append([field, _plain(theirs), _plain(own[field]), reason])
    frame = pd.DataFrame(rows, columns=["field", "paper", profile, "why"])
    caption = (
        f"What the scale “{profile}” changes in the paper's recipe, and why; the built-in images "
        "and the warm start are not used where other data or weights are given. All other fields are the "
        "paper's, those that follow from others in its proportions."
    )
    return [
        Text("What the small scale changes, and why", "subheading"),
        grid(frame, caption, widths=(0, 0.5, 0, 1)),
    ]


def _abstract(
    asked: Experiment,
    sections: Sequence[Section],
    runs: Runs,
    decided: Sequence[Verdict],
) -> str:
    """What SSSD is, what was trained here, what came out, and how far the numbers carry."""
    own = [run["config"] for run in runs.values() if not archive.is_warm_start(run)]
    names = {
        field: listed([NAMES[x] for x in dict.fromkeys(c[field] for c in own if field in c)])
        for field in ("detector", "backbone")
    }
    lengths = sorted({(c["iterations"], c["batch_size"]) for c in own})
    recipe = listed([f"{n:,} iterations of {counted(b, 'image')}" for n, b in lengths])
    trained = f"{names['detector']} with {names['backbone']}, {recipe}, " if own else ""
    built_in = BUILT_IN.get(asked.profile, {}) if not asked.data else {}
    size = "{train:,} training and {val:,} validation images"
    images = f" ({size.format(**built_in)})" if built_in else ""
    machines = listed(_machines(runs))
    reach = {
        "smoke": SMOKE,
        "paper": "The recipe is the published one, so that its numbers may be read beside the "
        "paper's, within their intervals.",
    }.get(
        asked.profile,
        "Model, images and training are far smaller than the paper's, so that values of AP are "
        "not comparable with it; what can be compared is which side is ahead, and whether the "
        "intervals allow this to be said.",
    )
    said = [
        "SSSD (Deng, Zhou, Tian, Pan and Aguiar, ICIP 2023) trains an object detector with a "
        "teacher that exists only during training: the detector's own feature pyramid, annotated "
        "with the labels. It pulls the detector towards the teacher by a Jensen-Shannon distance, "
        "and steps up the weight λ of that distance when the learning rate decays.",
        "This report rebuilds the paper's tables and figures with code of its own, at the scale "
        f"“{asked.profile}” on {asked.source.name}{images}: {trained}{_seeds(sections)}.",
        *verdicts.sentences(decided),
        f"The report rests on {counted(len(runs), 'run')}, {duration(_seconds(runs))} of training steps"
        f"{f' on {machines}' if machines else ''}."
        if runs
        else "",
        reach,
    ]
    missing = [section.kind.title for section in sections if section.failure]
    if missing:
        said.append(f"{len(missing)} of {len(sections)} sections are missing: {listed(missing)}.")
    return " ".join(filter(None, said))


def _section(folder: Path, section: Section) -> list[Block]:
    blocks: list[Block] = [Text(section.kind.title, "subheading"), Text(section.kind.question)]
    stated = [str(x) for x in PAPER.values() if x.notebook == section.kind.notebook]
    if stated:
        blocks.append(Text(f"The paper states: {'. '.join(stated)}."))
    if section.failure:
        return [*blocks, Text(f"This section is missing. {section.failure}", "warning")]
    if section.findings:
        blocks.append(Items(section.findings))
    record, command = section.record, section.record["command"]
    blocks += [Picture(name, text, command) for name, text in record["figures"].items()]
    for name, text in record["tables"].items():
        frame = pd.read_csv(folder / f"{name}.csv", dtype=str, keep_default_na=False)
        blocks.append(grid(frame, text, command=command, name=name))
    return blocks


def _seeds(sections: Sequence[Section]) -> str:
    """How many seeds the sections have, in words: ``1 seed``, ``2 to 8 seeds``."""
    counts = sorted({len(s.record["seeds"]) for s in sections if s.record.get("runs")})
    if len(counts) > 1:
        return f"{counts[0]} to {counted(counts[-1], 'seed')}"
    return counted(counts[0], "seed") if counts else ""


def _appendix(asked: Experiment, runs: Runs, sections: Sequence[Section]) -> list[Block]:
    """How to rebuild the report, and what it was made with."""
    call = "make reports"
    default = Experiment.model_fields["profile"].default
    call += f" PROFILE={asked.profile}" if asked.profile != default else ""
    call += f" DATA={shlex.quote(asked.source.name)}" if asked.data else ""
    own = {s.kind: s.record["seeds"] for s in sections if s.record}
    usual = {kind: list(kind.defaults(asked.profile)["seeds"]) for kind in own}
    if own != usual:
        call += f' SEEDS="{" ".join(map(str, sorted({x for y in own.values() for x in y})))}"'
    notebooks = [section.kind.notebook for section in sections]
    call += f' ONLY="{" ".join(notebooks)}"' if len(notebooks) < len(EXPERIMENTS) else ""
    environments = [run["environment"] for run in runs.values() if "environment" in run]
    versions = {
        name: listed(list(dict.fromkeys(str(e[name]) for e in environments)))
        for name in (environments[0] if environments else {})
        if name not in ("cpu", "gpu")
    }
    source = asked.source
    facts = {
        "machines": listed(_machines(runs)) or "none",
        "training": f"{duration(_seconds(runs))} of steps, evaluations not counted",
        "data": f"{source.name}; annotations {source.train} (training), {source.val} (validation)",
        "seeds": _seeds(sections) or "none",
        "software of the runs": ", ".join(f"{k} {v}" for k, v in versions.items()),
        "software of the report": ", ".join(f"{x} {version(x)}" for x in LIBRARIES),
    }
    undone = {
        "unfinished": "Trained for their first part only, as a search needs it, or interrupted: ",
        "missing": "No records are at hand of: ",
    }
    said = [
        "Runs are known by the hash of their configuration and never trained twice; on the CPU the "
        "same configuration and software give the same numbers, bit for bit. The file manifest.json "
        "beside this report lists all runs, with configuration, final AP, time and memory, and the "
        "SHA-256 of each record, figure and table. The command under a figure or table rebuilds that one alone."
    ]
    for state, sentence in undone.items():
        ids = [id for id, run in runs.items() if run["state"] == state]
        said += [f"{sentence}{', '.join(ids)}."] if ids else []
    taken = [id for id, run in runs.items() if "imported_from" in run.get("done", {})]
    if taken:
        said.append(
            f"Not trained again for this report, but taken from an earlier one's records: {', '.join(taken)}."
        )
    return [
        Text("Reproducibility", "heading"),
        Text("From a fresh clone, this report is rebuilt by"),
        Text(call, "command"),
        Text(" ".join(said)),
        grid(
            pd.DataFrame(list(facts.items()), columns=["what", "with which"]),
            "What this report was made with.",
            widths=(0, 1),
        ),
        _configuration(runs),
    ]


def _configuration(runs: Runs) -> Grid:
    """Each field of the configuration, what it means, and its values over the runs."""
    own = [run["config"] for run in runs.values() if not archive.is_warm_start(run)]
    rows = []
    for field, about in RunConfig.model_fields.items():
        values = [config[field] for config in own if field in config]
        if field in ("data", "start", "seed") or not values:
            continue
        distinct = list(dict.fromkeys(map(_plain, values)))
        meaning, _, default = (about.description or "").partition("default: ")
        rows.append([field, meaning.rstrip("; ") or default, "; ".join(distinct)])
    caption = (
        "Configuration of the runs, warm starts aside. Values that differ between runs are "
        "separated by semicolons."
    )
    frame = pd.DataFrame(rows, columns=["field", "meaning", "value"])
    return grid(frame, caption, widths=(0, 1, 1))


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else {None: "none"}.get(value, str(value))


def _machines(runs: Runs) -> list[str]:
    kinds = [run["environment"] for run in runs.values() if "environment" in run]
    return list(dict.fromkeys(str(kind["gpu"] or kind["cpu"]) for kind in kinds))


def _seconds(runs: Runs) -> float:
    """Training time in all; what a stepwise run shares with its fixed-λ run is counted once."""
    seconds = 0.0
    for run in runs.values():
        config, whole = run["config"], run.get("done", {}).get("training_seconds", 0.0)
        stepwise = config.get("lambda2") is not None
        seconds += whole * (1 - config["t1"] / config["iterations"] if stepwise else 1.0)
    return seconds


# --- its two forms --------------------------------------------------------------------------------


def _pdf(
    facts: Mapping[str, Any], parts: Mapping[str, Sequence[Block]], pictures: Iterable[Path]
) -> bytes:
    """The document as a paper. All that it shows is handed over in memory: no path matters."""
    content = {
        **facts,
        **{part: [{"kind": type(b).__name__} | asdict(b) for b in parts[part]] for part in parts},
    }
    files: Any = {  # typst takes a mapping of files, which its type stubs do not know of
        "main.typ": (Path(__file__).parent / "document.typ").read_bytes(),
        "document.json": json.dumps(content, ensure_ascii=False).encode(),
        **{file.name: file.read_bytes() for file in pictures},
    }
    return typst.compile(files, format="pdf", ignore_system_fonts=True)


def _page(facts: Mapping[str, Any], parts: Mapping[str, Sequence[Block]]) -> str:
    """The document as a repository's web page."""
    method = "The method, with its equations, is in [report.pdf](report.pdf)."
    return "\n\n".join(
        [
            f"# {facts['title']}",
            f"{markdown(facts['subtitle'])}. **{markdown(facts['scale'])}** · as a paper: [report.pdf](report.pdf)",
            *([f"> **{facts['smoke']}**"] if facts["smoke"] else []),
            *(on_the_web(block) for block in parts["opening"]),
            markdown(facts["abstract"]),
            method,
            *(on_the_web(b) for part in ("changes", "results", "discussion") for b in parts[part]),
            *(on_the_web(block) for block in parts["appendix"]),
            "What was made from which runs, with hashes: [manifest.json](manifest.json).\n",
        ]
    )


# --- the index of all reports ---------------------------------------------------------------------


def index(root: Path) -> None:
    """Write ``README.md`` of ``reports/``, with the main reports' verdicts and a PDF beside it."""
    manifests = {}
    for file in sorted(root.glob("*/manifest.json")):
        try:
            if not file.parent.name.startswith("smoke"):
                manifests[file.parent.name] = read_json(file)
        except ValueError as error:
            print(f"{error}; {file.parent.name} is left out of {root / 'README.md'}")
    lines = [
        "# Reports",
        "",
        "The paper's tables and figures, rebuilt: one report for each profile and data set. "
        "Written by `make reports`; what was made from which runs, with hashes, is in each "
        "`manifest.json`.",
        "",
        "| report | profile | data | seeds | runs | as a paper |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, manifest in manifests.items():
        seeds, data = ", ".join(map(str, manifest["seeds"])), markdown(manifest["data"]["name"])
        lines.append(
            f"| [{markdown(name)}]({quote(name)}/README.md) | {manifest['profile']} | {data} | {seeds} "
            f"| {len(manifest['runs'])} | [report.pdf]({quote(name)}/report.pdf) |"
        )
    main = [name for name in MAIN if name in manifests]
    if main:
        records = [
            read_json(root / name / f"{notebook}.json")
            for name in main
            for notebook, about in manifests[name]["notebooks"].items()
            if not about["failure"]
        ]
        decided = verdicts.gather(records)
        write(root / "verdicts.csv", verdicts.csv(decided).encode())
        lines += ["", *(on_the_web(b) for b in _verdict_table(decided))]
        _tell(root.parent / "README.md", decided)
        fullest = max(main, key=lambda name: len(manifests[name]["notebooks"]))
        write(root / "report.pdf", (root / fullest / "report.pdf").read_bytes())
    for name in main:
        lines += ["", f"## What came out at `{name}`", ""]
        lines += [f"As a paper: [report.pdf]({name}/report.pdf). With all figures: "]
        lines[-1] += f"[{name}]({name}/README.md)."
        for notebook, about in manifests[name]["notebooks"].items():
            file, failure = root / name / f"{notebook}.json", about["failure"]
            said = [f"missing: {failure}"] if failure else read_json(file)["findings"]
            lines += ["", f"**{about['title']}**", "", *(f"- {markdown(x)}" for x in said)]
    write(root / "README.md", ("\n".join(lines) + "\n").encode())


def _tell(readme: Path, decided: Sequence[Verdict]) -> None:
    """Put the verdicts between the two comments of the repository's README, where it has them."""
    text = readme.read_text() if readme.exists() else ""
    first, found, rest = text.partition(MARKS[0])
    _, closed, last = rest.partition(MARKS[1])
    if found and closed:
        caption = (
            "Intervals are 95 %, over seeds and validation images; with one seed over the images "
            "alone. A statement holds if the interval lies inside its range, is contradicted if it "
            "lies outside, and is not decided otherwise. The first page of the report says how "
            "each range was chosen."
        )
        table = [on_the_web(b) for b in _verdict_table(decided, "reports/verdicts", caption)]
        write(readme, "\n\n".join([first + MARKS[0], *table, MARKS[1] + last]).encode())


def _hash(file: Path) -> str:
    return archive.digest(file.read_bytes())
