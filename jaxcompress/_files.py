"""Files that are written whole or not at all, in a format of others."""

import os
import uuid
from types import ModuleType

from jaxcompress import _check


def safetensors(function: str) -> ModuleType:
    """The optional dependency, imported when it is needed."""
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            f'{function}: the package safetensors is missing. Run: pip install "jaxcompress[save]"'
        ) from error
    return safetensors


def write_whole(function: str, path: str, data: bytes) -> None:
    """Writes a file so that a crash leaves the previous one, or none, but never a part.

    Writes to a new file next to it, flushes that to the disk, renames it.
    """
    target = os.path.realpath(path)
    folder = os.path.dirname(target)
    if not os.path.isdir(folder):
        raise FileNotFoundError(
            _check.message(
                function, "path", "be in a directory that exists", repr(path), f"Create {folder!r}."
            )
        )
    if os.path.isdir(target):
        raise IsADirectoryError(
            _check.message(function, "path", "name a file", f"the directory {path!r}")
        )
    part = os.path.join(folder, f".{uuid.uuid4().hex}.part")
    try:
        # Made with the permissions of any new file, unlike those of `tempfile`.
        with open(part, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    except BaseException:
        if os.path.exists(part):
            os.remove(part)
        raise
    if hasattr(os, "O_DIRECTORY"):
        # The rename itself reaches the disk with the directory.
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
