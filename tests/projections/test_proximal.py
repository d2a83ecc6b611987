"""The proximal link: lands exactly, solves the lasso, keeps its clock, removes channels."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from jaxcompress.projections import ProximalState, proximal
from jaxcompress.pruning import group_lasso, hard_threshold, n_of_m, soft_threshold
from tests.conftest import counting_jit, lenient, mesh_of

dtypes = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])


def values(*shape, seed=0, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def applied(params, updates):
    with jax.numpy_dtype_promotion("standard"):
        return optax.apply_updates(params, updates)


def one_step(opt, params, grads):
    state = opt.init(params)
    updates, state = jax.jit(opt.update)(grads, state, params)
    return applied(params, updates), state


def same_bits(a, b):
    np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@dtypes
@pytest.mark.parametrize("operator", [soft_threshold, hard_threshold])
def test_params_land_on_the_operator_of_the_sum(operator, dtype):
    params = {"w": values(16, 8, dtype=dtype), "b": values(8, seed=1, dtype=dtype)}
    moves = {"w": values(16, 8, seed=2, dtype=dtype), "b": values(8, seed=3, dtype=dtype)}
    out, state = one_step(proximal(operator, 0.3), params, moves)
    moved = applied(params, moves)
    want = operator(moved["w"], 0.3)
    assert out["w"].dtype == dtype
    if dtype == jnp.float32:
        np.testing.assert_allclose(out["w"], want, rtol=0, atol=5e-7)
    else:
        same_bits(out["w"], want)
    zero = np.asarray(want == 0)
    assert 10 < zero.sum() < 120
    np.testing.assert_array_equal(np.asarray(out["w"] == 0), zero)
    same_bits(out["b"], moved["b"])
    assert isinstance(state, ProximalState)
    assert int(state.step) == 1


def lasso_by_coordinate_descent(a, b, penalty, sweeps=500):
    """Minimises |a x - b|^2 / 2 + penalty |x|_1 one coordinate at a time, in float64."""
    x = np.zeros(a.shape[1])
    for _ in range(sweeps):
        for i in range(len(x)):
            rest = b - a @ x + a[:, i] * x[i]
            pull, curve = a[:, i] @ rest, a[:, i] @ a[:, i]
            x[i] = np.sign(pull) * max(abs(pull) - penalty, 0.0) / curve
    return x


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.6])
def test_gradient_descent_with_it_solves_the_lasso(fraction):
    rng = np.random.default_rng(4)
    a, b = rng.normal(size=(24, 10)), rng.normal(size=24)
    penalty = fraction * np.abs(a.T @ b).max()
    want = lasso_by_coordinate_descent(a, b, penalty)
    rate = 1.0 / np.linalg.norm(a, 2) ** 2
    opt = optax.chain(lenient(optax.sgd(rate)), proximal(soft_threshold, rate * penalty))
    a, b = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)[:, None]
    loss = lambda p: 0.5 * jnp.sum((a @ p["x"] - b) ** 2)  # noqa: E731

    def step(carry, _):
        params, state = carry
        updates, state = opt.update(jax.grad(loss)(params), state, params)
        return (applied(params, updates), state), None

    params = {"x": jnp.ones((10, 1))}
    (params, _), _ = jax.lax.scan(step, (params, opt.init(params)), length=2000)
    found = np.asarray(params["x"])[:, 0]
    np.testing.assert_allclose(found, want, atol=2e-5)
    np.testing.assert_array_equal(found == 0, want == 0)


def test_group_lasso_removes_the_channels_that_do_not_matter():
    """Three of eight hidden channels make the data: the others end at zero, exactly."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(256, 6)), jnp.float32)
    true = jnp.asarray(rng.normal(size=(6, 8)) * (np.arange(8) < 3), jnp.float32)
    y = x @ true + 0.05 * jnp.asarray(rng.normal(size=(256, 8)), jnp.float32)
    loss = lambda p: 0.5 * jnp.mean(jnp.sum((x @ p["w"] + p["b"][None, :] - y) ** 2, 1))  # noqa: E731
    rate = 0.1
    shrink = group_lasso(jc.pruning.slices(-1))
    opt = optax.chain(
        lenient(optax.sgd(rate, momentum=0.5)),
        proximal(shrink, lambda step: rate * 0.05 * jnp.minimum(step / 50, 1.0)),
    )

    def step(carry, _):
        params, state = carry
        updates, state = opt.update(jax.grad(loss)(params), state, params)
        return (applied(params, updates), state), None

    params = {"w": values(6, 8, seed=5), "b": values(8, seed=6)}
    (params, state), _ = jax.lax.scan(step, (params, opt.init(params)), length=300)
    channels = np.asarray(jnp.any(params["w"] != 0, 0))
    np.testing.assert_array_equal(channels, np.arange(8) < 3)
    assert np.all(np.asarray(params["b"]) != 0)
    assert int(state[1].step) == 300


