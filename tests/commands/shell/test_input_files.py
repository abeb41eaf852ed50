"""Texts that a command reads: no more of them than it needs, and special tokens in them are text."""

import json
import os
import shutil

import jax
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

import streamjax as sj
from streamjax.commands import chat, comparison, perplexity, stream
from streamjax.commands.shell import input_files
from streamjax.data import ByteTokenizer
from tests.commands.command_helpers import numbers, read_json


@pytest.mark.parametrize("module", [stream, perplexity])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_may_never_end_is_refused_as_a_file(command, tmp_path, module, kind):
    path = tmp_path / "input"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    limit = ["--max_tokens=100", "--json=", "--png="] if module is perplexity else []
    outcome = command(module, f"--input={path}", *limit)
    assert (outcome.status, outcome.out) == (1, "")
    assert outcome.err.splitlines()[-1] == f"error: {path} is a {kind}: a file is needed"


def test_standard_input_needs_a_limit_where_caches_are_compared(command, tmp_path):
    outcome = command(perplexity, "--input=-", f"--json={tmp_path}/p.json", "--png=", stdin="some text")
    assert outcome.status == 1
    assert "error: --input=- may never end, and the caches all read the same text: give --max_tokens" in outcome.err


def test_no_more_is_read_than_the_limit_takes(monkeypatch):
    read = []

    def endless(name):
        def pieces():
            while len(read) < 1000:
                read.append(100)
                yield b"0123456789" * 10

        return pieces(), None

    monkeypatch.setattr(comparison, "open_input", endless)
    ids, bytes_per_token = comparison.read_text("builtin", ByteTokenizer(), 1050)
    assert len(ids) == 1050
    assert bytes_per_token == pytest.approx(1, abs=0.1)
    assert sum(read) < 2000


def test_a_folder_is_no_text(command, tmp_path):
    outcome = command(perplexity, f"--input={tmp_path}", "--json=", "--png=")
    assert outcome.status == 1
    assert outcome.err == f"error: {tmp_path} is a folder: --input takes one text file, or - for standard input\n"


@pytest.mark.parametrize(("flags", "status"), [([], 1), (["--errors=replace"], 0)])
def test_bytes_that_are_no_text_end_a_comparison_or_are_replaced(command, flags, status):
    flags = [*flags, "--input=-", "--max_tokens=9", "--cache=window:window=8", "--json=", "--png="]
    outcome = command(perplexity, *flags, stdin=b"some\xff text")
    assert outcome.status == status
    assert ("error: standard input is not UTF-8 (byte 4)" in outcome.err) == (status == 1)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (b"hello\xff\n", "standard input is not UTF-8: convert it"),
        (b"hello" * 20, "standard input has a line of more than 64 characters, and a line is a turn"),
    ],
)
def test_what_is_no_turn_of_a_conversation_is_one_line(command, monkeypatch, said, message):
    monkeypatch.setattr(input_files, "_LONGEST_TURN", 64)
    outcome = command(chat, stdin=said)
    assert (outcome.status, outcome.out) == (1, "")
    assert outcome.err.splitlines()[-1] == f"error: {message}"


def test_a_model_of_other_tokens_is_not_fed_bytes(command, tmp_path):
    """As where a folder was copied without its tokenizer.json."""
    config = sj.UniformConfig(
        vocab_size=2048, d_model=8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8, mlp_dim=8
    )
    sj.save_hf(sj.Decoder(config, jax.random.key(0)), tmp_path / "m")
    outcome = command(stream, stdin="some text", model=tmp_path / "m")
    assert outcome.status == 1
    assert outcome.err == (
        f"error: {tmp_path}/m has no tokenizer.json: give --tokenizer=FOLDER (the model has 2,048 ids, which are not "
        "those of bytes)\n"
    )


@pytest.fixture(scope="module")
def words_folder(model_folder, tmp_path_factory):
    """The tiny model with a tokenizer of words, of which <end> is special."""
    folder = tmp_path_factory.mktemp("words") / "tiny"
    shutil.copytree(model_folder, folder)
    vocab = {word: i for i, word in enumerate(("<unk>", "a", "b", "<", "end", ">"))}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize(("flags", "tokens"), [([], 6), (["--parse_special"], 4)])
def test_special_tokens_in_a_text_are_text_unless_asked_for(command, words_folder, tmp_path, flags, tokens):
    text = tmp_path / "text.txt"
    text.write_text("a b <end> a")
    outcome = command(stream, f"--input={text}", *flags, model=words_folder)
    assert outcome.status == 0, outcome.err
    assert numbers(outcome.out)["tokens"] == tokens
    flags = [*flags, "--cache=window:window=8", f"--json={tmp_path}/p.json", "--png="]
    outcome = command(perplexity, f"--input={text}", *flags, model=words_folder)
    assert outcome.status == 0, outcome.err
    assert read_json(tmp_path / "p.json")["tokens"] == tokens
    assert json.loads((words_folder / "tokenizer.json").read_text())["added_tokens"]
