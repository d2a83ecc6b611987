"""Rounds of pruning and rewinding against the algorithm in NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
from jaxcompress.pruning import lottery_tickets
from tests.conftest import counting_jit, lenient

RNG = np.random.default_rng(0)
PARAMS = {"w": jnp.asarray(RNG.normal(size=(16, 8)), jnp.float32), "b": jnp.ones(8)}
PUSH = RNG.normal(size=(16, 8)).astype(np.float32)


def drift(params, masks, begin, end):
    """A training whose result can be written down: each step adds a push of its own."""
    moved = {"w": params["w"] + sum((i + 1) * PUSH for i in range(begin, end)), "b": params["b"]}
    return jc.pruning.apply_masks(moved, masks)


def by_hand(sparsities, steps, rewind_to, reset_weights):
    push = lambda a, b: sum(i + 1 for i in range(a, b)) * PUSH.astype(np.float64)  # noqa: E731
    start = np.asarray(PARAMS["w"], np.float64) + push(0, rewind_to)
    mask = np.ones_like(start, bool)
    w = start + push(rewind_to, steps)
    yield w, mask
    for s in sparsities:
        order = np.argsort(np.abs(w).ravel() - 1e9 * ~mask.ravel())
        mask = mask.copy()
        mask.ravel()[order[: round(s * w.size)]] = False
        w = ((start if reset_weights else w) + push(rewind_to, steps)) * mask
        yield w, mask


@pytest.mark.parametrize("reset_weights", [True, False])
@pytest.mark.parametrize("rewind_to", [0, 2])
def test_is_the_algorithm(rewind_to, reset_weights):
    sparsities = [0.25, 0.5, 0.5, 0.875]
    options = {"steps": 5, "rewind_to": rewind_to, "reset_weights": reset_weights}
    rounds = list(lottery_tickets(drift, PARAMS, sparsities, **options))
    assert [r.sparsity for r in rounds] == [0.0, *sparsities]
    for found, (w, mask) in zip(rounds, by_hand(sparsities, **options), strict=True):
        np.testing.assert_array_equal(found.masks["w"], mask)
        assert found.masks["b"] is None
        np.testing.assert_allclose(found.params["w"], w, atol=1e-4)


def test_each_training_gets_its_span_and_is_made_when_asked_for():
    spans = []

    def train(params, masks, begin, end):
        spans.append((begin, end))
        return drift(params, masks, begin, end)

    rounds = lottery_tickets(train, PARAMS, [0.5, 0.9], steps=4, rewind_to=1)
    assert spans == []
    next(rounds)
    assert spans == [(0, 1), (1, 4)]
    next(rounds)
    assert spans[2:] == [(1, 4)]


def test_training_with_held_masks_compiles_once():
    x = jnp.asarray(RNG.normal(size=(32, 16)), jnp.float32)

    def run(params, masks):
        opt = jc.projected(lenient(optax.adam(1e-2)), jc.pruning.from_masks(masks))
        loss = lambda p: jnp.mean((x @ p["w"] + p["b"][None, :] - 1.0) ** 2)  # noqa: E731

        def step(carry, _):
            params, state = carry
            updates, state = opt.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, opt.init(params)), length=4)[0][0]

    run = counting_jit(run)

    def method(sparsity):
        return jc.prune(sparsity, scope="global", groups=jc.pruning.slices(-1))

    train = lambda params, masks, begin, end: run(params, masks)  # noqa: E731
    rounds = list(lottery_tickets(train, PARAMS, [0.25, 0.5, 0.75], steps=4, method=method))
    assert run.traces == 1
    columns = [int(r.masks["w"].all(0).sum()) for r in rounds]
    assert columns == [8, 6, 4, 2]
    for before, after in itertools.pairwise(rounds):
        assert not (after.masks["w"] & ~before.masks["w"]).any()
        np.testing.assert_array_equal(after.params["w"] == 0, ~after.masks["w"])


def test_a_training_may_donate_its_params():
    before = jax.tree.map(np.asarray, PARAMS)
    step = jax.jit(lambda params, masks: pruned(params, masks), donate_argnums=0)
    train = lambda params, masks, begin, end: step(params, masks)  # noqa: E731
    rounds = list(lottery_tickets(train, PARAMS, [0.5, 0.75], steps=1))
    assert len(rounds) == 3
    jax.tree.map(np.testing.assert_array_equal, PARAMS, before)


def pruned(params, masks):
    new = jax.tree.map(lambda w: 0.9 * w, params)
    return jc.pruning.apply_masks(new, masks)


def test_what_does_not_fit_is_refused():
    narrow = lambda params, masks, begin, end: jax.tree.map(  # noqa: E731
        lambda w: w.astype(jnp.bfloat16), params
    )
    with pytest.raises(ValueError, match=r"of the same shapes and dtypes .* got bfloat16"):
        next(lottery_tickets(narrow, PARAMS, [0.5], steps=2))
    with pytest.raises(ValueError, match=r"`sparsities` must be a real number in \[0\.5, 1\]"):
        lottery_tickets(drift, PARAMS, [0.5, 0.25], steps=2)
    with pytest.raises(ValueError, match="`rewind_to` must be a static integer"):
        lottery_tickets(drift, PARAMS, [0.5], steps=2, rewind_to=3)
    with pytest.raises(TypeError, match="lottery_tickets: `train` must be a function"):
        lottery_tickets(None, PARAMS, [0.5], steps=2)  # pyright: ignore[reportArgumentType]
    careless = lambda params, masks, begin, end: jax.tree.map(jnp.ones_like, params)  # noqa: E731
    rounds = lottery_tickets(careless, PARAMS, [0.5], steps=2)
    next(rounds)
    with pytest.raises(ValueError, match=r"`train` must hold its masks, .* at 'w'"):
        next(rounds)
    other = lambda params, masks, begin, end: {"w": params["w"]}  # noqa: E731
    with pytest.raises(ValueError, match="must return params of the same structure"):
        next(lottery_tickets(other, PARAMS, [0.5], steps=2))
    with pytest.raises(ValueError, match="`method` must give a projection that drops weights"):
        next(lottery_tickets(drift, PARAMS, [0.5], steps=2, method=lambda s: jc.quantize(8)))
