"""Masks of one's own: in, out, algebra, overlap, against NumPy sets."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxcompress as jc
from tests import contract
from tests.conftest import counting_jit

pr = jc.pruning


def masks_of(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "a": {"bias": None, "kernel": jnp.asarray(rng.random((16, 8)) < 0.4)},
        "b": {"kernel": jnp.asarray(rng.random((8, 4)) < 0.7)},
    }


class TestFromMasks:
    def test_compress_makes_them_permanent(self):
        params, masks = contract.params(), masks_of()
        out = jc.compress(pr.from_masks(masks), params)
        for layer in "ab":
            want = np.where(masks[layer]["kernel"], params[layer]["kernel"], 0)
            np.testing.assert_array_equal(out[layer]["kernel"], want)
        np.testing.assert_array_equal(out["a"]["bias"], params["a"]["bias"])
        applied = pr.apply_masks(params, masks)
        jax.tree.map(np.testing.assert_array_equal, applied, out)

    def test_training_holds_them(self):
        params, masks = contract.params(), masks_of()
        opt = jc.projected(optax.sgd(0.1, momentum=0.9), pr.from_masks(masks))
        state = opt.init(params)
        for seed in range(3):
            updates, state = opt.update(contract.params(seed=seed), state, params)
            params = optax.apply_updates(params, updates)
        np.testing.assert_array_equal(params["a"]["kernel"] != 0, masks["a"]["kernel"])
        packed = jc.pack(state, params)
        np.testing.assert_array_equal(packed["a"]["kernel"].todense(), params["a"]["kernel"])

    def test_new_masks_compile_nothing_anew(self):
        params = contract.params()
        step = counting_jit(lambda params, masks: jc.compress(pr.from_masks(masks), params))
        for seed in range(3):
            out = step(params, masks_of(seed))
            np.testing.assert_array_equal(out["b"]["kernel"] != 0, masks_of(seed)["b"]["kernel"])
        assert step.traces == 1

    def test_n_of_m_is_packed_as_such(self):
        params = contract.params()
        masks = pr.nonzero(jc.compress(jc.prune(nm=(2, 4)), params))
        packed = jc.pack(pr.from_masks(masks, nm=(2, 4)), params)
        assert isinstance(packed["a"]["kernel"], jc.arrays.NM)
        np.testing.assert_array_equal(
            packed["a"]["kernel"].todense(), jc.compress(jc.prune(nm=(2, 4)), params)["a"]["kernel"]
        )

    def test_one_dimension_and_other_containers(self):
        state = nnx.state(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), nnx.Param)
        masks = {"bias": jnp.array([True, False, True]), "kernel": jnp.eye(4, 3, dtype=bool)}
        out = jc.compress(pr.from_masks(masks), jax.tree.map(jnp.ones_like, state))
        np.testing.assert_array_equal(out["bias"][...], [1, 0, 1])
        np.testing.assert_array_equal(out["kernel"][...], np.eye(4, 3))

    @pytest.mark.parametrize(
        ("masks", "error", "text"),
        [
            ({"c": jnp.ones(3, bool)}, ValueError, "match at least one array leaf"),
            (
                {"c": jnp.ones(3, bool), "b": {"kernel": jnp.ones((8, 4), bool)}},
                ValueError,
                "hold masks for leaves of the params alone, got one at 'c'",
            ),
            ({"b": {"kernel": jnp.ones((8, 4))}}, TypeError, "be boolean, got float32.* at 'b/ker"),
            ({"b": {"kernel": jnp.ones((4, 8), bool)}}, ValueError, r"shape \[8, 4\] of the leaf"),
        ],
    )
    def test_bad_masks(self, masks, error, text):
        with pytest.raises(error, match=text):
            jc.compress(pr.from_masks(masks), contract.params())


class TestReading:
    def test_nonzero(self):
        w = jnp.array([[0.0, -0.0, jnp.nan], [jnp.inf, 1e-40, -2.0]])
        found = pr.nonzero({"w": w, "b": jnp.ones(2), "i": jnp.ones((2, 2), jnp.int32)})
        np.testing.assert_array_equal(found["w"][0], [False, False, True])
        np.testing.assert_array_equal(found["w"][1, [0, 2]], [True, True])
        assert found["b"] is None
        assert found["i"] is None
        assert pr.nonzero({"b": jnp.ones(2)}, "b")["b"].all()

    def test_as_is_packs_what_another_tool_pruned(self):
        sparse = jc.compress(jc.prune(0.9), contract.params())
        packed = jc.pack(pr.as_is(), sparse)
        assert packed["a"]["kernel"].nbytes == 13 * 4 + 16
        jax.tree.map(np.testing.assert_array_equal, jc.todense(packed), sparse)

    def test_as_is_keeps_the_zeros_of_a_model_that_trains_on(self):
        params = {"w": jnp.array([[1.0, 0.0], [0.0, -1.0]])}
        opt = jc.restricted(optax.sgd(1.0), jc.every(1, pr.as_is(), end=0))
        state = opt.init(params)
        # A weight that passes through zero is not lost.
        for want in ([[0.0, 0.0], [0.0, -2.0]], [[-1.0, 0.0], [0.0, -3.0]]):
            updates, state = opt.update({"w": jnp.ones((2, 2))}, state, params)
            params = optax.apply_updates(params, updates)
            np.testing.assert_array_equal(params["w"], want)

    def test_apply_hides_nan_and_keeps_dtypes(self):
        params = {"w": jnp.array([jnp.nan, 2.0], jnp.bfloat16)}
        out = pr.apply_masks(params, {"w": jnp.array([False, True])})
        assert out["w"].dtype == jnp.bfloat16
        np.testing.assert_array_equal(out["w"].astype(np.float32), [0, 2])
        assert bool(jnp.isnan(params["w"][0]))


class TestAlgebra:
    def test_agrees_with_numpy(self):
        a, b, c = (masks_of(seed) for seed in range(3))
        for ours, theirs in (
            (pr.union(a, b, c), lambda *x: np.logical_or.reduce(x)),
            (pr.intersection(a, b, c), lambda *x: np.logical_and.reduce(x)),
            (pr.invert(a), lambda x, *_: ~np.asarray(x)),
        ):
            want = jax.tree.map(theirs, a, b, c)
            jax.tree.map(np.testing.assert_array_equal, ours, want)
            assert ours["a"]["bias"] is None

    def test_overlap_counts(self):
        a, b = masks_of(0), masks_of(1)
        found = jax.jit(pr.overlap)(a, b)
        total = np.zeros(3)
        for path, layer in (("a/kernel", "a"), ("b/kernel", "b")):
            x, y = np.asarray(a[layer]["kernel"]), np.asarray(b[layer]["kernel"])
            counts = [(x & y).sum(), (x & ~y).sum(), (~x & y).sum()]
            assert [int(n) for n in found[path][:3]] == counts
            np.testing.assert_allclose(found[path].jaccard, counts[0] / sum(counts), rtol=1e-6)
            total += counts
        assert [int(n) for n in found[""][:3]] == list(total)
        assert set(found) == {"a/kernel", "b/kernel", ""}

    def test_expected_overlap_is_that_of_random_masks(self):
        rng = np.random.default_rng(0)
        x, y = rng.random((2, 400, 500)) < np.array([0.3, 0.6])[:, None, None]
        found = pr.overlap({"w": jnp.asarray(x)}, {"w": jnp.asarray(y)})["w"]
        assert float(found.jaccard) == pytest.approx(float(found.expected), abs=0.005)

    def test_empty_masks_agree(self):
        none = {"w": jnp.zeros((4, 4), bool), "e": jnp.zeros((0, 4), bool)}
        assert all(float(o.jaccard) == 1 for o in pr.overlap(none, none).values())
        full = {"w": jnp.ones((4, 4), bool), "e": jnp.ones((0, 4), bool)}
        assert float(pr.overlap(none, full)["w"].jaccard) == 0

    def test_vmap_equals_a_loop(self):
        many = [masks_of(seed) for seed in range(3)]
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *many)
        mapped = jax.vmap(pr.overlap, (0, None))(stacked, many[0])
        for i, masks in enumerate(many):
            assert float(mapped[""].jaccard[i]) == float(pr.overlap(masks, many[0])[""].jaccard)

    @pytest.mark.parametrize(
        ("second", "error", "text"),
        [
            ({"w": jnp.ones(3)}, TypeError, "overlap: `masks` must be boolean, got float32"),
            ({"w": jnp.ones(2, bool)}, ValueError, r"shape \[3\], got bool\[2\] at 'w'"),
            ({"v": jnp.ones(3, bool)}, ValueError, r"differ in \['v', 'w'\]"),
        ],
    )
    def test_bad_input(self, second, error, text):
        with pytest.raises(error, match=text):
            pr.overlap({"w": jnp.ones(3, bool)}, second)


class TestBits:
    @pytest.mark.parametrize("shape", [(), (0,), (5,), (8,), (16, 8), (3, 11), (2, 3, 17), (4, 0)])
    def test_are_those_of_numpy(self, shape):
        keep = np.random.default_rng(0).random(shape) < 0.5
        mask = jc.pruning.Mask.of(jnp.asarray(keep))
        if shape:
            axis = -2 if shape == (16, 8) else -1
            assert mask.along == axis
            packed = np.packbits(keep, axis, bitorder="little")
            np.testing.assert_array_equal(mask.bits, packed)
        np.testing.assert_array_equal(mask.keep, keep)
        assert mask.keep.dtype == bool

    def test_cost_a_thirty_second_of_float32(self):
        held = jc.prune(0.5).find({"w": jnp.ones((16, 64))})["w"]
        assert held.nbytes == 16 * 64 * 4 // 32
        assert jc.tree.nbytes(held) == held.nbytes

    def test_are_read_within_the_masked_product(self):
        """The compiled projection never writes a mask of one byte per weight."""
        w = jax.random.normal(jax.random.key(0), (64, 256))
        p = jc.prune(0.5)
        compiled = jax.jit(p.project).lower({"w": w}, p.find({"w": w})).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < w.size // 8


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_a_concrete_mask_is_packed_before_the_program_is_made(kind):
    """Else XLA folds the packing of a large constant: ten seconds for 2048 x 2048."""
    p = jc.pruning.from_masks({"w": kind(np.arange(64).reshape(4, 16) % 3 == 0)})
    program = jax.jit(p.find).lower({"w": jnp.ones((4, 16))}).as_text()
    assert "stablehlo.reduce" not in program
    assert "tensor<4x2xui8>" in program
