"""What each scheme of a kernel costs at each rank, beside the dense kernel."""

import math
from collections.abc import Sequence

import numpy as np

from jaxcompress.factorization._cp import place_limit
from jaxcompress.factorization._separated import first_axes, matrix_shape

Sizes = tuple[Sequence[int], Sequence[int]]
"""The sizes along the spatial axes, of the inputs and of the outputs of a convolution."""


def rank_limits(scheme: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The largest rank: one number, or two of Tucker, of inputs and outputs."""
    *spatial, inputs, outputs = shape
    axes = first_axes(scheme, len(shape))
    if axes is not None:
        return (min(matrix_shape(shape, axes)),)
    if scheme == "cp":
        return (place_limit(shape),)
    places = math.prod(spatial)
    return min(inputs, places * outputs), min(outputs, places * inputs)


def costs(scheme: str, shape: tuple[int, ...], sizes: Sizes | None = None) -> np.ndarray:
    """Parameters, or multiply-adds where there are sizes, as fractions of the dense kernel.

    Args:
        scheme: one of the five.
        shape: of the kernel, without an axis of size 0.
        sizes: of inputs and outputs.

    Returns:
        float32 of the shape of `rank_limits`: at `[r - 1]`, or `[p - 1, q - 1]`, the cost of
        that rank.
    """
    *spatial, inputs, outputs = shape
    every = range(len(spatial))
    # An axis along which no stage extends belongs to the first one.
    flat = {d for d in every if spatial[d] == 1}

    def places(done: set[int]) -> int:
        """Where a convolution is taken that comes after those along some axes."""
        if sizes is None:
            return 1
        return math.prod(sizes[1 if d in done else 0][d] for d in every)

    full = math.prod(shape) * places(set(every))
    limits = rank_limits(scheme, shape)
    axes = first_axes(scheme, len(shape))
    if axes is not None:
        rows, columns = matrix_shape(shape, axes)
        each = rows * places({*axes} | flat) + columns * places(set(every))
        table = each * np.arange(1, limits[0] + 1, dtype=np.float64)
    elif scheme == "cp":
        each, done = inputs * places(flat), set(flat)
        for d in every:
            if d not in flat:
                done.add(d)
                each += spatial[d] * places(done)
        each += outputs * places(set(every))
        table = each * np.arange(1, limits[0] + 1, dtype=np.float64)
    else:
        p = np.arange(1, limits[0] + 1, dtype=np.float64)[:, None]
        q = np.arange(1, limits[1] + 1, dtype=np.float64)[None, :]
        # A factor of full rank is part of the core.
        first = np.where(p < inputs, p * inputs * places(flat), 0)
        last = np.where(q < outputs, q * outputs * places(set(every)), 0)
        table = first + math.prod(spatial) * p * q * places(set(every)) + last
    return (table / full).astype(np.float32)
