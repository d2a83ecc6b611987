import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxcompress as jc
from jaxcompress.pruning.structured._base import Dependencies, Group, Keep, Member
from jaxcompress.pruning.structured._shrink_like import owner_of, shrink_like
from tests.conftest import counting_jit, lenient, mesh_of

rng = np.random.default_rng(0)
KEPT = np.array([0, 3, 4, 7, 8, 9, 14])
MASK = np.isin(np.arange(16), KEPT)


def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


PARAMS = {
    "a": {"kernel": normal(8, 16), "bias": normal(16)},
    "b": {"kernel": normal(16, 4), "bias": normal(4)},
}


def keep_of(params, members, mask, layers=()):
    """One group with these `(path, axis, units)`."""
    name = f"{members[0][0]}[{members[0][1]}]"
    shapes = {path: jax.typeof(jnp.asarray(x)) for path, x in jc.tree.leaves_with_paths(params)}
    group = Group(name, mask.shape[-1], tuple(Member(*m) for m in members), layers)
    return Keep(Dependencies((group,), (), shapes), {name: mask})


def mlp_keep(params=PARAMS, prefix=""):
    units = np.arange(16)
    members = [("a/kernel", 1, units), ("a/bias", 0, units), ("b/kernel", 0, units)]
    return keep_of(params, [(prefix + path, d, u) for path, d, u in members], MASK)


def by_hand(params):
    """The oracle: NumPy's indexing, written for this model."""
    a, b = params["a"], params["b"]
    kernel, bias, out = np.asarray(a["kernel"]), np.asarray(a["bias"]), np.asarray(b["kernel"])
    return {
        "a": {"kernel": kernel[:, KEPT], "bias": bias[KEPT]},
        "b": {"kernel": out[KEPT], "bias": np.asarray(b["bias"])},
    }


def where(mask, leaf):
    return leaf if isinstance(leaf, optax.MaskedNode) else jnp.where(mask, leaf, 0)


def masked(params):
    a, b = params["a"], params["b"]
    return {
        "a": {"kernel": where(MASK[None], a["kernel"]), "bias": where(MASK, a["bias"])},
        "b": {"kernel": where(MASK[:, None], b["kernel"]), "bias": b["bias"]},
    }


def loss(params, batch):
    x, y = batch
    hidden = jax.nn.relu(x @ params["a"]["kernel"] + params["a"]["bias"][None])
    return jnp.mean(jnp.square(hidden @ params["b"]["kernel"] + params["b"]["bias"][None] - y))


def is_params(x):
    return isinstance(x, dict) and set(x) == {"a", "b"}


def cut_by_hand(state):
    return jax.tree.map(lambda x: by_hand(x) if is_params(x) else x, state, is_leaf=is_params)


def masked_state(state):
    return jax.tree.map(lambda x: masked(x) if is_params(x) else x, state, is_leaf=is_params)


OPTIMIZERS = {
    "adam": optax.adam(1e-2),
    "sgd": optax.sgd(1e-2, momentum=0.9, nesterov=True),
    "adamw": optax.adamw(1e-2, weight_decay=0.1),
    "lamb": optax.lamb(1e-2),
    "lion": optax.lion(1e-3),
    "amsgrad": optax.amsgrad(1e-2),
    "adadelta": optax.adadelta(1e-1),
    "rmsprop": optax.rmsprop(1e-2, momentum=0.9),
    "adagrad": optax.adagrad(1e-1),
    "several": optax.MultiSteps(optax.adam(1e-2), 2),
    "injected": optax.inject_hyperparams(optax.adam)(1e-2),
    "clipped": optax.chain(optax.clip_by_global_norm(0.1), optax.adam(1e-2), optax.ema(0.9)),
    "some": optax.masked(optax.adam(1e-2), {"a": True, "b": {"kernel": True, "bias": False}}),
    "labels": optax.multi_transform(
        {"x": optax.adam(1e-2), "y": optax.sgd(1e-2, 0.9)},
        {"a": {"kernel": "x", "bias": "x"}, "b": {"kernel": "y", "bias": "x"}},
    ),
}


