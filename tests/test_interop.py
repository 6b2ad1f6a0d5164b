"""The real neural network libraries: their own modules, train steps and parameters.

Each library trains a multilayer perceptron and a small language model with attention
in its own idiom. Two probes in the chain keep the gradient before and after GSM, so
that what a library handed over can be replayed on a plain dict of arrays.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest

import sparse_optax
from sparse_optax import layers, masks
from sparse_optax.layers import is_hole

pytest.importorskip("flax")
pytest.importorskip("equinox")
pytest.importorskip("haiku")

import equinox as eqx
import haiku as hk
from flax import linen, nnx
from flax.training import train_state

pytestmark = pytest.mark.core

WORDS, WIDTH, HEADS, LAYERS = 13, 8, 2, 2
STEPS, CYCLE = 5, 3
DENSITY = 0.25

# Its name in the lowest flax that fits the lowest jax.
AS_PURE = getattr(nnx, "as_pure", None) or nnx.pure
_RNG = np.random.default_rng(0)
IMAGES = _RNG.standard_normal((16, 12)).astype(np.float32)
CLASSES = _RNG.integers(0, 4, 16)
# A text that leaves some words out: their embeddings have no gradient.
TEXT = _RNG.integers(0, WORDS - 4, (4, 6))


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly():
    """Programs that run for microseconds need not be fast."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def cross_entropy(scores, labels):
    return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()


def loss_of(apply, task):
    """The loss as a function of whatever ``apply`` takes the parameters in."""
    if task == "mlp":
        return lambda model: cross_entropy(apply(model, IMAGES), CLASSES)
    return lambda model: cross_entropy(apply(model, TEXT), jnp.roll(TEXT, -1, 1))


class Run(NamedTuple):
    """A model in training: ``train()`` takes a step and gives the loss before it."""

    train: object
    now: object  # () -> (params, optimizer state)


# --- flax.linen -----------------------------------------------------------------------
class LinenMlp(linen.Module):
    dtype: object = jnp.float32

    @linen.compact
    def __call__(self, x):
        for width in (20, 10):
            x = jax.nn.relu(linen.Dense(width, param_dtype=self.dtype)(x))
        return linen.Dense(4, param_dtype=self.dtype)(x)


class LinenBlock(linen.Module):
    @linen.compact
    def __call__(self, x, _):
        x += linen.MultiHeadDotProductAttention(HEADS, name="attention")(
            linen.LayerNorm(name="norm")(x)
        )
        return x + jax.nn.relu(linen.Dense(WIDTH, name="mlp")(x)), None


class LinenModel(linen.Module):
    @linen.compact
    def __call__(self, words):
        x = linen.Embed(WORDS, WIDTH, name="embed")(words)
        stack = linen.scan(
            LinenBlock,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=LAYERS,
        )
        x, _ = stack(name="blocks")(x, None)
        return linen.Dense(WORDS, name="head")(x)


def run_linen(task, tx, **options):
    model = LinenMlp(**options) if task == "mlp" else LinenModel()
    sample = IMAGES if task == "mlp" else TEXT
    params = model.init(jax.random.key(0), sample)["params"]
    state = train_state.TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    @jax.jit
    def step(state):
        loss = loss_of(lambda p, x: state.apply_fn({"params": p}, x), task)
        value, grads = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads), value

    def train():
        nonlocal state
        state, value = step(state)
        return value

    return Run(train, lambda: (state.params, state.opt_state))


# --- flax.nnx -------------------------------------------------------------------------
class NnxMlp(nnx.Module):
    def __init__(self, rngs):
        sizes = zip((12, 20, 10), (20, 10, 4), strict=True)
        self.layers = nnx.List([nnx.Linear(m, n, rngs=rngs) for m, n in sizes])

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = jax.nn.relu(layer(x))
        return self.layers[-1](x)


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.mlp = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm(x))
        return x + jax.nn.relu(self.mlp(x))


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(WORDS, WIDTH, rngs=rngs)
        self.blocks = nnx.List([NnxBlock(rngs) for _ in range(LAYERS)])
        self.head = nnx.Linear(WIDTH, WORDS, rngs=rngs)

    def __call__(self, words):
        x = self.embed(words)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def run_nnx(task, tx):
    model = (NnxMlp if task == "mlp" else NnxModel)(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss = loss_of(lambda model, x: model(x), task)
        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    def now():
        return nnx.state(model, nnx.Param), AS_PURE(optimizer.opt_state)

    return Run(lambda: step(model, optimizer), now)


# --- equinox --------------------------------------------------------------------------
class EqxModel(eqx.Module):
    embed: eqx.nn.Embedding
    norm: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    head: eqx.nn.Linear

    def __init__(self, key):
        embed, attention, head = jax.random.split(key, 3)
        self.embed = eqx.nn.Embedding(WORDS, WIDTH, key=embed)
        self.norm = eqx.nn.LayerNorm(WIDTH)
        self.attention = eqx.nn.MultiheadAttention(
            HEADS, WIDTH, use_query_bias=True, key=attention
        )
        self.head = eqx.nn.Linear(WIDTH, WORDS, key=head)

    def __call__(self, words):
        x = jax.vmap(self.embed)(words)
        y = jax.vmap(self.norm)(x)
        return jax.vmap(self.head)(x + self.attention(y, y, y))


def run_equinox(task, tx):
    key = jax.random.key(0)
    # The multilayer perceptron holds its activation: a leaf that is no array, and
    # None once it is filtered out.
    model = eqx.nn.MLP(12, 4, 16, 2, key=key) if task == "mlp" else EqxModel(key)
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state):
        loss = loss_of(lambda model, x: jax.vmap(model)(x), task)
        value, grads = eqx.filter_value_and_grad(loss)(model)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, state = tx.update(grads, state, params)
        return eqx.apply_updates(model, updates), state, value

    def train():
        nonlocal model, state
        model, state, value = step(model, state)
        return value

    return Run(train, lambda: (eqx.filter(model, eqx.is_inexact_array), state))


