"""Kernels of low rank against NumPy float64: SVD, HOSVD and its iterations, least squares."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from jaxcompress.factorization import _cp
from tests.conftest import counting_jit, lenient, mesh_of

convolution = jc.factorization.convolution
SHAPES = [(3, 3, 6, 8), (5, 4, 6), (2, 3, 2, 4, 5), (1, 1, 6, 8), (3, 2, 8, 2)]
MATRIX = ["output", "input", "spatial"]
SCHEMES = [*MATRIX, "tucker", "cp"]


def draw(shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), dtype)


def unfold(w, scheme):
    """The matrix of the first convolution's axes by the second's, and what folds it back."""
    w, n = np.asarray(w, np.float64), w.ndim - 2
    mine = {"output": list(range(n)), "input": [], "spatial": [0]}[scheme]
    order = [*mine, n, *(d for d in range(n) if d not in mine), n + 1]
    moved = w.transpose(order)
    rows = int(np.prod(moved.shape[: len(mine) + 1]))

    def fold(m):
        return m.reshape(moved.shape).transpose(np.argsort(order))

    return moved.reshape(rows, -1), fold


def truncated(w, scheme, rank):
    matrix, fold = unfold(w, scheme)
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return fold((u[:, :rank] * s[:rank]) @ vt[:rank]), s


def hooi(w, p, q, iterations):
    """De Lathauwer's iterations from the truncated bases of both sides."""
    w = np.asarray(w, np.float64)
    side = lambda w, axis: np.moveaxis(w, axis, 0).reshape(w.shape[axis], -1)  # noqa: E731
    basis = lambda w, axis, r: np.linalg.svd(side(w, axis))[0][:, :r]  # noqa: E731
    a, b = basis(w, -2, p), basis(w, -1, q)
    for _ in range(iterations):
        a = basis(w @ b, -2, p)
        b = basis(np.einsum("...io,ip->...po", w, a), -1, q)
    return np.einsum("...io,ij,op->...jp", w, a @ a.T, b @ b.T)


def loss_of(w, new):
    return float(np.square(np.asarray(w, np.float64) - np.asarray(new, np.float64)).sum())


def at_ranks(w, **options):
    """A function of the rank, one program for all."""
    return jax.jit(lambda rank: jc.compress(convolution(rank, **options), {"w": w})["w"])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scheme", MATRIX)
