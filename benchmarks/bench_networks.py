"""A training step of the networks of the tables, beside the same step in PyTorch.

    pip install torch
    python benchmarks/bench_networks.py --json networks.json
    python benchmarks/bench_networks.py --models lenet-5-caffe --rounds 20
    python benchmarks/bench_networks.py --layers
    python benchmarks/bench_networks.py --pixels

One run measures both sides in turn, in short rounds: quote the ratios, of minima or of
medians, not the milliseconds. A step is forward, backward, batch statistics, dropout
and SGD with Nesterov momentum and weight decay, in float32 on random images. PyTorch is
measured in both of its memory formats, NCHW and channels last; the ratio is to the
faster one. Without torch only this library's side is measured.

``--xla`` adds a row with XLA's own convolution and pooling in every layer. ``--layers``
measures single 3 x 3 convolutions instead, XLA's own against im2col: these figures
choose the form in ``sparse_optax.experiments.models.convolution``. ``--pixels`` does so
for kernels of one pixel, as ResNet-50 has them, XLA's own against a product.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from bench_step import SETTINGS, problem, step_program

from sparse_optax.experiments.models import convolution, max_pool

try:
    import torch
except ImportError:
    torch = None

LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, DROPOUT = 0.01, 0.9, 5e-4, 0.3
# Channels, outputs, image side and stride of kernels of one pixel; the batch is 16.
PIXELS = (
    (256, 64, 56, 1),
    (256, 128, 56, 1),
    (256, 512, 56, 2),
    (128, 512, 28, 1),
    (256, 1024, 14, 1),
    (512, 2048, 7, 1),
)
# Channels and image side of single layers; the kernel is 3 x 3, the batch 128.
LAYERS = ((512, 2), (512, 4), (256, 8), (128, 16), (64, 32), (32, 32), (64, 16))


# --- this library ---------------------------------------------------------------------
def ours(name: str, *, xla: bool) -> Callable[[], None]:
    """One step of our network at each call; ``xla`` takes XLA's forms everywhere."""
    given = problem(name, SETTINGS[name].batch)
    optimizer = optax.chain(
        optax.add_decayed_weights(WEIGHT_DECAY),
        optax.sgd(LEARNING_RATE, momentum=MOMENTUM, nesterov=True),
    )
    with (
        mock.patch.object(convolution, "FAST", not xla),
        mock.patch.object(max_pool, "FAST", not xla),
    ):
        program = step_program(given, optimizer)
    box = [program.state, 0]

    def step():
        inputs = program.inputs[box[1] % len(program.inputs)]
        box[0] = jax.block_until_ready(program.run(box[0], np.int32(box[1]), *inputs))
        box[1] += 1

    return step


# --- PyTorch --------------------------------------------------------------------------
def theirs(name: str, memory_format: Any) -> Callable[[], None]:
    """One step of the same network in PyTorch at each call."""
    setting = SETTINGS[name]
    network = {"lenet-5-caffe": lenet, "vgg16-d": vgg, "wrn-28-2": wide_resnet}[name]()
    network = network.to(memory_format=memory_format).train()
    optimizer = torch.optim.SGD(
        network.parameters(),
        LEARNING_RATE,
        momentum=MOMENTUM,
        nesterov=True,
        weight_decay=WEIGHT_DECAY,
    )
    h, w, c = setting.shape
    images = torch.randn(setting.batch, c, h, w).to(memory_format=memory_format)
    labels = torch.randint(0, 10, (setting.batch,))
    ours = sum(x.size for x in jax.tree.leaves(problem(name, 1).params))
    here = sum(x.numel() for x in network.parameters())
    if ours != here:
        raise RuntimeError(f"{name}: {ours} parameters here, {here} in PyTorch")

    def step():
        optimizer.zero_grad(set_to_none=True)
        torch.nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()

    return step


def lenet():
    t = torch.nn
    return t.Sequential(
        *(t.Conv2d(1, 20, 5), t.ReLU(), t.MaxPool2d(2)),
        *(t.Conv2d(20, 50, 5), t.ReLU(), t.MaxPool2d(2), t.Flatten()),
        *(t.Linear(800, 500), t.ReLU(), t.Linear(500, 10)),
    )


