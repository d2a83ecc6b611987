"""Which axes of its operands and results a primitive needs to have equal sizes."""

from collections.abc import Callable, Sequence
from typing import Any

from jaxcompress.tracing._dot import read_dot
from jaxcompress.tracing._flops import ELEMENTWISE, TRANSCENDENTAL
from jaxcompress.tracing._sizes import Axes, Sizes
from jaxcompress.tracing._views import runs

Rule = Callable[[Any, Sequence[Axes], Sequence[Axes], Sizes, str], None]

ALIKE = frozenset(
    "convert_element_type bitcast_convert_type reduce_precision copy copy_p stop_gradient name"
    " sharding_constraint reshard mesh_cast pvary pcast pbroadcast device_put cumsum cumprod"
    " cummax cummin cumlogsumexp lgamma digamma bessel_i0e bessel_i1e igamma igammac real imag"
    " conj complex clz mulhi eq_to le_to lt_to psum psum_invariant pmax pmin".split()
)
REDUCTIONS = frozenset(
    "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor".split()
)
WINDOWS = frozenset("reduce_window reduce_window_sum reduce_window_max reduce_window_min".split())


def relate(eqn: Any, ins: Sequence[Axes], outs: Sequence[Axes], sizes: Sizes, why: str) -> None:
    """Says in `sizes` what an equation without jaxprs inside asks of its axes.

    What there is no rule for can run with its old sizes only.
    """
    name = eqn.primitive.name
    if name in ELEMENTWISE or name in TRANSCENDENTAL or name in ALIKE:
        rule: Rule = _alike
    elif name in REDUCTIONS:
        rule = _reduced
    elif name in WINDOWS:
        rule = _windows
    elif name.startswith("scatter"):
        rule = _scattered
    else:
        rule = _RULES.get(name, _fixed)
    rule(eqn, ins, outs, sizes, why)


def _fixed(eqn, ins, outs, sizes, why) -> None:
    del eqn
    for axes in (*ins, *outs):
        sizes.keep(axes, why)


def _alike(eqn, ins, outs, sizes, why) -> None:
    for out in outs:
        for axes in ins:
            if axes and len(axes) != len(out):
                _fixed(eqn, ins, outs, sizes, why)
                return
            # An axis of size 1 is repeated along the others.
            for a, b in zip(axes, out, strict=False):
                _whole(sizes.old(a) == sizes.old(b) or None, a, b, sizes, why)


def _whole(whole: bool | None, a: int, b: int, sizes: Sizes, why: str) -> None:
    """Equal, or of the old sizes; None: of which the first has."""
    if whole:
        sizes.unite((a,), (b,), why)
    else:
        sizes.keep((a,) if whole is None else (a, b), why)


def _reduced(eqn, ins, outs, sizes, why) -> None:
    (axes,), (out,) = ins, outs
    summed = eqn.params["axes"]
    sizes.unite([a for d, a in enumerate(axes) if d not in summed], out, why)


def _found(eqn, ins, outs, sizes, why) -> None:
    """The place of an entry says nothing once others are gone."""
    _reduced(eqn, ins, outs, sizes, why)
    sizes.keep([ins[0][d] for d in eqn.params["axes"]], why)


def _sorted(eqn, ins, outs, sizes, why) -> None:
    for axes in (*ins, *outs):
        sizes.unite(ins[0], axes, why)
    sizes.keep((ins[0][eqn.params["dimension"]],), why)


def _largest(eqn, ins, outs, sizes, why) -> None:
    across = eqn.params.get("axis", len(ins[0]) - 1)
    for out in outs:
        for d, (a, b) in enumerate(zip(ins[0], out, strict=True)):
            _whole(d != across, a, b, sizes, why)


def _windows(eqn, ins, outs, sizes, why) -> None:
    p = eqn.params
    plain = [
        (window, stride, tuple(pad), base, dilation) == (1, 1, (0, 0), 1, 1)
        for window, stride, pad, base, dilation in zip(
            p["window_dimensions"],
            p["window_strides"],
            p["padding"],
            p.get("base_dilation") or [1] * len(outs[0]),
            p.get("window_dilation") or [1] * len(outs[0]),
            strict=True,
        )
    ]
    for out in outs:
        for axes in ins:
            for d, a in enumerate(axes):
                _whole(plain[d], a, out[d], sizes, why)


def _transposed(eqn, ins, outs, sizes, why) -> None:
    sizes.unite([ins[0][d] for d in eqn.params["permutation"]], outs[0], why)


def _broadcast(eqn, ins, outs, sizes, why) -> None:
    for a, d in zip(ins[0], eqn.params["broadcast_dimensions"], strict=True):
        b = outs[0][d]
        _whole(sizes.old(a) == sizes.old(b) or None, a, b, sizes, why)


