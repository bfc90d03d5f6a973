"""The line of progress, as a terminal gets it."""

import io

import pytest

from dpai_jax import progress
from dpai_jax.progress import ProgressLine


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is set."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def stream():
    return io.StringIO()


def shown(stream):
    """What one line of a terminal shows: a carriage return goes back to its start."""
    screen = ""
    for part in stream.getvalue().removesuffix("\n").split("\r"):
        screen = part + screen[len(part) :]
    return screen


def test_a_step_shows_its_number_what_was_measured_and_the_time(clock, stream):
    line = ProgressLine("DPaI", stream)
    clock[0] += 7
    line(3, 10, {"nodes": 42, "log_paths": 12.345678})
    assert shown(stream) == "DPaI  step 3/10  nodes 42  log_paths 12.3457  7 s"
    assert "\n" not in stream.getvalue()


def test_a_line_is_written_over_the_last_one(clock, stream):
    line = ProgressLine("DPaI", stream)
    line(1, 100, {"log_paths": 1234.56})
    clock[0] += 1
    line(2, 100, {"n": 1})
    assert shown(stream).rstrip() == "DPaI  step 2/100  n 1  1 s"
    line.close("done")
    assert shown(stream).rstrip() == "done"
    assert stream.getvalue().endswith("\n")
    assert stream.getvalue().count("\n") == 1


def test_steps_in_quick_succession_are_left_out_but_for_the_last(clock, stream):
    line = ProgressLine("DPaI", stream)
    for step in range(1, 10):
        line(step, 10, {})
        clock[0] += 0.01
    assert stream.getvalue().count("\r") == 1
    line(10, 10, {})
    assert "step 10/10" in shown(stream)
    assert stream.getvalue().count("\r") == 2


def test_a_later_step_is_shown(clock, stream):
    line = ProgressLine("DPaI", stream)
    line(1, 10, {})
    clock[0] += 60
    line(2, 10, {})
    assert shown(stream) == "DPaI  step 2/10    60 s"


def test_standard_error_is_where_it_goes(capsys):
    ProgressLine("DPaI").close("done")
    captured = capsys.readouterr()
    assert captured.err == "\rdone\n"
    assert captured.out == ""
