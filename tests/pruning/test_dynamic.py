"""Dynamic sparse training against its papers in NumPy: what is dropped, grown, and kept."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
from tests import contract
from tests.conftest import counting_jit, lenient

pr = jc.pruning
KEY = jax.random.key(0)


def f64(x):
    return np.asarray(x, np.float64)


def best(scores, count):
    keep = np.zeros(scores.size, bool)
    keep[np.argsort(-scores.ravel(), kind="stable")[:count]] = True
    return keep.reshape(scores.shape)


def trail(opt, params, count):
    """Params, state and gradients before each update, and a last time after all."""
    state, out = opt.init(params), []
    update = counting_jit(opt.update)
    for i in range(count):
        g = contract.params(seed=70 + i)
        out.append((params, state, g))
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
    assert update.traces == 1
    return [*out, (params, state, None)]


def keep_of(state, path="a/kernel"):
    held = state.structure
    return np.asarray((held.inner if hasattr(held, "inner") else held)[path].keep)


class TestRigl:
    def test_drops_the_smallest_and_grows_by_the_dense_gradient(self):
        alpha = jc.schedules.cosine(0.5, 0.0, 0, 8)
        opt = jc.projected(optax.sgd(0.1), pr.rigl(0.75, alpha, key=KEY))
        steps = trail(opt, contract.params(), 8)
        changed = 0
        for i, ((w, state, g), (_, after, _)) in enumerate(itertools.pairwise(steps)):
            keep, grad = keep_of(state), f64(g["a"]["kernel"])
            moved = f64(w["a"]["kernel"]) - 0.1 * grad
            count = round(float(alpha(i)) * 32)
            survivors = best(np.where(keep, np.abs(moved), -1.0), 32 - count)
            grown = best(np.where(survivors, -1.0, np.abs(grad)), count)
            np.testing.assert_array_equal(keep_of(after), survivors | grown)
            changed += int((keep_of(after) != keep).sum())
        assert changed > 0

    def test_density_is_constant_and_only_what_changed_has_new_state(self):
        p = jc.every(3, pr.rigl(0.75, 0.4, key=KEY, budget=pr.erdos_renyi()), begin=0, end=12)
        opt = jc.projected(lenient(optax.adam(0.01)), p)
        steps = trail(opt, contract.params(), 16)
        # Erdos-Renyi on (16, 8) and (8, 4): 40 of 160, by (24 / 128) and (12 / 32).
        epsilon = 40 / (24 + 12)
        wanted = {"a/kernel": round(24 * epsilon), "b/kernel": 40 - round(24 * epsilon)}
        for i in range(1, 17):
            w, state, _ = steps[i]
            for path, count in wanted.items():
                keep, before = keep_of(state, path), keep_of(steps[i - 1][1], path)
                assert keep.sum() == count
                layer = path.split("/")[0]
                weights = np.asarray(w[layer]["kernel"])
                assert (weights[~keep] == 0).all()
                new = keep & ~before
                assert new.any() or (i - 1) % 3 != 0 or i > 13
                if i > 1:
                    assert (weights[new] == 0).all()
                    moments = state.inner[0]
                    for moment in (moments.mu, moments.nu):
                        values = np.asarray(moment[layer]["kernel"])
                        assert (values[new] == 0).all()
                        assert (values[keep & before] != 0).all()
        np.testing.assert_array_equal(keep_of(steps[14][1]), keep_of(steps[16][1]))

    def test_a_rising_sparsity_is_granet(self):
        sparsity = jc.schedules.cubic(0.0, 0.9, 0, 10)
        opt = jc.projected(optax.sgd(0.05), pr.rigl(sparsity, 0.3, key=KEY))
        steps = trail(opt, contract.params(), 13)
        for i in range(1, 14):
            want = 128 - round(float(sparsity(i - 1)) * 128)
            assert keep_of(steps[i][1]).sum() == want

    def test_a_falling_sparsity_grows_what_is_missing(self):
        sparsity = jc.schedules.linear(0.9, 0.2, 0, 4)
        opt = jc.projected(optax.sgd(0.05), pr.rigl(sparsity, 0.0, key=KEY))
        steps = trail(opt, contract.params(), 6)
        for i in range(1, 7):
            assert keep_of(steps[i][1]).sum() == 128 - round(float(sparsity(i - 1)) * 128)

    def test_the_first_mask_is_random_or_as_asked(self):
        params = contract.params()
        random = pr.rigl(0.5, key=KEY).find(params)["a/kernel"].keep
        same = jc.prune(0.5, score=pr.random(KEY)).find(params)["a/kernel"].keep
        np.testing.assert_array_equal(random, same)
        ranked = pr.rigl(0.5, key=KEY, initial=pr.magnitude).find(params)["a/kernel"].keep
        np.testing.assert_array_equal(ranked, best(np.abs(f64(params["a"]["kernel"])), 64))

    def test_needs_gradients(self):
        opt = jc.project_params(pr.rigl(0.5, key=KEY))
        params = contract.params()
        with pytest.raises(ValueError, match="rigl: `grads` must be given, got None at 'a/kernel'"):
            opt.update(params, opt.init(params), params)
        opt.update(params, opt.init(params), params, grads=params)

    def test_works_with_many_optimizers(self):
        """jaxpruner's works with 6 of 18 and crashes on models with biases."""
        for make in (
            optax.sgd,
            optax.noisy_sgd,
            optax.adam,
            optax.adamw,
            optax.adamax,
            optax.adabelief,
            optax.amsgrad,
            optax.lion,
            optax.rmsprop,
            optax.adagrad,
            optax.adafactor,
            optax.lamb,
            optax.yogi,
            optax.nadam,
            optax.radam,
            optax.novograd,
            optax.sm3,
            optax.fromage,
        ):
            extra = {"key": KEY} if make is optax.noisy_sgd else {}
            p = jc.masked(pr.rigl(0.75, 0.5, key=KEY), "a/kernel")
            opt = jc.projected(lenient(make(0.01, **extra)), p)
            params, update = contract.params(), jax.jit(opt.update)
            before = opt.init(params)
            for seed in (1, 2):
                updates, state = update(contract.params(seed=seed), before, params)
                params = optax.apply_updates(params, updates)
                keep, held = keep_of(state), keep_of(before)
                assert keep.sum() == 32
                assert (keep != held).any()
                kernel = np.asarray(params["a"]["kernel"])
                # What has just been grown is zero too.
                np.testing.assert_array_equal(kernel != 0, keep & held)
                assert (np.asarray(params["a"]["bias"]) != 0).all(), make
                before = state

    def test_nan_and_infinite_gradients_keep_the_count(self):
        params, g = contract.params(), contract.params(seed=1)
        g["a"]["kernel"] = g["a"]["kernel"].at[0].set(jnp.nan).at[1].set(jnp.inf)
        opt = jc.projected(optax.identity(), pr.rigl(0.75, 0.5, key=KEY))
        _, state = opt.update(g, opt.init(params), params)
        assert keep_of(state).sum() == 32
        nothing = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), g)
        _, state = opt.update(nothing, opt.init(params), params)
        assert keep_of(state).sum() == 32


