"""Running array code that has no rule for explicitly sharded axes."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def place_like(x: jax.Array, like: jax.Array) -> jax.Array:
    """`x` sharded as `like`, where that is explicit; differentiable."""
    if not is_explicit(like):
        return x
    return jax.sharding.reshard(x, jax.typeof(like).sharding)


def is_explicit(x: jax.Array) -> bool:
    """Whether `x` lies on a mesh with Explicit axes."""
    sharding = getattr(jax.typeof(x), "sharding", None)
    mesh = getattr(sharding, "mesh", None)
    return mesh is not None and AxisType.Explicit in getattr(mesh, "axis_types", ())


def on_several_devices(x: jax.Array) -> bool:
    """Whether `x` lies on a mesh of more than one device, of any kind of axes."""
    mesh = getattr(getattr(jax.typeof(x), "sharding", None), "mesh", None)
    return mesh is not None and mesh.size > 1


def on_mesh_of(x: jax.Array, spec: PartitionSpec) -> NamedSharding:
    """The sharding on the mesh of `x`: it names the mesh where `jax.set_mesh` was not called."""
    return NamedSharding(jax.typeof(x).sharding.mesh, spec)


def automatic(f: Callable[..., Any], *arrays: jax.Array, like_first: bool) -> Any:
    """`f(*arrays)`, with the axes of an Explicit mesh left to the compiler inside `f`.

    Decompositions, sorts and gathers have no explicit sharding rule; under an Auto mesh or
    none this is a plain call.

    Args:
        f: any function of arrays. It must not close over other traced values: those carry
            the explicit mesh with them.
        *arrays: its arguments.
        like_first: static. The results are sharded like the first array; otherwise
            they are replicated.
    """
    if not is_explicit(arrays[0]):
        return f(*arrays)
    spec = jax.typeof(arrays[0]).sharding.spec if like_first else PartitionSpec()
    return jax.sharding.auto_axes(f, out_sharding=on_mesh_of(arrays[0], spec))(*arrays)


def by_rows(f: Callable[..., Any], *args: Any, like: jax.Array, axes: int = 0) -> Any:
    """`f(*args)` as `automatic` has it, sharded as `like` is in all axes but the last.

    Args:
        f: gives one array of the rows of `like`. It must not close over other traced values.
        *args: trees of arrays.
        like: what says how the rows are sharded.
        axes: static. How many axes the result has beside the rows; they are not sharded.
    """
    if not is_explicit(like):
        return f(*args)
    spec = (*jax.typeof(like).sharding.spec, *[None] * like.ndim)[: like.ndim - 1]
    place = on_mesh_of(like, PartitionSpec(*spec, *[None] * axes))
    return jax.sharding.auto_axes(f, out_sharding=place)(*args)


def automatic_like(f: Callable[..., tuple[Any, Any]], tree: Any, *others: Any) -> Any:
    """`f(tree, *others)` as `automatic` has it, for trees.

    Args:
        f: gives a tree like the first and anything else. It must not close over traced values.
        tree: of arrays. The first result is sharded as it is.
        *others: trees of arrays. The second result is replicated.
    """
    explicit = [x for x in jax.tree.leaves(tree) if is_explicit(x)]
    if not explicit:
        return f(tree, *others)
    replicated = on_mesh_of(explicit[0], PartitionSpec())
    like = jax.tree.map(lambda x: jax.typeof(x).sharding if is_explicit(x) else replicated, tree)
    return jax.sharding.auto_axes(f, out_sharding=(like, replicated))(tree, *others)
