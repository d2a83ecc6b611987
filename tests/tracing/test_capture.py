"""Values inside of a function, beside its result."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from tests.conftest import mesh_of


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


def mlp(params, x):
    with jax.named_scope("hidden"):
        x = jnp.tanh(x @ params["w1"])
    return jc.name(x, "features") @ params["w2"]


PARAMS, X = {"w1": draw(8, 8), "w2": draw(8, 4)}, draw(3, 8)
HIDDEN = jnp.tanh(X @ PARAMS["w1"])


@pytest.mark.parametrize(
    ("where", "want"), [("hidden", HIDDEN), ("features", HIDDEN), ("w1", X @ PARAMS["w1"])]
)
def test_scope_tag_and_parameter(where, want):
    y, values = jax.jit(jc.capture(mlp, where))(PARAMS, X)
    assert list(values) == [where]
    np.testing.assert_allclose(values[where], want, rtol=1e-6)
    np.testing.assert_array_equal(y, jax.jit(mlp)(PARAMS, X))


def test_names_in_the_order_of_the_program():
    shapes = jc.capture_names(mlp, PARAMS, X)
    assert list(shapes) == ["hidden", "features", "w1", "w2"]
    assert shapes["w2"].shape == (3, 4)


def test_nothing_is_computed_twice():
    capturing = jc.capture(mlp, "**")
    count = lambda fn: str(jax.make_jaxpr(fn)(PARAMS, X)).count("= dot_general")  # noqa: E731
    assert count(capturing) == count(mlp) == 2


def test_a_name_costs_nothing_under_jit():
    plain = lambda x: jnp.tanh(x) * 2  # noqa: E731
    named = lambda x: jc.name(jnp.tanh(x), "t") * 2  # noqa: E731

    def instructions(fn):
        text = jax.jit(fn).lower(X).compile().as_text()
        return re.findall(r"= \S+ ([a-z-]+)\(", text)

    assert "tanh" in instructions(plain)
    assert instructions(named) == instructions(plain)


def test_shapes_only():
    y, values = jax.eval_shape(jc.capture(mlp, "hidden"), PARAMS, X)
    assert (y.shape, values["hidden"].shape) == ((3, 4), (3, 8))


def test_gradient_goes_through_the_values():
    loss = lambda p: jnp.sum(jnp.square(jc.capture(mlp, "hidden")(p, X)[1]["hidden"]))  # noqa: E731
    want = jax.grad(lambda p: jnp.sum(jnp.square(jnp.tanh(X @ p["w1"]))))(PARAMS)
    got = jax.grad(loss)(PARAMS)
    np.testing.assert_allclose(got["w1"], want["w1"], rtol=1e-5)
    np.testing.assert_array_equal(got["w2"], 0)


def test_scan_stacks():
    blocks = {"w": draw(4, 8, 8)}

    def fn(params, x):
        def step(x, w):
            return jc.name(jnp.tanh(x @ w), "block"), None

        return jax.lax.scan(jax.checkpoint(step), x, params["w"])[0]

    y, values = jax.jit(jc.capture(fn, "*"))(blocks, X)
    x, want = X, []
    for w in blocks["w"]:
        x = jnp.tanh(x @ w)
        want.append(x)
    np.testing.assert_allclose(values["block"], jnp.stack(want), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(values["block"][-1], y)
    assert values["w"].shape == (4, 3, 8)


def test_while_keeps_the_last_and_cond_the_chosen():
    def fn(params, x):
        def step(state):
            i, x = state
            return i + 1, jc.name(jnp.tanh(x @ params["w1"]), "loop")

        _, x = jax.lax.while_loop(lambda s: s[0] < 3, step, (0, x))
        positive = lambda x: jc.name(x + 1, "positive")  # noqa: E731
        return jax.lax.cond(params["flag"] > 0, positive, lambda x: jc.name(x - 1, "other"), x)

    for flag in (1.0, -1.0):
        y, values = jax.jit(jc.capture(fn, "*"))({"w1": PARAMS["w1"], "flag": flag}, X)
        x = X
        for _ in range(3):
            x = jnp.tanh(x @ PARAMS["w1"])
        np.testing.assert_allclose(values["loop"], x, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(y, x + flag, rtol=1e-5, atol=1e-6)
        chosen, other = ("positive", "other") if flag > 0 else ("other", "positive")
        np.testing.assert_array_equal(values[chosen], y)
        np.testing.assert_array_equal(values[other], 0)


def test_shards_are_stacked():
    @functools.partial(
        jax.shard_map, mesh=mesh_of("auto"), in_specs=(P(), P("d")), out_specs=P("d")
    )
    def fn(params, x):
        return jc.name(jnp.tanh(x @ params["w1"]), "shard") @ params["w2"]

    x = draw(8, 8)
    _, values = jax.jit(jc.capture(fn, "shard"))(PARAMS, x)
    want = jnp.tanh(x @ PARAMS["w1"]).reshape(4, 2, 8)
    np.testing.assert_allclose(values["shard"], want, rtol=1e-5, atol=1e-6)


def test_custom_derivatives_survive():
    @jax.custom_vjp
    def doubled(x):
        return jc.name(jnp.tanh(x), "inside")

    doubled.defvjp(lambda x: (doubled(x), x), lambda x, g: (2 * g,))
    fn = lambda p, x: doubled(x @ p["w1"])  # noqa: E731

    def loss(p):
        y, values = jc.capture(fn, "inside")(p, X)
        return jnp.sum(y) + 0 * jnp.sum(values["inside"])

    want = jax.grad(lambda p: jnp.sum(fn(p, X)))(PARAMS)
    np.testing.assert_allclose(jax.grad(loss)(PARAMS)["w1"], want["w1"], rtol=1e-6)


def test_linen_modules_by_name():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            for i in range(2):
                x = nn.tanh(nn.Dense(8, name=f"blocks_{i}")(x))
            return x

    params = Net().init(jax.random.key(0), X)
    _, values = jc.capture(Net().apply, "Net/blocks_*")(params, X)
    _, state = Net().apply(params, X, capture_intermediates=True)
    assert len(values) == 2
    for i in range(2):
        want = state["intermediates"][f"blocks_{i}"]["__call__"][0]
        np.testing.assert_array_equal(values[f"Net/blocks_{i}"], want)


def test_vmap_equals_a_loop():
    xs, run = draw(4, 3, 8), jc.capture(mlp, "hidden")
    ys, values = jax.vmap(run, in_axes=(None, 0))(PARAMS, xs)
    for i, x in enumerate(xs):
        y, value = run(PARAMS, x)
        np.testing.assert_allclose(ys[i], y, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(values["hidden"][i], value["hidden"], rtol=1e-5, atol=1e-6)


def test_lifted_functions_are_captured():
    small = jc.pack(jc.low_rank(2), PARAMS)
    _, values = jc.capture(jc.lift(mlp), "features")(small, X)
    want = jnp.tanh(X @ jc.todense(small)["w1"])
    np.testing.assert_allclose(values["features"], want, rtol=1e-4, atol=1e-5)


def test_bad_input():
    with pytest.raises(ValueError, match=r"(?s)capture: .*'nothing'.*hidden"):
        jc.capture(mlp, "nothing")(PARAMS, X)
    with pytest.raises(TypeError, match=r"capture: `fn` must be a function"):
        jc.capture(3, "hidden")
    with pytest.raises(TypeError, match=r"capture_names: `fn` must be a function"):
        jc.capture_names(3)
    with pytest.raises(TypeError, match=r"name: `tag` must be a string, got int 3"):
        jc.name(X, 3)
