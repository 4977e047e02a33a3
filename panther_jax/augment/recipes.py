"""The augmentation policies in numbers: which transforms, how likely, how strong (spec 04 §3-5)."""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Literal

from panther_jax.augment.spatial import Interpolation

StepKind = Literal[
    "noise",
    "blur",
    "brightness",
    "shift",
    "contrast",
    "contrast_unclipped",
    "low_resolution",
    "gamma",
    "gamma_inverted",
    "median",
    "rectangles",
    "gradient",
    "local_gamma",
    "sharpen",
]

POLICIES = (
    "default",
    "no_mirroring",
    "only_mirror_01",
    "no_dummy_2d",
    "seg_ord0",
    "seg_ord0_no_mirroring",
    "none",
    "da5",
    "da5_ord0",
    "da5_seg_ord0",
    "da5_fork",
    "da5_fork_ord0",
    "da5_fork_seg_ord0",
)


@dataclass(frozen=True)
class Step:
    """One gated intensity transform: who is transformed, and the range of its parameter."""

    kind: StepKind
    gate: tuple[float, float]
    """Interval of the sample's uniform number: (0, p) for probability p."""
    p_channel: float = 1.0
    value_range: tuple[float, float] = (0.0, 1.0)
    same_axes: bool = False
    """One parameter for all axes (blur)."""
    second_range: tuple[float, float] = (0.0, 0.0)
    """The other half of the values (gradient, local gamma)."""
    is_alternative: bool = False
    """Excludes the step before it: the same uniform number decides, `gate` being disjoint."""
    batch_choice: tuple[int, int] | None = None
    """(draw, side): one of two alternatives, chosen once for the whole batch."""
    fork: bool = False
    """The winning fork's variant of the transform (spec 04 §5)."""


@dataclass(frozen=True)
class PolicySpec:
    """A policy in numbers; see spec 04 §3 for their origin."""

    augment: bool = True
    min_scale: float = 0.85
    """Divisor of the initial patch; the default's real smallest scale is 0.7 (spec 04 §2)."""
    scale_range: tuple[float, float] = (0.7, 1.4)
    same_scale: bool = True
    p_rotation: float = 0.2
    p_rotation_axis: float = 1.0
    p_scale: float = 0.2
    image_interpolation: Interpolation = "linear"
    label_interpolation: Interpolation = "linear"
    max_mirror_axes: int = 3
    """How many axes, from the first, may be flipped; in 2-D one less where this is 2."""
    allow_dummy_2d: bool = True
    fork: bool = False
    """Resampling and scale law of the winning fork (spec 04 §5)."""
    p_rot90: float = 0.0
    p_transpose: float = 0.0
    steps: tuple[Step, ...] = ()


def policy_spec(policy: str) -> PolicySpec:
    """Give the numbers of a policy.

    Raises:
        ValueError: for an unknown name; lists the known ones.
    """
    default = PolicySpec(steps=_default_steps())
    change = partial(dataclasses.replace, default)
    match policy:
        case "default":
            return default
        case "no_mirroring":
            return change(max_mirror_axes=0)
        case "only_mirror_01":
            return change(max_mirror_axes=2)
        case "no_dummy_2d":
            return change(allow_dummy_2d=False)
        case "seg_ord0":
            return change(label_interpolation="nearest")
        case "seg_ord0_no_mirroring":
            return change(label_interpolation="nearest", max_mirror_axes=0)
        case "none":
            return PolicySpec(augment=False, max_mirror_axes=0)
        case "da5":
            return _da5_spec()
        case "da5_ord0":
            return dataclasses.replace(
                _da5_spec(), image_interpolation="nearest", label_interpolation="nearest"
            )
        case "da5_seg_ord0":
            return dataclasses.replace(_da5_spec(), label_interpolation="nearest")
        case "da5_fork":
            return _da5_fork_spec()
        case "da5_fork_ord0":
            return dataclasses.replace(
                _da5_fork_spec(), image_interpolation="nearest", label_interpolation="nearest"
            )
        case "da5_fork_seg_ord0":
            return dataclasses.replace(_da5_fork_spec(), label_interpolation="nearest")
    raise ValueError(f"unknown augmentation policy {policy!r}; known are {', '.join(POLICIES)}")


