"""What compressing one leaf at a time does to a loss."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcompress import _check, tree
from jaxcompress._types import PyTree


def sensitivities(
    loss: Callable[[PyTree], Any], params: PyTree, compressed: PyTree
) -> dict[str, jax.Array]:
    r"""What compressing one leaf at a time does to a loss.

    .. math:: e_{lj} = L(w_1, \dots, w'_{lj}, \dots, w_m) - L(w_1, \dots, w_m)

    Args:
        loss: `params -> scalar`, over data of your choice.
        params: any pytree of dense parameters; they are not changed.
        compressed: the same tree, each leaf with one more leading axis: the versions of it
            that are tried, as `jax.vmap` of `jc.compress` over sparsities gives them.

    Returns:
        From the path of each floating-point leaf that any version changes to its losses above
        that of `params`, `[versions]`, in the dtype of the loss. Under `jit`, where the values
        are not known, all floating-point leaves are there.

    Raises:
        ValueError: `compressed` has another structure or other shapes, or leaves of different
            numbers of versions; a loss that is no scalar.

    Cost: one loss for each leaf and version, one after the other, in one compiled loop.

    Examples:
        >>> params = {"a": jnp.array([[1.0, 3.0]]), "b": jnp.array([[2.0, 5.0]])}
        >>> tried = jax.vmap(lambda s: jc.compress(jc.prune(s), params))(jnp.array([0.5, 1.0]))
        >>> loss = lambda p: jnp.sum((p["a"] - params["a"]) ** 2 + 2 * (p["b"] - params["b"]) ** 2)
        >>> jc.solvers.sensitivities(loss, params, tried)
        {'a': Array([ 1., 10.], dtype=float32), 'b': Array([ 8., 58.], dtype=float32)}
    """
    if jax.tree.structure(params) != jax.tree.structure(compressed):
        rule, got = "have the structure of `params`", jax.tree.structure(compressed)
        raise ValueError(_check.message("sensitivities", "compressed", rule, got))
    pairs = list(
        zip(tree.leaves_with_paths(params), tree.leaves_with_paths(compressed), strict=True)
    )
    changed: list[str] = []
    versions: int | None = None
    for (path, w), (_, tried) in pairs:
        if not _is_floating(w):
            continue
        versions = tried.shape[0] if versions is None and jnp.ndim(tried) else versions
        if jnp.shape(tried) != (versions, *jnp.shape(w)):
            rule = f"be of shape {[versions, *jnp.shape(w)]}"
            got = _check.describe(tried)
            raise ValueError(_check.message("sensitivities", "compressed", rule, got, path=path))
        known = not (_check.is_traced(w) or _check.is_traced(tried))
        if not known or bool(jnp.any(jnp.asarray(tried) != jnp.asarray(w)[None])):
            changed.append(path)
    places = {path: i for i, path in enumerate(changed)}

    @jax.jit
    def losses(params, compressed):
        base = _scalar(loss(params))

        def one(at):
            leaf, version = at

            def swap(path, w, tried):
                if path not in places:
                    return w
                mine = lax.dynamic_index_in_dim(tried, version, keepdims=False)
                return jnp.where(leaf == places[path], mine.astype(w.dtype), w)

            return _scalar(loss(tree.map_with_path(swap, params, compressed))) - base

        leaf, version = np.divmod(np.arange(len(changed) * (versions or 0)), max(versions or 0, 1))
        return lax.map(one, (jnp.asarray(leaf), jnp.asarray(version)))

    if not changed:
        return {}
    found = losses(params, compressed).reshape((len(changed), -1))
    return {path: found[i] for path, i in places.items()}


def _is_floating(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and bool(jnp.issubdtype(leaf.dtype, jnp.floating))


def _scalar(value: Any) -> jax.Array:
    if jnp.shape(value) != ():
        rule, got = "return a scalar", _check.describe(value)
        raise ValueError(_check.message("sensitivities", "loss", rule, got))
    return jnp.asarray(value)
