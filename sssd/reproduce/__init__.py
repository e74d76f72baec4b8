"""The paper's tables and figures: a module for each notebook, and what they share."""

from .experiment import Experiment
from .experiment import ParameterError as ParameterError
from .fig1_architecture import Fig1
from .fig2_ap_curves import Fig2
from .fig3_stepwise import Fig3
from .losses import Losses
from .table1_benchmark import Table1
from .table3_calibration import Table3
from .table4_lambda_sweep import Table4

EXPERIMENTS: tuple[type[Experiment], ...] = (Fig1, Losses, Table1, Table3, Table4, Fig2, Fig3)
"""In the order of the report."""
