"""The notebook and the examples run, and the README's table is what the quickstart wrote."""

import copy
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
STUDY = ROOT / "examples" / "pruning_study.py"
STUDY_RESULTS = ROOT / "examples" / "pruning_study_results.json"
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

    # The interpreter of this test, whatever kernels the machine has.
    kernel = tmp_path / "kernels" / "python3"
    kernel.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": command, "display_name": "Python 3", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    here = tmp_path / "run"
    here.mkdir()
    run = copy.deepcopy(notebook)
    client = nbclient.NotebookClient(
        run, kernel_name="python3", timeout=300, resources={"metadata": {"path": str(here)}}
    )
    client.execute(env=user_environment())

    outputs = [out for cell in run.cells if cell.cell_type == "code" for out in cell.outputs]
    assert not [out for out in outputs if out.output_type == "error"]
    warned = [out.text for out in outputs if out.get("name") == "stderr"]
    assert not warned, f"a reader would see {warned}"
    pictures = [out for out in outputs if "image/png" in out.get("data", {})]
    assert len(pictures) >= 4
    assert sorted(here.glob("*.safetensors")), "the notebook saved no model"


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """What the quickstart prints and writes in a few steps."""
    out = tmp_path_factory.mktemp("quickstart") / "results"
    command = [sys.executable, "-W", "error::DeprecationWarning:jaxcompress", str(QUICKSTART)]
    done = subprocess.run(
        [*command, "--steps", "60", "--out", str(out)],
        capture_output=True,
        encoding="utf-8",
        env=user_environment(),
        cwd=out.parent,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr, f"a reader would see {done.stderr}"
    return out, done.stdout


def test_tracing_example():
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "tracing.py"), "--steps", "40"],
        capture_output=True,
        encoding="utf-8",
        env=user_environment(),
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr, f"a reader would see {done.stderr}"
    rows = [
        [cell.strip() for cell in re.split("[│]", line)[1:-1]]
        for line in done.stdout.splitlines()
        if line.startswith("│")
    ]
    assert [row[0] for row in rows[:3]] == ["inputs", "layers", "head"]
    ways = {row[0]: row for row in rows[3:]}
    assert len(ways) == 6
    accuracy = {name: float(row[1].rstrip("%")) for name, row in ways.items()}
    assert accuracy["float32"] > 60
    assert abs(accuracy["int8, integer products"] - accuracy["float32"]) < 3
    size = {name: int(row[2].replace(",", "")) for name, row in ways.items()}
    assert size["int8"] < 0.27 * size["float32"]


