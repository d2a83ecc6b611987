"""Cross-layer equalization and bias correction against NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.quantization import equalize
from jaxcompress.solvers import correct_bias

RNG = np.random.default_rng(0)
Q2 = jc.quantize(2, ranges=jc.quantization.min_max)


def draw(*shape, spread=1.0):
    """Output channels of very different sizes."""
    return jnp.asarray(
        RNG.normal(size=shape) * np.exp(spread * RNG.normal(size=shape[-1])), jnp.float32
    )


CHAIN = {
    "a": {"kernel": draw(6, 8, spread=2.0), "bias": draw(8)},
    "b": {"kernel": draw(8, 8, spread=2.0), "bias": draw(8)},
    "c": {"kernel": draw(8, 4), "bias": draw(4)},
}
PAIRS = [("a/kernel", "b/kernel", "a/bias"), ("b/kernel", "c/kernel", "b/bias")]


def mlp(p, x):
    with jax.numpy_rank_promotion("allow"):
        x = jax.nn.relu(x @ p["a"]["kernel"] + p["a"]["bias"])
        x = jax.nn.relu(x @ p["b"]["kernel"] + p["b"]["bias"])
        return x @ p["c"]["kernel"] + p["c"]["bias"]


def by_hand(kernels, biases, rounds):
    """The formulas of the paper on a chain of dense layers."""
    w = [np.asarray(k, np.float64) for k in kernels]
    b = [np.asarray(x, np.float64) for x in biases]
    for _ in range(rounds):
        for i in range(len(w) - 1):
            r1, r2 = np.abs(w[i]).max(0), np.abs(w[i + 1]).max(1)
            s = np.sqrt(r1 * r2) / r2
            w[i], b[i], w[i + 1] = w[i] / s, b[i] / s, w[i + 1] * s[:, None]
    return w, b


def test_a_chain_agrees_with_float64_and_keeps_its_function():
    new = equalize(CHAIN, PAIRS, iterations=30)
    w, b = by_hand(
        [CHAIN[n]["kernel"] for n in "abc"], [CHAIN[n]["bias"] for n in "abc"], rounds=30
    )
    for i, n in enumerate("abc"):
        np.testing.assert_allclose(new[n]["kernel"], w[i], rtol=1e-4)
        np.testing.assert_allclose(new[n]["bias"], b[i], rtol=1e-4)
    x = jnp.asarray(RNG.normal(size=(9, 6)), jnp.float32)
    want = mlp(CHAIN, x)
    np.testing.assert_allclose(mlp(new, x), want, atol=1e-5 * float(np.abs(want).max()))
    for first, second in (("a", "b"), ("b", "c")):
        r1 = np.abs(new[first]["kernel"]).max(0)
        np.testing.assert_allclose(r1, np.abs(new[second]["kernel"]).max(1), rtol=1e-2)
    # One step for a whole leaf then serves all channels.
    p = jc.quantize(8, axis=None)
    error = lambda params: float(np.abs(mlp(jc.compress(p, params), x) - want).max())  # noqa: E731
    assert error(new) < 0.7 * error(CHAIN)


def test_convolutions_dead_channels_and_torch_layouts():
    params = {"a": draw(3, 3, 2, 4), "b": draw(3, 3, 4, 2), "bias": draw(4)}
    params["a"] = params["a"].at[..., 1].set(0.0).at[0, 0, 0, 2].set(jnp.nan)

    def conv(x, w):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=numbers)

    new = equalize(params, [("a", "b", "bias")])
    for n in ("a", "b"):
        kept = [1, 2] if n == "a" else np.s_[:, :, [1, 2]]
        same = np.s_[..., kept] if n == "a" else kept
        np.testing.assert_array_equal(new[n][same], params[n][same])
    clean = jax.tree.map(lambda w: jnp.where(jnp.isnan(w), 0.0, w), (params, new))
    x = jnp.asarray(RNG.normal(size=(2, 5, 5, 2)), jnp.float32)

    def fn(p):
        return conv(jax.nn.relu(conv(x, p["a"]) + p["bias"][None, None, None]), p["b"])

    want, got = (fn(p) for p in clean)
    np.testing.assert_allclose(got, want, atol=1e-5 * float(np.abs(want).max()))
    torch = {"a": CHAIN["a"]["kernel"].T, "b": CHAIN["b"]["kernel"].T}
    turned = equalize(torch, [("a", "b")], axes=(0, 1))
    flax = equalize({"a": torch["a"].T, "b": torch["b"].T}, [("a", "b")])
    np.testing.assert_allclose(turned["b"].T, flax["b"], rtol=1e-6)


def test_equalize_refuses_what_it_does_not_cover():
    params = {"a": jnp.ones((3, 4)), "b": jnp.ones((2, 4)), "c": jnp.ones(4)}
    for pair, fault in (
        (("a", "b"), r"`pairs\[0\]` must have as many outputs .* got \[4, 2\]\. Grouped"),
        (("a", "d"), "must name leaves of the params, got 'd'"),
        (("a", "a"), "three different leaves"),
    ):
        with pytest.raises(ValueError, match=fault):
            equalize(params, [pair])
    with pytest.raises(TypeError, match="must be a tuple of two paths"):
        equalize(params, ["a"])


def calibrated(fn, params, x, **options):
    with jax.numpy_rank_promotion("allow"):
        return jc.calibrate(fn, params, [x], moments=True, **options)


def test_output_means_after_bias_correction():
    x = jnp.asarray(RNG.exponential(size=(50, 6)), jnp.float32)
    one = lambda p, x: x @ p["kernel"] + p["bias"][None]  # noqa: E731
    params = CHAIN["a"]
    stats = calibrated(one, params, x)
    dense = np.asarray(one(params, x), np.float64).mean(0)
    for compressed in (jc.compress(Q2, params), jc.pack(Q2, params)):
        new = correct_bias(params, compressed, stats)
        w = np.asarray(jc.todense(new["kernel"]), np.float64)
        means = np.asarray(x, np.float64).mean(0) @ w + np.asarray(new["bias"], np.float64)
        np.testing.assert_allclose(means, dense, rtol=1e-5, atol=1e-5)
        lost = np.asarray(one(jc.todense(compressed), x), np.float64).mean(0)
        assert np.abs(lost - dense).max() > 0.01


def test_biases_of_convolutions_layers_of_a_scan_and_split_outputs():
    x = jnp.asarray(RNG.exponential(size=(8, 4, 4, 4)), jnp.float32)

    def fn(p, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(
            x, p["conv"]["kernel"], (1, 1), "VALID", dimension_numbers=numbers,
            feature_group_count=2,
        )  # fmt: skip
        y = (y + p["conv"]["bias"]).mean((1, 2))
        y, _ = jax.lax.scan(
            lambda y, p: (y @ p["kernel"] + p["bias"], None), y, p["layers"], length=2
        )
        return jnp.einsum("bi,iho->bho", y, p["heads"]["kernel"]) + p["heads"]["bias"]

    params = {
        "conv": {"kernel": draw(1, 1, 2, 6), "bias": draw(6)},
        "layers": {"kernel": draw(2, 6, 6), "bias": draw(2, 6)},
        "heads": {"kernel": draw(6, 2, 3), "bias": draw(2, 3)},
    }
    stats = calibrated(fn, params, x, gram=True)
    small = jax.jit(lambda p: jc.compress(Q2, p))(params)
    new = correct_bias(params, small, stats)
    lost = jax.tree.map(lambda a, b: np.asarray(a, np.float64) - np.asarray(b), params, small)
    mean = {n: np.asarray(stats[f"{n}/kernel"].moments.mean, np.float64) for n in params}
    changes = {
        # Outputs 0 to 2 of the convolution see inputs 0 and 1, the others 2 and 3.
        "conv": [
            mean["conv"][2 * (o // 3) :][:2] @ lost["conv"]["kernel"][0, 0, :, o] for o in range(6)
        ],
        "layers": np.einsum("li,lio->lo", mean["layers"], lost["layers"]["kernel"]),
        "heads": np.einsum("i,iho->ho", mean["heads"], lost["heads"]["kernel"]),
    }
    for name, change in changes.items():
        # Biases of two dimensions were quantized themselves.
        want = np.asarray(small[name]["bias"], np.float64) + change
        np.testing.assert_allclose(new[name]["bias"], want, rtol=1e-4, atol=1e-4)


def test_explicit_biases_and_their_errors():
    x = jnp.asarray(RNG.exponential(size=(9, 6)), jnp.float32)
    fn = lambda p, x: x @ p["w"] + p["offset"][None]  # noqa: E731
    params = {"w": draw(6, 8), "offset": draw(8), "small": draw(3)}
    stats, small = calibrated(fn, params, x), jc.compress(Q2, params)
    assert correct_bias(params, small, stats)["offset"] is small["offset"]
    new = correct_bias(params, small, stats, {"w": "offset"})
    np.testing.assert_allclose(fn(new, x).mean(0), fn(params, x).mean(0), rtol=1e-5, atol=1e-5)
    for biases, fault in (
        ({"w": "bias"}, "`biases` must name leaves of the params, got 'bias'"),
        ({"w": "small"}, "`biases` must name a bias of 8 entries"),
        ({"offset": "offset"}, "`stats` must have statistics of each chosen leaf"),
    ):
        with pytest.raises(ValueError, match=fault):
            correct_bias(params, small, stats, biases)
    without = jc.calibrate(fn, params, [x])
    with pytest.raises(ValueError, match="`stats` must hold the mean of each feature"):
        correct_bias(params, small, without, {"w": "offset"})