def test_matrix_schemes_are_truncated_svds(scheme, shape):
    w = draw(shape)
    compress = at_ranks(w, scheme=scheme)
    for rank in (0, 1, 3, 100):
        want, s = truncated(w, scheme, rank)
        new = compress(jnp.asarray(rank))
        np.testing.assert_allclose(new, want, atol=2e-5)
        np.testing.assert_allclose(loss_of(w, new), (s[rank:] ** 2).sum(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("scheme", MATRIX)
def test_energy_is_of_squared_singular_values(scheme):
    w = draw((3, 3, 6, 8))
    s = np.linalg.svd(unfold(w, scheme)[0], compute_uv=False) ** 2
    n = len(s)
    f = jax.jit(lambda e: jc.compress(convolution(energy=e, scheme=scheme), {"w": w})["w"])
    for energy in (0.0, 0.5, 0.9, 1.0):
        rank = next((r for r in range(n + 1) if s[:r].sum() >= energy * s.sum() * (1 - 1e-6)), n)
        np.testing.assert_allclose(f(energy), truncated(w, scheme, rank)[0], atol=2e-5)


class TestTucker:
    @pytest.mark.parametrize("shape", [(3, 3, 6, 8), (5, 4, 6), (3, 2, 8, 2)])
    @pytest.mark.parametrize("iterations", [0, 4])
    def test_equals_numpy(self, shape, iterations):
        w = draw(shape)
        compress = at_ranks(w, scheme="tucker", iterations=iterations)
        for ranks in [(2, 3), (1, 1), (6, 2), (100, 100)]:
            new = compress(tuple(map(jnp.asarray, ranks)))
            np.testing.assert_allclose(new, hooi(w, *ranks, iterations), atol=1e-4)
            # At most what both sides drop.
            dropped = 0.0
            for axis, rank in zip((-2, -1), ranks, strict=True):
                side = np.moveaxis(np.asarray(w, np.float64), axis, 0).reshape(shape[axis], -1)
                dropped += (np.linalg.svd(side)[1][rank:] ** 2).sum()
            assert loss_of(w, new) <= dropped * (1 + 1e-5) + 1e-8

    def test_iterations_never_lose(self):
        f = jax.jit(
            lambda w: [
                jc.compress(convolution((2, 2), scheme="tucker", iterations=n), {"w": w})["w"]
                for n in (0, 1, 10)
            ]
        )
        gained = 0
        for seed in range(6):
            w = draw((3, 3, 6, 8), seed) * jnp.exp(draw((1, 1, 6, 8), seed + 50))
            losses = [loss_of(w, new) for new in f(w)]
            assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(losses))
            gained += losses[-1] < 0.999 * losses[0]
        assert gained >= 3

    def test_bases_are_orthonormal_beyond_the_true_rank(self):
        w = {"w": draw((1, 1, 8, 1)) * draw((1, 1, 1, 3))}
        for iterations in (0, 3):
            p = convolution((3, 3), scheme="tucker", iterations=iterations)
            found = p.find(w)["w"]
            for basis in (found.inputs, found.outputs):
                np.testing.assert_allclose(basis.T @ basis, np.eye(3), atol=1e-5)

    def test_one_rank_or_energy_for_both_sides(self):
        w = {"w": draw((3, 3, 6, 8))}
        for kind, value in (("rank", 3), ("energy", 0.7)):
            one, two = (
                jc.compress(convolution(**{kind: v}, scheme="tucker"), w)["w"]
                for v in (value, (value, value))
            )
            np.testing.assert_array_equal(one, two)

    def test_energy_per_side(self):
        w = draw((3, 3, 6, 8))
        found = convolution(energy=(0.5, 0.9), scheme="tucker").find({"w": w})["w"]
        for axis, energy, basis in ((-2, 0.5, found.inputs), (-1, 0.9, found.outputs)):
            side = np.moveaxis(np.asarray(w, np.float64), axis, 0).reshape(w.shape[axis], -1)
            s = np.linalg.svd(side, compute_uv=False) ** 2
            rank = next(r for r in range(9) if s[:r].sum() >= energy * s.sum())
            assert int((np.asarray(basis) != 0).any(axis=0).sum()) == rank

    def test_a_full_side_is_part_of_the_core(self):
        w = {"w": draw((3, 3, 6, 8))}
        packed = jc.pack(convolution((6, 2), scheme="tucker"), w)["w"]
        assert [s.shape for s in packed.stages] == [(3, 3, 6, 2), (1, 1, 2, 8)]
        packed = jc.pack(convolution((2, 8), scheme="tucker"), w)["w"]
        assert [s.shape for s in packed.stages] == [(1, 1, 6, 2), (3, 3, 2, 8)]


def khatri_rao(factors):
    out = np.asarray(factors[0], np.float64)
    for f in factors[1:]:
        out = np.einsum("ar,br->abr", out, np.asarray(f, np.float64)).reshape(-1, out.shape[1])
    return out


def als(w, rank, sweeps, seed):
    """Plain alternating least squares; the loss after the last one."""
    w = np.asarray(w, np.float64)
    rng = np.random.default_rng(seed)
    factors = [rng.normal(size=(n, rank)) for n in w.shape]
    for _ in range(sweeps):
        for axis in range(w.ndim):
            k = khatri_rao([f for i, f in enumerate(factors) if i != axis])
            m = np.moveaxis(w, axis, -1).reshape(-1, w.shape[axis])
            factors[axis] = np.linalg.lstsq(k, m, rcond=None)[0].T
    return loss_of(w, khatri_rao(factors).sum(1).reshape(w.shape))


class TestCP:
    def test_projects_by_least_squares_on_the_held_factors(self):
        w, other = draw((3, 3, 6, 8)), draw((3, 3, 6, 8), 1)
        p = convolution(2, scheme="cp", iterations=3)
        held = p.find({"w": w})
        k = khatri_rao([*held["w"].spatial, held["w"].inputs])
        for x in (w, other):
            m = np.asarray(x, np.float64).reshape(-1, 8)
            want = (k @ np.linalg.lstsq(k, m, rcond=None)[0]).reshape(x.shape)
            np.testing.assert_allclose(p.project({"w": x}, held)["w"], want, atol=1e-5)

    def test_finds_a_planted_sum_of_terms(self):
        shape = (5, 4, 6)
        rng = np.random.default_rng(sum(shape))
        w = khatri_rao([rng.normal(size=(n, 3)) for n in shape]).sum(1).reshape(shape)
        w = {"w": jnp.asarray(w, jnp.float32)}
        new = jc.compress(convolution(3, scheme="cp", iterations=200), w)["w"]
        assert loss_of(w["w"], new) < 1e-4 * float(jnp.sum(jnp.square(w["w"])))

    def test_is_no_worse_than_plain_iterations(self):
        w = draw((3, 3, 6, 8))
        at = [at_ranks(w, scheme="cp", max_rank=8, iterations=n) for n in (0, 100)]
        terms = np.linalg.svd(np.asarray(w, np.float64), compute_uv=False)
        places = np.sort(terms.ravel())[::-1]
        for rank in (1, 3, 8):
            losses = [loss_of(w, compress(jnp.asarray(rank))) for compress in at]
            assert losses[0] >= losses[1] * (1 - 1e-6)
            # It starts at the largest terms of all places, or better.
            assert losses[0] <= (places[rank:] ** 2).sum() * (1 + 1e-5)
            plain = np.median([als(w, rank, 100, seed) for seed in range(5)])
            assert losses[1] <= 1.02 * plain

    def test_of_a_matrix_is_its_svd(self):
        w = draw((1, 1, 6, 8))
        new = jc.compress(convolution(2, scheme="cp", iterations=200), {"w": w})["w"]
        want = loss_of(w, truncated(w, "output", 2)[0])
        np.testing.assert_allclose(loss_of(w, new), want, rtol=1e-3)

    def test_nearly_dependent_terms_are_projected_on_to_the_last_digits(self):
        held_of = jax.jit(_cp._held)
        for spread in (0.1, 0.02, 0.01, 0.005, 0.0):
            for seed in range(6):
                one, several = ([draw((n, r), seed) for n in (3, 3, 6)] for r in (1, 4))
                held = held_of([a + spread * b for a, b in zip(one, several, strict=True)])
                once = held.project(draw((3, 3, 6, 8)))
                np.testing.assert_allclose(held.project(once), once, atol=2e-6)

    def test_terms_that_depend_on_one_another(self):
        w = jnp.broadcast_to(draw((1, 1, 6, 1)), (3, 3, 6, 8))
        p = convolution(8, scheme="cp", max_rank=8, iterations=100)
        held = p.find({"w": w})
        new = p.project({"w": w}, held)["w"]
        np.testing.assert_allclose(new, w, atol=1e-4)
        np.testing.assert_allclose(held["w"].pack(w, "w").todense(), new, atol=1e-4)


FULL = {"output": 8, "input": 6, "spatial": 18, "tucker": (6, 8), "cp": 54}
USES = {
    "same, stride 2": {"padding": "SAME", "window_strides": (2, 2)},
    "valid, stride 2": {"padding": "VALID", "window_strides": (2, 2)},
    "same, dilation 2": {"padding": "SAME", "rhs_dilation": (2, 2), "window_strides": (1, 1)},
    "valid, dilation 2": {"padding": "VALID", "rhs_dilation": (2, 2), "window_strides": (1, 1)},
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_full_rank_is_exact_under_lift(scheme):
    w, x = draw((3, 3, 6, 8)), draw((2, 9, 8, 6), 1)
    p = convolution(FULL[scheme], scheme=scheme, iterations=2)
    held = p.find({"w": w})["w"]
    np.testing.assert_allclose(held.project(w), w, atol=2e-5)
    # At full rank it is not smaller, hence by hand.
    packed = {"w": held.pack(w, "w")}
    assert jc.arrays.is_compressed(packed["w"])
    for use, options in USES.items():
        for numbers in (("NHWC", "HWIO", "NHWC"), ("NCHW", "HWIO", "NCHW")):
            if numbers[0] == "NCHW" and use != "same, stride 2":
                continue

            def fn(p, x, options=options, numbers=numbers):
                return jax.lax.conv_general_dilated(x, p["w"], dimension_numbers=numbers, **options)

            inputs = x if numbers[0] == "NHWC" else x.transpose(0, 3, 1, 2)
            got = jax.jit(jc.lift(fn))(packed, inputs)
            np.testing.assert_allclose(got, fn({"w": w}, inputs), atol=1e-4)
    assert not jc.arrays.is_compressed(jc.pack(p, {"w": w})["w"])


KNOBS = {
    **{s: {"rank": 2, "scheme": s} for s in SCHEMES},
    "tucker, pair": {"rank": (3, 2), "scheme": "tucker"},
    "several": {"fraction": 0.4, "scheme": ["output", "spatial", "tucker"]},
}
SIZES = {"output": 2 * (54 + 8), "input": 2 * (6 + 72), "spatial": 2 * (18 + 24)} | {
    "tucker": 2 * 6 + 36 + 2 * 8, "cp": 2 * (6 + 3 + 3 + 8), "tucker, pair": 18 + 54 + 16,
}  # fmt: skip


@pytest.mark.parametrize("name", KNOBS)
def test_laws(name, tmp_path):
    w, other = {"w": draw((3, 3, 6, 8))}, {"w": draw((3, 3, 6, 8), 1)}
    p = convolution(**KNOBS[name], iterations=3)
    held = p.find(w)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), jax.eval_shape(p.find, w))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), held) == shapes
    for params in (w, other):
        new = jax.jit(p.project)(params, held)
        np.testing.assert_allclose(p.project(new, held)["w"], new["w"], atol=1e-5)
        packed = jc.pack(p, params) if params is w else p.pack(params, held)
        assert packed["w"].nbytes < w["w"].nbytes
        if name in SIZES:
            assert packed["w"].nbytes == 4 * SIZES[name]
        np.testing.assert_allclose(packed["w"].todense(), new["w"], atol=2e-5)
    # Orthogonal, hence linear and symmetric.
    a, b = (p.project(x, held)["w"] for x in (w, other))
    both = p.project({"w": w["w"] + 2 * other["w"]}, held)["w"]
    np.testing.assert_allclose(both, a + 2 * b, atol=2e-5)
    np.testing.assert_allclose(jnp.sum(a * other["w"]), jnp.sum(w["w"] * b), rtol=1e-3, atol=1e-3)
    gradient = jax.grad(lambda w: jnp.sum(jc.compress(p, w)["w"] * other["w"]))(w)["w"]
    np.testing.assert_allclose(gradient, b, atol=1e-5)
    jc.save(tmp_path / "m", packed)
    back = jc.load(tmp_path / "m")["w"]
    np.testing.assert_array_equal(back.todense(), packed["w"].todense())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_vmap_over_ranks_equals_a_loop_and_compiles_once(scheme):
    w, options = {"w": draw((3, 3, 6, 8))}, {"scheme": scheme, "max_rank": 4, "iterations": 3}
    run = counting_jit(lambda r: jc.compress(convolution(r, **options), w)["w"])
    ranks = jnp.array([0, 1, 3, 9])
    mapped = jax.vmap(run)(ranks)
    run.traces = 0
    for r, new in zip(ranks, mapped, strict=True):
        np.testing.assert_allclose(new, run(r), atol=2e-5)
    assert run.traces <= 1


