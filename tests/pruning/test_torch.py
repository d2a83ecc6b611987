"""Masks against PyTorch's pruning, weight for weight, on the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc

torch = pytest.importorskip("torch", reason="pip install -e '.[peers]'")
peer = pytest.importorskip("torch.nn.utils.prune")

SHAPES = [(8, 12), (4, 6, 3, 3), (10,)]


def weights(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def module(w):
    """A torch module with one parameter."""
    holder = torch.nn.Module()
    holder.weight = torch.nn.Parameter(torch.tensor(w))
    return holder


def everything(path, leaf):
    return True


def keeps(p, *ws):
    masks = jc.masked(p, everything).find([jnp.asarray(w) for w in ws])
    return [np.asarray(masks[str(i)].keep) for i in range(len(ws))]


def same(p, pruned):
    (keep,) = keeps(p, pruned.weight_orig.detach().numpy())
    np.testing.assert_array_equal(keep, pruned.weight_mask.numpy() != 0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("amount", [0.0, 0.3, 0.5, 0.77, 1.0])
def test_l1_unstructured(shape, amount):
    pruned = peer.l1_unstructured(module(weights(*shape)), "weight", amount)
    same(jc.prune(amount), pruned)


@pytest.mark.parametrize("shape", SHAPES)
def test_importance_scores(shape):
    scores = weights(*shape, seed=1)
    pruned = peer.l1_unstructured(
        module(weights(*shape)), "weight", 0.6, importance_scores=torch.tensor(scores)
    )
    # PyTorch ranks scores by their size.
    same(jc.prune(0.6, score=[jnp.abs(jnp.asarray(scores))]), pruned)


@pytest.mark.parametrize("shape", SHAPES[:2])
@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize(
    ("n", "norm"),
    [(1, jc.pruning.l1), (2, jc.pruning.l2), (float("inf"), jc.pruning.largest_score)],
)
def test_ln_structured(shape, dim, n, norm):
    pruned = peer.ln_structured(module(weights(*shape)), "weight", 0.4, n=n, dim=dim)
    same(jc.prune(0.4, groups=jc.pruning.slices(dim, norm=norm)), pruned)


def test_random_with_a_given_mask():
    w = weights(8, 12)
    pruned = peer.random_unstructured(module(w), "weight", 0.7)
    mask = pruned.weight_mask.numpy() != 0
    ours = jc.compress(jc.pruning.from_masks({"w": mask}), {"w": jnp.asarray(w)})["w"]
    np.testing.assert_array_equal(ours, pruned.weight.detach().numpy())
    (found,) = keeps(jc.prune(0.7, score=jc.pruning.random(jax.random.key(0))), w)
    assert found.sum() == mask.sum()


@pytest.mark.parametrize("amount", [0.1, 0.5, 0.95])
def test_global_unstructured(amount):
    ws = [weights(*shape, seed=i) * 2.0**i for i, shape in enumerate(SHAPES)]
    modules = [module(w) for w in ws]
    peer.global_unstructured(
        [(m, "weight") for m in modules], pruning_method=peer.L1Unstructured, amount=amount
    )
    for keep, m in zip(
        keeps(jc.prune(amount, scope="global", floor=None), *ws), modules, strict=True
    ):
        np.testing.assert_array_equal(keep, m.weight_mask.numpy() != 0)


def test_custom_from_mask_and_remove():
    w, mask = weights(4, 6, 3, 3), weights(4, 6, 3, 3, seed=1) > 0
    pruned = peer.custom_from_mask(module(w), "weight", torch.tensor(mask))
    peer.remove(pruned, "weight")
    ours = jc.pruning.apply_masks({"w": jnp.asarray(w)}, {"w": mask})["w"]
    np.testing.assert_array_equal(ours, pruned.weight.detach().numpy())


def test_two_of_four_is_the_sparsifier_of_torch_ao():
    sparsifier = pytest.importorskip("torch.ao.pruning").WeightNormSparsifier(
        sparsity_level=1.0, sparse_block_shape=(1, 4), zeros_per_block=2
    )
    layer = torch.nn.Linear(16, 8, bias=False)
    w = weights(8, 16)
    layer.weight.data = torch.tensor(w)
    model = torch.nn.Sequential(layer)
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}])
    sparsifier.step()
    theirs = layer.parametrizations.weight[0].mask.numpy() != 0
    (ours,) = keeps(jc.prune(nm=(2, 4), axis=-1), w)
    np.testing.assert_array_equal(ours, theirs)
