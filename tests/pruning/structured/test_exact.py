"""A smaller function gives what zeros in place of the removed give, on every network we know."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from tests.conftest import counting_jit
from tests.pruning.structured.removal import assert_close, cut, masked, some_units
from tests.pruning.structured.zoo import MODELS, decoder_8b, expected_group, shapes_of

# These return the statistics they were given, one step on: of the removed, nothing is left.
SMALLER_OUTPUTS = ("linen_cnn_train",)
# Its cell carries float32, whatever it is given.
IN_FLOAT32 = ("nnx_rnn",)


@functools.cache
def model_of(name):
    """The model, its dependencies, and itself compiled."""
    model = MODELS[name]()
    dependencies = jc.dependencies(model.apply, model.params, *model.args)
    return model, dependencies, jax.jit(model.apply)


def as_expected(group):
    places = frozenset((member.path, member.axis) for member in group.members)
    return group.inexact is None, tuple(group.layers), group.size, places


def places_of(group):
    return tuple(group.layers), sorted((member.path, member.axis) for member in group.members)


def exact_groups(dependencies):
    return [g for g in dependencies.groups if g.inexact is None and g.size > 1]


def output(name, keep, y):
    """What of the output of the whole model the smaller one returns."""
    if name not in SMALLER_OUTPUTS:
        return y
    return y[0], cut(y[1], keep)


@pytest.mark.parametrize("name", MODELS)
def test_groups_are_those_found_by_hand(name):
    model, dependencies, _ = model_of(name)
    want = [expected_group(line, shapes_of(model.params)) for line in model.groups]
    got = [as_expected(group) for group in dependencies.groups if group.size > 1]
    missing = [w for w in want if w not in got]
    extra = [g for g in got if g not in want]
    assert not missing, f"missing {missing}, instead of them {extra}"
    assert not extra
    assert len(got) == len(want)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_in_no_group_is_frozen_for_a_reason(name):
    model, dependencies, _ = model_of(name)
    frozen = {(f.path, f.axis): f.count for f in dependencies.frozen}
    assert all(f.reason for f in dependencies.frozen)
    covered = {}
    for group in dependencies.groups:
        for member in group.members:
            place = (member.path, member.axis)
            covered[place] = covered.get(place, False) | (member.units >= 0)
    for path, shape in shapes_of(model.params).items():
        for axis, size in enumerate(shape.shape):
            if size == 1:
                continue
            in_groups = int(np.sum(covered.get((path, axis), 0)))
            assert in_groups + frozen.get((path, axis), 0) == size, (path, axis)


@pytest.mark.parametrize("name", MODELS)
def test_half_of_all(name):
    model, dependencies, apply = model_of(name)
    keep = some_units(dependencies, exact_groups(dependencies))
    small, fn = jc.shrink(model.apply, model.params, keep, *model.args)
    want = cut(model.params, keep)
    assert jax.tree.structure(small) == jax.tree.structure(model.params)
    jax.tree.map(np.testing.assert_array_equal, small, want)
    assert jc.tree.size(small) < 0.8 * jc.tree.size(model.params) or not keep.masks
    zeros = masked(model.params, keep)
    y = output(name, keep, apply(zeros, *model.args))
    jitted = counting_jit(fn)
    assert_close(jitted(small, *model.args), y)
    other = jax.tree.map(lambda x: x[::-1], model.args)
    y = output(name, keep, apply(zeros, *other))
    assert_close(jitted(small, *other), y)
    assert jitted.traces == 1


@pytest.mark.parametrize("name", MODELS)
def test_one_group_at_a_time(name):
    model, dependencies, apply = model_of(name)
    # Groups of further layers are as those of the first.
    for seed, group in enumerate(exact_groups(dependencies)[:6]):
        keep = some_units(dependencies, [group], seed)
        small, fn = jc.shrink(model.apply, model.params, keep, *model.args)
        jax.tree.map(np.testing.assert_array_equal, small, cut(model.params, keep))
        y = output(name, keep, apply(masked(model.params, keep), *model.args))
        assert_close(jax.jit(fn)(small, *model.args), y)


def in_float64(tree):
    return jax.tree.map(
        lambda x: x.astype(np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_what_stays(name):
    """In float64: what has no gradient, as a bias before a batch norm, has none to rounding."""
    model, dependencies, _ = model_of(name)
    keep = some_units(dependencies, exact_groups(dependencies), seed=1)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        params, args = in_float64(model.params), in_float64(model.args)
        small, fn = jc.shrink(model.apply, params, keep, *args)

        def loss(fn, params):
            y = fn(params, *args)
            return jnp.sin(y[0] if name in SMALLER_OUTPUTS else y).sum()

        got = jax.jit(jax.grad(functools.partial(loss, fn)))(small)
        want = jax.jit(jax.grad(functools.partial(loss, model.apply)))(masked(params, keep))
        assert_close(got, cut(want, keep), 1e-6 if name in IN_FLOAT32 else 1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_other_batches_and_vmap(name):
    """A smaller batch, which the function has to be traced for again, and two of them at once."""
    model, dependencies, apply = model_of(name)
    keep = some_units(dependencies, exact_groups(dependencies), seed=2)
    small, fn = jc.shrink(model.apply, model.params, keep, *model.args)
    zeros = masked(model.params, keep)
    pairs = jax.tree.map(lambda x: jnp.stack([x[:3], x[1:]]), model.args)
    got = jax.jit(jax.vmap(fn, (None, *[0] * len(pairs))))(small, *pairs)
    for i in range(2):
        y = output(name, keep, apply(zeros, *jax.tree.map(lambda x, i=i: x[i], pairs)))
        assert_close(jax.tree.map(lambda x, i=i: x[i], got), y)


@pytest.mark.parametrize("name", MODELS)
def test_twice(name):
    model, dependencies, _ = model_of(name)
    keep = some_units(dependencies, exact_groups(dependencies), seed=3, fraction=0.7)
    small, fn = jc.shrink(model.apply, model.params, keep, *model.args)
    again = jc.dependencies(fn, small, *model.args)
    # The same groups, of fewer units: but for those of one, which stays, and for names.
    want = sorted(
        (int(keep.masks[g.name].sum(-1).flat[0]), *places_of(g)) for g in exact_groups(dependencies)
    )
    got = sorted((g.size, *places_of(g)) for g in exact_groups(again))
    assert got == [group for group in want if group[0] > 1]
    keep = some_units(again, exact_groups(again), seed=4)
    smaller, fn_again = jc.shrink(fn, small, keep, *model.args)
    jax.tree.map(np.testing.assert_array_equal, smaller, cut(small, keep))
    y = output(name, keep, jax.jit(fn)(masked(small, keep), *model.args))
    assert_close(jax.jit(fn_again)(smaller, *model.args), y)


def test_a_decoder_of_eight_billion_parameters_by_its_shapes():
    model = decoder_8b()
    assert sum(int(np.prod(s.shape)) for s in jax.tree.leaves(model.params)) == 8_030_261_248
    dependencies = jc.dependencies(model.apply, model.params, *model.args)
    shapes = shapes_of(model.params)
    want = {expected_group(line, shapes) for line in model.groups}
    assert {as_expected(group) for group in dependencies.groups} == want
    assert len(dependencies.groups) == len(want) == 161
