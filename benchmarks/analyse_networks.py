"""The questions of docs/analysis.md, asked of trained networks.

    python benchmarks/analyse_networks.py gsm
    python benchmarks/analyse_networks.py channels
    python benchmarks/analyse_networks.py rounding

``gsm``: LeNet-300-100 on MNIST, all 60,000 training images, dense for 40 epochs, then
GSM at 60x in a third of the paper's epochs (53, 13 and 14 at 3e-2, 3e-3 and 3e-4), once
as it is and once with the mask of the first step. For each epoch: the loss, the test
error, and the share of weights that pass at a step and did not at the one before. Of
the dense network: the rank correlations of four criteria on the first 2,000 training
images, in batches of 50, and the loss of 10,000 test images with each layer pruned
alone, beside the density that GSM leaves in it.

``channels``: LeNet-5-Caffe on CIFAR-10, 15 epochs in batches of 128, learning rate 0.05
times 0.1 after 8 and 12, dense and by sparse momentum at 5%: how specialized the
channels of each layer are, over 45,000 training images. A small network for a data set
of this kind; a tenth is what a channel that serves all classes alike has.

``rounding``: LeNet-5-Caffe on MNIST by sparse momentum at 5%, 10 epochs with learning
rate 0.02 times 0.1 after 6 and 8 (at 0.1 the loss jumped up, in epochs 3 and 5): the
bytes of its file and its test error with values stored in fewer bits.
"""

import argparse
import json
import math
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparse_optax
from sparse_optax import analysis
from sparse_optax.experiments import data, models, train
from sparse_optax.experiments.config import TrainConfig

RECORDS = pathlib.Path(__file__).parent / "records" / "analysis.json"
DENSITY = 1 / 60
BATCH = 256
DENSE_EPOCHS = 40
EPOCHS = (53, 66, 80)  # the rate falls twice, then the end
DENSITIES = (0.5, 0.2, 0.1, 0.05, 0.02)


