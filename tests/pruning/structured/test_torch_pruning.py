"""As many parameters are left as Torch-Pruning leaves of the same network."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    tp = pytest.importorskip("torch_pruning")

from tests.pruning.structured.torch_pairs import PAIRS, count  # noqa: E402


@functools.cache
def torch_counts(name, ratio):
    """Before and after."""
    pair = PAIRS[name]
    torch.manual_seed(0)
    module = pair.torch().eval()
    b, h, w, c = pair.shape
    before = sum(p.numel() for p in module.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = tp.pruner.MagnitudePruner(
            module,
            torch.zeros(b, c, h, w),
            importance=tp.importance.MagnitudeImportance(p=1),
            pruning_ratio=ratio,
            ignored_layers=[getattr(module, pair.last)],
            num_heads=dict.fromkeys(pair.attention(module), pair.heads),
        )
        pruner.step()
    return before, sum(p.numel() for p in module.parameters())


@functools.cache
def dependencies_of(name):
    pair = PAIRS[name]
    x = jax.ShapeDtypeStruct(pair.shape, jnp.float32)
    variables = jax.eval_shape(pair.flax.init, jax.random.key(0), x)
    return jc.dependencies(pair.flax.apply, variables, x), variables, x


@pytest.mark.parametrize("ratio", [0.5, 0.25])
@pytest.mark.parametrize("name", PAIRS)
def test_as_many_parameters_are_left(name, ratio):
    before, after = torch_counts(name, ratio)
    dependencies, variables, x = dependencies_of(name)
    assert count(variables) == before
    # Heads stay, as Torch-Pruning's do.
    masks = {
        group.name: np.arange(group.size) < round(group.size * (1 - ratio))
        for group in dependencies.groups
        if group.size != PAIRS[name].heads
    }
    keep = jc.pruning.Keep(dependencies, masks)
    small, fn = jc.shrink(PAIRS[name].flax.apply, variables, keep, x)
    assert count(small) == after
    assert jax.eval_shape(fn, small, x) == jax.eval_shape(PAIRS[name].flax.apply, variables, x)


def test_half_of_resnet_18_is_what_it_is_known_to_be():
    dependencies, variables, x = dependencies_of("resnet18")
    assert count(variables) == 11_689_512
    key = jax.random.key(0)
    params = PAIRS["resnet18"].flax.init(key, jnp.zeros(x.shape))
    keep = jc.select(dependencies, params, keep=0.5)
    small, _ = jc.shrink(PAIRS["resnet18"].flax.apply, variables, keep, x)
    assert count(small) == 3_055_880
