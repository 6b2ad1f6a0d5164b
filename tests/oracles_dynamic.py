r"""The dynamic methods' definitions in plain NumPy, besides those in ``oracles``.

Conventions, where a definition leaves a choice. The order of scores and ties is that of
``oracles``: of equal scores the lower layer, then the lower flat index wins; so of
equally small weights the one with the highest index goes first.

*Rates.* ``floor(p * n)`` in exact rational arithmetic on the float32 that p is.

*Growth by unit.* The units of a layer are the slices along its last axis. Every ``|m|``
of a layer becomes ``floor(|m| / max|m| * 2**24)``, the maximum over the layer; a unit's
share is the floored mean of these, with 7 more bits, over all its weights. All shares
zero: units share in proportion to their room. What a unit has no room for spills as in
``oracles.spill``.

*SET.* An active weight of exactly zero counts among the positive ones.

*Global pruning.* A layer that has active weights keeps the largest of them. The other
active weights are one pool.

*DSR.* As many weights go as are under the threshold, but a layer keeps its largest.
The threshold is compared with the number that went.

*DEEP-R.* A weight whose new value has the wrong sign becomes exactly zero; at the next
update it leaves, if there is room elsewhere for as many as leave.
"""

from fractions import Fraction

import numpy as np
from oracles import spill, top_k


def floor_rate(rate, n):
    """``floor(rate * n)`` for the float32 that the rate is."""
    return int(Fraction(float(np.float32(rate))) * int(n))


def apportion(total, shares, free):
    """A total in proportion to shares, largest remainders, within the free places."""
    shares = [int(s) for s in shares]
    if sum(shares) == 0:
        shares = [int(f) for f in free]
    if sum(shares) == 0:
        return [0] * len(shares)
    exact = [Fraction(int(total) * s, sum(shares)) for s in shares]
    given = [int(e) for e in exact]
    order = sorted(range(len(exact)), key=lambda i: (given[i] - exact[i], i))
    for i in order[: int(total) - sum(given)]:
        given[i] += 1
    return spill(given, [int(f) for f in free])


def largest(values, allowed, counts):
    """In each layer the ``counts`` largest ``|values|`` of the allowed places."""
    return [
        top_k([np.where(a, np.abs(v), -1.0)], k)[0] & a
        for v, a, k in zip(values, allowed, counts, strict=True)
    ]


def smallest_go(params, masks, counts):
    """Each layer without its ``counts`` smallest active weights."""
    stay = [int(m.sum()) - k for m, k in zip(masks, counts, strict=True)]
    return largest(params, masks, stay)


