"""Masks against NumPy, exact counts, N:M, defined behaviour at the edges."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxcompress as jc
from tests.conftest import counting_jit

SHAPES = [(16, 8), (3, 3, 2, 4), (7,), (1, 1)]


def keep_by_sorting(w, sparsity):
    """The oracle: a stable sort in float64, first entries first among equal magnitudes."""
    flat = np.abs(np.asarray(w, np.float64)).ravel()
    kept = flat.size - int(np.round(np.float32(sparsity) * np.float32(flat.size)))
    order = np.argsort(-flat, kind="stable")
    keep = np.zeros(flat.size, bool)
    keep[order[:kept]] = True
    return keep.reshape(np.shape(w))


def mask_of(w, **kwargs):
    p = jc.masked(jc.prune(**kwargs), "w")
    return np.asarray(p.find({"w": jnp.asarray(w)})["w"].keep)


# Few distinct values, so that ties abound.
values = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 2.0, -3.0, 1e-40, 1e30])


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.data(), st.sampled_from(SHAPES), st.floats(0, 1, width=32))
def test_mask_is_that_of_a_stable_sort(data, shape, sparsity):
    w = data.draw(hnp.arrays(np.float32, shape, elements=values))
    np.testing.assert_array_equal(mask_of(w, sparsity=sparsity), keep_by_sorting(w, sparsity))


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_exact_count(sparsity, dtype):
    w = jax.random.normal(jax.random.key(0), (100, 30)).astype(dtype)
    assert mask_of(w, sparsity=sparsity).sum() == 3000 - round(sparsity * 3000)


def test_global_scope_is_one_threshold_over_all_leaves():
    rng = np.random.default_rng(0)
    params = {
        "a": rng.normal(size=(16, 8)),
        "b": 3 * rng.normal(size=(8, 4)),
        "c": rng.normal(size=9),
    }
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    found = jc.prune(0.7, scope="global").find(params)
    flat = np.concatenate([np.asarray(params["a"]).ravel(), np.asarray(params["b"]).ravel()])
    keep = keep_by_sorting(flat, 0.7)
    np.testing.assert_array_equal(found["a"].keep.ravel(), keep[:128])
    np.testing.assert_array_equal(found["b"].keep.ravel(), keep[128:])
    assert set(found) == {"a", "b"}


def test_global_scope_does_not_depend_on_the_order_of_leaves():
    rng = np.random.default_rng(1)
    leaves = [jnp.asarray(rng.normal(size=(16, 8)), jnp.float32) for _ in range(3)]
    p = jc.prune(0.6, scope="global")
    want = [m.keep for m in p.find(leaves).values()]
    for order in itertools.permutations(range(3)):
        found = p.find([leaves[i] for i in order])
        for place, i in enumerate(order):
            np.testing.assert_array_equal(found[str(place)].keep, want[i])


def n_m_by_loops(w, n, m, axis):
    keep = np.zeros(w.shape, bool)
    moved, out = np.moveaxis(np.abs(w), axis, -1), np.moveaxis(keep, axis, -1)
    for index in np.ndindex(moved.shape[:-1]):
        for start in range(0, moved.shape[-1], m):
            group = moved[index][start : start + m]
            for i in np.argsort(-group, kind="stable")[:n]:
                out[(*index, start + i)] = True
    return keep


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    st.data(),
    st.sampled_from([((16, 8), -2), ((16, 8), -1), ((3, 3, 6, 4), -2), ((7, 3), 0)]),
    st.sampled_from([(2, 4), (1, 4), (0, 3), (4, 4), (3, 8)]),
)
def test_n_of_m_in_every_group(data, case, nm):
    shape, axis = case
    w = data.draw(hnp.arrays(np.float32, shape, elements=values))
    np.testing.assert_array_equal(mask_of(w, nm=nm, axis=axis), n_m_by_loops(w, *nm, axis))


def test_default_axis_is_the_contraction_axis_of_flax():
    kernel = jax.random.normal(jax.random.key(0), (8, 6))
    np.testing.assert_array_equal(mask_of(kernel, nm=(2, 4)), mask_of(kernel, nm=(2, 4), axis=0))
    assert (mask_of(kernel, nm=(2, 4)).reshape(2, 4, 6).sum(1) == 2).all()


def test_nan_goes_first_and_infinity_last():
    w = jnp.array([[jnp.nan, 1.0, jnp.inf, 0.0]])
    np.testing.assert_array_equal(mask_of(w, sparsity=0.25), [[False, True, True, True]])
    np.testing.assert_array_equal(mask_of(w, nm=(1, 4), axis=-1), [[False, False, True, False]])
    assert jc.compress(jc.prune(0.25), w)[0, 0] == 0


def test_scalar_and_empty_leaves():
    assert jc.compress(jc.masked(jc.prune(0.4), "**"), {"s": jnp.array(2.0)})["s"] == 2
    assert jc.compress(jc.masked(jc.prune(1.0), "**"), {"s": jnp.array(2.0)})["s"] == 0
    assert jc.compress(jc.prune(0.5), {"e": jnp.zeros((0, 3))})["e"].shape == (0, 3)


def test_sweep_compiles_once():
    params = {"w": jax.random.normal(jax.random.key(0), (16, 8))}
    both = lambda s, b: jc.chain(jc.prune(s), jc.quantize(b))  # noqa: E731
    sweep = counting_jit(jax.vmap(lambda s, b: jc.compress(both(s, b), params)))
    out = sweep(jnp.linspace(0, 0.9, 4), jnp.array([1, 2, 4, 8]))
    sweep(jnp.linspace(0.1, 0.8, 4), jnp.array([8, 4, 2, 1]))
    assert sweep.traces == 1
    zeros = (np.asarray(out["w"]) == 0).sum((1, 2))
    assert (zeros >= np.round([0, 38.4, 76.8, 115.2])).all()


def test_packed_size_is_kept_values_and_one_bit_each():
    w = jax.random.normal(jax.random.key(0), (100, 30))
    packed = jc.pack(jc.prune(0.9), {"w": w})["w"]
    assert packed.nbytes == 300 * 4 + 3000 // 8
    packed = jc.pack(jc.prune(nm=(2, 4)), {"w": w})["w"]
    assert packed.nbytes == 1500 * 4 + 2 * -(-1500 // 8)


@pytest.mark.parametrize(
    ("kwargs", "kind", "text"),
    [
        ({}, ValueError, "not both"),
        ({"sparsity": 0.5, "nm": (2, 4)}, ValueError, "not both"),
        (
            {"sparsity": 90},
            ValueError,
            "prune: `sparsity` must be a real number in \\[0, 1\\], got 90",
        ),
        ({"sparsity": float("nan")}, ValueError, "sparsity"),
        ({"sparsity": "high"}, TypeError, "sparsity"),
        ({"sparsity": np.ones(3)}, TypeError, "sparsity"),
        ({"sparsity": 0.5, "scope": "layer"}, ValueError, "scope"),
        ({"nm": (5, 4)}, ValueError, "nm\\[0\\]"),
        ({"nm": 4}, TypeError, "tuple"),
        ({"nm": (2, 4), "scope": "global"}, ValueError, "`scope` must be 'leaf' with nm"),
        ({"nm": (2, 4), "axis": 5}, ValueError, "axis of a leaf with 2 dimensions, got 5 at 'w'"),
    ],
)
def test_bad_input(kwargs, kind, text):
    with pytest.raises(kind, match=text):
        jc.compress(jc.prune(**kwargs), {"w": jnp.ones((4, 4))})


def test_a_model_without_weights_is_refused_by_the_rule_of_the_default_choice():
    with pytest.raises(ValueError, match=r"find: `where` must match .* got is_weight, .*\n  b"):
        jc.compress(jc.prune(0.5), {"b": jnp.ones(3)})
