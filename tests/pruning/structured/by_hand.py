"""Small functions with dependency groups, and where the places of units are, by loops."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.pruning.structured._base import Dependencies, Group, Member


class Model(NamedTuple):
    """A function of params and x, params, an x, and its dependencies written by hand."""

    fn: Any
    params: dict
    x: jax.Array
    dependencies: Dependencies


def values(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _group(name, size, members, layers=()):
    members = (Member(path, axis, np.asarray(units, np.int32)) for path, axis, units in members)
    return Group(name, size, tuple(members), layers)


def _dependencies(params, *groups):
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")  # noqa: E731
    shapes = {name(path): jax.ShapeDtypeStruct(w.shape, w.dtype) for path, w in flat}
    return Dependencies(groups, (), shapes)


def mlp(dtype=jnp.float32, seed=0):
    """Two dense layers of 8 hidden channels."""
    params = {
        "a": {"bias": values(8, seed=seed), "kernel": values(6, 8, seed=seed + 1)},
        "b": {"kernel": values(8, 4, seed=seed + 2)},
    }
    params = jax.tree.map(lambda w: jnp.asarray(w, dtype), params)
    units = np.arange(8)
    group = _group(
        "a/kernel[1]", 8, [("a/bias", 0, units), ("a/kernel", 1, units), ("b/kernel", 0, units)]
    )

    def fn(params, x):
        hidden = jax.nn.relu(x @ params["a"]["kernel"] + params["a"]["bias"][None, :])
        return hidden @ params["b"]["kernel"]

    return Model(fn, params, jnp.asarray(values(5, 6, seed=9), dtype), _dependencies(params, group))


def deep(seed=0):
    """Three dense layers, of 8 and 6 hidden channels: one leaf is in both groups."""
    params = {
        "a": jnp.asarray(values(4, 8, seed=seed)),
        "b": jnp.asarray(3 * values(8, 6, seed=seed + 1)),
        "c": jnp.asarray(values(6, 3, seed=seed + 2)),
    }
    groups = (
        _group("a[1]", 8, [("a", 1, np.arange(8)), ("b", 0, np.arange(8))]),
        _group("b[1]", 6, [("b", 1, np.arange(6)), ("c", 0, np.arange(6))]),
    )

    def fn(params, x):
        return jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"]) @ params["c"]

    return Model(fn, params, jnp.asarray(values(5, 4, seed=9)), _dependencies(params, *groups))


def attention(seed=0):
    """Two heads of three features along merged axes: groups share positions."""
    params = {n: jnp.asarray(values(4, 6, seed=seed + i)) for i, n in enumerate("qkv")}
    params["o"] = jnp.asarray(values(6, 4, seed=seed + 3))
    heads, features = np.repeat(np.arange(2), 3), np.tile(np.arange(3), 2)
    groups = (
        _group("q[1]/blocks", 2, [(n, 0 if n == "o" else 1, heads) for n in "koqv"]),
        _group("q[1]/strides", 3, [("k", 1, features), ("q", 1, features)]),
        _group("v[1]/strides", 3, [("o", 0, features), ("v", 1, features)]),
    )

    def fn(params, x):
        q, k, v = ((x @ params[n]).reshape(x.shape[0], 2, 3) for n in "qkv")
        weights = jax.nn.softmax(jnp.einsum("qhd,khd->hqk", q, k), -1)
        mixed = jnp.einsum("hqk,khd->qhd", weights, v)
        return mixed.reshape(x.shape[0], 6) @ params["o"]

    return Model(fn, params, jnp.asarray(values(5, 4, seed=9)), _dependencies(params, *groups))


def stack(seed=0):
    """A scan over three layers of 8 hidden channels each."""
    params = {
        "bias": jnp.asarray(values(3, 8, seed=seed)),
        "down": jnp.asarray(values(3, 8, 4, seed=seed + 1)),
        "up": jnp.asarray(values(3, 4, 8, seed=seed + 2)),
    }
    units = np.arange(8)
    group = _group("up[2]", 8, [("bias", 1, units), ("down", 1, units), ("up", 2, units)], (3,))

    def fn(params, x):
        def layer(x, w):
            hidden = jax.nn.relu(x @ w["up"] + w["bias"][None, :])
            return x + hidden @ w["down"], None

        return jax.lax.scan(layer, x, params)[0]

    return Model(fn, params, jnp.asarray(values(5, 4, seed=9)), _dependencies(params, group))


def tower(seed=0):
    """The scan, and two dense layers of 6 channels behind it."""
    below = stack(seed)
    params = {
        "a": jnp.asarray(values(4, 6, seed=seed + 5)),
        "b": jnp.asarray(values(6, 2, seed=seed + 6)),
        "stack": below.params,
    }
    units = np.arange(6)
    layers = below.dependencies.groups[0]
    groups = (
        _group("a[1]", 6, [("a", 1, units), ("b", 0, units)]),
        layers._replace(
            name="stack/up[2]",
            members=tuple(m._replace(path=f"stack/{m.path}") for m in layers.members),
        ),
    )

    def fn(params, x):
        return jnp.tanh(below.fn(params["stack"], x) @ params["a"]) @ params["b"]

    return Model(fn, params, below.x, _dependencies(params, *groups))


def normed(seed=0):
    """Four channels of a convolution, a norm with running statistics, flattened into 8 inputs."""
    params = {
        "conv": jnp.asarray(values(3, 2, 4, seed=seed)),
        "norm": {
            "mean": jnp.asarray(values(4, seed=seed + 1)),
            "scale": jnp.asarray(values(4, seed=seed + 2)),
            "var": jnp.asarray(np.square(values(4, seed=seed + 3)) + np.float32(0.5)),
        },
        "out": jnp.asarray(values(8, 3, seed=seed + 4)),
    }
    units = np.arange(4)
    members = [("conv", 2, units), *((f"norm/{n}", 0, units) for n in ("mean", "scale", "var"))]
    group = _group("conv[2]", 4, [*members, ("out", 0, np.tile(units, 2))])

    def fn(params, x):
        windows = jnp.stack([x[:, i : i + 3] for i in range(2)], axis=1)
        h = jnp.einsum("bpkc,kcn->bpn", windows, params["conv"])
        norm = {name: w[None, None, :] for name, w in params["norm"].items()}
        h = jnp.tanh((h - norm["mean"]) * jax.lax.rsqrt(norm["var"] + 1e-3) * norm["scale"])
        return h.reshape(x.shape[0], 8) @ params["out"]

    return Model(fn, params, jnp.asarray(values(5, 4, 2, seed=9)), _dependencies(params, group))


def places(model: Model, group: Group, layer: tuple, unit: int, counted=lambda path: True):
    """By path which entries belong to a unit, and how often: int arrays; loops alone."""
    found = {}
    for member in group.members:
        if not counted(member.path):
            continue
        shape = model.dependencies.shapes[member.path].shape
        count = found.setdefault(member.path, np.zeros(shape, int))
        for index in np.ndindex(*shape):
            own = index[: len(layer)] == layer
            if own and member.units[index[member.axis]] == unit:
                count[index] += 1
    return found


def by_paths(params):
    """The leaves by path as float64."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")  # noqa: E731
    return {name(path): np.asarray(w, np.float64) for path, w in flat}


def units(group: Group):
    """Every layer and unit of a group."""
    return [(index[:-1], index[-1]) for index in np.ndindex(*group.shape)]


def norm_of(model: Model, leaves: dict, group: Group, layer: tuple, unit: int, counted=None):
    """The 2-norm of a unit in float64."""
    where = places(model, group, layer, unit, counted or (lambda path: True))
    return np.sqrt(sum(np.sum(n * leaves[path] ** 2) for path, n in where.items()))


MODELS = {"mlp": mlp, "deep": deep, "attention": attention, "stack": stack, "normed": normed}
