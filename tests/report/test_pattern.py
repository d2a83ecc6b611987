"""Patterns of zeros as found, and their pictures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.report import masks
from jaxcompress.report._pattern import pattern

RNG = np.random.default_rng(0)
W = RNG.normal(size=(32, 24)).astype(np.float32)


def pruned(w=W, **options):
    sparsity = () if "nm" in options else (0.5,)
    return np.asarray(jc.compress(jc.prune(*sparsity, **options), {"w": jnp.asarray(w)})["w"])


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({}, "unstructured"),
        ({"nm": (2, 4)}, "2:4 along axis -2"),
        ({"nm": (2, 4), "axis": -1}, "2:4 along axis -1"),
        ({"nm": (1, 2)}, "1:2 along axis -2"),
        ({"nm": (5, 8)}, "5:8 along axis -2"),
        ({"nm": (3, 16), "axis": 1}, "3:16 along axis -1"),
        ({"groups": jc.pruning.blocks(4, 8)}, "4×8 blocks"),
        ({"groups": jc.pruning.blocks(3, 5)}, "3×5 blocks"),
        ({"groups": jc.pruning.slices(-1)}, "32×1 blocks"),
        ({"groups": jc.pruning.slices(-2)}, "1×24 blocks"),
    ],
)
def test_is_found_as_it_was_made(options, found):
    assert pattern(pruned(**options)) == found


def test_of_kernels_with_more_axes():
    w = RNG.normal(size=(3, 3, 16, 8)).astype(np.float32)
    assert pattern(pruned(w, groups=jc.pruning.slices(-1))) == "3×3×16×1 blocks"
    assert pattern(pruned(w, nm=(2, 4))) == "2:4 along axis -2"
    assert pattern(np.moveaxis(pruned(w, nm=(2, 4)), -2, 0)) == "2:4 along axis -4"


def test_some_zeros_among_the_living_do_not_hide_n_of_m():
    w = pruned(nm=(2, 4)).copy()
    alive = np.argwhere(w != 0)
    for i, j in alive[:: len(alive) // 20]:
        w[i, j] = 0
    assert pattern(w) == "2:4 along axis -2"


@pytest.mark.parametrize(
    ("leaf", "found"),
    [
        (np.ones((4, 4)), ""),
        (np.zeros((0, 3)), ""),
        (np.zeros((4, 4)), "all zero"),
        (np.float32(0.0), "all zero"),
        (np.array([1.0, 0.0]), "unstructured"),
        (np.array([1.0, 1.0, 0.0, 0.0, 1.0]), "2 in a block"),
        (np.array([np.nan, 0.0, np.nan]), "unstructured"),
        (np.arange(3), "unstructured"),
    ],
)
def test_of_small_and_odd_leaves(leaf, found):
    assert pattern(np.asarray(leaf)) == found


def test_is_in_the_table_where_it_says_something():
    def of(*leaves):
        return jc.summary({str(i): w for i, w in enumerate(leaves)})

    two_of_four = of(pruned(nm=(2, 4)), W)
    assert [row.pattern for row in two_of_four.rows] == ["2:4 along axis -2", ""]
    assert two_of_four.total.pattern == "2:4 along axis -2"
    assert "2:4 along axis -2" in str(two_of_four)
    assert of(pruned(nm=(2, 4)), pruned()).total.pattern == "mixed"
    assert "pattern" not in str(of(pruned(), W))
    packed = jc.pack(jc.prune(nm=(2, 4)), {"w": jnp.asarray(W)})
    assert jc.summary(packed).rows[0].pattern == "2:4 along axis -2"
    abstract = jc.summary({"w": jax.ShapeDtypeStruct((4, 4), np.float32)})
    assert abstract.rows[0].pattern is None


class TestPictures:
    def test_show_what_is_not_zero(self):
        w = pruned()
        made = masks({"w": w, "bias": np.ones(3), "dense": np.ones((3, 4))})
        dense, sparse = made.axes
        np.testing.assert_array_equal(sparse.images[0].get_array(), w != 0)
        assert sparse.get_title(loc="left") == "w: 50% live, unstructured"
        assert dense.get_title(loc="left") == "dense: 100% live"

    def test_large_leaves_are_shown_by_their_density(self):
        alive = RNG.random((70, 33)) < 0.3
        (axes,) = masks({"w": alive}, pixels=10, where="**").axes
        shown = np.asarray(axes.images[0].get_array())
        assert shown.shape == (10, 9)  # cells of 7 rows and 4 columns, the last of 1
        np.testing.assert_allclose(shown[2, 1], alive[14:21, 4:8].mean())
        np.testing.assert_allclose(shown[9, 8], alive[63:, 32:].mean())

    def test_take_compressed_leaves_and_more_axes(self):
        w = RNG.normal(size=(3, 3, 8, 4)).astype(np.float32)
        packed = jc.pack(jc.prune(0.5), {"w": jnp.asarray(w)})
        (axes,) = masks(packed).axes
        assert axes.images[0].get_array().shape == (72, 4)

    def test_the_largest_are_drawn_and_the_rest_is_told(self):
        made = masks({str(i): np.ones((i + 1, 2)) for i in range(4)}, limit=2)
        assert len(made.axes) == 2
        assert "2 largest of 4" in made.get_supxlabel()

    def test_what_does_not_fit_is_refused(self):
        with pytest.raises(ValueError, match="masks: `pixels` must be a static integer"):
            masks({"w": W}, pixels=0)
        with pytest.raises(ValueError, match="masks"):
            masks({"bias": np.ones(3)})
        with pytest.raises(TypeError, match="abstract"):
            masks({"w": jax.ShapeDtypeStruct((4, 4), np.float32)})