def steps(optimizer, params, state, batches, again=lambda params: params):
    optimizer = lenient(optimizer)
    for batch in batches:
        updates, state = optimizer.update(jax.grad(loss)(params, batch), state, params)
        params = again(optax.apply_updates(params, updates))
    return params, state


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_as_that_of_the_masked_params(name):
    optimizer = OPTIMIZERS[name]
    batches = [(normal(8, 8), normal(8, 4)) for _ in range(6)]
    params, state = steps(optimizer, PARAMS, optimizer.init(PARAMS), batches[:3])
    # What leaves has moments too; a norm over a leaf (lamb, clipping) must not see them.
    params, state = masked(params), masked_state(state)
    small = shrink_like(state, mlp_keep())
    wanted = optimizer.init(by_hand(params))
    assert jax.tree.structure(small) == jax.tree.structure(wanted)
    jax.tree.map(
        lambda x, y: np.testing.assert_equal((x.shape, x.dtype), (y.shape, y.dtype)), small, wanted
    )
    after, state = steps(optimizer, params, state, batches[3:], masked)
    small_after, small = steps(
        optimizer, jax.tree.map(jnp.asarray, by_hand(params)), small, batches[3:]
    )
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6),
        small_after,
        by_hand(after),
    )
    assert len(jax.tree.leaves(small)) == len(jax.tree.leaves(state))


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in ("some", "labels")])
def test_every_leaf_of_the_state_is_the_slice_of_the_one_before(name):
    optimizer = OPTIMIZERS[name]
    state = optimizer.init(PARAMS)
    filled = jax.tree.map(lambda x: x + jnp.arange(x.size).reshape(x.shape).astype(x.dtype), state)
    jax.tree.map(
        np.testing.assert_array_equal, shrink_like(filled, mlp_keep()), cut_by_hand(filled)
    )


def test_the_params_themselves_and_gradients():
    keep = mlp_keep()
    jax.tree.map(np.testing.assert_array_equal, shrink_like(PARAMS, keep), by_hand(PARAMS))
    grads = jax.grad(loss)(PARAMS, (normal(8, 8), normal(8, 4)))
    jax.tree.map(
        np.testing.assert_array_equal, shrink_like([grads, 3, None], keep)[0], by_hand(grads)
    )
    assert shrink_like([grads, 3, None], keep)[1:] == [3, None]


def test_a_group_that_is_not_named_and_one_that_stays_whole_change_nothing():
    keep = mlp_keep()
    for masks in ({}, {"a/kernel[1]": np.ones(16, bool)}):
        same = shrink_like(PARAMS, Keep(keep.dependencies, masks))
        jax.tree.map(np.testing.assert_array_equal, same, PARAMS)


def test_under_jit_with_one_trace_and_abstract_alike():
    keep, optimizer = mlp_keep(), optax.adam(1e-2)
    state = optimizer.init(PARAMS)
    jitted = counting_jit(lambda state: shrink_like(state, keep))
    wanted = cut_by_hand(state)
    for _ in range(2):
        jax.tree.map(np.testing.assert_array_equal, jitted(state), wanted)
    assert jitted.traces == 1
    shapes = shrink_like(jax.eval_shape(lambda: state), keep)
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(shapes))
    jax.tree.map(
        lambda x, y: np.testing.assert_equal((x.shape, x.dtype), (y.shape, y.dtype)),
        shapes,
        state and jitted(state),
    )
    in_numpy = shrink_like(jax.tree.map(np.asarray, state), keep)
    assert all(isinstance(x, (np.ndarray, np.generic)) for x in jax.tree.leaves(in_numpy))
    jax.tree.map(np.testing.assert_array_equal, in_numpy, wanted)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.int8, bool])
def test_dtypes_stay(dtype):
    tree = jax.tree.map(lambda x: x.astype(dtype), PARAMS)
    small = shrink_like(tree, mlp_keep())
    assert {x.dtype for x in jax.tree.leaves(small)} == {jnp.dtype(dtype)}
    jax.tree.map(np.testing.assert_array_equal, small, by_hand(tree))


def test_vmap_and_the_copies_of_a_sweep():
    keep, optimizer = mlp_keep(), optax.adam(1e-2)
    many = jax.vmap(lambda s: jax.tree.map(lambda x: s * x, PARAMS))(jnp.arange(3.0))
    states = jax.vmap(optimizer.init)(many)
    mapped = jax.vmap(lambda state: shrink_like(state, keep))(states)
    jax.tree.map(np.testing.assert_array_equal, shrink_like(states, keep), mapped)
    assert mapped[0].mu["a"]["kernel"].shape == (3, 8, 7)
    np.testing.assert_array_equal(
        shrink_like(many, keep)["b"]["kernel"], many["b"]["kernel"][:, KEPT]
    )


