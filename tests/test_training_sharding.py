"""Training steps on meshes of eight devices: the same bits, and no leaf on the wire.

One device trains a small network and records its gradients; a mesh replays them and
must arrive at the same parameters, masks and optimizer states, bit for bit.
"""

import contextlib
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from mesh_helpers import (
    KINDS,
    assert_same_bits,
    assert_small_sums_only,
    collectives,
    entry,
    mesh_of,
    not_on_eight,
    on_eight,
    placed,
    run_on_eight_devices,
)

import sparse_optax
from sparse_optax import regrowth, selection
from sparse_optax.gsm.gate import saliency
from sparse_optax.layers import is_hole
from sparse_optax.masks.tree import is_mask, unpack

pytestmark = pytest.mark.core


@not_on_eight
def test_in_a_process_with_eight_devices():
    run_on_eight_devices(__file__, passed=31)


# Every axis but that of the layers is longer than SMALL, so that a sum over some axes
# of a leaf, or any part of one, is over the bound.
LAYERS, WIDTH, WORDS = 8, 96, 128
STACKED = {"layers/kernel": 0}
POOLS = LAYERS + 2
# Counts of seven thresholds a layer, and nothing that grows with the leaves.
SMALL = 7 * POOLS
STEPS = 8

ALL = ("x", "y")
PLACEMENTS = {
    # Axis 0 of each leaf over all devices; of the stacked ones it counts the layers.
    "fsdp": {
        "embed": {"embedding": P(ALL, None)},
        "head": {"bias": P(ALL), "kernel": P(ALL, None)},
        "layers": {"bias": P(ALL, None), "kernel": P(ALL, None, None)},
    },
    # Columns, and rows and columns; whole layers.
    "tensor": {
        "embed": {"embedding": P(None, "y")},
        "head": {"bias": P("y"), "kernel": P("x", "y")},
        "layers": {"bias": P(None, ALL), "kernel": P(None, None, ALL)},
    },
    # A leaf on every device, and one whose layers and whose columns are sharded.
    "mixed": {
        "embed": {"embedding": P()},
        "head": {"bias": P(), "kernel": P(None, ALL)},
        "layers": {"bias": P("x", None), "kernel": P("x", None, "y")},
    },
}


def network():
    rng = np.random.default_rng(0)

    def draw(*shape):
        return (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)

    return {
        "embed": {"embedding": draw(WORDS, WIDTH)},
        "head": {"bias": np.zeros(WORDS, np.float32), "kernel": draw(WIDTH, WORDS)},
        "layers": {
            "bias": np.zeros((LAYERS, WIDTH), np.float32),
            "kernel": draw(LAYERS, WIDTH, WIDTH),
        },
    }


def loss(params, words):
    """Predicts the next word of a row from the one before it."""

    def layer(x, p):
        return x + jnp.tanh(x @ p["kernel"] + p["bias"][None]), None

    x, _ = jax.lax.scan(layer, params["embed"]["embedding"][words], params["layers"])
    scores = x @ params["head"]["kernel"] + params["head"]["bias"][None]
    return optax.softmax_cross_entropy_with_integer_labels(
        scores, jnp.roll(words, -1)
    ).mean()


def gsm(masks=None):
    del masks
    return optax.chain(
        sparse_optax.gsm_mask(density=0.1, track_reactivated=True),
        optax.add_decayed_weights(5e-3, mask=sparse_optax.eligible),
        optax.sgd(0.1, momentum=0.9, nesterov=True),
    )


CYCLES = {"update_period": 2, "update_stop": STEPS + 1, "key": 0, "stacked": STACKED}


def sparse_momentum(masks=None, *, packed=False):
    return sparse_optax.sparse_momentum_regrow(
        optax.sgd(0.1, momentum=0.9),
        density=0.2 if masks is None else None,
        masks=masks,
        packed=packed,
        **CYCLES,
    )


def random_growth(masks=None):
    return regrowth.regrow(
        optax.sgd(0.1, momentum=0.9),
        prune=regrowth.prune.magnitude,
        redistribute=regrowth.redistribute.nonzeros,
        grow=regrowth.grow.random,
        density=0.2 if masks is None else None,
        masks=masks,
        **CYCLES,
    )


