"""Ranks against NumPy float64, written from the papers, and matrices whose rank is known."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, optimize

from jaxcompress import factorization as ranks
from jaxcompress.factorization import _noise_ranks

SHAPES = [(40, 40), (24, 60), (50, 8)]
COUNTS = {
    "energy": lambda s, shape: ranks.energy_rank(s, 0.9),
    "numerical": ranks.numerical_rank,
    "evbmf": ranks.evbmf_rank,
    "evbmf_noise": lambda s, shape: ranks.evbmf_rank(s, shape, 0.1),
    "gavish_donoho": ranks.gavish_donoho_rank,
    "gavish_donoho_noise": lambda s, shape: ranks.gavish_donoho_rank(s, shape, 0.1),
}
FLOATS = {"stable": ranks.stable_rank, "effective": ranks.effective_rank}


def spectrum(shape, rank, noise, seed=0):
    rng = np.random.default_rng(seed)
    signal = rng.normal(size=(shape[0], rank)) @ rng.normal(size=(rank, shape[1]))
    return np.linalg.svd(signal + noise * rng.normal(size=shape), compute_uv=False)


def f32(s):
    return jnp.asarray(s, jnp.float32)


# --- Oracles in float64.


def phi_zero(alpha):
    phi = lambda z: np.log(z + 1) / z - 0.5  # noqa: E731
    return optimize.brentq(lambda t: phi(t) + phi(t / alpha), 1e-9, 100, xtol=1e-14)


def evb_energy(variance, s, shape):
    """Nakajima et al. 2015, with the logarithms of the singular values."""
    alpha, bar = min(shape) / max(shape), evb_bar(shape)
    x = s**2 / (max(shape) * variance)
    total = np.sum(x - np.log(x))
    x = x[x > bar]
    tau = 0.5 * (x - (1 + alpha) + np.sqrt((x - (1 + alpha)) ** 2 - 4 * alpha))
    return total + np.sum(np.log(tau + 1) + alpha * np.log(tau / alpha + 1) - tau)


@functools.cache
def evb_bar(shape):
    alpha = min(shape) / max(shape)
    tau = phi_zero(alpha)
    return (1 + tau) * (1 + alpha / tau)


def evb_best(s, shape):
    """The global minimum, by a bounded search between all pairs of neighbouring kinks."""
    large = max(shape)
    bar = evb_bar(shape)
    low = s[-1] ** 2 / (large * bar) / 10
    ends = np.unique(np.clip([low, *(s**2 / (large * bar)), np.mean(s**2) / large], low, None))
    found = []
    for a, b in itertools.pairwise(ends):
        out = optimize.minimize_scalar(
            evb_energy, bounds=(a, b), args=(s, shape), method="bounded", options={"xatol": 1e-9}
        )
        found.append((out.fun, out.x))
    return min(found)


def pastur_median(beta):
    low, high = (1 - np.sqrt(beta)) ** 2, (1 + np.sqrt(beta)) ** 2

    def density(u):
        # In the root of t - low: the density itself is infinite at 0 for squares.
        rest = low + u * u
        return u * u * np.sqrt(high - rest) / (np.pi * beta * rest)

    def mass(u):
        near = [p for p in (np.sqrt(low), 10 * np.sqrt(low)) if 0 < p < u]
        return integrate.quad(density, 0, u, limit=500, points=near or None)[0]

    return low + optimize.brentq(lambda u: mass(u) - 0.5, 1e-9, np.sqrt(high - low)) ** 2


def donoho_factor(beta):
    root = np.sqrt(beta**2 + 14 * beta + 1)
    return np.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + root))


# --- Counts.


@pytest.mark.parametrize("energy", [0.0, 0.3, 0.8, 0.99, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_energy_is_of_squares(shape, energy):
    s = spectrum(shape, 3, 0.5)
    held = [np.sum(s[:r] ** 2) / np.sum(s**2) for r in range(len(s) + 1)]
    want = next((r for r, part in enumerate(held) if part >= energy), len(s))
    assert ranks.energy_rank(f32(s), energy) == want
    assert jax.jit(ranks.energy_rank)(f32(s), jnp.asarray(energy)) == want


def test_energy_of_one_drops_only_zeros():
    s = f32([1e19, 1e18, 1e15, 0.0])
    assert ranks.energy_rank(s, 1.0) == 3
    assert ranks.energy_rank(s * 1e-35, 0.5) == 1


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e15])
def test_numerical_rank_is_that_of_numpy(shape, scale):
    rng = np.random.default_rng(0)
    for rank in (0, 1, 3, 8):
        w = rng.normal(size=(shape[0], rank)) @ rng.normal(size=(rank, shape[1])) * scale
        w = w.astype(np.float32)
        s = jnp.linalg.svd(jnp.asarray(w), compute_uv=False)
        assert ranks.numerical_rank(s, shape) == np.linalg.matrix_rank(w) == rank
        for rtol in (1e-3, 0.4):
            want = np.linalg.matrix_rank(w, rtol=rtol)
            assert ranks.numerical_rank(s, shape, rtol) == want
            assert ranks.numerical_rank(s, shape, jnp.asarray(rtol)) == want


def test_numerical_rank_is_above_not_at_the_threshold():
    eps = float(np.finfo(np.float32).eps)
    s = f32([1.0, 64 * eps * 1.01, 64 * eps, 64 * eps * 0.99])
    assert ranks.numerical_rank(s, (64, 32)) == 2
    assert ranks.numerical_rank(s, (4, 128)) == 1


@pytest.mark.parametrize("shape", [(1, 1), (7, 7), (3, 50), (900, 20), (4096, 1)])
def test_evb_threshold(shape):
    got = _noise_ranks._evb_threshold(min(shape) / max(shape))
    np.testing.assert_allclose(got, evb_bar(shape), rtol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("noise", [0.05, 0.5, 2.0])
def test_evbmf_finds_the_minimum_of_the_free_energy(shape, noise):
    for rank in (0, 1, 3):
        s = spectrum(shape, rank, noise, seed=rank)
        least, variance = evb_best(s, shape)
        want = np.sum(s > np.sqrt(max(shape) * evb_bar(shape) * variance))
        assert ranks.evbmf_rank(f32(s), shape) == want
        top = s[0]
        found = _noise_ranks._evb_log_variance(
            f32(s / top), jnp.zeros(1), small=min(shape), large=max(shape)
        )
        got = evb_energy(np.exp(float(found[0])) * top**2, s, shape)
        assert got <= least + 1e-4 * len(s)


def test_evbmf_finds_the_global_minimum_of_several():
    """A spectrum with two gaps, where the free energy has a valley for each."""
    shape, several = (30, 40), 0
    rng = np.random.default_rng(2)
    for _ in range(20):
        parts = [rng.integers(1, 9), rng.integers(1, 9)]
        s = [rng.uniform(50, 60, parts[0]), rng.uniform(5, 8, parts[1])]
        s.append(rng.uniform(0.2, 1.0, 30 - sum(parts)))
        s = np.sort(np.concatenate(s))[::-1]
        variance = evb_best(s, shape)[1]
        want = np.sum(s > np.sqrt(max(shape) * evb_bar(shape) * variance))
        assert ranks.evbmf_rank(f32(s), shape) == want
        grid = np.geomspace(s[-1] ** 2 / 400, np.mean(s**2) / 40, 2000)
        values = np.array([evb_energy(v, s, shape) for v in grid[::10]])
        several += np.sum((values[1:-1] < values[:-2]) & (values[1:-1] < values[2:])) > 1
    assert several > 0


@pytest.mark.parametrize("shape", SHAPES)
def test_true_ranks_are_recovered(shape):
    for seed in range(4):
        for rank in (0, 1, 3):
            s = f32(spectrum(shape, rank, 0.1, seed))
            assert ranks.evbmf_rank(s, shape) == rank
            assert ranks.evbmf_rank(s, shape, 0.1) == rank
            assert ranks.gavish_donoho_rank(s, shape, 0.1) == rank
            # The threshold of least error keeps a direction of pure noise now and then.
            assert rank <= ranks.gavish_donoho_rank(s, shape) <= rank + 1


@pytest.mark.parametrize("shape", SHAPES)
def test_known_noise_is_the_threshold_of_the_paper(shape):
    s = np.linspace(30, 0.1, min(shape))
    beta = min(shape) / max(shape)
    for noise in (0.0, 0.3, 1.0, 10.0):
        want = np.sum(s > noise * np.sqrt(max(shape) * evb_bar(shape)))
        assert ranks.evbmf_rank(f32(s), shape, noise) == want
        want = np.sum(s > noise * np.sqrt(max(shape)) * donoho_factor(beta))
        assert ranks.gavish_donoho_rank(f32(s), shape, jnp.asarray(noise)) == want


@pytest.mark.parametrize("shape", SHAPES)
def test_unknown_noise_is_the_median_of_marchenko_and_pastur(shape):
    beta = min(shape) / max(shape)
    median = pastur_median(beta)
    np.testing.assert_allclose(_noise_ranks._marchenko_pastur_median(beta), median, rtol=1e-6)
    for seed in range(5):
        s = np.sort(np.random.default_rng(seed).uniform(0, 3, min(shape)))[::-1]
        want = np.sum(s > donoho_factor(beta) / np.sqrt(median) * np.median(s))
        assert ranks.gavish_donoho_rank(f32(s), shape) == want


def test_coefficients_published_by_gavish_and_donoho():
    """4 / sqrt(3) and 2.858; their fit of omega is good to 0.02."""
    assert donoho_factor(1.0) == pytest.approx(4 / np.sqrt(3))
    for beta in (0.001, 0.05, 0.3, 0.7, 0.999, 1.0):
        omega = donoho_factor(beta) / np.sqrt(_noise_ranks._marchenko_pastur_median(beta))
        fit = 0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43
        assert omega == pytest.approx(fit, abs=0.022)
    assert omega == pytest.approx(2.858, abs=1e-3)


@pytest.mark.parametrize("beta", [1e-6, 0.25, 0.9999])
def test_median_of_marchenko_and_pastur_at_the_ends(beta):
    got = _noise_ranks._marchenko_pastur_median(beta)
    np.testing.assert_allclose(got, pastur_median(beta), rtol=1e-4)


# --- Real-valued ranks.


@pytest.mark.parametrize("shape", SHAPES)
def test_stable_and_effective_rank(shape):
    s = spectrum(shape, 3, 0.5)
    w = np.diag(s)
    norms = np.linalg.norm(w, "fro") ** 2 / np.linalg.norm(w, 2) ** 2
    np.testing.assert_allclose(ranks.stable_rank(f32(s)), norms, rtol=1e-6)
    p = s / s.sum()
    np.testing.assert_allclose(ranks.effective_rank(f32(s)), np.exp(-(p * np.log(p)).sum()), 1e-5)
    for scale in (1e-30, 1e30):
        for f in FLOATS.values():
            np.testing.assert_allclose(f(f32(s * scale)), f(f32(s)), rtol=1e-5)


@pytest.mark.parametrize("name", FLOATS)
def test_equal_values_and_zeros_give_their_number(name):
    s = f32([3.0] * 5 + [0.0] * 4)
    np.testing.assert_allclose(FLOATS[name](s), 5.0, rtol=1e-6)


@pytest.mark.parametrize("name", FLOATS)
def test_gradients(name):
    f = FLOATS[name]
    s = np.array([5.0, 3.0, 2.0, 0.5])
    step = 1e-3
    want = [
        (float(f(f32(s + d))) - float(f(f32(s - d)))) / (2 * step) for d in step * np.eye(len(s))
    ]
    np.testing.assert_allclose(jax.grad(f)(f32(s)), want, atol=2e-3)
    assert np.isfinite(jax.grad(f)(f32([2.0, 1.0, 0.0]))).all()
    np.testing.assert_array_equal(jax.grad(f)(jnp.zeros(3)), 0.0)


# --- For all of them.


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_batches_equal_loops_and_dtypes_are_kept(name, shape):
    count = COUNTS[name]
    s = f32(np.stack([spectrum(shape, r, 0.1, r) for r in (0, 2, 5, 1)]))
    want = np.array([count(x, shape) for x in s])
    assert want.dtype == np.int32
    got = jax.jit(lambda s: count(s, shape))(s.reshape(2, 2, -1))
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, want.reshape(2, 2))
    np.testing.assert_array_equal(jax.vmap(lambda s: count(s, shape))(s), want)
    for dtype in (jnp.bfloat16, jnp.float16):
        narrow = s.astype(dtype)
        np.testing.assert_array_equal(
            count(narrow, shape), count(narrow.astype(jnp.float32), shape)
        )
    np.testing.assert_array_equal(count(jnp.zeros_like(s), shape), 0)
    nan = s.at[1].set(jnp.nan).at[2, 0].set(jnp.inf)
    full = min(shape)
    np.testing.assert_array_equal(count(nan, shape), [want[0], full, full, want[3]])


@pytest.mark.parametrize("name", FLOATS)
def test_real_ranks_of_batches_narrow_types_and_edges(name):
    f = FLOATS[name]
    s = f32(np.stack([spectrum((8, 8), r, 0.1, r) for r in (0, 2, 5, 1)]))
    want = np.array([f(x) for x in s])
    np.testing.assert_allclose(jax.jit(f)(s.reshape(2, 2, 8)), want.reshape(2, 2), rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(f)(s), want, rtol=1e-6)
    for dtype in (jnp.bfloat16, jnp.float16):
        out = f(s.astype(dtype))
        assert out.dtype == jnp.float32
        np.testing.assert_array_equal(out, f(s.astype(dtype).astype(jnp.float32)))
    np.testing.assert_array_equal(f(jnp.zeros((2, 3))), 0.0)
    np.testing.assert_array_equal(f(jnp.zeros((2, 0))), 0.0)
    assert np.isnan(f(f32([jnp.nan, jnp.nan])))
    assert np.isnan(f(f32([jnp.inf, 1.0])))


@pytest.mark.parametrize("name", COUNTS)
def test_no_values_and_one(name):
    count = COUNTS[name]
    np.testing.assert_array_equal(count(jnp.zeros((2, 0)), (0, 5)), np.zeros(2, np.int32))
    one = count(jnp.ones(1), (1, 1))
    assert one == (0 if name == "evbmf" or name.startswith("gavish") else 1) or "noise" in name


@pytest.mark.parametrize("shape", SHAPES)
def test_exact_low_rank_without_noise(shape):
    for rank in (1, 2, 3):
        w = f32(spectrum(shape, rank, 0.0) * (np.arange(min(shape)) < rank))
        for name in ("evbmf", "gavish_donoho", "numerical"):
            assert COUNTS[name](w, shape) == rank
        rng = np.random.default_rng(rank)
        w = rng.normal(size=(shape[0], rank)) @ rng.normal(size=(rank, shape[1]))
        s = jnp.linalg.svd(f32(w), compute_uv=False)
        for name in ("evbmf", "gavish_donoho", "numerical"):
            assert COUNTS[name](s, shape) == rank


def test_numbers_are_traced():
    s = f32(spectrum((24, 60), 3, 0.3))
    knobs = jnp.asarray([0.05, 0.1, 0.3, 0.9])
    for f in (
        ranks.energy_rank,
        lambda s, t: ranks.numerical_rank(s, (24, 60), t),
        lambda s, t: ranks.evbmf_rank(s, (24, 60), t),
        lambda s, t: ranks.gavish_donoho_rank(s, (24, 60), t),
    ):
        got = jax.jit(jax.vmap(f, in_axes=(None, 0)))(s, knobs)
        np.testing.assert_array_equal(got, [f(s, float(t)) for t in knobs])
        assert len(set(got.tolist())) > 1


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda s: ranks.energy_rank(s, 1.5), ValueError, "energy_rank: `energy`"),
        (lambda s: ranks.energy_rank(s.astype(jnp.int32), 0.5), TypeError, "floating"),
        (lambda s: ranks.stable_rank(s[0]), ValueError, "last axis"),
        (lambda s: ranks.effective_rank(s[0]), ValueError, "last axis"),
        (lambda s: ranks.numerical_rank(s, (8, 3)), ValueError, "at most 3 singular values"),
        (lambda s: ranks.numerical_rank(s, (8, 4), -1.0), ValueError, "rtol"),
        (lambda s: ranks.numerical_rank(s, 8), TypeError, "static \\(m, n\\), got int 8"),  # pyright: ignore[reportArgumentType]
        (lambda s: ranks.evbmf_rank(s, (8, 5)), ValueError, "have 5 singular values"),
        (lambda s: ranks.evbmf_rank(s, (8, 4), -0.1), ValueError, "noise"),
        (lambda s: ranks.gavish_donoho_rank(s, (8, 5)), ValueError, "have 5 singular values"),
        (lambda s: ranks.gavish_donoho_rank(s, (4.0, 8)), TypeError, "shape"),  # pyright: ignore[reportArgumentType]
        (lambda s: ranks.gavish_donoho_rank(s, (4, 8), jnp.ones(2)), ValueError, "noise"),
    ],
)
def test_bad_input(call, kind, text):
    with pytest.raises(kind, match=text):
        jax.eval_shape(call, jax.ShapeDtypeStruct((4,), jnp.float32))
