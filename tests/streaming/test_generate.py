"""Generation against repeated forward passes, and everything that may stop it."""

import jax
import numpy as np
import pytest

import streamjax as sj
from tests.streaming.tiny_models import GQA, VOCAB, build, random_tokens

GREEDY, RANDOM = sj.Sampler(temperature=0), sj.Sampler(temperature=2.0, top_k=6)
PROMPT, NEW = 7, 12
DENSE = sj.kv.preset("dense", capacity=64)


@pytest.fixture(scope="module")
def model():
    return build(GQA)


@pytest.fixture(scope="module")
def greedy(model):
    """Two prompts of 7 and 4 tokens, and their greedy continuations by whole forward passes."""
    prompt, lengths = random_tokens(2, PROMPT, seed=5), [PROMPT, 4]
    prompt[1, 4:] = VOCAB - 1
    continuation = np.zeros((2, NEW), np.int32)
    for row in range(2):
        known = np.zeros((1, PROMPT + NEW), np.int32)
        known[0, : lengths[row]] = prompt[row, : lengths[row]]
        for i in range(NEW):
            logits = sj.forward(model, known)[0, lengths[row] + i - 1]
            continuation[row, i] = known[0, lengths[row] + i] = int(np.argmax(logits))
    assert len(set(continuation.ravel().tolist())) > 5
    return prompt, np.array(lengths), continuation


def start(model, rows: int = 2) -> sj.StreamState:
    return sj.init_state(model, DENSE, batch_size=rows)


@pytest.mark.quick
def test_greedy_is_repeated_argmax_of_forward(model, greedy):
    prompt, lengths, expected = greedy
    state, tokens = sj.generate(
        model, start(model), prompt, prompt_lengths=lengths, max_new_tokens=NEW, sampler=GREEDY, chunk_size=8
    )
    np.testing.assert_array_equal(tokens, expected)
    assert state.seen.tolist() == (lengths + NEW).tolist()


@pytest.mark.quick
def test_a_second_call_continues_the_first(model, greedy):
    prompt, lengths, expected = greedy
    state, first = sj.generate(
        model, start(model), prompt, prompt_lengths=lengths, max_new_tokens=5, sampler=GREEDY, chunk_size=8
    )
    nothing = np.zeros((2, 0), np.int32)
    state, second = sj.generate(model, state, nothing, max_new_tokens=NEW - 5, sampler=GREEDY, chunk_size=8)
    np.testing.assert_array_equal(np.concatenate((first, second), axis=1), expected)
    assert state.seen.tolist() == (lengths + NEW).tolist()


def test_blocks_do_not_change_the_tokens(model, greedy):
    prompt, lengths, expected = greedy
    pieces = [
        tokens
        for _, tokens in sj.generate_blocks(
            model,
            start(model),
            prompt,
            prompt_lengths=lengths,
            max_new_tokens=NEW,
            sampler=GREEDY,
            chunk_size=8,
            block=5,
        )
    ]
    assert [piece.shape[1] for piece in pieces] == [5, 5, NEW - 10]
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), expected)


def test_stop_tokens_end_their_row_alone(model, greedy):
    """A row reads its stop token, yields -1 from then on and stands still; the other goes on."""
    prompt, lengths, expected = greedy
    stop = next(int(t) for t in expected[0, :8] if t not in expected[1])
    end = expected[0].tolist().index(stop) + 1
    assert end < NEW
    state, tokens = sj.generate(
        model,
        start(model),
        prompt,
        prompt_lengths=lengths,
        max_new_tokens=NEW,
        sampler=GREEDY,
        stop_tokens=[stop],
        chunk_size=8,
    )
    np.testing.assert_array_equal(tokens[1], expected[1])
    np.testing.assert_array_equal(tokens[0, :end], expected[0, :end])
    assert np.all(np.asarray(tokens)[0, end:] == -1)
    assert state.seen.tolist() == [lengths[0] + end, lengths[1] + NEW]
    # the row that stopped predicts what comes after its stop token
    np.testing.assert_array_equal(np.argmax(model.logits(state.hidden[:, None])[0, 0]), expected[0, end])


def test_all_rows_stopped(model, greedy):
    """Generation ends with the block in which the last row stopped; the result has its full width all the same."""
    prompt, lengths, expected = greedy
    stops = {int(expected[0, 2]), int(expected[1, 3])}
    arguments = dict(prompt_lengths=lengths, sampler=GREEDY, stop_tokens=sorted(stops), chunk_size=8)
    blocks = [tokens for _, tokens in sj.generate_blocks(model, start(model), prompt, max_new_tokens=50, **arguments)]
    assert [tokens.shape for tokens in blocks] == [(2, 32)]
    state, tokens = sj.generate(model, start(model), prompt, max_new_tokens=50, **arguments)
    assert tokens.shape == (2, 50)
    np.testing.assert_array_equal(tokens[:, :32], blocks[0])
    for row in range(2):
        end = next(i for i, t in enumerate(expected[row]) if int(t) in stops) + 1
        np.testing.assert_array_equal(tokens[row, :end], expected[row, :end])
        assert np.all(np.asarray(tokens)[row, end:] == -1)
        assert int(state.seen[row]) == lengths[row] + end


