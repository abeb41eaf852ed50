"""Policies by themselves: who runs, who waits, and that nobody waits for ever."""

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from streamjax.serving.scheduling import FCFS, MLFQ, POLICIES, ChunkPace, Policy


@dataclasses.dataclass(eq=False)
class Work:
    """Iterations for a prompt, then for tokens."""

    reading_steps: int
    decoding_steps: int = 1
    ended: int = -1


def run(policy: Policy, arrivals: list[tuple[int, Work]], rows: int) -> None:
    """Iterate until all have ended; each notes when."""
    waiting, going, now = sorted(arrivals, key=lambda a: a[0]), set(), 0
    while waiting or going:
        while waiting and waiting[0][0] <= now:
            going.add(waiting[0][1])
            policy.add(waiting.pop(0)[1])
        chosen = policy.choose(rows)
        assert len(chosen) == len(set(map(id, chosen))) == min(rows, len(going))
        for work in chosen:
            if work.reading_steps:
                work.reading_steps -= 1
            else:
                work.decoding_steps -= 1
            policy.ran(work)
            if work.decoding_steps == 0:
                work.ended = now
                policy.remove(work)
                going.remove(work)
        now += 1


def test_first_come_first_served():
    works = [Work(1, n) for n in (50, 1, 1)]
    run(FCFS(), [(i, work) for i, work in enumerate(works)], rows=1)
    assert [work.ended for work in works] == [50, 52, 54]


def test_short_answers_do_not_wait_for_long_ones():
    long, short = Work(1, 500), Work(1, 3)
    run(MLFQ(quantum=4), [(0, long), (20, short)], rows=1)
    assert short.ended < 30
    assert long.ended == 1 + 500 + 4 - 1


def test_a_long_prompt_joins_where_it_belongs():
    policy = MLFQ(quantum=4)
    long, short = Work(100), Work(3)
    policy.add(long)
    policy.add(short)
    assert policy.choose(2) == [short, long]


def test_the_idle_are_promoted():
    policy = MLFQ(quantum=1, levels=3, patience=5)
    old = Work(9, 9)
    policy.add(old)
    for _ in range(20):
        new = Work(1)
        policy.add(new)
        chosen = policy.choose(1)[0]
        policy.ran(chosen)
        policy.remove(new)
        if chosen is old:
            return
    raise AssertionError("it never ran")


@given(
    st.sampled_from(sorted(POLICIES)),
    st.integers(1, 4),
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 30), st.integers(1, 60)), min_size=1, max_size=8),
)
def test_everybody_ends_and_no_row_is_idle(name, rows, works):
    made = [(at, Work(reading, decoding)) for at, reading, decoding in works]
    run(POLICIES[name](), made, rows)
    assert all(work.ended >= 0 for _, work in made)


@given(st.floats(1e-3, 0.1), st.floats(1e-6, 1e-3), st.floats(0, 1e-6), st.sampled_from([1.5, 3.0, 20.0]))
def test_chunks_are_as_large_as_the_time_allows_and_smaller_behind_a_long_context(decoding, token, pair, times):
    """Against a machine whose iterations take what they take: none is longer than asked but for the smallest chunk."""
    seconds, pace = times * decoding, ChunkPace(times * decoding, 16, 512)

    def work(start: int, count: int) -> float:
        return count * (token + pair * start)

    pace.ran(decoding)
    start, sizes = 0, []
    while start < 20_000:
        pace.begin(decoding=True)
        size = pace.tokens(lambda count, at=start: work(at, count))
        assert size > 0
        done = work(start, size)
        while more := pace.tokens(lambda count, at=start + size: work(at, count)):
            done += work(start + size, more)
            size += more
        assert decoding + done <= seconds * (1 + 1e-9) or size == 16
        if sizes and size < 512:  # twice as many would have been too many
            assert size == 16 or decoding + work(start, 2 * size) > 0.9 * seconds
        pace.ran(decoding + done, done)
        start, sizes = start + size, [*sizes, size]
    assert sizes[0] == 16  # nothing was known
    pace.begin(decoding=False)
    assert pace.tokens(lambda count: 1e9 * count) == 512


def test_nothing_is_known_until_rows_have_decoded_alone():
    pace = ChunkPace(1.0, 16, 64)
    pace.ran(0.5, work=16.0)
    pace.begin(decoding=True)
    assert [pace.tokens(float) for _ in range(2)] == [16, 0]
    pace.ran(0.5)
    pace.ran(0.6, work=16.0)
    pace.begin(decoding=True)
    assert [pace.tokens(float) for _ in range(3)] == [64, 16, 0]
