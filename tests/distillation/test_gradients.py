"""`distill` against the gradient of the summed loss, inside everything Optax offers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
from jaxcompress.distillation import DistillState, distill, kd_loss, mse_logits
from tests.conftest import lenient

WEIGHTS = np.random.default_rng(9).normal(size=(3, 4)).astype(np.float32)


def student(params, batch):
    return batch @ params["w"] + params["b"]


def teacher(batch):
    return jnp.tanh(batch @ jnp.asarray(WEIGHTS, batch.dtype)) * 3


def task(params, batch):
    return jnp.mean(jnp.square(student(params, batch)))


@pytest.fixture
def params():
    rng = np.random.default_rng(0)
    return {"w": jnp.float32(rng.normal(size=(3, 4))), "b": jnp.float32(rng.normal(size=(1, 4)))}


def batches(count):
    return jnp.float32(np.random.default_rng(1).normal(size=(count, 5, 3)))


def summed(params, batch, weight=1.0, task_weight=1.0, temperature=1.0, loss=kd_loss):
    """The loss whose gradient `distill` gives."""
    distilled = jnp.mean(loss(student(params, batch), teacher(batch), temperature))
    return task_weight * task(params, batch) + weight * distilled


def close(got, expected, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), got, expected)


def run(opt, params, xs):
    """The params after each batch, in a scan."""

    def step(carry, x):
        params, state = carry
        updates, state = opt.update(jax.grad(task)(params, x), state, params, batch=x)
        with jax.numpy_dtype_promotion("standard"):
            params = optax.apply_updates(params, updates)
        return (params, state), params

    (_, state), path = jax.lax.scan(step, (params, opt.init(params)), xs)
    return path, state


def run_summed(opt, params, xs, **numbers):
    """The same, with the gradient of the summed loss."""
    state, path = opt.init(params), []
    gradient = jax.jit(lambda params, x: jax.grad(summed)(params, x, **numbers))
    update = jax.jit(opt.update)
    for x in xs:
        updates, state = update(gradient(params, x), state, params)
        params = optax.apply_updates(params, updates)
        path.append(params)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *path)


@pytest.mark.parametrize("loss", [kd_loss, lambda s, t, _: mse_logits(s, t)])
@pytest.mark.parametrize("jit", [False, True])
def test_is_the_gradient_of_the_summed_loss(params, loss, jit):
    x = batches(1)[0]
    numbers = {"weight": 0.7, "task_weight": 0.3, "temperature": 2.0, "loss": loss}
    opt = distill(student, teacher, **numbers)
    update = jax.jit(opt.update) if jit else opt.update
    state = opt.init(params)
    assert state == DistillState(0)
    assert state.step.dtype == jnp.int32
    updates, state = update(jax.grad(task)(params, x), state, params, batch=x)
    close(updates, jax.grad(summed)(params, x, **numbers))
    assert state.step == 1


def test_zero_weights_leave_one_of_the_two(params):
    x = batches(1)[0]
    grads = jax.grad(task)(params, x)
    for numbers in ({"weight": 0.0}, {"task_weight": 0.0, "weight": 1.0}):
        opt = distill(student, teacher, **numbers)
        updates, _ = opt.update(grads, opt.init(params), params, batch=x)
        close(updates, jax.grad(summed)(params, x, **numbers))


def test_the_teacher_gets_no_gradient(params):
    x = batches(1)[0]

    def through(scale):
        opt = distill(student, lambda x: scale * teacher(x), task_weight=0.0)
        updates, _ = opt.update(params, opt.init(params), params, batch=x)
        return sum(jnp.sum(jnp.square(u)) for u in jax.tree.leaves(updates))

    # The updates depend on the teacher, but differentiating them does not reach it.
    assert through(1.0) != through(1.1)
    assert jax.grad(through)(1.0) == 0


def test_schedules_are_read_at_the_step(params):
    xs = batches(4)
    opt = distill(
        student,
        teacher,
        weight=jc.schedules.linear(0.0, 1.0, 0, 2),
        task_weight=jc.schedules.linear(1.0, 0.0, 0, 2),
        temperature=jc.schedules.cosine(4.0, 2.0, 0, 2),
    )
    state = opt.init(params)
    for x, weight, temperature in zip(xs, [0.0, 0.5, 1.0, 1.0], [4.0, 3.0, 2.0, 2.0], strict=True):
        updates, state = opt.update(jax.grad(task)(params, x), state, params, batch=x)
        numbers = {"weight": weight, "task_weight": 1 - weight, "temperature": temperature}
        close(updates, jax.grad(summed)(params, x, **numbers))


@pytest.mark.parametrize(
    "rest",
    [
        lambda: optax.adam(1e-2),
        lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1, momentum=0.9)),
        lambda: jc.straight_through(optax.sgd(0.1), jc.prune(0.5)),
    ],
    ids=["adam", "clip", "straight_through"],
)
def test_first_in_a_chain_it_is_training_on_the_sum(params, rest):
    xs, numbers = batches(4), {"weight": 0.7, "task_weight": 0.3, "temperature": 2.0}
    opt = optax.chain(distill(student, teacher, **numbers), lenient(rest()))
    path, state = jax.jit(lambda params, xs: run(opt, params, xs))(params, xs)
    with jax.numpy_dtype_promotion("standard"):
        expected = run_summed(lenient(rest()), params, xs, **numbers)
    close(path, expected, rtol=1e-4, atol=1e-5)
    assert state[0].step == 4


def test_before_multi_steps_every_mini_batch_is_distilled_on(params):
    xs = batches(4)
    inner = optax.MultiSteps(optax.sgd(0.1), 4).gradient_transformation()
    opt = optax.chain(distill(student, teacher, weight=0.7), lenient(inner))
    path, state = run(opt, params, xs)
    grads = [jax.grad(summed)(params, x, weight=0.7) for x in xs]
    expected = jax.tree.map(lambda p, *g: p - 0.1 * sum(g) / 4, params, *grads)
    close(jax.tree.map(lambda leaf: leaf[-1], path), expected)
    close(jax.tree.map(lambda leaf: leaf[2], path), params, rtol=0, atol=0)
    assert state[0].step == 4


def test_inside_multi_steps_the_last_mini_batch_is_distilled_on(params):
    xs = batches(4)
    inner = optax.chain(distill(student, teacher, weight=0.7), optax.sgd(0.1))
    steps = optax.MultiSteps(inner, 4)
    opt = lenient(optax.GradientTransformationExtraArgs(steps.init, steps.update))
    path, state = run(opt, params, xs)
    grads = [jax.grad(task)(params, x) for x in xs]
    last = jax.grad(summed)(params, xs[-1], weight=0.7, task_weight=0.0)
    expected = jax.tree.map(lambda p, d, *g: p - 0.1 * (sum(g) / 4 + d), params, last, *grads)
    close(jax.tree.map(lambda leaf: leaf[-1], path), expected)
    assert state.inner_opt_state[0].step == 1


def test_inject_hyperparams_shows_and_sweeps_the_numbers(params):
    x = batches(1)[0]
    opt = optax.inject_hyperparams(distill, static_args=("student", "teacher", "loss"))(
        student=student, teacher=teacher, weight=0.7, temperature=2.0
    )
    grads, state = jax.grad(task)(params, x), opt.init(params)
    assert set(state.hyperparams) == {"weight", "task_weight", "temperature"}
    state.hyperparams["weight"] = jnp.float32(0.2)
    updates, _ = jax.jit(opt.update)(grads, state, params, batch=x)
    close(updates, jax.grad(summed)(params, x, weight=0.2, temperature=2.0))


@pytest.mark.parametrize("name", ["weight", "task_weight", "temperature"])
def test_vmap_over_a_number_is_a_loop(params, name):
    x, values = batches(1)[0], jnp.array([0.5, 1.0, 4.0])
    grads = jax.grad(task)(params, x)

    def one(value):
        opt = distill(student, teacher, **{name: value})
        return opt.update(grads, opt.init(params), params, batch=x)[0]

    together = jax.jit(jax.vmap(one))(values)
    for i, value in enumerate(values):
        close(jax.tree.map(lambda leaf, i=i: leaf[i], together), one(float(value)))


def test_none_and_integer_leaves_pass_unchanged(params):
    x = batches(1)[0]
    rich = {**params, "none": None, "table": jnp.arange(3), "flag": jnp.array(True)}
    grads = jax.grad(task)(params, x)
    zero = np.zeros((3,), jax.dtypes.float0)
    incoming = {**grads, "none": None, "table": zero, "flag": jnp.array(True)}
    opt = distill(student, teacher)
    updates, _ = opt.update(incoming, opt.init(rich), rich, batch=x)
    assert updates["none"] is None
    assert updates["table"] is zero
    assert updates["flag"].dtype == jnp.bool_
    expected = jax.grad(summed)(params, x)
    close({name: updates[name] for name in expected}, expected)
    # A frozen leaf: no update comes, none is made.
    updates, _ = opt.update({**incoming, "b": None}, opt.init(rich), rich, batch=x)
    assert updates["b"] is None
    close(updates["w"], expected["w"])


@pytest.mark.parametrize("param", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("update", ["bfloat16", "float32"])
def test_updates_keep_their_dtype(params, param, update):
    x = batches(1)[0]
    narrow = jax.tree.map(lambda p: p.astype(param), params)
    grads = jax.tree.map(lambda p: jnp.ones(p.shape, update), params)
    opt = distill(student, teacher)
    updates, _ = opt.update(grads, opt.init(narrow), narrow, batch=x.astype(param))
    assert all(u.dtype == update for u in jax.tree.leaves(updates))
    expected = jax.grad(lambda p: jnp.mean(kd_loss(student(p, x), teacher(x))))(params)
    expected = jax.tree.map(lambda g: g + 1, expected)
    tolerance = 1e-5 if param == update == "float32" else 3e-2
    close(jax.tree.map(jnp.float32, updates), expected, rtol=tolerance, atol=tolerance)


def test_an_integer_temperature_reaches_any_loss_as_a_real_one(params):
    x, grads = batches(1)[0], []
    for temperature in (2, 2.0, jnp.int32(2), lambda step: step + 2):
        opt = distill(student, teacher, temperature=temperature, loss=lambda s, t, T: (s - t) / T)
        grads.append(opt.update(params, opt.init(params), params, batch=x)[0])
    for other in grads[1:]:
        close(other, grads[0], rtol=0, atol=0)


def test_an_empty_batch_adds_nothing(params):
    opt = distill(student, teacher)
    updates, _ = opt.update(params, opt.init(params), params, batch=jnp.zeros((0, 3)))
    close(updates, params, rtol=0, atol=0)


def test_the_batch_is_any_tree_and_other_extra_arguments_are_ignored(params):
    x = batches(1)[0]
    opt = distill(
        lambda params, batch: student(params, batch["x"]),
        lambda batch: batch["x"] @ batch["teacher"],
    )
    batch = {"x": x, "teacher": jnp.asarray(WEIGHTS)}
    updates, _ = opt.update(params, opt.init(params), params, batch=batch, value=1.0)
    loss = lambda p: jnp.mean(kd_loss(student(p, x), x @ WEIGHTS))  # noqa: E731
    close(updates, jax.tree.map(jnp.add, params, jax.grad(loss)(params)))


def test_the_state_can_be_shaped_without_arrays(params):
    opt = distill(student, teacher)
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    x = jax.ShapeDtypeStruct((5, 3), jnp.float32)
    state = jax.eval_shape(opt.init, shapes)
    update = lambda u, s, p, x: opt.update(u, s, p, batch=x)  # noqa: E731
    assert jax.eval_shape(update, shapes, state, shapes, x) == (shapes, state)


def test_errors_say_what_to_do(params):
    opt, x = distill(student, teacher), batches(1)[0]
    state = opt.init(params)
    with pytest.raises(ValueError, match=r"distill needs params.*opt\.update"):
        opt.update(params, state, batch=x)
    with pytest.raises(TypeError, match=r"distill: `batch` must.*opt.update\(grads, state, params"):
        opt.update(params, state, params)
    wrong = distill(student, lambda x: teacher(x)[:, :2])
    with pytest.raises(
        ValueError, match=r"distill: `teacher` must.*float32\[5, 4\].*float32\[5, 2\]"
    ):
        wrong.update(params, state, params, batch=x)
    with pytest.raises(TypeError, match="distill: `loss` must return real"):
        distill(student, teacher, loss=lambda s, t, _: jnp.argmax(s)).update(
            params, state, params, batch=x
        )
    with pytest.raises(TypeError, match="distill: `teacher` must be a function"):
        distill(student, WEIGHTS)
    with pytest.raises(TypeError, match="distill: `weight` must be a real number"):
        distill(student, teacher, weight="heavy")
    with pytest.raises(ValueError, match="distill: `temperature` must be a real number above 0"):
        distill(student, teacher, temperature=0.0)
