"""Compressed arrays: pytree nodes that stand for one dense array and hold fewer bytes.

Each has the `shape`, `dtype`, `ndim` and `size` of the dense array, the true `nbytes`, and
`todense()`. They nest: the codes of a quantized array may be sparse, the factors of a
low-rank one quantized. They pass through `jit`, `vmap` (stack them with `jax.tree.map`),
`device_put`, `jax.tree.map` and Orbax as any pytree does; their fields are not checked when
they are rebuilt there, but by the functions that build them.
"""

from jaxcompress.arrays._base import is_compressed as is_compressed
from jaxcompress.arrays._base import is_sparse as is_sparse
from jaxcompress.arrays._base import todense as todense
from jaxcompress.arrays._block import BlockSparse as BlockSparse
from jaxcompress.arrays._block import block_sparse as block_sparse
from jaxcompress.arrays._codebook import Codebook as Codebook
from jaxcompress.arrays._convolutions import ConvChain as ConvChain
from jaxcompress.arrays._convolutions import conv_chain as conv_chain
from jaxcompress.arrays._hadamard import hadamard as hadamard
from jaxcompress.arrays._hadamard import hadamard_order as hadamard_order
from jaxcompress.arrays._low_rank import LowRank as LowRank
from jaxcompress.arrays._masked import BitMasked as BitMasked
from jaxcompress.arrays._masked import bit_mask as bit_mask
from jaxcompress.arrays._nm import NM as NM
from jaxcompress.arrays._nm import n_m as n_m
from jaxcompress.arrays._nm import restrict as restrict
from jaxcompress.arrays._nm import with_entries as with_entries
from jaxcompress.arrays._packed import Packed as Packed
from jaxcompress.arrays._packed import pack_bits as pack_bits
from jaxcompress.arrays._parts import cast as cast
from jaxcompress.arrays._parts import partition_specs as partition_specs
from jaxcompress.arrays._quantized import Groups as Groups
from jaxcompress.arrays._quantized import Quantized as Quantized
from jaxcompress.arrays._quantized import expand_groups as expand_groups
from jaxcompress.arrays._quantized import group_pairs as group_pairs
from jaxcompress.arrays._rescaled import Rescaled as Rescaled
from jaxcompress.arrays._rescaled import rescale as rescale
from jaxcompress.arrays._rotated import Rotated as Rotated
from jaxcompress.arrays._rotated import rotate as rotate
from jaxcompress.arrays._rotated import rotate_back as rotate_back
from jaxcompress.arrays._rows import Rows as Rows
from jaxcompress.arrays._rows import rows as rows
from jaxcompress.arrays._rows import take_rows as take_rows
from jaxcompress.arrays._sum import Sum as Sum
from jaxcompress.arrays._sum import add as add
from jaxcompress.arrays._sum import total as total
