"""Train, ensemble and run nnU-Net-style 3-D segmentation networks in JAX.

``load``, ``predict``, ``train``, ``evaluate`` and ``preprocess`` are found when they are named, and
load JAX when they are called; :mod:`panther_jax.library` documents them.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from panther_jax.library import Predictor, evaluate, load, predict, preprocess, train

__version__ = "0.1.0"
__all__ = ["Predictor", "__version__", "evaluate", "load", "predict", "preprocess", "train"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    library = importlib.import_module("panther_jax.library")
    if name == "train":  # the trainer's module imports JAX
        return library.LazyFace(f"{__name__}.{name}")
    if name in ("Predictor", "load"):  # no command has the name
        return getattr(library, name)
    return importlib.import_module(f"{__name__}.{name}")
