"""The report: one document of what the notebooks saved, written for print and for the web.

The document is a list of blocks, each a kind and its content. ``document.typ`` sets them as a PDF,
`on_the_web` writes them as the page of the report's folder. No time and no path is written, so that
the same runs give the same files.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd
import typst

from ..config import RunConfig
from ..profiles import BUILT_IN, CHANGES, PROFILES
from ..records import read_json, write, write_json
from ..runs import Store
from . import EXPERIMENTS, Experiment, archive, verdicts
from .discussion import discuss
from .paper import PAPER
from .tables import Table
from .verdicts import Verdict
from .words import counted, duration, listed, markdown

TITLE = "Smooth and Stepwise Self-Distillation for Object Detection"
MAIN = ("night", "mini")
"""The reports whose verdicts stand in ``reports/README.md`` and in the repository's README; the PDF
of the one with the most parts is copied to ``reports/``."""
LIBRARIES = ("matplotlib", "pandas", "pycocotools", "scipy", "torch", "typst")
MARKS = ("<!-- verdicts -->", "<!-- end of verdicts -->")
"""Between these comments of the repository's README stands the main reports' table of verdicts."""
SMOKE = "This is a smoke run: it shows that everything works, and its numbers mean nothing."
KINDS = {"figures": ("svg", "png"), "tables": ("csv", "md", "tex")}
Block = tuple[str, Any]
"""Kind and content. Headings, subheadings, paragraphs, warnings and commands are text, items a list
of texts, refs what is referred to, such as ``figure table1_gains``; figures and tables a dict as
`_section` and `_table` make it."""
Sections = Mapping[type[Experiment], Mapping[str, Any]]
"""The record of each notebook; for one that failed only its ``failure``, a sentence."""
Runs = Mapping[str, Mapping[str, Any]]
"""What the manifest says about each run, by id."""


def outputs(folder: Path, record: Mapping[str, Any]) -> list[Path]:
    """The files of the figures and tables that a notebook's record names."""
    return [
        folder / f"{n}.{k}" for part in KINDS for n in record.get(part, {}) for k in KINDS[part]
    ]


def assemble(folder: Path, store: Store, asked: Experiment, failures: Mapping[str, str]) -> None:
    """Write ``report.pdf``, ``README.md`` and ``manifest.json`` from the records in ``folder``.

    Args:
        folder: where the notebooks left their records, figures and tables.
        store: where the runs are.
        asked: the profile, data and seeds of the call.
        failures: one sentence for each notebook that failed; its section shows it.
    """
    sections: dict[type[Experiment], dict[str, Any]] = {}
    for kind in EXPERIMENTS:
        file = folder / f"{kind.notebook}.json"
        if failures.get(kind.notebook):
            sections[kind] = {"failure": failures[kind.notebook]}
        elif file.exists():
            sections[kind] = read_json(file)
    records = list(sections.values())
    runs, kept = archive.describe([record.get("runs", {}) for record in records], folder, store)
    seeds = sorted({seed for record in records for seed in record.get("seeds", asked.seeds)})
    decided = verdicts.gather(records)
    document: dict[str, Any] = {
        "title": TITLE,
        "subtitle": _subtitle(asked, sections),
        "scale": f"{asked.profile} · {asked.source.name} · {_seeds(sections) or 'no seeds'}",
        "smoke": SMOKE if asked.profile == "smoke" else "",
        "abstract": _abstract(asked, sections, runs, decided),
        "opening": [*_verdicts(decided), *_mixed(runs)],
        "body": [
            *_changes(asked.profile),
            ("heading", "Results"),
            *(block for each in sections.items() for block in _section(folder, *each)),
            *discuss(asked.profile, not asked.data, decided, seeds),
        ],
        "appendix": _appendix(asked, runs, sections),
    }
    made = {kind: outputs(folder, record) for kind, record in sections.items()}
    write(folder / "report.pdf", _pdf(document, [x for files in made.values() for x in files]))
    write(folder / "README.md", _page(document).encode())
    if decided:
        write(folder / "verdicts.csv", verdicts.csv(decided).encode())
    else:
        (folder / "verdicts.csv").unlink(missing_ok=True)
    manifest = {
        "title": TITLE,
        "profile": asked.profile,
        "data": {"name": asked.source.name, "train": asked.source.train, "val": asked.source.val},
        "seeds": seeds,
        "versions": {name: version(name) for name in LIBRARIES},
        "report": _hashes(folder / x for x in ("report.pdf", "README.md", "verdicts.csv")),
        "records": archive.keep(folder, store, asked.source, kept, records),
        "notebooks": {
            kind.notebook: {
                "title": kind.title,
                "command": record.get("command"),
                "failure": record.get("failure"),
                "runs": sorted(record.get("runs", {})),
                "sha256": _hashes(made[kind]),
            }
            for kind, record in sections.items()
        },
        "runs": runs,
    }
    write_json(manifest, folder / "manifest.json")


