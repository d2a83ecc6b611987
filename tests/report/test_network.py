import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax

import jaxcompress as jc
from jaxcompress.report._network import Network, network
from jaxcompress.report._network_figure import network_figure
from jaxcompress.report._network_graph import network_dot, quoted
from jaxcompress.report._network_rows import columns_of, lanes, picture
from tests.tracing import models


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def edges_of(fn, params, *args, **kwargs):
    """`source > target` with the label in brackets, and `...` for the next trip."""
    found = network(fn, params, *args, **kwargs)
    return [
        f"{e.source} > {e.target}"
        + (f" ({e.label})" if e.label else "")
        + (" ..." if e.loop else "")
        for e in found.edges
    ]


def dense(p, x):
    return x @ p["kernel"] + jnp.broadcast_to(p["bias"], (*x.shape[:-1], p["bias"].shape[0]))


def dense_shapes(n, m):
    return {"kernel": shape(n, m), "bias": shape(m)}


def conv(w, x, stride=1, groups=1):
    return lax.conv_general_dilated(
        x,
        w,
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def along(p, x):
    return jnp.broadcast_to(p, x.shape)


def batch_norm(p, x):
    factor = lax.rsqrt(p["var"] + 1e-5) * p["scale"]
    return (x - along(p["mean"], x)) * along(factor, x) + along(p["bias"], x)


def norm_shapes(n, *more):
    return {name: shape(n) for name in ("scale", "bias", *more)}


def layer_norm(p, x):
    mean = x.mean(-1, keepdims=True)
    var = jnp.square(x - mean).mean(-1, keepdims=True)
    return (x - mean) * lax.rsqrt(var + 1e-6) * along(p["scale"], x) + along(p["bias"], x)


def mlp(params, x):
    return dense(params["b"], jax.nn.relu(dense(params["a"], x)))


MLP = {"a": dense_shapes(8, 16), "b": dense_shapes(16, 4)}
X = shape(3, 8)


def test_mlp():
    assert edges_of(mlp, MLP, X) == [
        "input > a/kernel",
        "a/kernel > b/kernel (relu)",
        "b/kernel > output",
    ]
    net = network(mlp, MLP, X)
    node = net["a/kernel"]
    assert node.kind == "layer"
    assert node.op == "dot_general"
    assert node.paths == ("a/kernel", "a/bias")
    assert (node.inputs, node.output) == ((3, 8), (3, 16))
    assert (node.width_in, node.width, node.window) == (8, 16, ())
    assert (node.parameters, node.flops) == (8 * 16 + 16, 2 * 3 * 8 * 16)
    assert node.after == "relu"
    assert net["input"].output == (3, 8)
    assert net.parameters == 8 * 16 + 16 + 16 * 4 + 4


@pytest.mark.parametrize(
    "wrap",
    [
        jax.jit,
        jax.checkpoint,
        lambda f: jax.jit(jax.jit(f)),
        lambda f: lambda p, x: jax.vmap(f, (None, 0))(p, x),
    ],
)
def test_calls_are_seen_through(wrap):
    assert edges_of(wrap(mlp), MLP, X) == edges_of(mlp, MLP, X)


def test_custom_derivatives_are_seen_through():
    @jax.custom_vjp
    def layer(p, x):
        return dense(p, x)

    layer.defvjp(lambda p, x: (dense(p, x), (p, x)), lambda r, g: r)

    def fn(params, x):
        return layer(params["b"], models.softsign(layer(params["a"], x)))

    assert edges_of(fn, MLP, X)[1:] == ["a/kernel > b/kernel (softsign)", "b/kernel > output"]


def block(p, x, stride=1):
    y = jax.nn.relu(batch_norm(p["bn1"], conv(p["conv1"], x, stride)))
    y = batch_norm(p["bn2"], conv(p["conv2"], y))
    if "down" in p:
        x = batch_norm(p["down_bn"], conv(p["down"], x, stride))
    return jax.nn.relu(x + y)


def resnet(params, x):
    x = jax.nn.relu(batch_norm(params["bn"], conv(params["stem"], x)))
    x = block(params["one"], x)
    x = block(params["two"], x, 2)
    return dense(params["head"], x.mean((1, 2)))


def resnet_shapes(n, m, inner=None):
    stats = ("mean", "var")
    k = inner or n
    return {
        "stem": shape(3, 3, 3, n),
        "bn": norm_shapes(n, *stats),
        "one": {
            "conv1": shape(3, 3, n, k),
            "bn1": norm_shapes(k, *stats),
            "conv2": shape(3, 3, k, n),
            "bn2": norm_shapes(n, *stats),
        },
        "two": {
            "conv1": shape(3, 3, n, m),
            "bn1": norm_shapes(m, *stats),
            "conv2": shape(3, 3, m, m),
            "bn2": norm_shapes(m, *stats),
            "down": shape(1, 1, n, m),
            "down_bn": norm_shapes(m, *stats),
        },
        "head": dense_shapes(m, 10),
    }


IMAGE = shape(2, 8, 8, 3)


def test_resnet():
    assert edges_of(resnet, resnet_shapes(8, 16), IMAGE) == [
        "input > stem",
        "stem > bn",
        "bn > one/conv1 (relu)",
        "one/conv1 > one/bn1",
        "one/bn1 > one/conv2 (relu)",
        "one/conv2 > one/bn2",
        "bn > add (relu)",
        "one/bn2 > add",
        "add > two/conv1 (relu)",
        "two/conv1 > two/bn1",
        "two/bn1 > two/conv2 (relu)",
        "two/conv2 > two/bn2",
        "add > two/down (relu)",
        "two/down > two/down_bn",
        "two/down_bn > add:1",
        "two/bn2 > add:1",
        "add:1 > head/kernel (relu)",
        "head/kernel > output",
    ]
    net = network(resnet, resnet_shapes(8, 16), IMAGE)
    assert net["one/bn1"].kind == "norm"
    assert sorted(net["one/bn1"].paths) == [
        f"one/bn1/{p}" for p in ("bias", "mean", "scale", "var")
    ]
    assert net["two/down"].window == (1, 1)
    assert (net["add"].kind, net["add"].width, net["add:1"].width) == ("add", 8, 16)


def test_depthwise_and_other_products():
    def fn(params, x):
        x = conv(params["depthwise"], x, groups=3)
        x = jnp.einsum("bhwc,hcd->bhwd", x, params["rows"])
        return jnp.einsum("dno,bhwd->bhwno", params["heads"], x)

    params = {"depthwise": shape(3, 3, 1, 6), "rows": shape(8, 6, 5), "heads": shape(5, 2, 4)}
    net = network(fn, params, IMAGE)
    assert [(e.source, e.target) for e in net.edges] == [
        ("input", "depthwise"),
        ("depthwise", "rows"),
        ("rows", "heads"),
        ("heads", "output"),
    ]
    widths = {node.name: (node.width_in, node.width) for node in net.nodes if node.paths}
    assert widths == {"depthwise": (3, 6), "rows": (6, 5), "heads": (5, 8)}


def test_densenet():
    def fn(params, x):
        for name in ("a", "b", "c"):
            x = jnp.concatenate([x, jax.nn.relu(conv(params[name], x))], -1)
        return x

    params = {"a": shape(3, 3, 3, 4), "b": shape(3, 3, 7, 4), "c": shape(3, 3, 11, 4)}
    assert edges_of(fn, params, IMAGE) == [
        "input > a",
        "input > concat",
        "a > concat (relu)",
        "concat > b",
        "concat > concat:1",
        "b > concat:1 (relu)",
        "concat:1 > c",
        "concat:1 > concat:2",
        "c > concat:2 (relu)",
        "concat:2 > output",
    ]
    # The input is no layer, whose channels would be known.
    assert network(fn, params, IMAGE)["b"].width_in == 7


def unet(params, x):
    first = jax.nn.relu(conv(params["down"], x))
    x = lax.reduce_window(first, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "SAME")
    x = jax.nn.relu(conv(params["mid"], x))
    x = jnp.repeat(jnp.repeat(conv(params["up"], x), 2, 1), 2, 2)
    return conv(params["out"], jnp.concatenate([first, x], -1))


UNET = {
    "down": shape(3, 3, 3, 8),
    "mid": shape(3, 3, 8, 16),
    "up": shape(1, 1, 16, 8),
    "out": shape(1, 1, 16, 2),
}


def test_unet():
    assert edges_of(unet, UNET, IMAGE) == [
        "input > down",
        "down > mid (relu, max pool)",
        "mid > up (relu)",
        "down > concat (relu)",
        "up > concat",
        "concat > out",
        "out > output",
    ]
    net = network(unet, UNET, IMAGE)
    assert net["concat"].width == 16
    assert net["down"].after == "relu, max pool"


def layer(p, x, heads=2):
    y = layer_norm(p["ln1"], x)
    q, k, v = ((y @ p[n]).reshape(*y.shape[:2], heads, -1) for n in "qkv")
    scores = jnp.einsum("bshd,bthd->bhst", q, k) / 2.0
    mixed = jnp.einsum("bhst,bthd->bshd", jax.nn.softmax(scores, -1), v)
    x = x + mixed.reshape(*x.shape[:2], -1) @ p["o"]
    y = layer_norm(p["ln2"], x)
    return x + dense(p["down"], jax.nn.gelu(dense(p["up"], y)))


def layer_shapes(width=16, inner=32, head=8):
    return {
        "ln1": norm_shapes(width),
        **{name: shape(width, 2 * head) for name in "qkv"},
        "o": shape(2 * head, width),
        "ln2": norm_shapes(width),
        "up": dense_shapes(width, inner),
        "down": dense_shapes(inner, width),
    }


TOKENS = shape(2, 5, dtype=jnp.int32)


def transformer(params, tokens):
    x = params["embed"][tokens]
    x = x + along(params["pos"], x)
    for p in params["layers"]:
        x = layer(p, x)
    return layer_norm(params["ln"], x) @ params["head"]


def transformer_shapes(inner=(32,), width=16, head=8):
    return {
        "embed": shape(50, width),
        "pos": shape(5, width),
        "layers": [layer_shapes(width, n, head) for n in inner],
        "ln": norm_shapes(width),
        "head": shape(width, 50),
    }


def test_transformer():
    assert edges_of(transformer, transformer_shapes(), TOKENS) == [
        "input > embed",
        "embed > layers/0/ln1",
        "layers/0/ln1 > layers/0/q",
        "layers/0/ln1 > layers/0/k",
        "layers/0/ln1 > layers/0/v",
        "layers/0/q > matmul",
        "layers/0/k > matmul",
        "layers/0/v > matmul:1",
        "matmul > matmul:1 (softmax)",
        "matmul:1 > layers/0/o",
        "embed > add",
        "layers/0/o > add",
        "add > layers/0/ln2",
        "layers/0/ln2 > layers/0/up/kernel",
        "layers/0/up/kernel > layers/0/down/kernel (gelu)",
        "add > add:1",
        "layers/0/down/kernel > add:1",
        "add:1 > ln",
        "ln > head",
        "head > output",
    ]
    net = network(transformer, transformer_shapes(), TOKENS)
    assert net["embed"].kind == "lookup"
    assert net["embed"].paths == ("embed", "pos")
    assert (net["layers/0/up/kernel"].width_in, net["layers/0/up/kernel"].width) == (16, 32)
    assert net["layers/0/ln1"].kind == "norm"


def stacked(params, tokens):
    x = params["embed"][tokens]
    x, _ = lax.scan(lambda x, p: (layer(p, x), None), x, params["layers"])
    return x @ params["head"]


def test_a_scan_over_layers_is_drawn_once():
    layers = jax.tree.map(lambda s: shape(3, *s.shape), layer_shapes())
    params = {"embed": shape(50, 16), "layers": layers, "head": shape(16, 50)}
    found = edges_of(stacked, params, TOKENS)
    assert found[:2] == ["input > embed", "embed > layers/ln1"]
    assert "add:1 > layers/ln1 ..." in found
    assert "add:1 > add ..." in found
    assert sum(edge.endswith("...") for edge in found) == 2
    assert found[-2:] == ["add:1 > head", "head > output"]
    net = network(stacked, params, TOKENS)
    (location,) = net["layers/q"].loops
    assert net.loops == {location: 3}
    assert net["layers/q"].flops == 3 * 2 * 10 * 16 * 16
    assert net["layers/q"].parameters == 3 * 16 * 16
    assert net["head"].loops == ()


def test_lstm():
    def fn(params, xs):
        def cell(state, x):
            h, c = state
            z = x @ params["w"] + h @ params["u"]
            i, g, f, o = jnp.split(z + along(params["b"], z), 4, -1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), None

        zeros = jnp.zeros((2, 4))
        (h, _), _ = lax.scan(cell, (zeros, zeros), xs)
        return h @ params["head"]

    params = {"w": shape(3, 16), "u": shape(4, 16), "b": shape(16), "head": shape(4, 2)}
    assert edges_of(fn, params, shape(6, 2, 3)) == [
        "input > w",
        "mul:1 > u ...",
        "w > add",
        "u > add",
        "add > b",
        "b > mul (sigmoid)",
        "add:1 > mul ...",
        "mul > add:1",
        "b > add:1 (sigmoid, tanh)",
        "b > mul:1 (sigmoid)",
        "add:1 > mul:1 (tanh)",
        "mul:1 > head",
        "head > output",
    ]


def test_a_counter_in_a_loop_is_no_source():
    def fn(params, x):
        def step(state):
            i, x = state
            return i + 1, jnp.tanh(x @ params["w"]) * i

        return lax.while_loop(lambda s: s[0] < 3.0, step, (0.0, x))[1]

    assert edges_of(fn, {"w": shape(4, 4)}, shape(2, 4)) == [
        "input > w",
        "w > w (tanh) ...",
        "w > output (tanh)",
    ]
    (trips,) = network(fn, {"w": shape(4, 4)}, shape(2, 4)).loops.values()
    assert trips is None


def test_gates_squeeze_excitation_and_branches():
    def fn(params, x):
        gate = jax.nn.sigmoid(dense(params["up"], jax.nn.relu(dense(params["down"], x))))
        x = x @ params["w"]
        x = x * gate
        return lax.cond(x[0, 0] > 0, lambda x: x @ params["yes"], lambda x: x @ params["no"], x)

    params = {
        "down": dense_shapes(8, 2),
        "up": dense_shapes(2, 6),
        "w": shape(8, 6),
        "yes": shape(6, 3),
        "no": shape(6, 3),
    }
    assert edges_of(fn, params, X) == [
        "input > down/kernel",
        "down/kernel > up/kernel (relu)",
        "input > w",
        "w > mul",
        "up/kernel > mul (sigmoid)",
        "mul > no",
        "mul > yes",
        "no > cond",
        "yes > cond",
        "cond > output",
    ]


def test_tied_weights_and_several_inputs_and_outputs():
    def fn(params, tokens, other, *, scale):
        x = params["table"][tokens] + other["x"] * scale
        return {"a": x @ params["table"].T, "b": x}

    params = {"table": shape(20, 4)}
    found = edges_of(fn, params, TOKENS, {"x": shape(2, 5, 4)}, scale=2.0)
    assert found == [
        "input 1 > table",
        "table > add",
        "input 2/x > add",
        "add > table:1",
        "table:1 > output a",
        "add > output b",
    ]
    net = network(fn, params, TOKENS, {"x": shape(2, 5, 4)}, scale=2.0)
    assert (net["table"].parameters, net["table:1"].parameters, net.parameters) == (80, 80, 80)


def test_keys_masks_and_unused_arguments_are_no_sources():
    def fn(params, x, mask, key, unused):
        x = jnp.where(mask, dense(params["a"], x), 0.0)
        keep = jax.random.bernoulli(key, 0.5, x.shape)
        return dense(params["b"], jnp.where(keep, x / 0.5, 0.0))

    args = (X, shape(3, 16, dtype=bool), jax.random.key(0), shape(2))
    found = network(fn, MLP | {"not used": shape(7)}, *args)
    assert [(e.source, e.target) for e in found.edges] == [
        ("input 1", "a/kernel"),
        ("a/kernel", "b/kernel"),
        ("b/kernel", "output"),
    ]
    assert [node.name for node in found.nodes] == ["input 1", "a/kernel", "b/kernel", "output"]
    assert found.parameters == 8 * 16 + 16 + 16 * 4 + 4 + 7


def test_dropout_by_a_product_has_no_key_as_a_source():
    def fn(params, x, key):
        x = dense(params["a"], x)
        keep = jax.random.bernoulli(key, 0.5, x.shape).astype(x.dtype)
        return dense(params["b"], x * keep)

    assert edges_of(fn, MLP, X, jax.random.key(0)) == [
        "input 1 > a/kernel",
        "a/kernel > b/kernel",
        "b/kernel > output",
    ]


def test_one_norm_after_another_and_a_late_bias_are_nodes_of_their_own():
    def rms_norm(scale, x):
        return x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True)) * along(scale, x)

    def twice(params, x):
        return rms_norm(params["second"], rms_norm(params["first"], x))

    shapes = {"first": shape(8), "second": shape(8)}
    found = edges_of(twice, shapes, X)
    assert found == ["input > first", "first > second", "second > output"]
    assert network(twice, shapes, X)["second"].kind == "norm"

    def late(params, x):
        x = x + x @ params["w"]
        return (x + along(params["bias"], x)) * along(params["scale"], x)

    shapes = {"w": shape(8, 8), "bias": shape(8), "scale": shape(8)}
    assert edges_of(late, shapes, X)[3:] == ["add > bias", "bias > scale", "scale > output"]
    net = network(late, shapes, X)
    assert (net["bias"].kind, net["scale"].kind) == ("bias", "scale")


