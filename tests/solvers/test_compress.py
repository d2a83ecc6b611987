"""compress with statistics: against the papers' recursion in float64, leaf by leaf."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from tests.conftest import counting_jit, mesh_of
from tests.solvers import brute_force

DAMPING = 0.02


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def inputs(*shape, seed=1):
    """Features that are correlated."""
    rng = np.random.default_rng(seed)
    mix = np.eye(shape[-1]) + 1.5 * rng.normal(size=(shape[-1],) * 2) / np.sqrt(shape[-1])
    return jnp.asarray(rng.normal(size=shape) @ mix, jnp.float32)


def conv(x, w, groups=1):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups
    )


def best(scores, count):
    keep = np.zeros(scores.size, bool)
    keep[np.argsort(-scores.ravel(), kind="stable")[:count]] = True
    return keep.reshape(scores.shape)


def mask_row(row, keep, i):
    return np.where(keep[i], row, 0.0)


def sparsegpt(w, h, kept, block):
    """Unstructured: `kept` weights spread evenly over the blocks."""
    k = len(w)

    def choose(rows, diagonal, start):
        ends = [round(kept * min(e, k) / k) for e in (start, start + block)]
        return best((rows / diagonal[:, None]) ** 2, ends[1] - ends[0])

    return brute_force.compensate(w, h, choose, mask_row, block)[0]


def two_of_four(w, h):
    def choose(rows, diagonal, start):
        scores = (rows / diagonal[:, None]) ** 2
        return np.argsort(np.argsort(-scores, axis=0, kind="stable"), axis=0) < 2

    return brute_force.compensate(w, h, choose, mask_row, 4)[0]


def calibrated(fn, w, x):
    return jc.calibrate(lambda p, x: fn(p["w"], x), {"w": w}, [x], gram=True)


def compressed(p, fn, w, x, block=4, act_order=False):
    stats = calibrated(fn, w, x)
    options = {"damping": DAMPING, "block_size": block, "act_order": act_order}
    new = jc.compress(p, {"w": w}, stats=stats, **options)["w"]
    return np.asarray(new, np.float64), stats["w"]


def close(found, want):
    np.testing.assert_allclose(found, want, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("sparsity", "block"), [(0.5, 4), (0.3, 5), (0.9, 12), (0.0, 4)])
def test_a_dense_layer_is_sparsegpt(sparsity, block):
    w, x = draw(12, 5), inputs(40, 12)
    new, stats = compressed(jc.prune(sparsity), lambda w, x: x @ w, w, x, block)
    h = brute_force.damped(np.asarray(stats.gram.matrix), DAMPING)
    kept = 60 - round(sparsity * 60)
    close(new, sparsegpt(np.asarray(w), h, kept, block))
    assert (new != 0).sum() == kept


def test_a_transposed_leaf():
    w, x = draw(5, 12), inputs(40, 12)
    new, stats = compressed(jc.prune(0.5), lambda w, x: x @ w.T, w, x)
    h = brute_force.damped(np.asarray(stats.gram.matrix), DAMPING)
    close(new, sparsegpt(np.asarray(w).T, h, 30, 4).T)


def test_attention_heads_that_are_summed_over():
    w, x = draw(2, 6, 5), inputs(40, 12).reshape(40, 2, 6)
    fn = lambda w, x: jnp.einsum("thd,hdo->to", x, w)  # noqa: E731
    new, stats = compressed(jc.prune(0.5), fn, w, x)
    h = brute_force.damped(np.asarray(stats.gram.matrix), DAMPING)
    close(new.reshape(12, 5), sparsegpt(np.asarray(w).reshape(12, 5), h, 30, 4))


def test_a_convolution():
    w, x = draw(2, 2, 3, 4), inputs(3, 5, 5, 3)
    new, stats = compressed(jc.prune(0.5), lambda w, x: conv(x, w), w, x)
    h = brute_force.damped(np.asarray(stats.gram.matrix[0]), DAMPING)
    matrix = np.moveaxis(np.asarray(w), 2, 0).reshape(12, 4)
    close(np.moveaxis(new, 2, 0).reshape(12, 4), sparsegpt(matrix, h, 24, 4))


def test_each_group_of_a_convolution_has_its_own_features():
    w, x = draw(2, 2, 3, 4), inputs(3, 5, 5, 6)
    new, stats = compressed(jc.prune(0.5), lambda w, x: conv(x, w, 2), w, x)
    masks = jc.prune(0.5).find({"w": w})["w"].keep
    for g in range(2):
        own = slice(2 * g, 2 * g + 2)
        h = brute_force.damped(np.asarray(stats.gram.matrix[g]), DAMPING)
        matrix = np.moveaxis(np.asarray(w)[..., own], 2, 0).reshape(12, 2)
        kept = int(masks[..., own].sum())
        close(np.moveaxis(new[..., own], 2, 0).reshape(12, 2), sparsegpt(matrix, h, kept, 4))


def test_layers_of_a_scan_have_their_own_statistics():
    w, x = draw(3, 8, 8), inputs(30, 8)

    def fn(w, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    new, stats = compressed(jc.prune(0.5), fn, w, x)
    masks = jc.prune(0.5).find({"w": w})["w"].keep
    for i in range(3):
        h = brute_force.damped(np.asarray(stats.gram.matrix[i]), DAMPING)
        close(new[i], sparsegpt(np.asarray(w[i]), h, int(masks[i].sum()), 4))


@pytest.mark.parametrize("rows", [12, 10])
def test_two_of_four(rows):
    w, x = draw(rows, 5), inputs(40, rows)
    new, stats = compressed(jc.prune(nm=(2, 4)), lambda w, x: x @ w, w, x)
    h = brute_force.damped(np.asarray(stats.gram.matrix), DAMPING)
    close(new, two_of_four(np.asarray(w), h))


UNEVEN = np.array([[1, 5, 2, 8, 1, 1, 9, 1, 3, 4, 2, 7]], np.float32)


def test_act_order_takes_the_rows_with_the_largest_inputs_first():
    w, x = draw(12, 5), inputs(40, 12) * UNEVEN
    new, stats = compressed(jc.prune(0.5), lambda w, x: x @ w, w, x, act_order=True)
    gram = np.asarray(stats.gram.matrix)
    order = np.argsort(-np.diag(gram))
    h = brute_force.damped(gram[np.ix_(order, order)], DAMPING)
    want = sparsegpt(np.asarray(w)[order], h, 30, 4)
    close(new[order], want)
    assert not np.allclose(new, compressed(jc.prune(0.5), lambda w, x: x @ w, w, x)[0], atol=0.1)


@pytest.mark.parametrize("rows", [12, 10])
def test_act_order_moves_whole_groups_and_leaves_a_ragged_one_last(rows):
    w, x = draw(rows, 5), inputs(40, rows) * UNEVEN[:, :rows]
    new, stats = compressed(jc.prune(nm=(2, 4)), lambda w, x: x @ w, w, x, act_order=True)
    gram = np.asarray(stats.gram.matrix)
    sizes = [np.diag(gram)[i : i + 4].sum() for i in range(0, rows - 3, 4)]
    groups = [range(4 * g, 4 * g + 4) for g in np.argsort(sizes)[::-1]]
    order = np.array([i for group in [*groups, range(rows // 4 * 4, rows)] for i in group])
    h = brute_force.damped(gram[np.ix_(order, order)], DAMPING)
    close(new[order], two_of_four(np.asarray(w)[order], h))


def test_act_order_of_quantization_is_gptqs():
    w, x = draw(24, 8), inputs(100, 24) * np.tile(UNEVEN, (1, 2))
    p = jc.quantize(3, group_size=6, ranges=jc.quantization.min_max)
    new, stats = compressed(p, lambda w, x: x @ w, w, x, act_order=True)
    gram = np.asarray(stats.gram.matrix)
    order = np.argsort(-np.diag(gram))
    h = brute_force.damped(gram[np.ix_(order, order)], DAMPING)
    steps = np.repeat(np.abs(np.asarray(w)).reshape(4, 6, 8).max(1) / 3, 6, axis=0)[order]

    def project(row, start, i):
        step = steps[start + i]
        return step * np.clip(np.round(row / step), -3, 3)

    want = brute_force.compensate(
        np.asarray(w)[order], h, lambda rows, diagonal, start: start, project, 4
    )[0]
    close(new[order], want)


def test_two_of_four_along_the_input_channels_of_a_convolution():
    w, x = draw(2, 1, 8, 3), inputs(3, 5, 5, 8)
    new, stats = compressed(jc.prune(nm=(2, 4)), lambda w, x: conv(x, w), w, x)
    # Channels run fastest among the rows: from (channel, height) to (height, channel).
    gram = np.asarray(stats.gram.matrix).reshape(8, 2, 8, 2).transpose(1, 0, 3, 2)
    h = brute_force.damped(gram.reshape(16, 16), DAMPING)
    close(new.reshape(16, 3), two_of_four(np.asarray(w).reshape(16, 3), h))
    assert ((new != 0).reshape(2, 2, 4, 3).sum(2) == 2).all()


def test_joint_pruning_and_quantization():
    w, x = draw(12, 5), inputs(40, 12)
    p = jc.chain(jc.prune(0.5), jc.quantize(4, ranges=jc.quantization.min_max))
    new, stats = compressed(p, lambda w, x: x @ w, w, x)
    h = brute_force.damped(np.asarray(stats.gram.matrix), DAMPING)
    sparse = np.asarray(jc.compress(jc.prune(0.5), {"w": w})["w"], np.float64)
    steps = np.abs(sparse).max(0) / 7

    def choose(rows, diagonal, start):
        ends = [round(30 * min(e, 12) / 12) for e in (start, start + 4)]
        return best((rows / diagonal[:, None]) ** 2, ends[1] - ends[0])

    def project(row, keep, i):
        return np.where(keep[i], steps * np.clip(np.round(row / steps), -7, 7), 0.0)

    close(new, brute_force.compensate(np.asarray(w), h, choose, project, 4)[0])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [None, 6])
def test_quantization_stays_on_its_grid_and_beats_rounding(symmetric, group_size):
    w, x = draw(24, 8), inputs(100, 24)
    p = jc.quantize(3, symmetric=symmetric, group_size=group_size)
    stats = calibrated(lambda w, x: x @ w, w, x)
    new, held = jc.compress(p, {"w": w}, stats=stats, return_structure=True)
    np.testing.assert_array_equal(p.project(new, held)["w"], new["w"])
    plain = jc.compress(p, {"w": w})["w"]
    gram = np.asarray(stats["w"].gram.matrix)
    assert brute_force.error(gram, new["w"], w) < 0.7 * brute_force.error(gram, plain, w)


def test_given_masks_are_kept_and_made_up_for():
    w, x = draw(12, 5), inputs(40, 12)
    for p in (
        jc.prune(0.5, groups=jc.pruning.blocks(2, 1)),
        jc.prune(0.5, scope=-1),
        jc.prune(0.5, score=jc.pruning.random(jax.random.key(0))),
        jc.pruning.from_masks({"w": draw(12, 5, seed=3) > 0}),
    ):
        keep = np.asarray(p.find({"w": w})["w"].keep)
        new, stats = compressed(p, lambda w, x: x @ w, w, x)
        h = brute_force.damped(np.asarray(stats.gram.matrix), DAMPING)
        choose = lambda rows, diagonal, start, keep=keep: keep[start : start + 4]  # noqa: E731
        close(new, brute_force.compensate(np.asarray(w), h, choose, mask_row, 4)[0])


def model(params, x):
    x = jnp.tanh(x @ params["a"]["kernel"] + params["a"]["bias"][None, :])
    return x @ params["b"]["kernel"] + x @ params["c"]["kernel"]


def model_params():
    return {
        "a": {"kernel": draw(16, 12), "bias": draw(12)},
        "b": {"kernel": draw(12, 6, seed=2)},
        "c": {"kernel": draw(12, 6, seed=3)},
    }


def test_a_model_of_several_layers_equals_its_layers_alone():
    params, x = model_params(), inputs(60, 16)
    stats = jc.calibrate(model, params, [x], gram=True)
    new = jc.compress(jc.prune(0.5), params, stats=stats, damping=DAMPING)
    for layer in "abc":
        h = brute_force.damped(np.asarray(stats[f"{layer}/kernel"].gram.matrix), DAMPING)
        w = np.asarray(params[layer]["kernel"])
        close(new[layer]["kernel"], sparsegpt(w, h, w.size // 2, len(w)))
    np.testing.assert_array_equal(new["a"]["bias"], params["a"]["bias"])
    some = jc.compress(jc.masked(jc.prune(0.5), "b/*"), params, stats=stats, damping=DAMPING)
    np.testing.assert_allclose(some["b"]["kernel"], new["b"]["kernel"], atol=1e-5)
    np.testing.assert_array_equal(some["c"]["kernel"], params["c"]["kernel"])
    two = jc.partition({"a/kernel": jc.quantize(4), "b/*": jc.prune(0.5)})
    parts = jc.compress(two, params, stats=stats, damping=DAMPING)
    np.testing.assert_allclose(parts["b"]["kernel"], new["b"]["kernel"], atol=1e-5)
    assert (np.asarray(parts["a"]["kernel"]) != np.asarray(params["a"]["kernel"])).any()


def test_a_global_scope_and_budgets_share_the_total_out():
    params, x = model_params(), inputs(60, 16)
    stats = jc.calibrate(model, params, [x], gram=True)
    for p in (
        jc.prune(0.6, scope="global"),
        jc.prune(0.6, budget=jc.pruning.erdos_renyi()),
        jc.scheduled(jc.prune)(lambda step: 0.6),
    ):
        plain = jc.compress(p, params)
        new = jc.compress(p, params, stats=stats)
        for layer in "abc":
            zeros = [int((q[layer]["kernel"] == 0).sum()) for q in (plain, new)]
            assert zeros[0] == zeros[1]


def test_sites_of_a_tied_leaf_count_together():
    w, x = draw(8, 8), inputs(40, 8)
    fn = lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"]  # noqa: E731
    stats = jc.calibrate(fn, {"w": w}, [x], gram=True)
    new = jc.compress(jc.prune(0.5), {"w": w}, stats=stats, damping=DAMPING)["w"]
    gram = np.asarray(stats["w"].gram.matrix) + np.asarray(stats["w:1"].gram.matrix)
    close(new, sparsegpt(np.asarray(w), brute_force.damped(gram, DAMPING), 32, 8))


def test_dead_inputs_go_first_and_nan_counts_as_zero():
    w, x = draw(12, 5), inputs(40, 12).at[:, 3].set(0.0)
    new, _ = compressed(jc.prune(1 / 12), lambda w, x: x @ w, w, x, block=12)
    assert (new[3] == 0).all()
    assert (np.delete(new, 3, 0) != 0).all()
    stats = calibrated(lambda w, x: x @ w, w, x)
    broken = w.at[0, 0].set(jnp.nan)
    out = jc.compress(jc.prune(0.5), {"w": broken}, stats=stats)["w"]
    assert bool(jnp.isfinite(out).all())
    assert float(out[0, 0]) == 0


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtypes_jit_and_vmap(dtype):
    w, x = draw(12, 5).astype(dtype), inputs(40, 12).astype(dtype)
    stats = calibrated(lambda w, x: x @ w, w, x)

    @counting_jit
    def at(sparsity, damping):
        p = jc.prune(sparsity)
        return jc.compress(p, {"w": w}, stats=stats, damping=damping, block_size=4)["w"]

    grid, dampings = jnp.array([0.0, 0.5, 0.8]), jnp.array([0.01, 0.1, 1.0])
    mapped = jax.vmap(at)(grid, dampings)
    assert mapped.dtype == dtype
    for i in range(3):
        np.testing.assert_allclose(
            np.asarray(mapped[i], np.float32),
            np.asarray(at(grid[i], dampings[i]), np.float32),
            atol=0.05 if dtype != jnp.float32 else 1e-5,
        )
        assert int((mapped[i] != 0).sum()) == 60 - round(float(grid[i]) * 60)
    assert at.traces == 1


@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize("sharded", ["weights", "tokens"])
def test_on_a_mesh_it_is_the_same(kind, sharded):
    fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]  # noqa: E731
    params = {"a": draw(16, 8), "b": draw(8, 16, seed=1)}
    x = inputs(64, 16)
    p = jc.chain(jc.prune(0.5), jc.quantize(4, group_size=8, ranges=jc.quantization.min_max))

    def solved(params, x):
        stats = jc.calibrate(fn, params, [(x,)], gram=True)
        return jc.compress(p, params, stats=stats, return_structure=True)

    want = solved(params, x)
    with jax.set_mesh(mesh_of(kind)):
        place = lambda w, *spec: jax.device_put(w, jax.P(*spec))  # noqa: E731
        if sharded == "weights":
            params = {"a": place(params["a"], None, "d"), "b": place(params["b"], None, "d")}
        else:
            x = place(x, "d")
            params = jax.tree.map(place, params)
        for f in (solved, jax.jit(solved)):
            found = f(params, x)
            for name, w in params.items():
                assert found[0][name].sharding.is_equivalent_to(w.sharding, 2)
            for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_without_statistics_it_is_the_nearest_in_weights():
    params = model_params()
    p = jc.chain(jc.prune(0.5), jc.quantize(4))
    jax.tree.map(
        np.testing.assert_array_equal,
        jc.compress(p, params),
        p.project(params, p.find(params)),
    )


@pytest.mark.parametrize(
    ("p", "change", "text"),
    [
        (jc.cluster(4), {}, "compress: `projection` must project rows one by one"),
        (jc.every(2, jc.prune(0.5)), {}, "compress: `projection` must project rows one by one"),
        (jc.prune(0.5), {"only": "a/*"}, r"none of \['b/kernel', 'c/kernel'\]"),
        (jc.prune(0.5), {"gram": False}, "hold Gram matrices, .* at 'a/kernel'. Call jc.calib"),
        (jc.prune(nm=(2, 4), axis=-1), {}, r"one axis that is summed over \(\[0\]\), got \[1\]"),
        (jc.prune(0.5), {"nan": True}, "be finite, .* at 'a/kernel'"),
        (jc.prune(0.5), {"block_size": 0}, "compress: `block_size`"),
        (jc.prune(0.5), {"damping": -1.0}, "compress: `damping`"),
        (jc.prune(0.5), {"other": True}, "compress: `stats` must have 9 features"),
    ],
)
def test_bad_input(p, change, text):
    params, x = model_params(), inputs(60, 16)
    if change.pop("nan", False):
        x = x.at[0, 0].set(jnp.nan)
    where, gram = change.pop("only", None), change.pop("gram", True)
    stats = jc.calibrate(model, params, [x], gram=gram, where=where)
    if change.pop("other", False):
        params["b"]["kernel"] = draw(9, 6)
    with pytest.raises(ValueError, match=text):
        jc.compress(p, params, stats=stats, **change)


def test_parts_of_a_leaf_are_refused():
    w, x = draw(12, 6), inputs(40, 12)
    stats = calibrated(lambda w, x: x @ w[:, :3], w, x)
    with pytest.raises(ValueError, match=r"use the whole leaf in one way, .* at 'w'"):
        jc.compress(jc.prune(0.5), {"w": w}, stats=stats)


@pytest.mark.parametrize("transposed", [False, True])
def test_one_feature_has_nothing_to_make_up_for(transposed):
    """As the second factor of rank 1: no error can go to other rows."""
    w, x = draw(*((9, 1) if transposed else (1, 9))), inputs(40, 1)
    stats = calibrated(lambda w, x: x @ (w.T if transposed else w), w, x)
    for p in (jc.prune(0.5), jc.quantize(3)):
        found = jc.compress(p, {"w": w}, stats=stats)["w"]
        np.testing.assert_allclose(found, jc.compress(p, {"w": w})["w"], rtol=1e-6)


def test_a_second_call_compiles_nothing():
    """Also where the caller is not under `jit`, as in a notebook."""
    params, x = {"w": draw(24, 6), "v": draw(24, 6, seed=3)}, inputs(40, 24)
    stats = jc.calibrate(lambda p, x: (x @ p["w"], x @ p["v"]), params, [x], gram=True)
    traced = []

    def project(row, structure, i):
        traced.append(1)
        return jnp.round(row)

    rule = jc.projections.RowRule(lambda data, rows, diagonal, start, features: (), project)
    p = jc.prune(0.5)._replace(
        rows=lambda params, *, step=0: [jc.projections.Rows(rule, dict.fromkeys(params, ()), {})]
    )
    jc.compress(p, params, stats=stats)
    first = len(traced)
    assert first > 0
    for damping in (0.01, 0.1):
        jc.compress(p, params, stats=stats, damping=damping)
    assert len(traced) == first
