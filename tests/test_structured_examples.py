"""The examples of structured pruning: they run, and their committed records say what we claim."""

import json

import numpy as np

from tests import studies
from tests.test_minilm import cells as minilm_cells
from tests.test_minilm import needs_model, quick

STUDY = "structured_study"
MINILM = studies.EXAMPLES / "minilm_structured_results.json"


def accuracies():
    """In percent, `[removed, seed]`, by the way."""
    return {r["method"]: 100 * np.asarray(r["accuracy"]) for r in studies.record(STUDY)["results"]}


def test_the_study_runs(tmp_path):
    studies.short_run(STUDY, ["dense", "Taylor", "projected"], tmp_path, (2, 2))
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    gains = json.loads((tmp_path / "results.json").read_text())["gains"]
    committed = studies.record(STUDY)["gains"]
    for name in ("removed", "parameters", "flops"):
        assert [row[name] for row in gains] == [row[name] for row in committed]


def test_half_of_the_channels_costs_at_most_half_a_point():
    record = studies.record(STUDY)
    assert record["seeds"] == [0, 1, 2, 3, 4]
    assert record["removed"] == [0.5, 0.75]
    found = accuracies()
    dense = found["dense"][0].mean()
    for name in ("magnitude", "growing regularization", "straight-through"):
        half, quarter = found[name]
        assert half.mean() >= dense - 0.5, name
        assert studies.beyond(half, found["random"][0]) > 2, name
        assert studies.beyond(quarter, found["random"][1]) > 2, name


def test_the_small_networks_of_the_study_are_smaller():
    for row, most in zip(studies.record(STUDY)["gains"], (0.28, 0.08), strict=True):
        for name, part in {"parameters": most, "flops": most, "bytes_on_disk": most + 0.02}.items():
            wide, narrow = row[name]
            assert narrow <= part * wide, name


def test_the_readme_shows_the_study():
    results = studies.record(STUDY)["results"]
    wanted = [[row["method"], *map(studies.cell, row["accuracy"])] for row in results]
    assert studies.cells(STUDY) == wanted


@needs_model
def test_heads_and_neurons_of_a_pretrained_encoder(tmp_path):
    found, shown = quick("minilm_structured.py", tmp_path)
    assert list(found) == ["dense", "75%, Taylor"]
    row = found["75%, Taylor"]
    assert 0.749 < row["parameters"] <= 0.75
    assert row["flops"] < 0.77
    assert row["distilled"] > row["removed"] > 0.85
    assert "Taylor" in shown


def test_the_committed_record_of_the_encoder():
    rows = {row["way"]: row for row in json.loads(MINILM.read_text())["rows"]}
    for share in (0.75, 0.5):
        taylor, magnitude = (rows[f"{share:.0%}, {name}"] for name in ("Taylor", "magnitude"))
        for row in (taylor, magnitude):
            assert share - 0.001 < row["parameters"] <= share
            assert row["flops"] < share + 0.02
            assert row["latency_ms"] < rows["dense"]["latency_ms"]
        assert taylor["removed"] > magnitude["removed"] + 0.05
        assert taylor["distilled"] > magnitude["distilled"]
    for name, row in rows.items():
        assert name == "dense" or row["distilled"] > row["removed"]
    assert rows["75%, Taylor"]["distilled"] > 0.95
    assert np.isclose(rows["3 layers"]["parameters"], 0.5)


def test_the_readme_shows_the_encoder():
    rows = json.loads(MINILM.read_text())["rows"]
    assert minilm_cells(MINILM.name) == [
        [
            row["way"],
            f"{row['parameters']:.0%}",
            f"{row['flops']:.0%}",
            f"{row['removed']:.3f}",
            f"{row['distilled']:.3f}",
        ]
        for row in rows
    ]
