"""DataConfig refuses what cannot be read."""

import dataclasses
from typing import Any

import pytest

from streamjax.data import DataConfig

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("packing", "both"),
        ("seq_len", 1),
        ("batch_size", 0),
        ("shuffle_tokens", -1),
        ("num_workers", -1),
        ("prefetch", -1),
        ("epochs", 0),
        ("shuffle_seed", -1),
        ("shuffle_seed", 2**32),
    ],
)
def test_a_bad_field_is_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^DataConfig\.{field} is '?{value}'?: [^\n]+$"):
        dataclasses.replace(DataConfig(), **{field: value})


def test_frozen_with_defaults() -> None:
    config = DataConfig()
    assert (config.source, config.packing, config.bos_each_row, config.epochs) == ("builtin", "concat", True, None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seq_len = 5  # type: ignore[misc]
    assert hash(config) == hash(DataConfig())
