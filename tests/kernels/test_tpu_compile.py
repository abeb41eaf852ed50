"""The TPU's own compiler takes the kernels, at shapes of known models; `benchmarks/kernels_aot.py` does all of them."""

import pytest

from benchmarks import aot
from benchmarks.kernels_aot import Case, compile_case

pytestmark = pytest.mark.skipif(not aot.available(), reason="no compiler for TPUs: `make test` installs it")


@pytest.mark.parametrize(
    "case",
    [
        Case("v5e", "llama-3.1-8b", "sinks", 4096),
        Case("v6e", "gemma-3-4b", "local", 4096),
        Case("v5p", "qwen2.5-0.5b", "packed", 4096),
    ],
    ids=lambda case: "-".join(map(str, case)),
)
def test_compiles(case):
    found = compile_case(case)
    assert found["kernels"] == {"flash_forward": 1, "flash_query_gradients": 1, "flash_key_gradients": 1}
