"""Every held-out model on every kind of compressed leaf, against the same leaves made dense."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress import arrays
from jaxcompress.tracing import _blocks
from jaxcompress.tracing._interpret import Hooks, interpret
from jaxcompress.tracing._jaxprs import trace
from tests.tracing.models import MODELS

KINDS = {
    "low rank": jc.low_rank(2),
    "int8": jc.quantize(8),
    "int4 groups": jc.quantize(4, group_size=4),
    "sparse int4": jc.chain(jc.prune(0.8), jc.quantize(4)),
    "2:4": jc.prune(nm=(2, 4)),
    "codebook": jc.cluster(4),
    "blocks": jc.prune(0.5, groups=jc.pruning.blocks(4, 3)),
}


@functools.lru_cache
def model(name):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return MODELS[name]()


def run(fn, *args):
    """As users run it: without the strict promotion of these tests, which frameworks break."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return jax.jit(fn)(*args)


def run_traced(apply, *args):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return trace(apply, args, {})


@functools.lru_cache
def dense(name):
    """The model and the gradient of its sum of squares, each compiled once for all kinds."""
    apply, _, args, _ = model(name)
    return jax.jit(apply), jax.jit(jax.grad(lambda p: jnp.sum(jnp.square(apply(p, *args)))))


@functools.lru_cache
def packed(name, kind):
    """The weights of a model packed; norms and biases, stacked ones too, stay as they are."""
    kernel = lambda path, x: jc.tree.is_weight(path, x) and not re.search("bias|scale", path)  # noqa: E731
    p, params = jc.masked(KINDS[kind], kernel), model(name).params
    return p.pack(params, run(p.find, params))


def close(got, want, tolerance):
    got, want = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]) for t in (got, want))
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


def compressed_leaves(params):
    leaves = jc.tree.leaves_with_paths(params)
    return {path: x for path, x in leaves if arrays.is_compressed(x)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_lifted_equals_dense(name, kind, monkeypatch):
    # Blocks are multiplied wherever they can be: for weights as small as these it is not cheaper.
    monkeypatch.setattr(_blocks, "_is_cheaper", lambda *_: True)
    apply, _, args, weight = model(name)
    small = packed(name, kind)
    assert weight in compressed_leaves(small)
    # Some factors of convolutions and merged axes can't be used apart.
    lifted = jc.lift(apply, densify="allow" if name in ("equinox_conv",) else "refuse")
    tolerance = 1e-2 if name == "einsum_attention" else 1e-5
    close(run(lifted, small, *args), run(dense(name)[0], run(jc.todense, small), *args), tolerance)


@pytest.mark.parametrize("kind", ["low rank", "int8", "codebook"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_equal_those_of_dense(name, kind):
    apply, _, args, _ = model(name)
    small = packed(name, kind)
    lifted = jc.lift(apply, densify="allow" if name in ("equinox_conv",) else "refuse")

    def floats(grads):
        return [g for g in jax.tree.leaves(grads) if g.dtype != jax.dtypes.float0]

    def loss(small):
        return jnp.sum(jnp.square(lifted(small, *args)))

    def through_dense(small, slopes):
        return jax.vjp(jc.todense, small)[1](slopes)[0]

    got = run(jax.grad(loss, allow_int=True), small)
    want = run(through_dense, small, run(dense(name)[1], run(jc.todense, small)))
    tolerance = 3e-2 if name == "einsum_attention" else 1e-5
    for mine, theirs in zip(floats(got), floats(want), strict=True):
        scale = max(np.abs(np.asarray(g)).max() for g in floats(want))
        assert np.abs(np.asarray(mine) - np.asarray(theirs)).max() <= tolerance * scale


@pytest.mark.parametrize("name", MODELS)
def test_nothing_compressed_is_the_function_itself(name):
    apply, params, args, _ = model(name)
    traced = run_traced(apply, params, *args)

    def lowered(fn):
        def same_name(*args):
            return fn(*args)

        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return jax.jit(same_name).lower(params, *args).as_text()

    nothing = Hooks(frozenset(), lambda *_: None)
    read = lambda *args: traced.results(  # noqa: E731
        interpret(traced, [x for x in jax.tree.leaves(args) if hasattr(x, "shape")], nothing)[0]
    )
    assert lowered(read) == lowered(apply)
    assert lowered(jc.lift(apply)) == lowered(apply)
