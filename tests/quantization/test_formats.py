"""Formats against ml_dtypes, NumPy float64 and torchao; what is packed, multiplied and saved."""

import statistics
import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress import arrays

q = jc.quantization

FLOATS = {
    "E4M3": (q.E4M3, ml_dtypes.float8_e4m3fn),
    "E5M2": (q.E5M2, ml_dtypes.float8_e5m2),
    "E2M3": (q.E2M3, ml_dtypes.float6_e2m3fn),
    "E3M2": (q.E3M2, ml_dtypes.float6_e3m2fn),
    "E2M1": (q.E2M1, ml_dtypes.float4_e2m1fn),
}
THIRDS = q.table([-1.0, -1 / 3, 1 / 3, 1.0])


def draw(*shape, seed=0, scale=1.0):
    drawn = np.random.default_rng(seed).normal(size=shape) * scale
    return drawn.astype(np.float32)


def probes(values):
    """Values, the middles between them, their neighbours, many sizes, and what is special."""
    values = np.float32(values)
    middles = (values[1:].astype(np.float64) + values[:-1]) / 2
    rng = np.random.default_rng(0)
    sizes = rng.normal(size=2000) * 10.0 ** rng.uniform(-7, 6, 2000)
    x = np.concatenate([values, middles, sizes, [0.0, -0.0, 1e-40, np.inf, -np.inf]])
    x = x.astype(np.float32)
    near = [np.nextafter(x, np.float32(s) * np.float32(np.inf)) for s in (1, -1)]
    return np.concatenate([x, *near])


@pytest.mark.parametrize("name", FLOATS)
def test_rounding_is_the_cast_of_ml_dtypes_bit_for_bit(name):
    kind, dtype = FLOATS[name]
    every = np.arange(1 << kind.bits, dtype=np.uint8).view(dtype).astype(np.float32)
    every = every[np.isfinite(every)]
    assert list(kind.values) == sorted(set(every.tolist()))
    assert kind.max == float(ml_dtypes.finfo(dtype).max)
    x = probes(kind.values)
    want = np.clip(x, -kind.max, kind.max).astype(dtype)
    got = np.asarray(jax.jit(kind.round)(x))
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got.view(np.uint32), want.astype(np.float32).view(np.uint32))
    np.testing.assert_array_equal(kind.round(jnp.asarray(x)), got)
    if kind.dtype is None:
        np.testing.assert_array_equal(kind.codes(got), want.view(np.uint8))
        np.testing.assert_array_equal(kind.codebook()[want.view(np.uint8)], got)
    else:
        assert np.dtype(getattr(jnp, kind.dtype)) == dtype
    assert np.isnan(kind.round(jnp.float32(np.nan)))


def test_the_powers_of_two_are_rounded_down():
    x = np.float32([3.0, 4.0, 0.75, 1e-38, 2.0**127, 1e38])
    got = q.E8M0.round(jnp.asarray(x))
    np.testing.assert_array_equal(got, 2.0 ** np.floor(np.log2(np.maximum(x, 2.0**-126))))
    np.testing.assert_array_equal(np.asarray(got.astype(jnp.float8_e8m0fnu), np.float32), got)
    assert q.E8M0.round(jnp.zeros(())) == 2.0**-126


