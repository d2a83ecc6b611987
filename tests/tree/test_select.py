import re

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcompress import tree


def params():
    return {
        "conv": {"kernel": jnp.ones((3, 3, 1, 4)), "bias": jnp.ones(4)},
        "blocks": [
            {"kernel": jnp.ones((4, 4))},
            {"kernel": jnp.ones((4, 4)), "scale": jnp.ones(4)},
        ],
        "count": jnp.zeros((2, 2), jnp.int32),
        "none": None,
    }


def chosen(where):
    mask = tree.select(params(), where)
    return {path for path, hit in tree.leaves_with_paths(mask) if hit}


ALL = {"conv/kernel", "conv/bias", "blocks/0/kernel", "blocks/1/kernel", "blocks/1/scale", "count"}


@pytest.mark.parametrize(
    ("where", "want"),
    [
        (tree.is_weight, {"conv/kernel", "blocks/0/kernel", "blocks/1/kernel"}),
        ("**/kernel", {"conv/kernel", "blocks/0/kernel", "blocks/1/kernel"}),
        ("*/kernel", {"conv/kernel"}),
        ("**", ALL),
        ("count", {"count"}),
        ("blocks/**", {"blocks/0/kernel", "blocks/1/kernel", "blocks/1/scale"}),
        ("blocks/[0]/*", {"blocks/0/kernel"}),
        ("blocks/[!0]/*", {"blocks/1/kernel", "blocks/1/scale"}),
        ("c?nv/*", {"conv/kernel", "conv/bias"}),
        (re.compile(r"blocks/\d/kernel"), {"blocks/0/kernel", "blocks/1/kernel"}),
        (lambda path, x: x.ndim == 1, {"conv/bias", "blocks/1/scale"}),
        (tree.all_of("blocks/**", tree.is_weight), {"blocks/0/kernel", "blocks/1/kernel"}),
        (tree.any_of("count", "conv/bias"), {"count", "conv/bias"}),
        (
            tree.all_of(tree.is_weight, tree.none_of("conv/**")),
            {"blocks/0/kernel", "blocks/1/kernel"},
        ),
    ],
)
def test_choice(where, want):
    assert chosen(where) == want


def test_mask_tree():
    mask = tree.select(params(), "**/kernel")
    assert chosen(mask) == chosen("**/kernel")
    assert chosen(tree.all_of(mask, "conv/*")) == {"conv/kernel"}


def test_no_match_lists_the_paths():
    with pytest.raises(ValueError, match="matches none") as error:
        tree.select(params(), "**/kernal")
    assert all(path in str(error.value) for path in ALL)


def test_wrong_masks():
    with pytest.raises(TypeError, match="path pattern"):
        tree.select(params(), jnp.ones(3))
    with pytest.raises(ValueError, match="another structure"):
        tree.select(params(), {"conv": True})


def test_masked_nodes_and_functions_are_never_chosen():
    assert tree.select({"f": jnp.tanh, "w": np.ones((2, 2))}, "**") == {"f": False, "w": True}
    hidden = {"a": optax.MaskedNode(), "w": np.ones((2, 2))}
    assert tree.select(hidden, {"a": True, "w": True})["w"] is True


def test_sizes_count_every_byte():
    assert tree.size(params()) == 36 + 4 + 16 + 16 + 4 + 4
    assert tree.nbytes(params()) == 4 * (36 + 4 + 16 + 16 + 4) + 16
