"""Cutting one leaf: which of its axes are which of a parameter's, and what of them stays."""

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxcompress import _check
from jaxcompress._sharding import is_explicit, on_mesh_of
from jaxcompress.pruning.structured._base import Keep
from jaxcompress.pruning.structured._places import kept_positions

Places = tuple[int | None, ...]
"""For each axis of a leaf the axis of the parameter that it is; None: none, or of size 1."""


class Cut(NamedTuple):
    """What happens to a parameter.

    Attributes:
        axes: by axis which positions stay, `bool [*layers, positions]`.
        trips: which of the layers of a scan stay, along axis 0; None: all.
        dropped: whether nothing is left of it.
    """

    axes: Mapping[int, np.ndarray] = {}
    trips: np.ndarray | None = None
    dropped: bool = False


def cuts_of(keep: Keep) -> dict[str, Cut]:
    """By path what happens to each parameter that changes."""
    cuts = {path: Cut(axes) for path, axes in kept_positions(keep).items()}
    for choice in keep.blocks:
        stays = np.asarray(choice.stays, bool)
        for path in choice.block.leaves:
            before = cuts.get(path, Cut())
            if stays.any():
                cuts[path] = before._replace(trips=stays)
            else:
                cuts[path] = before._replace(dropped=True)
    return {path: cut for path, cut in cuts.items() if cut.axes or cut.dropped or _fewer(cut)}


def _fewer(cut: Cut) -> bool:
    return cut.trips is not None and not cut.trips.all()


def reading(shape: tuple[int, ...], full: tuple[int, ...], cut: Cut, path: str) -> Places | None:
    """The axes of a leaf that belongs to a parameter; None where its shape doesn't tell.

    Args:
        shape: of the leaf.
        full: of the parameter.
        cut: what happens to it.
        path: of the leaf. `v_row` and `v_col` in it are Optax's factored second moments, by
            which a square parameter's are told apart.
    """
    if shape[max(0, len(shape) - len(full)) :] == full:
        return (*[None] * (len(shape) - len(full)), *range(len(full)))
    if np.prod(shape) <= 1:
        return (None,) * len(shape)
    touched = _touched(cut)
    if len(shape) == len(full):
        # Scales of groups: along an axis that is cut there must be one for each, or one.
        fits = all(
            n in (size, 1) or (d not in touched and size % n == 0)
            for d, (n, size) in enumerate(zip(shape, full, strict=True))
        )
        places = tuple(d if n == full[d] else None for d, n in enumerate(shape))
        return places if fits and _has_layers(places, cut) else None
    if len(shape) > len(full):
        return None
    several = [
        axes
        for axes in itertools.combinations(range(len(full)), len(shape))
        if tuple(full[d] for d in axes) == shape
    ]
    parts = path.split("/")
    if "v_row" in parts or "v_col" in parts:
        several = [axes for axes in several if axes == _factored(full, cut, "v_row" in parts)]
    # Several ways to read a shape are one where they cut alike.
    different = {tuple(_stays(cut, d) for d in axes): axes for axes in several}
    found = list(different.values())
    return found[0] if len(found) == 1 and _has_layers(found[0], cut) else None


def _touched(cut: Cut) -> set[int]:
    """Axes of the parameter that are cut, or whose indices tell what is cut."""
    layers = [d for stays in cut.axes.values() for d in range(stays.ndim - 1)]
    return {*cut.axes, *layers, *([] if cut.trips is None else [0])}


def _stays(cut: Cut, axis: int) -> Any:
    stays = cut.axes.get(axis)
    trips = cut.trips.tobytes() if cut.trips is not None and axis == 0 else None
    layer = any(axis < s.ndim - 1 for s in cut.axes.values())
    return (None if stays is None else stays.tobytes(), trips, axis if layer else None)


def _has_layers(places: Places, cut: Cut) -> bool:
    """Whether an axis that each layer cuts in its own way comes with the axes of the layers."""
    return all(
        set(range(stays.ndim - 1)) <= set(places) for d, stays in cut.axes.items() if d in places
    )


