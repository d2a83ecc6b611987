"""Every loss on features: rows and positions that do not count are as if they were not there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.distillation.features import LOSSES, RELATIONS, run, some

every = pytest.mark.parametrize("name", LOSSES)


@every
def test_rows_that_do_not_count_are_left_away(name):
    student, teacher = some()
    keep = np.array([True, False, True, True, False, True])
    noise = np.random.default_rng(1).choice([np.nan, np.inf, -np.inf, 1e30], size=(6, 1, 1))
    noise = np.where(keep[:, None, None], 0.0, noise)
    got, slopes = run(name, jnp.float32(student + noise), jnp.float32(teacher - noise), keep)
    expected, wanted = run(name, jnp.float32(student[keep]), jnp.float32(teacher[keep]))
    if got.ndim:
        assert (got[~keep] == 0).all()
        got = got[keep]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    for slope, want in zip(slopes, wanted, strict=True):
        assert (slope[~keep] == 0).all()
        np.testing.assert_allclose(slope[keep], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "info_nce_loss"])
def test_positions_that_do_not_count_are_not_read(name):
    student, teacher = (jnp.float32(x) for x in some())
    keep = np.random.default_rng(3).random((6, 3)) < 0.7
    keep[1] = False
    dirty = [jnp.where(keep[..., None], x, jnp.nan) for x in (student, teacher)]
    got, slopes = run(name, *dirty, keep)
    zeros = [jnp.where(keep[..., None], x, 0.0) for x in (student, teacher)]
    expected, _ = run(name, *zeros, keep.any(1))
    if name in ("hint_loss", "fsp_loss"):  # Means over what counts; FSP's enters squared.
        counts = np.maximum(keep.sum(1), 1)
        expected *= (3 / counts) ** (1 if name == "hint_loss" else 2)
    if name != "vid_loss":
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    for slope in slopes:
        assert np.isfinite(slope).all()
        assert (np.asarray(slope)[~keep] == 0).all()


@every
def test_an_empty_mask_and_an_empty_batch_are_zero(name):
    student, teacher = (jnp.float32(x) for x in some())
    value, slopes = run(name, student, teacher, np.zeros(6, bool))
    assert (value == 0).all()
    for slope in slopes:
        assert (slope == 0).all()
    got = jax.jit(LOSSES[name])(jnp.zeros((0, 3, 4)), jnp.zeros((0, 3, 4)))
    assert got.size == 0 or got == 0


@pytest.mark.parametrize("name", RELATIONS)
def test_one_row_alone_has_no_relations(name):
    student, teacher = (jnp.float32(x) for x in some())
    value, slopes = run(name, student, teacher, np.arange(6) == 2)
    np.testing.assert_allclose(value, 0.0, atol=1e-7)
    for slope in slopes:
        np.testing.assert_allclose(slope, 0.0, atol=1e-6)


@every
def test_one_row_with_one_channel(name):
    student, teacher = (jnp.float32(x[:1, :, :1]) for x in some())
    value, slopes = run(name, student, teacher)
    assert np.isfinite(value).all()
    assert all(np.isfinite(slope).all() for slope in slopes)
    if name in RELATIONS:
        np.testing.assert_allclose(value, 0.0, atol=1e-7)
