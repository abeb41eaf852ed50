"""`python -m infer.chat`, driven through a pipe."""

import json
import shutil
import signal
import sys

import pytest

import streamjax as sj
from streamjax.commands import chat
from streamjax.streaming.conversation import Conversation

SMALL = ["--chunk_size=32", "--max_new_tokens=12"]
CACHE = sj.kv.preset("streaming_llm", sinks=4, window=28)


@pytest.fixture(scope="module")
def answers(model_folder):
    """What the library answers to the same words."""

    def say(*words: str, temperature: float = 0.0) -> list[str]:
        session = sj.Session(
            sj.load(model_folder),
            sj.load_tokenizer(),
            CACHE,
            sampler=sj.Sampler(temperature=temperature, top_p=0.95),
            chunk_size=32,
        )
        conversation = Conversation(session)
        return ["".join(conversation.reply(word, max_new_tokens=12)) for word in words]

    return say


def test_answers_what_the_library_answers(command, answers):
    outcome = command(chat, *SMALL, "--temperature=0", stdin="hello\n\nand then?\n")
    assert outcome.status == 0
    assert outcome.out == "".join(answer + "\n" for answer in answers("hello", "and then?"))
    assert "tiny: llama" in outcome.err
    assert "Sink(4) > Window(28)" in outcome.err


def test_save_and_load_take_a_conversation_back(command, answers, tmp_path):
    lines = ["hello", f"/save {tmp_path}/c", "one way", f"/load {tmp_path}/c", "another way"]
    outcome = command(chat, *SMALL, "--temperature=0.7", stdin="\n".join(lines))
    assert outcome.status == 0
    first, _ = answers("hello", "one way", temperature=0.7)
    assert outcome.out.startswith(first + "\nsaved at token ")
    assert outcome.out.endswith(answers("hello", "another way", temperature=0.7)[1] + "\n")
    again = command(chat, *SMALL, f"--load_state={tmp_path}/c", stdin="another way\n")
    assert again.out.partition("\n")[2] == answers("hello", "another way", temperature=0.7)[1] + "\n"


def test_a_draft_changes_no_word(command, answers, tmp_path):
    (tmp_path / "text").write_text("and then there was one")
    outcome = command(chat, *SMALL, "--temperature=0.7", f"--draft=ngram:{tmp_path}/text", stdin="hello\nand then?\n")
    assert outcome.status == 0
    assert outcome.out == "".join(answer + "\n" for answer in answers("hello", "and then?", temperature=0.7))


@pytest.mark.parametrize(
    ("draft", "message"),
    [
        ("ngrams", "--draft=ngrams: nobody of that kind guesses; use ngram, ngram:FILE, small_cache"),
        ("ngram:nowhere", "--draft=ngram:nowhere: no text could be read: No such file"),
        ("model:nowhere", "--draft=model:nowhere: no model folder nowhere"),
        ("model", "--draft=model: nobody of that kind guesses"),
        ("small_cache:windw", "unknown cache 'windw'; did you mean 'window'"),
    ],
)
def test_wrong_drafts(command, draft, message):
    outcome = command(chat, *SMALL, f"--draft={draft}")
    assert outcome.status != 0
    assert message in outcome.err
    assert "Traceback" not in outcome.err


@pytest.mark.slow
def test_answers_that_read_all_there_is_are_the_same(command):
    """A choice is made anew every five tokens, and leaves nothing out."""
    dense, words = "dense:capacity=256", "hello\nand then?\n"
    outcome = command(chat, *SMALL, f"--cache={dense}", "--temperature=0", stdin=words)
    chosen = (f"--cache={dense}", f"--answer_cache={dense}", "--reselect_every=5")
    again = command(chat, *SMALL, *chosen, "--temperature=0", stdin=words)
    assert again.status == 0
    assert again.out == outcome.out


def test_wrong_answer_caches(command):
    for flags, message in (
        (("--answer_cache=snapvk",), "unknown cache 'snapvk'; did you mean 'snapkv'"),
        (("--answer_cache=snapkv", "--draft=ngram"), "give draft or reselect, not both"),
    ):
        outcome = command(chat, *SMALL, *flags)
        assert outcome.status != 0
        assert message in outcome.err


def test_commands(command, tmp_path):
    lines = ["/cache", "hello", "/cache", "/cache window:window=20", "/reset", "/help", "/quit", "never read"]
    outcome = command(chat, *SMALL, f"--save_state={tmp_path}/c", stdin="\n".join(lines))
    assert outcome.status == 0
    out = outcome.out
    assert out.startswith("Sink(4) > Window(28): 0 of 0 tokens visible, 0 B in use of ")
    assert "Sink(4) > Window(28): 32 of 35 tokens visible" in out  # BOS, "User: hello\nAssistant:" and 12
    assert "a new conversation: Window(20): 0 of 0 tokens visible" in out
    assert all(f"/{name}" in out for name in ("save", "load", "cache", "reset", "help", "quit"))
    assert out.endswith(f"saved at token 0 in {tmp_path}/c\n")


