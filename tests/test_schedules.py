"""Schedules against their formulas in double precision, and the timing of cycles."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_optax import schedules

fraction = st.floats(1e-6, 1.0)


def cosine(t, initial, stop, floor):
    if t >= stop:
        return floor
    return floor + 0.5 * (initial - floor) * (1 + math.cos(math.pi * t / stop))


def linear(t, initial, stop, floor):
    return initial + (floor - initial) * min(t / stop, 1)


def cubic(t, initial, final, start, stop):
    """Zhu and Gupta's formula, in sparsities as they give it."""
    s_i, s_f = 1 - initial, 1 - final
    t = min(max(t, start), stop)
    return 1 - (s_f + (s_i - s_f) * (1 - (t - start) / (stop - start)) ** 3)


def geometric(t, initial, final, start, stop):
    """The same fraction of what is left goes with each update."""
    t = min(max(t, start), stop)
    keep = (final / initial) ** (1 / (stop - start))
    return initial * keep ** (t - start)


MADE = {
    "cosine": (
        schedules.cosine_prune_rate(0.5, stop=100, floor=0.005),
        lambda t: cosine(t, 0.5, 100, 0.005),
    ),
    "linear": (
        schedules.linear_prune_rate(0.7, stop=90, floor=0.1),
        lambda t: linear(t, 0.7, 90, 0.1),
    ),
    "constant": (schedules.constant_prune_rate(0.3), lambda t: 0.3),
    "cubic": (
        schedules.cubic_density(0.9, 0.1, start=20, stop=80),
        lambda t: cubic(t, 0.9, 0.1, 20, 80),
    ),
    "geometric": (
        schedules.geometric_density(0.9, 0.01, start=20, stop=80),
        lambda t: geometric(t, 0.9, 0.01, 20, 80),
    ),
}


# --- the formulas ---------------------------------------------------------------------
@pytest.mark.parametrize("name", MADE)
def test_formula(name):
    made, formula = MADE[name]
    counts = np.arange(130)
    got = jax.vmap(made)(jnp.arange(130))
    want = np.array([formula(int(t)) for t in counts])
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-7)
    assert np.all(np.diff(got) <= 0)


def test_papers_cosine_by_hand():
    rate = schedules.cosine_prune_rate(stop=4)
    half = 0.25 * math.sqrt(2) / 2
    want = [0.5, 0.25 + half, 0.25, 0.25 - half, 0.0]
    np.testing.assert_allclose([rate(t) for t in range(5)], want, atol=1e-7)
    assert float(rate(4)) == float(rate(10**6)) == 0.0


def test_cubic_by_hand():
    density = schedules.cubic_density(1.0, 0.2, 100, 500)
    # Half way an eighth of the difference is left: 0.2 + 0.8 / 8.
    assert float(density(300)) == pytest.approx(0.3, abs=1e-7)
    assert [float(density(t)) for t in (0, 100)] == [1.0, 1.0]


@given(fraction, fraction, st.integers(0, 2**30), st.integers(1, 2**30))
def test_ends_are_exact(a, b, start, length):
    """Bit for bit: a target of 0.1 is the float32 nearest to 0.1."""
    low, high = sorted((a, b))
    stop = start + length
    for ramp in (schedules.cubic_density, schedules.geometric_density):
        density = ramp(high, low, start, stop)
        for t, end in ((0, high), (start, high), (stop, low), (2**31 - 1, low)):
            assert np.asarray(density(t)) == np.float32(end)
    for factory in (schedules.cosine_prune_rate, schedules.linear_prune_rate):
        rate = factory(high, stop=length, floor=low)
        assert np.asarray(rate(0)) == np.float32(high)
        assert np.asarray(rate(length)) == np.float32(low)
        assert np.asarray(rate(2**31 - 1)) == np.float32(low)
    assert np.asarray(schedules.constant_prune_rate(a)(7)) == np.float32(a)