def _reshaped(eqn, ins, outs, sizes, why) -> None:
    (axes, *_), (out,) = ins, outs
    old, new = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    if 0 in (*old, *new) or eqn.params["dimensions"] is not None:
        _fixed(eqn, ins, outs, sizes, why)
        return
    i = j = 0
    for before, after in runs(old, new):
        several = [axes[i : i + before], out[j : j + after]]
        here, there = ([a for a in some if sizes.old(a) > 1] for some in several)
        sizes.keep([a for some in several for a in some if sizes.old(a) == 1], why)
        if len(here) == len(there):
            _each(here, there, sizes, why)
        elif len(here) == 1:
            sizes.product(here[0], there, why)
        elif len(there) == 1:
            sizes.product(there[0], here, why)
        else:
            sizes.keep((*here, *there), why)
        i, j = i + before, j + after


def _each(here: list[int], there: list[int], sizes: Sizes, why: str) -> None:
    if len(here) == 1:
        sizes.unite(here, there, why)
    else:
        sizes.keep((*here, *there), why)


def _squeezed(eqn, ins, outs, sizes, why) -> None:
    gone = [d % len(ins[0]) for d in eqn.params["dimensions"]]
    sizes.keep([ins[0][d] for d in gone], why)
    sizes.unite([a for d, a in enumerate(ins[0]) if d not in gone], outs[0], why)


def _cut(eqn, ins, outs, sizes, why) -> None:
    """Slices, paddings and reversals: of all or nothing of an axis that changes."""
    name, p = eqn.primitive.name, eqn.params
    for d, (a, b) in enumerate(zip(ins[0], outs[0], strict=True)):
        whole = sizes.old(a) == sizes.old(b)
        if name == "rev":
            whole = d not in p["dimensions"]
        elif name == "pad":
            whole = p["padding_config"][d] == (0, 0, 0)
        _whole(whole, a, b, sizes, why)


def _updated(eqn, ins, outs, sizes, why) -> None:
    del eqn
    sizes.unite(ins[0], outs[0], why)
    for a, b in zip(ins[0], ins[1], strict=True):
        _whole(sizes.old(a) == sizes.old(b), a, b, sizes, why)


def _joined(eqn, ins, outs, sizes, why) -> None:
    across, (out,) = eqn.params["dimension"], outs
    for axes in ins:
        for d, (a, b) in enumerate(zip(axes, out, strict=True)):
            if d != across:
                sizes.unite((a,), (b,), why)
    sizes.total(out[across], [axes[across] for axes in ins], why)


def _stacked(eqn, ins, outs, sizes, why) -> None:
    whole, parts = (outs[0], ins) if eqn.primitive.name == "stack" else (ins[0], outs)
    across = eqn.params["axis"]
    sizes.keep((whole[across],), why)
    for axes in parts:
        sizes.unite(axes, [a for d, a in enumerate(whole) if d != across], why)


def _repeated(eqn, ins, outs, sizes, why) -> None:
    for a, b, n in zip(ins[0], outs[0], eqn.params["reps"], strict=True):
        sizes.product(b, (a,), why, factor=n)


def _divided(eqn, ins, outs, sizes, why) -> None:
    across = eqn.params["axis"]
    for out in outs:
        for d, (a, b) in enumerate(zip(ins[0], out, strict=True)):
            _whole(d != across, a, b, sizes, why)


def _counted(eqn, ins, outs, sizes, why) -> None:
    del ins
    sizes.keep((outs[0][eqn.params["dimension"]],), why)


def _drawn(eqn, ins, outs, sizes, why) -> None:
    """Random numbers are as good in any shape."""
    del eqn
    sizes.unite(ins[0], outs[0][: len(ins[0])], why)


def _dot(eqn, ins, outs, sizes, why) -> None:
    dot, known = read_dot(eqn, 1), {}
    sides = zip((dot.x, dot.w, dot.out), (ins[0], ins[1], outs[0]), strict=True)
    for labels, axes in sides:
        for label, axis in zip(labels, axes, strict=True):
            sizes.unite((known.setdefault(label, axis),), (axis,), why)


def _conv(eqn, ins, outs, sizes, why) -> None:
    p, ((x, kernel), (out,)) = eqn.params, (ins, outs)
    lhs, rhs, result = p["dimension_numbers"]
    inputs, outputs = kernel[rhs[1]], kernel[rhs[0]]
    features = x[lhs[1]]
    sizes.keep([axes[d] for axes, spec in ((x, lhs), (out, result)) for d in spec[2:]], why)
    sizes.keep([kernel[d] for d in rhs[2:]], why)
    sizes.unite((outputs,), (out[result[1]],), why)
    if p["batch_group_count"] != 1:
        _fixed(eqn, ins, outs, sizes, why)
        return
    sizes.unite((x[lhs[0]],), (out[result[0]],), why)
    if p["feature_group_count"] == 1:
        sizes.unite((features,), (inputs,), why)
    elif _is_depthwise(eqn):
        sizes.keep((inputs,), why)
        times = sizes.old(outputs) // sizes.old(features)
        sizes.product(outputs, (features,), why, factor=times)
    else:
        sizes.keep((features, inputs, outputs), why)


