"""Masks of whole models: a global threshold against NumPy's partition, and 2:4.

pytest tests/benchmarks -o addopts="" --confcutdir=tests/benchmarks --benchmark-json=out.json
"""

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

import jaxcompress as jc
from tests.benchmarks.conftest import median_ratio, paired

# Twelve leaves, 25.2M weights: three blocks of a transformer of width 836.
SHAPES = [(836, 2508), (836, 836), (836, 3344), (3344, 836)] * 3


def compiled(f, *args):
    start = time.perf_counter()
    return jax.jit(f).lower(*args).compile(), time.perf_counter() - start


def test_global_mask(benchmark):
    rng = np.random.default_rng(0)
    host = {str(i): rng.standard_normal(s).astype(np.float32) for i, s in enumerate(SHAPES)}
    params = jax.tree.map(jnp.asarray, host)
    size = sum(w.size for w in host.values())
    p = jc.prune(0.9, scope="global")
    find, compile_seconds = compiled(p.find, params)

    def partition():
        flat = np.concatenate([np.abs(w).ravel() for w in host.values()])
        threshold = np.partition(flat, size - size // 10)[size - size // 10]
        return [np.abs(w) >= threshold for w in host.values()]

    for path, keep in zip(host, partition(), strict=True):
        np.testing.assert_array_equal(find(params)[path].keep, keep)
    times = paired({"ours": lambda: find(params), "partition": partition}, rounds=7)
    benchmark.pedantic(lambda: jax.block_until_ready(find(params)), rounds=3)
    benchmark.extra_info.update(
        weights=size,
        ratio_to_partition=round(median_ratio(times, "ours", "partition"), 3),
        ms=round(1e3 * statistics.median(times["ours"]), 2),
        ms_partition=round(1e3 * statistics.median(times["partition"]), 2),
        compile_seconds=round(compile_seconds, 3),
    )


def test_two_of_four(benchmark):
    host = np.random.default_rng(0).standard_normal((4096, 4096)).astype(np.float32)
    params = {"w": jnp.asarray(host)}
    p = jc.prune(nm=(2, 4))
    find, compile_seconds = compiled(p.find, params)

    def partition():
        groups = np.abs(host).reshape(1024, 4, 4096)
        keep = np.zeros(groups.shape, bool)
        np.put_along_axis(keep, np.argpartition(groups, 2, axis=1)[:, 2:], True, axis=1)
        return keep.reshape(host.shape)

    np.testing.assert_array_equal(find(params)["w"].keep, partition())
    times = paired({"ours": lambda: find(params), "partition": partition}, rounds=5)
    benchmark.pedantic(lambda: jax.block_until_ready(find(params)), rounds=5)
    benchmark.extra_info.update(
        ms=round(1e3 * statistics.median(times["ours"]), 2),
        times_faster_than_argpartition=round(median_ratio(times, "partition", "ours"), 1),
        compile_seconds=round(compile_seconds, 3),
    )
