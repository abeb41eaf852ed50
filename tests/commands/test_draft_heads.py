"""`python -m train.draft_heads`: files that `--draft` reads, errors of one line."""

import pytest
from absl.flags import FlagValues

import streamjax as sj
from streamjax.commands.flags.draft import define_draft, parse_draft, parse_draft_memory
from streamjax.commands.trained_parts import draft_heads
from streamjax.data.text.tokenizers import ByteTokenizer
from streamjax.streaming.speculative import Hydra, ParallelPrompts, Retrieval
from tests.commands.test_find_heads import folder, run  # noqa: F401
from tests.streaming.tiny_models import GQA, build


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hydra", "ppd"])
def test_a_draft_is_what_the_command_writes(run, folder, tmp_path, kind):  # noqa: F811
    file = tmp_path / "new" / "heads.safetensors"
    small = ("--steps=2", "--heads=2", "--width=4", "--seq_len=40", "--batch_size=1", "--max_tokens=300")
    status, out, err = run(f"--kind={kind}", f"--output={file}", *small, command=draft_heads)
    assert status == 0, err
    assert "step 2 of 2: loss " in out
    assert f"use them: --draft=heads:{file}" in out
    tokenizer = sj.load_tokenizer("models/stdlib_byte")
    draft = parse_draft(f"heads:{file}", sj.load(folder / "plain"), tokenizer)
    assert type(draft) is {"hydra": Hydra, "ppd": ParallelPrompts}[kind]
    with pytest.raises(ValueError, match=f"--draft=heads:{file}: these .* were trained for another model"):
        parse_draft(f"heads:{file}", sj.load(folder / "deeper"), tokenizer)


def test_nonsense_is_one_line(run, tmp_path):  # noqa: F811
    for flags, message in (
        (("--kind=medusa",), "value should be one of <hydra|ppd>"),
        (("--learning_rate=-1",), "DraftHeadsConfig.learning_rate is -1"),
        (("--heads=9", "--seq_len=9"), "--seq_len=9 has no place for 9 heads"),
        (("--max_tokens=20", "--seq_len=30"), "a text of 20 tokens has no stretches of 30"),
    ):
        status, _, err = run(*flags, f"--output={tmp_path}/x", "--steps=1", command=draft_heads)
        assert status in (1, 2)
        assert message in err.strip().splitlines()[-1]


@pytest.mark.quick
def test_a_budget_is_bytes_with_a_unit():
    def parsed(text, draft="ngram"):
        values = FlagValues()
        define_draft(values)
        given = {"draft": draft, "draft_memory": text}
        values(["command", *(f"--{name}={value}" for name, value in given.items() if value is not None)])
        return parse_draft_memory(values)

    assert [parsed(text) for text in (None, "64MB", "1.5 GiB", "300", "7kib")] == [None, 64e6, 1.5 * 2**30, 300, 7168]
    for text, draft, message in (
        ("lots", "ngram", "--draft_memory=lots: give a number of bytes, such as 64MB"),
        ("64TB", "ngram", "give a number of bytes"),
        ("-1", "ngram", "give a number of bytes"),
        ("64MB", None, "--draft_memory=64MB: nobody guesses; add --draft"),
    ):
        with pytest.raises(ValueError, match=message):
            parsed(text, draft)


def test_a_small_cache_may_read_what_retrieval_finds():
    model, tokenizer = build(GQA), ByteTokenizer()
    small, found = (parse_draft(text, model, tokenizer) for text in ("small_cache", "retrieved"))
    assert (small.retrieval, found.retrieval) == (None, Retrieval())
    assert found.model is model
    given = parse_draft("retrieved:streaming_llm:sinks=2,window=62", model, tokenizer)
    assert given.cache == sj.kv.preset("streaming_llm", sinks=2, window=62)
