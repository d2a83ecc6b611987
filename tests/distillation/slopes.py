"""Derivatives of an oracle in float64, by central differences."""

import numpy as np

STEP = 1e-5


def by_differences(oracle, args, argument):
    """The gradient of `oracle(*args)`, a scalar, for one of the arguments; in its shape."""
    at = np.asarray(args[argument], np.float64)
    found = np.zeros(at.shape)
    for i in np.ndindex(at.shape):
        sides = []
        for step in (STEP, -STEP):
            moved = at.copy()
            moved[i] += step
            sides.append(oracle(*args[:argument], moved, *args[argument + 1 :]))
        found[i] = (sides[0] - sides[1]) / (2 * STEP)
    return found


def check(grads, oracle, args):
    """That the gradients are those of the oracle, for the first arguments or all."""
    for argument, grad in enumerate(grads):
        wanted = by_differences(oracle, args, argument)
        np.testing.assert_allclose(grad, wanted, rtol=1e-6, atol=1e-8)
