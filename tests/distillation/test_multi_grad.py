"""`value_and_multi_grad` against one `jax.grad` for each loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxcompress.distillation import value_and_multi_grad
from tests.conftest import mesh_of

orders = pytest.mark.parametrize("sequential", [False, True])


def params():
    rng = np.random.default_rng(0)
    return {"b": jnp.float32(rng.normal(size=(1, 4))), "w": jnp.float32(rng.normal(size=(8, 4)))}


def batch():
    return jnp.float32(np.random.default_rng(1).normal(size=(5, 8)))


def losses(params, x):
    y = jnp.tanh(x @ params["w"] + params["b"])
    return {"task": jnp.mean(y**2), "pair": (jnp.sum(y), jnp.mean(jnp.exp(y) * params["b"]))}


def close(got, expected, rtol=1e-6):
    def leaf(a, b):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max(initial=0.0))

    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(leaf, got, expected)


@orders
@pytest.mark.parametrize("jit", [False, True])
def test_is_one_grad_for_each_loss(sequential, jit):
    fun = value_and_multi_grad(losses, sequential=sequential)
    values, grads = (jax.jit(fun) if jit else fun)(params(), batch())
    close(values, losses(params(), batch()))
    pick = {
        "task": lambda out: out["task"],
        "pair": (lambda out: out["pair"][0], lambda out: out["pair"][1]),
    }
    of = lambda choose: jax.grad(lambda p: choose(losses(p, batch())))(params())  # noqa: E731
    close(grads, jax.tree.map(of, pick))


@orders
def test_the_function_runs_once(sequential):
    runs, traces = [], []

    def counted(params, x):
        traces.append(1)
        jax.debug.callback(lambda: runs.append(1))
        return losses(params, x)

    value_and_multi_grad(counted, sequential=sequential)(params(), batch())
    jax.effects_barrier()
    assert len(traces) == 1
    assert len(runs) == 1
    # Compiled, there is one forward pass too: one tanh for three gradients.
    fun = jax.jit(value_and_multi_grad(losses, sequential=sequential))
    assert fun.lower(params(), batch()).as_text().count("tanh") == 1


@orders
def test_a_vector_of_losses(sequential):
    def rows(params, x):
        y = x @ params["w"] + params["b"]
        return {"rows": jnp.sum(y**2, 1), "mean": jnp.mean(y)}

    values, grads = value_and_multi_grad(rows, sequential=sequential)(params(), batch())
    close(values, rows(params(), batch()))
    close(grads["rows"], jax.jacrev(lambda p: rows(p, batch())["rows"])(params()))
    close(grads["mean"], jax.grad(lambda p: rows(p, batch())["mean"])(params()))


@orders
def test_has_aux_and_keywords(sequential):
    def with_aux(params, x, *, power):
        y = x @ params["w"] + params["b"]
        return [jnp.mean(y**power), jnp.mean(y)], {"logits": y, "ids": jnp.arange(3), "none": None}

    fun = value_and_multi_grad(with_aux, has_aux=True, sequential=sequential)
    (values, aux), grads = jax.jit(fun, static_argnames="power")(params(), batch(), power=2)
    expected, wanted = with_aux(params(), batch(), power=2)
    close(values, expected)
    close(aux, wanted)
    for i, grad in enumerate(grads):
        one = lambda p: with_aux(p, batch(), power=2)[0][i]  # noqa: B023, E731
        close(grad, jax.grad(one)(params()))


@pytest.mark.parametrize("argnums", [0, 1, -1, (0, 1), (1, 0), (-1,), [0, 1]])
def test_argnums_are_those_of_grad(argnums):
    both = lambda p, x: (losses(p, x)["task"], losses(p, x)["pair"][1])  # noqa: E731
    _, grads = value_and_multi_grad(both, argnums)(params(), batch())
    for i in range(2):
        one = jax.grad(lambda p, x: both(p, x)[i], argnums)(params(), batch())  # noqa: B023
        close(grads[i], tuple(one) if isinstance(argnums, list) else one)


@orders
def test_custom_gradients_scans_and_checkpoints(sequential):
    @jax.custom_vjp
    def rounded(x):
        return jnp.round(x)

    rounded.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (2 * g,))

    @jax.checkpoint
    def layer(x, w):
        return jnp.tanh(rounded(4 * x) @ w), None

    def deep(ws, x):
        y, _ = jax.lax.scan(layer, x, ws)
        return jnp.stack([jnp.mean(y), jnp.mean(y**2)])

    ws = jnp.float32(np.random.default_rng(2).normal(size=(3, 8, 8)))
    _, grads = jax.jit(value_and_multi_grad(deep, sequential=sequential))(ws, batch())
    close(grads, jax.jit(jax.jacrev(deep))(ws, batch()), rtol=1e-5)


@orders
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_dtypes_are_those_of_grad(sequential, dtype):
    narrow = jax.tree.map(lambda p: p.astype(dtype), params())

    def mixed(params, x):
        y = x @ params["w"] + params["b"]
        return {"narrow": jnp.mean(y), "wide": jnp.mean(jnp.float32(y) ** 2)}

    x = batch().astype(dtype)
    values, grads = value_and_multi_grad(mixed, sequential=sequential)(narrow, x)
    assert values["narrow"].dtype == dtype
    assert values["wide"].dtype == jnp.float32
    for name in values:
        expected = jax.grad(lambda p: mixed(p, x)[name])(narrow)  # noqa: B023
        close(jax.tree.map(jnp.float32, grads[name]), jax.tree.map(jnp.float32, expected), 1e-2)
        assert all(g.dtype == dtype for g in jax.tree.leaves(grads[name]))


def test_vmap_and_grad_of_it():
    scales = jnp.array([0.5, 2.0])

    def scaled(scale):
        both = lambda p: (scale * losses(p, batch())["task"], scale**2)  # noqa: E731
        return value_and_multi_grad(both)(params())[1]

    together = jax.vmap(scaled)(scales)
    for i, scale in enumerate(scales):
        close(jax.tree.map(lambda g: g[i], together), scaled(scale))  # noqa: B023
    # Differentiated again: the product of a Hessian with ones.
    total = lambda p: sum(  # noqa: E731
        jnp.sum(g) for g in jax.tree.leaves(value_and_multi_grad(losses)(p, batch())[1]["task"])
    )
    task = lambda p: losses(p, batch())["task"]  # noqa: E731
    ones = jax.tree.map(jnp.ones_like, params())
    close(jax.grad(total)(params()), jax.jvp(jax.grad(task), (params(),), (ones,))[1], 1e-5)


@orders
@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_sharded_params(sequential, kind):
    fun = value_and_multi_grad(
        lambda p, x: (jnp.mean(jnp.tanh(x * p)), jnp.mean((x * p) ** 2)), sequential=sequential
    )
    p, x = params()["w"], 2 * params()["w"]
    expected = fun(p, x)
    mesh = mesh_of(kind, 8)
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, PartitionSpec("d", None))
        got = jax.jit(fun)(jax.device_put(p, sharding), jax.device_put(x, sharding))
        if kind == "explicit":
            assert jax.typeof(got[1][0]).sharding.spec == PartitionSpec("d", None)
    close(jax.device_get(got), jax.tree.map(np.asarray, expected))


@orders
def test_no_losses_and_nothing_to_differentiate_by(sequential):
    empty = value_and_multi_grad(lambda p: {}, sequential=sequential)
    assert empty(params()) == ({}, {})
    values, grads = value_and_multi_grad(lambda p: (jnp.ones(()),), sequential=sequential)({})
    assert values == (1.0,)
    assert grads == ({},)


def test_errors_say_what_to_do():
    fun = value_and_multi_grad(losses)
    with pytest.raises(TypeError, match=r"`args\[0\]` must hold float.*int32\[3\] at 'ids'"):
        fun({**params(), "ids": jnp.arange(3)}, batch())
    with pytest.raises(ValueError, match=r"`argnums` must name one of the 2 positional.*got 2"):
        value_and_multi_grad(losses, 2)(params(), batch())
    with pytest.raises(ValueError, match=r"`fun` must return real.*float32\[5, 4\] at 'y'.*mean"):
        value_and_multi_grad(lambda p: {"y": batch()[:, :4] * p["b"]})(params())
    with pytest.raises(TypeError, match=r"`fun` must return real.*complex64\[\]"):
        value_and_multi_grad(lambda p: [jnp.sum(p["b"]).astype(jnp.complex64)])(params())
    with pytest.raises(TypeError, match=r"`fun` must return real.*int32\[\] at 'n'"):
        value_and_multi_grad(lambda p: {"n": jnp.int32(1)})(params())
    with pytest.raises(TypeError, match=r"`fun` must return a pair \(losses, aux\)"):
        value_and_multi_grad(lambda p: [jnp.ones(())], has_aux=True)(params())
    with pytest.raises(TypeError, match="`fun` must be a function"):
        value_and_multi_grad(None)


def test_no_losses_at_all():
    with pytest.raises(ValueError, match=r"scalars or vectors, got float32\[0\]"):
        value_and_multi_grad(lambda w: jnp.zeros(0) * w.sum())(jnp.ones(2))
