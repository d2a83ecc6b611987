"""Members of a stream with the gains of norms folded into them: what a rotation starts from."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import _check, arrays, tree
from jaxcompress._dtypes import wide
from jaxcompress._types import PyTree
from jaxcompress.tracing._streams import Member, Stream, streams


def turnable(
    function: str, fn: Callable[..., PyTree], params: PyTree, args: Any, kwargs: Any, fix: str
) -> tuple[list[Stream], list[Stream]]:
    """The streams that may be turned, at least one, and those that may not.

    Args:
        function: the name in errors.
        fn: as for `streams`.
        params: dense, or refused.
        args: further arguments of `fn`.
        kwargs: the same, by name.
        fix: what to do else, in the error where no stream can be turned.
    """
    for path, leaf in tree.by_path(function, "params", params).items():
        if arrays.is_compressed(leaf):
            rule, got = "be dense", _check.describe(leaf)
            what = "Do this first, then compress."
            raise TypeError(_check.message(function, "params", rule, got, what, path=path))
    found = streams(fn, params, *args, **kwargs)
    turning = [stream for stream in found if stream.refused is None]
    if not turning:
        raise ValueError(nothing_turns(function, found, fix))
    leaves = dict(tree.leaves_with_paths(params))
    for stream in turning:
        for member in stream.members:
            _check.floating(function, "params", leaves[member.path], member.path)
    return turning, [stream for stream in found if stream.refused is not None]


def gains_of(
    member: Member, stream: Stream, leaves: Mapping[str, Any]
) -> list[tuple[str, jax.Array]]:
    """Paths and values of the gains before a member, `[layers…, features]`."""
    others, found = {m.path: m for m in stream.members}, []
    for path in member.gains:
        gain = wide(leaves[path]) + others[path].shift
        layers = gain.shape[: others[path].stacked]
        found.append((path, gain.reshape((*layers, stream.size))))
    return found


def folded(
    function: str, w: jax.Array, member: Member, stream: Stream, leaves: Mapping[str, Any]
) -> jax.Array:
    """A weight times the gains before it, an offset divided by them, a gain as it leaves: ones.

    Args:
        function: the name in errors.
        w: the leaf of the member, in float32 or wider.
        member: of the stream.
        stream: that is to be turned.
        leaves: of the params, by path, as they are without any folding.
    """
    if member.role == "gain":
        return jnp.full_like(w, 1.0 - member.shift)
    for path, gain in gains_of(member, stream, leaves):
        shape = [1] * w.ndim
        shape[: gain.ndim - 1] = gain.shape[:-1]
        shape[member.axis] = stream.size
        factor = gain.reshape(shape).astype(w.dtype)
        if member.role != "offset":
            w = w * factor
            continue
        if not _check.is_traced(gain) and not np.all(gain):
            rule, got = "have no zeros where an offset follows", f"{int(jnp.sum(gain == 0))} zeros"
            raise ValueError(_check.message(function, "params", rule, got, path=path))
        w = w / factor
    return w


def nothing_turns(function: str, found: list[Stream], fix: str) -> str:
    """An error with the reasons of the streams that were found."""
    rule = "have an axis that only sums, means and norms act on between the weights"
    reasons = {stream.refused: stream for stream in found[::-1]}
    got = "; ".join(
        f"{stream.size} features written by {_writer(stream)}: {reason}"
        for reason, stream in sorted(reasons.items(), key=lambda item: -item[1].size)[:4]
    )
    return _check.message(function, "fn", rule, got or "none", fix)


def _writer(stream: Stream) -> str:
    weights = [m.path for m in stream.members if m.role == "weight" and not m.reads]
    return repr((weights or [stream.members[0].path])[0])
