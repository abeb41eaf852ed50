"""JSON without NaN and infinity, whatever is written."""

import json
import math

from hypothesis import given
from hypothesis import strategies as st

from streamjax.checkpoints.plain_json import to_json

LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)


def refuse(name):
    raise AssertionError(name)


@given(VALUES, st.sampled_from([None, 1]))
def test_what_is_not_finite_is_null_and_all_else_as_it_was(values, indent):
    def expected(value):
        if isinstance(value, dict):
            return {key: expected(item) for key, item in value.items()}
        if isinstance(value, list):
            return [expected(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    assert json.loads(to_json(values, indent), parse_constant=refuse) == expected(values)
