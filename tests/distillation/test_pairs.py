"""Values of a student and a teacher in pairs: which are paired, and what they are."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from jaxcompress.distillation import Layers, capture_pairs
from tests.conftest import counting_jit, lenient, mesh_of


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


def mlp(params, x):
    """A layer for each matrix, called `blocks_0/attn`, `blocks_1/attn`, …."""
    for i, w in enumerate(params):
        with jax.named_scope(f"blocks_{i}"):
            x = jc.name(jnp.tanh(x @ w), "attn")
    return x


def other_mlp(params, x):
    for i, w in enumerate(params):
        with jax.named_scope(f"layer_{i}"):
            x = jc.name(jnp.tanh(x @ w), "attention")
    return x


def scanned(params, x):
    def step(x, w):
        return jc.name(jnp.tanh(x @ w), "block"), None

    return jax.lax.scan(step, x, params["w"])[0]


def layers(params, x):
    """The value after each layer, by NumPy in float64."""
    x, out = np.asarray(x, np.float64), []
    for w in params:
        x = np.tanh(x @ np.asarray(w, np.float64))
        out.append(x)
    return out


SMALL = [draw(8, 8, seed=i) for i in range(3)]
BIG = [draw(8, 8, seed=10 + i) for i in range(6)]
X = draw(3, 8)


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_wildcards_pair_by_their_text_not_by_order():
    # The teacher has its layers in another order.
    def teacher(params, x):
        a = jc.name(x @ params[0], "layer_1/attention")
        b = jc.name(a @ params[1], "layer_0/attention")
        return jc.name(b @ params[2], "layer_2/attention")

    paired = capture_pairs(
        mlp, teacher, {"blocks_*/attn": "layer_*/attention"}, (SMALL, X), (BIG, X)
    )
    assert paired.names == {
        f"blocks_{i}/attn": (f"blocks_{i}/attn", f"layer_{i}/attention") for i in range(3)
    }
    y, ours = paired.student(SMALL, X)
    _, theirs = paired.teacher(BIG, X)
    assert ours.keys() == theirs.keys()
    close(y, layers(SMALL, X)[-1])
    close(ours["blocks_1/attn"], layers(SMALL, X)[1])
    close(theirs["blocks_1/attn"], X @ BIG[0])
    close(theirs["blocks_0/attn"], X @ BIG[0] @ BIG[1])


@pytest.mark.parametrize(
    "pairs",
    [
        {"blocks_*/attn": lambda i: f"layer_{2 * int(i) + 1}/attention"},
        {f"blocks_{i}/attn": f"layer_{2 * i + 1}/attention" for i in range(3)},
        {re.compile(r"blocks_(\d)/attn"): lambda i: f"layer_{2 * int(i) + 1}/attention"},
        {"blocks_*/a??n": lambda i, a, b: f"layer_{2 * int(i) + 1}/a{a}{b}ention"},
    ],
    ids=["function", "listed", "regex", "three wildcards"],
)
def test_every_second_layer_of_the_teacher(pairs):
    paired = capture_pairs(mlp, other_mlp, pairs, (SMALL, X), (BIG, X))
    _, theirs = jax.jit(paired.teacher)(BIG, X)
    assert len(theirs) == 3
    for i in range(3):
        close(theirs[f"blocks_{i}/attn"], layers(BIG, X)[2 * i + 1])


def test_further_values_of_a_name():
    def model(params, x):
        for i, w in enumerate(params):
            x = jc.name(jnp.tanh(jc.name(x @ w, f"blocks_{i}")), f"blocks_{i}")
        return x

    args = (SMALL, X), (SMALL, X)
    paired = capture_pairs(model, model, {"blocks_*": "blocks_*"}, *args)
    assert len(paired.names) == 6
    assert paired.names["blocks_1:1"] == ("blocks_1:1", "blocks_1:1")
    paired = capture_pairs(model, model, {"blocks_[0-9]": lambda i: f"blocks_{i}:1"}, *args)
    _, values = paired.teacher(SMALL, X)
    assert list(values) == ["blocks_0", "blocks_1", "blocks_2"]
    close(values["blocks_2"], layers(SMALL, X)[2])


def test_several_layers_may_have_one_teacher():
    pairs = {"blocks_*/attn": lambda i: f"layer_{int(i) // 2}/attention"}
    paired = capture_pairs(mlp, other_mlp, pairs, (SMALL, X), (BIG, X))
    _, theirs = paired.teacher(BIG, X)
    for i in range(3):
        close(theirs[f"blocks_{i}/attn"], layers(BIG, X)[i // 2])


def test_values_without_names_are_called_by_their_parameter():
    student = lambda p, x: jnp.tanh(x @ p["w1"]) @ p["w2"]  # noqa: E731
    params = {"w1": draw(8, 4), "w2": draw(4, 8)}
    paired = capture_pairs(student, mlp, {"w1": "blocks_0/attn"}, (params, X), (SMALL, X))
    close(paired.student(params, X)[1]["w1"], X @ params["w1"])
    assert paired.student_shapes["w1"].shape == (3, 4)
    assert paired.teacher_shapes["w1"].shape == (3, 8)


def test_layers_of_a_scan():
    small, big = {"w": jnp.stack(SMALL)}, {"w": jnp.stack(BIG)}

    def features(student, teacher, pairs, params, teacher_params):
        paired = capture_pairs(student, teacher, pairs, (params, X), (teacher_params, X))
        (_, ours), (_, theirs) = paired.student(params, X), paired.teacher(teacher_params, X)
        shapes = lambda tree: jax.tree.map(jnp.shape, tree)  # noqa: E731
        assert shapes(ours) == {k: s.shape for k, s in paired.student_shapes.items()}
        assert shapes(theirs) == {k: s.shape for k, s in paired.teacher_shapes.items()}
        return ours, theirs

    pairs = {"block": Layers("block", (1, 3, -1))}
    ours, theirs = features(scanned, scanned, pairs, small, big)
    close(ours["block"], np.stack(layers(SMALL, X)))
    close(theirs["block"], np.stack([layers(BIG, X)[i] for i in (1, 3, 5)]))

    pairs = {"blocks_*/attn": lambda i: Layers("block", 2 * int(i))}
    ours, theirs = features(mlp, scanned, pairs, SMALL, big)
    for i in range(3):
        close(ours[f"blocks_{i}/attn"], layers(SMALL, X)[i])
        close(theirs[f"blocks_{i}/attn"], layers(BIG, X)[2 * i])

    pairs = {Layers("block", i): f"layer_{i + 3}/attention" for i in range(3)}
    ours, theirs = features(scanned, other_mlp, pairs, small, BIG)
    assert list(ours) == ["block/0", "block/1", "block/2"]
    for i in range(3):
        close(ours[f"block/{i}"], layers(SMALL, X)[i])
        close(theirs[f"block/{i}"], layers(BIG, X)[i + 3])

    pairs = {Layers("block", (2, 0)): Layers("blo*", (0, 1))}
    with pytest.raises(ValueError, match="same texts"):
        features(scanned, scanned, pairs, small, big)
    ours, theirs = features(
        scanned, scanned, {Layers("block", (2, 0)): Layers("block", (0, 1))}, small, big
    )
    close(ours["block/2,0"], np.stack([layers(SMALL, X)[i] for i in (2, 0)]))


@pytest.mark.parametrize(
    "glob",
    [
        "a/*",
        "**/x",
        "a/**",
        "**",
        "a*/?",
        "a/[bc]",
        "a/[!bc]",
        "*/*/x",
        "a.b",
        "**/a/**",
        "[]x]",
        "(",
    ],
)
def test_globs_mean_what_they_mean_for_select(glob):
    names = ["a", "x", "a/b", "a/c", "a/x", "aa/x", "a/b/x", "a.b", "acb", "b/a", "]", "(", "a/"]

    def model(params, x):
        del params
        for name in names:
            x = jc.name(x + 1, name)
        return x

    paired = capture_pairs(model, model, {glob: glob}, ({}, X), ({}, X))
    chosen = jc.tree.select({name: np.zeros(1) for name in names}, glob)
    assert set(paired.names) == {name for name, hit in chosen.items() if hit}
    assert all(ours == theirs for ours, theirs in paired.names.values())


def test_jit_vmap_and_a_loop_agree():
    paired = capture_pairs(
        mlp, other_mlp, {"blocks_1/attn": "layer_4/attention"}, (SMALL, X), (BIG, X)
    )
    students = [jnp.stack([w, 2 * w]) for w in SMALL]
    run = counting_jit(jax.vmap(paired.student, in_axes=(0, None)))
    y, values = run(students, X)
    for i in range(2):
        want, value = paired.student([w[i] for w in students], X)
        close(y[i], want)
        close(values["blocks_1/attn"][i], value["blocks_1/attn"])
    # Another batch size than that of the examples.
    assert paired.student(SMALL, draw(5, 8))[1]["blocks_1/attn"].shape == (5, 8)
    run(students, X + 1)
    assert run.traces == 1


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_sharded_batches(kind):
    pairs = {"blocks_1/attn": "layer_4/attention"}
    paired = capture_pairs(mlp, other_mlp, pairs, (SMALL, X), (BIG, X))
    x = draw(8, 8)
    with jax.set_mesh(mesh_of(kind)):
        sharded = jax.device_put(x, jax.NamedSharding(jax.sharding.get_mesh(), P("d")))
        _, got = jax.jit(paired.teacher)(BIG, sharded)
    close(got["blocks_1/attn"], layers(BIG, x)[4])
    assert got["blocks_1/attn"].sharding.spec == P("d", *[None] * (kind == "explicit"))


def test_gradients_go_to_both():
    paired = capture_pairs(
        mlp, other_mlp, {"blocks_1/attn": "layer_4/attention"}, (SMALL, X), (BIG, X)
    )

    def loss(small, big):
        s, t = paired.student(small, X)[1], paired.teacher(big, X)[1]
        return jnp.sum(jnp.square(s["blocks_1/attn"] - t["blocks_1/attn"]))

    def want(small, big):
        s = jnp.tanh(jnp.tanh(X @ small[0]) @ small[1])
        return jnp.sum(jnp.square(s - mlp(big[:5], X)))

    got = jax.grad(loss, (0, 1))(SMALL, BIG)
    jax.tree.map(close, got, jax.grad(want, (0, 1))(SMALL, BIG))


def test_nothing_runs_and_only_what_is_asked_for_is_returned():
    struct = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)  # noqa: E731
    pairs = {"blocks_1/attn": "layer_4/attention"}
    paired = capture_pairs(mlp, other_mlp, pairs, struct((SMALL, X)), struct((BIG, X)))
    assert paired.student_shapes == {"blocks_1/attn": jax.ShapeDtypeStruct((3, 8), jnp.float32)}
    assert list(paired.student(SMALL, X)[1]) == ["blocks_1/attn"]
    count = lambda fn: str(jax.make_jaxpr(fn)(BIG, X)).count("= dot_general")  # noqa: E731
    assert count(paired.teacher) == count(other_mlp) == 6


def test_pairs_may_be_made_while_tracing():
    def values(params, x):
        pairs = {"blocks_1/attn": "layer_4/attention"}
        paired = capture_pairs(mlp, other_mlp, pairs, (params, x), (BIG, x))
        return paired.student(params, x)[1]

    close(jax.jit(values)(SMALL, X)["blocks_1/attn"], layers(SMALL, X)[1])


def test_arguments_that_are_no_arrays_keep_their_value():
    def model(params, x, scale, mode, *, shift=0.0):
        return jc.name(x @ params * scale if mode == "train" else x, "value") + shift

    args = (draw(8, 8), X, 2.0, "train")
    paired = capture_pairs(model, mlp, {"value": "blocks_0/attn"}, args, (SMALL, X))
    y, values = paired.student(*args, shift=1.0)
    close(values["value"], 2.0 * (X @ args[0]))
    close(y, values["value"] + 1)


def test_compressed_students():
    small = jc.pack(jc.low_rank(2), SMALL)
    pairs = {"blocks_*/attn": lambda i: f"layer_{i}/attention"}
    dense = capture_pairs(mlp, other_mlp, pairs, (SMALL, X), (BIG, X))
    lifted = capture_pairs(jc.lift(mlp), other_mlp, pairs, (small, X), (BIG, X))
    want = layers(jc.todense(small), X)
    for _, values in (jc.lift(dense.student)(small, X), jax.jit(lifted.student)(small, X)):
        for i in range(3):
            np.testing.assert_allclose(values[f"blocks_{i}/attn"], want[i], rtol=1e-4, atol=1e-5)


def test_linen_and_nnx():
    class Net(nn.Module):
        depth: int
        width: int

        @nn.compact
        def __call__(self, x):
            for i in range(self.depth):
                x = nn.tanh(nn.Dense(self.width, name=f"blocks_{i}")(x))
            return x

    class Small(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(8, 4, rngs=rngs)
            self.second = nnx.Linear(4, 4, rngs=rngs)

        def __call__(self, x):
            return self.second(jc.name(nnx.relu(self.first(x)), "hidden"))

    big = Net(2, 8)
    big_params = big.init(jax.random.key(0), X)
    module = Small(nnx.Rngs(0))
    apply, params = jc.functional(module)
    pairs = {"hidden": "Net/blocks_0", "second/kernel": "Net/blocks_1"}
    paired = capture_pairs(apply, big.apply, pairs, (params, X), (big_params, X))
    _, ours = jax.jit(paired.student)(params, X)
    _, theirs = jax.jit(paired.teacher)(big_params, X)
    close(ours["hidden"], nnx.relu(module.first(X)))
    close(ours["second/kernel"], nnx.relu(module.first(X)) @ module.second.kernel[...])
    _, state = big.apply(big_params, X, capture_intermediates=True)
    for name, i in {"hidden": 0, "second/kernel": 1}.items():
        close(theirs[name], state["intermediates"][f"blocks_{i}"]["__call__"][0])


def test_distill_takes_both_functions():
    pairs = {"blocks_*/attn": lambda i: f"layer_{2 * int(i) + 1}/attention"}
    paired = capture_pairs(mlp, other_mlp, pairs, (SMALL, X), (BIG, X))

    def loss(student, teacher, temperature):
        del temperature
        (_, s), (_, t) = student, teacher
        return sum(jnp.mean(jnp.square(s[pair] - t[pair]), -1) for pair in sorted(s))

    opt = jc.distill(
        lambda params, batch: paired.student(params, batch["x"]),
        lambda batch: paired.teacher(batch["teacher"], batch["x"]),
        loss=loss,
    )

    def want(params):
        targets = [jnp.asarray(t, jnp.float32) for t in layers(BIG, X)[1::2]]
        x, total = X, 0.0
        for w, t in zip(params, targets, strict=True):
            x = jnp.tanh(x @ w)
            total += jnp.mean(jnp.square(x - t))
        return total

    zeros = jax.tree.map(jnp.zeros_like, SMALL)
    batch = {"teacher": BIG, "x": X}
    step = jax.jit(lenient(optax.chain(opt, optax.sgd(1.0))).update)
    updates, _ = step(zeros, (opt.init(SMALL), optax.sgd(1.0).init(SMALL)), SMALL, batch=batch)
    jax.tree.map(lambda u, g: close(-u, g), updates, jax.grad(want)(SMALL))


def refused(error, match, pairs, student=mlp, teacher=other_mlp, args=(SMALL, X), other=(BIG, X)):
    with pytest.raises(error, match=match):
        capture_pairs(student, teacher, pairs, args, other)


def test_unequal_layers_are_an_error_that_lists_both_sides():
    match = r"(?s)capture_pairs: `pairs` must .*blocks_2/attn.*the teacher's .*layer_5/attention.*"
    refused(
        ValueError, match + r"at 'blocks_\*/attn'.*function", {"blocks_*/attn": "layer_*/attention"}
    )
    # As many, but with other texts: they are not zipped.
    refused(ValueError, match, {"blocks_*/attn": re.compile("layer_([345])/attention")})
    # Other numbers of wildcards.
    refused(ValueError, match, {"blocks_*/attn": "layer_*/a*n"})
    refused(ValueError, r"same texts", {"blocks_0/attn": "layer_[0]/attention"})


def test_patterns_that_match_nothing():
    refused(ValueError, r"(?s)of the student, got 'no\*'.*blocks_0/attn", {"no*": "layer_0"})
    match = r"(?s)of the teacher, got 'no\*'.*layer_0/attention"
    refused(ValueError, match, {"blocks_0/attn": "no*"})
    match = r"(?s)name a value of the teacher.*got str 'layer_9' at 'blocks_0/attn'.*layer_0/att"
    refused(ValueError, match, {"blocks_0/attn": lambda: "layer_9"})
    refused(ValueError, "name a value of the teacher", {"blocks_0/attn": lambda: None})


def test_bad_pairs():
    match = (
        r"one pair, got two, with 'layer_0/attention' and 'layer_1/attention' at 'blocks_0/attn'"
    )
    pairs = {"blocks_0/attn": "layer_0/attention", re.compile("blocks_0/attn"): "layer_1/attention"}
    refused(ValueError, match, pairs)
    match = r"tell the values apart.*'blocks_0/attn' and 'blocks_1/attn'"
    refused(ValueError, match, {re.compile("blocks_./attn"): "layer_0/attention"})
    refused(TypeError, "`pairs` must be a mapping", {})
    refused(TypeError, "`pairs` must be a mapping", "blocks_0")
    refused(TypeError, "hold globs.*got int 3", {3: "layer_0"})
    refused(TypeError, "or a function of the student.*got int 3", {"blocks_0/attn": 3})
    refused(TypeError, "`student` must be a function", {"a": "b"}, student=3)
    refused(TypeError, "`teacher` must be a function", {"a": "b"}, teacher=None)
    refused(TypeError, "`student_args` must be a tuple", {"a": "b"}, args=SMALL)
    refused(TypeError, "`teacher_args` must be a tuple", {"a": "b"}, other=X)
    # The leading axis of a value that no scan stacks is its batch.
    match = r"capture_pairs: `Layers` must be of a value that a scan stacks, .* at '{}'\. No scan"
    ours, theirs = "blocks_0/attn", "layer_1/attention"
    for index in (1, (0, 1), -9):
        refused(ValueError, match.format(ours), {Layers(ours, index): theirs})
        refused(ValueError, match.format(theirs), {ours: Layers(theirs, index)})
        refused(ValueError, match.format(theirs), {ours: lambda i=index: Layers(theirs, i)})
    big = ({"w": jnp.stack(BIG)}, X)
    for index, error, match in [
        (6, ValueError, "`index` must be among the 6 layers of 'block', got 6"),
        ((0, -7), ValueError, "among the 6 layers"),
        ((), ValueError, "at least one layer"),
        (True, TypeError, "static integer"),
        ((0, 1.0), TypeError, "static integer.*float"),
        ((0, np.bool_(True)), TypeError, "static integer"),
        (np.array([0, 1]), TypeError, "static integer"),
    ]:
        pairs = {"blocks_0/attn": Layers("block", index)}
        refused(error, match, pairs, teacher=scanned, other=big)


def test_a_layer_of_the_student_is_in_one_pair():
    small, big = {"w": jnp.stack(SMALL)}, {"w": jnp.stack(BIG)}
    whole, of = "block", lambda index: Layers("block", index)
    for first, second, layer in [
        (of(-1), of(2), 2),
        (whole, of(0), 0),
        (of(0), whole, 0),
        (of((0, 1)), of(1), 1),
        (of((0, 0)), of(1), 0),
        (of((1, -2)), of(0), 1),
    ]:
        match = rf"in one pair, got layer {layer} of it in .* and again in .* at 'block'"
        pairs = {first: "layer_0/attention", second: "layer_1/attention"}
        refused(ValueError, match, pairs, student=scanned, args=(small, X))
    # One of the teacher may be in several.
    pairs = {of((0, 2)): of((5, 5)), of(1): of(-1)}
    paired = capture_pairs(scanned, scanned, pairs, (small, X), (big, X))
    _, theirs = paired.teacher(big, X)
    close(theirs["block/0,2"], np.stack([layers(BIG, X)[5]] * 2))
    close(theirs["block/1"], layers(BIG, X)[5])


def test_layers_by_integers_of_numpy():
    small, big = {"w": jnp.stack(SMALL)}, {"w": jnp.stack(BIG)}
    pairs = {
        Layers("block", np.int64(1)): Layers("block", np.uint8(3)),
        Layers("block", tuple(np.array([0, 2]))): lambda: Layers("block", tuple(np.arange(2))),
    }
    paired = capture_pairs(scanned, scanned, pairs, (small, X), (big, X))
    assert list(paired.names) == ["block/1", "block/0,2"]
    (_, ours), (_, theirs) = paired.student(small, X), paired.teacher(big, X)
    close(ours["block/1"], layers(SMALL, X)[1])
    close(theirs["block/1"], layers(BIG, X)[3])
    close(ours["block/0,2"], np.stack([layers(SMALL, X)[i] for i in (0, 2)]))


def test_a_value_that_is_no_longer_there():
    def model(params, x):
        return jc.name(x @ params[0], "wide" if x.shape[0] > 1 else "narrow") + jc.name(x, "x")

    pairs = {"wide": "layer_0/attention", "x": "layer_1/attention"}
    paired = capture_pairs(model, other_mlp, pairs, (SMALL, X), (BIG, X))
    with pytest.raises(ValueError, match=r"had for the example arguments, got no \['wide'\]"):
        paired.student(SMALL, X[:1])
