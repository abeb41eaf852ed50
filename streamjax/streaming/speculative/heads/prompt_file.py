"""`PromptTokens`: trained prompt tokens of a model, in a file (parallel prompt decoding, Chen et al., 2405.18628)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int32
from safetensors.numpy import save_file

from streamjax.checkpoints.measured_files import measured_file
from streamjax.checkpoints.user_paths import user_path
from streamjax.streaming.speculative.heads.vocabulary import read_ids

KIND = "prompt tokens"
CARD = (
    "Prompt tokens of parallel prompt decoding (arXiv 2405.18628): behind a token that a model reads, it says at "
    "prompt token i what comes i tokens later than what it says at that token; 'prompts' are their embeddings, 'ids' "
    "the tokens that are guessed. For --draft=heads:FILE of streamjax, and for this model alone."
)


@dataclasses.dataclass(frozen=True)
class PromptTokens:
    """What `python -m train.draft_heads --kind=ppd` has trained.

    prompts: embeddings as the model's first layer reads them, float32. ids: the tokens that are guessed, in order.
    model: a fingerprint of the model's weights. tokens: how many they were trained on.
    """

    prompts: Float[np.ndarray, "M E"]
    ids: Int32[np.ndarray, " V"]
    model: str
    tokens: int

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; its metadata is the card."""
        about = {"kind": KIND, "model": self.model, "tokens": str(self.tokens), "card": CARD}
        save_file({"prompts": self.prompts.copy(), "ids": self.ids.astype(np.int32)}, user_path(path), metadata=about)

    @classmethod
    def load(cls, path: str | Path) -> PromptTokens:
        """What `save` wrote.

        Raises:
          ValueError: no such file, or another one; one line that names it.
        """
        with measured_file(path, KIND, "prompt tokens", "it has no prompt tokens") as (file, about):
            prompts, ids = np.ascontiguousarray(file.get_tensor("prompts")), read_ids(file)
            if prompts.ndim != 2 or not prompts.size or not np.isfinite(prompts).all():
                raise ValueError("the prompt tokens are no table of numbers")
            return cls(prompts.astype(np.float32), ids, about["model"], int(about["tokens"]))