@pytest.mark.parametrize("stop", [41, 47, 55, 61, 82, 100])
def test_ends_are_exact_in_a_compiled_step(stop):
    """A compiler may multiply by 1 / stop, and 41 * (1 / 41) is below one."""
    ends = {
        schedules.cubic_density(0.9, 0.1, 0, stop): (0.9, 0.1),
        schedules.geometric_density(0.9, 0.1, 0, stop): (0.9, 0.1),
        schedules.cosine_prune_rate(0.5, stop=stop): (0.5, 0.0),
        schedules.linear_prune_rate(0.5, stop=stop): (0.5, 0.0),
    }
    for made, (first, last) in ends.items():
        compiled = jax.jit(made)
        assert np.asarray(compiled(0)) == np.float32(first)
        assert np.asarray(compiled(stop)) == np.float32(last)


@given(fraction, fraction, st.integers(1, 2**31 - 1), st.integers(0, 2**31 - 1))
def test_between_the_ends_a_schedule_stays_between_them(a, b, stop, count):
    low, high = sorted((a, b))
    for made in (
        schedules.cosine_prune_rate(high, stop=stop, floor=low),
        schedules.linear_prune_rate(high, stop=stop, floor=low),
        schedules.cubic_density(high, low, 0, stop),
        schedules.geometric_density(high, low, 0, stop),
    ):
        value = np.float64(made(count))
        assert np.float32(low) * (1 - 1e-6) <= value <= np.float32(high) * (1 + 1e-6)


@pytest.mark.parametrize("n", [1, 3, 20])
def test_geometric_prunes_the_same_fraction_each_time(n):
    """1 - (1 - s)^(1/n) of what is left, n times."""
    density = schedules.geometric_density(1.0, 0.02, 0, 7 * n)
    values = np.float64([density(7 * k) for k in range(n + 1)])
    np.testing.assert_allclose(1 - values[1:] / values[:-1], 1 - 0.02 ** (1 / n), 1e-5)


def test_alternating_by_hand():
    """Dense, sparse from 3 on, phases of 2, sparse for good from 10 on."""
    density = schedules.alternating_density(0.1, phase=2, start=3, stop=10, dense=0.8)
    want = [0.8] * 3 + [0.1, 0.1, 0.8, 0.8, 0.1, 0.1, 0.8] + [0.1] * 4
    got = [np.asarray(density(t)) for t in range(14)]
    assert got == list(np.float32(want))
    np.testing.assert_array_equal(jax.jit(jax.vmap(density))(jnp.arange(14)), got)
    assert got[0].dtype == np.float32
    assert density(2**31 - 1) == np.float32(0.1)


def test_an_end_beyond_the_integers_of_float32():
    """Odd counts past 2**24 are no float32; the way between two has a middle."""
    stop = 2**24 + 3
    density = schedules.cubic_density(1.0, 0.1, stop - 2, stop)
    want = [1.0, 0.1 + 0.9 / 8, 0.1]
    np.testing.assert_allclose([density(stop - 2 + i) for i in range(3)], want, 1e-6)


# --- as optax schedules ---------------------------------------------------------------
@pytest.mark.parametrize("name", MADE)
def test_traced_and_plain_counts_agree(name):
    made, _ = MADE[name]
    for t in (0, 1, 50, 79, 80, 100, 101):
        plain, traced = made(t), jax.jit(made)(jnp.int32(t))
        np.testing.assert_allclose(plain, traced, rtol=0, atol=1e-7)
        for value in (plain, traced):
            assert value.dtype == jnp.float32
            assert value.shape == ()
            assert not value.weak_type
    _, rates = jax.lax.scan(lambda t, _: (t + 1, made(t)), jnp.int32(0), length=120)
    np.testing.assert_allclose(
        rates, jax.vmap(made)(jnp.arange(120)), rtol=0, atol=1e-7
    )


@pytest.mark.parametrize("name", MADE)
def test_no_implicit_promotion(name):
    made, _ = MADE[name]
    with jax.numpy_dtype_promotion("strict"):
        assert made(jnp.int32(50)).dtype == jnp.float32
        assert schedules.is_due(jnp.int32(50), 10, 0, 100).dtype == bool


