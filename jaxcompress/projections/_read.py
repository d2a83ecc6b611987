"""Compressing once, and reading what the adapters hold: compress, latent, structure, pack."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxcompress import _check, tree
from jaxcompress._types import PyTree
from jaxcompress.projections._base import (
    Projection,
    is_leaf_structure,
    is_masked_node,
    pack_leaves,
    show,
)
from jaxcompress.projections._combine import Chained, Partitioned, _require_projection
from jaxcompress.projections._optax import ProjectedState, ProjectState, StraightThroughState
from jaxcompress.projections._proximal import ProximalState
from jaxcompress.projections._reparametrize import ReparametrizedState
from jaxcompress.projections._restrict import RestrictedState
from jaxcompress.projections._time import Relaxed, Scheduled, Timed, require_hard

_ADAPTERS = (ProjectState, ProjectedState, StraightThroughState, ReparametrizedState)


def compress(projection: Projection, params: PyTree, *, step: int | jax.Array = 0) -> PyTree:
    """Projects once, after training: `project(params, find(params))`.

    Args:
        projection: any.
        params: any pytree of parameters; they are not changed.
        step: where schedules and `jc.every` are read. May be traced.

    Returns:
        Params of the same structure, shapes and dtypes: the simulated face. `jc.pack` gives
        the smaller arrays.

    Raises:
        TypeError: `projection` is not a `Projection`.

    Cost: one `find` and one `project`. Works under `jit` and `vmap`.

    Examples:
        >>> params = {"w": jnp.array([[1.0, -4.0], [3.0, 0.5]])}
        >>> jax.vmap(lambda s: jc.compress(jc.prune(s), params)["w"])(jnp.array([0.25, 0.75]))
        Array([[[ 1.,  -4.],
                [ 3.,   0.]],
               [[ 0.,  -4.],
                [ 0.,   0.]]], dtype=float32)
    """
    _require_projection("compress", projection)
    return projection.project(params, projection.find(params, step=jnp.asarray(step, jnp.int32)))


def latent(opt_state: PyTree, params: PyTree | None = None) -> PyTree:
    """The dense latent weights (or the latents of `reparametrized`), wherever they are nested.

    Args:
        opt_state: state of an optimizer with `straight_through` or `reparametrized` inside of
            any Optax wrapper. Several of them on parts of one tree (`optax.partition`) are
            put together.
        params: what to put at the leaves that no such optimizer trains. None leaves
            `optax.MaskedNode()` there.

    Returns:
        The tree of latents.

    Raises:
        ValueError: there is none.

    Examples:
        >>> opt = optax.chain(optax.clip(1.0), jc.straight_through(optax.sgd(1.0), jc.prune(0.5)))
        >>> jc.latent(opt.init({"w": jnp.array([[1.0, 2.0]])}))["w"]
        Array([[1., 2.]], dtype=float32)
    """
    latents = [s.latent for s in _adapters(opt_state) if hasattr(s, "latent")]
    if not latents:
        raise ValueError(
            _check.message(
                "latent",
                "opt_state",
                "hold the state of straight_through or reparametrized",
                type(opt_state).__name__,
                "Only those keep latent weights.",
            )
        )
    out = latents[0]
    for other in latents[1:]:
        out = show(other, out)
    return out if params is None else show(params, out)


def structure(opt_state: PyTree) -> PyTree:
    """The structure held (masks, scales, bases), wherever it is nested.

    Args:
        opt_state: state of an optimizer with `project_params`, `projected` or
            `straight_through` inside of any Optax wrapper.

    Returns:
        The structure; a tuple of them, in order, where there are several. For the library's
        own projections it is a dict from the path of a leaf to its `Mask`, `Grid`, `Basis` or
        `Centroids`, inside of what the combinators add.

    Raises:
        ValueError: there is none.

    Examples:
        >>> opt = optax.chain(optax.sgd(1.0), jc.project_params(jc.prune(0.5)))
        >>> jc.structure(opt.init({"w": jnp.array([[1.0, 2.0]])}))["w"].keep
        Array([[False,  True]], dtype=bool)
    """
    found = [s.structure for s in _adapters(opt_state) if hasattr(s, "structure")]
    if not found:
        raise ValueError(
            _check.message(
                "structure",
                "opt_state",
                "hold the state of project_params, projected or straight_through",
                type(opt_state).__name__,
            )
        )
    return found[0] if len(found) == 1 else tuple(found)


def pack(source: Projection | PyTree, params: PyTree, *, step: int = 0) -> PyTree:
    """Really smaller arrays: by a projection, or by what an optimizer's state holds.

    Args:
        source: a `Projection`, whose structure is then found on `params`; or an optimizer
            state, whose structures and latent weights are used as they are.
        params: the parameters; they are not changed. With an optimizer state, the trained
            ones.
        step: where the schedules of a projection are read.

    Returns:
        The tree of params with compressed arrays (`jaxcompress.arrays`) at the compressed
        leaves. A leaf whose packed form would be bigger stays dense. `tree.todense` of the
        result equals the projected params exactly (low rank: up to rounding).

    Raises:
        TypeError: called under `jit`, `vmap` or `grad`: packed shapes depend on values.
        ValueError: the state holds no structure, or one that only its projection can pack.

    Examples:
        >>> w = jnp.linspace(-1.0, 1.0, 256).reshape(16, 16)
        >>> packed = jc.pack(jc.chain(jc.prune(0.5), jc.quantize(4)), {"w": w})
        >>> w.nbytes, packed["w"].nbytes
        (1024, 160)
    """
    if isinstance(source, Projection):
        held = source.find(params, step=jnp.asarray(step, jnp.int32))
        return source.pack(params, held)
    states = _adapters(source)
    if not states:
        raise ValueError(
            _check.message(
                "pack",
                "source",
                "be a Projection or the state of an optimizer that has one",
                _check.describe(source),
                "Call jc.pack(projection, params).",
            )
        )
    for state in states:
        if isinstance(state, ReparametrizedState):
            params = _pack_latents(params, state.latent)
        else:
            # The latent weights are exact where a float32 update could not land exactly.
            dense = show(params, state.latent) if hasattr(state, "latent") else params
            params = _pack_structure(dense, state.structure)
    return params


def batch_axes(opt_state: PyTree) -> PyTree:
    """Axes for `vmap` over optimizer states that keep the clocks unbatched.

    A `jax.lax.cond` whose predicate is batched runs both of its branches. With these axes one
    counter serves the whole batch, and `jc.every` skips its work under `vmap` too. (There is
    nothing to do where the state is made inside of the mapped function.)

    Args:
        opt_state: one state, unbatched; abstract ones (`jax.eval_shape(opt.init, params)`)
            will do.

    Returns:
        The structure of `opt_state` with None at the step counters of the library's adapters
        and of `optax.MultiSteps`, and 0 at every other leaf: for `in_axes` and `out_axes`.

    Examples:
        >>> opt = jc.projected(optax.sgd(0.1), jc.every(10, jc.prune(0.5)))
        >>> grid = {"w": jnp.ones((3, 4, 4))}
        >>> one = jax.tree.map(lambda w: w[0], grid)
        >>> axes = jc.batch_axes(jax.eval_shape(opt.init, one))
        >>> states = jax.vmap(opt.init, out_axes=axes)(grid)
        >>> step = jax.vmap(opt.update, in_axes=(0, axes, 0), out_axes=(0, axes))
        >>> step(grid, states, grid)[1].step
        Array(1, dtype=int32)
    """
    clocked = (*_ADAPTERS, RestrictedState, ProximalState, optax.MultiStepsState)
    has_clock = lambda x: isinstance(x, clocked)  # noqa: E731
    clocks = ("step", "mini_step", "gradient_step")

    def axes(node):
        if not has_clock(node):
            return 0
        return type(node)(
            **{
                name: None if name in clocks else batch_axes(child)
                for name, child in node._asdict().items()
            }
        )

    return jax.tree.map(axes, opt_state, is_leaf=has_clock)


def _adapters(opt_state: PyTree) -> list[Any]:
    is_adapter = lambda x: isinstance(x, _ADAPTERS)  # noqa: E731
    return [x for x in jax.tree.leaves(opt_state, is_leaf=is_adapter) if is_adapter(x)]


def _pack_structure(params: PyTree, held: PyTree) -> PyTree:
    """Packs by the structure alone: it says which projection it came from."""
    if isinstance(held, (Chained, Partitioned)):
        parts = held.parts.values() if isinstance(held, Partitioned) else held.parts
        for part in parts:
            params = _pack_structure(params, part)
        return params
    if isinstance(held, Scheduled):
        return _pack_structure(params, held.inner)
    if isinstance(held, Timed):
        return _pack_structure(params, held.inner) if bool(held.active) else params
    if isinstance(held, Relaxed):
        require_hard(held)
        return _pack_structure(params, held.inner)
    if not all(map(is_leaf_structure, jax.tree.leaves(held, is_leaf=is_leaf_structure))):
        raise ValueError(
            _check.message(
                "pack",
                "source",
                "hold structures of the library's own projections",
                type(held).__name__,
                "Call your_projection.pack(params, jc.structure(opt_state)).",
            )
        )
    return pack_leaves(params, held)


def _pack_latents(params: PyTree, latents: PyTree) -> PyTree:
    """Latents that are compressed arrays, or pack to one, in the place of their leaves."""
    is_leaf = lambda x: tree.is_array_like(x) or is_masked_node(x)  # noqa: E731
    leaves, treedef = jax.tree.flatten(latents, is_leaf=is_leaf)
    if treedef != jax.tree.structure(params, is_leaf=is_leaf):
        raise ValueError(
            _check.message(
                "pack",
                "source",
                "hold latents that stand in the places of the params",
                treedef,
                "Pack them yourself from jc.latent(opt_state).",
            )
        )
    dense = tree.leaves_with_paths(params, is_leaf=is_masked_node)

    def leaf(path, w, z):
        if is_masked_node(z):
            return w
        if hasattr(type(z), "pack"):
            z = z.pack(path)
        if tree.is_array_like(z):
            return z if z.nbytes < tree.nbytes(w) else z.todense()
        return z

    return jax.tree.unflatten(
        treedef, [leaf(*old, z) for old, z in zip(dense, leaves, strict=True)]
    )
