"""Values at removed positions, against arrays that are really masked, entry by entry."""

import functools
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxcompress.tracing.positions._neutral import neutral
from jaxcompress.tracing.positions._removed import removed_values, uniform_values
from tests.conftest import mesh_of
from tests.tracing.positions.reader import Read

NONE = object()


def draw(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def masked(x, places):
    """Zeros at the places of every axis whose size has places; `places` by size."""
    x = np.array(x)
    for d, n in enumerate(x.shape):
        np.moveaxis(x, d, 0)[places.get(n, [])] = 0
    return x


def check(read, places):
    """Every constant that was claimed, against the entries that are there; how many were."""
    checked = 0
    for x, constants, known in read.values:
        if x is None or jnp.issubdtype(x.dtype, jax.dtypes.extended):
            continue
        assert len(constants) == x.ndim
        if known is not None:
            np.testing.assert_array_equal(x, np.full(x.shape, known).astype(x.dtype))
        for d, c in enumerate(constants):
            if c is None or x.shape[d] not in places:
                continue
            here = np.take(x, places[x.shape[d]], axis=d).astype(np.float64)
            # A program of its own per equation and one of scalars may round apart.
            np.testing.assert_allclose(here, c, rtol=3e-7)
            checked += 1
    return checked


# Channels 1 and 3 of 5 are gone. What each function makes of 0, from its definition.
GELU = "relu gelu silu tanh elu selu celu mish leaky_relu relu6 hard_swish hard_tanh soft_sign"
ACTIVATIONS = {name: (getattr(jax.nn, name), 0.0) for name in GELU.split()}
ACTIVATIONS |= {
    "gelu erf": (functools.partial(jax.nn.gelu, approximate=False), 0.0),
    "sigmoid": (jax.nn.sigmoid, 0.5),
    "hard_sigmoid": (jax.nn.hard_sigmoid, 0.5),
    "softplus": (jax.nn.softplus, np.log(2)),
    "log_sigmoid": (jax.nn.log_sigmoid, -np.log(2)),
    "squareplus": (jax.nn.squareplus, 1.0),
    "sparse_plus": (jax.nn.sparse_plus, 0.25),
    "softmax": (jax.nn.softmax, NONE),
    "log_softmax": (jax.nn.log_softmax, NONE),
    "cosine": (jnp.cos, 1.0),
    "1 / (1 + x)": (lambda x: 1 / (1 + x), 1.0),
    "inverse": (lambda x: -1 / x, -np.inf),
    "0 / 0": (lambda x: x / x, np.nan),
    "where": (lambda x: jnp.where(x > 0, 2.0, jnp.where(x == 0, 3.0, x)), 3.0),
    "integers": (lambda x: (x + 1.7).astype(jnp.int32) * 2 % 3, 2.0),
    "clip": (lambda x: jnp.clip(x, 0.25, 1.0), 0.25),
    "x ** 0": (lambda x: x**0 + x**3 + x**-2 * 0, NONE),
    "bfloat16": (lambda x: jax.nn.sigmoid(x.astype(jnp.bfloat16) + 1), 0.73046875),
    "nothing": (lambda x: x + jnp.arange(5.0), NONE),
    "other axes": (lambda x: x + jnp.arange(3.0)[:, None] + 0 * x, NONE),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.filterwarnings("ignore:.*encountered in")
def test_activations(name):
    fn, want = ACTIVATIONS[name]
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        read = Read(fn, masked(draw(3, 5), {5: [1, 3]}))
    check(read, {5: [1, 3]})
    ((out, constants, _),) = read.outs
    if want is NONE:
        # 0 * 0 ** -2 is 0 * inf: known as well.
        assert constants[1] is None or (name == "x ** 0" and np.isnan(constants[1]))
    else:
        assert constants[1] is not None
        np.testing.assert_allclose(constants[1], want, rtol=1e-6)
        np.testing.assert_allclose(out[:, 3].astype(np.float32), want, rtol=1e-6)


def gated(p, x):
    a, b = jnp.split(x @ p["up"], 2, axis=-1)
    return (jax.nn.silu(a) * b) @ p["down"]


def squeezed(p, x):
    """Squeeze-excitation between two convolutions with batch normalization."""
    numbers = ("NHWC", "HWIO", "NHWC")
    x = lax.conv_general_dilated(x, p["a"], (1, 1), "SAME", dimension_numbers=numbers)
    x = jax.nn.relu((x - p["mean"]) * lax.rsqrt(p["var"] + 1e-5) * p["scale"] + p["bias"])
    squeeze = jax.nn.sigmoid(jax.nn.relu(x.mean((1, 2)) @ p["in"]) @ p["out"])
    x = x * squeeze[:, None, None, :]
    x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return x.reshape(x.shape[0], -1) @ p["head"]


def attention(p, x):
    q, k, v = (jnp.einsum("btd,dhf->bthf", x, p[name]) for name in "qkv")
    scores = jnp.einsum("bqhf,bkhf->bhqk", q, k) / np.sqrt(7).astype(np.float32)
    mask = jnp.tril(jnp.ones((3, 3), bool))
    probabilities = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf))
    out = jnp.einsum("bhqk,bkhf->bqhf", probabilities, v)
    return out.reshape(*out.shape[:2], -1) @ p["o"]