def test_linen_batch_norm_in_training():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.BatchNorm(use_running_average=not train)(nn.Conv(4, (3, 3))(x))
            return nn.Dense(2)(nn.relu(x).mean((1, 2)))

    params = jax.eval_shape(lambda: Net().init(jax.random.key(0), jnp.ones(IMAGE.shape), False))
    for train in (False, True):

        def apply(params, x, train=train):
            return Net().apply(params, x, train, mutable=["batch_stats"] if train else False)

        net = network(apply, params, IMAGE)
        # New statistics are no results of their own.
        assert [(e.source, e.target) for e in net.edges] == [
            ("input", "params/Conv_0/kernel"),
            ("params/Conv_0/kernel", "params/BatchNorm_0"),
            ("params/BatchNorm_0", "params/Dense_0/kernel"),
            ("params/Dense_0/kernel", net.nodes[-1].name),
        ]
        assert net["params/BatchNorm_0"].kind == "norm"


def test_nnx_and_group_norm():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
            self.norm = nnx.GroupNorm(8, 2, rngs=rngs)
            self.head = nnx.Linear(8, 2, rngs=rngs)

        def __call__(self, x):
            return self.head(nnx.silu(self.norm(self.conv(x))).mean((1, 2)))

    apply, params = jc.functional(Net(nnx.Rngs(0)))
    assert edges_of(apply, params, IMAGE) == [
        "input > conv/kernel",
        "conv/kernel > norm",
        "norm > head/kernel (silu)",
        "head/kernel > output",
    ]