def test_gradients_pass():
    keep = mlp_keep()
    got = jax.grad(lambda p: shrink_like(p, keep)["a"]["kernel"].sum())(PARAMS)
    np.testing.assert_array_equal(got["a"]["kernel"], np.broadcast_to(MASK, (8, 16)))


@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize("jit", [False, True])
def test_on_a_mesh(kind, jit):
    mesh = mesh_of(kind)
    sharded = jax.device_put(PARAMS["a"]["kernel"], jax.NamedSharding(mesh, jax.P("d")))
    bias = jax.device_put(PARAMS["a"]["bias"], jax.NamedSharding(mesh, jax.P("d")))
    tree = {"a": {"kernel": sharded, "bias": bias}}
    cut = (
        jax.jit(lambda t: shrink_like(t, mlp_keep()))
        if jit
        else lambda t: shrink_like(t, mlp_keep())
    )
    small = cut(tree)
    np.testing.assert_array_equal(small["a"]["kernel"], by_hand(PARAMS)["a"]["kernel"])
    np.testing.assert_array_equal(small["a"]["bias"], by_hand(PARAMS)["a"]["bias"])
    if kind == "explicit":
        # Seven entries are not shared by four devices.
        assert jax.typeof(small["a"]["kernel"]).sharding.spec[0] == "d"
        assert jax.typeof(small["a"]["bias"]).sharding.spec == jax.P(None)


def test_layers_of_a_scan_lose_their_own_units():
    params = {"up": normal(3, 4, 6), "down": normal(3, 6, 4)}
    mask = np.zeros((3, 6), bool)
    kept = [[0, 1, 5], [1, 2, 3], [0, 4, 5]]
    for i, places in enumerate(kept):
        mask[i, places] = True
    units = np.arange(6)
    keep = keep_of(params, [("up", 2, units), ("down", 1, units)], mask, (3,))
    for tree in (params, jax.tree.map(np.asarray, params)):
        small = shrink_like(optax.adam(1.0).init(params)[0]._replace(mu=tree), keep).mu
        up, down = np.asarray(params["up"]), np.asarray(params["down"])
        np.testing.assert_array_equal(
            small["up"], np.stack([up[i][:, p] for i, p in enumerate(kept)])
        )
        np.testing.assert_array_equal(
            small["down"], np.stack([down[i][p] for i, p in enumerate(kept)])
        )
    several = shrink_like({"up": jnp.stack([params["up"]] * 2)}, keep)["up"]
    np.testing.assert_array_equal(several[1], small["up"])
    with pytest.raises(ValueError, match="as many in each layer"):
        shrink_like(
            params, keep_of(params, [("up", 2, units)], mask | (np.arange(3) == 1)[:, None], (3,))
        )


def test_heads_and_features_of_heads_meet_on_one_axis():
    params = {"q": normal(8, 12), "o": normal(12, 8)}
    head, feature = np.repeat(np.arange(3), 4), np.tile(np.arange(4), 3)
    shapes = {path: jax.typeof(x) for path, x in params.items()}
    groups = (
        Group("heads", 3, (Member("q", 1, head), Member("o", 0, head))),
        Group("features", 4, (Member("q", 1, feature), Member("o", 0, feature))),
    )
    masks = {
        "heads": np.array([True, False, True]),
        "features": np.array([True, True, False, True]),
    }
    small = shrink_like(params, Keep(Dependencies(groups, (), shapes), masks))
    places = [0, 1, 3, 8, 9, 11]
    np.testing.assert_array_equal(small["q"], params["q"][:, np.array(places)])
    np.testing.assert_array_equal(small["o"], params["o"][np.array(places)])


def test_adafactor_rows_and_columns():
    params = {"a": {"kernel": normal(16, 12), "bias": normal(12)}, "b": {"kernel": normal(12, 12)}}
    mask = np.arange(12) < 10
    units = np.arange(12)
    keep = keep_of(
        params, [("a/kernel", 1, units), ("a/bias", 0, units), ("b/kernel", 0, units)], mask
    )
    optimizer = optax.adafactor(1e-2, min_dim_size_to_factor=4)
    state = jax.tree.map(
        lambda x: jnp.arange(x.size).reshape(x.shape).astype(x.dtype), optimizer.init(params)
    )
    small = shrink_like({"s": state}, keep)["s"][0]
    # Of [16, 12] the rows are averages over the larger axis, so their entries are columns.
    np.testing.assert_array_equal(small.v_row["a"]["kernel"], np.arange(10))
    np.testing.assert_array_equal(small.v_col["a"]["kernel"], np.arange(16))
    np.testing.assert_array_equal(small.v_row["b"]["kernel"], np.arange(10))
    np.testing.assert_array_equal(small.v_col["b"]["kernel"], np.arange(12))
    np.testing.assert_array_equal(small.v["a"]["bias"], np.arange(10))
    shrunk = {
        "a": {"kernel": params["a"]["kernel"][:, :10], "bias": params["a"]["bias"][:10]},
        "b": {"kernel": params["b"]["kernel"][:10]},
    }
    wanted = optimizer.init(shrunk)[0]
    assert jax.tree.map(jnp.shape, small) == jax.tree.map(jnp.shape, wanted)