def test_as_an_injected_hyperparameter():
    tx = optax.inject_hyperparams(optax.scale)(
        step_size=schedules.linear_prune_rate(0.5, stop=4)
    )
    grads = {"w": jnp.ones(2)}
    state = tx.init(grads)
    seen = []
    for _ in range(5):
        updates, state = jax.jit(tx.update)(grads, state)
        seen.append(float(updates["w"][0]))
    assert seen == [0.5, 0.375, 0.25, 0.125, 0.0]


def test_arguments_may_be_traced():
    """As under ``inject_hyperparams``, which rebuilds a factory inside ``update``."""

    @jax.jit
    def rates(initial, stop):
        made = (
            schedules.cosine_prune_rate(initial, stop=stop),
            schedules.linear_prune_rate(initial, stop=stop),
            schedules.constant_prune_rate(initial),
            schedules.cubic_density(1.0, initial, 0, stop),
        )
        return [schedule(5) for schedule in made]

    want = [0.25, 0.25, 0.5, 0.5 + 0.5 / 8]
    np.testing.assert_allclose(rates(0.5, 10), want, rtol=1e-6)


# --- timing ---------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("period", "start", "stop", "due"),
    [
        (10, 0, 40, [10, 20, 30]),  # none after the last of 40 updates
        (10, 0, 41, [10, 20, 30, 40]),
        (10, 0, None, [10, 20, 30, 40, 50]),
        (10, 20, 50, [20, 30, 40]),
        (10, 21, 50, [30, 40]),
        (1, 0, 4, [1, 2, 3]),
        (7, 0, 7, []),
        (60, 0, None, []),
        (10, 0, 0, []),
    ],
)
def test_is_due(period, start, stop, due):
    counts = range(56)
    got = [t for t in counts if schedules.is_due(t, period, start, stop)]
    assert got == due
    at_once = schedules.is_due(jnp.arange(56), period, start, stop)
    assert np.flatnonzero(at_once).tolist() == due
    assert at_once.dtype == bool
    traced = jax.jit(jax.vmap(lambda t: schedules.is_due(t, period, start, stop)))
    assert np.flatnonzero(traced(jnp.arange(56))).tolist() == due


def test_is_due_with_everything_traced():
    due = jax.jit(schedules.is_due)
    assert [bool(due(t, 10, 20, 40)) for t in (0, 10, 20, 25, 30, 40)] == [
        *(False, False, True),
        *(False, True, False),
    ]


@given(st.integers(1, 30), st.integers(0, 40), st.integers(1, 99))
def test_last_due_is_the_last_one(period, start, stop):
    counts = range(100)
    due = [t for t in counts if t > 0 and t % period == 0 and start <= t < stop]
    if due:
        assert schedules.last_due(period, start, update_stop=stop) == due[-1]
    else:
        with pytest.raises(ValueError, match=r"^last_due: .* no cycle is due"):
            schedules.last_due(period, start, update_stop=stop)


def test_a_density_that_ends_at_the_last_cycle_is_reached():
    period, stop = 30, 100
    end = schedules.last_due(period, update_stop=stop)
    reached = schedules.cubic_density(1.0, 0.1, 0, end)
    missed = schedules.cubic_density(1.0, 0.1, 0, stop)
    due = [t for t in range(stop) if schedules.is_due(t, period, update_stop=stop)]
    assert np.asarray(reached(due[-1])) == np.float32(0.1)
    assert float(missed(due[-1])) > 0.1


