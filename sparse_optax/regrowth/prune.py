"""Prune rules: which active weights stay."""

import jax
import jax.numpy as jnp

from sparse_optax import masks
from sparse_optax.regrowth.rules import (
    Evidence,
    axes_of,
    layer_vector,
    require,
    split_layers,
    stateless,
)


def _active_magnitude(weight: jax.Array, mask: jax.Array) -> jax.Array:
    # Below every magnitude, so that a missing weight is never among the kept.
    return jnp.where(mask, jnp.abs(weight), -1.0)


def _magnitude(evidence: Evidence) -> tuple[jax.Array, ...]:
    axes = axes_of(evidence)
    active = require(evidence, "active", rule="prune.magnitude")
    counts = require(evidence, "counts", rule="prune.magnitude")
    stay = layer_vector(active) - layer_vector(counts)
    return tuple(
        masks.select(
            list(zip(evidence.params, evidence.masks, strict=True)),
            split_layers(stay, evidence.masks, axes),
            axes,
            _active_magnitude,
        )
    )


#: Removes the ``counts`` active weights of smallest magnitude in each layer. Of
#: equal magnitudes the lowest index stays.
magnitude = stateless(_magnitude, exact=True)
