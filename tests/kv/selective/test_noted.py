"""Every token with what a score wants to know of all queries: against plain loops in float64."""

import numpy as np
import pytest

from streamjax.kv import H2O, Cascade, ExpectedAttention, Full, KNorm, KVzip, Noted, SnapKV
from tests.kv.tier_streams import HEADS, KEY_HEADS, SCALE, Stream, run

LENGTH, CAPACITY = 40, 48
COUNTS = {"in one piece": [(LENGTH, 31)], "in chunks": [(11, 5), (9, 11), (1, 1)]}


def shares(stream) -> np.ndarray:
    """What each query of each head gives to each key, [B, H, T, T]."""
    found = np.zeros((len(stream.q), HEADS, LENGTH, LENGTH))
    for row, head, i in np.ndindex(len(stream.q), HEADS, LENGTH):
        weights = np.exp(SCALE * stream.k[row, : i + 1, head // (HEADS // KEY_HEADS)] @ stream.q[row, i, head])
        found[row, head, i, : i + 1] = weights / weights.sum()
    return found


@pytest.mark.parametrize("counts", COUNTS.values(), ids=list(COUNTS))
@pytest.mark.parametrize("score", [H2O(), KVzip()])
def test_notes_are_of_all_queries(monkeypatch, score, counts):
    """H2O's from the logits by which a chunk attends, where it has more than 4 queries here; KVzip's computed again."""
    for module in ("cascade", "noted_attention"):
        monkeypatch.setattr(f"streamjax.kv.{module}.QUERIES", 4)
    stream = Stream.drawn(2, LENGTH, seed=1)
    out, (state,) = run(Cascade(Noted(CAPACITY, score)), stream, counts, width=max(max(x) for x in counts))
    given = shares(stream).reshape(2, KEY_HEADS, -1, LENGTH, LENGTH)
    wanted = given.sum(axis=(2, 3)) if isinstance(score, H2O) else given.max(axis=(2, 3))
    np.testing.assert_allclose(np.asarray(state.note)[:, :, :LENGTH], wanted, atol=5e-6)
    assert not np.asarray(state.note)[:, :, LENGTH:].any()
    values = np.repeat(stream.v, HEADS // KEY_HEADS, axis=2)
    np.testing.assert_allclose(out, np.einsum("bhts,bshd->bthd", shares(stream), values), atol=5e-6)


def test_queries_are_watched_where_no_attention_is_asked_for():
    stream = Stream.drawn(2, LENGTH, seed=2)
    counts = COUNTS["in chunks"]
    out, (state,) = run(Cascade(Noted(CAPACITY, ExpectedAttention(skip=3))), stream, counts, width=11)
    q = SCALE * stream.q[:, 3:]
    assert state.note is None
    for found, wanted in zip(
        state.memory,
        (np.full((2, HEADS, 1), LENGTH - 3), q.sum(axis=1), np.einsum("bthd,bthe->bhde", q, q)),
        strict=True,
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    dense, _ = run(Cascade(Full(CAPACITY)), stream, counts, width=11)
    np.testing.assert_array_equal(out, dense)


def test_tokens_beyond_the_capacity_leave_notes_as_they_are():
    stream = Stream.drawn(1, LENGTH, seed=3)
    _, (state,) = run(Cascade(Noted(8, H2O())), stream, [(8,), (5,)], width=8)
    assert state.slots.filled.tolist() == [8]
    wanted = shares(stream)[:, :, :8, :8].sum(axis=2).reshape(1, KEY_HEADS, -1, 8).sum(axis=2)
    assert (np.asarray(state.note) >= wanted - 1e-5).all()  # later queries gave more to the same tokens
    assert state.note.shape == (1, KEY_HEADS, 8)


@pytest.mark.parametrize("score", [KNorm(), SnapKV(4)])
def test_a_score_that_asks_nothing_of_all_queries_is_refused(score):
    with pytest.raises(ValueError, match="asks nothing of all queries"):
        Noted(8, score)
