"""Every setting of a run, with its default and its meaning.

A YAML file of ``configs/`` holds the settings that differ from the defaults; ``key=value`` on the command line takes
precedence over both. ``tmass config`` prints the list of settings.
"""

from tmass_dist.config.loading import CONFIG_DIR, find_config, load_config, make_config, to_yaml
from tmass_dist.config.model import DataConfig, ModelConfig, StochasticConfig
from tmass_dist.config.parts import TrainPart
from tmass_dist.config.schema import Config, differing_keys, flat
from tmass_dist.config.training import EngineConfig, EvaluationConfig, LogConfig, OptimConfig

__all__ = [
    "CONFIG_DIR",
    "Config",
    "DataConfig",
    "EngineConfig",
    "EvaluationConfig",
    "LogConfig",
    "ModelConfig",
    "OptimConfig",
    "StochasticConfig",
    "TrainPart",
    "differing_keys",
    "find_config",
    "flat",
    "load_config",
    "make_config",
    "to_yaml",
]
