"""What the command lines share: cache descriptions, help, and errors of one line."""

import re

import pytest

import streamjax as sj
from streamjax.commands import chat, demo, perplexity, stream
from streamjax.commands.flags.cache import parse_cache
from streamjax.kv.description import describe_cache

COMMANDS = [stream, chat, perplexity, demo]


@pytest.mark.parametrize(
    ("text", "cache"),
    [
        ("dense:capacity=77", sj.kv.preset("dense", capacity=77)),
        ("streaming_llm:sinks=2,window=9", sj.kv.preset("streaming_llm", sinks=2, window=9)),
        ("window:window=5000", sj.kv.preset("window", window=5000)),
        # what is not said fits the training length, here 100 tokens
        ("window", sj.kv.preset("window", window=100)),
        ("streaming_llm", sj.kv.preset("streaming_llm", sinks=4, window=96)),
        ("streaming_llm:sinks=8", sj.kv.preset("streaming_llm", sinks=8, window=92)),
        ("dense", sj.kv.preset("dense", capacity=300)),
    ],
)
def test_caches_are_described_in_one_word(text, cache):
    assert parse_cache(text, 100, dense_capacity=300) == cache


def test_defaults_stay_where_the_model_was_trained_for_longer():
    assert parse_cache("streaming_llm", 100_000) == sj.kv.preset("streaming_llm")
    assert parse_cache("window", 100_000) == sj.kv.preset("window")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("streaming_lm", "unknown cache 'streaming_lm'; did you mean 'streaming_llm'?"),
        ("zzz", r"unknown cache 'zzz'; known: .*dense.*window"),
        ("window:windw=3", "cache 'window' has no option 'windw'; did you mean 'window'?"),
        ("window:window", "cache option 'window' lacks its value: write window=NUMBER"),
        ("window:window=3,window=4", "cache 'window': window is given twice"),
        ("window:window=many", "cache 'window': window must be a number, not 'many'"),
        ("window:window=0", "Window.size is 0: it must be a whole number of at least 1"),
    ],
)
def test_wrong_caches_are_told_with_the_nearest_right_one(text, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")) as raised:
        parse_cache(text, 100)
    assert "\n" not in str(raised.value)


def test_caches_in_short():
    assert describe_cache(sj.kv.preset("streaming_llm", sinks=4, window=1020)) == "Sink(4) > Window(1020)"
    assert describe_cache(sj.kv.Cascade(sj.kv.Sink(4), sj.kv.Window(9), fuse=False)) == "Sink(4) > Window(9)"
    assert describe_cache(sj.kv.preset("dense", capacity=8)) == "Full(8)"


@pytest.mark.parametrize("module", COMMANDS)
def test_help_teaches(module, command):
    outcome = command(module, "--help", model=None)
    assert outcome.status == 0
    examples = re.findall(rf"python -m infer.{module.__name__.rpartition('.')[2]}\b.*", outcome.out)
    assert examples
    flags = set(re.findall(r"^  --(\w+)", outcome.out, re.MULTILINE))
    assert {"model", "chunk_size", "help"} <= flags
    used = set(re.findall(r"--(\w+)", " ".join(examples)))
    assert used <= flags


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (stream, ["--cahce=window"], "error: Unknown command line flag 'cahce'. Did you mean: cache"),
        (stream, ["book.txt"], "error: unexpected argument 'book.txt': options are written --name=value"),
        (stream, ["--max_tokens=x"], "error: flag --max_tokens=x: invalid literal"),
        (stream, ["--cache=windw"], "error: unknown cache 'windw'; did you mean 'window'?"),
        (stream, ["--input=/nowhere/book.txt"], "error: /nowhere/book.txt: No such file or directory"),
        (stream, ["--input=/"], "error: / is a folder: --input takes one text file"),
        (stream, ["--cache=hsa"], "error: this cache is the memory of hierarchical sparse attention (hsa), which the"),
        (chat, ["--top_p=2"], "error: Sampler.top_p is 2.0: it must be"),
        (
            perplexity,
            ["--cache=dense:capacty=3"],
            "error: cache 'dense' has no option 'capacty'; did you mean 'capacity'?",
        ),
        (perplexity, ["--dense_memory=1e-9"], "error: a dense cache of one token takes"),
    ],
)
def test_mistakes_end_a_command_with_one_line(module, arguments, message, command):
    outcome = command(module, *arguments)
    assert outcome.status in (1, 2)
    assert outcome.out == ""
    assert outcome.err.startswith(message)
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize("module", COMMANDS)
def test_a_missing_model_is_named(module, command, tmp_path):
    outcome = command(module, model=tmp_path / "nothing")
    assert outcome == (1, "", f"error: no model folder {tmp_path}/nothing: give --model=FOLDER with config.json and "
                       "*.safetensors, or a .gguf file\n")  # fmt: skip
    (tmp_path / "empty").mkdir()
    outcome = command(module, model=tmp_path / "empty")
    assert outcome.status == 1
    assert outcome.err.startswith(f"error: no model at {tmp_path}/empty")
    assert outcome.err.count("\n") == 1


def test_a_traceback_is_shown_on_request(command, tmp_path):
    with pytest.raises(ValueError, match="no model folder"):
        command(stream, "--traceback", model=tmp_path / "nothing")
