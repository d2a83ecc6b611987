"""Outputs of a teacher on disk, found by the id of the example."""

import functools
import json
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxcompress import _check, _files
from jaxcompress._types import PyTree
from jaxcompress.distillation import _cache_file, _cache_index, _cache_rows
from jaxcompress.distillation._cache_file import About, Leaf

_OPEN_FILES = 64


class TeacherCache(NamedTuple):
    """A cache of teacher outputs, as `open_cache` gives it.

    Attributes:
        has: `has(ids)` -> booleans of the shape of `ids`: which are there.
        write: `write(ids, outputs)` -> how many were new. One new file.
        read: `read(ids)` -> the outputs of these ids, in their order, as NumPy arrays.
        ids: `ids()` -> all ids, sorted, as a list.
    """

    has: Callable[[Any], np.ndarray]
    write: Callable[[Any, PyTree], int]
    read: Callable[[Any], PyTree]
    ids: Callable[[], list]


def open_cache(
    folder: str | os.PathLike,
    teacher: str | dict[str, Any],
    *,
    like: PyTree = None,
    dtype: Any = None,
    num_classes: int | None = None,
) -> TeacherCache:
    """A folder with the outputs of a teacher, each under the id of its example.

    The teacher runs once; then each epoch, shuffled or not, looks up what it said. A row is
    found by its id and never by its place, so no order of the data can misalign it. An id
    names one input: an augmented copy needs its own.

    The files are in the safetensors format, one for each call of `write`: hand it some thousand
    rows at a time. A file appears whole or not at all, so a run that was stopped goes on where
    it was. Several processes may write to one folder; what others wrote is seen at the next
    `write`, or when it is opened again.

    Args:
        folder: made by the first `write`; its parent must exist.
        teacher: what the outputs are of, in your words: the name or digest of a checkpoint, the
            preprocessing, the temperature; text or a dict that JSON can hold. It is stored in each
            file, and a folder of another teacher is refused.
        like: a tree, such as the NamedTuple that was written, in whose structure `read` returns;
            its leaves are not looked at. None: the array, if the outputs are one array,
            otherwise a dict from the path of each array to it.
        dtype: floating-point arrays are written in it: `jnp.float16` halves the file. None
            writes them as they are.
        num_classes: integers are classes below it, and are written in the narrowest unsigned
            dtype that holds them (uint8, uint16 to 65,536, uint32); they come back as they
            were. None writes them as they are.

    Returns:
        A `TeacherCache` of functions:

        `write(ids, outputs)`: `ids` signed integers of 64 bits or text, shape [rows] (an array or
        a list; bytes are the text that they are in UTF-8); `outputs` any tree of arrays
        [rows, ...] whose shapes and dtypes are the same in all calls: logits, or the top k of
        them. NaN and infinities are kept. An id that is there already is skipped, whatever its
        outputs; so is all of a batch seen twice.

        `read(ids)`: `ids` of any shape; the arrays have that shape in front. It runs on the host:
        call it where batches are made, and pass what it returns to the jitted step in the batch.
        Floating-point arrays come in the dtype of the file; `jc.kd_loss` takes any.

        `has(ids)` and `ids()` tell what is there: skip the teacher's pass over those.

    Raises:
        ImportError: safetensors is missing, in `write`: `pip install "jaxcompress[save]"`.
        TypeError: ids that are neither integers nor text, or traced; outputs that are not arrays
            of booleans or real numbers, or traced.
        ValueError: the folder holds outputs of another teacher, or a damaged file. In `write`:
            an id twice in one batch; outputs of another teacher, structure, shape or dtype than
            those there, be they of another process; a finite number that `dtype` has no room for
            (float16 ends at 65,504: subtract the largest logit of each row, or write float32); a
            class not below `num_classes`. Then nothing is written. In `read`: ids that are not
            there (some are named), a damaged row.

    Cost: opening reads all ids, 8 bytes each or the longest text's. A read maps the files and
    takes the rows asked for, checking each by its CRC-32. Files are mapped 64 at a time. A write
    lists the folder, reads the ids that others wrote, and makes two copies of its rows.

    Examples:
        >>> cache = jc.distillation.open_cache("teacher", "resnet, step 900", dtype=jnp.float16)
        >>> cache.write(["cat.png", "dog.png"], jnp.array([[2.0, -1.0], [0.0, 3.0]]))
        2
        >>> cache.read(["dog.png", "cat.png", "dog.png"])
        array([[ 0.,  3.],
               [ 2., -1.],
               [ 0.,  3.]], dtype=float16)
        >>> cache.has(["cat.png", "cow.png"])
        array([ True, False])
        >>> try:
        ...     jc.distillation.open_cache("teacher", "resnet, step 950")
        ... except ValueError as error:
        ...     print("of another teacher" in str(error))
        True
    """
    folder, teacher = os.fsdecode(folder), _fingerprint(teacher)
    dtype = None if dtype is None else _float_dtype(dtype)
    if num_classes is not None:
        _check.integer("open_cache", "num_classes", num_classes, 1, 2**32)
    files = _further("open_cache", folder, teacher, [])
    runs = _cache_index.first_run(files)
    mapped = functools.lru_cache(_OPEN_FILES)(lambda number: _cache_file.arrays(files[number]))

    def has(ids):
        wanted = _cache_index.read_ids("cache.has", ids)
        _require_kind("cache.has", wanted, files)
        return _cache_index.find(runs, wanted.reshape(-1))[0].reshape(wanted.shape)

    def write(ids, outputs):
        nonlocal runs
        library = _files.safetensors("cache.write")
        for file in _further("cache.write", folder, teacher, files):
            files.append(file)
            runs = _cache_index.added(runs, file.ids, len(files) - 1)
        names = _new_ids(ids, files)
        arrays = _cache_rows.rows(outputs, len(names))
        leaves, stored = [], []
        for path, x in arrays:
            y = _cache_rows.narrow(path, x, dtype, num_classes)
            given = y.dtype if jnp.issubdtype(y.dtype, jnp.floating) else x.dtype
            leaves.append(Leaf(path, x.shape[1:], y.dtype, given))
            stored.append(y)
        about = About(teacher, names.dtype.kind, tuple(leaves))
        if files:
            _require_same("cache.write", files[0].about, about, folder)
        new = ~_cache_index.find(runs, names)[0]
        if not new.any():
            return 0
        _make(folder)
        kept = [x[new] for x in stored]
        files.append(_cache_file.write(library, folder, about, names[new], kept))
        runs = _cache_index.added(runs, names[new], len(files) - 1)
        return int(new.sum())

    def read(ids):
        wanted = _cache_index.read_ids("cache.read", ids)
        _require_kind("cache.read", wanted, files)
        names = wanted.reshape(-1)
        there, numbers, rows = _cache_index.find(runs, names)
        if not there.all():
            some = _cache_file.shown(names[~there][:5])
            got = f"{int((~there).sum())} of {len(names)} that are not, such as {some}"
            fix = "Write them, or check how ids are made."
            raise ValueError(_check.message("cache.read", "ids", "be in the cache", got, fix))
        if not files:
            rule, fix = "be those of a cache with outputs", "Write some first."
            raise ValueError(_check.message("cache.read", "ids", rule, "an empty cache", fix))
        leaves = files[0].about.leaves
        out = [np.empty((len(names), *leaf.shape), leaf.dtype) for leaf in leaves]
        for number in np.unique(numbers):
            chosen = np.flatnonzero(numbers == number)
            parts = [x[rows[chosen]] for x in mapped(int(number))]
            _cache_file.require_whole(files[number], rows[chosen], parts)
            for x, part in zip(out, parts, strict=True):
                x[chosen] = part
        out = [x.reshape(*wanted.shape, *x.shape[1:]) for x in out]
        return _cache_rows.in_structure(
            like, {f.path: _cache_rows.as_given(f, x) for f, x in zip(leaves, out, strict=True)}
        )

    def all_ids():
        merged = np.sort(np.concatenate([run.ids for run in runs])) if runs else np.empty(0, "S1")
        return _cache_file.shown(merged)

    return TeacherCache(has, write, read, all_ids)


