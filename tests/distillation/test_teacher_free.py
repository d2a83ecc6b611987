"""Soft labels without a teacher, against the papers, PyTorch and Optax."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcompress.distillation import kd_loss, smoothed_cross_entropy, teacher_free_loss
from tests.conftest import counting_jit
from tests.distillation import slopes
from tests.distillation.test_logits import compiled, softmax, some_logits

LABELS = np.array([0, 3, 6, 3, 1])


def smoothed(logits, label, smoothing, keep):
    """One row: the cross-entropy with `(1 - smoothing) one-hot + smoothing / C`."""
    logs, total = np.log(softmax(logits[keep])), 0.0
    for c, log in zip(np.flatnonzero(keep), logs, strict=True):
        total -= ((1 - smoothing) * (c == label) + smoothing / keep.sum()) * log
    return total


def virtual(logits, label, temperature, correct, keep):
    """One row: a teacher of probability `correct` for the label, softened, against the student."""
    classes = np.flatnonzero(keep)
    if len(classes) == 1:
        return 0.0
    p = np.array([correct if c == label else (1 - correct) / (len(classes) - 1) for c in classes])
    p = p ** (1 / temperature) / np.sum(p ** (1 / temperature))
    q = softmax(logits[keep] / temperature)
    terms = [a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0]
    return temperature**2 * sum(terms)


@pytest.mark.parametrize("masked", [False, True])
def test_equal_the_papers(masked):
    logits = some_logits((5, 7))[0]
    where = np.ones((5, 7), bool)
    if masked:
        where = np.random.default_rng(0).random((5, 7)) < 0.5
        where[4] = False
        where[np.arange(5), LABELS] = True  # so that the last row has a single class
    noise = np.where(where, 0.0, np.nan)
    rows = list(zip(logits, LABELS, where, strict=True))
    with jax.enable_x64(True):
        args = jnp.asarray(logits + noise), jnp.asarray(LABELS)
        for smoothing in (0.0, 0.1, 1.0):
            expected = [smoothed(x, y, smoothing, k) for x, y, k in rows]
            got = compiled(smoothed_cross_entropy)(*args, smoothing, where=where)
            np.testing.assert_allclose(got, expected, rtol=1e-6)
        for temperature, correct in ((20.0, 0.99), (1.0, 0.5), (4.0, 1.0), (4.0, 0.0)):
            expected = [virtual(x, y, temperature, correct, k) for x, y, k in rows]
            numbers = {"correct": correct, "where": where}
            if masked and correct == 0:
                expected[4] = 0.0
            got = compiled(teacher_free_loss)(*args, temperature, **numbers)
            np.testing.assert_allclose(got, expected, rtol=1e-6)
        got = compiled(teacher_free_loss)(*args, where=where)
        expected = [virtual(x, y, 20.0, 0.99, k) for x, y, k in rows]
        np.testing.assert_allclose(got, expected, rtol=1e-6)
    cut = jnp.float32(np.where(where, logits, -np.inf))
    labels = jnp.asarray(LABELS, "int32")
    for loss in (smoothed_cross_entropy, teacher_free_loss):
        got = compiled(loss)(jnp.float32(logits + noise), labels, where=where)
        np.testing.assert_array_equal(compiled(loss)(cut, labels), got)


def test_smoothing_agrees_with_torch_and_optax():
    torch = pytest.importorskip("torch")
    logits = some_logits((5, 7))[0]
    for smoothing in (0.0, 0.3):
        theirs = torch.nn.functional.cross_entropy(
            torch.asarray(logits),
            torch.asarray(LABELS),
            reduction="none",
            label_smoothing=smoothing,
        )
        with jax.enable_x64(True):
            args = jnp.asarray(logits), jnp.asarray(LABELS)
            got = compiled(smoothed_cross_entropy)(*args, smoothing)
            np.testing.assert_allclose(got, theirs, rtol=1e-6)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            soft = optax.smooth_labels(jax.nn.one_hot(LABELS, 7), smoothing)
            theirs = optax.softmax_cross_entropy(jnp.float32(logits), soft)
        np.testing.assert_allclose(got, theirs, rtol=1e-5)


def test_a_virtual_teacher_is_a_teacher():
    logits = jnp.float32(some_logits((5, 7))[0])
    hot = jax.nn.one_hot(LABELS, 7)
    teacher = jnp.log(0.9 * hot + (0.1 / 6) * (1 - hot))
    got = compiled(teacher_free_loss)(logits, jnp.asarray(LABELS, "int32"), 4.0, correct=0.9)
    np.testing.assert_allclose(got, compiled(kd_loss)(logits, teacher, 4.0), rtol=1e-5)
    none = compiled(teacher_free_loss)(teacher, jnp.asarray(LABELS, "int32"), 4.0, correct=0.9)
    np.testing.assert_allclose(none, 0.0, atol=1e-8)


@pytest.mark.parametrize("loss", [smoothed_cross_entropy, teacher_free_loss])
def test_gradients_equal_finite_differences(loss):
    logits, keep = some_logits((1, 4), scale=1.0)[0], np.ones(4, bool)
    args = [logits, np.float64(0.3), np.float64(2.0)]

    def oracle(x, share, temperature):
        if loss is smoothed_cross_entropy:
            return smoothed(x[0], 2, share, keep)
        return virtual(x[0], 2, temperature, share, keep)

    def ours(x, share, temperature):
        label = jnp.array([2])
        if loss is smoothed_cross_entropy:
            return loss(x, label, share)[0]
        return loss(x, label, temperature, correct=share)[0]

    with jax.enable_x64(True):
        grads = jax.jit(jax.grad(ours, (0, 1, 2)))(*map(jnp.asarray, args))
    slopes.check(grads, oracle, args)


def test_a_sweep_is_a_loop_with_finite_ends():
    logits, labels = jnp.float32(some_logits((5, 7))[0]), jnp.asarray(LABELS, "int32")
    values = jnp.array([0.0, 0.1, 0.99, 1.0])
    for one in (
        lambda x: smoothed_cross_entropy(logits, labels, x),
        lambda x: teacher_free_loss(logits, labels, 4.0, correct=x),
    ):
        single = counting_jit(one)
        many = jax.jit(jax.vmap(one))(values)
        for value, got in zip(values, many, strict=True):
            np.testing.assert_allclose(got, single(value), rtol=1e-5)
        assert single.traces == 1
        assert np.isfinite(many).all()
        slopes = jax.jit(jax.vmap(jax.grad(lambda x, f=one: f(x).sum())))(values)
        assert np.isfinite(slopes).all()


def test_a_label_that_the_student_rules_out_is_infinite():
    logits, label = jnp.array([[-jnp.inf, 0.0, 1.0], [-jnp.inf] * 3]), jnp.array([0, 0])
    for loss, gone in ((smoothed_cross_entropy, 1.0), (teacher_free_loss, None)):
        value, grad = compiled(loss, 0)(logits, label)
        np.testing.assert_array_equal(compiled(loss)(logits, label), [jnp.inf, 0.0])
        assert value == jnp.inf
        assert np.isfinite(grad).all()
        free = loss(logits, label, gone) if gone else loss(logits, label, correct=0.0)
        assert np.isfinite(free).all()


def test_numbers_are_checked():
    x, labels = jnp.zeros((2, 3)), jnp.zeros(2, "int32")
    for wrong in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"`smoothing` must be a real number in \[0.0, 1.0\]"):
            smoothed_cross_entropy(x, labels, wrong)
        with pytest.raises(ValueError, match=r"`correct` must be a real number in \[0.0, 1.0\]"):
            teacher_free_loss(x, labels, correct=wrong)
    with pytest.raises(ValueError, match="teacher_free_loss: `temperature` must be a real number"):
        teacher_free_loss(x, labels, 0.0)


def test_traced_shares_outside_of_the_range_are_not_numbers():
    x = jnp.array([[1.0, 0.0, 2.0], [-jnp.inf] * 3])
    labels, values = jnp.zeros(2, "int32"), jnp.array([-0.1, 1.1, jnp.nan, 0.0, 0.3, 1.0])
    for loss, name in ((smoothed_cross_entropy, "smoothing"), (teacher_free_loss, "correct")):
        for classes in (3, 1):
            one = lambda a, f=loss, n=name, c=classes: f(x[:, :c], labels, **{n: a})  # noqa: E731
            got = jax.jit(jax.vmap(one))(values)
            np.testing.assert_array_equal(np.isnan(got[:, 0]), [True] * 3 + [False] * 3)
            np.testing.assert_array_equal(got[3:, 1], np.zeros(3))
