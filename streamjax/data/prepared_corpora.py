"""Prepared TFDS datasets on disk: examples by index, and one line for files that are missing, cut or damaged."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import tensorflow_datasets as tfds

_METADATA = ("dataset_info.json", "features.json")
_SHARDS_AT_ONCE = 64  # so many files are looked at before the first example is read


class PreparedExamples:
    """The examples of one split, as a TFDS data source has them; all of `features` are there in each.

    Args:
      builder: of the dataset.
      split: a split, or a slice of one.
      features: what is asked for.
      repair: what to do about damaged files, for the message.

    Raises:
      ValueError: files that are missing or damaged; one line that names the file. Examples raise it too.
    """

    def __init__(self, builder: Any, split: str, features: Sequence[str], repair: str):
        self._folder, self._split, self._features, self._repair = Path(builder.data_path), split, features, repair
        self._check_shards(builder.info.splits[split.partition("[")[0]])
        with one_line(self._folder, repair):
            self._examples = cast(Sequence[Any], builder.as_data_source(split))

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        with one_line(self._folder, self._repair, f"example {index} of {self._split!r}: "):
            example = self._examples[index]
            if example is None or any(example.get(name) is None for name in self._features):
                raise ValueError("it is not there")
            return example

    def _check_shards(self, split: Any) -> None:
        """Compare what files hold with what the dataset's own information says that they hold."""
        if len(split.filepaths) > _SHARDS_AT_ONCE:
            return
        from array_record.python.array_record_module import ArrayRecordReader  # not on every platform, as TFDS has it

        for file, examples in zip(split.filepaths, split.shard_lengths, strict=True):
            if ".array_record" not in Path(file).name:
                continue
            with one_line(Path(file), self._repair):
                if not Path(file).is_file():
                    raise ValueError("there is no such file")
                found = ArrayRecordReader(str(file)).num_records()
                if found != examples:
                    raise ValueError(f"{found} of its {examples} examples are there")


@contextlib.contextmanager
def one_line(
    place: Path, repair: str, part: str = "", passed_on: type[Exception] = NotImplementedError
) -> Iterator[None]:
    """Whatever a reader of prepared files stumbles over, as a ValueError of one line that names the place.

    Not so what is `passed_on`: TFDS's word for a dataset without random access, by default.
    """
    try:
        yield
    except passed_on:
        raise
    except Exception as error:  # TFDS, protobuf, JSON and Riegeli each raise their own
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{place} is damaged: {part}{reason.rstrip('.')}; {repair}") from error


def check_metadata(folder: Path, repair: str) -> None:
    """Raise a ValueError, one line, unless the files that describe a dataset are whole."""
    for name in _METADATA:
        with one_line(folder / name, repair):
            if not (folder / name).is_file():
                raise ValueError("there is no such file")
            if name == "features.json":
                tfds.features.FeaturesDict.from_config(str(folder))
            else:
                tfds.core.dataset_info.read_proto_from_builder_dir(str(folder))
