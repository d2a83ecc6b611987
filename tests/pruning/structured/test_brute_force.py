"""Groups against brute force: what has to leave together, seen from outside of the function."""

import fnmatch
import functools

import jax
import numpy as np
import pytest

import jaxcompress as jc
from tests.pruning.structured.brute_force import Oracle, forgotten, left_over, parts
from tests.pruning.structured.zoo import MODELS

# What matters alone, and why it may.
MATTERS_ALONE = {
    # It writes into means over units, which the others are divided by.
    "group_norm": "first/*[-1]",
    "norms": "first/*[-1] second/*[-1]",
    "tied_embeddings": "table[1] norm/*[0] down[1]",
    "encoder": "embed[1] positions[1] layers/?/o/*[-1] layers/?/down/*[-1]",
    "scanned_encoder": "embed[1] layers/o/*[-1] layers/down/*[-1]",
    "linen_group_norm": "*/c?/*[-1]",
    "linen_encoder": "*/embedding[1] */out/*[-1] */down/*[-1]",
    "linen_scanned": "*/embedding[1] */out/*[-1] */down/*[-1]",
    "nnx_encoder": "embed/*[1] attn/out/*[-1] down/*[-1]",
    "equinox_encoder": "embed/*[1] attn/output_proj/*[0] down/*[0]",
    # It reads units that are not zero where all that writes them is: a sigmoid, the mean of all
    # values that a query of zeros looks up.
    "positive_at_zero": "second/kernel[0] third/kernel[0]",
    "decoder_grouped": "embed[1] layers/?/o[1] layers/?/down[1] layers/?/o[0]",
    "decoder_repeat": "embed[1] layers/?/o[1] layers/?/down[1] layers/?/o[0]",
    "decoder_interleaved": "embed[1] layers/?/o[1] layers/?/down[1] layers/?/o[0]",
}
# A branch that never runs ties two streams together: that can't be seen from outside.
HIDDEN = ("branches",)


@functools.cache
def oracle_of(name):
    # Made in the dtypes that it is made for; Equinox would draw its own in float64.
    with jax.numpy_dtype_promotion("standard"):
        model = MODELS[name]()
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        dependencies = jc.dependencies(model.apply, model.params, *model.args)

        def apply(params, *args):
            y = model.apply(params, *args)
            # Returned statistics are aside: a unit takes its own along.
            return y[0] if name == "linen_cnn_train" else y

        stacked = {m.path for g in dependencies.groups if g.layers for m in g.members}
        return dependencies, Oracle(apply, model.params, model.args, stacked)


def units_of(name):
    """`(group, slices)` of a unit of each exact group; of a stack, in its last layer but one."""
    dependencies, oracle = oracle_of(name)
    for group in dependencies.groups:
        if group.inexact is None:
            layer = tuple(size - 2 for size in group.layers)
            unit = []
            for member in group.members:
                positions = np.flatnonzero(member.units == group.size // 2)
                layers = [layer]
                if member.path in oracle.stacked and not layer:
                    layers = [(i,) for i in range(oracle.shapes[member.path][0])]
                unit += [(member.path, member.axis, positions, at) for at in layers]
            yield group, unit


def allowed(name, oracle, place):
    path, axis, *_ = place
    ndim = len(oracle.shapes[path])
    for pattern in MATTERS_ALONE.get(name, "").split():
        where, _, index = pattern.removesuffix("]").rpartition("[")
        if fnmatch.fnmatchcase(path, where) and int(index) % ndim == axis:
            return True
    return False


@pytest.mark.parametrize("name", MODELS)
def test_units_are_safe_and_whole_and_indivisible(name):
    oracle = oracle_of(name)[1]
    with jax.enable_x64(True):
        for group, unit in units_of(name):
            left = left_over(oracle, unit)
            assert all(allowed(name, oracle, s) for s in left), (group.name, left)
            assert not forgotten(oracle, unit), group.name
            if not left and name not in HIDDEN:
                assert len(parts(oracle, unit)) == 1, group.name


def test_the_oracle_sees_what_is_wrong():
    """A unit with a slice too few, of two units at once, and with a slice that has no part."""
    _, oracle = oracle_of("resnet")
    with jax.enable_x64(True):
        unit = [
            ("b1/conv1/kernel", 3, [2], ()),
            ("b1/conv1/bias", 0, [2], ()),
            *(("b1/norm1/" + n, 0, [2], ()) for n in ("scale", "bias", "mean", "var")),
            ("b1/conv2/kernel", 2, [2], ()),
        ]
        assert not left_over(oracle, unit)
        assert not forgotten(oracle, unit)
        assert len(parts(oracle, unit)) == 1
        for i in range(len(unit)):
            fewer = unit[:i] + unit[i + 1 :]
            # With a bias left, it is what reads it that does something; without, it is idle.
            assert left_over(oracle, fewer) or forgotten(oracle, fewer)
        two = unit + [(path, axis, [3], layer) for path, axis, _, layer in unit]
        assert len(parts(oracle, two)) == 2
        more = [*unit, ("head/kernel", 0, [2], ())]
        assert (
            left_over(oracle, more) == [("head/kernel", 0, 2, ())] or len(parts(oracle, more)) > 1
        )
