"""The ranking loss against loops over the pairs, and SciPy's Kendall's tau as its limit."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxcompress.distillation import ranking_loss
from tests.conftest import counting_jit
from tests.distillation import slopes
from tests.distillation.test_logits import compiled, some_logits


def oracle(student, teacher, sharpness=1.0, keep=None):
    keep = np.ones(len(student), bool) if keep is None else keep
    s, t = np.float64(student)[keep], np.float64(teacher)[keep]
    total, pairs = 0.0, 0
    for i in range(len(s)):
        for j in range(i):
            total += math.tanh(sharpness * (s[i] - s[j]) * (t[i] - t[j]))
            pairs += 1
    return 1 - total / pairs if pairs else 0.0


@pytest.mark.parametrize("sharpness", [0.01, 1.0, 30.0])
def test_equals_the_paper(sharpness):
    student, teacher = some_logits((5, 7), scale=1.0)
    expected = [oracle(s, t, sharpness) for s, t in zip(student, teacher, strict=True)]
    with jax.enable_x64(True):
        args = jnp.asarray(student), jnp.asarray(teacher)
        got = compiled(ranking_loss)(*args, sharpness=sharpness)
        assert got.dtype == jnp.float64
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    got = compiled(ranking_loss)(jnp.float32(student), jnp.float32(teacher), sharpness=sharpness)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_sharp_it_is_one_less_kendalls_tau():
    student, teacher = some_logits((5, 7))
    taus = [scipy.stats.kendalltau(s, t).statistic for s, t in zip(student, teacher, strict=True)]
    got = compiled(ranking_loss)(jnp.float32(student), jnp.float32(teacher), sharpness=1e6)
    np.testing.assert_allclose(got, 1 - np.array(taus), rtol=1e-5)
    same = compiled(ranking_loss)(jnp.float32(teacher), jnp.float32(teacher), sharpness=1e6)
    np.testing.assert_allclose(same, 0.0, atol=1e-6)
    assert (
        compiled(ranking_loss)(jnp.float32(-teacher), jnp.float32(teacher), sharpness=1e6)[0] == 2
    )


def test_masks_and_ruled_out_classes_are_in_no_pair():
    student, teacher = some_logits((5, 7))
    where = np.random.default_rng(0).random((5, 7)) < 0.6
    where[3], where[4] = False, np.arange(7) == 2
    rows = zip(student, teacher, where, strict=True)
    expected = [oracle(s, t, 1.0, k) for s, t, k in rows]
    noise = np.where(where, 0.0, np.nan)
    args = jnp.float32(student + noise), jnp.float32(teacher + noise)
    got = compiled(ranking_loss)(*args, where=where)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    np.testing.assert_array_equal(got[3:], [0.0, 0.0])
    for grad in compiled(ranking_loss, (0, 1))(*args, where=where)[1]:
        assert (grad[~where] == 0).all()
        assert (grad[3:] == 0).all()
        assert np.isfinite(grad).all()
    cut = jnp.float32(np.where(where, student, -np.inf))
    np.testing.assert_array_equal(compiled(ranking_loss)(cut, jnp.float32(teacher)), got)


def test_gradients_equal_finite_differences():
    args = [*some_logits((4,), scale=1.0), np.float64(0.7)]
    with jax.enable_x64(True):
        grads = jax.jit(jax.grad(lambda s, t, k: ranking_loss(s, t, sharpness=k), (0, 1, 2)))(
            *map(jnp.asarray, args)
        )
    slopes.check(grads, oracle, args)


def test_ties_are_half_wrong():
    student, teacher = jnp.array([1.0, 1.0]), jnp.array([3.0, 2.0])
    assert compiled(ranking_loss)(student, teacher, sharpness=9.0) == 1


def test_the_sharpness_is_traced_and_swept():
    student, teacher = map(jnp.float32, some_logits((5, 7)))
    values = jnp.array([0.0, 0.5, 100.0])
    one = lambda k: ranking_loss(student, teacher, sharpness=k)  # noqa: E731
    single = counting_jit(one)
    for value, got in zip(values, jax.jit(jax.vmap(one))(values), strict=True):
        np.testing.assert_allclose(got, single(value), rtol=1e-6)
    assert single.traces == 1
    with pytest.raises(ValueError, match=r"ranking_loss: `sharpness` must .* at least 0"):
        ranking_loss(student, teacher, sharpness=-1.0)


def test_it_needs_one_array_of_pairs_at_most():
    rows, classes = 4, 512
    x = jax.ShapeDtypeStruct((rows, classes), jnp.float32)
    total = lambda s, t: ranking_loss(s, t).sum()  # noqa: E731
    for fn in (total, jax.grad(total)):
        memory = jax.jit(fn).lower(x, x).compile().memory_analysis()
        assert memory.temp_size_in_bytes <= 1.1 * 4 * rows * classes**2
