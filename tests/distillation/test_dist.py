"""DIST and standardized logits against NumPy, written from the papers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress.distillation import dist_loss, kd_loss, mse_logits, standardize_logits
from tests.conftest import counting_jit
from tests.distillation import slopes
from tests.distillation.test_logits import compiled, softmax, some_logits


def correlation(x, y):
    """Pearson's, 0 where one of the two does not vary."""
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    return np.corrcoef(x, y)[0, 1]


def oracle(student, teacher, temperature=1.0, beta=1.0, gamma=1.0, keep=None):
    """A batch of rows in float64; what is masked is left away, row by row and column by column."""
    keep = np.ones(student.shape, bool) if keep is None else keep
    q, p = np.zeros(student.shape), np.zeros(student.shape)
    for i, k in enumerate(keep):
        if k.any():
            q[i, k], p[i, k] = (softmax(x[i, k] / temperature) for x in (student, teacher))
    used = [c for c in range(student.shape[1]) if keep[:, c].any()]
    columns = [1 - correlation(q[keep[:, c], c], p[keep[:, c], c]) for c in used]
    shares = []
    for a, b, k in zip(q, p, keep, strict=True):
        inter, intra = 1 - correlation(a[k], b[k]), np.mean(columns)
        shares.append(temperature**2 * (beta * inter + gamma * intra) if k.any() else 0.0)
    return np.array(shares)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_dist_equals_the_paper(temperature):
    student, teacher = some_logits((5, 7))
    for beta, gamma in ((1.0, 1.0), (2.0, 0.0), (0.0, 2.0)):
        expected = oracle(student, teacher, temperature, beta, gamma)
        numbers = {"beta": beta, "gamma": gamma}
        with jax.enable_x64(True):
            got = compiled(dist_loss)(
                jnp.asarray(student), jnp.asarray(teacher), temperature, **numbers
            )
        np.testing.assert_allclose(got, expected, rtol=1e-6)
        got = compiled(dist_loss)(
            jnp.float32(student), jnp.float32(teacher), temperature, **numbers
        )
        np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_what_varies_little_is_not_constant():
    student, teacher = some_logits((5, 7), scale=1e-3)
    with jax.enable_x64(True):
        got = compiled(dist_loss)(jnp.asarray(student), jnp.asarray(teacher), 1.0)
    np.testing.assert_allclose(got, oracle(student, teacher), rtol=1e-6)


def test_the_mean_of_dist_agrees_with_torch():
    torch = pytest.importorskip("torch")
    student, teacher = some_logits((5, 7), scale=1.0)
    q, p = (torch.softmax(torch.asarray(x) / 2, -1) for x in (student, teacher))

    def distance(a, b):
        a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
        return 1 - torch.nn.functional.cosine_similarity(a, b, dim=-1).mean()

    expected = 4 * (3 * distance(q, p) + 0.5 * distance(q.T, p.T))
    with jax.enable_x64(True):
        args = jnp.asarray(student), jnp.asarray(teacher), 2.0
        got = compiled(dist_loss)(*args, beta=3.0, gamma=0.5)
    np.testing.assert_allclose(np.mean(np.asarray(got)), expected, rtol=1e-6)


def test_the_leading_axes_are_one_batch():
    student, teacher = map(jnp.float32, some_logits((2, 3, 7)))
    flat = compiled(dist_loss)(student.reshape(6, 7), teacher.reshape(6, 7))
    got = compiled(dist_loss)(student, teacher)
    np.testing.assert_allclose(got, flat.reshape(2, 3), rtol=1e-5)
    # A single row has columns of one entry, which correlate with nothing.
    one = compiled(dist_loss)(student[0, 0], teacher[0, 0])
    rows = compiled(dist_loss)(student, teacher, gamma=0.0)
    np.testing.assert_allclose(one, rows[0, 0] + 1.0, rtol=1e-5)


