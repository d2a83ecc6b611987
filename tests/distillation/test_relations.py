"""Losses on relations against loops written from the papers, and their programs in PyTorch."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress.distillation import (
    cka,
    cka_loss,
    pkt_loss,
    rkd_angle,
    rkd_distance,
    similarity_preserving,
)


@functools.cache
def compiled(loss, **static):
    return jax.jit(functools.partial(loss, **static))


@functools.cache
def slope_of(loss, **static):
    """The gradient of the sum for the student, compiled."""
    return jax.jit(jax.grad(lambda *args: jnp.sum(loss(*args, **static))))


def some(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape) for shape in shapes]


def length(v):
    return math.sqrt(sum(a * a for a in v))


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def similarity_oracle(student, teacher):
    """Tung & Mori: rows of the Gram matrix over their lengths, squares over b squared."""

    def rows(x):
        gram = [[dot(a, b) for b in x] for a in x]
        return np.array([[v / length(row) for v in row] for row in gram])

    return np.sum((rows(student) - rows(teacher)) ** 2) / len(student) ** 2


def huber(a, b, delta):
    r = abs(a - b)
    return r * r / 2 if r <= delta else delta * (r - delta / 2)


def distance_oracle(student, teacher, delta=1.0):
    """Park et al., equations 5 to 8: all ordered pairs of different rows."""
    pairs = list(itertools.permutations(range(len(student)), 2))

    def potentials(x):
        distances = [length(x[i] - x[j]) for i, j in pairs]
        mean = sum(distances) / len(pairs)
        return [d / mean for d in distances]

    both = zip(potentials(student), potentials(teacher), strict=True)
    return sum(huber(a, b, delta) for a, b in both) / len(pairs)


def angle_oracle(student, teacher, delta=1.0):
    """Park et al., equations 9 and 10: all ordered triplets of different rows."""

    def cosine(x, i, j, k):
        a, b = x[i] - x[j], x[k] - x[j]
        return dot(a, b) / (length(a) * length(b)) if length(a) * length(b) else 0.0

    triplets = list(itertools.permutations(range(len(student)), 3))
    total = sum(huber(cosine(student, *t), cosine(teacher, *t), delta) for t in triplets)
    return total / len(triplets)


def pkt_oracle(student, teacher):
    """Passalis & Tefas: KL of the teacher's conditional probabilities from the student's."""

    def conditional(x):
        def kernel(i, j):
            return 0.5 * (dot(x[i], x[j]) / (length(x[i]) * length(x[j])) + 1)

        n = range(len(x))
        return [
            {j: kernel(i, j) / sum(kernel(i, k) for k in n if k != i) for j in n if j != i}
            for i in n
        ]

    p, q = conditional(teacher), conditional(student)
    return [sum(p[i][j] * math.log(p[i][j] / q[i][j]) for j in p[i]) for i in range(len(student))]


def cka_oracle(x, y):
    """Kornblith et al., section 3: HSIC of centred Gram matrices, element by element."""

    def hsic(a, b):
        n = len(a)
        centre = np.eye(n) - np.ones((n, n)) / n
        return np.trace(a @ centre @ b @ centre) / (n - 1) ** 2

    k, l = (np.array([[dot(a, b) for b in m] for a in m]) for m in (x, y))  # noqa: E741
    return hsic(k, l) / math.sqrt(hsic(k, k) * hsic(l, l))


def unbiased_cka_oracle(x, y):
    """Song et al. 2012: the U-statistic of HSIC, over all quadruples of different rows."""

    def hsic(a, b):
        quadruples = itertools.permutations(range(len(a)), 4)
        terms = [a[i, j] * (b[i, j] + b[q, r] - 2 * b[i, q]) for i, j, q, r in quadruples]
        return sum(terms) / len(terms)

    k, l = (np.array([[dot(a, b) for b in m] for a in m]) for m in (x, y))  # noqa: E741
    return hsic(k, l) / math.sqrt(hsic(k, k) * hsic(l, l))


ORACLES = {
    "similarity_preserving": (similarity_preserving, similarity_oracle),
    "rkd_distance": (rkd_distance, distance_oracle),
    "rkd_distance, small delta": (
        functools.partial(rkd_distance, delta=0.2),
        functools.partial(distance_oracle, delta=0.2),
    ),
    "rkd_angle": (rkd_angle, angle_oracle),
    "rkd_angle, small delta": (
        functools.partial(rkd_angle, delta=0.3),
        functools.partial(angle_oracle, delta=0.3),
    ),
    "pkt_loss": (pkt_loss, pkt_oracle),
    "cka": (cka, cka_oracle),
    "cka_loss": (cka_loss, lambda x, y: 1 - cka_oracle(x, y)),
    "cka, unbiased": (functools.partial(cka, unbiased=True), unbiased_cka_oracle),
}


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("widths", [(8, 5), (2, 3)])
def test_equals_the_papers(name, widths):
    loss, oracle = ORACLES[name]
    student, teacher = some((6, widths[0]), (6, widths[1]))
    teacher += 0.3  # The losses that are not of differences see an offset.
    expected = oracle(student, teacher)
    with jax.enable_x64(True):
        got = compiled(loss)(jnp.asarray(student), jnp.asarray(teacher))
        np.testing.assert_allclose(got, expected, rtol=1e-6)
    got = compiled(loss)(jnp.float32(student), jnp.float32(teacher))
    np.testing.assert_allclose(got, expected, rtol=2e-5)


@pytest.mark.parametrize("name", ORACLES)
def test_more_axes_are_one_vector(name):
    student, teacher = (jnp.float32(x) for x in some((5, 2, 3), (5, 4)))
    loss = compiled(ORACLES[name][0])
    np.testing.assert_allclose(
        loss(student, teacher), loss(student.reshape(5, 6), teacher), rtol=1e-6
    )


def test_peers_in_torch():
    """The authors' programs count a row with itself; less that, and its mean, all agree."""
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    student, teacher = some((6, 5), (6, 4))
    with jax.enable_x64(True):
        ours = [jnp.asarray(x) for x in (student, teacher)]
        theirs = [torch.tensor(x) for x in (student, teacher)]

        grams = [functional.normalize(x @ x.T) for x in theirs]
        expected = (grams[0] - grams[1]).square().sum().item() / 36
        np.testing.assert_allclose(compiled(similarity_preserving)(*ours), expected, rtol=1e-9)

        distances = [torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") for x in theirs]
        scaled = [d / d[d > 0].mean() for d in distances]
        expected = functional.smooth_l1_loss(*scaled).item() * 36 / 30
        np.testing.assert_allclose(compiled(rkd_distance)(*ours), expected, rtol=1e-9)

        ways = [functional.normalize(x[None] - x[:, None], dim=2) for x in theirs]
        angles = [w @ w.transpose(1, 2) for w in ways]
        expected = functional.smooth_l1_loss(*angles).item() * 6**3 / (6 * 5 * 4)
        np.testing.assert_allclose(compiled(rkd_angle)(*ours), expected, rtol=1e-9)

        kernels = [(functional.cosine_similarity(x[None], x[:, None], -1) + 1) / 2 for x in theirs]
        kernels = [k * (1 - torch.eye(6)) for k in kernels]
        q, p = (k / k.sum(1, keepdim=True) for k in kernels)
        expected = functional.kl_div((q + 1e-300).log(), p, reduction="none").sum(1)
        np.testing.assert_allclose(compiled(pkt_loss)(*ours), expected.numpy(), rtol=1e-9)


def turned(x, seed=0):
    """Rotated, shifted and scaled."""
    turn, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(x.shape[1], x.shape[1])))
    return x @ turn


