"""Ramps against the papers' formulas in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxcompress as jc
from jaxcompress.schedules import cosine, cubic, exponential, linear

RAMPS = [linear, cubic, cosine]
ids = {"ids": lambda ramp: ramp.__name__}


def oracle(ramp, initial, final, begin, end, step):
    """Zhu & Gupta 2017, equation 1, and the other two shapes, written from the text."""
    if step >= end:
        return final
    if step <= begin:
        return initial
    progress = np.float64(step - begin) / (end - begin)
    if ramp is cubic:
        return final + (initial - final) * (1 - progress) ** 3
    if ramp is linear:
        return initial + (final - initial) * progress
    return final + (initial - final) * (1 + np.cos(np.pi * progress)) / 2


def test_the_ten_sparsities_of_zhu_and_gupta():
    schedule = cubic(0.0, 0.8, 0, 10)
    expected = (0, 0.2168, 0.3904, 0.5256, 0.6272, 0.7, 0.7488, 0.7784, 0.7936, 0.7992, 0.8)
    np.testing.assert_allclose([schedule(i) for i in range(11)], expected, atol=1e-7)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(
    ramp=st.sampled_from(RAMPS),
    initial=st.floats(-10, 10, width=32),
    final=st.floats(-10, 10, width=32),
    begin=st.integers(-5, 50),
    length=st.integers(1, 50),
)
def test_equals_the_formula_everywhere(ramp, initial, final, begin, length):
    end = begin + length
    steps = np.arange(begin - 3, end + 4)
    got = jax.jit(lambda steps: ramp(initial, final, begin, end)(steps))(steps)
    assert got.dtype == jnp.float32
    expected = [oracle(ramp, initial, final, begin, end, step) for step in steps]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    assert (got[:4] == np.float32(initial)).all()
    assert (got[-4:] == np.float32(final)).all()


@pytest.mark.parametrize("ramp", RAMPS, **ids)
@pytest.mark.parametrize(("initial", "final"), [(0.3, 0.8), (4.0, 1.0)])
def test_is_monotone_between_its_ends(ramp, initial, final):
    values = ramp(initial, final, 10, 1010)(jnp.arange(1020))
    assert (jnp.diff(values) * (final - initial) >= 0).all()
    assert values.min() >= np.float32(min(initial, final))
    assert values.max() <= np.float32(max(initial, final))


@pytest.mark.parametrize("ramp", RAMPS, **ids)
def test_the_same_begin_and_end_make_a_jump(ramp):
    np.testing.assert_array_equal(
        ramp(1.0, 3.0, 5, 5)(jnp.arange(3, 8)), np.float32([1, 1, 3, 3, 3])
    )
    traced = jax.jit(lambda end: ramp(1.0, 3.0, 5, end)(jnp.arange(3, 8)))(2)
    np.testing.assert_array_equal(traced, np.float32([1, 1, 3, 3, 3]))


@pytest.mark.parametrize("ramp", RAMPS, **ids)
def test_all_four_numbers_are_traced(ramp):
    numbers = [(0.0, 0.8, 0, 10), (1.0, 0.5, 3, 3), (2.0, -2.0, -5, 6)]
    columns = [jnp.asarray(column) for column in zip(*numbers, strict=True)]
    together = jax.jit(jax.vmap(lambda *four: ramp(*four)(5)))(*columns)
    np.testing.assert_allclose(together, [ramp(*four)(5) for four in numbers], rtol=1e-6)


@pytest.mark.parametrize("ramp", RAMPS, **ids)
def test_gradients_are_finite_at_the_ends_and_at_a_jump(ramp):
    for begin, end, step in [(0.0, 4.0, 0.0), (0.0, 4.0, 4.0), (2.0, 2.0, 2.0), (0.0, 4.0, 1.0)]:
        value = jax.grad(lambda *five: ramp(*five[:4])(five[4]), range(5))
        assert np.isfinite(value(1.0, 2.0, begin, end, step)).all()


def test_is_a_schedule_of_optax():
    opt = optax.inject_hyperparams(optax.sgd)(learning_rate=cubic(1.0, 0.0, 0, 2))
    params = jnp.ones(())
    with jax.numpy_dtype_promotion("standard"):
        state = opt.init(params)
        seen = []
        for _ in range(3):
            updates, state = opt.update(params, state)
            seen.append(-updates)
    np.testing.assert_allclose(seen, [1.0, 0.125, 0.0], atol=1e-7)


@pytest.mark.parametrize("ramp", RAMPS, **ids)
def test_errors_name_the_argument(ramp):
    name = ramp.__name__
    with pytest.raises(ValueError, match=rf"{name}: `end` must be at least `begin` \(7\), got 3"):
        ramp(0.0, 1.0, 7, 3)
    with pytest.raises(TypeError, match=f"{name}: `final` must be a real number"):
        ramp(0.0, "much", 0, 3)
    with pytest.raises(TypeError, match=f"{name}: `begin` must be a real number"):
        ramp(0.0, 1.0, None, 3)
    with pytest.raises(TypeError, match="got a schedule"):
        ramp(jc.schedules.linear(0, 1, 0, 1), 1.0, 0, 3)


class TestExponential:
    def test_each_round_of_lottery_tickets_removes_a_fifth(self):
        values = exponential(0.0, 1 - 0.8**10, 3, 13)(jnp.arange(16))
        rounds = np.clip(np.arange(16) - 3, 0, 10)
        np.testing.assert_allclose(values, 1 - 0.8**rounds, atol=1e-6)
        assert values[-1] == np.float32(1 - 0.8**10)

    @settings(derandomize=True, deadline=None, max_examples=20)
    @given(st.floats(0, 1, width=32), st.floats(0, 1 - 2**-10, width=32), st.integers(1, 50))
    def test_equals_the_formula_everywhere(self, initial, final, length):
        steps = np.arange(length + 1)
        got = exponential(initial, final, 0, length)(steps)
        dense, sparse = 1 - np.float64(initial), 1 - np.float64(final)
        expected = 1 - dense ** (1 - steps / length) * sparse ** (steps / length)
        expected[-1] = final  # at initial 1 nothing is left to take a share of
        np.testing.assert_allclose(got, expected, atol=1e-6)

    def test_to_nothing_left_is_a_jump(self):
        np.testing.assert_array_equal(exponential(0.5, 1.0, 1, 3)(jnp.arange(4)), [0.5, 0.5, 1, 1])

    def test_numbers_are_traced_and_have_gradients(self):
        final = jnp.array([0.5, 0.9])
        together = jax.jit(jax.vmap(lambda f: exponential(0.0, f, 0, 4)(2)))(final)
        np.testing.assert_allclose(together, 1 - np.sqrt(1 - np.asarray(final)), rtol=1e-6)
        for step in (0.0, 1.0, 4.0, 5.0):
            for last in (0.9, 1.0):
                slopes = jax.grad(lambda *a: exponential(*a[:4])(a[4]), (0, 4))
                assert np.isfinite(slopes(0.2, last, 0.0, 4.0, step)).all()

    def test_errors_name_the_argument(self):
        with pytest.raises(ValueError, match=r"exponential: `final` .* of at most 1, got 1\.5"):
            exponential(0.0, 1.5, 0, 3)
        with pytest.raises(ValueError, match=r"exponential: `end` must be at least `begin` \(7\)"):
            exponential(0.0, 0.5, 7, 3)
        with pytest.raises(TypeError, match="`initial` must be a real number, got a schedule"):
            exponential(linear(0, 1, 0, 1), 0.5, 0, 3)
