"""All models that structured pruning is tested on, by name."""

import fnmatch
import re

import jax
import numpy as np

import jaxcompress as jc
from tests.pruning.structured.zoo_frameworks import FRAMEWORK_MODELS
from tests.pruning.structured.zoo_images import IMAGE_MODELS
from tests.pruning.structured.zoo_parts import Model as Model
from tests.pruning.structured.zoo_sequences import SEQUENCE_MODELS
from tests.pruning.structured.zoo_sequences import decoder_8b as decoder_8b

MODELS = {make.__name__: make for make in IMAGE_MODELS} | SEQUENCE_MODELS | FRAMEWORK_MODELS


def expected_group(line, shapes):
    """A line of `Model.groups` as `(exact, layers, size, {(path, axis), …})`."""
    exact, layers, size, places = re.fullmatch(r"(~?)((?:\d+x)*)(\d+): (.*)", line).groups()
    found = set()
    for place in places.split():
        pattern, axis = re.fullmatch(r"(.*)\[(-?\d+)\]", place).groups()
        paths = [p for p in shapes if fnmatch.fnmatchcase(p, pattern)]
        assert paths, f"no leaf {pattern} among {list(shapes)}"
        found |= {(p, int(axis) % len(shapes[p].shape)) for p in paths}
    return not exact, tuple(map(int, layers.split("x")[:-1])), int(size), frozenset(found)


def shapes_of(params):
    return {
        path: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype)
        for path, leaf in jc.tree.leaves_with_paths(params)
    }
