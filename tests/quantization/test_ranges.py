"""Ranges against NumPy float64, runs of all shapes, mixed precision."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc


def normal(shape=(512, 8), seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def error(w, **kwargs):
    out = jc.compress(jc.quantize(**kwargs), {"w": jnp.asarray(w)})["w"]
    return ((np.asarray(out, np.float64) - w) ** 2).sum(0)


def best_by_brute_force(w, bits, symmetric):
    """The smallest squared error of each column over 400 factors of its range, in float64."""
    w = w.astype(np.float64)
    best = np.full(w.shape[1], np.inf)
    for f in np.linspace(0.02, 1, 400):
        if symmetric:
            top = 2 ** (bits - 1) - 1
            step = f * np.abs(w).max(0) / top
            out = np.clip(np.rint(w / step), -top, top) * step
        else:
            low, high = f * np.minimum(w.min(0), 0), f * np.maximum(w.max(0), 0)
            step = (high - low) / (2**bits - 1)
            zero = np.rint(-low / step)
            out = (np.clip(np.rint(w / step) + zero, 0, 2**bits - 1) - zero) * step
        best = np.minimum(best, ((out - w) ** 2).sum(0))
    return best


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_default_is_near_the_best_clip(bits, symmetric):
    w = normal()
    w[0, 0] = 40.0  # an outlier that is worth clipping, or is not
    ours = error(w, bits=bits, symmetric=symmetric)
    assert (ours <= 1.03 * best_by_brute_force(w, bits, symmetric)).all()
    wide = error(w, bits=bits, symmetric=symmetric, ranges=jc.quantization.min_max)
    assert (ours <= wide * (1 + 1e-6)).all()


@pytest.mark.parametrize(("bits", "times"), [(2, 2.9), (3, 2.0), (4, 1.5)])
def test_what_clipping_wins_on_gaussian_channels(bits, times):
    w = normal((4096, 8))
    wide = error(w, bits=bits, ranges=jc.quantization.min_max).sum()
    assert wide / error(w, bits=bits).sum() >= times


def test_above_four_bits_all_is_covered_also_with_traced_bits():
    w = {"w": jnp.asarray(normal())}
    wide, tight = jc.quantization.min_max, jc.quantization.mse()
    for bits, ranges in ((8, wide), (5, wide), (4, tight), (2, tight)):
        want = jc.compress(jc.quantize(bits, ranges=ranges), w)["w"]
        np.testing.assert_array_equal(jc.compress(jc.quantize(bits), w)["w"], want)
        traced = jax.jit(lambda b: jc.compress(jc.quantize(b), w)["w"])(bits)
        np.testing.assert_allclose(traced, want, rtol=1e-6)


@pytest.mark.parametrize("q", [75.0, 99.0])
def test_percentile(q):
    w = normal()
    p = jc.quantize(8, symmetric=False, ranges=jc.quantization.percentile(q))
    grid = p.find({"w": jnp.asarray(w)})["w"]
    low = np.minimum(np.quantile(w.astype(np.float64), 1 - q / 100, axis=0), 0)
    high = np.maximum(np.quantile(w.astype(np.float64), q / 100, axis=0), 0)
    np.testing.assert_allclose(grid.scale[0], (high - low) / 255, rtol=1e-5)
    # A short last group is not diluted by what it lacks.
    short = jc.quantize(8, group_size=500, ranges=jc.quantization.percentile(q))
    step = short.find({"w": jnp.asarray(w)})["w"].scale[1]
    ends = np.quantile(w[500:].astype(np.float64), [1 - q / 100, q / 100], axis=0)
    np.testing.assert_allclose(step, np.abs(ends).max(0) / 127, rtol=1e-5)


def test_percentile_is_traced():
    w = {"w": jnp.asarray(normal())}
    f = lambda q: jc.compress(jc.quantize(4, ranges=jc.quantization.percentile(q)), w)["w"]  # noqa: E731
    several = jax.vmap(f)(jnp.array([80.0, 100.0]))
    np.testing.assert_array_equal(several[1], error_free(w, jc.quantization.min_max))
    np.testing.assert_allclose(several[0], f(80.0), rtol=1e-5)


def error_free(w, ranges):
    return jc.compress(jc.quantize(4, ranges=ranges), w)["w"]


def test_a_range_of_your_own():
    def fixed(x, axes, error):
        del error
        one = jnp.ones_like(jnp.sum(x, axis=axes, keepdims=True))
        return -one, one

    out = jc.compress(jc.quantize(8, ranges=fixed), {"w": jnp.array([[3.0], [0.5], [-0.25]])})["w"]
    np.testing.assert_allclose(out[:, 0], [1.0, 64 / 127, -32 / 127], rtol=1e-6)


@pytest.mark.parametrize("ranges", ["mse", "min_max"])
def test_clip_is_traced_and_equals_a_loop(ranges):
    w = {"w": jnp.asarray(normal((64, 4)))}
    chosen = {"mse": jc.quantization.mse(), "min_max": jc.quantization.min_max}[ranges]
    f = lambda b, c: jc.compress(jc.quantize(b, clip=c, ranges=chosen), w)["w"]  # noqa: E731
    bits, clips = [2, 3, 8], [0.5, 1.0]
    grid = jax.vmap(jax.vmap(f, (None, 0)), (0, None))(jnp.array(bits), jnp.array(clips))
    for (i, b), (j, c) in itertools.product(enumerate(bits), enumerate(clips)):
        np.testing.assert_allclose(grid[i, j], f(b, c), rtol=1e-6)
    step = jc.quantize(8, clip=0.5).find(w)["w"].scale
    np.testing.assert_allclose(step, 0.5 * jc.quantize(8).find(w)["w"].scale, rtol=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", [(8, 6), (7, 5)])
def test_square_blocks_also_ragged(shape, symmetric):
    w = normal(shape)
    top = 127 if symmetric else 255
    p = jc.quantize(8, blocks={-2: 4, -1: 3}, symmetric=symmetric, ranges=jc.quantization.min_max)
    grid = p.find({"w": jnp.asarray(w)})["w"]
    assert grid.scale.shape == (2, 2)
    for i, j in np.ndindex(2, 2):
        block = w[4 * i : 4 * i + 4, 3 * j : 3 * j + 3].astype(np.float64)
        low, high = min(block.min(), 0), max(block.max(), 0)
        span = max(-low, high) if symmetric else high - low
        np.testing.assert_allclose(grid.scale[i, j], span / top, rtol=1e-6)
    packed = p.pack({"w": jnp.asarray(w)}, {"w": grid})["w"]
    np.testing.assert_array_equal(packed.todense(), p.project({"w": w}, {"w": grid})["w"])


def test_groups_of_a_convolution_and_of_rows():
    w = normal((3, 3, 4, 6))
    grid = jc.quantize(8, blocks={-1: 2}).find({"w": jnp.asarray(w)})["w"]
    want = np.abs(w.reshape(36, 3, 2)).max((0, 2)) / 127
    np.testing.assert_allclose(grid.scale, want[None, None, None], rtol=1e-6)
    flat = normal((8, 6))
    blocks = jc.quantize(3, blocks={-2: 4}).find({"w": jnp.asarray(flat)})["w"]
    groups = jc.quantize(3, group_size=4).find({"w": jnp.asarray(flat)})["w"]
    np.testing.assert_array_equal(blocks.scale, groups.scale)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scales", ["E8M0", "E4M3"])
@pytest.mark.parametrize("size", [1.0, 1e-6])
def test_steps_in_eight_bits(scales, symmetric, size):
    w = normal((64, 8)) * np.float32(size)
    ranges = jc.quantization.min_max
    kind = getattr(jc.quantization, scales)
    plain = jc.quantize(4, group_size=16, symmetric=symmetric, ranges=ranges)
    p = jc.quantize(4, group_size=16, symmetric=symmetric, ranges=ranges, scales=kind)
    params = {"w": jnp.asarray(w)}
    step = np.asarray(plain.find(params)["w"].scale, np.float64)
    got = np.asarray(p.find(params)["w"].scale, np.float64)
    if scales == "E8M0":
        np.testing.assert_array_equal(got, 2.0 ** np.ceil(np.log2(step)))
    else:
        # Three bits of mantissa, and the largest step is met.
        np.testing.assert_allclose(got, step, rtol=2**-4)
        np.testing.assert_allclose(got.max(), step.max(), rtol=1e-6)
    packed = jc.pack(p, params)["w"]
    assert packed.nbytes == 64 * 8 // 2 + 32 * (1 if symmetric else 2) + 4 * (scales == "E4M3")
    np.testing.assert_array_equal(packed.todense(), jc.compress(p, params)["w"])
    half = np.repeat(got, 16, 0) * 0.5
    inside = np.abs(w) <= 2 * 6 * half * 0.9
    gone = np.abs(np.asarray(packed.todense(), np.float64) - w)
    assert (gone <= half * 1.0001)[inside].mean() > 0.97


def test_each_leaf_its_own_bits():
    params = {"a": jnp.asarray(normal()), "b": {"c": jnp.asarray(normal(seed=1))}}
    mixed = lambda a: jc.compress(jc.quantize({"a": a, "b/c": 8}), params)  # noqa: E731
    out = mixed(2)
    np.testing.assert_array_equal(out["a"], jc.compress(jc.quantize(2), params)["a"])
    np.testing.assert_array_equal(out["b"]["c"], jc.compress(jc.quantize(8), params)["b"]["c"])
    several = jax.vmap(mixed)(jnp.array([2, 4]))
    np.testing.assert_allclose(several["a"][0], out["a"], rtol=1e-6)
    packed = jc.pack(jc.quantize({"a": 2, "b/c": 8}), params)
    assert packed["a"].nbytes == 512 * 8 // 4 + 8 * 4
    rising = jc.quantize({"a": lambda step: 2 + step, "b/c": 8})
    np.testing.assert_allclose(
        jc.compress(rising, params, step=6)["a"], jc.compress(jc.quantize(8), params)["a"]
    )


@pytest.mark.parametrize(
    ("kwargs", "kind", "text"),
    [
        ({"bits": {"w": 4, "v": 4}}, ValueError, "`bits` must name the chosen leaves.*'v'"),
        ({"bits": {}}, ValueError, "none for \\['w'\\]"),
        ({"bits": {"w": 9}}, ValueError, "bits\\['w'\\]"),
        ({"clip": -0.5}, ValueError, "quantize: `clip` must be"),
        ({"ranges": "mse"}, TypeError, "`ranges` must be a range function"),
        ({"blocks": {-3: 2}}, ValueError, "`blocks` must be an axis.*'w'"),
        ({"blocks": {-1: 0}}, ValueError, "blocks"),
        ({"blocks": {-1: 2}, "group_size": 2}, ValueError, "`group_size` must be left out"),
    ],
)
def test_bad_input(kwargs, kind, text):
    with pytest.raises(kind, match=text):
        jc.compress(jc.quantize(**kwargs), {"w": jnp.ones((4, 4))})
    for make in (lambda: jc.quantization.percentile(10.0), lambda: jc.quantization.mse(-1)):
        with pytest.raises(ValueError, match="must"):
            make()
