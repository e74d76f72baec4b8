"""Smooth and Stepwise Self-Distillation for Object Detection (SSSD, ICIP 2023), with running code.

In your own training loop one line is enough: ``model = sssd.Distiller(model)``.

To read the package, in this order:

- the method: `losses`, `teacher`, `distiller`; then `detectors`, `labelenc`, `methods`, `roi_align`;
- a training: `config` and `profiles` say what is trained, `starts` from which weights, and `engine`
  trains it; `evaluation` and `intervals` say what came out;
- keeping it: `records` are the files of a run, `runs` is the store, `pool` trains several at once;
- around it: `data`, `export`, `bench`, `inventory`, `curves`, `parameters`, and the command line;
- `reproduce`: the paper's tables and figures, a module for each notebook.
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
