"""Train a small convolutional network on handwritten digits, then compress it seven ways.

    pip install -e ".[examples]" && python examples/quickstart.py

Each way is an ordinary Optax training loop with one more line in its optimizer. The models
are packed, written to disk, read back and checked. Takes about a minute on two CPU cores.
"""

import argparse
import importlib.metadata
import json
import pathlib
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import jaxcompress as jc

BATCH = 128


class Network(nnx.Module):
    """Two convolutions and two dense layers on 8 x 8 images."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, width, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(width, 2 * width, (3, 3), rngs=rngs)
        self.dense = nnx.Linear(8 * width, 4 * width, rngs=rngs)
        self.head = nnx.Linear(4 * width, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of images `[batch, 8, 8, 1]`."""
        pool = partial(nnx.max_pool, window_shape=(2, 2), strides=(2, 2))
        x = pool(nnx.relu(self.conv1(x)))
        x = pool(nnx.relu(self.conv2(x)))
        x = nnx.relu(self.dense(x.reshape(x.shape[0], -1)))
        return self.head(x)


class Data(NamedTuple):
    """Images in [0, 1] and labels, split into training and test sets."""

    x: np.ndarray
    y: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


class Method(NamedTuple):
    """A way to compress: where to start, how to run and train, and what packs the result."""

    name: str
    params: Any
    apply: Callable[[Any, jax.Array], jax.Array]
    optimizer: optax.GradientTransformation
    packs: bool = True


class Result(NamedTuple):
    """A row of the table."""

    method: str
    accuracy: float
    parameters_kept: int
    bits_per_weight: float
    bytes_on_disk: int
    compression: float
    latency_ms: float


def digits() -> Data:
    """scikit-learn's bundled handwritten digits."""
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    x, x_test, y, y_test = train_test_split(x, y, test_size=0.25, random_state=0, stratify=y)
    return Data(x, y, x_test, y_test)


def network(width: int, seed: int) -> tuple[Any, Callable[[Any, jax.Array], jax.Array]]:
    """Parameters and the function that runs them: the module itself is not changed."""
    graph, params = nnx.split(Network(width, nnx.Rngs(seed)), nnx.Param)
    return params, lambda params, x: nnx.merge(graph, params)(x)


def task_loss(apply, params, batch) -> jax.Array:
    """Cross-entropy with the labels."""
    x, y = batch
    return optax.softmax_cross_entropy_with_integer_labels(apply(params, x), y).mean()


def train(method: Method, data: Data, steps: int, progress: Progress) -> tuple[Any, Any]:
    """An ordinary Optax loop. All that a method adds is in its optimizer."""
    optimizer = optax.with_extra_args_support(method.optimizer)

    @jax.jit
    def step(params, state, batch):
        loss, grads = jax.value_and_grad(partial(task_loss, method.apply))(params, batch)
        updates, state = optimizer.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, updates), state, loss

    params, state = method.params, optimizer.init(method.params)
    order = np.random.default_rng(0)
    bar = progress.add_task(method.name, total=steps)
    for _ in range(steps):
        chosen = order.choice(len(data.x), BATCH, replace=False)
        params, state, _ = step(params, state, (data.x[chosen], data.y[chosen]))
        progress.advance(bar)
    return params, state


