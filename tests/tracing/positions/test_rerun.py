"""Equations without some positions, against the whole equations at the positions that stay."""

import functools
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import primitives
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as PS

from jaxcompress.tracing.positions._rerun import rerun
from jaxcompress.tracing.positions._taken import take_indices, take_positions
from tests.conftest import mesh_of

RNG = np.random.default_rng(0)


def some(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def bits(text):
    return np.array([c == "1" for c in text])


# Of 6, of 4 and of 3 positions: irregular, regular with a stride, a run.
A, B, C = bits("110101"), bits("1010"), bits("011")
D = bits("011011")
N = None
X = some(4, 6)  # B, A
IMAGE = some(2, 5, 5, 6)


class Case(NamedTuple):
    """One equation: the last one of `fn`, or the last of this primitive."""

    name: str
    fn: Any
    args: tuple
    ins: list
    outs: list
    zeros: bool = False
    # Of the operands, whose values are known.
    known: tuple = ()
    exact: bool = True


def outer(*masks):
    return functools.reduce(lambda a, b: np.outer(a, b).reshape(-1), masks)


def gather(numbers, sizes, mode="fill"):
    return lambda x, i: lax.gather(x, i, lax.GatherDimensionNumbers(**numbers), sizes, mode=mode)


def scatter(function, numbers, mode="drop"):
    mode = lax.GatherScatterMode.from_any(mode)
    return lambda x, i, u: function(x, i, u, lax.ScatterDimensionNumbers(**numbers), mode=mode)


def column(*values):
    return jnp.asarray(values, jnp.int32)[:, None]


COLUMNS = {"offset_dims": (0,), "collapsed_slice_dims": (1,), "start_index_map": (1,)}
BATCHED = {
    "offset_dims": (),
    "collapsed_slice_dims": (1,),
    "start_index_map": (1,),
    "operand_batching_dims": (0,),
    "start_indices_batching_dims": (0,),
}
WRITTEN = {
    "update_window_dims": (0,),
    "inserted_window_dims": (1,),
    "scatter_dims_to_operand_dims": (1,),
}
WINDOW = {
    "update_window_dims": (0, 1),
    "inserted_window_dims": (),
    "scatter_dims_to_operand_dims": (1,),
}
KEY = jax.random.key(1)
conv = functools.partial(lax.conv_general_dilated, window_strides=(1, 1), padding="SAME")
nhwc = functools.partial(conv, dimension_numbers=("NHWC", "HWIO", "NHWC"))
pool = functools.partial(
    lax.reduce_window,
    window_dimensions=(1, 2, 2, 1),
    window_strides=(1, 2, 2, 1),
    padding=((0, 0), (0, 1), (0, 1), (0, 0)),
)
CASES = [
    Case("add", lax.add, (X, X + 1), [(B, A), (B, A)], [(B, A)]),
    Case("mul", lambda x: x * 2, (X,), [(B, A), ()], [(B, A)]),
    Case("mul", lax.mul, (X, X[:1]), [(B, A), (N, A)], [(B, A)]),
    Case("tanh", jnp.tanh, (X,), [(B, A)], [(B, A)]),
    Case("integer_pow", lambda x: x**3, (X,), [(B, A)], [(B, A)]),
    Case(
        "select_n", lax.select_n, (X > 0, X, -X), [(B, A), (B, A), (B, A)], [(B, A)]
    ),
    Case("clamp", lambda x: lax.clamp(-1.0, x, 1.0), (X,), [(), (B, A), ()], [(B, A)]),
    Case(
        "convert_element_type", lambda x: x.astype(jnp.bfloat16), (X,), [(B, A)], [(B, A)]
    ),
    Case("zeta", lambda x: jax.lax.zeta(x + 9, x + 9), (X,), [(B, A)] * 2, [(B, A)]),
    Case(
        "optimization_barrier",
        lax.optimization_barrier,
        ((X, X[0]),),
        [(B, A), (A,)],
        [(B, A), (A,)],
    ),
    Case("transpose", lambda x: x.T, (X,), [(B, A)], [(A, B)]),
    Case("squeeze", lambda x: lax.squeeze(x, (1,)), (some(4, 1, 6),), [(B, N, A)], [(B, A)]),
    Case("rev", lambda x: lax.rev(x, (1,)), (X,), [(B, A)], [(B, A[::-1])]),
    # reshape
    Case("reshape", lambda x: x.reshape(24), (X,), [(B, A)], [(outer(B, A),)]),
    Case(
        "reshape",
        lambda x: x.reshape(2, 4, 6),
        (some(8, 6),),
        [(np.tile(B, 2), A)],
        [(N, B, A)],
    ),
    Case(
        "reshape",
        lambda x: x.reshape(3, 1, 24),
        (some(3, 4, 6),),
        [(C, N, A)],
        [(C, N, np.tile(A, 4))],
    ),
    Case(
        "reshape",
        lambda x: lax.reshape(x, (24,), dimensions=(1, 0)),
        (X,),
        [(B, A)],
        [(outer(A, B),)],
    ),
    # broadcast_in_dim
    Case(
        "broadcast_in_dim",
        lambda x: lax.broadcast_in_dim(x, (3, 6, 4), (1, 2)),
        (some(6, 1),),
        [(A, N)],
        [(C, A, B)],
    ),
    Case("broadcast_in_dim", lambda: jnp.ones((4, 6)), (), [()], [(B, A)]),
    # slice
    Case("slice", lambda x: x[1:, :4], (X,), [(B, A)], [(B[1:], A[:4])]),
    Case("slice", lambda x: lax.slice(x, (0, 1), (4, 6), (1, 2)), (X,), [(B, A)], [(B, A[1::2])]),
    Case("slice", lambda x: x[2:3], (X,), [(B, A)], [(N, A)]),
    # pad
    Case(
        "pad",
        lambda x: lax.pad(x, jnp.float32(7), ((1, 2, 0), (0, 0, 0))),
        (X,),
        [(B, A), ()],
        [(np.concatenate([[True], B, [True, True]]), A)],
    ),
    Case(
        "pad",
        lambda x: lax.pad(x, jnp.float32(7), ((1, 2, 0), (2, 1, 0))),
        (X,),
        [(B, A), ()],
        [(np.concatenate([[False], B, [True, False]]), np.concatenate([[False, True], A, [True]]))],
    ),
    Case(  # 1 and 0 entries of padding between what stays
        "pad",
        lambda x: lax.pad(x, jnp.float32(7), ((0, 0, 1), (0, 0, 0))),
        (X,),
        [(B, A), ()],
        [(bits("1100110"), A)],
    ),
    Case(
        "pad",
        lambda x: lax.pad(x, jnp.float32(7), ((0, 0, 0), (1, -1, 2))),
        (X,),
        [(B, A), ()],
        [(B, bits("1111100001110001"))],
    ),
    Case(
        "pad",
        lambda x: lax.pad(x, jnp.float32(7), ((-1, 1, 0), (-2, -2, 0))),
        (X,),
        [(B, A), ()],
        [(bits("0101"), A[2:4])],
    ),
    Case(
        "pad",
        lambda x: lax.pad(x, jnp.float32(7), ((0, 0, 0), (1, 0, 1))),
        (some(4, 3),),
        [(N, C), ()],
        [(N, bits("100111"))],
    ),
    Case(
        "pad",
        lambda x: lax.pad(x, jnp.float32(7), ((0, 3, 0), (-4, 3, 0))),
        (X,),
        [(B, bits("111000")), ()],
        [(np.concatenate([B, C]), bits("00101"))],
    ),
    # joined and divided
    Case(
        "concatenate",
        lambda x, y: lax.concatenate([x, y, x], 1),
        (X, some(4, 3)),
        [(B, A), (B, C), (B, A)],
        [(B, np.concatenate([A, C, A]))],
    ),
    Case(
        "split",
        lambda x: lax.split(x, (2, 4), 1),
        (X,),
        [(B, A)],
        [(B, A[:2]), (B, A[2:])],
    ),
    Case("tile", lambda x: lax.tile(x, (2, 3)), (X,), [(B, A)], [(np.tile(B, 2), np.tile(A, 3))]),
    Case(
        "tile",
        lambda x: lax.tile(x, (3, 2)),
        (X,),
        [(B, A)],
        [(outer(C, B), bits("100101110001"))],
    ),
    Case("tile", lambda x: lax.tile(x, (2,)), (some(3),), [(N,)], [(bits("001110"),)]),
    # counted
    Case("iota", lambda: lax.iota(jnp.int32, 6), (), [], [(A,)]),
    Case(
        "iota", lambda: lax.broadcasted_iota(jnp.float32, (4, 6), 1), (), [], [(B, A)]
    ),
    Case("iota", lambda: lax.broadcasted_iota(jnp.bfloat16, (4, 6), 0), (), [], [(N, A)]),
    # drawn
    Case("random_bits", lambda k: jax.random.bits(k, (4, 6)), (KEY,), [()], [(B, A)]),
    Case(
        "random_bits",
        jax.vmap(lambda k: jax.random.bits(k, (6,))),
        (jax.random.split(KEY, 4),),
        [(B,)],
        [(B, A)],
    ),
    Case("random_split", lambda k: jax.random.split(k, (4, 3)), (KEY,), [()], [(B, C)]),
    Case("random_fold_in", lambda k, i: jax.vmap(jax.random.fold_in)(k, i),
        (jax.random.split(KEY, 6), jnp.arange(6, dtype=jnp.uint32)), [(A,), (A,)], [(A,)]),
    Case("random_wrap", jax.random.wrap_key_data, (jnp.arange(12, dtype=jnp.uint32).reshape(6, 2),),
        [(A, N)], [(A,)]),
    Case("random_unwrap", jax.random.key_data, (jax.random.split(KEY, 6),), [(A,)], [(A, N)]),
    Case(
        "random_gamma",
        lambda k, a: jax.random.gamma(k, a, (4, 6)),
        (KEY, jnp.exp(X)),
        [(), (B, A)],
        [(B, A)],
    ),
    Case(
        "rng_bit_generator",
        lambda k: lax.rng_bit_generator(k, (4, 6)),
        (jnp.arange(4, dtype=jnp.uint32),),
        [(N,)],
        [(N,), (B, A)],
    ),
    Case("threefry2x32", lambda x: primitives.threefry2x32_p.bind(x[0, 0], x[0, 1], x, x),
        (jnp.arange(24, dtype=jnp.uint32).reshape(4, 6),), [(), (), (B, A), (B, A)],
        [(B, A), (B, A)]),
    # indexed from a place
    Case(
        "dynamic_slice",
        lambda x, i: lax.dynamic_slice(x, (i, i), (2, 6)),
        (X, jnp.int32(1)),
        [(N, A), (), ()],
        [(N, A)],
    ),
    Case(
        "dynamic_slice",
        lambda x, i: lax.dynamic_slice(x, (i, i), (2, 3)),
        (X, jnp.int32(1)),
        [(B, A), (), ()],
        [(B[1:3], A[1:4])],
        known=(1, 2),
    ),
    Case(
        "dynamic_slice",
        lambda x, i: lax.dynamic_slice(x, (i, 9), (2, 3)),
        (X, jnp.int32(1)),
        [(N, A), (), ()],
        [(N, A[3:])],
    ),
    Case(
        "dynamic_update_slice",
        lambda x, u, i: lax.dynamic_update_slice(x, u, (i, 3)),
        (X, some(2, 2), jnp.int32(1)),
        [(N, A), (N, A[3:5]), (), ()],
        [(N, A)],
    ),
    Case(
        "dynamic_update_slice",
        lambda x, u, i: lax.dynamic_update_slice(x, u, (i, i)),
        (X, some(2, 6), jnp.int32(1)),
        [(N, A), (N, A), (), ()],
        [(N, A)],
    ),
    # gather
    Case(
        "gather",
        gather(
            {"offset_dims": (1,), "collapsed_slice_dims": (0,), "start_index_map": (0,)}, (1, 6)
        ),
        (X, column(2, 0, 9, 1, 3, -1)),
        [(N, A), (N, N)],
        [(N, A)],
    ),
    Case(  # rows of the indices leave
        "gather",
        gather(
            {"offset_dims": (1,), "collapsed_slice_dims": (0,), "start_index_map": (0,)}, (1, 4)
        ),
        (X, column(2, 0, 9, 1, 3, -1)),
        [(N, A), (A, N)],
        [(A, A[:4])],
    ),
    Case(
        "gather",
        gather(
            {"offset_dims": (1,), "collapsed_slice_dims": (0,), "start_index_map": (0,)}, (1, 6)
        ),
        (X, column(2, 0, 9, 1, 3, -1)),
        [(N, A), (N, N)],
        [(A, A)],
    ),
    Case(
        "gather",
        gather(
            {"offset_dims": (1,), "collapsed_slice_dims": (0,), "start_index_map": (0,)}, (1, 6)
        ),
        (X, column(2, 0, 9, 1, 3, -1)),
        [(N, A), (D, N)],
        [(bits("010011"), A)],
    ),
    Case(  # outside, next to what is gone
        "gather",
        gather(COLUMNS, (4, 1)),
        (X, column(5, -1)),
        [(B, D), (N, N)],
        [(B, N)],
        known=(1,),
    ),
    Case(  # a permutation, outside of the axis, and a row that leaves although it could stay
        "gather",
        gather(COLUMNS, (4, 1)),
        (X, column(5, 3, 1, 0, 2, 4, 9, -1, 0)),
        [(B, A), (N, N)],
        [(B, bits("111100110"))],
        known=(1,),
    ),
    Case(
        "gather",
        gather(COLUMNS, (4, 1), "clip"),
        (X, column(-3, 0, 2, 3, 9)),
        [(B, A), (N, N)],
        [(B, bits("11011"))],
        known=(1,),
    ),
    Case(  # one axis whole and traced in effect, one that shrinks
        "gather",
        gather({"offset_dims": (), "collapsed_slice_dims": (0, 1), "start_index_map": (1, 0)},
               (1, 1), "promise_in_bounds"),
        (X, jnp.asarray([[5, 0], [0, 1], [3, 3]])),
        [(N, A), (N, N)],
        [(C,)],
        known=(1,),
    ),
    Case(  # windows of a whole axis, at a place that says nothing
        "gather",
        gather({"offset_dims": (1, 2), "collapsed_slice_dims": (), "start_index_map": (0, 1)},
               (2, 6), "clip"),
        (X, jnp.asarray([[0, 0], [1, 3], [2, 1]])),
        [(N, A), (C, N)],
        [(C, N, A)],
    ),
    Case(  # and of a part, at one known place
        "gather",
        gather({"offset_dims": (1, 2), "collapsed_slice_dims": (), "start_index_map": (0, 1)},
               (2, 3), "clip"),
        (X, jnp.asarray([[0, 2], [1, 2], [2, 2]])),
        [(N, D), (C, N)],
        [(C, N, D[2:5])],
        known=(1,),
    ),
    Case(  # that is moved into the axis
        "gather",
        gather(
            {"offset_dims": (0, 1), "collapsed_slice_dims": (), "start_index_map": (1,)},
            (4, 3),
            "clip",
        ),
        (X, jnp.asarray([9])),
        [(N, D), (N,)],
        [(N, D[3:])],
        known=(1,),
    ),
    Case(
        "gather",
        gather(BATCHED, (1, 1)),
        (X, jnp.asarray(RNG.integers(0, 6, (4, 3, 1)))),
        [(B, N), (B, C, N)],
        [(B, C)],
    ),
    # scatter
    Case(
        "scatter-add",
        scatter(lax.scatter_add, WRITTEN),
        (X, column(5, 3, 2, 9, 5), some(4, 5)),
        [(B, A), (N, N), (B, N)],
        [(B, A)],
        known=(1,),
    ),
    Case(
        "scatter",
        scatter(lax.scatter, WRITTEN, "clip"),
        (X, column(-1, 9, 4), some(4, 3)),
        [(B, A), (N, N), (B, N)],
        [(B, A)],
        known=(1,),
    ),
    Case(
        "scatter-mul",
        scatter(lax.scatter_mul, WRITTEN),
        (X, column(3, 1, 2), some(4, 3)),
        [(N, A), (N, N), (N, bits("110"))],
        [(N, A)],
        known=(1,),
    ),
    Case(  # to an axis that is whole, at traced places
        "scatter-max",
        scatter(lax.scatter_max, WRITTEN),
        (X, column(3, 1, 9), some(4, 3)),
        [(B, N), (N, N), (B, N)],
        [(B, N)],
    ),
    Case(
        "scatter",
        scatter(lax.scatter, WINDOW),
        (X, jnp.asarray([2]), some(4, 3)),
        [(B, D), (N,), (B, D[2:5])],
        [(B, D)],
        known=(1,),
    ),
    Case(
        "scatter-add",
        scatter(
            lax.scatter_add,
            {
                "update_window_dims": (1,),
                "inserted_window_dims": (0,),
                "scatter_dims_to_operand_dims": (0,),
            },
        ),
        (X, column(2, 2, 0), some(3, 4)),
        [(N, A), (N, N), (N, A[:4])],
        [(N, A)],
    ),
    Case(
        "scatter-add",
        scatter(
            lax.scatter_add,
            {
                "update_window_dims": (),
                "inserted_window_dims": (1,),
                "scatter_dims_to_operand_dims": (1,),
                "operand_batching_dims": (0,),
                "scatter_indices_batching_dims": (0,),
            },
        ),
        (X, jnp.asarray(RNG.integers(0, 6, (4, 3, 1))), some(4, 3)),
        [(B, N), (B, N, N), (B, N)],
        [(B, N)],
    ),
    # sums and searches
    Case("reduce_sum", lambda x: x.sum(1), (X,), [(B, A)], [(B,)], zeros=True),
    Case("reduce_max", lambda x: x.max(0), (X,), [(N, A)], [(A,)]),
    Case("reduce_and", lambda x: lax.reduce_and(x, (0,)), (X > 0,), [(N, A)], [(A,)]),
    Case("reduce_precision", lambda x: lax.reduce_precision(x, 5, 3), (X,), [(B, A)], [(B, A)]),
    Case("cumsum", lambda x: lax.cumsum(x, 1), (X,), [(B, A)], [(B, A)], zeros=True),
    Case(
        "cumprod",
        lambda x: lax.cumprod(jnp.where(A, x, 1), 1),
        (X,),
        [(N, A)],
        [(N, A)],
        exact=False,
    ),
    Case("cummax", lambda x: lax.cummax(x, 0), (X,), [(N, A)], [(N, A)]),
    Case("argmax", lambda x: lax.argmax(x, 0, jnp.int32), (X,), [(N, A)], [(A,)]),
    Case(
        "sort", lambda x, y: lax.sort((x, y), dimension=0), (X, X + 1), [(N, A)] * 2, [(N, A)] * 2
    ),
    Case("top_k", lambda x: lax.top_k(x, 2), (X,), [(B, N)], [(B, N), (B, N)]),
    Case("fft", lambda x: jnp.fft.fft(x), (X.astype(jnp.complex64),), [(B, N)], [(B, N)]),
    # products
    Case(
        "dot_general",
        lambda x, y: lax.dot_general(x, y, (((1,), (2,)), ((0,), (1,)))),
        (some(4, 6, 3), some(3, 4, 6)),
        [(B, A, C), (C, B, A)],
        [(B, C, C)],
        zeros=True,
        exact=False,
    ),
    Case(
        "ragged_dot_general",
        lambda x, w, n: lax.ragged_dot(x, w, n),
        (some(5, 6), some(2, 6, 4), jnp.asarray([2, 3], jnp.int32)),
        [(N, A), (N, A, B), (N,)],
        [(N, B)],
        zeros=True,
        exact=False,
    ),
    Case(
        "conv_general_dilated",
        nhwc,
        (IMAGE, some(3, 3, 6, 4)),
        [(N, N, N, A), (N, N, A, B)],
        [(N, N, N, B)],
        zeros=True,
        exact=False,
    ),
    Case(
        "conv_general_dilated",
        conv,
        (some(3, 6, 4, 4), some(4, 6, 3, 3)),
        [(C, A, N, N), (B, A, N, N)],
        [(C, B, N, N)],
        zeros=True,
        exact=False,
    ),
    Case(  # depthwise, two results for each channel
        "conv_general_dilated",
        functools.partial(nhwc, feature_group_count=6),
        (IMAGE, some(3, 3, 1, 12)),
        [(N, N, N, A), (N, N, N, outer(A, bits("11")))],
        [(N, N, N, outer(A, bits("11")))],
        exact=False,
    ),
    Case(  # … of which each loses another one
        "conv_general_dilated",
        functools.partial(nhwc, feature_group_count=6),
        (IMAGE, some(3, 3, 1, 12)),
        [(N, N, N, A), (N, N, N, bits("100100100001"))],
        [(N, N, N, bits("100100100001"))],
        exact=False,
    ),
    Case(  # groups, and channels of each
        "conv_general_dilated",
        functools.partial(nhwc, feature_group_count=3),
        (some(2, 4, 4, 12), some(3, 3, 4, 6)),
        [(N, N, N, outer(C, B)), (N, N, B, bits("001001"))],
        [(N, N, N, bits("001001"))],
        zeros=True,
        exact=False,
    ),
    Case("reduce_window_max", lambda x: pool(x, -np.inf, lax.max), (IMAGE,), [(N, N, N, A)],
         [(N, N, N, A)]),
    Case("reduce_window_sum", lambda x: pool(x, 0.0, lax.add), (IMAGE,), [(bits("01"), N, N, A)],
         [(bits("01"), N, N, A)]),
    Case("reduce_window", lambda x: pool(x, 1.0, lax.mul), (IMAGE,), [(N, N, N, A), ()],
         [(N, N, N, A)]),
    Case("select_and_scatter_add",
         lambda x, y: jax.vjp(lambda x: pool(x, -np.inf, lax.max), x)[1](y),
         (IMAGE, some(2, 3, 3, 6)), [(N, N, N, A), (N, N, N, A)], [(N, N, N, A)]),
    Case("select_and_gather_add",
         lambda x, y: jax.jvp(lambda x: pool(x, -np.inf, lax.max), (x,), (y,))[1],
         (IMAGE, IMAGE + 1), [(N, N, N, A), (N, N, N, A)], [(N, N, N, A)]),
]  # fmt: skip
CASES += [
    Case("stack", lambda x, y: jnp.stack([x, y, x], 1), (X, X + 1), [(B, A)] * 3, [(B, N, A)]),
    Case("unstack", lambda x: jnp.unstack(x, axis=1), (some(4, 2, 6),), [(B, N, A)], [(B, A)] * 2),
]


def names(case):
    return case.name


class Built(NamedTuple):
    jaxpr: Any
    eqn: Any
    full: list
    small: list
    constants: list


def build(case):
    closed = jax.make_jaxpr(case.fn)(*case.args)
    jaxpr, consts = closed.jaxpr, closed.consts
    while [e for e in jaxpr.eqns if e.primitive.name == case.name] == []:
        (inner,) = [e for e in jaxpr.eqns if e.primitive.name == "jit"]
        jaxpr, consts = inner.params["jaxpr"].jaxpr, inner.params["jaxpr"].consts
    eqn = [e for e in jaxpr.eqns if e.primitive.name == case.name][-1]
    assert (len(eqn.invars), len(eqn.outvars)) == (len(case.ins), len(case.outs))
    before = jaxpr.replace(outvars=list(eqn.invars))
    full = jax.core.eval_jaxpr(before, consts, *jax.tree.leaves(case.args))
    full = [jnp.asarray(x) for x in full]
    if case.zeros:
        full = [zeroed(x, masks) for x, masks in zip(full, case.ins, strict=True)]
    small = [taken(x, masks) for x, masks in zip(full, case.ins, strict=True)]
    constants = [np.asarray(x) if i in case.known else None for i, x in enumerate(full)]
    return Built(jaxpr, eqn, full, small, constants)


def zeroed(x, masks):
    for d, mask in enumerate(masks):
        if mask is not None:
            x = x * mask.astype(x.dtype).reshape([-1 if i == d else 1 for i in range(x.ndim)])
    return x


def taken(x, masks):
    assert len(masks) == x.ndim
    for d, mask in enumerate(masks):
        if mask is not None:
            assert len(mask) == x.shape[d]
            keys = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
            xp = jnp if keys or isinstance(x, jax.core.Tracer) else np
            x = xp.take(x if xp is jnp else np.asarray(x), np.flatnonzero(mask), axis=d)
    return x


def whole(built, values):
    """The results of the whole equation."""
    jaxpr, eqn = built.jaxpr, built.eqn
    pairs = zip(eqn.invars, values, strict=True)
    values = {v: x for v, x in pairs if not hasattr(v, "val")}
    part = jaxpr.replace(constvars=[], invars=list(values), outvars=list(eqn.outvars), eqns=[eqn])
    return jax.core.eval_jaxpr(part, [], *values.values())


def plain(x):
    x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return np.asarray(x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x)


def alike(got, want, exact=True):
    for a, b in zip(got, want, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if exact:
            np.testing.assert_array_equal(plain(a), plain(b))
        else:
            np.testing.assert_allclose(plain(a), plain(b), rtol=1e-5, atol=1e-5)


def ids():
    return [f"{i}-{case.name}" for i, case in enumerate(CASES)]


def small(case, built):
    def f(values):
        # Numbers in the jaxpr are not traced.
        pairs = zip(built.eqn.invars, values, strict=True)
        values = [getattr(v, "val", x) for v, x in pairs]
        return rerun(built.jaxpr, built.eqn, values, case.ins, case.outs, built.constants)

    return f


def at_what_stays(case, built):
    return [taken(x, m) for x, m in zip(whole(built, built.full), case.outs, strict=True)]


every_case = pytest.mark.parametrize("case", CASES, ids=ids())


@every_case
def test_results_are_those_of_the_whole_at_what_stays(case):
    built = build(case)
    want = at_what_stays(case, built)
    alike(jax.jit(small(case, built))(built.small), want, case.exact)
    if case.name in ("gather", "scatter", "slice", "pad", "dynamic_slice", "tile", "iota"):
        alike(small(case, built)(built.small), want, case.exact)


@every_case
def test_vmap_is_a_loop(case):
    built = build(case)
    if case.name in ("rng_bit_generator", "random_gamma") or not built.small:
        return  # that has no batches of states, and this takes long to compile
    twice = [jnp.stack([x, x]) for x in built.small]
    got = jax.jit(jax.vmap(small(case, built)))(twice)
    for k in range(2):
        alike([x[k] for x in got], at_what_stays(case, built), case.exact)


SMOOTH = (
    "add mul tanh integer_pow select_n clamp convert_element_type optimization_barrier transpose"
    " squeeze rev reshape broadcast_in_dim slice pad concatenate split tile dynamic_slice"
    " dynamic_update_slice gather scatter-add scatter reduce_sum reduce_max cumsum sort top_k"
    " dot_general ragged_dot_general conv_general_dilated reduce_window_max reduce_window_sum"
    " stack unstack"
).split()
SMOOTH_CASES = [c for c in CASES if c.name in SMOOTH and c.args]


@pytest.mark.parametrize("case", SMOOTH_CASES, ids=names)
def test_gradients_are_those_of_the_whole_at_what_stays(case):
    built = build(case)
    real = [i for i, x in enumerate(built.full) if jnp.issubdtype(x.dtype, jnp.inexact)]
    real = [i for i in real if not hasattr(built.eqn.invars[i], "val")]
    outs = [k for k, v in enumerate(built.eqn.outvars) if jnp.issubdtype(v.aval.dtype, jnp.inexact)]

    def of(run, values, bars):
        def f(*moving):
            filled = list(values)
            for i, x in zip(real, moving, strict=True):
                filled[i] = x
            results = run(filled)
            return [results[k] for k in outs]

        return jax.jit(lambda xs, bars: jax.vjp(f, *xs)[1](bars))([values[i] for i in real], bars)

    results = [built.eqn.outvars[k].aval for k in outs]
    bars = [
        zeroed(some(*y.shape).astype(y.dtype), case.outs[k])
        for k, y in zip(outs, results, strict=True)
    ]
    want = of(lambda values: whole(built, values), built.full, bars)
    want = [taken(x, case.ins[i]) for i, x in zip(real, want, strict=True)]
    bars = [jnp.asarray(taken(bar, case.outs[k])) for k, bar in zip(outs, bars, strict=True)]
    got = of(small(case, built), built.small, bars)
    # One variable may stand for several operands, which the whole equation can't tell apart.
    by_variable = [
        [id(built.eqn.invars[i]) for i in real].index(id(built.eqn.invars[i])) for i in real
    ]
    for first in set(by_variable):
        of_one = [n for n, f in enumerate(by_variable) if f == first]
        alike([sum(got[n] for n in of_one)], [sum(want[n] for n in of_one)], exact=False)


def refused(name, fn, args, ins, outs, known=()):
    return Case(name, fn, args, ins, outs, known=known)


SQUARE = some(6, 6)
REFUSED = [
    refused("cholesky", lax.linalg.cholesky, (SQUARE @ SQUARE.T,), [(A, A)], [(A, A)]),
    refused("argmax", lambda x: lax.argmax(x, 1, jnp.int32), (X,), [(N, A)], [(N,)]),
    refused("sort", lambda x: lax.sort(x, dimension=1), (X,), [(N, A)], [(N, A)]),
    refused("top_k", lambda x: lax.top_k(x, 2), (X,), [(N, A)], [(N, N)] * 2),
    refused("fft", jnp.fft.fft, (X.astype(jnp.complex64),), [(N, A)], [(N, A)]),
    refused("unstack", lambda x: jnp.unstack(x, axis=1), (some(4, 2),), [(N, C[:2])], [(N,)] * 2),
    refused("squeeze", lambda x: lax.squeeze(x, (0,)), (some(1, 4),), [(C[:1], N)], [(N,)]),
    refused("add", lax.add, (X, X + 1), [(N, A), (N, A[::-1])], [(N, A)]),
    refused("reshape", lambda x: x.reshape(24), (X,), [(N, A)], [(N,)]),
    refused("reduce_sum", lambda x: x.sum(0), (X,), [(N, A)], [(N,)]),
    refused(
        "broadcast_in_dim",
        lambda x: lax.broadcast_in_dim(x, (4, 6), (1,)),
        (X[0],),
        [(bits("000001"),)],
        [(N, A)],
    ),
    refused("slice", lambda x: x[:, 1:], (X,), [(N, A)], [(N, N)]),
    refused("tile", lambda x: lax.tile(x, (1, 2)), (X,), [(N, A)], [(N, np.ones(12, bool))]),
    refused("pad", lambda x: lax.pad(x, 0.0, [(0, 0, 0), (1, 0, 0)]), (X,), [(N, A), ()], [(N, N)]),
    refused(
        "dynamic_slice",
        lambda x, i: lax.dynamic_slice(x, (0, i), (4, 3)),
        (X, jnp.int32(1)),
        [(N, A), (), ()],
        [(N, A[1:4])],
    ),
    refused(
        "dynamic_update_slice",
        lambda x, u, i: lax.dynamic_update_slice(x, u, (0, i)),
        (X, X[:, :3], jnp.int32(1)),
        [(N, A), (N, A[1:4]), (), ()],
        [(N, A)],
    ),
    refused(
        "dynamic_slice",
        lambda x, i: lax.dynamic_slice(x, (0, i), (4, 3)),
        (X, jnp.int32(1)),
        [(N, A), (), ()],
        [(N, A[:3][::-1])],
        known=(2,),
    ),
    refused(
        "dynamic_slice",
        lambda x, i: lax.dynamic_slice(x, (0, i), (4, 3)),
        (X, jnp.int32(1)),
        [(N, N), (), ()],
        [(N, C)],
    ),
    refused(
        "dynamic_update_slice",
        lambda x, u, i: lax.dynamic_update_slice(x, u, (0, i)),
        (X, X, jnp.int32(1)),
        [(N, A), (N, A), (), ()],
        [(N, D)],
    ),
    refused("gather", gather(COLUMNS, (4, 1)), (X, column(0, 1)), [(N, A), (N, N)], [(N, N)]),
    refused(  # asks for what is gone
        "gather", gather(COLUMNS, (4, 1)), (X, column(0, 2)), [(N, A), (N, N)], [(N, N)], known=(1,)
    ),
    refused(
        "gather",
        gather(COLUMNS, (4, 1)),
        (X, column(0, 1)),
        [(B, N), (N, N)],
        [(B[::-1], N)],
    ),
    refused(  # rows that are not there
        "gather",
        gather(
            {"offset_dims": (1,), "collapsed_slice_dims": (0,), "start_index_map": (0,)}, (1, 6)
        ),
        (X, column(2, 0, 1)),
        [(N, A), (C, N)],
        [(C[::-1], A)],
    ),
    refused(
        "gather",
        gather(
            {"offset_dims": (1,), "collapsed_slice_dims": (0,), "start_index_map": (0,)}, (1, 4)
        ),
        (X, column(2, 0, 1)),
        [(N, A), (N, N)],
        [(N, A[:4][::-1])],
    ),
    refused(
        "gather",
        gather(BATCHED, (1, 1)),
        (X, jnp.zeros((4, 3, 1), jnp.int32)),
        [(B, N), (B[::-1], N, N)],
        [(B[::-1], N)],
    ),
    *[
        refused(
            "gather",
            gather(
                {"offset_dims": (1, 2), "collapsed_slice_dims": (), "start_index_map": (1,)},
                (4, 3),
                mode,
            ),
            (X, column(*starts)),
            [(N, D), (N, N)],
            [(N, N, part)],
            known=(1,),
        )
        for starts, part, mode in (
            ((2, 3), D[2:5], "clip"),
            ((2, 2), D[:3], "clip"),
            ((9, 9), D[3:], "fill"),
        )
    ],
    refused(
        "scatter-add",
        scatter(lax.scatter_add, WRITTEN),
        (X, column(0, 1), some(4, 2)),
        [(N, A), (N, N), (N, N)],
        [(N, D)],
        known=(1,),
    ),
    refused(
        "scatter-add",
        scatter(
            lax.scatter_add,
            {
                "update_window_dims": (),
                "inserted_window_dims": (1,),
                "scatter_dims_to_operand_dims": (1,),
                "operand_batching_dims": (0,),
                "scatter_indices_batching_dims": (0,),
            },
        ),
        (X, jnp.zeros((4, 3, 1), jnp.int32), some(4, 3)),
        [(B, N), (B[::-1], N, N), (B[::-1], N)],
        [(B, N)],
    ),
    refused(
        "scatter-add",
        scatter(lax.scatter_add, WRITTEN),
        (X, column(0, 1), some(4, 2)),
        [(N, A), (N, N), (N, N)],
        [(N, A)],
    ),
    refused(
        "scatter",
        scatter(lax.scatter, WINDOW),
        (X, jnp.asarray([5]), some(4, 3)),
        [(N, A), (N,), (N, N)],
        [(N, A)],
        known=(1,),
    ),
    refused(
        "conv_general_dilated",
        functools.partial(nhwc, feature_group_count=3),
        (some(2, 4, 4, 12), some(3, 3, 4, 6)),
        [(N, N, N, np.tile(A, 2)), (N, N, B, N)],
        [(N, N, N, N)],
    ),
    refused(
        "conv_general_dilated",
        functools.partial(nhwc, feature_group_count=6),
        (IMAGE, some(3, 3, 1, 12)),
        [(N, N, N, N), (N, N, N, np.tile(A, 2))],
        [(N, N, N, np.tile(A, 2))],
    ),
    refused(
        "conv_general_dilated",
        nhwc,
        (IMAGE, some(3, 3, 6, 4)),
        [(N, bits("11110"), N, N), (N, N, N, N)],
        [(N, bits("11110"), N, N)],
    ),
    refused(
        "conv_general_dilated",
        functools.partial(nhwc, batch_group_count=2),
        (IMAGE, some(3, 3, 6, 4)),
        [(N, N, N, A), (N, N, A, N)],
        [(N, N, N, N)],
    ),
    refused(  # a group that gets nothing
        "conv_general_dilated",
        functools.partial(nhwc, feature_group_count=6),
        (IMAGE, some(3, 3, 1, 12)),
        [(N, N, N, A), (N, N, N, N)],
        [(N, N, N, N)],
    ),
    refused(
        "conv_general_dilated",
        nhwc,
        (IMAGE, some(3, 3, 6, 4)),
        [(N, N, N, A), (N, N, D, N)],
        [(N, N, N, N)],
    ),
    refused(
        "conv_general_dilated",
        nhwc,
        (IMAGE, some(3, 3, 6, 4)),
        [(N, N, N, N), (N, N, N, B)],
        [(N, N, N, B[::-1])],
    ),
    *[
        refused(
            "ragged_dot_general",
            lambda x, w, n: lax.ragged_dot(x, w, n),
            (some(4, 6), some(4, 6, 4), jnp.asarray([1, 1, 1, 1], jnp.int32)),
            ins,
            [(ins[0][0], N)],
        )
        for ins in (
            [(B, N), (N, N, N), (N,)],
            [(N, N), (B, N, N), (B,)],
            [(N, N), (B, N, N), (N,)],
            [(N, N), (N, N, N), (B,)],
            [(N, A), (N, D, N), (N,)],
        )
    ],
    refused(
        "reduce_window_sum",
        lambda x: pool(x, 0.0, lax.add),
        (IMAGE,),
        [(N, bits("11110"), N, N)],
        [(N, bits("110"), N, N)],
    ),
    refused("dot_general", lambda x, y: x @ y, (X, X.T), [(N, A), (A[::-1], N)], [(N, N)]),
]


@pytest.mark.parametrize("case", REFUSED, ids=names)
def test_what_can_not_run_is_refused(case):
    built = build(case)
    with pytest.raises(ValueError, match=f"^shrink: `keep` must .*`{case.name}`"):
        jax.eval_shape(small(case, built), built.small)


def test_the_message_says_what_and_where():
    def f(x):
        with jax.named_scope("block"):
            return lax.sort(x, dimension=1)

    built = build(Case("sort", f, (X,), [(N, A)], [(N, A)]))
    with pytest.raises(ValueError) as error:
        small(Case("sort", f, (X,), [(N, A)], [(N, A)]), built)(built.small)
    assert str(error.value) == (
        "shrink: `keep` must leave what `sort` at block can run on, got 2 of 6 positions of axis 1"
        " removed. Keep these positions."
    )


def test_any_equation_runs_where_nothing_is_gone():
    full = np.ones(6, bool)
    case = Case("cholesky", lax.linalg.cholesky, (SQUARE @ SQUARE.T,), [(full, N)], [(N, full)])
    built = build(case)
    alike(small(case, built)(built.full), whole(built, built.full))


def test_values_stand_for_numbers_too():
    built = build(Case("mul", lambda x: x * 2, (X,), [(N, N), ()], [(N, N)]))
    for masks in ((N, N), (N, A)):
        x = taken(X, masks)
        (got,) = rerun(built.jaxpr, built.eqn, [x, jnp.float32(3)], [masks, ()], [masks])
        np.testing.assert_array_equal(got, x * 3)


def test_names_stay():
    def f(x):
        with jax.named_scope("block"):
            return lax.rev(x, (0,))

    case = Case("rev", f, (X,), [(N, A)], [(N, A)])
    built = build(case)
    (eqn,) = jax.make_jaxpr(small(case, built))(built.small).jaxpr.eqns
    assert str(eqn.source_info.name_stack) == "block"


def ran(f, *args):
    return [(e.primitive.name, e.params) for e in jax.make_jaxpr(f)(*args).jaxpr.eqns]


def test_regular_positions_are_slices():
    case = Case("slice", lambda x: x[:, :5], (X,), [(N, bits("110110"))], [(N, bits("11011"))])
    built = build(case)
    assert ran(small(case, built), built.small) == []  # what stays is there
    for mask, name in (("010101", "slice"), ("000111", "slice"), ("110100", "gather")):
        ((got, _),) = ran(lambda x: take_positions(x, (N, bits(mask))), X)  # noqa: B023
        assert got == name


@pytest.mark.parametrize("at", [(5, 4, 3), (1, 1), (0, 3, 3), (3, 0), (5, 4, 3, 2, 1, 0), (0, 1)])
def test_positions_in_any_order(at):
    at = np.asarray(at)
    np.testing.assert_array_equal(take_indices(X, (None, at)), np.take(np.asarray(X), at, 1))
    for name, params in ran(lambda x: take_indices(x, (None, at)), X):
        if name == "gather":
            assert params["indices_are_sorted"] == (sorted(at) == list(at))
            assert params["unique_indices"] == (len(set(at)) == len(at))


def test_indices_that_are_moved_out_are_no_longer_in_order():
    flags = {"indices_are_sorted": True, "unique_indices": True}
    drop = lax.GatherScatterMode.FILL_OR_DROP

    def gathered(x, i):
        numbers = lax.GatherDimensionNumbers(**COLUMNS)
        return lax.gather(x, i, numbers, (4, 1), mode=drop, **flags)

    def scattered(x, i, u):
        return lax.scatter(x, i, u, lax.ScatterDimensionNumbers(**WRITTEN), mode=drop, **flags)

    for inside in (True, False):
        i = column(0 if inside else -1, 1, 5)
        case = Case("gather", gathered, (X, i), [(N, A), (N, N)], [(N, N)], known=(1,))
        built = build(case)
        ((_, params),) = ran(small(case, built), built.small)
        assert [params[name] for name in flags] == [inside, inside]
    for lost in (1, 2):
        args = X, column(0, lost, 5), some(4, 3)
        case = Case("scatter", scattered, args, [(N, A), (N, N), (N, N)], [(N, A)], known=(1,))
        built = build(case)
        ((_, params),) = ran(small(case, built), built.small)
        assert [params[name] for name in flags] == [lost == 1] * 2


@pytest.mark.parametrize("masks", [(N, N), (B, N), (N, A), (B, A), (bits("0000"), A)])
def test_take_positions(masks):
    want = np.asarray(taken(X, masks))
    np.testing.assert_array_equal(take_positions(X, masks), want)
    np.testing.assert_array_equal(jax.jit(lambda x: take_positions(x, masks))(X), want)
    host = take_positions(np.asarray(X), masks)
    assert isinstance(host, np.ndarray)
    np.testing.assert_array_equal(host, want)
    keys = jax.random.split(KEY, (4, 6))
    np.testing.assert_array_equal(plain(take_positions(keys, masks)), plain(taken(keys, masks)))
    # The gradient goes back to what was taken.
    bar = jax.grad(lambda x: take_positions(x, masks).sum())(X)
    np.testing.assert_array_equal(bar, zeroed(jnp.ones((4, 6)), masks))


@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize("spec", [PS("d", None), PS(None, "d"), PS(None, None)])
@pytest.mark.parametrize("mask", ["11010100", "11011110", "10101010"])
def test_take_positions_on_meshes(kind, spec, mask):
    x, mesh = some(4, 8), mesh_of(kind)
    placed = jax.device_put(x, NamedSharding(mesh, spec))
    masks = (N, bits(mask))
    for f in (take_positions, jax.jit(take_positions, static_argnums=1)):
        y = f(placed, Masked(masks))
        np.testing.assert_array_equal(y, taken(x, masks))
        if kind == "explicit":
            stays = spec[1] is None or bits(mask).sum() % 4 == 0
            assert jax.typeof(y).sharding.spec == (spec if stays else PS(spec[0], None))


@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize("mask", ["11010100", "11011110"])
def test_equations_on_meshes(kind, mask):
    mesh = mesh_of(kind)
    x, m = jax.device_put(some(4, 8), NamedSharding(mesh, PS("d", None))), bits(mask)
    w = jax.device_put(some(8, 4), NamedSharding(mesh, PS(None, None)))
    onto = NamedSharding(mesh, PS(None, "d"))
    place = jax.sharding.reshard if kind == "explicit" else lax.with_sharding_constraint
    name = "reshard" if kind == "explicit" else "sharding_constraint"
    for case in (
        Case("broadcast_in_dim", lambda: jnp.zeros((4, 8), device=onto), (), [()], [(N, m)]),
        Case(name, lambda x: place(x, onto), (x,), [(N, m)], [(N, m)]),
        Case("slice", lambda x: x[:, 1:], (x,), [(N, m)], [(N, m[1:])]),
        Case("transpose", lambda x: x.T, (x,), [(N, m)], [(m, N)]),
        Case(
            "pad",
            lambda x: lax.pad(x, jnp.float32(1), [(0, 0, 0), (0, 1, 1)]),
            (x,),
            [(N, m), ()],
            [(N, np.append(np.stack([m, ~m], 1).reshape(-1)[:-1], True))],
        ),
        Case(
            "dot_general",
            lambda x, w: x @ w,
            (x, w),
            [(N, m), (m, N)],
            [(N, N)],
            zeros=True,
            exact=False,
        ),
        Case(
            "concatenate",
            lambda x: jnp.concatenate([x, x], 1),
            (x,),
            [(N, m)] * 2,
            [(N, np.tile(m, 2))],
        ),
    ):
        with jax.set_mesh(mesh):
            built = build(case)
            moved = [
                jax.device_put(v, full.sharding) if len(v.shape) and v.shape[0] == 4 else v
                for v, full in zip(built.small, built.full, strict=True)
            ]
            got = jax.jit(small(case, built))(moved)
            want = jax.jit(lambda values: whole(built, values))(built.full)  # noqa: B023
        want = [taken(y, masks) for y, masks in zip(want, case.outs, strict=True)]
        alike(got, want, case.exact)


class Masked(tuple):
    """Static for `jit`."""

    __slots__ = ()

    def __hash__(self):
        return 0

    def __eq__(self, other):
        return self is other
