"""Singular value thresholding: optimality in float64, derivatives, training to the true rank."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from jaxcompress.factorization._proximal import nuclear_norm, singular_value_hard_threshold
from tests.conftest import counting_jit, mesh_of

SHAPES = [(6, 4), (4, 6), (5, 5), (3, 2, 4)]
OPERATORS = {"soft": nuclear_norm, "hard": singular_value_hard_threshold}
operators = pytest.mark.parametrize("name", OPERATORS)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def matrix(w):
    return np.asarray(w, np.float64).reshape(-1, w.shape[-1])


def singular(w):
    return np.linalg.svd(matrix(w), compute_uv=False)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("strength", [0.05, 0.8, 2.0, 50.0])
def test_soft_meets_the_optimality_condition(shape, strength):
    """(W - Z) / s is a subgradient of the nuclear norm at Z: its norm is at most 1, and its inner
    product with Z is the nuclear norm."""
    w = draw(*shape)
    z = nuclear_norm(jnp.asarray(w), strength)
    assert z.shape == shape
    g = (matrix(w) - matrix(z)) / strength
    assert singular(g)[0] <= 1 + 1e-4
    np.testing.assert_allclose(np.sum(g * matrix(z)), singular(z).sum(), atol=2e-4)
    assert np.sum(singular(z) > 1e-5) == np.sum(singular(w) > strength)
    if strength == 50.0:
        np.testing.assert_array_equal(z, 0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("strength", [0.01, 0.5, 2.0, 500.0])
def test_hard_is_the_best_of_all_ranks(shape, strength):
    w = draw(*shape, seed=1)
    z = singular_value_hard_threshold(jnp.asarray(w), strength)
    u, s, vt = np.linalg.svd(matrix(w), full_matrices=False)
    candidates = [(u[:, :r] * s[:r]) @ vt[:r] for r in range(len(s) + 1)]
    costs = [0.5 * np.sum((c - matrix(w)) ** 2) + strength * r for r, c in enumerate(candidates)]
    np.testing.assert_allclose(matrix(z), candidates[int(np.argmin(costs))], atol=1e-5)
    if strength == 500.0:
        np.testing.assert_array_equal(z, 0)
    if strength == 0.01:
        np.testing.assert_array_equal(z, w)


def test_small_strengths_are_exact_where_a_gram_matrix_is_not():
    rng = np.random.default_rng(3)
    u, v = (np.linalg.qr(rng.normal(size=(24, 24)))[0] for _ in range(2))
    w = ((u * np.logspace(0, -5, 24)) @ v.T).astype(np.float32)
    a, s, b = np.linalg.svd(w.astype(np.float64))
    want = (a * np.maximum(s - 1e-4, 0)) @ b
    got = np.asarray(nuclear_norm(jnp.asarray(w), 1e-4), np.float64)
    assert np.linalg.norm(got - want, 2) < 3e-6
    assert np.sum(singular(got) > 3e-6) == np.sum(s > 1.03e-4)


@operators
def test_vmap_over_strength_equals_a_loop_and_compiles_once(name):
    f, w = OPERATORS[name], jnp.asarray(draw(6, 4))
    strengths = jnp.array([0.0, 0.3, 1.5, 100.0, -1.0])
    mapped = jax.jit(jax.vmap(lambda s: f(w, s)))(strengths)
    one = counting_jit(f)
    for i, s in enumerate(strengths):
        np.testing.assert_allclose(mapped[i], one(w, s), atol=1e-6)
    assert one.traces == 1
    np.testing.assert_array_equal(mapped[0], w)
    np.testing.assert_array_equal(mapped[3], 0)
    np.testing.assert_array_equal(mapped[4], w)
    many = jnp.asarray(draw(3, 6, 4))
    each = jax.vmap(lambda w: f(w, 0.7))(many)
    for i in range(3):
        np.testing.assert_allclose(each[i], f(many[i], 0.7), atol=1e-6)


@operators
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_narrow_dtypes_are_the_rounded_float32_result(name, dtype):
    w = jnp.asarray(draw(6, 4), dtype)
    found = OPERATORS[name](w, 0.7)
    assert found.dtype == dtype
    want = OPERATORS[name](w.astype(jnp.float32), 0.7).astype(dtype)
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(want, np.float32))


def reference(w, strength, name):
    """float64, from the definition."""
    u, s, vt = np.linalg.svd(matrix(w), full_matrices=False)
    f = np.maximum(s - strength, 0) if name == "soft" else s * (s > np.sqrt(2 * strength))
    return ((u * f) @ vt).reshape(w.shape)


@operators
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_those_of_float64_differences(name, shape):
    f = OPERATORS[name]
    w, away = draw(*shape, seed=5).astype(np.float64), draw(*shape, seed=6).astype(np.float64)
    loss = lambda w, s: jnp.sum(f(w, s) * jnp.asarray(away, jnp.float32))  # noqa: E731
    by_w, by_s = jax.grad(loss, (0, 1))(jnp.asarray(w, jnp.float32), 1.1)
    h, want = 1e-6, np.zeros(shape)
    value = lambda w, s: np.sum(reference(w, s, name) * away)  # noqa: E731
    for index in np.ndindex(shape):
        e = np.zeros(shape)
        e[index] = h
        want[index] = (value(w + e, 1.1) - value(w - e, 1.1)) / (2 * h)
    np.testing.assert_allclose(by_w, want, atol=2e-4)
    of_s = (value(w, 1.1 + h) - value(w, 1.1 - h)) / (2 * h)
    np.testing.assert_allclose(by_s, of_s if name == "soft" else 0.0, atol=2e-4)


def test_gradients_at_nearly_equal_singular_values():
    """Equal up to the rounding of float32: differences of their images are all rounding."""
    w, away = 3 * np.linalg.qr(draw(8, 8, seed=5))[0].astype(np.float64), draw(8, 8, seed=6)
    loss = lambda w: jnp.sum(nuclear_norm(w, 0.1) * away)  # noqa: E731
    h, want = 1e-6, np.zeros((8, 8))
    for index in np.ndindex(8, 8):
        e = np.zeros((8, 8))
        e[index] = h
        up, down = (reference(w + s * e, 0.1, "soft") for s in (1, -1))
        want[index] = np.sum((up - down) * away) / (2 * h)
    np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(w, jnp.float32)), want, atol=1e-4)


@operators
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, 3.0])
def test_gradients_are_finite_at_equal_and_zero_singular_values(name, strength):
    for w in (jnp.eye(4), jnp.zeros((4, 3)), jnp.ones((3, 5)), jnp.diag(jnp.array([2.0, 2, 0]))):
        loss = lambda w, s: jnp.sum(jnp.sin(OPERATORS[name](w, s)))  # noqa: E731
        by_w, by_s = jax.grad(loss, (0, 1))(w, strength)
        assert np.isfinite(by_w).all()
        assert np.isfinite(by_s)


@operators
def test_edges(name):
    f = OPERATORS[name]
    np.testing.assert_array_equal(f(jnp.zeros((4, 4)), 0.0), 0)
    np.testing.assert_array_equal(f(jnp.zeros((4, 4)), 0.5), 0)
    for shape in ((0, 4), (4, 0), (0, 2, 3)):
        assert f(jnp.zeros(shape), 0.5).shape == shape
    for bad in (jnp.nan, jnp.inf):
        assert np.isnan(f(jnp.ones((4, 3)).at[1, 1].set(bad), 0.5)).all()
    np.testing.assert_allclose(f(jnp.full((4, 4), 1e18), 0.25), 1e18, rtol=1e-5)
    np.testing.assert_array_equal(f(jnp.ones((4, 4)), jnp.inf), 0)
    column = f(jnp.array([[3.0], [4.0]]), 1.0)
    np.testing.assert_allclose(column, [[2.4], [3.2]] if name == "soft" else [[3], [4]], rtol=1e-6)


@operators
@pytest.mark.parametrize("spec", [P("d", None), P(None, "d"), P(None, None)])
def test_explicit_mesh_equals_one_device(name, spec):
    w, away = draw(8, 4), draw(8, 4, seed=1)
    loss = lambda w, away: jnp.sum(OPERATORS[name](w, 0.7) * away)  # noqa: E731
    want, slope = jax.value_and_grad(loss)(jnp.asarray(w), jnp.asarray(away))
    mesh = mesh_of("explicit")
    with jax.set_mesh(mesh):
        x, y = (jax.device_put(a, NamedSharding(mesh, spec)) for a in (w, away))
        assert jax.typeof(jax.jit(OPERATORS[name])(x, 0.7)).sharding.spec == spec
        got, slope_here = jax.jit(jax.value_and_grad(loss))(x, y)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(slope_here, slope, atol=1e-5)


def regression(dtype=jnp.float32, rank=2):
    """A linear model of known rank: the loss and a start."""
    rng = np.random.default_rng(7)
    true = rng.normal(size=(12, rank)) @ rng.normal(size=(rank, 8))
    x = jnp.asarray(rng.normal(size=(64, 12)), dtype)
    y = jnp.asarray(np.asarray(x, np.float64) @ true + 0.1 * rng.normal(size=(64, 8)), dtype)
    params = {
        "w": jnp.asarray(rng.normal(size=(12, 8)), dtype),
        "dense": jnp.ones((2, 3), dtype),
        "b": jnp.zeros(8, dtype),
    }
    loss = lambda p: jnp.mean(jnp.square(x @ p["w"] + p["b"][None, :] - y)) * 4  # noqa: E731
    return params, loss


def fit(optimizer, params, loss, steps=400):
    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    carry, _ = jax.lax.scan(step, (params, optimizer.init(params)), length=steps)
    return carry[0]


@pytest.mark.parametrize(("name", "strength"), [("soft", 0.05), ("hard", 0.08)])
def test_training_finds_the_true_rank(name, strength):
    params, loss = regression()
    plain = fit(optax.sgd(0.2), params, loss)
    assert np.sum(singular(plain["w"]) > 1e-4) == 8
    rate = lambda step: strength * jnp.minimum(step / 50, 1.0)  # noqa: E731
    link = jc.proximal(OPERATORS[name], rate, where="w")
    out = fit(optax.chain(optax.sgd(0.2), link), params, loss)
    assert np.sum(singular(out["w"]) > 1e-4) == 2
    np.testing.assert_array_equal(out["dense"], 1.0)
    assert float(loss(out)) < float(loss(plain)) + 0.2
    packed = jc.pack(jc.masked(jc.low_rank(energy=1 - 1e-6), "w"), out)
    assert packed["w"].u.shape == (12, 2)


def test_vmap_over_training_strengths_equals_a_loop():
    params, loss = regression()
    run = lambda s: fit(  # noqa: E731
        optax.chain(optax.sgd(0.2), jc.proximal(nuclear_norm, s, where="w")), params, loss, 5
    )["w"]
    strengths = jnp.array([0.0, 0.05, 0.5])
    mapped = jax.vmap(run)(strengths)
    for i, s in enumerate(strengths):
        np.testing.assert_allclose(mapped[i], run(s), atol=1e-5)


@operators
def test_what_does_not_fit_is_refused(name):
    f = OPERATORS[name]
    with pytest.raises(TypeError, match=r"`w` must hold real floating-point .*int32\[4, 4\]"):
        f(jnp.ones((4, 4), jnp.int32), 0.5)
    with pytest.raises(ValueError, match=r"two or more dimensions, got float32\[3\] at 'b'"):
        f(jnp.ones(3), 0.5, path="b")
    with pytest.raises(ValueError, match=r"two or more dimensions, got float32\[3\]\."):
        jax.jit(f)(jnp.ones(3), 0.5)
    with pytest.raises(ValueError, match=r"`strength` must be a real number of at least 0"):
        f(jnp.ones((4, 4)), -0.5)
    link = optax.chain(optax.sgd(0.1), jc.proximal(f, 0.1, where="b"))
    params = {"b": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"at 'b'"):
        link.update(params, link.init(params), params)
