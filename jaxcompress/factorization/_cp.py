"""Canonical polyadic decomposition of a kernel by alternating least squares."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import arrays
from jaxcompress._products import product
from jaxcompress._sharding import automatic
from jaxcompress.factorization import _lapack as lapack
from jaxcompress.factorization._basis import as_matrix
from jaxcompress.factorization._decompose import decompose
from jaxcompress.factorization._tucker import leading

_PULL = 1e-5  # towards the factor before, of unit columns
_DEPENDENT = 1e-5  # eigenvalues of the correlations of columns that are no direction


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CP:
    """The factors of a kernel but that of its outputs, which follows by least squares.

    Attributes:
        spatial: float32 `[size, rank]` for each spatial axis; zero columns beyond the rank.
        inputs: float32 `[in, rank]`, likewise.
        mix: float32 `[rank, rank]`: the Khatri-Rao product of the factors times it has
            orthonormal columns, or zeros.
    """

    spatial: tuple[jax.Array, ...]
    inputs: jax.Array
    mix: jax.Array

    def project(self, w: jax.Array) -> jax.Array:
        """The orthogonal projection on the span of the Khatri-Rao product."""

        def projected(w, *held):
            q, _ = _basis(*held)
            matrix = as_matrix(w)
            return product(q, product(q.T, matrix)).reshape(w.shape).astype(w.dtype)

        return automatic(projected, w, self.mix, self.inputs, *self.spatial, like_first=True)

    def pack(self, w: Any, path: str) -> arrays.ConvChain:
        """A 1x1 convolution, one of each feature along each axis, and a 1x1 one."""
        del path
        dense = arrays.todense(w)
        q, mix = _basis(self.mix, self.inputs, *self.spatial)
        outputs = product(mix, product(q.T, as_matrix(dense)))
        live = (np.asarray(self.inputs) != 0).any(axis=0)
        first, last = self.inputs[:, live], outputs[live]
        rank, ones = int(live.sum()), [1] * len(self.spatial)
        stages, groups = [], [1]
        for axis, factor in enumerate(self.spatial):
            factor = factor[:, live]
            if factor.shape[0] == 1:
                first = first * factor
                continue
            shape = [*ones, 1, rank]
            shape[axis] = factor.shape[0]
            stages.append(factor.reshape(shape))
            groups.append(rank)
        stages = [first.reshape(*ones, *first.shape), *stages, last.reshape(*ones, *last.shape)]
        return arrays.conv_chain([x.astype(dense.dtype) for x in stages], [*groups, 1])


def cp(w: jax.Array, limit: int, rank: jax.Array, iterations: int) -> CP:
    """The best of three: the largest terms of the places, and two alternating descents.

    One starts there, the other from the singular vectors along each axis.

    Args:
        w: a kernel in float32.
        limit: static. The columns of the factors.
        rank: how many of them to keep.
        iterations: static. Updates of every factor.
    """
    limit = max(limit, 1)  # of rank 0 a column of zeros
    live = (jnp.arange(limit, dtype=jnp.float32) < rank).astype(w.dtype)
    largest = jnp.max(jnp.abs(w), initial=0.0)
    sound = jnp.isfinite(largest)
    w = w / jnp.where(largest > 0, largest, 1.0)
    greedy = _by_place(w, limit)
    starts = [[f * live[None, :] for f in factors] for factors in (greedy, _by_side(w, limit))]
    both = jax.tree.map(lambda *x: jnp.stack(x), *starts)
    ends = jax.vmap(lambda factors: _descend(w, factors, iterations))(both)
    found = jax.tree.map(lambda x, y: jnp.concatenate([x[None], y]), starts[0], ends)
    held = jax.vmap(lambda factors: _held(factors[:-1]))(found)
    loss = jax.vmap(lambda cp: jnp.sum(jnp.square(w - cp.project(w))))(held)
    best = jnp.argmin(jnp.where(jnp.isnan(loss), jnp.inf, loss))
    chosen = jax.tree.map(lambda x: x[best], held)
    return dataclasses.replace(chosen, mix=jnp.where(sound, chosen.mix, jnp.nan))


def place_limit(shape: tuple[int, ...]) -> int:
    """A rank at which the decomposition is exact: the full ranks of all places."""
    return math.prod(shape[:-2]) * min(shape[-2:])


def _by_place(w: jax.Array, limit: int) -> list[jax.Array]:
    """The largest singular triplets of the matrices at each place: exact at `place_limit`."""
    *spatial, inputs, outputs = w.shape
    places = math.prod(spatial)
    found = decompose(w.reshape(places, inputs, outputs), None)
    count = found.s.shape[-1]
    order = jnp.argsort(-found.s.reshape(places * count))[:limit]
    u = jnp.moveaxis(found.u, 1, 0).reshape(inputs, places * count)[:, order]
    vt = found.vt.reshape(places * count, outputs)[order].T
    at = jnp.unravel_index(order // max(count, 1), spatial)
    units = [jax.nn.one_hot(i, n, axis=0, dtype=w.dtype) for i, n in zip(at, spatial, strict=True)]
    factors = [*units, u, vt * found.s.reshape(places * count)[order][None, :]]
    # More columns than there are terms stay zero.
    return [jnp.pad(f, ((0, 0), (0, limit - f.shape[1]))) for f in factors]


def _by_side(w: jax.Array, limit: int) -> list[jax.Array]:
    """The leading singular vectors along each axis, and beyond those random columns."""
    factors = []
    for axis, key in enumerate(jax.random.split(jax.random.key(0), w.ndim)):
        size = w.shape[axis]
        vectors = leading(w, axis, limit, "gram").u
        drawn = jax.random.normal(key, (size, max(limit - size, 0)), w.dtype)
        factors.append(jnp.concatenate([vectors, drawn / math.sqrt(size)], axis=1))
    return factors


def _descend(w: jax.Array, factors: list[jax.Array], iterations: int) -> list[jax.Array]:
    """Alternating least squares, each near the factor before, so that the loss never grows."""
    last = w.ndim - 1

    def sweep(_, factors):
        del _
        # What all but the last update share: the one large product beside that of the last.
        onto = product(w, _unit(factors[last]))
        for axis in range(last):
            aim = onto
            for other in reversed(range(last)):
                if other != axis:
                    shape = [1] * last + [aim.shape[-1]]
                    shape[other] = aim.shape[other]
                    factor = _unit(factors[other]).reshape(shape)
                    aim = jnp.sum(aim * factor, axis=other, keepdims=True)
            factors = _updated(factors, axis, aim.reshape(factors[axis].shape))
        k = khatri_rao([_unit(f) for f in factors[:last]])
        return _updated(factors, last, product(as_matrix(w).T, k))

    return jax.lax.fori_loop(0, iterations, sweep, factors)


def _updated(factors: list[jax.Array], axis: int, aim: jax.Array) -> list[jax.Array]:
    """The factors with one of them new, and the lengths of the others in it.

    `aim` is the kernel times the Khatri-Rao product of the others, of unit columns.
    """
    others = [f for i, f in enumerate(factors) if i != axis]
    before = factors[axis] * functools.reduce(jnp.multiply, map(_norms, others))
    others = [_unit(f) for f in others]
    gram = functools.reduce(jnp.multiply, [product(f.T, f) for f in others])
    pull = max(_PULL, 8 * gram.shape[0] * float(jnp.finfo(gram.dtype).eps))
    # A column without a length has no update, and stays zero.
    ridge = jnp.where(jnp.diagonal(gram) > 0, pull, 1.0)
    gram = gram + jnp.eye(gram.shape[0], dtype=gram.dtype) * ridge[None, :]
    root = jnp.linalg.cholesky(gram)
    new = jax.scipy.linalg.cho_solve((root, True), (aim + pull * before).T).T
    # A step that fails is not taken.
    new = jnp.where(jnp.all(jnp.isfinite(new)), new, before)
    return [*others[:axis], new, *others[axis:]]


def khatri_rao(factors: list[jax.Array]) -> jax.Array:
    """The columns are the products of the columns of the factors, flat in their order."""
    out = factors[0]
    for factor in factors[1:]:
        rank = out.shape[1]
        out = (out[:, None, :] * factor[None]).reshape(out.shape[0] * factor.shape[0], rank)
    return out


def _held(factors: list[jax.Array]) -> CP:
    *spatial, inputs = [_unit(f) for f in factors]
    k = khatri_rao([*spatial, inputs])
    gram = product(k.T, k)
    values, vectors = lapack.eigh(gram)
    noise = max(_DEPENDENT, gram.shape[0] * float(jnp.finfo(k.dtype).eps))
    noise = noise * jnp.max(values, initial=0.0)
    root = jnp.where(values > noise, jax.lax.rsqrt(jnp.maximum(values, noise)), 0.0)
    mix = vectors * root[None, :]
    return CP(tuple(spatial), inputs, product(mix, _refining(product(k, mix))))


def _basis(mix: jax.Array, inputs: jax.Array, *spatial: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Orthonormal columns of the same span to the last digits, and what mixes them."""
    k = khatri_rao([*spatial, inputs])
    q = product(k, mix)
    refining = _refining(q)
    return product(q, refining), product(mix, refining)


def _refining(q: jax.Array) -> jax.Array:
    """Newton's step towards orthonormal columns, from the right; zero ones stay zero."""
    return 1.5 * jnp.eye(q.shape[1], dtype=q.dtype) - 0.5 * product(q.T, q)


def _norms(factor: jax.Array) -> jax.Array:
    return jnp.linalg.norm(factor, axis=0, keepdims=True)


def _unit(factor: jax.Array) -> jax.Array:
    size = _norms(factor)
    return factor / jnp.where(size > 0, size, 1.0)
