"""Functions without residual blocks are the functions written without them."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jaxcompress as jc
from jaxcompress.pruning.structured._blocks import (
    Dropped,
    drop_blocks,
    gate_blocks,
    residual_blocks,
)
from tests.conftest import counting_jit, mesh_of
from tests.tracing.models import normal


@pytest.fixture(autouse=True)
def frameworks_promote():
    """Flax and Equinox do not pass strict promotion themselves."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def without(*gone):
    """Whether the block of a layer is written."""
    return lambda name: name not in gone


ALL = without()

# Hand-written models: `has(name)` says if a block is there.


def norm(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * scale


def rotary(x):
    half = x.shape[-1] // 2
    angle = jnp.arange(x.shape[1])[:, None] / 10.0 ** jnp.arange(half)
    cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


def attention(p, x):
    q = rotary(jnp.einsum("btd,dhk->bthk", x, p["q"]))
    k = rotary(jnp.einsum("btd,dhk->bthk", x, p["k"])).repeat(2, 2)
    v = jnp.einsum("btd,dhk->bthk", x, p["v"]).repeat(2, 2)
    logits = jnp.einsum("bthk,bshk->bhts", q, k) / 2
    mask = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
    weights = jax.nn.softmax(jnp.where(mask, logits, -1e9))
    return jnp.einsum("bhts,bshk,hkd->btd", weights, v, p["o"])


def glu(p, x):
    return (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"]


def llama_layer(seed):
    n = functools.partial(normal, seed=seed)
    attn = {"q": n(8, 4, 4), "k": n(8, 2, 4), "v": n(8, 2, 4), "o": n(4, 4, 8, scale=0.3)}
    mlp = {"gate": n(8, 12), "up": n(8, 12, scale=0.4), "down": n(12, 8)}
    return {"attn": attn, "mlp": mlp, "norm1": 1 + n(8, scale=0.1), "norm2": 1 + n(8, scale=0.2)}


def llama(has=ALL, layers=3):
    table, stack = normal(16, 8, scale=1.0), [llama_layer(i) for i in range(layers)]

    def apply(params, tokens):
        x = params["table"][tokens]
        for i, p in enumerate(params["layers"]):
            if has(f"attn{i}"):
                x = x + attention(p["attn"], norm(x, p["norm1"]))
            if has(f"mlp{i}"):
                x = x + glu(p["mlp"], norm(x, p["norm2"]))
        return x @ params["table"].T

    return apply, {"table": table, "layers": stack}, jnp.arange(10).reshape(2, 5)


def gpt_j(has=ALL):
    params = [{**llama_layer(i), "bias": normal(8, seed=i)} for i in range(2)]

    def apply(params, x):
        for i, p in enumerate(params):
            h = norm(x, p["norm1"])
            terms = [attention(p["attn"], h)] if has(f"attn{i}") else []
            terms += [glu(p["mlp"], h) + p["bias"]] if has(f"mlp{i}") else []
            x = functools.reduce(jnp.add, terms) + x if terms else x
        return x

    return apply, params, normal(2, 5, 8)


def bert(has=ALL):
    params = [llama_layer(i) for i in range(2)]

    def apply(params, x):
        for i, p in enumerate(params):
            x = norm(x + attention(p["attn"], x) if has(f"attn{i}") else x, p["norm1"])
            x = norm(x + glu(p["mlp"], x) if has(f"mlp{i}") else x, p["norm2"])
        return x

    return apply, params, normal(2, 5, 8)


def conv(x, w, stride=1):
    dims = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, w, (stride, stride), "SAME", dimension_numbers=dims)


def resnet(has=ALL):
    n = normal
    params = {
        "stem": n(3, 3, 3, 8, scale=0.3),
        "a": [n(3, 3, 8, 8, scale=0.1, seed=i) for i in range(2)],
        "down": [n(3, 3, 8, 16, scale=0.1), n(3, 3, 16, 16, scale=0.1), n(1, 1, 8, 16)],
        "b": [n(3, 3, 16, 16, scale=0.1, seed=i) for i in range(2)],
        "head": n(16, 10),
    }

    def apply(p, x):
        x = jax.nn.relu(conv(x, p["stem"]))
        if has("a"):
            x = jax.nn.relu(x + conv(jax.nn.relu(conv(x, p["a"][0])), p["a"][1]))
        h = conv(jax.nn.relu(conv(x, p["down"][0], 2)), p["down"][1])
        x = jax.nn.relu(h + conv(x, p["down"][2], 2))
        if has("b"):
            x = jax.nn.relu(x + conv(jax.nn.relu(conv(x, p["b"][0])), p["b"][1]))
        return x.mean((1, 2)) @ p["head"]

    return apply, params, normal(2, 8, 8, 3)


# From the model and what is not written in it to the blocks and the leaves that go.
CASES = {
    "llama attention": (llama, ["attn1"], ["layers/1/attn"], "layers/1/attn layers/1/norm1"),
    "llama network": (llama, ["mlp2"], ["layers/2/mlp"], "layers/2/mlp layers/2/norm2"),
    "llama layer": (llama, ["attn0", "mlp0"], ["layers/0/attn", "layers/0/mlp"], "layers/0"),
    "side by side": (gpt_j, ["attn1"], ["1/attn"], "1/attn"),
    "side by side, other": (gpt_j, ["mlp0"], ["0/mlp"], "0/mlp 0/bias"),
    "both sides": (gpt_j, ["attn1", "mlp1"], ["1/attn", "1/mlp"], "1/attn 1/mlp 1/bias 1/norm1"),
    "post-norm": (bert, ["mlp1", "attn0"], ["1/mlp", "0/attn"], "1/mlp 0/attn"),
    "resnet": (resnet, ["a"], ["a"], "a/"),
    "resnet, both": (resnet, ["a", "b"], ["a", "b"], "a/ b/"),
}


def block_at(blocks, start):
    """The block with a leaf whose path begins so; names depend on the leaves around."""
    (block,) = [b for b in blocks if any(path.startswith(start) for path in b.leaves)]
    return block


def equations(fn, *args):
    return str(jax.make_jaxpr(fn)(*args)).count(" = ")


@pytest.mark.parametrize("case", CASES)
def test_a_function_without_blocks_is_the_one_written_without_them(case):
    model, gone, starts, leaves = CASES[case]
    fn, params, x = model()
    blocks = residual_blocks(fn, params, x)
    dropped = [block_at(blocks, start) for start in starts]
    small, small_fn = drop_blocks(fn, params, dropped, x)
    oracle = model(without(*gone))[0]
    if case.startswith("llama"):
        # Nothing of the blocks is left, nor what was not needed before.
        assert equations(small_fn, small, x) <= equations(oracle, params, x)
    expected = jax.jit(oracle)(params, x)
    np.testing.assert_array_equal(jax.jit(small_fn)(small, x), expected)
    assert np.abs(expected - jax.jit(fn)(params, x)).max() > 1e-3
    kept = {path for path, _ in jc.tree.leaves_with_paths(small)}
    everything = {path for path, _ in jc.tree.leaves_with_paths(params)}
    gone = {path for path in everything if path.startswith(tuple(leaves.split()))}
    assert gone
    assert everything - kept == gone
    gates = {block.name: 0 for block in dropped}
    gated = jax.jit(gate_blocks(fn, dropped))
    np.testing.assert_allclose(gated(params, gates, x), expected, rtol=1e-5, atol=1e-4)


def test_nothing_dropped_is_the_function_itself():
    fn, params, x = llama()
    small, small_fn = drop_blocks(fn, params, [], x)
    np.testing.assert_array_equal(jax.jit(small_fn)(small, x), jax.jit(fn)(params, x))
    assert jax.tree.structure(small) == jax.tree.structure(params)


def test_every_set_of_blocks_side_by_side_can_go():
    fn, params, x = gpt_j()
    blocks = residual_blocks(fn, params, x)
    assert len(blocks) == 4
    ids = ["attn0", "mlp0", "attn1", "mlp1"]
    for chosen in ([0, 1], [1, 2], [0, 1, 3], [0, 1, 2, 3]):
        small, small_fn = drop_blocks(fn, params, [blocks[i] for i in chosen], x)
        expected = jax.jit(gpt_j(without(*(ids[i] for i in chosen)))[0])(params, x)
        np.testing.assert_allclose(jax.jit(small_fn)(small, x), expected, rtol=1e-5, atol=1e-5)


def test_whole_layers_go_with_all_their_leaves():
    fn, params, x = llama()
    layers = residual_blocks(fn, params, x, whole_layers=True)
    assert [layer.name for layer in layers] == ["layers/0", "layers/1", "layers/2"]
    small, small_fn = drop_blocks(fn, params, layers[1:2], x)
    assert jax.tree.leaves(small["layers"][1]) == []
    expected = jax.jit(fn)({**params, "layers": params["layers"][::2]}, x)
    np.testing.assert_allclose(jax.jit(small_fn)(small, x), expected, rtol=1e-6, atol=1e-6)


# Frameworks.


def nnx_vit(depth=2):
    class Layer(nnx.Module):
        def __init__(self, rngs):
            self.norm1 = nnx.LayerNorm(8, rngs=rngs)
            self.attn = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
            self.norm2 = nnx.LayerNorm(8, rngs=rngs)
            self.mlp = nnx.Sequential(
                nnx.Linear(8, 16, rngs=rngs), nnx.gelu, nnx.Linear(16, 8, rngs=rngs)
            )

        def __call__(self, x, has=(True, True)):
            x = x + self.attn(self.norm1(x)) if has[0] else x
            return x + self.mlp(self.norm2(x)) if has[1] else x

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.patch = nnx.Conv(3, 8, (2, 2), strides=2, rngs=rngs)
            self.place = nnx.Param(normal(4, 8))
            self.layers = nnx.List([Layer(rngs) for _ in range(depth)])

        def __call__(self, x, gone=()):
            x = self.patch(x)
            x = x.reshape(x.shape[0], -1, 8) + self.place[...]
            for i, layer in enumerate(self.layers):
                x = layer(x, (f"attn{i}" not in gone, f"mlp{i}" not in gone))
            return x.mean(1)

    return jc.functional(Net(nnx.Rngs(0))), normal(2, 4, 4, 3)


def test_nnx_transformer():
    (fn, params), x = nnx_vit()
    blocks = residual_blocks(fn, params, x)
    assert len(blocks) == 4
    small, small_fn = drop_blocks(fn, params, [block_at(blocks, "layers/1/attn")], x)
    expected = jax.jit(functools.partial(fn, gone=("attn1",)))(params, x)
    np.testing.assert_allclose(jax.jit(small_fn)(small, x), expected, rtol=1e-5, atol=1e-5)
    own = {path for path, _ in jc.tree.leaves_with_paths(small)}
    assert not any(path.startswith(("layers/1/attn", "layers/1/norm1")) for path in own)
    assert isinstance(small, nnx.State)


def test_equinox_transformer_under_vmap_with_biases():
    class Layer(eqx.Module):
        attn: eqx.nn.MultiheadAttention
        mlp: eqx.nn.MLP
        norm: eqx.nn.LayerNorm

        def __init__(self, key):
            a, b = jax.random.split(key)
            self.attn = eqx.nn.MultiheadAttention(
                2, 8, use_output_bias=True, use_query_bias=True, key=a
            )
            self.mlp = eqx.nn.MLP(8, 8, 16, 1, key=b)
            self.norm = eqx.nn.LayerNorm(8)

        def __call__(self, x, gone):
            x = x if "attn" in gone else x + self.attn(h := jax.vmap(self.norm)(x), h, h)
            return x if "mlp" in gone else x + jax.vmap(self.mlp)(x)

    layers = [Layer(key) for key in jax.random.split(jax.random.key(0), 2)]
    params, static = eqx.partition(layers, eqx.is_inexact_array)

    def apply(params, x, gone=("", "")):
        def one(x):
            for layer, own in zip(eqx.combine(params, static), gone, strict=True):
                x = layer(x, own)
            return x

        return jax.vmap(one)(x)

    x = normal(2, 5, 8)
    blocks = residual_blocks(apply, params, x)
    assert len(blocks) == 4
    dropped = [block_at(blocks, "0/mlp"), block_at(blocks, "1/attn")]
    small, small_fn = drop_blocks(apply, params, dropped, x)
    expected = jax.jit(functools.partial(apply, gone=("mlp", "attn")))(params, x)
    np.testing.assert_allclose(jax.jit(small_fn)(small, x), expected, rtol=1e-5, atol=1e-5)
    own = [path for path, _ in jc.tree.leaves_with_paths(small)]
    assert not any(p.startswith(("0/mlp", "1/attn", "1/norm")) for p in own)


def linen_net(depth, scanned):
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(2, name="attn")(y, y)
            return x + nn.Dense(8)(nn.gelu(nn.Dense(16)(nn.LayerNorm()(x)))), None

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(8, name="stem")(x)
            if scanned:
                layers = nn.scan(
                    nn.remat(Layer),
                    variable_axes={"params": 0},
                    split_rngs={"params": True},
                    length=depth,
                )
                return layers(name="layers")(x, None)[0]
            for i in range(depth):
                x, _ = Layer(name=f"layers_{i}")(x, None)
            return x

    return Net()


def test_linen_layers():
    net, x = linen_net(3, False), normal(2, 5, 8)
    params = jax.jit(net.init)(jax.random.key(0), x)
    layers = residual_blocks(net.apply, params, x, whole_layers=True)
    assert [b.name for b in layers] == [f"params/layers_{i}" for i in range(3)]
    small, small_fn = drop_blocks(net.apply, params, [layers[2]], x)
    expected = jax.jit(linen_net(2, False).apply)(params, x)
    np.testing.assert_allclose(jax.jit(small_fn)(small, x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stays", [(1, 0, 1, 1), (0, 0, 0, 0)])
def test_linen_scan_over_layers_gets_shorter(stays):
    net, x = linen_net(4, True), normal(2, 5, 8)
    params = jax.jit(net.init)(jax.random.key(0), x)
    (block,) = residual_blocks(net.apply, params, x)
    assert block.name == "params/layers"
    assert block.layers == 4
    dropped = [Dropped(block, tuple(map(bool, stays)))]
    small, small_fn = drop_blocks(net.apply, params, dropped, x)
    rows = np.flatnonzero(stays)
    cut = jax.tree.map(lambda w: w[rows], params["params"]["layers"])
    full = {"params": {"stem": params["params"]["stem"]}}
    for i in range(len(rows)):
        full["params"][f"layers_{i}"] = jax.tree.map(lambda w, i=i: w[i], cut)
    expected = jax.jit(linen_net(len(rows), False).apply)(full, x)
    np.testing.assert_allclose(jax.jit(small_fn)(small, x), expected, rtol=1e-5, atol=1e-5)
    if len(rows):
        for a, b in zip(
            jax.tree.leaves(small["params"]["layers"]), jax.tree.leaves(cut), strict=True
        ):
            np.testing.assert_array_equal(a, b)
    else:
        assert jax.tree.leaves(small["params"]["layers"]) == []
    gated = gate_blocks(net.apply, [block])
    found = jax.jit(gated)(params, {block.name: jnp.array(stays)}, x)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


# Scans.

STACK = {"w": normal(4, 8, 8, scale=0.3), "b": normal(4, 8), "head": normal(8, 3)}


def scanned(p, x):
    def step(carry, layer):
        x, loss = carry
        w, b, i = layer
        h = jnp.tanh(x @ w + b) * (1.0 + i)
        return (x + h, loss + (h**2).mean()), x

    half = p["w"].astype(jnp.float32), p["b"] + 0.0, jnp.arange(4.0)
    (x, loss), _ = jax.lax.scan(jax.checkpoint(step), (x, jnp.zeros(())), half)
    return x @ p["head"], loss


def written(p, x, rows):
    loss = jnp.zeros(())
    for i in rows:
        h = jnp.tanh(x @ p["w"][i] + p["b"][i]) * (1.0 + i)
        x, loss = x + h, loss + (h**2).mean()
    return x @ p["head"], loss


def test_a_scan_with_a_loss_and_numbered_layers():
    x = normal(2, 8)
    (block,) = residual_blocks(scanned, STACK, x)
    # The bias is changed before its rows go to the layers: it stays whole, and its rows are taken.
    assert block.leaves == ("w",)
    assert block.layers == 4
    dropped = [Dropped(block, (True, False, False, True))]
    small, small_fn = drop_blocks(scanned, STACK, dropped, x)
    assert small["w"].shape == (2, 8, 8)
    assert small["b"].shape == (4, 8)
    for a, b in zip(small_fn(small, x), written(STACK, x, (0, 3)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_shorter_scan_can_be_shortened_again_and_loses_its_last_layers():
    x = normal(2, 8)
    (block,) = residual_blocks(scanned, STACK, x)
    small, fn = drop_blocks(scanned, STACK, [Dropped(block, (True, False, True, True))], x)
    (again,) = residual_blocks(fn, small, x)
    assert again.layers == 3
    smaller, fn2 = drop_blocks(fn, small, [Dropped(again, (False, True, True))], x)
    assert smaller["w"].shape == (2, 8, 8)
    np.testing.assert_allclose(
        fn2(smaller, x)[0], written(STACK, x, (2, 3))[0], rtol=1e-5, atol=1e-5
    )
    none, fn3 = drop_blocks(fn2, smaller, residual_blocks(fn2, smaller, x), x)
    assert none["w"] is None
    np.testing.assert_allclose(fn3(none, x)[0], x @ STACK["head"], rtol=1e-6, atol=1e-6)


# What a function without blocks can be used in.


def small_llama():
    fn, params, x = llama()
    blocks = residual_blocks(fn, params, x)
    dropped = [block_at(blocks, "layers/0/mlp"), block_at(blocks, "layers/2/attn")]
    small, small_fn = drop_blocks(fn, params, dropped, x)
    return small_fn, small, llama(without("mlp0", "attn2"))[0], params


def test_one_compilation_and_batches_of_other_sizes():
    fn, small, oracle, params = small_llama()
    run = counting_jit(fn)
    for size in ((2, 5), (2, 5), (1, 3)):
        tokens = jnp.arange(size[0] * size[1]).reshape(size) % 16
        expected = jax.jit(oracle)(params, tokens)
        np.testing.assert_array_equal(run(small, tokens), expected)
    assert run.traces == 2


def test_gradients_are_those_without_the_blocks():
    fn, small, oracle, params = small_llama()
    tokens = jnp.arange(10).reshape(2, 5)
    found = jax.jit(jax.grad(lambda p: (fn(p, tokens) ** 2).mean()))(small)
    expected = jax.jit(jax.grad(lambda p: (oracle(p, tokens) ** 2).mean()))(params)
    expected = dict(jc.tree.leaves_with_paths(expected))
    for path, grad in jc.tree.leaves_with_paths(found):
        np.testing.assert_allclose(grad, expected[path], rtol=1e-4, atol=1e-5)


def test_vmap_checkpoint_shapes_and_scan():
    fn, small, oracle, params = small_llama()
    tokens = jnp.arange(10).reshape(2, 5)
    two = jax.tree.map(lambda w: jnp.stack([w, 2 * w]), small)
    oracle = jax.jit(oracle)
    found = jax.jit(jax.vmap(fn, (0, None)))(two, tokens)
    np.testing.assert_allclose(found[0], oracle(params, tokens), rtol=1e-5, atol=1e-4)
    doubled = jax.tree.map(lambda w: 2 * w, params)
    np.testing.assert_allclose(found[1], oracle(doubled, tokens), rtol=1e-4, atol=1e-3)
    found = jax.jit(jax.checkpoint(fn))(small, tokens)
    np.testing.assert_allclose(found, oracle(params, tokens), rtol=1e-5, atol=1e-4)
    shapes = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype), small)
    assert jax.eval_shape(fn, shapes, tokens).shape == (2, 5, 16)
    _, ys = jax.lax.scan(lambda c, t: (c, fn(small, t)), 0, jnp.stack([tokens, tokens + 1]))
    np.testing.assert_allclose(ys[1], oracle(params, tokens + 1), rtol=1e-5, atol=1e-4)


def test_abstract_params_give_abstract_params():
    x = jax.ShapeDtypeStruct((2, 8), jnp.float32)
    shapes = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype), STACK)
    (block,) = residual_blocks(scanned, shapes, x)
    small, fn = drop_blocks(scanned, shapes, [Dropped(block, (True, False, False, True))], x)
    assert small["w"].shape == (2, 8, 8)
    assert jax.eval_shape(fn, small, x)[0].shape == (2, 3)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_params_may_be_cast_after_blocks_are_gone(dtype):
    def fn(p, x):
        for w in p:
            x = x + jnp.tanh(x @ w)
        return x

    params, x = [normal(8, 8, seed=i) for i in range(3)], normal(4, 8)
    blocks = residual_blocks(fn, params, x)
    small, small_fn = drop_blocks(fn, params, [blocks[1]], x)
    low = jax.tree.map(lambda w: w.astype(dtype), (small, x))
    with jax.numpy_dtype_promotion("strict"):
        found = small_fn(*low)
    assert found.dtype == dtype
    expected = fn([w.astype(dtype) for w in params[::2]], low[1])
    np.testing.assert_allclose(
        found.astype(jnp.float32), expected.astype(jnp.float32), rtol=2e-2, atol=2e-2
    )


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_on_a_mesh(kind):
    mesh = mesh_of(kind)

    def fn(p, x):
        x = x + jax.nn.relu(x @ p["up"]) @ p["down"]
        x, _ = jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, p["w"])
        return x

    params = {"up": normal(8, 16), "down": normal(16, 8), "w": normal(3, 8, 8)}
    x = normal(8, 8)
    blocks = residual_blocks(fn, params, x)
    dropped = [block_at(blocks, "up"), Dropped(block_at(blocks, "w"), (True, False, True))]
    expected = x
    for i in (0, 2):
        expected = expected + jnp.tanh(expected @ params["w"][i])
    with jax.set_mesh(mesh):
        batch = jax.device_put(x, jax.NamedSharding(mesh, jax.P("d")))
        placed = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
        small, small_fn = drop_blocks(fn, placed, dropped, batch)
        found = jax.jit(small_fn)(small, batch)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert small["w"].shape == (2, 8, 8)
    assert small["up"] is None
    assert found.sharding.spec[0] == "d"


