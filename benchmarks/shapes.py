"""Shapes of networks, for benchmarks that need the tree and not the network."""

import jax
import jax.numpy as jnp


def _array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def resnet50_kernels():
    """Shapes of the kernels of ResNet-50: 54 leaves, 25.5 million weights."""
    shapes, inputs = [(7, 7, 3, 64)], 64
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for block in range(blocks):
            shapes += [(1, 1, inputs, width), (3, 3, width, width)]
            shapes += [(1, 1, width, 4 * width)]
            shapes += [(1, 1, inputs, 4 * width)] * (block == 0)
            inputs = 4 * width
    return [*shapes, (2048, 1000)]


def resnet50():
    """All parameters of ResNet-50 as abstract float32 arrays, 161 leaves.

    Each convolution has batch norm with a scale and a shift, the last layer a bias.
    """
    *convs, dense = resnet50_kernels()
    params = {"fc": {"kernel": _array(*dense), "bias": _array(dense[-1])}}
    for number, shape in enumerate(convs, 1):
        params[f"conv{number:02}"] = {"kernel": _array(*shape)}
        scale_and_shift = {"scale": _array(shape[-1]), "bias": _array(shape[-1])}
        params[f"norm{number:02}"] = scale_and_shift
    return params


def transformer(layers=12, width=128, tokens=64):
    """All parameters of a small transformer as abstract float32 arrays: with 12 layers
    193 leaves, 2.4 million weights.
    """

    def dense(inputs, outputs):
        return {"kernel": _array(inputs, outputs), "bias": _array(outputs)}

    def norm():
        return {"scale": _array(width), "bias": _array(width)}

    params = {"embed": {"embedding": _array(tokens, width)}}
    for number in range(layers):
        block = {name: dense(width, width) for name in ("query", "key", "value", "out")}
        block |= {"up": dense(width, 4 * width), "down": dense(4 * width, width)}
        block |= {"norm1": norm(), "norm2": norm()}
        params[f"block{number:02}"] = block
    return params
