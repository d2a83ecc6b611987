"""The rules of `lift`, one by one, against NumPy and against dense leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from jaxcompress import arrays
from jaxcompress.tracing import _blocks
from tests.conftest import counting_jit, lenient, mesh_of


def in_blocks(*block):
    return jc.prune(0.5, groups=jc.pruning.blocks(*block))


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


def close(got, want, tolerance=1e-5):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    assert np.abs(got - want).max(initial=0) <= tolerance * np.abs(want).max(initial=1e-30)


def linear(params, x):
    return x @ params["w"]


def dense_of(params):
    return np.asarray(jc.todense(params)["w"], np.float64)


INTEGERS = {
    "per channel": jc.quantize(8),
    "per tensor": jc.quantize(8, axis=None),
    "zero point": jc.quantize(8, axis=None, symmetric=False),
    "zero point per channel": jc.quantize(8, symmetric=False),
    "4 bits": jc.quantize(4),
    "1 bit": jc.quantize(1, axis=None),
}


class TestIntegerProducts:
    @pytest.mark.parametrize("kind", INTEGERS)
    def test_dynamic_equals_numpy(self, kind):
        small, x = jc.pack(INTEGERS[kind], {"w": draw(16, 8) + 0.3}), draw(5, 16)
        x = x.at[0].set(0.0)
        lifted = jc.lift(linear, activations="dynamic")
        text = str(jax.make_jaxpr(lifted)(small, x))
        assert "preferred_element_type=int32" in text
        largest = np.abs(np.asarray(x, np.float64)).max(1, keepdims=True)
        step = np.where(largest > 0, largest / 127, 1)
        rounded = np.clip(np.round(np.asarray(x) / step), -127, 127) * step
        close(jax.jit(lifted)(small, x), rounded @ dense_of(small), 1e-6)

    def test_nan_stays_in_its_token(self):
        small, x = jc.pack(jc.quantize(8), {"w": draw(16, 8)}), draw(5, 16)
        y = jc.lift(linear, activations="dynamic")(small, x.at[2, 3].set(jnp.nan))
        assert np.isnan(y[2]).all()
        want = jc.lift(linear, activations="dynamic")(small, x)
        np.testing.assert_array_equal(np.delete(y, 2, 0), np.delete(want, 2, 0))

    @pytest.mark.parametrize("per", ["tensor", "channel"])
    def test_static_equals_numpy(self, per):
        small, x = jc.pack(jc.quantize(8), {"w": draw(16, 8)}), draw(5, 16)
        ranges = jc.observers.min_max(per=per)
        stats = jc.calibrate(linear, jc.todense(small), [x], ranges=ranges)
        y = jax.jit(jc.lift(linear, activations=stats))(small, 2 * x)
        step = np.abs(np.asarray(x, np.float64)).max() / 127
        rounded = np.clip(np.round(np.asarray(2 * x) / step), -127, 127) * step
        close(y, rounded @ dense_of(small), 1e-6)

    def test_static_ranges_of_scanned_layers(self):
        def fn(params, x):
            return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]

        small, x = jc.pack(jc.quantize(8, axis=(0, -1)), {"w": draw(3, 16, 16)}), draw(5, 16)
        stats = jc.calibrate(fn, jc.todense(small), [x])
        got = jax.jit(jc.lift(fn, activations=stats))(small, x)
        assert "preferred_element_type=int32" in str(
            jax.make_jaxpr(jc.lift(fn, activations=stats))(small, x)
        )
        y = np.asarray(x, np.float64)
        for i, w in enumerate(dense_of(small)):
            step = float(jnp.maximum(-stats["w"].low[i], stats["w"].high[i])) / 127
            y = np.tanh(np.clip(np.round(y / step), -127, 127) * step @ w)
        # A last bit may round to another integer in a later layer.
        close(got, y, 2e-2)

    def test_static_ranges_are_mapped(self):
        small, x = jc.pack(jc.quantize(8), {"w": draw(16, 8)}), draw(5, 16)
        highs = jnp.array([0.5, 1.0, 3.0])

        def run(high):
            ranges = {"w": jc.observers.Range(-high, high)}
            return jc.lift(linear, activations=ranges)(small, x)

        mapped = jax.jit(jax.vmap(run))(highs)
        for i, high in enumerate(highs):
            close(mapped[i], run(high), 1e-6)

    def test_missing_range_is_refused(self):
        small = jc.pack(jc.quantize(8), {"w": draw(16, 8)})
        with pytest.raises(ValueError, match=r"lift: `activations`.*none for 'w'"):
            jc.lift(linear, activations={})(small, draw(5, 16))

    @pytest.mark.parametrize("kind", ["grouped", "contracted scale"])
    def test_scales_along_the_sum_are_not_integer_products(self, kind):
        # What can't be one integer product is decoded, at full precision of the activations.
        p = jc.quantize(8, group_size=4) if kind == "grouped" else jc.quantize(8, axis=0)
        small, x = jc.pack(p, {"w": draw(16, 8)}), draw(5, 16)
        close(jc.lift(linear, activations="dynamic")(small, x), np.asarray(x) @ dense_of(small))


CONVS = {
    # u and v of the kernel, how the kernel lies, and how it is used.
    "output": ((3, 3, 8, 2), (2, 8), "HWIO", {}),
    "output, strided": ((3, 3, 8, 2), (2, 8), "HWIO", {"window_strides": (2, 1)}),
    "output, grouped": ((3, 3, 2, 2), (2, 8), "HWIO", {"feature_group_count": 4}),
    "output first": ((8, 2), (2, 8, 3, 3), "OIHW", {}),
    "input": ((8, 2), (2, 8, 3, 3), "IOHW", {"padding": ((1, 0), (2, 1))}),
    "input, dilated": ((8, 2), (2, 8, 3, 3), "IOHW", {"rhs_dilation": (2, 1)}),
    "input, transposed": (
        (8, 2),
        (2, 8, 3, 3),
        "IOHW",
        {"lhs_dilation": (2, 2), "padding": ((1, 1), (2, 0))},
    ),
    "along": ((3, 2), (2, 3, 8, 8), "HWIO", {"window_strides": (2, 1)}),
    "along, dilated": ((3, 2), (2, 3, 8, 8), "HWIO", {"rhs_dilation": (1, 2)}),
}


@pytest.mark.parametrize("case", CONVS)
def test_thin_convolutions(case):
    u, v, spec, options = CONVS[case]
    options = {"window_strides": (1, 1), "padding": "VALID"} | options

    def conv(params, x):
        numbers = ("NHWC", spec, "NHWC")
        return jax.lax.conv_general_dilated(x, params["w"], dimension_numbers=numbers, **options)

    small, x = {"w": arrays.LowRank(draw(*u), draw(*v))}, draw(2, 8, 8, 8)
    close(jax.jit(jc.lift(conv))(small, x), conv(jc.todense(small), x))
    # Thinner for real, not made dense on the way.
    assert str(jax.make_jaxpr(jc.lift(conv))(small, x)).count("conv_general_dilated") == 2


def test_factors_that_do_not_split_the_kernel_are_refused():
    def conv(params, x):
        return jax.lax.conv(x, params["w"], (1, 1), "SAME")

    small = {"w": arrays.LowRank(draw(8, 8, 2), draw(2, 3, 3))}
    with pytest.raises(TypeError, match=r"lift: `params`.*`conv_general_dilated` of LowRank.*'w'"):
        jc.lift(conv)(small, draw(2, 8, 6, 6))
    allowed = jc.lift(conv, densify="allow")(small, draw(2, 8, 6, 6))
    close(allowed, conv(jc.todense(small), draw(2, 8, 6, 6)))


TABLES = {
    "low rank": jc.low_rank(2),
    "int8": jc.quantize(8),
    "int4 groups": jc.quantize(4, group_size=4),
    "zero point": jc.quantize(8, symmetric=False),
    "2:4": jc.prune(nm=(2, 4)),
    "sparse": jc.prune(0.6),
    "codebook": jc.cluster(4),
    "blocks": in_blocks(4, 3),
    "int8 blocks": jc.chain(in_blocks(4, 4), jc.quantize(8)),
}


@pytest.mark.parametrize("mode", ["fill", "clip", "wrap"])
@pytest.mark.parametrize("kind", TABLES)
def test_rows_of_tables(kind, mode):
    small = jc.pack(TABLES[kind], {"w": draw(16, 8)})
    indices = jnp.array([[0, 3, 15], [-1, 16, 99]])
    fn = lambda p, i: jnp.take(p["w"], i, axis=0, mode=mode)  # noqa: E731
    got, want = jc.lift(fn)(small, indices), fn(jc.todense(small), indices)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_a_lookup_decodes_no_other_row():
    small = jc.pack(jc.quantize(4, group_size=4), {"w": draw(512, 8)})
    lookup = jax.jit(jc.lift(lambda p, i: p["w"][i]))
    cost = lookup.lower(small, jnp.arange(3)).compile().cost_analysis()
    assert cost["flops"] < 512 * 8


CASES = {
    "low rank": jc.low_rank(2),
    "int8": jc.quantize(8),
    "int4 groups": jc.quantize(4, group_size=4),
    "2:4": jc.prune(nm=(2, 4)),
    "sparse": jc.prune(0.6),
    "codebook": jc.cluster(4),
    "blocks": in_blocks(4, 3),
    "int8 blocks": jc.chain(in_blocks(4, 4), jc.quantize(8)),
}
kinds = pytest.mark.parametrize("kind", CASES)


class TestTransformations:
    @kinds
    def test_jit_compiles_once(self, kind):
        small = jc.pack(CASES[kind], {"w": draw(16, 8)})
        run = counting_jit(jc.lift(linear))
        run(small, draw(5, 16))
        run(jax.tree.map(lambda x: x + x, small), draw(5, 16, seed=1))
        assert run.traces == 1

    @kinds
    def test_vmap_over_inputs_equals_a_loop(self, kind):
        small, xs = jc.pack(CASES[kind], {"w": draw(16, 8)}), draw(3, 5, 16)
        mapped = jax.vmap(jc.lift(linear), in_axes=(None, 0))(small, xs)
        for x, y in zip(xs, mapped, strict=True):
            close(y, jc.lift(linear)(small, x), 1e-6)

    @kinds
    def test_vmap_over_params_equals_a_loop(self, kind):
        # The same structure with different values: scaled parts.
        small, x = jc.pack(CASES[kind], {"w": draw(16, 8)}), draw(5, 16)

        def scaled(c):
            is_float = lambda part: jnp.issubdtype(part.dtype, jnp.floating)  # noqa: E731
            return jax.tree.map(lambda part: part * c if is_float(part) else part, small)

        run = lambda c: jc.lift(linear)(scaled(c), x)  # noqa: E731
        grid = jnp.array([0.5, 1.0, 2.0])
        for c, y in zip(grid, jax.jit(jax.vmap(run))(grid), strict=True):
            close(y, run(c), 1e-6)

    @kinds
    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_half_precision(self, kind, dtype):
        small = jc.pack(CASES[kind], {"w": draw(16, 8).astype(dtype)})
        x = draw(5, 16).astype(dtype)
        y = jax.jit(jc.lift(linear))(small, x)
        assert y.dtype == dtype
        close(y, np.asarray(x, np.float64) @ dense_of(small), 4 * float(jnp.finfo(dtype).eps))

    @kinds
    def test_sharded_batch_stays_sharded(self, kind):
        mesh = mesh_of("auto")
        small = jc.pack(CASES[kind], {"w": draw(16, 8)})
        x = jax.device_put(draw(8, 16), NamedSharding(mesh, P("d")))
        y = jax.jit(jc.lift(linear))(small, x)
        assert y.sharding.spec[0] == "d"
        close(y, np.asarray(x) @ dense_of(small))

    @pytest.mark.parametrize("kind", ["low rank", "int8", "codebook", "blocks"])
    def test_parts_are_trained(self, kind):
        small, x = jc.pack(CASES[kind], {"w": draw(16, 8)}), draw(32, 16)
        target = x @ draw(16, 8, seed=1)
        loss = lambda p: jnp.mean(jnp.square(jc.lift(linear)(p, x) - target))  # noqa: E731
        before = loss(small)
        floats, rest = optax_floats(small)
        optimizer = lenient(optax.adam(0.01))
        state = optimizer.init(floats)

        @jax.jit
        def step(floats, state):
            grads = jax.grad(lambda f: loss(joined(f, rest)))(floats)
            updates, state = optimizer.update(grads, state)
            return optax.apply_updates(floats, updates), state

        for _ in range(20):
            floats, state = step(floats, state)
        assert loss(joined(floats, rest)) < 0.95 * before


def optax_floats(params):
    """The floating-point parts, and the others."""
    leaves, treedef = jax.tree.flatten(params)
    keep = [jnp.issubdtype(x.dtype, jnp.floating) for x in leaves]
    floats = [x for x, k in zip(leaves, keep, strict=True) if k]
    return floats, (leaves, keep, treedef)


def joined(floats, rest):
    leaves, keep, treedef = rest
    left = iter(floats)
    return treedef.unflatten([next(left) if k else x for x, k in zip(leaves, keep, strict=True)])


# Equations that multiply a weight [16, 24], or [24, 16] where it says so, as they come in models.
USES = {
    "x @ w": ((5, 16), lambda w, x: x @ w),
    "sequences": ((2, 3, 16), lambda w, x: x @ w),
    "one vector": ((16,), lambda w, x: x @ w),
    "x @ w.T": ((5, 24), lambda w, x: x @ w.T),
    "w @ x": ((24,), lambda w, x: w @ x),
    "w @ columns": ((24, 5), lambda w, x: w @ x),
    "w.T @ columns": ((16, 5), lambda w, x: w.T @ x),
    "einsum over outputs": ((2, 24, 3), lambda w, x: jnp.einsum("io,aob->aib", w, x)),
    "einsum in the middle": ((2, 16, 3), lambda w, x: jnp.einsum("io,aib->bao", w, x)),
}
BLOCKS = [(5, 7), (16, 24), (1, 1)]


@pytest.fixture(params=["whole", "in trips"])
def multiplied(request, monkeypatch):
    """Products with blocks also where decoding is cheaper; with few activations at a time."""
    monkeypatch.setattr(_blocks, "_is_cheaper", lambda *_: True)
    if request.param == "in trips":
        monkeypatch.setattr(_blocks, "_TRIP_BYTES", 256)
    return request.param


class TestBlockProducts:
    @pytest.mark.parametrize("block", BLOCKS)
    @pytest.mark.parametrize("use", USES)
    def test_uses_equal_numpy(self, multiplied, use, block):
        shape, fn = USES[use]
        w = np.random.default_rng(1).normal(size=(16, 24)).astype(np.float32)
        present = np.random.default_rng(2).random((16, 24)) < 4 / 384
        small, x = {"w": arrays.block_sparse(w, present, block=block)}, draw(*shape)
        lifted = jc.lift(lambda p, x: fn(p["w"], x))
        text = str(jax.make_jaxpr(lifted)(small, x))
        assert "f32[16,24]" not in text
        assert "f32[24,16]" not in text
        if multiplied == "in trips" and x.ndim > 1 and block != (1, 1):
            assert "scan[" in text
        want = fn(np.where(present, w, 0).astype(np.float64), np.asarray(x, np.float64))
        close(jax.jit(lifted)(small, x), want)

    @pytest.mark.parametrize("rows", [1, 2, 7, 64])
    def test_batches_that_no_trip_divides(self, multiplied, rows):
        small, x = (
            jc.pack(in_blocks(4, 3), {"w": draw(16, 8)}),
            draw(rows, 16),
        )
        close(jc.lift(linear)(small, x), np.asarray(x, np.float64) @ dense_of(small))

    def test_scales_multiply_the_result(self, multiplied):
        small, x = jc.pack(CASES["int8 blocks"], {"w": draw(16, 8)}), draw(5, 16)
        lifted = jc.lift(linear)
        assert "f32[16,8]" not in (text := str(jax.make_jaxpr(lifted)(small, x)))
        assert "i8[16,8]" not in text
        close(jax.jit(lifted)(small, x), np.asarray(x, np.float64) @ dense_of(small))

    @pytest.mark.parametrize(
        "projection", [jc.quantize(4, symmetric=False), jc.quantize(4, axis=0)]
    )
    def test_codes_that_can_not_be_multiplied_are_decoded(self, multiplied, projection):
        # A zero point, which absent entries do not have; scales along the sum.
        small = jc.pack(jc.chain(in_blocks(4, 4), projection), {"w": draw(16, 8)})
        x = draw(5, 16)
        close(jc.lift(linear)(small, x), np.asarray(x, np.float64) @ dense_of(small))

    def test_integer_activations(self, multiplied):
        small, x = jc.pack(CASES["int8 blocks"], {"w": draw(16, 8)}), draw(5, 16)
        lifted = jc.lift(linear, activations="dynamic")
        assert "preferred_element_type=int32" in str(jax.make_jaxpr(lifted)(small, x))
        close(lifted(small, x), np.asarray(x, np.float64) @ dense_of(small), 1e-2)

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_half_precision_is_summed_in_float32(self, multiplied, dtype):
        small = jc.pack(in_blocks(4, 3), {"w": draw(16, 8).astype(dtype)})
        x = draw(5, 16).astype(dtype)
        y = jax.jit(jc.lift(linear))(small, x)
        assert y.dtype == dtype
        # One rounding of the result.
        want = np.asarray(x, np.float64) @ dense_of(small)
        close(y, want, 0.51 * float(jnp.finfo(dtype).eps))

    def test_gradients_equal_those_of_dense(self, multiplied):
        small, x = (
            jc.pack(in_blocks(4, 3), {"w": draw(16, 8)}),
            draw(7, 16),
        )

        def pull(fn):
            loss = lambda p, x: jnp.sum(jnp.square(fn(p, x)))  # noqa: E731
            grads = jax.jit(jax.grad(loss, argnums=(0, 1), allow_int=True))(small, x)
            return grads[0]["w"].values, grads[1]

        mine = pull(jc.lift(linear))
        theirs = pull(lambda p, x: linear(jc.todense(p), x))
        jax.tree.map(close, mine, theirs)

    def test_vmap_over_places_and_values_equals_a_loop(self, multiplied):
        made = []
        for seed in range(3):
            w = np.asarray(draw(16, 8, seed=seed))
            keep = np.zeros((16, 8), bool)
            keep[4 * seed, :5] = keep[15, seed] = True
            made.append({"w": arrays.block_sparse(w, keep, block=(4, 1))})
        stacked, x = jax.tree.map(lambda *parts: jnp.stack(parts), *made), draw(5, 16)
        mapped = jax.jit(jax.vmap(jc.lift(linear), in_axes=(0, None)))(stacked, x)
        for small, y in zip(made, mapped, strict=True):
            close(y, np.asarray(x, np.float64) @ dense_of(small))

    def test_sharded_batch_stays_sharded(self, multiplied, monkeypatch):
        small = jc.pack(in_blocks(4, 3), {"w": draw(16, 8)})
        if multiplied == "in trips":
            # Of eight rows, two on each device.
            monkeypatch.setattr(_blocks, "_TRIP_BYTES", 8 * 4 * 4 * small["w"].values.shape[0])
        x = jax.device_put(draw(32, 16), NamedSharding(mesh_of("auto"), P("d")))
        compiled = jax.jit(jc.lift(linear)).lower(small, x).compile()
        assert "all-gather" not in compiled.as_text()
        y = compiled(small, x)
        assert y.sharding.spec[0] == "d"
        close(y, np.asarray(x) @ dense_of(small))

    def test_inside_of_shard_map(self, multiplied):
        small, x = (
            jc.pack(in_blocks(4, 3), {"w": draw(16, 8)}),
            draw(32, 16),
        )
        mapped = jax.shard_map(
            linear, mesh=mesh_of("auto"), in_specs=(P(), P("d")), out_specs=P("d")
        )
        close(jax.jit(jc.lift(mapped))(small, x), np.asarray(x) @ dense_of(small))

    def test_explicit_meshes_decode(self, multiplied):
        small = jc.pack(in_blocks(4, 3), {"w": draw(16, 8)})
        sharding = NamedSharding(mesh_of("explicit"), P("d"))
        whole = NamedSharding(mesh_of("explicit"), P())
        x = jax.device_put(draw(8, 16), sharding)
        y = jax.jit(jc.lift(linear))(jax.device_put(small, whole), x)
        assert y.sharding.spec[0] == "d"
        close(y, np.asarray(x) @ dense_of(small))

    def test_nothing_kept_and_no_rows(self, multiplied):
        w, x = draw(16, 8), draw(5, 16)
        none = {"w": arrays.block_sparse(w, np.zeros((16, 8), bool), block=(4, 4))}
        np.testing.assert_array_equal(jc.lift(linear)(none, x), np.zeros((5, 8)))
        small = jc.pack(in_blocks(4, 3), {"w": w})
        assert jc.lift(linear)(small, x[:0]).shape == (0, 8)

    def test_what_is_not_kept_is_not_multiplied(self, multiplied):
        keep = np.zeros((16, 8), bool)
        keep[:4, :4] = True
        small = {"w": arrays.block_sparse(draw(16, 8), keep, block=(4, 4))}
        y = jc.lift(linear)(small, draw(5, 16).at[1, 0].set(jnp.nan))
        assert np.isnan(y[1, :4]).all()
        assert np.isfinite(np.delete(y, 1, 0)).all()
        np.testing.assert_array_equal(y[:, 4:], 0)

    def test_products_where_they_are_cheaper(self):
        def used(shape, block, kept, rows):
            present = np.zeros(-(-np.array(shape) // block), bool)
            present.flat[:kept] = True
            present = np.kron(present, np.ones(block, bool))
            small = {"w": arrays.block_sparse(np.ones(shape, np.float32), present, block=block)}
            text = str(jax.make_jaxpr(jc.lift(linear))(small, jnp.ones((rows, shape[0]))))
            return "([2], [1]), ([0], [0])" in text  # one product for each block

        # A tenth of the blocks, large enough; most of them; tiny ones.
        assert used((256, 256), (32, 32), 6, rows=256)
        assert used((256, 256), (32, 32), 6, rows=1)
        assert used((256, 256), (16, 16), 25, rows=256)
        assert not used((256, 256), (32, 32), 40, rows=256)
        assert not used((256, 256), (4, 4), 409, rows=256)
        assert used((256, 256), (4, 4), 409, rows=1)

    def test_other_weights_are_decoded(self, multiplied):
        # Blocks along one axis, more axes than two, a sum over both axes.
        for shape, block, spec in [
            ((16, 8), (4,), "bi,io->bo"),
            ((2, 16, 8), (4, 4), "bi,cio->bco"),
            ((16, 8), (4, 4), "io,io->"),
            ((16, 8), (4, 4), "i,io->io"),
        ]:
            w = draw(*shape)
            small = {"w": arrays.block_sparse(w, w > 1, block=block)}
            operand, _ = spec.split("->")[0].split(",")
            x = draw(*({"b": 5, "i": 16, "o": 8}[a] for a in operand))
            got = jc.lift(lambda p, x, spec=spec: jnp.einsum(spec, x, p["w"]))(small, x)
            close(got, np.einsum(spec, np.asarray(x, np.float64), dense_of(small)))


class TestNothingElseChanges:
    def test_models_do_not_influence_each_other(self):
        first = lambda p, x: jax.nn.relu(x @ p["w"])  # noqa: E731
        second = lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"]  # noqa: E731
        a = jc.pack(jc.low_rank(2), {"w": draw(16, 8)})
        b = jc.pack(jc.quantize(4), {"w": draw(16, 16), "v": draw(16, 8)})
        x, matmul, dot = draw(5, 16), jnp.matmul, jax.lax.dot_general
        runs = {"a": lambda: jc.lift(first)(a, x), "b": lambda: jc.lift(second)(b, x)}
        forwards = {name: runs[name]() for name in ("a", "b")}
        jax.clear_caches()
        backwards = {name: runs[name]() for name in ("b", "a")}
        for name in runs:
            np.testing.assert_array_equal(forwards[name], backwards[name])
        assert jnp.matmul is matmul
        assert jax.lax.dot_general is dot

    def test_dense_model_beside_a_compressed_one(self):
        params, x = {"w": draw(16, 8)}, draw(5, 16)
        small = jc.pack(jc.low_rank(2), params)

        @jax.jit
        def both(small, params, x):
            return jc.lift(linear)(small, x), linear(params, x), jc.lift(linear)(params, x)

        lifted, dense, lifted_dense = both(small, params, x)
        np.testing.assert_array_equal(dense, jax.jit(linear)(params, x))
        np.testing.assert_array_equal(dense, lifted_dense)
        assert np.abs(lifted - dense).max() > 0.1

    def test_effects_randomness_and_static_arguments(self):
        seen = []

        def fn(params, x, key, mode, *, scale):
            y = x @ params["w"]
            jax.debug.callback(lambda y: seen.append(np.asarray(y)), y)
            noise = jax.random.normal(key, y.shape)
            return {"plus": y + scale * noise, "minus": y - scale * noise}[mode]

        small, x, key = jc.pack(jc.quantize(8), {"w": draw(16, 8)}), draw(5, 16), jax.random.key(3)
        run = jax.jit(jc.lift(fn), static_argnums=3)
        y = run(small, x, key, "minus", scale=2.0)
        jax.effects_barrier()
        want = fn(jc.todense(small), x, key, "minus", scale=2.0)
        close(y, want)
        assert len(seen) == 2
        close(seen[0], seen[1])

    def test_donated_buffers_stay_donated(self):
        fn = lambda p, x: x + x @ p["w"]  # noqa: E731
        small, x = jc.pack(jc.low_rank(2), {"w": draw(8, 8)}), draw(4, 8)
        outer = jax.jit(jc.lift(fn), donate_argnums=1).lower(small, x).as_text()
        assert "tf.aliasing_output" in outer
        inner = jax.jit(fn, donate_argnums=1)
        text = str(jax.make_jaxpr(jc.lift(inner))(small, x))
        assert "donated_invars=(False, False, True)" in text

    def test_new_shapes_are_traced_anew(self):
        small, run = jc.pack(jc.low_rank(2), {"w": draw(16, 8)}), jax.jit(jc.lift(linear))
        assert run(small, draw(5, 16)).shape == (5, 8)
        assert run(small, draw(2, 5, 16)).shape == (2, 5, 8)

    def test_a_leaf_that_is_returned_comes_back_whole(self):
        small = jc.pack(jc.low_rank(2), {"w": draw(16, 8)})
        _, w = jc.lift(lambda p, x: (x @ p["w"], p["w"]))(small, draw(5, 16))
        assert isinstance(w, arrays.LowRank)
        np.testing.assert_array_equal(w.u, small["w"].u)


class TestBadInput:
    def test_no_rule_names_path_type_and_operation(self):
        small = {"layer": jc.pack(jc.low_rank(2), {"w": draw(16, 8)})}
        with pytest.raises(TypeError, match=r"lift: `params`.*`reduce_sum` of LowRank.*'layer/w'"):
            jax.jit(jc.lift(lambda p: p["layer"]["w"].sum()))(small)

    def test_no_rule_can_be_allowed(self):
        small = jc.pack(jc.low_rank(2), {"w": draw(16, 8)})
        total = jc.lift(lambda p: p["w"].sum(), densify="allow")(small)
        close(total, dense_of(small).sum())

    def test_two_compressed_operands_without_a_rule(self):
        small = jc.pack(jc.low_rank(2), {"w": draw(16, 8), "v": draw(8, 4)})
        with pytest.raises(TypeError, match=r"`dot_general` of LowRank"):
            jc.lift(lambda p: p["w"] @ p["v"])(small)

    def test_options(self):
        with pytest.raises(ValueError, match=r"lift: `activations` must be 'float'"):
            jc.lift(linear, activations="int8")
        with pytest.raises(ValueError, match=r"lift: `densify` must be"):
            jc.lift(linear, densify=True)
        with pytest.raises(TypeError, match=r"lift: `fn` must be a function"):
            jc.lift({"w": 1})

    @pytest.mark.parametrize("shape", [(0, 8), (16, 0)])
    def test_empty_leaves(self, shape):
        small = {"w": arrays.LowRank(draw(shape[0], 2), draw(2, shape[1]))}
        y = jc.lift(linear)(small, draw(5, shape[0]))
        np.testing.assert_array_equal(y, np.zeros((5, shape[1])))

    def test_nan_goes_through(self):
        small = {"w": arrays.LowRank(draw(16, 2).at[0, 0].set(jnp.nan), draw(2, 8))}
        assert np.isnan(jc.lift(linear)(small, draw(5, 16))).all()
