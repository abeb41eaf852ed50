"""The search for a mesh, on answers that are known, and against trying every mesh."""

import itertools
import math

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import streamjax as sj
from benchmarks.model_shapes import SHAPES
from streamjax.data import DataConfig
from streamjax.models.config import UniformConfig, expanded
from streamjax.models.files.description import describe_model
from streamjax.training import MeshConfig, TrainConfig, apply_overrides, chip_of, choose_mesh, estimate
from streamjax.training.backprop.planning.method_choice import choose
from streamjax.training.mesh_choice.step_costs import AXES, Work, step_seconds
from streamjax.training.run.loop import _Run

LLAMA = SHAPES["llama-3.1-8b"]
V5P, V6E = chip_of("TPU v5p"), chip_of("TPU v6e")
SMALL = UniformConfig(
    vocab_size=1024, d_model=256, num_layers=4, num_heads=8, num_kv_heads=4, head_dim=32, mlp_dim=1024
)


def axes_of(config, devices, chip, **known):
    return choose_mesh(config, devices, chip, **known).axes


def test_one_device_has_nothing_to_choose():
    found = choose_mesh(SMALL, 1, V5P, rows=4, length=2048)
    assert set(found.axes.values()) == {1}
    assert found.arguments["method"] == "full"
    assert found.describe().startswith("one device, full, estimated ")


def test_rows_that_are_many_are_split_and_nothing_else():
    axes = axes_of(SMALL, 8, V5P, rows=64, length=4096)
    assert axes["data"] * axes["fsdp"] == 8
    assert axes["context"] == axes["tensor"] == 1


def test_a_model_that_no_device_can_hold_is_split():
    """96 GB of weights and moments, 95 GiB a chip."""
    axes = axes_of(LLAMA, 64, V5P, rows=64, length=4096)
    assert axes["fsdp"] * axes["tensor"] > 1
    assert axes["context"] == 1


def test_one_long_row_is_shared():
    axes = axes_of(LLAMA, 64, V5P, rows=1, length=2**20)
    assert axes["data"] == axes["fsdp"] == 1
    assert axes["context"] * axes["tensor"] == 64
    assert axes["context"] > axes["tensor"] > 1  # its weights must be split too


def test_stages_are_of_stacked_layers():
    known = {"rows": 8, "length": 2**17, "method": "chunk"}
    assert axes_of(LLAMA, 64, V5P, **known)["context"] > 1
    assert axes_of(LLAMA, 64, V5P, **known, stacked=False)["context"] == 1


