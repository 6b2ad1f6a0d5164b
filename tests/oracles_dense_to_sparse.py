r"""Dense-to-sparse methods in plain NumPy, from the papers' definitions.

Conventions, beside those of ``oracles``:

*Order.* The largest first; of equal values the lowest flat index.

*Density.* A schedule value d asks, of a layer with n weights that ends with c, for
``c + floor((d - D) / (1 - D) (n - c))`` weights, D the density of the end; 2**-22 is
added to d, which is known to a few places of a float32.

*Time.* A mask is made anew on the weights after k * period updates, before the next
one, where start <= k * period < stop. A weight that is pruned rests at zero for that
update, where nothing is kept behind it.

*Hidden.* Where weights are kept behind missing ones, all take the step of the dense
gradient, and what is shown is ``where(mask, w, 0)``.
"""

import math

import numpy as np
import oracles


def top(values, k):
    """The ``k`` largest of one layer."""
    (mask,) = oracles.top_k([values], k)
    return mask


def due(count, period, start, stop):
    return count > 0 and count % period == 0 and start <= count < stop


def target(d, end, n, c):
    """Weights of a layer on the way; exact at both ends."""
    if d <= end:
        return c
    return c + min(int((d + 2**-22 - end) / (1 - end) * (n - c)), n - c)


# --- schedules, as the papers write them ----------------------------------------------
def zhu_gupta(t, s_i, s_f, t0, n, dt):
    """Sparsity at t = t0, t0 + dt, ..., t0 + n dt; dense before, final afterwards."""
    if t < t0:
        return 0.0
    if t >= t0 + n * dt:
        return s_f
    return s_f + (s_i - s_f) * (1 - (t - t0) / (n * dt)) ** 3


def compressed(k, s, n):
    """Density after k of n prunes, each of the fraction 1 - (1 - s)^(1/n)."""
    density = 1.0
    for _ in range(k):
        density *= 1 - (1 - (1 - s) ** (1 / n))
    return density


def ac_dc_is_sparse(count, period, start, stop):
    """Alternates from the first due count, sparse first; the last due one is sparse."""
    counts = [t for t in range(stop) if due(t, period, start, stop)]
    done = [t for t in counts if t <= count]
    return bool(done) and (len(done) % 2 == 1 or done[-1] == counts[-1])


# --- training by heavy-ball momentum --------------------------------------------------
def train_pruned(weights, masks, grads, counts_at, *, lr, beta, reset=True):
    """Prunes by magnitude to ``counts_at(t)`` (None: nothing is due), or grows all.

    Yields ``(weights, masks)`` after each step. A weight that comes back starts from
    zero; with ``reset`` its momentum is set to zero as well.
    """
    traces = [np.zeros_like(w) for w in weights]
    for t, step in enumerate(grads):
        counts = counts_at(t)
        if counts is not None:
            new = []
            scores = [
                np.where(m, np.abs(w), -1) for w, m in zip(weights, masks, strict=True)
            ]
            for score, mask, k in zip(scores, masks, counts, strict=True):
                new.append(
                    np.ones_like(mask) if k == mask.size else top(score, k) & mask
                )
            back = [reset & n & ~m for m, n in zip(masks, new, strict=True)]
            traces = [np.where(b, 0.0, z) for b, z in zip(back, traces, strict=True)]
            masks = new
        traces = [g + beta * z for g, z in zip(step, traces, strict=True)]
        weights = [
            np.where(m, w - lr * z, 0.0)
            for w, m, z in zip(weights, masks, traces, strict=True)
        ]
        yield weights, masks


def spliced(weights, mask, k, ratio):
    """The k largest |w|, where the |w| of a missing weight counts ``ratio`` times."""
    score = np.where(mask, np.abs(weights), np.float32(ratio) * np.abs(weights))
    stay = top(score, k) & mask
    come = top(np.where(stay, -1.0, np.abs(weights)), k - int(stay.sum()))
    return stay | come


def train_hidden(weights, masks, grads, new_masks, *, lr, beta, moves=None):
    """All weights train behind masks that ``new_masks(t, weights, masks)`` makes.

    ``moves(weights, masks)`` are the weights that gradient and step reach (all where
    None), with the gradient of a penalty beside: ``(moves, penalties)``. Yields
    ``(weights, masks, shown)``.
    """
    traces = [np.zeros_like(w) for w in weights]
    for t, step in enumerate(grads):
        masks = new_masks(t, weights, masks)
        reach = [np.ones_like(m) for m in masks]
        if moves is not None:
            reach, penalties = moves(weights, masks)
            step = [g + p for g, p in zip(step, penalties, strict=True)]
        step = [np.where(r, g, 0.0) for r, g in zip(reach, step, strict=True)]
        traces = [g + beta * z for g, z in zip(step, traces, strict=True)]
        weights = [
            np.where(r, w - lr * z, w)
            for r, w, z in zip(reach, weights, traces, strict=True)
        ]
        shown = [np.where(m, w, 0.0) for w, m in zip(weights, masks, strict=True)]
        yield weights, masks, shown


def top_kast(weights, masks, d, backward, l2):
    """B is A and the largest others; l2 w on A, l2 w / D on the rest of B."""
    reach, penalties = [], []
    for w, a, k in zip(weights, masks, backward, strict=True):
        b = a | top(np.where(a, -1.0, np.abs(w)), k - int(a.sum()))
        reach.append(b)
        penalties.append(l2 * w * np.where(a, 1.0, np.where(b, 1 / d, 0.0)))
    return reach, penalties


# --- dynamic network surgery with the paper's thresholds ------------------------------
def surgery_thresholds(weights, c):
    """0.9 and 1.1 times max(mean + c std of |w| that is not zero, 0)."""
    values = np.abs(weights[weights != 0])
    middle = max(values.mean() + c * values.std(), 0.0)
    return 0.9 * middle, 1.1 * middle


def surgery_mask(weights, mask, a, b):
    """h: 0 below a, as it was from a on, 1 from b on."""
    size = np.abs(weights)
    return np.where(size < a, False, np.where(size < b, mask, True))


def probability(t, gamma, power):
    return math.pow(1 + gamma * t, -power)
