"""Eckart–Young against NumPy float64, energy, factors, the edges."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc

SHAPES = [(16, 8), (8, 16), (3, 3, 2, 4)]


def draw(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def matrix(w):
    return np.asarray(w, np.float64).reshape(-1, w.shape[-1])


def truncated(w, rank):
    u, s, vt = np.linalg.svd(matrix(w), full_matrices=False)
    return ((u[:, :rank] * s[:rank]) @ vt[:rank]).reshape(w.shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [0, 1, 3, 4, 100])
def test_is_the_truncated_svd(shape, rank):
    w = draw(shape)
    want = truncated(w, rank)
    for p in (jc.low_rank(rank), jc.low_rank(jnp.asarray(rank)), jc.low_rank(rank, max_rank=100)):
        np.testing.assert_allclose(jc.compress(p, w), want, atol=1e-5)
    s = np.linalg.svd(matrix(w), compute_uv=False)
    error = np.linalg.norm(matrix(jc.compress(jc.low_rank(rank), w)) - matrix(w))
    np.testing.assert_allclose(error, np.sqrt((s[rank:] ** 2).sum()), atol=1e-5)


@pytest.mark.parametrize("energy", [0.0, 0.3, 0.9, 0.999, 1.0])
def test_energy_is_of_squared_singular_values(energy):
    w = draw((16, 8))
    s = np.linalg.svd(matrix(w), compute_uv=False) ** 2
    want = next((r for r in range(9) if s[:r].sum() >= energy * s.sum() * (1 - 1e-6)), 8)
    out = jc.compress(jc.low_rank(energy=energy), w)
    assert np.linalg.matrix_rank(out, tol=1e-4) == want


@pytest.mark.parametrize("shape", SHAPES)
def test_packed_factors(shape):
    w = draw(shape)
    packed = jc.pack(jc.low_rank(1), w)
    assert isinstance(packed, jc.arrays.LowRank)
    assert packed.nbytes == 4 * sum(matrix(w).shape)
    np.testing.assert_allclose(packed.todense(), jc.compress(jc.low_rank(1), w), atol=1e-5)
    full = jc.pack(jc.low_rank(100), w)
    assert isinstance(full, jax.Array)


def test_a_held_basis_projects_new_weights_on_the_held_subspace():
    p, w, other = jc.low_rank(2), draw((16, 8)), draw((16, 8), seed=1)
    held = p.find(w)
    v = np.linalg.svd(matrix(w), full_matrices=False)[2][:2]
    np.testing.assert_allclose(p.project(other, held), matrix(other) @ v.T @ v, atol=1e-5)


def test_one_compilation_serves_all_ranks():
    w = draw((16, 8))
    sweep = jax.jit(jax.vmap(lambda r: jc.compress(jc.low_rank(r), w)))
    for r, out in enumerate(sweep(jnp.arange(9))):
        np.testing.assert_allclose(out, truncated(w, r), atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_factors_start_at_the_svd_and_are_balanced(shape):
    w = draw(shape)
    r = jc.low_rank_factors(3)
    latent = r.init({"w": w, "b": jnp.ones(3)})
    np.testing.assert_allclose(r.apply(latent)["w"], truncated(w, 3), atol=1e-5)
    u, v = matrix(latent["w"].u), matrix(latent["w"].v)
    np.testing.assert_allclose(u.T @ u, v @ v.T, atol=1e-5)


def test_training_factors_is_gradient_descent_on_them():
    w, goal = draw((16, 8)), draw((16, 8), seed=1)
    opt = jc.reparametrized(optax.sgd(0.05), jc.low_rank_factors(2))
    params = {"w": w}
    state = opt.init(params)
    factors = jc.latent(state)["w"]
    u, v = np.asarray(factors.u, np.float64), np.asarray(factors.v, np.float64)
    dense = np.asarray(w, np.float64)
    for _ in range(3):
        updates, state = opt.update({"w": params["w"] - goal}, state, params)
        params = optax.apply_updates(params, updates)
        g = dense - np.asarray(goal, np.float64)
        u, v = u - 0.05 * g @ v.T, v - 0.05 * u.T @ g
        dense = u @ v
    np.testing.assert_allclose(params["w"], dense, atol=1e-4)
    packed = jc.pack(state, params)
    assert isinstance(packed["w"], jc.arrays.LowRank)
    np.testing.assert_allclose(packed["w"].todense(), dense, atol=1e-4)


def test_edges():
    assert np.isnan(jc.compress(jc.low_rank(1), jnp.full((4, 4), jnp.nan))).all()
    np.testing.assert_array_equal(jc.compress(jc.low_rank(2), jnp.zeros((4, 4))), 0)
    assert jc.compress(jc.low_rank(2), jnp.zeros((0, 4))).shape == (0, 4)
    nan = jc.pack(jc.low_rank(1), {"w": jnp.full((8, 8), jnp.nan)})["w"]
    assert np.isnan(jc.todense(nan)).all()


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (lambda: jc.low_rank(), ValueError, "not both"),
        (lambda: jc.low_rank(2, 0.5), ValueError, "not both"),
        (lambda: jc.low_rank(-1), ValueError, "rank"),
        (lambda: jc.low_rank(energy=1.5), ValueError, "energy"),
        (lambda: jc.low_rank(2, max_rank=0.5), TypeError, "max_rank"),
        (
            lambda: jc.masked(jc.low_rank(2), "b"),
            ValueError,
            "two or more dimensions, got float32\\[3\\] at 'b'",
        ),
    ],
)
def test_bad_input(make, kind, text):
    with pytest.raises(kind, match=text):
        jc.compress(make(), {"w": jnp.ones((4, 4)), "b": jnp.ones(3)})
    with pytest.raises(ValueError, match="rank"):
        jc.low_rank_factors(-1)


def test_gradients_are_finite_at_repeated_singular_values():
    w = jnp.eye(6)
    c = jnp.asarray(np.random.default_rng(0).normal(size=(6, 6)), jnp.float32)
    p = jc.low_rank(3)
    gradient = jax.grad(lambda w: jnp.sum(c * jc.compress(p, {"w": w})["w"]))(w)
    q = np.asarray(p.find({"w": w})["w"].vectors)
    np.testing.assert_allclose(gradient, q @ q.T @ np.asarray(c), atol=1e-6)


@pytest.mark.parametrize("method", ["exact", "gram", "randomized"])
def test_every_method_finds_the_subspace(method):
    rng = np.random.default_rng(0)
    w = rng.normal(size=(40, 3)) @ rng.normal(size=(3, 60))
    new = jc.compress(jc.low_rank(3, method=method), {"w": jnp.asarray(w, jnp.float32)})["w"]
    np.testing.assert_allclose(new, w, atol=2e-5)
    with pytest.raises(ValueError, match="low_rank: `method`"):
        jc.low_rank(3, method="fast")  # pyright: ignore[reportArgumentType]


def test_one_decomposition_serves_all_ranks():
    w = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(12, 20)), jnp.float32)}
    ranks = jnp.array([0, 2, 9])
    f = jax.vmap(lambda r: jc.compress(jc.low_rank(r), w)["w"])
    jaxpr = str(jax.make_jaxpr(f)(ranks))
    assert "eigh" in jaxpr
    assert "f32[3,12,12] = eigh" not in jaxpr
    for i, r in enumerate((0, 2, 9)):
        np.testing.assert_allclose(f(ranks)[i], jc.compress(jc.low_rank(r), w)["w"], atol=1e-5)
