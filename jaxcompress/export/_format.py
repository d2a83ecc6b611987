"""Files in the safetensors format: their header, their digests, writing them whole."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from jaxcompress import _check

PREFIX = "jaxcompress."
VERSION = 1


def data_digest(tensors: Iterable[tuple[str, str, list[int], Any]]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes of all tensors, in the order of their names."""
    total = hashlib.sha256()
    for name, code, shape, data in sorted(tensors, key=lambda t: t[0]):
        total.update(json.dumps([name, code, list(shape)]).encode())
        total.update(data)
    return total.hexdigest()


def header_digest(metadata: dict[str, str]) -> str:
    """SHA-256 of all metadata, the digest of the data included, but for this entry itself."""
    rest = {k: v for k, v in metadata.items() if k != PREFIX + "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def fault(function: str, path: str, rule: str, got: str, fix: str) -> ValueError:
    """The error about a file."""
    return ValueError(_check.message(function, "path", rule, got, fix, path=path))


def read_header(function: str, path: str, head: bytes, size: int) -> dict[str, str]:
    """The checked metadata of a file.

    Args:
        function: named in errors.
        path: named in errors.
        head: the first bytes of the file, at least the header if it is that long.
        size: bytes of the whole file.
    """
    again = "Save it again, or fetch another copy."
    length = int.from_bytes(head[:8], "little")
    if size < 8 or length > size - 8:
        got = f"{size} bytes, which is cut short or something else"
        raise fault(function, path, "name a whole safetensors file", got, again)
    try:
        header = json.loads(head[8 : 8 + length].decode())
        metadata = header.get("__metadata__", {})
        metadata = {str(k): str(v) for k, v in metadata.items()}
    except (ValueError, AttributeError, RecursionError):
        got = "a file with an unreadable header"
        raise fault(function, path, "name a whole safetensors file", got, again) from None
    version = metadata.get(PREFIX + "version")
    if version is None:
        got = "a safetensors file of another program, or a damaged one"
        fix = "Read it with safetensors.numpy.load_file."
        raise fault(function, path, "name a file that jaxcompress.save wrote", got, fix)
    if version != str(VERSION):
        got = f"format version {version!r}; this release reads {VERSION}"
        fix = "Update jaxcompress, or save the file again."
        raise fault(function, path, "name a file of a known format version", got, fix)
    if metadata.get(PREFIX + "sha256") != header_digest(metadata):
        got = "metadata that does not match its SHA-256"
        raise fault(function, path, "name an undamaged file", got, again)
    return metadata
