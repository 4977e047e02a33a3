"""The one way to make a predictor of a network: of `predict`, validation, ensemble selection."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from panther_jax.inference.sliding_window import Place, Predictor, make_predictor
from panther_jax.network.unet import Execution, Net, apply
from panther_jax.plans.architecture import ArchSpec
from panther_jax.plans.plans import Plans

Forward = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class Settings:
    """How to compute, as opposed to what: results differ by rounding only.

    ``dtype`` is that of the convolutions; "auto" is float32 on CPU, bfloat16 on accelerators.
    ``accumulate`` "reference" adds tiles and folds up in float16 as nnU-Net does. Only
    ``whole_volume`` changes what is computed: one tile of the image's size, split over the devices;
    normalisation then sees the whole image, as it did not in training.
    """

    strategy: Literal["auto", "vmap", "scan", "loop", "shard"] = "auto"
    dtype: str = "auto"
    accumulate: Literal["float32", "reference"] = "float32"
    accumulate_on: Place = "auto"
    tile_batch: int | None = None
    whole_volume: bool = False


def network_forward(arch: ArchSpec, dtype: str) -> Forward:
    """The network as ``forward(params, tiles) -> logits`` of the highest resolution."""
    net = Net(arch, Execution.auto(dtype))
    return lambda params, tiles: apply(net, params, tiles, full_only=True)[0]


def build_predictor(
    plans: Plans,
    settings: Settings,
    *,
    mirror_axes: tuple[int, ...],
    step_size: float,
    forward: Forward | None = None,
    tile: tuple[int, ...] | None = None,
    tile_batch: int | None = None,
) -> Predictor:
    """A predictor of the plans' network, with tiles of the plans' patch.

    ``forward`` replaces the network of one set of parameters, for several folds in one program or
    a tile split over devices; ``tile`` and ``tile_batch`` replace the plans' and the settings'.
    """
    return make_predictor(
        forward or network_forward(plans.arch, settings.dtype),
        tile=tile or plans.patch_size,
        num_outputs=plans.arch.num_outputs,
        mirror_axes=mirror_axes,
        step_size=step_size,
        accumulate=settings.accumulate,
        accumulate_on=settings.accumulate_on,
        tile_batch=tile_batch or settings.tile_batch,
    )
