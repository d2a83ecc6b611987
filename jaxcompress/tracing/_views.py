"""Views of compressed arrays: transposed, reshaped, cut, cast, without making them dense."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import arrays
from jaxcompress.tracing._blocks import transposed
from jaxcompress.tracing._conv_chain import MovedChain
from jaxcompress.tracing._product import Product, of_factors, product_rows, product_view
from jaxcompress.tracing._sums import SUMS, has_low_rank, sum_rows
from jaxcompress.tracing._weights import Weight, part_by_part

_VIEWS = frozenset(
    "transpose reshape squeeze expand_dims broadcast_in_dim rev slice dynamic_slice".split()
)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["value"],
    meta_fields=["steps", "shape", "dtype"],
)
@dataclasses.dataclass(frozen=True)
class Deferred:
    """A compressed array, and the views to take of it once it is decoded.

    Attributes:
        value: the compressed array.
        steps: static. Functions of one array each.
        shape: static. Of the result.
        dtype: static. Of the result.
    """

    value: Any
    steps: tuple[Callable[[jax.Array], jax.Array], ...]
    shape: tuple[int, ...]
    dtype: np.dtype

    def todense(self) -> jax.Array:
        """The view, dense."""
        return functools.reduce(lambda x, step: step(x), self.steps, self.value.todense())


def is_plain(value: Any) -> bool:
    """Whether codes and scales may be viewed each for itself."""
    return (
        isinstance(value, arrays.Quantized)
        and value.group is None
        and not arrays.is_compressed(value.codes)
        and not arrays.is_compressed(value.scale)
    )


def view(value: Any, eqn: Any, others: list[Any], run: Callable[..., Any]) -> Any:
    """What an equation that only views makes of a compressed array; None without a rule.

    Args:
        value: the compressed array, the first operand.
        eqn: the equation.
        others: its other operands: where a dynamic slice starts.
        run: `values -> (results, records)`, the equation on dense values.
    """
    name = eqn.primitive.name
    out = eqn.outvars[0].aval
    alike = part_by_part(value, name, run)
    if alike is not None:
        return alike
    if name == "convert_element_type":
        return cast(value, out.dtype)
    if name in ("slice", "dynamic_slice") and not isinstance(value, (Product, arrays.LowRank)):
        return _cut(value, eqn, others, run)
    if name not in _VIEWS:
        return None
    if isinstance(value, (Product, arrays.LowRank)):
        return product_view(as_product(value), eqn, others)
    blocks = isinstance(value, arrays.BlockSparse) and len(value.block) == value.ndim == 2
    if blocks and name == "transpose":
        return value if eqn.params["permutation"] == (0, 1) else transposed(value)
    if is_plain(value):
        viewed = _plain_view(value, eqn, run)
        if viewed is not None:
            return viewed
    return _deferred(value, eqn, run)


def as_product(value: Any) -> Product:
    """A low-rank array as a product of its axes."""
    if isinstance(value, Product):
        return value
    u, v = arrays.todense((value.u, value.v))
    return of_factors(u, v, value.dtype)


def cast(value: Any, dtype: Any) -> Any:
    """A compressed array or a view of one in another floating-point dtype; None for others."""
    if not hasattr(type(value), "todense"):
        return value.astype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        return None
    if isinstance(value, Product):
        return dataclasses.replace(value, dtype=np.dtype(dtype))
    if isinstance(value, Deferred):
        step = lambda x: x.astype(dtype)  # noqa: E731
        return dataclasses.replace(value, steps=(*value.steps, step), dtype=np.dtype(dtype))
    return arrays.cast(value, dtype)


def _deferred(value: Any, eqn: Any, run: Callable[..., Any]) -> Deferred:
    out = eqn.outvars[0].aval
    held = value if isinstance(value, Deferred) else Deferred(value, (), value.shape, value.dtype)
    step = lambda x: run([x])[0][0]  # noqa: E731
    return Deferred(held.value, (*held.steps, step), out.shape, np.dtype(out.dtype))


def _plain_view(value: Any, eqn: Any, run: Callable[..., Any]) -> Any:
    """Codes and scales each viewed; None where their axes would not fit any more."""
    name, params, old = eqn.primitive.name, eqn.params, value.shape
    new = eqn.outvars[0].aval.shape

    def part(x):
        return None if x is None else part_view(x, old, eqn, whole=x is value.codes)

    if name == "broadcast_in_dim" and any(
        old[i] != new[d] for i, d in enumerate(params["broadcast_dimensions"])
    ):
        return None
    codes, scale, zero_point = part(value.codes), part(value.scale), part(value.zero_point)
    if scale is None:
        return None
    return dataclasses.replace(value, codes=codes, scale=scale, zero_point=zero_point)


def part_view(x: jax.Array, old: tuple[int, ...], eqn: Any, *, whole: bool) -> jax.Array | None:
    """The view that an equation takes, of a part; None where its axes would not fit any more.

    Args:
        x: full or of size 1 along each axis of the array that it belongs to.
        old: static. The shape of that array.
        eqn: a transpose, a reversal, a broadcast that adds axes, or a reshape.
        whole: static. Whether `x` is also to fill the axes that a broadcast adds.
    """
    name, params = eqn.primitive.name, eqn.params
    new = eqn.outvars[0].aval.shape
    if name == "transpose":
        return jax.lax.transpose(x, params["permutation"])
    if name == "rev":
        return jax.lax.rev(x, [d for d in params["dimensions"] if x.shape[d] > 1])
    if name == "broadcast_in_dim":
        shape = list(new)
        for i, d in enumerate(params["broadcast_dimensions"]):
            shape[d] = x.shape[i]
        for d in set(range(len(new))) - set(params["broadcast_dimensions"]):
            shape[d] = new[d] if whole else 1
        return jax.lax.broadcast_in_dim(x, shape, params["broadcast_dimensions"])
    shape = _reshaped(x.shape, old, new)
    return None if shape is None else x.reshape(shape)


def _reshaped(part: tuple[int, ...], old: tuple[int, ...], new: tuple[int, ...]):
    """The shape of a part, 1 or full along each axis, after `old` was reshaped to `new`.

    None where a run of axes that are merged or split is full along some and 1 along others.
    """
    shape: list[int] = []
    i = 0
    for before, after in runs(old, new):
        full = [part[d] == old[d] for d in range(i, i + before) if old[d] > 1]
        if any(full) and not all(full):
            return None
        sizes = new[len(shape) : len(shape) + after]
        shape += [1] * after if full and not any(full) else sizes
        i += before
    return tuple(shape)


def runs(old: tuple[int, ...], new: tuple[int, ...]):
    """Lengths of the smallest runs of axes of `old` and `new` that hold the same entries."""
    i = j = 0
    while i < len(old) or j < len(new):
        start, m, n = (i, j), 1, 1
        while m != n or (i, j) == start:
            if i < len(old) and (m <= n or j == len(new)):
                m, i = m * old[i], i + 1
            else:
                n, j = n * new[j], j + 1
        yield i - start[0], j - start[1]


def _cut(value: Any, eqn: Any, others: list[Any], run: Callable[..., Any]) -> Any:
    """A slice: of codes and scales, of whole rows, or of what is decoded later."""
    params, shape = eqn.params, value.shape
    static = eqn.primitive.name == "slice"
    sizes = eqn.outvars[0].aval.shape if static else params["slice_sizes"]
    starts = list(params["start_indices"] if static else others)
    strided = static and params["strides"] is not None
    if is_plain(value) and not strided:

        def part(x):
            return part_cut(x, shape, starts, sizes)

        zero_point = None if value.zero_point is None else part(value.zero_point)
        return dataclasses.replace(
            value, codes=part(value.codes), scale=part(value.scale), zero_point=zero_point
        )
    if sizes == (1, *shape[1:]) and not isinstance(value, Deferred) and not strided:
        stacked, rebuild = arrays.rows(value)
        row = rebuild(
            jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, starts[0], 0, False), stacked)
        )
        if not arrays.is_compressed(row):
            return row.reshape(sizes)
        return Deferred(row, (lambda x: x[None],), tuple(sizes), np.dtype(row.dtype))
    return _deferred(value, eqn, run) if static else None


def part_cut(x: jax.Array, shape: tuple[int, ...], starts: list[Any], sizes: Any) -> jax.Array:
    """A slice of a part, full or of size 1 along each axis of the array of that shape."""
    whole = [n == 1 and shape[d] > 1 for d, n in enumerate(x.shape)]
    begin = [0 if w else s for w, s in zip(whole, starts, strict=True)]
    size = [1 if w else n for w, n in zip(whole, sizes, strict=True)]
    begin = [jnp.asarray(b, jnp.int32) for b in begin]
    return jax.lax.dynamic_slice(x, begin, size)


@dataclasses.dataclass(frozen=True)
class Rows:
    """What a scan gives to each trip, and how the weight is built of it."""

    stacked: Any
    rebuild: Callable[[Any], Any]


def rows(weight: Weight) -> Rows | None:
    """A weight cut along its first axis; None where that axis was merged of others."""
    value = weight.value
    if isinstance(value, MovedChain):
        return None
    if isinstance(value, SUMS):
        cut = sum_rows(weight, rows)
        return None if cut is None else Rows(*cut)
    if isinstance(value, Product):
        cut = product_rows(value)
        if cut is None:
            return None
        stacked, rebuild = cut
    elif isinstance(value, Deferred):
        stacked, rebuild = value.todense(), _same
    else:
        stacked, rebuild = arrays.rows(value)

    def again(row):
        built = rebuild(row)
        is_weight = arrays.is_compressed(built) or isinstance(built, Product)
        return Weight(built, weight.path) if is_weight else built

    return Rows(stacked, again)


def _same(row: jax.Array) -> jax.Array:
    return row


def decoded(weight: Weight, dense: Callable[[Weight], jax.Array]) -> jax.Array:
    """Dense by decoding its codes; for a low rank, which has none, as `dense` has it."""
    if has_low_rank(weight.value):
        return dense(weight)
    return weight.value.todense()


def partition_specs(weight: Weight, spec: jax.sharding.PartitionSpec) -> Any:
    """How the parts of a weight are sharded where it is sharded by `spec`; None if it can't."""
    if all(axis is None for axis in spec):
        return jax.tree.map(lambda _: jax.P(), weight.value)
    if not arrays.is_compressed(weight.value):
        return None
    return arrays.partition_specs(weight.value, spec)
