"""A function, read for its positions: what its arguments and results say, and all inside."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxcompress import _check, tree
from jaxcompress.tracing._jaxprs import Traced, is_array, trace
from jaxcompress.tracing._sites import is_extra, require_function
from jaxcompress.tracing.positions._labels import whole
from jaxcompress.tracing.positions._read import read
from jaxcompress.tracing.positions._reading import Reading
from jaxcompress.tracing.positions._user_rules import AxisRule
from jaxcompress.tracing.positions._values import Value


class Program(NamedTuple):
    """A function that was read.

    Attributes:
        traced: the function.
        reading: of all equations.
        arguments: for each invar.
        results: for each outvar.
    """

    traced: Traced
    reading: Reading
    arguments: list[Value]
    results: list[Value]


def read_program(traced: Traced, rules: Mapping[str, AxisRule] | None = None) -> Program:
    """Reads a whole function, whose first argument may lose positions.

    The other arguments and the results stay as they are, but for results that are the new value
    of a leaf of the first argument: their path ends with that of the leaf, and they have its
    shape and dtype, as the statistics that a normalization returns.
    """
    reading = Reading(rules)
    for path, v in zip(traced.paths, traced.jaxpr.invars, strict=True):
        if not all(isinstance(n, int) for n in v.aval.shape):
            rule, got = "have known sizes", f"the shape {list(v.aval.shape)}"
            fix = "Export with fixed sizes, once for each."
            raise ValueError(_check.message("shrink", "args", rule, got, fix, path=path))
    arguments = []
    for i, (path, v) in enumerate(zip(traced.paths, traced.jaxpr.invars, strict=True)):
        shape = v.aval.shape
        arguments.append(parameter(reading, i, shape))
        if is_extra(path) or not jnp.issubdtype(v.aval.dtype, jnp.number):
            arguments[-1] = arguments[-1]._replace(removed=(None,) * len(shape))
            what = "it is an argument" if is_extra(path) else "it holds no numbers"
            reading.freeze(arguments[-1].labels, what)
    results = read(traced.jaxpr, traced.consts, arguments, reading)
    aliased = _aliases(traced, results)
    for k, (value, v) in enumerate(zip(results, traced.jaxpr.outvars, strict=True)):
        if k in aliased:
            for a, b in zip(value.labels, arguments[aliased[k]].labels, strict=True):
                reading.unify(a, b, "a result")
        elif len(value.labels) == len(v.aval.shape):
            reading.freeze(value.labels, "it is a result of the function")
    for i, (value, path) in enumerate(zip(arguments, traced.paths, strict=True)):
        if i not in reading.stacks and not is_extra(path):
            reading.freeze(value.labels, "it is not used")
    return Program(traced, reading, arguments, results)


def parameter(reading: Reading, i: int, shape: Sequence[int]) -> Value:
    """An argument that may lose positions of any axis, where it is zero then."""
    labels = tuple(reading.atoms.fresh(n) if n > 1 else whole(n) for n in shape)
    return Value(labels, (0.0,) * len(shape), source=(i, ()))


def _aliases(traced: Traced, results: Sequence[Value]) -> dict[int, int]:
    """From results to the leaves of the first argument that they are new values of."""
    numbered = traced.results(list(range(len(results))))
    leaves = {
        path: i
        for i, path in enumerate(traced.paths)
        if not is_extra(path) and path and is_array(traced.leaves[i])
    }
    found = {}
    for path, k in tree.leaves_with_paths(numbered):
        if not isinstance(k, int) or isinstance(k, bool):
            continue
        parts = path.split("/")
        for n in range(len(parts)):
            i = leaves.get("/".join(parts[n:]))
            # The number of a result is no name.
            if i is None or all(part.isdigit() for part in parts[n:]):
                continue
            a, b = traced.jaxpr.invars[i].aval, traced.jaxpr.outvars[k].aval
            if (a.shape, a.dtype) == (b.shape, b.dtype):
                found[k] = i
                break
    return found


def program_of(
    function: str, fn: Any, params: Any, args: Any, kwargs: Any, rules: Mapping[str, AxisRule]
) -> Program:
    """Traces and reads `fn(params, *args, **kwargs)`.

    Args:
        function: the name in errors.
        fn: that can be called.
        params: of which positions may leave.
        args: further arguments.
        kwargs: the same, by name.
        rules: of the user.
    """
    require_function(function, fn)
    return read_program(trace(fn, (params, *args), kwargs, parts=True), rules)
