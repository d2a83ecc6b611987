"""The uses of a projection inside of an Optax optimizer."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcompress import _check
from jaxcompress._types import Numeric, PyTree
from jaxcompress.projections import _moments
from jaxcompress.projections._base import Projection, observed
from jaxcompress.projections._combine import _require_projection
from jaxcompress.projections._held import alive_now, held_step
from jaxcompress.projections._land import apply, land, land_where_moved, wide
from jaxcompress.projections._numbers import number_at


class ProjectState(NamedTuple):
    """State of `project_params`: updates applied so far, and the structure held."""

    step: jax.Array
    structure: PyTree


class ProjectedState(NamedTuple):
    """State of `projected`: the same, and the inner optimizer's state."""

    step: jax.Array
    inner: PyTree
    structure: PyTree


class StraightThroughState(NamedTuple):
    """State of `straight_through`: the same, and the dense latent weights."""

    step: jax.Array
    inner: PyTree
    latent: PyTree
    structure: PyTree


def project_params(projection: Projection) -> optax.GradientTransformationExtraArgs:
    """The last link of a chain: the parameters that result are projected.

    After `optax.apply_updates` the parameters are `project(params + updates)`: projected
    gradient descent. Weights that were dropped go on receiving updates and may come back when
    the structure is found anew.

    Args:
        projection: what to project on. Wrap it in `jc.every` to find its structure only now
            and then.

    Returns:
        A transformation with the state `ProjectState(step, structure)`. Its updates are in
        float32 where the parameters are narrower, so that the sum lands on the target to the
        last bit. An extra argument `grads` reaches `find`; other extra arguments are ignored.

    Raises:
        TypeError: `projection` is not a `Projection`.
        ValueError: `update` was called without `params`.

    Cost: `find` when it is due and one `project`, an elementwise pass or a thin product.
    Put `optax.MultiSteps` around the whole chain: this link can't see an accumulation
    before it (`projected` and `straight_through` can).

    Examples:
        >>> opt = optax.chain(optax.sgd(0.1), jc.project_params(jc.prune(0.5)))
        >>> params = {"w": jnp.array([[1.0, 4.0]])}
        >>> updates, _ = opt.update({"w": jnp.ones((1, 2))}, opt.init(params), params)
        >>> optax.apply_updates(params, updates)["w"]
        Array([[0. , 3.9]], dtype=float32)
    """
    _require_projection("project_params", projection)

    def init(params):
        return ProjectState(_zero(), _first(projection, params))

    def update(updates, state, params=None, **extra):
        _require_params("project_params", params)
        moved, grads = apply(params, updates), extra.get("grads")
        previous = observed(projection, params, state.structure, grads, state.step)
        structure = projection.find(moved, previous=previous, grads=grads, step=state.step)
        target = projection.project(moved, structure)
        if projection.from_zero:
            alive = alive_now(projection, params, state.structure, structure)
            target = _moments.clear(target, params, alive)
        return land_where_moved(params, target, moved, updates), ProjectState(
            state.step + 1, structure
        )

    return optax.GradientTransformationExtraArgs(init, update)


