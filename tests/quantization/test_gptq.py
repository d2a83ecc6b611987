"""GPTQ: grids found on the way, against float64 loops from the paper and against qwix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from tests.conftest import counting_jit
from tests.solvers import brute_force

MIN_MAX = jc.quantization.min_max
DAMPING = 0.01
X, W = brute_force.layer(24, 8, seed=3)
GRAM = brute_force.gram_of(X)
UNEVEN = np.geomspace(0.3, 3.0, 24)[np.random.default_rng(0).permutation(24)]


def fn(params, x):
    return x @ params["w"]


def stats_of(x=X):
    return jc.calibrate(fn, {"w": jnp.asarray(W)}, [jnp.asarray(x, jnp.float32)], gram=True)


def gptq(p, w=W, x=X, **options):
    params = {"w": jnp.asarray(w)}
    return jc.compress(p, params, stats=stats_of(x), return_structure=True, **options)


def fitted(rows, bits, symmetric):
    """The paper's grid of each column: step, zero point and the ends of the codes."""
    if symmetric:
        q = 2 ** (bits - 1) - 1
        return np.abs(rows).max(0) / q, 0 * rows[0], -q, q
    low, high = np.minimum(rows.min(0), 0), np.maximum(rows.max(0), 0)
    step = (high - low) / (2**bits - 1)
    return step, np.round(-low / step), 0, 2**bits - 1


def rounded(row, grid):
    step, zero, low, high = grid
    return step * (np.clip(np.round(row / step) + zero, low, high) - zero)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [8, 10])
def test_groups_are_fitted_to_their_rows_when_their_turn_comes(symmetric, group_size):
    p = jc.quantize(4, group_size=group_size, symmetric=symmetric, ranges=MIN_MAX)
    new, held = gptq(p)
    want, grids = brute_force.compensate(
        W,
        brute_force.damped(GRAM, DAMPING),
        lambda rows, diagonal, start: fitted(rows, 4, symmetric),
        lambda row, grid, i: rounded(row, grid),
        group_size,
    )
    np.testing.assert_allclose(new["w"], want, atol=1e-4)
    np.testing.assert_allclose(held["w"].scale, [grid[0] for grid in grids], rtol=1e-4)
    if not symmetric:
        np.testing.assert_array_equal(held["w"].zero_point, [grid[1] for grid in grids])


