"""The k largest of |gradient * weight|: this library beside its peers, in one run.

Not collected by default. Run it on an idle machine; each group is one task, and the
column to read is the ratio to the first line:

    python -m pytest benchmarks/bench_selection.py --benchmark-columns=min,median \
        --benchmark-sort=name -k "lenet or 1m"

Peers rank scores that lie ready in memory; ours computes them from gradient and
weight in every pass, as a training step must. "read" is the floor: one pass that
sums the scores. torch joins where it is installed. Sizes: lenet (266 thousand), 1m,
25m, 100m (needs 4 GB). ``-k values`` takes adversarial values instead, ``-k tree``
a tree with the shapes of ResNet-50 and the time to compile for it, ``-k seeds``
four members under vmap.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from shapes import resnet50_kernels

from sparse_optax import selection

try:
    import torch
except ImportError:  # a peer, not a requirement
    torch = None

SIZES = {
    "lenet": [(784, 300), (300, 100), (100, 10)],
    "1m": [(1000, 1000)],
    "25m": [(2560, 10_000)],
    "100m": [(10_000, 10_000)],
}
SHARES = {"60th": 1 / 60, "tenth": 0.1, "half": 0.5}
ROUNDS = {"lenet": 300, "1m": 50, "25m": 10, "100m": 5}


def saliency(gradient, weight):
    return jnp.abs(gradient * weight)


def pairs(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [
        tuple(jnp.asarray(rng.standard_normal(s, dtype=np.float32)) for _ in range(2))
        for s in shapes
    ]


def flat_scores(tree):
    return np.concatenate([np.ravel(np.abs(g * w)) for g, w in tree])


@jax.jit
def read(tree):
    return sum(jnp.sum(saliency(g, w)) for g, w in tree)


@jax.jit
def mask(tree, k):
    return selection.top_k_mask(tree, k, score=saliency)


@jax.jit
def mask_from_guess(tree, k, guess):
    return selection.top_k_mask(tree, k, score=saliency, guess=guess)


@jax.jit
def threshold(tree, k):
    return selection.kth_largest(tree, k, score=saliency)


def ours(name):
    def prepare(tree, k):
        k = jnp.int32(k)
        guess = 1.05 * threshold(tree, k)
        call = {
            "a read": lambda: read(tree),
            "mask": lambda: mask(tree, k),
            "mask from a guess 5% off": lambda: mask_from_guess(tree, k, guess),
            "threshold": lambda: threshold(tree, k),
        }[name]
        return lambda: jax.block_until_ready(call())

    return prepare


def peer_sort(tree, k):
    del k
    x, sort = jnp.asarray(flat_scores(tree)), jax.jit(jnp.sort)
    return lambda: sort(x).block_until_ready()


def peer_top_k(tree, k):
    x, top = jnp.asarray(flat_scores(tree)), jax.jit(lax.top_k, static_argnums=1)
    return lambda: jax.block_until_ready(top(x, k))


def peer_partition(tree, k):
    x = flat_scores(tree)
    return lambda: np.partition(x, x.size - k)


def peer_torch(tree, k):
    x = torch.from_numpy(flat_scores(tree))
    return lambda: torch.topk(x, k, sorted=False)


RIVALS = {
    name: ours(name)
    for name in ("a read", "mask", "mask from a guess 5% off", "threshold")
} | {
    "peer jnp.sort": peer_sort,
    "peer lax.top_k": peer_top_k,
    "peer numpy.partition": peer_partition,
    "peer torch.topk": peer_torch,
}
# What takes seconds a call at these sizes is timed once.
SLOW = {"peer jnp.sort", "peer lax.top_k", "peer torch.topk", "peer numpy.partition"}


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("size", SIZES)
def test_sizes(benchmark, size, share, rival):
    if rival == "peer torch.topk" and torch is None:
        pytest.skip("torch is not installed")
    tree = pairs(SIZES[size])
    k = int(SHARES[share] * sum(g.size for g, _ in tree))
    call = RIVALS[rival](tree, k)
    benchmark.group = f"{size}, k = {share}"
    rounds = 2 if rival in SLOW and size in ("25m", "100m") else ROUNDS[size]
    benchmark.pedantic(call, rounds=rounds, warmup_rounds=1)


# Values on which one way of bracketing or another does badly.


def values(kind, n):
    rng = np.random.default_rng(0)
    normal = rng.standard_normal(n, dtype=np.float32)
    return {
        "normal": lambda: normal,
        "equal": lambda: np.full(n, 0.5, np.float32),
        "two values": lambda: (rng.random(n) < 0.02).astype(np.float32),
        "sorted": lambda: np.sort(normal),
        "heavy tails": lambda: np.exp(15 * normal),
        "mostly zeros": lambda: np.where(rng.random(n) < 0.01, normal, np.float32(0)),
        "subnormal": lambda: rng.integers(1, 2**22, n, np.uint32).view(np.float32),
        "one inf": lambda: np.where(np.arange(n) == 7, np.float32(np.inf), normal),
        "coarse": lambda: np.round(normal * 8) / 8,
    }[kind]()


VALUES = (
    "a read|normal|equal|two values|sorted|heavy tails|mostly zeros|subnormal|one inf|"
    "coarse"
).split("|")


@jax.jit
def mask_plain(x, k):
    return selection.top_k_mask(x, k)


@pytest.mark.parametrize("kind", VALUES)
def test_values(benchmark, kind):
    n = 25_600_000
    x = jnp.asarray(values("normal" if kind == "a read" else kind, n))
    add = jax.jit(jnp.sum)
    k = jnp.int32(n // 60)
    call = (lambda: add(x)) if kind == "a read" else (lambda: mask_plain(x, k))
    benchmark.group = "25.6 million values, k = 60th"
    benchmark.pedantic(lambda: jax.block_until_ready(call()), rounds=8, warmup_rounds=1)


# A tree of many leaves.


@pytest.mark.parametrize("rival", ["a read", "mask", "mask from a guess 5% off"])
def test_tree(benchmark, rival):
    tree = pairs(resnet50_kernels())
    k = sum(g.size for g, _ in tree) // 60
    benchmark.group = "tree of ResNet-50, k = 60th"
    benchmark.pedantic(ours(rival)(tree, k), rounds=10, warmup_rounds=1)


@pytest.mark.parametrize("leaves", [54, 160])
def test_tree_compile(benchmark, leaves):
    """Seconds from a Python function to a program: trace, lower and compile."""
    shapes = (resnet50_kernels() * 3)[:leaves]
    tree = [(jax.ShapeDtypeStruct(s, jnp.float32),) * 2 for s in shapes]

    def build():
        # A new function object is compiled anew.
        program = jax.jit(
            lambda tree, k: selection.top_k_mask(
                tree, k, score=lambda g, w: jnp.abs(g * w)
            )
        )
        return program.lower(tree, jnp.int32(1)).compile()

    benchmark.group = "compile"
    compiled = benchmark.pedantic(build, rounds=1)
    scores = 4 * sum(np.prod(s) for s in shapes)
    memory = compiled.memory_analysis()
    benchmark.extra_info["temporaries / scores"] = memory.temp_size_in_bytes / scores


@pytest.mark.parametrize("members", [1, 4])
def test_seeds(benchmark, members):
    """Members of a vmap; one alone runs without it."""
    trees = [pairs(SIZES["lenet"], seed) for seed in range(members)]
    tree = trees[0] if members == 1 else jax.tree.map(lambda *x: jnp.stack(x), *trees)
    k = jnp.int32(4436)
    program = mask if members == 1 else jax.jit(jax.vmap(mask, in_axes=(0, None)))
    benchmark.group = "seeds of lenet"
    benchmark.pedantic(
        lambda: jax.block_until_ready(program(tree, k)), rounds=100, warmup_rounds=2
    )


if __name__ == "__main__":
    start = time.perf_counter()
    pytest.main([__file__, "--benchmark-columns=min,median", "--benchmark-sort=name"])
    print(f"{time.perf_counter() - start:.0f} s")