def _is_depthwise(eqn: Any) -> bool:
    features = eqn.invars[0].aval.shape[eqn.params["dimension_numbers"].lhs_spec[1]]
    return 1 != eqn.params["feature_group_count"] == features


def _indexed(indices, places, batched, sizes, why) -> None:
    """Each index has a place of its own; what it points at has the size that it had."""
    sizes.unite(indices[:-1], places, why)
    sizes.keep([*indices[-1:], *(indices[d] for d in batched)], why)


def _gathered(eqn, ins, outs, sizes, why) -> None:
    numbers, cut = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    (table, indices), (out,) = ins, outs
    left = [
        d
        for d in range(len(table))
        if d not in (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    ]
    sizes.keep([a for d, a in enumerate(table) if d not in left], why)
    for d, place in zip(left, numbers.offset_dims, strict=True):
        whole = cut[d] == sizes.old(table[d]) and d not in numbers.start_index_map
        _whole(whole, table[d], out[place], sizes, why)
    rest = [a for d, a in enumerate(out) if d not in numbers.offset_dims]
    _indexed(indices, rest, numbers.start_indices_batching_dims, sizes, why)


def _scattered(eqn, ins, outs, sizes, why) -> None:
    numbers = eqn.params["dimension_numbers"]
    (table, indices, updates), (out,) = ins, outs
    sizes.unite(table, out, why)
    gone = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    left = [d for d in range(len(table)) if d not in gone]
    sizes.keep([table[d] for d in gone], why)
    for d, place in zip(left, numbers.update_window_dims, strict=True):
        whole = sizes.old(table[d]) == sizes.old(updates[place])
        whole = whole and d not in numbers.scatter_dims_to_operand_dims
        _whole(whole, table[d], updates[place], sizes, why)
    rest = [a for d, a in enumerate(updates) if d not in numbers.update_window_dims]
    _indexed(indices, rest, numbers.scatter_indices_batching_dims, sizes, why)


def _barrier(eqn, ins, outs, sizes, why) -> None:
    del eqn
    for axes, out in zip(ins, outs, strict=True):
        sizes.unite(axes, out, why)


_RULES: dict[str, Rule] = {
    "argmax": _found,
    "argmin": _found,
    "broadcast_in_dim": _broadcast,
    "concatenate": _joined,
    "conv_general_dilated": _conv,
    "dot_general": _dot,
    "dynamic_slice": _cut,
    "dynamic_update_slice": _updated,
    "gather": _gathered,
    "iota": _counted,
    "optimization_barrier": _barrier,
    "pad": _cut,
    "random_bits": _drawn,
    "reshape": _reshaped,
    "rev": _cut,
    "slice": _cut,
    "sort": _sorted,
    "split": _divided,
    "squeeze": _squeezed,
    "stack": _stacked,
    "tile": _repeated,
    "top_k": _largest,
    "transpose": _transposed,
    "unstack": _stacked,
}


def new_params(eqn: Any, ins: Sequence[tuple[int, ...]], out: tuple[int, ...]) -> dict[str, Any]:
    """The parameters of an equation that speak of sizes, for new shapes.

    Args:
        eqn: the equation.
        ins: the new shapes of its operands.
        out: that of its first result.
    """
    name, p = eqn.primitive.name, eqn.params
    if name in ("broadcast_in_dim", "iota"):
        return {"shape": out}
    if name == "random_bits":
        return {"shape": out[len(ins[0]) :]}
    if name == "reshape":
        return {"new_sizes": out}
    if name == "slice":
        # Where it changes an axis is kept as a whole.
        old = eqn.invars[0].aval.shape
        ends = zip(old, ins[0], p["limit_indices"], strict=True)
        return {"limit_indices": tuple(n if n != o else end for o, n, end in ends)}
    if name == "dynamic_slice":
        return {"slice_sizes": out}
    if name == "gather":
        old = eqn.invars[0].aval.shape
        cut = zip(old, ins[0], p["slice_sizes"], strict=True)
        return {"slice_sizes": tuple(n if n != o else size for o, n, size in cut)}
    if name == "conv_general_dilated" and _is_depthwise(eqn):
        return {"feature_group_count": ins[0][p["dimension_numbers"].lhs_spec[1]]}
    return {}
