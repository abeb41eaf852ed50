"""The chips' own compilers take the kernels, at known models' shapes; `benchmarks/kernels_aot.py` does all of them."""

import pytest

from benchmarks import aot
from benchmarks.kernels_aot import HOPPER, Case, compile_case
from pallas_kernels.gpu import hopper


@pytest.mark.parametrize(
    "case",
    [
        Case("v5e", "llama-3.1-8b", "sinks", 4096),
        Case("v6e", "gemma-3-4b", "local", 4096),
        Case("v5p", "qwen2.5-0.5b", "packed", 4096),
    ],
    ids=lambda case: "-".join(map(str, case)),
)
@pytest.mark.skipif(not aot.available(), reason="no compiler for TPUs: `make test` installs it")
def test_tpus_take_the_kernels(case):
    found = compile_case(case)
    assert found["kernels"] == {"flash_forward": 1, "flash_query_gradients": 1, "flash_key_gradients": 1}


@pytest.mark.skipif(not aot.available(), reason="no compiler for TPUs: `make test` installs it")
def test_a_tpu_takes_the_decoding_kernel():
    assert compile_case(Case("v5e", "llama-3.1-8b", "decode-int8", 8192))["kernels"] == {"decode_attention": 1}
    assert compile_case(Case("v5e", "gemma-3-4b", "paged", 8192))["kernels"] == {"paged_attention": 1}


@pytest.mark.parametrize("model", ["llama-3.1-8b", "gemma-3-4b"])
@pytest.mark.skipif(not aot.available("cuda"), reason="no compiler for GPUs: `make aot` installs it")
def test_an_h100_takes_the_kernels(model):
    names = "flash_forward", "flash_query_gradients", "flash_key_gradients", "flash_sink_gradients"
    assert compile_case(Case("h100", model, "sinks", 4096))["kernels"] == dict.fromkeys(names, 1)


@pytest.mark.parametrize("pattern", HOPPER)
@pytest.mark.skipif(not aot.available("cuda"), reason="no compiler for GPUs: `make aot` installs it")
@pytest.mark.skipif(not hopper.available(), reason="this JAX has not what the Hopper kernel is written with")
def test_an_h100_takes_the_hopper_kernel(pattern):
    names = ["flash_forward_hopper", "flash_query_gradients", "flash_key_gradients"]
    names += ["flash_sink_gradients"] if pattern == "hopper-sinks" else []
    assert compile_case(Case("h100", "gemma-3-4b", pattern, 4096))["kernels"] == dict.fromkeys(names, 1)


@pytest.mark.skipif(not aot.available("cuda"), reason="no compiler for GPUs: `make aot` installs it")
def test_an_h100_takes_the_decoding_kernels():
    assert compile_case(Case("h100", "llama-3.1-8b", "decode-int4", 8192))["kernels"] == {"decode_attention": 1}
    assert compile_case(Case("h100", "gemma-3-4b", "paged", 8192))["kernels"] == {"paged_attention": 1}


@pytest.mark.parametrize(
    ("chip", "names"),
    [
        ("v5e", ("hsa_forward", "hsa_backward")),
        ("h100", ("hsa_forward", "hsa_query_gradients", "hsa_key_gradients")),
    ],
)
def test_chips_take_the_kernels_of_hierarchical_attention(chip, names):
    if not aot.available("cuda" if chip == "h100" else "tpu"):
        pytest.skip("no compiler for it: `make aot` installs it")
    assert compile_case(Case(chip, "qwen2.5-0.5b", "hsa", 4096))["kernels"] == dict.fromkeys(names, 1)