@pytest.mark.parametrize(
    ("fsdp", "context", "tensor", "gigabytes"), [(8, 8, 1, 90.4), (8, 32, 1, 36.0), (1, 16, 4, 59.2)]
)
def test_the_memory_of_a_shared_sequence_is_about_the_compilers(fsdp, context, tensor, gigabytes):
    """A million tokens a row on chips of v5p, as `benchmarks/models/context_on_tpu.py` finds it."""
    parts = {"batch_size": 1, "length": 2**20 // context, "method": "remat", "param_dtype": "float32"}
    shards = fsdp * tensor
    gradient = estimate(LLAMA, **parts, shards=shards, tensor=tensor, context=context).device_bytes
    moments = 8 * LLAMA.parameter_count // shards
    assert 0.97 * gigabytes < (gradient + moments) / 1e9 < 1.1 * gigabytes


def test_what_the_compiler_fits_is_taken():
    found = choose_mesh(LLAMA, 256, V5P, rows=8, length=2**20)
    assert found.axes == {"data": 1, "fsdp": 8, "context": 32, "tensor": 1}
    assert found.arguments == {"method": "remat", "keep_attention": True}
    found = choose_mesh(LLAMA, 64, V5P, rows=8, length=2**20, method="remat")
    assert (found.axes["fsdp"], found.axes["context"]) == (8, 8)
    with pytest.raises(ValueError, match="fit 64 devices in no way"):
        choose_mesh(LLAMA, 64, V6E, rows=8, length=2**20, method="remat")


def test_what_fits_nowhere_is_told_in_a_line():
    message = r'^mesh "auto": 1 x 4194304 tokens fit 64 devices in no way; closest: context=\d+ tensor=\d+, estimated'
    with pytest.raises(ValueError, match=message) as error:
        choose_mesh(LLAMA, 64, V6E, rows=1, length=2**22)
    assert "\n" not in str(error.value)


def test_what_cannot_be_shared_is_told_in_a_line():
    with pytest.raises(ValueError, match=r'^mesh "auto": 7 devices cannot share 3 x 64 tokens evenly: make the rows'):
        choose_mesh(SMALL, 7, V5P, rows=3, length=64)
    with pytest.raises(ValueError, match=r"^3 rows cannot be dealt out to 2 microbatches$"):
        choose_mesh(SMALL, 8, V5P, rows=3, length=64, microbatches=2)


def test_an_unknown_device_is_told_in_a_line():
    with pytest.raises(ValueError, match=r"""^mesh "auto" knows nothing of 'Abacus', only of TPU v4, .*: set sizes"""):
        chip_of("Abacus")
    assert chip_of("NVIDIA H100 80GB HBM3").torus is None


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from((2, 4, 8, 12, 32)),
    st.sampled_from((1, 2, 4, 12, 32)),
    st.sampled_from((1024, 4096, 2**17)),
    st.sampled_from((V5P, V6E, chip_of("NVIDIA H100"), chip_of("cpu"))),
    st.sampled_from(("full", "remat")),
)
def test_no_mesh_that_fits_is_faster(devices, rows, length, chip, method):
    config = expanded(SMALL)
    work = Work.from_config(config, rows, length)
    seconds = []
    for sizes in itertools.product((n for n in range(1, devices + 1) if devices % n == 0), repeat=4):
        axes = dict(zip(AXES, sizes, strict=True))
        data, fsdp, context, tensor = sizes
        if math.prod(sizes) != devices or rows % (data * fsdp) or 4 % tensor or 256 % fsdp:
            continue
        if context > 1 and length % (2 * context):
            continue
        memory = estimate(
            config,
            batch_size=rows // (data * fsdp),
            length=length // context,
            method=method,
            param_dtype="float32",
            shards=fsdp * tensor,
            tensor=tensor,
            context=context,
        )
        if memory.device_bytes <= 0.9 * (chip.memory_bytes - 8 * config.parameter_count // (fsdp * tensor)):
            seconds.append(sum(step_seconds(work, axes, chip, rows=rows, length=length, method=method).values()))
    try:
        found = choose_mesh(SMALL, devices, chip, rows=rows, length=length, method=method)
    except ValueError:
        assert not seconds
    else:
        assert sum(found.seconds.values()) == min(seconds)
        assert math.prod(found.axes.values()) == devices


@pytest.fixture
def run_config(tmp_path):
    (tmp_path / "text").mkdir()
    for index in range(12):
        (tmp_path / "text" / f"{index:02}.txt").write_text("stream runs on and the window holds what it can " * 20)
    model = UniformConfig(vocab_size=300, d_model=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=24)
    data = DataConfig(source=str(tmp_path / "text"), seq_len=32, batch_size=8, num_workers=0)
    return TrainConfig(name="x", model=model, data=data, steps=2, log_interval=1)


def test_the_command_line_says_auto(run_config):
    auto = apply_overrides(run_config, [("mesh", "auto")])
    assert auto.mesh == "auto"
    assert auto.to_json_dict()["mesh"] == "auto"
    assert apply_overrides(run_config, [("mesh.fsdp", "2")]).mesh == MeshConfig(fsdp=2)
    with pytest.raises(ValueError, match=r"^config.mesh is a group of fields: set one of them"):
        apply_overrides(run_config, [("mesh", "best")])
    with pytest.raises(ValueError, match=r'^mesh is "auto", and diloco.replicas 2 need a mesh of their own'):
        apply_overrides(auto, [("diloco.replicas", "2")])


def test_a_run_takes_the_mesh_that_is_found(run_config, tmp_path, caplog):
    """Eight virtual devices, eight rows: each has one, and the run says so."""
    caplog.set_level("INFO", logger="streamjax")
    run = _Run(apply_overrides(run_config, [("mesh", "auto")]), tmp_path / "run", progress=False)
    run.close()
    assert run.mesh.shape["data"] * run.mesh.shape["fsdp"] == 8
    assert len(run.state.model.embedding.sharding.device_set) == 8
    assert any(line.startswith("mesh: data=") and " full, estimated " in line for line in caplog.messages)


def test_a_model_on_disk_tells_what_it_is(tmp_path):
    """Its sizes are known before its weights have a place."""
    model = sj.Decoder(SMALL.replace(vocab_size=32, d_model=32, num_layers=1, mlp_dim=8), jax.random.key(0))
    sj.save_hf(model, tmp_path / "hf")
    sj.save_safetensors(model, tmp_path / "own")
    sj.save(model, tmp_path / "orbax")
    for name in ("hf", "own", "orbax"):
        found = describe_model(tmp_path / name)
        assert (found.d_model, found.blocks[0].mlp, found.num_layers) == (32, model.config.blocks[0].mlp, 1)
    with pytest.raises(ValueError, match=r"no model at .*nothing: neither config.json"):
        describe_model(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("method", "offload", "gigabytes"), [("layer", None, 72.6), ("layer", "host", 38.3), ("chunk", None, 83.0)]
)
def test_the_memory_of_orders_over_context_is_about_the_compilers(method, offload, gigabytes):
    """As above, on fsdp=8 context=8."""
    parts = {"batch_size": 1, "length": 2**17, "method": method, "offload": offload, "param_dtype": "float32"}
    gradient = estimate(LLAMA, **parts, shards=8, context=8).device_bytes
    assert 0.97 * gigabytes < (gradient + LLAMA.parameter_count) / 1e9 < 1.1 * gigabytes


def test_orders_are_chosen_for_shared_sequences_that_they_can_cut():
    """Less memory than `remat` needs: what is taken is what the mesh allows, and a prime stretch stays whole."""
    known = {"batch_size": 1, "memory_bytes": 80 * 10**9, "param_dtype": "float32", "shards": 8, "context": 8}
    found = choose(LLAMA, length=2**17, **known).arguments
    assert found == {"method": "layer", "chunk_size": 2048}
    prime = choose(LLAMA, length=131_071, **{**known, "memory_bytes": 110 * 10**9}).arguments
    assert prime == {"method": "remat"}
    with pytest.raises(ValueError, match="no backprop method fits 1 x 131071 tokens"):
        choose(LLAMA, length=131_071, **known)