def test_sharded_map_and_custom_derivative():
    mesh = mesh_of("auto")

    @jax.custom_vjp
    def inner(w, x):
        return x + jnp.tanh(x @ w) + 0.0

    inner.defvjp(lambda w, x: (inner(w, x), None), lambda _, g: (jnp.ones((8, 8)), 100 * g))

    def fn(p, x, has=True):
        def part(up, down, x):
            return x + jax.lax.psum(jnp.tanh(x @ up) @ down, "d")

        specs = (jax.P(None, "d"), jax.P("d"), jax.P())
        run = jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=jax.P())
        x = run(p["up"], p["down"], x) if has else x
        x = inner(p["w"], x) if has else x
        return x @ p["head"]

    params = {"up": normal(8, 16), "down": normal(16, 8), "w": normal(8, 8), "head": normal(8, 3)}
    x = normal(4, 8)
    blocks = residual_blocks(fn, params, x)
    assert len(blocks) == 2
    small, small_fn = drop_blocks(fn, params, blocks, x)
    assert sorted(k for k, w in small.items() if w is not None) == ["head"]
    np.testing.assert_allclose(
        jax.jit(small_fn)(small, x), fn(params, x, False), rtol=1e-6, atol=1e-6
    )
    # The derivative is that of what is left, not the one of the block.
    grad = jax.grad(lambda x: small_fn(small, x).sum())(x)
    np.testing.assert_allclose(grad, jnp.broadcast_to(params["head"].sum(1), (4, 8)), rtol=1e-5)


