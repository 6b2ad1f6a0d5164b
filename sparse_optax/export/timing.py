"""Times of calls, measured in turns."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax

Key = TypeVar("Key")


def least_seconds(
    calls: Mapping[Key, Callable[[], Any]], *, rounds: int = 7, turn: float = 0.02
) -> dict[Key, float]:
    """Least seconds of each call. All are called first, to compile; then they take
    turns of about ``turn`` seconds, so that a busy moment of the machine hits all.
    """
    repeats = {}
    for key, call in calls.items():
        jax.block_until_ready(call())
        start = time.perf_counter()
        jax.block_until_ready(call())
        once = max(time.perf_counter() - start, 1e-7)
        repeats[key] = max(1, math.ceil(turn / once))
    least = dict.fromkeys(calls, math.inf)
    for _ in range(rounds):
        for key, call in calls.items():
            start = time.perf_counter()
            for _ in range(repeats[key]):
                result = call()
            jax.block_until_ready(result)
            took = (time.perf_counter() - start) / repeats[key]
            least[key] = min(least[key], took)
    return least
