"""Rotating residual streams in the weights: models stay, outliers go."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxcompress as jc
from jaxcompress.quantization import rotate_streams

KEY = jax.random.key(0)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 11, (3, 5)))


@pytest.fixture(autouse=True)
def flax_norms_promote():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


class Block(nnx.Module):
    def __init__(self, width, norm, rngs):
        self.n1, self.n2 = norm(width, rngs=rngs), norm(width, rngs=rngs)
        self.att = nnx.MultiHeadAttention(2, width, decode=False, rngs=rngs)
        self.up = nnx.Linear(width, 2 * width, rngs=rngs)
        self.down = nnx.Linear(2 * width, width, rngs=rngs)

    def __call__(self, x, after):
        if after:
            x = self.n1(x + self.att(x))
            return self.n2(x + self.down(nnx.gelu(self.up(x))))
        x = x + self.att(self.n1(x))
        return x + self.down(nnx.gelu(self.up(self.n2(x))))


class Transformer(nnx.Module):
    """Norms before or after the layers, with gains and offsets that are not those of the start."""

    def __init__(self, width=16, norm=nnx.LayerNorm, after=False):
        rngs = nnx.Rngs(0)
        self.after = after
        self.embed = nnx.Embed(11, width, rngs=rngs)
        self.positions = nnx.Param(jax.random.normal(rngs(), (5, width)))
        self.blocks = nnx.List([Block(width, norm, rngs) for _ in range(2)])
        self.norm = norm(width, rngs=rngs)
        self.head = nnx.Linear(width, 11, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens) + self.positions[...][None]
        for block in self.blocks:
            x = block(x, self.after)
        return self.head(self.norm(x))


def model(dtype=jnp.float32, **kwargs):
    graph, shapes = nnx.split(nnx.eval_shape(lambda: Transformer(**kwargs)))
    rng = np.random.default_rng(0)

    def draw(path, like):
        w = rng.normal(size=like.shape) / np.sqrt(max(like.shape))
        return jnp.asarray(w + ("scale" in path), dtype)

    params = jc.tree.map_with_path(draw, shapes)
    return jax.jit(lambda params, tokens: nnx.merge(graph, params)(tokens)), params


@pytest.mark.parametrize("width", [16, 12, 10], ids=["sylvester", "paley", "haar"])
@pytest.mark.parametrize("norm", [nnx.LayerNorm, nnx.RMSNorm])
def test_a_transformer_computes_the_same(norm, width):
    fn, params = model(norm=norm, width=width)
    new = rotate_streams(fn, params, TOKENS, key=KEY)
    np.testing.assert_allclose(fn(params, TOKENS), fn(new, TOKENS), rtol=1e-4, atol=2e-5)
    for path, w in jc.tree.leaves_with_paths(params):
        changed = np.abs(dict(jc.tree.leaves_with_paths(new))[path] - w).max() > 0.01
        inside = any(name in path for name in ("up/bias", "query/bias", "key/bias", "head/bias"))
        assert changed != inside, path


def test_the_rotation_is_orthogonal_and_keeps_the_ones():
    fn = lambda p, x: x @ p["a"] @ p["b"]  # noqa: E731
    for size in (16, 12, 10, 2):
        params = {"a": jnp.eye(size), "b": jnp.eye(size)}
        x = jnp.ones((1, size))
        new = rotate_streams(fn, params, x, key=KEY)
        q = np.asarray(new["a"], np.float64).T
        np.testing.assert_allclose(q @ q.T, np.eye(size), atol=1e-6)
        np.testing.assert_allclose(q.sum(1), np.ones(size), atol=1e-5)
        np.testing.assert_allclose(new["b"], q, atol=1e-6)
        other = rotate_streams(fn, params, x, key=jax.random.key(1))
        assert np.abs(other["a"] - new["a"]).max() > 0.1


def test_norms_after_the_layers_are_left():
    fn, params = model(after=True)
    found = jc.tracing.streams(fn, params, TOKENS)
    (wide,) = [s for s in found if any(m.path == "positions" for m in s.members)]
    assert wide.size == 16
    assert wide.refused.startswith("add")
    assert [s.size for s in found if s.refused is None] == [8, 8]  # the values of the heads
    new = rotate_streams(fn, params, TOKENS, key=KEY)
    np.testing.assert_array_equal(new["embed"]["embedding"][...], params["embed"]["embedding"][...])
    np.testing.assert_allclose(fn(params, TOKENS), fn(new, TOKENS), rtol=1e-4, atol=2e-5)


def test_outliers_of_activations_are_spread():
    """Two features forty times as loud as the others, as trained transformers have them."""
    fn, params = model(norm=nnx.RMSNorm, width=64)
    loud = jnp.ones(64).at[jnp.array([3, 40])].set(40.0)
    readers = ("up", "query", "key", "value", "head")

    def louder(path, w):
        name = path.split("/")[-2] if "/" in path else path
        if path.endswith(("embedding", "positions", "down/kernel", "out/kernel")):
            return w * loud
        if name in readers and path.endswith("kernel"):
            return w / loud.reshape(-1, *[1] * (w.ndim - 1))
        return w

    params = jc.tree.map_with_path(louder, params)
    new = rotate_streams(fn, params, TOKENS, key=KEY)

    def harm(params):
        low = jc.quantize_activations(fn, 4, where=lambda path, w: path.split("/")[-2] in readers)
        return float(jnp.mean((low(params, TOKENS) - fn(params, TOKENS)) ** 2))

    assert harm(new) < harm(params) / 3


def test_linen_and_jit_and_vmap_over_keys():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            x = nn.Embed(11, 16)(tokens)
            for _ in range(2):
                x = x + nn.Dense(16)(nn.gelu(nn.Dense(32)(nn.LayerNorm()(x))))
            return nn.Dense(11)(nn.RMSNorm()(x))

    net = Net()
    params = net.init(KEY, TOKENS)
    keys = jax.random.split(KEY, 2)
    rotate = lambda key: rotate_streams(net.apply, params, TOKENS, key=key)  # noqa: E731
    several = jax.jit(jax.vmap(rotate))(keys)
    want = net.apply(params, TOKENS)
    for i in range(2):
        one = jax.tree.map(lambda x, i=i: x[i], several)
        np.testing.assert_allclose(net.apply(one, TOKENS), want, rtol=1e-4, atol=2e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one, rotate(keys[i]))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_dtypes_stay(dtype):
    fn, params = model(dtype)
    new = rotate_streams(fn, params, TOKENS, key=KEY)
    assert {x.dtype for x in jax.tree.leaves(new)} == {jnp.dtype(dtype)}
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    want = rotate_streams(fn, wide, TOKENS, key=KEY)
    near = lambda a, b: np.testing.assert_allclose(a.astype(np.float32), b, rtol=0.02, atol=0.02)  # noqa: E731
    jax.tree.map(near, new, want)
