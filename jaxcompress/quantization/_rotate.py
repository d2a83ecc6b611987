"""Quantizing in rotated features, which have no outliers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import _check, _keys, arrays, tree
from jaxcompress._types import PyTree
from jaxcompress.projections import Projection
from jaxcompress.quantization._features import Move, in_features, require_projection


def rotated(
    projection: Projection, key: jax.Array, *, axis: int = -2, order: int | None = None
) -> Projection:
    r"""`projection` of each leaf after a random rotation of its input features.

    .. math:: x W = (R x)\,(R W), \qquad R = \tfrac{1}{\sqrt b}\,(I \otimes H_b)\,
        \operatorname{diag}(s), \quad s_j = \pm 1

    with Hadamard matrices :math:`H_b` and a sign for each feature. R mixes all features of a
    block, so that the largest entry of a rotated column, or of rotated activations, is hardly
    larger than that of a Gaussian one: steps get finer. `pack` gives `arrays.Rotated`, and
    `jc.lift` rotates the activations of each such leaf, also before it rounds them to integers
    (`activations="dynamic"`). Nothing is folded into other layers: any model is covered, and
    layers that share an input need not agree.

    Args:
        projection: any, as `jc.quantize(4)`.
        key: a `jax.random.key`. May be traced. Each leaf folds in its path.
        axis: static. The axis of the input features: -2 in Flax's layouts of dense layers and
            convolutions, -1 for PyTorch's dense ones. `jc.lift` decodes a leaf that it meets
            along another axis.
        order: static. b, see `jc.arrays.hadamard`; None: the largest that divides the axis.

    Returns:
        A projection whose structure is `Moved(signs by path, inner)`. It moves the leaves that
        `projection` chooses, by default those with two or more dimensions. Zeros of a
        rotated leaf are none of the leaf, which is dense. A NaN spreads over its block.

    Raises:
        TypeError: `projection` is no `Projection`, `key` is no key, or a chosen leaf is not
            real floating point.
        ValueError: an axis that a leaf does not have, or an order that is not possible for it.

    Cost: two transforms of each leaf in `project`. In the lifted model one of the activations
    per leaf, in float32, :math:`O(n \log n)` for n features against :math:`n m` of the product
    with m outputs, and one byte per feature. `rotate_streams` saves most of these where the
    norms of a model stand before its layers; this covers any model.

    Examples:
        >>> w = jnp.ones((64, 8)).at[3].set(30.0)
        >>> loss = lambda p: float(jnp.sum((jc.compress(p, {"w": w})["w"] - w) ** 2))
        >>> p = jc.quantize(4)
        >>> loss(jc.quantization.rotated(p, jax.random.key(0))) < loss(p)
        True

    Source: Ashkboos et al. 2024, arXiv:2404.00456, section 4 (their online transforms); Tseng et
    al. 2024, arXiv:2402.04396, section 3. Differs: only the input side is rotated, every leaf
    by itself.
    """
    require_projection("rotated", projection)
    _check.key("rotated", key)
    _check.integer("rotated", "axis", axis, -(10**9))
    if order is not None:
        _check.integer("rotated", "order", order, 1)

    def signs_of(params: PyTree, everywhere: bool) -> dict[str, jax.Array]:
        signs = {}
        for path, w in tree.leaves_with_paths(params):
            if not (everywhere or tree.is_weight(path, w)):
                continue
            _check.floating("rotated", "params", w, path)
            at = _check.axis("rotated", "axis", axis, len(w.shape), path)
            length = w.shape[at]
            if order is not None and (length % order or arrays.hadamard_order(order) != order):
                rule = f"divide the {length} features and be a known order"
                fix = f"The largest is {arrays.hadamard_order(length)}."
                raise ValueError(_check.message("rotated", "order", rule, order, fix, path=path))
            own = _keys.of_leaf(key, path)
            signs[path] = jax.random.rademacher(own, (length,), jnp.int8)
        return signs

    def place(w: Any) -> dict[str, int]:
        at = axis % len(w.shape)
        return {"axis": at, "order": order or arrays.hadamard_order(w.shape[at])}

    def wrap(packed, signs, dtype):
        return arrays.Rotated(packed, signs, **place(packed), dtype=np.dtype(dtype))

    def gram_of(gram, signs, layout):
        at = axis % len(layout.shape)
        if layout.shape[at] == 1:
            return gram
        if at not in layout.axes:
            rule = f"be one that is summed over ({list(layout.axes)}) to be solved with statistics"
            raise ValueError(_check.message("rotated", "axis", rule, axis))
        sizes = [layout.shape[a] for a in layout.axes]
        place = 1 + layout.axes.index(at)
        x = gram.reshape((-1, *sizes, *sizes))
        for side in (place, place + len(sizes)):
            x = arrays.rotate(x, signs, side, order or arrays.hadamard_order(len(signs)))
        return x.reshape(gram.shape)

    move = Move(
        there=lambda w, signs: arrays.rotate(w, signs, **place(w)),
        back=lambda v, signs: arrays.rotate_back(v, signs, **place(v)),
        cotangent=lambda g, signs: arrays.rotate(g, signs, **place(g)),
        wrap=wrap,
        gram=gram_of,
    )
    return in_features(projection, signs_of, move)
