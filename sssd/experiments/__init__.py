"""One class a notebook: its parameters, its runs, its figures and tables."""

from .base import Experiment, ParameterError
from .stepwise import Fig3

EXPERIMENTS: tuple[type[Experiment], ...] = (Fig3,)
"""In the order of the report."""

__all__ = ["EXPERIMENTS", "Experiment", "Fig3", "ParameterError"]
