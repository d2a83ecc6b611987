"""Read a function that knows nothing of compression, then run it on compressed parameters.

    pip install -e ".[examples]" && python examples/tracing.py

Trains a network with a scanned stack of layers on handwritten digits. Shows what consumes
which parameter and what it costs, calibrates, captures a layer's outputs, and runs the same
function on packed leaves. Takes a few seconds on two CPU cores.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

import jaxcompress as jc

WIDTH, DEPTH = 128, 4


def network(params, x):
    """Logits of images `[batch, 64]`; ordinary JAX, nothing of jaxcompress in it."""

    @jax.checkpoint
    def layer(x, w):
        return x + jnp.tanh(x @ w), None

    with jax.named_scope("encoder"):
        x, _ = jax.lax.scan(layer, x @ params["inputs"], params["layers"])
    return x @ params["head"]


def train(steps: int, x, y):
    """Parameters after some steps of Adam."""
    keys = jax.random.split(jax.random.key(0), 3)
    draw = lambda key, *shape: jax.random.normal(key, shape) / shape[-2] ** 0.5  # noqa: E731
    params = {
        "inputs": draw(keys[0], 64, WIDTH),
        "layers": draw(keys[1], DEPTH, WIDTH, WIDTH),
        "head": draw(keys[2], WIDTH, 10),
    }
    optimizer = optax.adam(1e-3)

    @jax.jit
    def step(params, state):
        loss = lambda p: optax.softmax_cross_entropy_with_integer_labels(network(p, x), y).mean()  # noqa: E731
        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params


def main() -> None:
    """Runs the example."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    steps = parser.parse_args().steps
    console = Console(width=100)
    images, labels = load_digits(return_X_y=True)
    x, y = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels)
    x, y, x_test, y_test = x[:1300], y[:1300], x[1300:], y[1300:]
    params = train(steps, x, y)

    table = Table("site", "operation", "weight", "layers", "MFLOP", title="What consumes what")
    for site in jc.sites(network, params, x_test):
        layers = str(site.trips) if site.stacked else ""
        table.add_row(site.name, site.op, site.weight, layers, f"{site.flops / 1e6:.1f}")
    console.print(table)

    stats = jc.calibrate(network, params, [x[i : i + 100] for i in range(0, 500, 100)])
    _, values = jax.jit(jc.capture(network, "encoder"))(params, x_test)
    captured = ", ".join(f"{name} {list(value.shape)}" for name, value in values.items())
    console.print(f"captured: {captured}")

    ways = {
        "float32": (params, network),
        "rank 48": (jc.pack(jc.low_rank(48), params), jc.lift(network)),
        "int8": (jc.pack(jc.quantize(8), params), jc.lift(network)),
        "int8, integer products": (
            jc.pack(jc.quantize(8), params),
            jc.lift(network, activations="dynamic"),
        ),
        "int8, simulated 4-bit activations": (
            jc.pack(jc.quantize(8), params),
            lambda p, x: jc.quantize_activations(
                network, bits=4, ranges=stats, where=jc.tree.none_of("head")
            )(jc.todense(p), x),
        ),
        "50% sparse": (jc.pack(jc.prune(0.5), params), jc.lift(network)),
    }
    table = Table("way", "test accuracy", "bytes", "MFLOP", title="The same function")
    for name, (leaves, apply) in ways.items():
        predicted = jax.jit(apply)(leaves, x_test).argmax(-1)
        accuracy = np.mean(np.asarray(predicted == y_test))
        cost = jc.cost(network, leaves, x_test)
        flops = f"{cost.flops / 1e6:.1f}"
        table.add_row(name, f"{100 * accuracy:.1f}%", f"{cost.param_bytes:,}", flops)
    console.print(table)


if __name__ == "__main__":
    main()
