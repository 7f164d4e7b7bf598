"""Everything a run can be told, as frozen dataclasses; the command line and YAML files are made from them.

Names that PEFT, transformers and TRL users know keep their meaning. Each field is documented where it
is declared, checked in `__post_init__`, and written resolved into a run's `config.yaml`.
"""

from lorafold.config.adapter import DEFAULT_LEARNING_RATE, FULL, METHODS, MOVING, AdapterSpec
from lorafold.config.arithmetic import CombineConfig, RankConfig
from lorafold.config.checks import check_positive, gather_faults
from lorafold.config.data import DataConfig, RowsConfig
from lorafold.config.quantize import QuantizeConfig
from lorafold.config.run import RunConfig, option_names
from lorafold.config.task import TaskConfig
from lorafold.config.training import TrainingConfig
from lorafold.config.workers import Launched, workers_of

__all__ = [
    "DEFAULT_LEARNING_RATE",
    "FULL",
    "METHODS",
    "MOVING",
    "AdapterSpec",
    "CombineConfig",
    "DataConfig",
    "Launched",
    "QuantizeConfig",
    "RankConfig",
    "RowsConfig",
    "RunConfig",
    "TaskConfig",
    "TrainingConfig",
    "check_positive",
    "gather_faults",
    "option_names",
    "workers_of",
]
