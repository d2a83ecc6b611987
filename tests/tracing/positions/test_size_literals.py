"""Numbers that come from sizes, against the same function traced at the smaller sizes."""

import functools

import flax.linen as nn
import jax
import jax.extend.core as jec
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxcompress.tracing._jaxprs import bodies
from jaxcompress.tracing.positions._removed import uniform_values
from jaxcompress.tracing.positions._size_literals import (
    NOTHING,
    Carried,
    Extent,
    attach,
    size_literal,
)


class Compared:
    """Reads a function at two sizes at once.

    `found` has (name, old, new, told, dtype) of each number: `old` and `new` stand in the two
    programs; `told` is what `size_literal` says by the first and the shapes of the second.
    """

    def __init__(self, fn, old, new):
        self.found = []
        # What stands in both programs, by their dtypes: a size is a size in any of them.
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            a, b = (jax.make_jaxpr(fn)(*args) for args in (old, new))
        carried = [NOTHING] * len(a.jaxpr.invars)
        unknown = [None] * len(carried)
        self._run(a.jaxpr, b.jaxpr, carried, unknown, unknown)

    def _run(self, old, new, carried, known_old, known_new):
        env = {v: (NOTHING, None) for v in old.constvars}
        env |= dict(zip(old.invars, zip(carried, known_old, strict=True), strict=True))
        env_new = dict(zip(new.invars, known_new, strict=True))

        def number(v):
            return v.val if np.ndim(v.val) == 0 else None

        def read(v):
            return (NOTHING, number(v)) if isinstance(v, jec.Literal) else env[v]

        def read_new(v):
            return number(v) if isinstance(v, jec.Literal) else env_new.get(v)

        assert [e.primitive for e in old.eqns] == [e.primitive for e in new.eqns]
        for eqn, small in zip(old.eqns, new.eqns, strict=True):
            ins, known = zip(*map(read, eqn.invars), strict=True) if eqn.invars else ((), ())
            now = [read_new(v) for v in small.invars]
            shapes = [v.aval.shape for v in small.invars]
            inner = bodies(eqn)
            if inner:
                (body,), (other,) = inner, bodies(small)
                places = body.inputs
                outs, numbers, numbers_new = self._run(
                    body.jaxpr,
                    other.jaxpr,
                    *([given[i] for i in places] for given in (ins, known, now)),
                )
            else:
                outs = attach(eqn, ins, shapes)
                numbers, numbers_new = uniform_values(eqn, known), uniform_values(small, now)
                told = size_literal(eqn, known, ins, shapes)
                self._meet(eqn, known, now, told)
            for v, w, *rest in zip(
                eqn.outvars, small.outvars, outs, numbers, numbers_new, strict=True
            ):
                env[v], env_new[w] = tuple(rest[:2]), rest[2]
        pairs = [read(v) for v in old.outvars]
        return [p[0] for p in pairs], [p[1] for p in pairs], [read_new(v) for v in new.outvars]

    def _meet(self, eqn, known, now, told):
        for i, (a, b) in enumerate(zip(known, now, strict=True)):
            if a is not None and None in (known[1 - i] if len(known) == 2 else 0,):
                mine = told if told is not None and told.operand == i else None
                dtype = eqn.invars[i].aval.dtype
                self.found.append((eqn.primitive.name, float(a), float(b), mine, dtype))

    @property
    def changed(self):
        """The numbers that differ in the smaller program, and what was told of them."""
        return [(a, told) for _, a, b, told, _ in self.found if a != b]

    def check(self, count):
        """All numbers that change, and no others, are told, and right."""
        assert len(self.changed) == count
        for name, a, b, told, dtype in self.found:
            if a == b:
                assert told is None, (name, a, told)
            else:
                assert told is not None, (name, a, b)
                assert told.value is not None, told
                # A root may be computed in its dtype, or by NumPy in float64.
                assert abs(float(np.asarray(told.value, dtype)) - b) <= eps(dtype) * abs(b)


def eps(dtype):
    return float(jnp.finfo(dtype).eps) if jnp.issubdtype(dtype, jnp.inexact) else 0.0


