"""One option for each leaf, so that the losses are least within a budget."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Costs are counted in int32: as they are up to this total, else in units of a fraction of it.
MOST_COST = 2**30
# Of the exact search around the multiplier's answer: its states, the ranks to either side and the
# further multipliers whose choices it tries.
_STATES, _REACH, _FURTHER = 2048, 8, (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)


def assign(losses: jax.Array, costs: jax.Array, count: jax.Array, budget: jax.Array) -> jax.Array:
    """The option of each leaf: Lagrangian, greedy, then dynamic programming around the answer.

    Args:
        losses: float32 `[leaves, options]`, at least 0; infinite beyond a leaf's options.
        costs: int32, the same shape, rising along a row; in sum at most `MOST_COST`.
        count: int32 `[leaves]`, how many options each leaf has.
        budget: int32. Below the smallest cost of all the cheapest options are taken.

    Returns:
        int32 `[leaves]`, which options. Works under `jit` and `vmap`.

    Source: Everett 1963, "Generalized Lagrange multiplier method"; Pisinger 1995, "A minimal
    algorithm for the multiple-choice knapsack problem".
    """
    choice, multiplier = _by_multiplier(losses, costs, budget)
    choice = _fill(choice, losses, costs, budget)
    better = _exchange(choice, multiplier, losses, costs, count, budget)
    # Below the smallest cost of all there is nothing to exchange.
    return jnp.where(budget >= _spent(choice, costs), better, choice)


def _by_multiplier(
    losses: jax.Array, costs: jax.Array, budget: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The choices at the smallest multiplier that keeps the budget, and that multiplier."""

    def halve(_, state):
        low, high, held = state
        middle = low + (high - low) // 2
        choice = _cheapest(losses, costs, _float_of(middle))
        fits = _spent(choice, costs) <= budget
        ends = jnp.where(fits, low, middle + 1), jnp.where(fits, middle, high)
        return *ends, jnp.where(fits, choice, held)

    # Positive floats have the order of their bits. The choice is carried along: found anew from
    # its multiplier, outside the loop, it may be rounded otherwise.
    top = jnp.asarray(np.float32(np.finfo(np.float32).max).view(np.int32))
    state = jnp.zeros_like(top), top, jnp.zeros(losses.shape[0], jnp.int32)
    _, high, choice = lax.fori_loop(0, 32, halve, state)
    return choice, _float_of(high)


def _fill(choice: jax.Array, losses: jax.Array, costs: jax.Array, budget: jax.Array) -> jax.Array:
    """Spends what is left on one leaf after the other, always on the largest gain per cost."""

    def rates(choice):
        here = choice[:, None]
        more = costs - jnp.take_along_axis(costs, here, 1)
        gain = jnp.take_along_axis(losses, here, 1) - losses
        possible = (more > 0) & (more <= budget - _spent(choice, costs)) & (gain > 0)
        return jnp.where(possible, gain / jnp.maximum(more, 1).astype(jnp.float32), -1.0)

    def step(state):
        choice, gains = state
        leaf, option = jnp.divmod(jnp.argmax(gains), costs.shape[1])
        choice = jnp.where(jnp.arange(len(choice)) == leaf, option.astype(jnp.int32), choice)
        return choice, rates(choice)

    # A gain so small that its rate is 0 counts too.
    return lax.while_loop(lambda state: jnp.max(state[1]) >= 0, step, (choice, rates(choice)))[0]


def _exchange(
    choice: jax.Array,
    multiplier: jax.Array,
    losses: jax.Array,
    costs: jax.Array,
    count: jax.Array,
    budget: jax.Array,
) -> jax.Array:
    """The best of what keeps near to `choice`, by dynamic programming over leaves and cost."""
    here, last = choice[:, None], count[:, None] - 1
    # To stay comes first: that is what a leaf does where nothing is better.
    offsets = np.array([0] + [sign * i for i in range(1, _REACH + 1) for sign in (-1, 1)], np.int32)
    others = multiplier * jnp.asarray(_FURTHER, jnp.float32)
    far = jax.vmap(_cheapest, (None, None, 0), 1)(losses, costs, others)
    tried = jnp.concatenate([here + jnp.asarray(offsets)[None, :], far], 1)
    valid = (tried >= 0) & (tried <= last)
    tried = jnp.clip(tried, 0, last)
    gain = jnp.take_along_axis(losses, here, 1) - jnp.take_along_axis(losses, tried, 1)
    loss = jnp.where(valid, -gain, jnp.inf)
    more = jnp.take_along_axis(costs, tried, 1) - jnp.take_along_axis(costs, here, 1)

    # States are costs above that of `choice`, in steps of a grid that reaches some ranks of every
    # leaf. Moves are rounded up to it, so that the budget holds; to stay costs exactly nothing.
    middle = _STATES // 2
    left = jnp.maximum(budget - _spent(choice, costs), 0)
    ranks = jnp.arange(costs.shape[1] - 1, dtype=jnp.int32)[None, :] < last - 1
    largest = jnp.max(jnp.where(ranks, costs[:, 1:] - costs[:, :-1], 0), initial=0)
    reach = left + _REACH * jnp.minimum(largest, MOST_COST // (2 * _REACH))
    reach = jnp.minimum(jnp.maximum(reach, middle), _spent(count - 1, costs))
    grid = jnp.maximum(-(-reach // middle), 1)
    moves = -(-more // grid)
    states = jnp.arange(_STATES + 1, dtype=jnp.int32)

    def add(best, leaf):
        moves, loss = leaf
        source = states[None, :] - moves[:, None]
        inside = (source >= 0) & (source <= _STATES)
        value = jnp.where(inside, best[jnp.clip(source, 0, _STATES)] + loss[:, None], jnp.inf)
        return jnp.min(value, axis=0), jnp.argmin(value, axis=0).astype(jnp.int32)

    best, taken = lax.scan(add, jnp.where(states == middle, 0.0, jnp.inf), (moves, loss))
    end = jnp.argmin(jnp.where(states <= middle + left // grid, best, jnp.inf)).astype(jnp.int32)

    def trace(state, leaf):
        taken, moves, tried = leaf
        which = taken[state]
        return state - moves[which], tried[which]

    return lax.scan(trace, end, (taken, moves, tried), reverse=True)[1]


def _cheapest(losses: jax.Array, costs: jax.Array, multiplier: jax.Array) -> jax.Array:
    """Of each leaf the option of least loss plus multiplier times cost; of equal ones the first."""
    price = losses + multiplier * costs.astype(jnp.float32)
    return jnp.argmin(price, axis=1).astype(jnp.int32)


def _spent(choice: jax.Array, costs: jax.Array) -> jax.Array:
    return jnp.sum(at(costs, choice), dtype=jnp.int32)


def at(table: jax.Array, choice: jax.Array) -> jax.Array:
    """Of a table [leaves, options] the entry of each leaf's choice."""
    return jnp.take_along_axis(table, choice[:, None], 1)[:, 0]


def _float_of(bits: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(bits, jnp.float32)
