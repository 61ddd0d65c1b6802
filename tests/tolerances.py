"""The one tolerance table: relative errors by dtype and by gate regime, and how they are measured."""

import numpy as np

# relative to max(norm of the expected array, floor); see `assert_close`
TOLERANCES = {
    ("float64", "any"): 1e-10,
    ("float32", "none"): 2e-5,
    ("float32", "mild"): 2e-5,
    ("float32", "strong"): 2e-5,
    ("float32", "extreme"): 2e-5,
    ("float32", "vector"): 2e-5,
    ("golden", "outputs"): 1e-4,  # from the README of the reference vectors
    ("golden", "gradients"): 1e-3,
}
FLOOR = 0.05  # times a scale that the caller knows, for gradients that are truly zero
BFLOAT16_SLACK = 0.25  # |gold - test| <= (1 + slack) |gold - reference|, norms over the array


def relative_error(actual, expected, scale: float = 0.0) -> float:
    """||actual - expected|| / max(||expected||, FLOOR scale): absolute where what is expected is zero."""
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    assert np.isfinite(actual).all(), "not finite"
    size = max(np.linalg.norm(expected), FLOOR * scale, np.finfo(np.float64).tiny)
    return float(np.linalg.norm(actual - expected) / size)


def assert_close(actual, expected, dtype: str, regime: str, *, name: str = "", scale: float = 0.0) -> None:
    """Compares by the table."""
    error, allowed = relative_error(actual, expected, scale), TOLERANCES[dtype, regime]
    assert error <= allowed, f"{name}: relative error {error:.2e} > {allowed:.0e} ({dtype}, {regime})"


def assert_bfloat16(test, reference, gold, *, name: str = "") -> None:
    """Passes when `test` (bfloat16) is not further from `gold` (float64) than the plain `reference` (bfloat16)."""
    error, allowed = relative_error(test, gold), relative_error(reference, gold)
    assert error <= (1 + BFLOAT16_SLACK) * allowed, f"{name}: {error:.2e} > (1 + {BFLOAT16_SLACK}) {allowed:.2e}"