def test_what_the_losses_do_not_see():
    (x,) = some((6, 4))
    with jax.enable_x64(True):
        turned_only, moved = jnp.asarray(3 * turned(x)), jnp.asarray(3 * turned(x) + 5)
        scaled, x = jnp.asarray(x * np.arange(1, 7)[:, None]), jnp.asarray(x)
        for loss in (rkd_distance, rkd_angle, cka_loss):
            np.testing.assert_allclose(compiled(loss)(moved, x), 0, atol=1e-12)
        np.testing.assert_allclose(compiled(cka_loss, unbiased=True)(moved, x), 0, atol=1e-12)
        for loss in (similarity_preserving, pkt_loss):
            np.testing.assert_allclose(compiled(loss)(turned_only, x), 0, atol=1e-12)
            assert jnp.max(compiled(loss)(moved, x)) > 1e-3
        # Cosines do not see the lengths of single rows either.
        np.testing.assert_allclose(compiled(pkt_loss)(scaled, x), 0, atol=1e-12)
        assert compiled(similarity_preserving)(scaled, x) > 1e-3


@pytest.mark.parametrize("loss", [rkd_distance, rkd_angle, cka])
def test_an_offset_costs_the_differences_no_digits(loss):
    student, teacher = some((6, 4), (6, 4))
    student = np.round(student * 64) / 64  # Exact after the offset is added.
    plain = compiled(loss)(jnp.float32(student), jnp.float32(teacher))
    moved = compiled(loss)(jnp.float32(student + 4096), jnp.float32(teacher))
    np.testing.assert_allclose(moved, plain, rtol=3e-6)


