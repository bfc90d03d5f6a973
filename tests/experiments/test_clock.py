import itertools
import time

import jax.numpy as jnp
import pytest

from experiments.benchmarks import clock


@pytest.fixture
def slow_calls(monkeypatch):
    """A call that lasts as many seconds as it has been called times, by a clock of its own."""
    now, calls = [0.0], itertools.count(1)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def fn():
        now[0] += next(calls)
        return jnp.zeros(2)

    return fn


def test_the_median_leaves_the_warm_up_out(slow_calls):
    # Calls 4 to 7 count, which last 4, 5, 6 and 7 seconds.
    assert clock.call_seconds(slow_calls, repeats=4, warmup=3)["median"] == 5.5


def test_the_bandwidth_is_the_bytes_read_and_written_in_the_median_time(monkeypatch):
    passes = []

    def two_seconds(step, repeats):
        passes.extend(step() for _ in range(repeats))
        return {"median": 2.0}

    monkeypatch.setattr(clock, "call_seconds", two_seconds)
    assert clock.copy_bandwidth(4096, repeats=3) == 4096
    # Each pass goes on from the last one's array, which is given up for it.
    assert [array.is_deleted() for array in passes] == [True, True, False]
    assert passes[-1].nbytes == 4096
    assert passes[-1].tolist() == [3.0] * 1024


def test_a_small_array_has_a_bandwidth():
    assert clock.copy_bandwidth(2**16, repeats=2) > 0


def test_nothing_to_measure_is_refused():
    with pytest.raises(ValueError, match="repeats must be at least 1; got 0"):
        clock.call_seconds(lambda: None, repeats=0)
    with pytest.raises(ValueError, match="size must be at least 4 bytes, one float32; got 3"):
        clock.copy_bandwidth(3)
