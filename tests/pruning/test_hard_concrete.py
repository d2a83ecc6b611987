"""Hard-concrete gates: their distribution, penalty and gradients against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from jaxcompress.pruning import (
    Gated,
    expected_l0,
    fixed_gates,
    hard_concrete,
    sample_gates,
)
from tests.conftest import counting_jit, lenient, mesh_of

SETTINGS = [(2 / 3, -0.1, 1.1), (0.3, -0.5, 1.2), (1.0, -0.01, 1.5)]
distributions = pytest.mark.parametrize(("temperature", "gamma", "zeta"), SETTINGS)


def values(*shape, seed=0, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def applied(params, updates):
    with jax.numpy_dtype_promotion("standard"):
        return optax.apply_updates(params, updates)


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-np.asarray(x, np.float64)))


def below(t, log_alpha, temperature, gamma, zeta):
    """The paper's Q of the stretched concrete variable (appendix), at gamma < t < zeta."""
    s = (np.asarray(t, np.float64) - gamma) / (zeta - gamma)
    return sigmoid((np.log(s) - np.log(1 - s)) * temperature - log_alpha)


@distributions
@pytest.mark.parametrize("log_alpha", [-2.0, 0.0, 1.5])
def test_sampled_gates_have_the_closed_form_distribution(log_alpha, temperature, gamma, zeta):
    n = 40_000
    knobs = temperature, gamma, zeta
    g = np.asarray(sample_gates(jnp.full((n,), log_alpha), jax.random.key(7), *knobs))
    bound = 1.95 / np.sqrt(n)  # Kolmogorov-Smirnov at 0.1%
    assert g.min() == 0
    assert g.max() == 1
    assert abs((g == 0).mean() - below(0.0, log_alpha, *knobs)) < bound
    assert abs((g == 1).mean() - (1 - below(1.0, log_alpha, *knobs))) < bound
    t = np.linspace(0.0, 0.999, 500)
    empirical = np.searchsorted(np.sort(g), t, side="right") / n
    assert np.abs(empirical - below(t, log_alpha, *knobs)).max() < bound


@distributions
def test_expected_l0_is_the_mean_of_sampled_counts(temperature, gamma, zeta):
    log_alpha = values(50) * 2
    knobs = temperature, gamma, zeta
    keys = jax.random.split(jax.random.key(1), 4000)
    draw = jax.vmap(lambda key: jnp.sum(sample_gates(log_alpha, key, *knobs) != 0))
    counts = np.asarray(jax.jit(draw)(keys), np.float64)
    want = float(expected_l0(log_alpha, *knobs))
    assert abs(counts.mean() - want) < 4 * counts.std() / np.sqrt(len(counts))
    assert want == pytest.approx(np.sum(1 - below(0.0, np.asarray(log_alpha), *knobs)), rel=1e-5)


@distributions
def test_fixed_gates_are_the_papers(temperature, gamma, zeta):
    del temperature
    log_alpha = jnp.linspace(-6.0, 6.0, 41)
    found = np.asarray(fixed_gates(log_alpha, gamma, zeta))
    want = np.clip(sigmoid(log_alpha) * (zeta - gamma) + gamma, 0, 1)
    np.testing.assert_allclose(found, want, atol=1e-6)
    np.testing.assert_array_equal(found == 0, want == 0)
    np.testing.assert_array_equal(found == 1, want == 1)
    assert (found == 0).any()
    assert (found == 1).any()


