"""Running any function on compressed parameters."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxcompress import _check, arrays, tree
from jaxcompress._types import PyTree
from jaxcompress.tracing._dot import Dot, per_token
from jaxcompress.tracing._interpret import Hooks, interpret
from jaxcompress.tracing._jaxprs import trace
from jaxcompress.tracing._rules import StepOf, apply_rule, join
from jaxcompress.tracing._sites import Site, require_function, sites_of
from jaxcompress.tracing._weights import Weight


def lift(
    fn: Callable[..., PyTree],
    *,
    activations: Literal["float", "dynamic"] | Mapping[str, Any] = "float",
    densify: Literal["refuse", "allow"] = "refuse",
) -> Callable[..., PyTree]:
    r"""`fn` for params with compressed leaves: the unchanged model runs on what `jc.pack` gives.

    `fn` is traced on the dense shapes, and each equation that gets a compressed leaf is run by
    a rule for its operation and array type:

    ==================  ==============================================================
    low rank            two thinner products, in the cheaper order; two thinner
                        convolutions; the rows of one factor for an embedding
    kernels in stages   one convolution for each stage; strides, dilations and padding at the
                        stage along whose axis they are
    int8, one scale     products with the integer codes; the scale multiplies the
    per output or leaf  result. Integer products if `activations` says so
    other codes,        decoded where they are used, by fused elementwise operations;
    sparse, N:M         an embedding decodes only the rows that are asked for
    scaled or rotated   the activations are scaled or rotated first, also before they are
    input features      rounded to integers, then what is inside is multiplied
    sums                each part by its own rule, and the results added
    ==================  ==============================================================

    A leaf is followed through transposes, reshapes, casts, slices and `jit`, `scan` (one layer
    of a stacked leaf in each trip), `cond`, `while`, `checkpoint`, custom derivatives and
    `shard_map`. Elementwise arithmetic decodes it; that of low rank, and what else no rule
    covers, as `jnp.sum(w)`, is refused. Derivatives of functions with custom rules are taken
    on dense values.

    Args:
        fn: any function `fn(params, *args, **kwargs)`: a Flax Linen `apply`, a function that
            merges an NNX state or combines an Equinox module, Haiku's `apply`, your own.
            Arrays are traced; other arguments are static.
        activations: static. `"float"`; `"dynamic"`: at sites with int8 codes and scales that
            do not differ along the contracted axes, activations are rounded to int8 with one
            step per token, :math:`\max|x| / 127`, and multiplied as integers, summed in
            int32; or static ranges by site name, as `jc.calibrate(fn, jc.todense(params), …)` gives
            them: one step, :math:`\max(-low, high) / 127` over all features, which may be
            traced. A token with a NaN becomes NaN; with static ranges the NaN counts as zero.
            Leaves in scaled or rotated features take `"dynamic"` only.
        densify: static. `"allow"` makes leaves dense where there is no rule.

    Returns:
        A function of the same arguments. With no compressed leaf it calls `fn` itself. It can
        be differentiated in every floating-point part of the params (factors, scales,
        codebooks; `jax.grad(..., allow_int=True)` where there are codes), mapped and jitted.
        Without `jit` it is traced anew at each call.

    Raises:
        TypeError: an equation without a rule gets a compressed leaf; the message names the
            equation, the array type and the leaf's path. Or `fn` can't be called.
        ValueError: an option that is none of the above, or no range for a site.

    Cost: under `jit`, what the rules say. A 2048x2048 layer on two CPU cores, against
    float32: rank 128 is 6.3 times faster at batch 256; int8 with `"dynamic"` activations 1.5
    times; but int8 with float activations takes 1.7 times as long at batch 1 and 1.1 times at
    batch 256, and int4 in groups 2.5 times as long, as decoding costs more than it saves
    (`tests/benchmarks/results.json`).

    Examples:
        >>> params = {"w": jnp.ones((8, 8)), "b": jnp.zeros(8)}
        >>> small = jc.pack(jc.low_rank(1), params)
        >>> dense = lambda p, x: jax.nn.relu(x @ p["w"].T + p["b"])
        >>> jax.jit(jc.lift(dense))(small, jnp.ones((2, 8))).shape
        (2, 8)

    Source: integer products as in Jacob et al. 2017, arXiv:1712.05877, section 2.2. Differs:
    nothing is rounded back to integers, so layers may be quantized one by one.
    """
    require_function("lift", fn)
    _require_options(activations, densify)

    def lifted(*args: Any, **kwargs: Any) -> PyTree:
        leaves = jax.tree.leaves((args, kwargs), is_leaf=tree.is_array_like)
        if not any(arrays.is_compressed(leaf) for leaf in leaves):
            return fn(*args, **kwargs)
        traced = trace(fn, args, kwargs)
        sites = {(site.location, site.operand): site for site in sites_of(traced)}
        stacks = {site.name: site.stack for site in sites.values()}

        def dense(weight: Weight, eqn: Any) -> jax.Array:
            if densify == "refuse":
                raise _no_rule(weight, eqn)
            return weight.value.todense()

        def equation(location, eqn, values, given, run):
            compressed = [i for i, v in enumerate(values) if isinstance(v, Weight)]
            if len(compressed) == 1:
                operand = compressed[0]
                step_of = _step_of(activations, sites.get((location, operand)), given)
                result = apply_rule(values[operand], operand, values, eqn, run, step_of)
                if result is not None:
                    return [result], {}
            joined = join(values, eqn)
            if joined is not None:
                return [joined], {}
            return run([dense(v, eqn) if isinstance(v, Weight) else v for v in values])

        hooks = Hooks(
            frozenset(), equation, dense, stacks=lambda name, at: at in stacks.get(name, ())
        )
        values = [
            Weight(leaf, path) if arrays.is_compressed(leaf) else leaf
            for leaf, path in zip(traced.leaves, traced.paths, strict=True)
        ]
        ranges = {} if isinstance(activations, str) else activations
        given = {name: ranges[name] for name in stacks if name in ranges}
        results, _ = interpret(traced, values, hooks, given)
        return traced.results([_returned(r, dense) for r in results])

    return lifted


def _step_of(activations: Any, site: Site | None, given: Mapping[str, Any]) -> StepOf:
    """How the integer step of a site's activations is found; None for floating-point ones."""
    if activations == "float":
        return None
    if activations == "dynamic":
        return per_token

    def static(x: jax.Array, dot: Dot) -> jax.Array:
        del dot
        if site is None or site.name not in given:
            raise ValueError(
                _check.message(
                    "lift",
                    "activations",
                    "have a range for each site with integer products",
                    f"none for {'an unnamed site' if site is None else repr(site.name)}",
                    "Pass what jc.calibrate(fn, jc.todense(params), …) returned, or 'dynamic'.",
                )
            )
        span = given[site.name]
        largest = jnp.max(jnp.maximum(-span.low, span.high).astype(jnp.float32), initial=0.0)
        return jnp.where(largest == 0, 1.0, largest / 127).reshape((1,) * x.ndim)

    return static


def _returned(result: Any, dense: Callable[[Weight, Any], jax.Array]) -> Any:
    """A leaf that `fn` returns as it came goes out as it came."""
    if not isinstance(result, Weight):
        return result
    return result.value if arrays.is_compressed(result.value) else dense(result, None)


def _no_rule(weight: Weight, eqn: Any) -> TypeError:
    operation = "the function's result" if eqn is None else f"`{eqn.primitive.name}`"
    value = weight.value
    return TypeError(
        _check.message(
            "lift",
            "params",
            "be used by operations with a rule where they are compressed",
            f"{operation} of {type(value).__name__} {_check.describe(value)}",
            "Pass densify='allow' to make it dense there, or leave this leaf dense.",
            path=weight.path,
        )
    )


def _require_options(activations: Any, densify: Any) -> None:
    if not (
        activations in ("float", "dynamic")
        if isinstance(activations, str)
        else isinstance(activations, Mapping)
    ):
        raise ValueError(
            _check.message(
                "lift",
                "activations",
                "be 'float', 'dynamic' or ranges by site name",
                _check.describe(activations),
            )
        )
    if densify not in ("refuse", "allow"):
        raise ValueError(_check.message("lift", "densify", "be 'refuse' or 'allow'", repr(densify)))
