"""GGUF's "gpt2" tokenizers, byte-level BPE: how each kind cuts a text first. A file names it in `tokenizer.ggml.pre`.

The cuts are those of the models' own `tokenizer.json` on Hugging Face. llama.cpp writes them as regular expressions of
its own, and leaves out Unicode's normal form, which some have.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from streamjax.checkpoints.json_files import one_line
from streamjax.data.text.gguf.vocabulary import Vocabulary, listed_merges

_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _words(digits: str, lines: str = r"[\r\n]*") -> str:
    return rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+{lines}|{_REST}"


def _cased(digits: str, endings: str) -> str:
    """Words that begin anew at an upper-case letter behind a lower-case one."""
    first = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{endings}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{endings}"
    return rf"{first}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_REST}"


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _bytes(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _digits(individual: bool) -> dict[str, Any]:
    return {"type": "Digits", "individual_digits": individual}


@dataclasses.dataclass(frozen=True)
class Kind:
    """How a kind of tokenizer cuts.

    Attributes:
      cuts: pre-tokenizers of a tokenizer.json.
      composed: whether a text is brought into Unicode's composed form first.
      whole_words: whether a word that is a token is that token, whatever the merges say.
      adds_bos: whether a text begins with BOS where the file does not say.
    """

    cuts: tuple[dict[str, Any], ...]
    composed: bool = False
    whole_words: bool = False
    adds_bos: bool = False


_HAN = "[一-龥\u0800-一가-\ud7ff]+"
_CASED_LETTERS = (  # of scripts with two cases; escapes where a normal form would change a letter
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝ"
    "\u1f5f-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌ\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fecῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-\u212dℯ-ℴℹℼ-ℿ"
    "ⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_PUNCTUATION = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
_MARKED = rf"{_PUNCTUATION}|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_REST}"

_GPT2 = Kind((_bytes(True),))
_GPT2_COMPOSED = Kind((_bytes(True),), composed=True)
_SINGLE_DIGITS = Kind((_digits(True), _bytes(True)))
_QWEN2 = Kind((_split(_words(r"\p{N}")), _bytes(False)))
_QWEN2_COMPOSED = Kind(_QWEN2.cuts, composed=True)
_CL100K = Kind((_split(_words(r"\p{N}{1,3}")), _bytes(False)))
_LLAMA3 = Kind(_CL100K.cuts, whole_words=True, adds_bos=True)
_O200K = Kind((_split(_cased(r"\p{N}{1,3}", f"{_ENDINGS}?")), _bytes(False)))
_FALCON = Kind(
    ({"type": "Punctuation", "behavior": "Contiguous"}, _bytes(True), _digits(False), _split("[0-9][0-9][0-9]"))
)

KINDS: dict[str, Kind] = {
    "default": _FALCON,
    "falcon": _FALCON,
    **dict.fromkeys(("gpt-2", "phi-2", "exaone4", "trillion", "mellum", "jais"), _GPT2),
    **dict.fromkeys(("mpt", "olmo"), _GPT2_COMPOSED),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell", "exaone", "minerva-7b"), _SINGLE_DIGITS),
    "command-r": Kind(_SINGLE_DIGITS.cuts, composed=True),
    **dict.fromkeys(("stablelm2", "hunyuan", "megrez", "solar-open", "deepseek-r1-qwen"), _QWEN2),
    "qwen2": _QWEN2_COMPOSED,
    **dict.fromkeys(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), _CL100K),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral"), _LLAMA3),
    **dict.fromkeys(("gpt-4o", "llama4"), _O200K),
    "tekken": Kind((_split(_cased(r"\p{N}", "")), _bytes(False)), whole_words=True, adds_bos=True),
    "deepseek-llm": Kind(
        (
            _split("[\r\n]"),
            _split(rf"\s?[{_CASED_LETTERS}]+"),
            _split(r"\s?[!-/:-~！-／：-～‘-‟　-。]+"),
            _split(r"\s+$"),
            _split(_HAN),
            _digits(True),
            _bytes(False),
        )
    ),
    "deepseek-coder": Kind(
        (
            _split("[\r\n]"),
            _split(r"\s?\p{L}+"),
            _split(r"\s?\p{P}+"),
            _split(_HAN),
            _digits(True),
            _bytes(False),
        )
    ),
    "deepseek-v3": Kind(
        (
            _split(r"\p{N}{1,3}"),
            _split("[一-龥\u3040-ゟ゠-ヿ]+"),
            _split(_MARKED),
            _bytes(False),
        )
    ),
}  # fmt: skip


def kind_of(vocabulary: Vocabulary) -> Kind:
    """How a file's tokenizer cuts.

    Raises:
      ValueError: it names a kind that is not known.
    """
    header = vocabulary.header
    name = header.get("tokenizer.ggml.pre", str, "default")
    if name not in KINDS:
        known = ", ".join(sorted(KINDS))
        raise ValueError(f"{header.file}: 'tokenizer.ggml.pre' is {one_line(name)[:40]!r}; streamjax knows {known}")
    return KINDS[name]


def byte_level(vocabulary: Vocabulary) -> dict[str, Any]:
    """The parts of a tokenizer.json that are the kind's.

    Raises:
      ValueError: no merges, or a kind that is not known.
    """
    kind = kind_of(vocabulary)
    pairs = listed_merges(vocabulary)
    return {
        "normalizer": {"type": "NFC"} if kind.composed else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": list(kind.cuts)},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "unk_token": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": kind.whole_words,
            "vocab": vocabulary.listed(),
            "merges": pairs,
        },
    }
