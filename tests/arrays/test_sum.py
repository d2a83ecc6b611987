"""Sums held apart: values, bytes, trees, rows, casts, shardings, files, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from jaxcompress import arrays
from tests.conftest import mesh_of


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


def low(*shape, rank=2, dtype=jnp.float32):
    u, v = draw(*shape[:-1], rank), draw(rank, shape[-1])
    return arrays.LowRank(u.astype(dtype), v.astype(dtype))


def example(dtype=jnp.float32):
    base = jc.pack(jc.quantize(4), draw(16, 8).astype(dtype))
    return arrays.add(base, low(16, 8, dtype=dtype))


def in_float64(x):
    """From the stored numbers, apart from the library's arithmetic."""
    base, correction = x.parts
    codes = np.asarray(base.codes.todense(), np.float64)
    u, v = (np.asarray(f, np.float64) for f in (correction.u, correction.v))
    return codes * np.asarray(base.scale, np.float64) + u @ v


def test_is_the_sum_of_its_parts():
    x = example()
    np.testing.assert_allclose(x.todense(), in_float64(x), rtol=1e-5, atol=1e-6)
    assert (x.shape, x.dtype, x.ndim, x.size) == ((16, 8), np.float32, 2, 128)
    assert x.nbytes == 64 + 32 + 4 * 2 * 24 == jc.tree.nbytes(x)
    assert repr(x).startswith("Sum(float32[16, 8], parts=(Quantized(float32[16, 8]")
    assert arrays.is_compressed(x)
    assert not arrays.is_sparse(x)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_is_rounded_once(dtype):
    x = example(dtype)
    assert x.todense().dtype == dtype
    want = in_float64(x).astype(np.float32).astype(dtype)
    np.testing.assert_array_equal(np.asarray(x.todense()), want)
    twice = sum(part.todense() for part in x.parts)
    assert (np.asarray(twice) != want).any()


def test_sums_of_sums_are_flat():
    one = arrays.add(draw(4, 4), low(4, 4))
    assert len(arrays.add(one, draw(4, 4), one).parts) == 5


def test_goes_through_transformations():
    x = example()
    dense = jax.jit(lambda x: x.todense())(x)
    np.testing.assert_allclose(dense, in_float64(x), rtol=1e-5, atol=1e-6)
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), x, x)
    mapped = jax.vmap(lambda x: x.todense())(stacked)
    np.testing.assert_allclose(mapped[1], dense, rtol=1e-5, atol=1e-6)
    grads = jax.grad(lambda x: jnp.sum(x.todense() ** 2), allow_int=True)(x)
    want = 2 * in_float64(x) @ np.asarray(x.parts[1].v, np.float64).T
    np.testing.assert_allclose(grads.parts[1].u, want, rtol=1e-4, atol=1e-4)
    built = jax.jit(lambda a, b: arrays.add(a, b))(draw(16, 8), low(16, 8))
    assert isinstance(built, arrays.Sum)


@pytest.mark.parametrize("shape", [(5, 8), (3, 4, 8)])
def test_rows(shape):
    x = arrays.add(jc.pack(jc.quantize(4), draw(*shape)), low(*shape), draw(*shape))
    stacked, rebuild = arrays.rows(x)
    for i in range(shape[0]):
        row = rebuild(jax.tree.map(lambda a: a[i], stacked))  # noqa: B023
        assert isinstance(row, arrays.Sum)
        np.testing.assert_allclose(row.todense(), x.todense()[i], rtol=1e-5, atol=1e-5)
    places = jnp.array([[2, 0], [1, 1]])
    got = arrays.take_rows(x, places)
    np.testing.assert_allclose(got, x.todense()[places], rtol=1e-5, atol=1e-5)
    # Rows of which no part is compressed are arrays.
    plain = arrays.add(draw(5, 8), low(5, 8))
    stacked, rebuild = arrays.rows(plain)
    row = rebuild(jax.tree.map(lambda a: a[0], stacked))
    assert isinstance(row, jax.Array)
    np.testing.assert_allclose(row, plain.todense()[0], rtol=1e-5, atol=1e-5)


