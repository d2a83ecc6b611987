"""Codes as they are stored: in as few bits as they need, sparse where the leaf is."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import _check, arrays


def packed_codes(codes: jax.Array | np.ndarray, pattern: Any, bits: int, *, signed: bool) -> Any:
    """Small integers in `bits` bits each, at the entries of a sparse pattern where there is one."""
    if pattern is not None:
        width = bits if bits < 8 else None
        return arrays.with_entries(pattern, codes, bits=width, signed=signed)
    return arrays.pack_bits(codes, bits, signed=signed) if bits < 8 else jnp.asarray(codes)


def pattern_of(w: Any) -> Any:
    """The sparse array that holds the entries of `w`, or None for a dense leaf."""
    inner = w
    while isinstance(inner, (arrays.Quantized, arrays.Codebook)):
        inner = inner.codes
    return inner if arrays.is_sparse(inner) else None


def pattern_without_zeros(w: Any, dense: jax.Array) -> Any:
    """A pattern that leaves out every exact zero, for codes that have none for it."""
    pattern, present = pattern_of(w), dense != 0
    if pattern is not None:
        return arrays.restrict(pattern, present)
    return None if bool(present.all()) else arrays.bit_mask(dense, present)


def refuse_nan(dense: jax.Array, path: str) -> None:
    """Refuses to store NaN as an integer: no code stands for it."""
    if bool(jnp.isnan(dense).any()):
        raise ValueError(
            _check.message(
                "pack",
                "params",
                "be free of NaN to be stored as codes",
                _check.describe(dense) + " with NaN",
                "The run diverged.",
                path=path,
            )
        )
