"""Files come back bit for bit."""

import dataclasses
import json
import os
import sys
from typing import NamedTuple

import equinox as eqx
import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file

import jaxcompress as jc
from jaxcompress.arrays import (
    NM,
    BitMasked,
    BlockSparse,
    Codebook,
    LowRank,
    Packed,
    Quantized,
    bit_mask,
    pack_bits,
)
from jaxcompress.export import _fields, _save
from tests.conftest import mesh_of
from tests.export.examples import DENSE, F32, PRESENT, RNG, arrays, host, round_trip, same


@pytest.mark.parametrize("name", arrays())
def test_every_compressed_array_comes_back(tmp_path, name):
    x = arrays()[name]
    back = round_trip(tmp_path, {"layer": [x]})["layer"][0]
    assert type(back) is type(x)
    same(back, x)
    np.testing.assert_array_equal(back.todense(), x.todense())
    same(round_trip(tmp_path, x), x)
    # The densified array, the abstract array and the array itself are all a `like`.
    same(round_trip(tmp_path, {"w": x}, like={"w": x.todense()})["w"], x)
    same(round_trip(tmp_path, {"w": x}, like={"w": jax.eval_shape(lambda: x)})["w"], x)


DTYPES = [n for n in _fields.DTYPES if hasattr(np, n) or hasattr(jnp, n)]


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5), (), (0, 4)])
def test_every_dtype_comes_back(tmp_path, name, shape):
    values = RNG.integers(0, 2, shape)
    x = np.asarray(values).astype(_fields.DTYPES[name])
    back = round_trip(tmp_path, {"x": x})["x"]
    assert (back.dtype, back.shape) == (x.dtype, x.shape)
    assert np.asarray(back).tobytes() == x.tobytes()
    wide = name in ("int64", "uint64", "float64", "complex128")
    assert isinstance(back, np.ndarray if wide else jax.Array)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"])
def test_any_bit_pattern_comes_back(tmp_path, name):
    dtype = _fields.DTYPES[name]
    x = np.frombuffer(RNG.bytes(256 * dtype.itemsize), dtype)
    back = round_trip(tmp_path, [x])[0]
    assert np.asarray(back).tobytes() == x.tobytes()


def test_containers_numbers_and_none_come_back(tmp_path):
    tree = {
        "none": None, "empty": {}, "list": [], "tuple": (), "nested": [(1, {"x": None})],
        "numbers": [True, 3, -(10**30), 0.1, float("inf"), float("-inf")], 0: {1: jnp.ones(2)},
        "scalar": np.float32(2), "key": jax.random.key(7),
        "keys": jax.random.split(jax.random.key(1)), "rbg": jax.random.key(0, impl="rbg"),
    }  # fmt: skip
    back = round_trip(tmp_path, tree)
    assert list(back) == list(tree)
    for key, value in tree.items():
        same(back[key], value)
    assert [type(v) for v in back["numbers"]] == [bool, int, int, float, float, float]
    assert np.isnan(round_trip(tmp_path, float("nan")))


@pytest.mark.parametrize("tree", [{}, [], (), None, {"a": None}, 3.5])
def test_trees_without_arrays(tmp_path, tree):
    assert round_trip(tmp_path, tree) == tree


def nested(levels):
    tree = jnp.ones(1)
    for i in range(levels):
        tree = {"a": tree} if i % 2 else [tree]
    return tree


def test_what_is_too_deep_to_read_is_not_written(tmp_path):
    same(round_trip(tmp_path, nested(100)), nested(100))
    same(round_trip(tmp_path, nested(100), like=nested(100)), nested(100))
    with pytest.raises(ValueError, match=r"save: `params` must have at most 100 levels.*at '0/a/"):
        jc.save(tmp_path / "file.safetensors", nested(101))
    assert jc.load(tmp_path / "file.safetensors")


def test_a_header_too_long_to_read_is_not_written(tmp_path, monkeypatch):
    path = tmp_path / "m"
    jc.save(path, {"step": 1})
    with pytest.raises(ValueError, match="save: `params` must fit a header"):
        jc.save(path, {"step": 2}, metadata={"a": "x" * 100_000_001})
    # Releases that do not look at the length themselves.
    monkeypatch.setattr(_save, "_MOST_HEADER_BYTES", 600)
    with pytest.raises(ValueError, match=r"got 1[0-9]{3} bytes\. Give shorter metadata"):
        jc.save(path, {"step": 2}, metadata={"a": "x" * 1000})
    jc.save(path, {"step": 3})
    assert jc.load(path) == {"step": 3}
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_the_root_may_be_an_array(tmp_path):
    same(round_trip(tmp_path, jnp.arange(3)), jnp.arange(3))


