"""Trained latents: which of them describe a grid, and what they pack to."""

import dataclasses
from typing import Any

import jax

from jaxcompress import _check, tree
from jaxcompress._types import ArrayLike, PyTree
from jaxcompress.quantization._learned import Stepped


def label_latents(latents: PyTree) -> PyTree:
    """Which latents are weights and which describe their grid, for `optax.partition`.

    Args:
        latents: those of `jc.quantization.learned_steps` or `learned_codebook`.

    Returns:
        The structure of `latents` with "grid" at steps, offsets and codebooks, and "weights" at
        all else.

    Examples:
        >>> latents = jc.quantization.learned_steps(4).init({"w": jnp.ones((2, 2))})
        >>> labels = jc.quantization.label_latents(latents)["w"]
        >>> labels.weight, labels.step
        ('weights', 'grid')
    """

    def leaf(path, z):
        del path
        fields = ("step", "offset") if isinstance(z, Stepped) else ("values",)
        labels = jax.tree.map(lambda _: "weights", z)
        if not _is_learned(z):
            return labels
        kept = {f: jax.tree.map(lambda _: "grid", getattr(z, f)) for f in fields}
        return dataclasses.replace(labels, **kept)

    return tree.map_with_path(leaf, latents)


def pack_latents(latents: PyTree, *, bits: ArrayLike | None = None) -> PyTree:
    """Really smaller arrays from trained latents, of which `todense` gives the params exactly.

    Args:
        latents: `jc.latent(opt_state)` of `jc.reparametrized` with
            `jc.quantization.learned_steps` or `learned_codebook`.
        bits: those given to `learned_steps`, where they were traced; concrete here.

    Returns:
        The structure of the params with `arrays.Quantized` or `arrays.Codebook` at the chosen
        leaves. A leaf whose packed form would be bigger is dense.

    Raises:
        TypeError: called under `jit`, `vmap` or `grad`: packed shapes depend on values.
        ValueError: `bits` are missing; a weight is NaN.

    Examples:
        >>> w = jnp.linspace(-1.0, 1.0, 256).reshape(16, 16)
        >>> latents = jc.quantization.learned_steps(4).init({"w": w})
        >>> w.nbytes, jc.quantization.pack_latents(latents)["w"].nbytes
        (1024, 192)
    """

    def leaf(path, z):
        if not _is_learned(z):
            return z
        if any(_check.is_traced(x) for x in jax.tree.leaves(z)):
            rule, fix = (
                "be concrete, since packed shapes depend on values",
                "Call it outside of jit.",
            )
            got = "a traced leaf"
            raise TypeError(_check.message("pack_latents", "latents", rule, got, fix, path=path))
        packed = z.pack(path, bits)
        if packed.nbytes < tree.nbytes(z.todense() if bits is None else z.at(bits)):
            return packed
        return packed.todense()

    return tree.map_with_path(leaf, latents)


def _is_learned(z: Any) -> bool:
    return tree.is_array_like(z) and hasattr(type(z), "at") and hasattr(type(z), "pack")
