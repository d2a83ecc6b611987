"""Learned steps: the grid is trained with the weights, by its own gradient."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import _check, tree
from jaxcompress._types import ArrayLike, PyTree
from jaxcompress.projections import Reparametrization
from jaxcompress.quantization._conventions import Convention, levels
from jaxcompress.quantization._fake import along, whole
from jaxcompress.quantization._grid import Grid

# LSQ's grid: codes from -2^(b-1), and no rule of its own for the step.
_FULL_RANGE = Convention(full_range=True)
_LEAST = float(np.finfo(np.float32).tiny)


def lsq(
    x: jax.Array,
    step: ArrayLike,
    bits: ArrayLike,
    *,
    offset: ArrayLike | None = None,
    signed: bool = True,
    axis: int | None = None,
) -> jax.Array:
    r"""Rounds to a grid whose step is a parameter, with the gradient of LSQ for it.

    .. math:: \hat x = \lfloor \mathrm{clip}((x - \beta) / s, -Q_N, Q_P) \rceil\, s + \beta

    .. math:: \frac{\partial \hat x}{\partial s} = g \cdot
        \begin{cases} \lfloor u \rceil - u & -Q_N < u < Q_P \\ -Q_N & u \le -Q_N \\
        Q_P & u \ge Q_P \end{cases}, \qquad u = \frac{x - \beta}{s}, \quad
        g = \frac{1}{\sqrt{N Q_P}}

    The gradient of `x` is 1 between the ends and 0 elsewhere, that of the offset g elsewhere
    and 0 between the ends. For models that keep their steps among their own parameters;
    `jc.quantization.learned_steps` needs no change to the model.

    Args:
        x: weights or activations, any shape, any float dtype; computed in float32.
        step: :math:`s`, a scalar, an array that broadcasts to `x`, or a vector along `axis`. A
            negative one counts as its magnitude, so that no update can break the grid.
        bits: 1 to 16. May be traced. Signed: :math:`Q_N = 2^{b-1}, Q_P = 2^{b-1} - 1`; at one
            bit :math:`\hat x = s\,\mathrm{sign}(x)` and both are 1.
        offset: :math:`\beta` of LSQ+, shaped as `step`; None: LSQ.
        signed: static. Else :math:`Q_N = 0, Q_P = 2^b - 1`, as after a ReLU.
        axis: static. Of vectors of steps and offsets.

    Returns:
        Shape and dtype of `x`. N is the number of entries that share a step.

    Raises:
        TypeError: `x` is not real floating point; raised while tracing.
        ValueError: `bits` is a number out of range; the shape of a step fits neither `x` nor
            `axis`.

    Cost: one elementwise pass, and in the backward pass one sum per step.

    Examples:
        >>> f = lambda x, s: jc.quantization.lsq(x, s, 2)
        >>> x = jnp.array([0.3, 0.9, -2.7, 0.1])
        >>> f(x, 0.5)
        Array([ 0.5,  0.5, -1. ,  0. ], dtype=float32)
        >>> jax.grad(lambda s: f(x, s).sum())(0.5).round(3)  # (0.4 + 1 - 2 - 0.2) / sqrt(4)
        Array(-0.4, dtype=float32, weak_type=True)

    Source: Esser et al. 2020, arXiv:1902.08153, equations 1 to 3 and section 2.2; the offset
    from Bhalgat et al. 2020, arXiv:2004.09576, equations 4 to 6, with the scale g for both.
    """
    _check.floating("lsq", "x", x)
    _check.number("lsq", "bits", bits, 1, 16)
    x, width = jnp.asarray(x), whole(bits, 1, 16)
    wide = x.astype(jnp.float32)
    step = along("lsq", "step", step, wide, axis)
    shift = None if offset is None else along("lsq", "offset", offset, wide, axis)
    low, high = _ends(width, signed)
    size = _positive(step)
    moved = wide if shift is None else wide - shift
    u = jax.lax.stop_gradient(moved) * (1.0 / jax.lax.stop_gradient(size))
    codes = jnp.clip(jnp.round(u), low, high)
    if signed:
        codes = jnp.where(width == 1, jnp.sign(u), codes)
    value = codes * jax.lax.stop_gradient(size)
    value = value if shift is None else value + jax.lax.stop_gradient(shift)
    return _with_steps(value, wide, size, shift, u, codes, low, high).astype(x.dtype)


def _ends(width: jax.Array, signed: bool) -> tuple[jax.Array, jax.Array]:
    if not signed:
        return jnp.zeros((), jnp.float32), levels(width)
    top = levels(width - 1)
    one = width == 1
    return jnp.where(one, -1.0, -top - 1.0), jnp.where(one, 1.0, top)


def _positive(step: jax.Array) -> jax.Array:
    return jnp.maximum(jnp.abs(step), _LEAST)


def _with_steps(value, x, size, shift, u, codes, low, high) -> jax.Array:
    """`value`, with the gradients of LSQ+ for weights, steps and offsets."""
    inside = (low < u) & (u < high)
    sharing = x.size / max(size.size, 1)
    gain = jax.lax.rsqrt(jnp.maximum(sharing * high, 1.0))
    slope = jnp.where(inside, codes - u, jnp.where(jnp.isnan(u), 0.0, codes)) * gain
    pull = jnp.where(inside, 0.0, gain)
    shift = jnp.zeros((), jnp.float32) if shift is None else shift
    return _linked(value, x, size, shift, inside.astype(jnp.float32), slope, pull)


@jax.custom_jvp
def _linked(value, x, size, shift, inside, slope, pull):
    del x, size, shift, inside, slope, pull
    return value


@_linked.defjvp
def _linked_jvp(primals, tangents):
    value, _, _, _, inside, slope, pull = primals
    _, dx, dsize, dshift, *_ = tangents
    return value, inside * dx + slope * dsize + pull * dshift


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stepped:
    """Weights and the steps of their grid: what `learned_steps` trains in the place of a leaf.

    Attributes:
        weight: the dense weights, of the shape and dtype of the leaf.
        step: float32, of the rank of the leaf; the step in use is its magnitude.
        offset: float32, of the shape of `step`; the value of the code 0, in use rounded to
            whole steps. None for a symmetric grid.
        bits: static. Their width where it was a Python number, else None.
    """

    weight: jax.Array
    step: jax.Array
    offset: jax.Array | None
    bits: int | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the leaf."""
        return self.weight.shape

    @property
    def dtype(self) -> np.dtype:
        """That of the leaf."""
        return self.weight.dtype

    @property
    def nbytes(self) -> int:
        """Of the weights, the steps and the offsets."""
        return tree.nbytes([self.weight, self.step, self.offset])

    def grid(self, bits: ArrayLike | None = None) -> Grid:
        """The grid in force, for `bits` where they were not static."""
        bits = self.bits if bits is None else bits
        if bits is None:
            rule, got = "be given where it was traced in learned_steps", "None"
            raise ValueError(_check.message("grid", "bits", rule, got))
        width, size = whole(bits, 1, 8), _positive(self.step)
        if self.offset is None:
            return Grid(size, None, width, convention=_FULL_RANGE)
        zero_point = jnp.clip(jnp.round(-self.offset * (1.0 / size)), 0.0, levels(width))
        return Grid(size, zero_point, width)

    def todense(self) -> jax.Array:
        """The weights on their grid."""
        return self.at(self.bits)

    def at(self, bits: ArrayLike | None) -> jax.Array:
        """The weights on their grid of that many bits, with the gradients of LSQ+."""
        grid = jax.lax.stop_gradient(self.grid(bits))
        wide = self.weight.astype(jnp.float32)
        low, high = _ends(grid.bits, self.offset is None)
        u = jax.lax.stop_gradient(wide) * (1.0 / grid.scale)
        value = grid.project(jax.lax.stop_gradient(wide))
        if grid.zero_point is None:
            codes = jnp.clip(jnp.round(u), low, high)
            codes = jnp.where(grid.bits == 1, jnp.sign(u), codes)
        else:
            codes = jnp.clip(jnp.round(u) + grid.zero_point, low, high)
            u = u + grid.zero_point
        size = _positive(self.step)
        linked = _with_steps(value, wide, size, self.offset, u, codes, low, high)
        return linked.astype(self.dtype)

    def pack(self, path: str, bits: ArrayLike | None = None) -> Any:
        """Codes and steps: `arrays.Quantized`."""
        return self.grid(bits).pack(self.weight, path)


