"""Running one equation without some positions of its operands and results."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxcompress.tracing._flops import ELEMENTWISE, TRANSCENDENTAL
from jaxcompress.tracing._size_rules import ALIKE, REDUCTIONS, WINDOWS
from jaxcompress.tracing.positions import _rerun_indexed as indexed
from jaxcompress.tracing.positions import _rerun_moves as moves
from jaxcompress.tracing.positions import _rerun_products as products
from jaxcompress.tracing.positions._equation import Equation, fail, require, run
from jaxcompress.tracing.positions._taken import Masks, same

Rule = Callable[[Equation], list[Any]]

_POINTWISE = frozenset(
    "igamma_grad_a polygamma regularized_incomplete_beta zeta random_gamma_grad log2 polynomial"
    " one_minus_square threefry2x32 random_fold_in random_seed random_clone".split()
)
_PLAIN = frozenset("transpose rev concatenate reduce random_wrap random_unwrap".split())


def rerun(
    jaxpr: Any,
    eqn: Any,
    values: Sequence[Any],
    ins: Sequence[Masks],
    outs: Sequence[Masks],
    constants: Sequence[np.ndarray | None] = (),
) -> list[Any]:
    """The results of an equation without the positions that are gone.

    They are those of the whole equation, at the positions that stay, if what is gone of the
    operands adds nothing: entries that are summed over are as if they were zeros.

    Args:
        jaxpr: the equation stands in.
        eqn: an equation without jaxprs inside.
        values: of its operands, arrays or traced, without the positions that are gone.
        ins: for each operand and each of its axes, which positions of it stay, as `bool` of the
            old length; None: all.
        outs: for each result.
        constants: for each operand its full value, where that is known: indices into axes that
            lose positions have to be.

    Raises:
        ValueError: the equation can't run without what is gone, or there is no rule for it. The
            message names the primitive.
    """
    call = Equation(
        jaxpr,
        eqn,
        values,
        [_marked(masks) for masks in ins],
        [_marked(masks) for masks in outs],
        constants or [None] * len(values),
    )
    if all(mask is None for masks in (*call.ins, *call.outs) for mask in masks):
        return run(call)
    results = _rule(eqn.primitive.name)(call)
    for result, shape in zip(results, call.new_outs, strict=True):
        if result is not None and tuple(result.shape) != shape:
            fail(call, f"{list(result.shape)} where {list(shape)} has to come out")
    return results


def _marked(masks: Sequence[Any]) -> Masks:
    """None where nothing is gone."""
    return tuple(None if m is None or np.all(m) else np.asarray(m, bool) for m in masks)


def _rule(name: str) -> Rule:
    if name in _RULES:
        return _RULES[name]
    if name in ELEMENTWISE or name in TRANSCENDENTAL or name in _POINTWISE:
        return _pointwise
    if name in ALIKE or name in REDUCTIONS or name in _PLAIN:
        return run
    if name in WINDOWS or name.startswith("select_and_"):
        return products.slide
    if name.startswith("scatter"):
        return indexed.scatter
    return _unknown


def _pointwise(call: Equation) -> list[Any]:
    """Operands of one shape; axes of size 1 are repeated along those of the others."""
    for old, masks in zip(call.old_ins, call.ins, strict=True):
        for d, mask in enumerate(masks if len(masks) == len(call.outs[0]) else ()):
            if old[d] == call.old_outs[0][d]:
                require(call, same(mask, call.outs[0][d]), mask, d)
    return run(call)


def _unknown(call: Equation) -> list[Any]:
    fail(call, "positions removed from an operation that there is no rule for")


_RULES: dict[str, Rule] = {
    "approx_top_k": moves.sort,
    "argmax": moves.search,
    "argmin": moves.search,
    "broadcast_in_dim": moves.broadcast,
    "conv_general_dilated": products.convolve,
    "dot_general": products.contract,
    "dynamic_slice": moves.dynamic_slice,
    "dynamic_update_slice": moves.dynamic_update_slice,
    "fft": moves.transform,
    "gather": indexed.gather,
    "iota": moves.iota,
    "iota_2x32_shape": moves.draw,
    "optimization_barrier": run,
    "pad": moves.pad,
    "ragged_dot_general": products.contract_ragged,
    "random_bits": moves.draw,
    "random_gamma": moves.draw_gamma,
    "random_split": moves.draw,
    "reshape": moves.reshape,
    "rng_bit_generator": moves.draw,
    "rng_uniform": moves.draw,
    "slice": moves.cut,
    "sort": moves.sort,
    "split": moves.split,
    "squeeze": moves.squeeze,
    "stack": moves.join,
    "tile": moves.tile,
    "top_k": moves.sort,
    "unstack": moves.join,
}
