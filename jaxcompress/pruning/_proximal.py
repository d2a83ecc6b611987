"""Proximal operators of penalties that make weights exactly zero, for `jc.proximal`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxcompress import _check
from jaxcompress._dtypes import wide
from jaxcompress._sharding import place_like
from jaxcompress._types import ArrayLike
from jaxcompress.pruning._groups import Groups
from jaxcompress.pruning._nm import keep_n_of_m


def soft_threshold(w: jax.Array, strength: ArrayLike) -> jax.Array:
    r"""The proximal operator of the L1 norm: shrinks every weight, small ones to zero.

    .. math:: w \mapsto \mathrm{sign}(w)\,\max(|w| - s, 0)

    Args:
        w: weights, any shape, any float dtype; narrow ones are computed in float32.
        strength: :math:`s`, at least 0. May be traced: below 0 it then counts as 0.

    Returns:
        Shape and dtype of `w`; zero exactly where `|w| <= s`. NaN stays NaN. Its gradient
        with respect to `w` is 1 where the weight lives and 0 where not.

    Raises:
        TypeError: `w` is not real floating point; raised while tracing.
        ValueError: `strength` is a number below 0.

    Cost: one elementwise pass.

    Examples:
        >>> jc.pruning.soft_threshold(jnp.array([3.0, -1.0, 0.5]), 1.0)
        Array([2., 0., 0.], dtype=float32)

    Source: Daubechies et al. 2003, arXiv:math/0307152, equation 1.9.
    """
    x, s = _checked("soft_threshold", w, strength)
    return jnp.where(jnp.abs(x) <= s, jnp.zeros_like(x), x - jnp.sign(x) * s).astype(w.dtype)


def hard_threshold(w: jax.Array, strength: ArrayLike) -> jax.Array:
    r"""The proximal operator of the number of nonzero weights (L0).

    .. math:: w \mapsto w\,[\,|w| > \sqrt{2 s}\,]

    Args:
        w: weights, any shape, any float dtype.
        strength: :math:`s`, at least 0. May be traced: below 0 it then counts as 0.

    Returns:
        Shape and dtype of `w`; each entry is that of `w` or exactly zero. NaN stays NaN. No
        gradient reaches `strength`.

    Raises:
        TypeError: `w` is not real floating point; raised while tracing.
        ValueError: `strength` is a number below 0.

    Cost: one elementwise pass.

    Examples:
        >>> jc.pruning.hard_threshold(jnp.array([3.0, -1.0, 1.5]), 0.5)
        Array([3. , 0. , 1.5], dtype=float32)

    Source: Blumensath & Davies 2008, arXiv:0805.0510 (iterative hard thresholding).
    """
    x, s = _checked("hard_threshold", w, strength)
    return jnp.where(jnp.abs(x) <= jnp.sqrt(2 * s), jnp.zeros_like(x), x).astype(w.dtype)


def group_lasso(groups: Groups, *, by_size: bool = True) -> Callable[..., jax.Array]:
    r"""The proximal operator of the group lasso: whole groups become zero.

    .. math:: \Omega(w) = \sum_g \sqrt{n_g}\,\|w_g\|_2, \qquad
        w_g \mapsto w_g\,\max\left(0,\; 1 - s \sqrt{n_g} / \|w_g\|_2\right)

    Args:
        groups: static. As in `jc.prune`: `jc.pruning.slices(-1)` for the output channels of
            Flax kernels, `jc.pruning.blocks(4, 4)`, `jc.pruning.heads(-1, size=64)`. Its norm
            is not used.
        by_size: static. Whether the penalty of a group has the factor :math:`\sqrt{n_g}`, by
            which groups of all sizes, of all leaves, fall at the same mean square.

    Returns:
        An operator `(w, strength, path="") -> w` for `jc.proximal`: shape and dtype of `w`,
        computed in float32 or wider. A NaN makes its group NaN. The gradient is finite, also
        at a group of zeros.

    Raises:
        TypeError: `groups` is not a `Groups`; a leaf is not real floating point.
        ValueError: a leaf has no such axes; raised while tracing.

    Cost: one reduction and one elementwise pass.

    Examples:
        >>> shrink = jc.pruning.group_lasso(jc.pruning.slices(-1))
        >>> shrink(jnp.array([[3.0, 0.5], [4.0, 0.5]]), 1 / jnp.sqrt(2.0)).round(3)
        Array([[2.4, 0. ],
               [3.2, 0. ]], dtype=float32)
        >>> opt = optax.chain(optax.sgd(0.1), jc.proximal(shrink, 1e-3))

    Source: Yuan & Lin 2006, "Model selection and estimation in regression with grouped
    variables"; in networks Wen et al. 2016, arXiv:1608.03665, and Scardapane et al. 2016,
    arXiv:1607.00485.
    """
    if not isinstance(groups, Groups):
        rule, fix = "be a Groups", "Make one with jc.pruning.slices, blocks, heads or whole."
        got = _check.describe(groups)
        raise TypeError(_check.message("group_lasso", "groups", rule, got, fix))
    lengths = Groups(groups.block, _length)

    def operator(w, strength, path=""):
        x, s = _checked("group_lasso", w, strength, path or None)
        norms = lengths.reduce(path, x)
        if by_size:
            s = s * jnp.sqrt(jnp.asarray(groups.sizes(path, w.shape), norms.dtype))
        gone = norms <= s
        factor = jnp.where(gone, jnp.zeros_like(norms), 1 - s / jnp.where(gone, 1, norms))
        spread = place_like(groups.expand(path, factor, w.shape), w)
        return (x * spread).astype(w.dtype)

    return operator


def n_of_m(n: jax.Array | int, *, m: int, axis: int = -2) -> Callable[..., jax.Array]:
    r"""The proximal operator of a soft N:M penalty: what is not among the n largest shrinks.

    .. math:: \Omega(w) = \sum_{\text{groups}} \sum_{i > n} |w|_{(i)}, \qquad
        |w|_{(1)} \ge |w|_{(2)} \ge \dots \ge |w|_{(m)}

    The penalty is zero exactly on N:M weights. With a growing strength the leaf moves from
    dense to N:M, while weights can still change places: at the end `jc.prune(nm=(n, m))`
    changes nothing.

    Args:
        n: how many in each group are free. May be traced.
        m: static. Length of a group; the last group may be shorter.
        axis: static. The axis along which groups run; the default as in `jc.prune`. A leaf with
            one dimension has but one.

    Returns:
        An operator `(w, strength, path="") -> w` for `jc.proximal`. The n largest of each
        group are as in `w` (of equal ones the first), the others soft-thresholded. NaN stays
        NaN and counts as small.

    Raises:
        TypeError: a leaf is not real floating point; raised while tracing.
        ValueError: a leaf has no such axis; a number out of its range.

    Cost: m(m - 1) elementwise comparisons.

    Examples:
        >>> shrink = jc.pruning.n_of_m(2, m=4, axis=-1)
        >>> shrink(jnp.array([4.0, -1.0, 3.0, 0.5]), 0.75)
        Array([ 4.  , -0.25,  3.  ,  0.  ], dtype=float32)

    Source: the trimmed lasso of Bertsimas et al. 2017, arXiv:1708.04527, in each group of m;
    that the largest stay free follows since the L1 cost of a weight grows with its size.
    Differs from Kübler et al. 2025, arXiv:2501.18015, whose 2:4 penalty is another one and
    needs a few iterations per group.
    """
    _check.integer("n_of_m", "m", m, 1)
    _check.number("n_of_m", "n", n, 0, m)
    _check.integer("n_of_m", "axis", axis, -64)

    def operator(w, strength, path=""):
        x, s = _checked("n_of_m", w, strength, path or None)
        if w.ndim == 0:
            rule = "have a dimension"
            raise ValueError(
                _check.message("n_of_m", "w", rule, _check.describe(w), path=path or None)
            )
        along = 0 if w.ndim == 1 else _check.axis("n_of_m", "axis", axis, w.ndim, path or None)
        keep = keep_n_of_m(jnp.abs(x), n, m=m, axis=along)
        return jnp.where(keep, x, soft_threshold(x, s)).astype(w.dtype)

    return operator


def _checked(
    function: str, w: jax.Array, strength: ArrayLike, path: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """Both in float32 or wider, of one dtype; a traced strength below 0 counts as 0."""
    _check.floating(function, "w", w, path)
    _check.number(function, "strength", strength, 0)
    x = wide(w)
    s = jnp.asarray(strength).astype(x.dtype)
    return x, jnp.where(s < 0, jnp.zeros_like(s), s)


def _length(x: jax.Array, axes: tuple[int, ...], sizes: jax.Array) -> jax.Array:
    """The 2-norm of each group, without overflow, whose gradient at zero is zero."""
    del sizes
    top = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axes, keepdims=True, initial=0.0))
    safe = jnp.where((top > 0) & jnp.isfinite(top), top, jnp.ones_like(top))
    # The norm is homogeneous: its gradient is right with the scale held constant.
    squares = jnp.sum(jnp.square(x / safe), axes)
    root = jnp.sqrt(jnp.where(squares == 0, jnp.ones_like(squares), squares))
    return jnp.squeeze(safe, axes) * jnp.where(squares == 0, jnp.zeros_like(squares), root)
