"""Half-wide networks that `jc.shrink` made, beside the masked ones; and the time to find groups.

Opt-in: `pytest tests/benchmarks/test_shrink.py -o addopts="" --confcutdir=tests/benchmarks
-p no:xdist --benchmark-json=out.json`. `extra_info` has medians over interleaved rounds. Of the
networks it has the ratio of floating-point operations, how many times faster than the masked one
the small one is, the one as a part of the other, which has to be 80%, and the masked one's time as
a part of the dense one's. Of the searches it has the first call; torch-pruning's is that of
`DependencyGraph().build_dependency`, which runs the network.
"""

import itertools
import statistics
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from tests.benchmarks.conftest import median_ratio, paired
from tests.pruning.structured import removal, zoo
from tests.pruning.structured import zoo_parts as parts
from tests.tracing.models import normal

pytest.importorskip("pytest_benchmark")

BATCH = 64


def mlp():
    """Four layers of 2048."""
    sizes = [256, 2048, 2048, 2048, 2048, 10]
    params = [
        parts.dense_params(a, b, seed=i) for i, (a, b) in enumerate(itertools.pairwise(sizes))
    ]
    params = [p | {"kernel": p["kernel"] * len(p["kernel"]) ** -0.5} for p in params]

    def apply(params, x):
        for p in params[:-1]:
            x = jax.nn.relu(parts.dense(p, x))
        return parts.dense(params[-1], x)

    return apply, params, normal(BATCH, sizes[0])


def resnet():
    """A stem and three residual blocks of 128, 256 and 256 channels at 16 x 16 and 8 x 8."""
    blocks, fan_in = [], 128
    for i, width in enumerate((128, 256, 256)):
        block = {
            "conv1": parts.conv_params(fan_in, width, seed=3 * i + 1),
            "norm1": parts.norm_params(width, statistics=True, seed=i),
            "conv2": parts.conv_params(width, width, seed=3 * i + 2),
            "norm2": parts.norm_params(width, statistics=True, seed=i + 5),
        }
        if width != fan_in:
            block["skip"] = parts.conv_params(fan_in, width, size=1, seed=3 * i + 3)
        blocks.append(block)
        fan_in = width
    params = {
        "stem": parts.conv_params(3, 128),
        "blocks": blocks,
        "head": parts.dense_params(256, 10),
    }

    def apply(params, x):
        x = jax.nn.relu(parts.conv(params["stem"], x))
        for p in params["blocks"]:
            strides = 2 if "skip" in p else 1
            y = jax.nn.relu(parts.batch_norm(p["norm1"], parts.conv(p["conv1"], x, strides)))
            y = parts.batch_norm(p["norm2"], parts.conv(p["conv2"], y))
            x = jax.nn.relu(y + (parts.conv(p["skip"], x, strides) if "skip" in p else x))
        return parts.dense(params["head"], x.mean((1, 2)))

    return apply, params, normal(BATCH, 16, 16, 3)


