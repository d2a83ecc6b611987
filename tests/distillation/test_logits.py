"""Losses on logits against NumPy float64 written from the papers, and Optax as a second peer."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcompress.distillation import kd_loss, kl_divergence, mse_logits, soft_cross_entropy
from tests.distillation import meshes, slopes

SOFTENED = [kd_loss, kl_divergence, soft_cross_entropy]
LOSSES = [*SOFTENED, mse_logits]
ids = {"ids": lambda loss: loss.__name__}


@functools.cache
def compiled(loss, numbers=None, **static):
    """The loss, or the sum of it and its gradients, compiled once per shape."""
    whole = functools.partial(loss, **static)
    if numbers is None:
        return jax.jit(lambda *args, **kwargs: whole(*args, **kwargs))
    return jax.jit(jax.value_and_grad(lambda *a, **k: jnp.sum(whole(*a, **k)), numbers))


def softmax(z):
    powers = np.exp(z - np.max(z))
    return powers / np.sum(powers)


def oracle(loss, student, teacher, temperature=1.0, keep=None, centred=False):
    """One row in float64, with the classes masked out simply left away."""
    student, teacher = np.asarray(student, np.float64), np.asarray(teacher, np.float64)
    if keep is not None:
        student, teacher = student[keep], teacher[keep]
    if student.size == 0:
        return 0.0
    if loss is mse_logits:
        if centred:
            student, teacher = student - student.mean(), teacher - teacher.mean()
        return np.mean((student - teacher) ** 2)
    q, p = softmax(student / temperature), softmax(teacher / temperature)
    if loss is soft_cross_entropy:
        return -np.sum(p * np.log(q))
    return np.sum(p * np.log(p / q)) * (temperature**2 if loss is kd_loss else 1.0)


def some_logits(shape, seed=0, scale=3.0):
    student, teacher = np.random.default_rng(seed).normal(size=(2, *shape)) * scale
    return student, teacher


@pytest.mark.parametrize("loss", SOFTENED, **ids)
@pytest.mark.parametrize("shape", [(4,), (5, 7), (2, 3, 10), (3, 1)])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_equals_the_papers(loss, shape, temperature):
    student, teacher = some_logits(shape)
    rows = zip(student.reshape(-1, shape[-1]), teacher.reshape(-1, shape[-1]), strict=True)
    expected = np.reshape([oracle(loss, s, t, temperature) for s, t in rows], shape[:-1])
    with jax.enable_x64(True):
        got = compiled(loss)(jnp.asarray(student), jnp.asarray(teacher), temperature)
        assert got.dtype == jnp.float64
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-12)
    got = compiled(loss)(jnp.float32(student), jnp.float32(teacher), temperature)
    assert got.dtype == jnp.float32
    assert got.shape == shape[:-1]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("centred", [False, True])
def test_mean_squared_difference_equals_the_paper(centred):
    student, teacher = some_logits((5, 7))
    rows = zip(student, teacher, strict=True)
    expected = [oracle(mse_logits, s, t, centred=centred) for s, t in rows]
    with jax.enable_x64(True):
        got = mse_logits(jnp.asarray(student), jnp.asarray(teacher), centred=centred)
        np.testing.assert_allclose(got, expected, rtol=1e-6)
    got = mse_logits(jnp.float32(student), jnp.float32(teacher), centred=centred)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_agrees_with_optax():
    student, teacher = map(jnp.float32, some_logits((6, 9)))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        theirs = optax.losses.kl_divergence(jax.nn.log_softmax(student), jax.nn.softmax(teacher))
        softer = optax.losses.softmax_cross_entropy(student, jax.nn.softmax(teacher))
    np.testing.assert_allclose(kl_divergence(student, teacher), theirs, rtol=1e-5)
    np.testing.assert_allclose(kd_loss(student, teacher), theirs, rtol=1e-5)
    np.testing.assert_allclose(soft_cross_entropy(student, teacher), softer, rtol=1e-5)


@pytest.mark.parametrize("loss", LOSSES, **ids)
@pytest.mark.parametrize("mask_shape", [(4, 6), (6,), (4, 1)])
def test_a_mask_leaves_classes_away(loss, mask_shape):
    student, teacher = some_logits((4, 6))
    where = np.random.default_rng(1).random(mask_shape) < 0.6
    whole = np.broadcast_to(where, (4, 6))
    rows = zip(student, teacher, whole, strict=True)
    expected = [oracle(loss, s, t, keep=k) for s, t, k in rows]
    # What is masked is not read: NaN and inf there change nothing, and get no gradient.
    noise = np.where(whole, 0.0, np.random.default_rng(2).choice([np.nan, np.inf, -np.inf, 7.0]))
    student, teacher = jnp.float32(student + noise), jnp.float32(teacher - noise)
    got = compiled(loss)(student, teacher, where=where)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    for grad in compiled(loss, (0, 1))(student, teacher, where=where)[1]:
        assert np.isfinite(grad).all()
        assert (grad[~whole] == 0).all()


@pytest.mark.parametrize("loss", LOSSES, **ids)
def test_minus_infinity_in_both_is_a_mask(loss):
    student, teacher = map(jnp.float32, some_logits((4, 6)))
    where = jnp.arange(6) != 2
    cut = lambda x: jnp.where(jnp.broadcast_to(where, x.shape), x, -jnp.inf)  # noqa: E731
    np.testing.assert_array_equal(
        compiled(loss)(cut(student), cut(teacher)), compiled(loss)(student, teacher, where=where)
    )


STRESS = {
    "large": ([1e4, -1e4, 0.0], [-1e4, 1e4, 5.0]),
    "large and alike": ([1e4, 1e4 - 1, 0.0], [1e4, 1e4 + 1, 0.0]),
    "identical": ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]),
    "identical and large": ([1e4, -1e4, 3.0], [1e4, -1e4, 3.0]),
    "all equal": ([2.0, 2.0, 2.0], [-5.0, -5.0, -5.0]),
    "masked vocabulary": ([1.0, -np.inf, 3.0], [2.0, -np.inf, 1.0]),
    "one left": ([1.0, -np.inf, -np.inf], [2.0, -np.inf, -np.inf]),
    "nothing left": ([-np.inf] * 3, [-np.inf] * 3),
    "nearly identical": ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0000002]),
    "one class": ([4.0], [-3.0]),
    "teacher certain": ([0.0, 1.0], [1e4, -np.inf]),
}


STRESSED = [
    *itertools.product(STRESS, SOFTENED, [0.1, 1.0, 1e3]),
    # The squared difference has no temperature, and is infinite in one case by its definition.
    *itertools.product(
        [case for case in STRESS if case != "teacher certain"], [mse_logits], [None]
    ),
]


@pytest.mark.parametrize(("case", "loss", "temperature"), STRESSED)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_values_and_gradients_are_finite(case, loss, dtype, temperature):
    arguments = [] if temperature is None else [jnp.float32(temperature)]
    numbers = tuple(range(2 + len(arguments)))
    student, teacher = (jnp.asarray(x, dtype) for x in STRESS[case])
    value, grads = compiled(loss, numbers)(student, teacher, *arguments)
    assert np.isfinite(value)
    assert value >= 0
    assert value.dtype == jnp.float32
    for grad, of in zip(grads, (student, teacher, jnp.float32(0)), strict=False):
        assert grad.dtype == of.dtype
        assert np.isfinite(np.float32(grad)).all()
    if case in ("one class", "nothing left", "all equal") and loss in (kd_loss, kl_divergence):
        np.testing.assert_allclose(value, 0.0, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES, **ids)
def test_rows_without_classes_cost_nothing(loss):
    student, teacher = map(jnp.float32, some_logits((2, 3)))
    where = jnp.array([[False, False, False], [True, True, False]])
    value = compiled(loss)(student, teacher, where=where)
    assert value[0] == 0
    assert value[1] > 0
    _, grad = compiled(loss, 0)(student, teacher, where=where)
    assert (grad[0] == 0).all()
    np.testing.assert_array_equal(compiled(loss)(jnp.zeros((2, 0)), jnp.zeros((2, 0))), [0.0, 0.0])
    assert jax.eval_shape(loss, jnp.zeros((0, 3)), jnp.zeros((0, 3))).shape == (0,)


@pytest.mark.parametrize("loss", LOSSES, **ids)
def test_what_the_student_rules_out_is_infinite_without_nan_gradients(loss):
    student, teacher = jnp.array([0.0, -jnp.inf, 1.0]), jnp.array([0.0, 0.0, 1.0])
    value, grads = compiled(loss, (0, 1))(student, teacher)
    assert value == jnp.inf
    for grad in grads:
        assert np.isfinite(grad).all()


@pytest.mark.parametrize("loss", SOFTENED, **ids)
def test_a_class_of_the_student_alone_takes_its_probability(loss):
    student, teacher = some_logits((4,), scale=1.0)
    p, q = softmax(teacher[:3]), softmax(student)
    expected = -np.sum(p * np.log(q[:3]))
    if loss is not soft_cross_entropy:
        expected += np.sum(p * np.log(p))
    teacher[3] = -np.inf
    value, grad = jax.value_and_grad(loss)(jnp.float32(student), jnp.float32(teacher))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(grad, q - np.append(p, 0.0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES, **ids)
def test_nan_is_not_hidden(loss):
    student = jnp.array([[0.0, jnp.nan], [1.0, 2.0]])
    np.testing.assert_array_equal(
        jnp.isnan(compiled(loss)(student, jnp.zeros((2, 2)))), [True, False]
    )


@pytest.mark.parametrize("loss", SOFTENED, **ids)
@pytest.mark.parametrize("argument", [0, 1, 2])
def test_gradients_equal_finite_differences(loss, argument):
    student, teacher = some_logits((4,), scale=1.0)
    with jax.enable_x64(True):
        args = [student, teacher, np.float64(2.0)]
        _, grad = compiled(loss, argument)(*map(jnp.asarray, args))
        expected = slopes.by_differences(functools.partial(oracle, loss), args, argument)
        np.testing.assert_allclose(grad, expected, rtol=1e-6, atol=1e-8)


def test_the_students_gradient_is_the_difference_of_probabilities():
    student, teacher = some_logits((5,))
    for temperature in (1.0, 3.0):
        _, grad = compiled(kd_loss, 0)(jnp.float32(student), jnp.float32(teacher), temperature)
        expected = temperature * (softmax(student / temperature) - softmax(teacher / temperature))
        np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-6)


logits = st.lists(st.floats(-30, 30, width=32), min_size=3, max_size=3)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(logits, logits, st.floats(0.25, 20))
def test_cross_entropy_less_entropy_is_the_divergence(student, teacher, temperature):
    student, teacher = jnp.float32(student), jnp.float32(teacher)
    kl = compiled(kl_divergence)(student, teacher, temperature)
    entropy = compiled(soft_cross_entropy)(teacher, teacher, temperature)
    cross = compiled(soft_cross_entropy)(student, teacher, temperature)
    np.testing.assert_allclose(cross - entropy, kl, rtol=1e-5, atol=1e-5)
    assert kl >= -1e-6


@settings(derandomize=True, deadline=None, max_examples=30)
@given(logits, logits, st.floats(-100, 100), st.floats(-100, 100))
def test_shifts_of_a_row_change_nothing(student, teacher, a, b):
    with jax.enable_x64(True):
        student, teacher = jnp.asarray(student, "float64"), jnp.asarray(teacher, "float64")
        for loss in SOFTENED:
            np.testing.assert_allclose(
                compiled(loss)(student + a, teacher + b),
                compiled(loss)(student, teacher),
                rtol=1e-8,
                atol=1e-10,
            )
        np.testing.assert_allclose(
            compiled(mse_logits, centred=True)(student + a, teacher + b),
            compiled(mse_logits, centred=True)(student, teacher),
            rtol=1e-8,
            atol=1e-10,
        )


@pytest.mark.parametrize("temperature", [1e4, 1e6])
def test_hot_distillation_is_half_the_centred_difference(temperature):
    student, teacher = map(jnp.float32, some_logits((6, 5)))
    tolerance = 30 / temperature
    hot = compiled(kd_loss)(student, teacher, temperature)
    limit = compiled(mse_logits, centred=True)(student, teacher) / 2
    np.testing.assert_allclose(hot, limit, rtol=tolerance)
    _, hot = compiled(kd_loss, 0)(student, teacher, temperature)
    _, limit = compiled(mse_logits, 0, centred=True)(student, teacher)
    np.testing.assert_allclose(hot, limit / 2, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("gap", [1e-1, 1e-2, 1e-3])
def test_small_losses_keep_their_digits_in_float32(gap):
    rng = np.random.default_rng(0)
    teacher = np.float32(rng.normal(size=8))
    student = np.float32(teacher + gap * rng.normal(size=8))
    with jax.enable_x64(True):
        exact = compiled(kl_divergence)(np.float64(student), np.float64(teacher))
    np.testing.assert_allclose(exact, oracle(kl_divergence, student, teacher), rtol=1e-6)
    np.testing.assert_allclose(compiled(kl_divergence)(student, teacher), exact, rtol=1e-5)


@pytest.mark.parametrize("loss", SOFTENED, **ids)
def test_an_offset_of_the_logits_costs_no_digits(loss):
    offsets = zip(some_logits((20, 7), scale=0.3), (1e4, -1e4), strict=True)
    student, teacher = (np.float32(logits + offset) for logits, offset in offsets)
    temperature = np.float32(0.1)
    total = lambda *args: loss(*args).sum()  # noqa: E731
    of_all = jax.jit(jax.value_and_grad(total, (0, 1, 2)))
    value, grads = of_all(student, teacher, temperature)
    rows = zip(student, teacher, strict=True)
    exact = sum(oracle(loss, s, t, np.float64(temperature)) for s, t in rows)
    np.testing.assert_allclose(value, exact, rtol=1e-5)
    with jax.enable_x64(True):
        wide = [np.float64(x) for x in (student, teacher, temperature)]
        expected = of_all(*wide)[1]
    for got, want in zip(grads, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.max(np.abs(want)))


def test_a_certain_cross_entropy_is_zero_under_jit():
    # Divided before it is shifted, the largest logit is off by the rounding of a fused product.
    logits = jnp.stack([jnp.zeros(100), jnp.linspace(9e3, 1e4, 100)], -1)
    temperatures = jnp.full(100, 7.3, jnp.float32)
    assert (jax.jit(soft_cross_entropy)(logits, logits, temperatures) == 0).all()


@pytest.mark.parametrize("loss", SOFTENED, **ids)
def test_temperature_is_traced_per_row_and_mapped(loss):
    student, teacher = map(jnp.float32, some_logits((4, 6)))
    temperatures = jnp.array([0.5, 1.0, 2.0, 8.0])
    expected = np.stack([compiled(loss)(student, teacher, float(t)) for t in temperatures])
    mapped = jax.jit(jax.vmap(loss, (None, None, 0)))(student, teacher, temperatures)
    np.testing.assert_allclose(mapped, expected, rtol=1e-5, atol=1e-7)
    rows = jax.jit(loss)(student, teacher, temperatures)
    np.testing.assert_allclose(rows, np.diagonal(expected), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(loss(student, teacher, 2), expected[2], rtol=1e-6)


@pytest.mark.parametrize("loss", LOSSES, **ids)
@pytest.mark.parametrize(
    "pair", [("bfloat16", "bfloat16"), ("float16", "float32"), ("float32", "bfloat16")]
)
def test_narrow_logits_are_read_in_float32(loss, pair):
    student, teacher = (jnp.asarray(x, d) for x, d in zip(some_logits((3, 5)), pair, strict=True))
    got = compiled(loss)(student, teacher)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, compiled(loss)(jnp.float32(student), jnp.float32(teacher)))


@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize("spec", [("d", None), (None, "d")])
def test_sharded_over_rows_or_classes(kind, spec):
    student, teacher = map(jnp.float32, some_logits((8, 12)))
    where = jnp.arange(12) < 9
    call = meshes.with_gradient(
        lambda s, t: jnp.stack([loss(s, t, where=where) for loss in LOSSES])
    )
    meshes.check(call, call(student, teacher), student, teacher, kind, spec)


@pytest.mark.parametrize("loss", LOSSES, **ids)
def test_errors_name_the_argument(loss):
    name, x = loss.__name__, jnp.zeros((2, 3))
    with pytest.raises(
        ValueError, match=rf"{name}: `teacher_logits` must .*\[2, 3\], got float32\[2, 1\]"
    ):
        loss(x, jnp.zeros((2, 1)))
    with pytest.raises(TypeError, match=rf"{name}: `student_logits` must be real.*int32\[2, 3\]"):
        jax.eval_shape(loss, jnp.zeros((2, 3), jnp.int32), x)
    with pytest.raises(TypeError, match=f"{name}: `teacher_logits` must be real"):
        loss(x, [[1.0]])
    with pytest.raises(ValueError, match=f"{name}: `student_logits` must have a last axis"):
        loss(jnp.zeros(()), jnp.zeros(()))
    with pytest.raises(TypeError, match=f"{name}: `where` must be booleans"):
        loss(x, x, where=jnp.ones((2, 3)))
    with pytest.raises(ValueError, match=f"{name}: `where` must .* broadcast"):
        loss(x, x, where=jnp.ones((4,), bool))


@pytest.mark.parametrize("loss", SOFTENED, **ids)
def test_temperatures_must_be_above_zero(loss):
    name, x = loss.__name__, jnp.zeros((2, 3))
    for wrong in (0, -1.0, float("nan"), float("inf"), jnp.zeros(()), np.array([1.0, 0.0])):
        with pytest.raises(
            ValueError, match=f"{name}: `temperature` must be a real number above 0"
        ):
            loss(x, x, wrong)
    # A single row has no other temperature than a scalar.
    for rows, rule in ((x[0], ""), (x, r", or \[2\] of them, one per row")):
        with pytest.raises(ValueError, match=f"a real number above 0{rule}, got 0"):
            loss(rows, rows, 0)
    with pytest.raises(ValueError, match=f"{name}: `temperature` must .*got float32\\[3\\]"):
        loss(x, x, jnp.ones(3))
    for wrong in (None, "hot", True, lambda step: 1.0):
        with pytest.raises(TypeError, match=f"{name}: `temperature` must"):
            loss(x, x, wrong)
