"""Weighted decompositions against the whitened SVD in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc

weighted_svd = jc.factorization.weighted_svd
M, N, R = 24, 16, 5
RNG = np.random.default_rng(0)
W = RNG.normal(size=(M, N))
X = RNG.normal(size=(200, M))


def root(weight, size):
    """A square root of a weight, in float64; of none, of a diagonal, or of a full one."""
    if weight is None:
        return np.eye(size)
    weight = np.asarray(weight, np.float64)
    if weight.ndim == 1:
        return np.diag(np.sqrt(weight))
    values, vectors = np.linalg.eigh(weight)
    return np.sqrt(np.maximum(values, 0))[:, None] * vectors.T


def best(w, left, right, rank):
    """The least weighted squared error: the squared singular values that are dropped."""
    s = np.linalg.svd(root(left, len(w)) @ w @ root(right, w.shape[1]).T, compute_uv=False)
    return np.sum(s[rank:] ** 2)


def error(w, found, left, right):
    e = w - np.asarray(found.u, np.float64) @ np.asarray(found.v, np.float64)
    return np.linalg.norm(root(left, len(w)) @ e @ root(right, w.shape[1]).T) ** 2


POSITIVE = np.abs(RNG.normal(size=M)) + 0.1
OUTPUTS = np.abs(RNG.normal(size=N)) + 0.1
GRAM, HESSIAN = X.T @ X, (lambda y: y.T @ y)(RNG.normal(size=(50, N)))
WEIGHTS = {
    "plain": (None, None),
    "diagonal": (POSITIVE, None),
    "whitened": (GRAM, None),
    "outputs": (None, OUTPUTS),
    "full outputs": (None, HESSIAN),
    "both diagonal": (POSITIVE, OUTPUTS),
    "whitened, outputs": (GRAM, OUTPUTS),
    "diagonal, full outputs": (POSITIVE, HESSIAN),
    "both full": (GRAM, HESSIAN),
}


def f32(x):
    return None if x is None else jnp.asarray(x, jnp.float32)


@pytest.mark.parametrize("method", ["exact", "gram"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_it_is_the_best_and_says_how_good(name, method):
    left, right = WEIGHTS[name]
    found = jax.jit(
        lambda w, left, right: weighted_svd(w, R, left=left, right=right, method=method)
    )(f32(W), f32(left), f32(right))
    assert found.u.shape == (M, R)
    assert found.v.shape == (R, N)
    got, want = error(W, found, left, right), best(W, left, right, R)
    assert want * (1 - 1e-5) <= got <= want * (1 + 1e-5)
    np.testing.assert_allclose(found.loss, want, rtol=1e-4)


@pytest.mark.parametrize("name", WEIGHTS)
def test_full_rank_is_exact(name):
    left, right = WEIGHTS[name]
    found = weighted_svd(f32(W), N, left=f32(left), right=f32(right))
    np.testing.assert_allclose(found.u @ found.v, W, atol=3e-5)
    assert float(found.loss) == 0
    zero = weighted_svd(f32(W), 0, left=f32(left), right=f32(right))
    np.testing.assert_array_equal(zero.u @ zero.v, np.zeros((M, N)))
    np.testing.assert_allclose(zero.loss, best(W, left, right, 0), rtol=1e-5)


def inputs():
    q = np.linalg.qr(RNG.normal(size=(M, M)))[0]
    base = RNG.normal(size=(200, M))
    loud = base.copy()
    loud[:, [3, 7]] *= 300
    dead = np.maximum(base, 0)
    dead[:, ::3] = 0
    offset = 300 * RNG.normal(size=M)
    return {
        "well conditioned": base,
        "fast decay": base * np.geomspace(1, 1e-6, M) @ q,
        "fewer tokens than features": base[:10],
        "dead ReLU channels": dead,
        "outlier channels": loud,
        "outliers and decay": (base * np.geomspace(1, 1e-3, M) @ q)
        * np.where(np.arange(M) % 7 == 0, 300, 1),
        "nearly low rank": base[:, :4] @ RNG.normal(size=(4, M)) + 1e-4 * base,
        "offset": base + 30,
        "large offset": base * np.geomspace(1, 1e-2, M) + offset,
        "all zero": np.zeros((20, M)),
    }


CASES = inputs()


@pytest.mark.parametrize("rank", [2, 8])
@pytest.mark.parametrize("name", CASES)
def test_hard_gram_matrices(name, rank):
    """In float32 within 4e-5 of the outputs' norm of the best in float64, which a Cholesky
    factor misses or turns to NaN; with the mean apart within 1e-7 also where it is large."""
    x = CASES[name]
    s = np.linalg.svd(x @ W, compute_uv=False)
    least, total = np.sqrt(np.sum(s[rank:] ** 2)), np.linalg.norm(x @ W)

    def excess(found):
        assert all(np.isfinite(part).all() for part in found)
        new = np.asarray(found.u, np.float64) @ np.asarray(found.v, np.float64)
        return (np.linalg.norm(x @ (W - new)) - least) / max(total, 1e-30)

    x32 = x.astype(np.float32)
    whole = weighted_svd(f32(W), rank, left=jnp.asarray(x32.T @ x32))
    assert excess(whole) < (2e-4 if name == "large offset" else 4e-5)
    mean = x32.mean(0)
    centred = (x - mean).astype(np.float32)
    apart = weighted_svd(
        f32(W),
        rank,
        left=jnp.asarray(centred.T @ centred),
        left_offset=jnp.asarray(np.sqrt(np.float32(len(x))) * mean),
    )
    assert excess(apart) < (1e-5 if name == "nearly low rank" else 1e-7)


def test_outputs_without_weight_and_inputs_without_weight():
    right = f32(OUTPUTS).at[2].set(0.0)
    found = weighted_svd(f32(W), R, left=f32(GRAM), right=right)
    new = found.u @ found.v
    np.testing.assert_array_equal(new[:, 2], np.zeros(M))
    np.testing.assert_allclose(
        error(W, found, GRAM, right), best(W, GRAM, np.asarray(right), R), rtol=1e-4
    )
    dead = np.zeros(M)
    nothing = weighted_svd(f32(W), R, left=f32(dead))
    assert bool(jnp.isfinite(nothing.u @ nothing.v).all())
    assert float(nothing.loss) == 0


def test_one_decomposition_for_all_ranks():
    ranks = jnp.array([0, 3, 7, 30])
    f = lambda rank: weighted_svd(f32(W), rank, left=f32(GRAM))  # noqa: E731
    several = jax.jit(jax.vmap(f))(ranks)
    for i, rank in enumerate(ranks):
        one = f(rank)
        np.testing.assert_allclose(several.u[i] @ several.v[i], one.u @ one.v, atol=1e-4)
        np.testing.assert_allclose(several.loss[i], one.loss, rtol=1e-5)
        assert int(jnp.sum(jnp.any(one.v != 0, axis=1))) == min(int(rank), N)
    jaxpr = str(jax.make_jaxpr(jax.vmap(f))(ranks))
    assert f"f32[{len(ranks)},{M},{M}]" not in jaxpr  # nothing of full size is repeated
    limited = weighted_svd(f32(W), jnp.int32(3), left=f32(GRAM), max_rank=6)
    assert limited.u.shape == (M, 6)
    np.testing.assert_allclose(limited.u @ limited.v, f(3).u @ f(3).v, atol=1e-4)


@pytest.mark.parametrize("which", ["w", "left", "right", "offset"])
def test_what_is_not_finite_shows(which):
    given = {"w": f32(W), "left": f32(GRAM), "right": f32(HESSIAN), "offset": jnp.ones(M)}
    given[which] = given[which].at[-1].set(jnp.nan)
    found = weighted_svd(
        given["w"], R, left=given["left"], right=given["right"], left_offset=given["offset"]
    )
    assert bool(jnp.isnan(found.u @ found.v).any())


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        ({"left": jnp.ones(3)}, ValueError, r"weighted_svd: `left` must have the shape \[24\]"),
        ({"right": jnp.ones((3, 3))}, ValueError, "weighted_svd: `right`"),
        ({"left": -jnp.ones(M)}, ValueError, "no negative entries on its diagonal"),
        ({"left": jnp.ones(M, int)}, TypeError, "weighted_svd: `left`"),
        ({"left_offset": jnp.ones(M)}, ValueError, "`left_offset` must be given with `left`"),
        ({"rank": -1}, ValueError, "weighted_svd: `rank`"),
        ({"w": jnp.ones((2, 3, 4))}, ValueError, r"be a matrix.*jax\.vmap"),
        ({"method": "fast"}, ValueError, "`method`"),
    ],
)
def test_bad_input(kwargs, error, text):
    given = {"w": f32(W), "rank": R} | kwargs
    with pytest.raises(error, match=text):
        weighted_svd(given.pop("w"), given.pop("rank"), **given)
