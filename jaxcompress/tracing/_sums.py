"""Sums of weights: what is linear in a weight is done to each part, and the results added."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import arrays
from jaxcompress.tracing._conv_chain import CHAINS
from jaxcompress.tracing._dot import Dot
from jaxcompress.tracing._dot import wide as wide_dtype
from jaxcompress.tracing._product import Product
from jaxcompress.tracing._weights import ARITHMETIC, KEPT, Weight


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Summed:
    """A view of a sum: the sum of the same views of its parts.

    Attributes:
        parts: compressed arrays, views of them, or plain arrays, of one shape and dtype.
    """

    parts: tuple[Any, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of each part."""
        return tuple(self.parts[0].shape)

    @property
    def dtype(self) -> np.dtype:
        """Of each part."""
        return self.parts[0].dtype

    def todense(self) -> jax.Array:
        """The sum, dense."""
        return arrays.total([_dense(part) for part in self.parts], self.dtype)


SUMS = (arrays.Sum, Summed)

# From an operation that is linear in a weight, and whose rules take it, to its operands.
_LINEAR = {"conv_general_dilated": (1,), "ragged_dot_general": (1,), "gather": (0,)}
_LINEAR |= dict.fromkeys(
    [
        *"transpose reshape squeeze expand_dims broadcast_in_dim rev slice dynamic_slice".split(),
        *"pvary pcast pbroadcast stop_gradient convert_element_type".split(),
        *KEPT,
    ],
    (0,),
)


def apply(
    weight: Weight, operand: int, values: list[Any], eqn: Any, run: Callable, rule: Callable
) -> Any:
    """The result of an equation with one operand that is a sum; None where there is no rule.

    Args:
        weight: the operand.
        operand: its index.
        values: all operands.
        eqn: the equation.
        run: `values -> (results, records)`, the equation on dense values.
        rule: `(weight, operand, values, eqn, run) -> result`, that of a part.
    """
    name = eqn.primitive.name

    def with_operand(value):
        return [*values[:operand], value, *values[operand + 1 :]]

    if name in ARITHMETIC and not has_low_rank(weight.value):
        return run(with_operand(weight.value.todense()))[0][0]
    if operand not in _LINEAR.get(name, ()) or not _fills_once(eqn):
        return None
    results = []
    for part in weight.value.parts:
        if hasattr(type(part), "todense"):
            one = Weight(part, weight.path)
            result = rule(one, operand, with_operand(one), eqn, run)
        else:
            result = run(with_operand(part))[0][0]
        if result is None:
            return None
        results.append(result)
    return _again(results, weight.path, eqn.outvars[0].aval.dtype)


def _fills_once(eqn: Any) -> bool:
    """Whether what a gather gives for rows that there are not stays so when it is added up."""
    if eqn.primitive.name != "gather":
        return True
    if eqn.params["mode"] != jax.lax.GatherScatterMode.FILL_OR_DROP:
        return True
    fill = eqn.params["fill_value"]
    return fill is None or bool(np.isnan(fill)) or fill == 0


def product(
    x: jax.Array, value: Any, dot: Dot, dtype: Any, multiply: Callable[..., jax.Array]
) -> jax.Array:
    """A matrix product with a sum; the products are added before they are rounded.

    Args:
        x: the activations.
        value: the sum.
        dot: which axes are joined.
        dtype: static. Of the result.
        multiply: `(x, part, dot, dtype) -> array`, the product with a part.
    """
    fine = wide_dtype(dtype) if jnp.issubdtype(dtype, jnp.floating) else dtype
    kept = dot._replace(params=dot.params | {"preferred_element_type": fine})
    return arrays.total([multiply(x, part, kept, fine) for part in value.parts], dtype)


def sum_rows(
    weight: Weight, rows: Callable[[Weight], Any]
) -> tuple[tuple[Any, ...], Callable[[Any], Any]] | None:
    """What there is of each row, and the function that builds a row of it; None if merged.

    Args:
        weight: a sum.
        rows: those of a part, with `stacked` and `rebuild`, or None.
    """
    cuts: list[tuple[Any, Callable[[Any], Any]]] = []
    for part in weight.value.parts:
        if not hasattr(type(part), "todense"):
            cuts.append((part, _same))
            continue
        found = rows(Weight(part, weight.path))
        if found is None:
            return None
        cuts.append((found.stacked, found.rebuild))

    def rebuild(row):
        built = [again(x) for (_, again), x in zip(cuts, row, strict=True)]
        return _again(built, weight.path, weight.value.dtype)

    return tuple(stacked for stacked, _ in cuts), rebuild


def _again(results: Sequence[Any], path: str, dtype: Any) -> Any:
    """The sum of arrays, or of weights and arrays, of which nothing is made dense."""
    if not any(isinstance(r, Weight) for r in results):
        return arrays.total(results, dtype)
    parts = tuple(r.value if isinstance(r, Weight) else r for r in results)
    # A sum again where no part is a mere view.
    held = all(arrays.is_compressed(p) or not hasattr(type(p), "todense") for p in parts)
    return Weight(arrays.Sum(parts) if held else Summed(parts), path)


def has_low_rank(value: Any) -> bool:
    """Whether a part is a product of factors, which has no codes to decode."""
    if isinstance(value, SUMS):
        return any(has_low_rank(part) for part in value.parts)
    if isinstance(value, (arrays.Rescaled, arrays.Rotated)):
        return has_low_rank(value.inner)
    return isinstance(value, (Product, arrays.LowRank, *CHAINS))


def _dense(part: Any) -> jax.Array:
    return part.todense() if hasattr(type(part), "todense") else part


def _same(row: jax.Array) -> jax.Array:
    return row
