"""The directions of a stream that carry its signal, and its parameters in them."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress import _check
from jaxcompress._dtypes import wide
from jaxcompress._products import product
from jaxcompress._sharding import is_explicit, on_mesh_of
from jaxcompress.tracing import Member, Statistics, Stream
from jaxcompress.tracing._folding import folded, gains_of

Leaves = Mapping[str, Any]


def moment(stream: Stream, stats: Mapping[str, Statistics], leaves: Leaves) -> jax.Array:
    r"""The sum of :math:`x x^\top` over all that reads a stream, float32[size, size].

    x are the activations before gains: those of the folded model.
    """
    total = jnp.zeros((stream.size, stream.size), jnp.float32)
    for member in stream.members:
        if not member.reads:
            continue
        found = [
            (s.axes, s.gram.matrix)
            for name, s in stats.items()
            if site_path(name, leaves) == member.path
            and s.axes is not None
            and member.axis in s.axes
            and s.gram is not None
        ]
        if not found:
            rule = "hold Gram matrices of all that reads the stream"
            fix = "Call jc.calibrate(fn, params, batches, gram=True)."
            text = _check.message("slice_streams", "stats", rule, "none", fix, path=member.path)
            raise ValueError(text)
        inverse = jnp.ones((1, stream.size), jnp.float32)
        for _, gain in gains_of(member, stream, leaves):
            gain = gain.reshape((-1, stream.size)).astype(jnp.float32)
            inverse = inverse * jnp.where(gain == 0, 0.0, 1 / jnp.where(gain == 0, 1.0, gain))
        for axes, gram in found:
            sizes = tuple(leaves[member.path].shape[a] for a in axes)
            total += _features(gram, sizes, axes.index(member.axis), inverse)
    return total


def site_path(name: str, leaves: Leaves) -> str:
    """The path of the leaf of a site, by the site's name."""
    return name if name in leaves else name.rpartition(":")[0]


@functools.partial(jax.jit, static_argnums=(1, 2))
def _features(gram, sizes: tuple[int, ...], at: int, inverse: jax.Array) -> jax.Array:
    """Of a Gram matrix of several axes that of one alone, for scaled features."""
    count, size = len(sizes), sizes[at]
    x = gram.reshape((-1, *sizes, *sizes))
    x = jnp.moveaxis(x, (1 + at, 1 + count + at), (-2, -1))
    rest = math.prod(sizes) // max(size, 1)
    x = jnp.einsum("lrrde->lde", x.reshape((-1, rest, rest, size, size)))
    return jnp.sum(x * inverse[:, :, None] * inverse[:, None, :], axis=0)


@functools.partial(jax.jit, static_argnums=(1, 2))
def slicing_basis(
    second_moment: jax.Array, kept: int, centred: bool
) -> tuple[jax.Array, jax.Array]:
    """Orthonormal rows, `[kept, size]`, and the part of the trace that they leave out.

    They are the leading eigenvectors. `centred`: those of the moment without its mean, turned
    so that the vector of ones goes to the vector of ones, and what is orthogonal to it there
    to what is here.
    """
    size = second_moment.shape[0]
    inner = _beside_ones(size) if centred else jnp.eye(size, dtype=second_moment.dtype)
    values, vectors = jnp.linalg.eigh(product(product(inner.T, second_moment), inner))
    count = kept - 1 if centred else kept
    rows = product(inner, vectors[:, ::-1][:, :count]).T
    values = jnp.maximum(values[::-1], 0.0)
    whole = jnp.sum(values)
    error = jnp.sum(values[count:]) / jnp.where(whole > 0, whole, 1.0)
    if centred:
        rows = product(_beside_ones(kept), rows) + 1 / math.sqrt(kept * size)
    return rows, error


def _beside_ones(size: int) -> jax.Array:
    """`[size, size - 1]`, orthonormal columns that are orthogonal to the vector of ones."""
    first = jnp.zeros((size,), jnp.float32).at[0].set(1.0)
    normal = jnp.full((size,), 1 / math.sqrt(size), jnp.float32) - first
    length = jnp.sum(jnp.square(normal))
    normal = normal * jnp.where(length > 0, jax.lax.rsqrt(jnp.where(length > 0, length, 1.0)), 0.0)
    return (jnp.eye(size, dtype=jnp.float32) - 2 * jnp.multiply.outer(normal, normal))[:, 1:]


def is_writer(member: Member) -> bool:
    """Whether the mean of a member's features has no effect in a centred stream."""
    return member.role == "weight" and not member.gains


def turned(leaves: Leaves, stream: Stream, rows: jax.Array, centred: bool) -> dict[str, jax.Array]:
    """The members of a stream in other directions: their norms folded, those that write
    centred, each axis of the stream times the rows."""
    new: dict[str, jax.Array] = {}
    for member in stream.members:
        w = new.get(member.path, wide(leaves[member.path]))
        w = folded("slice_streams", w, member, stream, leaves)
        if member.role == "gain":
            new[member.path] = jax.lax.slice_in_dim(w, 0, rows.shape[0], axis=member.axis)
            continue
        if centred and is_writer(member):
            w = w - jnp.mean(w, axis=member.axis, keepdims=True)
        new[member.path] = along(w, rows, member.axis)
    return new


def turned_back(new: dict[str, jax.Array], stream: Stream, rows: jax.Array) -> dict[str, jax.Array]:
    """What the members `new` are in the directions they came from, without what was cut."""
    whole = dict(new)
    for member in stream.members:
        w = whole[member.path]
        if member.role == "gain":
            shape = list(w.shape)
            shape[member.axis] = rows.shape[1]
            whole[member.path] = jnp.full(shape, 1.0 - member.shift, w.dtype)
        else:
            whole[member.path] = along(w, rows.T, member.axis)
    return whole


def along(w: jax.Array, matrix: jax.Array, axis: int) -> jax.Array:
    """An axis of `w` times a matrix; it is cut along no mesh after that."""
    if not is_explicit(w):
        return _times(w, matrix, axis)
    spec = list(jax.typeof(w).sharding.spec)
    spec[axis] = None
    out = on_mesh_of(w, jax.P(*spec))
    run: Callable[..., Any] = jax.sharding.auto_axes(
        functools.partial(_times, axis=axis), out_sharding=out
    )
    return run(w, matrix)


@functools.partial(jax.jit, static_argnames="axis")
def _times(w: jax.Array, matrix: jax.Array, axis: int) -> jax.Array:
    y = jnp.matmul(jnp.moveaxis(w, axis, -1), matrix.T.astype(w.dtype), precision="highest")
    return jnp.moveaxis(y, -1, axis)
