"""`python -m infer.stream`: its numbers against the library's, and streams that go on."""

import math
import re
import signal

import numpy as np
import pytest

import streamjax as sj
from streamjax.commands import stream
from tests.commands.command_helpers import BOS, numbers, read_json

FIT = "--cache=streaming_llm:sinks=4,window=28"
SMALL = "--chunk_size=64"


def expected_nats(model_folder, data: bytes) -> np.ndarray:
    model = sj.load(model_folder)
    state = sj.init_state(model, sj.kv.preset("streaming_llm", sinks=4, window=28))
    _, nats = sj.score(model, state, np.array([[BOS, *data]]), chunk_size=64)
    return np.asarray(nats)[0, 1:]


@pytest.mark.quick
def test_a_file_costs_what_the_library_says(command, model_folder, text_file, tmp_path):
    outcome = command(stream, f"--input={text_file}", SMALL, f"--json={tmp_path}/r.json")
    assert outcome.status == 0
    nats = expected_nats(model_folder, text_file.read_bytes())
    result = read_json(tmp_path / "r.json")
    assert result["tokens"] == len(nats) == 603
    assert result["tokens_seen"] == 604
    assert result["cache"] == "Sink(4) > Window(28)"
    assert result["nats_per_token"] == pytest.approx(nats.mean(), rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(nats.mean() / math.log(2), rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(nats.mean()), rel=1e-4)
    assert [point["tokens"] for point in result["curve"]] == [256, 512, 603]
    assert result["curve"][1]["nats_per_token"] == pytest.approx(nats[256:512].mean(), rel=1e-5)
    assert result["peak_resident_bytes"] > 50e6
    shown = numbers(outcome.out)
    assert shown["tokens"] == 603
    assert shown["perplexity"] == pytest.approx(math.exp(nats.mean()), rel=1e-3)
    assert "tiny: llama" in outcome.err
    assert "603/603" in outcome.err


@pytest.mark.quick
def test_what_a_cache_holds_is_shown_and_nothing_is_read(command):
    outcome = command(stream, "--cache=knorm", "--show_cache", stdin=b"")
    assert outcome.status == 0
    assert "Scored(960 by KNorm(), every 64)" in outcome.out
    assert "bytes a stream in all" in outcome.out


def test_a_saved_stream_goes_on_where_it_was(command, model_folder, text_file, tmp_path):
    data = text_file.read_bytes()
    first = command(stream, FIT, SMALL, f"--save_state={tmp_path}/s", stdin=data[:320])
    assert "saved at token 321" in first.out
    second = command(stream, FIT, SMALL, f"--load_state={tmp_path}/s", f"--json={tmp_path}/r.json", stdin=data[320:])
    assert second.status == 0
    result = read_json(tmp_path / "r.json")
    assert result["tokens_seen"] == 604
    nats = expected_nats(model_folder, data)
    assert result["nats_per_token"] == pytest.approx(nats[320:].mean(), rel=1e-4)
    other = command(stream, "--cache=window", f"--load_state={tmp_path}/s", stdin=data)
    assert other.status == 1
    assert re.fullmatch(r"error: .*/s: saved with the cache .*; this session has .*\n", other.err)


def test_it_ends_where_it_is_told_or_must(command, text_file):
    outcome = command(stream, f"--input={text_file}", SMALL, "--max_tokens=191")
    assert (outcome.status, numbers(outcome.out)["tokens"]) == (0, 191)
    assert outcome.out.startswith("--max_tokens=191 reached\n")
    outcome = command(stream, f"--input={text_file}", SMALL, "--cache=dense:capacity=128")
    assert (outcome.status, numbers(outcome.out)["tokens"]) == (0, 127)
    assert outcome.out.startswith("the cache is full at 128 tokens")


def test_ctrl_c_ends_an_endless_pipe_with_the_summary_and_the_save(command, monkeypatch, model_folder, tmp_path):
    def endless(name):
        def pieces():
            for i in range(1000):
                if i == 20:
                    signal.raise_signal(signal.SIGINT)
                yield b"and on it goes\nand on "

        return pieces(), None

    monkeypatch.setattr(stream, "open_input", endless)
    outcome = command(stream, FIT, SMALL, f"--save_state={tmp_path}/s")
    assert outcome.status == 0
    assert outcome.out.startswith("interrupted\n")
    tokens = numbers(outcome.out)["tokens"]
    assert tokens == 6 * 64 - 1
    session = sj.Session(sj.load(model_folder), sj.load_tokenizer(), sj.kv.preset("streaming_llm", sinks=4, window=28))
    session.load(tmp_path / "s")
    assert session.tokens_seen == tokens + 1


def test_a_text_must_be_there_and_be_text(command, model_folder, text_file, tmp_path):
    outcome = command(stream, stdin=b"")
    assert outcome.status == 1
    assert outcome.err.endswith("error: the input is empty: there is nothing to read\n")
    data = text_file.read_bytes() + b"\xff\xfe"
    outcome = command(stream, SMALL, f"--save_state={tmp_path}/s", stdin=data)
    assert outcome.status == 1
    assert outcome.err.endswith("error: standard input is not UTF-8 (byte 603): convert it, or read on over it with "
                                "errors=replace\n")  # fmt: skip
    session = sj.Session(sj.load(model_folder), sj.load_tokenizer(), sj.kv.preset("streaming_llm", sinks=4, window=28))
    session.load(tmp_path / "s")
    assert session.tokens_seen == 603 + 1
    outcome = command(stream, SMALL, "--errors=replace", stdin=data)
    assert (outcome.status, numbers(outcome.out)["tokens"]) == (0, 603 + 6)
