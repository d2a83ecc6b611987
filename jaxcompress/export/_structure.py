"""Trees as JSON that names tensors."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import _check
from jaxcompress._types import PyTree
from jaxcompress.arrays import is_compressed
from jaxcompress.export import _fields

# What every reader of the format knows. Other dtypes are stored as their bytes.
CODES = {
    "bool": "BOOL", "int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64", "uint8": "U8",
    "uint16": "U16", "uint32": "U32", "uint64": "U64", "float16": "F16", "float32": "F32",
    "float64": "F64", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip


# Readers descend level by level, and so does JSON: what is written must be readable anywhere.
_MOST_LEVELS = 100
_MOST_INTEGER_BITS = 4096


class Container(NamedTuple):
    """One level of a tree."""

    kind: str  # "dict", "list", "tuple", or "box": one value, whose level has no name
    keys: list[Any]
    children: list[Any]
    rebuild: Callable[[list[Any]], Any]


def open_level(x: PyTree) -> Container | None:
    """The level of a tree under `x`, or None where `x` is a leaf or None."""
    if x is None or is_compressed(x):
        return None
    if type(x) is dict:
        # By hand: keys of several types, which JAX can't sort, are fine in a file.
        keys = list(x)
        return Container("dict", keys, list(x.values()), lambda c: dict(zip(keys, c, strict=True)))
    flat, treedef = jax.tree_util.tree_flatten_with_path(x, is_leaf=lambda y: y is not x)
    if len(flat) == 1 and not flat[0][0]:
        return None
    children, entries = [child for _, child in flat], [path[0] for path, _ in flat]
    kind = {list: "list", tuple: "tuple"}.get(type(x), "dict")
    if kind == "dict" and entries == [jax.tree_util.GetAttrKey("value")]:
        kind = "box"
    return Container(kind, [_key(e) for e in entries], children, treedef.unflatten)


def _key(entry: Any) -> Any:
    for name in ("key", "idx", "name"):
        if hasattr(entry, name):
            return getattr(entry, name)
    return str(entry)


def join(path: str, key: Any) -> str:
    """The path of a child."""
    return f"{path}/{key}" if path else str(key)


def encode(
    x: PyTree, path: str, tensors: dict[str, np.ndarray], *, depth: int = 0
) -> dict[str, Any]:
    """A tree as JSON; its arrays are added to `tensors`, as NumPy arrays.

    Args:
        x: a tree.
        path: that of `x`, in names and errors.
        tensors: filled.
        depth: levels above `x`.
    """
    level = open_level(x)
    if level is None:
        return _encode_leaf(x, path, tensors)
    if depth == _MOST_LEVELS:
        rule = f"have at most {_MOST_LEVELS} levels"
        fix = "Save its leaves in a list."
        raise ValueError(_check.message("save", "params", rule, "more", fix, path=path))
    if level.kind == "box":
        return encode(level.children[0], path, tensors, depth=depth + 1)
    nodes = [
        encode(c, join(path, k), tensors, depth=depth + 1)
        for k, c in zip(level.keys, level.children, strict=True)
    ]
    if level.kind != "dict":
        return {"kind": level.kind, "items": nodes}
    for key in level.keys:
        if type(key) is not int and not isinstance(key, str):
            fix = "Rename the key."
            raise TypeError(
                _check.message(
                    "save", "params", "have keys that are str or int", repr(key), fix, path=path
                )
            )
    if len(set(level.keys)) < len(level.keys):
        got = f"some of {level.keys} twice in a {type(x).__name__}"
        raise ValueError(_check.message("save", "params", "have distinct keys", got, path=path))
    keys = [key if type(key) is int else str(key) for key in level.keys]
    return {"kind": "dict", "items": [list(item) for item in zip(keys, nodes, strict=True)]}


def _encode_leaf(x: Any, path: str, tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    if x is None:
        return {"kind": "none"}
    if type(x) in (bool, int, float):
        if type(x) is int and x.bit_length() > _MOST_INTEGER_BITS:
            rule = f"hold Python integers of at most {_MOST_INTEGER_BITS} bits"
            got = f"one of {x.bit_length()}"
            raise ValueError(_check.message("save", "params", rule, got, path=path))
        # `repr` keeps all bits of a float, and NaN and infinity.
        return {"kind": type(x).__name__, "value": repr(x) if type(x) is float else x}
    if is_compressed(x):
        host = jax.tree.map(lambda leaf: _to_host(leaf, path), x)
        return _encode_compressed(host, path, tensors)
    if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = _to_host(jax.random.key_data(x), path)
        node = {"kind": "key", "impl": str(jax.random.key_impl(x))}
        return node | {"data": _encode_array(data, path, tensors)}
    return _encode_array(_to_host(x, path), path, tensors)


def _encode_compressed(x: Any, path: str, tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    found = [kind for kind, (cls, *_) in _fields.KINDS.items() if type(x) is cls]
    if not found:
        raise TypeError(
            _check.message("save", "params", "hold known kinds", type(x).__name__, path=path)
        )
    _, parts, statics = _fields.KINDS[found[0]]
    nodes = {n: _encode_part(getattr(x, n), join(path, n), tensors) for n in parts}
    try:
        _fields.check(x)
        static = {name: _fields.static_to_json(name, getattr(x, name)) for name in statics}
    except ValueError as error:
        raise ValueError(
            _check.message(
                "save",
                "params",
                "hold well-formed compressed arrays",
                f"a {type(x).__name__}: {error}",
                "Build it with jc.pack; save stacked arrays one by one.",
                path=path,
            )
        ) from None
    return {"kind": found[0], "static": static, "parts": nodes}


def _encode_part(x: Any, path: str, tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    if is_compressed(x):
        return _encode_compressed(x, path, tensors)
    if x is None:
        return {"kind": "none"}
    if isinstance(x, tuple):
        items = [_encode_part(part, join(path, i), tensors) for i, part in enumerate(x)]
        return {"kind": "tuple", "items": items}
    return _encode_array(x, path, tensors)


def _encode_array(x: np.ndarray, path: str, tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    name, count = path or "params", 1
    while name in tensors or name == "__metadata__":
        # Keys with "/" can make two paths read the same.
        count += 1
        name = f"{path or 'params'}#{count}"
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError(
            _check.message("save", "params", "have keys that are valid Unicode", ascii(path))
        ) from None
    node = {"kind": "array", "tensor": name}
    if x.dtype.name not in CODES:
        node["dtype"] = x.dtype.name
        x = np.frombuffer(x.tobytes(), np.uint8).reshape((*x.shape, x.dtype.itemsize))
    tensors[name] = x
    return node


def _to_host(x: Any, path: str) -> np.ndarray:
    """A NumPy array in C order and native byte order; refuses what is not an array."""
    if _check.is_traced(x):
        fix = "Call save outside of jit, vmap and grad."
        raise TypeError(
            _check.message("save", "params", "be concrete", "a traced array", fix, path=path)
        )
    array = isinstance(x, (jax.Array, np.ndarray, np.generic))
    if array and isinstance(x, jax.Array) and not x.is_fully_addressable:
        fix = "Gather it with jax.experimental.multihost_utils.process_allgather first."
        raise ValueError(
            _check.message(
                "save", "params", "live on this process", "a part of an array", fix, path=path
            )
        )
    host = np.asarray(jax.device_get(x)) if array else None
    if host is None or host.dtype.name not in _fields.DTYPES:
        got = type(x).__name__ if host is None else _check.describe(host)
        fix = "Leave it out; of an Equinox module save eqx.filter(module, eqx.is_array)."
        raise TypeError(
            _check.message("save", "params", "hold numeric arrays and numbers", got, fix, path=path)
        )
    return np.array(host, host.dtype.newbyteorder("="), order="C", copy=None)
