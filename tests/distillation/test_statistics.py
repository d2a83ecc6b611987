"""NST, FSP and ICKD against loops written from the papers, and their programs in PyTorch."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress.distillation import fsp_loss, ickd_loss, nst_loss


def some(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape) for shape in shapes]


def channels(row):
    """The channels of one row, each a vector over the positions."""
    flat = row.reshape(-1, row.shape[-1])
    return [flat[:, c] for c in range(flat.shape[1])]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def nst_oracle(student, teacher, constant=0.0, degree=2):
    """Huang & Wang, equations 3 and 5: MMD squared with a polynomial kernel."""

    def mean_kernel(one, other):
        pairs = list(itertools.product(one, other))
        return sum((dot(a, b) + constant) ** degree for a, b in pairs) / len(pairs)

    result = []
    for rows in zip(student, teacher, strict=True):
        s, t = ([c / math.sqrt(dot(c, c)) for c in channels(row)] for row in rows)
        result.append(mean_kernel(t, t) + mean_kernel(s, s) - 2 * mean_kernel(s, t))
    return result


def fsp_oracle(student, teacher):
    """Yim et al., equations 1 and 2."""

    def flow(first, second):
        one, other = channels(first), channels(second)
        return np.array([[dot(a, b) / len(a) for b in other] for a in one])

    rows = zip(*student, *teacher, strict=True)
    return [np.sum((flow(a, b) - flow(c, d)) ** 2) for a, b, c, d in rows]


def ickd_oracle(student, teacher, normalized=False):
    """Liu et al., section 3: inner products of all pairs of channels."""

    def correlations(row):
        gram = np.array([[dot(a, b) for b in channels(row)] for a in channels(row)])
        return gram / np.sqrt((gram**2).sum(1, keepdims=True)) if normalized else gram

    c = student.shape[-1]
    return [
        np.sum((correlations(s) - correlations(t)) ** 2) / (c if normalized else c * c)
        for s, t in zip(student, teacher, strict=True)
    ]


def check(loss, oracle, *features):
    expected = oracle(*features)
    with jax.enable_x64(True):
        got = jax.jit(loss)(*jax.tree.map(jnp.asarray, features))
        np.testing.assert_allclose(got, expected, rtol=1e-6)
    got = jax.jit(loss)(*jax.tree.map(jnp.float32, features))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("numbers", [{}, {"constant": 0.5, "degree": 3}, {"degree": 1}])
@pytest.mark.parametrize("shapes", [((3, 5, 4), (3, 5, 2)), ((2, 2, 3, 3), (2, 2, 3, 5))])
def test_nst_equals_the_paper(shapes, numbers):
    loss, oracle = (functools.partial(f, **numbers) for f in (nst_loss, nst_oracle))
    check(loss, oracle, *some(*shapes))


@pytest.mark.parametrize("positions", [(5,), (2, 3)])
def test_fsp_equals_the_paper(positions):
    a, b, c, d = some(
        (3, *positions, 4), (3, *positions, 2), (3, 2 * positions[0], 4), (3, 2 * positions[0], 2)
    )
    check(fsp_loss, fsp_oracle, (a, b), (c, d))


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("shapes", [((3, 5, 4), (3, 7, 4)), ((2, 2, 3, 3), (2, 2, 3, 3))])
def test_ickd_equals_the_paper(shapes, normalized):
    loss, oracle = (functools.partial(f, normalized=normalized) for f in (ickd_loss, ickd_oracle))
    check(loss, oracle, *some(*shapes))


def test_peers_in_torch():
    torch = pytest.importorskip("torch")
    normalize, mse = torch.nn.functional.normalize, torch.nn.functional.mse_loss
    features = some((3, 2, 3, 4), (3, 2, 3, 4), (3, 2, 3, 5), (3, 2, 3, 5))
    a, b, c, d = (torch.tensor(np.moveaxis(x, -1, 1)).flatten(2) for x in features)
    kernel = lambda x, y: (normalize(x, dim=2) @ normalize(y, dim=2).mT).square()  # noqa: E731
    with jax.enable_x64(True):
        ours = [jnp.asarray(x) for x in features]
        expected = kernel(b, b).mean() + kernel(a, a).mean() - 2 * kernel(a, b).mean()
        np.testing.assert_allclose(np.mean(nst_loss(*ours[:2])), expected.item(), rtol=1e-9)
        # Their mean over the entries of a matrix is our sum over 4 x 5 of them.
        expected = mse(a @ c.mT / 6, b @ d.mT / 6).item() * 20
        got = fsp_loss((ours[0], ours[2]), (ours[1], ours[3]))
        np.testing.assert_allclose(np.mean(got), expected, rtol=1e-9)
        grams = [normalize(x @ x.mT, dim=2) for x in (a, b)]
        expected = (grams[0] - grams[1]).square().sum().item() / (4 * 3)
        got = ickd_loss(*ours[:2], normalized=True)
        np.testing.assert_allclose(np.mean(got), expected, rtol=1e-9)


def test_what_the_losses_do_not_see():
    (x,) = some((3, 5, 4))
    turned = x @ np.linalg.qr(some((4, 4))[0])[0]
    order, places = np.array([2, 0, 3, 1]), np.array([4, 2, 0, 1, 3])
    with jax.enable_x64(True):
        scaled = jnp.asarray(x[..., order] * np.array([1.0, -2.0, 3.0, 0.5]))
        moved, turned, x = jnp.asarray(x[:, places]), jnp.asarray(turned), jnp.asarray(x)
        # Order, scale and sign of channels; the order of positions.
        np.testing.assert_allclose(nst_loss(scaled, x), 0, atol=1e-12)
        np.testing.assert_allclose(ickd_loss(moved, x), 0, atol=1e-12)
        np.testing.assert_allclose(fsp_loss((moved, moved**2), (x, x**2)), 0, atol=1e-12)
        np.testing.assert_allclose(ickd_loss(9 * x, x, normalized=True), 0, atol=1e-12)
        assert (nst_loss(turned, x) > 1e-3).all()
        assert (ickd_loss(scaled, x) > 1e-3).all()


def test_fsp_is_a_mean_over_the_positions_that_count():
    first, second = some((2, 3, 4), (2, 3, 2))
    other, another = some((2, 3, 4), (2, 3, 2), seed=1)
    keep = np.array([[True, False, True], [False, False, False]])
    left = [x[:1, [0, 2]] for x in (first, second, other, another)]
    expected = fsp_oracle(left[:2], left[2:])
    dirty = [np.where(keep[..., None], x, np.nan) for x in (first, second, other, another)]
    a, b, c, d = map(jnp.float32, dirty)
    np.testing.assert_allclose(fsp_loss((a, b), (c, d), where=keep), [*expected, 0.0], rtol=1e-5)
