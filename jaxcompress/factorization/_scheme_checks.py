"""The names of the schemes of a kernel, and what their options must be."""

from collections.abc import Mapping
from typing import Any, Literal

from jaxcompress import _check
from jaxcompress._types import Shaped
from jaxcompress.factorization._decompose import check_method
from jaxcompress.factorization._scheme_costs import Sizes

Scheme = Literal["output", "input", "spatial", "tucker", "cp"]

SCHEMES: tuple[Scheme, ...] = ("output", "input", "spatial", "tucker", "cp")


def require_scheme(function: str, argument: str, scheme: Any) -> None:
    """Refuses what is no scheme."""
    if scheme not in SCHEMES:
        got = _check.describe(scheme)
        raise ValueError(_check.message(function, argument, f"be one of {SCHEMES}", got))


def require_options(function: str, iterations: Any, method: Any) -> None:
    """Refuses options out of range."""
    check_method(function, method)
    if iterations is not None:
        _check.integer(function, "iterations", iterations, 0)


def require_kernel(function: str, path: str, w: Shaped) -> None:
    """Refuses leaves that are no kernels of convolutions."""
    _check.floating(function, "params", w, path)
    if len(w.shape) < 3:
        rule = "have kernels [*spatial, in, out] of three or more dimensions"
        fix = "Choose other leaves with jc.masked(p, where); jc.low_rank takes matrices."
        raise ValueError(
            _check.message(function, "params", rule, _check.describe(w), fix, path=path)
        )


def sizes_at(
    function: str, sizes: Mapping[str, Sizes] | None, path: str, w: Shaped
) -> Sizes | None:
    """Those of a leaf, checked; None where there are none."""
    if sizes is None or path not in sizes:
        return None
    found, spatial = sizes[path], len(w.shape) - 2
    fits = isinstance(found, tuple) and len(found) == 2
    fits = fits and all(len(side) == spatial and all(n >= 1 for n in side) for side in found)
    if not fits:
        rule = f"have two tuples of {spatial} positive sizes"
        raise ValueError(_check.message(function, "sizes", rule, found, path=path))
    return found
