"""One layer of 2048x2048 on compressed weights beside the same layer in float32.

Opt-in: `pytest tests/benchmarks -o addopts="" --confcutdir=tests/benchmarks -p no:xdist
--benchmark-json=out.json`. The benchmark's own statistics are those of the compressed layer;
`extra_info` holds the medians over interleaved rounds and how many times faster it is.
"""

import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from tests.benchmarks.conftest import median_ratio, paired

pytest.importorskip("pytest_benchmark")

SIZE = 2048


def linear(params, x):
    return x @ params["w"]


INT8, INT4 = jc.quantize(8), jc.quantize(4, group_size=64)
# The kind, how activations are multiplied, the batch, and how many times faster it has to be.
CASES = {
    "int8-integer-256": (INT8, "dynamic", 256, 1.5),
    "rank128-256": (jc.low_rank(128), "float", 256, 5.0),
    "rank128-1": (jc.low_rank(128), "float", 1, None),
    "int8-weight-only-256": (INT8, "float", 256, None),
    "int8-weight-only-1": (INT8, "float", 1, None),
    "int4-weight-only-1": (INT4, "float", 1, None),
}


@pytest.mark.parametrize("case", CASES)
def test_linear_layer(benchmark, case):
    projection, activations, batch, at_least = CASES[case]
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(SIZE, SIZE)) / SIZE**0.5, jnp.float32)}
    x = jnp.asarray(rng.normal(size=(batch, SIZE)), jnp.float32)
    small = jc.pack(projection, params)
    lifted = jax.jit(jc.lift(linear, activations=activations)).lower(small, x).compile()
    dense = jax.jit(linear).lower(params, x).compile()

    # The answer: the dense one on the same leaves; int8 activations round to 1/254 of the
    # largest of 2048 normal entries, an error of about 1.2% of the result.
    want = np.asarray(dense(jc.todense(small), x), np.float64)
    error = np.sqrt(np.mean(np.square(np.asarray(lifted(small, x)) - want)) / np.mean(want**2))
    assert error < (2e-2 if activations == "dynamic" else 1e-5)

    calls = {"lifted": lambda: lifted(small, x), "float32": lambda: dense(params, x)}
    times = paired(calls, 61)
    faster = median_ratio(times, "float32", "lifted")
    benchmark.extra_info.update(
        {f"{name}_ms": 1e3 * statistics.median(t) for name, t in times.items()},
        times_faster=faster,
        relative_error=float(error),
    )
    benchmark.pedantic(lambda: jax.block_until_ready(lifted(small, x)), rounds=5)
    if at_least is not None:
        assert faster >= at_least
