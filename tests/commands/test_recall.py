"""The recall command and what it measures: a shipped model that finds, caches that cannot, and a fair judgement."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import streamjax as sj
import streamjax.evaluation.recall
from streamjax.commands import recall
from streamjax.commands.flags.model import shipped_model
from streamjax.data import ByteTokenizer
from streamjax.data.recall.tasks import make_problem, stream_context
from streamjax.evaluation.recall import Cell, run_recall
from streamjax.evaluation.recall_plot import plot_recall, short_count
from tests.commands.command_helpers import read_json
from tests.streaming.tiny_models import build
from tests.streaming.tiny_sessions import BYTES


@pytest.fixture(scope="module")
def shipped():
    return sj.load(shipped_model("hsa_recall")), sj.load_tokenizer(shipped_model("hsa_recall"))


ROWS = 3  # alike: so that what `run_recall` asks and what is decoded here are one program


def read_on(model, state, tokens):
    """Streams read tokens [T], 64 at a time and padded: by one program. What is likeliest next for the first."""
    for start in range(0, len(tokens), 64):
        part = np.asarray(tokens[start : start + 64], np.int32)
        chunk = np.tile(np.pad(part, (0, 64 - len(part))), (ROWS, 1))
        state, logits = sj.step(model, state, chunk, jnp.full(ROWS, len(part), jnp.int32))
    return state, int(np.asarray(logits)[0, len(part) - 1].argmax())


def test_what_greedy_decoding_gives_counts_and_nothing_else(monkeypatch):
    """Answers that a model of random weights decodes token by token, and of every other question one letter off."""
    tokenizer, cache = ByteTokenizer(), sj.kv.preset("streaming_llm", sinks=2, window=60)
    model, letters = build(BYTES.replace(logit_bias=True)), np.arange(ord("a"), ord("z") + 1)
    model.head_bias[...] = jnp.asarray(np.where(np.isin(np.arange(259), letters), 0, -np.inf), jnp.float32)
    problem, questions = make_problem("multi_turn", 1.0, 0), []
    context = np.concatenate([*stream_context(problem, 300, tokenizer)])
    state, _ = read_on(model, sj.init_state(model, cache, ROWS), context)
    for i, question in enumerate(problem.questions):
        asked, token = read_on(model, jax.tree.map(jnp.copy, state), tokenizer.encode(question.prompt))
        found = [token]
        for _ in question.answer[1:]:
            asked, token = read_on(model, asked, found[-1:])
            found.append(token)
        found[-1] = found[-1] if i % 2 else found[-1] - 1
        questions.append(dataclasses.replace(question, answer=bytes(found).decode()))
        state, _ = read_on(model, state, [*tokenizer.encode(question.prompt), *found])
    told = dataclasses.replace(problem, questions=tuple(questions))
    monkeypatch.setattr(streamjax.evaluation.recall, "make_problem", lambda *_: told)
    options = {"task": "multi_turn", "length": 300, "depths": [1.0], "samples": 1, "batch_size": ROWS}
    (cell,) = run_recall(model, tokenizer, "x", cache, chunk_size=32, **options)
    assert (cell.depth, cell.right, cell.asked) == (1.0, 2, 4)


@pytest.mark.slow
def test_an_answer_counts_if_greedy_decoding_gives_it(shipped):
    """A trained model's, asked one problem after another; some are right, some wrong."""
    model, tokenizer = shipped
    cache = sj.kv.preset("hsa", capacity=512)  # the start of the context has been pushed out
    cells = run_recall(
        model, tokenizer, "hsa", cache, task="multi_turn", length=700, depths=[1.0], samples=1, batch_size=ROWS,
        chunk_size=64,
    )  # fmt: skip
    problem, right = make_problem("multi_turn", 1.0, 0), 0
    state, _ = read_on(
        model, sj.init_state(model, cache, ROWS), np.concatenate([*stream_context(problem, 700, tokenizer)])
    )
    for question in problem.questions:
        asked = jax.tree.map(jnp.copy, state)  # a step takes what it is given
        prompt, answer = tokenizer.encode(question.prompt), tokenizer.encode(question.answer)
        asked, token = read_on(model, asked, prompt)
        found = [token]
        while len(found) < len(answer):
            asked, token = read_on(model, asked, found[-1:])
            found.append(token)
        right += found == answer
        state, _ = read_on(model, state, [*tokenizer.encode(question.prompt + question.answer)])
    assert {cell.depth: cell.right for cell in cells} == {1.0: right}
    assert [cell.asked for cell in cells] == [4]


