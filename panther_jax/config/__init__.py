"""The configuration of a run; its types and helpers are what a config file imports from here."""

from panther_jax.config.arguments import choose, number, parse_argument
from panther_jax.config.laptop import demo
from panther_jax.config.loading import (
    ConfigSource,
    apply_overrides,
    config_folders,
    differences,
    find_config,
    load_config,
)
from panther_jax.config.schema import (
    LOSSES,
    POLICIES,
    ArchConfig,
    AugmentConfig,
    CheckpointName,
    ConfigError,
    DataConfig,
    DevicesConfig,
    InitConfig,
    LogConfig,
    LoopConfig,
    LossConfig,
    OptimConfig,
    TrainConfig,
    ValidationConfig,
)
from panther_jax.plans.architecture import NETWORKS

__all__ = [
    "LOSSES",
    "NETWORKS",
    "POLICIES",
    "ArchConfig",
    "AugmentConfig",
    "CheckpointName",
    "ConfigError",
    "ConfigSource",
    "DataConfig",
    "DevicesConfig",
    "InitConfig",
    "LogConfig",
    "LoopConfig",
    "LossConfig",
    "OptimConfig",
    "TrainConfig",
    "ValidationConfig",
    "apply_overrides",
    "choose",
    "config_folders",
    "demo",
    "differences",
    "find_config",
    "load_config",
    "number",
    "parse_argument",
]
