"""Choices of units: exact counts, multiples, floors, rankings, patterns, against brute force."""

import itertools
import math
import re
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxcompress as jc
from jaxcompress.pruning.structured._budget import kept_shapes
from jaxcompress.pruning.structured._choose import signature
from jaxcompress.pruning.structured._dependencies import dependencies
from jaxcompress.pruning.structured._ladder import allowed_counts, whole
from jaxcompress.pruning.structured._normalize import by_mean
from jaxcompress.pruning.structured._select import select
from jaxcompress.pruning.structured._unit_scores import random_units, unit_scores
from tests.pruning.structured.unit_cases import (
    CASES,
    attention_case,
    by_path,
    cut,
    depend,
    group,
    mlp_case,
    random_tree,
    scan_case,
)

pr = jc.pruning
exhaustive = settings(max_examples=60, deadline=None, derandomize=True)


def counts(keep):
    return {name: mask.sum(-1).tolist() for name, mask in keep.masks.items()}


def alone(size, layers=()):
    """Groups of given sizes, one leaf each."""
    sizes = size if isinstance(size, tuple) else (size,)
    params = {f"w{i}": jnp.zeros((*layers, n)) for i, n in enumerate(sizes)}
    axis = len(layers)
    return depend(
        params,
        *(
            group(f"w{i}[{axis}]", n, (f"w{i}", axis, np.arange(n)), layers=layers)
            for i, n in enumerate(sizes)
        ),
    )


def drawn(deps, seed, kinds=4):
    """Scores with many ties."""
    rng = np.random.default_rng(seed)
    return {g.name: rng.integers(0, kinds, g.shape).astype(np.float32) for g in deps.groups}


@pytest.mark.parametrize("case", CASES)
def test_the_best_of_each_layer_stay(case):
    params, deps = CASES[case]()
    scores = {k: np.asarray(v) for k, v in unit_scores(deps, params).items()}
    keep = select(deps, params, keep=0.5, overlap="both")
    assert set(keep.masks) == {g.name for g in deps.groups}
    for one in deps.groups:
        mask, count = keep.masks[one.name], max(one.size // 2, 1)
        assert mask.shape == one.shape
        assert mask.dtype == bool
        for layer in itertools.product(*map(range, one.layers)):
            best = np.argsort(-scores[one.name][layer], kind="stable")[:count]
            np.testing.assert_array_equal(np.flatnonzero(mask[layer]), np.sort(best))


@exhaustive
@given(st.integers(1, 40), st.integers(0, 1000), st.integers(0, 3))
def test_local_counts_are_exact(size, thousandths, seed):
    fraction = Fraction(thousandths, 1000)
    deps = alone(size)
    want = max(1, math.floor(fraction * size))
    scores = drawn(deps, seed)
    for keep in (thousandths / 1000, np.float32(thousandths / 1000), 1 - (1 - thousandths / 1000)):
        mask = select(deps, None, keep=keep, scores=scores).masks["w0[0]"]
        assert mask.sum() == want
        order = sorted(range(size), key=lambda i: (-scores["w0[0]"][i], i))
        assert set(np.flatnonzero(mask)) == set(order[:want])


@exhaustive
@given(
    st.integers(1, 40),
    st.integers(1, 9),
    st.floats(0, 1),
    st.one_of(st.integers(0, 50), st.floats(0, 1)),
)
def test_multiples_and_floors(size, multiple, keep, floor):
    deps = alone(size)
    mask = select(
        deps, None, keep=keep, scores=drawn(deps, 0), multiple_of=multiple, floor=floor
    ).masks["w0[0]"]
    least = max(1, floor if isinstance(floor, int) else math.ceil(size * floor - 1e-5 * size))
    fine = [
        c for c in range(1, size + 1) if (c >= min(least, size) and c % multiple == 0) or c == size
    ]
    target = math.floor(size * keep + 1e-6 * size)
    want = max([c for c in fine if c <= target], default=min(fine))
    assert int(mask.sum()) == want


def test_counts_by_hand():
    assert whole(0.3, 10) == 3
    assert whole(0.29, 100) == 29
    assert whole(1 - 0.9, 10) == 1
    assert whole(0.333, 3) == 0
    assert allowed_counts(10, 4, None, 10).tolist() == [4, 8, 10]
    assert allowed_counts(3, 8, None, 3).tolist() == [3]
    assert allowed_counts(16, 8, 9, 16).tolist() == [16]
    assert allowed_counts(10, 1, 0.25, 10).tolist() == list(range(3, 11))
    assert allowed_counts(5, 1, 0.5, 10).tolist() == [5]


def test_local_counts_are_those_of_torch_pruning():
    """`n_pruned = n - int(n * (1 - ratio))`, then `_round_to` of `BasePruner`."""
    for size, ratio, multiple in itertools.product((8, 17, 64, 100), (0.25, 0.5, 0.7), (1, 4, 8)):
        pruned = size - int(size * (1 - ratio))
        rounded = size - pruned
        rounded -= rounded % multiple
        deps = alone(size)
        keep = select(deps, None, keep=1 - ratio, scores=drawn(deps, 0), multiple_of=multiple)
        if rounded:
            assert keep.masks["w0[0]"].sum() == rounded


@exhaustive
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple),
    st.floats(0, 1),
    st.integers(0, 20),
    st.sampled_from([None, 2, 0.3]),
)
def test_a_global_ranking_keeps_exactly_the_best(sizes, keep, seed, floor):
    deps = alone(sizes)
    scores = drawn(deps, seed)
    found = select(
        deps, None, keep=keep, scores=scores, scope="global", normalize=None, floor=floor
    )
    floors = [
        min(n, max(1, floor if isinstance(floor, int) else math.ceil((floor or 0) * n - 1e-5)))
        for n in sizes
    ]
    target = max(math.floor(sum(sizes) * keep + 1e-6 * sum(sizes)), sum(floors))
    ranked, held = [], []
    for i, n in enumerate(sizes):
        own = scores[f"w{i}[0]"]
        order = sorted(range(n), key=lambda u: (-own[u], u))
        held += [(i, u) for u in order[: floors[i]]]
        ranked += [(-own[u], i, rank, u) for rank, u in enumerate(order) if rank >= floors[i]]
    best = held + [(i, u) for _, i, _, u in sorted(ranked)[: target - len(held)]]
    kept = [(i, u) for i in range(len(sizes)) for u in np.flatnonzero(found.masks[f"w{i}[0]"])]
    assert sorted(best) == sorted(kept)
    assert len(kept) == target


