"""Policies by themselves: who runs, who waits, and that nobody waits for ever."""

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from streamjax.serving.scheduling import FCFS, MLFQ, POLICIES, Policy


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
