"""Learned sink logits in streams of every kind of cache: the oracle has the sink in each of its softmaxes."""

import jax.numpy as jnp
import numpy as np
import pytest

import streamjax as sj
from streamjax.kv.pages.disk_files import PageFiles
from streamjax.streaming.rekv import StreamWriter, ask
from tests.oracles import streaming_llm as oracle
from tests.streaming.tiny_models import GQA, build, random_tokens, read_stream, with_sink_logits

LENGTH, SINKS, WINDOW = 28, 3, 8
MIXED = with_sink_logits(GQA.replace(windows=(5, None), local_rope=sj.RopeConfig(theta=20.0)))
FEW = {"sinks": 2, "window": 3, "capacity": 32, "page": 4, "top_k": 9}
HEADS = {"sinks": 2, "recent": 3, "capacity": 40, "full": 1.0}
CLUSTERS = {"sinks": 1, "window": 3, "segment": 7, "size": 3, "most": 4, "iterations": 2, "block": 7}
READS_ALL = {
    "dense": {"capacity": LENGTH},
    "quest": FEW,
    "hip": {**FEW, "block": 3},
    "inf_llm": {**FEW, "top_k": 8, "representatives": 2, "block": 3, "true_distance": True},
    "dhsa": {**FEW, "capacity": 96, "top_k": 24, "least": 2, "context": 2, "threshold": 0.3},
    "sentence_kv": {**FEW, "capacity": 96, "top_k": 24, "least": 2, "ends": (3, 7, 11)},
    "retro_infer": {**CLUSTERS, "capacity": 28, "retrieve": 16, "estimate": 0},
    "duo_attention": HEADS,
    "razor_attention": HEADS,
    "lserve": {**HEADS, "capacity": 32, "page": 4, "logical": 2, "top_k": 9},
}
QUICK = ("dense", "inf_llm", "duo_attention")
DROPS = {
    "streaming_llm": (sj.kv.preset("streaming_llm", sinks=SINKS, window=WINDOW), oracle.Rule(SINKS, WINDOW)),
    "unfused": (
        sj.kv.Cascade(sj.kv.Sink(SINKS), sj.kv.Window(WINDOW), fuse=False),
        oracle.Rule(SINKS, WINDOW),
    ),
    "window": (sj.kv.preset("window", window=WINDOW), oracle.Rule(0, WINDOW)),
}


@pytest.fixture(scope="module")
def mixed():
    """A model with a window in one layer, tokens, and what the oracle makes of them by a rule."""
    model, tokens, runs = build(MIXED), random_tokens(1, LENGTH), {}

    def expected(rule):
        if rule not in runs:
            runs[rule] = oracle.run(model, tokens[0], rule)
        return runs[rule]

    return model, tokens, expected


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in READS_ALL]
)
def test_caches_that_read_everything(tmp_path, mixed, name):
    model, tokens, expected = mixed
    options = dict(READS_ALL[name])
    if "recent" in options:
        np.savetxt(tmp_path / "gates.tsv", [[0.1, 0.4], [0.7, 0.9]], delimiter="\t")
        options["heads"] = str(tmp_path / "gates.tsv")
    _, found = read_stream(model, sj.init_state(model, sj.kv.preset(name, **options)), tokens, [7])
    np.testing.assert_allclose(found[0], expected(oracle.DENSE), atol=1e-4, rtol=0)


@pytest.mark.usual("streaming_llm")
@pytest.mark.parametrize("name", [*DROPS])
def test_caches_that_drop(mixed, name):
    model, tokens, expected = mixed
    cache, rule = DROPS[name]
    _, found = read_stream(model, sj.init_state(model, cache), tokens, [14])
    np.testing.assert_allclose(found[0], expected(rule), atol=1e-4, rtol=0)


def test_the_comparison_would_notice(mixed):
    """A sink of the other sign, a head without one, and a model without any: each moves logits by over 1e-2."""
    model, tokens, expected = mixed
    logits = model.layer(1).mixer.sink_logits
    drawn, found = logits[...], []
    for wrong in (-drawn, drawn.at[2].set(-jnp.inf), jnp.full_like(drawn, -jnp.inf)):
        logits[...] = wrong
        found.append(oracle.run(model, tokens[0], oracle.DENSE))
    logits[...] = drawn
    assert all(np.abs(other - expected(oracle.DENSE)).max() > 1e-2 for other in found)


@pytest.mark.slow
def test_pages_on_disk(tmp_path):
    """A question behind every page of a stream is answered as by dense attention."""
    model, tokens = build(with_sink_logits(GQA)), random_tokens(1, 26)
    with StreamWriter(model, tmp_path / "pages", window=64, page=4, chunk_size=8) as writer:
        writer.read(tokens[0, :20])
    state = ask(model, PageFiles(tmp_path / "pages"), tokens[0, 20:23], top_k=99)
    _, logits = sj.step(model, state, tokens[:, 23:])
    np.testing.assert_allclose(logits[0], oracle.run(model, tokens[0], oracle.DENSE)[23:], atol=1e-4, rtol=0)
