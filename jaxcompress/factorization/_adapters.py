"""Adapters as leaves: low-rank corrections that are trained on a base that is not."""

import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcompress import _check, _keys, arrays, tree
from jaxcompress._dtypes import wide
from jaxcompress._sharding import automatic, place_like
from jaxcompress._types import ArrayLike, PyTree
from jaxcompress.factorization._basis import as_matrix, column_limit, require_matrix, side_limit
from jaxcompress.factorization._decompose import decompose

Init = Literal["zero", "pissa"]


class Adapter(NamedTuple):
    """What all adapters of a tree share: the arguments of `add_adapters`, checked."""

    rank: ArrayLike
    columns: int | None
    alpha: ArrayLike | None
    stabilized: bool
    init: Init
    key: jax.Array | None


def add_adapters(
    params: PyTree,
    rank: ArrayLike,
    *,
    key: jax.Array | None = None,
    alpha: ArrayLike | None = None,
    stabilized: bool = False,
    init: Init = "zero",
    max_rank: int | None = None,
    where: tree.Where = tree.is_weight,
) -> PyTree:
    r"""Params with a low-rank correction beside each chosen leaf: LoRA, QLoRA, PiSSA.

    .. math:: W \;\mapsto\; W_0 + s\,U V, \qquad s = \alpha / r

    `jc.lift(fn)` runs them: the product with the base as ever, and two thin ones. The base may be
    compressed; `add_adapters(jc.pack(jc.quantize(4), params), …)` is QLoRA. With `low_rank_plus`
    in the place of both the correction starts from the error of the base instead: LoftQ.

    Args:
        params: any pytree; leaves may be compressed.
        rank: r, at least 1; above the full rank it counts as full. May be traced: the columns
            beyond it are zero then, and stay so under the gradient.
        key: a `jax.random.key` for "zero"; each leaf draws from its own.
        alpha: :math:`\alpha`, at least 0. May be traced. None: s = 1.
        stabilized: static. :math:`s = \alpha / \sqrt r`, which keeps the size of a step where r
            grows.
        init: static. "zero": V = 0 and U normal with the variance 1 / rows, so that nothing
            changes. "pissa": :math:`s\,U V` is the truncated SVD of W, and :math:`W_0` what is left
            of it; dense leaves only.
        max_rank: static. Number of columns; by default `rank` where that is a Python number,
            else the full rank.
        where: static. The leaves to adapt, see `jaxcompress.tree.select`.

    Returns:
        The tree with `arrays.Sum` at the chosen leaves, whose last part is `arrays.LowRank(u, v)`
        of the dtype of the leaf, `shape[:-1] + (r,)` and `(r, shape[-1])`, or with `alpha` that in
        `arrays.Rescaled`. The sum is what the leaf was; with "pissa" up to rounding, and NaN as
        a whole where the leaf is not finite.

    Raises:
        ValueError: `rank` below 1; a chosen leaf has fewer than two dimensions; no leaf is chosen;
            "pissa" of a compressed leaf; "zero" without a key; `stabilized` without `alpha`.
        TypeError: a chosen leaf is not real floating point.

    Cost: r (m + n) numbers for each leaf; "pissa" one `jc.factorization.svd`.

    Examples:
        A step that trains the adapters alone; the codes of the base have no gradient:

        >>> fn = lambda p, x: x @ p["w"] + p["b"]
        >>> params = {"w": jnp.ones((16, 8)), "b": jnp.zeros(8)}
        >>> small = jc.pack(jc.quantize(4), params)
        >>> small = jc.factorization.add_adapters(small, 2, key=jax.random.key(0))
        >>> adapters, rest = jc.factorization.split_adapters(small)
        >>> opt = optax.adam(1e-3)
        >>> state, x = opt.init(adapters), jnp.ones((4, 16))
        >>> def loss(adapters):
        ...     y = jc.lift(fn)(jc.factorization.join_adapters(adapters, rest), x)
        ...     return jnp.mean(y**2)
        >>> updates, state = opt.update(jax.grad(loss)(adapters), state, adapters)
        >>> adapters = optax.apply_updates(adapters, updates)
        >>> trained = jc.factorization.join_adapters(adapters, rest)
        >>> jc.factorization.merge_adapters(trained)["w"].shape
        (16, 8)

    Source: Hu et al. 2021, arXiv:2106.09685; Dettmers et al. 2023, arXiv:2305.14314; Meng et al.
    2024, arXiv:2404.02948; the root from Kalajdzievski 2023, arXiv:2312.03732.
    """
    adapter = checked("add_adapters", rank, max_rank, alpha, stabilized, init, key)
    chosen = tree.select(params, where, function="add_adapters")

    def leaf(path, w, is_chosen):
        return adapted("add_adapters", path, w, adapter) if is_chosen else w

    return tree.map_with_path(leaf, params, chosen)


