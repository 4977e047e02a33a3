"""The recipe that the stages of PANTHER's cascade share, with its variants as arguments.

Every stage trains the network of the foundation weights at 1 mm with SGD at 1e-3, from the stage
before it, stem and heads fresh (spec 03 §7.2, §7.4). The files in ``configs/`` name what differs.
"""

import dataclasses
from typing import Literal

from panther_jax.config.arguments import choose, number, parse_argument
from panther_jax.config.schema import (
    POLICIES,
    AugmentConfig,
    DataConfig,
    InitConfig,
    LoopConfig,
    OptimConfig,
    TrainConfig,
    ValidationConfig,
)
from panther_jax.panther.cases import TASK2_CASE
from panther_jax.panther.downloads import dataset_source, weights_source
from panther_jax.weights.public import KNOWN

KEYS = ("aug", "epochs", "lr", "schedule", "warmup", "init", "val")
SCHEDULES = {"poly": "poly", "poly_warmup": "poly_warmup", "cosine": "cosine_warmup"}
BUNDLES: dict[str, str | None] = {"t1": "mri_t1", "ct": "ct_pancreas", "none": None}
BUNDLES |= {name: name for name in KNOWN}  # public weights, under their names
VALIDATED = {"all": "all", "task2": TASK2_CASE}
Init = Literal["t1", "ct", "multitalent", "none"]


def panther_stage(argument: str, *, data: DataConfig, init: Init = "ct") -> TrainConfig:
    """The config of one stage on ``data``; ``argument`` holds ``key=value`` pairs.

    Keys: ``aug`` (a policy), ``epochs``, ``lr``, ``schedule`` poly|poly_warmup|cosine, ``warmup``
    (epochs), ``init`` t1|ct|none or the name of public weights, ``val`` all|task2.

    Raises:
        ConfigError: naming a key or value that is not known.
    """
    given = parse_argument(argument, KEYS)
    bundle = choose("init", given, BUNDLES, default=init)
    return TrainConfig(
        data=dataclasses.replace(data, source=data.source or dataset_source(data.dataset)),
        augment=AugmentConfig(
            policy=choose("aug", given, {name: name for name in POLICIES.names}, default="default")
        ),
        optim=OptimConfig(
            optimizer="sgd",
            lr=number("lr", given, default=1e-3),
            schedule=choose("schedule", given, SCHEDULES, default="poly"),
            warmup_epochs=number("warmup", given, default=50),
        ),
        loop=LoopConfig(epochs=number("epochs", given, default=1000)),
        init=InitConfig(bundle=bundle, source=weights_source(bundle), stem="reinit"),
        validation=ValidationConfig(cases=choose("val", given, VALIDATED, default="all")),
    )
