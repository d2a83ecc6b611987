"""Teachers: what is frozen, what is compiled in, and means of several against NumPy loops."""

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import jaxcompress as jc
from jaxcompress.distillation import distill, ensemble_logits, frozen, kd_loss
from tests.conftest import counting_jit, lenient, mesh_of


def softmax(z):
    powers = np.exp(z - np.max(z))
    return powers / np.sum(powers)


def draw(*shape, seed=0, scale=1.0):
    return np.random.default_rng(seed).normal(size=shape) * scale


def apply(params, x):
    return jnp.tanh(x @ params["w"]) @ params["v"]


def some_weights(seed=0, width=6):
    return {
        "w": jnp.float32(draw(4, width, seed=seed)),
        "v": jnp.float32(draw(width, 3, seed=seed + 1)),
    }


X = jnp.float32(draw(5, 4, seed=9))


class TestFrozen:
    def test_is_the_function_without_a_gradient(self):
        weights = some_weights()
        np.testing.assert_array_equal(frozen(apply, weights)(X), apply(weights, X))
        total = lambda weights, x: jnp.sum(frozen(apply, weights)(x) ** 2)  # noqa: E731
        for grad in jax.tree.leaves(jax.grad(total, (0, 1))(weights, X)):
            assert (grad == 0).all()
        # Nor through what the function closes over.
        hidden = jax.grad(lambda s: jnp.sum(frozen(lambda p, x: s * x, None)(X)))(2.0)
        assert hidden == 0

    def test_it_need_not_be_differentiable(self):
        def halve(params, x):
            return jax.pure_callback(lambda x: np.asarray(x) / 2, x, x)

        x = jnp.array([8.0, 4.0])
        with pytest.raises(ValueError, match="JVP"):
            jax.grad(lambda x: jnp.sum(x * halve(None, x)))(x)
        grad = jax.grad(lambda x: jnp.sum(x * frozen(halve, None)(x)))(x)
        np.testing.assert_array_equal(grad, [4.0, 2.0])

    def test_static_arguments_stay_static(self):
        def scaled(params, x, *, twice=False, factor=1.0):
            assert isinstance(factor, float)
            return params * x * (2.0 if twice else factor)

        teacher = frozen(scaled, jnp.float32(3.0))
        assert jax.jit(lambda t: t(jnp.float32(1.0), twice=True))(teacher) == 6
        assert teacher(jnp.float32(1.0), factor=0.5) == 1.5

    def test_in_the_batch_its_weights_are_arguments_and_not_constants(self):
        params = {"s": jnp.ones((4, 3))}
        student = lambda params, batch: batch["x"] @ params["s"]  # noqa: E731
        step = lambda opt: lambda p, batch: opt.update(p, opt.init(p), p, batch=batch)[0]  # noqa: E731
        teacher = frozen(apply, some_weights())
        given = step(distill(student, lambda batch: batch["teacher"](batch["x"])))
        closed = step(distill(student, lambda batch: teacher(batch["x"])))
        batch = {"x": X, "teacher": teacher}
        constants = lambda f: [np.shape(c) for c in jax.make_jaxpr(f)(params, batch).consts]  # noqa: E731
        assert (4, 6) in constants(closed)
        assert (4, 6) not in constants(given)
        compiled = counting_jit(given)
        np.testing.assert_allclose(
            compiled(params, batch)["s"], jax.jit(closed)(params, batch)["s"], rtol=1e-6
        )
        # Another teacher of the same function is no other program.
        other = compiled(params, {"x": X, "teacher": frozen(apply, some_weights(seed=5))})
        assert compiled.traces == 1
        assert (other["s"] != compiled(params, batch)["s"]).any()

    def test_it_is_stacked_mapped_and_scanned_as_a_tree(self):
        teachers = [frozen(apply, some_weights(seed)) for seed in range(3)]
        expected = jnp.stack([teacher(X) for teacher in teachers])
        stacked = jax.tree.map(lambda *w: jnp.stack(w), *teachers)
        mapped = jax.vmap(lambda teacher, x: teacher(x), (0, None))(stacked, X)
        np.testing.assert_allclose(mapped, expected, rtol=1e-5, atol=1e-6)
        _, scanned = jax.lax.scan(lambda c, teacher: (c, teacher(X)), None, stacked)
        np.testing.assert_allclose(scanned, expected, rtol=1e-5, atol=1e-6)

    def test_flax_modules_in_eval_mode(self):
        class Net(nnx.Module):
            def __init__(self, rngs):
                self.norm = nnx.BatchNorm(4, rngs=rngs)
                self.drop = nnx.Dropout(0.5, rngs=rngs)
                self.out = nnx.Linear(4, 3, rngs=rngs)

            def __call__(self, x):
                return self.out(self.drop(self.norm(x)))

        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            net = Net(nnx.Rngs(0))
            net.norm.mean[...] = jnp.full(4, 2.0)
            training = frozen(*jc.functional(net))
            net.eval()
            teacher = frozen(*jc.functional(net))
            got = teacher(X)
            kernel, bias = net.out.kernel[...], net.out.bias[...]
            expected = ((X - 2.0) / np.sqrt(1 + 1e-5)) @ kernel + bias
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
            # A row alone is a row of the batch: nothing of the batch is read.
            np.testing.assert_allclose(teacher(X[:1]), got[:1], rtol=1e-5, atol=1e-6)
            assert np.abs(training(X) - got).max() > 0.1

    def test_linen_modules_by_a_function(self):
        class Net(flax.linen.Module):
            @flax.linen.compact
            def __call__(self, x, deterministic):
                x = flax.linen.Dense(8)(x)
                return flax.linen.Dropout(0.5)(x, deterministic=deterministic)

        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            net = Net()
            params = net.init(jax.random.key(0), X, deterministic=True)["params"]
            run = lambda params, x: net.apply({"params": params}, x, deterministic=True)  # noqa: E731
            dense = params["Dense_0"]
            expected = X @ dense["kernel"] + dense["bias"]
            np.testing.assert_allclose(frozen(run, params)(X), expected, rtol=1e-5, atol=1e-6)

    def test_a_packed_teacher(self):
        weights = {"w": jnp.float32(draw(16, 16)), "v": jnp.float32(draw(16, 3))}
        x = jnp.float32(draw(5, 16, seed=2))
        packed = jc.pack(jc.prune(0.5), weights)
        teacher = frozen(jc.lift(apply), packed)
        got = jax.jit(lambda teacher, x: teacher(x))(teacher, x)
        expected = apply(jc.compress(jc.prune(0.5), weights), x)
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
        assert jc.tree.nbytes(teacher) == jc.tree.nbytes(packed)

    def test_it_must_be_a_function(self):
        with pytest.raises(TypeError, match="frozen: `apply` must be a function, got dict"):
            frozen({"w": 1}, apply)


