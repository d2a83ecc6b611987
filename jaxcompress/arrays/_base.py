"""What all compressed arrays share: sizes that follow from the fields, and densifying trees."""

import math
from typing import Any

import jax

from jaxcompress import _check
from jaxcompress._types import PyTree
from jaxcompress.tree import is_array_like


class Sized:
    """Sizes of a compressed array: those of the dense one, but for `nbytes`.

    Holds no data and no behaviour of its own: a class below gives `shape` and `dtype`.
    """

    shape: tuple[int, ...]

    @property
    def ndim(self) -> int:
        """Number of dimensions of the dense array."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of entries of the dense array."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is stored: values, codes, scales, indices, masks, padding."""
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(self))


class Sparse(Sized):
    """A compressed array that keeps some entries, in `values`; `present()` says which.

    A mark for `is_sparse`, without data or behaviour.
    """


def is_compressed(x: Any) -> bool:
    """Whether `x` is a compressed array.

    Examples:
        >>> is_compressed(jc.arrays.pack_bits(np.array([1, 2, 3]), 2)), is_compressed(np.ones(3))
        (True, False)
    """
    return isinstance(x, Sized)


def is_sparse(x: Any) -> bool:
    """Whether `x` is a compressed array that stores some entries, in `values`, and where.

    Its `present()` is `bool` of the dense shape, true for entries that have a place in `values`.

    Examples:
        >>> keep = np.array([True, False])
        >>> arrays = jc.arrays.bit_mask(np.ones(2), keep), jc.arrays.pack_bits(keep, 1)
        >>> [is_sparse(x) for x in arrays]
        [True, False]
    """
    return isinstance(x, Sparse)


def todense(tree: PyTree) -> PyTree:
    """The tree with every compressed array made dense; other leaves are left as they are.

    Args:
        tree: any pytree, or one array.

    Returns:
        The same tree with ordinary `jax.Array`s. Works under `jit`, `vmap` and `grad` (with
        respect to the floating-point parts).

    Examples:
        >>> packed = jc.pack(jc.prune(0.9), {"w": jnp.arange(100.0).reshape(10, 10), "b": None})
        >>> jc.todense(packed)["w"].shape
        (10, 10)
    """
    return jax.tree.map(
        lambda x: x.todense() if is_array_like(x) else x, tree, is_leaf=is_array_like
    )


def require_concrete(function: str, argument: str, *arrays: Any) -> None:
    """Refuses tracers: the shape of what is built depends on values."""
    if any(_check.is_traced(x) for x in arrays):
        raise TypeError(
            _check.message(
                function,
                argument,
                "be concrete, since packed shapes depend on values",
                "a traced array",
                "Call it outside of jit, vmap and grad.",
            )
        )


def show(x: Any, **fields: Any) -> str:
    """A short representation: the class, the dense type and the fields that tell them apart."""
    inside = "".join(f", {name}={value}" for name, value in fields.items())
    return f"{type(x).__name__}({_check.describe(x)}{inside}, nbytes={x.nbytes})"