def methods(
    teacher: Any, apply: Callable, student: tuple[Any, Callable], steps: int
) -> list[Method]:
    """The seven compressed models; the first six start from the trained teacher."""
    adam = lambda: optax.adam(optax.cosine_decay_schedule(1e-3, steps))  # noqa: E731
    # One threshold for all layers: the small first convolution keeps most of its weights.
    ramp = jc.schedules.cubic(0.0, 0.9, 0, steps // 2)
    gradual = jc.every(10, jc.scheduled(jc.prune)(ramp, scope="global"), end=steps // 2)
    teach = lambda batch: apply(teacher, batch[0])  # noqa: E731
    student_params, student_apply = student
    distill = lambda run: jc.distill(  # noqa: E731
        lambda params, batch: run(params, batch[0]),
        teach,
        weight=0.9,
        task_weight=0.1,
        temperature=4.0,
    )
    # The range is taken anew in each step: the one that costs one pass, not a search.
    four_bits = jc.quantize(bits=4, ranges=jc.quantization.min_max)
    return [
        Method("90% sparse", teacher, apply, jc.projected(adam(), gradual)),
        Method(
            "2:4 sparse",
            teacher,
            apply,
            jc.projected(adam(), jc.every(20, jc.prune(nm=(2, 4)), end=steps // 2)),
        ),
        Method("int8", teacher, apply, jc.straight_through(adam(), jc.quantize(bits=8))),
        Method("int4", teacher, apply, jc.straight_through(adam(), four_bits)),
        Method("low rank", teacher, apply, jc.reparametrized(adam(), jc.low_rank_factors(rank=12))),
        Method(
            "90% sparse + int4 + distilled",
            teacher,
            apply,
            optax.chain(distill(apply), jc.straight_through(adam(), jc.chain(gradual, four_bits))),
        ),
        Method(
            "student, distilled",
            student_params,
            student_apply,
            optax.chain(
                distill(student_apply), optax.adam(optax.cosine_decay_schedule(4e-3, steps))
            ),
            packs=False,
        ),
    ]


def latency(apply: Callable, params: Any, x: jax.Array, repeats: int = 30) -> float:
    """Median milliseconds for the whole test set, compiled, weights densified once."""
    run = jax.jit(apply)
    jax.block_until_ready(run(params, x))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run(params, x))
        times.append(time.perf_counter() - start)
    return 1e3 * float(np.median(times))


def finish(
    method: Method, params: Any, state: Any, data: Data, out: pathlib.Path, dense_bytes: int
):
    """Packs, saves, loads, checks that the loaded model predicts the same, and measures it."""
    packed = jc.pack(state, params) if method.packs else params
    file = out / (method.name.replace(" ", "_").replace("%", "").replace(",", "") + ".safetensors")
    jc.save(file, packed)
    loaded = jc.todense(jc.load(file, like=packed))
    predict = jax.jit(lambda params: method.apply(params, data.x_test).argmax(-1))
    predicted = predict(loaded)
    if not np.array_equal(predicted, predict(jc.todense(packed))):
        raise RuntimeError(f"{method.name}: the model read back from {file} predicts otherwise")
    size = file.stat().st_size
    report = jc.summary(packed, ranks=False).total
    # What is stored: of a low-rank leaf the entries of its factors.
    stored = jax.tree.map(
        lambda x: (x.u, x.v) if isinstance(x, jc.arrays.LowRank) else jc.todense(x),
        packed,
        is_leaf=jc.arrays.is_compressed,
    )
    kept = [int((w != 0).sum()) for w in jax.tree.leaves(stored)]
    return packed, Result(
        method=method.name,
        accuracy=float((predicted == data.y_test).mean()),
        parameters_kept=sum(kept),
        bits_per_weight=float(report.bits),
        bytes_on_disk=size,
        compression=dense_bytes / jc.tree.nbytes(packed),
        latency_ms=latency(method.apply, loaded, data.x_test),
    )


def table(results: list[Result]) -> Table:
    """The results as a rich table."""
    out = Table(title="Digits: one network, compressed")
    for name in (
        "method",
        "test accuracy",
        "parameters kept",
        "bits per weight",
        "bytes on disk",
        "compression",
        "latency",
    ):
        out.add_column(name, justify="left" if name == "method" else "right")
    for r in results:
        out.add_row(
            r.method,
            f"{100 * r.accuracy:.1f}%",
            f"{r.parameters_kept:,}",
            f"{r.bits_per_weight:.2f}",
            f"{r.bytes_on_disk:,}",
            f"{r.compression:.1f}x",
            f"{r.latency_ms:.2f} ms",
        )
    return out


def main() -> None:
    """Trains, compresses, reports."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("quickstart_results"))
    parser.add_argument("--steps", type=int, default=400, help="training steps of each model")
    options = parser.parse_args()
    out: pathlib.Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    start, data = time.perf_counter(), digits()
    console = Console(width=None if sys.stdout.isatty() else 120)

    columns = (
        TextColumn("{task.description:32}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        params, apply = network(width=32, seed=0)
        teacher = Method(
            "teacher",
            params,
            apply,
            optax.adam(optax.cosine_decay_schedule(2e-3, options.steps)),
            packs=False,
        )
        trained, state = train(teacher, data, options.steps, progress)
        dense_bytes = jc.tree.nbytes(trained)
        packed = {}
        packed[teacher.name], result = finish(teacher, trained, state, data, out, dense_bytes)
        results = [result]
        for method in methods(trained, apply, network(width=8, seed=1), options.steps):
            final, state = train(method, data, options.steps, progress)
            packed[method.name], result = finish(method, final, state, data, out, dense_bytes)
            results.append(result)

    both = packed["90% sparse + int4 + distilled"]
    console.print(jc.report.table(jc.summary(trained, both)))
    console.print(table(results))
    points = [(r.method, r.bytes_on_disk, 100 * r.accuracy) for r in results]
    picture = jc.report.tradeoff(points, xlabel="file size", ylabel="test accuracy, %")
    picture.savefig(out / "accuracy_against_size.png", dpi=150)
    jc.report.histograms(trained, jc.todense(both)).savefig(
        out / "weights_before_and_after.png", dpi=150
    )
    record = {
        "device": f"{jax.devices()[0].device_kind}, {platform.machine()}",
        "versions": {
            n: importlib.metadata.version(n) for n in ("jax", "flax", "optax", "jaxcompress")
        },
        "seconds": round(time.perf_counter() - start, 1),
        "steps": options.steps,
        "results": [r._asdict() for r in results],
    }
    (out / "results.json").write_text(json.dumps(record, indent=2) + "\n")
    console.print(
        f"{record['seconds']} s. Models, pictures and results.json are in {out.resolve()}"
    )


if __name__ == "__main__":
    main()
