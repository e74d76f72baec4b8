"""One class a notebook: its parameters, its runs, its figures and tables."""

from .architecture import Fig1
from .base import Experiment, ParameterError
from .stepwise import Fig3

EXPERIMENTS: tuple[type[Experiment], ...] = (Fig1, Fig3)
"""In the order of the report."""

__all__ = ["EXPERIMENTS", "Experiment", "Fig1", "Fig3", "ParameterError"]
