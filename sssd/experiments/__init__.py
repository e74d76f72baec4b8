"""One class a notebook: its parameters, its runs, its figures and tables."""

from .architecture import Fig1
from .base import Experiment, ParameterError
from .benchmark import Table1
from .calibration import Table3
from .distances import Losses
from .stepwise import Fig3
from .sweep import Fig2, Table4

EXPERIMENTS: tuple[type[Experiment], ...] = (Fig1, Losses, Table1, Table3, Table4, Fig2, Fig3)
"""In the order of the report."""

__all__ = [
    "EXPERIMENTS",
    "Experiment",
    "Fig1",
    "Fig2",
    "Fig3",
    "Losses",
    "ParameterError",
    "Table1",
    "Table3",
    "Table4",
]
