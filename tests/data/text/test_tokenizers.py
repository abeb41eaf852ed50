"""Tokenizers against transformers, which reads the same folders."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors

from streamjax.data import ByteTokenizer, HFTokenizer, load_tokenizer
from tests.data.conftest import KINDS, TEXTS

pytestmark = pytest.mark.quick


@given(st.text(st.characters(exclude_categories=("Cs",))))
def test_bytes_round_trip(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text, add_bos=True)
    assert ids == [256, *text.encode("utf-8")]
    assert tokenizer.decode([*ids, 257, 258, 400]) == text


def test_bytes_are_what_a_model_without_tokenizer_gets(tmp_path: Path) -> None:
    for tokenizer in (load_tokenizer(), load_tokenizer(tmp_path)):
        assert isinstance(tokenizer, ByteTokenizer)
        assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (259, 256, (257,), 258)
        assert tokenizer.chat_template is None
    assert ByteTokenizer().decode([0xE6, 0x9D]) == "\ufffd"


@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_transformers(kind: str, tokenizer_folders: dict[str, Path]) -> None:
    transformers = pytest.importorskip("transformers")
    ours = load_tokenizer(tokenizer_folders[kind])
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tokenizer_folders[kind])
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert (ours.bos_token, ours.eos_token, ours.eos_ids) == ("<s>", "</s>", (theirs.eos_token_id,))
    assert ours.vocab_size == len(theirs)
    for text in [*TEXTS, "Say <tool> and </s> now", ""]:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, add_bos=True) == [theirs.bos_token_id, *ids]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_file_and_folder_are_the_same(tokenizer_folders: dict[str, Path]) -> None:
    folder = tokenizer_folders["byte_level"]
    by_file, by_folder = load_tokenizer(folder / "tokenizer.json"), load_tokenizer(folder)
    assert by_file.encode(TEXTS[1]) == by_folder.encode(TEXTS[1])
    assert by_file.eos_id == by_folder.eos_id is not None


def test_pickles_for_worker_processes(tokenizer_folders: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(tokenizer_folders["byte_fallback"])
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode(TEXTS[1]) == tokenizer.encode(TEXTS[1])
    assert copy.vocab_size == tokenizer.vocab_size


def _folder(tmp_path: Path, source: Path, **files: object) -> Path:
    (tmp_path / "tokenizer.json").write_text((source / "tokenizer.json").read_text())
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


def test_settings_beside_the_file(tmp_path: Path, tokenizer_folders: dict[str, Path]) -> None:
    folder = _folder(
        tmp_path,
        tokenizer_folders["byte_level"],
        special_tokens_map={"bos_token": "<s>", "eos_token": "<s>"},
        tokenizer_config={"eos_token": "</s>", "pad_token": None, "chat_template": "{{ 1 }}"},
        generation_config={"eos_token_id": [7, 5]},
    )
    tokenizer = HFTokenizer(folder)
    assert tokenizer.bos_token == "<s>"
    assert tokenizer.eos_ids == (tokenizer.eos_id, 7, 5)
    assert tokenizer.eos_id == HFTokenizer(tokenizer_folders["byte_level"]).eos_id
    assert tokenizer.pad_id is None
    assert tokenizer.chat_template == "{{ 1 }}"
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert HFTokenizer(folder).chat_template == "yes"
    (folder / "chat_template.jinja").write_text("{{ 2 }}")
    assert HFTokenizer(folder).chat_template == "{{ 2 }}"


def test_truncation_and_padding_in_the_file_are_ignored(tmp_path: Path, tokenizer_folders: dict[str, Path]) -> None:
    folder = _folder(tmp_path, tokenizer_folders["byte_level"])
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["truncation"] = {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert len(HFTokenizer(folder).encode(TEXTS[0])) > 3


def test_adds_bos_as_the_file_says(tmp_path: Path, tokenizer_folders: dict[str, Path]) -> None:
    source = tokenizer_folders["byte_level"]
    assert not HFTokenizer(source).adds_bos
    bos_id = HFTokenizer(source).bos_id
    folder = _folder(tmp_path, source, tokenizer_config={"bos_token": "<s>"})
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [bos_id], "tokens": ["<s>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    loaded = HFTokenizer(folder)
    assert loaded.adds_bos
    assert loaded.encode("fox") == HFTokenizer(source).encode("fox")


DEEP = "[" * 100_000
DAMAGED = {
    "tokenizer.json": [
        "half",
        "",
        '{"model": {"type": "Nonsense"}}',
        DEEP,
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},  # the library panics
        {"model": {"type": "BPE", "vocab": {"a": 10**30}, "merges": []}},
        {"model": {"type": "BPE", "vocab": {"a": 2**31}, "merges": []}},  # the library counts up to it
    ],
    "tokenizer_config.json": [
        "{",
        "[1]",
        DEEP,
        '{"x": ' + "9" * 5000 + "}",
        '{"eos_token": 5}',
        '{"bos_token": ["<s>"]}',
        '{"chat_template": ["x"]}',
        '{"chat_template": [{"name": "default"}]}',
        '{"chat_template": {"a": 1}}',
        b"\xff",
    ],
    "generation_config.json": [
        "nonsense",
        DEEP,
        '{"eos_token_id": 1000000000000}',
        '{"eos_token_id": [1, "2"]}',
        '{"eos_token_id": true}',
        '{"eos_token_id": -1}',
    ],
    "chat_template.jinja": [b"\xff\xfe"],
}


@pytest.mark.parametrize(
    ("name", "content"),
    [(name, content) for name, contents in DAMAGED.items() for content in contents],
    ids=lambda value: str(value)[:30],
)
def test_damaged_files_are_named_in_one_line(
    name: str, content: Any, tmp_path: Path, tokenizer_folders: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    folder = _folder(tmp_path, tokenizer_folders["byte_level"])
    whole = (folder / "tokenizer.json").read_text()
    if content == "half":
        content = whole[: len(whole) // 2]
    elif isinstance(content, dict):
        content = json.dumps(json.loads(whole) | content)
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=str(folder)) as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert capfd.readouterr().err == ""  # nor has the library's Rust code said a word


@pytest.mark.parametrize(
    ("change", "encodes"),
    [
        ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, False),  # the library panics
        ({"model": {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "?", "max_input_chars_per_word": 9}}, False),
        ({"decoder": {"type": "Strip", "content": "f", "start": 5, "stop": 5}}, True),  # decoding panics
    ],
)
def test_a_tokenizer_that_cannot_encode_is_named_in_one_line(
    change: dict[str, Any], encodes: bool, tmp_path: Path, tokenizer_folders: dict[str, Path]
) -> None:
    folder = _folder(tmp_path, tokenizer_folders["byte_level"])
    content = json.loads((folder / "tokenizer.json").read_text()) | change
    if change.get("model"):
        content["model"]["continuing_subword_prefix"] = "##"
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(folder)
    with pytest.raises(ValueError, match=str(folder / "tokenizer.json")) as caught:
        tokenizer.decode(tokenizer.encode("fox"))
    assert "\n" not in str(caught.value)
    assert ("decode" in str(caught.value)) is encodes


def test_special_tokens_that_the_vocabulary_lacks_are_as_none(
    tmp_path: Path, tokenizer_folders: dict[str, Path]
) -> None:
    settings = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "[PAD]"}
    folder = _folder(tmp_path, tokenizer_folders["byte_level"], tokenizer_config=settings)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.pad_id is None
    assert tokenizer.decode(tokenizer.encode("hi")) == "hi"
    settings |= {"bos_token": "<nowhere>", "eos_token": {"content": "<nor here>"}}
    folder = _folder(tmp_path, tokenizer_folders["byte_level"], tokenizer_config=settings)
    with pytest.warns(UserWarning, match="is left out") as caught:
        tokenizer = load_tokenizer(folder)
    assert [str(warning.message).partition(" has no token ")[2] for warning in caught] == [
        "'<nowhere>': the bos_token is left out",
        "'<nor here>': the eos_token is left out",
    ]
    assert (tokenizer.bos_id, tokenizer.bos_token, tokenizer.eos_id, tokenizer.eos_ids) == (None, "", None, ())
    assert not tokenizer.adds_bos


@pytest.mark.parametrize("kind", ["bytes", *KINDS])
def test_lone_surrogates_are_replaced(kind: str, tokenizer_folders: dict[str, Path]) -> None:
    tokenizer = ByteTokenizer() if kind == "bytes" else load_tokenizer(tokenizer_folders[kind])
    for bad, good in (("caf\udce9", "caf\ufffd"), ("\ud83d\ude00", "😀"), ("a\ud800b", "a\ufffdb")):
        assert tokenizer.encode(bad) == tokenizer.encode(good)
        assert tokenizer.encode(bad, parse_special=False, continues=True) == tokenizer.encode(
            good, parse_special=False, continues=True
        )


@pytest.mark.parametrize("add_bos", [None, False, True])
@pytest.mark.parametrize("post_processor", [False, True])
def test_adds_bos_where_transformers_does(
    add_bos: bool | None, post_processor: bool, tmp_path: Path, tokenizer_folders: dict[str, Path]
) -> None:
    transformers = pytest.importorskip("transformers")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    if add_bos is not None:
        settings["add_bos_token"] = add_bos
    folder = _folder(tmp_path, tokenizer_folders["byte_level"], tokenizer_config=settings)
    if post_processor:
        tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        bos = tokenizer.token_to_id("<s>")
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", bos)])
        tokenizer.save(str(folder / "tokenizer.json"))
    ours, theirs = (
        load_tokenizer(folder),
        transformers.PreTrainedTokenizerFast.from_pretrained(folder),
    )
    assert ours.encode("fox", add_bos=ours.adds_bos) == theirs.encode("fox")


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_that_are_typed_may_be_text(kind: str, tokenizer_folders: dict[str, Path]) -> None:
    transformers = pytest.importorskip("transformers")
    ours = load_tokenizer(tokenizer_folders[kind])
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tokenizer_folders[kind], split_special_tokens=True)
    pieces = ["</s>", "<s>", "<|r|>", "<tool>", " <|l|>", "fox", " ", "\n", "東"]

    @given(st.lists(st.sampled_from(pieces), max_size=8).map("".join))
    def check(text: str) -> None:
        ids = ours.encode(text, parse_special=False)
        assert ids == theirs.encode(text, add_special_tokens=False)
        assert not {ours.bos_id, ours.eos_id, ours._tokenizer.token_to_id("<|r|>")}.intersection(ids)
        assert ours.encode(text) == ours.encode(text, text_spans=[(len(text), len(text) + 1)])
        assert ids == ours.encode(text, text_spans=[(0, len(text))])
        if kind not in ("word_piece", "metaspace"):  # these have no tokens for "<"
            assert ours.decode(ids).replace(" ", "") == text.replace(" ", "")
        mixed = ours.encode("<s>" + text + "</s>", text_spans=[(3, 3 + len(text))])
        special = [token for token in mixed if token in (ours.bos_id, ours.eos_id)]
        assert special == [ours.bos_id, ours.eos_id]
        assert pickle.loads(pickle.dumps(ours)).encode(text, parse_special=False) == ids

    check()


def test_a_model_that_makes_special_tokens_itself_is_kept_from_it(tmp_path: Path) -> None:
    """T5's vocabulary has "</s>" with a score of 0: the likeliest way to read these four characters."""
    letters = [(letter, -5.0) for letter in "▁</sabc>"]
    tokenizer = tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), ("</s>", 0.0), *letters], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path)
    assert 1 in ours.encode("a </s> b</s>c")
    ids = ours.encode("a </s> b</s>c", parse_special=False)
    assert 1 not in ids
    assert ours.decode(ids) == "a </s> b</s>c"


