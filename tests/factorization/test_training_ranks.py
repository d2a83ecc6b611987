"""Hard ranks in training: projected with a schedule from full to target, and straight-through."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
from tests.conftest import counting_jit

FULL, BEGIN, END = 6, 2, 10


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def falling(target):
    """From the full rank to a target, a number or traced."""

    def schedule(step):
        part = jnp.clip((step - BEGIN) / (END - BEGIN), 0.0, 1.0)
        return FULL + part * (jnp.asarray(target).astype(jnp.float32) - FULL)

    return schedule


def held(target, period):
    """The rank in force after the update of each step: that of the last find."""
    ranks = []
    for step in range(END + 4):
        found = step - step % period
        part = min(max((found - BEGIN) / (END - BEGIN), 0.0), 1.0)
        ranks.append(int(np.round(np.float32(FULL + part * (target - FULL)))))
    return ranks


def train(opt, w, goal, steps=END + 4):
    """All params, as one scan."""

    def step(carry, _):
        w, state = carry
        updates, state = opt.update(w - goal, state, w)
        w = optax.apply_updates(w, updates)
        return (w, state), (w, state)

    return jax.lax.scan(step, (w, opt.init(w)), length=steps)[1]


def rank_of(w):
    return np.linalg.matrix_rank(np.asarray(w, np.float64), rtol=1e-5)


def scheduled(target, period=1, optimizer=None, use=jc.projected):
    rank = jc.scheduled(jc.low_rank)(rank=falling(target), max_rank=FULL)
    return use(optimizer or optax.sgd(0.2), jc.every(period, rank))


@pytest.mark.parametrize("period", [1, 3])
@pytest.mark.parametrize("shape", [(8, 6), (2, 3, 8)])
def test_a_schedule_from_full_to_target(shape, period):
    opt = scheduled(2, period)
    w, state = jax.jit(lambda w: train(opt, w, draw(*shape, seed=1)))(draw(*shape))
    ranks = [rank_of(x.reshape(-1, shape[-1])) for x in w]
    assert ranks == held(2, period)
    assert (ranks[0], ranks[-1]) == (FULL, 2)
    last = jax.tree.map(lambda x: x[-1], state)
    assert float(jc.structure(last).inner.hyperparams["rank"]) == 2
    packed = jc.pack(last, w[-1])
    assert packed.rank == 2
    np.testing.assert_allclose(packed.todense(), w[-1], atol=1e-5)


def projected_reference(w, goal, target, period, rate):
    """Projected gradient descent in float64, on the subspace of the shorter side that is held."""
    out, left = [], w.shape[0] <= w.shape[1]
    for step, rank in enumerate(held(target, period)):
        w = w - rate * (w - goal)
        if step % period == 0:
            u, _, vt = np.linalg.svd(w, full_matrices=False)
            q = u[:, :rank] if left else vt[:rank].T
        w = q @ (q.T @ w) if left else (w @ q) @ q.T
        out.append(w)
    return out


@pytest.mark.parametrize("shape", [(8, 6), (6, 8)])
@pytest.mark.parametrize("period", [1, 4])
def test_projected_is_a_loop_of_numpy(shape, period):
    w, goal = draw(*shape), draw(*shape, seed=1)
    got, _ = jax.jit(lambda w: train(scheduled(2, period), w, goal))(w)
    want = projected_reference(
        np.asarray(w, np.float64), np.asarray(goal, np.float64), 2, period, 0.2
    )
    np.testing.assert_allclose(got, np.stack(want), atol=1e-4)


def test_straight_through_is_a_loop_of_numpy_with_dense_latents():
    w, goal = draw(8, 6), draw(8, 6, seed=1)
    opt = jc.straight_through(optax.sgd(0.2), jc.low_rank(2))
    got, state = jax.jit(lambda w: train(opt, w, goal))(w)
    latent, seen = np.asarray(w, np.float64), np.asarray(w, np.float64)
    for i in range(len(got)):
        latent = latent - 0.2 * (seen - np.asarray(goal, np.float64))
        u, s, vt = np.linalg.svd(latent, full_matrices=False)
        seen = (u[:, :2] * s[:2]) @ vt[:2]
        np.testing.assert_allclose(got[i], seen, atol=1e-4)
        np.testing.assert_allclose(jc.latent(state)[i], latent, atol=1e-4)
        assert rank_of(got[i]) == 2
    last = jax.tree.map(lambda x: x[-1], state)
    assert rank_of(jc.latent(last)) == 6
    packed = jc.pack(last, got[-1])
    assert packed.rank == 2
    np.testing.assert_allclose(packed.todense(), got[-1], atol=1e-5)


@pytest.mark.parametrize("use", [jc.projected, jc.straight_through])
def test_vmap_over_the_target_equals_a_loop(use):
    w, goal = draw(8, 6), draw(8, 6, seed=1)

    def one(target):
        return train(scheduled(target, 2, use=use), w, goal)[0][-1]

    alone = counting_jit(one)
    targets = jnp.array([1, 3, 6])
    mapped = jax.jit(jax.vmap(one))(targets)
    for i, target in enumerate((1, 3, 6)):
        np.testing.assert_allclose(mapped[i], alone(targets[i]), atol=1e-5)
        assert rank_of(mapped[i]) == target
    assert alone.traces == 1


def test_a_find_between_periods_is_skipped_also_in_a_batch():
    opt = scheduled(2, 3)
    many = jnp.stack([draw(8, 6), draw(8, 6, seed=2)])
    axes = jc.batch_axes(jax.eval_shape(opt.init, many[0]))
    state = jax.vmap(opt.init, out_axes=axes)(many)
    update = jax.jit(jax.vmap(opt.update, in_axes=(0, axes, 0), out_axes=(0, axes)))
    assert "stablehlo.case" in update.lower(many, state, many).as_text()
    _, first = update(many, state, many)
    _, second = update(many, first, many)
    np.testing.assert_array_equal(
        jc.structure(second).inner.inner[""].vectors, jc.structure(first).inner.inner[""].vectors
    )
    assert int(second.step) == 2


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("use", [jc.projected, jc.straight_through])
def test_narrow_dtypes(use, dtype):
    """The params are those of float32, rounded: of full rank by the rounding alone."""
    w, goal = draw(8, 6).astype(dtype), draw(8, 6, seed=1).astype(dtype)
    opt = use(optax.sgd(0.2), jc.low_rank(2))
    with jax.numpy_dtype_promotion("standard"):
        got, _ = jax.jit(lambda w: train(opt, w, goal, 6))(w)
    assert got.dtype == dtype
    s = np.linalg.svd(np.asarray(got[-1], np.float64), compute_uv=False)
    assert s[2] < 4 * float(jnp.finfo(dtype).eps) * s[0]


def test_it_ends_at_the_best_matrix_of_the_target_rank():
    goal = draw(8, 6, seed=1)
    u, s, vt = np.linalg.svd(goal, full_matrices=False)
    best = (u[:, :2] * s[:2]) @ vt[:2]
    opt = scheduled(2, 1, optimizer=optax.sgd(0.5))
    got, _ = jax.jit(lambda w: train(opt, w, goal, 60))(draw(8, 6))
    np.testing.assert_allclose(got[-1], best, atol=1e-3)
