"""`sj.kv.describe`: bytes by layer and part are those of the arrays that a stream allocates, under every preset."""

import jax
import jax.numpy as jnp
import pytest

import streamjax as sj
from tests.streaming.tiny_models import GQA, LOCAL, build


@pytest.fixture(scope="module")
def model():
    return build(GQA)


UNMEASURED = ("cake", "prefix_kv", "zipvl", "locret", "cq", "matryoshka_kv", "lococo")  # a file says
LAID_OUT = ("minicache", "xkv")  # with which no stream begins: tests/streaming/compacting/test_compact_across.py


@pytest.mark.parametrize("name", [name for name in sj.kv.presets() if name not in ("hsa", *UNMEASURED, *LAID_OUT)])
def test_every_presets_bytes_are_those_that_live(model, name, tmp_path):
    gates = tmp_path / "gates.json"
    gates.write_text('{"gates": [[0.9, 0.1], [0.2, 0.8]]}')
    options = {"heads": str(gates)} if "heads" in sj.kv.presets()[name].options else {}
    cache = sj.kv.preset(name, **options)
    found = sj.kv.describe(cache, model, jnp.bfloat16)
    others = jax.live_arrays()  # which stay, and so no other array can have an id of theirs
    before = set(map(id, others))
    state = jax.block_until_ready(sj.init_state(model, cache, dtype=jnp.bfloat16))
    assert found.total == sum(x.nbytes for x in jax.live_arrays() if id(x) not in before) == state.cache_bytes
    for part in found.parts[:-1]:
        assert part.tokens
        assert part.content
        for layer in part.layers:
            own = jax.tree.leaves(state.layers[layer])
            assert sum(p.bytes for p in found.parts if layer in p.layers) == sum(x.nbytes for x in own)


@pytest.mark.quick
def test_the_table_has_a_line_for_each_kind_of_layer():
    found = sj.kv.describe(sj.kv.preset("h2o", window=4, size=6, every=4), build(LOCAL))
    window, near, kept, own = found.parts
    assert (window.layers, window.part, window.tokens) == ((0,), "Window(4)", 4)
    assert (near.layers, kept.layers, own.layers) == ((1,), (1,), ())
    assert kept.content == 2 * 2 * 6 * 4 * 10  # keys and values, two heads of 6 channels, float32, 6 + 4 slots
    assert kept.bytes_per_token == kept.bytes / 10
    table = str(found).splitlines()
    assert len(table) == 6
    assert " ".join(table[0].split()) == "layers part tokens keys and values beside them bytes bytes a token"
    assert table[3].startswith("1       Scored(6 by H2O(), every 4)")
    assert table[-1].startswith(f"{found.total:,} bytes a stream in all")
