"""What a training step costs over plain Adam: MLP 784-1024-1024-10, batch 256, donated buffers.

pytest tests/benchmarks -o addopts="" --confcutdir=tests/benchmarks --benchmark-json=out.json
"""

import itertools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
from tests.benchmarks.conftest import median_ratio, paired

SIZES = (784, 1024, 1024, 10)


def mlp(seed=0):
    rng = np.random.default_rng(seed)
    shapes = itertools.pairwise(SIZES)
    return {
        f"layer{i}": {
            "kernel": jnp.asarray(rng.normal(size=s) / np.sqrt(s[0]), jnp.float32),
            "bias": jnp.zeros(s[1]),
        }
        for i, s in enumerate(shapes)
    }


def loss(params, x, y):
    for i in range(3):
        layer = params[f"layer{i}"]
        x = x @ layer["kernel"] + layer["bias"]
        x = jax.nn.relu(x) if i < 2 else x
    return optax.softmax_cross_entropy_with_integer_labels(x, y).mean()


OPTIMIZERS = {
    "held mask, projected": lambda: jc.projected(optax.adam(1e-3), jc.every(10**6, jc.prune(0.9))),
    "held mask, project_params": lambda: optax.chain(
        optax.adam(1e-3), jc.project_params(jc.every(10**6, jc.prune(0.9)))
    ),
    "mask refreshed every 100, projected": lambda: jc.projected(
        optax.adam(1e-3), jc.every(100, jc.prune(0.9))
    ),
    "mask by RigL renewed every 100, projected": lambda: jc.projected(
        optax.adam(1e-3), jc.every(100, jc.pruning.rigl(0.9, key=jax.random.key(0)))
    ),
    "mask found in each step, straight-through": lambda: jc.straight_through(
        optax.adam(1e-3), jc.prune(0.9)
    ),
    "int8 straight-through": lambda: jc.straight_through(optax.adam(1e-3), jc.quantize(8)),
    "int4 grouped straight-through": lambda: jc.straight_through(
        optax.adam(1e-3), jc.quantize(4, group_size=32, ranges=jc.quantization.min_max)
    ),
}
# What a step may cost, in steps of plain Adam.
ALLOWED = {
    "held mask, projected": 1.05,
    "held mask, project_params": 1.05,
    "mask refreshed every 100, projected": 1.05,
    "mask by RigL renewed every 100, projected": 1.05,
    "mask found in each step, straight-through": 2.0,
    "int8 straight-through": 1.15,
    "int4 grouped straight-through": 1.15,
}


class Loop:
    """A donated training loop that can be advanced by some steps at a time."""

    def __init__(self, optimizer):
        rng = np.random.default_rng(1)
        x = jnp.asarray(rng.normal(size=(256, 784)), jnp.float32)
        y = jnp.asarray(rng.integers(0, 10, 256))

        def step(params, state):
            grads = jax.grad(loss)(params, x, y)
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        self.carry = (mlp(), optimizer.init(mlp()))
        start = time.perf_counter()
        self.step = jax.jit(step, donate_argnums=(0, 1)).lower(*self.carry).compile()
        self.compile_seconds = time.perf_counter() - start

    def advance(self, steps=10):
        for _ in range(steps):
            self.carry = self.step(*self.carry)
        return self.carry


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_step(benchmark, name):
    ours, plain = Loop(OPTIMIZERS[name]()), Loop(optax.adam(1e-3))
    # A round holds one refresh where there are any, so that its cost is in the mean step.
    steps = 100
    calls = {"ours": lambda: ours.advance(2), "adam": lambda: plain.advance(2)}
    times = paired(calls, rounds=5, turns=steps // 2)
    benchmark.pedantic(lambda: jax.block_until_ready(ours.advance()), rounds=3)
    params = ours.carry[0]
    column = np.asarray(params["layer0"]["kernel"])[:, 0]
    if "mask" in name:
        assert abs(float((params["layer0"]["kernel"] == 0).mean()) - 0.9) < 1e-4
    elif "int8" in name:
        assert len(np.unique(column.round(6))) <= 255
    else:
        assert all(len(np.unique(run.round(6))) <= 15 for run in np.split(column[:768], 24))
    ratio = median_ratio(times, "ours", "adam")
    benchmark.extra_info.update(
        ratio_to_adam=round(ratio, 4),
        ms_per_step=round(1e3 / steps * statistics.median(times["ours"]), 3),
        ms_per_step_adam=round(1e3 / steps * statistics.median(times["adam"]), 3),
        compile_seconds=round(ours.compile_seconds, 3),
        compile_seconds_adam=round(plain.compile_seconds, 3),
    )
    assert ratio <= ALLOWED[name]
