"""The losses on features as functions of two arrays [batch, positions, channels], in one table."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.distillation import (
    attention_transfer,
    cka_loss,
    fsp_loss,
    hint_loss,
    ickd_loss,
    info_nce_loss,
    nst_loss,
    pkt_loss,
    rkd_angle,
    rkd_distance,
    similarity_preserving,
    vid_loss,
)

RAW = np.float32([0.5, -1.0, 2.0, 0.0])


def fsp(student, teacher, **options):
    """Two layers of one array, so that it is tested as a function of two arrays."""
    return fsp_loss((student, 2 * student[..., :3]), (teacher, 2 * teacher[..., :3]), **options)


def vid(student, teacher, **options):
    return vid_loss(student, teacher, jnp.asarray(RAW[: student.shape[-1]]), **options)


def pooled_info_nce(student, teacher, **options):
    """On the first position, as it takes [batch, features]."""
    return info_nce_loss(student[:, 0], teacher[:, 0], **options)


ROWS = {  # One number per row.
    "hint_loss": hint_loss,
    "vid_loss": vid,
    "attention_transfer": attention_transfer,
    "nst_loss": nst_loss,
    "nst_loss, cubic": functools.partial(nst_loss, constant=0.5, degree=3),
    "fsp_loss": fsp,
    "ickd_loss": ickd_loss,
    "ickd_loss, normalized": functools.partial(ickd_loss, normalized=True),
}
RELATIONS = {  # One number per row, or one in all, of which every row has a part.
    "pkt_loss": pkt_loss,
    "info_nce_loss": pooled_info_nce,
    "similarity_preserving": similarity_preserving,
    "rkd_distance": rkd_distance,
    "rkd_angle": rkd_angle,
    "cka_loss": cka_loss,
    "cka_loss, unbiased": functools.partial(cka_loss, unbiased=True),
}
LOSSES = {**ROWS, **RELATIONS}
SCALARS = ("similarity", "rkd", "cka")
SHAPE = (6, 3, 4)


def some(shape=SHAPE, seed=0):
    return np.random.default_rng(seed).normal(size=(2, *shape))


def with_gradients(loss):
    """The loss, and the gradients of its sum for both features."""

    def both(student, teacher, where):
        value, pull = jax.vjp(lambda s, t: loss(s, t, where=where), student, teacher)
        return value, pull(jnp.ones_like(value))

    return both


@functools.cache
def compiled(name):
    return jax.jit(with_gradients(LOSSES[name]))


def run(name, student, teacher, where=None):
    """The loss and both gradients, compiled once per shape and dtype."""
    if where is None:
        where = np.ones(student.shape[0], bool)
    return compiled(name)(student, teacher, where)
