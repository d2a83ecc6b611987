"""Residual blocks are found wherever they are written, and nothing else is taken for one."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

import jaxcompress as jc
from jaxcompress.tracing._jaxprs import trace
from jaxcompress.tracing._residual_blocks import blocks_of, layers_of
from tests.conftest import mesh_of
from tests.tracing.models import normal

W = {"w": normal(8, 8), "v": normal(8, 8, seed=1)}
X = normal(4, 8)


def found(fn, params, *args):
    return blocks_of(trace(fn, (params, *args), {}, parts=True)).listed


def names(fn, params, *args):
    return [block.name for block in found(fn, params, *args)]


def dense(p, x):
    return jnp.tanh(x @ p["w"])


# Every way to write one block of W["w"].
WRITTEN = {
    "plain": lambda p, x: x + dense(p, x),
    "other side": lambda p, x: dense(p, x) + x,
    "scaled branch": lambda p, x: x + 0.5 * dense(p, x),
    "layer scale": lambda p, x: x + p["w"][:1] * dense(p, x),
    "gated": lambda p, x: x + jax.nn.sigmoid(x @ p["w"]) * (dense(p, x) - x),
    "jit around": lambda p, x: jax.jit(lambda p, x: x + dense(p, x))(p, x),
    "jit of f": lambda p, x: x + jax.jit(dense)(p, x),
    "jit of the sum": lambda p, x: jax.jit(lambda a, b: a + b)(x, dense(p, x)),
    "remat": lambda p, x: jax.checkpoint(lambda p, x: x + dense(p, x))(p, x),
    "cast": lambda p, x: (
        x.astype(jnp.bfloat16)
        + dense(jax.tree.map(lambda w: w.astype(jnp.bfloat16), p), x.astype(jnp.bfloat16))
    ),
    "wide sum": lambda p, x: (
        x.astype(jnp.bfloat16).astype(jnp.float32)
        + dense(p, x.astype(jnp.bfloat16).astype(jnp.float32))
    ),
    "named": lambda p, x: jc.name(x, "stream") + dense(p, x),
    "barrier": lambda p, x: jax.lax.optimization_barrier(x) + dense(p, x),
    "cond of f": lambda p, x: x + jax.lax.cond(x[0, 0] > 0, dense, lambda p, x: 0 * x, p, x),
    "in a cond": lambda p, x: jax.lax.cond(
        x[0, 0] > 0, lambda p, x: x + dense(p, x), lambda p, x: x, p, x
    ),
    "loop in f": lambda p, x: x + jax.lax.fori_loop(0, 2, lambda i, h: dense(p, h), x),
    "in a while": lambda p, x: jax.lax.while_loop(
        lambda x: x.sum() < 0, lambda x: x + dense(p, x), x
    ),
    "vmapped": lambda p, x: jax.vmap(lambda x: x + jnp.tanh(x @ p["w"]))(x),
    "bias after": lambda p, x: x + dense(p, x) @ p["v"] + p["w"][:1],
    "bias before": lambda p, x: (x + p["w"][:1]) + dense(p, x),
    "norm after": lambda p, x: jax.nn.standardize(x + dense(p, x)),
}


@pytest.mark.parametrize("way", WRITTEN)
def test_a_block_is_found_however_it_is_written(way):
    blocks = found(WRITTEN[way], W, X)
    assert len(blocks) == 1
    assert blocks[0].shape in ((4, 8), (8,))
    assert blocks[0].layers == 0


@jax.custom_vjp
def straight(w, x):
    return x + jnp.tanh(x @ w)


straight.defvjp(lambda w, x: (straight(w, x), (w, x)), lambda r, g: (r[0], g))


def test_a_block_is_found_in_a_custom_derivative_and_in_a_sharded_map():
    assert names(lambda p, x: straight(p["w"], x), W, X) == ["w"]
    mesh = mesh_of("auto")

    def apply(p, x):
        def part(w, v, x):
            return x + jax.lax.psum(jnp.tanh(x @ w) @ v, "d")

        specs = (jax.P(None, "d"), jax.P("d"), jax.P())
        return jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=jax.P())(p["w"], p["v"], x)

    (block,) = found(apply, W, X)
    assert block.leaves == ("v", "w")


# What looks like a block and is none.
NONE = {
    "no parameter": lambda p, x: (x + jnp.tanh(x)) @ p["w"],
    "gelu": lambda p, x: jax.nn.gelu(x @ p["w"]),
    "bias": lambda p, x: x @ p["w"] + p["v"][:1],
    "positions": lambda p, x: x + p["w"][:4],
    "mask": lambda p, x: x @ p["w"] + jnp.where(x > 0, 0.0, -1e9),
    "two projections": lambda p, x: x @ p["w"] + x @ p["v"],
    "downsampled": lambda p, x: x @ p["w"] + jnp.tanh(x @ p["v"]) @ p["w"],
    "scaled skip": lambda p, x: 0.5 * x + dense(p, x),
    "difference": lambda p, x: x - dense(p, x),
    "lerp of two": lambda p, x: (h := dense(p, x)) + jax.nn.sigmoid(x @ p["v"]) * (x - h),
    "concatenated": lambda p, x: jnp.concatenate([x, dense(p, x)], 1),
    "integers": lambda p, x: x.astype(jnp.int32) + dense(p, x).astype(jnp.int32),
    "another x": lambda p, x: x[::-1] + dense(p, x),
    "ensemble": lambda p, x: dense(p, x) + jnp.tanh(x @ p["v"]),
    "scalars": lambda p, x: (s := (x**2).mean()) + s * p["w"][0, 0],
    "recurrent weights": lambda p, x: jax.lax.scan(
        lambda h, x: (jnp.tanh(h @ p["w"]) + x, None), jnp.zeros(8), x
    )[0],
    "running mean": lambda p, x: 0.9 * p["v"][0] + 0.1 * (x @ p["w"]).mean(0),
}


@pytest.mark.parametrize("way", NONE)
def test_what_is_no_block(way):
    assert names(NONE[way], W, X) == []


def test_recurrent_cells_and_networks_without_sums_have_no_blocks():
    cell = eqx.nn.GRUCell(8, 8, key=jax.random.key(0))
    params, static = eqx.partition(cell, eqx.is_inexact_array)
    assert names(lambda p, x: eqx.combine(p, static)(x, 2 * x), params, X[0]) == []
    for cell in (nn.OptimizedLSTMCell(8), nn.GRUCell(8)):
        net = nn.RNN(cell)
        x = normal(2, 3, 8)
        assert names(net.apply, jax.eval_shape(net.init, jax.random.key(0), x), x) == []


def test_blocks_side_by_side_are_one_each():
    def mlp(p, x):
        return jax.nn.relu(x @ p["up"]) @ p["down"]

    params = {
        "a": {"up": normal(8, 8), "down": normal(8, 8)},
        "b": {"up": normal(8, 8), "down": normal(8, 8)},
        "norm": jnp.ones(8),
    }
    for apply in (
        lambda p, x: (x + mlp(p["a"], h := x * p["norm"][None])) + mlp(p["b"], h),
        lambda p, x: mlp(p["a"], h := x * p["norm"][None]) + mlp(p["b"], h) + x,
        lambda p, x: x + (mlp(p["a"], h := x * p["norm"][None]) + mlp(p["b"], h)),
    ):
        blocks = found(apply, params, X)
        assert [b.name for b in blocks] == ["a", "b"]
        assert [b.leaves for b in blocks] == [("a/down", "a/up"), ("b/down", "b/up")]


def test_terms_that_share_a_product_are_one_block():
    def apply(p, x):
        h = jnp.tanh(x @ p["in"])
        return x + (h @ p["out"] + (h @ p["low"]) @ p["high"])

    params = {"in": normal(8, 8), "out": normal(8, 8), "low": normal(8, 2), "high": normal(2, 8)}
    (block,) = found(apply, params, X)
    assert block.leaves == ("high", "in", "low", "out")


def test_a_block_that_contains_blocks_names_them():
    def apply(p, x):
        h = x @ p["down"]
        for w in p["inner"]:
            h = h + jnp.tanh(h @ w)
        return x + h @ p["up"]

    params = {"down": normal(8, 4), "inner": [normal(4, 4), normal(4, 4)], "up": normal(4, 8)}
    blocks = found(apply, params, X)
    assert [b.name for b in blocks] == ["inner/0", "inner/1", "down"]
    assert blocks[2].contains == ("inner/0", "inner/1")
    assert not blocks[0].contains
    assert blocks[2].leaves == ("down", "inner/0", "inner/1", "up")


def test_names_are_unique_and_shared_leaves_do_not_go():
    def apply(p, x):
        for _ in range(2):
            x = x + jnp.tanh(x @ p["w"])
        return x + x @ p["v"]

    blocks = found(apply, W, X)
    assert [b.name for b in blocks] == ["w", "w:1", "v"]
    assert [b.leaves for b in blocks] == [(), (), ("v",)]


def transformer(depth=3):
    class Layer(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.RMSNorm(8, rngs=rngs)
            self.attn = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
            self.mlp = nnx.Linear(8, 8, rngs=rngs)

        def __call__(self, x):
            x = x + self.attn(self.norm(x))
            return x + nnx.gelu(self.mlp(x))

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.stem = nnx.Linear(8, 8, rngs=rngs)
            self.layers = nnx.List([Layer(rngs) for _ in range(depth)])

        def __call__(self, x):
            x = self.stem(x)
            for layer in self.layers:
                x = layer(x)
            return x

    return jc.functional(Net(nnx.Rngs(0)))


def test_attention_and_network_of_a_layer_are_two_blocks_or_one():
    apply, params = transformer()
    blocks = blocks_of(trace(apply, (params, normal(2, 4, 8)), {}, parts=True))
    names = [block.name for block in blocks.listed]
    # The norm goes with the attention, so that their paths have the layer in common.
    assert names == [n for i in range(3) for n in (f"layers/{i}", f"layers/{i}/mlp")]
    layers = layers_of(blocks)
    assert [layer.name for layer in layers] == [f"layers/{i}" for i in range(3)]
    assert layers[1].parts == ("layers/1", "layers/1/mlp")
    own = [path for path, _ in jc.tree.leaves_with_paths(params) if path.startswith("layers/1/")]
    assert sorted(layers[1].leaves) == sorted(own)


def test_numbered_blocks_of_a_stage_stay_apart():
    params = {f"stage{s}": [{"w": normal(8, 8)} for _ in range(2)] for s in range(2)}

    def apply(p, x):
        for stage in p.values():
            for layer in stage:
                x = jax.nn.relu(x + jnp.tanh(x @ layer["w"]))
        return x

    blocks = blocks_of(trace(apply, (params, X), {}, parts=True))
    assert len(layers_of(blocks)) == 4


def test_abstract_shapes_are_enough():
    apply, params = transformer()
    shapes = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype), params)
    assert len(found(apply, shapes, jax.ShapeDtypeStruct((2, 4, 8), jnp.float32))) == 6


STACK = {"w": normal(3, 8, 8), "b": normal(3, 8), "v": normal(8, 8)}


def layer(x, p):
    return x + jnp.tanh(x @ p["w"] + p["b"][None])


def over(step, start=lambda x: x, cut=lambda p: {"w": p["w"], "b": p["b"]}, **options):
    return lambda p, x: jax.lax.scan(step, start(x), cut(p), **options)[0]


SCANS = {
    "plain": over(lambda x, p: (layer(x, p), None)),
    "remat": over(jax.checkpoint(lambda x, p: (layer(x, p), None))),
    "reverse": over(lambda x, p: (layer(x, p), None), reverse=True, unroll=2),
    "post-norm": over(lambda x, p: (jax.nn.standardize(layer(x, p)), None)),
    "activation": over(lambda x, p: (jax.nn.relu(layer(x, p)), None)),
    "unused outputs": over(lambda x, p: (layer(x, p), x.sum())),
    "in a jit": lambda p, x: jax.jit(over(lambda x, p: (layer(x, p), None)))(p, x),
    "cast": over(
        lambda x, p: (layer(x, p), None),
        lambda x: x.astype(jnp.bfloat16),
        lambda p: {k: p[k].astype(jnp.bfloat16) for k in ("w", "b")},
    ),
    "losses": lambda p, x: jax.lax.scan(
        lambda c, p: ((layer(c[0], p), c[1] + jnp.sum(c[0] @ p["w"])), None),
        (x, jnp.zeros(())),
        {"w": p["w"], "b": p["b"]},
    )[0],
    "unchanged": lambda p, x: jax.lax.scan(
        lambda c, p: ((layer(c[0], p) + 0 * c[1], c[1]), None),
        (x, X),
        {"w": p["w"], "b": p["b"]},
    )[0],
    "numbered": lambda p, x: jax.lax.scan(
        lambda x, p: (x + p[1] * (layer(x, p[0]) - x), None),
        x,
        ({"w": p["w"], "b": p["b"]}, jnp.arange(3.0)),
    )[0],
    "two loops deep": lambda p, x: jax.lax.scan(
        lambda x, p: (
            jax.lax.scan(lambda x, _: (layer(x, p), None), x, None, length=2)[0],
            None,
        ),
        x,
        {"w": p["w"], "b": p["b"]},
    )[0],
}


@pytest.mark.parametrize("way", SCANS)
def test_a_scan_over_layers_is_a_block_of_layers(way):
    (block,) = found(SCANS[way], STACK, X)
    assert block.layers == 3
    assert block.leaves == ("b", "w")
    assert block.shape == (4, 8)


NOT_LAYERS = {
    "outputs": lambda p, x: jax.lax.scan(lambda x, w: (y := x + x @ w, y), x, p["w"])[1],
    "counted": lambda p, x: jax.lax.scan(
        lambda c, w: ((c[0] + c[0] @ w * c[1], c[1] + 1), None), (x, 1.0), p["w"]
    )[0],
    "shifted": lambda p, x: jax.lax.scan(
        lambda c, w: ((c[0] + c[1] @ w, c[0]), None), (x, x), p["w"]
    )[0],
    "shared weights": lambda p, x: jax.lax.scan(
        lambda x, _: (x + x @ p["v"], None), x, None, length=3
    )[0],
    "indexed": lambda p, x: jax.lax.fori_loop(0, 3, lambda i, x: x + x @ p["w"][i], x),
    "over time": lambda p, x: jax.lax.scan(
        lambda h, x: (h + jnp.tanh(h @ p["v"] + x), None), jnp.ones(8), x
    )[0],
    "halved": lambda p, x: jax.lax.scan(
        lambda x, w: (0.5 * (h := x @ p["v"]) + jnp.tanh(h @ w), None), x, p["w"]
    )[0],
}


@pytest.mark.parametrize("way", NOT_LAYERS)
def test_a_scan_whose_trips_do_not_pass_on_has_no_layers(way):
    assert all(block.layers == 0 for block in found(NOT_LAYERS[way], STACK, X))


def test_a_leaf_that_is_changed_before_its_rows_are_taken_does_not_get_shorter():
    def apply(p, x):
        stacked = {"w": p["w"].transpose(0, 2, 1), "b": p["b"]}
        return jax.lax.scan(lambda x, p: (layer(x, p), None), x, stacked)[0] + p["b"].sum()

    (block,) = found(apply, STACK, X)
    assert block.layers == 3
    assert block.leaves == ()
