"""Shared by the schedules: progress between two counts, and exact ends."""

from typing import Any

import jax
import jax.numpy as jnp


def progress(count: Any, start: Any, stop: Any) -> jax.Array:
    """Fraction of the way from start to stop, float32 in [0, 1]."""
    count = jnp.asarray(count)
    # Subtracted and compared as integers: a float32 is not exact past 2**24.
    part = (count - start).astype(jnp.float32) / jnp.float32(stop - start)
    # A compiler may multiply by 1 / (stop - start), so that the quotient at ``stop`` is
    # just below one: the end is compared as integers too.
    return jnp.where(count >= stop, 1.0, jnp.clip(part, 0.0, 1.0)).astype(jnp.float32)


def blend(first: Any, last: Any, weight: jax.Array, done: jax.Array) -> jax.Array:
    """Mean of two ends, with ``weight`` for the first; the ends are exact."""
    first, last = jnp.asarray(first, jnp.float32), jnp.asarray(last, jnp.float32)
    between = first * weight + last * (1.0 - weight)
    return jnp.where(done >= 1.0, last, jnp.where(done <= 0.0, first, between))
