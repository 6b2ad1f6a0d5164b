"""What sparse training adds to a training step, in time and in memory.

    python benchmarks/bench_step.py --json step.json
    python benchmarks/bench_step.py --models vgg16-d --rounds 3 --steps 6

One run times all optimizers in turn, in short rounds, so that a busy machine slows
them alike: quote the ratios, of medians or of minima, not the milliseconds. A step is
forward, backward, batch statistics and optimizer, on random images; an update is the
optimizer alone, on gradients of the same batches. All have the same learning rate,
Nesterov momentum and weight decay; GSM decays kernels only, as does the SGD it is
compared with. Each round of sparse momentum holds one cycle. Its cost is spread over
the steps of an epoch: 600 of MNIST at batch 100, 391 of CIFAR at batch 128.

Memory is what XLA plans for the compiled program; bytes of arguments and outputs that
share a buffer are counted once under "arguments".
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparse_optax
from sparse_optax.experiments import models


class Setting(NamedTuple):
    """What a model is trained on: images a step and an epoch, and their shape."""

    batch: int
    images: int
    shape: tuple[int, int, int]


SETTINGS = {
    "lenet-5-caffe": Setting(100, 60_000, (28, 28, 1)),
    "vgg16-d": Setting(128, 50_000, (32, 32, 3)),
    "wrn-28-2": Setting(128, 50_000, (32, 32, 3)),
}
# Small: random labels must not make the weights diverge, whatever the number of steps.
LEARNING_RATE = 0.01
# Batches in turn, so that GSM's threshold moves from step to step as in training.
BATCHES = 4

SGD, SGD_KERNELS = "sgd", "sgd, kernels decay"
GSM, SPARSE = "gsm 1/60", "sparse momentum 5%"
PACKED = "sparse momentum 5%, packed"
# What each is compared with, and what is timed; the packed form differs in memory.
BASE = {SGD: SGD, SGD_KERNELS: SGD_KERNELS, GSM: SGD_KERNELS, SPARSE: SGD}


def optimizers(period: int) -> dict[str, optax.GradientTransformation]:
    """Name -> optimizer; sparse momentum has a cycle each ``period`` updates."""

    def sgd(mask=None):
        return optax.chain(
            optax.add_decayed_weights(5e-4, mask=mask),
            optax.sgd(LEARNING_RATE, momentum=0.9, nesterov=True),
        )

    def sparse(packed):
        return sparse_optax.sparse_momentum_regrow(
            sgd(),
            density=0.05,
            update_period=period,
            update_stop=10**6,
            key=0,
            packed=packed,
        )

    return {
        SGD: sgd(),
        SGD_KERNELS: sgd(sparse_optax.eligible),
        GSM: sparse_optax.gsm(LEARNING_RATE, 1 / 60, momentum=0.9),
        SPARSE: sparse(packed=False),
        PACKED: sparse(packed=True),
    }


class Problem(NamedTuple):
    """A model and its random batches."""

    apply: Callable[..., Any]
    params: Any
    stats: Any
    batches: list[tuple[jax.Array, jax.Array]]

    def loss(self, params, stats, number, x, y):
        """Cross entropy of a batch, and the new running statistics."""
        key = jax.random.fold_in(jax.random.key(1), number)
        logits, stats = self.apply(params, stats, x, train=True, key=key)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), stats


def problem(name: str, batch: int) -> Problem:
    """A fresh model and ``BATCHES`` batches of random images and labels."""
    shape = SETTINGS[name].shape
    made = models.create_stateful(name, shape, 10, key=jax.random.key(0))
    rng = np.random.default_rng(0)
    batches = [
        (
            jnp.asarray(rng.standard_normal((batch, *shape), np.float32)),
            jnp.asarray(rng.integers(0, 10, batch), jnp.int32),
        )
        for _ in range(BATCHES)
    ]
    return Problem(*made, batches)


class Program(NamedTuple):
    """A compiled ``(state, number, *input) -> state`` that donates its state."""

    run: Any
    state: Any
    inputs: list[Any]


def step_program(given: Problem, optimizer: Any) -> Program:
    """The whole step: forward, backward, batch statistics, update."""

    def step(state, number, x, y):
        params, stats, opt_state = state
        gradient, stats = jax.grad(given.loss, has_aux=True)(
            params, stats, number, x, y
        )
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), stats, opt_state

    opt_state = optimizer.init(given.params)
    return compiled(step, (given.params, given.stats, opt_state), given.batches)


def update_program(given: Problem, optimizer: Any, gradients: list[Any]) -> Program:
    """The optimizer alone."""

    def update(state, number, gradient):
        del number
        params, opt_state = state
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    state = given.params, optimizer.init(given.params)
    return compiled(update, state, [(gradient,) for gradient in gradients])


def compiled(function, state, inputs) -> Program:
    """Compiles with a donated state, of which the program gets its own copy."""
    state = jax.tree.map(jnp.copy, state)
    lowered = jax.jit(function, donate_argnums=0).lower(state, np.int32(0), *inputs[0])
    return Program(lowered.compile(), state, inputs)


def gradients_of(given: Problem) -> list[Any]:
    """The gradient of each batch at the first weights."""
    gradient = jax.jit(jax.grad(given.loss, has_aux=True))
    return [
        gradient(given.params, given.stats, np.int32(0), *batch)[0]
        for batch in given.batches
    ]


def measure(
    programs: dict[str, Program], rounds: int, steps: int
) -> dict[str, dict[str, list[float]]]:
    """Seconds of each call, of those that open a cycle apart from the others."""
    times = {name: {"ordinary": [], "cycle": []} for name in programs}
    states = {name: program.state for name, program in programs.items()}
    # Half a round ahead, a cycle falls into the middle of each round.
    warm_up = steps // 2

    def call(name, number):
        program = programs[name]
        inputs = program.inputs[number % len(program.inputs)]
        begin = time.perf_counter()
        states[name] = jax.block_until_ready(
            program.run(states[name], np.int32(number), *inputs)
        )
        return time.perf_counter() - begin

    for name in programs:
        for number in range(warm_up):
            call(name, number)
    order = list(programs)
    for start in range(warm_up, warm_up + rounds * steps, steps):
        for name in order:
            for number in range(start, start + steps):
                due = name == SPARSE and number > 0 and number % steps == 0
                seconds = call(name, number)
                times[name]["cycle" if due else "ordinary"].append(seconds)
        # No optimizer comes first in every round.
        order = order[1:] + order[:1]
    for name, state in states.items():
        check(name, state)
    return times


def check(name: str, state: Any) -> None:
    """Times of numbers that overflowed, or of cycles that were left out, are none."""
    finite = all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(state[0]))
    if not finite:
        raise RuntimeError(f"{name}: the weights are not finite; lower LEARNING_RATE")
    if name == SPARSE:
        regrow_state = state[-1]
        grown = sum(int(x.sum()) for x in jax.tree.leaves(regrow_state.grown))
        if int(regrow_state.skipped) or not grown:
            raise RuntimeError(f"{name}: a cycle was left out")


def summarise(times: dict[str, Any], steps_per_epoch: int) -> dict[str, Any]:
    """Median and minimum of each row, and their ratios to those of its base."""
    rows = {}

    def add(label, name, values):
        base = rows.get(BASE[name], {"values": values})["values"]
        ratios = {key: values[key] / base[key] for key in values}
        rows[label] = {"values": values, "base": BASE[name], "ratios": ratios}

    def both(seconds):
        return {"median": float(np.median(seconds)), "minimum": min(seconds)}

    for name, seconds in times.items():
        ordinary = both(seconds["ordinary"])
        add(name, name, ordinary)
        if seconds["cycle"]:
            cycle = both(seconds["cycle"])
            spread = {
                key: ordinary[key] + (cycle[key] - ordinary[key]) / steps_per_epoch
                for key in ordinary
            }
            add(f"{name}, the cycle", name, cycle)
            add(f"{name}, a cycle an epoch", name, spread)
    return rows


def estimate(step: float, updates: dict[str, Any]) -> dict[str, Any]:
    """Rows of whole steps: a measured step of SGD, and the differences of updates."""
    rows = {}
    for label, row in updates.items():
        base = updates[row["base"]]["values"]
        values = {key: step + row["values"][key] - base[key] for key in base}
        ratios = {key: value / step for key, value in values.items()}
        rows[label] = {"base": row["base"], "values": values, "ratios": ratios}
    return rows


def memory_of(run: Any) -> dict[str, int]:
    """Bytes that XLA plans for a program."""
    found = run.memory_analysis()
    return {
        "arguments": found.argument_size_in_bytes,
        "outputs": found.output_size_in_bytes - found.alias_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
    }


def bytes_of(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def bench(
    name: str, rounds: int, steps: int, batch: int | None, slow: bool
) -> dict[str, Any]:
    """Everything about one model."""
    setting = SETTINGS[name]
    batch = batch or setting.batch
    given = problem(name, batch)
    steps_per_epoch = math.ceil(setting.images / batch)
    result = {
        "batch": batch,
        "steps_per_epoch": steps_per_epoch,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(given.params)),
        "parameter_bytes": bytes_of(given.params),
        "state_bytes": {
            key: bytes_of(jax.eval_shape(optimizer.init, given.params))
            for key, optimizer in optimizers(steps).items()
        },
        "memory": {},
        "seconds": {},
        "rows": {},
    }

    def whole(optimizer):
        return step_program(given, optimizer)

    def alone(optimizer):
        return update_program(given, optimizer, gradients)

    gradients = gradients_of(given)
    for part, make in (("update", alone), ("step", whole)):
        some = optimizers(steps)
        if slow and part == "step":
            # The step of one optimizer, once; what the others add to their update.
            times = measure({SGD: whole(some[SGD])}, 1, 2)
            result["seconds"]["step of sgd"] = times
            result["rows"][part] = estimate(
                min(times[SGD]["ordinary"]), result["rows"]["update"]
            )
            continue
        programs = {key: make(opt) for key, opt in some.items()}
        result["memory"][part] = {
            key: memory_of(program.run) for key, program in programs.items()
        }
        times = measure({key: programs[key] for key in BASE}, rounds, steps)
        result["seconds"][part] = times
        result["rows"][part] = summarise(times, steps_per_epoch)
    return result


def show(name: str, result: dict[str, Any]) -> None:
    """Prints the tables of one model."""
    print(
        f"\n{name}: batch {result['batch']}, {result['steps_per_epoch']} steps an "
        f"epoch, {result['parameters']:,} parameters"
    )
    for part, title in (("step", "whole step"), ("update", "update alone")):
        print(f"\n{title:36}{'median':>10}{'minimum':>10} ms{'ratios':>11}  over")
        for label, row in result["rows"][part].items():
            values = "".join(f"{1e3 * x:10.3f}" for x in row["values"].values())
            ratios = "".join(f"{x:7.3f}" for x in row["ratios"].values())
            print(f"{label:36}{values}   {ratios}  {row['base']}")
    print(f"\n{'memory, MB':36}{'state':>10}{'step: arguments':>17}{'temp':>9}", end="")
    print(f"{'outputs':>9}{'update: arguments':>19}{'temp':>9}{'outputs':>9}")
    for label, size in result["state_bytes"].items():
        row = f"{label:36}{size / 1e6:10.2f}"
        for part, width in (("step", 17), ("update", 19)):
            if part not in result["memory"]:
                row += f"{'-':>{width}}{'-':>9}{'-':>9}"
                continue
            found = result["memory"][part][label]
            row += f"{found['arguments'] / 1e6:{width}.2f}"
            row += f"{found['temporaries'] / 1e6:9.2f}{found['outputs'] / 1e6:9.2f}"
        print(row)


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=SETTINGS, default=[*SETTINGS])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=6, help="steps a round")
    parser.add_argument("--batch", type=int, help="images a step")
    parser.add_argument(
        "--slow",
        action="store_true",
        help="time two whole steps of SGD, and add what the others' updates take more",
    )
    parser.add_argument("--json", metavar="FILE", help="where to write all figures")
    arguments = parser.parse_args()
    if arguments.rounds < 1 or arguments.steps < 2:
        parser.error("--rounds must be 1 or more and --steps 2 or more")
    if arguments.batch is not None and arguments.batch < 1:
        parser.error("--batch must be 1 or more")
    device = jax.devices()[0]
    print(f"jax {jax.__version__}, {device.platform}, {device.device_kind}")
    record = {
        "jax": jax.__version__,
        "device": {"platform": device.platform, "kind": device.device_kind},
        "rounds": arguments.rounds,
        "steps": arguments.steps,
        "models": {},
    }
    for name in arguments.models:
        result = bench(
            name, arguments.rounds, arguments.steps, arguments.batch, arguments.slow
        )
        record["models"][name] = result
        show(name, result)
        if arguments.json:
            with open(arguments.json, "w") as file:
                json.dump(record, file, indent=1)


if __name__ == "__main__":
    main()
