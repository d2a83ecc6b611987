"""Penalties on singular values against NumPy float64 and its finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from jaxcompress.factorization._regularizers import (
    nuclear_norm_penalty,
    orthogonality_penalty,
    spectral_norm_penalty,
)
from tests.conftest import counting_jit, mesh_of

SHAPES = [(6, 4), (4, 6), (5, 5), (3, 2, 4)]
OF_SINGULAR_VALUES = {
    "nuclear": lambda s: s.sum(),
    "spectral": lambda s: 0.5 * s.max(initial=0.0) ** 2,
    "orthogonality": lambda s: np.sum((s**2 - 1) ** 2),
}
PENALTIES = {
    "nuclear": nuclear_norm_penalty,
    "spectral": spectral_norm_penalty,
    "orthogonality": orthogonality_penalty,
}
penalties = pytest.mark.parametrize("name", PENALTIES)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def reference(name, *leaves):
    matrices = [np.asarray(w, np.float64).reshape(-1, w.shape[-1]) for w in leaves]
    return sum(OF_SINGULAR_VALUES[name](np.linalg.svd(m, compute_uv=False)) for m in matrices)


def differences(name, w, h=1e-5):
    out = np.zeros(w.shape)
    for index in np.ndindex(w.shape):
        e = np.zeros(w.shape)
        e[index] = h
        out[index] = (reference(name, w + e) - reference(name, w - e)) / (2 * h)
    return out


def wide(w):
    return jnp.asarray(w, jnp.float32)


@penalties
@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradient(name, shape):
    w = draw(*shape)
    value, slope = jax.value_and_grad(PENALTIES[name])(wide(w))
    np.testing.assert_allclose(value, reference(name, w), rtol=1e-5)
    np.testing.assert_allclose(PENALTIES[name](wide(w)), reference(name, w), rtol=1e-5)
    np.testing.assert_allclose(slope, differences(name, w), rtol=2e-4, atol=2e-4)


@penalties
def test_sums_over_the_chosen_leaves_alone(name):
    a, b = draw(6, 4), draw(3, 5, seed=1)
    params = {"a": {"kernel": wide(a), "bias": jnp.ones(3)}, "b": wide(b), "n": None, "i": 3}
    f = PENALTIES[name]
    np.testing.assert_allclose(f(params), reference(name, a, b), rtol=1e-5)
    np.testing.assert_allclose(f(params, where="**/kernel"), reference(name, a), rtol=1e-5)
    params.pop("i")
    slopes = jax.grad(lambda p: f(p, where="a/kernel"))(params)
    np.testing.assert_array_equal(slopes["b"], 0)
    np.testing.assert_array_equal(slopes["a"]["bias"], 0)
    assert np.any(slopes["a"]["kernel"])


@pytest.mark.parametrize("shape", SHAPES)
def test_nuclear_gradient_at_zero_singular_values_is_the_least_subgradient(shape):
    rows, columns = int(np.prod(shape[:-1])), shape[-1]
    u, v = draw(rows, 2), draw(2, columns, seed=1)
    a, _, b = np.linalg.svd(u @ v, full_matrices=False)
    slope = jax.grad(nuclear_norm_penalty)(wide((u @ v).reshape(shape)))
    np.testing.assert_allclose(slope.reshape(rows, columns), a[:, :2] @ b[:2], atol=1e-5)


def test_repeated_singular_values():
    q = np.linalg.qr(draw(6, 4))[0]
    np.testing.assert_allclose(jax.grad(nuclear_norm_penalty)(wide(2 * q)), q, atol=1e-5)
    np.testing.assert_allclose(jax.grad(orthogonality_penalty)(wide(q)), 0, atol=1e-5)
    slope = np.asarray(jax.grad(spectral_norm_penalty)(wide(2 * q)), np.float64)
    # A subgradient: of rank one, as long as the spectral norm, and aligned with the matrix.
    np.testing.assert_allclose(np.linalg.svd(slope, compute_uv=False), [2, 0, 0, 0], atol=1e-5)
    np.testing.assert_allclose(np.sum(slope * 2 * q), 4.0, rtol=1e-5)


@penalties
def test_edges(name):
    f = PENALTIES[name]
    for w in (jnp.zeros((4, 3)), jnp.eye(4), jnp.ones((3, 5)), jnp.full((4, 4), 1e-30)):
        value, slope = jax.value_and_grad(f)(w)
        assert np.isfinite(value)
        assert np.isfinite(slope).all()
        np.testing.assert_allclose(value, reference(name, w), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(jax.grad(f)(jnp.zeros((4, 3))), 0)
    for shape in ((0, 4), (4, 0)):
        assert float(f(jnp.zeros(shape))) == 0
        assert jax.grad(f)(jnp.zeros(shape)).shape == shape
    value, slope = jax.value_and_grad(f)(jnp.ones((4, 3)).at[1, 1].set(jnp.nan))
    assert np.isnan(value)
    assert np.isnan(slope).any()
    # Far outside of the range whose squares float32 holds.
    if name == "nuclear":
        np.testing.assert_allclose(f(jnp.full((4, 4), 1e25)), 4e25, rtol=1e-5)
    if name == "spectral":
        slope = jax.grad(f)(jnp.full((4, 4), 1e-25))
        np.testing.assert_allclose(slope, 1e-25, rtol=1e-5)


@pytest.mark.parametrize("name", ["nuclear", "orthogonality"])
def test_second_derivatives(name):
    f, w, d = PENALTIES[name], draw(5, 4), draw(5, 4, seed=1)
    got = jax.jvp(jax.grad(f), (wide(w),), (wide(d),))[1]
    h = 1e-4
    want = (differences(name, w + h * d) - differences(name, w - h * d)) / (2 * h)
    np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-3)
    flat = jax.jvp(jax.grad(f), (jnp.zeros((4, 4)),), (jnp.ones((4, 4)),))[1]
    assert np.isfinite(flat).all()


@penalties
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_dtypes_are_computed_in_float32(name, dtype):
    w = jnp.asarray(draw(6, 4), dtype)
    value, slope = jax.value_and_grad(PENALTIES[name])(w)
    assert value.dtype == jnp.float32
    assert slope.dtype == dtype
    want, slope32 = jax.value_and_grad(PENALTIES[name])(w.astype(jnp.float32))
    np.testing.assert_array_equal(value, want)
    as32 = lambda x: np.asarray(x.astype(dtype), np.float32)  # noqa: E731
    np.testing.assert_array_equal(as32(slope), as32(slope32))


@penalties
def test_vmap_equals_a_loop_and_compiles_once(name):
    many = wide(draw(3, 6, 4))
    f = counting_jit(jax.value_and_grad(PENALTIES[name]))
    values, slopes = jax.vmap(jax.value_and_grad(PENALTIES[name]))(many)
    for i in range(3):
        value, slope = f(many[i])
        np.testing.assert_allclose(values[i], value, rtol=1e-6)
        np.testing.assert_allclose(slopes[i], slope, atol=1e-4)
    assert f.traces == 1


@penalties
@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_sharded_equals_one_device(name, kind):
    params = {"a": wide(draw(8, 4)), "b": wide(draw(4, 8, seed=1)), "c": wide(draw(3, 3))}
    step = jax.jit(jax.value_and_grad(PENALTIES[name]))
    want, slopes = step(params)
    mesh = mesh_of(kind)
    specs = {"a": P("d", None), "b": P(None, "d"), "c": P(None, None)}
    with jax.set_mesh(mesh):
        shardings = {k: NamedSharding(mesh, spec) for k, spec in specs.items()}
        got, slopes_here = step(jax.device_put(params, shardings))
        if kind == "explicit":
            assert jax.typeof(slopes_here["a"]).sharding.spec == specs["a"]
    np.testing.assert_allclose(got, want, rtol=1e-6)
    for k in params:
        np.testing.assert_allclose(slopes_here[k], slopes[k], rtol=1e-4, atol=1e-4)


@penalties
def test_of_low_rank_leaves_it_is_that_of_their_product(name):
    u, v = draw(6, 2), draw(2, 4, seed=1)
    factors = jc.arrays.LowRank(wide(u), wide(v))
    f = PENALTIES[name]
    np.testing.assert_allclose(f({"w": factors}), reference(name, u @ v), rtol=1e-5)
    slope = jax.grad(f)({"w": factors})["w"]
    dense = jax.grad(f)(wide(u @ v))
    np.testing.assert_allclose(slope.u, np.asarray(dense) @ v.T, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "check"),
    [
        ("nuclear", lambda s: s.max() < 0.02),
        ("spectral", lambda s: s.max() < 1.2),
        ("orthogonality", lambda s: np.abs(s - 1).max() < 1e-3),
    ],
)
def test_descent_on_the_penalty(name, check):
    w = wide(draw(6, 4))
    optimizer = optax.sgd({"nuclear": 0.01, "spectral": 0.02, "orthogonality": 0.02}[name])

    def step(carry, _):
        w, state = carry
        updates, state = optimizer.update(jax.grad(PENALTIES[name])(w), state)
        return (optax.apply_updates(w, updates), state), None

    (w, _), _ = jax.lax.scan(step, (w, optimizer.init(w)), length=500)
    assert check(np.linalg.svd(np.asarray(w), compute_uv=False))


@penalties
def test_what_does_not_fit_is_refused(name):
    f = PENALTIES[name]
    params = {"w": jnp.ones((3, 2)), "b": jnp.ones(3), "i": jnp.ones((2, 2), jnp.int32)}
    with pytest.raises(ValueError, match=r"_penalty: .*two or more dim.*float32\[3\] at 'b'"):
        f(params, where="b")
    with pytest.raises(TypeError, match=r"_penalty: .*floating-point.*int32\[2, 2\] at 'i'"):
        jax.jit(lambda p: f(p, where="i"))(params)
    with pytest.raises(ValueError, match=r"_penalty: `where` must match"):
        f(params, where="nothing")
