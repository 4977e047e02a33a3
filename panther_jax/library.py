"""The package from Python: what ``import panther_jax`` offers, by the names of the commands.

Nothing here loads JAX before it is called. Arrays have axes z, y, x; lengths are mm.
"""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from panther_jax.plans.geometry import Geometry
from panther_jax.plans.labels import Labels

if TYPE_CHECKING:
    from panther_jax.config.schema import TrainConfig
    from panther_jax.ensembles.specification import EnsembleSpec
    from panther_jax.evaluation.scoring import Evaluation, Scoring
    from panther_jax.inference.folder import Report
    from panther_jax.inference.predictor import CasePredictor, Prediction

__all__ = ["Predictor", "evaluate", "load", "predict", "preprocess", "train"]

PathLike = str | Path
Image = PathLike | Sequence[PathLike] | np.ndarray


class Face(ModuleType):
    """The module of a command that is also the function of its name.

    ``panther_jax.train`` is a module (``python -m``, ``from panther_jax.train import main``) and a
    function, ``panther_jax.train("mri_t2.py")``, in whichever order they are imported.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the library's function."""
        return getattr(importlib.import_module(__name__), self.__name__.rpartition(".")[2])(
            *args, **kwargs
        )


class LazyFace(Face):
    """A :class:`Face` whose module is not imported before something of it is used."""

    @property
    def __dict__(self) -> dict[str, Any]:  # type: ignore[override]
        """The module's own: by it ``unittest.mock`` and pytest put back what they replaced."""
        return vars(importlib.import_module(self.__name__))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(self.__name__), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(importlib.import_module(self.__name__), name, value)

    def __delattr__(self, name: str) -> None:
        delattr(importlib.import_module(self.__name__), name)


# ------------------------------------------------------------------------------------ prediction


@dataclass(frozen=True)
class Predictor:
    """Models ready to predict many images; made by :func:`load`."""

    cases: "CasePredictor"

    @property
    def labels(self) -> Labels:
        """What the label maps hold."""
        return self.cases.labels

    def predict(
        self,
        image: Image,
        geometry: Geometry | Sequence[float] | None = None,
        *,
        probabilities: bool = False,
    ) -> "Prediction":
        """Predict one image: a file, one file a channel, or an array (channel, z, y, x).

        An array needs its geometry, or the spacing z, y, x in mm. The result has ``label``, an
        integer array (z, y, x) on the grid of the image, its ``geometry``, and with
        ``probabilities`` also those, float32 (class or region, z, y, x).

        Raises:
            FileNotFoundError, ValueError: naming what cannot be used.
        """
        from panther_jax.inference import loading

        return loading.predict(self.cases, _paths(image), geometry, probabilities=probabilities)

    def predict_folder(
        self,
        input: PathLike,
        output: PathLike,
        *,
        save_probabilities: bool = False,
        overwrite: bool = False,
    ) -> "Report":
        """Predict a folder of ``CASE_0000`` files, as the command does; what is done stays.

        The report has seconds of the cases done, and the messages of those that failed.

        Raises:
            FileNotFoundError, ValueError, PredictError: if there is nothing to predict, or the
                output cannot be used.
        """
        from panther_jax.inference.folder import predict_folder

        return predict_folder(
            self.cases,
            Path(input),
            Path(output),
            save_probabilities=save_probabilities,
            overwrite=overwrite,
        )


def load(
    model: "PathLike | Sequence[PathLike] | EnsembleSpec",
    *,
    root: PathLike = "data",
    folds: Sequence[str | int] = (),
    checkpoint: Literal["final", "best"] | None = None,
    mirror: bool = False,
    step_size: float = 0.5,
    **settings: Any,
) -> Predictor:
    """Load runs, bundles, nnU-Net model folders or known weights; several are averaged.

    ``folds``: all that are there unless given. ``step_size`` is the step between tiles, a part of
    the tile. ``settings`` are ``strategy``, ``dtype``, ``accumulate``, ``accumulate_on``,
    ``tile_batch`` and ``whole_volume`` as on the command line of ``panther_jax.predict``.

    Raises:
        FileNotFoundError, ValueError, CheckpointError: naming the model that cannot be used.
    """
    from panther_jax.ensembles.specification import EnsembleSpec
    from panther_jax.inference import loading
    from panther_jax.weights.names import published_checkpoint, resolve_model

    if isinstance(model, EnsembleSpec):
        return Predictor(loading.load(model, **settings))
    paths = [Path(p) for p in ([model] if isinstance(model, (str, Path)) else model)]
    found = loading.load(
        [resolve_model(p, Path(root)) for p in paths],
        folds=[str(fold) for fold in folds],
        checkpoint=checkpoint or published_checkpoint(*paths) or "final",
        mirror=mirror,
        step_size=step_size,
        **settings,
    )
    return Predictor(found)


