"""Many conversations for a while: constant memory and no token of another stream; and an engine that is killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.serving.engines import engine, finish, request, served, tokens

ROOT = Path(__file__).parents[2]
KILLED = """
import sys
from tests.serving.engines import engine, request
one = engine(state_dir=sys.argv[1])
one.start()

def go_on(name):
    def hear(event):
        if event.finish_reason is not None:
            print(name, flush=True)
            go_on(name)
    one.submit(request(list(b"hello"), 5, conversation=name), hear)

for i in range(8):
    go_on(f"c{i}")
import time
time.sleep(600)
"""


@pytest.mark.slow
def test_every_answer_that_a_client_has_seen_outlives_a_kill(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    seen = [process.stdout.readline().strip() for _ in range(40)]
    process.send_signal(signal.SIGKILL)
    process.wait()
    again = engine(state_dir=tmp_path)
    kept = {one.name: one.tokens_seen for one in again.conversations()}
    for name in set(seen):
        assert kept[name] >= 10 * seen.count(name)
        turns = kept[name] // 10
        assert kept[name] == 10 * turns
        fresh = engine()
        for _ in range(turns):
            served(fresh, request(list(b"hello"), 5, conversation="x"))
        more = [served(one, request(list(b"more"), 9, conversation=n))[0] for one, n in ((again, name), (fresh, "x"))]
        assert tokens(more[0]) == tokens(more[1])


@pytest.mark.slow
def test_a_thousand_requests_leave_nothing_behind():
    draw = np.random.default_rng(0)
    one = engine(policy="mlfq", prefix_bytes=1 << 18, queue=64)
    one.warm_up()
    first = [request([256, *draw.integers(0, 256, draw.integers(1, 50)).tolist()], 8) for _ in range(20)]
    alone = [tokens(served(engine(), wanted)[0]) for wanted in first]
    held = []
    for round_ in range(50):
        tickets = [one.submit(wanted) for wanted in first]
        for ticket in tickets[:: 1 + round_ % 5]:
            if round_ % 2:
                one.step()
                ticket.cancel()
        finish(one)
        for ticket, wanted in zip(tickets, alone, strict=True):
            events = list(ticket.events())
            assert tokens(events) == wanted[: len(tokens(events))]
            assert events[-1].finish_reason in ("length", "cancelled")
        if round_ >= 10:
            held.append(sum(x.nbytes for x in jax.live_arrays()))
    assert max(held) <= held[0]
    assert one.prefix_bytes <= 1 << 18
    assert one.stats().running == one.stats().waiting == 0
