"""Kernels as chains of smaller ones: the dense kernel against NumPy, sizes, files, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress import arrays


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


# Shapes of the stages and their groups.
CHAINS = {
    "one": ([(3, 2, 4, 5)], [1]),
    "spatial": ([(3, 1, 4, 2), (1, 5, 2, 6)], [1, 1]),
    "input": ([(1, 1, 4, 2), (3, 3, 2, 6)], [1, 1]),
    "tucker": ([(1, 1, 4, 2), (3, 3, 2, 3), (1, 1, 3, 6)], [1, 1, 1]),
    "depthwise": ([(1, 1, 4, 3), (3, 1, 1, 3), (1, 2, 1, 3), (1, 1, 3, 6)], [1, 3, 3, 1]),
    "grouped": ([(2, 2, 6), (1, 6, 5)], [2, 1]),
    "multiplier": ([(3, 1, 8), (1, 4, 6)], [4, 2]),
    "three axes": ([(3, 1, 1, 2, 2), (1, 2, 3, 2, 4)], [1, 1]),
    "no rank": ([(3, 1, 4, 0), (1, 3, 0, 6)], [1, 1]),
    "no rank, depthwise": ([(1, 4, 0), (3, 1, 0), (1, 0, 6)], [1, 0, 1]),
}


def build(name, seed=0):
    shapes, groups = CHAINS[name]
    return arrays.conv_chain([draw(*s, seed=seed + i) for i, s in enumerate(shapes)], groups)


def brute(stage, groups):
    """One grouped kernel as `[*spatial, in, out]`, entry by entry."""
    stage = np.asarray(stage, np.float64)
    *spatial, inputs, outputs = stage.shape
    whole = np.zeros((*spatial, inputs * groups, outputs))
    for o in range(outputs):
        g = o // (outputs // groups)
        for i in range(inputs):
            whole[..., g * inputs + i, o] = stage[..., i, o]
    return whole


def dense_of(chain):
    first, *rest = [brute(s, g) for s, g in zip(chain.stages, chain.groups, strict=True)]
    for stage in rest:
        n = first.ndim - 2
        shape = np.broadcast_shapes(first.shape[:n], stage.shape[:n])
        out = np.zeros((*shape, first.shape[-2], stage.shape[-1]))
        for at in np.ndindex(*shape):
            a, b = (
                x[tuple(i if x.shape[d] > 1 else 0 for d, i in enumerate(at))]
                for x in (first, stage)
            )
            out[at] = a @ b
        first = out
    return first


@pytest.mark.parametrize("name", CHAINS)
def test_dense_equals_numpy(name):
    chain = build(name)
    want = dense_of(chain)
    assert chain.shape == want.shape
    assert chain.dtype == jnp.float32
    assert (chain.ndim, chain.size) == (want.ndim, want.size)
    assert chain.nbytes == 4 * sum(np.prod(s) for s in CHAINS[name][0])
    np.testing.assert_allclose(chain.todense(), want, atol=1e-5)
    np.testing.assert_allclose(jax.jit(jc.todense)(chain), want, atol=1e-5)


@pytest.mark.parametrize("name", ["spatial", "depthwise", "multiplier"])
def test_a_tree_that_maps_stacks_and_saves(name, tmp_path):
    chain, other = build(name), build(name, seed=9)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), chain, other)
    both = jax.vmap(jc.todense)(stacked)
    np.testing.assert_allclose(both[0], dense_of(chain), atol=1e-5)
    np.testing.assert_allclose(both[1], dense_of(other), atol=1e-5)
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(chain)[0]]
    assert len(paths) == len(chain.stages)
    jc.save(tmp_path / "m", {"conv": chain})
    back = jc.load(tmp_path / "m")["conv"]
    assert back.groups == chain.groups
    np.testing.assert_array_equal(back.todense(), chain.todense())


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_stages_are_multiplied_wide(dtype):
    chain = arrays.conv_chain([s.astype(dtype) for s in build("depthwise").stages], [1, 3, 3, 1])
    assert chain.dtype == chain.todense().dtype == dtype
    want = dense_of(jax.tree.map(lambda x: x.astype(jnp.float32), chain))
    error = np.abs(np.asarray(chain.todense(), np.float64) - want).max()
    assert error <= float(jnp.finfo(dtype).eps) * np.abs(want).max()


def test_stages_may_be_quantized(tmp_path):
    chain = build("tucker")
    small = jc.pack(jc.quantize(8), {"w": chain})["w"]
    assert isinstance(small, arrays.ConvChain)
    assert all(isinstance(s, arrays.Quantized) for s in small.stages)
    assert small.shape == chain.shape
    rounded = [s.todense() for s in small.stages]
    want = dense_of(arrays.conv_chain(rounded))
    np.testing.assert_allclose(small.todense(), want, atol=1e-5)
    assert np.abs(np.asarray(small.todense()) - dense_of(chain)).max() < 0.1
    jc.save(tmp_path / "m", {"w": small})
    np.testing.assert_array_equal(jc.load(tmp_path / "m")["w"].todense(), small.todense())


def test_gradient_reaches_every_stage():
    chain = build("depthwise")
    c = draw(*chain.shape, seed=5)
    grads = jax.grad(lambda k: jnp.sum(c * k.todense()))(chain)
    for i, g in enumerate(grads.stages):
        step = 1e-2 * jnp.sign(g)

        def at(sign, i=i, step=step):
            stages = list(chain.stages)
            stages[i] = stages[i] + sign * step
            return np.sum(
                np.asarray(c, np.float64) * dense_of(arrays.ConvChain(tuple(stages), chain.groups))
            )

        np.testing.assert_allclose((at(1) - at(-1)) / 2e-2, jnp.abs(g).sum(), rtol=1e-4)


def test_rows_along_the_first_axis():
    for name in ("spatial", "input", "depthwise", "one", "grouped", "three axes"):
        chain = build(name)
        stacked, rebuild = arrays._convolutions.rows_of_chain(chain)
        for i, want in enumerate(dense_of(chain)):
            row = jc.todense(rebuild(jax.tree.map(lambda x, i=i: x[i], stacked)))
            np.testing.assert_allclose(row, want, atol=1e-5)


@pytest.mark.parametrize(
    ("stages", "groups", "kind", "text"),
    [
        ([], None, ValueError, "one or more kernels"),
        ([np.ones((3, 3, 4), np.float32)], [1, 1], ValueError, "groups for each"),
        ([np.ones((4, 4), np.float32)], None, ValueError, "spatial axes, one or more"),
        (
            [np.ones((3, 4, 2), np.float32), np.ones((1, 1, 2, 2), np.float32)],
            None,
            ValueError,
            "the same spatial axes",
        ),
        (
            [np.ones((3, 4, 2), np.float32), np.ones((3, 2, 2), np.float32)],
            None,
            ValueError,
            "one kernel at most that extends along axis 0",
        ),
        (
            [np.ones((3, 4, 2), np.float32), np.ones((1, 3, 2), np.float32)],
            None,
            ValueError,
            "as many inputs",
        ),
        ([np.ones((3, 2, 5), np.float32)], [2], ValueError, "a multiple of their groups"),
        ([np.ones((3, 2, 5), np.float32)], [-1], ValueError, "a multiple of their groups"),
        ([np.ones((3, 2, 0), np.float32)], [9], ValueError, "a multiple of their groups"),
        ([np.ones((3, 2, 5), np.int32)], None, TypeError, "floating-point"),
    ],
)
def test_bad_input(stages, groups, kind, text):
    with pytest.raises(kind, match=f"conv_chain: `stages` must .*{text}"):
        arrays.conv_chain(stages, groups)