# --- errors ---------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: schedules.cosine_prune_rate(1.5, stop=9),
            r"^cosine_prune_rate: `initial` must be a number in \[0, 1\]; got 1.5",
        ),
        (
            lambda: schedules.cosine_prune_rate(0.5, stop=9, floor=0.6),
            r"`floor` must be a number in \[0, 0.5\]; got 0.6",
        ),
        (
            lambda: schedules.cosine_prune_rate(0.5, stop=0),
            "`stop` must be an integer of at least 1; got 0",
        ),
        (
            lambda: schedules.cosine_prune_rate(0.5, stop=None),
            "`stop` must be an integer of at least 1; got None",
        ),
        (
            lambda: schedules.linear_prune_rate(math.nan, stop=9),
            r"^linear_prune_rate: `initial` must be a number in \[0, 1\]; got nan",
        ),
        (
            lambda: schedules.linear_prune_rate(0.5, stop=9.5),
            "`stop` must be an integer of at least 1; got 9.5",
        ),
        (
            lambda: schedules.linear_prune_rate(0.5, stop=True),
            "`stop` must be an integer",
        ),
        (
            lambda: schedules.constant_prune_rate(-0.1),
            r"^constant_prune_rate: `value` must be a number in \[0, 1\]; got -0.1",
        ),
        (
            lambda: schedules.constant_prune_rate("0.5"),
            r"`value` must be a number in \[0, 1\]; got '0.5'",
        ),
        (
            lambda: schedules.cubic_density(0.0, 0.1, 0, 9),
            r"^cubic_density: `initial` must be a number in \(0, 1\]; got 0.0",
        ),
        (
            lambda: schedules.cubic_density(1.0, 0, 0, 9),
            r"`final` must be a number in \(0, 1\]; got 0",
        ),
        (
            lambda: schedules.cubic_density(0.1, 0.9, 0, 9),
            r"`final`=0.9 must be at most `initial`=0.1.*for sparsities give 1 - s",
        ),
        (
            lambda: schedules.cubic_density(1.0, 0.1, -1, 9),
            "`start` must be an integer of at least 0; got -1",
        ),
        (
            lambda: schedules.cubic_density(1.0, 0.1, 9, 9),
            "`stop`=9 must be above `start`=9",
        ),
        (
            lambda: schedules.geometric_density(0.1, 0.9, 0, 9),
            r"^geometric_density: `final`=0.9 must be at most `initial`=0.1",
        ),
        (
            lambda: schedules.geometric_density(1.0, 0.1, 9, 9),
            "^geometric_density: `stop`=9 must be above `start`=9",
        ),
        (
            lambda: schedules.alternating_density(0.5, phase=2, stop=9, dense=0.2),
            r"^alternating_density: `final`=0.5 must be at most `dense`=0.2",
        ),
        (
            lambda: schedules.alternating_density(0.5, phase=0, stop=9),
            "^alternating_density: `phase` must be an integer of at least 1; got 0",
        ),
        (
            lambda: schedules.alternating_density(0.5, phase=2, start=9, stop=8),
            "`stop`=8 must be at least `start`=9",
        ),
        (
            lambda: schedules.first_due(0),
            "^first_due: `update_period` must be an integer",
        ),
        (
            lambda: schedules.first_due(1, -1),
            "^first_due: `update_start` must be an integer",
        ),
        (
            lambda: schedules.last_due(9, update_stop=9),
            "^last_due: with `update_period`=9, .* no cycle is due",
        ),
        (
            lambda: schedules.is_due(3, 0),
            "^is_due: `update_period` must be an integer of at least 1; got 0",
        ),
        (
            lambda: schedules.is_due(3, 2.5),
            "`update_period` must be an integer of at least 1; got 2.5",
        ),
        (lambda: schedules.is_due(3, 1, -1), "`update_start` must be an integer"),
        (lambda: schedules.is_due(3, 1, 0, -1), "`update_stop` must be an integer"),
        (
            lambda: schedules.last_due(0, update_stop=5),
            "^last_due: `update_period` must be an integer of at least 1; got 0",
        ),
        (
            lambda: schedules.last_due(5, update_stop=None),
            "^last_due: `update_stop` must be an integer",
        ),
    ],
)
def test_messages(make, message):
    with pytest.raises(ValueError, match=message):
        make()
