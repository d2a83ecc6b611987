"""Rotating the residual stream of a model once, in its weights."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress import _check, _keys, arrays, tree
from jaxcompress._dtypes import wide
from jaxcompress._types import PyTree
from jaxcompress.tracing._folding import folded, turnable


def rotate_streams(
    fn: Callable[..., PyTree], params: PyTree, *args: Any, key: jax.Array, **kwargs: Any
) -> PyTree:
    r"""Params with which `fn` gives the same, but every stream of it is rotated at random.

    .. math:: x \mapsto Q x, \qquad Q = P R, \qquad Q Q^\top = I, \qquad Q \mathbf 1 = \mathbf 1

    with R a randomized Hadamard matrix (a random orthogonal one for sizes that have none) and P
    the reflection that gives the vector of ones back. What writes into a stream is multiplied
    by Q, what reads it too, so nothing is done when the model runs: no transform of the
    activations as with `rotated`. RMSNorm and LayerNorm commute with Q once their gains
    :math:`\gamma` and offsets :math:`\beta` are folded: readers become :math:`Q \gamma W`,
    gains 1, offsets :math:`Q (\beta / \gamma)`. Outliers of single features, in weights and
    activations, are spread over all of them; quantize the result.

    Args:
        fn: any function `fn(params, *args, **kwargs)`. It is traced, not run.
        params: any pytree of dense arrays; they are not changed.
        *args: further arguments, as `fn` takes them; their shapes and dtypes matter alone.
        key: a `jax.random.key`. May be traced. Each stream folds in the path of a leaf.
        **kwargs: as `args`. A `fn` that takes a `key` itself needs `functools.partial`.

    Returns:
        Params of the same structure, shapes and dtypes, computed in float32 or wider. All streams
        are rotated that `jc.tracing.streams` finds and does not refuse; it says which they are.

    Raises:
        TypeError: `fn` can't be called, `key` is no key, or a leaf to rotate is compressed or not
            real floating point.
        ValueError: no stream can be rotated, with the reasons; a gain before an offset is zero
            (where it can be read; under `jit` the result is not finite then).

    Cost: of each leaf :math:`O(n \log n)` per column for Hadamard sizes, else :math:`O(n^2)`.

    Examples:
        >>> def fn(p, tokens):
        ...     x = p["embed"][tokens]
        ...     x = x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)
        ...     return (x * p["scale"]) @ p["head"]
        >>> params = {"embed": jnp.eye(3, 4), "scale": jnp.full(4, 2.0), "head": jnp.ones((4, 2))}
        >>> tokens = jnp.array([0, 2])
        >>> new = jc.quantization.rotate_streams(fn, params, tokens, key=jax.random.key(0))
        >>> bool(jnp.allclose(fn(new, tokens), fn(params, tokens), atol=1e-5))
        True
        >>> new["scale"]
        Array([1., 1., 1., 1.], dtype=float32)

    Source: Ashkboos et al. 2024, QuaRot, arXiv:2404.00456, section 4, stage 1; the folding of
    norms is that of arXiv:2401.15024, section 3.3. Differs: LayerNorm needs no change to
    RMSNorm, for Q keeps the mean; and heads whose values are not reshaped are streams too.
    """
    _check.key("rotate_streams", key)
    fix = "See jc.tracing.streams; jc.quantization.rotated covers any model."
    turning, _ = turnable("rotate_streams", fn, params, args, kwargs, fix)
    leaves = dict(tree.leaves_with_paths(params))
    new = dict(leaves)
    for stream in turning:
        rotation = _rotation(_keys.of_leaf(key, stream.members[0].path), stream.size)
        for member in stream.members:
            w = folded("rotate_streams", wide(new[member.path]), member, stream, leaves)
            new[member.path] = w if member.role == "gain" else _turned(w, rotation, member.axis)
    return tree.map_with_path(
        lambda path, w: w if new[path] is w else new[path].astype(w.dtype), params
    )


class _Rotation(NamedTuple):
    """An orthogonal matrix that keeps the ones: a mixing one, then a reflection.

    Attributes:
        signs: of the randomized Hadamard matrix; None for a size that has none.
        matrix: the mixing matrix there.
        normal: of the reflection, a unit vector, or zeros for none.
    """

    signs: jax.Array | None
    matrix: jax.Array | None
    normal: jax.Array


@functools.partial(jax.jit, static_argnums=1)
def _rotation(key: jax.Array, size: int) -> _Rotation:
    whole = arrays.hadamard_order(size) == size
    signs = jax.random.rademacher(key, (size,), jnp.int8) if whole else None
    matrix = None if whole else jax.random.orthogonal(key, size)
    ones = jnp.full((size,), 1 / math.sqrt(size), jnp.float32)
    # It brings where the ones went back to the ones.
    normal = _mixed(ones, signs, matrix) - ones
    length = jnp.sum(jnp.square(normal))
    return _Rotation(signs, matrix, normal * jnp.where(length > 0, jax.lax.rsqrt(length), 0.0))


def _mixed(x: jax.Array, signs, matrix) -> jax.Array:
    """Along the last axis."""
    if signs is not None:
        return arrays.rotate(x, signs, x.ndim - 1, len(signs))
    return jnp.matmul(x, matrix.T.astype(x.dtype), precision="highest")


@functools.partial(jax.jit, static_argnums=2)
def _turned(w: jax.Array, rotation: _Rotation, axis: int) -> jax.Array:
    y = _mixed(jnp.moveaxis(w, axis, -1), rotation.signs, rotation.matrix)
    n = rotation.normal.astype(y.dtype)
    y = y - 2 * jnp.multiply.outer(jnp.matmul(y, n, precision="highest"), n)
    return jnp.moveaxis(y, -1, axis)