def test_the_dense_version_of_the_student_teaches_it():
    """Self-distillation of a pruned linear model, against the update written in NumPy."""
    rate, weight, heat, steps = 0.5, 0.7, 2.0, 4
    dense = draw(4, 3, scale=0.5)
    xs, ys = draw(steps, 6, 4, seed=1), draw(steps, 6, 3, seed=2)
    linear = lambda params, x: x @ params["w"]  # noqa: E731
    student = lambda params, batch: linear(params, batch["x"])  # noqa: E731
    teach = distill(
        student, lambda batch: batch["teacher"](batch["x"]), weight=weight, temperature=heat
    )
    opt = optax.chain(teach, jc.straight_through(optax.sgd(rate), jc.prune(0.5)))

    def step(carry, batch):
        params, state = carry
        x, y = batch
        teacher = frozen(linear, jc.latent(state))
        grads = jax.grad(lambda p: jnp.mean(jnp.square(linear(p, x) - y)))(params)
        updates, state = opt.update(grads, state, params, batch={"x": x, "teacher": teacher})
        return (optax.apply_updates(params, updates), state), (params, jc.latent(state))

    with jax.enable_x64(True):
        params = {"w": jnp.asarray(dense)}
        carry = (params, opt.init(params))
        scan = jax.jit(lambda carry, batches: jax.lax.scan(step, carry, batches))
        (params, _), (path, latents) = scan(carry, (jnp.asarray(xs), jnp.asarray(ys)))
        latent, shown = dense.copy(), dense.copy()
        for i, (x, y) in enumerate(zip(xs, ys, strict=True)):
            np.testing.assert_allclose(path["w"][i], shown, rtol=1e-6, atol=1e-12)
            gradient = 2 * x.T @ (x @ shown - y) / y.size
            for row in x:
                q, p = softmax(row @ shown / heat), softmax(row @ latent / heat)
                gradient += weight * heat * np.outer(row, q - p) / len(x)
            latent = latent - rate * gradient
            np.testing.assert_allclose(latents["w"][i], latent, rtol=1e-6, atol=1e-12)
            shown = np.where(np.abs(latent) > np.sort(np.abs(latent), None)[5], latent, 0.0)
        np.testing.assert_allclose(params["w"], shown, rtol=1e-6, atol=1e-12)
        assert (params["w"] == 0).sum() == 6


