"""The diagonal of the Hessian as a score, and Taylor scores of whole units."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress import _check, _keys, tree
from jaxcompress._dtypes import wide
from jaxcompress._types import PyTree
from jaxcompress.pruning._groups import total
from jaxcompress.pruning._sensitivity import Loss, combined, mean_of, parts_of
from jaxcompress.pruning.structured._base import Dependencies
from jaxcompress.pruning.structured._unit_scores import is_trained, unit_scores


def hessian_diagonal(
    loss: Loss, params: PyTree, batches: Iterable[Any], *, key: jax.Array, samples: int = 8
) -> PyTree:
    r"""The saliency of optimal brain damage, with an estimate of the Hessian's diagonal.

    .. math:: \tfrac12\, w^2 h, \qquad h = \mathbb{E}\,[z \odot H z], \quad z_i = \pm 1

    Args:
        loss: as in `jc.pruning.snip`.
        params: as in `jc.pruning.snip`.
        batches: as in `jc.pruning.snip`.
        key: a `jax.random.key`. May be traced. Each leaf, batch and sample draws its own signs.
        samples: static. How many z of each batch. The estimate is exact where H is diagonal;
            elsewhere its variance is :math:`2 \sum_{j \ne i} H_{ij}^2` over the number of samples.

    Returns:
        A tree of scores, as of `jc.pruning.snip`. Of either sign: below zero where the loss curves
        down, or the estimate is noise. For units: `norm=jc.pruning.total`.

    Raises:
        TypeError: as `jc.pruning.snip`, or `key` is none.
        ValueError: as `jc.pruning.snip`, or `samples` below 1.

    Cost: for each sample of each batch a product of the Hessian with a vector, forward over
    reverse: three to four gradients. Memory: three.

    Examples:
        >>> loss = lambda p, a: 0.5 * jnp.sum(a * p["w"] ** 2)
        >>> params, batches = {"w": jnp.array([1.0, 2.0])}, [jnp.array([3.0, 0.5])]
        >>> jc.pruning.hessian_diagonal(loss, params, batches, key=jax.random.key(0))
        {'w': Array([1.5, 1. ], dtype=float32)}

    Source: LeCun et al. 1989, "Optimal brain damage"; Bekas et al. 2007, "An estimator for the
    diagonal of a matrix"; Yao et al. 2021, arXiv:2006.00719, section 3.1 has it with signs.
    """
    _check.key("hessian_diagonal", key)
    _check.integer("hessian_diagonal", "samples", samples, 1)
    parts = parts_of("hessian_diagonal", loss, params)
    paths: list[str] = []
    tree.map_arrays_with_path(lambda path, _: paths.append(path), params)

    def curvature(loss_of, weights, numbered):
        number, batch = numbered
        gradient = jax.grad(lambda w: loss_of(w, batch))

        def sample(i, sums):
            signs = [
                None if w is None else _signs(key, path, number * samples + i.astype(jnp.uint32), w)
                for path, w in zip(paths, weights, strict=True)
            ]
            product = jax.jvp(gradient, (weights,), (signs,))[1]
            return jax.tree.map(lambda s, z, hz: s + wide(z) * wide(hz), sums, signs, product)

        zeros = jax.tree.map(lambda w: jnp.zeros_like(wide(w)), weights)
        return float(samples), jax.lax.fori_loop(0, samples, sample, zeros)

    numbered = ((jnp.uint32(i), batch) for i, batch in enumerate(batches))
    found = mean_of("hessian_diagonal", parts, numbered, curvature)
    return combined(parts, found, lambda w, h: 0.5 * jnp.square(w) * h)


def _signs(key: jax.Array, path: str, number: Any, w: jax.Array) -> jax.Array:
    bits = jax.random.bernoulli(_keys.of_leaf(key, path, number), shape=w.shape)
    return jnp.where(bits, jnp.ones_like(w), -jnp.ones_like(w))


def unit_taylor(
    dependencies: Dependencies,
    loss: Loss,
    params: PyTree,
    batches: Iterable[Any],
    *,
    leaves: tree.Where = is_trained,
) -> dict[str, jax.Array]:
    r"""The squared first-order change of the loss without a unit, all its weights together.

    .. math:: S_u = \overline{\Big(\sum_{w \in W(u)} w\,
        \frac{\partial L}{\partial w}\Big)^2}

    with the mean over batches. Within a unit changes of either sign add up, which they do not in
    `unit_scores` of `jc.pruning.taylor`, a sum of squares.

    Args:
        dependencies: static. From `jc.dependencies`.
        loss: as in `jc.pruning.snip`.
        params: as in `jc.pruning.snip`.
        batches: as in `jc.pruning.snip`.
        leaves: static. Which leaves count, as in `unit_scores`. Of a channel followed by a
            normalization its scale alone is the paper's gate: `"**/scale"`.

    Returns:
        Scores for `jc.select(…, scores=…)`, as of `unit_scores`.

    Raises:
        TypeError: as `jc.pruning.snip` and `unit_scores`.
        ValueError: the same.

    Cost: one gradient a batch, under `jit`, compiled once for each shape of batch.

    Examples:
        >>> apply = lambda p, x: (x @ p["a"]) @ p["b"]
        >>> params = {"a": jnp.array([[1.0, 1.0]]), "b": jnp.array([[2.0], [0.5]])}
        >>> groups = jc.dependencies(apply, params, jnp.ones((1, 1)))
        >>> loss = lambda p, x: jnp.sum(apply(p, x))
        >>> jc.pruning.unit_taylor(groups, loss, params, [jnp.ones((1, 1))])
        {'a[1]': Array([16.,  1.], dtype=float32)}

    Source: Molchanov et al. 2019, arXiv:1906.10771, equation 8 with sums over a set of weights.
    """
    parts = parts_of("unit_taylor", loss, params)

    def squared(loss_of, weights, batch):
        gradient = jax.grad(loss_of)(weights, batch)
        changes = jax.tree.map(lambda w, g: wide(w) * wide(g), weights, gradient)
        changes = jax.tree.unflatten(parts.treedef, changes)
        whole = jax.tree.unflatten(
            parts.treedef,
            [o if w is None else w for w, o in zip(weights, parts.others, strict=True)],
        )
        sums = unit_scores(dependencies, whole, score=changes, norm=total, leaves=leaves)
        return 1.0, {name: jnp.square(x) for name, x in sums.items()}

    return dict(mean_of("unit_taylor", parts, batches, squared))  # pyright: ignore