@exhaustive
@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=3).map(tuple),
    st.floats(0, 1),
    st.integers(2, 5),
)
def test_a_global_ranking_with_multiples_misses_by_less_than_a_step(sizes, keep, multiple):
    deps = alone(sizes)
    keep_found = select(
        deps, None, keep=keep, scores=drawn(deps, 1), scope="global", multiple_of=multiple
    )
    kept = [int(mask.sum()) for mask in keep_found.masks.values()]
    assert all(k % multiple == 0 or k == n for k, n in zip(kept, sizes, strict=True))
    target = sum(sizes) * keep + 1e-5 * sum(sizes)
    least = sum(min(n, multiple) for n in sizes)
    assert sum(kept) <= max(target, least)
    if sum(kept) < sum(sizes):
        assert sum(kept) > target - multiple - 1


@exhaustive
@given(st.floats(0, 1), st.floats(0, 1), st.sampled_from(["local", "global", "isomorphic"]))
def test_more_is_never_less(a, b, scope):
    deps = alone((7, 12, 5))
    scores = drawn(deps, 3)
    low, high = (
        select(deps, None, keep=k, scores=scores, scope=scope, multiple_of={"w1": 4})
        for k in sorted((a, b))
    )
    for name, mask in low.masks.items():
        assert not np.any(mask & ~high.masks[name])


def test_nan_goes_first_then_minus_infinity_and_ties_keep_the_first():
    deps = alone(6)
    scores = {"w0[0]": np.array([np.nan, 1.0, -np.inf, 1.0, 1.0, np.inf])}
    kept = lambda n: np.flatnonzero(  # noqa: E731
        select(deps, None, keep=n / 6, scores=scores).masks["w0[0]"]
    ).tolist()
    assert kept(1) == [5]
    assert kept(3) == [1, 3, 5]
    assert kept(4) == [1, 3, 4, 5]
    deps = alone((3, 3))
    scores = {"w0[0]": np.array([np.nan, 5.0, 5.0]), "w1[0]": np.array([1.0, 2.0, 3.0])}
    for normalize in (by_mean, None):
        found = select(deps, None, keep=5 / 6, scores=scores, scope="global", normalize=normalize)
        np.testing.assert_array_equal(found.masks["w0[0]"], [False, True, True])


def test_float64_scores_are_compared_as_they_are():
    deps = alone(2)
    scores = {"w0[0]": np.array([1.0, 1.0 + 1e-12])}
    np.testing.assert_array_equal(
        select(deps, None, keep=0.5, scores=scores).masks["w0[0]"], [False, True]
    )


