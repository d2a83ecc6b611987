"""Dynamical low-rank training against the paper's loop in NumPy float64, and in Optax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from jaxcompress.factorization import dynamical_low_rank
from jaxcompress.factorization._integrator import gradient
from tests import contract
from tests.conftest import counting_jit, lenient, mesh_of


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def thin(rows, columns, rank, seed=0):
    return draw(rows, rank, seed=seed) @ draw(rank, columns, seed=seed + 1) / rank**0.5


def kept(values, rank, tolerance, width):
    """Of the paper: the smallest rank whose tail is at most a fraction of the norm."""
    if tolerance is None:
        return rank
    norm = np.linalg.norm(values)
    tails = [np.linalg.norm(values[r:]) for r in range(1, len(values) + 1)]
    return min(width, 1 + next(i for i, tail in enumerate(tails) if tail <= tolerance * norm))


def reference(w, grad, rate, steps, rank=None, tolerance=None, width=None):
    """Algorithm 1 of the paper with one step of SGD in K, L and S, in float64."""
    shape, w = w.shape, w.reshape(-1, w.shape[-1])
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    r = kept(s, rank, tolerance, width)
    u, s, v, out = u[:, :r], np.diag(s[:r]), vt[:r].T, []
    for _ in range(steps):
        g = grad(w.reshape(shape)).reshape(w.shape)
        k_step, l_step = u @ s - rate * g @ v, v @ s.T - rate * g.T @ u
        new_u = np.linalg.qr(np.hstack([u, k_step]))[0]
        new_v = np.linalg.qr(np.hstack([v, l_step]))[0]
        core = new_u.T @ u @ s @ v.T @ new_v - rate * new_u.T @ g @ new_v
        p, values, qt = np.linalg.svd(core)
        r = kept(values, rank, tolerance, width)
        u, s, v = new_u @ p[:, :r], np.diag(values[:r]), new_v @ qt[:r].T
        w = u @ s @ v.T
        out.append((w.reshape(shape), r))
    return out


def quadratic(shape, goal=None, seed=5):
    """A loss of curvature at most 1.5, and its gradient, for NumPy and JAX alike."""
    goal = draw(*shape, seed=seed) if goal is None else goal
    weight = np.random.default_rng(seed + 1).uniform(0.5, 1.5, size=shape)

    def loss(w):
        return 0.5 * (weight.astype(w.dtype) * (w - goal.astype(w.dtype)) ** 2).sum()

    return loss, lambda w: weight.astype(w.dtype) * (w - goal.astype(w.dtype))


def run(opt, w, grad, steps):
    """All params and states of an ordinary loop."""

    def step(carry, _):
        w, state = carry
        updates, state = opt.update(grad(w), state, w)
        with jax.numpy_dtype_promotion("standard"):
            w = optax.apply_updates(w, updates)
        return (w, state), (w, state)

    loop = lambda w: jax.lax.scan(step, (w, opt.init(w)), length=steps)[1]  # noqa: E731
    return jax.jit(loop)(w)


def f32(x):
    return jnp.asarray(x, jnp.float32)


@pytest.mark.parametrize(
    ("shape", "rank", "tolerance", "width"),
    [
        ((9, 6), 2, None, None),
        ((9, 6), 2, None, 4),
        ((6, 9), 6, None, None),
        ((3, 3, 6), None, 0.3, 5),
    ],
)
def test_equals_the_loop_of_the_paper(shape, rank, tolerance, width):
    _, grad = quadratic(shape)
    w = draw(*shape)
    want = reference(w, grad, 0.3, 10, rank, tolerance, width)
    traced = rank if width is None or rank is None else jnp.asarray(rank)
    opt = dynamical_low_rank(optax.sgd(0.3), traced, tolerance, max_rank=width)
    params, state = run(opt, f32(w), grad, 10)
    for i, (matrix, r) in enumerate(want):
        np.testing.assert_allclose(params[i], matrix, atol=2e-5)
        assert int(state.latent.rank[i]) == r
    if tolerance:
        assert len({r for _, r in want}) > 1


def test_an_exact_leaf_and_a_gradient_in_its_tangent_space():
    """The step is the plain one, truncated by Eckart and Young; exact with twice the rank."""
    w = thin(9, 6, 2)
    u, _, vt = np.linalg.svd(w, full_matrices=False)
    u, v = u[:, :2], vt[:2].T
    g = u @ draw(2, 6, seed=3) + draw(9, 2, seed=4) @ v.T
    for opt, r in (
        (dynamical_low_rank(optax.sgd(0.5), 2), 2),
        (dynamical_low_rank(optax.sgd(0.5), tolerance=0.0, max_rank=4), 4),
    ):
        updates, state = jax.jit(opt.update)(f32(g), jax.jit(opt.init)(f32(w)), f32(w))
        p, s, qt = np.linalg.svd(w - 0.5 * g, full_matrices=False)
        want = (p[:, :r] * s[:r]) @ qt[:r]
        np.testing.assert_allclose(f32(w) + updates, want, atol=1e-5)
        assert int(jc.latent(state).rank) >= r
    np.testing.assert_allclose(want, w - 0.5 * g, atol=1e-6)


def test_the_loss_falls_by_the_norm_of_the_projected_gradient():
    """Without a truncation the bound of plain SGD holds, in the bases found."""
    loss, grad = quadratic((9, 8))
    w, rate, bound = f32(thin(9, 8, 2)), 0.6, 1.5
    opt = dynamical_low_rank(optax.sgd(rate), tolerance=0.0, max_rank=8)
    state = opt.init(w)
    assert int(state.latent.rank) <= 8
    updates, after = jax.jit(opt.update)(grad(w), state, w)
    u, v = (np.asarray(x, np.float64) for x in (after.latent.u, after.latent.v))
    square = np.sum((u.T @ np.asarray(grad(w), np.float64) @ v) ** 2)
    fall = loss(np.asarray(w, np.float64)) - loss(np.asarray(w + updates, np.float64))
    assert fall >= rate * (1 - rate * bound / 2) * square - 1e-4 * abs(fall)
    rank2 = dynamical_low_rank(optax.sgd(rate), 2)
    losses = [float(loss(x)) for x in run(rank2, w, grad, 20)[0]]
    assert (np.diff(losses) <= 1e-5).all()


def test_tiny_singular_values_neither_stall_nor_explode():
    goal = thin(9, 8, 4, seed=7)
    loss, grad = quadratic((9, 8), goal)
    u, _, vt = np.linalg.svd(draw(9, 8), full_matrices=False)
    w = f32((u[:, :4] * np.array([1.0, 1e-3, 1e-5, 1e-7])) @ vt[:4])
    ours, state = run(dynamical_low_rank(optax.sgd(0.6), 4), w, grad, 60)
    factors, _ = run(jc.reparametrized(optax.sgd(0.1), jc.low_rank_factors(4)), w, grad, 60)
    start = float(loss(w))
    assert loss(ours[-1]) < 1e-4 * start
    assert loss(factors[-1]) > 100 * loss(ours[-1])
    # With a learning rate that is stable for the weight, the factors diverge.
    large = f32(20 * np.asarray(w))
    exploded, _ = run(jc.reparametrized(optax.sgd(0.6), jc.low_rank_factors(4)), large, grad, 60)
    stable, _ = run(dynamical_low_rank(optax.sgd(0.6), 4), large, grad, 60)
    assert not loss(exploded[-1]) < float(loss(large))
    assert loss(stable[-1]) < 1e-4 * start
    np.testing.assert_allclose(state.latent.u[-1].T @ state.latent.u[-1], np.eye(4), atol=1e-5)


def test_the_tolerance_finds_a_planted_rank():
    noise = 1e-3 * draw(9, 8, seed=2)
    for planted in (1, 3, 4):
        goal = f32(thin(9, 8, planted, seed=7) + noise)
        opt = dynamical_low_rank(optax.sgd(0.5), tolerance=0.03, max_rank=6)
        w, state = run(opt, f32(0.1 * draw(9, 8)), lambda w, goal=goal: w - goal, 40)
        assert int(state.latent.rank[-1]) == planted
        assert int(opt.init(f32(0.1 * draw(9, 8))).latent.rank) == 6
        last = jax.tree.map(lambda x: x[-1], state)
        packed = jc.pack(last, w[-1])
        assert packed.rank == planted
        np.testing.assert_allclose(packed.todense(), w[-1], atol=1e-5)


def momentum(w, grad, rate, decay, steps, rank):
    """A moment of dense shape, projected on the tangent space of each step; float64."""
    shape, w = w.shape, w.reshape(-1, w.shape[-1])
    m = np.zeros_like(w)
    for _ in range(steps):
        u, s, vt = np.linalg.svd(w, full_matrices=False)
        u, vt = u[:, :rank], vt[:rank]
        w = (u * s[:rank]) @ vt
        tangent = lambda x: u @ (u.T @ x) + (x - u @ (u.T @ x)) @ vt.T @ vt  # noqa: B023, E731
        m = decay * tangent(m) + tangent(grad(w.reshape(shape)).reshape(w.shape))
        w = w - rate * m
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    return ((u[:, :rank] * s[:rank]) @ vt[:rank]).reshape(shape)


def test_moments_are_carried_along_with_the_bases():
    """Singular values start equal: as vectors of an SVD the bases would turn freely."""
    q = np.linalg.qr(draw(9, 6))[0]
    w = 3 * q[:, :3] @ np.linalg.qr(draw(6, 6, seed=1))[0][:3]
    _, grad = quadratic((9, 6))
    opt = dynamical_low_rank(optax.sgd(1e-3, momentum=0.9), 3)
    params, _ = run(opt, f32(w), grad, 10)
    want = momentum(w, grad, 1e-3, 0.9, 10, 3)
    moved = np.linalg.norm(want - w)
    assert np.linalg.norm(params[-1] - want) < 0.02 * moved
    # All of the space: nothing is lost, and the coordinates stay.
    _, grad = quadratic((6, 6))
    full, _ = run(dynamical_low_rank(optax.sgd(0.1, momentum=0.9), 6), f32(w[:6]), grad, 10)
    plain, _ = run(optax.sgd(0.1, momentum=0.9), f32(w[:6]), grad, 10)
    np.testing.assert_allclose(full, plain, atol=2e-5)


def test_what_the_inner_optimizer_sees_has_the_norm_of_the_projected_gradient():
    w, g = draw(9, 6), draw(9, 6, seed=1)
    seen = []

    def update(updates, state, params=None, **extra):
        seen.append((updates, params, extra))
        return jax.tree.map(lambda x: -0.5 * x, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
    opt = dynamical_low_rank(inner, jnp.asarray(2), max_rank=3)
    params = {"w": f32(w), "b": jnp.ones(3)}
    _, state = opt.update({"w": f32(g), "b": jnp.ones(3)}, opt.init(params), params, value=3)
    (grads, weights, extra) = seen[0]
    assert extra == {"value": 3}
    np.testing.assert_array_equal(grads["b"], 1)
    u, _, vt = np.linalg.svd(w, full_matrices=False)
    u, v = u[:, :2], vt[:2].T
    wide_u = np.linalg.qr(np.hstack([u, g @ v]))[0]
    wide_v = np.linalg.qr(np.hstack([v, g.T @ u]))[0]
    norm = np.linalg.norm(wide_u.T @ g @ wide_v)
    np.testing.assert_allclose(optax.tree.norm(grads["w"]), norm, rtol=1e-5)
    np.testing.assert_allclose(
        optax.tree.norm(weights["w"]), np.linalg.norm(u.T @ w @ v), rtol=1e-5
    )
    shapes = [x.shape for x in grads["w"]]
    assert shapes == [(3, 3), (9, 3), (6, 3), (3, 3)]
    assert int(state.inner.step) == 1


def test_directions_of_the_corner_are_those_of_the_gradient():
    """Of its sign too: what an optimizer remembers of the corner would turn around."""
    u, v = np.linalg.qr(draw(9, 3))[0], np.linalg.qr(draw(8, 3, seed=1))[0]
    for seed in range(4):
        g = draw(9, 8, seed=seed)
        seen = gradient(f32(g), f32(u), f32(v))
        outside = (np.eye(9) - u @ u.T) @ g @ v
        np.testing.assert_allclose(seen.numbers.left, outside, atol=1e-5)
        np.testing.assert_allclose(seen.left.T @ seen.left, np.eye(3), atol=1e-5)
        assert (np.sum(seen.left * outside, axis=0) > 0).all()
        assert (np.sum(seen.right * seen.numbers.right, axis=0) > 0).all()
        corner = np.asarray(seen.left).T @ g @ np.asarray(seen.right)
        np.testing.assert_allclose(seen.numbers.corner, corner, atol=1e-5)


def test_decay_inside_shrinks_the_whole_weight():
    w = f32(thin(9, 6, 2))
    opt = dynamical_low_rank(lenient(optax.adamw(0.1, weight_decay=0.5)), 2)
    updates, _ = opt.update(jnp.zeros((9, 6)), opt.init(w), w)
    np.testing.assert_allclose(w + updates, 0.95 * w, atol=1e-5)


def test_adam_reaches_the_optimum_inside_scan():
    goal = thin(9, 8, 3, seed=7)
    loss, grad = quadratic((9, 8), goal)
    rate = optax.linear_schedule(0.2, 0.0, 300)
    w = f32(draw(9, 8))
    params, _ = run(dynamical_low_rank(lenient(optax.adam(rate)), 3), w, grad, 300)
    assert loss(params[-1]) < 1e-4 * loss(w)


def test_rounding_outside_of_a_full_basis_is_not_amplified():
    """Adam's first step has the length of the learning rate in every coordinate, noise or not."""
    _, grad = quadratic((6, 6))
    w = f32(draw(6, 6))
    opt = dynamical_low_rank(lenient(optax.adam(0.1)), 6)
    params, state = run(opt, w, grad, 1)
    start = opt.init(w).latent
    moved = start.u.T @ (params[0] - w) @ start.v
    np.testing.assert_allclose(np.abs(moved), 0.1, rtol=1e-3)
    assert int(state.latent.rank[0]) == 6


