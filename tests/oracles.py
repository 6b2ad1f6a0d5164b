r"""The papers' definitions in plain NumPy: slow, short, and independent of the library.

Conventions, where a definition leaves a choice. They are stated here and nowhere else.

*Order.* Scores are ordered NaN > +inf > ... > +0 = -0 > ... > -inf. Equal scores: the
lower layer wins, then the lower flat index. So of equally small weights the one with
the highest index is pruned first, and of equally large momenta the one with the lowest
index grows first.

*Counts to prune.* ``removed_i = floor(p_i * nnz_i)`` in exact rational arithmetic on
the value that the prune rate has as a float32. ``p_i = min(p, sparsity_i)`` for a layer
with ``sparsity_i < 0.2`` and ``contribution_i > 1/L`` (exact comparisons, L = number of
layers), else ``p``; ``sparsity_i = (n_i - nnz_i) / n_i``, exact.

*Contributions.* Every ``|m|`` becomes the integer ``floor(|m| / max|m| * 2**24)``, the
maximum over all layers, the division in the momentum's own precision or float32, the
wider of both. ``c_i = floor(2**7 * mean)`` of these integers over the weights of layer
i that are active before the prune, or over its missing ones where none is active; the
exact mean and the floor differ only where two fractional parts below tie. An empty
layer has ``c_i = 0``.

*Shares.* With ``R = sum_i removed_i``: ``regrow_i = floor(R * c_i / sum_j c_j)``, what
is left of R goes one each to the largest fractional parts (ties: the lowest layer).
All ``c_i`` zero: ``regrow_i = removed_i``.

*Spill.* A layer has ``n_i - nnz_i + removed_i`` free places: what was just pruned may
grow again. What a layer cannot take is divided by the number of layers with room; each
of them gets the whole part, and the rest joins what does not fit in the next round. A
rest smaller than the number of layers with room goes one each to the lowest of them.

*Weights of each layer.* The share of layer i is ``x r_i``, at least 1 and at most
``n_i``, where r_i is n_i under a uniform density and sum(shape) under
Erdos-Renyi-kernel, and x is the one number for which the shares add up to ``d N``,
which need not be whole. Their floors, and one weight more for the layers with the
largest fractional parts (ties: the lowest layer) until there are ``floor(d N)``.

*Broken numbers.* One weight or momentum that is not finite, active or missing: the
cycle does not take place.

*A training step.* The inner optimizer sees ``where(mask & ~pruned, params, 0)`` with
the mask after the cycle, and the dense gradient. A weight that stays or grows from
missing receives the inner update, one that was pruned in this cycle or is missing
receives ``-params``.
"""

import itertools
from fractions import Fraction

import numpy as np


# --- selection ----------------------------------------------------------------------
def top_k(scores, k):
    """Masks of the ``k`` largest of all ``scores``, a list of arrays, as one pool."""
    flat = np.concatenate([np.ravel(s).astype(np.float64) for s in scores])
    nan = np.isnan(flat)
    value = np.where(nan, np.inf, flat)
    order = np.lexsort((np.arange(flat.size), -value, ~nan))
    kept = np.zeros(flat.size, bool)
    kept[order[:k]] = True
    ends = np.cumsum([s.size for s in scores])[:-1]
    return [
        m.reshape(s.shape) for m, s in zip(np.split(kept, ends), scores, strict=True)
    ]


# --- budgets --------------------------------------------------------------------------
def shares(slopes, sizes, goal):
    """The exact shares. Between two bends of x their sum is a line."""

    def at(x):
        return [
            min(max(x * r, Fraction(1)), Fraction(n))
            for r, n in zip(slopes, sizes, strict=True)
        ]

    bends = {Fraction(b, r) for r, n in zip(slopes, sizes, strict=True) for b in (1, n)}
    for left, right in itertools.pairwise(sorted(bends)):
        low, high = sum(at(left)), sum(at(right))
        if low <= goal < high:
            return at(left + (right - left) * (goal - low) / (high - low))
    return [Fraction(n) for n in sizes]


