"""DKD and NKD against loops over the classes written from the papers, and PyTorch's divergences."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress.distillation import (
    dkd_loss,
    dkd_parts,
    kd_loss,
    nkd_loss,
    smoothed_cross_entropy,
    teacher_free_loss,
)
from tests.conftest import counting_jit
from tests.distillation import slopes
from tests.distillation.test_logits import compiled, some_logits

LABELS = np.array([0, 3, 6, 3, 1])
# Losses of labels alone have no teacher: it is left away.
LABELLED = {
    "dkd_loss": dkd_loss,
    "nkd_loss": nkd_loss,
    "smoothed_cross_entropy": lambda s, t, y, **more: smoothed_cross_entropy(s, y, **more),
    "teacher_free_loss": lambda s, t, y, **more: teacher_free_loss(s, y, **more),
}


def probabilities(logits, temperature):
    powers = [math.exp(z / temperature) for z in logits]
    return [x / sum(powers) for x in powers]


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def parts(student, teacher, label, temperature=1.0):
    """TCKD and NCKD of one row, with T squared; and the teacher's probability of the label."""
    q, p = probabilities(student, temperature), probabilities(teacher, temperature)
    rest_q, rest_p = (sum(x) - x[label] for x in (q, p))
    target = kl([p[label], rest_p], [q[label], rest_q])
    others = [c for c in range(len(p)) if c != label]
    non_target = kl([p[c] / rest_p for c in others], [q[c] / rest_q for c in others])
    return temperature**2 * target, temperature**2 * non_target, p[label]


def nkd(student, teacher, label, temperature, gamma):
    hit = -probabilities(teacher, 1.0)[label] * math.log(probabilities(student, 1.0)[label])
    q, p = (probabilities(np.delete(x, label), temperature) for x in (student, teacher))
    rest = -sum(a * math.log(b) for a, b in zip(p, q, strict=True))
    return hit + gamma * temperature**2 * rest


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_equal_the_papers(temperature):
    student, teacher = some_logits((5, 7))
    rows = list(zip(student, teacher, LABELS, strict=True))
    target, non_target, sure = np.transpose([parts(*row, temperature) for row in rows])
    with jax.enable_x64(True):
        args = jnp.asarray(student), jnp.asarray(teacher), jnp.asarray(LABELS)
        got = compiled(dkd_parts)(*args, temperature)
        np.testing.assert_allclose(got.target, target, rtol=1e-6)
        np.testing.assert_allclose(got.non_target, non_target, rtol=1e-6)
        for alpha, beta in ((1.0, 8.0), (0.5, 2.0), (0.0, 1.0)):
            loss = compiled(dkd_loss)(*args, temperature, alpha=alpha, beta=beta)
            np.testing.assert_allclose(loss, alpha * target + beta * non_target, rtol=1e-6)
        whole = compiled(kd_loss)(*args[:2], temperature)
        np.testing.assert_allclose(got.target + (1 - sure) * got.non_target, whole, rtol=1e-6)
        for gamma in (0.0, 1.5):
            expected = [nkd(*row, temperature, gamma) for row in rows]
            loss = compiled(nkd_loss)(*args, temperature, gamma=gamma)
            np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_the_defaults_are_the_papers():
    student, teacher = some_logits((5, 7))
    args = jnp.float32(student), jnp.float32(teacher), jnp.asarray(LABELS, "int32")
    rows = list(zip(student, teacher, LABELS, strict=True))
    expected = [a + 8 * b for a, b, _ in (parts(*row) for row in rows)]
    np.testing.assert_allclose(compiled(dkd_loss)(*args), expected, rtol=1e-5)
    expected = [nkd(*row, 1.0, 1.5) for row in rows]
    np.testing.assert_allclose(compiled(nkd_loss)(*args), expected, rtol=1e-5)


