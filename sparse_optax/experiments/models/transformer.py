"""A small transformer that predicts the next character of a text.

Shapes use ``b`` for the batch, ``t`` for the characters of a window, ``v`` for the
characters of the alphabet, ``d`` for the width.

References:
  Vaswani et al., `Attention is all you need <https://arxiv.org/abs/1706.03762>`_, 2017;
  Xiong et al., `On layer normalization in the transformer architecture
  <https://arxiv.org/abs/2002.04745>`_, 2020, for the norms before the layers; Press &
  Wolf, `Using the output embedding to improve language models
  <https://arxiv.org/abs/1608.05859>`_, 2017, for the tied embeddings.
"""

import jax
import jax.numpy as jnp
from flax import nnx

_normal = nnx.initializers.normal(0.02)


def _dense(inputs: int, outputs: int, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(inputs, outputs, kernel_init=_normal, rngs=rngs)


class Layer(nnx.Module):
    """Causal self-attention and a two-layer network, each behind a layer norm.

    Args:
      width: features of a character, a multiple of ``heads``.
      heads: heads of the attention.
      rngs: random keys of the initial weights.
    """

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        """Draws the four kernels."""
        self.heads = heads
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.qkv = _dense(width, 3 * width, rngs)
        self.out = _dense(width, width, rngs)
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.up = _dense(width, 4 * width, rngs)
        self.down = _dense(4 * width, width, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Features of shape (b, t, d)."""
        b, t, d = x.shape
        parts = jnp.split(self.qkv(self.norm1(x)), 3, axis=-1)
        q, k, v = (y.reshape(b, t, self.heads, d // self.heads) for y in parts)
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.reshape(b, t, d))
        return x + self.down(jax.nn.gelu(self.up(self.norm2(x))))


class Transformer(nnx.Module):
    """A pre-norm transformer whose output layer is its table of embeddings.

    With the defaults and an alphabet of 103 characters it has 786,432 weights in 16
    kernels, besides its embeddings, and 822,912 parameters in all.

    Args:
      in_shape: shape of one text, (t,): the longest window.
      classes: characters of the alphabet.
      width: features of a character, a multiple of ``heads``.
      depth: layers.
      heads: heads of the attention.
      init: taken and not used: kernels are normal with deviation 0.02.
      rngs: random keys of the initial weights.

    Raises:
      ValueError: where the width is no multiple of the heads.

    Examples:
      >>> import jax
      >>> from flax import nnx
      >>> from sparse_optax.experiments.models.transformer import Transformer
      >>> model = Transformer((16,), 30, width=8, depth=1, heads=2, rngs=nnx.Rngs(0))
      >>> model(jax.numpy.zeros((2, 16), int)).shape
      (2, 16, 30)
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        classes: int,
        *,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        init: str = "torch",
        rngs: nnx.Rngs,
    ):
        """Draws all layers."""
        del init
        if width % heads:
            raise ValueError(
                f"Transformer: width={width} must be a multiple of heads={heads}."
            )
        self.characters = nnx.Embed(classes, width, embedding_init=_normal, rngs=rngs)
        self.positions = nnx.Embed(
            in_shape[0], width, embedding_init=_normal, rngs=rngs
        )
        names = [f"layer{number}" for number in range(1, depth + 1)]
        for name in names:
            setattr(self, name, Layer(width, heads, rngs=rngs))
        self.names = tuple(names)
        self.norm = nnx.LayerNorm(width, rngs=rngs)

    def __call__(self, texts: jax.Array) -> jax.Array:
        """Logits of shape (b, t, v) of the characters that come next.

        Args:
          texts: numbers of characters, whole, shape (b, t).

        Returns:
          The logits; those at a place depend on the characters up to there only.
        """
        places = jnp.arange(texts.shape[1])
        x = self.characters(texts) + self.positions(places)[None]
        for name in self.names:
            x = getattr(self, name)(x)
        return self.characters.attend(self.norm(x))
