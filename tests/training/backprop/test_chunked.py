"""Both orders of chunked backprop against the whole sequence at once: attention patterns, and drawn combinations."""

import jax
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.covering import rest_slow
from tests.training.gradient_checks import CONFIG, ORDERS, TOLERANCE, check

WINDOWS = CONFIG.replace(num_layers=3, windows=(3, 11, 50))  # less than a chunk, more, and more than the sequence
TWO_WINDOWS = WINDOWS.replace(num_layers=2, windows=(3, 11), sinks=2)
SINKS = CONFIG.replace(windows=(4, None), sinks=10, num_kv_heads=1)  # of several chunks, and beyond a block


@pytest.fixture(autouse=True)
def always_small_blocks(small_blocks):
    pass


@pytest.mark.usual("sinks-packed")
@pytest.mark.parametrize(
    ("config", "length", "chunk_size", "packed", "orders"),
    [
        pytest.param(WINDOWS, 24, 8, False, ORDERS, id="windows"),
        pytest.param(WINDOWS, 19, 4, True, ORDERS, id="windows-packed"),
        pytest.param(WINDOWS.replace(sinks=2, attention_softcap=1.5), 21, 10, False, ORDERS, id="sinks-capped"),
        pytest.param(TWO_WINDOWS, 23, 5, True, ("chunk",), id="sinks-packed"),  # "layer": test_chunked_cuts.py
        pytest.param(TWO_WINDOWS, 23, 5, True, ("layer",), id="sinks-packed-layer"),
        pytest.param(SINKS, 45, 4, False, ORDERS, id="many-sinks-mqa"),
    ],
)
def test_patterns(config, length, chunk_size, packed, orders):
    check(config, length, chunk_size=chunk_size, packed=packed, orders=orders)


@pytest.mark.parametrize(
    ("length", "chunk_size", "packed", "orders", "sizes"),
    [
        (24, 8, False, ("chunk",), (3, 11)),
        pytest.param(24, 8, False, ("chunk",), (3, 11, 50), marks=pytest.mark.slow),
        pytest.param(19, 4, True, ORDERS, (3, 11, 50), marks=pytest.mark.slow),
    ],
)
def test_attention_within_chunks(length, chunk_size, packed, orders, sizes):
    """Attention chunks shorter than those of backprop, longer, and longer than the sequence."""
    config = WINDOWS.replace(num_layers=len(sizes), windows=()).expand()
    blocks = [block.with_mixer(chunk=size) for block, size in zip(config.blocks, sizes, strict=True)]
    check(config.replace(blocks=tuple(blocks)), length, chunk_size=chunk_size, packed=packed, orders=orders)


@pytest.mark.slow
def test_one_token():
    check(CONFIG.replace(windows=(5, None)), 1, rows=1, chunk_size=1)


@pytest.mark.slow
@pytest.mark.parametrize("order", rest_slow(ORDERS, "layer"))
def test_float32(order):
    config = CONFIG.replace(windows=(5, None), sinks=1, logit_softcap=4.0)
    check(config, 40, chunk_size=9, packed=True, dtype="float32", orders=(order,))


@pytest.mark.slow
def test_blocks_of_the_usual_size(monkeypatch):
    """A sequence longer than a block, in chunks longer than a block."""
    monkeypatch.undo()
    jax.clear_caches()
    check(CONFIG.replace(windows=(130, None), sinks=3), 1100, rows=1, chunk_size=550, packed=True)


@st.composite
def combinations(draw):
    """Arguments of `check`: any pattern, grouping of heads, position encoding, shape of a layer, and cut."""
    alibi, parallel = draw(st.booleans()), draw(st.booleans())
    shared, behind, normed = parallel and draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    layers = draw(st.integers(1, 3))
    windows = draw(st.lists(st.sampled_from([None, 1, 4, 9, 30]), min_size=1, max_size=2))
    config = CONFIG.replace(
        num_layers=layers,
        num_kv_heads=draw(st.sampled_from([1, 2, 4])),
        windows=tuple((windows * layers)[:layers]),
        sinks=draw(st.sampled_from([0, 1, 5])),
        attention_softcap=draw(st.sampled_from([None, 2.0])),
        logit_softcap=draw(st.sampled_from([None, 3.0])),
        logit_scale=draw(st.sampled_from([1.0, 0.5])),
        position="alibi" if alibi else "rope",
        alibi_slopes=(0.5, 0.25, 0.125, 0.0625) if alibi else (),
        parallel_residual=parallel,
        shared_norm=shared,
        residual_scale=draw(st.sampled_from([1.0, 0.3])),
        pre_norms=not behind or shared or draw(st.booleans()),
        post_norms=behind,
        qk_norm=normed,
        qk_norm_over=draw(st.sampled_from(["head", "projection"])) if normed else "head",
        qkv_bias=draw(st.booleans()),
        norm=draw(st.sampled_from(["rms", "layer"])),
        tie_embeddings=draw(st.booleans()),
    )
    length, order = draw(st.integers(1, 30)), draw(st.sampled_from(ORDERS))
    options = {"segment": draw(st.integers(1, 4))} if order == "layer" else {}
    return options | {
        "config": config,
        "length": length,
        "rows": draw(st.integers(1, 3)),
        "packed": draw(st.booleans()),
        "stacked": draw(st.booleans()),
        "dtype": draw(st.sampled_from(sorted(TOLERANCE))),
        "orders": (order,),
        "chunk_size": draw(st.integers(1, length)),
        "logits_chunk": draw(st.sampled_from([None, 1, 3])),
    }


# Each example compiles two programs: what fails is reported as it was drawn.
drawn = settings(phases=[Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.slow
@settings(drawn, max_examples=2)
@given(arguments=combinations())
def test_drawn(arguments):
    check(**arguments)


@pytest.mark.slow
@settings(drawn, max_examples=200)
@given(arguments=combinations())
def test_many_drawn(arguments):
    check(**arguments)
