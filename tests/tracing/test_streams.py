"""Axes that may turn: where a function says so, turning them changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.quantization import rotate_streams
from jaxcompress.tracing import streams

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
D = 8


def some(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


P = {
    "a": some(4, D),
    "b": some(D),
    "c": some(D, D),
    "d": some(D, 3),
    "e": some(D, 3),
    "g": 1 + 0.3 * some(D),
    "o": some(D),
    "s": some(5, D, D),
    "sg": 1 + 0.3 * some(5, D),
    "cls": some(D),
    "heads": some(D, 2, 3),
    "w": some(6, D),
}
X = some(6, 4)


def rms(x):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


def layer_norm(x):
    return jax.nn.standardize(x, epsilon=1e-6)


def layers(p, x, gains=True):
    def body(x, both):
        w, g = both
        return x + jnp.tanh(rms(x) * (g if gains else 1) @ w) @ p["c"], x.sum(-1)

    return jax.lax.scan(body, x, (p["s"], p["sg"]))


# From a name to the function and the widest stream that may turn: its size, or a part of the
# reason why it may not.
PROGRAMS = {
    "two products": (lambda p, x: x @ p["a"] @ p["d"], D),
    "bias": (lambda p, x: (x @ p["a"] + p["b"]) @ p["d"], D),
    "transposed": (lambda p, x: x @ p["a"] @ p["d"].T.T, D),
    "numbers": (lambda p, x: -(2 * (x @ p["a"]) - 1.0) / 3 @ p["d"], D),
    "mean": (lambda p, x: jnp.mean(x @ p["a"], -1, keepdims=True) + x @ p["a"] @ p["d"], D),
    "rms": (lambda p, x: rms(x @ p["a"]) @ p["d"], D),
    "gain": (lambda p, x: (rms(x @ p["a"]) * p["g"]) @ p["d"], D),
    "gain first": (lambda p, x: (p["g"] * rms(x @ p["a"])) @ p["d"], D),
    "shifted gain": (lambda p, x: (rms(x @ p["a"]) * (1 + p["g"])) @ p["d"], D),
    "two gains": (lambda p, x: (rms(x @ p["a"]) * p["g"] * p["o"]) @ p["d"], D),
    "layer norm": (
        lambda p, x: (layer_norm(x @ p["a"]) * p["g"] + p["o"]) @ p["d"] + x @ p["a"] @ p["e"],
        D,
    ),
    "residual": (lambda p, x: (x @ p["a"] + jnp.tanh(x @ p["a"] @ p["d"]) @ p["e"].T) @ p["d"], D),
    "square": (lambda p, x: (x @ p["a"] + (x @ p["a"]) @ p["c"]) @ p["d"], D),
    "mask": (lambda p, x: jnp.where(x[:, :1] > 0, x @ p["a"], p["b"]) @ p["d"], D),
    "class token": (lambda p, x: jnp.concatenate([p["cls"][None], x @ p["a"]])[0] @ p["d"], D),
    "pooled": (lambda p, x: jnp.sum(x @ p["a"], 0) @ p["d"], D),
    "reversed": (lambda p, x: (x @ p["a"])[::-1] @ p["d"], D),
    "padded": (lambda p, x: jnp.pad(x @ p["a"], ((1, 1), (0, 0))) @ p["d"], D),
    "split": (lambda p, x: (x @ p["a"]).reshape(2, 3, D) @ p["d"], D),
    "jit": (lambda p, x: jax.jit(lambda x: rms(x) * p["g"])(x @ p["a"]) @ p["d"], D),
    "remat": (lambda p, x: jax.checkpoint(rms)(x @ p["a"]) @ p["d"], D),
    "branches": (
        lambda p, x: (
            jax.lax.cond(x[0, 0] > 0, lambda y: y + p["b"], lambda y: -y, x @ p["a"]) @ p["d"]
        ),
        D,
    ),
    "scan": (lambda p, x: layers(p, x @ p["a"])[0] @ p["d"], D),
    "collected": (lambda p, x: (layers(p, x @ p["a"], False)[1], x @ p["a"] @ p["d"])[0], D),
    "heads": (lambda p, x: jnp.einsum("nd,dhk->nhk", x @ p["a"], p["heads"]).sum((1, 2)), D),
    "tied": (lambda p, x: rms(p["c"][jnp.arange(3)]) @ p["c"].T, D),
    "tied, gain": (lambda p, x: (rms(p["c"][jnp.arange(3)]) * p["g"]) @ p["c"].T, "tied"),
    "activation": (lambda p, x: jax.nn.relu(x @ p["a"]) @ p["d"], "max"),
    "gain in a sum": (lambda p, x: (x @ p["a"] + rms(x @ p["a"]) * p["g"]) @ p["d"], "add"),
    "gain of a weight": (lambda p, x: (rms(x @ p["a"]) * p["w"]) @ p["d"], "mul"),
    "one gain, two uses": (lambda p, x: (rms(x @ p["a"]) * p["g"] + p["g"]) @ p["d"], "several"),
    "result": (lambda p, x: (x @ p["a"], x @ p["a"] @ p["d"]), "result"),
    "argument": (lambda p, x: (x @ p["a"] + jnp.tile(x, 2)) @ p["d"], "add"),
    "merged": (lambda p, x: (x @ p["a"]).reshape(-1)[:D] @ p["d"], "reshape"),
    "cut": (lambda p, x: (x @ p["a"])[:, :4] @ p["d"][:4], "slice"),
    "largest": (lambda p, x: jnp.max(x @ p["a"], 0) @ p["d"], "reduce_max"),
    "bare square": (lambda p, x: ((x @ p["a"]) ** 2) @ p["d"], "dot_general"),
    "weighted squares": (
        lambda p, x: jnp.einsum("nd,n->d", (x @ p["a"]) ** 2, x[:, 0]) @ p["d"],
        "dot_general",
    ),
    "integers": (
        lambda p, x: (x @ p["a"]).astype(jnp.int32).astype(jnp.float32) @ p["d"],
        "convert",
    ),
    "chosen by itself": (
        lambda p, x: jnp.where((x @ p["a"]).astype(bool), x[0, 0], 1.0) @ p["d"],
        "convert",
    ),
    "cube": (lambda p, x: jnp.sum((x @ p["a"]) ** 3) + x @ p["a"] @ p["d"], "integer_pow"),
    "dropped features": (
        lambda p, x: jnp.where(jnp.arange(D) > 2, x @ p["a"], 0.0) @ p["d"],
        "select_n",
    ),
    "counted": (
        lambda p, x: (x @ p["a"] + jnp.cumsum(jnp.full((6, D), x[0, 0]), 1)) @ p["d"],
        "add",
    ),
    "noise": (
        lambda p, x: (x @ p["a"] + jax.random.normal(jax.random.key(0), (6, D))) @ p["d"],
        "add",
    ),
    "mean of a gain": (lambda p, x: jnp.mean(x @ p["a"] * p["g"]) + x @ p["a"] @ p["d"], "reduce"),
    "while": (
        lambda p, x: (
            jax.lax.while_loop(lambda y: y.sum() < 9, lambda y: y + 1, x @ p["a"]) @ p["d"]
        ),
        "while",
    ),
    "joined features": (
        lambda p, x: jnp.concatenate([x @ p["a"], x @ p["a"]], 1) @ jnp.tile(p["d"], (2, 1)),
        "concatenate",
    ),
    "divided by": (lambda p, x: (1 / (x @ p["a"])) @ p["d"], "div"),
    "layers' own gains": (
        lambda p, x: (
            jax.lax.scan(
                lambda x, g: (x + jnp.tanh((rms(x) * g) @ p["e"]) @ p["d"].T, None),
                x @ p["a"],
                p["sg"],
            )[0]
            @ p["d"]
        ),
        "layers of a scan",
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_may_turn(name):
    fn, expected = PROGRAMS[name]
    with jax.numpy_rank_promotion("allow"):
        found = [s for s in streams(fn, P, X) if s.size == D]
        if isinstance(expected, str):
            assert found, name
            assert all(s.refused is not None for s in found), found
            assert any(expected in s.refused for s in found), found
            with pytest.raises(ValueError, match="rotate_streams: `fn`"):
                rotate_streams(fn, P, X, key=KEY)
            return
        assert any(s.refused is None for s in found), found
        new = rotate_streams(fn, P, X, key=KEY)
        before, after = fn(P, X), fn(new, X)
    touched = {m.path for s in found if s.refused is None for m in s.members}
    assert len(touched) > 1 or name == "tied"
    for path in P:
        assert (path in touched) == (new[path] is not P[path])
        if path in touched:
            assert np.abs(new[path] - P[path]).max() > 0.01
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


def test_members_say_what_they_do():
    fn, _ = PROGRAMS["layer norm"]
    with jax.numpy_rank_promotion("allow"):
        (stream,) = [s for s in streams(fn, P, X) if s.size == D]
    of = {m.path: m for m in stream.members}
    assert set(of) == {"a", "d", "e", "g", "o"}
    assert (of["d"].role, of["d"].reads, of["d"].gains) == ("weight", True, ("g",))
    assert (of["e"].role, of["e"].reads, of["e"].gains) == ("weight", True, ())
    assert (of["a"].role, of["a"].reads, of["a"].axis) == ("weight", False, 1)
    assert (of["g"].role, of["o"].role, of["o"].gains) == ("gain", "offset", ("g",))


def test_nothing_is_run():
    shapes = jax.eval_shape(lambda p: p, P)
    fn = PROGRAMS["two products"][0]
    assert streams(fn, shapes, jax.ShapeDtypeStruct((6, 4), jnp.float32)) == streams(fn, P, X)


def test_bad_input():
    with pytest.raises(TypeError, match="streams: `fn`"):
        streams(P, X)
    packed = jc.pack(jc.masked(jc.quantize(4), "a"), P)
    with pytest.raises(TypeError, match=r"rotate_streams: `params`.*dense"):
        rotate_streams(PROGRAMS["bias"][0], packed, X, key=KEY)
    with pytest.raises(TypeError, match="rotate_streams: `key`"):
        rotate_streams(PROGRAMS["bias"][0], P, X, key=0)
    zero = {**P, "g": P["g"].at[2].set(0.0)}
    with jax.numpy_rank_promotion("allow"):
        with pytest.raises(ValueError, match=r"no zeros where an offset.*1 zeros"):
            rotate_streams(PROGRAMS["layer norm"][0], zero, X, key=KEY)
        fn = PROGRAMS["gain"][0]
        new = rotate_streams(fn, zero, X, key=KEY)
        np.testing.assert_allclose(fn(zero, X), fn(new, X), atol=1e-5)
