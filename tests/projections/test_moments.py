"""The inner optimizer's moments are cleared for dropped and regrown weights, in any optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
from tests import contract
from tests.conftest import lenient

OPTIMIZERS = {
    "adam": lambda: optax.adam(1e-2),
    "adamw": lambda: optax.adamw(1e-2),
    "momentum": lambda: optax.sgd(1e-2, momentum=0.9),
    "rmsprop": lambda: optax.rmsprop(1e-2, momentum=0.9),
    "lion": lambda: optax.lion(1e-2),
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=4, momentum=0.9),
    "muon": lambda: optax.contrib.muon(1e-2),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)),
    "masked": lambda: optax.masked(
        optax.adam(1e-2), lambda params: jax.tree.map(lambda w: w.ndim > 1, params)
    ),
    "partition": lambda: optax.partition(
        {"m": optax.adam(1e-2), "v": optax.sgd(1e-2, momentum=0.5)},
        lambda params: jax.tree.map(lambda w: "m" if w.ndim > 1 else "v", params),
    ),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=1e-2),
    "multi_steps": lambda: optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
    "multi_steps_of_chain": lambda: optax.chain(
        optax.identity(),
        optax.MultiSteps(optax.inject_hyperparams(optax.adam)(1e-2), 2).gradient_transformation(),
    ),
}


def elementwise(state, shape):
    """Every floating array of a given shape in an optimizer's state: its moments."""
    leaves = jax.tree.leaves(state)
    return [x for x in leaves if x.shape == shape and jnp.issubdtype(x.dtype, jnp.floating)]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_of_dropped_weights_are_zero(name):
    params, grads = contract.params(), contract.params(seed=5)
    opt = jc.projected(lenient(OPTIMIZERS[name]()), jc.prune(0.5))
    state = opt.init(params)
    for _ in range(4):
        updates, state = jax.jit(opt.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
    keep = state.structure["a/kernel"].keep
    moments = elementwise(state.inner, (16, 8))
    assert len(moments) >= 1
    for moment in moments:
        np.testing.assert_array_equal(np.asarray(moment)[~np.asarray(keep)], 0)
    live = [np.asarray(m)[np.asarray(keep)] for m in moments]
    assert any((x != 0).all() for x in live)
    np.testing.assert_array_equal(np.asarray(params["a"]["kernel"])[~np.asarray(keep)], 0)
    # A leaf that is not pruned keeps its moments.
    assert all((np.asarray(m) != 0).all() for m in elementwise(state.inner, (8,))[:1])


@pytest.mark.parametrize("held", [False, True])
def test_moments_of_what_comes_back_start_anew(held):
    p = jc.every(1, jc.prune(0.5)) if held else jc.prune(0.5)
    opt = jc.projected(optax.sgd(1.0, momentum=0.9), p)
    params = {"w": jnp.array([[1.0, 2.0]])}
    state = opt.init(params)
    updates, state = opt.update({"w": jnp.array([[0.1, 0.1]])}, state, params)
    params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(state.inner[0].trace["w"], [[0.0, np.float32(0.1)]])
    # Weight 0 was dropped; a large gradient brings it back and drops the other one.
    updates, state = opt.update({"w": jnp.array([[9.0, 0.1]])}, state, params)
    params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(state.inner[0].trace["w"], [[9.0, 0.0]])
    np.testing.assert_array_equal(params["w"], [[-9.0, 0.0]])


WAYS = {
    "magnitude": (lambda: jc.prune(0.5), True),
    "scored": (lambda: jc.prune(0.5, score=jc.pruning.movement()), True),
    "rigl": (lambda: jc.pruning.rigl(0.5, 0.4, key=jax.random.key(0)), True),
    "quantized": (lambda: jc.quantize(4), False),
}


@pytest.mark.parametrize("optimizer", ["momentum", "adamw", "multi_steps"])
@pytest.mark.parametrize("way", WAYS)
def test_finding_before_the_update_changes_nothing_but_speed(way, optimizer):
    """The same steps with and without the word on when a find is due."""
    make, drops = WAYS[way]
    p = jc.every(2, make(), begin=1, end=6)
    assert p.due is not None
    trails = []
    for each in (p, p._replace(due=None, everywhere=None)):
        opt = jc.projected(lenient(OPTIMIZERS[optimizer]()), each)
        params = contract.params()
        state, trail, update = opt.init(params), [], jax.jit(opt.update)
        for i in range(9):
            updates, state = update(contract.params(seed=20 + i), state, params)
            params = optax.apply_updates(params, updates)
            trail.append((params, state))
        trails.append(trail)
    for (ours, _), (theirs, _) in zip(*trails, strict=True):
        for path, w in jc.tree.leaves_with_paths(ours):
            want = dict(jc.tree.leaves_with_paths(theirs))[path]
            np.testing.assert_array_equal(w == 0, want == 0)
            np.testing.assert_allclose(w, want, rtol=2e-5, atol=2e-6)
    if drops:
        zeros = [float((params["a"]["kernel"] == 0).mean()) for params, _ in trails[0]]
        assert zeros[0] == 0
        assert zeros[-1] >= 0.5  # what RigL has just grown is zero too


@pytest.mark.parametrize("way", ["magnitude", "scored", "rigl"])
@pytest.mark.parametrize("held", [False, True])
def test_inside_of_masked_and_partition(way, held):
    p = jc.every(2, WAYS[way][0]()) if held else WAYS[way][0]()
    params, grads = contract.params(), contract.params(seed=5)
    inner = jc.projected(lenient(optax.adam(1e-2)), p)
    chosen = jax.tree.map(lambda w: w.shape == (16, 8), params)
    labels = jax.tree.map(lambda w: "one" if w.shape == (16, 8) else "other", params)
    other = lenient(optax.sgd(0.1))
    for opt in (
        optax.masked(inner, chosen),
        optax.partition({"one": inner, "other": other}, labels),
    ):
        now, state, update = params, opt.init(params), jax.jit(opt.update)
        for _ in range(3):
            updates, state = update(grads, state, now)
            now = optax.apply_updates(now, updates)
        assert float((now["a"]["kernel"] == 0).mean()) >= 0.5
        assert float((now["b"]["kernel"] == 0).mean()) < 0.1


def test_quantization_drops_nothing():
    opt = jc.projected(lenient(optax.adam(1e-2)), jc.quantize(2))
    params = contract.params()
    _, state = opt.update(params, opt.init(params), params)
    plain = lenient(optax.adam(1e-2))
    _, want = plain.update(params, plain.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, state.inner, want)


def test_bare_array_params():
    opt = jc.projected(lenient(optax.adam(1e-2)), jc.prune(0.5))
    w = contract.params()["a"]["kernel"]
    _, state = opt.update(w, opt.init(w), w)
    assert (np.asarray(state.inner[0].mu)[~np.asarray(state.structure[""].keep)] == 0).all()
