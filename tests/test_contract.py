"""Every property of the contract, run over every row of the table."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from tests import contract
from tests.conftest import counting_jit, lenient, mesh_of
from tests.contract import PROJECTIONS, TRANSFORMATIONS

projections = pytest.mark.parametrize("row", PROJECTIONS.values(), ids=PROJECTIONS.keys())
transformations = pytest.mark.parametrize(
    "row", TRANSFORMATIONS.values(), ids=TRANSFORMATIONS.keys()
)
dtypes = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])


def close(a, b, tolerance):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        scale = max(np.abs(y).max(initial=0.0), 1e-30)
        np.testing.assert_allclose(x / scale, y / scale, rtol=0, atol=tolerance)


def types(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, getattr(x, "weak_type", False)), tree)


def grids(row):
    return {name: jnp.asarray(values) for name, values in row.knobs.items()}


def settings(row):
    """All combinations of the row's knobs, as one array per knob."""
    names = list(row.knobs)
    mesh = jnp.meshgrid(*[jnp.asarray(v) for v in row.knobs.values()], indexing="ij")
    return {name: m.reshape(m.size) for name, m in zip(names, mesh, strict=True)}


def test_every_public_name_is_in_a_table():
    public = {
        name
        for name, value in vars(jc).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    covered = {n for row in (*PROJECTIONS.values(), *TRANSFORMATIONS.values()) for n in row.covers}
    elsewhere = set().union(*contract.ELSEWHERE.values())
    rooms = {"rigl", "sparse_evolution", "top_kast", "from_masks", "as_is"}  # as jc.pruning.…
    rooms |= {"powerpropagation", "hard_concrete"}
    rooms |= {"prune_groups", "proximal_groups", "growing_regularization"}
    rooms |= {"floats", "fp8", "mx", "nvfp4", "nf4"}
    rooms |= {"hqq", "galore", "convolution", "dynamical_low_rank", "lora", "low_rank_plus"}
    rooms |= {"smoothed", "rescaled", "awq", "rotated"}
    rooms |= {"stochastic", "parq", "learned_steps", "learned_codebook", "round_gradients"}
    rooms |= {"combine_gradients", "ema_teacher"}
    assert public == (covered - rooms) | elsewhere
    makers = (jc.Projection, optax.GradientTransformationExtraArgs, jc.Reparametrization)
    for room in (
        jc,
        jc.projections,
        jc.pruning,
        jc.quantization,
        jc.factorization,
        jc.distillation,
    ):
        for name, value in vars(room).items():
            if name.startswith("_") or not inspect.isfunction(value) or name == "of_leaves":
                continue
            if inspect.signature(value).return_annotation in makers:
                assert name in covered, f"{room.__name__}.{name} has no row in tests/contract.py"


class TestProjections:
    @projections
    def test_jit_equals_eager_and_compiles_once(self, row):
        params = contract.params()
        knobs = {k: v[-1] for k, v in settings(row).items()}
        fresh = lambda params, knobs: jc.compress(row.make(**knobs), params)  # noqa: E731
        compiled = counting_jit(fresh)
        close(compiled(params, knobs), fresh(params, knobs), row.tolerance)
        compiled(contract.params(seed=1), {k: v[0] for k, v in settings(row).items()})
        assert compiled.traces == 1

    @projections
    def test_vmap_over_knobs_equals_a_loop(self, row):
        if not row.knobs:
            pytest.skip("no traced knob")
        params, grid = contract.params(), settings(row)
        one = jax.jit(lambda knobs: jc.compress(row.make(**knobs), params))
        mapped = jax.jit(jax.vmap(one))(grid)
        for i in range(len(next(iter(grid.values())))):
            got = jax.tree.map(lambda x: x[i], mapped)  # noqa: B023
            close(got, one({k: v[i] for k, v in grid.items()}), row.tolerance)

    @projections
    def test_vmap_over_params_equals_a_loop(self, row):
        many = [contract.params(seed=s) for s in range(3)]
        one = jax.jit(lambda params: jc.compress(row.make(), params))
        mapped = jax.vmap(one)(jax.tree.map(lambda *x: jnp.stack(x), *many))
        for i, params in enumerate(many):
            close(jax.tree.map(lambda x: x[i], mapped), one(params), row.tolerance)  # noqa: B023

    @projections
    @dtypes
    def test_shape_and_dtype_are_kept(self, row, dtype):
        params = contract.params(dtype)
        before = jax.tree.map(np.array, params)
        assert types(jc.compress(row.make(), params)) == types(params)
        close(params, before, 0)

    @projections
    def test_abstract_params(self, row):
        p, params = row.make(), contract.params()
        abstract = jax.eval_shape(lambda: params)
        found = jax.eval_shape(p.find, abstract)
        assert types(found) == types(p.find(params))

    @projections
    @dtypes
    def test_projecting_twice_is_projecting_once(self, row, dtype):
        if not row.idempotent:
            pytest.skip("documented: not idempotent")
        p, params = row.make(), contract.params(dtype)
        held = p.find(params)
        once = p.project(params, held)
        tolerance = row.tolerance if dtype == jnp.float32 else 16 * row.tolerance**0.5
        close(p.project(once, held), once, min(tolerance, 0.02))

    @projections
    def test_gradient_is_finite(self, row):
        p, params = row.make(), contract.params()
        held = p.find(params)
        loss = lambda w: sum(jnp.sum(x**2) for x in jax.tree.leaves(p.project(w, held)))  # noqa: E731
        grads = jax.grad(loss)(params)
        assert types(grads) == types(params)
        assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))

    @projections
    def test_structure_goes_through_scan(self, row):
        p, params = row.make(), contract.params()

        def step(held, i):
            return p.find(params, previous=held, step=i), None

        first = p.find(params)
        last, _ = jax.lax.scan(step, first, jnp.arange(3, dtype=jnp.int32))
        assert types(last) == types(first)

    @projections
    @pytest.mark.parametrize("kind", ["auto", "explicit"])
    def test_sharded_equals_one_device(self, row, kind):
        params = contract.params()
        want = jax.jit(lambda params: jc.compress(row.make(), params))(params)
        mesh = mesh_of(kind)
        with jax.set_mesh(mesh):
            specs = {"a": {"bias": P("d"), "kernel": P("d", None)}, "b": {"kernel": P(None, "d")}}
            shardings = jax.tree.map(lambda s: NamedSharding(mesh, s), specs)
            sharded = jax.device_put(params, shardings)
            got = jax.jit(lambda params: jc.compress(row.make(), params), out_shardings=shardings)(
                sharded
            )
            if kind == "explicit":
                out = jax.eval_shape(lambda params: jc.compress(row.make(), params), sharded)
                specs_out = jax.tree.map(lambda x: x.sharding.spec, out)
                assert specs_out == jax.tree.map(lambda x: jax.typeof(x).sharding.spec, sharded)
        close(jax.device_get(got), want, max(row.tolerance, 1e-6))

    @projections
    def test_empty_none_zero_and_equal_leaves(self, row):
        params = contract.params()
        params["a"]["none"] = None
        params["b"]["empty"] = jnp.zeros((0, 4))
        params["b"]["zero"] = jnp.zeros((4, 4))
        params["b"]["equal"] = jnp.full((4, 4), 0.5, jnp.float32)
        out = jax.jit(lambda params: jc.compress(row.make(), params))(params)
        assert types(out) == types(params)
        np.testing.assert_array_equal(out["b"]["zero"], 0)
        assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(out))

    @projections
    def test_packed_equals_projected_and_is_not_bigger(self, row):
        p, params = row.make(), contract.params()
        if p.find(params).__class__.__name__ == "Relaxed" and not row.idempotent:
            with pytest.raises(ValueError, match="strength"):
                jc.pack(p, params)
            return
        packed = jc.pack(p, params)
        close(jc.todense(packed), jc.compress(p, params), min(row.tolerance, 1e-5))
        assert jc.tree.nbytes(packed) <= jc.tree.nbytes(params)

    @projections
    @pytest.mark.parametrize("platform", ["tpu", "cuda"])
    def test_lowers_for(self, row, platform):
        abstract = jax.eval_shape(contract.params)
        fn = jax.jit(lambda params: jc.compress(row.make(), params))
        assert jax.export.export(fn, platforms=[platform])(abstract).platforms == (platform,)


