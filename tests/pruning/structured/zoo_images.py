"""Networks on images, channels last unless named otherwise, in plain JAX."""

import jax
import jax.numpy as jnp

from tests.pruning.structured.zoo_parts import (
    Model,
    batch_norm,
    conv,
    conv_params,
    dense,
    dense_params,
    max_pool,
    norm_params,
    normal,
    wide,
)

IMAGES = normal(4, 8, 8, 3)


def vgg():
    def apply(p, x):
        x = max_pool(jax.nn.relu(conv(p["conv1"], x)))
        x = max_pool(jax.nn.relu(conv(p["conv2"], x)))
        x = jax.nn.relu(dense(p["fc1"], x.reshape(x.shape[0], -1)))
        return dense(p["fc2"], x)

    params = {
        "conv1": conv_params(3, 6),
        "conv2": conv_params(6, 10),
        "fc1": dense_params(40, 12),
        "fc2": dense_params(12, 5),
    }
    groups = (
        "6: conv1/kernel[3] conv1/bias[0] conv2/kernel[2]",
        "10: conv2/kernel[3] conv2/bias[0] fc1/kernel[0]",
        "12: fc1/kernel[1] fc1/bias[0] fc2/kernel[0]",
    )
    return Model(apply, params, (IMAGES,), groups)


def channels_first():
    def block(p, x):
        y = jax.lax.conv(x, p["kernel"], (2, 2), "SAME") + p["bias"].reshape(1, -1, 1, 1)
        return jax.nn.relu(y)

    def apply(p, x):
        x = block(p["conv2"], block(p["conv1"], x))
        return x.reshape(x.shape[0], -1) @ p["fc"].T

    params = {
        "conv1": {"kernel": normal(6, 3, 3, 3, scale=0.3), "bias": normal(6)},
        "conv2": {"kernel": normal(10, 6, 3, 3, scale=0.2), "bias": normal(10)},
        "fc": normal(5, 40, scale=0.2),
    }
    groups = (
        "6: conv1/kernel[0] conv1/bias[0] conv2/kernel[1]",
        "10: conv2/kernel[0] conv2/bias[0] fc[1]",
    )
    return Model(apply, params, (normal(4, 3, 8, 8),), groups)


def residual_block(p, x, norm, strides=1):
    y = jax.nn.relu(norm(p, "norm1", conv(p["conv1"], x, strides)))
    y = norm(p, "norm2", conv(p["conv2"], y))
    if "down" in p:
        x = norm(p, "down_norm", conv(p["down"], x, strides))
    return jax.nn.relu(x + y)


RESNET_GROUPS = (
    "6: stem/*[-1] norm/*[0] b1/conv2/*[-1] b1/norm2/*[0]"
    " b1/conv1/kernel[2] b2/conv1/kernel[2] b2/down/kernel[2]",
    "5: b1/conv1/*[-1] b1/norm1/*[0] b1/conv2/kernel[2]",
    "9: b2/conv1/*[-1] b2/norm1/*[0] b2/conv2/kernel[2]",
    "8: b2/conv2/*[-1] b2/norm2/*[0] b2/down/*[-1] b2/down_norm/*[0] head/kernel[0]",
)


def resnet_params(statistics):
    return {
        "stem": conv_params(3, 6),
        "norm": norm_params(6, statistics),
        "b1": {
            "conv1": conv_params(6, 5),
            "norm1": norm_params(5, statistics),
            "conv2": conv_params(5, 6),
            "norm2": norm_params(6, statistics, seed=1),
        },
        "b2": {
            "conv1": conv_params(6, 9),
            "norm1": norm_params(9, statistics),
            "conv2": conv_params(9, 8),
            "norm2": norm_params(8, statistics),
            "down": conv_params(6, 8, 1),
            "down_norm": norm_params(8, statistics, seed=1),
        },
        "head": dense_params(8, 4),
    }


def resnet():
    def norm(p, name, x):
        return batch_norm(p[name], x)

    def apply(p, x):
        x = jax.nn.relu(norm(p, "norm", conv(p["stem"], x)))
        x = residual_block(p["b1"], x, norm)
        x = residual_block(p["b2"], x, norm, strides=2)
        return dense(p["head"], x.mean((1, 2)))

    return Model(apply, resnet_params(True), (IMAGES,), RESNET_GROUPS)


def resnet_batch_statistics():
    """Batch norm by the statistics of the batch, nothing of which leaves the function."""

    def norm(p, name, x):
        mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
        return batch_norm({**p[name], "mean": mean, "var": var}, x)

    def apply(p, x):
        x = jax.nn.relu(norm(p, "norm", conv(p["stem"], x)))
        x = residual_block(p["b1"], x, norm)
        x = residual_block(p["b2"], x, norm, strides=2)
        return dense(p["head"], x.mean((1, 2)))

    return Model(apply, resnet_params(False), (IMAGES,), RESNET_GROUPS)