def _factored(full: tuple[int, ...], cut: Cut, rows: bool) -> tuple[int, ...] | None:
    """The axes of Optax's factored moments; None where they are others after the cut.

    Optax leaves out the largest axis for the rows, the second largest for the columns, and
    does not factor where that is below a threshold of its own, 128 if nothing else is said.
    """
    small = small_shape(full, cut)
    order, after = np.argsort(full)[-2:], np.argsort(small)[-2:]
    if list(order) != list(after) or full[order[0]] >= 128 > small[order[0]]:
        return None
    left_out = order[1] if rows else order[0]
    return tuple(d for d in range(len(full)) if d != left_out)


def small_shape(full: tuple[int, ...], cut: Cut) -> tuple[int, ...]:
    """The shape of a parameter after the cut."""
    return tuple(index[0].shape[-1] if (index := _index(cut, d)) else n for d, n in enumerate(full))


def _index(cut: Cut, axis: int) -> list[np.ndarray]:
    """The positions that stay along an axis of the parameter, `[*layers, kept]`, if it is cut.

    Those of the layers that are left out are not among them.
    """
    if axis == 0 and cut.trips is not None:
        return [np.flatnonzero(cut.trips)]
    if axis not in cut.axes:
        return []
    stays = np.asarray(cut.axes[axis], bool)
    if stays.ndim > 1 and cut.trips is not None:
        stays = stays[cut.trips]
    counts = stays.sum(-1)
    if counts.size and counts.min() != counts.max():
        rule, got = "keep as many units in each layer of a scan", counts.tolist()
        raise ValueError(_check.message("shrink_like", "keep", rule, got))
    return [np.nonzero(stays)[-1].reshape(*stays.shape[:-1], int(counts.max(initial=0)))]


def cut_leaf(leaf: Any, places: Places, cut: Cut) -> Any:
    """What stays of a leaf; of NumPy's, JAX's and abstract ones, each as it came."""
    # The layers first: the positions that stay are of those that are left.
    for d in sorted(_touched(cut)):
        for index in _index(cut, d):
            if d in places:
                layers = tuple(places.index(i) for i in range(index.ndim - 1))
                leaf = _taken(leaf, index, places.index(d), layers)
    return leaf


def _taken(leaf: Any, index: np.ndarray, axis: int, layers: tuple[int, ...]) -> Any:
    shape = tuple(index.shape[-1] if d == axis else n for d, n in enumerate(leaf.shape))
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf.update(shape=shape, sharding=_still_fitting(leaf.sharding, shape))

    def take(x, xp):
        if not layers:
            return xp.take(x, index, axis=axis)
        around = [1] * x.ndim
        for d, n in zip((*layers, axis), index.shape, strict=True):
            around[d] = n
        return xp.take_along_axis(x, index.reshape(around), axis=axis)

    if isinstance(leaf, (np.ndarray, np.generic)):
        return take(leaf, np)
    if not is_explicit(leaf):
        return take(jnp.asarray(leaf), jnp)
    place = on_mesh_of(leaf, _fitting_spec(leaf, shape))
    return jax.sharding.auto_axes(lambda x: take(x, jnp), out_sharding=place)(leaf)


def _fitting_spec(leaf: Any, shape: tuple[int, ...]) -> PartitionSpec:
    """The sharding of a leaf, without axes that no longer divide."""
    sharding = jax.typeof(leaf).sharding
    sizes = dict(sharding.mesh.shape)
    spec = (*sharding.spec, *[None] * leaf.ndim)[: leaf.ndim]

    def parts(names):
        names = names if isinstance(names, tuple) else () if names is None else (names,)
        return int(np.prod([sizes[name] for name in names]))

    return PartitionSpec(
        *(names if n % parts(names) == 0 else None for names, n in zip(spec, shape, strict=True))
    )


def _still_fitting(sharding: Any, shape: tuple[int, ...]) -> Any:
    try:
        if sharding is not None:
            sharding.shard_shape(shape)
    except ValueError:
        return None
    return sharding
