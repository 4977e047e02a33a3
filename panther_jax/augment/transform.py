"""What a transform is: one class with its parameters, `sample` and `apply` (spec 04 §6).

`Transform.sample` draws for all channels of one sample, `Transform.apply` changes one channel. A
policy (`recipes`) lists instances; nothing else knows a transform by name, so one of a user's own
needs no more than its class and a policy that holds it.
"""

import abc
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

Gate = tuple[float, float]
Range = tuple[float, float]


@dataclass(frozen=True)
class PatchGeometry:
    """What the patch size and the policy decide before any pixel is read (spec 04 §2)."""

    patch_size: tuple[int, ...]
    initial_patch_size: tuple[int, ...]
    """Size to cut from the case, large enough for rotation and most scaling."""
    rotation_range_rad: tuple[float, float]
    dummy_2d: bool
    """Whether spatial transforms act on the slices of axis 0."""
    mirror_axes: tuple[int, ...]
    """Axes that are flipped in training and may be mirrored at inference."""


class Draw(NamedTuple):
    """Which channels are transformed, and their parameters (first axis of each leaf: channel)."""

    gate: Bool[Array, "channel"]
    value: Any


class Example(NamedTuple):
    """A panel of the gallery: its title, and the parameters that it shows, of one channel."""

    title: str
    value: Any


@dataclass(frozen=True, kw_only=True)
class Transform(abc.ABC):
    """A change of the intensities, drawn for a sample and then for each of its channels.

    Subclasses are frozen dataclasses, too, and add what their laws need.
    """

    family: ClassVar[str] = "added transforms"
    """Heading in the gallery."""
    gate: Gate = (0.0, 1.0)
    """Interval of a uniform number in which the sample is transformed: (0, p) for probability p."""
    p_channel: float = 1.0
    """Probability of each channel of a sample that is transformed."""
    is_alternative: bool = False
    """Excludes the transform before it: the same uniform number decides, `gate` being disjoint."""
    batch_choice: tuple[int, int] | None = None
    """(draw, side): one of two alternatives, chosen once for the whole batch."""

    def __post_init__(self) -> None:
        """Refuse what is no probability.

        Raises:
            ValueError: naming the transform and the value.
        """
        low, high = self.gate
        if not 0 <= low <= high <= 1:
            raise ValueError(
                f"{type(self).__name__}: gate {self.gate} is no interval within [0, 1]; write "
                "(0.0, p) for probability p"
            )
        if not 0 <= self.p_channel <= 1:
            raise ValueError(f"{type(self).__name__}: p_channel {self.p_channel} is not in [0, 1]")

    @abc.abstractmethod
    def sample(self, key: PRNGKeyArray, num_channels: int, patch: PatchGeometry) -> Draw:
        """Draw gates and parameters for all channels; most start with `gated`."""

    @abc.abstractmethod
    def apply(self, volume: Float[Array, "*spatial"], value: Any) -> Float[Array, "*spatial"]:
        """Change one channel by one channel's share of `Draw.value`; shape and type stay."""

    def examples(self, patch: PatchGeometry) -> Iterable[Example]:
        """Give the extremes that the gallery shows."""
        return ()

    def gated(
        self, key: PRNGKeyArray, num_channels: int, num_values: int
    ) -> tuple[Bool[Array, "channel"], Float[Array, "channel value"]]:
        """Draw the channels' gates and, for each channel, uniform numbers in [0, 1).

        Alternatives share a key and must ask for equally many values, to see the same first number.
        """
        uniform = jax.random.uniform(key, (1 + num_channels * (1 + num_values),))
        per_sample = (uniform[0] >= self.gate[0]) & (uniform[0] < self.gate[1])
        of_channels = uniform[1:].reshape(num_channels, 1 + num_values)
        return per_sample & (of_channels[:, 0] < self.p_channel), of_channels[:, 1:]


def between(uniform: Float[Array, "*any"], value_range: Range) -> Float[Array, "*any"]:
    """Map uniform numbers to a range."""
    low, high = value_range
    return low + (high - low) * uniform


def two_sided(uniform: Float[Array, "*any 2"], value_range: Range) -> Float[Array, "*any"]:
    """Map two uniform numbers to TS(low, high), half the mass on each side of 1 (spec 04 §3.1)."""
    low, high = value_range
    side, share = uniform[..., 0], uniform[..., 1]
    if low >= 1:
        return low + (high - low) * share
    return jnp.where(side < 0.5, low + (1 - low) * share, 1 + (high - 1) * share)


def whole_between(uniform: Float[Array, "*any"], low: Any, high: Any) -> Int[Array, "*any"]:
    """Map uniform numbers to the whole numbers from `low` up to and with `high`."""
    number = low + jnp.floor(uniform * (high - low + 1)).astype(jnp.int32)
    return jnp.minimum(number, high)
