"""Networks on vectors and tokens, in plain JAX: products, attention, recurrence, scans."""

import functools

import jax
import jax.numpy as jnp

from tests.pruning.structured.zoo_parts import (
    Model,
    centred_layer_norm,
    dense,
    dense_params,
    layer_norm,
    norm_params,
    normal,
    rms_norm,
    wide,
)

TOKENS = jnp.arange(20, dtype=jnp.int32).reshape(4, 5) * 7 % 24
VECTORS = normal(4, 7)
SEQUENCES = normal(4, 5, 7)


def mlp():
    def apply(p, x):
        x = jnp.tanh(dense(p["first"], x))
        return dense(p["third"], jax.nn.gelu(dense(p["second"], x)))

    params = {
        "first": dense_params(7, 12),
        "second": dense_params(12, 10),
        "third": dense_params(10, 5),
    }
    groups = (
        "12: first/*[-1] second/kernel[0]",
        "10: second/*[-1] third/kernel[0]",
    )
    return Model(apply, params, (VECTORS,), groups)


def raw_products():
    """Products from both sides, einsum, a transposed weight, a stack of experts."""

    def apply(p, x):
        x = jax.nn.relu(x @ p["a"])
        x = jax.nn.relu(jnp.einsum("ij,bj->ib", p["b"], x))
        x = jax.nn.relu(p["c"].T @ x).T
        return jnp.einsum("bi,eij,ejk->bk", x, p["d"], p["e"])

    params = {
        "a": normal(7, 12),
        "b": normal(10, 12),
        "c": normal(10, 6),
        "d": normal(3, 6, 9),
        "e": normal(3, 9, 5),
    }
    groups = (
        "12: a[1] b[1]",
        "10: b[0] c[0]",
        "6: c[1] d[1]",
        "3: d[0] e[0]",
        "9: d[2] e[1]",
    )
    return Model(apply, params, (VECTORS,), groups)


def gated_mlp():
    def apply(p, x):
        y = x + jax.nn.silu(x @ p["gate"]) * (x @ p["up"]) @ p["down"]
        halves = dense(p["both"], y)
        value, gate = jnp.split(halves, 2, -1)
        return dense(p["out"], value * jax.nn.sigmoid(gate))

    params = {
        "gate": normal(7, 12),
        "up": normal(7, 12, seed=1),
        "down": normal(12, 7),
        "both": dense_params(7, 20),
        "out": dense_params(10, 5),
    }
    groups = ("12: gate[1] up[1] down[0]", "10: both/*[-1] out/kernel[0]")
    return Model(apply, params, (VECTORS,), groups)


def positive_at_zero():
    """Zeros come out of `first` as 0.5 and as 1: the weights that read them hide it."""

    def apply(p, x):
        x = jax.nn.sigmoid(dense(p["first"], x))
        return dense(p["third"], jnp.exp(-jnp.square(dense(p["second"], x))))

    return mlp()._replace(apply=apply)


def sums_of_units():
    """A softmax counts units that are zero: removal is not what zeros do. A maximum ends it."""

    def apply(p, x):
        x = jnp.exp(jnp.tanh(dense(p["first"], x)))
        x = dense(p["second"], x / x.sum(-1, keepdims=True))
        return dense(p["third"], x - x.max(-1, keepdims=True))

    groups = ("~12: first/*[-1] second/kernel[0]",)
    return mlp()._replace(apply=apply, groups=groups)


def norms():
    """Means over units: exact where zeros add nothing to them."""

    def apply(p, x):
        x = layer_norm(p["norm1"], dense(p["first"], x))
        x = rms_norm(p["norm2"], jax.nn.gelu(dense(p["second"], x)))
        x = centred_layer_norm(p["norm3"], dense(p["third"], x))
        return dense(p["fourth"], x)

    params = {
        "first": dense_params(7, 12),
        "norm1": norm_params(12),
        "second": dense_params(12, 10),
        "norm2": 1 + normal(10, scale=0.2),
        "third": dense_params(10, 8),
        "norm3": norm_params(8),
        "fourth": dense_params(8, 5),
    }
    groups = (
        "12: first/*[-1] norm1/*[0] second/kernel[0]",
        "10: second/*[-1] norm2[0] third/kernel[0]",
        "~8: third/*[-1] norm3/*[0] fourth/kernel[0]",
    )
    return Model(apply, params, (VECTORS,), groups)