@distributions
def test_gradients_are_those_of_finite_differences(temperature, gamma, zeta):
    x = values(200) * 2
    key = jax.random.key(3)
    knobs = temperature, gamma, zeta
    noise = np.asarray(jax.random.logistic(key, x.shape, jnp.float32), np.float64)
    exact = np.asarray(x, np.float64)
    h = 1e-5

    def stretched(x, noise, beta):
        return gamma + (zeta - gamma) * sigmoid((x + noise) / beta)

    def check(found, f, edge):
        want = (f(exact + h) - f(exact - h)) / (2 * h)
        inside = np.abs(edge * (1 - edge)) > 1e-3  # away from both corners of the clip
        np.testing.assert_allclose(np.asarray(found)[inside], want[inside], atol=2e-5)
        assert (want[inside] == 0).any()
        assert (want[inside] != 0).any()

    check(
        jax.grad(lambda x: jnp.sum(sample_gates(x, key, *knobs)))(x),
        lambda x: np.clip(stretched(x, noise, temperature), 0, 1),
        stretched(exact, noise, temperature),
    )
    check(
        jax.grad(lambda x: jnp.sum(fixed_gates(x, gamma, zeta)))(x),
        lambda x: np.clip(stretched(x, 0.0, 1.0), 0, 1),
        stretched(exact, 0.0, 1.0),
    )
    slope = jax.grad(lambda x: expected_l0(x, *knobs))(x)
    live = lambda x: 1 - below(0.0, x, *knobs)  # noqa: E731
    np.testing.assert_allclose(slope, (live(exact + h) - live(exact - h)) / (2 * h), atol=2e-6)
    assert (np.asarray(slope) > 0).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_parts_keep_shape_and_bounds_and_define_their_edges(dtype):
    x = jnp.asarray([[-jnp.inf, -1e4, 0.0], [jnp.inf, 1e4, jnp.nan]], dtype)
    for g in (sample_gates(x, jax.random.key(0)), fixed_gates(x)):
        assert g.shape == (2, 3)
        assert g.dtype == jnp.float32
        np.testing.assert_array_equal(g[:, :2], [[0, 0], [1, 1]])
        assert 0 <= float(g[0, 2]) <= 1
        assert np.isnan(float(g[1, 2]))
    empty = jnp.zeros((0, 4), dtype)
    assert sample_gates(empty, jax.random.key(0)).shape == (0, 4)
    assert float(expected_l0(empty)) == 0
    assert fixed_gates(jnp.asarray(0.0, dtype)).shape == ()
    slope = jax.grad(lambda x: jnp.sum(sample_gates(x, jax.random.key(0)) + fixed_gates(x)))(
        jnp.asarray([-1e4, 1e4, 0.0], jnp.float32)
    )
    assert np.isfinite(slope).all()


def test_parts_map_over_their_numbers():
    x, key = values(20), jax.random.key(2)

    def parts(temperature, gamma, zeta):
        knobs = temperature, gamma, zeta
        return sample_gates(x, key, *knobs), fixed_gates(x, gamma, zeta), expected_l0(x, *knobs)

    grid = [jnp.asarray(column) for column in zip(*SETTINGS, strict=True)]
    mapped = jax.jit(jax.vmap(parts))(*grid)
    one = counting_jit(parts)
    for i in range(3):
        alone = one(*(column[i] for column in grid))
        for many, want in zip(mapped, alone, strict=True):
            np.testing.assert_allclose(many[i], want, rtol=1e-6)
    assert one.traces == 1


def run(opt, params, loss, steps):
    def step(carry, _):
        params, state = carry
        updates, state = opt.update(jax.grad(loss)(params), state, params)
        return (applied(params, updates), state), params

    return jax.lax.scan(step, (params, opt.init(params)), length=steps)


def gates_of(params, state):
    """The gates in the params: weights are known from the latents."""
    return jax.tree.map(lambda w, z: np.asarray(w / z.weight), params, jc.latent(state))


def test_gates_are_drawn_anew_at_each_update_from_the_distribution():
    # Without gradients and penalty the weights stay, and the params are their gates.
    params = {"a": jnp.ones((64, 64)), "b": jnp.ones((64, 64))}
    opt = hard_concrete(lenient(optax.sgd(0.1)), 0.0, key=jax.random.key(5), initial_keep=0.5)
    (_, state), seen = run(opt, params, lambda p: 0.0 * jnp.sum(p["a"] + p["b"]), 6)
    a, b = np.asarray(seen["a"][1:]), np.asarray(seen["b"][1:])
    for g in (*a, *b):
        assert abs((g == 0).mean() - below(0.0, 0.0, *SETTINGS[0])) < 0.04
        assert abs((g == 1).mean() - (1 - below(1.0, 0.0, *SETTINGS[0]))) < 0.04
    for x, y in [(a[0], a[1]), (a[1], a[2]), (a[0], b[0]), (a[0], a[4])]:
        assert abs(np.corrcoef(x.ravel(), y.ravel())[0, 1]) < 0.06
    assert float(jc.latent(state)["a"].draw) == 6
    (_, again), same = run(opt, params, lambda p: 0.0 * jnp.sum(p["a"] + p["b"]), 6)
    np.testing.assert_array_equal(same["a"], seen["a"])
    np.testing.assert_array_equal(jc.latent(again)["a"].weight, 1.0)


