"""What does not fit is refused by name, with the rule and what came."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc

pr = jc.pruning
KEY = jax.random.key(0)
W = {"w": jnp.ones((4, 4))}
SGD = optax.sgd(0.1)


def packed():
    return jc.pack(jc.prune(0.9), {"w": jax.random.normal(KEY, (32, 32))})


def compress(p):
    return lambda: jc.compress(p(), W)


CASES = {
    "a budget not called": (lambda: jc.prune(0.5, budget=pr.erdos_renyi), "prune: `budget`"),
    "rigl's": (lambda: pr.rigl(0.5, key=KEY, budget=pr.uniform), "rigl: `budget`"),
    "top_kast's": (lambda: pr.top_kast(SGD, 0.5, 0.4, budget=pr.uniform), "top_kast: `budget`"),
    "balanced's": (lambda: pr.balanced(pr.uniform(), pr.uniform, 0.5), "balanced: `second`"),
    "floored's": (lambda: pr.floored(0.5, 0.5), "floored: `budget`"),
    "a schedule as a weight": (
        lambda: pr.balanced(pr.uniform(), pr.uniform(), lambda step: 0.5),
        r"balanced: `weight` must be a real number in \[0, 1\], got function",
    ),
    "a schedule of top_kast": (lambda: pr.top_kast(SGD, lambda s: 0.5, 0.4), "`forward`"),
    "a schedule as a strength": (
        lambda: pr.soft_threshold(jnp.ones(2), lambda step: 1.0),
        "soft_threshold: `strength`",
    ),
    "no dict": (lambda: pr.per_path(0.5), "per_path: `sparsities` must be a dict"),
    "an infinite cost": (lambda: pr.cost_weighted({"w": np.inf}), "finite numbers above zero"),
    "one pattern for several": (
        compress(lambda: jc.prune(0.5, budget=pr.uniform(dense="w"))),
        "uniform: `dense` must be a tuple",
    ),
    "a cost in words": (lambda: pr.cost_weighted({"w": "a"}), r"cost_weighted: `costs\['w'\]`"),
    "a traced power": (
        lambda: jax.jit(lambda p: pr.erdos_renyi(power=p))(1.0),
        "erdos_renyi: `power` must be static",
    ),
    "a score not called": (lambda: jc.prune(0.5, score=pr.movement), "Makers of scores are called"),
    "a score of params alone": (lambda: jc.prune(0.5, score=jnp.abs), "prune: `score` must be"),
    "rigl's first score": (lambda: pr.rigl(0.5, key=KEY, initial=jnp.abs), "rigl: `initial`"),
    "scores of other leaves": (
        compress(lambda: jc.prune(0.5, score=lambda params, **_: {})),
        r"give an array for each of \['w'\], got arrays at \[\]",
    ),
    "a seed": (lambda: pr.random(3), "random: `key` must be one key of jax.random, got int 3"),
    "two keys": (lambda: pr.rigl(0.5, key=jax.random.split(KEY, 2)), "rigl: `key`"),
    "no group": (lambda: pr.keep_n_of_m(jnp.ones(4), 2, m=0, axis=0), "keep_n_of_m: `m`"),
    "no axis": (lambda: pr.keep_n_of_m(jnp.ones(()), 2, m=4, axis=0), "keep_n_of_m: `axis`"),
    "several n": (
        lambda: pr.keep_n_of_m(jnp.ones(4), jnp.ones(2), m=4, axis=0),
        "keep_n_of_m: `n`",
    ),
    "an nm of one": (lambda: pr.from_masks(W, nm=2), "from_masks: `nm` must be a tuple"),
    "a packed leaf": (
        lambda: pr.apply_masks(packed(), {"w": jnp.ones((32, 32), bool)}),
        "at 'w'. Make packed leaves dense",
    ),
    "zeros of a packed leaf": (lambda: pr.nonzero(packed()), "nonzero: `params` must be dense"),
    "masks of other shapes": (
        lambda: pr.intersection({"w": jnp.ones(2, bool)}, {"w": jnp.ones(3, bool)}),
        r"intersection: `masks` must have the same shape \[2\], got bool\[3\] at 'w'",
    ),
    "masks of other leaves": (
        lambda: pr.union({"w": jnp.ones(2, bool)}, {"v": jnp.ones(2, bool)}),
        r"trees that differ in \['v', 'w'\]",
    ),
    "no masks": (lambda: pr.union(), "union: `masks` must hold at least one tree"),
    "an array of scopes": (lambda: jc.prune(0.5, scope=np.array([1, 2])), "prune: `scope`"),
    "a norm by name": (lambda: pr.blocks(2, 2, norm="l1"), "blocks: `norm` must be a function"),
    "a norm of all": (
        compress(lambda: jc.prune(0.5, groups=pr.blocks(2, 2, norm=lambda s, a, n: s.sum()))),
        r"prune: `norm` must return shape \[2, 2\]",
    ),
    "a schedule of vectors": (
        compress(lambda: jc.prune(lambda step: jnp.ones(2))),
        "prune: `sparsity` must give a scalar",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_refused(case):
    call, text = CASES[case]
    with pytest.raises((TypeError, ValueError), match=text):
        call()


def test_a_floor_without_a_global_scope_is_refused():
    for options in ({}, {"budget": pr.uniform()}, {"scope": -1}):
        with pytest.raises(ValueError, match=r"prune: `floor` must be left out without"):
            jc.prune(0.5, floor=0.1, **options)


def test_scores_that_can_be_called_are_read():
    """Those of an Equinox model are such a model."""
    model = eqx.nn.MLP(4, 2, 8, 1, key=KEY)
    loss = lambda m, x: jnp.sum(jax.vmap(m)(x) ** 2)  # noqa: E731
    scores = pr.snip(loss, model, [jnp.ones((3, 4))])
    new = jc.compress(jc.prune(0.5, score=scores), model)
    assert int((new.layers[0].weight == 0).sum()) == 16


def test_signed_scores_of_groups():
    p = jc.prune(0.5, score={"w": jnp.array([[-5.0, 1.0]])}, groups=pr.slices(-1, norm=pr.total))
    np.testing.assert_array_equal(jc.compress(p, {"w": jnp.ones((1, 2))})["w"], [[0, 1]])


def test_a_scheduled_projection_has_any_score():
    p = jc.scheduled(jc.prune)(jc.schedules.linear(0.0, 1.0, 0, 4), score=pr.lamp)
    assert int((jc.compress(p, W, step=2)["w"] == 0).sum()) == 8


def test_two_leaves_of_one_path_are_refused():
    params = {"a/b": jnp.ones((2, 2)), "a": {"b": jnp.ones((2, 2))}}
    masks = jax.tree.map(lambda w: w > 0, params)
    with pytest.raises(ValueError, match=r"apply_masks: `params` must have a path of its own"):
        pr.apply_masks(params, masks)
    with pytest.raises(ValueError, match=r"overlap: `masks` must have a path of its own"):
        pr.overlap(masks, masks)


def test_a_mask_is_that_of_when_it_was_given():
    mask = np.ones((4, 4), bool)
    p = pr.from_masks({"w": mask})
    mask[:] = False
    assert (jc.compress(p, W)["w"] == 1).all()


def test_a_numpy_integer_is_an_axis():
    a, b = (jc.compress(jc.prune(0.5, scope=axis), W) for axis in (np.int64(-1), -1))
    np.testing.assert_array_equal(a["w"], b["w"])


def test_integers_of_64_bits_under_strict_promotion():
    gram = jnp.array([[1.0, 0.9], [0.9, 1.0]])
    w = jnp.array([[1.0, 3.0], [1.5, 0.1]])
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    with jax.enable_x64(True):
        found = jc.solvers.surgeon(w, gram, 2)
        stats = jc.calibrate(fn, {"w": w}, [gram], gram=True)
        new = jc.compress(jc.prune(0.5), {"w": w}, stats=stats)
    assert int(found.keep.sum()) == 2
    assert int((new["w"] != 0).sum()) == 2
