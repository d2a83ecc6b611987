"""Rounding in the loss: values and gradients by hand, unbiased draws, PACT and DoReFa."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxcompress as jc
from jaxcompress.quantization import (
    dorefa,
    fake_quantize,
    pact,
    round_backward,
    round_gradients,
    stochastic,
)
from tests.conftest import counting_jit, lenient

ABSMAX = jc.quantization.absmax
KEY = jax.random.key(0)


def draw(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), dtype)


X = draw(16, 8)


def on_grid(x, step, zero, bottom, top):
    """Values and the textbook gradient, in float64: 1 where the code is not clipped."""
    code = np.round(np.asarray(x, np.float64) / step) + zero
    return (np.clip(code, bottom, top) - zero) * step, (code >= bottom) & (code <= top)


def slope(f, x):
    return jax.grad(lambda x: jnp.sum(f(x)))(x)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_values_and_gradients_for_a_given_range(bits, symmetric):
    low, high = -1.0, 0.75
    f = lambda x: fake_quantize(x, bits, low=low, high=high, symmetric=symmetric)  # noqa: E731
    if symmetric:
        top = 2 ** (bits - 1) - 1
        want, inside = on_grid(X, 1.0 / top, 0, -top, top)
    else:
        top = 2**bits - 1
        step = 1.75 / top
        want, inside = on_grid(X, step, np.round(1.0 / step), 0, top)
    np.testing.assert_allclose(f(X), want, atol=1e-6)
    np.testing.assert_array_equal(slope(f, X), inside)
    assert inside.any()
    assert not inside.all()


def test_a_given_step_is_torchs_fake_quantization():
    torch = pytest.importorskip("torch")
    x = torch.tensor(np.asarray(X), requires_grad=True)
    theirs = torch.fake_quantize_per_tensor_affine(x, 0.0625, 5, 0, 15)
    theirs.sum().backward()
    f = lambda x: fake_quantize(x, 4, scale=0.0625, zero_point=5)  # noqa: E731
    np.testing.assert_array_equal(f(X), theirs.detach().numpy())
    np.testing.assert_array_equal(slope(f, X), x.grad.numpy())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("axis", [None, -1])
def test_own_range_is_the_projection_and_clips_nothing(symmetric, axis):
    for bits in (1, 3, 8):
        f = lambda x: fake_quantize(x, bits, axis=axis, symmetric=symmetric)  # noqa: B023, E731
        p = jc.quantize(bits, axis=axis, symmetric=symmetric, ranges=jc.quantization.min_max)
        np.testing.assert_array_equal(f(X), jc.compress(p, X))
        np.testing.assert_array_equal(slope(f, X), 1)


def test_no_gradient_reaches_the_range_and_vectors_lie_along_the_axis():
    high = jnp.linspace(0.1, 1.0, 8)
    f = lambda h: fake_quantize(X, 4, high=h, axis=-1)  # noqa: E731
    np.testing.assert_array_equal(slope(f, high), 0)
    each = [fake_quantize(X[:, i], 4, high=high[i]) for i in range(8)]
    np.testing.assert_array_equal(f(high), jnp.stack(each, -1))
    step = high[None, :] / 7
    np.testing.assert_array_equal(
        slope(lambda s: fake_quantize(X, 4, scale=s, zero_point=jnp.full((1, 8), 7.0)), step), 0
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_dtype_edges_and_traced_bits(dtype):
    x = X.astype(dtype).at[0, 0].set(jnp.nan).at[1, 0].set(jnp.inf)
    f = counting_jit(lambda x, bits: fake_quantize(x, bits, high=1.0))
    out = f(x, jnp.asarray(4))
    assert out.dtype == dtype
    assert np.isnan(float(out[0, 0]))
    assert float(out[1, 0]) == 1
    f(x, jnp.asarray(2))
    assert f.traces == 1
    bits = jnp.arange(2, 9)
    mapped = jax.vmap(lambda b: fake_quantize(X, b))(bits)
    for b, got in zip(bits, mapped, strict=True):
        np.testing.assert_array_equal(got, fake_quantize(X, int(b)))
    assert fake_quantize(jnp.zeros((0, 3)), 4).shape == (0, 3)
    np.testing.assert_array_equal(fake_quantize(jnp.zeros(3), 4, key=KEY), 0)


@functools.cache
def _randomly(symmetric):
    zero = None if symmetric else 1.0
    options = {"scale": 0.5, "zero_point": zero, "symmetric": symmetric, "key": KEY}
    return jax.jit(lambda x, bits: fake_quantize(x, bits, **options))


@settings(derandomize=True, deadline=None, max_examples=25)
@given(st.floats(-3, 3, width=32), st.sampled_from([1, 2, 4]), st.booleans())
def test_the_mean_of_stochastic_rounding_is_what_was_rounded(value, bits, symmetric):
    x, step = jnp.full((64, 64), value, jnp.float32), 0.5
    out = np.asarray(_randomly(symmetric)(x, jnp.asarray(bits)), np.float64)
    top = max(2 ** (bits - 1) - 1, 1) if symmetric else 2**bits - 2
    bottom = -top if symmetric else -1
    want = np.clip(value, bottom * step, top * step)
    gap = 2 * step if symmetric and bits == 1 else step
    assert len(np.unique(out)) <= 2
    assert np.all(np.abs(out - want) <= gap * (1 + 1e-6))
    if value != 0:
        assert abs(out.mean() - want) <= 5 * 0.5 * gap / 64
    np.testing.assert_allclose(out / step, np.round(out / step), atol=1e-6)


def test_stochastic_rounding_is_the_same_everywhere_and_depends_on_the_key():
    x = draw(256, 128)
    f = lambda x, key: fake_quantize(x, 4, key=key)  # noqa: E731
    out = f(x, KEY)
    np.testing.assert_array_equal(out, jax.jit(f)(x, KEY))
    np.testing.assert_array_equal(out, jax.vmap(f, (0, None))(x[None], KEY)[0])
    np.testing.assert_array_equal(out, jax.vjp(lambda x: f(x, KEY), x)[0])
    np.testing.assert_array_equal(out, f(x, jax.random.key_data(KEY)))
    assert (out != f(x, jax.random.key(1))).mean() > 0.2
    np.testing.assert_allclose(f(out, jax.random.key(2)), out, rtol=1e-6)
    np.testing.assert_array_equal(slope(lambda x: f(x, KEY), x), 1)


# Options that find quickly: how a range is found is none of this module's.
QUANTIZERS = {
    "symmetric": jc.quantize(4, ranges=ABSMAX),
    "asymmetric": jc.quantize(3, symmetric=False, ranges=jc.quantization.min_max),
    "groups": jc.quantize(4, group_size=5, ranges=ABSMAX),
    "binary": jc.quantize(1),
    "codebook": jc.cluster(8),
    "nf4": jc.quantization.nf4(),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, jnp.float32) for name in QUANTIZERS]
    + [("asymmetric", jnp.bfloat16), ("groups", jnp.bfloat16)],
)
def test_stochastic_projection_packs_exactly_and_stays(name, dtype):
    params = {"w": draw(24, 16, dtype=dtype)}
    p = stochastic(QUANTIZERS[name], key=KEY)
    held = jax.jit(p.find)(params)
    project = jax.jit(p.project)
    out = project(params, held)
    packed = p.pack(params, held)["w"]
    assert packed.nbytes < params["w"].nbytes * 0.7
    for got in (project(out, held)["w"], packed.todense(), p.pack(out, held)["w"].todense()):
        np.testing.assert_array_equal(got, out["w"])
    nearest = held["w"].inner.project(params["w"])
    assert (nearest != out["w"]).mean() > 0.1


def test_draws_depend_on_the_path_and_the_step_alone():
    p = stochastic(QUANTIZERS["symmetric"], key=KEY)
    params = {"a": {"w": draw(24, 16)}, "b": draw(24, 16)}
    run = jax.jit(lambda params, step: jc.compress(p, params, step=step))
    out = run(params, 0)
    eager = jc.compress(p, params)
    jax.tree.map(np.testing.assert_array_equal, eager, out)
    assert (out["a"]["w"] != out["b"]).any()
    assert (run(params, 1)["b"] != out["b"]).any()
    alone = jc.compress(p, {"b": params["b"]})["b"]
    np.testing.assert_array_equal(alone, out["b"])


def test_the_mean_of_stochastic_projections_is_the_weight():
    params = {"w": draw(16, 8)}
    for name in ("symmetric", "asymmetric", "codebook"):
        p = stochastic(QUANTIZERS[name], key=KEY)
        held = p.find(params)
        inner, steps = held["w"].inner, jnp.arange(2000)
        # One find for all, and the keys of as many steps.
        keys = jax.vmap(lambda i: p.find(params, step=i)["w"].key)(steps)  # noqa: B023
        one = lambda k: dataclasses.replace(held["w"], key=k).project(params["w"])  # noqa: B023, E731
        drawn = np.asarray(jax.jit(jax.vmap(one))(keys), np.float64)
        low, high = (inner.project(jnp.full((16, 8), e)) for e in (-jnp.inf, jnp.inf))
        want = np.clip(params["w"], low, high)
        error = np.abs(drawn.mean(0) - want)
        assert np.all(error <= 5 * drawn.std(0) / np.sqrt(2000) + 1e-6), name
        assert (drawn.std(0) > 0).mean() > 0.8


def test_weights_without_a_dense_copy_follow_small_updates():
    """Updates of a twentieth of a step: rounding to the nearest loses them all."""
    grid = jc.quantize(4, axis=None, ranges=ABSMAX)

    def trained(p):
        opt = optax.chain(lenient(optax.sgd(1.0)), jc.project_params(p))

        def step(carry, _):
            params, state = carry
            updates, state = opt.update({"w": jnp.full((32, 32), 0.005)}, state, params)
            return (optax.apply_updates(params, updates), state), None

        params = {"w": jnp.full((32, 32), 0.0).at[0, 0].set(0.7).at[0, 1].set(-0.7)}
        start = (params, opt.init(params))
        (params, state), _ = jax.lax.scan(step, start, length=40)
        return params["w"][1:], params, state

    held, _, _ = trained(grid)
    np.testing.assert_array_equal(held, 0)
    moved, params, state = trained(stochastic(grid, key=KEY))
    assert abs(float(moved.mean()) + 0.2) < 0.03
    np.testing.assert_array_equal(jc.pack(state, params)["w"].todense(), params["w"])


def test_stochastic_of_sparse_weights_keeps_them_sparse():
    p = jc.chain(jc.prune(0.5), stochastic(jc.quantize(4), key=KEY))
    params = {"w": draw(24, 16)}
    packed = jc.pack(p, params)["w"]
    out = jc.compress(p, params)["w"]
    assert jc.arrays.is_sparse(packed.codes)
    np.testing.assert_array_equal(packed.todense(), out)
    assert ((out == 0) >= (jc.compress(jc.prune(0.5), params)["w"] == 0)).all()


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_pact(bits):
    alpha, top = 1.5, 2**bits - 1
    x = np.asarray(X, np.float64)
    want = np.round(np.clip(x, 0, alpha) * top / alpha) * alpha / top
    f = lambda x, a: jnp.sum(pact(x, a, bits))  # noqa: E731
    np.testing.assert_allclose(pact(X, alpha, bits), want, atol=1e-6)
    by_x, by_alpha = jax.grad(f, (0, 1))(X, jnp.asarray(alpha))
    np.testing.assert_array_equal(by_x, (x >= 0) & (x < alpha))
    assert float(by_alpha) == (x >= alpha).sum() > 0
    ends = jnp.linspace(0.2, 1.6, 8)
    by_end = slope(lambda a: pact(X, a, bits, axis=-1), ends)
    np.testing.assert_array_equal(by_end, (x >= np.asarray(ends)).sum(0))
    np.testing.assert_array_equal(pact(X, -1.0, bits), 0)
    assert pact(X.astype(jnp.bfloat16), alpha, bits).dtype == jnp.bfloat16


def test_dorefa_weights():
    w = np.asarray(X, np.float64)
    for bits in (2, 5):
        top = 2**bits - 1
        unit = np.tanh(w) / (2 * np.abs(np.tanh(w)).max()) + 0.5
        want = 2 * np.round(top * unit) / top - 1
        np.testing.assert_allclose(dorefa(X, bits), want, atol=1e-6)
    binary = np.sign(w) * np.abs(w).mean()
    np.testing.assert_allclose(dorefa(X, jnp.asarray(1)), binary, rtol=1e-6)
    np.testing.assert_array_equal(slope(lambda w: dorefa(w, 1), X), 1)
    # Straight through the rounding: the derivative of the squashed weights.
    g = np.asarray(draw(16, 8, seed=4), np.float64)
    got = jax.grad(lambda w: jnp.sum(jnp.asarray(g, jnp.float32) * dorefa(w, 3)))(X)
    t = np.tanh(w)
    m, i = np.abs(t).max(), np.unravel_index(np.abs(t).argmax(), t.shape)
    want = g / m
    want[i] -= np.sign(t[i]) * (g * t).sum() / m**2
    np.testing.assert_allclose(got, want * (1 - t**2), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dorefa(jnp.zeros((2, 2)), 8), 1 / 255, atol=1e-6)


@functools.cache
def _many_gradients():
    def run(g, bits):
        opt = round_gradients(bits, key=KEY)

        def one(state, _):
            out, state = opt.update(g, state)
            return state, out

        return jax.lax.scan(one, opt.init(g), length=2000)

    return jax.jit(run)


@pytest.mark.parametrize("bits", [1, 2, 6])
def test_gradients_of_a_few_bits(bits):
    g = {"w": draw(16, 8), "b": draw(8, seed=1).astype(jnp.bfloat16), "n": None}
    state, out = _many_gradients()(g, jnp.asarray(bits))
    opt = round_gradients(bits, key=KEY)
    assert int(state.step) == 2000
    assert out["b"].dtype == jnp.bfloat16
    for name, values in out.items():
        if values is None:
            continue
        x, drawn = np.asarray(g[name], np.float64), np.asarray(values, np.float64)
        m, top = np.abs(x).max(), 2**bits - 1
        code = (drawn / (2 * m) + 0.5) * top
        tolerance = 1e-4 if name == "w" else 0.3
        np.testing.assert_allclose(code, np.round(code), atol=tolerance)
        error = np.abs(drawn.mean(0) - x)
        assert np.all(error <= 5 * drawn.std(0) / np.sqrt(2000) + (1e-6 if name == "w" else 0.02))
    finite = {"w": jnp.full((2, 2), jnp.inf)}
    np.testing.assert_array_equal(opt.update(finite, opt.init(finite))[0]["w"], jnp.inf)
    only = round_gradients(bits, key=KEY, where="w")
    g.pop("n")
    np.testing.assert_array_equal(only.update(g, only.init(g))[0]["b"], g["b"])


def test_gradients_on_their_way_back():
    x, out = draw(4, 6), draw(4, 6, seed=1)
    f = lambda x, key: jnp.sum(round_backward(x, 3, key) * out)  # noqa: E731
    np.testing.assert_array_equal(round_backward(x, 3, KEY), x)
    keys = jax.random.split(KEY, 2000)
    drawn = np.asarray(jax.vmap(lambda k: jax.grad(f)(x, k))(keys), np.float64)
    m = np.abs(np.asarray(out, np.float64)).max(1, keepdims=True)
    code = (drawn / (2 * m) + 0.5) * 7
    np.testing.assert_allclose(code, np.round(code), atol=1e-4)
    error = np.abs(drawn.mean(0) - np.asarray(out))
    assert np.all(error <= 5 * drawn.std(0) / np.sqrt(2000) + 1e-6)


def test_what_does_not_fit_is_refused():
    with pytest.raises(TypeError, match=r"fake_quantize: `x` must hold real floating-point"):
        fake_quantize(jnp.arange(3), 4)
    with pytest.raises(ValueError, match="fake_quantize: `bits` must be a real number in"):
        fake_quantize(X, 0)
    with pytest.raises(ValueError, match=r"fake_quantize: `low, high` must come with `high`"):
        fake_quantize(X, 4, low=-1.0)
    with pytest.raises(ValueError, match=r"`low, high`"):
        fake_quantize(X, 4, high=1.0, scale=0.1)
    with pytest.raises(ValueError, match=r"`zero_point` must come with `scale`"):
        fake_quantize(X, 4, zero_point=3)
    with pytest.raises(ValueError, match=r"fake_quantize: `scale` must be a scalar, broadcast"):
        fake_quantize(X, 4, scale=jnp.ones(8))
    with pytest.raises(TypeError, match="fake_quantize: `key` must be one key"):
        fake_quantize(X, 4, key=3)
    with pytest.raises(TypeError, match=r"stochastic: `projection` must round to .*Mask"):
        stochastic(jc.prune(0.5), key=KEY).find({"w": X})
    with pytest.raises(TypeError, match="stochastic: `projection` must be a jaxcompress"):
        stochastic(4, key=KEY)
    with pytest.raises(ValueError, match="round_backward: `batch_axis`"):
        round_backward(X, 4, KEY, batch_axis=2)
    with pytest.raises(ValueError, match="pact: `clip`"):
        pact(X, jnp.ones(3), 4, axis=-1)