def _fingerprint(teacher: Any) -> str:
    rule = "be text, or a dict that JSON can hold"
    if not isinstance(teacher, (str, dict)) or not teacher:
        got = _check.describe(teacher)
        raise TypeError(_check.message("open_cache", "teacher", rule, got))
    try:
        return json.dumps(teacher, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TypeError(_check.message("open_cache", "teacher", rule, str(error))) from None


def _float_dtype(dtype: Any) -> np.dtype:
    try:
        dtype = np.dtype(dtype)
    except TypeError:
        dtype = np.dtype(object)
    names = ("float16", "bfloat16", "float32")
    if dtype.name not in names:
        raise TypeError(
            _check.message("open_cache", "dtype", f"be one of {', '.join(names)}", dtype)
        )
    return dtype


def _further(function: str, folder: str, teacher: str, files: list) -> list[_cache_file.File]:
    """The heads of the files that are in the folder beside `files`, all of one cache."""
    known = {file.path for file in files}
    further = [_cache_file.read(function, p) for p in _paths(function, folder) if p not in known]
    for file in further:
        _require_one_teacher(function, teacher, file)
        _require_same(function, [*files, *further][0].about, file.about, file.path)
    return further


def _paths(function: str, folder: str) -> list[str]:
    if not os.path.exists(folder):
        return []
    if not os.path.isdir(folder):
        rule, got = "name a folder", f"the file {folder!r}"
        raise NotADirectoryError(_check.message(function, "folder", rule, got))
    names = sorted(name for name in os.listdir(folder) if name.endswith(_cache_file.SUFFIX))
    return [os.path.join(folder, name) for name in names]


def _make(folder: str) -> None:
    try:
        os.mkdir(folder)
    except FileExistsError:
        pass
    except FileNotFoundError:
        rule, fix = "be in a directory that exists", f"Create {os.path.dirname(folder)!r}."
        raise FileNotFoundError(
            _check.message("cache.write", "folder", rule, repr(folder), fix)
        ) from None


def _require_one_teacher(function: str, teacher: str, file: _cache_file.File) -> None:
    if file.about.teacher != teacher:
        rule = f"be of the teacher {teacher}"
        got = f"outputs of another teacher, {file.about.teacher}"
        fix = "Open another folder, or delete this one."
        raise ValueError(_check.message(function, "folder", rule, got, fix, path=file.path))


def _require_same(function: str, ours: About, theirs: About, path: str) -> None:
    """All files of a cache have one kind of ids and the same leaves."""
    kinds = {"i": "integers", "S": "text"}
    if ours.kind != theirs.kind:
        rule, got = f"be {kinds[ours.kind]}, as in all of the cache", kinds[theirs.kind]
        raise ValueError(_check.message(function, "ids", rule, got, path=path))
    if ours.leaves != theirs.leaves:
        rule = f"be {_shown(ours)} for each example, as in all of the cache"
        raise ValueError(_check.message(function, "outputs", rule, _shown(theirs), path=path))


def _shown(about: About) -> Any:
    """`float32 as float16[5]`: what came and what is stored, by path if there are several."""
    texts = {x.path: f"{x.given.name} as {x.dtype.name}{list(x.shape)}" for x in about.leaves}
    return texts[""] if list(texts) == [""] else texts


def _require_kind(function: str, ids: np.ndarray, files: list) -> None:
    if files and ids.size and files[0].about.kind != ids.dtype.kind:
        kinds = {"i": "integers", "S": "text"}
        rule = f"be {kinds[files[0].about.kind]}, as those that were written"
        raise ValueError(_check.message(function, "ids", rule, kinds[ids.dtype.kind]))


def _new_ids(ids: Any, files: list) -> np.ndarray:
    names = _cache_index.read_ids("cache.write", ids)
    if names.ndim != 1:
        rule, got = "have one axis, of the rows", _check.describe(names)
        raise ValueError(_check.message("cache.write", "ids", rule, got))
    unique, counts = np.unique(names, return_counts=True)
    if (counts > 1).any():
        rule, got = "differ from each other", f"{_cache_file.shown(unique[counts > 1][:5])} twice"
        raise ValueError(_check.message("cache.write", "ids", rule, got))
    _require_kind("cache.write", names, files)
    return names
