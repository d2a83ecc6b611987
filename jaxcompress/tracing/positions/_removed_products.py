"""Removed positions of what is summed, multiplied or compared along other axes."""

import math

from jaxcompress.tracing.positions._removed_moves import is_plain_window, windows_meet_entries


def _stays(name: str, c, dtype) -> bool:
    """Whether several of the constant, reduced, are that constant again."""
    if c is None:
        return False
    if name in ("sum", "xor"):
        return c == 0
    if name == "prod":
        return c in (0, 1)
    if name == "logsumexp":
        return c == -math.inf
    # Largest, smallest, and, or: of any number of equal ones.
    del dtype
    return True


def _kept(name: str, axes, eqn):
    dtype = eqn.invars[0].aval.dtype
    return [c if _stays(name, c, dtype) else None for c in axes]


def _reduced(eqn, ins, known):
    del known
    name, gone = eqn.primitive.name.removeprefix("reduce_"), eqn.params["axes"]
    shape = eqn.invars[0].aval.shape
    constants = _kept(name, ins[0], eqn)
    if any(shape[d] == 0 for d in gone):
        constants = [None] * len(constants)
    return [tuple(c for d, c in enumerate(constants) if d not in gone)]


def _cumulative(eqn, ins, known):
    del known
    name, axis = eqn.primitive.name.removeprefix("cum"), eqn.params["axis"]
    constants = _kept(name, ins[0], eqn)
    # Along the axis itself a place has what came before it.
    constants[axis] = None
    return [tuple(constants)]


def _windows(eqn, ins, known):
    del known
    name = eqn.primitive.name.removeprefix("reduce_window_")
    constants = _kept(name, ins[0], eqn)
    if name in ("max", "min") and not windows_meet_entries(eqn):
        constants = [None] * len(constants)
    return [tuple(c if is_plain_window(eqn, d) else None for d, c in enumerate(constants))]


def _spread(eqn, ins, known):
    """The gradient of pooling: along plain axes zeros go to zeros."""
    del known
    source = ins[0]
    plain = [
        (window, stride, tuple(pad)) == (1, 1, (0, 0))
        for window, stride, pad in zip(
            eqn.params["window_dimensions"],
            eqn.params["window_strides"],
            eqn.params["padding"],
            strict=True,
        )
    ]
    return [tuple(0.0 if c == 0 and p else None for c, p in zip(source, plain, strict=True))]


def _zero(*constants):
    return 0.0 if any(c == 0 for c in constants) else None


def _dot(eqn, ins, known):
    del known
    (contract, batch) = eqn.params["dimension_numbers"]
    return [_of_product(ins, contract, batch)]


def _of_product(ins, contract, batch):
    out = [_zero(ins[0][a], ins[1][b]) for a, b in zip(*batch, strict=True)]
    for i in range(2):
        rest = [d for d in range(len(ins[i])) if d not in (*contract[i], *batch[i])]
        out += [_zero(ins[i][d]) for d in rest]
    return tuple(out)


def _ragged(eqn, ins, known):
    """As a product, where the ragged axis is not among the axes that are told apart."""
    del known
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    contract, batch = numbers.dot_dimension_numbers
    ragged, groups = numbers.lhs_ragged_dimensions[0], numbers.rhs_group_dimensions
    if ragged in (*contract[0], *batch[0]) or len(groups) != 1:
        return [(None,) * len(eqn.outvars[0].aval.shape)]
    rhs = [c for d, c in enumerate(ins[1]) if d != groups[0]]
    moved = lambda dims: tuple(d - (d > groups[0]) for d in dims)  # noqa: E731
    contract, batch = (contract[0], moved(contract[1])), (batch[0], moved(batch[1]))
    return [_of_product((ins[0], rhs), contract, batch)]


def is_plain_axis(eqn, i: int) -> bool:
    """Whether a convolution has windows of one entry along its i-th spatial axis, at each."""
    p = eqn.params
    numbers = p["dimension_numbers"]
    size = eqn.invars[1].aval.shape[numbers.rhs_spec[2 + i]]
    dilated = (p["lhs_dilation"][i], p["rhs_dilation"][i])
    return (size, p["window_strides"][i], tuple(p["padding"][i]), *dilated) == (
        *(1, 1, (0, 0)),
        *(1, 1),
    )


def is_depthwise(eqn) -> bool:
    """Whether every result channel of a convolution reads one channel of its input."""
    return eqn.invars[1].aval.shape[eqn.params["dimension_numbers"].rhs_spec[1]] == 1


def _conv(eqn, ins, known):
    del known
    numbers, (x, kernel) = eqn.params["dimension_numbers"], ins
    out: list[float | None] = [None] * len(x)
    channel = kernel[numbers.rhs_spec[0]]
    # A channel of a grouped product may be gone while those it reads are not, and the other
    # way round; with one in and one out they are gone together.
    features = eqn.invars[0].aval.shape[numbers.lhs_spec[1]]
    outputs = eqn.invars[1].aval.shape[numbers.rhs_spec[0]]
    together = is_depthwise(eqn) and features == outputs > 1
    read = x[numbers.lhs_spec[1]] if together else None
    out[numbers.out_spec[1]] = _zero(channel, read)
    if eqn.params["batch_group_count"] == 1:
        out[numbers.out_spec[0]] = _zero(x[numbers.lhs_spec[0]])
    for i in range(len(x) - 2):
        if is_plain_axis(eqn, i):
            out[numbers.out_spec[2 + i]] = _zero(x[numbers.lhs_spec[2 + i]])
    return [tuple(out)]


def _across_devices(eqn, ins, known):
    del eqn, known
    return [tuple(map(_zero, axes)) for axes in ins]


PRODUCTS = {
    "conv_general_dilated": _conv,
    "dot_general": _dot,
    "psum": _across_devices,
    "psum_invariant": _across_devices,
    "ragged_dot_general": _ragged,
    "select_and_scatter_add": _spread,
    **dict.fromkeys(
        "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor".split(),
        _reduced,
    ),
    **dict.fromkeys("cumsum cumprod cummax cummin cumlogsumexp".split(), _cumulative),
    **dict.fromkeys("reduce_window_sum reduce_window_max reduce_window_min".split(), _windows),
}
