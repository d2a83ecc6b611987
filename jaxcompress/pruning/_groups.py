"""Groups: weights of a leaf that live and die together."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import _check
from jaxcompress._dtypes import wide
from jaxcompress._sharding import automatic

Norm = Callable[[jax.Array, tuple[int, ...], jax.Array], jax.Array]
"""`(scores, axes, sizes) -> importance`: reduces `axes` of the scores, where what pads the last
groups is zero; `sizes` are the true numbers of weights, in the shape of the result."""

_SMALL, _LARGE = 2.0**-100, 2.0**100


class Groups(NamedTuple):
    """How the weights of a leaf are tied, as pure functions of one leaf.

    Attributes:
        block: `(path, shape) -> block`: the leaf is cut into blocks of this shape, with as
            many dimensions as the leaf. Those at the end may be smaller.
        norm: what makes one score of those of a group.

    Examples:
        >>> groups = jc.pruning.blocks(2, 2)
        >>> groups.reduce("w", jnp.array([[1.0, 2.0, 3.0]]))
        Array([[3., 3.]], dtype=float32)
        >>> groups.expand("w", jnp.array([[True, False]]), (1, 3))
        Array([[ True,  True, False]], dtype=bool)
    """

    block: Callable[[str, tuple[int, ...]], tuple[int, ...]]
    norm: Norm

    def reduce(self, path: str, scores: jax.Array) -> jax.Array:
        """The importance of each group: an array over the grid of groups, float32 or wider."""
        block = self.block(path, scores.shape)
        return automatic(lambda x: _reduce(x, block, self.norm), wide(scores), like_first=False)

    def expand(self, path: str, kept: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """From which groups live to which weights do."""
        block = self.block(path, shape)
        return automatic(lambda k: _expand(k, block, shape), kept, like_first=False)

    def sizes(self, path: str, shape: tuple[int, ...]) -> np.ndarray:
        """How many weights each group has."""
        return _sizes(shape, self.block(path, shape))


def l1(scores: jax.Array, axes: tuple[int, ...], sizes: jax.Array) -> jax.Array:
    """The sum of absolute scores of a group."""
    del sizes
    return jnp.sum(jnp.abs(scores), axes)


def l2(scores: jax.Array, axes: tuple[int, ...], sizes: jax.Array) -> jax.Array:
    """The root of the sum of squared scores of a group, without overflow; smooth at zeros."""
    del sizes
    top = jax.lax.stop_gradient(jnp.max(jnp.abs(scores), axes, keepdims=True, initial=0.0))
    # XLA multiplies by the reciprocal, which is flushed to zero for the very largest.
    safe = jnp.clip(jnp.where(jnp.isfinite(top), top, jnp.ones_like(top)), _SMALL, _LARGE)
    squares = jnp.sum(jnp.square(scores / safe), axes)
    positive = squares > 0
    root = jnp.sqrt(jnp.where(positive, squares, jnp.ones_like(squares)))
    return jnp.squeeze(safe, axes) * jnp.where(positive, root, squares)


def largest_score(scores: jax.Array, axes: tuple[int, ...], sizes: jax.Array) -> jax.Array:
    """The largest absolute score of a group."""
    del sizes
    return jnp.max(jnp.abs(scores), axes, initial=0.0)


def mean(scores: jax.Array, axes: tuple[int, ...], sizes: jax.Array) -> jax.Array:
    """The mean absolute score: comparable between groups of different sizes."""
    return jnp.sum(jnp.abs(scores), axes) / sizes


def total(scores: jax.Array, axes: tuple[int, ...], sizes: jax.Array) -> jax.Array:
    """The sum of the scores of a group with their signs, as those of `jc.pruning.grasp` have."""
    del sizes
    return jnp.sum(scores, axes)


def blocks(*shape: int, norm: Norm = l1) -> Groups:
    """Blocks over the last axes of a leaf.

    Args:
        *shape: static. Of a block, over as many of the last axes; axes before them are cut
            into single indices. Where it does not divide, the last blocks are smaller.
        norm: static. `jc.pruning.l1`, `l2`, `mean`, `largest_score` of absolute scores, `total`
            of signed ones, or one of your own.

    Returns:
        Groups for `jc.prune(…, groups=…)`. A NaN makes its group's score NaN: it goes first.
        `jc.pack` stores the blocks as `jc.arrays.BlockSparse`, and `jc.lift` multiplies those
        alone where that is faster.

    Raises:
        ValueError: a leaf has fewer axes; raised while tracing.

    Cost: one reduction and one broadcast over the leaf.

    Examples:
        >>> p = jc.prune(0.5, groups=jc.pruning.blocks(2, 2))
        >>> w = jnp.array([[1.0, 1.0, 5.0], [1.0, 1.0, 0.0]])
        >>> jc.compress(p, {"w": w})["w"]
        Array([[0., 0., 5.],
               [0., 0., 0.]], dtype=float32)

    Source: Narang et al. 2017, arXiv:1711.02782; Gray et al. 2017, "GPU kernels for
    block-sparse weights".
    """
    require_norm("blocks", norm)
    for i, size in enumerate(shape):
        _check.integer("blocks", f"shape[{i}]", size, 1)
    _check.integer("blocks", "len(shape)", len(shape), 1)

    def block(path, leaf):
        if len(leaf) < len(shape):
            _refuse("blocks", f"have at least {len(shape)} dimensions", leaf, path)
        return (1,) * (len(leaf) - len(shape)) + shape

    return Groups(block, norm)


def slices(*axes: int, norm: Norm = l2) -> Groups:
    """Channels, rows, columns: all weights with one index along the axes live together.

    Args:
        *axes: static. One axis or more: -1 for the output channels of Flax kernels, -2 for
            their inputs, 0 for the outputs of `(out, in)` layouts.
        norm: static. As in `blocks`.

    Returns:
        Groups for `jc.prune(…, groups=…)`: zeros only, shapes stay. `jc.pack` stores one bit
        for each index.

    Raises:
        ValueError: a leaf has no such axis; raised while tracing.

    Cost: as `blocks`.

    Examples:
        >>> p = jc.prune(0.5, groups=jc.pruning.slices(-1))
        >>> jc.compress(p, {"w": jnp.array([[1.0, 4.0], [2.0, 0.5]])})["w"]
        Array([[0. , 4. ],
               [0. , 0.5]], dtype=float32)

    Source: Li et al. 2017, arXiv:1608.08710 (with `l1`); Wen et al. 2016, arXiv:1608.03665.
    """
    require_norm("slices", norm)
    _check.integer("slices", "len(axes)", len(axes), 1)
    for i, axis in enumerate(axes):
        _check.integer("slices", f"axes[{i}]", axis, -64)

    def block(path, leaf):
        kept = {_check.axis("slices", "axes", axis, len(leaf), path) for axis in axes}
        return tuple(1 if i in kept else max(size, 1) for i, size in enumerate(leaf))

    return Groups(block, norm)


def heads(
    axis: int, *, size: int | None = None, number: int | None = None, norm: Norm = l2
) -> Groups:
    """Attention heads: runs of consecutive indices along an axis.

    Args:
        axis: static. The axis of `heads * size of a head`: -1 for query, key and value
            kernels of Flax, -2 for the output projection. (Where heads have an axis of their
            own, as in `nnx.MultiHeadAttention`, use `slices` with it.)
        size: static. Of a head.
        number: static. Of heads, instead of `size`.
        norm: static. As in `blocks`.

    Returns:
        Groups for `jc.prune(…, groups=…)`.

    Raises:
        ValueError: both or none of `size` and `number`; the axis is not a whole number of
            heads.

    Cost: as `blocks`.

    Examples:
        >>> p = jc.prune(0.5, groups=jc.pruning.heads(-1, number=2))
        >>> jc.compress(p, {"query": jnp.array([[1.0, 2.0, 3.0, 4.0]])})["query"]
        Array([[0., 0., 3., 4.]], dtype=float32)

    Source: Michel et al. 2019, arXiv:1905.10650; Voita et al. 2019, arXiv:1905.09418.
    """
    require_norm("heads", norm)
    _check.integer("heads", "axis", axis, -64)
    if (size is None) == (number is None):
        got = f"size={size!r}, number={number!r}"
        rule = "be given, or else `number`, but not both"
        raise ValueError(_check.message("heads", "size", rule, got))
    name, given = ("size", size) if size is not None else ("number", number or 0)
    _check.integer("heads", name, given, 1)

    def block(path, leaf):
        along = _check.axis("heads", "axis", axis, len(leaf), path)
        if leaf[along] % given:
            _refuse("heads", f"have an axis {axis} that {name}={given} divides", leaf, path)
        length = given if number is None else leaf[along] // given
        return tuple(max(length if i == along else n, 1) for i, n in enumerate(leaf))

    return Groups(block, norm)


def whole(norm: Norm = mean) -> Groups:
    """Each leaf is one group: with a global scope, layers are removed as a whole.

    Args:
        norm: static. As in `blocks`; the mean compares leaves of different sizes.

    Returns:
        Groups for `jc.prune(…, groups=…, scope="global", floor=None)`: without a floor, since
        the floor keeps a group of each leaf.

    Cost: as `blocks`.

    Examples:
        >>> p = jc.prune(0.5, groups=jc.pruning.whole(), scope="global", floor=None)
        >>> params = {"a": jnp.ones((2, 2)), "b": jnp.full((1, 2), 3.0)}
        >>> jax.tree.map(lambda w: float(w.sum()), jc.compress(p, params))
        {'a': 0.0, 'b': 6.0}
    """
    require_norm("whole", norm)
    return Groups(lambda path, leaf: tuple(max(n, 1) for n in leaf), norm)


def _grid(shape: tuple[int, ...], block: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(-(-n // b) for n, b in zip(shape, block, strict=True))


def _reduce(scores: jax.Array, block: tuple[int, ...], norm: Norm) -> jax.Array:
    shape, grid = scores.shape, _grid(scores.shape, block)
    if scores.size == 0:
        return jnp.zeros(grid, scores.dtype)
    padding = [(0, g * b - n) for n, g, b in zip(shape, grid, block, strict=True)]
    split = [part for g, b in zip(grid, block, strict=True) for part in (g, b)]
    cut = (jnp.pad(scores, padding) if padding else scores).reshape(split)
    axes = tuple(range(1, 2 * len(shape), 2))
    importance = norm(cut, axes, jnp.asarray(_sizes(shape, block), scores.dtype))
    if jnp.shape(importance) != grid:
        rule, got = f"return shape {list(grid)}, one number a group", _check.describe(importance)
        raise ValueError(_check.message("prune", "norm", rule, got))
    return importance


def _expand(kept: jax.Array, block: tuple[int, ...], shape: tuple[int, ...]) -> jax.Array:
    grid = _grid(shape, block)
    spread = kept.reshape([part for g in grid for part in (g, 1)])
    spread = jnp.broadcast_to(spread, [x for g, b in zip(grid, block, strict=True) for x in (g, b)])
    padded = spread.reshape([g * b for g, b in zip(grid, block, strict=True)])
    return padded[tuple(slice(0, n) for n in shape)]


def _sizes(shape: tuple[int, ...], block: tuple[int, ...]) -> np.ndarray:
    out = np.ones((), np.int64)
    for n, b, g in zip(shape, block, _grid(shape, block), strict=True):
        out = np.multiply.outer(out, np.minimum(b, n - b * np.arange(g)))
    return out


def require_norm(function: str, norm: Norm) -> None:
    """Refuses what is no function."""
    if not callable(norm):
        rule = "be a function, as jc.pruning.l2"
        raise TypeError(_check.message(function, "norm", rule, _check.describe(norm)))


def _refuse(function: str, rule: str, shape: tuple[int, ...], path: str):
    fix = "Choose other leaves with jc.masked."
    raise ValueError(_check.message(function, "leaf", rule, f"shape {list(shape)}", fix, path=path))
