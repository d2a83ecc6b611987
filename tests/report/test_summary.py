import math

import equinox as eqx
import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcompress import arrays, tree
from jaxcompress.report import LeafRow, Summary, summary
from tests.conftest import mesh_of


def only(params, after=None, **kwargs) -> LeafRow:
    (row,) = summary(params, after, **kwargs).rows
    return row


def test_one_dense_leaf_counted_by_hand():
    w = np.array([[1.0, 0.0, 2.0], [2.0, 0.0, 4.0]], np.float32)
    assert only({"w": w}) == LeafRow(
        path="w",
        shape=(2, 3),
        dtype="float32",
        kind="dense",
        parameters=6,
        nonzero=4,
        sparsity=1 - 4 / 6,
        bits=32.0,
        distinct=4,
        rank=1,
        nbytes=24,
        error=None,
        before_nbytes=None,
        ratio=None,
        pattern="2×1 blocks",
    )


def test_total_of_one_tree():
    params = {"w": np.eye(4, dtype=np.float32), "b": np.zeros(4, np.float16)}
    total = summary(params).total
    assert total == LeafRow(
        "total",
        None,
        "",
        "",
        20,
        4,
        1 - 4 / 20,
        8 * 72 / 20,
        None,
        None,
        72,
        None,
        None,
        None,
        "mixed",
    )
    assert (total.parameters, total.nbytes) == (tree.size(params), tree.nbytes(params))


def test_two_trees_describe_after():
    before = {"w": np.array([[3.0, 4.0]], np.float32), "b": np.array([12.0], np.float32)}
    after = {"w": np.array([[3.0, 0.0]], np.float16), "b": np.array([9.0], np.float32)}
    b, w = summary(before, after).rows
    assert (w.path, w.dtype, w.nonzero, w.sparsity) == ("w", "float16", 1, 0.5)
    assert (w.nbytes, w.before_nbytes, w.ratio) == (4, 8, 2.0)
    assert w.error == pytest.approx(4 / 5)
    assert b.error == pytest.approx(3 / 12)
    total = summary(before, after).total
    assert total.error == pytest.approx(math.sqrt(16 + 9) / 13)
    assert (total.before_nbytes, total.nbytes, total.ratio) == (12, 8, 1.5)


@pytest.mark.parametrize(
    ("before", "after", "error"), [(0, 0, 0.0), (0, 1, math.inf), (2, 0, 1.0), (-2, 2, 2.0)]
)
def test_error_at_zero(before, after, error):
    row = only(np.full((2, 2), before, np.float32), np.full((2, 2), after, np.float32))
    assert row.error == error


def test_error_is_not_lost_in_float32_or_by_slices():
    x = np.full(2**22 + 5, 1e30, np.float32)
    y = x.copy()
    y[-1] = 0.0
    assert only(x, y, ranks=False).error == pytest.approx(1 / math.sqrt(x.size), rel=1e-6)


def test_total_error_is_of_weights_alone():
    before = {"w": np.ones(4, np.float32), "count": np.array(1000)}
    after = {"w": np.zeros(4, np.float32), "count": np.array(1010)}
    made = summary(before, after)
    assert made.total.error == 1.0
    assert made.rows[0].error == pytest.approx(0.01)


@pytest.mark.parametrize("rank", [0, 1, 3, 5])
def test_rank_is_of_the_view_that_keeps_the_last_axis(rank):
    rng = np.random.default_rng(rank)
    w = (rng.normal(size=(12, rank)) @ rng.normal(size=(rank, 5))).astype(np.float32)
    assert only(w.reshape(2, 2, 3, 5)).rank == rank
    assert only(w, ranks=False).rank is None


def test_rank_is_of_matrices_of_finite_reals_alone():
    w = np.eye(3, dtype=np.float32)
    bad = np.where(w == 1, np.nan, w)
    params = {"a": w[0], "b": w.astype(np.int32), "c": bad, "d": np.zeros((0, 3)), "e": w > 0}
    assert [row.rank for row in summary(params).rows] == [None, None, None, 0, None]


def test_not_finite_values_are_counted():
    w = np.array([np.nan, np.nan, 0.0, -0.0, np.inf], np.float32)
    row = only(w, np.ones(5, np.float32))
    assert math.isnan(row.error)
    row = only(w)
    assert (row.nonzero, row.distinct) == (3, 3)


@pytest.mark.parametrize(
    "dtype",
    ["bfloat16", "float16", "float8_e4m3fn", "int4", "uint4", "int8", "bool", "complex64"],
)
def test_every_dtype(dtype):
    w = jnp.array([[0, 1, 1], [0, 0, 1]]).astype(dtype)
    row = only(w, w)
    assert (row.dtype, row.nonzero, row.distinct, row.error) == (dtype, 3, 2, 0.0)
    assert row.rank == (2 if jnp.issubdtype(w.dtype, jnp.inexact) else None)
    assert row.nbytes == tree.nbytes(w)