def projected(
    optimizer: optax.GradientTransformation, projection: Projection
) -> optax.GradientTransformationExtraArgs:
    """An optimizer whose parameters stay in the projection's set.

    As `project_params`, and besides: the projection's `find` sees the raw gradients, the inner
    optimizer forgets what is dropped, and inside of an accumulation nothing is projected until
    an update is really applied. The moments of a dropped weight are zero as long as it is
    dropped. When it comes back they start anew with the gradient of that step, or, where the
    weight itself starts from zero as in `jc.pruning.rigl`, with that of the next.

    Args:
        optimizer: any Optax optimizer, of any nesting, `optax.MultiSteps` included.
        projection: what to project on.

    Returns:
        A transformation with the state `ProjectedState(step, inner, structure)`. Extra
        arguments reach the inner optimizer; `grads` among them replaces the incoming updates
        as what `find` sees.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: `update` was called without `params`.

    Cost: that of `project_params`, and one elementwise pass over the moments. Where the
    projection is held by `jc.every`, a step without a find only reads the mask (the optimizer
    is not given the gradients of dropped weights then), and one with a find takes the
    optimizer's update twice.

    Examples:
        >>> opt = jc.projected(optax.adam(0.1), jc.prune(0.5))
        >>> params = {"w": jnp.array([[1.0, 4.0]])}
        >>> updates, state = opt.update({"w": jnp.ones((1, 2))}, opt.init(params), params)
        >>> optax.apply_updates(params, updates)["w"].round(3)
        Array([[0. , 3.9]], dtype=float32)
        >>> state.inner[0].mu["w"]
        Array([[0. , 0.1]], dtype=float32)
    """
    _require_projection("projected", projection)
    inner_optimizer = _optimizer("projected", optimizer)

    def init(params):
        structure = _first(projection, params)
        return ProjectedState(_zero(), inner_optimizer.init(params), structure)

    def update(updates, state, params=None, **extra):
        _require_params("projected", params)
        grads = extra.get("grads", updates)

        def landed(updates, inner, structure, alive):
            moved = apply(params, updates)
            target = projection.project(moved, structure)
            if projection.from_zero:
                target = _moments.clear(target, params, alive)
            landing = land_where_moved(params, target, moved, updates)
            return landing, ProjectedState(state.step + 1, inner, structure)

        if projection.due is not None and not _multi_steps(state.inner):
            return landed(
                *held_step(inner_optimizer, projection, grads, updates, state, params, extra)
            )
        updates, inner = inner_optimizer.update(updates, state.inner, params, **extra)

        def applied():
            moved = apply(params, updates)
            previous = observed(projection, params, state.structure, grads, state.step)
            structure = projection.find(moved, previous=previous, grads=grads, step=state.step)
            alive = alive_now(projection, params, state.structure, structure)
            return landed(updates, _moments.clear(inner, params, alive), structure, alive)

        return _when_applied(state.inner, inner, params, updates, applied, state)

    return optax.GradientTransformationExtraArgs(init, update)


def straight_through(
    optimizer: optax.GradientTransformation, projection: Projection, decay: Numeric = 0.0
) -> optax.GradientTransformationExtraArgs:
    r"""Trains dense latent weights behind parameters that are always projected.

    .. math:: v_{t+1} = v_t + \mathrm{opt}(\nabla L(w_t) + \lambda\,(v_t - w_t)), \qquad
        w_{t+1} = P(v_{t+1})

    The gradient is taken at the projected parameters and applied to the latent ones: the
    straight-through estimator, with no change to the model or to the training loop.

    Args:
        optimizer: any Optax optimizer. It sees the latent weights as its `params`.
        projection: what to project on; it ranks and fits on the latent weights.
        decay: :math:`\lambda`, pulls the latent weights towards the projected ones. For a mask
            that is a decay of the dropped weights alone: SR-STE. A number or an Optax schedule
            of the step; may be traced. A Python 0 costs nothing.

    Returns:
        A transformation with the state `StraightThroughState(step, inner, latent,
        structure)`; `jc.latent(opt_state)` reads the latent weights wherever they are nested.
        The latent weights start as the params given to `init`; the params are projected from
        the first applied update on. Extra arguments reach the inner optimizer.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: `update` was called without `params`.

    Cost: one more copy of the parameters, and that of `project_params`.

    Examples:
        >>> opt = jc.straight_through(optax.sgd(0.1), jc.quantize(bits=2))
        >>> params = {"w": jnp.array([[1.0], [0.4]])}
        >>> updates, state = opt.update({"w": jnp.ones((2, 1))}, opt.init(params), params)
        >>> optax.apply_updates(params, updates)["w"].ravel(), jc.latent(state)["w"].ravel()
        (Array([0.9, 0. ], dtype=float32), Array([0.9, 0.3], dtype=float32))

    Source: Bengio et al. 2013, arXiv:1308.3432; latent weights as in Courbariaux et al.
    2015, arXiv:1511.00363; the decay from Zhou et al. 2021, arXiv:2102.04010, equation 8.
    """
    _require_projection("straight_through", projection)
    _check.numeric("straight_through", "decay", decay, 0)
    decays = callable(decay) or _check.is_traced(decay) or decay != 0
    inner_optimizer = _optimizer("straight_through", optimizer)

    def init(params):
        structure = _first(projection, params)
        latent = own_copy(params, params)
        return StraightThroughState(_zero(), inner_optimizer.init(params), latent, structure)

    def update(updates, state, params=None, **extra):
        _require_params("straight_through", params)
        grads = extra.get("grads", updates)
        if decays:
            updates = _pulled(updates, state.latent, params, number_at(decay, state.step))
        updates, inner = inner_optimizer.update(updates, state.inner, state.latent, **extra)

        def applied():
            latent = apply(state.latent, updates)
            previous = observed(projection, state.latent, state.structure, grads, state.step)
            structure = projection.find(latent, previous=previous, grads=grads, step=state.step)
            target = projection.project(latent, structure)
            landed = land(params, target)
            return landed, StraightThroughState(state.step + 1, inner, latent, structure)

        return _when_applied(state.inner, inner, params, updates, applied, state)

    return optax.GradientTransformationExtraArgs(init, update)


