"""Top-k teachers against NumPy float64 over k + 1 buckets, and against the whole divergence."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcompress.distillation import TopK, kd_loss, top_k, top_k_loss
from tests.conftest import counting_jit
from tests.distillation import meshes, slopes

kept_of = jax.jit(top_k, static_argnames=("k", "dtype"))
loss_of = jax.jit(top_k_loss)


def softmax(z):
    powers = np.exp(z - np.max(z))
    return powers / np.sum(powers)


def oracle(student, teacher, k, temperature=1.0):
    """One row in float64 or better: the classes kept one by one, then all others added up."""
    wide = np.longdouble
    p, q = softmax(wide(teacher) / temperature), softmax(wide(student) / temperature)
    kept = sorted(range(len(p)), key=lambda c: (-teacher[c], c))[:k]
    total, p_rest, q_rest = 0.0, 0.0, 0.0
    for c in range(len(p)):
        if c in kept:
            total += p[c] * (np.log(p[c]) - np.log(q[c]))
        else:
            p_rest, q_rest = p_rest + p[c], q_rest + q[c]
    if p_rest > 0:
        total += p_rest * np.log(p_rest / q_rest)
    return float(temperature**2 * total)


def some_logits(shape, seed=0, scale=3.0):
    student, teacher = np.random.default_rng(seed).normal(size=(2, *shape)) * scale
    return student, teacher


def whole(student, teacher, temperature=1.0, *, k, **rest):
    """Both functions, as training with a teacher at hand has them."""
    return top_k_loss(student, top_k(teacher, temperature, k=k, **rest), temperature, **rest)


@functools.cache
def compiled(k, numbers=None):
    f = functools.partial(whole, k=k)
    if numbers is None:
        return jax.jit(lambda *args, **kwargs: f(*args, **kwargs))
    return jax.jit(jax.value_and_grad(lambda *a, **kw: jnp.sum(f(*a, **kw)), numbers))


@pytest.mark.parametrize("k", [1, 4, 7])
@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_equals_the_sum_over_buckets(k, temperature):
    student, teacher = some_logits((5, 7))
    rows = zip(student, teacher, strict=True)
    expected = [oracle(s, t, k, temperature) for s, t in rows]
    with jax.enable_x64(True):
        got = compiled(k)(jnp.asarray(student), jnp.asarray(teacher), temperature)
        assert got.dtype == jnp.float64
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-12)
    got = compiled(k)(jnp.float32(student), jnp.float32(teacher), temperature)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_what_is_kept(temperature):
    _, teacher = some_logits((2, 3, 7))
    p = np.apply_along_axis(lambda row: softmax(row / temperature), -1, teacher)
    order = np.argsort(-teacher, axis=-1)[..., :3]
    with jax.enable_x64(True):
        got = kept_of(jnp.asarray(teacher), temperature, k=3)
        assert isinstance(got, TopK)
        np.testing.assert_array_equal(got.indices, order)
        kept = np.take_along_axis(p, order, -1)
        np.testing.assert_allclose(got.log_probabilities, np.log(kept), rtol=1e-10)
        rest = np.log(np.sort(p, -1)[..., :4].sum(-1))
        np.testing.assert_allclose(got.log_rest, rest, rtol=1e-10)


@pytest.mark.parametrize("numbers", [0, 1])
def test_all_classes_and_all_but_one_are_the_whole_divergence(numbers):
    student, teacher = some_logits((5, 7))
    with jax.enable_x64(True):
        args = jnp.asarray(student), jnp.asarray(teacher), 2.0
        plain = jax.value_and_grad(lambda *a: jnp.sum(kd_loss(*a)), numbers)
        value, grad = jax.jit(plain)(*args)
        for k in (6, 7):
            got = compiled(k, numbers)(*args)
            np.testing.assert_allclose(got[0], value, rtol=1e-9)
            np.testing.assert_allclose(got[1], grad, rtol=1e-7, atol=1e-10)


logits = st.lists(st.floats(-30, 30, width=32), min_size=7, max_size=7)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(logits, logits, st.floats(0.25, 20))
def test_more_classes_tell_more(student, teacher, temperature):
    with jax.enable_x64(True):
        student, teacher = jnp.float64(np.array(student)), jnp.float64(np.array(teacher))
        losses = [float(compiled(k)(student, teacher, temperature)) for k in (1, 4, 6)]
        losses.append(float(jax.jit(kd_loss)(student, teacher, temperature)))
    assert losses[0] >= -1e-12
    for fewer, more in itertools.pairwise(losses):
        assert fewer <= more * (1 + 1e-9) + 1e-12


def test_mass_off_the_support_costs():
    teacher = np.log([0.5, 0.3, 0.1, 0.1])
    # The same ratio within the top two: divided by its sum, the student's would be perfect.
    student = np.log([0.05, 0.03, 0.46, 0.46])
    value, grad = compiled(2, 0)(jnp.float32(student), jnp.float32(teacher))
    expected = 0.8 * np.log(0.8 / 0.08) + 0.2 * np.log(0.2 / 0.92)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert value > 1.5
    # The gradient is of the buckets: the rest's is shared as the student's own rest is.
    q = np.exp(student)
    slope = [0.05 - 0.5, 0.03 - 0.3, *(q[2:] / q[2:].sum() * (0.92 - 0.2))]
    np.testing.assert_allclose(grad, slope, rtol=1e-4)


def test_the_rest_keeps_its_digits():
    # The rest has 2e-13 of the mass on one side: one minus the sum in float32 is 0 or 1e-7.
    teacher, student = np.array([30.0, 0.0, 0.3]), np.array([0.0, 30.0, 29.0])
    for s, t in ((student, teacher), (teacher, student), (teacher, teacher + [0, 1, 0])):
        value, grad = compiled(1, 0)(jnp.float32(s), jnp.float32(t))
        np.testing.assert_allclose(value, oracle(s, t, 1), rtol=1e-5)
        assert np.isfinite(grad).all()
        assert (np.abs(grad) > 0).all()


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_narrow_storage(dtype):
    student, teacher = map(jnp.float32, some_logits((5, 7)))
    exact = kept_of(teacher, 2.0, k=4)
    narrow = kept_of(teacher, 2.0, k=4, dtype=dtype)
    assert narrow.log_probabilities.dtype == narrow.log_rest.dtype == dtype
    np.testing.assert_array_equal(narrow.indices, exact.indices)
    digits = 2e-3 if dtype == jnp.float16 else 2e-2
    got = loss_of(student, narrow, 2.0)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, loss_of(student, exact, 2.0), rtol=20 * digits)
    # Rounded probabilities are divided by their sum: a perfect student costs next to nothing.
    assert (np.asarray(loss_of(teacher, narrow, 2.0)) >= 0).all()
    assert (np.asarray(loss_of(teacher, narrow, 2.0)) < digits**2 * 20).all()


@pytest.mark.parametrize("pair", [("bfloat16", "float16"), ("float16", "float32")])
def test_narrow_logits_are_read_in_float32(pair):
    student, teacher = (jnp.asarray(x, d) for x, d in zip(some_logits((5, 7)), pair, strict=True))
    got = compiled(4)(student, teacher)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, compiled(4)(jnp.float32(student), jnp.float32(teacher)))


@pytest.mark.parametrize(
    ("classes", "dtype"), [(256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "int32")]
)
def test_indices_are_as_narrow_as_the_classes_allow(classes, dtype):
    kept = jax.eval_shape(lambda x: top_k(x, k=2), jax.ShapeDtypeStruct((3, classes), "float32"))
    assert kept.indices.dtype == dtype
    assert [x.shape for x in kept] == [(3, 2), (3, 2), (3,)]


def test_indices_of_any_width_are_read():
    student, teacher = map(jnp.float32, some_logits((5, 7)))
    kept = kept_of(teacher, k=4)
    for dtype in ("int8", "uint16", "int32"):
        other = kept._replace(indices=kept.indices.astype(dtype))
        np.testing.assert_array_equal(loss_of(student, other), loss_of(student, kept))


def test_rows_are_sliced_stacked_and_mapped():
    student, teacher = map(jnp.float32, some_logits((5, 7)))
    kept = kept_of(teacher, k=4)
    batch = jnp.array([3, 0])
    got = loss_of(student[batch], jax.tree.map(lambda x: x[batch], kept))
    np.testing.assert_array_equal(got, loss_of(student, kept)[batch])
    mapped = jax.vmap(top_k_loss)(student, jax.vmap(lambda t: kept_of(t, k=4))(teacher))
    np.testing.assert_allclose(mapped, loss_of(student, kept), rtol=1e-6)


@pytest.mark.parametrize("mask_shape", [(5, 7), (7,), (5, 1)])
def test_a_mask_leaves_classes_away(mask_shape):
    student, teacher = some_logits((5, 7))
    where = np.random.default_rng(3).random(mask_shape) < 0.7
    every = np.broadcast_to(where, (5, 7))
    rows = zip(student, teacher, every, strict=True)
    expected = [oracle(s[m], t[m], 4) if m.any() else 0.0 for s, t, m in rows]
    noise = np.where(every, 0.0, np.random.default_rng(2).choice([np.nan, np.inf, -np.inf, 99.0]))
    student, teacher = jnp.float32(student + noise), jnp.float32(teacher - noise)
    got = compiled(4)(student, teacher, where=where)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    for grad in compiled(4, (0, 1))(student, teacher, where=where)[1]:
        assert np.isfinite(grad).all()
        assert (grad[~every] == 0).all()


def test_a_kept_class_that_is_masked_later_is_left_away():
    student, teacher = map(np.float32, some_logits((5, 7)))
    where = np.arange(7) != 2
    got = loss_of(student, kept_of(jnp.asarray(teacher), k=7), where=where)
    expected = [oracle(s[where], t[where], 6) for s, t in zip(student, teacher, strict=True)]
    np.testing.assert_allclose(got, expected, rtol=1e-5)


STRESS = {
    "large": ([1e4, -1e4, 0.0, 7.0], [-1e4, 1e4, 5.0, 7.0]),
    "identical": ([1.0, 2.0, 3.0, 9.0], [1.0, 2.0, 3.0, 9.0]),
    "identical and large": ([1e4, -1e4, 3.0, 0.0], [1e4, -1e4, 3.0, 0.0]),
    "all equal": ([2.0] * 4, [-5.0] * 4),
    "masked vocabulary": ([1.0, -np.inf, 3.0, 0.0], [2.0, -np.inf, 1.0, 1.0]),
    "fewer than k": ([1.0, -np.inf, -np.inf, 2.0], [2.0, -np.inf, -np.inf, -np.inf]),
    "nothing left": ([-np.inf] * 4, [-np.inf] * 4),
    "teacher certain": ([0.0, 1.0, 2.0, 3.0], [1e4, -np.inf, 0.0, -1e4]),
    "student certain of the rest": ([-1e4, 1e4, -1e4, -1e4], [0.0, -1.0, -1e4, 1.0]),
}


@pytest.mark.parametrize("case", STRESS)
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_values_and_gradients_are_finite(case, k, dtype):
    student, teacher = (jnp.asarray(x, dtype) for x in STRESS[case])
    for temperature in (0.1, 1.0, 1e3):
        value, grads = compiled(k, (0, 1, 2))(student, teacher, jnp.float32(temperature))
        assert np.isfinite(value)
        assert value >= 0
        for grad, of in zip(grads, (student, teacher, jnp.float32(0)), strict=True):
            assert grad.dtype == of.dtype
            assert np.isfinite(np.float32(grad)).all()
        if case in ("identical", "identical and large", "all equal", "nothing left"):
            np.testing.assert_allclose(value, 0.0, atol=1e-6)


def test_rows_without_a_teacher_cost_nothing():
    student, teacher = map(jnp.float32, some_logits((2, 7)))
    kept = kept_of(teacher, k=4, where=jnp.array([[False], [True]]))
    value, grad = jax.value_and_grad(lambda s: loss_of(s, kept).sum())(student)
    np.testing.assert_allclose(value, oracle(*map(np.asarray, (student[1], teacher[1])), 4), 1e-5)
    assert (grad[0] == 0).all()
    assert loss_of(jnp.zeros((0, 7)), kept_of(jnp.zeros((0, 7)), k=4)).shape == (0,)


def test_what_the_student_rules_out_is_infinite_without_nan_gradients():
    teacher = jnp.zeros(7)
    for gone in (jnp.arange(7) == 0, jnp.arange(7) >= 4):
        student = jnp.where(gone, -jnp.inf, jnp.arange(7.0))
        value, grad = compiled(4, 0)(student, teacher)
        assert value == jnp.inf
        assert np.isfinite(grad).all()


def test_nan_is_not_hidden():
    fine, bad = jnp.zeros((2, 7)), jnp.zeros((2, 7)).at[0, 6].set(jnp.nan)
    for pair in ((fine, bad), (bad, fine)):
        np.testing.assert_array_equal(jnp.isnan(compiled(4)(*pair)), [True, False])
    kept = kept_of(fine, k=4)
    for wrong in (200, 7, -1, -7):
        kept = kept._replace(indices=kept.indices.astype("int32"))
        other = kept._replace(indices=kept.indices.at[0, 1].set(wrong))
        np.testing.assert_array_equal(jnp.isnan(loss_of(fine, other)), [True, False])
        np.testing.assert_array_equal(jnp.isnan(top_k_loss(fine, other)), [True, False])
    # As padding too: an index is read whatever its probability.
    padded = TopK(jnp.array([0, -1]), jnp.array([-0.1, -jnp.inf]), jnp.log1p(-jnp.exp(-0.1)))
    assert jnp.isnan(loss_of(fine[0], padded))
    huge = kept._replace(indices=kept.indices.astype("uint32").at[0, 1].set(2**32 - 1))
    np.testing.assert_array_equal(jnp.isnan(loss_of(fine, huge)), [True, False])
    with jax.enable_x64(True):
        wrapped = kept._replace(
            indices=np.asarray(kept.indices, "int64") + np.array([[2**32], [0]])
        )
        np.testing.assert_array_equal(jnp.isnan(loss_of(fine, wrapped)), [True, False])


@pytest.mark.parametrize("argument", [0, 1, 2])
def test_gradients_equal_finite_differences(argument):
    student, teacher = some_logits((7,), scale=1.0)
    with jax.enable_x64(True):
        args = [student, teacher, np.float64(2.0)]
        _, grad = compiled(4, argument)(*map(jnp.asarray, args))
        expected = slopes.by_differences(lambda s, t, T: oracle(s, t, 4, T), args, argument)
        np.testing.assert_allclose(grad, expected, rtol=1e-6, atol=1e-8)


def test_temperature_is_traced_per_row_and_mapped():
    student, teacher = map(jnp.float32, some_logits((5, 7)))
    temperatures = jnp.array([0.5, 1.0, 2.0, 3.0, 8.0])
    f = counting_jit(functools.partial(whole, k=4))
    expected = np.stack([f(student, teacher, t) for t in temperatures])
    assert f.traces == 1
    mapped = jax.jit(jax.vmap(functools.partial(whole, k=4), (None, None, 0)))
    np.testing.assert_allclose(mapped(student, teacher, temperatures), expected, rtol=1e-5)
    rows = compiled(4)(student, teacher, temperatures)
    np.testing.assert_allclose(rows, np.diagonal(expected), rtol=1e-5)


def test_a_teacher_kept_at_another_temperature_is_another_teacher():
    student, teacher = map(jnp.float32, some_logits((5, 7)))
    mixed = loss_of(student, kept_of(teacher, 1.0, k=7), 4.0)
    np.testing.assert_allclose(mixed, kd_loss(student, 4.0 * teacher, 4.0), rtol=1e-4)


@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize("spec", [("d", None), (None, "d")])
def test_sharded_over_rows_or_classes(kind, spec):
    student, teacher = map(jnp.float32, some_logits((8, 12)))
    where = jnp.arange(12) < 9
    call = meshes.with_gradient(lambda s, t: whole(s, t, 2.0, k=4, where=where))
    meshes.check(call, call(student, teacher), student, teacher, kind, spec)


def test_errors_name_the_argument():
    x = jnp.zeros((2, 3))
    for wrong in (0, 4, -1):
        with pytest.raises(ValueError, match=r"top_k: `k` must be a static integer in \[1, 3\]"):
            top_k(x, k=wrong)
    with pytest.raises(TypeError, match="top_k: `k` must be a static integer"):
        top_k(x, k=1.0)
    with pytest.raises(TypeError, match=r"top_k: `teacher_logits` must be real.*int32\[2, 3\]"):
        top_k(jnp.zeros((2, 3), jnp.int32), k=1)
    with pytest.raises(ValueError, match="top_k: `teacher_logits` must have a last axis"):
        top_k(jnp.zeros(()), k=1)
    with pytest.raises(TypeError, match="top_k: `dtype` must be a real floating-point"):
        top_k(x, k=1, dtype=jnp.int8)
    kept = top_k(x, k=2)
    for f in (lambda T: top_k(x, T, k=1), lambda T: top_k_loss(x, kept, T)):
        for wrong in (0.0, -1.0, np.nan, jnp.ones(3)):
            with pytest.raises(ValueError, match="`temperature` must be a real number above 0"):
                f(wrong)
    with pytest.raises(TypeError, match="top_k_loss: `student_logits` must be real"):
        top_k_loss([1.0], kept)
    with pytest.raises(TypeError, match=r"`teacher` must be a TopK.*distillation\.top_k"):
        top_k_loss(x, x)
    with pytest.raises(ValueError, match=r"top_k_loss: `teacher\.indices` must have one row"):
        top_k_loss(jnp.zeros((3, 3)), kept)
    with pytest.raises(ValueError, match=r"`teacher\.log_probabilities` must .*float32\[2, 1\]"):
        top_k_loss(x, kept._replace(log_probabilities=kept.log_probabilities[:, :1]))
    with pytest.raises(ValueError, match=r"`teacher\.log_rest` must have the student's rows"):
        top_k_loss(x, kept._replace(log_rest=kept.log_probabilities))
    with pytest.raises(TypeError, match=r"`teacher\.indices` must be integers"):
        top_k_loss(x, kept._replace(indices=jnp.ones((2, 2))))
    with pytest.raises(TypeError, match=r"`teacher\.log_rest` must be real"):
        top_k_loss(x, kept._replace(log_rest=jnp.ones(2, int)))
    with pytest.raises(ValueError, match=r"`teacher\.indices` must hold 1 to 1 classes"):
        top_k_loss(x[:, :1], kept)
    with pytest.raises(TypeError, match="top_k_loss: `where` must be booleans"):
        top_k_loss(x, kept, where=jnp.ones((2, 3)))
