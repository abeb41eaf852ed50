"""Flags that name LoRA adapters beside a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from streamjax.checkpoints import user_path


def define_adapters(values: flags.FlagValues) -> None:
    """`--adapter=NAME=FOLDER`, which may be repeated."""
    flags.DEFINE_multi_string(
        "adapter", [], "NAME=FOLDER of a LoRA adapter of the model, in PEFT's form; requests that give NAME as their "
        "model get it. May be repeated.", flag_values=values,
    )  # fmt: skip


def named_adapters(given: Sequence[str]) -> dict[str, Path]:
    """Folders by name.

    Raises:
      ValueError: no name, no folder, or a name that is given twice.
    """
    found: dict[str, Path] = {}
    for text in given:
        name, is_there, folder = text.partition("=")
        if not is_there or not name or not folder:
            raise ValueError(f"--adapter={text}: write NAME=FOLDER")
        if name in found:
            raise ValueError(f"--adapter={text}: there are two of this name")
        found[name] = user_path(folder)
    return found
