"""Docstrings' examples run, and so does every Python block of the README."""

import doctest
import importlib
import pathlib
import pkgutil
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress

ROOT = pathlib.Path(jaxcompress.__file__).parent
MODULES = [m.name for m in pkgutil.walk_packages([str(ROOT)], "jaxcompress.")]
# Examples that use a package of the extra `peers`.
NEEDS = {"jaxcompress.quantization._interop": "qwix"}
NAMES = {"jax": jax, "jnp": jnp, "np": np, "optax": optax, "jc": jaxcompress}


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    module = importlib.import_module(name)
    flags = doctest.NORMALIZE_WHITESPACE
    # Users do not set strict promotion, and Optax does not pass it.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        result = doctest.testmod(module, extraglobs=dict(NAMES), optionflags=flags)
    assert result.failed == 0


@pytest.mark.parametrize("name", [n for n in dir(jaxcompress) if not n.startswith("_")])
def test_public_functions_have_a_runnable_example(name):
    value = getattr(jaxcompress, name)
    if not callable(value):
        pytest.skip("a sub-package")
    assert ">>>" in value.__doc__, f"jaxcompress.{name} has no example"


def test_readme_code_runs(tmp_path, monkeypatch):
    readme = ROOT.parent / "README.md"
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", readme.read_text(), flags=re.DOTALL)
    assert len(blocks) >= 5
    names: dict = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for block in blocks:
            exec(compile(block, "README.md", "exec"), names)
