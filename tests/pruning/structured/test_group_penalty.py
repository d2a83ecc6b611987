"""Penalties on units and their proximal operator, against loops and minimisation in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from scipy.optimize import minimize

import jaxcompress as jc
from jaxcompress.pruning.structured._kept_units import kept_units
from jaxcompress.pruning.structured._lasso import proximal_groups, soft_threshold_units
from jaxcompress.pruning.structured._penalty import group_penalty, unit_strengths
from tests.conftest import counting_jit, lenient, mesh_of
from tests.pruning.structured import by_hand

models = pytest.mark.parametrize("name", by_hand.MODELS)


def counted(path):
    return path not in ("norm/mean", "norm/var")


def applied(params, updates):
    with jax.numpy_dtype_promotion("standard"):
        return optax.apply_updates(params, updates)


def random_strengths(model, seed=3):
    rng = np.random.default_rng(seed)
    return {
        g.name: rng.uniform(0.5, 2.0, g.shape).astype(np.float32) for g in model.dependencies.groups
    }


def size_of(model, group, layer, unit):
    return sum(n.sum() for n in by_hand.places(model, group, layer, unit, counted).values())


def penalty_by_loops(model, leaves, strengths=None, by_size=True, squared=False):
    total = 0.0
    for group in model.dependencies.groups:
        for layer, unit in by_hand.units(group):
            norm = by_hand.norm_of(model, leaves, group, layer, unit, counted)
            weight = np.sqrt(size_of(model, group, layer, unit)) if by_size and not squared else 1.0
            if strengths is not None:
                weight *= float(strengths[group.name][(*layer, unit)])
            total += weight * (norm**2 if squared else norm)
    return total


@models
@pytest.mark.parametrize("by_size", [True, False])
@pytest.mark.parametrize("squared", [True, False])
def test_penalty_and_its_gradient_are_those_of_loops(name, by_size, squared):
    model = by_hand.MODELS[name]()
    strengths = random_strengths(model)
    options = {"by_size": by_size, "squared": squared}
    plain = jax.jit(lambda p: group_penalty(model.dependencies, p, **options))(model.params)
    leaves = by_hand.by_paths(model.params)
    want = penalty_by_loops(model, leaves, **options)
    assert float(plain) == pytest.approx(want, rel=2e-6)
    weighted = lambda p: group_penalty(model.dependencies, p, strengths=strengths, **options)  # noqa: E731
    want = penalty_by_loops(model, leaves, strengths, **options)
    value, grads = jax.jit(jax.value_and_grad(weighted))(model.params)
    assert float(value) == pytest.approx(want, rel=2e-6)
    # The gradient along a direction, by central differences of the loops.
    grads = by_hand.by_paths(grads)
    rng = np.random.default_rng(1)
    move = {path: rng.normal(size=w.shape) for path, w in leaves.items()}
    h = 1e-5
    up, down = (
        penalty_by_loops(
            model, {p: w + s * h * move[p] for p, w in leaves.items()}, strengths, **options
        )
        for s in (1, -1)
    )
    slope = sum(np.sum(grads[path] * move[path]) for path in leaves)
    assert slope == pytest.approx((up - down) / (2 * h), rel=1e-4)
    for path in ("norm/mean", "norm/var"):
        if path in grads:
            np.testing.assert_array_equal(grads[path], 0)


def test_gradient_is_zero_at_zero_units_and_finite_at_all_sizes():
    model = by_hand.mlp()
    zero = jax.tree.map(jnp.zeros_like, model.params)
    zero["a"]["bias"] = jnp.array([0, 1e-30, 1e30, 1, 0, 0, 0, 0], jnp.float32)
    value, grads = jax.value_and_grad(
        lambda p: group_penalty(model.dependencies, p, by_size=False)
    )(zero)
    assert float(value) == pytest.approx(1e30, rel=1e-6)
    np.testing.assert_array_equal(grads["a"]["bias"], [0, 1, 1, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(grads["b"]["kernel"], 0)
    # Second derivatives are finite too.
    hessian = jax.hessian(
        lambda b: group_penalty(model.dependencies, {**zero, "a": {**zero["a"], "bias": b}})
    )(jnp.zeros(8))
    assert np.isfinite(hessian).all()


def test_strengths_are_those_of_the_equation():
    model = by_hand.stack()
    group, leaves = model.dependencies.groups[0], by_hand.by_paths(model.params)
    found = jax.jit(lambda a: unit_strengths(model.dependencies, model.params, a))(3.0)["up[2]"]
    squares = np.zeros(group.shape)
    for layer, unit in by_hand.units(group):
        squares[(*layer, unit)] = by_hand.norm_of(model, leaves, group, layer, unit) ** 2
    top, low = squares.max(1, keepdims=True), squares.min(1, keepdims=True)
    np.testing.assert_allclose(found, 2.0 ** (3 * (top - squares) / (top - low)), rtol=1e-4)
    alike = jax.tree.map(jnp.ones_like, model.params)
    for params in (alike, jax.tree.map(jnp.zeros_like, alike)):
        np.testing.assert_array_equal(unit_strengths(model.dependencies, params)["up[2]"], 1)
    huge = jax.tree.map(lambda w: 1e25 * w, model.params)
    np.testing.assert_allclose(
        unit_strengths(model.dependencies, huge, 3.0)["up[2]"], found, rtol=1e-4
    )
    slope = jax.grad(lambda p: unit_strengths(model.dependencies, p)["up[2]"].sum())(model.params)
    assert all(not np.any(g) for g in jax.tree.leaves(slope))


def in_turn_by_loops(model, leaves, strength, strengths=None, by_size=True):
    """Each group on what the last one left; the factors of one group from the same norms."""
    leaves = {path: w.copy() for path, w in leaves.items()}
    zeros = {path: np.zeros(w.shape, bool) for path, w in leaves.items()}
    for group in model.dependencies.groups:
        factors = []
        for layer, unit in by_hand.units(group):
            least = strength * (np.sqrt(size_of(model, group, layer, unit)) if by_size else 1.0)
            if strengths is not None:
                least *= float(strengths[group.name][(*layer, unit)])
            norm = by_hand.norm_of(model, leaves, group, layer, unit, counted)
            factors.append((layer, unit, 0.0 if norm <= least else 1 - least / norm))
        for layer, unit, factor in factors:
            for path, n in by_hand.places(model, group, layer, unit, counted).items():
                leaves[path] = leaves[path] * factor**n
                zeros[path] |= (n > 0) & (factor == 0)
    return leaves, zeros


@models
@pytest.mark.parametrize("by_size", [True, False])
def test_the_operator_is_that_of_loops_and_zeros_are_exact(name, by_size):
    model = by_hand.MODELS[name]()
    leaves, strengths = by_hand.by_paths(model.params), random_strengths(model)
    norms = [
        by_hand.norm_of(model, leaves, g, *u, counted)
        / (np.sqrt(size_of(model, g, *u)) if by_size else 1.0)
        for g in model.dependencies.groups
        for u in by_hand.units(g)
    ]
    run = counting_jit(
        lambda p, s, g: soft_threshold_units(model.dependencies, p, s, strengths=g, by_size=by_size)
    )
    gone = 0
    for strength in (0.0, float(np.quantile(norms, 0.3)), float(np.quantile(norms, 0.7)) / 1.5):
        found = by_hand.by_paths(run(model.params, strength, strengths))
        want, zeros = in_turn_by_loops(model, leaves, strength, strengths, by_size)
        for path, w in found.items():
            np.testing.assert_allclose(w, want[path], rtol=0, atol=3e-6)
            np.testing.assert_array_equal(w == 0, zeros[path])
            gone += int(zeros[path].sum())
        if strength == 0:
            for path, w in found.items():
                np.testing.assert_array_equal(w, leaves[path])
    assert gone > 0
    assert run.traces == 1


def brute_force(model, leaves, strength, seed=0):
    """Minimises |v - w|^2 / 2 + s * penalty(v) from several starts."""
    paths, shapes = list(leaves), [leaves[p].shape for p in leaves]
    w = np.concatenate([leaves[p].ravel() for p in paths])
    ends = np.cumsum([0, *[int(np.prod(s)) for s in shapes]])
    places = [
        (np.sqrt(size_of(model, g, *u)), by_hand.places(model, g, *u, counted))
        for g in model.dependencies.groups
        for u in by_hand.units(g)
    ]
    flat = [
        (
            c,
            np.concatenate(
                [where.get(p, np.zeros(s, int)).ravel() for p, s in zip(paths, shapes, strict=True)]
            ),
        )
        for c, where in places
    ]

    def cost(v, smooth=0.0):
        penalty = sum(c * np.sqrt(np.sum(n * v**2) + smooth) for c, n in flat)
        return 0.5 * np.sum((v - w) ** 2) + strength * penalty

    def slope(v, smooth):
        out = v - w
        for c, n in flat:
            out = out + strength * c * n * v / np.sqrt(np.sum(n * v**2) + smooth)
        return out

    v = w.copy()
    for smooth in (1e-2, 1e-4, 1e-6, 1e-8, 1e-10, 1e-12):
        v = minimize(
            cost,
            v,
            (smooth,),
            jac=slope,
            method="L-BFGS-B",
            options={"maxiter": 3000, "ftol": 1e-16, "gtol": 1e-10},
        ).x
    best = {p: v[a:b].reshape(s) for p, s, a, b in zip(paths, shapes, ends, ends[1:], strict=False)}
    return best, lambda leaves: cost(np.concatenate([leaves[p].ravel() for p in paths]))


def nested():
    """Eight channels, and pairs of them: the units of one lie inside those of the next."""
    model = by_hand.mlp()
    single = model.dependencies.groups[0]
    members = [(m.path, m.axis, np.asarray(m.units) // 2) for m in single.members]
    pairs = by_hand._group("a/kernel[1]/blocks", 4, members)
    return model._replace(dependencies=by_hand._dependencies(model.params, single, pairs))


@pytest.mark.parametrize(
    ("build", "strength"),
    [(by_hand.mlp, 0.8), (by_hand.stack, 0.9), (by_hand.normed, 1.1), (nested, 0.4)],
)
def test_the_operator_minimises(build, strength):
    model = build()
    leaves = by_hand.by_paths(model.params)
    shrink = jax.jit(lambda p: soft_threshold_units(model.dependencies, p, strength))
    found = by_hand.by_paths(shrink(model.params))
    best, cost = brute_force(model, leaves, strength)
    for path, w in found.items():
        np.testing.assert_allclose(w, best[path], atol=2e-4)
    assert cost(found) <= cost(best) + 1e-6
    zeros = sum(int(np.sum(w == 0)) for w in found.values())
    assert 0 < zeros < sum(w.size for w in found.values())
    rng = np.random.default_rng(2)
    for size in (1e-3, 1e-2, 0.1):
        other = {p: w + size * rng.normal(size=w.shape) for p, w in found.items()}
        assert cost(found) < cost(other)


def test_an_entry_of_a_unit_by_two_axes_counts_twice():
    units = np.arange(4)
    params = {
        "in": jnp.asarray(by_hand.values(3, 4)),
        "mix": jnp.asarray(by_hand.values(4, 4, seed=1)),
    }
    members = [("in", 1, units), ("mix", 0, units), ("mix", 1, units)]
    deps = by_hand._dependencies(params, by_hand._group("in[1]", 4, members))
    model = by_hand.Model(None, params, None, deps)
    leaves = by_hand.by_paths(params)
    want = penalty_by_loops(model, leaves)
    assert float(group_penalty(deps, params)) == pytest.approx(want, rel=2e-6)
    found = by_hand.by_paths(soft_threshold_units(deps, params, 0.6))
    want, zeros = in_turn_by_loops(model, leaves, 0.6)
    assert zeros["mix"].any()
    for path, w in found.items():
        np.testing.assert_allclose(w, want[path], atol=2e-6)
        np.testing.assert_array_equal(w == 0, zeros[path])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_params_are_rounded_once(dtype):
    deep = by_hand.deep()
    params = jax.tree.map(lambda w: w.astype(dtype), deep.params)
    wide = jax.tree.map(lambda w: w.astype(jnp.float32), params)
    found = soft_threshold_units(deep.dependencies, params, 0.3)
    want = soft_threshold_units(deep.dependencies, wide, 0.3)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        assert a.dtype == dtype
        np.testing.assert_array_equal(
            np.asarray(a, np.float32), np.asarray(b.astype(dtype), np.float32)
        )
    assert group_penalty(deep.dependencies, params).dtype == jnp.float32


def test_gradients_through_the_operator_are_finite_and_right():
    model = by_hand.deep()
    params = {**model.params, "a": model.params["a"].at[:, 1].set(0.0)}
    params["b"] = params["b"].at[1].set(0.0)
    away = jax.tree.map(lambda w: jnp.cos(3.0 * w), params)

    def loss(params, s):
        out = soft_threshold_units(model.dependencies, params, s)
        return sum(
            jnp.sum(x * y) for x, y in zip(jax.tree.leaves(out), jax.tree.leaves(away), strict=True)
        )

    slopes = jax.jit(jax.grad(loss, (0, 1)))
    for strength in (0.0, 0.2, 5.0):
        grads = slopes(params, jnp.float32(strength))
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    move = jax.tree.map(lambda w: jnp.sin(5.0 * w), model.params)
    by_w, by_s = slopes(model.params, jnp.float32(0.2))
    h, loss = 1e-3, jax.jit(loss)
    at = lambda t: float(loss(jax.tree.map(lambda w, m: w + t * m, model.params, move), 0.2))  # noqa: E731
    slope = sum(
        jnp.sum(g * m) for g, m in zip(jax.tree.leaves(by_w), jax.tree.leaves(move), strict=True)
    )
    assert float(slope) == pytest.approx((at(h) - at(-h)) / (2 * h), rel=1e-2)
    by_hand_slope = (float(loss(model.params, 0.2 + h)) - float(loss(model.params, 0.2 - h))) / (
        2 * h
    )
    assert float(by_s) == pytest.approx(by_hand_slope, rel=1e-2)


def test_vmap_over_strength_is_a_loop_and_units_only_ever_leave():
    model = by_hand.stack()
    strengths = jnp.array([-1.0, 0.0, 0.5, 1.0, 50.0])
    run = lambda s: soft_threshold_units(model.dependencies, model.params, s)["bias"]  # noqa: E731
    mapped = jax.jit(jax.vmap(run))(strengths)
    one = jax.jit(run)
    for got, s in zip(mapped, strengths, strict=True):
        np.testing.assert_allclose(got, one(s), atol=2e-7)
    # Below zero is as zero: nothing moves.
    np.testing.assert_array_equal(mapped[0], model.params["bias"])
    np.testing.assert_array_equal(mapped[1], model.params["bias"])
    live = np.asarray(mapped != 0).sum((1, 2))
    assert live[-1] == 0
    assert (np.diff(live) <= 0).all()


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_on_a_mesh_it_is_the_same(kind):
    model = by_hand.deep()

    def both(p):
        return soft_threshold_units(model.dependencies, p, 0.3), group_penalty(
            model.dependencies, p
        )

    want, total = jax.jit(both)(model.params)
    slopes = jax.jit(jax.grad(lambda p: both(p)[1]))(model.params)
    mesh = mesh_of(kind, 2)
    specs = {"a": P(None, "d"), "b": P("d", None), "c": P("d", None)}
    with jax.set_mesh(mesh):
        shardings = jax.tree.map(lambda s: NamedSharding(mesh, s), specs)
        sharded = jax.device_put(model.params, shardings)
        got, penalty = jax.jit(both)(sharded)
        grads = jax.jit(jax.grad(lambda p: both(p)[1]))(sharded)
        if kind == "explicit":
            assert got["b"].sharding.spec == P("d", None)
    for a, b in zip(jax.tree.leaves((got, grads)), jax.tree.leaves((want, slopes)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert float(penalty) == pytest.approx(float(total), rel=1e-6)


def test_nan_and_infinities_stay_in_their_unit():
    model = by_hand.mlp()
    params = {**model.params, "a": {**model.params["a"]}}
    params["a"]["bias"] = params["a"]["bias"].at[0].set(jnp.nan).at[1].set(jnp.inf)
    out = soft_threshold_units(model.dependencies, params, 0.5)
    bad = np.isnan(np.asarray(out["b"]["kernel"])).any(1)
    np.testing.assert_array_equal(np.flatnonzero(bad), [0])
    assert np.isposinf(out["a"]["bias"][1])
    np.testing.assert_array_equal(out["b"]["kernel"][1], params["b"]["kernel"][1])


class TestProximalGroups:
    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    def test_it_lands_on_the_operator_of_the_sum(self, dtype):
        model = by_hand.mlp(dtype)
        params = {**model.params, "free": jnp.ones(3, dtype)}
        moves = jax.tree.map(lambda w: (0.1 * jnp.sin(9.0 * w)).astype(w.dtype), params)
        opt = proximal_groups(model.dependencies, jnp.array([0.6, 0.3]).__getitem__)
        state = opt.init(params)
        for step in range(2):
            moved = applied(params, moves)
            updates, state = jax.jit(opt.update)(moves, state, params)
            new = applied(params, updates)
            want = soft_threshold_units(model.dependencies, moved, 0.6 / (1 + step))
            for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(want), strict=True):
                assert a.dtype == dtype
                a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
                np.testing.assert_allclose(a, b, atol=1e-6 if dtype == jnp.float32 else 0)
                np.testing.assert_array_equal(a == 0, b == 0)
            params = new
        assert int(state.step) == 2
        assert 0 < int((params["a"]["bias"] == 0).sum()) < 8

    def test_it_acts_at_every_period_th_update(self):
        model = by_hand.mlp()
        opt = proximal_groups(model.dependencies, 100.0, 3)
        state, zeros = opt.init(model.params), jax.tree.map(jnp.zeros_like, model.params)
        update = counting_jit(opt.update)
        for step in range(1, 7):
            updates, state = update(zeros, state, model.params)
            gone = applied(model.params, updates)["a"]["kernel"] == 0
            assert bool(gone.all()) == (step % 3 == 0)
            assert bool(gone.any()) == (step % 3 == 0)
        assert update.traces == 1

    def test_a_leaf_without_an_update_has_no_say(self):
        model = by_hand.mlp()
        opt = proximal_groups(model.dependencies, 0.5)
        moves = jax.tree.map(jnp.zeros_like, model.params)
        moves["b"]["kernel"] = None
        updates, _ = opt.update(moves, opt.init(model.params), model.params)
        assert updates["b"]["kernel"] is None
        part = {"a": model.params["a"]}
        want = soft_threshold_units(model.dependencies, part, 0.5)
        out = applied({"a": model.params["a"]}, {"a": updates["a"]})
        np.testing.assert_allclose(out["a"]["kernel"], want["a"]["kernel"], atol=1e-6)

    def test_training_with_it_makes_units_leave_all_their_leaves(self):
        model = by_hand.mlp()
        x = jnp.asarray(by_hand.values(64, 6, seed=11))
        goal = jnp.stack([jax.nn.relu(x[:, 0]), jax.nn.relu(-x[:, 1]), x[:, 0] * 0, x[:, 1] * 0], 1)
        loss = lambda p: jnp.mean((model.fn(p, x) - goal) ** 2)  # noqa: E731
        opt = optax.chain(lenient(optax.sgd(0.1)), proximal_groups(model.dependencies, 0.1 * 0.02))

        def step(carry, _):
            params, state = carry
            updates, state = opt.update(jax.grad(loss)(params), state, params)
            return (applied(params, updates), state), loss(params)

        (params, _), losses = jax.lax.scan(step, (model.params, opt.init(model.params)), length=800)
        keep = kept_units(model.dependencies, params).masks["a/kernel[1]"]
        assert 1 <= keep.sum() <= 5
        np.testing.assert_array_equal(np.asarray(params["a"]["bias"] != 0), keep)
        np.testing.assert_array_equal(np.asarray(params["a"]["kernel"] != 0).any(0), keep)
        np.testing.assert_array_equal(np.asarray(params["b"]["kernel"] != 0).any(1), keep)
        assert float(losses[-1]) < 0.2 * float(losses[0])

    def test_what_does_not_fit_is_refused(self):
        model = by_hand.mlp()
        with pytest.raises(TypeError, match=r"proximal_groups: `dependencies` must be Depend"):
            proximal_groups(model.params, 0.1)
        with pytest.raises(ValueError, match=r"`strength` must be a real number of at least 0"):
            proximal_groups(model.dependencies, -0.1)
        with pytest.raises(ValueError, match=r"`period` must be a real number of at least 1"):
            proximal_groups(model.dependencies, 0.1, 0)
        opt = proximal_groups(model.dependencies, 0.1)
        with pytest.raises(ValueError, match=r"proximal_groups: `params` must be given"):
            opt.update(model.params, opt.init(model.params))
        with pytest.raises(ValueError, match=r"proximal_groups: `where` must match|loses units"):
            opt.init({"c": jnp.ones(3)})


def test_what_does_not_fit_is_refused():
    model = by_hand.mlp()
    deps = model.dependencies
    with pytest.raises(ValueError, match=r"soft_threshold_units: `strength` must be"):
        soft_threshold_units(deps, model.params, -1.0)
    with pytest.raises(ValueError, match=r"unit_strengths: `growth` must be"):
        unit_strengths(deps, model.params, -1.0)
    with pytest.raises(
        ValueError, match=r"`strengths` must name groups of the dependencies, got 'b'"
    ):
        group_penalty(deps, model.params, strengths={"b": jnp.ones(8)})
    with pytest.raises(ValueError, match=r"shape \[8\], got float32\[4\] at 'a/kernel\[1\]'"):
        group_penalty(deps, model.params, strengths={"a/kernel[1]": jnp.ones(4)})
    with pytest.raises(TypeError, match=r"`strengths` must be a dict by the names of groups"):
        group_penalty(deps, model.params, strengths=jnp.ones(8))
    with pytest.raises(ValueError, match=r"have the shape \[8\], got float32\[9\] at 'a/bias'"):
        group_penalty(deps, {"a": {"bias": jnp.ones(9)}})
    with pytest.raises(TypeError, match=r"`params` must be dense"):
        group_penalty(deps, jc.pack(jc.prune(0.9), {"a": {"kernel": jnp.ones((6, 8))}}))


def test_groups_without_a_strength_are_free():
    model = by_hand.deep()
    given = {"a[1]": jnp.ones(8)}
    total = group_penalty(model.dependencies, model.params, strengths=given)
    alone = by_hand._dependencies(model.params, model.dependencies.groups[0])
    assert float(total) == pytest.approx(float(group_penalty(alone, model.params)))
    out = soft_threshold_units(model.dependencies, model.params, 0.5, strengths=given)
    want = soft_threshold_units(alone, model.params, 0.5)
    for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)
