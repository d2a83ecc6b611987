"""Scores against NumPy; running scores in training; what is compared with what."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
from tests import contract
from tests.conftest import counting_jit

pr = jc.pruning


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def best(scores, count):
    order = np.argsort(-scores.ravel(), kind="stable")[:count]
    keep = np.zeros(scores.size, bool)
    keep[order] = True
    return keep.reshape(scores.shape)


def lamp_by_loops(w):
    squares = w.astype(np.float64).ravel() ** 2
    order = np.argsort(-squares, kind="stable")
    out, total = np.zeros_like(squares), 0.0
    for i in order:
        total += squares[i]
        out[i] = squares[i] / total if total else 0.0
    return out.reshape(w.shape)


class TestLamp:
    @pytest.mark.parametrize("scale", [1.0, 1e-25, 1e25])
    def test_is_the_formula(self, scale):
        w = draw(7, 9)
        found = pr.lamp({"w": jnp.asarray(w * np.float32(scale))})["w"]
        np.testing.assert_allclose(found, lamp_by_loops(w), rtol=1e-5)

    def test_ties_zeros_and_nan(self):
        w = np.array([[2.0, -2.0], [0.0, np.nan]], np.float32)
        np.testing.assert_allclose(pr.lamp({"w": jnp.asarray(w)})["w"], [[1, 0.5], [0, 0]])
        np.testing.assert_array_equal(pr.lamp({"w": jnp.zeros((2, 2))})["w"], np.zeros((2, 2)))
        assert pr.lamp({"w": jnp.zeros((0, 2))})["w"].shape == (0, 2)

    def test_a_global_scope_spares_the_small_leaf(self):
        params = {"big": jnp.asarray(draw(16, 8)), "small": jnp.asarray(0.01 * draw(8, 4))}
        masks = jc.prune(0.75, score=pr.lamp, scope="global").find(params)
        scores = np.concatenate(
            [lamp_by_loops(np.asarray(params[p])).ravel() for p in ("big", "small")]
        )
        want = best(scores, 160 - 120)
        np.testing.assert_array_equal(masks["big"].keep.ravel(), want[:128])
        np.testing.assert_array_equal(masks["small"].keep.ravel(), want[128:])
        assert int(masks["small"].keep.sum()) > 0


class TestRandom:
    def test_depends_on_key_path_and_step_alone(self):
        params = {"a": jnp.ones((16, 8)), "b": jnp.ones((16, 8))}
        p = jc.prune(0.5, score=pr.random(jax.random.key(0)))
        first = p.find(params)
        alone = p.find({"b": params["b"]})
        np.testing.assert_array_equal(first["b"].keep, alone["b"].keep)
        assert (first["a"].keep != first["b"].keep).any()
        assert (first["a"].keep != p.find(params, step=1)["a"].keep).any()
        other = jc.prune(0.5, score=pr.random(jax.random.key(1))).find(params)
        assert (first["a"].keep != other["a"].keep).any()

    def test_is_uniform_over_the_places(self):
        one = lambda key: jc.prune(0.75, score=pr.random(key)).find({"w": jnp.ones((4, 4))})  # noqa: E731
        masks = jax.vmap(one)(jax.random.split(jax.random.key(2), 2000))["w"].keep
        assert (np.asarray(masks).sum((1, 2)) == 4).all()
        share = np.asarray(masks, np.float64).mean(0)
        # Five standard deviations of 2000 draws at one in four.
        assert np.abs(share - 0.25).max() < 5 * np.sqrt(0.25 * 0.75 / 2000)


class TestGiven:
    def test_a_tree_of_scores(self):
        params = contract.params()
        scores = {
            "a": {"kernel": jnp.asarray(draw(16, 8)), "bias": jnp.zeros(8)},
            "b": {"kernel": jnp.asarray(draw(8, 4))},
        }
        masks = jax.jit(lambda s: jc.prune(0.5, score=s).find(params))(scores)
        np.testing.assert_array_equal(masks["a/kernel"].keep, best(draw(16, 8), 64))
        np.testing.assert_array_equal(masks["b/kernel"].keep, best(draw(8, 4), 16))

    def test_a_function(self):
        smallest = lambda params, grads=None, step=0: jax.tree.map(  # noqa: E731
            lambda w: -jnp.abs(w), params
        )
        w = draw(16, 8)
        keep = jc.prune(0.5, score=smallest).find({"w": jnp.asarray(w)})["w"].keep
        np.testing.assert_array_equal(keep, best(-np.abs(w), 64))

    def test_n_of_m_by_scores(self):
        scores = {"w": jnp.asarray(draw(8, 4))}
        keep = jc.prune(nm=(1, 4), score=scores).find({"w": jnp.ones((8, 4))})["w"].keep
        groups = np.asarray(scores["w"]).reshape(2, 4, 4)
        want = groups == groups.max(1, keepdims=True)
        np.testing.assert_array_equal(keep, want.reshape(8, 4))

    def test_axes_by_path(self):
        params = {"a": jnp.asarray(draw(8, 6)), "b": jnp.asarray(draw(6, 8))}
        masks = jc.prune(nm=(2, 4), axis={"a": 0, "b": 1}).find(params)
        assert (np.asarray(masks["a"].keep).reshape(2, 4, 6).sum(1) == 2).all()
        assert (np.asarray(masks["b"].keep).reshape(6, 2, 4).sum(2) == 2).all()

    @pytest.mark.parametrize(
        ("score", "error", "text"),
        [
            ({"w": np.ones((2, 2), np.float32)}, ValueError, r"shape \[4, 4\], got .* at 'w'"),
            ({"v": np.ones((4, 4), np.float32)}, ValueError, r"none among \['v'\] at 'w'"),
            ({"w": np.ones((4, 4), np.int32)}, TypeError, "`score` must hold real floating"),
            (pr.saliency, ValueError, "saliency: `grads` must be given"),
            (pr.movement(), ValueError, "`score` must see the gradients"),
        ],
    )
    def test_bad_scores(self, score, error, text):
        with pytest.raises(error, match=text):
            jc.compress(jc.prune(0.5, score=score), {"w": jnp.ones((4, 4))})

    def test_axes_are_read_off_the_function(self):
        params = {
            "conv": jnp.asarray(draw(3, 3, 4, 6)),
            "heads": jnp.asarray(draw(2, 8, 6)),
            "tied": jnp.asarray(draw(5, 6)),
            "swapped": jnp.asarray(draw(6, 6)),
        }

        def fn(params, x, ids):
            x = jax.lax.conv_general_dilated(
                x, params["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = x @ params["swapped"] + x @ params["swapped"].T
            y = jnp.einsum("bhwo,gdo->gd", x, params["heads"])
            return y, params["tied"][ids] @ params["tied"].T

        sites = jc.sites(fn, params, jnp.ones((1, 4, 4, 4)), jnp.arange(3))
        axes = pr.contraction_axes(sites)
        assert axes == {"conv": 2, "heads": 2, "tied": 1}

    def test_axes_must_cover_the_leaves(self):
        with pytest.raises(ValueError, match=r"have an axis for each chosen leaf, .* at 'w'"):
            jc.compress(jc.prune(nm=(2, 4), axis={"v": 0}), {"w": jnp.ones((4, 4))})


def trail(opt, params, count):
    """`(params, state)` before each update, and the gradients of each; then the last two."""
    state, out = opt.init(params), []
    update = jax.jit(opt.update)
    for i in range(count):
        g = contract.params(seed=50 + i)
        out.append((params, state, g))
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
    return out, params, state


def f64(x):
    return np.asarray(x, np.float64)


class TestRunning:
    def test_saliency_ranks_by_the_gradient_of_the_update(self):
        opt = jc.projected(optax.sgd(0.1), jc.prune(0.5, score=pr.saliency))
        steps, _params, state = trail(opt, contract.params(), 1)
        w, _, g = steps[0]
        moved = f64(w["a"]["kernel"]) - 0.1 * f64(g["a"]["kernel"])
        want = best(np.abs(moved * f64(g["a"]["kernel"])), 64)
        np.testing.assert_array_equal(state.structure["a/kernel"].keep, want)

    def test_movement_sums_over_all_updates_while_the_mask_is_held(self):
        p = jc.every(3, jc.prune(0.5, score=pr.movement(0.5)), begin=2)
        opt = jc.straight_through(optax.sgd(0.1), p)
        steps, _, state = trail(opt, contract.params(), 8)
        total, at_find = np.zeros((16, 8)), None
        for i, (_, before, g) in enumerate(steps):
            total = total - 0.5 * f64(jc.latent(before)["a"]["kernel"]) * f64(g["a"]["kernel"])
            at_find = total if i in (2, 5) else at_find
        mask = state.structure.inner["a/kernel"]
        np.testing.assert_allclose(mask.statistic, total, atol=1e-5)
        np.testing.assert_array_equal(mask.keep, best(at_find, 64))

    def test_running_fisher_is_the_moving_average(self):
        p = jc.prune(0.5, score=pr.running_fisher(0.9))
        opt = jc.projected(optax.sgd(0.1), p)
        steps, _, state = trail(opt, contract.params(), 5)
        mean = np.zeros((8, 4))
        for _, _, g in steps:
            mean = 0.9 * mean + 0.1 * f64(g["b"]["kernel"]) ** 2
        np.testing.assert_allclose(state.structure["b/kernel"].statistic, mean, rtol=1e-5)
        w, _, g = steps[-1]
        moved = f64(w["b"]["kernel"]) - 0.1 * f64(g["b"]["kernel"])
        np.testing.assert_array_equal(
            state.structure["b/kernel"].keep, best(0.5 * moved**2 * mean, 16)
        )

    def test_packs_from_the_state(self):
        opt = jc.projected(optax.sgd(0.1), jc.prune(0.75, score=pr.movement()))
        _, params, state = trail(opt, contract.params(), 3)
        packed = jc.pack(state, params)
        np.testing.assert_array_equal(packed["a"]["kernel"].todense(), params["a"]["kernel"])
        assert packed["a"]["kernel"].nbytes < params["a"]["kernel"].nbytes


class TestScopes:
    @pytest.mark.parametrize("axis", [0, 1, -1])
    def test_each_index_of_an_axis_by_itself(self, axis):
        w = draw(6, 10)
        keep = np.asarray(jc.prune(0.6, scope=axis).find({"w": jnp.asarray(w)})["w"].keep)
        rest = w.shape[1 - axis % 2]
        for row, kept in zip(np.moveaxis(w, axis, 0), np.moveaxis(keep, axis, 0), strict=True):
            np.testing.assert_array_equal(kept, best(np.abs(row), rest - round(0.6 * rest)))

    def test_no_leaf_collapses_under_a_global_scope_unless_asked(self):
        params = {"big": jnp.asarray(10 + draw(16, 8)), "small": jnp.asarray(0.01 * draw(8, 4))}
        collapsed = jc.prune(0.5, scope="global", floor=None).find(params)
        assert int(collapsed["small"].keep.sum()) == 0
        spared = jc.prune(0.5, scope="global").find(params)
        np.testing.assert_array_equal(
            spared["small"].keep, best(np.abs(np.asarray(params["small"])), 1)
        )
        assert int(spared["big"].keep.sum()) == 79

    def test_of_weights_that_tie_a_leaf_keeps_the_first(self):
        params = {"big": jnp.asarray(10 + draw(16, 8)), "small": jnp.full((8, 4), 0.5, jnp.float32)}
        masks = jc.prune(0.5, scope="global").find(params)
        np.testing.assert_array_equal(np.flatnonzero(masks["small"].keep), [0])

    @pytest.mark.parametrize("floor", [0.25, 0.3])
    def test_a_floor_is_a_fraction_of_each_leaf(self, floor):
        params = {"big": jnp.asarray(10 + draw(16, 8)), "small": jnp.asarray(0.01 * draw(8, 4))}
        for f in (floor, jnp.float32(floor), lambda step: jnp.float32(floor)):
            masks = jc.prune(0.5, scope="global", floor=f).find(params)
            least = int(np.ceil(np.float32(floor) * 32))
            want = best(np.abs(np.asarray(params["small"])), least)
            np.testing.assert_array_equal(masks["small"].keep, want)
            assert int(masks["big"].keep.sum()) == 80 - least

    def test_the_total_comes_before_the_floor(self):
        params = {"a": jnp.ones((4, 4)), "b": jnp.full((4, 4), 2.0)}
        masks = jc.prune(1.0, scope="global", floor=0.5).find(params)
        assert not any(m.keep.any() for m in masks.values())
        masks = jc.prune(31 / 32, scope="global").find(params)
        assert sum(int(m.keep.sum()) for m in masks.values()) == 1

    def test_a_floor_holds_against_infinite_and_missing_scores(self):
        params = {"a": jnp.full((2, 2), jnp.inf), "b": jnp.ones((2, 2))}
        masks = jc.prune(0.5, scope="global").find(params)
        assert [int(masks[k].keep.sum()) for k in "ab"] == [3, 1]
        params = {"a": jnp.full((2, 2), jnp.nan), "b": jnp.ones((2, 2))}
        for floor in (0.0, 1e-9):
            masks = jc.prune(0.5, scope="global", floor=floor).find(params)
            assert [int(masks[k].keep.sum()) for k in "ab"] == [1, 3]

    def test_formats_without_infinity(self):
        w = jnp.array([[1.0, 2.0, 4.0, 8.0]]).astype(jnp.float8_e4m3fn)
        for scope in ("leaf", "global"):
            out = jc.compress(jc.prune(0.5, scope=scope), {"w": w})["w"]
            np.testing.assert_array_equal(out.astype(jnp.float32), [[0, 0, 4, 8]])
        with pytest.raises(TypeError, match="`params` must have a zero, got float8_e8m0fnu"):
            jc.compress(jc.prune(0.5), {"w": w.astype(jnp.float8_e8m0fnu)})

    def test_floors_and_scopes_trace(self):
        params = contract.params()
        one = counting_jit(lambda f: jc.compress(jc.prune(0.7, scope="global", floor=f), params))
        grid = jnp.array([0.0, 0.1, 0.3])
        mapped = jax.vmap(one)(grid)
        for i, f in enumerate(grid):
            jax.tree.map(
                lambda m, x: np.testing.assert_array_equal(m[i], x),  # noqa: B023
                mapped,
                one(f),
            )
        assert one.traces == 1
