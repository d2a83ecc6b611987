"""What belongs together, found by running a function alone: no program is read here.

A *slice* is `(path, axis, positions, layer)`: all numbers of a leaf at some positions of one axis,
of one layer of a stack or of all there is (`()`). It *matters* where the output changes with the
numbers in it. A unit is a set of slices; three laws say that it is one:

- *safe*: while all others are zero, no slice matters: what would be left over does nothing.
  Statistics over units are the exception: what writes into them matters to other units.
- *whole*: while all are zero, whatever mattered before matters still: nothing is forgotten.
- *indivisible*: from a slice that matters take all others away that it does not need for it. What
  is left belongs together (one writes what another reads), and so in turn does the whole unit.
"""

import jax
import jax.numpy as jnp
import numpy as np

import jaxcompress as jc

# In float64, relative to the largest output. What does not matter is a product with zero.
NOTHING = 1e-12
AT_ONCE = 32


class Oracle:
    """A function at random params, in float64; to be used under `jax.enable_x64`.

    Args:
        apply: of params and args.
        params: of which the shapes are used, and which leaves are scales and variances.
        args: floating ones get float64.
        stacked: paths of leaves with a leading axis of layers, whose slices are of one layer.
    """

    def __init__(self, apply, params, args, stacked=(), seed=0):
        self.rng = np.random.default_rng(seed)
        self.stacked = stacked
        leaves, tree = jax.tree.flatten(params)
        paths = [path for path, _ in jc.tree.leaves_with_paths(params)]
        self.shapes = {path: leaf.shape for path, leaf in zip(paths, leaves, strict=True)}
        # A rectifier may hide anything for some params: what is idle is so for all of these.
        self.draws = [self.draw() for _ in range(30)]
        self.before = {}
        args = [jnp.asarray(a, a.dtype if a.dtype.kind == "i" else np.float64) for a in args]

        def run(leaves):
            with jax.numpy_dtype_promotion("standard"):
                y = apply(jax.tree.unflatten(tree, leaves), *args)
            return jnp.concatenate([jnp.ravel(v) for v in jax.tree.leaves(y)])

        self.run = jax.jit(lambda leaves: jax.lax.map(run, leaves))
        like = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in self.draws[0].values()]
        weights = self.rng.normal(size=jax.eval_shape(run, like).shape)
        self.gradient = jax.jit(jax.grad(lambda leaves: jnp.sum(weights * run(leaves))))

    def draw(self):
        found = {}
        for path, shape in self.shapes.items():
            scale = np.prod(shape[:-1]) ** -0.5 if len(shape) > 1 else 0.2
            value = scale * self.rng.normal(size=shape)
            found[path] = abs(value) + 0.5 if path.endswith(("scale", "var")) else value
        return found

    def with_zeros(self, slices, draw=0):
        values = {path: value.copy() for path, value in self.draws[draw].items()}
        for path, axis, positions, layer in slices:
            np.moveaxis(values[path][layer], axis - len(layer), 0)[positions] = 0
        return list(values.values())

    def outputs(self, cases):
        """For each case, a set of slices that are zero, the output: `[cases, …]`."""
        found = []
        for start in range(0, len(cases), AT_ONCE):
            part = [self.with_zeros(case) for case in cases[start : start + AT_ONCE]]
            part += [part[0]] * (AT_ONCE - len(part))
            found.append(np.asarray(self.run([np.stack(v) for v in zip(*part, strict=True)])))
        return np.concatenate(found)[: len(cases)]

    def idle(self, slices, draw):
        """`(path, axis, position, layer)` that do not matter while these slices are zero."""
        gradients = [np.abs(g) for g in self.gradient(self.with_zeros(slices, draw))]
        largest = max(g.max() for g in gradients)
        return {
            (path, axis, int(place[-1]), tuple(int(i) for i in place[:-1]))
            for path, g in zip(self.shapes, gradients, strict=True)
            for axis in range(path in self.stacked, g.ndim)
            for place in np.argwhere(self.most(path, axis, g) < NOTHING * largest)
        }

    def idle_from_the_start(self, draw):
        if draw not in self.before:
            self.before[draw] = self.idle([], draw)
        return self.before[draw]

    def most(self, path, axis, values):
        """The largest number of each slice: `[layers, positions]`, or `[positions]`."""
        kept = {axis, 0} if path in self.stacked else {axis}
        return values.max(tuple(i for i in range(values.ndim) if i not in kept))


def differ(a, b):
    return np.abs(a - b).max(-1) > NOTHING * np.abs(b).max()


def single(unit):
    """The slices of a unit, of one position each."""
    return [(path, axis, [i], layer) for path, axis, places, layer in unit for i in places]


def left_over(oracle, unit):
    """The slices that matter though all others of the unit are zero: breaks of *safe*."""
    unit = single(unit)
    y = oracle.outputs([unit, *([t for t in unit if t is not s] for s in unit)])
    return [s for s, changed in zip(unit, differ(y[1:], y[0]), strict=True) if changed]


def forgotten(oracle, unit):
    """Slices outside that stopped to matter with the unit: breaks of *whole*."""
    inside = {(path, axis, int(i), layer) for path, axis, (i,), layer in single(unit)}
    now, before = oracle.idle(unit, 0), oracle.idle_from_the_start(0)
    for draw in range(1, len(oracle.draws)):
        now &= oracle.idle(unit, draw)
        before = before & oracle.idle_from_the_start(draw)
        if draw > 2 and not now - before - inside:
            break
    return now - before - inside


def parts(oracle, unit):
    """The unit as sets of indices of slices that need each other: one, where *indivisible*."""
    found = []
    for order in (range(len(unit)), reversed(range(len(unit)))):
        needs = [set(range(len(unit))) for _ in unit]
        for out in order:
            tries = [(s, needs[s] - {out}) for s in range(len(unit)) if s != out]
            zeros = [
                [unit[i] for i in range(len(unit)) if i not in given]
                for s, kept in tries
                for given in (kept, kept - {s})
            ]
            y = oracle.outputs(zeros)
            for (s, kept), matters in zip(tries, differ(y[::2], y[1::2]), strict=True):
                if matters:
                    needs[s] = kept
        for one in needs:
            joined = [part for part in found if part & one]
            found = [part for part in found if not part & one] + [one.union(*joined)]
    return found
