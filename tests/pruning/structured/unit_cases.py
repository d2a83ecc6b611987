"""Functions with their dependencies written down by hand, and NumPy loops over units."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.pruning.structured._base import Dependencies, Group, Member


def member(path, axis, units):
    return Member(path, axis, np.asarray(units, np.int32))


def group(name, size, *members, layers=()):
    return Group(name, size, tuple(member(*m) for m in members), layers)


def depend(params, *groups):
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    shapes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): jax.ShapeDtypeStruct(
            x.shape, x.dtype
        )
        for path, x in flat
    }
    return Dependencies(tuple(groups), (), shapes)


def random_tree(shapes, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s).astype(dtype)),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def dense(inputs, outputs):
    return {"kernel": (inputs, outputs), "bias": (outputs,)}


def mlp(params, x):
    for layer in ("a", "b"):
        x = jax.nn.relu(x @ params[layer]["kernel"] + params[layer]["bias"][None])
    return x @ params["c"]["kernel"]


def mlp_case(seed=0, first=10, second=6):
    params = random_tree(
        {"a": dense(8, first), "b": dense(first, second), "c": {"kernel": (second, 3)}}, seed
    )
    one, two = np.arange(first), np.arange(second)
    return params, depend(
        params,
        group("a/kernel[1]", first, ("a/kernel", 1, one), ("a/bias", 0, one), ("b/kernel", 0, one)),
        group(
            "b/kernel[1]", second, ("b/kernel", 1, two), ("b/bias", 0, two), ("c/kernel", 0, two)
        ),
    )


def flat_case(seed=0):
    """A convolution of 3 channels, its BatchNorm, flattened (2 x 2 places) into a dense layer."""
    params = random_tree(
        {
            "conv": {"kernel": (2, 2, 1, 3), "bias": (3,)},
            "norm": {"scale": (3,), "bias": (3,), "mean": (3,), "var": (3,)},
            "head": {"kernel": (12, 4)},
        },
        seed,
    )
    units = np.arange(3)
    paths = [("conv/kernel", 3), ("conv/bias", 0), *((f"norm/{n}", 0) for n in params["norm"])]
    return params, depend(
        params,
        group(
            "conv/kernel[3]",
            3,
            *((path, axis, units) for path, axis in paths),
            ("head/kernel", 0, np.tile(units, 4)),
        ),
    )


def stream_case(seed=0):
    """A residual stream of 4 features through square matrices, a part of it in a wider leaf."""
    params = random_tree({"in": (3, 4), "mix": (4, 4), "out": (7, 2)}, seed)
    units = np.arange(4)
    return params, depend(
        params,
        group(
            "in[1]",
            4,
            ("in", 1, units),
            ("mix", 0, units[::-1]),
            ("mix", 1, units),
            # Two positions of no unit, two of one, and an order of its own.
            ("out", 0, [-1, 2, 0, 1, 3, -1, 2]),
        ),
    )


def attention_case(seed=0, heads=4, features=3):
    """Merged kernels: heads are runs of positions, features of all heads are strides."""
    width = heads * features
    params = random_tree({"q": (5, width), "k": (5, width), "v": (5, width), "o": (width, 5)}, seed)
    runs = np.repeat(np.arange(heads), features)
    strides = np.tile(np.arange(features), heads)
    return params, depend(
        params,
        group("q[1]/blocks", heads, *((n, 1, runs) for n in "qkv"), ("o", 0, runs)),
        group("q[1]/strides", features, ("q", 1, strides), ("k", 1, strides)),
        group("v[1]/strides", features, ("v", 1, strides), ("o", 0, strides)),
    )


def scan_case(seed=0, layers=3, hidden=5):
    params = random_tree(
        {"stack": {"up": (layers, 4, hidden), "down": (layers, hidden, 4)}, "head": (4, 7)}, seed
    )
    units, stream = np.arange(hidden), np.arange(4)
    return params, depend(
        params,
        group(
            "stack/up[2]",
            hidden,
            ("stack/up", 2, units),
            ("stack/down", 1, units),
            layers=(layers,),
        ),
        group(
            "stack/down[2]",
            4,
            ("stack/up", 1, stream),
            ("stack/down", 2, stream),
            ("head", 0, stream),
        ),
    )


CASES = {
    "mlp": mlp_case,
    "flat": flat_case,
    "stream": stream_case,
    "attention": attention_case,
    "scan": scan_case,
}


def by_path(tree):
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x, np.float64)
        for path, x in flat
    }


def weights_of(leaves, one, layer, unit, counts=lambda path: True):
    """All weights of a unit, one member and position after the other."""
    found = []
    for m in one.members:
        if counts(m.path):
            leaf = leaves[m.path][layer]
            for position in np.flatnonzero(m.units == unit):
                found.append(np.take(leaf, position, axis=m.axis - len(layer)).ravel())
    return np.concatenate(found)


def scores_by_loops(deps, tree, norm, counts=lambda path: True):
    leaves = by_path(tree)
    out = {}
    for one in deps.groups:
        if any(counts(m.path) for m in one.members):
            scores = np.zeros(one.shape)
            for layer in itertools.product(*map(range, one.layers)):
                for unit in range(one.size):
                    weights = weights_of(leaves, one, layer, unit, counts)
                    scores[(*layer, unit)] = norm(weights)
            out[one.name] = scores
    return out


def cut(params, keep):
    """The params without the positions of units that leave, by loops over layers and positions."""
    deps = keep.dependencies
    flat, treedef = jax.tree_util.tree_flatten_with_path(params)
    out = []
    for key, x in flat:
        path = jax.tree_util.keystr(key, simple=True, separator="/")
        for axis in range(x.ndim):
            goes = None
            for one in deps.groups:
                mask = keep.masks.get(one.name)
                for m in one.members:
                    if mask is not None and (m.path, m.axis) == (path, axis):
                        gone = (m.units >= 0) & ~np.asarray(mask)[..., np.maximum(m.units, 0)]
                        goes = gone if goes is None else goes | gone
            if goes is not None:
                x = _without(x, axis, goes)
        out.append(x)
    return jax.tree.unflatten(treedef, out)


def _without(x, axis, goes):
    if goes.ndim == 1:
        stays = np.flatnonzero(~goes)
        return (
            jax.ShapeDtypeStruct((*x.shape[:axis], len(stays), *x.shape[axis + 1 :]), x.dtype)
            if isinstance(x, jax.ShapeDtypeStruct)
            else (np if isinstance(x, np.ndarray) else jnp).take(x, stays, axis)
        )
    if isinstance(x, jax.ShapeDtypeStruct):
        shape = list(x.shape)
        shape[axis] = int((~goes[0]).sum())
        return jax.ShapeDtypeStruct(tuple(shape), x.dtype)
    xp = np if isinstance(x, np.ndarray) else jnp
    return xp.stack([_without(x[i], axis - 1, goes[i]) for i in range(len(goes))])


def shrink(fn, params, keep, *args):
    """For functions that take all sizes from their params."""
    return cut(params, keep), fn