def test_nf4_are_the_quantiles_of_the_normal_distribution():
    # Appendix E of the paper: an asymmetric type, the offset of its published code.
    quantile = statistics.NormalDist().inv_cdf
    offset = 0.9677083
    positive = [quantile(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    negative = [-quantile(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    want = np.sort([*positive, 0.0, *negative])
    np.testing.assert_allclose(q.NF4.values, want / np.abs(want).max(), atol=2e-7)


@pytest.mark.parametrize("kind", [q.NF4, THIRDS, q.table(np.linspace(-2, 3, 200))])
def test_tables_round_to_the_nearest(kind):
    x = draw(4000, scale=1.5)
    values = np.float64(kind.values)
    got = np.asarray(jax.jit(kind.round)(x), np.float64)
    best = np.abs(values[None] - x[:, None]).min(1)
    np.testing.assert_allclose(np.abs(got - x), best, rtol=0, atol=1e-7)
    assert np.isin(np.float32(got), np.float32(values)).all()
    np.testing.assert_array_equal(kind.codebook()[kind.codes(got)], np.float32(got))
    special = kind.round(jnp.array([np.nan, np.inf, -np.inf]))
    np.testing.assert_array_equal(special, np.float32([np.nan, values[-1], values[0]]))


def test_an_equal_distance_goes_to_the_smaller_value_of_a_table():
    kind = q.table([4, 0, 1, 0.0, -0.0, 3])
    assert (kind.values, kind.bits, kind.max) == ((0.0, 1.0, 3.0, 4.0), 2, 4.0)
    np.testing.assert_array_equal(kind.round(jnp.array([0.5, 2.0, 3.5])), [0, 1, 3])


def power_of_two(largest, top):
    """The rule of the OCP specification, section 6.3."""
    return 2.0 ** (np.floor(np.log2(largest)) - np.floor(np.log2(top)))


def by_hand(w, kind, runs, scale_of):
    """Each run of weights in float64: its scale, then the nearest value, ties to even codes."""
    out, w = np.zeros(w.shape), w.astype(np.float64)
    middles = np.float64(kind.values)
    for run in runs:
        largest = np.abs(w[run]).max(initial=0.0)
        if largest == 0:
            continue
        scale = scale_of(largest)
        distance = np.abs(w[run][..., None] / scale - middles)
        out[run] = middles[distance.argmin(-1)] * scale
    return out


def tiles(shape, sizes):
    """The runs that blocks cut a matrix into; ragged at the ends."""
    rows, cols = (range(0, n, size) for n, size in zip(shape, sizes, strict=True))
    return [np.s_[i : i + sizes[0], j : j + sizes[1]] for i in rows for j in cols]


W = draw(70, 24)
TOP = np.abs(W).max()


def second_then_block(largest):
    second = np.float64(TOP) / (448 * 6)
    return float(np.float32(largest / 6 / second).astype(ml_dtypes.float8_e4m3fn)) * second


# The projection, the format, the sizes of a run, the scale of a run, bytes of a scale.
ORACLES = {
    "fp8": (q.fp8(), q.E4M3, (70, 1), lambda m: m / 448, 4),
    "fp8 of the tensor": (q.fp8(q.E5M2, axis=None), q.E5M2, (70, 24), lambda m: m / 57344, 4),
    "fp8 in blocks": (q.fp8(blocks={-2: 32, -1: 10}), q.E4M3, (32, 10), lambda m: m / 448, 4),
    "nf4": (q.nf4(), q.NF4, (64, 1), lambda m: m, 4),
    "mxfp4": (q.mx(), q.E2M1, (32, 1), lambda m: power_of_two(m, 6), 1),
    "mxfp6": (q.mx(q.E2M3), q.E2M3, (32, 1), lambda m: power_of_two(m, 7.5), 1),
    "mxfp6 wide": (q.mx(q.E3M2), q.E3M2, (32, 1), lambda m: power_of_two(m, 28), 1),
    "mxfp8": (q.mx(q.E5M2), q.E5M2, (32, 1), lambda m: power_of_two(m, 57344), 1),
    "nvfp4": (q.nvfp4(), q.E2M1, (16, 1), second_then_block, 1),
    "clipped": (q.fp8(axis=0, clip=0.7), q.E4M3, (1, 24), lambda m: 0.7 * m / 448, 4),
}


@pytest.mark.parametrize("name", ORACLES)
def test_values_agree_with_float64_and_are_packed(name, tmp_path):
    p, kind, sizes, scale_of, scale_bytes = ORACLES[name]
    params = {"w": jnp.asarray(W)}
    held, project = jax.jit(p.find)(params), jax.jit(p.project)
    projected = project(params, held)["w"]
    runs = tiles(W.shape, sizes)
    got, want = np.asarray(projected, np.float64), by_hand(W, kind, runs, scale_of)
    # A weight within a float32 rounding of a tie may fall to either side.
    wrong = np.abs(got - want) > 1e-6 * np.abs(want)
    assert wrong.mean() < 1e-3
    np.testing.assert_allclose(np.abs(got - W)[wrong], np.abs(want - W)[wrong], rtol=1e-4)

    packed = p.pack(params, held)["w"]
    np.testing.assert_array_equal(packed.todense(), projected)
    np.testing.assert_array_equal(project({"w": projected}, held)["w"], projected)
    table = 0 if kind.dtype else 4 << kind.bits
    scales = len(runs) * scale_bytes + (4 if name == "nvfp4" else 0)
    assert packed.nbytes == W.size * kind.bits // 8 + table + scales
    jc.save(tmp_path / "w", packed)
    back = jc.load(tmp_path / "w")
    assert jax.tree.structure(back) == jax.tree.structure(packed)
    np.testing.assert_array_equal(back.todense(), projected)


@pytest.mark.parametrize("p", [q.fp8(), q.nvfp4(), q.floats(q.NF4, scales=q.E8M0, clip=0.9)])
def test_codes_do_not_depend_on_the_transformation(p):
    w = jnp.asarray(draw(64, 32))
    project = lambda w: jc.compress(p, w)  # noqa: E731
    eager = project(w)
    np.testing.assert_array_equal(eager, jax.jit(project)(w))
    np.testing.assert_array_equal(eager, jax.jit(jax.vmap(project))(w[None])[0])
    np.testing.assert_array_equal(eager, jax.vjp(project, w)[0])
    np.testing.assert_array_equal(eager, jc.pack(p, w).todense())


def test_double_quantization_is_smaller_and_hardly_worse():
    w = jnp.asarray(draw(128, 32))
    once, twice = (jc.pack(q.nf4(group_size=32, double=double), w) for double in (False, True))
    assert twice.nbytes == once.nbytes - 3 * 4 * 32 + 4
    assert isinstance(twice.scale, arrays.Quantized)
    errors = [float(jnp.linalg.norm(x.todense() - w)) for x in (once, twice)]
    assert errors[1] < 1.02 * errors[0]


def test_the_error_of_nvfp4_follows_the_weights():
    w = draw(64, 32)
    project = jax.jit(lambda w: jc.compress(q.nvfp4(), w))
    error = np.linalg.norm(project(w) - w) / np.linalg.norm(w)
    assert error < 0.11
    for factor in (2.0**-14, 1e-4, 1e4):
        small = w * np.float32(factor)
        scaled = np.linalg.norm(project(small) - small) / np.linalg.norm(small)
        np.testing.assert_allclose(scaled, error, rtol=1e-3)


def test_scales_at_the_ends_of_their_range():
    w = np.zeros((64, 4), np.float32)
    w[:, 1], w[0, 1] = 1e-30, 1.0
    w[:, 2], w[:, 3] = 3e38, 1.5e-38
    w[5, 2], w[6, 2] = np.inf, -np.inf
    for p in (q.nvfp4(), q.mx(), q.nf4(double=True), q.mx(q.E5M2)):
        project = jax.jit(lambda w, p=p: jc.compress(p, w))
        out = np.asarray(project(w))
        assert np.isfinite(out).all()
        np.testing.assert_array_equal(out[:, 0], 0)
        assert out[5, 2] == -out[6, 2] > 8e37
        w[0, 0] = np.nan
        nan = np.asarray(project(w))
        assert np.isnan(nan[0, 0])
        assert np.isnan(nan).sum() == 1
        w[0, 0] = 0.0
    with pytest.raises(ValueError, match=r"pack: `params` must be free of NaN.*'w'"):
        jc.pack(q.mx(), {"w": jnp.full((64, 32), jnp.nan)})


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("p", [q.nvfp4(), q.fp8()])
def test_narrow_types_pack_exactly(p, dtype):
    w = jnp.asarray(draw(64, 32), dtype)
    packed, held = jc.pack(p, w), p.find(w)
    assert packed.dtype == dtype
    projected = p.project(w, held)
    np.testing.assert_array_equal(packed.todense(), projected)
    np.testing.assert_array_equal(p.project(projected, held), projected)


def test_a_better_range_has_a_smaller_error():
    w, errors = draw(64, 32), []
    for ranges in (q.absmax, q.mse()):
        p = q.floats(q.E2M1, scales=q.E4M3, ranges=ranges)
        out = jax.jit(lambda w, p=p: jc.compress(p, w))(w)
        errors.append(float(jnp.linalg.norm(out - w)))
    assert errors[1] < 0.98 * errors[0]


PRUNED = {
    "fp8": q.fp8(),
    "mxfp4": q.mx(),
    "table without zero": q.floats(THIRDS),
}


@pytest.mark.parametrize(
    ("name", "nm"), [("fp8", None), ("mxfp4", (2, 4)), ("table without zero", None)]
)
def test_codes_of_sparse_leaves(name, nm):
    params = {"w": jnp.asarray(draw(64, 32))}
    prune = jc.prune(0.75) if nm is None else jc.prune(nm=nm)
    p = jc.chain(prune, PRUNED[name])
    packed, want = jc.pack(p, params)["w"], jc.compress(p, params)["w"]
    np.testing.assert_array_equal(packed.todense(), want)
    codes = packed.codes.codes if isinstance(packed.codes, arrays.Codebook) else packed.codes
    assert arrays.is_sparse(codes)
    assert packed.nbytes < 64 * 32
    some = jnp.array([3, 0])
    np.testing.assert_array_equal(arrays.take_rows(packed, some), want[some])
    if nm is None:
        other = jc.chain(PRUNED[name], prune)
        again = jc.pack(other, params)["w"]
        np.testing.assert_array_equal(again.todense(), jc.compress(other, params)["w"])
        assert again.nbytes < 64 * 32


LIFTED = {
    "fp8": q.fp8(),
    "nf4 per channel": q.floats(q.NF4, scales=q.E4M3),
    "mxfp8": q.floats(q.E4M3, scales=q.E8M0),
    "nvfp4": q.nvfp4(),
    "blocks": q.fp8(blocks={-2: 10, -1: 10}),
}


@pytest.mark.parametrize("name", LIFTED)
def test_products_and_lookups(name):
    small = jc.pack(LIFTED[name], {"w": jnp.asarray(draw(64, 32))})
    assert arrays.is_compressed(small["w"])
    dense, x = jc.todense(small)["w"], draw(5, 64, seed=1)
    calls = {
        "dot": lambda p, x: x @ p["w"],
        "transposed": lambda p, x: x[:, :32] @ p["w"].T,
        "half": lambda p, x: x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16),
        "rows": lambda p, x: p["w"][jnp.array([3, 0, 63])],
        "scanned": lambda p, x: jax.lax.scan(lambda c, w: (c + w, c), x[0, :32], p["w"])[0],
    }
    together = jax.jit(jc.lift(lambda p, x: {k: f(p, x) for k, f in calls.items()}))
    got = together(small, jnp.asarray(x))
    for key, f in calls.items():
        want = np.asarray(f({"w": dense}, jnp.asarray(x)), np.float64)
        tolerance = 2e-2 if key == "half" else 1e-5
        scale = np.abs(want).max()
        np.testing.assert_allclose(np.float64(got[key]) / scale, want / scale, atol=tolerance)
    dynamic = jc.lift(calls["dot"], activations="dynamic")(small, jnp.asarray(x))
    np.testing.assert_allclose(dynamic, x @ dense, rtol=1e-4, atol=1e-4)


def test_convolutions():
    small = jc.pack(LIFTED["blocks"], {"w": jnp.asarray(draw(3, 3, 16, 32))})
    assert arrays.is_compressed(small["w"])

    def conv(p, x):
        spec = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", dimension_numbers=spec)

    x = jnp.asarray(draw(1, 4, 4, 16, seed=1))
    want = conv(jc.todense(small), x)
    np.testing.assert_allclose(jax.jit(jc.lift(conv))(small, x), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_products_with_zero_points_that_are_no_integers(dtype):
    rng = np.random.default_rng(0)
    codes, zero = rng.integers(0, 16, (64, 8)), np.float32(rng.uniform(6, 9, (1, 8)))
    small = arrays.Quantized(
        arrays.pack_bits(codes, 4, signed=False),
        jnp.full((1, 8), 0.125, jnp.bfloat16),
        jnp.asarray(zero),
        np.dtype(dtype),
    )
    x = jnp.asarray(draw(5, 64), dtype)
    want = np.asarray(x, np.float64) @ ((codes - np.float64(zero)) * 0.125)
    fn = lambda w, x: x @ w  # noqa: E731
    for activations, tolerance in (("float", 2 * float(jnp.finfo(dtype).eps)), ("dynamic", 2e-2)):
        got = jax.jit(jc.lift(fn, activations=activations))(small, x)
        assert got.dtype == dtype
        np.testing.assert_allclose(np.float64(got), want, atol=tolerance * np.abs(want).max())


def test_rows_in_the_space_of_outputs():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(256, 32)) @ (np.eye(32) + 0.4 * rng.normal(size=(32, 32)))
    x, params = jnp.asarray(x, jnp.float32), {"w": jnp.asarray(draw(32, 16))}
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    stats = jc.calibrate(fn, params, [x], gram=True)
    p = q.nvfp4()
    plain = jc.compress(p, params)
    solved, held = jc.compress(p, params, stats=stats, return_structure=True)
    errors = [float(jnp.linalg.norm(fn(w, x) - fn(params, x))) for w in (plain, solved)]
    assert errors[1] < 0.8 * errors[0]
    # On the grid that was found before: it stays where it is.
    np.testing.assert_array_equal(p.project(solved, p.find(params))["w"], solved["w"])
    np.testing.assert_array_equal(p.pack(solved, held)["w"].todense(), solved["w"])


@pytest.fixture(scope="module")
def torchao():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("torchao")
        import torch
        from torchao.prototype.mx_formats import mx_tensor, nvfp4_tensor
    return torch, mx_tensor, nvfp4_tensor


def codes_of(packed):
    """The bits of each code, with the input axis last, as torchao has them."""
    codes = packed.codes
    if isinstance(codes, arrays.Codebook):
        return np.asarray(codes.codes.todense()).T
    return np.asarray(codes).view(np.uint8).T


@pytest.mark.parametrize("name", FLOATS)
def test_mx_codes_are_those_of_torchao(torchao, name):
    torch, mx_tensor, _ = torchao
    kind = FLOATS[name][0]
    theirs = {
        "E4M3": torch.float8_e4m3fn,
        "E5M2": torch.float8_e5m2,
        "E2M3": mx_tensor.DTYPE_FP6_E2M3,
        "E3M2": mx_tensor.DTYPE_FP6_E3M2,
        "E2M1": torch.float4_e2m1fn_x2,
    }[name]
    w = draw(64, 32, scale=0.02)
    scale, data = mx_tensor.to_mx(torch.from_numpy(w.T.copy()), theirs, 32)
    packed = jc.pack(q.mx(kind), {"w": jnp.asarray(w)})["w"]
    ours = np.asarray(packed.scale).view(np.uint8).T
    np.testing.assert_array_equal(ours, scale.view(torch.uint8).numpy())
    data = data.view(torch.uint8)
    if name == "E2M1":
        data = mx_tensor.unpack_uint4(data)
    np.testing.assert_array_equal(codes_of(packed), data.numpy().reshape(32, 64))


def test_nvfp4_codes_are_those_of_torchao(torchao):
    torch, mx_tensor, nvfp4_tensor = torchao
    w = draw(64, 32, scale=0.02)
    x = torch.from_numpy(w.T.copy())
    second = nvfp4_tensor.per_tensor_amax_to_scale(x.abs().max())
    scale, data = nvfp4_tensor.nvfp4_quantize(x, 16, second)
    packed = jc.pack(q.nvfp4(), {"w": jnp.asarray(w)})["w"]
    np.testing.assert_allclose(packed.scale.scale[0, 0], second.numpy(), rtol=3e-7)
    ours = np.asarray(packed.scale.codes).view(np.uint8).T
    np.testing.assert_array_equal(ours, scale.view(torch.uint8).numpy().reshape(32, 4))
    theirs = mx_tensor.unpack_uint4(data).numpy().reshape(32, 64)
    np.testing.assert_array_equal(codes_of(packed), theirs)


def test_fp8_codes_are_those_of_torchao(torchao):
    torch, *_ = torchao
    from torchao.float8.float8_utils import amax_to_scale, to_fp8_saturated

    w = draw(64, 32, scale=0.02)
    x = torch.from_numpy(w.T.copy())
    factor = amax_to_scale(x.abs().amax(1, keepdim=True), torch.float8_e4m3fn)
    theirs = to_fp8_saturated(x * factor, torch.float8_e4m3fn)
    packed = jc.pack(q.fp8(), {"w": jnp.asarray(w)})["w"]
    np.testing.assert_array_equal(codes_of(packed), theirs.view(torch.uint8).numpy())
    np.testing.assert_allclose(packed.scale.T * factor.numpy(), 1.0, rtol=3e-7)


BAD = [
    (lambda: q.table(3), TypeError, r"table: `values` must be 2 to 256"),
    (lambda: q.table(["a", "b"]), TypeError, r"table: `values`"),
    (lambda: q.table([1.0, 1.0]), ValueError, r"distinct"),
    (lambda: q.table([1.0, np.inf]), ValueError, r"finite"),
    (lambda: q.table(range(257)), ValueError, r"2 to 256"),
    (lambda: q.table([[1.0, 2.0], [3.0, 4.0]]), ValueError, r"float32\[2, 2\]"),
    (lambda: q.floats("E2M1"), TypeError, r"floats: `format` must be a Format for weights"),
    (lambda: q.mx(q.E8M0), TypeError, r"mx: `format` must be a Format for weights"),
    (lambda: q.fp8(q.E2M1), TypeError, r"fp8: `format` must be jc.quantization.E4M3 or E5M2"),
    (lambda: q.floats(q.E2M1, scales=q.E2M1), TypeError, r"floats: `scales` must be None, E8M0"),
    (lambda: q.floats(q.E2M1, ranges=3.0), TypeError, r"floats: `ranges`"),
    (lambda: q.nf4(group_size=0), ValueError, r"nf4: `group_size`"),
    (lambda: q.nvfp4(clip=-1.0), ValueError, r"nvfp4: `clip`"),
    (lambda: q.fp8(group_size=4, blocks={0: 4}), ValueError, r"fp8: `group_size`.*with `blocks`"),
    (
        lambda: jc.compress(q.fp8(blocks={-3: 4}), {"w": jnp.ones((4, 4))}),
        ValueError,
        r"fp8: `blocks` must be an axis.*'w'",
    ),
    (
        lambda: jc.compress(jc.masked(q.mx(), "w"), {"w": jnp.ones((4, 4), jnp.int32)}),
        TypeError,
        r"mx: `params` must hold real floating-point leaves.*'w'",
    ),
]


@pytest.mark.parametrize(("call", "kind", "text"), BAD)
def test_bad_input(call, kind, text):
    with pytest.raises(kind, match=text):
        call()
