"""Parameters in every form that Python, papermill, the command line or make can give them.

All forms lead to the same values: a list may be text, a number numpy's, a path a `Path`.
"""

from __future__ import annotations

import ast
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def plain(value: Any) -> Any:
    """The value in Python's own types: converts numpy's numbers and arrays, paths, containers."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {plain(name): plain(inner) for name, inner in value.items()}
    if isinstance(value, tuple):
        return tuple(plain(inner) for inner in value)
    if isinstance(value, list | range | set):
        return [plain(inner) for inner in value]
    return value.tolist() if hasattr(value, "tolist") else value


def values(given: Any) -> Any:
    """A list from a list, from a single value, or from text: ``0,1``, ``0 1``, ``[0, 1]``."""
    given = plain(given)
    if isinstance(given, str):
        words = given.strip().strip("[]()").replace(",", " ").split()
        return tuple(literal(word) for word in words)
    return given if isinstance(given, list | tuple | Mapping) or given is None else (given,)


def text(given: Any) -> Any:
    """Text from text, from a path, or from a mapping, which `mapping` can read again."""
    given = plain(given)
    return json.dumps(given, ensure_ascii=False) if isinstance(given, Mapping) else given


def literal(word: str) -> Any:
    """The Python value that a word stands for; any other word is text."""
    try:
        return ast.literal_eval(word)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return word


def mapping(given: str) -> dict[str, Any] | None:
    """The mapping that text such as ``{"a": 1}`` holds, in JSON or Python; None for other text."""
    if not given.lstrip().startswith("{"):
        return None
    try:
        value = json.loads(given)
    except (ValueError, RecursionError):
        value = literal(given.strip())
    return value if isinstance(value, dict) else None


def absolute(parameter: str, path: str | Path) -> Path:
    """The absolute path; if there cannot be such a path, a ValueError names the parameter."""
    try:
        place = Path(path).expanduser().resolve()
        place.exists()
        return place
    except (OSError, RuntimeError, ValueError) as error:  # too long, unknown user's home, NUL
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"{parameter}: {str(path)!r} cannot be a path: {why}") from None


def check_folder(parameter: str, folder: Path) -> None:
    """Check that a folder is writable, without making it; a ValueError names the parameter."""
    try:
        there = folder
        while not there.exists() and there != there.parent:
            there = there.parent
        with tempfile.TemporaryFile(dir=there):
            pass
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"{parameter}: nothing can be written to {str(folder)!r}: {why}") from None
