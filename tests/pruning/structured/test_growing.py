"""Growing regularization: the decay of the paper by loops, until units vanish."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
from jaxcompress.pruning.structured._growing import GrowingState, growing_regularization
from jaxcompress.pruning.structured._kept_units import kept_units
from jaxcompress.pruning.structured._projection import prune_groups
from tests.conftest import lenient
from tests.pruning.structured import by_hand


def applied(params, updates):
    with jax.numpy_dtype_promotion("standard"):
        return optax.apply_updates(params, updates)


@pytest.mark.parametrize("name", ["mlp", "stack"])
def test_it_is_the_decay_of_the_paper(name):
    """Every `period` updates the decay of the marked units grows by `increase` to `ceiling`."""
    model = {"mlp": by_hand.mlp, "stack": by_hand.stack}[name]()
    p = prune_groups(model.dependencies, 0.5)
    grow = growing_regularization(p, 0.3, 2, 0.7)
    opt = optax.chain(grow, lenient(optax.sgd(0.1)))
    params, state = model.params, opt.init(model.params)
    group = model.dependencies.groups[0]
    keep = kept_units(model.dependencies, state).masks[group.name]
    marked = {path: np.zeros(w.shape, bool) for path, w in by_hand.by_paths(params).items()}
    for layer, unit in by_hand.units(group):
        if not keep[(*layer, unit)]:
            for path, n in by_hand.places(model, group, layer, unit).items():
                marked[path] |= n > 0
    want = by_hand.by_paths(params)
    grads = jax.tree.map(lambda w: 0.2 * jnp.cos(7.0 * w), params)
    decay = [0.0, 0.0, 0.3, 0.3, 0.6, 0.6, 0.7, 0.7, 0.7]
    update = jax.jit(opt.update)
    for strength in decay:
        updates, state = update(grads, state, params)
        params = applied(params, updates)
        for path, g in by_hand.by_paths(grads).items():
            pressed = g + strength * np.where(marked[path], want[path], 0.0)
            want[path] = want[path] - 0.1 * pressed
        for path, w in by_hand.by_paths(params).items():
            np.testing.assert_allclose(w, want[path], atol=1e-5)
    assert isinstance(state[0], GrowingState)
    assert int(state[0].step) == len(decay)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))


def test_marked_units_vanish_and_their_removal_changes_little():
    model = by_hand.mlp()
    x = jnp.asarray(by_hand.values(64, 6, seed=11))
    loss = lambda p: jnp.mean((model.fn(p, x) - model.fn(model.params, x)) ** 2)  # noqa: E731
    p = prune_groups(model.dependencies, 0.5)
    opt = optax.chain(growing_regularization(p, 0.05, 10, 3.0), lenient(optax.sgd(0.1)))

    def step(carry, _):
        params, state = carry
        updates, state = opt.update(jax.grad(loss)(params), state, params)
        return (applied(params, updates), state), None

    (params, state), _ = jax.jit(lambda w: jax.lax.scan(step, (w, opt.init(w)), length=900))(
        model.params
    )
    removed = p.project(params, state[0].structure)
    keep = kept_units(model.dependencies, state).masks["a/kernel[1]"]
    gone = np.asarray(removed["a"]["bias"] == 0)
    np.testing.assert_array_equal(gone, ~keep)
    assert gone.sum() == 4
    assert float(jnp.abs(params["a"]["kernel"][:, gone]).max()) < 1e-3
    assert float(jnp.abs(params["b"]["kernel"][gone]).max()) < 1e-3
    assert float(jnp.abs(params["b"]["kernel"][~gone]).max()) > 0.3
    at_once = float(loss(jc.compress(p, model.params)))
    assert float(loss(removed)) < 0.5 * at_once
    assert abs(float(loss(removed)) - float(loss(params))) < 1e-4


def test_any_projection_with_masks_will_do_and_numbers_are_traced():
    params = {"w": jnp.array([[1.0, -4.0], [3.0, 0.5]])}

    def pressed(increase, period, ceiling):
        grow = growing_regularization(jc.prune(0.5), increase, period, ceiling)
        state = grow.init(params)
        grads = jax.tree.map(jnp.zeros_like, params)
        for _ in range(5):
            out, state = grow.update(grads, state, params)
        return out["w"]

    found = jax.jit(jax.vmap(pressed))(
        jnp.array([0.1, 0.1, 1.0]), jnp.array([1.0, 2.0, 1.0]), jnp.array([9.0, 9.0, 0.3])
    )
    for got, strength in zip(found, (0.4, 0.2, 0.3), strict=True):
        np.testing.assert_allclose(got, strength * np.array([[1.0, 0.0], [0.0, 0.5]]), rtol=1e-6)


def test_narrow_updates_keep_their_dtype():
    model = by_hand.mlp(jnp.bfloat16)
    grow = growing_regularization(prune_groups(model.dependencies, 0.5), 0.25, 1, 8.0)
    state = grow.init(model.params)
    grads = jax.tree.map(jnp.zeros_like, model.params)
    for _ in range(3):
        out, state = grow.update(grads, state, model.params)
    assert out["a"]["kernel"].dtype == jnp.bfloat16
    gone = np.asarray(out["a"]["bias"] != 0)
    assert gone.sum() == 4
    want = 0.5 * np.asarray(model.params["a"]["bias"], np.float32)
    np.testing.assert_array_equal(np.asarray(out["a"]["bias"], np.float32)[gone], want[gone])


def test_what_does_not_fit_is_refused():
    model = by_hand.mlp()
    p = prune_groups(model.dependencies, 0.5)
    with pytest.raises(TypeError, match=r"growing_regularization: `projection` must be"):
        growing_regularization(model.dependencies, 0.1, 1, 1.0)
    for numbers, name in (((-1, 1, 1), "increase"), ((1, 0, 1), "period"), ((1, 1, -1), "ceiling")):
        with pytest.raises(ValueError, match=rf"growing_regularization: `{name}` must be"):
            growing_regularization(p, *numbers)
    with pytest.raises(ValueError, match=r"`projection` must drop entries"):
        growing_regularization(jc.quantize(4), 1, 1, 1).init(model.params)
    grow = growing_regularization(p, 1, 1, 1)
    with pytest.raises(ValueError, match=r"growing_regularization: `params` must be given"):
        grow.update(model.params, grow.init(model.params))
