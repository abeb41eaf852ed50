"""The notebook, executed in a small setting by a kernel of its own."""

import base64
import re
from pathlib import Path

import jax
import nbclient
import nbformat
import pytest

import streamjax as sj

NOTEBOOK = Path(__file__).parents[2] / "colab" / "quickstart.ipynb"


@pytest.fixture(scope="module")
def notebook() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def test_is_kept_without_outputs(notebook):
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) >= 6
    assert all(not cell.outputs and cell.execution_count is None for cell in code)


def test_runs_from_top_to_bottom(notebook, tmp_path, monkeypatch):
    config = sj.UniformConfig(
        vocab_size=259,
        d_model=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        mlp_dim=16,
        max_position=64,
        bos_token_id=256,
        eos_token_ids=(257,),
    )
    sj.save_hf(sj.Decoder(config, jax.random.key(0)), tmp_path / "tiny")
    (tmp_path / "text.txt").write_text("It was the best of times, it was the worst of times. " * 50)
    monkeypatch.setenv("STREAMJAX_MODEL", str(tmp_path / "tiny"))
    monkeypatch.setenv("STREAMJAX_TEXT", str(tmp_path / "text.txt"))
    monkeypatch.setenv("STREAMJAX_TOKENS", "2500")
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(NOTEBOOK.parent)}})
    executed = client.execute()
    outputs = [output for cell in executed.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert "tiny, 0.0M parameters" in text
    assert "trained on 64 tokens at once; reads 2,500, 39 times as many" in text
    assert re.search(r"^dense: [\d,]+ tokens/s full at 512 tokens$", text, re.MULTILINE)
    rows = {name: re.search(rf"^{re.escape(name)} +([\d.]+) +([\d.]+) +(.*)$", text, re.MULTILINE) for name in
            ("dense", "window", "sinks + window")}  # fmt: skip
    # A model with random weights guesses: its perplexity is about the vocabulary's size, wherever it is.
    assert all(100 < float(value) < 600 for row in rows.values() for value in row.groups()[:2])
    assert rows["dense"][3].split("  ")[0] != rows["window"][3].split("  ")[0]
    assert re.search(r"the window alone has [\d.]+ times the perplexity of sinks \+ window: it (collapses|does)", text)
    assert "[2,701 tokens seen" in text
    pictures = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 1
    assert base64.b64decode(pictures[0]).startswith(b"\x89PNG")
    assert not [output for output in outputs if output.output_type == "error"]