@pytest.mark.parametrize("groups", [None, jc.pruning.slices(-1), jc.pruning.blocks(2, 3)])
def test_a_step_is_that_of_the_chain_rule_in_numpy(groups):
    """Weights get gradient times gate; gates get gradient times weight times slope, + penalty."""
    rate, penalty, beta = 0.1, 0.02, 2 / 3
    params = {"w": values(4, 6)}
    opt = hard_concrete(lenient(optax.sgd(rate)), penalty, key=jax.random.key(0), groups=groups)
    state = opt.init(params)
    zero = {"w": jnp.zeros((4, 6))}
    updates, state = opt.update(zero, state, params)
    params = applied(params, updates)
    before = jc.latent(state)["w"]
    grads = values(4, 6, seed=1)
    updates, state = jax.jit(opt.update)({"w": grads}, state, params)
    after = jc.latent(state)["w"]

    block = {None: (1, 1)}.get(groups) or groups.block("w", (4, 6))
    spread = lambda x: np.kron(np.asarray(x, np.float64), np.ones(block))  # noqa: E731
    w, log_alpha = np.asarray(before.weight, np.float64), np.asarray(before.log_alpha, np.float64)
    gates = spread(np.ones_like(log_alpha)) * np.asarray(params["w"]) / w
    # From the gate (inside of (0, 1)) back to the concrete variable, and its slope.
    s = (gates + 0.1) / 1.2
    slope = np.where((gates > 0) & (gates < 1), 1.2 * s * (1 - s) / beta, 0.0)
    g = np.asarray(grads, np.float64)
    np.testing.assert_allclose(after.weight, w - rate * g * gates, atol=2e-6)
    pull = (g * w * slope).reshape(4 // block[0], block[0], 6 // block[1], block[1]).sum((1, 3))
    open_ = sigmoid(log_alpha - beta * np.log(0.1 / 1.1))
    size = block[0] * block[1]
    pull = pull + penalty * size * open_ * (1 - open_)
    np.testing.assert_allclose(after.log_alpha, log_alpha - rate * pull, atol=2e-5)
    assert (slope == 0).any()
    assert (slope != 0).any()
    # And the params are the new weights behind new gates.
    new = np.asarray(applied(params, updates)["w"], np.float64) / np.asarray(after.weight)
    assert new.min() >= 0
    assert new.max() <= 1 + 1e-6
    assert np.abs(new - gates).max() > 0.01


def regression():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(128, 8)), jnp.float32)
    true = jnp.asarray(rng.normal(size=(8, 6)) * (np.arange(6) < 2), jnp.float32)
    y = x @ true
    return lambda p: 0.5 * jnp.mean(jnp.sum((x @ p["w"] - y) ** 2, 1)), true


def test_training_closes_the_gates_of_channels_that_do_not_matter():
    loss, true = regression()
    opt = hard_concrete(
        lenient(optax.adam(0.05)),
        lambda step: jnp.where(step < 20, 0.0, 2e-2),
        key=jax.random.key(0),
        groups=jc.pruning.slices(-1),
    )
    (params, state), _ = jax.jit(lambda p: run(opt, p, loss, 1000))({"w": values(8, 6, seed=2)})
    final = jc.pack(state, params)
    np.testing.assert_array_equal(jnp.any(final["w"] != 0, 0), np.arange(6) < 2)
    np.testing.assert_array_equal(final["w"], jc.todense(jc.latent(state))["w"])
    np.testing.assert_allclose(final["w"], true, atol=0.02)
    z = jc.latent(state)["w"]
    assert z.log_alpha.shape == (1, 6)
    assert float(expected_l0(z.log_alpha)) == pytest.approx(2.0, abs=0.5)


