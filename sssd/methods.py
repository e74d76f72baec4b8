"""The methods that a detector can be trained with, by name, and how to add one.

A method of your own is LGD's teacher with another distance: a function, registered under a name.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from .losses import js, kl, mse

Distance = Callable[[Sequence[Tensor], Sequence[Tensor], int], Tensor]
"""(student's levels, teacher's levels, normaliser) → a scalar, like `losses.js`."""

DISTANCE_OF: dict[str, Distance] = {"lgd": mse, "kl": kl, "sssd": js}
"""The distance of each method that has LGD's teacher."""
LABELENC = ("labelenc_stage1", "labelenc")
"""LabelEnc's two stages: its teacher sees only the labels."""
TAUGHT = [*DISTANCE_OF, *LABELENC]
"""Every method that has a teacher."""
METHODS = ["baseline", "labelenc", "lgd", "kl", "sssd"]
"""The methods that can be compared."""
STEPS = ("crops", "labelenc_stage1")
"""What only prepares a run of a method: a classifier of object crops, and LabelEnc's stage 1."""
PUBLISHED_LAMBDA = {"lgd": 1.0, "sssd": 50.0, "labelenc_stage1": 1.0, "labelenc": 1.0}
"""The default λ: of LGD's and LabelEnc's releases; for SSSD the paper's equivalent of LGD's λ."""
REGISTERED: dict[str, str] = {}
"""The registered methods, each with the SHA-256 of its function's source."""


def register_distance(name: str, function: Distance, *, lam: float | None = None) -> None:
    """Add a method: LGD's teacher and schedules with a distance of your own.

    Then ``Distiller(model, method=name)``, configurations, command line and notebooks know it.
    Worker processes and notebook kernels import the package anew, so for them the call must be in
    the Python file that the environment variable ``SSSD_METHODS`` names. A run's id depends on a
    hash of the function's source: a changed function is a new run. Functions that it calls are not
    hashed.

    Args:
        name: lower-case letters, digits and underscores. Given again, it gets the new function.
        function: ``function(student, teacher, normaliser)`` returns a scalar. ``student`` and
            ``teacher`` are lists of levels [B, C, h_p, w_p] in float32 or wider, each normalised by
            `losses.normalise`; the teacher's have no gradient. ``normaliser`` is the constant of
            `losses.js`; you need not use it.
        lam: the default λ; without one, λ must be given for each run.

    Raises:
        ValueError: the name is taken or malformed, λ is negative or not finite, or the function's
            source cannot be read, as when it was typed at Python's prompt.
    """
    if not re.fullmatch("[a-z][a-z0-9_]*", name):
        raise ValueError(f"name: {name!r}; expected lower-case letters, digits and underscores")
    if name in (*STEPS, *METHODS) and name not in REGISTERED:
        raise ValueError(f"name: {name!r} is a method of this package; expected another name")
    if lam is not None and not 0 <= lam < float("inf"):
        raise ValueError(f"lam: {lam!r}; expected a number of at least 0")
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError) as error:
        raise ValueError(
            f"function: the source of {function!r} cannot be read; "
            "expected a function that is defined with def in a file or notebook"
        ) from error
    if name not in REGISTERED:
        METHODS.append(name)
        TAUGHT.append(name)
    DISTANCE_OF[name] = function
    REGISTERED[name] = hashlib.sha256(source.encode()).hexdigest()
    PUBLISHED_LAMBDA.pop(name, None)
    if lam is not None:
        PUBLISHED_LAMBDA[name] = float(lam)


def load_registered() -> None:
    """Execute the Python file that the environment variable ``SSSD_METHODS`` names, if it is set.

    Raises:
        ImportError: there is no such file, or it raises an error.
    """
    given = os.environ.get("SSSD_METHODS")
    if not given:
        return
    path = Path(given).expanduser().resolve()
    spec = importlib.util.spec_from_file_location("sssd_methods", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ImportError(f"SSSD_METHODS: {given!r} is not a file that ends in .py")
    os.environ["SSSD_METHODS"] = str(path)  # for the processes that begin in another folder
    module = sys.modules["sssd_methods"] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ImportError(f"SSSD_METHODS: {path}: {type(error).__name__}: {error}") from error
