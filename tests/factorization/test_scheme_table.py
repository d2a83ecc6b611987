"""Schemes beside one another: what they cost, what they lose, and which one is taken."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc

convolution, convolution_schemes = (
    jc.factorization.convolution,
    jc.factorization.convolution_schemes,
)
MATRIX = ["output", "input", "spatial"]


def draw(shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


def params():
    """Kernels of which other schemes are the best."""
    spatial = jnp.einsum("yir,xro->yxio", draw((3, 8, 3)), draw((3, 3, 8), 1))
    return {
        "spatial": spatial + 1e-3 * draw((3, 3, 8, 8)),
        "input": jnp.einsum("ir,yxro->yxio", draw((8, 2)), draw((3, 3, 2, 8))),
        "output": jnp.einsum("yxir,ro->yxio", draw((3, 3, 8, 2)), draw((2, 8))),
        "tiny": draw((1, 1, 1, 8)),
        "dense": draw((8, 8)),
        "bias": jnp.ones(8),
        "none": None,
    }


def error(w, new):
    w, new = (np.asarray(x, np.float64) for x in (w, new))
    return np.linalg.norm(w - new) / np.linalg.norm(w)


def test_predicted_is_measured_and_within_the_cost():
    whole = params()
    found = convolution_schemes(whole, 0.4, schemes=[*MATRIX, "tucker"])
    assert set(found) == {"spatial", "input", "output", "tiny"}
    for path in MATRIX:
        assert found[path].best == path
        for scheme, fit in found[path].fits.items():
            rank, w = fit.rank, {"w": whole[path]}
            p = convolution(rank, scheme=scheme)
            packed = jc.pack(p, w)["w"]
            assert fit.cost <= 0.4
            np.testing.assert_allclose(fit.cost, packed.nbytes / w["w"].nbytes, rtol=1e-6)
            np.testing.assert_allclose(fit.error, error(w["w"], jc.compress(p, w)["w"]), atol=2e-6)
            if scheme == "tucker":
                continue
            # The root of the dropped squares; and one rank more would not fit.
            order = {"output": (0, 1, 2, 3), "input": (2, 0, 1, 3), "spatial": (0, 2, 1, 3)}[scheme]
            rows = {"output": 72, "input": 8, "spatial": 24}[scheme]
            m = np.asarray(w["w"], np.float64).transpose(order).reshape(rows, -1)
            s = np.linalg.svd(m, compute_uv=False) ** 2
            np.testing.assert_allclose(fit.error, np.sqrt(s[rank:].sum() / s.sum()), atol=1e-5)
            assert (rank + 1) * sum(m.shape) > 0.4 * m.size


def test_tucker_takes_the_pair_with_the_smallest_bound():
    w = draw((3, 3, 6, 8)) * jnp.exp(draw((1, 1, 6, 1)))
    tails = []
    for axis in (-2, -1):
        side = np.moveaxis(np.asarray(w, np.float64), axis, 0).reshape(w.shape[axis], -1)
        s = np.linalg.svd(side, compute_uv=False) ** 2
        tails.append([s[r:].sum() for r in range(len(s) + 1)])
    best = min(
        (tails[0][p] + tails[1][q], (p, q))
        for p in range(1, 7)
        for q in range(1, 9)
        if (p < 6) * 6 * p + 9 * p * q + (q < 8) * 8 * q <= 0.5 * 432
    )
    found = convolution_schemes({"w": w}, 0.5, schemes=["tucker"])["w"].fits["tucker"]
    assert found.rank == best[1]


def test_auto_and_the_mapping_give_the_best():
    whole = params()
    names = [*MATRIX, "tucker"]
    found = convolution_schemes(whole, 0.3, schemes=names)
    best = {path: choice.best for path, choice in found.items()}
    by_map = jc.pack(convolution(fraction=0.3, scheme=best), whole)
    p = convolution(fraction=0.3, scheme=names)
    held = p.find(whole)
    by_auto = p.pack(whole, held)
    for path in MATRIX:
        assert names[int(held[path].best)] == best[path]
        assert jax.tree.structure(by_auto[path]) == jax.tree.structure(by_map[path])
        np.testing.assert_allclose(by_auto[path].todense(), by_map[path].todense(), atol=1e-5)
        assert by_auto[path].nbytes <= 0.3 * whole[path].nbytes
    for small in (by_map, by_auto):
        for path in ("tiny", "dense", "bias"):
            np.testing.assert_array_equal(small[path], whole[path])


def test_all_five():
    w = {"w": draw((3, 3, 6, 8))}
    options = {"iterations": 5}
    found = convolution_schemes(w, 0.3, **options)["w"]
    assert list(found.fits) == ["output", "input", "spatial", "tucker", "cp"]
    packed = jc.pack(convolution(fraction=0.3, scheme="auto", **options), w)["w"]
    np.testing.assert_allclose(
        error(w["w"], packed.todense()), found.fits[found.best].error, atol=1e-5
    )
    cp = found.fits["cp"]
    assert cp.cost == pytest.approx(cp.rank * 20 / 432)
    assert cp.cost <= 0.3 < (cp.rank + 1) * 20 / 432


def test_what_does_not_get_smaller_stays_dense():
    w = {"tiny": draw((1, 1, 1, 8)), "empty": jnp.zeros((3, 3, 0, 8))}
    found = convolution_schemes(w, 0.9)
    assert {path: choice.best for path, choice in found.items()} == {
        "tiny": "dense",
        "empty": "dense",
    }
    for scheme in ("output", "auto"):
        small = jc.pack(convolution(fraction=0.9, scheme=scheme), w)
        np.testing.assert_array_equal(small["tiny"], w["tiny"])
    # A mapping leaves alone what it does not name.
    two = {"a": draw((3, 3, 6, 8)), "b": draw((3, 3, 6, 8)), "c": draw((3, 3, 6, 8))}
    small = jc.pack(convolution(1, scheme={"a": "input", "b": "dense"}), two)
    assert isinstance(small["a"], jc.arrays.ConvChain)
    np.testing.assert_array_equal(small["b"], two["b"])
    np.testing.assert_array_equal(small["c"], two["c"])


def test_where_not_even_rank_one_fits_it_is_rank_one():
    w = {"w": draw((3, 3, 6, 8))}
    found = convolution_schemes(w, 0.05, schemes=["output", "spatial"])["w"]
    assert [fit.rank for fit in found.fits.values()] == [1, 1]
    assert found.best == "spatial"  # the smaller one
    packed = jc.pack(convolution(fraction=0.05, scheme=["output", "spatial"]), w)["w"]
    assert packed.nbytes == 4 * 42


@pytest.mark.parametrize("scheme", [*MATRIX, "tucker", "cp"])
def test_costs_in_multiply_adds_are_those_of_the_lifted_function(scheme):
    w, x = {"w": draw((3, 3, 6, 8))}, draw((1, 11, 13, 6))

    def fn(p, x):
        return jax.lax.conv_general_dilated(
            x, p["w"], (2, 3), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def multiply_adds(fn, *args):
        eqns = jax.make_jaxpr(fn)(*args).jaxpr.eqns
        total = 0
        for eqn in eqns:
            if eqn.primitive.name == "conv_general_dilated":
                kernel, out = eqn.invars[1].aval, eqn.outvars[0].aval
                features = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
                total += out.size * kernel.size // features
        return total

    sizes = {"w": ((11, 13), (5, 4))}
    options = {"sizes": sizes, "iterations": 2}
    fit = convolution_schemes(w, 0.6, schemes=[scheme], **options)["w"].fits[scheme]
    packed = jc.pack(convolution(fraction=0.6, scheme=scheme, **options), w)
    ratio = multiply_adds(jc.lift(fn), packed, x) / multiply_adds(fn, w, x)
    np.testing.assert_allclose(fit.cost, ratio, rtol=1e-6)
    assert ratio <= 0.6


def test_bad_input():
    w = {"w": draw((3, 3, 4, 4))}
    with pytest.raises(ValueError, match="convolution_schemes: `fraction`"):
        convolution_schemes(w, 1.5)
    with pytest.raises(ValueError, match="convolution_schemes: `schemes` must be one of"):
        convolution_schemes(w, 0.5, schemes=["svd"])
    with pytest.raises(TypeError, match=r"convolution_schemes: `params` must be concrete.*'w'"):
        jax.jit(lambda w: convolution_schemes(w, 0.5))(w)
    with pytest.raises(ValueError, match=r"convolution_schemes: `sizes` must have two .*'w'"):
        convolution_schemes(w, 0.5, sizes={"w": ((3, 3), (3,))})
    with pytest.raises(ValueError, match="convolution_schemes: `method`"):
        convolution_schemes(w, 0.5, method="fast")
    assert convolution_schemes({"b": jnp.ones(3), "m": jnp.ones((3, 3))}, 0.5) == {}