def learned_steps(
    bits: ArrayLike,
    *,
    axis: int | tuple[int, ...] | None = -1,
    offset: bool = False,
    where: tree.Where = tree.is_weight,
) -> Reparametrization:
    r"""Weights on grids whose steps are trained with them: LSQ with no change to the model.

    .. math:: w = \lfloor \mathrm{clip}(v / s, -2^{b-1}, 2^{b-1} - 1) \rceil\, s, \qquad
        s_0 = 2\,\overline{|v|} / \sqrt{2^{b-1} - 1}

    The latents are the dense weights v and the steps s; gradients are those of
    `jc.quantization.lsq`. Inside of `jc.reparametrized` the params are on the grid after every
    update, to the last bit in all dtypes.

    Args:
        bits: b, 1 to 8. May be traced.
        axis: static. One step for each index of this axis or these axes (the default is the
            output channel of Flax's layouts); None: one for the whole leaf, as in the paper. A
            leaf with fewer than two dimensions has one.
        offset: static. Whether an offset is trained too, as in LSQ+. Here it is rounded to whole
            steps with zero on the grid, so that sparse leaves stay sparse and it packs as a
            zero point. It starts where the grid is the one without.
        where: static. The leaves to quantize, see `jaxcompress.tree.select`.

    Returns:
        A `Reparametrization` whose latents have `Stepped(weight, step, offset)` at the chosen
        leaves. `jc.quantization.label_latents` tells steps from weights for `optax.partition`;
        `jc.quantization.pack_latents(jc.latent(opt_state))` gives `arrays.Quantized`. A step
        counts as its magnitude: it stays positive at any learning rate.

    Raises:
        ValueError: `bits` is a number outside of [1, 8]; no leaf is chosen; a leaf does not have
            the axis.
        TypeError: a chosen leaf is not real floating point; `bits` is a schedule.

    Cost: one elementwise pass and one sum per step; the memory of the dense weights.

    Examples:
        >>> r = jc.quantization.learned_steps(2)
        >>> inner = optax.partition(
        ...     {"weights": optax.adam(1e-3), "grid": optax.adam(1e-4)},
        ...     jc.quantization.label_latents,
        ... )
        >>> opt = jc.reparametrized(inner, r)
        >>> params = {"w": jnp.array([[1.0, -0.5], [0.25, 0.125]])}
        >>> state = opt.init(params)
        >>> updates, state = opt.update({"w": jnp.ones((2, 2))}, state, params)
        >>> optax.apply_updates(params, updates)["w"].round(2)
        Array([[ 1.25, -0.63],
               [ 0.  ,  0.  ]], dtype=float32)
        >>> jc.quantization.pack_latents(jc.latent(state))["w"].codes
        Packed(int8[2, 2], bits=2, nbytes=2)

    Source: Esser et al. 2020, arXiv:1902.08153; Bhalgat et al. 2020, arXiv:2004.09576. Differs:
    one step per channel by default, and the offset in whole steps.
    """
    if callable(bits):
        rule, got = "be a number", "a schedule"
        raise TypeError(
            _check.message("learned_steps", "bits", rule, got, "Latents have one width.")
        )
    _check.number("learned_steps", "bits", bits, 1, 8)
    for each in axis if isinstance(axis, tuple) else () if axis is None else (axis,):
        _check.integer("learned_steps", "axis", each, -64)
    static = int(bits) if isinstance(bits, (int, np.integer)) else None

    def init(params: PyTree) -> PyTree:
        chosen = tree.select(params, where, function="learned_steps")

        def leaf(path, w, is_chosen):
            if not is_chosen:
                return jnp.asarray(w) if hasattr(w, "dtype") else w
            _check.floating("learned_steps", "params", w, path)
            w = jnp.asarray(w)
            own = set()
            if axis is not None and w.ndim > 1:
                wanted = axis if isinstance(axis, tuple) else (axis,)
                own = {_check.axis("learned_steps", "axis", a, w.ndim, path) for a in wanted}
            shared = tuple(a for a in range(w.ndim) if a not in own)
            step, beta = _first_steps(w, shared, whole(bits, 1, 8))
            return Stepped(w, step, beta if offset else None, static)

        return tree.map_with_path(leaf, params, chosen)

    def apply(latents: PyTree) -> PyTree:
        return tree.map_with_path(lambda _, z: z.at(bits) if isinstance(z, Stepped) else z, latents)

    return Reparametrization(init, apply)


def _first_steps(
    w: jax.Array, shared: tuple[int, ...], width: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The steps of LSQ before training, and the offsets at which the grid is the signed one."""
    x = w.astype(jnp.float32)
    finite = jnp.isfinite(x)
    number = max(math.prod(w.shape[a] for a in shared), 1)
    total = jnp.sum(jnp.where(finite, jnp.abs(x), 0.0), shared, keepdims=True)
    low, high = _ends(width, True)
    step = total * (1.0 / number) * (2.0 * jax.lax.rsqrt(high))
    step = jnp.where(width == 1, 0.5 * step, step)  # one bit: the mean magnitude
    step = jnp.where(step > 0, step, 1.0)
    return step, low * step
