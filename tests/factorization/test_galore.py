"""GaLore against loops in NumPy float64 written from the paper, and as an Optax optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from jaxcompress.factorization._galore import galore
from tests import contract
from tests.conftest import counting_jit, lenient, mesh_of

adam = lambda *args, **kwargs: lenient(optax.adam(*args, **kwargs))  # noqa: E731
SHAPES = [(6, 9), (9, 6), (3, 3, 5)]
shapes = pytest.mark.parametrize("shape", SHAPES)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def gradients(shape, steps):
    """With singular values far apart, so that subspaces are well defined."""
    rows, columns = int(np.prod(shape[:-1])), shape[-1]
    out = []
    for i in range(steps):
        u, _, v = np.linalg.svd(draw(rows, columns, seed=10 + i), full_matrices=False)
        out.append(((u * 2.0 ** -np.arange(len(v))) @ v).reshape(shape))
    return out


class Momentum:
    """SGD with momentum 0.9 and learning rate 0.1."""

    optax = staticmethod(lambda: optax.sgd(0.1, momentum=0.9))

    def __init__(self, shape):
        self.m = np.zeros(shape)

    def __call__(self, r):
        self.m = 0.9 * self.m + r
        return -0.1 * self.m


class Adam:
    """Algorithm 2 of the paper, learning rate 0.1."""

    optax = staticmethod(lambda: adam(0.1, b1=0.9, b2=0.99, eps=1e-6))

    def __init__(self, shape):
        self.m, self.v, self.t = np.zeros(shape), np.zeros(shape), 0

    def __call__(self, r):
        self.t += 1
        self.m = 0.9 * self.m + 0.1 * r
        self.v = 0.99 * self.v + 0.01 * r**2
        m, v = self.m / (1 - 0.9**self.t), self.v / (1 - 0.99**self.t)
        return -0.1 * m / (np.sqrt(v) + 1e-6)


def reference(w, grads, rank, every, scale, make, max_rank=None):
    """Algorithm 2 in float64; a new vector is signed as the old one in its place."""
    shape, w = w.shape, w.reshape(-1, w.shape[-1])
    left, held = w.shape[0] <= w.shape[1], max_rank or rank
    rule = make((held, w.shape[1]) if left else (w.shape[0], held))
    basis = np.zeros((min(w.shape), held))
    for t, g in enumerate(grads):
        g = g.reshape(w.shape)
        if t % every == 0:
            u, _, vt = np.linalg.svd(g, full_matrices=False)
            new = np.zeros_like(basis)
            new[:, :rank] = (u if left else vt.T)[:, :rank]
            basis = np.where(np.sum(new * basis, axis=0) < 0, -new, new)
        small = basis.T @ g if left else g @ basis
        w = w + scale * (basis @ rule(small) if left else rule(small) @ basis.T)
    return w.reshape(shape)


def run(opt, params, grads, update=None):
    state, update = opt.init(params), update or jax.jit(opt.update)
    for g in grads:
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def trees(shape, steps=5):
    wide = lambda x: jnp.asarray(x, jnp.float32)  # noqa: E731
    params = {"w": wide(draw(*shape)), "b": jnp.ones(3)}
    grads = [{"w": wide(g), "b": jnp.ones(3)} for g in gradients(shape, steps)]
    return params, grads


@pytest.mark.parametrize("make", [Momentum, Adam])
@pytest.mark.parametrize(
    ("shape", "rank", "every", "scale"),
    [((6, 9), 2, 2, 0.25), ((9, 6), 3, 1, 1.0), ((9, 6), 5, 9, 2.0), ((3, 3, 5), 2, 3, 0.5)],
)
def test_equals_the_loop_of_the_paper(shape, make, rank, every, scale):
    params, grads = trees(shape)
    want = reference(draw(*shape), gradients(shape, 5), rank, every, scale, make)
    out, _ = run(galore(make.optax(), rank, every, scale), params, grads)
    np.testing.assert_allclose(out["w"], want, atol=1e-4)
    alone, _ = run(make.optax(), params["b"], [g["b"] for g in grads])
    np.testing.assert_allclose(out["b"], alone, rtol=1e-6)
    traced = galore(make.optax(), jnp.asarray(rank), every, scale, max_rank=5)
    np.testing.assert_allclose(run(traced, params, grads)[0]["w"], want, atol=1e-4)


def test_rank_every_and_scale_may_be_schedules():
    params, grads = trees((6, 9), steps=4)
    opt = galore(
        optax.sgd(0.1),
        lambda step: 1 + step // 2,
        lambda step: jnp.where(step < 2, 1, 2),
        lambda step: 1.0 - 0.25 * step.astype(jnp.float32),
        max_rank=3,
    )
    out, state = run(opt, params, grads)
    w = draw(6, 9)
    for t, g in enumerate(gradients((6, 9), 4)):
        if t != 3:
            u = np.linalg.svd(g)[0][:, : 1 + t // 2]
        w = w - 0.1 * (1 - 0.25 * t) * u @ u.T @ g
    np.testing.assert_allclose(out["w"], w, atol=1e-5)
    np.testing.assert_array_equal(np.any(state.basis["w"].vectors, axis=0), [True, True, False])


@shapes
def test_the_state_is_small(shape):
    params, _ = trees(shape)
    state = galore(adam(0.1), 2).init(params)
    rows, columns = int(np.prod(shape[:-1])), shape[-1]
    small = (2, columns) if rows <= columns else (rows, 2)
    assert state.inner[0].mu["w"].shape == small
    assert state.inner[0].nu["w"].shape == small
    assert state.inner[0].mu["b"].shape == (3,)
    assert state.basis["w"].vectors.shape == (min(rows, columns), 2)
    capped = galore(adam(0.1), jnp.asarray(2), max_rank=3).init(params)
    assert capped.inner[0].mu["w"].size == small[0] * small[1] // 2 * 3
    full = galore(adam(0.1), jnp.asarray(2)).init(params)
    assert full.inner[0].mu["w"].size == rows * columns


def test_full_rank_momentum_is_the_plain_optimizer():
    """A rotation of the gradient that is held does not change a linear rule."""
    params, grads = trees((6, 9))
    opt = Momentum.optax()
    a, _ = run(galore(opt, 6, 100), params, grads)
    b, _ = run(opt, params, grads)
    np.testing.assert_allclose(a["w"], b["w"], atol=1e-5)


def test_decay_inside_is_the_gradient_of_the_penalty_and_outside_that_of_the_paper():
    params, grads = trees((6, 9), steps=1)
    w, g = draw(6, 9), gradients((6, 9), 1)[0]
    p = np.linalg.svd(g)[0][:, :2]
    coupled = optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.1))
    out, _ = run(galore(coupled, 2), params, grads)
    np.testing.assert_allclose(out["w"], w - 0.1 * p @ p.T @ (g + 0.5 * w), atol=1e-5)
    outside = optax.chain(
        galore(optax.identity(), 2), optax.add_decayed_weights(0.5), optax.sgd(0.1)
    )
    out, _ = run(outside, params, grads)
    np.testing.assert_allclose(out["w"], w - 0.1 * (p @ p.T @ g + 0.5 * w), atol=1e-5)
    updates, _ = galore(optax.sgd(0.1), 2).update(grads[0], galore(optax.sgd(0.1), 2).init(params))
    np.testing.assert_allclose(updates["w"], -0.1 * p @ p.T @ g, atol=1e-5)


def test_a_step_without_a_find_keeps_the_subspace_and_compiles_once():
    params, grads = trees((6, 9))
    opt = galore(adam(0.1), 2, 3)
    update, state, bases = counting_jit(opt.update), opt.init(params), []
    for g in grads:
        _, state = update(g, state, params)
        bases.append(np.asarray(state.basis["w"].vectors))
    assert update.traces == 1
    assert int(state.step) == 5
    for i in (1, 2, 4):
        np.testing.assert_array_equal(bases[i], bases[i - 1])
    assert np.abs(bases[3] - bases[2]).max() > 0.1
    assert (np.sum(bases[3] * bases[2], axis=0) >= 0).all()
    np.testing.assert_allclose(bases[3].T @ bases[3], np.eye(2), atol=1e-5)


def test_vmap_over_numbers_equals_a_loop():
    params, grads = trees((9, 6), steps=4)
    make = lambda rate, rank, every: galore(  # noqa: E731
        optax.sgd(rate, momentum=0.9), rank, every, max_rank=3
    )
    one = lambda *numbers: run(make(*numbers), params, grads)[0]["w"]  # noqa: E731
    grid = (jnp.array([0.1, 0.2, 0.3]), jnp.array([1, 2, 3]), jnp.array([1, 2, 3]))
    mapped = jax.vmap(one)(*grid)
    for i in range(3):
        np.testing.assert_allclose(mapped[i], one(*(x[i] for x in grid)), atol=1e-5)


def test_a_batch_still_has_a_conditional():
    params, _ = trees((6, 9))
    opt = galore(optax.sgd(0.1), 2, 3)
    many = jax.tree.map(lambda w: jnp.stack([w, 2 * w]), params)
    state = jax.vmap(opt.init)(many)
    assert state.step.shape == (2,)
    update = jax.vmap(opt.update)
    # The predicate is one scalar: whether any of the batch is due.
    assert "stablehlo.case" in jax.jit(update).lower(many, state, many).as_text()
    updates, _ = update(many, state, many)
    want, _ = opt.update(params, opt.init(params), params)
    np.testing.assert_allclose(updates["w"][0], want["w"], atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_dtypes(dtype):
    params, grads = (jax.tree.map(lambda x: x.astype(dtype), t) for t in trees((6, 9), steps=3))
    opt = galore(Momentum.optax(), 2, 2)
    out, state = run(opt, params, grads)
    assert out["w"].dtype == dtype
    assert state.inner[0].trace["w"].dtype == dtype
    dtypes = lambda tree: jax.tree.map(lambda x: x.dtype, tree)  # noqa: E731
    assert dtypes(state) == dtypes(opt.init(params))
    wide = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)  # noqa: E731
    want, _ = run(opt, wide(params), wide(grads))
    np.testing.assert_allclose(wide(out["w"]), want["w"], atol=0.03)


def test_columns_beyond_the_rank_add_nothing_even_where_the_optimizer_divides_by_zero():
    params, grads = trees((6, 9), steps=3)
    bare = adam(0.1, eps=0.0)
    out, _ = run(galore(bare, jnp.asarray(2), 2, max_rank=4), params, grads)
    want, _ = run(galore(bare, 2, 2), params, grads)
    np.testing.assert_allclose(out["w"], want["w"], atol=1e-5)


def test_training_inside_scan_reaches_the_optimum():
    params, _ = trees((9, 6))
    goal = jnp.asarray(draw(9, 6, seed=3), jnp.float32)
    opt = galore(adam(optax.linear_schedule(0.1, 0.0, 600)), 2, 5)

    def step(carry, _):
        w, state = carry
        updates, state = opt.update(w - goal, state, w)
        return (optax.apply_updates(w, updates), state), None

    (w, _), _ = jax.lax.scan(step, (params["w"], opt.init(params["w"])), length=600)
    assert np.linalg.norm(w - goal) < 0.02 * np.linalg.norm(params["w"] - goal)


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_sharded_equals_one_device(kind):
    params, opt = contract.params(), galore(adam(0.1), 2, 2)
    want, _ = run(opt, params, [params] * 3)
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        specs = {"a": {"bias": P("d"), "kernel": P("d", None)}, "b": {"kernel": P(None, "d")}}
        shardings = jax.tree.map(lambda s: NamedSharding(mesh, s), specs)
        sharded = jax.device_put(params, shardings)
        state = jax.jit(opt.init)(sharded)
        update = jax.jit(opt.update)
        grads, w = sharded, sharded
        for _ in range(3):
            before = jax.tree.map(jax.typeof, state)
            updates, state = update(grads, state, w)
            assert jax.tree.map(jax.typeof, state) == before
            w = jax.tree.map(lambda a, b: a + b, w, updates)
        if kind == "explicit":
            moments = state.inner[0].mu
            # [16, 8] sharded by rows: the long side.
            assert jax.typeof(moments["a"]["kernel"]).sharding.spec == P("d", None)
            assert jax.typeof(w["b"]["kernel"]).sharding.spec == P(None, "d")
    for a, b in zip(jax.tree.leaves(w), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_none_empty_zero_and_low_rank_leaves():
    factors = jc.arrays.LowRank(jnp.ones((4, 2)), jnp.ones((2, 5)))
    params = {
        "none": None,
        "empty": jnp.zeros((0, 4)),
        "zero": jnp.zeros((4, 4)),
        "scalar": jnp.ones(()),
        "tiny": jnp.full((3, 4), 1e-30),
        "factors": factors,
        "frozen": jnp.ones((2, 2)),
    }
    opt = galore(optax.sgd(0.1), 1, 2)
    state = opt.init(params)
    grads = {**params, "frozen": None}
    updates, after = jax.jit(opt.update)(grads, state, params)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(updates))
    assert updates["none"] is None
    assert updates["frozen"] is None
    assert updates["empty"].shape == (0, 4)
    np.testing.assert_array_equal(updates["zero"], 0)
    np.testing.assert_allclose(updates["tiny"], -1e-31, rtol=1e-5)
    np.testing.assert_allclose(updates["factors"].u, -0.1, rtol=1e-5)
    bad, _ = opt.update({**grads, "tiny": jnp.full((3, 4), jnp.nan)}, state, params)
    assert np.isnan(bad["tiny"]).all()
    np.testing.assert_allclose(bad["factors"].u, -0.1, rtol=1e-5)


def test_where_and_extra_arguments():
    params = {"a": jnp.ones((4, 5)), "b": jnp.ones((4, 5))}
    seen = []

    def update(updates, state, params=None, *, value, **extra):
        seen.append((value, jax.tree.map(jnp.shape, updates), jax.tree.map(jnp.shape, params)))
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
    opt = galore(inner, 1, where="a")
    opt.update(params, opt.init(params), params, value=3)
    small = {"a": (1, 5), "b": (4, 5)}
    assert seen == [(3, small, small)]


def test_gradient_of_the_learning_rate():
    params, grads = trees((6, 9), steps=3)

    def loss(rate):
        return jnp.sum(jnp.square(run(galore(optax.sgd(rate), 2, 2), params, grads)[0]["w"]))

    slope = (loss(0.11) - loss(0.09)) / 0.02
    np.testing.assert_allclose(jax.grad(loss)(0.1), slope, rtol=1e-2)


def test_what_does_not_fit_is_refused():
    params = {"w": jnp.ones((3, 2)), "b": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"galore: .*two or more dim.*float32\[3\] at 'b'"):
        galore(optax.sgd(0.1), 1, where="b").init(params)
    with pytest.raises(ValueError, match=r"galore: `rank` must be .* at least 1"):
        galore(optax.sgd(0.1), 0)
    with pytest.raises(ValueError, match=r"galore: `every` must"):
        galore(optax.sgd(0.1), 1, 0)
    with pytest.raises(TypeError, match=r"galore: `scale` must"):
        galore(optax.sgd(0.1), 1, scale="large")
    with pytest.raises(ValueError, match=r"galore: `max_rank` must"):
        galore(optax.sgd(0.1), 1, max_rank=0)
    with pytest.raises(TypeError, match=r"galore: `optimizer` must"):
        galore(0.1, 1)
