"""A .gguf file as `--model`: weights, tokenizer, chat template and the ids that end a turn all come from it."""

import pytest

import streamjax as sj
from streamjax.commands import chat, perplexity, recall, stream
from streamjax.streaming.conversation import Conversation
from tests.commands.command_helpers import read_json
from tests.gguf_files import byte_tokenizer, tiny_llama


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tokenizer=byte_tokenizer())


def test_chat_answers_by_the_template_in_the_file(command, model_file):
    options = ["--chunk_size=32", "--max_new_tokens=12", "--temperature=0"]
    outcome = command(chat, *options, stdin="hello\n", model=model_file)
    assert outcome.status == 0, outcome.err
    assert outcome.err.startswith("tiny.gguf: llama")
    tokenizer = sj.load_tokenizer(model_file)
    assert tokenizer.chat_template.startswith("{% for m in messages %}<|start|>")
    session = sj.Session(
        sj.load(model_file),
        tokenizer,
        sj.kv.preset("streaming_llm", sinks=4, window=60),
        sampler=sj.Sampler(temperature=0),
        chunk_size=32,
    )
    assert outcome.out == "".join(Conversation(session).reply("hello", max_new_tokens=12)) + "\n"
    assert session.stop_ids == (258,)


def test_stream_and_perplexity_read_a_text(command, model_file, text_file, tmp_path):
    outcome = command(stream, f"--input={text_file}", f"--json={tmp_path}/s.json", model=model_file)
    assert outcome.status == 0, outcome.err
    assert read_json(tmp_path / "s.json")["tokens"] == len(sj.load_tokenizer(model_file).encode(text_file.read_text()))
    flags = ["--cache=window:window=60", "--max_tokens=200", f"--json={tmp_path}/p.json", "--png="]
    outcome = command(perplexity, f"--input={text_file}", *flags, model=model_file)
    assert outcome.status == 0, outcome.err


@pytest.mark.slow
def test_recall_asks_for_facts(command, model_file):
    options = ["--task=passkey", "--lengths=300", "--depths=1", "--samples=1", "--cache=window:window=40"]
    outcome = command(recall, *options, model=model_file)
    assert outcome.status == 0, outcome.err
    assert "passkey" in outcome.out


@pytest.mark.parametrize("module", [chat, stream, perplexity, recall])
def test_a_damaged_file_is_one_line(module, command, model_file, tmp_path):
    file = tmp_path / "cut.gguf"
    file.write_bytes(model_file.read_bytes()[:3000])
    outcome = command(module, "--input=builtin" if module in (stream, perplexity) else "--chunk_size=8", model=file)
    assert outcome.status == 1
    assert outcome.err.startswith(f"error: {file}: damaged or truncated GGUF file (")
    assert outcome.err.count("\n") == 1
