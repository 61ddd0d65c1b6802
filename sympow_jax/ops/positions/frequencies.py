"""Angular frequencies of rotary encodings, and their scalings to longer contexts."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from sympow_jax.typing import Array, Int

SCALINGS = ("linear", "ntk", "dynamic_ntk", "yarn", "llama3")


@dataclasses.dataclass(frozen=True)
class ScalingConstants:
    """What yarn and llama3 decide by, with the values of their papers.

    Attributes:
      beta_fast, beta_slow: yarn keeps pairs that turn more than beta_fast times within original_length, interpolates
        those that turn less than beta_slow times, and goes linearly from one to the other.
      truncate: the two bounds are whole pairs.
      attention_factor: yarn's; 0 means m(mscale) / m(mscale_all_dim), m(x) = 0.1 x ln(factor) + 1.
      mscale, mscale_all_dim: of that formula.
      low_freq_factor, high_freq_factor: llama3's bounds, in turns within original_length.
    """

    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 0.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0


PUBLISHED = ScalingConstants()


def rope_frequencies(
    head_dim: int,
    *,
    base: float = 10000.0,
    scaling: str | None = None,
    factor: float = 1.0,
    original_length: int | None = None,
    length: int | Int[Array, ""] | None = None,
    constants: ScalingConstants = PUBLISHED,
) -> tuple[np.ndarray | jax.Array, float]:
    """Angular frequencies of RoPE, base^(-2i/D) radians per token, and the factor on cos and sin.

    Args:
      head_dim: D, the dims that are rotated.
      base: 10000 in RoFormer; for Manifest AI's convention, 2 pi / N^(2i/D), see `manifest_frequencies`.
      scaling: None, or how to reach beyond original_length: "linear" (arXiv 2306.15595), "ntk" (a larger base),
        "dynamic_ntk" (a base that grows with `length`), "yarn" (arXiv 2309.00071), "llama3" (arXiv 2407.21783).
      factor: the longest length over original_length.
      original_length: L, what the model was trained at (dynamic_ntk, yarn, llama3).
      length: the current one, for dynamic_ntk; no effect up to L. May be a traced scalar.
      constants: of yarn and llama3.

    Returns:
      inv_freq [D/2], a float64 NumPy array (float32 JAX array if `length` is one), and attention_factor.

    Raises:
      ValueError: an odd head_dim, an unknown scaling, or one that lacks its arguments.
    """
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim={head_dim}: rotary pairs need an even head_dim >= 2")
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    if scaling is None:
        return base**-exponents, 1.0
    if scaling not in SCALINGS:
        raise ValueError(f"scaling={scaling!r}: legal are None, {', '.join(SCALINGS)}")
    if factor < 1:
        raise ValueError(f"factor={factor}: legal are factors >= 1, the new length over original_length")
    if scaling == "linear":
        return base**-exponents / factor, 1.0
    if head_dim == 2 and "ntk" in scaling:
        raise ValueError(f"head_dim=2: scaling={scaling!r} raises the base to D / (D - 2); use head_dim >= 4")
    if scaling == "ntk":
        return _ntk_base(base, factor, head_dim) ** -exponents, 1.0
    if original_length is None:
        raise ValueError(f"original_length=None: scaling={scaling!r} needs the length the model was trained at")
    if scaling == "dynamic_ntk":
        if length is None:
            raise ValueError("length=None: scaling='dynamic_ntk' needs the current length")
        excess = (np if isinstance(length, int) else jnp).maximum(length / original_length, 1.0)
        return _ntk_base(base, factor * excess - (factor - 1), head_dim) ** -exponents, 1.0
    if scaling == "yarn":
        return _yarn(base**-exponents, base, factor, original_length, constants), _attention_factor(factor, constants)
    return _llama3(base**-exponents, factor, original_length, constants), 1.0


def manifest_frequencies(head_dim: int, max_document_length: int) -> np.ndarray:
    """Manifest AI's convention, 2 pi / N^(2i/D) radians per token [D/2], N the longest document (arXiv 2503.03269).

    N is a fixed property of the data: with the current length in its place, frequencies would change at evaluation.
    """
    return 2 * math.pi * np.asarray(rope_frequencies(head_dim, base=float(max_document_length))[0])


def _ntk_base(base, stretch, head_dim):
    return base * stretch ** (head_dim / (head_dim - 2))


def _yarn(
    inv_freq: np.ndarray, base: float, factor: float, original_length: int, constants: ScalingConstants
) -> np.ndarray:
    """NTK-by-parts: slow pairs interpolated, fast pairs kept (arXiv 2309.00071)."""
    D = 2 * len(inv_freq)

    def pair_of(turns):  # the pair that turns this often within original_length
        return D * math.log(original_length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair_of(constants.beta_fast), pair_of(constants.beta_slow)
    low, high = (math.floor(low), math.ceil(high)) if constants.truncate else (low, high)
    low, high = max(low, 0), min(high, D - 1)
    ramp = np.clip((np.arange(D // 2) - low) / (high - low if high != low else 0.001), 0, 1)
    return inv_freq / factor * ramp + inv_freq * (1 - ramp)


def _attention_factor(factor: float, constants: ScalingConstants) -> float:
    def temperature(mscale):
        return 0.1 * mscale * math.log(factor) + 1.0

    return constants.attention_factor or temperature(constants.mscale) / temperature(constants.mscale_all_dim)


def _llama3(inv_freq: np.ndarray, factor: float, original_length: int, constants: ScalingConstants) -> np.ndarray:
    """Llama 3.1: pairs of few turns divided by factor, of many kept, between interpolated smoothly."""
    turns, low = original_length * inv_freq / (2 * math.pi), constants.low_freq_factor
    kept = np.clip((turns - low) / (constants.high_freq_factor - low), 0, 1)
    return (1 - kept) * inv_freq / factor + kept * inv_freq
