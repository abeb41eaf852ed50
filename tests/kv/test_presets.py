"""Named caches: what they build, and what they say when asked for something else."""

import pytest

import streamjax as sj
from streamjax.kv import Cascade, Full, Sink, Window


@pytest.mark.quick
def test_presets_are_the_cascades_of_their_papers():
    assert sj.kv.preset("dense", capacity=9) == Cascade(Full(9))
    assert sj.kv.preset("window", window=9) == Cascade(Window(9))
    assert sj.kv.preset("streaming_llm", sinks=3, window=9) == Cascade(Sink(3), Window(9))
    assert sj.kv.preset("streaming_llm").slots == 1024


@pytest.mark.quick
def test_every_preset_builds_and_names_its_paper(tmp_path):
    gates = tmp_path / "gates.json"
    gates.write_text('{"gates": [[0.9, 0.1], [0.2, 0.8]]}')
    for name, entry in sj.kv.presets().items():
        assert entry.name == name
        assert "arXiv" in entry.paper
        assert entry.summary.endswith((".", ";"))
        needed = {"heads": str(gates)} if "heads" in entry.options else {}
        assert sj.kv.preset(name, **{**entry.options, **needed}) == sj.kv.preset(name, **needed)


@pytest.mark.quick
def test_presets_are_described_in_one_word():
    assert sj.kv.parse_preset("streaming_llm:sinks=2,window=9") == ("streaming_llm", {"sinks": 2, "window": 9})
    assert sj.kv.parse_preset("dense") == ("dense", {})


@pytest.mark.quick
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("streaming_lm", "unknown cache 'streaming_lm'; did you mean 'streaming_llm'\\?"),
        ("zzz", "unknown cache 'zzz'; known: .*dense"),
        ("window:windw=3", "cache 'window' has no option 'windw'; did you mean 'window'\\?"),
        ("window:window", "cache option 'window' lacks its value: write window=NUMBER"),
        ("window:window=many", "cache 'window': window must be a number, not 'many'"),
    ],
)
def test_wrong_descriptions(text, message):
    with pytest.raises(ValueError, match=message) as error:
        sj.kv.parse_preset(text)
    assert "\n" not in str(error.value)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("streaming-llm", {}, "did you mean 'streaming_llm'"),
        ("zzz", {}, "known: .*dense"),
        ("dense", {"window": 3}, "has no option 'window'; it takes capacity"),
        ("window", {"window": 0}, "Window.size must be at least 1"),
        ("streaming_llm", {"sinks": 0}, "Sink.size must be at least 1"),
        ("dense", {"capacity": -1}, "Full.capacity must be at least 1"),
    ],
)
def test_wrong_names_and_options(name, options, message):
    with pytest.raises(ValueError, match=message) as error:
        sj.kv.preset(name, **options)
    assert "\n" not in str(error.value)
