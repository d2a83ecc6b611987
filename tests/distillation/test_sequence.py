"""Sequences: masks, shifts and means against plain loops, and one student that learns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxcompress.distillation import (
    answer_mask,
    chunked_kd_loss,
    kl_divergence,
    mix_sequences,
    next_tokens,
    sequence_kd_loss,
    sequence_loss,
)
from tests.conftest import counting_jit, mesh_of

mean = jax.jit(sequence_loss, static_argnames="per_sequence")


def some_losses(seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(4, 6)), rng.random((4, 6)) < 0.6


def looped(losses, mask, per_sequence):
    total = count = 0.0
    means = []
    for row, keep in zip(losses, mask, strict=True):
        kept = [x for x, k in zip(row, keep, strict=True) if k]
        total, count = total + sum(kept), count + len(kept)
        if kept:
            means.append(sum(kept) / len(kept))
    return sum(means) / max(len(means), 1) if per_sequence else total / max(count, 1)


@pytest.mark.parametrize("per_sequence", [False, True])
def test_the_mean_is_that_of_a_loop(per_sequence):
    losses, mask = some_losses()
    mask[2] = False
    expected = looped(losses, mask, per_sequence)
    with jax.enable_x64(True):
        got = mean(jnp.asarray(losses), mask, per_sequence=per_sequence)
        assert got.dtype == jnp.float64
        np.testing.assert_allclose(got, expected, rtol=1e-12)
    # What is masked is not read, padding changes nothing.
    noisy = np.where(mask, losses, np.nan)
    noisy, longer = (np.pad(x, [(0, 1), (0, 3)]) for x in (noisy, mask))
    got = mean(jnp.float32(noisy), longer, per_sequence=per_sequence)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    gradient = jax.grad(functools.partial(sequence_loss, per_sequence=per_sequence))
    grad = gradient(jnp.float32(noisy), longer)
    assert np.isfinite(grad).all()
    assert (np.asarray(grad)[~longer] == 0).all()
    np.testing.assert_allclose(grad.sum(), 1.0, rtol=1e-5)


@pytest.mark.parametrize("per_sequence", [False, True])
@pytest.mark.parametrize("shape", [(4, 6), (0, 6), (4, 0)])
def test_an_empty_mask_costs_nothing(per_sequence, shape):
    f = functools.partial(sequence_loss, per_sequence=per_sequence)
    value, grad = jax.value_and_grad(f)(jnp.full(shape, jnp.nan), jnp.zeros(shape, bool))
    assert value == 0
    assert (grad == 0).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_losses_are_added_in_float32(dtype):
    losses = jnp.full((2, 4000), 3.0, dtype)
    for per_sequence in (False, True):
        got = mean(losses, jnp.ones((2, 4000), bool), per_sequence=per_sequence)
        assert got.dtype == jnp.float32
        assert got == 3.0


def test_any_leading_axes():
    losses, mask = some_losses()
    shape = (2, 2, 6)
    for per_sequence in (False, True):
        got = mean(losses.reshape(shape), mask.reshape(shape), per_sequence=per_sequence)
        np.testing.assert_allclose(got, looped(losses, mask, per_sequence), rtol=1e-5)
        one = mean(jnp.float32(losses[0]), mask[0], per_sequence=per_sequence)
        np.testing.assert_allclose(one, losses[0][mask[0]].mean(), rtol=1e-5)


def answered(row, prompt, end):
    out, open_ = [], True
    for i, token in enumerate(row):
        out.append(i >= prompt and open_)
        if i >= prompt and token == end:
            open_ = False
    return out


def test_the_answer_ends_with_its_end_token():
    tokens = np.random.default_rng(0).integers(0, 4, size=(20, 7))
    prompts = np.random.default_rng(1).integers(0, 8, size=20)
    f = counting_jit(lambda t, p, end: answer_mask(t, p, end=end))
    for end in (0, 3, 9):
        expected = [answered(t, p, end) for t, p in zip(tokens, prompts, strict=True)]
        np.testing.assert_array_equal(f(jnp.int32(tokens), jnp.int32(prompts), end), expected)
    assert f.traces == 1
    got = answer_mask(jnp.uint8(tokens), 3)
    np.testing.assert_array_equal(got, np.broadcast_to(np.arange(7) >= 3, (20, 7)))
    mapped = jax.vmap(answer_mask)(jnp.int32(tokens), jnp.int32(prompts))
    np.testing.assert_array_equal(mapped, answer_mask(jnp.int32(tokens), jnp.int32(prompts)))


def test_position_i_predicts_token_i_plus_1():
    tokens = np.random.default_rng(0).integers(1, 9, size=(2, 3, 7))
    mask = np.random.default_rng(1).random((2, 3, 7)) < 0.5
    labels, keep = next_tokens(jnp.int32(tokens), jnp.asarray(mask))
    assert labels.shape == keep.shape == tokens.shape
    np.testing.assert_array_equal(labels[..., :-1], tokens[..., 1:])
    np.testing.assert_array_equal(keep[..., :-1], mask[..., 1:])
    assert not keep[..., -1].any()
    for length in (0, 1):
        labels, keep = next_tokens(jnp.zeros((2, length), int), jnp.ones((2, length), bool))
        assert labels.shape == (2, length)
        assert not keep.any()


def nll(logits, label):
    z = logits - logits.max()
    return np.log(np.exp(z).sum()) - z[label]


def test_sequence_level_distillation_is_the_log_likelihood():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(3, 5, 7)) * 3, rng.integers(0, 7, size=(3, 5))
    rows = [nll(z, c) for z, c in zip(logits.reshape(15, 7), labels.reshape(15), strict=True)]
    expected = np.reshape(rows, (3, 5))
    with jax.enable_x64(True):
        got = sequence_kd_loss(jnp.asarray(logits), jnp.asarray(labels))
        np.testing.assert_allclose(got, expected, rtol=1e-6)
    narrow = jnp.float32(logits)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        theirs = optax.losses.softmax_cross_entropy_with_integer_labels(narrow, labels)
        slope = jax.grad(
            lambda z: optax.losses.softmax_cross_entropy_with_integer_labels(z, labels).sum()
        )(narrow)
    np.testing.assert_allclose(sequence_kd_loss(narrow, labels), theirs, rtol=1e-5)
    grad = jax.grad(lambda z: sequence_kd_loss(z, labels).sum())(narrow)
    np.testing.assert_allclose(grad, slope, rtol=1e-4, atol=1e-6)
    low = sequence_kd_loss(narrow.astype(jnp.bfloat16), labels)
    assert low.dtype == jnp.float32
    np.testing.assert_allclose(low, theirs, rtol=2e-2, atol=2e-2)


def test_what_a_position_leaves_away():
    logits = jnp.full((4, 3), jnp.nan).at[0].set(0.0)
    mask = jnp.array([True, False, False, False])
    f = lambda z: sequence_kd_loss(z, jnp.array([1, -100, 99, 0]), where=mask[:, None])  # noqa: E731
    np.testing.assert_allclose(f(logits), [np.log(3), 0, 0, 0], rtol=1e-6)
    grad = jax.grad(lambda z: f(z).sum())(logits)
    np.testing.assert_allclose(grad[0], [1 / 3, -2 / 3, 1 / 3], rtol=1e-5)
    assert (grad[1:] == 0).all()
    ruled_out = jnp.array([0.0, -jnp.inf, 0.0])
    value, grad = jax.value_and_grad(sequence_kd_loss)(ruled_out, jnp.array(1))
    assert value == jnp.inf
    assert np.isfinite(grad).all()
    assert np.isfinite(sequence_kd_loss(ruled_out, jnp.array(0)))
    assert np.isfinite(sequence_kd_loss(jnp.array([1e4, -1e4]), jnp.array(1)))
    assert np.isnan(sequence_kd_loss(jnp.zeros(3), jnp.array(3)))


def test_rows_come_whole_from_one_batch(key):
    sampled = {"tokens": jnp.ones((1000, 3), jnp.int32), "mask": jnp.ones((1000, 2, 1), bool)}
    fixed = jax.tree.map(jnp.zeros_like, sampled)
    f = counting_jit(mix_sequences)
    for fraction in (0.0, 0.3, 1.0):
        got = f(key, sampled, fixed, fraction)
        assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, sampled)
        assert [x.dtype for x in jax.tree.leaves(got)] == [jnp.bool_, jnp.int32]
        ours = np.asarray(got["tokens"])[:, 0]
        assert (np.asarray(got["tokens"]) == ours[:, None]).all()
        assert (np.asarray(got["mask"]) == ours[:, None, None]).all()
        # Four standard errors of a binomial, nothing at the ends.
        error = 4 * np.sqrt(fraction * (1 - fraction) / 1000)
        assert abs(ours.mean() - fraction) <= error
    assert f.traces == 1
    fractions = jnp.array([0.0, 0.5, 1.0])
    mapped = jax.vmap(lambda x: mix_sequences(key, sampled, fixed, x))(fractions)
    for i in range(3):
        one = mix_sequences(key, sampled, fixed, fractions[i])
        jax.tree.map(lambda a, b, i=i: np.testing.assert_array_equal(a[i], b), mapped, one)
    jax.tree.map(np.testing.assert_array_equal, mix_sequences(key, sampled, fixed, 1), sampled)


def test_a_masked_mean_of_a_chunked_loss_trains():
    """Tokens masked out of the mean get no gradient through the chunks either."""
    rng = np.random.default_rng(0)
    shapes = [(2, 5, 3), (3, 11), (2, 5, 4), (4, 11)]
    h, w, g, u = (jnp.float32(rng.normal(size=shape)) for shape in shapes)
    mask = jnp.arange(10).reshape(2, 5) % 2 == 0

    def f(h):
        losses = chunked_kd_loss(h, w, g, u, token_chunk=4, class_chunk=4)
        return sequence_loss(losses, mask, per_sequence=False)

    grad = jax.jit(jax.grad(f))(h)
    assert (grad[~mask] == 0).all()
    assert (jnp.abs(grad[mask]).max(-1) > 0).all()


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_a_step_on_own_samples_trains(fraction, key):
    """A bigram student on its samples or on written text comes near its teacher."""
    prompt, length, classes = 1, 8, 5
    teacher = jnp.float32(np.random.default_rng(3).normal(size=(classes, classes)))

    def sample(params, first, key):
        def step(last, key):
            token = jax.random.categorical(key, params[last])
            return token, token

        _, tokens = jax.lax.scan(step, first, jax.random.split(key, length - prompt))
        return jnp.concatenate([first[:, None], tokens.T], 1)

    def step(params, key):
        keys = jax.random.split(key, 4)
        written = sample(teacher, jax.random.randint(keys[0], (16,), 0, classes), keys[1])
        own = sample(params, written[:, 0], keys[2])
        tokens = mix_sequences(keys[3], own, written, fraction)
        _, mask = next_tokens(tokens, answer_mask(tokens, prompt))

        def loss(params):
            losses = kl_divergence(params[tokens], teacher[tokens], where=mask[..., None])
            return sequence_loss(losses, mask, per_sequence=True)

        value, grads = jax.value_and_grad(loss)(params)
        return params - 3.0 * grads, value

    @jax.jit
    def train(params, keys):
        params, values = jax.lax.scan(step, params, keys)
        return params, values[-1], kl_divergence(params, teacher)

    _, value, left = train(jnp.zeros((classes, classes)), jax.random.split(key, 60))
    assert value < 1e-2
    assert jnp.max(left) < 3e-2


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_sharded_over_sequences(kind):
    losses, mask = (np.tile(x, (2, 1)) for x in some_losses())
    tokens = np.random.default_rng(0).integers(0, 4, size=(8, 6))

    def f(losses, tokens, mask):
        labels, keep = next_tokens(tokens, answer_mask(tokens, 2, end=3) | mask)
        logits = jnp.expand_dims(losses, -1) * jnp.arange(4.0)[None, None]
        per = sequence_kd_loss(logits, labels)
        return [sequence_loss(per, keep, per_sequence=p) for p in (False, True)]

    args = jnp.float32(losses), jnp.int32(tokens), jnp.asarray(mask)
    expected = jax.jit(f)(*args)
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        place = NamedSharding(mesh, PartitionSpec("d"))
        got = jax.jit(f)(*(jax.device_put(x, place) for x in args))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_errors_name_the_argument(key):
    x, mask, tokens = jnp.zeros((2, 3)), jnp.ones((2, 3), bool), jnp.zeros((2, 3), int)
    with pytest.raises(TypeError, match="sequence_loss: `losses` must be real floating-point"):
        sequence_loss(tokens, mask, per_sequence=True)
    with pytest.raises(ValueError, match="sequence_loss: `losses` must have a last axis"):
        sequence_loss(jnp.zeros(()), jnp.ones((), bool), per_sequence=True)
    with pytest.raises(TypeError, match=r"sequence_loss: `mask` must be booleans.*float32\[2, 3\]"):
        sequence_loss(x, x, per_sequence=True)
    with pytest.raises(ValueError, match="sequence_loss: `mask` must be booleans of the shape"):
        sequence_loss(x, mask[:1], per_sequence=True)
    with pytest.raises(TypeError, match="next_tokens: `tokens` must be integers"):
        next_tokens(x, mask)
    with pytest.raises(ValueError, match="next_tokens: `tokens` must have a last axis"):
        next_tokens(jnp.zeros((), int), mask)
    with pytest.raises(TypeError, match="answer_mask: `prompt_lengths` must be integers"):
        answer_mask(tokens, 1.0)
    with pytest.raises(ValueError, match="answer_mask: `prompt_lengths` must be one number, or"):
        answer_mask(tokens, jnp.zeros(3, int))
    with pytest.raises(ValueError, match="answer_mask: `end` must be one token"):
        answer_mask(tokens, 1, end=jnp.zeros(2, int))
    with pytest.raises(TypeError, match="sequence_kd_loss: `labels` must be integers"):
        sequence_kd_loss(x, x[:, 0])
    with pytest.raises(ValueError, match="sequence_kd_loss: `labels` must be integers, one per"):
        sequence_kd_loss(x, tokens)
    with pytest.raises(TypeError, match="mix_sequences: `key` must be one key"):
        mix_sequences(0, x, x, 0.5)
    with pytest.raises(ValueError, match=r"mix_sequences: `fraction` must .* in \[0.0, 1.0\]"):
        mix_sequences(key, x, x, 1.5)
    with pytest.raises(ValueError, match="mix_sequences: `fixed` must have the structure"):
        mix_sequences(key, x, x[:, :1], 0.5)
    with pytest.raises(TypeError, match=r"mix_sequences: `fixed` must have .*dtypes"):
        mix_sequences(key, x, tokens, 0.5)
    with pytest.raises(ValueError, match="mix_sequences: `sampled` must have sequences"):
        mix_sequences(key, {"a": x, "b": x[:1]}, {"a": x, "b": x[:1]}, 0.5)
    with pytest.raises(ValueError, match="mix_sequences: `sampled` must have sequences"):
        mix_sequences(key, jnp.zeros(()), jnp.zeros(()), 0.5)
