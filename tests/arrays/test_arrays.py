"""Every compressed array against decoders written as loops, and through all that JAX does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcompress import arrays
from tests.conftest import mesh_of

SHAPES = [(), (0,), (7,), (3, 0, 2), (5, 3), (16, 8), (3, 3, 2, 4)]


def limits(bits, signed):
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)


def codes_of(shape, bits, signed, seed=0):
    low, high = limits(bits, signed)
    drawn = np.random.default_rng(seed).integers(low, high + 1, shape)
    return drawn.astype(np.int8 if signed else np.uint8)


def decode_by_hand(packed):
    """Bit by bit, from the description of `Packed`."""
    planes, out = np.asarray(packed.planes), []
    for i in range(int(np.prod(packed.shape))):
        value = sum(int(planes[j][i // 8] >> (7 - i % 8) & 1) << j for j in range(len(planes)))
        top = 1 << (len(planes) - 1)
        out.append(value - 2 * top if packed.signed and value & top else value)
    return np.array(out, np.int64).reshape(packed.shape)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("signed", [True, False])
def test_packed_round_trip_and_bytes(bits, signed):
    for shape in SHAPES:
        codes = codes_of(shape, bits, signed)
        packed = arrays.pack_bits(codes, bits, signed=signed)
        np.testing.assert_array_equal(packed.todense(), codes)
        np.testing.assert_array_equal(decode_by_hand(packed), codes)
        assert packed.nbytes == bits * -(-codes.size // 8) == packed.planes.nbytes
        assert (packed.shape, packed.size, packed.ndim) == (shape, codes.size, codes.ndim)
        assert packed.dtype == codes.dtype == packed.todense().dtype


@pytest.mark.parametrize("dtype", [jnp.int2, jnp.uint2, jnp.int4, jnp.uint4])
def test_packed_takes_the_narrow_integers_of_jax(dtype):
    info = jnp.iinfo(dtype)
    codes = np.arange(int(info.min), int(info.max) + 1)
    packed = arrays.pack_bits(jnp.asarray(codes, jnp.int8).astype(dtype), info.bits)
    assert (packed.bits, packed.signed) == (info.bits, info.min < 0)
    np.testing.assert_array_equal(packed.todense(), codes)


def test_packed_signedness_follows_the_values():
    assert not arrays.pack_bits(np.arange(4), 2).signed
    assert arrays.pack_bits(np.array([-1, 0]), 1).signed
    np.testing.assert_array_equal(arrays.pack_bits(np.array([True, False]), 1).todense(), [1, 0])


@settings(derandomize=True, deadline=None, max_examples=40)
@given(hnp.arrays(np.float32, (5, 3), elements=st.floats(width=32)), st.data())
def test_bit_masked_round_trip(dense, data):
    present = data.draw(hnp.arrays(bool, dense.shape))
    packed = arrays.bit_mask(dense, present)
    np.testing.assert_array_equal(packed.todense(), np.where(present, dense, 0))
    np.testing.assert_array_equal(packed.present(), present)
    assert packed.nbytes == 4 * present.sum() + 2


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fill", [False, True])
def test_bit_masked_all_or_nothing(shape, fill):
    dense = np.ones(shape, np.float16)
    packed = arrays.bit_mask(dense, np.full(shape, fill))
    np.testing.assert_array_equal(packed.todense(), dense * fill)
    assert packed.dtype == np.float16


def keep_some(shape, n, m, axis, seed=0):
    """At most n of each m, fewer in some groups."""
    rng = np.random.default_rng(seed)
    keep = np.zeros(shape, bool)
    moved = np.moveaxis(keep, axis, -1)
    for index in np.ndindex(moved.shape[:-1]):
        for start in range(0, moved.shape[-1], m):
            group = np.arange(start, min(start + m, moved.shape[-1]))
            count = min(int(rng.integers(0, n + 1)), len(group))
            moved[(*index, rng.permutation(group)[:count])] = True
    return keep


@pytest.mark.parametrize(
    ("n", "m"), [(2, 4), (1, 4), (0, 3), (4, 4), (3, 8), (1, 1), (2, 5), (5, 256)]
)
@pytest.mark.parametrize(
    ("shape", "axis"), [((16, 8), 0), ((16, 8), 1), ((7,), 0), ((3, 3, 6, 4), -2)]
)
def test_n_of_m_round_trip_and_bytes(n, m, shape, axis):
    dense = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    keep = keep_some(shape, n, m, axis)
    packed = arrays.n_m(dense, keep, n=n, m=m, axis=axis)
    np.testing.assert_array_equal(packed.todense(), np.where(keep, dense, 0))
    assert (np.asarray(packed.present()) >= keep).all()
    groups = -(-shape[axis] // m) * (dense.size // shape[axis])
    bits = max(1, int(np.ceil(np.log2(m))))
    assert packed.nbytes == 4 * n * groups + bits * -(-n * groups // 8)


def test_entries_of_another_kind_keep_the_pattern():
    dense = np.random.default_rng(1).normal(size=(16, 8)).astype(np.float32)
    keep = keep_some((16, 8), 2, 4, 0)
    codes = codes_of((16, 8), 3, True)
    mask = arrays.with_entries(arrays.bit_mask(dense, keep), codes, bits=3, signed=True)
    np.testing.assert_array_equal(mask.todense(), np.where(keep, codes, 0))
    assert mask.nbytes == 3 * -(-keep.sum() // 8) + 16
    groups = arrays.n_m(dense, keep, n=2, m=4, axis=0)
    taken = arrays.with_entries(groups, codes, bits=3, signed=True)
    np.testing.assert_array_equal(taken.todense(), np.where(groups.present(), codes, 0))
    assert isinstance(arrays.restrict(groups, jnp.asarray(keep)), arrays.BitMasked)
    assert arrays.restrict(groups, groups.present()) is groups


def dequantize_by_hand(codes, present, scale, zero, group, binary):
    out = np.zeros(codes.shape)
    for index in np.ndindex(codes.shape):
        place = list(index)
        if group is not None:
            place[group[0]] //= group[1]
        place = tuple(0 if n == 1 else i for i, n in zip(place, scale.shape, strict=True))
        step = 2 * int(codes[index]) - 1 if binary else int(codes[index]) - int(zero[place])
        out[index] = step * float(scale[place]) if present[index] else 0
    return out


@pytest.mark.parametrize("kind", ["dense", "packed", "masked", "nm"])
@pytest.mark.parametrize(("group", "shape"), [(None, (1, 8)), (None, (1, 1)), ((0, 5), (4, 8))])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_quantized_in_every_nesting(kind, group, shape, dtype):
    rng, codes = np.random.default_rng(0), codes_of((16, 8), 4, False)
    scale = rng.uniform(0.5, 2, shape).astype(np.float32)
    zero = rng.integers(0, 16, shape).astype(np.uint8)
    present = np.ones(codes.shape, bool)
    held = {"dense": lambda: jnp.asarray(codes), "packed": lambda: arrays.pack_bits(codes, 4)}
    if kind in held:
        inner = held[kind]()
    else:
        present = keep_some(codes.shape, 2, 4, 0)
        weights = present.astype(np.float32)
        pattern = arrays.bit_mask(weights, present)
        if kind == "nm":
            pattern = arrays.n_m(weights, present, n=2, m=4, axis=0)
            present = np.asarray(pattern.present())
        inner = arrays.with_entries(pattern, codes, bits=4, signed=False)
    q = arrays.Quantized(inner, jnp.asarray(scale), jnp.asarray(zero), np.dtype(dtype), group)
    want = dequantize_by_hand(codes, present, scale, zero, group, False)
    np.testing.assert_array_equal(q.todense(), np.asarray(jnp.asarray(want, jnp.float32), dtype))
    assert q.nbytes == sum(x.nbytes for x in jax.tree.leaves(q))
    assert q.nbytes == inner.nbytes + 5 * scale.size
    assert (q.shape, q.dtype) == ((16, 8), dtype)


def float8_codes(shape, dtype=jnp.float8_e4m3fn):
    return np.random.default_rng(2).normal(size=shape).astype(dtype)


@pytest.mark.parametrize(
    ("kind", "scale_dtype"),
    [
        ("float8", "float8_e8m0fnu"),
        ("masked float8", "bfloat16"),
        ("codebook", "nested"),
        ("float zero point", "float32"),
    ],
)
def test_quantized_floats_in_blocks(kind, scale_dtype):
    rng, shape, dtype = np.random.default_rng(0), (5, 7), np.dtype(np.float32)
    group, pairs = ((0, 2), (1, 3)), {0: 2, 1: 3}
    values, zero = float8_codes(shape).astype(np.float64), None
    present = np.ones(shape, bool)
    if kind == "float8":
        codes = jnp.asarray(float8_codes(shape))
    elif kind == "masked float8":
        present = rng.random(shape) < 0.5
        codes = arrays.bit_mask(jnp.asarray(float8_codes(shape)), present)
    elif kind == "codebook":
        table, indices = np.float32([-1.5, 0.25, 3.0, 0.0]), codes_of(shape, 2, False)
        values = table[indices].astype(np.float64)
        codes = arrays.Codebook(arrays.pack_bits(indices, 2), jnp.asarray(table), dtype)
    else:
        values, zero = codes_of(shape, 4, False), np.float32(rng.uniform(0, 15, (3, 3)))
        codes = arrays.pack_bits(values, 4)
    scale = 2.0 ** rng.integers(-3, 4, (3, 3))
    if scale_dtype == "nested":
        inner = jnp.asarray(scale, jnp.float8_e4m3fn)
        held = arrays.Quantized(inner, jnp.full((1, 1), 0.75), None, dtype)
        scale = scale * 0.75
    else:
        held = jnp.asarray(scale, jnp.float32).astype(scale_dtype)
    q = arrays.Quantized(codes, held, None if zero is None else jnp.asarray(zero), dtype, group)
    want = np.zeros(shape)
    for i, j in np.ndindex(shape):
        place = (i // pairs[0], j // pairs[1])
        step = values[i, j] - (0.0 if zero is None else np.float64(zero[place]))
        want[i, j] = step * scale[place] * present[i, j]
    np.testing.assert_allclose(q.todense(), want, rtol=1e-6, atol=1e-6)
    assert q.todense().dtype == np.float32
    assert q.nbytes == codes.nbytes + held.nbytes + (0 if zero is None else zero.nbytes)
    np.testing.assert_array_equal(arrays.take_rows(q, jnp.arange(5)), q.todense())


def test_binary_codes_stand_for_minus_one_and_one():
    codes = codes_of((5, 3), 1, False)
    q = arrays.Quantized(
        arrays.pack_bits(codes, 1), jnp.full((1, 3), 0.5), None, np.dtype(np.float32), binary=True
    )
    np.testing.assert_array_equal(q.todense(), np.where(codes, 0.5, -0.5))


HALVES = [jnp.float16, jnp.bfloat16, jnp.float8_e4m3fn]


@pytest.mark.parametrize("dtype", HALVES)
def test_narrow_floats_are_kept_bit_for_bit(dtype):
    dense = np.random.default_rng(1).normal(size=(16, 8)).astype(dtype)
    keep = keep_some((16, 8), 2, 4, 0)
    want = np.where(keep, dense, np.zeros((), dtype))
    groups = arrays.n_m(dense, keep, n=2, m=4, axis=0)
    for packed in (arrays.bit_mask(jnp.asarray(dense), keep), groups):
        assert packed.dtype == packed.todense().dtype == dtype
        np.testing.assert_array_equal(packed.todense(), want)
    assert groups.nbytes == 64 * np.dtype(dtype).itemsize + 2 * 8


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_low_rank_and_codebook_compute_in_float32(dtype):
    u, v = (np.random.default_rng(s).normal(size=(8, 8)).astype(dtype) for s in (0, 1))
    low = arrays.LowRank(jnp.asarray(u), jnp.asarray(v)).todense()
    want = (u.astype(np.float64) @ v.astype(np.float64)).astype(np.float32)
    assert low.dtype == dtype
    # One rounding of the exact product, up to ties.
    np.testing.assert_allclose(
        low.astype(np.float32), want, rtol=float(jnp.finfo(dtype).eps) * 0.51, atol=1e-6
    )
    # Factors of two dtypes: that of `u` is the dense one.
    wide = np.random.default_rng(2).normal(size=(8, 4)).astype(np.float32)
    mixed = arrays.LowRank(jnp.asarray(u), jnp.asarray(wide)).todense()
    assert mixed.dtype == dtype
    np.testing.assert_allclose(
        mixed.astype(np.float32),
        u.astype(np.float64) @ wide,
        rtol=float(jnp.finfo(dtype).eps) * 0.51,
        atol=1e-6,
    )
    values = np.array([1 / 3, -0.1], np.float32)
    codes = codes_of((5, 3), 1, False)
    book = arrays.Codebook(jnp.asarray(codes), jnp.asarray(values), np.dtype(dtype))
    np.testing.assert_array_equal(book.todense(), values[codes].astype(dtype))


def test_absent_entries_that_are_not_finite_leave_no_trace():
    keep = keep_some((16, 8), 2, 4, 0)
    dense = np.where(keep, np.float32(1), np.float32(np.nan))
    for packed in (arrays.bit_mask(dense, keep), arrays.n_m(dense, keep, n=2, m=4, axis=0)):
        np.testing.assert_array_equal(packed.todense(), keep.astype(np.float32))


def test_codebook_of_n_of_m():
    codes, values = codes_of((16, 8), 2, False), np.array([-1.0, 0.5, 2.0, 7.0], np.float32)
    groups = arrays.n_m(np.zeros((16, 8)), keep_some((16, 8), 2, 4, 0), n=2, m=4, axis=0)
    inner = arrays.with_entries(groups, codes, bits=2, signed=False)
    book = arrays.Codebook(inner, jnp.asarray(values), np.dtype(np.float32))
    np.testing.assert_array_equal(
        book.todense(), np.where(np.asarray(groups.present()), values[codes], 0)
    )
    assert book.nbytes == 2 * 8 + 2 * 8 + 16


@pytest.mark.parametrize("sparse", [False, True])
def test_codebook(sparse):
    codes = codes_of((16, 8), 2, False)
    values = np.array([-1.0, 0.5, 2.0, 7.0], np.float32)
    present, inner = np.ones(codes.shape, bool), arrays.pack_bits(codes, 2)
    if sparse:
        present = keep_some(codes.shape, 2, 4, 0)
        inner = arrays.with_entries(arrays.bit_mask(present, present), codes, bits=2, signed=False)
    book = arrays.Codebook(inner, jnp.asarray(values), np.dtype(np.float32))
    np.testing.assert_array_equal(book.todense(), np.where(present, values[codes], 0))
    assert book.nbytes == inner.nbytes + 16


def test_low_rank_of_quantized_factors():
    rng = np.random.default_rng(0)
    u, v = (
        rng.normal(size=(3, 3, 2, 2)).astype(np.float32),
        rng.normal(size=(2, 4)).astype(np.float32),
    )
    plain = arrays.LowRank(jnp.asarray(u), jnp.asarray(v))
    np.testing.assert_allclose(
        plain.todense(), np.einsum("hwir,ro->hwio", u, v), rtol=1e-5, atol=1e-6
    )
    assert (plain.shape, plain.rank, plain.nbytes) == ((3, 3, 2, 4), 2, 4 * (36 + 8))
    codes = codes_of(v.shape, 8, True)
    q = arrays.Quantized(jnp.asarray(codes), jnp.full((1, 4), 0.1), None, np.dtype(np.float32))
    nested = arrays.LowRank(jnp.asarray(u), q)
    want = np.einsum("hwir,ro->hwio", u, codes * np.float32(0.1))
    np.testing.assert_allclose(nested.todense(), want, rtol=1e-5, atol=1e-5)
    assert nested.nbytes == 4 * 36 + 8 + 16


def examples():
    """One of each class, as the builders and the projections make them."""
    rng = np.random.default_rng(0)
    dense = rng.normal(size=(16, 8)).astype(np.float32)
    keep = keep_some((16, 8), 2, 4, 0)
    codes = codes_of((16, 8), 4, True)
    mask = arrays.bit_mask(dense, keep)
    groups = arrays.n_m(dense, keep, n=2, m=4, axis=0)
    in_rows = arrays.block_sparse(dense, keep & (np.arange(16) % 6 < 2)[:, None], block=(2, 3))
    scale = jnp.full((1, 8), 0.5)
    single = np.dtype(np.float32)
    return {
        "packed": arrays.pack_bits(codes, 4),
        "masked": mask,
        "nm": groups,
        "blocks": in_rows,
        "blocks quantized": arrays.Quantized(
            arrays.with_entries(in_rows, codes, bits=4, signed=True), scale, None, single
        ),
        "quantized": arrays.Quantized(arrays.pack_bits(codes, 4), scale, None, single),
        "sparse quantized": arrays.Quantized(
            arrays.with_entries(groups, codes, bits=4, signed=True), scale, None, single
        ),
        "nested": arrays.Quantized(
            arrays.Codebook(
                arrays.pack_bits(codes_of((16, 8), 2, False), 2), jnp.arange(4.0), single
            ),
            arrays.Quantized(
                jnp.ones((3, 3), jnp.float8_e4m3fn), jnp.full((1, 1), 0.5), None, single
            ),
            None,
            single,
            ((0, 7), (1, 3)),
        ),
        "powers": arrays.Quantized(
            jnp.asarray(dense, jnp.float8_e5m2), jnp.ones((1, 8), jnp.float8_e8m0fnu), None, single
        ),
        "low rank": arrays.LowRank(jnp.asarray(dense[:, :2]), jnp.asarray(dense[:2])),
        "codebook": arrays.Codebook(
            arrays.pack_bits(codes_of((16, 8), 2, False), 2), jnp.arange(4.0), single
        ),
    }


NAMES = list(examples())


@pytest.mark.parametrize("name", NAMES)
class TestPasses:
    def test_jit_vmap_and_scan(self, name):
        x = examples()[name]
        want = np.asarray(x.todense())
        np.testing.assert_array_equal(jax.jit(lambda x: x.todense())(x), want)
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), x, x, x)
        np.testing.assert_array_equal(
            jax.vmap(lambda x: x.todense())(stacked), np.stack([want] * 3)
        )
        last, dense = jax.lax.scan(lambda x, _: (x, x.todense()), x, length=2)
        np.testing.assert_array_equal(dense[1], want)
        assert jax.tree.structure(last) == jax.tree.structure(x)

    def test_tree_map_and_devices(self, name):
        x = examples()[name]
        assert arrays.is_compressed(jax.tree.map(lambda leaf: leaf, x))
        for kind in ("auto", "explicit"):
            placed = jax.device_put({"x": x}, NamedSharding(mesh_of(kind), P()))["x"]
            np.testing.assert_array_equal(placed.todense(), x.todense())
            np.testing.assert_array_equal(jax.jit(lambda x: x.todense())(placed), x.todense())
        dense = arrays.todense({"x": x, "y": jnp.ones(2), "n": None})
        assert isinstance(dense["x"], jax.Array)
        assert dense["n"] is None

    def test_orbax(self, name, tmp_path):
        import orbax.checkpoint as ocp

        x = examples()[name]
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "x", {"x": x})
            checkpointer.wait_until_finished()
            back = checkpointer.restore(tmp_path / "x", jax.eval_shape(lambda: {"x": x}))["x"]
        assert type(back) is type(x)
        np.testing.assert_array_equal(back.todense(), x.todense())

    def test_short_repr_also_when_abstract(self, name):
        x = examples()[name]
        for each in (x, jax.eval_shape(lambda: x)):
            assert "\n" not in repr(each)
            assert type(x).__name__ in repr(each)
            assert each.nbytes == x.nbytes


@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize("spec", [P("d"), P(None, "d")])
def test_sharded_parts_give_a_sharded_array(kind, spec):
    sharding = NamedSharding(mesh_of(kind), spec)
    whole = NamedSharding(mesh_of(kind), P())
    codes = jnp.asarray(codes_of((16, 8), 2, False))
    single, half = np.dtype(np.float32), jnp.full((4, 8), 0.5)
    u, v = np.random.default_rng(0).normal(size=(2, 16, 2)).astype(np.float32)
    made = {
        "quantized": arrays.Quantized(codes, half[:1], jnp.ones((1, 8), jnp.uint8), single),
        "grouped": arrays.Quantized(codes, half, None, single, group=(0, 4)),
        "codebook": arrays.Codebook(codes, jnp.arange(4.0), single),
        "low rank": arrays.LowRank(jnp.asarray(u), jnp.asarray(v.T)),
    }
    for name, x in made.items():
        # The part of the dense shape is split, the small ones are whole.
        split = spec == P("d")
        big = (x.u if split else x.v) if name == "low rank" else codes
        placed = jax.tree.map(
            lambda leaf, big=big: jax.device_put(leaf, sharding if leaf is big else whole), x
        )
        for todense in (lambda x: x.todense(), jax.jit(lambda x: x.todense())):
            dense = todense(placed)
            np.testing.assert_allclose(dense, x.todense(), rtol=1e-6, err_msg=name)
            assert dense.sharding.is_equivalent_to(sharding, 2), name


def test_gradients_reach_every_floating_part():
    seed = np.random.default_rng(3).normal(size=(16, 8)).astype(np.float32)
    made = examples()

    def pull(x, replace, start):
        return np.asarray(jax.grad(lambda z: jnp.sum(replace(z).todense() * seed))(start))

    q = made["quantized"]
    got = pull(q, lambda z: arrays.Quantized(q.codes, z, None, q.dtype), q.scale)
    want = (seed * decode_by_hand(q.codes)).sum(0, keepdims=True)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    low = made["low rank"]
    got = pull(low, lambda z: arrays.LowRank(z, low.v), low.u)
    np.testing.assert_allclose(got, seed @ np.asarray(low.v).T, rtol=1e-5, atol=1e-5)
    got = pull(low, lambda z: arrays.LowRank(low.u, z), low.v)
    np.testing.assert_allclose(got, np.asarray(low.u).T @ seed, rtol=1e-5, atol=1e-5)
    book = made["codebook"]
    got = pull(book, lambda z: arrays.Codebook(book.codes, z, book.dtype), book.values)
    codes = decode_by_hand(book.codes)
    np.testing.assert_allclose(
        got, [seed[codes == k].sum() for k in range(4)], rtol=1e-4, atol=1e-5
    )
    mask = made["masked"]
    got = pull(mask, lambda z: arrays.BitMasked(z, mask.mask, mask.shape), mask.values)
    np.testing.assert_allclose(got, seed[np.asarray(mask.present())], rtol=1e-6)
    nm = made["nm"]
    got = pull(nm, lambda z: arrays.NM(z, nm.indices, nm.n, nm.m, nm.axis, nm.shape), nm.values)
    place = decode_by_hand(nm.indices).reshape(8, 4, 2)
    groups = seed.T.reshape(8, 4, 4)
    np.testing.assert_array_equal(got, np.take_along_axis(groups, place, -1).ravel())


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (
            lambda: arrays.pack_bits(np.array([4]), 2),
            ValueError,
            r"pack_bits: `codes` must be in \[0, 3\]",
        ),
        (lambda: arrays.pack_bits(np.array([0.5]), 2), TypeError, "be integers"),
        (lambda: arrays.pack_bits(np.array([1]), 9), ValueError, "bits"),
        (
            lambda: jax.jit(lambda c: arrays.pack_bits(c, 2))(jnp.arange(3)),
            TypeError,
            "outside of jit",
        ),
        (
            lambda: jax.jit(lambda x: arrays.bit_mask(x, np.ones(3, bool)))(jnp.ones(3)),
            TypeError,
            "bit_mask: .*outside of jit",
        ),
        (
            lambda: jax.vmap(lambda p: arrays.n_m(np.ones(4), p, n=4, m=4, axis=0))(
                jnp.ones((2, 4), bool)
            ),
            TypeError,
            "n_m: .*outside of jit",
        ),
        (
            lambda: jax.jit(arrays.with_entries)(examples()["nm"], jnp.ones((16, 8))),
            TypeError,
            "with_entries: .*outside of jit",
        ),
        (
            lambda: jax.jit(arrays.restrict)(examples()["nm"], jnp.ones((16, 8), bool)),
            TypeError,
            "restrict: .*outside of jit",
        ),
        (
            lambda: arrays.with_entries(examples()["nm"], np.ones((8, 16))),
            ValueError,
            r"with_entries: `dense` must have the shape \(16, 8\)",
        ),
        (
            lambda: arrays.with_entries(examples()["packed"], np.ones((16, 8))),
            TypeError,
            "with_entries: `pattern` must be a BitMasked, BlockSparse or NM array, got uint8|int8",
        ),
        (
            lambda: arrays.restrict(examples()["nm"], np.ones((8, 16), bool)),
            ValueError,
            r"restrict: `present` must have the shape \(16, 8\)",
        ),
        (lambda: arrays.bit_mask(np.ones(3), np.ones(2, bool)), ValueError, "shape"),
        (
            lambda: arrays.n_m(np.ones(4), np.ones(4, bool), n=2, m=4, axis=0),
            ValueError,
            "at most 2",
        ),
        (lambda: arrays.n_m(np.ones(4), np.ones(4, bool), n=5, m=4, axis=0), ValueError, "`n`"),
        (lambda: arrays.n_m(np.ones(4), np.ones(4, bool), n=2, m=4, axis=1), ValueError, "axis"),
    ],
)
def test_bad_input(call, kind, text):
    with pytest.raises(kind, match=text):
        call()
