"""The training program of ``test_checkpoints.py``: it goes on from where it was killed.

    python checkpoints.py train FOLDER METHOD STEPS EVERY
    python checkpoints.py resume FOLDER STEPS
    python checkpoints.py reshard FOLDER METHOD STEPS

``train`` saves a checkpoint every few steps, tells of each step on its output and at
the end leaves ``result.npz``. ``resume`` takes up every method of FOLDER. ``reshard``
puts a checkpoint on a mesh of eight devices and replays ``gradients.npz``.
"""

import itertools
import os
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import sparse_optax
from sparse_optax import regrowth

SIZES = (24, 32, 8)
PERIOD, LAST = 4, 400


def sparse_momentum(density=0.25, *, momentum=0.9):
    return sparse_optax.sparse_momentum_regrow(
        optax.sgd(0.2, momentum=momentum, nesterov=momentum is not None),
        density=density,
        update_period=PERIOD,
        update_stop=LAST,
        key=0,
    )


def own_momentum(density=0.25):
    """The average of the gradient is the engine's own."""
    return sparse_momentum(density, momentum=None)


def random_growth(density=0.25):
    """Keys matter, and the inner optimizer keeps two moments."""
    return regrowth.regrow(
        optax.adam(3e-3),
        prune=regrowth.prune.magnitude,
        redistribute=regrowth.redistribute.nonzeros,
        grow=regrowth.grow.random,
        density=density,
        update_period=PERIOD,
        update_stop=LAST,
        key=7,
    )


def gsm(density=0.25):
    """The mask is fixed half-way through what a resumed run does."""
    return sparse_optax.gsm(
        0.1, density, momentum=0.9, weight_decay=5e-3, settle_start=60
    )


METHODS = {
    "sparse_momentum": sparse_momentum,
    "own_momentum": own_momentum,
    "random_growth": random_growth,
    "gsm": gsm,
}


def first_params():
    rng = np.random.default_rng(0)
    return {
        f"Dense_{i}": {
            "bias": jnp.zeros(n),
            "kernel": jnp.asarray(rng.normal(0, (2 / m) ** 0.5, (m, n)), jnp.float32),
        }
        for i, (m, n) in enumerate(itertools.pairwise(SIZES))
    }


def loss(params, images, labels):
    x = images
    for i in range(len(params)):
        layer = params[f"Dense_{i}"]
        x = (jax.nn.relu(x) if i else x) @ layer["kernel"] + layer["bias"][None]
    return optax.softmax_cross_entropy_with_integer_labels(x, labels).mean()


def batch(t):
    """The batch of step ``t``: a resumed run sees what an unbroken one would."""
    rng = np.random.default_rng((1, t))
    labels = rng.integers(0, SIZES[-1], 32)
    centres = np.random.default_rng(2).normal(size=(SIZES[-1], SIZES[0]))
    images = centres[labels] + rng.normal(size=(32, SIZES[0]))
    return images.astype(np.float32), labels


def start(tx):
    params = first_params()
    return {"params": params, "opt_state": tx.init(params)}


def stepper(tx):
    """A jitted step ``(run, gradient) -> run``."""

    @jax.jit
    def step(run, gradient):
        updates, state = tx.update(gradient, run["opt_state"], run["params"])
        params = optax.apply_updates(run["params"], updates)
        return {"params": params, "opt_state": state}

    return step


_gradient = jax.jit(jax.grad(loss))


def gradient(run, t):
    return _gradient(run["params"], *batch(t))


def train(tx, run, first, last):
    """Steps ``first`` up to ``last``; gives the run and every gradient on the way."""
    step, gradients = stepper(tx), []
    for t in range(first, last):
        gradients.append(gradient(run, t))
        run = step(run, gradients[-1])
    return run, gradients


def manager(folder):
    return ocp.CheckpointManager(
        pathlib.Path(folder).absolute(),
        options=ocp.CheckpointManagerOptions(
            max_to_keep=2, enable_async_checkpointing=False
        ),
    )


def save(folder, step, run):
    with manager(folder) as checkpoints:
        checkpoints.save(step, args=ocp.args.StandardSave(run))


def restore(folder, like):
    """The newest finished checkpoint: ``(step, run)``.

    It has the structure, the types and the placement of ``like``.
    """
    with manager(folder) as checkpoints:
        return _restore(checkpoints, like)


def _restore(checkpoints, like):
    step = checkpoints.latest_step()
    if step is None:
        return 0, like
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    return step, checkpoints.restore(step, args=ocp.args.StandardRestore(abstract))


def flat(run):
    """All arrays of a run by their path, masks, counters and keys included."""
    return {
        jax.tree_util.keystr(path): np.asarray(x)
        for path, x in jax.tree_util.tree_leaves_with_path(run)
    }


def write(path, arrays):
    """All or nothing: a kill leaves no half of a file under this name."""
    partial = path.with_name("partial.npz")
    np.savez(partial, **arrays)
    os.replace(partial, path)


def main_train(folder, method, last, every):
    def tell(event, t):
        print(event, t, flush=True)

    tx = METHODS[method]()
    run, step = start(tx), stepper(tx)
    with manager(folder / "checkpoints") as checkpoints:
        first, run = _restore(checkpoints, run)
        tell("restored", first)
        for t in range(first, last):
            run = step(run, gradient(run, t))
            tell("step", t + 1)
            if (t + 1) % every == 0:
                tell("saving", t + 1)
                checkpoints.save(t + 1, args=ocp.args.StandardSave(run))
                tell("saved", t + 1)
    write(folder / "result.npz", flat(run))
    tell("finished", last)


def main_resume(folder, last):
    for method, make in METHODS.items():
        tx = make()
        first, run = restore(folder / method, start(tx))
        assert first > 0, f"no checkpoint of {method}"
        run, _ = train(tx, run, first, last)
        write(folder / f"{method}.npz", flat(run))


def main_reshard(folder, method, last):
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    mesh = jax.make_mesh((4, 2), ("x", "y"))

    def place(x):
        spec = P("x", "y") if x.ndim == 2 and x.shape[0] % 4 == 0 else P()
        return jax.device_put(x, NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        tx = METHODS[method]()
        # Masks and moments lie as their parameters do, and all else on every device.
        like = jax.tree.map(place, start(tx))
        first, run = restore(folder / method, like)
        kernels = {path: x for path, x in shards(run).items() if "kernel']" in path}
        whole = {path for path, part in kernels.items() if part[0] == part[1]}
        assert not any("['params']" in path for path in whole), whole
        with np.load(folder / "gradients.npz") as recorded:
            arrays = [recorded[name] for name in recorded.files]
        gradients = jax.tree.unflatten(jax.tree.structure(run["params"]), arrays)
        step, trail = stepper(tx), {}
        for t in range(last - first):
            now = jax.tree.map(lambda g, t=t: place(jnp.asarray(g[t])), gradients)
            run = step(run, now)
            trail |= {f"{t}{path}": x for path, x in flat(run).items()}
        assert shards(run) == shards(like)
        write(folder / f"{method}_on_mesh.npz", trail)


def shards(run):
    """``{path: (shape of a leaf, of its part on one device)}``."""
    return {
        jax.tree_util.keystr(path): (x.shape, x.sharding.shard_shape(x.shape))
        for path, x in jax.tree_util.tree_leaves_with_path(run)
    }


if __name__ == "__main__":
    command, folder, *rest = sys.argv[1:]
    programs = {"train": main_train, "resume": main_resume, "reshard": main_reshard}
    programs[command](
        pathlib.Path(folder), *(int(x) if x.isdigit() else x for x in rest)
    )