def test_vmap_over_fractions_equals_a_loop():
    scheme = ["input", "spatial", "tucker"]
    w = {"w": draw((3, 3, 6, 8))}
    one = jax.jit(lambda f: jc.compress(convolution(fraction=f, scheme=scheme), w)["w"])
    grid = jnp.array([0.0, 0.2, 0.5, 1.0])
    for f, new in zip(grid, jax.vmap(one)(grid), strict=True):
        np.testing.assert_allclose(new, one(f), atol=2e-5)
    static = jc.compress(convolution(fraction=0.5, scheme=scheme), w)["w"]
    np.testing.assert_allclose(one(0.5), static, atol=2e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_narrow_dtypes(scheme):
    dtype = jnp.float16 if scheme == "spatial" else jnp.bfloat16
    w = {"w": draw((3, 3, 6, 8)).astype(dtype)}
    p = convolution(2, scheme=scheme, iterations=3)
    new, packed = jc.compress(p, w)["w"], jc.pack(p, w)["w"]
    assert new.dtype == packed.dtype == dtype
    wide = jc.compress(p, jax.tree.map(lambda x: x.astype(jnp.float32), w))["w"]
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(new.astype(jnp.float32), wide, atol=2 * eps)
    np.testing.assert_allclose(packed.todense().astype(jnp.float32), wide, atol=8 * eps)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_edges(scheme):
    p = convolution(2, scheme=scheme, iterations=3)
    bad = draw((3, 3, 6, 8)).at[1, 2, 3, 4].set(jnp.nan)
    assert np.isnan(jc.compress(p, {"w": bad})["w"]).all()
    assert np.isnan(jc.pack(p, {"w": bad})["w"].todense()).all()
    assert np.isnan(jc.compress(p, {"w": bad.at[1, 2, 3, 4].set(jnp.inf)})["w"]).all()
    np.testing.assert_array_equal(jc.compress(p, {"w": jnp.zeros((3, 3, 6, 8))})["w"], 0)
    for shape in ((0, 3, 6, 8), (3, 3, 0, 8), (3, 3, 6, 0)):
        empty = {"w": jnp.zeros(shape)}
        assert jc.compress(p, empty)["w"].shape == shape
        assert jc.pack(p, empty)["w"].shape == shape
    none = convolution(0, scheme=scheme)
    np.testing.assert_array_equal(jc.compress(none, {"w": draw((3, 3, 6, 8))})["w"], 0)
    assert jc.pack(none, {"w": draw((3, 3, 6, 8))})["w"].nbytes == 0
    tiny = draw((3, 3, 6, 8)) * 1e-30
    scaled = jc.compress(p, {"w": tiny})["w"] * 1e30
    np.testing.assert_allclose(scaled, jc.compress(p, {"w": tiny * 1e30})["w"], atol=1e-4)


@pytest.mark.parametrize("scheme", ["spatial", "tucker"])
def test_in_training(scheme):
    w, goal = {"w": draw((3, 3, 6, 8)), "b": jnp.ones(8)}, draw((3, 3, 6, 8), 1)
    fall = lambda step: jnp.where(jnp.asarray(step) < 4, 4.0, 2.0)  # noqa: E731
    p = jc.scheduled(convolution)(rank=fall, scheme=scheme, max_rank=4)
    opt = jc.projected(lenient(optax.adam(0.05)), jc.every(2, p, begin=0, end=9))

    def step(carry, _):
        w, state = carry
        updates, state = opt.update({"w": w["w"] - goal, "b": w["b"]}, state, w)
        return (optax.apply_updates(w, updates), state), None

    start = (w, opt.init(w))
    (w, state), _ = jax.lax.scan(step, start, length=8)
    packed = jc.pack(state, w)["w"]
    assert packed.shape == (3, 3, 6, 8)
    assert packed.nbytes == 4 * SIZES[scheme]
    np.testing.assert_allclose(packed.todense(), w["w"], atol=1e-5)
    assert loss_of(w["w"], goal) < loss_of(start[0]["w"], goal)


def test_other_leaves():
    w = {"conv": draw((3, 3, 6, 8)), "dense": draw((6, 8)), "bias": jnp.ones(8), "n": jnp.arange(3)}
    small = jc.pack(convolution(1, scheme="tucker"), {**w, "none": None})
    assert small["dense"] is w["dense"] or (small["dense"] == w["dense"]).all()
    assert jc.arrays.is_compressed(small["conv"])
    only = jc.masked(convolution(1), "dense")
    with pytest.raises(ValueError, match=r"three or more dim.*float32\[6, 8\] at 'dense'"):
        only.find(w)
    with pytest.raises(TypeError, match=r"convolution: `params` must hold real.*at 'n'"):
        jc.masked(convolution(1), "n").find(w)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("auto", "several"), *(("explicit", name) for name in ("spatial", "tucker", "cp", "several"))],
)
def test_sharded_equals_one_device(kind, name):
    w = {"w": draw((3, 3, 6, 8))}
    p = convolution(**KNOBS[name], iterations=3)
    want = jc.compress(p, w)["w"]
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(w, NamedSharding(mesh, P(None, None, None, "d")))
        new = jax.jit(lambda w: jc.compress(p, w))(sharded)["w"]
        if kind == "explicit":
            assert jax.typeof(new).sharding.spec == P(None, None, None, "d")
    np.testing.assert_allclose(new, want, atol=2e-5)


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (lambda: convolution(), ValueError, "`rank` must be given, or else"),
        (lambda: convolution(1, 0.5), ValueError, "only one of them"),
        (lambda: convolution(-1), ValueError, "`rank`.*at least 0"),
        (lambda: convolution(energy=1.5), ValueError, "`energy`"),
        (lambda: convolution(fraction=2.0), ValueError, "`fraction`"),
        (lambda: convolution(fraction=(0.1, 0.2)), ValueError, "`fraction` must be a number"),
        (lambda: convolution((1, 2, 3), scheme="tucker"), ValueError, "two of them"),
        (lambda: convolution((1, 2)), ValueError, "'tucker', got two with 'output' at 'w'"),
        (lambda: convolution(energy=0.5, scheme="cp"), ValueError, "'cp'.*at 'w'"),
        (lambda: convolution(1, scheme="auto"), ValueError, "come with `fraction`"),
        (lambda: convolution(1, scheme="svd"), ValueError, "`scheme` must be one of"),
        (lambda: convolution(1, scheme=[]), ValueError, "`scheme` must name one"),
        (lambda: convolution(1, scheme={"v": "cp"}), ValueError, r"name leaves, got \['v'\]"),
        (lambda: convolution(1, scheme={"w": "svd"}), ValueError, "`scheme` must be one of"),
        (lambda: convolution(1, max_rank=0.5), TypeError, "`max_rank`"),
        (lambda: convolution(1, iterations=-1), ValueError, "`iterations`"),
        (lambda: convolution(1, method="fast"), ValueError, "`method`"),
        (lambda: convolution(fraction=0.5, sizes={"w": ((4,), (4,))}), ValueError, "`sizes`.*'w'"),
    ],
)
def test_bad_input(make, kind, text):
    with pytest.raises(kind, match=f"convolution: .*{text}"):
        make().find({"w": jnp.ones((3, 3, 4, 4))})
