"""Writing trees of arrays, compressed or not, to one file."""

import json
import os
from types import ModuleType

from jaxcompress import _check, _files
from jaxcompress._types import PyTree
from jaxcompress.export import _format
from jaxcompress.export._structure import CODES, encode

# The limit of the readers of the format.
_MOST_HEADER_BYTES = 100_000_000


def save(
    path: str | os.PathLike, params: PyTree, *, metadata: dict[str, str] | None = None
) -> None:
    """Writes parameters, compressed or not, to one file in the safetensors format.

    Any safetensors reader lists the tensors, named by their paths, as
    `dense/kernel/codes/planes`; `jc.load` gives the tree back, bit for bit. Nothing is pickled.
    The file is as large as the arrays (`jc.tree.nbytes`) plus a header of about 300 bytes per
    array.

    The file appears whole or not at all: it is written under another name in the same
    directory, flushed to the disk, then renamed. A crash leaves the previous file as it was.

    Args:
        path: the file; its directory must exist. An existing file is replaced.
        params: any pytree. Dicts with str or int keys, lists, tuples and None come back as
            such. Other containers (Flax states and `FrozenDict`, Equinox modules,
            NamedTuples) are written as dicts by their paths, and come back into `like` of
            `jc.load`; the one `value` of a Flax variable has no level of its own. Leaves:
            arrays of any numeric dtype, sharded or not; the arrays of `jc.arrays`; random
            keys; Python bool, int and float, which come back as such. Never changed.
        metadata: text of your own, read back by `jc.export.read_metadata`. Keys that begin
            with `jaxcompress.` are taken.

    Raises:
        ImportError: safetensors is missing: `pip install "jaxcompress[save]"`.
        FileNotFoundError: the directory does not exist.
        TypeError: a leaf is not an array or number (a function in an Equinox module: save
            `eqx.filter(module, eqx.is_array)`), or is traced; a key is not str or int.
        ValueError: a compressed array contradicts itself, or is stacked by `vmap`; an array
            lives in part on another process; two children have the same key; the tree is
            deeper than 100 levels, or its names and metadata pass 100 MB. Then nothing is
            written.

    Cost: copies the arrays to the host; two copies of all bytes there. Call it on one process.

    Examples:
        >>> params = {"w": jnp.arange(64.0).reshape(8, 8), "b": None}
        >>> jc.save("small.safetensors", jc.pack(jc.prune(0.5), params), metadata={"step": "10"})
        >>> jc.load("small.safetensors")["w"]
        BitMasked(float32[8, 8], kept=32, nbytes=136)
        >>> jc.export.read_metadata("small.safetensors")
        {'step': '10'}
    """
    library = _files.safetensors("save")
    notes = _notes(metadata)
    tensors: dict = {}
    structure = encode(params, "", tensors)
    listed = [(n, CODES[x.dtype.name], list(x.shape), _bytes(x)) for n, x in tensors.items()]
    notes[_format.PREFIX + "version"] = str(_format.VERSION)
    notes[_format.PREFIX + "structure"] = json.dumps(structure, separators=(",", ":"))
    notes[_format.PREFIX + "data_sha256"] = _format.data_digest(listed)
    notes[_format.PREFIX + "sha256"] = _format.header_digest(notes)
    _files.write_whole("save", os.fsdecode(path), _serialize(library, tensors, notes))


def _serialize(library: ModuleType, tensors: dict, notes: dict[str, str]) -> bytes:
    """The bytes of the file; refuses a header that no reader takes."""
    try:
        data = library.numpy.save(tensors, metadata=notes)
        length = int.from_bytes(data[:8], "little")
        # Some releases write what they then do not read.
        got = f"{length} bytes" if length > _MOST_HEADER_BYTES else None
    except library.SafetensorError as error:
        data, got = b"", str(error)
    if got is not None:
        rule = f"fit a header of at most {_MOST_HEADER_BYTES} bytes with names and metadata"
        fix = "Give shorter metadata, or save the tree in parts."
        raise ValueError(_check.message("save", "params", rule, got, fix))
    return data


def _bytes(x) -> memoryview:
    """The bytes of an array in C order, without a copy."""
    return memoryview(x.reshape(-1).view("uint8"))


def _notes(metadata: dict[str, str] | None) -> dict[str, str]:
    rule = f"be a dict of str to str without keys that begin with {_format.PREFIX!r}"
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict):
        raise TypeError(_check.message("save", "metadata", rule, _check.describe(metadata)))
    for item in metadata.items():
        if not all(isinstance(text, str) for text in item):
            raise TypeError(_check.message("save", "metadata", rule, f"{item[0]!r}: {item[1]!r}"))
        if item[0].startswith(_format.PREFIX):
            raise ValueError(_check.message("save", "metadata", rule, repr(item[0]), "Rename it."))
        try:
            "".join(item).encode()
        except UnicodeEncodeError:
            raise ValueError(
                _check.message("save", "metadata", "be valid Unicode", ascii(item))
            ) from None
    return dict(metadata)
