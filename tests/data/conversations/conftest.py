"""A tokenizer with the special tokens of chat templates, and a way to write JSON lines."""

import json
import shutil
from pathlib import Path

import pytest

from streamjax.data import load_tokenizer

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>",
           "<end_of_turn>", "[INST]", "[/INST]", "<|User|>", "<|Assistant|>"]  # fmt: skip


@pytest.fixture(scope="session")
def chat_folder(tokenizer_folders, tmp_path_factory) -> Path:
    """A byte-level tokenizer's folder with these tokens and no template."""
    folder = tmp_path_factory.mktemp("chat") / "tokenizer"
    shutil.copytree(tokenizer_folders["byte_level"], folder)
    tokenizer = load_tokenizer(folder)._tokenizer
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def with_template(chat_folder, tmp_path_factory):
    """with_template(template) -> the tokenizer's folder with this template."""

    def make(template: str) -> Path:
        folder = tmp_path_factory.mktemp("template") / "tokenizer"
        shutil.copytree(chat_folder, folder)
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
        return folder

    return make


@pytest.fixture
def write_lines(tmp_path):
    """write_lines(name, records) -> the path of a file with one record a line; bytes are lines as they are."""

    def write(name, records):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in records]
        file.write_bytes(b"".join(line + b"\n" for line in lines))
        return str(file)

    return write
