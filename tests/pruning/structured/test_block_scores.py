"""Scores of blocks against NumPy and against functions written without the block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress.pruning.structured._base import Dependencies, Keep
from jaxcompress.pruning.structured._block_scores import (
    block_change,
    block_influence,
    loss_change,
    output_change,
)
from jaxcompress.pruning.structured._blocks import Dropped, drop_blocks, residual_blocks
from jaxcompress.pruning.structured._select_blocks import keep_blocks, select_blocks
from tests.tracing.models import normal

PARAMS = {
    "a": normal(8, 8),
    "stack": normal(3, 8, 8, scale=0.2),
    "p": normal(8, 8, seed=1),
    "q": normal(8, 8, seed=2),
    "last": {"w": normal(8, 8, seed=3), "b": normal(8)},
}
BATCHES = [normal(2, 3, 8, seed=i) for i in range(2)]


def net(p, x):
    x = x + jnp.tanh(x @ p["a"])
    x, _ = jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, p["stack"])
    x = (jnp.tanh(x @ p["p"]) + jnp.sin(x @ p["q"])) + x
    return jax.jit(lambda p, x: x + jnp.tanh(x @ p["w"]) + p["b"][None, None])(p["last"], x)


def stream(x, gone=()):
    """The pairs of each block, and the result, in float64."""
    x, pairs = np.asarray(x, np.float64), {}
    p = jax.tree.map(lambda w: np.asarray(w, np.float64), PARAMS)

    def add(name, x, f):
        y = x if name in gone else x + f
        pairs[name] = x, y
        return y

    x = add("a", x, np.tanh(x @ p["a"]))
    for i in range(3):
        x = add(f"stack{i}", x, np.tanh(x @ p["stack"][i]))
    f = {"p": np.tanh(x @ p["p"]), "q": np.sin(x @ p["q"])}
    f = {k: 0 * v if k in gone else v for k, v in f.items()}
    y = x + f["p"] + f["q"]
    pairs |= {"p": (y - f["p"], y), "q": (y - f["q"], y)}
    return add("last", y, np.tanh(y @ p["last"]["w"]) + p["last"]["b"]), pairs


UNITS = ("a", "stack0", "stack1", "stack2", "p", "q", "last")


def flat(scores):
    """By unit, as NumPy has them."""
    found = {k: v for k, v in scores.items() if k != "stack"}
    return {k: float(v) for k, v in found.items()} | {
        f"stack{i}": float(v) for i, v in enumerate(scores["stack"])
    }


@pytest.fixture(scope="module")
def blocks():
    return residual_blocks(net, PARAMS, BATCHES[0])


def test_the_blocks_of_the_network(blocks):
    assert [(b.name, b.layers) for b in blocks] == [
        ("a", 0), ("stack", 3), ("p", 0), ("q", 0), ("last", 0)
    ]  # fmt: skip


def test_block_influence_is_one_less_the_mean_cosine(blocks):
    found = flat(block_influence(net, PARAMS, BATCHES, blocks))
    pairs = [stream(x)[1] for x in BATCHES]
    for unit in UNITS:
        x, y = (np.concatenate([p[unit][k].reshape(-1, 8) for p in pairs]) for k in range(2))
        cosine = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
        np.testing.assert_allclose(found[unit], 1 - cosine.mean(), rtol=1e-4)


def test_block_change_is_the_relative_norm(blocks):
    found = flat(block_change(net, PARAMS, BATCHES, blocks))
    pairs = [stream(x)[1] for x in BATCHES]
    for unit in UNITS:
        x, y = (np.concatenate([p[unit][k].ravel() for p in pairs]) for k in range(2))
        expected = np.linalg.norm(y - x) / np.linalg.norm(x)
        np.testing.assert_allclose(found[unit], expected, rtol=1e-5)


def test_output_and_loss_change_are_those_without_the_block(blocks):
    def loss(p, x, y):
        return ((net(p, x) - y) ** 2).mean()

    found = flat(output_change(net, PARAMS, BATCHES, blocks))
    losses = flat(loss_change(loss, PARAMS, [(x, 2 * x) for x in BATCHES], blocks))
    for unit in UNITS:
        with_block = [stream(x)[0] for x in BATCHES]
        gone = [stream(x, (unit,))[0] for x in BATCHES]
        change = np.linalg.norm(np.stack(gone) - np.stack(with_block))
        np.testing.assert_allclose(found[unit], change / np.linalg.norm(with_block), rtol=1e-5)
        rise = [
            ((a - 2 * np.asarray(x)) ** 2).mean() - ((b - 2 * np.asarray(x)) ** 2).mean()
            for a, b, x in zip(gone, with_block, BATCHES, strict=True)
        ]
        np.testing.assert_allclose(losses[unit], np.mean(rise), rtol=1e-4, atol=1e-5)


def test_scores_inside_of_loops_branches_and_remat():
    def fn(p, x):
        def step(i, x):
            return jax.checkpoint(lambda x: x + jnp.tanh(x @ p["w"]))(x)

        x = jax.lax.fori_loop(0, 2, step, x)
        return jax.lax.cond(x[0, 0] > -1e9, lambda x: x + x @ p["v"], lambda x: x, x)

    params, x = {"w": normal(8, 8), "v": normal(8, 8, seed=1)}, normal(4, 8)
    blocks = residual_blocks(fn, params, x)
    found = block_change(fn, params, [x], blocks)
    w, v, x = (np.asarray(z, np.float64) for z in (params["w"], params["v"], x))
    y = x + np.tanh(x @ w)
    z = y + np.tanh(y @ w)
    change = np.square(y - x).sum() + np.square(z - y).sum()
    expected = np.sqrt(change / (np.square(x).sum() + np.square(y).sum()))
    np.testing.assert_allclose(found["w"], expected, rtol=1e-5)
    np.testing.assert_allclose(found["v"], np.linalg.norm(z @ v) / np.linalg.norm(z), rtol=1e-5)


def test_influence_of_whole_layers_is_of_their_first_and_last_value():
    def fn(p, x):
        for layer in p["layers"]:
            run = jax.checkpoint(lambda w, x: x + jnp.tanh(x @ w))
            x = run(layer["attn"], x)
            x = run(layer["mlp"], x)
        return x

    params = {"layers": [{"attn": normal(8, 8, seed=i), "mlp": normal(8, 8)} for i in range(2)]}
    x = normal(4, 8)
    layers = residual_blocks(fn, params, x, whole_layers=True)
    assert [b.name for b in layers] == ["layers/0", "layers/1"]
    found = block_change(fn, params, [x], layers)
    x = np.asarray(x, np.float64)
    for i, layer in enumerate(params["layers"]):
        y = x + np.tanh(x @ np.asarray(layer["attn"], np.float64))
        y = y + np.tanh(y @ np.asarray(layer["mlp"], np.float64))
        expected = np.linalg.norm(y - x) / np.linalg.norm(x)
        np.testing.assert_allclose(found[f"layers/{i}"], expected, rtol=1e-5)
        x = y
    changes = output_change(fn, params, [normal(4, 8)], layers)
    small, small_fn = drop_blocks(fn, params, layers[:1], normal(4, 8))
    a, b = small_fn(small, normal(4, 8)), fn(params, normal(4, 8))
    np.testing.assert_allclose(
        changes["layers/0"], jnp.linalg.norm(a - b) / jnp.linalg.norm(b), rtol=1e-5
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_scores_are_float32_and_narrow_streams_are_summed_in_it(dtype):
    def fn(p, x):
        return x + x @ p["w"]

    params = {"w": jnp.eye(8, dtype=dtype)}
    x = jnp.full((64, 64, 8), 8.0, dtype)
    blocks = residual_blocks(fn, params, x)
    found = block_change(fn, params, [x], blocks)["w"]
    assert found.dtype == jnp.float32
    assert found == 1.0
    np.testing.assert_allclose(block_influence(fn, params, [x], blocks)["w"], 0.0, atol=1e-6)


def test_zeros_are_no_nan_and_features_may_be_any_axis():
    def fn(p, x):
        return x + jnp.tanh(jnp.einsum("oi,bit->bot", p["w"], x))

    params, x = {"w": normal(8, 8)}, normal(2, 8, 5).at[:, :, 0].set(0)
    blocks = residual_blocks(fn, params, x)
    found = block_influence(fn, params, [x], blocks, axis=1)["w"]
    x = np.asarray(x, np.float64)
    y = x + np.tanh(np.einsum("oi,bit->bot", np.asarray(params["w"]), x))
    with np.errstate(invalid="ignore"):
        cosine = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
    np.testing.assert_allclose(found, 1 - np.nan_to_num(cosine, nan=1.0).mean(), rtol=1e-4)
    assert block_change(fn, params, [jnp.zeros((2, 8, 5))], blocks)["w"] == 0


def test_the_lowest_scores_are_chosen(blocks):
    scores = {"a": 0.5, "stack": [0.1, 0.9, 0.2], "p": 0.3, "q": 0.3, "last": 1.0}
    (stack,) = select_blocks(blocks, scores, drop=2)
    assert stack == Dropped(blocks[1], (False, True, False))
    # Of equal scores the later goes.
    names = [d.block.name for d in select_blocks(blocks, scores, drop=3)]
    assert names == ["stack", "q"]
    assert select_blocks(blocks, scores, drop=0) == select_blocks(blocks, scores, keep=1.0) == ()
    assert select_blocks(blocks, scores, keep=5 / 7) == (stack,)
    assert select_blocks(blocks, scores, keep=0.75) == (Dropped(blocks[1], (False, True, True)),)
    everything = select_blocks(blocks, scores, keep=0.0)
    assert len(everything) == 5
    assert everything[1].stays == (False,) * 3
    small, small_net = drop_blocks(net, PARAMS, everything, BATCHES[0])
    assert jax.tree.leaves(small) == []
    np.testing.assert_array_equal(small_net(small, BATCHES[0]), BATCHES[0])


def test_a_block_and_what_is_inside_of_it_are_not_both_chosen():
    def fn(p, x):
        h = x @ p["down"]
        h = h + jnp.tanh(h @ p["inner"])
        return x + h @ p["up"]

    params = {"down": normal(8, 4), "inner": normal(4, 4), "up": normal(4, 8)}
    inner, outer = residual_blocks(fn, params, normal(4, 8))
    for low, high in ((inner, outer), (outer, inner)):
        scores = {low.name: 0.1, high.name: 0.2}
        assert select_blocks((inner, outer), scores, drop=1) == (Dropped(low),)
        with pytest.raises(ValueError, match="none is inside of another"):
            select_blocks((inner, outer), scores, drop=2)


def test_blocks_go_into_keep(blocks):
    dropped = select_blocks(
        blocks, dict.fromkeys("apq", 0.1) | {"stack": [1] * 3, "last": 2}, drop=1
    )
    keep = keep_blocks(PARAMS, dropped)
    assert isinstance(keep, Keep)
    assert keep.blocks == dropped
    assert not keep.masks
    assert keep.dependencies.shapes["last/w"].shape == (8, 8)
    channels = Keep(Dependencies((), (), {}), {"group": np.ones(3, bool)})
    both = keep_blocks(channels, dropped)
    assert both.blocks == dropped
    assert both.masks is channels.masks


def test_wrong_arguments_are_refused(blocks):
    scores = dict.fromkeys("apq", 0.1) | {"stack": np.ones(3), "last": 2.0}
    for options in ({}, {"drop": 1, "keep": 0.5}):
        with pytest.raises(ValueError, match="and not both"):
            select_blocks(blocks, scores, **options)
    with pytest.raises(ValueError, match="static integer in"):
        select_blocks(blocks, scores, drop=8)
    with pytest.raises(ValueError, match="real number in"):
        select_blocks(blocks, scores, keep=1.5)
    with pytest.raises(ValueError, match="score for each block"):
        select_blocks(blocks, {"a": 1.0}, drop=1)
    with pytest.raises(ValueError, match="shape"):
        select_blocks(blocks, scores | {"stack": 1.0}, drop=1)
    with pytest.raises(ValueError, match="shape"):
        select_blocks(blocks, scores | {"a": np.nan}, drop=1)
    with pytest.raises(TypeError, match="static"):
        jax.jit(lambda s: select_blocks(blocks, scores | {"a": s}, drop=1))(1.0)
    with pytest.raises(ValueError, match="at least one block"):
        select_blocks((), {}, drop=0)
    with pytest.raises(ValueError, match="at least one batch"):
        block_influence(net, PARAMS, [], blocks)
    with pytest.raises(ValueError, match="at least one batch"):
        output_change(net, PARAMS, [], blocks)
    with pytest.raises(ValueError, match="have a residual block 'a'"):
        block_change(lambda p, x: x @ p["a"], PARAMS, BATCHES, blocks[:1])
    with pytest.raises(ValueError, match="one number"):
        loss_change(net, PARAMS, BATCHES, blocks)
    with pytest.raises(TypeError, match="hold blocks of"):
        block_change(net, PARAMS, BATCHES, ["a"])
