"""Tokenizers in GGUF files: the ids of the tokenizers that they were made of, and one line for what cannot be."""

import json

import gguf
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

import streamjax as sj
from streamjax.data.text.gguf.byte_level import KINDS
from tests.data.conftest import KINDS as TRAINED
from tests.data.conftest import TEXTS
from tests.gguf_files import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    byte_tokenizer,
    tiny_llama,
    write_gguf,
)

PIECES = [
    "the",
    " fox",
    "  ",
    "\n",
    "\n\n\t",
    "12",
    "3.14",
    "don't",
    "I'LL",
    "naïve",
    "cafe\u0301",
    "東京",
    "😀",
    "<s>",
    "<tool>",
    "x_y",
    "▁",
    "AbcDEF",
]
TEXT = st.lists(st.sampled_from(PIECES) | st.text(max_size=6), max_size=12).map("".join)
SHORT = settings(max_examples=60, deadline=None)


def write(file, values):
    return write_gguf(file, "llama", {}, {}, tokenizer=values)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """A trained byte-level tokenizer and its GGUF file, filled up as embeddings are."""
    tokenizer = TRAINED["byte_level"]()
    model = json.loads(tokenizer.to_str())["model"]
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.add_tokens(["<tool>"])
    words = [*model["vocab"], "<s>", "</s>", "<tool>"]
    size = len(words)
    assert [tokenizer.token_to_id(word) for word in words] == list(range(size))
    values = {
        "ggml.model": "gpt2",
        "ggml.pre": "gpt-2",
        "ggml.tokens": [*words, f"[PAD{size}]", f"[PAD{size + 1}]"],
        "ggml.token_type": [NORMAL] * (size - 3) + [CONTROL, CONTROL, USER_DEFINED, UNUSED, UNUSED],
        "ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "ggml.bos_token_id": size - 3,
        "ggml.eos_token_id": size - 2,
    }
    file = write(tmp_path_factory.mktemp("gguf") / "x.gguf", values)
    return sj.load_tokenizer(file), tokenizer, values


@SHORT
@given(text=TEXT)
def test_byte_level_ids_are_those_of_the_tokenizer(byte_level, text):
    mine, other, _ = byte_level
    ids = mine.encode(text)
    assert ids == other.encode(text, add_special_tokens=False).ids
    assert mine.decode(ids) == other.decode(ids)


def test_what_the_metadata_say_of_tokens(byte_level, tmp_path):
    mine, other, values = byte_level
    bos, eos = values["ggml.bos_token_id"], values["ggml.eos_token_id"]
    assert (mine.bos_id, mine.eos_id, mine.eos_ids, mine.adds_bos) == (bos, eos, (eos,), False)
    assert (mine.bos_token, mine.eos_token, mine.special_ids) == ("<s>", "</s>", {bos, eos})
    assert mine.vocab_size == other.get_vocab_size()
    assert mine.decoding == "bytes"
    more = {"ggml.add_bos_token": True, "ggml.eot_token_id": 5, "ggml.padding_token_id": 7, "chat_template": "{{ 1 }}"}
    mine = sj.load_tokenizer(write(tmp_path / "more.gguf", values | more))
    assert (mine.adds_bos, mine.eos_ids, mine.pad_id, mine.chat_template) == (True, (eos, 5), 7, "{{ 1 }}")
    assert mine.encode("a", add_bos=True)[0] == bos


@pytest.mark.parametrize(
    ("specials", "ends"),
    [
        (["<|start|>", "<|im_end|>"], [1]),
        (["<|start|>", "<|endoftext|>", "<|eot_id|>"], [1, 2]),
        (["<|start|>", "<|return|>", "<|call|>", "<|end|>"], [1, 2]),
        (["<|start|>", "<|other|>", "<|end|>"], [1, 2]),
    ],
)
def test_tokens_that_end_a_turn_are_known_by_their_text(specials, ends, tmp_path):
    file = tiny_llama(tmp_path / "x.gguf", tokenizer=byte_tokenizer(specials), vocab_size=257 + len(specials))
    assert sorted(sj.load_tokenizer(file).eos_ids) == [257 + i for i in ends]
    assert sorted(sj.load(file).config.eos_token_ids) == [257 + i for i in ends]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_makes_a_tokenizer_that_loses_nothing(kind, tmp_path):
    mine = sj.load_tokenizer(write(tmp_path / "x.gguf", byte_tokenizer() | {"ggml.pre": kind}))
    for text in TEXTS[:3]:
        assert mine.decode(mine.encode(text)) == text


