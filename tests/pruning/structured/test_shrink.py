"""What `shrink` promises beside exactness: derivatives, sizes, meshes, rules, refusals."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import jaxcompress as jc
from jaxcompress.pruning.structured._places import kept_positions
from tests.conftest import counting_jit, mesh_of
from tests.pruning.structured.removal import cut, masked, some_units


def normal(*shape, seed=0):
    rng = np.random.default_rng([seed, *shape])
    scale = shape[-2] ** -0.5 if len(shape) > 1 else 1.0
    return jnp.asarray(scale * rng.normal(size=shape), jnp.float32)


def half(deps, seed=0):
    """Half of all units, at random; of layers each its own."""
    return some_units(deps, deps.groups, seed)


def close(a, b, tolerance=2e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, tolerance, tolerance), a, b)


def mlp(params, x):
    x = jax.nn.relu(x @ params["a"] + params["b"][None])
    return jax.nn.gelu(x @ params["c"]) @ params["d"]


MLP = {"a": normal(6, 8), "b": normal(8), "c": normal(8, 12), "d": normal(12, 3)}
X = normal(4, 6)


def test_gradients_are_those_of_the_masked_function():
    keep = half(jc.dependencies(mlp, MLP, X))
    small, fn = jc.shrink(mlp, MLP, keep, X)

    def loss(f):
        return lambda p: jnp.sum(jnp.square(f(p, X)))

    found = jax.jit(jax.grad(loss(fn)))(small)
    close(found, cut(jax.grad(loss(mlp))(masked(MLP, keep)), keep))


def test_one_trace_for_two_calls_and_another_batch_size():
    keep = half(jc.dependencies(mlp, MLP, X))
    small, fn = jc.shrink(mlp, MLP, keep, X)
    jitted = counting_jit(fn)
    jitted(small, X)
    jitted(jax.tree.map(lambda w: 2 * w, small), X)
    assert jitted.traces == 1
    more = normal(9, 6)
    close(jitted(small, more), mlp(masked(MLP, keep), more))


def test_vmap_is_a_loop_and_scan_runs_it():
    keep = half(jc.dependencies(mlp, MLP, X))
    small, fn = jc.shrink(mlp, MLP, keep, X)
    many = jax.tree.map(lambda w: jnp.stack([w, 2 * w, -w]), small)
    batched = jax.vmap(fn, (0, None))(many, X)
    loop = [fn(jax.tree.map(lambda w, i=i: w[i], many), X) for i in range(3)]
    close(batched, jnp.stack(loop))
    _, scanned = jax.lax.scan(lambda c, p: (c, fn(p, X)), 0, many)
    close(scanned, jnp.stack(loop))


def test_shapes_alone_and_narrow_dtypes():
    shapes = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, jnp.bfloat16), MLP)
    x = jax.ShapeDtypeStruct(X.shape, jnp.bfloat16)
    keep = half(jc.dependencies(mlp, shapes, x))
    small, fn = jc.shrink(mlp, shapes, keep, x)
    assert small["c"].shape == (4, 6)
    narrow = jax.tree.map(lambda w: w.astype(jnp.bfloat16), MLP)
    small, _ = jc.shrink(mlp, narrow, keep, x)
    assert fn(small, X.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    assert all(w.dtype == jnp.bfloat16 for w in jax.tree.leaves(small))


def test_the_params_of_the_user_stay_and_numpy_stays_numpy():
    params = {path: np.asarray(w) for path, w in MLP.items()}
    before = {path: w.copy() for path, w in params.items()}
    keep = half(jc.dependencies(mlp, params, X))
    small, _ = jc.shrink(mlp, params, keep, X)
    assert all(isinstance(w, np.ndarray) for w in small.values())
    assert all(np.array_equal(params[path], before[path]) for path in params)


def test_keeping_everything_changes_nothing():
    deps = jc.dependencies(mlp, MLP, X)
    small, fn = jc.shrink(mlp, MLP, jc.pruning.Keep(deps, {}), X)
    assert fn is mlp
    assert all(small[path] is MLP[path] for path in MLP)


def test_shrinking_again_packing_and_saving(tmp_path):
    keep = half(jc.dependencies(mlp, MLP, X))
    small, fn = jc.shrink(mlp, MLP, keep, X)
    again = half(jc.dependencies(fn, small, X), seed=1)
    smaller, last = jc.shrink(fn, small, again, X)
    assert smaller["c"].shape == (2, 3)
    close(last(smaller, X), fn(masked(small, again), X))
    packed = jc.pack(jc.quantize(bits=8), small)
    dense = jc.compress(jc.quantize(bits=8), small)
    close(jc.lift(fn)(packed, X), fn(dense, X), 1e-5)
    factors = jc.pack(jc.low_rank(1), small)
    assert jc.tree.nbytes(factors) < jc.tree.nbytes(small)
    close(jc.lift(fn)(factors, X), fn(jc.compress(jc.low_rank(1), small), X), 1e-5)
    pytest.importorskip("safetensors")
    jc.save(tmp_path / "small.safetensors", small)
    loaded = jc.load(tmp_path / "small.safetensors")
    close(fn(loaded, X), fn(small, X), 0)


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_on_a_mesh_it_is_the_same(kind):
    keep = half(jc.dependencies(mlp, MLP, X))
    small, fn = jc.shrink(mlp, MLP, keep, X)
    expected = fn(small, X)
    mesh = mesh_of(kind, 2)
    with jax.set_mesh(mesh):

        def place(w, *spec):
            return jax.device_put(w, NamedSharding(mesh, PartitionSpec(*spec)))

        params = {path: place(w) for path, w in MLP.items()}
        x = place(X, "d")
        small, run = jc.shrink(mlp, params, keep, x)
        close(jax.device_get(jax.jit(run)(small, x)), jax.device_get(expected))


@jax.custom_vjp
def twice(x):
    return 2 * x


twice.defvjp(lambda x: (2 * x, None), lambda _, g: (10 * g,))


@jax.custom_jvp
def thrice(x):
    return 3 * x


thrice.defjvp(lambda x, dot: (3 * x[0], 100 * dot[0]))


@pytest.mark.parametrize("custom", [twice, thrice])
def test_a_derivative_of_ones_own_stays(custom):
    """The rule is not the true derivative, so that it can be told apart."""

    def fn(p, x):
        return custom(x @ p["a"]) @ p["c"]

    params = {"a": MLP["a"], "c": MLP["c"]}
    keep = half(jc.dependencies(fn, params, X))
    assert "a" in kept_positions(keep)
    small, run = jc.shrink(fn, params, keep, X)

    def loss(f):
        return lambda p: jnp.sum(f(p, X))

    close(jax.grad(loss(run))(small), cut(jax.grad(loss(fn))(masked(params, keep)), keep))


class Norms(nn.Module):
    width: int = 12
    hidden: int = 8

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.width)(x)
        x = x + nn.Dense(self.width)(nn.gelu(nn.Dense(self.hidden)(nn.LayerNorm()(x))))
        y = nn.RMSNorm()(x)
        x = x + nn.Dense(self.width)(jax.nn.relu(nn.Dense(self.hidden)(y)))
        return nn.Dense(3)(nn.LayerNorm(use_fast_variance=False)(x))


def lenient(fn):
    @functools.wraps(fn)
    def called(*args):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return fn(*args)

    return called


def test_replaced_sizes_are_those_of_a_smaller_module():
    module = Norms()
    x = normal(5, 6)
    params = module.init(jax.random.key(0), x)
    apply = lenient(module.apply)
    keep = half(jc.dependencies(apply, params, x))
    small, fn = jc.shrink(apply, params, keep, x, sizes="replace")
    fresh = Norms(6, 4)
    assert jax.tree.map(jnp.shape, small) == jax.tree.map(
        jnp.shape, fresh.init(jax.random.key(0), x)
    )
    close(fn(small, x), fresh.apply(small, x))


def test_kept_sizes_are_those_of_the_masked_module_but_for_the_variance_of_two_passes():
    module, x = Norms(), normal(5, 6)
    params = module.init(jax.random.key(0), x)
    apply = lenient(module.apply)
    deps = jc.dependencies(apply, params, x)
    (inexact,) = [group for group in deps.groups if group.inexact]
    assert inexact.name == "params/Dense_0/kernel[1]"
    assert inexact.inexact.startswith("reduce_sum over")
    assert inexact.inexact.endswith("at Norms/LayerNorm_1")
    keep = half(deps)
    exact = jc.pruning.Keep(deps, {n: m for n, m in keep.masks.items() if n != inexact.name})
    small, fn = jc.shrink(apply, params, exact, x)
    close(fn(small, x), apply(masked(params, exact), x))


def test_attention_scales_are_replaced():
    def attention(p, x):
        q, k, v = (jnp.einsum("td,dhf->htf", x, p[n]) for n in "qkv")
        scores = jnp.einsum("htf,hsf->hts", q, k) / np.sqrt(q.shape[-1]).astype(np.float32)
        return jnp.einsum("hts,hsf,hfd->td", jax.nn.softmax(scores, -1), v, p["o"])

    params = {n: normal(6, 2, 8, seed=i) for i, n in enumerate("qkv")} | {"o": normal(2, 8, 6)}
    x = normal(4, 6)
    keep = half(jc.dependencies(attention, params, x))
    small, fn = jc.shrink(attention, params, keep, x, sizes="replace")
    assert small["q"].shape == (6, 1, 4)
    close(fn(small, x), attention(small, x))
    small, fn = jc.shrink(attention, params, keep, x)
    close(fn(small, x), attention(masked(params, keep), x))


def test_a_size_that_is_not_sure_is_kept_with_a_warning():
    def fn(p, x):
        y = jnp.einsum("td,dhf->hft", x, p["a"])
        return jnp.einsum("hft,hfe->te", y / np.float32(8**0.5), p["b"])

    params, x = {"a": normal(6, 8, 8), "b": normal(8, 8, 3)}, normal(4, 6)
    deps = jc.dependencies(fn, params, x)
    first, second = deps.groups
    masks = {first.name: np.arange(8) < 4, second.name: np.arange(8) < 2}
    with pytest.warns(UserWarning, match="may come from any of the sizes"):
        _, run = jc.shrink(fn, params, jc.pruning.Keep(deps, masks), x, sizes="replace")
    del run
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jc.shrink(fn, params, jc.pruning.Keep(deps, masks), x)


def test_statistics_that_a_step_returns_shrink_with_the_params():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.BatchNorm(use_running_average=False)(nn.Dense(8)(x)))
            x = nn.Dropout(0.5, deterministic=False)(x)
            return nn.Dense(3)(x)

    x, keys = normal(6, 4), {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    params = Net().init(keys, x)

    @lenient
    def step(params, x):
        return Net().apply(params, x, mutable=["batch_stats"], rngs={"dropout": jax.random.key(2)})

    keep = half(jc.dependencies(step, params, x))
    small, fn = jc.shrink(step, params, keep, x)
    y, state = jax.jit(fn)(small, x)
    expected, whole = step(masked(params, keep), x)
    # The same random numbers are drawn for what stays.
    close(y, expected)
    stays = kept_positions(keep)["batch_stats/BatchNorm_0/mean"][0]
    close(
        state["batch_stats"]["BatchNorm_0"]["mean"],
        whole["batch_stats"]["BatchNorm_0"]["mean"][stays],
    )


def test_channels_and_blocks_in_one():
    def fn(p, x):
        x = x @ p["in"]

        def layer(x, w):
            return x + jax.nn.relu(x @ w["up"]) @ w["down"], None

        x, _ = jax.lax.scan(layer, x, p["layers"])
        return (x + jax.nn.gelu(x @ p["f"]["a"]) @ p["f"]["b"]) @ p["out"]

    params = {
        "in": normal(6, 8),
        "layers": {"up": normal(4, 8, 10), "down": normal(4, 10, 8)},
        "f": {"a": normal(8, 5), "b": normal(5, 8)},
        "out": normal(8, 3),
    }
    deps = jc.dependencies(fn, params, X)
    keep = half(deps)
    blocks = {block.name: block for block in jc.pruning.residual_blocks(fn, params, X)}
    scan = next(block for block in blocks.values() if block.layers)
    gone = (
        jc.pruning.Dropped(blocks["f"]),
        jc.pruning.Dropped(scan, (True, False, True, False)),
    )
    both = jc.pruning.keep_blocks(keep, gone)
    small, run = jc.shrink(fn, params, both, X)
    assert jax.tree.map(jnp.shape, small) == {
        "in": (6, 4), "layers": {"up": (2, 4, 5), "down": (2, 5, 4)},
        "f": {"a": None, "b": None}, "out": (4, 3),
    }  # fmt: skip
    zeros = masked(params, keep)
    x = X @ zeros["in"]
    for i in (0, 2):
        x = x + jax.nn.relu(x @ zeros["layers"]["up"][i]) @ zeros["layers"]["down"][i]
    close(run(small, X), x @ zeros["out"])


def kernel(x, y):
    """Stands for one that can't be read: its axes are sorted inside."""
    return jnp.cumsum(jnp.sort(x, -1), -1) * y[:, None]


