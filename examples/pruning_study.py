"""Compare ways to prune on handwritten digits: 5 seeds x 4 sparsities, one `vmap` for each.

    pip install -e ".[examples]" && python examples/pruning_study.py

Every way trains the same small network for the same number of steps and ends at the same
sparsity. Takes about three minutes on two CPU cores.
"""

import itertools
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import digits
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcompress as jc

SPARSITIES = (0.8, 0.9, 0.95, 0.98)
SIZES = (64, 64, 32, 10)
BATCH = 64


class Setting(NamedTuple):
    """What a method may use to make its optimizer."""

    sparsity: jax.Array
    steps: int
    key: jax.Array
    params: Any
    batches: list[Any]


Method = Callable[[Setting], optax.GradientTransformation]


def loss(params: dict[str, Any], x: jax.Array, y: jax.Array) -> jax.Array:
    """Mean cross-entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(digits.logits(params, x), y).mean()


def adam(setting: Setting) -> optax.GradientTransformation:
    """The optimizer of all methods, with one learning rate for all."""
    return optax.adam(optax.cosine_decay_schedule(5e-3, setting.steps))


def held(score: Callable[[Setting], Any], scope: str = "leaf") -> Method:
    """A mask found before training."""

    def method(s):
        p = jc.prune(s.sparsity, score=score(s), scope=scope)
        return jc.projected(adam(s), jc.every(1, p, begin=0, end=0))

    return method


def gradual(**options: Any) -> Method:
    """Along the cubic ramp, from a tenth to seven tenths of training."""

    def method(s):
        begin, end = s.steps // 10, 7 * s.steps // 10
        ramp = jc.schedules.cubic(0.0, s.sparsity, begin, end)
        return jc.projected(
            adam(s), jc.every(period(s), jc.prune(ramp, **options), begin=begin, end=end)
        )

    return method


def exchanged(make: Callable[..., jc.Projection], ramp: bool = False) -> Method:
    """Sparse from start to end; weights are dropped and grown up to three quarters."""

    def method(s):
        end = 3 * s.steps // 4 // period(s) * period(s)
        drop = jc.schedules.cosine(0.3, 0.0, 0, end)
        half = 0.5 * s.sparsity
        sparsity = jc.schedules.cubic(half, s.sparsity, 0, end) if ramp else s.sparsity
        p = make(sparsity, drop, key=s.key)
        return jc.projected(adam(s), jc.every(period(s), p, end=end))

    return method


def period(setting: Setting) -> int:
    """Updates between two masks."""
    return max(1, setting.steps // 40)


def one_shot(s: Setting) -> optax.GradientTransformation:
    """Dense for half of training, then pruned at once and fine-tuned."""
    half = s.steps // 2
    return jc.projected(adam(s), jc.every(1, jc.prune(s.sparsity), begin=half, end=half))


def ac_dc(s: Setting) -> optax.GradientTransformation:
    """Phases of a twentieth of training each; sparse for the last quarter."""
    phase = max(1, s.steps // 20)
    p = jc.alternated(jc.prune(s.sparsity), phase, phase, begin=phase, end=3 * s.steps // 4)
    return jc.projected(adam(s), p)


def powers(s: Setting) -> optax.GradientTransformation:
    """Powerpropagation with gradual pruning of the latents."""
    begin, end = s.steps // 10, 7 * s.steps // 10
    ramp = jc.schedules.cubic(0.0, s.sparsity, begin, end)
    pruned = jc.project_params(jc.every(period(s), jc.prune(ramp), begin=begin, end=end))
    inner = optax.chain(optax.sgd(optax.cosine_decay_schedule(0.1, s.steps), 0.9), pruned)
    return jc.reparametrized(inner, jc.pruning.powerpropagation(2.0))


def flow(s: Setting) -> Any:
    """Scores of SynFlow."""
    return jc.pruning.synflow(
        digits.logits, s.params, jnp.ones((1, 64)), sparsity=s.sparsity, steps=50
    )


METHODS: dict[str, Method] = {
    "random, held": held(lambda s: jc.pruning.random(s.key)),
    "SNIP": held(lambda s: jc.pruning.snip(loss, s.params, s.batches), "global"),
    "GraSP": held(lambda s: jc.pruning.grasp(loss, s.params, s.batches), "global"),
    "SynFlow": held(flow, "global"),
    "magnitude, at once": one_shot,
    "magnitude, gradual": gradual(),
    "gradual, global": gradual(scope="global"),
    "gradual, LAMP": gradual(score=jc.pruning.lamp, scope="global"),
    "gradual, ERK": gradual(budget=jc.pruning.erdos_renyi()),
    "movement, gradual": gradual(score=jc.pruning.movement()),
    "SET": exchanged(jc.pruning.sparse_evolution),
    "RigL": exchanged(jc.pruning.rigl),
    "GraNet": exchanged(jc.pruning.rigl, ramp=True),
    "Top-KAST": lambda s: jc.pruning.top_kast(adam(s), s.sparsity, 0.5 * s.sparsity),
    "straight-through": lambda s: jc.straight_through(adam(s), jc.prune(s.sparsity)),
    "SR-STE": lambda s: jc.straight_through(adam(s), jc.prune(s.sparsity), 2e-4),
    "AC/DC": ac_dc,
    "powerpropagation": powers,
}


def study(method: Method, data: Any, steps: int, seeds: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Test accuracy and weights that live, `[sparsity, seed]`: a single program."""
    x, y, x_test, y_test = data

    def run(sparsity, seed):
        start, order, own = jax.random.split(jax.random.key(seed), 3)
        params = digits.initial(start, SIZES)
        opt = method(Setting(sparsity, steps, own, params, [(x[:256], y[:256])]))
        params, _ = digits.trained(opt, loss, params, x, y, order, steps, BATCH)
        alive = sum(jnp.sum(layer["kernel"] != 0) for layer in params.values())
        return jnp.mean(digits.logits(params, x_test).argmax(-1) == y_test), alive

    over = jax.vmap(jax.vmap(run, (None, 0)), (0, None))
    accuracy, alive = jax.jit(over)(jnp.asarray(SPARSITIES), jnp.asarray(seeds))
    return np.asarray(accuracy), np.asarray(alive)