def _first(projection: Projection, params: PyTree) -> PyTree:
    """The structure before any update. There is no gradient yet: as if it were zero."""
    return projection.find(params, grads=jax.tree.map(jnp.zeros_like, params), step=_zero())


def own_copy(latent: PyTree, params: PyTree) -> PyTree:
    """`latent` with arrays of its own: a step may donate the params and the state."""
    shared = {id(w) for w in jax.tree.leaves(params)}
    return jax.tree.map(lambda z: jnp.array(z) if id(z) in shared else z, latent)


def _pulled(updates: PyTree, latent: PyTree, params: PyTree, strength: jax.Array) -> PyTree:
    def leaf(u, v, w):
        if u is None:
            return None
        common = wide(u.dtype)
        gap = v.astype(common) - w.astype(common)
        return (u.astype(common) + strength.astype(common) * gap).astype(u.dtype)

    return jax.tree.map(leaf, updates, latent, params, is_leaf=lambda x: x is None)


def _when_applied(
    before: PyTree,
    after: PyTree,
    params: PyTree,
    updates: PyTree,
    applied: Callable[[], tuple[PyTree, Any]],
    state: Any,
) -> tuple[PyTree, Any]:
    """`applied()`, or nothing while an `optax.MultiSteps` inside is still accumulating."""
    now = emitted(before, after)
    if now is None:
        return applied()
    shapes, _ = jax.eval_shape(applied)
    held = jax.tree.map(lambda u: jnp.zeros(u.shape, u.dtype), shapes)
    return jax.lax.cond(now, applied, lambda: (held, state._replace(inner=after)))


def emitted(before: PyTree, after: PyTree) -> jax.Array | None:
    """Whether an `optax.MultiSteps` inside has made an update; None where there is none."""
    counters = [
        (old.gradient_step, new.gradient_step)
        for old, new in zip(_multi_steps(before), _multi_steps(after), strict=True)
    ]
    if not counters:
        return None
    return jnp.any(jnp.stack([jnp.any(old != new) for old, new in counters]))


def _multi_steps(state: PyTree) -> list[optax.MultiStepsState]:
    is_multi = lambda x: isinstance(x, optax.MultiStepsState)  # noqa: E731
    return [x for x in jax.tree.leaves(state, is_leaf=is_multi) if is_multi(x)]


def _zero() -> jax.Array:
    return jnp.zeros((), jnp.int32)


def _optimizer(function: str, optimizer: Any) -> optax.GradientTransformationExtraArgs:
    if isinstance(optimizer, optax.MultiSteps):
        # Its own gradient_transformation() would drop the extra arguments.
        init, update = optimizer.init, optimizer.update
        return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]
    if not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(
            _check.message(
                function,
                "optimizer",
                "be an optax.GradientTransformation",
                _check.describe(optimizer),
                "Pass the optimizer first and the projection second.",
            )
        )
    return optax.with_extra_args_support(optimizer)


def _require_params(function: str, params: Any) -> None:
    if params is None:
        raise ValueError(
            _check.message(
                function,
                "params",
                "be given to update",
                "None",
                "Call optimizer.update(grads, state, params).",
            )
        )
