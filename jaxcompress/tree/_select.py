"""Choosing leaves: by glob or regular expression on the path, predicate, mask tree."""

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcompress import _check
from jaxcompress._types import PyTree
from jaxcompress.tree._paths import leaves_with_paths, map_with_path

Where = str | re.Pattern | Callable[[str, Any], bool] | PyTree


def is_weight(path: str, leaf: Any) -> bool:
    """The default choice: real floating-point leaves with two or more dimensions."""
    del path
    return (
        hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating) and len(leaf.shape) >= 2
    )


def select(tree: PyTree, where: Where = is_weight, *, function: str = "select") -> PyTree:
    """A tree of Python booleans: which leaves of `tree` are chosen by `where`.

    Args:
        tree: any pytree: dicts, FrozenDict, Flax NNX states, Equinox modules, lists.
        where: one of

            - a glob on the path, as `"**/kernel"`: `*` stays within a level, `**`
              crosses levels (also none), `?` is one character, `[ab]` a set;
            - a compiled regular expression, which must match the whole path;
            - a predicate `(path, leaf) -> bool`;
            - a tree of booleans with the structure of `tree`;
            - `any_of`, `all_of` or `none_of` of those.
        function: static. The name to put first in errors.

    Returns:
        The structure of `tree` with a Python `bool` at each leaf. A leaf that is not an
        array (a function in an Equinox module) is never chosen.

    Raises:
        ValueError: nothing matches; the message lists the paths there are.
        TypeError: `where` is none of the above, or its booleans are traced.

    Examples:
        >>> params = {"dense": {"kernel": np.ones((2, 3)), "bias": np.ones(3)}}
        >>> select(params, "**/kernel")
        {'dense': {'bias': False, 'kernel': True}}
        >>> select(params, any_of("**/kernel", lambda path, x: x.ndim == 1))
        {'dense': {'bias': True, 'kernel': True}}
    """
    chosen = _resolve(tree, where, function)
    chosen = map_with_path(lambda _, x, c: bool(c) and hasattr(x, "dtype"), tree, chosen)
    paths = [path for path, _ in leaves_with_paths(tree)]
    if paths and not any(jax.tree.leaves(chosen)):
        shown = "\n  ".join(paths[:50]) + (
            f"\n  … {len(paths) - 50} more" if len(paths) > 50 else ""
        )
        raise ValueError(
            _check.message(
                function,
                "where",
                "match at least one array leaf",
                f"{_name(where)}, which matches none",
                f"The paths there are:\n  {shown}",
            )
        )
    return chosen


def any_of(*wheres: Where) -> Callable[[PyTree], PyTree]:
    """Leaves that at least one of `wheres` chooses."""
    return _combination(any, wheres)


def all_of(*wheres: Where) -> Callable[[PyTree], PyTree]:
    """Leaves that each of `wheres` chooses, as `all_of(is_weight, "encoder/**")`."""
    return _combination(all, wheres)


def none_of(*wheres: Where) -> Callable[[PyTree], PyTree]:
    """Leaves that none of `wheres` chooses, as `all_of(is_weight, none_of("head/**"))`."""
    return _combination(lambda hits: not any(hits), wheres)


class _Combination:
    """Several choices and the rule that joins them: a value, read by `select` alone."""

    def __init__(self, rule: Callable[..., bool], wheres: tuple[Where, ...]):
        self.rule, self.wheres = rule, wheres


def _combination(rule: Callable[..., bool], wheres: tuple[Where, ...]) -> Any:
    return _Combination(rule, wheres)


def _resolve(tree: PyTree, where: Where, function: str) -> PyTree:
    if isinstance(where, _Combination):
        parts = [_resolve(tree, w, function) for w in where.wheres]
        return map_with_path(lambda _, x, *hits: where.rule(hits), tree, *parts)
    if isinstance(where, str):
        pattern = glob(where)
        return map_with_path(lambda path, _: pattern.fullmatch(path) is not None, tree)
    if isinstance(where, re.Pattern):
        return map_with_path(lambda path, _: where.fullmatch(path) is not None, tree)
    # An Equinox module of booleans is callable too.
    if callable(where) and not _all_booleans(where):
        return map_with_path(lambda path, x: bool(where(path, x)), tree)
    return _mask_tree(tree, where, function)


def _mask_tree(tree: PyTree, mask: PyTree, function: str) -> PyTree:
    rule = "be a path pattern, a predicate, or a tree of booleans shaped like the parameters"
    if not _all_booleans(mask):
        raise TypeError(
            _check.message(function, "where", rule, _name(mask), "The choice of leaves is static.")
        )
    hidden = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731
    try:
        return map_with_path(lambda _, x, m: x if hidden(x) else m, tree, mask, is_leaf=hidden)
    except (ValueError, TypeError) as error:
        raise ValueError(
            _check.message(function, "where", rule, f"another structure ({error})")
        ) from None


def _all_booleans(mask: PyTree) -> bool:
    return all(isinstance(m, (bool, np.bool_)) for m in jax.tree.leaves(mask))


_WILDCARD = re.compile(r"\*\*/|/\*\*\Z|\*\*|\*|\?|\[.[^\]]*\]")
_ALL_OF = {"**/": "(?:.*/)?", "/**": "(?:/.*)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}


@lru_cache(maxsize=256)
def glob(pattern: str) -> re.Pattern:
    """A path glob as a regular expression, each wildcard a group; `**/` may stand for no level."""
    out, end = "", 0
    for wildcard in _WILDCARD.finditer(pattern):
        text = wildcard.group()
        body = _ALL_OF.get(text) or ("[^" + text[2:] if text[1] == "!" else text)
        out, end = out + re.escape(pattern[end : wildcard.start()]) + f"({body})", wildcard.end()
    return re.compile(out + re.escape(pattern[end:]))


def _name(where: Any) -> str:
    if isinstance(where, re.Pattern):
        return where.pattern
    return getattr(where, "__name__", repr(where))
