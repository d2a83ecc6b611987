"""What a projection tells the solvers: how the rows of a layer are projected in turn."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax


class RowRule(NamedTuple):
    """How the rows of a layer's matrix `[features, outputs]` are projected, block by block.

    Attributes:
        choose: `(data, rows, diagonal, start, features) -> structure`, as for
            `jc.solvers.compensate`; `data` is what `Rows` holds for the leaf, as a matrix that
            is filled up to whole blocks, and `features` the number of true rows. In a chain
            `rows` are those that the rules before it left.
        project: `(row, structure, i) -> row`.
        group: static. Blocks must be whole multiples of as many rows; None: of any.
    """

    choose: Callable[..., Any]
    project: Callable[[jax.Array, Any, jax.Array], jax.Array]
    group: int | None = None


class Features(NamedTuple):
    r"""Other input features, in which a leaf is projected: an invertible map T of its rows.

    Attributes:
        there: `w -> T w`, of the leaf.
        back: `v -> T^-1 v`.
        gram: `(gram, layout) -> T^-T gram T^-1`, of the matrices `[…, features, features]` whose
            rows are those of the `jc.solvers.Layout`.
    """

    there: Callable[[jax.Array], jax.Array]
    back: Callable[[jax.Array], jax.Array]
    gram: Callable[[jax.Array, Any], jax.Array]


class Rows(NamedTuple):
    """A rule, and what it needs to know of each leaf.

    Attributes:
        rule: static.
        data: from the path of each leaf to a tree of arrays, of the shape of the leaf or
            scalars.
        innermost: static. From the paths of some leaves to the axis whose entries must be
            neighbouring rows.
        structure: `(path, chosen) -> structure` of the leaf, from what `choose` returned, put
            together: arrays `[rows, outputs]` have the shape of the leaf; those with fewer
            rows, of groups, are shorter along its innermost axis; scalars are of the first
            block. None: it can't tell, and `jc.compress(…, return_structure=True)` refuses it.
        otherwise: `() -> Rows`, for leaves whose rows can't be taken in groups one after the
            other, since they are in another order, or lie along another axis. None: they must.
        features: from the paths of some leaves to the features that `data` was found in.
        whole: `(path, w, gram, layout, statistics) -> (w, chosen)`, of leaves that are projected
            as a whole instead of row by row, as those of low rank: `rule` is not used then.
            `statistics` are those of all sites, whose Gram matrices `gram` sums.
        joins: static. Whether a `whole` may stand beside other rules of the leaf; `structure` is
            then asked for when all are through.
    """

    rule: RowRule
    data: Mapping[str, Any]
    innermost: Mapping[str, int]
    structure: Callable[[str, Any], Any] | None = None
    otherwise: "Callable[[], Rows] | None" = None
    features: Mapping[str, Features] | None = None
    whole: Callable[[str, jax.Array, jax.Array, Any, Any], tuple[jax.Array, Any]] | None = None
    joins: bool = False
