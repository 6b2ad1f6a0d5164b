"""Tools of pruning criteria, each of which is a score for every weight.

Criteria are in ``methods``; ``masks.score_masks`` makes masks of scores.

- ``batches``: statistics of a loss, summed over batches or examples.
- ``curvature``: the diagonal of a loss's curvature, and a saliency from it.
- ``inputs``: what the layers of a network are given, read from its program.
- ``layerwise``: pruning layer by layer, each with its inputs so far.
- ``rounds``: pruning in rounds: a little, score what is left, a little more.
- ``sweep``: pruning of a layer input by input, with corrections of later inputs.
"""
