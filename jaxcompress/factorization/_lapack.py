"""Decompositions of small matrices that run one after the other under `vmap` on CPUs.

There XLA hands a batch to its thread pool, and where the batches of several leaves meet in a
loop they can wait for each other for ever (JAX 0.10.2 on two cores: `jc.straight_through` of
`jc.low_rank`, 20 networks of three layers in one `vmap`, within 1000 steps of a `scan`).
Derivatives are those of `jnp.linalg`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def _one_by_one(f: Callable[[jax.Array], tuple[jax.Array, ...]]) -> Any:
    @jax.custom_batching.custom_vmap
    def single(x):
        return f(x)

    @single.def_vmap
    def several(axis_size, in_batched, x):
        del axis_size, in_batched
        out = lax.platform_dependent(x, cpu=lambda x: lax.map(single, x), default=jax.vmap(f))
        return out, tuple(True for _ in out)

    # `custom_vmap` alone has no reverse mode.
    @jax.custom_jvp
    def differentiable(x):
        return single(x)

    @differentiable.defjvp
    def rule(primals, tangents):
        return jax.jvp(f, primals, tangents)

    return differentiable


def _eigh(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    values, vectors = jnp.linalg.eigh(x)
    return values, vectors


def _svd(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    u, s, vt = jnp.linalg.svd(x, full_matrices=False)
    return u, s, vt


eigh = _one_by_one(_eigh)
svd = _one_by_one(_svd)
