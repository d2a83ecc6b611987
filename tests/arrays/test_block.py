"""Block-sparse arrays against loops over their blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxcompress as jc
from jaxcompress import arrays
from tests.conftest import counting_jit

# Shape of the array and of a block: divided, ragged, one axis, leading axes, three axes,
# longer than the array, single entries, empty.
CASES = [
    ((6, 8), (2, 4)),
    ((5, 7), (2, 3)),
    ((7,), (3,)),
    ((4, 7), (3,)),
    ((3, 5, 7), (2, 3)),
    ((3, 3, 6, 4), (4, 2)),
    ((4, 6, 5), (2, 4, 2)),
    ((2, 3), (8, 8)),
    ((4, 3), (1, 1)),
    ((0, 4), (2, 2)),
    ((3, 0, 4), (2, 2)),
]
FILLS = {"some": 0.3, "none": 0.0, "all": 1.0}


def draw(shape, fill, dtype=np.float32, seed=0):
    """Entries, and which of them are present: about that fraction of all."""
    rng = np.random.default_rng(seed)
    return (9 * rng.normal(size=shape)).astype(dtype), rng.random(shape) < fill


def cut_by_hand(dense, present, block):
    """The grid of what is kept, the kept blocks filled up with zeros, and what they hold."""
    lead = dense.ndim - len(block)
    block = tuple(min(b, max(n, 1)) for b, n in zip(block, dense.shape[lead:], strict=True))
    sizes = (1,) * lead + block
    grid = tuple(-(-n // b) for n, b in zip(dense.shape, sizes, strict=True))
    mask, held, blocks = np.zeros(grid, bool), np.zeros(dense.shape, bool), []
    for place in np.ndindex(*grid):
        where = tuple(slice(i * b, (i + 1) * b) for i, b in zip(place, sizes, strict=True))
        if not present[where].any():
            continue
        mask[place], held[where] = True, True
        full = np.zeros(sizes, dense.dtype)
        part = np.where(present[where], dense[where], np.zeros((), dense.dtype))
        full[tuple(slice(0, n) for n in part.shape)] = part
        blocks.append(full.reshape(block))
    return mask, np.array(blocks, dense.dtype).reshape((len(blocks), *block)), held


@jax.jit
def read(x):
    return x.todense(), x.present(), x.mask.todense(), x.places()


def check(x, dense, present, block):
    mask, blocks, held = cut_by_hand(dense, present, block)
    want = np.where(present, dense, np.zeros((), dense.dtype))
    assert (x.shape, x.dtype, x.block) == (dense.shape, dense.dtype, blocks.shape[1:])
    assert x.grid == mask.shape
    decoded, held_here, grid, places = read(x)
    np.testing.assert_array_equal(x.values, blocks)
    np.testing.assert_array_equal(grid, mask)
    np.testing.assert_array_equal(held_here, held)
    np.testing.assert_array_equal(np.stack(places), np.stack(np.nonzero(mask)))
    np.testing.assert_array_equal(decoded, want)
    assert decoded.dtype == dense.dtype
    assert x.nbytes == blocks.nbytes + -(-mask.size // 8)


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize(("shape", "block"), CASES)
def test_built_and_decoded(shape, block, fill):
    dense, present = draw(shape, FILLS[fill])
    check(arrays.block_sparse(dense, present, block=block), dense, present, block)


def test_decoded_without_jit():
    dense, present = draw((3, 5, 7), 0.3)
    x = arrays.block_sparse(dense, present, block=(2, 3))
    np.testing.assert_array_equal(x.todense(), np.where(present, dense, 0))


@settings(derandomize=True, deadline=None, max_examples=30)
@given(
    hnp.arrays(np.float32, (5, 7), elements=st.floats(width=32)),
    st.lists(st.booleans(), min_size=35, max_size=35),
)
def test_any_entries_at_any_place(dense, present):
    present = np.reshape(present, (5, 7))
    check(arrays.block_sparse(dense, present, block=(2, 3)), dense, present, (2, 3))


DTYPES = [jnp.float16, jnp.bfloat16, jnp.float8_e4m3fn, np.int8, np.uint8, np.bool_, np.complex64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_are_kept_bit_for_bit(dtype):
    dense, present = draw((5, 7), 0.2, np.float32)
    dense = dense.astype(np.int8).astype(dtype)
    check(arrays.block_sparse(jnp.asarray(dense), present, block=(2, 3)), dense, present, (2, 3))


def test_absent_entries_that_are_not_finite_leave_no_trace():
    dense, present = draw((5, 7), 0.2)
    x = arrays.block_sparse(np.where(present, dense, np.nan), present, block=[2, 3])
    np.testing.assert_array_equal(x.todense(), np.where(present, dense, 0))


def test_what_fills_up_a_block_counts_for_nothing():
    dense, present = draw((5, 7), 1.0)
    x = arrays.block_sparse(dense, present, block=(2, 3))
    filled = np.asarray(x.values).copy()
    filled[2::3, :, 1:] = filled[9:, 1:] = np.nan
    x = arrays.BlockSparse(jnp.asarray(filled), x.mask, x.block, x.shape)
    np.testing.assert_array_equal(x.todense(), dense)
    np.testing.assert_array_equal(arrays.take_rows(x, jnp.arange(5)), dense)


@pytest.mark.parametrize(("shape", "block"), [((5, 7), (2, 3)), ((3, 4, 5), (2, 2))])
def test_stacked_arrays_decode_each_for_itself(shape, block):
    # As many blocks, at other places.
    made, want = [], []
    for shift in range(3):
        present = np.zeros(shape, bool)
        present[..., shift] = True
        dense = np.full(shape, shift + 1.0, np.float32)
        made.append(arrays.block_sparse(dense, present, block=(*block[:-1], 1)))
        want.append(np.where(present, dense, 0))
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *made)
    got = jax.jit(jax.vmap(lambda x: x.todense()))(stacked)
    np.testing.assert_array_equal(got, np.stack(want))


def test_other_places_compile_nothing_anew():
    decode = counting_jit(lambda x: x.todense())
    for seed in range(3):
        present = np.zeros((6, 8), bool)
        present[2 * seed, seed] = True
        x = arrays.block_sparse(np.ones((6, 8), np.float32), present, block=(2, 4))
        assert float(decode(x).sum()) == 1
    assert decode.traces == 1


def test_gradients_reach_the_values_and_stop_at_what_fills_up():
    dense, present = draw((3, 5, 7), 0.3)
    seed = np.random.default_rng(1).normal(size=dense.shape).astype(np.float32)
    x = arrays.block_sparse(dense, present, block=(2, 3))
    back = lambda v: arrays.BlockSparse(v, x.mask, x.block, x.shape)  # noqa: E731
    _, _, held = cut_by_hand(dense, present, (2, 3))
    _, want, _ = cut_by_hand(seed, held, (2, 3))
    decoded = jax.grad(lambda v: jnp.sum(back(v).todense() * seed))(x.values)
    np.testing.assert_array_equal(decoded, want)
    rows = jax.grad(lambda v: jnp.sum(arrays.take_rows(back(v), jnp.arange(3)) * seed))(x.values)
    np.testing.assert_array_equal(rows, want)


@pytest.mark.parametrize("bits", [3, 8])
def test_codes_in_the_pattern(bits):
    dense, present = draw((5, 7), 0.2)
    codes = np.random.default_rng(1).integers(-4, 4, (5, 7)).astype(np.int8)
    pattern = arrays.block_sparse(dense, present, block=(2, 3))
    _, blocks, held = cut_by_hand(codes, np.asarray(pattern.present()), (2, 3))
    x = arrays.with_entries(pattern, codes, bits=bits, signed=True)
    assert isinstance(x, arrays.BlockSparse)
    assert isinstance(x.values, arrays.Packed) == (bits < 8)
    np.testing.assert_array_equal(arrays.todense(x.values), blocks)
    np.testing.assert_array_equal(x.todense(), np.where(held, codes, 0))
    assert x.dtype == np.int8
    assert x.nbytes == (bits * -(-blocks.size // 8) if bits < 8 else blocks.size) + 2
    np.testing.assert_array_equal(
        arrays.take_rows(x, jnp.array([4, 1])), np.asarray(x.todense())[[4, 1]]
    )


def test_quantized_and_codebook_are_zero_outside_of_the_blocks():
    dense, present = draw((5, 7), 0.1)
    codes = np.random.default_rng(1).integers(0, 8, (5, 7)).astype(np.uint8)
    pattern = arrays.block_sparse(dense, present, block=(2, 3))
    held = np.asarray(pattern.present())
    assert not held.all()
    inner = arrays.with_entries(pattern, codes, bits=3, signed=False)
    scale, single = np.linspace(0.5, 1, 7, dtype=np.float32)[None], np.dtype(np.float32)
    q = arrays.Quantized(inner, jnp.asarray(scale), jnp.full((1, 7), 3, jnp.uint8), single)
    want = np.where(held, (codes.astype(np.float32) - 3) * scale, 0)
    np.testing.assert_array_equal(q.todense(), want)
    binary = arrays.with_entries(pattern, codes % 2, bits=1, signed=False)
    b = arrays.Quantized(binary, jnp.asarray(scale), None, single, binary=True)
    np.testing.assert_array_equal(b.todense(), np.where(held, (2.0 * (codes % 2) - 1) * scale, 0))
    table = np.linspace(-1, 2, 8, dtype=np.float32)
    book = arrays.Codebook(inner, jnp.asarray(table), single)
    np.testing.assert_array_equal(book.todense(), np.where(held, table[codes], 0))
    for leaf, dense in ((q, want), (book, np.where(held, table[codes], 0))):
        np.testing.assert_array_equal(
            arrays.take_rows(leaf, jnp.array([4, 0, 2])), dense[[4, 0, 2]]
        )


@pytest.mark.parametrize("projection", [jc.quantize(4), jc.quantize(3, symmetric=False)])
def test_quantization_packs_codes_into_the_blocks(projection):
    dense, present = draw((16, 24), 0.01)
    pruned = arrays.block_sparse(dense, present, block=(4, 8))
    params = {"w": pruned.todense()}
    structure = projection.find(params)
    packed = projection.pack({"w": pruned}, structure)["w"]
    want = np.asarray(projection.project(params, structure)["w"])
    np.testing.assert_array_equal(packed.todense(), np.where(np.asarray(pruned.present()), want, 0))
    assert isinstance(packed.codes, arrays.BlockSparse)
    assert packed.codes.block == (4, 8)
    assert packed.nbytes < pruned.nbytes


def test_a_pattern_with_less_in_it_becomes_a_bit_mask():
    dense, present = draw((5, 7), 0.2)
    x = arrays.block_sparse(dense, present, block=(2, 3))
    assert arrays.restrict(x, x.present()) is x
    less = arrays.restrict(x, jnp.asarray(present))
    assert isinstance(less, arrays.BitMasked)
    np.testing.assert_array_equal(less.present(), present)


def test_sparse_arrays_are_told_apart():
    dense, present = draw((4, 8), 0.5)
    made = [
        arrays.block_sparse(dense, present, block=(2, 2)),
        arrays.bit_mask(dense, present),
        arrays.n_m(dense, present, n=4, m=4, axis=0),
    ]
    assert all(arrays.is_sparse(x) and arrays.is_compressed(x) for x in made)
    for other in (dense, None, arrays.pack_bits(present, 1), arrays.LowRank(dense, dense.T)):
        assert not arrays.is_sparse(other)


ONES, ALL = np.ones((4, 6), np.float32), np.ones((4, 6), bool)


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda b: arrays.block_sparse(ONES, ALL.T, block=(2, 2)), ValueError, r"`present`.*shape"),
        (lambda b: arrays.block_sparse(ONES, ALL, block=2), TypeError, "`block` must be a tuple"),
        (lambda b: arrays.block_sparse(ONES, ALL, block="22"), TypeError, "`block` must be"),
        (lambda b: arrays.block_sparse(ONES, ALL, block=(2, 2.0)), TypeError, r"`block\[1\]`"),
        (lambda b: arrays.block_sparse(ONES, ALL, block=(0, 2)), ValueError, r"`block\[0\]`"),
        (lambda b: arrays.block_sparse(ONES, ALL, block=()), ValueError, "have 1 to 2 sizes"),
        (lambda b: arrays.block_sparse(ONES, ALL, block=(1, 2, 3)), ValueError, "1 to 2 sizes"),
        (lambda b: arrays.block_sparse(1.0, True, block=(1,)), ValueError, "cut an axis"),
        (
            lambda b: jax.jit(lambda x: arrays.block_sparse(x, ALL, block=(2, 2)))(ONES),
            TypeError,
            "block_sparse: .*outside of jit",
        ),
        (
            lambda b: jax.vmap(lambda p: arrays.block_sparse(ONES, p, block=(2, 2)))(ALL[None]),
            TypeError,
            "block_sparse: .*outside of jit",
        ),
        (lambda b: jax.jit(arrays.with_entries)(b, ONES), TypeError, "with_entries: .*outside"),
        (lambda b: arrays.with_entries(b, ONES.T), ValueError, r"`dense` must have the shape"),
        (lambda b: arrays.cast(b, np.int8), TypeError, "cast: `dtype`"),
    ],
)
def test_bad_input(call, kind, text):
    with pytest.raises(kind, match=text):
        call(arrays.block_sparse(ONES, ALL, block=(2, 2)))
