"""A product of two thin factors, seen through transposes, reshapes and cuts."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["u", "v"],
    meta_fields=["left", "right", "groups", "dtype"],
)
@dataclasses.dataclass(frozen=True)
class Product:
    """A view of a low-rank array: `u @ v` with its axes merged, split and moved.

    Each axis of a factor but the rank has a label. An axis of the view is a run of labels:
    several where axes were merged, none where its size is 1.

    Attributes:
        u: the axes `left`, then the rank.
        v: the rank, then the axes `right`.
        left: static. Labels.
        right: static. Labels.
        groups: static. For each axis of the view its labels.
        dtype: static. Of the view.
    """

    u: jax.Array
    v: jax.Array
    left: tuple[int, ...]
    right: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]
    dtype: np.dtype

    @property
    def sizes(self) -> dict[int, int]:
        """The size of each labelled axis."""
        sizes = dict(zip(self.left, self.u.shape[:-1], strict=True))
        return sizes | dict(zip(self.right, self.v.shape[1:], strict=True))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the view."""
        sizes = self.sizes
        return tuple(math.prod(sizes[a] for a in group) for group in self.groups)

    def todense(self) -> jax.Array:
        """The product in float32, cast."""
        rank = 1 + max((*self.left, *self.right))
        product = jnp.einsum(
            self.u.astype(jnp.float32),
            [*self.left, rank],
            self.v.astype(jnp.float32),
            [rank, *self.right],
            [a for group in self.groups for a in group],
            precision=jax.lax.Precision.HIGHEST,
        )
        return product.reshape(self.shape).astype(self.dtype)


def of_factors(u: jax.Array, v: jax.Array, dtype: Any) -> Product:
    """`u @ v`, as a low-rank array has it."""
    ndim = u.ndim + v.ndim - 2
    left, right = tuple(range(u.ndim - 1)), tuple(range(u.ndim - 1, ndim))
    return Product(u, v, left, right, tuple((a,) for a in range(ndim)), np.dtype(dtype))


def product_view(product: Product, eqn: Any, others: list[Any]) -> Product | None:
    """The view that an equation takes of a view; None where it is no product again."""
    name, params = eqn.primitive.name, eqn.params
    new = eqn.outvars[0].aval.shape
    if name == "transpose":
        return dataclasses.replace(
            product, groups=tuple(product.groups[d] for d in params["permutation"])
        )
    if name in ("reshape", "squeeze", "expand_dims"):
        return _reshaped(product, new)
    if name == "broadcast_in_dim":
        return _broadcast(product, new, params["broadcast_dimensions"])
    if name == "rev":
        labels = {a for d in params["dimensions"] for a in product.groups[d]}
        return _changed(product, lambda x, axis, a: jnp.flip(x, axis) if a in labels else x)
    return _cut(product, eqn, others)


def _changed(product: Product, f: Callable[[jax.Array, int, int], jax.Array]) -> Product:
    """Both factors after `f(factor, axis, label)` for each labelled axis."""
    u, v = product.u, product.v
    for axis, a in enumerate(product.left):
        u = f(u, axis, a)
    for axis, a in enumerate(product.right):
        v = f(v, axis + 1, a)
    return dataclasses.replace(product, u=u, v=v)


def _reshaped(product: Product, new: tuple[int, ...]) -> Product | None:
    waiting = [a for group in product.groups for a in group]
    groups = []
    for size in new:
        group, have = [], 1
        while have < size or (waiting and product.sizes[waiting[0]] == 1):
            if not waiting:
                return None
            a = waiting.pop(0)
            full, need = product.sizes[a], size // have
            if full > need:
                if size % have or full % need:
                    return None
                product, a, rest = _split(product, a, need)
                waiting.insert(0, rest)
            group.append(a)
            have *= product.sizes[a]
        if have != size:
            return None
        groups.append(tuple(group))
    if waiting:
        return None
    return dataclasses.replace(product, groups=tuple(groups))


def _split(product: Product, label: int, first: int) -> tuple[Product, int, int]:
    """One axis as two, the first of that size; their labels."""
    fresh = 1 + max(product.sizes)
    in_left = label in product.left
    factor, labels = (product.u, product.left) if in_left else (product.v, product.right)
    at = labels.index(label)
    axis = at if in_left else at + 1
    shape = factor.shape
    factor = factor.reshape(*shape[:axis], first, shape[axis] // first, *shape[axis + 1 :])
    labels = (*labels[:at], label, fresh, *labels[at + 1 :])
    changed = {"u": factor, "left": labels} if in_left else {"v": factor, "right": labels}
    return dataclasses.replace(product, **changed), label, fresh


def _broadcast(product: Product, new: tuple[int, ...], dimensions) -> Product:
    groups: list[tuple[int, ...]] = [()] * len(new)
    for old, d in enumerate(dimensions):
        groups[d] = product.groups[old]
    for d, size in enumerate(new):
        have = math.prod(product.sizes[a] for a in groups[d])
        if have != size:
            fresh = 1 + max(product.sizes)
            u = jnp.broadcast_to(jnp.expand_dims(product.u, 0), (size, *product.u.shape))
            product = dataclasses.replace(product, u=u, left=(fresh, *product.left))
            groups[d] = (*groups[d], fresh)
    return dataclasses.replace(product, groups=tuple(groups))


def _cut(product: Product, eqn: Any, others: list[Any]) -> Product | None:
    """A slice; None through a merged axis."""
    static, params = eqn.primitive.name == "slice", eqn.params
    new = eqn.outvars[0].aval.shape
    strides = (params["strides"] if static else None) or (1,) * len(new)
    starts = params["start_indices"] if static else others
    for d, (old, size) in enumerate(zip(product.shape, new, strict=True)):
        if old == size:
            continue
        labels = [a for a in product.groups[d] if product.sizes[a] > 1]
        if len(labels) != 1:
            return None

        def cut(x, axis, a, d=d, label=labels[0], size=size):
            if a != label:
                return x
            if static:
                stop = params["limit_indices"][d]
                return jax.lax.slice_in_dim(x, starts[d], stop, strides[d], axis)
            return jax.lax.dynamic_slice_in_dim(x, starts[d], size, axis)

        product = _changed(product, cut)
    return product


def product_rows(product: Product) -> tuple[jax.Array, Callable[[jax.Array], Product]] | None:
    """What there is of each row, and the function that builds a row of it; None if merged."""
    first, groups = product.groups[0], product.groups[1:]
    if len(first) > 1:
        return None
    if not first:
        whole = dataclasses.replace(product, groups=groups)
        return product.u[None], lambda u: dataclasses.replace(whole, u=u)
    if first[0] in product.left:
        axis = product.left.index(first[0])
        left = tuple(a for a in product.left if a != first[0])
        return jnp.moveaxis(product.u, axis, 0), lambda u: dataclasses.replace(
            product, u=u, left=left, groups=groups
        )
    axis = product.right.index(first[0]) + 1
    right = tuple(a for a in product.right if a != first[0])
    return jnp.moveaxis(product.v, axis, 0), lambda v: dataclasses.replace(
        product, v=v, right=right, groups=groups
    )