def gsm():
    """What GSM does on LeNet-300-100, and what the dense network says before."""
    mnist = data.load("mnist", split="full")
    x, y = jnp.asarray(mnist.train_x), jnp.asarray(mnist.train_y)
    test = jnp.asarray(mnist.test_x), jnp.asarray(mnist.test_y)
    steps = len(x) // BATCH
    key = jax.random.key(0)
    apply, params = models.create("lenet-300-100", (28, 28, 1), 10, key=key)

    def loss(params, batch):
        images, labels = batch
        logits = apply(params, images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean()

    def error(params):
        return 100 * float((apply(params, test[0]).argmax(-1) != test[1]).mean())

    def run(tx, params, epochs, seed):
        """The weights after so many epochs, and each epoch's numbers."""

        @jax.jit
        def epoch(params, state, key):
            rows = jax.random.permutation(key, len(x))[: steps * BATCH]

            def step(carry, rows):
                params, state = carry
                value, gradient = jax.value_and_grad(loss)(params, (x[rows], y[rows]))
                updates, state = tx.update(gradient, state, params)
                taken = optax.tree.get(state, "gsm_reactivated", jnp.int32(0))
                params = optax.apply_updates(params, updates)
                return (params, state), (value, taken)

            rows = rows.reshape(steps, BATCH)
            carry, (values, taken) = jax.lax.scan(step, (params, state), rows)
            return *carry, values.mean(), jnp.mean(taken.astype(jnp.float32))

        state, history = tx.init(params), []
        for number, key in enumerate(jax.random.split(jax.random.key(seed), epochs)):
            params, state, value, taken = epoch(params, state, key)
            history.append(
                {
                    "epoch": number + 1,
                    "loss": float(value),
                    "error": round(error(params), 2),
                    "reactivated": float(taken) / 266_200,
                }
            )
        return params, history

    fall = {epoch * steps: 0.1 for epoch in (16, 32)}
    sgd = optax.chain(
        optax.add_decayed_weights(5e-4, mask=sparse_optax.decay_mask),
        optax.sgd(optax.piecewise_constant_schedule(3e-2, fall), 0.9, nesterov=True),
    )
    dense, _ = run(sgd, params, DENSE_EPOCHS, 0)
    found = {"dense": {"error": round(error(dense), 2)}}
    rate = optax.piecewise_constant_schedule(
        3e-2, {epoch * steps: 0.1 for epoch in EPOCHS[:2]}
    )
    for name, reselect in (("selected", True), ("first mask", False)):
        gate = sparse_optax.gsm_mask(DENSITY, reselect=reselect, track_reactivated=True)
        # As sparse_optax.gsm has it.
        tx = optax.chain(
            gate,
            optax.add_decayed_weights(5e-4, mask=sparse_optax.decay_mask),
            optax.sgd(rate, momentum=0.99, nesterov=True),
        )
        params, history = run(tx, dense, EPOCHS[-1], 1)
        masks = sparse_optax.masks.magnitude_masks(params, DENSITY)
        cut = sparse_optax.sparsify(params, masks)
        found[name] = {
            "history": history,
            "error": round(error(params), 2),
            "error_after_cut": round(error(cut), 2),
            "densities": analysis.surviving_densities(cut),
        }
        print(name, found[name]["error"], found[name]["error_after_cut"], flush=True)
    few = [(x[i : i + 50], y[i : i + 50]) for i in range(0, 2000, 50)]
    ranks = analysis.compare_saliencies(apply, dense, few)
    found["ranks"] = {"names": list(ranks.names), "values": ranks.ranks.tolist()}
    batches = [
        (test[0][i : i + 1000], test[1][i : i + 1000]) for i in range(0, 10_000, 1000)
    ]
    measured = analysis.layer_sensitivity(loss, dense, batches, DENSITIES)
    found["sensitivity"] = {
        "layers": list(measured.names),
        "densities": list(measured.densities),
        "damage": measured.damage().tolist(),
    }
    return found


def lenet5_activations(params, images):
    """What comes out of each hidden layer of LeNet-5-Caffe, behind its ReLU."""

    def conv(x, layer):
        x = jax.lax.conv_general_dilated(
            x,
            layer["kernel"],
            (1, 1),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return jax.nn.relu(x + layer["bias"])

    def pool(x):
        b, h, w, c = x.shape
        return x.reshape(b, h // 2, 2, w // 2, 2, c).max((2, 4))

    first = conv(images, params["conv1"])
    second = conv(pool(first), params["conv2"])
    flat = pool(second).reshape(len(images), -1)
    third = jax.nn.relu(flat @ params["fc1"]["kernel"] + params["fc1"]["bias"])
    return {"conv1": first, "conv2": second, "fc1": third}


def channels():
    """How specialized channels are, dense and sparse."""
    cifar = data.load("cifar10")
    batches = [
        (cifar.train_x[i : i + 500], cifar.train_y[i : i + 500])
        for i in range(0, len(cifar.train_x), 500)
    ]
    found = {}
    for name, method, density in (
        ("dense", "dense", 1.0),
        ("sparse momentum at 5%", "sparse_momentum", 0.05),
    ):
        run = TrainConfig(
            dataset="cifar10",
            model="lenet-5-caffe",
            method=method,
            density=density,
            epochs=15,
            batch_size=128,
            learning_rate=0.05,
            drop_epochs=(8, 12),
        )
        trained = train.train(run, runs=None)
        measured = analysis.channel_specialization(
            lambda images, params=trained.params: lenet5_activations(params, images),
            batches,
            10,
        )
        largest = {
            layer: [None if math.isnan(v) else float(v) for v in values]
            for layer, values in measured.largest.items()
        }
        found[name] = {
            "error": trained.record.results["test_error"],
            "means": measured.means(),
            "largest": largest,
            "inactive": {
                k: int(np.isnan(v).sum()) for k, v in measured.largest.items()
            },
        }
        print(name, found[name]["error"], found[name]["means"], flush=True)
    return found


def rounding():
    """What fewer bits cost in a small convolutional network."""
    mnist = data.load("mnist")
    apply, _ = models.create("lenet-5-caffe", (28, 28, 1), 10, key=jax.random.key(0))
    run = TrainConfig(
        dataset="mnist",
        model="lenet-5-caffe",
        density=0.05,
        epochs=10,
        learning_rate=0.02,
        drop_epochs=(6, 8),
    )
    trained = train.train(run, runs=None)
    masks = sparse_optax.get_masks(trained.opt_state)
    forward = jax.jit(apply)

    def wrong(params):
        parts = range(0, 10_000, 1000)
        scores = [forward(params, mnist.test_x[i : i + 1000]) for i in parts]
        return float(100 * (np.concatenate(scores).argmax(-1) != mnist.test_y).mean())

    found = {"dense bytes": sum(x.nbytes for x in jax.tree.leaves(trained.params))}
    for dtype in (None, "float16", "bfloat16", "int8"):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "net.sparse")
            sparse_optax.save_sparse(path, trained.params, masks, dtype=dtype)
            loaded = sparse_optax.load_sparse(path, like=trained.params).dense()
            found[dtype or "float32"] = {
                "bytes": path.stat().st_size,
                "error": round(wrong(loaded), 2),
            }
        print(dtype, found[dtype or "float32"], flush=True)
    return found


PARTS = {"gsm": gsm, "channels": channels, "rounding": rounding}


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--json", type=pathlib.Path, default=RECORDS, metavar="FILE")
    given = parser.parse_args()
    found = PARTS[given.part]()
    # Read at the end: another part may have been written meanwhile.
    before = json.loads(given.json.read_text()) if given.json.exists() else {}
    versions = {"jax": jax.__version__, "optax": optax.__version__}
    given.json.parent.mkdir(parents=True, exist_ok=True)
    whole = before | {given.part: found | {"versions": versions}}
    given.json.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
