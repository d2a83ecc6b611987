"""Weights drawn to the grid: PARQ and BinaryRelax against torchao, width schedules, QAT."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
from jaxcompress.quantization import parq, piecewise_affine
from tests.conftest import counting_jit, lenient


def draw(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), dtype)


W = draw(16, 8)
GRIDS = {
    "symmetric": jc.quantize(3, axis=None, ranges=lambda x, axes, error: _half(x)),
    "asymmetric": jc.quantize(2, axis=None, symmetric=False, ranges=jc.quantization.min_max),
    "codebook": jc.cluster(5),
    "binary": jc.quantize(1, axis=None),
}


def _half(x):
    """A range that leaves weights beyond both of its ends."""
    end = 0.5 * jnp.max(jnp.abs(x), keepdims=True)
    return -end, end


def points(structure):
    """All values of a grid or a codebook over a whole leaf, ascending, in float64."""
    if hasattr(structure, "values"):
        return np.asarray(structure.values, np.float64)
    bits, step = int(structure.bits), float(structure.scale.reshape(()))
    if structure.zero_point is not None:
        return (np.arange(2**bits) - float(structure.zero_point.reshape(()))) * step
    top = max(2 ** (bits - 1) - 1, 1)
    codes = np.arange(-top, top + 1)
    return step * (codes if bits > 1 else codes[codes != 0])


def by_hand(w, values, rho):
    """The map of the docstring, weight by weight."""
    out = np.empty(w.shape)
    for i, x in np.ndenumerate(np.asarray(w, np.float64)):
        above = np.searchsorted(values, x)
        low, high = values[max(above - 1, 0)], values[min(above, len(values) - 1)]
        middle = (low + high) / 2
        out[i] = np.clip(middle + (x - middle) / rho, low, high)
    return out


@pytest.mark.parametrize("name", GRIDS)
def test_parq_is_the_piecewise_affine_map(name):
    hard = GRIDS[name]
    held = hard.find({"w": W})["w"]
    values = points(held)
    run = jax.jit(lambda rho: jc.compress(parq(hard, rho), {"w": W})["w"])
    for rho in (0.9, 0.4, 0.01):
        np.testing.assert_allclose(run(rho), by_hand(W, values, rho), atol=1e-5)
    np.testing.assert_array_equal(run(1.0), W)
    np.testing.assert_allclose(run(0.0), held.project(W), rtol=1e-6)
    grads = jax.grad(lambda w: jnp.sum(jc.compress(parq(hard, 0.5), {"w": w})["w"]))(W)
    assert np.isfinite(grads).all()


def test_the_operator_minimizes_its_penalty():
    """Brute force over a fine grid of candidates: the distance and the penalty as written."""
    hard = GRIDS["asymmetric"]
    w = draw(8, 8)
    values = points(hard.find({"w": w})["w"])
    candidates = np.linspace(values[0], values[-1], 40001)
    place = np.clip(np.searchsorted(values, candidates, side="right") - 1, 0, len(values) - 2)
    penalty = 0.5 * (candidates - values[place]) * (values[place + 1] - candidates)
    draw_in = piecewise_affine(hard)
    for strength in (0.0, 0.3, 0.8):
        got = np.asarray(draw_in(w, strength), np.float64)
        for x, v in zip(np.asarray(w, np.float64).ravel(), got.ravel(), strict=True):
            cost = 0.5 * (candidates - x) ** 2 + strength * penalty
            best = candidates[cost.argmin()]
            if values[0] <= x <= values[-1]:
                near = np.abs(candidates - v).argmin()
                assert cost[near] <= cost.min() + 1e-4, (x, v, best)
    np.testing.assert_array_equal(draw_in(w, 1.0), jc.compress(hard, {"w": w})["w"])


def test_parq_and_binary_relax_are_torchaos():
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("torchao.prototype.parq.optim.parq")
    relax = pytest.importorskip("torchao.prototype.parq.optim.binarelax")
    values = points(GRIDS["symmetric"].find({"w": W})["w"])
    targets = torch.tensor(values, dtype=torch.float32)
    p, inner = theirs.ProxPARQ(0, 10, steepness=8.0), torch.tensor(np.asarray(W))
    for step in (2, 5, 9):
        x = inner.clone()
        rho = p.apply_(x, None, targets, step)
        ours = jc.compress(parq(GRIDS["symmetric"], rho), {"w": W})["w"]
        np.testing.assert_allclose(ours, x.numpy(), atol=2e-5)
    b = relax.ProxBinaryRelax(0, 10)
    for step in (0, 3, 10):
        x = inner.clone()
        b.apply_(x, None, targets, step)
        ours = jc.compress(jc.relaxed(GRIDS["symmetric"], step / 10), {"w": W})["w"]
        np.testing.assert_allclose(ours, x.numpy(), atol=1e-6)


def test_relaxed_is_binary_relax():
    """`(w + mu Q(w)) / (1 + mu)`, with mu growing: equation 7 of the paper."""
    growth = lambda step: 0.5 * 1.1**step  # noqa: E731
    share = lambda step: growth(step) / (1 + growth(step))  # noqa: E731
    hard = jc.quantize(1)
    p = jc.relaxed(hard, share)
    q = np.asarray(jc.compress(hard, {"w": W})["w"], np.float64)
    for step in (0, 10, 50):
        mu = growth(step)
        want = (np.asarray(W, np.float64) + mu * q) / (1 + mu)
        got = jc.compress(p, {"w": W}, step=step)["w"]
        np.testing.assert_allclose(got, want, atol=1e-5)


def train(opt, loss, params, steps):
    def step(carry, _):
        params, state = carry
        updates, state = opt.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), params

    run = lambda params: jax.lax.scan(step, (params, opt.init(params)), length=steps)  # noqa: E731
    return jax.jit(run)(params)


def distance(params):
    return 0.5 * jnp.sum((params["w"] - 0.8 * jnp.flip(W)) ** 2)


def test_parq_ends_on_the_grid_and_packs():
    slope = jc.schedules.cosine(1.0, 0.0, 3, 15)
    p = parq(jc.quantize(2, ranges=jc.quantization.absmax), slope)
    opt = jc.straight_through(lenient(optax.sgd(0.1)), p)
    start = opt.init({"w": W})
    with pytest.raises(ValueError, match=r"`inverse_slope` must be 0 to pack .* 'w'"):
        jc.pack(start, {"w": W})
    (params, state), seen = train(opt, distance, {"w": W}, 20)
    # Plain training first.
    w = np.asarray(W, np.float64)
    for i in range(3):
        np.testing.assert_allclose(seen["w"][i], w, atol=1e-5)
        w = w - 0.1 * (w - 0.8 * np.asarray(jnp.flip(W), np.float64))
    assert float(jc.structure(state)["w"].inverse_slope) == 0
    packed = jc.pack(state, params)["w"]
    assert isinstance(packed, jc.arrays.Quantized)
    np.testing.assert_allclose(packed.todense(), params["w"], atol=1e-6)
    assert all(len(np.unique(params["w"][:, i])) <= 3 for i in range(8))


def test_the_proximal_link_brings_weights_to_the_grid():
    draw_in = piecewise_affine(jc.quantize(2, ranges=jc.quantization.absmax))
    ramp = jc.schedules.linear(0.0, 1.0, 0, 15)
    opt = optax.chain(lenient(optax.sgd(0.1)), jc.proximal(draw_in, ramp))
    (params, _), _ = train(opt, distance, {"w": W, "b": jnp.ones(3)}, 20)
    hard = jc.compress(jc.quantize(2, ranges=jc.quantization.absmax), params)["w"]
    np.testing.assert_allclose(params["w"], hard, atol=2e-6)
    np.testing.assert_array_equal(params["b"], 1)


def test_slopes_are_swept():
    one = jax.jit(lambda rho: jc.compress(parq(GRIDS["symmetric"], rho), {"w": W})["w"])
    rhos = jnp.array([0.0, 0.3, 1.0])
    for rho, got in zip(rhos, jax.jit(jax.vmap(one))(rhos), strict=True):
        np.testing.assert_allclose(got, one(rho), atol=1e-6)


@pytest.mark.parametrize("scheduled", [True, False])
def test_widths_from_eight_bits_to_four(scheduled):
    bits = jc.schedules.linear(8.0, 4.0, 0, 8)
    quantize = jc.scheduled(jc.quantize) if scheduled else jc.quantize
    opt = jc.straight_through(lenient(optax.sgd(0.1)), quantize(bits))
    params = {"w": draw(256, 4)}
    state = opt.init(params)
    update = counting_jit(opt.update)
    for step in range(10):
        updates, state = update({"w": 0.1 * params["w"]}, state, params)
        params = optax.apply_updates(params, updates)
        held = jc.structure(state)
        grid = (held.inner if scheduled else held)["w"]
        width = round(8 - min(step, 8) / 2 + 1e-9)
        assert abs(int(grid.bits) - width) <= 1
        most = max(len(np.unique(np.asarray(params["w"][:, i]).round(5))) for i in range(4))
        assert 2 ** (int(grid.bits) - 2) < most <= 2 ** int(grid.bits) - 1
    assert update.traces == 1
    assert int(grid.bits) == 4
    assert jc.pack(state, params)["w"].nbytes == 256 * 4 // 2 + 4 * 4


def test_weights_and_activations_train_together():
    x = draw(64, 16, seed=2)
    target = jnp.tanh(x @ draw(16, 4, seed=3)) @ draw(4, 2, seed=4)
    fn = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]  # noqa: E731
    rounded = jc.quantize_activations(fn, 4, symmetric=False)
    loss = lambda p: jnp.mean((rounded(p, x) - target) ** 2)  # noqa: E731
    params = {"a": draw(16, 16, seed=5) / 4, "b": draw(16, 2, seed=6) / 4}
    p = jc.quantize(4, ranges=jc.quantization.absmax)
    opt = jc.straight_through(lenient(optax.adam(1e-2)), p)
    before = float(loss(jc.compress(p, params)))
    (params, state), _ = train(opt, loss, params, 150)
    assert float(loss(params)) < 0.35 * before
    packed = jc.pack(state, params)
    assert isinstance(packed["a"], jc.arrays.Quantized)
    dense = jc.todense(packed)
    np.testing.assert_allclose(rounded(dense, x), rounded(params, x), atol=1e-4)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="parq: `inverse_slope` must be a real number in"):
        parq(jc.quantize(2), 1.5)
    with pytest.raises(TypeError, match="parq: `projection` must be a jaxcompress Projection"):
        parq(2, 0.5)
    with pytest.raises(TypeError, match=r"parq: `projection` must round to .*Basis"):
        parq(jc.low_rank(2), 0.5).find({"w": W})
    with pytest.raises(TypeError, match="piecewise_affine: `w` must hold real floating"):
        piecewise_affine(jc.quantize(2))(jnp.ones((2, 2), jnp.int32), 0.5)