def test_a_schedule_is_read_at_the_step():
    opt = proximal(soft_threshold, lambda step: jnp.where(step == 1, 0.5, 0.0))
    params, zero = {"w": jnp.array([[1.0, -0.25]])}, {"w": jnp.zeros((1, 2))}
    state, seen = opt.init(params), []
    for _ in range(3):
        updates, state = opt.update(zero, state, params)
        params = applied(params, updates)
        seen.append(np.asarray(params["w"]).tolist())
    assert seen == [[[1.0, -0.25]], [[0.5, 0.0]], [[0.5, 0.0]]]


@pytest.mark.parametrize("period", [1, 2, 3])
@dtypes
def test_a_period_skips_updates_and_leaves_them_as_they_came(period, dtype):
    params = {"w": values(4, 4, dtype=dtype), "b": values(4, seed=1, dtype=dtype)}
    moves = jax.tree.map(lambda w: (0.01 * w.astype(jnp.float32)).astype(dtype), params)
    opt = proximal(soft_threshold, 0.05, jnp.asarray(period))
    update, state = counting_jit(opt.update), opt.init(params)
    for t in range(1, 7):
        updates, state = update(moves, state, params)
        plain = applied(params, moves)
        if t % period:
            np.testing.assert_array_equal(
                np.asarray(updates["w"], np.float32), np.asarray(moves["w"], np.float32)
            )
        else:
            want = soft_threshold(plain["w"], 0.05)
            got = np.asarray(applied(params, updates)["w"], np.float32)
            np.testing.assert_allclose(got, np.asarray(want, np.float32), atol=5e-7)
        params = applied(params, updates)
    assert update.traces == 1


def test_collected_strength_moves_narrow_weights_where_single_steps_are_lost():
    params, zero = {"w": jnp.ones((2, 2), jnp.bfloat16)}, {"w": jnp.zeros((2, 2), jnp.bfloat16)}

    def run(opt):
        def step(carry, _):
            w, state = carry
            updates, state = opt.update(zero, state, w)
            return (applied(w, updates), state), None

        return float(jax.lax.scan(step, (params, opt.init(params)), length=100)[0][0]["w"][0, 0])

    assert run(proximal(soft_threshold, 1e-3)) == 1.0
    assert run(proximal(soft_threshold, 0.02, 20)) == pytest.approx(0.9, abs=0.01)


def test_vmap_over_numbers_equals_a_loop():
    params, moves = {"w": values(6, 4)}, {"w": values(6, 4, seed=1)}

    def run(strength, period):
        opt = proximal(n_of_m(2, m=3), strength, period)
        w, state = params, opt.init(params)
        for _ in range(3):
            updates, state = opt.update(moves, state, w)
            w = applied(w, updates)
        return w["w"]

    strengths, periods = jnp.array([0.0, 0.1, 1.0]), jnp.array([1, 2, 3])
    mapped = jax.jit(jax.vmap(run))(strengths, periods)
    for i in range(3):
        one = jax.jit(run)(strengths[i], periods[i])
        np.testing.assert_array_equal(mapped[i], one)
    assert not np.array_equal(mapped[0], mapped[2])


def test_inside_of_an_accumulation_it_waits_for_the_update():
    params, grads = {"w": values(4, 4)}, {"w": values(4, 4, seed=1)}
    link = proximal(soft_threshold, lambda step: jnp.where(step == 0, 0.1, 0.2))
    chain = optax.chain(lenient(optax.sgd(0.1)), link)
    accumulated = optax.MultiSteps(chain, 3)
    opt = lenient(optax.GradientTransformationExtraArgs(accumulated.init, accumulated.update))
    got, state = params, opt.init(params)
    for t in range(6):
        updates, state = opt.update(grads, state, got)
        got = applied(got, updates)
        if t == 1:
            same_bits(got["w"], params["w"])
    want, plain = params, chain.init(params)
    for _ in range(2):
        updates, plain = chain.update(grads, plain, want)
        want = applied(want, updates)
    np.testing.assert_allclose(got["w"], want["w"], atol=1e-6)
    assert int((got["w"] == 0).sum()) > 0


