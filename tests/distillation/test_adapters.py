"""Adapters of shapes: their values by NumPy's loops and PyTorch, their gradients, their errors."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from jaxcompress.distillation import (
    Adapter,
    adapt,
    average_pool_adapter,
    capture_pairs,
    chain_adapters,
    convolution_adapter,
    global_pool_adapter,
    identity_adapter,
    l2_norm_adapter,
    layer_norm_adapter,
    linear_adapter,
    per_layer_adapter,
    resize_adapter,
)
from tests.conftest import counting_jit, lenient, mesh_of

KEY = jax.random.key(0)


def draw(*shape, seed=0, dtype=np.float64):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(dtype)


def struct(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def linear(x, params):
    out = np.zeros((*x.shape[:-1], params["kernel"].shape[1]))
    for at in np.ndindex(out.shape):
        out[at] = sum(x[at[:-1]] * params["kernel"][:, at[-1]])
        out[at] += params["bias"][at[-1]] if "bias" in params else 0
    return out


def convolution(x, params):
    """Of feature maps [batch, rows, columns, channels], as Romero et al. size the kernel."""
    kernel = params["kernel"]
    height, width, _, channels = kernel.shape
    rows, columns = x.shape[1] - height + 1, x.shape[2] - width + 1
    out = np.zeros((x.shape[0], rows, columns, channels))
    for b, i, j, c in np.ndindex(out.shape):
        window = x[b, i : i + height, j : j + width]
        out[b, i, j, c] = np.sum(window * kernel[..., c]) + params["bias"][c]
    return out


def pool(x, axis, bins):
    n, out = x.shape[axis], []
    for i in range(bins):
        first, end = math.floor(i * n / bins), math.ceil((i + 1) * n / bins)
        out.append(np.mean([np.take(x, j, axis) for j in range(first, end)], 0))
    return np.stack(out, axis)


def resize(x, axis, size, antialias):
    """Each new position takes from the old ones by a triangle around it."""
    n, out = x.shape[axis], []
    widening = max(n / size, 1.0) if antialias else 1.0
    for i in range(size):
        centre = (i + 0.5) * n / size - 0.5
        centre = centre if antialias else min(max(centre, 0), n - 1)
        weights = [max(0.0, 1 - abs(j - centre) / widening) for j in range(n)]
        taken = [w * np.take(x, j, axis) for j, w in enumerate(weights)]
        out.append(sum(taken) / sum(weights))
    return np.stack(out, axis)


MAPS = draw(2, 5, 7, 3)
TOKENS = draw(2, 6, 3)
ROWS = draw(2, 3)

# A name, the adapter, the student's feature, the teacher's shape, the oracle.
TABLE = {
    "linear": (linear_adapter(), MAPS, (2, 5, 7, 4), linear),
    "linear without bias": (linear_adapter(bias=False), TOKENS, (2, 6, 4), linear),
    "linear of a row": (linear_adapter(), ROWS[0], (4,), linear),
    "convolution": (convolution_adapter(), MAPS, (2, 3, 7, 4), convolution),
    "pool": (
        average_pool_adapter(),
        MAPS,
        (2, 3, 4, 3),
        lambda x, _: pool(pool(x, 1, 3), 2, 4),
    ),
    "pool that divides": (
        average_pool_adapter((1,)),
        TOKENS,
        (2, 3, 3),
        lambda x, _: pool(x, 1, 3),
    ),
    "global pool": (global_pool_adapter(), MAPS, (2, 3), lambda x, _: x.mean((1, 2))),
    "global pool of tokens": (global_pool_adapter((-2,)), TOKENS, (2, 3), lambda x, _: x.mean(1)),
    "more tokens": (resize_adapter(), TOKENS, (2, 9, 3), lambda x, _: resize(x, 1, 9, True)),
    "fewer tokens": (resize_adapter(), TOKENS, (2, 4, 3), lambda x, _: resize(x, 1, 4, True)),
    "fewer tokens, aliased": (
        resize_adapter(antialias=False),
        TOKENS,
        (2, 4, 3),
        lambda x, _: resize(x, 1, 4, False),
    ),
    "bilinear": (
        resize_adapter((-3, -2)),
        MAPS,
        (2, 8, 4, 3),
        lambda x, _: resize(resize(x, 1, 8, True), 2, 4, True),
    ),
    "layer norm": (
        layer_norm_adapter(1e-3),
        MAPS,
        MAPS.shape,
        lambda x, _: (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-3),
    ),
    "l2 norm": (
        l2_norm_adapter(),
        MAPS,
        MAPS.shape,
        lambda x, _: x / np.sqrt((x**2).sum(-1, keepdims=True)),
    ),
    "l2 norm of the whole": (
        l2_norm_adapter((1, 2)),
        TOKENS,
        TOKENS.shape,
        lambda x, _: np.stack([row / np.sqrt((row**2).sum()) for row in x]),
    ),
    "identity": (identity_adapter(), TOKENS, TOKENS.shape, lambda x, _: x),
    "chain": (
        chain_adapters(resize_adapter(), linear_adapter(), l2_norm_adapter()),
        TOKENS,
        (2, 9, 4),
        lambda x, params: TABLE["l2 norm"][3](linear(resize(x, 1, 9, True), params[1]), {}),
    ),
    "per layer": (
        per_layer_adapter(linear_adapter()),
        MAPS,
        (2, 5, 7, 4),
        lambda x, params: np.stack(
            [linear(x[i], {k: v[i] for k, v in params.items()}) for i in range(2)]
        ),
    ),
}


def drawn(adapter, seed=1):
    """Params for an adapter, with no zeros among them."""
    shapes = jax.eval_shape(adapter.init, KEY)
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(shapes))
    return jax.tree.map(lambda p: draw(*p.shape, seed=seed, dtype=np.float32), shapes)


def fitted(name, dtype):
    """The adapter, params of it, and the feature."""
    fit, x, shape, oracle = TABLE[name]
    adapter = fit(struct(*x.shape, dtype=dtype), struct(*shape, dtype=dtype))
    return adapter, drawn(adapter), jnp.asarray(x, dtype), oracle


def double(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


@pytest.mark.parametrize("name", TABLE)
def test_against_the_definition_and_differences(name):
    with jax.enable_x64(True):
        adapter, params, x, oracle = fitted(name, jnp.float64)
        at, towards = (double(params), x), (double(drawn(adapter, seed=2)), draw(*x.shape, seed=3))
        weights = jnp.asarray(draw(*TABLE[name][2], seed=4))

        @jax.jit
        def run(params, at, towards):
            def moved(step):
                return adapter.apply(*jax.tree.map(lambda a, d: a + step * d, at, towards))

            _, forward = jax.jvp(adapter.apply, at, towards)
            backward = jax.vjp(adapter.apply, *at)[1](weights)
            products = jax.tree.map(lambda g, d: jnp.sum(g * d), backward, towards)
            difference = (moved(1e-5) - moved(-1e-5)) / 2e-5
            return adapter.apply(params, x), forward, sum(jax.tree.leaves(products)), difference

        got, forward, backward, difference = run(params, at, towards)
        assert got.dtype == jnp.float64
        assert got.shape == TABLE[name][2]
        np.testing.assert_allclose(got, oracle(np.asarray(x), at[0]), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(forward, difference, rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(backward, np.sum(weights * difference), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", TABLE)
def test_low_precision_is_computed_and_returned_in_float32(name):
    adapter, params, _, oracle = fitted(name, jnp.float32)
    xs = [jnp.asarray(TABLE[name][1], dtype) for dtype in (jnp.bfloat16, jnp.float16)]

    @jax.jit
    def run(params, xs):
        grad = jax.grad(lambda x: jnp.sum(jnp.square(adapter.apply(params, x))))
        return [(adapter.apply(params, x), grad(x)) for x in xs]

    for x, (got, grads) in zip(xs, run(params, xs), strict=True):
        assert (got.dtype, grads.dtype) == (jnp.float32, x.dtype)
        np.testing.assert_allclose(got, oracle(double(x), double(params)), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", [n for n in TABLE if n not in ("linear of a row", "per layer")])
def test_other_batches_empty_ones_and_vmap(name):
    adapter, params, x, _ = fitted(name, jnp.float32)

    @jax.jit
    def run(params, x):
        many = jax.vmap(adapter.apply, (None, 0))(params, jnp.stack([x, 2 * x]))
        one_by_one = jnp.stack([adapter.apply(params, x), adapter.apply(params, 2 * x)])
        twice = adapter.apply(params, jnp.concatenate([x, 2 * x]))
        return one_by_one, many, twice, adapter.apply(params, x[:0])

    want, many, twice, none = run(params, x)
    np.testing.assert_allclose(many, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(twice, np.concatenate(want), rtol=1e-5, atol=1e-6)
    assert none.shape == (0, *TABLE[name][2][1:])


def test_against_torch():
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    with jax.enable_x64(True):
        maps = torch.from_numpy(MAPS).permute(0, 3, 1, 2)

        def same(fit, size, want):
            teacher = struct(2, *size, 3)
            got = fit(struct(*MAPS.shape), teacher).apply({}, jnp.asarray(MAPS))
            want = want.permute(0, 2, 3, 1).numpy()
            np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)

        for size in [(3, 4), (5, 1), (4, 6)]:
            same(average_pool_adapter(), size, functional.adaptive_avg_pool2d(maps, size))
        for size in [(8, 9), (3, 4)]:
            for antialias in (False, True):
                want = functional.interpolate(
                    maps, size, mode="bilinear", align_corners=False, antialias=antialias
                )
                same(resize_adapter((-3, -2), antialias=antialias), size, want)
        same(l2_norm_adapter(), (5, 7), functional.normalize(maps, dim=1))
        want = functional.layer_norm(torch.from_numpy(MAPS), (3,), eps=1e-5)
        same(layer_norm_adapter(), (5, 7), want.permute(0, 3, 1, 2))


def test_initial_params():
    student, teacher = struct(4, 400), struct(4, 300)
    for fit, variance in [
        (linear_adapter(), 1 / 400),
        (linear_adapter(initializer=jax.nn.initializers.he_normal()), 2 / 400),
    ]:
        params = jax.jit(fit(student, teacher).init)(KEY)
        np.testing.assert_allclose(np.var(params["kernel"]), variance, rtol=0.02)
        np.testing.assert_array_equal(params["bias"], 0)
    fit = convolution_adapter(spatial=1, bias=False)
    params = fit(struct(1, 5, 100), struct(1, 2, 100)).init(KEY)
    assert params.keys() == {"kernel"}
    np.testing.assert_allclose(np.var(params["kernel"]), 1 / 400, rtol=0.03)


def test_convolutions_of_one_and_three_axes_and_several_batch_axes():
    def of(spatial, x, shape):
        adapter = convolution_adapter(spatial=spatial)(struct(*x.shape), struct(*shape))
        params = drawn(adapter)
        return params, jax.jit(adapter.apply)(params, jnp.asarray(x, jnp.float32))

    params, got = of(1, TOKENS, (2, 4, 4))
    kernel = {"kernel": params["kernel"][None], "bias": params["bias"]}
    np.testing.assert_allclose(
        got, convolution(TOKENS[:, None], kernel)[:, 0], rtol=1e-4, atol=1e-5
    )
    params, got = of(3, MAPS[:, None], (2, 1, 3, 7, 4))
    kernel = {"kernel": params["kernel"][0], "bias": params["bias"]}
    np.testing.assert_allclose(got[:, 0], convolution(MAPS, kernel), rtol=1e-4, atol=1e-5)
    params, got = of(2, MAPS[:, None], (2, 1, 3, 7, 4))
    np.testing.assert_allclose(got[:, 0], convolution(MAPS, params), rtol=1e-4, atol=1e-5)
    params, got = of(2, MAPS[0], (3, 7, 4))
    np.testing.assert_allclose(got, convolution(MAPS[:1], params)[0], rtol=1e-4, atol=1e-5)


def test_each_of_a_chain_is_fitted_to_what_the_one_before_gives():
    chain = chain_adapters(linear_adapter(bias=False), linear_adapter())
    adapter = chain(struct(2, 3), struct(2, 4))
    first, second = params = drawn(adapter)
    assert (first["kernel"].shape, second["kernel"].shape) == ((3, 4), (4, 4))
    want = linear(linear(ROWS, first), second)
    np.testing.assert_allclose(adapter.apply(params, jnp.float32(ROWS)), want, rtol=1e-4, atol=1e-5)
    # Of none it is the identity.
    adapter = chain_adapters()(struct(2, 3), struct(2, 3))
    np.testing.assert_array_equal(adapter.apply([], jnp.float32(ROWS)), np.float32(ROWS))


def test_norms_of_zero_large_small_and_broken_rows():
    rows = np.array(
        [[0.0, 0.0], [3e30, 4e30], [3e-30, 4e-30], [1e-42, 0.0], [np.nan, 1], [np.inf, 1]]
    )
    x = jnp.asarray(rows, jnp.float32)
    apply = l2_norm_adapter()(x, x).apply
    grad = lambda x: jax.grad(lambda x: jnp.sum(apply({}, x)))(x)  # noqa: E731
    got, grads = jax.jit(lambda x: (apply({}, x), grad(x)))(x)
    np.testing.assert_allclose(got[:4], [[0, 0], [0.6, 0.8], [0.6, 0.8], [0, 0]], rtol=1e-6)
    assert np.isnan(got[4]).all()
    assert np.isnan(got[5]).any()
    np.testing.assert_array_equal(grads[0], 0)
    assert np.isfinite(grads[:4]).all()
    # Equal channels: no variance.
    apply = layer_norm_adapter()(x, x).apply
    equal = jnp.full((1, 2), 5.0)
    np.testing.assert_array_equal(apply({}, equal), 0)
    assert np.isfinite(jax.grad(lambda x: jnp.sum(jnp.sin(apply({}, x))))(equal)).all()


def test_epsilon_is_traced():
    x = jnp.asarray(ROWS, jnp.float32)
    run = counting_jit(lambda e: layer_norm_adapter(e)(x, x).apply({}, x))
    values = jax.vmap(run)(jnp.array([1e-5, 1.0]))
    for value, epsilon in zip(values, [1e-5, 1.0], strict=True):
        want = (ROWS - ROWS.mean(-1, keepdims=True)) / np.sqrt(
            ROWS.var(-1, keepdims=True) + epsilon
        )
        np.testing.assert_allclose(value, want, rtol=1e-4)
    assert run.traces == 1


def test_a_broken_position_stays_in_its_bin():
    # The bins are 0 to 1, 1 to 3 and 3 to 4.
    x = jnp.arange(5.0).at[2].set(np.nan)
    got = average_pool_adapter((0,))(x, struct(3)).apply({}, x)
    np.testing.assert_array_equal(got, [0.5, np.nan, 3.5])
    # Without remainder.
    x = jnp.arange(6.0).at[2].set(np.inf)
    got = average_pool_adapter((0,))(x, struct(3)).apply({}, x)
    np.testing.assert_array_equal(got, [0.5, np.inf, 4.5])


STUDENT = {"stem": struct(2, 6, 3), "blocks_0": struct(2, 6, 3), "blocks_1": struct(2, 6, 3)}
TEACHER = {"stem": struct(2, 6, 3), "blocks_0": struct(2, 6, 4), "blocks_1": struct(2, 6, 5)}
FEATURES = {pair: jnp.asarray(TOKENS, jnp.float32) for pair in STUDENT}


def test_adapters_of_all_pairs():
    adapters = adapt({"stem": identity_adapter(), "blocks_*": linear_adapter()}, STUDENT, TEACHER)
    params = jax.jit(adapters.init)(KEY)
    assert params["stem"] == {}
    assert jax.tree.map(jnp.shape, params["blocks_1"]) == {"kernel": (3, 5), "bias": (5,)}
    run = counting_jit(adapters.apply)
    out = run(params, FEATURES)
    assert run(params, FEATURES).keys() == STUDENT.keys()
    assert run.traces == 1
    np.testing.assert_array_equal(out["stem"], FEATURES["stem"])
    np.testing.assert_allclose(
        out["blocks_1"], linear(TOKENS, jax.device_get(params["blocks_1"])), rtol=1e-4, atol=1e-5
    )
    # One for all; and the other pairs do not matter for the params of one.
    every = jax.jit(adapt(linear_adapter(), STUDENT, TEACHER).init)(KEY)
    np.testing.assert_array_equal(every["blocks_0"]["kernel"], params["blocks_0"]["kernel"])
    assert every["stem"]["kernel"].shape == (3, 3)
    # Each with a key of its own.
    alike = jax.jit(adapt(linear_adapter(), STUDENT, STUDENT).init)(KEY)
    assert not np.array_equal(alike["blocks_0"]["kernel"], alike["blocks_1"]["kernel"])
    # Initialized for several seeds at once.
    keys = jax.random.split(KEY, 3)
    many = jax.jit(jax.vmap(lambda key: adapters.apply(adapters.init(key), FEATURES)))(keys)
    one = adapters.apply(jax.jit(adapters.init)(keys[2]), FEATURES)
    np.testing.assert_allclose(many["blocks_1"][2], one["blocks_1"], rtol=1e-5, atol=1e-6)


def test_one_of_your_own():
    doubled = lambda student, teacher: Adapter(lambda key: {}, lambda params, x: 2 * x)  # noqa: E731
    adapters = adapt({"stem": doubled}, {"stem": struct(2, 6, 3)}, {"stem": struct(2, 6, 3)})
    np.testing.assert_array_equal(
        adapters.apply(adapters.init(KEY), {"stem": FEATURES["stem"]})["stem"], 2 * FEATURES["stem"]
    )


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_sharded_batches(kind):
    table = {name: fitted(name, jnp.float32) for name in TABLE if name != "linear of a row"}
    params = {name: row[1] for name, row in table.items()}
    features = {name: row[2] for name, row in table.items()}
    # Layers are no batch.
    spec = {name: P(None, "d") if name == "per layer" else P("d") for name in table}
    features["per layer"] = features["per layer"][:, :4]

    def run(params, features):
        return {name: row[0].apply(params[name], features[name]) for name, row in table.items()}

    want = jax.jit(run)(params, features)
    mesh = mesh_of(kind, 2)
    with jax.set_mesh(mesh):
        place = {name: jax.NamedSharding(mesh, s) for name, s in spec.items()}
        got = jax.jit(run)(params, jax.device_put(features, place))
    for name in table:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=1e-6)
        assert got[name].sharding.is_equivalent_to(place[name], got[name].ndim)


def teacher_model(params, x):
    x = jc.name(jnp.tanh(x @ params["w1"]), "wide")
    return x @ params["w2"]


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(jc.name(nn.tanh(nn.Dense(4)(x)), "hidden"))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(6, 4, rngs=rngs)
        self.second = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.second(jc.name(jnp.tanh(self.first(x)), "hidden"))


def plain(params, x):
    return jc.name(jnp.tanh(x @ params["w1"]), "hidden") @ params["w2"]


@pytest.mark.parametrize("library", ["plain", "linen", "nnx"])
def test_a_student_learns_from_a_hint(library):
    x = jnp.asarray(draw(16, 6), jnp.float32)
    big = {"w1": jnp.asarray(draw(6, 8) / 2, jnp.float32), "w2": jnp.ones((8, 2))}
    hidden = "hidden"
    if library == "plain":
        apply = plain
        params = {"w1": jnp.asarray(draw(6, 4), jnp.float32), "w2": jnp.ones((4, 2))}
    elif library == "linen":
        apply, params, hidden = Linen().apply, Linen().init(KEY, x), "Linen/hidden"
    else:
        apply, params = jc.functional(Nnx(nnx.Rngs(0)))
    paired = capture_pairs(apply, teacher_model, {hidden: "wide"}, (params, x), (big, x))
    adapters = adapt(linear_adapter(), paired.student_shapes, paired.teacher_shapes)
    _, targets = paired.teacher(big, x)
    trained = {"student": params, "adapters": adapters.init(KEY)}

    def loss(trained):
        _, features = paired.student(trained["student"], x)
        adapted = adapters.apply(trained["adapters"], features)
        return jnp.mean(jnp.square(adapted[hidden] - targets[hidden]))

    opt = lenient(optax.adam(0.03))

    def step(carry, _):
        trained, state = carry
        value, grads = jax.value_and_grad(loss)(trained)
        updates, state = opt.update(grads, state, trained)
        with jax.numpy_dtype_promotion("standard"):
            return (optax.apply_updates(trained, updates), state), value

    run = jax.jit(lambda trained: jax.lax.scan(step, (trained, opt.init(trained)), length=200))
    (after, _), values = run(trained)
    # As good as rank 4 of 8: both the features and the map of them must have been learned.
    assert values[-1] < 0.1 * values[0]
    fixed = lambda trained: loss({"student": params, "adapters": trained["adapters"]})  # noqa: E731
    assert loss(after) < 0.5 * fixed(after)
    assert jax.tree.structure(after["student"]) == jax.tree.structure(params)
    assert jc.tree.size(after["student"]) == jc.tree.size(params)
    out, _ = paired.student(after["student"], x)
    np.testing.assert_allclose(out, apply(after["student"], x), rtol=1e-5)


def test_hints_from_every_second_layer_of_a_scan():
    def scanned(params, x):
        def step(x, w):
            return jc.name(jnp.tanh(x @ w), "block"), None

        return jax.lax.scan(step, x, params)[0]

    small = jnp.asarray(draw(3, 4, 4), jnp.float32)
    big = jnp.asarray(draw(6, 8, 8), jnp.float32)
    x, wide = jnp.asarray(draw(2, 4), jnp.float32), jnp.asarray(draw(2, 8), jnp.float32)
    pairs = {"block": jc.distillation.Layers("block", (1, 3, 5))}
    paired = capture_pairs(scanned, scanned, pairs, (small, x), (big, wide))
    each = adapt(per_layer_adapter(linear_adapter()), paired.student_shapes, paired.teacher_shapes)
    shared = adapt(linear_adapter(), paired.student_shapes, paired.teacher_shapes)
    _, features = paired.student(small, x)
    for adapters, kernel in [(each, (3, 4, 8)), (shared, (4, 8))]:
        params = jax.jit(adapters.init)(KEY)
        assert params["block"]["kernel"].shape == kernel
        out = jax.jit(adapters.apply)(params, features)["block"]
        kernels = np.broadcast_to(params["block"]["kernel"], (3, 4, 8))
        for i in range(3):
            want = np.asarray(features["block"][i]) @ kernels[i]
            np.testing.assert_allclose(out[i], want, rtol=1e-5, atol=1e-6)


def refused(error, match, adapters, student=STUDENT, teacher=TEACHER):
    with pytest.raises(error, match=match):
        adapt(adapters, student, teacher)


def of_one(error, match, fit, student, teacher):
    refused(error, match, {"a": fit}, {"a": struct(*student)}, {"a": struct(*teacher)})


def test_errors_name_the_pair_both_shapes_and_what_to_choose():
    match = r"adapt: `adapters` must bring float32\[2, 6, 3\] to float32\[2, 6, 4\]"
    match += r", got float32\[2, 6, 3\] at 'a'\. Choose linear_adapter\(\) for the channels\."
    of_one(ValueError, match, identity_adapter(), (2, 6, 3), (2, 6, 4))
    match = r"Choose average_pool_adapter\(axes=\(-2,\)\) or resize_adapter\(axes=\(-2,\)\)\."
    of_one(ValueError, match, linear_adapter(), (2, 6, 3), (2, 5, 3))
    match = r"channels and resize_adapter\(axes=\(-3, -2\)\); chain_adapters joins\."
    of_one(ValueError, match, identity_adapter(), (2, 5, 5, 3), (2, 6, 7, 4))
    of_one(ValueError, r"Choose global_pool_adapter", identity_adapter(), (2, 6, 6, 3), (2, 3))
    of_one(ValueError, r"Choose other features, or", identity_adapter(), (2, 3), (2, 6, 6, 3))
    of_one(ValueError, r"one batch .* for axis 0", linear_adapter(), (3, 2, 3), (6, 2, 3))
    match = r"for each pair, from float32\[2, 6, 3\] to float32\[2, 6, 5\], got none at 'blocks_1'"
    refused(ValueError, match, {"stem": identity_adapter(), "blocks_0": linear_adapter()})
    match = r"got two, \['blocks_0', 'b\*'\] at 'blocks_0'"
    fits = {"blocks_0": linear_adapter(), "b*": linear_adapter(), "stem": identity_adapter()}
    refused(ValueError, match, fits)
    match = r"adapt: `adapters` must have keys .*the key 'nothing', which matches none.*blocks_0"
    refused(ValueError, match, {"nothing": linear_adapter()})
    refused(TypeError, r"adapt: `adapters` must have keys .*the key 3", {3: linear_adapter()})
    match = r"`teacher_shapes` must be a mapping with the pairs \['a'\], got \['b'\]"
    refused(ValueError, match, linear_adapter(), {"a": struct(2)}, {"b": struct(2)})
    match = r"at 'a'\. Choose"
    refused(ValueError, match, {"a": global_pool_adapter()}, {"a": struct(2, 3)}, {"a": struct(3)})


def test_adapters_that_do_not_fit():
    pool, resizing = average_pool_adapter((-2,)), resize_adapter()
    of_one(ValueError, "Choose resize_adapter to enlarge", pool, (2, 6, 3), (2, 7, 3))
    of_one(ValueError, "have the axes of", pool, (2, 6, 3), (6, 3))
    of_one(ValueError, "have entries along axes", pool, (2, 0, 3), (2, 0, 3))
    of_one(ValueError, "have entries along axes", resizing, (2, 0, 3), (2, 4, 3))
    of_one(ValueError, "have entries along axes", resizing, (2, 6, 3), (2, 0, 3))
    of_one(ValueError, "each named once", average_pool_adapter((1, -2)), (2, 6, 3), (2, 3, 3))
    of_one(ValueError, "be an axis", global_pool_adapter((3,)), (2, 6, 3), (2, 6))
    of_one(ValueError, "have entries", global_pool_adapter((1,)), (2, 0, 3), (2, 3))
    of_one(ValueError, "have entries", layer_norm_adapter(), (2, 0), (2, 0))
    of_one(ValueError, "channels", linear_adapter(), (2, 0), (2, 3))
    of_one(ValueError, "channels", linear_adapter(), (), (3,))
    conv = convolution_adapter()
    of_one(ValueError, "2 spatial axes, no larger", conv, (2, 4, 4, 3), (2, 5, 4, 3))
    of_one(ValueError, "2 spatial axes", conv, (4, 3), (4, 3))
    of_one(ValueError, "2 spatial axes", conv, (2, 4, 4, 3), (4, 4, 3))
    layer = per_layer_adapter(linear_adapter())
    of_one(ValueError, r"as many layers.*Layers\(name", layer, (3, 2, 4), (6, 2, 4))
    of_one(ValueError, "as many layers", layer, (), ())
    of_one(ValueError, "as many layers", layer, (0, 4), (0, 4))


def test_bad_input():
    refused(TypeError, "functions of two shapes", 3)
    refused(TypeError, "functions of two shapes", {"stem": 3})
    refused(TypeError, "functions of two shapes", linear_adapter()(struct(2, 3), struct(2, 3)))
    for make in (linear_adapter, resize_adapter, per_layer_adapter, identity_adapter):
        match = rf"adapt: `adapters` must .*got {make.__name__}, .*Call it.*{make.__name__}\("
        refused(TypeError, match, make)
        refused(TypeError, match, {"*": make})
    refused(TypeError, "return an Adapter, got", lambda student, teacher: None)
    refused(TypeError, "`student_shapes` must be a mapping", linear_adapter(), [struct(2)])
    refused(TypeError, "`teacher_shapes` must be a mapping", linear_adapter(), STUDENT, {"a": (2,)})
    whole = {"a": struct(2, 3, dtype=jnp.int32)}
    refused(TypeError, "floating-point features, got int32", linear_adapter(), whole, whole)
    for make in (average_pool_adapter, global_pool_adapter, resize_adapter, l2_norm_adapter):
        with pytest.raises(TypeError, match=rf"{make.__name__}: `axes` must be a static integer"):
            make((1.0,))
    for make in (linear_adapter, convolution_adapter):
        with pytest.raises(TypeError, match=rf"{make.__name__}: `initializer` must be a function"):
            make(initializer=1)
    for spatial, error in [(0, ValueError), (4, ValueError), (1.0, TypeError)]:
        with pytest.raises(error, match="spatial"):
            convolution_adapter(spatial=spatial)
    for epsilon, error in [(0.0, ValueError), (-1.0, ValueError), (None, TypeError)]:
        with pytest.raises(error, match="epsilon"):
            layer_norm_adapter(epsilon)
    with pytest.raises(TypeError, match="per_layer_adapter: `adapter` must be functions"):
        per_layer_adapter(None)
    with pytest.raises(TypeError, match="chain_adapters: `adapters` must be functions"):
        chain_adapters(linear_adapter(), 3)


def test_bad_features():
    shapes = {"a": struct(2, 6, 3)}, {"a": struct(2, 4, 5)}
    adapters = adapt(chain_adapters(average_pool_adapter((-2,)), linear_adapter()), *shapes)
    params, x = drawn(adapters), jnp.ones((2, 6, 3))
    for features, error, match in [
        ({}, ValueError, r"`features` must be a mapping with the pairs \['a'\], got \[\]"),
        ({"a": x, "b": x}, ValueError, r"got \['a', 'b'\]"),
        (x, ValueError, r"`features` must be a mapping"),
        ({"a": x[0]}, ValueError, r"the axes of the example, float32\[2, 6, 3\].*at 'a'"),
        ({"a": x.astype(jnp.int32)}, TypeError, "floating-point features, got int32.*at 'a'"),
        ({"a": jnp.ones((2, 6, 4))}, ValueError, r"the 3 channels it was fitted to.*at 'a'"),
        ({"a": jnp.ones((2, 3, 3))}, ValueError, r"at least 4 positions.*at 'a'"),
    ]:
        with pytest.raises(error, match=match):
            adapters.apply(params, features)
    with pytest.raises(ValueError, match="`params` must be a mapping"):
        adapters.apply({}, {"a": x})
    with pytest.raises(TypeError, match="key"):
        adapters.init(0)
    conv = adapt(convolution_adapter(spatial=1), *shapes)
    with pytest.raises(ValueError, match=r"at least \[3\] wide"):
        conv.apply(drawn(conv), {"a": jnp.ones((2, 2, 3))})
