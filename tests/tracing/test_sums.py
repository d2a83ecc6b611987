"""Sums of weights in `lift`: every linear operation on each part, against dense NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from jaxcompress import arrays
from tests.conftest import counting_jit, mesh_of


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


def thin(*shape, rank=2, seed=7):
    return arrays.LowRank(draw(*shape[:-1], rank, seed=seed), draw(rank, shape[-1], seed=seed + 1))


BASES = {
    "dense": lambda w: w,
    "int8": lambda w: jc.pack(jc.quantize(8), w),
    "int4 groups": lambda w: jc.pack(jc.quantize(4, group_size=4), w),
    "sparse": lambda w: jc.pack(jc.prune(0.5), w),
    "codebook": lambda w: jc.pack(jc.cluster(4), w),
    "rotated": lambda w: jc.pack(jc.quantization.rotated(jc.quantize(8), jax.random.key(0)), w),
}
bases = pytest.mark.parametrize("base", BASES)


def summed(base, *shape, dtype=jnp.float32):
    """A base and a low rank, scaled as adapters are."""
    part = thin(*shape)
    part = part if dtype == jnp.float32 else arrays.cast(part, dtype)
    scale = jnp.full((1,) * len(shape), 0.5, jnp.float32)
    scaled = arrays.Rescaled(part, scale, np.dtype(dtype))
    return {"w": arrays.add(BASES[base](draw(*shape).astype(dtype)), scaled)}


def dense_of(params):
    """In float64, apart from `Sum.todense`."""
    parts = [jc.todense(part) for part in params["w"].parts]
    return sum(np.asarray(part, np.float64) for part in parts)


def close(got, want, tolerance=1e-5):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    assert np.abs(got - want).max(initial=0) <= tolerance * np.abs(want).max(initial=1e-30)


def linear(params, x):
    return x @ params["w"]


# What a model does with a weight [16, 8]: (shape of the other operand, function, of NumPy too).
USES = {
    "x @ w": ((5, 16), lambda w, x: x @ w),
    "x @ w.T": ((5, 8), lambda w, x: x @ w.T),
    "w @ x": ((8,), lambda w, x: w @ x),
    "sequences": ((2, 3, 16), lambda w, x: x @ w),
    "heads": ((5, 16), lambda w, x: x @ w.reshape(16, 2, 4)[:, 1]),
    "reshaped": ((5, 4), lambda w, x: x @ w.reshape(4, 32)),
    "cut": ((5, 4), lambda w, x: x @ w[2:6]),
    "reversed": ((5, 16), lambda w, x: x @ w[::-1]),
    "one more axis": ((5, 16), lambda w, x: x @ w[None][0]),
    "several views": ((5, 4), lambda w, x: x @ w.T.reshape(2, 4, 16)[0]),
}


@bases
def test_uses_equal_numpy(base):
    small, xs = summed(base, 16, 8), {use: draw(*shape) for use, (shape, _) in USES.items()}
    lifted = jc.lift(lambda p, xs: {use: fn(p["w"], xs[use]) for use, (_, fn) in USES.items()})
    got = jax.jit(lifted)(small, xs)
    for use, (_, fn) in USES.items():
        close(got[use], fn(dense_of(small), np.asarray(xs[use], np.float64)))


@pytest.mark.parametrize("use", ["x @ w", "x @ w.T", "w @ x", "sequences", "one more axis"])
def test_the_whole_is_never_formed(use):
    # Without the base no product of that shape is left, so what is added is not the weights.
    shape, fn = USES[use]
    small, x = {"w": arrays.add(thin(16, 8), thin(16, 8, seed=3))}, draw(*shape)
    text = str(jax.make_jaxpr(jc.lift(lambda p, x: fn(p["w"], x)))(small, x))
    assert "f32[16,8]" not in text
    assert "f32[8,16]" not in text
    assert text.count("dot_general") == 4


def test_a_base_and_a_correction_cost_one_product_and_two_thin_ones():
    small, x = {"w": arrays.add(draw(512, 512), thin(512, 512))}, draw(64, 512)
    cost = jax.jit(jc.lift(linear)).lower(small, x).compile().cost_analysis()
    dense, extra = 2 * 64 * 512 * 512, 2 * 64 * 2 * (512 + 512)
    assert dense + extra <= cost["flops"] < dense + 1.5 * extra


@bases
@pytest.mark.parametrize("mode", ["fill", "clip"])
def test_rows_of_tables(base, mode):
    small, indices = summed(base, 16, 8), jnp.array([[0, 3, 15], [2, 16, 99]])
    fn = lambda p, i: jnp.take(p["w"], i, axis=0, mode=mode)  # noqa: E731
    got = jax.jit(jc.lift(fn))(small, indices)
    want = dense_of(small)[np.minimum(np.asarray(indices), 15)]
    want[(np.asarray(indices) > 15) & (mode == "fill")] = np.nan
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_a_fill_value_is_not_added_up():
    small, indices = summed("int8", 16, 8), jnp.array([3, 99])
    take = lambda c: lambda p, i: p["w"].at[i].get(mode="fill", fill_value=c)  # noqa: E731
    np.testing.assert_array_equal(jc.lift(take(0.0))(small, indices)[1], 0)
    with pytest.raises(TypeError, match=r"lift: `params`.*`gather` of Sum"):
        jc.lift(take(1.0))(small, indices)
    np.testing.assert_array_equal(jc.lift(take(1.0), densify="allow")(small, indices)[1], 1)


@bases
@pytest.mark.parametrize("options", [{}, {"window_strides": (2, 1), "rhs_dilation": (1, 2)}])
def test_convolutions(base, options):
    options = {"window_strides": (1, 1), "padding": "SAME"} | options

    def conv(params, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, params["w"], dimension_numbers=numbers, **options)

    small, x = summed(base, 3, 3, 8, 8), draw(2, 6, 6, 8)
    lifted = jax.jit(jc.lift(conv))
    close(lifted(small, x), conv({"w": jnp.asarray(dense_of(small), jnp.float32)}, x))
    assert str(jax.make_jaxpr(lifted)(small, x)).count("conv_general_dilated") == 3


class TestControlFlow:
    @bases
    def test_scan_over_layers(self, base):
        def fn(params, x):
            return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]

        small, x = summed(base, 3, 8, 8), draw(5, 8)
        lifted = jax.jit(jc.lift(fn))
        y = np.asarray(x, np.float64)
        for w in dense_of(small):
            y = np.tanh(y @ w)
        close(lifted(small, x), y)

    def test_scan_forms_no_layer(self):
        fn = lambda p, x: jax.lax.scan(lambda x, w: (x @ w, None), x, p["w"])[0]  # noqa: E731
        small, x = {"w": arrays.add(thin(3, 8, 8), thin(3, 8, 8, seed=3))}, draw(5, 8)
        assert "f32[8,8]" not in str(jax.make_jaxpr(jc.lift(fn))(small, x))

    @bases
    def test_cond_jit_remat_and_while(self, base):
        @jax.jit
        def fn(params, x, up):
            w = params["w"]
            inner = jax.checkpoint(lambda x: jnp.tanh(x @ w))
            x = jax.lax.cond(up, inner, lambda x: -inner(x), x)
            return jax.lax.fori_loop(0, 2, lambda i, x: x @ w, x)

        small, x = summed(base, 8, 8), draw(5, 8)
        w = dense_of(small)
        for up in (True, False):
            want = (1 if up else -1) * np.tanh(np.asarray(x, np.float64) @ w) @ w @ w
            close(jc.lift(fn)(small, x, jnp.asarray(up)), want)

    def test_shard_map(self):
        small, x = summed("int8", 16, 8), draw(8, 16)
        mesh = mesh_of("auto")
        for spec in (P(), P(None, "d")):
            fn = jax.shard_map(
                linear,
                mesh=mesh,
                in_specs=({"w": spec}, P()),
                out_specs=P(None, *spec[1:]),
            )
            close(jax.jit(jc.lift(fn))(small, x), np.asarray(x) @ dense_of(small))


def test_gates_that_are_concatenated():
    fn = lambda p, x: x @ jnp.concatenate([p["w"], p["v"]], 1)  # noqa: E731
    small, x = summed("int8", 16, 8) | {"v": draw(16, 4)}, draw(5, 16)
    want = np.asarray(x, np.float64) @ np.concatenate([dense_of(small), small["v"]], 1)
    text = str(jax.make_jaxpr(jc.lift(fn))(small, x))
    assert "f32[16,12]" not in text
    close(jc.lift(fn)(small, x), want)


def test_integer_products_of_the_parts_that_have_codes():
    small, x = {"w": arrays.add(BASES["int8"](draw(16, 8)), thin(16, 8))}, draw(5, 16)
    lifted = jc.lift(linear, activations="dynamic")
    assert str(jax.make_jaxpr(lifted)(small, x)).count("preferred_element_type=int32") == 1
    x64 = np.asarray(x, np.float64)
    step = np.abs(x64).max(1, keepdims=True) / 127
    codes, correction = (np.asarray(jc.todense(p), np.float64) for p in small["w"].parts)
    close(lifted(small, x), np.round(x64 / step) * step @ codes + x64 @ correction, 1e-6)
    stats = jc.calibrate(linear, jc.todense(small), [x])
    close(jc.lift(linear, activations=stats)(small, x), x64 @ dense_of(small), 2e-2)


class TestTransformations:
    @bases
    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_half_precision_is_rounded_once(self, base, dtype):
        small, x = summed(base, 16, 8, dtype=dtype), draw(5, 16).astype(dtype)
        y = jax.jit(jc.lift(linear))(small, x)
        assert y.dtype == dtype
        want = np.asarray(x, np.float64) @ dense_of(small)
        close(y, want, 4 * float(jnp.finfo(dtype).eps))

    def test_cancelling_parts_keep_their_digits(self):
        # Products that are large and opposite: rounded to bfloat16 first, little would be left.
        large = jnp.full((16, 8), 127.0 * 8, jnp.bfloat16)
        small = {"w": arrays.add(BASES["int8"](-large), large + 8)}
        x = draw(5, 16).astype(jnp.bfloat16)
        y = jax.jit(jc.lift(linear))(small, x)
        close(y, np.asarray(x, np.float64) @ dense_of(small), 0.01)

    @bases
    def test_gradients_equal_those_of_dense(self, base):
        small, x = summed(base, 16, 8), draw(7, 16)

        def pull(fn):
            loss = lambda p, x: jnp.sum(jnp.square(fn(p, x)))  # noqa: E731
            return jax.jit(jax.grad(loss, argnums=(0, 1), allow_int=True))(small, x)

        mine, theirs = pull(jc.lift(linear)), pull(lambda p, x: linear(jc.todense(p), x))
        for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
            if a.dtype != jax.dtypes.float0:
                close(a, b, 1e-4)

    @bases
    def test_jit_compiles_once(self, base):
        small, run = summed(base, 16, 8), counting_jit(jc.lift(linear))
        run(small, draw(5, 16))
        run(jax.tree.map(lambda x: x + x, small), draw(5, 16, seed=1))
        assert run.traces == 1

    def test_vmap_over_params_equals_a_loop(self):
        many = [{"w": arrays.add(draw(16, 8, seed=i), thin(16, 8, seed=i))} for i in range(3)]
        stacked, x = jax.tree.map(lambda *a: jnp.stack(a), *many), draw(5, 16)
        mapped = jax.jit(jax.vmap(jc.lift(linear), in_axes=(0, None)))(stacked, x)
        for one, y in zip(many, mapped, strict=True):
            close(y, np.asarray(x, np.float64) @ dense_of(one))

    @pytest.mark.parametrize("kind", ["auto", "explicit"])
    def test_sharded_batch_stays_sharded(self, kind):
        small = summed("dense", 16, 8)
        mesh = mesh_of(kind)
        x = jax.device_put(draw(8, 16), NamedSharding(mesh, P("d")))
        placed = jax.device_put(small, NamedSharding(mesh, P()))
        with jax.set_mesh(mesh):
            y = jax.jit(jc.lift(linear))(placed, x)
        assert y.sharding.spec[0] == "d"
        close(y, np.asarray(x) @ dense_of(small))


class TestBadInput:
    def test_what_is_not_linear_is_refused_with_a_low_rank(self):
        small = {"layer": summed("int8", 16, 8)}
        with pytest.raises(TypeError, match=r"lift: `params`.*`mul` of Sum.*'layer/w'"):
            jc.lift(lambda p: p["layer"]["w"] * 2.0)(small)
        for fn in (jnp.sin, jnp.sum, jnp.abs):
            with pytest.raises(TypeError, match=r"lift: `params`.*of Sum"):
                jc.lift(lambda p, fn=fn: fn(p["layer"]["w"]))(small)

    def test_what_is_not_linear_is_not_done_to_the_parts(self):
        small = {"w": arrays.add(draw(16, 8), draw(16, 8, seed=1))}
        got = jc.lift(lambda p: jnp.sin(p["w"]), densify="allow")(small)
        close(got, np.sin(dense_of(small)))
        # Decoded codes may meet elementwise operations, as those of a single part do.
        coded = {"w": arrays.add(BASES["int8"](draw(16, 8)), BASES["sparse"](draw(16, 8)))}
        close(jc.lift(lambda p: p["w"] + 1.0)(coded), dense_of(coded) + 1)

    def test_a_low_rank_that_no_rule_splits_refuses_the_whole(self):
        def conv(params, x):
            return jax.lax.conv(x, params["w"], (1, 1), "SAME")

        low = arrays.LowRank(draw(8, 8, 2), draw(2, 3, 3))
        small = {"w": arrays.add(draw(8, 8, 3, 3), low)}
        with pytest.raises(TypeError, match=r"`conv_general_dilated` of Sum.*'w'"):
            jc.lift(conv)(small, draw(2, 8, 6, 6))

    def test_a_leaf_that_is_returned_comes_back_whole(self):
        small = summed("int8", 16, 8)
        _, w = jc.lift(lambda p, x: (x @ p["w"], p["w"]))(small, draw(5, 16))
        assert isinstance(w, arrays.Sum)
        with pytest.raises(TypeError, match=r"the function's result of Summed"):
            jc.lift(lambda p: p["w"].T)({"w": arrays.add(draw(4, 4), thin(4, 4))})

    @pytest.mark.parametrize("shape", [(0, 8), (16, 0)])
    def test_empty_leaves(self, shape):
        small = {"w": arrays.add(draw(*shape), thin(*shape))}
        y = jc.lift(linear)(small, draw(5, shape[0]))
        np.testing.assert_array_equal(y, np.zeros((5, shape[1])))

    def test_nan_goes_through(self):
        part = arrays.LowRank(draw(16, 2).at[0, 0].set(jnp.nan), draw(2, 8))
        small = {"w": arrays.add(draw(16, 8), part)}
        assert np.isnan(jc.lift(linear)(small, draw(5, 16))).all()
