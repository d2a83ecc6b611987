"""Divergences against loops over the classes written from the papers, and PyTorch's."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcompress.distillation import (
    jensen_shannon,
    kl_divergence,
    reverse_kl,
    skewed_kl,
    skewed_reverse_kl,
    total_variation,
)
from tests.conftest import counting_jit
from tests.distillation import slopes
from tests.distillation.test_logits import compiled, some_logits

normalized = functools.partial(jensen_shannon, normalized=True)
normalized.__name__ = "normalized"
DIVERGENCES = [reverse_kl, jensen_shannon, normalized, skewed_kl, skewed_reverse_kl]
SHARE = {jensen_shannon: "beta", normalized: "beta", skewed_kl: "alpha", skewed_reverse_kl: "alpha"}
ids = {"ids": lambda loss: getattr(loss, "__name__", None)}


def kl(p, q):
    """By its definition, class by class: `0 log 0` is 0, and inf where q lacks what p has."""
    total = 0.0
    for a, b in zip(p, q, strict=True):
        if a > 0:
            total += a * (math.log(a) - math.log(b)) if b > 0 else math.inf
    return total


def probabilities(logits, temperature, keep):
    pairs = zip(logits, keep, strict=True)
    powers = [math.exp(float(z) / temperature) if k else 0.0 for z, k in pairs]
    total = sum(powers)
    return [x / total if total else 0.0 for x in powers]


def oracle(loss, student, teacher, temperature=1.0, share=0.5, keep=None):
    """One row in float64."""
    keep = [True] * len(student) if keep is None else keep
    q, p = (probabilities(x, temperature, keep) for x in (student, teacher))

    def mix(weight, x, y):
        return [weight * a + (1 - weight) * b for a, b in zip(x, y, strict=True)]

    if loss is reverse_kl:
        return kl(q, p)
    if loss is total_variation:
        return sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2
    if loss is skewed_kl:
        return kl(p, mix(share, p, q))
    if loss is skewed_reverse_kl:
        return kl(q, mix(share, q, p))
    m = mix(share, p, q)
    if loss is normalized and share in (0, 1):
        return kl(p, q) if share == 0 else kl(q, p)
    total = (share and share * kl(p, m)) + (share < 1 and (1 - share) * kl(q, m))
    return total / (share * (1 - share)) if loss is normalized else total


def shares(loss):
    return (0.0, 0.01, 0.3, 0.5, 0.9, 1.0) if loss in SHARE else (None,)


def with_share(loss, share):
    return {} if share is None else {SHARE[loss]: share}


@pytest.mark.parametrize("loss", [*DIVERGENCES, total_variation], **ids)
@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_equals_the_papers(loss, temperature):
    student, teacher = some_logits((5, 7))
    for share in shares(loss):
        rows = zip(student, teacher, strict=True)
        expected = [oracle(loss, s, t, temperature, share) for s, t in rows]
        numbers = with_share(loss, share)
        with jax.enable_x64(True):
            got = compiled(loss)(jnp.asarray(student), jnp.asarray(teacher), temperature, **numbers)
            assert got.dtype == jnp.float64
            np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-15)
        got = compiled(loss)(jnp.float32(student), jnp.float32(teacher), temperature, **numbers)
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("loss", [*DIVERGENCES, total_variation], **ids)
def test_agrees_with_torch(loss):
    torch = pytest.importorskip("torch")
    student, teacher = some_logits((5, 7))
    q, p = (torch.log_softmax(torch.asarray(x), -1) for x in (student, teacher))

    def divergence(x, y):
        return torch.nn.functional.kl_div(y, x, reduction="none", log_target=True).sum(-1)

    def mix(weight, x, y):
        return torch.logaddexp(x + math.log(weight), y + math.log(1 - weight))

    m = mix(0.3, p, q)
    jensen = 0.3 * divergence(p, m) + 0.7 * divergence(q, m)
    expected = {
        reverse_kl: divergence(q, p),
        jensen_shannon: jensen,
        normalized: jensen / 0.21,
        skewed_kl: divergence(p, m),
        skewed_reverse_kl: divergence(q, mix(0.3, q, p)),
        total_variation: (p.exp() - q.exp()).abs().sum(-1) / 2,
    }[loss]
    numbers = {SHARE[loss]: 0.3} if loss in SHARE else {}
    with jax.enable_x64(True):
        got = compiled(loss)(jnp.asarray(student), jnp.asarray(teacher), 1.0, **numbers)
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-6)


@pytest.mark.parametrize("loss", [*DIVERGENCES, total_variation], **ids)
def test_gradients_equal_finite_differences(loss):
    student, teacher = some_logits((4,), scale=1.0)

    def call(s, t, temperature, share):
        return loss(s, t, temperature, **with_share(loss, share if loss in SHARE else None))

    gradients = jax.jit(jax.grad(call, (0, 1, 2, 3)))
    for share in (0.3, 0.8) if loss in SHARE else (None,):
        args = [student, teacher, np.float64(2.0), np.float64(share or 0)]
        with jax.enable_x64(True):
            grads = gradients(*map(jnp.asarray, args))
        slopes.check(grads, functools.partial(oracle, loss), args)


@pytest.mark.parametrize("loss", list(SHARE), **ids)
def test_a_sweep_of_the_share_is_a_loop_and_compiles_once(loss):
    student, teacher = map(jnp.float32, some_logits((3, 5)))
    values = jnp.array([0.0, 1e-6, 0.25, 0.5, 0.75, 1 - 1e-6, 1.0])
    one = lambda share: loss(student, teacher, 2.0, **{SHARE[loss]: share})  # noqa: E731
    many, single = jax.jit(jax.vmap(one))(values), counting_jit(one)
    for share, got in zip(values, many, strict=True):
        np.testing.assert_allclose(got, single(share), rtol=1e-6)
    assert single.traces == 1
    assert np.isfinite(many).all()
    for i, known in ((0, 0), (3, 0.5), (-1, 1.0)):
        np.testing.assert_allclose(many[i], one(known), rtol=1e-6)


FAR = {
    "near": ([1.0, 2.0, 3.0], [1.0, 2.0, 3.01]),
    "apart": ([4.0, -4.0, 0.0], [-4.0, 4.0, 1.0]),
    "very far": ([1e4, -1e4, 0.0], [-1e4, 1e4, 5.0]),
    "equal": ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]),
    "masked": ([1.0, -np.inf, 3.0], [2.0, -np.inf, 1.0]),
}


@functools.cache
def swept(loss):
    """The loss and its gradients for the logits and the share, mapped over shares."""
    one = lambda s, t, share: loss(s, t, **{SHARE[loss]: share})  # noqa: E731
    return jax.jit(jax.vmap(jax.value_and_grad(one, (0, 1, 2)), (None, None, 0)))


@pytest.mark.parametrize("loss", list(SHARE), **ids)
@pytest.mark.parametrize("case", FAR)
def test_the_ends_are_finite_and_continuous_with_their_gradients(loss, case):
    student, teacher = map(jnp.float32, FAR[case])
    shares = jnp.array([0.0, 1e-7, 1 - 1.2e-7, 1.0])
    values, grads = swept(loss)(student, teacher, shares)
    for x in (values, *grads):
        assert np.isfinite(x).all()
    if case == "very far":  # there the slope at the ends is exp(20000)
        return
    for x in (values, *grads):
        atol = 1e-5 + 1e-3 * np.max(np.abs(x))
        np.testing.assert_allclose(x[0], x[1], rtol=0, atol=atol)
        np.testing.assert_allclose(x[3], x[2], rtol=0, atol=atol)


def test_the_ends_of_the_normalized_one_are_the_two_divergences():
    student, teacher = some_logits((6, 5), scale=1.5)

    def total(s, t, beta):
        return normalized(s, t, beta=beta).sum()

    with jax.enable_x64(True):
        student, teacher = jnp.asarray(student), jnp.asarray(teacher)
        whole, slopes = jax.jit(total), jax.jit(jax.grad(total, (0, 2)))
        for end, other in ((0.0, kl_divergence), (1.0, reverse_kl)):
            expected, slope = compiled(other, 0)(student, teacher)
            np.testing.assert_allclose(whole(student, teacher, end), expected, rtol=1e-12)
            to_student, to_beta = slopes(student, teacher, end)
            np.testing.assert_allclose(to_student, slope, rtol=1e-9, atol=1e-12)
            step = 1e-6 if end == 0 else -1e-6
            sides = [whole(student, teacher, end + k * step) for k in (0, 1, 2)]
            one_sided = (-3 * sides[0] + 4 * sides[1] - sides[2]) / (2 * step)
            np.testing.assert_allclose(to_beta, one_sided, rtol=1e-4)


def test_second_derivatives_are_right():
    student, teacher = some_logits((4,), scale=1.0)
    with jax.enable_x64(True):
        s, t = jnp.asarray(student), jnp.asarray(teacher)
        grad = jax.grad(lambda s, beta: normalized(s, t, beta=beta))
        first, second = jax.jit(grad), jax.jit(jax.jacobian(grad))
        for beta in (0.0, 0.3, 1.0):
            for row, step in zip(second(s, beta), 1e-5 * jnp.eye(4), strict=True):
                slope = (first(s + step, beta) - first(s - step, beta)) / 2e-5
                np.testing.assert_allclose(row, slope, rtol=1e-5, atol=1e-8)


numbers = st.lists(st.floats(-30, 30, width=32), min_size=4, max_size=4)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(numbers, numbers, st.floats(0, 1))
def test_bounds(student, teacher, share):
    with jax.enable_x64(True):
        s, t = jnp.asarray(student, "float64"), jnp.asarray(teacher, "float64")
        jensen = compiled(jensen_shannon)(s, t, beta=share)
        entropy = -sum(x * math.log(x) for x in (share, 1 - share) if x > 0)
        assert 0 <= jensen <= entropy + 1e-12
        np.testing.assert_allclose(
            compiled(jensen_shannon)(t, s, beta=1 - share), jensen, rtol=1e-6, atol=1e-14
        )
        distance = compiled(total_variation)(s, t)
        assert 0 <= distance <= 1 + 1e-12
        for divergence in (compiled(kl_divergence)(s, t), compiled(reverse_kl)(s, t)):
            assert distance <= math.sqrt(divergence / 2) + 1e-12
        for skewed in (skewed_kl, skewed_reverse_kl):
            value = compiled(skewed)(s, t, alpha=share)
            assert -1e-14 <= value <= (-math.log(share) if share else math.inf) + 1e-12


def test_half_of_each_is_symmetric():
    student, teacher = map(jnp.float32, some_logits((5, 7)))
    for loss in (jensen_shannon, normalized, total_variation):
        forth, back = compiled(loss)(student, teacher, 1.0), compiled(loss)(teacher, student, 1.0)
        np.testing.assert_allclose(forth, back, rtol=1e-6)


def test_without_a_share_of_the_other_they_are_the_divergences():
    student, teacher = map(jnp.float32, some_logits((5, 7)))
    for skewed, plain in ((skewed_kl, kl_divergence), (skewed_reverse_kl, reverse_kl)):
        got = [compiled(skewed)(student, teacher, 1.0, alpha=alpha) for alpha in (0.0, 1.0)]
        np.testing.assert_allclose(got[0], compiled(plain)(student, teacher, 1.0), rtol=1e-5)
        np.testing.assert_array_equal(got[1], np.zeros(5))


@pytest.mark.parametrize("loss", [*DIVERGENCES, total_variation], **ids)
@pytest.mark.parametrize("gap", [1e-1, 1e-3])
def test_small_losses_keep_their_digits_in_float32(loss, gap):
    noise, teacher = some_logits((5, 7), scale=1.0)
    teacher = np.float32(teacher)
    student = np.float32(teacher + gap * noise)
    for share in (0.01, 0.5, 0.9) if loss in SHARE else (None,):
        share = None if share is None else float(np.float32(share))
        numbers = with_share(loss, share)
        with jax.enable_x64(True):
            wide = jnp.asarray(student, "float64"), jnp.asarray(teacher, "float64")
            exact = compiled(loss)(*wide, 1.0, **numbers)
        rows = zip(student, teacher, strict=True)
        expected = [oracle(loss, s, t, 1.0, share) for s, t in rows]
        np.testing.assert_allclose(exact, expected, rtol=1e-6)
        args = jnp.asarray(student), jnp.asarray(teacher), 1.0
        np.testing.assert_allclose(compiled(loss)(*args, **numbers), exact, rtol=1e-5)


@pytest.mark.parametrize("loss", list(SHARE), **ids)
def test_a_class_that_one_of_the_two_rules_out(loss):
    student, teacher = some_logits((3,), scale=1.0)
    one_sided = [(student, [*teacher[:2], -np.inf]), ([*student[:2], -np.inf], teacher)]
    for s, t in one_sided:
        expected = [oracle(loss, s, t, 1.0, share) for share in (0.0, 0.01, 0.9, 1.0)]
        shares = jnp.array([0.0, 0.01, 0.9, 1.0])
        values, grads = swept(loss)(jnp.float32(s), jnp.float32(t), shares)
        np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-7)
        assert all(np.isfinite(grad).all() for grad in grads[:2])


@pytest.mark.parametrize("loss", list(SHARE), **ids)
def test_shares_are_real_numbers_from_0_to_1(loss):
    x, name = jnp.zeros((2, 3)), SHARE[loss]
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=rf"`{name}` must be a real number in \[0.0, 1.0\]"):
            loss(x, x, **{name: wrong})
    with pytest.raises(TypeError, match=f"`{name}` must be a real number"):
        loss(x, x, **{name: "half"})
    with pytest.raises(ValueError, match=f"`{name}` must be a real number"):
        jax.eval_shape(lambda b: loss(x, x, **{name: b}), jnp.zeros(2))
    with pytest.raises(ValueError, match=r"`temperature` must be a real number above 0"):
        loss(x, x, 0.0)
    for outside in (-0.5, 1.5):
        got = jax.jit(lambda b: loss(*some_logits((2, 3)), **{name: b}))(jnp.float32(outside))
        assert np.isnan(got).all()
