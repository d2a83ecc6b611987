"""Decompositions under vmap: one after the other on CPUs, values and derivatives as of JAX."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress.factorization import _lapack as lapack


def draw(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def symmetric(x):
    return x + jnp.swapaxes(x, -1, -2)


# What does not depend on the signs of vectors: a matrix put together again from a function of it.
def cubes(eigh, x):
    values, vectors = eigh(symmetric(x))
    return (vectors * (values**3)[None, :]) @ vectors.T


def roots(svd, x):
    u, s, vt = svd(x)
    return (u * jnp.sqrt(s)[None, :]) @ vt


def thin(x):
    return jnp.linalg.svd(x, full_matrices=False)


CASES = {
    "eigh": (lapack.eigh, jnp.linalg.eigh, cubes, (2, 3, 5, 5)),
    "svd": (lapack.svd, thin, roots, (2, 3, 5, 7)),
}
cases = pytest.mark.parametrize("case", CASES)


@cases
def test_values_and_derivatives_alone_and_under_vmap(case):
    ours, theirs, f, shape = CASES[case]
    x = draw(*shape)

    def both(transform):
        return (transform(lambda x, g=g: f(g, x)) for g in (ours, theirs))

    def close(transform, x):
        got, want = (jax.jit(g)(x) for g in both(transform))
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4)

    summed = lambda g: lambda x: jnp.sum(jnp.sin(g(x)))  # noqa: E731
    close(lambda g: g, x[0, 0])
    close(jax.vmap, x[0])
    close(lambda g: jax.vmap(jax.vmap(g)), x)
    close(lambda g: jax.grad(summed(g)), x[0, 0])
    close(lambda g: jax.vmap(jax.grad(summed(g))), x[0])
    close(lambda g: jax.grad(summed(jax.vmap(g))), x[0])


@cases
def test_no_batch_reaches_the_thread_pool(case):
    ours, theirs, f, shape = CASES[case]

    def batched(g):
        """The ranks of the matrices that LAPACK is given."""
        text = jax.jit(jax.vmap(lambda x: f(g, x))).lower(draw(*shape[1:])).as_text()
        calls = re.findall(r"custom_call @lapack\w+\(.*?\) .*?: \(tensor<([\dx]+)xf32>", text)
        assert calls
        return {call.count("x") + 1 for call in calls}

    assert batched(ours) == {2}
    assert batched(theirs) == {3}