# --- haiku ----------------------------------------------------------------------------
def haiku_model(words):
    x = hk.Embed(WORDS, WIDTH, name="embed")(words)
    y = hk.LayerNorm(-1, create_scale=True, create_offset=True, name="norm")(x)
    attention = hk.MultiHeadAttention(
        HEADS,
        WIDTH // HEADS,
        w_init=hk.initializers.VarianceScaling(),
        model_size=WIDTH,
        name="attention",
    )
    return hk.Linear(WORDS, name="head")(x + attention(y, y, y))


def run_haiku(task, tx):
    def forward(x):
        return hk.nets.MLP((20, 10, 4))(x) if task == "mlp" else haiku_model(x)

    init, apply = hk.without_apply_rng(hk.transform(forward))
    params = init(jax.random.key(0), IMAGES if task == "mlp" else TEXT)
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss_of(apply, task))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    def train():
        nonlocal params, state
        params, state, value = step(params, state)
        return value

    return Run(train, lambda: (params, state))


# --- what takes part ------------------------------------------------------------------
RUNS = {
    "linen": run_linen,
    "nnx": run_nnx,
    "equinox": run_equinox,
    "haiku": run_haiku,
}
PROJECTIONS = ("key", "out", "query", "value")
SPARSE = {
    ("linen", "mlp"): {f"Dense_{i}/kernel" for i in range(3)},
    ("nnx", "mlp"): {f"layers/{i}/kernel" for i in range(3)},
    ("equinox", "mlp"): {f"layers/{i}/weight" for i in range(3)},
    ("haiku", "mlp"): {f"mlp/~/linear_{i}/w" for i in range(3)},
    ("linen", "model"): {
        "head/kernel",
        "blocks/mlp/kernel",
        *(f"blocks/attention/{p}/kernel" for p in PROJECTIONS),
    },
    ("nnx", "model"): {
        "head/kernel",
        *(f"blocks/{i}/mlp/kernel" for i in range(LAYERS)),
        *(
            f"blocks/{i}/attention/{p}/kernel"
            for i in range(LAYERS)
            for p in PROJECTIONS
        ),
    },
    ("equinox", "model"): {
        "head/weight",
        *(f"attention/{p}_proj/weight" for p in ("key", "output", "query", "value")),
    },
    ("haiku", "model"): {
        "head/w",
        *(f"attention/{p}/w" for p in ("key", "linear", "query", "value")),
    },
}
CASES = [pytest.param(*case, id="-".join(case)) for case in SPARSE]
# A cycle over many leaves compiles for seconds: the language model where biases have
# two dimensions, and where layers are stacked.
TRAINED = {f"{library}-mlp" for library in RUNS} | {"linen-model", "nnx-model"}


def stacked(library, task):
    """Leaves of ``nn.scan``, with the axis that counts their layers."""
    if (library, task) != ("linen", "model"):
        return {}
    return {name: 0 for name in SPARSE[library, task] if name.startswith("blocks/")}


def by_name(tree):
    """``{name: array}`` of a tree, without its holes."""
    flat = jax.tree.leaves(tree, is_leaf=is_hole)
    pairs = zip(layers.leaf_names(tree), flat, strict=True)
    return {name: np.asarray(x) for name, x in pairs if not is_hole(x)}