@pytest.mark.parametrize(
    "name",
    "nnx_cnn linen_cnn linen_transformer nnx_transformer linen_lstm equinox_mlp equinox_conv"
    " haiku_net tied_embeddings".split(),
)
def test_every_site_of_models_of_all_libraries_is_a_layer(name):
    # Flax's own arithmetic does not pass strict promotion.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        model = getattr(models, name)()
        net = network(model.apply, model.params, *model.args)
        sites = jc.sites(model.apply, model.params, *model.args)
    layers = [node for node in net.nodes if node.kind in ("layer", "lookup")]
    assert len(layers) == len(sites)
    for node, site in zip(layers, sites, strict=True):
        weights = site.path.split(" + ")
        assert list(node.paths[: len(weights)]) == weights
        assert node.flops == site.flops
    used = {path for node in net.nodes for path in node.paths}
    assert used <= set(dict(jc.tree.leaves_with_paths(model.params)))
    assert net.parameters == jc.tree.size(model.params)
    reached = {edge.target for edge in net.edges} | {"input"}
    assert {node.name for node in net.nodes} == reached


def test_the_table():
    text = str(network(mlp, MLP, X))
    assert (
        text
        == """\
 layer     kind    output  params  flops  from
 ─────────────────────────────────────────────────────────
 input     input   3×8
 a/kernel  dense   3×16       144    768  input
 b/kernel  dense   3×4         68    384  a/kernel (relu)
 output    output  3×4                    b/kernel
 ─────────────────────────────────────────────────────────
 total                        212  1,152"""
    )


