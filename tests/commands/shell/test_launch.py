"""Standard streams as a shell may leave them: closed, full, or without a reader."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from streamjax.commands.shell import launch
from streamjax.commands.shell.runner import run_command

ROOT = Path(__file__).parents[3]
OPENS_A_FILE = """
import os, sys
from streamjax.commands.shell import launch

launch._open_standard_streams()
with open(sys.argv[1], "w") as file:
    print("to output", flush=True)
    os.write(1, b"by number\\n")
    print("to errors", file=sys.stderr, flush=True)
    file.write(f"{sys.stdin.read()!r} from input")
"""


@pytest.mark.parametrize("closed", [(), (0,), (1,), (2,), (0, 1, 2)])
def test_a_stream_that_is_closed_is_nowhere_and_no_other_file(tmp_path, closed):
    redirect = " ".join(f"{number}>&-" for number in closed)
    program = [sys.executable, "-c", OPENS_A_FILE, tmp_path / "file"]
    command = ["bash", "-c", f'exec "$@" {redirect}', "bash", *program]
    ended = subprocess.run(command, cwd=ROOT, input="typed", capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == ("" if 1 in closed else "to output\nby number\n")
    assert ended.stderr == ("" if 2 in closed else "to errors\n")
    assert (tmp_path / "file").read_text() == ("'' from input" if 0 in closed else "'typed' from input")


def full():
    return os.open("/dev/full", os.O_WRONLY)


def gone():
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def says(words, flush=False):
    def body(values):
        print(words, flush=flush)

    return body


def fails(values):
    print("words")
    raise ValueError("the text ends here")


@pytest.mark.parametrize(
    ("opened", "error"), [(full, f"error: standard output: {os.strerror(errno.ENOSPC)}\n"), (gone, "")]
)
@pytest.mark.parametrize(
    ("body", "arguments"),
    [(says("words"), []), (says("words", flush=True), []), (says("words" * 9999), []), (fails, ["--help"])],
    ids=["last flush", "flush", "more than the buffer", "help"],
)
def test_output_that_cannot_be_written_is_a_failure_in_a_line(monkeypatch, capsys, opened, error, body, arguments):
    """A reader that has gone wants no words."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", launch.Output(os.fdopen(opened(), "w")))
        status = run_command("About.", [], body, ["command", "--compilation_cache=", *arguments])
        sys.stdout.close()  # as at the end of the process: it has nothing to write then
    assert (status, capsys.readouterr().err) == (1, error)


@pytest.mark.parametrize("opened", [full, gone])
def test_a_command_that_fails_says_why_and_no_more(monkeypatch, capsys, opened):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", launch.Output(os.fdopen(opened(), "w")))
        status = run_command("About.", [], fails, ["command", "--compilation_cache="])
    assert (status, capsys.readouterr().err) == (1, "error: the text ends here\n")


@pytest.mark.parametrize("opened", [full, gone])
def test_messages_that_cannot_be_written_end_nothing(monkeypatch, capsys, opened):
    def body(values):
        print("a message", file=sys.stderr, flush=True)
        print("words")

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", launch.Messages(os.fdopen(opened(), "w", buffering=1)))
        status = run_command("About.", [], body, ["command", "--compilation_cache="])
        sys.stderr.close()
    assert (status, capsys.readouterr().out) == (0, "words\n")