def test_a_rule_of_the_user_for_what_can_not_be_read():
    hidden = jax.jit(kernel)

    def fn(p, x):
        return jnp.transpose(hidden(jnp.transpose(x @ p["a"]), p["b"])) @ p["c"]

    params = {"a": MLP["a"], "b": normal(8), "c": normal(8, 3)}
    (group,) = jc.dependencies(fn, params, X).groups
    assert (group.inexact, group.size) == (None, 8)
    seen = []

    def call(x, y):
        seen.append(x.shape)
        return kernel(x, y)

    rules = {"kernel": jc.pruning.AxisRule("d n, d -> d n", call)}
    deps = jc.dependencies(fn, params, X, rules=rules)
    assert [g.name for g in deps.groups] == [group.name]
    keep = half(deps)
    small, run = jc.shrink(fn, params, keep, X)
    close(run(small, X), fn(masked(params, keep), X))
    assert set(seen) == {(4, 4)}
    wrong = {"kernel": jc.pruning.AxisRule("d n -> d n")}
    with pytest.raises(ValueError, match=r"dependencies: `rules` must name each axis of 'kernel'"):
        jc.dependencies(fn, params, X, rules=wrong)


def test_without_a_rule_it_is_frozen_by_name():
    def fn(p, x):
        x = jax.pure_callback(np.tanh, jax.ShapeDtypeStruct((4, 8), np.float32), x @ p["a"])
        return x @ p["c"]

    deps = jc.dependencies(fn, {"a": MLP["a"], "c": normal(8, 3)}, X)
    assert not deps.groups
    assert {f.reason for f in deps.frozen if f.axis == 1 and f.path == "a"} == {"`pure_callback`"}


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(6, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
        self.last = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.norm(self.first(x))))