def train(optimizer, params, steps=5, dtype=jnp.float32):
    """A few steps of an ordinary loop on a quadratic, as one scan."""
    x = contract.batch()
    goal = contract.params(dtype, seed=9)

    def step(carry, _):
        params, state = carry
        grads = jax.tree.map(lambda w, g: w - g, params, goal)
        updates, state = optimizer.update(grads, state, params, batch=x)
        return (_apply(params, updates), state), None

    state = optimizer.init(params)
    (params, state), _ = jax.lax.scan(step, (params, state), length=steps)
    return params, state


def _apply(params, updates):
    # optax.apply_updates adds a float32 update to a bfloat16 parameter: not strict.
    with jax.numpy_dtype_promotion("standard"):
        return optax.apply_updates(params, updates)


def extra(transformation):
    return optax.with_extra_args_support(transformation)


def multi_steps(optimizer, every):
    accumulated = optax.MultiSteps(optimizer, every)
    return lenient(optax.GradientTransformationExtraArgs(accumulated.init, accumulated.update))


@functools.cache
def trained_alone(make):
    return train(extra(make()), contract.params())[0]


class TestTransformations:
    @transformations
    def test_jit_equals_eager_and_compiles_once(self, row):
        opt, params = extra(row.make()), contract.params()
        state = opt.init(params)
        update = counting_jit(lambda g, s, p: opt.update(g, s, p, batch=contract.batch()))
        updates, after = update(params, state, params)
        eager, _ = opt.update(params, state, params, batch=contract.batch())
        close(updates, eager, row.tolerance)
        update(params, after, params)
        assert update.traces == 1
        assert types(after) == types(state)

    @transformations
    def test_vmap_over_knobs_equals_a_loop(self, row):
        params, grid = contract.params(), settings(row)
        one = jax.jit(lambda knobs: train(extra(row.make(**knobs)), params)[0])
        mapped = jax.jit(jax.vmap(one))(grid)
        for i in range(len(next(iter(grid.values())))):
            got = jax.tree.map(lambda x: x[i], mapped)  # noqa: B023
            close(got, one({k: v[i] for k, v in grid.items()}), row.tolerance)

    @transformations
    @dtypes
    def test_dtypes_are_kept(self, row, dtype):
        params = contract.params(dtype)
        out, state = train(extra(row.make()), params, dtype=dtype)
        assert types(out) == types(params)
        assert types(state) == types(extra(row.make()).init(params))
        assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(out))

    @transformations
    @pytest.mark.parametrize("wrap", ["chain of masked", "inject_hyperparams", "multi_steps"])
    def test_inside_optax_wrappers(self, row, wrap):
        params = contract.params()
        plain = trained_alone(row.make)
        if wrap == "chain of masked":
            whole = optax.masked(row.make(), jax.tree.map(lambda _: True, params))
            opt = optax.chain(optax.identity(), whole, optax.identity())
        elif wrap == "inject_hyperparams":
            knobs = {k: v[-1] for k, v in row.knobs.items()}
            opt = lenient(optax.inject_hyperparams(row.make)(**knobs))
            plain = train(extra(row.make(**knobs)), params)[0]
        else:
            opt = multi_steps(row.make(), 1)
        close(train(extra(opt), params)[0], plain, max(row.tolerance, 1e-6))

    @transformations
    def test_multi_steps_outside_moves_nothing_until_an_update(self, row):
        params = contract.params()
        opt = multi_steps(row.make(), 3)
        close(train(opt, params, steps=2)[0], params, 0)
        moved, _ = train(opt, params, steps=3)
        assert any(
            bool((a != b).any())
            for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(params), strict=True)
        )

    @transformations
    @pytest.mark.parametrize("kind", ["auto", "explicit"])
    def test_sharded_equals_one_device(self, row, kind):
        if kind == "explicit" and "distill" in row.covers:
            pytest.skip("the model of this row is not written for explicit axes")
        params = contract.params()
        want = jax.jit(lambda p: train(extra(row.make()), p)[0])(params)
        mesh = mesh_of(kind)
        with jax.set_mesh(mesh):
            specs = {"a": {"bias": P("d"), "kernel": P("d", None)}, "b": {"kernel": P(None, "d")}}
            shardings = jax.tree.map(lambda s: NamedSharding(mesh, s), specs)
            sharded = jax.device_put(params, shardings)
            goal = jax.device_put(contract.params(seed=9), shardings)
            opt = extra(row.make())
            state = jax.jit(opt.init)(sharded)

            @jax.jit
            def step(params, state):
                grads = jax.tree.map(lambda w, g: w - g, params, goal)
                updates, state = opt.update(grads, state, params, batch=contract.batch())
                return _apply(params, updates), state

            for _ in range(5):
                sharded, state = step(sharded, state)
        got = jax.device_get(sharded)
        close(got, want, max(10 * row.tolerance, 1e-5))

    @transformations
    def test_checkpoint_and_restore_mid_schedule(self, row, tmp_path):
        import orbax.checkpoint as ocp

        params, opt = contract.params(), extra(row.make())
        params, state = train(opt, params, steps=3)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "state", {"params": params, "state": state})
            checkpointer.wait_until_finished()
            target = jax.eval_shape(lambda: {"params": params, "state": state})
            restored = checkpointer.restore(tmp_path / "state", target)
        assert jax.tree.structure(restored["state"]) == jax.tree.structure(state)
        go_on = jax.jit(lambda p, s: opt.update(p, s, p, batch=contract.batch()))
        close(go_on(restored["params"], restored["state"]), go_on(params, state), 0)

    @transformations
    @pytest.mark.parametrize("platform", ["tpu", "cuda"])
    def test_lowers_for(self, row, platform):
        abstract = jax.eval_shape(contract.params)
        fn = jax.jit(lambda params: train(extra(row.make()), params, steps=2)[0])
        assert jax.export.export(fn, platforms=[platform])(abstract).platforms == (platform,)

    @transformations
    def test_gradient_through_training_is_finite(self, row):
        loss = lambda p: sum(  # noqa: E731
            jnp.sum(x**2) for x in jax.tree.leaves(train(extra(row.make()), p, steps=2)[0])
        )
        grads = jax.grad(loss)(contract.params())
        assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))


