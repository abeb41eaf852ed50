"""Signals that ask a run to stop: noted once, then as they were before."""

import signal

import pytest

from streamjax.training.run.signals import StopSignals


@pytest.fixture(params=["SIGTERM", "SIGHUP", "SIGINT"])
def handled(request):
    """A signal, and what its handler has seen."""
    number, seen = signal.Signals[request.param], []
    before = signal.signal(number, lambda number, frame: seen.append(number))
    yield number, seen
    signal.signal(number, before)


def test_the_first_is_noted_and_the_second_acts_as_before(handled):
    number, seen = handled
    with StopSignals() as stop:
        assert stop.received is None
        signal.raise_signal(number)
        assert (stop.received, seen) == (number, [])
        signal.raise_signal(number)
        assert seen == [number]
    signal.raise_signal(number)
    assert seen == [number] * 2


def test_a_run_under_nohup_outlives_its_terminal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.received is None
    finally:
        signal.signal(signal.SIGHUP, before)
