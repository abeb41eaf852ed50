"""Hundreds of saves: a process that saves and loads its stream again and again holds what it held."""

import os
from pathlib import Path

import pytest

import streamjax as sj
from streamjax.evaluation import resident_bytes
from streamjax.streaming.saving.saved_streams import load_stream, save_stream
from tests.streaming.tiny_models import GQA, build, random_tokens


@pytest.mark.slow
def test_hundreds_of_saves_leave_nothing_behind(tmp_path):
    model = build(GQA.replace(num_layers=1))
    cache = sj.kv.preset("quest", sinks=2, window=30, capacity=64, page=8, top_k=3)
    state = sj.read(model, sj.init_state(model, cache), random_tokens(1, 100), 32)
    folder, descriptors = tmp_path / "stream", Path("/proc/self/fd")
    for n in range(200):
        save_stream(state, folder)
        state = load_stream(folder, sj.init_state(model, cache))
        if n == 20:
            before, files = resident_bytes(), sorted(x.name for x in tmp_path.rglob("*"))
            handles = len(os.listdir(descriptors)) if descriptors.exists() else 0
    assert sorted(x.name for x in tmp_path.rglob("*")) == files
    assert resident_bytes() - before < 20e6
    if descriptors.exists():
        assert len(os.listdir(descriptors)) <= handles + 2
