"""Chunks that read lines of the attention matrix: against plain numbers, and against reading everything."""

import numpy as np
import pytest

from streamjax.kv import H2O, Cascade, Lines, Scored, Window
from streamjax.kv.codecs.integers import Int
from tests.kv.tier_streams import FREQUENCIES, HEADS, KEY_HEADS, SCALE, WIDTH, Stream, plain_attention, run
from tests.oracles.lines import read_chunk


def looking(rows, length, seed):
    """A stream whose heads look at few keys and at few distances."""
    stream, draw = Stream.drawn(rows, length, seed), np.random.default_rng(seed)
    stream.k[:, draw.choice(length, length // 8, replace=False)] *= 3
    own = 2.5 * draw.standard_normal((rows, length, KEY_HEADS, WIDTH))  # heads look 13 and 6 tokens back
    stream.k += own
    for head in range(HEADS):
        away = (13, 6)[head % 2]
        stream.q[:, away:, head] += own[:, :-away, head * KEY_HEADS // HEADS]
    return stream


@pytest.mark.parametrize("seed", [0, 1])
def test_a_chunk_reads_the_lines_that_hold_a_share(monkeypatch, seed):
    """Behind a chunk that is read whole; tiles of keys that do not divide the slots; heads read different lines."""
    monkeypatch.setattr("streamjax.kv.selective.lines.TILE", 7)
    stream = looking(2, 56, seed)
    cascade = Cascade(Lines(60, share=0.7, sample=5, band=2, least=10))
    found, _ = run(cascade, stream, [40, 16])
    kinds = set()
    for row in range(2):
        parts = stream.k[row], stream.v[row]
        expected, chosen = read_chunk(stream.q[row, 40:], *parts, 40, SCALE, 0.7, 5, 2)
        np.testing.assert_allclose(found[row, 40:], expected, atol=1e-4)
        kinds |= {kind for lines in chosen for kind, _ in lines}
        assert chosen[0] != chosen[1]
    assert kinds == {"key", "band"}


@pytest.mark.weekly("whole")
@pytest.mark.parametrize(
    ("share", "counts"), [(1.0, [13]), (0.999999, [(13, 4)]), (0.3, [1])], ids=["whole", "almost", "one query"]
)
def test_with_all_lines_or_one_query_everything_is_read(share, counts):
    """However a stream is cut; a share of almost 1 reads all lines that hold anything."""
    stream = looking(2, 50, 2)
    mine = Cascade(Window(3), Lines(50, share=share, sample=13, band=5, least=6))
    found, _ = run(mine, stream, counts, frequencies=FREQUENCIES)
    np.testing.assert_allclose(found, plain_attention(stream, frequencies=FREQUENCIES), atol=1e-4)


def test_rows_choose_their_own_lines_and_padding_asks_nothing():
    """A row that is shorter reads what it reads alone; what is stored does not depend on chunks."""
    stream = looking(2, 48, 3)
    mine = Cascade(Lines(50, share=0.6, sample=4, band=4, least=8))
    together, state = run(mine, stream, [(20, 20), (8, 5), (20, 20), (0, 3)], width=20)
    for row, counts in ((0, [20, 8, 20]), (1, [20, 5, 20, 3])):
        alone = Stream(*(x[[row, row]] for x in (stream.q, stream.k, stream.v)))  # twice, for the same program
        found, own = run(mine, alone, counts, width=20)
        np.testing.assert_allclose(together[row], found[0], atol=1e-4)
        np.testing.assert_allclose(state[0].k[row], own[0].k[0], atol=1e-6)


@pytest.mark.quick
def test_what_makes_no_sense_is_refused():
    for make, message in (
        (lambda: Lines(60, share=1.5), "Lines.share is 1.5"),
        (lambda: Lines(60, codec=Int(8)), "Lines.codec: lines are read of keys as they are"),
        (
            lambda: run(Cascade(Window(2), Scored(2, H2O(), every=2), Lines(9)), Stream.drawn(1, 4), [1]),
            "no tier in front may evict for each head",
        ),
    ):
        with pytest.raises(ValueError, match=message) as error:
            make()
        assert "\n" not in str(error.value)
