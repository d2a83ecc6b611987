"""Programs that people write, in which groups were once wrong or missing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from tests.pruning.structured.removal import assert_close, masked, some_units
from tests.pruning.structured.zoo_parts import normal


def exact(fn, params, *args):
    """The dependencies; half of all units of all groups is removed, and then of each alone."""
    deps = jc.dependencies(fn, params, *args)
    for groups in (deps.groups, *((group,) for group in deps.groups)):
        keep = some_units(deps, groups)
        small, run = jc.shrink(fn, params, keep, *args)
        assert_close(jax.jit(run)(small, *args), fn(masked(params, keep), *args))
    return deps


def test_layers_of_a_scan_that_drop_out_at_random_share_their_units():
    def fn(p, x):
        def layer(x, given):
            w, key = given
            u = jax.nn.relu(x @ w["u"])
            u = jnp.where(jax.random.bernoulli(key, 0.5, u.shape), u, jnp.zeros_like(u))
            return x + u @ w["d"], None

        return jax.lax.scan(layer, x, (p, jax.random.split(jax.random.key(0), 3)))[0]

    (group,) = exact(fn, {"u": normal(3, 6, 8), "d": normal(3, 8, 6)}, normal(4, 6)).groups
    assert (group.size, group.layers) == (8, ())


def group_norm(x, groups):
    y = x.reshape(*x.shape[:-1], groups, -1)
    mean = jnp.mean(y, -1, keepdims=True)
    variance = jnp.mean(jnp.square(y), -1, keepdims=True) - jnp.square(mean)
    return ((y - mean) * jax.lax.rsqrt(variance + 0.1)).reshape(x.shape)


def test_groups_of_a_norm_before_and_after_a_skip_is_joined():
    def fn(p, z):
        a = z @ p["a"]
        d = group_norm(a, 4) @ p["c"]
        return group_norm(jnp.concatenate([d, a], -1), 8) @ p["o"]

    params = {"a": normal(5, 8), "c": normal(8, 8), "o": normal(16, 3)}
    found = {group.name: group.size for group in exact(fn, params, normal(4, 5)).groups}
    # The two halves have groups of their own; the features of a group are the same in both.
    assert found == {"a[1]/blocks": 4, "a[1]/strides": 2, "c[1]/blocks": 4}


def test_state_at_its_own_path_in_the_result():
    def fn(both, x):
        params, state = both
        h = x @ params["k"]
        new = {"c": 0.9 * state["c"] + 0.1 * jnp.mean(h, 0)}
        return jnp.tanh(h + state["c"][None]) @ params["o"], new

    both = ({"k": normal(6, 8), "o": normal(8, 3)}, {"c": normal(8)})
    x = normal(4, 6)
    (group,) = jc.dependencies(fn, both, x).groups
    keep = some_units(jc.dependencies(fn, both, x), (group,))
    small, run = jc.shrink(fn, both, keep, x)
    y, state = run(small, x)
    assert_close(y, fn(masked(both, keep), x)[0])
    assert state["c"].shape == (4,)


def test_rows_that_no_argument_reaches_stay():
    def fn(p, x):
        return (x + p["pos"][: x.shape[0]]) @ p["w"]

    params = {"pos": normal(8, 6), "w": normal(6, 3)}
    deps = jc.dependencies(fn, params, normal(5, 6))
    assert not deps.groups
    reasons = {f.reason: f.count for f in deps.frozen if (f.path, f.axis) == ("pos", 0)}
    assert reasons == {"it is an argument": 5, "it is not used with these arguments": 3}


def test_a_mean_over_the_name_of_a_vmap():
    def fn(p, x):
        def one(x):
            h = x @ p["a"]
            return jax.nn.relu(h - jax.lax.pmean(h, "batch")) @ p["o"]

        return jax.vmap(one, axis_name="batch")(x)

    (group,) = exact(fn, {"a": normal(6, 8), "o": normal(8, 3)}, normal(4, 6)).groups
    assert group.size == 8


def mlp(p, x):
    return jax.nn.relu(x @ p["a"]) @ p["o"]


PARAMS = {"a": normal(6, 8), "o": normal(8, 3)}


@pytest.mark.parametrize(
    ("masks", "error", "message"),
    [
        ({"a[1]": np.ones(7, bool)}, ValueError, r"hold masks of the shape \[8\]"),
        ({"a[1]": np.arange(9) < 4}, ValueError, r"hold masks of the shape \[8\]"),
        ({"a[2]": np.arange(8) < 4}, ValueError, r"one of 'a\[2\]'. There are \['a\[1\]'\]"),
        ({"a[1]": np.array([0, 3, 4])}, TypeError, r"hold bools, got int64\[3\] at 'a\[1\]'"),
        ({"a[1]": np.zeros(8, bool)}, ValueError, r"keep a unit of each group at least"),
    ],
)
def test_masks_made_by_hand_are_checked(masks, error, message):
    deps = jc.dependencies(mlp, PARAMS, normal(4, 6))
    with pytest.raises(error, match=f"shrink: `keep` must .*{message}"):
        jc.shrink(mlp, PARAMS, jc.pruning.Keep(deps, masks), normal(4, 6))


def test_the_small_function_says_that_params_are_the_large_ones():
    deps = jc.dependencies(mlp, PARAMS, normal(4, 6))
    small, run = jc.shrink(mlp, PARAMS, some_units(deps, deps.groups), normal(4, 6))
    with pytest.raises(ValueError, match=r"shrink: `params` must be the small ones.* at 'a'"):
        run(PARAMS, normal(4, 6))
    with pytest.raises(ValueError, match=r"shrink: `params` must be the small ones.* at 'o'"):
        run({"a": small["a"]}, normal(4, 6))


def test_sizes_that_are_not_known_are_refused():
    deps = jc.dependencies(mlp, PARAMS, normal(4, 6))
    small, run = jc.shrink(mlp, PARAMS, some_units(deps, deps.groups), normal(4, 6))
    shape = jax.export.symbolic_shape("b, 6")
    with pytest.raises(ValueError, match="shrink: `args` must have known sizes"):
        jax.export.export(jax.jit(run))(small, jax.ShapeDtypeStruct(shape, jnp.float32))
    exported = jax.export.export(jax.jit(run))(small, normal(4, 6))
    assert_close(exported.call(small, normal(4, 6)), run(small, normal(4, 6)))


def test_global_pruning_that_grows_keeps_the_order_of_what_is_left():
    """Units that are gone don't lift those that are left above the ones of other groups."""
    scores = jnp.array([0.0, 0.0, 0.0, 3.0, 4.0, 5.0])
    np.testing.assert_allclose(jc.pruning.by_mean(scores)[3:], np.array([3.0, 4.0, 5.0]) / 4)


