"""Who guesses for the rows of an engine, by the drafter that it was given."""

from __future__ import annotations

from streamjax.models.decoder import Decoder
from streamjax.serving.batch import Batch
from streamjax.serving.drafts.grown import GrownGuesses
from streamjax.serving.drafts.guessing import Guessing, TrainedGuessing
from streamjax.serving.drafts.planning import pass_bytes
from streamjax.serving.drafts.small_models import SmallModelGuessing
from streamjax.streaming.speculative.drafter import Drafter
from streamjax.streaming.speculative.heads.tree_drafter import TreeDrafter
from streamjax.streaming.speculative.memory.plan import DraftMemory, fitted
from streamjax.streaming.speculative.ngrams import NGrams
from streamjax.streaming.speculative.small_model import SmallModel


def require_drafter(draft: Drafter | None, model: Decoder) -> None:
    """Raise a ValueError unless an engine of this model can take guesses from a drafter."""
    if draft is not None and not isinstance(draft, NGrams | TreeDrafter | SmallModel):
        raise ValueError(
            f"an engine takes guesses from NGrams, a SmallModel or trained heads alone, got {type(draft).__name__}"
        )
    if isinstance(draft, SmallModel) and draft.model.config.vocab_size != model.config.vocab_size:
        theirs, own = draft.model.config.vocab_size, model.config.vocab_size
        raise ValueError(f"the model that guesses has {theirs} ids and the one that it guesses for {own}: "
                         "their vocabularies must be equal")  # fmt: skip


def guessing_by(
    draft: Drafter | None, batch: Batch, memory_bytes: int | None = None, cost: float | None = None
) -> tuple[Guessing | None, DraftMemory | None]:
    """The guesses of a drafter for a batch, which learns of trees that grow on the device, and what they take.

    Args:
      memory_bytes: that they may take; None does not ask.
      cost: of a pass that reads guesses, in passes over one token a row; None: by the platform.
    """
    rows, vocab = batch.rows, batch.model.config.vocab_size
    memory = None
    if draft is not None and memory_bytes is not None:
        draft, memory = fitted(draft, batch.model, rows, memory_bytes, lambda one: pass_bytes(one, batch))
    if isinstance(draft, TreeDrafter):
        batch.grown = GrownGuesses(draft, batch.model, rows, batch.caches)
        return TrainedGuessing(draft, rows, vocab, cost), memory
    if isinstance(draft, SmallModel):
        return SmallModelGuessing(draft, batch.model, rows, vocab, cost), memory
    return Guessing(draft, rows, vocab, cost) if isinstance(draft, NGrams) else None, memory
