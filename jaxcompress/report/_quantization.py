"""What a quantization did: each leaf with its rule, bits and error, each site with its inputs."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxcompress import _check, arrays, tracing, tree
from jaxcompress._types import PyTree
from jaxcompress.quantization import E2M1, NF4
from jaxcompress.report._leaves import host, paired_leaves
from jaxcompress.report._summary import _escape, _squares

_TABLES = {"nf4": NF4, "fp4": E2M1}


class QuantizedLeaf(NamedTuple):
    """One leaf, or all together.

    Attributes:
        path: as `jaxcompress.tree` writes it; `"total"` for the total.
        shape: of the dense array; None for the total.
        rule: how it is stored: `"int4, groups of 32"`, `"nf4, groups of 64"`, `"float32"`; empty
            for the total.
        parameters: entries of the dense array.
        bits: average stored bits of a parameter, scales and indices included; 0 without entries.
        nbytes: stored bytes.
        before_nbytes: of the dense leaf.
        snr: signal to noise, :math:`10 \\log_{10}(\\sum w^2 / \\sum (\\hat w - w)^2)` in dB;
            infinite where the values are exact. None for an abstract leaf and for integers.
    """

    path: str
    shape: tuple[int, ...] | None
    rule: str
    parameters: int
    bits: float
    nbytes: int
    before_nbytes: int
    snr: float | None


class QuantizedSite(NamedTuple):
    """One site.

    Attributes:
        name: as in `jc.sites`.
        path: of the leaf, or of the leaves, joined by `" + "`.
        op: the primitive.
        rule: of the leaf, or of the leaves.
        quantized: whether the leaf is stored compressed; False: the site is left in float.
        activations: `"int8"` where integers are multiplied, `"simulated"` where they are rounded
            and back, else `"float"`; empty for an embedding, which has none.
    """

    name: str
    path: str
    op: str
    rule: str
    quantized: bool
    activations: str


class Quantization(NamedTuple):
    """The rows, in the order of the leaves and of the program; prints as a table (by rich)."""

    leaves: list[QuantizedLeaf]
    sites: list[QuantizedSite]
    total: QuantizedLeaf

    @property
    def floating(self) -> list[str]:
        """The names of the sites that are left in float."""
        return [site.name for site in self.sites if not site.quantized]

    def __str__(self) -> str:
        from jaxcompress.report._quantization_table import text

        return text(self)

    def __rich__(self) -> Any:
        from jaxcompress.report._quantization_table import table

        return table(self)

    def _repr_html_(self) -> str:
        """Shown by notebooks."""
        return f'<pre style="line-height:1.2">{_escape(str(self))}</pre>'


def quantization(
    fn: Callable[..., PyTree],
    params: PyTree,
    packed: PyTree,
    *args: Any,
    activations: Literal["float", "dynamic"] | Mapping[str, Any] = "float",
    simulated: tree.Where | None = None,
    **kwargs: Any,
) -> Quantization:
    r"""Every leaf and every site of `fn` with how it is quantized, and what is left in float.

    .. math:: \mathrm{SNR} = 10 \log_{10} \frac{\sum w^2}{\sum (\hat w - w)^2}

    Args:
        fn: the dense function `fn(params, *args, **kwargs)`. It is traced, not run.
        params: the dense params, arrays or `jax.ShapeDtypeStruct`s.
        packed: what `jc.pack` gave for them: the same paths and dense shapes.
        *args: further arguments, arrays, `jax.ShapeDtypeStruct`s or static values.
        activations: static. What is passed to `jc.lift`.
        simulated: static. Which sites' activations are rounded by `jc.quantize_activations`: its
            `where`, on the names of sites. None: of no site.
        **kwargs: the same.

    Returns:
        A `Quantization` of plain Python numbers. Biases and norms are leaves without a site.

    Raises:
        ValueError: the trees have other paths or shapes, an option is none of the above, or
            `simulated` matches no site. A rule that matches no leaf is refused before, by
            `jc.masked`, `jc.partition` and the widths by path of `jc.quantize`.
        TypeError: a leaf is traced, or `fn` can't be called.

    Cost: one trace; each leaf is made dense and pulled to the host once, one at a time.

    Examples:
        >>> fn = lambda p, x: jax.nn.relu(x @ p["w1"]) @ p["w2"]
        >>> w1 = (jnp.arange(512.0) % 37 - 18.0).reshape(16, 32)
        >>> params = {"w1": w1, "w2": jnp.ones((32, 4))}
        >>> packed = jc.pack(jc.masked(jc.quantize(8), "w1"), params)
        >>> made = jc.report.quantization(fn, params, packed, jnp.ones((2, 16)))
        >>> made.leaves[0].rule, made.leaves[0].bits, made.floating
        ('int8, per channel', 10.0, ['w2'])
        >>> print(made)
         leaf   shape  stored as          bits    bytes      SNR  site         activations
         ──────────────────────────────────────────────────────────────────────────────────
         w1     16×32  int8, per channel    10    640 B  48.6 dB  dot_general  float
         w2      32×4  float32              32    512 B    exact  dot_general  float
         ──────────────────────────────────────────────────────────────────────────────────
         total                            14.4  1.15 kB  48.6 dB
        left in float: w2
    """
    if not (
        activations in ("float", "dynamic")
        if isinstance(activations, str)
        else isinstance(activations, Mapping)
    ):
        rule, got = "be 'float', 'dynamic' or ranges by site name", _check.describe(activations)
        raise ValueError(_check.message("quantization", "activations", rule, got))
    sites = tracing.sites(fn, params, *args, **kwargs)
    pairs = paired_leaves("quantization", params, packed)
    stored = {path: after for path, _, after in pairs}
    leaves, sums = [], []
    for path, before, after in pairs:
        row, noise = _leaf(path, before, after)
        leaves.append(row)
        sums.append(noise)
    rounded: PyTree = {}
    if simulated is not None:
        names = {site.name: np.zeros(()) for site in sites if site.op != "gather"}
        rounded = tree.select(names, simulated, function="quantization")
    made = []
    for site in sites:
        used = [stored.get(path) for path in site.path.split(" + ")]
        given = "float"
        if site.op == "gather":
            given = ""
        elif rounded.get(site.name):
            given = "simulated"
        elif all(_integer(site, leaf, activations) for leaf in used):
            given = "int8"
        rule = " + ".join(dict.fromkeys(rule_of(leaf) for leaf in used))
        compressed = all(map(arrays.is_compressed, used))
        made.append(QuantizedSite(site.name, site.path, site.op, rule, compressed, given))
    return Quantization(leaves, made, _total(leaves, sums))


def rule_of(leaf: Any) -> str:
    """How a leaf is stored, in words: `"int4, groups of 32"`."""
    if leaf is None or not arrays.is_compressed(leaf):
        return "float" if leaf is None else jnp.dtype(leaf.dtype).name
    if isinstance(leaf, arrays.Quantized):
        return ", ".join([_kind(leaf), *_steps(leaf)])
    if isinstance(leaf, arrays.Codebook):
        return f"{_sparse(leaf.codes)}{leaf.values.shape[0]} values"
    if isinstance(leaf, arrays.LowRank):
        return f"rank {leaf.v.shape[0]}"
    if isinstance(leaf, arrays.Sum):
        return " + ".join(rule_of(part) for part in leaf.parts)
    if isinstance(leaf, (arrays.Rescaled, arrays.Rotated)):
        return f"{rule_of(leaf.inner)}, {type(leaf).__name__.lower()}"
    return f"{_sparse(leaf)}{jnp.dtype(leaf.dtype).name}"


def _kind(leaf: arrays.Quantized) -> str:
    """The type of the codes."""
    codes, sparse = leaf.codes, _sparse(leaf.codes)
    if arrays.is_sparse(codes):
        codes = codes.values
    if leaf.binary:
        return f"{sparse}binary"
    if isinstance(codes, arrays.Codebook):
        inside = _sparse(codes.codes)
        values = np.asarray(codes.values)
        for name, known in _TABLES.items():
            if np.array_equal(known.codebook(), values):
                return f"{inside}{name}"
        return f"{inside}table of {len(values)}"
    bits = codes.bits if isinstance(codes, arrays.Packed) else 8
    if jnp.issubdtype(codes.dtype, jnp.floating):
        return f"{sparse}{jnp.dtype(codes.dtype).name}"
    return f"{sparse}{'int' if codes.dtype == jnp.int8 else 'uint'}{bits}"


def _steps(leaf: arrays.Quantized) -> list[str]:
    """What shares a scale, and what is special about the scales."""
    pairs = arrays.group_pairs(leaf.group)
    out = [] if leaf.zero_point is None else ["zero points"]
    if len(pairs) == 1:
        out.append(f"groups of {pairs[0][1]}")
    elif pairs:
        out.append(f"blocks of {'×'.join(str(size) for _, size in pairs)}")
    else:
        out.append("per channel" if math.prod(leaf.scale.shape) > 1 else "one scale")
    if arrays.is_compressed(leaf.scale):
        out.append(f"{rule_of(leaf.scale).partition(',')[0]} scales")
    elif leaf.scale.dtype != jnp.float32:
        out.append(f"{jnp.dtype(leaf.scale.dtype).name} scales")
    return out


def _sparse(x: Any) -> str:
    if isinstance(x, arrays.NM):
        return f"{x.n}:{x.m} sparse "
    return "sparse " if arrays.is_sparse(x) else ""


def _integer(site: tracing.Site, leaf: Any, activations: Any) -> bool:
    """Whether `jc.lift` multiplies integers at a site."""
    if site.op != "dot_general" or activations == "float" or site.axes is None:
        return False
    # What is scaled or rotated along the sum is multiplied as it is inside.
    while isinstance(leaf, (arrays.Rescaled, arrays.Rotated)):
        if isinstance(leaf, arrays.Rescaled):
            along = {d for d, size in enumerate(leaf.scale.shape) if size > 1}
        else:
            along = {leaf.axis}
        if not along <= set(site.axes):
            return False
        leaf = leaf.inner
    coded = isinstance(leaf, arrays.Quantized) and leaf.group is None
    if not coded or not jnp.issubdtype(leaf.codes.dtype, jnp.integer):
        return False
    absent_is_zero = leaf.zero_point is None and not leaf.binary
    if arrays.is_sparse(leaf.codes) and not absent_is_zero:
        return False
    return all(leaf.scale.shape[axis] == 1 for axis in site.axes)


def _leaf(path: str, before: Any, after: Any) -> tuple[QuantizedLeaf, tuple[float, float] | None]:
    parameters, nbytes = math.prod(before.shape), tree.nbytes(after)
    one, two = (host("quantization", path, leaf) for leaf in (before, after))
    noise, snr = (0.0, 0.0), None
    if jnp.issubdtype(before.dtype, jnp.inexact):
        noise = None if one is None or two is None else _squares(one, two)
        snr = None if noise is None else _decibels(*noise)
    row = QuantizedLeaf(
        path=path,
        shape=tuple(before.shape),
        rule=rule_of(after),
        parameters=parameters,
        bits=8 * nbytes / parameters if parameters else 0.0,
        nbytes=nbytes,
        before_nbytes=tree.nbytes(before),
        snr=snr,
    )
    return row, noise


def _total(leaves: list[QuantizedLeaf], sums: list[tuple[float, float] | None]) -> QuantizedLeaf:
    known = [noise for noise in sums if noise is not None]
    snr = None
    if len(known) == len(sums):
        snr = _decibels(sum(square for square, _ in known), sum(norm for _, norm in known))
    parameters, nbytes = (
        sum(getattr(x, name) for x in leaves) for name in ("parameters", "nbytes")
    )
    bits = 8 * nbytes / parameters if parameters else 0.0
    before = sum(leaf.before_nbytes for leaf in leaves)
    return QuantizedLeaf("total", None, "", parameters, bits, nbytes, before, snr)


def _decibels(square: float, norm: float) -> float:
    if math.isnan(square) or math.isnan(norm):
        return math.nan
    if square == 0.0:
        return math.inf
    return 10 * math.log10(norm / square) if norm > 0 else -math.inf
