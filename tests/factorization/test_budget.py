"""Ranks under a budget against all combinations, exact programs, baselines; the edges."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress.factorization import allocate_ranks

# Few sets of shapes, many spectra: each set is compiled once.
SMALL = [
    {"a": (6, 8), "b": (12, 5), "c": (4, 4)},
    {"a": (9, 9), "b": (7, 12)},
    {"a": (4, 12), "b": (8, 8), "c": (12, 6), "d": (5, 10)},
    {"a": (1, 6), "b": (10, 10), "c": (2, 9)},
]
MEDIUM = {"a": (48, 64), "b": (64, 64), "c": (64, 16), "d": (20, 60), "e": (33, 40)}


def draw(shapes, seed):
    """Spectra of several kinds: spread, flat, fast, with equal values and zeros."""
    rng = np.random.default_rng(seed)
    out = {}
    for path, shape in shapes.items():
        k = min(shape)
        s = [
            np.exp(rng.normal(0, 1.5, k)),
            rng.uniform(0, 1, k),
            rng.uniform(0.5, 2) * 0.5 ** np.arange(k),
            rng.integers(0, 4, k).astype(float),
        ][rng.integers(4)]
        out[path] = np.sort(s)[::-1].astype(np.float32)
    return out


def options(s, shape, align=1, min_rank=1, price=None, weight=1.0):
    """(cost, loss, rank, dense) of one leaf in float64, from the definition."""
    m, n = shape
    dense, each = price or (m * n, m + n)
    squares = np.asarray(s, np.float64) ** 2
    out = [(dense, 0.0, min(shape), True)]
    for r in range(min(min_rank, min(shape)), min(shape) + 1):
        if (r % align == 0 or r == min(shape)) and r * each < dense:
            out.append((r * each, weight * squares[r:].sum(), r, False))
    return out


def brute_force(choices, budget):
    return min(
        sum(o[1] for o in combo)
        for combo in itertools.product(*choices)
        if sum(o[0] for o in combo) <= budget
    )


def exact(choices, budget):
    """The knapsack of multiple choices by its table over whole costs."""
    best = np.zeros(budget + 1)
    for leaf in choices:
        new = np.full(budget + 1, np.inf)
        for cost, loss, *_ in leaf:
            if cost <= budget:
                new[cost:] = np.minimum(new[cost:], best[: budget + 1 - cost] + loss)
        best = new
    return best[budget]


def check(out, choices, budget, paths):
    """What is said of the choice is true of it, and the budget is kept, in exact numbers."""
    cost = loss = 0.0
    for path, leaf in zip(paths, choices, strict=True):
        rank, dense = int(out.ranks[path]), bool(out.dense[path])
        (found,) = (o for o in leaf if o[2:] == (rank, dense))
        cost, loss = cost + found[0], loss + found[1]
    assert cost <= budget
    np.testing.assert_allclose(out.cost, cost, rtol=1e-6)
    np.testing.assert_allclose(out.loss, loss, rtol=1e-5, atol=1e-6)
    return loss


def greedy(choices, budget):
    """Rank after rank, where it gains most for its cost, and dense where a leaf is at its end."""
    chosen = [min(leaf) for leaf in choices]
    while True:
        spent = sum(o[0] for o in chosen)
        rates = [
            ((here[1] - o[1]) / (o[0] - here[0]), i, o)
            for i, (here, leaf) in enumerate(zip(chosen, choices, strict=True))
            for o in [min((o for o in leaf if o[0] > here[0]), default=None)]
            if o is not None and spent + o[0] - here[0] <= budget
        ]
        if not rates:
            return sum(o[1] for o in chosen)
        _, i, o = max(rates)
        chosen[i] = o


def uniform(choices, budget):
    """The same fraction of its dense cost for each leaf."""
    whole = sum(leaf[0][0] for leaf in choices)
    loss = 0.0
    for leaf in choices:
        fits = [o for o in leaf if o[0] <= max(budget / whole * leaf[0][0], min(leaf)[0])]
        loss += min(o[1] for o in fits)
    return loss


@pytest.mark.parametrize("which", range(len(SMALL)))
def test_optimal_among_all_combinations(which):
    shapes = SMALL[which]
    paths, whole = list(shapes), sum(m * n for m, n in shapes.values())
    rng = np.random.default_rng(which)
    for seed in range(50):
        s = draw(shapes, 100 * which + seed)
        choices = [options(s[p], shapes[p]) for p in paths]
        least = sum(min(leaf)[0] for leaf in choices)
        budget = int(rng.integers(least, whole + 1))
        loss = check(allocate_ranks(s, shapes, (budget + 0.5) / whole), choices, budget, paths)
        np.testing.assert_allclose(loss, brute_force(choices, budget), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("align", "min_rank"), [(1, 0), (2, 1), (3, 3)])
def test_options_restrict_the_combinations(align, min_rank):
    shapes = SMALL[2]
    paths, whole = list(shapes), sum(m * n for m, n in shapes.values())
    weights = {"a": 3.0, "d": 0.25}
    prices = {"a": (48, 9), "b": (20, 3), "c": (100, 7), "d": (9, 1)}

    @jax.jit
    def run(s, total, priced, weight):
        kind = {"align": align, "min_rank": min_rank, "importance": weight}
        plain = allocate_ranks(s, shapes, None, total, **kind)
        return plain, allocate_ranks(s, shapes, None, priced, cost=prices, **kind)

    for seed in range(10):
        s = draw(shapes, seed)
        both = []
        for price in ({}, prices):
            leaves = [
                options(s[p], shapes[p], align, min_rank, price.get(p), weights.get(p, 1.0))
                for p in paths
            ]
            least, most = sum(min(x)[0] for x in leaves), sum(x[0][0] for x in leaves)
            both.append((leaves, least + (most - least) * (seed + 1) // 11))
        assert whole >= both[0][1]
        outs = run(s, both[0][1], both[1][1], weights)
        for out, (leaves, budget) in zip(outs, both, strict=True):
            loss = check(out, leaves, budget, paths)
            np.testing.assert_allclose(loss, brute_force(leaves, budget), rtol=1e-5, atol=1e-6)


def test_near_the_optimum_and_better_than_baselines_where_not_all_is_tried():
    paths, whole = list(MEDIUM), sum(m * n for m, n in MEDIUM.values())
    run = jax.jit(lambda s, total: allocate_ranks(s, MEDIUM, total=total))
    gaps, by_greedy, by_uniform = [], [], []
    for seed in range(30):
        s = draw(MEDIUM, seed)
        choices = [options(s[p], MEDIUM[p]) for p in paths]
        budget = int(whole * (0.1 + 0.8 * seed / 30))
        loss = check(run(s, budget), choices, budget, paths)
        best = exact(choices, budget)
        gaps.append(loss / best - 1)
        # No worse than the others but for rounding, and often a good deal better.
        by_greedy.append(greedy(choices, budget) / loss)
        by_uniform.append(uniform(choices, budget) / loss)
    assert np.max(gaps) < 0.01
    assert np.mean(gaps) < 1e-3
    assert np.min(by_greedy) > 0.999
    assert np.mean(by_greedy) > 1.01
    assert np.min(by_uniform) > 0.999
    assert np.mean(by_uniform) > 1.5


def test_vmap_over_budgets_spectra_and_importances_equals_a_loop():
    shapes = SMALL[0]
    many = jax.tree.map(lambda *x: jnp.stack(x), *[draw(shapes, i) for i in range(4)])
    weights = {"a": jnp.asarray([1.0, 0.1, 5.0, 0.0])}
    fractions = jnp.asarray([0.35, 0.5, 0.77, 1.0])

    def run(s, fraction, importance):
        return allocate_ranks(s, shapes, fraction, importance=importance)

    got = jax.jit(jax.vmap(run))(many, fractions, weights)
    for i in range(4):
        s, weight = jax.tree.map(lambda x: x[i], (many, weights))  # noqa: B023
        for fraction in (fractions[i], float(fractions[i])):
            one = run(s, fraction, weight)
            assert one.ranks["a"].dtype == jnp.int32
            assert one.dense["a"].dtype == jnp.bool_
            jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[i], y), got[:2], one[:2])  # noqa: B023
            np.testing.assert_allclose(got.loss[i], one.loss, rtol=1e-6)
            np.testing.assert_array_equal(got.cost[i], one.cost)


def test_more_budget_is_never_worse():
    s = draw(SMALL[2], 5)
    f = lambda fraction: allocate_ranks(s, SMALL[2], fraction).loss  # noqa: E731
    losses = jax.vmap(f)(jnp.linspace(0.3, 1.0, 30))
    assert (np.diff(losses) <= 1e-6).all()
    assert losses[-1] == 0


def test_the_whole_budget_keeps_what_is_not_free_to_drop_dense():
    s = {"a": jnp.asarray([3.0, 2.0, 1.0, 0.5]), "b": jnp.asarray([1.0, 0.0, 0.0, 0.0, 0.0])}
    out = allocate_ranks(s, {"a": (4, 6), "b": (5, 9)}, 1.0)
    assert out.dense["a"]
    assert out.ranks["a"] == 4
    assert out.ranks["b"] == 1
    assert out.loss == 0


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_spectra_are_computed_in_float32(dtype):
    s = jax.tree.map(lambda x: jnp.asarray(x).astype(dtype), draw(SMALL[1], 0))
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), s)
    got, want = (allocate_ranks(x, SMALL[1], 0.5) for x in (s, wide))
    assert got.loss.dtype == got.cost.dtype == jnp.float32
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("scale", [1e-16, 1e12, 1e18])
def test_scales_change_only_the_loss(scale):
    s = draw(SMALL[0], 0)
    want = allocate_ranks(s, SMALL[0], 0.5)
    scaled = {path: x * np.float32(scale) for path, x in s.items()}
    got = allocate_ranks(scaled, SMALL[0], 0.5, importance={p: 1e-3 for p in s})
    jax.tree.map(np.testing.assert_array_equal, got[:2], want[:2])
    np.testing.assert_allclose(got.loss, want.loss * np.float32(1e-3) * scale**2, rtol=1e-4)


def test_costs_beyond_int32_or_not_whole_never_exceed_the_budget():
    s = draw(SMALL[0], 0)
    for unit in (1e12, 0.1, 1e-3 * np.pi):
        prices = {p: (unit * m * n, unit * (m + n)) for p, (m, n) in SMALL[0].items()}
        whole = sum(dense for dense, _ in prices.values())
        traced = jax.jit(lambda t, c=prices: allocate_ranks(s, SMALL[0], total=t, cost=c))
        for fraction in (0.4, 0.7, 1.0):
            choices = [options(s[p], SMALL[0][p], price=prices[p]) for p in s]
            want = brute_force(choices, whole * fraction)
            out = allocate_ranks(s, SMALL[0], total=whole * fraction, cost=prices)
            loss = check(out, choices, whole * fraction * (1 + 1e-12), list(s))
            np.testing.assert_allclose(loss, want, rtol=1e-5)
            out = traced(jnp.float32(whole * fraction))
            check(out, choices, whole * fraction * (1 + 1e-6), list(s))


def test_large_integer_budgets_are_exact():
    shapes = {"a": (8, 8)}
    s = {"a": jnp.arange(8.0, 0.0, -1.0)}
    prices = {"a": (2**30, 2**27 + 1)}
    for off, rank in ((0, 3), (-1, 2)):
        total = 3 * (2**27 + 1) + off
        assert allocate_ranks(s, shapes, total=total, cost=prices).ranks["a"] == rank
        traced = jax.jit(lambda t: allocate_ranks(s, shapes, total=t, cost=prices).ranks["a"])
        assert traced(jnp.int32(total)) == rank


def test_costs_in_units_are_rounded_against_the_budget():
    s, each = {"a": jnp.arange(8.0, 0.0, -1.0)}, 2**40 + 12345
    for off, rank in ((-1, 2), (2**13, 3)):
        prices = {"a": (2**43, each)}
        out = allocate_ranks(s, {"a": (8, 8)}, total=3 * each + off, cost=prices)
        assert out.ranks["a"] == rank


def test_nothing_that_gains_fits_in_what_is_left():
    shapes = {"a": (1000, 40), "b": (900, 30), "c": (40, 30), "d": (9, 12)}
    s = draw(shapes, 3)
    choices = {path: options(s[path], shapes[path]) for path in shapes}
    for total in range(2500, 60000, 3777):
        out = allocate_ranks(s, shapes, total=total)
        check(out, choices.values(), total, list(shapes))
        for path, leaf in choices.items():
            here = (int(out.ranks[path]), bool(out.dense[path]))
            (cost, loss) = next(o[:2] for o in leaf if o[2:] == here)
            left = total - float(out.cost)
            assert not any(o[0] - cost <= left and o[1] < loss * (1 - 1e-5) for o in leaf)


def test_edges():
    zeros = {"a": jnp.zeros(4), "b": jnp.zeros(5)}
    shapes = {"a": (4, 6), "b": (5, 9)}
    out = allocate_ranks(zeros, shapes, 1.0)
    assert (out.ranks["a"], out.ranks["b"], out.loss, out.cost) == (1, 1, 0, 24)
    out = allocate_ranks(zeros, shapes, 0.0, min_rank=0)
    assert (out.ranks["a"], out.ranks["b"], out.cost) == (0, 0, 0)
    assert allocate_ranks(zeros, shapes, total=np.inf, min_rank=0).cost == 0
    out = allocate_ranks({}, {}, 0.5)
    assert (out.ranks, out.loss, out.cost) == ({}, 0, 0)
    out = allocate_ranks({"e": jnp.zeros(0), "a": jnp.ones(4)}, {"e": (0, 7), "a": (4, 6)}, 1.0)
    assert out.dense["e"]
    assert out.ranks["e"] == 0
    # One column: no factors are smaller.
    out = allocate_ranks({"v": jnp.ones(1)}, {"v": (9, 1)}, 1.0)
    assert out.dense["v"]
    assert out.ranks["v"] == 1


def test_what_is_not_finite_is_cheap_and_seen():
    shapes = SMALL[1]
    s = draw(shapes, 1)
    for bad in (np.nan, np.inf):
        broken = dict(s, a=np.full(9, bad, np.float32))
        out = allocate_ranks(broken, shapes, 0.9)
        assert np.isnan(out.loss)
        assert out.ranks["a"] == 1
        rest = allocate_ranks({"b": s["b"]}, {"b": shapes["b"]}, total=int(0.9 * 165) - 18)
        assert out.ranks["b"] == rest.ranks["b"]


def test_a_traced_budget_below_the_least_gives_the_least():
    s = draw(SMALL[0], 0)
    out = jax.jit(lambda t: allocate_ranks(s, SMALL[0], total=t, importance={"a": t}))(-5.0)
    assert [int(r) for r in out.ranks.values()] == [1, 1, 1]
    assert out.cost == 14 + 17 + 8


def test_gradient_of_the_loss_holds_the_ranks():
    shapes, s = SMALL[0], draw(SMALL[0], 0)
    out = allocate_ranks(s, shapes, 0.5)

    def loss(s, weight):
        return allocate_ranks(s, shapes, 0.5, importance={"a": weight}).loss

    grads, slope = jax.grad(loss, argnums=(0, 1))(s, 1.0)
    for path, x in s.items():
        kept = np.arange(len(x)) < int(out.ranks[path])
        np.testing.assert_allclose(grads[path], np.where(kept, 0, 2 * x), rtol=1e-5)
    np.testing.assert_allclose(slope, np.sum(s["a"][int(out.ranks["a"]) :] ** 2), rtol=1e-5)


ONE, OF = {"a": jnp.ones(4)}, {"a": (4, 8)}


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda: allocate_ranks(ONE, OF), ValueError, "not both"),
        (lambda: allocate_ranks(ONE, OF, 0.5, 9), ValueError, "not both"),
        (lambda: allocate_ranks(ONE, OF, 1.5), ValueError, "`fraction`"),
        (lambda: allocate_ranks(ONE, OF, total=-1), ValueError, "`total`"),
        (lambda: allocate_ranks(ONE, OF, 0.1), ValueError, "smallest cost, 12 of 32, got 0.1"),
        (lambda: allocate_ranks(ONE, OF, total=11), ValueError, "min_rank"),
        (lambda: allocate_ranks(ONE, {}, 0.5), ValueError, "`shapes` must have the paths"),
        (lambda: allocate_ranks(ONE, {"a": (5, 8)}, 0.5), ValueError, "float32\\[4\\] at 'a'"),
        (lambda: allocate_ranks({"a": jnp.ones(4, int)}, OF, 0.5), TypeError, "floating"),
        (lambda: allocate_ranks(ONE, OF, 0.5, importance={"b": 1}), ValueError, "paths of"),
        (lambda: allocate_ranks(ONE, OF, 0.5, importance={"a": -1}), ValueError, "importance"),
        (lambda: allocate_ranks(ONE, OF, 0.5, cost="bytes"), TypeError, "`cost`"),  # pyright: ignore[reportArgumentType]
        (lambda: allocate_ranks(ONE, OF, 0.5, cost={"b": (1, 1)}), ValueError, "others"),
        (lambda: allocate_ranks(ONE, OF, 0.5, cost={"a": (9, 0)}), ValueError, "positive"),
        (lambda: allocate_ranks(ONE, OF, 0.5, align=0), ValueError, "align"),
        (lambda: allocate_ranks(ONE, OF, 0.5, min_rank=-1), ValueError, "min_rank"),
    ],
)
def test_bad_input(call, kind, text):
    with pytest.raises(kind, match=text):
        call()