def _hashes(files: Any) -> dict[str, str]:
    return {file.name: archive.digest(file.read_bytes()) for file in files if file.exists()}


# --- what it says ---------------------------------------------------------------------------------


def _subtitle(asked: Experiment, sections: Sections) -> str:
    made = sum("failure" not in record for record in sections.values())
    what = "every table and figure"
    if made < len(EXPERIMENTS):
        what = f"{made} of the {len(EXPERIMENTS)} parts"
    return f"A rebuild of {what} at the scale “{asked.profile}”, on {asked.source.name}"


def _table(frame: pd.DataFrame, caption: str, name: str = "", **more: Any) -> Block:
    """A table, set as `Table.layout` says.

    Args:
        name: that of its files; empty for a table without files.
        more: its ``command``; the ``links`` to its files; if its text wraps in print, the
            ``widths`` of its columns, 0: as wide as the cells.
    """
    table = Table(name, frame.astype(str), caption)
    content = {"name": name, "caption": caption, "markdown": table.markdown(), **table.layout()}
    return "table", content | {"command": "", "links": {}, "widths": []} | more


def _verdicts(decided: Sequence[Verdict], folder: str = "") -> list[Block]:
    if not decided:
        return []
    links, widths = {"CSV": f"{folder}verdicts.csv"}, [1.15, 1, 0, 0, 0, 0, 0]
    return [_table(verdicts.table(decided), verdicts.CAPTION, links=links, widths=widths)]


def _mixed(runs: Runs) -> list[Block]:
    """A warning if the runs come from different software."""
    kinds = {
        "version of the method": {run["config"].get("method_version", 0) for run in runs.values()}
    }
    for environment in (run["environment"] for run in runs.values() if "environment" in run):
        for name in environment.keys() - {"cpu", "gpu", "system"}:
            kinds.setdefault(name, set()).add(environment[name])
    different = [
        f"{k} {listed(sorted(map(str, v)))}" for k, v in sorted(kinds.items()) if len(v) > 1
    ]
    if not different:
        return []
    said = f"The runs of this report come from different software: {'; '.join(different)}. "
    return [("warning", f"{said}This may explain differences between them.")]


def _changes(profile: str) -> list[Block]:
    """The fields in which the profile differs from the paper's recipe, each with its reason."""
    if not CHANGES[profile]:
        return []
    rows = []
    paper: dict[str, Any] = {"data": "COCO", **PROFILES["paper"]}
    data = "built-in shapes" if profile in BUILT_IN else "given"
    own = {"data": data, "start": "warm start", **PROFILES[profile]}
    for field, reason in CHANGES[profile].items():
        about = RunConfig.model_fields[field]
        follows = (about.description or "").partition("default: ")[2]
        theirs = paper.get(field, follows or about.default)
        rows.append([field, _plain(theirs), _plain(own[field]), reason])
    said = (
        f"The recipe of the scale “{profile}” differs from the paper's in the fields of the table "
        "below. All others are the paper's; those that follow from others keep its proportions."
    )
    caption = (
        f"What the scale “{profile}” changes in the paper's recipe, and why. Data or weights that "
        "are given replace the built-in images or the warm start."
    )
    frame = pd.DataFrame(rows, columns=["field", "paper", profile, "why"])
    return [
        ("subheading", "What the small scale changes, and why"),
        ("paragraph", said),
        _table(frame, caption, "changes", widths=[0, 0.5, 0, 1]),
    ]


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else {None: "none"}.get(value, str(value))


