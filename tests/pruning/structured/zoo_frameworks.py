"""Networks of Flax Linen and NNX, Equinox and Haiku, as their users write them."""

import functools

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

import jaxcompress as jc
from tests.pruning.structured.zoo_images import IMAGES
from tests.pruning.structured.zoo_parts import Model, normal, shaken
from tests.pruning.structured.zoo_sequences import SEQUENCES, TOKENS


def nnx_functional(module):
    """`(apply, params)` with neither zeros nor ones in the params or the statistics."""
    for kind in (nnx.Param, nnx.BatchStat):
        nnx.update(module, shaken(nnx.state(module, kind)))
    return jc.functional(module)


class LinenCNN(nn.Module):
    """A residual block of bottleneck form with batch norm, and a squeeze-excitation."""

    train: bool = False

    @nn.compact
    def __call__(self, x):
        norm = functools.partial(nn.BatchNorm, use_running_average=not self.train)
        x = nn.relu(norm(name="n0")(nn.Conv(6, (3, 3), use_bias=False, name="c0")(x)))
        y = nn.relu(norm(name="n1")(nn.Conv(10, (1, 1), use_bias=False, name="c1")(x)))
        y = nn.relu(
            norm(name="n2")(nn.Conv(10, (3, 3), feature_group_count=10, name="depthwise")(y))
        )
        gate = nn.relu(nn.Dense(4, name="reduce")(y.mean((1, 2))))
        y = y * nn.sigmoid(nn.Dense(10, name="gate")(gate))[:, None, None]
        x = nn.relu(x + norm(name="n3")(nn.Conv(6, (1, 1), name="c2")(y)))
        x = nn.max_pool(x, (2, 2), (2, 2)).reshape(x.shape[0], -1)
        return nn.Dense(5, name="head")(x)


LINEN_CNN_GROUPS = (
    "6: params/c0/*[-1] */n0/*[0] params/c1/kernel[2] params/c2/*[-1] */n3/*[0]"
    " params/head/kernel[0]",
    "10: params/c1/*[-1] */n1/*[0] params/depthwise/*[-1] */n2/*[0] params/reduce/kernel[0]"
    " params/gate/*[-1] params/c2/kernel[2]",
    "4: params/reduce/*[-1] params/gate/kernel[0]",
)


def linen_cnn():
    params = shaken(LinenCNN().init(jax.random.key(0), IMAGES))
    return Model(LinenCNN().apply, params, (IMAGES,), LINEN_CNN_GROUPS)


def linen_cnn_train():
    """It returns what it was given, one step on: statistics of as many channels as come in."""

    def apply(variables, x):
        return LinenCNN(train=True).apply(variables, x, mutable=["batch_stats"])

    params = shaken(LinenCNN().init(jax.random.key(0), IMAGES))
    return Model(apply, params, (IMAGES,), LINEN_CNN_GROUPS)


def linen_group_norm():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.GroupNorm(3, name="n0")(nn.Conv(12, (3, 3), strides=2, name="c0")(x)))
            x = nn.relu(nn.RMSNorm(name="n1")(nn.ConvTranspose(7, (2, 2), name="c1")(x)))
            return nn.Dense(5, name="head")(x.mean((1, 2)))

    params = shaken(Net().init(jax.random.key(0), IMAGES))
    groups = (
        "3: */c0/*[-1] */n0/*[0] */c1/kernel[2]",
        "4: */c0/*[-1] */n0/*[0] */c1/kernel[2]",
        "7: */c1/*[-1] */n1/*[0] */head/kernel[0]",
    )
    return Model(Net().apply, params, (IMAGES,), groups)


class LinenLayer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.LayerNorm(name="norm1")(x)
        attention = nn.MultiHeadDotProductAttention(3, qkv_features=18, name="attn")
        x = x + attention(y, y)
        y = nn.Dense(14, name="up")(nn.LayerNorm(name="norm2")(x))
        return x + nn.Dense(10, name="down")(nn.gelu(y)), None


