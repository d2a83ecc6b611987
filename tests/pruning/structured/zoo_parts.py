"""What the models are made of: layers as a user writes them, and their params."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxcompress as jc
from tests.tracing.models import normal


class Model(NamedTuple):
    """A function of params and arrays, and by hand what can be removed from it.

    A group is a line like `~3x8: a/kernel[1] a/norm/*[0] b/kernel[0]`: of the layers of a scan (3,
    none for others) and the units (8) of each, and the axes of leaves that they are made of, with
    `*` for any path. `~`: zeros don't give what removal gives. `batch`: the axis of examples of
    all args.
    """

    apply: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]
    groups: tuple[str, ...]
    batch: int = 0


def shaken(params):
    """No leaf of zeros or ones, which would hide what is forgotten; variances stay positive."""

    leaves, tree = jax.tree.flatten(params)
    found = []
    for i, (path, _) in enumerate(jc.tree.leaves_with_paths(params)):
        leaf = leaves[i]
        noise = leaf + normal(*leaf.shape, seed=i, scale=0.3)
        positive = path.split("/")[-1] in ("var", "scale", "average")
        found.append(jnp.asarray(jnp.abs(noise) + 0.1 if positive else noise, leaf.dtype))
    return jax.tree.unflatten(tree, found)


def wide(v, x):
    """A vector of the last axis with the rank of `x`."""
    return v.reshape((1,) * (x.ndim - 1) + v.shape)


def dense_params(fan_in, fan_out, seed=0):
    return {
        "kernel": normal(fan_in, fan_out, seed=seed),
        "bias": normal(fan_out, seed=seed, scale=0.3),
    }


def dense(p, x):
    y = x @ p["kernel"]
    return y + wide(p["bias"], y)


def conv_params(fan_in, fan_out, size=3, groups=1, seed=0):
    scale = (size * size * fan_in / groups) ** -0.5
    return {
        "kernel": normal(size, size, fan_in // groups, fan_out, seed=seed, scale=scale),
        "bias": normal(fan_out, seed=seed, scale=0.3),
    }


def conv(p, x, strides=1, groups=1):
    y = jax.lax.conv_general_dilated(
        x,
        p["kernel"],
        (strides, strides),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )
    return y + wide(p["bias"], y)


def norm_params(size, statistics=False, seed=0):
    p = {
        "scale": 1 + normal(size, seed=seed, scale=0.2),
        "bias": normal(size, seed=seed + 1, scale=0.3),
    }
    if statistics:
        p["mean"] = normal(size, seed=seed + 2, scale=0.3)
        p["var"] = 1 + normal(size, seed=seed + 3, scale=0.1) ** 2
    return p


def batch_norm(p, x):
    y = (x - wide(p["mean"], x)) * wide(jax.lax.rsqrt(p["var"] + 1e-5) * p["scale"], x)
    return y + wide(p["bias"], x)


def layer_norm(p, x):
    """By the mean of squares, as Flax: a zero adds nothing to either mean."""
    mean = x.mean(-1, keepdims=True)
    var = jnp.square(x).mean(-1, keepdims=True) - jnp.square(mean)
    return (x - mean) * jax.lax.rsqrt(var + 1e-5) * wide(p["scale"], x) + wide(p["bias"], x)


def centred_layer_norm(p, x):
    """By the squares around the mean, as PyTorch: a zero is not at the mean."""
    centred = x - x.mean(-1, keepdims=True)
    var = jnp.square(centred).mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(var + 1e-5) * wide(p["scale"], x) + wide(p["bias"], x)


def rms_norm(scale, x):
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5) * wide(scale, x)


def max_pool(x):
    return jax.lax.reduce_window(x, -np.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
