"""Held-out models: ordinary user code of every framework, small and deterministic."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

import jaxcompress as jc


class Model(NamedTuple):
    """A function of params and arrays, and the path of one leaf that its products use."""

    apply: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]
    weight: str


def normal(*shape, seed=0, scale=None):
    rng = np.random.default_rng([seed, *shape])
    scale = shape[-2] ** -0.5 if scale is None and len(shape) > 1 else scale or 1.0
    return jnp.asarray(scale * rng.normal(size=shape), jnp.float32)


def nnx_cnn():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Conv(8, 8, (3, 3), strides=2, rngs=rngs)
            self.depthwise = nnx.Conv(8, 16, (3, 3), feature_group_count=8, rngs=rngs)
            self.dilated = nnx.Conv(16, 8, (3, 3), kernel_dilation=2, rngs=rngs)
            self.head = nnx.Linear(8, 10, rngs=rngs)

        def __call__(self, x):
            x = nnx.relu(self.first(x))
            x = nnx.avg_pool(nnx.relu(self.depthwise(x)), (2, 2))
            return self.head(nnx.relu(self.dilated(x)).mean((1, 2)))

    apply, params = jc.functional(Net(nnx.Rngs(0)))
    return Model(apply, params, (normal(4, 8, 8, 8),), "first/kernel")


def linen_cnn():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(8, (3, 3))(x)
            x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
            x = nn.ConvTranspose(8, (2, 2), strides=(2, 2))(x)
            return nn.Dense(10)(x.mean((1, 2)))

    x = normal(4, 6, 6, 3)
    return Model(Net().apply, Net().init(jax.random.key(0), x), (x,), "params/Conv_0/kernel")


def linen_transformer():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(2, name="attn")(y, y)
            y = nn.Dense(32)(nn.LayerNorm()(x))
            return x + nn.Dense(16)(nn.gelu(y)), None

    class Net(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            embed = nn.Embed(24, 16)
            blocks = nn.scan(
                nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
            )
            x, _ = blocks(name="blocks")(embed(tokens), None)
            return embed.attend(nn.LayerNorm()(x))

    tokens = jnp.arange(20).reshape(4, 5) % 24
    params = Net().init(jax.random.key(0), tokens)
    return Model(Net().apply, params, (tokens,), "params/blocks/Dense_0/kernel")


def nnx_transformer():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.attn = nnx.MultiHeadAttention(2, 16, decode=False, rngs=rngs)
            self.norm = nnx.LayerNorm(16, rngs=rngs)
            self.mlp = nnx.Linear(16, 16, rngs=rngs)

        def __call__(self, x):
            x = x + self.attn(self.norm(x))
            return x + nnx.gelu(self.mlp(x))

    graph, _, rest = nnx.split(Block(nnx.Rngs(0)), nnx.Param, ...)
    states = [nnx.state(Block(nnx.Rngs(i)), nnx.Param) for i in range(3)]
    params = {"blocks": jax.tree.map(lambda *x: jnp.stack(x), *states), "head": normal(16, 10)}

    def apply(params, x):
        @jax.checkpoint
        def step(x, state):
            return nnx.merge(graph, state, rest, copy=True)(x), None

        x, _ = jax.lax.scan(step, x, params["blocks"])
        return x.mean(1) @ params["head"]

    return Model(apply, params, (normal(4, 5, 16),), "blocks/mlp/kernel")


def linen_lstm():
    net = nn.RNN(nn.OptimizedLSTMCell(16))
    x = normal(4, 6, 8)
    params = net.init(jax.random.key(0), x)
    weight = next(p for p, w in jc.tree.leaves_with_paths(params) if w.ndim == 2)
    return Model(net.apply, params, (x,), weight)


def equinox_mlp():
    net = eqx.nn.MLP(8, 10, 16, 2, key=jax.random.key(0))
    params, static = eqx.partition(net, eqx.is_inexact_array)

    def apply(params, x):
        return jax.vmap(eqx.combine(params, static))(x)

    return Model(apply, params, (normal(4, 8),), "layers/0/weight")


def equinox_conv():
    keys = jax.random.split(jax.random.key(0), 3)
    layers = [
        eqx.nn.Conv2d(2, 8, 3, padding=1, key=keys[0]),
        eqx.nn.Lambda(jax.nn.relu),
        eqx.nn.Conv2d(8, 8, 3, stride=2, groups=2, key=keys[1]),
        eqx.nn.Lambda(lambda x: x.mean((1, 2))),
        eqx.nn.Linear(8, 10, key=keys[2]),
    ]
    params, static = eqx.partition(eqx.nn.Sequential(layers), eqx.is_inexact_array)

    def apply(params, x):
        return jax.vmap(eqx.combine(params, static))(x)

    return Model(apply, params, (normal(4, 2, 8, 8),), "layers/0/weight")


def haiku_net():
    def forward(x):
        x = jax.nn.relu(hk.Conv2D(8, 3)(x))
        return hk.nets.MLP([16, 10])(hk.Flatten()(x))

    net = hk.without_apply_rng(hk.transform(forward))
    x = normal(4, 4, 4, 8)
    return Model(net.apply, net.init(jax.random.key(0), x), (x,), "conv2_d/w")


def shard_map_mlp():
    mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=({"up": jax.P(None, "model"), "down": jax.P("model", None)}, jax.P()),
        out_specs=jax.P(),
    )
    def apply(params, x):
        hidden = jax.nn.relu(x @ params["up"])
        return jax.lax.psum(hidden @ params["down"], "model")

    params = {"up": normal(8, 32), "down": normal(32, 10)}
    return Model(apply, params, (normal(4, 8),), "up")


def tied_embeddings():
    def apply(params, tokens):
        x = params["table"][tokens].mean(1)
        x = jax.nn.gelu(x @ params["mix"])
        return x @ params["table"].T

    params = {"table": normal(24, 16, scale=1.0), "mix": normal(16, 16)}
    return Model(apply, params, (jnp.arange(20).reshape(4, 5),), "table")


@jax.custom_jvp
def softsign(x):
    return x / (1 + jnp.abs(x))


softsign.defjvp(lambda p, t: (softsign(*p), t[0] / jnp.square(1 + jnp.abs(p[0]))))


@jax.custom_vjp
def scaled_dense(w, x):
    return x @ w


# A gradient that is not the true one, to see whether it survives.
scaled_dense.defvjp(lambda w, x: (x @ w, (w, x)), lambda r, g: (2 * r[1].T @ g, g @ r[0].T))


def control_flow():
    def apply(params, x):
        w, v = params["w"], params["v"]
        layer = jax.jit(lambda w, x: softsign(x @ w))
        with jax.named_scope("twice"):
            x = layer(w, x)
            x = layer(v.T, x)
        x = jax.lax.cond(x.sum() > 1e9, lambda x: x, lambda x: x @ w, x)
        x = jax.lax.switch(1, [lambda x: x, lambda x: x + x @ v, lambda x: 2 * x], x)
        x = jax.lax.fori_loop(0, 2, lambda i, x: jnp.tanh(x @ w), x)
        return scaled_dense(v, x)

    params = {"w": normal(16, 16), "v": normal(16, 16, seed=1)}
    return Model(apply, params, (normal(4, 16),), "w")


def einsum_attention():
    def apply(params, x):
        q = jnp.einsum("btd,dhk->bthk", x, params["q"])
        k = jnp.einsum("btd,dhk->bthk", x, params["k"].reshape(16, 2, 8))
        v = jnp.einsum("btd,hkd->bthk", x, params["v"].transpose(1, 2, 0))
        weights = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k) / 8**0.5)
        y = jnp.einsum("bhts,bshk,hkd->btd", weights, v, params["o"])
        half = params["half"].astype(jnp.bfloat16)
        return y + (x.astype(jnp.bfloat16) @ half).astype(jnp.float32)

    params = {
        "q": normal(16, 2, 8, scale=0.3),
        "k": normal(16, 16),
        "v": normal(16, 2, 8, scale=0.3, seed=1),
        "o": normal(2, 8, 16, scale=0.3),
        "half": 0.01 * normal(16, 16, seed=2),
    }
    return Model(apply, params, (normal(4, 6, 16),), "k")


def unrolled_stack():
    def apply(params, x):
        w = params["w"]
        for i in range(3):
            x = jnp.tanh(x @ w[i])
        return jax.lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ w[i]), x)

    return Model(apply, {"w": normal(3, 16, 16)}, (normal(4, 16),), "w")


def experts():
    def apply(params, x):
        return jax.lax.ragged_dot(x, params["w"], jnp.array([2, 1, 3], jnp.int32)) @ params["out"]

    params = {"w": normal(3, 8, 16), "out": normal(16, 10)}
    return Model(apply, params, (normal(6, 8),), "w")


def ensemble():
    def apply(params, x):
        return jax.vmap(lambda p: jax.nn.relu(x @ p["w"]) @ p["v"])(params).mean(0)

    params = {"w": normal(3, 8, 16), "v": normal(3, 16, 10)}
    return Model(apply, params, (normal(4, 8),), "w")


MODELS = {
    make.__name__: make
    for make in (
        nnx_cnn,
        linen_cnn,
        linen_transformer,
        nnx_transformer,
        linen_lstm,
        equinox_mlp,
        equinox_conv,
        haiku_net,
        shard_map_mlp,
        tied_embeddings,
        control_flow,
        einsum_attention,
        unrolled_stack,
        experts,
        ensemble,
    )
}
