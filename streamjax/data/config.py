"""What a training run reads: one frozen, checked dataclass."""

import dataclasses
from typing import Annotated, Literal

from streamjax.field_checks import Count, Interval, Size, check_fields

_PACKINGS = {
    "text": ("concat", "pack", "streams"),
    "conversations": ("pack", "rows"),
    "preferences": ("rows",),
    "prompts": ("rows",),
}


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes batches.

    Attributes:
      source: "builtin", a file, folder or glob of text files, or "tfds:name"; see `open_source`. "recall" draws
        rows with facts and questions, see `open_recall`. Of another format than "text": files of JSON lines, or
        "tfds:name"; see `read_lines`.
      format: "text" is documents, of which everything is learnt. "conversations" are messages with roles, or prompts
        and completions, of which the assistant's part is learnt; "preferences" pairs of a chosen and a rejected
        answer, for DPO; "prompts" what a model answers itself, for GRPO. See `read_example`.
      data_dir: where prepared data is kept; the usual places if None.
      text_key: the text feature of a TFDS dataset.
      tokenizer: a folder with `tokenizer.json`, or the file; bytes if None.
      parse_special: whether special tokens that are written out in documents, such as "<|im_end|>", are those tokens,
        as in conversations that a template has written; otherwise they are text.
      seq_len: T, tokens in a row.
      batch_size: B, rows in a batch, over all processes.
      packing: "concat" joins documents and cuts the stream; "pack" puts documents side by side as segments; "streams"
        makes every row of a batch a stream of its own that the same row of the next batch continues, its documents
        one after another as a model reads them at inference. Conversations are packed with "pack", and padded, one
        a row, with "rows"; pairs and prompts have "rows".
      truncation: what becomes of a conversation, an answer or a prompt that is longer than a row: "end" cuts off its
        end, "start" its beginning, "drop" leaves it out. How many were is said when a run begins.
      errors: a malformed record is an error that names its file and line, "raise", or is counted and left out, "skip".
      train_on: "assistant" learns what the assistant wrote in a conversation, "all" everything.
      bos_each_row: with "concat", every row begins with BOS, and documents do not. Where the tokenizer puts no BOS
        before a text, there is none in rows either.
      shuffle_seed: reorders documents anew in every epoch, and rows; None keeps the order of the source.
      shuffle_tokens: rows are shuffled within a buffer of this many tokens (and at most 4,096 rows), since neighbouring
        rows of a stream come from one document; 0 keeps the order of the stream, as "streams" does always.
      epochs: passes over the documents; None never ends.
      num_workers: processes that read and tokenise; 0 does it in this one. At most 1 for "streams".
      prefetch: batches prepared ahead in a thread; 0 prepares a batch when it is asked for.
    """

    source: str = "builtin"
    data_dir: str | None = None
    text_key: str = "text"
    tokenizer: str | None = None
    parse_special: bool = False
    seq_len: Annotated[int, Interval(2, 2**31 - 1)] = 1024
    batch_size: Size = 8
    format: Literal["text", "conversations", "preferences", "prompts"] = "text"
    packing: Literal["concat", "pack", "streams", "rows"] = "concat"
    truncation: Literal["end", "start", "drop"] = "end"
    errors: Literal["raise", "skip"] = "raise"
    train_on: Literal["assistant", "all"] = "assistant"
    bos_each_row: bool = True
    shuffle_seed: Annotated[int, Interval(0, 2**32 - 1)] | None = 0
    shuffle_tokens: Count = 1 << 20
    epochs: Size | None = None
    num_workers: Count = 0
    prefetch: Count = 2

    def __post_init__(self) -> None:
        check_fields(self)
        if self.packing == "streams" and self.num_workers > 1:
            raise ValueError(f'DataConfig.num_workers is {self.num_workers}: packing "streams" takes 0 or 1')
        allowed = _PACKINGS[self.format]
        if self.packing not in allowed:
            raise ValueError(
                f"DataConfig.packing is {self.packing!r}: of format {self.format!r} it must be {' or '.join(allowed)}"
            )
        if self.format == "prompts" and self.truncation == "end":
            raise ValueError(
                "DataConfig.truncation is 'end': a prompt's end is what is asked; of format 'prompts' it must be "
                "'drop' or 'start'"
            )
