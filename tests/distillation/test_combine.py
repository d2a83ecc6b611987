"""Combinations of gradients against loops in NumPy written from the papers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxcompress.distillation import (
    Combination,
    CombineState,
    combine_gradients,
    cosine_gated,
    dot,
    norm_balanced,
    pcgrad,
    separate,
    weighted_sum,
)
from tests.conftest import counting_jit, lenient, mesh_of

ALL = {
    "pcgrad": pcgrad,
    "pcgrad_per_leaf": lambda: pcgrad(per_leaf=True),
    "cosine_gated": cosine_gated,
    "cosine_gated_whole": lambda: cosine_gated(proportional=False, per_leaf=True),
    "norm_balanced": norm_balanced,
    "norm_balanced_average": lambda: norm_balanced(0.5, 0.9, per_leaf=True),
    "weighted_sum": lambda: weighted_sum(0.25, 0.75),
    "dot": dot,
    "separate": lambda: separate(optax.trace(0.9), optax.identity()),
}
combinations = pytest.mark.parametrize("make", ALL.values(), ids=ALL.keys())


def gradients(count, seed=0, dtype=np.float32):
    """Trees of two leaves whose products with one another are often negative."""
    rng = np.random.default_rng(seed)
    drawn = []
    for k in range(count):
        scale = 10.0 ** (k - 1)
        drawn.append({"b": scale * rng.normal(size=4), "w": scale * rng.normal(size=(8, 4))})
    for k in range(1, count):  # Against the one before.
        for name in drawn[k]:
            drawn[k][name] -= 0.7 * 10 * drawn[k - 1][name]
    return [jax.tree.map(lambda g: jnp.asarray(g, dtype), g) for g in drawn]


def vectors(trees, per_leaf):
    """Lists of flat float64 vectors, one list for each group of leaves."""
    flat = [[np.asarray(g[name], np.float64).ravel() for name in ("b", "w")] for g in trees]
    if per_leaf:
        return [[g[0] for g in flat], [g[1] for g in flat]]
    return [[np.concatenate(g) for g in flat]]


def flat_of(tree):
    return np.concatenate([np.asarray(tree[name], np.float64).ravel() for name in ("b", "w")])


def close(got, expected, rtol=1e-6, atol=0.0):
    scale = np.abs(expected).max(initial=1e-300)
    np.testing.assert_allclose(got / scale, expected / scale, rtol=rtol, atol=rtol + atol)


def surgery(flat, orders):
    """Algorithm 1 of Yu et al., with the order in which gradient i meets the others."""
    total = np.zeros_like(flat[0])
    for i, order in enumerate(orders):
        g = flat[i].copy()
        for j in order:
            if j != i and g @ flat[j] < 0:
                g = g - (g @ flat[j]) / np.linalg.norm(flat[j]) ** 2 * flat[j]
        total += g
    return total


def in_order(count):
    return [[j for j in range(count) if j != i] for i in range(count)]


@pytest.mark.parametrize("per_leaf", [False, True])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_pcgrad_is_the_algorithm_of_the_paper(count, per_leaf):
    for seed in range(5):
        with jax.enable_x64(True):
            trees = gradients(count, seed, np.float64)
            got, state = pcgrad(per_leaf=per_leaf).update(trees, ())
        groups = vectors(trees, per_leaf)
        assert any(a @ b < 0 for g in groups for a, b in itertools.combinations(g, 2))
        expected = np.concatenate([surgery(g, in_order(count)) for g in groups])
        close(flat_of(got), expected, rtol=1e-12)
        assert state == ()


def test_with_a_key_every_order_is_met_and_no_other_result():
    trees = gradients(3, seed=1)
    (flat,) = vectors(trees, False)
    possible = [
        surgery(flat, orders)
        for orders in itertools.product([[1, 2], [2, 1]], [[0, 2], [2, 0]], [[0, 1], [1, 0]])
    ]
    update = jax.jit(lambda key, step: pcgrad(key=key).update(trees, (), step=step)[0])
    steps = jnp.arange(100)
    many = jax.vmap(update, (None, 0))(jax.random.key(0), steps)
    seen = []
    for i in range(len(steps)):
        got = flat_of(jax.tree.map(lambda g: g[i], many))  # noqa: B023
        errors = [np.abs(got - p).max() / np.abs(p).max() for p in possible]
        assert min(errors) < 1e-5
        seen.append(int(np.argmin(errors)))
    distinct = {tuple(np.round(p, 4)) for p in possible}
    met = {tuple(np.round(possible[i], 4)) for i in seen}
    assert len(distinct) > 1
    assert met == distinct
    again = jax.vmap(update, (None, 0))(jax.random.key(0), steps)
    jax.tree.map(np.testing.assert_array_equal, again, many)


def test_of_two_gradients_the_result_goes_against_neither_and_has_no_order():
    def one(seed):
        keys = jax.random.split(jax.random.key(seed), 2)
        first, second = (jax.random.normal(key, (6,)) for key in keys)
        second = second - first
        both, _ = pcgrad().update((first, second), ())
        swapped, _ = pcgrad(key=keys[0]).update((second, first), ())
        size = jnp.linalg.norm(both) * jnp.linalg.norm(jnp.stack([first, second]))
        return jnp.sum(both * first) / size, jnp.sum(both * second) / size, both, swapped

    along, across, both, swapped = jax.jit(jax.vmap(one))(jnp.arange(200))
    assert along.min() > -1e-6
    assert across.min() > -1e-6
    np.testing.assert_allclose(both, swapped, rtol=1e-5, atol=1e-5)


def test_without_a_conflict_it_is_the_sum_to_the_last_bit():
    first, second = gradients(2)
    second = jax.tree.map(lambda a, b: a + jnp.where(a * b > 0, 1e-3 * b, 0.0), first, second)
    got, _ = pcgrad().update((first, second), ())
    jax.tree.map(np.testing.assert_array_equal, got, jax.tree.map(jnp.add, first, second))


@pytest.mark.parametrize("per_leaf", [False, True])
@pytest.mark.parametrize("proportional", [False, True])
def test_cosine_gated_is_the_formula_of_the_paper(proportional, per_leaf):
    gates = set()
    for seed in range(8):
        with jax.enable_x64(True):
            trees = gradients(3, seed, np.float64)
            gate = cosine_gated(proportional=proportional, per_leaf=per_leaf)
            got, state = gate.update(trees, ())
        expected = []
        for main, *others in vectors(trees, per_leaf):
            total = main.copy()
            for other in others:
                cosine = main @ other / np.linalg.norm(main) / np.linalg.norm(other)
                gate = max(0.0, cosine) if proportional else (np.sign(cosine) + 1) / 2
                gates.add(gate > 0)
                total += gate * other
            expected.append(total)
        close(flat_of(got), np.concatenate(expected), rtol=1e-12)
        assert state == ()
    assert gates == {True, False}


@pytest.mark.parametrize("per_leaf", [False, True])
def test_norm_balanced_gives_the_others_their_share(per_leaf):
    with jax.enable_x64(True):
        trees = gradients(3, 0, np.float64)
        got, state = norm_balanced(0.3, per_leaf=per_leaf).update(trees, ())
    expected = []
    for main, *others in vectors(trees, per_leaf):
        total = main.copy()
        for other in others:
            total += other * 0.3 * np.sqrt(np.sum(main**2)) / np.sqrt(np.sum(other**2))
        expected.append(total)
    close(flat_of(got), np.concatenate(expected), rtol=1e-12)
    assert state == ()


@pytest.mark.parametrize("per_leaf", [False, True])
def test_norms_are_averaged_without_bias(per_leaf):
    decays, ratios = [0.0, 0.5, 0.8, 0.9], [1.0, 2.0, 0.5, 0.25]
    with jax.enable_x64(True):
        table = lambda values: lambda step: jnp.asarray(values)[step]  # noqa: E731
        balance = norm_balanced(table(ratios), table(decays), per_leaf=per_leaf)
        state = balance.init(gradients(1, 0, np.float64)[0], 2)
        sums, mass = None, 0.0
        for step, (decay, ratio) in enumerate(zip(decays, ratios, strict=True)):
            trees = gradients(2, step, np.float64)
            got, state = balance.update(trees, state, step=jnp.int32(step))
            groups = vectors(trees, per_leaf)
            norms = np.array([[np.linalg.norm(g) for g in group] for group in groups])
            sums = (1 - decay) * norms + (0 if sums is None else decay * sums)
            mass = 1 - decay + decay * mass
            means = sums / mass
            expected = [
                main + ratio * n[0] / n[1] * other
                for (main, other), n in zip(groups, means, strict=True)
            ]
            close(flat_of(got), np.concatenate(expected), rtol=1e-12)


def test_a_constant_decay_is_the_debiased_average_of_optax():
    balance, average = norm_balanced(1.0, 0.9), lenient(optax.ema(0.9))
    state, held = balance.init(gradients(1)[0], 2), average.init(jnp.zeros(2))
    for step in range(4):
        trees = gradients(2, step)
        got, state = balance.update(trees, state)
        ((first, second),) = vectors(trees, False)
        norms = jnp.float32([np.linalg.norm(first), np.linalg.norm(second)])
        means, held = average.update(norms, held)
        close(flat_of(got), first + float(means[0] / means[1]) * second, rtol=2e-6)


def test_weighted_sum_reads_schedules():
    trees = gradients(3)
    both = weighted_sum(1.0, optax.linear_schedule(0.0, 1.0, 4), jnp.float32(-2.0))
    got, _ = both.update(trees, (), step=jnp.int32(1))
    (flat,) = vectors(trees, False)
    close(flat_of(got), flat[0] + 0.25 * flat[1] - 2 * flat[2])


@combinations
def test_zero_gradients_give_no_nan(make):
    first, second = gradients(2)
    zero = jax.tree.map(jnp.zeros_like, first)
    update = jax.jit(lambda *g: make().update(g, make().init(first, 2))[0])
    for pair in ((first, zero), (zero, second), (zero, zero)):
        got = update(*pair)
        assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(got))
        loss = lambda *g: sum(jnp.sum(x**2) for x in jax.tree.leaves(update(*g)))  # noqa: E731
        slopes = jax.grad(loss, argnums=(0, 1))(*pair)
        assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(slopes))


def test_what_zero_gradients_give():
    first, second = gradients(2)
    zero = jax.tree.map(jnp.zeros_like, first)
    for make in (pcgrad, cosine_gated, norm_balanced):
        jax.tree.map(np.testing.assert_array_equal, make().update((first, zero), ())[0], first)
    for make in (cosine_gated, norm_balanced):
        jax.tree.map(np.testing.assert_array_equal, make().update((zero, second), ())[0], zero)
    jax.tree.map(np.testing.assert_array_equal, pcgrad().update((zero, second), ())[0], second)


@combinations
@pytest.mark.parametrize("power", [-100, 80])
def test_very_small_and_large_gradients_are_combined_alike(make, power):
    trees = gradients(2)
    factor = jnp.ldexp(jnp.float32(1), power)
    scaled = [jax.tree.map(lambda g: g * factor, g) for g in trees]
    update = lambda g: make().update(g, make().init(trees[0], 2))[0]  # noqa: E731
    expected = jax.tree.map(lambda g: g * factor, update(trees))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), update(scaled), expected)


@combinations
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_what_is_not_finite_stays_visible(make, bad, which):
    trees = gradients(2)
    trees[which]["w"] = trees[which]["w"].at[0, 0].set(bad)
    got, _ = make().update(trees, make().init(trees[0], 2))
    assert not jnp.isfinite(got["w"]).all()


@combinations
def test_missing_and_other_leaves_pass(make):
    first, second = gradients(2)
    params = {**first, "none": None, "table": jnp.arange(3), "frozen": jnp.ones(2)}
    float0 = np.zeros((3,), jax.dtypes.float0)
    ours = {**first, "none": None, "table": float0, "frozen": None}
    theirs = {**second, "none": None, "table": None, "frozen": jnp.ones(2)}
    state = make().init(params, 2)
    got, after = make().update((ours, theirs), state, params)
    assert got["none"] is None
    assert got["frozen"] is None
    assert got["table"] is float0
    assert jax.tree.structure(after) == jax.tree.structure(state)
    # The frozen leaf of the first counts as zero: it changes no product with the second.
    theirs["frozen"] = None
    got, _ = make().update((ours, theirs), state, params)
    plain, _ = make().update((first, second), make().init(first, 2))
    for name in first:
        np.testing.assert_array_equal(got[name], plain[name])
    # A leaf that only the second lacks.
    got, _ = make().update((first, {**second, "w": None}), make().init(first, 2))
    zero = {**second, "w": jnp.zeros((8, 4))}
    expected, _ = make().update((first, zero), make().init(first, 2))
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@combinations
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_gradients_are_combined_in_float32(make, dtype):
    trees = [jax.tree.map(lambda g: (g / 8).astype(dtype), g) for g in gradients(2)]
    wide = [jax.tree.map(lambda g: g.astype(jnp.float32), g) for g in trees]
    got, state = make().update(trees, make().init(trees[0], 2))
    expected, _ = make().update(wide, make().init(wide[0], 2))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(dtype)), got, expected)
    assert all(x.dtype in (jnp.float32, jnp.int32) for x in jax.tree.leaves(state))


@combinations
def test_no_leaves_and_empty_leaves(make):
    state = make().init({}, 2)
    assert make().update(({}, {}), state)[0] == {}
    empty = {"b": jnp.zeros(0), "w": jnp.zeros((0, 4))}
    got, _ = make().update((empty, empty), make().init(empty, 2))
    assert jax.tree.map(jnp.shape, got) == {"b": (0,), "w": (0, 4)}


@combinations
@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_sharded_gradients(make, kind):
    trees = gradients(2)
    run = lambda *g: make().update(g, make().init(g[0], 2))  # noqa: E731
    expected, _ = jax.jit(run)(*trees)
    mesh = mesh_of(kind, 8)
    specs = {"b": PartitionSpec(), "w": PartitionSpec("d", None)}
    with jax.set_mesh(mesh):
        placed = [
            {name: jax.device_put(g[name], NamedSharding(mesh, specs[name])) for name in g}
            for g in trees
        ]
        got, _ = jax.jit(run)(*placed)
        if kind == "explicit":
            assert jax.typeof(got["w"]).sharding.spec == PartitionSpec("d", None)
    close(flat_of(jax.device_get(got)), flat_of(expected))


def test_vmap_over_numbers_is_a_loop():
    trees, values = gradients(2), jnp.array([0.0, 0.5, 0.75])

    def one(value):
        balance = norm_balanced(value, value)
        state = balance.init(trees[0], 2)
        for step in range(2):
            got, state = balance.update(trees, state, step=step)
        return got, weighted_sum(value, 1.0).update(trees, ())[0]

    together = jax.jit(jax.vmap(one))(values)
    for i, value in enumerate(values):
        mine = jax.tree.map(lambda g: g[i], together)  # noqa: B023
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
            mine,
            one(float(value)),
        )


@combinations
def test_a_link_of_a_chain_keeps_its_types_and_compiles_once(make):
    first, second = gradients(2)
    opt = optax.chain(combine_gradients(make()), lenient(optax.sgd(0.1)))

    def step(carry, other):
        params, state = carry
        updates, state = opt.update(params, state, params, other_grads=[other])
        return (optax.apply_updates(params, updates), state), None

    many = jax.tree.map(lambda g: jnp.stack([g, 2 * g, -g]), second)
    (_, state), _ = jax.lax.scan(step, (first, opt.init(first)), many)
    assert isinstance(state[0], CombineState)
    assert state[0].step == 3
    update = counting_jit(lambda g, o, s, p: opt.update(g, s, p, other_grads=(o,)))
    _, after = update(first, second, opt.init(first), first)
    update(first, second, after, first)
    assert update.traces == 1


def test_the_link_combines_and_reads_schedules_at_its_step():
    trees = gradients(3)
    link = combine_gradients(weighted_sum(1.0, lambda step: step, 0.5), count=3)
    state = link.init(trees[0])
    (flat,) = vectors(trees, False)
    for step in range(3):
        got, state = link.update(trees[0], state, trees[0], other_grads=trees[1:], value=1.0)
        close(flat_of(got), flat[0] + step * flat[1] + 0.5 * flat[2])
    # Clipping comes after it: it clips the combination.
    opt = optax.chain(combine_gradients(pcgrad(), count=3), optax.clip_by_global_norm(1.0))
    got, _ = opt.update(trees[0], opt.init(trees[0]), trees[0], other_grads=trees[1:])
    np.testing.assert_allclose(np.linalg.norm(flat_of(got)), 1.0, rtol=1e-6)


def test_before_multi_steps_every_mini_batch_is_combined():
    params = gradients(1)[0]
    inner = optax.MultiSteps(optax.sgd(1.0), 3).gradient_transformation()
    opt = optax.chain(combine_gradients(pcgrad()), lenient(inner))
    state, expected = opt.init(params), 0.0
    for seed in range(3):
        first, second = gradients(2, seed)
        updates, state = opt.update(first, state, params, other_grads=[second])
        expected -= flat_of(pcgrad().update((first, second), ())[0]) / 3
    close(flat_of(updates), expected, rtol=1e-5)


def test_a_combination_of_your_own():
    worst = Combination(
        init=lambda params, count: jnp.zeros((count,), jnp.int32),
        update=lambda gradients, state, params=None, *, step=0: (gradients[-1], state + 1),
    )
    link = combine_gradients(worst, count=3)
    trees = gradients(3)
    got, state = link.update(trees[0], link.init(trees[0]), other_grads=trees[1:])
    jax.tree.map(np.testing.assert_array_equal, got, trees[2])
    np.testing.assert_array_equal(state.combination, [1, 1, 1])


def test_errors_say_what_to_do():
    first, second = gradients(2)
    link = combine_gradients(pcgrad())
    state = link.init(first)
    with pytest.raises(TypeError, match=r"combine_gradients: `other_grads` must.*opt\.update\("):
        link.update(first, state, first)
    with pytest.raises(TypeError, match="list or tuple of gradient trees, got dict"):
        link.update(first, state, first, other_grads=second)
    with pytest.raises(ValueError, match="`other_grads` must be 1 gradient trees, got 2"):
        link.update(first, state, first, other_grads=[second, second])
    with pytest.raises(ValueError, match="pcgrad: `gradients` must have one structure"):
        link.update(first, state, first, other_grads=[{"w": second["w"]}])
    with pytest.raises(TypeError, match=r"`combination` must be a combination.*pcgrad"):
        combine_gradients(pcgrad)
    with pytest.raises(TypeError, match="combine_gradients: `count` must be a static integer"):
        combine_gradients(pcgrad(), count=2.0)
    with pytest.raises(ValueError, match=r"weighted_sum: `gradients` must be 3.*got 2"):
        combine_gradients(weighted_sum(1.0, 1.0, 1.0)).init(first)
    with pytest.raises(ValueError, match=r"weighted_sum: `gradients` must be 1.*got 2"):
        weighted_sum(1.0).update((first, second), ())
    with pytest.raises(TypeError, match="weighted_sum: `weights` must be a real number"):
        weighted_sum("one")
    with pytest.raises(TypeError, match="pcgrad: `key` must be one key"):
        pcgrad(key=0)
    with pytest.raises(ValueError, match="norm_balanced: `ratio` must be a real number of at leas"):
        norm_balanced(-1.0)
    with pytest.raises(ValueError, match="norm_balanced: `decay` must be a real number in"):
        norm_balanced(1.0, 1.5)


def test_gradients_are_never_broadcast():
    w, several = jnp.arange(4.0), jnp.ones((2, 4))
    opt = combine_gradients(pcgrad())
    with pytest.raises(ValueError, match=r"have the shape \[4\], got float32\[2, 4\] at 'a'"):
        opt.update({"a": w}, opt.init({"a": w}), {"a": w}, other_grads=[{"a": several}])
    with pytest.raises(ValueError, match="`gradients` must have the shape"):
        dot().update((w, jnp.ones(())), dot().init(w, 2))


def test_a_decay_of_one_is_refused():
    with pytest.raises(ValueError, match="norm_balanced: `decay` must be below 1"):
        norm_balanced(decay=1.0)
