"""The memory model against what compilers say: recorded for a v5p, and compiled here for a v6e and this CPU."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

import streamjax as sj
from benchmarks import aot
from benchmarks.backprop.compile_case import Case, compile_case
from benchmarks.backprop.memory_model import POINTS, load
from benchmarks.model_shapes import SHAPES
from streamjax.training.backprop.planning.memory_model import estimate
from tests.covering import rest_slow

CONFIG = sj.UniformConfig(
    vocab_size=512, d_model=256, num_layers=8, num_heads=4, num_kv_heads=2, head_dim=64, mlp_dim=768,
    tie_embeddings=True,
)  # fmt: skip
QWEN = SHAPES["qwen3-8b"]


def test_every_case_was_compiled():
    assert set(load()) == set(POINTS)


@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.key)
def test_the_model_is_near_a_tpu_compiler(point):
    figures = load()[point]
    found = point.estimate()
    assert found.device_bytes == pytest.approx(figures["peak"], rel=0.15)
    assert found.host_bytes == pytest.approx(figures.get("host_temp", 0), rel=0.15)
    assert sum(found.parts.values()) == found.device_bytes


@pytest.mark.parametrize(
    "arguments",
    rest_slow(
        [
            {"method": "layer", "chunk_size": 1024},
            {"method": "layer", "chunk_size": 1024, "segment": 4},
            {"method": "chunk", "chunk_size": 1024},
            {"method": "remat"},
            {"method": "full"},
        ],
        {"method": "chunk", "chunk_size": 1024},
    ),
    ids=lambda arguments: "-".join(map(str, arguments.values())),
)
def test_the_model_is_near_the_cpu_compiler(arguments):
    model = jax.eval_shape(lambda: sj.Decoder(CONFIG, jax.random.key(0), dtype=jnp.float32, scan_layers=True))
    batch = {name: jax.ShapeDtypeStruct((1, 16384), jnp.int32) for name in ("tokens", "targets")}
    batch["weights"] = jax.ShapeDtypeStruct((1, 16384), jnp.float32)
    arguments = {"logits_chunk": 1024, **arguments}
    compiled = jax.jit(partial(sj.training.loss_and_grad, **arguments)).lower(model, batch).compile()
    memory = compiled.memory_analysis()
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    found = estimate(
        CONFIG, batch_size=1, length=16384, dtype=jnp.float32, param_dtype=jnp.float32, platform="cpu", **arguments
    )
    assert found.device_bytes == pytest.approx(peak - memory.alias_size_in_bytes, rel=0.15)


@pytest.mark.skipif(not aot.available(), reason="no TPU compiler: `make test` or `make aot-compilers` installs it")
@pytest.mark.slow
@pytest.mark.parametrize("method", ["layer", "chunk"])
def test_the_model_is_near_a_tpu_compiler_now(method):
    """Recorded figures are of the code as it was. Shorter sequences would lie in part in the chip's fast memory."""
    config = sj.UniformConfig(
        vocab_size=4096, d_model=512, num_layers=4, num_heads=4, num_kv_heads=4, head_dim=128, mlp_dim=1536
    )
    arguments = {"method": method, "chunk_size": 1024, "logits_chunk": 1024}
    figures = compile_case(Case(config, "v6e:1x1", 131072, arguments))
    found = estimate(config, batch_size=1, length=131072, **arguments)
    assert found.device_bytes == pytest.approx(figures["peak"], rel=0.15)


METHODS = [
    {"method": "full"},
    {"method": "remat"},
    {"method": "layer"},
    {"method": "layer", "segment": 3},
    {"method": "layer", "keep_attention": True},
    {"method": "layer", "offload": "host", "offload_fraction": 0.5},
    {"method": "chunk"},
]


@pytest.mark.parametrize("arguments", METHODS, ids=lambda arguments: "-".join(map(str, arguments.values())))
@pytest.mark.parametrize("name", SHAPES)
def test_longer_sequences_and_more_rows_need_more(name, arguments):
    def bytes_of(length, rows=1):
        return estimate(SHAPES[name], batch_size=rows, length=length, **arguments).device_bytes

    sizes = [bytes_of(length) for length in (8192, 16384, 16385, 65536, 262144)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[1] < sizes[-1]
    assert bytes_of(16384, 2) > bytes_of(16384)


def slope(config, **arguments):
    """Bytes on the device per token of one row."""
    low, high = (estimate(config, batch_size=1, length=n, **arguments).device_bytes for n in (2**18, 2**19))
    return (high - low) / 2**18


def test_bytes_per_token_of_the_orders_by_hand():
    states, keys = 2 * QWEN.d_model, 2 * 2 * QWEN.num_kv_heads * QWEN.head_dim  # bf16
    both = 36 * states + keys + 2 * keys + 12  # 35 inputs and the cotangent; KV and their float32 gradients; the batch
    assert slope(QWEN, method="layer") == both
    assert slope(QWEN, method="layer", segment=6) == 11 * states + 3 * keys + 12
    assert slope(QWEN, method="layer", offload="host") == states + 3 * keys + 12
    found = 36 * 4 * QWEN.num_heads * (QWEN.head_dim + 1)  # float32, and the sum of the softmax
    assert slope(QWEN, method="layer", keep_attention=True) == both + found
    assert slope(QWEN, method="chunk") == 36 * 3 * keys + 12
    assert slope(QWEN, method="chunk", kv_grad_dtype=jnp.bfloat16) == 36 * 2 * keys + 12


def test_windowed_layers_keep_keys_a_window_a_chunk_and_the_gradients_of_one_window():
    config = SHAPES["gemma-3-4b"]
    keys = 2 * 2 * config.num_kv_heads * config.head_dim
    full = sum(window is None for window in config.windows)
    assert slope(config, method="chunk", chunk_size=2048) == full * 3 * keys + (34 - full) * keys / 2 + 12
    assert slope(config, method="chunk", chunk_size=8192) == full * 3 * keys + (34 - full) * keys / 8 + 12
    assert slope(config, method="chunk", chunk_size=512) == full * 3 * keys + (34 - full) * keys + 12  # W > C: all


def test_what_is_moved_to_the_host_leaves_the_device():
    def of(fraction):
        return estimate(QWEN, batch_size=1, length=2**18, method="layer", offload="host", offload_fraction=fraction)

    half, whole = of(0.5), of(1.0)
    assert whole.host_bytes == 2 * half.host_bytes == 36 * 2**18 * 2 * QWEN.d_model
    assert half.device_bytes - whole.device_bytes == half.host_bytes


def test_constants_get_no_gradient_and_split_parameters_a_share():
    whole = estimate(QWEN, batch_size=1, length=16384, method="layer")
    frozen = estimate(QWEN, batch_size=1, length=16384, method="layer", trained=0.0)
    split = estimate(QWEN, batch_size=1, length=16384, method="layer", shards=4)
    assert frozen.device_bytes < whole.device_bytes - whole.parts["gradients"]
    assert split.parts["weights"] == whole.parts["weights"] // 4


def test_an_order_without_an_estimate_is_refused():
    with pytest.raises(ValueError, match="no estimate for method 'auto'; use one of full, remat, layer, chunk"):
        estimate(QWEN, batch_size=1, length=128, method="auto")
