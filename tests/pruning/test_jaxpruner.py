"""What users of jaxpruner rely on, by the numbers of its public tests, under our names."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
from tests.conftest import lenient

pr = jc.pruning
CUBE = [
    [[0.69, 0.37, 0.96, 0.81], [0.79, 0.55, 0.88, 0.53]]
    + [[0.66, 0.88, 0.4, 0.83], [0.13, 0.8, 0.91, 0.96]],
    [[0.34, 0.17, 0.07, 0.74], [0.13, 0.13, 0.83, 0.76]]
    + [[0.13, 0.92, 0.25, 0.75], [0.37, 0.42, 0.65, 0.46]],
]
PLANE = np.reshape(CUBE, (4, 8))
UP_AND_DOWN = [1, 0.5, 0.3, 0.2, 1, 1.5, 1.8, 2.0, 1, 1]


def everything(path, leaf):
    return True


def keep(p, scores):
    masks = jc.masked(p, everything).find({"w": jnp.asarray(scores, jnp.float32)})
    return np.asarray(masks["w"].keep).astype(int)


@pytest.mark.parametrize(
    ("scores", "sparsity", "wanted"),
    [
        (
            CUBE,
            0.8,
            [
                [[0, 0, 1, 0], [0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 1, 1]],
                [[0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]],
            ],
        ),
        ([1] * 8, 0.5, [1, 1, 1, 1, 0, 0, 0, 0]),
        (UP_AND_DOWN, 0.5, [1, 0, 0, 0, 1, 1, 1, 1, 0, 0]),
        (
            [UP_AND_DOWN] * 2,
            0.5,
            [[1, 0, 0, 0, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1, 1, 0, 0]],
        ),
    ],
)
def test_unstructured_and_its_ties(scores, sparsity, wanted):
    np.testing.assert_array_equal(keep(jc.prune(sparsity), scores), wanted)


@pytest.mark.parametrize(
    ("shape", "block", "norm", "dropped"),
    [
        ((4, 8), (2, 3), pr.mean, np.s_[2:, :3]),
        ((4, 8), (2, 3), pr.largest_score, np.s_[2:, 3:6]),
        ((8,), (3,), pr.mean, np.s_[:3]),
        # Theirs drops the ragged block of two as well, and so 5 of 8 where a fifth was asked for.
        ((8,), (3,), pr.largest_score, np.s_[3:6]),
        ((4, 4, 2), (2, 2, 2), pr.mean, np.s_[2:, :2]),
        ((4, 4, 2), (2, 2, 2), pr.largest_score, np.s_[2:, 2:]),
    ],
)
def test_blocks(shape, block, norm, dropped):
    scores = PLANE.ravel()[: np.prod(shape)].reshape(shape)
    wanted = np.ones(shape, int)
    wanted[dropped] = 0
    np.testing.assert_array_equal(
        keep(jc.prune(0.2, groups=pr.blocks(*block, norm=norm)), scores), wanted
    )


@pytest.mark.parametrize(
    ("axis", "wanted"),
    [
        (
            -1,
            [
                [[0, 0, 1, 1], [1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1]],
                [[1, 0, 0, 1], [0, 0, 1, 1], [0, 1, 0, 1], [0, 0, 1, 1]],
            ],
        ),
        (
            1,
            [
                [[1, 0, 1, 0], [1, 0, 0, 0], [0, 1, 0, 1], [0, 1, 1, 1]],
                [[1, 0, 0, 0], [0, 0, 1, 1], [0, 1, 0, 1], [1, 1, 1, 0]],
            ],
        ),
    ],
)
def test_two_of_four(axis, wanted):
    np.testing.assert_array_equal(keep(jc.prune(nm=(2, 4), axis=axis), CUBE), wanted)


def test_more_of_m_than_m_is_refused():
    with pytest.raises(ValueError, match=r"`nm\[0\]`"):
        jc.prune(nm=(4, 2))


THREE = {"a": (2, 4), "b": (3, 6), "c": (2, 4, 6)}


@pytest.mark.parametrize(
    ("shapes", "sparsity", "options", "wanted"),
    [
        ({"a": (2, 4)}, 0.5, {}, {"a": 0.5}),
        ({"a": (2, 4), "c": (3, 6, 7), "d": (7, 4)}, 0.5, {}, {"a": 0.0, "c": 0.64, "d": 0.0}),
        ({"a": (2, 4), "c": (3, 6, 7)}, 0.5, {}, {"a": 0.0, "c": 0.53}),
        (THREE, 0.5, {}, {"a": 0.0, "b": 0.31, "c": 0.655}),
        (THREE, 0.5, {"kernel": False}, {"a": 0.21, "b": 0.47, "c": 0.56}),
        # Asked for 0.8 it rounds each leaf for itself, and keeps 16 of 74 instead of 15.
        (THREE, 1 - 16 / 74, {}, {"a": 0.556, "b": 0.70, "c": 0.85}),
        (THREE, 0.5, {"power": 2.0}, {"a": 0.0, "b": 0.033, "c": 0.758}),
    ],
)
def test_erdos_renyi_kernel(shapes, sparsity, options, wanted):
    sizes = {path: int(np.prod(shape)) for path, shape in shapes.items()}
    found = pr.erdos_renyi(**options).densities(shapes, sizes, jnp.float32(1 - sparsity))
    for path, value in wanted.items():
        np.testing.assert_allclose(1 - found[path], value, atol=5.1e-3)


def test_a_sparsity_of_its_own_for_one_leaf():
    draw = lambda *s: jax.random.normal(jax.random.key(len(s)), s)  # noqa: E731
    params = {"a": draw(2, 4), "b": {"c": draw(3, 6, 7), "d": draw(7, 4)}}
    p = jc.partition({"b/d": jc.prune(0.1), "**": jc.prune(0.5, budget=pr.erdos_renyi())})
    new = jc.compress(p, params)
    zeros = jax.tree.map(lambda w: float((w == 0).mean()), new)
    assert zeros["a"] == 0
    np.testing.assert_allclose(zeros["b"]["c"], 0.53, atol=0.01)
    np.testing.assert_allclose(zeros["b"]["d"], 0.1, atol=0.01)


def test_vectors_are_left_alone_by_default():
    params = [jnp.ones((2, 4)), jnp.ones(4)]
    new = jc.compress(jc.prune(0.5), params)
    assert [float(w.sum()) for w in new] == [4, 4]


def sparsities(p, steps):
    params = {"w": jax.random.normal(jax.random.key(0), (8, 5))}
    opt = jc.projected(lenient(optax.sgd(0.1)), p)
    state, out, update = opt.init(params), [], jax.jit(opt.update)
    for _ in range(steps):
        updates, state = update(params, state, params)
        params = optax.apply_updates(params, updates)
        out.append(float((params["w"] == 0).mean()))
    return out


def test_one_shot_waits_for_its_step():
    found = sparsities(jc.every(1, jc.prune(0.5), begin=6, end=7), 9)
    assert found == [0.0] * 6 + [0.5] * 3


def test_polynomial_schedule_at_a_frequency():
    """After the readme's own lines jaxpruner's parameters are 0% sparse; these are sparse."""
    found = sparsities(jc.every(5, jc.prune(jc.schedules.cubic(0.0, 0.5, 0, 20))), 22)
    wanted = [round(0.5 * (1 - (1 - t / 20) ** 3) * 40) / 40 for t in (0, 5, 10, 15, 20)]
    np.testing.assert_allclose(found[::5], wanted, atol=1e-6)
    assert all(found[i] == found[i // 5 * 5] for i in range(22))


def test_dead_weights_leave_the_optimizer_state():
    params = {"w": jax.random.normal(jax.random.key(0), (8, 5)), "b": jnp.ones(5)}
    opt = jc.projected(lenient(optax.adam(0.1)), jc.prune(0.5))
    updates, state = opt.update(params, opt.init(params), params)
    new = optax.apply_updates(params, updates)
    dead = np.asarray(new["w"]) == 0
    assert dead.mean() == 0.5
    assert (np.asarray(state.inner[0].mu["w"])[dead] == 0).all()
    assert (np.asarray(state.inner[0].mu["w"])[~dead] != 0).all()
