"""A find that is not due is not run, also where each of a batch has a clock of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
from tests import contract
from tests.conftest import counting_jit


def run(opt, params, steps, update=None):
    state, update = opt.init(params), update or jax.jit(opt.update)
    for i in range(steps):
        updates, state = update(contract.params(seed=30 + i), state, params)
        params = optax.apply_updates(params, updates)
    return params


WAYS = {
    "every": lambda n: jc.every(n, jc.prune(0.5)),
    "every, observed": lambda n: jc.every(n, jc.prune(0.5, score=jc.pruning.movement())),
    "every of two": lambda n: jc.partition(
        {"a/kernel": jc.every(n, jc.prune(0.5)), "b/*": jc.every(3, jc.prune(0.25))}
    ),
    "alternated": lambda n: jc.alternated(jc.prune(0.5), n, 2),
    "rigl": lambda n: jc.every(n, jc.pruning.rigl(0.5, 0.5, key=jax.random.key(0))),
}


@pytest.mark.parametrize("way", WAYS)
def test_clocks_of_a_batch_equal_a_loop(way):
    periods = jnp.array([2, 3, 5])
    params = contract.params()
    optimizer = lambda n: jc.projected(optax.sgd(0.1, momentum=0.9), WAYS[way](n))  # noqa: E731
    mapped = jax.vmap(lambda n: run(optimizer(n), params, 6))(periods)
    for i, n in enumerate(periods):
        alone = run(optimizer(n), params, 6)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a[i], b, rtol=1e-6, atol=1e-7),  # noqa: B023
            mapped,
            alone,
        )


@pytest.mark.parametrize("adapter", [jc.projected, jc.straight_through])
def test_a_batched_counter_leaves_a_conditional(adapter):
    opt = adapter(optax.sgd(0.1), jc.every(10, jc.prune(0.5)))
    params = jax.tree.map(lambda w: jnp.stack([w, 2 * w]), contract.params())
    state = jax.vmap(opt.init)(params)
    assert state.step.shape == (2,)
    step = counting_jit(jax.vmap(opt.update))
    program = jax.jit(step).lower(params, state, params).as_text()
    # The only predicates of the program are scalars: whether any of the batch is due.
    assert "stablehlo.case" in program
    updates, new = step(params, state, params)
    _, again = step(params, new, optax.apply_updates(params, updates))
    np.testing.assert_array_equal(again.step, [2, 2])


def test_vmap_of_vmap():
    opt = jc.projected(optax.sgd(0.1), jc.every(2, jc.prune(0.5)))
    once = jax.tree.map(lambda w: jnp.stack([w, 2 * w]), contract.params())
    twice = jax.tree.map(lambda w: jnp.stack([w, w]), once)
    state = jax.vmap(jax.vmap(opt.init))(twice)
    update = jax.vmap(jax.vmap(opt.update))
    assert "stablehlo.case" in jax.jit(update).lower(twice, state, twice).as_text()
    updates, _ = update(twice, state, twice)
    inner = jax.tree.map(lambda w: w[1, 0], twice)
    want, _ = opt.update(inner, opt.init(inner), inner)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[1, 0], b, rtol=1e-6, atol=1e-7), updates, want
    )


def test_gradients_pass_a_step_by():
    """Of a learning rate, through steps with and without a find."""

    def loss(rate):
        params = run(jc.projected(optax.sgd(rate), jc.every(2, jc.prune(0.5))), PARAMS, 3)
        return sum(jnp.sum(w**2) for w in jax.tree.leaves(params))

    slope = (loss(0.1 + 1e-3) - loss(0.1 - 1e-3)) / 2e-3
    np.testing.assert_allclose(jax.grad(loss)(0.1), slope, rtol=2e-2)


PARAMS = contract.params()