def test_a_module_of_nnx_gets_smaller():
    module = Net(nnx.Rngs(0))
    fn, variables = jc.functional(module, variables=...)
    fn = lenient(fn)
    keep = half(jc.dependencies(fn, variables, X))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        small = jc.pruning.shrink_module(module, keep, X)
        y = small(X)
    assert (small.first.kernel.shape, small.norm.mean.shape) == ((6, 4), (4,))
    assert module.first.kernel.shape == (6, 8)
    close(y, fn(masked(variables, keep), X))


def test_a_module_whose_code_has_sizes_is_refused():
    class Fixed(Net):
        def __call__(self, x):
            return self.last(nnx.relu(self.first(x)).reshape(-1, 8))

    module = Fixed(nnx.Rngs(0))
    fn, variables = jc.functional(module, variables=...)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        keep = half(jc.dependencies(fn, variables, X))
        with pytest.raises(ValueError, match=r"shrink_module: `module` must take its sizes from"):
            jc.pruning.shrink_module(module, keep, X)


def test_refusals_name_what_is_wrong():
    deps = jc.dependencies(mlp, MLP, X)
    keep = half(deps)
    with pytest.raises(TypeError, match=r"shrink: `keep` must be what stays, from jc.select"):
        jc.shrink(mlp, MLP, deps, X)
    with pytest.raises(ValueError, match="shrink: `sizes` must be 'keep' or 'replace'"):
        jc.shrink(mlp, MLP, keep, X, sizes="other")
    with pytest.raises(ValueError, match=r"`params` must have the shape \[6, 8\].* at 'a'"):
        jc.shrink(mlp, MLP | {"a": normal(6, 7)}, keep, X)
    packed = jc.pack(jc.quantize(bits=8), MLP)
    with pytest.raises(TypeError, match="shrink: `params` must be dense"):
        jc.shrink(mlp, packed, keep, X)
    with pytest.raises(TypeError, match="dependencies: `params` must be dense"):
        jc.dependencies(mlp, packed, X)
    with pytest.raises(TypeError, match="dependencies: `fn` must be a function"):
        jc.dependencies(MLP, mlp, X)
    with pytest.raises(KeyError, match="be the name of a group"):
        deps["none"]
    # Positions that leave together, of which some stay.
    member = deps.groups[0].members[0]
    lonely = deps.groups[0]._replace(members=(member,))
    other = jc.pruning.Dependencies((lonely,), (), deps.shapes)
    wrong = jc.pruning.Keep(other, {lonely.name: np.arange(8) < 4})
    with pytest.raises(ValueError, match="shrink: `keep` must remove all of what leaves together"):
        jc.shrink(mlp, MLP, wrong, X)


