"""Taking the mean error of compressed layers into their biases."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress import _check, arrays, tree
from jaxcompress._products import product
from jaxcompress._types import PyTree
from jaxcompress.solvers._inputs import inputs_of, mean_inputs, with_statistics
from jaxcompress.solvers._layout import Layout
from jaxcompress.tracing import Statistics


def correct_bias(
    params: PyTree,
    compressed: PyTree,
    stats: Mapping[str, Statistics],
    biases: Mapping[str, str] | None = None,
) -> PyTree:
    r"""Adds to each bias the mean output that its layer lost when it was compressed.

    .. math:: b' = b + E[x]\,(W - W')

    so that the mean of each output is what it was. The error of rounded weights is not zero
    on average where the inputs are not, as after a ReLU.

    Args:
        params: the dense parameters that were compressed.
        compressed: what `jc.compress` or `jc.pack` made of them: the structure of `params`,
            with dense or compressed leaves.
        stats: from `jc.calibrate(fn, params, batches, moments=True)`; of convolutions whose kernels
            have an axis of size 1 with `gram=True` as well.
        biases: from paths of kernels to those of the biases that are added to their outputs.
            None: each leaf with statistics and a sibling named `bias` with one entry for
            each of its outputs.

    Returns:
        `compressed` with new biases, of the same dtypes. A bias of several kernels gets all
        their corrections. Leaves that were not compressed correct nothing. For convolutions
        the mean is that over all places of the input, and the zeros of a padding are not in it.

    Raises:
        ValueError: a path that no leaf has; a bias of another size than the outputs;
            statistics without moments; with `biases`: a kernel without statistics or used in
            several ways.
        TypeError: a leaf is not real floating point, or a bias is compressed.

    Cost: one pass over the weights. Works under `jit`; compressed leaves are made dense there.

    Examples:
        >>> fn = lambda p, x: x @ p["kernel"] + p["bias"]
        >>> params = {"kernel": jnp.array([[1.0, 0.3], [0.4, -1.0]]), "bias": jnp.zeros(2)}
        >>> x = jnp.array([[2.0, 1.0], [4.0, 0.0]])
        >>> stats = jc.calibrate(fn, params, [x], moments=True)
        >>> new = jc.compress(jc.quantize(2), params)
        >>> new = jc.solvers.correct_bias(params, new, stats)
        >>> (fn(new, x).mean(0) - fn(params, x).mean(0)).round(5) + 0.0
        Array([0., 0.], dtype=float32)

    Source: Nagel et al. 2019, arXiv:1906.04721, section 4.2, equation 17; Finkelstein et al. 2019,
    arXiv:1906.03193. Differs: the mean input is measured on data, not derived from a norm.
    """
    before = tree.by_path("correct_bias", "params", params)
    after = tree.by_path("correct_bias", "compressed", compressed)
    if set(before) != set(after):
        rule, got = "have the leaves of `params`", sorted(set(before) ^ set(after))
        raise ValueError(_check.message("correct_bias", "compressed", rule, got))
    where = None
    if biases is not None:
        _require_leaves(biases, before)
        where = lambda path, _: path in biases  # noqa: E731
    found = with_statistics("correct_bias", params, stats, where) if biases != {} else {}
    added: dict[str, jax.Array] = {}
    for path, (w, layout, several) in found.items():
        outputs = _outputs(layout)
        bias = _sibling(path, before, outputs) if biases is None else biases[path]
        if bias is None:
            continue
        if before[bias].size != outputs:
            rule = f"name a bias of {outputs} entries"
            got = _check.describe(before[bias])
            raise ValueError(_check.message("correct_bias", "biases", rule, got, path=path))
        new = arrays.todense(after[path])
        lost = _lost_mean(path, w, new, layout, several).reshape(before[bias].shape)
        added[bias] = added[bias] + lost if bias in added else lost
    for bias in added:
        _check.floating("correct_bias", "params", before[bias], bias)
        if arrays.is_compressed(after[bias]):
            rule, got = "have dense biases", type(after[bias]).__name__
            raise TypeError(_check.message("correct_bias", "compressed", rule, got, path=bias))

    def corrected(path, b):
        return (b.astype(jnp.float32) + added[path]).astype(b.dtype) if path in added else b

    return tree.map_with_path(corrected, compressed)


def _lost_mean(
    path: str, w: jax.Array, new: jax.Array, layout: Layout, several: list[Statistics]
) -> jax.Array:
    """The mean input times what the weights lost: `[layers * outputs]`."""
    mean = mean_inputs("correct_bias", path, several)
    inputs = inputs_of(layout, mean.shape[-1], several[0])
    if inputs is None:
        rule, got = "tell the groups of a convolution", "statistics without a Gram matrix"
        fix = "Call jc.calibrate(…, moments=True, gram=True)."
        raise ValueError(_check.message("correct_bias", "stats", rule, got, fix, path=path))
    lost = w.astype(jnp.float32) - new.astype(jnp.float32)
    matrices = inputs.layout.matrices(lost)
    # A channel of a convolution has one mean at all places of the kernel.
    matrices = matrices.reshape((matrices.shape[0], inputs.count, -1, matrices.shape[-1])).sum(2)
    rows = mean.reshape((matrices.shape[0], 1, inputs.count))
    return product(rows, matrices)


def _outputs(layout: Layout) -> int:
    size = 1
    for axis, n in enumerate(layout.shape):
        size *= 1 if axis in layout.axes else n
    return size


def _sibling(path: str, leaves: dict[str, Any], outputs: int) -> str | None:
    head, _, name = path.rpartition("/")
    bias = f"{head}/bias" if head else "bias"
    fits = name != "bias" and bias in leaves and getattr(leaves[bias], "size", None) == outputs
    return bias if fits and jnp.issubdtype(leaves[bias].dtype, jnp.floating) else None


def _require_leaves(biases: Mapping[str, str], leaves: dict[str, Any]) -> None:
    for path in (*biases, *biases.values()):
        if path not in leaves:
            rule, fix = "name leaves of the params", f"They are {sorted(leaves)}."
            raise ValueError(_check.message("correct_bias", "biases", rule, repr(path), fix))
