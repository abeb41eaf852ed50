"""Tokenizers against transformers, which reads the same folders."""

import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

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


def test_damaged_files_are_named_in_one_line(tmp_path: Path, tokenizer_folders: dict[str, Path]) -> None:
    folder = _folder(tmp_path, tokenizer_folders["byte_level"])
    whole = (folder / "tokenizer.json").read_text()
    cases = {
        "tokenizer.json": [whole[: len(whole) // 2], "", '{"model": {"type": "Nonsense"}}'],
        "tokenizer_config.json": ["{", "[1]", '{"eos_token": "<nowhere>"}'],
        "generation_config.json": ["nonsense"],
    }
    for name, contents in cases.items():
        for content in contents:
            folder = _folder(tmp_path, tokenizer_folders["byte_level"])
            for other in ("tokenizer_config.json", "generation_config.json"):
                (folder / other).write_text("{}")
            (folder / name).write_text(content)
            with pytest.raises(ValueError, match=str(folder)) as caught:
                load_tokenizer(folder)
            assert "\n" not in str(caught.value)


def test_missing_and_foreign_vocabularies_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no tokenizer at"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x0e")
    with pytest.raises(ValueError, match=r"tokenizer\.model but no tokenizer\.json"):
        load_tokenizer(tmp_path)
