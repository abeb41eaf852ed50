"""The commands that an installation brings: every one is there, and runs outside the repository."""

import importlib
import json
import os
import pkgutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from docs.address import stated
from streamjax.commands.shell import launch

ROOT = Path(__file__).parents[2]
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_runs_the_command_of_its_name(script, monkeypatch):
    asked = []
    monkeypatch.setattr(launch, "launch", lambda command: asked.append(command) or 0)
    assert pkgutil.resolve_name(SCRIPTS[script])() == 0
    assert [name.rpartition(".")[2] for name in asked] == [script.removeprefix("streamjax-").replace("-", "_")]
    assert importlib.import_module(f"streamjax.commands.{asked[0]}").main(["command", "--help"]) == 0


@pytest.mark.parametrize(
    ("names", "unwanted"),
    [
        ("from streamjax.commands.shell import launch", "jax numpy"),  # Ctrl-C is answered before they are there
        pytest.param(
            "import streamjax as sj; sj.load; sj.load_tokenizer",
            "tensorflow_datasets grain jinja2",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_is_not_used_is_not_imported(names, unwanted):
    code = f"import sys; {names}; print(sorted({{*{unwanted.split()}}} & {{*sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("package", ["streamjax", "streamjax.data"])
def test_no_module_hides_a_name_of_its_package(package):
    """A module sets its own name in its package when it is imported, over a function that loads on first use."""
    names, modules = importlib.import_module(package), pkgutil.iter_modules(importlib.import_module(package).__path__)
    hidden = {module.name for module in modules} & {*names.__all__}
    assert hidden <= {"data", "kv", "serving", "training"}
    assert {*names.__all__} <= {*dir(names)}
    assert all(getattr(names, name) is not None for name in names.__all__)


@pytest.mark.slow
@pytest.mark.parametrize("source", [str(ROOT), f"git+file://{ROOT}"], ids=["folder", "git"])
def test_what_pip_installs_runs_in_any_folder(tmp_path, source):
    """Dependencies are those of this environment; no network is needed. What is not committed, git does not give."""
    if source.startswith("git") and not (ROOT / ".git").exists():
        pytest.skip("this copy is no clone")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    packages = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    (packages / "dependencies.pth").write_text(str(Path(pytest.__file__).parents[1]))
    python = tmp_path / "venv" / "bin" / "python"
    options = ["--no-deps", "--no-build-isolation", "--ignore-installed", "--quiet"]
    install = [sys.executable, "-m", "pip", "--python", python, "install", *options, source]
    subprocess.run(install, check=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(script, *arguments):
        command = [python.with_name(script), *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    for script in SCRIPTS:
        done = run(script, "--help")
        assert done.returncode == 0, done.stderr
        assert "Options:" in done.stdout
    done = run("streamjax-stream", "--input=builtin")
    assert done.returncode == 1
    assert done.stderr.startswith("error: --model is missing, and this installation has none of its own: give --model=")
    assert done.stderr.count("\n") == 1
    done = run("streamjax-train", "--config=configs/tiny.py", "--workdir=w")
    assert done.returncode == 2
    assert done.stderr.startswith("error: no file configs/tiny.py; write a Python file with get_config()")


@pytest.mark.slow
def test_pip_from_git_brings_all_that_it_needs(tmp_path):
    """A fresh environment that sees no other: dependencies come from the package index. Git gives what is committed."""
    if not (ROOT / ".git").exists():
        pytest.skip("this copy is no clone")
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "XLA_FLAGS")}

    def run(*command):
        return subprocess.run([*command], env=environment, cwd=tmp_path, capture_output=True, text=True)

    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    asked = run(*pip, "--dry-run", "--retries=0", "jax")
    if asked.returncode:
        pytest.skip(f"no package index here: {asked.stderr.strip().splitlines()[-1]}")
    installed = run(*pip, f"git+file://{ROOT}")
    assert installed.returncode == 0, installed.stderr
    code = "import importlib.metadata as m, streamjax as s; print(s.__file__, m.metadata('streamjax')['Project-URL'])"
    shown = run(python, "-c", code)
    assert shown.stdout.startswith(str(tmp_path)), shown.stderr
    assert shown.stdout.endswith(f"Repository, {stated()}\n")
    (tmp_path / "text.txt").write_text("def main():\n    return 1\n" * 40)
    options = ["--input=text.txt", "--cache=streaming_llm:window=60", "--json=out.json", "--png=out.png"]
    done = run(python.with_name("streamjax-perplexity"), f"--model={ROOT / 'models' / 'stdlib_byte'}", *options)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out.json").read_text())