def test_a_rule_for_a_product_is_exact_where_one_side_is_zero():
    """Experts on sorted tokens, for which there is no rule of ours."""

    def fn(p, x):
        sizes = jnp.array([2, 2], jnp.int32)
        hidden = jnp.tanh(jax.lax.ragged_dot(x, p["up"], sizes) + 1.0)
        return jax.lax.ragged_dot(hidden, p["down"], sizes)

    params = {"up": normal(2, 6, 8), "down": normal(2, 8, 3)}
    x = normal(4, 6)
    assert not jc.dependencies(fn, params, x).groups
    rule = jc.pruning.AxisRule("t d, _ d f, _ -> t f")
    (group,) = jc.dependencies(fn, params, x, rules={"ragged_dot_general": rule}).groups
    assert (group.name, group.size, group.inexact) == ("up[2]", 8, None)


def test_a_norm_or_rules_that_are_none_are_refused():
    deps = jc.dependencies(mlp, PARAMS, normal(4, 6))
    with pytest.raises(TypeError, match="unit_scores: `norm` must be a function"):
        jc.select(deps, PARAMS, norm="l2")
    with pytest.raises(TypeError, match="dependencies: `rules` must be None or AxisRules by name"):
        jc.dependencies(mlp, PARAMS, normal(4, 6), rules={"tanh": "a -> a"})


def test_a_mask_that_is_repeated_over_heads_is_sliced_not_gathered():
    """Gathers of large constants are folded by XLA, which takes long."""

    def fn(p, x):
        scores = jnp.einsum("td,dh,sd->hts", x, p["a"], x)
        causal = jnp.tril(jnp.ones((4, 4), bool))
        scores = jnp.where(causal[None], scores, jnp.full_like(scores, -1e9))
        return jnp.einsum("hts,sd,h->td", jax.nn.softmax(scores, -1), x, p["b"])

    params, x = {"a": normal(6, 8), "b": normal(8)}, normal(4, 6)
    deps = exact(fn, params, x)
    small, run = jc.shrink(fn, params, some_units(deps, deps.groups), x)
    program = str(jax.make_jaxpr(run)(small, x))
    assert "bool[4,4,4]" in program
    assert "gather" not in program


def test_values_that_are_traced_around_the_function():
    """A temperature and a mask that a `jit` and a `vmap` around it trace, closed over."""
    x, masks = normal(4, 6), jnp.arange(8.0)

    def closing(temperature, mask):
        def fn(p, x):
            hidden = jax.nn.relu(x @ p["a"]) * mask[None]
            return hidden @ p["o"] * jnp.exp(temperature)

        return fn

    plain = closing(jnp.float32(0.5), masks)
    deps = jc.dependencies(plain, PARAMS, x)
    keep = some_units(deps, deps.groups)

    def run(temperature, mask):
        small, fn = jc.shrink(closing(temperature, mask), PARAMS, keep, x)
        return fn(small, x)

    want = plain(masked(PARAMS, keep), x)
    assert_close(jax.jit(run)(jnp.float32(0.5), masks), want)
    swept = jax.vmap(run, (0, None))(jnp.array([0.0, 0.5]), masks)
    assert_close(swept[1], want)


def test_places_that_are_traced_around_the_function():
    """What they point at stays; of the places themselves some may leave."""

    def closing(at):
        return lambda p, x: (jax.nn.relu(x @ p["a"]))[:, at] @ p["o"]

    def names(at):
        return [group.name for group in jc.dependencies(closing(at), PARAMS, normal(4, 6)).groups]

    found = []
    jax.jit(lambda at: (found.append(names(at)), at)[1])(jnp.arange(8)[::-1])
    assert names(jnp.arange(8)[::-1]) == ["a[1]"]
    assert found == [["o[0]"]]
