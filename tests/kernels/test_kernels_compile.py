"""The chips' own compilers take the kernels, at known models' shapes; `kernels/compile_all.py` does all of them."""

import json
import subprocess
import sys

import pytest

from benchmarks import aot
from benchmarks.kernels import coded_traffic
from benchmarks.kernels.compile_all import cells, grouped, loops, temporaries
from benchmarks.kernels.compile_case import HOPPER, Case, compile_case
from benchmarks.kernels.gpu import machine_code
from benchmarks.kernels.schedules import recurrence
from pallas_kernels.gpu.hopper import attention as hopper_attention
from tests.covering import rest_slow

# A compiler is a process, of 3 seconds: the ordinary run asks for the kernels that read codes, which have most in them.
DECODING = [
    ("llama-3.1-8b", "decode-int8", "decode_attention"),
    ("gemma-3-4b", "paged", "paged_attention"),
    ("llama-3.1-8b", "pool", "pool_attention"),
    ("llama-3.1-8b", "pool-shared", "shared_pool_attention"),
    ("llama-3.1-8b", "decode-codes", "decode_attention"),
    ("llama-3.1-8b", "paged-codes", "paged_attention"),
]


def calls(*case):
    """How often the compiled program calls each kernel."""
    found = compile_case(Case(*case))
    unit = "shared" if case[0] == "h100" else "vmem"
    assert all(kernel[unit] > 0 for name, kernel in found["kernels"].items() if "hopper" not in name)
    return {name: kernel["count"] for name, kernel in found["kernels"].items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        Case("v5e", "llama-3.1-8b", "sinks", 4096),
        pytest.param(Case("v6e", "gemma-3-4b", "local", 4096), marks=pytest.mark.slow),
        pytest.param(Case("v5p", "qwen2.5-0.5b", "packed", 4096), marks=pytest.mark.slow),
    ],
    ids=lambda case: "-".join(map(str, case)),
)
@pytest.mark.skipif(not aot.available(), reason="no compiler for TPUs: `make test` installs it")
def test_tpus_take_the_kernels(case):
    assert calls(*case) == {"flash_forward": 1, "flash_query_gradients": 1, "flash_key_gradients": 1}


@pytest.mark.skipif(not aot.available(), reason="no compiler for TPUs: `make test` installs it")
@pytest.mark.parametrize("case", rest_slow(DECODING, DECODING[-1]), ids="-".join)
def test_a_tpu_takes_the_decoding_kernel(case):
    model, name, kernel = case
    assert calls("v5e", model, name, 8192) == {kernel: 1}


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e", pytest.param("v5p", marks=pytest.mark.slow)])
@pytest.mark.skipif(not aot.available(), reason="no compiler for TPUs: `make test` installs it")
def test_tpus_take_the_kernels_of_losses(chip):
    assert calls(chip, "llama-3.1-8b", "tokens", 4096) == {"token_stats_forward": 1, "token_stats_backward": 1}


@pytest.mark.slow
@pytest.mark.parametrize("model", rest_slow(["llama-3.1-8b", "gemma-3-4b"], "llama-3.1-8b"))
@pytest.mark.skipif(not aot.available("cuda"), reason="no compiler for GPUs: `make aot-compilers` installs it")
def test_an_h100_takes_the_kernels(model):
    names = "flash_forward", "flash_query_gradients", "flash_key_gradients", "flash_sink_gradients"
    assert calls("h100", model, "sinks", 4096) == dict.fromkeys(names, 1)


@pytest.mark.slow
@pytest.mark.parametrize("model", rest_slow(["llama-3.1-8b", "gemma-3-4b"], "llama-3.1-8b"))
@pytest.mark.skipif(not machine_code.tool("nvdisasm"), reason="no disassembler: `make aot-compilers` installs it")
def test_an_h100s_tensor_cores_have_more_to_do_than_the_rest(model):
    """Two warps in turn on a part of a multiprocessor: what is not products hides behind the other's products."""
    kernels = compile_case(Case("h100", model, "full", 4096))["kernels"]
    names = ["flash_forward", "flash_query_gradients"] + ["flash_key_gradients"] * (model == "llama-3.1-8b")
    for loop in (kernels[name]["loop"] for name in names):
        assert max(loop["instructions"], loop["special"]) < 0.75 * loop["tensor"]


@pytest.mark.parametrize("pattern", HOPPER)
@pytest.mark.skipif(not aot.available("cuda"), reason="no compiler for GPUs: `make aot-compilers` installs it")
@pytest.mark.skipif(not hopper_attention.available(), reason="this JAX does not compile the Hopper kernel")
def test_an_h100_takes_the_hopper_kernel(pattern):
    names = ["flash_forward_hopper", "flash_query_gradients", "flash_key_gradients"]
    names += ["flash_sink_gradients"] if pattern == "hopper-sinks" else []
    assert calls("h100", "gemma-3-4b", pattern, 4096) == dict.fromkeys(names, 1)


