"""Reads a program equation by equation, inner jaxprs too, in the simplest way: for tests."""

import jax
import jax.extend.core as jec
import numpy as np

from jaxcompress.tracing._jaxprs import bodies, run_equation
from jaxcompress.tracing.positions._neutral import neutral
from jaxcompress.tracing.positions._removed import removed_values, uniform_values


class Read:
    """All that was met: (array, constants per axis) of each value, and each `Mixed`."""

    def __init__(self, fn, *args):
        closed = jax.make_jaxpr(fn)(*args)
        self.values, self.mixed, self.equations = [], [], []
        leaves = [np.asarray(x) for x in jax.tree.leaves(args)]
        consts = [(np.asarray(x), (None,) * np.ndim(x), None) for x in closed.consts]
        given = [(x, (0.0,) * x.ndim, None) for x in leaves]
        self.outs = self._run(closed.jaxpr, consts, given)

    def _run(self, jaxpr, consts, args):
        env = dict(zip(jaxpr.constvars, consts, strict=True))
        env |= dict(zip(jaxpr.invars, args, strict=True))

        def read(v):
            if isinstance(v, jec.Literal):
                val = np.asarray(v.val)
                return val, (None,) * val.ndim, val[()] if val.ndim == 0 else None
            return env[v]

        for eqn in jaxpr.eqns:
            ins = [read(v) for v in eqn.invars]
            inner = bodies(eqn)
            if inner:
                (body,) = inner
                assert body.trips == 1
                consts = [(np.asarray(c), (None,) * np.ndim(c), None) for c in body.consts]
                outs = self._run(body.jaxpr, consts, [ins[i] for i in body.inputs])
            else:
                outs = self._one(jaxpr, eqn, ins)
            for v, out in zip(eqn.outvars, outs, strict=True):
                env[v] = out
        return [read(v) for v in jaxpr.outvars]

    def _one(self, jaxpr, eqn, ins):
        arrays = [x for x, _, _ in ins]
        results = run_equation(jaxpr, eqn, arrays)
        constants, known = [c for _, c, _ in ins], [k for _, _, k in ins]
        outs = removed_values(eqn, constants, known)
        numbers = uniform_values(eqn, known)
        self.mixed += [(eqn.primitive.name, *m) for m in neutral(eqn, constants, known)]
        # Results that nobody reads are not given.
        triples = [
            (None if x is None else np.asarray(x), c, k)
            for x, c, k in zip(results, outs, numbers, strict=True)
        ]
        self.equations.append((eqn, triples))
        self.values += triples
        return triples