def adapter_mask(params: PyTree) -> PyTree:
    """Which arrays belong to adapters, for `optax.partition` and for gradients.

    Args:
        params: from `add_adapters`, or with other `arrays.Sum` leaves whose last part is of low
            rank, as `jc.pack(jc.factorization.low_rank_plus(…), params)` gives them.

    Returns:
        The structure of `params`, compressed arrays opened, with True at u and v of the adapters.

    Raises:
        ValueError: there is none.

    Examples:
        >>> params = {"w": jnp.ones((8, 8)), "b": jnp.zeros(8)}
        >>> params = jc.factorization.add_adapters(params, 1, key=jax.random.key(0))
        >>> mask = jc.factorization.adapter_mask(params)
        >>> jax.tree.leaves(mask)  # b, the base, u and v
        [False, False, True, True]
    """
    mask = mask_of(params)
    if not any(jax.tree.leaves(mask)):
        rule, got = "hold adapters", "none"
        fix = "Add some with jc.factorization.add_adapters."
        raise ValueError(_check.message("adapter_mask", "params", rule, got, fix))
    return mask


def split_adapters(params: PyTree) -> tuple[PyTree, PyTree]:
    """The adapters, to be differentiated and trained, and all else.

    Args:
        params: as `adapter_mask` takes them.

    Returns:
        Two trees of the structure of `params`, compressed arrays opened, each with
        `optax.MaskedNode()` where the other has an array. `join_adapters` puts them together.

    Raises:
        ValueError: there is no adapter.

    Examples:
        >>> params = {"w": jnp.ones((8, 8)), "b": jnp.zeros(8)}
        >>> params = jc.factorization.add_adapters(params, 1, key=jax.random.key(0))
        >>> adapters, rest = jc.factorization.split_adapters(params)
        >>> [x.shape for x in jax.tree.leaves(adapters)], [x.shape for x in jax.tree.leaves(rest)]
        ([(8, 1), (1, 8)], [(8,), (8, 8)])
    """
    mask = adapter_mask(params)
    adapters = jax.tree.map(lambda x, m: x if m else optax.MaskedNode(), params, mask)
    rest = jax.tree.map(lambda x, m: optax.MaskedNode() if m else x, params, mask)
    return adapters, rest


def join_adapters(adapters: PyTree, rest: PyTree) -> PyTree:
    """The params again, from the two trees of `split_adapters`.

    Args:
        adapters: trained or not.
        rest: all else.

    Returns:
        The params.

    Raises:
        ValueError: the two trees are not those of one tree of params.

    Examples:
        >>> params = jc.factorization.add_adapters(jnp.ones((8, 8)), 1, key=jax.random.key(0))
        >>> again = jc.factorization.join_adapters(*jc.factorization.split_adapters(params))
        >>> jax.tree.structure(again) == jax.tree.structure(params)
        True
    """
    hidden = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731
    try:
        return jax.tree.map(lambda a, r: r if hidden(a) else a, adapters, rest, is_leaf=hidden)
    except ValueError as error:
        rule = "be of the structure of `rest`"
        fix = "Pass both results of jc.factorization.split_adapters."
        message = _check.message("join_adapters", "adapters", rule, f"another ({error})", fix)
        raise ValueError(message) from None


def merge_adapters(params: PyTree) -> PyTree:
    """Dense arrays in the place of leaves with adapters: nothing is left to run beside them.

    Args:
        params: from `add_adapters`.

    Returns:
        The tree, with sums that end in a low rank made dense, in the dtype of the leaf; other
        leaves, compressed ones too, as they are. Compress again with `jc.pack`.

    Examples:
        >>> params = {"w": jnp.ones((8, 8))}
        >>> adapted = jc.factorization.add_adapters(params, 2, key=jax.random.key(0))
        >>> bool((jc.factorization.merge_adapters(adapted)["w"] == params["w"]).all())
        True
    """
    return tree.map_with_path(lambda _, w: w.todense() if _factors(w) else w, params)


def checked(
    function: str,
    rank: ArrayLike,
    max_rank: int | None,
    alpha: ArrayLike | None,
    stabilized: bool,
    init: Any,
    key: jax.Array | None,
) -> Adapter:
    """The arguments of a function that makes adapters, refused where they are wrong."""
    _check.number(function, "rank", rank, 1)
    columns = column_limit(function, rank, max_rank)
    if alpha is not None:
        _check.number(function, "alpha", alpha, 0)
    elif stabilized:
        rule, got = "be given where `stabilized` is", "None"
        raise ValueError(_check.message(function, "alpha", rule, got))
    if init not in ("zero", "pissa"):
        rule, got = "be 'zero' or 'pissa'", repr(init)
        raise ValueError(_check.message(function, "init", rule, got))
    if key is not None:
        _check.key(function, key)
    elif init == "zero":
        rule, got, fix = "be given for init='zero'", "None", "Pass jax.random.key(0)."
        raise ValueError(_check.message(function, "key", rule, got, fix))
    return Adapter(rank, columns, alpha, stabilized, init, key)


