"""Walking trees with readable paths."""

from collections.abc import Callable
from typing import Any

import jax

from jaxcompress import _check
from jaxcompress._types import PyTree


def is_array_like(x: Any) -> bool:
    """Whether `x` stands for one array as a whole: it has `todense`."""
    # Of the class: a Flax variable hands on the attributes of what it holds.
    return hasattr(type(x), "todense") and hasattr(type(x), "nbytes")


def path_string(path: tuple[Any, ...]) -> str:
    """`conv/kernel` for a key path; the `.value` of a Flax NNX variable is left out.

    Examples:
        >>> path_string((jax.tree_util.DictKey("conv"), jax.tree_util.SequenceKey(0)))
        'conv/0'
    """
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def leaves_with_paths(
    tree: PyTree, is_leaf: Callable[[Any], bool] | None = None
) -> list[tuple[str, Any]]:
    """Every leaf with its path, in flattening order; a compressed array is one leaf.

    Args:
        tree: any pytree.
        is_leaf: more nodes that count as leaves.

    Examples:
        >>> leaves_with_paths({"b": [1, 2], "a": None})
        [('b/0', 1), ('b/1', 2)]
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_leaf_test(is_leaf))
    return [(path_string(path), leaf) for path, leaf in flat]


def by_path(
    function: str, argument: str, tree: PyTree, is_leaf: Callable[[Any], bool] | None = None
) -> dict[str, Any]:
    """From the path of each leaf to the leaf; refuses a tree in which two have the same.

    Examples:
        >>> by_path("overlap", "first", {"b": [1, 2]})
        {'b/0': 1, 'b/1': 2}
    """
    leaves = leaves_with_paths(tree, is_leaf)
    require_distinct(function, argument, [path for path, _ in leaves])
    return dict(leaves)


def require_distinct(function: str, argument: str, paths: list[str]) -> None:
    """Refuses two leaves of one path, such as `{"a/b": …, "a": {"b": …}}` has."""
    if len(set(paths)) < len(paths):
        twice = sorted({path for path in paths if paths.count(path) > 1})
        rule = "have a path of its own for each leaf"
        raise ValueError(_check.message(function, argument, rule, twice))


def map_with_path(
    f: Callable[..., Any],
    tree: PyTree,
    *rest: PyTree,
    is_leaf: Callable[[Any], bool] | None = None,
) -> PyTree:
    """`jax.tree.map` whose function also gets the path: `f(path, leaf, *rest)`.

    A compressed array is one leaf. `rest` may have deeper trees where `tree` has leaves.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: f(path_string(path), *leaves),
        tree,
        *rest,
        is_leaf=_leaf_test(is_leaf),
    )


def map_arrays_with_path(f: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """`map_with_path` that goes into compressed arrays: their factors and codes are leaves."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: f(path_string(path), *leaves), tree, *rest
    )


def _leaf_test(is_leaf: Callable[[Any], bool] | None) -> Callable[[Any], bool]:
    return lambda x: is_array_like(x) or (is_leaf is not None and is_leaf(x))