def linen_encoder():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            x = nn.Embed(24, 10, name="embed")(tokens)
            x, _ = LinenLayer(name="layer")(x, None)
            return nn.Dense(7, name="head")(nn.LayerNorm(name="norm")(x).mean(1))

    params = shaken(Net().init(jax.random.key(0), TOKENS))
    a = "*/layer/attn"
    groups = (
        f"10: */embedding[1] */norm*[0] */head/kernel[0] {a}/query/kernel[0] {a}/key/kernel[0]"
        f" {a}/value/kernel[0] {a}/out/*[-1] */up/kernel[0] */down/*[-1]",
        f"3: {a}/query/*[-2] {a}/key/*[-2] {a}/value/*[-2] {a}/out/kernel[0]",
        f"6: {a}/query/*[-1] {a}/key/*[-1]",
        f"6: {a}/value/*[-1] {a}/out/kernel[1]",
        "14: */up/*[-1] */down/kernel[0]",
    )
    return Model(Net().apply, params, (TOKENS,), groups)


def linen_scanned():
    """`nn.scan` over `nn.remat`, with tied embeddings."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            embed = nn.Embed(24, 10, name="embed")
            layers = nn.scan(
                nn.remat(LinenLayer),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=4,
            )
            x, _ = layers(name="layers")(embed(tokens), None)
            return embed.attend(nn.LayerNorm(name="norm")(x))

    params = shaken(Net().init(jax.random.key(0), TOKENS))
    a = "*/layers/attn"
    groups = (
        f"10: */embedding[1] params/norm/*[0] */layers/norm?/*[1] {a}/query/kernel[1]"
        f" {a}/key/kernel[1] {a}/value/kernel[1] {a}/out/*[-1] */up/kernel[1] */down/*[-1]",
        f"4x3: {a}/query/*[-2] {a}/key/*[-2] {a}/value/*[-2] {a}/out/kernel[1]",
        f"4x6: {a}/query/*[-1] {a}/key/*[-1]",
        f"4x6: {a}/value/*[-1] {a}/out/kernel[2]",
        "4x14: */up/*[-1] */down/kernel[1]",
    )
    return Model(Net().apply, params, (TOKENS,), groups)


def linen_rnn(cell):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.RNN(cell(10, param_dtype=jnp.result_type(float), name="cell"))(x)
            return nn.Dense(5, name="head")(x[:, -1])

    params = shaken(Net().init(jax.random.key(0), SEQUENCES))
    hidden = " ".join(
        f"{path}[{axis}]"
        for path, leaf in jc.tree.leaves_with_paths(params)
        for axis, size in enumerate(leaf.shape)
        if "/cell/" in path and size == 10
    )
    return Model(Net().apply, params, (SEQUENCES,), (f"10: {hidden} */head/kernel[0]",))


def nnx_cnn():
    """The statistics of batch norm are constants of the function."""

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.c0 = nnx.Conv(3, 6, (3, 3), strides=2, rngs=rngs)
            self.n0 = nnx.BatchNorm(6, use_running_average=True, rngs=rngs)
            self.c1 = nnx.Conv(6, 12, (3, 3), feature_group_count=6, rngs=rngs)
            self.c2 = nnx.Conv(12, 7, (1, 1), rngs=rngs)
            self.n2 = nnx.BatchNorm(7, use_running_average=True, rngs=rngs)
            self.head = nnx.Linear(112, 5, rngs=rngs)

        def __call__(self, x):
            x = nnx.relu(self.n0(self.c0(x)))
            x = nnx.relu(self.n2(self.c2(nnx.relu(self.c1(x)))))
            return self.head(x.reshape(x.shape[0], -1))

    apply, params = nnx_functional(Net(nnx.Rngs(0)))
    groups = (
        "6: c0/*[-1] n0/*[0] c1/*[-1] c2/kernel[2]",
        "2: c1/*[-1] c2/kernel[2]",
        "7: c2/*[-1] n2/*[0] head/kernel[0]",
    )
    return Model(apply, params, (IMAGES,), groups)


def nnx_encoder():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(24, 10, rngs=rngs)
            self.attn = nnx.MultiHeadAttention(3, 10, qkv_features=18, decode=False, rngs=rngs)
            self.norm1 = nnx.LayerNorm(10, rngs=rngs)
            self.norm2 = nnx.RMSNorm(10, rngs=rngs)
            self.up = nnx.Linear(10, 14, rngs=rngs)
            self.down = nnx.Linear(14, 10, rngs=rngs)
            self.head = nnx.Linear(10, 7, rngs=rngs)

        def __call__(self, tokens):
            x = self.embed(tokens)
            x = x + self.attn(self.norm1(x))
            x = x + self.down(nnx.gelu(self.up(self.norm2(x))))
            return self.head(x)

    apply, params = nnx_functional(Net(nnx.Rngs(0)))
    groups = (
        "10: embed/*[1] norm?/*[0] attn/query/kernel[0] attn/key/kernel[0] attn/value/kernel[0]"
        " attn/out/*[-1] up/kernel[0] down/*[-1] head/kernel[0]",
        "3: attn/query/*[-2] attn/key/*[-2] attn/value/*[-2] attn/out/kernel[0]",
        "6: attn/query/*[-1] attn/key/*[-1]",
        "6: attn/value/*[-1] attn/out/kernel[1]",
        "14: up/*[-1] down/kernel[0]",
    )
    return Model(apply, params, (TOKENS,), groups)


def nnx_rnn():
    class Net(nnx.Module):
        def __init__(self, rngs):
            dtype = jnp.result_type(float)
            cell = nnx.GRUCell(7, 10, dtype=dtype, param_dtype=dtype, rngs=rngs)
            self.rnn = nnx.RNN(cell, rngs=rngs)
            self.head = nnx.Linear(10, 5, rngs=rngs)

        def __call__(self, x):
            return self.head(self.rnn(x)[:, -1])

    apply, params = nnx_functional(Net(nnx.Rngs(0)))
    groups = (
        "10: rnn/cell/dense_i/*[-1] rnn/cell/dense_h/kernel[0] rnn/cell/dense_h/*[-1]"
        " head/kernel[0]",
    )
    return Model(apply, params, (SEQUENCES,), groups)


def equinox_of(build, x, groups):
    net = build(*jax.random.split(jax.random.key(0), 6))
    params, static = eqx.partition(net, eqx.is_inexact_array)

    def apply(params, x):
        return jax.vmap(eqx.combine(params, static))(x)

    return Model(apply, shaken(params), (x,), groups)


def equinox_mlp():
    groups = (
        "12: layers/0/*[0] layers/1/weight[1]",
        "12: layers/1/*[0] layers/2/weight[1]",
    )
    return equinox_of(lambda key, *_: eqx.nn.MLP(7, 5, 12, 2, key=key), normal(4, 7), groups)


def equinox_conv():
    """Channels first, a group norm, and a flatten, of one image at a time."""

    def build(a, b, c, d, *_):
        layers = [
            eqx.nn.Conv2d(3, 12, 3, stride=2, padding=1, key=a),
            eqx.nn.GroupNorm(3, 12),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.Conv2d(12, 10, 1, key=b),
            eqx.nn.Lambda(jax.nn.gelu),
            eqx.nn.Conv2d(10, 6, 3, padding=1, groups=2, key=c),
            eqx.nn.MaxPool2d(2, 2),
            eqx.nn.Lambda(jnp.ravel),
            eqx.nn.Linear(24, 5, key=d),
        ]
        return eqx.nn.Sequential(layers)

    # Equinox centres before it squares: a removed channel counts in the variance of its group.
    groups = (
        "3: layers/0/*[0] layers/1/*[0] layers/3/weight[1]",
        "~4: layers/0/*[0] layers/1/*[0] layers/3/weight[1]",
        "2: layers/3/*[0] layers/5/*[0] layers/8/weight[1]",
        "5: layers/3/*[0] layers/5/weight[1]",
        "3: layers/5/*[0] layers/8/weight[1]",
    )
    return equinox_of(build, normal(4, 3, 8, 8), groups)


class EquinoxEncoder(eqx.Module):
    embed: eqx.nn.Embedding
    attn: eqx.nn.MultiheadAttention
    norm: eqx.nn.RMSNorm
    up: eqx.nn.Linear
    down: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self, a, b, c, d, e, _):
        self.embed = eqx.nn.Embedding(24, 10, key=a)
        self.attn = eqx.nn.MultiheadAttention(
            3, 10, qk_size=4, vo_size=6, use_query_bias=True, use_output_bias=True, key=b
        )
        self.norm = eqx.nn.RMSNorm(10)
        self.up = eqx.nn.Linear(10, 14, key=c)
        self.down = eqx.nn.Linear(14, 10, key=d)
        self.head = eqx.nn.Linear(10, 7, key=e)

    def __call__(self, tokens):
        x = jax.vmap(self.embed)(tokens)
        y = jax.vmap(self.norm)(x)
        x = x + self.attn(y, y, y)
        x = x + jax.vmap(lambda x: self.down(jax.nn.gelu(self.up(x))))(x)
        return self.head(x.mean(0))


def equinox_encoder():
    groups = (
        "10: embed/weight[1] norm/*[0] attn/query_proj/weight[1] attn/key_proj/weight[1]"
        " attn/value_proj/weight[1] attn/output_proj/*[0] up/weight[1] down/*[0] head/weight[1]",
        "3: attn/query_proj/*[0] attn/key_proj/*[0] attn/value_proj/*[0]"
        " attn/output_proj/weight[1]",
        "4: attn/query_proj/*[0] attn/key_proj/*[0]",
        "6: attn/value_proj/*[0] attn/output_proj/weight[1]",
        "14: up/*[0] down/weight[1]",
    )
    return equinox_of(EquinoxEncoder, TOKENS, groups)


def haiku_of(forward, x, groups):
    net = hk.without_apply_rng(hk.transform(forward))
    return Model(net.apply, shaken(net.init(jax.random.key(0), x)), (x,), groups)


def haiku_cnn():
    def forward(x):
        x = hk.LayerNorm(-1, True, True)(jax.nn.relu(hk.Conv2D(8, 3, stride=2)(x)))
        x = jax.nn.relu(hk.DepthwiseConv2D(1, 3)(x))
        return hk.nets.MLP([12, 5])(hk.Flatten()(x))

    groups = (
        "~8: conv2_d/*[-1] layer_norm/*[0] depthwise_conv2_d/*[-1] mlp/~/linear_0/w[0]",
        "12: mlp/~/linear_0/*[-1] mlp/~/linear_1/w[0]",
    )
    return haiku_of(forward, IMAGES, groups)


def haiku_rnn():
    def forward(x):
        core = hk.DeepRNN([hk.LSTM(10), jax.nn.relu, hk.GRU(6)])
        x, _ = hk.dynamic_unroll(core, x, core.initial_state(x.shape[0]), time_major=False)
        return hk.Linear(5)(x[:, -1])

    groups = (
        "10: lstm/linear/w[0] lstm/linear/*[-1] gru/w_i[0]",
        "6: gru/w_i[1] gru/w_h[0] gru/w_h[1] gru/b[0] linear/w[0]",
    )
    return haiku_of(forward, SEQUENCES, groups)


def haiku_attention():
    def forward(x):
        init = hk.initializers.VarianceScaling()
        x = hk.Linear(10)(x)
        x = x + hk.MultiHeadAttention(3, 4, w_init=init, value_size=6, model_size=10)(x, x, x)
        return hk.Linear(5, name="head")(x)

    a = "multi_head_attention"
    groups = (
        f"10: linear/*[-1] {a}/query/w[0] {a}/key/w[0] {a}/value/w[0] {a}/linear/*[-1] head/w[0]",
        f"3: {a}/query/*[-1] {a}/key/*[-1] {a}/value/*[-1] {a}/linear/w[0]",
        f"4: {a}/query/*[-1] {a}/key/*[-1]",
        f"6: {a}/value/*[-1] {a}/linear/w[0]",
    )
    return haiku_of(forward, SEQUENCES, groups)


FRAMEWORK_MODELS = {
    make.__name__: make
    for make in (
        linen_cnn,
        linen_cnn_train,
        linen_group_norm,
        linen_encoder,
        linen_scanned,
        nnx_cnn,
        nnx_encoder,
        nnx_rnn,
        equinox_mlp,
        equinox_conv,
        equinox_encoder,
        haiku_cnn,
        haiku_rnn,
        haiku_attention,
    )
} | {
    "linen_lstm": functools.partial(linen_rnn, nn.LSTMCell),
    "linen_optimized_lstm": functools.partial(linen_rnn, nn.OptimizedLSTMCell),
    "linen_gru": functools.partial(linen_rnn, nn.GRUCell),
}
