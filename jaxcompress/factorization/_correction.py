"""The low-rank part of a leaf that another projection has the rest of."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import arrays
from jaxcompress._dtypes import wide
from jaxcompress._sharding import place_like
from jaxcompress.factorization._basis import side_limit
from jaxcompress.factorization._whitened import no_rows, weight_of, whitened_factors
from jaxcompress.projections import Rows


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["u", "v"],
    meta_fields=["put_back", "dtype"],
)
@dataclasses.dataclass(frozen=True)
class Correction:
    """The low-rank part of a leaf, taken off before the base projection or put back after it.

    Attributes:
        u: `[*shape[:-1], r]`, zero columns beyond the rank.
        v: `[r, shape[-1]]`.
        put_back: static. Which of the two.
        dtype: static. That of the leaf; in between it is float32 or wider.
    """

    u: jax.Array
    v: jax.Array
    put_back: bool
    dtype: np.dtype

    def project(self, w: jax.Array) -> jax.Array:
        """The leaf without the correction, in float32 or wider; or with it, rounded once."""
        low = arrays.LowRank(wide(self.u), wide(self.v)).todense()
        low, w = place_like(low, w), wide(w)
        return (w + low).astype(self.dtype) if self.put_back else w - low

    def pack(self, w: Any, path: str) -> Any:
        """A compressed base with the factors, where that is smaller; else dense."""
        del path
        if not self.put_back or not arrays.is_compressed(w):
            return self.project(arrays.todense(w))
        live = np.flatnonzero((np.asarray(self.v) != 0).any(axis=1))
        base = w if w.dtype == self.dtype else arrays.cast(w, self.dtype)
        if not live.size:
            return base
        packed = arrays.add(base, arrays.LowRank(self.u[..., live], self.v[live]))
        small = packed.nbytes < packed.size * np.dtype(self.dtype).itemsize
        return packed if small else self.project(w.todense())


def correcting_rows(
    dense: Mapping[str, jax.Array], rank: jax.Array, columns: int | None
) -> tuple[Rows, Rows]:
    """What `jc.compress(…, stats=…)` does before and after the base has projected the leaves.

    Before it nothing; after it the leaf gets the factors by which the outputs of what the base
    has lost change least. Structures are asked for at the end, when both know the factors.
    """
    found: dict[str, tuple[jax.Array, jax.Array]] = {}

    def before(path, w, *_):
        return w, None

    def after(path, s, gram, layout, several):
        del several
        w, weight = dense[path], weight_of("compress", path, gram, layout)
        # Where the leaf is NaN the base left zero, and the decomposition reads zero.
        lost = w.astype(jnp.float32) - wide(s)
        u, v = whitened_factors(lost, weight, rank, layout, side_limit(w.shape, columns))
        u = u.reshape((*w.shape[:-1], u.shape[-1])).astype(w.dtype)
        found[path] = u, v.astype(w.dtype)
        return correction(path, True).project(s), None

    def correction(path: str, put_back: bool) -> Correction:
        return Correction(*found[path], put_back, np.dtype(dense[path].dtype))

    def rows(whole, put_back: bool) -> Rows:
        return Rows(
            no_rows,
            dense,
            {},
            structure=lambda path, _: correction(path, put_back),
            whole=whole,
            joins=True,
        )

    return rows(before, False), rows(after, True)
