"""Masks beside NumPy's partition and PyTorch's pruning, each in turn in every round.

pytest tests/benchmarks -o addopts="" --confcutdir=tests/benchmarks --benchmark-json=out.json
"""

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from tests.benchmarks.conftest import median_ratio, paired

# Twelve leaves, 25.2M weights: three blocks of a transformer of width 836.
BLOCKS = [(836, 2508), (836, 836), (836, 3344), (3344, 836)] * 3
CASES = {
    "16.8M in one leaf": ([(4096, 4096)], jc.prune(0.9)),
    "25M in 12 leaves, global": (BLOCKS, jc.prune(0.9, scope="global")),
}


def normal(shapes):
    rng = np.random.default_rng(0)
    return {f"{i:02}": rng.standard_normal(s).astype(np.float32) for i, s in enumerate(shapes)}


def compiled(f, *args):
    start = time.perf_counter()
    return jax.jit(f).lower(*args).compile(), time.perf_counter() - start


def record(benchmark, calls, compile_seconds, rounds):
    times = paired(calls, rounds)
    benchmark.pedantic(lambda: jax.block_until_ready(calls["ours"]()), rounds=3)
    benchmark.extra_info.update(
        {f"ms_{name}": round(1e3 * statistics.median(t), 2) for name, t in times.items()},
        compile_seconds=round(compile_seconds, 3),
    )
    others = [name for name in calls if name != "ours"]
    ratios = {name: median_ratio(times, "ours", name) for name in others}
    benchmark.extra_info.update({f"ratio_to_{k}": round(v, 3) for k, v in ratios.items()})
    return times


@pytest.mark.parametrize("case", CASES)
def test_mask(benchmark, case):
    shapes, projection = CASES[case]
    host = normal(shapes)
    params = jax.tree.map(jnp.asarray, host)
    size = sum(w.size for w in host.values())
    find, compile_seconds = compiled(projection.find, params)

    def partition():
        flat = np.concatenate([np.abs(w).ravel() for w in host.values()])
        threshold = np.partition(flat, size - size // 10)[size - size // 10]
        return [np.abs(w) >= threshold for w in host.values()]

    calls = {"ours": lambda: find(params), "partition": partition, **torchs(host)}
    for name, call in calls.items():
        found = [m.keep for m in call().values()] if name == "ours" else call()
        for keep, wanted in zip(found, partition(), strict=True):
            # The sizes do not divide by ten: the last one is rounded up or down.
            assert ((np.asarray(keep) != 0) != wanted).sum() <= 1
    times = record(benchmark, calls, compile_seconds, rounds=7)
    assert median_ratio(times, "ours", "partition") <= 3


def torchs(host):
    """What PyTorch's pruning does for the same masks, where PyTorch is installed."""
    try:
        import torch
        from torch.nn.utils import prune
    except ImportError:
        return {}

    tensors = [torch.tensor(w) for w in host.values()]

    def masks():
        flat = torch.cat([w.ravel() for w in tensors])
        mask = prune.L1Unstructured(0.9).compute_mask(flat, torch.ones_like(flat))
        parts = mask.split([w.numel() for w in tensors])
        return [part.reshape(w.shape) for part, w in zip(parts, tensors, strict=True)]

    return {"torch": masks}


def test_two_of_four(benchmark):
    (host,) = normal([(4096, 4096)]).values()
    params = {"w": jnp.asarray(host)}
    find, compile_seconds = compiled(jc.prune(nm=(2, 4)).find, params)
    groups = np.abs(host).reshape(1024, 4, 4096)

    def partition():
        keep = np.zeros(groups.shape, bool)
        np.put_along_axis(keep, np.argpartition(groups, 2, axis=1)[:, 2:], True, axis=1)
        return keep.reshape(host.shape)

    calls = {"ours": lambda: find(params), "argpartition": partition}
    try:
        import torch
    except ImportError:
        pass
    else:
        tensor = torch.tensor(host)

        def top_k():
            grouped = tensor.abs().reshape(1024, 4, 4096)
            keep = torch.zeros(grouped.shape, dtype=torch.bool)
            return keep.scatter_(1, grouped.topk(2, dim=1).indices, True).reshape(tensor.shape)

        calls["torch"] = top_k
        np.testing.assert_array_equal(top_k().numpy(), partition())
    np.testing.assert_array_equal(find(params)["w"].keep, partition())
    times = record(benchmark, calls, compile_seconds, rounds=5)
    assert statistics.median(times["ours"]) <= 0.010
