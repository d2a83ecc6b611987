"""Counting parameters and bytes."""

import math

import numpy as np

from jaxcompress._types import PyTree
from jaxcompress.tree._paths import leaves_with_paths


def size(tree: PyTree) -> int:
    """Number of entries of all array leaves, compressed ones counted at their dense shape.

    Examples:
        >>> size({"w": np.ones((3, 4)), "b": np.ones(4)})
        16
    """
    return sum(math.prod(x.shape) for _, x in leaves_with_paths(tree) if hasattr(x, "shape"))


def nbytes(tree: PyTree) -> int:
    """Bytes that the array leaves hold: indices, scales and padding of packed ones included.

    Works on abstract leaves (`jax.ShapeDtypeStruct`) too.

    Examples:
        >>> nbytes({"w": np.ones((3, 4), np.float32), "b": None})
        48
    """
    return sum(_leaf_bytes(x) for _, x in leaves_with_paths(tree) if hasattr(x, "shape"))


def _leaf_bytes(x) -> int:
    if hasattr(x, "nbytes"):
        return int(x.nbytes)
    return math.prod(x.shape) * np.dtype(x.dtype).itemsize