def test_pruning_study(tmp_path):
    name = "RigL"
    command = [sys.executable, str(STUDY), "--out", str(tmp_path), "--steps", "10"]
    run = subprocess.run(
        [*command, "--seeds", "0", "1", "--only", name],
        capture_output=True, text=True, timeout=300, env=user_environment(), cwd=tmp_path,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert name in run.stdout
    record = json.loads((tmp_path / "results.json").read_text())
    (result,) = record["results"]
    assert np.shape(result["accuracy"]) == (4, 2)
    assert (tmp_path / "accuracy_against_sparsity.png").read_bytes().startswith(PNG)


def test_pruning_study_beats_random_masks():
    """At 95% each method is better than held random masks by over two standard errors."""
    record = json.loads(STUDY_RESULTS.read_text())
    at = record["sparsities"].index(0.95)
    found = {r["method"]: np.asarray(r["accuracy"][at]) for r in record["results"]}
    random = found.pop("random, held")
    assert len(random) == 5
    assert {"magnitude, gradual", "SET", "RigL", "GraNet", "Top-KAST"} <= set(found)
    for name, accuracy in found.items():
        error = np.sqrt((accuracy.var(ddof=1) + random.var(ddof=1)) / len(random))
        assert accuracy.mean() - random.mean() > 2 * error, name


def test_pruning_study_in_the_readme_is_the_committed_record():
    record = json.loads(STUDY_RESULTS.read_text())
    text = (ROOT / "README.md").read_text().split("<!-- table: examples/pruning_study")[1]
    rows = [line.strip("| ").split(" | ") for line in text.split("\n\n")[1].splitlines()[2:]]
    for row, result in zip(rows, record["results"], strict=True):
        accuracy = 100 * np.asarray(result["accuracy"])
        errors = accuracy.std(-1, ddof=1) / np.sqrt(accuracy.shape[-1])
        cells = zip(accuracy.mean(-1), errors, strict=True)
        assert row == [result["method"], *(f"{m:.1f} ± {e:.1f}" for m, e in cells)]


def results_of(out: pathlib.Path) -> dict:
    return json.loads((out / "results.json").read_text())


def test_quickstart_prints_its_table(quickstart):
    out, printed = quickstart
    table = printed[printed.index("Digits: one network, compressed") :]
    assert all(name in table for name in COLUMNS)
    # A long name is folded within its cell: its words are in its row and in those below.
    lines = [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in table.splitlines()]
    rows: list[list[str]] = []
    for line in (line for line in lines if len(line) == len(COLUMNS)):
        if line[1]:
            rows.append(line)
        else:
            rows[-1][0] += " " + line[0]
    wanted = [[cell(row) for cell in COLUMNS.values()] for row in results_of(out)["results"]]
    assert rows[1:] == wanted
    assert [row[0] for row in rows[1:]] == METHODS


def test_quickstart_says_where_its_files_are(quickstart):
    out, printed = quickstart
    # The line may be wrapped in the middle of the folder's name.
    assert str(out.resolve()) in printed.replace("\n", "")


def test_quickstart_models_are_on_disk_and_load(quickstart):
    out, _ = quickstart
    results = {row["method"]: row for row in results_of(out)["results"]}
    files = sorted(out.glob("*.safetensors"))
    assert len(files) == len(METHODS)
    sizes = [file.stat().st_size for file in files]
    assert sorted(sizes) == sorted(row["bytes_on_disk"] for row in results.values())
    for file in files:
        (row,) = [row for name, row in results.items() if name_in_file(name) == file.stem]
        assert row["bytes_on_disk"] == file.stat().st_size
        tree = jc.load(file)
        assert jc.tree.nbytes(tree) <= row["bytes_on_disk"]
        dense = jc.todense(tree)
        for w in (dense[name]["kernel"] for name in ("conv1", "conv2", "dense", "head")):
            assert np.isfinite(np.asarray(w)).all()
        if row["method"] not in ("teacher", "student, distilled"):
            assert all(jc.arrays.is_compressed(tree[n]["kernel"]) for n in ("conv2", "dense"))


def name_in_file(method: str) -> str:
    """The method's name as its file spells it, which leaves out what shells do not like."""
    return re.sub("[^A-Za-z0-9:+_-]", "", method.replace(" ", "_"))


def test_quickstart_pictures_are_pictures(quickstart):
    out, _ = quickstart
    image = pytest.importorskip("matplotlib.image")
    names = {file.name for file in out.glob("*.png")}
    assert names == {"accuracy_against_size.png", "weights_before_and_after.png"}
    for name in names:
        assert (out / name).read_bytes().startswith(PNG)
        pixels = image.imread(out / name)[..., :3]
        assert min(pixels.shape[:2]) > 300
        assert 0.001 < (pixels.min(-1) < 0.9).mean() < 0.6  # something is drawn on white


def check_record(record: dict, steps: int | None) -> None:
    """What holds of every run, whatever the accuracies."""
    assert set(record) == {"device", "versions", "seconds", "steps", "results"}
    assert set(record["versions"]) == {"jax", "flax", "optax", "jaxcompress"}
    assert record["versions"]["jaxcompress"] == jc.__version__
    assert record["seconds"] > 0
    assert steps is None or record["steps"] == steps
    assert [row["method"] for row in record["results"]] == METHODS
    teacher, *others = record["results"]
    assert (teacher["compression"], teacher["bits_per_weight"]) == (1.0, 32.0)
    for row in record["results"]:
        assert 0.1 < row["accuracy"] <= 1.0
        assert row["latency_ms"] > 0
        assert row["parameters_kept"] > 0
    for row in others:
        assert row["compression"] > 1.5
        assert row["bytes_on_disk"] < teacher["bytes_on_disk"]
        # What a file holds besides the arrays: names, shapes, a digest.
        arrays = 4 * teacher["parameters_kept"] / row["compression"]
        assert 0 <= row["bytes_on_disk"] - 0.99 * arrays < 8000
        assert row["parameters_kept"] <= teacher["parameters_kept"]
        assert 0 < row["bits_per_weight"] <= 32.0
    by_name = {row["method"]: row for row in others}
    for name in ("90% sparse", "90% sparse + int4 + distilled"):
        assert 0.09 < by_name[name]["parameters_kept"] / teacher["parameters_kept"] < 0.12
    assert 0.49 < by_name["2:4 sparse"]["parameters_kept"] / teacher["parameters_kept"] < 0.52
    for bits in (4, 8):
        assert bits < by_name[f"int{bits}"]["bits_per_weight"] < bits + 1
    joint = by_name["90% sparse + int4 + distilled"]
    assert joint["bytes_on_disk"] == min(row["bytes_on_disk"] for row in record["results"])


def test_quickstart_record_is_sane(quickstart):
    check_record(results_of(quickstart[0]), steps=60)


def test_committed_record_is_sane():
    check_record(json.loads(RESULTS.read_text()), steps=None)


def readme_table(text: str) -> list[list[str]]:
    """The cells of the first Markdown table whose first column is the method; header first."""
    lines = text.splitlines()
    cells = [
        [cell.strip() for cell in line.strip().strip("|").split("|")] if "|" in line else []
        for line in lines
    ]
    start = next((i for i, row in enumerate(cells) if row and row[0].lower() == "method"), None)
    if start is None:
        return []
    rows = []
    for row in cells[start:]:
        if not row:
            break
        rows.append(row)
    header, rule, *rest = rows
    assert all(re.fullmatch(":?-+:?", cell) for cell in rule)
    return [header, *rest]


def test_readme_table_is_the_committed_record():
    table = readme_table((ROOT / "README.md").read_text(encoding="utf-8"))
    assert table, "README.md has no table of results"
    header, *rows = table
    assert header == list(COLUMNS)
    results = json.loads(RESULTS.read_text())["results"]
    assert rows == [[cell(row) for cell in COLUMNS.values()] for row in results]