def densenet():
    def layer(p, x):
        y = conv(p["conv"], jax.nn.relu(batch_norm(p["norm"], x)))
        return jnp.concatenate([x, y], -1)

    def apply(p, x):
        x = conv(p["stem"], x)
        for name in ("l1", "l2"):
            x = layer(p[name], x)
        x = conv(p["mix"], jax.nn.relu(batch_norm(p["norm"], x)))
        return dense(p["head"], jax.nn.relu(x).mean((1, 2)))

    params = {
        "stem": conv_params(3, 4),
        "l1": {"norm": norm_params(4, True), "conv": conv_params(4, 6)},
        "l2": {"norm": norm_params(10, True), "conv": conv_params(10, 8)},
        "norm": norm_params(18, True),
        "mix": conv_params(18, 7, 1),
        "head": dense_params(7, 5),
    }
    groups = (
        "4: stem/*[-1] l1/norm/*[0] l1/conv/kernel[2] l2/norm/*[0] l2/conv/kernel[2]"
        " norm/*[0] mix/kernel[2]",
        "6: l1/conv/*[-1] l2/norm/*[0] l2/conv/kernel[2] norm/*[0] mix/kernel[2]",
        "8: l2/conv/*[-1] norm/*[0] mix/kernel[2]",
        "7: mix/*[-1] head/kernel[0]",
    )
    return Model(apply, params, (IMAGES,), groups)


def mobilenet():
    def apply(p, x):
        x = jax.nn.relu6(conv(p["stem"], x, 2))
        y = jax.nn.relu6(conv(p["expand"], x))
        y = jax.nn.relu6(conv(p["depthwise"], y, groups=p["depthwise"]["kernel"].shape[-1]))
        gate = jax.nn.relu(dense(p["reduce"], y.mean((1, 2))))
        gate = jax.nn.sigmoid(dense(p["gate"], gate))
        y = y * gate[:, None, None, :]
        x = x + conv(p["project"], y)
        return dense(p["head"], x.mean((1, 2)))

    params = {
        "stem": conv_params(3, 6),
        "expand": conv_params(6, 10, 1),
        "depthwise": conv_params(10, 10, groups=10),
        "reduce": dense_params(10, 4),
        "gate": dense_params(4, 10),
        "project": conv_params(10, 6, 1),
        "head": dense_params(6, 5),
    }
    groups = (
        "6: stem/*[-1] expand/kernel[2] project/*[-1] head/kernel[0]",
        "10: expand/*[-1] depthwise/*[-1] reduce/kernel[0] gate/*[-1] project/kernel[2]",
        "4: reduce/*[-1] gate/kernel[0]",
    )
    return Model(apply, params, (IMAGES,), groups)


def depth_multiplier():
    """A depthwise convolution with two outputs for each input: they leave with it."""

    def apply(p, x):
        x = jax.nn.relu(conv(p["stem"], x, 2))
        x = jax.nn.relu(conv(p["depthwise"], x, groups=x.shape[-1]))
        return dense(p["head"], x.mean((1, 2)))

    params = {
        "stem": conv_params(3, 6),
        "depthwise": conv_params(6, 12, groups=6),
        "head": dense_params(12, 5),
    }
    groups = (
        "6: stem/*[-1] depthwise/*[-1] head/kernel[0]",
        "2: depthwise/*[-1] head/kernel[0]",
    )
    return Model(apply, params, (IMAGES,), groups)


def resnext():
    """Groups of a convolution leave whole, or each loses the same of its inputs and outputs."""

    def apply(p, x):
        x = jax.nn.relu(conv(p["reduce"], x, 2))
        x = jax.nn.relu(conv(p["grouped"], x, groups=3))
        return dense(p["head"], jax.nn.relu(conv(p["expand"], x)).mean((1, 2)))

    params = {
        "reduce": conv_params(3, 12, 1),
        "grouped": conv_params(12, 15, groups=3),
        "expand": conv_params(15, 7, 1),
        "head": dense_params(7, 2),
    }
    groups = (
        "3: reduce/*[-1] grouped/*[-1] expand/kernel[2]",
        "4: reduce/*[-1] grouped/kernel[2]",
        "5: grouped/*[-1] expand/kernel[2]",
        "7: expand/*[-1] head/kernel[0]",
    )
    return Model(apply, params, (IMAGES,), groups)


def unet():
    def apply(p, x):
        high = jax.nn.relu(conv(p["in"], x))
        low = jax.nn.relu(conv(p["low"], max_pool(high)))
        middle = jax.image.resize(low, (*high.shape[:-1], low.shape[-1]), "bilinear")
        x = jax.nn.relu(conv(p["join"], jnp.concatenate([middle, high], -1)))
        repeated = jnp.repeat(jnp.repeat(low, 2, 1), 2, 2)
        return conv(p["out"], x) + conv(p["short"], repeated)

    params = {
        "in": conv_params(3, 6),
        "low": conv_params(6, 10),
        "join": conv_params(16, 7),
        "out": conv_params(7, 2, 1),
        "short": conv_params(10, 2, 1),
    }
    groups = (
        "6: in/*[-1] low/kernel[2] join/kernel[2]",
        "10: low/*[-1] join/kernel[2] short/kernel[2]",
        "7: join/*[-1] out/kernel[2]",
    )
    return Model(apply, params, (IMAGES,), groups)


