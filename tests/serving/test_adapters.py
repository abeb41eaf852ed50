"""Requests that name adapters, side by side: each gets what the model with its adapter gives alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import streamjax as sj
from streamjax.models.lora.attaching import add_lora
from tests.serving.engines import CACHE, bytes_model, engine, request, served, tokens

WORDS = "Once upon a time, there was one"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two adapters of different ranks and targets, as PEFT has them."""
    found = {}
    for seed, (name, rank, targets) in enumerate([("poet", 2, ("q", "v", "down")), ("cook", 3, ("k", "o", "up"))]):
        model, draw = add_lora(bytes_model(), rank, 4.0, targets, jax.random.key(seed)), np.random.default_rng(seed)
        for block in model.layers:
            for target in targets:
                module = block.mlp if target in ("up", "down") else block.mixer.projections
                adapter = getattr(module, f"{target}_lora")
                adapter.b = adapter.b.replace(jnp.asarray(draw.normal(size=adapter.b.shape).astype(np.float32)))
        found[name] = tmp_path_factory.mktemp(name) / name
        sj.save_lora(model, found[name])
    return found


@functools.cache
def alone(folder, prompt: str, count: int) -> list[int]:
    model = bytes_model() if folder is None else sj.load_lora(bytes_model(), folder)
    ids, sampler = [256, *prompt.encode()], sj.Sampler(temperature=0)
    options = {"max_new_tokens": count, "sampler": sampler, "chunk_size": 8}
    return sj.generate(model, sj.init_state(model, CACHE), [ids], **options)[1][0].tolist()


DENSE = {"cache": sj.kv.preset("dense", capacity=64), "policy": "mlfq"}


@pytest.mark.parametrize("options", [{}, pytest.param(DENSE, marks=pytest.mark.slow)])
def test_rows_have_their_own_adapters(folders, options):
    one = engine(adapters=folders, prefix_bytes=1 << 20, **options)
    names = ["poet", None, "cook", "poet", "cook", None, "poet"]
    wanted = [request(WORDS + "abcdefg"[i], 5, adapter=name) for i, name in enumerate(names)]
    found = served(one, *wanted)
    if not options:
        for i in (0, 1, 3):
            assert tokens(found[i]) == alone(folders.get(names[i]), WORDS + "abcdefg"[i], 5)
    # prefixes that another adapter has read are others
    cached = [events[-1].usage.cached_tokens for events in found]
    assert cached[0] == cached[1] == cached[2] == 0
    assert min(cached[3:]) >= 32
    if options:
        whole = [tokens(served(engine(adapters=folders, **options), one)[0]) for one in wanted[:3]]
        assert [tokens(events) for events in found[:3]] == whole


def test_a_conversation_stays_with_its_adapter(folders, tmp_path):
    one = engine(adapters=folders, state_dir=tmp_path)
    first = served(one, request("tell me", 4, adapter="poet", conversation="ann"))[0]
    assert tokens(first) == alone(folders["poet"], "tell me", 4)
    one.close()
    again = engine(adapters=folders, state_dir=tmp_path)
    with pytest.raises(ValueError, match="conversation 'ann' began with adapter 'poet', and cannot go on with another"):
        again.submit(request([1], 4, conversation="ann"))
    events = served(again, request([1], 4, adapter="poet", conversation="ann"))[0]
    assert events[-1].usage.cached_tokens == 8 + 4
    again.close()


def test_adapters_that_are_not_there(folders, tmp_path):
    with pytest.raises(ValueError, match="unknown adapter 'dog': there are cook, poet"):
        engine(adapters=folders).submit(request("a", adapter="dog"))
    with pytest.raises(ValueError, match="nothing"):
        engine(adapters={"x": tmp_path / "nothing"})
