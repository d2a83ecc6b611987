"""Every loss on features: gradients, traced numbers, vmap, and memory of the relations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress.distillation import (
    attention_transfer,
    info_nce_loss,
    nst_loss,
    rkd_angle,
    rkd_distance,
    vid_loss,
)
from tests.conftest import counting_jit
from tests.distillation.features import LOSSES, RAW, ROWS, SHAPE, run, some, with_gradients

every = pytest.mark.parametrize("name", LOSSES)


@every
def test_gradients_equal_finite_differences(name):
    """In the direction of random vectors, in float64, by central differences."""
    with jax.enable_x64(True):
        args = [jnp.asarray(x) for x in some()]
        _, slopes = run(name, *args)
        for argument, slope in enumerate(slopes):
            for seed in (5, 6):
                way = np.random.default_rng(seed).normal(size=SHAPE)
                sides = []
                for step in (1e-5, -1e-5):
                    moved = [x + step * way if i == argument else x for i, x in enumerate(args)]
                    sides.append(np.sum(run(name, *moved)[0]))
                expected = (sides[0] - sides[1]) / 2e-5
                np.testing.assert_allclose(np.sum(slope * way), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", LOSSES)
def test_the_order_of_rows_does_not_matter(name):
    with jax.enable_x64(True):
        student, teacher = (jnp.asarray(x) for x in some())
        order = np.array([3, 1, 5, 0, 2, 4])
        whole, _ = run(name, student, teacher)
        other, _ = run(name, student[order], teacher[order])
        expected = whole if whole.ndim == 0 else whole[order]
        np.testing.assert_allclose(other, expected, rtol=1e-9, atol=1e-12)
        if name in ROWS:  # Nor do the other rows.
            mixed, _ = run(name, student, teacher.at[3].set(7.0).at[4].set(student[4]))
            np.testing.assert_array_equal(mixed[:3], whole[:3])
            assert (mixed[3:5] != whole[3:5]).all()


NUMBERS = {
    "power": (attention_transfer, [0.5, 1.0, 2.0, 4.0]),
    "delta": (rkd_distance, [0.0, 0.1, 0.2, 10.0]),
    "delta of angles": (rkd_angle, [0.0, 0.1, 0.5, 10.0]),
    "constant": (nst_loss, [0.0, 0.5, 1.0, 3.0]),
    "temperature": (lambda s, t, x: info_nce_loss(s[:, 0], t[:, 0], x), [0.01, 0.1, 1.0, 50.0]),
    "floor": (lambda s, t, x: vid_loss(s, t, jnp.asarray(RAW), x), [1e-6, 1e-3, 0.1, 2.0]),
}


@pytest.mark.parametrize("case", NUMBERS)
def test_numbers_are_traced_and_mapped(case):
    loss, values = NUMBERS[case]
    student, teacher = (jnp.float32(x) for x in some())

    def and_slope(student, teacher, x):
        value, pull = jax.vjp(lambda x: loss(student, teacher, x), jnp.float32(x))
        return value, pull(jnp.ones_like(value))[0]

    jitted = counting_jit(and_slope)
    each = [jitted(student, teacher, x) for x in values]
    assert jitted.traces == 1
    mapped = jax.jit(jax.vmap(and_slope, (None, None, 0)))(student, teacher, jnp.float32(values))
    for got, expected in zip(mapped, zip(*each, strict=True), strict=True):
        np.testing.assert_allclose(got, np.stack(expected), rtol=1e-4, atol=1e-5)
        assert np.isfinite(got).all()
    # No two of the numbers mean the same; whole numbers are numbers.
    assert len({float(x.sum()) for x, _ in each}) == len(values)
    assert jax.eval_shape(functools.partial(loss, student, teacher, 1)).dtype == jnp.float32


def test_mapped_over_batches():
    every_loss = jax.jit(jax.vmap(lambda s, t: {n: loss(s, t) for n, loss in LOSSES.items()}))
    with jax.enable_x64(True):
        students, teachers = (jnp.asarray(x) for x in some((2, *SHAPE)))
        got = every_loss(students, teachers)
        for name in LOSSES:
            expected = [run(name, *pair)[0] for pair in zip(students, teachers, strict=True)]
            np.testing.assert_allclose(got[name], np.stack(expected), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["rkd_angle", "rkd_distance"])
def test_relations_of_many_rows_never_hold_a_cube(name):
    rows, width = 96, 160
    x = jax.ShapeDtypeStruct((rows, width), jnp.float32)
    where = jax.ShapeDtypeStruct((rows,), bool)
    memory = jax.jit(with_gradients(LOSSES[name])).lower(x, x, where).compile().memory_analysis()
    # A few matrices, against a cube of 96 of them.
    assert memory.temp_size_in_bytes < 40 * 4 * rows * max(rows, width)
