"""Caches on tasks: what is answered is what the steps give one by one, at either moment."""

import jax
import numpy as np
import pytest

import streamjax as sj
from streamjax.data import ByteTokenizer
from streamjax.data.ruler import make_example
from streamjax.evaluation import context_states
from streamjax.evaluation.context_states import ContextReader, Encoded
from streamjax.evaluation.leaderboard import answer, perplexity_behind
from streamjax.evaluation.leaderboard_rows import mean_and_error, summarise
from tests.streaming.tiny_models import build

BYTES = ByteTokenizer()
CHUNK = 128


@pytest.fixture(scope="module")
def model():
    config = sj.UniformConfig(
        vocab_size=259, d_model=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=16,
        tie_embeddings=True,
    )  # fmt: skip
    return build(config, seed=2)


@pytest.fixture(scope="module")
def examples():
    return [Encoded.from_example(BYTES, make_example("passkey", 500, BYTES, seed)) for seed in range(2)]


@pytest.fixture(scope="module")
def keeping(model):
    return ContextReader(model, BYTES, "prompt", CHUNK, keep_bytes=10**9)


def oracle(model, cache, examples, compacted=lambda state: state):
    """What the library's own steps give."""
    state = sj.read(model, sj.init_state(model, cache, len(examples)), [e.context for e in examples], CHUNK)
    sampler = sj.Sampler(temperature=0)
    prompts = [e.prompts[0] for e in examples]
    options = {"max_new_tokens": 6, "sampler": sampler, "stop_tokens": (257,), "chunk_size": CHUNK}
    _, tokens = sj.generate(model, compacted(state), prompts, **options)
    return [[BYTES.decode([int(t) for t in row if t >= 0 and t != 257])] for row in tokens]


CACHES = {
    "snapkv": sj.kv.preset("snapkv", window=32, size=60, every=192),
    "h2o": sj.kv.preset("h2o", window=32, size=60, every=192),
    "kvzip": sj.kv.preset("kvzip", size=90, every=192),
    "cake": sj.kv.preset("cake", window=32, size=60, every=192),
    "ada_kv": sj.kv.preset("ada_kv", window=32, size=60, every=192),
    "streaming_llm": sj.kv.preset("streaming_llm", sinks=4, window=90),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["h2o", *(pytest.param(name, marks=pytest.mark.slow) for name in CACHES if name != "h2o")]
)
def test_a_prompt_is_compacted_as_its_paper_says(model, keeping, examples, name):
    cache, contexts = CACHES[name], [encoded.context for encoded in examples]

    def compacted(state):
        if name == "streaming_llm":
            return sj.compact(model, state, cache)
        shortest = min(map(len, contexts))
        if name == "kvzip":
            asked = BYTES.encode("\n\nRepeat the text above, word for word.\n\n")
            queries = sj.reconstruction([ids[-shortest:] for ids in contexts], request=asked)
            return sj.compact(model, state, cache, queries=queries)
        width = shortest if name == "h2o" else 32  # H2O: the whole prompt's queries, which are equally many here
        assert name != "h2o" or len(set(map(len, contexts))) == 1
        return sj.compact(model, state, cache, [ids[-width:] for ids in contexts])

    found = answer(keeping, cache, examples, batch_size=2)
    assert found.said == oracle(model, sj.kv.preset("dense", capacity=max(map(len, contexts))), examples, compacted)


@pytest.mark.parametrize(("keep_bytes", "reads"), [(10**9, 2), (0, 4), (50_000, 3)], ids=["both", "none", "one"])
def test_a_context_is_read_once_for_many_caches(model, examples, monkeypatch, keep_bytes, reads):
    """Each context's state takes some 33 kB: there is room for both, for none, or for the one that was read last."""
    counted = []

    def read(*args):
        counted.append(args)
        return sj.read(*args)

    monkeypatch.setattr(context_states, "read", read)
    reader = ContextReader(model, BYTES, "prompt", CHUNK, keep_bytes)
    first, second = ([example] for example in examples)
    for cache, rows in (("snapkv", first), ("snapkv", second), ("streaming_llm", second), ("streaming_llm", first)):
        reader.read(CACHES[cache], rows)
    assert len(counted) == reads


def test_a_context_is_repeated_once_for_all_that_choose_by_it(model, keeping, examples, monkeypatch):
    """Two caches by KVzip: their states are those of a compaction that asks for the repetition, and one asks."""
    counted = []

    def reconstruction(*args, **kwargs):
        counted.append(args)
        return sj.reconstruction(*args, **kwargs)

    monkeypatch.setattr(context_states, "reconstruction", reconstruction)
    rows, cache = examples[:1], sj.kv.preset("kvzip", size=90, every=192)
    dense = sj.init_state(model, sj.kv.preset("dense", capacity=512))
    dense = sj.read(model, dense, [rows[0].context], CHUNK)
    request = BYTES.encode("\n\nRepeat the text above, word for word.\n\n")
    expected = sj.compact(model, dense, cache, queries=sj.reconstruction([rows[0].context], request=request))
    found, _ = keeping.read(cache, rows)
    for mine, its in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, its, atol=1e-5)
    smaller, _ = keeping.read(sj.kv.preset("kvzip", size=60, every=192), rows)
    both = [np.asarray(state.layers[0][-1].slots.position) for state in (found, smaller)]
    assert set(both[1][0, 0, :60]) < set(both[0][0, 0, :90])
    assert len(counted) == 1


def test_batches_are_filled_and_say_what_the_steps_say(model, examples):
    cache = CACHES["streaming_llm"]
    told = []
    reader = ContextReader(model, BYTES, chunk_size=CHUNK)
    found = answer(reader, cache, [*examples, examples[1]], batch_size=2, progress=told.append)
    assert told == [2, 1]
    first, second = oracle(model, cache, examples)
    assert found.said == [first, second, second]
    assert found.read_per_second > 0
    assert found.written_per_second > 0


def test_perplexity_is_that_of_the_tokens_behind_the_context(model):
    ids = np.random.default_rng(0).integers(0, 255, 1000).tolist()
    cache = CACHES["streaming_llm"]
    reader = ContextReader(model, BYTES, chunk_size=CHUNK)
    found = perplexity_behind(reader, cache, ids, length=300, scored=100, rows=2)
    rows = [[256, *ids[start : start + 399]] for start in (0, 400)]  # BOS, and 399 tokens
    _, nats = sj.score(model, sj.init_state(model, cache, 2), np.array(rows), CHUNK)
    assert found == pytest.approx(float(np.exp(np.asarray(nats)[:, 300:].mean(dtype=np.float64))), rel=1e-4)
    with pytest.raises(ValueError, match="the text has 1,000 tokens: perplexity behind 2,000 needs 2,100"):
        perplexity_behind(reader, cache, ids, length=2000, scored=100)


def test_means_and_their_errors():
    mean, error = mean_and_error([1.0, 0.0, 1.0, 1.0])
    assert mean == 0.75
    assert error == pytest.approx(np.std([1, 0, 1, 1], ddof=1) / 2)
    row = {"tasks": {"a": {"mean": 0.5, "standard_error": 0.3}, "b": {"mean": 1.0, "standard_error": 0.4}}}
    summarise(row)
    assert (row["mean"], row["standard_error"]) == (0.75, 0.25)
    alone = {"tasks": {"a": {"mean": 0.5, "standard_error": None}}}  # as a file has what is not a number
    summarise(alone)
    assert alone["mean"] == 0.5
    assert np.isnan(alone["standard_error"])
