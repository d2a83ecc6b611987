"""Mutual learning against loops in NumPy float64 written from the paper, and torch's divergence."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxcompress.distillation import kd_loss, mutual_loss
from tests.conftest import counting_jit, mesh_of


def softmax(z):
    powers = np.exp(z - np.max(z))
    return powers / np.sum(powers)


def some_logits(shape, seed=0, scale=3.0):
    return np.random.default_rng(seed).normal(size=shape) * scale


def oracle(logits, temperature=1.0, keep=None):
    """The mean over the others, one pair and one row at a time."""
    students, rows = logits.shape[0], logits.shape[1:-1]
    out = np.zeros((students, *rows))
    heats = np.broadcast_to(temperature, rows)
    for row in np.ndindex(*rows):
        for k in range(students):
            for other in set(range(students)) - {k}:
                s, t = logits[(k, *row)], logits[(other, *row)]
                if keep is not None:
                    s, t = s[keep], t[keep]
                q, p = softmax(s / heats[row]), softmax(t / heats[row])
                out[(k, *row)] += np.sum(p * np.log(p / q)) / (students - 1)
            out[(k, *row)] *= heats[row] ** 2
    return out


SHAPES = [(2, 4), (3, 5, 7), (4, 2, 3, 6)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_equals_the_paper(shape, temperature):
    logits = some_logits(shape)
    expected = oracle(logits, temperature)
    with jax.enable_x64(True):
        got = jax.jit(mutual_loss)(jnp.asarray(logits), temperature)
        assert got.dtype == jnp.float64
        np.testing.assert_allclose(got, expected, rtol=1e-6)
    got = jax.jit(mutual_loss)(jnp.float32(logits), temperature)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_agrees_with_torch():
    torch = pytest.importorskip("torch")
    logits = some_logits((3, 5, 7))
    logs = torch.log_softmax(torch.tensor(logits), -1)
    for k in range(3):
        pairs = [
            torch.nn.functional.kl_div(logs[k], logs[o], reduction="none", log_target=True).sum(-1)
            for o in range(3)
            if o != k
        ]
        got = mutual_loss(jnp.float32(logits))[k]
        np.testing.assert_allclose(got, sum(pairs) / 2, rtol=1e-5)


def test_is_the_mean_of_the_losses_to_the_others():
    logits = jnp.float32(some_logits((3, 5, 7)))
    pair = lambda k, other: kd_loss(logits[k], logits[other], 2.0)  # noqa: E731
    expected = [(pair(0, 1) + pair(0, 2)) / 2, (pair(1, 0) + pair(1, 2)) / 2]
    np.testing.assert_allclose(mutual_loss(logits, 2.0)[:2], jnp.stack(expected), rtol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_gradient_of_the_sum_is_that_of_each_student_with_the_others_held(temperature):
    logits = some_logits((3, 5, 7))
    p = np.apply_along_axis(lambda z: softmax(z / temperature), -1, logits)
    others = (p.sum(0, keepdims=True) - p) / 2
    with jax.enable_x64(True):
        total = lambda z: jnp.sum(mutual_loss(z, temperature))  # noqa: E731
        grad = jax.jit(jax.grad(total))(jnp.asarray(logits))
        np.testing.assert_allclose(grad, temperature * (p - others), rtol=1e-6, atol=1e-10)
        # Of one student's loss alone nothing reaches the others.
        alone = jax.grad(lambda z: jnp.sum(mutual_loss(z, temperature)[1]))(jnp.asarray(logits))
        np.testing.assert_allclose(alone[1], grad[1], rtol=1e-9, atol=1e-12)
        assert (alone[0] == 0).all()
        assert (alone[2] == 0).all()


def test_one_student_has_no_others():
    value, grad = jax.value_and_grad(lambda z: jnp.sum(mutual_loss(z)))(jnp.ones((1, 4, 3)))
    assert value == 0
    assert (grad == 0).all()
    assert mutual_loss(jnp.ones((1, 4, 3))).shape == (1, 4)


def test_masks_rows_and_dtypes():
    logits = some_logits((3, 4, 6))
    keep = np.array([True, False, True, True, False, True])
    noise = np.where(keep, 0.0, np.array([np.nan, np.inf, -np.inf, 1.0, np.nan, 0.0]))
    heats = np.array([0.5, 1.0, 2.0, 8.0])
    got = jax.jit(mutual_loss)(jnp.float32(logits + noise), jnp.float32(heats), where=keep)
    np.testing.assert_allclose(got, oracle(logits, heats, keep), rtol=1e-5)
    cut = jnp.where(jnp.broadcast_to(keep, logits.shape), jnp.float32(logits), -jnp.inf)
    np.testing.assert_array_equal(mutual_loss(cut), mutual_loss(jnp.float32(logits), where=keep))
    assert (mutual_loss(jnp.float32(logits), where=np.zeros(6, bool)) == 0).all()
    for dtype in (jnp.bfloat16, jnp.float16):
        narrow = jnp.asarray(logits, dtype)
        got, grad = jax.value_and_grad(lambda z: jnp.sum(mutual_loss(z)))(narrow)
        assert (got.dtype, grad.dtype) == (jnp.float32, dtype)
        np.testing.assert_allclose(got, jnp.sum(mutual_loss(jnp.float32(narrow))), rtol=1e-6)
    assert mutual_loss(jnp.zeros((3, 0, 5))).shape == (3, 0)
    np.testing.assert_array_equal(mutual_loss(jnp.zeros((3, 2, 0))), np.zeros((3, 2)))
    np.testing.assert_array_equal(mutual_loss(jnp.ones((3, 2, 1))), np.zeros((3, 2)))


STRESS = {
    "large": [[1e4, -1e4, 0.0], [-1e4, 1e4, 5.0]],
    "identical": [[1e4, -1e4, 3.0], [1e4, -1e4, 3.0]],
    "masked vocabulary": [[1.0, -np.inf, 3.0], [2.0, -np.inf, 1.0]],
    "nothing left": [[-np.inf] * 3, [-np.inf] * 3],
}


@pytest.mark.parametrize("case", STRESS)
def test_values_and_gradients_are_finite(case):
    logits = jnp.float32(STRESS[case])
    for temperature in (0.1, 1.0, 1e3):
        value, grads = jax.value_and_grad(lambda z, t: jnp.sum(mutual_loss(z, t)), (0, 1))(
            logits, jnp.float32(temperature)
        )
        assert np.isfinite(value)
        assert value >= 0
        assert all(np.isfinite(g).all() for g in grads)
    if case == "identical":
        assert value == 0


def test_a_student_that_rules_out_a_class_of_another_has_an_infinite_loss():
    logits = jnp.array([[0.0, 0.0, 1.0], [0.0, -jnp.inf, 1.0], [0.0, 0.5, 1.0]])
    value = mutual_loss(logits)
    assert (np.isinf(value) == [False, True, False]).all()
    assert np.isfinite(jax.grad(lambda z: jnp.sum(mutual_loss(z)))(logits)).all()
    nan = logits.at[0, 0].set(jnp.nan)
    assert jnp.isnan(mutual_loss(nan)).any()


def arrays_in(jaxpr):
    """The sizes of all that a program computes, inner programs included."""
    for equation in jaxpr.eqns:
        yield from (v.aval.size for v in equation.outvars)
        for value in equation.params.values():
            for inner in value if isinstance(value, (list, tuple)) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from arrays_in(inner)


def test_no_array_of_all_pairs_is_made():
    shape = (7, 3, 50)
    grad = jax.grad(lambda z: jnp.sum(mutual_loss(z)))
    largest = max(arrays_in(jax.make_jaxpr(grad)(jnp.ones(shape)).jaxpr))
    assert largest <= 2 * np.prod(shape)  # a roll puts two copies side by side


def test_temperature_is_traced_and_mapped():
    logits = jnp.float32(some_logits((3, 5, 7)))
    temperatures = jnp.array([0.5, 1.0, 4.0])
    mapped = jax.jit(jax.vmap(mutual_loss, (None, 0)))(logits, temperatures)
    one = counting_jit(mutual_loss)
    expected = jnp.stack([one(logits, t) for t in temperatures])
    np.testing.assert_allclose(mapped, expected, rtol=1e-5)
    assert one.traces == 1
    np.testing.assert_allclose(mutual_loss(logits, 4), expected[2], rtol=1e-5)


@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize("spec", [(None, "d", None), (None, None, "d")])
def test_sharded_over_rows_or_classes(kind, spec):
    mesh = mesh_of(kind)
    logits = jnp.float32(some_logits((3, 8, 12)))
    both = lambda z: jax.value_and_grad(lambda z: jnp.sum(mutual_loss(z)))(z)  # noqa: E731
    value, slope = jax.jit(both)(logits)
    with jax.set_mesh(mesh):
        got, grad = jax.jit(both)(jax.device_put(logits, NamedSharding(mesh, PartitionSpec(*spec))))
    np.testing.assert_allclose(got, value, rtol=1e-5)
    np.testing.assert_allclose(grad, slope, rtol=1e-4, atol=1e-6)


def test_students_stacked_under_vmap_train_as_one_by_one():
    x = jnp.float32(some_logits((8, 4), seed=1, scale=1.0))
    labels = jnp.arange(8) % 3
    students = jnp.float32(some_logits((3, 4, 3), seed=2, scale=1.0))

    def task(logits):
        logs = jax.nn.log_softmax(logits)
        return -jnp.take_along_axis(logs, labels[:, None], -1)[:, 0]

    def together(students):
        logits = jax.vmap(lambda w: x @ w)(students)
        return jnp.sum(jnp.mean(jax.vmap(task)(logits) + mutual_loss(logits), -1))

    def alone(w, k):
        peers = [x @ students[other] for other in range(3) if other != k]
        mimic = sum(kd_loss(x @ w, peer) for peer in peers) / 2
        return jnp.mean(task(x @ w) + mimic)

    grads = jax.jit(jax.grad(together))(students)
    expected = jnp.stack([jax.grad(alone)(students[k], k) for k in range(3)])
    np.testing.assert_allclose(grads, expected, rtol=1e-4, atol=1e-6)
    apart = jnp.max(mutual_loss(jax.vmap(lambda w: x @ w)(students)))
    for _ in range(20):
        students = optax.apply_updates(students, -0.5 * jax.grad(together)(students))
    assert jnp.max(mutual_loss(jax.vmap(lambda w: x @ w)(students))) < apart / 4


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"mutual_loss: `logits` must have the shape \[models"):
        mutual_loss(jnp.zeros(3))
    with pytest.raises(ValueError, match=r"mutual_loss: `logits` must .*one model at least"):
        mutual_loss(jnp.zeros((0, 3)))
    with pytest.raises(TypeError, match=r"mutual_loss: `logits` must .*got int32\[2, 3\]"):
        mutual_loss(jnp.zeros((2, 3), jnp.int32))
    with pytest.raises(ValueError, match=r"mutual_loss: `temperature` must .*above 0"):
        mutual_loss(jnp.zeros((2, 3)), 0.0)
    with pytest.raises(ValueError, match=r"mutual_loss: `temperature` must .*float32\[2\]"):
        mutual_loss(jnp.zeros((2, 4, 3)), jnp.ones(2))
    with pytest.raises(TypeError, match="mutual_loss: `where` must be booleans"):
        mutual_loss(jnp.zeros((2, 3)), where=jnp.ones(3))
