"""Model folders with changes that chance has made: they load as before, or are refused in one line."""

import random
import shutil
import time

import jax
import numpy as np
import pytest

import streamjax as sj
from tests.commands.conftest import model_folder  # noqa: F401  (a fixture)

FEW, MANY = 500, 5_000  # of each file
SLOW = 20.0  # seconds after which a file counts as one that hangs
PIECES = [
    b"-1",
    b"0",
    b"1e999",
    b"NaN",
    b"null",
    b"[]",
    b"{}",
    b'"x"',
    b"9" * 40,
    b"true",
    b"\xff",
    b"\x00",
    b"[" * 5000,
]


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One change: a byte, a cut, something put in, or a stretch taken out."""
    at = rng.randrange(len(data))
    match rng.randrange(4):
        case 0:
            return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        case 1:
            return data[:at]
        case 2:
            return data[:at] + rng.choice(PIECES) + data[at + rng.randrange(4) :]
    return data[:at] + data[at + rng.randrange(1, 40) :]


@pytest.fixture
def folder(model_folder, tmp_path):  # noqa: F811
    """Without checksums, which would refuse every change before it is read."""
    folder = shutil.copytree(model_folder, tmp_path / "model")
    (folder / "checksums.json").unlink()
    return folder


def load(folder):
    """The model, or what a user is told; any other error is the test's."""
    try:
        return sj.load(folder), ""
    except (ValueError, OSError) as error:
        return None, str(error)


@pytest.mark.parametrize("draws", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_changed_file_is_read_or_refused_in_one_line(folder, name, draws):
    file = folder / name
    whole = file.read_bytes()
    head = len(whole) if name == "config.json" else 8 + int.from_bytes(whole[:8], "little")
    expected = jax.tree.leaves(sj.load(folder))
    rng = random.Random(0)
    refused = 0
    for draw in range(draws):
        changed = mutate(whole[:head], rng) + whole[head:]
        file.write_bytes(changed)
        since = time.monotonic()
        model, message = load(folder)
        assert time.monotonic() - since < SLOW, (draw, changed[:600])
        assert (model is None) == (len(message.splitlines()) == 1), (draw, message, changed[:600])
        refused += model is None
        if model is not None and name == "model.safetensors":
            for found, value in zip(jax.tree.leaves(model), expected, strict=True):
                np.testing.assert_array_equal(found, value, err_msg=f"draw {draw}")
    assert refused