def test_empty_networks():
    for fn, params, args in (
        (lambda p: None, {}, ()),
        (lambda p, x: x, {}, (X,)),
        (lambda p, x: jnp.zeros(3), {}, (X,)),
        (lambda p: p["w"], {"w": shape(3)}, ()),
        (lambda p, x: x * 2, {"w": shape(0, 3)}, (shape(0, 4),)),
    ):
        net = network(fn, params, *args)
        assert isinstance(net, Network)
        assert "total" in str(net)
        assert net.dot().startswith("digraph")
        net.figure().canvas.draw()
        net.figure(net).canvas.draw()


def test_no_function_and_no_network_are_refused():
    with pytest.raises(TypeError, match="network: `fn` must be a function"):
        network(3, {})
    with pytest.raises(TypeError, match="`before` must be a Network, got"):
        network_figure(3)
    with pytest.raises(TypeError, match="`after` must be a Network, got"):
        network_figure(network(mlp, MLP, X), 3)
    with pytest.raises(ValueError, match="`rows` must be"):
        network_figure(network(mlp, MLP, X), rows=3)


NAMES = re.compile(r"^ *n(\d+) \[label=\"((?:[^\"\\]|\\.)*)\"")


def test_dot_says_what_the_network_says():
    net = network(resnet, resnet_shapes(8, 16), IMAGE)
    lines = net.dot().splitlines()
    assert (lines[0], lines[-1]) == ("digraph network {", "}")
    ids = {m[1]: m[2].split("\\n")[0] for line in lines if (m := NAMES.match(line))}
    assert len(ids) == len(net.nodes)
    arrows = [m.groups() for line in lines if (m := re.match(r"^ *n(\d+) -> n(\d+)", line))]
    signs = {"add": "+", "add:1": "+"}
    wanted = [tuple(signs.get(n, n) for n in (e.source, e.target)) for e in net.edges]
    assert [(ids[a], ids[b]) for a, b in arrows] == wanted
    assert '[label="relu"]' in net.dot()


