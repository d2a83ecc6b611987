"""CRD against loops written from the paper, and its memory bank as state under jit and scan."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxcompress.distillation import CrdState, crd_init, crd_loss, crd_negatives, info_nce_loss
from tests.conftest import counting_jit, mesh_of

EXAMPLES, WIDTH, BATCH, COUNT = 10, 4, 3, 5


crd = jax.jit(crd_loss)


def some(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape) for shape in shapes]


def unit(v):
    return v / math.sqrt(sum(a * a for a in v))


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def problem(dtype=np.float64):
    """Features, ids, negatives and a bank that has been used, as NumPy arrays."""
    student, teacher, ours, theirs = (
        x.astype(dtype)
        for x in some((BATCH, WIDTH), (BATCH, WIDTH), (EXAMPLES, WIDTH), (EXAMPLES, WIDTH))
    )
    ours, theirs = (np.stack([unit(v) for v in x]).astype(dtype) for x in (ours, theirs))
    ids = np.array([7, 2, 9])
    negatives = np.random.default_rng(4).integers(0, EXAMPLES, (BATCH, COUNT))
    return student, teacher, ids, negatives, ours, theirs


def state_of(ours, theirs, log_z=(0.0, 0.0), started=True):
    zs = (jnp.float32(z) for z in log_z)
    return CrdState(jnp.asarray(ours), jnp.asarray(theirs), *zs, jnp.array(started))


def oracle(student, teacher, ids, negatives, ours, theirs, tau, z=(1.0, 1.0)):
    """Tian et al., the critic h and its noise contrastive estimate, for both anchors."""

    def h(anchor, other, constant, count):
        p = math.exp(dot(unit(anchor), other) / tau) / constant
        return p / (p + count / EXAMPLES)

    result = []
    for i, own in enumerate(ids):
        total = 0.0
        for anchor, bank, constant in ((student[i], theirs, z[0]), (teacher[i], ours, z[1])):
            total -= math.log(h(anchor, bank[own], constant, len(negatives[i])))
            for j in negatives[i]:
                total -= math.log(1 - h(anchor, bank[j], constant, len(negatives[i])))
        result.append(total)
    return result


def constants(student, teacher, ids, negatives, ours, theirs, tau):
    """Their program: the mean of the exponentials in the first batch, times the examples."""
    result = []
    for anchors, bank in ((student, theirs), (teacher, ours)):
        scores = [
            math.exp(dot(unit(anchors[i]), bank[j]) / tau)
            for i in range(len(ids))
            for j in [ids[i], *negatives[i]]
        ]
        result.append(sum(scores) / len(scores) * len(bank))
    return result


@pytest.mark.parametrize("tau", [0.07, 0.5, 2.0])
def test_equals_the_paper(tau):
    args = problem()
    expected = oracle(*args, tau)
    with jax.enable_x64(True):
        arrays, state = [jnp.asarray(x) for x in args[:4]], state_of(*args[4:])
        got, _ = crd(*arrays, state, tau)
        np.testing.assert_allclose(got, expected, rtol=1e-6)
    args = problem(np.float32)
    got, _ = crd(*(jnp.asarray(x) for x in args[:4]), state_of(*args[4:]), tau)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_the_first_batch_sets_the_constants_and_no_other(tau):
    args = problem()
    z = constants(*args, tau)
    with jax.enable_x64(True):
        arrays = [jnp.asarray(x) for x in args[:4]]
        got, state = crd(*arrays, state_of(*args[4:], started=False), tau)
        np.testing.assert_allclose(got, oracle(*args, tau, z), rtol=1e-6)
        assert state.started
        got = [state.student_log_z, state.teacher_log_z]
        np.testing.assert_allclose(got, np.log(z), rtol=1e-6)
        # The next batch is scored with them.
        moved = (2 * args[0][::-1], args[1][::-1], *args[2:4], state.student, state.teacher)
        got, after = crd(*(jnp.asarray(x) for x in moved[:4]), state, tau)
        np.testing.assert_allclose(got, oracle(*moved, tau, z), rtol=1e-6)
        assert after.student_log_z == state.student_log_z
        assert after.teacher_log_z == state.teacher_log_z


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 1.0])
def test_the_bank_is_moved_towards_the_batch(momentum):
    args = problem(np.float32)
    _, state = crd(*(jnp.asarray(x) for x in args[:4]), state_of(*args[4:]), momentum=momentum)
    for bank, features, got in zip(args[4:], args[:2], state[:2], strict=True):
        expected = bank.copy()
        for i, own in enumerate(args[2]):
            expected[own] = unit(momentum * bank[own] + (1 - momentum) * unit(features[i]))
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
        untouched = np.setdiff1d(np.arange(EXAMPLES), args[2])
        np.testing.assert_array_equal(np.asarray(got)[untouched], bank[untouched])


def test_gradients_equal_finite_differences_and_stop_at_the_state():
    with jax.enable_x64(True):
        args = [jnp.asarray(x) for x in problem()]

        def loss(student, teacher, started=False):
            state = state_of(*args[4:], log_z=(2.0, 3.0), started=started)
            return crd(student, teacher, *args[2:4], state)[0].sum()

        slopes = jax.jit(jax.grad(loss, (0, 1)))(*args[:2], started=True)
        for i, slope in enumerate(slopes):
            (way,) = some((BATCH, WIDTH), seed=8)
            sides = [
                loss(*(x + step * way if i == j else x for j, x in enumerate(args[:2])), True)
                for step in (1e-5, -1e-5)
            ]
            np.testing.assert_allclose(np.sum(slope * way), (sides[0] - sides[1]) / 2e-5, rtol=1e-6)

        # The constants of the first batch are constants: the gradient is that with them known.
        z = np.log(constants(*problem(), 0.1))

        def known(student, teacher):
            state = state_of(*args[4:], log_z=z)
            return crd(student, teacher, *args[2:4], state)[0].sum()

        for got, want in zip(
            *(jax.jit(jax.grad(f, (0, 1)))(*args[:2]) for f in (loss, known)), strict=True
        ):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)

        def after(student):
            _, state = crd(student, *args[1:4], state_of(*args[4:], started=False))
            return sum(jnp.sum(x**2).astype(jnp.float64) for x in state[:4])

        assert (jax.jit(jax.grad(after))(args[0]) == 0).all()


def test_rows_that_do_not_count_neither_cost_nor_move_anything():
    student, teacher, ids, negatives, ours, theirs = problem(np.float32)
    keep = np.array([True, False, True])
    dirty = [np.where(keep[:, None], x, np.nan) for x in (student, teacher)]
    padded = np.where(keep, ids, 10**6)

    def loss(student, teacher, ids, negatives, where=None):
        state = state_of(ours, theirs, started=False)
        value, state = crd(student, teacher, ids, negatives, state, where=where)
        return value.sum(), (value, state)

    both = jax.jit(jax.value_and_grad(loss, has_aux=True))
    args = dirty[0], dirty[1], padded, negatives
    (_, (got, state)), slope = both(*(jnp.asarray(x) for x in args), where=keep)
    args = student[keep], teacher[keep], ids[keep], negatives[keep]
    (_, (expected, wanted)), want = both(*(jnp.asarray(x) for x in args))
    assert got[1] == 0
    np.testing.assert_allclose(got[keep], expected, rtol=1e-5)
    np.testing.assert_allclose(slope[keep], want, rtol=1e-4, atol=1e-6)
    assert (slope[1] == 0).all()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), state, wanted)

    # Nothing counts: nothing changes, and the constants are left to the next batch.
    args = dirty[0], dirty[1], padded, negatives
    (_, (got, state)), slope = both(*(jnp.asarray(x) for x in args), where=keep & False)
    assert (got == 0).all()
    assert (slope == 0).all()
    before = state_of(ours, theirs, started=False)
    jax.tree.map(np.testing.assert_array_equal, state, before)


@pytest.mark.parametrize("tau", [1e-3, 0.07, 1e3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_degenerate_features_are_finite(tau, dtype):
    student, teacher, ids, negatives, ours, theirs = problem(np.float32)

    @jax.jit
    def with_slopes(s, t):
        def loss(s, t):
            state = state_of(ours, theirs, started=False)
            value, state = crd_loss(s, t, jnp.asarray(ids), jnp.asarray(negatives), state, tau)
            return value.sum(), state

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(s, t)

    for pair in [
        (0 * student, teacher),
        (1e4 * student, -1e4 * teacher),
        (student[:1] + 0 * student, teacher[:1] + 0 * teacher),
        (theirs[ids], theirs[ids]),
        (-theirs[ids], theirs[ids]),
    ]:
        (value, state), slopes = with_slopes(*(jnp.asarray(x, dtype) for x in pair))
        assert value.dtype == jnp.float32
        assert value > 0
        for x in (value, *slopes, *state):
            assert np.isfinite(np.float32(x)).all()


def test_an_empty_batch_changes_nothing():
    _, _, _, _, ours, theirs = problem(np.float32)
    before = state_of(ours, theirs, started=False)
    none = jnp.zeros((0, WIDTH)), jnp.zeros(0, jnp.int32), jnp.zeros((0, COUNT), jnp.int32)
    loss, after = crd(none[0], none[0], none[1], none[2], before)
    assert loss.shape == (0,)
    jax.tree.map(np.testing.assert_array_equal, after, before)


def test_the_state_is_the_same_through_a_scan_and_never_compiled_twice(key):
    first = crd_init(key, EXAMPLES, WIDTH)
    (students, teachers) = (jnp.float32(x) for x in some((6, BATCH, WIDTH), (6, BATCH, WIDTH)))
    ids = jnp.stack([(jnp.arange(BATCH) * 3 + i) % EXAMPLES for i in range(6)])

    def step(state, batch):
        student, teacher, index, key = batch
        negatives = crd_negatives(key, index, COUNT, examples=EXAMPLES)
        loss, state = crd(student, teacher, index, negatives, state)
        return state, loss

    batches = students, teachers, ids, jax.random.split(key, 6)
    last, losses = jax.jit(lambda s, b: jax.lax.scan(step, s, b))(first, batches)
    jitted, state = counting_jit(step), first
    for i in range(6):
        state, loss = jitted(state, jax.tree.map(lambda x, i=i: x[i], batches))
        np.testing.assert_allclose(loss, losses[i], rtol=1e-4, atol=1e-5)
    assert jitted.traces == 1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state, last)
    for a, b in zip(first, last, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
    narrow = crd_init(key, EXAMPLES, WIDTH, dtype=jnp.bfloat16)
    after, _ = jitted(narrow, jax.tree.map(lambda x: x[0], batches))
    assert after.student.dtype == after.teacher.dtype == jnp.bfloat16


def test_mapped_over_temperatures_and_momenta():
    student, teacher, ids, negatives, ours, theirs = problem(np.float32)
    args = [jnp.asarray(x) for x in (student, teacher, ids, negatives)]
    loss = lambda tau, m: crd(*args, state_of(ours, theirs, started=False), tau, m)  # noqa: E731
    taus, momenta = jnp.float32([0.07, 0.1, 1.0]), jnp.float32([0.0, 0.5, 1.0])
    got = jax.jit(jax.vmap(loss))(taus, momenta)
    for i in range(3):
        expected = loss(float(taus[i]), float(momenta[i]))
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-5),
            got,
            expected,
        )


def test_the_first_bank_is_random_and_of_length_about_one(key):
    state = crd_init(key, 2000, 16)
    for bank in state[:2]:
        assert abs(jnp.mean(jnp.sum(bank**2, 1)) - 1) < 0.02
        assert abs(jnp.mean(bank)) < 0.01
        assert jnp.max(jnp.abs(bank)) <= math.sqrt(3 / 16)
    assert not np.array_equal(state.student, state.teacher)
    assert not state.started
    assert not np.array_equal(crd_init(jax.random.key(1), 2000, 16).student, state.student)


def test_negatives_are_uniform_over_the_others(key):
    index = jnp.array([0, 4, 2])
    ids = np.asarray(crd_negatives(key, index, 30_000, examples=5))
    assert ids.dtype == np.int32
    for row, own in zip(ids, index, strict=True):
        counts = np.bincount(row, minlength=5)
        assert counts[own] == 0
        np.testing.assert_allclose(np.delete(counts, own), 7500, rtol=0.06)
    # Rows are drawn apart, and keys matter.
    assert (ids[0] != ids[1]).any()
    assert (ids != crd_negatives(jax.random.key(1), index, 30_000, examples=5)).any()


@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize("bank_spec", [("d", None), (None, "d"), (None, None)])
def test_sharded_banks_keep_their_sharding(kind, bank_spec):
    (student, teacher) = (jnp.float32(x) for x in some((4, 4), (4, 4)))
    (ours, theirs) = (jnp.float32(x) for x in some((8, 4), (8, 4), seed=2))
    ids, negatives = jnp.array([1, 3, 5, 0]), jnp.array([[2, 4], [6, 7], [0, 1], [3, 2]])

    @jax.jit
    def step(student, teacher, state):
        def loss(student):
            value, new = crd_loss(student, teacher, ids, negatives, state)
            return value.sum(), (value, new)

        slope, aux = jax.grad(loss, has_aux=True)(student)
        return slope, aux

    slope, (value, state) = step(student, teacher, state_of(ours, theirs, started=False))
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        place = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))  # noqa: E731
        sharded = state_of(place(ours, *bank_spec), place(theirs, *bank_spec), started=False)
        got, (loss, new) = step(place(student, "d", None), place(teacher, "d", None), sharded)
        assert kind == "auto" or new.student.sharding.is_equivalent_to(sharded.student.sharding, 2)
    np.testing.assert_allclose(got, slope, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(loss, value, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), new, state)


def info_nce_oracle(student, teacher, tau):
    """Van den Oord et al., equation 4, in both directions."""
    s, t = ([unit(v) for v in x] for x in (student, teacher))
    n, result = range(len(s)), []
    for i in n:
        own = math.exp(dot(s[i], t[i]) / tau)
        forth = sum(math.exp(dot(s[i], t[j]) / tau) for j in n)
        back = sum(math.exp(dot(s[j], t[i]) / tau) for j in n)
        result.append(-math.log(own / forth) / 2 - math.log(own / back) / 2)
    return result


@pytest.mark.parametrize("tau", [0.07, 1.0])
def test_within_a_batch_equals_the_paper(tau):
    student, teacher = some((6, 4), (6, 4))
    with jax.enable_x64(True):
        got = info_nce_loss(jnp.asarray(student), jnp.asarray(teacher), tau)
        np.testing.assert_allclose(got, info_nce_oracle(student, teacher, tau), rtol=1e-6)
    torch = pytest.importorskip("torch")
    functional, targets = torch.nn.functional, torch.arange(6)
    s, t = (functional.normalize(torch.tensor(x)) for x in (student, teacher))
    scores = s @ t.T / tau
    both = [functional.cross_entropy(x, targets).item() for x in (scores, scores.T)]
    np.testing.assert_allclose(np.mean(np.asarray(got)), np.mean(both), rtol=1e-9)


@pytest.mark.parametrize("wrong", [-1, EXAMPLES, 10**6])
@pytest.mark.parametrize("where", ["index", "negatives"])
def test_ids_of_no_example_are_not_numbers_and_never_kept(wrong, where):
    student, teacher, ids, negatives, ours, theirs = problem(np.float32)
    good = np.array([True, False, True])
    if where == "index":
        broken = np.where(good, ids, wrong), negatives
    else:
        others = negatives.copy()
        others[1, 2] = wrong
        broken = ids, others

    def loss(student, index, negatives, keep):
        state = state_of(ours, theirs, started=False)
        value, state = crd(student, teacher, index, negatives, state, where=keep)
        return jnp.sum(jnp.where(good, value, 0.0)), (value, state)

    both = jax.jit(jax.value_and_grad(loss, has_aux=True))
    student = jnp.asarray(student)
    (_, (got, state)), slope = both(student, *broken, jnp.ones(3, bool))
    (_, (expected, wanted)), want = both(student, ids, negatives, good)
    np.testing.assert_array_equal(np.isnan(got), ~good)
    np.testing.assert_array_equal(got[good], expected[good])
    np.testing.assert_array_equal(slope, want)
    # The bank and the constants are those of the other rows.
    jax.tree.map(np.testing.assert_array_equal, state, wanted)
    # What does not count may have any ids.
    (_, (got, state)), _ = both(student, *broken, good)
    np.testing.assert_array_equal(got, expected)
    jax.tree.map(np.testing.assert_array_equal, state, wanted)


def test_a_batch_of_no_examples_sets_no_constants():
    student, teacher, ids, negatives, ours, theirs = problem(np.float32)
    before = state_of(ours, theirs, started=False)
    loss, state = crd(student, teacher, ids - EXAMPLES, negatives, before)
    assert np.isnan(loss).all()
    jax.tree.map(np.testing.assert_array_equal, state, before)


def test_a_traced_temperature_not_above_zero_is_not_a_number():
    student, teacher, ids, negatives, ours, theirs = problem(np.float32)
    state = state_of(ours, theirs)
    for loss in (
        lambda tau: crd_loss(student, teacher, ids, negatives, state, tau)[0],
        lambda tau: info_nce_loss(student, teacher, tau),
    ):
        got = jax.jit(jax.vmap(loss))(jnp.array([0.0, -1.0, jnp.nan, 0.5]))
        np.testing.assert_array_equal(np.isnan(got).all(1), [True] * 3 + [False])
        np.testing.assert_array_equal(np.isnan(got).any(1), [True] * 3 + [False])


def test_a_traced_number_out_of_its_range_leaves_the_state_as_it_is():
    student, teacher, ids, negatives, ours, theirs = problem(np.float32)
    state = state_of(ours, theirs, started=False)
    call = jax.jit(functools.partial(crd_loss, student, teacher, ids, negatives, state))
    for tau, momentum in [(0.0, 0.5), (-1.0, 0.5), (jnp.nan, 0.5), (0.1, 1.5), (0.1, jnp.nan)]:
        loss, new = call(tau, momentum)
        assert np.isnan(loss).all()
        jax.tree.map(np.testing.assert_array_equal, new, state)
    assert call(0.1, 0.5)[1].started


def test_errors_say_what_to_do(key):
    x, ids, negatives = jnp.zeros((2, 4)), jnp.arange(2), jnp.ones((2, 3), jnp.int32)
    state = crd_init(key, 10, 4)
    for wrong, match in [
        ((jnp.zeros((2, 1, 4)), x, ids, negatives, state), r"`student` must .*Pool positions"),
        ((x, x[:, :3], ids, negatives, state), r"`teacher` must have the student's shape"),
        ((x, x, ids[:1], negatives, state), r"`index` must have ids for each of the 2 rows"),
        ((x, x, ids[None], negatives, state), r"`index` must be integer ids \[batch\]"),
        ((x, x, ids, negatives[:, :0], state), r"`negatives` must have ids"),
        ((x, x, ids, negatives, crd_init(key, 10, 5)), r"`state` must hold banks \[examples, 4\]"),
        ((x, x, ids, negatives, state, 0.0), r"`temperature` must be a real number above 0"),
        ((x, x, ids, negatives, state, 0.1, 1.5), r"`momentum` must be a real number in"),
    ]:
        with pytest.raises(ValueError, match="crd_loss: " + match):
            crd_loss(*wrong)
    with pytest.raises(TypeError, match="crd_loss: `index` must be integer ids"):
        crd_loss(x, x, jnp.zeros(2), negatives, state)
    with pytest.raises(ValueError, match="crd_init: `examples` must"):
        crd_init(key, 1, 4)
    with pytest.raises(TypeError, match="crd_init: `key` must be one key"):
        crd_init(0, 10, 4)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="crd_negatives: `count` must"):
        crd_negatives(key, ids, 0, examples=4)
