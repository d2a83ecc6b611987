"""`dot` against the paper's algorithm in NumPy and against two SGDs of PyTorch; `separate`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
from jaxcompress.distillation import DotState, combine_gradients, distill, dot, separate
from tests.conftest import lenient


def params():
    rng = np.random.default_rng(0)
    return {"b": jnp.float32(rng.normal(size=4)), "w": jnp.float32(rng.normal(size=(8, 4)))}


def drawn(steps, seed=1, dtype=np.float32):
    """Gradients of the task and of the teacher, for some steps."""
    rng = np.random.default_rng(seed)
    draw = lambda: {  # noqa: E731
        "b": jnp.asarray(rng.normal(size=(steps, 4)), dtype),
        "w": jnp.asarray(rng.normal(size=(steps, 8, 4)), dtype),
    }
    return draw(), draw()


def train(combination, tasks, teachers, start=None, rest=None):
    """The params after each step, in a scan."""
    rest = lenient(optax.sgd(0.1)) if rest is None else rest
    opt = optax.chain(combine_gradients(combination), rest)
    start = params() if start is None else start

    def step(carry, grads):
        p, state = carry
        updates, state = opt.update(grads[0], state, p, other_grads=[grads[1]])
        with jax.numpy_dtype_promotion("standard"):
            p = optax.apply_updates(p, updates)
        return (p, state), p

    return jax.lax.scan(step, (start, opt.init(start)), (tasks, teachers))


def close(got, expected, rtol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol), got, expected)


def test_is_the_algorithm_of_the_paper():
    momentum, delta, rate = 0.9, 0.075, 0.1
    with jax.enable_x64(True):
        tasks, teachers = drawn(6, dtype=np.float64)
        start = jax.tree.map(lambda p: p.astype(jnp.float64), params())
        run = jax.jit(lambda *g: train(dot(momentum, delta), *g, start=start)[1])
        path = run(tasks, teachers)
        for name in start:
            theta = np.array(start[name])
            v_ce, v_kd = np.zeros_like(theta), np.zeros_like(theta)
            for step in range(6):
                v_ce = np.asarray(tasks[name][step]) + (momentum - delta) * v_ce
                v_kd = np.asarray(teachers[name][step]) + (momentum + delta) * v_kd
                theta = theta - rate * (v_ce + v_kd)
                np.testing.assert_allclose(path[name][step], theta, rtol=1e-12)


def test_moves_as_two_optimizers_of_pytorch_do():
    torch = pytest.importorskip("torch")
    tasks, teachers = drawn(6)
    path = train(dot(0.9, 0.075), tasks, teachers)[1]
    moved = {name: 0.0 for name in path}
    for grads, momentum in ((tasks, 0.825), (teachers, 0.975)):
        for name in path:
            theta = torch.zeros(path[name].shape[1:])
            sgd = torch.optim.SGD([theta], lr=0.1, momentum=momentum)
            for grad in np.asarray(grads[name]):
                theta.grad = torch.tensor(grad)
                sgd.step()
            moved[name] = moved[name] + theta.numpy()
    for name, start in params().items():
        np.testing.assert_allclose(path[name][-1], start + moved[name], rtol=1e-5, atol=1e-6)


def test_weight_decay_before_it_goes_to_the_task():
    tasks, teachers = drawn(3)
    decayed = optax.chain(optax.add_decayed_weights(0.1), combine_gradients(dot()))
    state, p = decayed.init(params()), params()
    plain, held = combine_gradients(dot()), combine_gradients(dot()).init(params())
    for i in range(3):
        first, second = (jax.tree.map(lambda g: g[i], g) for g in (tasks, teachers))  # noqa: B023
        got, state = decayed.update(first, state, p, other_grads=[second])
        first = jax.tree.map(lambda g, w: g + 0.1 * w, first, p)
        expected, held = plain.update(first, held, p, other_grads=[second])
        close(got, expected)


def test_without_a_difference_it_is_the_momentum_of_the_sum():
    tasks, teachers = drawn(4)
    path = train(dot(0.9, 0.0), tasks, teachers)[1]
    both, none = jax.tree.map(jnp.add, tasks, teachers), jax.tree.map(jnp.zeros_like, tasks)
    rest = lenient(optax.sgd(0.1, momentum=0.9))
    close(path, train(separate(optax.identity(), optax.identity()), both, none, rest=rest)[1], 1e-5)


def test_it_is_a_case_of_separate():
    tasks, teachers = drawn(4)
    traces = separate(optax.trace(0.9 - 0.075), optax.trace(0.9 + 0.075))
    close(train(dot(0.9, 0.075), tasks, teachers)[1], train(traces, tasks, teachers)[1])


def test_separate_gives_each_its_own_transformation():
    tasks, teachers = drawn(4)
    each = separate(optax.identity(), optax.clip_by_global_norm(0.5), optax.scale(-2.0))
    first, second = (jax.tree.map(lambda g: g[0], g) for g in (tasks, teachers))
    got, _ = each.update((first, second, first), each.init(params(), 3), params())
    clipped, _ = optax.clip_by_global_norm(0.5).update(second, ())
    close(got, jax.tree.map(lambda a, b: b - a, first, clipped))
    # An adaptive one for the teacher, and any optimizer after it: the moments are its own.
    adaptive = separate(optax.identity(), lenient(optax.scale_by_adam()))
    path = train(adaptive, tasks, teachers, rest=lenient(optax.adam(0.1)))[1]
    inner, outer = lenient(optax.scale_by_adam()), lenient(optax.adam(0.1))
    p, held, state = params(), inner.init(params()), outer.init(params())
    for i in range(4):
        first, second = (jax.tree.map(lambda g: g[i], g) for g in (tasks, teachers))  # noqa: B023
        moved, held = inner.update(second, held, p)
        updates, state = outer.update(jax.tree.map(jnp.add, first, moved), state, p)
        p = optax.apply_updates(p, updates)
    close(jax.tree.map(lambda leaf: leaf[-1], path), p, 1e-5)


def test_numbers_on_schedules_and_under_vmap():
    tasks, teachers = drawn(4)
    momenta, deltas = [0.0, 0.3, 0.6, 0.9], [0.0, 0.1, 0.05, 0.02]
    table = lambda values: lambda step: jnp.asarray(values)[step]  # noqa: E731
    path = train(dot(table(momenta), table(deltas)), tasks, teachers)[1]
    theta, v_ce, v_kd = np.array(params()["b"], np.float64), 0.0, 0.0
    for i, (momentum, delta) in enumerate(zip(momenta, deltas, strict=True)):
        v_ce = np.asarray(tasks["b"][i]) + (momentum - delta) * v_ce
        v_kd = np.asarray(teachers["b"][i]) + (momentum + delta) * v_kd
        theta = theta - 0.1 * (v_ce + v_kd)
        np.testing.assert_allclose(path["b"][i], theta, rtol=1e-5, atol=1e-6)

    def last(momentum, delta):
        return train(dot(momentum, delta), tasks, teachers)[0][0]

    grid = jnp.array([0.5, 0.8]), jnp.array([0.1, 0.05])
    together = jax.jit(jax.vmap(last))(*grid)
    for i, (momentum, delta) in enumerate(zip(*grid, strict=True)):
        mine = jax.tree.map(lambda leaf: leaf[i], together)  # noqa: B023
        close(mine, last(float(momentum), float(delta)), 1e-5)


@pytest.mark.parametrize("make", [dot, lambda: separate(optax.trace(0.9), optax.trace(0.99))])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_momenta_of_narrow_params_are_float32(make, dtype):
    tasks, teachers = drawn(50)
    # Small steps that a bfloat16 momentum of 1 / (1 - 0.99) of them would not see.
    tasks = jax.tree.map(lambda g: jnp.zeros_like(g, dtype), tasks)
    teachers = jax.tree.map(lambda g: jnp.ones_like(g, dtype), teachers)
    narrow = jax.tree.map(lambda p: jnp.zeros_like(p, dtype), params())
    (_, state), path = train(make(), tasks, teachers, start=narrow, rest=optax.identity())
    assert all(p.dtype == dtype for p in jax.tree.leaves(path))
    moments = jax.tree.leaves(state[0].combination)
    assert all(m.dtype == jnp.float32 for m in moments)
    momentum = 0.975 if make is dot else 0.99
    expected = (1 - momentum**50) / (1 - momentum)
    np.testing.assert_allclose(max(m.max() for m in moments), expected, rtol=1e-4)


def test_integer_and_missing_leaves_have_no_momentum():
    rich = {**params(), "none": None, "table": jnp.arange(3), "key": jax.random.key(0)}
    state = dot().init(rich, 2)
    assert state.task["none"] is None
    assert state.task["table"] == optax.MaskedNode()
    grads = {**params(), "none": None, "table": None, "key": None}
    got, after = dot().update((grads, grads), state, rich)
    assert got["table"] is None
    close({name: got[name] for name in params()}, jax.tree.map(lambda p: 2 * p, params()))
    assert jax.tree.structure(after) == jax.tree.structure(state)


def student(params, x):
    return x @ params["w"] + params["b"][None, :]


def test_inside_distill_and_multi_steps():
    x = jnp.float32(np.random.default_rng(3).normal(size=(5, 8)))
    teacher = lambda x: 3.0 * x[:, :4]  # noqa: E731
    task = lambda p: jnp.mean(student(p, x) ** 2)  # noqa: E731
    mean = lambda p: jnp.mean(jc.kd_loss(student(p, x), teacher(x), 2.0))  # noqa: E731
    link = distill(
        student, teacher, weight=0.9, task_weight=0.1, temperature=2.0, combine=dot(0.9, 0.05)
    )
    steps = optax.MultiSteps(optax.chain(link, optax.sgd(0.1)), 2)
    opt = lenient(optax.GradientTransformationExtraArgs(steps.init, steps.update))
    p, state = params(), opt.init(params())
    theta = params()
    v_task = v_kd = jax.tree.map(jnp.zeros_like, theta)
    update = jax.jit(lambda p, state: opt.update(jax.grad(task)(p), state, p, batch=x))
    for i in range(4):
        updates, state = update(p, state)
        p = optax.apply_updates(p, updates)
        if i % 2:  # The same batch twice: its mean gradient.
            v_task = jax.tree.map(lambda v, g: 0.85 * v + 0.1 * g, v_task, jax.grad(task)(theta))
            v_kd = jax.tree.map(lambda v, g: 0.95 * v + 0.9 * g, v_kd, jax.grad(mean)(theta))
            theta = jax.tree.map(lambda t, a, b: t - 0.1 * (a + b), theta, v_task, v_kd)
        close(p, theta, 1e-5)
    assert isinstance(state.inner_opt_state[0].combination, DotState)
    close(state.inner_opt_state[0].combination.teacher, v_kd, 1e-5)


def test_the_momenta_of_dropped_weights_are_cleared():
    link = combine_gradients(dot())
    opt = jc.projected(optax.chain(link, optax.sgd(0.1)), jc.prune(0.5))
    state = opt.init(params())
    grads = jax.tree.map(jnp.ones_like, params())
    updates, state = opt.update(grads, state, params(), other_grads=[grads])
    p = optax.apply_updates(params(), updates)
    held = state.inner[0].combination
    np.testing.assert_array_equal(held.task["w"] == 0, p["w"] == 0)
    np.testing.assert_array_equal(held.teacher["w"] == 0, p["w"] == 0)


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match=r"dot: `delta` must be less than 1 - momentum, got 0\.2"):
        dot(0.9, 0.2)
    with pytest.raises(ValueError, match="dot: `momentum` must be a real number in"):
        dot(1.5)
    with pytest.raises(TypeError, match="dot: `delta` must be a real number"):
        dot(0.9, None)
    with pytest.raises(ValueError, match=r"dot: `gradients` must be 2.*got 3"):
        combine_gradients(dot(), count=3).init(params())
    with pytest.raises(ValueError, match=r"separate: `gradients` must be 1.*got 2"):
        combine_gradients(separate(optax.identity())).init(params())
    with pytest.raises(TypeError, match="separate: `transformations` must be optax"):
        separate(optax.trace)