def test_dot_of_two_networks_and_of_loops():
    before = network(resnet, resnet_shapes(8, 16), IMAGE)
    after = network(resnet, resnet_shapes(8, 16, inner=5), IMAGE)
    text = before.dot(after)
    assert "3×3 conv 8 → 8, now 8 → 5\\n576 → 360 parameters" in text
    assert "norm 8, now 5" in text
    gone = before.dot(network(mlp, MLP, X))
    assert gone.count("gone") == len([node for node in before.nodes if node.paths])
    layers = jax.tree.map(lambda s: shape(3, *s.shape), layer_shapes())
    params = {"embed": shape(50, 16), "layers": layers, "head": shape(16, 50)}
    text = network(stacked, params, TOKENS).dot()
    assert text.count("subgraph cluster") == 1
    assert 'label="× 3";' in text
    assert text.count("style=dashed, constraint=false") == 2
    assert text.count("{") == text.count("}")


def test_sums_are_found_again_by_what_flows_into_them():
    def shallow(params, tokens):
        kept = dict(params, layers=[p for p in params["layers"] if p is not None])
        with jax.named_scope("small"):
            x = kept["embed"][tokens]
            x = x + along(kept["pos"], x)
            for p in kept["layers"]:
                x = layer(p, x)
            return layer_norm(kept["ln"], x) @ kept["head"]

    params = transformer_shapes((32, 32, 32))
    less = params | {"layers": [params["layers"][0], None, params["layers"][2]]}
    before, after = network(transformer, params, TOKENS), network(shallow, less, TOKENS)
    drawn = picture(before, after, fold=False)
    gone = [row.node.name for row in drawn.rows if row.gone]
    # Twelve of the second layer, products and sums included.
    first = [node.name for node in before.nodes].index("layers/1/ln1")
    assert gone == [node.name for node in before.nodes[first : first + 12]]
    assert overlaps(before.figure(after)) == []


