"""Processes that watch each other: who is gone is told once, by all that are left, and an end in order is no death."""

import contextlib
import json
import os
import queue
import socket
import subprocess
import sys
import threading

import jax
import pytest

from streamjax.parallel import watching

SECONDS = 60  # a generous deadline for what threads do


class Meeting:
    """`gather_json` among threads that each play a process."""

    def __init__(self, count):
        self._values, self._barrier = [None] * count, threading.Barrier(count, timeout=SECONDS)

    def gather(self, index, value):
        self._values[index] = json.loads(json.dumps(value))
        self._barrier.wait()
        found = list(self._values)
        self._barrier.wait()
        return found


class Process(threading.Thread):
    """A process of `count`; what it hears goes into `heard`."""

    def __init__(self, index, meeting):
        super().__init__(daemon=True)
        self.index, self.meeting, self.heard = index, meeting, queue.Queue()

    def run(self):
        LOCAL.process = self
        self.watch = watching.Watch(self.heard.put)


LOCAL = threading.local()


@pytest.fixture
def processes(monkeypatch):
    count = 4
    meeting = Meeting(count)
    monkeypatch.setattr(jax, "process_count", lambda: count)
    monkeypatch.setattr(jax, "process_index", lambda: LOCAL.process.index)
    monkeypatch.setattr(watching, "addresses", lambda: ["127.0.0.1"] * count)
    monkeypatch.setattr(watching, "gather_json", lambda value: meeting.gather(LOCAL.process.index, value))
    monkeypatch.setattr(watching, "_delay_aborts", lambda: None)
    found = [Process(index, meeting) for index in range(count)]
    for process in found:
        process.start()
    for process in found:
        process.join(SECONDS)
    yield found
    for process in found:
        process.watch.leave()


def die(process):
    """Its connections close, as the kernel closes them; a shutdown wakes the thread that reads, too."""
    process.watch._over.set()
    for connection in process.watch._others.values():
        with socket.socket(fileno=os.dup(connection.fileno())) as same, contextlib.suppress(OSError):
            same.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("victim", [0, 2])
def test_all_that_are_left_learn_who_has_died(processes, victim):
    die(processes[victim])
    for process in processes:
        if process.index != victim:
            assert process.heard.get(timeout=SECONDS) == f"process {victim} of 4 has died or cannot be reached"
            process.watch.wait(SECONDS)
    assert all(process.heard.empty() for process in processes)


def test_one_that_fails_is_told_apart_from_one_that_died(processes):
    processes[3].watch.leave(failed=True)
    for process in processes[:3]:
        assert process.heard.get(timeout=SECONDS) == "process 3 of 4 has failed, and says why itself"


def test_an_end_in_order_is_no_death(processes):
    for process in (*processes[1:], processes[0]):
        process.watch.leave()
        die(process)
    assert all(process.heard.empty() for process in processes)


@pytest.mark.skipif(sys.platform != "linux", reason="by Linux's number of the signal")
def test_an_abort_waits_for_the_line():
    program = """
import ctypes, os, threading
from streamjax.parallel.watching import _delay_aborts
_delay_aborts()
threading.Timer(0.2, lambda: (print("who", flush=True), os._exit(1))).start()
ctypes.CDLL(None).abort()  # which lets other threads run, as JAX does
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "who\n")
