"""The schemes of every kernel beside one another, at one cost."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress import _check, tree
from jaxcompress._types import PyTree
from jaxcompress.factorization._decompose import Method
from jaxcompress.factorization._scheme_checks import (
    SCHEMES,
    Scheme,
    require_options,
    require_scheme,
    sizes_at,
)
from jaxcompress.factorization._scheme_costs import Sizes
from jaxcompress.factorization._schemes import (
    Knob,
    Options,
    cost_of,
    fit,
    merits,
    ranks_of,
    relative_error,
    smaller_schemes,
)


class SchemeFit(NamedTuple):
    """A scheme at the rank that fits.

    Attributes:
        rank: one number, or those of inputs and outputs of `"tucker"`.
        cost: as a fraction of the dense kernel.
        error: the Frobenius norm of what is left out, relative to that of the kernel.
    """

    rank: int | tuple[int, int]
    cost: float
    error: float


class SchemeChoice(NamedTuple):
    """What `convolution_schemes` found of a kernel.

    Attributes:
        best: the name of the best scheme; `"dense"` where none is smaller.
        fits: by the name of the scheme; without those that are not smaller even at rank 1.
    """

    best: str
    fits: dict[str, SchemeFit]


def convolution_schemes(
    params: PyTree,
    fraction: float,
    *,
    schemes: Sequence[Scheme] = SCHEMES,
    sizes: Mapping[str, Sizes] | None = None,
    iterations: int | None = None,
    method: Method = "auto",
) -> dict[str, SchemeChoice]:
    r"""For each kernel the schemes of `convolution` at one cost, their errors, and the best.

    Args:
        params: a tree; its floating-point leaves of three or more dimensions
            `[*spatial, in, out]` are looked at. Concrete.
        fraction: the cost, above 0 and up to 1, as a fraction of the dense kernel's. Each
            scheme takes the largest rank that fits (1 where none does) and costs less than the
            dense kernel; Tucker the pair of ranks with the smallest bound of the error.
        schemes: which to compare, see `convolution`.
        sizes: from paths to the sizes along the spatial axes of (inputs, outputs): there
            multiply-adds are the cost, which strides make differ from the parameters; of other
            paths parameters are.
        iterations: as `convolution` takes it.
        method: as `convolution` takes it.

    Returns:
        From paths to a `SchemeChoice`. The error is that of the kernel in the Frobenius norm,
        measured, which of `"output"`, `"input"` and `"spatial"` is the root of the dropped
        squared singular values. The best has the smallest error of those within the cost; where
        none is, the smallest cost. As a `scheme` of `convolution` it gives the same factors.

    Raises:
        ValueError: `fraction` or an option out of range.
        TypeError: the params are traced.

    Cost: that of all the decompositions; `"cp"` most of it.

    Examples:
        >>> w = jax.random.normal(jax.random.key(0), (3, 3, 8, 16))
        >>> params = {"conv": w.at[:, :, 2:].multiply(0.1)}  # two inputs matter
        >>> found = jc.factorization.convolution_schemes(params, 0.5, schemes=["output", "input"])
        >>> found["conv"].best, found["conv"].fits["input"].rank
        ('input', 3)
        >>> best = {path: choice.best for path, choice in found.items()}
        >>> small = jc.pack(jc.factorization.convolution(fraction=0.5, scheme=best), params)
        >>> small["conv"].nbytes < 0.5 * w.nbytes
        True

    Source: the comparison at equal speed of Zhang et al. 2016, arXiv:1505.06798, section 4.
    Differs: by the error of the kernel.
    """
    function = "convolution_schemes"
    for scheme in schemes:
        require_scheme(function, "schemes", scheme)
    require_options(function, iterations, method)
    _check.number(function, "fraction", fraction, 0, 1)
    out = {}
    for path, w in tree.leaves_with_paths(params):
        if not (tree.is_weight(path, w) and len(w.shape) > 2) or tree.is_array_like(w):
            continue
        if _check.is_traced(w):
            rule, fix = "be concrete, since a table is made", "Call it outside of jit."
            raise TypeError(_check.message(function, "params", rule, "a tracer", fix, path=path))
        at = sizes_at(function, sizes, path, w)
        options = Options(None, iterations, method, at, float(fraction))
        knob = Knob("fraction", (jnp.asarray(fraction, jnp.float32),))
        names = smaller_schemes(schemes, w.shape, options)
        fits, order = {}, {}
        for name in names:
            s, error, cost = _measured(jnp.asarray(w), name, knob, options)
            ranks = ranks_of(s)
            order[name] = float(merits(error, cost, knob.values[0]))
            rank = ranks if len(ranks) == 2 else ranks[0]
            fits[name] = SchemeFit(rank, float(cost), float(error))
        out[path] = SchemeChoice(min(order, key=lambda n: order[n]) if order else "dense", fits)
    return out


def _measured(w: jax.Array, scheme: str, knob: Knob, options: Options):
    s = fit(w, scheme, knob, options)
    return s, relative_error(w, s), cost_of(s, scheme, w.shape, options.sizes)