def test_names_are_escaped():
    assert quoted('a"b', "c\\d") == '"a\\"b\\nc\\\\d"'
    name = 'w "x" \\ {<|>}\n;$\\alpha$'
    net = network(lambda p, x: x @ p[name], {name: shape(8, 2)}, X)
    assert net.nodes[1].paths == (name,)
    line = next(line for line in net.dot().splitlines() if "dense" in line)
    assert NAMES.match(line)
    assert '\\"x\\" \\\\ {<|>} ;$' in line
    assert len(net.dot().splitlines()) == 9
    net.figure(net).canvas.draw()
    assert '"x"' in str(net)


def overlaps(figure):
    """Texts that lie over each other or outside of the figure."""
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    (axes,) = figure.axes
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in axes.texts]
    width, height = figure.canvas.get_width_height()
    wrong = [text for text, b in boxes if b.x0 < 0 or b.y0 < 0 or b.x1 > width or b.y1 > height]
    for (one, a), (two, b) in itertools.combinations(boxes, 2):
        if min(a.x1, b.x1) - max(a.x0, b.x0) > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1:
            wrong.append((one, two))
    return wrong


def uneven(count, low, high):
    return tuple(int(n) for n in np.random.default_rng(0).integers(low, high, count))


@pytest.mark.parametrize(
    ("fn", "before", "after", "x"),
    [
        (resnet, resnet_shapes(64, 128), resnet_shapes(40, 100, inner=7), IMAGE),
        (unet, UNET, UNET, IMAGE),
        (
            transformer,
            transformer_shapes((1024,) * 12, 256, 64),
            transformer_shapes(uneven(12, 100, 1000), 192, 48),
            TOKENS,
        ),
        (transformer, transformer_shapes((1024,) * 12, 256, 64), None, TOKENS),
    ],
)
def test_no_text_of_a_figure_lies_over_another(fn, before, after, x):
    later = None if after is None else network(fn, after, x)
    figure = network(fn, before, x).figure(later)
    assert overlaps(figure) == []