def test_masks_and_padding_count_in_no_correlation():
    student, teacher = some_logits((5, 7))
    where = np.random.default_rng(1).random((5, 7)) < 0.7
    where[:, 2], where[3] = False, False
    noise = np.where(where, 0.0, np.nan)
    args = jnp.float32(student + noise), jnp.float32(teacher - noise)
    got = compiled(dist_loss)(*args, where=where)
    np.testing.assert_allclose(got, oracle(student, teacher, keep=where), rtol=1e-5)
    assert got[3] == 0
    for grad in compiled(dist_loss, (0, 1))(*args, where=where)[1]:
        assert np.isfinite(grad).all()
        assert (grad[~where] == 0).all()


def test_gradients_of_dist_equal_finite_differences():
    student, teacher = some_logits((3, 4), scale=1.0)
    args = [student, teacher, np.float64(2.0)]
    with jax.enable_x64(True):
        _, grads = compiled(dist_loss, (0, 1, 2))(*map(jnp.asarray, args))
    slopes.check(grads, lambda *args: oracle(*args).sum(), args)


def test_what_is_constant_correlates_with_nothing():
    # Alike rows: no column varies. Alike logits: no row varies.
    for student in (jnp.tile(jnp.array([0.1, 0.7, 0.3]), (5, 1)), jnp.ones((5, 3))):
        teacher = jnp.float32(some_logits((5, 3))[1])
        rows = compiled(dist_loss)(student, teacher, gamma=0.0)
        columns, grad = compiled(dist_loss, 0)(student, teacher, beta=0.0)
        np.testing.assert_allclose(columns, 5.0)
        assert (grad == 0).all()
        if (student == 1).all():
            np.testing.assert_array_equal(rows, np.ones(5))
    # No class is too improbable, and small losses keep their digits.
    student = some_logits((5, 3))[0]
    student[:, 0] -= 60
    student, teacher = np.float32(student), np.float32(student * 1.001)
    with jax.enable_x64(True):
        args = jnp.asarray(student, "float64"), jnp.asarray(teacher, "float64")
        exact = np.asarray(compiled(dist_loss)(*args))
    np.testing.assert_allclose(compiled(dist_loss)(student, teacher), exact, rtol=1e-2)
    assert np.max(exact) < 1e-5


def test_the_numbers_of_dist_are_traced_and_swept():
    student, teacher = map(jnp.float32, some_logits((5, 7)))
    for name, values in {
        "beta": [0.0, 2.0],
        "gamma": [0.0, 2.0],
        "temperature": [1.0, 4.0],
    }.items():
        one = lambda x, n=name: dist_loss(student, teacher, **{n: x})  # noqa: E731
        single = counting_jit(one)
        many = jax.jit(jax.vmap(one))(jnp.array(values))
        for value, got in zip(jnp.array(values), many, strict=True):
            np.testing.assert_allclose(got, single(value), rtol=1e-5)
        assert single.traces == 1
    with pytest.raises(TypeError, match="dist_loss: `beta` must be a real number"):
        dist_loss(student, teacher, beta=None)


def standard(x, keep):
    """One row, by the paper's algorithm 1 with temperature 1."""
    out = np.full(x.shape, -np.inf)
    mean = sum(x[keep]) / sum(keep)
    out[keep] = (x[keep] - mean) / np.sqrt(sum((x[keep] - mean) ** 2) / sum(keep))
    return out


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_standardized_logits_equal_the_paper(offset):
    x = np.float32(some_logits((5, 7))[0] + offset)
    where = np.random.default_rng(0).random((5, 7)) < 0.8
    expected = [standard(np.float64(row), keep) for row, keep in zip(x, where, strict=True)]
    noise = np.float32(np.where(where, 0, np.nan))
    got = compiled(standardize_logits)(x + noise, where=where)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    cut = np.where(where, x, -np.float32(np.inf))
    np.testing.assert_array_equal(compiled(standardize_logits)(cut), got)
    with jax.enable_x64(True):
        wide = compiled(standardize_logits)(np.float64(x + noise), where=where)
        np.testing.assert_allclose(wide, expected, rtol=1e-6, atol=1e-9)


