"""Smooth and Stepwise Self-Distillation for Object Detection (SSSD, ICIP 2023), with running code.

In your own training loop one line is enough: ``model = sssd.Distiller(model)``.
"""

import warnings

__version__ = "0.2.0"  # before the imports, because `records` reads it

# Importing accelerate warns if Jupyter's widgets are missing; progress here is plain text.
warnings.filterwarnings("ignore", "IProgress not found")

from .config import DataSource, RunConfig
from .distiller import Distiller
from .methods import load_registered, register_distance
from .profiles import PROFILES, configure, open_data
from .runs import Run, Store

__all__ = [
    "PROFILES",
    "DataSource",
    "Distiller",
    "Run",
    "RunConfig",
    "Store",
    "configure",
    "open_data",
    "register_distance",
]

load_registered()  # last, because the user's file imports this package
