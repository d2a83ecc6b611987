"""Distillation: the memory and time of chunked losses, and a training step by hand beside ours.

Opt-in: `pytest tests/benchmarks/test_distillation.py -o addopts="" --confcutdir=tests/benchmarks
--benchmark-json=out.json`. `extra_info` holds medians over interleaved rounds; memory is what the
compiled value and gradient need besides arguments and results, by XLA's own account.
"""

import itertools
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
from tests.benchmarks.conftest import median_ratio, paired

pytest.importorskip("pytest_benchmark")

TEMPERATURE = 2.0
FEATURES = 64


def by_hand(student_logits, teacher_logits, temperature):
    """KD as one writes it: two softmaxes, one product, a sum."""
    p = jax.nn.softmax(teacher_logits / temperature)
    logs = jax.nn.log_softmax(teacher_logits / temperature)
    logs -= jax.nn.log_softmax(student_logits / temperature)
    return temperature**2 * jnp.sum(p * logs, -1)


def chunked(h, w, g, u):
    return jnp.mean(jc.distillation.chunked_kd_loss(h, w, g, u, TEMPERATURE))


def whole(loss):
    return lambda h, w, g, u: jnp.mean(loss(h @ w, g @ u, TEMPERATURE))


LOSSES = {"chunked": chunked, "kd_loss": whole(jc.kd_loss), "by_hand": whole(by_hand)}


def arguments(tokens, classes):
    return (tokens, FEATURES), (FEATURES, classes), (tokens, FEATURES), (FEATURES, classes)


def lowered(loss, tokens, classes):
    """The student's value and gradients, for hidden states and head."""
    shapes = [jax.ShapeDtypeStruct(x, jnp.float32) for x in arguments(tokens, classes)]
    return jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*shapes).compile()


def test_memory_of_8192_tokens_and_32768_classes(benchmark):
    """Only compiled, not run: the plain ways need gigabytes."""
    need = {
        name: lowered(loss, 8192, 32768).memory_analysis().temp_size_in_bytes
        for name, loss in LOSSES.items()
    }
    info = {f"{name}_bytes": size for name, size in need.items()}
    info["times_less_than_by_hand"] = need["by_hand"] / need["chunked"]
    info["times_less_than_kd_loss"] = need["kd_loss"] / need["chunked"]
    benchmark.extra_info.update(info)
    print(info)
    benchmark.pedantic(lambda: lowered(chunked, 8192, 32768), rounds=1)
    assert need["chunked"] <= need["by_hand"] / 4
    assert need["chunked"] <= need["kd_loss"] / 4


def test_time_of_1024_tokens_and_16384_classes(benchmark):
    rng = np.random.default_rng(0)
    scales = [1.0, FEATURES**-0.5] * 2
    arrays = [
        jnp.float32(scale * rng.normal(size=shape))
        for scale, shape in zip(scales, arguments(1024, 16384), strict=True)
    ]
    compiled = {name: lowered(loss, 1024, 16384) for name, loss in LOSSES.items()}
    calls = {name: lambda f=f: f(*arrays) for name, f in compiled.items()}
    answers = {name: call() for name, call in calls.items()}
    for name in ("kd_loss", "by_hand"):
        for a, b in zip(
            jax.tree.leaves(answers["chunked"]), jax.tree.leaves(answers[name]), strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * float(jnp.max(jnp.abs(b))))
    times = paired(calls, 7)
    info = {f"{name}_s": statistics.median(t) for name, t in times.items()}
    info["times_by_hand"] = median_ratio(times, "chunked", "by_hand")
    info["times_kd_loss"] = median_ratio(times, "chunked", "kd_loss")
    benchmark.extra_info.update(info)
    print(info)
    benchmark.pedantic(lambda: jax.block_until_ready(calls["chunked"]()), rounds=1)
    assert info["times_by_hand"] < 1.5


def test_a_training_step(benchmark):
    """A small multilayer perceptron, 512 digits a batch: `kd_loss` for the loss by hand."""
    rng = np.random.default_rng(0)
    sizes = (64, 512, 512, 10)
    params = [
        jnp.float32(rng.normal(size=(m, n)) / np.sqrt(m)) for m, n in itertools.pairwise(sizes)
    ]
    x, targets = jnp.float32(rng.normal(size=(512, 64))), jnp.float32(rng.normal(size=(512, 10)))
    opt = optax.adam(1e-3)

    def apply(params, x):
        for w in params[:-1]:
            x = jax.nn.relu(x @ w)
        return x @ params[-1]

    def step_with(loss):
        @jax.jit
        def step(params, state, x, targets):
            mean = lambda params: jnp.mean(loss(apply(params, x), targets, TEMPERATURE))  # noqa: E731
            value, grads = jax.value_and_grad(mean)(params)
            updates, state = opt.update(grads, state, params)
            return optax.apply_updates(params, updates), state, value

        return step

    steps = {"kd_loss": step_with(jc.kd_loss), "by_hand": step_with(by_hand)}
    state = opt.init(params)
    calls = {name: lambda f=f: f(params, state, x, targets) for name, f in steps.items()}
    answers = {name: call() for name, call in calls.items()}
    np.testing.assert_allclose(answers["kd_loss"][2], answers["by_hand"][2], rtol=1e-4)
    for a, b in zip(answers["kd_loss"][1][0].mu, answers["by_hand"][1][0].mu, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-4 * float(jnp.max(jnp.abs(b))))
    times = paired(calls, 15, turns=10)
    info = {f"{name}_s": statistics.median(t) / 10 for name, t in times.items()}
    info["times_by_hand"] = median_ratio(times, "kd_loss", "by_hand")
    benchmark.extra_info.update(info)
    print(info)
    benchmark.pedantic(lambda: jax.block_until_ready(calls["kd_loss"]()), rounds=1)
    assert info["times_by_hand"] < 1.25
