"""Whole units as a projection: what goes, by loops; in training; and that `shrink` agrees."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from jaxcompress.pruning.structured._dependencies import dependencies
from jaxcompress.pruning.structured._kept_units import kept_units
from jaxcompress.pruning.structured._projection import prune_groups
from jaxcompress.pruning.structured._select import select
from jaxcompress.pruning.structured._shrink import shrink
from tests.conftest import counting_jit, lenient, mesh_of
from tests.pruning.structured import by_hand

models = pytest.mark.parametrize("name", by_hand.MODELS)


def is_statistic(path):
    return path in ("norm/mean", "norm/var")


def adam():
    return lenient(optax.adam(3e-2))


def applied(params, updates):
    with jax.numpy_dtype_promotion("standard"):
        return optax.apply_updates(params, updates)


def trained(model, opt, steps, params=None):
    """A few steps towards other outputs, as one scan."""
    params = model.params if params is None else params
    goal = model.fn(by_hand_scaled(params), model.x)
    loss = lambda p: jnp.mean((model.fn(p, model.x) - goal) ** 2)  # noqa: E731

    def step(carry, _):
        params, state = carry
        updates, state = opt.update(jax.grad(loss)(params), state, params)
        return (applied(params, updates), state), None

    (params, state), _ = jax.lax.scan(step, (params, opt.init(params)), length=steps)
    return params, state


def by_hand_scaled(params):
    return jax.tree.map(lambda w: 0.5 * w, params)


def kept_by_sorting(model, group, sparsity, counted=lambda path: not is_statistic(path)):
    """The oracle: norms by loops in float64, and a stable sort in each layer."""
    leaves = by_hand.by_paths(model.params)
    norms = np.zeros(group.shape)
    for layer, unit in by_hand.units(group):
        norms[(*layer, unit)] = by_hand.norm_of(model, leaves, group, layer, unit, counted)
    count = max(1, int((1 - Fraction(str(sparsity))) * group.size))
    keep = np.zeros(group.shape, bool)
    for layer in np.ndindex(*group.layers):
        keep[(*layer, np.argsort(-norms[layer], kind="stable")[:count])] = True
    return keep


def zeroed_by_loops(model, masks):
    """By path where an entry belongs to a unit that leaves."""
    gone = {path: np.zeros(s.shape, bool) for path, s in model.dependencies.shapes.items()}
    for group in model.dependencies.groups:
        for layer, unit in by_hand.units(group):
            if group.name in masks and not masks[group.name][(*layer, unit)]:
                for path, count in by_hand.places(model, group, layer, unit).items():
                    gone[path] |= count > 0
    return gone


@models
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.7, 1.0])
def test_what_leaves_is_what_loops_find(name, sparsity):
    model = by_hand.MODELS[name]()
    p = prune_groups(model.dependencies, sparsity, overlap="both")
    masks = {g.name: kept_by_sorting(model, g, sparsity) for g in model.dependencies.groups}
    held = jax.jit(p.find)(model.params)
    found = kept_units(model.dependencies, held).masks
    assert set(found) == set(masks)
    for group, keep in masks.items():
        np.testing.assert_array_equal(found[group], keep)
    out = by_hand.by_paths(jax.jit(p.project)(model.params, held))
    before = by_hand.by_paths(model.params)
    for path, gone in zeroed_by_loops(model, masks).items():
        np.testing.assert_array_equal(out[path], np.where(gone, 0.0, before[path]))
    assert sparsity == 0 or any(gone.any() for gone in zeroed_by_loops(model, masks).values())


OPTIONS = {
    "local": {},
    "global": {"scope": "global"},
    "raw": {"scope": "global", "normalize": None},
    "isomorphic": {"scope": "isomorphic"},
    "multiples": {"multiple_of": 3},
    "global multiples": {"scope": "global", "multiple_of": 2, "floor": 2},
    "floor": {"scope": "global", "normalize": None, "floor": 0.5},
    "l1": {"norm": jc.pruning.l1, "leaves": jc.tree.none_of("**/bias")},
    "both": {"overlap": "both", "scope": "global"},
    "strides": {"overlap": "strides"},
}


@pytest.mark.parametrize("name", [*by_hand.MODELS, "tower"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_it_keeps_what_select_keeps(name, options):
    model = by_hand.tower() if name == "tower" else by_hand.MODELS[name]()
    compiled = counting_jit(
        lambda params, s: prune_groups(model.dependencies, s, **options).find(params)
    )
    for sparsity in (0.0, 0.2, 0.3, 0.5, 0.75, 1.0):
        keep = select(model.dependencies, model.params, keep=1 - sparsity, **options).masks
        found = compiled(model.params, jnp.float32(sparsity))
        masks = kept_units(model.dependencies, found).masks
        assert set(masks) == set(keep)
        for group, mask in keep.items():
            np.testing.assert_array_equal(masks[group], mask, err_msg=f"{group} at {sparsity}")
    assert compiled.traces == 1


def test_counts_are_exact_for_all_decimal_fractions():
    units = np.arange(50)
    params = {"a": jnp.asarray(by_hand.values(2, 50)), "b": jnp.asarray(by_hand.values(50, 2))}
    members = [("a", 1, units), ("b", 0, units)]
    deps = by_hand._dependencies(params, by_hand._group("a[1]", 50, members))
    count = jax.jit(jax.vmap(lambda s: prune_groups(deps, s).find(params)["a"].stays[0].sum()))
    found = count(jnp.asarray(np.arange(101) / 100, jnp.float32))
    want = [max(1, int(50 * (100 - Fraction(i)) / 100)) for i in range(101)]
    np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize("name", ["mlp", "deep", "stack", "normed"])
def test_small_function_equals_the_projected_one(name):
    model = by_hand.MODELS[name]()
    groups = dependencies(model.fn, model.params, model.x)
    p = prune_groups(groups, 0.5)
    masked = jc.compress(p, model.params)
    keep = kept_units(groups, p.find(model.params))
    small_params, small_fn = shrink(model.fn, model.params, keep, model.x)
    assert jc.tree.size(small_params) < 0.7 * jc.tree.size(model.params)
    got, want = small_fn(small_params, model.x), model.fn(masked, model.x)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    again = kept_units(groups, masked)
    for group, mask in keep.masks.items():
        np.testing.assert_array_equal(again.masks[group], mask)


@pytest.mark.parametrize("name", ["mlp", "stack", "attention"])
@pytest.mark.parametrize("use", ["projected", "every", "straight_through", "project_params"])
def test_training_leads_to_what_shrink_removes(name, use):
    model = by_hand.MODELS[name]()
    groups = dependencies(model.fn, model.params, model.x)
    p = prune_groups(groups, jc.schedules.cubic(0.0, 0.5, 0, 4))
    opt = {
        "projected": lambda: jc.projected(adam(), p),
        "every": lambda: jc.projected(adam(), jc.every(2, p)),
        "straight_through": lambda: jc.straight_through(adam(), p),
        "project_params": lambda: optax.chain(adam(), jc.project_params(p)),
    }[use]()
    params, state = jax.jit(lambda w: trained(model, opt, 6, w))(model.params)
    keep = kept_units(groups, jc.structure(state))
    same, by_state = kept_units(groups, params), kept_units(groups, state)
    gone = 0
    for group in groups.groups:
        mask = keep.masks.get(group.name, np.ones(group.shape, bool))
        np.testing.assert_array_equal(same.masks[group.name], mask)
        if group.name in keep.masks:
            np.testing.assert_array_equal(by_state.masks[group.name], mask)
        gone += int((~mask).sum())
    assert gone > 0
    moved = by_hand.by_paths(params)
    for path, where in zeroed_by_loops(model._replace(dependencies=groups), keep.masks).items():
        np.testing.assert_array_equal(moved[path][where], 0)
        assert np.all(moved[path][~where] != 0)
        if use == "projected":
            mu = by_hand.by_paths(state.inner[0].mu)[path]
            np.testing.assert_array_equal(mu[where], 0)
            assert np.any(mu[~where] != 0)
    small_params, small_fn = shrink(model.fn, params, keep, model.x)
    np.testing.assert_allclose(
        small_fn(small_params, model.x), model.fn(params, model.x), rtol=1e-5, atol=1e-6
    )
    assert jc.tree.size(small_params) < jc.tree.size(params)


def test_straight_through_trains_zeroed_units_on():
    model = by_hand.mlp()
    opt = jc.straight_through(adam(), prune_groups(model.dependencies, 0.5), decay=0.1)
    params, state = trained(model, opt, 3)
    dense = by_hand.by_paths(jc.latent(state))
    for path, w in by_hand.by_paths(params).items():
        zeros = w == 0
        assert zeros.any()
        assert np.all(dense[path][zeros] != 0)
        np.testing.assert_array_equal(dense[path][~zeros], w[~zeros])


def test_soft_filter_pruning_is_that_of_the_paper():
    """He et al. 2018, algorithm 1, with epochs of 3 updates: zero the smallest, train all."""
    model = by_hand.mlp()
    opt = optax.chain(
        lenient(optax.sgd(0.1)),
        jc.project_params(jc.alternated(prune_groups(model.dependencies, 0.5), 1, 2)),
    )
    grads = jax.tree.map(lambda w: 0.5 * jnp.cos(7.0 * w), model.params)
    params, state = model.params, opt.init(model.params)
    want = by_hand.by_paths(model.params)
    group = model.dependencies.groups[0]
    update = jax.jit(opt.update)
    regrown = 0
    for t in range(7):
        updates, state = update(grads, state, params)
        params = applied(params, updates)
        want = {path: w - 0.1 * by_hand.by_paths(grads)[path] for path, w in want.items()}
        if t % 3 == 0:
            now = [by_hand.norm_of(model, want, group, (), u) for u in range(8)]
            for unit in np.argsort(now)[:4]:
                for path, count in by_hand.places(model, group, (), unit).items():
                    regrown += int(np.sum(want[path][count > 0] != 0))
                    want[path] = np.where(count > 0, 0.0, want[path])
        for path, w in by_hand.by_paths(params).items():
            np.testing.assert_allclose(w, want[path], rtol=0, atol=1e-5)
            np.testing.assert_array_equal(w == 0, want[path] == 0)
    assert regrown > 0


def test_relaxed_comes_to_zero_gradually():
    model = by_hand.mlp()
    p = jc.relaxed(prune_groups(model.dependencies, 0.5), lambda step: step / 4)
    hard = by_hand.by_paths(jc.compress(prune_groups(model.dependencies, 0.5), model.params))
    before = by_hand.by_paths(model.params)
    for step in range(5):
        for path, w in by_hand.by_paths(jc.compress(p, model.params, step=step)).items():
            want = before[path] + step / 4 * (hard[path] - before[path])
            np.testing.assert_allclose(w, want, atol=1e-6)
    with pytest.raises(ValueError, match=r"kept_units: `source` must be hard: at strength 1"):
        kept_units(model.dependencies, p.find(model.params, step=3))
    keep = kept_units(model.dependencies, p.find(model.params, step=4))
    assert keep.masks["a/kernel[1]"].sum() == 4
    with pytest.raises(ValueError, match="strength"):
        jc.pack(p, model.params)


def test_numbers_are_scheduled_and_shown():
    model = by_hand.mlp()
    ramp = jc.schedules.linear(0.0, 1.0, 0, 4)
    p = jc.scheduled(prune_groups)(model.dependencies, sparsity=ramp)
    for step, kept in enumerate([8, 6, 4, 2, 1]):
        held = p.find(model.params, step=step)
        assert float(held.hyperparams["sparsity"]) == step / 4
        assert kept_units(model.dependencies, held).masks["a/kernel[1]"].sum() == kept
        zeros = np.asarray(p.project(model.params, held)["a"]["bias"] == 0)
        assert zeros.sum() == 8 - kept


def test_vmap_over_the_fraction_trains_whole_grids():
    model = by_hand.stack()

    def kept(sparsity):
        p = jc.every(2, prune_groups(model.dependencies, sparsity))
        params, _ = trained(model, jc.projected(adam(), p), 3)
        return (params["bias"] != 0).sum(axis=1)

    found = jax.jit(jax.vmap(kept))(jnp.array([0.0, 0.25, 0.5, 0.9, 1.0]))
    np.testing.assert_array_equal(found, np.outer([8, 6, 4, 1, 1], [1, 1, 1]))


def test_before_it_begins_and_in_dense_phases_nothing_leaves():
    model = by_hand.mlp()
    late = jc.every(2, prune_groups(model.dependencies, 0.5), begin=3)
    assert kept_units(model.dependencies, late.find(model.params, step=2)).masks == {}
    held = late.find(model.params, step=3)
    assert kept_units(model.dependencies, held).masks["a/kernel[1]"].sum() == 4


def test_parts_of_the_params_are_ranked_by_what_is_there():
    model = by_hand.mlp()
    loud = {**model.params, "b": {"kernel": 5.0 * jnp.roll(model.params["b"]["kernel"], 2, 0)}}
    model, group = model._replace(params=loud), model.dependencies.groups[0]
    p = jc.masked(prune_groups(model.dependencies, 0.5), "a/*")
    keep = kept_by_sorting(model, group, 0.5, lambda path: path.startswith("a/"))
    full = kept_by_sorting(model, group, 0.5)
    assert (keep != full).any()
    found = p.find(model.params)
    np.testing.assert_array_equal(kept_units(model.dependencies, found).masks[group.name], keep)
    out = jc.compress(p, model.params)
    np.testing.assert_array_equal(out["a"]["bias"] != 0, keep)
    np.testing.assert_array_equal(out["b"]["kernel"], model.params["b"]["kernel"])
    # Leaves whose masks differ: a unit leaves where all of them let it go.
    parts = jc.partition({n: prune_groups(model.dependencies, 0.5) for n in ("a/*", "b/*")})
    held = parts.find(model.params)
    out = parts.project(model.params, held)
    stays = np.asarray(out["a"]["bias"] != 0) | np.asarray(out["b"]["kernel"][:, 0] != 0)
    np.testing.assert_array_equal(kept_units(model.dependencies, held).masks[group.name], stays)
    np.testing.assert_array_equal(kept_units(model.dependencies, out).masks[group.name], stays)


def test_chains_remove_what_any_of_them_does_and_quantize_the_rest():
    model = by_hand.deep()
    both = jc.chain(
        prune_groups(model.dependencies, 0.5, where="a[1]"),
        prune_groups(model.dependencies, 0.34, where="b[1]"),
        jc.quantize(8, axis=None),
    )
    held = both.find(model.params)
    masks = kept_units(model.dependencies, held).masks
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {"a[1]": 4, "b[1]": 3}
    out = jc.compress(both, model.params)
    np.testing.assert_array_equal(np.asarray(out["b"] != 0).any(1), masks["a[1]"])
    np.testing.assert_array_equal(np.asarray(out["b"] != 0).any(0), masks["b[1]"])
    assert len(np.unique(np.abs(out["b"]))) <= 128
    packed = jc.pack(both, model.params)
    for path, w in by_hand.by_paths(jc.todense(packed)).items():
        np.testing.assert_allclose(w, by_hand.by_paths(out)[path], rtol=1e-6)
    again = jc.chain(*(prune_groups(model.dependencies, s, where="a[1]") for s in (0.75, 0.5)))
    masks = kept_units(model.dependencies, again.find(model.params)).masks
    assert int(masks["a[1]"].sum()) == 2


@models
def test_packed_equals_projected_and_is_smaller(name):
    model = by_hand.MODELS[name]()
    p = prune_groups(model.dependencies, 0.5)
    opt = jc.projected(adam(), jc.every(10, p))
    params, state = jax.jit(lambda w: trained(model, opt, 2, w))(model.params)
    packed = jc.pack(state, params)
    for path, w in by_hand.by_paths(jc.todense(packed)).items():
        np.testing.assert_array_equal(w, by_hand.by_paths(params)[path])
    assert jc.tree.nbytes(packed) < 0.85 * jc.tree.nbytes(params)
    held = p.find(params)
    assert sum(mask.nbytes for mask in held.values()) == sum(
        int(np.prod(x.shape)) for x in jax.tree.leaves(held)
    )


def test_rows_that_stay_are_packed_as_blocks():
    model = by_hand.mlp()
    packed = jc.pack(prune_groups(model.dependencies, 0.5), model.params)
    assert packed["a"]["kernel"].block == (6, 1)
    assert packed["b"]["kernel"].block == (4,)
    stacked = jc.pack(prune_groups(by_hand.stack().dependencies, 0.5), by_hand.stack().params)
    assert stacked["up"].block == (4, 1)


def test_running_statistics_do_not_count_but_leave():
    model = by_hand.normed()
    loud = {**model.params, "norm": {**model.params["norm"]}}
    loud["norm"]["var"] = jnp.array([1e6, 1.0, 1.0, 1.0])
    p = prune_groups(model.dependencies, 0.5)
    keep = kept_units(model.dependencies, p.find(loud)).masks["conv[2]"]
    np.testing.assert_array_equal(keep, kept_by_sorting(model, model.dependencies.groups[0], 0.5))
    np.testing.assert_array_equal(jc.compress(p, loud)["norm"]["var"] != 0, keep)
    # An optimizer has only the trained leaves.
    part = {**loud, "norm": {"scale": loud["norm"]["scale"]}}
    out = jc.compress(p, part)
    np.testing.assert_array_equal(out["norm"]["scale"] != 0, keep)
    np.testing.assert_array_equal(kept_units(model.dependencies, out).masks["conv[2]"], keep)
    # Nor have statistics a say in what is zero.
    out["norm"] |= {"mean": loud["norm"]["mean"], "var": loud["norm"]["var"]}
    np.testing.assert_array_equal(kept_units(model.dependencies, out).masks["conv[2]"], keep)
    assert prune_groups(model.dependencies, 0.5, leaves="**/scale").find(loud)["conv"] is not None


def test_scores_of_any_form():
    model = by_hand.mlp()
    name = "a/kernel[1]"
    kept = lambda p: kept_units(model.dependencies, p.find(model.params)).masks[name]  # noqa: E731
    given = np.asarray([3, 1, 2, 8, 7, 6, 5, 4], np.float32)

    @jax.jit
    def by_units(x):
        p = prune_groups(model.dependencies, 0.5, scores={name: x})
        return p.find(model.params)

    held = by_units(jnp.asarray(given))
    np.testing.assert_array_equal(kept_units(model.dependencies, held).masks[name], given > 4)
    tree = jax.tree.map(jnp.zeros_like, model.params)
    tree["a"]["bias"] = jnp.asarray(given)
    np.testing.assert_array_equal(
        kept(prune_groups(model.dependencies, 0.5, score=tree)), given > 4
    )
    holes = dict(tree, a=dict(tree["a"], bias=jnp.where(given == 8, jnp.nan, given)))
    np.testing.assert_array_equal(
        kept(prune_groups(model.dependencies, 0.5, score=holes)),
        np.isin(given, [7, 6, 5, 4]),
    )
    tied = prune_groups(model.dependencies, 0.5, scores={name: jnp.ones(8)})
    np.testing.assert_array_equal(kept(tied), np.arange(8) < 4)


def test_gradients_of_the_step_reach_the_score():
    model = by_hand.normed()
    grads = jax.tree.map(lambda w: jnp.cos(9.0 * w), model.params)
    p = prune_groups(model.dependencies, 0.5, score=jc.pruning.saliency)
    opt = jc.projected(lenient(optax.sgd(0.0)), p)
    _, state = jax.jit(opt.update)(grads, opt.init(model.params), model.params)
    products = jax.tree.map(lambda w, g: w * g, model.params, grads)
    by_product = model._replace(params=products)
    want = kept_by_sorting(by_product, model.dependencies.groups[0], 0.5)
    assert (want != kept_by_sorting(model, model.dependencies.groups[0], 0.5)).any()
    np.testing.assert_array_equal(kept_units(model.dependencies, state).masks["conv[2]"], want)
    with pytest.raises(ValueError, match=r"saliency: `grads` must be given"):
        p.find(model.params)


def test_movement_is_gathered_while_masks_are_held():
    model = by_hand.mlp()
    p = prune_groups(model.dependencies, 0.5, score=jc.pruning.movement(), norm=jc.pruning.total)
    opt = jc.straight_through(lenient(optax.sgd(0.0)), jc.every(3, p))
    rng = np.random.default_rng(5)
    params, state = model.params, opt.init(model.params)
    total = np.zeros(8)
    update = jax.jit(opt.update)
    for t in range(4):
        grads = jax.tree.map(
            lambda w: jnp.asarray(rng.normal(size=w.shape), jnp.float32), model.params
        )
        # The dense weights stand still: their learning rate is 0.
        before = by_hand.by_paths(model.params)
        moves = {
            path: -w * g
            for (path, w), g in zip(before.items(), by_hand.by_paths(grads).values(), strict=True)
        }
        total += moves["a/bias"] + moves["a/kernel"].sum(0) + moves["b/kernel"].sum(1)
        updates, state = update(grads, state, params)
        params = applied(params, updates)
        if t == 3:
            keep = np.zeros(8, bool)
            keep[np.argsort(-total)[:4]] = True
            found = kept_units(model.dependencies, state).masks["a/kernel[1]"]
            np.testing.assert_array_equal(found, keep)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_params_keep_their_dtype_and_lose_the_same_units(dtype):
    model = by_hand.mlp(dtype)
    p = prune_groups(model.dependencies, 0.5)
    out = jc.compress(p, model.params)
    keep = kept_by_sorting(model, model.dependencies.groups[0], 0.5)
    np.testing.assert_array_equal(np.asarray(out["a"]["bias"] != 0), keep)
    assert {w.dtype for w in jax.tree.leaves(out)} == {jnp.dtype(dtype)}


@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize("scope", ["local", "global"])
def test_on_a_mesh_it_is_the_same(kind, scope):
    model = by_hand.stack()
    p = prune_groups(model.dependencies, 0.5, scope=scope)
    want = jc.compress(p, model.params)
    mesh = mesh_of(kind, 2)
    specs = {"bias": P(None, "d"), "down": P(None, "d", None), "up": P(None, "d", None)}
    with jax.set_mesh(mesh):
        shardings = jax.tree.map(lambda s: NamedSharding(mesh, s), specs)
        sharded = jax.device_put(model.params, shardings)
        got = jax.jit(lambda params: jc.compress(p, params))(sharded)
        held = jax.jit(p.find)(sharded)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)
    masks = kept_units(model.dependencies, held).masks["up[2]"]
    assert masks.sum() == 12


def test_zeroed_units_take_nan_along():
    model = by_hand.mlp()
    params = {**model.params, "b": {"kernel": model.params["b"]["kernel"].at[2, 1].set(jnp.nan)}}
    p = prune_groups(model.dependencies, 0.5)
    out = jc.compress(p, params)
    assert bool(jnp.isfinite(out["b"]["kernel"]).all())
    assert float(out["a"]["bias"][2]) == 0
    whole = kept_units(
        model.dependencies, jax.tree.map(lambda w: jnp.full_like(w, jnp.nan), params)
    )
    assert whole.masks["a/kernel[1]"].all()


class TestKeptUnits:
    def test_of_zeros_keeps_as_many_in_each_layer_and_one_at_least(self):
        model = by_hand.stack()
        live = np.zeros((3, 8), bool)
        live[0, [2, 5, 7]] = live[1, 6] = True
        params = {
            "bias": jnp.where(live, model.params["bias"], 0.0),
            "down": jnp.where(live[:, :, None], model.params["down"], 0.0),
            "up": jnp.where(live[:, None, :], model.params["up"], 0.0),
        }
        keep = kept_units(model.dependencies, params).masks["up[2]"]
        want = live.copy()
        want[1, [0, 1]] = want[2, [0, 1, 2]] = True
        np.testing.assert_array_equal(keep, want)
        small_params, small_fn = shrink(
            model.fn, params, kept_units(dependencies(model.fn, params, model.x), params), model.x
        )
        assert small_params["up"].shape == (3, 4, 3)
        np.testing.assert_allclose(
            small_fn(small_params, model.x), model.fn(params, model.x), rtol=1e-5, atol=1e-6
        )
        nothing = jax.tree.map(jnp.zeros_like, params)
        keep = kept_units(model.dependencies, nothing).masks["up[2]"]
        np.testing.assert_array_equal(keep, np.arange(8)[None] == np.zeros((3, 1)))

    def test_one_place_that_is_not_zero_keeps_a_unit(self):
        model = by_hand.mlp()
        params = jax.tree.map(jnp.zeros_like, model.params)
        params["b"]["kernel"] = params["b"]["kernel"].at[5, 3].set(1e-38)
        params["a"]["bias"] = params["a"]["bias"].at[1].set(-1.0)
        keep = kept_units(model.dependencies, params).masks["a/kernel[1]"]
        np.testing.assert_array_equal(np.flatnonzero(keep), [1, 5])

    def test_what_it_can_not_read_is_refused(self):
        model = by_hand.mlp()
        with pytest.raises(TypeError, match=r"kept_units: `source` must be concrete"):
            jax.jit(lambda w: kept_units(model.dependencies, w).masks)(model.params)
        p = prune_groups(model.dependencies, 0.5)
        batch = jax.vmap(lambda s: prune_groups(model.dependencies, s).find(model.params))
        with pytest.raises(ValueError, match=r"Take one example of a batch"):
            kept_units(model.dependencies, batch(jnp.array([0.2, 0.5])))
        other = by_hand._dependencies(
            {"a": {"bias": jnp.ones(4)}},
            by_hand._group("a/kernel[1]", 4, [("a/bias", 0, np.arange(4))]),
        )
        with pytest.raises(ValueError, match=r"hold masks of shape \[4\]"):
            kept_units(other, p.find(model.params))
        with pytest.raises(ValueError, match=r"must hold a leaf that loses units"):
            kept_units(model.dependencies, {"c": jnp.ones(3)})
        with pytest.raises(TypeError, match=r"`dependencies` must be Dependencies"):
            kept_units(model.params, model.params)


def test_what_does_not_fit_is_refused():
    model = by_hand.mlp()
    deps, find = model.dependencies, prune_groups(model.dependencies, 0.5).find
    with pytest.raises(TypeError, match=r"prune_groups: `dependencies` must be Dependencies"):
        prune_groups(model.params, 0.5)
    with pytest.raises(ValueError, match=r"`sparsity` must be a real number in \[0, 1\]"):
        prune_groups(deps, 1.5)
    with pytest.raises(ValueError, match=r"`scope` must be one of 'local', 'global'"):
        prune_groups(deps, 0.5, scope="leaf")
    with pytest.raises(ValueError, match=r"`overlap` must be one of"):
        prune_groups(deps, 0.5, overlap="all")
    with pytest.raises(TypeError, match=r"`normalize` must be None or a function"):
        prune_groups(deps, 0.5, normalize="mean")
    with pytest.raises(ValueError, match=r"prune_groups: `where` must match the name"):
        prune_groups(deps, 0.5, where="c")
    with pytest.raises(ValueError, match=r"prune_groups: `multiple_of` must be"):
        prune_groups(deps, 0.5, multiple_of=0)
    with pytest.raises(
        ValueError, match=r"prune_groups: `floor` must be a real number in \[0, 1\]"
    ):
        prune_groups(deps, 0.5, floor=1.5)
    with pytest.raises(TypeError, match=r"`score` must be called as score"):
        prune_groups(deps, 0.5, score=jc.pruning.movement)
    with pytest.raises(
        ValueError, match=r"shape \[\*layers, size\], got float32\[3\] at 'a/kernel"
    ):
        prune_groups(deps, 0.5, scores={"a/kernel[1]": jnp.ones(3)})
    with pytest.raises(TypeError, match=r"`scores` must be a dict by the names of groups"):
        prune_groups(deps, 0.5, scores=jnp.ones(8))
    with pytest.raises(ValueError, match=r"leave a group that loses units and has scores"):
        prune_groups(deps, 0.5, exclude="a/*").find(model.params)
    with pytest.raises(ValueError, match=r"have the shape \[8\], got float32\[9\] at 'a/bias'"):
        find({"a": {"bias": jnp.ones(9)}})
    with pytest.raises(ValueError, match=r"prune_groups: `where` must match at least one array"):
        find({"c": jnp.ones((8, 8))})
    with pytest.raises(TypeError, match=r"prune_groups: `params` must be dense, got BitMasked"):
        find(jc.pack(prune_groups(deps, 0.5), model.params))
