"""Scores: how much each weight matters. The largest scores live."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress import _check, _keys, tree
from jaxcompress._dtypes import wide
from jaxcompress._sharding import automatic, place_like
from jaxcompress._types import Numeric, PyTree
from jaxcompress.projections import number_at


class RunningScore(NamedTuple):
    """A score of what was seen over many updates: three pure functions of one leaf.

    `jc.prune` holds its statistic next to the mask, in the state of `jc.projected` or
    `jc.straight_through`; it is updated at every applied update, also while `jc.every` holds
    the mask.

    Attributes:
        init: `w -> statistic`, a tree of arrays.
        update: `(statistic, w, grad, step) -> statistic` of the same types; `w` and `grad` are
            those before the update.
        score: `(statistic, w) -> scores`, the shape of `w`; the largest live.

    Examples:
        How often a gradient pointed away from zero:

        >>> away = jc.pruning.RunningScore(
        ...     init=lambda w: jnp.zeros(w.shape, jnp.float32),
        ...     update=lambda s, w, g, step: s - jnp.sign(w * g).astype(jnp.float32),
        ...     score=lambda s, w: s,
        ... )
        >>> opt = jc.projected(optax.adam(1e-3), jc.every(100, jc.prune(0.5, score=away)))
    """

    init: Callable[[jax.Array], Any]
    update: Callable[..., Any]
    score: Callable[[Any, jax.Array], jax.Array]


Score = Callable[..., PyTree] | RunningScore | PyTree
"""What `jc.prune` ranks by: a function `(params, *, grads=None, step=0) -> scores`, a
`RunningScore`, or the scores themselves, a tree of arrays with the paths of the params."""


def magnitude(params: PyTree, *, grads: PyTree = None, step: Any = 0) -> PyTree:
    r"""The absolute value of each weight, :math:`|w|`.

    Args:
        params: a tree of real floating-point arrays.
        grads: not used.
        step: not used.

    Returns:
        The tree of scores.

    Raises:
        TypeError: a leaf is not real floating point; raised while tracing.

    Examples:
        >>> jc.pruning.magnitude({"w": jnp.array([-2.0, 1.0])})
        {'w': Array([2., 1.], dtype=float32)}

    Source: Han et al. 2015, arXiv:1506.02626.
    """
    del grads, step

    def leaf(path, w):
        _check.floating("prune", "params", w, path)
        return jnp.abs(w)

    return tree.map_arrays_with_path(leaf, params)


def saliency(params: PyTree, *, grads: PyTree = None, step: Any = 0) -> PyTree:
    r"""The first-order change of the loss when a weight goes, :math:`|w\,\partial L/\partial w|`.

    The gradient is the one that the optimizer gets at the update that finds the mask. For
    gradients of many batches see `jc.pruning.snip`, or a `RunningScore`.

    Args:
        params: a tree of real floating-point arrays.
        grads: the same tree of gradients, as `jc.projected` hands them on.
        step: not used.

    Returns:
        The tree of scores, in float32 or wider.

    Raises:
        ValueError: there are no gradients, as in `jc.compress`.

    Examples:
        >>> jc.pruning.saliency({"w": jnp.array([-2.0, 1.0])}, grads={"w": jnp.array([1.0, 3.0])})
        {'w': Array([2., 3.], dtype=float32)}

    Source: Mozer & Smolensky 1988; Molchanov et al. 2017, arXiv:1611.06440, equation 7.
    """
    del step
    if grads is None:
        raise ValueError(
            _check.message(
                "saliency",
                "grads",
                "be given",
                "None",
                "Use it in jc.projected, or pass scores computed before, as jc.pruning.snip's.",
            )
        )

    def leaf(path, w, g):
        _check.floating("prune", "params", w, path)
        return jnp.abs(wide(w) * wide(g))

    return tree.map_arrays_with_path(leaf, params, grads)


def random(key: jax.Array) -> Callable[..., PyTree]:
    """Scores drawn uniformly: the baseline that every other score has to beat.

    Args:
        key: a `jax.random.key`. May be traced. Each leaf folds in its path, and each step its
            number, so the draw depends on neither the other leaves nor their order.

    Returns:
        A score for `jc.prune`. Hold its mask by `jc.every(1, …, begin=0, end=0)` for static
        random sparsity.

    Raises:
        TypeError: `key` is none.

    Examples:
        >>> p = jc.prune(0.5, score=jc.pruning.random(jax.random.key(0)))
        >>> int((jc.compress(p, {"w": jnp.ones((4, 4))})["w"] == 0).sum())
        8
    """
    _check.key("random", key)

    def scores(params, *, grads=None, step=0):
        del grads

        def leaf(path, w):
            _check.floating("prune", "params", w, path)
            return uniform_like(key, path, w, step)

        return tree.map_arrays_with_path(leaf, params)

    return scores


def uniform_like(key: jax.Array, path: str, w: jax.Array, step: Any) -> jax.Array:
    """A number in [0, 1) for each weight of the leaf at `path`, other ones at each step."""
    own = _keys.of_leaf(key, path, step)
    return place_like(jax.random.uniform(own, w.shape, jnp.float32), w)


def lamp(params: PyTree, *, grads: PyTree = None, step: Any = 0) -> PyTree:
    r"""Layer-adaptive magnitude: comparable between leaves, for a global scope.

    .. math:: \mathrm{score}(u) = w_u^2 \Big/ \sum_{v:\, |w_v| \ge |w_u|} w_v^2

    Inside of a leaf the order is that of magnitudes. The largest weight of a leaf that is not
    all zero scores 1, so no leaf goes before its last weight is compared with all others.

    Args:
        params: a tree of real floating-point arrays. Of equal magnitudes the later one in C
            order scores lower, as in the paper.
        grads: not used.
        step: not used.

    Returns:
        The tree of scores, in float32 or wider. Zeros and NaN score 0.

    Raises:
        TypeError: a leaf is not real floating point; raised while tracing.

    Cost: one sort of each leaf, the only score that needs it: seconds for 16M weights on a
    CPU.

    Examples:
        >>> jc.pruning.lamp({"w": jnp.array([1.0, -2.0])})["w"]
        Array([0.2, 1. ], dtype=float32)
        >>> p = jc.prune(0.9, score=jc.pruning.lamp, scope="global")

    Source: Lee et al. 2021, arXiv:2010.07611, equation 5.
    """
    del grads, step

    def leaf(path, w):
        _check.floating("prune", "params", w, path)
        return automatic(_lamp, w, like_first=True)

    return tree.map_arrays_with_path(leaf, params)


def _lamp(w: jax.Array) -> jax.Array:
    magnitudes = jnp.nan_to_num(jnp.abs(wide(w)), nan=0.0).reshape(w.size)
    if w.size == 0:
        return jnp.zeros(w.shape, magnitudes.dtype)
    # Scaled, or squares of tiny or huge weights leave the range of float32.
    top = jnp.max(magnitudes)
    squares = (magnitudes / jnp.where(top > 0, top, jnp.ones_like(top))) ** 2
    falling = jnp.argsort(-squares, stable=True)
    ranked = squares[falling]
    ratios = ranked / jnp.maximum(jnp.cumsum(ranked), jnp.finfo(ranked.dtype).tiny)
    return jnp.zeros_like(ratios).at[falling].set(ratios).reshape(w.shape)


def movement(scale: Numeric = 1.0) -> RunningScore:
    r"""How far training has moved each weight away from zero.

    .. math:: S = -\sum_t \eta_t\, w_t\, \frac{\partial L}{\partial w_t}

    Args:
        scale: :math:`\eta_t`, the weight of an update in the sum, as the learning rate of the
            paper. A number or an Optax schedule; may be traced.

    Returns:
        A `RunningScore`. The paper takes gradients at the pruned weights and adds them to the
        dense ones: that is `jc.straight_through`.

    Examples:
        >>> p = jc.prune(jc.schedules.cubic(0.0, 0.9, 100, 900), score=jc.pruning.movement())
        >>> opt = jc.straight_through(optax.adam(1e-3), jc.every(50, p, begin=100))

    Source: Sanh et al. 2020, arXiv:2005.07683, equation 3 and appendix A.1.
    """

    def update(total, w, grad, step):
        eta = number_at(scale, step).astype(jnp.float32)
        return total - eta * w.astype(jnp.float32) * grad.astype(jnp.float32)

    return RunningScore(_zeros, update, lambda total, w: total)


def running_fisher(decay: Numeric = 0.999) -> RunningScore:
    r"""The diagonal of optimal brain damage from gradients seen in training.

    .. math:: F_t = \beta F_{t-1} + (1 - \beta)\, g_t^2, \qquad
        \mathrm{score} = \tfrac12 w^2 F_t

    Args:
        decay: :math:`\beta`, 0 to 1. A number or an Optax schedule; may be traced.

    Returns:
        A `RunningScore`. All updates of a run share the bias of the moving average towards
        its start at zero, so it does not change the order.

    Examples:
        >>> p = jc.prune(0.9, score=jc.pruning.running_fisher(0.99), scope="global")
        >>> opt = jc.projected(optax.adam(1e-3), jc.every(100, p, begin=500))

    Source: LeCun et al. 1989, "Optimal brain damage", with the empirical Fisher of Theis et
    al. 2018, arXiv:1801.05787. Differs: gradients of batches, averaged over updates.
    """
    _check.numeric("running_fisher", "decay", decay, 0, 1)

    def update(mean, w, grad, step):
        del w
        beta = number_at(decay, step).astype(jnp.float32)
        return mean + (1 - beta) * (jnp.square(grad.astype(jnp.float32)) - mean)

    def score(mean, w):
        return 0.5 * jnp.square(w.astype(jnp.float32)) * mean

    return RunningScore(_zeros, update, score)


def _zeros(w: jax.Array) -> jax.Array:
    return jnp.zeros_like(w, dtype=jnp.float32)
