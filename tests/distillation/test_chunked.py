"""The chunked loss against NumPy float64 on whole logits, `kd_loss`, and autodiff of plain JAX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxcompress.distillation import chunked_kd_loss, kd_loss
from tests.conftest import counting_jit, mesh_of

TOKENS, CLASSES = 7, 11
# (reverse, mixture): forward, reverse, Jensen-Shannon of 0.7, skewed, skewed reverse, nothing.
NUMBERS = [(0.0, 0.0), (1.0, 1.0), (0.3, 0.7), (0.0, 0.1), (1.0, 0.9), (1.0, 0.0), (0.0, 1.0)]
CHUNKS = [(3, 4), (16, None), (1, 16)]


def some_arrays(seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    shapes = [(TOKENS, 3), (3, CLASSES), (TOKENS, 4), (4, CLASSES)]
    return [scale * rng.normal(size=shape) for shape in shapes]


def oracle(student, teacher, temperature, reverse=0.0, mixture=0.0):
    """One token in float64, class by class, from its two rows of logits."""
    p, q = (np.exp(z / temperature - np.max(z / temperature)) for z in (teacher, student))
    p, q = p / p.sum(), q / q.sum()
    to_p = to_q = 0.0
    for pc, qc in zip(p, q, strict=True):
        m = mixture * pc + (1 - mixture) * qc
        if pc > 0 and reverse < 1:
            to_p += pc * np.log(pc / m)
        if qc > 0 and reverse > 0:
            to_q += qc * np.log(qc / m)
    return temperature**2 * ((1 - reverse) * to_p + reverse * to_q)


def plain(h, w, g, u, temperature, reverse, mixture):
    """The same from whole logits in plain JAX, to be differentiated."""
    s, t = h @ w / temperature, g @ u / temperature
    log_q, log_p = jax.nn.log_softmax(s), jax.nn.log_softmax(t)
    log_m = jnp.logaddexp(log_p + np.log(mixture), log_q + np.log(1 - mixture))
    to_p = jnp.sum(jnp.exp(log_p) * (log_p - log_m), -1)
    to_q = jnp.sum(jnp.exp(log_q) * (log_q - log_m), -1)
    return temperature**2 * ((1 - reverse) * to_p + reverse * to_q)


@functools.cache
def compiled(chunks, mode="numbers", grads=False):
    def loss(h, w, g, u, temperature, numbers=(None, None), **rest):
        names = dict(zip(("reverse", "mixture"), numbers, strict=True))
        sizes = dict(zip(("token_chunk", "class_chunk"), chunks, strict=True))
        return chunked_kd_loss(h, w, g, u, temperature, **sizes, **names, **rest)

    if not grads:
        return jax.jit(loss)
    # Tokens weigh differently, so that a gradient mixed up among them is seen.
    weigh = lambda x: jnp.sum(x * jnp.arange(1, x.size + 1, dtype=x.dtype).reshape(x.shape))  # noqa: E731
    return jax.jit(jax.value_and_grad(lambda *a, **k: weigh(loss(*a, **k)), (0, 1)))


@pytest.mark.parametrize("chunks", CHUNKS)
def test_equals_the_sum_over_whole_logits(chunks):
    h, w, g, u = some_arrays()
    rows = list(zip(h @ w, g @ u, strict=True))
    with jax.enable_x64(True):
        arrays = [jnp.asarray(x) for x in (h, w, g, u)]
        for temperature in (0.5, 3.0):
            got = compiled(chunks)(*arrays, temperature)
            assert got.dtype == jnp.float64
            expected = [oracle(s, t, temperature) for s, t in rows]
            np.testing.assert_allclose(got, expected, rtol=1e-6)
            theirs = jax.jit(whole)(*arrays, temperature)
            np.testing.assert_allclose(got, theirs, rtol=1e-9)
            for numbers in NUMBERS:
                got = compiled(chunks)(*arrays, temperature, numbers)
                expected = [oracle(s, t, temperature, *numbers) for s, t in rows]
                np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-12)
    got = compiled(chunks)(*map(jnp.float32, (h, w, g, u)), 3.0)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, [oracle(s, t, 3.0) for s, t in rows], rtol=1e-5)


@functools.cache
def gradients_of(loss, *numbers):
    """Of whole logits, the tokens weighed as in `compiled`."""

    def f(h, w, g, u):
        rows = loss(h, w, g, u, 2.0, *numbers)
        return jnp.sum(rows * jnp.arange(1, TOKENS + 1, dtype=rows.dtype))

    return jax.jit(jax.grad(f, (0, 1)))


def whole(h, w, g, u, temperature):
    return kd_loss(h @ w, g @ u, temperature)


@pytest.mark.parametrize("chunks", CHUNKS[:2])
def test_gradients_are_those_of_whole_logits(chunks):
    arrays = some_arrays()
    gradient = compiled(chunks, grads=True)
    with jax.enable_x64(True):
        exact = [jnp.asarray(x) for x in arrays]
        for a, b in zip(gradient(*exact, 2.0)[1], gradients_of(whole)(*exact), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-12)
        # The ends in plain JAX are 0 * inf: near them the derivative is that of the ends.
        for at, near in [
            ((0.3, 0.7), (0.3, 0.7)),
            ((0.0, 0.0), (0.0, 1e-9)),
            ((1.0, 1.0), (1.0, 1 - 1e-9)),
        ]:
            got, expected = gradient(*exact, 2.0, at)[1], gradients_of(plain, *near)(*exact)
            for a, b in zip(got, expected, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    narrow = [jnp.float32(x) for x in arrays]
    for a, b in zip(gradient(*narrow, 2.0)[1], gradients_of(whole)(*narrow), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("transposed", [True, (True, False), (False, True)])
def test_embeddings_are_heads_too(transposed):
    arrays = [jnp.float32(x) for x in some_arrays()]
    flags = transposed if isinstance(transposed, tuple) else (transposed, transposed)
    turned = list(arrays)
    for i, flag in zip((1, 3), flags, strict=True):
        turned[i] = arrays[i].T if flag else arrays[i]
    weights = jnp.arange(1.0, TOKENS + 1)

    @jax.jit
    def both(h, w, g, u):
        f = lambda h, w: jnp.sum(  # noqa: E731
            weights
            * chunked_kd_loss(h, w, g, u, 2.0, token_chunk=3, class_chunk=4, transposed=transposed)
        )
        return jax.value_and_grad(f, (0, 1))(h, w)

    value, (dh, dw) = both(*turned)
    expected, (eh, ew) = compiled((3, 4), grads=True)(*arrays, 2.0)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(dh, eh, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dw.T if flags[0] else dw, ew, rtol=1e-4, atol=1e-5)


def test_biases_and_classes_left_away():
    h, w, g, u = some_arrays()
    rng = np.random.default_rng(5)
    there = np.array([True] * 8 + [False] * 3)
    a, b = (np.where(there, rng.normal(size=CLASSES), -np.inf) for _ in range(2))
    rows = zip((h @ w + a)[:, :8], (g @ u + b)[:, :8], strict=True)
    expected = [oracle(s, t, 2.0, 0.3, 0.7) for s, t in rows]

    def loss(h, w, a):
        sizes = {"token_chunk": 3, "class_chunk": 4, "reverse": 0.3, "mixture": 0.7}
        biases = {"student_bias": a, "teacher_bias": jnp.float32(b)}
        return chunked_kd_loss(h, w, jnp.float32(g), jnp.float32(u), 2.0, **sizes, **biases)

    def whole(h, w, a):
        t = jnp.float32(g @ u + b)[:, :8]
        s = (h @ w + a[None])[:, :8]
        eye = jnp.eye(8, dtype=jnp.float32)
        return plain(s, eye, t, eye, 2.0, 0.3, 0.7)

    args = jnp.float32(h), jnp.float32(w), jnp.float32(a)
    np.testing.assert_allclose(jax.jit(loss)(*args), expected, rtol=1e-5)
    total = lambda f: jax.jit(jax.grad(lambda *x: jnp.sum(f(*x)), (0, 1, 2)))  # noqa: E731
    for got, want in zip(total(loss)(*args), total(whole)(*args), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_arrays_are_summed_in_float32(dtype):
    arrays = [jnp.asarray(x, dtype) for x in some_arrays()]
    value, grads = compiled((3, 4), grads=True)(*arrays, 2.0)
    wide = [jnp.float32(x) for x in arrays]
    expected, slopes = compiled((3, 4), grads=True)(*wide, 2.0)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for grad, slope in zip(grads, slopes, strict=True):
        assert grad.dtype == dtype
        np.testing.assert_allclose(jnp.float32(grad), slope, rtol=1e-2, atol=1e-2)
    mixed = compiled((3, 4))(arrays[0], wide[1], wide[2], arrays[3], 2.0)
    np.testing.assert_allclose(mixed, compiled((3, 4))(*wide, 2.0), rtol=1e-5)


def test_numbers_are_traced_and_mapped():
    arrays = [jnp.float32(x) for x in some_arrays()]
    f = counting_jit(
        lambda T, r, m: chunked_kd_loss(
            *arrays, T, reverse=r, mixture=m, token_chunk=3, class_chunk=4
        )
    )
    T, r, m = jnp.array([0.5, 1.0, 4.0]), jnp.array([0.0, 0.5, 1.0]), jnp.array([1.0, 0.2, 0.0])
    expected = np.stack([f(*numbers) for numbers in zip(T, r, m, strict=True)])
    assert f.traces == 1
    mapped = jax.jit(jax.vmap(f))(T, r, m)
    np.testing.assert_allclose(mapped, expected, rtol=1e-5, atol=1e-7)

    def gradient(T):
        return jax.grad(
            lambda h: chunked_kd_loss(h, *arrays[1:], T, token_chunk=3, class_chunk=4).sum()
        )(arrays[0])

    together, one = jax.jit(jax.vmap(gradient))(T), jax.jit(gradient)
    for i in range(3):
        np.testing.assert_allclose(together[i], one(T[i]), rtol=1e-4, atol=1e-6)


def test_one_temperature_per_token_and_leading_axes():
    h, w, g, u = (jnp.float32(x) for x in some_arrays())
    h, g = jnp.stack([h, h + 1]), jnp.stack([g, g - 1])
    T = jnp.linspace(0.5, 4.0, 14).reshape(2, TOKENS)
    got = compiled((3, 4))(h, w, g, u, T)
    assert got.shape == (2, TOKENS)
    np.testing.assert_allclose(got, jax.jit(whole)(h, w, g, u, T), rtol=1e-4)


def test_masked_tokens_are_not_read():
    h, w, g, u = (jnp.float32(x) for x in some_arrays())
    # With biases the loss of a token of zeros is not zero.
    biases = jnp.float32(np.random.default_rng(5).normal(size=(2, CLASSES)))
    rest = {"student_bias": biases[0], "teacher_bias": biases[1]}
    mask = np.arange(TOKENS) % 3 != 1
    keep = jnp.asarray(mask)
    bad = np.where(mask[:, None], np.float32(0), np.float32(np.nan))

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def expected(h, w):
        s, t = h @ w + biases[:1], g @ u + biases[1:]
        rows = jnp.where(keep, kd_loss(s, t, 2.0), 0.0)
        return jnp.sum(rows * jnp.arange(1.0, TOKENS + 1)), rows

    (_, rows), (eh, ew) = expected(h, w)
    value = compiled((3, 4))(h + bad, w, g + bad, u, 2.0, where=keep, **rest)
    np.testing.assert_allclose(value, rows, rtol=1e-5)
    gradient = compiled((3, 4), grads=True)
    _, (dh, dw) = gradient(h + bad, w, g + bad, u, 2.0, where=keep, **rest)
    assert (dh[~mask] == 0).all()
    np.testing.assert_allclose(dh, eh, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dw, ew, rtol=1e-4, atol=1e-5)
    nothing = jnp.zeros(TOKENS, bool)
    value, grads = gradient(h + bad, w, g + bad, u, 2.0, where=nothing, **rest)
    assert value == 0
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1e2])
@pytest.mark.parametrize("numbers", [(None, None), *NUMBERS])
def test_values_and_gradients_are_finite(scale, numbers):
    h, w, g, u = (jnp.float32(x) for x in some_arrays(scale=scale))
    for temperature in (0.1, 1.0, 1e3):
        value, grads = compiled((3, 4), grads=True)(h, w, g, u, temperature, numbers)
        assert np.isfinite(value)
        assert value >= 0
        assert all(np.isfinite(grad).all() for grad in grads)
    if numbers in ((1.0, 0.0), (0.0, 1.0)):
        assert value < 1e-12  # the divergence of a distribution from itself


def test_the_ends_are_continuous():
    arrays = [jnp.float32(x) for x in some_arrays(scale=0.5)]
    for end, near in (((0.0, 0.0), (0.0, 1e-7)), ((1.0, 1.0), (1.0, 1 - 1e-7))):
        a, b = (compiled((3, 4), grads=True)(*arrays, 1.0, x) for x in (end, near))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-3)


def test_infinite_where_one_rules_a_class_out():
    h, w, g, u = (jnp.float32(x) for x in some_arrays())
    bias = jnp.where(jnp.arange(CLASSES) == 2, -jnp.inf, 0.0)
    for numbers, side, finite in [
        ((0.0, 0.0), "student_bias", False),
        ((0.0, 0.1), "student_bias", True),
        ((1.0, 1.0), "student_bias", True),
        ((1.0, 1.0), "teacher_bias", False),
        ((0.3, 0.7), "teacher_bias", True),
        ((0.0, 0.0), "teacher_bias", True),
    ]:
        value, grads = compiled((3, 4), grads=True)(h, w, g, u, 1.0, numbers, **{side: bias})
        assert np.isfinite(value) == finite
        assert all(np.isfinite(grad).all() for grad in grads)
        if finite:
            s, t = (np.float64(x) for x in (h @ w, g @ u))
            s, t = (
                x + np.asarray(bias) * (side == who) if side == who else x
                for x, who in ((s, "student_bias"), (t, "teacher_bias"))
            )
            rows = enumerate(zip(s, t, strict=True))
            expected = sum((i + 1) * oracle(a, b, 1.0, *numbers) for i, (a, b) in rows)
            np.testing.assert_allclose(value, expected, rtol=1e-4)


def test_tokens_without_classes_cost_nothing():
    arrays = [jnp.float32(x) for x in some_arrays()]
    nothing = jnp.full(CLASSES, -jnp.inf)
    for numbers in ((None, None), (0.3, 0.7)):
        value, grads = compiled((3, 4), grads=True)(
            *arrays, 1.0, numbers, student_bias=nothing, teacher_bias=nothing
        )
        assert value == 0
        assert all((grad == 0).all() for grad in grads)


def test_the_teacher_and_the_numbers_get_no_gradient():
    arrays = [jnp.float32(x) for x in some_arrays()]

    def f(g, u, T, r):
        return chunked_kd_loss(*arrays[:2], g, u, T, reverse=r, mixture=0.5).sum()

    grads = jax.jit(jax.grad(f, (0, 1, 2, 3)))(*arrays[2:], 2.0, 0.5)
    assert all((grad == 0).all() for grad in grads)


def test_nan_is_not_hidden():
    h, w, g, u = (jnp.float32(x) for x in some_arrays())
    for numbers in ((None, None), (0.3, 0.7)):
        for args in ((h.at[2].set(jnp.nan), w, g, u), (h, w, g.at[2].set(jnp.nan), u)):
            got = compiled((3, 4))(*args, 1.0, numbers)
            np.testing.assert_array_equal(jnp.isnan(got), jnp.arange(TOKENS) == 2)


def test_nothing_is_the_size_of_the_logits():
    shapes = [(512, 16), (16, 4096), (512, 16), (16, 4096)]
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    loss = lambda *a: jnp.mean(chunked_kd_loss(*a, token_chunk=64, class_chunk=512))  # noqa: E731
    lowered = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*args)
    assert lowered.compile().memory_analysis().temp_size_in_bytes < 512 * 4096 * 4 / 4


@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize("split", ["tokens", "classes"])
def test_sharded_over_tokens_or_classes(kind, split):
    mesh = mesh_of(kind)
    rng = np.random.default_rng(0)
    shapes = [(2, 8, 3), (3, 12), (2, 8, 4), (4, 12)]
    arrays = [jnp.float32(rng.normal(size=shape)) for shape in shapes]
    width = 5 if split == "tokens" else None

    def both(*a):
        f = lambda h, w, g, u: chunked_kd_loss(h, w, g, u, 2.0, token_chunk=4, class_chunk=width)  # noqa: E731
        return f(*a), jax.grad(lambda *a: f(*a).sum(), (0, 1))(*a)

    expected = jax.jit(both)(*arrays)
    tokens, classes = PartitionSpec(None, "d"), PartitionSpec(None, "d")
    specs = (tokens, PartitionSpec()) if split == "tokens" else (PartitionSpec(), classes)
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(x, NamedSharding(mesh, spec))
            for x, spec in zip(arrays, specs * 2, strict=True)
        ]
        got = jax.jit(both)(*placed)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_nothing_to_sum():
    f = chunked_kd_loss
    assert f(jnp.zeros((0, 3)), jnp.zeros((3, 5)), jnp.zeros((0, 3)), jnp.zeros((3, 5))).shape == (
        0,
    )
    got = f(jnp.zeros((2, 3)), jnp.zeros((3, 0)), jnp.zeros((2, 3)), jnp.zeros((3, 0)))
    np.testing.assert_array_equal(got, [0.0, 0.0])
    one = f(jnp.ones((2, 3)), jnp.ones((3, 1)), jnp.ones((2, 3)), jnp.zeros((3, 1)))
    np.testing.assert_array_equal(one, [0.0, 0.0])


def test_errors_name_the_argument():
    h, w, g, u = (jnp.float32(x) for x in some_arrays())
    f = chunked_kd_loss
    with pytest.raises(TypeError, match=r"chunked_kd_loss: `teacher_head` must be a real.*int32"):
        f(h, w, g, jnp.zeros((4, CLASSES), int))
    with pytest.raises(ValueError, match=r"`student_head` must have .*\[3, classes\].*=True"):
        f(h, w.T, g, u)
    with pytest.raises(ValueError, match=r"`teacher_head` must have .*\[classes, 4\].*=False"):
        f(h, w, g, u, transposed=(False, True))
    with pytest.raises(ValueError, match=r"`teacher_head` must have the student's 11 classes"):
        f(h, w, g, u[:, :5])
    with pytest.raises(ValueError, match=r"`teacher_hidden` must have the student's leading axes"):
        f(h, w, g[:2], u)
    with pytest.raises(ValueError, match=r"`student_bias` must have the shape \[11\]"):
        f(h, w, g, u, student_bias=jnp.zeros(3))
    with pytest.raises(ValueError, match="`student_hidden` must have a last axis"):
        f(jnp.zeros(()), w, g, u)
    with pytest.raises(ValueError, match="`temperature` must be a real number above 0"):
        f(h, w, g, u, 0.0)
    with pytest.raises(ValueError, match=r"`mixture` must be a real number in \[0.0, 1.0\]"):
        f(h, w, g, u, mixture=1.5)
    with pytest.raises(TypeError, match="`reverse` must be a real number"):
        f(h, w, g, u, reverse="yes")
    with pytest.raises(ValueError, match="`token_chunk` must be a static integer of at least 1"):
        f(h, w, g, u, token_chunk=0)
    with pytest.raises(TypeError, match="`class_chunk` must be a static integer"):
        f(h, w, g, u, class_chunk=2.0)
    with pytest.raises(TypeError, match="`where` must be booleans"):
        f(h, w, g, u, where=jnp.ones(TOKENS))
    with pytest.raises(ValueError, match="`where` must broadcast"):
        f(h, w, g, u, where=jnp.ones(3, bool))


@pytest.mark.parametrize("bad", [0.0, -3.0, np.nan])
def test_a_traced_number_out_of_its_range_is_not_hidden(bad):
    hidden, head = jnp.ones((3, 2)), jnp.array([[1.0, 0.0], [0.0, 2.0]])
    both = lambda t: chunked_kd_loss(hidden, head, hidden[::-1] * 2, head, t, token_chunk=2)  # noqa: E731
    found = jax.jit(both)(jnp.array([1.0, bad, 2.0]))
    np.testing.assert_array_equal(np.isnan(found), [False, True, False])
    mixed = lambda share: chunked_kd_loss(hidden, head, hidden, head, reverse=share)  # noqa: E731
    assert np.isnan(jax.jit(mixed)(1.5)).all()
