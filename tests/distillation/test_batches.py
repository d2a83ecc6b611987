"""What every loss on features keeps to: dtypes, degenerate batches and errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress.distillation import (
    attention_transfer,
    cka,
    fsp_loss,
    hint_loss,
    ickd_loss,
    info_nce_loss,
    nst_loss,
    pkt_loss,
    rkd_angle,
    rkd_distance,
)
from tests.distillation.features import LOSSES, RELATIONS, ROWS, SCALARS, SHAPE, run, some

every = pytest.mark.parametrize("name", LOSSES)


@every
def test_shape_and_dtype(name):
    student, teacher = some()
    got, _ = run(name, jnp.float32(student), jnp.float32(teacher))
    assert got.shape == (() if name.startswith(SCALARS) else (6,))
    assert (got > 0).all() or name == "vid_loss"
    narrow = jnp.bfloat16(student), jnp.bfloat16(teacher)
    got, slopes = run(name, *narrow)
    assert got.dtype == jnp.float32
    # Not merely near: all is computed in float32.
    wide, wanted = run(name, *(jnp.float32(x) for x in narrow))
    np.testing.assert_allclose(got, wide, rtol=1e-6, atol=1e-7)
    for slope, want in zip(slopes, wanted, strict=True):
        assert slope.dtype == jnp.bfloat16
        slack = 1e-2 * np.abs(want).max()
        np.testing.assert_allclose(np.float32(slope), want, rtol=1e-2, atol=slack)
    with jax.enable_x64(True):
        for ours, theirs, expected in [
            ("float16", "float32", "float32"),
            ("bfloat16", "float16", "float32"),
            ("float64", "bfloat16", "float64"),
            ("float32", "float64", "float64"),
        ]:
            shapes = jax.ShapeDtypeStruct(SHAPE, ours), jax.ShapeDtypeStruct(SHAPE, theirs)
            assert jax.eval_shape(LOSSES[name], *shapes).dtype == expected


def stressed(case):
    """A student and a teacher of one degenerate kind."""
    student, teacher = some()
    match case:
        case "large":
            return 1e4 * student, -1e4 * teacher
        case "tiny":
            return 1e-15 * student, 1e-15 * teacher
        case "zero student":
            return 0 * student, teacher
        case "zero teacher":
            return student, 0 * teacher
        case "both zero":
            return 0 * student, 0 * teacher
        case "a zero row":
            return student * (np.arange(6) != 2)[:, None, None], teacher
        case "a zero channel":
            return student * (np.arange(4) != 2), teacher * (np.arange(4) != 1)
        case "one channel of all":
            return student * (np.arange(4) == 2), teacher * (np.arange(4) == 1)
        case "identical rows":
            return student[:1] + 0 * student, teacher
        case "all rows identical":
            return student[:1] + 0 * student, teacher[:1] + 0 * teacher
        case "two identical rows":
            return student[[0, 0, 2, 3, 4, 5]], teacher
        case "equal":
            return teacher, teacher
        case "opposite rows":
            return np.concatenate([student[:3], -student[:3]]), teacher
        case "constant":
            return np.full(SHAPE, 0.1), np.full(SHAPE, 1e4 + 0.3)
    raise AssertionError(case)


CASES = """large, tiny, zero student, zero teacher, both zero, a zero row, a zero channel, one
channel of all, identical rows, all rows identical, two identical rows, equal, opposite rows,
constant"""


@every
@pytest.mark.parametrize("case", [" ".join(case.split()) for case in CASES.split(",")])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_values_and_gradients_are_finite(name, case, dtype):
    student, teacher = (jnp.asarray(x, dtype) for x in stressed(case))
    value, slopes = run(name, student, teacher)
    assert np.isfinite(value).all()
    for slope in slopes:
        assert slope.dtype == dtype
        assert np.isfinite(np.float32(slope)).all()
    if case in ("equal", "both zero") and name not in ("vid_loss", "info_nce_loss"):
        expected = 1.0 if case == "both zero" and name.startswith("cka") else 0.0
        np.testing.assert_allclose(value, expected, atol=3e-6)


@every
def test_nan_and_infinity_are_not_hidden(name):
    for wrong in (np.nan, np.inf):
        student, teacher = (np.float32(x) for x in some())
        student[2, 0, 1] = wrong
        got = np.asarray(run(name, jnp.asarray(student), jnp.asarray(teacher))[0])
        assert not np.isfinite(got if got.ndim == 0 else got[2])
        if name in ROWS:
            assert np.isfinite(np.delete(got, 2)).all()


SAME_POSITIONS = ["attention_transfer", "nst_loss"]
SAME_CHANNELS = ["fsp_loss", "ickd_loss"]


@pytest.mark.parametrize("name", ["hint_loss", "vid_loss", *SAME_POSITIONS, *SAME_CHANNELS])
def test_what_does_not_fit_needs_an_adapter(name):
    x = jax.ShapeDtypeStruct((2, 3, 4), jnp.float32)
    for shape, allowed in [((2, 3, 3), SAME_POSITIONS), ((2, 5, 4), SAME_CHANNELS)]:
        other = jax.ShapeDtypeStruct(shape, jnp.float32)
        if name in allowed:
            assert jax.eval_shape(LOSSES[name], x, other).shape == (2,)
        else:
            message = rf"{name}: `teacher` must have the student's .*\[.*got float32\[.*adapter"
            with pytest.raises(ValueError, match=message):
                jax.eval_shape(LOSSES[name], x, other)


@pytest.mark.parametrize("name", [n for n in RELATIONS if n != "info_nce_loss"])
def test_relations_need_only_the_same_batch(name):
    x, wide = jax.ShapeDtypeStruct(SHAPE, jnp.float32), jax.ShapeDtypeStruct((6, 7), jnp.float32)
    assert jax.eval_shape(LOSSES[name], x, wide).dtype == jnp.float32
    with pytest.raises(ValueError, match=r"`teacher` must have the student's batch \[6\]"):
        LOSSES[name](jnp.zeros(SHAPE), jnp.zeros((5, 3, 4)))
    # What only the student has cannot be left away.
    one_position = functools.partial(LOSSES[name], where=np.ones((6, 3), bool))
    with pytest.raises(ValueError, match=r"`where` must be booleans of shape \[6\], one per row"):
        jax.eval_shape(one_position, x, wide)


@every
def test_errors_name_the_argument(name):
    loss, x = LOSSES[name], jnp.zeros((2, 3, 4))
    with pytest.raises(TypeError, match=r"`student` must be real floating.*got int32"):
        jax.eval_shape(loss, jnp.zeros((2, 3, 4), jnp.int32), x)
    with pytest.raises(TypeError, match="`where` must be booleans"):
        loss(x, x, where=jnp.ones(2))
    for wrong in ((), (3,), (2, 4), (2, 3, 4)):
        with pytest.raises(ValueError, match=r"`where` must be booleans of shape \[2\]"):
            loss(x, x, where=jnp.ones(wrong, bool))


def test_more_errors_say_what_to_do():
    x = jnp.zeros((2, 3, 4))
    for loss in (hint_loss, cka, pkt_loss):
        with pytest.raises(ValueError, match=r"`student` must have the axes \[batch, \.\.\."):
            loss(jnp.zeros(3), jnp.zeros(3))
    for loss in (attention_transfer, nst_loss, ickd_loss):
        with pytest.raises(ValueError, match=r"`student` must have the axes \[batch, positions"):
            loss(jnp.zeros((2, 3)), jnp.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"attention_transfer: `power` must .* at least 0"):
        attention_transfer(x, x, -1.0)
    with pytest.raises(ValueError, match=r"nst_loss: `constant` must"):
        nst_loss(x, x, -1.0)
    with pytest.raises(TypeError, match=r"nst_loss: `degree` must be a static integer"):
        nst_loss(x, x, degree=2.0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"rkd_angle: `delta` must"):
        rkd_angle(x, x, -1.0)
    with pytest.raises(TypeError, match=r"rkd_distance: `delta` must"):
        rkd_distance(x, x, "one")  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"fsp_loss: `student` must be the features"):
        fsp_loss(x, (x, x))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"fsp_loss: `student` must have the first layer's"):
        fsp_loss((x, x[:, :2]), (x, x))
    with pytest.raises(ValueError, match=r"info_nce_loss: `student` must .*Pool"):
        info_nce_loss(x, x)
    with pytest.raises(ValueError, match=r"info_nce_loss: `temperature` must"):
        info_nce_loss(x[:, 0], x[:, 0], 0.0)
