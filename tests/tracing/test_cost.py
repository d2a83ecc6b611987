"""What functions cost, against counts by hand, brute force and XLA's own analysis."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxcompress as jc
from tests.conftest import mesh_of

F32 = jnp.float32


def spec(*shape, dtype=F32):
    return jax.ShapeDtypeStruct(shape, dtype)


def linear(p, x):
    return x @ p["w"]


def weights(*shape):
    return {"w": jnp.asarray(np.random.default_rng(0).normal(size=shape), F32)}


def row_of(cost, path="w"):
    (row,) = [row for row in cost.rows if row.path == path]
    return row


# Counts by hand.


def test_linear_layer():
    cost = jc.cost(
        lambda p, x: x @ p["w"] + p["b"][None], {"w": spec(8, 5), "b": spec(5)}, spec(3, 8)
    )
    (row,) = cost.rows
    assert row.path == "w"
    assert row.ops == ("dot_general",)
    assert row.flops == 2 * 3 * 8 * 5
    assert cost.flops == row.flops + 3 * 5
    # The addition is fused; the bias is read by it.
    assert cost.bytes == row.bytes == 4 * (3 * 8 + 8 * 5 + 3 * 5)
    assert row.param_bytes == row.dense_param_bytes == 4 * 8 * 5
    assert cost.param_bytes == cost.dense_param_bytes == 4 * (8 * 5 + 5)
    assert cost.seconds is None
    assert row.seconds is None
    assert cost.bounded


def test_bytes_follow_the_dtypes():
    p, x = {"w": spec(8, 5, dtype=jnp.bfloat16)}, spec(3, 8, dtype=jnp.bfloat16)
    assert jc.cost(linear, p, x).bytes == 2 * (3 * 8 + 8 * 5 + 3 * 5)


def test_any_contraction():
    p = {"w": spec(4, 6, 7)}
    cost = jc.cost(lambda p, x: jnp.einsum("bik,kij->bj", x, p["w"]), p, spec(3, 6, 4))
    assert row_of(cost).flops == 2 * 3 * 7 * 6 * 4


def products_by_brute_force(lhs, rhs, out, strides, padding, lhs_dilation, rhs_dilation, groups):
    """Multiplications with an entry of the input, one by one; NHWC, HWIO."""
    count = 0
    spatial = [range(n) for n in (*out[1:3], *rhs[:2])]
    for i, j, a, b in itertools.product(*spatial):
        y = i * strides[0] + a * rhs_dilation[0] - padding[0][0]
        x = j * strides[1] + b * rhs_dilation[1] - padding[1][0]
        hit = all(
            place % dilation == 0 and 0 <= place // dilation < size
            for place, dilation, size in zip((y, x), lhs_dilation, lhs[1:3], strict=True)
        )
        count += hit
    assert rhs[2] * groups == lhs[3]
    return out[0] * rhs[3] * rhs[2] * count


CONVOLUTIONS = {
    "valid": dict(),
    "same": dict(padding=((1, 1), (1, 1))),
    "stride 2": dict(strides=(2, 2), padding=((1, 1), (1, 1))),
    "uneven": dict(strides=(2, 1), padding=((0, 3), (2, 0))),
    "grouped": dict(padding=((1, 1), (1, 1)), groups=2),
    "depthwise": dict(groups=4),
    "dilated": dict(padding=((2, 2), (2, 2)), rhs_dilation=(2, 2)),
    "transposed": dict(padding=((2, 1), (2, 2)), lhs_dilation=(2, 2)),
    "all": dict(
        strides=(2, 1), padding=((3, 1), (2, 4)), lhs_dilation=(3, 2), rhs_dilation=(2, 1), groups=2
    ),
    "cropped": dict(padding=((-1, 2), (0, -2))),
}


def xla(fn, *args):
    return jax.jit(fn).lower(*args).compile().cost_analysis()


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name):
    options = {
        "strides": (1, 1),
        "padding": ((0, 0), (0, 0)),
        "lhs_dilation": (1, 1),
        "rhs_dilation": (1, 1),
        "groups": 1,
    } | CONVOLUTIONS[name]
    lhs, rhs = (2, 9, 8, 4), (3, 3, 4 // options["groups"], 8)

    def conv(p, x):
        return lax.conv_general_dilated(
            x,
            p["w"],
            options["strides"],
            options["padding"],
            options["lhs_dilation"],
            options["rhs_dilation"],
            ("NHWC", "HWIO", "NHWC"),
            options["groups"],
        )

    out = jax.eval_shape(conv, {"w": spec(*rhs)}, spec(*lhs))
    cost = jc.cost(conv, {"w": spec(*rhs)}, spec(*lhs))
    row = row_of(cost)
    assert row.ops == ("conv_general_dilated",)
    assert row.flops == 2 * products_by_brute_force(lhs, rhs, out.shape, **options)
    assert row.flops == xla(conv, {"w": spec(*rhs)}, spec(*lhs))["flops"]
    assert row.bytes == 4 * (math.prod(lhs) + math.prod(rhs) + out.size)


def test_batch_groups_and_strings_of_padding():
    def conv(p, x):
        dims = ("NCHW", "OIHW", "NCHW")
        return lax.conv_general_dilated(
            x, p["w"], (2, 2), "SAME", dimension_numbers=dims, batch_group_count=2
        )

    args = {"w": spec(8, 4, 3, 3)}, spec(6, 4, 10, 7)
    # At stride 2, 10 rows padded (0, 1): 3 + 3 + 3 + 3 + 2; 7 columns padded (1, 1): 2 + 3 + 3 + 2.
    assert jc.cost(conv, *args).flops == 2 * 3 * 8 * 4 * 14 * 10
    assert jc.cost(conv, *args).flops == xla(conv, *args)["flops"]


def attention(p, x):
    q, k, v = (
        jnp.einsum("td,dhk->thk", x, p[name], precision="highest") for name in ("q", "k", "v")
    )
    scores = jnp.einsum("thk,shk->hts", q, k) / 4
    return jnp.einsum("hts,shk,hkd->td", jax.nn.softmax(scores), v, p["o"], optimize="optimal")


def test_attention_counts_the_products_of_activations():
    t, d, h, k = 32, 64, 4, 16
    p = {name: spec(d, h, k) for name in "qkv"} | {"o": spec(h, k, d)}
    cost = jc.cost(attention, p, spec(t, d))
    assert [row.path for row in cost.rows] == ["k", "o", "q", "v"]
    projections, products = 4 * 2 * t * d * h * k, 2 * 2 * h * t * t * k
    assert sum(row.flops for row in cost.rows) == projections
    # Division, and of softmax: maxima, subtraction, sums, division.
    rest = cost.flops - projections - products
    assert 5 * h * t * t <= rest <= 5 * h * t * t + 8 * h * t


def test_embedding_reads_its_rows_only():
    cost = jc.cost(lambda p, i: p["w"][i], {"w": spec(1000, 32)}, spec(5, dtype=jnp.int32))
    row = row_of(cost)
    assert row.ops == ("gather",)
    assert row.flops == 0
    assert row.bytes == 5 * 4 + 2 * 5 * 32 * 4
    assert row.param_bytes == 4 * 1000 * 32


def test_tied_embedding_is_one_row():
    def tied(p, i):
        return p["w"][i] @ p["w"].T

    row = row_of(jc.cost(tied, {"w": spec(100, 8)}, spec(5, dtype=jnp.int32)))
    assert row.ops == ("gather", "dot_general")
    assert row.flops == 2 * 5 * 8 * 100


def test_product_of_two_leaves_is_in_both_rows_and_once_in_the_total():
    cost = jc.cost(lambda p: p["a"] @ p["b"], {"a": spec(3, 4), "b": spec(4, 5)})
    assert [row.flops for row in cost.rows] == [120, 120]
    assert cost.flops == 120


def test_cache_moves_what_is_written():
    def write(p, x, i):
        return lax.dynamic_update_slice(p["w"], x, (i, 0))

    def read(p, i):
        return lax.dynamic_slice(p["w"], (i, 0), (2, 8))

    i = spec(dtype=jnp.int32)
    # Two indices of 4 bytes, one of which is a constant.
    assert jc.cost(write, {"w": spec(1000, 8)}, spec(2, 8), i).bytes == 2 * 4 * 16 + 8
    assert jc.cost(read, {"w": spec(1000, 8)}, i).bytes == 2 * 4 * 16 + 8


def test_scatter_moves_the_rows_that_it_changes():
    add = lambda p, i, x: p["w"].at[i].add(x)  # noqa: E731
    cost = jc.cost(add, {"w": spec(1000, 8)}, spec(3, dtype=jnp.int32), spec(3, 8))
    assert cost.bytes == 3 * 4 + 3 * 4 * 3 * 8


def test_elementwise_reductions_and_transcendentals():
    p, x = {}, spec(8, 32)
    assert jc.cost(lambda p, x: x * x + x, p, x).flops == 2 * 256
    assert jc.cost(lambda p, x: x.sum(1), p, x).flops == 256
    for f in (jnp.exp, jnp.tanh, jnp.log, jnp.sqrt, jnp.sin):
        fn = lambda p, x, f=f: f(x)  # noqa: E731
        assert jc.cost(fn, p, x).flops == xla(fn, p, x).get("flops", 0) == 0
    assert jc.cost(lambda p, x: x.T.reshape(-1).astype(jnp.bfloat16), p, x).flops == 0
    assert jc.cost(lambda p, x: lax.sort(x), p, x).flops == 0


@pytest.mark.parametrize("fused", [True, False])
def test_elementwise_bytes_are_fused(fused):
    fn = (lambda p, x: jnp.exp(x) + 1) if fused else (lambda p, x: jnp.sum(x))
    assert jc.cost(fn, {}, spec(8, 32)).bytes == (0 if fused else 4 * (256 + 1))


def test_ragged_product():
    def experts(p, x, sizes):
        return lax.ragged_dot(x, p["w"], sizes)

    cost = jc.cost(experts, {"w": spec(4, 7, 5)}, spec(9, 7), spec(4, dtype=jnp.int32))
    assert row_of(cost).flops == 2 * 9 * 7 * 5


def test_ragged_product_with_ragged_contraction():
    def gradient(p, x, sizes):
        numbers = lax.RaggedDotDimensionNumbers((([0], [0]), ([], [])), [0], [])
        return lax.ragged_dot_general(x, p["w"], sizes, numbers)

    cost = jc.cost(gradient, {"w": spec(9, 5)}, spec(9, 7), spec(3, dtype=jnp.int32))
    assert row_of(cost).flops == 2 * 9 * 7 * 5


# Control flow.


def test_scan_over_layers_counts_every_layer():
    def layers(p, x):
        return lax.scan(lambda h, w: (h @ w, None), x, p["w"])[0]

    cost = jc.cost(layers, {"w": spec(6, 8, 8)}, spec(3, 8))
    assert row_of(cost).flops == cost.flops == 6 * 2 * 3 * 8 * 8
    assert row_of(cost).bytes == 6 * 4 * (3 * 8 + 8 * 8 + 3 * 8)


def test_nested_scans_multiply():
    def fn(p, x):
        inner = lambda h: lax.scan(lambda h, _: (h @ p["w"], None), h, length=3)[0]  # noqa: E731
        return lax.scan(lambda h, _: (inner(h), None), x, length=5)[0]

    assert row_of(jc.cost(fn, {"w": spec(8, 8)}, spec(3, 8))).flops == 15 * 2 * 3 * 8 * 8


def test_fori_loop_with_static_bounds():
    fn = lambda p, x: lax.fori_loop(0, 5, lambda i, h: h @ p["w"], x)  # noqa: E731
    cost = jc.cost(fn, {"w": spec(8, 8)}, spec(3, 8))
    assert row_of(cost).flops == 5 * 2 * 3 * 8 * 8
    assert cost.bounded


def test_while_counts_once_and_says_so():
    fn = lambda p, x, n: lax.fori_loop(0, n, lambda i, h: h @ p["w"], x)  # noqa: E731
    cost = jc.cost(fn, {"w": spec(8, 8)}, spec(3, 8), spec(dtype=jnp.int32))
    assert row_of(cost).flops == 2 * 3 * 8 * 8
    assert not cost.bounded


@pytest.mark.parametrize("swap", [False, True])
def test_cond_counts_its_costliest_branch(swap):
    def fn(p, i, x):
        branches = [lambda x: x @ p["small"] @ p["back"], lambda x: x @ p["w"], lambda x: x]
        return lax.switch(i, branches[::-1] if swap else branches, x)

    p = {"w": spec(16, 16), "small": spec(16, 2), "back": spec(2, 16)}
    cost = jc.cost(fn, p, spec(dtype=jnp.int32), spec(3, 16))
    assert [row.path for row in cost.rows] == ["w"]
    assert row_of(cost).flops == 2 * 3 * 16 * 16
    assert cost.flops == row_of(cost).flops + 1  # the index is clamped


@pytest.mark.parametrize("swap", [False, True])
def test_of_branches_without_operations_the_one_that_moves_more(swap):
    branches = [lambda x: lax.rev(x, (0,)), lax.sort]
    fn = lambda p, flag, x: lax.cond(flag, *branches[:: -1 if swap else 1], x)  # noqa: E731
    assert jc.cost(fn, {}, spec(dtype=jnp.bool_), spec(64)).bytes == 2 * 4 * 64


def test_cond_in_a_cond():
    def fn(p, x):
        inner = lambda x: lax.cond(x.sum() > 0, lambda x: x @ p["a"], lambda x: -x, x)  # noqa: E731
        return lax.cond(x.sum() > 0, inner, lambda x: x @ p["b"] @ p["b"], x)

    cost = jc.cost(fn, {"a": spec(8, 8), "b": spec(8, 8)}, spec(3, 8))
    assert [row.path for row in cost.rows] == ["b"]


def test_an_unbounded_loop_in_the_cheaper_branch_shows():
    def fn(p, x, n):
        loop = lambda x: lax.fori_loop(0, n, lambda i, h: h + 1, x)  # noqa: E731
        return lax.cond(n > 3, loop, lambda x: x @ p["w"], x)

    cost = jc.cost(fn, {"w": spec(8, 8)}, spec(3, 8), spec(dtype=jnp.int32))
    assert row_of(cost).flops == 2 * 3 * 8 * 8
    assert not cost.bounded


def test_remat_jit_and_custom_derivatives_are_entered():
    @jax.custom_vjp
    def custom(w, x):
        return x @ w

    custom.defvjp(lambda w, x: (x @ w, None), lambda r, g: (None, None))

    def fn(p, x):
        x = jax.checkpoint(lambda x: x @ p["a"])(x)
        return custom(p["c"], jax.jit(lambda x: x @ p["b"])(x))

    cost = jc.cost(fn, {name: spec(8, 8) for name in "abc"}, spec(3, 8))
    assert [row.flops for row in cost.rows] == [384, 384, 384]


def test_remat_recomputes_in_the_gradient():
    def loss(p, x, wrap):
        return wrap(lambda x: jnp.sin(x @ p["a"]) @ p["b"])(x).sum()

    p, x = {"a": spec(8, 8), "b": spec(8, 8)}, spec(3, 8)
    plain = jc.cost(lambda p, x: jax.grad(loss)(p, x, lambda f: f), p, x)
    remat = jc.cost(lambda p, x: jax.grad(loss)(p, x, jax.checkpoint), p, x)
    assert [row.flops for row in plain.rows] == [384, 2 * 384]
    assert [row.flops for row in remat.rows] == [2 * 384, 2 * 384]
    assert remat.flops == plain.flops + 384


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_sharded_map_counts_one_device(kind):
    mesh = mesh_of(kind)
    rows = jax.sharding.PartitionSpec("d")
    local = jax.shard_map(
        lambda w, x: x @ w, mesh=mesh, in_specs=(jax.sharding.PartitionSpec(), rows), out_specs=rows
    )
    x = jax.device_put(jnp.ones((16, 8)), jax.NamedSharding(mesh, rows))
    w = jax.device_put(jnp.ones((8, 5)), jax.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    cost = jc.cost(lambda p, x: local(p["w"], x), {"w": w}, x)
    assert row_of(cost).flops == 2 * 16 * 8 * 5 // 4


def test_sharded_parameters_count_as_a_whole():
    sharding = jax.NamedSharding(mesh_of("explicit"), jax.sharding.PartitionSpec(None, "d"))
    p = {"w": jax.device_put(jnp.ones((8, 12)), sharding)}
    cost = jc.cost(linear, p, spec(3, 8))
    assert row_of(cost).flops == 2 * 3 * 8 * 12
    assert cost.param_bytes == 4 * 8 * 12


# Against XLA.


def mlp(p, x):
    for w, b in p:
        x = jax.nn.relu(x @ w + jnp.broadcast_to(b, (x.shape[0], b.shape[0])))
    return x


def cnn(p, x):
    dims = ("NHWC", "HWIO", "NHWC")
    for i, stride in enumerate((1, 2, 2)):
        x = lax.conv_general_dilated(
            x, p[f"conv{i}"], (stride, stride), "SAME", dimension_numbers=dims
        )
        x = jax.nn.relu(x)
    return x.mean((1, 2)) @ p["head"]


def block(p, x):
    def norm(x):
        x = x - x.mean(-1, keepdims=True)
        return x * lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)

    x = x + jax.vmap(lambda x: attention(p, x))(norm(x))
    return x + jnp.tanh(norm(x) @ p["up"]) @ p["down"]


def unrolled(p, x):
    for i in range(2):
        x = block(jax.tree.map(lambda w: w[i], p), x)  # noqa: B023
    return x


def scanned(p, x):
    return lax.scan(lambda x, p: (block(p, x), None), x, p)[0]


BLOCK = {name: (128, 4, 32) for name in "qkv"} | {
    "o": (4, 32, 128),
    "up": (128, 512),
    "down": (512, 128),
}
STACK = {name: spec(2, *shape) for name, shape in BLOCK.items()}
MODELS = {
    "mlp": (mlp, [(spec(256, 256), spec(256))] * 3, spec(64, 256)),
    "cnn": (
        cnn,
        {
            "conv0": spec(3, 3, 3, 16),
            "conv1": spec(3, 3, 16, 32),
            "conv2": spec(3, 3, 32, 64),
            "head": spec(64, 10),
        },
        spec(8, 32, 32, 3),
    ),
    "transformer": (
        block,
        {name: spec(*shape) for name, shape in BLOCK.items()},
        spec(2, 64, 128),
    ),
    "two blocks": (unrolled, STACK, spec(2, 64, 128)),
}


@pytest.mark.parametrize("name", MODELS)
def test_total_agrees_with_xla(name):
    fn, p, x = MODELS[name]
    ours, theirs = jc.cost(fn, p, x).flops, xla(fn, p, x)["flops"]
    assert abs(ours / theirs - 1) < 0.02


def test_gradient_agrees_with_xla():
    fn, p, x = MODELS["mlp"]
    grad = jax.grad(lambda p, x: (fn(p, x) ** 2).sum())
    assert abs(jc.cost(grad, p, x).flops / xla(grad, p, x)["flops"] - 1) < 0.02


def test_scanned_blocks_cost_what_unrolled_ones_do():
    # XLA counts the body of a loop once.
    x = spec(2, 64, 128)
    assert jc.cost(scanned, STACK, x).flops == jc.cost(unrolled, STACK, x).flops
    assert xla(scanned, STACK, x)["flops"] < 0.6 * jc.cost(scanned, STACK, x).flops


# The roofline.


def test_seconds_by_hand():
    def fn(p, x):
        return p["w"][x.argmax(1)] @ p["v"]

    p, x = {"w": spec(100, 64), "v": spec(64, 64)}, spec(32, 100)
    flops, rate = 1e9, 1e8
    cost = jc.cost(fn, p, x, flops_per_second=flops, bytes_per_second=rate)
    gather, product = (cost.rows[1], cost.rows[0])
    assert gather.seconds == pytest.approx((32 * 4 + 2 * 32 * 64 * 4) / rate)
    moved = 4 * (32 * 64 + 64 * 64 + 32 * 64)
    assert product.seconds == pytest.approx(max(2 * 32 * 64 * 64 / flops, moved / rate))
    argmax = max(3200 / flops, 4 * (3200 + 32) / rate)
    index = 3 * 32 / flops  # compare, add and select for negative indices, fused
    assert cost.seconds == pytest.approx(gather.seconds + product.seconds + argmax + index, 1e-3)


@pytest.mark.parametrize(("flops", "moved"), [(1.0, 1e30), (1e30, 1.0)])
def test_each_bound_alone(flops, moved):
    cost = jc.cost(
        linear, {"w": spec(8, 5)}, spec(3, 8), flops_per_second=flops, bytes_per_second=moved
    )
    assert cost.seconds == (240 if flops == 1 else 4 * (24 + 40 + 15))
    assert row_of(cost).seconds == cost.seconds


def test_maxima_are_taken_per_equation():
    def fn(p, x, i):
        return (x @ p["w"]).sum(), p["e"][i]

    # The product is bound by operations, the gather by bytes.
    p = {"w": spec(64, 64), "e": spec(9, 512)}
    args = spec(64, 64), spec(64, dtype=jnp.int32)
    cost = jc.cost(fn, p, *args, flops_per_second=1e6, bytes_per_second=1e6)
    assert cost.seconds > max(cost.flops, cost.bytes) / 1e6 * 1.01


def test_loops_take_their_trips():
    fn = lambda p, x: lax.scan(lambda h, _: (h @ p["w"], None), x, length=7)[0]  # noqa: E731
    rates = {"flops_per_second": 1e6, "bytes_per_second": 1e6}
    p, x = {"w": spec(8, 8)}, spec(3, 8)
    once = jc.cost(lambda p, x: x @ p["w"], p, x, **rates)
    assert jc.cost(fn, p, x, **rates).seconds == pytest.approx(7 * once.seconds)


def test_rates_are_mapped_and_jitted():
    p, x = {"w": spec(40000, 40000)}, spec(40000, 40000)  # more operations than an int32 holds

    def seconds(flops, moved):
        return jc.cost(linear, p, x, flops_per_second=flops, bytes_per_second=moved).seconds

    flops, moved = jnp.array([1e12, 1e15]), jnp.array([1e9, 1e12])
    expected = [[seconds(float(f), float(m)) for m in moved] for f in flops]
    mapped = jax.vmap(jax.vmap(seconds, (None, 0)), (0, None))(flops, moved)
    np.testing.assert_allclose(mapped, expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(seconds)(1e12, 1e9), expected[0][0], rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(lambda f: seconds(f, 1e9))(flops)[1], expected[1][0])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32])
def test_rates_of_any_dtype(dtype):
    # Strict promotion is on.
    rate, other = jnp.asarray(1024, dtype), np.float64(2048)
    for pair in ((rate, other), (other, rate), (rate, 2048), (4096, rate)):
        cost = jc.cost(
            linear,
            {"w": spec(8, 5)},
            spec(3, 8),
            flops_per_second=pair[0],
            bytes_per_second=pair[1],
        )
        assert cost.seconds.dtype == jnp.float32
        expected = max(240 / float(pair[0]), 316 / float(pair[1]))
        np.testing.assert_allclose(cost.seconds, expected, rtol=1e-6)


# Compressed leaves.

KINDS = {
    "low rank": jc.low_rank(4),
    "int8": jc.quantize(8),
    "int4": jc.quantize(4),
    "int4 groups": jc.quantize(4, group_size=16),
    "binary": jc.quantize(1),
    "sparse": jc.prune(0.9),
    "2:4": jc.prune(nm=(2, 4)),
    "codebook": jc.cluster(16),
    "blocks": jc.prune(0.5, groups=jc.pruning.blocks(8, 4)),
    "sparse int4": jc.chain(jc.prune(0.5), jc.quantize(4)),
    "low rank int8": jc.chain(jc.low_rank(4), jc.quantize(8)),
}
DENSE_PRODUCT = 2 * 16 * 64 * 32


@pytest.mark.parametrize("kind", KINDS)
def test_compressed_leaf_is_one_row(kind):
    packed = jc.pack(KINDS[kind], weights(64, 32))
    cost = jc.cost(linear, packed, spec(16, 64))
    (row,) = cost.rows
    assert row.path == "w"
    assert row.ops == ("dot_general",)
    assert row.param_bytes == packed["w"].nbytes == cost.param_bytes
    assert row.dense_param_bytes == cost.dense_param_bytes == 4 * 64 * 32
    assert row.param_bytes < row.dense_param_bytes
    assert row.flops <= cost.flops
    assert row.bytes <= cost.bytes
    if not kind.startswith("low rank"):
        assert row.flops >= DENSE_PRODUCT


def test_low_rank_counts_two_thin_products():
    packed = jc.pack(jc.low_rank(4), weights(64, 32))
    cost = jc.cost(linear, packed, spec(16, 64))
    assert cost.rows[0].flops == cost.flops == 2 * 16 * 4 * (64 + 32)
    moved = 16 * 64 + 64 * 4 + 16 * 4 + 16 * 4 + 4 * 32 + 16 * 32
    assert cost.rows[0].bytes == cost.bytes == 4 * moved


def test_int8_counts_the_product_and_the_scale():
    cost = jc.cost(linear, jc.pack(jc.quantize(8), weights(64, 32)), spec(16, 64))
    assert cost.rows[0].flops == DENSE_PRODUCT
    assert cost.flops == DENSE_PRODUCT + 16 * 32


def test_decoding_is_counted_with_its_leaf():
    dense = jc.cost(linear, weights(64, 32), spec(16, 64)).rows[0]
    row = jc.cost(linear, jc.pack(jc.quantize(4), weights(64, 32)), spec(16, 64)).rows[0]
    # Four planes: an `and`, a comparison, a product and an `or` for each bit.
    assert row.flops == dense.flops + 4 * 4 * 64 * 32
    assert row.bytes == dense.bytes


def test_compressed_and_dense_leaves_together():
    p = weights(64, 32) | {"v": weights(32, 8)["w"], "b": jnp.ones(8)}
    packed = jc.pack(jc.masked(jc.quantize(4), "w"), p)
    fn = lambda p, x: x @ p["w"] @ p["v"] + p["b"][None]  # noqa: E731
    cost, dense = jc.cost(fn, packed, spec(16, 64)), jc.cost(fn, p, spec(16, 64))
    assert [row.path for row in cost.rows] == ["v", "w"]
    assert row_of(cost, "v") == row_of(dense, "v")
    assert cost.param_bytes == packed["w"].nbytes + 4 * (32 * 8 + 8)
    assert cost.dense_param_bytes == dense.param_bytes


def test_a_leaf_that_is_all_the_params():
    leaf = jc.pack(jc.low_rank(4), weights(64, 32))["w"]
    (row,) = jc.cost(lambda w, x: x @ w, leaf, spec(16, 64)).rows
    assert row.path == ""
    assert row.flops == 2 * 16 * 4 * (64 + 32)


@pytest.mark.parametrize("kind", ["low rank", "int8", "int4"])
def test_compressed_embedding(kind):
    packed = jc.pack(KINDS[kind], weights(64, 32))
    (row,) = jc.cost(lambda p, i: p["w"][i], packed, spec(5, dtype=jnp.int32)).rows
    assert row.ops[0] == "gather"
    assert row.param_bytes == packed["w"].nbytes


@pytest.mark.parametrize("kind", ["int8", "int4", "sparse"])
def test_activations_that_the_function_makes(kind):
    packed = jc.pack(KINDS[kind], weights(64, 32))
    given = jc.cost(linear, packed, spec(16, 64)).rows[0]
    (made,) = jc.cost(lambda p: jnp.exp(3 * (jnp.ones((16, 64)) @ p["w"])), packed).rows
    assert made.flops == given.flops  # none of what follows the product
    (rows,) = jc.cost(lambda p: p["w"][jnp.arange(3)], packed).rows
    assert rows.ops == ("gather",)


@pytest.mark.parametrize("rows", [1, 16, 4096])
def test_blocks_that_are_kept_are_counted(rows):
    packed = jc.pack(jc.prune(0.9, groups=jc.pruning.blocks(32, 32)), weights(640, 640))
    (row,) = jc.cost(linear, packed, spec(rows, 640)).rows
    assert packed["w"].values.shape == (40, 32, 32)
    assert row.ops == ("dot_general",)
    # The product, and finding where in the grid of 20 x 20 the blocks lie.
    assert 0 <= row.flops - 2 * rows * 40 * 32 * 32 < 20 * 20 * 20 + 2 * rows * 40 * 32
    assert row.param_bytes == packed["w"].nbytes


@pytest.mark.parametrize("kind", ["low rank", "int8", "int4", "sparse", "blocks"])
def test_compressed_layers_in_a_scan(kind):
    def layers(p, x):
        return lax.scan(lambda h, w: (h @ w, None), x, p["w"])[0]

    packed = jc.pack(KINDS[kind], weights(6, 32, 32))
    (row,) = jc.cost(layers, packed, spec(3, 32)).rows
    assert row.ops == ("dot_general",)
    assert row.param_bytes == packed["w"].nbytes
    if kind == "low rank":
        assert row.flops == 6 * 2 * 3 * 4 * (32 + 32)
    elif kind == "int8":
        assert row.flops == 6 * 2 * 3 * 32 * 32
    else:
        assert row.flops > 6 * 2 * 3 * 32 * 32


def test_abstract_compressed_leaves():
    packed = jc.pack(jc.quantize(4), weights(64, 32))
    abstract = jax.eval_shape(lambda p: p, packed)
    assert jc.cost(linear, abstract, spec(16, 64)) == jc.cost(linear, packed, spec(16, 64))


# Edges and errors.


def test_nothing_to_count():
    cost = jc.cost(lambda p, x: x, {}, spec(3), flops_per_second=1.0, bytes_per_second=1.0)
    assert cost == jc.tracing.Cost([], 0, 0, 0, 0, 0.0, True)


def test_empty_leaves_and_static_leaves():
    p = {"w": spec(0, 5), "none": None, "name": "layer", "n": 3, "key": jax.random.key(0)}
    cost = jc.cost(linear, p, spec(3, 0), flops_per_second=1.0, bytes_per_second=1.0)
    assert row_of(cost).flops == 0
    assert row_of(cost).param_bytes == 0
    assert cost.bytes == 3 * 5 * 4


def test_keywords_go_to_the_function():
    fn = lambda p, x, *, times: sum(x @ p["w"] for _ in range(times))  # noqa: E731
    cost = jc.cost(fn, {"w": spec(8, 5)}, x=spec(3, 8), times=3)
    assert row_of(cost).flops == 3 * 240


def test_not_a_function():
    with pytest.raises(TypeError, match="cost: `fn` must be a function of the params"):
        jc.cost({"w": jnp.ones(3)}, linear)


@pytest.mark.parametrize("given", ["flops_per_second", "bytes_per_second"])
def test_one_rate_alone(given):
    other = {"flops_per_second", "bytes_per_second"} - {given}
    with pytest.raises(ValueError, match=f"cost: `{other.pop()}` must be given with the other"):
        jc.cost(linear, {"w": spec(8, 5)}, spec(3, 8), **{given: 1.0})


@pytest.mark.parametrize("name", ["flops_per_second", "bytes_per_second"])
@pytest.mark.parametrize(
    ("value", "error"),
    [
        (0.0, ValueError),
        (-1.0, ValueError),
        (math.nan, ValueError),
        ("fast", TypeError),
        (True, TypeError),
        (jnp.ones(3), TypeError),
        (lambda step: 1.0, TypeError),
    ],
)
def test_bad_rates(name, value, error):
    rates = {"flops_per_second": 1.0, "bytes_per_second": 1.0, name: value}
    with pytest.raises(error, match=f"cost: `{name}` must be"):
        jc.cost(linear, {"w": spec(8, 5)}, spec(3, 8), **rates)


def test_compressed_leaf_without_a_rule():
    packed = jc.pack(jc.low_rank(4), weights(64, 32))
    with pytest.raises(TypeError, match="'w'"):
        jc.cost(lambda p, x: x @ (p["w"] + 1), packed, spec(16, 64))