def test_agree_with_torch():
    torch = pytest.importorskip("torch")
    functional, temperature = torch.nn.functional, 3.0
    student, teacher = some_logits((5, 7))
    s, t = torch.asarray(student), torch.asarray(teacher)
    rows, others = torch.arange(5), torch.ones(5, 7, dtype=torch.bool)
    others[rows, LABELS] = False
    rest = [torch.log_softmax(x[others].reshape(5, 6) / temperature, -1) for x in (s, t)]
    binary = []
    for x in (s, t):
        logs = torch.log_softmax(x / temperature, -1)
        rest_of = torch.logsumexp(logs[others].reshape(5, 6), -1)
        binary.append(torch.stack([logs[rows, LABELS], rest_of], -1))

    def divergence(q, p):
        return functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)

    dkd = temperature**2 * (divergence(*binary) + 8 * divergence(*rest))
    hard = functional.cross_entropy(s, torch.asarray(LABELS), reduction="none")
    soft = functional.cross_entropy(rest[0], rest[1].exp(), reduction="none")
    nkd = torch.softmax(t, -1)[rows, LABELS] * hard + 1.5 * temperature**2 * soft
    with jax.enable_x64(True):
        args = jnp.asarray(student), jnp.asarray(teacher), jnp.asarray(LABELS), temperature
        np.testing.assert_allclose(compiled(dkd_loss)(*args), dkd, rtol=1e-6)
        np.testing.assert_allclose(compiled(nkd_loss)(*args), nkd, rtol=1e-6)


@pytest.mark.parametrize("loss", [dkd_loss, nkd_loss], ids=lambda loss: loss.__name__)
def test_gradients_equal_finite_differences(loss):
    student, teacher = some_logits((1, 4), scale=1.0)
    label, args = np.array([2]), [student, teacher, np.float64(2.0)]

    def oracle(s, t, temperature):
        if loss is nkd_loss:
            return nkd(s[0], t[0], 2, temperature, 1.5)
        target, non_target, _ = parts(s[0], t[0], 2, temperature)
        return target + 8 * non_target

    with jax.enable_x64(True):
        total = lambda s, t, temperature: loss(s, t, jnp.asarray(label), temperature)[0]  # noqa: E731
        grads = jax.jit(jax.grad(total, (0, 1, 2)))(*map(jnp.asarray, args))
    slopes.check(grads, oracle, args)


def test_two_classes_have_nothing_beside_the_label():
    student, teacher = map(jnp.float32, some_logits((6, 2)))
    labels = jnp.array([0, 1, 0, 1, 0, 1])
    got = compiled(dkd_parts)(student, teacher, labels, 2.0)
    np.testing.assert_array_equal(got.non_target, np.zeros(6))
    np.testing.assert_allclose(got.target, compiled(kd_loss)(student, teacher, 2.0), rtol=1e-5)