@pytest.mark.quick
def test_seeds_reproduce_and_differ(model):
    prompt = np.repeat(random_tokens(1, 4, seed=8), 2, axis=0)

    def draw(seed: int, new: int = 24) -> np.ndarray:
        key = jax.random.key(seed)
        _, tokens = sj.generate(model, start(model), prompt, max_new_tokens=new, sampler=RANDOM, key=key)
        return np.asarray(tokens)

    np.testing.assert_array_equal(draw(1), draw(1))
    assert (draw(1) != draw(2)).any()
    assert (draw(1)[0] != draw(1)[1]).any()
    np.testing.assert_array_equal(draw(1, 10), draw(1)[:, :10])


@pytest.mark.quick
def test_every_token_is_drawn_with_a_key_of_its_own(model):
    """Token i with the key folded with i, also when a second call continues the first."""
    prompt, key = random_tokens(2, 4, seed=8), jax.random.key(5)
    arguments = dict(sampler=RANDOM, key=key, block=32)
    nothing, pieces, state = np.zeros((2, 0), np.int32), [prompt], start(model)
    for text, new, first in ((prompt, 9, 0), (nothing, 6, 9)):
        blocks = sj.generate_blocks(model, state, text, max_new_tokens=new, first_index=first, **arguments)
        ((state, tokens),) = blocks
        pieces.append(tokens)
    known = np.concatenate(pieces, axis=1)
    logits = sj.forward(model, known)
    drawn = [RANDOM.sample(logits[:, 3 + i], jax.random.fold_in(key, i)) for i in range(15)]
    np.testing.assert_array_equal(known[:, 4:], np.stack(drawn, axis=1))


@pytest.mark.quick
def test_the_first_sampled_token_has_the_models_distribution(model):
    """Many rows of one prompt under some seeds: frequencies are the softmax of the last logits, to 5 deviations."""
    rows, seeds = 16, 25
    prompt = np.repeat(random_tokens(1, 4, seed=8), rows, axis=0)
    counts = np.zeros(VOCAB)
    for seed in range(seeds):
        key = jax.random.key(seed)
        _, tokens = sj.generate(model, start(model, rows), prompt, max_new_tokens=1, sampler=RANDOM, key=key)
        np.add.at(counts, np.asarray(tokens)[:, 0], 1)
    expected = np.asarray(jax.nn.softmax(RANDOM.filter(sj.forward(model, prompt)[:1, -1])[0]))
    assert counts[expected == 0].sum() == 0
    assert (expected > 0.05).sum() > 2
    np.testing.assert_allclose(counts / (rows * seeds), expected, atol=5 * 0.5 / np.sqrt(rows * seeds))


def test_repetition_penalty_sees_the_prompt_and_what_was_generated(model):
    """With a penalty beyond all measure no token comes twice, and none of the prompt at all."""
    prompt = random_tokens(2, 6, seed=9)
    lengths = np.array([6, 3])
    sampler = sj.Sampler(temperature=0, repetition_penalty=1e6)
    _, tokens = sj.generate(
        model, start(model), prompt, prompt_lengths=lengths, max_new_tokens=NEW, sampler=sampler, chunk_size=8
    )
    for row in range(2):
        # a penalised logit is about 0 where it was positive, so a token that was never seen and is positive comes first
        known = set(prompt[row, : lengths[row]].tolist())
        new = np.asarray(tokens)[row].tolist()
        assert not known & set(new)
        assert len(set(new)) == NEW


@pytest.mark.quick
@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (2, {"sampler": sj.Sampler()}, "needs a PRNG key"),
        (2, {"max_new_tokens": -1}, "max_new_tokens must not be negative"),
        (3, {}, "2 prompts for 3 streams"),
        (2, {"prompt_lengths": np.array([2, 0])}, "needs a prompt of at least one token"),
        (2, {"prompt_lengths": np.array([2, 9])}, "lengths must be one number in \\[0, 7\\]"),
        (2, {"max_new_tokens": 58}, "holds 64 tokens: 0 are used and 65 more do not fit"),
        (2, {"chunk_size": 0}, "chunk_size must be at least 1"),
        (2, {"block": 0}, "block must be at least 1"),
    ],
)
def test_wrong_arguments(model, rows, options, message):
    arguments = {"max_new_tokens": 3, "sampler": GREEDY, **options}
    with pytest.raises(ValueError, match=message) as error:
        list(sj.generate_blocks(model, start(model, rows), random_tokens(2, PROMPT), **arguments))
    assert "\n" not in str(error.value)