def test_square_rows_and_columns_are_told_apart():
    params = {"w": normal(12, 12)}
    mask = np.arange(12) % 2 == 0
    state = {"v_row": {"w": jnp.arange(12.0)}, "v_col": {"w": jnp.arange(12.0)}}
    # [12, 6]: the last axis was the larger by NumPy's order, and is not any more.
    with pytest.raises(ValueError, match="v_"):
        shrink_like(state, keep_of(params, [("w", 1, np.arange(12))], mask))
    # [6, 12]: the rows average over the last axis before and after.
    small = shrink_like(state, keep_of(params, [("w", 0, np.arange(12))], mask))
    np.testing.assert_array_equal(small["v_row"]["w"], np.arange(0, 12, 2))
    np.testing.assert_array_equal(small["v_col"]["w"], np.arange(12))
    with pytest.raises(ValueError, match="tell by its shape"):
        shrink_like({"mu": {"w": jnp.ones(12)}}, keep_of(params, [("w", 0, np.arange(12))], mask))


def test_below_the_size_that_adafactor_factors_from():
    params = {"w": jnp.zeros((130, 200))}
    mask = np.arange(130) < 100
    optimizer = optax.adafactor(1e-2)
    with pytest.raises(ValueError, match="v_row/w"):
        shrink_like(optimizer.init(params), keep_of(params, [("w", 0, np.arange(130))], mask))


def test_scales_and_what_has_no_readable_shape():
    keep = mlp_keep()

    def of(leaf):
        return {"scale": {"a": {"kernel": leaf}}}

    small = shrink_like(of(jnp.arange(32.0).reshape(2, 16)), keep)["scale"]["a"]["kernel"]
    np.testing.assert_array_equal(small, np.arange(32.0).reshape(2, 16)[:, KEPT])
    for stays in (jnp.ones((8, 1)), jnp.ones(()), jnp.ones((1, 1)), jnp.ones(8)):
        same = shrink_like(of(stays), keep)["scale"]["a"]["kernel"]
        assert same.shape == stays.shape
    for wrong in (jnp.ones((8, 2)), jnp.ones((16, 8)), jnp.ones(3), jnp.ones((8, 15))):
        with pytest.raises(ValueError, match=r"at 'scale/a/kernel'.*optimizer.init"):
            shrink_like(of(wrong), keep)


def test_low_rank_latents_are_refused_where_they_are_cut():
    keep = mlp_keep()
    # A rank of 3 divides neither of the sizes that shrink.
    with pytest.raises(ValueError, match="a/kernel/u"):
        shrink_like({"a": {"kernel": {"v": normal(3, 16), "u": normal(8, 3)}}}, keep)


def test_compressed_leaves_are_refused():
    packed = jc.pack(jc.quantize(bits=8), PARAMS)
    with pytest.raises(TypeError, match="Shrink first"):
        shrink_like(packed, mlp_keep())


@pytest.mark.parametrize(
    "make",
    [
        lambda: jc.projected(optax.adam(1e-2), jc.prune(0.5)),
        lambda: jc.projected(
            optax.adam(1e-2), jc.every(3, jc.prune(0.5, score=jc.pruning.movement()))
        ),
        lambda: jc.straight_through(optax.sgd(1e-2, 0.9), jc.prune(0.5), decay=1e-3),
        lambda: optax.chain(optax.adam(1e-2), jc.project_params(jc.prune(0.5))),
        lambda: jc.straight_through(optax.adam(1e-2), jc.quantize(bits=4)),
    ],
)
def test_states_of_projections(make):
    optimizer = make()
    state = optimizer.init(PARAMS)
    keep = mlp_keep()
    got = shrink_like(state, keep)
    wanted = jax.eval_shape(optimizer.init, by_hand(PARAMS))
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    jax.tree.map(
        lambda x, y: np.testing.assert_equal((x.shape, x.dtype), (y.shape, y.dtype)), got, wanted
    )
    abstract = shrink_like(jax.eval_shape(lambda: state), keep)
    assert jax.tree.structure(abstract) == jax.tree.structure(wanted)


