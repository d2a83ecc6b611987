"""Hadamard matrices of any known order, and their fast product."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import _check
from jaxcompress._dtypes import wide

# The factor that is no power of two is multiplied as a matrix; larger ones are not looked for.
_LARGEST_FACTOR = 512
# Powers of two in steps of this size: on CPU faster than steps of two, the passes count.
_RADIX = 16


def hadamard(
    x: jax.Array, *, axis: int = -1, order: int | None = None, transpose: bool = False
) -> jax.Array:
    r"""The orthonormal Hadamard transform along one axis.

    .. math:: y = \frac{1}{\sqrt b} H_b\, x, \qquad H_b H_b^\top = b I, \quad H_b \in \{\pm 1\}

    for each run of b entries. :math:`H_b = H_2 \otimes \cdots \otimes H_2 \otimes H_m`, where the
    core :math:`H_m` is Paley's, of order m = 1, 12, 20, 28, 36, … up to 512: one more than a
    prime power that leaves 3 when divided by 4, or twice one more than one that leaves 1.

    Args:
        x: any shape, real floating point; computed in float32 or wider.
        axis: static. Along which.
        order: static. b, which must divide the size of the axis and be a known order (see
            `jc.arrays.hadamard_order`); None: the largest there is, the whole axis for every
            power of two, and for most multiples of 4.
        transpose: static. Multiply by :math:`H_b^\top`, the inverse.

    Returns:
        Shape and dtype of `x`. For a power of two this is Sylvester's matrix, as of
        `scipy.linalg.hadamard`, over the root of b.

    Raises:
        TypeError: `x` is not real floating point.
        ValueError: an axis that `x` does not have, or an `order` that is not possible.

    Cost: :math:`n (16 \log_{16}(b/m) + m)` multiplications and additions of n entries, where a
    matrix product takes :math:`n\,b`.

    Examples:
        >>> jc.arrays.hadamard(jnp.array([1.0, 0.0, 0.0, 0.0]))
        Array([0.5, 0.5, 0.5, 0.5], dtype=float32)

    Source: Paley 1933, "On orthogonal matrices"; Sylvester 1867. As an outlier-spreading
    transform of weights: Tseng et al. 2024, arXiv:2402.04396, section 3.
    """
    _check.floating("hadamard", "x", x)
    axis = _check.axis("hadamard", "axis", axis, len(x.shape))
    length = x.shape[axis]
    if order is None:
        order = hadamard_order(length)
    _check.integer("hadamard", "order", order, 1)
    if length % order or _core(order) is None:
        rule = f"divide the {length} entries of the axis and be a known order"
        fix = f"The largest is {hadamard_order(length)}."
        raise ValueError(_check.message("hadamard", "order", rule, order, fix))
    y = jnp.moveaxis(wide(x), axis, -1)
    shape, rest, lead = y.shape, order, y.size // order
    for factor in _factors(order):
        size = factor.shape[0]
        matrix = jnp.asarray(factor.T if transpose else factor, y.dtype)
        rest //= size
        y = jnp.einsum(
            "lar,ba->lbr",
            y.reshape((lead, size, rest)),
            matrix,
            precision=jax.lax.Precision.HIGHEST,
        )
        lead *= size
    y = y.reshape(shape) * np.asarray(1 / math.sqrt(order), y.dtype)
    return jnp.moveaxis(y, -1, axis).astype(x.dtype)


def hadamard_order(length: int) -> int:
    """The largest known order of a Hadamard matrix that divides `length`.

    Args:
        length: static. At least 0.

    Returns:
        `length` itself where it is a power of two, or one times 12, 20, 28, 36, 44, … For an odd
        one 1: then `hadamard` changes nothing. 1 for 0.

    Examples:
        >>> [jc.arrays.hadamard_order(n) for n in (4096, 1536, 11008, 100, 30, 7)]
        [4096, 1536, 11008, 100, 2, 1]
    """
    _check.integer("hadamard_order", "length", length, 0)
    divisors = (length // d for d in range(1, length + 1) if length % d == 0)
    return next((b for b in divisors if _core(b) is not None), 1)


@functools.lru_cache
def _core(order: int) -> int | None:
    """The smallest m with `order / m` a power of two for which a matrix is known; else None."""
    twos = order & -order
    m = order // twos
    if m == 1:
        return 1
    while m <= min(order, _LARGEST_FACTOR):
        if _paley(m) is not None:
            return m
        m *= 2
        if order % m:
            return None
    return None


def _factors(order: int) -> list[np.ndarray]:
    """Matrices whose Kronecker product is the one of that order."""
    core = _core(order)
    assert core is not None
    left, factors = order // core, []
    while left > 1:
        size = min(left, _RADIX)
        factors.append(_sylvester(size))
        left //= size
    matrix = None if core == 1 else _paley(core)
    return factors if matrix is None else [*factors, matrix]


def _sylvester(size: int) -> np.ndarray:
    h = np.ones((1, 1), np.int8)
    while len(h) < size:
        h = np.block([[h, h], [h, -h]])
    return h


@functools.lru_cache
def _paley(order: int) -> np.ndarray | None:
    """Paley's matrix of that order, of his first kind or his second; None without one."""
    if order % 4:
        return None
    if _prime_power(order - 1):
        q = _characters(order - 1)
        skew = np.block([[0, np.ones((1, len(q)))], [-np.ones((len(q), 1)), q]])
        return (skew + np.eye(order)).astype(np.int8)
    if order // 2 % 4 == 2 and _prime_power(order // 2 - 1):
        q = _characters(order // 2 - 1)
        conference = np.block([[0, np.ones((1, len(q)))], [np.ones((len(q), 1)), q]])
        twice = np.kron(conference, [[1, 1], [1, -1]])
        return (twice + np.kron(np.eye(order // 2), [[1, -1], [-1, -1]])).astype(np.int8)
    return None


def _prime_power(q: int) -> tuple[int, int] | None:
    """`(p, k)` with `q = p**k`, k at most 3; else None."""
    for k in (1, 2, 3):
        p = round(q ** (1 / k))
        if p**k == q and p > 1 and all(p % d for d in range(2, math.isqrt(p) + 1)):
            return p, k
    return None


def _characters(q: int) -> np.ndarray:
    """For each pair of elements of the field of q whether their difference is a square.

    1 for squares, -1 for others, 0 for zero. Elements are polynomials of degree below k over
    the integers modulo p; up to degree 3 one without a root is irreducible.
    """
    power = _prime_power(q)
    assert power is not None
    p, k = power
    elements = np.array(list(itertools.product(range(p), repeat=k)))
    places = p ** np.arange(k)[::-1]
    x = np.arange(p)

    def has_root(tail):
        return ((x**k - sum(c * x**i for i, c in enumerate(tail))) % p == 0).any()

    # t**k as a polynomial of lower degree; the lowest coefficient comes first.
    tails = itertools.product(range(p), repeat=k)
    tail = next((t for t in tails if not has_root(t)), (0,)) if k > 1 else (0,)
    products = np.zeros((q, 2 * k - 1), np.int64)
    for i, j in itertools.product(range(k), repeat=2):
        products[:, i + j] += elements[:, i] * elements[:, j]
    for degree in range(2 * k - 2, k - 1, -1):
        for i, c in enumerate(tail):
            products[:, degree - k + i] += c * products[:, degree]
    squares = products[:, :k] % p @ places
    character = np.full(q, -1)
    character[squares] = 1
    character[0] = 0
    return character[(elements[:, None] - elements[None, :]) % p @ places]