def test_odd_keys(tmp_path):
    tree = {
        "a/b": jnp.ones(1), "a": {"b": jnp.ones(2), "b#2": jnp.ones(3)}, "": jnp.ones(4),
        "层 é": {"\n\"\\": jnp.ones(5)}, "__metadata__": jnp.ones(6), "params": jnp.ones(7),
        "0": jnp.ones(8), 0: jnp.ones(9), "kind": {"kind": jnp.ones(10)},
    }  # fmt: skip
    back = round_trip(tmp_path, tree)
    assert list(back) == list(tree)
    for key, value in tree.items():
        same(back[key], value)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False),
        lambda t: st.lists(t, max_size=3) | st.dictionaries(st.text(max_size=4), t, max_size=3),
        max_leaves=8,
    )
)
def test_any_nesting_comes_back(tmp_path_factory, tree):
    try:
        tree_is_text = json.dumps(tree, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return
    assert tree_is_text
    assert round_trip(tmp_path_factory.mktemp("any"), tree) == tree


class State(NamedTuple):
    count: object
    trace: object


class Model(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.Sequential(nnx.Linear(4, 3, rngs=rngs), nnx.Dropout(0.5, rngs=rngs))
        self.out = nnx.Linear(3, 2, rngs=rngs)


def test_flax_nnx_states(tmp_path):
    state = nnx.state(Model(nnx.Rngs(0)))
    plain = round_trip(tmp_path, state)
    np.testing.assert_array_equal(plain["out"]["kernel"], state["out"]["kernel"][...])
    assert list(plain["layers"]["layers"]) == [0, 1]
    abstract = jax.eval_shape(lambda: nnx.state(Model(nnx.Rngs(0))))
    for like in (state, abstract):
        back = round_trip(tmp_path, state, like=like)
        assert type(back) is nnx.State
        same(back, state)
    model = Model(nnx.Rngs(5))
    nnx.update(model, back)
    same(nnx.state(model), state)


def test_compressed_flax_nnx_state_into_a_dense_like(tmp_path):
    state = nnx.state(Model(nnx.Rngs(0)), nnx.Param)
    packed = jc.pack(jc.masked(jc.chain(jc.prune(0.5), jc.quantize(4)), "**/kernel"), state)
    back = round_trip(tmp_path, packed, like=state)
    same(back, packed)
    same(round_trip(tmp_path, packed, like=packed), packed)
    plain = jc.todense(round_trip(tmp_path, packed))
    np.testing.assert_array_equal(plain["out"]["bias"], state["out"]["bias"][...])
    assert plain["out"]["kernel"].shape == (3, 2)


def test_frozen_dicts_and_named_tuples(tmp_path):
    frozen = flax.core.freeze({"params": {"w": jnp.ones((2, 3))}})
    assert round_trip(tmp_path, frozen)["params"]["w"].shape == (2, 3)
    back = round_trip(tmp_path, frozen, like=frozen)
    assert isinstance(back, flax.core.FrozenDict)
    same(back, frozen)
    state = (State(jnp.int32(3), None), State(1, {"w": jnp.ones(2)}))
    assert round_trip(tmp_path, state)[1]["count"] == 1
    same(round_trip(tmp_path, state, like=state), state)


def test_equinox_modules(tmp_path):
    mlp = eqx.nn.MLP(2, 2, 3, 1, key=jax.random.key(0))
    with pytest.raises(TypeError, match=r"eqx.filter"):
        jc.save(tmp_path / "a", {"f": jax.nn.relu})
    params, static = eqx.partition(mlp, eqx.is_array)
    assert round_trip(tmp_path, params)["layers"][1]["weight"].shape == (2, 3)
    back = round_trip(tmp_path, params, like=params)
    same(back, params)
    x = jnp.ones(2)
    np.testing.assert_array_equal(eqx.combine(back, static)(x), mlp(x))


@pytest.mark.parametrize(
    ("like", "leaf", "words"),
    [
        ({"a": {"w": jnp.ones((3, 2)), "b": None}}, "a/w", "float32\\[2, 3\\]"),
        ({"a": {"w": jnp.ones((2, 3), jnp.bfloat16), "b": None}}, "a/w", "bfloat16"),
        ({"a": {"w": jnp.ones((2, 3))}}, "a/b", "all paths"),
        ({"a": {"w": jnp.ones((2, 3)), "b": None, "c": 1}}, "a/c", "lacks"),
        ({"a": {"w": jnp.ones((2, 3)), "b": 1}}, "a/b", "None"),
        ({"a": {"w": None, "b": None}}, "a/w", "None"),
        ({"a": {"w": {"x": jnp.ones(2)}, "b": None}}, "a/w", "dict"),
        ({"a": jnp.ones((2, 3))}, "a", "dict"),
        ({"a": {"w": bit_mask(DENSE, PRESENT), "b": None}}, "a/w", "BitMasked"),
        ({"a": {"w": len, "b": None}}, "a/w", "built-in"),
    ],
)
def test_a_like_that_does_not_fit(tmp_path, like, leaf, words):
    tree = {"a": {"w": jnp.ones((2, 3)), "b": None}}
    with pytest.raises(ValueError, match=words) as error:
        round_trip(tmp_path, tree, like=like)
    assert f"at '{leaf}'" in str(error.value)
    assert str(error.value).startswith("load: `like` must")


def test_a_compressed_like_must_match_part_by_part(tmp_path):
    other = bit_mask(DENSE, np.zeros_like(PRESENT))
    with pytest.raises(ValueError, match=r"part by part.*at 'w'"):
        round_trip(tmp_path, {"w": bit_mask(DENSE, PRESENT)}, like={"w": other})
    with pytest.raises(ValueError, match=r"part by part.*at 'w'"):
        round_trip(tmp_path, {"w": jnp.asarray(DENSE)}, like={"w": other})


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_sharded_arrays(tmp_path, kind):
    mesh = mesh_of(kind)
    sharding = NamedSharding(mesh, PartitionSpec("d"))
    x = jax.device_put(jnp.arange(32.0).reshape(8, 4), sharding)
    codes = jax.device_put(jnp.arange(32, dtype=jnp.uint8).reshape(8, 4), sharding)
    q = Quantized(codes, jnp.ones((1, 1), jnp.float32), None, F32)
    tree = {"x": x, "q": q}
    same(round_trip(tmp_path, tree), tree)
    abstract = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), tree
    )
    for like in (tree, abstract):
        back = round_trip(tmp_path, tree, like=like)
        assert back["x"].sharding == sharding
        assert back["q"].codes.sharding == sharding
        same(back, tree)


