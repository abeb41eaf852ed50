"""Every field of every configuration: wrong types and numbers out of range are refused, found by reflection."""

import dataclasses
import importlib
import json
import pkgutil
import runpy
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import numpy as np
import pytest

import streamjax
from streamjax.data import DataConfig
from streamjax.field_checks import Interval, Positive, Size, check_arguments, check_fields, from_plain
from streamjax.kv.budgets import ada_kv, cake, pyramid, zipvl
from streamjax.kv.channels import bases, grouped_layers, low_rank, paired_layers, pruned, shadow
from streamjax.kv.codecs import block_floats, fireq, fp8, gear, hadamard, integers, mixed
from streamjax.kv.codecs.measured import coupled
from streamjax.kv.layer_caches import current_chunk, recurrence
from streamjax.kv.layer_caches.slots_of import SlotsOf
from streamjax.kv.layouts import across_layers
from streamjax.kv.merging import cam, d2o, elastic_cache, ems, kvmerger, lococo
from streamjax.kv.pages import boundaries, disk_files, indexes, page_pool, selection
from streamjax.kv.scores import (
    chunkkv,
    criticalkv,
    cur,
    expected_attention,
    finch,
    h2o,
    lagkv,
    leverage,
    query_filters,
    random_choice,
    retaining,
    snapkv,
    windowkv,
)
from streamjax.kv.selective import lines, noted, other_group, static_eviction
from streamjax.kv.tiers import (
    bank,
    clusters,
    content_pages,
    full,
    landmark_memory,
    pages,
    parallel,
    pooled,
    scored,
    sink,
    sink_window,
    window,
)
from streamjax.models.config import (
    DenseAndExpertsConfig,
    DenseConfig,
    ExpertsConfig,
    HSAConfig,
    LatentAttentionConfig,
    LayerInputConfig,
    NormConfig,
    RopeConfig,
    TemperatureConfig,
    UniformConfig,
    elementwise,
    gated_linear,
    memory_mixers,
    parse_config,
    recurrent,
)
from streamjax.models.side_network import SideConfig
from streamjax.streaming import Sampler
from streamjax.streaming.compacting.reselecting import Reselection
from streamjax.streaming.speculative import Retrieval
from streamjax.training import (
    DPO,
    GRPO,
    BackpropConfig,
    CrossEntropy,
    DiLoCoConfig,
    LeMoConfig,
    LoRAConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
)
from streamjax.training.distillation.config import DistillConfig
from streamjax.training.heads.convolutions import ConvolutionConfig
from streamjax.training.heads.drafting import DraftHeadsConfig
from streamjax.training.heads.gates import GateConfig
from streamjax.training.heads.projections import ProjectionConfig
from streamjax.training.heads.retaining import RetainingConfig
from streamjax.training.heads.side_network import SideTraining
from streamjax.training.objectives.distillation import Distillation
from streamjax.training.pipeline.paths import PipelineConfig
from streamjax.training.post_training.rollouts import RolloutConfig
from streamjax.training.run.config import SnapshotConfig
from streamjax.training.sequence_groups.costs import GroupCosts