def test_rows_near_each_other_keep_their_distance_in_float32():
    """A Gram matrix has no digits left there."""
    student, teacher = some((6, 4), (6, 4))
    student[1] = student[0] + 1e-5 * student[1]
    student = np.float64(np.float32(student))
    for loss, oracle in ((rkd_distance, distance_oracle), (rkd_angle, angle_oracle)):
        got = compiled(loss)(jnp.float32(student), jnp.float32(teacher))
        np.testing.assert_allclose(got, oracle(student, teacher), rtol=1e-5)


def test_rows_that_coincide_pull_nowhere():
    student, teacher = (jnp.float32(x) for x in some((3, 2), (3, 2)))
    same = student.at[1].set(student[0])
    for loss, oracle in ((rkd_distance, distance_oracle), (rkd_angle, angle_oracle)):
        expected = oracle(np.float64(same), np.float64(teacher))
        np.testing.assert_allclose(compiled(loss)(same, teacher), expected, rtol=1e-5)
        slope = slope_of(loss)(same, teacher)
        assert np.isfinite(slope).all()
        assert (slope != 0).any()
    np.testing.assert_array_equal(slope_of(rkd_distance)(0 * same, teacher), 0.0)


def test_pkt_of_opposite_rows_is_large_and_finite():
    student = jnp.float32([[1, 0], [-1, 0], [0, 1]])
    value = compiled(pkt_loss)(student, jnp.ones((3, 2)))
    assert ((value[:2] > 5) & (value[:2] < 50)).all()
    assert np.isfinite(slope_of(pkt_loss)(student, jnp.ones((3, 2)))).all()
    # Opposite in the teacher: a neighbour of probability zero costs nothing.
    got = compiled(pkt_loss)(jnp.ones((3, 2)), student)
    np.testing.assert_allclose(got[:2], np.log(2), rtol=1e-5)


@pytest.mark.parametrize("unbiased", [False, True])
def test_cka_is_one_number_for_tall_and_wide(unbiased):
    """Above their widths the covariances are used, below the Gram matrices."""
    student, teacher = some((12, 3), (12, 2))
    teacher += student[:, :2]
    align = compiled(cka, unbiased=unbiased)
    wide = [np.pad(x, ((0, 0), (0, 20))) for x in (student, teacher)]
    with jax.enable_x64(True):
        tall = align(jnp.asarray(student), jnp.asarray(teacher))
        np.testing.assert_allclose(align(*map(jnp.asarray, wide)), tall, rtol=1e-9)
    if not unbiased:
        np.testing.assert_allclose(tall, cka_oracle(student, teacher), rtol=1e-6)


def test_unbiased_cka_of_unrelated_features_is_near_zero():
    student, teacher = (jnp.float32(x) for x in some((16, 256), (16, 256)))
    assert compiled(cka)(student, teacher) > 0.8
    assert abs(compiled(cka, unbiased=True)(student, teacher)) < 0.2


def test_cka_of_what_is_constant():
    x = jnp.float32(some((5, 3))[0])
    flat = jnp.full((5, 4), 0.1)
    for unbiased in (False, True):
        assert compiled(cka, unbiased=unbiased)(flat, x) == 0
        assert compiled(cka_loss, unbiased=unbiased)(flat, x) == 1
        np.testing.assert_array_equal(slope_of(cka_loss, unbiased=unbiased)(flat, x), 0.0)
    # Three rows have no unbiased alignment, one row none at all.
    assert compiled(cka_loss, unbiased=True)(x[:3], x[2:]) == 0
    assert compiled(cka_loss)(x[:1], x[2:3]) == 0