def test_cast():
    x = arrays.cast(example(), jnp.bfloat16)
    assert isinstance(x, arrays.Sum)
    assert [part.dtype for part in x.parts] == [jnp.bfloat16] * 2
    np.testing.assert_allclose(np.asarray(x.todense(), np.float64), in_float64(x), rtol=1e-2)


def test_partition_specs():
    x = arrays.add(jc.pack(jc.quantize(8), draw(16, 8)), draw(16, 8), low(16, 8))
    base, dense, correction = arrays.partition_specs(x, P("d", None)).parts
    assert (base.codes, base.scale, dense) == (P("d", None), P(None, None), P("d", None))
    assert (correction.u, correction.v) == (P("d", None), P(None, None))
    assert arrays.partition_specs(example(), P("d", None)) is None  # bit planes only go whole


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_sharded(kind):
    mesh, x = mesh_of(kind), arrays.add(draw(16, 8), low(16, 8))
    specs = arrays.Sum((P("d", None), arrays.LowRank(P(), P())))
    placed = jax.device_put(x, jax.tree.map(lambda s: NamedSharding(mesh, s), specs))
    with jax.set_mesh(mesh):
        got = jax.jit(jc.todense)(placed)
    assert got.sharding.spec[0] == "d"
    np.testing.assert_allclose(got, x.todense(), rtol=1e-5, atol=1e-5)


def test_saved_and_loaded(tmp_path):
    tree = {
        "a": example(),
        "b": [arrays.add(draw(4, 4).astype(jnp.bfloat16), low(4, 4, dtype="bfloat16"))],
    }
    jc.save(tmp_path / "sum.safetensors", tree)
    for like in (None, jax.eval_shape(lambda: tree)):
        back = jc.load(tmp_path / "sum.safetensors", like=like)
        assert jax.tree.structure(back) == jax.tree.structure(tree)
        jax.tree.map(np.testing.assert_array_equal, back, tree)


@pytest.mark.parametrize(
    "parts",
    [
        (np.ones((2, 2), np.float32),),
        (np.ones((2, 2), np.float32), np.ones((2, 3), np.float32)),
        (np.ones((2, 2), np.float32), np.ones((2, 2), np.float64)),
        (np.ones((2, 2), np.int8), np.ones((2, 2), np.int8)),
        (np.ones((2, 2), np.float32), None),
    ],
)
def test_contradictions_are_not_saved(tmp_path, parts):
    with pytest.raises(ValueError, match="save: `params` must hold well-formed"):
        jc.save(tmp_path / "m", {"w": arrays.Sum(parts)})


def test_orbax(tmp_path):
    import orbax.checkpoint as ocp

    tree = {"w": example()}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", tree)
        checkpointer.wait_until_finished()
        back = checkpointer.restore(tmp_path / "state", jax.eval_shape(lambda: tree))
    jax.tree.map(np.testing.assert_array_equal, back, tree)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_empty(shape):
    x = arrays.add(draw(*shape), low(*shape))
    assert x.todense().shape == shape


def test_refuses():
    with pytest.raises(ValueError, match=r"add: `parts` must be two or more, got 1 of them"):
        arrays.add(draw(2, 2))
    with pytest.raises(ValueError, match=r"one shape and dtype, got float32\[2, 2\], float32\[2,"):
        arrays.add(draw(2, 2), draw(2, 3))
    with pytest.raises(ValueError, match=r"one shape and dtype, got bfloat16"):
        arrays.add(draw(2, 2).astype(jnp.bfloat16), draw(2, 2))
    with pytest.raises(TypeError, match=r"add: `parts` must hold real floating-point"):
        arrays.add(draw(2, 2), jnp.ones((2, 2), jnp.int8))
    with pytest.raises(TypeError, match=r"add: `parts` must hold real floating-point"):
        arrays.add(draw(2, 2), 1.0)
