"""Compare ways to train quantized networks on handwritten digits: 5 seeds of each in one `vmap`.

    pip install -e ".[examples]" && python examples/quantization_study.py

Every way trains the same small network for the same number of steps; the kernels of all of its
layers end on their grids. Takes about three minutes on two CPU cores; `--quick` only shows that
all of it runs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import digits
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcompress as jc

SIZES = (64, 16, 16, 10)
BATCH = 64


class Method(NamedTuple):
    """How a network is trained, and what it is then worth."""

    optimizer: Callable[[int], optax.GradientTransformation]
    # Distinct values that a channel of weights may take, at most; None: any.
    values: int | None
    activations: int | None = None


def adam(steps: int) -> optax.GradientTransformation:
    """The optimizer of all methods, with one learning rate for all."""
    return optax.adam(optax.cosine_decay_schedule(5e-3, steps))


def straight(projection: jc.Projection) -> Callable[[int], optax.GradientTransformation]:
    """Rounded from the first step on; the gradient passes straight through."""
    return lambda steps: jc.straight_through(adam(steps), projection)


def learned(bits: int, **options: Any) -> Callable[[int], optax.GradientTransformation]:
    """LSQ: the steps of the grid are trained too, at a fifth of the learning rate."""

    def optimizer(steps):
        slow = optax.adam(optax.cosine_decay_schedule(1e-3, steps))
        parts = {"weights": adam(steps), "grid": slow}
        inner = optax.partition(parts, jc.quantization.label_latents)
        return jc.reparametrized(inner, jc.quantization.learned_steps(bits, **options))

    return optimizer


def annealed(steps: int) -> optax.GradientTransformation:
    """PARQ: from plain training to rounding, over the middle of the run."""
    slope = jc.schedules.cosine(1.0, 0.0, steps // 10, 8 * steps // 10)
    return jc.straight_through(adam(steps), jc.quantization.parq(jc.quantize(2), slope))


def relaxed(steps: int) -> optax.GradientTransformation:
    """BinaryRelax: a growing share of the way to the grid."""
    share = jc.schedules.cosine(0.0, 1.0, steps // 10, 8 * steps // 10)
    return jc.straight_through(adam(steps), jc.relaxed(jc.quantize(1), share))


def narrowing(steps: int) -> optax.GradientTransformation:
    """From 8 bits to 4, one by one, over the first half."""
    bits = jc.schedules.linear(8.0, 4.0, 0, steps // 2)
    return jc.straight_through(adam(steps), jc.scheduled(jc.quantize)(bits))


def shared(steps: int) -> optax.GradientTransformation:
    """Sixteen values for each layer, trained with the weights that choose among them."""
    codebook = jc.quantization.learned_codebook(16, assignments="nearest")
    return jc.reparametrized(adam(steps), codebook)


ABSMAX = jc.quantize(2, ranges=jc.quantization.absmax)

METHODS = {
    "float": Method(adam, None),
    "4 bits": Method(straight(jc.quantize(4)), 15),
    "8 to 4 bits": Method(narrowing, 15),
    "4 bits, activations too": Method(straight(jc.quantize(4)), 15, activations=4),
    "16 learned values": Method(shared, 16),
    "2 bits, absmax": Method(straight(ABSMAX), 3),
    "2 bits, least error": Method(straight(jc.quantize(2)), 3),
    "2 bits, LSQ": Method(learned(2), 4),
    "2 bits, LSQ+": Method(learned(2, offset=True), 4),
    "2 bits, PARQ": Method(annealed, 3),
    "1 bit": Method(straight(jc.quantize(1)), 3),
    "1 bit, BinaryRelax": Method(relaxed, 3),
}


def study(name: str, data: Any, steps: int, seeds: list[int]) -> np.ndarray:
    """Test accuracy of each seed: a single program. Channels must have few values."""
    method = METHODS[name]
    x, y, x_test, y_test = data
    fn = digits.logits
    if method.activations is not None:
        fn = jc.quantize_activations(digits.logits, method.activations, symmetric=False)

    def loss(params, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(fn(params, x), y).mean()

    def run(seed):
        start, order = jax.random.split(jax.random.key(seed))
        params = digits.initial(start, SIZES)
        opt = method.optimizer(steps)
        params, _ = digits.trained(opt, loss, params, x, y, order, steps, BATCH)
        return jnp.mean(fn(params, x_test).argmax(-1) == y_test), params

    accuracy, params = jax.jit(jax.vmap(run))(jnp.asarray(seeds))
    kernels = [np.asarray(layer["kernel"]) for layer in params.values()]
    channels = [w[i, :, j] for w in kernels for i in range(len(seeds)) for j in range(w.shape[-1])]
    # An update in float32 lands within one rounding of the grid.
    values = max(len(np.unique(channel.round(5))) for channel in channels)
    if method.values is not None and values > method.values:
        raise RuntimeError(f"{name}: a channel has {values} values")
    return np.asarray(accuracy)


if __name__ == "__main__":
    digits.run(__doc__, METHODS, study, lambda f: digits.table(f, "weights", ["accuracy"]))
