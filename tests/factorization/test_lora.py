"""LoRA as latents: equal to hand-written adapters, and the base is frozen for real."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
from jaxcompress import arrays
from jaxcompress.factorization import lora
from tests.conftest import lenient
from tests.factorization.small_mlp import draw, mlp, params

KEY = jax.random.key(0)


X, TARGET = draw(32, 16), draw(32, 4, seed=1)


def loss(p):
    return jnp.mean(jnp.square(mlp(p, X) - TARGET))


def train(opt, p, steps=5, f=loss):
    state = opt.init(p)

    @jax.jit
    def step(p, state):
        updates, state = opt.update(jax.grad(f)(p), state, p)
        return optax.apply_updates(p, updates), state

    for _ in range(steps):
        p, state = step(p, state)
    return p, state


def adamw():
    return lenient(optax.adamw(0.05, weight_decay=0.1))


def by_hand(latent, scale):
    """The factors as the params of a model that has its own LoRA layers."""
    base = {"a": latent["a"]["w"].parts[0], "b": latent["a"]["b"], "c": latent["c"].parts[0]}

    def low(leaf):
        last = leaf.parts[1]
        return last.inner if isinstance(last, arrays.Rescaled) else last

    factors = {
        name: {"u": low(leaf).u, "v": low(leaf).v}
        for name, leaf in (("a", latent["a"]["w"]), ("c", latent["c"]))
    }

    def f(factors):
        def layer(name, x):
            thin = (x @ factors[name]["u"]) @ factors[name]["v"]
            return x @ base[name] + scale * thin

        return jnp.mean(jnp.square(layer("c", jnp.tanh(layer("a", X) + base["b"][None])) - TARGET))

    return f, factors


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({"key": KEY}, 1.0),
        ({"key": KEY, "alpha": 6.0}, 3.0),
        ({"key": KEY, "alpha": 6.0, "stabilized": True}, 6 / np.sqrt(2)),
        ({"init": "pissa"}, 1.0),
        ({"init": "pissa", "alpha": 6.0}, 3.0),
    ],
)
def test_equals_hand_written_layers(options, scale):
    p = params()
    r = lora(2, **options)
    f, factors = by_hand(r.init(p), scale)
    want, _ = train(adamw(), factors, f=f)
    got, state = train(jc.reparametrized(adamw(), r), p)
    latent = jc.latent(state)
    for name, leaf in (("a", latent["a"]["w"]), ("c", latent["c"])):
        low = leaf.parts[1] if "alpha" not in options else leaf.parts[1].inner
        np.testing.assert_allclose(low.u, want[name]["u"], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(low.v, want[name]["v"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(loss(got), f(want), rtol=1e-5)


def test_the_base_is_frozen_and_has_no_moments():
    p = params()
    # Without any gradient only the decay moves something: the factors.
    opt = jc.reparametrized(adamw(), lora(2, key=KEY))
    state = opt.init(p)
    moments = sum(x.size for x in jax.tree.leaves(state.inner[0].mu))
    assert moments == 2 * (16 + 8) + 2 * (8 + 4)
    start = state.latent
    for _ in range(3):
        updates, state = opt.update(jax.tree.map(jnp.zeros_like, p), state, p)
        p = optax.apply_updates(p, updates)
    for old, new in ((start["a"]["w"], state.latent["a"]["w"]), (start["c"], state.latent["c"])):
        np.testing.assert_array_equal(old.parts[0], new.parts[0])
        assert (np.abs(new.parts[1].u) < np.abs(old.parts[1].u)).all()
    jax.tree.map(np.testing.assert_array_equal, p, params())


@pytest.mark.parametrize("train_others", [False, True])
def test_other_leaves(train_others):
    p = params() | {"step": jnp.arange(3)}
    grads = jax.tree.map(jnp.ones_like, p)
    opt = jc.reparametrized(lenient(optax.sgd(0.1)), lora(2, key=KEY, train_others=train_others))
    updates, state = opt.update(grads, opt.init(p), p)
    assert (np.asarray(updates["a"]["b"]) != 0).all() == train_others
    np.testing.assert_allclose(state.latent["a"]["b"], p["a"]["b"] - 0.1 * train_others, rtol=1e-6)
    np.testing.assert_array_equal(updates["step"], 0)
    np.testing.assert_array_equal(state.latent["a"]["w"].parts[0], p["a"]["w"])


def test_latents_are_what_lift_runs_and_save_writes(tmp_path):
    p, state = train(jc.reparametrized(adamw(), lora(2, alpha=4.0, key=KEY)), params())
    latent = jc.latent(state, p)
    assert isinstance(latent["c"], arrays.Sum)
    np.testing.assert_allclose(jc.lift(mlp)(latent, X), mlp(p, X), rtol=1e-4, atol=1e-5)
    merged = jc.factorization.merge_adapters(latent)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), merged, p)
    jc.save(tmp_path / "m.safetensors", latent)
    jax.tree.map(np.testing.assert_array_equal, jc.load(tmp_path / "m.safetensors"), latent)
    # A base and its adapter are more than one array: packed leaves are never bigger.
    packed = jc.pack(state, p)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), packed, p)


def test_grid_of_ranks_and_alphas_equals_a_loop():
    def run(rank, alpha):
        opt = jc.reparametrized(adamw(), lora(rank, alpha=alpha, key=KEY, max_rank=3))
        p, state = params(), None
        state = opt.init(p)

        def step(carry, _):
            p, state = carry
            updates, state = opt.update(jax.grad(loss)(p), state, p)
            return (optax.apply_updates(p, updates), state), None

        (p, state), _ = jax.lax.scan(step, (p, state), length=4)
        return p, jc.latent(state)["c"].parts[1].inner

    ranks, alphas = jnp.array([1.0, 2.0, 3.0]), jnp.array([0.5, 4.0, 4.0])
    one = jax.jit(run)
    mapped, low = jax.jit(jax.vmap(run))(ranks, alphas)
    for i, (rank, alpha) in enumerate(zip(ranks, alphas, strict=True)):
        want, _ = one(rank, alpha)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a[i], b, atol=1e-5), mapped, want)  # noqa: B023
        # Columns beyond the rank start at zero and stay there.
        live = np.any(np.asarray(low.u[i]) != 0, axis=0)
        assert (live == (np.arange(3) < int(rank))).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("init", ["zero", "pissa"])
def test_half_precision_lands_on_the_latents(dtype, init):
    p = {"w": draw(16, 8, dtype=dtype), "b": draw(8, dtype=dtype)}
    opt = jc.reparametrized(lenient(optax.sgd(0.5)), lora(2, key=KEY, init=init))
    state = opt.init(p)
    updates, state = opt.update(jax.tree.map(jnp.ones_like, p), state, p)
    with jax.numpy_dtype_promotion("standard"):
        p = optax.apply_updates(p, updates)
    assert p["w"].dtype == dtype
    np.testing.assert_array_equal(np.asarray(p["w"]), np.asarray(state.latent["w"].todense()))


def test_in_parts_of_the_tree_and_in_accumulation():
    p = params()
    adapt = jc.reparametrized(lenient(optax.sgd(0.1)), lora(2, key=KEY))
    labels = {"a": {"w": "lora", "b": "full"}, "c": "lora"}
    opt = lenient(optax.partition({"lora": adapt, "full": optax.sgd(0.1)}, labels))
    grads = jax.grad(loss)(p)
    updates, state = opt.update(grads, opt.init(p), p)
    np.testing.assert_allclose(updates["a"]["b"], -0.1 * grads["a"]["b"], rtol=1e-6)
    assert isinstance(jc.latent(state)["c"], arrays.Sum)
    every_second = optax.MultiSteps(optax.sgd(0.1), 2)
    inner = lenient(optax.GradientTransformationExtraArgs(every_second.init, every_second.update))
    opt = jc.reparametrized(inner, lora(2, key=KEY, init="pissa"))
    updates, state = opt.update(grads, opt.init(p), p)
    assert not any(np.any(u) for u in jax.tree.leaves(updates))
    updates, _ = opt.update(grads, state, p)
    assert np.any(updates["c"])


def test_trained_decides_for_any_reparametrization():
    r = jc.Reparametrization(
        init=lambda p: {"scale": jnp.ones(2), "codes": jnp.round(p).astype(jnp.int8)},
        apply=lambda z: z["scale"] * z["codes"].astype(jnp.float32),
        trained=lambda z: {"scale": True, "codes": False},
    )
    p = jnp.array([1.2, -3.1])
    opt = jc.reparametrized(lenient(optax.adamw(0.1)), r)
    state = opt.init(p)
    assert len(jax.tree.leaves(state.inner[0].mu)) == 1
    updates, state = jax.jit(opt.update)(jnp.array([1.0, 1.0]), state, p)
    np.testing.assert_array_equal(state.latent["codes"], [1, -3])
    np.testing.assert_allclose(state.latent["scale"], [0.9, 1.1], atol=1e-3)
    np.testing.assert_allclose(p + updates, state.latent["scale"] * jnp.array([1.0, -3.0]))


def test_refuses():
    with pytest.raises(ValueError, match=r"lora: `key` must be given for init='zero'"):
        lora(2)
    with pytest.raises(ValueError, match=r"lora: `rank` must be .* at least 1"):
        lora(0, key=KEY)
    with pytest.raises(TypeError, match=r"lora: `rank` must be a real number"):
        lora(lambda step: 2, key=KEY)
    with pytest.raises(ValueError, match=r"lora: `where` must match"):
        lora(2, key=KEY, where="nothing").init(params())
    with pytest.raises(ValueError, match=r"lora: `params` must have leaves of two or more"):
        lora(2, key=KEY, where="a/b").init(params())
