"""Tokenizers with changes that chance has made: they work, or are refused in one line."""

import json
import random
import shutil
import warnings

import pytest

import streamjax as sj
from tests.data.conftest import tokenizer_folders  # noqa: F401  (a fixture)
from tests.fuzz.mutations import draws, mutate_bytes, mutate_json, read_or_refused

TEXT = "The fox, naïve: 東 <s> 12"


def use(folder):
    """Everything that a stream asks of a tokenizer."""
    tokenizer = sj.load_tokenizer(folder)
    ids = tokenizer.encode(TEXT, add_bos=True)
    others = tokenizer.encode(TEXT, parse_special=False, continues=True)
    return ids, tokenizer.decode([*ids, *others, 0, 10**6]), tokenizer.token_bytes(5), tokenizer.text_vocab_size


def mutate_fields(tree, rng):
    """One change, half of the time outside the vocabulary and the merges, which are most of the tree."""
    model = tree.get("model")
    if model is None or rng.random() < 0.5:
        return mutate_json(tree, rng)
    long = {key: model[key] for key in ("vocab", "merges") if key in model}
    changed = mutate_json(tree | {"model": {key: value for key, value in model.items() if key not in long}}, rng)
    if isinstance(changed, dict) and isinstance(changed.get("model"), dict):
        changed["model"] |= long
    return changed


@draws(40)
@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "metaspace", "word_piece"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_changed_file_works_or_is_refused_in_one_line(tokenizer_folders, tmp_path, kind, name, draws, capfd):  # noqa: F811
    folder = shutil.copytree(tokenizer_folders[kind], tmp_path / kind)
    file, rng = folder / name, random.Random(kind)
    whole = file.read_text(encoding="utf-8")
    tree, refused = json.loads(whole), 0
    for draw in range(draws):
        if draw % 4:
            changed = json.dumps(mutate_fields(tree, rng)).encode()
        else:
            changed = mutate_bytes(whole.encode(), rng)
        file.write_bytes(changed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of special tokens that the vocabulary lacks
            refused += read_or_refused(lambda: use(folder), (draw, changed[:3000]))[0] is None
        capfd.readouterr()  # the library's Rust code writes its panics to the process's stderr
    assert refused
