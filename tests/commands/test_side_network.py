"""`python -m train.side_network`: a file that other commands read, errors of one line."""

import pytest

from streamjax.commands import perplexity
from streamjax.commands.trained_parts import side_network
from tests.commands.test_find_heads import folder, run  # noqa: F401

CACHE = "--cache=long_mem:sinks=2,window=8,page=2,capacity=32,top_k=2"


def trained(run, tmp_path) -> tuple[str, ...]:  # noqa: F811
    """Flags with which a model reads what the command has written."""
    file = tmp_path / "new" / "side.safetensors"
    small = ("--steps=2", "--seq_len=16", "--batch_size=2", "--max_tokens=128")
    status, out, err = run(f"--output={file}", *small, CACHE, command=side_network)
    assert status == 0, err
    assert "step 2 of 2: " in out
    assert "the model without it: " in out
    assert f"use it: --side_network={file} {CACHE}" in out
    return f"--side_network={file}", CACHE, "--max_tokens=40", f"--json={tmp_path}/x.json", "--png="


@pytest.mark.slow
def test_a_model_reads_with_what_the_command_writes(run, tmp_path):  # noqa: F811
    status, _, err = run(*trained(run, tmp_path), command=perplexity)
    assert status == 0, err


def test_what_the_command_writes_belongs_to_its_model(run, tmp_path):  # noqa: F811
    status, _, err = run(*trained(run, tmp_path), model="deeper", command=perplexity)
    assert status == 1
    assert "no side network could be read: it belongs to model" in err.strip().splitlines()[-1]


def test_nonsense_is_one_line(run, tmp_path):  # noqa: F811
    for flags, message in (
        (("--cache=dense",), "--cache=dense remembers nothing for a side network: use long_mem"),
        (("--reduction=3",), "reduction is 3: the model has 2 layers"),
        (("--layer=5",), "SideConfig.layer is 5: the last that can be remembered is 1"),
        (("--max_tokens=20",), "a text of 20 tokens has no 8 parts of 256"),
    ):
        status, _, err = run(*flags, f"--output={tmp_path}/x", "--steps=1", command=side_network)
        assert status in (1, 2)
        assert message in err.strip().splitlines()[-1]
