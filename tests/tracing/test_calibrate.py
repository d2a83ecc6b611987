"""Statistics of the inputs of sites, against those of the same values computed by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from tests.conftest import mesh_of


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


def mlp(params, x):
    return jnp.tanh(x @ params["w1"]) @ params["w2"]


PARAMS = {"w1": draw(8, 6), "w2": draw(6, 4)}
BATCHES = [draw(5, 8), 2 * draw(3, 8), draw(5, 8, seed=1)]
ALL = np.concatenate(BATCHES).astype(np.float64)
HIDDEN = np.tanh(ALL @ np.asarray(PARAMS["w1"], np.float64))


def test_everything_by_hand():
    stats = jc.calibrate(mlp, PARAMS, BATCHES, moments=True, histogram=True, gram=True)
    assert list(stats) == ["w1", "w2"]
    for name, x in (("w1", ALL), ("w2", HIDDEN)):
        s = stats[name]
        np.testing.assert_allclose(s.low, x.min(), rtol=1e-5)
        np.testing.assert_allclose(s.high, x.max(), rtol=1e-5)
        np.testing.assert_allclose(s.moments.mean, x.mean(0), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(s.moments.variance, x.var(0), rtol=1e-4)
        np.testing.assert_allclose(s.gram.matrix, x.T @ x, rtol=1e-4, atol=1e-4)
        assert s.gram.count == s.moments.count == len(x)
        assert s.histogram.counts.sum() == x.size
        assert s.gram.matrix.dtype == jnp.float32


def test_only_what_is_asked_for():
    (s,) = jc.calibrate(mlp, PARAMS, BATCHES, where="w2").values()
    assert (s.moments, s.histogram, s.gram) == (None, None, None)


def test_other_ranges():
    stats = jc.calibrate(mlp, PARAMS, BATCHES, ranges=jc.observers.absmax(per="channel"))
    np.testing.assert_allclose(stats["w1"].high, np.abs(ALL).max(0), rtol=1e-6)


def test_batches_of_several_arguments():
    fn = lambda p, x, *, scale=1.0: scale * x @ p["w1"]  # noqa: E731
    both = lambda p, x, y: (fn(p, x), fn(p, y))  # noqa: E731
    stats = jc.calibrate(both, PARAMS, [(BATCHES[0], BATCHES[1])])
    assert list(stats) == ["w1", "w1:1"]
    np.testing.assert_allclose(stats["w1:1"].high, BATCHES[1].max())


def test_layers_of_a_scan_are_kept_apart():
    blocks = {"w": draw(3, 8, 8)}

    def fn(params, x):
        step = lambda x, w: (jnp.tanh(x @ w), None)  # noqa: E731
        return jax.lax.scan(jax.checkpoint(step), x, params["w"])[0]

    s = jc.calibrate(fn, blocks, BATCHES, gram=True, moments=True)["w"]
    x = ALL
    for i in range(3):
        np.testing.assert_allclose(s.high[i], x.max(), rtol=1e-5)
        np.testing.assert_allclose(s.gram.matrix[i], x.T @ x, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(s.moments.mean[i], x.mean(0), rtol=1e-3, atol=1e-6)
        x = np.tanh(x @ np.asarray(blocks["w"][i], np.float64))


def test_steps_over_one_weight_are_one_sample():
    def fn(params, x):
        return jax.lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ params["w"]), x)

    w = draw(8, 8)
    s = jc.calibrate(fn, {"w": w}, BATCHES, gram=True)["w"]
    x, total = ALL, 0
    for _ in range(3):
        total = total + x.T @ x
        x = np.tanh(x @ np.asarray(w, np.float64))
    assert s.gram.count == 3 * len(ALL)
    np.testing.assert_allclose(s.gram.matrix, total, rtol=1e-4, atol=1e-4)


def test_a_branch_that_does_not_run_adds_nothing():
    def fn(params, x):
        use = lambda x: x @ params["w1"]  # noqa: E731
        return jax.lax.cond(x[0, 0] > 0, use, lambda x: jnp.zeros((x.shape[0], 6)), x)

    batches = [BATCHES[0].at[0, 0].set(-1), BATCHES[2].at[0, 0].set(1)]
    s = jc.calibrate(fn, PARAMS, batches, gram=True, where="w1")["w1"]
    assert s.gram.count == 5
    np.testing.assert_allclose(s.high, batches[1].max())


CONVS = {
    "plain": (8, {}),
    "strided, dilated": (8, {"window_strides": (2, 1), "rhs_dilation": (1, 2)}),
    "grouped": (4, {"feature_group_count": 2}),
    "depthwise": (1, {"feature_group_count": 8}),
}


@pytest.mark.parametrize("case", CONVS)
def test_gram_of_a_convolution(case):
    # sum of (w * patch)^2 over all patches is w^T G w: by the convolution itself.
    features, options = CONVS[case]
    kernel, x = draw(3, 3, features, 8), draw(2, 6, 6, 8)
    options = {"window_strides": (1, 1), "padding": "SAME"} | options

    def conv(params, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, params["w"], dimension_numbers=numbers, **options)

    s = jc.calibrate(conv, {"w": kernel}, [x], gram=True)["w"]
    groups = options.get("feature_group_count", 1)
    w = np.asarray(kernel, np.float64).transpose(2, 0, 1, 3).reshape(features * 9, groups, -1)
    energy = np.einsum("fgo,gfh,hgo->go", w, np.asarray(s.gram.matrix, np.float64), w)
    want = np.square(np.asarray(conv({"w": kernel}, x), np.float64)).sum((0, 1, 2))
    np.testing.assert_allclose(energy.ravel(), want, rtol=1e-4)


def test_sharded_batches():
    x = draw(8, 8)
    sharded = jax.device_put(x, NamedSharding(mesh_of("auto"), P("d")))
    options = {"gram": True, "moments": True, "histogram": True}
    got = jc.calibrate(mlp, PARAMS, [sharded], **options)
    want = jc.calibrate(mlp, PARAMS, [x], **options)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_shard_map_merges_devices():
    specs = {"mesh": mesh_of("auto"), "in_specs": (P(), P("d")), "out_specs": P("d")}
    sharded = functools.partial(jax.shard_map, **specs)(mlp)
    x = draw(8, 8)
    options = {"gram": True, "moments": True}
    got = jc.calibrate(sharded, PARAMS, [x, x], **options)
    want = jc.calibrate(mlp, PARAMS, [x, x], **options)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_lifted_functions():
    small = jc.pack(jc.quantize(8), PARAMS)
    stats = jc.calibrate(jc.lift(mlp), small, BATCHES)
    assert len(stats) == 2
    np.testing.assert_allclose(next(iter(stats.values())).high, ALL.max(), rtol=1e-6)


def test_progress_bar(capsys):
    plain = jc.calibrate(mlp, PARAMS, BATCHES)
    shown = jc.calibrate(mlp, PARAMS, iter(BATCHES), progress=True)
    assert "calibrate" in capsys.readouterr().out
    np.testing.assert_array_equal(shown["w2"].high, plain["w2"].high)


def test_compiles_once_for_each_shape():
    traces = []

    def fn(params, x):
        traces.append(x.shape)
        return mlp(params, x)

    jc.calibrate(fn, PARAMS, [draw(5, 8, seed=i) for i in range(6)])
    jc_many = len(traces)
    traces.clear()
    jc.calibrate(fn, PARAMS, [draw(5, 8, seed=i) for i in range(12)])
    assert len(traces) == jc_many <= 3


def test_bad_input():
    with pytest.raises(ValueError, match="calibrate: `batches` must hold at least one batch"):
        jc.calibrate(mlp, PARAMS, [])
    with pytest.raises(ValueError, match="calibrate: `fn` must multiply activations"):
        jc.calibrate(lambda p, x: x, PARAMS, BATCHES)
    with pytest.raises(ValueError, match=r"calibrate: .*'w9'"):
        jc.calibrate(mlp, PARAMS, BATCHES, where="w9")
    with pytest.raises(TypeError, match="calibrate: `ranges` must be an Observer"):
        jc.calibrate(mlp, PARAMS, BATCHES, ranges="absmax")
    with pytest.raises(TypeError, match="calibrate: `fn` must be a function"):
        jc.calibrate(PARAMS, PARAMS, BATCHES)
