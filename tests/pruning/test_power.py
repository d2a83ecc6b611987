"""Powerpropagation against the paper's formulas in NumPy, and inside of a training loop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxcompress as jc
from jaxcompress.pruning import powerpropagation
from tests.conftest import counting_jit, lenient

POWERS = [1.0, 1.5, 2.0, 3.0, 5.0]
powers = pytest.mark.parametrize("power", POWERS)


def values(*shape, seed=0, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def applied(params, updates):
    with jax.numpy_dtype_promotion("standard"):
        return optax.apply_updates(params, updates)


@powers
def test_both_ways_are_the_papers_formulas(power):
    w = values(6, 4)
    r = powerpropagation(power)
    z = r.init({"w": w})["w"]
    exact = np.asarray(w, np.float64)
    np.testing.assert_allclose(z, np.sign(exact) * np.abs(exact) ** (1 / power), rtol=2e-6)
    theta = np.asarray(values(6, 4, seed=1), np.float64)
    forward = r.apply({"w": jnp.asarray(theta, jnp.float32)})["w"]
    np.testing.assert_allclose(forward, theta * np.abs(theta) ** (power - 1), rtol=5e-6)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(st.floats(1e-6, 1e6), st.sampled_from(POWERS))
def test_there_and_back_is_the_same_up_to_rounding(x, power):
    w = jnp.array([[x, -x]], jnp.float32)
    r = powerpropagation(power)
    np.testing.assert_allclose(r.apply(r.init({"w": w}))["w"], w, rtol=2e-6 * power)


@powers
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_there_and_back_in_narrow_dtypes(power, dtype):
    w = values(16, 8, dtype=dtype)
    r = powerpropagation(power)
    latents = r.init({"w": w})
    back = r.apply(latents)["w"]
    assert latents["w"].dtype == back.dtype == dtype
    bound = 2 * power * float(jnp.finfo(dtype).eps)
    exact = np.asarray(w, np.float64)
    np.testing.assert_allclose(np.asarray(back, np.float64), exact, rtol=max(bound, 2e-6))
    if dtype == jnp.bfloat16:  # the bound of the docstring
        gap = np.abs(np.asarray(back, np.float64) - exact)
        assert np.all(gap <= (power + 1) * 2**-8 * np.abs(exact))
    same = jnp.asarray([[0.0, 1.0, -1.0, jnp.inf]], dtype)
    np.testing.assert_array_equal(r.apply(r.init({"w": same}))["w"], same)
    if power == 1:
        np.testing.assert_array_equal(back, w)


@powers
def test_gradients_are_finite_at_zero_and_right_elsewhere(power):
    z = jnp.array([[0.0, 1e-3, -0.5, 2.0]])
    one = lambda z, a: powerpropagation(a).apply({"w": z})["w"]  # noqa: E731
    slope = jax.grad(lambda z: jnp.sum(one(z, power)))(z)
    exact = np.abs(np.asarray(z, np.float64))
    np.testing.assert_allclose(slope, power * exact ** (power - 1), rtol=5e-6)
    assert float(slope[0, 0]) == (1.0 if power == 1 else 0.0)
    by_power = jax.jacfwd(lambda a: one(z, a))(jnp.asarray(power))
    logs = np.log(np.where(exact == 0, 1, exact))
    want = np.sign(np.asarray(z)) * exact**power * logs
    np.testing.assert_allclose(by_power, want, rtol=1e-5, atol=1e-7)
    # The inverse, at weights that are not zero.
    back = jax.grad(lambda w: jnp.sum(powerpropagation(power).init({"w": w})["w"]))(z[:, 1:])
    np.testing.assert_allclose(back, exact[:, 1:] ** (1 / power - 1) / power, rtol=1e-5)


def test_vmap_over_powers_equals_a_loop_and_compiles_once():
    params = {"w": values(6, 4), "b": values(4, seed=1)}

    def once(power, params):
        r = powerpropagation(power)
        z = r.init(params)
        return z, r.apply(jax.tree.map(lambda x: x + 0.5, z))

    grid = jnp.asarray(POWERS)
    mapped = jax.jit(jax.vmap(once, in_axes=(0, None)))(grid, params)
    one = counting_jit(once)
    for i in range(len(POWERS)):
        got = jax.tree.map(lambda x: x[i], mapped)  # noqa: B023
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), got, one(grid[i], params)
        )
    assert one.traces == 1


@powers
def test_masks_of_latents_are_masks_of_weights(power):
    z = {"w": values(16, 8, seed=2)}
    w = powerpropagation(power).apply(z)
    p = jc.prune(0.7)
    np.testing.assert_array_equal(p.find(z)["w"].keep, p.find(w)["w"].keep)


def test_a_step_is_the_papers_update():
    """`z - rate * a |z|^(a-1) * gradient at w`, and the params are its power."""
    params, grads = {"w": values(6, 4)}, {"w": values(6, 4, seed=1)}
    opt = jc.reparametrized(lenient(optax.sgd(0.1)), powerpropagation(3.0))
    updates, state = jax.jit(opt.update)(grads, opt.init(params), params)
    w, g = np.asarray(params["w"], np.float64), np.asarray(grads["w"], np.float64)
    z = np.sign(w) * np.abs(w) ** (1 / 3)
    z = z - 0.1 * 3 * z**2 * g
    np.testing.assert_allclose(jc.latent(state)["w"], z, atol=2e-6)
    np.testing.assert_allclose(applied(params, updates)["w"], z * z**2, atol=5e-6)


def test_small_weights_move_less_and_what_is_pruned_stays_pruned():
    params = {"w": values(16, 8)}
    goal = values(16, 8, seed=1)
    inner = optax.chain(lenient(optax.sgd(0.05)), jc.project_params(jc.every(100, jc.prune(0.5))))
    opt = jc.reparametrized(inner, powerpropagation(2.0))

    def step(carry, _):
        params, state = carry
        updates, state = opt.update({"w": params["w"] - goal}, state, params)
        return (applied(params, updates), state), params["w"]

    start = (params, opt.init(params))
    (params, state), seen = jax.lax.scan(step, start, length=50)
    zeros = np.asarray(seen[1:] == 0)
    assert (zeros.sum((1, 2)) == 64).all()
    assert (zeros == zeros[0]).all()
    np.testing.assert_array_equal(params["w"] == 0, jc.latent(state)["w"] == 0)


def test_it_takes_other_leaves_as_they_are_and_others_on_demand():
    params = {"w": values(4, 2), "b": values(2), "n": jnp.arange(6).reshape(2, 3), "none": None}
    r = powerpropagation(2.0)
    z = r.init(params)
    np.testing.assert_array_equal(z["b"], params["b"])
    np.testing.assert_array_equal(z["n"], params["n"])
    assert jax.tree.structure(r.apply(z)) == jax.tree.structure(params)
    chosen = powerpropagation(2.0, where="b").init(params)
    np.testing.assert_array_equal(chosen["w"], params["w"])
    np.testing.assert_allclose(np.square(chosen["b"]), np.abs(params["b"]), rtol=1e-6)
    opt = jc.reparametrized(lenient(optax.sgd(0.1)), r)
    del params["n"]
    updates, _ = opt.update(params, opt.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


def test_edges():
    r = powerpropagation(4.0)
    params = {"e": jnp.zeros((0, 4)), "w": jnp.array([[jnp.nan, 0.0, -jnp.inf, 1e-37]])}
    back = r.apply(r.init(params))
    assert back["e"].shape == (0, 4)
    np.testing.assert_allclose(back["w"], params["w"], rtol=1e-5)
    equal = {"w": jnp.full((3, 3), 0.0625)}
    np.testing.assert_allclose(r.init(equal)["w"], 0.5, rtol=1e-6)
    scalar = powerpropagation(2.0, where="s").init({"s": jnp.asarray(9.0)})["s"]
    assert float(scalar) == pytest.approx(3.0)


def test_what_does_not_fit_is_refused():
    with pytest.raises(
        ValueError, match=r"powerpropagation: `power` must be a real number of at least 1"
    ):
        powerpropagation(0.5)
    with pytest.raises(TypeError, match=r"`power` must be a number, got a schedule"):
        powerpropagation(lambda step: 2.0)
    with pytest.raises(TypeError, match=r"floating-point leaves, got int32\[2, 2\] at 'n'"):
        powerpropagation(2.0, where="n").init({"n": jnp.ones((2, 2), jnp.int32)})
    with pytest.raises(ValueError, match=r"powerpropagation: `where` must match"):
        powerpropagation(2.0).init({"b": jnp.ones(3)})