@pytest.mark.parametrize("kind", ["bytes", *KINDS])
def test_a_text_that_goes_on_is_the_rest_of_the_whole(kind: str, tokenizer_folders: dict[str, Path]) -> None:
    """Cut between words, or anywhere: no piece gets a space of its own."""
    tokenizer = ByteTokenizer() if kind == "bytes" else load_tokenizer(tokenizer_folders[kind])
    text = TEXTS[0].strip()

    @given(st.integers(1, len(text) - 1))
    def check(at: int) -> None:
        ids = tokenizer.encode(text[:at]) + tokenizer.encode(text[at:], continues=True)
        if text[at] == " " and kind != "over_words":
            assert ids == tokenizer.encode(text)
        if kind != "word_piece":
            assert tokenizer.decode(ids) == tokenizer.decode(tokenizer.encode(text))

    check()


def test_ids_that_no_text_has_are_not_asked_of_a_model(tmp_path: Path, tokenizer_folders: dict[str, Path]) -> None:
    """Gemma 3's tokenizer has a placeholder for images behind its vocabulary; its text models have no row for it."""
    for kind in KINDS:
        tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_folders[kind] / "tokenizer.json"))
        before = tokenizer.get_vocab_size(with_added_tokens=True)
        tokenizer.add_special_tokens(["<image_soft_token>"])
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        ours = load_tokenizer(tmp_path)
        assert ours.vocab_size == before + 1
        assert ours.text_vocab_size <= before
        assert max(ours.encode(TEXTS[1])) < ours.text_vocab_size
        assert ours.encode("<image_soft_token>") == [before]
    assert load_tokenizer(tokenizer_folders["byte_level"]).text_vocab_size == 302  # BOS and EOS are the model's too


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_link_that_leads_nowhere_is_no_absent_file(tmp_path: Path, name: str) -> None:
    """As in a cache of downloads that has lost a file: bytes, or no template, would be wrong and silent."""
    (tmp_path / name).symlink_to("blobs/1234")
    with pytest.raises(ValueError, match=rf"^{tmp_path / name}: this file is missing$"):
        load_tokenizer(tmp_path)


def test_missing_and_foreign_vocabularies_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no tokenizer at"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x0e")
    with pytest.raises(ValueError, match=r"tokenizer\.model but no tokenizer\.json"):
        load_tokenizer(tmp_path)