# --- sparse momentum's mixtures -------------------------------------------------------
def unit_counts(momentum, missing, total):
    """How many of ``total`` new weights each unit of a layer gets."""
    m = np.abs(momentum.astype(np.promote_types(momentum.dtype, np.float32)))
    units = m.shape[-1]
    top = m.max() if m.size and m.max() > 0 else m.dtype.type(1)
    whole = np.floor(m / top * m.dtype.type(2**24)).reshape(-1, units)
    shares = [2**7 * sum(int(x) for x in whole[:, u]) for u in range(units)]
    shares = [s // max(whole.shape[0], 1) for s in shares]
    free = missing.reshape(-1, units).sum(axis=0)
    return apportion(total, shares, free)


def grow_by_unit(momentum, missing, total):
    """Mask of the new weights: in each unit those of largest ``|m|``."""
    new = np.zeros_like(missing)
    for u, k in enumerate(unit_counts(momentum, missing, total)):
        allowed = missing[..., u]
        (new[..., u],) = largest([momentum[..., u]], [allowed], [k])
    return new


# --- SET ------------------------------------------------------------------------------
def two_sided(weights, mask, zeta):
    """One layer's mask without its smallest positive and largest negative weights."""
    keep = np.zeros_like(mask)
    for side in (mask & (weights >= 0), mask & (weights < 0)):
        stay = int(side.sum()) - floor_rate(zeta, side.sum())
        keep |= largest([weights], [side], [stay])[0]
    return keep


# --- RigL, ITOP, GraNet ---------------------------------------------------------------
def rigl_cycle(params, masks, gradients, rate):
    """``(masks, kept)``: in each layer the smallest go, the largest gradients come."""
    counts = [floor_rate(rate, m.sum()) for m in masks]
    kept = smallest_go(params, masks, counts)
    new = largest(gradients, [~m for m in kept], counts)
    return [k | n for k, n in zip(kept, new, strict=True)], kept


def grow_unexplored(gradients, kept, explored, counts):
    """By gradient: places never active first, then any other missing one."""
    new = []
    for g, k, e, n in zip(gradients, kept, explored, counts, strict=True):
        fresh = ~k & ~e
        first = min(n, int(fresh.sum()))
        (a,) = largest([g], [fresh], [first])
        (b,) = largest([g], [~k & ~a], [n - first])
        new.append(a | b)
    return new


def targets(density, final_density, final, sizes):
    """``c_i + floor(x (n_i - c_i))``, x from 1 at density 1 to 0 at the final one."""
    end = np.float32(final_density)
    x = (np.float32(density) - end) / (np.float32(1) - end)
    x = np.clip(x, np.float32(0), np.float32(1))
    return [c + floor_rate(x, n - c) for c, n in zip(final, sizes, strict=True)]


def granet_cycle(params, masks, gradients, rate, target):
    """``(masks, kept)`` of one cycle of GraNet within layers."""
    active = [int(m.sum()) for m in masks]
    lost = [
        floor_rate(rate, min(a, t)) + max(a - t, 0)
        for a, t in zip(active, target, strict=True)
    ]
    kept = smallest_go(params, masks, lost)
    counts = [t - int(k.sum()) for k, t in zip(kept, target, strict=True)]
    new = largest(gradients, [~k for k in kept], counts)
    return [k | n for k, n in zip(kept, new, strict=True)], kept


# --- one pool over all layers ---------------------------------------------------------
def granet_mixed_cycle(params, masks, gradients, rate, total):
    """Masks after a prune in one pool and an exchange within each layer."""
    above = max(sum(int(m.sum()) for m in masks) - total, 0)
    left = global_prune(params, masks, above)
    counts = [floor_rate(rate, m.sum()) for m in left]
    stay = smallest_go(params, left, counts)
    new = largest(gradients, [~m for m in stay], counts)
    return [s | n for s, n in zip(stay, new, strict=True)]


def global_prune(params, masks, total):
    """Masks without the ``total`` smallest active weights of the network."""
    safe = largest(params, masks, [min(1, int(m.sum())) for m in masks])
    pool = [m & ~s for m, s in zip(masks, safe, strict=True)]
    scores = [np.where(p, np.abs(w), -1.0) for w, p in zip(params, pool, strict=True)]
    stay = max(sum(int(p.sum()) for p in pool) - total, 0)
    rest = top_k(scores, stay)
    return [s | (r & p) for s, r, p in zip(safe, rest, pool, strict=True)]


def global_grow(values, missing, total):
    """Masks of the ``total`` missing weights of largest ``|value|`` of the network."""
    scores = [
        np.where(m, np.abs(v), -1.0) for v, m in zip(values, missing, strict=True)
    ]
    return [t & m for t, m in zip(top_k(scores, total), missing, strict=True)]


# --- DSR ------------------------------------------------------------------------------
def under_threshold(params, masks, threshold, wanted, tolerance):
    """``(kept, removed, threshold)`` after the prune of one DSR cycle."""
    kept, removed = [], []
    for w, m in zip(params, masks, strict=True):
        stay = m & (np.abs(w) >= np.float32(threshold))
        if m.any() and not stay.any():
            (stay,) = largest([w], [m], [1])
        kept.append(stay)
        removed.append(int(m.sum() - stay.sum()))
    band = Fraction(float(np.float32(tolerance)))
    if sum(removed) > (1 + band) * wanted:
        threshold = threshold / 2
    elif sum(removed) < (1 - band) * wanted:
        threshold = threshold * 2
    return kept, removed, threshold


def dsr_grown(kept, removed):
    """How many grow in each layer: in proportion to what survived."""
    free = [int((~k).sum()) for k in kept]
    return apportion(sum(removed), [int(k.sum()) for k in kept], free)


# --- DEEP-R ---------------------------------------------------------------------------
def rewiring_step(weights, moves, positive, update, decay, noise):
    """New weights: the step, its L1 and its noise, and zero across the sign.

    ``decay`` is eta * l1, ``noise`` is drawn with deviation sqrt(2 eta T).
    """
    sign = np.where(positive, 1, -1).astype(weights.dtype)
    new = weights + update - decay * sign + noise
    return np.where(moves & (sign * new > 0), new, 0)


def dormant(weights, mask):
    """How many active weights of a layer leave: as many as are zero and have room."""
    return min(int((mask & (weights == 0)).sum()), int((~mask).sum()))
