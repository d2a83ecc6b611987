"""Learned steps and codebooks: the papers' gradients, grids met exactly, small when packed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
from jaxcompress.quantization import (
    label_latents,
    learned_codebook,
    learned_steps,
    lsq,
    pack_latents,
)
from tests.conftest import counting_jit, lenient


def draw(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), dtype)


X, G = draw(16, 8), draw(16, 8, seed=1)


def by_hand(x, step, beta, low, high, gradient):
    """Equations 1 to 5 of LSQ and 4 to 6 of LSQ+, one step for all of `x`, in float64."""
    x, gradient = np.asarray(x, np.float64), np.asarray(gradient, np.float64)
    u = (x - beta) / step
    code = np.round(np.clip(u, low, high))
    inside = (low < u) & (u < high)
    scale = 1 / np.sqrt(x.size * high)
    by_step = np.where(u <= low, low, np.where(u >= high, high, code - u))
    by_beta = np.where(inside, 0.0, 1.0)
    return (
        code * step + beta,
        gradient * inside,
        scale * (gradient * by_step).sum(),
        scale * (gradient * by_beta).sum(),
    )


@functools.cache
def _jitted(signed, plus):
    def loss(x, step, beta, bits):
        out = lsq(x, step, bits, offset=beta if plus else None, signed=signed)
        return jnp.sum(G * out), out

    return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("plus", [True, False])
def test_lsq_is_the_paper(bits, signed, plus):
    step, beta = 0.37 / 2 ** (bits - 2), 0.21 if plus else 0.0
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    numbers = (jnp.asarray(step), jnp.asarray(beta), jnp.asarray(bits))
    got, out = _jitted(signed, plus)(X, *numbers)
    want, by_x, by_step, by_beta = by_hand(X, step, beta, low, high, G)
    np.testing.assert_allclose(out, want, atol=2e-6)
    np.testing.assert_array_equal(got[0], np.asarray(by_x, np.float32))
    np.testing.assert_allclose(got[1], by_step, rtol=2e-5, atol=1e-6)
    if plus:
        np.testing.assert_allclose(got[2], by_beta, rtol=2e-5, atol=1e-6)
    assert (np.asarray(by_x) == 0).any()


def test_steps_of_channels_count_their_own_weights():
    steps = jnp.linspace(0.1, 0.9, 8)
    loss = lambda s: jnp.sum(G * lsq(X, s, 3, axis=-1))  # noqa: E731
    got = jax.grad(loss)(steps)
    for i in range(8):
        want = by_hand(X[:, i], float(steps[i]), 0.0, -4, 3, G[:, i])
        np.testing.assert_allclose(got[i], want[2], rtol=2e-5, atol=1e-6)
    other = jax.grad(lambda s: jnp.sum(G * lsq(X, s, 3)))(steps[None, :])
    np.testing.assert_array_equal(other[0], got)


def test_lsq_edges():
    at = lambda x, s: lsq(jnp.asarray(x), s, 3)  # noqa: E731
    np.testing.assert_array_equal(at([1.0, -9.0, jnp.inf], 0.5), [1.0, -2.0, 1.5])
    assert np.isnan(at([jnp.nan], 0.5)).all()
    np.testing.assert_array_equal(at([1.0, -9.0], -0.5), at([1.0, -9.0], 0.5))
    assert np.isfinite(at([1.0, -9.0], 0.0)).all()
    assert at(jnp.zeros((0, 3)), 0.5).shape == (0, 3)
    x = X.astype(jnp.bfloat16)
    grads = jax.grad(lambda x, s: jnp.sum(lsq(x, s, 3).astype(jnp.float32)), (0, 1))(
        x, jnp.asarray(0.5, jnp.bfloat16)
    )
    assert [g.dtype for g in grads] == [jnp.bfloat16, jnp.bfloat16]
    one = lsq(X, 0.5, 1)
    np.testing.assert_array_equal(one, 0.5 * np.sign(X))
    mapped = jax.vmap(lambda b: lsq(X, 0.5, b))(jnp.arange(1, 5))
    for b, got in zip(range(1, 5), mapped, strict=True):
        np.testing.assert_array_equal(got, lsq(X, 0.5, b))
    np.testing.assert_array_equal(jax.vmap(lambda x: lsq(x, 0.5, 4))(X), lsq(X, 0.5, 4))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("axis", [-1, None])
def test_first_steps(bits, offset, axis):
    z = learned_steps(bits, axis=axis, offset=offset).init({"w": X, "b": jnp.ones(3)})
    mean = np.abs(np.asarray(X, np.float64)).mean(None if axis is None else 0, keepdims=True)
    want = mean if bits == 1 else 2 * mean / np.sqrt(2 ** (bits - 1) - 1)
    np.testing.assert_allclose(z["w"].step, want, rtol=1e-5)
    assert not hasattr(z["b"], "step")
    if offset and bits > 1:  # the same grid as without one
        plain = learned_steps(bits, axis=axis).init({"w": X})
        np.testing.assert_allclose(z["w"].todense(), plain["w"].todense(), atol=1e-6)


@pytest.mark.parametrize("offset", [False, True])
def test_gradients_of_latents_are_those_of_lsq(offset):
    r = learned_steps(3, offset=offset)
    z = r.init({"w": X})["w"]
    grads = jax.grad(lambda z: jnp.sum(G * r.apply({"w": z})["w"]))(z)
    for i in range(8):
        step = float(z.step[0, i])
        beta = float(z.offset[0, i]) if offset else 0.0
        low, high = (0, 7) if offset else (-4, 3)
        want = by_hand(X[:, i], step, beta, low, high, G[:, i])
        np.testing.assert_allclose(grads.weight[:, i], want[1], atol=1e-7)
        np.testing.assert_allclose(grads.step[0, i], want[2], rtol=1e-4, atol=1e-6)
        if offset:
            np.testing.assert_allclose(grads.offset[0, i], want[3], rtol=1e-4, atol=1e-6)


def trained(opt, params, steps=8):
    goal = jax.tree.map(lambda w: 0.7 * jnp.flip(w), params)

    def step(carry, _):
        params, state = carry
        grads = jax.tree.map(lambda w, g: w - g, params, goal)
        updates, state = opt.update(grads, state, params)
        with jax.numpy_dtype_promotion("standard"):
            params = optax.apply_updates(params, updates)
        return (params, state), None

    return jax.jit(lambda params: jax.lax.scan(step, (params, opt.init(params)), length=steps)[0])(
        params
    )


@pytest.mark.parametrize(
    ("dtype", "bits", "offset"),
    [
        (jnp.float32, 2, False),
        (jnp.float32, 4, True),
        (jnp.bfloat16, 1, False),
        (jnp.bfloat16, 8, True),
        (jnp.float16, 8, False),
    ],
)
def test_params_are_on_the_grid_and_pack_small(dtype, bits, offset):
    params = {"w": draw(64, 16, dtype=dtype), "b": jnp.ones(4, dtype)}
    opt = jc.reparametrized(lenient(optax.adam(1e-2)), learned_steps(bits, offset=offset))
    out, state = trained(opt, params)
    z = jc.latent(state)
    packed = pack_latents(z)
    assert isinstance(packed["w"], jc.arrays.Quantized)
    assert packed["w"].nbytes == 64 * 16 * bits // 8 + 16 * (5 if offset else 4)
    assert out["w"].dtype == packed["w"].dtype == dtype
    jitted = jax.jit(lambda z: z["w"].todense())(z)
    np.testing.assert_array_equal(packed["w"].todense(), jitted)
    # float32 updates can't land closer than one rounding of the larger of both weights.
    atol = 2e-6 if dtype == jnp.float32 else 0
    np.testing.assert_allclose(
        np.asarray(out["w"], np.float64), np.asarray(jitted, np.float64), rtol=0, atol=atol
    )
    step = np.asarray(z["w"].grid().scale, np.float64)
    codes = np.asarray(jitted, np.float64) / step
    slack = {jnp.float32: 1e-5, jnp.float16: 0.1, jnp.bfloat16: 0.45}[dtype]
    np.testing.assert_allclose(codes, np.round(codes), atol=slack)
    np.testing.assert_array_equal(packed["b"], z["b"])


@pytest.mark.parametrize("offset", [False, True])
def test_steps_stay_positive_at_any_learning_rate(offset):
    for rate in (1.0, 1e4, 1e20):
        inner = optax.partition(
            {"weights": lenient(optax.sgd(1e-2)), "grid": lenient(optax.sgd(rate))}, label_latents
        )
        opt = jc.reparametrized(inner, learned_steps(2, offset=offset))
        out, state = trained(opt, {"w": X}, steps=5)
        grid = jc.latent(state)["w"].grid()
        assert (np.asarray(grid.scale) > 0).all()
        assert np.isfinite(grid.scale).all()
        assert np.isfinite(out["w"]).all()


def test_steps_have_their_own_learning_rate():
    frozen = {"weights": lenient(optax.adam(1e-2)), "grid": optax.set_to_zero()}
    r = learned_steps(4, offset=True)
    params = {"w": X, "step": draw(4, 4), "b": jnp.ones(3)}
    _, state = trained(jc.reparametrized(optax.partition(frozen, label_latents), r), params)
    z, start = jc.latent(state), r.init(params)
    for name in ("w", "step"):
        np.testing.assert_allclose(z[name].step, start[name].step, rtol=1e-6)
        np.testing.assert_allclose(z[name].offset, start[name].offset, rtol=1e-6)
        assert (z[name].weight != start[name].weight).any()
    assert (z["b"] != start["b"]).any()


def test_learning_finds_a_better_grid_than_the_first_one():
    """A layer whose inputs differ in scale: the best step is not that of the weights alone."""
    x = draw(64, 16, seed=2) * jnp.linspace(0.2, 3.0, 16)[None, :]
    target = x @ X
    loss = lambda p: jnp.mean((x @ p["w"] - target) ** 2)  # noqa: E731
    r = learned_steps(2)
    opt = jc.reparametrized(lenient(optax.adam(1e-2)), r)

    def step(carry, _):
        params, state = carry
        updates, state = opt.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    start = r.apply(r.init({"w": X}))
    first = (start, opt.init({"w": X}))
    (params, _), _ = jax.lax.scan(step, first, length=200)
    assert float(loss(params)) < 0.8 * float(loss(start))


def test_traced_bits_are_swept_and_given_when_packing():
    def last(bits, params):
        return trained(jc.reparametrized(lenient(optax.sgd(0.1)), learned_steps(bits)), params)

    grid, params = jnp.asarray([2, 4, 8]), {"w": X}
    mapped, states = jax.vmap(last, (0, None))(grid, params)
    one = counting_jit(last)
    for i, bits in enumerate([2, 4, 8]):
        out, _ = one(grid[i], params)
        np.testing.assert_allclose(mapped["w"][i], out["w"], atol=1e-6)
        z = jax.tree.map(lambda x: x[i], jc.latent(states))  # noqa: B023
        packed = pack_latents(z, bits=bits)["w"]
        np.testing.assert_allclose(packed.todense(), mapped["w"][i], atol=2e-6)
    assert one.traces == 1
    with pytest.raises(ValueError, match="`bits` must be given"):
        pack_latents(z)


def test_sparse_weights_stay_sparse_with_an_offset():
    w = jc.compress(jc.prune(0.5), {"w": X + 1.0})["w"]
    for bits in (1, 2, 4):
        z = learned_steps(bits, offset=True).init({"w": w})["w"]
        np.testing.assert_array_equal(z.todense()[w == 0], 0)


@pytest.mark.parametrize("assignments", ["fixed", "nearest"])
def test_gradient_of_a_value_is_the_sum_of_those_of_its_weights(assignments):
    w = X.at[:3].set(0.0)
    r = learned_codebook(5, assignments=assignments)
    z = r.init({"w": w})
    out = r.apply(z)["w"]
    clustered = jc.compress(jc.cluster(5), {"w": w})["w"]
    np.testing.assert_allclose(out, clustered, atol=1e-6)
    grads = jax.grad(lambda z: jnp.sum(G * r.apply(z)["w"]))(z)["w"]
    dense, g = np.asarray(out, np.float64), np.asarray(G, np.float64)
    want = [g[dense == float(v)].sum() for v in z["w"].values]
    np.testing.assert_allclose(grads.values, want, rtol=1e-5, atol=1e-5)
    if assignments == "nearest":
        np.testing.assert_array_equal(grads.weight, G)
    else:
        np.testing.assert_array_equal(grads.index, 0)


@pytest.mark.parametrize(
    ("assignments", "dtype"),
    [("fixed", jnp.float32), ("fixed", jnp.bfloat16), ("nearest", jnp.float32)],
)
def test_learned_codebooks_pack_to_codebooks(assignments, dtype):
    params = {"w": draw(32, 16, dtype=dtype).at[:4].set(0.0), "b": jnp.ones(4, dtype)}
    r = learned_codebook(16, assignments=assignments)
    # Decay does not move fixed assignments.
    opt = jc.reparametrized(lenient(optax.adamw(1e-2, weight_decay=1e-2)), r)
    out, state = trained(opt, params)
    z, start = jc.latent(state)["w"], r.init(params)["w"]
    assert (z.values != start.values).any()
    if assignments == "fixed":
        np.testing.assert_array_equal(z.index, start.index)
    packed = pack_latents(jc.latent(state))["w"]
    same = jc.pack(state, out)["w"]
    np.testing.assert_array_equal(same.todense(), packed.todense())
    assert same.nbytes == packed.nbytes
    assert isinstance(packed, jc.arrays.Codebook)
    assert packed.nbytes < 0.6 * params["w"].nbytes
    np.testing.assert_array_equal(packed.todense(), z.todense())
    atol = 1e-6 if dtype == jnp.float32 else 0
    np.testing.assert_allclose(
        np.asarray(out["w"], np.float64), np.asarray(z.todense(), np.float64), atol=atol
    )
    if assignments == "fixed":
        np.testing.assert_array_equal(out["w"][:4], 0)
    assert len(np.unique(np.asarray(z.todense(), np.float64))) <= 17


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="learned_steps: `bits` must be a real number in"):
        learned_steps(9)
    with pytest.raises(TypeError, match="learned_steps: `bits` must be a number, got a schedule"):
        learned_steps(lambda step: 4)
    with pytest.raises(ValueError, match=r"learned_steps: `axis` .* at 'w'"):
        learned_steps(4, axis=2).init({"w": X})
    with pytest.raises(ValueError, match="learned_steps: `where` must match"):
        learned_steps(4).init({"b": jnp.ones(3)})
    with pytest.raises(TypeError, match="learned_steps: `params` must hold real floating"):
        learned_steps(4, where="n").init({"n": jnp.ones((2, 2), jnp.int32)})
    with pytest.raises(TypeError, match="pack_latents: `latents` must be concrete"):
        jax.jit(lambda w: pack_latents(learned_steps(4).init({"w": w})))(X)
    with pytest.raises(ValueError, match="lsq: `step` must be a scalar, broadcast"):
        lsq(X, jnp.ones(3), 4, axis=-1)
    with pytest.raises(ValueError, match="learned_codebook: `assignments` must be 'fixed'"):
        learned_codebook(4, assignments="first")
    with pytest.raises(ValueError, match="learned_codebook: `num_values`"):
        learned_codebook(256)
