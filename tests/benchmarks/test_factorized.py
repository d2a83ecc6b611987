"""Whole factorized models under `jc.lift` beside the dense ones: a part of the saved operations.

Opt-in: `pytest tests/benchmarks -o addopts="" --confcutdir=tests/benchmarks -p no:xdist
--benchmark-json=out.json`. `extra_info` has the ratio of floating-point operations, how many times
faster the factorized model is (the median over interleaved rounds), and the one as a part of the
other, which has to be 70%.
"""

import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from tests.benchmarks.conftest import median_ratio, paired

pytest.importorskip("pytest_benchmark")

WIDE = 1024


def mlp(params, x):
    for w in params["hidden"]:
        x = jax.nn.relu(x @ w)
    return x @ params["out"]


def convnet(params, x):
    for i, w in enumerate(params["hidden"]):
        x = jax.nn.relu(
            jax.lax.conv_general_dilated(
                x, w, (2, 2) if i == 2 else (1, 1), "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
        )  # fmt: skip
    return x.mean((1, 2)) @ params["out"]


def draw(rng, *shape):
    return jnp.asarray(rng.normal(size=shape) * np.sqrt(2 / np.prod(shape[:-1])), jnp.float32)


def case(name):
    rng = np.random.default_rng(0)
    if name.startswith("mlp"):
        params = {
            "hidden": [draw(rng, WIDE, WIDE) for _ in range(4)],
            "out": draw(rng, WIDE, 10),
        }
        ranks = jc.factorization.budgeted_ranks(params, 0.25, where="hidden/*", align=16).ranks
        p = jc.masked(jc.low_rank(ranks), "hidden/*")
        return mlp, params, p, draw(rng, 256, WIDE)
    params = {
        "hidden": [draw(rng, 3, 3, 128, 128) for _ in range(4)],
        "out": draw(rng, 128, 10),
    }
    x = draw(rng, 8, 32, 32, 128)
    if name == "convnet-channels":
        return convnet, params, jc.masked(jc.low_rank(32), "hidden/*"), x
    p = jc.factorization.convolution((48, 48), scheme="tucker")
    return convnet, params, jc.masked(p, "hidden/*"), x


@pytest.mark.parametrize("name", ["mlp", "convnet-channels", "convnet-tucker"])
def test_factorized_model(benchmark, name):
    fn, params, p, x = case(name)
    small = jc.pack(p, params)
    lifted = jax.jit(jc.lift(fn)).lower(small, x).compile()
    dense = jax.jit(fn).lower(params, x).compile()
    want = np.asarray(dense(jc.todense(small), x))
    np.testing.assert_allclose(lifted(small, x), want, atol=1e-4 * np.abs(want).max())

    fewer = jc.cost(fn, params, x).flops / jc.cost(jc.lift(fn), small, x).flops
    times = paired({"lifted": lambda: lifted(small, x), "float32": lambda: dense(params, x)}, 31)
    faster = median_ratio(times, "float32", "lifted")
    benchmark.extra_info.update(
        {f"{label}_ms": 1e3 * statistics.median(t) for label, t in times.items()},
        fewer_flops=float(fewer),
        times_faster=faster,
        part=faster / float(fewer),
    )
    benchmark.pedantic(lambda: jax.block_until_ready(lifted(small, x)), rounds=5)
    assert faster >= 0.7 * fewer