def test_layers_that_lose_other_numbers_are_refused():
    def fn(p, x):
        return jax.lax.scan(lambda x, w: (x + jax.nn.relu(x @ w["u"]) @ w["d"], None), x, p)[0]

    params = {"u": normal(2, 6, 8), "d": normal(2, 8, 6)}
    (group,) = jc.dependencies(fn, params, X).groups
    assert group.layers == (2,)
    masks = {group.name: np.arange(8)[None] < np.array([[3], [4]])}
    deps = jc.dependencies(fn, params, X)
    with pytest.raises(ValueError, match="as many"):
        jc.shrink(fn, params, jc.pruning.Keep(deps, masks), X)


def test_loops_and_branches_that_start_with_constants_or_give_them_back():
    def fn(p, x):
        y = x @ p["a"]
        y = jax.lax.cond(
            jnp.sum(x) > 0, jnp.zeros_like, lambda y: jnp.tanh(y) @ p["w"] + jnp.ones((1, 8)) * 0, y
        )
        _, y = jax.lax.while_loop(
            lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1] @ p["w"]) + x @ p["a"]), (0, y)
        )
        # What is carried starts as a constant, and is one after each trip.
        c, ys = jax.lax.scan(
            lambda c, _: (jnp.ones_like(c), c + y), jnp.zeros_like(y), None, length=2
        )
        return (c + jnp.sum(ys, 0)) @ p["d"]

    params = {"a": normal(6, 8), "w": normal(8, 8), "d": normal(8, 3)}
    deps = jc.dependencies(fn, params, X)
    assert [group.size for group in deps.groups] == [8]
    keep = half(deps)
    small, run = jc.shrink(fn, params, keep, X)
    for x in (X, -X):
        close(jax.jit(run)(small, x), fn(masked(params, keep), x))


def test_a_constant_is_used_by_two_layers_with_other_positions():
    """One table of angles, cut in its own way where it is used; it is not stored anew."""
    table = np.arange(4 * 8, dtype=np.float32).reshape(4, 8)

    def fn(p, x):
        angles = jnp.cos(jnp.asarray(table))
        x = jax.nn.relu(x @ p["a"]) * angles
        return jax.nn.relu(x @ p["b"]) * angles @ p["c"]

    params = {"a": normal(6, 8), "b": normal(8, 8, seed=1), "c": normal(8, 3)}
    deps = jc.dependencies(fn, params, X)
    assert [group.size for group in deps.groups] == [8, 8]
    masks = {deps.groups[0].name: np.arange(8) < 3, deps.groups[1].name: np.arange(8) % 3 == 0}
    keep = jc.pruning.Keep(deps, masks)
    small, run = jc.shrink(fn, params, keep, X)
    close(run(small, X), fn(masked(params, keep), X))
