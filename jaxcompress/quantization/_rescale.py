"""Quantizing in scaled features: outliers of activations move into the weights, or out of them."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import _check, arrays, tree
from jaxcompress._types import PyTree
from jaxcompress.projections import Projection, is_masked_node
from jaxcompress.quantization._features import Move, in_features, require_projection


def rescaled(projection: Projection, scales: Mapping[str, jax.Array]) -> Projection:
    r"""`projection` of leaves after a scale on each of their input features.

    .. math:: x W = (x\,S^{-1})\,(S W), \qquad S = \operatorname{diag}(s)

    `pack` gives `arrays.Rescaled`, and `jc.lift` divides the activations of such a leaf by s,
    also before it rounds them to integers (`activations="dynamic"`). Nothing is folded into
    other layers: any model is covered, and layers that share an input need not agree.

    Args:
        projection: any, as `jc.quantize(8)`.
        scales: from paths of leaves to s, above 0, of the rank of the leaf: of size 1 along the
            axes of its outputs, so `[inputs, 1]` for a dense kernel of Flax. May be traced.
            Leaves without one are projected as they are.

    Returns:
        A projection whose structure is `Moved(scales by path, inner)`. A leaf that
        `projection` does not choose stays as it is. Zeros stay zero.

    Raises:
        TypeError: `projection` is no `Projection`, or a leaf with a scale is not real floating
            point.
        ValueError: a path that no leaf has, a scale that does not fit its leaf, or one that is
            not above 0 and finite.

    Cost: two products with each leaf in `project`; in the lifted model one of the activations
    per leaf, and four bytes per feature.

    Examples:
        >>> params = {"w": jnp.array([[1.0, 0.9], [0.02, -0.03]])}
        >>> p = jc.quantization.rescaled(jc.quantize(8), {"w": jnp.array([[1.0], [30.0]])})
        >>> jc.compress(p, params)["w"].round(4)
        Array([[ 1.    ,  0.9   ],
               [ 0.0199, -0.03  ]], dtype=float32)

    Source: the transformation of Xiao et al. 2022, arXiv:2211.10438, equation 3. Differs: the
    activations are divided where they are used, not in the layer before.
    """
    require_projection("rescaled", projection)
    for path, s in scales.items():
        if _check.is_traced(s):
            continue
        found = np.asarray(s)
        if not (np.isfinite(found).all() and (found > 0).all()):
            rule, got = "be finite and above 0", f"{found.min()} to {found.max()}"
            raise ValueError(_check.message("rescaled", "scales", rule, got, path=path))

    def scales_of(params: PyTree, everywhere: bool) -> dict[str, jax.Array]:
        del everywhere
        leaves = dict(tree.leaves_with_paths(params, is_leaf=is_masked_node))
        unknown = sorted(set(scales) - set(leaves))
        if unknown:
            rule, got = "name leaves of the params", f"{unknown}"
            raise ValueError(_check.message("rescaled", "scales", rule, got))
        found = {}
        for path, s in scales.items():
            w = leaves[path]
            if is_masked_node(w):
                continue
            _check.floating("rescaled", "params", w, path)
            s = jnp.asarray(s, jnp.float32)
            fits = len(s.shape) == len(w.shape) and all(
                m in (1, n) for m, n in zip(s.shape, w.shape, strict=True)
            )
            if not fits:
                rule = f"have 1 or all entries along each axis of {list(w.shape)}"
                got = _check.describe(s)
                raise ValueError(_check.message("rescaled", "scales", rule, got, path=path))
            found[path] = s
        return found

    return in_features(projection, scales_of, _MOVE)


def _inverse(s: jax.Array) -> jax.Array:
    return 1.0 / s


def _gram(gram: jax.Array, s: jax.Array, layout: Any) -> jax.Array:
    inverse = layout.matrices(jnp.broadcast_to(_inverse(s), layout.shape))[:, :, 0]
    return gram * inverse[:, :, None] * inverse[:, None, :]


def _wrap(packed: Any, s: jax.Array, dtype: Any) -> arrays.Rescaled:
    return arrays.Rescaled(packed, _inverse(s), np.dtype(dtype))


_MOVE = Move(
    there=arrays.rescale,
    back=lambda v, s: arrays.rescale(v, _inverse(s)),
    cotangent=lambda g, s: arrays.rescale(g, _inverse(s)),
    wrap=_wrap,
    gram=_gram,
    keeps_zeros=True,
)
