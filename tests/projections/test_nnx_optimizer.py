"""`flax.nnx.Optimizer` takes the state apart and puts it together again at each step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxcompress as jc

ADAPTERS = {
    "projected": lambda: jc.projected(optax.sgd(0.1), jc.every(2, jc.prune(0.5))),
    "straight_through": lambda: jc.straight_through(
        optax.sgd(0.1), jc.chain(jc.every(2, jc.prune(0.5)), jc.quantize(4))
    ),
    "project_params": lambda: optax.chain(optax.sgd(0.1), jc.project_params(jc.cluster(4))),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_steps_and_pack(name):
    def train(step_of):
        model = nnx.Linear(16, 8, rngs=nnx.Rngs(0))
        return step_of(model)

    x = jnp.linspace(-1.0, 1.0, 64).reshape(4, 16)

    def loss(model):
        return jnp.mean((model(x) - 1.0) ** 2)

    def with_nnx(model):
        optimizer = nnx.Optimizer(model, ADAPTERS[name](), wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer):
            optimizer.update(model, nnx.grad(loss)(model))

        for _ in range(4):
            step(model, optimizer)
        return nnx.state(model, nnx.Param), optimizer.opt_state

    def with_optax(model):
        graph, params = nnx.split(model, nnx.Param)
        optimizer = ADAPTERS[name]()
        state = optimizer.init(params)
        for _ in range(4):
            grads = jax.grad(lambda params: loss(nnx.merge(graph, params)))(params)
            updates, state = optimizer.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    (got, state), (want, _) = train(with_nnx), train(with_optax)
    with jax.numpy_rank_promotion("allow"):
        np.testing.assert_allclose(got["kernel"][...], want["kernel"][...], atol=1e-5)
    packed = jc.todense(jc.pack(nnx.as_pure(state), nnx.as_pure(got)))
    np.testing.assert_allclose(packed["kernel"], got["kernel"][...], atol=1e-6)
