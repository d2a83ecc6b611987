"""Removal by NumPy alone: what to keep, params with zeros, and params cut by index."""

import jax
import jax.numpy as jnp
import numpy as np

import jaxcompress as jc
from jaxcompress.pruning.structured._places import kept_positions


def some_units(dependencies, groups, seed=0, fraction=0.5):
    """A `Keep` of about half of the units of these groups, at random."""
    rng = np.random.default_rng(seed)
    masks = {}
    for group in groups:
        count = max(1, round(group.size * fraction))
        order = rng.permuted(np.broadcast_to(np.arange(group.size), group.shape), axis=-1)
        masks[group.name] = order < count
    return jc.pruning.Keep(dependencies, masks)


def by_paths(tree, change):
    """`change(path, leaf)` in place of each leaf, in NumPy."""
    leaves = [change(path, np.asarray(leaf)) for path, leaf in jc.tree.leaves_with_paths(tree)]
    return jax.tree.unflatten(jax.tree.structure(tree), [jnp.asarray(leaf) for leaf in leaves])


def masked(params, keep):
    """Zeros wherever something leaves."""
    found = kept_positions(keep)

    def change(path, leaf):
        for axis, stays in found.get(path, {}).items():
            shape = list(stays.shape[:-1]) + [1] * (leaf.ndim - stays.ndim + 1)
            shape[axis] = stays.shape[-1]
            leaf = np.where(stays.reshape(shape), leaf, np.zeros((), leaf.dtype))
        return leaf

    return by_paths(params, change)


def cut(tree, keep):
    """What stays, of params or of anything of their shapes; a layer of a scan at a time."""
    found = kept_positions(keep)

    def change(path, leaf):
        for axis, stays in found.get(path, {}).items():
            if stays.ndim == 1:
                leaf = np.compress(stays, leaf, axis)
            else:
                lead = stays.shape[:-1]
                rows = [np.compress(stays[i], leaf[i], axis - len(lead)) for i in np.ndindex(lead)]
                leaf = np.stack(rows).reshape(*lead, *rows[0].shape)
        return leaf

    return by_paths(tree, change)


def assert_close(got, want, tolerance=1e-5):
    """All leaves, relative to the largest number in each, and to that in all for small ones."""
    got, want = ([np.asarray(v, np.float64) for v in jax.tree.leaves(t)] for t in (got, want))
    floor = 0.01 * max(np.abs(v).max() for v in want)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(np.abs(b).max(), floor))