@pytest.mark.parametrize(
    ("kind", "name"), [("qwen2", "Qwen2"), ("command-r", "Cohere"), ("olmo", "GPTNeoX"), ("gpt-2", "GPT2")]
)
def test_texts_are_cut_as_transformers_cuts_them(kind, name):
    transformers = pytest.importorskip("transformers")
    letters = {letter: i for i, letter in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}
    other = getattr(transformers, f"{name}Tokenizer")(vocab=letters, merges=[]).backend_tokenizer
    steps = [dict(step) for step in KINDS[kind].cuts]
    content = {"normalizer": {"type": "NFC"} if KINDS[kind].composed else None}
    content |= {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}, "added_tokens": []}
    content |= {"model": {"type": "BPE", "vocab": letters, "merges": []}, "version": "1.0"}
    mine = tokenizers.Tokenizer.from_str(json.dumps(content))

    def cuts(tokenizer, text):
        text = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
        return [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]

    @SHORT
    @given(text=TEXT)
    def check(text):
        assert cuts(mine, text) == cuts(other, text)

    check()


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        ("smollm", "in 1984  5", ["in", "Ġ", "1", "9", "8", "4", "ĠĠ", "5"]),
        ("llama-bpe", "I'LL pay 12345\n\n  x", ["I", "'LL", "Ġpay", "Ġ", "123", "45", "ĊĊ", "Ġ", "Ġx"]),
        ("falcon", "a--b 12345", ["a", "--", "b", "Ġ", "123", "45"]),
        ("tekken", "fooBarBAZ 12", ["foo", "Bar", "BAZ", "Ġ", "1", "2"]),
        ("gpt-4o", "fooBar's 1234", ["foo", "Bar's", "Ġ", "123", "4"]),
        ("deepseek-v3", "x=foo(1234)", ["x", "=foo", "(", "123", "4", ")"]),
    ],
)
def test_texts_are_cut_as_the_models_are_known_to(kind, text, words):
    steps = {"type": "Sequence", "pretokenizers": list(KINDS[kind].cuts)}
    content = {"version": "1.0", "added_tokens": [], "pre_tokenizer": steps}
    content |= {"model": {"type": "BPE", "vocab": {}, "merges": []}}
    cutter = tokenizers.Tokenizer.from_str(json.dumps(content)).pre_tokenizer
    assert [word for word, _ in cutter.pre_tokenize_str(text)] == words


def sentencepiece_values(prefix):
    """A trained SentencePiece-like vocabulary, scored by the order of its merges."""
    model = json.loads(TRAINED["byte_fallback"]().to_str())["model"]
    words, size = list(model["vocab"]), len(model["vocab"])
    types = [UNKNOWN, *[BYTE] * 256, *[NORMAL] * (size - 257)]
    return {
        "ggml.model": "llama",
        "ggml.pre": "default",
        "ggml.tokens": [*words, "<s>", "</s>", "<tool>"],
        "ggml.token_type": [*types, CONTROL, CONTROL, USER_DEFINED],
        "ggml.scores": [0.0] * 257 + [-float(i) for i in range(size - 257)] + [0.0] * 3,
        "ggml.bos_token_id": size,
        "ggml.eos_token_id": size + 1,
        "ggml.unknown_token_id": 0,
        "ggml.add_space_prefix": prefix,
    }


