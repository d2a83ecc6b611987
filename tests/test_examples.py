"""The notebook and the quickstart run, and the README's table is what the quickstart wrote."""

import json
import os
import pathlib
import re
import subprocess
import sys
import urllib.parse

import numpy as np
import pytest

import jaxcompress as jc

ROOT = pathlib.Path(jc.__file__).parents[1]
NOTEBOOK = ROOT / "colabs" / "quickstart.ipynb"
QUICKSTART = ROOT / "examples" / "quickstart.py"
RESULTS = ROOT / "examples" / "quickstart_results.json"
METHODS = [
    "teacher",
    "90% sparse",
    "2:4 sparse",
    "int8",
    "int4",
    "low rank",
    "90% sparse + int4 + distilled",
    "student, distilled",
]
COLUMNS = {
    "method": lambda row: row["method"],
    "test accuracy": lambda row: f"{100 * row['accuracy']:.1f}%",
    "parameters kept": lambda row: f"{row['parameters_kept']:,}",
    "bits per weight": lambda row: f"{row['bits_per_weight']:.2f}",
    "bytes on disk": lambda row: f"{row['bytes_on_disk']:,}",
    "compression": lambda row: f"{row['compression']:.1f}x",
    "latency": lambda row: f"{row['latency_ms']:.2f} ms",
}
PNG = b"\x89PNG\r\n\x1a\n"


def user_environment() -> dict[str, str]:
    """The variables of a user at a CPU: without the fake devices of this suite."""
    kept = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "COLUMNS", "MPLBACKEND")}
    path = os.pathsep.join([str(ROOT), *filter(None, [kept.get("PYTHONPATH")])])
    return kept | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path, "PYTHONUTF8": "1"}


@pytest.fixture(scope="module")
def notebook():
    nbformat = pytest.importorskip("nbformat")
    return nbformat.read(NOTEBOOK, as_version=nbformat.NO_CONVERT)


def test_notebook_is_valid_and_stripped(notebook):
    import nbformat

    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) >= (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    for cell in notebook.cells:
        assert set(cell.metadata) <= {"tags"}
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


def test_notebook_opens_in_colab_and_installs_first(notebook):
    title = notebook.cells[0]
    assert title.cell_type == "markdown"
    assert title.source.startswith("# ")
    link = re.search(r"\((https://colab\.research\.google\.com/github/[^)]*)\)", title.source)
    assert link, "the first cell has no Colab badge"
    assert urllib.parse.urlparse(link[1]).path.endswith("/blob/main/colabs/quickstart.ipynb")
    first = next(cell.source for cell in notebook.cells if cell.cell_type == "code")
    guard, install = first.index("import jaxcompress"), first.index("%pip install")
    assert guard < install, "it must install only where the package is not there"
    assert "jaxcompress[examples] @ git+https://" in first


def test_notebook_prose_has_no_measured_number(notebook):
    """A number with a percent sign, a unit or decimals in prose would go stale."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            prose = re.sub(r"`[^`]*`|\([^)]*://[^)]*\)", "", cell.source)
            stale = re.findall(r"\d+(?:\.\d+)?\s?(?:%|kB|MB|bytes\b|ms\b|x\b|times\b)", prose)
            assert not stale, f"computed nowhere: {stale}"


# The messaging library and the event loop of the parent warn of their own future, not of ours.
@pytest.mark.filterwarnings("ignore::DeprecationWarning:jupyter_client")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:zmq")
@pytest.mark.filterwarnings("ignore:Proactor event loop:RuntimeWarning")
def test_notebook_runs(notebook, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager

    # The interpreter of this test, whatever kernels the machine has.
    kernel = tmp_path / "kernels" / "python3"
    kernel.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": command, "display_name": "Python 3", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(spec))
    specs = KernelSpecManager(kernel_dirs=[str(tmp_path / "kernels")], ensure_native_kernel=False)
    manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=specs)

    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    here = tmp_path / "run"
    here.mkdir()
    run = notebook.copy()
    client = nbclient.NotebookClient(
        run, km=manager, timeout=300, allow_errors=False, resources={"metadata": {"path": here}}
    )
    client.execute(env=user_environment())

    outputs = [out for cell in run.cells if cell.cell_type == "code" for out in cell.outputs]
    assert not [out for out in outputs if out.output_type == "error"]
    warned = [out.text for out in outputs if out.get("name") == "stderr"]
    assert not warned, f"a reader would see {warned}"
    pictures = [out for out in outputs if "image/png" in out.get("data", {})]
    assert len(pictures) >= 4
    assert sorted(here.glob("*.safetensors")), "the notebook saved no model"