def test_global_scores_are_normalized_by_group():
    deps = alone((4, 4))
    scores = {"w0[0]": np.array([1.0, 2.0, 3.0, 4.0]), "w1[0]": 100 * np.array([1.0, 2, 3, 4.5])}
    even = select(deps, None, keep=0.5, scores=scores, scope="global")
    assert counts(even) == {"w0[0]": 2, "w1[0]": 2}
    raw = select(deps, None, keep=0.5, scores=scores, scope="global", normalize=None)
    assert counts(raw) == {"w0[0]": 1, "w1[0]": 3}
    own = select(
        deps, None, keep=0.5, scores=scores, scope="global", normalize=lambda x: -x * jnp.float32(1)
    )
    np.testing.assert_array_equal(own.masks["w1[0]"], [True, True, True, True][:1] + [False] * 3)


def test_layers_keep_as_many_each_by_scores_of_their_own():
    deps = depend(
        {"w": jnp.zeros((2, 4)), "v": jnp.zeros(3)},
        group("w[1]", 4, ("w", 1, np.arange(4)), layers=(2,)),
        group("v[0]", 3, ("v", 0, np.arange(3))),
    )
    scores = {
        "w[1]": np.array([[4.0, 3.0, 0.0, 0.0], [0.0, 2.0, 8.0, 1.0]]),
        "v[0]": np.array([5.0, 2.0, 0.1]),
    }
    found = select(deps, None, keep=0.5, scores=scores)
    np.testing.assert_array_equal(found.masks["w[1]"], [[1, 1, 0, 0], [0, 1, 1, 0]])
    # Ranks of both layers: means 6, 2.5, 0.5, 0; three more of v: 5, 2, 0.1.
    for k, want in ((2, (1, 1)), (3, (2, 1)), (4, (2, 2)), (5, (3, 2)), (6, (3, 3))):
        found = select(deps, None, keep=k / 7, scores=scores, scope="global", normalize=None)
        assert counts(found) == {"w[1]": [want[0]] * 2, "v[0]": want[1]}


def test_isomorphic_groups_are_ranked_together():
    params = {
        "a": {"kernel": jnp.ones((2, 4)), "bias": jnp.ones(4)},
        "b": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)},
        "n": {"scale": jnp.ones(5)},
    }
    one, two, three = np.arange(4), np.arange(6), np.arange(5)
    deps = depend(
        params,
        group("a", 4, ("a/kernel", 1, one), ("a/bias", 0, one)),
        group("b", 6, ("b/kernel", 1, two), ("b/bias", 0, two)),
        group("n", 5, ("n/scale", 0, three)),
    )
    signatures = [signature(deps, g) for g in deps.groups]
    assert signatures[0] == signatures[1] != signatures[2]
    scores = {
        "a": np.array([9.0, 8.0, 7.0, 6.0]),
        "b": np.array([1.0, 2.0, 3.0, 4.0, 5.0, 5.5]),
        "n": np.array([0.1, 0.2, 0.3, 0.4, 0.5]),
    }
    found = select(deps, None, keep=0.5, scores=scores, scope="isomorphic", normalize=None)
    assert counts(found) == {"a": 4, "b": 1, "n": 2}
    found = select(deps, None, keep=0.5, scores=scores, scope="global", normalize=None)
    assert counts(found) == {"a": 4, "b": 2, "n": 1}
    # An input axis, several positions of a unit, layers: other structures.
    places = [
        (("a/kernel", 0, np.arange(2)), ("a/bias", 0, one)),
        (("a/kernel", 1, one), ("a/bias", 0, [0, 0, 1, 1])),
        (("a/kernel", 1, one),),
    ]
    others = depend(params, *(group(str(i), 4, *m) for i, m in enumerate(places)))
    layered = depend(params, group("l", 4, *map(tuple, deps.groups[0].members), layers=(2,)))
    found = [signature(others, g) for g in others.groups]
    assert len({signatures[0], *found, signature(layered, layered.groups[0])}) == 5


def test_patterns_choose_groups():
    _, deps = mlp_case()
    scores = drawn(deps, 0)
    for where in ("a/kernel[1]", "a/bias", "a/*", re.compile("a/.*"), lambda g: g.size == 10):
        assert list(select(deps, None, scores=scores, where=where).masks) == ["a/kernel[1]"]
    # The kernel of b belongs to both.
    assert len(select(deps, None, scores=scores, where="b/kernel").masks) == 2
    assert list(select(deps, None, scores=scores, exclude=("c/kernel",)).masks) == ["a/kernel[1]"]
    assert list(select(deps, None, scores=scores, where="**", exclude="c/**").masks) == [
        "a/kernel[1]"
    ]
    keep = {"c/kernel": 0.5, "**": 0.9}
    assert counts(select(deps, None, scores=scores, keep=keep)) == {
        "a/kernel[1]": 9,
        "b/kernel[1]": 3,
    }
    assert counts(select(deps, None, scores=scores, keep={"b/bias": 0.5})) == {"b/kernel[1]": 3}
    found = select(
        deps, None, scores=scores, keep=0.5, multiple_of={"a/bias": 4}, floor={"c/kernel": 5}
    )
    assert counts(found) == {"a/kernel[1]": 4, "b/kernel[1]": 5}