def test_brackets_are_beside_the_names():
    figure = network(transformer, transformer_shapes((32,) * 12), TOKENS).figure()
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    extents = {t.get_text(): t.get_window_extent(renderer) for t in figure.axes[0].texts}
    names = [box for text, box in extents.items() if text.startswith("layers/")]
    assert len(names) == 8
    assert extents["× 12"].x1 + 10 < min(box.x0 for box in names)


def widths_drawn(figure, color):
    (axes,) = figure.axes
    boxes = [p for p in axes.patches if p.get_height() == pytest.approx(0.14)]
    # Those of the legend are no layers.
    boxes = [p for p in boxes if p.get_y() > 0.45]
    return [p.get_width() for p in boxes if p.get_facecolor()[:3] == pytest.approx(color)]


def test_boxes_are_as_wide_as_the_layers():
    from matplotlib.colors import to_rgb

    from jaxcompress.report._canvas import AFTER, BEFORE

    small = {"a": dense_shapes(8, 6), "b": dense_shapes(6, 4)}
    figure = network(mlp, MLP, X).figure(network(mlp, small, X))
    grey, blue = (widths_drawn(figure, to_rgb(color)) for color in (BEFORE, AFTER))
    assert np.array(grey) / grey[0] == pytest.approx([1.0, 4 / 16])
    assert np.array(blue) / grey[0] == pytest.approx([6 / 16, 4 / 16])
    gone = network(mlp, MLP, X).figure(network(lambda p, x: x, {}, X))
    assert [t.get_text() for t in gone.axes[0].texts].count("gone") == 2
    assert widths_drawn(gone, to_rgb("white")) == pytest.approx(grey)


