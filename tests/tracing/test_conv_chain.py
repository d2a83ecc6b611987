"""Chains of kernels under `lift`: the convolutions that they are, against dense kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jaxcompress as jc
from jaxcompress import arrays
from tests.conftest import counting_jit


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


def close(got, want, tolerance=1e-5):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    assert np.abs(got - want).max(initial=0) <= tolerance * np.abs(want).max(initial=1e-30)


def chain(kind, spatial=2, inputs=4, outputs=6):
    """A kernel that is 3 wide along each axis, 2 along the last."""
    one, size = (1,) * spatial, (3,) * (spatial - 1) + (2,)
    along = [tuple(size[d] if d == axis else 1 for d in range(spatial)) for axis in range(spatial)]
    shapes, groups = {
        "input": ([(*one, inputs, 2), (*size, 2, outputs)], [1, 1]),
        "spatial": ([(*along[0], inputs, 2), (*((1, *size[1:])), 2, outputs)], [1, 1]),
        "tucker": ([(*one, inputs, 2), (*size, 2, 3), (*one, 3, outputs)], [1, 1, 1]),
        "cp": (
            [(*one, inputs, 3), *((*a, 1, 3) for a in along), (*one, 3, outputs)],
            [1, *(3 for _ in along), 1],
        ),
    }[kind]
    if spatial == 1 and kind == "spatial":
        shapes = [(*size, inputs, 2), (1, 2, outputs)]
    return arrays.conv_chain([draw(*s, seed=i) for i, s in enumerate(shapes)], groups)


KINDS = ["input", "spatial", "tucker", "cp"]
kinds = pytest.mark.parametrize("kind", KINDS)
OPTIONS = {
    "valid": {},
    "same, strided": {"padding": "SAME", "window_strides": (2, 3)},
    "valid, strided": {"window_strides": (3, 2)},
    "same, dilated": {"padding": "SAME", "rhs_dilation": (1, 2)},
    "explicit": {"padding": ((2, 1), (0, 3)), "window_strides": (2, 1), "rhs_dilation": (2, 1)},
    "transposed": {"padding": ((2, 1), (1, 2)), "lhs_dilation": (2, 3)},
}


def conv(x, w, numbers=("NHWC", "HWIO", "NHWC"), **options):
    options = {"window_strides": (1,) * (w.ndim - 2), "padding": "VALID"} | options
    return jax.lax.conv_general_dilated(x, w, dimension_numbers=numbers, **options)


def lifts(fn, params, *args, convolutions):
    """The lifted function equals the dense one, and runs so many convolutions."""
    text = str(jax.make_jaxpr(jc.lift(fn))(params, *args))
    assert text.count("conv_general_dilated[") == convolutions
    got = jax.jit(jc.lift(fn))(params, *args)
    close(got, fn(jc.todense(params), *args))
    return got


@pytest.mark.parametrize("option", OPTIONS)
@kinds
def test_strides_dilations_and_paddings(kind, option):
    w, x = chain(kind), draw(2, 9, 8, 4)
    fn = lambda p, x: conv(x, p["w"], **OPTIONS[option])  # noqa: E731
    lifts(fn, {"w": w}, x, convolutions=len(w.stages))


@pytest.mark.parametrize("spatial", [1, 3])
@kinds
def test_one_and_three_spatial_axes(kind, spatial):
    w = chain(kind, spatial)
    x = draw(2, *(7, 6, 5)[:spatial], 4)
    axes = "WHD"[:spatial]
    options = {"window_strides": (2, 1, 1)[:spatial], "rhs_dilation": (1, 2, 1)[:spatial]}

    def fn(p, x):
        numbers = (f"N{axes}C", f"{axes}IO", f"N{axes}C")
        return conv(x, p["w"], numbers, padding="SAME", **options)

    lifts(fn, {"w": w}, x, convolutions=len(w.stages))


@pytest.mark.parametrize(
    "numbers",
    [
        ("NCHW", "HWIO", "NCHW"),
        ("NCHW", "HWIO", "NHWC"),
        ("HWNC", "HWIO", "CNHW"),
        ("NHWC", "WHIO", "NHWC"),
        ("NHWC", "HWOI", "NHWC"),
    ],
)
@kinds
def test_dimension_numbers(kind, numbers):
    swapped = numbers[1] == "HWOI"
    w = chain(kind, inputs=6, outputs=4) if swapped else chain(kind)
    x = draw(2, 9, 8, 4).transpose(*("NHWC".index(c) for c in numbers[0]))
    fn = lambda p, x: conv(x, p["w"], numbers, window_strides=(2, 1))  # noqa: E731
    lifts(fn, {"w": w}, x, convolutions=len(w.stages))


@kinds
def test_through_transposes_casts_and_reversals(kind):
    w, x = chain(kind), draw(2, 4, 9, 8)

    def fn(p, x):
        w = jax.lax.stop_gradient(p["w"].astype(jnp.bfloat16).astype(jnp.float32))
        w = jax.lax.rev(w.transpose(3, 2, 0, 1), (0, 3, 1))
        return conv(x, w.transpose(1, 0, 3, 2), ("NCHW", "IOWH", "NHWC"), padding="SAME")

    text = str(jax.make_jaxpr(jc.lift(fn))({"w": w}, x))
    assert text.count("conv_general_dilated[") == len(w.stages)
    # The casts round the stages, not their product.
    halves = jax.tree.map(lambda s: s.astype(jnp.bfloat16).astype(jnp.float32), w)
    close(jc.lift(fn)({"w": halves}, x), fn({"w": halves.todense()}, x), 2e-2)


@pytest.mark.parametrize("transpose_kernel", [False, True])
@kinds
def test_transposed_convolutions(kind, transpose_kernel):
    inputs, outputs = (6, 4) if transpose_kernel else (4, 6)
    w, x = chain(kind, inputs=inputs, outputs=outputs), draw(2, 5, 6, 4)

    def fn(p, x):
        return jax.lax.conv_transpose(
            x,
            p["w"],
            (2, 3),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            transpose_kernel=transpose_kernel,
        )

    lifts(fn, {"w": w}, x, convolutions=len(w.stages))


@kinds
def test_groups_share_all_stages_but_the_last(kind):
    w, x = chain(kind, inputs=2, outputs=6), draw(2, 9, 8, 6)
    fn = lambda p, x: conv(x, p["w"], feature_group_count=3, window_strides=(2, 1))  # noqa: E731
    lifts(fn, {"w": w}, x, convolutions=len(w.stages))
    by_hand = [
        conv(x[..., 2 * g : 2 * g + 2], w.todense()[..., 2 * g : 2 * g + 2], window_strides=(2, 1))
        for g in range(3)
    ]
    close(jc.lift(fn)({"w": w}, x), jnp.concatenate(by_hand, -1))


@kinds
def test_one_by_one_kernels_with_strides_and_padding(kind):
    w = jax.tree.map(lambda s: s[:1, :1], chain(kind))
    fn = lambda p, x: conv(x, p["w"], window_strides=(2, 3), padding=((1, 2), (0, 1)))  # noqa: E731
    lifts(fn, {"w": w}, draw(2, 9, 8, 4), convolutions=len(w.stages))


def test_no_rank_gives_zeros():
    w = arrays.conv_chain([draw(1, 1, 4, 0), draw(3, 1, 1, 0), draw(1, 3, 0, 6)], [1, 0, 1])
    fn = lambda p, x: conv(x, p["w"], window_strides=(2, 1))  # noqa: E731
    got = jax.jit(jc.lift(fn))({"w": w}, draw(2, 9, 8, 4))
    np.testing.assert_array_equal(got, np.zeros((2, 4, 6, 6)))


@kinds
def test_gradients_of_every_stage_and_of_the_input(kind):
    w, x, c = chain(kind), draw(2, 7, 6, 4), draw(2, 4, 3, 6)
    fn = lambda p, x: conv(x, p["w"], padding="SAME", window_strides=(2, 2))  # noqa: E731
    loss = lambda p, x, run: jnp.sum(c * run(p, x))  # noqa: E731
    got = jax.grad(lambda p, x: loss(p, x, jc.lift(fn)), (0, 1))({"w": w}, x)
    dense = lambda p, x: fn(jc.todense(p), x)  # noqa: E731
    want = jax.grad(lambda p, x: loss(p, x, dense), (0, 1))({"w": w}, x)
    jax.tree.map(lambda a, b: close(a, b, 2e-5), got, want)


def test_jit_once_and_vmap():
    w, xs = chain("cp"), draw(3, 2, 7, 6, 4)
    fn = lambda p, x: conv(x, p["w"], padding="SAME")  # noqa: E731
    run = counting_jit(jc.lift(fn))
    run({"w": w}, xs[0])
    run({"w": jax.tree.map(lambda s: s + s, w)}, xs[1])
    assert run.traces == 1
    mapped = jax.vmap(jc.lift(fn), (None, 0))({"w": w}, xs)
    close(mapped[2], jc.lift(fn)({"w": w}, xs[2]))
    scales = jnp.array([0.5, 1.0, 2.0])
    scaled = lambda c: jc.lift(fn)({"w": jax.tree.map(lambda s: s * c, w)}, xs[0])  # noqa: E731
    for c, y in zip(scales, jax.vmap(scaled)(scales), strict=True):
        close(y, scaled(c))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_dtypes(dtype):
    w, x = jax.tree.map(lambda s: s.astype(dtype), chain("cp")), draw(2, 7, 6, 4).astype(dtype)
    for wanted in (None, jnp.float32):
        fn = lambda p, x, d=wanted: conv(x, p["w"], preferred_element_type=d)  # noqa: E731
        y = jax.jit(jc.lift(fn))({"w": w}, x)
        assert y.dtype == (wanted or dtype)
        wide = jax.tree.map(lambda s: s.astype(jnp.float32), w)
        want = conv(x.astype(jnp.float32), wide.todense())
        close(y.astype(jnp.float32), want, 8 * float(jnp.finfo(dtype).eps))


def test_quantized_stages():
    small = jc.pack(jc.quantize(8), {"w": chain("tucker")})
    fn = lambda p, x: conv(x, p["w"], window_strides=(2, 1))  # noqa: E731
    lifts(fn, small, draw(2, 9, 8, 4), convolutions=3)


SCHEMES = ["output", "input", "spatial", "tucker", "cp"]


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), strides=2, name="a")(x))
        return nn.Conv(8, (3, 3), kernel_dilation=2, padding="VALID", name="b")(x)


class NNX(nnx.Module):
    def __init__(self, rngs):
        self.a = nnx.Conv(4, 8, (3, 3), strides=2, rngs=rngs)
        self.b = nnx.Conv(8, 8, (3, 3), kernel_dilation=2, padding="VALID", rngs=rngs)

    def __call__(self, x):
        return self.b(nnx.relu(self.a(x)))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_flax(scheme):
    x = draw(2, 11, 11, 4)
    p = jc.factorization.convolution(2, scheme=scheme, iterations=3)
    params = Linen().init(jax.random.key(0), x)
    apply, state = jc.functional(NNX(nnx.Rngs(0)))
    for fn, whole in ((Linen().apply, params), (apply, state)):
        whole = jax.tree.map(lambda w: w + 0.1 * jnp.ones_like(w), whole)  # biases too
        small = jc.pack(p, whole)
        leaves = jax.tree.leaves(small, is_leaf=arrays.is_compressed)
        assert sum(map(arrays.is_compressed, leaves)) == 2
        close(jax.jit(jc.lift(fn))(small, x), fn(jc.compress(p, whole), x))


class TestRefusals:
    @pytest.mark.parametrize(
        ("name", "use"),
        [
            ("mul", lambda w: w * 2.0),
            ("reduce_sum", lambda w: w.sum()),
            ("dot_general", lambda w: jnp.ones(4) @ w),
            ("dot_general", lambda w: jnp.moveaxis(w, 0, 2) @ jnp.ones((6, 2))),
            ("reshape", lambda w: w.reshape(-1, 6)),
            ("slice", lambda w: w[:, :, :2]),
            ("reduce_sum", lambda w: jnp.concatenate([w, w], -1).sum()),
            ("dot_general", lambda w: jnp.ones(4) @ jnp.concatenate([w, w], -1)),
            ("select_n", lambda w: jnp.where(True, w, 0.0)),
        ],
    )
    def test_other_uses(self, name, use):
        params = {"layer": {"w": chain("tucker")}}
        fn = lambda p: use(p["layer"]["w"])  # noqa: E731
        with pytest.raises(
            TypeError, match=rf"lift: `params` .*`{name}` of (\w*Chain|Joined).*'layer/w"
        ):
            jc.lift(fn)(params)
        close(jc.lift(fn, densify="allow")(params), fn(jc.todense(params)))

    def test_kernels_whose_features_are_used_as_places(self):
        params, x = {"w": chain("tucker")}, draw(2, 9, 8, 3)
        fn = lambda p, x: conv(x, p["w"], ("NHWC", "IHOW", "NHWC"))  # noqa: E731
        with pytest.raises(TypeError, match=r"`conv_general_dilated` of .*Chain"):
            jc.lift(fn)(params, x)
        close(jc.lift(fn, densify="allow")(params, x), fn(jc.todense(params), x))

    def test_a_chain_as_the_activations(self):
        fn = lambda p, x: conv(p["w"], x)  # noqa: E731
        with pytest.raises(TypeError, match=r"`conv_general_dilated` of ConvChain"):
            jc.lift(fn)({"w": chain("tucker")}, draw(1, 2, 6, 3))


@kinds
def test_a_stack_of_layers_under_scan(kind):
    one = chain(kind, outputs=4)
    stacked = jax.tree.map(lambda x: jnp.stack([x, 2 * x, -x]), one)

    def fn(p, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(conv(x, w, padding="SAME")), None), x, p["w"])[0]

    x, parts = draw(1, 6, 5, 4), {"w": stacked}
    got = jax.jit(jc.lift(fn))(parts, x)
    dense = jnp.stack([one.todense(), 2 * one.todense(), -one.todense()])
    close(got, fn({"w": dense}, x))


def test_cast_rounds_the_stages():
    w = arrays.cast(chain("tucker"), jnp.bfloat16)
    assert w.dtype == jnp.bfloat16
    assert {x.dtype for x in w.stages} == {np.dtype(jnp.bfloat16)}


def test_nothing_is_made_dense_without_a_word():
    w, x = chain("tucker", outputs=4), draw(1, 6, 5, 4)

    def loop(p, x):
        return jax.lax.fori_loop(0, 2, lambda _, x: conv(x, p["w"] + 1.0, padding="SAME"), x)

    with pytest.raises(TypeError, match="lift: `params` must be used by operations with a rule"):
        jc.lift(loop)({"w": w}, x)
    codes = jc.pack(jc.quantize(4), draw(*w.shape, seed=9))
    both = {"w": arrays.add(codes, w)}
    plain = lambda p, x: conv(x, p["w"], padding="SAME")  # noqa: E731
    lifts(plain, both, x, convolutions=4)
    with pytest.raises(TypeError, match="lift: `params` must be used by operations with a rule"):
        jc.lift(lambda p, x: conv(x, p["w"] + 1.0))(both, x)