def shaped(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def of(fn, *shapes, dtype=jnp.float32):
    """`shapes` are pairs; (old, new) stands for a changed extent."""

    def sized(k):
        return [
            shaped(*(n[k] if isinstance(n, tuple) else n for n in shape), dtype=dtype)
            for shape in shapes
        ]

    return Compared(fn, sized(0), sized(1))


N, D, H = (12, 7), (8, 5), (6, 3)
STATISTICS = {
    "mean": (lambda x: x.mean(-1), 1),
    "mean of all": (lambda x: x.mean(), 1),
    "mean of two": (lambda x: x.mean((1, 2)), 1),
    "mean of means": (lambda x: x.sum(2).sum(1) / np.float32(x.shape[1] * x.shape[2]), 1),
    "mean after mean": (lambda x: x.mean(2).mean(1), 1),
    "kept axes": (lambda x: x - x.mean(-1, keepdims=True), 1),
    "by a factor": (lambda x: x.sum(-1) * np.float32(1 / x.shape[-1]), 1),
    "var": (lambda x: x.var(-1), 2),
    "var n - 1": (lambda x: x.var(-1, ddof=1), 2),
    "var n - 1 of two": (lambda x: x.var((1, 2), ddof=1), 2),
    "std": (lambda x: x.std(-1, ddof=1), 2),
    "by a factor n - 1": (lambda x: (x * x).sum(-1) * np.float32(1 / (x.shape[-1] - 1)), 1),
    "from the left": (lambda x: np.float32(1 / x.shape[-1]) * x.sum(-1), 1),
    "barrier": (lambda x: lax.optimization_barrier((x, x.sum(-1)))[1] / x.shape[-1], 1),
    "root": (lambda x: jnp.linalg.norm(x, axis=-1) / np.sqrt(x.shape[-1]), 0),
    "standardize": (jax.nn.standardize, 2),
    "negative": (lambda x: -x.sum(-1) / np.float32(x.shape[-1]), 1),
    "other axis": (lambda x: x.mean(0).sum() + x.mean(1).sum(), 0),
    "integers": (lambda x: x.astype(int).sum(-1) // 1 + x.astype(int).max(-1), 0),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", STATISTICS)
def test_statistics(name, dtype):
    fn, count = STATISTICS[name]
    compared = of(fn, (2, 3, N), dtype=dtype)
    if name == "root":
        # The root in between: of a norm nothing is said.
        assert all(told is None for *_, told, _ in compared.found)
        return
    compared.check(count)


def norm_of(module, x_old, x_new):
    apply = lambda p, x: module.apply(p, x)  # noqa: E731
    with jax.numpy_dtype_promotion("standard"):
        args = [(jax.eval_shape(module.init, jax.random.key(0), x), x) for x in (x_old, x_new)]
    return Compared(apply, *args)


NORMS = {
    "LayerNorm": (nn.LayerNorm(), 2),
    "LayerNorm in two passes": (nn.LayerNorm(use_fast_variance=False), 2),
    "LayerNorm bfloat16": (nn.LayerNorm(dtype=jnp.bfloat16), 2),
    "RMSNorm": (nn.RMSNorm(), 1),
    "GroupNorm": (nn.GroupNorm(2), 2),
    "InstanceNorm": (nn.InstanceNorm(), 0),
    # Its statistics are over images and places: these sizes stay.
    "BatchNorm": (nn.BatchNorm(use_running_average=True), 0),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms(name):
    module, count = NORMS[name]
    sizes = (12, 8)
    norm_of(module, *(shaped(2, 4, 4, n) for n in sizes)).check(count)


def test_norms_of_weights():
    """Convolutions with standardized kernels."""

    def fn(w, x):
        w = w - w.mean((0, 1, 2))
        w = w / jnp.sqrt(w.var((0, 1, 2)) + 1e-5)
        return lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    of(fn, (3, 3, D, 4), (2, 5, 5, D)).check(3)


def heads(fn, bias=True):
    def attend(w, b, x):
        q, k = (jnp.einsum("btd,dhf->bthf", x, w[i]) for i in range(2))
        if bias:
            q, k = q + b[0], k + b[1]
        return jax.nn.softmax(fn(q, k))

    return attend


def rotate(x):
    half = x.shape[-1] // 2
    angle = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None, None] * jnp.ones(half)
    a, b = x[..., :half], x[..., half:]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


def scores(q, k):
    return jnp.einsum("bqhd,bkhd->bhqk", q, k)


ATTENTION = {
    "scores / sqrt": lambda q, k: scores(q, k) / jnp.sqrt(q.shape[-1]),
    "scores / np.sqrt": lambda q, k: scores(q, k) / np.sqrt(q.shape[-1]).astype(np.float32),
    "scores * -0.5": lambda q, k: scores(q, k) * q.shape[-1] ** -0.5,
    "q * -0.5": lambda q, k: scores(q * q.shape[-1] ** -0.5, k),
    "q / sqrt": lambda q, k: scores(q / jnp.sqrt(q.shape[-1]).astype(q.dtype), k),
    "both": lambda q, k: scores(q * q.shape[-1] ** -0.25, k * k.shape[-1] ** -0.25),
    "both / ": lambda q, k: scores(q / q.shape[-1] ** 0.25, k / k.shape[-1] ** 0.25),
    "normed": lambda q, k: scores(q / jnp.abs(q).max(-1, keepdims=True) * q.shape[-1] ** -0.5, k),
    "masked q": lambda q, k: scores(
        jnp.where(jnp.arange(4)[:, None, None] > 1, q, 0) * q.shape[-1] ** -0.5, k
    ),
    "bhdt": lambda q, k: q.transpose(0, 2, 3, 1) * q.shape[-1] ** -0.5 + k.transpose(0, 2, 3, 1),
    "bhtd": lambda q, k: jnp.swapaxes(q * q.shape[-1] ** -0.5, 1, 2) @ k.transpose(0, 2, 3, 1),
    "rotated": lambda q, k: scores(rotate(q) * q.shape[-1] ** -0.5, rotate(k)),
    "rotated / sqrt": lambda q, k: scores(rotate(q), rotate(k)) / jnp.sqrt(q.shape[-1]),
    "masked": lambda q, k: jnp.where(
        jnp.tril(jnp.ones((4, 4), bool)), scores(q, k) / np.float32(q.shape[-1] ** 0.5), -jnp.inf
    ),
    "jax.nn": lambda q, k: jax.nn.dot_product_attention(q, k, k),
    "jax.nn causal": lambda q, k: jax.nn.dot_product_attention(q, k, k, is_causal=True),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name, dtype):
    # 8 heads of 12 from 16 features, in 4 places; then 6 heads of 6.
    shapes = (2, 16, (8, 6), (12, 6)), (2, (8, 6), (12, 6)), (3, 4, 16)
    count = 2 if name.startswith("both") else 1
    of(heads(ATTENTION[name]), *shapes, dtype=dtype).check(count)


@pytest.mark.parametrize("name", ["scores / sqrt", "q * -0.5", "q / sqrt", "jax.nn"])
def test_attention_where_sizes_are_alike(name):
    """Heads, places and features of a head: 8 of each, and 4 where they may be less."""
    fn = heads(ATTENTION[name])
    of(fn, (2, 16, 8, (8, 5)), (2, 8, (8, 5)), (3, 8, 16)).check(1)
    # The heads are fewer, their features are not: 1/sqrt(8) stays, told or not.
    compared = of(fn, (2, 16, (8, 4), 8), (2, (8, 4), 8), (3, 8, 16))
    assert not compared.changed
    told = [told for *_, told, _ in compared.found if told is not None]
    assert len(told) == name.startswith("q")
    assert all(one.value is None for one in told)
    # Both, by as much.
    of(fn, (2, 16, (8, 4), (8, 4)), (2, (8, 4), (8, 4)), (3, 8, 16)).check(1)


def test_sizes_that_cannot_be_told_apart_are_reported():
    """Without a bias, features into a head are summed as many as there are features of it."""
    fn = heads(ATTENTION["q * -0.5"], bias=False)
    compared = of(fn, (2, 8, 2, (8, 5)), (2, 2, (8, 5)), (3, 4, 8))
    ((_, told),) = compared.changed
    assert told.value is None
    assert "8 (now 8), 8 (now 5)" in told.why
    assert "0.353553" in told.why


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_flax_attention(use_bias, dtype):
    def sized(qkv):
        module = nn.MultiHeadDotProductAttention(
            2, qkv_features=qkv, out_features=8, use_bias=use_bias, dtype=dtype
        )
        x = shaped(2, 3, 8, dtype=dtype)
        return module, (jax.eval_shape(module.init, jax.random.key(0), x, x), x)

    (module, old), (other, new) = sized(20), sized(14)

    def fn(params, x):
        # A module knows its sizes: that which fits.
        wide = params["params"]["query"]["kernel"].shape[-1] == 10
        return (module if wide else other).apply(params, x, x)

    Compared(fn, old, new).check(1)


def test_tables():
    def fn(table, ids):
        return jnp.take(table, ids, axis=0) * np.float32(table.shape[1] ** 0.5)

    old, new = ((shaped(9, n), shaped(2, 3, dtype=jnp.int32)) for n in (12, 7))
    Compared(fn, old, new).check(1)


def test_products_by_how_many_are_summed():
    of(lambda x, w: x @ w / np.float32(x.shape[-1] ** 0.5), (3, D), (D, 4)).check(1)
    # A number that is as large as the width by chance stays.
    of(lambda x, w: x @ w / np.float32(D[0]), (3, D), (D, 4)).check(0)

    def conv(x, w):
        y = lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return y * np.float32(np.prod(w.shape[:3]) ** -0.5)

    of(conv, (2, 5, 5, D), (3, 3, D, 4)).check(1)


def mlp(activation):
    def fn(w, v, x):
        return activation(x @ w) @ v

    return fn


ACTIVATIONS = {
    name: getattr(jax.nn, name)
    for name in "relu relu6 gelu silu elu selu celu mish hard_swish hard_sigmoid".split()
}
ACTIVATIONS["gelu erf"] = functools.partial(jax.nn.gelu, approximate=False)
ACTIVATIONS["half"] = lambda x: 0.5 * x
ACTIVATIONS["mean of two"] = lambda x: (x + jnp.square(x)) * 0.5
ACTIVATIONS["sixth"] = lambda x: x / 6 + jax.nn.relu(x + 3) / 6


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("size", [(2, 1), (4, 2), (6, 3)])
def test_numbers_of_activations_are_no_sizes(name, size):
    compared = of(mlp(ACTIVATIONS[name]), (7, size), (size, 5), (3, 7))
    assert compared.found or name in ("relu", "silu", "elu", "mish")
    compared.check(0)


def test_what_is_added_or_bent_in_between_is_no_sum():
    for fn in (
        lambda x: (x.sum(-1) + 1) / 12,
        lambda x: jnp.exp(x.sum(-1)) / 12,
        lambda x: x.max(-1) / 12,
        lambda x: jnp.cumsum(x, -1) / 12,
        lambda x: x / 12,
        lambda x: 12 / x.sum(-1),
        lambda x: x.sum(-1) * 12,
        lambda x: x.sum(-1) / 13,
        lambda x: x.sum(-1) / 3 / 12,
    ):
        of(fn, (2, 3, N)).check(0)


def test_sums_of_sums():
    shape = (2, (6, 4), N)
    of(lambda x: x.sum(2).mean(1), shape).check(1)
    of(lambda x: x.sum(2).sum(1) / np.float32(x.shape[1] * x.shape[2]), shape).check(1)
    of(lambda x: x.mean(2).mean(1), shape).check(2)


def test_one_and_what_is_known_is_no_size():
    of(lambda x: x.sum(-1) / 1.0, (3, (2, 1))).check(0)
    eqn = jax.make_jaxpr(lambda x: x / 12)(shaped()).eqns[0]
    ins, shapes = [Carried((Extent(12, 7),)), NOTHING], [(), ()]
    assert size_literal(eqn, [None, 12.0], ins, shapes).value == 7
    assert size_literal(eqn, [24.0, 12.0], ins, shapes) is None


def test_the_nearest_form_is_taken():
    """In bfloat16 there is no 255 next to 257: of 256 it is 256, with n - 1 as near as n."""
    told = of(lambda x: x.sum(-1) / 256, (2, (256, 128)), dtype=jnp.bfloat16).found[-1][3]
    assert told.value == 128
    told = of(lambda x: x.sum(-1) / 255, (2, (256, 128)), dtype=jnp.bfloat16).found[-1][3]
    assert told.value == 127


def test_nothing_left_to_divide_by_is_reported():
    (*_, told, _) = of(lambda x: x.sum(-1) / 3, (2, (4, 1))).found[-1]
    assert told.value is None
    assert "nothing is left" in told.why
