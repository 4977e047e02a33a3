"""The recipe that the stages of PANTHER's cascade share, with its variants as arguments.

Every stage trains the network of the foundation weights at 1 mm with SGD at 1e-3, from the stage
before it, stem and heads fresh (spec 03 §7.2, §7.4). The files in ``configs/`` name what differs.
"""

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

KEYS = ("aug", "epochs", "lr", "schedule", "warmup", "init", "val")
SCHEDULES = {"poly": "poly", "poly_warmup": "poly_warmup", "cosine": "cosine_warmup"}
BUNDLES = {"ct": "ct_pancreas", "multitalent": "multitalent", "none": None}
Init = Literal["ct", "multitalent", "none"]


def panther_stage(argument: str, *, data: DataConfig, init: Init = "ct") -> TrainConfig:
    """The config of one stage on ``data``; ``argument`` holds ``key=value`` pairs.

    Keys: ``aug`` (a policy), ``epochs``, ``lr``, ``schedule`` poly|poly_warmup|cosine, ``warmup``
    (epochs), ``init`` ct|multitalent|none, ``val`` all|task2.

    Raises:
        ConfigError: naming a key or value that is not known.
    """
    given = parse_argument(argument, KEYS)
    return TrainConfig(
        data=data,
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
        init=InitConfig(bundle=choose("init", given, BUNDLES, default=init), stem="reinit"),
        validation=ValidationConfig(
            cases=choose("val", given, {"all": "all", "task2": "task2"}, default="all")
        ),
    )
