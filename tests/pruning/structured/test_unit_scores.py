"""Scores of units against loops over units, members and positions in float64."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from jaxcompress.pruning.structured._activations import (
    activation_scores,
    root_mean_square,
    unit_statistics,
)
from jaxcompress.pruning.structured._hessian_diagonal import hessian_diagonal, unit_taylor
from jaxcompress.pruning.structured._normalize import (
    between_extremes,
    by_deviation,
    by_largest,
    by_mean,
    by_total,
)
from jaxcompress.pruning.structured._unit_scores import is_trained, random_units, unit_scores
from tests.conftest import counting_jit, mesh_of
from tests.pruning.structured.unit_cases import (
    CASES,
    attention_case,
    depend,
    flat_case,
    group,
    mlp,
    mlp_case,
    random_tree,
    scan_case,
    scores_by_loops,
    stream_case,
)
from tests.pruning.test_groups import NORMS as WITHOUT_SIGN

pr = jc.pruning
NORMS = {**WITHOUT_SIGN, pr.total: lambda x: x.sum()}


def assert_same(found, want, rtol=2e-6):
    assert set(found) == set(want)
    for name, one in want.items():
        assert found[name].shape == one.shape
        np.testing.assert_allclose(np.asarray(found[name], np.float64), one, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("case", CASES)
def test_scores_are_those_of_loops(case, norm):
    params, deps = CASES[case]()
    found = unit_scores(deps, params, score=params, norm=norm)
    want = scores_by_loops(deps, params, NORMS[norm], lambda p: is_trained(p, jnp.ones(1)))
    assert_same(found, want)


def test_magnitude_is_the_default_and_running_statistics_do_not_count():
    params, deps = flat_case()
    counts = lambda path: path not in ("norm/mean", "norm/var")  # noqa: E731
    assert_same(unit_scores(deps, params), scores_by_loops(deps, params, NORMS[pr.l2], counts))
    linen = {"params": {"scale": jnp.ones(2)}, "batch_stats": {"average": jnp.full(2, 5.0)}}
    units = np.arange(2)
    deps = depend(
        linen, group("s", 2, ("params/scale", 0, units), ("batch_stats/average", 0, units))
    )
    np.testing.assert_array_equal(unit_scores(deps, linen)["s"], [1.0, 1.0])
    found = unit_scores(deps, linen, leaves="**")["s"]
    np.testing.assert_allclose(found, np.sqrt([26.0, 26.0]), rtol=1e-6)


def test_leaves_choose_what_counts():
    params, deps = flat_case()
    found = unit_scores(deps, params, leaves="**/scale")
    np.testing.assert_allclose(found["conv/kernel[3]"], np.abs(params["norm"]["scale"]), rtol=1e-6)
    params, deps = mlp_case()
    assert list(unit_scores(deps, params, leaves="a/*")) == ["a/kernel[1]"]
    with pytest.raises(ValueError, match=r"unit_scores.*match at least one"):
        unit_scores(deps, params, leaves="**/scale")


def test_scores_of_functions_and_trees():
    params, deps = mlp_case()
    grads = random_tree(jax.tree.map(jnp.shape, params), seed=5)
    found = unit_scores(deps, params, score=pr.saliency, grads=grads, norm=pr.l1)
    products = jax.tree.map(lambda w, g: w * g, params, grads)
    assert_same(found, scores_by_loops(deps, products, NORMS[pr.l1]))
    batches = [np.random.default_rng(i).normal(size=(4, 8)).astype(np.float32) for i in range(2)]
    loss = lambda p, x: jnp.mean(mlp(p, x) ** 2)  # noqa: E731
    for make in (pr.taylor, pr.fisher, pr.snip):
        tree = make(loss, params, batches)
        found = unit_scores(deps, params, score=tree, norm=pr.total)
        assert_same(found, scores_by_loops(deps, tree, NORMS[pr.total]))


def test_functions_see_the_leaves_that_count_alone():
    params, deps = mlp_case()
    params["step"] = jnp.arange(3)
    found = unit_scores(deps, params)
    assert_same(found, unit_scores(deps, {k: params[k] for k in "abc"}))


def test_a_norm_of_ones_own_is_taken_of_positions_then_of_all():
    def cubic(scores, axes, sizes):
        del sizes
        return jnp.sum(jnp.abs(scores) ** 3, axes) ** np.float32(1 / 3)

    params, deps = stream_case()
    want = scores_by_loops(deps, params, lambda x: (np.abs(x) ** 3).sum() ** (1 / 3))
    assert_same(unit_scores(deps, params, norm=cubic), want)
    with pytest.raises(ValueError, match="one number each"):
        unit_scores(deps, params, norm=lambda s, axes, sizes: jnp.sum(s))


def test_one_program_for_all_values_vmap_and_gradients():
    _, deps = scan_case()
    score = counting_jit(lambda params: unit_scores(deps, params))
    for seed in range(2):
        other = scan_case(seed)[0]
        assert_same(score(other), scores_by_loops(deps, other, NORMS[pr.l2]))
    assert score.traces == 1
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *[scan_case(i)[0] for i in range(2)])
    found = jax.vmap(lambda p: unit_scores(deps, p))(stacked)
    for i in range(2):
        one = scores_by_loops(deps, scan_case(i)[0], NORMS[pr.l2])
        assert_same({k: v[i] for k, v in found.items()}, one)


@pytest.mark.parametrize("norm", NORMS)
def test_gradients_are_finite_also_where_a_unit_is_zero(norm):
    params, deps = mlp_case()
    params = jax.tree.map(lambda x: x.at[..., 0].set(0.0), params)
    params["b"]["kernel"] = params["b"]["kernel"].at[0].set(0.0)
    total = lambda p: sum(jnp.sum(x) for x in unit_scores(deps, p, norm=norm).values())  # noqa: E731
    for grad in jax.tree.leaves(jax.grad(total)(params)):
        assert np.isfinite(grad).all()
    grad = jax.grad(lambda p: unit_scores(deps, p)["b/kernel[1]"][1])(params)
    rows = np.concatenate([np.ravel(params["b"][k][..., 1]) for k in ("kernel", "bias")])
    norm2 = np.linalg.norm(np.concatenate([rows, np.asarray(params["c"]["kernel"])[1]]))
    np.testing.assert_allclose(
        grad["b"]["kernel"][:, 1], params["b"]["kernel"][:, 1] / norm2, rtol=1e-5
    )
    assert not np.any(grad["b"]["kernel"][:, 2])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_weights_are_summed_in_float32(dtype):
    params, deps = mlp_case()
    narrow = jax.tree.map(lambda x: x.astype(dtype), params)
    found = unit_scores(deps, narrow)
    assert all(x.dtype == jnp.float32 for x in found.values())
    assert_same(found, scores_by_loops(deps, narrow, NORMS[pr.l2]))


def test_squares_of_tiny_and_huge_weights_fit():
    params, deps = mlp_case()
    for scale in (1e-37, 1e-25, 1e25, 1e37):
        other = jax.tree.map(lambda x: x * np.float32(scale), params)  # noqa: B023
        want = scores_by_loops(deps, other, NORMS[pr.l2])
        for run in (unit_scores, lambda d, p: jax.jit(lambda p: unit_scores(d, p))(p)):
            found = {k: np.asarray(v, np.float64) / scale for k, v in run(deps, other).items()}
            assert_same(found, {k: v / scale for k, v in want.items()})
    infinite = jax.tree.map(lambda x: jnp.full_like(x, 3e38), params)
    assert all(np.isinf(x).all() for x in unit_scores(deps, infinite).values())


def test_nan_stays_in_its_unit():
    params, deps = stream_case()
    params["in"] = params["in"].at[1, 2].set(jnp.nan)
    for norm in (pr.l1, pr.l2, pr.mean, pr.total, pr.largest_score):
        found = unit_scores(deps, params, norm=norm)["in[1]"]
        np.testing.assert_array_equal(np.isnan(found), [False, False, True, False])


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_sharded_params_score_the_same(kind):
    params, deps = mlp_case(first=8)
    mesh = mesh_of(kind)
    placed = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P())), params)
    place = NamedSharding(mesh, P(None, "d"))
    placed["a"]["kernel"] = jax.device_put(params["a"]["kernel"], place)
    place = NamedSharding(mesh, P("d", None))
    placed["b"]["kernel"] = jax.device_put(params["b"]["kernel"], place)
    want = unit_scores(deps, params)
    with jax.set_mesh(mesh):
        assert_same(jax.jit(lambda p: unit_scores(deps, p))(placed), want)
        assert_same(
            unit_scores(deps, placed, norm=pr.mean), unit_scores(deps, params, norm=pr.mean)
        )


def test_random_units_depend_on_the_key_and_the_name_alone():
    params, deps = scan_case()
    found = random_units(deps, jax.random.key(1))
    assert {k: v.shape for k, v in found.items()} == {"stack/up[2]": (3, 5), "stack/down[2]": (4,)}
    alone = depend(params, deps.groups[1])
    again = random_units(alone, jax.random.key(1))["stack/down[2]"]
    np.testing.assert_array_equal(again, found["stack/down[2]"])
    assert not np.array_equal(random_units(deps, jax.random.key(2))["stack/down[2]"], again)


def test_errors_name_the_leaf():
    params, deps = mlp_case()
    with pytest.raises(TypeError, match="RunningScore"):
        unit_scores(deps, params, score=pr.movement())
    with pytest.raises(ValueError, match=r"`params` must have a leaf of shape \[6, 3\].*c/kernel"):
        unit_scores(deps, {**params, "c": {"kernel": jnp.ones((6, 4))}})
    with pytest.raises(ValueError, match=r"`params` must have a leaf of shape.*c/kernel"):
        unit_scores(deps, {"a": params["a"], "b": params["b"]})
    with pytest.raises(ValueError, match=r"`score` must have a score.*a/bias"):
        unit_scores(deps, params, score={**params, "a": {"kernel": params["a"]["kernel"]}})
    packed = jc.pack(jc.quantize(bits=8), params)
    with pytest.raises(TypeError, match=r"dense leaves.*a/kernel"):
        unit_scores(deps, packed, leaves="**")
    with pytest.raises(TypeError, match=r"jc\.dependencies"):
        unit_scores(params, params)  # pyright: ignore[reportArgumentType]


def test_hessian_diagonal_is_exact_for_a_diagonal_and_right_in_the_mean():
    loss = lambda p, a: 0.5 * jnp.sum(a * p["w"] ** 2) + p["b"].sum()  # noqa: E731
    params = {"w": jnp.array([1.0, -2.0, 3.0]), "b": jnp.ones(2), "n": jnp.arange(2)}
    batches = [jnp.array([1.0, 2.0, 3.0]), jnp.array([3.0, 0.0, -5.0])]
    found = hessian_diagonal(loss, params, batches, key=jax.random.key(0), samples=1)
    np.testing.assert_allclose(found["w"], 0.5 * np.array([1, 4, 9]) * np.array([2, 1, -1]))
    np.testing.assert_array_equal(found["b"], [0.0, 0.0])
    rng = np.random.default_rng(0)
    h = rng.normal(size=(5, 5)).astype(np.float32)
    h = h + h.T
    w = jnp.asarray(rng.normal(size=5).astype(np.float32))
    quadratic = lambda p, x: 0.5 * p["w"] @ (x @ p["w"])  # noqa: E731
    n = 2000
    found = hessian_diagonal(quadratic, {"w": w}, [h], key=jax.random.key(1), samples=n)["w"]
    # Four standard deviations of the mean; off the diagonal each entry adds 2 H_ij^2 / 2.
    spread = np.sqrt((h**2).sum(1) - np.diag(h) ** 2) / np.sqrt(n)
    error = np.abs(found - 0.5 * w**2 * np.diag(h))
    assert (error < 4 * 0.5 * np.asarray(w) ** 2 * spread).all()
    assert (error > 1e-6).any()


def test_hessian_diagonal_averages_batches_and_draws_anew():
    quadratic = lambda p, x: 0.5 * p["w"] @ (x @ p["w"])  # noqa: E731
    h = jnp.array([[1.0, 5.0], [5.0, 1.0]])
    w = jnp.array([2.0, 2.0])
    one = lambda key, **k: np.asarray(  # noqa: E731
        hessian_diagonal(quadratic, {"w": w}, [h], key=jax.random.key(key), **k)["w"]
    )
    # One sample gives h_00 +- h_01 by the product of two signs, four of them a mean.
    assert {float(one(k, samples=1)[0]) for k in range(8)} == {-8.0, 12.0}
    assert np.isin(one(0, samples=4), [-8.0, -3.0, 2.0, 7.0, 12.0]).all()
    both = hessian_diagonal(quadratic, {"w": w}, [h] * 64, key=jax.random.key(0), samples=1)["w"]
    assert (np.abs(both) < 8).all()
    with pytest.raises(ValueError, match="at least 1"):
        one(0, samples=0)
    with pytest.raises(TypeError, match="one key"):
        hessian_diagonal(quadratic, {"w": w}, [h], key=3)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("leaves", [is_trained, "**/kernel"])
def test_unit_taylor_squares_the_sum_over_a_unit(leaves):
    params, deps = mlp_case()
    batches = [np.random.default_rng(i).normal(size=(4, 8)).astype(np.float32) for i in range(3)]
    loss = lambda p, x: jnp.mean(mlp(p, x) ** 2)  # noqa: E731
    found = unit_taylor(deps, loss, params, batches, leaves=leaves)
    counts = (lambda p: True) if leaves is is_trained else (lambda p: p.endswith("kernel"))
    sums = [
        scores_by_loops(
            deps,
            jax.tree.map(lambda w, g: w * g, params, jax.grad(loss)(params, x)),
            np.sum,
            counts,
        )
        for x in batches
    ]
    want = {name: np.mean([s[name] ** 2 for s in sums], axis=0) for name in sums[0]}
    assert_same(found, want, rtol=1e-4)


def hidden(params, x):
    a = jax.nn.relu(x @ params["a"]["kernel"] + params["a"]["bias"][None])
    return a, jax.nn.relu(a @ params["b"]["kernel"] + params["b"]["bias"][None])


@pytest.mark.parametrize(
    "measure", [np.abs, lambda x: (x != 0).astype(np.float64), np.square], ids=["abs", "apoz", "sq"]
)
def test_activation_scores_are_means_over_all_examples(measure):
    params, deps = mlp_case()
    batches = [
        np.random.default_rng(i).normal(size=(n, 8)).astype(np.float32)
        for i, n in enumerate((3, 5))
    ]
    of = {np.abs: jnp.abs, np.square: jnp.square}.get(measure, lambda x: x != 0)
    found = activation_scores(deps, mlp, params, batches, measure=of)
    one, two = hidden(params, np.concatenate(batches))
    want = {
        "a/kernel[1]": measure(np.asarray(one, np.float64)).mean(0),
        "b/kernel[1]": measure(np.asarray(two, np.float64)).mean(0),
    }
    assert_same(found, want, rtol=1e-5)


def test_statistics_of_flattened_channels_convolutions_and_layers():
    params, deps = flat_case()
    params["next"] = random_tree((3, 3, 3, 2), seed=9)

    def fn(params, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(
            x, params["conv"]["kernel"], (1, 1), "SAME", dimension_numbers=numbers
        )
        aside = jax.lax.conv_general_dilated(
            x, params["next"], (1, 1), "SAME", dimension_numbers=numbers
        )
        return x.reshape(x.shape[0], -1) @ params["head"]["kernel"], aside

    x = np.random.default_rng(0).normal(size=(5, 2, 2, 1)).astype(np.float32)
    y = jax.lax.conv_general_dilated(
        x, params["conv"]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    want = np.abs(np.asarray(y, np.float64)).mean((0, 1, 2))
    only = group("conv/kernel[3]", 3, *[tuple(m) for m in deps.groups[0].members])
    found = activation_scores(depend(params, only), fn, params, [x])
    np.testing.assert_allclose(found["conv/kernel[3]"], want, rtol=1e-5)
    reader = group("conv/kernel[3]", 3, ("conv/kernel", 3, np.arange(3)), ("next", 2, np.arange(3)))
    found = activation_scores(depend(params, reader), fn, params, [x])
    np.testing.assert_allclose(found["conv/kernel[3]"], want, rtol=1e-5)

    params, deps = scan_case()

    def stack(params, x):
        def layer(x, w):
            h = jnp.tanh(x @ w["up"])
            return x + h @ w["down"], h

        x, h = jax.lax.scan(layer, x, params["stack"])
        return x @ params["head"], h

    x = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    _, h = stack(params, x)
    found = activation_scores(deps, stack, params, [x])
    want = np.abs(np.asarray(h, np.float64)).mean(1)
    np.testing.assert_allclose(found["stack/up[2]"], want, rtol=1e-5)
    # The stream is read by the stack, which has layers that it has not, and by the head.
    y = jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w["up"]) @ w["down"], None), x, params["stack"])
    want = np.abs(np.asarray(y[0], np.float64)).mean(0)
    np.testing.assert_allclose(found["stack/down[2]"], want, rtol=1e-5)


def test_statistics_of_attention_average_over_the_features_of_a_head():
    params, deps = attention_case(heads=4, features=3)
    fn = lambda p, x: (x @ p["v"]) @ p["o"]  # noqa: E731
    x = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    stats = jc.calibrate(fn, params, [x], moments=True)
    found = unit_statistics(deps, stats)
    rms = np.sqrt((np.asarray(x @ params["v"], np.float64) ** 2).mean(0))
    np.testing.assert_allclose(found["q[1]/blocks"], rms.reshape(4, 3).mean(1), rtol=1e-5)
    np.testing.assert_allclose(found["v[1]/strides"], rms.reshape(4, 3).mean(0), rtol=1e-5)
    assert "q[1]/strides" not in found
    signed = unit_statistics(deps, stats, read=lambda s: s.moments.mean)["q[1]/blocks"]
    want = np.asarray(x @ params["v"], np.float64).mean(0).reshape(4, 3).mean(1)
    np.testing.assert_allclose(signed, want, rtol=1e-4, atol=1e-6)
    plain = jc.calibrate(fn, params, [x])
    with pytest.raises(ValueError, match="moments=True"):
        unit_statistics(deps, plain)
    with pytest.raises(ValueError, match="one number for each feature"):
        unit_statistics(deps, plain, read=lambda s: s.low)
    with pytest.raises(ValueError, match="sums over units"):
        unit_statistics(deps, {})
    with pytest.raises(TypeError, match=r"jc\.calibrate"):
        unit_statistics(deps, {"o": 1.0})  # pyright: ignore[reportArgumentType]
    assert root_mean_square(stats["o"]).shape == (12,)


def test_statistics_over_several_axes_average_over_the_others():
    params = random_tree({"v": (5, 4, 3), "o": (4, 3, 5)})
    heads = group("v[1]", 4, ("v", 1, np.arange(4)), ("o", 0, np.arange(4)))
    fn = lambda p, x: jnp.einsum("thd,hde->te", jnp.einsum("te,ehd->thd", x, p["v"]), p["o"])  # noqa: E731
    x = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    found = activation_scores(depend(params, heads), fn, params, [x])["v[1]"]
    y = np.einsum("te,ehd->thd", x, np.asarray(params["v"]))
    np.testing.assert_allclose(found, np.abs(y).mean((0, 2)), rtol=1e-5)


NORMALIZATIONS = {
    by_mean: lambda x: x / x.mean(-1, keepdims=True),
    by_largest: lambda x: x / x.max(-1, keepdims=True),
    by_total: lambda x: x / x.sum(-1, keepdims=True),
    between_extremes: lambda x: (x - x.min(-1, keepdims=True)) / np.ptp(x, -1, keepdims=True),
    by_deviation: lambda x: (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True),
}


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_normalizations(normalize):
    x = np.random.default_rng(0).random((2, 7)).astype(np.float32)
    want = NORMALIZATIONS[normalize](x.astype(np.float64))
    np.testing.assert_allclose(jax.jit(normalize)(x), want, rtol=1e-5, atol=1e-6)
    flat = jnp.zeros(4)
    assert not np.any(normalize(flat))
    assert np.isfinite(jax.grad(lambda x: normalize(x)[0])(flat)).all()
    assert normalize(jnp.zeros(0)).shape == (0,) if normalize is not by_mean else True
    assert normalize(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_group_magnitude_agrees_with_torch_pruning():
    """`GroupMagnitudeImportance(p=2, bias=False, normalizer=None)`: the mean over the members of
    sums of squares, where `unit_scores` takes the root of the sum of all."""
    torch = pytest.importorskip("torch")
    tp = pytest.importorskip("torch_pruning")
    params, deps = mlp_case()
    layers = [torch.nn.Linear(8, 10), torch.nn.Linear(10, 6), torch.nn.Linear(6, 3, bias=False)]
    for layer, name in zip(layers, "abc", strict=True):
        layer.weight.data = torch.tensor(np.asarray(params[name]["kernel"]).T.copy())
        if "bias" in params[name]:
            layer.bias.data = torch.tensor(np.asarray(params[name]["bias"]))
    relu = torch.nn.ReLU
    model = torch.nn.Sequential(layers[0], relu(), layers[1], relu(), layers[2])
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=torch.randn(1, 8))
    found = unit_scores(deps, params, leaves="**/kernel")
    for layer, name in zip(layers[:2], found, strict=True):
        units = list(range(layer.out_features))
        group = graph.get_pruning_group(layer, tp.prune_linear_out_channels, idxs=units)
        for normalizer, ours in ((None, lambda x: x), ("mean", lambda x: x / x.mean())):
            importance = tp.importance.GroupMagnitudeImportance(p=2, normalizer=normalizer)
            want = importance(group).numpy()
            squares = np.asarray(found[name], np.float64) ** 2 / 2
            np.testing.assert_allclose(ours(squares), want, rtol=1e-5)
    assert "torch_pruning" in sys.modules
