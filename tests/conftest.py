"""Eight fake CPU devices, strict promotion: set before JAX starts."""

import functools
import itertools
import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import optax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


_tests_done = itertools.count(1)


@pytest.fixture(autouse=True)
def few_programs_at_a_time():
    """Compiled programs are mapped memory: a process of thousands of tests runs out of maps."""
    yield
    if next(_tests_done) % 100 == 0:
        jax.clear_caches()


@pytest.fixture
def key():
    return jax.random.key(0)


def counting_jit(fn):
    """`jax.jit(fn)` that counts in `.traces` how often JAX traced `fn`.

    The private `_cache_size()` reads 0 once a long process has filled JAX's shared cache.
    """

    @functools.wraps(fn)
    def counted(*args, **kwargs):
        jitted.traces += 1
        return fn(*args, **kwargs)

    jitted = jax.jit(counted)
    jitted.traces = 0
    return jitted


def lenient(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """An optimizer of Optax, whose own arithmetic does not pass strict promotion."""
    optimizer = optax.with_extra_args_support(optimizer)

    def update(updates, state, params=None, **extra):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return optimizer.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def mesh_of(kind: str, size: int = 4) -> jax.sharding.Mesh:
    """A mesh of fake devices with one axis "d", "auto" or "explicit"."""
    axis_type = {
        "auto": jax.sharding.AxisType.Auto,
        "explicit": jax.sharding.AxisType.Explicit,
    }[kind]
    return jax.make_mesh((size,), ("d",), axis_types=(axis_type,), devices=jax.devices()[:size])
