"""Every loss on features, on meshes with the rows or the channels sharded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxcompress.distillation import fsp_loss, vid_loss
from tests.conftest import mesh_of
from tests.distillation.features import LOSSES, run, some, with_gradients

KEEP = np.arange(6) != 3
# These two take more arrays, which must lie on the mesh too.
ON_A_MESH = {
    **LOSSES,
    "vid_loss": lambda s, t, where: vid_loss(s, t, jnp.float32(0.5), where=where),
    "fsp_loss": lambda s, t, where: fsp_loss((s, 2 * s), (t, 2 * t), where=where),
}


@jax.jit
def all_losses(student, teacher):
    return {n: with_gradients(f)(student, teacher, KEEP) for n, f in ON_A_MESH.items()}


@pytest.mark.parametrize(("kind", "axis"), [("auto", 0), ("explicit", 0), ("explicit", 2)])
def test_sharded_over_rows_or_channels(kind, axis):
    mesh = mesh_of(kind, 2)
    with jax.enable_x64(True):
        student, teacher = (jnp.asarray(x) for x in some())
        with jax.set_mesh(mesh):
            spec = PartitionSpec(*["d" if i == axis else None for i in range(3)])
            place = NamedSharding(mesh, spec)
            got = all_losses(jax.device_put(student, place), jax.device_put(teacher, place))
        for name, (value, slopes) in got.items():
            if ON_A_MESH[name] is LOSSES[name]:
                expected, wanted = run(name, student, teacher, KEEP)
            else:
                expected, wanted = with_gradients(ON_A_MESH[name])(student, teacher, KEEP)
            np.testing.assert_allclose(value, expected, rtol=1e-9, atol=1e-12, err_msg=name)
            for slope, want in zip(slopes, wanted, strict=True):
                np.testing.assert_allclose(slope, want, rtol=1e-9, atol=1e-12, err_msg=name)
                assert kind == "auto" or slope.sharding.is_equivalent_to(place, 3), name
