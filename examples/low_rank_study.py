"""Compare ways to low rank on handwritten digits: 4 ranks and 5 seeds of each in one `vmap`.

    pip install -e ".[examples]" && python examples/low_rank_study.py

Every way trains the same small network for the same number of steps; the kernels of all of its
layers end with the rank asked for. Takes about three minutes on two CPU cores; `--quick` only
shows that all of it runs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import digits
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcompress as jc

SIZES = (64, 64, 32, 10)
BATCH = 64
RANKS = (1, 2, 4, 8)
MOST = max(RANKS)


class Setting(NamedTuple):
    """What a way knows: the rank, a traced number, and how many steps it has."""

    rank: jax.Array
    steps: int


class Method(NamedTuple):
    """How a network is trained, and what becomes of it then, given the training images."""

    optimizer: Callable[[Setting], optax.GradientTransformation]
    after: Callable[[Setting, Any, jax.Array], Any] = lambda setting, params, x: params


def adam(s: Setting) -> optax.GradientTransformation:
    """The optimizer of all methods, with one learning rate for all."""
    return optax.adam(optax.cosine_decay_schedule(5e-3, s.steps))


def to_rank(s: Setting) -> jc.Projection:
    """Low rank, whose structures have room for the largest rank."""
    return jc.low_rank(s.rank, max_rank=MOST)


def truncated(s: Setting, params: Any, x: jax.Array) -> Any:
    """The nearest weights."""
    return jc.compress(to_rank(s), params)


def whitened(s: Setting, params: Any, x: jax.Array) -> Any:
    """Weights with the nearest outputs, layer by layer."""
    stats = jc.calibrate(digits.logits, params, [(x,)], gram=True)
    return jc.compress(to_rank(s), params, stats=stats)


def falling(s: Setting) -> optax.GradientTransformation:
    """From the full rank to that asked for over the first half."""
    rank = jc.schedules.linear(32.0, s.rank, 0, s.steps // 2)
    return jc.projected(adam(s), jc.every(10, jc.scheduled(jc.low_rank)(rank=rank)))


def dynamical(s: Setting) -> optax.GradientTransformation:
    """On the manifold of matrices of that rank."""
    return jc.factorization.dynamical_low_rank(adam(s), s.rank, max_rank=MOST)


def factors(s: Setting) -> optax.GradientTransformation:
    """Two factors for each kernel, started from its truncation."""
    return jc.reparametrized(adam(s), jc.low_rank_factors(s.rank, max_rank=MOST))


METHODS = {
    "truncated after training": Method(adam, truncated),
    "whitened after training": Method(adam, whitened),
    "factors": Method(factors),
    "dynamical": Method(dynamical),
    "projected every 10 steps": Method(lambda s: jc.projected(adam(s), jc.every(10, to_rank(s)))),
    "from full rank, every 10 steps": Method(falling),
    "straight-through": Method(lambda s: jc.straight_through(adam(s), to_rank(s))),
}


def study(name: str, data: Any, steps: int, seeds: list[int]) -> np.ndarray:
    """Test accuracy, `[rank, seed]`: a single program. Kernels must have the rank."""
    method = METHODS[name]
    x, y, x_test, y_test = data

    def loss(params, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(digits.logits(params, x), y).mean()

    def run(rank, seed):
        start, order = jax.random.split(jax.random.key(seed))
        params, setting = digits.initial(start, SIZES), Setting(rank, steps)
        opt = method.optimizer(setting)
        params, _ = digits.trained(opt, loss, params, x, y, order, steps, BATCH)
        params = method.after(setting, params, x)
        beyond = [
            jnp.where(jnp.arange(len(s)) < rank, 0.0, s / s[0]).max()
            for s in jc.factorization.spectra(params).values()
        ]
        accuracy = jnp.mean(digits.logits(params, x_test).argmax(-1) == y_test)
        return accuracy, jnp.max(jnp.stack(beyond))

    over = jax.vmap(jax.vmap(run, (None, 0)), (0, None))
    accuracy, beyond = jax.jit(over)(jnp.asarray(RANKS), jnp.asarray(seeds))
    if beyond.max() > 1e-4:
        raise RuntimeError(f"{name}: a kernel misses its rank by {beyond.max()}")
    return np.asarray(accuracy)


if __name__ == "__main__":
    columns = [f"rank {rank}" for rank in RANKS]
    digits.run(__doc__, METHODS, study, lambda f: digits.table(f, "method", columns), ranks=RANKS)
