"""Commands as processes: streams that are closed, full or gone, signals, a backend that is not there."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import streamjax as sj
from tests.processes import one_device_flags

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": one_device_flags()}
STREAM = [sys.executable, "-m", "infer.stream", "--chunk_size=64"]
TRAIN = [sys.executable, "-m", "train", "--config=configs/tiny.py"]


def start(command, redirect="", platforms="cpu", **options):
    """The command as a process; Ctrl-C reaches it, as the fixture `ctrl_c` has it."""
    argv = ["bash", "-c", f'exec "$@" {redirect}', "bash", *command] if redirect else command
    return subprocess.Popen(
        argv, cwd=ROOT, env={**ENVIRONMENT, "JAX_PLATFORMS": platforms}, text=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
    )  # fmt: skip


def end(process, seconds=300):
    out, err = process.communicate(timeout=seconds)
    assert "Traceback" not in err, err
    assert "Exception ignored" not in err, err
    return process.returncode, out, err


def errors(err):
    return [line for line in err.splitlines() if line.startswith("error: ")]


ALIKE = ("no output", "full errors", "gone", "help")  # what they say is much as in the other cases


@pytest.mark.slow
@pytest.mark.parametrize("left_out", [ALIKE, pytest.param((), marks=pytest.mark.slow)], ids=["some", "all"])
def test_standard_streams_may_be_closed_full_or_gone(model_folder, text_file, tmp_path, left_out):
    model, text = f"--model={model_folder}", f"--input={text_file}"
    reads = [*STREAM, model, text]
    started = {
        "no input": ([*STREAM, model], "<&-"),
        "no output": ([*reads, f"--json={tmp_path}/a.json"], ">&-"),
        "full output": ([*reads, f"--save_state={tmp_path}/full"], ">/dev/full"),
        "full errors": (reads, "2>/dev/full"),
        "gone": ([*reads, f"--save_state={tmp_path}/gone"], "> >(true)"),
        "help": ([*STREAM, "--help"], "> >(true)"),
    }
    processes = {name: start(*how) for name, how in started.items() if name not in left_out}
    found = {name: end(process) for name, process in processes.items()}
    assert found["no input"][0] == 1
    assert errors(found["no input"][2]) == ["error: the input is empty: there is nothing to read"]
    if not left_out:
        assert found["no output"][0] == 0
        assert json.loads((tmp_path / "a.json").read_text())["tokens"] == 603
        assert found["full errors"][0] == 0
        assert "603" in found["full errors"][1]
    assert found["full output"][0] == 1
    assert errors(found["full output"][2]) == [f"error: standard output: {os.strerror(errno.ENOSPC)}"]
    for name in {"gone", "help"} - set(left_out):
        assert found[name][0] in (0, 1)  # 0 where the pipe took it before its reader had gone
        assert errors(found[name][2]) == []
    session = sj.Session(sj.load(model_folder), sj.load_tokenizer(), sj.kv.preset("streaming_llm", sinks=4, window=28))
    for name in {"full", "gone"} - set(left_out):
        session.load(tmp_path / name)
        assert session.tokens_seen == 604


@pytest.mark.parametrize(
    ("command", "platform"), [("stream", "cuda"), pytest.param("train", "tpu", marks=pytest.mark.slow)]
)
def test_a_backend_that_is_not_there_is_one_line_in_every_command(model_folder, text_file, tmp_path, command, platform):
    reads, trains = [*STREAM, f"--model={model_folder}", f"--input={text_file}"], [*TRAIN, f"--workdir={tmp_path}/run"]
    status, out, err = end(start(reads if command == "stream" else trains, platforms=platform))
    assert (status, out) == (1, "")
    assert re.fullmatch(rf"error: JAX_PLATFORMS={platform}: JAX finds no such device here; .*\n", err)
    assert not (tmp_path / "run").exists()


def test_ctrl_c_while_the_imports_run_is_one_line(model_folder):
    for seconds in (0.3, 1.2):
        process = start([*STREAM, f"--model={model_folder}", "--input=/dev/zero"])
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        status, out, err = end(process)
        assert status in (130, -signal.SIGINT)
        assert out == ""
        assert err == ("error: interrupted\n" if status > 0 else "")


@pytest.mark.parametrize(
    ("signals", "status"),
    [
        pytest.param([signal.SIGINT, signal.SIGINT], 0, marks=pytest.mark.slow),
        ([signal.SIGTERM, signal.SIGINT, signal.SIGTERM], 143),
        pytest.param([signal.SIGHUP], 129, marks=pytest.mark.slow),
    ],
)
def test_whatever_ends_a_stream_it_is_saved(model_folder, tmp_path, signals, status):
    """A pipe that never ends; signals come as soon as it reads, the later ones while it saves."""
    reader, writer = os.pipe()
    command = [*STREAM, f"--model={model_folder}", f"--save_state={tmp_path}/s", f"--json={tmp_path}/r.json"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, text=True, stdin=reader, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    os.close(reader)
    os.write(writer, b"it goes on\nand on\n" * 200)
    shown = ""
    while "tokens/s" not in shown:  # the bar, from the first chunk on
        piece = process.stderr.read(1)
        assert piece, shown
        shown += piece
    time.sleep(0.3)
    for number in signals:
        process.send_signal(number)
        time.sleep(0.02)
    found, out, err = end(process)
    os.close(writer)
    assert found == status, err
    result = json.loads((tmp_path / "r.json").read_text())
    session = sj.Session(sj.load(model_folder), sj.load_tokenizer(), sj.kv.preset("streaming_llm", sinks=4, window=28))
    session.load(tmp_path / "s")
    assert session.tokens_seen == result["tokens_seen"] > 64
    assert f"saved at token {result['tokens_seen']:,}" in out