MODEL = UniformConfig(
    vocab_size=61,
    d_model=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=48,
    hsa=HSAConfig((1,), (1,)),
)
EXAMPLES = [
    MODEL,
    MODEL.expand(),
    MODEL.expand().blocks[0],
    MODEL.expand().blocks[0].mixer,
    MODEL.expand().blocks[0].mlp,
    DenseAndExpertsConfig(DenseConfig(8), ExpertsConfig(4, 2, 8)),
    ExpertsConfig(4, 2, 8, shared=DenseConfig(8), shared_gate=True),
    NormConfig(),
    LatentAttentionConfig(4, 16, 8, 4, 8, rope=RopeConfig(rotary_dim=4)),
    RopeConfig(),
    TemperatureConfig(0.1, 8),
    HSAConfig((1, 2), (1,)),
    DataConfig(),
    TrainConfig("run", MODEL, DataConfig(), 10),
    BackpropConfig(),
    DiLoCoConfig(),
    GroupCosts(quadratic=1e-9, linear=1e-6, exchanged=1e-6, tokens_per_device=16),
    LeMoConfig(),
    LoRAConfig(),
    MeshConfig(),
    OptimizerConfig(),
    GateConfig(),
    Retrieval(),
    RolloutConfig(),
    CrossEntropy(),
    DPO(),
    GRPO(),
    Sampler(),
    full.Full(8),
    sink.Sink(4, 8),
    window.Window(8),
    current_chunk.CurrentChunk(8),
    sink_window.SinkWindow(2, 8, 10),
    pages.Pages(4, 16, 2),
    bank.Bank(4, 16, 2),
    content_pages.ContentPages(4, 16, 2, boundaries.KeyChange()),
    clusters.Clusters(16, 32, 1),
    landmark_memory.ChunkMemory(64),
    scored.Scored(8, snapkv.SnapKV(), every=64),
    snapkv.SnapKV(),
    lagkv.LagKV(),
    expected_attention.ExpectedAttention(),
    random_choice.RandomChoice(),
    boundaries.KeyChange(),
    boundaries.EndTokens((46,)),
    indexes.MinMax(),
    indexes.Mean(),
    indexes.Representative(),
    disk_files.PageLayout(1, 1, 8, 4, "float32", "abc"),
    page_pool.PagePool(8, 4, 2),
    recurrence.Recurrence((2, 4, 4), (3, 8)),
    recurrence.BesideRecurrence(current_chunk.CurrentChunk(8), recurrence.Recurrence((2, 4, 4), (3, 8))),
    recurrent.GatedDeltaConfig(2, 1, 4, 4),
    recurrent.SSDConfig(2, 1, 4, 4),
    recurrent.GatedConvConfig(1, 1, 4),
    recurrent.KimiDeltaConfig(2, 2, 4, 4, 4),
    gated_linear.GatedLinearConfig(2, 2, 4, 4),
    gated_linear.HGRN2Config(2, 2, 4, 4),
    elementwise.HGRNConfig(2, 2, 4),
    memory_mixers.MoMConfig(2, 2, 4, 4),
    memory_mixers.PrefixLinearConfig(2, 2),
    memory_mixers.LMUConfig(2, 2, 4, 3, 8.0),
    memory_mixers.ConvEmbeddingConfig(2, 2, 4),
    memory_mixers.SpikingMixConfig(2, 2, 4, 8),
    elementwise.RGLRUConfig(2, 2, 4),
    cur.CUR(),
    chunkkv.ChunkKV(snapkv.SnapKV()),
    criticalkv.CriticalKV(snapkv.SnapKV()),
    finch.Finch(),
    leverage.Leverage(),
    query_filters.QFilters(),
    windowkv.WindowKV(snapkv.SnapKV()),
    elastic_cache.Anchors(),
    kvmerger.Gaussian(),
    cam.IntoFollowing(),
    d2o.NearestAbove(),
    ems.ZeroClass(),
    fp8.FP8(),
    hadamard.Hadamard(),
    integers.Int(),
    gear.Gear(),
    integers.IntByToken(),
    block_floats.BlockFloats(),
    fireq.FireQ(),
    mixed.Mixed(),
    coupled.CQ(),
    zipvl.Important(),
    ada_kv.OverHeads(0.2, pyramid.Pyramid()),
    cake.Preferences(),
    pyramid.Pyramid(),
    parallel.Parallel(8),
    pooled.Pooled(8, snapkv.SnapKV(), every=64),
    bases.Coordinates(2),
    low_rank.LowRank(64),
    pruned.Channels(2, 8),
    pruned.PrunedKeys(64),
    shadow.Shadow(64),
    paired_layers.PairedLayers(8),
    grouped_layers.GroupedLayers(8),
    across_layers.Pairs(),
    across_layers.Groups(),
    retaining.Retaining(),
    RetainingConfig(),
    SideTraining(),
    SideConfig(1),
    DraftHeadsConfig(),
    ProjectionConfig(),
    ConvolutionConfig(),
    lococo.Convolved(),
    indexes.BlendedBounds(),
    selection.Coarse(4),
    lines.Lines(64),
    noted.Noted(64, h2o.H2O()),
    static_eviction.StaticEviction(8, h2o.H2O(), every=16),
    other_group.OtherGroup((window.Window(8),)),
    Reselection(current_chunk.CurrentChunk(8)),
    recurrent.GMUConfig(2, 2, channels=8),
    gated_linear.RWKV7Config(2, 2, head_dim=8),
    gated_linear.ChannelMixConfig(2, 2, width=8, channels=8),
    LayerInputConfig(4),
    SlotsOf(0),
    DistillConfig(),
    Distillation(),
    PipelineConfig(),
    SnapshotConfig(),
]
# Dataclasses of plain values that no user fills in: results, descriptions of architectures and files, what is derived
# from a checked configuration. Cascade and HeadGroups check their parts in a constructor of their own.
NO_CONFIGURATIONS = {
    *("Rotary", "KeyStore", "ReadablePages", "ClustersState", "Interval", "Cascade", "HeadGroups", "SharedFront"),
    *("Question", "Problem", "Part", "Cell", "Curve", "SlotMemory", "Source", "Place", "ChatFrame"),
    *("Quantisation", "TurnedTensor", "KeyValueTensor", "Compaction", "Split"),
    *("GroupedCompaction", "Measuring", "NearShare", "Rearrangement", "StateStore", "KeptAttention", "CacheSizes"),
    *("PartSize",),
    *("Asked", "Example", "Turn", "Needles", "Calibration", "QueryFilters", "LayerFactors", "Choice", "Budgeted"),
    *("LayerCodebooks", "LayerRetainingHeads", "RetainingHeads", "HeadProjections", "AllHeld", "Lent", "AcrossLayers"),
    *("Kernels", "LayerKernels", "LayerPredictor", "LayerPredictors", "TokenElimination", "GroupedState"),
    *("Sampling", "TokenLogprob", "Usage", "Event", "ChatCall", "CompletionCall", "Options", "Call"),  # requests' own
    *("Anchor", "Chip", "Work", "Layout", "Stripes", "Schedule", "Visit"),
    *("Group", "Plan", "SharedBeginning"),  # what was planned, and what was read
    *("GrownTrees", "HydraTrees", "PromptTrees", "DraftMemory"),  # how a drafter guesses, and what that takes
    *("Merge", "Wrapped", "RecurrentConfig", "Drafter", "TreeDrafter", "Deferred"),  # what others of them are made from
}
FIELDS = [(example, field.name) for example in EXAMPLES for field in dataclasses.fields(example)]
NAMES = [f"{type(example).__name__}.{name}" for example, name in FIELDS]
VALUES = [None, True, 3, 0.5, "text", b"bytes", [1], {}, (object(),), object(), 1j]  # one of every kind
NO_NUMBERS = [float("nan"), float("inf"), -float("inf"), 10**400, -(10**400)]


