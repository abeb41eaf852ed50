"""A damaged model in every command: one line on stderr, a status, and no file with a number that is none."""

import jax.numpy as jnp
import pytest

import streamjax as sj
from streamjax.commands import chat, demo, find_heads, leaderboard, measure_budget, perplexity, recall, stream
from streamjax.commands.cache_training import convolutions, projections, retaining_heads
from streamjax.commands.trained_parts import draft_heads, side_network
from tests.commands.test_find_heads import CONFIG
from tests.streaming.tiny_models import build


@pytest.fixture(scope="module")
def damaged_folder(model_folder, tmp_path_factory):
    return damaged(sj.load(model_folder), tmp_path_factory.mktemp("damaged") / "tiny")


def damaged(model, folder):
    """A folder of the model with a NaN in its first layer."""
    down = model.layers[0].mlp.down
    down[...] = down[...].at[0, 0].set(jnp.nan)
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


@pytest.fixture(scope="module")
def damaged_deep_folder(tmp_path_factory):
    return damaged(build(CONFIG), tmp_path_factory.mktemp("damaged") / "plain")


LONG_MEMORY = "--cache=long_mem:sinks=2,window=8,page=2,capacity=32,top_k=2"
LOCOCO = "--slots=2 --width=3 --window=4 --size=6 --every=8 --seq_len=28 --max_tokens=200"
BOARD = "--tasks=passkey --length=1100 --samples=1 --chunk_size=256 --cache=streaming_llm --budget=0.25"
MEASURING = {
    "leaderboard": (leaderboard, f"{BOARD} --answer_tokens=3 --text={{text}} --json={{out}}/a.json --png="),
    "gates": (find_heads, "--method=duo_attention --steps=2 --sinks=4 --recent=16"),
    "scores of heads": (find_heads, "--method=razor_attention"),
    "cake": (measure_budget, "--budget=cake --max_tokens=64"),
    "prefix_kv": (measure_budget, "--budget=prefix_kv --max_tokens=64"),
    "d2o": (measure_budget, "--budget=d2o --max_tokens=64"),
    "convolutions": (convolutions, f"--steps=2 {LOCOCO}"),
    "projections": (projections, "--steps=2 --seq_len=32 --max_tokens=200 --levels=2 --search_tokens=32"),
    "retaining heads": (retaining_heads, "--tasks=text --steps=2 --width=4 --seq_len=224 --max_tokens=600"),
    "hydra": (draft_heads, "--kind=hydra --steps=2 --heads=2 --width=4 --seq_len=40 --max_tokens=300"),
    "ppd": (draft_heads, "--kind=ppd --steps=2 --heads=2 --seq_len=40 --max_tokens=300"),
    "side network": (side_network, f"--steps=2 --seq_len=16 --max_tokens=128 {LONG_MEMORY}"),
}


@pytest.mark.usual("scores of heads", "prefix_kv")
@pytest.mark.parametrize("name", MEASURING)
def test_nothing_is_measured_of_a_damaged_model(command, damaged_deep_folder, tmp_path, name):
    """Also where what is measured of NaN is a number: a count of tokens before which a share lies."""
    out, text = tmp_path / "out", tmp_path / "long.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 60)
    module, arguments = MEASURING[name]
    flags = arguments.format(text=text, out=out).split()
    if name != "leaderboard":
        flags.append(f"--output={out}/file")
    done = command(module, *flags, model=damaged_deep_folder)
    assert done.status == 1
    lines = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "not finite" in lines[0]
    assert "first in layer 0 of 2 (counted from 0), where mlp.down has 1 of" in lines[0]
    assert "Traceback" not in done.err
    assert not out.exists()
