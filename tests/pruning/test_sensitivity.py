"""Scores from data against closed forms in float64; SynFlow against its own loop in NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxcompress as jc
from jaxcompress.pruning import fisher, grasp, snip, synflow, taylor, wanda
from tests.conftest import counting_jit, mesh_of

LOSS_SCORES = [snip, taylor, fisher, grasp]


def draw(*shape, seed=0, scale=1.0):
    values = scale * np.random.default_rng([seed, *shape]).normal(size=shape)
    return jnp.asarray(values, jnp.float32)


def f64(x):
    return np.asarray(x, np.float64)


def close(found, want, tolerance=1e-4):
    want = np.asarray(want)
    assert found.shape == want.shape
    finite = np.where(np.isinf(want), 0, want)
    atol = tolerance * np.abs(finite).max(initial=0)
    np.testing.assert_allclose(found, want, rtol=tolerance, atol=atol)


# Linear regression: half the mean squared error, one output.
def regression(params, x, y):
    return 0.5 * jnp.mean(jnp.square(x @ params["w"] - y))


REGRESSION = {"w": draw(5)}
BATCHES = [(draw(4, 5, seed=i), draw(4, seed=i)) for i in range(3)]


def example_gradients(x, y):
    x, y, w = f64(x), f64(y), f64(REGRESSION["w"])
    return (x @ w - y)[:, None] * x


# Two linear layers.
def two_layers(params, x, y):
    return 0.5 * jnp.mean(jnp.sum(jnp.square(x @ params["a"] @ params["b"] - y), axis=-1))


TWO = {"a": draw(5, 3), "b": draw(3, 2)}
TWO_BATCHES = [(draw(6, 5, seed=i), draw(6, 2, seed=i)) for i in range(2)]


def two_gradients(a, b, batches):
    grads = []
    for x, y in batches:
        x, y = f64(x), f64(y)
        error = (x @ a @ b - y) / len(x)
        grads.append((x.T @ error @ b.T, (x @ a).T @ error))
    return [np.mean(g, axis=0) for g in zip(*grads, strict=True)]


class TestByHand:
    def test_snip_averages_gradients_before_magnitudes(self):
        g = np.mean([example_gradients(*b).mean(0) for b in BATCHES], axis=0)
        close(snip(regression, REGRESSION, BATCHES)["w"], np.abs(f64(REGRESSION["w"]) * g))

    def test_snip_of_two_layers(self):
        a, b = f64(TWO["a"]), f64(TWO["b"])
        ga, gb = two_gradients(a, b, TWO_BATCHES)
        found = snip(two_layers, TWO, TWO_BATCHES)
        close(found["a"], np.abs(a * ga))
        close(found["b"], np.abs(b * gb))

    def test_taylor_averages_squares(self):
        w = f64(REGRESSION["w"])
        want = np.mean([(w * example_gradients(*b).mean(0)) ** 2 for b in BATCHES], axis=0)
        close(taylor(regression, REGRESSION, BATCHES)["w"], want)

    def test_fisher_of_examples(self):
        ragged = [(x[: 4 - i], y[: 4 - i]) for i, (x, y) in enumerate(BATCHES)]
        g = np.concatenate([example_gradients(*b) for b in ragged])
        assert len(g) == 9
        want = 0.5 * f64(REGRESSION["w"]) ** 2 * (g**2).mean(0)
        close(fisher(regression, REGRESSION, ragged)["w"], want)

    def test_fisher_of_batches(self):
        g = np.array([example_gradients(*b).mean(0) for b in BATCHES])
        want = 0.5 * f64(REGRESSION["w"]) ** 2 * (g**2).mean(0)
        close(fisher(regression, REGRESSION, BATCHES, per_example=False)["w"], want)

    def test_fisher_hands_scalars_and_keys_to_every_example(self):
        def loss(params, batch):
            noise = jax.random.normal(batch["key"], (5,))
            return regression(params, batch["scale"] * batch["x"] + noise[None], batch["y"])

        key, (x, y) = jax.random.key(3), BATCHES[0]
        batch = {"x": x, "y": y, "scale": 2.0, "key": key}
        found = fisher(loss, REGRESSION, [batch])["w"]
        noisy = 2 * f64(x) + f64(jax.random.normal(key, (5,)))
        g = example_gradients(noisy, y)
        close(found, 0.5 * f64(REGRESSION["w"]) ** 2 * (g**2).mean(0))

    def test_grasp_of_a_quadratic(self):
        # L = w'Aw/2: g = Aw, H = A.
        m = f64(draw(6, 6))
        a, w = m @ m.T, f64(draw(6))
        loss = lambda p, a: 0.5 * p["w"] @ a @ p["w"]  # noqa: E731
        batches = [jnp.asarray(a + s * np.eye(6), jnp.float32) for s in (-1, 1)]
        found = grasp(loss, {"w": jnp.asarray(w, jnp.float32)}, batches)["w"]
        close(found, w * (a @ a @ w))

    def test_grasp_keeps_the_gradient_flow(self):
        # Diagonal: without weight q the flow is smaller by the score, exactly.
        a, w = np.array([3.0, -2.0, 0.5, 1.0]), np.array([1.0, 1.0, 2.0, -3.0])
        loss = lambda p, a: 0.5 * jnp.sum(a * jnp.square(p["w"]))  # noqa: E731
        scores = grasp(loss, {"w": jnp.asarray(w, jnp.float32)}, [jnp.asarray(a, jnp.float32)])
        lost = [((a * w) ** 2).sum() - ((a * np.where(np.arange(4) == q, 0, w)) ** 2).sum()
                for q in range(4)]  # fmt: skip
        close(scores["w"], lost)

    def test_grasp_of_two_layers_by_differences(self):
        a, b = f64(TWO["a"]), f64(TWO["b"])
        ga, gb = two_gradients(a, b, TWO_BATCHES)
        h = 1e-6
        up = two_gradients(a + h * ga, b + h * gb, TWO_BATCHES)
        down = two_gradients(a - h * ga, b - h * gb, TWO_BATCHES)
        found = grasp(two_layers, TWO, TWO_BATCHES)
        close(found["a"], a * (up[0] - down[0]) / (2 * h))
        close(found["b"], b * (up[1] - down[1]) / (2 * h))

    def test_grasp_is_the_full_hessian(self):
        def loss(w, x, y):
            return jnp.mean(jnp.square(jnp.tanh(jnp.tanh(x @ w["a"]) @ w["b"]) - y))

        def flat(w, x, y):
            return loss({"a": w[:15].reshape(5, 3), "b": w[15:].reshape(3, 2)}, x, y)

        w = jnp.concatenate([TWO["a"].ravel(), TWO["b"].ravel()])
        mean = lambda f: np.mean([f64(f(flat)(w, *b)) for b in TWO_BATCHES], axis=0)  # noqa: E731
        want = f64(w) * (mean(jax.hessian) @ mean(jax.grad))
        found = grasp(loss, TWO, TWO_BATCHES)
        close(jnp.concatenate([found["a"].ravel(), found["b"].ravel()]), want)

    def test_the_flow_that_prune_leaves_is_the_largest(self):
        a, w = np.array([[3.0, -2.0], [0.5, 1.0]]), np.array([[1.0, 1.0], [2.0, -3.0]])
        loss = lambda p, a: 0.5 * jnp.sum(a * jnp.square(p["w"]))  # noqa: E731
        params = {"w": jnp.asarray(w, jnp.float32)}
        scores = grasp(loss, params, [jnp.asarray(a, jnp.float32)])
        kept = jc.compress(jc.prune(0.5, score=scores), params)["w"]
        np.testing.assert_array_equal(kept, [[1.0, 0.0], [0.0, -3.0]])


def mixed(dtype=jnp.float32):
    return {
        "w": draw(5, 1).astype(dtype),
        "b": draw(1).astype(dtype),
        "count": jnp.arange(3),
        "flag": jnp.array([True]),
        "none": None,
        "empty": jnp.zeros((0, 2), dtype),
        "gain": jnp.ones((), dtype),
        "unused": draw(2, 2).astype(dtype),
    }


def mixed_loss(params, x, y):
    assert params["none"] is None
    out = (x.astype(params["w"].dtype) @ params["w"] + params["b"][None])[:, 0] * params["gain"]
    scale = 1.0 + params["count"].sum().astype(jnp.float32)
    return scale * jnp.mean(jnp.square(out.astype(jnp.float32) - y))


@pytest.mark.parametrize("score", LOSS_SCORES)
class TestAnyLoss:
    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_structure_and_dtypes(self, score, dtype):
        params = mixed(dtype)
        found = score(mixed_loss, params, BATCHES)
        assert jax.tree.structure(found) == jax.tree.structure(params)
        for w, s in zip(jax.tree.leaves(params), jax.tree.leaves(found), strict=True):
            assert (s.shape, s.dtype) == (w.shape, jnp.float32)
        for name in ("count", "flag", "unused"):
            assert not found[name].any()
        assert (found["w"] != 0).all()
        assert (found["gain"] != 0).all()
        exact = score(mixed_loss, mixed(), BATCHES)
        close(found["w"], exact["w"], 0.2 if dtype == jnp.bfloat16 else 0.03)

    def test_jit_is_eager(self, score):
        params = mixed()
        eager = score(mixed_loss, params, BATCHES)
        traced = jax.jit(lambda p, b: score(mixed_loss, p, b))(params, BATCHES)
        jax.tree.map(lambda a, b: close(a, b, 1e-5), traced, eager)

    def test_vmap_over_params_is_a_loop(self, score):
        stack = draw(3, 5)
        mapped = jax.vmap(lambda w: score(regression, {"w": w}, BATCHES)["w"])(stack)
        for w, found in zip(stack, mapped, strict=True):
            close(found, score(regression, {"w": w}, BATCHES)["w"], 1e-5)

    def test_one_compilation_for_batches_of_one_shape(self, score):
        traces = []

        def loss(params, x, y):
            traces.append(1)
            return regression(params, x, y)

        score(loss, REGRESSION, BATCHES[:1])
        once = len(traces)
        score(loss, REGRESSION, BATCHES * 3)
        assert len(traces) == 2 * once

    def test_a_generator_is_a_list(self, score):
        found = score(regression, REGRESSION, (b for b in BATCHES))
        np.testing.assert_array_equal(found["w"], score(regression, REGRESSION, BATCHES)["w"])

    def test_what_is_no_array_stays_with_the_loss(self, score):
        params = {"w": REGRESSION["w"], "activation": jnp.tanh, "depth": 2}

        def loss(params, x, y):
            assert params["depth"] == 2
            return jnp.mean(jnp.square(params["activation"](x @ params["w"]) - y))

        found = score(loss, params, BATCHES)
        assert found["activation"] is None
        assert found["depth"] is None
        assert (found["w"] != 0).all()

    def test_nan_stays_at_its_weights(self, score):
        params = {"w": jnp.array([[1.0, jnp.nan, 3.0]]), "v": jnp.ones((1, 2))}
        square = lambda w: jnp.sum(jnp.square(w))  # noqa: E731
        loss = lambda p, x: jnp.mean(x) * (square(p["w"]) + square(p["v"]))  # noqa: E731
        found = score(loss, params, [jnp.ones(2)])
        np.testing.assert_array_equal(jnp.isnan(found["w"]), [[False, True, False]])
        keep = jc.prune(1 / 3, score=found, scope="leaf").find(params)["w"].keep
        np.testing.assert_array_equal(keep, [[True, False, True]])

    def test_prune_takes_them_for_all_leaves_together(self, score):
        found = score(two_layers, TWO, TWO_BATCHES)
        masks = jax.jit(lambda s: jc.prune(0.7, score=s, scope="global").find(TWO))(found)
        flat = np.concatenate([f64(found[p]).ravel() for p in "ab"])
        keep = np.concatenate([np.asarray(masks[p].keep).ravel() for p in "ab"])
        assert keep.sum() == 21 - 15
        assert flat[keep].min() > flat[~keep].max()

    @pytest.mark.parametrize(
        ("loss", "batches", "error", "text"),
        [
            (regression, [], ValueError, "`batches` must hold at least one batch"),
            (None, BATCHES, TypeError, "`loss` must be a function of the params"),
            (lambda p, x, y: x @ p["w"], BATCHES, ValueError, r"real floating-point scalar, got"),
            (lambda p, x, y: (0.0, 1.0), BATCHES, ValueError, "scalar, got tuple"),
            (lambda p, x, y: jnp.int32(3), BATCHES, ValueError, r"scalar, got int32\[\]"),
        ],
    )
    def test_bad_input(self, score, loss, batches, error, text):
        with pytest.raises(error, match=rf"^{score.__name__}: .*{text}"):
            score(loss, REGRESSION, batches)


def test_examples_must_agree():
    x, y = BATCHES[0]
    with pytest.raises(ValueError, match=r"one leading axis of examples .* per_example=False"):
        fisher(regression, REGRESSION, [(x, y[:3])])
    with pytest.raises(ValueError, match="one leading axis"):
        fisher(lambda p, s: s * jnp.sum(p["w"]), REGRESSION, [2.0])


def test_a_batch_without_examples_counts_nothing():
    x, y = BATCHES[0]
    alone = fisher(regression, REGRESSION, [(x, y)])["w"]
    both = fisher(regression, REGRESSION, [(x, y), (x[:0], y[:0])])["w"]
    close(both, alone)


@settings(derandomize=True, deadline=None, max_examples=3)
@given(st.integers(0, 2**31), st.sampled_from([0.25, 4.0]))
def test_laws(seed, scale):
    """Scores of first order do not depend on the order of batches; scaling the loss scales."""
    batches = [(draw(4, 5, seed=seed + i), draw(4, seed=seed + i)) for i in range(2)]
    scaled = lambda p, x, y: scale * regression(p, x, y)  # noqa: E731
    for score, power in ((snip, 1), (taylor, 2), (fisher, 2), (grasp, 2)):
        found = score(regression, REGRESSION, batches)["w"]
        close(score(regression, REGRESSION, batches[::-1])["w"], found)
        close(score(scaled, REGRESSION, batches)["w"], scale**power * f64(found))


# ------------------------------------------------------------------------------------ SynFlow


def mlp(params, x):
    for name in sorted(params):
        x = jax.nn.relu(x @ params[name])
    return x


def layers(*widths, scale=1.0, seed=0):
    pairs = itertools.pairwise(widths)
    return {f"w{i:03d}": draw(*p, seed=seed + i, scale=scale) for i, p in enumerate(pairs)}


def synflow_by_loops(ws, sparsity, steps, inputs=1):
    """Masks and last scores of a chain of layers, float64."""
    ws = [np.abs(f64(w)) for w in ws]
    masks = [np.ones(w.shape, bool) for w in ws]
    total = sum(w.size for w in ws)
    for k in range(1, steps + 1):
        live = [w * m for w, m in zip(ws, masks, strict=True)]
        before = [np.full((inputs, ws[0].shape[0]), 1.0)]
        for w in live:
            before.append(before[-1] @ w)
        after = [np.ones_like(before[-1])]
        for w in live[::-1]:
            after.append(after[-1] @ w.T)
        after = after[::-1]
        scores = [w * (before[i].T @ after[i + 1]) for i, w in enumerate(live)]
        flat = np.concatenate([s.ravel() for s in scores])
        removed = round(total * (1 - (1 - sparsity) ** (k / steps)))
        keep = np.ones(total, bool)
        keep[np.argsort(flat, kind="stable")[:removed]] = False
        ends = np.cumsum([w.size for w in ws])[:-1]
        shapes = [w.shape for w in ws]
        masks = [m.reshape(s) for m, s in zip(np.split(keep, ends), shapes, strict=True)]
    return masks, scores


def same_masks(scores, masks):
    for s, m in zip(jax.tree.leaves(scores), masks, strict=True):
        np.testing.assert_array_equal(np.asarray(s) > 0, m)


class TestSynflow:
    def test_biases_and_skips_carry_flow(self):
        params = {"a": draw(6, 5), "b": draw(5, 6), "bias": draw(5)}

        def fn(params, x):
            return x + jax.nn.relu(x @ params["a"] + params["bias"][None]) @ params["b"]

        scores = synflow(fn, params, draw(2, 6), sparsity=0.5, steps=1)
        a, b, bias = (np.abs(f64(params[name])) for name in ("a", "b", "bias"))
        want = [2 * a * b.sum(1), 2 * b * (a.sum(0) + bias)[:, None]]
        flat = np.concatenate([want[0].ravel(), want[1].ravel()])
        keep = flat >= np.sort(flat)[30]
        close(scores["a"], np.where(keep[:30].reshape(6, 5), want[0], 0))
        close(scores["b"], np.where(keep[30:].reshape(5, 6), want[1], 0))

    def test_flow_is_conserved_from_layer_to_layer(self):
        params = layers(7, 11, 3, 9)
        scores = synflow(mlp, params, jnp.zeros((1, 7)), sparsity=0.0, steps=1)
        x = np.ones(7)
        for name in sorted(params):
            x = x @ np.abs(f64(params[name]))
        for s in scores.values():
            np.testing.assert_allclose(s.sum(), x.sum(), rtol=1e-5)

    @pytest.mark.parametrize(("sparsity", "steps"), [(0.5, 1), (0.9, 7), (0.97, 100)])
    def test_is_the_iteration(self, sparsity, steps):
        params = layers(8, 16, 12, 4)
        scores = synflow(mlp, params, draw(3, 8), sparsity=sparsity, steps=steps)
        masks, last = synflow_by_loops(params.values(), sparsity, steps, inputs=3)
        same_masks(scores, masks)
        for s, m, want in zip(scores.values(), masks, last, strict=True):
            close(s, np.where(m, want, 0))
        masks_of_prune = jc.prune(sparsity, score=scores, scope="global").find(params)
        same_masks({name: m.keep for name, m in masks_of_prune.items()}, masks)

    def test_no_layer_collapses_at_99_percent(self):
        params = layers(20, 60, 60, 10)
        scores = synflow(mlp, params, jnp.ones((1, 20)), sparsity=0.99)
        sparse = jc.compress(jc.prune(0.99, score=scores, scope="global", floor=None), params)
        live = {name: int((w != 0).sum()) for name, w in sparse.items()}
        assert sum(live.values()) == 54
        assert min(live.values()) > 0
        magnitudes = jax.tree.map(jnp.abs, sparse)
        assert float(mlp(magnitudes, jnp.ones((1, 20))).sum()) > 0

    @pytest.mark.parametrize("scale", [100.0, 1e-5])
    def test_flow_beyond_float32(self, scale):
        # Each layer multiplies by about 25 times the scale.
        params = layers(8, *[32] * 12, 4, scale=scale)
        scores = synflow(mlp, params, jnp.ones((1, 8)), sparsity=0.8, steps=5)
        masks, last = synflow_by_loops(params.values(), 0.8, 5)
        assert not 2.0**-126 < synflow_by_loops(params.values(), 0.0, 1)[1][0].max() < 2.0**128
        same_masks(scores, masks)
        found = np.concatenate([f64(s)[m] for s, m in zip(scores.values(), masks, strict=True)])
        want = np.concatenate([s[m] for s, m in zip(last, masks, strict=True)])
        close(found / found.max(), want / want.max(), 1e-3)

    def test_layers_of_a_scan(self):
        stack = draw(30, 24, 24, seed=5)
        fn = lambda p, x: jax.lax.scan(lambda x, w: (x @ w, None), x, p["w"])[0]  # noqa: E731
        scores = synflow(fn, {"w": stack}, jnp.ones((1, 24)), sparsity=0.9, steps=10)["w"]
        masks, _ = synflow_by_loops(stack, 0.9, 10)
        np.testing.assert_array_equal(np.asarray(scores) > 0, masks)

    def test_vmap_is_a_loop_and_jit_compiles_once(self):
        params, x = layers(8, 16, 4), jnp.ones((1, 8))
        one = counting_jit(lambda p, s: synflow(mlp, p, x, sparsity=s, steps=4))
        grid = jnp.array([0.0, 0.3, 0.9, 1.0])
        mapped = jax.vmap(one, in_axes=(None, 0))(params, grid)
        for i, s in enumerate(grid):
            alone = one(params, s)
            eager = synflow(mlp, params, x, sparsity=float(s), steps=4)
            for name in params:
                np.testing.assert_array_equal(mapped[name][i] > 0, alone[name] > 0)
                close(mapped[name][i], alone[name], 1e-5)
                close(eager[name], alone[name], 1e-5)
            kept = sum(int((a > 0).sum()) for a in alone.values())
            assert kept == 192 - round(float(s) * 192)
        assert one.traces == 1

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_other_leaves_are_left_alone(self, dtype):
        params = {
            "w": draw(6, 8).astype(dtype),
            "bias": (-1 - jnp.arange(8.0)).astype(dtype),
            "count": jnp.arange(2),
            "none": None,
            "empty": jnp.zeros((0, 3), dtype),
            "act": jax.nn.relu,
        }

        def fn(params, x, ids, train):
            assert train is False
            assert ids.dtype == jnp.int32
            return {"y": params["act"](x @ params["w"] + params["bias"][None]), "ids": ids}

        args = (jax.ShapeDtypeStruct((1, 6), dtype), jnp.arange(3), False)
        scores = synflow(fn, params, *args, sparsity=0.5, steps=3)
        assert scores["act"] is None
        assert scores["w"].dtype == scores["bias"].dtype == jnp.float32
        assert scores["empty"].shape == (0, 3)
        assert jnp.isinf(scores["bias"]).all()
        assert not scores["count"].any()
        # One layer: the score is the magnitude. Ties of narrow dtypes go to the first.
        want = jc.prune(0.5).find({"w": params["w"].astype(jnp.float32)})["w"].keep
        np.testing.assert_array_equal(scores["w"] > 0, want)

    def test_where_chooses_leaves(self):
        params, x = layers(8, 16, 4), jnp.ones((1, 8))
        scores = synflow(mlp, params, x, sparsity=0.5, steps=3, where="w001")
        assert jnp.isinf(scores["w000"]).all()
        assert int((scores["w001"] > 0).sum()) == 32

    def test_what_went_never_comes_back(self):
        # First the smallest goes, then what is behind the next one, which then has no flow
        # either. It lives nevertheless, though what went before it comes first in C order.
        params = {
            "w000": jnp.array([[0.05, 1, 1, 1], [0.1, 1, 1, 1]]),
            "w001": jnp.ones((4, 1)),
        }
        scores = synflow(mlp, params, jnp.ones((1, 2)), sparsity=1 / 6, steps=10)
        np.testing.assert_array_equal(scores["w000"] > 0, params["w000"] > 0.05)
        np.testing.assert_array_equal(scores["w001"] > 0, [[False], [True], [True], [True]])
        masks = jc.prune(1 / 6, score=scores, scope="global", floor=None).find(params)
        for name, s in scores.items():
            np.testing.assert_array_equal(masks[name].keep, s > 0)

    def test_without_any_flow_it_still_counts(self):
        params = {"w000": draw(4, 4), "w001": jnp.zeros((4, 4))}
        scores = synflow(mlp, params, jnp.ones((1, 4)), sparsity=0.5, steps=3)
        assert sum(int((s > 0).sum()) for s in scores.values()) == 16
        masks = jc.prune(0.5, score=scores, scope="global", floor=None).find(params)
        for name, s in scores.items():
            np.testing.assert_array_equal(masks[name].keep, s > 0)

    def test_ties_keep_the_first(self):
        params = {"w000": jnp.ones((4, 4)), "w001": -jnp.ones((4, 4))}
        scores = synflow(mlp, params, jnp.ones((1, 4)), sparsity=0.5, steps=1)
        assert (scores["w000"] > 0).all()
        assert not (scores["w001"] > 0).any()

    @pytest.mark.parametrize("kind", ["auto", "explicit"])
    def test_on_a_mesh(self, kind):
        mesh = mesh_of(kind)
        params, x = layers(8, 16, 4), jnp.ones((1, 8))
        want = synflow(mlp, params, x, sparsity=0.8, steps=4)
        spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, None))
        rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "d"))
        with jax.set_mesh(mesh):
            placed = {
                "w000": jax.device_put(params["w000"], spec),
                "w001": jax.device_put(params["w001"], rows),
            }
            found = jax.jit(lambda p, x: synflow(mlp, p, x, sparsity=0.8, steps=4))(
                placed, jax.device_put(x, spec)
            )
        jax.tree.map(lambda a, b: close(np.asarray(a), b, 1e-5), found, want)

    @pytest.mark.parametrize(
        ("kwargs", "error", "text"),
        [
            ({"sparsity": 1.5}, ValueError, r"`sparsity` must be a real number in \[0, 1\]"),
            ({"sparsity": None}, TypeError, "`sparsity` must be a real number"),
            ({"sparsity": lambda step: 0.5}, TypeError, "`sparsity` must be a number"),
            ({"sparsity": 0.5, "steps": 0}, ValueError, "`steps` must be a static integer"),
            ({"sparsity": 0.5, "where": "v*"}, ValueError, "match at least one"),
            ({"sparsity": 0.5, "where": "count"}, TypeError, "real floating-point .* 'count'"),
        ],
    )
    def test_bad_input(self, kwargs, error, text):
        params = {"w": draw(4, 4), "count": jnp.arange(4)}
        with pytest.raises(error, match=f"^synflow: .*{text}"):
            synflow(lambda p, x: x @ p["w"], params, jnp.ones((1, 4)), **kwargs)

    def test_bad_functions_and_packed_leaves(self):
        params, x = {"w": draw(64, 64)}, jnp.ones((1, 64))
        with pytest.raises(TypeError, match="`fn` must be a function"):
            synflow(params, mlp, x, sparsity=0.5)
        with pytest.raises(ValueError, match=r"return a floating-point array, got \['int32"):
            synflow(lambda p, x: jnp.arange(3), params, x, sparsity=0.5)
        packed = jc.pack(jc.prune(0.9), params)
        with pytest.raises(TypeError, match=r"dense real floating-point arrays .* 'w'"):
            synflow(mlp, packed, x, sparsity=0.5)


# -------------------------------------------------------------------------------------- Wanda


def pair(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


PAIR = {"a": draw(8, 6), "b": draw(6, 4), "bias": draw(4)}
INPUTS = [draw(5, 8), 2 * draw(3, 8)]
ALL = np.concatenate([f64(x) for x in INPUTS])


class TestWanda:
    @pytest.mark.parametrize("options", [{"moments": True}, {"gram": True}])
    def test_weights_times_norms(self, options):
        stats = jc.calibrate(pair, PAIR, INPUTS, **options)
        scores = wanda(PAIR, stats)
        a, b = f64(PAIR["a"]), f64(PAIR["b"])
        hidden = np.tanh(ALL @ a)
        close(scores["a"], np.abs(a) * np.sqrt((ALL**2).sum(0))[:, None])
        close(scores["b"], np.abs(b) * np.sqrt((hidden**2).sum(0))[:, None])
        assert jnp.isinf(scores["bias"]).all()
        # Half of each output, as in the paper.
        keep = np.asarray(jc.prune(0.5, score=scores, scope=-1).find(PAIR)["a"].keep)
        want = f64(scores["a"])
        assert (keep.sum(0) == 4).all()
        for j in range(6):
            assert want[keep[:, j], j].min() > want[~keep[:, j], j].max()

    def test_transposed_and_split_axes(self):
        params = {"out_in": draw(4, 8), "query": draw(8, 2, 3), "back": draw(2, 3, 5)}

        def fn(params, x):
            heads = jnp.einsum("ti,ihd->thd", x, params["query"])
            return x @ params["out_in"].T, jnp.einsum("thd,hdo->to", heads, params["back"])

        heads = np.einsum("ti,ihd->thd", ALL, f64(params["query"]))
        norm = np.sqrt((ALL**2).sum(0))
        scores = wanda(params, jc.calibrate(fn, params, INPUTS, gram=True))
        close(scores["out_in"], np.abs(f64(params["out_in"])) * norm)
        close(scores["query"], np.abs(f64(params["query"])) * norm[:, None, None])
        close(scores["back"], np.abs(f64(params["back"])) * np.sqrt((heads**2).sum(0))[..., None])
        moments = jc.calibrate(fn, params, INPUTS, moments=True)
        some = wanda(params, moments, where=lambda path, w: path != "back")
        close(some["query"], scores["query"])
        with pytest.raises(ValueError, match=r"Gram matrices for this leaf, .* 'back'.*gram=True"):
            wanda(params, moments)

    @pytest.mark.parametrize("options", [{"moments": True}, {"gram": True}])
    def test_layers_of_a_scan_meet_their_own_inputs(self, options):
        params = {"w": draw(3, 8, 8, scale=0.5)}
        step = lambda x, w: (jnp.tanh(x @ w), None)  # noqa: E731
        fn = lambda p, x: jax.lax.scan(step, x, p["w"])[0]  # noqa: E731
        found = wanda(params, jc.calibrate(fn, params, INPUTS, **options))["w"]
        x = ALL
        for i in range(3):
            w = f64(params["w"][i])
            close(found[i], np.abs(w) * np.sqrt((x**2).sum(0))[:, None])
            x = np.tanh(x @ w)

    @pytest.mark.parametrize("groups", [1, 2, 4])
    def test_convolutions(self, groups):
        kernel, x = draw(3, 2, 4 // groups, 8), draw(2, 5, 6, 4)

        def fn(params, x):
            return jax.lax.conv_general_dilated(
                x,
                params["k"],
                (2, 1),
                "VALID",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=groups,
            )

        found = wanda({"k": kernel}, jc.calibrate(fn, {"k": kernel}, [x], gram=True))["k"]
        xs, want = f64(x), np.zeros(kernel.shape)
        for h, w, i, o in np.ndindex(*kernel.shape):
            channel = o // (8 // groups) * (4 // groups) + i
            met = [xs[n, 2 * r + h, c + w, channel]
                   for n in range(2) for r in range(2) for c in range(5)]  # fmt: skip
            want[h, w, i, o] = abs(float(kernel[h, w, i, o])) * np.linalg.norm(met)
        close(found, want)
        with pytest.raises(ValueError, match="Gram matrices for this leaf"):
            wanda({"k": kernel}, jc.calibrate(fn, {"k": kernel}, [x], moments=True))

    def test_moments_of_channels_are_not_taken_for_places(self):
        # As many channels as places: the shapes fit and the meaning does not.
        kernel, x = draw(4, 1, 4), draw(2, 9, 4)

        def fn(params, x):
            return jax.lax.conv_general_dilated(
                x,
                params["k"],
                (1,),
                "VALID",
                dimension_numbers=("NWC", "WIO", "NWC"),
                feature_group_count=4,
            )

        stats = jc.calibrate(fn, {"k": kernel}, [x], moments=True)
        assert stats["k"].moments.mean.shape == (4,)
        with pytest.raises(ValueError, match=r"gram=True"):
            wanda({"k": kernel}, stats)

    def test_several_sites_of_one_leaf_add_up(self):
        params = {"w": draw(8, 8)}
        fn = lambda p, x: (x @ p["w"], (3 * x) @ p["w"])  # noqa: E731
        found = wanda(params, jc.calibrate(fn, params, INPUTS, moments=True))["w"]
        close(found, np.abs(f64(params["w"])) * np.sqrt(10 * (ALL**2).sum(0))[:, None])

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_dtypes_and_other_leaves(self, dtype):
        params = {"w": draw(8, 4).astype(dtype), "n": jnp.arange(3), "none": None, "f": jnp.tanh}
        fn = lambda p, x: p["f"](x.astype(dtype) @ p["w"])  # noqa: E731
        stats = jc.calibrate(lambda p, x: fn({**params, **p}, x), {"w": params["w"]}, INPUTS,
                             moments=True)  # fmt: skip
        scores = wanda(params, stats)
        assert scores["w"].dtype == jnp.float32
        assert not scores["n"].any()
        assert scores["none"] is None
        assert scores["f"] is None
        x = f64(jnp.concatenate(INPUTS).astype(dtype))
        close(scores["w"], np.abs(f64(params["w"])) * np.sqrt((x**2).sum(0))[:, None])

    def test_jit_and_vmap(self):
        stats = jc.calibrate(pair, PAIR, INPUTS, moments=True)
        eager = wanda(PAIR, stats)
        jax.tree.map(lambda a, b: close(a, b, 1e-6), jax.jit(wanda)(PAIR, stats), eager)
        stack = draw(3, 8, 6, seed=9)
        mapped = jax.vmap(lambda w: wanda({**PAIR, "a": w}, stats)["a"])(stack)
        for w, found in zip(stack, mapped, strict=True):
            close(found, wanda({**PAIR, "a": w}, stats)["a"], 1e-6)

    @pytest.mark.parametrize("kind", ["auto", "explicit"])
    def test_on_a_mesh(self, kind):
        mesh = mesh_of(kind)
        stats = jc.calibrate(pair, PAIR, INPUTS, gram=True)
        spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d", None))
        w = jax.device_put(PAIR["a"], spec)
        found = wanda({"a": w}, stats)["a"]
        assert found.sharding.is_equivalent_to(spec, 2)
        close(np.asarray(found), wanda({"a": PAIR["a"]}, stats)["a"], 1e-6)

    def test_bad_statistics(self):
        stats = jc.calibrate(pair, PAIR, INPUTS, moments=True)
        more = {**PAIR, "table": draw(9, 8), "pos": draw(2, 8)}
        with pytest.raises(ValueError, match=r"none of \['pos', 'table'\]. .*`where`"):
            wanda(more, stats)
        assert jnp.isinf(wanda(more, stats, where="[ab]")["table"]).all()
        with pytest.raises(TypeError, match=r"what jc.calibrate returns"):
            wanda(stats, PAIR)
        with pytest.raises(ValueError, match=r"hold moments for this leaf, .*moments=True"):
            wanda(PAIR, jc.calibrate(pair, PAIR, INPUTS))
        with pytest.raises(TypeError, match="real floating-point arrays"):
            wanda({**PAIR, "n": jnp.arange(3)}, stats, where=lambda path, w: True)
        nan = jc.calibrate(pair, PAIR, [INPUTS[0].at[0, 0].set(jnp.nan)], moments=True)
        with pytest.raises(ValueError, match=r"must be finite, .* at 'a'"):
            wanda(PAIR, nan)
        with pytest.raises(ValueError, match="have 9 features"):
            wanda({**PAIR, "a": draw(9, 6)}, stats)
