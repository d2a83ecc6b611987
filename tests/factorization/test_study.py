"""The study of ways to low rank: it runs, and its committed record says what we claim."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

import jaxcompress as jc
from tests.test_examples import user_environment

EXAMPLES = pathlib.Path(jc.__file__).parents[1] / "examples"
RESULTS = EXAMPLES / "low_rank_study_results.json"


def test_it_runs(tmp_path):
    pytest.importorskip("sklearn")
    ways, out = ["whitened after training", "dynamical"], tmp_path / "results.json"
    command = [sys.executable, str(EXAMPLES / "low_rank_study.py"), "--quick", "--only", *ways]
    run = subprocess.run(
        [*command, "--out", str(out)],
        capture_output=True, encoding="utf-8", timeout=300, env=user_environment(), cwd=tmp_path,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    record = json.loads(out.read_text())
    assert [row["method"] for row in record["results"]] == ways
    for row in record["results"]:
        assert np.shape(row["accuracy"]) == (4, 2)
        assert row["method"] in run.stdout


def test_the_committed_record():
    record = json.loads(RESULTS.read_text())
    assert record["seeds"] == [0, 1, 2, 3, 4]
    assert record["ranks"] == [1, 2, 4, 8]
    found = {row["method"]: 100 * np.asarray(row["accuracy"]) for row in record["results"]}

    def beyond(better, worse, rank):
        """The difference of the means in standard errors."""
        a, b = (found[name][record["ranks"].index(rank)] for name in (better, worse))
        return (a.mean() - b.mean()) / np.sqrt((a.var(ddof=1) + b.var(ddof=1)) / 5)

    for rank in (2, 4, 8):
        assert beyond("whitened after training", "truncated after training", rank) > 2
    for name in ("factors", "dynamical", "straight-through"):
        assert beyond(name, "projected every 10 steps", 4) > 2, name
        assert beyond(name, "whitened after training", 4) > 2, name


def test_the_readme_shows_the_committed_record():
    def cell(accuracy):
        percent = 100 * np.asarray(accuracy)
        return f"{percent.mean():.1f} ± {percent.std(ddof=1) / np.sqrt(len(percent)):.1f}"

    text = (EXAMPLES.parent / "README.md").read_text()
    table = text.split("<!-- table: examples/low_rank_study_results.json -->")[1]
    rows = [line.strip("| ").split(" | ") for line in table.split("\n\n")[1].splitlines()[2:]]
    record = json.loads(RESULTS.read_text())["results"]
    assert rows == [[row["method"], *map(cell, row["accuracy"])] for row in record]