def test_equal_layers_are_folded():
    net = network(transformer, transformer_shapes((32,) * 12), TOKENS)
    folded = picture(net, None, fold=True)
    assert [row.name for row in folded.rows[:3]] == ["input", "embed", "layers/0…11/ln1"]
    assert [label for *_, label in folded.brackets] == ["× 12"]
    assert len(folded.rows) == 2 + 12 + 3
    assert len(picture(net, None, fold=False).rows) == len(net.nodes)
    # One layer that is pruned otherwise ends the run.
    sizes = [32] * 12
    sizes[5] = 20
    other = network(transformer, transformer_shapes(sizes), TOKENS)
    labels = [label for *_, label in picture(net, other, fold=True).brackets]
    assert labels == ["× 5", "× 6"]


def test_a_skip_out_of_the_middle_is_not_folded_away():
    def fn(params, x):
        outs = []
        for p in params["w"]:
            x = jax.nn.relu(x @ p)
            outs.append(x)
        return x @ params["head"] + outs[1] @ params["side"]

    params = {"w": [shape(8, 8)] * 4, "head": shape(8, 2), "side": shape(8, 2)}
    drawn = picture(network(fn, params, X), None, fold=True)
    assert "w/1" in [row.name for row in drawn.rows]


def test_wires_in_one_lane_do_not_meet():
    rng = np.random.default_rng(0)
    for _ in range(20):
        spans = [tuple(sorted(map(int, rng.integers(0, 30, 2)))) for _ in range(12)]
        chosen = lanes(spans)
        for (a, one), (b, two) in itertools.combinations(zip(spans, chosen, strict=True), 2):
            assert one != two or a[1] < b[0] or b[1] < a[0]


def test_columns_hold_all_rows_once_and_cut_where_little_flows():
    net = network(transformer, transformer_shapes(uneven(12, 20, 40)), TOKENS)
    drawn = picture(net, None, fold=True)
    columns = columns_of(drawn, 48)
    assert [i for column in columns for i in column] == list(range(len(drawn.rows)))
    assert max(map(len, columns)) <= 48
    for column in columns[1:]:
        # Between layers only the residual stream goes on.
        assert drawn.rows[column.start].name.endswith("ln1")
    assert columns_of(drawn, 1000) == [range(len(drawn.rows))]


def test_wires_that_leave_a_column_have_a_letter_at_both_ends():
    net = network(transformer, transformer_shapes(uneven(12, 20, 40)), TOKENS)
    texts = [text.get_text() for text in net.figure().axes[0].texts]
    for letter in "abc":
        assert texts.count(letter) == 2


def test_dot_needs_no_package(monkeypatch):
    import sys

    for name in ("matplotlib", "rich"):
        monkeypatch.setitem(sys.modules, name, None)
    net = network(mlp, MLP, X)
    assert "a/kernel" in network_dot(net)
    with pytest.raises(ImportError, match=r"network_figure: .*jaxcompress\[report\]"):
        net.figure()
    with pytest.raises(ImportError, match=r"network: .*jaxcompress\[report\]"):
        str(net)
