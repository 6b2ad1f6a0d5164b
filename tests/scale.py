"""Compiles a training update of a language model of 8B weights for many devices.

    python scale.py METHOD (Auto | Explicit) DEVICES [donate]

prints what the program needs, as one line of JSON; the methods are sgd, gsm,
sparse_momentum and whole_leaves. Nothing is allocated: parameters, gradients and
states are shapes, and the devices are CPU devices that never run.
"""

import json
import math
import os
import sys
import time
from typing import Any

LAYERS, WIDTH, INNER, KEYS, WORDS = 32, 4096, 14_336, 1024, 128_256
COLUMNS = 8  # devices along the second axis of the mesh


def shapes(*, merged):
    """The parameters; layers are stacked as `nn.scan` does.

    Where ``merged``, the two matrices of the gated unit are one leaf of 3.76e9 weights,
    which no int32 can count; else they are two of 1.88e9.
    """
    gate = {"gate_up": {"kernel": (LAYERS, WIDTH, 2 * INNER)}}
    if not merged:
        gate = {name: {"kernel": (LAYERS, WIDTH, INNER)} for name in ("gate", "up")}
    return {
        "embed": {"embedding": (WORDS, WIDTH)},
        "head": {"kernel": (WIDTH, WORDS)},
        "layers": {
            "attention": {
                "key_value": {"kernel": (LAYERS, WIDTH, 2 * KEYS)},
                "out": {"kernel": (LAYERS, WIDTH, WIDTH)},
                "query": {"kernel": (LAYERS, WIDTH, WIDTH)},
            },
            "mlp": {"down": {"kernel": (LAYERS, INNER, WIDTH)}, **gate},
            "norm": {"scale": (2 * LAYERS, WIDTH)},
        },
        "norm": {"scale": (WIDTH,)},
    }


# Each slice along axis 0 is a layer of its own.
STACKED = {
    f"layers/{name}/kernel": 0
    for name in (
        "attention/key_value",
        "attention/out",
        "attention/query",
        "mlp/down",
        "mlp/gate_up",
    )
}


def main(method, kind, devices, donate):
    """Compiles one update; it needs a process in which JAX has not started yet."""
    flag = f"--xla_force_host_platform_device_count={devices}"
    os.environ["XLA_FLAGS"] = flag
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"

    import jax
    import jax.numpy as jnp
    import mesh_helpers
    import optax
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    import sparse_optax

    def is_shape(x):
        return isinstance(x, tuple)

    mesh = jax.make_mesh(
        (devices // COLUMNS, COLUMNS),
        ("fsdp", "tensor"),
        axis_types=(AxisType[kind],) * 2,
    )
    everywhere = NamedSharding(mesh, P())

    def abstract(shape):
        spec = (None, *(("fsdp", "tensor") if len(shape) > 1 else ("tensor",)))
        spec = P(*spec[-len(shape) :])
        sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    tree = shapes(merged=method != "whole_leaves")
    params = jax.tree.map(abstract, tree, is_leaf=is_shape)
    places = {
        jax.tree_util.keystr(path): (x.shape, x.sharding)
        for path, x in jax.tree_util.tree_leaves_with_path(params)
    }

    def on_mesh(path, x):
        """A leaf of the state is placed as its parameter, all else is everywhere."""
        for i in range(len(path)):
            shape, sharding = places.get(jax.tree_util.keystr(path[i:]), ((), None))
            if sharding is not None and shape == x.shape:
                return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere)

    sgd = optax.sgd(0.1, momentum=0.9)

    def regrow(stacked):
        return sparse_optax.sparse_momentum_regrow(
            sgd,
            density=0.5,
            update_period=100,
            update_stop=10_000,
            key=0,
            stacked=stacked,
        )

    tx = {
        "sgd": lambda: sgd,
        "gsm": lambda: optax.chain(
            sparse_optax.gsm_mask(density=0.5),  # 3.7e9 weights pass
            optax.add_decayed_weights(1e-4, mask=sparse_optax.eligible),
            sgd,
        ),
        "sparse_momentum": lambda: regrow(STACKED),
        "whole_leaves": lambda: regrow(None),
    }[method]()

    def update(gradient, state, params):
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    with jax.set_mesh(mesh):
        state = jax.tree_util.tree_map_with_path(
            on_mesh, jax.eval_shape(tx.init, params)
        )
        start = time.perf_counter()
        given = (1, 2) if donate else ()
        lowered = jax.jit(update, donate_argnums=given).lower(params, state, params)
        middle = time.perf_counter()
        program = lowered.compile()
        end = time.perf_counter()
    memory: Any = program.memory_analysis()
    sizes = [math.prod(x.shape) for x in jax.tree.leaves(params)]
    return {
        "method": method,
        "kind": kind,
        "devices": devices,
        "donate": bool(donate),
        "weights": sum(sizes),
        "largest_leaf": max(sizes),
        "lower_seconds": round(middle - start, 2),
        "compile_seconds": round(end - middle, 2),
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "collectives": mesh_helpers.collectives(program),
    }


if __name__ == "__main__":
    _, chosen, axes, number, *rest = sys.argv
    print(json.dumps(main(chosen, axes, int(number), rest == ["donate"])))