def test_masks_of_weights_are_cut():
    masks = jc.prune(0.5).find(PARAMS)
    small = shrink_like(masks, mlp_keep())
    first, second = (np.asarray(masks[path].keep) for path in ("a/kernel", "b/kernel"))
    np.testing.assert_array_equal(small["a/kernel"].keep, first[:, KEPT])
    np.testing.assert_array_equal(small["b/kernel"].keep, second[KEPT])
    two_of_four = jc.prune(nm=(2, 4)).find(PARAMS)
    with pytest.raises(ValueError, match=r"N:M pattern"):
        shrink_like(two_of_four, mlp_keep())


def test_a_pattern_along_another_axis_stays():
    kernel = {"a": {"kernel": PARAMS["a"]["kernel"]}}
    before = jc.prune(nm=(2, 4)).find(kernel)["a/kernel"]
    small = shrink_like({"a/kernel": before}, mlp_keep())["a/kernel"]
    assert (small.nm, small.axis) == (before.nm, before.axis) == ((2, 4), 0)
    np.testing.assert_array_equal(small.keep, np.asarray(before.keep)[:, KEPT])


def test_the_state_of_an_nnx_optimizer():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.a, self.b = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 4, rngs=rngs)

    optimizer = nnx.Optimizer(Net(nnx.Rngs(0)), optax.adam(1e-2), wrt=nnx.Param)
    for state in (nnx.state(optimizer), nnx.to_pure_dict(nnx.state(optimizer))):
        small = dict(jc.tree.leaves_with_paths(shrink_like(state, mlp_keep())))
        assert small["opt_state/0/mu/a/kernel"].shape == (8, 7)
        assert small["opt_state/0/nu/b/kernel"].shape == (7, 4)
        assert small["opt_state/0/nu/b/bias"].shape == (4,)
        assert small["step"].shape == ()
        assert jax.tree.structure(shrink_like(state, mlp_keep())) == jax.tree.structure(state)


def test_params_tell_copies_from_other_paths():
    # The paths of a list are numbers, as those of an optimizer's parts are.
    params = [normal(4, 6), normal(6, 2)]
    keep = keep_of(params, [("0", 1, np.arange(6)), ("1", 0, np.arange(6))], np.arange(6) < 3)
    state = ({"history": jnp.ones(5), "mu": params}, [jnp.ones((9, 9)), jnp.ones(7)])
    with pytest.raises(ValueError, match="0/history"):
        shrink_like(state, keep)
    small = shrink_like(({"history": jnp.ones(5), "mu": params}, params), keep, params=params)
    assert jax.tree.map(jnp.shape, small[0]) == {"history": (5,), "mu": [(4, 3), (3, 2)]}
    assert jax.tree.map(jnp.shape, small[1]) == [(4, 3), (3, 2)]
    with pytest.raises(ValueError, match="be the params that `keep` is of"):
        shrink_like(state, keep, params={"other": params[0]})


def test_params_of_one_leaf():
    w = normal(4, 6)
    keep = keep_of(w, [("", 1, np.arange(6))], np.arange(6) < 3)
    for params in (None, w):
        small = shrink_like(optax.adam(1e-2).init(w), keep, params=params)
        assert (small[0].mu.shape, small[0].count.shape) == ((4, 3), ())


def test_the_longest_path_owns_a_leaf():
    shapes = {"kernel": 0, "a/kernel": 0, "b": 0}
    assert owner_of("0/mu/a/kernel", shapes) == "a/kernel"
    assert owner_of("0/mu/c/kernel", shapes) == "kernel"
    assert owner_of("0/mu/xa/kernel", shapes) == "kernel"
    assert owner_of("s/a/kernel/bits", shapes) == "a/kernel"
    assert owner_of("s/a/kernel/bits", shapes, inside=False) is None
    assert owner_of("0/count", shapes) is None


def test_what_is_no_choice_is_refused():
    with pytest.raises(TypeError, match="shrink_like: `keep` must be what stays"):
        shrink_like(PARAMS, {"a": 1})


