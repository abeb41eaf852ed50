"""The notebooks beside the quickstart, each executed in its small setting by a kernel of its own."""

import base64
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import nbclient
import nbformat
import pytest

from docs.address import stated

FOLDER = Path(__file__).parents[2] / "colab"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code(name: str) -> list[nbformat.NotebookNode]:
    return [cell for cell in read(name).cells if cell.cell_type == "code"]


def run(name: str, monkeypatch: pytest.MonkeyPatch, text: Path) -> str:
    """What the notebook prints; it must draw one picture, and no cell may fail."""
    monkeypatch.setenv("STREAMJAX_SMALL", "1")
    monkeypatch.setenv("STREAMJAX_TEXT", str(text))
    # One device, as on a small machine: the suite's eight would only cost time.
    flags = os.environ.get("XLA_FLAGS", "").replace("--xla_force_host_platform_device_count=8", "")
    monkeypatch.setenv("XLA_FLAGS", flags)
    client = nbclient.NotebookClient(read(name), timeout=600, resources={"metadata": {"path": str(FOLDER)}})
    outputs = [out for cell in client.execute().cells if cell.cell_type == "code" for out in cell.outputs]
    assert not [out for out in outputs if out.output_type == "error"]
    pictures = [out.data["image/png"] for out in outputs if "image/png" in out.get("data", {})]
    assert len(pictures) == 1
    assert base64.b64decode(pictures[0]).startswith(b"\x89PNG")
    return "".join(out.text for out in outputs if out.output_type == "stream" and out.name == "stdout")


@pytest.fixture(scope="module")
def text_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("It was the best of times, it was the worst of times. " * 500)
    return path


@pytest.mark.quick
@pytest.mark.parametrize("name", NAMES)
def test_is_kept_without_outputs(name):
    assert len(code(name)) >= 4
    assert all(not cell.outputs and cell.execution_count is None for cell in code(name))


@pytest.mark.quick
@pytest.mark.parametrize("name", NAMES)
def test_begins_by_installing_and_says_what_it_computes_with(name):
    first = code(name)[0].source
    assert first == code("quickstart")[0].source
    assert "jax.devices()[0].device_kind" in first.splitlines()[-1]


@pytest.mark.quick
@pytest.mark.parametrize("found", [0, 128])
def test_outside_a_clone_the_stated_address_is_installed(found, monkeypatch, tmp_path):
    """`found` is git's answer; 128: nothing is there. No line of a cell behind installing is run."""
    cell, _, _ = code("quickstart")[0].source.partition("\nimport jax\n")
    ran = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("STREAMJAX_SOURCE", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(subprocess, "run", lambda command, **_: ran.append(command) or SimpleNamespace(returncode=found))
    if found:
        with pytest.raises(SystemExit, match=rf"^Nothing to clone at {re.escape(stated())}: set SOURCE above to the"):
            exec(cell, {})
    else:
        exec(cell, {})
        assert str(tmp_path / "streamjax_repository") in ran.pop()
    clone = ran.pop()
    assert clone[:2] == ["git", "clone"]
    assert clone[-2:] == [stated(), str(tmp_path / "streamjax_repository")]
    assert not ran


@pytest.mark.slow
def test_train_long(monkeypatch, text_file):
    printed = run("train_long", monkeypatch, text_file)
    assert re.search(r"^JAX [\d.]+\S* on cpu: 1 x cpu$", printed, re.MULTILINE)
    rows = {name: re.search(rf"^{name} +([\d.,]+) +([\d.,]+)$", printed, re.MULTILINE) for name in ("full", "layer")}
    assert float(rows["layer"][2].replace(",", "")) < float(rows["full"][2].replace(",", ""))
    assert float(re.search(r"largest difference: (\S+) nats", printed)[1]) < 1e-4
    assert re.search(r"^trained on 1,024 tokens at once: \d+\.\d+ \d+\.\d+ nats a byte$", printed, re.MULTILINE)


@pytest.mark.slow
def test_recall(monkeypatch, text_file):
    printed = run("recall", monkeypatch, text_file)
    assert re.search(r"^hsa +1,024 tokens: 2 of 2, [\d,]+ tokens/s, a stream's state is \S+ MB$", printed, re.MULTILINE)
    assert re.search(r"^sinks \+ window +1,024 tokens: \d of 2", printed, re.MULTILINE)


@pytest.mark.slow
def test_fixed_state(monkeypatch, text_file):
    printed = run("fixed_state", monkeypatch, text_file)
    sizes = re.findall(r"^ *([\d,]+) tokens: a state of (.+), keys and values (.+)$", printed, re.MULTILINE)
    assert len(sizes) == 3
    assert len({size for _, size, _ in sizes}) == 1
    assert len({keys for _, _, keys in sizes}) == 3
    for name, length, right in (("Mamba-2", "1,024", 2), ("Mamba-2", "4,096", 0)):
        assert re.search(rf"^{name} +{length} tokens: {right} of 2, a stream holds ", printed, re.MULTILINE)
    for length in ("1,024", "4,096"):
        assert re.search(rf"^Mamba-2 and HSA +{length} tokens: 2 of 2, a stream holds ", printed, re.MULTILINE)


@pytest.mark.slow
def test_new_cache(monkeypatch, text_file):
    printed = run("new_cache", monkeypatch, text_file)
    assert "the same tokens are stored however the stream is cut" in printed
    assert len(re.findall(r"^(window|sinks \+ window|yours) +perplexity [\d.]+ behind token 512", printed, re.M)) == 3
