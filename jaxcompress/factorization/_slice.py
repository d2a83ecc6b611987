"""Slicing residual streams: models with fewer features, by PCA (SliceGPT)."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import _check, tree
from jaxcompress._dtypes import wide
from jaxcompress._types import PyTree
from jaxcompress.factorization._slice_basis import (
    is_writer,
    moment,
    site_path,
    slicing_basis,
    turned,
    turned_back,
)
from jaxcompress.tracing import Statistics, Stream, calibrate
from jaxcompress.tracing._folding import nothing_turns, turnable
from jaxcompress.tracing._jaxprs import is_array
from jaxcompress.tracing._resized import resized

# Of what random changes do to the results; roundings of bfloat16 stay below it.
_NO_EFFECT = 0.1
_ROUNDINGS = 10


class SlicedStream(NamedTuple):
    """What became of a stream.

    Attributes:
        stream: as `jc.tracing.streams` has it.
        kept: features that are left of `stream.size`.
        error: the part of the signal's energy that was cut, at what reads the stream; between
            0 and 1.
        refused: why it is left as it was; None where it was sliced.
    """

    stream: Stream
    kept: int
    error: jax.Array
    refused: str | None


class Sliced(NamedTuple):
    """A sliced model.

    Attributes:
        fn: runs the smaller params, with the further arguments of the original function.
        params: the smaller params.
        info: a `SlicedStream` for each stream, the widest first.
    """

    fn: Callable[..., PyTree]
    params: PyTree
    info: list[SlicedStream]


def slice_streams(
    fn: Callable[..., PyTree],
    params: PyTree,
    *args: Any,
    keep: float,
    batches: Iterable[Any] | None = None,
    stats: Mapping[str, Statistics] | None = None,
    where: tree.Where | None = None,
    **kwargs: Any,
) -> Sliced:
    r"""Smaller params with narrower residual streams, and the function that runs them.

    .. math:: \textstyle\sum_{\mathrm{readers}} X^\top X = Q \Lambda Q^\top, \qquad
        W_{\mathrm{write}} \mapsto W_{\mathrm{write}} Q_{:k}, \qquad
        W_{\mathrm{read}} \mapsto Q_{:k}^\top \operatorname{diag}(\gamma)\, W_{\mathrm{read}}

    with X the normalized activations that read the stream. Every matrix of the stream gets
    smaller: embeddings, what enters a block and what leaves it, the head. RMSNorm stays, with
    gains of ones, and is right up to what was cut, for its mean still divides by the old size.
    For LayerNorm the means of all that writes are folded into the weights (they are centred),
    and Q keeps the vector of ones, so that the means it subtracts are zero; ones take one of
    the k features.

    Args:
        fn: any function `fn(params, *args, **kwargs)`; Linen's `apply`, or `jc.functional` of
            an NNX module, whose own checks of shapes don't matter. It is not changed.
        params: any pytree of dense arrays; they are not changed.
        *args: further arguments, as `fn` takes them, concrete: the result is checked on them.
        keep: static. The part of the features to keep, in (0, 1], or, above 1, their number k.
            At 1 the function stays the same but for rounding.
        batches: an iterable of batches to see signals on, see `jc.calibrate`; None: `args`.
        stats: in place of batches, what `jc.calibrate(fn, params, batches, gram=True)` gave.
        where: static. Which streams: those that touch a leaf that it chooses, see
            `jaxcompress.tree.select`; None: those that more than one weight writes, as a
            residual stream, and not the values of attention heads.
        **kwargs: as `args`.

    Returns:
        `(fn, params, info)`. The function takes these params, or others of their shapes. It can
        be jitted, mapped, differentiated (for fine-tuning), calibrated and sliced again, see
        `jc.tracing.resized`. Dtypes and the structure of the params are kept. Streams that
        can't be sliced are left, with a reason in `info`. Of inputs that were all seen,
        :math:`X` loses `error` of its energy in the mean over tokens; what the function loses
        depends on the model.

    Raises:
        TypeError: `fn` can't be called; a leaf to slice is compressed or not real floating
            point; traced or abstract arguments.
        ValueError: no chosen stream can be sliced, with the reasons (norms after the layers, as
            in BERT, stand against it); `keep` out of range; both `batches` and `stats`, or
            these without a reader of a stream, or not finite; an offset after a gain of zero; a
            `fn` without floating-point results.

    Cost: one calibration; for each stream an eigendecomposition, :math:`O(d^3)`, and six runs of
    `fn` on `args`, which find out whether its mean matters and check the result.

    Examples:
        >>> norm = lambda x: x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)
        >>> def fn(p, x):
        ...     x = x @ p["embed"]
        ...     x = x + jnp.tanh((norm(x) * p["scale"]) @ p["up"]) @ p["down"]
        ...     return norm(x) @ p["head"]
        >>> sizes = {"embed": (3, 8), "up": (8, 2), "down": (2, 8), "head": (8, 4)}
        >>> draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)
        >>> params = {name: draw(i, *shape) for i, (name, shape) in enumerate(sizes.items())}
        >>> params, x = params | {"scale": jnp.full((8,), 2.0)}, draw(4, 16, 3)
        >>> small_fn, small, info = jc.factorization.slice_streams(fn, params, x, keep=5)
        >>> small["embed"].shape, small["up"].shape, small["down"].shape, small["scale"].shape
        ((3, 5), (5, 2), (2, 5), (5,))
        >>> bool(jnp.allclose(small_fn(small, x), fn(params, x), atol=1e-4))
        True

    Source: Ashkboos et al. 2024, SliceGPT, arXiv:2401.15024, section 3. Differs: one Q for the
    whole stream. The paper has one for each block and a matrix :math:`Q_{l-1}^\top Q_l` on each
    skip connection, which costs operations and adapts to signals that differ from block to
    block; here the k directions serve all blocks at once, so that `error` is the larger the
    less blocks share them. LayerNorm stays LayerNorm.
    """
    _require_concrete(params, args, kwargs)
    _require_part(keep)
    if batches is not None and stats is not None:
        rule, got = "be None where `stats` is given", "both"
        raise ValueError(_check.message("slice_streams", "batches", rule, got))
    fix = "See jc.tracing.streams; jc.low_rank covers any model."
    turning, left = turnable("slice_streams", fn, params, args, kwargs, fix)
    chosen = _chosen(turning, params, where)
    if not chosen:
        # The refused ones say why there is no residual stream.
        fix = "Norms have to stand before the layers. Choose other streams with `where`."
        raise ValueError(nothing_turns("slice_streams", left, fix))
    if stats is None:
        stats = _calibrated(fn, params, chosen, [args] if batches is None else batches, kwargs)
    original = dict(tree.leaves_with_paths(params))
    run, small = _runner(fn, params, args, kwargs), params
    none = jnp.zeros((), jnp.float32)
    info = [SlicedStream(s, s.size, none, s.refused) for s in left]
    for stream in turning:
        if stream not in chosen:
            info.append(SlicedStream(stream, stream.size, none, "it is not chosen"))
            continue
        energy = moment(stream, stats, original)
        if not bool(jnp.isfinite(energy).all()):
            rule = "see finite activations"
            raise ValueError(_check.message("slice_streams", "batches", rule, "NaN or infinite"))
        row, small = _slice(stream, small, energy, _size(keep, stream.size), run)
        info.append(row)
    if all(row.refused for row in info):
        rule = "have a stream that can be sliced"
        reasons = "; ".join(f"{row.stream.size} features: {row.refused}" for row in info)
        raise ValueError(_check.message("slice_streams", "fn", rule, reasons, fix))
    return Sliced(resized(fn, params), small, sorted(info, key=lambda row: -row.stream.size))


def _slice(
    stream: Stream, params: PyTree, energy: jax.Array, kept: int, run: Callable[[PyTree], Any]
) -> tuple[SlicedStream, PyTree]:
    """A stream that is cut, if the function stays what it is."""
    leaves = dict(tree.leaves_with_paths(params))
    before = run(params)
    signs = run(_with(params, _shifted(leaves, stream, ones=False)))
    effect = _distance(before, signs)
    centred = stream.size > 1 and bool(
        _distance(before, run(_with(params, _shifted(leaves, stream, ones=True))))
        <= _NO_EFFECT * effect
    )
    kept = max(kept, 2) if centred else kept
    # What keeps the vector of ones, and all features, changes nothing but roundings.
    everything, _ = slicing_basis(energy, stream.size, stream.size > 1)
    noise = _distance(before, run(_with(params, turned(leaves, stream, everything, False))))
    rows, error = slicing_basis(energy, kept, centred)
    new = turned(leaves, stream, rows, centred)
    small = _with(params, new)
    whole = _with(params, turned_back(new, stream, rows))
    # With nothing to lose, the smaller function has to be the same as the larger.
    if bool(_distance(run(whole), run(small)) <= _ROUNDINGS * noise + 1e-4 * effect):
        return SlicedStream(stream, kept, error, None), small
    why = "its mean, or the number of its features, matters beside LayerNorm"
    return SlicedStream(stream, stream.size, jnp.zeros_like(error), why), params


def _with(params: PyTree, new: Mapping[str, jax.Array]) -> PyTree:
    return tree.map_with_path(
        lambda path, w: new[path].astype(w.dtype) if path in new else w, params
    )


def _shifted(leaves: Mapping[str, Any], stream: Stream, ones: bool) -> dict[str, jax.Array]:
    """What writes a stream, moved far along the vector of ones, or along one of signs."""
    rng, new = np.random.default_rng(0), {}
    signs = np.ones(stream.size) if ones else rng.choice([-1.0, 1.0], stream.size)
    for member in filter(is_writer, stream.members):
        w = new.get(member.path, wide(leaves[member.path]))
        shape = [n if d != member.axis else 1 for d, n in enumerate(w.shape)]
        direction = np.expand_dims(signs, tuple(d for d in range(w.ndim) if d != member.axis))
        size = jnp.sqrt(jnp.mean(jnp.square(w)))
        move = jnp.asarray(rng.normal(size=shape) * direction, w.dtype)
        new[member.path] = w + 3 * jnp.where(size > 0, size, 1.0) * move
    return new


def _distance(a: list[jax.Array], b: list[jax.Array]) -> jax.Array:
    """Between results, where both are finite."""
    squares = [
        jnp.sum(jnp.where(jnp.isfinite(x) & jnp.isfinite(y), jnp.square(x - y), 0.0))
        for x, y in zip(a, b, strict=True)
    ]
    return jnp.sqrt(jnp.sum(jnp.stack(squares)))


def _runner(fn, like: PyTree, args, kwargs) -> Callable[[PyTree], list[jax.Array]]:
    """From params to the floating-point results, compiled once for each of their shapes."""
    call = resized(fn, like)
    flat, treedef = jax.tree.flatten((like, args, kwargs))
    moving = [i for i, leaf in enumerate(flat) if is_array(leaf)]

    @jax.jit
    def results(arrays):
        filled = list(flat)
        for i, x in zip(moving, arrays, strict=True):
            filled[i] = x
        params, args, kwargs = jax.tree.unflatten(treedef, filled)
        found = [y for y in jax.tree.leaves(call(params, *args, **kwargs)) if is_array(y)]
        return [y.astype(jnp.float32) for y in found if jnp.issubdtype(y.dtype, jnp.floating)]

    def run(params):
        now = jax.tree.leaves((params, args, kwargs))
        found = results([now[i] for i in moving])
        if not found:
            rule, got = "return floating-point arrays, to check the result by", "none"
            raise ValueError(_check.message("slice_streams", "fn", rule, got))
        return found

    return run


def _calibrated(fn, params, chosen: list[Stream], batches, kwargs) -> dict[str, Statistics]:
    leaves = dict(tree.leaves_with_paths(params))
    readers = {m.path for stream in chosen for m in stream.members if m.reads}
    return calibrate(
        lambda params, *batch: fn(params, *batch, **kwargs),
        params,
        batches,
        where=lambda name, _: site_path(name, leaves) in readers,
        gram=True,
    )


def _chosen(turning: list[Stream], params: PyTree, where: tree.Where | None) -> list[Stream]:
    if where is None:
        return [stream for stream in turning if _is_residual(stream, params)]
    mask = dict(tree.leaves_with_paths(tree.select(params, where, function="slice_streams")))
    chosen = [s for s in turning if any(mask[m.path] for m in s.members)]
    if not chosen:
        rule, got = "choose a leaf of a stream that can be turned", repr(where)
        raise ValueError(_check.message("slice_streams", "where", rule, got))
    return chosen


def _is_residual(stream: Stream, params: PyTree) -> bool:
    """Whether several weights write it, each with its bias or without."""
    leaves = dict(tree.leaves_with_paths(params))
    shapes = [
        tuple(leaves[m.path].shape[m.stacked :])
        for m in stream.members
        if m.role == "weight" and not m.reads
    ]
    # A bias has the last axes of its weight.
    weights = [s for s in shapes if not any(len(s) < len(t) and t[-len(s) :] == s for t in shapes)]
    return len(weights) > 1


def _require_part(keep: Any) -> None:
    rule = "be in (0, 1], or a static integer above 1"
    if isinstance(keep, bool) or not isinstance(keep, (int, float, np.integer, np.floating)):
        raise TypeError(_check.message("slice_streams", "keep", rule, _check.describe(keep)))
    if not (0 < keep <= 1 or (keep > 1 and keep == int(keep))):
        raise ValueError(_check.message("slice_streams", "keep", rule, keep))


def _size(keep: float, size: int) -> int:
    if keep <= 1:
        return max(1, round(keep * size))
    if keep > size:
        rule = f"be at most the {size} features of the stream"
        raise ValueError(_check.message("slice_streams", "keep", rule, keep))
    return int(keep)


def _require_concrete(params: PyTree, args: Any, kwargs: Any) -> None:
    for leaf in jax.tree.leaves((params, args, kwargs)):
        if _check.is_traced(leaf) or isinstance(leaf, jax.ShapeDtypeStruct):
            rule = "be concrete arrays"
            fix = "Call it outside of jit: sizes of params are static."
            got = _check.describe(leaf)
            raise TypeError(_check.message("slice_streams", "params", rule, got, fix))
