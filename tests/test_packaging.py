"""One set of versions, however it is installed."""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from importlib.metadata import distributions, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from sssd import __version__

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LINES = [x for x in (ROOT / "requirements.lock").read_text().splitlines() if x and x[0] != "#"]
LOCK = [Requirement(line) for line in LINES]


def applies(requirement: Requirement) -> bool:
    return requirement.marker is None or requirement.marker.evaluate()


def pinned(requirement: Requirement) -> str:
    (specifier,) = requirement.specifier
    assert specifier.operator == "==", requirement
    return specifier.version


def test_the_lock_pins_versions_and_names_no_place() -> None:
    for line, requirement in zip(LINES, LOCK, strict=True):
        assert not re.search(r"://|--|@", line), line
        assert "+" not in pinned(requirement), f"{line}: a build of one machine"


def test_the_lock_satisfies_every_dependency() -> None:
    extras = PROJECT["optional-dependencies"]
    every = [*PROJECT["dependencies"], *extras["dev"], *extras["onnx"]]
    for dependency in map(Requirement, every):
        found = [r for r in LOCK if canonicalize_name(r.name) == canonicalize_name(dependency.name)]
        assert found, f"{dependency.name} is not in the lock"
        for requirement in found:
            assert dependency.specifier.contains(pinned(requirement)), (dependency, requirement)


def test_torch_and_torchvision_are_a_pair() -> None:
    versions = {r.name: pinned(r) for r in LOCK}
    needed = [r for r in map(Requirement, requires("torchvision") or []) if r.name == "torch"]
    assert needed and all(r.specifier.contains(versions["torch"]) for r in needed)


def test_what_is_installed_is_what_is_locked() -> None:
    installed = {canonicalize_name(d.metadata["Name"]): d.version for d in distributions()}
    for requirement in filter(applies, LOCK):
        version = installed[canonicalize_name(requirement.name)]
        assert version.split("+")[0] == pinned(requirement), requirement.name


def test_conda_gets_the_same() -> None:
    """environment.yml brings a Python that the package accepts, and installs the lock file."""
    lines = (ROOT / "environment.yml").read_text().splitlines()
    entries = [line.strip()[2:] for line in lines if line.strip().startswith("- ")]
    assert entries == [
        "conda-forge",
        f"python{PROJECT['requires-python']}",
        "pip",
        "pip:",
        "--requirement requirements.lock",
        "--editable .",
    ]


def test_the_citation_is_of_this_version() -> None:
    lines = (ROOT / "CITATION.cff").read_text().splitlines()
    assert f"version: {__version__}" in lines and f"license: {PROJECT['license']}" in lines
    assert lines.index("preferred-citation:") < lines.index(
        '  title: "Smooth and Stepwise Self-Distillation for Object Detection"'
    )


def test_a_report_comes_with_what_it_rests_on() -> None:
    """The records of its runs, and the files of the manifest, unaltered."""
    manifests = [
        file
        for file in (ROOT / "reports").glob("*/manifest.json")
        if not file.parent.name.startswith("smoke")
    ]
    assert manifests
    for file in manifests:
        manifest = json.loads(file.read_text())
        if "records" not in manifest:  # made when each run had a folder
            for id in manifest["runs"]:
                assert (file.parent / "runs" / id / "config.json").exists(), f"{file}: {id}"
        hashes = [manifest["report"], *(n["sha256"] for n in manifest["notebooks"].values())]
        hashes.append(manifest.get("records", {}))
        for name, digest in (item for part in hashes for item in part.items()):
            found = hashlib.sha256((file.parent / name).read_bytes()).hexdigest()
            assert found == digest, f"{file}: {name}"
