"""Budgets: met from below, by the largest fraction that does; shapes against cut arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxcompress as jc
from jaxcompress.pruning.structured._base import Keep
from jaxcompress.pruning.structured._budget import (
    UnitBudget,
    byte_budget,
    flop_budget,
    kept_shapes,
    parameter_budget,
)
from jaxcompress.pruning.structured._dependencies import dependencies
from jaxcompress.pruning.structured._select import select
from jaxcompress.pruning.structured._shrink import shrink as shrink_function
from jaxcompress.pruning.structured._unit_scores import is_trained, unit_scores
from tests.pruning.structured.unit_cases import (
    CASES,
    attention_case,
    by_path,
    cut,
    flat_case,
    mlp,
    mlp_case,
    scan_case,
    shrink,
)

exhaustive = settings(max_examples=25, deadline=None, derandomize=True)


def on_host(params):
    """Of what is only counted: no programs are compiled for cutting it."""
    return jax.tree.map(np.asarray, params)


def parameters(params, keep):
    """Counted on the arrays that are left."""
    left = by_path(cut(params, keep)).items()
    return sum(x.size for path, x in left if is_trained(path, np.ones(1, np.float32)))


@pytest.mark.parametrize("overlap", ["blocks", "strides", "both"])
@pytest.mark.parametrize("case", CASES)
def test_shapes_are_those_of_cut_arrays(case, overlap):
    params, deps = CASES[case]()
    keep = select(deps, params, keep=0.6, overlap=overlap)
    found = {path: x.shape for path, x in kept_shapes(keep).items()}
    assert found == {path: x.shape for path, x in by_path(cut(params, keep)).items()}
    assert kept_shapes(Keep(deps, {})) == dict(deps.shapes)


def test_uneven_layers_are_refused():
    _, deps = scan_case(hidden=5)
    mask = np.array([[1, 1, 0, 0, 0]] * 2 + [[1, 0, 0, 0, 0]], bool)
    with pytest.raises(ValueError, match=r"as many in each layer.*stack/up"):
        kept_shapes(Keep(deps, {"stack/up[2]": mask}))


def largest_within(deps, params, limit, measure, **options):
    """By trying every fraction at which anything changes."""
    sizes = {g.size for g in deps.groups} | {sum(g.size for g in deps.groups)}
    fractions = sorted({k / n for n in sizes for k in range(n + 1)})
    options = {"scores": unit_scores(deps, params)} | options
    keeps = [select(deps, None, keep=f, **options) for f in fractions]
    fit = [keep for keep in keeps if measure(keep) <= limit]
    return fit[-1] if fit else None


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scope": "global"},
        {"scope": "isomorphic"},
        {"multiple_of": 2, "floor": 0.3},
        {"scope": "global", "multiple_of": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("case", ["mlp", "flat", "scan"])
def test_parameter_budgets_take_the_largest_fraction_that_fits(case, options):
    params, deps = CASES[case]()
    options = {**options, "scores": unit_scores(deps, params)}
    params = on_host(params)
    whole = parameters(params, Keep(deps, {}))
    for share in (0.45, 0.8, 1.0):
        want = largest_within(
            deps, params, share * whole, lambda keep: parameters(params, keep), **options
        )
        if want is None:
            with pytest.raises(ValueError, match="`keep` must be met"):
                select(deps, params, keep=parameter_budget(share), **options)
            continue
        found = select(deps, params, keep=parameter_budget(share), **options)
        assert parameters(params, found) <= share * whole
        assert parameters(params, found) == parameters(params, want)
        for name, mask in want.masks.items():
            np.testing.assert_array_equal(found.masks[name], mask)


@exhaustive
@given(st.integers(40, 260), st.sampled_from(["local", "global"]))
def test_amounts_are_met_from_below(limit, scope):
    params, deps = mlp_case()
    params = on_host(params)
    scores = {g.name: np.random.default_rng(limit).random(g.size) for g in deps.groups}
    found = select(deps, None, keep=parameter_budget(limit), scope=scope, scores=scores)
    left = parameters(params, found)
    assert left <= limit
    if not all(mask.all() for mask in found.masks.values()):
        # One unit more of each group would be too much: one unit has 19 at most.
        assert left > limit - 2 * 19
    more = select(deps, None, keep=parameter_budget(limit + 10), scope=scope, scores=scores)
    for name, mask in found.masks.items():
        assert not np.any(mask & ~more.masks[name])


def test_running_statistics_do_not_count_as_parameters():
    _, deps = flat_case()
    # Of conv 12 + 3, of the norm 6 without statistics, of the head 48.
    assert parameter_budget(1.0).measure(Keep(deps, {})) == 69
    assert parameter_budget(1.0, leaves="**").measure(Keep(deps, {})) == 75
    assert parameter_budget(1.0, leaves="head/*").measure(Keep(deps, {})) == 48


def test_bytes_are_those_of_each_dtype():
    params, deps = mlp_case()
    params["a"]["kernel"] = params["a"]["kernel"].astype(jnp.bfloat16)
    deps = type(deps)(
        deps.groups,
        deps.frozen,
        {**deps.shapes, "a/kernel": jax.ShapeDtypeStruct((8, 10), jnp.bfloat16)},
    )
    budget = byte_budget(0.5)
    whole = 80 * 2 + (10 + 60 + 6 + 18) * 4
    assert budget.measure(Keep(deps, {})) == whole
    keep = select(deps, params, keep=budget)
    left = jc.tree.nbytes(cut(params, keep))
    assert left == budget.measure(keep) <= whole / 2
    assert byte_budget(1.0, leaves="a/kernel").measure(Keep(deps, {})) == 160


def test_flops_by_the_cost_of_the_smaller_function():
    params, deps = mlp_case()
    x = jnp.ones((4, 8))
    host = on_host(params)
    flops = lambda keep: jc.cost(mlp, cut(host, keep), x).flops  # noqa: E731
    for limit in (0.6, 900):
        budget = flop_budget(limit, mlp, params, x, shrink=shrink)
        allowed = limit * flops(Keep(deps, {})) if limit == 0.6 else limit
        found = select(deps, params, keep=budget)
        want = largest_within(deps, params, allowed, flops)
        assert want is not None
        assert flops(found) == flops(want) <= allowed
    tried = []
    own = budget._replace(measure=lambda keep: tried.append(keep) or flops(keep))
    select(deps, params, keep=own)
    assert len(tried) <= 6
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    again = flop_budget(
        900, mlp, abstract, jax.ShapeDtypeStruct((4, 8), jnp.float32), shrink=shrink
    )
    scores = unit_scores(deps, params)
    assert flops(select(deps, None, keep=again, scores=scores)) == flops(found)


def test_budgets_of_ones_own():
    params, deps = attention_case(heads=4)
    heads = lambda keep: float(keep.masks.get("q[1]/blocks", np.ones(4)).sum())  # noqa: E731
    for limit, want in ((3, 3), (0.5, 2), (0.25, 1), (1.0, 4)):
        found = select(deps, params, keep=UnitBudget(limit, heads))
        assert found.masks["q[1]/blocks"].sum() == want
    with pytest.raises(ValueError, match=r"`keep` must be met by what.*a limit of 0"):
        select(deps, params, keep=UnitBudget(0.1, heads))
    with pytest.raises(TypeError, match="`keep` must be a real number"):
        select(deps, params, keep=UnitBudget(3, lambda keep: None))  # pyright: ignore


def test_limits_are_checked():
    params, _ = mlp_case()
    for make in (parameter_budget, byte_budget, lambda n: flop_budget(n, mlp, params, 1)):
        for bad in (0.0, 1.5, -3, 0):
            with pytest.raises(ValueError, match="`limit` must be"):
                make(bad)
        for bad in ("1", None, True):
            with pytest.raises(TypeError, match="`limit` must be"):
                make(bad)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="after the limit"):
        flop_budget(0.5, params, mlp)  # pyright: ignore[reportArgumentType]


def test_flops_of_functions_of_any_code():
    """With `jc.shrink` itself: a function whose code has the sizes in it."""

    def fixed(params, x):
        hidden = jax.nn.relu(x @ params["up"]).reshape(x.shape[0], 4, 3)
        return hidden.reshape(x.shape[0], 12) @ params["down"]

    params = {"up": jnp.ones((8, 12)), "down": jnp.ones((12, 2))}
    x = jnp.ones((4, 8))
    deps = dependencies(fixed, params, x)
    found = select(deps, params, keep=flop_budget(0.5, fixed, params, x))
    small, small_fn = shrink_function(fixed, params, found, x)
    whole = jc.cost(fixed, params, x).flops
    assert 0.3 * whole < jc.cost(small_fn, small, x).flops <= 0.5 * whole
