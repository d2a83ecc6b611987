"""One file of a cache of teacher outputs: safetensors, whole or not there, each row checked."""

import hashlib
import json
import math
import os
import uuid
import zlib
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxcompress import _check, _files

SUFFIX = ".safetensors"
VERSION = 1
_ABOUT, _DIGEST = "jaxcompress.teacher", "jaxcompress.teacher_sha256"
_CODES = {
    "BOOL": "bool", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64", "U8": "uint8",
    "U16": "uint16", "U32": "uint32", "U64": "uint64", "F16": "float16", "BF16": "bfloat16",
    "F32": "float32", "F64": "float64",
}  # fmt: skip
DTYPES = {name: np.dtype(getattr(jnp, name)) for name in _CODES.values() if name != "bool"}
DTYPES["bool"] = np.dtype(bool)
_AGAIN = "Delete this file and write its ids again."


class Leaf(NamedTuple):
    """One array of an example: its path, shape and dtype, and the dtype it came in."""

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    given: np.dtype


class About(NamedTuple):
    """What all files of a cache share: the teacher as JSON, the kind of ids, the leaves."""

    teacher: str
    kind: str  # "i" integers, "S" bytes of text
    leaves: tuple[Leaf, ...]


class File(NamedTuple):
    """A file: where it is, what it is about, its ids and checksums, where its rows begin."""

    path: str
    size: int
    about: About
    ids: np.ndarray
    checks: np.ndarray
    starts: tuple[int, ...]


def row_checks(ids: np.ndarray, leaves: list[np.ndarray]) -> np.ndarray:
    """CRC-32 of each row: its id and the bytes of all leaves."""
    rows = [np.ascontiguousarray(x).reshape(len(ids), -1).view(np.uint8) for x in leaves if x.size]
    checks = np.empty(len(ids), np.uint32)
    for i, name in enumerate(ids):
        total = zlib.crc32(bytes(name) if ids.dtype.kind == "S" else name.tobytes())
        for x in rows:
            total = zlib.crc32(x[i], total)
        checks[i] = total
    return checks


def write(
    library: Any, folder: str, about: About, ids: np.ndarray, leaves: list[np.ndarray]
) -> File:
    """Writes rows to a new file, which appears whole or not at all."""
    leaves = [np.ascontiguousarray(x) for x in leaves]
    tensors = {"ids": _ids_as_array(ids), "checks": row_checks(ids, leaves)}
    for leaf, x in zip(about.leaves, leaves, strict=True):
        tensors[_tensor(leaf.path)] = x
    note = _note(about)
    digest = _digest(note, tensors["ids"], tensors["checks"])
    data = library.numpy.save(tensors, metadata={_ABOUT: note, _DIGEST: digest})
    path = os.path.join(folder, uuid.uuid4().hex + SUFFIX)
    _files.write_whole("cache.write", path, data)
    return read("cache.write", path)


def read(function: str, path: str) -> File:
    """The checked head of a file: all but the outputs themselves."""
    size = os.path.getsize(path)
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise ValueError(f"{size} bytes, which is cut short or something else")
            header = json.loads(file.read(length).decode())
            notes = header.pop("__metadata__", {})
            if _ABOUT not in notes:
                raise ValueError("a file of another program")
            places = {name: _place(entry, 8 + length) for name, entry in header.items()}
            end = max(stop for *_, stop in places.values())
            if end != size:
                raise ValueError(f"{size} bytes in place of {end}")
            ids = _tensor_in(file, places["ids"])
            checks = _tensor_in(file, places["checks"])
        if notes.get(_DIGEST) != _digest(notes[_ABOUT], ids, checks):
            raise ValueError("ids that do not match their SHA-256")
        about = _read_note(notes[_ABOUT])
        starts = tuple(_start(leaf, len(ids), places) for leaf in about.leaves)
        return File(path, size, about, _ids_from_array(ids, about.kind), checks, starts)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        got = f"a damaged one: {error}"
        rule = "hold only whole files of a cache"
        raise ValueError(_check.message(function, "folder", rule, got, _AGAIN, path=path)) from None


