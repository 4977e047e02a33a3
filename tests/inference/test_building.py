"""Validation, ensemble selection and `predict` predict with one and the same predictor."""

import numpy as np
import weight_files as made

from panther_jax.config.schema import ValidationConfig
from panther_jax.inference.building import Settings, build_predictor
from panther_jax.inference.members import load_models
from panther_jax.inference.predictor import CasePredictor, Prepared
from panther_jax.training.validation import fold_predictor


def test_validation_predicts_to_the_bit_what_predict_does(tmp_path):
    bundle = made.write_bundle(tmp_path / "bundle")
    ensemble = load_models([bundle], folds=("0",), mirror=True, step_size=0.4)
    (member,) = ensemble.members
    image = np.random.default_rng(0).standard_normal((1, 20, 17, 24), np.float32)
    (predicted,) = CasePredictor(ensemble).infer(Prepared((image,), ()))
    validate = fold_predictor(
        member.model.plans,
        ValidationConfig(mirror=True, step_size=0.4),
        dtype="auto",
        mirror_axes=member.model.mirror_axes,
    )
    validated = validate(member.model.params[0], image)
    np.testing.assert_array_equal(np.stack(list(predicted)), validated)
    unmirrored = build_predictor(member.model.plans, Settings(), mirror_axes=(), step_size=0.4)
    assert member.mirror_axes and (unmirrored(member.model.params[0], image) != validated).any()
