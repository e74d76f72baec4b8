"""Smooth and Stepwise Self-Distillation for Object Detection (SSSD, ICIP 2023), with running code.

The one line for a training loop of your own: ``model = sssd.Distiller(model)``.
"""

import warnings

__version__ = "0.2.0"  # before the imports: the records of a run name it

# Progress is text, in terminals and notebooks; accelerate's import asks for widgets all the same.
warnings.filterwarnings("ignore", "IProgress not found")

from .config import DataSource, RunConfig
from .distiller import Distiller
from .methods import load_own, register_distance
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

load_own()  # last: that file imports this package
