"""Model folders that were changed, damaged or made up: one line and at once, or exactly the model that was saved."""

import json
import os
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import streamjax as sj
from streamjax.models import UniformConfig
from streamjax.models.files import hugging_face
from streamjax.models.files.safetensors_files import StoredTensor
from tests.models.random_decoders import random_decoder

pytestmark = [pytest.mark.quick, pytest.mark.filterwarnings("ignore:config.json has fields")]
CONFIG = UniformConfig(
    vocab_size=64, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48, tie_embeddings=True
)
SAVES = {"hf": sj.save_hf, "native": sj.save_safetensors, "orbax": sj.save}


@pytest.fixture(scope="module")
def model():
    return random_decoder(CONFIG)


@pytest.fixture(scope="module")
def folders(model, tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    for name, save in SAVES.items():
        save(model, root / name)
    sj.save_hf(model, root / "shards", max_shard_size=20_000)
    sj.save_lora(adapted(model), root / "adapters")
    return root


def adapted(model):
    return sj.add_lora(model, 4, 8.0, ["q", "down"], jax.random.key(0))


def same(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return a.config == b.config and all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in leaves)


def refused(folder, message, seconds=20.0):
    start = time.process_time()
    with pytest.raises(ValueError, match=message) as caught:
        sj.load(folder)
    assert time.process_time() - start < seconds
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("kind", [*SAVES, "shards", "adapters"])
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_a_flipped_bit_is_never_another_model(folders, model, kind, data):
    file = data.draw(st.sampled_from(sorted(file for file in (folders / kind).rglob("*") if file.is_file())))
    before = file.read_bytes()
    place = data.draw(st.integers(0, 8 * len(before) - 1))
    content = bytearray(before)
    content[place // 8] ^= 1 << place % 8
    file.write_bytes(content)
    message = str(folders)
    try:
        if kind == "adapters":
            assert same(sj.load_lora(model, folders / kind), adapted(model))
        else:
            assert same(sj.load(folders / kind), model)
    except ValueError as error:
        message = str(error)
    finally:
        file.write_bytes(before)
    assert str(folders) in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["hf", "native"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_what_nobody_checks_is_loaded_or_refused_in_one_line(folders, kind, name, data):
    """A few bytes of a file without a manifest are others: a model, or a ValueError."""
    folder = folders / f"unchecked_{kind}"
    shutil.copytree(folders / kind, folder, dirs_exist_ok=True)
    (folder / "checksums.json").unlink()
    content = bytearray((folder / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, min(len(content), 2500) - 1))] = data.draw(
            st.integers(0, 255) | st.sampled_from(b'0123456789e-[]{}":,')
        )
    (folder / name).write_bytes(content)
    try:
        sj.load(folder)
    except ValueError as error:
        assert "\n" not in str(error)  # noqa: PT017  both outcomes are right
        assert str(folder) in str(error)  # noqa: PT017


@pytest.mark.parametrize("kind", ["hf", "native"])
def test_a_change_is_refused_and_a_users_own_files_are_not(folders, model, kind, tmp_path):
    folder = shutil.copytree(folders / kind, tmp_path / "m")
    (folder / "README.md").write_text("mine")
    (folder / "tokenizer_config.json").write_text("{}")
    assert same(sj.load(folder), model)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace("10000.0", "20000.0"))
    refused(folder, r"config\.json has changed since it was saved .* if the change is meant, delete checksums\.json")
    (folder / "checksums.json").unlink()
    assert sj.load(folder).config.blocks[0].mixer.rope.theta == 20000.0
    (folder / "config.json").unlink()
    refused(folder, "no model at")


@pytest.mark.parametrize("kind", ["hf", "native"])
def test_what_is_done_to_a_file_later_does_not_reach_the_model(folders, model, kind, tmp_path):
    """Also where the data happen to lie so that JAX could take them as they are."""
    folder = shutil.copytree(folders / kind, tmp_path / "m")
    file = folder / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].rstrip()
    header += b" " * (-(8 + len(header)) % 64)
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    (folder / "checksums.json").unlink()
    loaded = sj.load(folder)
    with file.open("r+b") as stream:
        stream.seek(8 + len(header))
        stream.write(bytes(len(content) - 8 - length))
    os.truncate(file, 100)
    assert same(loaded, model)


