"""Drafters that were trained: what guesses from what a frozen model has computed, heads beside it or prompts in it."""

from pathlib import Path

from streamjax.checkpoints.measured_files import measured_kind
from streamjax.models.decoder import Decoder
from streamjax.streaming.speculative.drafter import Drafter
from streamjax.streaming.speculative.heads.hydra import Hydra
from streamjax.streaming.speculative.heads.hydra_file import HydraHeads
from streamjax.streaming.speculative.heads.parallel_prompts import ParallelPrompts
from streamjax.streaming.speculative.heads.prompt_file import KIND as PROMPTS
from streamjax.streaming.speculative.heads.prompt_file import PromptTokens

__all__ = ["Hydra", "ParallelPrompts", "described", "trained_drafter"]


def trained_drafter(model: Decoder, path: str | Path) -> Drafter:
    """The drafter that `python -m train.draft_heads` has trained for a model, whatever its kind.

    Raises:
      ValueError: no such file, or what was trained for another model.
    """
    if measured_kind(path) == PROMPTS:
        return ParallelPrompts(model=model, heads=path)
    return Hydra(model=model, heads=path)


def described(path: str | Path) -> str:
    """What a file of trained drafts holds, in one sentence.

    Raises:
      ValueError: no such file, or another one; one line that names it.
    """
    name = Path(path).stem
    if measured_kind(path) == PROMPTS:
        prompts = PromptTokens.load(path)
        return (
            f"{name}: {len(prompts.prompts)} prompt tokens, {len(prompts.ids)} ids, trained on {prompts.tokens} tokens."
        )
    heads = HydraHeads.load(path)
    return f"{name}: {len(heads.inward)} Hydra heads, {len(heads.ids)} ids, trained on {heads.tokens} tokens."