def test_losses_leave_away_what_standardized_logits_do():
    student, teacher = map(jnp.float32, some_logits((5, 7)))
    where = jnp.arange(7) < 5
    whole = standardize_logits(student, where=where), standardize_logits(teacher, where=where)
    cut = standardize_logits(student[:, :5]), standardize_logits(teacher[:, :5])
    for loss in (kd_loss, mse_logits, dist_loss):
        np.testing.assert_allclose(compiled(loss)(*whole), compiled(loss)(*cut), rtol=1e-4)

    def through(s, t, f):
        return kd_loss(f(s, where=where), f(t, where=where), 2.0).sum()

    both = functools.partial(through, f=standardize_logits)
    value, grads = jax.jit(jax.value_and_grad(both, (0, 1)))(student, teacher)
    again = both(3.0 * student + 5.0, 0.1 * teacher)
    np.testing.assert_allclose(again, value, rtol=1e-4)
    for grad in grads:
        assert np.isfinite(grad).all()
        assert (grad[:, 5:] == 0).all()
        # The loss does not change when a row is shifted or scaled.
        np.testing.assert_allclose(np.sum(grad, -1), 0.0, atol=1e-6)
    np.testing.assert_allclose(np.sum(grads[0] * student, -1), 0.0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_standardized_logits_are_finite(dtype):
    inf = np.inf
    rows = [
        [1e4, -1e4, 0],
        [3, 3, 3],
        [9e3, 9e3, 9e3],
        [1e-3, 2e-3, 0],
        [1, -inf, 2],
        [4, -inf, -inf],
    ]
    x = jnp.asarray([*rows, [-inf] * 3], dtype)

    def total(x):
        z = standardize_logits(x)
        return jnp.sum(jnp.where(jnp.isfinite(z), z * jnp.array([[0.0, 1.0, 2.0]]), 0.0)), z

    grad, z = jax.jit(jax.grad(total, has_aux=True))(x)
    assert z.dtype == jnp.float32
    assert grad.dtype == x.dtype
    np.testing.assert_array_equal(np.isfinite(z), np.isfinite(x))
    assert np.isfinite(np.float32(grad)).all()
    np.testing.assert_array_equal(z[1:3], np.zeros((2, 3)))
    np.testing.assert_array_equal(np.float32(grad[1:3]), np.zeros((2, 3)))
    assert z[5, 0] == 0
    assert jax.eval_shape(standardize_logits, jnp.zeros((0, 3))).shape == (0, 3)
    assert jax.eval_shape(standardize_logits, jnp.zeros((2, 0))).shape == (2, 0)


def test_the_largest_logits_are_standardized_without_overflow():
    low = float(np.finfo(np.float32).min)
    rows = [[1, 2, low], [1, 2, low / 2], [-low, 0, low], [-low, -low, low / 4]]
    x = np.float32(rows)

    def total(x):
        z = standardize_logits(x)
        return jnp.sum(z * jnp.array([[0.0, 1.0, 2.0]])), z

    for f in (jax.grad(total, has_aux=True), jax.jit(jax.grad(total, has_aux=True))):
        grad, z = f(jnp.asarray(x))
        full = np.ones(3, bool)
        np.testing.assert_allclose(z, [standard(np.float64(row), full) for row in x], rtol=1e-5)
        assert np.isfinite(grad).all()
    for power in (-50, 50, 120):
        got = compiled(standardize_logits)(np.float32([1, 2, 4]) * np.float32(2.0**power))
        np.testing.assert_array_equal(got, compiled(standardize_logits)(np.float32([1, 2, 4])))
    got = compiled(standardize_logits)(np.float32([1e30, 2e30, 4e30]))
    expected = standard(np.array([1.0, 2.0, 4.0]), np.ones(3, bool))
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_errors_of_standardized_logits_name_the_argument():
    name = "standardize_logits"
    with pytest.raises(TypeError, match=f"{name}: `logits` must be real"):
        standardize_logits(jnp.zeros((2, 3), "int32"))
    with pytest.raises(ValueError, match=f"{name}: `logits` must have a last axis"):
        standardize_logits(jnp.zeros(()))
    with pytest.raises(TypeError, match=f"{name}: `where` must be booleans"):
        standardize_logits(jnp.zeros((2, 3)), where=jnp.ones(3))
