"""Streams in a pool of pages: the tokens of streams alone, in memory for what they hold."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import streamjax as sj
from pallas_kernels import api
from pallas_kernels.api import platforms
from streamjax.kv import Query
from streamjax.kv.decode_kernels import kernel_reads_pool
from streamjax.kv.pages.page_pool import PagePool, PoolState
from streamjax.kv.query import KVTokens
from streamjax.serving.paging.page_book import PageBook, tables_of
from streamjax.serving.paging.paged_batch import page_size_for
from tests.architectures import tiny_config
from tests.serving import engines
from tests.serving.engines import bytes_model, engine, finish, request, served, tokens
from tests.streaming.tiny_models import LOCAL, build

DENSE = sj.kv.preset("dense", capacity=128)
SHARED = "Once upon a time, there was one. "  # 34 ids with BOS: four chunks of 8 and two
MIXED = [
    request(SHARED + "a", 9),
    request(SHARED + "bcdefghijkl", 12),
    request("something else", 20),
    request(SHARED + "bcdefghijklmnop", 7),
    request("x" * 60, 11),
]


def paged(**options):
    return engine(**{"cache": DENSE, "prefix_bytes": 1 << 20, **options})


@functools.cache
def alone(index: int) -> list[int]:
    return engines.alone(MIXED[index], DENSE)


def book(one) -> PageBook:
    return one._batch.book


@settings(max_examples=settings.default.max_examples // 2)
@given(
    st.permutations(range(len(MIXED))),
    st.lists(st.integers(0, 9), min_size=len(MIXED), max_size=len(MIXED)),
    st.sampled_from(["fcfs", "mlfq"]),
    st.sampled_from([0, 1 << 20]),
)
def test_tokens_are_those_of_a_stream_alone(order, pauses, policy, prefix_bytes):
    one = paged(policy=policy, prefix_bytes=prefix_bytes, pool_tokens=128)  # room for two or three of the five
    tickets = {}
    for i, pause in zip(order, pauses, strict=True):
        tickets[i] = one.submit(MIXED[i])
        for _ in range(pause):
            one.step()
    finish(one)
    for i, ticket in tickets.items():
        assert tokens(list(ticket.events())) == alone(i)
    one._loop.prefixes.clear()
    assert book(one).free == book(one).pages == 16


def test_what_is_shared_ends_with_a_page():
    """15 ids are cut to 8, a page: pages that go on differently are never shared."""
    one, begins = paged(), [256, *b"You are a bee."]
    every = [
        request([*begins, *ends.encode()], shared=15) for ends in ("Hi. Who?", "Now, tell me more.", "No, and why?")
    ]
    found = [served(one, wanted)[0] for wanted in every]
    assert [events[-1].usage.cached_tokens for events in found] == [0, 0, 8]
    for wanted, events in zip(every, found, strict=True):
        assert tokens(events) == tokens(served(paged(prefix_bytes=0), wanted)[0])


def test_a_fork_copies_no_page():
    one = paged()
    first = one.submit(MIXED[1])
    finish(one)
    list(first.events())
    used = book(one).pages - book(one).free
    assert used == 5  # the prompt's 40 first tokens, for who comes next
    second = one.submit(MIXED[3])
    while second.row is None:
        one.step()
    assert second.cached == 40
    assert book(one).pages - book(one).free == used + 2  # for the 16 tokens behind them
    finish(one)


def test_a_stream_takes_what_it_holds():
    one = paged(prefix_bytes=0)
    assert one.stats().cache_bytes < engine(cache=DENSE, pool_tokens=0).stats().cache_bytes * 1.05
    ticket = one.submit(request("a", 20))  # 2 ids and 20
    while ticket.row is None:
        one.step()
    assert book(one).pages - book(one).free == 1
    finish(one)
    assert book(one).pages == book(one).free


def test_conversations_and_saved_streams_do_not_know_about_pages(tmp_path):
    with_pages = paged(state_dir=tmp_path, prefix_bytes=0)
    first = tokens(served(with_pages, request("tell me", 11, conversation="ann"))[0])
    with_pages.close()
    assert book(with_pages).pages - book(with_pages).free == 0
    again, whole = paged(state_dir=tmp_path), engine(cache=DENSE, pool_tokens=0)
    assert tokens(served(whole, request("tell me", 11, conversation="ann"))[0]) == first
    more = request([5, 6], 9, conversation="ann")
    assert tokens(served(again, more)[0]) == tokens(served(whole, more)[0])
    again.close()
    session = sj.Session(bytes_model(), engines.Endless(), DENSE)
    session.load(tmp_path / "ann")
    assert session.tokens_seen == 8 + 11 + 2 + 9


def test_a_stream_that_the_pool_cannot_hold_is_refused():
    with pytest.raises(ValueError, match="the cache holds 32 tokens: 0 are used and 41 more do not fit"):
        paged(pool_tokens=32).submit(request("x" * 30, 10))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool_tokens": -1}, "pool_tokens must not be negative, got -1"),
        ({"pool_tokens": 64, "cache": engines.CACHE}, "pool_tokens is 64, and no layer keeps every token"),
        ({"pool_tokens": 64, "memory_bytes": 1000, "conversation_bytes": 0}, "of pages, .*pool_tokens sets how many"),
    ],
)
def test_pools_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        engine(**{"cache": DENSE, **options})


def test_after_a_failure_the_pool_is_whole(monkeypatch):
    one = paged()
    ticket = one.submit(MIXED[0])
    one.step()
    with monkeypatch.context() as patch:
        patch.setattr(one._batch, "decode", lambda *_: 1 / 0)
        finish(one)
    assert list(ticket.events())[-1].finish_reason == "error"
    assert book(one).free == book(one).pages
    assert tokens(served(one, MIXED[0])[0]) == alone(0)


def test_cancelled_requests_leave_no_page():
    one = paged(prefix_bytes=0)
    tickets = [one.submit(wanted) for wanted in MIXED]
    for step, ticket in enumerate(tickets):
        for _ in range(step):
            one.step()
        ticket.cancel()
    finish(one)
    assert book(one).free == book(one).pages


ROWS = st.lists(st.lists(st.integers(0, 3), max_size=4), min_size=2, max_size=5)


@given(ROWS, st.integers(4, 6))
def test_pages_that_rows_share_are_listed_once(choices, width):
    # pages as a tree has them: a page is shared by rows that have all pages before it in common
    rows, numbers = [], {}
    for choice in choices:
        rows.append([numbers.setdefault(tuple(choice[: i + 1]), len(numbers)) for i in range(len(choice))])
    found = tables_of(rows, width)
    listed = [page for page in found.shared.tolist() if page >= 0]
    assert len(set(listed)) == len(listed)
    for row, pages in enumerate(rows):
        assert [page for page in found.own[row].tolist() if page >= 0] == pages
        mine = {int(found.place[i]): int(found.shared[i]) for i in np.flatnonzero(found.sharers[:, row])}
        assert mine == dict(enumerate(pages[: found.begins[row]]))
        others = {page for other, some in enumerate(rows) if other != row for page in some}
        if len(listed) < width:
            assert all(page not in others for page in pages[found.begins[row] :])


@pytest.mark.parametrize(("chunk", "size"), [(8, 8), (64, 64), (100, 50), (512, 64), (67, 1)])
def test_pages_divide_chunks(chunk, size):
    assert page_size_for(chunk) == size


def test_rows_attend_to_what_they_share_at_once():
    one = paged()
    tickets = [one.submit(MIXED[i]) for i in (0, 1, 3)]
    most = [0, 0, 0]
    while one.step():
        if one._batch._tables is not None:
            most = np.maximum(most, np.asarray(one._batch._tables.begins)).tolist()
    assert sorted(most)[:2] >= [4, 4]  # pages of 8: the 32 tokens that all begin with
    assert [tokens(list(ticket.events())) for ticket in tickets] == [alone(i) for i in (0, 1, 3)]


@pytest.mark.slow
@pytest.mark.parametrize("config", [LOCAL, tiny_config("gemma4-shared")], ids=["windows", "shared"])
def test_layers_with_windows_keep_them_in_their_rows(config):
    """And layers that read the keys of another read its pages."""
    model = build(config.replace(vocab_size=259, bos_token_id=256))
    options = {"rows": 2, "chunk_size": 8, "prefix_bytes": 1 << 20, "pool_tokens": 96, "policy": "mlfq"}
    one = sj.Engine(model, engines.Endless(), DENSE, **options)
    wanted = [MIXED[i] for i in (0, 1, 3)]
    found = served(one, *wanted)
    for request_, events in zip(wanted, found, strict=True):
        state, sampler = sj.init_state(model, DENSE), sj.Sampler(temperature=0)
        _, expected = sj.generate(
            model, state, [request_.prompt], max_new_tokens=request_.max_new_tokens, sampler=sampler, chunk_size=8
        )
        assert tokens(events) == expected[0].tolist()
    assert found[2][-1].usage.cached_tokens >= 32


@pytest.mark.slow
@pytest.mark.parametrize("capacity", [40, 20])
def test_streams_may_be_shorter_than_what_is_read_to_warm_up(capacity):
    cache = sj.kv.preset("dense", capacity=capacity)
    one, wanted = paged(chunk_size=32, cache=cache), request("short", 6)
    one.warm_up()
    assert tokens(served(one, wanted)[0]) == engines.alone(wanted, cache)


@pytest.mark.parametrize("backend", ["triton", pytest.param("tpu", marks=pytest.mark.slow)])
@pytest.mark.parametrize("widths", [pytest.param((3, 1), marks=pytest.mark.slow), (3,)])
def test_a_kernel_reads_the_pool_by_its_tables(monkeypatch, backend, widths):
    """Chunks of several tokens and of one, behind pages of a row's own and pages that rows share."""
    draw, pool, called = np.random.default_rng(0), PagePool(64, 9, 8), set()

    def instead(name, kernel):
        def call(*args, **more):
            called.add(name)
            return kernel(*args, **more, implementation=backend, interpret=True)

        monkeypatch.setattr(api, name, call)

    for name in ("pool_attention", "shared_pool_attention"):
        instead(name, getattr(api, name))

    update = jax.jit(pool.update)

    def array(*shape):
        return jnp.asarray(draw.normal(size=shape), jnp.float32)

    state = PoolState(array(2, 9, 8, 16), array(2, 9, 8, 16), jnp.array([19, 8, 0]))
    tables = tables_of([[3, 5, 1], [3, 7], [2]], 8)
    for width in widths:
        q, k, v = array(3, width, 4, 16), array(3, 2, width, 16), array(3, 2, width, 16)
        position = (state.filled[:, None] + jnp.arange(width)).astype(jnp.uint32)
        query = Query(q, q, position, state.filled, None, None, 0.25, None, tables=tables)
        new = KVTokens(k, v, k, position[:, None], jnp.ones((3, 1, width), bool))
        (expected, after), (found, state) = (
            update(state, dataclasses.replace(query, implementation=name), new) for name in ("xla", "pallas")
        )
        np.testing.assert_allclose(found, expected, atol=1e-5)
        np.testing.assert_array_equal(state.k, after.k)
    assert len(called) == 2