def _abstract(asked: Experiment, sections: Sections, runs: Runs, decided: Sequence[Verdict]) -> str:
    """What SSSD is, what was trained here, what came out, and what the numbers can show."""
    built_in = BUILT_IN.get(asked.profile, {}) if not asked.data else {}
    size = " ({train:,} training and {val:,} validation images)" if built_in else ""
    seen = {own.images for own in decided if own.images}
    if not built_in and seen:
        size = f" ({max(seen):,} validation images)"
    environments = (run["environment"] for run in runs.values() if "environment" in run)
    kinds = list(dict.fromkeys(str(own["gpu"] or own["cpu"]) for own in environments))
    machines = f" on {listed(kinds)}" if kinds else ""
    trained = f" It rests on {counted(len(runs), 'run')} ({_seeds(sections)}), "
    trained += f"with {duration(_seconds(runs))} of training steps{machines}."
    said = [
        "SSSD (Deng, Zhou, Tian, Pan and Aguiar, ICIP 2023) trains an object detector with a "
        "teacher that exists only during training: the detector's own feature pyramid, annotated "
        "with the labels. It pulls the detector towards the teacher by a Jensen-Shannon distance, "
        "and steps up the weight λ of that distance when the learning rate decays.",
        "This report rebuilds the paper's tables and figures with code of its own, at the scale "
        f"“{asked.profile}” on {asked.source.name}{size.format(**built_in)}."
        + (trained if runs else ""),
        *verdicts.sentences(decided),
    ]
    reach = {
        "smoke": SMOKE,
        "paper": "The recipe is the published one, so its numbers can be compared with the paper's, "
        "within their intervals.",
    }
    small = (
        "Model, images and training are far smaller than the paper's, so values of AP cannot be "
        "compared with the paper's; what can be compared is which method is ahead, as far as the "
        "intervals show it."
    )
    said.append(reach.get(asked.profile, small))
    missing = [kind.title for kind, record in sections.items() if "failure" in record]
    if missing:
        said.append(f"{len(missing)} of {len(sections)} sections are missing: {listed(missing)}.")
    return " ".join(said)


def _section(folder: Path, kind: type[Experiment], record: Mapping[str, Any]) -> list[Block]:
    blocks: list[Block] = [("subheading", kind.title), ("paragraph", kind.question)]
    stated = [str(x) for x in PAPER.values() if x.notebook == kind.notebook]
    if stated:
        blocks.append(("paragraph", f"The paper states: {'; '.join(stated)}."))
    if "failure" in record:
        return [*blocks, ("warning", f"This section is missing. {record['failure']}")]
    shown = [f"{kind} {name}" for kind in ("figure", "table") for name in record[f"{kind}s"]]
    blocks += [("items", record["findings"]), *([("refs", shown)] if shown else [])]
    command = {"command": record["command"]}
    for name, caption in record["figures"].items():
        blocks.append(("figure", {"name": name, "caption": caption, **command}))
    for name, caption in record["tables"].items():
        frame = pd.read_csv(folder / f"{name}.csv", dtype=str, keep_default_na=False)
        links = {"CSV": f"{name}.csv", "LaTeX": f"{name}.tex"}
        blocks.append(_table(frame, caption, name, links=links, **command))
    return blocks


def _seeds(sections: Sections) -> str:
    """How many seeds the sections have, such as ``1 seed`` or ``2 to 8 seeds``."""
    counts = sorted({len(r["seeds"]) for r in sections.values() if r.get("runs")})
    several = f"{counts[0]} to " if len(counts) > 1 else ""
    return several + counted(counts[-1], "seed") if counts else ""


def _appendix(asked: Experiment, runs: Runs, sections: Sections) -> list[Block]:
    """How to rebuild the report, and what it was made with."""
    call = "make reports"
    if asked.profile != Experiment.model_fields["profile"].default:
        call += f" PROFILE={asked.profile}"
    call += f" DATA={shlex.quote(f'path/to/{asked.source.name}')}" if asked.data else ""
    own = {kind: record["seeds"] for kind, record in sections.items() if "seeds" in record}
    if own != {kind: list(kind.defaults(asked.profile)["seeds"]) for kind in own}:
        call += f' SEEDS="{" ".join(map(str, sorted({x for y in own.values() for x in y})))}"'
    if len(sections) < len(EXPERIMENTS):
        call += f' ONLY="{" ".join(kind.notebook for kind in sections)}"'
    environments = [run["environment"] for run in runs.values() if "environment" in run]
    software = {
        name: listed(list(dict.fromkeys(str(e.get(name)) for e in environments)))
        for name in (environments[0] if environments else {})
        if name not in ("cpu", "gpu")
    }
    source = asked.source
    facts = {
        "data": f"{source.name}; annotations {source.train} (training), {source.val} (validation)",
        "software of the runs": ", ".join(f"{k} {v}" for k, v in software.items()),
        "software of the report": ", ".join(f"{x} {version(x)}" for x in LIBRARIES),
    }
    said = [
        "Each run is named by the hash of its configuration and never trained twice; on the CPU the "
        "same configuration and software give the same numbers, bit for bit. The file manifest.json "
        "beside this report lists all runs, with configuration, final AP, time and memory, and the "
        "SHA-256 of each record, figure and table. The command under a figure or table rebuilds it "
        "without the rest of the report."
    ]
    some = {
        "Trained for their first part only, as a search needs it, or interrupted": [
            id for id, run in runs.items() if run["state"] == "unfinished"
        ],
        "There are no records of": [id for id, run in runs.items() if run["state"] == "missing"],
        "Not trained again for this report, but taken from an earlier one's records": [
            id for id, run in runs.items() if "imported_from" in run.get("done", {})
        ],
    }
    for sentence, ids in some.items():
        more = f" and {len(ids) - 8} more, which manifest.json names" if len(ids) > 8 else ""
        said += [f"{sentence}: {', '.join(ids[:8])}{more}."] if ids else []
    frame = pd.DataFrame(list(facts.items()), columns=["what", "with which"])
    return [
        ("heading", "Reproducibility"),
        ("paragraph", "From a fresh clone, this command rebuilds the report:"),
        ("command", call),
        ("paragraph", " ".join(said)),
        _table(frame, "What this report was made with.", widths=[0, 1]),
    ]


