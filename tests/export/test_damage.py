"""Damaged, foreign and crafted files are refused."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import jaxcompress as jc
from jaxcompress.arrays import (
    ConvChain,
    LowRank,
    Packed,
    n_m,
    pack_bits,
)
from jaxcompress.export import _fields, _format, _structure
from tests.export.examples import CODES, DENSE, PRESENT, arrays, host, same


def small_file(path):
    tree = {
        "q": arrays()["quantized_mask"], "n": arrays()["nm"], "b": [None, 2, jnp.ones(3, bool)],
    }  # fmt: skip
    jc.save(path, tree, metadata={"note": "text"})
    return tree


def test_every_truncation_is_refused(tmp_path):
    path = tmp_path / "m"
    small_file(path)
    data = path.read_bytes()
    cuts = {*range(20), *range(0, len(data), 37), *range(len(data) - 20, len(data))}
    for cut in cuts:
        path.write_bytes(data[:cut])
        with pytest.raises(ValueError, match=r"load: `path` must .* at '.*m'\. \w"):
            jc.load(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(ValueError, match="load: `path` must"):
        jc.load(path)


def test_every_flipped_byte_is_refused_or_harmless(tmp_path):
    path = tmp_path / "m"
    tree = small_file(path)
    data = path.read_bytes()
    refused = 0
    for place in range(len(data)):
        for flip in (0xFF,) if place % 3 else (0x01, 0x20):
            changed = bytearray(data)
            changed[place] ^= flip
            path.write_bytes(changed)
            try:
                notes = jc.export.read_metadata(path)
                back = jc.load(path)
            except ValueError as error:
                assert "`path` must" in str(error)  # noqa: PT017
                refused += 1
            else:
                assert notes == {"note": "text"}
                same(back, tree)
    # Only padding of the header, at most a word, may change without harm.
    assert refused >= len(data) * 4 // 3 - 32


@pytest.mark.parametrize(
    "data", [b"", b"PK\x03\x04" * 9, b"\x80\x04" * 50, b"\xff" * 64, bytes(64)]
)
def test_files_of_another_format(tmp_path, data):
    (tmp_path / "m").write_bytes(data)
    for read in (jc.load, jc.export.read_metadata):
        with pytest.raises(ValueError, match=r"whole safetensors file.*at '.*m'"):
            read(tmp_path / "m")


@pytest.mark.parametrize("header", [b"[1, 2]", b'{"__metadata__":3}', b"[" * 100000, b"12"])
def test_odd_headers(tmp_path, header):
    (tmp_path / "m").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match="unreadable header"):
        jc.load(tmp_path / "m")


def test_a_safetensors_file_of_another_program(tmp_path):
    for notes in (None, {"format": "pt"}):
        save_file({"w": DENSE}, tmp_path / "m", notes)
        with pytest.raises(ValueError, match=r"another program.*safetensors.numpy.load_file"):
            jc.load(tmp_path / "m")


def craft(path, structure, tensors=None, version="1"):
    """A file with the right digests and any structure."""
    tensors = {} if tensors is None else tensors
    notes = {
        "jaxcompress.version": version,
        "jaxcompress.structure": structure if isinstance(structure, str) else json.dumps(structure),
        "jaxcompress.data_sha256": _format.data_digest(
            (n, _structure.CODES[x.dtype.name], list(x.shape), x.tobytes())
            for n, x in tensors.items()
        ),
    }
    notes["jaxcompress.sha256"] = _format.header_digest(notes)
    save_file(tensors, path, notes)


@pytest.mark.parametrize("version", ["2", "10", "0", "", "one"])
def test_other_versions_are_refused(tmp_path, version):
    craft(tmp_path / "m", {"kind": "none"}, version=version)
    with pytest.raises(ValueError, match=r"known format version.*Update jaxcompress"):
        jc.load(tmp_path / "m")
    craft(tmp_path / "m", {"kind": "none"})
    assert jc.load(tmp_path / "m") is None


def array(name, **more):
    return {"kind": "array", "tensor": name, **more}


TENSORS = {
    "t": np.zeros((2, 3), np.uint8),
    "k": np.zeros(2, np.uint32),
    "f": np.ones(3, np.float32),
}


@pytest.mark.parametrize(
    "node",
    [
        "", "{", "[" * 100000, '{"kind":"list","items":[' * 5000, 3, None, [], {}, {"kind": 3},
        {"kind": "pickle"}, {"kind": "list"}, {"kind": "list", "items": 3},
        {"kind": "dict", "items": [1]},
        {"kind": "dict", "items": [[None, {"kind": "none"}]]}, {"kind": "dict", "items": {"a": 1}},
        {"kind": "dict", "items": [["a", {"kind": "none"}], ["a", {"kind": "none"}]]},
        {"kind": "tuple", "items": [{"kind": "what"}]}, {"kind": "int", "value": 1.5},
        {"kind": "int", "value": True}, {"kind": "float", "value": "one"},
        {"kind": "bool", "value": 1},
        {"kind": "float"}, array("missing"), array(3), array(["t"]), {"kind": "array"},
        array("t", dtype="object"), array("t", dtype=3), array("t", dtype="float32"),
        array("f", dtype="int8"), {"kind": "key", "impl": "threefry2x32"},
        {"kind": "key", "impl": "none", "data": array("k")},
        {"kind": "key", "impl": "threefry2x32", "data": array("t")},
        {"kind": "key", "impl": "rbg", "data": array("k")},
        {"kind": "packed"}, {"kind": "packed", "static": {}, "parts": {}},
        {"kind": "packed", "static": 3, "parts": []},
    ],
)  # fmt: skip
def test_crafted_structures_are_refused(tmp_path, node):
    craft(tmp_path / "m", node, TENSORS)
    with pytest.raises(ValueError, match="load: `path` must name a well-formed file"):
        jc.load(tmp_path / "m")


def test_a_crafted_boolean_is_refused(tmp_path):
    craft(tmp_path / "m", array("b"), {"b": np.full(2, 7, np.uint8).view(bool)})
    with pytest.raises(ValueError, match="0 or 1"):
        jc.load(tmp_path / "m")


def crafted_arrays():
    a = {name: host(x) for name, x in arrays().items()}
    change = dataclasses.replace
    short = host(pack_bits(np.zeros(3, np.uint8), 2))
    nm, mask, q, book = a["nm"], a["mask"], a["quantized"], a["codebook"]
    blocks, none = a["blocks"], a["blocks_none"]
    f, v, b = a["quantized_floats"], a["quantized_values"], a["codebook"]
    wide = host(pack_bits(np.full(48 // 2, 3, np.uint8), 2))
    first = np.asarray(np.arange(6) % 3 < 1) & np.ones((6, 6), bool)
    three = host(n_m(DENSE[:, :6], first, n=1, m=3, axis=1))
    one = host(n_m(np.ones(1), np.ones(1, bool), n=1, m=4, axis=0))
    beyond = host(pack_bits(np.full(12, 3, np.uint8), 2))
    return {
        "packed: fewer bytes": change(a["packed"], shape=(6, 9)),
        "packed: no planes": change(a["packed"], planes=np.zeros((0, 6), np.uint8)),
        "packed: nine planes": change(a["packed"], planes=np.zeros((9, 6), np.uint8)),
        "packed: dtype": change(a["packed"], planes=np.zeros((2, 6), np.int8)),
        "packed: one dimension": change(a["packed"], planes=np.zeros(6, np.uint8)),
        "packed: scalar": change(a["packed"], planes=np.zeros((), np.uint8)),
        "packed: huge": Packed(np.zeros((1, 0), np.uint8), (0, 1 << 60), False),
        "packed: nested": change(a["packed"], planes=a["packed"]),
        "mask: values": change(mask, values=mask.values[:-1]),
        "mask: shape": change(mask, shape=(48,)),
        "mask: bits": change(mask, mask=a["packed"]),
        "mask: plain": change(mask, mask=PRESENT),
        "mask: matrix": change(mask, values=mask.values[None]),
        "mask: none": change(mask, values=None),
        "blocks: fewer values": change(blocks, values=blocks.values[:-1]),
        "blocks: shape of values": change(blocks, values=blocks.values.swapaxes(1, 2)),
        "blocks: flat values": change(blocks, values=blocks.values.reshape(-1)),
        "blocks: no values": change(blocks, values=None),
        "blocks: sparse values": change(blocks, values=mask),
        "blocks: block": change(blocks, block=(4, 2)),
        "blocks: block of one axis": change(blocks, block=(4,)),
        "blocks: block of no axis": change(none, block=()),
        "blocks: block of three axes": change(none, block=(1, 2, 4)),
        "blocks: block of zero": change(none, block=(0, 4)),
        "blocks: block longer than the array": change(blocks, block=(2, 9)),
        "blocks: shape": change(blocks, shape=(8, 6)),
        "blocks: mask of other shape": change(blocks, mask=host(pack_bits(np.ones(6, int), 1))),
        "blocks: mask of two bits": change(blocks, mask=host(pack_bits(np.ones((3, 2), int), 2))),
        "blocks: plain mask": change(blocks, mask=np.ones((3, 2), bool)),
        "blocks: huge": change(
            none,
            mask=Packed(np.zeros((1, 0), np.uint8), (0, 1), False),
            shape=(0, 1 << 60),
            block=(1, 1 << 60),
            values=np.zeros((0, 1, 1 << 60), np.float32),
        ),
        "nm: values": change(nm, values=nm.values[:-1]),
        "nm: indices": change(nm, indices=short),
        "nm: bits": change(nm, indices=host(pack_bits(np.zeros(24, np.uint8), 3))),
        "nm: duplicate": change(nm, indices=wide),
        "nm: beyond m": change(three, indices=beyond),
        "nm: n above m": change(nm, n=5),
        "nm: m": change(nm, m=0),
        "nm: m large": change(nm, m=1 << 40),
        "nm: axis": change(nm, axis=2),
        "nm: axis negative": change(nm, axis=-1),
        "nm: axis of one negative": change(one, axis=-1),
        "nm: shape": change(nm, shape=(6, 80)),
        "nm: no axes": change(nm, shape=()),
        "nm: huge": change(a["nm_none"], shape=(1 << 41, 1)),
        "quantized: scale rank": change(q, scale=np.ones(8, np.float32)),
        "quantized: scale shape": change(q, scale=np.ones((1, 7), np.float32)),
        "quantized: scale dtype": change(q, scale=np.ones((1, 8), np.float64)),
        "quantized: scale packed": change(q, scale=a["packed"]),
        "quantized: codes": change(q, codes=DENSE),
        "quantized: zero point": change(q, zero_point=np.ones((1, 1), np.uint8)),
        "quantized: zero dtype": change(q, zero_point=np.ones((1, 8), np.float16)),
        "quantized: group axis": change(q, group=(2, 4)),
        "quantized: group size": change(q, group=(0, 0)),
        "quantized: group few": change(q, group=(0, 4)),
        "quantized: group long": change(q, group=(0, 4, 4)),
        "quantized: group axis twice": change(v, group=((0, 2), (0, 4))),
        "quantized: groups few": change(v, group=((0, 2), (1, 3))),
        "quantized: group of three": change(v, group=((0, 2), (1, 4, 1))),
        "quantized: scale of integers": change(q, scale=np.ones((1, 8), np.int8)),
        "quantized: scale of narrow floats": change(q, scale=f.codes[:1]),
        "quantized: scale of wrong dtype": change(v, scale=change(v.scale, dtype=b.dtype)),
        "quantized: scale that breaks a rule": change(v, scale=change(v.scale, group=(5, 1))),
        "quantized: scale of a codebook": change(v, scale=v.codes),
        "quantized: wide floats": change(f, codes=DENSE.astype(np.float16)),
        "quantized: binary floats": change(f, binary=True),
        "quantized: binary codebook": change(v, binary=True),
        "quantized: codebook of halves": change(v, codes=change(v.codes, dtype=b.dtype)),
        "quantized: codebook with a zero point": change(
            q, codes=v.codes, zero_point=np.ones((1, 8), np.uint8)
        ),
        "quantized: codebook of a codebook": change(v, codes=change(v.codes, codes=v.codes)),
        "quantized: nested codes": change(q, codes=q),
        "quantized: dtype": change(q, dtype=np.dtype(np.int8)),
        "conv chain: features": ConvChain(
            (np.ones((3, 4, 2), np.float32), np.ones((1, 3, 5), np.float32)), (1, 1)
        ),
        "conv chain: extent": ConvChain(
            (np.ones((3, 4, 2), np.float32), np.ones((3, 2, 5), np.float32)), (1, 1)
        ),
        "conv chain: empty": ConvChain((), ()),
        "low rank: rank": LowRank(DENSE[:, :2], DENSE[:3]),
        "low rank: scalar": LowRank(np.float32(1)[...], DENSE),
        "low rank: cube": LowRank(DENSE[:, :2], np.ones((2, 3, 4), np.float32)),
        "low rank: integer": LowRank(CODES[:, :2], DENSE[:2]),
        "low rank: huge": LowRank(
            np.ones((1 << 22, 0), np.float32), np.ones((0, 1 << 22), np.float32)
        ),
        "codebook: range": change(book, values=book.values[:2]),
        "codebook: range of sparse": change(
            a["codebook_mask"], values=a["codebook_mask"].values[:2]
        ),
        "codebook: range of blocks": change(
            a["codebook_blocks"], values=a["codebook_blocks"].values[:2]
        ),
        "codebook: negative": change(book, codes=CODES.astype(np.int8) - 1),
        "codebook: no values": change(book, values=book.values[:0]),
        "codebook: matrix": change(book, values=book.values[None]),
        "codebook: dtype": change(book, values=book.values.astype(np.float64)),
        "codebook: codes": change(book, codes=DENSE),
        "rescaled: shape": change(a["rescaled"], scale=np.ones((1, 7), np.float32)),
        "rescaled: rank": change(a["rescaled"], scale=np.ones(8, np.float32)),
        "rescaled: dtype of the scale": change(a["rescaled"], scale=np.ones((1, 8))),
        "rescaled: integers": change(a["rescaled"], inner=CODES),
        "rotated: signs": change(a["rotated"], signs=np.zeros(8, np.int8)),
        "rotated: fewer signs": change(a["rotated"], signs=np.ones(7, np.int8)),
        "rotated: axis": change(a["rotated"], axis=2),
        "rotated: order of no matrix": change(
            a["rotated"], axis=0, order=6, signs=np.ones(6, np.int8)
        ),
        "rotated: order that does not divide": change(a["rotated"], order=16),
        "rotated: no order": change(a["rotated"], order=0),
        "rotated: dtype": change(a["rotated"], dtype=np.dtype(np.int8)),
    }


@pytest.mark.parametrize("name", crafted_arrays())
def test_crafted_fields_are_refused(tmp_path, monkeypatch, name):
    x = crafted_arrays()[name]
    with pytest.raises(ValueError, match="save: `params` must hold well-formed"):
        jc.save(tmp_path / "m", {"w": x})
    # The file that an unchecked writer would have made, with the right digests.
    with monkeypatch.context() as patch:
        patch.setattr(_fields, "check", lambda x: None)
        jc.save(tmp_path / "m", {"w": x})
    with pytest.raises(ValueError, match=r"well-formed file, got one that breaks a rule: .*at 'w"):
        jc.load(tmp_path / "m")


@pytest.mark.parametrize(
    ("kind", "static"),
    [
        ("packed", {"shape": [6, 8.0]}), ("packed", {"shape": [-6, -8]}),
        ("packed", {"shape": None}),
        ("packed", {"signed": 0}), ("packed", {"shape": "68"}), ("packed", {"shape": [True, 48]}),
        ("quantized", {"dtype": "object"}), ("quantized", {"dtype": None}),
        ("quantized", {"group": 3}),
        ("quantized", {"group": [[0, 4], 3]}), ("quantized", {"group": [[0, 4.0]]}),
        ("quantized", {"group": [[[0, 4]]]}), ("quantized", {"group": [None]}),
        ("quantized", {"group": [-1, 4]}), ("quantized", {"binary": None}), ("nm", {"n": "2"}),
        ("nm", {"m": 4.0}), ("nm", {"axis": True}), ("nm", {"more": 1}),
        ("mask", {"shape": [[6], 8]}), ("blocks", {"block": None}), ("blocks", {"block": [2, 4.0]}),
        ("blocks", {"block": [-2, -4]}), ("blocks", {"block": 2}), ("blocks", {"block": []}),
        ("rotated", {"order": 4.0}), ("rotated", {"axis": -1}), ("rescaled", {"dtype": "what"}),
    ],
)  # fmt: skip
def test_crafted_static_fields_are_refused(tmp_path, kind, static):
    tensors: dict = {}
    node = _structure.encode(arrays()[kind], "w", tensors)
    craft(tmp_path / "m", node, tensors)
    same(jc.load(tmp_path / "m"), arrays()[kind])
    node["static"] |= static
    craft(tmp_path / "m", node, tensors)
    with pytest.raises(ValueError, match="well-formed file"):
        jc.load(tmp_path / "m")