def _default_steps() -> tuple[Step, ...]:
    # spec 04 §3.1, steps 2-8
    return (
        Step("noise", gate=(0.0, 0.1), value_range=(0.0, 0.1)),
        Step("blur", gate=(0.0, 0.2), p_channel=0.5, value_range=(0.5, 1.0)),
        Step("brightness", gate=(0.0, 0.15), value_range=(0.75, 1.25)),
        Step("contrast", gate=(0.0, 0.15), value_range=(0.75, 1.25)),
        Step("low_resolution", gate=(0.0, 0.25), p_channel=0.5, value_range=(0.5, 1.0)),
        Step("gamma_inverted", gate=(0.0, 0.1), value_range=(0.7, 1.5)),
        Step("gamma", gate=(0.0, 0.3), value_range=(0.7, 1.5)),
    )


def _da5_spec() -> PolicySpec:
    # spec 04 §4, steps 1-15
    return PolicySpec(
        min_scale=0.7,
        scale_range=(0.7, 1.43),
        same_scale=False,
        p_rotation=0.4,
        p_rotation_axis=0.5,
        p_rot90=0.5,
        p_transpose=0.5,
        steps=(
            Step("median", gate=(0.0, 0.1), p_channel=0.5),
            Step(
                "blur",
                gate=(0.1, 0.2),
                p_channel=0.5,
                value_range=(0.3, 1.5),
                same_axes=True,
                is_alternative=True,
            ),
            Step("noise", gate=(0.0, 0.1), value_range=(0.0, 0.1)),
            Step("shift", gate=(0.0, 0.1), p_channel=0.5, value_range=(0.0, 0.5)),
            Step("contrast", gate=(0.0, 0.1), p_channel=0.5, value_range=(0.5, 2.0)),
            Step(
                "contrast_unclipped",
                gate=(0.1, 0.2),
                p_channel=0.5,
                value_range=(0.5, 2.0),
                is_alternative=True,
            ),
            Step("low_resolution", gate=(0.0, 0.15), p_channel=0.5, value_range=(0.25, 1.0)),
            # Both inverted, unlike the default (spec 04 §4, steps 9 and 10).
            Step("gamma_inverted", gate=(0.0, 0.1), value_range=(0.7, 1.5)),
            Step("gamma_inverted", gate=(0.0, 0.1), value_range=(0.7, 1.5)),
            Step("rectangles", gate=(0.0, 0.4), p_channel=0.5),
            Step(
                "gradient",
                gate=(0.0, 0.3),
                p_channel=0.5,
                value_range=(-5.0, -1.0),
                second_range=(1.0, 5.0),
            ),
            Step(
                "local_gamma",
                gate=(0.0, 0.3),
                p_channel=0.5,
                value_range=(0.01, 0.8),
                second_range=(1.5, 4.0),
            ),
            Step("sharpen", gate=(0.0, 0.2), p_channel=0.5, value_range=(0.1, 1.0)),
        ),
    )


def _da5_fork_spec() -> PolicySpec:
    # spec 04 §5: the probabilities and ranges of §4, but which of two alternatives it is, is drawn
    # once a batch.
    changed = {"blur", "low_resolution", "gamma_inverted", "rectangles", "sharpen"}
    choices = {"median": (0, 0), "blur": (0, 1), "contrast": (1, 0), "contrast_unclipped": (1, 1)}
    da5, steps = _da5_spec(), []
    for step in da5.steps:
        if step.kind in choices:
            # Given that the alternative is chosen, its own gate: twice the joint probability.
            low, high = step.gate
            step = dataclasses.replace(
                step,
                gate=(0.0, 2 * (high - low)),
                is_alternative=False,
                batch_choice=choices[step.kind],
            )
        steps.append(dataclasses.replace(step, fork=step.kind in changed))
    return dataclasses.replace(da5, image_interpolation="cubic", fork=True, steps=tuple(steps))
