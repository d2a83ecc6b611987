"""Low rank plus something against NumPy float64: LQER, LoftQ, GoDec."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
from jaxcompress import arrays
from jaxcompress.factorization import low_rank_plus
from tests.conftest import counting_jit, lenient


def draw(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), dtype)


def truncated(w, rank):
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def error(p, w):
    new = jax.jit(lambda w: jc.compress(p, w))(w)
    return np.linalg.norm(np.asarray(new, np.float64) - np.asarray(w, np.float64))


def packed_and_projected(p, params, step=0):
    """Compiled as one program, which is faster than operation by operation."""
    held = jax.jit(lambda params: p.find(params, step=jnp.asarray(step, jnp.int32)))(params)
    return p.pack(params, held), p.project(params, held)


def min_max(bits):
    return jc.quantize(bits, ranges=jc.quantization.min_max)


def rounded_by_columns(w, bits, steps=None):
    """The grid of `min_max(bits)`, or the nearest points of one that is held."""
    top = 2 ** (bits - 1) - 1
    steps = np.abs(w).max(0, keepdims=True) / top if steps is None else steps
    return np.clip(np.round(w / steps), -top, top) * steps, steps


def kept_largest(w, sparsity, mask=None):
    if mask is None:
        count = w.size - round(sparsity * w.size)
        mask = np.abs(w) >= np.sort(np.abs(w).ravel())[::-1][count - 1]
    return np.where(mask, w, 0.0), mask


def alternated(w, rank, iterations, base):
    """`base(w, structure) -> (w, structure)`; the pair with the least error."""
    low, best = np.zeros_like(w), (np.inf, None)
    for _ in range(iterations):
        based, held = base(w - low, None)
        low = truncated(w - based, rank)
        new = base(w - low, held)[0] + low
        best = min(best, (np.linalg.norm(new - w), new), key=lambda pair: pair[0])
    return best[1]


@pytest.mark.parametrize("bits", [2, 4])
def test_one_iteration_has_the_factors_of_lqer(bits):
    w, rank = draw(16, 12), 3
    left = np.asarray(w, np.float64) - np.asarray(jc.compress(jc.quantize(bits), w), np.float64)
    p = low_rank_plus(jc.quantize(bits), rank, iterations=1)
    correction = p.find(w).parts[0][""]
    got = np.asarray(correction.u, np.float64) @ np.asarray(correction.v, np.float64)
    np.testing.assert_allclose(got, truncated(left, rank), atol=1e-5)
    # The error of LQER is what the decomposition drops; rounding once more only helps.
    s = np.linalg.svd(left, compute_uv=False)
    lqer = np.sqrt((s[rank:] ** 2).sum())
    np.testing.assert_allclose(np.linalg.norm(left - got), lqer, rtol=1e-5)
    assert error(p, w) <= lqer * (1 + 1e-6)
    assert lqer < np.linalg.norm(left)


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("kind", ["quantized", "sparse"])
def test_equals_the_alternation_in_numpy(kind, iterations):
    w, rank = draw(16, 12, seed=3), 2
    p, base = {
        "quantized": (min_max(3), lambda w, held: rounded_by_columns(w, 3, held)),
        "sparse": (jc.prune(0.75), lambda w, held: kept_largest(w, 0.75, held)),
    }[kind]
    want = alternated(np.asarray(w, np.float64), rank, iterations, base)
    got = jax.jit(lambda w: jc.compress(low_rank_plus(p, rank, iterations=iterations), w))(w)
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("base", [min_max(3), jc.quantization.nf4(group_size=8), jc.prune(0.7)])
def test_the_error_never_grows_with_iterations(base):
    w = draw(24, 16, seed=5)
    errors = [error(low_rank_plus(base, 3, iterations=i), w) for i in (1, 2, 5)]
    assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(errors))
    assert errors[-1] < errors[0] < error(base, w)
    assert errors[-1] < error(jc.low_rank(3), w)


def test_ends_of_the_rank():
    w = draw(16, 8)
    plain = jc.compress(jc.quantize(3), w)
    np.testing.assert_array_equal(jc.compress(low_rank_plus(jc.quantize(3), 0), w), plain)
    assert isinstance(jc.pack(once(jc.quantize(3), 0), w), arrays.Quantized)
    np.testing.assert_allclose(jc.compress(once(jc.quantize(3), 99), w), w, atol=1e-5)


def test_ranks_and_bits_share_one_program():
    w = draw(16, 8)

    def run(rank, bits):
        p = low_rank_plus(min_max(bits), rank, max_rank=4, iterations=2)
        return jc.compress(p, w)

    counted = counting_jit(run)
    ranks, bits = jnp.array([0, 2, 4]), jnp.array([2, 3, 8])
    for r, b, got in zip(ranks, bits, jax.jit(jax.vmap(run))(ranks, bits), strict=True):
        np.testing.assert_allclose(got, counted(r, b), atol=1e-5)
    assert counted.traces == 1
    p = low_rank_plus(min_max(3), jnp.asarray(2), max_rank=4)
    assert p.find(w).parts[0][""].u.shape == (16, 4)
    assert jc.pack(p, draw(64, 64)).parts[1].rank == 2


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("base", [min_max(4), jc.prune(0.9)])
def test_packed_equals_projected(base, dtype, tmp_path):
    w = draw(64, 48, dtype=dtype)
    p = low_rank_plus(base, 2, iterations=2)
    held = jax.jit(p.find)(w)
    small, dense = p.pack(w, held), p.project(w, held)
    assert isinstance(small, arrays.Sum)
    assert isinstance(small.parts[1], arrays.LowRank)
    assert (small.dtype, dense.dtype) == (dtype, dtype)
    assert small.nbytes < w.nbytes
    eps = float(jnp.finfo(dtype).eps)
    scale = np.abs(np.asarray(dense, np.float64)).max()
    got, want = np.asarray(small.todense(), np.float64), np.asarray(dense, np.float64)
    np.testing.assert_allclose(got, want, atol=4 * eps * scale)
    again = np.asarray(p.project(dense, held), np.float64)
    np.testing.assert_allclose(again, want, atol=4 * eps * scale)
    x = draw(5, 64, dtype=dtype)
    y = jax.jit(jc.lift(lambda p, x: x @ p))(small, x)
    np.testing.assert_allclose(
        np.asarray(y, np.float64), np.asarray(x, np.float64) @ got, atol=64 * eps * scale
    )
    jc.save(tmp_path / "m.safetensors", {"w": small})
    jax.tree.map(np.testing.assert_array_equal, jc.load(tmp_path / "m.safetensors")["w"], small)


def test_a_pair_that_is_not_smaller_is_dense():
    w = draw(16, 12)
    assert isinstance(jc.pack(jc.quantize(4), w), arrays.Quantized)
    p = low_rank_plus(jc.quantize(4), 6)
    packed, dense = packed_and_projected(p, w)
    assert isinstance(packed, jax.Array)
    np.testing.assert_allclose(packed, dense, atol=1e-6)
    half = jc.pack(once(jc.quantize(8), 2), draw(16, 12, dtype=jnp.bfloat16))
    assert half.dtype == jnp.bfloat16


PARAMS = {"a": {"w": draw(64, 32), "b": draw(32)}, "c": draw(32, 48)}


def once(base, rank, *, max_rank=None):
    return low_rank_plus(base, rank, iterations=1, max_rank=max_rank)


def leaves_close(a, b, atol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), a, b)


def test_inside_and_around_the_combinators():
    p = low_rank_plus(jc.chain(jc.prune(0.5), jc.quantize(4)), 2)
    packed, dense = packed_and_projected(p, PARAMS)
    assert isinstance(packed["c"].parts[0].codes, arrays.BitMasked)
    assert isinstance(packed["a"]["b"], jax.Array)
    leaves_close(jc.todense(packed), dense)
    for around in (
        jc.masked(once(min_max(4), 2), "a/w"),
        jc.partition({"a/w": once(min_max(4), 2), "c": jc.prune(0.9)}),
        jc.every(2, once(min_max(4), 2)),
        jc.scheduled(once)(min_max(4), 2.0, max_rank=3),
        jc.chain(jc.prune(0.2), once(min_max(4), 2)),
        once(jc.scheduled(min_max)(lambda step: 8 - step), 2),
        once(jc.every(2, min_max(4)), 2),
        once(once(min_max(4), 1), 1),
    ):
        packed, dense = packed_and_projected(around, PARAMS, step=2)
        assert isinstance(packed["a"]["w"], arrays.Sum)
        leaves_close(jc.todense(packed), dense)
        assert np.abs(np.asarray(dense["a"]["w"] - PARAMS["a"]["w"])).max() > 1e-3


def test_what_the_base_does_not_touch_stays():
    p = once(jc.masked(jc.quantize(4), "c"), 2)
    out = jc.compress(p, PARAMS)
    np.testing.assert_array_equal(out["a"]["w"], PARAMS["a"]["w"])
    assert (out["c"] != PARAMS["c"]).any()


def test_a_global_budget_is_kept():
    params = {"a": draw(16, 12), "b": 3 * draw(12, 8)}
    p = low_rank_plus(jc.prune(0.75, scope="global"), 1)
    masks = p.find(params).parts[1]
    assert sum(int(m.keep.sum()) for m in masks.values()) == round(0.25 * (16 * 12 + 12 * 8))


@pytest.mark.parametrize("adapter", [jc.projected, jc.straight_through])
def test_in_training(adapter):
    p = once(min_max(4), 2)
    opt, params = adapter(lenient(optax.adam(0.01)), jc.every(2, p)), PARAMS
    state = opt.init(params)

    @jax.jit
    def step(params, state):
        updates, state = opt.update(jax.tree.map(lambda w: 0.1 * w, params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(3):
        params, state = step(params, state)
    packed = jc.pack(state, params)
    assert isinstance(packed["c"], arrays.Sum)
    leaves_close(jc.todense(packed), params)
    # A step may donate the structure: no buffer is in it twice.
    found = p.find(params)
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(found)]
    assert len(set(pointers)) == len(pointers)


def test_what_the_base_gathers_reaches_it():
    base = jc.prune(0.5, score=jc.pruning.movement())
    p, w = low_rank_plus(base, 1), {"w": draw(8, 6)}
    held = p.find(w, grads=w)
    seen = p.observe(w, held, grads={"w": draw(8, 6, seed=1)})
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), held.parts[1], seen.parts[1])
    assert any(jax.tree.leaves(changed))


def test_nan_empty_and_zero_leaves():
    p = low_rank_plus(min_max(4), 2, iterations=2)
    params = {
        "bad": draw(8, 6).at[0, 0].set(jnp.nan),
        "good": draw(8, 6),
        "zero": jnp.zeros((4, 4)),
    }
    params["empty"] = jnp.zeros((0, 4))
    out = jax.jit(lambda params: jc.compress(p, params))(params)
    assert np.isnan(out["bad"]).all()
    leaves_close(out["good"], jc.compress(p, {"good": params["good"]})["good"])
    np.testing.assert_array_equal(out["zero"], 0)
    assert out["empty"].shape == (0, 4)


def test_refuses():
    with pytest.raises(TypeError, match=r"be a jaxcompress Projection"):
        low_rank_plus(4, 2)
    with pytest.raises(ValueError, match=r"low_rank_plus: `rank` must be .* at least 0"):
        low_rank_plus(jc.quantize(4), -1)
    with pytest.raises(ValueError, match=r"low_rank_plus: `iterations` must be"):
        low_rank_plus(jc.quantize(4), 2, iterations=0)
    with pytest.raises(ValueError, match=r"low_rank_plus: `method` must be one of"):
        low_rank_plus(jc.quantize(4), 2, method="svd")
    with pytest.raises(ValueError, match=r"have dense leaves, got LowRank at 'w'"):
        jc.compress(low_rank_plus(jc.quantize(4), 2), jc.pack(jc.low_rank(1), {"w": draw(8, 8)}))
    with pytest.raises(ValueError, match=r"two or more dimensions, got float32\[8\] at 'b'"):
        jc.compress(jc.masked(low_rank_plus(jc.quantize(4), 2), "b"), {"b": draw(8)})


class TestQuantizedFactors:
    def test_packed_twice(self, tmp_path):
        params, x = {"w": draw(64, 48)}, draw(5, 64)
        small = jc.pack(jc.quantize(8), jc.pack(jc.low_rank(4), params))
        u, v = small["w"].u, small["w"].v
        assert isinstance(small["w"], arrays.LowRank)
        assert isinstance(u, arrays.Quantized)
        assert isinstance(v, arrays.Quantized)
        u, v = (np.asarray(f.codes, np.float64) * np.asarray(f.scale) for f in (u, v))
        np.testing.assert_allclose(jc.todense(small)["w"], u @ v, rtol=1e-4, atol=1e-5)
        y = jax.jit(jc.lift(lambda p, x: x @ p["w"]))(small, x)
        np.testing.assert_allclose(y, np.asarray(x, np.float64) @ u @ v, rtol=1e-4, atol=1e-4)
        jc.save(tmp_path / "m.safetensors", small)
        jax.tree.map(np.testing.assert_array_equal, jc.load(tmp_path / "m.safetensors"), small)

    def test_a_chain_quantizes_the_product(self):
        # What the chain promises is the grid of the leaf, which factors would not keep.
        small = jc.pack(jc.chain(jc.low_rank(4), jc.quantize(8)), {"w": draw(64, 48)})
        assert isinstance(small["w"], arrays.Quantized)

    def test_of_a_correction(self, tmp_path):
        w, x = draw(64, 48), draw(5, 64)
        base, low = jc.pack(once(jc.quantize(4), 4), w).parts
        small = arrays.add(base, jc.pack(jc.quantize(8), low))
        assert small.nbytes < base.nbytes + low.nbytes
        y = jax.jit(jc.lift(lambda p, x: x @ p))(small, x)
        want = np.asarray(x, np.float64) @ np.asarray(small.todense(), np.float64)
        np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)
        dynamic = jc.lift(lambda p, x: x @ p, activations="dynamic")(small, x)
        np.testing.assert_allclose(dynamic, want, atol=0.02 * np.abs(want).max())
        jc.save(tmp_path / "m.safetensors", small)
        jax.tree.map(np.testing.assert_array_equal, jc.load(tmp_path / "m.safetensors"), small)