def test_each_pattern_of_a_mapping_has_its_own_global_ranking():
    deps = alone((4, 4, 4))
    scores = {f"w{i}[0]": np.arange(4) + 10.0 * i for i in range(3)}
    found = select(
        deps, None, keep={"w[01]": 0.5, "w2": 0.25}, scores=scores, scope="global", normalize=None
    )
    assert counts(found) == {"w0[0]": 1, "w1[0]": 3, "w2[0]": 1}


def test_heads_or_features_of_heads():
    _, deps = attention_case(heads=4, features=6)
    scores = drawn(deps, 0)
    assert counts(select(deps, None, scores=scores)) == {"q[1]/blocks": 2}
    assert counts(select(deps, None, scores=scores, overlap="strides")) == {
        "q[1]/strides": 3,
        "v[1]/strides": 3,
    }
    assert len(select(deps, None, scores=scores, overlap="both").masks) == 3
    assert len(select(deps, None, scores=scores, exclude="**/blocks").masks) == 2
    assert counts(select(deps, None, scores=scores, where="**/strides")) == {
        "q[1]/strides": 3,
        "v[1]/strides": 3,
    }
    both = select(deps, None, scores=scores, keep={"**/blocks": 0.5, "v[1]/strides": 0.5})
    assert counts(both) == {"q[1]/blocks": 2, "v[1]/strides": 3}


def test_three_nested_groups_along_one_axis():
    a, b, c = np.meshgrid(np.arange(2), np.arange(3), np.arange(4), indexing="ij")
    deps = depend(
        {"w": jnp.ones(24)},
        *(group(n, u.max() + 1, ("w", 0, u.ravel())) for n, u in (("b", b), ("a", a), ("c", c))),
    )
    scores = random_units(deps, jax.random.key(0))
    assert list(select(deps, None, scores=scores).masks) == ["a"]
    assert list(select(deps, None, scores=scores, overlap="strides").masks) == ["c"]
    # Parts of one axis that don't meet are no overlap.
    halves = depend(
        {"w": jnp.ones(4)},
        group("x", 2, ("w", 0, [0, 1, -1, -1])),
        group("y", 2, ("w", 0, [-1, -1, 0, 1])),
    )
    assert len(select(halves, None, scores=random_units(halves, jax.random.key(0))).masks) == 2


def test_fractions_of_the_sizes_before():
    before, now = alone(12), alone(9)
    scores = drawn(now, 0)
    assert counts(select(now, None, keep=0.5, scores=scores, of=before)) == {"w0[0]": 6}
    assert counts(select(now, None, keep=0.9, scores=scores, of=before)) == {"w0[0]": 9}
    found = select(now, None, keep=0.1, scores=scores, of=before, floor=0.25)
    assert counts(found) == {"w0[0]": 3}
    with pytest.raises(ValueError, match=r"`of` must have all groups"):
        select(alone((2, 2)), None, scores=drawn(alone((2, 2)), 0), of=before)


def test_groups_without_scores_stay_whole():
    params, deps = mlp_case()
    assert list(select(deps, params, leaves="c/*").masks) == ["b/kernel[1]"]
    scores = {"a/kernel[1]": np.arange(10.0)}
    assert counts(select(deps, None, scores=scores)) == {"a/kernel[1]": 5}


def test_scores_of_any_kind():
    params, deps = mlp_case()
    tree = random_tree(jax.tree.map(jnp.shape, params), seed=3)
    found = select(deps, params, score=tree, norm=pr.total)
    want = select(deps, None, scores=unit_scores(deps, params, score=tree, norm=pr.total))
    for name, mask in want.masks.items():
        np.testing.assert_array_equal(mask, found.masks[name])
    found = select(deps, params, score=pr.saliency, grads=tree)
    want = select(deps, None, scores=unit_scores(deps, params, score=pr.saliency, grads=tree))
    for name, mask in want.masks.items():
        np.testing.assert_array_equal(mask, found.masks[name])
    named = {**params, "name": "mlp", "act": jax.nn.relu}
    assert counts(select(deps, named)) == counts(select(deps, params))
    draws = [
        select(deps, params, score=pr.random(jax.random.key(i))).masks["a/kernel[1]"]
        for i in (0, 0, 1)
    ]
    assert np.array_equal(draws[0], draws[1])
    assert not np.array_equal(draws[0], draws[2])