def transposed_conv():
    def apply(p, x):
        x = jax.nn.relu(conv(p["down"], x, 2))
        x = jax.nn.relu(jax.lax.conv_transpose(x, p["up"], (2, 2), "SAME"))
        return conv(p["out"], x)

    params = {
        "down": conv_params(3, 6),
        "up": normal(2, 2, 6, 10, scale=0.3),
        "out": conv_params(10, 2),
    }
    groups = ("6: down/*[-1] up[2]", "10: up[3] out/kernel[2]")
    return Model(apply, params, (IMAGES,), groups)


def channel_shuffle():
    """12 channels as 3 x 4, transposed: what stays has to be a rectangle."""

    def apply(p, x):
        x = jax.nn.relu(conv(p["first"], x, 2))
        b, h, w, _ = x.shape
        x = x.reshape(b, h, w, 3, -1).swapaxes(3, 4).reshape(b, h, w, -1)
        return dense(p["head"], jax.nn.relu(conv(p["second"], x)).mean((1, 2)))

    params = {
        "first": conv_params(3, 12),
        "second": conv_params(12, 7, 1),
        "head": dense_params(7, 5),
    }
    groups = (
        "3: first/*[-1] second/kernel[2]",
        "4: first/*[-1] second/kernel[2]",
        "7: second/*[-1] head/kernel[0]",
    )
    return Model(apply, params, (IMAGES,), groups)


def pixel_shuffle():
    def apply(p, x):
        x = jax.nn.relu(conv(p["first"], x))
        b, h, w, _ = x.shape
        x = x.reshape(b, h, w, 2, 2, -1).transpose(0, 1, 3, 2, 4, 5).reshape(b, 2 * h, 2 * w, -1)
        return conv(p["second"], x)

    params = {"first": conv_params(3, 28), "second": conv_params(7, 2)}
    groups = ("7: first/*[-1] second/kernel[2]",)
    return Model(apply, params, (IMAGES,), groups)


def flipped():
    """A flip alone moves units; added to what it flips, it makes pairs."""

    def apply(p, x):
        x = jnp.flip(jax.nn.relu(conv(p["first"], x, 2)), -1)
        x = jax.nn.relu(conv(p["second"], x))
        x = conv(p["third"], x + jnp.flip(x, -1))
        return dense(p["head"], jax.nn.relu(x).mean((1, 2)))

    params = {
        "first": conv_params(3, 6),
        "second": conv_params(6, 10, 1),
        "third": conv_params(10, 7, 1),
        "head": dense_params(7, 5),
    }
    groups = (
        "6: first/*[-1] second/kernel[2]",
        "5: second/*[-1] third/kernel[2]",
        "7: third/*[-1] head/kernel[0]",
    )
    return Model(apply, params, (IMAGES,), groups)


def rolled():
    """A roll by half makes pairs too; by one of five it ties all channels together."""

    def apply(p, x):
        x = jax.nn.relu(conv(p["first"], x, 2))
        x = jax.nn.relu(conv(p["second"], x + jnp.roll(x, 4, -1)))
        x = jnp.roll(x, 3, -1)
        x = jax.nn.relu(conv(p["third"], x))
        return dense(p["head"], (x + jnp.roll(x, 1, -1)).mean((1, 2)))

    params = {
        "first": conv_params(3, 8),
        "second": conv_params(8, 6, 1),
        "third": conv_params(6, 5, 1),
        "head": dense_params(5, 2),
    }
    groups = ("4: first/*[-1] second/kernel[2]", "6: second/*[-1] third/kernel[2]")
    return Model(apply, params, (IMAGES,), groups)


def group_norm():
    """Groups leave whole, or each loses the same of its channels."""

    def apply(p, x):
        x = conv(p["first"], x, 2)
        b, h, w, c = x.shape
        split = x.reshape(b, h, w, 3, -1)
        mean = split.mean((1, 2, 4), keepdims=True)
        var = jnp.square(split).mean((1, 2, 4), keepdims=True) - jnp.square(mean)
        y = ((split - mean) * jax.lax.rsqrt(var + 1e-5)).reshape(b, h, w, c)
        y = y * wide(p["norm"]["scale"], y) + wide(p["norm"]["bias"], y)
        return dense(p["head"], jax.nn.relu(y).mean((1, 2)))

    params = {
        "first": conv_params(3, 12),
        "norm": norm_params(12),
        "head": dense_params(12, 5),
    }
    groups = (
        "3: first/*[-1] norm/*[0] head/kernel[0]",
        "4: first/*[-1] norm/*[0] head/kernel[0]",
    )
    return Model(apply, params, (IMAGES,), groups)


IMAGE_MODELS = (
    vgg,
    channels_first,
    resnet,
    resnet_batch_statistics,
    densenet,
    mobilenet,
    depth_multiplier,
    resnext,
    unet,
    transposed_conv,
    channel_shuffle,
    pixel_shuffle,
    flipped,
    rolled,
    group_norm,
)
