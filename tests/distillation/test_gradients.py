"""`distill` against the gradient of the summed loss, inside everything Optax offers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxcompress as jc
from jaxcompress.distillation import (
    DistillState,
    cosine_gated,
    distill,
    dot,
    kd_loss,
    mse_logits,
    norm_balanced,
    pcgrad,
    regressors,
    value_and_multi_grad,
    weighted_sum,
)
from tests.conftest import counting_jit, lenient, mesh_of

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


def test_gradients_of_your_own_forward_pass_are_taken_as_they_are(params):
    x, numbers = batches(1)[0], {"weight": 0.7, "task_weight": 0.3}
    calls = []

    def losses(params):
        calls.append(1)
        logits = student(params, x)
        return {
            "task": jnp.mean(jnp.square(logits)),
            "teacher": jnp.mean(kd_loss(logits, teacher(x), 2.0)),
        }

    never = lambda *_: pytest.fail("a model ran")  # noqa: E731
    opt = distill(never, never, **numbers)
    _, grads = value_and_multi_grad(losses)(params)
    extra = {"teacher_grads": grads["teacher"], "batch": x}
    updates, state = opt.update(grads["task"], opt.init(params), params, **extra)
    close(updates, jax.grad(summed)(params, x, temperature=2.0, **numbers))
    assert state.step == 1
    assert len(calls) == 1
    # The same updates as with the batch, and None for a leaf without a gradient.
    other = distill(student, teacher, temperature=2.0, **numbers)
    expected, _ = other.update(grads["task"], other.init(params), params, batch=x)
    close(updates, expected)
    none = {**grads["teacher"], "b": None}
    updates, _ = opt.update(grads["task"], opt.init(params), params, teacher_grads=none)
    close(updates["b"], 0.3 * grads["task"]["b"])
    close(updates["w"], expected["w"])


def features(params, batch):
    hidden = jnp.tanh(batch @ params["w"])
    return {"hidden": hidden, "logits": hidden + params["b"]}


def wide_features(batch):
    hidden = jnp.concatenate([batch, jnp.sin(batch)], -1)
    return hidden, teacher(batch)


def hint(outputs, targets, temperature, own):
    """Of hidden states of different widths, through a projection; and of the logits."""
    hidden, logits = targets
    gap = outputs["hidden"] @ own["projection"] - hidden
    return jnp.mean(gap**2) + jnp.mean(kd_loss(outputs["logits"], logits, temperature))


def projection():
    rng = np.random.default_rng(4)
    return {"projection": jnp.float32(rng.normal(size=(4, 6)))}


def with_regressors(**numbers):
    """A link whose loss has a regressor, trained by Adam."""
    return distill(
        features,
        wide_features,
        loss=hint,
        regressors=projection(),
        regressor_optimizer=lenient(optax.adam(0.05)),
        **numbers,
    )


def hinted(params, own, x, weight, temperature):
    distilled = hint(features(params, x), wide_features(x), temperature, own)
    return task(params, x) + weight * distilled


def test_regressors_are_trained_by_the_same_backward_pass(params):
    xs, adam = batches(4), lenient(optax.adam(0.05))
    opt = optax.chain(with_regressors(weight=0.7, temperature=2.0), lenient(optax.adam(1e-2)))
    path, state = jax.jit(lambda params, xs: run(opt, params, xs))(params, xs)
    # The same training, of both trees together and with an optimizer for each.
    own, rest = projection(), lenient(optax.adam(1e-2))
    held, state_rest = adam.init(own), rest.init(params)
    gradient = jax.jit(jax.grad(hinted, argnums=(0, 1)))
    for i, x in enumerate(xs):
        for_params, for_own = gradient(params, own, x, 0.7, 2.0)
        updates, state_rest = rest.update(for_params, state_rest, params)
        params = optax.apply_updates(params, updates)
        moves, held = adam.update(for_own, held, own)
        own = optax.apply_updates(own, moves)
        close(jax.tree.map(lambda leaf, i=i: leaf[i], path), params, rtol=1e-4, atol=1e-5)
    close(regressors(state), own, rtol=1e-4, atol=1e-5)
    close(state[0].inner[0].mu, held[0].mu, rtol=1e-4, atol=1e-5)
    assert jax.tree.structure(path) == jax.tree.structure(params)


@pytest.mark.parametrize("wrap", ["chain", "multi_steps", "inject", "projected_inside"])
def test_regressors_are_read_wherever_they_are_nested(params, wrap):
    x = batches(1)[0]
    opt = with_regressors()
    if wrap == "chain":
        opt = optax.chain(optax.identity(), optax.chain(opt, optax.sgd(0.1)))
    elif wrap == "multi_steps":
        steps = optax.MultiSteps(opt, 1)
        opt = lenient(optax.GradientTransformationExtraArgs(steps.init, steps.update))
    elif wrap == "inject":
        make = lambda weight: with_regressors(weight=weight)  # noqa: E731
        opt = lenient(optax.inject_hyperparams(make)(weight=1.0))
    else:
        opt = optax.chain(opt, jc.projected(lenient(optax.adam(0.1)), jc.prune(0.5)))
    state = opt.init(params)
    close(regressors(state), projection(), rtol=0, atol=0)
    _, state = jax.jit(opt.update)(params, state, params, batch=x)
    grad = jax.jit(jax.grad(hinted, argnums=1))(params, projection(), x, 1.0, 1.0)
    expected = jax.tree.map(lambda r, g: r - 0.05 * jnp.sign(g), projection(), grad)
    close(regressors(state), expected, rtol=1e-3)


def test_gradients_of_your_own_train_the_regressors(params):
    x, opt = batches(1)[0], with_regressors(weight=0.5)
    state = opt.init(params)

    def losses(params, own):
        return task(params, x), hint(features(params, x), wide_features(x), jnp.float32(1), own)

    _, (ours, theirs) = value_and_multi_grad(losses, (0, 1))(params, regressors(state))
    extra = {"teacher_grads": theirs[0], "regressor_grads": theirs[1]}
    got = opt.update(ours[0], state, params, **extra)
    close(got, opt.update(ours[0], state, params, batch=x))
    with pytest.raises(TypeError, match=r"distill: `regressor_grads` must be given.*regressors\("):
        opt.update(ours[0], state, params, teacher_grads=theirs[0])


def test_the_state_owns_its_regressors_and_keeps_its_types(params):
    x = batches(1)[0]
    for dtype in (jnp.float32, jnp.bfloat16):
        own = {"projection": jnp.asarray(projection()["projection"], dtype), "none": None}
        opt = distill(
            features,
            wide_features,
            loss=lambda s, t, T, own: hint(s, t, T, jax.tree.map(jnp.float32, own)),
            regressors=own,
            regressor_optimizer=lenient(optax.adam(0.05)),
        )
        update = counting_jit(lambda state, opt=opt: opt.update(params, state, params, batch=x)[1])
        donating = jax.jit(update, donate_argnums=0)
        state = donating(donating(opt.init(params)))
        assert regressors(state)["projection"].dtype == dtype
        assert regressors(state)["none"] is None
        assert update.traces == 1
        np.testing.assert_array_equal(opt.init(params).regressors["projection"], own["projection"])
    # Two links in one chain: both, in order.
    opt = optax.chain(with_regressors(), with_regressors(weight=0.0))
    assert isinstance(regressors(opt.init(params)), tuple)
    assert len(regressors(opt.init(params))) == 2


def test_outputs_may_differ_in_shape_where_the_loss_is_your_own(params):
    x = batches(1)[0]
    mean_gap = lambda s, t, _: (jnp.mean(s["hidden"], -1) - jnp.mean(t[0], -1)) ** 2  # noqa: E731
    opt = distill(features, wide_features, loss=mean_gap)
    updates, _ = opt.update(params, opt.init(params), params, batch=x)
    gap = lambda p: jnp.mean(mean_gap(features(p, x), wide_features(x), None))  # noqa: E731
    close(updates, jax.tree.map(jnp.add, params, jax.grad(gap)(params)))


def test_a_student_with_dropout_takes_its_key_from_the_batch(params):
    x = batches(1)[0]

    def dropped(params, batch):
        keep = jax.random.bernoulli(batch["key"], 0.5, batch["x"].shape)
        return student(params, jnp.where(keep, 2 * batch["x"], 0.0))

    opt = distill(dropped, lambda batch: teacher(batch["x"]), task_weight=0.0)
    update = jax.jit(lambda key: opt.update(params, opt.init(params), params, batch=key)[0])
    for seed in range(2):
        batch = {"key": jax.random.key(seed), "x": x}
        loss = lambda p: jnp.mean(kd_loss(dropped(p, batch), teacher(x)))  # noqa: B023, E731
        close(update(batch), jax.grad(loss)(params))


COMBINATIONS = {
    "pcgrad": lambda: pcgrad(key=jax.random.key(0), per_leaf=True),
    "cosine_gated": cosine_gated,
    "norm_balanced": lambda: norm_balanced(0.5, 0.9),
    "dot": dot,
    "weighted_sum": lambda: weighted_sum(1.0, optax.linear_schedule(1.0, 0.0, 4)),
}


@pytest.mark.parametrize("make", COMBINATIONS.values(), ids=COMBINATIONS.keys())
def test_the_weighted_gradients_meet_in_the_combination(params, make):
    xs, numbers = batches(3), {"weight": 0.7, "task_weight": 0.3, "temperature": 2.0}
    opt = optax.chain(distill(student, teacher, combine=make(), **numbers), optax.sgd(0.1))
    path, state = jax.jit(lambda params, xs: run(opt, params, xs))(params, xs)
    held, update = make().init(params, 2), jax.jit(make().update)
    ours = jax.jit(lambda p, x: jax.grad(summed)(p, x, weight=0.0, task_weight=0.3))
    theirs = jax.jit(
        lambda p, x: jax.grad(summed)(p, x, weight=0.7, task_weight=0.0, temperature=2.0)
    )
    for i, x in enumerate(xs):
        pair = (ours(params, x), theirs(params, x))
        gradient, held = update(pair, held, params, step=jnp.int32(i))
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
        close(jax.tree.map(lambda leaf, i=i: leaf[i], path), params, rtol=1e-4, atol=1e-5)
    assert jax.tree.structure(state[0].combination) == jax.tree.structure(held)


def test_clipping_after_it_clips_the_summed_gradient(params):
    x, clip = batches(1)[0], optax.clip_by_global_norm(0.05)
    grads = jax.grad(task)(params, x)
    opt = optax.chain(distill(student, teacher, weight=0.7), clip)
    updates, _ = opt.update(grads, opt.init(params), params, batch=x)
    close(updates, clip.update(jax.grad(summed)(params, x, weight=0.7), ())[0])
    np.testing.assert_allclose(optax.tree.norm(updates), 0.05, rtol=1e-5)
    # Clipping before it clips the task's gradient alone.
    opt = optax.chain(clip, distill(student, teacher, weight=0.7))
    updates, _ = opt.update(grads, opt.init(params), params, batch=x)
    distilled = jax.grad(summed)(params, x, weight=0.7, task_weight=0.0)
    close(updates, jax.tree.map(jnp.add, clip.update(grads, ())[0], distilled))


def test_the_dense_version_of_a_compressed_student_teaches_it(params):
    xs = batches(1)[0]
    batch = {"x": jnp.concatenate([xs, -xs, 2 * xs])}
    dense_student = lambda p, batch: jnp.tanh(student(p, batch["x"]))  # noqa: E731
    # The mask is held in the second half, as the rate falls.
    sparse = jc.every(1, jc.prune(0.5), end=100)
    compressed = jc.chain(sparse, jc.quantize(4, ranges=jc.quantization.min_max))
    adam = lambda: lenient(optax.adam(optax.cosine_decay_schedule(0.05, 200)))  # noqa: E731
    # Of a student that lies in the compressed set.
    goal = jc.compress(compressed, {"w": jnp.asarray(WEIGHTS), "b": jnp.zeros((1, 4))})
    target = dense_student(goal, batch)
    fit = lambda p: jnp.mean((dense_student(p, batch) - target) ** 2)  # noqa: E731
    opt = optax.chain(
        distill(
            dense_student,
            lambda batch: dense_student(batch["dense"], batch),
            loss=lambda s, t, _: mse_logits(s, t),
            weight=0.5,
        ),
        jc.straight_through(adam(), compressed),
    )

    def step(carry, _):
        params, state = carry
        grads = jax.grad(fit)(params)
        taught = {**batch, "dense": jc.latent(state)}
        updates, state = opt.update(grads, state, params, batch=taught)
        params = optax.apply_updates(params, updates)
        return (params, state), fit(params)

    train = jax.jit(lambda params: jax.lax.scan(step, (params, opt.init(params)), length=200))
    (last, state), losses = train(params)
    # It trains, and what it gives is the projection of its dense weights.
    assert losses[-1] < 0.1 * losses[0]
    np.testing.assert_array_equal(jnp.mean(last["w"] == 0) >= 0.5, True)
    expected = compressed.project(jc.latent(state), jc.structure(state))
    close(last, expected, rtol=1e-6, atol=1e-7)
    close(jc.todense(jc.pack(state, last)), last, rtol=1e-6, atol=1e-7)
    # The link's gradient is that of the sum with the dense teacher held still.
    grads = jax.grad(fit)(last)
    taught = {**batch, "dense": jc.latent(state)}
    updates, _ = jax.jit(opt.update)(grads, state, last, batch=taught)
    teaching = jax.lax.stop_gradient(dense_student(jc.latent(state), batch))
    both = jax.grad(lambda p: fit(p) + 0.5 * jnp.mean((dense_student(p, batch) - teaching) ** 2))(
        last
    )
    rest = jc.straight_through(adam(), compressed)
    close(updates, jax.jit(rest.update)(both, state[1], last)[0], rtol=1e-5, atol=1e-6)


def test_gradients_of_other_shapes_are_refused(params):
    opt = distill(student, teacher)
    grads = jax.tree.map(lambda w: jnp.stack([w, w]), params)
    with pytest.raises(ValueError, match=r"distill: .* have the shape \[1, 4\], .* at 'b'"):
        opt.update(params, opt.init(params), params, teacher_grads=grads)
    with pytest.raises(TypeError, match=r"`regressor_grads` must .* got some without regressors"):
        opt.update(
            params, opt.init(params), params, teacher_grads=params, regressor_grads=jnp.ones(2)
        )
    own = distill(
        student, teacher, loss=lambda s, t, _, r: (s * r[0] - t) ** 2,
        regressors=jnp.ones(2), regressor_optimizer=optax.sgd(0.1),
    )  # fmt: skip
    for wrong in (jnp.ones((3, 2)), {"a": jnp.ones(2)}):
        with pytest.raises(ValueError, match="`regressor_grads` must be like the regressors"):
            own.update(
                params, own.init(params), params, teacher_grads=params, regressor_grads=wrong
            )


@pytest.mark.parametrize("returned", [lambda x: (x, 0.0), lambda x: {"a": x}, lambda x: None])
def test_a_loss_that_returns_more_than_one_array(params, returned):
    opt = distill(student, teacher, loss=lambda s, t, _: returned((s - t) ** 2))
    with pytest.raises(TypeError, match="distill: `loss` must return one array"):
        opt.update(params, opt.init(params), params, batch=batches(1)[0])


def test_one_chain_prunes_quantizes_factorizes_and_distils():
    rng = np.random.default_rng(3)
    shapes = {"in": (8, 16), "middle": (16, 16), "out": (16, 4)}
    draw = lambda: {k: jnp.float32(rng.normal(size=s) / 4) for k, s in shapes.items()}  # noqa: E731
    x, teacher, start = jnp.float32(rng.normal(size=(64, 8))), draw(), draw()
    model = lambda p, x: jnp.tanh(jnp.tanh(x @ p["in"]) @ p["middle"]) @ p["out"]  # noqa: E731
    four = jc.quantize(4, ranges=jc.quantization.min_max)
    sparse = jc.every(1, jc.prune(0.5), end=100)
    ways = {"in": jc.chain(sparse, four), "middle": jc.chain(jc.low_rank(6), four), "out": four}
    p = jc.partition(ways)
    opt = optax.chain(
        distill(model, lambda x: model(teacher, x), loss=lambda s, t, _: mse_logits(s, t)),
        jc.straight_through(lenient(optax.adam(optax.cosine_decay_schedule(0.05, 200))), p),
    )

    def step(carry, _):
        params, state = carry
        nothing = jax.tree.map(jnp.zeros_like, params)
        updates, state = opt.update(nothing, state, params, batch=x)
        params = optax.apply_updates(params, updates)
        return (params, state), jnp.mean((model(params, x) - model(teacher, x)) ** 2)

    train = jax.jit(lambda params: jax.lax.scan(step, (params, opt.init(params)), length=200))
    (last, state), losses = train(start)
    assert losses[-1] < 0.5 * losses[0]
    assert jnp.mean(last["in"] == 0) >= 0.5
    close(last, p.project(jc.latent(state), jc.structure(state)), rtol=1e-6, atol=1e-7)
    small = jc.pack(state, last)
    assert sum(w.nbytes for w in small.values()) < 0.3 * sum(w.nbytes for w in last.values())
    # Rounding may leave the products of the factors' codes elsewhere in the last bit.
    close(jc.lift(model)(small, x), model(last, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_sharded_params_and_batch(params, kind):
    opt = optax.chain(
        distill(
            lambda p, x: {"hidden": jnp.tanh(x * p["w"])},
            lambda x: jnp.tanh(x),
            loss=lambda s, t, _, own: (s["hidden"] * own["scale"] - t) ** 2,
            regressors={"scale": jnp.ones((8, 4))},
            regressor_optimizer=lenient(optax.adam(0.1)),
            combine=pcgrad(),
        ),
        lenient(optax.adam(0.1)),
    )
    wide = {"w": jnp.tile(params["w"][:2], (4, 1))}
    x = jnp.tile(batches(1)[0][:4, :1], (2, 4))
    grads = jax.tree.map(lambda w: jnp.sin(3 * w), wide)
    update = jax.jit(lambda g, p, x: opt.update(g, opt.init(p), p, batch=x))
    expected, state = update(grads, wide, x)
    mesh = mesh_of(kind, 8)
    with jax.set_mesh(mesh):
        place = lambda a: jax.device_put(a, NamedSharding(mesh, PartitionSpec("d")))  # noqa: E731
        got, after = update(jax.tree.map(place, grads), jax.tree.map(place, wide), place(x))
    close(jax.device_get(got), expected)
    close(jax.device_get(regressors(after)), regressors(state))


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
    with pytest.raises(ValueError, match="Other shapes, as of features, need a loss of your own"):
        distill(features, wide_features).update(params, state, params, batch=x)
    with pytest.raises(TypeError, match=r"`regressor_optimizer` must be an optax.*got NoneType"):
        distill(student, teacher, regressors={"w": jnp.ones(2)})
    with pytest.raises(TypeError, match="`regressors` must be given with `regressor_optimizer`"):
        distill(student, teacher, regressor_optimizer=optax.sgd(0.1))
    with pytest.raises(TypeError, match=r"`regressors` must hold real.*int32\[2\] at 'ids'"):
        distill(
            student, teacher, regressors={"ids": jnp.arange(2)}, regressor_optimizer=optax.sgd(0.1)
        )
    with pytest.raises(TypeError, match="distill: `combine` must be a combination of gradients"):
        distill(student, teacher, combine=pcgrad)
    with pytest.raises(ValueError, match="regressors: `opt_state` must hold the state of distill"):
        regressors(state)
