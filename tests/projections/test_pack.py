"""What is packed is what was projected, also where packing gains nothing."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc

WEIGHTS = np.random.default_rng(0).normal(size=(64, 32))


@pytest.mark.parametrize(
    "projection", [jc.prune(0.02), jc.quantize(8, group_size=2)], ids=["prune", "quantize"]
)
def test_a_leaf_that_would_be_bigger_is_projected_and_dense(projection):
    params = {"w": jnp.asarray(WEIGHTS, jnp.bfloat16)}
    packed = jc.pack(projection, params)
    assert not jc.arrays.is_compressed(packed["w"])
    assert (packed["w"] != params["w"]).any()
    np.testing.assert_array_equal(packed["w"], jc.compress(projection, params)["w"])


def test_a_compressed_leaf_that_gets_no_smaller_is_projected():
    params = {"w": jnp.asarray(WEIGHTS, jnp.float32)}
    both = jc.chain(jc.quantize(2), jc.prune(nm=(2, 4)))
    want = jc.compress(both, params)["w"]
    np.testing.assert_array_equal(jc.todense(jc.pack(both, params))["w"], want)
    assert (want == 0).mean() >= 0.5
