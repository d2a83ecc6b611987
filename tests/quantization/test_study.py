"""The study of training with few bits: it runs, and its committed record says what we claim."""

import numpy as np

from tests import studies

STUDY = "quantization_study"


def test_it_runs(tmp_path):
    studies.short_run(STUDY, ["2 bits, LSQ"], tmp_path, (2,))


def test_the_committed_record():
    record = studies.record(STUDY)
    assert record["seeds"] == [0, 1, 2, 3, 4]
    found = {row["method"]: 100 * np.asarray(row["accuracy"]) for row in record["results"]}
    mean = {name: accuracy.mean() for name, accuracy in found.items()}

    for name in ("4 bits", "8 to 4 bits", "16 learned values"):
        assert mean["float"] - mean[name] < 0.5, name
    for name in ("2 bits, LSQ", "2 bits, LSQ+", "2 bits, PARQ"):
        assert studies.beyond(found[name], found["2 bits, absmax"]) > 2, name
    assert mean["2 bits, LSQ"] > mean["1 bit"] > mean["2 bits, absmax"]


def test_the_readme_shows_the_committed_record():
    results = studies.record(STUDY)["results"]
    assert studies.cells(STUDY) == [[r["method"], studies.cell(r["accuracy"])] for r in results]