def small(**shapes):
    return {name: draw(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}


CHANNELS = {5: [1, 3], 20: [1, 3, 6, 8, 11, 13, 16, 18]}
HEADS = {5: [0, 4], 7: [2, 3], 35: [i for i in range(35) if i // 7 in (0, 4) or i % 7 in (2, 3)]}
FEATURES = (1, 1, 1, 5)
NETWORKS = {
    # Places of [N, 10] are those of two halves, and of 4 x 5 those of a flattened image.
    "gated": (gated, small(up=(4, 10), down=(5, 4)), (2, 4), {5: [1, 3], 10: [1, 3, 6, 8]}),
    "squeeze-excitation": (
        squeezed,
        small(
            a=(3, 3, 2, 5),
            mean=FEATURES,
            scale=FEATURES,
            bias=FEATURES,
            out=(3, 5),
            head=(20, 3),
        )
        | {"in": draw(5, 3), "var": np.ones(FEATURES, np.float32)},
        (2, 4, 4, 2),
        CHANNELS,
    ),
    "attention": (
        attention,
        small(q=(4, 5, 7), k=(4, 5, 7), v=(4, 5, 7), o=(35, 4)),
        (2, 3, 4),
        HEADS,
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_exact(name):
    fn, params, shape, places = NETWORKS[name]
    params = {key: masked(p, places) for key, p in params.items()}
    read = Read(fn, params, draw(*shape))
    assert check(read, places) > 3
    wrong = [m for m in read.mixed if places.get(read_size(read, m)) and m[0] != "reduce_max"]
    assert not [m for m in wrong if m[3] == "statistic"]


def read_size(read, mixed):
    """The size of an axis that was mixed along, by the first equation that says so."""
    for eqn, _ in read.equations:
        if eqn.primitive.name == mixed[0] and mixed[2] < len(eqn.invars[mixed[1]].aval.shape):
            return eqn.invars[mixed[1]].aval.shape[mixed[2]]
    return None


NORMS = {
    "LayerNorm": (nn.LayerNorm(), []),
    "RMSNorm": (nn.RMSNorm(), []),
    # Its mean is not 0, so neither is what is left of removed entries once it is taken off.
    "two passes": (nn.LayerNorm(use_fast_variance=False), ["statistic"]),
    "GroupNorm": (nn.GroupNorm(1), []),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms(name):
    norm, want = NORMS[name]
    x = masked(draw(2, 3, 5), CHANNELS)
    params = jax.tree.map(
        lambda p: masked(np.asarray(p) + 0.5, CHANNELS), norm.init(jax.random.key(0), x)
    )
    with jax.numpy_rank_promotion("allow"):
        read = Read(norm.apply, params, x)
    check(read, CHANNELS)
    assert read.outs[0][1][2] == 0
    assert [m[3] for m in read.mixed] == want


# What moves entries: what becomes of 5 places, told by the function itself on marks.
INDEX = np.array([4, 0, 3])
MOVES = {
    "transpose": lambda x: x.transpose(2, 0, 1),
    "merge": lambda x: x.reshape(2, 15),
    "split": lambda x: x.reshape(2, 3, 5, 1),
    "add axes": lambda x: x[:, None, :, None],
    "add and repeat": lambda x: lax.broadcast_in_dim(x, (4, 2, 3, 5), (1, 2, 3)),
    "squeeze": lambda x: x[:1, :, :].squeeze(0),
    "slice": lambda x: x[:, ::2, 1:4],
    "reverse": lambda x: x[:, :, ::-1],
    "roll": lambda x: jnp.roll(x, 2, axis=2),
    "join": lambda x: jnp.concatenate([x, x[..., ::-1]], axis=2),
    "join others": lambda x: jnp.concatenate([x, x], axis=1),
    "stack": lambda x: jnp.stack([x, x], axis=1),
    "unstack": lambda x: jnp.unstack(x, axis=0)[1],
    "halves": lambda x: jnp.split(x, [2], axis=2)[1],
    "tile": lambda x: jnp.tile(x, (1, 2, 2)),
    "repeat": lambda x: jnp.repeat(x, 2, axis=2),
    "cut": lambda x: lax.dynamic_slice(x, (0, 1, 1), (2, 2, 3)),
    "take": lambda x: jnp.take(x, INDEX, axis=2),
    "take others": lambda x: jnp.take(x, INDEX[1:] - 0 * INDEX[1:], axis=0, mode="clip"),
    "index": lambda x: x[:, 1, INDEX],
    "rows": lambda x: x[INDEX[:2] // 4],
    "windows": lambda x: jax.vmap(lambda i: lax.dynamic_slice(x, (0, i, 0), (2, 1, 5)))(INDEX // 2),
    "batched": lambda x: jax.vmap(lambda y, i: y[i])(x, INDEX[:2] // 2),
    "pad": lambda x: jnp.pad(x, ((0, 0), (0, 0), (1, 2))),
    "write": lambda x: x.at[:, 1:2].set(x[:, :1]),
    "update": lambda x: lax.dynamic_update_slice(x, x[:, :2], (0, 1, 0)),
    "sort others": lambda x: jnp.sort(x, axis=1),
    "largest others": lambda x: lax.top_k(x.transpose(0, 2, 1), 2)[0],
    "cast": lambda x: x.astype(jnp.bfloat16).astype(jnp.float32),
    "barrier": lambda x: lax.optimization_barrier((x, x))[1],
    "stop": lax.stop_gradient,
}


@pytest.mark.parametrize("c", [0.0, -2.5])
@pytest.mark.parametrize("name", MOVES)
def test_moved_places(name, c):
    fn, x = MOVES[name], draw(2, 3, 5)
    x[..., [1, 3]] = c
    marks = np.zeros_like(x)
    marks[..., [1, 3]] = 1
    # Padding is not among the places, whatever stands there.
    moved = np.asarray(fn(jnp.asarray(marks)))
    # Only the last axis has removed places: along the others any constant is right.
    read = Walk(fn, x, (NONE, NONE, c))
    out, constants = read.out
    found = 0
    for d, n in enumerate(out.shape):
        rest = tuple(k for k in range(out.ndim) if k != d)
        for p in range(n):
            if moved.min(rest)[p] == 1 and moved.max() == 1:
                found += 1
                if constants[d] is not None:
                    np.testing.assert_array_equal(np.take(out, p, axis=d), constants[d])
                else:
                    missed = (name, d)
                    assert missed in KNOWN_MISSES, missed
    assert found


# A repetition may leave alone, too, as far as its equations tell: nothing is known of that.
# Of two indices, each of its own axis, none is followed.
KNOWN_MISSES = {("repeat", 2), ("index", 1)}


class Walk(Read):
    """With constants of one argument as given; an axis of None has no removed places."""

    def __init__(self, fn, x, constants):
        closed = jax.make_jaxpr(fn)(x)
        self.values, self.mixed, self.equations = [], [], []
        # Along axes of which nothing is removed any constant is right: the same one is.
        (c,) = {c for c in constants if c is not NONE}
        consts = [(np.asarray(y), (None,) * np.ndim(y), None) for y in closed.consts]
        outs = self._run(closed.jaxpr, consts, [(x, (c,) * x.ndim, None)])
        out, constants, _ = outs[0]
        self.out = np.asarray(out), constants


def equation(fn, *operands):
    """The last equation of a function, and numbers among its operands."""
    eqn = jax.make_jaxpr(fn)(*operands).eqns[-1]
    return eqn, [getattr(v, "val", None) if not v.aval.shape else None for v in eqn.invars]


def shaped(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def said(fn, *operands):
    """`operands` are (shape, constants); what is said of the first result."""
    eqn, known = equation(fn, *(shaped(*shape) for shape, _ in operands))
    given = iter(constants for _, constants in operands)
    ins = [() if hasattr(v, "val") else next(given) for v in eqn.invars]
    return removed_values(eqn, ins, known)[0]


X = ((2, 3, 5), (None, 1.5, 0.0))


def test_what_is_not_known_stays_so():
    assert said(lambda x: x.transpose(2, 0, 1), X) == (0, None, 1.5)
    assert said(lambda x: x.reshape(2, 15), X) == (None, None)
    assert said(lambda x: x.reshape(6, 5), X) == (None, 0)
    assert said(lambda x: x.reshape(2, 3, 1, 5), X)[3] == 0
    assert said(lambda x: x.reshape(2, 15), (X[0], (1.5, 0.0, 0.0))) == (1.5, 0)
    assert said(lambda x: x.reshape(2, 3, 5, 1), X)[:3] == (None, 1.5, 0)
    assert said(lambda x: x.reshape(5, 6), X) == (None, None)
    assert said(lambda x: x.reshape(5, 6), (X[0], (0.0,) * 3)) == (0, 0)
    assert said(lambda x: x.reshape(6), ((2, 1, 3), (0.0, None, 0.0))) == (0,)
    assert said(lambda x: x[None], X) == (None, None, 1.5, 0)
    assert said(lambda: jnp.full((3, 5), 2.0)) == (2, 2)
    wide = ((1, 5), (1.0, 0.0))
    assert said(lambda x: lax.broadcast_in_dim(x, (3, 5), (0, 1)), wide) == (None, 0)
    # Padding is at the removed places of the other axes, too.
    assert said(lambda x: lax.pad(x, 0.0, ((0, 0, 0),) * 2 + ((1, 0, 0),)), X) == (None, None, 0)
    assert said(lambda x: lax.pad(x, 0.0, ((0, 0, 0),) * 2 + ((0, 1, 0),)), X) == (None, None, 0)
    assert said(lambda x: lax.pad(x, 1.5, ((0, 0, 0),) * 2 + ((0, 1, 0),)), X) == (None, 1.5, 0)
    assert said(lambda x: lax.pad(x, 1.5, ((0, 0, 0),) * 2 + ((0, 1, 1),)), X) == (None, 1.5, 0)
    assert said(lambda x: lax.pad(x, 0.0, ((0, 0, 0),) * 2 + ((0, -1, 0),)), X) == X[1]
    other = ((2, 3, 5), (0.0, None, 0.0))
    for join in (lambda x, y: jnp.concatenate([x, y], 2), lambda x, y: jnp.concatenate([x, y], 0)):
        assert said(join, X, other) == (None, None, 0)
    update = lambda x, y: lax.dynamic_update_slice(x, y, (0, 0, 0))  # noqa: E731
    assert said(update, X, other) == (None, None, 0)
    stack = lambda x, y: jnp.stack([x, y], 1)  # noqa: E731
    assert said(stack, *[((2, 3), (1.5, 0.0))] * 2) == (1.5, None, 0)
    assert said(lambda x: lax.sort(x, dimension=1), X) == (None, None, 0)
    assert said(lambda x: lax.top_k(x, 2)[0], X) == (None, 1.5, None)


def test_picking():
    def pick(collapsed, mapped, sizes, offset, batching=()):
        numbers = lax.GatherDimensionNumbers(
            offset, collapsed, mapped, batching, (0,) * len(batching)
        )
        return lambda x, i: lax.gather(x, i.astype(int), numbers, sizes, mode="promise_in_bounds")

    index = ((2, 1), (None, None))
    assert said(pick((1,), (1,), (2, 1, 5), (0, 2)), X, ((4, 1), index[1])) == (None, 1.5, 0)
    assert said(pick((2,), (2,), (2, 3, 1), (0, 1)), X, ((4, 1), index[1])) == (None, 1.5, 0)
    # Each index along an axis that both have: as the table has it.
    both = pick((1,), (1,), (1, 1, 5), (1,), (0,))
    assert said(both, (X[0], (1.0, None, 0.0)), index) == (1, 0)
    # Of two axes, by two arrays of indices, or by one for several of theirs.
    two = pick((1, 2), (1, 2), (2, 1, 1), (0,))
    assert said(two, (X[0], (1.0, 0.0, 0.0)), ((4, 2), index[1])) == (1, None)
    square = pick((2,), (2,), (2, 3, 1), (0, 1))
    assert said(square, X, ((4, 4, 1), (None,) * 3)) == (None, 1.5, None, None)


def written(kind):
    def fn(x, y):
        return getattr(x.at[jnp.array([1, 0])], kind)(y, mode="promise_in_bounds")

    eqn, known = equation(fn, shaped(3, 5), shaped(2, 5))
    assert "scatter" in eqn.primitive.name

    def of(table, updates):
        ins = [(None, table), (None, None), (None, updates)]
        return removed_values(eqn, ins, known)[0]

    return of


def test_writing():
    for kind in ("set", "max", "min"):
        assert written(kind)(2.0, 2.0) == (None, 2)
        assert written(kind)(2.0, 0.0) == written(kind)(None, 0.0) == (None, None)
    for kind in ("add", "subtract"):
        assert written(kind)(0.0, 0.0) == (None, 0)
        assert written(kind)(2.0, 2.0) == written(kind)(0.0, None) == (None, None)
    assert written("multiply")(0.0, None) == (None, 0)
    assert written("multiply")(1.0, 1.0) == written("multiply")(None, 0.0) == (None, None)


UNARY = (
    "neg abs sign floor ceil round is_finite exp exp2 expm1 log log1p tanh logistic sin cos tan"
    " sqrt rsqrt cbrt erf erfc erf_inv asin acos atan sinh cosh asinh acosh atanh square lgamma"
    " digamma bessel_i0e"
).split()
BINARY = "add sub mul div rem max min pow atan2 nextafter eq ne lt le gt ge".split()
WHOLE = "bitwise_and bitwise_or bitwise_xor shift_left shift_right_logical".split()
OTHERS = {
    "integer_pow": lambda x, y: lax.integer_pow(x, 3),
    "clamp": lambda x, y: lax.clamp(-0.25, x, y),
    "select": lambda x, y: lax.select(x > y, x, y),
    "cast": lambda x, y: lax.convert_element_type(x, jnp.bfloat16),
    "truth": lambda x, y: lax.convert_element_type(y, bool),
    "bits": lambda x, y: lax.bitcast_convert_type(x, jnp.int32),
    "precision": lambda x, y: lax.reduce_precision(y, 5, 2),
}


@pytest.mark.parametrize("name", [*UNARY, *BINARY, *WHOLE, *OTHERS])
def test_every_elementwise_primitive(name):
    """Removed places 1 and 3 of 5, where the operands are 0.3 and -2, or 0 and 3."""
    places = {5: [1, 3]}
    whole = name in WHOLE
    values = [(0.3, -2.0), (0.0, 3.0)] if not whole else [(5, 3), (0, 1)]
    fn = OTHERS.get(name) or getattr(lax, name)
    for constants in values:
        x, y = (draw(5, seed=i) for i in range(2))
        x, y = (z.astype(np.int32) if whole else z for z in (x, y))
        x[[1, 3]], y[[1, 3]] = constants
        given = [x] if name in UNARY else [x, y]
        read = Walk2(fn, given, constants)
        assert read.values[-1][1][0] is not None
        assert check(read, places) == len(read.values)


class Walk2(Read):
    """Of several arguments of one axis, of which each has its constant."""

    def __init__(self, fn, args, constants):
        closed = jax.make_jaxpr(fn)(*args)
        self.values, self.mixed, self.equations = [], [], []
        given = [(x, (float(c),), None) for x, c in zip(args, constants, strict=False)]
        self.outs = self._run(closed.jaxpr, [], given)


def test_one_operand_is_enough():
    a, b = ((5,), (0.0,)), ((5,), (None,))
    for fn in (lax.mul, lambda x, y: y * x):
        assert said(fn, a, b) == (0,)
    assert said(lax.div, a, b) == said(lax.rem, a, b) == (0,)
    assert said(lax.div, b, a) == said(lax.rem, b, a) == (None,)
    for fn in (lax.add, lax.sub, lax.max, lax.min, lax.pow, lax.atan2):
        assert said(fn, a, b) == (None,)
    # Infinity times 0 is known not to be 0.
    assert np.isnan(said(lax.mul, a, ((5,), (np.inf,)))[0])

    def choice(*constants):
        eqn, known = equation(lax.select_n, shaped(5, dtype=bool), shaped(5), shaped(5))
        return removed_values(eqn, [(c,) for c in constants], known)[0][0]

    assert choice(None, 2.0, 2.0) == 2
    assert np.isnan(choice(None, np.nan, np.nan))
    assert choice(None, 2.0, 0.0) is choice(None, None, 2.0) is choice(1.0, 2.0, None) is None
    assert choice(0.0, 2.0, None) == choice(1.0, None, 2.0) == 2

    def logical(fn, *constants):
        eqn, known = equation(fn, shaped(5, dtype=bool), shaped(5, dtype=bool))
        return removed_values(eqn, [(c,) for c in constants], known)[0][0]

    assert logical(lax.bitwise_and, None, 0.0) == 0
    assert logical(lax.bitwise_or, 1.0, None) == 1
    assert logical(lax.bitwise_and, None, 1.0) is logical(lax.bitwise_or, 0.0, None) is None
    eqn, known = equation(lax.bitwise_or, shaped(5, dtype=jnp.int32), shaped(5, dtype=jnp.int32))
    assert removed_values(eqn, [(1.0,), (None,)], known) == [(None,)]


def test_an_operand_without_the_axis_is_known_only_if_it_is_one_number():
    for fn, known, want in [(lax.add, 2.0, 2.0), (lax.add, None, None), (lax.mul, None, 0.0)]:
        for shape in ((), (1,), (5,)):
            eqn, _ = equation(fn, shaped(5), shaped(*shape))
            assert removed_values(eqn, [(0.0,), (None,) * len(shape)], [None, known]) == [(want,)]
    # Of size 1, it is not at a removed place of the other, whatever it is at its own.
    assert said(lax.add, ((3, 5), (0.0, 0.0)), ((1, 5), (0.0, 0.0))) == (None, 0)


def test_numbers_that_fill_a_value():
    def numbers(fn, *operands, known):
        eqn, literals = equation(fn, *operands)
        given = iter(known)
        return uniform_values(eqn, [next(given) if x is None else x for x in literals])

    x = shaped(3, 5)
    assert numbers(lambda: jnp.full((3, 5), 2.0), known=[]) == [2]
    assert numbers(lambda x: x.T, x, known=[2.0]) == [2]
    assert numbers(lambda x: jnp.sqrt(x), x, known=[4.0]) == [2]
    assert numbers(lambda x: x + 1, x, known=[4.0]) == [5]
    assert numbers(lambda x: x + 1, x, known=[None]) == [None]
    # That all are 0 would not make it one that is computed: the other may not be finite.
    assert numbers(lambda x, y: x * y, x, x, known=[0.0, None])[0] in (None, 0)
    assert numbers(lambda x: x.sum(0), x, known=[1.0]) == [None]
    assert numbers(lambda x: x.max(0), x, known=[1.0]) == [1]
    assert numbers(lambda x: jnp.cumsum(x, 0), x, known=[1.0]) == [None]
    assert numbers(lambda x: lax.optimization_barrier((x, x)), x, known=[1.0, 1.0]) == [1, 1]
    assert numbers(lambda: lax.iota(jnp.int32, 3), known=[]) == [None]
    assert numbers(lambda x: lax.top_k(x, 2), x, known=[1.0]) == [None, None]
    assert numbers(lambda x: lax.sqrt(x), shaped(0), known=[1.0]) == [None]
    # Too long for a float, complex, not a number at all.
    for number in (2**53 + 1, np.int64(2**53 + 1), 1j, "a", np.ones(2)):
        assert numbers(lax.stop_gradient, x, known=[number]) == [None]
    assert numbers(lax.stop_gradient, x, known=[np.int64(2**53)]) == [2**53]


def product(numbers):
    return lambda x, y: lax.dot_general(x, y, numbers)


N = None


def test_products():
    """Operands [2, 3, 5] and [2, 5, 7]."""
    fn = product((((2,), (1,)), ((0,), (0,))))

    def of(x, y):
        return said(fn, ((2, 3, 5), x), ((2, 5, 7), y))

    assert of((0.0, 0.0, N), (N, N, 0.0)) == (0, 0, 0)
    assert of((N, N, 0.0), (0.0, 0.0, N)) == (0, N, N)
    assert of((1.0, 1.0, 1.0), (1.0, 1.0, 1.0)) == (N, N, N)
    two = product((((0, 2), (2, 0)), ((), ())))
    assert said(two, ((2, 3, 5), (N, 0.0, N)), ((5, 7, 2), (0.0, N, 0.0))) == (0, N)


def test_ragged_products():
    x, w, sizes = shaped(6, 5), shaped(2, 5, 7), shaped(2, dtype=jnp.int32)
    eqn, known = equation(lax.ragged_dot, x, w, sizes)
    assert eqn.primitive.name == "ragged_dot_general"
    ins = [(N, 0.0), (0.0, N, 0.0), (N,)]
    assert removed_values(eqn, ins, known) == [(N, 0)]
    assert not [m for m in neutral(eqn, ins, known) if m.kind == "statistic"]
    ins = [(0.0, N), (N, N, N), (N,)]
    assert removed_values(eqn, ins, known) == [(0, N)]
    assert [m[:3] for m in neutral(eqn, ins, known)] == [
        (0, 1, "statistic"),
        (1, 1, "statistic"),
        (0, 0, "freeze"),
    ]
    # The sums are over each group's own part of the rows.
    numbers = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
    fn = lambda x, w, sizes: lax.ragged_dot_general(x, w, sizes, numbers)  # noqa: E731
    eqn, known = equation(fn, x, shaped(6, 7), sizes)
    assert removed_values(eqn, [(0.0, 0.0), (0.0, 0.0), (N,)], known) == [(N, N, N)]
    assert (0, 0, "freeze") in [m[:3] for m in neutral(eqn, [(0.0, 0.0)] * 2 + [(N,)], known)]


def conv(groups=1, batches=1, **options):
    numbers = ("NHWC", "HWIO", "NHWC")
    options = {"window_strides": (1, 1), "padding": "VALID"} | options

    def fn(x, w):
        return lax.conv_general_dilated(
            x,
            w,
            dimension_numbers=numbers,
            feature_group_count=groups,
            batch_group_count=batches,
            **options,
        )

    return fn


def test_convolutions():
    def of(x, w, fn, channels=4, kernel=(1, 3, 4, 6)):
        return said(fn, ((2, 5, 5, channels), x), (kernel, w))

    every, none = (0.0,) * 4, (N,) * 4
    # Columns are mixed by a window of 3, rows are not.
    assert of(every, none, conv()) == (0, 0, N, N)
    assert of(none, every, conv()) == (N, N, N, 0)
    assert of(none, (0.0, 0.0, 0.0, N), conv()) == none
    for options in ({"window_strides": (2, 1)}, {"padding": ((1, 0), (0, 0))}):
        assert of(every, none, conv(**options)) == (0, N, N, N)
    for dilation in ("lhs_dilation", "rhs_dilation"):
        options = {dilation: (2, 1), "padding": ((0, 0), (0, 0))}
        assert of(every, none, conv(**options)) == (0, N, N, N)
    # Grouped: a channel of the result has its own kernel; depthwise, its own input, too.
    assert of(every, none, conv(groups=2), kernel=(1, 1, 2, 6))[3] is None
    assert of(every, none, conv(groups=2), kernel=(1, 1, 2, 4))[3] is None
    assert of(every, none, conv(groups=4), kernel=(1, 1, 1, 4))[3] == 0
    assert of(none, every, conv(groups=4), kernel=(1, 1, 1, 8))[3] == 0
    assert of(every, none, conv(groups=4), kernel=(1, 1, 1, 8))[3] is None
    assert of(every, none, conv(batches=2)) == (N, 0, N, N)


def flagged(fn, *operands, known=None):
    eqn, literals = equation(fn, *(shaped(*shape) for shape, _ in operands))
    given = iter(constants for _, constants in operands)
    ins = [() if hasattr(v, "val") else next(given) for v in eqn.invars]
    return [m[:3] for m in neutral(eqn, ins, known or literals)]


def test_which_sums_of_convolutions_leave_something_out():
    def of(x, w, fn, kernel=(1, 1, 4, 6)):
        return flagged(fn, ((2, 5, 5, 4), (N, N, N, x)), (kernel, (N, N, w, N)))

    assert of(0.0, N, conv()) == of(N, 0.0, conv()) == []
    assert of(N, N, conv()) == of(0.5, N, conv()) == [(0, 3, "statistic"), (1, 2, "statistic")]
    assert of(N, N, conv(groups=4), (1, 1, 1, 4)) == []
    assert of(N, 0.0, conv(groups=2), (1, 1, 2, 6)) == []
    # Neighbours.
    assert of(0.0, N, conv(), (1, 3, 4, 6)) == [(0, 2, "freeze")]
    assert of(0.0, N, conv(), (3, 1, 4, 6)) == [(0, 1, "freeze")]


def test_which_products_and_known_numbers_leave_something_out():
    fn = product((((1,), (0,)), ((), ())))

    def of(a, b):
        return [kind for *_, kind in flagged(fn, ((2, 5), (N, a)), ((5, 3), (b, N)))]

    assert of(0.0, N) == of(N, 0.0) == of(0.0, 3.0) == []
    for a, b in [(N, N), (1.0, 1.0), (0.0, np.inf), (np.nan, 0.0)]:
        assert of(a, b) == ["statistic"] * 2
    # What is one number everywhere is it at removed places, too.
    assert flagged(lambda x: x.sum(1), ((2, 5), (N, N)), known=[0.0]) == []


# Reductions of [4, 5] over its last axis: by NumPy, with and without removed entries.
REDUCTIONS = {
    "reduce_sum": (lambda x: lax.reduce_sum(x, (1,)), np.sum),
    "reduce_max": (lambda x: lax.reduce_max(x, (1,)), np.max),
    "reduce_min": (lambda x: lax.reduce_min(x, (1,)), np.min),
    "reduce_prod": (lambda x: lax.reduce_prod(x, (1,)), np.prod),
    "cumsum": (lambda x: lax.cumsum(x, 1), np.cumsum),
    "cumprod": (lambda x: lax.cumprod(x, 1), np.cumprod),
    "cummax": (lambda x: lax.cummax(x, 1), np.maximum.accumulate),
    "cummin": (lambda x: lax.cummin(x, 1), np.minimum.accumulate),
    "cumlogsumexp": (lambda x: lax.cumlogsumexp(x, 1), np.logaddexp.accumulate),
    "dot_general": (lambda x: x @ jnp.ones((5, 3)), np.sum),
}
# Among them some that any one removed entry changes.
ROWS = [[-3, 9, -4, -5, -3], [3, 9, 4, 5, 6], [7, 9, -7, 1, -2], [0, 9, 0, 0, 0]]
FLOATS = (0.0, 1.0, -2.5, np.inf, -np.inf)
INTEGERS = (0, 1, -1, np.iinfo(np.int32).min, np.iinfo(np.int32).max)
INTEGER = {
    "reduce_and": (lambda x: lax.reduce_and(x, (1,)), np.bitwise_and.reduce),
    "reduce_or": (lambda x: lax.reduce_or(x, (1,)), np.bitwise_or.reduce),
    "reduce_xor": (lambda x: lax.reduce_xor(x, (1,)), np.bitwise_xor.reduce),
    "reduce_max": REDUCTIONS["reduce_max"],
    "reduce_min": REDUCTIONS["reduce_min"],
    "reduce_prod": REDUCTIONS["reduce_prod"],
}


@pytest.mark.parametrize(
    ("name", "table", "constants", "dtype"),
    [(name, REDUCTIONS, FLOATS, np.float32) for name in REDUCTIONS]
    + [(name, INTEGER, INTEGERS, np.int32) for name in INTEGER]
    + [(name, INTEGER, (0, 1), np.bool_) for name in INTEGER if name != "reduce_prod"],
)
def test_reductions_that_removed_entries_change_are_told(name, table, constants, dtype):
    fn, oracle = table[name]
    eqn, known = equation(fn, shaped(4, 5, dtype=dtype))
    assert eqn.primitive.name == name
    for c in constants:
        x = np.array(ROWS).astype(dtype)
        x[:, 1] = c
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            whole, left = oracle(x, axis=1), oracle(x[:, [0, 2, 3, 4]], axis=1)
        whole = whole[:, [0, 2, 3, 4]] if name.startswith("cum") else whole
        same = np.allclose(whole, left, rtol=1e-6, atol=0, equal_nan=False)
        ins = [(None, float(c)), *([(None, None)] * (len(eqn.invars) - 1))]
        found = [m[:3] for m in neutral(eqn, ins, known)]
        sums = name in ("reduce_sum", "dot_general")
        told = [(0, 1, "statistic" if sums else "freeze")]
        told += [(1, 0, "statistic")] * (name == "dot_general")
        assert found == ([] if same else told), c
        # Nothing is known: whatever it is.
        assert [m[:3] for m in neutral(eqn, [(None, None)] * len(ins), known)] == told


# Which constants are reduced to themselves, over other axes: by NumPy again.
@pytest.mark.parametrize("name", [*REDUCTIONS, *(f"{name} of integers" for name in INTEGER)])
def test_reductions_over_other_axes(name):
    name, _, whole = name.partition(" of ")
    table, constants = (INTEGER, INTEGERS) if whole else (REDUCTIONS, FLOATS)
    fn, oracle = table[name]
    dtype = np.int32 if whole else np.float32
    eqn, known = equation(fn, shaped(4, 5, dtype=dtype))
    for c in constants:
        # Of any number of entries, so that it stays true of a smaller program.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results = [np.ravel(oracle(np.full((1, n), c, dtype), axis=1)) for n in (2, 3)]
        same = all(np.array_equal(x, np.full_like(x, c)) for x in results)
        ins = [(float(c), None), *([(None, None)] * (len(eqn.invars) - 1))]
        got = removed_values(eqn, ins, known)[0]
        zero = name == "dot_general" and c != 0
        # The wraparound of integers is not followed, and infinite sums are none to count on.
        shy = name in ("reduce_sum", "cumsum", "cumlogsumexp", "reduce_prod", "cumprod")
        if same and not zero and not (shy and abs(float(c)) > 1):
            assert got[0] == c, c
        else:
            assert got[0] is None or same, c
        assert got[1:] == (None,) * (len(got) - 1)


def test_numbers_along_an_axis():
    assert said(lambda x: lax.cumsum(x, 1), ((4, 5), (0.0, 0.0))) == (0, None)
    assert said(lambda x: lax.reduce_max(x, (1,)), ((4, 0), (1.0, 1.0))) == (None,)
    assert said(lambda x: lax.cumlogsumexp(x, 1), ((4, 5), (-np.inf, 0.0))) == (-np.inf, None)


ORDERED = {
    "argmax": (lambda x: lax.argmax(x, 1, np.int32), [(0, 1)]),
    "argmin": (lambda x: lax.argmin(x, 0, np.int32), [(0, 0)]),
    "sort": (lambda x: lax.sort(x, dimension=1), [(0, 1)]),
    "sort pairs": (lambda x: lax.sort((x, x), dimension=0, num_keys=1), [(0, 0), (1, 0)]),
    "top_k": (lambda x: lax.top_k(x, 2), [(0, 1)]),
    "approx_max_k": (lambda x: lax.approx_max_k(x, 2), [(0, 1)]),
    "fft": (lambda x: lax.fft(x.astype(np.complex64), "FFT", (5,)), [(0, 1)]),
    "fft of both": (lambda x: lax.fft(x, "RFFT", (4, 5)), [(0, 0), (0, 1)]),
    "reduce": (lambda x: lax.reduce(x, 1.0, lambda a, b: a * b + a, (1,)), [(0, 1)]),
}


@pytest.mark.parametrize("name", ORDERED)
def test_order_is_told_whatever_is_removed(name):
    fn, want = ORDERED[name]
    closed = jax.make_jaxpr(fn)(shaped(4, 5))
    eqn = closed.eqns[-1]
    if eqn.primitive.name in ("jit", "pjit"):
        eqn = eqn.params["jaxpr"].eqns[-1]
    for c in (0.0, -np.inf, None):
        found = neutral(eqn, [(c,) * len(v.aval.shape) for v in eqn.invars])
        assert [(m.operand, m.axis) for m in found] == want
        assert all(m.kind == "freeze" for m in found)


def window(kind, size, pads=((0, 0),) * 3, strides=(1, 1, 1), **options):
    init = {"sum": 0.0, "max": -np.inf, "min": np.inf}[kind]
    op = {"sum": lax.add, "max": lax.max, "min": lax.min}[kind]

    def fn(x):
        return lax.reduce_window(x, init, op, size, strides, pads, **options)

    return fn


def test_windows():
    x = (4, 6, 5)
    pads = ((0, 0), (1, 1), (0, 0))
    for c, kinds in [(0.0, ("sum", "max", "min")), (2.0, ("max", "min"))]:
        for kind in ("sum", "max", "min"):
            want = c if kind in kinds else None
            fn = window(kind, (1, 2, 1), pads)
            assert said(fn, (x, (None, c, c))) == (None, None, want), (c, kind)
            assert flagged(fn, (x, (0.0,) * 3)) == [(0, 1, "freeze")]
            y = np.full((1, 6, 1), c, np.float32)
            assert want is None or (np.asarray(fn(y)) == c).all()
    # Windows of nothing but padding, and of holes.
    far = ((0, 0), (2, 0), (0, 0))
    assert said(window("max", (1, 2, 1), far), (x, (None, 2.0, 2.0))) == (None,) * 3
    assert said(window("sum", (1, 2, 1), far), (x, (None, 0.0, 0.0))) == (None, None, 0)
    for kind in ("base_dilation", "window_dilation"):
        fn = window("max", (1, 2, 1), pads, **{kind: (1, 2, 1)})
        assert said(fn, (x, (None, 2.0, 2.0))) == (None,) * 3
    assert flagged(window("max", (1, 1, 1), strides=(1, 1, 2)), (x, (0.0,) * 3)) == [
        (0, 2, "freeze")
    ]


def test_gradients_of_windows():
    fn = jax.grad(lambda x: window("max", (1, 2, 1), strides=(1, 2, 1))(x).sum())
    read = Read(fn, masked(draw(4, 6, 5), CHANNELS))
    names = [eqn.primitive.name for eqn, _ in read.equations]
    assert "select_and_scatter_add" in names
    assert check(read, CHANNELS)
    (eqn,) = [e for e, _ in read.equations if e.primitive.name == "select_and_scatter_add"]
    assert removed_values(eqn, [(0.0,) * 3, (None,) * 3]) == [(0, None, 0)]
    assert removed_values(eqn, [(None,) * 3, (0.0,) * 3]) == [(None,) * 3]


OTHERWISE = {
    "keys": lambda x: jax.random.normal(jax.random.key(0), (4, 4)) + x,
    "cholesky": lambda x: jnp.linalg.cholesky(x @ x.T + jnp.eye(4)),
    "complex": lambda x: jnp.abs(lax.complex(x, x) * 1j),
    "counted": lambda x: lax.iota(jnp.float32, 4) * x.sum(1),
    "empty": lambda x: x[:0].sum(0) + jnp.zeros((0, 4)).sum(0),
    "solve": lambda x: jnp.linalg.solve(x + 2 * jnp.eye(4), x),
    "integers": lambda x: jnp.bincount(x.astype(jnp.int32)[0], length=3),
    "sharded": lambda x: jax.lax.with_sharding_constraint(
        x, jax.sharding.SingleDeviceSharding(jax.devices()[0])
    ),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_nothing_raises_and_nothing_is_wrong(name):
    def visit(jaxpr):
        for eqn in jaxpr.eqns:
            for c in (0.0, None, np.nan):
                ins = [(c,) * len(v.aval.shape) for v in eqn.invars]
                outs = removed_values(eqn, ins)
                assert [len(axes) for axes in outs] == [len(v.aval.shape) for v in eqn.outvars]
                neutral(eqn, ins)
                uniform_values(eqn, [c] * len(ins))
            for p in eqn.params.values():
                inner = getattr(p, "jaxpr", p)
                if hasattr(inner, "eqns"):
                    visit(inner)

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        visit(jax.make_jaxpr(OTHERWISE[name])(draw(4, 4)).jaxpr)


def test_what_cannot_be_read_is_not_guessed():
    class Strange:
        def __init__(self, eqn):
            self.primitive, self.invars, self.outvars = eqn.primitive, eqn.invars, eqn.outvars
            self.params = {}

    for fn in (lambda x: x.sum(1), lambda x: x.T, lambda x: lax.cumsum(x, 1)):
        eqn = Strange(equation(fn, shaped(4, 5))[0])
        out = removed_values(eqn, [(0.0, 0.0)])
        assert set(out[0]) == {None}
        if eqn.primitive.name != "transpose":
            assert [m[:3] for m in neutral(eqn, [(0.0, 0.0)])] == [
                (0, 0, "freeze"),
                (0, 1, "freeze"),
            ]


SETTINGS = {
    "no jit": lambda: jax.disable_jit(),
    "NaNs raise": lambda: jax.debug_nans(True),
    "no transfers": lambda: jax.transfer_guard("disallow_explicit"),
    "explicit mesh": lambda: jax.set_mesh(mesh_of("explicit")),
    "auto mesh": lambda: jax.set_mesh(mesh_of("auto")),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_scalars_are_computed_under_any_settings(setting):
    # Numbers of its own for each, that no other test has computed.
    c = 0.3125 + list(SETTINGS).index(setting) / 64
    eqn, known = equation(lambda x: jnp.tanh(x), shaped(5))
    root, _ = equation(lambda x: jnp.sqrt(x), shaped(5))
    with SETTINGS[setting]():
        before = removed_values(eqn, [(c,)], known)[0]
        assert np.isnan(removed_values(root, [(-c,)])[0])
    np.testing.assert_allclose(before, np.tanh(c), rtol=1e-6)


def test_scalars_are_computed_while_tracing():
    eqn, known = equation(lambda x: jnp.tanh(x), shaped(5))
    found = []

    def traced(x):
        found.append(removed_values(eqn, [(0.4375 + len(found),)], known)[0][0])
        return x

    jax.jit(jax.grad(traced))(1.0)
    jax.vmap(traced)(np.ones(3))
    mesh = mesh_of("auto")
    spec = jax.P("d")
    jax.jit(jax.shard_map(traced, mesh=mesh, in_specs=spec, out_specs=spec))(np.ones(4))
    np.testing.assert_allclose(found, np.tanh([0.4375, 1.4375, 2.4375]), rtol=1e-6)


def test_numbers_keep_their_sign():
    """1 / 0 and 1 / -0 are two, whichever was computed first."""
    eqn, _ = equation(lambda x, y: x / y, shaped(5), shaped(5))
    assert removed_values(eqn, [(1.0,), (0.0,)]) == [(np.inf,)]
    assert removed_values(eqn, [(1.0,), (-0.0,)]) == [(-np.inf,)]
