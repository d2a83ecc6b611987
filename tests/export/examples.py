"""Compressed arrays of every kind, and comparing trees bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np

import jaxcompress as jc
from jaxcompress.arrays import (
    Codebook,
    LowRank,
    Quantized,
    Rescaled,
    Rotated,
    add,
    bit_mask,
    block_sparse,
    conv_chain,
    n_m,
    pack_bits,
    with_entries,
)

RNG = np.random.default_rng(0)
DENSE = RNG.normal(size=(6, 8)).astype(np.float32)
PRESENT = np.asarray(np.arange(48).reshape(6, 8) % 4 < 2)
CODES = RNG.integers(0, 4, (6, 8)).astype(np.uint8)
SCALE = jnp.asarray(np.linspace(0.5, 1.0, 8, dtype=np.float32)[None])
F32 = np.dtype(np.float32)


def quantized(codes, zero_point=None, scale=SCALE, **static):
    return Quantized(codes, scale, zero_point, F32, **static)


def arrays():
    mask, nm = bit_mask(DENSE, PRESENT), n_m(DENSE, PRESENT, n=2, m=4, axis=1)
    ragged = n_m(DENSE, PRESENT & (np.arange(6)[:, None] < 2), n=2, m=4, axis=0)
    blocks = block_sparse(DENSE, PRESENT & (np.arange(8) < 4), block=(2, 4))
    zero = jnp.full((1, 8), 2, jnp.uint8)
    table = jnp.asarray([0.5, -1.0, 2.0, 3.0], jnp.float32)
    packed = pack_bits(CODES, 2)
    factor = Quantized(jnp.asarray(CODES), jnp.ones((1, 1), jnp.float32), None, F32)
    kernel = Quantized(jnp.asarray(CODES)[None], jnp.ones((1, 1, 1), jnp.float32), None, F32)
    half = np.dtype(jnp.bfloat16)
    floats = jnp.asarray(DENSE, jnp.float8_e4m3fn)
    values = Codebook(packed, table, F32)
    nested = quantized(jnp.ones((3, 2), jnp.float8_e4m3fn), scale=jnp.ones((1, 1), jnp.float32))
    return {
        "packed": packed,
        "packed_signed": pack_bits(CODES.astype(np.int8) - 2, 3),
        "packed_scalar": pack_bits(np.uint8(1), 1),
        "packed_empty": pack_bits(np.zeros((0, 3), np.uint8), 4),
        "mask": mask,
        "mask_bfloat16": bit_mask(jnp.asarray(DENSE, jnp.bfloat16), PRESENT),
        "mask_none": bit_mask(DENSE, np.zeros_like(PRESENT)),
        "nm": nm,
        "nm_ragged": ragged,
        "nm_none": n_m(DENSE, np.zeros_like(PRESENT), n=0, m=4, axis=1),
        "blocks": blocks,
        "blocks_ragged": block_sparse(DENSE, PRESENT, block=(4, 3)),
        "blocks_of_rows": block_sparse(DENSE, DENSE > 1, block=(3,)),
        "blocks_bfloat16": block_sparse(jnp.asarray(DENSE, jnp.bfloat16), PRESENT, block=(2, 4)),
        "blocks_none": block_sparse(DENSE, np.zeros_like(PRESENT), block=(2, 4)),
        "blocks_empty": block_sparse(DENSE[:0], PRESENT[:0], block=(2, 4)),
        "quantized": quantized(jnp.asarray(CODES)),
        "quantized_zero_point": quantized(packed, zero),
        "quantized_groups": quantized(packed, scale=jnp.ones((2, 8), jnp.float32), group=(0, 4)),
        "quantized_binary": quantized(pack_bits(CODES > 1, 1), binary=True),
        "quantized_mask": quantized(with_entries(mask, CODES, bits=2), zero),
        "quantized_blocks": quantized(with_entries(blocks, CODES, bits=2), zero),
        "quantized_nm": quantized(with_entries(nm, CODES, bits=2)),
        "quantized_floats": quantized(floats, scale=SCALE.astype(half)),
        "quantized_floats_mask": quantized(
            bit_mask(floats.astype(jnp.float8_e5m2), PRESENT),
            scale=jnp.ones((1, 8), jnp.float8_e8m0fnu),
        ),
        "quantized_values": quantized(values, scale=nested, group=((0, 2), (1, 4))),
        "quantized_float_zero_point": quantized(packed, jnp.full((1, 8), 1.5, jnp.float32)),
        "low_rank": LowRank(jnp.asarray(DENSE[:, :2]), jnp.asarray(DENSE[:2])),
        "low_rank_zero": LowRank(jnp.zeros((6, 0)), jnp.zeros((0, 8))),
        "low_rank_quantized": LowRank(factor, jnp.asarray(DENSE.T[:, :3])),
        "conv_chain": conv_chain([jnp.ones((3, 1, 4, 2)), jnp.ones((1, 3, 2, 5))]),
        "conv_chain_quantized": conv_chain([jnp.ones((3, 1, 6)), kernel], [6, 1]),
        "codebook": Codebook(packed, table, half),
        "codebook_bytes": Codebook(jnp.asarray(CODES), table, F32),
        "codebook_mask": Codebook(with_entries(mask, CODES, bits=2), table, F32),
        "codebook_blocks": Codebook(with_entries(blocks, CODES), table, F32),
        "rescaled": Rescaled(quantized(packed), 2.0 / SCALE, half),
        "rotated": Rotated(
            Rescaled(quantized(packed), jnp.ones((6, 1), jnp.float32), F32),
            jnp.asarray([1, -1, -1, 1, 1, 1, -1, 1], jnp.int8),
            axis=1,
            order=4,
            dtype=F32,
        ),
        "sum": add(quantized(packed), LowRank(jnp.asarray(DENSE[:, :2]), jnp.asarray(DENSE[:2]))),
        "sum_dense": add(jnp.asarray(DENSE, half), Codebook(packed, table, half)),
        "codebook_nm": Codebook(with_entries(ragged, CODES, bits=2), table, F32),
    }


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if type(x) in (bool, int, float):
            assert (type(x), x) == (type(y), y)
            continue
        if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            assert x.dtype == y.dtype
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        x, y = np.asarray(x), np.asarray(y)
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())


def round_trip(tmp_path, tree, **kwargs):
    path = tmp_path / "file.safetensors"
    jc.save(path, tree)
    return jc.load(path, **kwargs)


def host(x):
    """The array with parts that are NumPy arrays."""
    return jax.tree.map(np.asarray, x)