def vgg():
    t = torch.nn
    layers, channels = [], 3
    for widths in ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3):
        for width in widths:
            layers += [t.Conv2d(channels, width, 3, padding=1)]
            layers += [t.BatchNorm2d(width), t.ReLU()]
            channels = width
        layers.append(t.MaxPool2d(2))
    for _ in range(2):
        layers += [t.Flatten(), t.Linear(512, 512), t.ReLU(), t.BatchNorm1d(512)]
    return t.Sequential(*layers, t.Linear(512, 10))


def wide_resnet():
    t = torch.nn

    class Block(t.Module):
        def __init__(self, inputs, outputs, stride):
            super().__init__()
            self.norm1, self.norm2 = t.BatchNorm2d(inputs), t.BatchNorm2d(outputs)
            self.conv1 = t.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
            self.conv2 = t.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
            self.shortcut = None
            if inputs != outputs:
                self.shortcut = t.Conv2d(inputs, outputs, 1, stride, bias=False)

        def forward(self, x):
            y = torch.relu(self.norm1(x))
            if self.shortcut is not None:
                x = self.shortcut(y)
            y = torch.relu(self.norm2(self.conv1(y)))
            y = t.functional.dropout(y, DROPOUT, training=self.training)
            return x + self.conv2(y)

    layers, inputs = [t.Conv2d(3, 16, 3, 1, 1, bias=False)], 16
    for group, outputs in enumerate((32, 64, 128)):
        for block in range(4):
            stride = 2 if group and not block else 1
            layers.append(Block(inputs, outputs, stride))
            inputs = outputs
    layers += [t.BatchNorm2d(inputs), t.ReLU(), t.AdaptiveAvgPool2d(1), t.Flatten()]
    return t.Sequential(*layers, t.Linear(inputs, 10))


# --- measuring ------------------------------------------------------------------------
def turns(steps: dict[Any, Callable[[], None]], rounds: int) -> dict[Any, list[float]]:
    """Seconds of each call, the candidates in turn."""
    for step in steps.values():
        step()
    seconds = {name: [] for name in steps}
    order = list(steps)
    for _ in range(rounds):
        for name in order:
            # Threads of the one before may still spin.
            time.sleep(0.05)
            steps[name]()
            for _ in range(2):
                begin = time.perf_counter()
                steps[name]()
                seconds[name].append(time.perf_counter() - begin)
        order = order[1:] + order[:1]
    return seconds


def networks(names: list[str], rounds: int, xla: bool) -> dict[str, Any]:
    """The table of whole steps."""
    results = {}
    for name in names:
        steps = {"ours": ours(name, xla=False)}
        if xla:
            steps["ours, XLA's own forms"] = ours(name, xla=True)
        if torch is not None:
            steps["torch, NCHW"] = theirs(name, torch.contiguous_format)
            steps["torch, channels last"] = theirs(name, torch.channels_last)
        seconds = turns(steps, rounds)
        peers = [key for key in steps if key.startswith("torch")]
        rows = {
            key: {"minimum": min(values), "median": float(np.median(values))}
            for key, values in seconds.items()
        }
        print(f"\n{name:28}{'minimum':>10}{'median':>10} ms   over the best of torch")
        for key, row in rows.items():
            line = "".join(f"{1e3 * value:10.1f}" for value in row.values())
            if peers:
                best = {kind: min(rows[peer][kind] for peer in peers) for kind in row}
                row["ratio"] = {kind: row[kind] / best[kind] for kind in best}
                line += "".join(f"{ratio:8.2f}" for ratio in row["ratio"].values())
            print(f"{key:28}{line}", flush=True)
        results[name] = rows
    return results