@functools.cache
def _same_model():
    """One MLP as NNX state, Linen variables, FrozenDict and Equinox module."""
    import equinox as eqx
    import flax
    import flax.linen as nn
    from flax import nnx

    nnx_model = nnx.Linear(16, 8, rngs=nnx.Rngs(0))
    linen = nn.Dense(8).init(jax.random.key(0), jnp.ones((1, 16)))
    module = eqx.filter(eqx.nn.MLP(16, 8, 8, 1, key=jax.random.key(0)), eqx.is_array)
    return {
        "nnx": nnx.state(nnx_model, nnx.Param),
        "linen": linen,
        "frozen": flax.core.freeze(linen),
        "equinox": module,
        "list": [jnp.ones((4, 4)), None, (jnp.arange(8.0).reshape(2, 4),)],
    }


@pytest.mark.parametrize("kind", ["nnx", "linen", "frozen", "equinox", "list"])
@pytest.mark.parametrize("name", ["projected", "straight_through_chain", "reparametrized"])
def test_containers(kind, name):
    params = _same_model()[kind]
    opt = extra(TRANSFORMATIONS[name].make())
    state = opt.init(params)
    updates, after = jax.jit(opt.update)(params, state, params)
    out = optax.apply_updates(params, updates)
    assert types(after) == types(state)
    assert jax.tree.structure(out) == jax.tree.structure(params)
    packed = jc.pack(after, out)
    close(jc.todense(packed), out, 1e-6)
