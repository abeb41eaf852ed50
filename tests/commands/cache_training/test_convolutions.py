"""`python -m train.convolutions`: a file that the cache reads, errors of one line."""

import pytest

import streamjax as sj
from streamjax.commands.cache_training import convolutions
from tests.commands.test_find_heads import folder, run  # noqa: F401

SMALL = ("--slots=2", "--width=3", "--window=4", "--size=6", "--every=8", "--seq_len=28", "--max_tokens=200")


@pytest.mark.slow
def test_the_cache_reads_what_the_command_writes(run, folder, tmp_path):  # noqa: F811
    """Slow to compile: a gradient through a stream and its merges."""
    file = tmp_path / "new" / "kernels.safetensors"
    status, out, err = run(f"--output={file}", "--steps=2", *SMALL, command=convolutions)
    assert status == 0, err
    assert "step 2 of 2: loss " in out
    assert f"use them: --cache=lococo:kernels={file},window=4,size=6,every=8" in out
    caches = sj.kv.preset("lococo", kernels=file, window=4, size=6, every=8)
    sj.init_state(sj.load(folder / "plain"), caches)


def test_without_steps_it_writes_the_first_weights(run, folder, tmp_path):  # noqa: F811
    file = tmp_path / "kernels.safetensors"
    status, _, err = run(f"--output={file}", "--steps=0", *SMALL, command=convolutions)
    assert status == 0, err
    caches = sj.kv.preset("lococo", kernels=file, window=4, size=6, every=8)
    sj.init_state(sj.load(folder / "plain"), caches)
    assert caches[0].tiers[1].merge.kernels.blend == 0.5


def test_nonsense_is_one_line(run, tmp_path):  # noqa: F811
    for flags, message in (
        (("--width=4",), "ConvolutionConfig.width is 4: it must be odd"),
        (("--seq_len=24",), "--seq_len=24: the cache holds 24 tokens"),
        (("--max_tokens=20",), "a text of 20 tokens has no stretches of 28"),
    ):
        status, _, err = run(*SMALL, *flags, f"--output={tmp_path}/x", "--steps=1", command=convolutions)
        assert status in (1, 2)
        assert message in err.strip().splitlines()[-1]
