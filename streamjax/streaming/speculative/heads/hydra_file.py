"""`HydraHeads`: trained draft heads of a model, in a file (Hydra, Ankner et al., 2402.05109)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int32
from safetensors.numpy import save_file

from streamjax.checkpoints.measured_files import measured_file
from streamjax.checkpoints.user_paths import user_path
from streamjax.streaming.speculative.heads.vocabulary import read_ids

KIND = "hydra heads"
CARD = (
    "Hydra draft heads (arXiv 2402.05109): head i guesses the token that is i + 1 places behind the newest one that a "
    "model has read, from the model's last hidden state and the embeddings of the i tokens between; 'ids' are the "
    "tokens that are guessed. For --draft=heads:FILE of streamjax, and for this model alone."
)


@dataclasses.dataclass(frozen=True)
class HydraHeads:
    """What `python -m train.draft_heads --kind=hydra` has trained.

    inward, outward: of head i = 1, 2, ... the matrices [(1 + i) E, W] and [W, E], float32. ids: the tokens that are
    guessed, in order. model: a fingerprint of the model's weights. tokens: how many the heads were trained on.
    """

    inward: tuple[Float[np.ndarray, "_ W"], ...]
    outward: tuple[Float[np.ndarray, "W E"], ...]
    ids: Int32[np.ndarray, " V"]
    model: str
    tokens: int

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; its metadata is the card."""
        arrays = {"ids": self.ids.astype(np.int32)}
        for i, (inward, outward) in enumerate(zip(self.inward, self.outward, strict=True), 1):
            arrays |= {f"{i}.inward": inward.copy(), f"{i}.outward": outward.copy()}
        about = {"kind": KIND, "model": self.model, "tokens": str(self.tokens), "heads": str(len(self.inward))}
        save_file(arrays, user_path(path), metadata={**about, "card": CARD})

    @classmethod
    def load(cls, path: str | Path) -> HydraHeads:
        """What `save` wrote.

        Raises:
          ValueError: no such file, another one, or heads that do not fit together; one line that names it.
        """
        with measured_file(path, KIND, "hydra heads", "it has no hydra heads") as (file, about):
            ids, tables = read_ids(file), []
            for i in range(1, int(about["heads"]) + 1):
                tables.append(tuple(np.asarray(file.get_tensor(f"{i}.{side}")) for side in ("inward", "outward")))
            if not tables:
                raise ValueError("it needs a head")
            for i, (wide, narrow) in enumerate(tables, 1):
                fits = wide.ndim == narrow.ndim == 2 and wide.shape[1] == narrow.shape[0]
                if not fits or wide.shape[0] != (1 + i) * narrow.shape[1]:
                    raise ValueError(f"head {i} has matrices of {wide.shape} and {narrow.shape}")
                if not (np.isfinite(wide).all() and np.isfinite(narrow).all()):
                    raise ValueError(f"head {i} has numbers that are not finite")
            inward, outward = zip(*tables, strict=True)
            return cls(tuple(inward), tuple(outward), ids, about["model"], int(about["tokens"]))
