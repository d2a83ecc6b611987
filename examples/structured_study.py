"""Compare ways to remove channels of a small convolutional network on handwritten digits.

    pip install -e ".[examples]" && python examples/structured_study.py

Half or three quarters of all channels and neurons leave, as many of each layer, and the network
gets really smaller: `jc.shrink` cuts the weights and `jc.shrink_like` Adam's moments, and training
goes on with the small ones. All ways train for the same number of steps in all. Takes about four
minutes on two CPU cores; `--quick` only shows that all of it runs.
"""

import functools
import json
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import digits
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.table import Table

import jaxcompress as jc

REMOVED = (0.5, 0.75)
WIDTH, BATCH, RATE = 32, 64, 2e-3


class Network(nnx.Module):
    """A residual block between two poolings, and two dense layers, for 8 x 8 images."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.stem = nnx.Conv(1, width, (3, 3), rngs=rngs)
        self.first = nnx.Conv(width, width, (3, 3), rngs=rngs)
        self.second = nnx.Conv(width, width, (3, 3), rngs=rngs)
        self.hidden = nnx.Linear(4 * width, 2 * width, rngs=rngs)
        self.head = nnx.Linear(2 * width, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of images `[batch, 64]`."""
        pool = functools.partial(nnx.max_pool, window_shape=(2, 2), strides=(2, 2))
        x = pool(nnx.relu(self.stem(x.reshape(-1, 8, 8, 1))))
        x = pool(nnx.relu(x + self.second(nnx.relu(self.first(x)))))
        return self.head(nnx.relu(self.hidden(x.reshape(x.shape[0], -1))))


def initial(width: int, seed: int) -> Any:
    """New params."""
    return nnx.state(Network(width, nnx.Rngs(seed)), nnx.Param)


GRAPH = nnx.graphdef(nnx.eval_shape(lambda: Network(WIDTH, nnx.Rngs(0))))


def logits(params: Any, x: jax.Array) -> jax.Array:
    """Of images, by params of any width: the module takes its sizes from them."""
    return nnx.merge(GRAPH, params)(x)


def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """Mean cross-entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y).mean()


class Moment(NamedTuple):
    """What may be asked when it is chosen what stays."""

    groups: jc.pruning.Dependencies
    params: Any
    state: Any
    removed: float
    seed: int
    batches: list[tuple[jax.Array, jax.Array]]


class Way(NamedTuple):
    """What stays; and how the third quarter of training prepares for it, if it does."""

    choose: Callable[[Moment], jc.pruning.Keep]
    prepare: Callable[[optax.GradientTransformation, Any, float, int], Any] | None = None


def best(scores: Callable[[Moment], Any] = lambda m: None) -> Callable[[Moment], jc.pruning.Keep]:
    """The units with the largest scores, or else of the largest norms."""
    return lambda m: jc.select(m.groups, m.params, keep=1 - m.removed, scores=scores(m))


def survivors(m: Moment) -> jc.pruning.Keep:
    """The units that the masks in the optimizer's state have left."""
    return jc.pruning.kept_units(m.groups, m.state)


