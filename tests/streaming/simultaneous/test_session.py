"""Sessions that read and answer at once: text as the library's function says, saves that go on bit for bit."""

import jax
import numpy as np
import pytest

import streamjax as sj
from streamjax.streaming.simultaneous import SimultaneousSession, generate_while_reading, init_groups
from tests.streaming.tiny_models import build
from tests.streaming.tiny_sessions import BYTES, Endless

CACHE = sj.kv.Cascade(sj.kv.Sink(2), sj.kv.Window(6))


def test_a_session_reads_writes_and_goes_on_where_it_was_saved(tmp_path):
    model = build(BYTES)

    def start(seed=3, **options):
        return SimultaneousSession(model, Endless(), CACHE, distance=4, seed=seed, chunk_size=1, **options)

    session = start()
    first = "".join(session.answer(["Gut", "en Tag"], wait=3, between=2, max_new_tokens=5))
    source = [256, *b"Guten Tag"]
    pieces = list(
        generate_while_reading(
            model, init_groups(model, CACHE, distance=4), [source], wait=3, between=2, begin=[256], max_new_tokens=5,
            key=jax.random.key(3), chunk_size=1,
        )
    )  # fmt: skip
    state, said = pieces[-1][0], [token for _, token in pieces]
    assert first == Endless().decode(said)
    assert session.read_and_written == (len(source), 5)
    jax.tree.map(np.testing.assert_array_equal, session.state, state)
    session.save(tmp_path / "saved")
    other = start(seed=9)
    other.load(tmp_path / "saved")
    for one in (session, other):
        assert one.read("!") == 1
    assert "".join(session.write(4)) == "".join(other.write(4))
    jax.tree.map(np.testing.assert_array_equal, session.state, other.state)
    with pytest.raises(ValueError, match="saved with other caches"):
        SimultaneousSession(model, Endless(), CACHE, chunk_size=1).load(tmp_path / "saved")
    with pytest.raises(ValueError, match="saved with another model"):
        SimultaneousSession(build(BYTES, seed=1), Endless(), CACHE, distance=4).load(tmp_path / "saved")
