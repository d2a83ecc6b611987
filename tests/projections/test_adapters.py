"""What the adapters promise: exact landing, time, accumulation, extra arguments, reading."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import jaxcompress as jc
from tests import contract
from tests.contract import _inner
from tests.test_contract import _apply, close, multi_steps, train


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_lands_exactly_on_zeros(dtype):
    params = contract.params(dtype)
    opt = optax.chain(optax.sgd(0.1), jc.project_params(jc.prune(0.5)))
    out, state = train(opt, params, dtype=dtype)
    for layer in ("a", "b"):
        w, keep = (
            np.asarray(out[layer]["kernel"]),
            np.asarray(jc.structure(state)[f"{layer}/kernel"].keep),
        )
        np.testing.assert_array_equal(w[~keep], 0)
        assert (w[keep] != 0).all()
        assert keep.sum() == keep.size // 2


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_lands_to_the_last_bit_in_narrow_types(dtype, bits):
    params = contract.params(dtype)
    p = jc.quantize(bits)
    out, state = train(jc.straight_through(optax.sgd(0.1), p), params, dtype=dtype)
    want = p.project(jc.latent(state), jc.structure(state))
    jax.tree.map(np.testing.assert_array_equal, out, want)


def test_float32_lands_within_one_rounding_and_pack_is_exact():
    params = contract.params()
    p = jc.quantize(4)
    out, state = train(jc.straight_through(optax.sgd(0.1), p), params)
    want = p.project(jc.latent(state), jc.structure(state))
    close(out, want, 1e-6)
    jax.tree.map(np.testing.assert_array_equal, jc.todense(jc.pack(state, out)), want)


def test_straight_through_is_the_textbook_recursion():
    """Written out in NumPy: the gradient at the projected weights moves the latent ones."""
    params, goal = contract.params(), contract.params(seed=9)
    rounding = jc.quantize(3, axis=None, ranges=jc.quantization.min_max)
    opt = jc.straight_through(optax.sgd(0.1), rounding)
    out, state = train(opt, params, steps=4)
    latent = np.asarray(params["b"]["kernel"], np.float64)
    w = latent
    for _ in range(4):
        latent = latent - 0.1 * (w - np.asarray(goal["b"]["kernel"], np.float64))
        step = np.abs(latent).max() / 3
        w = np.round(latent / step) * step
    np.testing.assert_allclose(jc.latent(state)["b"]["kernel"], latent, atol=1e-5)
    np.testing.assert_allclose(out["b"]["kernel"], w, atol=1e-5)


def counting(projection, calls):
    """The same projection; each find that really runs leaves a mark."""

    def find(params, **kwargs):
        jax.debug.callback(lambda: calls.append(1))
        return projection.find(params, **kwargs)

    return projection._replace(find=find, everywhere=None)


@pytest.mark.parametrize("mapped", [False, True])
def test_between_refreshes_nothing_is_found(mapped):
    calls = []
    p = jc.every(5, counting(jc.prune(0.5), calls), begin=5, end=10)
    opt = jc.projected(optax.sgd(0.1), p)

    def run(params):
        return train(opt, params, steps=20)[0]

    params = contract.params()
    if mapped:
        params = jax.tree.map(lambda x: jnp.stack([x, x]), params)
        run = jax.vmap(run)
    jax.block_until_ready(jax.jit(run)(params))
    jax.effects_barrier()
    # At init, and at steps 5 and 10: under vmap too the cond does not run both branches.
    assert len(calls) == 3


def test_batch_axes_keep_the_clock_unbatched():
    calls = []
    p = jc.every(4, counting(jc.prune(0.5), calls))
    opt = multi_steps(jc.straight_through(_inner(), p), 1)
    params = contract.params()
    grid = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params)
    axes = jc.batch_axes(jax.eval_shape(opt.init, params))
    state = jax.vmap(opt.init, out_axes=axes)(grid)
    step = jax.jit(jax.vmap(opt.update, in_axes=(0, axes, 0), out_axes=(0, axes)))
    calls.clear()
    for _ in range(8):
        _, state = step(grid, state, grid)
    jax.effects_barrier()
    assert len(calls) == 2


def test_starts_late_holds_and_freezes():
    p = jc.every(2, jc.prune(jc.schedules.linear(0.0, 0.8, 0, 8)), begin=4, end=6)
    opt = jc.projected(optax.sgd(0.3), p)
    params, goal = contract.params(), contract.params(seed=9)
    state, sparsity, masks = opt.init(params), [], []
    for _ in range(12):
        grads = jax.tree.map(lambda w, g: w - g, params, goal)
        updates, state = opt.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        sparsity.append(float((params["a"]["kernel"] == 0).mean()))
        masks.append(np.asarray(state.structure.inner["a/kernel"].keep))
    n = 128
    wanted = [0] * 4 + [round(0.4 * n) / n] * 2 + [round(0.6 * n) / n] * 6
    np.testing.assert_allclose(sparsity, wanted)
    assert (masks[4] == masks[5]).all()
    assert all((m == masks[6]).all() for m in masks[6:])


@pytest.mark.parametrize("adapter", [jc.projected, jc.straight_through])
def test_multi_steps_inside_projects_only_at_real_updates(adapter):
    opt = adapter(multi_steps(optax.sgd(0.1), 3), jc.prune(0.5))
    params, grads = contract.params(), contract.params(seed=5)
    state, start = opt.init(params), contract.params()
    for i in range(6):
        updates, state = jax.jit(opt.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
        if i < 2:
            jax.tree.map(np.testing.assert_array_equal, params, start)
        assert int(state.step) == (i + 1) // 3
    assert float((params["a"]["kernel"] == 0).mean()) == 0.5


def test_multi_steps_inside_reparametrized():
    opt = jc.reparametrized(multi_steps(optax.sgd(0.1), 2), jc.low_rank_factors(2))
    params, grads = contract.params(), contract.params(seed=5)
    state = opt.init(params)
    updates, state = opt.update(grads, state, params)
    assert all((np.asarray(u) == 0).all() for u in jax.tree.leaves(updates))
    updates, _ = opt.update(grads, state, params)
    out = optax.apply_updates(params, updates)
    assert np.linalg.matrix_rank(out["a"]["kernel"], tol=1e-4) == 2


def test_extra_arguments_reach_both_sides():
    seen = []
    inner = optax.GradientTransformationExtraArgs(
        lambda params: (), lambda u, s, p=None, *, value, **extra: (seen.append(value), (u, s))[1]
    )
    p = jc.Projection(
        find=lambda params, *, previous=None, grads=None, step=0: seen.append(grads) or (),
        project=lambda params, structure: params,
        pack=lambda params, structure: params,
    )
    params = {"w": jnp.ones(2)}
    for opt in (jc.projected(inner, p), jc.straight_through(inner, p)):
        state = opt.init(params)
        seen.clear()
        opt.update({"w": jnp.ones(2)}, state, params, value=3.0, grads="raw", mine=1)
        assert seen == [3.0, "raw"]
    link = jc.project_params(p)
    state = link.init(params)
    seen.clear()
    link.update({"w": jnp.ones(2)}, state, params, grads="raw")
    assert seen == ["raw"]


def test_projected_find_sees_the_raw_gradients():
    seen = []
    p = jc.prune(0.5)
    spy = p._replace(
        find=lambda params, *, grads=None, **kw: (seen.append(grads), p.find(params, **kw))[1]
    )
    opt = jc.projected(optax.sgd(123.0), spy)
    params, grads = contract.params(), contract.params(seed=5)
    opt.update(grads, opt.init(params), params)
    assert not any(np.asarray(g).any() for g in jax.tree.leaves(seen[0]))
    jax.tree.map(np.testing.assert_array_equal, seen[1], grads)


def test_latent_and_structure_are_read_from_any_nesting():
    params = contract.params()
    st = lambda: jc.straight_through(optax.adam(1e-2), jc.quantize(4))  # noqa: E731
    wrappers = [
        optax.chain(optax.clip(1.0), st()),
        optax.inject_hyperparams(lambda lr: jc.straight_through(optax.adam(lr), jc.quantize(4)))(
            1e-2
        ),
        optax.MultiSteps(st(), 2).gradient_transformation(),
        optax.masked(st(), jax.tree.map(lambda _: True, params)),
    ]
    for opt in wrappers:
        state = opt.init(params)
        jax.tree.map(np.testing.assert_array_equal, jc.latent(state), params)
        assert jc.structure(state)["a/kernel"].scale.shape == (1, 8)
    labels = {"a": {"bias": "x", "kernel": "x"}, "b": {"kernel": "y"}}
    opt = optax.partition({"x": st(), "y": st()}, labels)
    jax.tree.map(np.testing.assert_array_equal, jc.latent(opt.init(params)), params)
    opt = optax.masked(st(), {"a": {"bias": False, "kernel": True}, "b": {"kernel": False}})
    state = opt.init(params)
    assert isinstance(jc.latent(state)["b"]["kernel"], optax.MaskedNode)
    jax.tree.map(np.testing.assert_array_equal, jc.latent(state, params), params)
    packed = jc.pack(state, params)
    assert jc.arrays.is_compressed(packed["a"]["kernel"])
    assert not jc.arrays.is_compressed(packed["b"]["kernel"])


def test_user_data_is_not_changed_and_unchosen_leaves_get_the_plain_update():
    params, grads = contract.params(), contract.params(seed=5)
    before = jax.tree.map(np.array, (params, grads))
    opt = jc.projected(optax.sgd(0.1), jc.prune(0.5))
    updates, _ = opt.update(grads, opt.init(params), params)
    np.testing.assert_array_equal(updates["a"]["bias"], -0.1 * grads["a"]["bias"])
    jax.tree.map(np.testing.assert_array_equal, (params, grads), before)


def test_scheduled_numbers_are_visible_and_may_be_replaced():
    p = jc.scheduled(jc.quantize)(bits=8)
    opt = jc.straight_through(optax.sgd(0.0), p)
    params = contract.params()
    state = opt.init(params)
    assert int(jc.structure(state).hyperparams["bits"]) == 8
    changed = state.structure._replace(hyperparams={"bits": jnp.asarray(1)})
    updates, _ = opt.update(params, state._replace(structure=changed), params)
    out = optax.apply_updates(params, updates)
    assert len(np.unique(np.abs(np.asarray(out["b"]["kernel"])[:, 0]).round(5))) == 1


def test_relaxed_goes_from_identity_to_hard():
    params, hard = contract.params(), jc.quantize(2)
    for strength, mix in ((0.0, 0.0), (0.25, 0.25), (1.0, 1.0)):
        got = jc.compress(jc.relaxed(hard, strength), params)
        q = jc.compress(hard, params)
        want = jax.tree.map(lambda w, x: w + mix * (x - w), params, q)  # noqa: B023
        close(got, want, 0 if strength in (0.0, 1.0) and mix == strength and mix == 0 else 1e-6)
    jax.tree.map(
        np.testing.assert_array_equal,
        jc.compress(jc.relaxed(hard, 1.0), params),
        jc.compress(hard, params),
    )


@pytest.mark.parametrize(
    "order",
    [("prune", "quantize"), ("quantize", "prune"), ("prune", "cluster"), ("prune", "binary")],
)
def test_chains_pack_as_sparse_codes(order):
    # Leaves large enough that every packed form is smaller than the dense one.
    w = jnp.asarray(np.random.default_rng(0).normal(size=(64, 32)), jnp.float32)
    members = {
        "prune": jc.prune(0.75),
        "quantize": jc.quantize(4),
        "cluster": jc.cluster(16),
        "binary": jc.quantize(1),
    }
    p = jc.chain(*(members[name] for name in order))
    packed = jc.pack(p, {"w": w})["w"]
    np.testing.assert_array_equal(packed.todense(), jc.compress(p, {"w": w})["w"])
    assert isinstance(packed.codes, jc.arrays.BitMasked)
    kept = int((packed.todense() != 0).sum())
    width = 1 if "binary" in order else 4
    books = 16 * 4 if "cluster" in order else 32 * 4
    assert packed.nbytes == 64 * 32 // 8 + width * -(-kept // 8) + books


def test_n_of_m_of_quantized_packs_as_both():
    w = jnp.asarray(np.random.default_rng(0).normal(size=(64, 32)), jnp.float32)
    p = jc.chain(jc.prune(nm=(2, 4)), jc.quantize(8))
    packed = jc.pack(p, {"w": w})["w"]
    assert isinstance(packed.codes, jc.arrays.NM)
    np.testing.assert_array_equal(packed.todense(), jc.compress(p, {"w": w})["w"])
    assert packed.nbytes == 64 * 32 // 2 + 64 * 32 // 2 * 2 // 8 + 32 * 4


def test_factors_are_quantized_by_packing_twice():
    w = jnp.asarray(np.random.default_rng(0).normal(size=(64, 32)), jnp.float32)
    once = jc.pack(jc.low_rank(4), {"w": w})
    twice = jc.pack(jc.quantize(8), once)
    assert isinstance(twice["w"].u, jc.arrays.Quantized)
    assert twice["w"].nbytes < once["w"].nbytes / 2
    error = jnp.linalg.norm(twice["w"].todense() - once["w"].todense())
    assert error < 0.02 * jnp.linalg.norm(once["w"].todense())


@pytest.mark.parametrize(
    "make",
    [
        lambda: jc.straight_through(optax.sgd(0.1), jc.prune(0.5)),
        lambda: jc.projected(optax.sgd(0.1), jc.every(2, jc.prune(0.5))),
        lambda: jc.pruning.top_kast(optax.sgd(0.1), 0.5, 0.25),
        lambda: jc.pruning.hard_concrete(optax.sgd(0.1), 1e-3, key=jax.random.key(0)),
        lambda: jc.reparametrized(optax.sgd(0.1), jc.pruning.powerpropagation(2.0)),
        lambda: jc.reparametrized(optax.sgd(0.1), jc.low_rank_factors(rank=2)),
    ],
    ids=["straight_through", "projected", "top_kast", "hard_concrete", "power", "low_rank"],
)
def test_params_and_state_may_be_donated(make):
    opt, params = make(), contract.params()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        updates, state = opt.update(contract.params(seed=3), state, params)
        return optax.apply_updates(params, updates), state

    params, state = step(params, opt.init(params))
    step(params, state)


def test_own_projection_packs_through_itself_only():
    p = jc.Projection(
        find=lambda params, *, previous=None, grads=None, step=0: jax.tree.map(jnp.abs, params),
        project=lambda params, structure: jax.tree.map(jnp.minimum, params, structure),
        pack=lambda params, structure: "packed",
    )
    opt = jc.projected(optax.sgd(0.1), p)
    params = contract.params()
    state = opt.init(params)
    assert jc.pack(p, params) == "packed"
    with pytest.raises(ValueError, match=r"your_projection\.pack"):
        jc.pack(state, params)


BAD = {
    "not a projection": (lambda: jc.chain(jc.prune(0.5), 3), TypeError, "chain: `projection` must"),
    "swapped": (
        lambda: jc.projected(jc.prune(0.5), optax.adam(1)),
        TypeError,
        "projected: `projection`",
    ),
    "no optimizer": (
        lambda: jc.straight_through(3, jc.prune(0.5)),
        TypeError,
        "`optimizer` must be",
    ),
    "no params": (
        lambda: jc.project_params(jc.prune(0.5)).update(
            {}, jc.project_params(jc.prune(0.5)).init({})
        ),
        ValueError,
        "`params` must be given",
    ),
    "label": (
        lambda: jc.compress(
            jc.partition({"x": jc.prune(0.5)}, lambda path, w: "y"), contract.params()
        ),
        ValueError,
        "one of \\['x'\\]",
    ),
    "no latent": (
        lambda: jc.latent(optax.adam(1).init(jnp.ones(2))),
        ValueError,
        "straight_through",
    ),
    "no structure": (lambda: jc.structure(()), ValueError, "project_params"),
    "pack of a plain state": (
        lambda: jc.pack(optax.adam(1).init(1.0), 1.0),
        ValueError,
        "Projection",
    ),
    "pack under jit": (
        lambda: jax.jit(lambda p: jc.pack(jc.prune(0.5), p))(contract.params()),
        TypeError,
        "outside of jit",
    ),
    "schedule of a static": (
        lambda: jc.scheduled(jc.quantize)(8, group_size=lambda s: 4),
        TypeError,
        "static integer",
    ),
    "every": (lambda: jc.every(0, jc.prune(0.5)), ValueError, "real number of at least 1"),
    "strength": (lambda: jc.relaxed(jc.prune(0.5), 1.5), ValueError, "\\[0, 1\\]"),
    "wrong shapes": (
        lambda: jc.reparametrized(
            optax.sgd(1.0), jc.Reparametrization(lambda p: p, lambda z: z["a"])
        ).init(contract.params()),
        ValueError,
        "return the params",
    ),
    "integer leaf": (
        lambda: jc.compress(jc.masked(jc.prune(0.5), "n"), {"n": jnp.arange(4)}),
        TypeError,
        "at 'n'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, kind, text = BAD[name]
    with pytest.raises(kind, match=text):
        call()


def test_ml_dtypes_reference():
    """Landing is judged in the narrow type itself: NumPy's bfloat16 agrees with the sum."""
    params = contract.params(jnp.bfloat16)
    opt = optax.chain(optax.sgd(0.1), jc.project_params(jc.prune(0.5)))
    updates, _ = opt.update(params, opt.init(params), params)
    w, u = np.asarray(params["a"]["kernel"]), np.asarray(updates["a"]["kernel"])
    assert u.dtype == np.float32
    by_hand = (w.astype(np.float32) + u).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(by_hand, np.asarray(_apply(params, updates)["a"]["kernel"]))