def test_the_sure_are_finite_and_exact():
    # log(1 - q) is -2e4 here: the published formula takes the logarithm of 0.
    student = jnp.array([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], [1e4, 0.0, 0.0]])
    teacher = jnp.array([[1e4, 0.0, -1e4], [1e4, -1e4, 0.0], [1e4, 1.0, 0.0]])
    got = compiled(dkd_parts)(student, teacher, jnp.zeros(3, "int32"))
    np.testing.assert_allclose(got.target, [0.0, 2e4, 0.0], rtol=1e-6)
    p = 1 / (1 + math.exp(-1))
    small = p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))
    np.testing.assert_allclose(got.non_target, [1e4, 1e4, small], rtol=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_lowest_logits_leave_both_gradients_finite(temperature):
    x = jnp.array([1.0, 2.0, jnp.finfo(jnp.float32).min])
    for loss in (nkd_loss, dkd_loss):
        value, grads = compiled(loss, (0, 1))(x, x, jnp.array(0), temperature)
        assert np.isfinite(value)
        assert np.isfinite(grads).all()
    # As if the class had been masked out: it has no probability.
    expected = compiled(nkd_loss, (0, 1))(x[:2], x[:2], jnp.array(0), temperature)
    value, grads = compiled(nkd_loss, (0, 1))(x, x, jnp.array(0), temperature)
    np.testing.assert_allclose(value, expected[0], rtol=1e-6)
    for grad, want in zip(grads, expected[1], strict=True):
        np.testing.assert_allclose(grad, [*want, 0.0], rtol=1e-5, atol=1e-7)


def test_the_weights_are_traced_and_swept():
    student, teacher = map(jnp.float32, some_logits((5, 7)))
    labels, values = jnp.asarray(LABELS, "int32"), jnp.array([0.0, 0.5, 8.0])
    for loss, name in ((dkd_loss, "alpha"), (dkd_loss, "beta"), (nkd_loss, "gamma")):
        one = lambda w, f=loss, n=name: f(student, teacher, labels, 2.0, **{n: w})  # noqa: E731
        single = counting_jit(one)
        for value, got in zip(values, jax.jit(jax.vmap(one))(values), strict=True):
            np.testing.assert_allclose(got, single(value), rtol=1e-6)
        assert single.traces == 1
    # The slope of the weight is its part, also where the weight is 0.
    slope = jax.grad(lambda a: dkd_loss(student, teacher, labels, alpha=a).sum())(0.0)
    expected = compiled(dkd_parts)(student, teacher, labels).target.sum()
    np.testing.assert_allclose(slope, expected, rtol=1e-5)


def test_a_weight_of_zero_leaves_an_infinite_part_away():
    student, teacher = jnp.array([[0.0, 1.0, -jnp.inf]]), jnp.array([[0.0, 1.0, 2.0]])
    label = jnp.array([0])
    assert compiled(dkd_loss)(student, teacher, label) == jnp.inf
    assert np.isfinite(compiled(dkd_loss)(student, teacher, label, beta=0.0))
    assert np.isfinite(compiled(nkd_loss)(student, teacher, label, gamma=0.0))


@pytest.mark.parametrize("name", LABELLED)
def test_a_label_that_is_no_class_is_not_a_number(name):
    loss = LABELLED[name]
    student, teacher = map(jnp.float32, some_logits((5, 7)))
    where = jnp.ones((5, 7), bool).at[2, 3].set(False).at[4].set(False)
    # Too large, negative, masked out, right, and a row without classes.
    labels = jnp.array([7, -1, 3, 6, -100])
    value, grad = compiled(loss, 0)(student, teacher, labels, where=where)
    value = compiled(loss)(student, teacher, labels, where=where)
    np.testing.assert_array_equal(np.isnan(value), [True, True, True, False, False])
    assert value[4] == 0
    assert np.isfinite(grad).all()
    np.testing.assert_array_equal(np.any(grad != 0, -1), [False, False, False, True, False])


@pytest.mark.parametrize("name", LABELLED)
@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint32", "int16"])
def test_labels_are_integers_of_any_width(name, dtype):
    loss = LABELLED[name]
    student, teacher = map(jnp.float32, some_logits((5, 7)))
    expected = compiled(loss)(student, teacher, jnp.asarray(LABELS, "int32"))
    got = compiled(loss)(student, teacher, jnp.asarray(LABELS, dtype))
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(got, compiled(loss)(student, teacher, np.asarray(LABELS, dtype)))


@pytest.mark.parametrize("name", LABELLED)
def test_errors_name_the_argument(name):
    x = jnp.zeros((2, 3))
    loss = functools.partial(LABELLED[name], x, x)
    with pytest.raises(TypeError, match=rf"{name}: `labels` must be integers.*float32\[2\]"):
        loss(jnp.zeros(2))
    with pytest.raises(TypeError, match=f"{name}: `labels` must be integers"):
        loss([0, 1])
    with pytest.raises(
        ValueError, match=rf"{name}: `labels` must .*shape \[2\], got int32\[2, 1\]"
    ):
        jax.eval_shape(loss, jnp.zeros((2, 1), "int32"))
    with pytest.raises(TypeError, match=f"{name}: `student_logits` must be real"):
        LABELLED[name](jnp.zeros((2, 3), "int32"), x, jnp.zeros(2, "int32"))
    with pytest.raises(TypeError, match=f"{name}: `where` must be booleans"):
        loss(jnp.zeros(2, "int32"), where=jnp.ones(3))
    numbers = {"dkd_loss": "beta", "nkd_loss": "gamma", "teacher_free_loss": "correct"}
    number = numbers.get(name, "smoothing")
    with pytest.raises(TypeError, match=f"{name}: `{number}` must be a real number"):
        loss(jnp.zeros(2, "int32"), **{number: "much"})
