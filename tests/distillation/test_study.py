"""The study of ways to distil: it runs, and its committed record says what we claim."""

import numpy as np

from tests import studies

STUDY = "distillation_study"


def test_it_runs(tmp_path):
    studies.short_run(STUDY, ["teacher", "DKD", "hint + KD"], tmp_path, (4, 2))
    assert (tmp_path / "results.png").stat().st_size > 0


def test_the_committed_record():
    record = studies.record(STUDY)
    assert record["seeds"] == [0, 1, 2, 3, 4]
    assert record["temperatures"] == [1, 2, 4, 8]
    assert record["images"] == 100
    found = {row["method"]: 100 * np.asarray(row["accuracy"]) for row in record["results"]}
    alone = found["student alone"]
    for name in ("KD", "KD, standardized", "DKD", "NKD", "DIST", "hint + KD"):
        best = max(found[name], key=lambda at: at.mean())
        assert studies.beyond(best, alone[0]) > 2, name
    assert (alone == alone[0]).all()
    assert found["teacher"].min() > max(a.max() for n, a in found.items() if n != "teacher")


def test_the_readme_shows_the_committed_record():
    results = studies.record(STUDY)["results"]
    wanted = [[row["method"], *map(studies.cell, row["accuracy"])] for row in results]
    assert studies.cells(STUDY) == wanted
