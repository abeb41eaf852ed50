"""`python -m train`: one-line errors, help that teaches, and a process that is killed for real."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from streamjax.commands import train as command
from streamjax.training import train

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(capsys, monkeypatch):
    """run(*arguments) -> (exit code, stdout, stderr), in this process."""
    monkeypatch.chdir(ROOT)

    def call(*arguments):
        code = command.main(["train", "--compilation_cache=", *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


TINY = "--config=configs/tiny.py"
# of a configuration
IMPORTS = "from streamjax.data import *\nfrom streamjax.models import *\nfrom streamjax.training import *\n"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "--config is missing: name an experiment, for instance --config=configs/tiny.py"),
        ([TINY], 2, "--workdir is missing: give the run a folder, for instance --workdir=runs/tiny"),
        (["--config=configs/tine.py", "--workdir=w"], 2, "no file configs/tine.py; there is configs/tiny.py"),
        (["--config=README.txt", "--workdir=w"], 2, "no file README.txt; there is configs/"),
        (["--config=train/__init__.py", "--workdir=w"], 2, "train/__init__.py: it defines no get_config()"),
        ([TINY, "--workdir=w", "--config.step=3"], 2, "unknown field config.step; did you mean config.steps?"),
        ([TINY, "--workdir=w", "--config.steps", "x"], 2, "config.steps is 'x': it must be an integer"),
        (
            [TINY, "--workdir=w", "--config.steps=-1"],
            2,
            "TrainConfig.steps is -1: it must be a whole number",
        ),
        ([TINY, "--wrkdir=w"], 2, "Unknown command line flag 'wrkdir'. Did you mean: workdir"),
        ([TINY, "--workdir=w", "now"], 2, "unexpected argument 'now'"),
        ([TINY, "--workdir={}", "--config.data.source=nothing/*.txt"], 1, "nothing/*.txt"),
        ([TINY, "--workdir={}", "--config.model=none", "--config.init_from=nowhere"], 1, "no model at nowhere"),
    ],
)
def test_errors_are_one_line(run, tmp_path, arguments, code, message):
    found, out, err = run(*(argument.format(tmp_path) for argument in arguments))
    assert found == code
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert out == ""
    assert not list(tmp_path.iterdir())


def test_help_lists_the_fields_of_the_configuration(run):
    code, out, _ = run("--help")
    assert code == 0
    assert "python -m train --config=configs/tiny.py --workdir=runs/tiny" in out
    assert "--config.steps = " not in out
    code, out, _ = run(TINY, "--help", "--config.steps=7")
    assert code == 0
    assert "--config.steps = 7  (an integer)" in out
    assert "--config.optimizer.learning_rate = 0.01  (a number)" in out


def test_the_parts_of_a_configuration_are_in_the_packages_that_configurations_import(run_config):
    """`repr` of a configuration is one, as a configuration file writes it."""
    names: dict = {}
    exec(IMPORTS, names)
    assert eval(repr(run_config), names) == run_config


@pytest.mark.slow
def test_a_process_that_is_killed_and_started_again(run_config, tmp_path):
    """SIGKILL between checkpoints, then SIGTERM, then to the end: the model file is that of an undisturbed run."""
    train(run_config, tmp_path / "undisturbed")
    config = tmp_path / "config.py"
    config.write_text(f"{IMPORTS}\ndef get_config():\n    return {run_config!r}\n")
    command = [sys.executable, "-m", "train", f"--config={config}", f"--workdir={tmp_path / 'run'}"]

    def start():
        return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def wait_for(path, process):
        while not path.exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.002)

    process = start()
    wait_for(tmp_path / "run" / "checkpoints" / "4", process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    process = start()
    wait_for(tmp_path / "run" / "checkpoints" / "8", process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate()
    if process.returncode:  # else it was done before the signal came
        assert process.returncode == 143
        assert err.splitlines()[-1].startswith("SIGTERM: saved step ")
        out, err = start().communicate()
        assert "done; the model is in" in out, err
    for name in ("model.safetensors", "config.json"):
        expected = (tmp_path / "undisturbed" / "model" / name).read_bytes()
        assert (tmp_path / "run" / "model" / name).read_bytes() == expected