class TestGroups:
    """jaxpruner's N:M masks never change."""

    @pytest.mark.parametrize("way", ["rigl", "sparse_evolution"])
    def test_n_of_each_m_live_and_the_mask_moves(self, way):
        opt = jc.projected(optax.sgd(0.1), getattr(pr, way)(nm=(2, 4), key=KEY))
        steps = trail(opt, contract.params(), 6)
        for (_, state, _), (params, after, _) in itertools.pairwise(steps):
            keep, before = keep_of(after), keep_of(state)
            assert (keep.reshape(4, 4, 8).sum(1) == 2).all()
            # A third of two is one: at most one of each group is exchanged.
            assert ((keep & before).reshape(4, 4, 8).sum(1) >= 1).all()
            assert (keep != before).any()
            np.testing.assert_array_equal(np.asarray(params["a"]["kernel"]) != 0, keep & before)

    def test_by_the_gradient_in_each_group(self):
        opt = jc.projected(optax.sgd(0.1), pr.rigl(None, 0.5, key=KEY, nm=(2, 4)))
        for (w, state, g), (_, after, _) in itertools.pairwise(trail(opt, contract.params(), 3)):
            keep, grad = keep_of(state), f64(g["a"]["kernel"])
            moved = np.where(keep, np.abs(f64(w["a"]["kernel"]) - 0.1 * grad), -1.0)
            want = np.zeros_like(keep)
            for i in range(0, 16, 4):
                for j in range(8):
                    s = best(moved[i : i + 4, j], 1)
                    grown = best(np.where(s, -1.0, np.abs(grad[i : i + 4, j])), 1)
                    want[i : i + 4, j] = s | grown
            np.testing.assert_array_equal(keep_of(after), want)

    def test_ragged_groups_axes_and_packing(self):
        params = {"w": jax.random.normal(KEY, (3, 6))}
        p = pr.sparse_evolution(nm=(1, 4), axis=-1, key=KEY)
        opt = jc.projected(optax.sgd(0.1), p)
        updates, state = opt.update(params, opt.init(params), params)
        keep = np.asarray(state.structure["w"].keep)
        assert (keep[:, :4].sum(1) == 1).all()
        assert (keep[:, 4:].sum(1) == 1).all()
        assert state.structure["w"].nm == (1, 4)
        packed = jc.pack(state, optax.apply_updates(params, updates))
        np.testing.assert_array_equal(jc.todense(packed)["w"] != 0, keep & (updates["w"] != 0))

    def test_bad_input(self):
        for make in (pr.rigl, pr.sparse_evolution):
            with pytest.raises(ValueError, match="`sparsity` must be given, or else `nm`"):
                make(0.5, key=KEY, nm=(2, 4))
            with pytest.raises(ValueError, match="`sparsity` must be given, or else `nm`"):
                make(key=KEY)
            with pytest.raises(ValueError, match="`budget` must be left out with `nm`"):
                make(key=KEY, nm=(2, 4), budget=pr.uniform())
            with pytest.raises(TypeError, match=r"`nm` must be a tuple \(n, m\), got 2"):
                make(key=KEY, nm=2)