def test_blocks_in_branches_and_loops():
    def fn(p, x, has=True):
        def more(x):
            return x + jnp.tanh(x @ p["a"]) if has else x

        x = jax.lax.cond(x[0, 0] > 0, more, lambda x: 2.0 * x, x)
        return jax.lax.while_loop(
            lambda c: c[0] < 2, lambda c: (c[0] + 1, more(c[1]) + 1.0), (0, x)
        )[1]

    params = {"a": normal(8, 8)}
    for sign in (1, -1):
        x = sign * jnp.abs(normal(4, 8))
        blocks = residual_blocks(fn, params, x)
        small, small_fn = drop_blocks(fn, params, blocks, x)
        assert small["a"] is None
        np.testing.assert_allclose(jax.jit(small_fn)(small, x), fn(params, x, False), rtol=1e-6)


def test_a_call_that_also_computes_something_else():
    @jax.jit
    def both(p, x):
        return jnp.tanh(x @ p["f"]), jnp.sin(x @ p["g"])

    def fn(p, x):
        f, g = both(p, x)
        return x + f, g

    params, x = {"f": normal(8, 8), "g": normal(8, 4)}, normal(4, 8)
    small, small_fn = drop_blocks(fn, params, residual_blocks(fn, params, x), x)
    assert small["f"] is None
    found = small_fn(small, x)
    np.testing.assert_array_equal(found[0], x)
    np.testing.assert_allclose(found[1], jnp.sin(x @ params["g"]), rtol=1e-5, atol=1e-6)
    assert equations(small_fn, small, x) < equations(fn, params, x)


