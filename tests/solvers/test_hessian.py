"""The factor of the inverse Hessian, against NumPy's inverse in float64."""

import re

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from jaxcompress.solvers import _hessian
from jaxcompress.solvers._hessian import prepare
from tests.conftest import counting_jit
from tests.solvers import brute_force


@given(
    k=st.sampled_from([1, 2, 7, 24]),
    seed=st.integers(0, 2**32 - 1),
    damping=st.floats(1e-3, 10.0),
)
@settings(derandomize=True, deadline=None, max_examples=30)
def test_the_factor_is_that_of_the_inverse(k, seed, damping):
    gram = brute_force.gram_of(brute_force.layer(k, 1, seed)[0])
    prepared, info = prepare(gram, damping)
    u = np.asarray(prepared.factor, np.float64)
    inverse = np.linalg.inv(brute_force.damped(gram, damping))
    np.testing.assert_allclose(u.T @ u, inverse, rtol=2e-3, atol=1e-4 * np.abs(inverse).max())
    np.testing.assert_array_equal(u, np.triu(u))
    assert (np.diag(u) > 0).all()
    assert bool(info.ok)
    assert int(info.tries) == 1
    assert float(info.damping) == np.float32(damping)


def test_act_order_is_descending_and_stable():
    x, _ = brute_force.layer(6, 1)
    x[:, 3] = x[:, 1]
    x[:, 4] = 0.0
    gram = brute_force.gram_of(x)
    prepared, _ = prepare(gram, act_order=True)
    order = np.argsort(-np.diag(gram), kind="stable")
    np.testing.assert_array_equal(prepared.order, order)
    np.testing.assert_array_equal(prepared.order[prepared.inverse_order], np.arange(6))
    np.testing.assert_array_equal(prepared.dead, np.arange(6) == 4)
    direct, _ = prepare(gram[np.ix_(order, order)])
    np.testing.assert_array_equal(prepared.factor, direct.factor)
    np.testing.assert_array_equal(direct.order, np.arange(6))
    np.testing.assert_array_equal(direct.inverse_order, np.arange(6))


def test_dead_inputs_are_tied_to_none():
    x, _ = brute_force.layer(8, 1)
    x[:, [2, 5]] = 0.0
    gram = brute_force.gram_of(x)
    prepared, info = prepare(gram, 0.05)
    u = np.asarray(prepared.factor, np.float64)
    np.testing.assert_allclose(
        u.T @ u, np.linalg.inv(brute_force.damped(gram, 0.05)), rtol=1e-3, atol=1e-5
    )
    assert bool(info.ok)
    np.testing.assert_array_equal(np.flatnonzero(prepared.dead), [2, 5])
    live = [0, 1, 3, 4, 6, 7]
    alone, _ = prepare(gram[np.ix_(live, live)], 0.05)
    np.testing.assert_allclose(u[np.ix_(live, live)], alone.factor, rtol=1e-5, atol=1e-7)


