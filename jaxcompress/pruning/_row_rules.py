"""Pruning in the space of outputs: which weights of a block of rows live."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress import tree
from jaxcompress._types import PyTree
from jaxcompress.projections import RowRule, Rows
from jaxcompress.pruning._masks import Mask
from jaxcompress.pruning._nm import keep_n_of_m
from jaxcompress.pruning._select import largest


def _choose_by_cost(keep, rows, diagonal, start, features):
    """As many as `keep` has, spread evenly over the blocks: those whose loss costs most."""
    total = jnp.sum(keep, dtype=jnp.uint32)

    def share(end: Any) -> jax.Array:
        part = jnp.asarray(end, jnp.float32) / features
        rounded = jnp.round(total.astype(jnp.float32) * part).astype(jnp.uint32)
        return jnp.where(end >= features, total, jnp.minimum(rounded, total))

    count = share(start + rows.shape[0]) - share(jnp.asarray(start))
    return largest(_costs(rows, diagonal), count)


def _choose_given(keep, rows, diagonal, start, features):
    del diagonal, features
    return lax.dynamic_slice_in_dim(keep, start, rows.shape[0])


def _mask_row(row: jax.Array, keep: jax.Array, i: jax.Array) -> jax.Array:
    mine = lax.dynamic_index_in_dim(keep, i, keepdims=False)
    return jnp.where(mine, row, jnp.zeros_like(row))


def _costs(rows: jax.Array, diagonal: jax.Array) -> jax.Array:
    return jnp.square(rows / diagonal[:, None])


by_cost = RowRule(_choose_by_cost, _mask_row)
"""As many weights of each block as a mask has on average: SparseGPT."""

given = RowRule(_choose_given, _mask_row)
"""The weights of a mask."""


@functools.cache
def n_of_m(n: int, m: int) -> RowRule:
    """The n of each m rows whose loss costs most."""

    def choose(keep, rows, diagonal, start, features):
        del keep, start, features
        return keep_n_of_m(_costs(rows, diagonal), n, m=m, axis=0)

    return RowRule(choose, _mask_row, group=m)


def mask_rows(rule: RowRule, params: PyTree, masks: PyTree, innermost: Mapping[str, int]) -> Rows:
    """The rule, for what the masks keep or for as much of it."""
    keeps: dict[str, jax.Array] = {}
    held: dict[str, Mask] = {}

    def leaf(path, w, mask):
        keeps[path], held[path] = mask.keep_like(w), mask

    def structure(path: str, keep: jax.Array) -> Mask:

        return dataclasses.replace(held[path], bits=Mask.of(keep).bits)

    tree.map_arrays_with_path(leaf, params, masks)
    return Rows(rule, keeps, innermost, structure=structure)
