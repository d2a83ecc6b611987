"""Losses on logits that are sharded over rows or classes."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from tests.conftest import mesh_of


def with_gradient(losses):
    """Of both logits: `((sum, losses), the student's gradient of the sum)`."""

    def summed(student, teacher):
        values = losses(student, teacher)
        return jnp.sum(values), values

    return jax.jit(jax.value_and_grad(summed, has_aux=True))


def check(call, wanted, student, teacher, kind, spec, atol=1e-6):
    """That a call of `with_gradient` on a mesh is what it is on one device, sharded alike."""
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        place = NamedSharding(mesh, PartitionSpec(*spec))
        s, t = jax.device_put(student, place), jax.device_put(teacher, place)
        (_, got), grad = call(s, t)
    (_, expected), slope = wanted
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    np.testing.assert_allclose(grad, slope, rtol=1e-4, atol=atol)
    assert grad.sharding.is_equivalent_to(place, 2)
