"""Keeping the k largest, against a stable sort in NumPy float64."""

import math
import re
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from jaxcompress.pruning import _threshold
from jaxcompress.pruning._select import _clipped, largest, largest_of_tree

NARROW = [jnp.float32, jnp.bfloat16, jnp.float16]
TINY = 1e-45  # the smallest float32, a subnormal
VALUES = [0.0, -0.0, 1.0, -1.0, 1.5, -2.0, 3e4, np.inf, -np.inf, np.nan, -np.nan]
SUBNORMALS = {
    jnp.float32: [TINY, -TINY, 2 * TINY, 1e-40, 1.1754944e-38],
    jnp.bfloat16: [1e-40, -1e-40, 2e-40],
    jnp.float16: [6e-8, -6e-8, 1.2e-7],
}
SHAPES = [(), (1,), (0,), (7,), (3, 5), (4, 0, 2), (2, 3, 4), (130,)]


def oracle(scores, k):
    """The first k of a stable sort, NaN last; `scores` in a dtype that NumPy reads exactly."""
    with np.errstate(invalid="ignore"):  # a signalling NaN warns
        flat = np.asarray(scores).astype(np.float64).ravel()
    number = ~np.isnan(flat)
    rank = np.lexsort((np.arange(flat.size), np.where(number, -flat, 0.0), ~number))
    mask = np.zeros(flat.size, bool)
    mask[rank[: min(max(int(k), 0), flat.size)]] = True
    return mask.reshape(np.shape(scores))


