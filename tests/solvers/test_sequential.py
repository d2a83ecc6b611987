"""Layer after layer behind compressed ones, against compressing each by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.solvers import sequential

RNG = np.random.default_rng(0)


def draw(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


# Not in the order of their names.
PARAMS = {"z": draw(16, 16), "q": draw(16, 16), "k": draw(16, 16), "a": draw(16, 8)}
BATCHES = [draw(64, 16), draw(32, 16)]


def model(params, x):
    x = jax.nn.relu(x @ params["z"])
    return (jax.nn.relu(x @ params["q"]) * jax.nn.sigmoid(x @ params["k"])) @ params["a"]


def by_hand(projection, params, groups):
    for group in groups:
        stats = jc.calibrate(model, params, BATCHES, gram=True)
        params = jc.compress(jc.masked(projection, jc.tree.any_of(*group)), params, stats=stats)
    return params


def same(one, two):
    for path in PARAMS:
        np.testing.assert_allclose(one[path], two[path], rtol=1e-5, atol=1e-5)


def test_each_layer_is_compressed_behind_those_before_it():
    projection = jc.chain(jc.prune(nm=(2, 4)), jc.quantize(4))
    before = jax.tree.map(np.array, PARAMS)
    wanted = by_hand(projection, PARAMS, [["z"], ["q", "k"], ["a"]])
    same(sequential(projection, model, PARAMS, BATCHES), wanted)
    order = ["z", jc.tree.any_of("k", "q"), "*"]
    same(sequential(projection, model, PARAMS, iter(BATCHES), order=order), wanted)
    same(PARAMS, before)


def test_the_last_layer_fits_the_inputs_that_it_gets():
    new = sequential(jc.prune(0.5), model, PARAMS, BATCHES)
    stats = jc.calibrate(model, PARAMS, BATCHES, gram=True)
    at_once = jc.compress(jc.prune(0.5), PARAMS, stats=stats)

    def loss(a):
        one, other = new | {"a": a}, new | {"a": PARAMS["a"]}
        return sum(float(jnp.sum((model(one, x) - model(other, x)) ** 2)) for x in BATCHES)

    assert loss(new["a"]) < 0.9 * loss(at_once["a"])


def test_a_global_budget_is_that_of_the_dense_model():
    params = PARAMS | {"a": 10 * PARAMS["a"]}
    p = jc.prune(0.5, scope="global")
    new = sequential(p, model, params, BATCHES)
    plain = jc.compress(p, params)
    for path, w in plain.items():
        assert int((new[path] != 0).sum()) == int((w != 0).sum())


def test_leaves_that_are_not_chosen_stay():
    new = sequential(jc.masked(jc.prune(0.5), "[qk]"), model, PARAMS, BATCHES)
    assert new["z"] is PARAMS["z"]
    assert int((new["q"] == 0).sum()) == 128


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"sequential: `order` must have each chosen leaf .*'k'"):
        sequential(jc.prune(0.5), model, PARAMS, BATCHES, order=["z", "q", "a"])
    with pytest.raises(ValueError, match=r"sequential: `fn` must use each chosen leaf.*'spare'"):
        sequential(jc.prune(0.5), model, PARAMS | {"spare": draw(4, 4)}, BATCHES)
    with pytest.raises(ValueError, match="sequential: `batches` must hold at least one batch"):
        sequential(jc.prune(0.5), model, PARAMS, [])
    with pytest.raises(TypeError, match="sequential: `projection` must be a Projection"):
        sequential(0.5, model, PARAMS, BATCHES)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="`damping` must be a real number of at least"):
        sequential(jc.prune(0.5), model, PARAMS, BATCHES, damping=-1.0)
