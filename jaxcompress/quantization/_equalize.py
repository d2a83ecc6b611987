"""Equalizing the ranges of channels across layers."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress import _check, tree
from jaxcompress._types import PyTree

Pair = tuple[str, str] | tuple[str, str, str]
"""Paths of the kernel before an activation, of the one after it, and of the bias before it."""


def equalize(
    params: PyTree,
    pairs: Sequence[Pair],
    *,
    iterations: int = 20,
    axes: tuple[int, int] = (-1, -2),
) -> PyTree:
    r"""Cross-layer equalization: both sides of a ReLU get channels of the same range.

    .. math:: W_2\,\phi(W_1 x + b) = (W_2 S)\,\phi(S^{-1} W_1 x + S^{-1} b), \qquad
        s_i = \frac{1}{r_i^{(2)}} \sqrt{r_i^{(1)} r_i^{(2)}}

    for an activation with :math:`\phi(s x) = s\,\phi(x)`: ReLU, leaky ReLU, or none; and also
    through a pooling, but not through a norm, GELU, ReLU6 or a skip connection. With
    :math:`r_i` the largest magnitude of channel i, both sides then have
    :math:`\sqrt{r_i^{(1)} r_i^{(2)}}`. The function stays the same, up to rounding; one step
    for a whole leaf (`jc.quantize(8, axis=None)`) then serves all channels.

    Args:
        params: any pytree of dense parameters; they are not changed.
        pairs: static. For each activation `(first kernel, second kernel)`, and as third the bias
            that is added before it, if there is one, by their paths. Chains share kernels.
        iterations: static. How often all pairs are equalized in turn. A single pair is done after
            one, chains converge.
        axes: static. The axis of the output channels of the first kernel, and that of the
            input channels of the second: Flax's layouts of dense layers and convolutions, or
            (0, 1) for PyTorch's.

    Returns:
        Params of the same structure, shapes and dtypes, computed in float32. A channel that is
        zero on one side, or holds a NaN or an infinity, is left as it is.

    Raises:
        ValueError: a path that no leaf has; kernels whose channels do not match, as those of
            a grouped convolution or behind a flattening, which are not covered.
        TypeError: a pair is no tuple of paths, or a leaf is not real floating point.

    Cost: `iterations` passes over the kernels. Works under `jit` and `vmap`.

    Examples:
        >>> params = {"a": jnp.array([[1.0, 100.0]]), "b": jnp.array([[1.0], [0.01]])}
        >>> new = jc.quantization.equalize(params, [("a", "b")])
        >>> new["a"].round(4), new["b"].round(4)
        (Array([[1., 1.]], dtype=float32), Array([[1.],
               [1.]], dtype=float32))

    Source: Nagel et al. 2019, arXiv:1906.04721, section 4.1, equation 11. Differs: ranges are
    largest magnitudes; the high biases of section 4.2 are not absorbed.
    """
    _check.integer("equalize", "iterations", iterations, 0)
    leaves = tree.by_path("equalize", "params", params)
    plans = [_plan(i, pair, leaves, axes) for i, pair in enumerate(pairs)]
    used = dict.fromkeys(path for plan in plans for path in plan[0])
    wide = {path: leaves[path].astype(jnp.float32) for path in used}

    def once(_, held):
        held = dict(held)
        for paths, out, into in plans:
            first, second = held[paths[0]], held[paths[1]]
            s = _scale(_range(first, out), _range(second, into))
            held[paths[0]] = first * _along(1 / s, first, out)
            # The same kernel on both sides would be that of a recurrence: refused above.
            held[paths[1]] = second * _along(s, second, into)
            for bias in paths[2:]:
                held[bias] = held[bias] * (1 / s).reshape(held[bias].shape)
        return held

    new = lax.fori_loop(0, iterations, once, wide) if plans else wide
    return tree.map_with_path(
        lambda path, w: new[path].astype(w.dtype) if path in new else w, params
    )


def _plan(
    index: int, pair: Any, leaves: dict[str, Any], axes: tuple[int, int]
) -> tuple[tuple[str, ...], int, int]:
    name = f"pairs[{index}]"
    paths = isinstance(pair, tuple) and len(pair) in (2, 3)
    if not paths or not all(isinstance(path, str) for path in pair):
        rule, got = "be a tuple of two paths, or three with a bias", _check.describe(pair)
        raise TypeError(_check.message("equalize", name, rule, got))
    for path in pair:
        if path not in leaves:
            rule, fix = "name leaves of the params", f"They are {sorted(leaves)}."
            raise ValueError(_check.message("equalize", name, rule, repr(path), fix))
        _check.floating("equalize", "params", leaves[path], path)
    if len(set(pair)) < len(pair):
        rule = "have three different leaves"
        raise ValueError(_check.message("equalize", name, rule, repr(pair)))
    first, second = leaves[pair[0]], leaves[pair[1]]
    out = _check.axis("equalize", "axes[0]", axes[0], len(first.shape), pair[0])
    into = _check.axis("equalize", "axes[1]", axes[1], len(second.shape), pair[1])
    sizes = [first.shape[out], second.shape[into]]
    sizes += [leaves[path].size for path in pair[2:]]
    if len(set(sizes)) > 1:
        rule = "have as many outputs of the first kernel as inputs of the second"
        rule += " and entries of the bias"
        fix = "Grouped convolutions and flattened channels are not covered; see also `axes`."
        raise ValueError(_check.message("equalize", name, rule, sizes, fix))
    return pair, out, into


def _range(w: jax.Array, axis: int) -> jax.Array:
    others = tuple(i for i in range(w.ndim) if i != axis)
    return jnp.max(jnp.abs(w), axis=others, initial=0.0)


def _scale(first: jax.Array, second: jax.Array) -> jax.Array:
    sound = (first > 0) & (second > 0) & jnp.isfinite(first) & jnp.isfinite(second)
    first, second = (jnp.where(sound, r, 1.0) for r in (first, second))
    # Roots before the quotient: the product of two ranges may leave float32.
    return jnp.sqrt(first) / jnp.sqrt(second)


def _along(s: jax.Array, w: jax.Array, axis: int) -> jax.Array:
    return jnp.expand_dims(s, tuple(i for i in range(w.ndim) if i != axis))
