"""VID against loops written from the paper and PyTorch, and its variance in training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcompress.distillation import vid_init, vid_loss


def some(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape) for shape in shapes]


def oracle(student, teacher, raw, floor=1e-5):
    """Ahn et al.: -log of a normal density, without its constant, mean over the entries."""
    result = []
    for s, t in zip(student, teacher, strict=True):
        total = 0.0
        for index in np.ndindex(s.shape):
            variance = np.log(1 + np.exp(raw[index[-1]])) + floor
            total += np.log(np.sqrt(variance)) + (t[index] - s[index]) ** 2 / (2 * variance)
        result.append(total / s.size)
    return result


@pytest.mark.parametrize("floor", [1e-5, 0.3])
@pytest.mark.parametrize("shape", [(5, 4), (3, 2, 3, 4)])
def test_equals_the_paper(shape, floor):
    student, teacher, raw = some(shape, shape, (4,))
    expected = oracle(student, teacher, raw, floor)
    with jax.enable_x64(True):
        args = [jnp.asarray(x) for x in (student, teacher, raw)]
        np.testing.assert_allclose(vid_loss(*args, floor), expected, rtol=1e-6)
    args = [jnp.float32(x) for x in (student, teacher, raw)]
    np.testing.assert_allclose(vid_loss(*args, floor), expected, rtol=1e-5)


def test_peer_in_torch():
    torch = pytest.importorskip("torch")
    student, teacher, raw = some((5, 3, 4), (5, 3, 4), (4,))
    variance = torch.nn.functional.softplus(torch.tensor(raw)) + 1e-5
    expected = torch.nn.functional.gaussian_nll_loss(
        torch.tensor(student), torch.tensor(teacher), variance.expand(5, 3, 4), eps=0.0
    )
    with jax.enable_x64(True):
        got = vid_loss(*(jnp.asarray(x) for x in (student, teacher, raw)))
    np.testing.assert_allclose(np.mean(np.asarray(got)), expected.item(), rtol=1e-9)


@pytest.mark.parametrize("variance", [1e-3, 0.5, 5.0, 100.0, 1e4])
@pytest.mark.parametrize("floor", [0.0, 1e-5, 5e-4])
def test_the_first_variance_is_the_one_asked_for(variance, floor):
    raw = vid_init(3, variance, floor=floor)
    assert raw.shape == (3,)
    np.testing.assert_allclose(jax.nn.softplus(raw) + floor, variance, rtol=1e-5)
    jitted = jax.jit(lambda v: vid_init(3, v, floor=floor))(variance)
    np.testing.assert_allclose(jitted, raw, rtol=1e-5)
    assert vid_init(3, dtype=jnp.bfloat16).dtype == jnp.bfloat16


def test_the_trained_variance_is_the_mean_square_of_the_residual():
    """That is where the likelihood is largest; it is part of any params tree."""
    student, teacher = some((400, 2), (400, 2))
    teacher = student + (teacher - student) * np.array([0.1, 2.0])
    student, teacher = jnp.float32(student), jnp.float32(teacher)
    params = {"raw_variance": vid_init(2)}
    loss = lambda params: vid_loss(student, teacher, params["raw_variance"]).mean()  # noqa: E731
    opt = optax.adam(0.1)

    def step(carry, _):
        params, state = carry
        updates, state = opt.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    with jax.numpy_dtype_promotion("standard"):
        (params, _), _ = jax.lax.scan(step, (params, opt.init(params)), length=400)
    got = jax.nn.softplus(params["raw_variance"]) + 1e-5
    np.testing.assert_allclose(got, jnp.mean(jnp.square(teacher - student), 0), rtol=1e-2)


@pytest.mark.parametrize("raw", [-1e4, -50.0, 0.0, 50.0, 1e4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_raw_variance_is_finite(raw, dtype):
    student, teacher = (jnp.float32(1e4 * x) for x in some((3, 2), (3, 2)))
    raw = jnp.asarray(raw, dtype)
    value, slopes = jax.value_and_grad(lambda s, r: vid_loss(s, teacher, r).sum(), (0, 1))(
        student, raw
    )
    assert np.isfinite(value)
    assert all(np.isfinite(np.float32(slope)).all() for slope in slopes)
    assert slopes[1].dtype == dtype
    assert slopes[1].shape == ()


def test_what_does_not_count_trains_no_variance():
    student, teacher, raw = (jnp.float32(x) for x in some((4, 3, 2), (4, 3, 2), (2,)))
    keep = np.array([True, False, True, False])
    dirty = jnp.where(keep[:, None, None], student, jnp.nan)
    loss = lambda raw, s, t, **where: vid_loss(s, t, raw, **where).sum()  # noqa: E731
    got = jax.grad(loss)(raw, dirty, teacher, where=keep)
    np.testing.assert_allclose(got, jax.grad(loss)(raw, student[keep], teacher[keep]), rtol=1e-5)
    assert (jax.grad(loss)(raw, dirty, teacher, where=keep & False) == 0).all()
    # Positions too, with a mean over those that count.
    places = np.array([[True, False, True]] * 4)
    got = vid_loss(jnp.where(places[..., None], student, jnp.nan), teacher, raw, where=places)
    expected = vid_loss(student[:, ::2], teacher[:, ::2], raw)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_errors_say_what_to_do():
    x = jnp.zeros((2, 3))
    for wrong in (jnp.zeros(2), jnp.zeros((1, 3))):
        with pytest.raises(ValueError, match=r"vid_loss: `raw_variance` must .*\[3\]"):
            vid_loss(x, x, wrong)
    with pytest.raises(TypeError, match=r"vid_loss: `raw_variance` must be real"):
        vid_loss(x, x, jnp.zeros(3, int))
    with pytest.raises(ValueError, match=r"vid_loss: `floor` must"):
        vid_loss(x, x, jnp.zeros(3), -1.0)
    with pytest.raises(ValueError, match=r"vid_init: `variance` must be above the floor"):
        vid_init(3, 1e-5)
    with pytest.raises(TypeError, match=r"vid_init: `channels` must be a static integer"):
        vid_init(3.0)  # pyright: ignore[reportArgumentType]
