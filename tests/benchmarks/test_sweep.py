"""A sweep of 7 bit-widths x 8 clip factors on an MLP, compile included, beside qwix.

Opt-in: `pytest tests/benchmarks/test_sweep.py -o addopts="" --confcutdir=tests/benchmarks
-p no:xdist --benchmark-json=out.json`. qwix takes its settings as static strings, so that each of
the 56 is a program of its own. The benchmark's own statistics are those of the sweep with
`map` once it is compiled; `extra_info` holds seconds in total from a cold start.
"""

import functools
import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc

pytest.importorskip("pytest_benchmark")
qwix = pytest.importorskip("qwix")

GRID = {
    "bits": np.arange(2, 9),
    "clip": np.linspace(0.3, 1.0, 8, dtype=np.float32),
}
SIZES = (64, 256, 256, 10)


def forward(params, x):
    for w in params[:-1]:
        x = jax.nn.relu(x @ w)
    return x @ params[-1]


def loss(params, x, y):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(forward(params, x), y))


def ours(params, x, y, *, bits, clip):
    p = jc.quantize(bits, clip=clip, ranges=jc.quantization.absmax, convention=jc.quantization.QWIX)
    return loss(jc.compress(p, params), x, y)


@functools.partial(jax.jit, static_argnames=("bits", "clip"))
def theirs(params, x, y, *, bits, clip):
    kind = {4: jnp.int4, 8: jnp.int8}.get(bits, f"int{bits}")
    rule = {"channelwise_axes": (1,), "calibration_method": f"absmax,{clip}"}
    return loss([qwix.dequantize(qwix.quantize(w, kind, **rule)) for w in params], x, y)


def cold(call):
    jax.clear_caches()
    start = time.perf_counter()
    out = np.asarray(jax.block_until_ready(call()))
    return out, time.perf_counter() - start


def test_sweep(benchmark):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    params = [draw(a, b) / a**0.5 for a, b in itertools.pairwise(SIZES)]
    x = draw(512, SIZES[0])
    y = jnp.argmax(forward(params, x), axis=-1)

    def each():
        settings = itertools.product(*(v.tolist() for v in GRID.values()))
        losses = [theirs(params, x, y, bits=bits, clip=clip) for bits, clip in settings]
        return jnp.stack(losses).reshape(7, 8)

    want, seconds = cold(each)
    spent = {"qwix": seconds}
    for mode in ("vmap", "map"):
        got, spent[mode] = cold(lambda mode=mode: jc.sweep(ours, GRID, params, x, y, mode=mode))
        # The last bit of a step decides at ties where a weight goes.
        np.testing.assert_allclose(got, want, rtol=2e-2)
        assert np.median(np.abs(got / want - 1)) < 1e-4
    benchmark.extra_info.update(
        {f"{name}_seconds": value for name, value in spent.items()},
        **{f"{mode}_times_faster": spent["qwix"] / spent[mode] for mode in ("vmap", "map")},
    )
    benchmark.pedantic(
        lambda: jax.block_until_ready(jc.sweep(ours, GRID, params, x, y, mode="map")), rounds=5
    )
    assert spent["qwix"] / min(spent["vmap"], spent["map"]) >= 10