def hint_of(example, name):
    return typing.get_type_hints(type(example), include_extras=True)[name]


def leaves(hint):
    """The annotations that a value may have, one by one, with the interval of each; those inside of tuples apart."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return [leaf for option in arguments for leaf in leaves(option)]
    if origin is Annotated:
        return [(kind, tuple(arguments[1:])) for kind, _ in leaves(arguments[0])]
    return [(hint, ())]


def is_plain(hint):
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType) or origin is tuple:
        return all(is_plain(option) for option in arguments if option is not ...)
    if origin is Annotated:
        return is_plain(arguments[0])
    kinds = (int, float, bool, str, type(None))
    return origin is Literal or hint in kinds or (isinstance(hint, type) and hint.__module__.startswith("streamjax."))


def welcome(kind, value):
    """Whether a value is of a kind, in a way of its own."""
    if typing.get_origin(kind) is Literal:
        return value in typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        return False  # none of VALUES is a tuple of something that a configuration has
    return type(value) in {int: (int,), float: (int, float)}.get(kind, (kind,))


def wrong_values(hint):
    known = leaves(hint)
    wrong = [value for value in VALUES if not any(welcome(kind, value) for kind, _ in known)]
    if any(kind in (int, float) for kind, _ in known):
        wrong += NO_NUMBERS
        (interval,) = next(limits for kind, limits in known if kind in (int, float))
        step = 1 if any(kind is int for kind, _ in known) else 1e-3
        wrong += [interval.low if interval.above else interval.low - abs(interval.low) * 1e-3 - step]
        wrong += [interval.high if interval.below else interval.high * (1 + 1e-3) + step]
    inside = [
        arguments for kind, _ in known if typing.get_origin(kind) is tuple and (arguments := typing.get_args(kind))
    ]
    return wrong + [(value,) for arguments in inside for value in wrong_values(arguments[0])]


def refused(make, name):
    with pytest.raises(ValueError, match=name) as error:
        make()
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 360


def test_no_configuration_is_left_out():
    found = {}
    for module in pkgutil.walk_packages(streamjax.__path__, "streamjax."):
        for kind in vars(importlib.import_module(module.name)).values():
            if isinstance(kind, type) and dataclasses.is_dataclass(kind) and kind.__module__ == module.name:
                hints = typing.get_type_hints(kind, include_extras=True)
                if dataclasses.fields(kind) and all(is_plain(hints[f.name]) for f in dataclasses.fields(kind)):
                    found[kind.__name__] = kind
    public = {name: kind for name, kind in found.items() if not name.startswith("_")}
    assert set(public) - NO_CONFIGURATIONS == {type(example).__name__ for example in EXAMPLES}


@pytest.mark.parametrize(("example", "name"), FIELDS, ids=NAMES)
def test_every_number_has_a_range(example, name):
    def check(hint):
        for kind, limits in leaves(hint):
            if kind in (int, float):
                assert len(limits) == 1
                assert isinstance(limits[0], Interval)
            if typing.get_origin(kind) is tuple:
                check(typing.get_args(kind)[0])

    check(hint_of(example, name))


@pytest.mark.parametrize(("example", "name"), FIELDS, ids=NAMES)
def test_wrong_values_are_refused(example, name):
    for value in wrong_values(hint_of(example, name)):
        refused(
            lambda value=value: dataclasses.replace(example, **{name: value}), f"{type(example).__name__}.{name} is "
        )


@pytest.mark.parametrize("example", EXAMPLES[:20], ids=lambda example: type(example).__name__)
def test_configurations_survive_json(example):
    values = json.loads(json.dumps(dataclasses.asdict(example)))
    assert from_plain(type(example), values) == example
    refused(lambda: from_plain(type(example), {**values, "new": 1}), f"unknown {type(example).__name__} field 'new'")
    for other in (None, 5, [values], "text"):
        refused(lambda other=other: from_plain(type(example), other), f"{type(example).__name__} is ")


def test_values_of_json_that_python_would_take():
    values = json.loads(json.dumps(dataclasses.asdict(MODEL)))
    for field, value in (("vocab_size", True), ("norm_eps", "8"), ("tie_embeddings", 1), ("rope", 5), ("hsa", [1])):
        refused(lambda field=field, value=value: parse_config({**values, field: value}), f"{field} is ")
    missing = {name: value for name, value in values.items() if name != "d_model"}
    refused(lambda: parse_config(missing), "UniformConfig.d_model is missing")
    refused(lambda: parse_config({**values, "rope": {"thetta": 1e4}}), "unknown RopeConfig field 'thetta'")


def test_lists_of_blocks_in_json():
    config = MODEL.replace(windows=(4, None)).expand()
    values = json.loads(json.dumps(config.to_json_dict()))
    assert values["layers"] == [0, 1]
    assert parse_config(values) == config
    for field, value, message in (
        ("vocab_size", True, "ModelConfig.vocab_size is True"),
        ("layers", [0, 2], "ModelConfig.layers must have places in the 2 blocks"),
        ("layers", [True], "ModelConfig.layers must have places in the 2 blocks"),
        ("layers", [], "ModelConfig.blocks is empty"),
        ("layers", 5, "ModelConfig.blocks and layers must be lists"),
        ("blocks", [{"mixer": 5, "mlp": 5}, 5], "BlockConfig.mixer is 5"),
        ("blocks", [5, 5], "ModelConfig.blocks is .5, 5."),
        ("norm", {"kind": "mean"}, "NormConfig.kind is 'mean'"),
        ("hsa", {"layers": [1]}, "HSAConfig.memory_layers is missing"),
    ):
        refused(lambda field=field, value=value: parse_config({**values, field: value}), message)
    refused(lambda: parse_config({name: values[name] for name in values if name != "layers"}), "ModelConfig.layers is")
    refused(lambda: parse_config({**values, "newer": 1}), "unknown ModelConfig field 'newer'")
    refused(lambda: parse_config([values]), "ModelConfig is .\\{")


@pytest.mark.parametrize("file", sorted(Path("configs").glob("*.py")), ids=lambda file: file.stem)
def test_shipped_configurations_are_accepted(file):
    check_fields(runpy.run_path(str(file))["get_config"]())


@pytest.mark.parametrize("folder", sorted(path.parent for path in Path("models").glob("*/config.json")), ids=str)
def test_shipped_models_are_accepted(folder):
    values = json.loads((folder / "config.json").read_text())
    check_fields(parse_config(values["model"]) if "model" in values else streamjax.load(folder).config)


def test_numpy_scalars_are_numbers():
    config = OptimizerConfig(learning_rate=np.float32(0.5), warmup_steps=np.int64(3))
    assert (type(config.learning_rate), type(config.warmup_steps)) == (float, int)
    refused(lambda: OptimizerConfig(learning_rate=np.float32("nan")), "OptimizerConfig.learning_rate is nan")


def test_arguments_of_a_function():
    def build(size: Size = 3, scale: Positive | None = None) -> Any:
        return size, scale

    check_arguments(build, {"size": 4, "scale": 2}, "cache 'x'")
    refused(lambda: check_arguments(build, {"size": 0}, "cache 'x'"), "cache 'x': size is 0: it must be a whole number")
    refused(
        lambda: check_arguments(build, {"scale": "2"}, "cache 'x'"), "scale is '2': it must be a number above 0 or None"
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RopeConfig(kind="llama3", original_max_position=8, low_freq_factor=5.0), "low_freq_factor is 5.0"),
        (lambda: RopeConfig(kind="yarn", original_max_position=8, beta_slow=40.0), "beta_slow is 40.0"),
        (lambda: RopeConfig(kind="longrope", original_max_position=8), "needs short_factor and long_factor"),
        (lambda: RopeConfig(kind="yarn", original_max_position=8, rotary_dim=3), "rotary_dim is 3: .* even"),
        (lambda: MeshConfig(data=0), "MeshConfig.data is 0"),
        (
            lambda: MODEL.replace(rope=RopeConfig(kind="dynamic", original_max_position=8, rotary_dim=2)),
            "more than 2 channels",
        ),
        (
            lambda: MODEL.replace(
                rope=RopeConfig(kind="longrope", original_max_position=8, short_factor=(1.0,), long_factor=(1.0,) * 4)
            ),
            "short_factor has 1 factors: longrope needs 4",
        ),
    ],
)
def test_fields_that_do_not_go_together(make, message):
    refused(make, message)