def test_mistakes_are_named():
    params, deps = mlp_case()
    with pytest.raises(ValueError, match=r"`where` must match.*\n  a/kernel\[1\]\n  b/kernel\[1\]"):
        select(deps, params, where="z/**")
    with pytest.raises(ValueError, match="`exclude` must match"):
        select(deps, params, exclude="z")
    with pytest.raises(ValueError, match="`keep` must match"):
        select(deps, params, keep={"z": 0.5})
    with pytest.raises(ValueError, match="`multiple_of` must match"):
        select(deps, params, multiple_of={"z": 2})
    with pytest.raises(TypeError, match="`exclude` must hold names"):
        select(deps, params, exclude=(3,))
    for keep in (1.5, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"`keep` must be a real number in \[0, 1\]"):
            select(deps, params, keep=keep)
    with pytest.raises(TypeError, match=r"parameter_budget"):
        select(deps, params, keep="half")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="`scope` must be one of"):
        select(deps, params, scope="layer")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="`overlap` must be one of"):
        select(deps, params, overlap="heads")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="static integer of at least 1"):
        select(deps, params, multiple_of=0)
    with pytest.raises(ValueError, match="`floor` must be"):
        select(deps, params, floor=-1)
    with pytest.raises(ValueError, match="`floor` must be"):
        select(deps, params, floor=1.5)
    with pytest.raises(TypeError, match=r"by_mean"):
        select(deps, params, normalize="mean")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="group that loses units"):
        select(deps, params, exclude="**")
    with pytest.raises(ValueError, match=r"no group of the name 'z'"):
        select(deps, None, scores={"z": np.ones(3)})
    with pytest.raises(ValueError, match=r"\[\*layers, size\].*a/kernel"):
        select(deps, None, scores={"a/kernel[1]": np.ones(3)})
    infinite = jax.tree.map(lambda x: jnp.full(x.shape, jnp.inf), params)
    with pytest.raises(ValueError, match=r"infinity for all.*a/kernel.*`leaves`"):
        select(deps, params, score=infinite)
    with pytest.raises(ValueError, match="`normalize` must return the shape"):
        select(deps, params, scope="global", normalize=jnp.sum)
    with pytest.raises(TypeError, match="outside of jit"):
        jax.jit(lambda p: select(deps, p).masks["a/kernel[1]"])(params)
    with pytest.raises(TypeError, match="`keep` must be static"):
        jax.jit(lambda k: select(deps, params, keep=k).masks["a/kernel[1]"])(0.5)
    with pytest.raises(TypeError, match=r"jc\.dependencies"):
        select(params, params)  # pyright: ignore[reportArgumentType]


def test_scan_masks_are_those_of_each_layer_alone():
    params, deps = scan_case(hidden=6)
    found = select(deps, params, keep=0.5, where="stack/up[2]").masks["stack/up[2]"]
    for layer in range(3):
        up, down = (np.asarray(params["stack"][n][layer], np.float64) for n in ("up", "down"))
        norms = np.sqrt((up**2).sum(0) + (down**2).sum(1))
        best = np.sort(np.argsort(-norms)[:3])
        np.testing.assert_array_equal(np.flatnonzero(found[layer]), best)


def test_groups_of_functions():
    def attend(params, x):
        q, k, v = (x @ params[n] for n in "qkv")
        q, k, v = (y.reshape(6, 4, 2) for y in (q, k, v))
        weights = jax.nn.softmax(jnp.einsum("thd,shd->hts", q, k), axis=-1)
        return jnp.einsum("hts,shd->thd", weights, v).reshape(6, 8) @ params["o"]

    params = random_tree({"q": (5, 8), "k": (5, 8), "v": (5, 8), "o": (8, 5)})
    deps = dependencies(attend, params, jnp.ones((6, 5)))
    assert {g.size for g in deps.groups} == {4, 2}
    heads = select(deps, params, keep=0.5)
    assert [m.sum() for m in heads.masks.values()] == [2]
    assert next(iter(heads.masks)).endswith("/blocks")
    features = select(deps, params, keep=0.5, overlap="strides")
    assert [m.sum() for m in features.masks.values()] == [1, 1]
    for keep in (heads, features):
        assert {p: x.shape for p, x in kept_shapes(keep).items()} == {
            p: x.shape for p, x in by_path(cut(params, keep)).items()
        }
        assert kept_shapes(keep)["q"].shape == (5, 4)
