"""A kernel seen as a matrix: what two convolutions in sequence share between them."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress import arrays
from jaxcompress._sharding import automatic
from jaxcompress.factorization._basis import Basis, as_matrix, is_wide

_SCHEMES = ("output", "input", "spatial")


@functools.partial(jax.tree_util.register_dataclass, data_fields=["vectors"], meta_fields=["axes"])
@dataclasses.dataclass(frozen=True)
class Separated:
    """The subspace of a kernel, whose rows are the axes of the first of two convolutions.

    Attributes:
        vectors: float32, orthonormal singular vectors in the columns, of the shorter side of
            the matrix; zero columns beyond the rank.
        axes: static. The spatial axes along which the first convolution extends.
    """

    vectors: jax.Array
    axes: tuple[int, ...]

    def project(self, w: jax.Array) -> jax.Array:
        """The orthogonal projection on the subspace, by two thin products."""

        def projected(w, vectors):
            matrix = unfolded(w, self.axes)
            new = Basis(vectors, is_wide(matrix.shape)).project(matrix)
            rows, columns = sides(w.shape, self.axes)
            order = (*rows, *columns)
            new = new.reshape([w.shape[d] for d in order])
            return new.transpose([order.index(d) for d in range(w.ndim)]).astype(w.dtype)

        return automatic(projected, w, self.vectors, like_first=True)

    def pack(self, w: Any, path: str) -> arrays.LowRank | arrays.ConvChain:
        """The two kernels, without the columns beyond the rank."""
        dense = arrays.todense(w)
        matrix = unfolded(dense, self.axes)
        thin = Basis(self.vectors, is_wide(matrix.shape)).pack(matrix, path)
        u, v = (x.astype(dense.dtype) for x in (thin.u, thin.v))
        *spatial, inputs, outputs = dense.shape
        if len(self.axes) == len(spatial):
            return arrays.LowRank(u.reshape(*dense.shape[:-1], thin.rank), v)
        mine = [n if d in self.axes else 1 for d, n in enumerate(spatial)]
        other = [1 if d in self.axes else n for d, n in enumerate(spatial)]
        v = jnp.moveaxis(v.reshape(thin.rank, *other, outputs), 0, -2)
        return arrays.conv_chain([u.reshape(*mine, inputs, thin.rank), v])


def first_axes(scheme: str, ndim: int) -> tuple[int, ...] | None:
    """The spatial axes along which the first convolution extends; None for other schemes."""
    if scheme not in _SCHEMES:
        return None
    return {"output": tuple(range(ndim - 2)), "input": (), "spatial": (0,)}[scheme]


def sides(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes of a kernel that are rows, and those that are columns."""
    n = len(shape)
    return (*axes, n - 2), (*(d for d in range(n - 2) if d not in axes), n - 1)


def matrix_shape(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, int]:
    """Of the unfolded kernel."""
    rows, columns = (math.prod(shape[d] for d in side) for side in sides(shape, axes))
    return rows, columns


def unfolded(w: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The kernel as a matrix, in float32."""
    rows, columns = sides(w.shape, axes)
    return as_matrix(w.transpose(*rows, *columns).reshape(matrix_shape(w.shape, axes)))