def arrays(file: File) -> list[np.ndarray]:
    """The outputs of a file, mapped: only the rows that are taken are read."""
    if os.path.getsize(file.path) != file.size:
        rule = "hold files that are not written to"
        got = f"one that changed its size from {file.size} bytes"
        raise ValueError(_check.message("cache.read", "folder", rule, got, _AGAIN, path=file.path))
    data = np.asarray(np.memmap(file.path, np.uint8, "r"))
    out = []
    for leaf, start in zip(file.about.leaves, file.starts, strict=True):
        shape = (len(file.ids), *leaf.shape)
        stop = start + math.prod(shape) * leaf.dtype.itemsize
        out.append(data[start:stop].view(leaf.dtype).reshape(shape))
    return out


def require_whole(file: File, rows: np.ndarray, leaves: list[np.ndarray]) -> None:
    """Refuses rows whose bytes are not those that were written."""
    wrong = np.flatnonzero(row_checks(file.ids[rows], leaves) != file.checks[rows])
    if wrong.size:
        rule = "hold the outputs that were written"
        got = f"a damaged row, that of the id {shown(file.ids[rows[wrong[:1]]])[0]!r}"
        raise ValueError(_check.message("cache.read", "folder", rule, got, _AGAIN, path=file.path))


def shown(ids: np.ndarray) -> list:
    """Ids as they were given."""
    return [x.decode() if isinstance(x, bytes) else x for x in ids.tolist()]


def _tensor(path: str) -> str:
    return f"outputs/{path}" if path else "outputs"


def _note(about: About) -> str:
    leaves = [[x.path, list(x.shape), x.dtype.name, x.given.name] for x in about.leaves]
    return json.dumps(
        {"version": VERSION, "teacher": about.teacher, "ids": about.kind, "leaves": leaves}
    )


def _read_note(note: str) -> About:
    about = json.loads(note)
    if about["version"] != VERSION:
        raise ValueError(f"format version {about['version']!r}; this release reads {VERSION}")
    leaves = tuple(
        Leaf(path, tuple(shape), DTYPES[dtype], DTYPES[given])
        for path, shape, dtype, given in about["leaves"]
    )
    return About(about["teacher"], about["ids"], leaves)


def _digest(note: str, ids: np.ndarray, checks: np.ndarray) -> str:
    total = hashlib.sha256(note.encode())
    for x in (ids, checks):
        total.update(json.dumps([x.dtype.name, x.shape]).encode())
        total.update(x.tobytes())
    return total.hexdigest()


def _ids_as_array(ids: np.ndarray) -> np.ndarray:
    """Text as rows of bytes: the format has no strings."""
    if ids.dtype.kind != "S":
        return ids
    return np.ascontiguousarray(ids).view(np.uint8).reshape(len(ids), ids.dtype.itemsize)


def _ids_from_array(ids: np.ndarray, kind: str) -> np.ndarray:
    return ids.view(f"S{ids.shape[1]}")[:, 0] if kind == "S" else ids


def _place(entry: dict, base: int) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """Dtype, shape, first and last byte of a tensor, in agreement."""
    dtype, shape = DTYPES[_CODES[entry["dtype"]]], tuple(entry["shape"])
    start, stop = entry["data_offsets"]
    if min(start, *shape, 0) < 0 or stop - start != math.prod(shape) * dtype.itemsize:
        raise ValueError("a tensor whose size is not that of its bytes")
    return dtype, shape, base + start, base + stop


def _tensor_in(file: Any, place: tuple) -> np.ndarray:
    dtype, shape, start, stop = place
    file.seek(start)
    return np.frombuffer(file.read(stop - start), dtype).reshape(shape)


def _start(leaf: Leaf, count: int, places: dict[str, tuple]) -> int:
    dtype, shape, start, _ = places[_tensor(leaf.path)]
    if (dtype, shape) != (leaf.dtype, (count, *leaf.shape)):
        raise ValueError(f"{leaf.path!r} with another shape or dtype than is written there")
    return start