@pytest.mark.quick
def test_what_stands_behind_a_streams_end_cannot_be_read(model, greedy):
    """Generated rows that have ended hold -1: to be fed back with their lengths, or not at all."""
    prompt, lengths, expected = greedy
    stop = int(expected[1, 0])
    state, tokens = sj.generate(
        model, start(model), prompt, prompt_lengths=lengths, max_new_tokens=4, sampler=GREEDY, stop_tokens=[stop]
    )
    tokens = np.asarray(tokens)
    assert tokens[1].tolist() == [stop, -1, -1, -1]
    row, place = np.argwhere(tokens < 0)[0]
    message = f"token id -1 at place {place} of row {row} is outside .* where rows end in padding, give their lengths"
    with pytest.raises(ValueError, match=message):
        sj.generate(model, state, tokens, max_new_tokens=1, sampler=GREEDY)
    state, _ = sj.generate(
        model, state, tokens, prompt_lengths=(tokens >= 0).sum(axis=1), max_new_tokens=1, sampler=GREEDY
    )
    assert np.isfinite(state.hidden).all()


@pytest.mark.quick
def test_no_new_tokens_is_only_reading(model):
    prompt = random_tokens(2, PROMPT)
    state, tokens = sj.generate(model, start(model), prompt, max_new_tokens=0, sampler=GREEDY, chunk_size=8)
    assert tokens.shape == (2, 0)
    assert state.seen.tolist() == [PROMPT] * 2


@pytest.mark.quick
@pytest.mark.parametrize("stop", [-1, VOCAB, 2**31, 2**40])
def test_a_stop_token_that_the_vocabulary_lacks_is_refused(model, stop):
    with pytest.raises(ValueError, match=f"stop token id {stop} is outside the model's vocabulary of {VOCAB}"):
        sj.generate(model, start(model), random_tokens(2, 3), max_new_tokens=1, sampler=GREEDY, stop_tokens=[1, stop])


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_penalty_meets_what_earlier_calls_read_and_drew(model, temperature):
    """Four calls are one, each row for itself, with a read between them too; a copy of the state goes its own way."""
    sampler = sj.Sampler(temperature=temperature, repetition_penalty=1.5)
    prompt, lengths, key = random_tokens(2, 6, seed=9), np.array([6, 3]), jax.random.key(3)
    nothing = np.zeros((2, 0), np.int32)

    def go_on(state, calls, first=0):
        pieces = []
        for i, count in enumerate(calls):
            ((state, tokens),) = sj.generate_blocks(
                model,
                state,
                nothing,
                max_new_tokens=count,
                sampler=sampler,
                key=key,
                first_index=first + sum(calls[:i]),
            )
            pieces.append(tokens)
        return state, np.concatenate(pieces, axis=1)

    def read(*pieces):
        state = sj.init_state(model, DENSE, 2, note_used=True)
        for piece in pieces:
            state = sj.read(model, state, piece, 8)
        return state

    rows = [row[:n].tolist() for row, n in zip(prompt, lengths, strict=True)]
    state, once = go_on(read(rows), [24])
    _, four = go_on(read([row[:2] for row in rows], [row[2:] for row in rows]), [6, 6, 6, 6])
    np.testing.assert_array_equal(once, four)
    for row in range(2):
        used = set(rows[row]) | set(once[row].tolist())
        assert set(np.flatnonzero(state.used[row]).tolist()) == used
        alone = sj.read(model, sj.init_state(model, DENSE, 1, note_used=True), [rows[row]], 8)
        if temperature == 0:
            blocks = sj.generate_blocks(model, alone, [[]], max_new_tokens=24, sampler=sampler, key=key)
            ((alone, tokens),) = blocks
            np.testing.assert_array_equal(tokens[0], once[row])
            assert set(np.flatnonzero(alone.used[0]).tolist()) == used
    fork = jax.tree.map(jax.numpy.copy, read(rows))
    assert go_on(read(rows), [24])[1].tolist() == go_on(fork, [24])[1].tolist()


def test_ids_are_noted_from_the_first_call_with_a_penalty(model):
    """Without being told to note them a state is as small as ever, and so is what is saved of it."""
    state = start(model)
    assert state.used is None
    state, _ = sj.generate(model, state, random_tokens(2, 3), max_new_tokens=2, sampler=GREEDY)
    assert state.used is None
    state, tokens = sj.generate(
        model, state, [[4], [5, 6]], max_new_tokens=2, sampler=sj.Sampler(temperature=0, repetition_penalty=2.0)
    )
    assert set(np.flatnonzero(state.used[1]).tolist()) == {5, 6, *tokens[1].tolist()}