@pytest.mark.quick
def test_a_platform_with_a_kernel_takes_it_for_long_pools(monkeypatch):
    q, k = jnp.zeros((2, 8, 4, 128), jnp.bfloat16), jnp.zeros((2, 40, 64, 128), jnp.bfloat16)
    many = jnp.zeros((2, 65, 4, 128), jnp.bfloat16)
    long, short = (tables_of([[0], [1]], width) for width in (16, 15))

    def chooses(platform, width=8, tables=long, k=k, **change):
        monkeypatch.setattr(platforms, "platform_implementation", lambda: platform)
        some, place = q[:, :width], jnp.zeros((2, width), jnp.uint32)
        query = Query(some, some, place, jnp.zeros(2, jnp.int32), None, None, 1.0, None)
        return kernel_reads_pool(dataclasses.replace(query, tables=tables, **change), k)

    assert chooses("tpu")
    assert chooses("triton", 1)
    assert not chooses(None)
    assert not chooses("tpu", tables=short)
    assert not chooses("tpu", k=k[:, :, :8])  # pages that do not fill a TPU's tiles
    assert not chooses("tpu", q=many, raw_q=many, position=jnp.zeros((2, 65), jnp.uint32))  # a prompt
    assert not chooses("tpu", implementation="xla")
    assert not chooses("tpu", differentiable=True)
    assert chooses(None, tables=short, implementation="pallas")
    with pytest.raises(ValueError, match="kernel for pools does not take ALiBi"):
        chooses("tpu", implementation="pallas", slopes=jnp.ones(4))
