"""Phases, restricted training, decay of latents, what a projection gathers between finds."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
from tests import contract
from tests.conftest import lenient


def steps_of(opt, params, gradients):
    """Params and states after each of the gradients, as lists."""
    state, trail = opt.init(params), []
    update = jax.jit(opt.update)
    for g in gradients:
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
        trail.append((params, state))
    return trail


def gradients_of(count, seed=0):
    return [contract.params(seed=seed + 100 + i) for i in range(count)]


class TestAlternated:
    def test_phases_are_those_of_the_paper(self):
        p = jc.alternated(jc.prune(0.5), compressed=3, dense=2, begin=4, end=12)
        params = contract.params()
        opt = jc.projected(optax.sgd(0.01), p)
        active = []
        for now, state in steps_of(opt, params, gradients_of(16)):
            zeros = float((now["a"]["kernel"] == 0).mean())
            assert zeros in (0.0, 0.5)
            assert bool(state.structure.active) == (zeros == 0.5)
            active.append(zeros == 0.5)
        # Dense warm-up, 3 and 2 in turn from step 4 on, for good from step 12 on.
        assert active == [False] * 4 + [True] * 3 + [False] * 2 + [True] * 3 + [True] * 4

    def test_a_phase_holds_its_mask_and_the_next_one_finds_another(self):
        p = jc.alternated(jc.prune(0.5), compressed=3, dense=2)
        opt = jc.projected(optax.sgd(0.5), p)
        trail = steps_of(opt, contract.params(), gradients_of(8))
        masks = [np.asarray(s.structure.inner["a/kernel"].keep) for _, s in trail]
        for i in (1, 2, 3, 4, 6, 7):
            np.testing.assert_array_equal(masks[i], masks[i - 1])
        assert (masks[5] != masks[4]).any()

    def test_what_comes_back_starts_from_zero_with_moments_of_that_step(self):
        p = jc.alternated(jc.prune(0.5), compressed=2, dense=2)
        opt = jc.projected(optax.sgd(0.1, momentum=0.9), p)
        gradients = gradients_of(4)
        trail = steps_of(opt, contract.params(), gradients)
        dropped = ~np.asarray(trail[1][1].structure.inner["a/kernel"].keep)
        back, state = trail[2]
        momentum = np.asarray(state.inner[0].trace["a"]["kernel"])
        want = np.asarray(gradients[2]["a"]["kernel"])[dropped]
        np.testing.assert_array_equal(momentum[dropped], want)
        assert (momentum[~dropped] != 0).all()
        np.testing.assert_allclose(np.asarray(back["a"]["kernel"])[dropped], -0.1 * want, rtol=1e-5)

    @pytest.mark.parametrize("name", ["compressed", "dense"])
    def test_refuses_an_empty_phase(self, name):
        numbers = {"compressed": 1, "dense": 1, name: 0}
        with pytest.raises(ValueError, match=f"alternated: `{name}` must be"):
            jc.alternated(jc.prune(0.5), **numbers)


class TestRestricted:
    def test_only_kept_weights_move_whatever_the_optimizer_remembers(self):
        p = jc.every(1, jc.prune(0.5), end=0)
        params = contract.params()
        opt = jc.restricted(lenient(optax.adam(0.1)), p)
        (first, state), *_, (last, _) = steps_of(opt, params, gradients_of(4))
        keep = np.asarray(state.structure.inner["a/kernel"].keep)
        moved = np.asarray(last["a"]["kernel"] != params["a"]["kernel"])
        np.testing.assert_array_equal(moved, keep)
        assert (np.asarray(first["a"]["bias"]) != np.asarray(params["a"]["bias"])).all()

    def test_equals_masked_sgd_by_hand(self):
        params, gradients = contract.params(), gradients_of(3)
        opt = jc.restricted(optax.sgd(0.5, momentum=0.9), jc.prune(0.7))
        trail = steps_of(opt, params, gradients)
        w, trace = np.asarray(params["b"]["kernel"], np.float64), 0.0
        for g, (now, _) in zip(gradients, trail, strict=True):
            kept = np.abs(w) >= np.sort(np.abs(w).ravel())[-(32 - round(0.7 * 32))]
            trace = kept * np.asarray(g["b"]["kernel"], np.float64) + 0.9 * trace
            w = w - kept * 0.5 * trace
            np.testing.assert_allclose(now["b"]["kernel"], w, rtol=2e-5, atol=1e-6)

    def test_refuses_a_projection_that_drops_nothing(self):
        with pytest.raises(ValueError, match="restricted: `projection` must drop entries"):
            jc.restricted(optax.sgd(0.1), jc.quantize(4)).init(contract.params())

    def test_an_accumulation_inside_is_one_update(self):
        p = jc.prune(0.5, score=jc.pruning.movement())
        accumulated = optax.MultiSteps(optax.sgd(0.1), 2)
        opt = jc.restricted(lenient(accumulated.gradient_transformation()), p)
        params = contract.params()
        state, update = opt.init(params), jax.jit(opt.update)
        seen = []
        for i in range(4):
            updates, state = update(contract.params(seed=60 + i), state, params)
            params = optax.apply_updates(params, updates)
            seen.append((int(state.step), np.asarray(state.structure["a/kernel"].statistic)))
        assert [step for step, _ in seen] == [0, 1, 1, 2]
        np.testing.assert_array_equal(seen[1][1], seen[2][1])
        assert (seen[0][1] != seen[1][1]).any()

    def test_one_clock_for_a_vmap(self):
        opt = jc.restricted(optax.sgd(0.1), jc.every(10, jc.prune(0.5)))
        state = opt.init(contract.params())
        axes = jc.batch_axes(state)
        assert axes.step is None
        assert axes.structure.inner["a/kernel"].bits == 0


class TestDecay:
    @pytest.mark.parametrize("strength", [0.0, 0.3])
    def test_latents_follow_the_formula_of_sr_ste(self, strength):
        params, gradients = contract.params(), gradients_of(4)
        # As an array it is read, not skipped, also when it is zero.
        opt = jc.straight_through(optax.sgd(0.2), jc.prune(0.5), jnp.float32(strength))
        latent = np.asarray(params["b"]["kernel"], np.float64)
        shown = latent
        for g, (now, state) in zip(gradients, steps_of(opt, params, gradients), strict=True):
            pull = strength * (latent - shown)
            latent = latent - 0.2 * (np.asarray(g["b"]["kernel"], np.float64) + pull)
            keep = np.abs(latent) >= np.sort(np.abs(latent).ravel())[-16]
            shown = latent * keep
            np.testing.assert_allclose(jc.latent(state)["b"]["kernel"], latent, atol=1e-5)
            np.testing.assert_allclose(now["b"]["kernel"], shown, atol=1e-5)

    def test_a_schedule_is_read_at_each_step(self):
        params, gradients = contract.params(), gradients_of(3)
        late = lambda step: jnp.where(step >= 2, 0.5, 0.0)  # noqa: E731
        scheduled = steps_of(
            jc.straight_through(optax.sgd(0.2), jc.prune(0.5), late), params, gradients
        )
        plain = steps_of(jc.straight_through(optax.sgd(0.2), jc.prune(0.5)), params, gradients)
        same = [
            np.array_equal(jc.latent(a)["a"]["kernel"], jc.latent(b)["a"]["kernel"])
            for (_, a), (_, b) in zip(scheduled, plain, strict=True)
        ]
        assert same == [True, True, False]

    def test_refuses_a_negative_one(self):
        with pytest.raises(ValueError, match="straight_through: `decay` must be"):
            jc.straight_through(optax.sgd(0.1), jc.prune(0.5), -0.1)


def counting(params_seen=None):
    """A projection that counts the updates it saw, and shows the count in what it finds."""

    def find(params, *, previous=None, grads=None, step=0):
        seen = jnp.int32(0) if previous is None else previous["seen"]
        return {"seen": seen, "at_find": seen}

    def observe(params, structure, *, grads=None, step=0):
        return {**structure, "seen": structure["seen"] + 1}

    return jc.Projection(find, lambda w, s: w, lambda w, s: w, observe=observe)


WRAPPERS = {
    "every": (lambda p: jc.every(3, p), lambda s: s.inner),
    "alternated": (lambda p: jc.alternated(p, 2, 1), lambda s: s.inner),
    "masked": (lambda p: jc.masked(p, "a/*"), lambda s: s),
    "chain": (lambda p: jc.chain(jc.prune(0.5), p), lambda s: s.parts[1]),
    "partition": (lambda p: jc.partition({"a/*": p}), lambda s: s.parts["a/*"]),
    "relaxed": (lambda p: jc.relaxed(p, 0.5), lambda s: s.inner),
    "scheduled": (lambda p: jc.scheduled(lambda x: p)(0.5), lambda s: s.inner),
}
ADAPTERS = {
    "project_params": lambda p: jc.project_params(p),
    "projected": lambda p: jc.projected(optax.sgd(0.1), p),
    "straight_through": lambda p: jc.straight_through(optax.sgd(0.1), p),
    "restricted": lambda p: jc.restricted(optax.sgd(0.1), jc.chain(jc.prune(0.5), p)),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_combinators_hand_on_what_is_gathered(name):
    wrap, read = WRAPPERS[name]
    opt = jc.projected(optax.sgd(0.1), wrap(counting()))
    last = steps_of(opt, contract.params(), gradients_of(5))[-1][1]
    found = read(last.structure)
    assert int(found["seen"]) == 5
    held_since = {"every": 4, "alternated": 4}.get(name, 5)
    assert int(found["at_find"]) == held_since


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_observe_each_update(name):
    last = steps_of(ADAPTERS[name](counting()), contract.params(), gradients_of(3))[-1][1]
    structure = last.structure.parts[1] if name == "restricted" else last.structure
    assert int(structure["seen"]) == 3


def test_accumulation_inside_observes_applied_updates_only():
    accumulated = optax.MultiSteps(optax.sgd(0.1), 2)
    inner = lenient(optax.GradientTransformationExtraArgs(accumulated.init, accumulated.update))
    last = steps_of(jc.projected(inner, counting()), contract.params(), gradients_of(5))[-1][1]
    assert int(last.structure["seen"]) == 2


@pytest.mark.parametrize("adapter", ["project_params", "projected"])
@pytest.mark.parametrize("from_zero", [False, True])
def test_from_zero(adapter, from_zero):
    """A mask that swaps its two entries at each step."""

    def find(params, *, previous=None, grads=None, step=0):
        return {"keep": jnp.asarray(step, jnp.int32) % 2 == jnp.arange(2)}

    p = jc.Projection(
        find,
        lambda w, s: {"w": jnp.where(s["keep"], w["w"], 0.0)},
        lambda w, s: w,
        lambda w, s: {"w": s["keep"]},
        from_zero=from_zero,
    )
    opt = jc.project_params(p) if adapter == "project_params" else jc.projected(optax.identity(), p)
    params = {"w": jnp.array([2.0, 0.0])}
    ones = {"w": jnp.ones(2)}
    (one, _), (two, _) = steps_of(opt, params, [ones, ones])
    np.testing.assert_array_equal(one["w"], [3.0, 0.0])
    np.testing.assert_array_equal(two["w"], [0.0, 0.0 if from_zero else 1.0])
