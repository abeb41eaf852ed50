"""What a training run reads: one frozen, checked dataclass."""

import dataclasses
from typing import Annotated, Literal

from streamjax.field_checks import Count, Interval, Size, check_fields


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes batches.

    Attributes:
      source: "builtin", a file, folder or glob of text files, or "tfds:name"; see `open_source`. "recall" draws
        rows with facts and questions, see `open_recall`.
      data_dir: where prepared data is kept; the usual places if None.
      text_key: the text feature of a TFDS dataset.
      tokenizer: a folder with `tokenizer.json`, or the file; bytes if None.
      parse_special: whether special tokens that are written out in documents, such as "<|im_end|>", are those tokens,
        as in conversations that a template has written; otherwise they are text.
      seq_len: T, tokens in a row.
      batch_size: B, rows in a batch, over all processes.
      packing: "concat" joins documents and cuts the stream; "pack" puts documents side by side as segments; "streams"
        makes every row of a batch a stream of its own that the same row of the next batch continues, its documents
        one after another as a model reads them at inference.
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
    packing: Literal["concat", "pack", "streams"] = "concat"
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
