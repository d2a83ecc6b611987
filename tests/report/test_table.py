import io
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from jaxcompress.report import LeafRow, Summary, summary, table
from jaxcompress.report._table import human_bytes


def headers(made: Summary) -> list[str]:
    return [str(column.header) for column in table(made).columns]


def test_text_holds_paths_and_totals():
    rng = np.random.default_rng(0)
    before = {"enc": {"kernel": rng.normal(size=(50, 40)), "bias": rng.normal(size=40)}}
    after = jax.tree.map(lambda x: np.where(x > 0, x, 0).astype(np.float16), before)
    made = summary(before, after)
    text = str(made)
    lines = text.splitlines()
    assert re.search(r"enc/kernel +50×40 +float16 +2,000 .*16.0 kB +4.00 kB +4.0×", text)
    assert "enc/bias" in text
    total = next(line for line in lines if "total" in line)
    assert "2,040" in total
    assert f"{100 * made.total.sparsity:.1f}%" in total
    assert f"{made.total.error:.2g}" in total
    assert "\x1b" not in text
    assert max(map(len, lines)) <= 120


def test_columns_are_there_when_they_tell_something():
    w = np.random.default_rng(0).normal(size=(30, 30))
    plain = ["leaf", "shape", "stored as", "params"]
    assert headers(summary({"w": w})) == [*plain, "bytes"]
    assert headers(summary({"w": np.where(w > 0, w, 0)})) == [*plain, "zeros", "bytes"]
    assert headers(summary({"w": np.round(w, 0) + 9})) == [*plain, "values", "bytes"]
    assert headers(summary({"w": w[:, :1] * w[:1]})) == [*plain, "rank", "bytes"]
    assert headers(summary({"w": w}, {"w": w})) == [*plain, "before", "bytes", "ratio", "error"]
    row = summary({"w": w}).rows[0]._replace(kind="Quantized", bits=4.25)
    made = Summary([row], summary({"w": w}).total)
    assert headers(made) == [*plain, "bits", "bytes"]
    assert "4.25" in str(made)
    assert "Quantized" in str(made)


def test_unknown_facts_are_dashes():
    spec = {"w": jax.ShapeDtypeStruct((3, 4), jnp.float32), "v": np.zeros(3, np.float32)}
    text = str(summary(spec))
    assert re.search(r"w +3×4 +float32 +12 +– ", text)
    assert re.search(r"total +15 +– ", text)


@pytest.mark.parametrize("kind", ["dense", "Quantized(BitMasked)"])
@pytest.mark.parametrize("length", [5, 30, 60, 200])
def test_width_stays_sane(kind, length):
    path = "/".join(["segment"] * (length // 8 + 1))
    row = LeafRow(
        path, (3, 3, 512, 512), "float32", kind, 2_359_296, 10**6, 0.5, 3.25, 15, 500,
        9_000_000, 0.123, 90_000_000, 10.0,
    )  # fmt: skip
    text = str(Summary([row, row], row._replace(path="total", shape=None, dtype="", rank=None)))
    assert max(map(len, text.splitlines())) <= 120
    assert "…" not in text
    for said in ("2,359,296", "9.00 MB", "10.0×", "0.12", "50.0%", "3×3×512×512"):
        assert said in text
    assert text.count("segment") == 2 * (length // 8 + 1)


def test_paths_are_not_markup():
    assert "[red]x[/red]" in str(summary({"[red]x[": {"red]": np.ones(2)}}))
    assert ":smile:" in str(summary({":smile:": np.ones(2)}))


def test_no_colours_even_when_forced(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "40")
    text = str(summary({"a_rather_long_name_for_a_leaf_that_is_small": np.ones((2, 3))}))
    assert "\x1b" not in text
    assert "a_rather_long_name_for_a_leaf_that_is_small" in text


def test_root_and_empty_trees():
    assert "(root)" in str(summary(np.ones(3)))
    assert re.search(r"total +0 +0 B", str(summary({})))


def test_rich_consoles_and_notebooks():
    made = summary({"w": np.ones((2, 2)), "b<": np.ones(2)})
    stream = io.StringIO()
    Console(file=stream, width=100).print(made)
    assert "total" in stream.getvalue()
    assert table(made).row_count == 2
    assert "b&lt;" in made._repr_html_()


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (9_999, "10.0 kB"), (12_340, "12.3 kB"),
     (123_456, "123 kB"), (999_500, "1.00 MB"), (5 * 10**9, "5.00 GB"), (3 * 10**15, "3000 TB")],
)  # fmt: skip
def test_human_bytes(n, text):
    assert human_bytes(n) == text


def test_missing_rich(monkeypatch):
    made = summary({"w": np.ones(3)})
    monkeypatch.setitem(sys.modules, "rich", None)
    for call in (lambda: str(made), lambda: table(made)):
        with pytest.raises(ImportError, match=r'`rich` must.*pip install "jaxcompress\[report\]"'):
            call()
