"""Small tokenizers of the kinds that real models ship, trained here, and a session's copy of the built-in corpus."""

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

TEXTS = [
    "The quick brown fox jumps over the lazy dog. It doesn't stop there: 1, 2, 3 and (more).",
    "Straße, naïve café, 東京都 and 😀 are words too.\n\tdef f(x):\n        return x ** 2\n",
    "  leading spaces, trailing spaces  ",
] * 4


def _byte_level() -> tokenizers.Tokenizer:
    """GPT-2, Llama 3, Qwen, NeoX, Falcon: every token is a string of bytes."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def _prefix_space() -> tokenizers.Tokenizer:
    """RoBERTa's: byte-level, with a space before a text that has none."""
    tokenizer = _byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def _byte_fallback(over_words: bool = False) -> tokenizers.Tokenizer:
    """Llama 2, Mistral, Phi-3: SentencePiece's BPE with byte tokens for unknown characters."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trained = tokenizers.Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    if not over_words:
        trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trained.train_from_iterator(
        [text.encode("ascii", "ignore").decode() for text in TEXTS],
        trainers.BpeTrainer(vocab_size=150, show_progress=False),
    )
    model = json.loads(trained.to_str())["model"]
    words = ["<unk>", *byte_tokens, *model["vocab"]]
    vocabulary = {word: index for index, word in enumerate(words)}
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = trained.normalizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def _over_words() -> tokenizers.Tokenizer:
    """The same with tokens of several words."""
    return _byte_fallback(over_words=True)


def _first_space() -> tokenizers.Tokenizer:
    """The same as transformers writes it today: a space before the text, and not behind each special token."""
    tokenizer = _byte_fallback()
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return tokenizer


def _no_prefix() -> tokenizers.Tokenizer:
    """Gemma's: SentencePiece's BPE over the whole text, with nothing before it."""
    tokenizer = _byte_fallback()
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _metaspace() -> tokenizers.Tokenizer:
    """T5's: SentencePiece's unigram model without byte tokens."""
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=150, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def _word_piece() -> tokenizers.Tokenizer:
    """BERT's: continuations are marked, spaces are not kept."""
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=150, special_tokens=["[UNK]"], show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


KINDS = {
    "byte_level": _byte_level,
    "prefix_space": _prefix_space,
    "byte_fallback": _byte_fallback,
    "over_words": _over_words,
    "first_space": _first_space,
    "no_prefix": _no_prefix,
    "metaspace": _metaspace,
    "word_piece": _word_piece,
}


@pytest.fixture(scope="session")
def tokenizer_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each kind, with <s> and </s> as BOS and EOS, as `save_pretrained` writes it.

    "<|l|>" takes white space before it, "<|r|>" behind it.
    """
    folders = {}
    for kind, make in KINDS.items():
        tokenizer = make()
        tokenizer.add_special_tokens(["<s>", "</s>"])
        tokenizer.add_tokens(["<tool>", AddedToken("<|l|>", lstrip=True)])
        tokenizer.add_special_tokens([AddedToken("<|r|>", rstrip=True)])
        folder = tmp_path_factory.mktemp(kind)
        tokenizer.save(str(folder / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": {"content": "</s>"}}
        settings["eos_token"]["__type"] = "AddedToken"
        settings["clean_up_tokenization_spaces"] = False
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        folders[kind] = folder
    return folders


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where this session keeps the built-in corpus."""
    return tmp_path_factory.mktemp("corpus")