def probe():
    """Passes the gradient on and keeps it in its state."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda updates, state, params=None: (updates, updates),
    )


def sparse_momentum(library, task):
    return sparse_optax.sparse_momentum_regrow(
        optax.sgd(0.1, momentum=0.9),
        density=DENSITY,
        update_period=CYCLE,
        update_stop=2 * CYCLE,
        prune_rate=0.5,
        stacked=stacked(library, task),
        key=0,
    )


@pytest.mark.parametrize(("library", "task"), CASES)
def test_leaves_that_take_part(library, task):
    params, _ = RUNS[library](task, optax.identity()).now()
    chosen = by_name(sparse_optax.eligible(params))
    assert {name for name, yes in chosen.items() if yes} == SPARSE[library, task]
    tables = by_name(sparse_optax.eligible(params, embeddings=True))
    decayed = by_name(sparse_optax.decay_mask(params))
    embeddings = {name for name in chosen if name.split("/")[0] == "embed"}
    assert bool(embeddings) == (task == "model")
    assert {n for n in chosen if tables[n] and not chosen[n]} == embeddings
    assert decayed == tables
    dense = {name: x for name, x in by_name(params).items() if not chosen[name]}
    if library in ("linen", "nnx") and task == "model":
        # Rank alone would not tell these from a kernel.
        ranks = {x.ndim for name, x in dense.items() if name.endswith("query/bias")}
        assert min(ranks) >= 2


def layers_of(tree, layers):
    """Arrays of the layers in leaf order, those of a stacked leaf one by one."""
    named = by_name(tree).items()
    return [part for name, x in named for part in (x if name in layers else [x])]


@pytest.mark.parametrize(
    ("library", "task"),
    [case for case in CASES if case.id in TRAINED],
)
def test_sparse_momentum(library, task):
    run = RUNS[library](task, sparse_momentum(library, task))
    first, state = run.now()
    layers = stacked(library, task)
    kept, before = by_name(sparse_optax.get_masks(state)), None
    assert set(kept) == SPARSE[library, task]
    for mask in layers_of(sparse_optax.get_masks(state), layers):
        assert mask.sum() == int(DENSITY * mask.size)
    total = sum(int(mask.sum()) for mask in kept.values())

    # Before the first step too, in the library's own type of tree.
    thinned = sparse_optax.sparsify(first, state)
    assert jax.tree.structure(thinned) == jax.tree.structure(first)
    first = by_name(first)
    for name, x in by_name(thinned).items():
        np.testing.assert_array_equal(x, np.where(kept.get(name, True), first[name], 0))

    losses = []
    for t in range(STEPS):
        before = run.now()
        losses.append(float(run.train()))
        params, state = run.now()
        params, old = by_name(params), kept
        kept = by_name(sparse_optax.get_masks(state))
        assert sum(int(mask.sum()) for mask in kept.values()) == total
        for name, mask in kept.items():
            assert not params[name][~mask].view(np.uint32).any(), name
            if t != CYCLE:
                np.testing.assert_array_equal(mask, old[name], name)
        if t == CYCLE:
            check_cycle(before, state, layers)
    assert losses[-1] < losses[0]
    for name in params.keys() - kept.keys():
        # In exact numbers a key's bias changes no attention: its gradient is noise.
        assert "key" in name or (params[name] != first[name]).any(), name


def check_cycle(before, state, layers):
    """Every layer, each of a stack too, against Algorithm 1 in NumPy."""
    params, old_state = before
    masks_before = sparse_optax.get_masks(old_state)
    sparse = by_name(masks_before).keys()
    weights, old, momentum = (
        layers_of({n: x for n, x in by_name(tree).items() if n in sparse}, layers)
        for tree in (params, masks_before, old_state.inner_state[0].trace)
    )
    expected, removed, grown, _ = oracles.sparse_momentum_cycle(
        weights, old, momentum, 0.5
    )
    got = layers_of(sparse_optax.get_masks(state), layers)
    for mask, wanted in zip(got, expected, strict=True):
        np.testing.assert_array_equal(mask, wanted)
    assert sum(removed) == sum(grown) > 0
    for tree, wanted in ((state.removed, removed), (state.grown, grown)):
        numbers = [np.ravel(x) for x in by_name(tree).values()]
        np.testing.assert_array_equal(np.concatenate(numbers), wanted)


def passing(gradient, params, names, k):
    """Masks by name of the ``k`` largest |g w| in float32."""
    scores = [np.abs(np.float32(gradient[n]) * np.float32(params[n])) for n in names]
    return dict(zip(names, oracles.top_k(scores, k), strict=True))


@pytest.mark.parametrize(
    ("library", "task", "options"),
    [
        *(pytest.param(*case, {}, id="-".join(case)) for case in SPARSE),
        pytest.param("linen", "mlp", {"dtype": jnp.bfloat16}, id="bfloat16"),
    ],
)
def test_gsm(library, task, options):
    """Of one gradient the Q most salient entries pass, those of embeddings all."""
    tx = optax.chain(
        probe(), sparse_optax.gsm_mask(density=0.1), probe(), optax.sgd(0.1)
    )
    run = RUNS[library](task, tx, **options)
    params, _ = run.now()
    params = by_name(params)
    run.train()
    _, (given, state, passed, _) = run.now()
    given, passed, numbers = by_name(given), by_name(passed), by_name(state.gsm_passed)
    names = [n for n in params if n in SPARSE[library, task]]
    assert set(numbers) == set(names)
    if options:
        assert {x.dtype for x in given.values()} == {jnp.dtype(options["dtype"])}
    quota = sum(params[name].size for name in names) // 10
    expected = passing(given, params, names, quota)
    for name, gradient in given.items():
        kept = expected.get(name, True)
        np.testing.assert_array_equal(passed[name], np.where(kept, gradient, 0), name)
        if name in names:
            assert numbers[name] == np.sum(kept)
    assert sum(int(n) for n in numbers.values()) == quota


def test_layers_stacked_by_a_map_of_equinox():
    """Equinox calls a kernel and a norm's scale ``weight``: ``where`` tells them."""

    def layer(key):
        return {"norm": eqx.nn.LayerNorm(8), "linear": eqx.nn.Linear(8, 8, key=key)}

    layers = eqx.filter_vmap(layer)(jax.random.split(jax.random.key(0), LAYERS))
    params = eqx.filter(layers, eqx.is_inexact_array)
    assert by_name(params)["norm/weight"].shape == (LAYERS, 8)

    def where(name, leaf):
        return leaf.ndim == 3

    tx = sparse_optax.sparse_momentum_regrow(
        optax.sgd(0.1, momentum=0.9),
        density=DENSITY,
        update_period=2,
        where=where,
        stacked={"linear/weight": 0},
        prune_rate=0.5,
        key=0,
    )
    kept = by_name(sparse_optax.get_masks(tx.init(params)))
    assert {n: m.sum((1, 2)).tolist() for n, m in kept.items()} == {
        "linear/weight": [16, 16]
    }
    # A tree of bools made by equinox's own surgery says the same.
    chosen = jax.tree.map(lambda _: False, params)
    chosen = eqx.tree_at(lambda tree: tree["linear"].weight, chosen, True)
    assert by_name(sparse_optax.eligible(params, chosen)) == by_name(
        sparse_optax.eligible(params, where)
    )


