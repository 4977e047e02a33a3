"""Comparison of nested metrics with expected ones."""

import numpy as np

RELATIVE = 1e-9
RELATIVE_FLOAT32_SPACING = 1e-6


def assert_close(found, expected, relative=RELATIVE, where=""):
    """Compare nested dictionaries of numbers; NaN equals NaN, inf equals inf, ints exactly."""
    if isinstance(expected, dict):
        assert set(found) == set(expected), where
        for key in expected:
            assert_close(found[key], expected[key], relative, f"{where}/{key}")
    elif isinstance(expected, int):
        assert found == expected, where
    elif isinstance(expected, float):
        np.testing.assert_allclose(found, expected, rtol=relative, atol=0, err_msg=where)
    else:
        assert found == expected, where


def without_subject(entry):
    return {k: v for k, v in entry.items() if k != "subject"}
