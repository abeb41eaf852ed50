"""A run that starts from a GGUF file leaves a folder with the model and the tokenizer."""

import dataclasses

import numpy as np

import streamjax as sj
from streamjax.training.run.workdir import export
from tests.gguf_files import byte_tokenizer, tiny_llama


def test_a_model_folder_has_the_tokenizer_of_the_file(tmp_path, run_config):
    file = tiny_llama(tmp_path / "x.gguf", tokenizer=byte_tokenizer() | {"ggml.add_bos_token": True})
    data = dataclasses.replace(run_config.data, tokenizer=str(file))
    config = dataclasses.replace(run_config, model=None, init_from=str(file), data=data)
    export(sj.load(file), tmp_path, config)
    folder = tmp_path / "model"
    mine, other = sj.load_tokenizer(folder), sj.load_tokenizer(file)
    text = "hello <|start|>, naïve 東京"
    assert mine.encode(text, add_bos=True) == other.encode(text, add_bos=True)
    for name in ("bos_id", "eos_ids", "pad_id", "bos_token", "eos_token", "adds_bos", "chat_template", "special_ids"):
        assert getattr(mine, name) == getattr(other, name), name
    tokens = np.array([other.encode(text)])
    np.testing.assert_array_equal(sj.forward(sj.load(folder), tokens), sj.forward(sj.load(file), tokens))
