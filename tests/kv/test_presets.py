"""Named caches: what they build, and what they say when asked for something else."""

import dataclasses

import jax
import numpy as np
import pytest

import streamjax as sj
from streamjax.kv import Cascade, Full, Sink, Window
from streamjax.kv.channels.projection_file import HeadProjections, Projections
from streamjax.kv.codecs.measured.codebook_file import LayerCodebooks
from streamjax.kv.description import describe_cache
from streamjax.kv.merging.kernel_file import LayerKernels
from streamjax.kv.presets.in_codes import CODECS
from streamjax.kv.scores.retaining_file import LayerRetainingHeads


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
    networks = tmp_path / "retaining.safetensors"
    LayerRetainingHeads(
        (sj.kv.RetainingHeads.from_arrays(np.ones((8, 2)), np.ones((2, 1)), model="whose"),), "whose", 1
    ).save(networks)
    for name, entry in sj.kv.presets().items():
        assert entry.name == name
        assert "arXiv" in entry.paper
        assert entry.summary.endswith((".", ";"))
        files = {"retaining": networks, "codebooks": codebooks(tmp_path), "projections": projections(tmp_path)}
        flows = tmp_path / "kernels.safetensors"
        LayerKernels((sj.kv.Kernels.from_arrays(np.ones((2, 8, 3)), np.ones(2), 0.5, "whose"),), "whose", 1).save(flows)
        files["kernels"] = flows
        needed = {option: str(files.get(option, gates)) for option in entry.needs}
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
        ("window", {"window": 0}, "Window.size is 0: it must be a whole number of at least 1"),
        ("streaming_llm", {"sinks": 0}, "Sink.size is 0: it must be a whole number of at least 1"),
        ("dense", {"capacity": -1}, "Full.capacity is -1: it must be a whole number of at least 1"),
    ],
)
def test_wrong_names_and_options(name, options, message):
    with pytest.raises(ValueError, match=message) as error:
        sj.kv.preset(name, **options)
    assert "\n" not in str(error.value)


CAPACITIES = [*(1 << power for power in range(6, 21)), 72, 96, 100, 192, 500, 1000, 1536, 10_000, 100_000]


@pytest.fixture
def gates(tmp_path):
    """A file of gates of four heads."""
    file = tmp_path / "gates.json"
    file.write_text('{"gates": [[0.9, 0.1], [0.2, 0.8]]}')
    return file


def projections(folder):
    """A file of a head's directions for one layer."""
    layer = Projections(np.eye(8)[None], np.eye(8)[None], np.full((2, 1), 4))
    HeadProjections((layer,), "whose", 1).save(folder / "projections.safetensors")
    return folder / "projections.safetensors"


def codebooks(folder):
    """A file of codebooks for one layer."""
    own = sj.kv.Codebooks(np.ones(1024, np.float32).tobytes(), np.ones(1024, np.float32).tobytes(), 2, "a model")
    LayerCodebooks((own,), "a model", 1).save(folder / "books.safetensors")
    return folder / "books.safetensors"


def with_capacity():
    return [name for name, entry in sj.kv.presets().items() if "capacity" in entry.options]


@pytest.mark.quick
@pytest.mark.parametrize("name", with_capacity())
def test_defaults_fit_every_capacity(name, gates, tmp_path):
    known = sj.kv.presets()[name].options
    files = {"heads": gates, "codebooks": codebooks(tmp_path), "projections": projections(tmp_path)}
    needed = {option: str(files[option]) for option in sj.kv.presets()[name].needs}
    for capacity in CAPACITIES:
        sj.kv.preset(name, capacity=capacity, **needed)
    # A default that is written out is the default, unless it does not fit.
    for capacity in (known["capacity"], 1 << 20):
        written = {**known, **needed, "capacity": capacity}
        assert sj.kv.preset(name, capacity=capacity, **needed) == sj.kv.preset(name, **written)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("quest", {"capacity": 512, "top_k": 64}, "Pages.top_k is 64, but 512 tokens lie in at most 33 pages of 16"),
        ("quest", {"capacity": 10_007}, "Pages.capacity must be a multiple of the page size 16, got 10007"),
        ("quest", {"capacity": 1000, "page": 16}, "Pages.capacity must be a multiple of the page size 16, got 1000"),
        ("quest", {"page": 0}, "Pages.size is 0"),
        ("quest", {"top_k": True}, "cache preset 'quest': top_k is True: it must be a whole number"),
        ("quest", {"placement": "disk"}, "placement is 'disk': it must be 'device' or 'host'"),
        ("retro_infer", {"capacity": 8192, "estimate": 1900}, "Clusters reads 9 and estimates 1900 clusters, but 8192"),
        ("retro_infer", {"capacity": 0}, "Clusters.capacity is 0"),
        ("retro_infer", {"size": -1}, "Clusters.size is -1"),
        ("dhsa", {"threshold": float("nan")}, "threshold is nan: it must be a number"),
        ("inf_llm", {"true_distance": 1}, "true_distance is 1: it must be true or false"),
        ("duo_attention", {"full": float("nan"), "heads": "x.json"}, "full is nan"),
    ],
)
def test_nonsense_that_is_asked_for_is_refused(name, options, message):
    with pytest.raises(ValueError, match=message) as error:
        sj.kv.preset(name, **options)
    assert "\n" not in str(error.value)


