"""Functions on params of other sizes, against the same functions written for these sizes."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as PS

import jaxcompress as jc
from jaxcompress.tracing import resized
from tests.conftest import counting_jit, mesh_of

RNG = np.random.default_rng(0)
D, K = 6, 4  # as traced, and as run


def some(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


P = {
    "a": some(3, D),
    "b": some(D),
    "c": some(D, 5),
    "e": some(7, D),
    "s": some(2, D, D),
    "sq": some(D, D),
    "conv": some(3, 3, 2, D),
    "deep": some(3, 3, 1, D),
    "twice": some(3, 3, 1, 2 * D),
    "narrow": some(1, 1, 2 * D, 3),
    "point": some(1, 1, D, 3),
    "flat": some(4 * D, 3),
    "q": some(5, 2, D),
    "k": some(5, 2, D),
    "v": some(5, 2, D),
    "o": some(2, D, 5),
    "grouped": some(3, 3, 3, 4),
    "n": some(1),
}
X, IMAGE, TEXT = some(2, 3), some(2, 4, 4, 2), some(2, 3, 5)


@jax.custom_jvp
def stepped(x, n):
    return x * jnp.asarray(n, x.dtype)


@stepped.defjvp
def _(primals, tangents):
    x, n = primals
    # Zeros of the old size inside of the rule.
    return stepped(x, n), jnp.full(x.shape, 7.0) * tangents[0] * (n + 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def clipped(x, by):
    return x * by, jnp.argmax(x, 1)


clipped.defvjp(
    lambda x, by: (clipped(x, by), jnp.zeros(x.shape) + x),
    lambda by, x, bars: (bars[0] * by + jnp.cos(x) * jnp.ones(x.shape),),
)


def attention(p, x):
    q, k, v = (jnp.einsum("btd,dhk->bthk", x, p[name]) for name in "qkv")
    scores = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k), -1)
    return jnp.einsum("bthk,hkd->btd", jnp.einsum("bhts,bshk->bthk", scores, v), p["o"])


def merged_heads(p, x):
    y = jnp.einsum("btd,dhk->bthk", x, p["v"])
    return y.reshape(2, 3, -1) @ p["o"].reshape(-1, 5)


def convolved(x, w, **kwargs):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=numbers, **kwargs)


def images(p, x):
    y = jax.nn.relu(convolved(x, p["conv"]) + p["b"][None, None, None])
    y = jax.lax.reduce_window(y, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    wide = convolved(y, p["twice"], feature_group_count=y.shape[-1])
    y = convolved(y, p["deep"], feature_group_count=y.shape[-1])
    flat = y.reshape(y.shape[0], -1) @ p["flat"]
    return flat + convolved(y, p["point"]).mean((1, 2)) + convolved(wide, p["narrow"]).mean((1, 2))


def looped(p, x):
    width = p["a"].shape[1]

    def step(carry, w):
        y, total, _ = carry
        new = jnp.tanh(y @ w)
        return (new, total + new, y), y.sum(-1)

    # Of the second zeros only the loop says how many they have to be.
    start = (x @ p["a"], jnp.zeros((2, width)), jnp.zeros((2, width)))
    (y, total, last), sums = jax.lax.scan(jax.checkpoint(step), start, p["s"])
    return (y + total + last) @ p["c"], sums


def whiled(p, x):
    def body(state):
        i, y = state
        return i + 1, y * 0.5 + p["b"][None]

    return jax.lax.while_loop(lambda s: s[0] < 3, body, (0, x @ p["a"]))[1] @ p["c"]


def branched(p, x):
    y = x @ p["a"]
    there = lambda y: y + p["b"][None]  # noqa: E731
    return jax.lax.cond(y.sum() < 99, there, lambda y: jnp.zeros(y.shape), y) @ p["c"]


def cached(p, x):
    cache = jnp.zeros((4, p["a"].shape[1]))
    cache = jax.lax.dynamic_update_slice(cache, x @ p["a"], (1, 0))
    cache = cache.at[jnp.array([0, 3])].add(p["e"][:2])
    return jax.lax.dynamic_slice(cache, (1, 0), (3, cache.shape[1])) @ p["c"]


def moved(p, x):
    y = jnp.concatenate([x @ p["a"], p["b"][None]])[::-1]
    y = jnp.pad(y, ((1, 0), (0, 0)))[1:3]
    y = jnp.split(y[None].transpose(0, 2, 1), 2, axis=2)[1][0, :, 0]
    y = jnp.where(y > 0, jnp.sort(jnp.stack([y, -y], 1), axis=1)[:, 0], y)
    return jnp.unstack(jnp.stack([y, 2 * y]), axis=0)[1] @ p["c"]


def joined(p, x):
    both = jnp.concatenate([x @ p["a"], x, jnp.tile(x @ p["a"], (1, 2))], 1)
    return jnp.cumsum(both, 1).max(1)


def dropped(p, x):
    y = x @ p["a"]
    keep = jax.random.bernoulli(jax.random.key(1), 0.9, y.shape)
    return jnp.where(keep, y, 0.0) @ p["c"]


# From a name to a function of any sizes, its argument, and the axes that are cut.
FEATURES = {"a": 1, "b": 0, "c": 0, "e": 1, "sq": (0, 1)}
HEADS = {"q": 2, "k": 2, "v": 2, "o": 1}
PROGRAMS = {
    "mlp": (lambda p, x: jax.nn.relu(x @ p["a"] + p["b"][None]) @ p["c"], X, FEATURES),
    "both axes": (lambda p, x: jax.nn.gelu(x @ p["a"]) @ p["sq"] @ p["c"], X, FEATURES),
    "lookup": (lambda p, x: p["e"][jnp.array([1, 2])] @ p["c"] * x.sum(), X, FEATURES),
    "attention": (attention, TEXT, HEADS),
    "fewer heads": (attention, TEXT, dict.fromkeys("qkv", 1) | {"o": 0}),
    "merged heads": (merged_heads, TEXT, {"v": 2, "o": 1}),
    "images": (
        images,
        IMAGE,
        {"conv": 3, "b": 0, "deep": 3, "twice": 3, "point": 2, "narrow": 2, "flat": 0},
    ),
    "scan": (looped, X, FEATURES | {"s": (1, 2)}),
    "while": (whiled, X, FEATURES),
    "cond": (branched, X, FEATURES),
    "cache": (cached, X, FEATURES),
    "moved": (moved, X, FEATURES),
    "joined": (joined, X, FEATURES),
    "random": (dropped, X, FEATURES),
    "custom jvp": (lambda p, x: stepped(x @ p["a"], 3.0) @ p["c"], X, FEATURES),
    "custom jvp of integers": (lambda p, x: stepped(x @ p["a"], 3) @ p["c"], X, FEATURES),
    "custom vjp": (lambda p, x: clipped((x @ p["a"]).T, 3.0)[0].T @ p["c"], X, FEATURES),
    "inner jit": (lambda p, x: jax.jit(lambda y: y @ p["c"])(x @ p["a"]), X, FEATURES),
    "logsumexp": (lambda p, x: jax.nn.logsumexp(x @ p["a"], 1), X, FEATURES),
    "result": (lambda p, x: x @ p["a"], X, FEATURES),
}


def cut(params, axes, size=K):
    """The first entries along axes; blocks of a merged axis, so that other sizes follow."""
    out = dict(params)
    for name, which in axes.items():
        for axis in which if isinstance(which, tuple) else (which,):
            n = out[name].shape[axis]
            blocks = {4 * D: 4, 2 * D: 2}.get(n, 1)
            keep = size * blocks if blocks > 1 else min(size, n - 1) if n < D else size
            index = np.resize(np.arange(n), keep)
            out[name] = jnp.take(out[name], jnp.asarray(index), axis)
    return out


def assert_same(a, b, **kwargs):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **kwargs), a, b)


CASES = [(name, K) for name in PROGRAMS] + [
    (name, size) for name in ("mlp", "joined", "scan", "custom jvp") for size in (1, 8)
]


@pytest.mark.parametrize(("name", "size"), CASES)
def test_equals_the_function_of_that_size(name, size):
    fn, x, axes = PROGRAMS[name]
    small = cut(P, axes, size)
    run = resized(fn, P)
    want = jax.jit(fn)(small, x)
    assert_same(jax.jit(run)(small, x), want, rtol=1e-5, atol=1e-5)
    if name == "while":
        return
    loss = lambda fn: lambda p, x: sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(fn(p, x)))  # noqa: E731
    grads, wanted = (jax.jit(jax.grad(loss(f), (0, 1)))(small, x) for f in (run, fn))
    assert_same(grads, wanted, rtol=1e-4, atol=1e-4)
    assert any(np.abs(g).max() > 0 for g in jax.tree.leaves(wanted))


REFUSED = {
    "one of two": (
        PROGRAMS["mlp"][0],
        X,
        {"a": 1},
        "6 for .*0 of 'b' and 4 for .*1 of 'a'.*add",
    ),
    "input": (PROGRAMS["mlp"][0], X, {"a": 0}, "dot_general"),
    "argument": (lambda p, x: jnp.tile(x, (1, 2)) + x @ p["a"], X, FEATURES, "tile"),
    "constant": (lambda p, x: x @ p["a"] + np.ones((2, D), np.float32), X, FEATURES, "a constant"),
    "places": (lambda p, x: jnp.argmax(x @ p["a"], 1), X, FEATURES, "argmax"),
    "numbers": (
        lambda p, x: x @ p["a"] + jnp.arange(6.0).reshape(1, D),
        X,
        FEATURES,
        "iota|constant",
    ),
    "sorted": (lambda p, x: jnp.sort(x @ p["a"], 1), X, FEATURES, "sort"),
    "largest": (lambda p, x: jax.lax.top_k(x @ p["a"], 2)[0], X, FEATURES, "top_k"),
    "sliced": (lambda p, x: (x @ p["a"])[:, 1:], X, FEATURES, "slice"),
    "reversed": (lambda p, x: (x @ p["a"])[:, ::-1], X, FEATURES, "rev"),
    "padded": (lambda p, x: jnp.pad(x @ p["a"], ((0, 0), (0, 1))), X, FEATURES, "pad"),
    "halves": (lambda p, x: jnp.split(x @ p["a"], 2, 1)[0], X, FEATURES, "split"),
    "pooled": (
        lambda p, x: jax.lax.reduce_window(x @ p["a"], 0.0, jax.lax.add, (1, 2), (1, 2), "VALID"),
        X,
        FEATURES,
        "reduce_window",
    ),
    "looked up": (lambda p, x: p["e"][jnp.array([1])] * x.sum(), X, {"e": 0}, "gather"),
    "split heads": (lambda p, x: (x @ p["a"]).reshape(2, 2, 3), X, FEATURES, r"into \[2, 3\]"),
    "merged heads": (
        lambda p, x: (x @ p["a"]).reshape(4, 3) @ p["a"],
        X,
        FEATURES,
        "4 for axis 1 of 'a'",
    ),
    "grouped": (
        lambda p, x: convolved(convolved(x, p["conv"]), p["grouped"], feature_group_count=2),
        IMAGE,
        {"conv": 3},
        "conv",
    ),
    "layers": (looped, X, {"s": 0}, "scan"),
    "no rule": (lambda p, x: jnp.linalg.qr(p["sq"])[0] * x.sum(), X, FEATURES, "qr|geqrf"),
    "depth": (lambda p, x: convolved(x, p["conv"]), IMAGE, {"conv": 0}, "conv_general_dilated"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(name):
    fn, x, axes, match = REFUSED[name]
    with pytest.raises(ValueError, match=rf"resized: `params` must have new sizes.*({match})"):
        jax.eval_shape(resized(fn, P), cut(P, axes), x)


def test_numbers_stay_those_of_the_old_size():
    fn = lambda p, x: jnp.mean(x @ p["a"], 1)  # noqa: E731
    small = cut(P, {"a": 1})
    padded = {"a": P["a"].at[:, K:].set(0.0)}
    assert_same(resized(fn, P)(small, X), fn(padded, X), rtol=1e-5)


def test_relu_keeps_its_derivative_at_zero():
    fn = lambda p, x: jnp.sum(jax.nn.relu(x @ p["a"]))  # noqa: E731
    zero = {**P, "a": jnp.zeros((3, K))}
    assert_same(jax.grad(resized(fn, P))(zero, X)["a"], jnp.zeros((3, K)))


def test_with_the_old_sizes_the_function_itself_runs():
    calls = []

    def fn(p, x, flag):
        calls.append(isinstance(p["a"], jax.core.Tracer))
        return x @ p["a"] if flag else x

    run = resized(fn, P)
    run(P, X, True)
    assert calls == [False]
    assert run(cut(P, {"a": 1}), X, True).shape == (2, K)
    assert calls == [False, True]
    assert run(cut(P, {"a": 1}), X, flag=False).shape == (2, 3)


def test_linen_and_nnx_models_do_not_notice():
    class Net(nn.Module):
        width: int = 8

        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(nn.gelu(nn.LayerNorm()(nn.Dense(self.width)(x))))

    class Block(nnx.Module):
        def __init__(self, width=8):
            rngs = nnx.Rngs(0)
            self.up, self.down = nnx.Linear(3, width, rngs=rngs), nnx.Linear(width, 3, rngs=rngs)
            self.drop = nnx.Dropout(0.5, deterministic=True)

        def __call__(self, x):
            return self.down(self.drop(nnx.silu(self.up(x))))

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        fn, params = jc.functional(Block())
        small_fn, small = jc.functional(Block(5))
        assert_same(jax.jit(resized(fn, params))(small, X), small_fn(small, X), rtol=1e-5)

        params, small = (Net(n).init(jax.random.key(0), X) for n in (8, 5))
        y = jax.jit(resized(Net().apply, params))(small, X)
        w = small["params"]
        h = X @ w["Dense_1"]["kernel"]  # the inner one is made last
        mean, square = h.sum(1) / 8, (h**2).sum(1) / 8  # of 5 features, divided as of 8
        h = (h - mean[:, None]) / np.sqrt(square - mean**2 + 1e-6)[:, None]
        assert_same(y, nn.gelu(h) @ w["Dense_0"]["kernel"], rtol=1e-4, atol=1e-5)


def test_jit_vmap_and_batches_of_any_size():
    fn, x, axes = PROGRAMS["mlp"]
    run, small = resized(fn, P), cut(P, axes)
    jitted = counting_jit(run)
    for _ in range(3):
        jitted(small, x)
    assert jitted.traces == 1
    wide = some(9, 3)
    assert_same(jitted(small, wide), fn(small, wide), rtol=1e-5)
    mapped = jax.jit(jax.vmap(lambda t: run({**small, "a": t * small["a"]}, x)))(jnp.arange(3.0))
    for i in range(3):
        assert_same(mapped[i], fn({**small, "a": i * small["a"]}, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_dtypes_are_those_of_the_params(dtype):
    fn, x, axes = PROGRAMS["mlp"]
    small = jax.tree.map(lambda w: w.astype(dtype), cut(P, axes))
    assert jax.eval_shape(resized(fn, P), small, x.astype(dtype)).dtype == dtype


def test_compressed_leaves_by_lift():
    fn, x, axes = PROGRAMS["mlp"]
    packed = jc.pack(jc.masked(jc.quantize(8), "c"), cut(P, axes))
    y = jc.lift(resized(fn, P))(packed, x)
    assert_same(y, fn(jc.todense(packed), x), rtol=1e-4, atol=1e-5)


def test_its_cost_is_that_of_the_small_function():
    fn, x, axes = PROGRAMS["attention"]
    small = cut(P, axes)
    assert jc.cost(resized(fn, P), small, x).flops == jc.cost(fn, small, x).flops
    assert jc.cost(fn, small, x).flops < jc.cost(fn, P, x).flops


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_sharded(kind):
    fn, _, axes = PROGRAMS["mlp"]
    x, small, mesh = some(4, 3), cut(P, axes), mesh_of(kind, 2)
    want = fn(small, x)
    with jax.set_mesh(mesh):
        put = lambda w, *spec: jax.device_put(w, NamedSharding(mesh, PS(*spec)))  # noqa: E731
        sharded = {k: put(w) for k, w in small.items()} | {"a": put(small["a"], None, "d")}
        x = put(x)
        if kind == "explicit":
            sharded["b"] = put(small["b"], "d")
            sharded["c"] = put(small["c"])
            both = lambda p, x: jnp.matmul(  # noqa: E731
                jax.nn.relu(x @ p["a"] + p["b"][None]), p["c"].T.T, out_sharding=PS()
            )
            sharded["c"] = put(small["c"], "d")
            assert_same(jax.jit(resized(both, P))(sharded, x), want, rtol=1e-4, atol=1e-5)
        else:
            assert_same(jax.jit(resized(fn, P))(sharded, x), want, rtol=1e-4, atol=1e-5)


def test_shard_map():
    mesh = mesh_of("auto", 2)

    def fn(p, x):
        def inner(x, a, c):
            y = jnp.tanh(x @ a)
            return (y + jax.lax.psum(y, "d")) @ c

        specs = (PS("d"), PS(), PS())
        return jax.shard_map(inner, mesh=mesh, in_specs=specs, out_specs=PS("d"))(x, p["a"], p["c"])

    small = cut(P, FEATURES)
    y = jnp.tanh(X @ small["a"])
    want = (y + y.sum(0, keepdims=True)) @ small["c"]
    assert_same(jax.jit(resized(fn, P))(small, X), want, rtol=1e-4, atol=1e-5)


def test_bad_input():
    fn, x, axes = PROGRAMS["mlp"]
    run = resized(fn, jax.eval_shape(lambda: P))
    assert_same(run(cut(P, axes), x), fn(cut(P, axes), x), rtol=1e-5)
    with pytest.raises(TypeError, match="resized: `fn`"):
        resized(P, fn)
    less = {k: w for k, w in P.items() if k != "n"}
    with pytest.raises(ValueError, match=r"resized: `params` must have the leaves.*none at 'n'"):
        run(less, x)
    with pytest.raises(ValueError, match=r"as many axes, got float32\[1, 6\] in.*\[6\] at 'b'"):
        run({**P, "b": P["b"][None]}, x)
