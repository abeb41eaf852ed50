"""Fields changed from the command line: types, checks, and errors that say what to do in one line."""

import pytest

from streamjax.data import DataConfig
from streamjax.kv import preset
from streamjax.models import UniformConfig
from streamjax.training import TrainConfig, apply_overrides, describe

MODEL = UniformConfig(
    vocab_size=259, d_model=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, mlp_dim=32, windows=(4, None)
)
CONFIG = TrainConfig(name="test", model=MODEL, data=DataConfig(), steps=10)


def override(*arguments):
    return apply_overrides(CONFIG, [tuple(argument.split("=", 1)) for argument in arguments])


def test_values_take_the_type_of_their_field():
    config = override(
        "optimizer.learning_rate=3e-4",
        "optimizer.clip_norm=none",
        "steps=1_000",
        "scan_layers=True",
        "data.source=a=b c",
        "data.shuffle_seed=none",
        "dtype=bfloat16",
        "model.windows=(None, 7)",
        "model.eos_token_ids=257",
        "model.rope.short_factor=[1, 2.5]",
    )
    assert config.optimizer.learning_rate == 3e-4
    assert config.optimizer.clip_norm is None
    assert config.steps == 1000
    assert config.scan_layers is True
    assert config.data.source == "a=b c"
    assert config.data.shuffle_seed is None
    assert config.dtype == "bfloat16"
    assert config.model.windows == (None, 7)
    assert config.model.eos_token_ids == (257,)
    assert config.model.rope.short_factor == (1.0, 2.5)
    assert config.model.d_model == 32


def test_the_later_of_two_counts_and_nothing_changes_in_place():
    assert override("steps=3", "steps=4").steps == 4
    assert override() == CONFIG
    assert CONFIG.steps == 10


def test_checks_see_all_changes_together():
    config = override("model.num_kv_heads=4", "model.num_heads=8")
    assert (config.model.num_heads, config.model.num_kv_heads) == (8, 4)
    assert override("model=none", "init_from=folder").model is None


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (
            "optimizer.lerning_rate=1",
            r"config.optimizer.lerning_rate; did you mean config.optimizer.learning_rate\?",
        ),
        ("optimizer.lr=1", r"did you mean config.optimizer.learning_rate\?"),
        ("learning_rate=1", r"did you mean config.optimizer.learning_rate\?"),
        ("optimiser.b1=1", r"did you mean config.optimizer\?"),
        ("batchsize=1", r"did you mean config.data.batch_size\?"),
        ("data.zzz=1", r"unknown field config.data.zzz; there is source, data_dir"),
        ("steps=1e3", r"config.steps is '1e3': it must be an integer, for instance 10"),
        ("optimizer.b1=high", r"config.optimizer.b1 is 'high': it must be a number, for instance 0.9"),
        ("optimizer.clip_norm=x", r"it must be a number or none"),
        ("scan_layers=yes", r"it must be true or false"),
        ("steps=none", r"config.steps is 'none': it must be an integer"),
        ("backprop.method=layers", r"config.backprop.method is 'layers': it must be 'full' or 'remat'"),
        ("method=remat", r"unknown field config.method; did you mean config.backprop.method\?"),
        ("backprop.chunk_size=0", r"BackpropConfig.chunk_size is 0: it must be a whole number of at least 1"),
        ("backprop.segment=0", r"BackpropConfig.segment is 0: it must be a whole number of at least 1"),
        ("backprop.offload=disk", r"config.backprop.offload is 'disk': it must be 'host' or none"),
        ("backprop.offload_fraction=2", r"BackpropConfig.offload_fraction is 2.0: it must be a number from 0 to 1"),
        ("backprop.chunk_size=2048", r"backprop.chunk_size 2048 is more than data.seq_len 1024"),
        ("backprop.cache=streaming_lm", r"unknown cache 'streaming_lm'; did you mean 'streaming_llm'\?"),
        ("backprop.cache=window:window=0", r"Window.size is 0: it must be a whole number of at least 1"),
        ("backprop.carry_state=true", r'set data.packing to "streams", not \'concat\''),
        ("model.windows=(1.5, 2)", r"it must be a tuple of an integer or none"),
        ("model.windows=__import__('os')", r"it must be a tuple"),
        ("optimizer=adam", r"config.optimizer is a group of fields: .* --config.optimizer.learning_rate=..."),
        ("steps.x=1", r"config.steps is 10 here, without fields"),
        ("model.local_rope.theta=2", r"config.model.local_rope is none here"),
        ("model.num_kv_heads=3", r"num_heads 2 must be a multiple of num_kv_heads 3"),
        ("data.batch_size=0", r"DataConfig.batch_size is 0"),
        ("steps=0", r"TrainConfig.steps is 0: it must be a whole number of at least 1"),
        ("optimizer.accumulation=3", r"data.batch_size 8 is not a multiple of optimizer.accumulation 3"),
        ("mesh.context=3", r"data.seq_len 1024 is not a multiple of mesh.context 3: each device along it has"),
        ("init_from=folder", r"either model \(a new one\) or init_from \(a path\), and not both"),
    ],
)
def test_errors_are_one_line_that_says_what_to_do(argument, message):
    with pytest.raises(ValueError, match=message) as error:
        override(argument)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["backprop.method=chunk"],
            r"backprop.method .chunk. with mesh.context 4 deals layers out .* the model has 2: use at most 2 devices",
        ),
        (["data.packing=streams", "backprop.carry_state=true"], r"backprop.carry_state reads .* mesh.context 4 splits"),
    ],
)
def test_what_sequences_over_devices_do_not_go_with(arguments, message):
    assert override("mesh.context=4", "backprop.method=remat").mesh.context == 4
    with pytest.raises(ValueError, match=message) as error:
        override("mesh.context=4", *arguments)
    assert "\n" not in str(error.value)


STREAMS = ("data.packing=streams", "backprop.carry_state=true")


def test_streams_and_their_cache():
    config = override(*STREAMS, "backprop.cache=streaming_llm:sinks=2,window=30", "backprop.chunk_size=64")
    assert config.backprop.built_cache() == preset("streaming_llm", sinks=2, window=30)
    assert config.backprop.options()["chunk_size"] == 64
    dense = override(*STREAMS, "backprop.cache=dense:capacity=20480")  # evaluation reads 20 batches of 1,024 tokens
    assert dense.backprop.built_cache().capacity == 20480


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("optimizer.accumulation=2", r"set optimizer.accumulation to 1, not 2"),
        (
            "backprop.method=remat",
            r"BackpropConfig.method is 'remat': carry_state has an order of its own, leave it at",
        ),
        ("backprop.segment=2", r"BackpropConfig.segment is 2: carry_state has an order of its own, leave it at 1"),
        ("backprop.offload=host", r"BackpropConfig.offload is 'host': carry_state .* leave it at None"),
        ("backprop.cache=dense:capacity=20479", r"ends after 20479 tokens and the streams after 20480: use one"),
    ],
)
def test_what_streams_do_not_go_with(argument, message):
    with pytest.raises(ValueError, match=message) as error:
        override(*STREAMS, argument)
    assert "\n" not in str(error.value)


def test_every_field_is_described():
    lines = describe(CONFIG)
    assert "config.optimizer.learning_rate = 0.001  (a number)" in lines
    assert "config.model.windows = (4, None)  (a tuple of an integer or none)" in lines
    assert "config.init_from = None  (text or none)" in lines