@pytest.mark.slow
@pytest.mark.skipif(not aot.available("cuda"), reason="no compiler for GPUs: `make aot-compilers` installs it")
@pytest.mark.parametrize("case", DECODING, ids="-".join)
def test_an_h100_takes_the_decoding_kernels(case):
    model, name, kernel = case
    assert calls("h100", model, name.replace("int8", "int4"), 8192) == {kernel: 1}


OF_BFLOAT16 = {"int4": 0.30, "fp8": 0.51, "fireq": 0.29, "k_sort": 0.31, "gear": 0.24, "vidkv": 0.16, "cq": 0.17}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chip", "slots"),
    [
        *((chip, slots) for chip in coded_traffic.SHOWN for slots in OF_BFLOAT16),
        *(("v5p", "cq"), ("v6e", "cq"), ("v6e", "vidkv")),
        pytest.param(
            "v5p", "vidkv", marks=pytest.mark.xfail(strict=True, reason="26 bytes a slot lie with heads inside there")
        ),
    ],
)
def test_a_step_moves_what_codes_take(chip, slots):
    """At most what the codec says and a tenth more."""
    if not aot.available(aot.TOPOLOGIES[coded_traffic.CHIPS[chip]].platform):
        pytest.skip(f"no compiler for {chip}: `make aot-compilers` installs it")
    exact, coded = (coded_traffic.compiled(chip, name) for name in ("bfloat16", slots))
    assert coded["kernel"]
    assert coded["moved"] <= min(OF_BFLOAT16[slots] * exact["moved"], 1.1 * coded["stored"])
    if chip not in coded_traffic.SHOWN:
        return  # where a new token is written, their compiler lays codes out otherwise, and copies them
    # Of GEAR what makes a group's factors, of CQ a token's distances to all entries.
    assert coded["copied"] < {"gear": 0.06, "cq": 0.1}.get(slots, 0.02) * exact["moved"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chip", "names"),
    [
        ("v5e", ("hsa_forward", "hsa_backward")),
        ("h100", ("hsa_forward", "hsa_query_gradients", "hsa_key_gradients")),
    ],
)
def test_chips_take_the_kernels_of_hierarchical_attention(chip, names):
    if not aot.available("cuda" if chip == "h100" else "tpu"):
        pytest.skip("no compiler for it: `make aot-compilers` installs it")
    assert calls(chip, "qwen2.5-0.5b", "hsa", 4096) == dict.fromkeys(names, 1)


def test_tables_group_what_is_the_same():
    def figures(vmem):
        kernel = {"count": 1, "vmem": vmem, "vmem_spills": 0}
        return {"seconds": 1.0, "temp": 5_000_000, "kernels": {"decode_attention": kernel}}

    found = {
        f"{chip}/llama-3.1-8b/{case}/8192": figures(2**20) for chip in ("v5e", "v5p") for case in ("decode", "paged")
    }
    found["v6e/llama-3.1-8b/decode/8192"] = figures(2**21)
    found["v6e/llama-3.1-8b/paged/8192"] = {"refused": "it does not fit"}
    chips = ["v5e", "v5p", "v6e"]
    lines = grouped(found, chips, cells)
    assert [(x["chips"], x["cases"], x["llama-3.1-8b, qwen3-8b"]) for x in lines] == [
        ("v5e, v5p", "decode, paged", "1.00"),
        ("v6e", "decode", "2.00"),
    ]
    lines = grouped(found, chips, temporaries)
    assert [(x["chips"], x["cases"], x["llama-3.1-8b, qwen3-8b"]) for x in lines] == [
        ("v5e, v5p, v6e", "decode", "5.0"),
        ("v5e, v5p", "paged", "5.0"),
        ("v6e", "paged", "refused"),
    ]
    gpu = {"count": 1, "shared": 98304, "threads": 128}
    assert cells("h100", {"temp": 0, "kernels": {"decode_attention": gpu}}) == {"decode_attention": "? / ? / 96"}
    flash = {"loop": {"instructions": 343, "tensor": 512, "special": 272}}
    both = {"temp": 0, "kernels": {"decode_attention": gpu, "flash_forward": flash}}
    assert loops("h100", both) == {"flash_forward": "343 / 512 / 272"}
    assert cells("h100", {"refused": "no"}) == loops("h100", {"refused": "no"}) == {}


RECURRENCE = "import sys; from benchmarks.kernels.schedules import recurrence as r; r.compile_for(*sys.argv[1:], '')"


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e", "h100"])
@pytest.mark.parametrize("model", ["Qwen3-Next 80B", "Mamba-2 1.3B", "Codestral Mamba", "Kimi-Linear 48B"])
def test_chips_take_the_kernels_of_recurrences(chip, model):
    """Forwards and backwards, at published shapes."""
    if not aot.available("cuda" if chip == "h100" else "tpu"):
        pytest.skip("no compiler for it: `make aot-compilers` installs it")
    command = [sys.executable, "-c", RECURRENCE, chip, model]
    environment = aot.child_environment(recurrence.CHIPS[chip])
    done = subprocess.run(command, env=environment, cwd=aot.ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1])["temporaries, MB"] < 1000
