"""The study of training with few bits: it runs, and its committed record says what we claim."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

import jaxcompress as jc
from tests.test_examples import user_environment

EXAMPLES = pathlib.Path(jc.__file__).parents[1] / "examples"
RESULTS = EXAMPLES / "quantization_study_results.json"


def test_it_runs(tmp_path):
    pytest.importorskip("sklearn")
    ways, out = ["2 bits, LSQ"], tmp_path / "results.json"
    command = [sys.executable, str(EXAMPLES / "quantization_study.py"), "--quick", "--only", *ways]
    run = subprocess.run(
        [*command, "--out", str(out)],
        capture_output=True, encoding="utf-8", timeout=300, env=user_environment(), cwd=tmp_path,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    record = json.loads(out.read_text())
    assert [row["method"] for row in record["results"]] == ways
    for row in record["results"]:
        assert np.shape(row["accuracy"]) == (2,)
        assert row["method"] in run.stdout


def test_the_committed_record():
    record = json.loads(RESULTS.read_text())
    assert record["seeds"] == [0, 1, 2, 3, 4]
    found = {row["method"]: 100 * np.asarray(row["accuracy"]) for row in record["results"]}
    mean = {name: accuracy.mean() for name, accuracy in found.items()}

    def beyond(better, worse):
        """The difference of the means in standard errors."""
        error = np.sqrt((found[better].var(ddof=1) + found[worse].var(ddof=1)) / 5)
        return (mean[better] - mean[worse]) / error

    for name in ("4 bits", "8 to 4 bits", "16 learned values"):
        assert mean["float"] - mean[name] < 0.5, name
    for name in ("2 bits, LSQ", "2 bits, LSQ+", "2 bits, PARQ"):
        assert beyond(name, "2 bits, absmax") > 2, name
    assert mean["2 bits, LSQ"] > mean["1 bit"] > mean["2 bits, absmax"]


def test_the_readme_shows_the_committed_record():
    def cell(accuracy):
        percent = 100 * np.asarray(accuracy)
        return f"{percent.mean():.1f} ± {percent.std(ddof=1) / np.sqrt(len(percent)):.1f}"

    text = (EXAMPLES.parent / "README.md").read_text()
    table = text.split("<!-- table: examples/quantization_study_results.json -->")[1]
    rows = [line.strip("| ").split(" | ") for line in table.split("\n\n")[1].splitlines()[2:]]
    record = json.loads(RESULTS.read_text())["results"]
    assert rows == [[row["method"], cell(row["accuracy"])] for row in record]
