"""SmoothQuant and AWQ against NumPy float64, and what `jc.lift` makes of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress import arrays
from jaxcompress.quantization import awq, rescaled, rotated, smoothed

RNG = np.random.default_rng(0)
PLAIN = jc.quantization.min_max


def draw(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def several(p, x):
    """A grouped convolution, stacked layers, split outputs, and two axes that are summed over."""
    numbers = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(
        x, p["conv"], (1, 1), "VALID", dimension_numbers=numbers, feature_group_count=2
    )
    y, _ = jax.lax.scan(lambda y, w: (y @ w, None), y.mean((1, 2)), p["layers"])
    return jnp.einsum("bho,hod->bd", jnp.einsum("bi,iho->bho", y, p["heads"]), p["out"])


SEVERAL = {
    "conv": draw(3, 3, 2, 6),
    "layers": draw(2, 6, 6),
    "heads": draw(6, 2, 4),
    "out": draw(2, 4, 5),
    "unused": draw(3, 3),
}
IMAGES = draw(4, 4, 4, 4) * jnp.exp(jnp.arange(4.0))[None, None, None]
# Of each leaf: the axes of its weights over which the largest is taken.
OUTPUTS = {"conv": (0, 1, 3), "layers": (2,), "heads": (1, 2), "out": (2,)}


@functools.lru_cache
def statistics():
    ranges = jc.observers.absmax(per="channel")
    return jc.calibrate(several, SEVERAL, [IMAGES], ranges=ranges, gram=True)


def linear(p, x):
    return x @ p["w"]


def uneven(tokens=64, features=16, outputs=8):
    """Activations with outliers in a few features."""
    rng = np.random.default_rng(5)
    x = rng.normal(size=(tokens, features))
    x[:, ::5] *= 40
    w = rng.normal(size=(features, outputs)) / 4
    return {"w": jnp.asarray(w, jnp.float32)}, jnp.asarray(x, jnp.float32)


@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_smoothed_scales_agree_with_float64(strength):
    p = smoothed(jc.quantize(8), SEVERAL, statistics(), strength)
    found = p.find(SEVERAL).by_path
    assert set(found) == set(OUTPUTS)
    for path, axes in OUTPUTS.items():
        w = np.abs(np.asarray(SEVERAL[path], np.float64)).max(axes, keepdims=True)
        x = np.asarray(statistics()[path].high, np.float64)
        if path == "conv":
            x = x.reshape(2, 2).max(0)
        np.testing.assert_allclose(
            found[path], x.reshape(w.shape) ** strength / w ** (1 - strength), rtol=1e-5
        )


def test_strength_is_traced():
    params, x = uneven()
    stats = jc.calibrate(linear, params, [x], ranges=jc.observers.absmax(per="channel"))
    one = lambda a: jc.compress(smoothed(jc.quantize(8), params, stats, a), params)["w"]  # noqa: E731
    grid = jnp.array([0.2, 0.8])
    both = jax.jit(jax.vmap(one))(grid)
    for i in range(2):
        np.testing.assert_allclose(both[i], jax.jit(one)(grid[i]), atol=1e-6)


def test_dead_features_and_leaves_without_statistics():
    params, x = uneven()
    w = params["w"].at[1].set(0.0).at[2, 3].set(jnp.nan)
    params = {"w": w, "unused": w}
    x = x.at[:, 0].set(0.0)
    stats = jc.calibrate(linear, params, [x], ranges=jc.observers.absmax(per="channel"), gram=True)
    scales = smoothed(jc.quantize(8), params, stats).find(params).by_path
    assert set(scales) == {"w"}
    s = np.asarray(scales["w"])[:, 0]
    assert np.isfinite(s).all()
    np.testing.assert_array_equal(s[:3], 1)
    assert (s[3:] != 1).all()
    # A NaN in the weights leaves AWQ nothing to compare; a feature without inputs has no size.
    np.testing.assert_array_equal(awq(jc.quantize(3), params, stats).find(params).by_path["w"], 1)
    clean = {"w": jnp.where(jnp.isnan(w), 0.0, w)}
    s = np.asarray(awq(jc.quantize(3, ranges=PLAIN), clean, stats).find(clean).by_path["w"])
    assert s[0] == 1
    assert np.isfinite(s).all()


def test_smoothing_and_rotation_help_integer_products():
    params, x = uneven()
    stats = jc.calibrate(linear, params, [x], ranges=jc.observers.absmax(per="channel"))
    lifted, want = jax.jit(jc.lift(linear, activations="dynamic")), linear(params, x)
    q = jc.quantize(8)

    def error(p):
        packed = jc.pack(p, params)
        got = lifted(packed, x)
        return float(jnp.sqrt(jnp.mean((got - want) ** 2) / jnp.mean(want**2)))

    plain = error(q)
    assert error(smoothed(q, params, stats)) < 0.7 * plain
    assert error(rotated(q, jax.random.key(0))) < 0.9 * plain


def brute_force(w, x, bits, candidates):
    """The exponent and the scales of AWQ, each candidate rounded by hand in float64."""
    w, x = np.asarray(w, np.float64), np.asarray(x, np.float64)
    rms, top, best = np.sqrt((x**2).mean(0)), 2 ** (bits - 1) - 1, None
    for alpha in np.arange(candidates) / candidates:
        s = rms**alpha
        s = s / np.sqrt(s.max() * s.min())
        v = w * s[:, None]
        step = np.abs(v).max(0) / top
        new = np.clip(np.round(v / step), -top, top) * step / s[:, None]
        error = np.sum((x @ (new - w)) ** 2)
        if best is None or error < best[0]:
            best = (error, alpha, s, new)
    return best


def test_awq_agrees_with_brute_force():
    params, x = uneven()
    stats = jc.calibrate(linear, params, [x], gram=True)
    p = awq(jc.quantize(3, ranges=PLAIN), params, stats, candidates=20)
    error, alpha, s, new = brute_force(params["w"], x, 3, 20)
    assert alpha > 0
    structure = p.find(params)
    np.testing.assert_allclose(np.asarray(structure.by_path["w"])[:, 0], s, rtol=1e-4)
    got = np.asarray(p.project(params, structure)["w"], np.float64)
    np.testing.assert_allclose(got, new, atol=1e-4)
    x64, w64 = np.asarray(x, np.float64), np.asarray(params["w"], np.float64)
    plain = np.asarray(jc.compress(jc.quantize(3, ranges=PLAIN), params)["w"], np.float64)
    assert error < 0.6 * np.sum((x64 @ (plain - w64)) ** 2)


def test_awq_of_every_kind_of_leaf_runs():
    p = awq(jc.quantize(3, ranges=PLAIN), SEVERAL, statistics(), candidates=3)
    found = p.find(SEVERAL).by_path
    shapes = {path: s.shape for path, s in found.items()}
    assert shapes == {
        "conv": (1, 1, 2, 1), "layers": (2, 6, 1), "heads": (6, 1, 1), "out": (2, 4, 1),
    }  # fmt: skip
    packed = jc.pack(p, SEVERAL)
    kinds = {path: type(w).__name__ for path, w in packed.items()}
    assert kinds["layers"] == kinds["out"] == "Rescaled"
    want = several(jc.todense(packed), IMAGES)
    np.testing.assert_allclose(
        jc.lift(several)(packed, IMAGES), want, atol=1e-5 * float(np.abs(want).max())
    )


@pytest.mark.parametrize("kind", ["rescaled", "rotated", "both"])
def test_gptq_in_new_features_is_gptq_of_new_layers(kind):
    params, x = uneven()
    key, scales = jax.random.key(1), {"w": jnp.exp(draw(16, 1))}
    q = jc.quantize(3, ranges=PLAIN)
    combine = {
        "rescaled": lambda p: rescaled(p, scales),
        "rotated": lambda p: rotated(p, key),
        "both": lambda p: rescaled(rotated(p, key), scales),
    }[kind]
    p = combine(q)
    stats = jc.calibrate(linear, params, [x], gram=True)
    got = jc.compress(p, params, stats=stats)["w"]
    # The same by hand: new weights and new activations, then back.
    t = jnp.eye(16)
    if kind != "rotated":
        t = t * scales["w"]
    if kind != "rescaled":
        signs = rotated(q, key).find(params).by_path["w"]
        t = arrays.rotate(t, signs, 0, 16)
    moved, inputs = {"w": t @ params["w"]}, x @ jnp.linalg.inv(t)
    new = jc.compress(q, moved, stats=jc.calibrate(linear, moved, [inputs], gram=True))["w"]
    # Ties and nearly singular rows: compare what the outputs lose.
    loss = lambda w: float(jnp.sum((x @ (w - params["w"])) ** 2))  # noqa: E731
    assert loss(got) == pytest.approx(loss(jnp.linalg.inv(t) @ new), rel=0.02)
    assert loss(got) < loss(jc.compress(p, params)["w"])


def test_rescaled_keeps_zeros_and_refuses_bad_scales():
    params = {"w": draw(16, 8), "v": draw(4, 4)}
    p = rescaled(jc.prune(0.5), {"w": jnp.exp(draw(16, 1))})
    structure = p.find(params)
    new = p.project(params, structure)["w"]
    kept = p.kept(params, structure)["w"]
    np.testing.assert_array_equal(np.asarray(new) != 0, kept)
    for scales, fault in (
        ({"x": jnp.ones((1, 1))}, r"`scales` must name leaves of the params, got \['x'\]"),
        ({"w": jnp.ones((8, 1))}, r"`scales` must have 1 or all entries .* got float32\[8, 1\]"),
    ):
        with pytest.raises(ValueError, match=fault):
            rescaled(jc.quantize(8), scales).find(params)
    with pytest.raises(ValueError, match="rescaled: `scales` must be finite and above 0"):
        rescaled(jc.quantize(8), {"w": jnp.zeros((16, 1))})


def test_statistics_of_too_little_are_refused():
    params, x = uneven()
    stats = jc.calibrate(linear, params, [x])
    with pytest.raises(ValueError, match="smoothed: `stats` must hold the range of each feature"):
        smoothed(jc.quantize(8), params, stats)
    with pytest.raises(ValueError, match="awq: `stats` must hold Gram matrices"):
        awq(jc.quantize(8), params, stats)
    with pytest.raises(ValueError, match="smoothed: `strength` must be a real number"):
        smoothed(jc.quantize(8), params, stats, 1.5)
    with pytest.raises(TypeError, match=r"awq: `stats` must be what jc\.calibrate returns"):
        awq(jc.quantize(8), params, {"w": 3})
