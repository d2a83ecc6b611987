"""Tucker decomposition of a kernel along its input and output features."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import arrays
from jaxcompress._products import product
from jaxcompress._sharding import automatic
from jaxcompress.factorization._decompose import SVD, Method, decompose


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tucker:
    """The subspaces of the input and of the output features of a kernel.

    Attributes:
        inputs: float32, orthonormal columns; zero columns beyond the rank.
        outputs: float32, likewise.
    """

    inputs: jax.Array
    outputs: jax.Array

    def project(self, w: jax.Array) -> jax.Array:
        """The orthogonal projection on both subspaces."""

        def projected(w, a, b):
            core = _core(w.astype(jnp.float32), a, b)
            return product(product(a, core), b.T).astype(w.dtype)

        return automatic(projected, w, self.inputs, self.outputs, like_first=True)

    def pack(self, w: Any, path: str) -> arrays.ConvChain:
        """A convolution to fewer features, the core, and one back; full ones are in the core."""
        del path
        dense = arrays.todense(w)
        a, b = _live(self.inputs), _live(self.outputs)
        core = _core(dense.astype(jnp.float32), a, b)
        ones = (1,) * (dense.ndim - 2)
        first, last = [a.reshape(*ones, *a.shape)], [b.T.reshape(*ones, *b.T.shape)]
        if a.shape[0] == a.shape[1]:
            first, core = [], product(a, core)
        if b.shape[0] == b.shape[1]:
            last, core = [], product(core, b.T)
        return arrays.conv_chain([x.astype(dense.dtype) for x in (*first, core, *last)])


def tucker(
    w: jax.Array,
    limits: tuple[int, int],
    ranks: Callable[[SVD, SVD], tuple[jax.Array, jax.Array]],
    iterations: int,
    method: Method,
) -> tuple[jax.Array, jax.Array]:
    """The bases by higher-order SVD, then by orthogonal iterations from them.

    Args:
        w: a kernel in float32.
        limits: static. The columns of the bases of inputs and outputs.
        ranks: from the decompositions along inputs and outputs to how many vectors to keep.
        iterations: static. Each takes the inputs given the outputs, then the outputs.
        method: static. Of the decompositions.
    """
    along = (leading(w, -2, limits[0], method), leading(w, -1, limits[1], method))
    p, q = ranks(*along)

    def step(_, bases):
        del _
        b = bases[1]
        a = _kept(leading(product(w, b), -2, limits[0], method).u, p)
        other = leading(
            jnp.swapaxes(product(jnp.swapaxes(w, -1, -2), a), -1, -2), -1, limits[1], method
        )
        return a, _kept(other.u, q)

    start = (_kept(along[0].u, p), _kept(along[1].u, q))
    return jax.lax.fori_loop(0, iterations, step, start)


def leading(w: jax.Array, axis: int, limit: int, method: Method) -> SVD:
    """The left singular vectors along one axis."""
    size = w.shape[axis]
    matrix = jnp.moveaxis(w, axis, 0).reshape(size, w.size // max(size, 1))
    # Of a square or wide matrix all left vectors are orthonormal, also those without a value.
    short = max(size - matrix.shape[1], 0)
    return decompose(jnp.pad(matrix, ((0, 0), (0, short))), limit, method)


def _kept(vectors: jax.Array, rank: jax.Array) -> jax.Array:
    live = jnp.arange(vectors.shape[1], dtype=jnp.float32) < rank
    return jnp.where(live[None, :], vectors, 0.0)


def _core(w: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return product(a.T, product(w, b))


def _live(vectors: jax.Array) -> jax.Array:
    values = np.asarray(vectors)
    return jnp.asarray(values[:, (values != 0).any(axis=0)])
