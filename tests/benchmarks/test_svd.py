"""Truncated decompositions of rank 128, beside JAX's exact one and PyTorch's.

Opt-in: `pytest tests/benchmarks/test_svd.py -o addopts="" --confcutdir=tests/benchmarks
--benchmark-json=out.json`. `extra_info` holds medians over interleaved rounds, and for each way
the excess of its error over the best one, relative to that.
"""

import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from tests.benchmarks.conftest import median_ratio, paired, seconds

pytest.importorskip("pytest_benchmark")
torch = pytest.importorskip("torch")

RANK = 128


def matrix(m, n):
    """Singular values that fall as the root of their place, as those of trained layers do."""
    rng = np.random.default_rng(0)
    k = min(m, n)
    values = (1 / np.arange(1, k + 1) ** 0.5).astype(np.float32)
    u, v = (np.linalg.qr(rng.standard_normal((d, k), dtype=np.float32))[0] for d in (m, n))
    return (u * values) @ v.T, float(np.sqrt(np.sum(np.float64(values[RANK:]) ** 2)))


@pytest.mark.parametrize("shape", [(1024, 1024), (4096, 1024), (4096, 4096)])
def test_a_truncated_decomposition(benchmark, shape):
    w, best = matrix(*shape)
    ours, theirs = jnp.asarray(w), torch.from_numpy(w)
    compiled = {
        method: jax.jit(lambda w, method=method: jc.factorization.svd(w, RANK, method=method))
        for method in ("auto", "gram")
    }
    exact = jax.jit(lambda w: jnp.linalg.svd(w, full_matrices=False))
    calls = {
        "auto": lambda: compiled["auto"](ours),
        "torch_lowrank": lambda: torch.svd_lowrank(theirs, RANK)[0].numpy(),
    }
    if max(shape) * min(shape) < 4096**2:
        calls["gram"] = lambda: compiled["gram"](ours)
        calls["exact"] = lambda: exact(ours)
        calls["torch_exact"] = lambda: torch.linalg.svd(theirs, full_matrices=False)[0].numpy()

    def excess(found):
        u = np.asarray(found if isinstance(found, np.ndarray) else found[0])[:, :RANK]
        return float(np.linalg.norm(w - u @ (u.T @ w)) / best - 1)

    errors = {name: excess(calls[name]()) for name in ("auto", "torch_lowrank")}
    times = paired(calls, 5)
    if "exact" not in calls:  # minutes, so once
        times["exact"] = [seconds(lambda: exact(ours))] * 5
    info = {f"{name}_s": statistics.median(t) for name, t in times.items()}
    info |= {f"{name}_excess": e for name, e in errors.items()}
    info["times_faster_than_exact"] = median_ratio(times, "exact", "auto")
    info["times_torch_lowrank"] = median_ratio(times, "auto", "torch_lowrank")
    benchmark.extra_info.update(info)
    print(info)
    benchmark.pedantic(lambda: jax.block_until_ready(calls["auto"]()), rounds=1)
    assert errors["auto"] < 0.01
    assert errors["auto"] < errors["torch_lowrank"] / 5 or info["times_torch_lowrank"] < 1
    assert info["times_torch_lowrank"] < 1.3
    if shape == (4096, 4096):
        assert info["times_faster_than_exact"] > 20


def test_a_stack_of_layers(benchmark):
    """Twelve layers of 768 x 3072 under vmap: Gram matrices beside LAPACK's decomposition."""
    stack = jnp.stack([jnp.asarray(matrix(768, 3072)[0])] * 12)
    gram = jax.jit(jax.vmap(lambda w: jc.factorization.svd(w, RANK, method="gram").u))
    exact = jax.jit(jax.vmap(lambda w: jnp.linalg.svd(w, full_matrices=False)[0]))
    calls = {"gram": lambda: gram(stack), "exact": lambda: exact(stack)}
    times = paired(calls, 3)
    faster = median_ratio(times, "exact", "gram")
    benchmark.extra_info.update(
        {f"{name}_s": statistics.median(t) for name, t in times.items()}, times_faster=faster
    )
    print(benchmark.extra_info)
    benchmark.pedantic(lambda: jax.block_until_ready(calls["gram"]()), rounds=1)
    assert faster > 2
