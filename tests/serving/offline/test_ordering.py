"""Orders of requests: each stands in it once, prefixes are read once, and reading and writing go side by side."""

from hypothesis import given
from hypothesis import strategies as st

from streamjax.serving.offline.ordering import order_requests

CHUNK, ROWS = 2, 4
PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7).map(tuple), min_size=1, max_size=12)


def groups(prompts):
    """Which requests begin with the same chunk."""
    found = {}
    for index, prompt in enumerate(prompts):
        found.setdefault(prompt[:CHUNK] if len(prompt) >= CHUNK else (index,), []).append(index)
    return list(found.values())


@given(PROMPTS, st.data())
def test_requests_that_begin_alike_follow_each_other_depth_first(prompts, data):
    tokens = data.draw(st.lists(st.integers(0, 9), min_size=len(prompts), max_size=len(prompts)))
    order = order_requests(prompts, tokens, CHUNK, ROWS)
    assert sorted(order) == list(range(len(prompts)))
    for members in groups(prompts):
        mine = [prompts[i] for i in order if i in members]
        assert mine == sorted(mine)


@given(PROMPTS, st.data())
def test_at_most_two_groups_are_open_at_once(prompts, data):
    tokens = data.draw(st.lists(st.integers(0, 9), min_size=len(prompts), max_size=len(prompts)))
    order = order_requests(prompts, tokens, CHUNK, ROWS)
    left = [set(members) for members in groups(prompts)]
    for index in order:
        next(members for members in left if index in members).remove(index)
        begun = [now for now, whole in zip(left, groups(prompts), strict=True) if now and len(now) < len(whole)]
        assert len(begun) <= 2


def test_reading_and_writing_are_blended():
    """Eight that read and eight that write: any quarter of the order has its share of both."""
    prompts = [(i,) * 40 for i in range(8)] + [(100 + i,) for i in range(8)]
    tokens = [0] * 8 + [80] * 8
    order = order_requests(prompts, tokens, CHUNK, ROWS)
    for start in range(0, 16, 4):
        assert sum(i < 8 for i in order[start : start + 4]) == 2
