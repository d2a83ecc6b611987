"""Hints and attention against loops written from the papers, and their programs in PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.distillation import attention_transfer, hint_loss


def some(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape) for shape in shapes]


def hint_oracle(student, teacher):
    """FitNets, equation 3, with a mean for half of a sum."""
    return [
        sum((a - b) ** 2 for a, b in zip(s.flat, t.flat, strict=True)) / s.size
        for s, t in zip(student, teacher, strict=True)
    ]


def attention_oracle(student, teacher, power):
    """Attention transfer, section 3.1: sums of |A|^p, over their lengths, position by position."""

    def maps(row):
        q = np.array([sum(abs(v) ** power for v in at) for at in row.reshape(-1, row.shape[-1])])
        return q / np.sqrt(sum(v * v for v in q))

    return [np.sum((maps(s) - maps(t)) ** 2) for s, t in zip(student, teacher, strict=True)]


@pytest.mark.parametrize("shape", [(5, 4), (3, 2, 3, 4)])
def test_hints_equal_the_paper(shape):
    student, teacher = some(shape, shape)
    with jax.enable_x64(True):
        got = hint_loss(jnp.asarray(student), jnp.asarray(teacher))
        np.testing.assert_allclose(got, hint_oracle(student, teacher), rtol=1e-6)
    got = hint_loss(jnp.float32(student), jnp.float32(teacher))
    np.testing.assert_allclose(got, hint_oracle(student, teacher), rtol=1e-5)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("shapes", [((3, 5, 4), (3, 5, 2)), ((3, 2, 3, 4), (3, 2, 3, 4))])
def test_attention_equals_the_paper(shapes, power):
    student, teacher = some(*shapes)
    expected = attention_oracle(student, teacher, power)
    with jax.enable_x64(True):
        got = attention_transfer(jnp.asarray(student), jnp.asarray(teacher), power)
        np.testing.assert_allclose(got, expected, rtol=1e-6)
    got = attention_transfer(jnp.float32(student), jnp.float32(teacher), power)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_peers_in_torch():
    torch = pytest.importorskip("torch")
    student, teacher = some((3, 4, 5, 6), (3, 4, 5, 7))
    ours, theirs = (torch.tensor(np.moveaxis(x, -1, 1)) for x in (student, teacher))
    normalize = torch.nn.functional.normalize
    maps = [normalize(x.pow(2).mean(1).flatten(1)) for x in (ours, theirs)]
    with jax.enable_x64(True):
        got = attention_transfer(jnp.asarray(student), jnp.asarray(teacher))
        # A mean over rows and positions is their program's; a sum over positions ours.
        mean = torch.nn.functional.mse_loss(*maps).item()
        np.testing.assert_allclose(np.mean(got) / 20, mean, rtol=1e-9)
        got = hint_loss(jnp.asarray(student), jnp.asarray(student[..., ::-1]))
        mean = torch.nn.functional.mse_loss(ours, ours.flip(1)).item()
        np.testing.assert_allclose(np.mean(got), mean, rtol=1e-9)


def test_a_mean_over_what_counts():
    student, teacher = some((2, 3, 4), (2, 3, 4))
    keep = np.array([[True, False, True], [False, False, False]])
    expected = hint_oracle(student[:1, [0, 2]], teacher[:1, [0, 2]])
    got = hint_loss(jnp.float32(student), jnp.float32(teacher), where=keep)
    np.testing.assert_allclose(got, [*expected, 0.0], rtol=1e-5)


def test_attention_does_not_see_scale_or_signs():
    (x,) = some((3, 5, 4))
    student, teacher = jnp.float32(x), jnp.float32(1e4 * np.abs(x))
    np.testing.assert_allclose(attention_transfer(student, teacher), 0.0, atol=1e-6)
    # Nor do high powers overflow or vanish.
    whole = attention_transfer(student, teacher[::-1], 40.0)
    for scale in (1e-12, 1e12):
        got = attention_transfer(scale * student, teacher[::-1], 40.0)
        np.testing.assert_allclose(got, whole, rtol=1e-4, atol=1e-6)
    assert (np.asarray(whole) > 1).any()


def test_a_map_of_zeros_is_at_distance_one():
    (x,) = some((3, 5, 4))
    for pair in ((x, 0 * x), (0 * x, x)):
        student, teacher = map(jnp.float32, pair)
        value, slope = jax.value_and_grad(lambda s, t: attention_transfer(s, t).sum())(
            student, teacher
        )
        np.testing.assert_allclose(value, 3.0, rtol=1e-6)
        assert np.isfinite(slope).all()


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0, 3.0])
def test_attention_at_zero_features_has_finite_gradients(power):
    (x,) = some((2, 3, 4))
    x[0, 1] = 0.0
    x[1, :, 2] = 0.0
    slopes = jax.grad(lambda *args: attention_transfer(*args).sum(), (0, 1, 2))(
        jnp.float32(x), jnp.float32(x[::-1]), power
    )
    assert all(np.isfinite(slope).all() for slope in slopes)


def test_distill_on_features_is_the_gradient_of_the_summed_loss():
    x, w, teacher = (jnp.float32(v) for v in some((5, 3), (3, 4), (5, 4)))
    opt = jc.distill(
        lambda params, batch: batch[0] @ params,
        lambda batch: batch[1],
        weight=0.5,
        loss=lambda s, t, _: hint_loss(s, t),
    )
    updates, _ = opt.update(jnp.zeros_like(w), opt.init(w), w, batch=(x, teacher))
    expected = jax.grad(lambda w: 0.5 * jnp.mean(jnp.square(x @ w - teacher)))(w)
    np.testing.assert_allclose(updates, expected, rtol=1e-5, atol=1e-7)
