"""What the studies on handwritten digits share: the data, the network, and how they tell."""

import importlib.metadata
import itertools
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
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


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
        x = jax.nn.relu(x) if i else x
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
    """Params and the optimizer's state after so many steps, on images drawn by the key `order`."""

    def step(carry, key):
        params, state = carry
        chosen = jax.random.randint(key, (batch,), 0, len(x))
        grads = jax.grad(loss)(params, x[chosen], y[chosen])
        updates, state = optimizer.update(grads, state, params)
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
