"""Sliced streams: exact where the signal fits, PCA where it does not."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as PS

import jaxcompress as jc
from jaxcompress.factorization import slice_streams
from jaxcompress.factorization._slice_basis import _features, slicing_basis, turned
from jaxcompress.tracing import resized
from tests.conftest import counting_jit, lenient, mesh_of

D, F, EPS = 12, 7, 1e-6
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(40, 5)), jnp.float32)


def rms(x):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + EPS)


def layer(x):
    x = x - jnp.mean(x, -1, keepdims=True)
    return rms(x)


def fast_layer(x):
    """As Flax has it."""
    mean = jnp.mean(x, -1, keepdims=True)
    variance = jnp.mean(x * x, -1, keepdims=True) - mean * mean
    return (x - mean) * jax.lax.rsqrt(jnp.maximum(variance, 0.0) + EPS)


NORMS = {"rms": rms, "layer": layer, "fast layer": fast_layer}


def residual(norm, scan=False):
    """An MLP with norms before its layers, gains, and offsets for LayerNorm."""

    def block(x, p):
        y = norm(x) * p["gain"][None]
        if norm is not rms:
            y = y + p["offset"][None]
        return x + jnp.tanh(y @ p["up"] + p["inner"][None]) @ p["down"] + p["bias"][None], None

    def fn(p, x):
        x = x @ p["embed"]
        x, _ = jax.lax.scan(block, x, p["block"]) if scan else block(x, p["block"])
        return (norm(x) * (1 + p["gain"][None])) @ p["head"]

    return fn


def draw(scan=False, rank=None, decay=1.0, dtype=jnp.float32):
    """Params whose signal falls off along D random directions, or has a few alone."""
    rng = np.random.default_rng(1)
    mix, _ = np.linalg.qr(rng.normal(size=(D, D)))
    rows = (decay ** np.arange(D))[:, None] * mix
    rows = rows[: rank or D]

    def into(*shape):
        return rng.normal(size=(*shape, len(rows))) @ rows

    def block():
        gain = 1 + 0.3 * rng.normal(size=D)
        return {
            "gain": gain,
            "offset": gain * (0.5 * into() + 0.7),
            "up": rng.normal(size=(D, F)),
            "inner": rng.normal(size=F),
            "down": into(F),
            "bias": 0.3 * into(),
        }

    params = {
        "embed": into(5),
        "block": jax.tree.map(lambda *w: np.stack(w), block(), block()) if scan else block(),
        "gain": 0.3 * rng.normal(size=D),
        "head": rng.normal(size=(D, 4)),
    }
    return jax.tree.map(lambda w: jnp.asarray(w, dtype), params)


def off(y, want):
    return float(jnp.linalg.norm(y - want) / jnp.linalg.norm(want))


@pytest.mark.parametrize(
    ("norm", "scan"), [("rms", False), ("layer", False), ("rms", True), ("fast layer", True)]
)
def test_a_signal_that_fits_is_not_touched(norm, scan):
    fn, params, rank = residual(NORMS[norm], scan), draw(scan, rank=4), 4
    kept = rank if norm == "rms" else rank + 1  # the ones take a feature
    if norm == "rms":
        params = jc.tree.map_with_path(lambda p, w: None if p.endswith("offset") else w, params)
    want = fn(params, X)
    small_fn, small, info = slice_streams(fn, params, X, keep=kept)
    (row,) = [r for r in info if r.refused is None]
    assert (row.kept, row.stream.size) == (kept, D)
    assert float(row.error) < 1e-6
    assert off(jax.jit(small_fn)(small, X), want) < 1e-5
    assert jax.tree.structure(small) == jax.tree.structure(params)
    for path, w in jc.tree.leaves_with_paths(small):
        old = dict(jc.tree.leaves_with_paths(params))[path].shape
        assert w.shape == tuple(kept if n == D else n for n in old), path
    assert jc.cost(small_fn, small, X).flops < 0.6 * jc.cost(fn, params, X).flops
    if scan:
        return
    less_fn, less, info = slice_streams(fn, params, X, keep=kept - 1)
    assert off(jax.jit(less_fn)(less, X), want) > 1e-2
    assert max(float(r.error) for r in info) > 1e-4


@pytest.mark.parametrize(("norm", "keep"), [("rms", 1), ("layer", D)])
def test_all_features_change_nothing(norm, keep):
    fn, params = residual(NORMS[norm]), draw()
    small_fn, small, info = slice_streams(fn, params, X, keep=keep)
    assert [r.kept for r in info if r.refused is None] == [D]
    assert max(float(r.error) for r in info) < 1e-7
    assert off(jax.jit(small_fn)(small, X), fn(params, X)) < 1e-5
    assert np.abs(small["embed"] - params["embed"]).max() > 0.1


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_pca_beats_other_directions(norm):
    fn, params = residual(NORMS[norm]), draw(decay=0.6)
    want, centred = fn(params, X), norm == "layer"
    stats = jc.calibrate(fn, params, [X], gram=True)
    losses, errors = [], []
    for keep in (10, 7, 3):
        small_fn, small, info = slice_streams(fn, params, X, keep=keep, stats=stats)
        losses.append(off(jax.jit(small_fn)(small, X), want))
        errors.append(max(float(r.error) for r in info))
    assert losses == sorted(losses)
    assert errors == sorted(errors)
    assert losses[0] < 0.05
    assert losses[-1] > 0.05

    (stream,) = [s for s in jc.tracing.streams(fn, params, X) if s.size == D and s.refused is None]
    leaves = dict(jc.tree.leaves_with_paths(params))

    def by(moment):
        rows, _ = slicing_basis(jnp.asarray(moment, jnp.float32), 7, centred)
        new = turned(leaves, stream, rows, centred)
        small = jc.tree.map_with_path(lambda path, w: new.get(path, w), params)
        return off(jax.jit(resized(fn, params))(small, X), want)

    for i in range(2):
        q, _ = np.linalg.qr(np.random.default_rng(i).normal(size=(D, D)))
        assert by((q * np.arange(D)) @ q.T) > 5 * losses[1]
    assert by(np.diag(np.arange(D))) > 5 * losses[1]


def test_equals_the_paper_in_float64():
    """Section 3 for RMSNorm, with one Q: PCA of the signals after the norms."""
    fn, params, keep = residual(rms), draw(decay=0.7), 6
    p = jax.tree.map(lambda w: np.asarray(w, np.float64), params)

    def forward(p, x, size):
        seen = []

        def norm(x):
            seen.append(x / np.sqrt((x**2).sum(-1, keepdims=True) / D + EPS))
            return seen[-1]

        assert p["embed"].shape[1] == size
        x = x @ p["embed"]
        b = p["block"]
        y = (norm(x) * b["gain"]) @ b["up"] + b["inner"]
        x = x + np.tanh(y) @ b["down"] + b["bias"]
        return (norm(x) * p["gain"]) @ p["head"], seen

    p["gain"] = 1 + p["gain"]
    _, seen = forward(p, np.asarray(X, np.float64), D)
    values, q = np.linalg.eigh(sum(x.T @ x for x in seen))
    q = q[:, -keep:]
    b = p["block"]
    small = {
        "embed": p["embed"] @ q,
        "block": {
            "gain": np.ones(keep),
            "up": q.T @ (b["gain"][:, None] * b["up"]),
            "inner": b["inner"],
            "down": b["down"] @ q,
            "bias": b["bias"] @ q,
        },
        "gain": np.ones(keep),
        "head": q.T @ (p["gain"][:, None] * p["head"]),
    }
    want, _ = forward(small, np.asarray(X, np.float64), keep)
    small_fn, got, info = slice_streams(fn, params, X, keep=keep)
    np.testing.assert_allclose(jax.jit(small_fn)(got, X), want, atol=1e-4)
    (row,) = [r for r in info if r.refused is None]
    np.testing.assert_allclose(row.error, values[:-keep].sum() / values.sum(), rtol=1e-3)
    np.testing.assert_allclose(got["gain"], 0, atol=0)  # 1 + 0
    np.testing.assert_allclose(got["block"]["gain"], 1, atol=0)
    pairs = (got["embed"], small["embed"]), (got["block"]["down"], small["block"]["down"])
    for a, b in pairs:
        np.testing.assert_allclose(a @ a.T, b @ b.T, atol=1e-4)


@pytest.mark.parametrize(("size", "kept"), [(12, 5), (12, 12), (3, 2), (2, 2)])
def test_the_basis_of_a_centred_stream(size, kept):
    g = RNG.normal(size=(size, size))
    g = g @ g.T
    rows, error = slicing_basis(jnp.asarray(g, jnp.float32), kept, True)
    rows = np.asarray(rows, np.float64)
    np.testing.assert_allclose(rows @ rows.T, np.eye(kept), atol=1e-5)
    ones = np.ones(size) / np.sqrt(size)
    np.testing.assert_allclose(rows @ ones, np.ones(kept) / np.sqrt(kept), atol=1e-5)
    c = np.eye(size) - np.outer(ones, ones)
    values, vectors = np.linalg.eigh(c @ g @ c)
    lead = vectors[:, size - kept + 1 :]
    np.testing.assert_allclose(rows.T @ rows, lead @ lead.T + np.outer(ones, ones), atol=1e-4)
    np.testing.assert_allclose(error, values[: size - kept + 1].sum() / values.sum(), atol=1e-5)


@pytest.mark.parametrize("at", [0, 1])
def test_the_moment_of_the_values_of_several_heads(at):
    x = RNG.normal(size=(3, 20, 2, 4))  # layers, tokens, heads, values
    gains = RNG.normal(size=(3, x.shape[2 + at]))
    flat = x.reshape(3, 20, 8)
    gram = jnp.asarray(np.einsum("ltf,ltg->lfg", flat, flat), jnp.float32)
    got = _features(gram, (2, 4), at, jnp.asarray(gains, jnp.float32))
    spec = "lthd,ltkd->lhk" if at == 0 else "lthd,lthe->lde"
    want = np.einsum(spec, x, x) * gains[:, :, None] * gains[:, None, :]
    np.testing.assert_allclose(got, want.sum(0), rtol=1e-4, atol=1e-4)


class Transformer(nnx.Module):
    def __init__(self, norm, after=False):
        rngs = nnx.Rngs(0)
        self.after = after
        self.embed = nnx.Embed(11, D, rngs=rngs)
        self.att = nnx.MultiHeadAttention(2, D, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(D, F, rngs=rngs), nnx.Linear(F, D, rngs=rngs)
        self.norms = nnx.List([norm(D, rngs=rngs) for _ in range(3)])
        self.head = nnx.Linear(D, 4, rngs=rngs)

    def __call__(self, tokens):
        x, (a, b, c) = self.embed(tokens), self.norms
        if self.after:
            x = a(x + self.att(x))
            return self.head(b(x + self.down(nnx.gelu(self.up(x)))))
        x = x + self.att(a(x))
        return self.head(c(x + self.down(nnx.gelu(self.up(b(x))))))


class LinenNet(nn.Module):
    norm: type

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, D)(tokens)
        x = x + nn.Dense(D)(nn.gelu(nn.Dense(F)(self.norm()(x))))
        return nn.Dense(4)(self.norm()(x))


TOKENS = jnp.asarray(RNG.integers(0, 11, (3, 5)))


@pytest.mark.parametrize(("flax", "norm"), [("nnx", "LayerNorm"), ("linen", "RMSNorm")])
def test_flax_models(flax, norm):
    rank = 4
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        if flax == "nnx":
            fn, params = jc.functional(Transformer(getattr(nnx, norm)))
        else:
            net = LinenNet(getattr(nn, norm))
            fn, params = net.apply, net.init(jax.random.key(0), TOKENS)
        rows = RNG.normal(size=(rank, D))

        def narrow(path, w):
            writes = path.endswith(("embedding", "out/kernel")) or w.shape == (F, D)
            if writes:
                return jnp.asarray(RNG.normal(size=(*w.shape[:-1], rank)) @ rows, w.dtype)
            return w + 0.3 if "scale" in path else w

        params = jc.tree.map_with_path(narrow, params)
        kept = rank if norm == "RMSNorm" else rank + 1
        small_fn, small, _ = slice_streams(fn, params, TOKENS, keep=kept)
        want = fn(params, TOKENS)
        assert off(jax.jit(small_fn)(small, TOKENS), want) < 1e-5
        assert {n for w in jax.tree.leaves(small) for n in w.shape} <= {kept, F, 11, 4, 2, 6}


def test_norms_after_the_layers_refuse():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        fn, params = jc.functional(Transformer(nnx.LayerNorm, after=True))
        with pytest.raises(ValueError, match=r"slice_streams: `fn` must.*12 features.*: add"):
            slice_streams(fn, params, TOKENS, keep=0.5)


def test_streams_that_are_not_residual_need_to_be_chosen():
    fn = lambda p, x: x @ p["a"] @ p["b"]  # noqa: E731
    params = {"a": X.T @ X, "b": X[:5]}
    with pytest.raises(ValueError, match="Choose other streams with `where`"):
        slice_streams(fn, params, X, keep=3)
    small_fn, small, info = slice_streams(fn, params, X, keep=3, where="b")
    assert (small["a"].shape, small["b"].shape) == ((5, 3), (3, 5))
    assert small_fn(small, X).shape == (40, 5)
    assert [(r.kept, r.refused) for r in info] == [(5, "it is a result of the function"), (3, None)]


def test_several_streams_and_tied_embeddings():
    def fn(p, tokens):
        x = p["embed"][tokens] + p["positions"][None]
        y = jnp.einsum("btd,dhk->bthk", rms(x), p["value"])
        x = x + jnp.einsum("bthk,hkd->btd", y.mean(1, keepdims=True), p["out"])
        return rms(x) @ p["embed"].T

    rows = RNG.normal(size=(3, D))
    params = {
        "embed": RNG.normal(size=(11, 3)) @ rows,
        "positions": RNG.normal(size=(5, 3)) @ rows,
        "value": RNG.normal(size=(D, 1, 6)),
        "out": RNG.normal(size=(1, 6, 3)) @ rows,
    }
    params = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), params)
    want = fn(params, TOKENS)
    chosen = lambda path, w: path in ("embed", "value")  # noqa: E731
    small_fn, small, info = slice_streams(fn, params, TOKENS, keep=0.5, where=chosen)
    assert [r.kept for r in info if r.refused is None] == [6, 3]
    assert (small["value"].shape, small["out"].shape) == ((6, 1, 3), (1, 3, 6))
    # Three directions of the stream, hence three of the values.
    assert off(jax.jit(small_fn)(small, TOKENS), want) < 1e-5
    small_fn, small, _ = slice_streams(fn, params, TOKENS, keep=3)
    assert (small["value"].shape, small["embed"].shape) == ((3, 1, 6), (11, 3))
    assert off(jax.jit(small_fn)(small, TOKENS), want) < 1e-5


def test_batches_and_statistics_are_the_same():
    fn, params = residual(layer), draw(decay=0.6)
    halves = [X[:25], X[25:]]
    a = slice_streams(fn, params, X, keep=0.5, batches=halves)
    stats = jc.calibrate(fn, params, [(x,) for x in halves], gram=True)
    b = slice_streams(fn, params, X[:3], keep=0.5, stats=stats)
    c = slice_streams(fn, params, X[:3], keep=0.5)
    assert off(a.fn(a.params, X), b.fn(b.params, X)) < 1e-4
    assert off(a.fn(a.params, X), c.fn(c.params, X)) > 1e-3


def test_jit_vmap_grad_and_training():
    fn, params = residual(rms, scan=True), draw(scan=True, decay=0.6)
    small_fn, small, _ = slice_streams(fn, params, X, keep=4)
    jitted = counting_jit(small_fn)
    y = jitted(small, X)
    jitted(small, X + 1)
    assert jitted.traces == 1
    mapped = jax.vmap(small_fn, (None, 0))(small, X.reshape(4, 10, 5))
    np.testing.assert_allclose(mapped.reshape(y.shape), y, rtol=1e-4, atol=1e-5)

    want = fn(params, X)
    loss = lambda p: jnp.mean(jnp.square(small_fn(p, X) - want))  # noqa: E731
    opt = lenient(optax.adam(1e-2))

    @jax.jit
    def step(p, state):
        value, grads = jax.value_and_grad(loss)(p)
        updates, state = opt.update(grads, state, p)
        return optax.apply_updates(p, updates), state, value, grads

    state, values = opt.init(small), []
    for i in range(40):
        small, state, value, grads = step(small, state)
        values.append(float(value))
        if i == 0:
            assert all(np.abs(g).max() > 0 for k, g in grads["block"].items() if k != "offset")
    assert values[-1] < 0.5 * values[0]


@pytest.mark.parametrize(("norm", "dtype"), [("layer", jnp.bfloat16), ("rms", jnp.float16)])
def test_narrow_dtypes(norm, dtype):
    fn, params = residual(NORMS[norm]), draw(rank=4, dtype=dtype)
    x = X.astype(dtype)
    small_fn, small, info = slice_streams(fn, params, x, keep=5)
    assert {w.dtype for w in jax.tree.leaves(small)} == {jnp.dtype(dtype)}
    assert [r.kept for r in info if r.refused is None] == [5]
    wide = lambda t: jax.tree.map(lambda y: y.astype(jnp.float32), t)  # noqa: E731
    want = fn(wide(params), wide(x))
    rounding = off(wide(fn(params, x)), want)
    assert off(wide(jax.jit(small_fn)(small, x)), want) < 3 * rounding + 0.01


def test_where_means_are_subtracted_and_read_nothing_is_sliced():
    def both(p, x):
        y = residual(layer)(p, x)
        return y + x @ p["embed"] @ p["other"]

    params = draw() | {"other": jnp.asarray(RNG.normal(size=(D, 4)), jnp.float32)}
    with pytest.raises(ValueError, match=r"slice_streams: `fn` must.*12 features: its mean"):
        slice_streams(both, params, X, keep=6)
    shifted = lambda p, x: layer((x @ p["embed"] + 1.0) @ jnp.eye(D)) @ p["head"]  # noqa: E731
    with pytest.raises(ValueError, match="slice_streams: `fn` must"):
        slice_streams(shifted, params, X, keep=6, where="embed")


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_sharded(kind):
    fn, params = residual(rms), draw(rank=4)
    want = fn(params, X)
    mesh = mesh_of(kind, 2)
    with jax.set_mesh(mesh):
        spec = {"embed": PS(None, "d")} if kind == "auto" else {}
        put = lambda path, w: jax.device_put(w, NamedSharding(mesh, spec.get(path, PS())))  # noqa: E731
        sharded = jc.tree.map_with_path(put, params)
        x = jax.device_put(X, NamedSharding(mesh, PS("d")))
        small_fn, small, _ = slice_streams(fn, sharded, x, keep=4)
        got = jax.jit(small_fn)(small, x)
    assert off(np.asarray(got), want) < 1e-5


def test_bad_input():
    fn, params = residual(layer), draw()
    known = {"keep": 0.5, "stats": jc.calibrate(fn, params, [X], gram=True)}
    go = lambda *args, fn=fn, **kwargs: slice_streams(fn, *args, **(known | kwargs))  # noqa: E731
    for keep in (0, -1, 1.5, 0.0, float("nan")):
        with pytest.raises(ValueError, match=r"slice_streams: `keep` must be in \(0, 1\]"):
            go(params, X, keep=keep)
    with pytest.raises(ValueError, match="at most the 12 features"):
        go(params, X, keep=13)
    for keep in (True, "half", None):
        with pytest.raises(TypeError, match="slice_streams: `keep`"):
            go(params, X, keep=keep)
    with pytest.raises(TypeError, match="be concrete arrays"):
        go(params, jax.ShapeDtypeStruct(X.shape, X.dtype))
    with pytest.raises(TypeError, match="outside of jit"):
        jax.jit(lambda p: go(p, X).params)(params)
    with pytest.raises(TypeError, match=r"slice_streams: `params`.*dense"):
        go(jc.pack(jc.masked(jc.quantize(4), "embed"), params), X)
    with pytest.raises(ValueError, match="`batches` must be None where"):
        go(params, X, batches=[X], stats={})
    with pytest.raises(ValueError, match=r"`stats` must hold Gram matrices.*'block/up'"):
        go(params, X, stats={})
    with pytest.raises(ValueError, match="`stats` must hold Gram matrices"):
        go(params, X, stats=jc.calibrate(fn, params, [X]))
    with pytest.raises(ValueError, match="finite activations"):
        go(params, X, stats=None, batches=[X.at[0, 0].set(jnp.nan)])
    with pytest.raises(ValueError, match="must match at least one"):
        go(params, X, where="nothing")
    with pytest.raises(ValueError, match="choose a leaf of a stream"):
        go(params, X, where="block/inner")
    with pytest.raises(ValueError, match="floating-point arrays"):
        go(params, X, fn=lambda p, x: jnp.argmax(fn(p, x), -1))
    zero = {**params, "block": {**params["block"], "gain": jnp.zeros(D)}}
    with pytest.raises(ValueError, match="no zeros where an offset"):
        go(zero, X)
    with pytest.raises(TypeError, match="`fn` must"):
        slice_streams(params, params, keep=1)
