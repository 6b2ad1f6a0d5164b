"""Tools of pruning criteria, each of which is a score for every weight.

Criteria are in ``methods``; ``masks.score_masks`` makes masks of scores.

- ``batches``: statistics of a loss, summed over batches or examples.
- ``curvature``: the diagonal of a loss's curvature, and a saliency from it.
- ``rounds``: pruning in rounds: a little, score what is left, a little more.
"""
