"""Adapters as latents: LoRA behind ordinary dense parameters."""

import jax
import jax.numpy as jnp

from jaxcompress import arrays, tree
from jaxcompress._types import ArrayLike, PyTree
from jaxcompress.factorization._adapters import Init, adapted, checked, mask_of
from jaxcompress.projections import Reparametrization


def lora(
    rank: ArrayLike,
    *,
    key: jax.Array | None = None,
    alpha: ArrayLike | None = None,
    stabilized: bool = False,
    init: Init = "zero",
    max_rank: int | None = None,
    train_others: bool = False,
    where: tree.Where = tree.is_weight,
) -> Reparametrization:
    r"""Trains a low-rank correction of each weight behind dense parameters: LoRA and PiSSA.

    .. math:: W = W_0 + s\,U V, \qquad s = \alpha / r

    With `jc.reparametrized(opt, lora(…))` neither the model nor the training loop changes. The base
    :math:`W_0` is frozen: the inner optimizer never sees it, so that it decays nothing and holds
    no moments for it.

    Args:
        rank: r, as in `jc.factorization.add_adapters`. May be traced.
        key: a `jax.random.key`, for "zero".
        alpha: :math:`\alpha`; None: s = 1. Read when the latents are made. May be traced.
        stabilized: static. :math:`s = \alpha / \sqrt r`.
        init: static. "zero" or "pissa", as in `add_adapters`.
        max_rank: static. Number of columns; by default `rank` where that is a Python number,
            else the full rank.
        train_others: static. Whether floating-point leaves without an adapter, such as biases and
            norms, are trained as they are; else they are frozen.
        where: static. The leaves to adapt, see `jaxcompress.tree.select`.

    Returns:
        A `Reparametrization` whose latents are the params with `arrays.Sum` at the chosen leaves:
        `jc.latent(opt_state, params)` gives what `jc.lift` runs, `adapter_mask` and
        `split_adapters` read, and `jc.save` writes. (`jc.pack(opt_state, params)` never makes a
        leaf bigger, and a base with an adapter is: it gives dense arrays.)

    Raises:
        ValueError, TypeError: as `add_adapters`.

    Cost: one product of the factors per step, and moments of r (m + n) numbers per leaf in place of
    m n; the memory of a second copy of the params.

    Examples:
        >>> params = {"w": jnp.ones((16, 8)), "b": jnp.zeros(8)}
        >>> r = jc.factorization.lora(2, alpha=4.0, key=jax.random.key(0))
        >>> opt = jc.reparametrized(optax.adamw(1e-3), r)
        >>> state = opt.init(params)
        >>> sum(x.size for x in jax.tree.leaves(state.inner[0].mu))  # 2 (16 + 8) of 136
        48
        >>> grads = {"w": jnp.ones((16, 8)), "b": jnp.ones(8)}
        >>> updates, state = opt.update(grads, state, params)
        >>> params = optax.apply_updates(params, updates)
        >>> bool((params["b"] == 0).all()), jc.latent(state)["w"].parts[1].inner.v.shape
        (True, (2, 8))

    Source: Hu et al. 2021, arXiv:2106.09685; Meng et al. 2024, arXiv:2404.02948; Kalajdzievski
    2023, arXiv:2312.03732.
    """
    adapter = checked("lora", rank, max_rank, alpha, stabilized, init, key)

    def start(params: PyTree) -> PyTree:
        chosen = tree.select(params, where, function="lora")

        def leaf(path, w, is_chosen):
            if is_chosen:
                return adapted("lora", path, jnp.asarray(w), adapter)
            return jnp.asarray(w) if hasattr(w, "dtype") else w

        return tree.map_with_path(leaf, params, chosen)

    def trained(latents: PyTree) -> PyTree:
        def leaf(path, z, mask):
            del path
            others = train_others and not arrays.is_compressed(z)
            floats = hasattr(z, "dtype") and jnp.issubdtype(z.dtype, jnp.floating)
            return True if others and floats else mask

        return tree.map_with_path(leaf, latents, mask_of(latents))

    return Reparametrization(start, arrays.todense, trained)
