"""Compressed arrays cut along their first axis, cast, and sharded by parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress import arrays

q = jc.quantization
RNG = np.random.default_rng(0)


def in_blocks(*block):
    return jc.prune(0.5, groups=jc.pruning.blocks(*block))


def packed(projection, shape):
    return jc.pack(
        jc.masked(projection, lambda *_: True), jnp.asarray(RNG.normal(size=shape), jnp.float32)
    )


CASES = {
    "int8": lambda s: packed(jc.quantize(8), s),
    "int8 per tensor": lambda s: packed(jc.quantize(8, axis=None), s),
    "int4": lambda s: packed(jc.quantize(4), s),
    "int3 asymmetric": lambda s: packed(jc.quantize(3, symmetric=False), s),
    "binary": lambda s: packed(jc.quantize(1), s),
    "int4 groups": lambda s: packed(jc.quantize(4, group_size=4, axis=-1), s),
    "codebook": lambda s: packed(jc.cluster(8), s),
    "masked": lambda s: packed(jc.prune(0.75), s),
    "2:4": lambda s: packed(jc.prune(nm=(2, 4)), s),
    "masked int4": lambda s: packed(jc.chain(jc.prune(0.75), jc.quantize(4)), s),
    "2:4 asymmetric int4": lambda s: packed(
        jc.chain(jc.prune(nm=(2, 4)), jc.quantize(4, symmetric=False)), s
    ),
    "blocks": lambda s: packed(in_blocks(2, 4), s),
    "blocks of one axis": lambda s: packed(in_blocks(4), s),
    "blocks of all axes": lambda s: packed(in_blocks(*(2, 4, 3)[-len(s) :]), s),
    "asymmetric int4 blocks": lambda s: packed(
        jc.chain(in_blocks(2, 4), jc.quantize(4, symmetric=False)), s
    ),
    "codebook in blocks": lambda s: packed(jc.chain(in_blocks(4), jc.cluster(4)), s),
    "masked codebook": lambda s: packed(jc.chain(jc.prune(0.75), jc.cluster(4)), s),
    "low rank": lambda s: packed(jc.low_rank(2), s),
    "fp8 with nested scales": lambda s: packed(
        q.floats(q.E4M3, scales=q.E4M3, group_size=4, group_axis=-1), s
    ),
    "table in blocks": lambda s: packed(
        q.floats(q.table([-1, 0, 0.4, 1]), scales=q.E8M0, blocks={0: 2, -1: 5}), s
    ),
}
SHAPES = [(5, 8, 16), (3, 12), (4, 6, 9)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", CASES)
def test_every_row_is_rebuilt(kind, shape):
    leaf = CASES[kind](shape)
    if not arrays.is_compressed(leaf):
        pytest.skip("not smaller when packed")
    dense = np.asarray(leaf.todense())
    tolerance = 1e-6 if kind == "low rank" else 0

    @jax.jit
    def one_by_one(leaf):
        stacked, rebuild = arrays.rows(leaf)
        return jax.lax.scan(lambda c, x: (c, jc.todense(rebuild(x))), 0, stacked)[1]

    np.testing.assert_allclose(one_by_one(leaf), dense, atol=tolerance, rtol=0)
    indices = jnp.array([[2, 0], [1, 2]])
    taken = jax.jit(arrays.take_rows)(leaf, indices)
    np.testing.assert_allclose(taken, dense[np.asarray(indices)], atol=tolerance, rtol=0)
    assert taken.dtype == leaf.dtype


def test_scales_of_groups_along_the_first_axis():
    scale = jnp.asarray([[1.0], [10.0]], jnp.float32)
    codes = jnp.asarray(RNG.integers(-7, 8, (5, 8)), jnp.int8)
    leaf = arrays.Quantized(codes, scale, None, np.dtype(np.float32), group=(0, 3))
    want = np.asarray(codes) * np.repeat([1.0, 10.0], 3)[:5, None]
    np.testing.assert_array_equal(arrays.take_rows(leaf, jnp.arange(5)), want)


def test_n_m_along_the_first_axis():
    dense = RNG.normal(size=(8, 3)).astype(np.float32)
    keep = np.zeros((8, 3), bool)
    keep[::2] = True
    leaf = arrays.n_m(dense, keep, n=2, m=4, axis=0)
    np.testing.assert_array_equal(arrays.take_rows(leaf, jnp.arange(8)), np.where(keep, dense, 0))


def test_nothing_kept_and_no_rows():
    dense = np.ones((3, 8), np.float32)
    leaf = arrays.bit_mask(dense, np.zeros((3, 8), bool))
    np.testing.assert_array_equal(arrays.take_rows(leaf, jnp.arange(3)), 0 * dense)
    empty = arrays.bit_mask(np.ones((0, 8), np.float32), np.ones((0, 8), bool))
    assert arrays.rows(empty).stacked[0].shape[0] == 0
    none = arrays.block_sparse(dense, np.zeros((3, 8), bool), block=(2, 4))
    np.testing.assert_array_equal(arrays.take_rows(none, jnp.arange(3)), 0 * dense)
    line = arrays.block_sparse(np.arange(5.0), np.arange(5) > 3, block=(2,))
    np.testing.assert_array_equal(arrays.take_rows(line, jnp.arange(5)), [0, 0, 0, 0, 4])


def test_a_row_of_blocks_is_cut_without_the_others():
    leaf = arrays.block_sparse(np.ones((512, 64)), np.eye(512, 64) > 0, block=(16, 16))
    cut = jax.jit(arrays.take_rows).lower(leaf, jnp.arange(3)).compile()
    assert cut.cost_analysis()["flops"] < 512 * 64


def test_gradients_reach_the_floating_point_parts():
    leaf = CASES["low rank"]((5, 8, 16))
    cut = jax.grad(lambda leaf: arrays.take_rows(leaf, jnp.array([1, 3])).sum())(leaf)
    whole = jax.grad(lambda leaf: leaf.todense()[jnp.array([1, 3])].sum())(leaf)
    np.testing.assert_allclose(cut.u, whole.u, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(cut.v, whole.v, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", CASES)
def test_cast_is_the_cast_of_the_dense_array(kind):
    leaf = CASES[kind]((5, 8, 16))
    half = jax.jit(lambda leaf: arrays.cast(leaf, jnp.bfloat16))(leaf)
    assert half.dtype == jnp.bfloat16
    want = np.asarray(leaf.todense().astype(jnp.bfloat16), np.float32)
    got = np.asarray(half.todense(), np.float32)
    np.testing.assert_allclose(got, want, rtol=0, atol=0.05 if kind == "low rank" else 0)


def test_specs_of_the_parts():
    spec = jax.P(None, "x")
    low_rank = arrays.partition_specs(CASES["low rank"]((8, 16)), spec)
    assert (low_rank.u, low_rank.v) == (jax.P(None, None), jax.P(None, "x"))
    int8 = CASES["int8"]((8, 16))
    parts = arrays.partition_specs(int8, spec)
    assert parts.codes == spec
    assert parts.scale == jax.P(None, "x" if int8.scale.shape[1] > 1 else None)
    assert arrays.partition_specs(CASES["int4"]((8, 16)), spec) is None
    assert arrays.partition_specs(CASES["blocks"]((8, 16)), spec) is None
    for kind in ("int4", "blocks"):
        whole = arrays.partition_specs(CASES[kind]((8, 16)), jax.P())
        assert set(jax.tree.leaves(whole, is_leaf=lambda x: isinstance(x, jax.P))) == {jax.P()}


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda: arrays.rows(jnp.ones(3)), TypeError, "rows: `leaf` must be a compressed array"),
        (lambda: arrays.rows(arrays.pack_bits(np.int8(1), 2)), ValueError, "an axis to cut along"),
        (lambda: arrays.cast(CASES["int4"]((8, 8)), jnp.int8), TypeError, "cast: `dtype`"),
        (
            lambda: arrays.cast(arrays.pack_bits(np.ones(8, int), 2), jnp.float16),
            TypeError,
            "cast: `leaf`",
        ),
    ],
)
def test_bad_input_is_refused(call, kind, text):
    with pytest.raises(kind, match=text):
        call()