def test_empty_and_scalar_leaves():
    empty, scalar = summary([np.zeros((0, 4), np.float32), np.float32(0)]).rows
    assert (empty.parameters, empty.sparsity, empty.bits, empty.distinct) == (0, 0.0, 0.0, 0)
    assert (scalar.shape, scalar.parameters, scalar.sparsity) == ((), 1, 1.0)
    assert only(np.zeros((0, 4)), np.zeros((0, 4)))[-5:-2] == (0.0, 0, 1.0)
    nothing = summary({})
    assert nothing.rows == []
    assert nothing.total[4:-2] == (0, 0, 0.0, 0.0, None, None, 0, None, None, None)
    assert summary({}, {}).total.error == 0.0


def test_what_is_no_array_is_skipped():
    params = {"f": len, "none": None, "s": "text", "x": 3.0, "key": jax.random.key(0)}
    assert summary(params).rows == []
    assert [row.path for row in summary([params, np.ones(2)], [params, np.ones(2)]).rows] == ["1"]


class Net(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(2, 3, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)


def test_containers():
    state = nnx.state(Net(nnx.Rngs(0)))
    rows = {row.path: row for row in summary(state, state).rows}
    assert rows["dense/kernel"].shape == (2, 3)
    assert not any("key" in path for path in rows)
    frozen = flax.core.freeze({"a": {"w": np.ones((2, 2))}})
    assert only(frozen, frozen).path == "a/w"
    mlp = eqx.nn.MLP(2, 2, 2, 1, key=jax.random.key(0))
    assert [row.path for row in summary(mlp).rows][:2] == ["layers/0/weight", "layers/0/bias"]
    assert only([[np.ones(1)]]).path == "0/0"


def test_other_containers_match_by_path():
    class Pair(eqx.Module):
        b: np.ndarray
        a: np.ndarray

    before = Pair(b=np.ones(2), a=np.ones(3))
    made = summary(before, {"a": np.zeros(3), "b": np.ones(2)})
    assert [(row.path, row.error) for row in made.rows] == [("b", 0.0), ("a", 1.0)]


def test_abstract_leaves_have_sizes_alone():
    spec = {"w": jax.ShapeDtypeStruct((3, 4), jnp.bfloat16), "b": np.ones(4, np.float32)}
    made = summary(spec)
    row = made.rows[1]
    assert row[:4] == ("w", (3, 4), "bfloat16", "dense")
    assert (row.parameters, row.nbytes, row.bits) == (12, 24, 16.0)
    assert (row.nonzero, row.sparsity, row.distinct, row.rank) == (None,) * 4
    assert (made.total.parameters, made.total.nbytes, made.total.sparsity) == (16, 40, None)
    two = summary(spec, {"w": np.zeros((3, 4), np.int8), "b": np.ones(4, np.float32)})
    assert [row.error for row in two.rows] == [0.0, None]
    assert (two.total.error, two.total.ratio, two.total.nonzero) == (None, 40 / 28, 4)


def test_traced_leaves_are_refused():
    with pytest.raises(TypeError, match=r"summary: `params` must hold concrete.*at 'w'.*jit"):
        jax.jit(lambda w: summary({"w": w}).total.nbytes)(jnp.ones(3))


def test_mismatch_names_paths():
    with pytest.raises(ValueError, match=r"summary: `after` must.*without 'a/w' and with 'a/v'"):
        summary({"a": {"w": np.ones(2)}}, {"a": {"v": np.ones(2)}})
    with pytest.raises(ValueError, match=r"without none and with '0', '1'.*\(2 more\)"):
        summary([], [np.ones(1)] * 7)
    with pytest.raises(ValueError, match=r"of shape \[2\], got float64\[3\] at 'a/w'"):
        summary({"a": {"w": np.ones(2)}}, {"a": {"w": np.ones(3)}})


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_sharded(kind):
    mesh = mesh_of(kind)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d", None))
    w = np.arange(32, dtype=np.float32).reshape(8, 4)
    assert only(jax.device_put(w, sharding)) == only(w)


def sparse_weights():
    w = np.zeros((4, 8), np.float32)
    w[:, 0], w[:, 5] = [1.0, -2.0, 3.0, -4.0], 0.5
    return w


def test_bit_masked():
    w = sparse_weights()
    packed = arrays.bit_mask(jnp.asarray(w), jnp.asarray(w != 0))
    row = only({"w": w}, {"w": packed})
    assert (row.kind, row.shape, row.dtype) == ("BitMasked", (4, 8), "float32")
    assert (row.nonzero, row.sparsity, row.distinct, row.rank) == (8, 0.75, 6, 2)
    assert (row.nbytes, row.before_nbytes, row.error) == (8 * 4 + 4, 128, 0.0)
    assert row.bits == 8 * 36 / 32
    assert row.ratio == 128 / 36
    assert only({"w": packed}, {"w": w}).ratio == 36 / 128


def test_block_sparse():
    w = sparse_weights()
    packed = arrays.block_sparse(w, w != 0, block=(4, 2))
    row = only({"w": w}, {"w": packed})
    assert (row.kind, row.shape, row.dtype) == ("BlockSparse", (4, 8), "float32")
    assert (row.nonzero, row.sparsity, row.distinct, row.rank) == (8, 0.75, 6, 2)
    assert (row.nbytes, row.before_nbytes, row.error) == (2 * 8 * 4 + 1, 128, 0.0)
    codes = arrays.with_entries(packed, (w * 2).astype(np.int8), bits=4, signed=True)
    half = arrays.Quantized(codes, jnp.full((1, 1), 0.5), None, dtype=np.dtype(np.float32))
    row = only(w, half)
    assert (row.kind, row.error, row.nbytes) == ("Quantized(BlockSparse)", 0.0, 4 * 2 + 1 + 4)


def test_kinds_nest():
    w = sparse_weights()
    pattern = arrays.n_m(jnp.asarray(w), jnp.asarray(w != 0), n=2, m=4, axis=1)
    codes = arrays.with_entries(pattern, jnp.asarray(w * 2).astype(jnp.int8), bits=4, signed=True)
    scale = jnp.full((1, 1), 0.5, jnp.float32)
    both = arrays.Quantized(codes, scale, None, dtype=jnp.float32, group=None)
    row = only(w, both)
    assert (row.kind, row.error, row.nonzero) == ("Quantized(NM)", 0.0, 8)
    assert row.nbytes == both.nbytes < 128
    four = arrays.pack_bits(jnp.asarray(w * 2).astype(jnp.int8), 4, signed=True)
    plain = arrays.Quantized(four, scale, None, dtype=jnp.float32, group=None)
    assert only(plain).kind == "Quantized"
    assert only(four).kind == "Packed"
    assert only(arrays.LowRank(plain, jnp.ones((8, 3)))).kind == "LowRank(Quantized)"


def test_low_rank_tells_its_columns():
    u, v = np.ones((4, 2), np.float32), np.ones((2, 8), np.float32)
    row = only(np.ones((4, 8), np.float32), arrays.LowRank(jnp.asarray(u), jnp.asarray(v)))
    assert (row.kind, row.rank, row.nbytes, row.error) == ("LowRank", 2, 32 + 64, 1.0)
    assert only(arrays.LowRank(jnp.asarray(u), jnp.asarray(v)), ranks=False).rank == 2


def test_abstract_compressed_leaf():
    low = arrays.LowRank(jnp.ones((4, 2)), jnp.ones((2, 8)))
    row = only(jax.eval_shape(lambda: low))
    assert (row.kind, row.shape, row.nbytes, row.rank) == ("LowRank", (4, 8), 96, 2)
    assert row.nonzero is None


@settings(derandomize=True, deadline=None, max_examples=30)
@given(
    st.sampled_from([(3, 4), (2, 2, 3), (5,), (4, 1)]),
    st.integers(0, 2**31 - 1),
    st.sampled_from([np.float32, np.float16, np.float64]),
)
def test_against_brute_force(shape, seed, dtype):
    rng = np.random.default_rng(seed)
    x, y = (rng.integers(-2, 3, size=shape).astype(dtype) for _ in range(2))
    row = only(x, y)
    flat_x, flat_y = x.ravel().tolist(), y.ravel().tolist()
    assert row.nonzero == sum(v != 0 for v in flat_y)
    assert row.sparsity == pytest.approx(flat_y.count(0.0) / len(flat_y))
    assert row.distinct == len(set(flat_y))
    norm = math.sqrt(sum(v * v for v in flat_x))
    gap = math.sqrt(sum((a - b) ** 2 for a, b in zip(flat_x, flat_y, strict=True)))
    if norm:
        assert row.error == pytest.approx(gap / norm)
    if len(shape) > 1:
        view = y.astype(np.float64).reshape(-1, shape[-1])
        assert row.rank == np.linalg.matrix_rank(view)


def test_summary_is_a_named_tuple():
    made = summary({"w": np.eye(2)})
    assert isinstance(made, Summary)
    rows, total = made
    assert (rows, total) == (made.rows, made.total)


class TestOverlap:
    def test_is_the_index_of_jaccard(self):
        before = {"a": np.array([1.0, 2.0, 0.0, 0.0]), "b": np.array([1.0, 0.0])}
        after = {"a": np.array([0.0, 5.0, 6.0, 0.0]), "b": np.array([3.0, 0.0])}
        made = summary(before, after)
        assert [row.overlap for row in made.rows] == [1 / 3, 1.0]
        assert made.total.overlap == 2 / 4
        assert "overlap" in str(made)
        assert summary(before).total.overlap is None

    def test_is_not_shown_of_what_was_dense(self):
        dense, sparse = {"w": np.ones(4)}, {"w": np.array([1.0, 0.0, 0.0, 1.0])}
        made = summary(dense, sparse)
        assert made.rows[0].overlap == 0.5
        assert "overlap" not in str(made)
        assert "overlap" not in str(summary(dense, dense))

    def test_of_nothing_is_all_and_of_abstract_leaves_unknown(self):
        assert only({"w": np.zeros(3)}, {"w": np.zeros(3)}).overlap == 1.0
        abstract = {"w": jax.ShapeDtypeStruct((3,), np.float32)}
        made = summary(abstract, {"w": np.zeros(3)})
        assert (made.rows[0].overlap, made.total.overlap) == (None, None)
