"""What the tests of the studies share: a short run, and the cells of the README's tables."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

import jaxcompress as jc
from tests.test_examples import user_environment

EXAMPLES = pathlib.Path(jc.__file__).parents[1] / "examples"


def short_run(name, ways, folder, shape):
    """Runs some ways of a study, each of which gives accuracies of that shape."""
    pytest.importorskip("sklearn")
    out = folder / "results.json"
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), "--quick", "--only", *ways]
    run = subprocess.run(
        [*command, "--out", str(out)],
        capture_output=True, encoding="utf-8", timeout=300, env=user_environment(), cwd=folder,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    record = json.loads(out.read_text())
    assert [row["method"] for row in record["results"]] == ways
    for row in record["results"]:
        assert np.shape(row["accuracy"]) == shape
        assert row["method"] in run.stdout


def record(name):
    """The committed record."""
    return json.loads((EXAMPLES / f"{name}_results.json").read_text())


def cells(name):
    """The rows of the README's table of a record."""
    text = (EXAMPLES.parent / "README.md").read_text()
    table = text.split(f"<!-- table: examples/{name}_results.json -->")[1]
    return [line.strip("| ").split(" | ") for line in table.split("\n\n")[1].splitlines()[2:]]


def cell(accuracy):
    percent = 100 * np.asarray(accuracy)
    return f"{percent.mean():.1f} ± {percent.std(ddof=1) / np.sqrt(len(percent)):.1f}"


def beyond(a, b):
    """The difference of the means in standard errors."""
    return (a.mean() - b.mean()) / np.sqrt((a.var(ddof=1) + b.var(ddof=1)) / len(a))
