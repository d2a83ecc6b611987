"""Groups against loops in NumPy: every shape of block, ragged edges, norms, whole leaves."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from tests.conftest import counting_jit, mesh_of

pr = jc.pruning
NORMS = {
    pr.l1: lambda x: np.abs(x).sum(),
    pr.l2: lambda x: np.sqrt((x**2).sum()),
    pr.largest_score: lambda x: np.abs(x).max(),
    pr.mean: lambda x: np.abs(x).mean(),
}
CASES = {
    "blocks_fit": (lambda norm: pr.blocks(2, 4, norm=norm), (4, 8), (2, 4)),
    "blocks_ragged": (lambda norm: pr.blocks(3, 5, norm=norm), (4, 8), (3, 5)),
    "blocks_larger": (lambda norm: pr.blocks(16, 3, norm=norm), (4, 8), (16, 3)),
    "blocks_last_axis": (lambda norm: pr.blocks(3, norm=norm), (2, 3, 7), (1, 1, 3)),
    "outputs": (lambda norm: pr.slices(-1, norm=norm), (2, 3, 7), (2, 3, 1)),
    "inputs_and_outputs": (lambda norm: pr.slices(0, -1, norm=norm), (2, 3, 7), (1, 3, 1)),
    "heads": (lambda norm: pr.heads(-1, size=4, norm=norm), (4, 8), (4, 4)),
    "heads_by_number": (lambda norm: pr.heads(0, number=2, norm=norm), (4, 8), (2, 8)),
    "whole": (lambda norm: pr.whole(norm), (4, 8), (4, 8)),
}


def groups_by_loops(shape, block):
    """The index of each group's entries, in C order of the grid."""
    starts = [range(0, n, b) for n, b in zip(shape, block, strict=True)]
    for corner in itertools.product(*starts):
        yield tuple(slice(c, min(c + b, n)) for c, b, n in zip(corner, block, shape, strict=True))


