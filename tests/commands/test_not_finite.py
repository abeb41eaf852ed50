"""A damaged model in every command: one line on stderr, a status, and no file with a number that is none."""

import jax.numpy as jnp
import pytest

import streamjax as sj
from streamjax.commands import chat, demo, perplexity, recall, stream


@pytest.fixture(scope="module")
def damaged_folder(model_folder, tmp_path_factory):
    model = sj.load(model_folder)
    down = model.layers[0].mlp.down
    down[...] = down[...].at[0, 0].set(jnp.nan)
    folder = tmp_path_factory.mktemp("damaged") / "tiny"
    sj.save_hf(model, folder)
    return folder


@pytest.mark.usual("stream", "chat")
@pytest.mark.parametrize("name", ["stream", "chat", "perplexity", "recall", "demo"])
def test_a_nan_in_the_weights_is_told_in_one_line(command, damaged_folder, text_file, tmp_path, name):
    out = tmp_path / "out"
    files = [f"--json={out}/a.json", f"--png={out}/a.png"]
    module, arguments = {
        "stream": (
            stream,
            [f"--input={text_file}", files[0], f"--save_state={out}/s", "--chunk_size=64"],
        ),
        "chat": (chat, ["--max_new_tokens=4", f"--save_state={out}/s"]),
        "perplexity": (perplexity, [f"--input={text_file}", *files]),
        "recall": (
            recall,
            ["--lengths=200", "--depths=1", "--samples=1", *files],
        ),
        "demo": (demo, ["--tokens=600", "--pretrained=", f"--out={out}"]),
    }[name]
    done = command(module, *arguments, stdin="hello\n", model=damaged_folder)
    assert done.status == 1
    lines = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "logits are not finite; first in layer 0 of 1 (counted from 0), where mlp.down has 1 of" in lines[0]
    assert "Traceback" not in done.err
    assert not out.exists()