def test_what_is_computed_from_shared_leaves_for_a_block_is_not_run():
    both = jax.jit(lambda w, x: (jnp.tanh(x @ w), jnp.sin(x @ w.T)))

    def fn(p, x):
        f, g = both(p["w"], x)
        return x + f, g

    params, x = {"w": normal(8, 8)}, normal(4, 8)
    small, small_fn = drop_blocks(fn, params, residual_blocks(fn, params, x), x)
    assert small["w"] is params["w"]
    assert str(jax.make_jaxpr(small_fn)(small, x)).count("dot_general") == 1
    np.testing.assert_allclose(small_fn(small, x)[1], fn(params, x)[1], rtol=1e-6, atol=1e-6)


def test_effects_of_a_block_go_and_others_stay(capfd):
    def fn(p, x):
        jax.debug.print("first {}", x.sum())
        h = jnp.tanh(x @ p["w"])
        jax.debug.print("inside {}", h.sum())
        return x + h

    params, x = {"w": normal(8, 8)}, normal(4, 8)
    small, small_fn = drop_blocks(fn, params, residual_blocks(fn, params, x), x)
    jax.block_until_ready(jax.jit(small_fn)(small, x))
    jax.effects_barrier()
    printed = capfd.readouterr().out
    assert "first" in printed
    assert "inside" not in printed


