import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.report._shrunk import shrunk, sizes
from tests.conftest import mesh_of


def mlp(params, x):
    return jax.nn.relu(x @ params["up"]) @ params["down"]


def params_of(width, dtype=jnp.float32):
    return {"up": jnp.ones((4, width), dtype), "down": jnp.ones((width, 2), dtype)}


X = jnp.ones((3, 4))


def test_counted_by_hand():
    found = shrunk(mlp, params_of(8), mlp, params_of(6), X, time=False)
    down, up = found.rows
    assert (down.path, down.before, down.after) == ("down", (8, 2), (6, 2))
    assert (down.parameters, down.nbytes) == ((16, 12), (64, 48))
    assert (up.path, up.before, up.after) == ("up", (4, 8), (4, 6))
    assert found.parameters == (48, 36)
    assert found.nbytes == (192, 144)
    # Two products and the relu, for three rows.
    assert found.flops == tuple(3 * (2 * 4 * n + n + 2 * n * 2) for n in (8, 6))
    assert found.seconds is None
    assert found.speedup is None


def test_what_shrink_gives():
    params = {"up": jnp.ones((4, 8)), "down": jnp.ones((8, 2))}
    groups = jc.dependencies(mlp, params, X)
    keep = jc.select(groups, params, keep=0.5)
    small, small_mlp = jc.shrink(mlp, params, keep, X)
    found = shrunk(mlp, params, small_mlp, small, X, repeats=2)
    assert found.parameters == (48, 24)
    assert found.flops[1] * 2 == found.flops[0]
    assert sizes(small, params) == {"down": ((8, 2), (4, 2)), "up": ((4, 8), (4, 4))}


def test_leaves_that_are_gone_and_new_ones():
    before = params_of(8) | {"block": {"w": jnp.ones((4, 4)), "b": jnp.ones(4)}}

    def apply(params, x):
        return mlp(params, x + x @ params["block"]["w"] + params["block"]["b"][None])

    gone = [
        params_of(8) | {"block": {"w": None, "b": None}},
        params_of(8),
    ]
    for after in gone:
        found = shrunk(apply, before, mlp, after, X, time=False)
        rows = {row.path: row for row in found.rows}
        assert (rows["block/w"].before, rows["block/w"].after) == ((4, 4), None)
        assert rows["block/w"].parameters == (16, 0)
        assert found.parameters == (68, 48)
        assert sizes(after, before) == {"block/b": ((4,), None), "block/w": ((4, 4), None)}
        assert "block/w" in str(found)
    back = shrunk(mlp, params_of(8), apply, before, X, time=False)
    assert {row.path: row.before for row in back.rows}["block/w"] is None


def test_the_time_is_measured():
    found = shrunk(mlp, params_of(8), mlp, params_of(6), X, repeats=3)
    assert found.seconds is not None
    assert min(found.seconds) > 0
    assert found.speedup == found.seconds[0] / found.seconds[1]
    assert "latency" in str(found)


def test_a_longer_call_takes_longer():
    def slow(params, x):
        return jax.lax.fori_loop(0, 3000, lambda i, y: jnp.tanh(y @ params["w"]), x)

    params = {"w": jnp.eye(32)}
    found = shrunk(slow, params, lambda p, x: x @ p["w"], params, jnp.ones((32, 32)), repeats=5)
    assert found.speedup is not None
    assert found.speedup > 5


def test_abstract_params_and_args_are_counted_only():
    shapes = jax.eval_shape(lambda: params_of(8))
    found = shrunk(mlp, shapes, mlp, jax.eval_shape(lambda: params_of(6)), X)
    assert (found.parameters, found.seconds) == ((48, 36), None)
    x = jax.ShapeDtypeStruct((3, 4), jnp.float32)
    assert shrunk(mlp, params_of(8), mlp, params_of(6), x).seconds is None
    inside = jax.jit(lambda p: p["up"] * shrunk(mlp, p, mlp, p, X).flops[0])(params_of(8))
    assert inside.shape == (4, 8)


