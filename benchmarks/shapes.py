"""Shapes of ResNet-50, for benchmarks that need the tree and not the network."""

import jax
import jax.numpy as jnp


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

    def array(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    *convs, dense = resnet50_kernels()
    params = {"fc": {"kernel": array(*dense), "bias": array(dense[-1])}}
    for number, shape in enumerate(convs, 1):
        params[f"conv{number:02}"] = {"kernel": array(*shape)}
        scale_and_shift = {"scale": array(shape[-1]), "bias": array(shape[-1])}
        params[f"norm{number:02}"] = scale_and_shift
    return params