def adapted(function: str, path: str, w: Any, adapter: Adapter) -> arrays.Sum:
    """A leaf with its adapter."""
    require_matrix(function, path, w)
    if adapter.init == "pissa" and arrays.is_compressed(w):
        rule, got = "be dense for init='pissa'", type(w).__name__
        fix = "Pack jc.factorization.low_rank_plus(projection, rank) instead."
        raise ValueError(_check.message(function, "params", rule, got, fix, path=path))
    width = side_limit(w.shape, adapter.columns)
    rank = jnp.minimum(jnp.round(jnp.asarray(adapter.rank, jnp.float32)), width)
    scale = jnp.ones((), jnp.float32)
    if adapter.alpha is not None:
        most = jnp.maximum(rank, 1.0)
        most = jnp.sqrt(most) if adapter.stabilized else most
        scale = jnp.asarray(adapter.alpha, jnp.float32) / most
    if adapter.init == "pissa":
        w = jnp.asarray(w)
        start = functools.partial(_principal, width=width)
        low = arrays.LowRank(*automatic(start, w, rank, scale, like_first=False))
        base = _without(w, low, scale)
    else:
        assert adapter.key is not None
        low = arrays.LowRank(*_drawn(_keys.of_leaf(adapter.key, path), rank, w, width))
        base = w
    if adapter.alpha is None:
        return arrays.add(base, low)
    return arrays.add(base, arrays.Rescaled(low, scale.reshape((1,) * w.ndim), np.dtype(w.dtype)))


def mask_of(params: PyTree) -> PyTree:
    """As `adapter_mask`, without a refusal."""

    def leaf(path, w):
        del path
        mask = jax.tree.map(lambda _: False, w)
        if not _factors(w):
            return mask
        last = mask.parts[-1]
        if isinstance(last, arrays.Rescaled):
            last = dataclasses.replace(last, inner=arrays.LowRank(True, True))
        else:
            last = arrays.LowRank(True, True)
        return arrays.Sum((*mask.parts[:-1], last))

    return tree.map_with_path(leaf, params)


def _factors(w: Any) -> arrays.LowRank | None:
    """The low rank that a sum ends in; None for other leaves, and for factors that are codes."""
    if not isinstance(w, arrays.Sum):
        return None
    last = w.parts[-1]
    low = last.inner if isinstance(last, arrays.Rescaled) else last
    plain = isinstance(low, arrays.LowRank) and not any(map(arrays.is_compressed, (low.u, low.v)))
    return low if plain else None


def _drawn(key: jax.Array, rank: jax.Array, w: Any, width: int) -> tuple[jax.Array, jax.Array]:
    shape, rows = (*w.shape[:-1], width), max(math.prod(w.shape[:-1]), 1)
    live = jnp.arange(width, dtype=jnp.float32) < rank
    u = jax.random.normal(key, shape, jnp.float32) * (1.0 / math.sqrt(rows))
    u = jnp.where(jnp.expand_dims(live, tuple(range(len(shape) - 1))), u, 0.0)
    return u.astype(w.dtype), jnp.zeros((width, w.shape[-1]), w.dtype)


def _principal(
    w: jax.Array, rank: jax.Array, scale: jax.Array, *, width: int
) -> tuple[jax.Array, jax.Array]:
    """The balanced factors of the truncated SVD, over the scale."""
    u, s, vt, _ = decompose(as_matrix(w), width)
    live = (jnp.arange(width, dtype=jnp.float32) < rank) & (scale > 0)
    root = jnp.where(live, jnp.sqrt(s / jnp.where(scale > 0, scale, 1.0)), 0.0)
    u = (u * root[None, :]).reshape((*w.shape[:-1], width))
    return u.astype(w.dtype), (root[:, None] * vt).astype(w.dtype)


def _without(w: jax.Array, low: arrays.LowRank, scale: jax.Array) -> jax.Array:
    """What a scaled product of factors leaves of a leaf, rounded once."""
    principal = arrays.LowRank(wide(low.u), wide(low.v)).todense()
    principal = principal * scale.astype(principal.dtype)
    return (wide(w) - place_like(principal, w)).astype(w.dtype)
