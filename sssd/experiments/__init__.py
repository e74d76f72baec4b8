"""One class a notebook: its parameters, its runs, its figures and tables."""

from .architecture import Fig1
from .base import Experiment, ParameterError
from .distances import Losses
from .stepwise import Fig3

EXPERIMENTS: tuple[type[Experiment], ...] = (Fig1, Losses, Fig3)
"""In the order of the report."""

__all__ = ["EXPERIMENTS", "Experiment", "Fig1", "Fig3", "Losses", "ParameterError"]
