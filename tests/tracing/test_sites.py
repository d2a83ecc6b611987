"""Which equation uses which leaf."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

import jaxcompress as jc
from tests.tracing.models import MODELS


def found(fn, params, *args):
    return [(s.name, s.op, s.weight) for s in jc.sites(fn, params, *args)]


W, X = jnp.ones((8, 4)), jnp.ones((3, 8))


@pytest.mark.parametrize(
    "view",
    [
        lambda w: w,
        lambda w: w.T.T,
        lambda w: w.astype(jnp.bfloat16).astype(jnp.float32),
        lambda w: w.reshape(2, 4, 4).reshape(8, 4),
        lambda w: jnp.broadcast_to(w, (2, 8, 4))[0],
        lambda w: jax.lax.stop_gradient(w[::-1]),
        lambda w: jax.lax.optimization_barrier(w),
        lambda w: jnp.concatenate([w[:4], w[4:]]),
        jax.jit(lambda w: w.T.T),
        jax.checkpoint(lambda w: w.T.T),
    ],
)
def test_views_are_followed(view):
    fn = lambda p, x: x @ view(p["w"])  # noqa: E731
    assert found(fn, {"w": W}, X) == [("w", "dot_general", "float32[8, 4]")]


def test_what_is_computed_of_a_leaf_is_no_leaf():
    assert found(lambda p, x: x @ (p["w"] * 2), {"w": W}, X) == []
    assert found(lambda p, x: x @ jnp.concatenate([p["w"], p["w"]], 1)[:, :4], {"w": W}, X) != []


def test_concatenated_leaves_are_one_site():
    def fn(p, x):
        gates = jnp.concatenate([p["i"], p["f"]], axis=1)
        return jax.lax.scan(lambda h, x: (jnp.tanh(x @ gates)[:, :4], None), x[0, :, :4], x)[0]

    params = {"i": W, "f": W, "o": jnp.ones((8, 2))}
    x = jnp.ones((5, 3, 8))
    assert found(fn, params, x) == [("i + f", "dot_general", "float32[8, 8]")]
    (stats,) = jc.calibrate(fn, params, [x], gram=True).values()
    assert stats.gram.count == 15
    rows = jc.cost(fn, params, x).rows
    assert [row.path for row in rows] == ["f", "i"]
    assert {row.flops for row in rows} == {5 * 2 * 3 * 8 * 8}
    half = lambda p, x: x @ jnp.concatenate([p["i"], 2 * p["f"]], axis=1)  # noqa: E731
    assert found(half, params, x) == []


def test_every_operation():
    params = {
        "table": jnp.ones((10, 8)),
        "einsum": jnp.ones((8, 2, 4)),
        "conv": jnp.ones((3, 8, 8)),
        "depthwise": jnp.ones((3, 1, 8)),
        "experts": jnp.ones((2, 8, 8)),
    }

    def fn(p, tokens):
        x = p["table"][tokens]
        numbers = ("NWC", "WIO", "NWC")
        conv = functools.partial(
            jax.lax.conv_general_dilated,
            window_strides=(1,),
            padding="SAME",
            dimension_numbers=numbers,
        )
        x = conv(x, p["conv"], rhs_dilation=(2,))
        x = conv(x, p["depthwise"], feature_group_count=8)
        x = jax.lax.conv_transpose(x, p["conv"], (1,), "SAME", dimension_numbers=numbers)
        x = jnp.einsum("btd,dhk->bthk", x, p["einsum"]).reshape(-1, 8)
        return jax.lax.ragged_dot(x, p["experts"], jnp.array([5, 7], jnp.int32))

    names = [(s.name, s.op) for s in jc.sites(fn, params, jnp.ones((2, 6), jnp.int32))]
    assert names == [
        ("table", "gather"),
        ("conv", "conv_general_dilated"),
        ("depthwise", "conv_general_dilated"),
        ("conv:1", "conv_general_dilated"),
        ("einsum", "dot_general"),
        ("experts", "ragged_dot_general"),
    ]


def test_tied_leaf_is_two_sites_of_one_path():
    fn = lambda p, t: jnp.tanh(p["table"][t]) @ p["table"].T  # noqa: E731
    sites = jc.sites(fn, {"table": jnp.ones((10, 8))}, jnp.arange(3))
    assert [s.name for s in sites] == ["table", "table:1"]
    assert {s.path for s in sites} == {"table"}


def test_scanned_layers_keep_their_path():
    def fn(p, x):
        return jax.lax.scan(lambda x, layer: (jnp.tanh(x @ layer["w"]), None), x, p["blocks"])[0]

    (site,) = jc.sites(fn, {"blocks": {"w": jnp.ones((5, 8, 8))}}, X)
    assert (site.path, site.stacked, site.trips) == ("blocks/w", 1, 5)
    assert site.weight == "float32[8, 8]"
    # By hand: 2 * 3 * 8 * 8 for each of five layers; weight, input and output of four bytes.
    assert site.flops == 5 * 2 * 3 * 8 * 8
    assert site.bytes == 5 * 4 * (8 * 8 + 3 * 8 + 3 * 8)


def test_loops_and_branches():
    def fn(p, x):
        x = jax.lax.fori_loop(0, 4, lambda i, x: x @ p["w"], x)
        x = jax.lax.cond(x.sum() > 0, lambda x: x @ p["v"], lambda x: x, x)
        return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ p["w"], x)

    sites = jc.sites(fn, {"w": jnp.ones((8, 8)), "v": jnp.ones((8, 8))}, X)
    assert [(s.name, s.trips, s.stacked) for s in sites] == [
        ("w", 4, 0),
        ("v", 1, 0),
        ("w:1", None, 0),
    ]


def test_a_leaf_that_a_loop_changes_is_no_leaf_any_more():
    def fn(p, x):
        w = jax.lax.fori_loop(0, 3, lambda i, w: w + 1, p["w"])
        return x @ w

    assert found(fn, {"w": W}, X) == []


def test_scope_of_a_site():
    def fn(p, x):
        with jax.named_scope("encoder"):
            return jax.jit(jax.named_call(lambda x: x @ p["w"], name="head"))(x)

    (site,) = jc.sites(fn, {"w": W}, X)
    assert site.scope == "encoder/head"


def test_parts_of_compressed_leaves_are_sites():
    small = jc.pack(jc.low_rank(2), {"w": W})
    names = [s.name for s in jc.sites(jc.lift(lambda p, x: x @ p["w"]), small, X)]
    assert len(names) == 2
    assert all(name.startswith("w/") for name in names)


def test_shapes_are_enough():
    shapes = jax.eval_shape(lambda: {"w": W})
    assert found(lambda p, x: x @ p["w"], shapes, jax.ShapeDtypeStruct((3, 8), jnp.float32)) == [
        ("w", "dot_general", "float32[8, 4]")
    ]


@pytest.mark.parametrize("name", MODELS)
def test_every_kernel_of_the_held_out_models_has_a_site(name):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        model = MODELS[name]()
        sites = jc.sites(model.apply, model.params, *model.args)
    kernels = {
        path
        for path, x in jc.tree.leaves_with_paths(model.params)
        if jc.tree.is_weight(path, x) and not re.search("bias|scale", path)
    }
    assert {path for site in sites for path in site.path.split(" + ")} == kernels


def test_not_a_function():
    with pytest.raises(TypeError, match=r"sites: `fn` must be a function of the params"):
        jc.sites({"w": W}, X)