def predict(
    model: "Predictor | PathLike | Sequence[PathLike] | EnsembleSpec",
    image: Image,
    geometry: Geometry | Sequence[float] | None = None,
    *,
    probabilities: bool = False,
    **options: Any,
) -> "Prediction":
    """Predict one image: :func:`load` with ``options``, then :meth:`Predictor.predict`.

    Raises:
        FileNotFoundError, ValueError, CheckpointError: naming what cannot be used.
    """
    predictor = model if isinstance(model, Predictor) else load(model, **options)
    return predictor.predict(image, geometry, probabilities=probabilities)


def _paths(image: Image) -> Any:
    if isinstance(image, (str, Path)):
        return Path(image)
    return image if isinstance(image, np.ndarray) else [Path(p) for p in image]


# -------------------------------------------------------------- preprocess, train and evaluate


def preprocess(
    raw: PathLike,
    out: PathLike,
    *,
    config: "str | TrainConfig | None" = None,
    plans: PathLike | None = None,
    configuration: str | None = None,
    workers: int = 1,
) -> Path:
    """Preprocess a raw data set (nnU-Net's layout) to a store, for a config or a plans.json.

    ``config`` is ``NAME[:ARG]``, a file, or a config itself. Cases that are there already stay.
    Returns the store's folder.

    Raises:
        FileNotFoundError, ValueError: naming what cannot be used, all broken cases listed.
    """
    from panther_jax.config.loading import load_config
    from panther_jax.images.raw_dataset import open_raw
    from panther_jax.planner.from_config import fingerprint_if_needed, plans_from_config
    from panther_jax.plans.plans import Plans
    from panther_jax.preprocessing import pipeline

    read_plans = importlib.import_module("panther_jax.preprocess").read_plans
    if (config is None) == (plans is None):
        raise ValueError("preprocess needs either a config or a plans.json")
    dataset, out = open_raw(Path(raw)), Path(out)
    made: Plans
    if config is None:
        assert plans is not None
        made, fingerprint = read_plans(Path(plans), dataset, configuration)
    else:
        chosen = load_config(config)[0] if isinstance(config, str) else config
        fingerprint = fingerprint_if_needed(chosen, dataset, out, workers=workers)
        made = plans_from_config(chosen, dataset.dataset, fingerprint)
    pipeline.preprocess(dataset, made, out, workers=workers, fingerprint=fingerprint)
    return out


def train(
    config: PathLike,
    *,
    fold: int | Literal["all"] = 0,
    root: PathLike = "data",
    overrides: Mapping[str, Any] | None = None,
    workdir: PathLike | None = None,
    raw: PathLike | None = None,
    store: PathLike | None = None,
    **options: Any,
) -> Path:
    """Train one fold, or go on where it stopped, and validate it; returns the fold's folder.

    ``config`` is ``NAME[:ARG]`` or a file. ``overrides`` are fields of the config, such as
    ``{"optim.lr": 2e-3, "data.patch_size": (64, 64, 64)}``; ``options`` are the others of the
    command line (``demo``, ``init``, ``restart``, ``deterministic``, ...).

    Raises:
        ValueError, RuntimeError, OSError: naming what is wrong and what to do.
    """
    from panther_jax.config.loading import load_config
    from panther_jax.config.places import Places
    from panther_jax.config.schema import ConfigError
    from panther_jax.training.options import Options

    trainer = importlib.import_module("panther_jax.train")
    given = {"workdir": workdir, "raw": raw, "store": store}
    places = {name: None if value is None else Path(value) for name, value in given.items()}
    chosen = Options(fold=fold, root=Path(root), config=str(config), **places, **options)
    try:
        trainer.train(chosen, _arguments(overrides or {}))
    except SystemExit:  # what parses the overrides has told why
        raise ConfigError(f"overrides {dict(overrides or {})} do not fit the config") from None
    name = load_config(chosen.config)[1].run_name + ("_demo" if chosen.demo else "")
    return Places.fold(chosen.workdir or Places(chosen.root).run(name), fold)


def _arguments(overrides: Mapping[str, Any]) -> list[str]:
    arguments = []
    for name, value in overrides.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        arguments += [f"--{name.replace('_', '-')}", *map(str, values)]
    return arguments


def evaluate(
    predictions: PathLike,
    references: PathLike,
    *,
    scoring: "Scoring | None" = None,
    allow_missing: bool = False,
    workers: int | None = None,
) -> "Evaluation":
    """Score a folder of label maps against references, a folder or a raw data set.

    The result's ``to_json()`` has metrics by case and over all, with intervals; lengths are mm,
    volumes mm³.

    Raises:
        FileNotFoundError, ValueError: if a folder is missing, or no case could be scored.
    """
    from panther_jax.evaluation import scoring as scoring_module

    return scoring_module.evaluate(
        Path(predictions),
        Path(references),
        scoring=scoring,
        allow_missing=allow_missing,
        num_workers=workers,
    )