def tied_embeddings():
    def apply(p, tokens):
        x = layer_norm(p["norm"], p["table"][tokens])
        x = x + jax.nn.gelu(x @ p["up"]) @ p["down"]
        return rms_norm(p["scale"], x) @ p["table"].T

    params = {
        "table": normal(24, 10, scale=1.0),
        "norm": norm_params(10),
        "up": normal(10, 14),
        "down": normal(14, 10),
        "scale": 1 + normal(10, scale=0.2),
    }
    groups = (
        "10: table[1] norm/*[0] up[0] down[1] scale[0]",
        "14: up[1] down[0]",
    )
    return Model(apply, params, (TOKENS,), groups)


def attend(q, k, v, causal=False):
    """`[B, T, H, D]` each."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    if causal:
        t = q.shape[1]
        scores = jnp.where(jnp.tril(jnp.ones((1, 1, t, t), bool)), scores, -1e30)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, -1), v)


def encoder_layer(p, x, heads):
    b, t, _ = x.shape
    y = layer_norm(p["norm1"], x)
    q, k, v = (dense(p[n], y).reshape(b, t, heads, -1) for n in "qkv")
    x = x + dense(p["o"], attend(q, k, v).reshape(b, t, -1))
    y = layer_norm(p["norm2"], x)
    return x + dense(p["down"], jax.nn.gelu(dense(p["up"], y)))


def encoder_params(seed=0):
    return {
        "norm1": norm_params(10, seed=seed),
        "q": dense_params(10, 18, seed),
        "k": dense_params(10, 18, seed + 10),
        "v": dense_params(10, 18, seed + 20),
        "o": dense_params(18, 10, seed),
        "norm2": norm_params(10, seed=seed + 10),
        "up": dense_params(10, 14, seed),
        "down": dense_params(14, 10, seed),
    }


def encoder():
    """Three heads of six, merged in the kernels."""

    def apply(p, tokens):
        x = p["embed"][tokens] + p["positions"][None]
        for layer in p["layers"]:
            x = encoder_layer(layer, x, 3)
        return dense(p["head"], layer_norm(p["norm"], x).mean(1))

    params = {
        "embed": normal(24, 10, scale=1.0),
        "positions": normal(5, 10, scale=0.3),
        "layers": [encoder_params(0), encoder_params(1)],
        "norm": norm_params(10),
        "head": dense_params(10, 7),
    }
    stream = "embed[1] positions[1] norm/*[0] head/kernel[0]"
    groups = []
    for i in range(2):
        a = f"layers/{i}"
        stream += f" {a}/norm?/*[0] {a}/[qkv]/kernel[0] {a}/o/*[-1] {a}/up/kernel[0] {a}/down/*[-1]"
        groups += [
            f"3: {a}/[qkv]/*[-1] {a}/o/kernel[0]",
            f"6: {a}/[qk]/*[-1]",
            f"6: {a}/v/*[-1] {a}/o/kernel[0]",
            f"14: {a}/up/*[-1] {a}/down/kernel[0]",
        ]
    return Model(apply, params, (TOKENS,), ("10: " + stream, *groups))


def scanned_encoder():
    """The same layers stacked, in a scan with remat: units of their own, as many each."""

    def apply(p, tokens):
        @jax.checkpoint
        def step(x, layer):
            return encoder_layer(layer, x, 3), None

        x, _ = jax.lax.scan(step, p["embed"][tokens], p["layers"])
        return dense(p["head"], layer_norm(p["norm"], x).mean(1))

    layers = [encoder_params(i) for i in range(4)]
    params = {
        "embed": normal(24, 10, scale=1.0),
        "layers": jax.tree.map(lambda *x: jnp.stack(x), *layers),
        "norm": norm_params(10),
        "head": dense_params(10, 7),
    }
    groups = (
        "10: embed[1] norm/*[0] head/kernel[0] layers/norm?/*[1] layers/[qkv]/kernel[1]"
        " layers/o/*[-1] layers/up/kernel[1] layers/down/*[-1]",
        "4x3: layers/[qkv]/*[-1] layers/o/kernel[1]",
        "4x6: layers/[qk]/*[-1]",
        "4x6: layers/v/*[-1] layers/o/kernel[1]",
        "4x14: layers/up/*[-1] layers/down/kernel[1]",
    )
    return Model(apply, params, (TOKENS,), groups)


def fused_qkv(order):
    """One kernel for queries, keys and values: split, or by axes of 3, heads and features."""

    def apply(p, x):
        b, t, _ = x.shape
        y = dense(p["qkv"], x)
        if order == "split":
            q, k, v = (z.reshape(b, t, 4, -1) for z in jnp.split(y, 3, -1))
        elif order == "3hd":
            q, k, v = jnp.moveaxis(y.reshape(b, t, 3, 4, -1), 2, 0)
        else:
            y = y.reshape(b, t, 4, 3, -1)
            q, k, v = y[..., 0, :], y[..., 1, :], y[..., 2, :]
        y = dense(p["o"], attend(q, k, v).reshape(b, t, -1))
        return dense(p["out"], jnp.tanh(y))

    params = {
        "qkv": dense_params(7, 72),
        "o": dense_params(24, 10),
        "out": dense_params(10, 5),
    }
    # A tensor of axes 3, heads and features is a rectangle: what queries and keys lose of their
    # features, values lose too, unless they are split first.
    features = (
        ("6: qkv/*[-1]", "6: qkv/*[-1] o/kernel[0]")
        if order == "split"
        else ("6: qkv/*[-1] o/kernel[0]",)
    )
    groups = ("4: qkv/*[-1] o/kernel[0]", *features, "10: o/*[-1] out/kernel[0]")
    return Model(apply, params, (SEQUENCES,), groups)


def square_heads():
    """Three heads of three in the same places: only the positions tell the two kinds apart."""

    def apply(p, x):
        b, t, _ = x.shape
        y = (x @ p["qkv"]).reshape(b, t, 3, 3, 3)
        y = attend(y[:, :, 0], y[:, :, 1], y[:, :, 2], causal=True)
        return y.reshape(b, t, -1) @ p["o"]

    params = {"qkv": normal(7, 27), "o": normal(9, 5)}
    return Model(apply, params, (SEQUENCES,), ("3: qkv[1] o[0]", "3: qkv[1] o[0]"))


def rotate(x, interleaved):
    """Rotary embeddings of `[B, T, H, D]`: pairs of features, halves apart or side by side."""
    t, d = x.shape[1], x.shape[-1]
    rates = 100.0 ** (-jnp.arange(0, d, 2, dtype=x.dtype) / d)
    angles = jnp.arange(t, dtype=x.dtype)[:, None] * rates[None]
    cos, sin = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]
    if interleaved:
        a, b = x[..., ::2], x[..., 1::2]
        return jnp.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(x.shape)
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def decoder_layer(p, x, *, heads, kv_heads, interleaved, repeat):
    b, t, _ = x.shape
    y = rms_norm(p["norm1"], x)
    q = rotate((y @ p["q"]).reshape(b, t, heads, -1), interleaved)
    k = rotate((y @ p["k"]).reshape(b, t, kv_heads, -1), interleaved)
    v = (y @ p["v"]).reshape(b, t, kv_heads, -1)
    if repeat:
        k, v = (jnp.repeat(z, heads // kv_heads, 2) for z in (k, v))
        y = attend(q, k, v, causal=True)
    else:
        q = q.reshape(b, t, kv_heads, heads // kv_heads, -1)
        scores = jnp.einsum("btkgd,bskd->bkgts", q, k) / q.shape[-1] ** 0.5
        scores = jnp.where(jnp.tril(jnp.ones((1, 1, 1, t, t), bool)), scores, -1e30)
        y = jnp.einsum("bkgts,bskd->btkgd", jax.nn.softmax(scores, -1), v)
    x = x + y.reshape(b, t, -1) @ p["o"]
    y = rms_norm(p["norm2"], x)
    return x + jax.nn.silu(y @ p["gate"]) * (y @ p["up"]) @ p["down"]


def decoder_shapes(vocabulary, width, heads, kv_heads, features, hidden, layers, tied):
    """Of the params of a decoder as Llama is one."""

    def leaf(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    layer = {
        "norm1": leaf(width),
        "q": leaf(width, heads * features),
        "k": leaf(width, kv_heads * features),
        "v": leaf(width, kv_heads * features),
        "o": leaf(heads * features, width),
        "norm2": leaf(width),
        "gate": leaf(width, hidden),
        "up": leaf(width, hidden),
        "down": leaf(hidden, width),
    }
    top = {} if tied else {"head": leaf(width, vocabulary)}
    return {
        "embed": leaf(vocabulary, width),
        "layers": [layer] * layers,
        "norm": leaf(width),
        **top,
    }


def decoder_apply(p, tokens, *, heads, kv_heads, interleaved=False, repeat=False):
    x = p["embed"][tokens]
    for layer in p["layers"]:
        x = decoder_layer(
            layer, x, heads=heads, kv_heads=kv_heads, interleaved=interleaved, repeat=repeat
        )
    return rms_norm(p["norm"], x) @ (p["head"] if "head" in p else p["embed"].T)


def decoder_groups(width, heads, kv_heads, features, hidden, layers, tied):
    stream = "embed[1] norm[0]" + ("" if tied else " head[0]")
    groups = []
    for i in range(layers):
        a = f"layers/{i}"
        stream += f" {a}/norm?[0] {a}/[qkv][0] {a}/o[1] {a}/gate[0] {a}/up[0] {a}/down[1]"
        groups += [
            f"{kv_heads}: {a}/[qkv][1] {a}/o[0]",
            f"{heads // kv_heads}: {a}/q[1] {a}/o[0]",
            f"{features // 2}: {a}/[qk][1]",
            f"{features}: {a}/v[1] {a}/o[0]",
            f"{hidden}: {a}/gate[1] {a}/up[1] {a}/down[0]",
        ]
    return (f"{width}: {stream}", *groups)


def decoder(interleaved, repeat, tied):
    sizes = {"width": 10, "heads": 6, "kv_heads": 2, "features": 8, "hidden": 14, "layers": 2}
    shapes = decoder_shapes(24, **sizes, tied=tied)
    leaves, tree = jax.tree.flatten(shapes)
    params = jax.tree.unflatten(
        tree,
        [
            normal(*s.shape, seed=i) if len(s.shape) > 1 else 1 + normal(*s.shape, scale=0.2)
            for i, s in enumerate(leaves)
        ],
    )
    params["embed"] = normal(24, 10, scale=1.0)
    apply = functools.partial(
        decoder_apply, heads=6, kv_heads=2, interleaved=interleaved, repeat=repeat
    )
    return Model(apply, params, (TOKENS,), decoder_groups(**sizes, tied=tied))


def decoder_8b():
    """Abstract: 8,030,261,248 parameters."""
    sizes = {
        "width": 4096,
        "heads": 32,
        "kv_heads": 8,
        "features": 128,
        "hidden": 14336,
        "layers": 32,
    }
    params = decoder_shapes(128256, **sizes, tied=False)
    apply = functools.partial(decoder_apply, heads=32, kv_heads=8)
    args = (jax.ShapeDtypeStruct((1, 8), jnp.int32),)
    return Model(apply, params, args, decoder_groups(**sizes, tied=False))


def lstm():
    """Fused gates `[4 H]`, two cells on top of each other, each in a scan over time."""

    def cell(p, xs):
        def step(carry, x):
            h, c = carry
            z = x @ p["x"] + h @ p["h"]
            i, f, g, o = jnp.split(z + wide(p["bias"], z), 4, -1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        start = jnp.zeros((xs.shape[1], p["h"].shape[0]))
        return jax.lax.scan(step, (start, start), xs)[1]

    def apply(p, x):
        h = cell(p["second"], cell(p["first"], x.swapaxes(0, 1)))
        return dense(p["head"], h[-1])

    params = {
        "first": {"x": normal(7, 40), "h": normal(10, 40), "bias": normal(40, scale=0.3)},
        "second": {"x": normal(10, 24), "h": normal(6, 24), "bias": normal(24, scale=0.3)},
        "head": dense_params(6, 5),
    }
    groups = (
        "10: first/x[1] first/h[0] first/h[1] first/bias[0] second/x[0]",
        "6: second/x[1] second/h[0] second/h[1] second/bias[0] head/kernel[0]",
    )
    return Model(apply, params, (SEQUENCES,), groups)


def unrolled_stack():
    """The layers of one leaf, each used alone: all layers share their units."""

    def apply(p, x):
        x = x @ p["in"]
        for i in range(3):
            x = x + jax.nn.relu(x @ p["up"][i]) @ p["down"][i]
        return x @ p["out"]

    params = {
        "in": normal(7, 10),
        "up": normal(3, 10, 14),
        "down": normal(3, 14, 10),
        "out": normal(10, 5),
    }
    # A rectangle again: that of each layer has to lose the same neurons.
    groups = ("10: in[1] up[1] down[2] out[0]", "14: up[2] down[1]")
    return Model(apply, params, (VECTORS,), groups)


def ensemble():
    """`vmap` over params: all members lose the same."""

    def apply(p, x):
        return jax.vmap(lambda p: jax.nn.relu(x @ p["w"]) @ p["v"])(p).mean(0)

    params = {"w": normal(3, 7, 12), "v": normal(3, 12, 5)}
    return Model(apply, params, (VECTORS,), ("3: w[0] v[0]", "12: w[2] v[1]"))


def branches():
    """Through `cond`, `fori_loop`, `jit` and a custom derivative."""

    @jax.custom_jvp
    def softsign(x):
        return x / (1 + jnp.abs(x))

    softsign.defjvp(lambda p, t: (softsign(*p), t[0] / jnp.square(1 + jnp.abs(p[0]))))

    def apply(p, x):
        layer = jax.jit(lambda w, x: softsign(x @ w))
        x = layer(p["a"], x)
        x = jax.lax.cond(x.sum() > -1e9, lambda x: x @ p["b"], lambda x: 2 * x, x)
        x = jax.lax.fori_loop(0, 2, lambda i, x: jnp.tanh(x @ p["c"]), x)
        return layer(p["d"], x)

    params = {"a": normal(7, 10), "b": normal(10, 10), "c": normal(10, 10), "d": normal(10, 5)}
    groups = ("10: a[1] b[0] b[1] c[0] c[1] d[0]",)
    return Model(apply, params, (VECTORS,), groups)


SEQUENCE_MODELS = {
    make.__name__: make
    for make in (
        mlp,
        raw_products,
        gated_mlp,
        positive_at_zero,
        sums_of_units,
        norms,
        tied_embeddings,
        encoder,
        scanned_encoder,
        lstm,
        square_heads,
        unrolled_stack,
        ensemble,
        branches,
    )
} | {
    "fused_qkv_split": functools.partial(fused_qkv, "split"),
    "fused_qkv_3hd": functools.partial(fused_qkv, "3hd"),
    "fused_qkv_h3d": functools.partial(fused_qkv, "h3d"),
    "decoder_grouped": functools.partial(decoder, False, False, True),
    "decoder_repeat": functools.partial(decoder, False, True, False),
    "decoder_interleaved": functools.partial(decoder, True, True, True),
}
