"""Gradients that conflict or differ in size: projection, gating by the cosine, balanced norms.

All three are linear combinations of the gradients, whose coefficients depend only on their
products with one another: a few reductions and one sum, of any number of gradients.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress import _check
from jaxcompress._types import Numeric
from jaxcompress.distillation._combine import (
    Combination,
    add,
    common_dtype,
    of_floating,
    scale,
)
from jaxcompress.projections import number_at


class NormState(NamedTuple):
    """State of `norm_balanced` with `decay`: the averaged norms, [1 or leaves, gradients]."""

    norms: jax.Array


class _Products(NamedTuple):
    """Of some leaves: each gradient's power of two, and the products of what that leaves.

    `sizes[k]` is near the largest entry of gradient k, `gram[i, j]` the product of gradients i
    and j over `sizes[i] * sizes[j]`: no product overflows, nor do they all underflow.
    """

    sizes: jax.Array
    gram: jax.Array


def pcgrad(*, key: jax.Array | None = None, per_leaf: bool = False) -> Combination:
    r"""Takes from each gradient what goes against another one, then adds them up.

    .. math:: g = \sum_i g_i', \qquad g_i' \leftarrow g_i' -
        \frac{\min(0,\, g_i' \cdot g_j)}{\|g_j\|^2}\, g_j
        \quad \text{for each } j \ne i \text{ in turn, from } g_i' = g_i

    Of two gradients the result depends on no order: both are projected on what is orthogonal
    to the other as it came. It never goes against either of the two.

    Args:
        key: a `jax.random.key`, used for three gradients or more: each of them then meets the
            others in a random order of its own, anew at each step. May be traced. None: in the
            order in which they are given, the same for all.
        per_leaf: static. Whether conflicts are found and removed leaf by leaf, as if each were
            a problem of its own, or for all parameters as one vector.

    Returns:
        A `Combination` without state. Without a conflict it is the sum to the last bit. A
        gradient of zeros changes nothing; one that is not finite makes the result not finite.

    Raises:
        TypeError: `key` is no key.

    Cost: for K gradients a maximum of each, K (K + 1) / 2 products, and one sum.

    Examples:
        >>> task, teacher = jnp.array([1.0, 0.0]), jnp.array([-1.0, 1.0])
        >>> jc.distillation.pcgrad().update((task, teacher), ())[0]
        Array([0.5, 1.5], dtype=float32)

    Source: Yu et al. 2020, arXiv:2001.06782, algorithm 1. Differs: a random order only with
    `key`; per leaf is ours.
    """
    if key is not None:
        _check.key("pcgrad", key)

    def update(gradients, state, params, step):
        del params
        count = len(gradients)
        order = jnp.broadcast_to(jnp.arange(count), (count, count))
        if key is not None and count > 2:
            now = jax.random.fold_in(key, jnp.asarray(step).astype(jnp.uint32))
            order = jax.random.permutation(now, order, axis=1, independent=True)

        def coefficients(products):
            projected = _without_conflicts(products.gram, order)
            return jnp.sum(products.sizes[:, None] * projected, 0) / products.sizes

        return _combined(gradients, per_leaf, coefficients), state

    return of_floating("pcgrad", lambda *_: (), update)


def cosine_gated(*, proportional: bool = True, per_leaf: bool = False) -> Combination:
    r"""Lets the other gradients count only as far as they point where the task's does.

    .. math:: g = g_1 + \sum_{k > 1} \max\Bigl(0,\,
        \frac{g_1 \cdot g_k}{\|g_1\|\,\|g_k\|}\Bigr)\, g_k

    Every stationary point of the training is then one of the task's loss.

    Args:
        proportional: static. Whether a gradient is weighted by its cosine, as above, or taken
            whole where the cosine is above 0.
        per_leaf: static. Whether each leaf has a cosine of its own, or all parameters have one.

    Returns:
        A `Combination` without state. Where the task's gradient or the other one is zero, the
        cosine counts as 0.

    Cost: for K gradients a maximum of each, K (K + 1) / 2 products, and one sum.

    Examples:
        >>> gate = jc.distillation.cosine_gated()
        >>> task = jnp.array([3.0, 4.0])
        >>> gate.update((task, jnp.array([0.0, 5.0])), ())[0].round(2)
        Array([3., 8.], dtype=float32)
        >>> gate.update((task, jnp.array([0.0, -5.0])), ())[0]
        Array([3., 4.], dtype=float32)

    Source: Du et al. 2018, arXiv:1812.02224, the weighted version; with `proportional=False`
    the unweighted one. Differs: nothing is added where the cosine is 0; per leaf is ours.
    """

    def coefficients(products):
        gram = products.gram
        squares = gram[0, 0] * jnp.diagonal(gram)
        some = squares > 0
        cosine = jnp.where(some, gram[0] / jnp.sqrt(jnp.where(some, squares, 1.0)), 0.0)
        others = jnp.clip(cosine, 0.0, 1.0) if proportional else (cosine > 0).astype(gram.dtype)
        return others.at[0].set(1.0)

    def update(gradients, state, params, step):
        del params, step
        return _combined(gradients, per_leaf, coefficients), state

    return of_floating("cosine_gated", lambda *_: (), update)


def norm_balanced(
    ratio: Numeric = 1.0, decay: Numeric | None = None, *, per_leaf: bool = False
) -> Combination:
    r"""Scales the other gradients to the norm of the task's, times a ratio.

    .. math:: g = g_1 + r \sum_{k > 1} \frac{\|g_1\|}{\|g_k\|}\, g_k

    Whatever the units of a loss, its gradient then has a share that `ratio` says. In
    `jc.distill` the `weight` cancels, but for a weight of 0.

    Args:
        ratio: :math:`r \ge 0`: a number, a JAX scalar (maybe traced) or an Optax schedule of
            the step.
        decay: of an exponential moving average of the norms, in [0, 1); the same choice. That
            average starts from zero, which cancels in the quotient. None: the norms of the step.
        per_leaf: static. Whether each leaf has norms of its own, or all parameters have one.

    Returns:
        A `Combination`, without state or, with `decay`, with the state `NormState(norms)`. A
        gradient whose norm, or average, is zero adds nothing, and to a task's gradient of norm
        zero nothing is added.

    Raises:
        TypeError: a number is not a real scalar.
        ValueError: a number is out of range.

    Cost: for K gradients a maximum of each, K (K + 1) / 2 products, and one sum.

    Examples:
        >>> balance = jc.distillation.norm_balanced(ratio=0.5)
        >>> balance.update((jnp.array([2.0, 0.0]), jnp.array([0.0, 1e-3])), ())[0]
        Array([2., 1.], dtype=float32)

    Source: Chen et al. 2018, arXiv:1711.02257 (GradNorm), for the balance of norms. Differs:
    set in each step rather than learned; the average and the ratio are ours.
    """
    _check.numeric("norm_balanced", "ratio", ratio, 0)
    if decay is not None:
        _check.numeric("norm_balanced", "decay", decay, 0, 1)
        if not (callable(decay) or _check.is_traced(decay)) and decay == 1:
            rule, fix = "be below 1", "The average would never begin."
            raise ValueError(_check.message("norm_balanced", "decay", rule, decay, fix))

    def init(params, count):
        if decay is None:
            return ()
        leaves = jax.tree.leaves(params)
        dtype = common_dtype(*[leaf.dtype for leaf in leaves] or [jnp.float32])
        dtype = jnp.finfo(dtype).dtype
        groups = len(leaves) if per_leaf else 1
        return NormState(jnp.zeros((groups, count), dtype))

    def update(gradients, state, params, step):
        del params
        groups = _products(gradients, per_leaf)
        if decay is not None:
            state = _averaged(state, groups, number_at(decay, step))

        def coefficients(group, products):
            if decay is None:
                norms = _norms(products)
            else:
                norms = state.norms[group].astype(products.gram.dtype)
            some = norms > 0
            share = number_at(ratio, step).astype(norms.dtype) * norms[0]
            factors = jnp.where(some, share / jnp.where(some, norms, 1.0), 0.0)
            return factors.at[0].set(1.0)

        found = [coefficients(group, products) for group, products in enumerate(groups)]
        return _sum(gradients, found), state

    return of_floating("norm_balanced", init, update)


def _averaged(state: NormState, groups: list[_Products], decay: jax.Array) -> NormState:
    if not groups:
        return state
    decay = decay.astype(state.norms.dtype)
    norms = jnp.stack([_norms(products) for products in groups]).astype(state.norms.dtype)
    return NormState(decay * state.norms + (1 - decay) * norms)


def _norms(products: _Products) -> jax.Array:
    return products.sizes * _root(jnp.diagonal(products.gram))


def _without_conflicts(gram: jax.Array, order: jax.Array) -> jax.Array:
    """Coefficients of every projected gradient (rows) in the gradients as they came.

    Args:
        gram: products of the gradients, [K, K].
        order: for each gradient the order in which it meets the others; it skips itself.
    """
    count = gram.shape[0]
    rows = jnp.eye(count, dtype=gram.dtype)
    for turn in range(count):
        met = jax.nn.one_hot(order[:, turn], count, dtype=gram.dtype)
        products = jnp.sum(rows[:, :, None] * gram[None, :, :], 1)
        product = jnp.sum(products * met, 1)
        square = jnp.sum(jnp.diagonal(gram)[None, :] * met, 1)
        conflict = (product < 0) & (square > 0) & (jnp.diagonal(met) == 0)
        part = jnp.where(conflict, product / jnp.where(square > 0, square, 1.0), 0.0)
        rows = rows - part[:, None] * met
    return rows


def _combined(gradients, per_leaf, coefficients) -> Any:
    return _sum(gradients, [coefficients(p) for p in _products(gradients, per_leaf)])


def _sum(gradients, coefficients: list[jax.Array]) -> Any:
    """The gradients times their coefficients: one array of these for all leaves, or for each."""
    trees = [jax.tree.flatten(g) for g in gradients]
    count = len(trees[0][0])
    each = coefficients * count if len(coefficients) == 1 else coefficients
    scaled = [
        treedef.unflatten([scale(c[k], leaf) for c, leaf in zip(each, leaves, strict=True)])
        for k, (leaves, treedef) in enumerate(trees)
    ]
    return add(scaled)


def _products(gradients, per_leaf: bool) -> list[_Products]:
    """The products of the gradients on each leaf, or on all leaves; none without leaves."""
    leaves = list(zip(*map(jax.tree.leaves, gradients), strict=True))
    if not leaves:
        return []
    groups = [[each] for each in leaves] if per_leaf else [leaves]
    return [_of_group(group) for group in groups]


def _of_group(group: list[tuple[jax.Array, ...]]) -> _Products:
    count = len(group[0])
    dtype = jnp.finfo(common_dtype(*[leaf[0].dtype for leaf in group])).dtype
    sizes = [_size([leaf[k] for leaf in group], dtype) for k in range(count)]
    gram = [[jnp.zeros((), dtype)] * count for _ in range(count)]
    for leaf in group:
        units = [g / s.astype(g.dtype) for g, s in zip(leaf, sizes, strict=True)]
        for i in range(count):
            for j in range(i + 1):
                # Of complex numbers, as of pairs of real ones.
                product = jnp.sum(jnp.real(jnp.conj(units[i]) * units[j])).astype(dtype)
                gram[i][j] = gram[i][j] + product
    full = [[gram[max(i, j)][min(i, j)] for j in range(count)] for i in range(count)]
    return _Products(jnp.stack(sizes), jnp.stack([jnp.stack(row) for row in full]))


def _size(leaves: list[jax.Array], dtype) -> jax.Array:
    """A power of two near the largest entry, which divides it exactly; 1 for zeros."""
    tops = [jnp.max(jnp.abs(x), initial=0).astype(dtype) for x in leaves]
    _, exponent = jnp.frexp(jax.lax.stop_gradient(jnp.max(jnp.stack(tops))))
    least, most = jnp.finfo(dtype).minexp, jnp.finfo(dtype).maxexp
    return jnp.ldexp(jnp.ones((), dtype), jnp.clip(exponent, least + 1, most - 2))


def _root(x: jax.Array) -> jax.Array:
    """The square root, with a gradient of 0 at 0."""
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1.0)), 0.0)