METHODS = {
    "gsm": gsm,
    "sparse_momentum": sparse_momentum,
    "packed": functools.partial(sparse_momentum, packed=True),
    "random_growth": random_growth,
}
# All-reduces in a program: those of the searches and of the statistics of layers, and
# for the passive weights that GSM wakes one a leaf. No more with more leaves.
MOST_SUMS = {"gsm": 4, "sparse_momentum": 12, "packed": 12, "random_growth": 12}


def step_of(tx):
    def step(gradient, state, params):
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step)


@functools.cache
def first_masks():
    return sparse_optax.get_masks(sparse_momentum().init(network()))


@functools.cache
def on_one_device(method):
    """Gradients of a training run on one device, and all states it went through."""
    tx = METHODS[method](first_masks())
    params = jax.tree.map(jnp.asarray, network())
    state, step, gradient = tx.init(params), step_of(tx), jax.jit(jax.grad(loss))
    words = np.random.default_rng(1).integers(0, WORDS, (STEPS, 32))
    gradients, trail = [], []
    for t in range(STEPS):
        gradients.append(jax.device_get(gradient(params, words[t])))
        params, state = step(gradients[-1], state, params)
        trail.append(jax.device_get((params, state)))
    return gradients, trail


@on_eight
@pytest.mark.parametrize("method", ["sparse_momentum", "random_growth"])
def test_the_recorded_run_has_three_cycles(method):
    """Else equal masks on a mesh would mean little."""
    trail = on_one_device(method)[1]
    kept = [jax.tree.leaves(sparse_optax.get_masks(state)) for _, state in trail]
    moved = [
        sum(int(np.sum(a != b)) for a, b in zip(old, new, strict=True))
        for old, new in itertools.pairwise(kept)
    ]
    assert [m > 100 for m in moved] == [False, True] * 3 + [False]


@on_eight
def test_the_recorded_run_of_gsm_moves_its_mask():
    trail = on_one_device("gsm")[1]
    moved = [int(optax.tree.get(state, "gsm_reactivated")) for _, state in trail]
    assert min(moved[1:]) > 100


class OnMesh:
    """A method on a mesh: what it starts from, and its step, compiled."""

    def __init__(self, method, placement, kind, *, in_context=True):
        self.mesh, self.specs = mesh_of(kind), PLACEMENTS[placement]
        self.in_context = in_context
        self.method = method
        # Packed masks change how a state is stored, and nothing else.
        recorded = "sparse_momentum" if method == "packed" else method
        self.gradients, self.expected = on_one_device(recorded)
        masks = first_masks()
        with self.context():
            tx = METHODS[method](placed(masks, self.mesh, self.specs))
            self.params = placed(network(), self.mesh, self.specs)
            self.state = tx.init(self.params)
            if not in_context:
                # What is no part of a leaf would otherwise be on one device.
                self.state = self.spread(self.state)
            arguments = self.gradient(0), self.state, self.params
            self.program = step_of(tx).lower(*arguments).compile()

    def context(self):
        return jax.set_mesh(self.mesh) if self.in_context else contextlib.nullcontext()

    def spread(self, tree):
        everywhere = NamedSharding(self.mesh, P())

        def put(x):
            on_mesh = isinstance(x.sharding, NamedSharding)
            return x if on_mesh else jax.device_put(x, everywhere)

        return jax.tree.map(put, tree)

    def gradient(self, t):
        return placed(self.gradients[t], self.mesh, self.specs)

    def check_traffic(self):
        assert_small_sums_only(self.program, SMALL, MOST_SUMS[self.method])
        if self.method != "gsm":
            always = collectives(entry(self.program))
            assert always == {}, "an update without a cycle should send nothing"

    def check_run(self):
        """After each step the bits are those of one device, and lie as at first."""
        with self.context():
            params, state = self.params, self.state
            for t in range(STEPS):
                params, state = self.program(self.gradient(t), state, params)
                assert_same_bits(
                    comparable(params, state), comparable(*self.expected[t])
                )
                assert_same_place((params, state), (self.params, self.state))