def transformer():
    """Two layers of width 768, 12 heads and 3072 neurons, on 16 tokens."""
    width, heads, inner = 768, 12, 3072

    def layer(seed):
        kernels = {"q": (width, width), "k": (width, width), "v": (width, width)}
        kernels |= {"o": (width, width), "up": (width, inner), "down": (inner, width)}
        made = {
            name: normal(*shape, seed=seed + i, scale=shape[0] ** -0.5)
            for i, (name, shape) in enumerate(kernels.items())
        }
        return made | {name: parts.norm_params(width, seed=seed) for name in ("norm1", "norm2")}

    params = {"layers": [layer(0), layer(10)], "head": normal(width, 10, scale=width**-0.5)}
    params["stem"] = normal(128, width, scale=128**-0.5)

    def apply(params, x):
        x = x @ params["stem"]
        b, t, _ = x.shape
        for p in params["layers"]:
            y = parts.layer_norm(p["norm1"], x)
            q, k, v = ((y @ p[name]).reshape(b, t, heads, -1) for name in "qkv")
            scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / (width // heads) ** 0.5
            mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
            x = x + mixed.reshape(b, t, -1) @ p["o"]
            x = x + jax.nn.gelu(parts.layer_norm(p["norm2"], x) @ p["up"]) @ p["down"]
        return x.mean(1) @ params["head"]

    return apply, params, normal(BATCH, 16, 128)


@pytest.mark.parametrize("network", [mlp, resnet, transformer])
def test_half_wide_at_batch_64(benchmark, network):
    fn, params, x = network()
    groups = jc.dependencies(fn, params, x)
    keep = jc.select(groups, params, keep=0.5)
    small, small_fn = jc.shrink(fn, params, keep, x)
    masked = removal.masked(params, keep)
    dense = jax.jit(fn).lower(params, x).compile()
    shrunk = jax.jit(small_fn).lower(small, x).compile()
    want = np.asarray(dense(masked, x))
    np.testing.assert_allclose(shrunk(small, x), want, atol=1e-4 * np.abs(want).max())

    fewer = jc.cost(fn, params, x).flops / jc.cost(small_fn, small, x).flops
    calls = {
        "small": lambda: shrunk(small, x),
        "masked": lambda: dense(masked, x),
        "dense": lambda: dense(params, x),
    }
    times = paired(calls, 21)
    faster = median_ratio(times, "masked", "small")
    info = {f"{name}_ms": 1e3 * statistics.median(t) for name, t in times.items()}
    info |= {
        "parameters": jc.tree.size(params),
        "parameters_left": jc.tree.size(small),
        "fewer_flops": float(fewer),
        "times_faster": faster,
        "part": faster / float(fewer),
        "masked_times_dense": median_ratio(times, "masked", "dense"),
    }
    benchmark.extra_info.update(info)
    print(info)
    benchmark.pedantic(lambda: jax.block_until_ready(calls["small"]()), rounds=5)
    assert fewer > 3.5
    assert faster >= 0.8 * fewer
    assert info["masked_times_dense"] > 0.9


def test_groups_of_a_decoder_of_8_billion_parameters(benchmark):
    """A Llama's shapes, none of its weights: traced, and all couplings found."""
    model = zoo.decoder_8b()
    start = time.perf_counter()
    found = jc.dependencies(model.apply, model.params, *model.args)
    spent = time.perf_counter() - start
    shapes = zoo.shapes_of(model.params)
    want = {zoo.expected_group(line, shapes) for line in model.groups}
    assert {
        (g.inexact is None, g.layers, g.size, frozenset((m.path, m.axis) for m in g.members))
        for g in found.groups
    } == want
    info = {
        "parameters": sum(s.size for s in jax.tree.leaves(model.params)),
        "groups": len(found.groups),
        "units": sum(g.size for g in found.groups),
        "seconds": spent,
    }
    benchmark.extra_info.update(info)
    print(info)
    benchmark.pedantic(lambda: jc.dependencies(model.apply, model.params, *model.args), rounds=1)
    assert info["parameters"] > 8e9
    assert spent < 30


def test_groups_of_resnet_18(benchmark):
    """Beside torch-pruning's graph of the same network; ours needs no weights and runs nothing."""
    torch = pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tp = pytest.importorskip("torch_pruning")
    from tests.pruning.structured.torch_pairs import PAIRS

    pair = PAIRS["resnet18"]
    shape = (1, 224, 224, 3)
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    variables = jax.eval_shape(pair.flax.init, jax.random.key(0), x)
    module, image = pair.torch().eval(), torch.zeros(1, 3, 224, 224)

    def theirs():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return tp.DependencyGraph().build_dependency(module, example_inputs=image)

    def counted(graph):
        return {len(group[0].idxs) for group in graph.get_all_groups()}

    def ours():
        return jc.dependencies(pair.flax.apply, variables, x)

    assert {group.size for group in ours().groups} == counted(theirs()) - {1000}
    times = {"jaxcompress": [], "torch_pruning": []}
    for _ in range(5):
        for name, find in zip(times, (ours, theirs), strict=True):
            start = time.perf_counter()
            find()
            times[name].append(time.perf_counter() - start)
    info = {f"{name}_s": statistics.median(t) for name, t in times.items()}
    info["times_torch_pruning"] = median_ratio(times, "jaxcompress", "torch_pruning")
    benchmark.extra_info.update(info)
    print(info)
    benchmark.pedantic(ours, rounds=1)
    assert info["times_torch_pruning"] < 5
