"""The config of a command line: what its file, its options and its plans make of it."""

import dataclasses
from collections.abc import Sequence

from panther_jax.base import command
from panther_jax.base.errors import PlansError
from panther_jax.config import loading
from panther_jax.config.laptop import demo
from panther_jax.config.loading import ConfigSource
from panther_jax.config.schema import ConfigError, TrainConfig
from panther_jax.plans.architecture import NETWORKS
from panther_jax.preprocessing.normalization import NORMALIZATIONS
from panther_jax.training.data import planned
from panther_jax.training.options import Options


def resolve(options: Options, overrides: Sequence[str]) -> tuple[TrainConfig, ConfigSource]:
    """The config of a command line: file, ``--demo``, plans, ``--init``, then overrides.

    Raises:
        UsageError: if there is no such file, or it holds no such config.
        PlansError, StoreError, FileNotFoundError: if the plans that decide cannot be read.
    """
    try:
        settings, source = loading.load_config(options.config)
    except (ConfigError, FileNotFoundError) as error:
        raise command.UsageError(str(error)) from error
    try:
        if options.demo:
            settings = demo(settings)
        settings = _planned(settings, options)
        if options.init is not None:
            bundle = None if options.init == "none" else options.init
            settings = dataclasses.replace(
                settings, init=dataclasses.replace(settings.init, bundle=bundle, source="")
            )
        settings = loading.apply_overrides(settings, overrides, prog="python -m panther_jax.train")
        require_known(settings)
    except ConfigError as error:
        raise command.UsageError(str(error)) from error
    return settings, source


def _planned(settings: TrainConfig, options: Options) -> TrainConfig:
    try:
        return planned(settings, options)
    except (PlansError, FileNotFoundError) as error:
        if options.store is not None or options.from_plans is None:
            raise  # the store is at fault, not the command line
        raise command.UsageError(str(error)) from error


def require_known(settings: TrainConfig) -> None:
    """Make sure, before any work, that there is what the config names.

    Raises:
        ConfigError: naming the field and what there is.
    """
    from panther_jax.training.losses import require_loss

    require_loss(settings.loss)
    if settings.arch.network not in NETWORKS.names:
        raise ConfigError(f"arch.network: {NETWORKS.unknown(settings.arch.network)}")
    for scheme in settings.data.normalization or ():
        if scheme not in NORMALIZATIONS.names:
            raise ConfigError(f"data.normalization: {NORMALIZATIONS.unknown(scheme)}")