def drawn(rng, shape, dtype):
    """Many ties and every special value of `dtype`."""
    values = np.array(VALUES + SUBNORMALS[dtype], np.float64).astype(dtype)
    return rng.choice(values, size=shape)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_k_equals_a_stable_sort(shape, dtype):
    scores = np.asarray(drawn(np.random.default_rng(0), shape, dtype))
    for k in sorted({0, 1, 2, scores.size // 2, scores.size - 1, scores.size, scores.size + 3}):
        mask = largest(jnp.asarray(scores), k)
        assert mask.dtype == bool
        assert mask.shape == shape
        np.testing.assert_array_equal(mask, oracle(scores, k))


@given(
    shape=st.sampled_from([(9,), (3, 5), (70,)]),
    dtype=st.sampled_from(NARROW),
    seed=st.integers(0, 2**32 - 1),
    k=st.integers(-2, 80),
    spread=st.sampled_from(["special", "equal", "bits"]),
)
@settings(derandomize=True, deadline=None, max_examples=60)
def test_any_scores(shape, dtype, seed, k, spread):
    rng = np.random.default_rng(seed)
    scores = drawn(rng, shape, dtype)
    if spread == "equal":
        scores = np.broadcast_to(scores.ravel()[0], shape)
    if spread == "bits":
        width = 8 * jnp.dtype(dtype).itemsize
        scores = rng.integers(0, 2**width, shape, dtype=f"uint{width}").view(jnp.dtype(dtype))
    np.testing.assert_array_equal(largest(jnp.asarray(scores), k), oracle(scores, k))


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_random_normal_scores(scale):
    scores = (scale * np.random.default_rng(1).standard_normal((63, 129))).astype(np.float32)
    for k in [1, 800, 4000, 63 * 129 - 1]:
        np.testing.assert_array_equal(largest(jnp.asarray(scores), k), oracle(scores, k))


@pytest.mark.parametrize("value", [0.0, -0.0, -3.0, TINY, np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("dtype", NARROW)
def test_equal_scores_keep_the_first(value, dtype):
    mask = largest(jnp.full((5, 7), value, dtype), 17)
    np.testing.assert_array_equal(mask, np.arange(35).reshape(5, 7) < 17)


def test_both_zeros_tie():
    np.testing.assert_array_equal(largest(jnp.array([-0.0, 0.0, -0.0, -1.0]), 1), [1, 0, 0, 0])


def test_nan_of_either_sign_is_below_minus_infinity():
    scores = jnp.array([jnp.nan, -jnp.nan, -jnp.inf, jnp.nan])
    np.testing.assert_array_equal(largest(scores, 1), [0, 0, 1, 0])
    np.testing.assert_array_equal(largest(scores, 3), [1, 1, 1, 0])


@pytest.mark.parametrize("dtype", NARROW)
def test_subnormals_are_told_apart(dtype):
    smallest = np.array([1], f"uint{8 * jnp.dtype(dtype).itemsize}").view(jnp.dtype(dtype))[0]
    scores = np.array([0, smallest, -smallest, 3 * smallest], dtype)
    np.testing.assert_array_equal(largest(jnp.asarray(scores), 1), [0, 0, 0, 1])
    np.testing.assert_array_equal(largest(jnp.asarray(scores), 2), [0, 1, 0, 1])
    np.testing.assert_array_equal(largest(jnp.asarray(scores), 3), [1, 1, 0, 1])


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
def test_eight_bit_floats(dtype):
    scores = np.arange(256, dtype=np.uint8).view(jnp.dtype(dtype))
    for k in [1, 100, 200, 250]:
        np.testing.assert_array_equal(largest(jnp.asarray(scores), k), oracle(scores, k))


def test_float64():
    with jax.enable_x64(True):
        scores = np.random.default_rng(2).standard_normal(300)
        scores[:40] = np.round(scores[:40], 1)
        scores[40:43] = 5e-324, -np.nan, np.inf
        scores[43:46] = 1 + 2.0**-52, 1.0, 1 - 2.0**-53
        for k in [0, 1, 30, 150, 299, np.int64(150), 150.5]:
            np.testing.assert_array_equal(largest(jnp.asarray(scores), k), oracle(scores, k))


@pytest.mark.parametrize(
    "k",
    [3.99, np.float32(3.5), np.int8(3), np.uint8(3), np.uint32(3), jnp.bfloat16(3), jnp.int16(3)],
)
def test_dtypes_of_k(k):
    scores = jnp.array([1.0, 5.0, 4.0, 3.0, 2.0])
    np.testing.assert_array_equal(largest(scores, k), [0, 1, 1, 1, 0])
    np.testing.assert_array_equal(jax.jit(largest)(scores, k), [0, 1, 1, 1, 0])


@pytest.mark.parametrize("total", [5, 300, 2**24 + 3, 2**31 + 1, 2**32 - 1])
@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.uint32, np.float32, jnp.bfloat16])
def test_k_is_floored_and_clipped_exactly(total, dtype):
    integral = not jnp.issubdtype(dtype, jnp.floating)
    info = jnp.iinfo(dtype) if integral else jnp.finfo(dtype)
    tries = [info.min, 0, 1, 100, info.max]
    tries += [float(total), 2.0**24, 3e9, np.inf, 0.7, -0.5] if not integral else []
    for k in tries:
        value = np.array(k).astype(dtype)
        expected = min(max(np.floor(value.astype(np.float64)), 0), total)
        assert int(jax.jit(lambda k: _clipped("f", k, total))(value)) == expected
        assert int(_clipped("f", value, total)) == expected
    if not integral:
        assert int(jax.jit(lambda k: _clipped("f", k, total))(dtype(np.nan))) == 0


@pytest.mark.parametrize("size", [1, 2, 8, 9, 1000, 2**16, 0xFF000002, 2**32 - 1])
def test_passes_are_bounded(size):
    """All entries on one place, or on every place: the last that k of them reach."""
    most = math.ceil(math.log2(size) / 3)
    with jax.disable_jit():
        for place in sorted({0, size // 3, size - 1}):
            passes = []

            def reach(places, place=place, passes=passes):
                passes.append(places)
                return jnp.where(places <= np.uint32(place), np.uint32(9), np.uint32(0))

            found = _threshold.search(reach, size, np.uint32(9), jnp.uint32(4), np.dtype(np.uint32))
            assert (found.low, found.high) == (place, place + 1)
            assert (found.reach_low, found.reach_high) == (9, 0)
            assert len(passes) <= most

            passes.clear()
            for k in (0, 9):
                _threshold.search(reach, size, np.uint32(9), jnp.uint32(k), np.dtype(np.uint32))
            assert not passes

        found = _threshold.search(
            lambda places: np.uint32(size) - places,
            size,
            np.uint32(size),
            jnp.uint32(1 + size // 5),
            np.dtype(np.uint32),
        )
        assert found.low == size - 1 - size // 5
        assert found.reach_low == 1 + size // 5


def test_no_recompilation_for_another_k():
    traces = []

    @jax.jit
    def f(scores, k):
        traces.append(k)
        return largest(scores, k)

    scores = np.random.default_rng(3).standard_normal((6, 7)).astype(np.float32)
    for k in [0, 5, 41, 50, -1]:
        np.testing.assert_array_equal(f(scores, k), oracle(scores, k))
    assert len(traces) == 1


@pytest.mark.parametrize("axes", [(None, 0), (0, None), (0, 0)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_vmap_equals_the_loop(axes, dtype):
    rng = np.random.default_rng(4)
    scores = drawn(rng, (6, 5, 4), dtype)
    scores[0], scores[1] = 1.0, rng.standard_normal((5, 4))
    k = np.array([0, 3, 7, 20, 19, 11])
    scores = scores if axes[0] == 0 else scores[1]
    k = k if axes[1] == 0 else 7
    masks = jax.jit(jax.vmap(largest, axes))(jnp.asarray(scores), k)
    for i in range(6):
        one = scores[i] if axes[0] == 0 else scores
        np.testing.assert_array_equal(masks[i], oracle(one, np.broadcast_to(k, 6)[i]))


def test_vmap_of_a_tree_and_nested():
    rng = np.random.default_rng(5)
    a, b = drawn(rng, (3, 4), jnp.float32), drawn(rng, (3, 2, 3), jnp.float32)
    ks = np.arange(11)
    over_k = jax.vmap(largest_of_tree, (None, 0))
    masks = jax.vmap(over_k, (0, None))((jnp.asarray(a), jnp.asarray(b)), ks)
    for i in range(3):
        for j, k in enumerate(ks):
            both = oracle(np.concatenate([a[i], b[i].ravel()]), k)
            np.testing.assert_array_equal(masks[0][i, j], both[:4])
            np.testing.assert_array_equal(masks[1][i, j].ravel(), both[4:])


@pytest.mark.parametrize(
    "dtypes",
    [
        [jnp.float32] * 4,
        [jnp.bfloat16] * 4,
        [jnp.float16] * 4,
        [jnp.float32, jnp.bfloat16, jnp.float16, jnp.bfloat16],
        [jnp.bfloat16, jnp.float16, jnp.float16, jnp.float16],
    ],
)
def test_a_tree_is_its_leaves_end_to_end(dtypes):
    rng = np.random.default_rng(6)
    shapes = [(), (3, 4), (0, 2), (25,)]
    leaves = [np.asarray(drawn(rng, s, d)) for s, d in zip(shapes, dtypes, strict=True)]
    tree = {"a": leaves[0], "b": [leaves[1], None, leaves[2]], "c": leaves[3]}
    flat = np.concatenate([x.astype(np.float64).ravel() for x in leaves])
    for k in range(-1, flat.size + 2, 3):
        masks = largest_of_tree(jax.tree.map(jnp.asarray, tree), k)
        assert jax.tree.structure(masks) == jax.tree.structure(tree)
        assert [m.shape for m in jax.tree.leaves(masks)] == shapes
        out = np.concatenate([np.ravel(m) for m in jax.tree.leaves(masks)])
        np.testing.assert_array_equal(out, oracle(flat, k))


def test_trees_without_entries():
    assert largest_of_tree({}, 3) == {}
    assert largest_of_tree({"a": jnp.zeros((0, 3))}, 3)["a"].shape == (0, 3)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [P("x", None), P(None, "y"), P("x", "y"), P(("x", "y"), None)])
def test_sharded_scores_are_not_gathered(kind, spec):
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(kind,) * 2, devices=jax.devices()[:4])
    rng = np.random.default_rng(7)
    host = {"a": np.round(rng.standard_normal((32, 64)), 1).astype(np.float32)}
    host["b"] = rng.standard_normal((8, 16)).astype(np.float32)
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, spec)
        scores = jax.device_put(host, sharding)
        f = jax.jit(lambda s, k: largest_of_tree(jax.tree.map(jnp.abs, s), k))
        compiled = f.lower(scores, jnp.uint32(700)).compile()
        masks = compiled(scores, jnp.uint32(700))
        eager = largest(scores["a"], 300)
    both = oracle(np.abs(np.concatenate([host["a"].ravel(), host["b"].ravel()])), 700)
    np.testing.assert_array_equal(np.ravel(masks["a"]), both[: 32 * 64])
    np.testing.assert_array_equal(np.ravel(masks["b"]), both[32 * 64 :])
    np.testing.assert_array_equal(eager, oracle(host["a"], 300))
    assert all(m.sharding.is_equivalent_to(sharding, 2) for m in masks.values())
    sizes = collective_sizes(compiled.as_text())
    assert sizes, "the devices have to agree"
    assert max(sizes) <= 16


@pytest.mark.parametrize("scope", ["global", "leaf"])
@pytest.mark.parametrize("adapter", [jc.projected, jc.straight_through])
def test_eight_devices_exchange_scalars_alone(adapter, scope):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    put = lambda seed, spec: jax.device_put(  # noqa: E731
        jax.random.normal(jax.random.key(seed), (64, 32)), NamedSharding(mesh, spec)
    )
    params = {"a": put(0, P("x", None)), "b": put(1, P(None, "x"))}
    opt = adapter(optax.sgd(0.1), jc.every(10, jc.prune(0.9, scope=scope)))
    state = jax.jit(opt.init)(params)
    text = jax.jit(opt.update).lower(params, state, params).compile().as_text()
    moves = [x for x in text.splitlines() if re.search(r" (all-|collective-|reduce-sc)[\w-]*\(", x)]
    assert moves
    for line in moves:
        assert " all-reduce" in line, line
        shapes = re.findall(r"[a-z]\w*\[([\d,]*)\]", line.split(" all-reduce")[0])
        assert set(shapes) == {""}, line


def test_a_mesh_that_is_not_the_current_one():
    """`jax.make_mesh` is Explicit by default, and `jax.set_mesh` is not always called."""
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:4])
    w = jax.random.normal(jax.random.key(0), (32, 16))
    sharding = NamedSharding(mesh, P("x", None))
    params = {"w": jax.device_put(w, sharding)}
    for p in (jc.prune(0.5, groups=jc.pruning.slices(-1)), jc.prune(nm=(2, 4))):
        opt = jc.projected(optax.sgd(0.1), jc.every(2, p))
        init, update = jax.jit(opt.init), jax.jit(opt.update)
        updates, state = update(params, init(params), params)
        want, _ = update({"w": w}, init({"w": w}), {"w": w})
        # A landing is exact within one rounding of the weights, which are below 4.
        np.testing.assert_allclose(updates["w"], want["w"], rtol=1e-6, atol=2.4e-7)
        assert updates["w"].sharding.is_equivalent_to(sharding, 2)
        assert state.structure.inner["w"].keep.shape == (32, 16)


def collective_sizes(text):
    """Entries in the largest operand or result of each collective of an HLO text."""
    out = []
    names = "all-gather|all-reduce|all-to-all|collective-permute|collective-broadcast"
    for line in text.splitlines():
        if re.search(rf" ({names})(-start)?\(", line):
            shapes = re.findall(r"[a-z]\w*\[([\d,]*)\]", line.split("metadata")[0])
            out.append(max(int(np.prod([int(d) for d in s.split(",") if d])) for s in shapes))
    return out


def test_a_gather_would_be_seen():
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    x = jax.device_put(jnp.ones((32, 64)), NamedSharding(mesh, P("x", None)))
    replicated = jax.jit(lambda x: x + 1, out_shardings=NamedSharding(mesh, P()))
    assert max(collective_sizes(replicated.lower(x).compile().as_text())) == 32 * 64


def test_memory_is_one_integer_an_entry():
    for dtype in (jnp.float32, jnp.bfloat16):
        x = jax.ShapeDtypeStruct((256, 512), dtype)
        compiled = jax.jit(largest).lower(x, jax.ShapeDtypeStruct((), jnp.uint32)).compile()
        memory = compiled.memory_analysis()
        assert memory is not None
        assert memory.temp_size_in_bytes < 1.1 * x.size * x.dtype.itemsize


@pytest.mark.parametrize("platform", ["tpu", "cuda", "cpu"])
def test_lowers_for_every_platform(platform):
    tree = [jax.ShapeDtypeStruct((64, 8), jnp.float32), jax.ShapeDtypeStruct((9,), jnp.bfloat16)]
    exported = jax.export.export(jax.jit(largest_of_tree), platforms=[platform])
    assert exported(tree, jax.ShapeDtypeStruct((), jnp.int32)).out_avals[0].shape == (64, 8)


def test_gradients_flow_past_the_mask():
    w = jnp.array([3.0, -5.0, 1.0, 0.5])
    grad = jax.grad(lambda w, k: jnp.sum(jnp.where(largest(jnp.abs(w), k), w, 0.0)))(w, 2.0)
    np.testing.assert_array_equal(grad, [1, 1, 0, 0])


def test_too_many_entries_are_refused_while_tracing():
    shape = jax.ShapeDtypeStruct
    fits = shape((2**16, 2**16 - 1), jnp.float32)
    assert jax.eval_shape(largest, fits, 3).shape == fits.shape
    with pytest.raises(ValueError, match=r"largest: `scores` must have at most 2\*\*32 - 1"):
        jax.eval_shape(largest, shape((2**16, 2**16), jnp.float32), 3)
    with pytest.raises(ValueError, match="largest_of_tree: `scores`"):
        jax.eval_shape(largest_of_tree, [shape((2**31,), jnp.float16)] * 2, 3)


def test_errors():
    with pytest.raises(TypeError, match=r"largest: `scores` must .* int32\[3\]"):
        largest(jnp.arange(3), 1)
    with pytest.raises(TypeError, match=r"largest_of_tree: .* at 'b/1'"):
        largest_of_tree({"a": jnp.ones(3), "b": [jnp.ones(2), jnp.ones(2, bool)]}, 1)
    wrong: list[Any] = [None, "3", True, jnp.bool_(True), 1j, jnp.complex64(1j), lambda step: step]
    for k in wrong:
        with pytest.raises(TypeError, match="largest: `k`"):
            largest(jnp.ones(3), k)
    for k in (jnp.ones(2), np.ones((1,)), float("nan")):
        with pytest.raises(ValueError, match="largest: `k`"):
            largest(jnp.ones(3), k)


def test_numpy_scores_are_taken():
    scores = np.array([1, 3, 2], ml_dtypes.bfloat16)
    np.testing.assert_array_equal(largest(scores, 2), [0, 1, 1])
