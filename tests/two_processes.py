"""One of the processes of ``test_two_processes.py``, and what it shares with the test.

A small network learns handwritten digits on a mesh over all devices of all processes:
the rows of each kernel are sharded over the processes (FSDP), a batch over all devices.

    python two_processes.py FOLDER PORT RANK (train | resume)

FOLDER holds ``given.npz``; rank 0 leaves ``train.npz`` or ``resume.npz`` there.
"""

import functools
import itertools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import sparse_optax

PROCESSES, DEVICES = 2, 2
SIZES = (64, 96, 48, 10)
BATCH, EPOCH, STEPS, HALF = 144, 10, 60, 35
SEEDS = (0, 1, 2)
RECORDED_STEPS = 3 * EPOCH + 1
METHODS = ("gsm", "sparse_momentum")


def optimizer(method):
    if method == "gsm":
        return sparse_optax.gsm(0.1, density=0.2, momentum=0.9, weight_decay=5e-3)
    return sparse_optax.sparse_momentum_regrow(
        optax.sgd(0.2, momentum=0.9, nesterov=True),
        density=0.2,
        update_period=EPOCH,
        update_stop=STEPS,
        key=0,
    )


def first_params(seed):
    rng = np.random.default_rng(seed)
    return {
        f"Dense_{i}": {
            "bias": np.zeros(n, np.float32),
            "kernel": rng.normal(0, (2 / m) ** 0.5, (m, n)).astype(np.float32),
        }
        for i, (m, n) in enumerate(itertools.pairwise(SIZES))
    }


def logits(params, images):
    x = images
    for i in range(len(params)):
        layer = params[f"Dense_{i}"]
        x = (jax.nn.relu(x) if i else x) @ layer["kernel"] + layer["bias"][None]
    return x


def loss(params, images, labels):
    return optax.softmax_cross_entropy_with_integer_labels(
        logits(params, images), labels
    ).mean()


def batch(data, seed, t):
    rows = np.random.default_rng((seed, t)).integers(0, len(data["train_x"]), BATCH)
    return data["train_x"][rows], data["train_y"][rows]


class Training:
    """A method on a mesh, or with ``mesh=None`` on one device.

    Gradients and updates are programs of their own, so that updates can replay
    gradients that were recorded elsewhere.
    """

    def __init__(self, method, mesh=None):
        self.mesh = mesh
        self.tx = optimizer(method)
        places = self.sharding(P()), self.sharding(P("fsdp"))
        # Rows are sharded, whatever is one-dimensional is everywhere.
        self.places = jax.tree.map(lambda x: places[x.ndim > 1], first_params(0))
        self.gradient = jax.jit(
            jax.grad(loss), out_shardings=None if mesh is None else self.places
        )
        self.update = jax.jit(self._update)
        self.gather = jax.jit(lambda tree: tree, out_shardings=self.sharding(P()))

    def sharding(self, spec):
        return None if self.mesh is None else NamedSharding(self.mesh, spec)

    def _update(self, gradient, state, params):
        updates, state = self.tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    def put(self, x, sharding):
        if sharding is None:
            return jnp.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    def start(self, seed):
        params = jax.tree.map(self.put, first_params(seed), self.places)
        return params, self.tx.init(params)

    def train(self, data, seed, params, state, first, last):
        rows = self.sharding(P(("fsdp", "data")))
        for t in range(first, last):
            images, labels = (self.put(x, rows) for x in batch(data, seed, t))
            # On CPU, two programs in flight can wait for each other's collectives for
            # ever, where there are fewer threads than programs and devices.
            gradient = jax.block_until_ready(self.gradient(params, images, labels))
            params, state = self.update(gradient, state, params)
            jax.block_until_ready(state)
        return params, state

    def replay(self, gradients, params, state):
        """The masks (or what passed), parameters and states after each gradient."""
        trail = []
        for gradient in gradients:
            gradient = jax.tree.map(self.put, gradient, self.places)
            params, state = self.update(gradient, state, params)
            trail.append(self.fetch((params, state)))
        return trail

    def fetch(self, tree):
        """All numbers of a tree on the host of every process."""
        return jax.tree.map(np.asarray, self.gather(tree))

    def error(self, params, data):
        """Share of the test images that the network gets wrong, in percent."""
        guess = np.argmax(logits(self.fetch(params), data["test_x"]), axis=-1)
        return 100 * float(np.mean(guess != data["test_y"]))


def flat(prefix, tree):
    """``{prefix + path: array}``, as an npz file takes it."""
    return {
        prefix + jax.tree_util.keystr(path): x
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def unflat(prefix, arrays, like):
    return jax.tree_util.tree_map_with_path(
        lambda path, _: arrays[prefix + jax.tree_util.keystr(path)], like
    )


def record(run, data):
    """Gradients of a run on one device, and parameters and states along it."""
    params, state = run.start(SEEDS[0])
    gradients = []
    for t in range(RECORDED_STEPS):
        gradients.append(run.fetch(run.gradient(params, *batch(data, SEEDS[0], t))))
        params, state = run.update(gradients[-1], state, params)
    return gradients, run.replay(gradients, *run.start(SEEDS[0]))


def main(folder, port, rank, task):
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        f"localhost:{port}", num_processes=PROCESSES, process_id=rank
    )
    import orbax.checkpoint as ocp

    assert jax.process_count() == PROCESSES
    assert jax.device_count() == PROCESSES * DEVICES
    mesh = jax.make_mesh(
        (PROCESSES, DEVICES),
        ("fsdp", "data"),
        axis_types=(jax.sharding.AxisType.Auto,) * 2,
    )
    with np.load(folder / "given.npz") as file:
        given = dict(file)
    results = {}
    for method in METHODS:
        with jax.set_mesh(mesh):
            run = Training(method, mesh)
            go = functools.partial(run.train, given, SEEDS[0])
            place = folder / f"checkpoint-{method}"
            with ocp.StandardCheckpointer() as checkpointer:
                params, state = run.start(SEEDS[0])
                if task == "train":
                    params, state = go(params, state, 0, HALF)
                    checkpointer.save(place, (params, state))
                    checkpointer.wait_until_finished()
                else:
                    like = jax.tree.map(
                        ocp.utils.to_shape_dtype_struct, (params, state)
                    )
                    params, state = checkpointer.restore(place, like)
                params, state = go(params, state, HALF, STEPS)
            results |= flat(f"{method}/end", run.fetch((params, state)))
            if task == "resume":
                continue
            gradients = [
                unflat(f"{method}/gradient/{t}", given, first_params(0))
                for t in range(RECORDED_STEPS)
            ]
            trail = run.replay(gradients, *run.start(SEEDS[0]))
            results |= flat(f"{method}/replay", trail)
            errors = [run.error(params, given)]
            for seed in SEEDS[1:]:
                params, _ = run.train(given, seed, *run.start(seed), 0, STEPS)
                errors.append(run.error(params, given))
            results[f"{method}/errors"] = np.array(errors)
    if rank == 0:
        np.savez(folder / f"{task}.npz", **results)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
