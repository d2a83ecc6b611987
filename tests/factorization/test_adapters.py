"""Adapters as leaves: nothing changes at first, only they are trained, they merge back."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from jaxcompress import arrays
from jaxcompress.factorization import (
    adapter_mask,
    add_adapters,
    join_adapters,
    merge_adapters,
    split_adapters,
)
from tests.conftest import lenient, mesh_of
from tests.factorization.small_mlp import draw, mlp, params

KEY = jax.random.key(0)


def matrix(w):
    return np.asarray(w, np.float64).reshape(-1, w.shape[-1])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_zero_changes_nothing(dtype):
    w = draw(3, 4, 8, dtype=dtype)
    out = add_adapters(w, 2, key=KEY, alpha=4.0)
    assert isinstance(out, arrays.Sum)
    low = out.parts[1].inner
    assert (low.u.shape, low.v.shape, low.u.dtype) == ((3, 4, 2), (2, 8), dtype)
    np.testing.assert_array_equal(np.asarray(out.todense()), np.asarray(w))
    np.testing.assert_array_equal(np.asarray(low.v), 0)


def test_u_is_normal_with_the_variance_of_a_row():
    u = add_adapters(draw(4096, 8), 4, key=KEY).parts[1].u
    np.testing.assert_allclose(np.asarray(u).std() * np.sqrt(4096), 1.0, atol=0.02)
    a, b = (leaf.parts[1].u for leaf in add_adapters([draw(16, 8)] * 2, 2, key=KEY))
    assert (a != b).all()


@pytest.mark.parametrize("shape", [(16, 8), (8, 16), (3, 3, 2, 4)])
@pytest.mark.parametrize("alpha", [None, 3.0])
def test_pissa_trains_the_principal_part(shape, alpha):
    w = draw(*shape)
    out = add_adapters(w, 2, init="pissa", alpha=alpha)
    base, last = out.parts
    low, scale = (last, 1.0) if alpha is None else (last.inner, 1.5)
    u, s, vt = np.linalg.svd(matrix(w), full_matrices=False)
    want = (u[:, :2] * s[:2]) @ vt[:2]
    got = scale * matrix(low.u) @ matrix(low.v)
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_allclose(matrix(base), matrix(w) - want, atol=1e-5)
    np.testing.assert_allclose(out.todense(), w, atol=1e-6)
    # Balanced, as both factors are trained at one rate.
    np.testing.assert_allclose(
        matrix(low.u).T @ matrix(low.u), matrix(low.v) @ matrix(low.v).T, atol=1e-5
    )


@pytest.mark.parametrize(("stabilized", "want"), [(False, 3.0 / 4), (True, 3.0 / 2)])
def test_scale(stabilized, want):
    out = add_adapters(draw(16, 8), 4, key=KEY, alpha=3.0, stabilized=stabilized)
    np.testing.assert_allclose(out.parts[1].scale, [[want]])
    x, moved = draw(5, 16), jax.tree.map(lambda a: a + 1, out)
    low = moved.parts[1].inner
    full = (want + 1) * matrix(low.u) @ matrix(low.v) + matrix(moved.parts[0])
    y = jc.lift(lambda p, x: x @ p)(moved, x)
    np.testing.assert_allclose(y, np.asarray(x, np.float64) @ full, rtol=1e-4, atol=1e-4)


def test_traced_rank_and_alpha_equal_a_loop():
    w = draw(16, 8)

    def make(rank, alpha, init):
        out = add_adapters(w, rank, key=KEY, alpha=alpha, init=init, max_rank=4)
        return out.parts[0], out.parts[1].inner.u, out.parts[1].scale

    for init in ("zero", "pissa"):
        mapped = jax.jit(jax.vmap(lambda r, a, init=init: make(r, a, init)))(
            jnp.array([1, 2, 9]), jnp.array([0.5, 0.0, 2.0])
        )
        for i, (rank, alpha) in enumerate([(1, 0.5), (2, 0.0), (9, 2.0)]):
            base, u, _ = make(rank, alpha, init)
            np.testing.assert_allclose(mapped[0][i], base, atol=1e-5)
            np.testing.assert_allclose(np.abs(mapped[1][i]), np.abs(u), atol=1e-5)
            np.testing.assert_allclose(mapped[2][i], [[alpha / min(rank, 4)]], rtol=1e-6)
            assert np.isfinite(u).all()
            assert not (alpha == 0 and init == "pissa" and np.any(u))
            assert (np.any(np.asarray(u) != 0, axis=0) == (np.arange(4) < rank)).all() or not alpha


BASES = {
    "dense": lambda p: p,
    "quantized": lambda p: jc.pack(jc.quantize(4), p),
    "sparse": lambda p: jc.pack(jc.prune(0.5), p),
    "low rank": lambda p: jc.pack(jc.low_rank(2), p),
}


@pytest.mark.parametrize("base", BASES)
def test_only_adapters_are_trained(base):
    dense = params()
    small = add_adapters(BASES[base](dense), 2, key=KEY, alpha=4.0)
    adapters, rest = split_adapters(small)
    assert [x.shape for x in jax.tree.leaves(adapters)] == [(16, 2), (2, 8), (8, 2), (2, 4)]
    x, target = draw(32, 16), draw(32, 4, seed=1)
    optimizer = lenient(optax.adamw(0.05, weight_decay=0.1))

    def loss(adapters):
        return jnp.mean(jnp.square(jc.lift(mlp)(join_adapters(adapters, rest), x) - target))

    @jax.jit
    def step(adapters, state):
        updates, state = optimizer.update(jax.grad(loss)(adapters), state, adapters)
        return optax.apply_updates(adapters, updates), state

    state, before = optimizer.init(adapters), loss(adapters)
    for _ in range(10):
        adapters, state = step(adapters, state)
    trained = join_adapters(adapters, rest)
    assert loss(adapters) < 0.9 * before
    for old, new in ((small["a"]["w"], trained["a"]["w"]), (small["c"], trained["c"])):
        jax.tree.map(np.testing.assert_array_equal, old.parts[0], new.parts[0])
        np.testing.assert_array_equal(old.parts[1].scale, new.parts[1].scale)
        assert np.any(new.parts[1].inner.v)
    np.testing.assert_array_equal(trained["a"]["b"], dense["a"]["b"])
    merged = merge_adapters(trained)
    assert not any(arrays.is_compressed(w) for w in (merged["a"]["w"], merged["c"]))
    np.testing.assert_allclose(mlp(merged, x), jc.lift(mlp)(trained, x), rtol=1e-4, atol=1e-5)


def test_gradient_of_adapters_equals_numpy():
    # loss = sum((x (W + s U V))^2): dL/dV = s U^T x^T 2y, dL/dU = s x^T 2y V^T.
    w, x = draw(16, 8), draw(5, 16)
    small = add_adapters(jc.pack(jc.quantize(4), w), 2, key=KEY, alpha=4.0)
    small = jax.tree.map(lambda a, m: a + 0.1 if m else a, small, adapter_mask(small))
    adapters, rest = split_adapters(small)
    loss = lambda a: jnp.sum(jnp.square(jc.lift(lambda p, x: x @ p)(join_adapters(a, rest), x)))  # noqa: E731
    got = jax.grad(loss)(adapters).parts[1].inner
    low, x = small.parts[1].inner, np.asarray(x, np.float64)
    u, v = matrix(low.u), matrix(low.v)
    y = x @ (np.asarray(small.parts[0].todense(), np.float64) + 2.0 * u @ v)
    np.testing.assert_allclose(got.v, 2.0 * u.T @ x.T @ (2 * y), rtol=1e-4)
    np.testing.assert_allclose(got.u, 2.0 * x.T @ (2 * y) @ v.T, rtol=1e-4)


def test_mask_labels_optax_partition():
    small = add_adapters(params(), 2, key=KEY)
    labels = lambda p: jax.tree.map(lambda m: "train" if m else "freeze", adapter_mask(p))  # noqa: E731
    groups = {"train": optax.sgd(1.0), "freeze": optax.set_to_zero()}
    optimizer = lenient(optax.partition(groups, labels))
    grads = jax.tree.map(jnp.ones_like, small)
    updates, _ = optimizer.update(grads, optimizer.init(small), small)
    jax.tree.map(lambda u, m: np.testing.assert_array_equal(u, -1.0 * m), updates, labels_of(small))


def labels_of(small):
    return jax.tree.map(float, adapter_mask(small))


def test_loftq_leaves_have_adapters_too():
    p = jc.factorization.low_rank_plus(jc.quantize(4), 2)
    small = jc.pack(p, {"w": draw(64, 64)})
    adapters, rest = split_adapters(small)
    assert [x.shape for x in jax.tree.leaves(adapters)] == [(64, 2), (2, 64)]
    again = join_adapters(adapters, rest)
    assert jax.tree.structure(again) == jax.tree.structure(small)


def test_adapters_on_adapters():
    once = add_adapters(draw(16, 8), 2, init="pissa")
    twice = add_adapters(once, 3, key=KEY)
    assert len(twice.parts) == 3
    assert [x.shape for x in jax.tree.leaves(split_adapters(twice)[0])] == [(16, 3), (3, 8)]


def test_where_and_scan_over_stacked_layers():
    stacked = {"w": draw(3, 8, 8), "b": draw(3, 8)}
    small = add_adapters(stacked, 2, key=KEY, alpha=4.0, where="w")
    assert isinstance(small["b"], jax.Array)
    small = jax.tree.map(lambda a: a + 0.1 if a.ndim > 1 else a, small)

    def fn(p, x):
        return jax.lax.scan(lambda x, p: (jnp.tanh(x @ p["w"] + p["b"][None]), None), x, p)[0]

    x = draw(5, 8)
    want = fn(jc.todense(small), x)
    np.testing.assert_allclose(jax.jit(jc.lift(fn))(small, x), want, rtol=1e-4, atol=1e-5)


def test_saved_and_loaded(tmp_path):
    small = add_adapters(jc.pack(jc.quantize(4), params()), 2, key=KEY, alpha=4.0)
    jc.save(tmp_path / "lora.safetensors", small)
    jax.tree.map(np.testing.assert_array_equal, jc.load(tmp_path / "lora.safetensors"), small)
    # The adapters alone are a small file.
    adapters, _ = split_adapters(small)
    jc.save(tmp_path / "alone.safetensors", jax.tree.leaves(adapters))
    for a, b in zip(
        jc.load(tmp_path / "alone.safetensors"), jax.tree.leaves(adapters), strict=True
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize("init", ["zero", "pissa"])
def test_sharded(kind, init):
    w, mesh = draw(16, 8), mesh_of(kind)
    want = add_adapters(w, 2, key=KEY, alpha=4.0, init=init)
    placed = jax.device_put(w, NamedSharding(mesh, P("d", None)))
    with jax.set_mesh(mesh):
        got = jax.jit(lambda w: add_adapters(w, 2, key=KEY, alpha=4.0, init=init))(placed)
        dense = jax.jit(jc.todense)(got)
    assert got.parts[0].sharding.spec[0] == "d"
    np.testing.assert_allclose(dense, want.todense(), atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
@pytest.mark.parametrize("init", ["zero", "pissa"])
def test_empty_leaves(shape, init):
    out = add_adapters(draw(*shape), 2, key=KEY, init=init)
    assert out.todense().shape == shape


def test_zeros_and_nan():
    zero = add_adapters(jnp.zeros((8, 4)), 2, init="pissa")
    np.testing.assert_array_equal(zero.todense(), 0)
    bad = add_adapters(draw(8, 4).at[0, 0].set(jnp.nan), 2, init="pissa")
    assert np.isnan(bad.todense()).all()


def test_refuses():
    w = draw(8, 4)
    with pytest.raises(ValueError, match=r"add_adapters: `rank` must be .* at least 1"):
        add_adapters(w, 0, key=KEY)
    with pytest.raises(ValueError, match=r"add_adapters: `key` must be given for init='zero'"):
        add_adapters(w, 2)
    with pytest.raises(TypeError, match=r"add_adapters: `key` must be one key"):
        add_adapters(w, 2, key=3)
    with pytest.raises(ValueError, match=r"add_adapters: `init` must be 'zero' or 'pissa'"):
        add_adapters(w, 2, key=KEY, init="normal")
    with pytest.raises(ValueError, match=r"add_adapters: `alpha` must be given where"):
        add_adapters(w, 2, key=KEY, stabilized=True)
    with pytest.raises(ValueError, match=r"`params` must be dense for init='pissa', got Quantized"):
        add_adapters({"w": jc.pack(jc.quantize(4), draw(16, 8))}, 2, init="pissa")
    with pytest.raises(ValueError, match=r"two or more dimensions, got float32\[8\] at 'b'"):
        add_adapters({"b": draw(8)}, 2, key=KEY, where="b")
    with pytest.raises(TypeError, match=r"real floating-point leaves, got int32\[2, 2\] at 'b'"):
        add_adapters({"b": jnp.ones((2, 2), jnp.int32)}, 2, key=KEY, where="b")
    with pytest.raises(ValueError, match=r"add_adapters: `where` must match"):
        add_adapters({"b": draw(8)}, 2, key=KEY)
    with pytest.raises(ValueError, match=r"adapter_mask: `params` must hold adapters, got none"):
        split_adapters({"w": w})
    adapters, _ = split_adapters(add_adapters({"w": w}, 2, key=KEY))
    with pytest.raises(ValueError, match=r"join_adapters: `adapters` must be of the structure"):
        join_adapters(adapters, {"v": w})