def test_abstract_leaves_of_an_explicit_mesh_name_no_devices(tmp_path):
    x = jax.device_put(jnp.ones((8, 4)), NamedSharding(mesh_of("explicit"), PartitionSpec("d")))
    like = jax.eval_shape(lambda: x * 2.0)
    same(round_trip(tmp_path, [x], like=[like]), [x])


def test_the_users_arrays_are_not_changed(tmp_path):
    x = np.asfortranarray(DENSE)
    big = DENSE.astype(">f4")
    x.flags.writeable = False
    tree = {"x": x, "big": big, "strided": DENSE[::2, ::-1]}
    before = {k: v.copy() for k, v in tree.items()}
    back = round_trip(tmp_path, tree)
    for key in tree:
        np.testing.assert_array_equal(tree[key], before[key])
        np.testing.assert_array_equal(back[key], before[key])
    assert big.dtype == np.dtype(">f4")


def test_the_file_is_as_large_as_the_arrays(tmp_path):
    params = {"a": {"w": jnp.asarray(RNG.normal(size=(256, 256)), jnp.float32)}}
    packed = jc.pack(jc.chain(jc.prune(0.75), jc.quantize(4)), params)
    path = tmp_path / "m"
    jc.save(path, packed)
    assert jc.tree.nbytes(packed) <= path.stat().st_size <= jc.tree.nbytes(packed) + 2000


def test_other_programs_can_read_the_tensors(tmp_path):
    path = tmp_path / "m"
    jc.save(path, {"a": {"w": DENSE}, "q": arrays()["quantized_mask"]}, metadata={"format": "pt"})
    tensors = load_file(path)
    np.testing.assert_array_equal(tensors["a/w"], DENSE)
    assert {"q/codes/values/planes", "q/codes/mask/planes", "q/scale"} <= set(tensors)


def test_metadata(tmp_path):
    path = tmp_path / "m"
    notes = {"schritt": "10", "ü": "层\n", "": ""}
    jc.save(path, {"w": jnp.ones(2)}, metadata=notes)
    assert jc.export.read_metadata(path) == notes
    assert jc.export.read_metadata(str(path)) == notes
    assert notes == {"schritt": "10", "ü": "层\n", "": ""}
    jc.save(path, {})
    assert jc.export.read_metadata(path) == {}
    for wrong, error in [
        ({"a": 1}, TypeError), ({1: "a"}, TypeError), ("a", TypeError),
        ({"jaxcompress.version": "9"}, ValueError), ({"a": "\ud800"}, ValueError),
    ]:  # fmt: skip
        with pytest.raises(error, match="save: `metadata`"):
            jc.save(path, {}, metadata=wrong)


class Odd:
    shape, dtype = (2,), np.dtype(np.float32)