def values(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("case", CASES)
def test_reduction_is_that_of_a_loop(case, norm):
    make, shape, block = CASES[case]
    x = values(shape)
    want = [NORMS[norm](x[i].astype(np.float64)) for i in groups_by_loops(shape, block)]
    found = make(norm).reduce("w", jnp.asarray(x))
    np.testing.assert_allclose(np.asarray(found).ravel(), want, rtol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_expansion_marks_the_entries_of_the_groups_kept(case):
    make, shape, block = CASES[case]
    groups = make(pr.l1)
    grid = groups.sizes("w", shape).shape
    kept = np.random.default_rng(1).random(grid) < 0.5
    want = np.zeros(shape, bool)
    for lives, index in zip(kept.ravel(), groups_by_loops(shape, block), strict=True):
        want[index] = lives
    found = groups.expand("w", jnp.asarray(kept), shape)
    np.testing.assert_array_equal(found, want)
    sizes = [want[i].size for i in groups_by_loops(shape, block)]
    np.testing.assert_array_equal(groups.sizes("w", shape).ravel(), sizes)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("case", CASES)
def test_pruning_keeps_exactly_the_best_groups(case, sparsity):
    make, shape, block = CASES[case]
    x = values(shape, seed=2)
    p = jc.prune(sparsity, groups=make(pr.l2))
    keep = np.asarray(p.find({"w": jnp.asarray(x)})["w"].keep)
    index = list(groups_by_loops(shape, block))
    scores = np.array([np.linalg.norm(x[i].astype(np.float64)) for i in index])
    count = len(index) - round(sparsity * len(index))
    best = set(np.argsort(-scores)[:count])
    for i, where in enumerate(index):
        assert keep[where].all() == keep[where].any() == (i in best)


def test_channels_agree_with_torch_ln_structured():
    """`torch.nn.utils.prune.ln_structured(m, "weight", amount=0.4, n=2, dim=0)` by its text:

    the round(0.4 * channels) channels of least 2-norm along `dim` are removed.
    """
    x = values((10, 3, 3, 4), seed=3)
    keep = jc.prune(0.4, groups=pr.slices(0)).find({"w": jnp.asarray(x)})["w"].keep
    norms = np.sqrt((x.astype(np.float64) ** 2).sum((1, 2, 3)))
    gone = np.argsort(norms)[:4]
    np.testing.assert_array_equal(np.flatnonzero(~np.asarray(keep).any((1, 2, 3))), np.sort(gone))


def test_layers_go_as_a_whole():
    params = {"a": jnp.ones((4, 4)), "b": jnp.full((2, 2), 3.0), "c": jnp.full((3, 3), 2.0)}
    p = jc.prune(1 / 3, groups=pr.whole(), scope="global", floor=None)
    alive = {path: bool(w.any()) for path, w in jc.compress(p, params).items()}
    assert alive == {"a": False, "b": True, "c": True}
    kept = jc.compress(jc.prune(1 / 3, groups=pr.whole(), scope="global"), params)
    # With a floor each leaf has a group to keep: of three that tie, the first two in order.
    assert sum(bool(w.any()) for w in kept.values()) == 2


def test_leaves_combine_by_partition():
    params = {"conv": jnp.asarray(values((4, 8))), "dense": jnp.asarray(values((8, 4)))}
    p = jc.partition({"conv": jc.prune(0.5, groups=pr.slices(-1)), "dense": jc.prune(nm=(2, 4))})
    out = jc.compress(p, params)
    assert (np.asarray(out["conv"]) == 0).all(0).sum() == 4
    assert ((np.asarray(out["dense"]) != 0).reshape(2, 4, 4).sum(1) == 2).all()


@pytest.mark.parametrize("case", CASES)
def test_narrow_dtypes_nan_and_huge_values(case):
    make, shape, _block = CASES[case]
    x = values(shape)
    x.ravel()[0] = np.nan
    for dtype in (jnp.bfloat16, jnp.float16):
        scores = make(pr.l2).reduce("w", jnp.asarray(x, dtype))
        assert scores.dtype == jnp.float32
        assert np.isnan(scores.ravel()[0])
        assert np.isfinite(scores.ravel()[1:]).all()
    huge = make(pr.l2).reduce("w", jnp.full(shape, 1e30, jnp.float32))
    tiny = make(pr.l2).reduce("w", jnp.full(shape, 1e-30, jnp.float32))
    assert np.isfinite(huge).all()
    assert (np.asarray(tiny) > 0).all()
    assert (np.asarray(make(pr.l2).reduce("w", jnp.zeros(shape))) == 0).all()


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
@pytest.mark.parametrize("make", [lambda: pr.blocks(2, 2), lambda: pr.slices(-1), pr.whole])
def test_empty_leaves_stay(make, shape):
    out = jc.compress(jc.prune(0.5, groups=make()), {"w": jnp.zeros(shape)})
    assert out["w"].shape == shape


def test_a_scalar_is_one_group():
    p = jc.masked(jc.prune(0.5, groups=pr.whole(), scope="global", floor=None), "**")
    out = jc.compress(p, {"a": jnp.array(1.0), "b": jnp.array(-2.0)})
    assert (float(out["a"]), float(out["b"])) == (0.0, -2.0)


@pytest.mark.parametrize(
    ("groups", "shape", "stored"),
    [
        (pr.blocks(2, 4), (4, 8), (2, 2, 4)),
        (pr.blocks(2, 4), (3, 4, 8), (6, 2, 4)),
        (pr.slices(-1), (3, 5, 4), (2, 3, 5, 1)),
        (pr.slices(0), (4, 6), (2, 6)),
        (pr.heads(-1, number=2), (4, 6), (1, 4, 3)),
    ],
)
def test_packed_as_blocks(groups, shape, stored):
    params = {"w": jnp.asarray(values(shape))}
    p = jc.prune(0.5, groups=groups)
    packed = jc.pack(p, params)["w"]
    assert isinstance(packed, jc.arrays.BlockSparse)
    assert packed.values.shape == stored
    np.testing.assert_array_equal(packed.todense(), jc.compress(p, params)["w"])


def test_single_weights_are_packed_as_bits():
    params = {"w": jnp.asarray(values((4, 8)))}
    packed = jc.pack(jc.prune(0.5, groups=pr.blocks(1, 1)), params)
    assert isinstance(packed["w"], jc.arrays.BitMasked)


def test_jit_compiles_once_and_vmap_equals_a_loop():
    x = jnp.asarray(values((4, 8)))
    one = counting_jit(lambda s: jc.compress(jc.prune(s, groups=pr.blocks(3, 3)), {"w": x})["w"])
    grid = jnp.array([0.0, 0.4, 0.9])
    for s, got in zip(grid, jax.vmap(one)(grid), strict=True):
        np.testing.assert_array_equal(got, one(s))
    assert one.traces == 1


@pytest.mark.parametrize("kind", ["auto", "explicit"])
@pytest.mark.parametrize("case", ["blocks_ragged", "heads", "whole"])
def test_sharded_equals_one_device(case, kind):
    make, shape, _ = CASES[case]
    x = values(shape)
    p = jc.prune(0.5, groups=make(pr.mean))
    want = jc.compress(p, {"w": jnp.asarray(x)})["w"]
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, NamedSharding(mesh, P("d", None)))
        found = jax.jit(lambda w: jc.compress(p, {"w": w})["w"])(sharded)
        np.testing.assert_array_equal(jax.device_get(found), want)


def test_gradients_reach_what_lives():
    x = jnp.asarray(values((4, 8)))
    p = jc.prune(0.5, groups=pr.slices(-1))
    grad = jax.grad(lambda w: jc.compress(p, {"w": w})["w"].sum())(x)
    keep = p.find({"w": x})["w"].keep
    np.testing.assert_array_equal(grad, keep.astype(jnp.float32))


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: pr.blocks(), ValueError, "blocks: `len\\(shape\\)`"),
        (lambda: pr.blocks(0, 2), ValueError, "blocks: `shape\\[0\\]`"),
        (lambda: pr.blocks(2.0), TypeError, "blocks: `shape\\[0\\]`"),
        (lambda: pr.blocks(2, 2, 2), ValueError, "at least 3 dimensions, got shape .* at 'w'"),
        (lambda: pr.slices(), ValueError, "slices: `len\\(axes\\)`"),
        (lambda: pr.slices(3), ValueError, "slices: `axes` must be an axis .* at 'w'"),
        (lambda: pr.heads(-1), ValueError, "heads: `size`"),
        (lambda: pr.heads(-1, size=2, number=2), ValueError, "heads: `size`"),
        (lambda: pr.heads(-1, number=0), ValueError, "heads: `number`"),
        (lambda: pr.heads(-1, size=3), ValueError, "size=3 divides, got shape .* at 'w'"),
        (lambda: "blocks", ValueError, "prune: `groups` must be a Groups"),
    ],
)
def test_bad_input(make, error, text):
    with pytest.raises(error, match=text):
        jc.compress(jc.prune(0.5, groups=make()), {"w": jnp.ones((4, 8))})


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"nm": (2, 4), "groups": pr.blocks(2)}, "`groups` must be None with nm"),
        ({"sparsity": 0.5, "groups": pr.blocks(2), "scope": -1}, "`groups` must be None with an"),
        ({"sparsity": 0.5, "budget": pr.uniform(), "scope": "global"}, "`scope` must be 'leaf'"),
        ({"sparsity": 0.5, "scope": "row"}, "`scope` must be"),
        ({"sparsity": 0.5, "scope": True}, "`scope` must be"),
        ({"sparsity": 0.5, "floor": 2.0}, "`floor` must be"),
    ],
)
def test_arguments_that_exclude_each_other(kwargs, text):
    with pytest.raises(ValueError, match=text):
        jc.prune(**kwargs)
