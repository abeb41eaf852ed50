"""What is generated with guesses is what is generated without them: greedy or sampled, guessed right or wrong."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

import streamjax as sj
from streamjax.streaming.decode_block import decode_block
from streamjax.streaming.speculative import Drafter, Drafts, NGrams, Retrieval, SmallModel, decoding
from tests.covering import rest_slow
from tests.streaming.tiny_models import GQA, VOCAB, build, random_tokens

SLOW = pytest.mark.slow
LENGTH, NEW = 4, 40
PROMPT, LENGTHS = random_tokens(2, 9, seed=5), [9, 5]
CACHE = sj.kv.Cascade(sj.kv.Sink(2), sj.kv.Window(9), fuse=False)
SAMPLERS = {
    "greedy": sj.Sampler(temperature=0),
    "greedy, penalised": sj.Sampler(temperature=0, repetition_penalty=1.3),
    "sampled": sj.Sampler(),
    "filtered": sj.Sampler(temperature=1.4, top_k=9, top_p=0.9, min_p=0.02, repetition_penalty=1.2),
}


@dataclasses.dataclass
class Prompter(Drafter):
    """Knows how the streams go on, and is right about so many tokens in turn: 0, 1, ..., all of them.

    Every other time, what is wrong are no tokens of the model.
    """

    expected: np.ndarray | None = None
    length: int = LENGTH

    def __post_init__(self):
        super().__post_init__()
        self.calls = 0

    def propose(self, streams, wanted, draws):
        assert self.expected is not None
        tokens, count = np.zeros((len(streams), self.length), np.int32), np.zeros(len(streams), np.int32)
        for row, (stream, length) in enumerate(zip(streams, LENGTHS, strict=True)):
            rest = self.expected[row, stream.total - length :][: self.length]
            count[row] = len(rest) if wanted[row] else 0
            tokens[row, : len(rest)] = rest
            right = (self.calls + 2 * row) % (self.length + 1)
            tokens[row, right:] = VOCAB + 3 if self.calls % 2 else (tokens[row, right:] + 1) % VOCAB
        self.calls += 1
        return Drafts(tokens, count)


class Branching(Prompter):
    """The same with two guesses behind each that is right, of which the first is wrong."""

    @property
    def nodes(self):
        return 2 * self.length

    def propose(self, streams, wanted, draws):
        one = super().propose(streams, wanted, draws)
        right = np.where(one.tokens >= VOCAB, 0, one.tokens)
        tokens = np.stack(((right + 1) % VOCAB, right), axis=2).reshape(len(streams), -1)
        parents = np.repeat(2 * np.arange(self.length), 2)
        return Drafts(tokens.astype(np.int32), 2 * one.count, np.tile(parents, (len(streams), 1)).astype(np.int32))


@pytest.fixture(scope="module")
def model():
    return build(GQA)


def run(model, sampler, draft=None, stop=(), cache=CACHE):
    state = sj.init_state(model, cache, 2)
    return sj.generate(
        model, state, PROMPT, max_new_tokens=NEW, sampler=sampler, key=jax.random.key(3), prompt_lengths=LENGTHS,
        stop_tokens=stop, draft=draft,
    )  # fmt: skip


@pytest.fixture(scope="module")
def plain(model):
    """What each sampler gives without guesses, once a test asks for it."""
    return functools.cache(lambda name: run(model, SAMPLERS[name]))


USUAL = (("filtered", Branching),)  # greedy tokens are those of the drafters below


@pytest.mark.parametrize(
    ("name", "kind"),
    [pytest.param(n, k, marks=() if (n, k) in USUAL else SLOW) for n in SAMPLERS for k in (Prompter, Branching)],
)
def test_guesses_change_nothing(model, plain, name, kind):
    """Rows at their own paces, each right about another number of tokens; the state is as it would have been."""
    state, expected = plain(name)
    drafter = kind(expected=np.asarray(expected))
    found, tokens = run(model, SAMPLERS[name], drafter)
    np.testing.assert_array_equal(tokens, expected)
    assert 3 < drafter.calls < NEW
    assert found.seen.tolist() == state.seen.tolist() == [49, 45]
    assert jax.tree.structure(found) == jax.tree.structure(state)
    for leaf, other in zip(jax.tree.leaves(found), jax.tree.leaves(state), strict=True):
        if leaf.dtype == np.float32:
            np.testing.assert_allclose(leaf, other, atol=1e-4, rtol=0)
        else:
            np.testing.assert_array_equal(leaf, other)


def test_streams_that_nobody_can_guess_take_the_plain_loop(model, plain, monkeypatch):
    """While guessing pauses, what is read one by one is read without a look at the host between two tokens."""
    counts = []

    def counted(*args):
        counts.append(int(args[5]))
        return decode_block(*args)

    monkeypatch.setattr(decoding, "decode_block", counted)
    state, expected = plain("greedy")
    wrong = Prompter(expected=(np.asarray(expected) + 1) % VOCAB)
    found, tokens = run(model, SAMPLERS["greedy"], wrong)
    np.testing.assert_array_equal(tokens, expected)
    assert found.seen.tolist() == state.seen.tolist()
    assert wrong.calls <= 4
    assert sum(counts) > NEW // 2


@pytest.mark.parametrize("kind", [Prompter, pytest.param(Branching, marks=SLOW)])
def test_a_stream_ends_with_its_stop_token_and_not_behind_it(model, plain, kind):
    _, expected = plain("greedy")
    expected = np.asarray(expected)
    stop = int(expected[0, 13])
    ends = [row.tolist().index(stop) + 1 if stop in row else NEW for row in expected]
    wanted = np.where(np.arange(NEW) < np.array(ends)[:, None], expected, -1)
    found, tokens = run(model, SAMPLERS["greedy"], kind(expected=expected), stop=(stop,))
    np.testing.assert_array_equal(tokens, wanted)
    assert ends[0] <= 14
    assert found.seen.tolist() == [length + end for length, end in zip(LENGTHS, ends, strict=True)]


def test_guesses_do_not_overflow_a_cache_with_an_end(model, plain):
    """The last guesses would find no room; what is right fits."""
    cache = sj.kv.preset("dense", capacity=49)
    _, wanted = run(model, SAMPLERS["greedy"], cache=cache)
    found, tokens = run(model, SAMPLERS["greedy"], Prompter(expected=np.asarray(wanted)), cache=cache)
    np.testing.assert_array_equal(tokens, wanted)
    assert np.isfinite(found.hidden).all()


DRAFTERS = {
    "ngrams": lambda model: NGrams(length=LENGTH, shortest=1),
    "branches": lambda model: NGrams(length=LENGTH, shortest=1, branches=3),
    "text": lambda model: NGrams(length=LENGTH, shortest=1, text=random_tokens(500)),
    "itself": lambda model: SmallModel(length=LENGTH, model=model, cache=CACHE),
    "small cache": lambda model: SmallModel(length=LENGTH, model=model, cache=sj.kv.preset("window", window=3)),
    "staged": lambda model: SmallModel(
        length=LENGTH,
        model=model,
        cache=sj.kv.preset("window", window=3),
        context=6,
        drafter=NGrams(length=2, shortest=1),
    ),
    "retrieval": lambda model: SmallModel(
        length=LENGTH, model=model, cache=CACHE, context=4, retrieval=Retrieval(chunks=1, size=2, asked=4)
    ),
}


@pytest.mark.parametrize("name", rest_slow(["greedy", "filtered"], "greedy"))
@pytest.mark.parametrize("drafter", rest_slow(DRAFTERS, "ngrams", "text"))
def test_drafters_change_nothing(model, plain, drafter, name):
    _, tokens = run(model, SAMPLERS[name], DRAFTERS[drafter](model))
    np.testing.assert_array_equal(tokens, plain(name)[1])
