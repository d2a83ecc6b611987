"""Scales of input features from what they meet: SmoothQuant and AWQ."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress import _check, arrays, tree
from jaxcompress._products import product
from jaxcompress._sharding import automatic
from jaxcompress._types import ArrayLike, PyTree
from jaxcompress.projections import Projection
from jaxcompress.quantization._features import require_projection
from jaxcompress.quantization._rescale import rescaled
from jaxcompress.solvers import Inputs, gram_of, inputs_of, with_statistics
from jaxcompress.tracing import Statistics

# Scales beyond are of features that hardly exist: their inverse would leave narrow dtypes.
_LARGEST = 1e4


def smoothed(
    projection: Projection,
    params: PyTree,
    stats: Mapping[str, Statistics],
    strength: ArrayLike = 0.5,
    *,
    where: tree.Where | None = None,
) -> Projection:
    r"""SmoothQuant: outliers of activations move into the weights, where they do less harm.

    .. math:: x W = (x\,S^{-1})\,(S W), \qquad
        s_j = \frac{\max |x_j|^{\alpha}}{\max |W_j|^{1 - \alpha}}

    for input feature j, over all tokens and over all outputs. For weights and activations
    that are both rounded to integers: `jc.lift(fn, activations="dynamic")`.

    Args:
        projection: any, as `jc.quantize(8)`.
        params: any pytree of dense parameters, the ones to be compressed.
        stats: from `jc.calibrate(fn, params, batches, ranges=jc.observers.absmax(per="channel"))`.
        strength: :math:`\alpha` in [0, 1]: 0 makes all weights equally large, 1 all
            activations. May be traced.
        where: static. Which leaves get scales, as in `jc.masked`; None: all that have
            statistics of sites that use them whole and in one way. Others stay unscaled.

    Returns:
        `jc.quantization.rescaled(projection, scales)`. Each leaf has scales of its own, also
        where several (query, key, value) meet the same activations: they are divided in each
        product, so nothing is shared and nothing else in the model changes. Features that were
        always zero, whose weights are all zero, or that held a NaN or an infinity get 1, and
        scales stay within 1e-4 and 1e4. The features of a convolution are its input channels,
        for all groups the same; a depthwise one has no scales.

    Raises:
        TypeError: `projection` is no `Projection`, a value of `stats` is no `Statistics`.
        ValueError: `strength` out of range; statistics without a range of each feature; with
            `where`: a leaf without statistics, or used in several ways.

    Cost: one pass over the weights.

    Examples:
        >>> fn = lambda p, x: x @ p["w"]
        >>> params = {"w": jnp.array([[1.0, 0.5], [2.0, -1.0]])}
        >>> x = jnp.array([[100.0, 2.0]])
        >>> ranges = jc.observers.absmax(per="channel")
        >>> stats = jc.calibrate(fn, params, [x], ranges=ranges)
        >>> p = jc.quantization.smoothed(jc.quantize(8), params, stats)
        >>> p.find(params).by_path["w"]
        Array([[10.],
               [ 1.]], dtype=float32)

    Source: Xiao et al. 2022, arXiv:2211.10438, equation 4. Differs: the activations are divided
    where they are used, not in the norm before, so every linear layer of any model is smoothed.
    """
    require_projection("smoothed", projection)
    _check.number("smoothed", "strength", strength, 0, 1)
    alpha = jnp.asarray(strength, jnp.float32)
    scales = {}
    for path, (w, layout, several) in with_statistics("smoothed", params, stats, where).items():
        largest = [_largest_inputs(path, one) for one in several]
        inputs = inputs_of(layout, largest[0].shape[-1], several[0])
        if inputs is None or not inputs.axes:
            continue
        x = inputs.placed(_over_groups(jnp.max(jnp.stack(largest), axis=0), inputs, jnp.max))
        smooth = functools.partial(_smooth, others=inputs.others())
        scales[path] = automatic(smooth, w, x, alpha, like_first=False)
    return rescaled(projection, scales)


def _smooth(w: jax.Array, x: jax.Array, alpha: jax.Array, others: tuple[int, ...]) -> jax.Array:
    w = jnp.max(jnp.abs(w.astype(jnp.float32)), axis=others, keepdims=True, initial=0.0)
    sound = (x > 0) & (w > 0) & jnp.isfinite(x) & jnp.isfinite(w)
    x, w = (jnp.where(sound, each, 1.0) for each in (x, w))
    return _bounded(alpha * jnp.log(x) - (1 - alpha) * jnp.log(w))


def _bounded(logarithm: jax.Array) -> jax.Array:
    return jnp.clip(jnp.exp(logarithm), 1 / _LARGEST, _LARGEST)


def _largest_inputs(path: str, one: Statistics) -> jax.Array:
    if one.high.ndim != one.stacked + 1:
        rule, got = "hold the range of each feature", "one range for all"
        fix = "Call jc.calibrate(…, ranges=jc.observers.absmax(per='channel'))."
        raise ValueError(_check.message("smoothed", "stats", rule, got, fix, path=path))
    return jnp.maximum(jnp.abs(one.low), jnp.abs(one.high)).astype(jnp.float32)


def _over_groups(values: jax.Array, inputs: Inputs, reduce: Any) -> jax.Array:
    """One value for the features of all groups: `[*layers, channels]`."""
    lead = values.shape[: inputs.layout.stacked]
    return reduce(values.reshape((*lead, inputs.groups, inputs.count)), axis=-2)


def awq(
    projection: Projection,
    params: PyTree,
    stats: Mapping[str, Statistics],
    *,
    candidates: int = 20,
    where: tree.Where | None = None,
) -> Projection:
    r"""AWQ: weights that meet large activations get finer steps, as far as the outputs gain.

    .. math:: s_j = \frac{r_j^{\alpha}}{\sqrt{\max r^\alpha \min r^\alpha}}, \qquad
        \min_{\alpha}\; \operatorname{tr}\left((W'_\alpha - W)^\top X^\top X\,
        (W'_\alpha - W)\right)

    where :math:`r_j` is the root mean square of input feature j and :math:`W'_\alpha` what
    `rescaled(projection, s)` makes of W. The exponent is searched for each leaf by itself.

    Args:
        projection: any, as `jc.quantize(4, group_size=128)`.
        params: any pytree of dense parameters, the ones to be compressed.
        stats: from `jc.calibrate(fn, params, batches, gram=True)`.
        candidates: static. How many exponents are tried, evenly spaced from 0 on, below 1. The
            first is that of `projection` itself, than which the outputs of a layer are never
            worse on the calibration data; of equally good ones the smallest is taken.
        where: static. Which leaves get scales, as for `smoothed`.

    Returns:
        `jc.quantization.rescaled(projection, scales)`. As for `smoothed` each leaf has scales of
        its own. Features that were always zero get 1, and scales stay within 1e-4 and 1e4. A
        leaf with a NaN, or one whose inputs were all zero, is not scaled.

    Raises:
        TypeError: `projection` is no `Projection`, a value of `stats` is no `Statistics`.
        ValueError: statistics without a Gram matrix, or with one that is not finite; with
            `where`: a leaf without statistics, or used in several ways.

    Cost: `candidates` times a `find`, a `project` and a product with the Gram matrix,
    :math:`O(k^2 n)` for k inputs and n outputs, in one compiled loop over candidates.

    Examples:
        >>> fn = lambda p, x: x @ p["w"]
        >>> params = {"w": jax.random.normal(jax.random.key(0), (8, 8))}
        >>> x = jax.random.normal(jax.random.key(1), (32, 8)) * jnp.exp(jnp.arange(8.0) / 2)
        >>> stats = jc.calibrate(fn, params, [x], gram=True)
        >>> p = jc.quantize(3)
        >>> loss = lambda p: float(jnp.sum((fn(jc.compress(p, params), x) - fn(params, x)) ** 2))
        >>> loss(jc.quantization.awq(p, params, stats)) < loss(p)
        True

    Source: Lin et al. 2023, arXiv:2306.00978, section 3.2, equations 4 and 5. Differs: the size of
    a feature is its root mean square, which the Gram matrix holds, not its mean magnitude;
    the range is left to `projection` (`ranges=jc.quantization.mse()`); the activations are
    divided where they are used, not in the layer before.
    """
    require_projection("awq", projection)
    _check.integer("awq", "candidates", candidates, 1)
    inputs, given = {}, {}
    for path, (_, layout, several) in with_statistics("awq", params, stats, where).items():
        grouped = several[0].gram is not None and _is_conv(several[0])
        gram = gram_of("awq", path, several, layout)
        found = _conv_inputs(layout) if grouped else Inputs(layout, layout.axes, 1)
        if found is not None:
            inputs[path], given[path] = found, gram
    leaves, treedef = jax.tree.flatten(params, is_leaf=tree.is_array_like)
    # A module may hold functions, which jit does not take.
    at = [i for i, x in enumerate(leaves) if hasattr(x, "dtype")]

    @jax.jit
    def search(held, given):
        whole = list(leaves)
        for i, x in zip(at, held, strict=True):
            whole[i] = x
        return _search(projection, treedef.unflatten(whole), inputs, given, candidates)

    return rescaled(projection, search([leaves[i] for i in at], given) if given else {})


def _is_conv(one: Statistics) -> bool:
    return one.gram is not None and one.gram.matrix.ndim == one.stacked + 3


def _conv_inputs(layout: Any) -> Inputs | None:
    """None for a depthwise convolution, whose input features are no axis of the kernel."""
    ones = [n for n in layout.shape[layout.stacked :] if n == 1]
    pointwise = len(layout.axes) == 1 and len(ones) > 1
    return None if ones and not pointwise else Inputs(layout, layout.axes[:1], layout.groups)


def _search(projection, params, inputs, grams, candidates: int) -> dict[str, jax.Array]:
    before = {path: w for path, w in tree.leaves_with_paths(params) if path in inputs}
    logarithms = {path: _log_sizes(inputs[path], gram) for path, gram in grams.items()}

    def scales_at(exponents):
        return {path: _bounded(exponents[path] * x) for path, x in logarithms.items()}

    def errors(exponent):
        p = rescaled(projection, scales_at(dict.fromkeys(inputs, exponent)))
        after = dict(tree.leaves_with_paths(p.project(params, p.find(params))))
        out = {}
        for path, w in before.items():
            change = arrays.todense(after[path]).astype(jnp.float32) - w.astype(jnp.float32)
            e = inputs[path].layout.matrices(change)
            error = jnp.sum(e * product(grams[path], e))
            out[path] = jnp.where(jnp.isnan(error), jnp.inf, error)
        return out

    exponents = jnp.arange(candidates, dtype=jnp.float32) * (1.0 / candidates)
    table = lax.map(errors, exponents)
    return scales_at({path: exponents[jnp.argmin(table[path])] for path in inputs})


def _log_sizes(inputs: Inputs, gram: jax.Array) -> jax.Array:
    """Logarithms of root mean squares about the middle of their range, 0 for dead features."""
    shape, stacked = inputs.layout.shape, inputs.layout.stacked
    squares = jnp.diagonal(gram, axis1=-2, axis2=-1)
    # Of a convolution the places of the kernel are further samples of the same feature.
    lead = [shape[i] for i in range(stacked)]
    squares = squares.reshape((*lead, inputs.layout.groups, inputs.count, -1)).sum((-3, -1))
    live = squares > 0
    logs = 0.5 * jnp.log(jnp.where(live, squares, 1.0))
    low = jnp.min(logs, axis=-1, keepdims=True, where=live, initial=jnp.inf)
    high = jnp.max(logs, axis=-1, keepdims=True, where=live, initial=-jnp.inf)
    middle = jnp.where(low <= high, 0.5 * (low + high), 0.0)
    return inputs.placed(jnp.where(live, logs - middle, 0.0))
