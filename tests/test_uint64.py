"""Pairs of uint32 against Python's integers."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from sparse_optax.selection import uint64

N = 8
# Uniform bits seldom carry: words are drawn from where carries and borrows happen.
WORDS = st.one_of(
    st.sampled_from([0, 1, 2, 0xFFFF, 0x10000, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1]),
    st.integers(0, 2**32 - 1),
)
NUMBERS = st.lists(
    st.tuples(WORDS, WORDS).map(lambda w: (w[0] << 32) + w[1]), min_size=N, max_size=N
)
SMALL = st.lists(WORDS, min_size=N, max_size=N)


def pairs(numbers):
    high = np.array([n >> 32 for n in numbers], np.uint32)
    low = np.array([n & 0xFFFFFFFF for n in numbers], np.uint32)
    return jnp.asarray(high), jnp.asarray(low)


def numbers(pair):
    high, low = (np.asarray(x) for x in pair)
    assert high.dtype == low.dtype == np.uint32
    return [(int(h) << 32) + int(x) for h, x in zip(high, low, strict=True)]


add64, sub64 = jax.jit(uint64.add64), jax.jit(uint64.sub64)
less64, min64 = jax.jit(uint64.less64), jax.jit(uint64.min64)
mul32, mul64 = jax.jit(uint64.mul32), jax.jit(uint64.mul64)
divmod64 = jax.jit(uint64.divmod64)


@hypothesis.given(NUMBERS, NUMBERS)
def test_sum_difference_and_order(a, b):
    x, y = pairs(a), pairs(b)
    both = list(zip(a, b, strict=True))
    assert numbers(add64(x, y)) == [(i + j) % 2**64 for i, j in both]
    assert numbers(sub64(x, y)) == [(i - j) % 2**64 for i, j in both]
    assert less64(x, y).tolist() == [i < j for i, j in both]
    assert numbers(min64(x, y)) == [min(i, j) for i, j in both]
    assert not any(less64(x, x).tolist())


@hypothesis.given(NUMBERS, SMALL)
def test_products(a, b):
    y = jnp.asarray(np.array(b, np.uint32))
    words = [i & 0xFFFFFFFF for i in a]
    low = jnp.asarray(np.array(words, np.uint32))
    assert numbers(mul32(low, y)) == [i * j for i, j in zip(words, b, strict=True)]
    expected = [i * j % 2**64 for i, j in zip(a, b, strict=True)]
    assert numbers(mul64(pairs(a), y)) == expected


@hypothesis.given(NUMBERS, NUMBERS)
def test_quotient_and_remainder(a, b):
    quotient, remainder = divmod64(pairs(a), pairs(b))
    for i, j, q, r in zip(a, b, numbers(quotient), numbers(remainder), strict=True):
        assert (q, r) == (divmod(i, j) if j else (2**64 - 1, i))


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((7,), None),
        ((3, 5), 0),
        ((3, 5), -1),
        ((2, 3, 4), (0, 2)),
        ((0,), 0),
    ],
)
def test_sums_over_axes(shape, axis):
    rng = np.random.default_rng(0)
    high, low = rng.integers(0, 2**32, (2, *shape), dtype=np.uint32)
    high, low = np.asarray(high), np.asarray(low)
    small = np.array(low.tolist(), object)
    exact = np.array(high.tolist(), object) * 2**32 + small
    axes = tuple(range(len(shape))) if axis is None else axis
    expected = np.asarray(np.sum(exact, axis=axes) % 2**64, object)
    got = uint64.sum64((jnp.asarray(high), jnp.asarray(low)), axis)
    assert numbers(tuple(x.ravel() for x in got)) == list(expected.ravel())
    small = np.asarray(np.sum(small, axis=axes), object)
    got = uint64.sum64(jnp.asarray(low), axis)
    assert got[0].shape == small.shape
    assert numbers(tuple(x.ravel() for x in got)) == list(small.ravel())


@pytest.mark.parametrize("length", [65536, 65537, 2**20 + 1])
def test_long_sums_do_not_overflow(length):
    """All bits set is the most that a limb can hold, past each change of its width."""
    most = jnp.full((length,), 2**32 - 1, jnp.uint32)
    assert uint64.to_int(uint64.sum64(most)) == length * (2**32 - 1)
    pair = uint64.sum64((most, most))
    assert uint64.to_int(pair) == length * (2**64 - 1) % 2**64


def test_from_integers_of_any_kind():
    assert uint64.to_int(uint64.pair64(2**64 - 1)) == 2**64 - 1
    assert uint64.to_int(uint64.sum64(uint64.pair64(2**40 + 1))) == 2**40 + 1
    assert numbers(uint64.pair64(jnp.array([-5, 0, 7]))) == [0, 0, 7]
    assert numbers(uint64.pair64(jnp.array([2**32 - 1], jnp.uint32))) == [2**32 - 1]
    with jax.enable_x64(True):
        x = jnp.array([-(2**40), 2**40 + 3], jnp.int64)
        assert numbers(uint64.pair64(x)) == [0, 2**40 + 3]


def test_choice_batches_and_scans():
    a, b = pairs(range(N)), pairs([2**40 + i for i in range(N)])
    odd = jnp.arange(N) % 2 == 1
    chosen = numbers(uint64.where64(odd, a, b))
    assert chosen == [i if i % 2 else 2**40 + i for i in range(N)]
    assert numbers(jax.vmap(uint64.add64)(a, b)) == [2**40 + 2 * i for i in range(N)]

    def step(total, pair):
        return uint64.add64(total, pair), None

    total, _ = jax.lax.scan(step, uint64.pair64(0), b)
    assert uint64.to_int(total) == sum(2**40 + i for i in range(N))


@pytest.mark.parametrize("value", [-1, 2**64])
def test_a_number_that_does_not_fit(value):
    with pytest.raises(ValueError, match=rf"pair64: value = {value}.*2\*\*64.*give"):
        uint64.pair64(value)


def test_what_is_no_integer():
    with pytest.raises(ValueError, match=r"pair64: value has dtype float32.*give"):
        uint64.pair64(jnp.ones(3))
    with pytest.raises(ValueError, match=r"sum64: x has dtype int32.*give"):
        uint64.sum64(jnp.ones(3, jnp.int32))