def comparable(params, state):
    """All numbers, with plain masks."""

    def plain(x):
        return x if is_hole(x) else np.asarray(unpack(x))

    if hasattr(state, "regrow_masks"):
        masks = jax.tree.map(plain, state.regrow_masks, is_leaf=is_mask)
        state = state._replace(regrow_masks=masks)
    return params, state


def assert_same_place(tree, before):
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(before), strict=True
    ):
        name = jax.tree_util.keystr(path)
        assert jax.typeof(x) == jax.typeof(y), name
        same = x.sharding.is_equivalent_to(y.sharding, x.ndim)
        assert same, f"{name}: {x.sharding} and before {y.sharding}"


def case(method, placement, kind):
    return pytest.param(method, placement, kind, id=f"{method}-{placement}-{kind.name}")


@on_eight
@pytest.mark.parametrize(
    ("method", "placement", "kind"),
    [
        *(
            case(method, placement, kind)
            for method in ("gsm", "sparse_momentum")
            for placement in PLACEMENTS
            for kind in KINDS
        ),
        case("packed", "mixed", AxisType.Auto),
        case("packed", "fsdp", AxisType.Explicit),
        case("random_growth", "fsdp", AxisType.Auto),
        case("random_growth", "mixed", AxisType.Explicit),
    ],
)
def test_steps(method, placement, kind):
    run = OnMesh(method, placement, kind)
    run.check_traffic()
    run.check_run()


@on_eight
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("method", ["gsm", "sparse_momentum"])
def test_steps_without_a_mesh_in_context(method, kind):
    run = OnMesh(method, "fsdp", kind, in_context=False)
    run.check_traffic()
    run.check_run()


@on_eight
@pytest.mark.parametrize("in_context", [True, False], ids=["in context", "without"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_first_masks(kind, in_context):
    mesh, specs = mesh_of(kind), PLACEMENTS["mixed"]
    with jax.set_mesh(mesh) if in_context else contextlib.nullcontext():
        params = placed(network(), mesh, specs)
        masks = sparse_optax.get_masks(sparse_momentum().init(params))
    assert_same_bits(masks, first_masks())
    assert_same_place(masks, placed(first_masks(), mesh, specs))


@on_eight
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_first_masks_of_a_jitted_init(kind):
    """Only shapes are read there: the program has no array that tells the mesh."""
    mesh, specs = mesh_of(kind), PLACEMENTS["mixed"]
    with jax.set_mesh(mesh):
        params = placed(network(), mesh, specs)
        masks = sparse_optax.get_masks(jax.jit(sparse_momentum().init)(params))
    assert_same_bits(masks, first_masks())


@on_eight
def test_packed_masks_cut_within_a_byte_are_refused():
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        mask = placed({"w": jnp.ones((8, 96), bool)}, mesh, {"w": P(None, ALL)})["w"]
        with pytest.raises(ValueError, match=r"packed.*8 parts.*multiple of 64"):
            sparse_optax.masks.pack(mask)


@on_eight
def test_saliencies_in_a_shard_map():
    """Every leaf in eight shards along axis 0, one pool over all of them."""
    gradient, weights = on_one_device("gsm")[0][0], network()
    chosen = jax.tree.leaves(sparse_optax.eligible(weights))
    pairs = zip(jax.tree.leaves(gradient), jax.tree.leaves(weights), strict=True)
    tree = [pair for pair, use in zip(pairs, chosen, strict=True) if use]
    k = 12_345

    def body(tree):
        return selection.top_k_mask(tree, k, score=saliency, axis_name=ALL)

    program = jax.jit(
        jax.shard_map(
            body, mesh=mesh_of(AxisType.Auto), in_specs=P(ALL), out_specs=P(ALL)
        )
    )
    assert_small_sums_only(program.lower(tree).compile(), SMALL)
    expected = selection.top_k_mask(tree, k, score=saliency)
    assert_same_bits(program(tree), expected)
    assert sum(int(m.sum()) for m in expected) == k