@pytest.mark.slow
def test_compact_goes_on_with_what_matters_to_the_next_turn(command, model_folder):
    """The library's own calls, in the same order, say the same."""
    compact = "/compact snapkv:window=8,size=8,every=8 who are you"
    lines = ["hello there, and welcome", compact, "who are you", "/reset", "/cache"]
    outcome = command(chat, *SMALL, "--temperature=0", "--cache=dense:capacity=256", stdin="\n".join(lines))
    assert outcome.status == 0, outcome.err
    dense, greedy = sj.kv.preset("dense", capacity=256), sj.Sampler(temperature=0.0)
    session = sj.Session(sj.load(model_folder), sj.load_tokenizer(), dense, sampler=greedy, chunk_size=32)
    conversation = Conversation(session)
    first = "".join(conversation.reply(lines[0], max_new_tokens=12))
    seen = session.tokens_seen
    session.compact(sj.kv.preset("snapkv", window=8, size=8, every=8), conversation.turn_ids("who are you"))
    second = "".join(conversation.reply("who are you", max_new_tokens=12))
    told = [line for line in outcome.out.split("\n") if "tokens visible" in line]
    assert outcome.out.startswith(f"{first}\n")
    assert f" of {seen:,} tokens visible" in told[0]
    assert "Scored(8" in told[0]
    assert f"\n{second}\na new conversation" in outcome.out
    assert "Scored(8" in told[1]  # what begins anew has the new cache


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/compact", "error: /compact takes a cache: /compact snapkv:window=256,size=256 what matters"),
        ("/compact windw", "error: unknown cache 'windw'; did you mean 'window'?"),
        ("/sav x", "error: unknown command /sav; did you mean /save?"),
        ("/save", "error: /save takes one folder: /save FOLDER"),
        ("/load nowhere", "error: no session at nowhere"),
        ("/cache windw", "error: unknown cache 'windw'; did you mean 'window'?"),
    ],
)
def test_mistakes_are_one_line_and_end_a_script(command, line, message):
    outcome = command(chat, *SMALL, stdin=f"{line}\nhello\n")
    assert outcome.status == 1
    assert outcome.out == ""
    assert outcome.err.splitlines()[1] == message


def test_a_dense_cache_says_when_it_is_full(command):
    outcome = command(chat, *SMALL, "--cache=dense:capacity=64", stdin="hello\nwhat else?\nand?\n")
    assert outcome.status == 1
    assert "error: the cache is full: it has room for" in outcome.err


def test_ctrl_c_ends_an_answer_and_nothing_else(command, answers, monkeypatch):
    real, pieces = chat._say, []

    def say(text):
        pieces.append(text)
        if len(pieces) == 3:
            signal.raise_signal(signal.SIGINT)
        real(text)

    monkeypatch.setattr(chat, "_say", say)
    outcome = command(chat, *SMALL, "--temperature=0", stdin="hello\n/cache\n")
    assert outcome.status == 0
    assert pieces[3] == " [interrupted]"
    whole = answers("hello")[0]
    assert whole.startswith("".join(pieces[:3]))
    assert len("".join(pieces[:3])) < len(whole)
    assert "tokens visible" in outcome.out


def test_values_for_the_template(command, model_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    (folder / "chat_template.jinja").write_text(
        "{{ raise_exception([enable_thinking, depth, style]|tojson) }}", encoding="utf-8"
    )
    given = ["enable_thinking=false", "depth=3", "style=plain words"]
    arguments = [f"--template_kwargs={text}" for text in given]
    outcome = command(chat, *SMALL, *arguments, stdin="hello\n", model=folder)
    assert outcome.status == 1
    assert outcome.err.splitlines()[-1] == 'error: chat template failed: [false, 3, "plain words"]'
    for wrong in ("enable_thinking", "=1", "a-b=1"):
        outcome = command(chat, *SMALL, f"--template_kwargs={wrong}", stdin="hello\n")
        assert outcome.status == 1
        assert outcome.err.splitlines()[-1].startswith(f"error: --template_kwargs={wrong}: write NAME=VALUE")
    outcome = command(chat, *SMALL, "--template_kwargs=messages=1", stdin="hello\n")
    assert outcome.err.splitlines()[-1].startswith("error: template value 'messages': this name is filled in")


def test_a_terminal_is_not_told_what_to_do(command, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    chat._say("plain\t\x1b[31mred\x07\nnext")
    monkeypatch.undo()
    chat._say("\x1b")
    assert capsys.readouterr().out == "plain\t\\x1b[31mred\\x07\nnext\x1b"
    outcome = command(chat, *SMALL, stdin="/\x1b[31m\n")
    assert "\x1b" not in outcome.err


def test_a_conversation_that_cannot_go_on_is_not_begun(command, tmp_path):
    """The session beside it is not taken either."""
    saved = tmp_path / "c"
    command(chat, *SMALL, f"--save_state={saved}", stdin="hello\n")
    file = saved / "about" / "metadata"
    about = json.loads(file.read_text())
    about["extra"]["conversation"]["previous"] = 7
    file.write_text(json.dumps(about))
    (saved / "checksums.json").unlink(missing_ok=True)
    outcome = command(chat, *SMALL, stdin=f"/load {saved}\n")
    assert outcome.status == 1
    assert outcome.err.splitlines()[-1] == "error: the saved conversation is damaged: its previous is 7"