@pytest.mark.parametrize(
    ("tree", "error", "words"),
    [
        ({"a": "text"}, TypeError, "str at 'a'"),
        ({"a": np.array(["x"])}, TypeError, "at 'a'"),
        ({"a": np.array([object()])}, TypeError, "at 'a'"),
        ({"a": jax.ShapeDtypeStruct((2,), jnp.float32)}, TypeError, "ShapeDtypeStruct at 'a'"),
        ({"a": Odd()}, TypeError, "Odd at 'a'"),
        ({"a": {(1, 2): 3}}, TypeError, "str or int, got \\(1, 2\\) at 'a'"),
        ({True: 3}, TypeError, "True"),
        ({"a": -(1 << 4096)}, ValueError, "at most 4096 bits, got one of 4097 at 'a'"),
        ({"a\ud800": jnp.ones(1)}, ValueError, "Unicode"),
    ],
)
def test_what_can_not_be_saved(tmp_path, tree, error, words):
    with pytest.raises(error, match=words) as caught:
        jc.save(tmp_path / "m", tree)
    assert str(caught.value).startswith("save: `params` must")
    assert not list(tmp_path.iterdir())


@jax.tree_util.register_pytree_with_keys_class
class Twins:
    def tree_flatten_with_keys(self):
        key = jax.tree_util.DictKey("same")
        return [(key, jnp.ones(1)), (key, jnp.ones(2))], None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls()


def test_children_with_the_same_key_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"distinct keys.*twice in a Twins at 'a'"):
        jc.save(tmp_path / "m", {"a": Twins()})


def test_tracers_and_stacked_arrays_are_refused(tmp_path):
    with pytest.raises(TypeError, match=r"outside of jit.* |traced array at 'w'"):
        jax.jit(lambda w: jc.save(tmp_path / "m", {"w": w}))(jnp.ones(2))
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), arrays()["quantized_nm"])
    with pytest.raises(ValueError, match=r"well-formed.*one by one"):
        jc.save(tmp_path / "m", {"w": stacked})
    assert not list(tmp_path.iterdir())


def test_missing_files_and_directories(tmp_path):
    with pytest.raises(FileNotFoundError, match="load: `path` must"):
        jc.load(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="read_metadata: `path` must"):
        jc.export.read_metadata(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"directory that exists.*Create"):
        jc.save(tmp_path / "no" / "m", {})
    with pytest.raises(IsADirectoryError, match="save: `path`"):
        jc.save(tmp_path, {})
    with pytest.raises(IsADirectoryError, match="load: `path`"):
        jc.load(tmp_path)


def test_without_safetensors(tmp_path, monkeypatch):
    jc.save(tmp_path / "m", {}, metadata={"a": "b"})
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for call in (lambda: jc.save(tmp_path / "m", {}), lambda: jc.load(tmp_path / "m")):
        with pytest.raises(ImportError, match=r'pip install "jaxcompress\[save\]"'):
            call()
    assert jc.export.read_metadata(tmp_path / "m") == {"a": "b"}


def test_relative_paths_links_and_permissions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jc.save("plain", {"a": 1})
    os.symlink("plain", "link")
    jc.save("link", {"a": 2})
    assert os.path.islink("link")
    assert jc.load("plain") == {"a": 2}
    (tmp_path / "other").write_bytes(b"")
    assert os.stat("plain").st_mode == os.stat("other").st_mode


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_crash_leaves_the_previous_file(tmp_path, monkeypatch, function, error):
    path = tmp_path / "m"
    jc.save(path, {"step": 1})

    def crash(*args):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, function, crash)
        with pytest.raises(type(error)):
            jc.save(path, {"step": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    assert jc.load(path) == {"step": 1}
    jc.save(path, {"step": 2})
    assert jc.load(path) == {"step": 2}


def test_the_data_is_on_disk_before_the_name(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda f: (calls.append("fsync"), fsync(f)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b)))
    jc.save(tmp_path / "m", {})
    assert calls[:2] == ["fsync", "replace"]


def test_the_integers_of_packed_bits_agree_with_todense():
    for bits in range(1, 9):
        for signed in (False, True):
            low = -(1 << (bits - 1)) if signed else 0
            codes = (np.arange(21) % (1 << bits) + low).astype(np.int16)
            packed = pack_bits(codes, bits, signed=signed)
            np.testing.assert_array_equal(_fields._integers(host(packed)), codes)


def test_every_kind_of_array_can_be_saved():
    kinds = {cls for cls, *_ in _fields.KINDS.values()}
    classes = {v for v in vars(jc.arrays).values() if isinstance(v, type)}
    classes.remove(jc.arrays.Rows)  # a view to cut by, not an array
    moved = {jc.arrays.Rescaled, jc.arrays.Rotated}
    plain = {Packed, BitMasked, BlockSparse, NM, Quantized, LowRank, Codebook}
    assert kinds == classes == plain | moved | {jc.arrays.Sum, jc.arrays.ConvChain}
    for cls, parts, statics in _fields.KINDS.values():
        assert [f.name for f in dataclasses.fields(cls)] == [*parts, *statics]
