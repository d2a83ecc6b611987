"""Exact selection against NumPy's partition and XLA's sort, each in turn in every round.

Opt-in: `pytest tests/benchmarks/test_selection.py --benchmark-enable --benchmark-json=out.json
-n 0 -o addopts=`. The benchmark's own statistics are those of `largest`; `extra_info` holds the
medians of all three over interleaved rounds, their ratios, compile seconds and peak bytes.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress.pruning._select import largest

pytest.importorskip("pytest_benchmark")


def seconds(f):
    start = time.perf_counter()
    jax.block_until_ready(f())
    return time.perf_counter() - start


# The bounds are what the routine promises: times of `partition`, parts of `sort`.
@pytest.mark.parametrize(
    ("shape", "kind", "rounds", "partitions", "sorts"),
    [
        ((4096, 4096), "normal", 5, 3.0, 40.0),
        ((4096, 4096), "ties", 3, 6.0, 20.0),
        ((64, 64), "normal", 51, None, 1.0),
    ],
    ids=["16.8M", "16.8M-ties", "4096"],
)
def test_largest(benchmark, shape, kind, rounds, partitions, sorts):
    host = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    if kind == "ties":
        host = np.round(host, 2)
    x, n = jnp.asarray(host), host.size
    k = jnp.uint32(n // 10)

    start = time.perf_counter()
    ours = jax.jit(lambda x, k: largest(jnp.abs(x), k)).lower(x, k).compile()
    compile_seconds = time.perf_counter() - start
    sort = jax.jit(lambda x: jnp.sort(jnp.abs(x).reshape(-1))).lower(x).compile()

    def partition():
        return np.partition(np.abs(host).ravel(), n - n // 10)

    # The answer: exactly k entries, all above the threshold and the first of the tied ones.
    mask, threshold = np.asarray(ours(x, k)), partition()[n - n // 10]
    above, tied = np.abs(host) > threshold, np.abs(host) == threshold
    first = tied & (np.cumsum(tied).reshape(shape) <= n // 10 - above.sum())
    np.testing.assert_array_equal(mask, above | first)
    assert float(sort(x)[n - n // 10]) == threshold

    times = np.array(
        [[seconds(lambda: ours(x, k)), seconds(partition), seconds(lambda: sort(x))]]
        + [
            [seconds(lambda: ours(x, k)), seconds(partition), seconds(lambda: sort(x))]
            for _ in range(rounds)
        ]
    )[1:]
    medians = np.median(times, axis=0)
    memory = ours.memory_analysis()
    benchmark.extra_info.update(
        {
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "compile_seconds": compile_seconds,
            "temporary_bytes": None if memory is None else memory.temp_size_in_bytes,
            "median_seconds": dict(zip(["largest", "partition", "sort"], medians, strict=True)),
            "spread_seconds": dict(
                zip(["largest", "partition", "sort"], np.ptp(times, axis=0), strict=True)
            ),
            "ratio_to_partition": medians[0] / medians[1],
            "sort_over_largest": medians[2] / medians[0],
        }
    )
    benchmark.pedantic(lambda: jax.block_until_ready(ours(x, k)), rounds=rounds, warmup_rounds=1)
    assert medians[2] / medians[0] >= sorts
    if partitions is not None:
        assert medians[0] / medians[1] <= partitions
