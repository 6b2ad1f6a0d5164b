"""How many bytes a sparse model takes in a file.

    python benchmarks/bench_files.py

Weights are random; so are the masks, and those of the last rows have dead rows and
columns, as masks of trained networks have. *Least* is what the kept values and
log2 C(n, k) bits of positions take, summed over the layers: no code of the positions of
random masks takes less. *Code* is what ``save_sparse`` takes without its header.
"""

import io
import math

import jax.numpy as jnp
import numpy as np

from sparse_optax import export

LENET = ((784, 300), (300, 100), (100, 10))
MLP = ((784, 1000), (1000, 500), (500, 100), (100, 10))
CONV = ((3, 3, 64, 128), (3, 3, 128, 256), (1024, 10))
BITS = {None: 32, "float16": 16, "int8": 8}


def network(shapes, density, dead, rng):
    """Weights and masks; ``dead`` is the share of rows and columns without weights."""
    params, masks = {}, {}
    for i, shape in enumerate(shapes):
        alive = np.ones(shape, bool)
        for axis, n in enumerate(shape):
            there = rng.random(n) >= dead
            alive &= np.expand_dims(there, [i for i in range(alive.ndim) if i != axis])
        places = np.flatnonzero(alive)
        kept = np.zeros(alive.size, bool)
        count = min(round(density * alive.size), len(places))
        kept[rng.permutation(places)[:count]] = True
        masks[f"Dense_{i}/kernel"] = kept.reshape(shape)
        weights = rng.normal(size=shape).astype(np.float32)
        params[f"Dense_{i}/kernel"] = np.where(masks[f"Dense_{i}/kernel"], weights, 0)
        params[f"Dense_{i}/bias"] = rng.normal(size=shape[-1]).astype(np.float32)
    return params, masks


def choices(n, k):
    """log2 C(n, k)."""
    lgamma = math.lgamma
    return (lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)) / math.log(2)


def compressed(params):
    """Bytes of ``np.savez_compressed``."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **params)
    return buffer.tell()


def sizes(params, masks, dtype):
    """Bytes of the file, of its code, and the least of the code."""
    whole = export.sparse_bytes(params, masks, dtype=dtype)
    rows = export.model.encode_leaves(params, masks, dtype, -1)
    code = sum(found.nbytes for found, _, mask in rows if mask is not None)
    least = 0.0
    for mask in masks.values():
        n, k = mask.size, int(mask.sum())
        scales = 32 * mask.shape[-1] if dtype == "int8" else 0
        least += min(BITS[dtype] * k + scales, 32 * k) + choices(n, k)
    return whole, code, least / 8


def rounded(params, masks, dtype):
    """Parameters as ``np.savez_compressed`` would get them; it has no int8."""
    if dtype != "float16":
        return params
    return {
        n: np.asarray(jnp.asarray(x, dtype)) if n in masks else x
        for n, x in params.items()
    }


def main():
    """Prints a table."""
    print(
        "| network | weights | density | dead | values | file | savez_compressed "
        "| code | least | over |"
    )
    print("|---|---:|---:|---:|---|---:|---:|---:|---:|---:|")
    rng = np.random.default_rng(0)
    rows = [("LeNet-300-100", LENET, d, 0) for d in (0.01, 0.05, 0.2)]
    rows += [("MLP", MLP, d, 0) for d in (0.01, 0.1, 0.5)]
    rows += [("convolutions", CONV, d, 0) for d in (0.05, 0.9)]
    rows += [("LeNet-300-100", LENET, 0.02, 0.5)]
    for name, shapes, density, dead in rows:
        params, masks = network(shapes, density, dead, rng)
        weights = sum(mask.size for mask in masks.values())
        for dtype in BITS:
            whole, code, least = sizes(params, masks, dtype)
            other = (
                ""
                if dtype == "int8"
                else (f"{compressed(rounded(params, masks, dtype)):,}")
            )
            print(
                f"| {name} | {weights:,} | {density:.0%} | {dead:.0%} "
                f"| {dtype or 'float32'} | {whole:,} | {other} "
                f"| {code:,} | {least:,.0f} | {code / least - 1:+.1%} |"
            )


if __name__ == "__main__":
    main()
