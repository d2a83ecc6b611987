"""Kernels of convolutions as sequences of smaller kernels."""

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import _check
from jaxcompress._dtypes import wide
from jaxcompress.arrays import _base


@functools.partial(jax.tree_util.register_dataclass, data_fields=["stages"], meta_fields=["groups"])
@dataclasses.dataclass(frozen=True, repr=False)
class ConvChain(_base.Sized):
    """A kernel `[*spatial, in, out]` as smaller ones, applied one after the other.

    At most one stage has an extent other than 1 along each spatial axis, so that strides,
    dilations and paddings of the convolution belong to that stage. The dense kernel is the
    product of the stages in float32 or wider, cast to the dtype of the first.

    Attributes:
        stages: `[*spatial, in / groups, out]` each, arrays or `Quantized`.
        groups: static. The `feature_group_count` of each stage.
    """

    stages: tuple[Any, ...]
    groups: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the dense kernel."""
        first, last = self.stages[0].shape, self.stages[-1].shape
        sizes = zip(*(stage.shape[:-2] for stage in self.stages), strict=True)
        spatial = tuple(next((n for n in axis if n != 1), 1) for axis in sizes)
        return (*spatial, first[-2] * self.groups[0], last[-1])

    @property
    def dtype(self) -> np.dtype:
        """That of the first stage."""
        return self.stages[0].dtype

    def todense(self) -> jax.Array:
        """The product of the stages."""
        whole = [
            _ungrouped(wide(_base.todense(stage)), groups)
            for stage, groups in zip(self.stages, self.groups, strict=True)
        ]
        multiply = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
        return functools.reduce(multiply, whole).astype(self.dtype)

    def __repr__(self) -> str:
        return _base.show(self, stages=[list(stage.shape) for stage in self.stages])


def conv_chain(stages: Sequence[Any], groups: Sequence[int] | None = None) -> ConvChain:
    r"""A kernel that is applied as a sequence of smaller convolutions.

    .. math:: W_{y x i o} = \sum_{m} A_{y x i m}\, B_{y x m o}

    where a stage of extent 1 along a spatial axis is the same at each place.

    Args:
        stages: in the order in which they are applied, of shapes `[*spatial, in / groups, out]`;
            arrays or compressed arrays of floating-point values. May be traced.
        groups: static. The `feature_group_count` of each stage; None: 1.

    Returns:
        A `ConvChain`, which `jc.lift` runs as these convolutions.

    Raises:
        ValueError: no stage, or shapes or groups that do not follow one another; two stages
            extend along one spatial axis.
        TypeError: a stage is not real floating point.

    Examples:
        >>> tall, wide = jnp.ones((3, 1, 4, 2)), jnp.ones((1, 3, 2, 8))
        >>> jc.arrays.conv_chain([tall, wide])
        ConvChain(float32[3, 3, 4, 8], stages=[[3, 1, 4, 2], [1, 3, 2, 8]], nbytes=288)

    Source: Jaderberg et al. 2014, arXiv:1405.3866, section 2.
    """
    stages = tuple(stages)
    groups = (1,) * len(stages) if groups is None else tuple(groups)
    for stage in stages:
        _check.floating("conv_chain", "stages", stage)
    broken = broken_rule(stages, groups)
    if broken is not None:
        got = f"{[list(stage.shape) for stage in stages]} with groups {list(groups)}"
        raise ValueError(_check.message("conv_chain", "stages", broken, got))
    return ConvChain(stages, groups)


def broken_rule(stages: Sequence[Any], groups: Sequence[int]) -> str | None:
    """What stages have to be and are not; None where they make a chain."""
    if not stages or len(groups) != len(stages):
        return "have one or more kernels, and groups for each"
    ndim = len(stages[0].shape)
    if ndim < 3 or any(len(stage.shape) != ndim for stage in stages):
        return "have the same spatial axes, one or more, then inputs and outputs"
    for axis in range(ndim - 2):
        if sum(stage.shape[axis] != 1 for stage in stages) > 1:
            return f"have one kernel at most that extends along axis {axis}"
    for stage, count in zip(stages, groups, strict=True):
        outputs = stage.shape[-1]
        whole = 1 <= count <= max(outputs, 1) and outputs % count == 0
        if not whole and (count, outputs) != (0, 0):
            return "have outputs that are a multiple of their groups"
    for i, before in enumerate(stages[:-1]):
        if stages[i + 1].shape[-2] * groups[i + 1] != before.shape[-1]:
            return "have as many inputs, times groups, as the one before has outputs"
    return None


def rows_of_chain(chain: ConvChain) -> tuple[Any, Any]:
    """What there is of each row along the first spatial axis, and what builds a row of it.

    The row has one spatial axis fewer: with none left it is a dense matrix.
    """
    if chain.ndim == 3:
        return chain.todense(), lambda row: row
    long = [i for i, stage in enumerate(chain.stages) if stage.shape[0] != 1]
    at = long[0] if long else 0
    stages = [_base.todense(stage) for stage in chain.stages]

    def rebuild(row):
        cut = [row if i == at else stage[0] for i, stage in enumerate(stages)]
        return ConvChain(tuple(cut), chain.groups)

    return stages[at], rebuild


def map_stages(chain: ConvChain, f: Any) -> ConvChain:
    """The chain with `f(stage)` for each stage."""
    return dataclasses.replace(chain, stages=tuple(map(f, chain.stages)))


def _ungrouped(stage: jax.Array, groups: int) -> jax.Array:
    """The kernel `[*spatial, in, out]`, with zeros where input and output are in other groups."""
    if groups == 1:
        return stage
    *spatial, inputs, outputs = stage.shape
    each = stage.reshape(*spatial, 1, inputs, groups, outputs // max(groups, 1))
    own = jnp.eye(groups, dtype=stage.dtype).reshape((1,) * len(spatial) + (groups, 1, groups, 1))
    return operator.mul(each, own).reshape(*spatial, groups * inputs, outputs)