class TestSparseEvolution:
    def test_drops_the_smallest_and_grows_at_random(self):
        p = pr.sparse_evolution(0.75, 0.25, key=KEY)
        opt = jc.project_params(p)
        steps = trail(optax.chain(optax.sgd(0.1), opt), contract.params(), 6)
        places = []
        for (w, state, g), (_, after, _) in itertools.pairwise(steps):
            keep, now = keep_of(state[1]), keep_of(after[1])
            moved = f64(w["a"]["kernel"]) - 0.1 * f64(g["a"]["kernel"])
            survivors = best(np.where(keep, np.abs(moved), -1.0), 24)
            assert now[survivors].all()
            assert now.sum() == 32
            places.append(tuple(np.flatnonzero(now & ~survivors)))
        assert len(set(places)) == len(places)

    def test_growth_is_uniform_over_the_dead(self):
        params = {"w": jnp.arange(1.0, 17.0).reshape(4, 4)}
        first = {"w": jc.pruning.Mask.of(jnp.arange(16).reshape(4, 4) >= 12)}

        def grown(key):
            p = pr.sparse_evolution(0.75, 0.5, key=key)
            return p.find(params, previous=first, step=3)["w"].keep

        masks = np.asarray(jax.vmap(grown)(jax.random.split(KEY, 2000)), np.float64)
        assert (masks[:, 3, 2:] == 1).all()
        # Two of the fourteen that are dead after the drop, each as likely.
        share = masks.mean(0).ravel()[:14]
        assert np.abs(share - 2 / 14).max() < 5 * np.sqrt(2 / 14 * 12 / 14 / 2000)


class TestTopKast:
    def test_runs_on_the_largest_and_trains_the_next(self):
        opt = pr.top_kast(optax.sgd(0.1), 0.75, 0.5, 0.01)
        steps = trail(opt, contract.params(), 5)
        latent = f64(contract.params()["a"]["kernel"])
        shown = latent
        for (_w, _, g), (after, state, _) in itertools.pairwise(steps):
            backward = best(np.abs(latent), 64)
            decay = 0.01 * latent + 0.01 * (1 / 0.25 - 1) * (latent - shown)
            latent = latent - 0.1 * backward * (f64(g["a"]["kernel"]) + decay)
            shown = latent * best(np.abs(latent), 32)
            np.testing.assert_allclose(jc.latent(state)["a"]["kernel"], latent, atol=1e-5)
            np.testing.assert_allclose(after["a"]["kernel"], shown, atol=1e-5)

    def test_decays_what_runs_by_one_and_the_rest_by_the_inverse_density(self):
        """The gradient of the exploration loss, by automatic differentiation."""
        params = contract.params()
        opt = pr.top_kast(optax.sgd(1.0), 0.75, 0.5, 0.01, refresh=100)
        (_, state, _), (w, state, _), _ = trail(opt, params, 2)
        latent = f64(jc.latent(state)["a"]["kernel"])
        zero = jax.tree.map(jnp.zeros_like, params)
        _, after = opt.update(zero, state, w)
        a = keep_of(state)
        b = np.asarray(state.inner.structure.inner["a/kernel"].keep)
        assert (a <= b).all()
        want = latent - 0.01 * np.where(a, latent, np.where(b, latent / 0.25, 0.0))
        np.testing.assert_allclose(jc.latent(after)["a"]["kernel"], want, atol=1e-5)

    @pytest.mark.parametrize(("forward", "backward"), [(0.5, 0.6), (1.0, 0.5), (1.5, 0.5)])
    def test_bad_numbers(self, forward, backward):
        with pytest.raises(ValueError, match="top_kast: `forward` must be"):
            pr.top_kast(optax.sgd(0.1), forward, backward)


@pytest.mark.parametrize("make", [pr.rigl, pr.sparse_evolution])
def test_numbers_are_checked(make):
    with pytest.raises(ValueError, match=f"{make.__name__}: `sparsity`"):
        make(1.5, key=KEY)
    with pytest.raises(ValueError, match=f"{make.__name__}: `drop_fraction`"):
        make(0.5, -0.1, key=KEY)


def test_one_clock_for_a_whole_vmap():
    """jaxpruner's `cond` becomes a `select` under a batched step counter."""
    params = contract.params()
    opt = jc.projected(optax.sgd(0.1), jc.every(10, pr.rigl(0.75, key=KEY)))
    axes = jc.batch_axes(jax.eval_shape(opt.init, params))
    many = jax.tree.map(lambda w: jnp.stack([w, 2 * w]), params)
    states = jax.vmap(opt.init, out_axes=axes)(many)
    update = jax.vmap(opt.update, in_axes=(0, axes, 0), out_axes=(0, axes))
    text = str(jax.make_jaxpr(update)(many, states, many))
    assert "cond[" in text
