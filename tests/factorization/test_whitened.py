"""Low rank with statistics: the outputs change least."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc

RNG = np.random.default_rng(0)
X = RNG.normal(size=(200, 12)) * np.geomspace(0.1, 3, 12)


def f32(x):
    return jnp.asarray(x, jnp.float32)


def dense(p, x):
    return x @ p["w"]


def transposed(p, x):
    return x @ p["w"].T


def heads(p, x):
    return jnp.einsum("nd,dhk->nhk", x, p["w"])


# The function, the shape of its leaf, and from the leaf in float64 to the outputs.
LAYERS = {
    "wide": (dense, (12, 20)),
    "tall": (dense, (12, 5)),
    "transposed": (transposed, (20, 12)),
    "transposed tall": (transposed, (5, 12)),
    "heads": (heads, (12, 3, 6)),
}


def outputs(fn, w):
    if fn is heads:
        return np.einsum("nd,dhk->nhk", X, w)
    return X @ (w.T if fn is transposed else w)


def best(fn, w, rank):
    """The least error of the outputs over leaves of that rank, seen by their last axis."""
    y = outputs(fn, w)
    y = y.reshape(-1, w.shape[-1]) if fn is heads else y
    return np.sqrt(np.sum(np.linalg.svd(y, compute_uv=False)[rank:] ** 2))


@pytest.mark.parametrize("rank", [0, 2, 4, 30])
@pytest.mark.parametrize("name", LAYERS)
def test_the_outputs_change_least(name, rank):
    fn, shape = LAYERS[name]
    w = RNG.normal(size=shape)
    params = {"w": f32(w)}
    stats = jc.calibrate(fn, params, [(f32(X),)], gram=True)
    p = jc.low_rank(rank)
    new, structure = jc.compress(p, params, stats=stats, return_structure=True)
    got = np.asarray(new["w"], np.float64)
    error = np.linalg.norm(outputs(fn, w) - outputs(fn, got))
    total = np.linalg.norm(outputs(fn, w))
    assert best(fn, w, rank) - 1e-6 * total <= error <= best(fn, w, rank) + 4e-6 * total
    assert np.linalg.matrix_rank(got.reshape(-1, shape[-1]), tol=1e-5) <= rank
    plain = np.asarray(jc.compress(p, params)["w"], np.float64)
    if 0 < rank < 30:
        assert error < 0.99 * np.linalg.norm(outputs(fn, w) - outputs(fn, plain))
    like = jax.eval_shape(p.find, params)
    assert jax.tree.structure(structure) == jax.tree.structure(like)
    assert [x.shape for x in jax.tree.leaves(structure)] == [x.shape for x in jax.tree.leaves(like)]
    np.testing.assert_allclose(p.project(new, structure)["w"], got, atol=1e-5)
    packed = p.pack(new, structure)
    np.testing.assert_allclose(jc.todense(packed)["w"], got, atol=1e-5)


def test_energy_is_that_of_the_outputs():
    w = RNG.normal(size=(12, 20))
    params = {"w": f32(w)}
    stats = jc.calibrate(dense, params, [(f32(X),)], gram=True)
    s = np.linalg.svd(X @ w, compute_uv=False) ** 2
    for energy in (0.5, 0.9):
        wanted = int(np.searchsorted(np.cumsum(s) / s.sum(), energy)) + 1
        new = jc.compress(jc.low_rank(energy=energy), params, stats=stats)["w"]
        assert np.linalg.matrix_rank(new, tol=1e-4) == wanted
    plain = np.linalg.svd(w, compute_uv=False) ** 2
    assert int(np.searchsorted(np.cumsum(plain) / plain.sum(), 0.9)) + 1 != wanted


def test_layers_of_a_scan_and_ranks_under_vmap():
    w = RNG.normal(size=(3, 12, 12))
    params = {"w": f32(w)}

    def fn(p, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]

    stats = jc.calibrate(fn, params, [(f32(X),)], gram=True)
    ranks = jnp.array([1, 5, 9])
    f = lambda rank: jc.compress(jc.low_rank(rank), params, stats=stats)["w"]  # noqa: E731
    several = jax.jit(jax.vmap(f))(ranks)
    grams = np.asarray(stats["w"].gram.matrix, np.float64)
    roots = [np.linalg.cholesky(g + 1e-9 * np.eye(12)).T for g in grams]
    stacked = np.concatenate([r @ each for r, each in zip(roots, w, strict=True)])
    s = np.linalg.svd(stacked, compute_uv=False)
    for i, rank in enumerate((1, 5, 9)):
        np.testing.assert_allclose(several[i], f(rank), atol=1e-4)
        e = [r @ (a - b) for r, a, b in zip(roots, w, np.float64(several[i]), strict=True)]
        np.testing.assert_allclose(np.sum(np.square(e)), np.sum(s[rank:] ** 2), rtol=1e-4)


def test_a_singular_gram_matrix_and_nan():
    x = np.zeros((5, 12))
    x[:, :2] = RNG.normal(size=(5, 2)) * 300
    params = {"w": f32(RNG.normal(size=(12, 20))).at[3, 4].set(jnp.nan)}
    stats = jc.calibrate(dense, {"w": jnp.ones((12, 20))}, [(f32(x),)], gram=True)
    new = jc.compress(jc.low_rank(2), params, stats=stats)["w"]
    assert bool(jnp.isfinite(new).all())
    np.testing.assert_allclose(x @ np.asarray(new), x @ np.nan_to_num(params["w"]), atol=1e-3)


def test_what_is_not_possible_is_refused():
    params = {"w": jnp.ones((12, 20))}
    stats = jc.calibrate(dense, params, [(f32(X),)], gram=True)
    with pytest.raises(ValueError, match=r"low rank by that alone.*low_rank_plus joins"):
        jc.compress(jc.chain(jc.low_rank(2), jc.quantize(4)), params, stats=stats)
    fn = lambda p, x: jnp.einsum("nd,kd->nk", x.reshape(-1, 12), p["v"].reshape(4, 12))  # noqa: E731
    params = {"v": jnp.ones((4, 3, 4))}
    stats = jc.calibrate(fn, params, [(f32(X),)], gram=True)
    with pytest.raises(ValueError, match="compress: `params` must sum over the last axis alone"):
        jc.compress(jc.low_rank(2), params, stats=stats)


def test_factors_are_quantized_for_their_own_inputs():
    mixed = f32(X @ RNG.normal(size=(12, 12)))
    params = {"w": f32(RNG.normal(size=(12, 20))), "v": f32(RNG.normal(size=(20, 8)))}
    fn = lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"]  # noqa: E731
    packed = jc.pack(jc.masked(jc.low_rank(4), "w"), params)
    run = jc.lift(fn)
    stats = jc.calibrate(run, packed, [(mixed,)], gram=True)
    assert set(stats) == {"w/u", "w/v", "v"}
    p = jc.quantize(3, ranges=jc.quantization.min_max)
    new, structure = jc.compress(p, packed, stats=stats, return_structure=True)
    small = p.pack(new, structure)
    assert isinstance(small["w"].u, jc.arrays.Quantized)
    assert isinstance(small["w"].v, jc.arrays.Quantized)
    np.testing.assert_allclose(run(small, mixed), run(new, mixed), atol=1e-4)

    rounded = jc.compress(p, packed)

    def error(found, leaf):
        x = mixed @ packed["w"].u if leaf == "v" else mixed
        return np.linalg.norm(x @ (getattr(found["w"], leaf) - getattr(packed["w"], leaf)))

    for leaf in "uv":
        assert error(new, leaf) < 0.9 * error(rounded, leaf), leaf
    one_by_one = jc.solvers.sequential(p, run, packed, [(mixed,)], order=["w", "v"])
    assert not bool((one_by_one["w"].u == packed["w"].u).all())


@pytest.mark.parametrize("name", ["wide", "transposed", "heads"])
def test_quantized_plus_low_rank_is_the_best_correction_of_what_gptq_leaves(name):
    fn, shape = LAYERS[name]
    w = RNG.normal(size=shape)
    params = {"w": f32(w)}
    stats = jc.calibrate(fn, params, [(f32(X),)], gram=True)
    base = jc.quantize(3, ranges=jc.quantization.min_max)
    p = jc.factorization.low_rank_plus(base, 2)
    new, structure = jc.compress(p, params, stats=stats, return_structure=True)
    gptq = jc.compress(base, params, stats=stats)

    def error(new):
        return np.linalg.norm(outputs(fn, w - np.asarray(new["w"], np.float64)))

    left = w - np.asarray(gptq["w"], np.float64)
    np.testing.assert_allclose(error(new), best(fn, left, 2), rtol=1e-4)
    assert error(new) < 0.9 * error(gptq)
    assert error(new) < error(jc.compress(p, params))
    np.testing.assert_allclose(p.project(new, structure)["w"], new["w"], atol=1e-5)
    like = jax.eval_shape(p.find, params)
    assert jax.tree.structure(structure) == jax.tree.structure(like)
    packed = p.pack(new, structure)
    np.testing.assert_allclose(jc.todense(packed)["w"], new["w"], atol=1e-5)


def test_a_nan_counts_as_zero_beside_low_rank():
    w = f32(RNG.normal(size=(12, 20)))
    params = {"w": w.at[3, 4].set(jnp.nan)}
    stats = jc.calibrate(dense, params, [(f32(X),)], gram=True)
    base = jc.quantize(4, ranges=jc.quantization.min_max)
    p = jc.factorization.low_rank_plus(base, 2)
    found = jc.compress(p, params, stats=stats)["w"]
    wanted = jc.compress(p, {"w": w.at[3, 4].set(0.0)}, stats=stats)["w"]
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_sparse_plus_low_rank_for_the_outputs_under_vmap():
    params = {"w": f32(RNG.normal(size=(12, 20)))}
    stats = jc.calibrate(dense, params, [(f32(X),)], gram=True)

    def f(rank, sparsity):
        p = jc.factorization.low_rank_plus(jc.prune(sparsity), rank, max_rank=3)
        return jc.compress(p, params, stats=stats)["w"]

    several = jax.jit(jax.vmap(f))(jnp.array([0, 1, 3]), jnp.array([0.5, 0.7, 0.9]))
    for i, (rank, sparsity) in enumerate([(0, 0.5), (1, 0.7), (3, 0.9)]):
        np.testing.assert_allclose(several[i], f(rank, sparsity), atol=1e-4)
    sparse = jc.compress(jc.prune(0.5), params, stats=stats)["w"]
    np.testing.assert_allclose(several[0], sparse, atol=1e-5)