def main() -> None:
    """Runs all methods, prints the table, writes the picture and the record."""
    parser = digits.parser(__doc__, list(METHODS))
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("pruning_study_results"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    start, data = time.perf_counter(), digits.load()
    console = digits.console()
    size = sum(m * n for m, n in itertools.pairwise(SIZES))

    found, seconds = {}, {}
    for name in digits.in_turn(options.only, console, seconds):
        accuracy, alive = study(METHODS[name], data, options.steps, options.seeds)
        wanted = [[round((1 - s) * size)] for s in SPARSITIES]
        # A leaf with a share of its own rounds on its own; a weight that has come back and
        # whose pixel is always black is still zero.
        if (alive - wanted).max() >= len(SIZES):
            raise RuntimeError(f"{name}: {alive.tolist()} weights live, not {wanted}")
        found[name] = accuracy

    columns = [f"{sparsity:.0%} sparse" for sparsity in SPARSITIES]
    console.print(digits.table(found, "method", columns))
    sparsities = [100 * s for s in SPARSITIES]
    path = options.out / "accuracy_against_sparsity.png"
    digits.picture(found, sparsities, "sparsity, %", path)
    record = digits.record(
        start, options.steps, options.seeds, found, seconds, sparsities=SPARSITIES
    )
    (options.out / "results.json").write_text(json.dumps(record, indent=2) + "\n")
    console.print(
        f"{record['seconds']} s. The picture and results.json are in {options.out.resolve()}"
    )


if __name__ == "__main__":
    main()
