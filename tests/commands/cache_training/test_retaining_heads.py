"""`python -m train.retaining_heads`: a file that the cache reads, errors of one line."""

import pytest

import streamjax as sj
from streamjax.commands import perplexity
from streamjax.commands.cache_training import retaining_heads
from tests.commands.test_find_heads import folder, run  # noqa: F401


@pytest.mark.parametrize("tasks", ["both", pytest.param("text", marks=pytest.mark.slow)])
def test_the_cache_reads_what_the_command_writes(run, folder, tmp_path, tasks):  # noqa: F811
    file = tmp_path / "new" / "retaining.safetensors"
    small = ("--steps=2", "--width=4", "--seq_len=224", "--max_tokens=600")
    status, out, err = run(f"--tasks={tasks}", f"--output={file}", *small, command=retaining_heads)
    assert status == 0, err
    assert "step 2 of 2: loss " in out
    assert f"use them: --cache=locret:retaining={file}" in out
    cache = f"locret:retaining={file},window=4,size=12,every=4"
    sj.init_state(sj.load(folder / "plain"), sj.kv.preset("locret", retaining=file))
    status, _, err = run(f"--cache={cache}", "--max_tokens=40", model="deeper", command=perplexity)
    assert status == 1
    assert "error: what this cache knows was measured with model" in err


def test_nonsense_is_one_line(run, tmp_path):  # noqa: F811
    for flags, message in (
        (("--tasks=poems",), "value should be one of <both|text|recall>"),
        (("--width=0",), "RetainingConfig.width is 0"),
        (("--tasks=text", "--max_tokens=20"), "a text of 20 tokens has no stretches of 224 with 28 that ask"),
        ((f"--input={tmp_path}/none.txt",), "none.txt"),
    ):
        status, _, err = run(*flags, f"--output={tmp_path}/x", "--steps=1", command=retaining_heads)
        assert status in (1, 2)
        assert message in err.strip().splitlines()[-1]
