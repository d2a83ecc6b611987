"""The study of ways to low rank: it runs, and its committed record says what we claim."""

import numpy as np

from tests import studies

STUDY = "low_rank_study"


def test_it_runs(tmp_path):
    studies.short_run(STUDY, ["whitened after training", "dynamical"], tmp_path, (4, 2))


def test_the_committed_record():
    record = studies.record(STUDY)
    assert record["seeds"] == [0, 1, 2, 3, 4]
    assert record["ranks"] == [1, 2, 4, 8]
    found = {row["method"]: 100 * np.asarray(row["accuracy"]) for row in record["results"]}

    def beyond(better, worse, rank):
        at = record["ranks"].index(rank)
        return studies.beyond(found[better][at], found[worse][at])

    for rank in (2, 4, 8):
        assert beyond("whitened after training", "truncated after training", rank) > 2
    for name in ("factors", "dynamical", "straight-through"):
        assert beyond(name, "projected every 10 steps", 4) > 2, name
        assert beyond(name, "whitened after training", 4) > 2, name


def test_the_readme_shows_the_committed_record():
    results = studies.record(STUDY)["results"]
    wanted = [[row["method"], *map(studies.cell, row["accuracy"])] for row in results]
    assert studies.cells(STUDY) == wanted
