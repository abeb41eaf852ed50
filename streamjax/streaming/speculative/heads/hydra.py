"""`Hydra`: heads that guess one after another from the model's last hidden state (Ankner et al., 2402.05109).

Head i guesses the token that is i + 1 places behind the newest one that the model has read. It reads the model's last
hidden state h, which has said the next token x_1, and the embeddings of x_1 and of the guesses x_2, ..., x_i: unlike
Medusa's heads (2401.10774), it knows what it continues. The tree of guesses holds the most probable paths.

What differs from the paper: a head adds to h, and reads its result by the model's own rows of frequent tokens
(`vocabulary.py`), where the paper's heads have matrices of their own; so heads are small. There is no prefix attention.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from streamjax.field_checks import Size
from streamjax.models.decoder import Decoder
from streamjax.streaming.speculative.heads.hydra_file import HydraHeads
from streamjax.streaming.speculative.heads.tree_drafter import Ahead, GrownTrees, TreeDrafter
from streamjax.streaming.speculative.heads.tree_growth import grow_tree
from streamjax.streaming.speculative.heads.vocabulary import DraftVocabulary, embedded, unit


class HydraWeights(NamedTuple):
    """The matrices of heads 1, 2, ...: [(1 + i) E, W] and [W, E]."""

    inward: tuple[Float[Array, "_ W"], ...]
    outward: tuple[Float[Array, "W E"], ...]


def head_state(
    weights: HydraWeights, head: int, hidden: Float[Array, "*B E"], said: Float[Array, "*B i E"]
) -> Float[Array, "*B E"]:
    """What head `head` = 1, 2, ... makes of the model's hidden state and the embeddings of the `head` tokens behind it:
    a hidden state that is to say what the model's own will say behind these."""
    hidden = hidden.astype(jnp.float32)
    read = jnp.concatenate((unit(hidden)[..., None, :], said), axis=-2)
    inner = read.reshape(*hidden.shape[:-1], -1) @ weights.inward[head - 1]
    return hidden + jax.nn.silu(inner) @ weights.outward[head - 1]


@partial(jax.jit, static_argnames=("length", "width", "nodes"))
def hydra_tree(
    model: Decoder,
    weights: HydraWeights,
    vocabulary: DraftVocabulary,
    hidden: Float[Array, "B E"],
    certain: Int32[Array, " B"],
    length: int,
    width: int,
    nodes: int,
) -> tuple[Int32[Array, "B N"], Int32[Array, "B N"]]:
    """`grow_tree` by heads; `hidden` is the model's state behind the newest token that it has read."""

    def says(path: Int32[Array, "B P i"]) -> Float[Array, "B P V"]:
        rows, paths, read = path.shape
        said = embedded(model, path.reshape(rows, -1)).reshape(rows, paths, read, -1)
        own = jnp.broadcast_to(hidden[:, None], (rows, paths, hidden.shape[1]))
        return jax.nn.log_softmax(vocabulary.logits(model, head_state(weights, read, own, said)))

    return grow_tree(says, certain, vocabulary.ids, length, width, nodes)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class HydraTrees(GrownTrees):
    """Trees by heads."""

    weights: HydraWeights

    def grow(
        self, model: Decoder, hidden: Float[Array, "B E"], ahead: Ahead, certain: Int32[Array, " B"]
    ) -> tuple[Int32[Array, "B N"], Int32[Array, "B N"]]:
        return hydra_tree(model, self.weights, self.vocabulary, hidden, certain, self.length, self.width, self.nodes)


@dataclasses.dataclass(kw_only=True)
class Hydra(TreeDrafter):
    """Trained heads that guess; see `python -m train.draft_heads`.

    Args:
      model: whom they guess for.
      heads: what was trained for it, or the file that has it.
      length: tokens of one way to go on; as many as there are heads where there are fewer.
      width: guesses of each level that others may follow.
      size: guesses that are kept of all levels.

    Raises:
      ValueError: no such file, or heads of another model.

    Example:
      >>> draft = Hydra(model=model, heads="heads.safetensors")
      >>> session = sj.Session(model, tokenizer, sj.kv.preset("streaming_llm"), draft=draft)
    """

    heads: HydraHeads | str | Path
    length: Size = 3
    width: Size = 3
    size: Size = 7

    def __post_init__(self) -> None:
        super().__post_init__()
        self.heads = heads = self.heads if isinstance(self.heads, HydraHeads) else HydraHeads.load(self.heads)
        self.take_up(heads, len(heads.inward), "draft heads")
        self._weights = HydraWeights(*(tuple(map(jnp.asarray, x)) for x in (heads.inward, heads.outward)))

    @property
    def trees(self) -> HydraTrees:
        return HydraTrees(self._vocabulary, self.length, self.width, self.nodes, weights=self._weights)
