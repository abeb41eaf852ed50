"""Text encoded as it arrives is the text encoded at once."""

import itertools
import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from streamjax.data import ByteTokenizer, HFTokenizer
from streamjax.evaluation import StreamEncoder
from tests.data.conftest import KINDS

TEXT = "Straße\n\n  def f(x):\n\treturn x\n東京都\r\nthe end, the end,\n\n\n" * 3 + "and more"


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """GPT-2's kind: splits at white space, as Llama 3, Qwen and others do."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    folder = tmp_path_factory.mktemp("byte_level")
    tokenizer.save(str(folder / "tokenizer.json"))
    return HFTokenizer(folder)


@pytest.fixture(scope="module")
def marked(tmp_path_factory):
    """Llama 2's kind: puts a mark at the beginning of every text it is given."""
    words = ["<unk>", "▁", *(f"<0x{byte:02X}>" for byte in range(256)), *"abcdefghijklmnopqrstuvwxyz,().:", "▁t", "th"]
    vocabulary = {word: index for index, word in enumerate(words)}
    bpe = models.BPE(vocabulary, [("▁", "t"), ("t", "h")], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    folder = tmp_path_factory.mktemp("marked")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({}))
    return HFTokenizer(folder)


def encode(tokenizer, data: bytes, cuts: list[int], **options) -> tuple[list[int], StreamEncoder]:
    encoder, ids = StreamEncoder(tokenizer, **options), []
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    for start, stop in itertools.pairwise(edges):
        ids += encoder.push(data[start:stop])
    return ids + encoder.finish(), encoder


@pytest.mark.parametrize("kind", ["bytes", "byte_level", "marked"])
def test_pieces_give_the_ids_of_the_whole(kind, request):
    tokenizer = ByteTokenizer() if kind == "bytes" else request.getfixturevalue(kind)
    expected = tokenizer.encode(TEXT)

    @given(cuts=st.lists(st.integers(0, len(TEXT.encode())), max_size=12))
    def check(cuts):
        ids, encoder = encode(tokenizer, TEXT.encode(), cuts)
        assert ids == expected
        assert encoder.text_bytes == len(TEXT.encode())

    check()


PIECES = [
    "one",
    " two",
    "\n",
    "\n\n",
    "  ",
    "\t",
    ".",
    "é",
    "東京",
    "。",
    "\u0301",
    "1234567",
    "😀",
    "====",
    "</s>",
    "<tool>",
]
PIECES += [" <|l|>", "<|r|> ", "<|l|", "</", "The quick brown", " fox"]
SHORT, LONG = (st.lists(st.sampled_from(PIECES), min_size=least, max_size=3 * least + 9) for least in (0, 30))


@pytest.mark.parametrize("parse_special", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, "blank_lines"])
def test_ids_do_not_depend_on_how_the_text_comes(kind, parse_special, tokenizer_folders, request):
    """Line ends, runs of white space, characters of several tokens, special tokens that take white space; and a
    tokenizer with a token of two line ends, which GPT-2's rule cuts apart where a third thing follows.
    """
    blank = kind == "blank_lines"
    tokenizer = request.getfixturevalue("byte_level") if blank else HFTokenizer(tokenizer_folders[kind])
    assert not blank or len(tokenizer.encode("\n\n")) == 1

    @settings(max_examples=60, deadline=None)
    @given(
        st.one_of(SHORT, LONG).map("".join),  # short ones are encoded whole
        st.lists(st.integers(0, 300), max_size=9),
        st.booleans(),
    )
    def check(text, cuts, continues):
        data = text.encode()
        ids, encoder = encode(tokenizer, data, cuts, continues=continues, parse_special=parse_special)
        assert ids == tokenizer.encode(text, continues=continues, parse_special=parse_special)
        assert encoder.text_bytes == len(data)

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_text_comes_out_as_it_comes_in(kind, tokenizer_folders):
    """Little is held back, of lines, of words and of a script without spaces."""
    tokenizer = HFTokenizer(tokenizer_folders[kind])
    for text in (TEXT * 9, "The quick brown fox jumps over the lazy dog. " * 30):
        encoder, ids, held = StreamEncoder(tokenizer), [], 0
        for start in range(0, len(text.encode()), 7):
            ids += encoder.push(text.encode()[start : start + 7])
            held = max(held, start + 7 - encoder.text_bytes)
        assert ids + encoder.finish() == tokenizer.encode(text)
        assert held < 400 or kind == "over_words"


def test_a_byte_tokenizer_holds_nothing_but_a_step():
    encoder = StreamEncoder(ByteTokenizer())
    assert bytes(encoder.push(b"one\ntwo\nthree four five six seven")) == b"one\ntwo\nthree four five six seven"
    assert encoder.push(b"ei") == []
    assert bytes(encoder.finish()) == b"ei"


def test_a_text_without_lines_does_not_wait_for_ever():
    encoder = StreamEncoder(ByteTokenizer())
    assert len(encoder.push(b"x" * 70_000)) == 70_000


def test_what_is_not_utf_8_is_named_with_its_place():
    data = "a€b".encode() + b"\xff" + b"c"
    for cuts in ([], [2], [3], [5]):
        with pytest.raises(ValueError, match=r"notes\.txt is not UTF-8 \(byte 5\)") as raised:
            encode(ByteTokenizer(), data, cuts, name="notes.txt")
        assert "\n" not in str(raised.value)
        encoder = StreamEncoder(ByteTokenizer())
        with pytest.raises(ValueError, match="byte 5"):
            encoder.push(data)
        assert bytes(encoder.rest()).decode() == "a€b"
        ids, _ = encode(ByteTokenizer(), data, cuts, errors="replace")
        assert bytes(ids).decode() == "a€b�c"
    with pytest.raises(ValueError, match=r"byte 1\)"):
        encode(ByteTokenizer(), b"a\xe2\x82", [])
