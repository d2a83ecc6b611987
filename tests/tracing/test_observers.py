"""Observers against NumPy in float64, and their laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcompress import observers

MAKERS = {
    "absmax": observers.absmax,
    "absmax per channel": lambda: observers.absmax(per="channel"),
    "min_max": observers.min_max,
    "min_max per channel": lambda: observers.min_max(per="channel"),
    "moving_average": lambda: observers.moving_average(0.7),
    "moving_average per channel": lambda: observers.moving_average(0.7, per="channel"),
    "mean_variance": observers.mean_variance,
    "mean_variance per channel": lambda: observers.mean_variance(per="channel"),
    "gram": observers.gram,
    "histogram": lambda: observers.histogram(bins=16),
    "percentile": lambda: observers.percentile(0.9),
    "mse": lambda: observers.mse(4),
    "entropy": lambda: observers.entropy(4),
    "together": lambda: observers.together(a=observers.min_max(), b=observers.gram()),
}
every = pytest.mark.parametrize("name", MAKERS)


# XLA takes subnormal numbers for zeros.
FLOATS = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)


def draw(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def seen(observer, *batches):
    state = observer.init(batches[0].shape[1])
    for batch in batches:
        state = observer.update(state, jnp.asarray(batch))
    return state


def close(got, want, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


class TestLaws:
    @every
    def test_update_is_merge(self, name):
        observer = MAKERS[name]()
        a, b = draw(5, 3), 4 * draw(5, 3, seed=1)
        merged = observer.merge(seen(observer, a), seen(observer, b))
        close(observer.finalize(merged), observer.finalize(seen(observer, a, b)))

    @every
    def test_merge_is_associative(self, name):
        observer = MAKERS[name]()
        a, b, c = (seen(observer, 2.0**i * draw(5, 3, seed=i)) for i in range(3))
        left = observer.merge(observer.merge(a, b), c)
        right = observer.merge(a, observer.merge(b, c))
        close(observer.finalize(left), observer.finalize(right))

    @every
    def test_nothing_seen_changes_nothing(self, name):
        observer = MAKERS[name]()
        state = seen(observer, draw(5, 3))
        close(observer.merge(observer.init(3), state), state)
        close(observer.merge(state, observer.init(3)), state)
        close(observer.update(state, jnp.zeros((0, 3))), state)

    @every
    def test_of_nothing_is_finite(self, name):
        observer = MAKERS[name]()
        said = observer.finalize(observer.init(3))
        for leaf in jax.tree.leaves(said):
            assert np.isfinite(np.asarray(leaf, np.float64)).all()

    @every
    def test_jit_scan_and_vmap(self, name):
        observer = MAKERS[name]()
        batches = jnp.stack([jnp.asarray(draw(5, 3, seed=i)) for i in range(3)])
        state, _ = jax.jit(
            lambda xs: jax.lax.scan(
                lambda s, x: (observer.update(s, x), None), observer.init(3), xs
            )
        )(batches)
        close(observer.finalize(state), observer.finalize(seen(observer, *batches)))
        mapped = jax.vmap(lambda x: observer.finalize(observer.update(observer.init(3), x)))
        alone = observer.finalize(seen(observer, batches[1]))
        close(jax.tree.map(lambda x: x[1], mapped(batches)), alone)

    @every
    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_half_precision_is_seen_in_float32(self, name, dtype):
        observer = MAKERS[name]()
        x = jnp.asarray(draw(5, 3)).astype(dtype)
        close(seen(observer, x), seen(observer, x.astype(jnp.float32)), 0)


class TestAgainstNumpy:
    a, b = draw(20, 3) + 100, 3 * draw(7, 3, seed=1)
    both = np.concatenate([a, b]).astype(np.float64)

    def test_ranges(self):
        said = lambda o: o.finalize(seen(o, self.a, self.b))  # noqa: E731
        close(said(observers.absmax()), (-abs(self.both).max(), abs(self.both).max()), 1e-7)
        close(said(observers.min_max()), (self.both.min(), self.both.max()), 1e-7)
        per = said(observers.min_max(per="channel"))
        close(per, (self.both.min(0), self.both.max(0)), 1e-7)

    def test_moving_average_forgets(self):
        o, batches = observers.moving_average(0.7), [draw(5, 3, seed=i) for i in range(4)]
        weights = 0.3 * 0.7 ** np.arange(3, -1, -1)
        want = [
            sum(w * f(x) for w, x in zip(weights, batches, strict=True)) / weights.sum()
            for f in (np.min, np.max)
        ]
        close(o.finalize(seen(o, *batches)), want)

    def test_moments_far_from_zero(self):
        o, far = observers.mean_variance(per="channel"), 1e4 + draw(50, 3)
        count, mean, variance = o.finalize(seen(o, far[:20], far[20:]))
        assert count == 50
        np.testing.assert_allclose(mean, far.astype(np.float64).mean(0), rtol=1e-6)
        np.testing.assert_allclose(variance, far.astype(np.float64).var(0), rtol=5e-3)

    def test_gram(self):
        o = observers.gram()
        count, matrix = o.finalize(seen(o, self.a, self.b))
        assert count == 27
        np.testing.assert_allclose(matrix, self.both.T @ self.both, rtol=1e-5)

    @settings(max_examples=30, deadline=None, derandomize=True)
    @given(st.lists(FLOATS, min_size=8, max_size=8))
    def test_histogram(self, values):
        values = np.asarray(values, np.float32).reshape(4, 2)
        o = observers.histogram(bins=16)
        hist = o.finalize(seen(o, values[:1], values[1:]))
        edges = np.ldexp(np.arange(-8, 9) / 8.0, int(hist.exponent))
        want, _ = np.histogram(values.astype(np.float64), edges)
        np.testing.assert_array_equal(hist.counts, want)
        assert hist.low == values.min()
        assert hist.high == values.max()

    def test_histogram_counts_what_is_not_finite(self):
        o = observers.histogram(bins=4)
        hist = o.finalize(seen(o, np.array([[np.nan, np.inf, -np.inf, 0.5]], np.float32)))
        assert (hist.nonfinite, hist.counts.sum(), hist.high) == (3, 1, 0.5)

    @pytest.mark.parametrize("fraction", [0.5, 0.9, 0.99, 1.0])
    def test_percentile(self, fraction):
        x = draw(500, 8)
        o = observers.percentile(fraction)
        low, high = o.finalize(seen(o, x))
        want = np.quantile(np.abs(x.astype(np.float64)), fraction, method="inverted_cdf")
        # As fine as a bin: the range is that of the next power of two.
        assert want - 1e-6 <= high <= want + 8 / 2048
        assert low == -high
        o = observers.percentile(fraction, symmetric=False)
        low, high = o.finalize(seen(o, x))
        tail = (1 - fraction) / 2
        assert abs(high - np.quantile(x, 1 - tail)) <= 0.03
        assert abs(low - np.quantile(x, tail)) <= 0.03

    @pytest.mark.parametrize("bits", [3, 4, 8])
    def test_mse_is_as_good_as_a_search_on_the_data(self, bits):
        x = np.random.default_rng(0).laplace(size=(500, 8)).astype(np.float32)
        o, top = observers.mse(bits), 2 ** (bits - 1) - 1
        high = float(o.finalize(seen(o, x)).high)

        def error(threshold):
            step = threshold / top
            return np.square(x - step * np.clip(np.round(x / step), -top, top)).mean()

        best = min(error(t) for t in np.linspace(0.05, 1, 400) * np.abs(x).max())
        assert error(high) <= 1.02 * best

    def test_entropy_by_brute_force(self):
        x = np.random.default_rng(0).laplace(size=(500, 8)).astype(np.float32)
        o = observers.histogram(bins=64)
        hist = o.finalize(seen(o, x))
        counts = np.asarray(hist.counts, np.float64)
        counts = counts[32:] + counts[:32][::-1]
        counts[0] = 0
        width = 2.0 / 64 * 2.0 ** int(hist.exponent)
        levels, last = 8, int(np.nonzero(counts)[0].max()) + 1

        def divergence(end):
            p = counts[:end].copy()
            p[-1] += counts[end:].sum()
            q = np.zeros(end)
            for level in range(levels):
                inside = [i for i in range(end) if i * levels // end == level and counts[i] > 0]
                for i in inside:
                    q[i] = counts[inside].sum() / len(inside)
            p, q = p / p.sum(), q / q.sum()
            return sum(a * np.log(a / max(b, 1e-4 / 32)) for a, b in zip(p, q, strict=True) if a)

        # Every end is a candidate.
        ends = range(levels, last + 1)
        best = min(ends, key=divergence)
        got = observers.entropy_range(hist, 4, candidates=len(ends))
        want = min(best * width, float(np.abs(x).max()))
        np.testing.assert_allclose(got.high, want, rtol=1e-6)

    def test_ranges_map_over_bits(self):
        o = observers.histogram()
        hist = o.finalize(seen(o, draw(100, 8)))
        for choose in (observers.mse_range, observers.entropy_range):
            bits = jnp.array([2.0, 4.0, 8.0])
            mapped = jax.jit(jax.vmap(lambda b, f=choose: f(hist, b).high))(bits)
            alone = [choose(hist, int(b)).high for b in bits]
            np.testing.assert_allclose(mapped, alone, rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: observers.absmax(per="row"), "absmax: `per` must be 'tensor' or 'channel'"),
        (lambda: observers.moving_average(1.0), "moving_average: `decay`"),
        (lambda: observers.histogram(bins=3), "histogram: `bins` must be even"),
        (lambda: observers.together(a=3), "together: `a` must be an Observer"),
        (lambda: observers.percentile_range(None, 1.5), "percentile_range: `fraction`"),
        (lambda: observers.mse_range(None, 1), "mse_range: `bits`"),
        (lambda: observers.entropy_range(None, 1), "entropy_range: `bits`"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
