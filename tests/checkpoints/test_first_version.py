"""Files that the first version wrote (commit d631068, 22 November 2026): models, streams, a session and adapters go on.

`first_version.zip` has them, and in said.json what that version computed behind them: nats of the tokens that follow
each stream's first 60, in float32 on a CPU, and the text of the session. The model has two layers and random weights.
"""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

import streamjax as sj
from streamjax.data import ByteTokenizer

CACHES = {
    "dense": {"capacity": 128},
    "window": {"window": 24},
    "streaming_llm": {"sinks": 2, "window": 22},
    "quest": {"sinks": 2, "window": 14, "capacity": 48, "page": 8, "top_k": 2},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("first_version")
    with zipfile.ZipFile(Path(__file__).parent / "first_version.zip") as files:
        files.extractall(path)
    return path


@pytest.fixture(scope="module")
def said(folder):
    return json.loads((folder / "said.json").read_text())


@pytest.fixture(scope="module")
def model(folder):
    return sj.load(folder / "native")


def nats(model, state, tokens):
    return np.asarray(sj.score(model, state, np.array(tokens))[1])


@pytest.mark.parametrize("kind", ["native", "hf", "orbax"])
def test_a_model_is_the_same(folder, said, kind):
    loaded, text = sj.load(folder / kind), np.array(said["text"])
    state = sj.read(loaded, sj.init_state(loaded, sj.kv.preset("dense", capacity=128), 2), text[:, :60])
    found = nats(loaded, state, text[:, 60:])
    np.testing.assert_allclose(found, said["nats"]["dense"], atol=1e-5)


@pytest.mark.parametrize("name", CACHES)
def test_a_stream_goes_on(folder, model, said, name):
    empty = sj.init_state(model, sj.kv.preset(name, **CACHES[name]), 2)
    state = sj.load_stream(folder / f"stream_{name}", empty)
    assert state.seen.tolist() == [60, 60]
    np.testing.assert_allclose(nats(model, state, np.array(said["text"])[:, 60:]), said["nats"][name], atol=1e-5)


def test_a_session_goes_on(folder, model, said):
    session = sj.Session(model, ByteTokenizer(), sj.kv.preset("streaming_llm", sinks=2, window=22))
    assert session.load(folder / "session") == {"note": "kept"}
    assert session.tokens_seen == 1 + len("It was the best of times, ")
    assert "".join(session.generate(max_new_tokens=12)) == said["session"]


def test_adapters_are_read(folder, model, said):
    adapted = sj.load_lora(model, folder / "adapters")
    found = nats(adapted, sj.init_state(adapted, sj.kv.preset("dense", capacity=128), 2), said["text"])
    np.testing.assert_allclose(found, said["adapters"], atol=1e-5)
    plain = nats(model, sj.init_state(model, sj.kv.preset("dense", capacity=128), 2), said["text"])
    assert np.abs(plain - found).max() > 1e-3