def test_all_dead():
    prepared, info = prepare(jnp.zeros((3, 3)), 0.0)
    np.testing.assert_array_equal(prepared.factor, np.eye(3))
    assert bool(prepared.dead.all())
    assert bool(info.ok)


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e8, 1e30])
def test_the_scale_of_the_gram_does_not_matter(scale):
    x, _ = brute_force.layer(8, 1)
    x[:, 3] = 0.0
    gram = brute_force.gram_of(x)
    one, _ = prepare(gram)
    other, info = prepare((gram.astype(np.float64) * scale).astype(np.float32))
    assert bool(info.ok)
    np.testing.assert_allclose(
        np.asarray(other.factor, np.float64) * np.sqrt(scale), one.factor, rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("samples", [1, 10, 31])
def test_damping_rises_where_it_must(samples):
    gram = brute_force.gram_of(brute_force.layer(32, 1, samples=samples)[0])
    prepared, info = prepare(gram, 0.0)
    assert bool(info.ok)
    assert int(info.tries) > 1
    used = float(info.damping)
    np.testing.assert_allclose(used, 1e-6 * 10.0 ** (int(info.tries) - 2), rtol=1e-5)
    u = np.asarray(prepared.factor, np.float64)
    h = brute_force.damped(gram, used)
    np.testing.assert_allclose(u @ h @ u.T, np.eye(32), atol=0.5)


def test_an_indefinite_gram_is_lifted_or_reported():
    prepared, info = prepare(jnp.array([[1.0, 3.0], [3.0, 1.0]]), 0.01)
    assert bool(info.ok)
    assert float(info.damping) == pytest.approx(10.0)
    prepared, info = prepare(jnp.array([[1.0, 3e9], [3e9, 1.0]]), 0.01)
    assert not bool(info.ok)
    assert int(info.tries) == _hessian._MOST_TRIES
    assert bool(jnp.isnan(prepared.factor).all())


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_bad_values_are_reported(value):
    _, info = prepare(jnp.eye(3).at[1, 1].set(value))
    assert not bool(info.ok)
    _, info = jax.jit(prepare)(jnp.eye(3), jnp.nan)
    assert not bool(info.ok)


def test_layers_and_dampings_under_vmap():
    grams = jnp.stack(
        [brute_force.gram_of(brute_force.layer(8, 1, s, samples=3 + 10 * s)[0]) for s in range(3)]
    )
    dampings = jnp.array([0.0, 0.0, 0.1])
    together, infos = jax.vmap(prepare)(grams, dampings)
    np.testing.assert_array_equal(infos.tries > 1, [True, False, False])
    for i in range(3):
        alone, info = prepare(grams[i], dampings[i])
        for a, b in zip(info, infos, strict=True):
            assert a == b[i]
        # Both are rounded, which counts for more in the singular one.
        scale = np.abs(np.asarray(alone.factor)).max()
        atol = (0.2 if i == 0 else 1e-3) * scale
        np.testing.assert_allclose(together.factor[i], alone.factor, atol=atol)


def test_dampings_compile_once():
    f = counting_jit(lambda gram, damping: prepare(gram, damping))
    gram = jnp.eye(4) * 3
    for damping in [0.0, 0.01, 0.5]:
        f(gram, jnp.float32(damping))
    assert f.traces == 1


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_narrow_grams_are_factored_in_float32(dtype):
    gram = jnp.asarray(brute_force.gram_of(brute_force.layer(8, 1)[0]), dtype)
    prepared, info = prepare(gram)
    assert prepared.factor.dtype == info.damping.dtype == jnp.float32
    want = prepare(gram.astype(jnp.float32))[0].factor
    np.testing.assert_allclose(prepared.factor, want, rtol=1e-6)


def test_float64_is_kept():
    with jax.enable_x64(True):
        gram = brute_force.layer(16, 1)[0].astype(np.float64)
        gram = gram.T @ gram
        prepared, _ = prepare(gram, 1e-3)
        assert prepared.factor.dtype == jnp.float64
        u = np.asarray(prepared.factor)
        inverse = np.linalg.inv(brute_force.damped(gram, 1e-3))
        np.testing.assert_allclose(u.T @ u, inverse, rtol=1e-8, atol=1e-12)


def test_empty():
    prepared, info = prepare(jnp.zeros((0, 0)), act_order=True)
    assert prepared.factor.shape == (0, 0)
    assert bool(info.ok)


@pytest.mark.parametrize(
    ("gram", "damping", "error", "words"),
    [
        (jnp.ones((3, 2)), 0.1, ValueError, "`gram` must be a square matrix"),
        (jnp.ones(()), 0.1, ValueError, "`gram` must be a square matrix"),
        (jnp.ones((2, 3, 3)), 0.1, ValueError, "Use jax.vmap"),
        (jnp.ones((3, 3), jnp.int32), 0.1, TypeError, "`gram` must hold real"),
        (jnp.ones((3, 3)), -0.1, ValueError, "`damping` must be a real number"),
        (jnp.ones((3, 3)), float("nan"), ValueError, "`damping` must be a real number"),
        (jnp.ones((3, 3)), "1", TypeError, "`damping` must be a real number"),
    ],
)
def test_bad_input(gram, damping, error, words):
    with pytest.raises(error, match="prepare: " + re.escape(words) if "`" in words else words):
        prepare(gram, damping)