def test_published_sizes_and_their_shares():
    def sizes(**options):
        (*_, tier) = sj.kv.preset("retro_infer", **options).tiers
        return tier.segment, tier.retrieve, tier.estimate

    assert sizes() == (8192, 150, 1900)
    assert sizes(capacity=8192) == (8192, 9, 119)
    assert sizes(capacity=1 << 20) == (8192, 150, 1900)


@pytest.mark.quick
@pytest.mark.parametrize("name", ["h2o", "scissorhands", "snapkv", "random"])
def test_tokens_kept_by_a_score_may_stand_where_a_full_cache_ends(name):
    near, far = (sj.kv.preset(name, window=64, size=100, true_distance=true) for true in (False, True))
    assert [tier.distance for tier in (near.tiers[-1], far.tiers[-1])] == [164, None]
    assert sj.kv.parse_preset(f"{name}:true_distance=false") == (name, {"true_distance": False})


@pytest.mark.quick
def test_only_caches_that_ask_get_ids():
    asking, other = sj.kv.preset("sentence_kv"), sj.kv.preset("dhsa")
    assert asking.needs_ids
    assert not other.needs_ids
    assert sj.kv.HeadGroups(((0,), other), ((1,), asking)).needs_ids
    spec = sj.kv.KVSpec(1, 1, 2, np.dtype(np.float32))
    shapes = [jax.eval_shape(lambda cache=cache: cache.tiers[1].init(spec)) for cache in (asking, other)]
    assert shapes[0].ids.shape == (1, 1, 64)
    assert shapes[1].ids is None


@pytest.mark.quick
def test_ids_are_named_in_one_word():
    assert sj.kv.parse_preset("sentence_kv:ends=13+30,page=64") == ("sentence_kv", {"ends": (13, 30), "page": 64})
    with pytest.raises(ValueError, match="cache 'sentence_kv': ends must be a number, not '13\\+x'"):
        sj.kv.parse_preset("sentence_kv:ends=13+x")


@pytest.mark.quick
def test_a_cache_in_codes_has_them_in_every_tier_that_can(tmp_path):
    four, two = CODECS["int4"], CODECS["int2"]
    snapkv = sj.kv.preset("snapkv", size=100)
    assert sj.kv.preset("snapkv", size=100, codec="int4") == Cascade(
        Window(32), dataclasses.replace(snapkv.tiers[1], codec=four)
    )  # a window shorter than a group of 64 tokens stays as it is
    assert sj.kv.preset("snapkv", size=100, codec="int2").tiers[0].codec == two
    assert sj.kv.preset("streaming_llm", sinks=3, window=90, codec=four) == Cascade(Sink(3), Window(90, codec=four))
    gates = tmp_path / "gates.json"
    gates.write_text('{"gates": [[0.9, 0.1], [0.2, 0.8]]}')
    groups = sj.kv.preset("duo_attention", heads=str(gates), recent=9, capacity=99, codec="fp8")[0].groups
    assert [cascade.tiers[-1].codec for _, cascade in groups] == [CODECS["fp8"]] * 2
    assert sj.kv.preset("cake", codec="int8").cascade.tiers[1].codec == CODECS["int8"]
    pages = sj.kv.preset("quest", page=16, codec="int4").tiers[-1]
    assert pages.codec == dataclasses.replace(four, group=16)
    name, options = sj.kv.parse_preset("tova:size=99,codec=int4")
    assert sj.kv.preset(name, **options) == Cascade(
        dataclasses.replace(sj.kv.preset("tova", size=99).tiers[0], codec=four)
    )
    assert describe_cache(sj.kv.preset(name, **options)).endswith(" as Int(bits=4, fit='error'))")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("snapkv", {"codec": "int5"}, "cache 'snapkv': there is no codec 'int5'; did you mean 'int"),
        ("streaming_llm", {"window": 9, "codec": "int4"}, "Cascade has no tier that would hold tokens as codes of Int"),
        ("kivi", {"codec": "int8"}, "cache 'kivi' with a codec: Cascade has no tier"),
        ("topk_attention", {"codec": "int4"}, "reads all keys as they are"),
    ],
)
def test_codecs_that_do_not_fit_are_refused_in_one_line(name, options, message):
    with pytest.raises(ValueError, match=message) as refused:
        sj.kv.preset(name, **options)
    assert "\n" not in str(refused.value)


def test_a_block_of_lags_is_what_comes_between_two_choices_unless_it_is_said():
    (*_, of_lag), (*_, apart) = (sj.kv.preset("lagkv", **options).tiers for options in ({"lag": 16}, {"every": 256}))
    assert (of_lag.score.lag, of_lag.every, apart.score.lag, apart.every) == (16, 16, 128, 256)


def test_heads_share_a_layers_tokens_in_the_codec_that_is_asked_for():
    for layers in (sj.kv.preset("ada_kv", pyramid=True, codec="int4").for_layers(2),
                   [sj.kv.preset("kvzip", floor=0.1, codec="int4")]):  # fmt: skip
        for cascade in layers:
            pooled = cascade.tiers[-1]
            assert isinstance(pooled, sj.kv.Pooled)
            assert pooled.codec == sj.kv.Int(4, fit="error")
    assert (pooled.floor, pooled.score) == (0.1, sj.kv.KVzip())