def test_a_chain_of_assistants_is_a_loop():
    x = jnp.float32(draw(32, 4, seed=3))
    opt = lenient(optax.adam(0.05))

    @counting_jit
    def train(params, teacher):
        loss = lambda params: jnp.mean(kd_loss(apply(params, x), teacher(x)))  # noqa: E731

        def step(carry, _):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = opt.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        (params, _), losses = jax.lax.scan(step, (params, opt.init(params)), length=60)
        return params, losses

    teacher = frozen(apply, some_weights(width=8))
    for width in (6, 3):
        params, losses = train(some_weights(seed=width, width=width), teacher)
        assert losses[-1] < losses[0] / 4
        teacher = frozen(apply, params)
    assert train.traces == 2


def oracle(logits, weights=None, temperature=1.0, keep=None, geometric=False):
    """The probabilities of the mean at the temperature, class by class and row by row."""
    members, rows, classes = logits.shape[0], logits.shape[1:-1], logits.shape[-1]
    keep = np.ones(classes, bool) if keep is None else keep
    weights = np.ones(members) if weights is None else np.asarray(weights, np.float64)
    heats = np.broadcast_to(temperature, rows)
    out = np.zeros((*rows, classes))
    for row in np.ndindex(*rows):
        w = weights[(slice(None), *row)] if weights.ndim > 1 else weights
        total = np.zeros(keep.sum())
        for k in range(members):
            p = softmax(logits[(k, *row)][keep] / heats[row])
            total += (np.log(p) if geometric else p) * w[k] / w.sum()
        out[row][keep] = softmax(total) if geometric else total
    return out


SHAPES = [(2, 4), (3, 5, 7), (2, 2, 3, 4)]
# One program per shape: its operations one by one take longer to compile.
ensemble = jax.jit(ensemble_logits, static_argnames="geometric")


