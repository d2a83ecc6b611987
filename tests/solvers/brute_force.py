"""Oracles in NumPy float64, written from the papers, and layers to run them on."""

import itertools

import numpy as np


def layer(k, n, seed=0, samples=None, mixing=1.0):
    """Correlated inputs `x`, and a kernel."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((samples or 4 * k, k)).astype(np.float32)
    mix = np.eye(k) + mixing * rng.standard_normal((k, k)) / np.sqrt(max(k, 1))
    x = (x @ mix).astype(np.float32)
    return x, rng.standard_normal((k, n)).astype(np.float32)


def gram_of(x):
    """`x.T @ x`, rounded once."""
    return (x.astype(np.float64).T @ x).astype(np.float32)


def damped(gram, damping):
    """The Hessian of the papers; dead inputs get the mean of the others."""
    h = gram.astype(np.float64)
    diagonal = np.diag(h)
    live = diagonal > 0
    mean = diagonal[live].mean() if live.any() else 1.0
    return h + np.diag(np.where(live, damping * mean, (1 + damping) * mean))


def error(h, new, w):
    """`tr (new - w)^T h (new - w)`."""
    change = np.asarray(new, np.float64) - np.asarray(w, np.float64)
    return float(np.sum(change * (np.asarray(h, np.float64) @ change)))


def rest(h, w, fixed_rows, values):
    """The rows that are not fixed, by least squares from the dense `w`."""
    free = np.setdiff1d(np.arange(len(w)), fixed_rows)
    change = values - w[fixed_rows]
    return free, w[free] - np.linalg.solve(
        h[np.ix_(free, free)], h[np.ix_(free, fixed_rows)] @ change
    )


def compensate(w, h, choose, project, block_size):
    """Fixes row after row, and solves for all the others anew each time."""
    w = w.astype(np.float64)
    current, structures, s = w.copy(), [], None
    for j in range(len(w)):
        if j % block_size == 0:
            # U_jj^2 is the inverse of the Hessian of the rows from j on, at j.
            block = range(j, min(j + block_size, len(w)))
            diagonal = [np.sqrt(np.linalg.inv(h[i:, i:])[0, 0]) for i in block]
            s = choose(current[list(block)], np.array(diagonal), j)
            structures.append(s)
        current[j] = project(current[j], s, j % block_size)
        fixed = np.arange(j + 1)
        free, values = rest(h, w, fixed, current[: j + 1])
        current[free] = values
    return current, structures


def masked(w, h, keep):
    """The best kept weights, column by column."""
    out = np.zeros(w.shape)
    for c in range(w.shape[1]):
        gone = np.flatnonzero(~keep[:, c])
        free, values = rest(h, w[:, c].astype(np.float64), gone, np.zeros(len(gone)))
        out[free, c] = values
    return out


def greedy(w, h):
    """Per column: the order of the removals and what each costs, all candidates tried."""
    k, n = w.shape
    order, losses = np.zeros((k, n), int), np.zeros((k, n))
    for c in range(n):
        column, keep, before = w[:, [c]], np.ones((k, 1), bool), 0.0
        for t in range(k):
            tries = {}
            for q in np.flatnonzero(keep[:, 0]):
                keep[q] = False
                tries[q] = error(h, masked(column, h, keep), column)
                keep[q] = True
            q = min(tries, key=lambda q: tries[q])
            order[t, c], losses[t, c], before = q, tries[q] - before, tries[q]
            keep[q] = False
    return order, losses


def heads(losses, removed):
    """How many go of each column: always the cheapest head, of equal ones that of the first."""
    k, n = losses.shape
    counts = np.zeros(n, int)
    for _ in range(removed):
        heads = [losses[counts[c], c] if counts[c] < k else np.inf for c in range(n)]
        alive = [c for c in range(n) if counts[c] < k]
        counts[min(alive, key=lambda c: heads[c])] += 1
    return counts


def best_mask(w, h, kept):
    """The least error over all masks of a layer with so many weights."""
    cells = list(itertools.product(*map(range, w.shape)))
    best = np.inf
    for chosen in itertools.combinations(cells, kept):
        keep = np.zeros(w.shape, bool)
        for cell in chosen:
            keep[cell] = True
        best = min(best, error(h, masked(w, h, keep), w))
    return best