def test_it_chooses_leaves_and_hands_on_the_path():
    seen = []

    def halve(w, strength, path):
        seen.append(path)
        return w * strength

    params = {"a": {"kernel": jnp.ones((2, 2))}, "b": {"kernel": jnp.ones((2, 2)), "bias": None}}
    zero = jax.tree.map(jnp.zeros_like, params)
    out, _ = one_step(proximal(halve, 0.5, where="b/*"), params, zero)
    assert seen == ["b/kernel"]
    assert float(out["a"]["kernel"][0, 0]) == 1.0
    assert float(out["b"]["kernel"][0, 0]) == 0.5
    # A vector, where the default leaves those alone; and a whole number as the strength.
    out, _ = one_step(
        proximal(soft_threshold, 1, where="x"), {"x": jnp.ones(3)}, {"x": jnp.ones(3)}
    )
    same_bits(out["x"], jnp.ones(3))


@pytest.mark.parametrize("period", [1, 2])
def test_a_leaf_without_an_update_is_left_out(period):
    params = {"a": jnp.full((2, 2), 0.5), "b": jnp.full((2, 2), 0.5), "c": None}
    updates = {"a": jnp.zeros((2, 2)), "b": None, "c": None}
    opt = proximal(soft_threshold, 0.25, period)
    state = opt.init(params)
    for _ in range(period):
        out, state = opt.update(updates, state, params)
    assert out["b"] is None
    assert out["c"] is None
    same_bits(out["a"], jnp.full((2, 2), -0.25))


def test_factors_of_a_reparametrization_are_penalized():
    params = {"w": jnp.asarray(np.diag([4.0, 1.0, 0.1]), jnp.float32)}
    inner = optax.chain(lenient(optax.sgd(0.1)), proximal(soft_threshold, 0.5))
    opt = jc.reparametrized(inner, jc.low_rank_factors(3))
    state = opt.init(params)
    _, state = jax.jit(opt.update)({"w": jnp.zeros((3, 3))}, state, params)
    factors = jc.latent(state)["w"]
    sizes = np.sort(np.abs(np.asarray(factors.u)).max(0))[::-1]
    np.testing.assert_allclose(sizes, [1.5, 0.5, 0.0], atol=1e-6)


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_on_a_mesh_as_on_one_device(kind):
    scale = jnp.array([[0.1, 1.0, 1.0, 0.1]])
    params, moves = {"w": values(8, 4) * scale}, {"w": values(8, 4, seed=1) * scale}
    opt = proximal(group_lasso(jc.pruning.slices(-1)), 0.4, 2)
    state = ProximalState(jnp.ones((), jnp.int32))
    want, _ = opt.update(moves, state, params)
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, P("d", None))
        got, _ = jax.jit(opt.update)(
            jax.device_put(moves, sharding), state, jax.device_put(params, sharding)
        )
        assert got["w"].sharding.spec == P("d", None)
    np.testing.assert_allclose(jax.device_get(got["w"]), want["w"], atol=1e-6)
    gone = np.asarray(applied(params, want)["w"] == 0).all(0)
    np.testing.assert_array_equal(gone, [True, False, False, True])


def test_nan_stays_and_empty_leaves_stay_empty():
    params = {"e": jnp.zeros((0, 4)), "w": jnp.array([[jnp.nan, 0.1, 2.0]])}
    zero = jax.tree.map(jnp.zeros_like, params)
    out, _ = one_step(proximal(soft_threshold, 0.5), params, zero)
    assert out["e"].shape == (0, 4)
    np.testing.assert_array_equal(out["w"], [[np.nan, 0.0, 1.5]])


def test_what_does_not_fit_is_refused():
    params = {"w": jnp.ones((2, 2)), "n": jnp.ones((2, 2), jnp.int32)}
    with pytest.raises(TypeError, match=r"proximal: `operator` must be a function"):
        proximal("l1", 0.1)
    with pytest.raises(
        ValueError, match=r"proximal: `strength` must be a real number of at least 0"
    ):
        proximal(soft_threshold, -0.1)
    with pytest.raises(ValueError, match=r"proximal: `period` must"):
        proximal(soft_threshold, 0.1, 0)
    opt = proximal(soft_threshold, 0.1)
    with pytest.raises(ValueError, match=r"proximal: `params` must be given to update"):
        opt.update(params, opt.init(params))
    with pytest.raises(TypeError, match=r"floating-point leaves, got int32\[2, 2\] at 'n'"):
        one_step(proximal(soft_threshold, 0.1, where="n"), params, params)
    with pytest.raises(ValueError, match=r"keep the shape \[2, 2\], got float32\[2\] at 'w'"):
        one_step(proximal(lambda w, s: w[0], 0.1), params, params)
    with pytest.raises(ValueError, match=r"proximal: `where` must match"):
        proximal(soft_threshold, 0.1, where="nothing").init(params)
    with pytest.raises(ValueError, match=r"axis of a leaf with 2 dimensions, got 2 at 'w'"):
        one_step(proximal(group_lasso(jc.pruning.slices(2)), 0.1), params, params)