def greedy(text, ids, scores):
    """SentencePiece's BPE as llama.cpp has it: the neighbours whose union has the best score, the leftmost first."""
    symbols = list(text.replace(" ", "▁"))
    while True:
        unions = [(scores[ids[a + b]], -i) for i, (a, b) in enumerate(zip(symbols, symbols[1:])) if a + b in ids]  # noqa: B905, RUF007
        if not unions:
            break
        at = -max(unions)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    found = []
    for symbol in symbols:
        found += [ids[symbol]] if symbol in ids else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return found


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_ids_are_those_of_its_rule(prefix, tmp_path):
    values = sentencepiece_values(prefix)
    mine = sj.load_tokenizer(write(tmp_path / "x.gguf", values))
    pieces = {word: i for i, word in enumerate(values["ggml.tokens"])}
    assert mine.decoding == "byte_fallback"
    assert (mine.adds_bos, mine.bos_token, mine.eos_token) == (True, "<s>", "</s>")

    @SHORT
    @given(text=TEXT.filter(lambda text: "<" not in text))
    def check(text):
        expected = greedy(" " + text if prefix and text else text, pieces, values["ggml.scores"])
        ids = mine.encode(text)
        assert ids == expected
        if "▁" not in text:
            assert mine.decode(ids) == text
        assert mine.encode(f"<s>{text}<tool>") == [pieces["<s>"], *expected, pieces["<tool>"]]

    check()


def test_ids_of_gemma_4s_kind_are_those_of_its_merges(tmp_path):
    trained = TRAINED["byte_fallback"]()
    model = json.loads(trained.to_str())["model"]
    values = sentencepiece_values(True) | {"ggml.model": "gemma4"}
    values |= {"ggml.merges": [" ".join(pair) for pair in model["merges"]], "ggml.add_bos_token": True}
    mine = sj.load_tokenizer(write(tmp_path / "x.gguf", values))
    assert (mine.adds_bos, mine.decoding) == (True, "byte_fallback")

    @SHORT
    @given(text=TEXT.filter(lambda text: "<" not in text))
    def check(text):
        ids = mine.encode(text)
        assert ids == trained.encode(text, add_special_tokens=False).ids
        if "▁" not in text:
            assert mine.decode(ids) == text

    check()
    with pytest.raises(ValueError, match="merges") as error:
        sj.load_tokenizer(write(tmp_path / "y.gguf", {k: v for k, v in values.items() if k != "ggml.merges"}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ggml.pre": "new\nkind"}, "'tokenizer.ggml.pre' is 'new kind'"),
        ({"ggml.model": "bert"}, "its tokenizer is of the kind 'bert'"),
        ({"ggml.tokens": [], "ggml.token_type": []}, "its tokenizer is of the kind 'gpt2'"),
        ({"ggml.token_type": [1, 2]}, "2 types of tokens, for 259 tokens"),
        ({"ggml.merges": ["q zz"]}, "its tokenizer cannot be built"),
        ({"ggml.merges": 3}, "'tokenizer.ggml.merges' is 3; expected list"),
        ({"ggml.tokens": ["x"] * 259}, "two tokens with one text: 'x' has the ids 0 and 1"),
        ({"chat_template": 3}, "'tokenizer.chat_template' is 3; expected str"),
        ({"ggml.add_bos_token": "yes"}, "expected bool"),
    ],
)
def test_a_tokenizer_that_cannot_be_is_one_line(changes, message, tmp_path):
    values = {key: value for key, value in (byte_tokenizer() | changes).items() if not isinstance(value, list) or value}
    file = write(tmp_path / "x.gguf", values)
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the message is looked at
        sj.load_tokenizer(file)
    assert message in str(caught.value)
    assert str(file) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_scores_must_fit(tmp_path):
    for scores in ([0.0], [float("nan")] * len(sentencepiece_values(True)["ggml.tokens"])):
        file = write(tmp_path / "x.gguf", sentencepiece_values(True) | {"ggml.scores": scores})
        with pytest.raises(ValueError, match="scores, or some that are no numbers"):
            sj.load_tokenizer(file)


def test_a_long_piece_takes_no_time(tmp_path):
    values = sentencepiece_values(True)
    values["ggml.tokens"][300:302] = ["ab" * 200_000, "ba" * 200_000]
    sj.load_tokenizer(write(tmp_path / "x.gguf", values))


def test_ids_outside_the_vocabulary_are_none(tmp_path):
    values = byte_tokenizer() | {"ggml.bos_token_id": 4_000_000_000, "ggml.eos_token_id": 400}
    mine = sj.load_tokenizer(write(tmp_path / "x.gguf", values))
    assert (mine.bos_id, mine.eos_id) == (None, None)
    assert np.all(np.array(mine.eos_ids) < 259)
    assert gguf.GGUFReader(tmp_path / "x.gguf").fields
