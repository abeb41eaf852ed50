"""Patterns of module names: what `re` matches by PEFT's rule, and never for long."""

import re
import time

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from streamjax.models.files.module_patterns import matches, matching_key, names_module

pytestmark = pytest.mark.quick
NAME = "model.layers.11.self_attn.q_proj"


def by_peft(pattern, name):
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj", "proj", "self_attn.q_proj", NAME, f"^{re.escape(NAME)}$", r"layers\.\d+\..*q_proj", "",
        r"layers\.(1|11)\.self_attn\.[qv]_proj", r"layers\.1{2}\..+", r"layers\.1{3,}\..+", r".*?", r"^q_proj",
        r"(layers\.\d+\.)?self_attn\.q_proj", r"[^.]*", r"(?:self_attn|mlp)\.\w+", r"(k|v)_proj", "_proj",
    ],
)  # fmt: skip
def test_patterns_that_people_write(pattern):
    for name in (NAME, "q_proj", "model.layers.1.mlp.up_proj", "lm_head"):
        assert matches(pattern, name) == by_peft(pattern, name), name


ATOMS = st.sampled_from(["a", "b", r"\.", ".", "[ab]", "[^a]", r"\d", r"\w", "1", "_", "^", "$"])
REPEATS = st.sampled_from(["", "", "*", "+", "?", "*?", "{2}", "{1,3}", "{2,}"])
PIECES = st.tuples(ATOMS.filter(lambda atom: atom not in "^$"), REPEATS).map("".join) | st.sampled_from("^$")
FLAT = st.lists(PIECES, max_size=4).map("".join)
GROUPS = st.tuples(FLAT, FLAT).map(lambda two: f"({two[0]}|{two[1]})")
PATTERNS = st.lists(FLAT | GROUPS | st.tuples(GROUPS, REPEATS).map("".join), max_size=3).map("".join)


@settings(max_examples=400, deadline=None)
@given(pattern=PATTERNS, name=st.text("ab.1_", max_size=12))
def test_the_same_names_match_as_in_re(pattern, name):
    try:
        found = matches(pattern, name)
    except ValueError as error:
        assume("within a repetition" not in str(error))
        raise
    assert found == by_peft(pattern, name)


@pytest.mark.parametrize(
    "pattern",
    ["(.*.*)" * 60 + "X", ".?" * 240 + "X", "(a|a|.)" * 70 + "X", ".*" * 240, "(.|.){1000}X", "(((.*))).*.*.*.*X"],
)  # fmt: skip
def test_no_pattern_takes_long(pattern):
    start = time.process_time()
    matches(pattern, "model." + "a" * 60)
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    "pattern",
    [
        "(((", "*", "a)", "(a", "[a", r"(([a-z0-9_.])*)*X", "(a+)+", "a**", "a*+", r"(a)\1", r"\bq", "(?=q)", "(?i)q",
        "{", "a{3,2}", "a{9999}", "a" * 2000, "(" * 200 + ")" * 200, "\\",
    ],
)  # fmt: skip
def test_what_is_refused_is_told_in_a_line(pattern):
    with pytest.raises(ValueError, match=r"^the pattern ") as caught:
        matches(pattern, NAME)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


def test_the_first_pattern_counts():
    assert matching_key({"v_proj": 1, "layers.11.*": 2, "q_proj": 3}, NAME) == "layers.11.*"
    assert matching_key({"proj": 1}, NAME) is None
    assert names_module(["k_proj", "q_proj"], NAME)
    assert not names_module(["_proj"], NAME)