@pytest.mark.parametrize("symmetric", [True, False])
def test_act_order_keeps_the_groups_of_the_leaf(symmetric):
    x = X * UNEVEN
    p = jc.quantize(4, group_size=10, symmetric=symmetric, ranges=MIN_MAX)
    new, held = gptq(p, x=x, act_order=True)
    gram = brute_force.gram_of(x.astype(np.float32))
    order = np.argsort(-np.diag(gram), kind="stable")
    grids = [fitted(W[a : a + 10].astype(np.float64), 4, symmetric) for a in (0, 10, 20)]
    want, _ = brute_force.compensate(
        W[order],
        brute_force.damped(gram[np.ix_(order, order)], DAMPING),
        lambda rows, diagonal, start: start,
        lambda row, start, i: rounded(row, grids[order[start + i] // 10]),
        24,
    )
    np.testing.assert_allclose(np.asarray(new["w"])[order], want, atol=1e-4)
    np.testing.assert_allclose(held["w"].scale, [grid[0] for grid in grids], rtol=1e-6)


def test_codes_are_qwixs():
    core = pytest.importorskip("qwix.contrib.gptq_core")
    how = core.qarray.HowToQuantize(
        qtype=jnp.int4, channelwise_axes=[0], tiled_axes={1: 8}, calibration_method="absmax"
    )
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        theirs, _ = core.quantize_weight(jnp.asarray(W.T), jnp.asarray(GRAM), how, blocksize=8)
    convention = jc.quantization.QWIX
    p = jc.quantize(4, group_size=8, ranges=MIN_MAX, convention=convention)
    new, held = gptq(p)
    packed = p.pack(new, held)["w"]
    np.testing.assert_allclose(packed.scale, theirs.scale.T, rtol=1e-5)
    np.testing.assert_array_equal(jc.todense(packed.codes), theirs.qvalue.T.astype(jnp.int8))


UNSYMMETRIC = {"symmetric": False, "ranges": MIN_MAX}
PROJECTIONS = {
    "channels": jc.quantize(4, ranges=MIN_MAX),
    "groups": jc.quantize(3, group_size=10, symmetric=False),
    "blocks": jc.quantize(4, blocks={-2: 8, -1: 4}, ranges=MIN_MAX),
    "sparse": jc.chain(jc.prune(0.5), jc.quantize(4, group_size=8, **UNSYMMETRIC)),
    "2:4": jc.chain(jc.prune(nm=(2, 4)), jc.quantize(4, group_size=10, **UNSYMMETRIC)),
    "quantized first": jc.masked(
        jc.chain(jc.quantize(1, group_size=8, ranges=MIN_MAX), jc.prune(0.5)), "w"
    ),
    "partition": jc.partition({"w": jc.scheduled(jc.quantize)(lambda step: 8, axis=None)}),
    "masks": jc.pruning.from_masks({"w": jnp.asarray(W > 0)}),
}


@pytest.mark.parametrize("name", PROJECTIONS)
def test_the_structure_projects_and_packs_what_was_found(name):
    p, params = PROJECTIONS[name], {"w": jnp.asarray(W)}
    new, held = gptq(p, act_order=name == "masks")
    like = jax.eval_shape(p.find, params)
    assert jax.tree.structure(held) == jax.tree.structure(like)
    assert [x.shape for x in jax.tree.leaves(held)] == [x.shape for x in jax.tree.leaves(like)]
    np.testing.assert_array_equal(p.project(new, held)["w"], new["w"])
    packed = p.pack(new, held)
    np.testing.assert_array_equal(jc.todense(packed)["w"], new["w"])
    assert packed["w"].nbytes < W.nbytes
    if name in ("channels", "groups", "blocks"):
        plain = jc.compress(p, params)["w"]
        assert brute_force.error(GRAM, new["w"], W) < brute_force.error(GRAM, plain, W)
    if name in ("sparse", "2:4", "quantized first"):
        assert int((new["w"] != 0).sum()) <= W.size // 2


def test_without_statistics_and_layer_after_layer():
    p, params = jc.quantize(4, group_size=8, ranges=MIN_MAX), {"w": jnp.asarray(W)}
    new, held = jc.compress(p, params, return_structure=True)
    np.testing.assert_array_equal(new["w"], jc.compress(p, params)["w"])
    np.testing.assert_array_equal(held["w"].scale, p.find(params)["w"].scale)
    found = jc.solvers.sequential(p, fn, params, [jnp.asarray(X)], return_structure=True)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(gptq(p)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_groups_of_a_convolution_and_of_stacked_layers():
    """Channels of each place of a kernel; where they don't divide, the grid is found before."""
    rng = np.random.default_rng(1)
    kernel = jnp.asarray(rng.normal(size=(3, 8, 5)), jnp.float32)
    signal = jnp.asarray(rng.normal(size=(4, 16, 8)), jnp.float32)

    def conv(params, x):
        return jax.lax.conv_general_dilated(
            x, params["w"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )

    stats = jc.calibrate(conv, {"w": kernel}, [signal], gram=True)
    for size in (4, 3):
        p = jc.quantize(4, group_size=size, **UNSYMMETRIC)
        new, held = jc.compress(p, {"w": kernel}, stats=stats, return_structure=True)
        assert held["w"].scale.shape == (3, -(-8 // size), 5)
        np.testing.assert_array_equal(p.project(new, held)["w"], new["w"])
        dense, plain = conv({"w": kernel}, signal), jc.compress(p, {"w": kernel})
        losses = [float(jnp.sum((conv(q, signal) - dense) ** 2)) for q in (new, plain)]
        assert losses[0] < 0.9 * losses[1]

    def scanned(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]

    stacked, x = {"w": jnp.asarray(rng.normal(size=(2, 24, 24)), jnp.float32)}, jnp.asarray(X)
    stats = jc.calibrate(scanned, stacked, [x], gram=True)
    new, held = jc.compress(
        jc.quantize(4, group_size=8, ranges=MIN_MAX), stacked, stats=stats, return_structure=True
    )
    assert held["w"].scale.shape == (2, 3, 24)
    np.testing.assert_array_equal(held["w"].project(new["w"]), new["w"])


def test_bits_and_clip_are_traced_and_bfloat16_is_kept():
    params, stats = {"w": jnp.asarray(W, jnp.bfloat16)}, stats_of()

    @counting_jit
    def at(bits, clip):
        p = jc.quantize(bits, clip=clip, group_size=8, **UNSYMMETRIC)
        new, held = jc.compress(p, params, stats=stats, return_structure=True)
        return new["w"], p.project(new, held)["w"], held

    bits, clips = jnp.array([2, 4, 8]), jnp.array([0.8, 0.9, 1.0])
    mapped = jax.vmap(at)(bits, clips)
    assert mapped[0].dtype == jnp.bfloat16
    np.testing.assert_array_equal(mapped[0], mapped[1])
    losses = [brute_force.error(GRAM, new.astype(np.float32), W) for new in mapped[0]]
    assert losses[0] > 2 * losses[1] > 4 * losses[2]
    for i in range(3):
        for a, b in zip(at(bits[i], clips[i])[:2], mapped, strict=False):
            np.testing.assert_allclose(np.float32(a), np.float32(b[i]), atol=1e-2)
    assert at.traces == 1


def test_a_projection_that_cannot_tell_is_refused():
    rule = jc.projections.RowRule(lambda *_: (), lambda row, structure, i: jnp.round(row))
    rows = lambda params, *, step=0: jc.projections.Rows(rule, {"w": ()}, {})  # noqa: E731
    p = jc.prune(0.5)._replace(rows=rows)
    with pytest.raises(ValueError, match=r"tell its structure for `return_structure`.*at 'w'"):
        gptq(p)
