"""Programs over many leaves: equal leaves share their kernels."""

import collections
import re

import jax
import jax.numpy as jnp
import optax
import pytest

import sparse_optax

METHODS = {
    "gsm": lambda: optax.chain(sparse_optax.gsm_mask(0.3), optax.sgd(0.1)),
    "sparse_momentum": lambda: sparse_optax.sparse_momentum_regrow(
        optax.sgd(0.1, momentum=0.9),
        density=0.3,
        update_period=3,
        update_stop=30,
        key=0,
    ),
}


def blocks(number):
    """Equal blocks of three kernels and a bias."""
    shapes = {"bias": (8,), "down": (16, 8), "mix": (8, 8), "up": (8, 16)}
    block = {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in shapes.items()}
    return {f"block{i:02}": dict(block) for i in range(number)}


def fusions(compiled):
    """The fusions of a program by their text, without names: XLA on CPU compiles a
    kernel for each that is different.
    """
    computations, name = {}, None
    for line in compiled.as_text().splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$", line):
            name = head[1]
            computations[name] = []
        elif line.startswith("}"):
            name = None
        elif name:
            without = r", (metadata|backend_config|frontend_attributes)=\{.*"
            computations[name].append(re.sub(without, "", line))

    def text(name):
        numbers = collections.defaultdict(lambda: f"%{len(numbers)}")

        def short(found):
            inner = found[0][1:]
            return text(inner) if inner in computations else numbers[inner]

        return re.sub(r"%[\w.\-]+", short, "\n".join(computations[name]))

    lines = [line for body in computations.values() for line in body]
    calls = [re.search(r" fusion\(.*calls=%?([\w.\-]+)", line) for line in lines]
    return collections.Counter(text(call[1]) for call in calls if call)


def step_of(tx, params):
    def step(params, state, gradient):
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step).lower(params, jax.eval_shape(tx.init, params), params)


@pytest.mark.parametrize("what", ["step", "init"])
@pytest.mark.parametrize("method", METHODS)
def test_twelve_blocks_have_the_kernels_of_three(method, what):
    """Nothing in a kernel tells its leaf from another of the same shape."""
    found = []
    for number in (3, 12):
        tx, params = METHODS[method](), blocks(number)
        lowered = (
            step_of(tx, params) if what == "step" else jax.jit(tx.init).lower(params)
        )
        found.append(fusions(lowered.compile()))
    few, many = found
    if what == "step":
        assert many.total() > 2 * few.total() > 0
    # A few more may see the number of leaves, as those that put counts together.
    assert len(many) <= len(few) + 6, len(few)


def kept(**more):
    return {"density": 0.3, "key": 0, **more}


def periodic(**more):
    return kept(update_period=3, update_stop=30, **more)


def momentum():
    return optax.sgd(0.1, momentum=0.9)


OVERWRITING = {
    "sgd": momentum,
    "static": lambda: sparse_optax.static_sparse(momentum(), **kept()),
    "sparse_evolutionary": lambda: sparse_optax.sparse_evolutionary(
        momentum(), **periodic()
    ),
    "sparse_momentum": lambda: sparse_optax.sparse_momentum_regrow(
        momentum(), **periodic()
    ),
    "sparse_momentum_adam": lambda: sparse_optax.sparse_momentum_regrow(
        optax.adam(0.1), **periodic()
    ),
}


@pytest.mark.parametrize("method", OVERWRITING)
def test_a_scan_over_updates_overwrites_weights_and_moments(method):
    """A step that reads weights or moments beside the update, without an order between
    the two, makes XLA copy them at each step.
    """
    tx, params = OVERWRITING[method](), {"w": jnp.ones((40, 24))}

    def epoch(params, state, gradients):
        def step(carry, gradient):
            params, state = carry
            updates, state = tx.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), gradients)[0]

    gradients = {"w": jnp.ones((5, 40, 24))}
    state = jax.eval_shape(tx.init, params)
    program = jax.jit(epoch).lower(params, state, gradients).compile().as_text()
    inside = program[: program.index("ENTRY ")]
    assert not re.findall(r"= f32\[40,24\]\S* copy\(", inside)