def test_nothing_left_and_empty_trees():
    nothing = keep_of(PARAMS, [("a/kernel", 1, np.arange(16))], np.zeros(16, bool))
    with pytest.raises(ValueError, match="must keep a unit of each group at least"):
        shrink_like(PARAMS, nothing)
    keep = keep_of(PARAMS, [("a/kernel", 1, np.arange(16))], np.arange(16) < 1)
    assert shrink_like(PARAMS, keep)["a"]["kernel"].shape == (8, 1)
    assert shrink_like((), keep) == ()
    assert shrink_like(optax.EmptyState(), keep) == optax.EmptyState()


def stack(params, x):
    def layer(x, p):
        return x + jnp.tanh(x @ p["up"]) @ p["down"], None

    x, _ = jax.lax.scan(layer, x + jnp.tanh(x @ params["first"]), params["layers"])
    return x


STACK = {"first": normal(4, 4), "layers": {"up": normal(5, 4, 6), "down": normal(5, 6, 4)}}


def test_blocks_that_are_left_out():
    dropped = pytest.importorskip("jaxcompress.pruning.structured._blocks")
    x = jnp.ones((2, 4))
    shapes = {path: jax.typeof(w) for path, w in jc.tree.leaves_with_paths(STACK)}
    first, scan = dropped.residual_blocks(stack, STACK, x)
    stays = (True, False, True, False, True)
    optimizer = optax.adam(1e-2)
    choices = [
        (dropped.Dropped(first),),
        (dropped.Dropped(scan, stays),),
        (dropped.Dropped(first), dropped.Dropped(scan, stays)),
        (dropped.Dropped(scan, (False,) * 5),),
    ]
    for blocks in choices:
        small, _ = dropped.drop_blocks(stack, STACK, blocks, x)
        keep = Keep(Dependencies((), (), shapes), {}, blocks)
        jax.tree.map(np.testing.assert_array_equal, shrink_like(STACK, keep), small)
        state = shrink_like(optimizer.init(STACK), keep)
        wanted = optimizer.init(small)
        assert jax.tree.structure(state) == jax.tree.structure(wanted)
        assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, wanted)


def test_layers_that_are_left_out_and_units_of_the_others():
    blocks = pytest.importorskip("jaxcompress.pruning.structured._blocks")
    (_, scan) = blocks.residual_blocks(stack, STACK, jnp.ones((2, 4)))
    mask = np.zeros((5, 6), bool)
    for i in range(5):
        mask[i, [i, (i + 2) % 6]] = True
    # A layer that goes may have kept any number.
    mask[1] = True
    units = np.arange(6)
    members = [("layers/up", 2, units), ("layers/down", 1, units)]
    keep = keep_of(STACK, members, mask, (5,))
    stays = (True, False, True, False, True)
    keep = Keep(keep.dependencies, keep.masks, (blocks.Dropped(scan, stays),))
    for tree in (STACK, jax.tree.map(np.asarray, STACK)):
        small = shrink_like({"mu": tree}, keep)["mu"]
        up = np.asarray(STACK["layers"]["up"])
        wanted = np.stack([up[i][:, np.flatnonzero(mask[i])] for i in (0, 2, 4)])
        np.testing.assert_array_equal(small["layers"]["up"], wanted)
        assert small["first"].shape == (4, 4)


def test_as_the_params_are_shrunk():
    real = pytest.importorskip("jaxcompress.pruning.structured._dependencies")
    cut = pytest.importorskip("jaxcompress.pruning.structured._shrink")
    x, y = normal(8, 8), normal(8, 4)

    def apply(params, x):
        hidden = jax.nn.relu(x @ params["a"]["kernel"] + params["a"]["bias"][None])
        return hidden @ params["b"]["kernel"] + params["b"]["bias"][None]

    groups = real.dependencies(apply, PARAMS, x)
    (group,) = groups.groups
    keep = Keep(groups, {group.name: MASK})
    small, small_apply = cut.shrink(apply, PARAMS, keep, x)
    jax.tree.map(np.testing.assert_array_equal, shrink_like(PARAMS, keep), small)
    optimizer = lenient(optax.adamw(1e-2))
    state = shrink_like(optimizer.init(PARAMS), keep)

    def error(params):
        return jnp.mean(jnp.square(small_apply(params, x) - y))

    before = error(small)
    for _ in range(5):
        updates, state = optimizer.update(jax.grad(error)(small), state, small)
        small = optax.apply_updates(small, updates)
    assert error(small) < before
