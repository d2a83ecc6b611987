"""Entering the equations that run jaxprs of their own: one rule for each primitive."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.tracing import _views
from jaxcompress.tracing._jaxprs import Body, Location, constant
from jaxcompress.tracing._weights import Weight


class Entry(NamedTuple):
    """A higher-order equation that is to be entered.

    Attributes:
        eqn: the equation.
        bodies: its jaxprs.
        location: its own.
        run: `(index of the body, values, given) -> (results, records)`.
        as_it_is: `values -> results`, the equation with its own rules, on dense values.
        hooks: those of `interpret`.
    """

    eqn: Any
    bodies: list[Body]
    location: Location
    run: Callable[..., tuple[list[Any], dict[str, Any]]]
    as_it_is: Callable[[Sequence[Any]], list[Any]]
    hooks: Any

    def dense(self, value: Any) -> Any:
        """The value where only an array can go."""
        return self.hooks.dense(value, self.eqn) if isinstance(value, Weight) else value

    def stacks(self, key: str) -> bool:
        """Whether a record is stacked here."""
        return self.hooks.stacks(key, self.location)


def enter(entry: Entry, values: list[Any], given: dict[str, Any]):
    """The results and the records of a higher-order equation."""
    return _RULES[entry.eqn.primitive.name](entry, values, given)


def _jit(entry: Entry, values, given):
    params = entry.eqn.params

    def call(given, *values):
        return entry.run(0, list(values), given)

    call.__name__ = params["name"]
    values = _constrained(values, params["in_shardings"])
    inner = jax.jit(
        call,
        inline=params["inline"],
        keep_unused=params["keep_unused"],
        donate_argnums=[1 + i for i, donated in enumerate(params["donated_invars"]) if donated],
        compiler_options=dict(params["compiler_options_kvs"]) or None,
    )
    results, records = inner(given, *values)
    return _constrained(results, params["out_shardings"]), records


def _constrained(values, shardings):
    return [
        jax.lax.with_sharding_constraint(v, s)
        if isinstance(s, jax.sharding.Sharding) and not isinstance(v, Weight)
        else v
        for v, s in zip(values, shardings, strict=True)
    ]


def _remat(entry: Entry, values, given):
    call = jax.checkpoint(
        lambda values, given: entry.run(0, values, given),
        prevent_cse=entry.eqn.params["prevent_cse"],
        policy=entry.eqn.params["policy"],
    )
    return call(values, given)


def _cond(entry: Entry, values, given):
    index, *operands = values
    branches = [
        lambda operands, given, k=k: _dense_results(entry, *entry.run(k, operands, given))
        for k in range(len(entry.bodies))
    ]
    if entry.hooks.identity is not None:
        shapes: dict[str, Any] = {}
        for branch in branches:
            shapes.update(jax.eval_shape(branch, operands, given)[1])

        def complete(branch, operands, given):
            results, records = branch(operands, given)
            missing = {key: s for key, s in shapes.items() if key not in records}
            records |= {key: entry.hooks.identity(key, s) for key, s in missing.items()}
            return results, records

        branches = [functools.partial(complete, branch) for branch in branches]
    index = index.astype(jnp.int32) if index.dtype == bool else index
    return jax.lax.switch(index, branches, operands, given)


def _scan(entry: Entry, values, given):
    body, params = entry.bodies[0], entry.eqn.params
    fixed, carried = _split_loop(entry, body, values)
    cuts = {j: _views.rows(values[j]) for j in body.sliced if isinstance(values[j], Weight)}
    weights = {j: cut for j, cut in cuts.items() if cut is not None}
    sliced = {
        j: weights[j].stacked if j in weights else entry.dense(values[j]) for j in body.sliced
    }
    cut_given = {key: x for key, x in given.items() if entry.stacks(key)}

    def once(carry, x):
        slices, slices_given = x
        inner = fixed | carry
        inner |= {j: weights[j].rebuild(s) if j in weights else s for j, s in slices.items()}
        results, records = entry.run(
            0, [inner[j] for j in range(len(values))], given | slices_given
        )
        after = {j: entry.dense(results[body.carried[j]]) for j in carry}
        outs = {k: entry.dense(r) for k, r in enumerate(results) if k not in body.carried.values()}
        return after, outs, records

    start = _start(entry, once, carried, jax.tree.map(_first, (sliced, cut_given)))

    def step(state, x):
        carry, merged = state
        carry, outs, records = once(carry, x)
        merged = {key: entry.hooks.merge(key, merged[key], records[key]) for key in merged}
        stacked = {key: record for key, record in records.items() if key not in merged}
        return (carry, merged), (outs, stacked)

    (carry, merged), (outs, stacked) = jax.lax.scan(
        step,
        (carried, start),
        (sliced, cut_given),
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    final = {body.carried[j]: (carry | fixed)[j] for j in body.carried}
    results = outs | final
    return [results[k] for k in range(len(results))], merged | stacked


def _while(entry: Entry, values, given):
    test, body = entry.bodies
    count = len(test.inputs) - len(body.carried)
    tested, values = values[:count], values[count:]
    fixed, carried = _split_loop(entry, body, values)

    def inner(carry):
        both = fixed | carry
        return [both[j] for j in range(len(values))]

    def once(carry, _):
        results, records = entry.run(1, inner(carry), given)
        return {j: entry.dense(results[body.carried[j]]) for j in carry}, {}, records

    def going_on(state):
        carry = inner(state[0])
        results, _ = entry.run(0, [*tested, *(carry[j] for j in body.carried)], given)
        return results[0]

    def step(state):
        carry, merged = state
        carry, _, records = once(carry, None)
        return carry, {key: entry.hooks.merge(key, merged[key], records[key]) for key in merged}

    start = _start(entry, once, carried, None, all_merge=True)
    carry, records = jax.lax.while_loop(going_on, step, (carried, start))
    return [(carry | fixed)[j] for j in body.carried], records


def _split_loop(entry: Entry, body: Body, values):
    """Operands of a loop that stay, weights among them, and those that change."""
    stays = {
        j
        for j in range(len(values))
        if j not in body.sliced
        and (j not in body.carried or (isinstance(values[j], Weight) and constant(body, j)))
    }
    fixed = {j: values[j] for j in stays}
    carried = {j: entry.dense(values[j]) for j in body.carried if j not in stays}
    return fixed, carried


def _start(entry: Entry, once, carry, x, all_merge=False) -> dict[str, Any]:
    """The records before the first trip, of those that the loop merges."""
    if entry.hooks.identity is None:
        return {}
    _, _, shapes = jax.eval_shape(once, carry, x)
    return {
        key: entry.hooks.identity(key, s)
        for key, s in shapes.items()
        if all_merge or not entry.stacks(key)
    }


def _first(x):
    return jax.ShapeDtypeStruct(x.shape[1:], x.dtype)


def _custom_jvp(entry: Entry, values, given):
    run, dense = _both_ways(entry)
    call = jax.custom_jvp(run)

    def rule(primals, tangents):
        _, dots = jax.jvp(dense, primals, tangents)
        results, records = call(*primals)
        record_dots = {}
        if records:
            _, (_, record_dots) = jax.jvp(run, primals, tangents)
        return (results, records), (dots, record_dots)

    call.defjvp(rule)
    return call(values, given)


def _custom_vjp(entry: Entry, values, given):
    run, dense = _both_ways(entry)
    call = jax.custom_vjp(run)

    def forward(values, given):
        results, records = run(values, given)
        _, pull = jax.vjp(dense, values, given)
        pull_records = jax.vjp(lambda *x: run(*x)[1], values, given)[1] if records else None
        return (results, records), (pull, pull_records)

    def backward(kept, cotangents):
        pull, pull_records = kept
        grads = pull(cotangents[0])
        if pull_records is None:
            return grads
        return jax.tree.map(_add, grads, pull_records(cotangents[1]))

    call.defvjp(forward, backward)
    return call(values, given)


def _both_ways(entry: Entry):
    """The body, and the equation itself: its custom derivative survives."""

    def run(values, given):
        return _dense_results(entry, *entry.run(0, values, given))

    def dense(values, given):
        del given
        # A custom derivative is one of dense values, whatever the body has a rule for.
        return entry.as_it_is([v.value.todense() if isinstance(v, Weight) else v for v in values])

    return run, dense


def _add(a, b):
    return a if a.dtype == jax.dtypes.float0 else a + b


def _dense_results(entry: Entry, results, records):
    return [entry.dense(r) for r in results], records


def _shard_map(entry: Entry, values, given):
    params = entry.eqn.params
    mesh = params["mesh"]
    manual = params["newly_manual_axes"] if "newly_manual_axes" in params else params["manual_axes"]
    axes = tuple(name for name in mesh.axis_names if name in manual)
    values, specs = list(values), list(params["in_specs"])
    for i, (value, spec) in enumerate(zip(values, specs, strict=True)):
        if isinstance(value, Weight):
            parts = _views.partition_specs(value, spec)
            if parts is None:
                values[i] = _views.decoded(value, entry.dense)
            else:
                specs[i] = dataclasses.replace(value, value=parts)

    def call(values, given):
        results, records = _dense_results(entry, *entry.run(0, values, given))
        return results, jax.tree.map(lambda r: jnp.expand_dims(r, 0), records)

    results, records = jax.shard_map(
        call,
        mesh=mesh,
        in_specs=(specs, jax.P()),
        out_specs=(list(params["out_specs"]), jax.P(axes)),
        axis_names=set(axes),
        check_vma=params["check_vma"],
    )(values, given)
    shards = int(np.prod([mesh.shape[name] for name in axes]))
    for key in records:
        if not entry.stacks(key):
            parts = [jax.tree.map(lambda r, i=i: r[i], records[key]) for i in range(shards)]
            records[key] = functools.reduce(functools.partial(entry.hooks.merge, key), parts)
    return results, records


_RULES = {
    "jit": _jit,
    "pjit": _jit,
    "remat2": _remat,
    "remat": _remat,
    "checkpoint": _remat,
    "cond": _cond,
    "scan": _scan,
    "while": _while,
    "custom_jvp_call": _custom_jvp,
    "custom_vjp_call": _custom_vjp,
    "shard_map": _shard_map,
}