def shared(slopes, sizes, goal):
    """Whole numbers of weights of each layer."""
    exact = shares(slopes, sizes, Fraction(goal))
    counts = [int(x) for x in exact]
    order = sorted(range(len(sizes)), key=lambda i: (counts[i] - exact[i], i))
    for i in order[: int(goal) - sum(counts)]:
        counts[i] += 1
    return counts


# --- sparse momentum: one cycle of Algorithm 1 ----------------------------------------
def contributions(masks, evidence):
    """``c_i``: the mean quantised ``|evidence|`` of every layer, with 7 more bits."""
    evidence = [m.astype(np.promote_types(m.dtype, np.float32)) for m in evidence]
    largest = max((np.abs(m).max() for m in evidence if m.size), default=0)
    means = []
    for mask, m in zip(masks, evidence, strict=True):
        over = mask if mask.any() else ~mask
        if largest == 0 or m.size == 0:
            means.append(0)
            continue
        units = np.floor(np.abs(m[over]) / largest * m.dtype.type(2**24))
        means.append(2**7 * sum(int(u) for u in units) // units.size)
    return means


def prune_counts(masks, c, rate):
    """``floor(p_i * nnz_i)`` with edge case 2 of the paper."""
    counts = []
    for mask, c_i in zip(masks, c, strict=True):
        p = Fraction(float(np.float32(rate)))
        nnz = int(mask.sum())
        sparsity = Fraction(mask.size - nnz, max(mask.size, 1))
        if sparsity < Fraction(1, 5) and c_i * len(c) > sum(c):
            p = min(p, sparsity)
        counts.append(int(p * nnz))
    return counts


def spill(wanted, free):
    """Edge case 1: what exceeds the free places is spread equally over the others."""
    grown = [min(w, f) for w, f in zip(wanted, free, strict=True)]
    left = sum(wanted) - sum(grown)
    while left:
        room = [i for i in range(len(free)) if grown[i] < free[i]]
        share = left // len(room)
        for i in room if share else room[:left]:
            given = min(max(share, 1), free[i] - grown[i])
            grown[i] += given
            left -= given
    return grown


def regrow_counts(total, c, removed, free):
    """The ``total`` removed weights, divided over the layers by contribution."""
    if sum(c) == 0:
        return list(removed)
    exact = [Fraction(total * c_i, sum(c)) for c_i in c]
    grown = [int(e) for e in exact]
    by_fraction = sorted(range(len(c)), key=lambda i: (grown[i] - exact[i], i))
    for i in by_fraction[: total - sum(grown)]:
        grown[i] += 1
    return spill(grown, free)


def sparse_momentum_cycle(params, masks, momentum, rate):
    """One cycle on lists of arrays: ``(masks, removed, grown, pruned)``.

    ``pruned`` holds the masks of what was taken away, regrown or not. Where a number is
    not finite the masks come back as they were, with nothing removed.
    """
    if not all(np.isfinite(x).all() for x in [*params, *momentum]):
        zeros = [0] * len(masks)
        return masks, zeros, zeros, [np.zeros_like(m) for m in masks]
    c = contributions(masks, momentum)
    removed = prune_counts(masks, c, rate)
    free = [m.size - int(m.sum()) + r for m, r in zip(masks, removed, strict=True)]
    grown = regrow_counts(sum(removed), c, removed, free)
    new_masks, pruned = [], []
    for w, mask, m, r, g in zip(params, masks, momentum, removed, grown, strict=True):
        score = np.where(mask, np.abs(w), -1.0)
        (kept,) = top_k([score], int(mask.sum()) - r)
        (grow,) = top_k([np.where(kept, -1.0, np.abs(m))], g)
        new_masks.append(kept | grow)
        pruned.append(mask & ~kept)
    return new_masks, removed, grown, pruned


# --- optimizers on lists of float64 arrays --------------------------------------------
def sgd_step(grads, traces, lr, beta, nesterov):
    """Heavy-ball or PyTorch-style Nesterov momentum: ``(updates, traces)``."""
    traces = [g + beta * z for g, z in zip(grads, traces, strict=True)]
    steps = traces
    if nesterov:
        steps = [g + beta * z for g, z in zip(grads, traces, strict=True)]
    return [-lr * s for s in steps], traces


def train_sparse_momentum(
    params, masks, grads, *, period, stop, rate, lr, beta, nesterov, decay
):
    """Sparse momentum over ``len(grads)`` steps; every list element is one layer.

    ``rate(count)`` is the prune rate, ``grads[t]`` the dense gradients of step t.
    Yields after each step ``(params, masks, traces, removed, grown)``, removed and
    grown of the last cycle.
    """
    traces = [np.zeros_like(p) for p in params]
    removed = grown = [0] * len(params)
    for count, step_grads in enumerate(grads):
        pruned = [np.zeros_like(m) for m in masks]
        if count > 0 and count % period == 0 and (stop is None or count < stop):
            masks, removed, grown, pruned = sparse_momentum_cycle(
                params, masks, traces, rate(count)
            )
        moves = [m & ~gone for m, gone in zip(masks, pruned, strict=True)]
        seen = [np.where(m, p, 0.0) for m, p in zip(moves, params, strict=True)]
        decayed = [g + decay * p for g, p in zip(step_grads, seen, strict=True)]
        updates, traces = sgd_step(decayed, traces, lr, beta, nesterov)
        params = [
            np.where(m, p + u, 0.0)
            for m, p, u in zip(moves, params, updates, strict=True)
        ]
        yield params, masks, traces, removed, grown


# --- GSM ----------------------------------------------------------------------------
def gsm_pass(grads, weights, q):
    """B: 1 for the ``q`` largest ``|g * w|`` of the network; zeros never pass."""
    saliency = [np.abs(g * w) for g, w in zip(grads, weights, strict=True)]
    if q == sum(s.size for s in saliency):
        return [np.ones(s.shape, bool) for s in saliency]
    passing = top_k(saliency, q)
    return [b & (s != 0) for b, s in zip(passing, saliency, strict=True)]


def train_gsm(
    weights, biases, gradient, *, steps, q, lr, beta, eta, nesterov, settle_start=None
):
    """``Z <- beta Z + eta W + B dL/dW; W <- W - alpha Z``; biases by ordinary SGD.

    ``gradient(t, arrays)`` gives the gradients of weights and biases. ``q`` weights
    pass each step; from ``settle_start = (step, kept)`` on the mask is the ``kept``
    largest ``|w|`` of that step. Yields ``(weights, biases, passing)``.
    """
    n = len(weights)
    arrays = [*weights, *biases]
    traces = [np.zeros_like(a) for a in arrays]
    settled = None
    for t in range(steps):
        grads = gradient(t, arrays)
        passing = gsm_pass(grads[:n], arrays[:n], q)
        if settle_start is not None and t >= settle_start[0]:
            if settled is None:
                settled = top_k([np.abs(w) for w in arrays[:n]], settle_start[1])
            passing = settled
        decayed = [
            eta * w + np.where(b, g, 0.0)
            for w, b, g in zip(arrays[:n], passing, grads[:n], strict=True)
        ]
        updates, traces = sgd_step(decayed + grads[n:], traces, lr(t), beta, nesterov)
        arrays = [a + u for a, u in zip(arrays, updates, strict=True)]
        yield arrays[:n], arrays[n:], passing


def passive_log_decay(lr, beta, eta, steps, *, nesterov, decoupled=False):
    """``ln(w_0 / w_end)`` of one weight whose gradient never passes, by simulation."""
    w, z = 1.0, 0.0
    for t in range(steps):
        alpha = lr(t) if callable(lr) else lr
        g = 0.0 if decoupled else eta * w
        z = beta * z + g
        w = w - alpha * (g + beta * z if nesterov else z)
        if decoupled:
            w = w - alpha * eta * w
    return -np.log(abs(w))
