"""The replay of a trace: what is found again, and that states which save much work per byte are worth keeping."""

import numpy as np
import pytest

from benchmarks.serving.prefixes.policies import CHUNK, HybridState, Turn, operations, replayed, trace

STATE = HybridState().nbytes


def test_a_session_finds_what_its_last_turn_left():
    ids = np.arange(10 * CHUNK, dtype=np.int32)
    turns = [Turn(0.0, ids[: 4 * CHUNK]), Turn(1.0, ids[: 6 * CHUNK]), Turn(2.0, ids)]
    for policy in ("recency", "engine"):
        assert replayed(turns, 3 * STATE, policy) == (4 + 6) / (4 + 6 + 10)
        assert replayed(turns, STATE, policy) == (4 + 6) / (4 + 6 + 10)  # the one of the turn before is passed
        assert replayed(turns, 0, policy) == 0


@pytest.mark.slow
def test_work_per_byte_beats_recency_and_passed_states_are_worth_little():
    turns = trace("chat", 6)
    assert [turn.seconds for turn in turns] == sorted(turn.seconds for turn in turns)
    found = {policy: replayed(turns, 4 * STATE, policy) for policy in ("blocks", "recency", "work 2", "engine")}
    ideal = replayed(turns, 1 << 62, "recency")
    assert max(found["blocks"], found["recency"]) < found["work 2"] < found["engine"] < ideal


def test_operations_add_up():
    assert operations(0, 9000) == pytest.approx(operations(0, 3000) + operations(3000, 5000) + operations(5000, 9000))