def growing(adam: Any, groups: Any, removed: float, steps: int) -> Any:
    """A decay of the smaller units, up to 2 in twenty steps."""
    p = jc.pruning.prune_groups(groups, removed)
    return optax.chain(jc.pruning.growing_regularization(p, 0.1, max(1, steps // 20), 2.0), adam)


def lasso(adam: Any, groups: Any, removed: float, steps: int) -> Any:
    """After each update a step towards zero, for the units that are the smallest now."""

    def towards_zero(updates, params):
        moved = optax.apply_updates(params, updates)
        hard = {
            name: (x >= jnp.quantile(x, 1 - removed)).astype(x.dtype)
            for name, x in jc.pruning.unit_strengths(groups, moved).items()
        }
        moved = jc.pruning.soft_threshold_units(groups, moved, 3e-4, strengths=hard)
        return jax.tree.map(jnp.subtract, moved, params)

    return optax.chain(adam, optax.stateless(towards_zero))


def gradual(wrap: Callable[..., Any]) -> Callable[..., Any]:
    """Zeros, more and more of them; other units at each of twenty times."""

    def prepare(adam, groups, removed, steps):
        ramp = jc.schedules.cubic(0.0, removed, 0, 3 * steps // 4)
        return wrap(adam, jc.every(max(1, steps // 20), jc.pruning.prune_groups(groups, ramp)))

    return prepare


WAYS = {
    "random": Way(best(lambda m: jc.pruning.random_units(m.groups, jax.random.key(m.seed)))),
    "magnitude": Way(best()),
    "activations": Way(
        best(
            lambda m: jc.pruning.activation_scores(
                m.groups, logits, m.params, [x for x, _ in m.batches]
            )
        )
    ),
    "Taylor": Way(best(lambda m: jc.pruning.unit_taylor(m.groups, loss, m.params, m.batches))),
    "group lasso": Way(best(), lasso),
    "growing regularization": Way(survivors, growing),
    "projected": Way(survivors, gradual(jc.projected)),
    "straight-through": Way(survivors, gradual(jc.straight_through)),
}
METHODS = ["dense", "narrow from the start", *WAYS]


class Training:
    """Runs of some steps, and what is compiled for them."""

    def __init__(self, data: Any, steps: int):
        self.x, self.y, self.x_test, self.y_test = data
        self.steps = steps
        # One schedule for all of training: the count in the state says where it is.
        self.adam = optax.adam(optax.cosine_decay_schedule(RATE, steps))
        self.adam_step = self.step_of(self.adam)

    def step_of(self, optimizer: optax.GradientTransformation) -> Callable[..., Any]:
        """One step, compiled once for each width."""

        @jax.jit
        def step(params, state, x, y):
            grads = jax.grad(loss)(params, x, y)
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return step

    def run(self, step: Any, params: Any, state: Any, begin: int, end: int, seed: int) -> Any:
        """Params and state after these steps; a seed sees the same images in any way."""
        # Not in a `scan`, in which convolutions are ten times slower on CPU.
        for i in range(begin, end):
            chosen = np.random.default_rng((seed, i)).integers(0, len(self.x), BATCH)
            params, state = step(params, state, self.x[chosen], self.y[chosen])
        return params, state

    @functools.cached_property
    def predict(self) -> Callable[..., jax.Array]:
        """Compiled once for each width."""
        return jax.jit(lambda params, x: logits(params, x).argmax(-1))

    def accuracy(self, params: Any) -> float:
        """On the test images."""
        return float(jnp.mean(self.predict(params, self.x_test) == self.y_test))

    @functools.cached_property
    def groups(self) -> jc.pruning.Dependencies:
        """Which channels have to leave together."""
        return jc.dependencies(logits, initial(WIDTH, 0), self.x[:1])

    @functools.cache  # noqa: B019
    def half(self, seed: int) -> tuple[Any, Any]:
        """The dense network after half of the steps, which most ways begin with."""
        params = initial(WIDTH, seed)
        return self.run(self.adam_step, params, self.adam.init(params), 0, self.steps // 2, seed)

    @functools.cache  # noqa: B019
    def prepared_by(self, way: Way, removed: float) -> tuple[Any, Any]:
        """The optimizer of the third quarter and its step."""
        assert way.prepare is not None
        optimizer = way.prepare(self.adam, self.groups, removed, self.steps // 4)
        return optimizer, self.step_of(optimizer)


def moments(state: Any, like: Any) -> Any:
    """Adam's state within that of another optimizer around it."""
    wanted = jax.tree.structure(like)
    found = jax.tree.leaves(state, is_leaf=lambda node: jax.tree.structure(node) == wanted)
    return next(node for node in found if jax.tree.structure(node) == wanted)


def with_moments(state: Any, own: Any) -> Any:
    """The same with another state of Adam's in it."""
    wanted = jax.tree.structure(own)
    is_own = lambda node: jax.tree.structure(node) == wanted  # noqa: E731
    return jax.tree.map(lambda node: own if is_own(node) else node, state, is_leaf=is_own)


def smaller(training: Training, way: Way, removed: float, seed: int) -> tuple[Any, Any, Any]:
    """The small params after all steps; the function that runs them; the params it was cut from."""
    (params, adam), begin = training.half(seed), training.steps // 2
    state = adam
    if way.prepare is not None:
        optimizer, step = training.prepared_by(way, removed)
        state, end = with_moments(optimizer.init(params), adam), begin + training.steps // 4
        params, state = training.run(step, params, state, begin, end, seed)
        adam, begin = moments(state, adam), end
    batches = [(training.x[i::8], training.y[i::8]) for i in range(8)]
    keep = way.choose(Moment(training.groups, params, state, removed, seed, batches))
    small, run = jc.shrink(logits, params, keep, training.x[:1])
    adam = jc.shrink_like(adam, keep)
    masked = zeroed(params, keep, removed)
    got, want = run(small, training.x[:32]), logits(masked, training.x[:32])
    if not np.allclose(got, want, atol=1e-4 * np.abs(want).max()):
        raise RuntimeError(f"{np.abs(got - want).max()} lies between the small and the masked one")
    small, _ = training.run(training.adam_step, small, adam, begin, training.steps, seed)
    return small, run, masked


def zeroed(params: Any, keep: jc.pruning.Keep, removed: float) -> Any:
    """The params with zeros in all places of what leaves."""
    scores = {name: jnp.float32(mask) for name, mask in keep.masks.items()}
    return jc.compress(jc.pruning.prune_groups(keep.dependencies, removed, scores=scores), params)


def study(training: Training, name: str, seeds: list[int]) -> np.ndarray:
    """Test accuracy, `[removed, seed]`."""

    def one(removed, seed):
        steps = training.steps
        if name == "dense":
            params, state = training.half(seed)
            params, _ = training.run(training.adam_step, params, state, steps // 2, steps, seed)
        elif name == "narrow from the start":
            params = initial(round((1 - removed) * WIDTH), seed)
            state = training.adam.init(params)
            params, _ = training.run(training.adam_step, params, state, 0, steps, seed)
        else:
            params, _, _ = smaller(training, WAYS[name], removed, seed)
        return training.accuracy(params)

    if name == "dense":
        return np.array([[one(0.0, seed) for seed in seeds]] * len(REMOVED))
    return np.array([[one(removed, seed) for seed in seeds] for removed in REMOVED])


def measured(training: Training, seed: int, out: pathlib.Path) -> list[dict[str, Any]]:
    """What each removal gains, against zeros in the same places; draws the half-wide network."""
    rows, x = [], training.x_test
    for removed in REMOVED:
        small, run, masked = smaller(training, WAYS["magnitude"], removed, seed)
        both = jc.report.shrunk(logits, masked, run, small, x)
        assert both.seconds is not None
        rows.append(
            {
                "removed": removed,
                "parameters": both.parameters,
                "bytes_on_disk": [on_disk(params) for params in (masked, small)],
                "flops": both.flops,
                "latency_ms": [1e3 * seconds for seconds in both.seconds],
            }
        )
        if removed == REMOVED[0]:
            wide = jc.report.network(logits, masked, x[:1])
            narrow = jc.report.network(run, small, x[:1])
            jc.report.network_figure(wide, narrow).savefig(out, dpi=150)
    return rows


def on_disk(params: Any) -> int:
    """Bytes of the file."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "params.safetensors"
        jc.save(file, params)
        return file.stat().st_size


def gains(rows: list[dict[str, Any]]) -> Table:
    """Before and after the removal."""
    columns = ("channels removed", "parameters", "bytes on disk", "MFLOPs", "latency, ms", "faster")
    table = Table(*columns, title="zeros, and what is left without them")
    for row in rows:
        wide, narrow = row["latency_ms"]
        table.add_row(
            f"{row['removed']:.0%}",
            *("{:,} → {:,}".format(*row[name]) for name in ("parameters", "bytes_on_disk")),
            "{:.1f} → {:.1f}".format(*(flops / 1e6 for flops in row["flops"])),
            f"{wide:.2f} → {narrow:.2f}",
            f"{wide / narrow:.1f}x",
        )
    return table


def main() -> None:
    """Runs all ways, prints the tables, draws the network, writes the record."""
    options = digits.options_of(digits.parser(__doc__ or "", METHODS))
    start, console = time.perf_counter(), digits.console()
    training = Training(digits.load(), options.steps)
    console.print(str(training.groups), highlight=False)
    found, seconds = {}, {}
    for name in digits.in_turn(options.only, console, seconds):
        found[name] = study(training, name, options.seeds)
    columns = [f"{removed:.0%} removed" for removed in REMOVED]
    console.print(digits.table(found, "way", columns))
    rows = measured(training, options.seeds[0], options.out.with_suffix(".png"))
    console.print(gains(rows))
    noted = digits.record(
        start, options.steps, options.seeds, found, seconds, removed=REMOVED, gains=rows
    )
    options.out.write_text(json.dumps(noted, indent=2) + "\n")
    console.print(f"{noted['seconds']} s. The record is {options.out.resolve()}")


if __name__ == "__main__":
    main()
