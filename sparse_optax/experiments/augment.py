"""Random crops and flips of training images, on the device.

Shapes use ``b`` for the batch, ``h`` and ``w`` for the image, ``c`` for channels.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

# Pixels that an image is padded by on each side before it is cropped.
PADDING = 4
KINDS = ("none", "reflect", "zero")


def augment(
    key: jax.Array, images: jax.Array, kind: str, black: Sequence[float] = ()
) -> jax.Array:
    """Pads by 4 pixels, crops to the old size at random, and mirrors every other image.

    Each image has its own crop, of the 81 that there are, and its own coin.

    Args:
      key: random key.
      images: shape (b, h, w, c).
      kind: ``"reflect"`` pads with the mirrored border, ``"zero"`` with black pixels,
        ``"none"`` changes nothing.
      black: what a black pixel is after normalisation, one number a channel; for
        ``"zero"``.

    Returns:
      Images of the same shape.

    Raises:
      ValueError: for another kind.

    Examples:
      >>> import jax
      >>> from sparse_optax.experiments.augment import augment
      >>> images = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
      >>> augment(jax.random.key(1), images, "reflect").shape
      (2, 32, 32, 3)
    """
    if kind not in KINDS:
        raise ValueError(f"augment: kind={kind!r}; choose one of {', '.join(KINDS)}.")
    if kind == "none":
        return images
    pads = ((0, 0), (PADDING, PADDING), (PADDING, PADDING), (0, 0))
    if kind == "reflect":
        padded = jnp.pad(images, pads, mode="reflect")
    else:  # a border of zeros around what is measured from black
        shade = jnp.asarray(black, images.dtype)[None, None, None]
        padded = jnp.pad(images - shade, pads) + shade
    crops, flips = jax.random.split(key)
    count, *shape = images.shape
    starts = jax.random.randint(crops, (count, 2), 0, 2 * PADDING + 1)
    mirrored = jax.random.bernoulli(flips, 0.5, (count,))

    def one(image, start, mirror):
        crop = jax.lax.dynamic_slice(image, (start[0], start[1], 0), shape)
        return jnp.where(mirror, crop[:, ::-1], crop)

    return jax.vmap(one)(padded, starts, mirrored)