def test_a_block_inside_of_a_block_goes_with_it():
    def fn(p, x, has=True):
        h = x @ p["down"]
        h = h + jnp.tanh(h @ p["inner"]) if has else h
        return x + h @ p["up"]

    params = {"down": normal(8, 4), "inner": normal(4, 4), "up": normal(4, 8)}
    x = normal(4, 8)
    inner, outer = residual_blocks(fn, params, x)
    small, small_fn = drop_blocks(fn, params, [inner], x)
    np.testing.assert_allclose(
        jax.jit(small_fn)(small, x), fn(params, x, False), rtol=1e-6, atol=1e-6
    )
    for dropped in ([outer], [inner, outer]):
        small, small_fn = drop_blocks(fn, params, dropped, x)
        assert jax.tree.leaves(small) == []
        np.testing.assert_array_equal(small_fn(small, x), x)


def test_shared_leaves_go_with_the_last_block_that_uses_them():
    def fn(p, x, times=2):
        for _ in range(times):
            x = x + jnp.tanh(x @ p["w"])
        return x

    params, x = {"w": normal(8, 8)}, normal(4, 8)
    blocks = residual_blocks(fn, params, x)
    small, small_fn = drop_blocks(fn, params, blocks[:1], x)
    np.testing.assert_allclose(jax.jit(small_fn)(small, x), fn(params, x, 1), rtol=1e-6)
    assert small["w"] is not None
    assert drop_blocks(fn, params, blocks, x)[0]["w"] is None