def _seconds(runs: Runs) -> float:
    """Total training time; what a stepwise run shares with its fixed-λ run is counted once."""
    seconds = 0.0
    for run in runs.values():
        config, whole = run["config"], run.get("done", {}).get("training_seconds", 0.0)
        stepwise = config.get("lambda2") is not None
        seconds += whole * (1 - config["t1"] / config["iterations"] if stepwise else 1.0)
    return seconds


# --- its two forms --------------------------------------------------------------------------------


def _pdf(document: Mapping[str, Any], files: Sequence[Path]) -> bytes:
    """The document as a paper. All that it shows is passed in memory, so no path matters."""
    given: Any = {  # typst takes a mapping of files, which its type stubs do not know
        "main.typ": (Path(__file__).parent / "document.typ").read_bytes(),
        "document.json": json.dumps(document, ensure_ascii=False).encode(),
        **{file.name: file.read_bytes() for file in files if file.suffix == ".svg"},
    }
    return typst.compile(given, format="pdf", ignore_system_fonts=True)


def _page(document: Mapping[str, Any]) -> str:
    """The document as a repository's web page."""
    subtitle, scale = markdown(document["subtitle"]), markdown(document["scale"])
    return "\n\n".join(
        [
            f"# {document['title']}",
            f"{subtitle}. **{scale}** · as a paper: [report.pdf](report.pdf)",
            *([f"> **{document['smoke']}**"] if document["smoke"] else []),
            *map(on_the_web, document["opening"]),
            markdown(document["abstract"]),
            "The method, with its equations, is in [report.pdf](report.pdf).",
            *filter(None, map(on_the_web, [*document["body"], *document["appendix"]])),
            "[manifest.json](manifest.json) says what was made from which runs, with hashes.\n",
        ]
    )


def on_the_web(block: Block) -> str:
    """A block as GitHub's Markdown."""
    match block:
        case "command", text:
            return f"```sh\n{text}\n```"
        case "refs", _:  # on a page figures and tables stay where they are
            return ""
        case "items", items:
            return "\n".join(f"- {markdown(item)}" for item in items)
        case ("figure" | "table") as kind, it:
            links = ", ".join(f"[{kind}]({file})" for kind, file in it.get("links", {}).items())
            files = f" As {links}." if links else ""
            shown = it["markdown"] if kind == "table" else f"![{it['name']}]({it['name']}.png)"
            command = f"\n\n{on_the_web(('command', it['command']))}" if it["command"] else ""
            return f"{shown}\n\n*{markdown(it['caption'])}*{files}{command}"
        case kind, text:
            forms = {"heading": "## {}", "subheading": "### {}", "warning": "> **{}**"}
            return forms.get(kind, "{}").format(markdown(text))


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
    blocks = [
        "# Reports",
        "The paper's tables and figures, rebuilt: one report for each profile and data set. "
        "`make reports` writes them; each `manifest.json` says what was made from which runs, with "
        "hashes.",
        "\n".join(
            f"- [{markdown(name)}]({quote(name)}/README.md), on {markdown(made['data']['name'])}: "
            f"{counted(len(made['seeds']), 'seed')}, {counted(len(made['runs']), 'run')}; as a "
            f"paper: [report.pdf]({quote(name)}/report.pdf)"
            for name, made in manifests.items()
        ),
    ]
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
        blocks += map(on_the_web, _verdicts(decided))
        _tell(root.parent / "README.md", decided)
        fullest = max(main, key=lambda name: len(manifests[name]["notebooks"]))
        write(root / "report.pdf", (root / fullest / "report.pdf").read_bytes())
    write(root / "README.md", ("\n\n".join(blocks) + "\n").encode())


def _tell(readme: Path, decided: Sequence[Verdict]) -> None:
    """Put the verdicts between the two comments of the repository's README, if it has them."""
    text = readme.read_text() if readme.exists() else ""
    first, found, rest = text.partition(MARKS[0])
    _, closed, last = rest.partition(MARKS[1])
    if found and closed:
        table = map(on_the_web, _verdicts(decided, "reports/"))
        write(readme, "\n\n".join([first + MARKS[0], *table, MARKS[1] + last]).encode())