class TestEnsemble:
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("temperature", [1.0, 3.0])
    @pytest.mark.parametrize("geometric", [False, True])
    @pytest.mark.parametrize("kind", ["equal", "members", "rows"])
    def test_is_the_mean_of_the_distributions(self, shape, temperature, geometric, kind):
        logits = draw(*shape, scale=3.0)
        sizes = {"equal": None, "members": shape[:1], "rows": shape[:-1]}[kind]
        weights = None if sizes is None else np.abs(draw(*sizes, seed=4)) + 0.1
        expected = oracle(logits, weights, temperature, geometric=geometric)
        with jax.enable_x64(True):
            given = None if weights is None else jnp.asarray(weights)
            got = ensemble(
                jnp.asarray(logits), given, jnp.float64(temperature), geometric=geometric
            )
            assert got.dtype == jnp.float64
            np.testing.assert_allclose(jax.nn.softmax(got / temperature), expected, rtol=1e-6)
        given = None if weights is None else jnp.float32(weights)
        got = ensemble(jnp.float32(logits), given, jnp.float32(temperature), geometric=geometric)
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(jax.nn.softmax(got / temperature), expected, rtol=1e-4)

    def test_values_are_log_probabilities_times_the_temperature_or_means_of_logits(self):
        logits = draw(3, 5, 7, scale=3.0)
        weights = np.array([1.0, 2.0, 5.0])
        with jax.enable_x64(True):
            z, w = jnp.asarray(logits), jnp.asarray(weights)
            got = ensemble(z, w, 2.0)
            np.testing.assert_allclose(got, 2 * np.log(oracle(logits, weights, 2.0)), rtol=1e-6)
            got = ensemble(z, w, 2.0, geometric=True)
            np.testing.assert_allclose(got, np.average(logits, 0, weights), rtol=1e-9, atol=1e-12)

    def test_agrees_with_torch(self):
        torch = pytest.importorskip("torch")
        logits, weights = draw(3, 5, 7, scale=3.0), np.array([0.2, 0.5, 0.3])
        logs = torch.log_softmax(torch.tensor(logits) / 2.0, -1)
        mean = torch.logsumexp(logs + torch.log(torch.tensor(weights))[:, None, None], 0)
        got = ensemble(jnp.float32(logits), jnp.float32(weights), 2.0)
        np.testing.assert_allclose(got / 2, mean, rtol=1e-5, atol=1e-5)

    def test_a_loss_of_the_same_temperature_sees_the_mean(self):
        logits, student = draw(3, 5, 7, scale=3.0), draw(5, 7, seed=8)
        p = oracle(logits, [1.0, 2.0, 1.0], 4.0)
        q = np.apply_along_axis(lambda z: softmax(z / 4.0), -1, student)
        with jax.enable_x64(True):
            weights = jnp.array([1.0, 2.0, 1.0])
            teacher = ensemble(jnp.asarray(logits), weights, 4.0)
            got = kd_loss(jnp.asarray(student), teacher, 4.0)
            np.testing.assert_allclose(got, 16 * np.sum(p * np.log(p / q), -1), rtol=1e-6)

    @pytest.mark.parametrize("geometric", [False, True])
    def test_masks_and_temperatures_of_rows(self, geometric):
        logits = draw(3, 4, 6, scale=3.0)
        keep = np.array([True, False, True, True, False, True])
        noise = np.where(keep, 0.0, np.array([np.nan, np.inf, -np.inf, 1.0, np.nan, 0.0]))
        heats = np.array([0.5, 1.0, 2.0, 8.0])
        got = jax.jit(lambda z, t: ensemble_logits(z, None, t, where=keep, geometric=geometric))(
            jnp.float32(logits + noise), jnp.float32(heats)
        )
        assert (got[:, ~keep] == -jnp.inf).all()
        expected = oracle(logits, None, heats, keep, geometric)
        np.testing.assert_allclose(jax.nn.softmax(got / heats[:, None]), expected, rtol=1e-4)

    def test_what_members_rule_out(self):
        z = jnp.array([[0.0, -jnp.inf, -jnp.inf], [0.0, 0.0, -jnp.inf]])
        np.testing.assert_allclose(jax.nn.softmax(ensemble(z)), [0.75, 0.25, 0.0], rtol=1e-6)
        np.testing.assert_allclose(ensemble(z, geometric=True), [0.0, -np.inf, -np.inf], rtol=1e-6)
        # A member of weight 0 does not rule out, and its NaN is not read.
        for first in (z[0], jnp.full(3, jnp.nan)):
            for geometric in (False, True):
                both = jnp.stack([first, jnp.array([1.0, 2.0, 3.0])])
                got = ensemble(both, jnp.array([0.0, 4.0]), geometric=geometric)
                expected = jax.nn.softmax(both[1])
                np.testing.assert_allclose(jax.nn.softmax(got), expected, rtol=1e-5)
        nothing = jnp.full((2, 3), -jnp.inf)
        for geometric in (False, True):
            assert (ensemble(nothing, geometric=geometric) == -jnp.inf).all()
            nan = z.at[0, 0].set(jnp.nan)
            assert jnp.isnan(ensemble(nan, geometric=geometric)).any()

    @pytest.mark.parametrize("geometric", [False, True])
    def test_values_and_gradients_are_finite_for_all_weights(self, geometric):
        cases = [
            [[1e4, -1e4, 0.0], [-1e4, 1e4, 5.0]],
            [[1.0, -np.inf, 3.0], [2.0, 0.0, 1.0]],
            [[2.0, 2.0, 2.0], [2.0, 2.0, 2.0]],
        ]
        student = jnp.array([0.5, -1.0, 2.0])
        weights = jnp.array([[0.0, 1.0], [1e-6, 1.0], [0.5, 0.5], [1.0, 0.0]])

        def loss(z, w):
            teacher = ensemble_logits(z, w, 2.0, geometric=geometric)
            return kd_loss(student, teacher, 2.0), teacher

        both = jax.jit(jax.vmap(jax.value_and_grad(loss, (0, 1), has_aux=True), (None, 0)))
        for case in cases:
            (value, teacher), grads = both(jnp.float32(case), weights)
            assert np.isfinite(value).all()
            assert not np.isnan(teacher).any()
            assert all(np.isfinite(g).all() for g in grads)
        # Continuous at weight 0.
        np.testing.assert_allclose(value[0], value[1], rtol=1e-4)

    @pytest.mark.parametrize("geometric", [False, True])
    def test_gradients_equal_finite_differences(self, geometric):
        logits, weights = draw(3, 4), np.array([0.5, 2.0, 1.0])
        direction = draw(4, seed=7)

        def total(z, w, t):
            out = ensemble_logits(z, w, t, geometric=geometric)
            return jnp.sum(out * jnp.asarray(direction))

        with jax.enable_x64(True):
            args = [jnp.asarray(logits), jnp.asarray(weights), jnp.float64(1.5)]
            grads = jax.jit(jax.grad(total, (0, 1, 2)))(*args)
            value = jax.jit(total)
            for i, grad in enumerate(grads):
                for place in np.ndindex(grad.shape):
                    step = np.zeros(grad.shape)
                    step[place] = 1e-5
                    moved = [
                        value(*args[:i], args[i] + sign * step, *args[i + 1 :])
                        for sign in (1.0, -1.0)
                    ]
                    expected = (moved[0] - moved[1]) / 2e-5
                    np.testing.assert_allclose(grad[place], expected, rtol=1e-5, atol=1e-8)

    def test_traced_numbers_are_mapped_and_narrow_logits_read_in_float32(self):
        logits = jnp.float32(draw(2, 5, 7, scale=3.0))
        weights = jnp.array([[0.0, 1.0], [0.5, 0.5], [3.0, 1.0]])
        heats = jnp.array([0.5, 1.0, 4.0])
        mapped = jax.jit(jax.vmap(ensemble_logits, (None, 0, 0)))(logits, weights, heats)
        one = counting_jit(ensemble_logits)
        for i in range(3):
            np.testing.assert_allclose(
                mapped[i], one(logits, weights[i], heats[i]), rtol=1e-5, atol=1e-5
            )
        assert one.traces == 1
        for dtype in (jnp.bfloat16, jnp.float16):
            narrow = logits.astype(dtype)
            got = ensemble(narrow)
            assert got.dtype == jnp.float32
            np.testing.assert_array_equal(got, ensemble(jnp.float32(narrow)))
        got = ensemble(logits, jnp.array([1, 3]))
        expected = ensemble(logits, jnp.array([0.25, 0.75]))
        np.testing.assert_allclose(got, expected, rtol=1e-5)

    @pytest.mark.parametrize("geometric", [False, True])
    def test_odd_sizes(self, geometric):
        of = lambda *shape: ensemble(jnp.ones(shape), geometric=geometric)  # noqa: E731
        assert of(2, 0, 3).shape == (0, 3)
        assert of(2, 4, 0).shape == (4, 0)
        np.testing.assert_array_equal(jax.nn.softmax(of(3, 2, 1)), np.ones((2, 1)))
        np.testing.assert_allclose(jax.nn.softmax(of(1, 2, 4)), np.full((2, 4), 0.25))
        # Weights that are all 0, known only when it runs.
        got = jax.jit(lambda w: ensemble_logits(jnp.ones((2, 3)), w, geometric=geometric))
        assert jnp.isnan(got(jnp.zeros(2))).all()

    @pytest.mark.parametrize("kind", ["auto", "explicit"])
    @pytest.mark.parametrize("geometric", [False, True])
    def test_sharded_over_rows_or_classes(self, kind, geometric):
        logits, weights = jnp.float32(draw(3, 8, 12)), jnp.array([1.0, 2.0, 3.0])
        of = lambda z, w: ensemble_logits(z, w, 2.0, geometric=geometric)  # noqa: E731
        expected = jax.jit(of)(logits, weights)
        mesh = mesh_of(kind)
        for spec in ((None, "d", None), (None, None, "d")):
            with jax.set_mesh(mesh):
                place = NamedSharding(mesh, PartitionSpec(*spec))
                got = jax.jit(of)(jax.device_put(logits, place), weights)
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)

    def test_distilling_from_a_stack_of_teachers(self):
        stacked = jax.tree.map(lambda *w: jnp.stack(w), some_weights(0), some_weights(7))
        weights = jnp.array([1.0, 3.0])

        def teacher(batch):
            logits = jax.vmap(apply, (0, None))(batch["teachers"], batch["x"])
            return ensemble_logits(logits, weights, 2.0)

        student = lambda params, batch: batch["x"] @ params["s"]  # noqa: E731
        params, batch = {"s": jnp.ones((4, 3))}, {"x": X, "teachers": stacked}
        opt = distill(student, teacher, task_weight=0.0, temperature=2.0)
        updates, _ = jax.jit(lambda p, b: opt.update(p, opt.init(p), p, batch=b))(params, batch)
        several = np.stack([apply(some_weights(0), X), apply(some_weights(7), X)])
        p = oracle(np.float64(several), [1.0, 3.0], 2.0)
        q = np.apply_along_axis(lambda z: softmax(z / 2.0), -1, np.float64(X) @ np.ones((4, 3)))
        expected = 2.0 * np.float64(X).T @ (q - p) / 5
        np.testing.assert_allclose(updates["s"], expected, rtol=1e-4, atol=1e-6)

    def test_errors_name_the_argument(self):
        z = jnp.zeros((2, 4, 3))
        name = "ensemble_logits"
        with pytest.raises(ValueError, match=rf"{name}: `logits` must have the shape \[models"):
            ensemble_logits(jnp.zeros(3))
        with pytest.raises(TypeError, match=rf"{name}: `logits` must .*list.*jnp\.stack"):
            ensemble_logits([1.0, 2.0])
        rule = rf"{name}: `weights` must be real numbers of at least 0, shape \[2\] or \[2, 4\]"
        with pytest.raises(ValueError, match=rf"{rule}, got float32\[3\]"):
            ensemble_logits(z, jnp.ones(3))
        for wrong in (jnp.array([1.0, -1.0]), np.array([1.0, np.nan]), np.array([1.0, np.inf])):
            with pytest.raises(ValueError, match=rule):
                ensemble_logits(z, wrong)
        for wrong in ("equal", 1.0, jnp.array([True, False]), jnp.array([1j, 1j])):
            with pytest.raises(TypeError, match=rule):
                ensemble_logits(z, wrong)
        with pytest.raises(ValueError, match=f"{name}: `weights` must have a member above 0"):
            ensemble_logits(z, jnp.zeros(2))
        with pytest.raises(ValueError, match=rf"{name}: `temperature` must .*above 0"):
            ensemble_logits(z, None, -1.0)
        with pytest.raises(ValueError, match=rf"{name}: `where` must .* broadcast"):
            ensemble_logits(z, where=np.ones(5, bool))
