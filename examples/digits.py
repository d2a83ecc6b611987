"""What the studies on handwritten digits share: the data, the network, and how they tell."""

import argparse
import importlib.metadata
import itertools
import json
import pathlib
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import jaxcompress as jc


def load() -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Images in [0, 1] and labels, for training and for the test."""
    x, y = load_digits(return_X_y=True)
    parts = train_test_split(x / 16, y, test_size=0.25, random_state=0, stratify=y)
    x, x_test, y, y_test = (jnp.asarray(part) for part in parts)
    return x.astype(jnp.float32), y, x_test.astype(jnp.float32), y_test


def initial(key: jax.Array, sizes: Sequence[int]) -> dict[str, Any]:
    """Weights of He and biases of zero."""
    keys = jax.random.split(key, len(sizes) - 1)
    shapes = zip(itertools.pairwise(sizes), keys, strict=True)
    return {
        f"layer{i}": {
            "kernel": jax.random.normal(k, (m, n)) * jnp.sqrt(2 / m),
            "bias": jnp.zeros(n),
        }
        for i, ((m, n), k) in enumerate(shapes)
    }


def logits(params: dict[str, Any], x: jax.Array) -> jax.Array:
    """Of images `[batch, 64]`."""
    for i in range(len(params)):
        x = jc.name(jax.nn.relu(x), f"hidden{i}") if i else x
        x = x @ params[f"layer{i}"]["kernel"] + params[f"layer{i}"]["bias"]
    return x


def trained(
    optimizer: optax.GradientTransformation,
    loss: Callable[..., jax.Array],
    params: dict[str, Any],
    x: jax.Array,
    y: jax.Array,
    order: jax.Array,
    steps: int,
    batch: int,
) -> tuple[dict[str, Any], Any]:
    """Params and the optimizer's state after so many steps, on images drawn by the key `order`.

    The optimizer is handed the batch, which `jc.distill` reads.
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def step(carry, key):
        params, state = carry
        chosen = jax.random.randint(key, (batch,), 0, len(x))
        images, labels = x[chosen], y[chosen]
        grads = jax.grad(loss)(params, images, labels)
        updates, state = optimizer.update(grads, state, params, batch=(images, labels))
        return (optax.apply_updates(params, updates), state), None

    # The count of steps depends on no seed: under `vmap` it stays one clock for all.
    keys = jax.random.split(order, steps)
    return jax.lax.scan(step, (params, optimizer.init(params)), keys)[0]


def standard_error(accuracy: np.ndarray) -> np.ndarray:
    """Of the mean over the last axis; of a single seed 0."""
    if accuracy.shape[-1] == 1:
        return np.zeros(accuracy.shape[:-1])
    return accuracy.std(-1, ddof=1) / np.sqrt(accuracy.shape[-1])


def console() -> Console:
    """As wide as the terminal, or 120 columns in a file."""
    return Console(width=None if sys.stdout.isatty() else 120)


def in_turn(names: Sequence[str], shown: Console, seconds: dict[str, float]) -> Iterator[str]:
    """Each name under a bar of progress; how long it took goes into `seconds`."""
    columns = (TextColumn("{task.description:24}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=shown) as progress:
        task = progress.add_task("", total=len(names))
        for name in names:
            progress.update(task, description=name)
            began = time.perf_counter()
            yield name
            seconds[name] = round(time.perf_counter() - began, 1)
            progress.advance(task)


def parser(doc: str, methods: Sequence[str]) -> argparse.ArgumentParser:
    """The options of all studies."""
    made = argparse.ArgumentParser(description=doc.splitlines()[0])
    made.add_argument("--steps", type=int, default=1000, help="training steps of each model")
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    made.add_argument("--only", nargs="+", choices=list(methods), default=list(methods))
    return made


def options_of(made: argparse.ArgumentParser) -> argparse.Namespace:
    """The options of a study that was called, which writes into a file or only tries."""
    made.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results.json"))
    made.add_argument("--quick", action="store_true", help="20 steps of 2 seeds")
    options = made.parse_args()
    if options.quick:
        options.steps, options.seeds = 20, [0, 1]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    return options


def table(found: dict[str, np.ndarray], first: str, columns: Sequence[str]) -> Table:
    """Mean and standard error over the seeds, the last axis, in percent."""
    made = Table(title="test accuracy, %: mean and standard error")
    made.add_column(first)
    for column in columns:
        made.add_column(column, justify="right")
    for name, accuracy in found.items():
        several = accuracy.reshape(len(columns), -1)
        cells = zip(several.mean(-1), standard_error(several), strict=True)
        made.add_row(name, *(f"{100 * mean:.1f} ± {100 * error:.1f}" for mean, error in cells))
    return made


def picture(
    found: dict[str, np.ndarray], at: Sequence[float], label: str, path: pathlib.Path
) -> None:
    """Accuracy, `[place, seed]`, against the places, with standard errors."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot(xlabel=label, ylabel="test accuracy, %")
    for i, (name, accuracy) in enumerate(found.items()):
        axes.errorbar(
            at,
            100 * accuracy.mean(-1),
            100 * standard_error(accuracy),
            label=name,
            capsize=2,
            linestyle=("-", "--", ":")[i // 10 % 3],
        )
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    figure.savefig(path, dpi=150)


def run(
    doc: str,
    methods: Sequence[str],
    study: Callable[..., np.ndarray],
    shown: Callable[[dict[str, np.ndarray]], Table],
    plot: Callable[[dict[str, np.ndarray], pathlib.Path], None] | None = None,
    **settings: Any,
) -> None:
    """A study with its options: runs all methods, prints the table, writes the record.

    `study` takes the name of a method, the data, steps and seeds, and gives the accuracies;
    `plot` draws them into a file beside the record.
    """
    options = options_of(parser(doc, methods))
    start, data, screen = time.perf_counter(), load(), console()
    found, seconds = {}, {}
    for name in in_turn(options.only, screen, seconds):
        found[name] = study(name, data, options.steps, options.seeds)
    screen.print(shown(found))
    if plot is not None:
        plot(found, options.out.with_suffix(".png"))
    noted = record(start, options.steps, options.seeds, found, seconds, **settings)
    options.out.write_text(json.dumps(noted, indent=2) + "\n")
    screen.print(f"{noted['seconds']} s. The record is {options.out.resolve()}")


def record(
    start: float,
    steps: int,
    seeds: list[int],
    found: dict[str, np.ndarray],
    seconds: dict[str, float],
    **settings: Any,
) -> dict[str, Any]:
    """What a run found, with the device and the versions."""
    return {
        "device": f"{jax.devices()[0].device_kind}, {platform.machine()}",
        "versions": {n: importlib.metadata.version(n) for n in ("jax", "optax", "jaxcompress")},
        "seconds": round(time.perf_counter() - start, 1),
        "steps": steps,
        "seeds": seeds,
        **settings,
        "results": [
            {"method": name, "seconds": seconds[name], "accuracy": accuracy.round(5).tolist()}
            for name, accuracy in found.items()
        ],
    }