def test_without_a_penalty_it_closes_nothing_and_a_higher_one_closes_more():
    loss, _ = regression()

    def alive(penalty):
        opt = hard_concrete(lenient(optax.adam(0.03)), penalty, key=jax.random.key(0))
        (_, state), _ = run(opt, {"w": values(8, 6, seed=2)}, loss, 300)
        return jnp.sum(jc.todense(jc.latent(state))["w"] != 0)

    grid = jnp.asarray([0.0, 5e-3, 1.0])
    counts = np.asarray(jax.jit(jax.vmap(alive))(grid))
    assert counts[0] > counts[1] > counts[2]
    assert counts[1] >= 16
    assert [int(jax.jit(alive)(x)) for x in grid[1:2]] == [counts[1]]


def test_the_inner_optimizer_sees_and_may_label_the_parts():
    seen = []

    def label(params):
        flat = jax.tree_util.tree_leaves_with_path(params)
        seen.extend(jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat)
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "gates" if "log_alpha" in str(path[-1]) else "weights", params
        )

    inner = lenient(optax.partition({"gates": optax.sgd(1.0), "weights": optax.sgd(0.0)}, label))
    params = {"w": values(4, 4), "b": values(4)}
    opt = hard_concrete(inner, 0.1, key=jax.random.key(0))
    state = opt.init(params)
    grads = jax.tree.map(jnp.ones_like, params)
    _, state = opt.update(grads, state, params)
    assert set(seen) == {"w/weight", "w/log_alpha", "b"}
    z = jc.latent(state)
    np.testing.assert_array_equal(z["w"].weight, params["w"])
    np.testing.assert_array_equal(z["b"], params["b"])
    assert (np.asarray(z["w"].log_alpha) != np.log(9.0).astype(np.float32)).all()


def test_in_an_accumulation_gates_are_drawn_once_an_update():
    params, grads = {"w": jnp.ones((8, 8))}, {"w": values(8, 8)}
    inner = optax.MultiSteps(lenient(optax.sgd(0.1)), 2)
    penalty = lambda step: jnp.where(step < 2, 0.0, 1.0)  # noqa: E731
    opt = lenient(hard_concrete(inner, penalty, key=jax.random.key(0), initial_keep=0.5))
    state, draws, moved, alphas = opt.init(params), [], [], []
    for _ in range(6):
        updates, state = opt.update(grads, state, params)
        moved.append(bool(jnp.any(updates["w"] != 0)))
        params = applied(params, updates)
        z = jc.latent(state)["w"]
        draws.append(float(z.draw))
        alphas.append(float(jnp.mean(z.log_alpha)))
    assert draws == [0, 1, 1, 2, 2, 3]
    assert moved == [False, True] * 3
    # The penalty comes into force at the third update, not at the third gradient.
    assert alphas[5] < alphas[3] - 0.005
    assert abs(alphas[3] - alphas[1]) < 0.005


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_params_keep_their_dtype_and_gates_are_float32(dtype):
    params = {"w": values(8, 6, dtype=dtype)}
    opt = hard_concrete(lenient(optax.sgd(0.1)), 0.1, key=jax.random.key(0), initial_keep=0.5)
    state = opt.init(params)
    updates, after = jax.jit(opt.update)({"w": jnp.ones((8, 6), dtype)}, state, params)
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, state)
    z, out = jc.latent(after)["w"], applied(params, updates)["w"]
    assert out.dtype == z.weight.dtype == dtype
    assert z.log_alpha.dtype == jnp.float32
    assert int((out == 0).sum()) > 0
    packed = jc.pack(after, {"w": out})["w"]
    assert packed.dtype == dtype
    want = z.weight.astype(jnp.float32) * fixed_gates(z.log_alpha)
    np.testing.assert_array_equal(packed, want.astype(dtype))


@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize("groups", [None, jc.pruning.slices(-1)])
def test_on_a_mesh_as_on_one_device(kind, groups):
    params, grads = {"w": values(8, 4)}, {"w": values(8, 4, seed=1)}
    make = lambda: hard_concrete(  # noqa: E731
        lenient(optax.sgd(0.1)), 0.1, key=jax.random.key(0), groups=groups
    )
    want, _ = jax.jit(make().update)(grads, make().init(params), params)
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, P("d", None))
        params, grads = jax.device_put((params, grads), sharding)
        got, _ = jax.jit(make().update)(grads, jax.jit(make().init)(params), params)
        assert got["w"].sharding.spec == P("d", None)
    np.testing.assert_allclose(jax.device_get(got["w"]), want["w"], atol=1e-6)


