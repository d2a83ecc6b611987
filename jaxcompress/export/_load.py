"""Reading the files of `jaxcompress.save`."""

import json
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import _check, _files
from jaxcompress._types import PyTree
from jaxcompress.arrays import is_compressed
from jaxcompress.export import _fields, _format
from jaxcompress.export._decode import decode
from jaxcompress.export._structure import CODES, join, open_level

_DTYPES = {code: _fields.DTYPES[name] for name, code in CODES.items()}
_AGAIN = "Save it again, or fetch another copy."


def load(path: str | os.PathLike, *, like: PyTree = None) -> PyTree:
    """Reads what `jc.save` wrote.

    Every byte is checked against a SHA-256 in the file, and every field of a compressed array
    against the others, so that a damaged or crafted file is refused, not misread. The digest
    finds accidents; it is no signature.

    Args:
        path: the file.
        like: a tree to restore into, for containers that are not dicts, lists or tuples: a
            Flax state, an Equinox module (filtered as when it was saved). Its leaves may be
            arrays, `jax.ShapeDtypeStruct`, or compressed arrays. Paths, shapes and dtypes must be
            those of the file; a dense leaf takes a compressed array of its shape and
            dtype, a compressed one only its like. Arrays are sharded as the leaves of `like`
            of the same kind; others, as a compressed array for a dense leaf, are on the
            default device. None restores dicts, lists, tuples and None as they were.

    Returns:
        The tree, its leaves equal bit for bit. Arrays are `jax.Array`s, or NumPy arrays where
        JAX is configured without their width (float64 while `jax_enable_x64` is off).

    Raises:
        ImportError: safetensors is missing: `pip install "jaxcompress[save]"`.
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, of another program or of a newer release, or does not
            fit `like`; the message names the file and the leaf.

    Cost: reads the file once; two copies of all bytes on the host.

    Examples:
        >>> jc.save("layer.safetensors", {"w": jnp.ones((2, 3), jnp.bfloat16), "names": [1, None]})
        >>> jc.load("layer.safetensors")
        {'w': Array([[1, 1, 1], [1, 1, 1]], dtype=bfloat16), 'names': [1, None]}
        >>> like = optax.TraceState(trace=jax.ShapeDtypeStruct((2,), jnp.int32))
        >>> jc.save("state.safetensors", optax.TraceState(trace=jnp.arange(2)))
        >>> jc.load("state.safetensors", like=like)
        TraceState(trace=Array([0, 1], dtype=int32))
    """
    name = os.fsdecode(path)
    library = _files.safetensors("load")
    with _open("load", name) as file:
        data = file.read()
    metadata = _format.read_header("load", name, data, len(data))
    try:
        entries = library.deserialize(data)
    except library.SafetensorError as error:
        got = f"a damaged file ({error})"
        raise _format.fault("load", name, "name a whole safetensors file", got, _AGAIN) from None
    listed = [(key, x["dtype"], x["shape"], x["data"]) for key, x in entries]
    if metadata.get(_format.PREFIX + "data_sha256") != _format.data_digest(listed):
        got = "tensors that do not match their SHA-256"
        raise _format.fault("load", name, "name an undamaged file", got, _AGAIN)
    try:
        tensors = {key: _array(code, shape, raw) for key, code, shape, raw in listed}
        tree = decode(json.loads(metadata.get(_format.PREFIX + "structure", "")), tensors)
    except (ValueError, RecursionError) as error:
        got = f"one that breaks a rule: {error}"
        raise _format.fault("load", name, "name a well-formed file", got, _AGAIN) from None
    if like is None:
        return _restore(tree)
    return _fill(like, tree, "")


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
    """The text that was given to `jc.save` as `metadata`.

    Args:
        path: the file.

    Returns:
        A dict of str to str; empty where none was given.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the header is damaged, or of another program or a newer release.

    Cost: reads and checks the header alone; needs no safetensors.

    Examples:
        >>> jc.save("model.safetensors", {"w": np.ones(2)}, metadata={"accuracy": "0.97"})
        >>> read_metadata("model.safetensors")
        {'accuracy': '0.97'}
    """
    name = os.fsdecode(path)
    with _open("read_metadata", name) as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(8)
        head += file.read(min(int.from_bytes(head, "little"), size))
    metadata = _format.read_header("read_metadata", name, head, size)
    return {k: v for k, v in metadata.items() if not k.startswith(_format.PREFIX)}