@pytest.mark.slow
def test_the_shipped_model_finds_what_a_window_has_forgotten(shipped):
    """Four times its training length, at every depth; with sinks and a window it is right by chance alone."""
    model, tokenizer = shipped
    options = {"task": "passkey", "length": 4096, "depths": [0.0, 0.5, 1.0], "samples": 2, "batch_size": 6}
    found = run_recall(model, tokenizer, "hsa", sj.kv.preset("hsa", capacity=8192), **options)
    assert [cell.accuracy for cell in found] == [1.0, 1.0, 1.0]
    lost = run_recall(model, tokenizer, "window", sj.kv.preset("streaming_llm", sinks=4, window=508), **options)
    assert [cell.accuracy for cell in lost] == [0.0, 0.0, 1.0]
    assert found[0].cache_bytes > lost[0].cache_bytes


def test_the_command_writes_a_table_numbers_and_a_picture(command, model_folder, tmp_path):
    done = command(
        recall, "--lengths=512,1K", "--depths=2", "--samples=1", "--task=passkey", "--task=multi_key",
        "--cache=window:window=64", f"--json={tmp_path / 'r.json'}", f"--png={tmp_path / 'r.png'}",
        model=model_folder,
    )  # fmt: skip
    assert done.status == 0, done.err
    assert "passkey" in done.out
    assert "1,024" in done.out
    runs = read_json(tmp_path / "r.json")["runs"]
    assert len(runs) == 2 * 2 * 2
    assert {r["task"] for r in runs} == {"passkey", "multi_key"}
    assert (tmp_path / "r.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths=4k3"], "--lengths: '4k3' is no number of tokens; write 4096, 4K or 1M"),
        (["--lengths=20"], "a context of 20 tokens has no room for the facts of 'passkey'"),
        (["--lengths="], "--lengths: '' is no number of tokens; write 4096, 4K or 1M"),
        (["--seed=-1"], "flag --seed=-1: -1 is not a non-negative integer"),
        (["--demo"], "--demo asks its own questions: --model is for other runs"),
        (["--task=chess"], "chess"),
        (["--cache=has"], "unknown cache 'has'; did you mean 'hsa'?"),
    ],
)
def test_bad_arguments_are_one_line(command, arguments, message):
    done = command(recall, *arguments, model=shipped_model("hsa_recall"))
    assert done.status != 0
    assert message in done.err
    assert done.err.count("\n") == 1


def test_no_context_is_read_for_nothing_or_twice(command, monkeypatch):
    read = []

    def run_recall(model, tokenizer, name, cache, **options):
        read.append((options["task"], options["length"], options["batch_size"]))
        return [Cell(options["task"], name, options["length"], 0.5, 1, 1, 1.0, 1.0, 1)]

    monkeypatch.setattr(recall, "run_recall", run_recall)
    flags = ["--lengths=256,256", "--task=passkey", "--task=passkey", "--cache=window:window=16", "--json=", "--png="]
    done = command(recall, *flags, "--depths=3", "--samples=1", "--batch_size=1000", model=shipped_model("hsa_recall"))
    assert done.status == 0, done.err
    assert read == [("passkey", 256, 3)]


def test_the_picture_shows_every_cell():
    cells = [
        Cell("passkey", cache, length, depth, int(cache == "a"), 1, 1.0, 1.0, 1)
        for cache in "ab"
        for length in (512, 2048)
        for depth in (0.0, 1.0)
    ]
    figure = plot_recall(cells, None, title="t", trained_length=1024)
    axes = figure.axes[:2]
    assert [text.get_text() for text in axes[0].texts] == ["100"] * 4
    assert [text.get_text() for text in axes[1].texts] == ["0"] * 4
    assert [short_count(n) for n in (512, 2048, 2**20, 1000)] == ["512", "2K", "1M", "1,000"]


def test_how_it_is_asked_is_told_by_the_tokenizer_or_by_the_flag(command, model_folder, tmp_path, monkeypatch):
    """The shipped models are asked as they were trained; a chat template is used in RULER's words alone."""
    asked = []

    def run(*_, **options):
        asked.append((options["phrasing"], options["haystack"]))
        return [Cell("passkey", "c", 512, 0.5, 1, 1, 1.0, 1.0, 1)]

    monkeypatch.setattr(recall, "run_recall", run)
    files = [f"--json={tmp_path}/r.json", "--png=", "--cache=window"]
    for options in ([], ["--phrasing=ruler"], ["--phrasing=ruler", "--haystack=words"]):
        assert command(recall, *files, "--lengths=512", *options, model=model_folder).status == 0
    assert asked == [(None, None), ("ruler", None), ("ruler", "words")]
    done = command(recall, *files, "--lengths=100", "--phrasing=ruler", model=model_folder)
    assert done.status == 1
    assert "has no room for the facts of 'passkey'" in done.err