def test_counting_starts_anew_where_float32_ends():
    params, zero = {"w": values(4, 4)}, {"w": jnp.zeros((4, 4))}
    opt = hard_concrete(lenient(optax.sgd(0.1)), 0.0, key=jax.random.key(0), initial_keep=0.5)
    state = opt.init(params)
    draws = []
    for start in (0, 2**24 - 2, 2**24 - 1):
        z = jc.latent(state)["w"]
        held = Gated(z.weight, z.log_alpha, jnp.asarray(start, jnp.float32), z.block)
        _, after = opt.update(zero, state._replace(latent={"w": held}), params)
        draws.append(float(jc.latent(after)["w"].draw))
    assert draws == [1, 2**24 - 1, 0]


def test_first_values_other_leaves_and_empty_ones():
    params = {"w": values(4, 4), "b": values(4), "e": jnp.zeros((0, 4)), "none": None}
    opt = hard_concrete(lenient(optax.sgd(0.1)), 0.1, key=jax.random.key(0), initial_keep=11 / 12)
    state = opt.init(params)
    # Fixed gates at exactly 1: nothing changes before training.
    jax.tree.map(np.testing.assert_array_equal, jc.pack(state, params), params)
    assert jc.latent(state)["w"].nbytes == 2 * params["w"].nbytes
    assert jc.latent(state)["w"].dtype == jnp.float32
    updates, _ = jax.jit(opt.update)(params, state, params)
    out = applied(params, updates)
    np.testing.assert_allclose(out["b"], 0.9 * params["b"], rtol=1e-6)
    assert out["e"].shape == (0, 4)
    lower = hard_concrete(optax.sgd(0.1), 0.1, key=jax.random.key(0), initial_keep=0.25)
    np.testing.assert_allclose(
        jc.latent(lower.init(params))["w"].log_alpha, np.log(1 / 3), rtol=1e-6
    )
    # NaN is shown, not hidden, and stays where it is.
    bad = {"w": params["w"].at[0, 0].set(jnp.nan)}
    updates, _ = opt.update({"w": jnp.zeros((4, 4))}, opt.init(bad), bad)
    assert int(jnp.isnan(applied(bad, updates)["w"]).sum()) == 1


def test_what_does_not_fit_is_refused():
    key = jax.random.key(0)
    make = lambda penalty=0.1, **given: hard_concrete(optax.sgd(0.1), penalty, key=key, **given)  # noqa: E731
    with pytest.raises(TypeError, match=r"hard_concrete: `optimizer` must be an optax"):
        hard_concrete(0.1, 0.1, key=key)
    with pytest.raises(ValueError, match=r"hard_concrete: `penalty` must"):
        make(-0.1)
    for name, value in [
        ("initial_keep", 1.0),
        ("initial_keep", 0.0),
        ("temperature", 0.0),
        ("gamma", 0.0),
        ("zeta", 1.0),
    ]:
        with pytest.raises(ValueError, match=rf"hard_concrete: `{name}` must"):
            make(**{name: value})
    with pytest.raises(TypeError, match=r"hard_concrete: `temperature` must be a number"):
        make(temperature=lambda step: 0.5)
    with pytest.raises(TypeError, match=r"hard_concrete: `groups` must be a Groups"):
        make(groups=-1)
    with pytest.raises(TypeError, match=r"hard_concrete: `gamma` must be static"):
        jax.jit(lambda gamma: make(gamma=gamma).init({"w": jnp.ones((2, 2))}))(-0.1)
    with pytest.raises(TypeError, match=r"int32\[2, 2\] at 'n'"):
        make(where="n").init({"n": jnp.ones((2, 2), jnp.int32)})
    with pytest.raises(ValueError, match=r"hard_concrete: `where` must match"):
        make().init({"b": jnp.ones(2)})
    opt, params = make(), {"w": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match=r"`params` must be given"):
        opt.update(params, opt.init(params))
    with pytest.raises(TypeError, match=r"sample_gates: `log_alpha` must hold real floating"):
        sample_gates(jnp.ones(2, jnp.int32), key)
    with pytest.raises(ValueError, match=r"fixed_gates: `gamma` must"):
        fixed_gates(jnp.ones(2), gamma=0.1)
    with pytest.raises(ValueError, match=r"expected_l0: `zeta` must"):
        expected_l0(jnp.ones(2), zeta=0.5)
