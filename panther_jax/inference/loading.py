"""A predictor of given models, and one image predicted with it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from panther_jax.ensembles.specification import EnsembleSpec
from panther_jax.images import imageio
from panther_jax.plans.geometry import Geometry

if TYPE_CHECKING:
    from panther_jax.inference.predictor import CasePredictor, Prediction

STRATEGIES = ("auto", "vmap", "scan", "loop", "shard")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def load(
    model: Path | Sequence[Path] | EnsembleSpec,
    *,
    folds: Sequence[str] = (),
    checkpoint: str = "final",
    mirror: bool = False,
    step_size: float = 0.5,
    **settings: Any,
) -> "CasePredictor":
    """Load one or several models, or an ensemble, ready for many cases.

    ``settings`` are the fields of :class:`panther_jax.inference.predictor.Settings`. An
    ensemble has folds, checkpoint, mirroring and step size in its spec.

    Raises:
        FileNotFoundError, ValueError, CheckpointError: naming the model that cannot be used.
    """
    from panther_jax.inference import members
    from panther_jax.inference import predictor as predictor_module

    if isinstance(model, EnsembleSpec):
        ensemble = members.load_ensemble(model)
    else:
        paths = [model] if isinstance(model, (str, Path)) else list(model)
        ensemble = members.load_models(
            [Path(p) for p in paths],
            folds=folds,
            checkpoint=checkpoint,  # type: ignore[arg-type]
            mirror=mirror,
            step_size=step_size,
        )
    return predictor_module.CasePredictor(ensemble, predictor_module.Settings(**settings))


def predict(
    model: "CasePredictor | Path | Sequence[Path] | EnsembleSpec",
    image: Path | Sequence[Path] | np.ndarray,
    geometry: Geometry | Sequence[float] | None = None,
    *,
    probabilities: bool = False,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> "Prediction":
    """Predict one image: a file, one file a channel, or an array (channel, z, y, x).

    An array needs its ``geometry``, or at least the spacing z, y, x in mm. ``options`` are those of
    :func:`load`; for many images, load once and pass the result. Nothing is written.

    Raises:
        FileNotFoundError, ValueError, CheckpointError: naming what cannot be used.
    """
    from panther_jax.inference.predictor import CasePredictor

    predictor = model if isinstance(model, CasePredictor) else load(model, **options)
    if isinstance(image, np.ndarray):
        if geometry is None:
            raise ValueError("an array needs its geometry, or the spacing z, y, x in mm")
    else:
        paths = [image] if isinstance(image, (str, Path)) else list(image)
        image, geometry = imageio.read_image([Path(p) for p in paths])
    return predictor.predict(image, geometry, probabilities=probabilities, progress=progress)
