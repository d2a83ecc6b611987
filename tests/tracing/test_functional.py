"""Flax NNX modules as functions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxcompress as jc


class Net(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(4, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.head = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(self.features(x))

    def features(self, x):
        return nnx.relu(self.norm(self.hidden(x)))


X = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32)


@pytest.mark.parametrize("method", ["__call__", "features"])
def test_equals_the_module(method):
    module = Net(nnx.Rngs(0))
    apply, params = jc.functional(module, method)
    mean = np.array(module.norm.mean[...])
    y = jax.jit(apply)(params, X)
    np.testing.assert_array_equal(module.norm.mean[...], mean)
    np.testing.assert_allclose(y, nnx.jit(lambda m, x: getattr(m, method)(x))(module, X), 1e-6)


def test_params_are_all_of_the_parameters():
    _, params = jc.functional(Net(nnx.Rngs(0)))
    assert {path for path, _ in jc.tree.leaves_with_paths(params)} == {
        "hidden/kernel",
        "hidden/bias",
        "norm/scale",
        "norm/bias",
        "head/kernel",
        "head/bias",
    }


def test_packed_and_lifted():
    apply, params = jc.functional(Net(nnx.Rngs(0)))
    small = jc.pack(jc.quantize(8), params)
    y = jax.jit(jc.lift(apply))(small, X)
    np.testing.assert_allclose(y, apply(jc.todense(small), X), rtol=1e-4, atol=1e-6)


def test_not_a_module():
    with pytest.raises(TypeError, match=r"functional: `module` must be a flax.nnx.Module, got"):
        jc.functional(lambda x: x)