def test_static_arguments_keywords_and_other_results():
    def fn(params, x, mode, *, scale):
        return {"y": mlp(params, x) * scale, "mode": mode, "n": None}

    found = shrunk(fn, params_of(8), fn, params_of(6), X, "train", scale=2.0, repeats=1)
    assert found.seconds is not None


def test_compressed_leaves():
    wide = {"up": jnp.ones((64, 64)), "down": jnp.ones((64, 2))}
    packed = jc.pack(jc.quantize(bits=8), wide)
    found = shrunk(mlp, wide, mlp, packed, jnp.ones((3, 64)), repeats=1)
    assert found.parameters == (64 * 66, 64 * 66)
    assert found.nbytes[1] == jc.tree.nbytes(packed) < found.nbytes[0] / 3
    assert sizes(packed, wide) == {}


def test_bfloat16_numpy_and_meshes():
    found = shrunk(
        mlp,
        params_of(8, jnp.bfloat16),
        mlp,
        params_of(6, jnp.bfloat16),
        X.astype(jnp.bfloat16),
        repeats=1,
    )
    assert found.nbytes == (96, 72)
    in_numpy = [jax.tree.map(np.asarray, params_of(n)) for n in (8, 6)]
    assert shrunk(
        mlp, in_numpy[0], mlp, in_numpy[1], np.ones((3, 4), np.float32), repeats=1
    ).seconds
    for kind in ("auto", "explicit"):
        mesh = mesh_of(kind)
        placed = jax.device_put(params_of(8), jax.NamedSharding(mesh, jax.P()))
        x = jax.device_put(jnp.ones((4, 4)), jax.NamedSharding(mesh, jax.P("d")))
        with jax.set_mesh(mesh):
            assert shrunk(mlp, placed, mlp, placed, x, repeats=1).seconds


def test_as_it_is_printed():
    found = shrunk(mlp, params_of(8), mlp, params_of(6), X, time=False)
    assert (
        str(found._replace(seconds=(2e-3, 0.5e-3), flops=(3_000_000, 999_600)))
        == """\
 leaf   before  after  params  after   kept
 ───────────────────────────────────────────
 down   8×2     6×2        16     12  75.0%
 up     4×8     4×6        32     24  75.0%
 ───────────────────────────────────────────
 total                     48     36  75.0%
             before   after  ratio
 ──────────────────────────────────
 parameters      48      36  1.33×
 bytes        192 B   144 B  1.33×
 FLOPs          3 M     1 M  3.00×
 latency       2 ms  500 µs  4.00×"""
    )


def test_empty_trees_scalars_and_brackets_in_paths():
    nothing = shrunk(lambda p, x: x, {}, lambda p, x: x, {}, X, time=False)
    assert (nothing.rows, nothing.parameters) == ([], (0, 0))
    assert "total" in str(nothing)
    tree = {"[bold]w": jnp.ones(()), "e": jnp.ones((0, 3))}
    text = str(shrunk(lambda p, x: x, tree, lambda p, x: x, {}, X, time=False))
    assert "[bold]w" in text
    assert "scalar" in text
    root = shrunk(lambda p, x: x * p, jnp.ones(()), lambda p, x: x, None, X, time=False)
    assert root.rows[0].after is None
    assert "(root)" in str(root)


def test_errors():
    with pytest.raises(TypeError, match="cost: `fn` must be a function"):
        shrunk(3, {}, mlp, {}, X)
    with pytest.raises(ValueError, match="`repeats` must be a static integer of at least 1"):
        shrunk(mlp, params_of(8), mlp, params_of(6), X, repeats=0)
    twice = {"a/b": X, "a": {"b": X}}
    with pytest.raises(ValueError, match="path of its own"):
        sizes(twice, {})
