"""Trees from JSON that names tensors: nothing in it is trusted."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress._types import PyTree
from jaxcompress.export import _fields
from jaxcompress.export._fields import require

_PYTHON = {"bool": bool, "int": int, "float": float}


def decode(node: Any, tensors: Mapping[str, np.ndarray]) -> PyTree:
    """The tree of a JSON structure: arrays are NumPy's, also in compressed arrays, all checked.

    Raises:
        ValueError: the structure contradicts itself or the tensors.
    """
    require(isinstance(node, dict) and isinstance(node.get("kind"), str), "a node must have a kind")
    kind, names = node["kind"], set(node) - {"kind"}
    if kind == "none":
        return None
    if kind in ("list", "tuple", "dict"):
        items: Any = node.get("items")
        require(isinstance(items, list), f"a {kind} must have items")
        if kind != "dict":
            out = [_named(i, lambda x=x: decode(x, tensors)) for i, x in enumerate(items)]
            return out if kind == "list" else tuple(out)
        pairs = all(isinstance(p, list) and len(p) == 2 and type(p[0]) in (int, str) for p in items)
        require(pairs, "a dict must have pairs of a key and a node")
        require(len({key for key, _ in items}) == len(items), "a dict must have distinct keys")
        return {key: _named(key, lambda x=x: decode(x, tensors)) for key, x in items}
    if kind in _PYTHON:
        value: Any = node.get("value")
        text = str if kind == "float" else _PYTHON[kind]
        require(type(value) is text, f"a Python {kind} must have a value of its type")
        return _PYTHON[kind](value)
    if kind == "array":
        return _decode_array(node, tensors)
    if kind == "key":
        require(
            names == {"impl", "data"} and isinstance(node["impl"], str), "a key must have an impl"
        )
        data = decode(node["data"], tensors)
        require(isinstance(data, np.ndarray) and data.dtype == np.uint32, "a key must be uint32")
        try:
            return jax.random.wrap_key_data(jnp.array(data), impl=node["impl"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"a random key must fit its impl: {error}") from None
    require(kind in _fields.KINDS, f"a node must be of a known kind, got {kind!r}")
    return _decode_compressed(node, tensors)


def _decode_compressed(node: dict[str, Any], tensors: Mapping[str, np.ndarray]) -> Any:
    cls, parts, statics = _fields.KINDS[node["kind"]]
    static: Any = node.get("static")
    nodes: Any = node.get("parts")
    whole = isinstance(static, dict) and isinstance(nodes, dict)
    whole = whole and set(static) == set(statics) and set(nodes) == set(parts)
    require(whole, f"a {node['kind']} must have the fields {[*parts, *statics]}")
    fields = {n: _named(n, lambda n=n: decode(nodes[n], tensors)) for n in parts}
    fields |= {n: _fields.static_from_json(n, static[n]) for n in statics}
    out = cls(**fields)
    _fields.check(out)
    return out


def _decode_array(node: dict[str, Any], tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    name: Any = node.get("tensor")
    require(isinstance(name, str) and name in tensors, "an array must name a tensor of the file")
    x = tensors[name]
    if x.dtype == bool:
        require(x.view(np.uint8).max(initial=0) <= 1, "a boolean must be 0 or 1")
    if "dtype" not in node:
        return x
    dtype = _fields.dtype(node["dtype"])
    fits = x.dtype == np.uint8 and x.ndim > 0 and x.shape[-1] == dtype.itemsize
    require(fits, f"an array stored as bytes must have {dtype.itemsize} of them per entry")
    shape = x.shape[:-1]
    return np.frombuffer(x.tobytes(), dtype, count=math.prod(shape)).reshape(shape)


def _named(key: Any, f: Callable[[], Any]) -> Any:
    """Adds the key to the path in an error."""
    try:
        return f()
    except _At as error:
        raise _At(f"{key}/{error.path}", error.rule) from None
    except ValueError as error:
        raise _At(str(key), str(error)) from None


class _At(ValueError):
    """A broken rule and where."""

    def __init__(self, path: str, rule: str):
        super().__init__(f"{rule}, at {path!r}")
        self.path, self.rule = path, rule
