"""The contract table: every public transformation, and how to make one from its numbers.

A new public name goes into one of these tables; `test_contract.py` fails until it does.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcompress as jc
from tests.conftest import lenient


class Row(NamedTuple):
    """One transformation: `make(**knobs)` with traced knobs, and a grid to vmap over."""

    make: Callable[..., Any]
    knobs: dict[str, list[float]]
    # The public names that this row stands for.
    covers: tuple[str, ...]
    # Largest difference of two runs whose sums are ordered differently, relative.
    tolerance: float = 0.0
    # Whether projecting twice is projecting once.
    idempotent: bool = True


def _with_gradients(p):
    """`p` where the contract has none to give: the params themselves."""

    def find(params, *, previous=None, grads=None, step=0):
        return p.find(params, previous=previous, grads=params, step=step)

    return p._replace(find=find)


def _statistics():
    """Of the activations of both layers, as `jc.calibrate` gives them; concrete under any trace."""
    stats = {}
    for path, features in (("a/kernel", 16), ("b/kernel", 8)):
        x = np.random.default_rng(features).normal(size=(20, features))
        x = (x * np.exp(np.arange(features) % 3)).astype(np.float32)
        gram = jc.tracing.observers.Gram(np.float32(20), x.T @ x)
        stats[path] = jc.tracing.Statistics(x.min(0), x.max(0), gram=gram, axes=(0,))
    return stats


def _dependencies():
    """Of a function that sums over the 8 outputs of `a`."""
    members = [
        jc.pruning.Member(path, axis, np.arange(8))
        for path, axis in (("a/bias", 0), ("a/kernel", 1), ("b/kernel", 0))
    ]
    shapes = jax.eval_shape(params)
    return jc.pruning.Dependencies(
        (jc.pruning.Group("a/kernel[1]", 8, tuple(members)),),
        (),
        dict(jc.tree.leaves_with_paths(shapes)),
    )


PROJECTIONS = {
    "prune": Row(
        lambda sparsity=0.6: jc.prune(sparsity), {"sparsity": [0.0, 0.3, 1.0]}, ("prune",)
    ),
    "prune_global": Row(
        lambda sparsity=0.6: jc.prune(sparsity, scope="global"),
        {"sparsity": [0.1, 0.8]},
        ("prune",),
    ),
    "prune_groups": Row(
        lambda sparsity=0.5: jc.pruning.prune_groups(_dependencies(), sparsity),
        {"sparsity": [0.0, 0.3, 1.0]},
        ("prune_groups",),
    ),
    "prune_groups_global": Row(
        lambda sparsity=0.5: jc.pruning.prune_groups(
            _dependencies(),
            sparsity,
            scope="global",
            norm=jc.pruning.l1,
            multiple_of=2,
            floor=0.25,
        ),
        {"sparsity": [0.25, 0.75]},
        ("prune_groups",),
    ),
    "prune_blocks": Row(
        lambda sparsity=0.6: jc.prune(sparsity, groups=jc.pruning.blocks(3, 3)),
        {"sparsity": [0.1, 0.8]},
        ("prune",),
    ),
    "prune_channels": Row(
        lambda sparsity=0.5, floor=0.2: jc.prune(
            sparsity, groups=jc.pruning.slices(-1), scope="global", floor=floor
        ),
        {"sparsity": [0.25, 0.75], "floor": [0.0, 0.25]},
        ("prune",),
    ),
    "prune_outputs": Row(
        lambda sparsity=0.6: jc.prune(sparsity, scope=-1), {"sparsity": [0.1, 0.8]}, ("prune",)
    ),
    "prune_budget": Row(
        lambda sparsity=0.6: jc.prune(sparsity, budget=jc.pruning.erdos_renyi()),
        {"sparsity": [0.1, 0.8]},
        ("prune",),
    ),
    "prune_lamp": Row(
        lambda sparsity=0.6: jc.prune(sparsity, score=jc.pruning.lamp, scope="global"),
        {"sparsity": [0.1, 0.8]},
        ("prune",),
    ),
    "prune_random": Row(
        lambda sparsity=0.6: jc.prune(sparsity, score=jc.pruning.random(jax.random.key(0))),
        {"sparsity": [0.1, 0.8]},
        ("prune",),
    ),
    "rigl": Row(
        lambda sparsity=0.6: _with_gradients(
            jc.pruning.rigl(sparsity, 0.5, key=jax.random.key(0), initial=jc.pruning.magnitude)
        ),
        {"sparsity": [0.1, 0.8]},
        ("rigl",),
    ),
    "from_masks": Row(
        lambda: jc.pruning.from_masks({"a": {"kernel": jnp.arange(128).reshape(16, 8) % 3 == 0}}),
        {},
        ("from_masks",),
    ),
    "as_is": Row(lambda: jc.chain(jc.prune(0.5), jc.pruning.as_is()), {}, ("as_is",)),
    "sparse_evolution": Row(
        lambda sparsity=0.6, drop=0.5: jc.pruning.sparse_evolution(
            sparsity, drop, key=jax.random.key(0)
        ),
        {"sparsity": [0.1, 0.8], "drop": [0.0, 1.0]},
        ("sparse_evolution",),
    ),
    "prune_nm": Row(lambda: jc.prune(nm=(2, 4)), {}, ("prune",)),
    "quantize": Row(lambda bits=4: jc.quantize(bits), {"bits": [1, 3, 8]}, ("quantize",)),
    "quantize_asymmetric": Row(
        lambda bits=4: jc.quantize(bits, axis=None, symmetric=False),
        {"bits": [1, 3, 8]},
        ("quantize",),
    ),
    "quantize_grouped": Row(
        lambda bits=4: jc.quantize(bits, group_size=3), {"bits": [2, 4]}, ("quantize",)
    ),
    "floats": Row(
        lambda clip=1.0: jc.quantization.floats(
            jc.quantization.table([-1.0, -0.3, 0.3, 1.0]), blocks={-2: 3, -1: 4}, clip=clip
        ),
        {"clip": [0.7, 1.0]},
        ("floats",),
    ),
    "fp8": Row(lambda clip=1.0: jc.quantization.fp8(clip=clip), {"clip": [0.7, 1.0]}, ("fp8",)),
    "mx": Row(
        lambda clip=1.0: jc.quantization.mx(block_size=8, clip=clip), {"clip": [0.6, 1.0]}, ("mx",)
    ),
    "nvfp4": Row(
        lambda clip=1.0: jc.quantization.nvfp4(clip=clip), {"clip": [0.7, 1.0]}, ("nvfp4",)
    ),
    "nf4": Row(
        lambda clip=1.0: jc.quantization.nf4(group_size=8, double=True, clip=clip),
        {"clip": [0.7, 1.0]},
        ("nf4",),
    ),
    "hqq": Row(
        lambda bits=4, p=0.7, beta=10.0: jc.quantization.hqq(
            bits, group_size=6, p=p, beta=beta, iterations=3
        ),
        {"bits": [1, 4], "p": [0.5, 1.0], "beta": [2.0, 10.0]},
        ("hqq",),
        tolerance=1e-5,
    ),
    "stochastic": Row(
        lambda bits=4: jc.quantization.stochastic(jc.quantize(bits), key=jax.random.key(0)),
        {"bits": [1, 3, 8]},
        ("stochastic",),
    ),
    "parq": Row(
        lambda inverse_slope=0.0: jc.quantization.parq(jc.quantize(4), inverse_slope),
        {"inverse_slope": [0.0, 0.5, 1.0]},
        ("parq",),
        tolerance=1e-6,
    ),
    "smoothed": Row(
        lambda bits=4, strength=0.5: jc.quantization.smoothed(
            jc.quantize(bits), params(), _statistics(), strength
        ),
        {"bits": [2, 8], "strength": [0.3, 1.0]},
        ("smoothed", "rescaled"),
        tolerance=1e-5,
    ),
    "awq": Row(
        lambda bits=4: jc.quantization.awq(
            jc.quantize(bits, ranges=jc.quantization.min_max),
            params(),
            _statistics(),
            candidates=3,
        ),
        {"bits": [2, 8]},
        ("awq",),
        tolerance=1e-5,
    ),
    "rotated": Row(
        lambda bits=4: jc.quantization.rotated(jc.quantize(bits), jax.random.key(0)),
        {"bits": [2, 8]},
        ("rotated",),
        tolerance=1e-5,
    ),
    "low_rank": Row(
        lambda rank=2: jc.low_rank(rank, max_rank=4),
        {"rank": [0, 1, 3]},
        ("low_rank",),
        tolerance=1e-5,
    ),
    "low_rank_plus": Row(
        lambda rank=2, bits=4: jc.factorization.low_rank_plus(
            jc.quantize(bits), rank, iterations=3, max_rank=4
        ),
        {"rank": [0, 1, 3], "bits": [2, 8]},
        ("low_rank_plus",),
        tolerance=1e-5,
    ),
    "low_rank_plus_sparse": Row(
        lambda rank=1, sparsity=0.6: jc.factorization.low_rank_plus(
            jc.prune(sparsity), rank, iterations=3, max_rank=2
        ),
        {"rank": [0, 2], "sparsity": [0.3, 0.8]},
        ("low_rank_plus",),
        tolerance=1e-5,
    ),
    # Matrices alone here: the laws for kernels are in tests/factorization/test_convolution.py.
    "convolution": Row(
        lambda rank=2: jc.factorization.convolution(rank, max_rank=4),
        {"rank": [0, 1, 3]},
        ("convolution",),
        tolerance=1e-5,
    ),
    "low_rank_energy": Row(
        lambda energy=0.8: jc.low_rank(energy=energy),
        {"energy": [0.5, 1.0]},
        ("low_rank",),
        tolerance=1e-5,
    ),
    "cluster": Row(
        lambda num_values=4: jc.cluster(num_values, max_values=8),
        {"num_values": [1, 4, 8]},
        ("cluster",),
        tolerance=1e-5,
    ),
    "chain": Row(
        lambda sparsity=0.5, bits=4: jc.chain(jc.prune(sparsity), jc.quantize(bits)),
        {"sparsity": [0.25, 0.75], "bits": [2, 8]},
        ("chain",),
    ),
    "masked": Row(
        lambda sparsity=0.5: jc.masked(jc.prune(sparsity), "a/*"),
        {"sparsity": [0.25, 0.75]},
        ("masked",),
    ),
    "partition": Row(
        lambda sparsity=0.5, bits=4: jc.partition(
            {"a/kernel": jc.prune(sparsity), "b/kernel": jc.quantize(bits)}
        ),
        {"sparsity": [0.25, 0.75], "bits": [2, 8]},
        ("partition",),
    ),
    "every": Row(
        lambda sparsity=0.5: jc.every(2, jc.prune(sparsity), begin=0, end=4),
        {"sparsity": [0.25, 0.75]},
        ("every",),
    ),
    "alternated": Row(
        lambda sparsity=0.5: jc.alternated(jc.prune(sparsity), 2, 1, begin=0, end=4),
        {"sparsity": [0.25, 0.75]},
        ("alternated",),
    ),
    "scheduled": Row(
        lambda final=0.9: jc.scheduled(jc.prune)(jc.schedules.cubic(0.5, final, 0, 4)),
        {"final": [0.6, 0.9]},
        ("scheduled",),
    ),
    "relaxed": Row(
        lambda strength=1.0: jc.relaxed(jc.quantize(4), strength),
        {"strength": [0.0, 1.0]},
        ("relaxed",),
    ),
    "relaxed_half": Row(
        lambda strength=0.5: jc.relaxed(jc.prune(0.5), strength),
        {"strength": [0.25, 0.5]},
        ("relaxed",),
        tolerance=1e-6,
        idempotent=False,
    ),
}


def _inner() -> optax.GradientTransformation:
    return lenient(optax.adam(1e-2, eps=1e-3, eps_root=1e-6))


def student(params, x):
    x = x.astype(params["a"]["kernel"].dtype)
    hidden = jax.nn.relu(x @ params["a"]["kernel"] + params["a"]["bias"][None, :])
    return hidden @ params["b"]["kernel"]


def teacher(x):
    return x[:, :4] * 3.0


def _with_another_gradient(link):
    """`link` as the contract calls it: the other gradient is a function of the params."""

    def update(updates, state, params=None, **extra):
        assert params is not None
        other = jax.tree.map(lambda w: -w, params)
        return link.update(updates, state, params, other_grads=[other], **extra)

    return optax.GradientTransformationExtraArgs(link.init, update)


def _hint(hidden, targets, temperature, scale):
    return jnp.mean((hidden.astype(jnp.float32) * scale[None, :] - targets) ** 2) / temperature


def _distilled(**options):
    return optax.chain(jc.distill(student, teacher, **options), _inner())


TRANSFORMATIONS = {
    "projected_groups": Row(
        lambda sparsity=0.5: jc.projected(
            _inner(), jc.every(2, jc.pruning.prune_groups(_dependencies(), sparsity))
        ),
        {"sparsity": [0.25, 0.75]},
        ("projected", "prune_groups"),
        tolerance=1e-5,
    ),
    "movement_groups": Row(
        lambda sparsity=0.5: jc.straight_through(
            _inner(),
            jc.every(
                2,
                jc.pruning.prune_groups(_dependencies(), sparsity, score=jc.pruning.movement()),
            ),
        ),
        {"sparsity": [0.25, 0.75]},
        ("straight_through", "prune_groups"),
        tolerance=1e-5,
    ),
    "proximal_units": Row(
        lambda strength=1e-2, period=2: optax.chain(
            _inner(), jc.pruning.proximal_groups(_dependencies(), strength, period)
        ),
        {"strength": [1e-2, 0.5], "period": [1, 2]},
        ("proximal_groups",),
        tolerance=1e-5,
    ),
    "growing_regularization": Row(
        lambda increase=0.1, period=2, ceiling=0.15: optax.chain(
            jc.pruning.growing_regularization(
                jc.pruning.prune_groups(_dependencies(), 0.5), increase, period, ceiling
            ),
            _inner(),
        ),
        {"increase": [0.1, 1.0], "period": [1, 2], "ceiling": [0.15, 2.0]},
        ("growing_regularization",),
        tolerance=1e-5,
    ),
    "project_params": Row(
        lambda sparsity=0.5: optax.chain(
            _inner(), jc.project_params(jc.every(2, jc.prune(sparsity)))
        ),
        {"sparsity": [0.25, 0.75]},
        ("project_params",),
        tolerance=1e-5,
    ),
    "projected": Row(
        lambda sparsity=0.5: jc.projected(_inner(), jc.every(2, jc.prune(sparsity))),
        {"sparsity": [0.25, 0.75]},
        ("projected",),
        tolerance=1e-5,
    ),
    "projected_low_rank_plus": Row(
        lambda rank=2: jc.projected(
            _inner(),
            jc.every(
                2,
                jc.factorization.low_rank_plus(jc.prune(0.5), rank, iterations=2, max_rank=2),
            ),
        ),
        {"rank": [1, 2]},
        ("projected", "low_rank_plus"),
        tolerance=1e-4,
    ),
    "dynamical_low_rank": Row(
        lambda rank=2: jc.factorization.dynamical_low_rank(_inner(), rank, max_rank=3),
        {"rank": [1, 3]},
        ("dynamical_low_rank",),
        tolerance=1e-4,
    ),
    "dynamical_low_rank_tolerance": Row(
        lambda tolerance=0.3: jc.factorization.dynamical_low_rank(
            _inner(), tolerance=tolerance, max_rank=3
        ),
        {"tolerance": [0.1, 0.4]},
        ("dynamical_low_rank",),
        tolerance=1e-4,
    ),
    "lora": Row(
        lambda rank=2, alpha=4.0: jc.reparametrized(
            _inner(),
            jc.factorization.lora(rank, alpha=alpha, key=jax.random.key(0), max_rank=3),
        ),
        {"rank": [1, 3], "alpha": [0.5, 4.0]},
        ("reparametrized", "lora"),
        tolerance=1e-5,
    ),
    "pissa": Row(
        lambda rank=2: jc.reparametrized(
            _inner(), jc.factorization.lora(rank, init="pissa", max_rank=3, train_others=True)
        ),
        {"rank": [1, 3]},
        ("reparametrized", "lora"),
        tolerance=1e-4,
    ),
    "projected_low_rank": Row(
        lambda rank=2: jc.projected(_inner(), jc.every(2, jc.low_rank(rank, max_rank=4))),
        {"rank": [1, 3]},
        ("projected",),
        tolerance=1e-4,
    ),
    "projected_rigl": Row(
        lambda sparsity=0.5, drop=0.5: jc.projected(
            _inner(), jc.every(2, jc.pruning.rigl(sparsity, drop, key=jax.random.key(0)))
        ),
        {"sparsity": [0.25, 0.75], "drop": [0.2, 0.6]},
        ("projected", "rigl"),
        tolerance=1e-5,
    ),
    "projected_movement": Row(
        lambda sparsity=0.5: jc.projected(
            _inner(), jc.every(2, jc.prune(sparsity, score=jc.pruning.movement()))
        ),
        {"sparsity": [0.25, 0.75]},
        ("projected", "prune"),
        tolerance=1e-5,
    ),
    "top_kast": Row(
        lambda forward=0.75, backward=0.5: jc.pruning.top_kast(_inner(), forward, backward),
        {"forward": [0.6, 0.8], "backward": [0.25, 0.5]},
        ("top_kast",),
        tolerance=1e-5,
    ),
    "straight_through": Row(
        lambda bits=4: jc.straight_through(_inner(), jc.quantize(bits)),
        {"bits": [2, 8]},
        ("straight_through",),
        tolerance=1e-5,
    ),
    "straight_through_decay": Row(
        lambda sparsity=0.5, decay=0.1: jc.straight_through(_inner(), jc.prune(sparsity), decay),
        {"sparsity": [0.25, 0.75], "decay": [0.0, 0.2]},
        ("straight_through",),
        tolerance=1e-5,
    ),
    "restricted": Row(
        lambda sparsity=0.5: jc.restricted(_inner(), jc.every(2, jc.prune(sparsity))),
        {"sparsity": [0.25, 0.75]},
        ("restricted",),
        tolerance=1e-5,
    ),
    "straight_through_chain": Row(
        lambda sparsity=0.5, bits=4: jc.straight_through(
            _inner(), jc.chain(jc.every(2, jc.prune(sparsity)), jc.quantize(bits))
        ),
        {"sparsity": [0.25, 0.75], "bits": [2, 8]},
        ("straight_through",),
        tolerance=1e-5,
    ),
    "reparametrized": Row(
        lambda rank=2: jc.reparametrized(_inner(), jc.low_rank_factors(rank, max_rank=3)),
        {"rank": [1, 3]},
        ("reparametrized", "low_rank_factors"),
        tolerance=1e-4,
    ),
    "proximal": Row(
        lambda strength=1e-2: optax.chain(
            _inner(), jc.proximal(jc.pruning.soft_threshold, strength)
        ),
        {"strength": [0.0, 1e-2, 0.5]},
        ("proximal",),
        tolerance=1e-5,
    ),
    "proximal_groups": Row(
        lambda strength=1e-2, period=2: optax.chain(
            _inner(), jc.proximal(jc.pruning.group_lasso(jc.pruning.slices(-1)), strength, period)
        ),
        {"strength": [1e-2, 0.5], "period": [1, 2]},
        ("proximal",),
        tolerance=1e-5,
    ),
    "nuclear_norm": Row(
        lambda strength=0.1: optax.chain(
            _inner(), jc.proximal(jc.factorization.nuclear_norm, strength)
        ),
        {"strength": [0.0, 0.1]},
        ("proximal",),
        tolerance=1e-5,
    ),
    "rank_threshold": Row(
        lambda strength=0.1: optax.chain(
            _inner(), jc.proximal(jc.factorization.singular_value_hard_threshold, strength)
        ),
        {"strength": [0.0, 0.1]},
        ("proximal",),
        tolerance=1e-5,
    ),
    "galore": Row(
        lambda rank=2, every=2, scale=1.0: jc.factorization.galore(
            _inner(), rank, every, scale, max_rank=3
        ),
        {"rank": [1, 2, 3], "every": [1, 2], "scale": [0.5, 1.0]},
        ("galore",),
        tolerance=1e-5,
    ),
    "powerpropagation": Row(
        lambda power=2.0: jc.reparametrized(_inner(), jc.pruning.powerpropagation(power)),
        {"power": [1.0, 2.5]},
        ("reparametrized", "powerpropagation"),
        tolerance=1e-5,
    ),
    "hard_concrete": Row(
        lambda penalty=1e-3, initial_keep=0.9: jc.pruning.hard_concrete(
            _inner(), penalty, key=jax.random.key(0), initial_keep=initial_keep
        ),
        {"penalty": [0.0, 1e-2], "initial_keep": [0.5, 0.9]},
        ("hard_concrete",),
        tolerance=1e-4,
    ),
    "learned_steps": Row(
        lambda bits=3: jc.reparametrized(_inner(), jc.quantization.learned_steps(bits)),
        {"bits": [2, 8]},
        ("reparametrized", "learned_steps"),
        tolerance=1e-5,
    ),
    "learned_codebook": Row(
        lambda rate=1e-2: jc.reparametrized(
            lenient(optax.adam(rate, eps=1e-3, eps_root=1e-6)),
            jc.quantization.learned_codebook(4),
        ),
        {"rate": [1e-3, 1e-2]},
        ("reparametrized", "learned_codebook"),
        tolerance=1e-5,
    ),
    "round_gradients": Row(
        lambda bits=4: optax.chain(
            jc.quantization.round_gradients(bits, key=jax.random.key(0)), _inner()
        ),
        {"bits": [2, 8]},
        ("round_gradients",),
        tolerance=1e-5,
    ),
    "distill": Row(
        lambda weight=0.5, temperature=2.0: _distilled(weight=weight, temperature=temperature),
        {"weight": [0.0, 1.0], "temperature": [1.0, 4.0]},
        ("distill",),
        tolerance=1e-5,
    ),
    "distill_regressors": Row(
        lambda weight=0.5: _distilled(
            weight=weight, loss=_hint, regressors=jnp.ones(4), regressor_optimizer=_inner()
        ),
        {"weight": [0.1, 1.0]},
        ("distill",),
        tolerance=1e-5,
    ),
    "distill_pcgrad": Row(
        lambda weight=0.5: _distilled(
            weight=weight, combine=jc.distillation.pcgrad(key=jax.random.key(0))
        ),
        {"weight": [0.1, 1.0]},
        ("distill",),
        tolerance=1e-4,
    ),
    "distill_cosine_gated": Row(
        lambda weight=0.5: _distilled(
            weight=weight, combine=jc.distillation.cosine_gated(per_leaf=True)
        ),
        {"weight": [0.1, 1.0]},
        ("distill",),
        tolerance=1e-4,
    ),
    "distill_norm_balanced": Row(
        lambda ratio=0.5, decay=0.9: _distilled(
            combine=jc.distillation.norm_balanced(ratio, decay)
        ),
        {"ratio": [0.0, 2.0], "decay": [0.0, 0.5]},
        ("distill",),
        tolerance=1e-4,
    ),
    "distill_dot": Row(
        lambda momentum=0.9, delta=0.05: optax.chain(
            jc.distill(student, teacher, combine=jc.distillation.dot(momentum, delta)),
            lenient(optax.sgd(1e-2)),
        ),
        {"momentum": [0.0, 0.9], "delta": [0.0, 0.05]},
        ("distill",),
        tolerance=1e-5,
    ),
    "ema_teacher": Row(
        lambda decay=0.9: optax.chain(_inner(), jc.distillation.ema_teacher(decay)),
        {"decay": [0.0, 0.9, 1.0]},
        ("ema_teacher",),
        tolerance=1e-5,
    ),
    "combine_gradients": Row(
        lambda weight=0.5: optax.chain(
            _with_another_gradient(
                jc.distillation.combine_gradients(jc.distillation.weighted_sum(1.0, weight))
            ),
            _inner(),
        ),
        {"weight": [0.1, 1.0]},
        ("combine_gradients",),
        tolerance=1e-5,
    ),
    "combine_gradients_pcgrad": Row(
        lambda rate=1e-2: optax.chain(
            _with_another_gradient(
                jc.distillation.combine_gradients(jc.distillation.pcgrad(per_leaf=True))
            ),
            lenient(optax.sgd(rate)),
        ),
        {"rate": [1e-3, 1e-2]},
        ("combine_gradients",),
        tolerance=1e-5,
    ),
}

# Pure functions and readers: they have tests of their own, named here.
ELSEWHERE = {
    "tests/pruning": {"dependencies", "select", "shrink", "shrink_like"},
    "tests/projections": {
        "compress",
        "latent",
        "structure",
        "pack",
        "batch_axes",
        "Projection",
        "Reparametrization",
    },
    "tests/distillation": {"kd_loss", "mse_logits", "soft_cross_entropy"},
    "tests/arrays": {"todense"},
    "tests/export": {"save", "load"},
    "tests/report": {"summary"},
    "tests/search": {"sweep"},
    "tests/tracing": {
        "sites",
        "lift",
        "capture",
        "capture_names",
        "name",
        "calibrate",
        "quantize_activations",
        "cost",
        "functional",
    },
}


def params(dtype=jnp.float32, seed: int = 0) -> dict:
    """Two layers: distinct magnitudes, shapes that a mesh of 4 divides."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    return {
        "a": {"bias": draw(8), "kernel": draw(16, 8)},
        "b": {"kernel": draw(8, 4)},
    }


def batch(seed: int = 3):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(5, 16)), jnp.float32)
