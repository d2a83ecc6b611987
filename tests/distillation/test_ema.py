"""The mean teacher against running averages in NumPy float64, and Optax's `ema` as a peer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxcompress as jc
from jaxcompress.distillation import EmaTeacherState, distill, ema_params, ema_teacher, frozen
from tests.conftest import counting_jit, lenient, mesh_of


def some_params(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return {"w": jnp.asarray(rng.normal(size=(4, 3)), dtype), "b": jnp.asarray([1.0, -2.0], dtype)}


def close(got, expected, rtol=1e-6, atol=1e-7):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), got, expected)


def walk(opt, params, steps=6, grads=None, **extra):
    """The params and the states after each step, the params before the first included."""
    state, path = opt.init(params), []
    path.append((params, state))
    update = jax.jit(lambda g, s, p: opt.update(g, s, p, **extra))
    rng = np.random.default_rng(5)
    for _ in range(steps):
        g = jax.tree.map(lambda w: jnp.asarray(rng.normal(size=w.shape), w.dtype), params)
        updates, state = update(g if grads is None else grads, state, params)
        with jax.numpy_dtype_promotion("standard"):
            params = optax.apply_updates(params, updates)
        path.append((params, state))
    return path


def numbers(path, name="w"):
    return [np.asarray(params[name], np.float64) for params, _ in path]


def averages(path, name="w"):
    return [ema_params(state)[name] for _, state in path]


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.999, 1.0])
def test_the_plain_average_is_the_papers(decay):
    with jax.enable_x64(True):
        opt = optax.chain(optax.sgd(0.1), ema_teacher(decay, debias=False))
        path = walk(opt, some_params(dtype=np.float64))
        expected = numbers(path)[0]
        for value, average in zip(numbers(path)[1:], averages(path)[1:], strict=True):
            expected = decay * expected + (1 - decay) * value
            assert average.dtype == jnp.float64
            np.testing.assert_allclose(average, expected, rtol=1e-9)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.999])
def test_without_bias_it_is_the_normalized_sum_of_what_came_after_updates(decay):
    with jax.enable_x64(True):
        opt = optax.chain(optax.sgd(0.1), ema_teacher(decay))
        path = walk(opt, some_params(dtype=np.float64))
        values = numbers(path)
        np.testing.assert_array_equal(averages(path)[0], values[0])
        for t in range(1, len(path)):
            weights = [(1 - decay) * decay ** (t - i) for i in range(1, t + 1)]
            total = sum(w * v for w, v in zip(weights, values[1 : t + 1], strict=True))
            np.testing.assert_allclose(averages(path)[t], total / sum(weights), rtol=1e-9)


def test_agrees_with_optax_on_the_params_as_updates():
    with jax.enable_x64(True):
        path = walk(optax.chain(optax.sgd(0.1), ema_teacher(0.9)), some_params(dtype=np.float64))
        theirs = lenient(optax.ema(0.9, debias=True))
        state = theirs.init(path[0][0])
        for params, ours in path[1:]:
            average, state = theirs.update(params, state)
            close(ema_params(ours), average, rtol=1e-9)


WARM_UPS = {
    "mean teacher": lambda t: min(0.8, 1 - 1 / (t + 2)),
    "tensorflow": lambda t: min(0.8, (1 + t) / (10 + t)),
}
SCHEDULES = {
    "mean teacher": lambda t: jnp.minimum(0.8, 1 - 1 / (t.astype(float) + 2)),
    "tensorflow": lambda t: jnp.minimum(0.8, (1 + t.astype(float)) / (10 + t.astype(float))),
}


@pytest.mark.parametrize("name", WARM_UPS)
def test_warm_ups_are_schedules(name):
    with jax.enable_x64(True):
        opt = optax.chain(optax.sgd(0.1), ema_teacher(SCHEDULES[name], debias=False))
        path = walk(opt, some_params(dtype=np.float64), steps=8)
        values, expected = numbers(path), numbers(path)[0]
        for t in range(8):
            d = WARM_UPS[name](t)
            expected = d * expected + (1 - d) * values[t + 1]
            np.testing.assert_allclose(averages(path)[t + 1], expected, rtol=1e-9)
            if name == "mean teacher" and t < 4:  # the mean of all until the decay is reached
                np.testing.assert_allclose(expected, np.mean(values[: t + 2], 0), rtol=1e-9)
        assert path[-1][1][1].step == 8


def test_a_schedule_with_debias_weighs_each_params_by_the_decays_after_it():
    decays = [0.2, 0.9, 0.0, 0.7, 1.0, 0.5]
    with jax.enable_x64(True):
        schedule = lambda t: jnp.asarray(decays)[t]  # noqa: E731
        path = walk(
            optax.chain(optax.sgd(0.1), ema_teacher(schedule)), some_params(dtype="float64")
        )
        for t in range(1, len(path)):
            weights = [(1 - decays[i]) * np.prod(decays[i + 1 : t]) for i in range(t)]
            total = sum(w * v for w, v in zip(weights, numbers(path)[1 : t + 1], strict=True))
            np.testing.assert_allclose(averages(path)[t], total / sum(weights), rtol=1e-9)


def test_a_first_decay_of_1_keeps_the_initial_params():
    path = walk(optax.chain(optax.sgd(0.1), ema_teacher(1.0)), some_params(), steps=2)
    np.testing.assert_array_equal(averages(path)[-1], path[0][0]["w"])


def test_updates_pass_unchanged_and_the_last_link_sees_the_final_ones():
    params = some_params()
    grads = jax.tree.map(jnp.ones_like, params)
    link = ema_teacher(0.0)
    updates, _ = link.update(grads, link.init(params), params)
    assert updates is grads
    # Before the optimizer it would average params plus gradients.
    opt = optax.chain(lenient(optax.adam(0.1)), link)
    (_, _), (after, state) = walk(opt, params, steps=1)
    close(ema_params(state), after)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_params_are_averaged_in_float32(dtype):
    params = jax.tree.map(lambda w: w.astype(dtype), some_params())
    path = walk(optax.chain(optax.sgd(0.1), ema_teacher(0.99)), params, steps=30)
    average = averages(path)[-1]
    assert average.dtype == jnp.float32
    weights = np.array([0.99 ** (30 - i) for i in range(1, 31)])
    expected = np.tensordot(weights / weights.sum(), numbers(path)[1:], 1)
    np.testing.assert_allclose(average, expected, rtol=1e-5, atol=1e-6)
    # In the narrow dtype itself the steps are lost to rounding.
    assert np.abs(expected - np.asarray(average.astype(dtype), np.float64)).max() > 1e-5
    assert ema_params(path[-1][1], params)["w"].dtype == dtype


def test_float32_updates_of_narrow_params_are_rounded_as_the_params_are():
    params = {"w": jnp.ones((3,), jnp.bfloat16)}
    link = ema_teacher(0.0)
    updates = {"w": jnp.float32([1e-3, 1e-2, 1.0])}
    _, state = jax.jit(link.update)(updates, link.init(params), params)
    with jax.numpy_dtype_promotion("standard"):
        moved = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(ema_params(state, params)["w"], moved["w"])
    np.testing.assert_array_equal(ema_params(state)["w"], moved["w"].astype(jnp.float32))


def test_other_leaves_are_copied():
    params = {
        "w": jnp.ones(2),
        "none": None,
        "frozen": jnp.full(2, 3.0),
        "table": jnp.arange(3),
        "count": jnp.arange(3),
        "key": jax.random.key(1),
    }
    zero = np.zeros((3,), jax.dtypes.float0)
    updates = {
        "w": jnp.ones(2),
        "none": None,
        "frozen": None,
        "table": zero,
        "count": jnp.ones(3, jnp.int32),
        "key": np.zeros((), jax.dtypes.float0),
    }
    link = ema_teacher(0.5, debias=False)
    state = link.init(params)
    _, state = link.update(updates, state, params)
    out = ema_params(state, params)
    assert out["none"] is None
    np.testing.assert_array_equal(out["w"], [1.5, 1.5])
    np.testing.assert_array_equal(out["frozen"], [3.0, 3.0])
    np.testing.assert_array_equal(out["table"], [0, 1, 2])
    np.testing.assert_array_equal(out["count"], [1, 2, 3])
    assert out["key"] == params["key"]


def test_after_straight_through_it_averages_the_compressed_weights():
    params = {"w": some_params()["w"]}
    opt = optax.chain(jc.straight_through(optax.sgd(0.1), jc.prune(0.5)), ema_teacher(0.5))
    path = walk(opt, params, steps=3)
    expected = (numbers(path)[1] + 2 * numbers(path)[2] + 4 * numbers(path)[3]) / 7
    np.testing.assert_allclose(averages(path)[-1], expected, rtol=1e-5, atol=1e-6)
    assert (numbers(path)[-1] == 0).sum() == 6


def test_inside_straight_through_it_averages_the_latent_weights():
    params = {"w": some_params()["w"]}
    opt = jc.straight_through(optax.chain(optax.sgd(0.1), ema_teacher(0.5)), jc.prune(0.5))
    path = walk(opt, params, steps=3)
    latents = [np.asarray(jc.latent(state)["w"], np.float64) for _, state in path]
    expected = (latents[1] + 2 * latents[2] + 4 * latents[3]) / 7
    np.testing.assert_allclose(averages(path)[-1], expected, rtol=1e-5, atol=1e-6)
    assert (averages(path)[-1] != 0).all()


def test_distilling_from_the_mean_teacher_is_the_loop_by_hand():
    apply = lambda params, x: x @ params["w"]  # noqa: E731
    student = lambda params, batch: apply(params, batch["x"])  # noqa: E731
    params = {"w": some_params()["w"]}
    xs = jnp.float32(np.random.default_rng(3).normal(size=(4, 5, 4)))
    teach = distill(student, lambda batch: batch["teacher"](batch["x"]), weight=0.5)
    opt = optax.chain(teach, optax.sgd(0.1), ema_teacher(0.9, debias=False))
    task = lambda params, x: jnp.mean(jnp.sin(apply(params, x)))  # noqa: E731

    def step(carry, x):
        params, state = carry
        batch = {"x": x, "teacher": frozen(apply, ema_params(state, params))}
        updates, state = opt.update(jax.grad(task)(params, x), state, params, batch=batch)
        return (optax.apply_updates(params, updates), state), None

    start = (params, opt.init(params))
    (got, state), _ = jax.jit(lambda carry, xs: jax.lax.scan(step, carry, xs))(start, xs)
    teacher = params

    @jax.jit
    def summed(params, teacher, x):
        distance = jc.kd_loss(apply(params, x), apply(teacher, x))
        return task(params, x) + 0.5 * jnp.mean(distance)

    gradient = jax.jit(jax.grad(summed))
    for x in xs:
        grads = gradient(params, teacher, x)
        params = jax.tree.map(lambda w, g: w - 0.1 * g, params, grads)
        teacher = jax.tree.map(lambda a, w: 0.9 * a + 0.1 * w, teacher, params)
    close(got, params, rtol=1e-5, atol=1e-6)
    close(ema_params(state), teacher, rtol=1e-5, atol=1e-6)


def test_multi_steps_around_the_chain_counts_updates_and_before_it_mini_steps():
    params = some_params()
    steps = optax.MultiSteps(optax.chain(optax.sgd(0.1), ema_teacher(0.5)), 3)
    around = lenient(optax.GradientTransformationExtraArgs(steps.init, steps.update))
    path = walk(around, params, steps=6)
    states = [s for s in jax.tree.leaves(path[-1], is_leaf=is_ema) if is_ema(s)]
    assert states[0].step == 2
    expected = (numbers(path)[3] + 2 * numbers(path)[6]) / 3
    np.testing.assert_allclose(averages(path)[-1], expected, rtol=1e-5)
    inner = optax.MultiSteps(optax.sgd(0.1), 3).gradient_transformation()
    path = walk(optax.chain(lenient(inner), ema_teacher(0.5)), params, steps=6)
    assert path[-1][1][1].step == 6


def is_ema(x):
    return isinstance(x, EmaTeacherState)


def test_partition_masked_and_inject_hyperparams():
    params = some_params()
    labels = {"w": "fast", "b": "slow"}
    fast, slow = ema_teacher(0.5, debias=False), ema_teacher(0.9, debias=False)
    opt = optax.chain(optax.sgd(0.1), optax.partition({"fast": fast, "slow": slow}, labels))
    path = walk(opt, params, steps=1)
    old, new, out = path[0][0], path[1][0], ema_params(path[1][1])
    close(out["w"], 0.5 * old["w"] + 0.5 * new["w"])
    close(out["b"], 0.9 * old["b"] + 0.1 * new["b"])
    only = optax.chain(optax.sgd(0.1), optax.masked(fast, {"w": True, "b": False}))
    (_, _), (new, state) = walk(only, params, steps=1)
    assert isinstance(ema_params(state)["b"], optax.MaskedNode)
    np.testing.assert_array_equal(ema_params(state, new)["b"], new["b"])
    swept = lenient(optax.inject_hyperparams(ema_teacher, static_args="debias")(0.5, debias=False))
    state = swept.init(params)
    state.hyperparams["decay"] = jnp.float32(0.25)
    _, state = swept.update(params, state, params)
    close(ema_params(state)["w"], 1.75 * params["w"])


@pytest.mark.parametrize("debias", [False, True])
def test_decay_is_traced_and_mapped(debias):
    params, decays = some_params(), jnp.array([0.0, 0.5, 1.0])

    def run(decay):
        opt = optax.chain(optax.sgd(0.1), ema_teacher(decay, debias=debias))

        def step(carry, _):
            params, state = carry
            updates, state = opt.update(params, state, params)
            return (optax.apply_updates(params, updates), state), None

        return ema_params(jax.lax.scan(step, (params, opt.init(params)), length=3)[0][1])

    one = counting_jit(run)
    together = jax.jit(jax.vmap(run))(decays)
    for i, decay in enumerate(decays):
        close(jax.tree.map(lambda x, i=i: x[i], together), one(decay))
    assert one.traces == 1
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(together))


def test_a_step_may_donate_params_and_state():
    opt = optax.chain(optax.sgd(0.1), ema_teacher(0.5))
    params = some_params()
    state = opt.init(params)

    def step(params, state):
        updates, state = opt.update(params, state, params)
        return optax.apply_updates(params, updates), state

    donating = jax.jit(step, donate_argnums=(0, 1))
    for _ in range(2):
        params, state = donating(params, state)
    assert np.isfinite(ema_params(state)["w"]).all()


def test_the_state_can_be_shaped_without_arrays_and_keeps_its_types():
    opt = ema_teacher(0.5)
    shapes = jax.eval_shape(some_params)
    state = jax.eval_shape(opt.init, shapes)
    assert jax.eval_shape(opt.update, shapes, state, shapes) == (shapes, state)


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_the_average_is_sharded_as_the_params(kind):
    params = {"w": some_params()["w"]}
    expected = walk(ema_teacher(0.5), params, steps=3)[-1][1]
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        place = NamedSharding(mesh, PartitionSpec("d", None))
        params = jax.device_put(params, place)
        grads = jax.device_put(jax.tree.map(jnp.ones_like, params), place)
        opt = optax.chain(optax.sgd(0.1), ema_teacher(0.5))
        state = jax.jit(opt.init)(params)
        state = jax.jit(opt.update)(grads, state, params)[1]
        average = ema_params(state)["w"]
        assert average.sharding.is_equivalent_to(place, 2)
    close(average, params["w"] - 0.1, rtol=1e-5)
    assert expected.step == 3


def test_errors_say_what_to_do():
    params = some_params()
    link = ema_teacher()
    with pytest.raises(ValueError, match=r"ema_teacher: `params` must be given.*update\(grads"):
        link.update(params, link.init(params))
    with pytest.raises(ValueError, match=r"ema_teacher: `decay` must be .*\[0, 1\], got 1.5"):
        ema_teacher(1.5)
    with pytest.raises(TypeError, match="ema_teacher: `decay` must be a real number"):
        ema_teacher(None)
    with pytest.raises(ValueError, match=r"ema_params: `opt_state` must hold .* last in the chain"):
        ema_params(optax.sgd(0.1).init(params))
