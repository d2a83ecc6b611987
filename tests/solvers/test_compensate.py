"""Error-compensated projection, against solving all remaining rows anew after each."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from jaxcompress.solvers import _compensate
from jaxcompress.solvers._compensate import compensate
from jaxcompress.solvers._hessian import prepare
from tests.conftest import counting_jit
from tests.solvers import brute_force

# Callbacks for NumPy and JAX alike: `xp` is one of them.


def unstructured(k, sparsity, xp=jnp):
    """SparseGPT: in each block the fraction with the least w^2 / U^2 goes."""

    def choose(rows, diagonal, start):
        scores = xp.square(rows / diagonal[:, None])
        valid = xp.clip(k - start, 0, rows.shape[0]) * rows.shape[1]
        kept = xp.floor((1 - sparsity) * xp.asarray(valid, np.float32)).astype(np.int32)
        rank = xp.argsort(xp.argsort(-scores.ravel())).reshape(rows.shape)
        return rank < kept

    return choose, lambda row, keep, i: xp.where(keep[i], row, xp.zeros_like(row))


def two_of_four(xp=jnp):
    """SparseGPT, 2:4: per column the two best of four rows stay."""

    def choose(rows, diagonal, start):
        scores = xp.square(rows / diagonal[:, None])
        return xp.argsort(xp.argsort(-scores, axis=0), axis=0) < 2

    return choose, lambda row, keep, i: xp.where(keep[i], row, xp.zeros_like(row))


def grid(levels, xp=jnp):
    """Rounding to nearest, with a step for each block and column."""

    def choose(rows, diagonal, start):
        return xp.max(xp.abs(rows), axis=0) / levels

    def project(row, step, i):
        safe = xp.where(step > 0, step, xp.ones_like(step))
        return step * xp.clip(xp.round(row / safe), -levels, levels)

    return choose, project


def both(first, second, xp=jnp):
    """Prunes and quantizes what is kept, at once."""

    def choose(rows, diagonal, start):
        keep = first[0](rows, diagonal, start)
        kept = xp.where(keep, rows, xp.zeros_like(rows))
        return keep, second[0](kept, diagonal, start)

    def project(row, structure, i):
        keep, step = structure
        return xp.where(keep[i], second[1](row, step, i), xp.zeros_like(row))

    return choose, project


def callbacks(kind, k, xp=jnp):
    return {
        "unstructured": lambda: unstructured(k, 0.5, xp),
        "2:4": lambda: two_of_four(xp),
        "grid": lambda: grid(7, xp),
        "sparse grid": lambda: both(unstructured(k, 0.5, xp), grid(7, xp), xp),
        "2:4 grid": lambda: both(two_of_four(xp), grid(7, xp), xp),
    }[kind]()


CASES = [
    ("unstructured", 12, 5, 12, 128),
    ("unstructured", 12, 5, 5, 8),
    ("unstructured", 7, 3, 16, 128),
    ("unstructured", 1, 1, 1, 128),
    ("2:4", 12, 5, 4, 128),
    ("2:4", 12, 5, 4, 4),
    ("2:4", 10, 5, 4, 8),
    ("grid", 12, 5, 6, 8),
    ("grid", 13, 5, 4, 8),
    ("sparse grid", 12, 5, 5, 10),
    ("2:4 grid", 12, 5, 4, 8),
]


@pytest.mark.parametrize(("kind", "k", "n", "b", "lazy"), CASES)
def test_as_solving_for_the_rest_after_each_row(kind, k, n, b, lazy, monkeypatch):
    monkeypatch.setattr(_compensate, "_LAZY", lazy)
    monkeypatch.setattr(_compensate, "_INNER", 2)
    monkeypatch.setattr(_compensate, "_SMALL", 0)
    x, w = brute_force.layer(k, n, seed=k + n)
    gram = brute_force.gram_of(x)
    prepared, _ = prepare(gram, 0.02)
    new, structures = compensate(w, prepared.factor, *callbacks(kind, k), block_size=b)
    h = brute_force.damped(gram, 0.02)
    want, chosen = brute_force.compensate(w, h, *callbacks(kind, k, np), b)
    np.testing.assert_allclose(new, want, rtol=1e-3, atol=1e-3)
    for i, block in enumerate(chosen):
        for ours, theirs in zip(
            jax.tree.leaves(jax.tree.map(lambda s, i=i: s[i], structures)),
            jax.tree.leaves(block),
            strict=True,
        ):
            if theirs.ndim == 2:  # a mask, whose last block is filled up
                ours = ours[: len(theirs)]
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)
        assert len(jax.tree.leaves(structures)[0]) == len(chosen)


@functools.cache
def eight_rows(kind):
    return jax.jit(lambda w, u: compensate(w, u, *callbacks(kind, 8), block_size=4))


@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(["unstructured", "2:4", "sparse grid"]),
    damping=st.floats(1e-2, 1.0),
)
@settings(derandomize=True, deadline=None, max_examples=30)
def test_any_layer(seed, kind, damping):
    x, w = brute_force.layer(8, 4, seed)
    gram = brute_force.gram_of(x)
    prepared, _ = prepare(gram, damping)
    new, _ = eight_rows(kind)(w, prepared.factor)
    h = brute_force.damped(gram, damping)
    want, _ = brute_force.compensate(w, h, *callbacks(kind, 8, np), 4)
    # A tie up to rounding may fall either way; then the error is the same.
    if not np.allclose(new, want, rtol=1e-2, atol=1e-2):
        np.testing.assert_allclose(
            brute_force.error(h, new, w), brute_force.error(h, want, w), rtol=0.05
        )


def fixed(step=0.25):
    """A projection that does not depend on blocks."""
    return (
        lambda rows, diagonal, start: (),
        lambda row, structure, i: step * jnp.round(row / step),
    )


@pytest.mark.parametrize("b", [1, 7, 32, 300])
def test_the_block_size_does_not_matter(b):
    x, w = brute_force.layer(150, 6)
    prepared, _ = prepare(brute_force.gram_of(x))
    # Not a rounding, where the last bit of a row could tip its neighbour.
    project = lambda row, structure, i: 0.5 * row + 0.1 * jnp.sin(row)  # noqa: E731
    new, _ = compensate(w, prepared.factor, fixed()[0], project, block_size=b)
    one, _ = compensate(w, prepared.factor, fixed()[0], project)
    np.testing.assert_allclose(new, one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "b"), [("unstructured", 16), ("2:4", 4), ("grid", 32), ("2:4 grid", 4)]
)
def test_it_helps(kind, b):
    x, w = brute_force.layer(64, 32, samples=80)
    gram = brute_force.gram_of(x)
    prepared, _ = prepare(gram)
    calls = callbacks(kind, 64)
    new, _ = compensate(w, prepared.factor, *calls, block_size=b)
    # Without correlations there is nothing to make up with.
    alone = jnp.diag(1 / jnp.sqrt(jnp.diag(gram)))
    plain, _ = compensate(w, alone, *calls, block_size=b)
    assert brute_force.error(gram, new, w) < 0.7 * brute_force.error(gram, plain, w)


def test_a_diagonal_hessian_only_projects():
    _, w = brute_force.layer(9, 4)
    choose, project = fixed()
    new, structures = compensate(w, jnp.eye(9) * 3.0, choose, project, block_size=4)
    np.testing.assert_array_equal(new, project(w, (), 0))
    assert structures == ()


def test_a_projection_that_changes_nothing_changes_nothing():
    x, w = brute_force.layer(9, 4)
    u = prepare(brute_force.gram_of(x))[0].factor
    new, _ = compensate(w, u, fixed()[0], lambda row, s, i: row, block_size=4)
    np.testing.assert_array_equal(new, w)


def test_below_the_diagonal_nothing_is_read():
    x, w = brute_force.layer(9, 4)
    u = prepare(brute_force.gram_of(x))[0].factor
    dirty = jnp.where(jnp.tril(jnp.ones_like(u), -1) > 0, jnp.nan, u)
    new, _ = compensate(w, u, *fixed(), block_size=4)
    np.testing.assert_array_equal(compensate(w, dirty, *fixed(), block_size=4)[0], new)


def test_what_choose_and_project_are_given():
    w = jnp.arange(1.0, 11.0)[:, None] * jnp.ones((1, 3))
    choose = lambda rows, diagonal, start: (rows, diagonal, start)  # noqa: E731
    project = lambda row, s, i: jnp.where(i == 1, row, s[0][i])  # noqa: E731
    new, (rows, diagonal, start) = compensate(w, 2 * jnp.eye(10), choose, project, block_size=4)
    np.testing.assert_array_equal(new, w)
    np.testing.assert_array_equal(start, [0, 4, 8])
    np.testing.assert_array_equal(rows[:, :, 0], [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 0, 0]])
    np.testing.assert_array_equal(diagonal[2], [2, 2, np.inf, np.inf])
    np.testing.assert_array_equal(diagonal[:2], np.full((2, 4), 2.0))


def test_the_filling_has_no_effect():
    x, w = brute_force.layer(10, 4)
    u = prepare(brute_force.gram_of(x))[0].factor
    project = lambda row, s, i: jnp.where(row == 0, jnp.nan, 0.5 * row)  # noqa: E731
    new, _ = compensate(w, u, fixed()[0], project, block_size=4)
    want, _ = compensate(w, u, fixed()[0], project, block_size=10)
    np.testing.assert_allclose(new, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_rows_are_what_project_returned(dtype):
    x, w = brute_force.layer(16, 4)
    gram = brute_force.gram_of(x)
    u = prepare(gram, 1e-4)[0].factor
    w = jnp.asarray(w, dtype)
    new, _ = compensate(w, u, *fixed(), block_size=4)
    assert new.dtype == dtype
    np.testing.assert_array_equal(new * 4, jnp.round(new * 4))


def test_the_cast_is_made_up_for():
    x, w = brute_force.layer(16, 4)
    gram = brute_force.gram_of(x)
    u = prepare(gram, 1e-4)[0].factor
    w = jnp.asarray(w, jnp.bfloat16)
    new, _ = compensate(w, u, fixed()[0], lambda row, s, i: row * 0.9, block_size=4)
    want, _ = brute_force.compensate(
        np.asarray(w, np.float64),
        brute_force.damped(gram, 1e-4),
        lambda *_: (),
        lambda row, s, i: (row * 0.9).astype(jnp.bfloat16).astype(np.float64),
        4,
    )
    # Up to one step of bfloat16 where a sum falls between two.
    np.testing.assert_allclose(np.asarray(new, np.float64), want, rtol=0.01, atol=1e-3)
    assert np.mean(np.asarray(new, np.float64) == want) > 0.9


def test_layers_under_vmap():
    layers = [brute_force.layer(10, 4, seed) for seed in range(3)]
    w = jnp.stack([w for _, w in layers])
    u = jnp.stack([prepare(brute_force.gram_of(x))[0].factor for x, _ in layers])
    f = lambda w, u: compensate(w, u, *callbacks("2:4 grid", 10), block_size=4)  # noqa: E731
    new, (masks, steps) = jax.vmap(f)(w, u)
    for i in range(3):
        alone, (mask, step) = f(w[i], u[i])
        np.testing.assert_allclose(new[i], alone, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(masks[i], mask)
        np.testing.assert_allclose(steps[i], step, rtol=1e-5)


def test_sparsities_under_vmap_compile_once():
    x, w = brute_force.layer(10, 4)
    u = prepare(brute_force.gram_of(x))[0].factor

    @counting_jit
    def f(w, u, sparsity):
        return compensate(w, u, *unstructured(10, sparsity), block_size=5)

    sparsities = jnp.array([0.0, 0.3, 0.5, 1.0])
    news, masks = jax.vmap(lambda s: f(w, u, s))(sparsities)
    np.testing.assert_array_equal(masks.sum(axis=(1, 2, 3)), [40, 28, 20, 0])
    before = f.traces
    for i, s in enumerate(sparsities):
        new, mask = f(w, u, s)
        np.testing.assert_allclose(news[i], new, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(masks[i], mask)
    assert f.traces <= before + 1


def test_eager_is_as_compiled():
    x, w = brute_force.layer(10, 4)
    u = prepare(brute_force.gram_of(x))[0].factor
    f = lambda w, u: compensate(w, u, *callbacks("sparse grid", 10), block_size=4)  # noqa: E731
    for a, b in zip(jax.tree.leaves(f(w, u)), jax.tree.leaves(jax.jit(f)(w, u)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_the_program_does_not_grow_with_the_layer():
    def equations(k, b):
        shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in [(k, 8), (k, k)]]
        f = lambda w, u: compensate(w, u, *callbacks("unstructured", k), block_size=b)  # noqa: E731
        return str(jax.make_jaxpr(f)(*shapes)).count(" = ")

    assert equations(64, 4) <= equations(1024, 4) == equations(4096, 4)
    assert equations(1024, 128) == equations(4096, 128) < 1.5 * equations(64, 4)


def test_a_nan_stays_in_its_column():
    x, w = brute_force.layer(10, 4)
    u = prepare(brute_force.gram_of(x))[0].factor
    clean, _ = compensate(w, u, *grid(7), block_size=4)
    w[3, 1] = np.nan
    new, _ = compensate(w, u, *grid(7), block_size=4)
    others = [0, 2, 3]
    np.testing.assert_array_equal(new[:, others], clean[:, others])
    assert bool(jnp.isnan(new[3, 1]))


@pytest.mark.parametrize("value", [0.0, 2.0])
def test_equal_weights(value):
    x, _ = brute_force.layer(8, 3)
    u = prepare(brute_force.gram_of(x))[0].factor
    new, mask = compensate(jnp.full((8, 3), value), u, *callbacks("2:4", 8), block_size=4)
    assert bool(jnp.isfinite(new).all())
    np.testing.assert_array_equal(mask.sum(axis=1), np.full((2, 3), 2))


@pytest.mark.parametrize("shape", [(0, 3), (5, 0), (0, 0)])
def test_empty(shape):
    u = jnp.eye(shape[0])
    new, steps = compensate(
        jnp.zeros(shape), u, lambda rows, d, start: jnp.sum(rows, axis=0), fixed()[1], block_size=4
    )
    assert new.shape == shape
    assert steps.shape == (-(-shape[0] // 4), shape[1])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"w": jnp.ones(3)}, ValueError, "`w` must be a kernel"),
        ({"w": jnp.ones(())}, ValueError, "`w` must be a kernel"),
        ({"w": jnp.ones((3, 2), jnp.int32)}, TypeError, "`w` must hold real"),
        ({"factor": jnp.eye(4)}, ValueError, r"`factor` must be of shape \[3, 3\]"),
        ({"factor": jnp.eye(3, dtype=jnp.int32)}, TypeError, "`factor` must hold real"),
        ({"block_size": 0}, ValueError, "`block_size` must be a static integer"),
        ({"block_size": 2.0}, TypeError, "`block_size` must be a static integer"),
        ({"project": lambda row, s, i: row[:1]}, ValueError, "`project` must return a row"),
    ],
)
def test_bad_input(change, error, words):
    given = {
        "w": jnp.ones((3, 2)),
        "factor": jnp.eye(3),
        "choose": fixed()[0],
        "project": fixed()[1],
    }
    with pytest.raises(error, match="compensate: " + words):
        compensate(**{**given, **change})