def layers(rounds: int, batch: int = 128) -> dict[str, Any]:
    """The table of single convolutions, forward, and forward and backward."""
    layout = ("NHWC", "HWIO", "NHWC")
    forms = {
        "XLA": functools.partial(
            jax.lax.conv_general_dilated,
            window_strides=(1, 1),
            dimension_numbers=layout,
        ),
        "here": functools.partial(
            convolution.convolution, window_strides=(1, 1), dimension_numbers=layout
        ),
        "im2col": lambda x, w, padding: convolution.im2col(x, w, padding),
    }
    results = {}
    print(f"{'channels, image':20}{'form':>8}{'forward':>10}{'both':>10} ms")
    for channels, side in LAYERS:
        rng = np.random.default_rng(0)
        images = rng.standard_normal((batch, side, side, channels), np.float32)
        kernel = rng.standard_normal((3, 3, channels, channels), np.float32) / channels
        images, kernel = jnp.asarray(images), jnp.asarray(kernel)
        steps = {}
        for form, apply in forms.items():

            def forward(x, w, apply=apply):
                return apply(x, w, padding=((1, 1), (1, 1)))

            def both(x, w, forward=forward):
                y, pull = jax.vjp(forward, x, w)
                return pull(y)

            for part, function in (("forward", forward), ("both", both)):
                run = jax.jit(function)

                def call(run=run, given=(images, kernel)):
                    jax.block_until_ready(run(*given))

                steps[form, part] = call
        seconds = turns(steps, rounds)
        for form in forms:
            best = {part: min(seconds[form, part]) for part in ("forward", "both")}
            results[f"{channels} ch {side} x {side}, {form}"] = best
            line = "".join(f"{1e3 * value:10.1f}" for value in best.values())
            print(f"{f'{channels}, {side} x {side}':20}{form:>8}{line}", flush=True)
    return results


def pixels(rounds: int, batch: int = 16) -> dict[str, Any]:
    """The table of kernels of one pixel: outputs, and the gradient for each operand."""
    options: dict[str, Any] = {"padding": "SAME"}
    options["dimension_numbers"] = ("NHWC", "HWIO", "NHWC")
    forms = {"XLA": jax.lax.conv_general_dilated, "here": convolution.convolution}
    results = {}
    names = ("outputs", "for images", "for kernel")
    print(f"{'':24}" + "".join(f"{name:>20}" for name in names) + " ms, XLA and here")
    for channels, outputs, side, stride in PIXELS:
        rng = np.random.default_rng(0)
        images = jnp.asarray(
            rng.standard_normal((batch, side, side, channels), np.float32)
        )
        kernel = jnp.asarray(
            rng.standard_normal((1, 1, channels, outputs), np.float32) / channels
        )
        steps = {}
        for form, apply in forms.items():

            def forward(x, w, apply=apply, stride=stride):
                return apply(x, w, (stride, stride), **options)

            dy = jax.jit(forward)(images, kernel)
            runs = (
                lambda x, w, dy, f=forward: f(x, w),
                lambda x, w, dy, f=forward: jax.vjp(lambda x: f(x, w), x)[1](dy),
                lambda x, w, dy, f=forward: jax.vjp(lambda w: f(x, w), w)[1](dy),
            )
            for name, run in zip(names, map(jax.jit, runs), strict=True):

                def call(run=run, given=(images, kernel, dy)):
                    jax.block_until_ready(run(*given))

                steps[form, name] = call
        best = {key: min(values) for key, values in turns(steps, rounds).items()}
        label = f"{channels} to {outputs}, {side} x {side}" + f" /{stride}" * (
            stride > 1
        )
        results[label] = {f"{name}, {form}": best[form, name] for form, name in best}
        line = "".join(
            f"{1e3 * best['XLA', name]:12.1f} |{1e3 * best['here', name]:6.1f}"
            for name in names
        )
        print(f"{label:24}{line}", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", action="store_true")
    parser.add_argument("--pixels", action="store_true")
    parser.add_argument("--xla", action="store_true")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    versions = {"jax": jax.__version__, "flax": flax.__version__}
    if torch is not None:
        versions["torch"] = torch.__version__
    print(versions, jax.devices())
    if args.layers:
        results = layers(args.rounds)
    elif args.pixels:
        results = pixels(args.rounds)
    else:
        results = networks(args.models, args.rounds, args.xla)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"versions": versions, "results": results}, file, indent=1)


if __name__ == "__main__":
    main()
