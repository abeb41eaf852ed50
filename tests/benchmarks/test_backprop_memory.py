"""Gradient steps compiled for a v6e that is not there, and the lines that are drawn through what they need."""

import pytest

import streamjax as sj
from benchmarks import aot
from benchmarks.backprop.compile_case import FULL_LOGITS, Case, compile_case
from benchmarks.backprop.memory import STEP, find_longest, fit_line
from benchmarks.model_shapes import PARAMETERS, SHAPES

CONFIG = sj.UniformConfig(
    vocab_size=32768, d_model=256, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=128, mlp_dim=512
)
compiled = pytest.mark.skipif(not aot.available(), reason="no TPU compiler: `make aot-compilers` installs it")


def case(length: int, **arguments: str | int) -> Case:
    return Case(CONFIG, "v6e:1x1", length, arguments)


@compiled
@pytest.mark.slow
def test_the_baselines_differ_by_the_logits():
    full, remat = compile_case(case(4096, **FULL_LOGITS)), compile_case(case(4096, method="remat", logits_chunk=512))
    logits = 4 * 4096 * CONFIG.vocab_size
    assert full["fits"]
    assert remat["fits"]
    assert logits < full["temp"] < 1.2 * logits  # once
    assert remat["temp"] < 0.4 * logits  # an eighth of them, and the layers'
    assert remat["argument"] == pytest.approx(2 * CONFIG.parameter_count + 3 * 4 * 4096, rel=0.01)
    assert remat["output"] == pytest.approx(2 * CONFIG.parameter_count, rel=0.01)
    assert remat["peak"] == remat["argument"] + remat["output"] - remat["alias"] + remat["temp"]
    known = remat["program"]
    assert compile_case(case(4096, method="remat", logits_chunk=512), known) == {"program": known}


@compiled
@pytest.mark.slow
def test_a_refused_program_says_what_it_needs():
    length = 2**19
    refused = compile_case(case(length, **FULL_LOGITS))
    assert not refused["fits"]
    assert refused["peak"] > 4 * length * CONFIG.vocab_size


@pytest.mark.slow
@compiled
def test_an_error_is_not_taken_for_a_lack_of_memory():
    with pytest.raises(RuntimeError, match="unknown backprop method"):
        compile_case(case(128, method="none"))


def test_a_case_survives_json():
    long = Case(SHAPES["gemma-3-4b"], "h100", 4096, {"method": "layer", "chunk_size": 2048}, batch=2)
    assert Case.from_json(long.to_json()) == long


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_have_the_published_number_of_parameters(name):
    assert SHAPES[name].parameter_count == PARAMETERS[name]


def figures(length: int, memory: float, fixed: float = 1e9, slope: float = 1e5, estimate: float = 1.0) -> dict:
    """What a compiler would say that refuses programs beyond `memory`, and overstates what those need."""
    peak = fixed + slope * length
    return {"fits": peak <= memory, "peak": peak if peak <= memory else peak * estimate}


def test_a_line_goes_through_what_fits():
    line = fit_line({length: figures(length, 4.5e9, estimate=1.3) for length in (16384, 32768, 65536)})
    assert line is not None
    assert line.between == (16384, 32768)
    assert line.exact
    assert line.slope == pytest.approx(1e5)
    assert line.fixed == pytest.approx(1e9)
    assert line.longest(int(4.5e9)) == 34 * STEP  # 35,000 tokens


def test_a_line_through_refusals_is_not_exact():
    line = fit_line({length: figures(length, 2e9) for length in (16384, 32768, 65536)})
    assert line is not None
    assert not line.exact
    assert line.between == (16384, 65536)
    assert fit_line({16384: figures(16384, 2e9)}) is None


@pytest.mark.parametrize(("memory", "curve"), [(4.5e9, 1.0), (4.5e9, 1.2), (20e9, 1.0), (20e9, 1.2), (1.05e9, 1.0)])
def test_the_longest_sequence_was_compiled_and_fits(memory, curve):
    """Within 10%, also where memory beyond 64K tokens grows faster than the line and the compiler overstates it."""

    def figures_of(length: int) -> dict:
        return figures(length, memory, slope=1e5 if length <= 65536 else curve * 1e5, estimate=1.1)

    asked = {}

    def compile_one(length: int) -> dict:
        asked[length] = figures_of(length)
        return asked[length]

    known = {length: compile_one(length) for length in (16384, 32768, 65536)}
    line = fit_line(known)
    assert line is not None
    longest = find_longest(compile_one, line, known, int(memory), attempts=4)
    assert longest == max((length for length, found in asked.items() if found["fits"]), default=0)
    assert longest % STEP == 0
    assert len(asked) <= 7
    true = max((length for length in range(STEP, 2**18, STEP) if figures_of(length)["fits"]), default=0)
    assert 0.9 * true - STEP <= longest <= true


def test_nothing_fits():
    known = {length: figures(length, 1e6) for length in (16384, 65536)}
    line = fit_line(known)
    assert line is not None
    assert find_longest(lambda length: figures(length, 1e6), line, known, int(1e6)) == 0
