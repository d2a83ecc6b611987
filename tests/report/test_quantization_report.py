"""The quantization report: rules, bits and errors against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.report import Quantization, quantization

MIN_MAX = jc.quantization.min_max


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def model(params, tokens):
    x = params["embed"][tokens]
    h = jax.nn.relu(x @ params["up"]["kernel"] + params["up"]["bias"][None, None, :])
    x = x + h @ params["down"]
    return x @ params["embed"].T


@pytest.fixture(scope="module")
def case():
    params = {
        "embed": draw(32, 16),
        "up": {"kernel": draw(16, 64, seed=1), "bias": draw(64, seed=2)},
        "down": draw(64, 16, seed=3),
    }
    p = jc.partition(
        {
            "up/kernel": jc.quantize(4, group_size=8, symmetric=False, ranges=MIN_MAX),
            "embed": jc.quantize(8, axis=0, ranges=MIN_MAX),
        }
    )
    return params, jc.pack(p, params), jax.ShapeDtypeStruct((2, 3), jnp.int32)


def test_every_leaf_with_its_rule_bits_bytes_and_error(case):
    params, packed, tokens = case
    made = quantization(model, params, packed, tokens)
    rows = {row.path: row for row in made.leaves}
    assert [row.path for row in made.leaves] == ["down", "embed", "up/bias", "up/kernel"]
    assert rows["down"].rule == rows["up/bias"].rule == "float32"
    assert rows["embed"].rule == "int8, per channel"
    assert rows["up/kernel"].rule == "uint4, zero points, groups of 8"
    assert rows["embed"].nbytes == 32 * 16 + 4 * 32
    assert rows["embed"].bits == 8 + 32 / 16
    assert rows["up/kernel"].bits == 4 + (32 + 8) / 8
    assert rows["down"].snr == np.inf
    w, q = (np.asarray(x, np.float64) for x in (params["embed"], packed["embed"].todense()))
    np.testing.assert_allclose(
        rows["embed"].snr, 10 * np.log10(np.sum(w**2) / np.sum((w - q) ** 2)), rtol=1e-9
    )
    flat = [
        np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(t)])
        for t in (params, jc.todense(packed))
    ]
    want = 10 * np.log10(np.sum(flat[0] ** 2) / np.sum((flat[0] - flat[1]) ** 2))
    np.testing.assert_allclose(made.total.snr, want, rtol=1e-9)
    assert made.total.nbytes == jc.tree.nbytes(packed)
    assert made.total.before_nbytes == jc.tree.nbytes(params)
    assert made.total.parameters == jc.tree.size(params)


def integer_products(jaxpr):
    """How many products of int8 with int8 there are, in every jaxpr inside."""
    found = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            found += all(v.aval.dtype == jnp.int8 for v in eqn.invars)
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            found += integer_products(inner) if hasattr(inner, "eqns") else 0
    return found


def test_every_site_with_what_it_multiplies(case):
    params, packed, tokens = case
    made = quantization(model, params, packed, tokens)
    assert [(s.path, s.op) for s in made.sites] == [
        ("embed", "gather"),
        ("up/kernel", "dot_general"),
        ("down", "dot_general"),
        ("embed", "dot_general"),
    ]
    assert made.floating == ["down"]
    assert [s.activations for s in made.sites] == ["", "float", "float", "float"]
    integer = quantization(model, params, packed, tokens, activations="dynamic")
    # Neither groups nor floats are multiplied as integers.
    assert [s.activations for s in integer.sites] == ["", "float", "float", "int8"]
    lifted = jc.lift(model, activations="dynamic")
    jaxpr = jax.make_jaxpr(lifted)(packed, jnp.zeros((2, 3), jnp.int32))
    assert integer_products(jaxpr.jaxpr) == 1
    # Nor can a scale that differs along the sum go outside of it.
    other = jc.pack(jc.masked(jc.quantize(8, axis=0, ranges=MIN_MAX), "down"), params)
    integer = quantization(model, params, other, tokens, activations="dynamic")
    assert [s.activations for s in integer.sites] == ["", "float", "float", "float"]
    jaxpr = jax.make_jaxpr(lifted)(other, jnp.zeros((2, 3), jnp.int32))
    assert integer_products(jaxpr.jaxpr) == 0
    factor = jnp.full((64, 1), 2.0)
    codes = jc.pack(jc.quantize(8, ranges=MIN_MAX), params["down"] / factor)
    other = params | {"down": jc.arrays.Rescaled(codes, factor, np.dtype(np.float32))}
    integer = quantization(model, params, other, tokens, activations="dynamic")
    assert integer.leaves[0].rule == "int8, per channel, rescaled"
    assert [s.activations for s in integer.sites] == ["", "float", "int8", "float"]
    jaxpr = jax.make_jaxpr(lifted)(other, jnp.zeros((2, 3), jnp.int32))
    assert integer_products(jaxpr.jaxpr) == 1
    given = quantization(model, params, packed, tokens, simulated="up/*")
    assert [s.activations for s in given.sites] == ["", "simulated", "float", "float"]


def test_the_table_lists_what_is_left_in_float(case):
    params, packed, tokens = case
    made = quantization(model, params, packed, tokens, activations="dynamic")
    text = str(made)
    lines = text.splitlines()
    assert lines[-1] == "left in float: down"
    assert any("embed" in line and "int8, per channel" in line and "dB" in line for line in lines)
    assert any("down" in line and "float32" in line and "exact" in line for line in lines)
    assert any("total" in line and f"{made.total.snr:.1f} dB" in line for line in lines)
    # The second site of the embedding has a line of its own.
    assert sum("dot_general" in line for line in lines) == 3
    assert max(map(len, lines)) <= 120
    assert "dot_general" in made._repr_html_()
    assert str(Quantization([], [], made.total)).endswith("left in float: no site")


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda: jc.quantize(1, ranges=MIN_MAX), "binary, per channel"),
        (lambda: jc.quantize(3, axis=None, ranges=MIN_MAX), "int3, one scale"),
        (
            lambda: jc.quantize(4, blocks={0: 8, 1: 4}, ranges=MIN_MAX),
            "int4, blocks of 8×4",
        ),
        (lambda: jc.quantization.nf4(group_size=16), "nf4, groups of 16"),
        (lambda: jc.quantization.fp8(), "float8_e4m3fn, per channel"),
        (lambda: jc.quantization.hqq(4, group_size=16), "uint4, zero points, groups of 16"),
        (
            lambda: jc.chain(jc.prune(nm=(2, 4)), jc.quantize(4, ranges=MIN_MAX)),
            "2:4 sparse int4, per channel",
        ),
        (lambda: jc.cluster(16, iterations=0), "16 values"),
        (lambda: jc.low_rank(2), "rank 2"),
    ],
)
def test_rules_in_words(make, rule):
    params = {"w": draw(64, 16)}
    made = quantization(lambda p, x: x @ p["w"], params, jc.pack(make(), params), draw(2, 64))
    assert made.leaves[0].rule == made.sites[0].rule == rule
    assert made.floating == []


def test_abstract_params(case):
    params, _, tokens = case
    abstract = jax.eval_shape(lambda: params)
    made = quantization(model, abstract, abstract, tokens)
    assert made.total.snr is None
    assert "–" in str(made)


def test_a_rule_that_matches_nothing_is_an_error(case):
    params, packed, tokens = case
    for p in (
        jc.masked(jc.quantize(4), "encoder/**"),
        jc.partition({"up/*": jc.quantize(4), "head/**": jc.quantize(8)}),
    ):
        with pytest.raises(ValueError, match="match at least one array leaf"):
            jc.pack(p, params)
    with pytest.raises(ValueError, match="head"):
        jc.pack(jc.quantize({"embed": 4, "up/kernel": 4, "down": 4, "head": 4}), params)
    with pytest.raises(ValueError, match=r"quantization.*match at least one"):
        quantization(model, params, packed, tokens, simulated="head/**")
    with pytest.raises(ValueError, match="activations"):
        quantization(model, params, packed, tokens, activations="int8")
    with pytest.raises(ValueError, match=r"quantization.*down"):
        quantization(model, params, {"embed": packed["embed"]}, tokens)
