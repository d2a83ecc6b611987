"""Quantizing what goes into the products, in simulation."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxcompress import _check, tree
from jaxcompress._types import Numeric, PyTree
from jaxcompress.tracing._calibrate import chosen_sites
from jaxcompress.tracing._inputs import PRODUCTS, activations_of, contracted
from jaxcompress.tracing._interpret import Hooks, interpret
from jaxcompress.tracing._jaxprs import trace
from jaxcompress.tracing._sites import Site, require_function, sites_of

_BITS = "[bits]"


def quantize_activations(
    fn: Callable[..., PyTree],
    bits: Numeric = 8,
    *,
    ranges: Mapping[str, Any] | None = None,
    per: Literal["token", "tensor"] = "token",
    symmetric: bool = True,
    where: tree.Where | None = None,
) -> Callable[..., PyTree]:
    r"""`fn` with the inputs of its sites rounded to integers and back.

    .. math:: \hat x = \Delta\left(\mathrm{clip}(\lfloor x / \Delta \rceil + z, l, u) - z\right)

    symmetric: :math:`z = 0,\ u = -l = 2^{b-1} - 1,\ \Delta = \max(-low, high) / u`; else
    :math:`l = 0,\ u = 2^b - 1,\ \Delta = (high - low) / u,\ z = \lfloor -low / \Delta \rceil`,
    with low at most 0 and high at least 0, so that zero stays zero. The gradient is that of
    the identity within the range and zero outside.

    Args:
        fn: any function `fn(params, *args, **kwargs)`. For compressed params too put `jc.lift`
            around the result, `jc.lift(jc.quantize_activations(fn))`: sites keep the names that
            they have with dense params.
        bits: :math:`b`, in bits, at least 2 if symmetric, else 1. May be traced.
        ranges: by site name, anything with `low` and `high`, as `jc.calibrate` returns (with
            a leading axis for layers of a scan); per tensor or per feature. May be traced.
            None: dynamic ranges, from the activations themselves.
        per: static. Of dynamic ranges: one for each token, or for the whole tensor.
        symmetric: static.
        where: static. Which sites, by their names, as for `jaxcompress.tree.select`; None
            for all products and convolutions with a parameter.

    Returns:
        A function of the same arguments, with results of the same dtypes. A NaN stays NaN;
        where the range is a point, activations are clipped to it.

    Raises:
        ValueError: `bits` is a number out of range, `where` matches no site, or a chosen site
            has no range. Raised while tracing.
        TypeError: `fn` can't be called.

    Cost: a reduction and an elementwise pass over the inputs of each site; without the
    reduction for given ranges. For real integer products see `jc.lift`.

    Examples:
        >>> fn = lambda p, x: x @ p["w"]
        >>> params, x = {"w": jnp.eye(2)}, jnp.array([[1.0, 0.3]])
        >>> jc.quantize_activations(fn, bits=2)(params, x)
        Array([[1., 0.]], dtype=float32)
        >>> jax.vmap(lambda b: jc.quantize_activations(fn, b)(params, x))(jnp.arange(2, 5)).shape
        (3, 1, 2)

    Source: Jacob et al. 2017, arXiv:1712.05877, sections 2.1 and 3; the gradient is that of
    Bengio et al. 2013, arXiv:1308.3432.
    """
    require_function("quantize_activations", fn)
    _check.number("quantize_activations", "bits", bits, 2 if symmetric else 1)
    if per not in ("token", "tensor"):
        rule = "be 'token' or 'tensor'"
        raise ValueError(_check.message("quantize_activations", "per", rule, repr(per)))

    def quantized(*args: Any, **kwargs: Any) -> PyTree:
        traced = trace(fn, args, kwargs, parts=True)
        sites = [site for site in sites_of(traced) if site.op in PRODUCTS]
        sites = chosen_sites("quantize_activations", sites, where)
        stack = {site.name: site.stack for site in sites}
        by_location: dict[Any, list[Site]] = {}
        for site in sites:
            by_location.setdefault(site.location, []).append(site)

        def equation(location, eqn, values, given, run):
            values = list(values)
            for site in by_location[location]:
                i = activations_of(site.operand)
                axes = contracted(eqn, site.operand)
                low, high = _span(values[i], axes, given.get(site.name), per)
                values[i] = _rounded(values[i], low, high, given[_BITS], symmetric)
            return run(values)

        hooks = Hooks(
            frozenset(by_location),
            equation,
            stacks=lambda name, location: location in stack.get(name, ()),
        )
        given = {_BITS: jnp.asarray(bits, jnp.float32)} | _given(ranges, sites)
        results, _ = interpret(traced, traced.leaves, hooks, given)
        return traced.results(results)

    return quantized


def _given(ranges: Mapping[str, Any] | None, sites: list[Site]) -> dict[str, Any]:
    if ranges is None:
        return {}
    missing = [site.name for site in sites if site.name not in ranges]
    if missing:
        raise ValueError(
            _check.message(
                "quantize_activations",
                "ranges",
                "have a range for each chosen site",
                f"none for {missing}",
                "Calibrate this function, or choose fewer sites with `where`.",
            )
        )
    found = {site.name: ranges[site.name] for site in sites}
    return {
        name: tuple(jnp.asarray(x, jnp.float32) for x in (span.low, span.high))
        for name, span in found.items()
    }


def _span(x: jax.Array, axes: tuple[int, ...], span: Any, per: str):
    """Both ends of the range, to be broadcast against the activations."""
    if span is None:
        wide = jax.lax.stop_gradient(x.astype(jnp.float32))
        over = axes if per == "token" else tuple(range(x.ndim))
        low = jnp.min(wide, over, keepdims=True, initial=0.0)
        return low, jnp.max(wide, over, keepdims=True, initial=0.0)
    sizes = [x.shape[d] if d in axes else 1 for d in range(x.ndim)]
    shape = sizes if span[0].ndim else [1] * x.ndim
    return tuple(end.reshape(shape) for end in span)


def _rounded(x: jax.Array, low, high, bits: jax.Array, symmetric: bool) -> jax.Array:
    wide = x.astype(jnp.float32)
    if symmetric:
        top = 2.0 ** (bits - 1) - 1
        high = jnp.maximum(-low, high)
        low, bottom, zero = -high, -top, 0.0
    else:
        top, bottom = 2.0**bits - 1, 0.0
        low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
        zero = None
    step = (high - low) / (top - bottom)
    step = jnp.where(step > 0, step, 1.0)
    zero = jnp.round(-low / step) if zero is None else zero
    code = jnp.clip(jnp.round(wide / step) + zero, bottom, top)
    # The identity's gradient where the range lets the value through.
    inside = jnp.clip(wide, low, high)
    value = inside + jax.lax.stop_gradient((code - zero) * step - inside)
    return value.astype(x.dtype)