def test_small_params_are_pruned_quantized_and_packed_like_any():
    fn, params, x = llama()
    layers = residual_blocks(fn, params, x, whole_layers=True)
    small, small_fn = drop_blocks(fn, params, layers[:1], x)
    p = jc.quantize(8)
    packed = jc.pack(p, small)
    found = jax.jit(jc.lift(small_fn))(packed, x)
    expected = jax.jit(small_fn)(jc.compress(p, small), x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_gates_are_traced():
    fn, params, x = llama()
    blocks = residual_blocks(fn, params, x)
    gated = gate_blocks(fn, blocks)
    run = counting_jit(lambda gate: gated(params, {blocks[1].name: gate}, x))
    off, on = run(jnp.array(0)), run(jnp.array(1))
    assert run.traces == 1
    both = jax.jit(jax.vmap(lambda gate: gated(params, {blocks[1].name: gate}, x)))(jnp.arange(2))
    np.testing.assert_allclose(both, jnp.stack([off, on]), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(on, jax.jit(fn)(params, x), rtol=1e-5, atol=1e-4)
    expected = jax.jit(llama(without("mlp0"))[0])(params, x)
    np.testing.assert_allclose(off, expected, rtol=1e-5, atol=1e-4)


def test_wrong_arguments_are_refused():
    fn, params, x = llama()
    blocks = residual_blocks(fn, params, x)
    with pytest.raises(TypeError, match="function of the params"):
        residual_blocks(params, fn, x)
    with pytest.raises(TypeError, match="hold blocks of"):
        drop_blocks(fn, params, ["layers/0"], x)
    with pytest.raises(ValueError, match="name each block once"):
        drop_blocks(fn, params, [blocks[0], blocks[0]], x)
    other = blocks[0]._replace(name="other", parts=("other",))
    with pytest.raises(ValueError, match="have a residual block 'other'"):
        drop_blocks(fn, params, [other], x)
    with pytest.raises(ValueError, match="layers which stay"):
        drop_blocks(fn, params, [Dropped(blocks[0], (True,))], x)
    _, small_fn = drop_blocks(fn, params, blocks[:1], x)
    with pytest.raises(ValueError, match="be those that"):
        small_fn(params, x)
    with pytest.raises(ValueError, match="have shape"):
        gate_blocks(fn, blocks)(params, {blocks[0].name: jnp.ones(2)}, x)
    with pytest.raises(ValueError, match="have a residual block"):
        gate_blocks(fn, blocks)(params, {"other": 1}, x)
    (stack,) = residual_blocks(scanned, STACK, normal(2, 8))
    with pytest.raises(ValueError, match="layers which stay"):
        drop_blocks(scanned, STACK, [Dropped(stack, (True,) * 3)], normal(2, 8))


def test_inputs_may_be_closed_over():
    x = jnp.ones((3, 4))
    params = {"a": jnp.eye(4), "b": 2 * jnp.eye(4)}

    def fn(p, x):
        x = x + jnp.tanh(x @ p["a"])
        return x + jnp.tanh(x @ p["b"])

    def closed(p):
        return fn(p, x)

    names = [block.name for block in jc.pruning.residual_blocks(fn, params, x)]
    assert [block.name for block in jc.pruning.residual_blocks(closed, params)] == names
