"""A Flax NNX module as a function of its parameters: the only bridge to Flax in here."""

from collections.abc import Callable
from typing import Any

from flax import nnx

from jaxcompress import _check
from jaxcompress._types import PyTree


def functional(
    module: nnx.Module, method: str = "__call__", *, variables: Any = nnx.Param
) -> tuple[Callable[..., Any], PyTree]:
    """A Flax NNX module as `(apply, params)`, as all of jaxcompress takes models.

    Args:
        module: any NNX module. It is not changed.
        method: static. Which of its methods to call.
        variables: static. Which variables are params, a filter of Flax; `...` for all of them.

    Returns:
        `apply(params, *args, **kwargs)`, a pure function, and the `nnx.State` of these
        variables. All other state (statistics of batch norm, dropout keys) is that of the
        module now; what a call changes in it is dropped. For more, use `nnx.split` and
        `nnx.merge` yourself.

    Raises:
        TypeError: `module` is no `nnx.Module`.

    Examples:
        >>> from flax import nnx
        >>> apply, params = jc.functional(nnx.Linear(4, 2, rngs=nnx.Rngs(0)))
        >>> apply(jc.compress(jc.prune(0.5), params), jnp.ones((3, 4))).shape
        (3, 2)
    """
    if not isinstance(module, nnx.Module):
        rule = "be a flax.nnx.Module"
        raise TypeError(_check.message("functional", "module", rule, _check.describe(module)))
    graph, params, *rest = nnx.split(module, *dict.fromkeys((variables, ...)))

    def apply(params: PyTree, *args: Any, **kwargs: Any) -> Any:
        merged = nnx.merge(graph, params, *rest, copy=True)
        return getattr(merged, method)(*args, **kwargs)

    return apply, params


def with_variables(module: nnx.Module, variables: PyTree) -> nnx.Module:
    """A module like this one, with these variables in place of all of its own.

    Args:
        module: it is not changed.
        variables: the `nnx.State` of all variables, as of `functional(module, variables=...)`;
            they may have other shapes.
    """
    return nnx.merge(nnx.graphdef(module), variables, copy=True)
