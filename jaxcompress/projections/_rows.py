"""What a projection tells the solvers: how the rows of a layer are projected in turn."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax


class RowRule(NamedTuple):
    """How the rows of a layer's matrix `[features, outputs]` are projected, block by block.

    Attributes:
        choose: `(data, rows, diagonal, start, features) -> structure`, as for
            `jc.solvers.compensate`; `data` is what `Rows` holds for the leaf, as a matrix that
            is filled up to whole blocks, and `features` the number of true rows.
        project: `(row, structure, i) -> row`.
        group: static. Blocks must be whole multiples of as many rows; None: of any.
    """

    choose: Callable[..., Any]
    project: Callable[[jax.Array, Any, jax.Array], jax.Array]
    group: int | None = None


class Rows(NamedTuple):
    """A rule, and what it needs to know of each leaf.

    Attributes:
        rule: static.
        data: from the path of each leaf to a tree of arrays, of the shape of the leaf or
            scalars.
        innermost: static. From the paths of some leaves to the axis whose entries must be
            neighbouring rows.
    """

    rule: RowRule
    data: Mapping[str, Any]
    innermost: Mapping[str, int]
