"""Convolutions of low rank, as a projection."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from jaxcompress import _check, tree
from jaxcompress._types import Numeric
from jaxcompress.factorization._decompose import Method
from jaxcompress.factorization._scheme_checks import (
    SCHEMES,
    Scheme,
    require_kernel,
    require_options,
    require_scheme,
    sizes_at,
)
from jaxcompress.factorization._scheme_costs import Sizes
from jaxcompress.factorization._schemes import Knob, Options, Whole, choose
from jaxcompress.projections import Projection, number_at, of_leaves

_NAME = "convolution"


def convolution(
    rank: Numeric | tuple[Numeric, Numeric] | None = None,
    energy: Numeric | tuple[Numeric, Numeric] | None = None,
    fraction: Numeric | None = None,
    *,
    scheme: Scheme | Literal["auto"] | Sequence[Scheme] | Mapping[str, str] = "output",
    max_rank: int | tuple[int, int] | None = None,
    iterations: int | None = None,
    method: Method = "auto",
    sizes: Mapping[str, Sizes] | None = None,
) -> Projection:
    r"""Kernels of convolutions as a few smaller ones, which `jc.lift` runs in sequence.

    For a kernel `[*spatial, in, out]`, here :math:`W_{yxio}`:

    ==============  ============================================================================
    `"output"`      :math:`\sum_r A_{yxir}\,B_{ro}`: to r features, then a 1x1 convolution
    `"input"`       :math:`\sum_r A_{ir}\,B_{yxro}`: a 1x1 convolution to r features first
    `"spatial"`     :math:`\sum_r A_{yir}\,B_{xro}`: along the first axis, then along the others
    `"tucker"`      :math:`\sum_{pq} A_{ip}\,G_{yxpq}\,B_{oq}`: 1x1, the core, 1x1
    `"cp"`          :math:`\sum_r A_{ir}\,Y_{yr}\,X_{xr}\,B_{or}`: 1x1, along each axis by
                    itself for each of r features, 1x1
    ==============  ============================================================================

    The first three are truncated singular value decompositions of the kernel as a matrix.
    Tucker is the higher-order SVD, then orthogonal iterations, which never increase the error;
    CP alternating least squares. Strides, dilations and paddings are the user's function's, and
    `jc.lift` gives each to the stage along whose axis it is. The bias stays where it is.

    Args:
        rank: :math:`r`, at least 0; above the full rank it counts as full. For `"tucker"` a pair
            :math:`(p, q)` of inputs and outputs, or one number for both. May be traced.
        energy: instead of `rank`: the smallest :math:`r` that holds this fraction, 0 to 1, of
            the sum of the *squared* singular values; for `"tucker"` along inputs and outputs
            each, a pair or one number for both. Not for `"cp"`. May be traced.
        fraction: instead of `rank`: the largest rank whose cost is at most this fraction of the
            dense kernel's and below it, at least 1; for `"tucker"` of all pairs the one with the
            smallest bound of the error. May be traced.
        scheme: static. One of the above; several, or `"auto"` for all five: for each leaf the
            one with the smallest error at the `fraction`; or from the paths of leaves to one
            each: the leaves that it does not name, or calls `"dense"`, stay dense.
        max_rank: static. The most columns that the structure may hold, a pair for `"tucker"` if
            they differ; by default `rank` or what the `fraction` takes where that is a Python
            number, else all. With a traced `rank` of `"cp"`, whose full rank is large, give it.
        iterations: static. Of `"tucker"` (by default 3) and of `"cp"` (by default 100).
        method: static. Of the decompositions, see `jc.factorization.svd`.
        sizes: static. From paths to the sizes along the spatial axes of (inputs, outputs):
            the cost is then in multiply-adds, with strides, not in parameters.

    Returns:
        A projection on leaves of three or more dimensions. A held structure projects on the
        held subspaces, orthogonally: of CP on the span of its factors but the last. With one
        of the matrix schemes the error in the Frobenius norm is the root of the sum of the
        dropped squared singular values; Tucker's is at most that of both sides together. Exact at
        full rank, CP at the sum of the ranks of the matrices at all places. A NaN or infinite
        entry makes the whole leaf NaN. Rank 0 gives zeros. Empty leaves stay as they are, and
        with `fraction` those that rank 1 does not make smaller. Gradients are those of the
        projection on the held subspaces.

        `pack` gives `arrays.LowRank` for `"output"`, else `arrays.ConvChain`, and leaves a leaf
        dense where these are not smaller. A projection does not see the function: a kernel of
        a grouped convolution, `[*spatial, in / groups, out]`, is factorized as it lies, and
        each group runs the same first stages, whose multiply-adds then are `groups` times those
        counted here. For depthwise ones, of one input, that seldom pays: leave them out with
        `jc.masked`, or by a mapping as `scheme`.

    Raises:
        ValueError: none or several of `rank`, `energy` and `fraction`, or one out of range or
            not for the scheme; several schemes without `fraction`; a chosen leaf has fewer than
            three dimensions; a mapping names a leaf that there is not.
        TypeError: a chosen leaf is not real floating point; raised while tracing.

    Cost: `find` is a decomposition per leaf; of `"tucker"` 2 + 2 `iterations`; of `"cp"` twice
    :math:`4\, r \prod_d n_d` per iteration. `project` is a few thin products. Of several schemes
    all are found and held. To decompose for a layer's inputs, `jc.compress(jc.low_rank(r), params,
    stats=…)` is `"output"` weighted by their Gram matrix; the others have no closed form there.

    Examples:
        >>> params = {"conv": jnp.ones((3, 3, 8, 16))}
        >>> p = jc.factorization.convolution(rank=2, scheme="spatial")
        >>> jc.pack(p, params)["conv"]
        ConvChain(float32[3, 3, 8, 16], stages=[[3, 1, 8, 2], [1, 3, 2, 16]], nbytes=576)
        >>> p = jc.factorization.convolution(fraction=0.3, scheme=["input", "tucker"])
        >>> bool(jnp.allclose(jc.compress(p, params)["conv"], 1.0))
        True

    Source: `"output"` Zhang et al. 2016, arXiv:1505.06798, section 3.1; `"input"` Denton et al.
    2014, arXiv:1404.0736; `"spatial"` Jaderberg et al. 2014, arXiv:1405.3866, scheme 2;
    `"tucker"` Kim et al. 2016, arXiv:1511.06530, by the iterations of De Lathauwer et al. 2000,
    "On the best rank-1 and rank-(R1, …, RN) approximation of higher-order tensors"; `"cp"`
    Lebedev et al. 2015, arXiv:1412.6553. Differs: CP by alternating least squares, each factor
    near the one before (Li et al. 2013, arXiv:1109.3831), from the largest terms of the places
    and from the singular vectors along each axis; it may end in a local optimum.
    """
    given = {"rank": rank, "energy": energy, "fraction": fraction}
    kind, value = _one_of(given)
    values = value if isinstance(value, tuple) else (value,)
    high = None if kind == "rank" else 1
    for one in values:
        _check.numeric(_NAME, kind, one, 0, high)
    schemes_at = _schemes_at(scheme)
    require_options(_NAME, iterations, method)
    columns = _columns(kind, values, max_rank)
    most = float(values[0]) if kind == "fraction" and _is_static(values[0]) else None  # pyright: ignore[reportArgumentType]

    def find_kernels(params, step, strict):
        if isinstance(scheme, Mapping):
            _require_paths(scheme, params)
        knob = Knob(kind, tuple(number_at(v, step).astype(jnp.float32) for v in values))

        def leaf(path, w):
            if len(w.shape) < 3 and not strict:
                return Whole()
            require_kernel(_NAME, path, w)
            chosen = schemes_at(path)
            _require_fit(chosen, kind, len(values), path)
            options = Options(columns, iterations, method, sizes_at(_NAME, sizes, path, w), most)
            return choose(w, chosen, knob, options)

        return tree.map_arrays_with_path(leaf, params)

    def found(strict):
        def find(params, *, previous=None, grads=None, step=0):
            del previous, grads
            return find_kernels(params, step, strict)

        return of_leaves(find)

    # Matrices are left alone, unless the user chooses them.
    return found(False)._replace(everywhere=found(True).everywhere)


def _one_of(given: dict[str, Any]) -> tuple[str, Any]:
    there = [(name, value) for name, value in given.items() if value is not None]
    if len(there) != 1:
        rule = "be given, or else `energy` or `fraction`, but only one of them"
        got = ", ".join(f"{name}={value!r}" for name, value in given.items())
        raise ValueError(_check.message(_NAME, "rank", rule, got))
    name, value = there[0]
    if isinstance(value, tuple) and (len(value) != 2 or name == "fraction"):
        rule = "be a number" if name == "fraction" else "be a number or two of them"
        raise ValueError(_check.message(_NAME, name, rule, _check.describe(value)))
    return name, value


def _is_static(value: Any) -> bool:
    return isinstance(value, (int, float, np.number))


def _columns(kind: str, values: tuple[Any, ...], max_rank: Any) -> tuple[int, ...] | None:
    if max_rank is not None:
        columns = max_rank if isinstance(max_rank, tuple) else (max_rank,)
        for one in columns:
            _check.integer(_NAME, "max_rank", one, 0)
        return columns if len(columns) > 1 else columns * 2
    if kind == "rank" and all(map(_is_static, values)):
        return tuple(round(float(v)) for v in values * (3 - len(values)))
    return None


def _schemes_at(scheme: Any) -> Any:
    """From a path to the schemes to try there."""
    if isinstance(scheme, Mapping):
        for one in scheme.values():
            if one != "dense":
                require_scheme(_NAME, "scheme", one)
        named = {path: [] if one == "dense" else [one] for path, one in scheme.items()}
        return lambda path: named.get(path, [])
    schemes = SCHEMES if scheme == "auto" else [scheme] if isinstance(scheme, str) else scheme
    for one in schemes:
        require_scheme(_NAME, "scheme", one)
    if not schemes:
        raise ValueError(_check.message(_NAME, "scheme", "name one or more", repr(scheme)))
    return lambda path: list(schemes)


def _require_paths(scheme: Mapping[str, str], params: Any) -> None:
    paths = [path for path, _ in tree.leaves_with_paths(params)]
    missing = sorted(set(scheme) - set(paths))
    if missing:
        fix = f"The paths there are: {paths[:50]}."
        raise ValueError(_check.message(_NAME, "scheme", "name leaves", missing, fix))


def _require_fit(schemes: Sequence[str], kind: str, count: int, path: str) -> None:
    if len(schemes) > 1 and kind != "fraction":
        rule, got = "be one scheme, or come with `fraction`", schemes
        raise ValueError(_check.message(_NAME, "scheme", rule, got, path=path))
    if kind == "energy" and "cp" in schemes:
        rule, got = "not be given for 'cp', which has no singular values", "one"
        raise ValueError(_check.message(_NAME, "energy", rule, got, "Give `rank`.", path=path))
    if count == 2 and schemes and schemes[0] != "tucker":
        rule, got = "be one number, or come with 'tucker'", f"two with {schemes[0]!r}"
        raise ValueError(_check.message(_NAME, kind, rule, got, path=path))