@pytest.mark.parametrize("kind", ["hf", "native", "adapters"])
def test_a_file_that_is_cut_while_it_is_read(folders, model, kind, tmp_path, monkeypatch):
    """A map of the file would end the process."""
    shutil.copytree(folders / kind, tmp_path / "m")
    file = next((tmp_path / "m").glob("*.safetensors"))
    module, name = (hugging_face, "_read") if kind == "hf" else (StoredTensor, "read")
    read = getattr(module, name)

    def cut_and_read(*arguments):
        os.truncate(file, 10)
        return read(*arguments)

    monkeypatch.setattr(module, name, cut_and_read)
    with pytest.raises(ValueError, match=rf"^{file} has become shorter while tensor '[\w.]+' was read$"):
        sj.load_lora(model, file.parent) if kind == "adapters" else sj.load(file.parent)


def replace(folder, name, kind):
    (folder / name).unlink()
    if kind == "pipe":
        os.mkfifo(folder / name)
    elif kind == "device":
        (folder / name).symlink_to("/dev/zero")
    else:
        (folder / name).mkdir()


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "chat_template.jinja"]
)
def test_what_is_no_file_is_refused_at_once(folders, tmp_path, name, kind):
    folder = shutil.copytree(folders / "hf", tmp_path / "m")
    (folder / name).touch()
    (folder / "checksums.json").unlink()
    replace(folder, name, kind)
    if name in ("tokenizer.json", "chat_template.jinja"):
        with pytest.raises(ValueError, match=rf"{name} is a {kind}: a file is needed"):
            sj.load_tokenizer(folder)
    else:
        refused(folder, rf"{name} is a {kind}: a file is needed")


@pytest.mark.parametrize("kind", ["hf", "native", "orbax"])
@pytest.mark.parametrize("field", ["num_layers", "num_heads", "num_kv_heads", "head_dim", "vocab_size", "mlp_dim"])
@pytest.mark.parametrize("value", [10**9, 10**30])
def test_a_config_that_asks_for_more_than_there_is(folders, tmp_path, kind, field, value):
    folder = shutil.copytree(folders / kind, tmp_path / "m")
    (folder / "checksums.json").unlink()
    names = {"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads", "mlp_dim": "intermediate_size"}
    names |= {"num_kv_heads": "num_key_value_heads"}
    file = folder / ("about/metadata" if kind == "orbax" else "config.json")
    values = json.loads(file.read_text())
    if kind == "hf":
        values[names.get(field, field)] = value
    else:
        values["model"][field] = value
    file.write_text(json.dumps(values))
    refused(folder, ".")


MADE_UP = {
    "deep": ('{"a":' * 100_000, "nests too deeply"),
    "long": ('{"vocab_size": ' + "9" * 5000 + "}", "a number has 5000 digits"),
    "nan": ('{"rope_theta": NaN}', "NaN, which is no JSON"),
    "infinite": ('{"rope_theta": 1e999}', "too large"),
    "surrogate": ('{"model_type": "\\ud800"}', "half of a surrogate pair"),
    "binary": (b"\xff\xfe\x00", "not readable as JSON"),
    "list": ("[1]", "expected a JSON object"),
    "empty": ("", "not readable as JSON"),
}


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("case", MADE_UP)
def test_json_that_is_none(folders, tmp_path, name, case):
    folder = shutil.copytree(folders / "shards", tmp_path / "m")
    content, message = MADE_UP[case]
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(folder, rf"{name}: .*{message}")


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "generation_config.json"])
@pytest.mark.parametrize("case", MADE_UP)
def test_json_beside_a_tokenizer_that_is_none(tmp_path, name, case):
    tokenizer = {"model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}, "added_tokens": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", **tokenizer}))
    assert sj.load_tokenizer(tmp_path).vocab_size == 2
    content, message = MADE_UP[case]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=rf"{name}: .*{message}") as caught:
        sj.load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_another_kind_in_the_folder_is_replaced(model, tmp_path):
    changed = jax.tree.map(lambda x: x + jnp.ones((), x.dtype), model)
    sj.save(changed, tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").write_text("mine")
    sj.save_hf(model, tmp_path / "m")
    assert same(sj.load(tmp_path / "m"), model)
    assert (tmp_path / "m" / "tokenizer.json").read_text() == "mine"