def _open(function: str, path: str):
    if not os.path.exists(path):
        raise FileNotFoundError(
            _check.message(
                function, "path", "name a file that exists", repr(path), "Save it first."
            )
        )
    if os.path.isdir(path):
        raise IsADirectoryError(
            _check.message(function, "path", "name a file", f"directory {path!r}")
        )
    return open(path, "rb")


def _array(code: str, shape: list[int], raw: Any) -> np.ndarray:
    _fields.require(code in _DTYPES, f"a tensor must be of a known dtype, got {code!r}")
    return np.frombuffer(bytes(raw), _DTYPES[code]).reshape(shape)


def _restore(tree: PyTree) -> PyTree:
    """The tree with JAX arrays; dicts with keys that JAX can't sort are fine."""
    level = open_level(tree)
    if level is not None:
        return level.rebuild([_restore(child) for child in level.children])
    return jax.tree.map(_to_jax, tree)


def _to_jax(x: Any, like: Any = None) -> Any:
    """A `jax.Array` where JAX can hold it, sharded as `like`; never a changed value."""
    array = isinstance(x, np.ndarray)
    if not isinstance(x, jax.Array) and not array:
        return x
    if array and jax.dtypes.canonicalize_dtype(x.dtype) != x.dtype:
        return x
    sharding = getattr(like, "sharding", None)
    # Abstract leaves made under an Explicit mesh name its axes but no devices.
    abstract = isinstance(getattr(sharding, "mesh", None), jax.sharding.AbstractMesh)
    if sharding is not None and not abstract and getattr(like, "committed", True):
        return jax.device_put(x, sharding)
    return jnp.array(x) if array else x


def _fill(like: PyTree, tree: PyTree, path: str) -> PyTree:
    """The leaves of `tree` in the containers of `like`."""
    level = open_level(like)
    if level is None:
        return _fill_leaf(like, tree, path)
    if level.kind == "box":
        return level.rebuild([_fill(level.children[0], tree, path)])
    found = open_level(tree)
    if found is None:
        got = f"a file with {_describe(tree)}"
        raise _mismatch(f"have a leaf where the file has one, not {type(like).__name__}", got, path)
    ours, theirs = dict(zip(found.keys, found.children, strict=True)), level.keys
    for missing in [k for k in theirs if k not in ours]:
        raise _mismatch("have only paths of the file", "one that it lacks", join(path, missing))
    for extra in [k for k in ours if k not in theirs]:
        raise _mismatch("have all paths of the file", "a tree without one", join(path, extra))
    items = zip(theirs, level.children, strict=True)
    return level.rebuild([_fill(child, ours[key], join(path, key)) for key, child in items])


def _fill_leaf(like: Any, x: Any, path: str) -> Any:
    number = lambda v: v is None or type(v) in (bool, int, float)  # noqa: E731
    if number(like) or number(x):
        if type(like) is not type(x):
            raise _mismatch(f"have {_describe(x)}, as the file", _describe(like), path)
        return x
    shaped = hasattr(like, "shape") and hasattr(like, "dtype") and hasattr(x, "dtype")
    if not shaped or tuple(like.shape) != tuple(x.shape) or like.dtype != x.dtype:
        raise _mismatch(f"have {_describe(x)}, as the file", _describe(like), path)
    if not is_compressed(like):
        return jax.tree.map(_to_jax, x) if is_compressed(x) else _to_jax(x, like)
    shapes = lambda t: [(tuple(p.shape), np.dtype(p.dtype)) for p in jax.tree.leaves(t)]  # noqa: E731
    if jax.tree.structure(like) != jax.tree.structure(x) or shapes(like) != shapes(x):
        fix = "Give a dense leaf to take any kind."
        raise _mismatch(f"have {_describe(x)}, part by part, as the file", repr(like), path, fix)
    return jax.tree.map(_to_jax, x, like)


def _describe(x: Any) -> str:
    if is_compressed(x):
        return repr(x)
    if isinstance(x, (dict, list, tuple)):
        return f"a {type(x).__name__}"
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return f"{x.dtype.name}{list(x.shape)}"
    return repr(x)


def _mismatch(rule: str, got: str, path: str, fix: str = "") -> ValueError:
    fix = fix or "Give a tree with the structure that was saved, or none."
    return ValueError(_check.message("load", "like", rule, got, fix, path=path))