MEMBERS = 4


def compressed_mean(gradient, axis_name):
    """All-reduce of int8: one scale a leaf, common to all members."""

    def mean(g):
        scale = jax.lax.pmax(jnp.abs(g).max(), axis_name) / 127
        small = jnp.round(g / scale).astype(jnp.int8)
        return jax.lax.psum(small.astype(jnp.int32), axis_name) * scale / MEMBERS

    return jax.tree.map(mean, gradient)


@pytest.mark.parametrize("quota", [5, 40, 200])
def test_gsm_on_gradients_compressed_to_int8(quota):
    """Saliencies in steps: ties go to the lower index, and no member differs."""
    rng = np.random.default_rng(1)
    shapes = {"in": (16, 12), "mid": (12, 20), "out": (20, 4)}
    # Powers of two, so that the products of equal gradients are equal.
    params = {n: np.exp2(rng.integers(-1, 2, s)) for n, s in shapes.items()}
    params = {name: x.astype(np.float32) for name, x in params.items()}
    gradients = {
        name: np.round(rng.normal(0, 2, (MEMBERS, *shape))).astype(np.float32)
        for name, shape in shapes.items()
    }
    tx = sparse_optax.gsm_mask(density=sparse_optax.budgets.nonzeros(quota))

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None, None), axis_name="members")
    def step(gradient, state, params):
        mean = compressed_mean(gradient, "members")
        updates, state = tx.update(mean, state, params)
        return mean, updates, state

    mean, updates, state = step(gradients, tx.init(params), params)
    for tree in (mean, updates, state):
        for x in jax.tree.leaves(tree):
            np.testing.assert_array_equal(x, np.broadcast_to(x[:1], x.shape))
    mean = {name: np.asarray(g[0]) for name, g in mean.items()}
    scores = np.concatenate([np.ravel(np.abs(mean[n] * params[n])) for n in shapes])
    ordered = np.sort(scores)[::-1]
    assert ordered[quota - 1] == ordered[quota], "no tie at the threshold"
    expected = passing(mean, params, list(shapes), quota)
    for name in shapes:
        np.testing.assert_array_equal(
            updates[name][0], np.where(expected[name], mean[name], 0), name
        )
        assert int(state.gsm_passed[name][0]) == expected[name].sum()
    assert masks.count(expected) == quota
