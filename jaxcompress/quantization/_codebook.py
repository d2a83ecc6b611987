"""Learned codebooks: the shared values are trained by the gradient."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import _check, tree
from jaxcompress._sharding import automatic
from jaxcompress._types import PyTree
from jaxcompress.projections import Reparametrization
from jaxcompress.quantization._cluster import Centroids, _assign, _fit
from jaxcompress.quantization._fake import pass_through


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shared:
    """A codebook and what chooses from it: what `learned_codebook` trains in place of a leaf.

    Attributes:
        values: float32, one dimension.
        index: bfloat16 whole numbers, of the shape of the leaf: which value, from 1 on, and 0
            for a weight of exactly zero. They get no gradient, and weight decay rounds to the
            number it started from. None where `weight` chooses.
        weight: the dense weights, which choose the nearest value. None where `index` does.
        dtype: static. That of the leaf.
    """

    values: jax.Array
    index: jax.Array | None
    weight: jax.Array | None
    dtype: np.dtype = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the leaf."""
        return (self.weight if self.index is None else self.index).shape  # pyright: ignore[reportOptionalMemberAccess]

    @property
    def nbytes(self) -> int:
        """Of everything that is trained."""
        return tree.nbytes([self.values, self.index, self.weight])

    def todense(self) -> jax.Array:
        """The chosen values; the gradient of each is the sum of those of its weights."""
        # Rounded before they are chosen: the packed values are then the same ones.
        values = self.values.astype(self.dtype).astype(jnp.float32)
        if self.index is not None:
            index = jax.lax.stop_gradient(self.index)
            return automatic(_chosen, index, values, like_first=True).astype(self.dtype)
        assert self.weight is not None
        fixed = jax.lax.stop_gradient(self.weight)
        shared = automatic(_nearest, fixed, values, like_first=True).astype(self.dtype)
        return pass_through(shared, self.weight, jnp.ones((), self.dtype))

    def at(self, bits: Any) -> jax.Array:
        """As `todense`: a codebook has no bits."""
        del bits
        return self.todense()

    def pack(self, path: str, bits: Any = None) -> Any:
        """Indices and values: `arrays.Codebook`."""
        del bits
        values = jnp.sort(self.values.astype(self.dtype).astype(jnp.float32))
        return Centroids(values).pack(self.todense(), path)


def _chosen(index: jax.Array, values: jax.Array) -> jax.Array:
    place = jnp.maximum(index.astype(jnp.int32) - 1, 0)
    return jnp.where(index == 0, 0.0, values[place])


def _nearest(w: jax.Array, values: jax.Array) -> jax.Array:
    x, rising = w.astype(jnp.float32), jnp.sort(values)
    return jnp.where(x == 0, 0.0, rising[_assign(x, rising)])


def learned_codebook(
    num_values: int,
    *,
    assignments: Literal["fixed", "nearest"] = "fixed",
    iterations: int = 20,
    where: tree.Where = tree.is_weight,
) -> Reparametrization:
    r"""Weights that share a few values, which are trained.

    .. math:: w_i = c_{a_i}, \qquad
        \frac{\partial L}{\partial c_k} = \sum_{i:\, a_i = k} \frac{\partial L}{\partial w_i}

    The values start at the centroids of `jc.cluster`. An exact zero belongs to none: with fixed
    assignments it stays zero, so that a pruned network stays as sparse.

    Args:
        num_values: static. 1 to 255.
        assignments: static. "fixed": those of the start, as in Deep Compression; nothing but
            the values is trained. "nearest": dense weights are trained behind, by the
            straight-through gradient, and each takes the value nearest to it in every step.
        iterations: static. Lloyd's iterations of the start.
        where: static. The leaves to share values in, see `jaxcompress.tree.select`.

    Returns:
        A `Reparametrization` whose latents have `Shared(values, index, weight)` at the chosen
        leaves. `jc.quantization.pack_latents(jc.latent(opt_state))` gives `arrays.Codebook`;
        `jc.quantization.label_latents` labels the values "grid".

    Raises:
        ValueError: `num_values` or `iterations` out of range; `assignments` is another word; no
            leaf is chosen.
        TypeError: a chosen leaf is not real floating point.

    Cost: a look-up per weight, with "nearest" a binary search; the memory of half of the
    float32 weights, or of all.

    Examples:
        >>> r = jc.quantization.learned_codebook(2)
        >>> latents = r.init({"w": jnp.array([[1.0, 1.25, 0.0], [-2.0, -2.5, 0.75]])})
        >>> latents["w"].values, r.apply(latents)["w"][1]
        (Array([-2.25,  1.  ], dtype=float32), Array([-2.25, -2.25,  1.  ], dtype=float32))
        >>> opt = jc.reparametrized(optax.adam(1e-3), r)

    Source: Han et al. 2016, arXiv:1510.00149, section 3 and its figure 3; the values start on
    an even spread, the best of its three starts.
    """
    _check.integer("learned_codebook", "num_values", num_values, 1, 255)
    _check.integer("learned_codebook", "iterations", iterations, 0)
    if assignments not in ("fixed", "nearest"):
        rule, got = "be 'fixed' or 'nearest'", repr(assignments)
        raise ValueError(_check.message("learned_codebook", "assignments", rule, got))

    def init(params: PyTree) -> PyTree:
        chosen = tree.select(params, where, function="learned_codebook")
        fit = functools.partial(_fit, size=num_values, iterations=iterations)

        def leaf(path, w, is_chosen):
            if not is_chosen:
                return jnp.asarray(w) if hasattr(w, "dtype") else w
            _check.floating("learned_codebook", "params", w, path)
            w = jnp.asarray(w)
            count = jnp.asarray(num_values, jnp.float32)
            nothing = jnp.full(num_values, jnp.nan, jnp.float32)
            values = automatic(fit, w, count, nothing, like_first=False)
            if assignments == "nearest":
                return Shared(values, None, w, np.dtype(w.dtype))
            index = automatic(_index, w, values, like_first=True)
            return Shared(values, index, None, np.dtype(w.dtype))

        return tree.map_with_path(leaf, params, chosen)

    def apply(latents: PyTree) -> PyTree:
        return tree.map_with_path(lambda _, z: z.todense() if isinstance(z, Shared) else z, latents)

    return Reparametrization(init, apply)


def _index(w: jax.Array, values: jax.Array) -> jax.Array:
    x = w.astype(jnp.float32)
    return jnp.where(x == 0, 0, _assign(x, values) + 1).astype(jnp.bfloat16)