def test_rank_and_tolerance_may_be_schedules():
    _, grad = quadratic((9, 6))
    opt = dynamical_low_rank(optax.sgd(0.1), lambda step: 5 - 2 * (step // 2), max_rank=5)
    w, state = run(opt, f32(draw(9, 6)), grad, 6)
    assert state.latent.rank.tolist() == [5, 5, 3, 3, 1, 1]
    for matrix, r in zip(w, (5, 5, 3, 3, 1, 1), strict=True):
        assert np.linalg.matrix_rank(matrix, rtol=1e-5) == r
    growing = dynamical_low_rank(optax.sgd(0.1), lambda step: 1 + 3 * (step // 2), max_rank=4)
    w, state = run(growing, f32(draw(9, 6)), grad, 4)
    assert state.latent.rank.tolist() == [1, 1, 4, 4]
    assert np.linalg.matrix_rank(w[-1], rtol=1e-5) == 4
    loose = lambda step: jnp.where(step < 2, 0.01, 1.0)  # noqa: E731
    _, state = run(dynamical_low_rank(optax.sgd(0.1), tolerance=loose), f32(draw(9, 6)), grad, 4)
    assert state.latent.rank.tolist() == [6, 6, 1, 1]


@pytest.mark.parametrize("knob", ["rank", "tolerance"])
def test_vmap_over_numbers_equals_a_loop_and_one_program_serves_all(knob):
    _, grad = quadratic((9, 6))
    inner = lambda: optax.sgd(0.3, momentum=0.5)  # noqa: E731

    def one(number):
        opt = dynamical_low_rank(inner(), **{knob: number}, max_rank=4)
        w, state = run(opt, f32(draw(9, 6)), grad, 4)
        return w[-1], state.latent.rank[-1]

    grid = jnp.array([1, 2, 4]) if knob == "rank" else jnp.array([0.1, 0.36, 0.6])
    mapped, ranks = jax.vmap(one)(grid)
    alone = counting_jit(one)
    for i in range(3):
        want, rank = alone(grid[i])
        np.testing.assert_allclose(mapped[i], want, atol=2e-5)
        assert int(ranks[i]) == int(rank)
    assert alone.traces == 1
    assert len(set(ranks.tolist())) == 3


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_dtypes_land_on_the_factors_to_the_last_bit(dtype):
    _, grad = quadratic((9, 6))
    opt = dynamical_low_rank(optax.sgd(0.3, momentum=0.5), 2)
    w = jnp.asarray(draw(9, 6), dtype)
    params, state = run(opt, w, grad, 4)
    assert params.dtype == dtype
    assert state.latent.u.dtype == state.inner.inner[0].trace.left.dtype == jnp.float32
    last = jax.tree.map(lambda x: x[-1], state)
    np.testing.assert_array_equal(params[-1], jc.latent(last).todense())
    want, _ = run(opt, w.astype(jnp.float32), grad, 4)
    np.testing.assert_allclose(params[-1].astype(jnp.float32), want[-1], atol=0.05)
    packed = jc.pack(last, params[-1])
    assert packed.u.dtype == dtype


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_sharded_equals_one_device(kind):
    params = contract.params()
    opt = dynamical_low_rank(optax.sgd(0.3), tolerance=0.2, max_rank=3)
    update = jax.jit(opt.update)

    def steps(w):
        state = jax.jit(opt.init)(w)
        for _ in range(3):
            before = jax.tree.map(jax.typeof, state)
            updates, state = update(w, state, w)
            assert jax.tree.map(jax.typeof, state) == before
            w = jax.tree.map(lambda a, b: a + b, w, updates)
        return w

    want, mesh = steps(params), mesh_of(kind)
    with jax.set_mesh(mesh):
        specs = {"a": {"bias": P("d"), "kernel": P("d", None)}, "b": {"kernel": P(None, "d")}}
        shardings = jax.tree.map(lambda s: NamedSharding(mesh, s), specs)
        w = steps(jax.device_put(params, shardings))
        if kind == "explicit":
            assert jax.typeof(w["a"]["kernel"]).sharding.spec == P("d", None)
    for a, b in zip(jax.tree.leaves(w), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_none_empty_zero_and_integer_leaves():
    params = {
        "none": None,
        "empty": jnp.zeros((0, 4)),
        "zero": jnp.zeros((4, 5)),
        "one": jnp.ones((1, 1)),
        "bias": jnp.ones(4),
        "frozen": f32(draw(3, 4)),
        "bad": f32(draw(3, 4)),
    }
    opt = dynamical_low_rank(optax.sgd(0.1), 2)
    state = opt.init(params)
    grads = {**params, "frozen": None, "zero": f32(draw(4, 5)), "bad": jnp.full((3, 4), jnp.nan)}
    update = jax.jit(opt.update)
    updates, after = update(grads, state, params)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert updates["none"] is updates["frozen"] is None
    assert updates["empty"].shape == (0, 4)
    np.testing.assert_allclose(updates["bias"], -0.1, rtol=1e-6)
    np.testing.assert_allclose(updates["one"], -0.1, rtol=1e-5)
    assert np.isnan(updates["bad"]).all()
    assert np.abs(updates["zero"]).max() > 0
    # Nothing happened: the directions of an all-zero leaf are still there.
    nothing = jax.tree.map(jnp.zeros_like, params)
    still, held = update(nothing, state, params)
    np.testing.assert_array_equal(still["zero"], 0)
    for latent in (state.latent["zero"], held.latent["zero"]):
        for q in (latent.u, latent.v):
            np.testing.assert_allclose(q.T @ q, np.eye(2), atol=1e-6)
    integers = {"w": f32(draw(3, 4)), "i": jnp.ones((3, 4), jnp.int32)}
    assert isinstance(opt.init(integers).latent["i"], optax.MaskedNode)
    with pytest.raises(TypeError, match=r"dynamical_low_rank.*floating-point.*'i'"):
        dynamical_low_rank(optax.sgd(0.1), 2, where="i").init(integers)


def test_columns_beyond_the_rank_add_nothing_even_where_the_optimizer_divides_by_zero():
    _, grad = quadratic((9, 6))
    bare = lenient(optax.adam(0.1, eps=0.0))
    wide, state = run(
        dynamical_low_rank(bare, jnp.asarray(2), max_rank=4), f32(draw(9, 6)), grad, 3
    )
    want, _ = run(dynamical_low_rank(bare, 2), f32(draw(9, 6)), grad, 3)
    np.testing.assert_allclose(wide[0], want[0], atol=1e-5)
    np.testing.assert_array_equal(state.latent.u[:, :, 2:], 0)
    np.testing.assert_array_equal(state.latent.s[:, 2:], 0)


def test_inside_of_optax_wrappers():
    params = {"w": f32(draw(9, 6)), "x": f32(draw(9, 6, seed=1)), "b": jnp.ones(3)}
    opt = dynamical_low_rank(optax.sgd(0.3), 2)

    @functools.partial(jax.jit, static_argnums=0)
    def steps(opt, *grads):
        state = opt.init(params)
        for g in grads:
            updates, state = opt.update(g, state, params)
        return updates, state

    masked = optax.masked(opt, {"w": True, "x": False, "b": True})
    updates, state = steps(masked, params)
    np.testing.assert_array_equal(updates["x"], params["x"])
    want = updates["w"]
    assert int(jc.latent(state, params)["w"].rank) == 2
    packed = jc.pack(state, params)
    assert packed["w"].rank == 2
    assert packed["x"] is params["x"]
    np.testing.assert_allclose(packed["w"].todense(), params["w"] + want, atol=1e-5)
    bad = {**params, "w": jnp.full((9, 6), jnp.nan)}
    safe, _ = steps(lenient(optax.apply_if_finite(masked, 3)), bad, params)
    np.testing.assert_allclose(safe["w"], want, atol=1e-5)
    params = {"w": params["w"]}
    around = lenient(optax.MultiSteps(opt, 2).gradient_transformation())
    inside = dynamical_low_rank(
        lenient(optax.MultiSteps(optax.sgd(0.3), 2).gradient_transformation()), 2
    )
    for accumulating in (around, inside):
        updates, state = steps(accumulating, params, params)
        np.testing.assert_allclose(updates["w"], want, atol=1e-5)
    assert int(state.inner.step) == 1
    np.testing.assert_array_equal(steps(inside, params)[0]["w"], 0)


def test_gradient_of_the_learning_rate_holds_the_bases():
    _, grad = quadratic((6, 6))

    def loss(rate):
        w, _ = run(dynamical_low_rank(optax.sgd(rate), 6), f32(draw(6, 6)), grad, 3)
        return jnp.sum(jnp.square(w[-1]))

    slope = (loss(0.11) - loss(0.09)) / 0.02
    np.testing.assert_allclose(jax.grad(loss)(0.1), slope, rtol=1e-2)
    # The gradient is the leaf itself: no direction is new.
    opt = dynamical_low_rank(optax.sgd(0.1), 2)
    square = lambda w: jnp.sum(jnp.square(run(opt, w, lambda w: w, 2)[0][-1]))  # noqa: E731
    for w in (jnp.eye(6), jnp.zeros((6, 6))):
        assert np.isfinite(jax.grad(square)(w)).all()


def test_what_does_not_fit_is_refused():
    w = jnp.ones((3, 2))
    with pytest.raises(ValueError, match=r"dynamical_low_rank: `rank` must be given, or else"):
        dynamical_low_rank(optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"dynamical_low_rank: `rank` must be given, or else"):
        dynamical_low_rank(optax.sgd(0.1), 1, 0.1)
    with pytest.raises(ValueError, match=r"dynamical_low_rank: `rank` must .* at least 1"):
        dynamical_low_rank(optax.sgd(0.1), 0)
    with pytest.raises(ValueError, match=r"dynamical_low_rank: `tolerance` must"):
        dynamical_low_rank(optax.sgd(0.1), tolerance=-0.1)
    with pytest.raises(ValueError, match=r"dynamical_low_rank: `max_rank` must"):
        dynamical_low_rank(optax.sgd(0.1), 1, max_rank=0)
    with pytest.raises(TypeError, match=r"dynamical_low_rank: `optimizer` must"):
        dynamical_low_rank(0.1, 1)
    with pytest.raises(ValueError, match=r"dynamical_low_rank: .*two or more dim.*float32\[3\]"):
        dynamical_low_rank(optax.sgd(0.1), 1, where="b").init({"b": jnp.ones(3)})
    opt = dynamical_low_rank(optax.sgd(0.1), 1)
    with pytest.raises(ValueError, match=r"dynamical_low_rank: `params` must be given"):
        opt.update(w, opt.init(w))
