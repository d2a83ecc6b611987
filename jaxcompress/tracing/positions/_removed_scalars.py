"""What an elementwise primitive makes of known scalars: computed, not looked up."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import _check
from jaxcompress.tracing._flops import ELEMENTWISE, TRANSCENDENTAL

Constant = float | None
"""What all entries of a slice are; None where that is not known, or not the same for all."""

POINTWISE = (ELEMENTWISE | TRANSCENDENTAL) | frozenset(
    "convert_element_type bitcast_convert_type reduce_precision lgamma digamma bessel_i0e"
    " bessel_i1e igamma igammac igamma_grad_a polygamma zeta regularized_incomplete_beta real"
    " imag conj complex clz mulhi eq_to le_to lt_to".split()
)
SAME = frozenset(
    "copy copy_p stop_gradient name sharding_constraint reshard mesh_cast pvary pcast pbroadcast"
    " device_put optimization_barrier pmax pmin".split()
)


def scalar(x: Any) -> Constant:
    """A number as a constant; None for what is none, or too long for a float."""
    if not isinstance(x, bool | int | float) and not hasattr(x, "dtype"):
        return None
    dtype = getattr(x, "dtype", np.dtype(type(x)))
    number = jnp.issubdtype(dtype, jnp.number) and not jnp.issubdtype(dtype, jnp.complexfloating)
    if not (number or dtype == np.bool_) or _check.is_traced(x) or np.ndim(x) != 0:
        return None
    try:
        found = float(x)
    except OverflowError:
        return None
    exact = not jnp.issubdtype(dtype, jnp.integer) or int(found) == int(x)
    return found if exact else None


def agree(constants: Sequence[Constant]) -> Constant:
    """The one that all of them are, NaN equal to NaN; None where they differ."""
    first, *rest = constants or (None,)
    if first is None or any(c is None or not _same(c, first) for c in rest):
        return None
    return first


def _same(a: float, b: float) -> bool:
    return a == b or (a != a and b != b)


def pointwise(eqn: Any, constants: Sequence[Constant]) -> Constant:
    """The constant of a result of which every entry is computed of those of the operands.

    The other operand of a factor that is 0, and a divisor of one, are taken to be finite and
    not 0.
    """
    name = eqn.primitive.name
    if not any(c is not None for c in constants):
        return None
    if all(c is not None for c in constants):
        dtypes = tuple(v.aval.dtype for v in eqn.invars)
        try:
            params = tuple((k, None if k == "sharding" else p) for k, p in eqn.params.items())
            # By their text: 0.0 and -0.0 are equal, and NaN is not equal to itself.
            return _computed(eqn.primitive, params, tuple(map(repr, constants)), dtypes)
        except TypeError:  # Parameters without a hash, dtypes without numbers.
            return None
    if name == "mul" and 0.0 in constants:
        return 0.0
    if name in ("div", "rem") and constants[0] == 0.0:
        return 0.0
    if name == "and" and 0.0 in constants:
        return 0.0
    if name == "or" and 1.0 in constants and eqn.outvars[0].aval.dtype == np.bool_:
        return 1.0
    if name == "select_n":
        which, *cases = constants
        return agree(cases) if which is None else cases[int(which)]
    return None


@functools.lru_cache(maxsize=4096)
def _computed(primitive: Any, params: Any, constants: tuple[str, ...], dtypes: Any) -> Constant:
    with np.errstate(all="ignore"):
        values = [np.asarray(float(c)).astype(d) for c, d in zip(constants, dtypes, strict=True)]
    quiet = jax.transfer_guard("allow"), jax.debug_nans(False), jax.debug_infs(False)
    with jax.ensure_compile_time_eval(), quiet[0], quiet[1], quiet[2]:
        result = primitive.bind(*values, **dict(params))
    if isinstance(result, list | tuple) or result.shape:
        return None
    return scalar(np.asarray(result)[()])
