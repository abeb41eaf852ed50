"""`python -m train.projections`: a file that the cache reads, errors of one line."""

import streamjax as sj
from streamjax.commands import perplexity
from streamjax.commands.cache_training import projections
from tests.commands.test_find_heads import folder, run  # noqa: F401


def test_the_cache_reads_what_the_command_writes(run, folder, tmp_path):  # noqa: F811
    file = tmp_path / "new" / "projections.safetensors"
    small = ("--steps=2", "--seq_len=32", "--max_tokens=200", "--levels=2", "--search_tokens=32", "--share=0.75")
    status, out, err = run(f"--output={file}", *small, command=projections)
    assert status == 0, err
    assert "step 2 of 2: loss " in out
    assert "heads keep 0.750 of their channels" in out
    cache = f"matryoshka_kv:projections={file},window=4,capacity=64"
    sj.init_state(sj.load(folder / "plain"), sj.kv.preset("matryoshka_kv", projections=file))
    status, _, err = run(f"--cache={cache}", "--max_tokens=40", model="deeper", command=perplexity)
    assert status == 1
    assert "error: what this cache knows was measured with model" in err
    for flags, message in (
        (("--distilled=2",), "ProjectionConfig.distilled is 2.0"),
        (("--max_tokens=20",), "a text of 20 tokens has no stretches of 224"),
    ):
        status, _, err = run(*flags, f"--output={tmp_path}/x", "--steps=1", command=projections)
        assert status in (1, 2)
        assert message in err.strip().splitlines()[-1]
