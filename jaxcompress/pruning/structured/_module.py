"""A Flax NNX module with smaller variables."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import _check
from jaxcompress.pruning.structured._base import Keep
from jaxcompress.pruning.structured._shrink import shrink
from jaxcompress.tracing import functional, with_variables


def shrink_module(module: Any, keep: Keep, *args: Any, method: str = "__call__") -> Any:
    """A Flax NNX module of the same class, with fewer channels, where its code allows that.

    It does where the code takes sizes from variables and inputs, not from attributes: layers as
    `nnx.Linear`, `Conv`, `BatchNorm` and `LayerNorm` do. For what does not, as reshapes to a
    number of heads, run the function of `jc.shrink`, or make a smaller module yourself and give
    it the variables: `jc.report.sizes` lists them.

    Args:
        module: any NNX module. It is not changed.
        keep: static. What stays, of the dependencies of
            `jc.functional(module, variables=...)`, statistics of norms included.
        *args: arguments that the module takes. Where they are arrays the new module is compared
            with the function of `jc.shrink` on them.
        method: static. Which of its methods was read.

    Returns:
        The smaller module. Numbers that its code takes from sizes are those of the new sizes,
        as with `sizes="replace"`.

    Raises:
        ValueError: the module does not run with smaller variables, or gives something else.

    Examples:
        >>> from flax import nnx
        >>> rngs = nnx.Rngs(0)
        >>> module = nnx.Sequential(nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 2, rngs=rngs))
        >>> fn, variables = jc.functional(module, variables=...)
        >>> x = jnp.ones((3, 4))
        >>> keep = jc.select(jc.dependencies(fn, variables, x), variables, keep=0.5)
        >>> small = jc.pruning.shrink_module(module, keep, x)
        >>> small.layers[0].kernel.shape, small(x).shape
        ((4, 4), (3, 2))
    """
    fn, variables = functional(module, method, variables=...)
    cut, run = shrink(fn, variables, keep, *args, sizes="replace")
    small = with_variables(module, cut)
    own, _ = functional(small, method, variables=...)
    fix = "Run the function of jc.shrink, or make a module of these sizes."
    rule = "take its sizes from variables and inputs"
    try:
        shapes = [jax.eval_shape(f, cut, *args) for f in (own, run)]
    except Exception as error:
        got = f"{type(error).__name__}: {error}"
        raise ValueError(_check.message("shrink_module", "module", rule, got, fix)) from error
    concrete = all(isinstance(x, (jax.Array, np.ndarray)) for x in jax.tree.leaves((cut, args)))
    if concrete and not _close(own(cut, *args), run(cut, *args)):
        got = "one that gives something else than the function of jc.shrink"
        raise ValueError(_check.message("shrink_module", "module", rule, got, fix))
    if jax.tree.map(np.shape, shapes[0]) != jax.tree.map(np.shape, shapes[1]):
        got = "one whose results have other shapes"
        raise ValueError(_check.message("shrink_module", "module", rule, got, fix))
    return small


def _close(a: Any, b: Any) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(_as_near(x, y) for x, y in pairs if jnp.issubdtype(x.dtype, jnp.floating))


def _as_near(x: Any, y: Any) -> bool:
    """Equal to half of the digits of their dtype, relative to the largest number."""
    near = float(jnp.finfo(x.dtype).eps) ** 0.5
    x, y = (np.asarray(v, np.float64) for v in (x, y))
    return bool(np.allclose(x, y, rtol=0, atol=near * np.abs(y).max(initial=0.0), equal_nan=True))
