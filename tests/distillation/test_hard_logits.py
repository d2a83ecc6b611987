"""All other losses on logits on the inputs that break such losses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress.distillation import (
    dist_loss,
    dkd_loss,
    ensemble_logits,
    jensen_shannon,
    kd_loss,
    kl_divergence,
    mutual_loss,
    nkd_loss,
    ranking_loss,
    reverse_kl,
    skewed_kl,
    skewed_reverse_kl,
    smoothed_cross_entropy,
    soft_cross_entropy,
    standardize_logits,
    teacher_free_loss,
    top_k,
    top_k_loss,
    total_variation,
)
from tests.distillation import meshes
from tests.distillation.test_logits import STRESS, compiled, some_logits


def label(s):
    """The first class, for every row."""
    return jnp.zeros(s.shape[:-1], "int32")


def standardized(s, t, T, where=None):
    s, t = standardize_logits(s, where=where), standardize_logits(t, where=where)
    return jensen_shannon(s, t, T)


LOSSES = {
    "reverse_kl": reverse_kl,
    "jensen_shannon": lambda s, t, T, **w: jensen_shannon(s, t, T, beta=0.3, **w),
    "at 0": lambda s, t, T, **w: jensen_shannon(s, t, T, beta=0.0, normalized=True, **w),
    "at 1": lambda s, t, T, **w: jensen_shannon(s, t, T, beta=1.0, normalized=True, **w),
    "skewed_kl": skewed_kl,
    "skewed_reverse_kl": skewed_reverse_kl,
    "total_variation": total_variation,
    "dkd_loss": lambda s, t, T, **w: dkd_loss(s, t, label(s), T, **w),
    "nkd_loss": lambda s, t, T, **w: nkd_loss(s, t, label(s), T, **w),
    "dist_loss": dist_loss,
    "ranking_loss": lambda s, t, T, **w: ranking_loss(s, t, sharpness=1 / T, **w),
    "smoothed_cross_entropy": lambda s, t, T, **w: smoothed_cross_entropy(s, label(s), **w),
    "teacher_free_loss": lambda s, t, T, **w: teacher_free_loss(s, label(s), T, **w),
    "standardized": standardized,
}
# They measure from a teacher that rules out the second class of the last case.
INFINITE = {"reverse_kl", "at 1"}
CASES = [case for case in STRESS if len(STRESS[case][0]) == 3]
WIDE = (
    [[1.0, -np.inf, -np.inf], [0.0, 1.0, -np.inf]],
    [[1e4, -np.inf, -np.inf], [1e4, -np.inf, -np.inf]],
)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_and_gradients_are_finite(name, dtype):
    rows = np.array([STRESS[case] for case in CASES]).swapaxes(0, 1)
    student, teacher = (jnp.asarray(x, dtype) for x in np.concatenate([rows, WIDE], 1))
    loss = LOSSES[name]

    def total(s, t, temperature):
        losses = loss(s, t, temperature)
        return jnp.sum(jnp.where(jnp.isinf(losses), 0.0, losses)), losses

    both = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))
    for temperature in (0.1, 1.0, 1e3):
        (_, losses), grads = both(student, teacher, jnp.float32(temperature))
        assert losses.dtype == jnp.float32
        infinite = np.isinf(losses)
        np.testing.assert_array_equal(infinite[:-1], np.zeros(len(losses) - 1))
        assert infinite[-1] == (name in INFINITE)
        assert (losses >= -1e-6).all(), losses
        for grad, of in zip(grads, (student, teacher, jnp.float32(0)), strict=True):
            assert grad.dtype == of.dtype
            assert np.isfinite(np.float32(grad)).all()
        alike = [i for i, case in enumerate(CASES) if case in ("all equal", "nothing left")]
        if name not in ("nkd_loss", "smoothed_cross_entropy", "teacher_free_loss", "dist_loss"):
            expected = 1.0 if name == "ranking_loss" else 0.0
            np.testing.assert_allclose(losses[alike[0]], expected, atol=1e-6)
        assert losses[CASES.index("nothing left")] == 0


SOFTENED = {
    name: loss
    for name, loss in LOSSES.items()
    if name not in ("ranking_loss", "smoothed_cross_entropy")
} | {
    "kd_loss": kd_loss,
    "kl_divergence": kl_divergence,
    "soft_cross_entropy": soft_cross_entropy,
    "mutual_loss": lambda s, t, T, **w: mutual_loss(jnp.stack([s, t]), T, **w)[0],
    "ensemble_logits": lambda s, t, T, **w: ensemble_logits(jnp.stack([s, t]), None, T, **w)[:, 0],
    "top_k": lambda s, t, T, **w: top_k(t, T, k=1, **w).log_probabilities[:, 0],
    "top_k_loss": lambda s, t, T, **w: top_k_loss(s, top_k(t, k=1, **w), T, **w),
}


@pytest.mark.parametrize("name", SOFTENED)
def test_a_traced_temperature_not_above_zero_is_not_a_number(name):
    student, teacher = map(jnp.float32, some_logits((2, 3)))
    where = jnp.array([[True] * 3, [False] * 3])
    temperatures = jnp.array([0.0, -0.0, -1.0, jnp.nan, 2.0])
    each = jax.jit(jax.vmap(lambda T: SOFTENED[name](student, teacher, T, where=where)))
    got = each(temperatures)
    np.testing.assert_array_equal(np.isnan(got[:, 0]), [True] * 4 + [False])
    # A row without classes has none of a distribution's logarithms and no loss.
    assert got[-1, 1] == (-np.inf if name in ("ensemble_logits", "top_k") else 0.0)
    row = jax.jit(lambda T: SOFTENED[name](student, teacher, T, where=where))
    assert np.isnan(row(jnp.array([-1.0, 2.0]))[0])


@pytest.mark.parametrize("name", LOSSES)
def test_a_single_class_and_no_rows(name):
    loss = LOSSES[name]
    student, teacher = jnp.array([[4.0], [2.0]]), jnp.array([[-3.0], [2.0]])
    value, grads = compiled(loss, (0, 1))(student, teacher, 2.0)
    # A single class correlates with nothing: T squared times the two terms of two rows.
    assert value == (16.0 if name == "dist_loss" else 0.0)
    for grad in grads:
        np.testing.assert_array_equal(grad, np.zeros((2, 1)))
    for shape in ((0, 3), (2, 0)):
        x = jnp.zeros(shape)
        got = jax.jit(loss)(x, x, 2.0)
        np.testing.assert_array_equal(got, np.zeros(shape[0]))


@pytest.mark.parametrize("name", LOSSES)
def test_masks_minus_infinity_and_nan(name):
    loss = LOSSES[name]
    student, teacher = map(jnp.float32, some_logits((4, 6)))
    where = np.array([[True] * 6, [True, False] * 3, [True] * 3 + [False] * 3, [False] * 6])
    junk = jnp.asarray(np.where(where, 0.0, np.nan), "float32")
    got = compiled(loss)(student + junk, teacher - junk, 2.0, where=where)
    _, grads = compiled(loss, (0, 1))(student + junk, teacher - junk, 2.0, where=where)
    assert np.isfinite(got).all()
    assert got[3] == 0
    for grad in grads:
        assert np.isfinite(grad).all()
        assert (grad[~where] == 0).all()
    cut = (jnp.where(where, x, -jnp.inf) for x in (student, teacher))
    full = np.ones((4, 6), bool)
    full[3] = False
    np.testing.assert_array_equal(compiled(loss)(*cut, 2.0, where=full), got)
    # Each row alone, with what is masked left away; dist_loss is of the batch.
    if name != "dist_loss":
        for i in (1, 2):
            one = loss(student[i, where[i]], teacher[i, where[i]], 2.0)
            np.testing.assert_allclose(one, got[i], rtol=1e-5, atol=1e-6)
    # What is NaN and not masked out shows.
    broken = student.at[1, 2].set(jnp.nan)
    got = compiled(loss)(broken, teacher, 2.0, where=full)
    assert np.isnan(got[1])
    assert name == "dist_loss" or not np.isnan(got[0])


@pytest.mark.parametrize("name", LOSSES)
def test_narrow_logits_are_read_in_float32(name):
    student, teacher = some_logits((4, 6))
    student, teacher = jnp.asarray(student, "bfloat16"), jnp.asarray(teacher, "float16")
    full = np.ones((4, 6), bool)
    got = compiled(LOSSES[name])(student, teacher, 2.0, where=full)
    assert got.dtype == jnp.float32
    wide = compiled(LOSSES[name])(jnp.float32(student), jnp.float32(teacher), 2.0, where=full)
    np.testing.assert_array_equal(got, wide)


# Those that share all of their reductions with others are left away: each costs a compilation.
SHARDED = ("at 0", "dkd_loss", "dist_loss", "ranking_loss")


@pytest.mark.parametrize(
    ("kind", "spec"), [("auto", ("d", None)), ("explicit", ("d", None)), ("explicit", (None, "d"))]
)
def test_sharded_over_rows_or_classes(kind, spec):
    call, wanted, student, teacher = unsharded()
    meshes.check(call, wanted, student, teacher, kind, spec, atol=1e-5)


@functools.cache
def unsharded():
    """What the losses are on one device, compiled once for all meshes."""
    student, teacher = map(jnp.float32, some_logits((8, 12)))
    where = jnp.arange(12) < 9
    call = meshes.with_gradient(
        lambda s, t: jnp.stack([LOSSES[name](s, t, 2.0, where=where) for name in SHARDED])
    )
    return call, call(student, teacher), student, teacher
